//! Kills and restarts in the middle of a copy: every message once, in order.

use std::time::Duration;

use anyhow::Result;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::harness::{Expect, LIMIT, Outgoing, Role, Server, Site, wait_for};

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

impl Target {
    /// Whether the copy goes by fast-ingest: a stream that the service makes on a server that knows it.
    fn is_fast(self, site: &Site) -> bool {
        self == Self::Made && site.target.at_least(2, 14)
    }
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
    // Few in flight, so that the copy takes long enough to be disturbed.
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
        wait_for("the copy to continue", LONG, async || target_messages(&site).await >= at).await?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    let row = site.settled_within("K", COUNT, LONG).await?;
    assert_eq!(row["transport"], if target.is_fast(&site) { "fast_ingest" } else { "pipelined" }, "{row}");
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
        wait_for("the copy to continue", LONG, async || target_messages(&site).await >= COUNT / share).await?;
        let server = if kill_target { &mut site.target } else { &mut site.source };
        server.kill()?;
        server.restart().await?;
        let before = target_messages(&site).await;
        let begin = std::time::Instant::now();
        wait_for("the copy to continue by itself", LIMIT, async || {
            target_messages(&site).await > before || before >= COUNT
        })
        .await?;
        println!("continued {:?} after the restart", begin.elapsed());
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
    // Everything that the first run sent had been settled and saved: the second one began right after it.
    assert_eq!(row["counters"]["copied"], COUNT - stored, "{row}");
    site.verify("K", &Expect::copy_of("K")).await
}

/// The disk of the target fills up, or the account may use no more of it, and then there is room again.
async fn full_disk(target: Target, account: bool) -> Result<()> {
    let builder = Server::builder(Role::Target);
    let builder = match account {
        true => builder.config(
            "accounts { A { users: [{user: a, password: b}], jetstream { max_file: 24MB } } }\nno_auth_user: a",
        ),
        false => builder.store_limit(24 << 20),
    };
    let (source, server) = tokio::try_join!(Server::start(Role::Source), builder.start())?;
    let site = Site::builder().on(source, server).start().await?;
    let mut raw = site.source_stream("D", json!({})).await?;
    let count = raw.publish_all((0..800).map(|i| Outgoing::new("d.a", format!("{i:0>16384}")))).await?;
    let mut other = site.target_stream("OTHER", json!({})).await?;
    other.publish_all((0..1000).map(|_| Outgoing::new("other.a", vec![b'x'; 16384]))).await?;
    if target == Target::Plain {
        site.target_stream("D", json!({})).await?;
    }
    site.add("D", json!({})).await?;
    let stopped = |row: &Value| row["state"] == "retrying" || row["state"] == "held";
    let row = site.row_when("D", "finds the disk full", |row| stopped(row) && row["counters"]["copied"] != 0).await?;
    println!("{target:?}: {} ({})", row["last_error"]["message"], row["state"]);
    let before = site.at_target("D").await?;
    assert!(before < count, "{row}");
    other.api("STREAM.PURGE.OTHER", Value::Null).await?;
    let begun = std::time::Instant::now();
    wait_for("the copy to continue by itself", LIMIT, async || site.at_target("D").await.is_ok_and(|now| now > before))
        .await?;
    println!("{target:?}: continued {:?} after there was room", begun.elapsed());
    site.settled_within("D", count, LONG).await?;
    let expect = Expect::copy_of("D");
    // Messages that were refused among others in flight are stored after them.
    site.verify("D", &if target.is_fast(&site) { expect } else { expect.late_allowed() }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_of_the_target_stops_the_copy_until_there_is_room() -> Result<()> {
    tokio::try_join!(
        full_disk(Target::Made, false),
        full_disk(Target::Plain, false),
        full_disk(Target::Made, true),
        full_disk(Target::Plain, true),
    )?;
    Ok(())
}
