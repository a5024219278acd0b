//! Only messages that the target has are acknowledged at the source, and others are redelivered: with every kind of
//! consumer.

use anyhow::{Context, Result, anyhow, ensure};
use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Site, connect, site::merged, wait_for};

/// So much the target takes before it is full.
const ROOM: u64 = 700;
const COUNT: u64 = 1_500;

/// A work queue with so many messages.
async fn queue(site: &Site, count: u64) -> Result<Raw> {
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    raw.publish_all((1..=count).map(|i| Outgoing::new("q.a", i.to_string()))).await?;
    Ok(raw)
}

/// A consumer such as that of Choria's replicator.
async fn make_consumer(raw: &mut Raw) -> Result<()> {
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 300_000_000_000u64, "max_ack_pending": 4 * COUNT});
    raw.api("CONSUMER.CREATE.Q.SR_TEST", json!({"stream_name": "Q", "config": config})).await.map(drop)
}

/// Everything arrives once and in order, and nothing is left at the source.
async fn finish(site: &Site, raw: &mut Raw, count: u64) -> Result<()> {
    site.settled("Q", count).await?;
    let copied = site.target().await?.read_stream("Q").await?;
    let numbers: Vec<_> = copied.iter().map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect();
    ensure!(numbers == (1..=count).map(|i| i.to_string()).collect::<Vec<_>>(), "{} at the target", numbers.len());
    let empty = async || raw.stream_state("Q").await.is_ok_and(|state| state["messages"] == 0);
    wait_for("the source to be empty", LIMIT, empty).await
}

/// Held again and again, it takes nothing away that the target has not stored.
#[tokio::test]
async fn what_a_full_target_has_not_stored_stays_in_a_work_queue() -> Result<()> {
    for (choria, batched) in [(true, true), (true, false), (false, true), (false, false)] {
        let site = Site::start().await?;
        let mut raw = queue(&site, COUNT).await?;
        if choria {
            make_consumer(&mut raw).await?;
        }
        let batches = if batched && site.target.at_least(2, 14) { json!({"allow_batched": true}) } else { json!({}) };
        let full = json!({"subjects": ["q.>"], "max_msgs": ROOM, "discard": "new"});
        let mut target = site.target_stream("Q", merged(full, batches)).await?;
        site.add("Q", json!({})).await?;
        let mut errors = 0;
        for _ in 0..3 {
            let held = |row: &Value| row["state"] == "held" && row["counters"]["errors"].as_u64() > Some(errors);
            let row = site.row_when("Q", "is held", held).await?;
            errors = row["counters"]["errors"].as_u64().context("errors")?;
            let left = raw.stream_state("Q").await?["messages"].as_u64().context("messages")?;
            ensure!(left >= COUNT - ROOM, "the source has {left} left, choria: {choria}, batched: {batched}: {row}");
            site.send("retry", json!({"replication": "Q"})).await?;
        }
        let mut config = target.api("STREAM.INFO.Q", Value::Null).await?["config"].take();
        config["max_msgs"] = json!(-1);
        target.api("STREAM.UPDATE.Q", config).await?;
        wait_for("the copy to continue", LIMIT, async || {
            let _ = site.send("retry", json!({"replication": "Q"})).await;
            site.row("Q").await.is_some_and(|row| row["state"] == "running")
        })
        .await?;
        finish(&site, &mut raw, COUNT).await?;
    }
    Ok(())
}

/// Whoever read from the consumer before has not acknowledged the first messages, and they would not come by themselves
/// for minutes.
#[tokio::test]
async fn what_was_delivered_and_not_acknowledged_comes_first() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = queue(&site, 20).await?;
    make_consumer(&mut raw).await?;
    let stream = jetstream::new(connect(&site.source.url()).await?).get_stream("Q").await?;
    let consumer = stream.get_consumer::<pull::Config>("SR_TEST").await.map_err(|error| anyhow!("{error}"))?;
    let batch = consumer.fetch().max_messages(5).messages().await?;
    ensure!(batch.count().await == 5, "not all of them came");
    let info = raw.api("CONSUMER.INFO.Q.SR_TEST", Value::Null).await?;
    assert_eq!(info["num_ack_pending"], 5, "{info}");
    site.add("Q", json!({})).await?;
    finish(&site, &mut raw, 20).await
}

/// The message at the saved position is gone, and messages that the document does not name are around it: what the source
/// stored later does not count as another stream.
#[tokio::test]
async fn a_hole_at_the_saved_position_is_no_source_reset() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    let publish = async |raw: &mut Raw, range: std::ops::RangeInclusive<u64>| {
        let subject = |i: u64| if i.is_multiple_of(2) { "q.a" } else { "q.b" };
        raw.publish_all(range.map(|i| Outgoing::new(subject(i), i.to_string()))).await
    };
    publish(&mut raw, 1..=21).await?;
    site.add("Q", json!({"filter_subject": "q.a"})).await?;
    for last in [20, 40] {
        site.settled("Q", last).await?;
        let acked = async || raw.stream_state("Q").await.is_ok_and(|state| state["messages"] == last / 2 + 1);
        wait_for("the acks to arrive", LIMIT, acked).await?;
        site.stop().await?;
        publish(&mut raw, last + 2..=last + 21).await?;
        site.service.restart().await?;
    }
    site.settled("Q", 60).await?;
    let copied = site.target().await?.read_stream("Q").await?;
    ensure!(copied.len() == 30, "{} at the target", copied.len());
    site.events.quiet(&["source-reset", "target-reset"])
}
