//! What is equal gives no finding, whatever the document says, and whatever happens meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{ID, clean, copied, message, shown, tamper, verified};
use crate::{
    harness::{Outgoing, SITE, Service, Site, request, wait_for},
    wire::mirror::begin_as,
};

#[tokio::test]
async fn what_is_copied_as_configured_is_equal() -> Result<()> {
    for (target, fields) in [
        (None, json!({})),
        (Some(json!({})), json!({})),
        (None, json!({"filter_subjects": ["orders.1", "orders.3"], "exclude_subjects": ["orders.3"]})),
        (None, json!({"target_subject_prefix": "copy", "target_stream": "COPY"})),
        (
            None,
            json!({"subject_transforms": [{"src": "orders.*", "dest": "x.{{wildcard(1)}}.y"}], "target_stream": "COPY"}),
        ),
        (None, json!({"start_sequence": 900})),
        (None, json!({"target_initiated": true})),
        (None, json!({"name": "other"})),
    ] {
        let site = Site::small().await?;
        if let Some(config) = target {
            site.target_stream(ID, config).await?;
        }
        let id = if fields["name"].is_null() { ID.to_owned() } else { format!("{ID}.other") };
        site.source_stream(ID, json!({})).await?.publish_all((1..=2_000).map(message)).await?;
        site.add(ID, fields.clone()).await?;
        site.row_when(&id, "is caught up", |row| {
            row["lag"]["messages"] == 0 && row["position"]["source_seq"].as_u64() >= Some(1_990)
        })
        .await?;
        let found = verified(&site, &id, json!({})).await?;
        clean(&found, &site).with_context(|| fields.to_string())?;
        let compared = found["source_messages"].as_u64().unwrap_or_default();
        let expect = if fields["filter_subjects"].is_null() { 1_900..=2_000 } else { 250..=300 };
        assert!(expect.contains(&compared), "{fields}: {found:#}");
        if !fields["start_sequence"].is_null() {
            assert_eq!(found["expected"], json!({"before_start": 899}), "{found:#}");
        }
        clean(&verified(&site, &id, json!({"sample": "10%"})).await?, &site)?;
    }
    Ok(())
}

#[tokio::test]
async fn what_sampling_skips_is_expected() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream(ID, json!({})).await?.publish_all((1..=2_000).map(message)).await?;
    site.add(ID, json!({"inspect_subject_token": 2, "inspect_duration": "1h"})).await?;
    site.settled(ID, 2_000).await?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    let copies = site.at_target(ID).await?;
    assert_eq!(found["expected"], json!({"sampled": 2_000 - copies}), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn what_limits_removed_is_expected() -> Result<()> {
    let site = Site::small().await?;
    site.target_stream(ID, json!({"max_msgs": 700})).await?;
    copied(&site, json!({}), 1_000).await?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"removed_at_target": 300}), "{found:#}");
    // At the source: the oldest, some in between, and all of a subject.
    let mut source = site.source().await?;
    for purge in [json!({"seq": 401}), json!({"filter": "orders.5"})] {
        source.api("STREAM.PURGE.ORDERS", purge).await?;
    }
    for seq in [800, 801, 998] {
        source.api("STREAM.MSG.DELETE.ORDERS", json!({"seq": seq})).await?;
    }
    let left = source.stream_state(ID).await?["messages"].as_u64().context("messages")?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["source_messages"], left, "{found:#}");
    // By what is at the target from 401 on.
    assert_eq!(found["expected"], json!({"removed_at_source": 600 - left}), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_bucket_is_equal_while_it_is_written() -> Result<()> {
    let site = Site::start().await?;
    let config = json!({"subjects": ["$KV.b.>"], "max_msgs_per_subject": 3, "allow_rollup_hdrs": true, "deny_delete": true,
        "allow_direct": true, "discard": "new"});
    site.source_stream("KV_b", config).await?;
    let put = |i: u64| Outgoing::new(format!("$KV.b.key{}", i % 40), i.to_string());
    let mut source = site.source().await?;
    source.publish_all((1..=2_000).map(put)).await?;
    source.publish(&Outgoing::new("$KV.b.key7", "").with_lines(&["KV-Operation: PURGE", "Nats-Rollup: sub"])).await?;
    site.add("KV_b", json!({})).await?;
    site.settled("KV_b", 2_001).await?;
    let found = verified(&site, "KV_b", json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["source_messages"], 118, "{found:#}");
    let writer = tokio::spawn(async move {
        let mut written = 2_001;
        loop {
            written += 100;
            source.publish_all((written - 99..=written).map(put)).await?;
            if written > 1_000_000 {
                return anyhow::Ok(());
            }
        }
    });
    let writer = tokio_util::task::AbortOnDropHandle::new(writer);
    for _ in 0..5 {
        clean(&verified(&site, "KV_b", json!({})).await?, &site)?;
    }
    drop(writer);
    Ok(())
}

#[tokio::test]
async fn a_target_that_others_write_to_is_equal() -> Result<()> {
    let site = Site::small().await?;
    site.target_stream(ID, json!({})).await?;
    site.source_stream(ID, json!({})).await?.publish_all((1..=500).map(message)).await?;
    site.add(ID, json!({"target_mode": "shared"})).await?;
    let mut target = site.target().await?;
    for round in 0..5_u64 {
        target.publish_all((0..20).map(|i| Outgoing::new("orders.own", i.to_string()))).await?;
        site.source().await?.publish_all((1..=100).map(|i| message(500 + round * 100 + i))).await?;
    }
    site.settled(ID, 1_000).await?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"other_writer": 100}), "{found:#}");
    Ok(())
}

/// With `target_mode: auto`, what the copy has not found yet is no other than what it has found.
#[tokio::test]
async fn others_at_an_auto_target_are_expected() -> Result<()> {
    let site = Site::small().await?;
    let mut target = site.target_stream(ID, json!({})).await?;
    copied(&site, json!({}), 500).await?;
    let row = site.row(ID).await.context("a row")?;
    assert_eq!(row["target_mode"], "exclusive", "{row:#}");
    target.publish(&Outgoing::new("orders.own", "after the last copy")).await?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"other_writer": 1}), "{found:#}");
    // The copy finds it.
    site.source().await?.publish_all((501..=510).map(message)).await?;
    site.settled(ID, 510).await?;
    site.row_when(ID, "shares the target", |row| row["target_mode"] == "shared").await?;
    let found = verified(&site, ID, json!({})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"other_writer": 1}), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn native_kinds_are_equal() -> Result<()> {
    for kind in ["mirror", "source"] {
        let (site, fields) = begin_as(kind, "2.15.1", &[]).await?;
        let mut source = site.source_stream(ID, json!({})).await?;
        source.publish_all((1..=3_000).map(message)).await?;
        for seq in [5, 6, 1_500] {
            source.api("STREAM.MSG.DELETE.ORDERS", json!({"seq": seq})).await?;
        }
        site.add(ID, fields).await?;
        site.settled(ID, 3_000).await?;
        let found = verified(&site, ID, json!({})).await?;
        clean(&found, &site).context(kind)?;
        assert_eq!((&found["source_messages"], &found["expected"]), (&json!(2_997), &json!({})), "{kind} {found:#}");
        // What is removed at the target without a limit is a finding.
        site.target().await?.api("STREAM.MSG.DELETE.ORDERS", json!({"seq": 700})).await?;
        let found = verified(&site, ID, json!({})).await?;
        let expect = if kind == "mirror" { 700 } else { 702 };
        assert_eq!(super::ranges(&found, "missing"), [(expect, expect)], "{kind} {found:#}");
        let repair = json!({"replication": ID, "repair": true});
        crate::harness::client::refused(&site.send("verify", repair).await?, 409, &format!("its kind is `{kind}`"));
    }
    Ok(())
}

#[tokio::test]
async fn queues_say_why_nothing_is_compared() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream(ID, json!({"retention": "workqueue"})).await?;
    site.add(ID, json!({})).await?;
    site.row_when(ID, "runs", |row| row["state"] == "running").await?;
    let found = verified(&site, ID, json!({})).await?;
    assert_eq!(found["state"], "failed", "{found:#}");
    assert!(found["error"].as_str().is_some_and(|error| error.contains("`workqueue` retention")), "{found:#}");
    Ok(())
}

/// While both sides are written, the leader is killed and the servers restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_found_while_leaders_are_killed() -> Result<()> {
    let mut site = Site::builder().args(["--instance", "one", "--lease-ttl", "3s"]).start().await?;
    let two = || Service::builder(&site.service_url(), SITE).instance("two").args(["--lease-ttl", "3s"]);
    let mut second = two().start().await?;
    site.source_stream(ID, json!({})).await?.publish_all((1..=20_000).map(message)).await?;
    site.add(ID, json!({"target_mode": "shared"})).await?;
    site.settled(ID, 20_000).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    let writer = tokio::spawn(async move {
        let mut number = 20_000_u64;
        loop {
            source.publish_all((1..=50).map(|i| message(number + i))).await?;
            target.publish_all((0..5).map(|i| Outgoing::new("orders.own", i.to_string()))).await?;
            number += 50;
            tokio::time::sleep(Duration::from_millis(20)).await;
            if number > 10_000_000 {
                return anyhow::Ok(());
            }
        }
    });
    let writer = tokio_util::task::AbortOnDropHandle::new(writer);
    for round in 0..2 {
        let started = request(&site.client, "replicator.verify", json!({"replication": ID, "rate": 8_000})).await?;
        wait_for("the comparison to be under way", crate::harness::LIMIT, async || {
            shown(&site, ID)
                .await
                .is_ok_and(|found| found["job"] == started["job"] && found["source_messages"].as_u64() > Some(1_000))
        })
        .await?;
        let before = shown(&site, ID).await?;
        let killed = before["instance"].clone();
        if killed == "one" {
            site.service.kill()?;
        } else {
            second.kill()?;
        }
        let begun = Instant::now();
        let found = super::ended(&site, ID, &started["job"]).await?;
        clean(&found, &site).with_context(|| format!("round {round}\n{}", second.log()))?;
        assert!(found["instance"] != killed && found["starts"].as_u64() >= Some(2), "{found:#}");
        assert!(found["source_messages"].as_u64() >= Some(20_000), "{found:#}");
        println!("round {round}: {:?} after the kill, {} messages", begun.elapsed(), found["source_messages"]);
        match killed == "one" {
            true => site.service.restart().await?,
            false => second.restart().await?,
        }
    }
    drop(writer);
    Ok(())
}

/// Both servers restart while it compares.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_found_while_servers_restart() -> Result<()> {
    let mut site = Site::start().await?;
    copied(&site, json!({}), 20_000).await?;
    let started = request(&site.client, "replicator.verify", json!({"replication": ID, "rate": 5_000})).await?;
    for side in ["source", "target"] {
        let before = shown(&site, ID).await?["source_messages"].as_u64().unwrap_or_default();
        wait_for("the comparison to move", crate::harness::LIMIT, async || {
            shown(&site, ID).await.is_ok_and(|found| found["source_messages"].as_u64() > Some(before + 1_000))
        })
        .await?;
        let server = if side == "source" { &mut site.source } else { &mut site.target };
        server.kill()?;
        server.restart().await?;
    }
    let found = super::ended(&site, ID, &started["job"]).await?;
    clean(&found, &site)?;
    assert_eq!((&found["source_messages"], &found["starts"]), (&json!(20_000), &json!(1)), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_document_has_it_compared_by_itself() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    copied(&site, json!({}), 500).await?;
    tamper(&site, ID, |messages| _ = messages.remove(9)).await?;
    let fields = json!({"verify": {"every": "1h", "rate": 100_000}});
    request(&site.client, "replicator.config.update", site.document_with(ID, fields)).await?;
    request(&site.client, "replicator.resume", json!({"replication": ID})).await?;
    let row = site.row_when(ID, "is compared", |row| row["verify"]["state"] == "done").await?;
    let found = shown(&site, ID).await?;
    assert_eq!((&found["scheduled"], &found["rate"]), (&json!(true), &json!(100_000)), "{found:#}");
    assert_eq!(row["verify"]["last"]["messages"].as_u64(), found["source_messages"].as_u64(), "{row:#}");
    let event: Value = site.events.ever("verified").await?;
    assert_eq!((&event["job"], &event["state"]), (&found["job"], &json!("done")), "{event:#}");
    let (_, metrics) = site.service.get("/metrics").await?;
    let expect =
        format!("verify_findings{{stream=\"{ID}\",replicator=\"{SITE}\",worker=\"{SITE}\"}} {}", found["findings"]);
    assert!(metrics.contains(&expect), "{expect}\n{metrics}");
    Ok(())
}
