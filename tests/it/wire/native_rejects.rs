//! Messages that the target's server refuses: `on_reject` and `skip` of native feeds.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stream_replicator::native::FeedSubjects;

use super::{
    mirror::{begin_as, error},
    native_faults::ASKS_WITHIN,
};
use crate::harness::{Outgoing, SITE, Site, site::merged, wait_for};

const STREAM: &str = "ORDERS";
const TARGET: &str = "COPIED";

/// A site whose target takes up to 1,000 bytes, and whose source has the messages up to `last`, of which those are larger.
async fn begin(kind: &str, version: &str, large: &[u64], last: u64) -> Result<(Site, Value)> {
    let (site, fields) = begin_as(kind, version, &[]).await?;
    site.source_stream(STREAM, json!({})).await?;
    publish(&site, 1, last, large).await?;
    let subjects = FeedSubjects::of(SITE, STREAM);
    let origin = json!({"name": STREAM, "external": {"api": subjects.api(), "deliver": subjects.deliver()}});
    let mut config = json!({"name": TARGET, "storage": "file", "max_msg_size": 1_000});
    if kind == "mirror" {
        config["mirror"] = origin
    } else {
        config["sources"] = json!([origin])
    }
    site.target().await?.api(&format!("STREAM.CREATE.{TARGET}"), config).await?;
    Ok((site, merged(fields, json!({"target_stream": TARGET}))))
}

async fn publish(site: &Site, first: u64, last: u64, large: &[u64]) -> Result<()> {
    let messages = (first..=last).map(|number| {
        let size = if large.contains(&number) { 5_000 } else { 10 };
        Outgoing::new("orders.x", vec![b'a'; size])
    });
    site.source().await?.publish_all(messages).await?;
    Ok(())
}

/// Changes the configuration of the target stream.
async fn change(site: &Site, change: Value) -> Result<()> {
    let mut target = site.target().await?;
    let config = target.api(&format!("STREAM.INFO.{TARGET}"), Value::Null).await?["config"].clone();
    target.api(&format!("STREAM.UPDATE.{TARGET}"), merged(config, change)).await?;
    Ok(())
}

/// The target has these messages of the source.
async fn has(site: &Site, kind: &str, expect: &[u64]) -> Result<()> {
    let stored = site.target().await?.read_stream(TARGET).await?;
    let from = |message: &crate::harness::Stored| match kind {
        "mirror" => message.seq,
        _ => {
            let values = crate::harness::raw::header_values(&message.header, "Nats-Stream-Source");
            values.first().and_then(|value| value.split(' ').nth(1)?.parse().ok()).unwrap_or_default()
        }
    };
    let found: Vec<u64> = stored.iter().map(from).collect();
    ensure!(found == expect, "{found:?}, not {expect:?}\n{}", site.service.log());
    Ok(())
}

#[tokio::test]
async fn a_refused_message_holds_until_it_is_skipped() -> Result<()> {
    for (kind, version) in [("mirror", "2.15.1"), ("source", "2.15.1"), ("mirror", "2.10.26"), ("source", "2.12.8")] {
        let (site, fields) = begin(kind, version, &[6], 10).await?;
        site.add(STREAM, fields).await?;
        let text = "source message 6 has 5000 bytes, and target stream `COPIED` takes 1000 (`max_msg_size`)";
        let held = |row: &Value| row["state"] == "held" && error(row).contains(text);
        let row = site.row_when(STREAM, "is held", held).await.context(version)?;
        ensure!(row["last_error"]["source_seq"] == 6 && row["last_error"]["source_subject"] == "orders.x", "{row}");
        has(&site, kind, &[1, 2, 3, 4, 5]).await?;
        let reply = site.send("skip", json!({"replication": STREAM})).await?;
        ensure!(reply.body["source_seq"] == 6, "{reply:?}");
        let row = site.settled_within(STREAM, 10, ASKS_WITHIN).await.context(version)?;
        ensure!(row["counters"]["skipped_refused"] == 1, "{row}");
        has(&site, kind, &[1, 2, 3, 4, 5, 7, 8, 9, 10]).await?;
    }
    Ok(())
}

/// Nothing is stored after the message that was skipped, so the target of a source could ask for it again for ever.
#[tokio::test]
async fn the_last_message_stays_skipped_over_a_restart() -> Result<()> {
    for (kind, version) in [("mirror", "2.15.1"), ("source", "2.12.8")] {
        let (mut site, fields) = begin(kind, version, &[6], 6).await?;
        site.add(STREAM, fields).await?;
        site.row_when(STREAM, "is held", |row| row["state"] == "held").await.context(version)?;
        site.send("skip", json!({"replication": STREAM})).await?;
        let skipped = |row: &Value| row["counters"]["skipped_refused"] == 1 && row["state"] == "running";
        site.row_when(STREAM, "skipped it", skipped).await.context(version)?;
        site.service.kill()?;
        site.service.restart().await?;
        publish(&site, 7, 9, &[]).await?;
        site.settled_within(STREAM, 9, ASKS_WITHIN).await.with_context(|| site.service.log())?;
        let held = site.service.log().matches("held: source message 6").count();
        ensure!(held <= 1, "held {held} times\n{}", site.service.log());
        has(&site, kind, &[1, 2, 3, 4, 5, 7, 8, 9]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn refused_messages_are_skipped_or_dead_letters() -> Result<()> {
    for kind in ["mirror", "source"] {
        for on_reject in ["skip", "dead_letter"] {
            let (site, fields) = begin(kind, "2.15.1", &[3, 4, 8], 8).await?;
            let mut dead = site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
            let mut fields = merged(fields, json!({"on_reject": on_reject}));
            if on_reject == "dead_letter" {
                fields["dead_letter"] = json!({"subject": "dead.orders"});
            }
            site.add(STREAM, fields).await?;
            let row = site.settled_within(STREAM, 8, ASKS_WITHIN).await.with_context(|| site.service.log())?;
            has(&site, kind, &[1, 2, 5, 6, 7]).await?;
            let letters = dead.read_stream("DEAD").await?;
            let (skipped, dead_lettered) = if on_reject == "skip" { (3, 0) } else { (0, 3) };
            let counters = &row["counters"];
            ensure!(counters["skipped_refused"] == skipped && counters["dead_lettered"] == dead_lettered, "{row}");
            ensure!(
                letters.len() as u64 == dead_lettered && letters.iter().all(|letter| letter.payload.len() == 5_000)
            );
        }
    }
    Ok(())
}

/// A target that is full refuses every message: none of them is skipped, and the feed continues when there is room.
#[tokio::test]
async fn a_full_target_is_no_reason_to_skip() -> Result<()> {
    let messages = json!({"max_msgs": 5, "discard": "new"});
    let bytes = json!({"max_bytes": 300, "discard": "new"});
    let cases = [
        ("mirror", "2.15.1", "skip", &messages),
        ("mirror", "2.10.26", "dead_letter", &bytes),
        ("source", "2.15.1", "dead_letter", &messages),
        ("source", "2.12.8", "skip", &messages),
        ("mirror", "2.15.1", "hold", &bytes),
    ];
    let cases = cases.map(async |(kind, version, on_reject, limits)| {
        let (mut site, fields) = begin_as(kind, version, &[]).await?;
        site.source_stream(STREAM, json!({})).await?;
        site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
        publish(&site, 1, 5, &[]).await?;
        let mut fields = merged(fields, json!({"target_stream": TARGET, "on_reject": on_reject}));
        if on_reject == "dead_letter" {
            fields["dead_letter"] = json!({"subject": "dead.orders"});
        }
        site.add(STREAM, fields).await?;
        site.settled_within(STREAM, 5, ASKS_WITHIN).await?;
        change(&site, limits.clone()).await?;
        // A mirror is asked for its limits only now and then, and stores nothing after a message that it refused.
        site.service.kill()?;
        site.service.restart().await?;
        publish(&site, 6, 10, &[]).await?;
        let full = |row: &Value| row["state"] == "held" && error(row).contains("target stream `COPIED` is full");
        let waits = async || site.row(STREAM).await.is_some_and(|row| full(&row));
        let found = wait_for("the feed to wait for room", ASKS_WITHIN, waits).await;
        found.with_context(|| format!("{kind} at {version}\n{}", site.service.log()))?;
        let row = site.row(STREAM).await.context("a row")?;
        ensure!(row["last_error"]["source_seq"].is_null() && row["last_error"]["current"] == true, "{row}");
        let room = json!({"max_msgs": -1, "max_bytes": -1, "discard": "old"});
        if kind == "source" {
            site.target().await?.api(&format!("STREAM.PURGE.{TARGET}"), Value::Null).await?;
        } else {
            change(&site, room).await?;
        }
        let row = site.settled_within(STREAM, 10, ASKS_WITHIN).await.with_context(|| site.service.log())?;
        ensure!(row["state"] == "running" && row["last_error"]["current"] == false, "{row}");
        let counters = &row["counters"];
        ensure!(counters["skipped_refused"] == 0 && counters["dead_lettered"] == 0, "{row}");
        let first = if kind == "source" { 6 } else { 1 };
        has(&site, kind, &(first..=10).collect::<Vec<_>>()).await.context(version)
    });
    for case in futures_util::future::join_all(cases).await {
        case?;
    }
    Ok(())
}

/// The feed asks for the state of the target every 10 s only, and its limit is raised in between.
#[tokio::test]
async fn a_raised_limit_holds_for_the_next_message() -> Result<()> {
    for kind in ["mirror", "source"] {
        let (site, fields) = begin(kind, "2.15.1", &[], 5).await?;
        site.add(STREAM, merged(fields, json!({"on_reject": "skip"}))).await?;
        site.settled_within(STREAM, 5, ASKS_WITHIN).await?;
        change(&site, json!({"max_msg_size": 10_000})).await?;
        publish(&site, 6, 6, &[6]).await?;
        let row = site.settled_within(STREAM, 6, ASKS_WITHIN).await.with_context(|| site.service.log())?;
        ensure!(row["counters"]["skipped_refused"] == 0, "{row}");
        has(&site, kind, &[1, 2, 3, 4, 5, 6]).await?;
    }
    Ok(())
}
