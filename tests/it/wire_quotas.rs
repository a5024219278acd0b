//! Limits that servers publish: what is created stays within them.

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::{Outgoing, Role, Server, Site};

const SECOND: u64 = 1_000_000_000;

async fn copies(site: &Site, stream: &str, config: Value, count: u64) -> Result<()> {
    let mut raw = site.source_stream(stream, config).await?;
    let subject = stream.to_lowercase();
    raw.publish_all((1..=count).map(|i| Outgoing::new(format!("{subject}.a"), i.to_string()))).await?;
    site.add(stream, json!({})).await?;
    let row = site.settled(stream, count).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    assert_eq!(site.at_target(stream).await?, count);
    Ok(())
}

#[tokio::test]
async fn consumers_stay_within_the_limits_of_their_stream() -> Result<()> {
    let site = Site::start().await?;
    let limits = |inactive: u64, pending: u64| json!({"consumer_limits": {"inactive_threshold": inactive * SECOND, "max_ack_pending": pending}});
    copies(&site, "LIMITS", limits(5, 0), 300).await?;
    copies(&site, "PENDING", limits(5, 100), 300).await?;
    for retention in ["interest", "workqueue"] {
        let mut config = limits(60, 100);
        config["retention"] = retention.into();
        // An interest stream stores nothing before the consumer is there.
        let stream = retention.to_uppercase();
        let mut raw = site.source_stream(&stream, config).await?;
        site.add(&stream, json!({})).await?;
        site.row_when(&stream, "runs", |row| row["state"] == "running").await?;
        raw.publish_all((1..=300).map(|i| Outgoing::new(format!("{retention}.a"), i.to_string()))).await?;
        let row = site.settled(&stream, 300).await?;
        assert_eq!(row["counters"]["errors"], 0, "{row}");
    }
    Ok(())
}

#[tokio::test]
async fn consumers_stay_within_the_limits_of_their_account() -> Result<()> {
    let config =
        "accounts { A { jetstream: { max_ack_pending: 100 }, users: [{user: u, password: p}] } }\nno_auth_user: u";
    let source = Server::builder(Role::Source).config(config).start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    copies(&site, "S", json!({}), 300).await?;
    let mut raw = site.source_stream("W", json!({"retention": "workqueue"})).await?;
    site.add("W", json!({})).await?;
    raw.publish_all((1..=300).map(|i| Outgoing::new("w.a", i.to_string()))).await?;
    site.settled("W", 300).await?;
    Ok(())
}

/// A copy whose target has such limits reads its end there when it is started again.
#[tokio::test]
async fn a_target_with_limits_for_consumers_is_read_when_resuming() -> Result<()> {
    let mut site = Site::start().await?;
    let limits = json!({"consumer_limits": {"inactive_threshold": SECOND, "max_ack_pending": 10}});
    site.target_stream("S", limits).await?;
    copies(&site, "S", json!({}), 300).await?;
    site.service.kill()?;
    site.publish("S", 301..=400).await?;
    site.service.restart().await?;
    site.settled("S", 400).await?;
    assert_eq!(site.at_target("S").await?, 400);
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_is_forgotten_early_is_replaced_without_a_word() -> Result<()> {
    let site = Site::start().await?;
    let limits = json!({"consumer_limits": {"inactive_threshold": SECOND}});
    let mut raw = site.source_stream("S", limits).await?;
    raw.publish_all((1..=6).map(|i| Outgoing::new("s.a", i.to_string()))).await?;
    // The throttle keeps messages back for longer than the consumer may rest.
    site.add("S", json!({"limits": {"messages_per_second": 1, "bytes_in_flight": 65536}})).await?;
    site.settled("S", 6).await?;
    assert!(site.events.told("stalled").is_empty(), "{:?}", site.events.told("stalled"));
    Ok(())
}
