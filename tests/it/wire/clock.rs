//! A source server whose clock differs from the clock of the service's host: ages are measured by the server's clock, and
//! the difference is reported.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::raw::header_values;
use crate::harness::{Clock, LIMIT, Outgoing, Proxy, Site, request, wait_for};

const STREAM: &str = "S";
/// So far clocks differ here, seconds.
const APART: i64 = 50 * 60;
/// Ages may be wrong by so much on a busy machine, seconds: far less than clocks differ.
const ABOUT: u64 = 10 * 60;
const LONG: Duration = Duration::from_secs(60);

/// A site, and the way to its source through which the clock of that server is wrong.
async fn site(clock: Clock) -> Result<(Site, Proxy, Value)> {
    let site = Site::start().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    proxy.clock(clock);
    let source = json!({"source_url": proxy.url()});
    Ok((site, proxy, source))
}

fn with(source: &Value, fields: Value) -> Value {
    crate::harness::site::merged(source.clone(), fields)
}

fn offset(row: &Value) -> Option<f64> {
    row["source"]["clock_offset_seconds"].as_f64()
}

/// About so many seconds.
fn is_about(seconds: f64, expect: i64) -> bool {
    (seconds - expect as f64).abs() < ABOUT as f64
}

#[tokio::test]
async fn a_time_to_live_is_shortened_by_the_age_at_the_source() -> Result<()> {
    // The clock of the service's host is far ahead, far behind, or the source's clock was set after the message was stored.
    for (clock, left) in [(Clock::Wrong(-APART), 3_600), (Clock::Wrong(APART), 3_600), (Clock::Set(APART), 600)] {
        let (site, _proxy, source) = site(clock).await?;
        if !site.source.at_least(2, 11) || !site.target.at_least(2, 11) {
            // One of them has no such header.
            return Ok(());
        }
        let mut raw = site.source_stream(STREAM, json!({"allow_msg_ttl": true})).await?;
        raw.publish(&Outgoing::new("s.lock", "mine").with_lines(&["Nats-TTL: 1h"])).await?;
        site.add(STREAM, source).await?;
        site.settled_within(STREAM, 1, LONG).await?;
        let copied = site.target().await?.read_stream(STREAM).await?;
        let ttl = header_values(&copied.first().context("the copy is gone")?.header, "Nats-TTL").pop();
        let ttl: u64 = ttl.unwrap_or_default().parse()?;
        assert!((left - ABOUT.min(left)..=left).contains(&ttl), "{clock:?}: {ttl}");
    }
    Ok(())
}

#[tokio::test]
async fn a_start_some_time_ago_is_by_the_clock_of_the_source() -> Result<()> {
    for (clock, copied) in [(Clock::Wrong(-APART), 3), (Clock::Wrong(APART), 3), (Clock::Set(APART), 0)] {
        let (site, _proxy, source) = site(clock).await?;
        site.filled(STREAM, 3).await?;
        site.add(STREAM, with(&source, json!({"start_delta": "30m"}))).await?;
        let row = site.settled_within(STREAM, 3, LONG).await?;
        assert_eq!(site.at_target(STREAM).await?, copied, "{clock:?}: {row}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_too_old_is_so_by_the_clock_of_the_source() -> Result<()> {
    for (clock, copied) in [(Clock::Wrong(-APART), 3), (Clock::Wrong(APART), 3), (Clock::Set(APART), 0)] {
        let (site, _proxy, source) = site(clock).await?;
        site.filled(STREAM, 3).await?;
        site.add(STREAM, with(&source, json!({"max_age": "30m"}))).await?;
        let row = site.settled_within(STREAM, 3, LONG).await?;
        assert_eq!(row["counters"]["skipped_old"], 3 - copied, "{clock:?}: {row}");
        assert_eq!(site.at_target(STREAM).await?, copied, "{clock:?}");
    }
    Ok(())
}

#[tokio::test]
async fn lag_and_headroom_are_by_the_clock_of_the_source() -> Result<()> {
    for (clock, age) in [(Clock::Wrong(-APART), 0), (Clock::Set(APART), APART)] {
        let (site, _proxy, source) = site(clock).await?;
        let max_age = 2 * 3_600;
        let config = json!({"max_age": Duration::from_secs(max_age).as_nanos() as u64});
        site.source_stream(STREAM, config).await?;
        site.publish(STREAM, 1..=500).await?;
        let slow = json!({"limits": {"messages_per_second": 1}});
        site.add(STREAM, with(&source, slow)).await?;
        let check = |row: &Value| {
            let (lag, left) = (row["lag"]["seconds"].as_f64(), row["headroom"]["seconds"].as_f64());
            let (lag, left) = (lag.context("a lag")?, left.context("a headroom")?);
            ensure!(is_about(lag, age) && is_about(left, max_age as i64 - age), "{clock:?}: {row}");
            Ok(())
        };
        let lags = |row: &Value| {
            let copies = row["state"] == "running" && row["position"]["source_seq"].as_u64() > Some(0);
            copies && row["lag"]["messages"].as_u64() > Some(0) && !row["headroom"].is_null()
        };
        check(&site.row_when(STREAM, "copies with a lag", lags).await?)?;
        // And when nothing runs.
        site.ask("pause", STREAM).await?;
        site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
        let before = site.publish(STREAM, 501..=501).await?;
        let seen = |row: &Value| row["lag"]["messages"].as_u64() == Some(before - position(row));
        check(&site.row_when(STREAM, "sees what waits", seen).await?)?;
    }
    Ok(())
}

fn position(row: &Value) -> u64 {
    row["position"]["source_seq"].as_u64().unwrap_or_default()
}

#[tokio::test]
async fn senders_are_unseen_by_the_clock_of_the_source() -> Result<()> {
    let (site, proxy, source) = site(Clock::Wrong(-APART)).await?;
    let mut raw = site.source_stream(STREAM, json!({})).await?;
    let report = |sender: &str| Outgoing::new("s.a", json!({"sender": sender}).to_string());
    let last = raw.publish_all([report("one"), report("two")]).await?;
    let sampled = json!({"inspect_field": "sender", "inspect_duration": "40m"});
    site.add(STREAM, with(&source, sampled)).await?;
    site.settled_within(STREAM, last, LONG).await?;
    // By the clock of the service's host they were seen 50 minutes ago.
    let seen = site.send("senders", json!({"replication": STREAM, "since": "30m"})).await?;
    assert_eq!(seen.body["total"], 2, "{seen:?}");
    // The source's clock is set right, to 50 minutes later, and they are unseen for that time.
    proxy.clock(Clock::Right);
    let row = site.row_when(STREAM, "has forgotten both", |row| row["sampling"]["senders"] == 0).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    Ok(())
}

#[tokio::test]
async fn a_position_some_time_ago_is_by_the_clock_of_the_source() -> Result<()> {
    let (site, proxy, source) = site(Clock::Wrong(-APART)).await?;
    site.filled(STREAM, 5).await?;
    site.add(STREAM, source).await?;
    site.settled_within(STREAM, 5, LONG).await?;
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    let moves = async |to: u64| -> Result<()> {
        let tried = site.send("position", json!({"replication": STREAM, "ago": "30m", "dry_run": true})).await?;
        ensure!(tried.body["to"] == to, "{tried:?}");
        let tried = site.cli().run(&["position", STREAM, "--time", "30m", "--dry-run"]).await?;
        ensure!(tried.stdout.contains(&format!("position 5 -> {to}")), "{tried:?}");
        Ok(())
    };
    moves(0).await?;
    proxy.clock(Clock::Set(APART));
    moves(5).await?;
    for wrong in [json!({"ago": "soon"}), json!({"ago": "1h", "source_seq": 1})] {
        let refused = site.send("position", with(&json!({"replication": STREAM}), wrong)).await?;
        assert_eq!(refused.body["error"]["code"], 400, "{refused:?}");
    }
    Ok(())
}

#[tokio::test]
async fn clocks_that_differ_are_reported_until_they_agree() -> Result<()> {
    let (site, proxy, source) = site(Clock::Wrong(-90)).await?;
    site.filled(STREAM, 3).await?;
    let document = site.document_with(STREAM, source.clone());
    let warnings = async || -> Result<Vec<Value>> {
        let said = request(&site.client, "replicator.config.validate", document.clone()).await?;
        Ok(said["warnings"].as_array().cloned().unwrap_or_default())
    };
    let said = warnings().await?;
    let text = said.first().and_then(|warning| warning["message"].as_str()).unwrap_or_default();
    assert!(text.contains("the clock of the source server is ") && text.contains(" s behind the clock"), "{said:?}");
    site.add(STREAM, source.clone()).await?;
    let row = site.settled_within(STREAM, 3, LONG).await?;
    let behind = offset(&row).context("an offset")?;
    assert!((-95.0..-85.0).contains(&behind), "{row}");
    let told = site.events.ever("clock-offset").await?;
    let ms = told["offset_ms"].as_i64().context("an offset")?;
    assert!((-95_000..-85_000).contains(&ms), "{told}");
    assert_eq!(site.events.told("clock-offset").len(), 1);
    site.events.quiet(&["clock-ok"])?;
    assert_eq!(site.service.log().matches("s behind the clock of this host").count(), 1, "{}", site.service.log());
    // The clock is set right while the copy runs.
    proxy.clock(Clock::Right);
    site.events.ever("clock-ok").await?;
    site.row_when(STREAM, "sees clocks that agree", |row| offset(row).is_some_and(|ahead| ahead.abs() < 2.5)).await?;
    assert_eq!(warnings().await?.len(), 1, "only that it exists");
    // And again, so that the paused copy has to detect it.
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    proxy.clock(Clock::Wrong(90));
    site.row_when(STREAM, "sees a clock ahead", |row| offset(row).is_some_and(|ahead| ahead > 85.0)).await?;
    site.ask("resume", STREAM).await?;
    site.events.all("clock-offset", 2).await?;
    Ok(())
}

#[tokio::test]
async fn a_source_that_reports_no_time_is_copied_by_our_clock() -> Result<()> {
    let (site, proxy, source) = site(Clock::Hidden).await?;
    site.filled(STREAM, 3).await?;
    let document = site.document_with(STREAM, source.clone());
    let said = request(&site.client, "replicator.config.validate", document).await?;
    assert!(said["warnings"].to_string().contains("the source server does not report its time"), "{said}");
    site.add(STREAM, with(&source, json!({"max_age": "1h", "start_delta": "1h"}))).await?;
    let row = site.settled_within(STREAM, 3, LONG).await?;
    assert_eq!((offset(&row), &row["counters"]["copied"]), (None, &json!(3)), "{row}");
    let told = site.events.ever("clock-offset").await?;
    assert_eq!(told["offset_ms"], Value::Null, "{told}");
    assert_eq!(site.events.told("clock-offset").len(), 1);
    proxy.clock(Clock::Right);
    site.events.ever("clock-ok").await?;
    site.row_when(STREAM, "sees the source's clock", |row| offset(row).is_some()).await?;
    assert_eq!(site.events.told("clock-offset").len(), 1);
    Ok(())
}

#[tokio::test]
async fn the_clock_offset_is_a_metric_where_it_is_known() -> Result<()> {
    let site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    proxy.clock(Clock::Wrong(90));
    site.filled(STREAM, 1).await?;
    site.add(STREAM, json!({"source_url": proxy.url()})).await?;
    site.settled_within(STREAM, 1, LONG).await?;
    let name = "choria_stream_replicator_replicator_source_clock_offset_seconds{";
    let value = async || -> Option<f64> {
        let (_, text) = site.service.get("/metrics").await.ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?.to_owned();
        line.rsplit(' ').next()?.parse().ok()
    };
    assert!(value().await.is_some_and(|ahead| (85.0..95.0).contains(&ahead)), "{:?}", value().await);
    proxy.clock(Clock::Hidden);
    wait_for("the metric to go", LIMIT, async || value().await.is_none()).await
}
