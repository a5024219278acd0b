//! Saves of the position that fail while the copy could continue.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Raw, Site, wait_for};

/// Messages that may be copied while the position cannot be saved.
const MOST: u64 = 100_000;

async fn site(more: &[&str]) -> Result<Site> {
    let args = ["--instance", "one", "--monitor", "127.0.0.1:0"];
    Site::builder().args(args.iter().chain(more).copied()).start().await
}

/// From now on the bucket of the positions takes nothing, or takes everything again.
async fn refuse_saves(site: &Site, refuse: bool) -> Result<()> {
    let mut raw = Raw::connect(&site.control().url()).await?;
    let mut config = raw.api("STREAM.INFO.KV_REPLICATOR_POSITIONS", Value::Null).await?["config"].take();
    config["max_msg_size"] = json!(if refuse { 1 } else { -1 });
    raw.api("STREAM.UPDATE.KV_REPLICATOR_POSITIONS", config).await.map(drop)
}

#[tokio::test]
async fn saves_that_fail_are_reported_once_and_so_is_their_end() -> Result<()> {
    let site = site(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    refuse_saves(&site, true).await?;
    site.publish("ORDERS", 11..=20).await?;
    site.copied("ORDERS", 20).await?;
    let event = site.events.all("position-unsaved", 1).await?.pop().context("the event")?;
    assert_eq!((&event["replication"], &event["position"]), (&json!("ORDERS"), &json!(20)), "{event}");
    ensure!(event["saved"].as_u64().is_some_and(|saved| saved <= 20), "{event}");
    let unsaved = |row: &Value| {
        let error = &row["last_error"];
        let text = error["message"].as_str().unwrap_or_default();
        error["current"] == true && error["kind"] == "retry" && text.contains("the position is not saved")
    };
    let row = site.row_when("ORDERS", "reports it", unsaved).await?;
    assert_eq!(row["state"], "running", "it still copies: {row}");
    let counted = |row: &Value| row["counters"]["position_save_errors"].as_u64().is_some_and(|errors| errors >= 8);
    site.row_when("ORDERS", "counts them", counted).await?;
    let (_, page) = site.service.get("/metrics").await?;
    let line = page.lines().find(|line| line.contains("position_save_errors{")).context("the metric")?;
    ensure!(line.rsplit(' ').next().and_then(|errors| errors.parse::<u64>().ok()).is_some_and(|errors| errors >= 8));
    assert_eq!(site.service.log().matches("the position is not saved").count(), 1, "{}", site.service.log());

    refuse_saves(&site, false).await?;
    let saved = site.events.all("position-saved", 1).await?.pop().context("the event")?;
    assert_eq!(saved["position"], 20);
    site.row_when("ORDERS", "is in order", |row| row["last_error"]["current"] == false).await?;
    site.events.all("position-unsaved", 1).await?;
    let there =
        async || site.position("ORDERS").await.is_ok_and(|record| record.is_some_and(|r| r["source"]["seq"] == 20));
    wait_for("the position to be saved", LIMIT, there).await
}

#[tokio::test]
async fn the_copy_stops_where_too_much_would_be_copied_again() -> Result<()> {
    let site = site(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    let saved = site.position("ORDERS").await?.context("the record")?["source"]["seq"].as_u64().context("seq")?;
    refuse_saves(&site, true).await?;
    site.publish("ORDERS", 11..=20).await?;
    site.events.all("position-unsaved", 1).await?;
    site.publish("ORDERS", 21..=150_000).await?;
    site.row_when("ORDERS", "waits", |row| row["state"] == "retrying" && row["in_flight"]["messages"] == 0).await?;
    let there = site.at_target("ORDERS").await?;
    ensure!(there > saved && there <= 10 + MOST, "{there} messages were copied");
    // The source is asked for its end every ten seconds.
    let lags = |row: &Value| row["lag"]["messages"].as_u64().is_some_and(|lag| lag >= 150_000 - there);
    site.row_when("ORDERS", "says what waits", lags).await?;
    assert_eq!(site.at_target("ORDERS").await?, there);

    refuse_saves(&site, false).await?;
    site.copied("ORDERS", 150_000).await.with_context(|| site.service.log())?;
    site.settled("ORDERS", 150_000).await?;
    site.events.quiet(&["target-reset", "target-shared", "stalled"])
}

#[tokio::test]
async fn what_stands_alone_goes_on_without_a_saved_position() -> Result<()> {
    let site = site(&["--standalone"]).await?;
    site.replicate("ORDERS", 10).await?;
    refuse_saves(&site, true).await?;
    site.publish("ORDERS", 11..=20).await?;
    site.events.all("position-unsaved", 1).await?;
    site.publish("ORDERS", 21..=150_000).await?;
    site.copied("ORDERS", 150_000).await
}

/// Of a source that forgets what is acknowledged, only what the target has may go; the consumer outlasts the failing saves.
#[tokio::test]
async fn acks_stop_with_the_copy_while_saves_fail() -> Result<()> {
    const ALL: u64 = 150_000;
    let site = site(&[]).await?;
    let mut source = site.source_stream("JOBS", json!({"retention": "workqueue"})).await?;
    site.publish("JOBS", 1..=10).await?;
    site.add("JOBS", json!({})).await?;
    site.copied("JOBS", 10).await?;
    refuse_saves(&site, true).await?;
    // Before a save has failed the copy is not bounded.
    site.publish("JOBS", 11..=20).await?;
    site.events.all("position-unsaved", 1).await?;
    site.publish("JOBS", 21..=ALL).await?;
    site.row_when("JOBS", "waits", |row| row["state"] == "retrying" && row["in_flight"]["messages"] == 0).await?;
    let there = site.at_target("JOBS").await?;
    ensure!(there <= 10 + MOST, "{there} messages were copied");
    // Long enough for each deadline of a consumer that is not read from.
    let errors = |row: &Value| row["counters"]["position_save_errors"].as_u64().unwrap_or_default();
    let before = errors(&site.row("JOBS").await.context("the row")?);
    site.row_when("JOBS", "has waited", |row| errors(row) >= before + 12).await?;
    let left = source.stream_state("JOBS").await?["messages"].as_u64().context("messages")?;
    ensure!(left >= ALL - there, "{left} messages are left at the source, and {there} are at the target");
    assert_eq!(site.at_target("JOBS").await?, there);

    refuse_saves(&site, false).await?;
    site.copied("JOBS", ALL).await.with_context(|| site.service.log())?;
    let drained = async || source.stream_state("JOBS").await.is_ok_and(|state| state["messages"] == 0);
    wait_for("everything to be acknowledged", LIMIT, drained).await.with_context(|| site.service.log())?;
    site.events.quiet(&["target-reset", "target-shared", "stalled", "gap"])
}
