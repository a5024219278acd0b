//! `limits.messages_per_second` and `limits.bytes_per_second`, on both transports.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::rejects::transports;
use crate::harness::{Expect, Outgoing, PROMPT, SITE, Site, wait_for};

const LONG: Duration = Duration::from_secs(90);
const SIZE: usize = 500;

/// Source and target stream of this name with more than enough messages of 500 bytes and their subject.
async fn begin(site: &Site, stream: &str, target: Value, messages: u64) -> Result<()> {
    site.source_stream(stream, json!({})).await?;
    site.target_stream(stream, target).await?;
    publish(site, stream, messages).await
}

async fn publish(site: &Site, stream: &str, messages: u64) -> Result<()> {
    let subject = format!("{}.a", stream.to_lowercase());
    let messages = (0..messages).map(|_| Outgoing::new(&subject, vec![b'x'; SIZE]));
    site.source().await?.publish_all(messages).await?;
    Ok(())
}

/// Messages that arrive at the target in a second, measured for this time.
async fn rate(site: &Site, stream: &str, time: Duration) -> Result<f64> {
    let mut raw = site.target().await?;
    let mut stored = async || {
        let state = raw.stream_state(stream).await?;
        Ok::<_, anyhow::Error>((Instant::now(), state["messages"].as_u64().unwrap_or_default()))
    };
    let (from, before) = stored().await?;
    tokio::time::sleep(time).await;
    let (to, after) = stored().await?;
    Ok((after - before) as f64 / (to - from).as_secs_f64())
}

async fn begun(site: &Site, stream: &str) -> Result<()> {
    wait_for("the copy to begin", LONG, async || site.at_target(stream).await.is_ok_and(|messages| messages > 0)).await
}

/// The rate is within a tenth of the limit. On a busy machine one end of a measurement may fall into a stall: then another
/// one counts.
async fn near(site: &Site, stream: &str, time: Duration, limit: f64) -> Result<()> {
    let mut measured = Vec::new();
    for _ in 0..5 {
        let rate = rate(site, stream, time).await?;
        println!("{stream}: {rate:.1} messages/s where {limit:.1} are allowed");
        if (rate / limit - 1.0).abs() < 0.1 {
            return Ok(());
        }
        measured.push(rate);
    }
    bail!("{stream}: {measured:.1?} messages/s instead of {limit}")
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn messages_and_bytes_per_second_are_what_the_limits_say() -> Result<()> {
    let site = Site::start().await?;
    let bytes = |stream: &str| SIZE + stream.len() + ".a".len();
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, target, 40_000).await?;
        let document = |limits: Value| site.document_with(stream, json!({"limits": limits}));
        site.send("config.add", document(json!({"messages_per_second": 1_000}))).await?;
        begun(&site, stream).await?;
        near(&site, stream, Duration::from_secs(5), 1_000.0).await?;
        let limits = json!({"bytes_per_second": 500 * bytes(stream)});
        ensure!(site.send("config.update", document(limits)).await?.error.is_none());
        tokio::time::sleep(PROMPT).await;
        near(&site, stream, Duration::from_secs(5), 500.0).await?;
        let row = site.row_when(stream, "runs", |row| row["state"] == "running").await?;
        assert_eq!((&row["counters"]["errors"], &row["last_error"]), (&json!(0), &Value::Null), "{row}");
        // What was sent is settled in time, though more waits.
        let settled = row["position"]["source_seq"].as_u64().unwrap_or_default();
        wait_for("the position to move", Duration::from_secs(3), async || {
            let row = site.row(stream).await.unwrap_or_default();
            row["position"]["source_seq"].as_u64().is_some_and(|now| now > settled)
        })
        .await?;
        // Off again: the rest comes at once, and all of it once and in order.
        ensure!(site.send("config.update", site.document(stream)).await?.error.is_none());
        site.settled_within(stream, 40_000, LONG).await?;
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn a_limit_changes_within_a_second_by_request_and_by_hand() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, target, 60_000).await?;
        let document = |rate: u32| site.document_with(stream, json!({"limits": {"messages_per_second": rate}}));
        site.send("config.add", document(200)).await?;
        begun(&site, stream).await?;
        for (round, limit) in [2_000, 100, 1_000, 300].into_iter().enumerate() {
            if round % 2 == 0 {
                ensure!(site.send("config.update", document(limit)).await?.error.is_none());
            } else {
                site.put(stream, document(limit).to_string()).await?;
            }
            tokio::time::sleep(PROMPT).await;
            near(&site, stream, Duration::from_secs(3), f64::from(limit)).await?;
        }
        site.events.quiet(&["held", "stalled"])?;
        // Stopped, paused and taken off, none of it waits for the limit.
        let one = site.document_with(stream, json!({"limits": {"messages_per_second": 1}}));
        ensure!(site.send("config.update", one).await?.error.is_none());
        site.row_when(stream, "runs", |row| row["state"] == "running").await?;
        let asked = Instant::now();
        ensure!(site.ask("pause", stream).await?.error.is_none());
        site.row_when(stream, "is paused", |row| row["state"] == "paused").await?;
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        site.ask("resume", stream).await?;
        ensure!(site.send("config.update", site.document(stream)).await?.error.is_none());
        site.settled_within(stream, 60_000, LONG).await?;
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn one_message_larger_than_a_seconds_worth_passes() -> Result<()> {
    let mut site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        site.source_stream(stream, json!({})).await?;
        site.target_stream(stream, target).await?;
        let subject = format!("{}.a", stream.to_lowercase());
        let sizes = [10, 4_000, 10];
        site.source().await?.publish_all(sizes.map(|size| Outgoing::new(&subject, vec![b'x'; size]))).await?;
        let begin = Instant::now();
        site.add(stream, json!({"limits": {"bytes_per_second": 1_024}})).await?;
        site.settled(stream, 3).await?;
        // The first two after a second, the last one after the debt of almost three.
        let took = begin.elapsed();
        assert!(took > Duration::from_secs(3) && took < Duration::from_secs(8), "{took:?}");
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await?;
    }
    site.stop().await
}

/// The server forgets a consumer that nobody pulls from for 45 s, and the copy gives up when nothing moves for 30 s.
#[tokio::test]
#[ignore = "takes more than a minute"]
async fn a_wait_that_is_longer_than_any_watchdog_is_no_stall() -> Result<()> {
    let site = Site::start().await?;
    let streams = transports(&site.target);
    for (stream, target) in &streams {
        site.source_stream(stream, json!({})).await?;
        site.target_stream(stream, target.clone()).await?;
        let subject = format!("{}.a", stream.to_lowercase());
        // One message costs 70 s; far more than is read at once waits after it.
        let sizes = [70 << 10, 10].into_iter().chain(std::iter::repeat_n(1_000, 2_000));
        let messages = sizes.map(|size| Outgoing::new(&subject, vec![b'x'; size]));
        site.source().await?.publish_all(messages).await?;
        site.add(stream, json!({"limits": {"bytes_per_second": 1_024}})).await?;
    }
    for (stream, _) in &streams {
        let row = site.row_when(stream, "has sent the first", |row| row["position"]["source_seq"] == 1).await?;
        assert_eq!(row["in_flight"]["messages"], 0, "{row}");
    }
    tokio::time::sleep(Duration::from_secs(65)).await;
    for (stream, _) in &streams {
        let row =
            site.row_when(stream, "has sent more", |row| row["position"]["source_seq"].as_u64() > Some(2)).await?;
        let counters = &row["counters"];
        assert_eq!((&counters["errors"], &counters["consumers_recreated"]), (&json!(0), &json!(0)), "{row}");
        assert!(site.send("config.update", site.document(stream)).await?.error.is_none());
        site.settled_within(stream, 2_002, LONG).await?;
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await?;
    }
    site.events.quiet(&["held", "stalled"])
}
