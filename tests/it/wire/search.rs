//! How far before the end of the target something may be missing, and what the search for it keeps in memory.

use anyhow::{Context, Result};
use serde_json::json;

use crate::harness::{Outgoing, SITE, Site, client::request};

const STREAM: &str = "S";
const MIB: u64 = 1 << 20;

/// A message that the target refuses each time, and a hundred after it that it takes: however many runs try, they store
/// no more after it than one of them could have in flight. A search relies on that.
#[tokio::test]
async fn runs_store_one_window_behind_a_refused_message() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({})).await?;
    let full = json!({"max_msgs_per_subject": 1, "discard": "new", "discard_new_per_subject": true});
    site.target_stream(STREAM, full).await?;
    let first = (1..=2).map(|i| Outgoing::new("s.full", i.to_string()));
    raw.publish_all(first.chain((3..=102).map(|i| Outgoing::new(format!("s.free.{i}"), i.to_string())))).await?;
    site.add(STREAM, json!({"limits": {"messages_in_flight": 10}})).await?;
    for process in 1..=4 {
        site.events.all("held", process).await?;
        let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
        assert_eq!(row["position"]["source_seq"], 1, "{row}");
        let stored = site.at_target(STREAM).await?;
        assert!(stored <= 1 + 9, "process {process}: {stored} messages");
        // The next process does not know what was refused.
        site.stop().await?;
        site.service.restart().await?;
    }
    Ok(())
}

/// The source lost all but its first 100 of `count` messages, and the target has copies of all of them: the memory that the
/// service needs beyond what it needs without a search.
async fn search_over(count: u64) -> Result<u64> {
    let mut site = Site::start().await?;
    site.source_stream(STREAM, json!({})).await?;
    site.target_stream(STREAM, json!({})).await?;
    site.publish(STREAM, 1..=100).await?;
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 100).await?;
    request(&site.client, "replicator.pause", json!({"replication": STREAM})).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    site.stop().await?;
    let newest = site.source().await?.read_stream(STREAM).await?.last().context("no message")?.time / 1_000_000;
    let lost = (101..=count).map(|seq| {
        let provenance = format!("Choria-SR-Source: {STREAM} {seq} {SITE} {SITE} {}", newest + seq);
        Outgoing::new("s.lost", []).with_lines(&[&provenance, &format!("Nats-Msg-Id: lost-{seq}")])
    });
    let last = site.target().await?.publish_all(lost).await?;
    let mut record = site.position(STREAM).await?.context("no position record")?;
    record["source"]["seq"] = count.into();
    record["source"]["time_ns"] = ((newest + count) * 1_000_000).into();
    record["target"]["seq"] = last.into();
    record["target"]["source_seq"] = count.into();
    site.bucket("REPLICATOR_POSITIONS").await?.put(STREAM, serde_json::to_vec(&record)?.into()).await?;
    site.service.restart().await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    let before = site.service.usage().rss_peak;
    request(&site.client, "replicator.resume", json!({"replication": STREAM})).await?;
    let row = site.settled(STREAM, 100).await?;
    assert_eq!(row["only_at_target"]["messages"], count - 100, "{row}");
    let after = site.service.usage().rss_peak;
    println!("{count} copies: {} KiB before the search, {} KiB more for it", before >> 10, (after - before) >> 10);
    Ok(after - before)
}

/// Of each message of the target 92 bytes were kept once. What is read at the time, and what an allocator keeps of it, takes
/// up to 38 MiB.
const MOST: u64 = 56 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_search_over_500_000_copies_keeps_a_part_of_them() -> Result<()> {
    let took = search_over(500_000).await?;
    assert!(took < MOST, "{took} bytes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "stores a million messages: make check-long"]
async fn a_search_over_1_000_000_copies_keeps_a_part_of_them() -> Result<()> {
    let took = search_over(1_000_000).await?;
    assert!(took < MOST, "{took} bytes");
    Ok(())
}
