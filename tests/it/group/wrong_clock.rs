//! An instance whose host clock is wrong, and that does not lead: its answers show the same ages as the leader's.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::harness::{Clock, LIMIT, Outgoing, Proxy, SITE, Service, Site, Skew, site::merged, wait_value};

const STREAM: &str = "S";
/// How wrong the host clock of the second instance is, seconds.
const WRONG: i64 = 3_600;
/// The clock of the source was set by so much after the messages were stored: so old they are, seconds.
const AGE: i64 = 50 * 60;
/// Ages may differ by this on a busy machine, seconds.
const ABOUT: i64 = 10 * 60;

/// A site with an instance `one`, and the way to its source by which messages are [`AGE`] old.
async fn site() -> Result<(Site, Proxy)> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    proxy.clock(Clock::Set(AGE));
    Ok((site, proxy))
}

/// The second instance, with its clock.
async fn two(site: &Site, wrong: i64) -> Result<(Service, Skew)> {
    let skew = Skew::of(wrong)?;
    let (name, value) = skew.variable();
    let service = Service::builder(&site.service_url(), SITE).instance("two").env(name, &value).start().await?;
    // Its log has the time that it reads.
    let log = service.log();
    let stamp = log.split_whitespace().find_map(|word| DateTime::parse_from_rfc3339(word).ok()).context("a time")?;
    let off = (stamp.to_utc() - Utc::now()).num_seconds();
    ensure!((off - wrong).abs() < ABOUT, "its clock is wrong by {off} s, not by {wrong} s");
    Ok((service, skew))
}

/// What both instances answer.
async fn both(site: &Site, endpoint: &str, body: &Value) -> Result<Vec<Value>> {
    let inbox = site.client.new_inbox();
    let replies = site.client.subscribe(inbox.clone()).await?;
    site.client.publish_with_reply(format!("replicator.{endpoint}"), inbox, body.to_string().into()).await?;
    let replies = replies.take(2).map(|reply| serde_json::from_slice(&reply.payload));
    let replies: Vec<Result<Value, _>> = tokio::time::timeout(LIMIT, replies.collect()).await.context("two answers")?;
    Ok(replies.into_iter().collect::<Result<_, _>>()?)
}

fn is_about(seconds: Option<f64>, expect: i64) -> bool {
    seconds.is_some_and(|seconds| (seconds - expect as f64).abs() < ABOUT as f64)
}

/// Both show the age of what waits, and how long the source keeps it.
async fn show_ages(site: &Site, state: &str, max_age: i64) -> Result<()> {
    let known = async || {
        let replies = both(site, "status", &json!({})).await.ok()?;
        // Until the second one has what the leader saved.
        replies.iter().all(|reply| !reply["replications"][0]["headroom"].is_null()).then_some(replies)
    };
    let replies = wait_value("both to know the headroom", LIMIT, known).await?;
    for reply in &replies {
        let row = &reply["replications"][0];
        ensure!(row["state"] == state, "{replies:?}");
        ensure!(is_about(row["lag"]["seconds"].as_f64(), AGE), "{replies:?}");
        ensure!(is_about(row["headroom"]["seconds"].as_f64(), max_age - AGE), "{replies:?}");
    }
    Ok(())
}

#[tokio::test]
async fn lag_and_headroom_do_not_depend_on_its_clock() -> Result<()> {
    let max_age = 2 * 3_600;
    for wrong in [WRONG, -WRONG] {
        let (site, proxy) = site().await?;
        let config = json!({"max_age": Duration::from_secs(max_age).as_nanos() as u64});
        site.source_stream(STREAM, config).await?;
        site.publish(STREAM, 1..=5_000).await?;
        site.add(STREAM, json!({"source_url": proxy.url(), "limits": {"messages_per_second": 1}})).await?;
        let waits = |row: &Value| row["leader"] == "one" && row["state"] == "running" && !row["headroom"].is_null();
        site.row_when(STREAM, "has a lag", waits).await?;
        let (mut service, _skew) = two(&site, wrong).await?;
        show_ages(&site, "running", max_age as i64).await?;
        // And what it reads at its start, a while after it was written.
        service.stop().await?;
        site.ask("pause", STREAM).await?;
        site.row_when(STREAM, "is paused", |row| row["state"] == "paused" && !row["headroom"].is_null()).await?;
        service.restart().await?;
        show_ages(&site, "paused", max_age as i64).await?;
    }
    Ok(())
}

#[tokio::test]
async fn senders_are_seen_when_the_leader_says() -> Result<()> {
    for wrong in [WRONG, -WRONG] {
        let site = Site::builder().args(["--instance", "one"]).start().await?;
        let proxy = Proxy::start(site.source.port()).await?;
        // By the source's clock everything is earlier.
        proxy.clock(Clock::Wrong(-AGE));
        let mut raw = site.source_stream(STREAM, json!({})).await?;
        let sent = raw.publish(&Outgoing::new("s.a", json!({"sender": "one"}).to_string())).await?;
        let sampled = json!({"inspect_field": "sender", "inspect_duration": "10h"});
        site.add(STREAM, merged(json!({"source_url": proxy.url()}), sampled)).await?;
        site.settled(STREAM, sent).await?;
        let (_service, _skew) = two(&site, wrong).await?;
        let all = json!({"replication": STREAM});
        let known = async || {
            let replies = both(&site, "senders", &all).await.ok()?;
            replies.iter().all(|reply| reply["total"] == 1).then_some(())
        };
        wait_value("both to know the sender", LIMIT, known).await?;
        let replies = both(&site, "senders", &json!({"replication": STREAM, "since": "30m"})).await?;
        for reply in &replies {
            ensure!(reply["total"] == 1, "{replies:?}");
            let now: DateTime<Utc> = serde_json::from_value(reply["now"].clone())?;
            ensure!(is_about(Some((Utc::now() - now).as_seconds_f64()), AGE), "{replies:?}");
        }
    }
    Ok(())
}

/// Changes carry a deadline by the clock of the host that they are sent from.
#[tokio::test]
async fn a_command_changes_something_whatever_its_clock_says() -> Result<()> {
    let site = Site::small().await?;
    site.replicate(STREAM, 5).await?;
    for wrong in [WRONG, -WRONG] {
        let skew = Skew::of(wrong)?;
        let (name, value) = skew.variable();
        let cli = site.cli().env(name, &value);
        cli.ok(["pause", STREAM]).await?;
        site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
        cli.ok(["resume", STREAM]).await?;
        site.row_when(STREAM, "runs", |row| row["state"] == "running").await?;
    }
    Ok(())
}
