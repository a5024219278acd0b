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
async fn a_consumer_that_expires_early_is_replaced_without_an_event() -> Result<()> {
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

/// A site whose target has one account with these limits.
async fn with_target_limits(limits: &str) -> Result<Site> {
    let config =
        format!("accounts {{ A {{ jetstream: {{ {limits} }}, users: [{{user: u, password: p}}] }} }}\nno_auth_user: u");
    let target = Server::builder(Role::Target).config(&config).start().await?;
    Site::builder().on(Server::start(Role::Source).await?, target).start().await
}

/// What the preflight says about the limits of one side.
async fn foreseen(site: &Site, stream: &str, side: &str) -> Result<(String, String)> {
    let reply = site.send("config.validate", site.document(stream)).await?;
    let checks = reply.body["preflight"][side]["checks"].as_array().cloned().unwrap_or_default();
    let check = checks.iter().find(|check| check["name"] == "limits").cloned().unwrap_or_default();
    let text = |field: &str| check[field].as_str().unwrap_or_default().to_owned();
    Ok((text("result"), text("message")))
}

#[tokio::test]
async fn a_bound_that_the_account_requires_is_derived_from_the_source() -> Result<()> {
    let site = with_target_limits("max_bytes_required: true").await?;
    copies(&site, "BOUND", json!({"max_bytes": 1_000_000}), 100).await?;
    let mut raw = site.source_stream("QUEUE", json!({"max_bytes": 1_000_000, "retention": "workqueue"})).await?;
    raw.publish_all((1..=100).map(|i| Outgoing::new("queue.a", i.to_string()))).await?;
    assert_eq!(foreseen(&site, "QUEUE", "target").await?.0, "ok");
    site.add("QUEUE", json!({})).await?;
    site.settled("QUEUE", 100).await?;
    let made = site.target().await?.api("STREAM.INFO.QUEUE", Value::Null).await?;
    assert_eq!(
        (&made["config"]["discard"], &made["config"]["max_bytes"]),
        (&json!("new"), &json!(4_000_000)),
        "{made}"
    );
    site.source_stream("FREE", json!({})).await?;
    let (result, message) = foreseen(&site, "FREE", "target").await?;
    assert!(result == "failed" && message.contains("requires `max_bytes`"), "{result} {message}");
    site.add("FREE", json!({})).await?;
    let row = site.row_when("FREE", "is held", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("(10113)") && message.contains("by hand with a `max_bytes`"), "{row}");
    Ok(())
}

#[tokio::test]
async fn a_required_bound_that_has_no_room_is_held() -> Result<()> {
    let site = with_target_limits("max_bytes_required: true, disk_max_stream_bytes: 500000").await?;
    for (stream, retention) in [("QUEUE", "workqueue"), ("KEPT", "limits")] {
        site.source_stream(stream, json!({"max_bytes": 1_000_000, "retention": retention})).await?;
        site.add(stream, json!({})).await?;
        let row = site.row_when(stream, "is held", |row| row["state"] == "held").await?;
        assert!(row["last_error"]["message"].to_string().contains("cannot create target stream"), "{row}");
    }
    // With room for as much as the source keeps, it is created, and refuses instead of dropping.
    site.source_stream("SMALL", json!({"max_bytes": 200_000, "retention": "workqueue"})).await?;
    site.add("SMALL", json!({})).await?;
    site.row_when("SMALL", "runs", |row| row["state"] == "running").await?;
    let made = site.target().await?.api("STREAM.INFO.SMALL", Value::Null).await?;
    let made = (&made["config"]["discard"], &made["config"]["max_bytes"]);
    assert_eq!(made, (&json!("new"), &json!(200_000)));
    Ok(())
}

#[tokio::test]
async fn limits_that_a_copy_would_meet_are_foreseen() -> Result<()> {
    let site = with_target_limits("max_streams: 1, disk_max_stream_bytes: 1000000").await?;
    site.source_stream("LARGE", json!({"max_bytes": 50_000_000})).await?;
    let (result, message) = foreseen(&site, "LARGE", "target").await?;
    assert!(result == "failed" && message.contains("the account allows 1000000"), "{result} {message}");
    site.target_stream("OTHER", json!({})).await?;
    let mut raw = site.source_stream("S", json!({"max_consumers": 1})).await?;
    let (result, message) = foreseen(&site, "S", "target").await?;
    assert!(result == "failed" && message.contains("1 of at most 1 streams"), "{result} {message}");
    assert_eq!(foreseen(&site, "S", "source").await?.0, "ok");
    let consumer = json!({"stream_name": "S", "config": {"durable_name": "other", "ack_policy": "none"}});
    raw.api("CONSUMER.CREATE.S.other", consumer).await?;
    let (result, message) = foreseen(&site, "S", "source").await?;
    assert!(result == "warning" && message.contains("1 of at most 1 consumers"), "{result} {message}");
    Ok(())
}
