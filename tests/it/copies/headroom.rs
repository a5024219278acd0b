//! How long the source keeps messages that are not copied: in the status, falling, and reported before any loss.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{Outgoing, Proxy, Site};

const STREAM: &str = "S";

fn seconds(row: &Value) -> Option<f64> {
    row["headroom"]["seconds"].as_f64()
}

/// Waits until the status tells a headroom, and then a smaller one.
async fn falls(site: &Site, limit: &str, most: f64) -> Result<()> {
    let row = site.row_when(STREAM, "tells its headroom", |row| seconds(row).is_some()).await?;
    let first = seconds(&row).unwrap_or_default();
    ensure!(row["headroom"]["limit"] == limit && (0.0..=most).contains(&first), "{row}");
    ensure!(row["lag"]["messages"].as_u64() > Some(0), "{row}");
    let less = |row: &Value| seconds(row).is_some_and(|now| now < first);
    site.row_when(STREAM, &format!("has less headroom than {first} s"), less).await?;
    Ok(())
}

#[tokio::test]
async fn a_paused_copy_reports_low_headroom_by_age() -> Result<()> {
    let site = Site::small().await?;
    let age = Duration::from_secs(20);
    site.source_stream(STREAM, json!({"max_age": age.as_nanos() as u64})).await?;
    site.publish(STREAM, 1..=5).await?;
    site.add(STREAM, json!({})).await?;
    let row = site.settled(STREAM, 5).await?;
    assert_eq!(row["headroom"], Value::Null, "{row}");
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    site.publish(STREAM, 6..=10).await?;
    falls(&site, "age", 20.0).await?;
    let low = site.events.ever("headroom-low").await?;
    assert_eq!((&low["limit"], &low["position"]), (&json!("age"), &json!(5)), "{low}");
    assert!(low["seconds"].as_u64() < Some(10), "{low}");
    let row = site.row(STREAM).await.unwrap_or_default();
    assert_eq!((&row["headroom"]["low_below"], &row["lag"]["messages"]), (&json!(10.0), &json!(5)), "{row}");
    site.events.quiet(&["gap", "headroom-ok"])?;
    site.ask("resume", STREAM).await?;
    let row = site.settled(STREAM, 10).await?;
    assert_eq!(row["headroom"], Value::Null, "{row}");
    site.events.ever("headroom-ok").await?;
    site.events.quiet(&["gap"])?;
    assert_eq!(site.events.told("headroom-low").len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_held_copy_tells_its_headroom_too() -> Result<()> {
    let site = Site::small().await?;
    let age = Duration::from_secs(20);
    site.source_stream(STREAM, json!({"max_age": age.as_nanos() as u64})).await?;
    site.target_stream(STREAM, json!({"max_msgs": 5, "discard": "new"})).await?;
    site.publish(STREAM, 1..=5).await?;
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 5).await?;
    site.publish(STREAM, 6..=8).await?;
    site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
    falls(&site, "age", 20.0).await?;
    site.events.ever("headroom-low").await?;
    site.events.quiet(&["gap", "headroom-ok"])
}

#[tokio::test]
async fn a_slow_copy_of_a_full_source_reports_low_headroom() -> Result<()> {
    let site = Site::start().await?;
    let proxy = Proxy::start(site.target.port()).await?;
    let mut raw = site.source_stream(STREAM, json!({"max_msgs": 300})).await?;
    site.publish(STREAM, 1..=100).await?;
    site.target_stream(STREAM, json!({})).await?;
    // One at a time over a long way: some five a second.
    proxy.delay(Duration::from_millis(100));
    site.add(STREAM, json!({"target_url": proxy.url(), "limits": {"messages_in_flight": 1}})).await?;
    let publish = async {
        loop {
            raw.publish(&Outgoing::new("s.1", "more")).await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // Once nobody publishes, what waits is safe.
    let told = async {
        let low = site.events.ever("headroom-low").await?;
        let row = site.row_when(STREAM, "tells its headroom", |row| seconds(row).is_some()).await?;
        anyhow::Ok((low, row))
    };
    let (low, row): (Value, Value) = tokio::select! {
        never = publish => never,
        told = told => told,
    }?;
    assert_eq!(low["limit"], "messages", "{low}");
    assert_eq!(row["headroom"]["limit"], "messages", "{row}");
    site.events.quiet(&["gap"])?;
    proxy.delay(Duration::ZERO);
    // The last message may have been stored without its confirmation.
    let info = site.source().await?.api(&format!("STREAM.INFO.{STREAM}"), json!({})).await?;
    let last = info["state"]["last_seq"].as_u64().context("a last sequence")?;
    let row = site.settled(STREAM, last).await?;
    assert_eq!(row["headroom"], Value::Null, "{row}");
    site.events.ever("headroom-ok").await?;
    site.events.quiet(&["gap"])?;
    assert_eq!(site.at_target(STREAM).await?, last);
    Ok(())
}
