//! Strict order, and how long a target has to remember.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::raw::header_values;
use crate::harness::{Cluster, Expect, Outgoing, Raw, Role, Server, Site, checker, connect, request, wait_for};

const LONG: Duration = Duration::from_secs(180);

/// Copies into a pipelined stream of three replicas whose leader steps down again and again; what the target holds.
async fn under_step_downs(ordering: &str, count: u64, step_downs: usize) -> Result<(Value, bool)> {
    let cluster = Cluster::start(Role::Target).await?;
    let site = Site::small().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((1..=count).map(|i| Outgoing::new(format!("s.{}", i % 5), i.to_string()))).await?;
    let mut at_target = Raw::connect(&cluster.servers[0].url()).await?;
    at_target.create_stream("S", json!({"subjects": ["s.>"], "num_replicas": 3})).await?;
    let document =
        json!({"stream": "S", "source_url": site.source.url(), "target_url": cluster.url(), "ordering": ordering});
    request(&site.client, "replicator.config.add", document).await?;
    for step in 1..=step_downs as u64 {
        let share = count / (step_downs as u64 + 1);
        let far = async || {
            site.row("S").await.is_some_and(|row| row["position"]["source_seq"].as_u64() >= Some(share * step))
        };
        wait_for("the copy to continue", LONG, far).await.with_context(|| site.service.log())?;
        cluster.step_down("S").await?;
    }
    // A leader that goes while no message is on its way refuses none: then again, with more to copy.
    let mut last = count;
    while ordering == "strict" && last < 10 * count {
        if site.row("S").await.is_some_and(|row| row["counters"]["errors"].as_u64() > Some(0)) {
            break;
        }
        site.publish("S", last + 1..=last + count / 2).await?;
        last += count / 2;
        cluster.step_down("S").await?;
    }
    let row = site.settled_within("S", last, LONG).await?;
    let from = raw.read_stream("S").await?;
    let copied = cluster.read_stream("S").await?;
    // Each once, whatever happened.
    checker::compare(&from, &copied, &Expect::copy_of("S").late_allowed()).verify()?;
    let in_order = checker::compare(&from, &copied, &Expect::copy_of("S")).is_clean();
    Ok((row, in_order))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_order_is_kept_under_step_downs() -> Result<()> {
    let (row, in_order) = under_step_downs("strict", 3_000, 4).await?;
    assert_eq!((&row["transport"], &row["ordering"]), (&json!("pipelined"), &json!("strict")), "{row}");
    ensure!(row["counters"]["errors"].as_u64() > Some(0), "nothing was refused: {row}");
    ensure!(in_order, "not in order: {row}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relaxed_order_loses_and_doubles_nothing_under_step_downs() -> Result<()> {
    let (row, in_order) = under_step_downs("relaxed", 60_000, 4).await?;
    assert_eq!((&row["transport"], &row["ordering"]), (&json!("pipelined"), &json!("relaxed")), "{row}");
    println!("in order: {in_order}");
    Ok(())
}

#[tokio::test]
async fn a_strict_copy_bears_the_chain_where_nobody_else_writes() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((1..=300).map(|i| Outgoing::new("s.a", i.to_string()))).await?;
    site.target_stream("S", json!({})).await?;
    site.add("S", json!({"ordering": "strict"})).await?;
    let row = site.settled("S", 300).await?;
    assert_eq!((&row["target_mode"], &row["ordering"]), (&json!("exclusive"), &json!("strict")), "{row}");
    let mut target = site.target().await?;
    for (place, copy) in (0..).zip(target.read_stream("S").await?) {
        assert_eq!(header_values(&copy.header, "Nats-Expected-Last-Sequence"), [place.to_string()]);
        assert_eq!(header_values(&copy.header, "Nats-Msg-Id").len(), 1);
    }
    // A foreign message breaks it; nothing is lost, and the order stays.
    target.publish(&Outgoing::new("s.foreign", "x")).await?;
    site.publish("S", 301..=1_000).await?;
    let row = site.settled("S", 1_000).await?;
    assert_eq!((&row["target_mode"], &row["ordering"]), (&json!("shared"), &json!("strict")), "{row}");
    site.verify("S", &Expect::copy_of("S").shared()).await?;
    // Relaxed again: the ids stay the same.
    let relaxed = request(&site.client, "replicator.config.update", site.document("S")).await?;
    let follows = |row: &Value| row["config_revision"] == relaxed["revision"] && row["state"] == "running";
    site.row_when("S", "follows the document", follows).await?;
    site.publish("S", 1_001..=2_000).await?;
    let row = site.settled("S", 2_000).await?;
    assert_eq!(row["ordering"], "relaxed", "{row}");
    site.verify("S", &Expect::copy_of("S").shared()).await
}

#[tokio::test]
async fn a_target_with_batches_is_strict_whatever_the_document_says() -> Result<()> {
    let site = Site::start().await?;
    if !site.target.at_least(2, 14) {
        return Ok(());
    }
    site.filled("S", 2_000).await?;
    site.add("S", json!({"ordering": "relaxed"})).await?;
    let row = site.settled("S", 2_000).await?;
    assert_eq!((&row["transport"], &row["ordering"]), (&json!("fast_ingest"), &json!("strict")), "{row}");
    Ok(())
}

// Ids and windows.

#[tokio::test]
async fn a_window_that_is_too_short_is_told_once_per_start_and_before() -> Result<()> {
    let mut site = Site::start().await?;
    site.filled("S", 100).await?;
    site.target_stream("S", json!({"duplicate_window": 20_000_000_000_u64})).await?;
    let reply = request(&site.client, "replicator.config.validate", site.document("S")).await?;
    let warning = &reply["warnings"][0];
    assert_eq!((&reply["valid"], &warning["path"]), (&json!(true), &json!("/target_stream")), "{reply:#}");
    ensure!(
        warning["message"].as_str().is_some_and(|text| text.contains("is 20s") && text.contains("58s")),
        "{warning}"
    );
    site.add("S", json!({})).await?;
    site.settled("S", 100).await?;
    let told = site.events.ever("duplicate-window").await?;
    assert_eq!((&told["window_ms"], &told["needed_ms"]), (&json!(20_000), &json!(58_000)), "{told}");
    ensure!(site.service.log().contains("duplicate window"), "{}", site.service.log());
    // Not at every run.
    site.target.restart().await?;
    site.publish("S", 101..=110).await?;
    site.settled("S", 110).await?;
    assert_eq!(site.events.told("duplicate-window").len(), 1);
    site.stop().await?;
    site.service.restart().await?;
    site.settled("S", 110).await?;
    wait_for("the second start to tell it", LONG, async || site.events.told("duplicate-window").len() == 2).await?;
    Ok(())
}

#[tokio::test]
async fn where_the_chain_keeps_duplicates_out_no_window_is_told() -> Result<()> {
    let site = Site::start().await?;
    if !site.target.at_least(2, 14) {
        return Ok(());
    }
    site.filled("S", 100).await?;
    site.target_stream("S", json!({"duplicate_window": 1_000_000_000_u64, "allow_batched": true})).await?;
    let reply = request(&site.client, "replicator.config.validate", site.document("S")).await?;
    assert_eq!(reply["warnings"], json!([]), "{reply:#}");
    site.add("S", json!({})).await?;
    site.settled("S", 100).await?;
    site.events.quiet(&["duplicate-window"])
}

/// A durable of the target's readers, which consumes all but every tenth message.
async fn consume(site: &Site) -> Result<u64> {
    let mut raw = site.target().await?;
    let last = raw.stream_state("S").await?["last_seq"].as_u64().unwrap_or_default();
    let mut taken = 0;
    let client = connect(&site.target.url()).await?;
    let stream = async_nats::jetstream::new(client.clone()).get_stream("S").await?;
    let consumer: async_nats::jetstream::consumer::PullConsumer =
        stream.get_consumer("reader").await.map_err(|error| anyhow::anyhow!("{error}"))?;
    let mut messages = consumer.fetch().max_messages(last as usize).expires(Duration::from_secs(2)).messages().await?;
    while let Some(Ok(message)) = futures_util::StreamExt::next(&mut messages).await {
        let seq = message.info().map_err(|error| anyhow::anyhow!("{error}"))?.stream_sequence;
        if seq % 10 != 3 {
            message.ack().await.map_err(|error| anyhow::anyhow!("{error}"))?;
            taken += 1;
        }
    }
    client.flush().await?;
    let gone = async || raw.stream_state("S").await.is_ok_and(|s| s["messages"].as_u64() <= Some(last / 10 + 1));
    wait_for("the messages to be gone", LONG, gone).await?;
    Ok(taken)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumed_target_is_not_filled_again_and_doubt_is_told() -> Result<()> {
    for retention in ["interest", "workqueue"] {
        for window_ms in [120_000_u64, 300] {
            let mut site = Site::start().await?;
            site.filled("S", 200).await?;
            let config = json!({"retention": retention, "duplicate_window": window_ms * 1_000_000});
            let mut target = site.target_stream("S", config).await?;
            let reader = json!({"stream_name": "S", "config": {"durable_name": "reader", "ack_policy": "explicit"}});
            target.api("CONSUMER.DURABLE.CREATE.S.reader", reader).await?;
            site.add("S", json!({})).await?;
            let row = site.settled("S", 200).await?;
            assert_eq!(row["target_mode"], "shared", "{row}");
            site.stop().await?;
            let before = site.position("S").await?.context("a record")?;
            ensure!(consume(&site).await? > 150);
            // The message at the saved position is consumed, and others before it are not.
            site.service.restart().await?;
            let row = site.settled("S", 200).await?;
            assert_eq!(row["counters"]["copied"], 0, "{row}");
            // More is copied, consumed and not saved: a crash right after it.
            site.publish("S", 201..=300).await?;
            site.settled("S", 300).await?;
            site.stop().await?;
            consume(&site).await?;
            site.bucket("REPLICATOR_POSITIONS").await?.put("S", serde_json::to_vec(&before)?.into()).await?;
            let last = target.stream_state("S").await?["last_seq"].as_u64();
            site.service.restart().await?;
            site.settled("S", 300).await?;
            let doubled = target.stream_state("S").await?["last_seq"].as_u64() > last;
            // What is still there is found, what is gone is known by its id; unless that is forgotten.
            assert_eq!(doubled, window_ms < 1_000, "{retention} {window_ms}");
            let doubt = || {
                let reasons = site.events.told("duplicate-window");
                reasons.iter().any(|told| told["reason"].as_str().is_some_and(|text| text.contains("consumed")))
            };
            if doubled {
                wait_for("the doubt to be reported", LONG, async || doubt()).await?;
            } else {
                ensure!(!doubt(), "{retention} {window_ms}: {:?}", site.events.told("duplicate-window"));
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn another_writer_holds_a_strict_exclusive_pipelined_copy() -> Result<()> {
    let target = Server::start(Role::Target).await?;
    let mut site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.filled("S", 500).await?;
    site.target_stream("S", json!({})).await?;
    let fields = json!({"ordering": "strict", "target_mode": "exclusive"});
    site.add("S", fields).await?;
    site.settled("S", 500).await?;
    let at = site.target().await?.publish(&Outgoing::new("s.foreign", "x")).await?;
    site.publish("S", 501..=600).await?;
    let told = site.events.wait("held", "S").await?;
    ensure!(
        told["message"].as_str().is_some_and(|text| text.contains(&format!("message {at} on `s.foreign`"))),
        "{told}"
    );
    // The other writer has stopped: the copy continues by itself.
    let row = site.settled("S", 600).await?;
    assert_eq!((&row["target_mode"], &row["ordering"]), (&json!("exclusive"), &json!("strict")), "{row}");
    site.verify("S", &Expect::copy_of("S").shared()).await?;
    Ok(())
}
