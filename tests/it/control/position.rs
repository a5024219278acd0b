//! `position`: moves the position of a paused replication, back and forward, and what follows does as asked.

use std::time::Duration;

use anyhow::{Context, Result};
use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};

use crate::harness::client::{Reply, refused};
use crate::harness::raw::header_values;
use crate::harness::{Outgoing, Role, Server, Site, timed};

/// What a move answers, but for the revision.
#[track_caller]
fn moved(reply: &Reply, dry_run: bool, from: u64, to: u64, copied_again: u64, passed_over: u64) {
    let expect = json!({
        "replication": "ORDERS", "revision": reply.body["revision"], "dry_run": dry_run, "from": from, "to": to,
        "copied_again": copied_again, "passed_over": passed_over
    });
    assert_eq!((reply.error, &reply.body), (None, &expect));
    assert_eq!(reply.body["revision"].is_null(), dry_run);
}

async fn move_to(site: &Site, seq: u64) -> Result<Reply> {
    site.send("position", json!({"replication": "ORDERS", "source_seq": seq})).await
}

/// Source sequences of the messages at the target, in target order.
async fn origins(site: &Site) -> Result<Vec<u64>> {
    let stored = site.target().await?.read_stream("ORDERS").await?;
    let origin = |block: &[u8]| {
        let value = header_values(block, "Choria-SR-Source").pop()?;
        value.split(' ').nth(1)?.parse().ok()
    };
    stored.iter().map(|message| origin(&message.header).context("a copy")).collect()
}

fn in_order(ranges: &[std::ops::RangeInclusive<u64>]) -> Vec<u64> {
    ranges.iter().cloned().flatten().collect()
}

/// Each way to write: pipelined; in batches with the chain; in batches with ids.
fn targets() -> [Value; 3] {
    [
        json!({}),
        json!({"allow_batched": true}),
        json!({"allow_batched": true, "allow_msg_ttl": true, "subject_delete_marker_ttl": 60_000_000_000_u64}),
    ]
}

/// So many messages, copied; then paused.
async fn paused(target: &Value, messages: u64) -> Result<Site> {
    let site = Site::small().await?;
    site.filled("ORDERS", messages).await?;
    site.target_stream("ORDERS", target.clone()).await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", messages).await?;
    site.ask("pause", "ORDERS").await?;
    Ok(site)
}

async fn resume(site: &Site, seq: u64) -> Result<Value> {
    site.ask("resume", "ORDERS").await?;
    site.settled("ORDERS", seq).await
}

/// However the position was moved, a restart continues after it, after a graceful stop and after a kill.
async fn goes_on_behind(site: &mut Site, seq: u64) -> Result<()> {
    let before = origins(site).await?;
    site.stop().await?;
    site.service.restart().await?;
    site.settled("ORDERS", seq).await?;
    site.service.kill()?;
    site.publish("ORDERS", 1..=10).await?;
    site.service.restart().await?;
    site.settled("ORDERS", seq + 10).await?;
    assert_eq!(origins(site).await?, [before, in_order(&[seq + 1..=seq + 10])].concat());
    Ok(())
}

#[tokio::test]
async fn moved_back_it_copies_again_exactly_what_was_asked() -> Result<()> {
    for target in targets() {
        let mut site = paused(&target, 100).await?;
        let mut events = site.listen().await?;
        let record = site.position("ORDERS").await?;
        let dry = json!({"replication": "ORDERS", "source_seq": 60, "dry_run": true});
        moved(&site.send("position", dry).await?, true, 100, 60, 40, 0);
        assert_eq!(site.position("ORDERS").await?, record, "a dry run changes nothing");

        moved(&move_to(&site, 60).await?, false, 100, 60, 40, 0);
        let told = events.wait("position-moved", "ORDERS").await?;
        assert_eq!(
            (&told["from"], &told["to"], &told["copied_again"], &told["passed_over"]),
            (&json!(100), &json!(60), &json!(40), &json!(0))
        );
        let row = site.row_when("ORDERS", "shows the position", |row| row["position"]["source_seq"] == 60).await?;
        assert_eq!(row["state"], "paused");
        assert_eq!(site.at_target("ORDERS").await?, 100, "nothing is copied before it is resumed");
        resume(&site, 100).await?;
        assert_eq!(events.wait("resumed", "ORDERS").await?["position"], 60);
        assert_eq!(origins(&site).await?, in_order(&[1..=100, 61..=100]), "{target}");
        goes_on_behind(&mut site, 100).await?;

        // Onto the beginning, and so for the second time.
        site.ask("pause", "ORDERS").await?;
        moved(&move_to(&site, 0).await?, false, 110, 0, 110, 0);
        resume(&site, 110).await?;
        assert_eq!(origins(&site).await?, in_order(&[1..=100, 61..=110, 1..=110]), "{target}");
        goes_on_behind(&mut site, 110).await?;
        events.quiet(&["gap", "source-reset", "target-reset", "target-shared"])?;
    }
    Ok(())
}

#[tokio::test]
async fn moved_forward_it_passes_over_what_was_asked() -> Result<()> {
    for target in targets() {
        let mut site = paused(&target, 100).await?;
        site.publish("ORDERS", 1..=50).await?;
        moved(&move_to(&site, 120).await?, false, 100, 120, 0, 20);
        resume(&site, 150).await?;
        assert_eq!(origins(&site).await?, in_order(&[1..=100, 121..=150]), "{target}");
        goes_on_behind(&mut site, 150).await?;
        site.events.quiet(&["gap", "source-reset", "target-reset", "target-shared"])?;
    }
    Ok(())
}

#[tokio::test]
async fn kills_after_a_move_back_lose_and_double_nothing_else() -> Result<()> {
    const ALL: u64 = 20_000;
    for target in targets() {
        let mut site = paused(&target, ALL).await?;
        moved(&move_to(&site, 5_000).await?, false, ALL, 5_000, ALL - 5_000, 0);
        site.ask("resume", "ORDERS").await?;
        for wait in [0, 5, 20, 60, 120] {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            site.service.kill()?;
            site.service.restart().await?;
        }
        site.settled("ORDERS", ALL).await?;
        let found = origins(&site).await?;
        assert!(found == in_order(&[1..=ALL, 5_001..=ALL]), "{target}: {} messages", found.len());
        goes_on_behind(&mut site, ALL).await?;
    }
    Ok(())
}

#[tokio::test]
async fn several_moves_in_one_pause_count_as_the_last_one() -> Result<()> {
    for target in targets() {
        let mut site = paused(&target, 100).await?;
        moved(&move_to(&site, 20).await?, false, 100, 20, 80, 0);
        moved(&move_to(&site, 70).await?, false, 20, 70, 0, 50);
        moved(&move_to(&site, 50).await?, false, 70, 50, 20, 0);
        site.service.kill()?;
        site.service.restart().await?;
        site.row_when("ORDERS", "is paused there", |row| {
            row["state"] == "paused" && row["position"]["source_seq"] == 50
        })
        .await?;
        resume(&site, 100).await?;
        assert_eq!(origins(&site).await?, in_order(&[1..=100, 51..=100]), "{target}");
        goes_on_behind(&mut site, 100).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_time_is_the_first_message_stored_at_or_after_it() -> Result<()> {
    let site = paused(&json!({}), 10).await?;
    let stored = site.source().await?.read_stream("ORDERS").await?;
    let at = |seq: usize| {
        let time = chrono::DateTime::from_timestamp_nanos(stored[seq - 1].time as i64);
        time.to_rfc3339_opts(SecondsFormat::Nanos, true)
    };
    let later = (Utc::now() + chrono::TimeDelta::hours(1)).to_rfc3339();
    for (time, to) in [(at(7), 6), (at(1), 0), ("2001-01-01T00:00:00Z".to_owned(), 0), (later, 10)] {
        let request = json!({"replication": "ORDERS", "time": time, "dry_run": true});
        moved(&site.send("position", request).await?, true, 10, to, 10 - to, 0);
    }
    let reply = site.send("position", json!({"replication": "ORDERS", "time": at(7)})).await?;
    moved(&reply, false, 10, 6, 4, 0);
    resume(&site, 10).await?;
    assert_eq!(origins(&site).await?, in_order(&[1..=10, 7..=10]));
    Ok(())
}

#[tokio::test]
async fn only_what_the_source_still_has_is_counted_and_is_no_gap() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("ORDERS", json!({"max_msgs": 40})).await?;
    site.target_stream("ORDERS", json!({})).await?;
    site.publish("ORDERS", 1..=40).await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", 40).await?;
    site.publish("ORDERS", 1..=20).await?;
    site.settled("ORDERS", 60).await?;
    site.ask("pause", "ORDERS").await?;
    moved(&move_to(&site, 0).await?, false, 60, 20, 40, 0);
    resume(&site, 60).await?;
    assert_eq!(origins(&site).await?, in_order(&[1..=60, 21..=60]));
    site.events.quiet(&["gap", "source-reset", "target-reset"])
}

#[tokio::test]
async fn what_cannot_be_is_refused() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    refused(&move_to(&site, 5).await?, 409, "`ORDERS` is not paused; pause it first");
    site.ask("pause", "ORDERS").await?;
    refused(&move_to(&site, 11).await?, 409, "the last sequence of source stream `ORDERS` is 10");
    for fields in [json!({}), json!({"source_seq": 1, "time": "2026-01-01T00:00:00Z"})] {
        let request = crate::harness::site::merged(json!({"replication": "ORDERS"}), fields);
        refused(&site.send("position", request).await?, 400, "one of `source_seq`, `time` and `ago`");
    }
    refused(&site.ask("position", "ORDERS").await?, 400, "one of `source_seq`, `time` and `ago`");
    for body in [r#"{"replication":"ORDERS","source_seq":-1}"#, r#"{"replication":"ORDERS","time":"soon"}"#] {
        refused(&site.ask("position", body).await?, 400, "not valid");
    }
    refused(&site.send("position", json!({"replication": "NONE", "source_seq": 1})).await?, 404, "`NONE`");
    let body = json!({"replication": "ORDERS", "source_seq": 1}).to_string();
    let late = site.ask_with("position", ("Replicator-Deadline", "1000"), body).await?;
    assert_eq!(late.code.as_deref(), Some("408"), "{late:?}");
    assert_eq!(site.position("ORDERS").await?.context("a record")?["source"]["seq"], 10);
    Ok(())
}

#[tokio::test]
async fn a_source_that_does_not_answer_is_told_in_time() -> Result<()> {
    let servers = (Server::start(Role::Source).await?, Server::start(Role::Target).await?);
    let mut site = Site::builder().on(servers.0, servers.1).start().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    site.ask("pause", "ORDERS").await?;
    site.source.freeze()?;
    let (reply, took) = timed(move_to(&site, 5)).await?;
    refused(&reply, 503, "did not answer in time");
    assert!(took < Duration::from_secs(3), "{took:?}");
    site.source.thaw()?;
    site.source.kill()?;
    let (reply, took) = timed(move_to(&site, 5)).await?;
    refused(&reply, 503, "the source cannot be asked");
    assert!(took < Duration::from_secs(3), "{took:?}");
    Ok(())
}

#[tokio::test]
async fn a_move_and_a_resume_at_once_never_lose_a_message() -> Result<()> {
    let site = paused(&json!({"allow_batched": true}), 50).await?;
    let mut last = 50;
    for round in 0..8 {
        let messages = (0..10).map(|i| Outgoing::new("orders.x", format!("{round} {i}")));
        last = site.source().await?.publish_all(messages).await?;
        let (moved, resumed) = tokio::join!(move_to(&site, last - 20), site.ask("resume", "ORDERS"));
        assert!(matches!(moved?.error, None | Some(409)));
        assert_eq!(resumed?.error, None);
        site.settled("ORDERS", last).await?;
        site.ask("pause", "ORDERS").await?;
    }
    let mut found = origins(&site).await?;
    found.sort_unstable();
    found.dedup();
    assert_eq!(found, in_order(&[1..=last]));
    Ok(())
}
