//! What the service holds in memory does not grow with what waits at the source.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::harness::{LIMIT, Outgoing, Role, Server, Site, wait_for};

const LONG: Duration = Duration::from_secs(240);
const MIB: u64 = 1 << 20;

/// A target that stops taking anything in the middle of a copy of `count` messages of 16 KiB, until the run is given
/// up, and continues then.
async fn stalled_target(count: u64) -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("M", json!({})).await?;
    raw.publish_all((0..count).map(|i| Outgoing::new("m.a", format!("{i:0>16384}")))).await?;
    let before = site.service.usage().rss;
    site.add("M", json!({})).await?;
    site.copied("M", 100).await?;
    site.target.freeze()?;
    let full = |row: &serde_json::Value| row["in_flight"]["bytes"].as_u64().unwrap_or(0) > 4 * MIB;
    site.row_when("M", "has as much in flight as it may", full).await?;
    let stalled = site.row_when("M", "detects that the target is stalled", |row| row["state"] == "retrying").await?;
    assert!(stalled["position"]["source_seq"].as_u64().unwrap_or(count) < count, "it was stalled too late: {stalled}");
    site.target.thaw()?;
    site.settled_within("M", count, LONG).await?;
    let peak = site.service.usage().rss_peak;
    println!("{count} messages of 16 KiB: {} MiB before, {} MiB at the most", before / MIB, peak / MIB);
    assert!(peak < 256 * MIB, "{} MiB", peak / MIB);
    assert_eq!(site.at_target("M").await?, count);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lag_of_20_000_messages_takes_less_than_256_mib() -> Result<()> {
    stalled_target(20_000).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "moves 3.3 GB: make check-long"]
async fn a_lag_of_200_000_messages_takes_less_than_256_mib() -> Result<()> {
    stalled_target(200_000).await
}

/// Lanes that are idle hold no room for the large messages that they carried.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_leave_no_memory_behind() -> Result<()> {
    // 256 MB in all, of which an allocator may keep the room of one message for each of its threads.
    const REPLICATIONS: u64 = 16;
    let server = |role| Server::builder(role).config("max_payload: 33554432\nmax_pending: 134217728").start();
    let (source, target) = tokio::try_join!(server(Role::Source), server(Role::Target))?;
    let site = Site::builder().on(source, target).start().await?;
    let payload = vec![b'x'; 16_000_000];
    for index in 0..REPLICATIONS {
        let stream = format!("M{index}");
        let mut raw = site.source_stream(&stream, json!({})).await?;
        raw.publish(&Outgoing::new(format!("m{index}.a"), payload.clone())).await?;
        site.add(&stream, json!({})).await?;
        site.settled(&stream, 1).await?;
    }
    let small = async || site.service.usage().rss < 128 * MIB;
    wait_for("the memory to be given back", LIMIT, small).await.with_context(|| {
        let usage = site.service.usage();
        format!("{} MiB, {} at the most", usage.rss / MIB, usage.rss_peak / MIB)
    })
}
