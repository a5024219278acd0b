//! How long a copy stands still while it is handed over by request. `make check-long` runs it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, SITE, Service, Site, request, wait_for};

const COPIES: usize = 200;
/// Less than the shortest time that an instance leaves a lease to one that comes before it, as far as it is the rule that
/// counts: a single one may meet a busy machine.
const RIGHT: Duration = Duration::from_millis(500);

#[tokio::test]
#[ignore = "takes minutes: make check-long"]
async fn two_hundred_copies_are_handed_over_at_once() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut raw = site.source().await?;
    for n in 0..COPIES {
        raw.create_stream(&format!("S{n}"), json!({"subjects": [format!("s{n}")], "storage": "memory"})).await?;
    }
    let added = stream::iter(0..COPIES).map(async |n| site.add(&format!("S{n}"), json!({})).await);
    added.buffer_unordered(8).try_collect::<Vec<_>>().await?;
    let _two = Service::builder(&site.service_url(), SITE).instance("two").start().await?;
    let shares = async || {
        let reply = request(&site.client, "replicator.instances", Value::Null).await.unwrap_or_default();
        let leads = |at: usize| reply["instances"][at]["leads"].as_u64().unwrap_or_default() as usize;
        leads(0) + leads(1) == COPIES && leads(0).abs_diff(leads(1)) <= COPIES / 4
    };
    wait_for("an even share", LIMIT * 4, shares).await?;
    let mut target = site.target().await?;
    let mut times = Vec::new();
    for n in 0..COPIES {
        times.push(hand_over(&site, &mut raw, &mut target, n).await?);
    }
    times.sort_unstable();
    let late = times.iter().filter(|time| **time >= RIGHT).count();
    println!("{COPIES} stepdowns: median {:?}, worst {:?}, {late} late", times[COPIES / 2], times[COPIES - 1]);
    ensure!(late <= COPIES / 20, "{late} of {COPIES} took {RIGHT:?} or more: {times:?}");
    Ok(())
}

/// From the request until a message is copied that was published after the lease was given away.
async fn hand_over(site: &Site, source: &mut Raw, target: &mut Raw, n: usize) -> Result<Duration> {
    let (id, subject) = (format!("S{n}"), format!("s{n}"));
    let begun = Instant::now();
    let reply = request(&site.client, "replicator.stepdown", json!({"replication": id})).await?;
    source.publish_all([Outgoing::new(subject, "after")]).await?;
    let copied = async || target.stream_state(&id).await.is_ok_and(|state| state["messages"] == 1);
    wait_for("the message to be copied", LIMIT, copied).await?;
    let time = begun.elapsed();
    if time >= RIGHT {
        println!("{id}: {time:?}, {reply}");
    }
    Ok(time)
}
