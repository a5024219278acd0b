//! Kills and restarts in the middle of a copy: every message once, in order.

use std::time::Duration;

use anyhow::Result;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::harness::{Expect, Outgoing, Site, wait_for};

const LONG: Duration = Duration::from_secs(120);
const COUNT: u64 = 60_000;

fn message(i: u64) -> Outgoing {
    Outgoing::new(format!("k.{}", i % 11), format!("{i:0>200}"))
}

/// How the target stream comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The service makes it: with fast-ingest where the server knows that.
    Made,
    /// It is there before, without fast-ingest.
    Plain,
}

/// A source stream with messages, a target as asked for, and the copy begun.
async fn begin(target: Target) -> Result<Site> {
    // One name over all kills.
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut raw = site.source_stream("K", json!({})).await?;
    raw.publish_all((1..=COUNT).map(message)).await?;
    if target == Target::Plain {
        site.target_stream("K", json!({})).await?;
    }
    // Few in the air, so that the copy takes long enough to be disturbed.
    site.add("K", json!({"limits": {"messages_in_flight": 500}})).await?;
    Ok(site)
}

/// 0 while the server is down.
async fn target_messages(site: &Site) -> u64 {
    site.at_target("K").await.unwrap_or_default()
}

/// Kills the service at random moments of one copy.
async fn kill_the_service(target: Target, kills: u64) -> Result<()> {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut site = begin(target).await?;
    for kill in 1..=kills {
        // At a random count in this kill's share of the copy: early, late and in between.
        let at = (COUNT * kill / (kills + 2)).saturating_sub(random.random_range(0..COUNT / 40));
        wait_for("the copy to go on", LONG, async || target_messages(&site).await >= at).await?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    let row = site.settled_within("K", COUNT, LONG).await?;
    let fast = target == Target::Made && site.target.at_least(2, 14);
    assert_eq!(row["transport"], if fast { "fast_ingest" } else { "pipelined" }, "{row}");
    site.verify("K", &Expect::copy_of("K")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_of_the_service_in_one_copy_by_fast_ingest() -> Result<()> {
    kill_the_service(Target::Made, 20).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_of_the_service_in_one_pipelined_copy() -> Result<()> {
    kill_the_service(Target::Plain, 20).await
}

async fn kill_a_server(target: Target, kill_target: bool) -> Result<()> {
    let mut site = begin(target).await?;
    for share in [4, 2] {
        wait_for("the copy to go on", LONG, async || target_messages(&site).await >= COUNT / share).await?;
        let server = if kill_target { &mut site.target } else { &mut site.source };
        server.kill()?;
        server.restart().await?;
        let before = target_messages(&site).await;
        let begin = std::time::Instant::now();
        wait_for("the copy to go on by itself", Duration::from_secs(10), async || {
            target_messages(&site).await > before || before >= COUNT
        })
        .await?;
        println!("went on {:?} after the restart", begin.elapsed());
    }
    site.settled_within("K", COUNT, LONG).await?;
    site.verify("K", &Expect::copy_of("K")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_target_server_is_killed_twice() -> Result<()> {
    kill_a_server(Target::Made, true).await?;
    kill_a_server(Target::Plain, true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_server_is_killed_twice() -> Result<()> {
    kill_a_server(Target::Made, false).await?;
    kill_a_server(Target::Plain, false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_in_order_settles_what_is_in_the_air() -> Result<()> {
    let mut site = begin(Target::Made).await?;
    wait_for("the copy to begin", LONG, async || target_messages(&site).await >= COUNT / 10).await?;
    assert!(site.service.stop().await?.success());
    let stored = target_messages(&site).await;
    assert!(stored < COUNT, "the stop came too late to tell anything");
    site.service.restart().await?;
    let row = site.settled_within("K", COUNT, LONG).await?;
    // Everything that the first run sent had been settled and saved: the second one began right behind it.
    assert_eq!(row["counters"]["copied"], COUNT - stored, "{row}");
    site.verify("K", &Expect::copy_of("K")).await
}
