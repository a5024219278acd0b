//! Events on `replicator.event.<kind>.<replication>`.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::Site;

/// What every event says; leaves what this kind says besides.
fn detail(mut event: Value, kind: &str, replication: &str) -> Value {
    let fields = event.as_object_mut().expect("an object");
    let mut take = |field: &str| fields.remove(field).unwrap_or_default();
    assert_eq!((take("kind"), take("replication")), (json!(kind), json!(replication)));
    assert_eq!((take("site"), take("instance")), (json!("TEST"), json!("one")));
    let time = take("time");
    let at = chrono::DateTime::parse_from_rfc3339(time.as_str().unwrap_or_default()).expect("a time");
    assert!((chrono::Utc::now() - at.to_utc()).num_seconds().abs() < 60, "{time}");
    let schema_type = format!("io.stream_replicator.event.v1.{}", kind.replace('-', "_"));
    assert_eq!((take("type"), take("timestamp")), (json!(schema_type), time));
    assert!(take("id").as_str().is_some_and(|id| !id.is_empty()));
    event
}

async fn begin() -> Result<Site> {
    Site::builder().control_at_source().args(["--instance", "one"]).start().await
}

#[tokio::test]
async fn start_change_and_stop_are_told() -> Result<()> {
    let site = begin().await?;
    let mut events = site.listen().await?;
    site.replicate("ORDERS", 5).await?;
    assert_eq!(detail(events.wait("leader", "ORDERS").await?, "leader", "ORDERS"), json!({"epoch": 1}));
    assert_eq!(detail(events.wait("started", "ORDERS").await?, "started", "ORDERS"), json!({"epoch": 1}));
    site.send("config.update", site.document_with("ORDERS", json!({"max_age": "1d"}))).await?;
    let changed = events.wait("config-changed", "ORDERS").await?;
    assert_eq!(detail(changed, "config-changed", "ORDERS"), json!({"revision": 3}));
    events.wait("started", "ORDERS").await?;
    site.settled("ORDERS", 5).await?;
    site.ask("config.delete", "ORDERS").await?;
    assert_eq!(detail(events.wait("stopped", "ORDERS").await?, "stopped", "ORDERS"), json!({"position": 5}));
    assert_eq!(events.kinds("ORDERS"), ["leader", "started", "config-changed", "started", "stopped"]);
    Ok(())
}

#[tokio::test]
async fn caught_up_is_published_once_for_each_start() -> Result<()> {
    let site = begin().await?;
    let mut events = site.listen().await?;
    site.replicate("ORDERS", 50).await?;
    let caught = detail(events.wait("caught-up", "ORDERS").await?, "caught-up", "ORDERS");
    assert_eq!((&caught["position"], &caught["copied"]), (&json!(50), &json!(50)), "{caught}");
    assert!(caught["seconds"].as_u64().is_some_and(|seconds| seconds < 60), "{caught}");
    // What comes later is copied without another one.
    site.publish("ORDERS", 1..=5).await?;
    site.settled("ORDERS", 55).await?;
    site.ask("pause", "ORDERS").await?;
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    site.publish("ORDERS", 1..=5).await?;
    site.ask("resume", "ORDERS").await?;
    let caught = detail(events.wait("caught-up", "ORDERS").await?, "caught-up", "ORDERS");
    assert_eq!((&caught["position"], &caught["copied"]), (&json!(60), &json!(5)), "{caught}");
    assert_eq!(events.told("caught-up").len(), 2, "{:?}", events.seen());
    Ok(())
}

#[tokio::test]
async fn an_outage_of_many_is_one_event_with_all_of_them() -> Result<()> {
    let mut site = begin().await?;
    let ids: Vec<_> = (0..12).map(|n| format!("S{n:02}")).collect();
    for id in &ids {
        site.replicate(id, 3).await?;
    }
    for id in &ids {
        site.settled(id, 3).await?;
    }
    let mut events = site.listen().await?;
    site.target.kill()?;
    let place = site.target.url().trim_start_matches("nats://").to_owned();
    // On a busy machine some are reported later than the others, then in an event of their own.
    let (mut stalled, mut published) = (BTreeSet::new(), 0);
    while stalled.len() < ids.len() {
        let outage = detail(events.wait("outage", "one").await?, "outage", "one");
        assert_eq!(outage["server"], place, "{outage}");
        assert!(outage["message"].as_str().is_some_and(|text| text.starts_with("target: ")), "{outage}");
        let listed = outage["replications"].as_array().expect("a list");
        assert_eq!(outage["count"], listed.len(), "{outage}");
        stalled.extend(listed.iter().filter_map(|id| id.as_str().map(str::to_owned)));
        published += 1;
    }
    assert!(stalled.iter().eq(&ids) && published < 4, "{published} events: {stalled:?}");
    site.target.restart().await?;
    let over = detail(events.wait("outage-over", "one").await?, "outage-over", "one");
    assert_eq!((&over["count"], &over["replications"]), (&json!(12), &json!(ids)), "{over}");
    for id in &ids {
        let kinds = events.kinds(id);
        assert!(!kinds.iter().any(|kind| kind == "stalled" || kind == "repaired"), "{id}: {kinds:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_last_words_of_a_process_that_stops_are_sent() -> Result<()> {
    let mut site = begin().await?;
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let mut events = site.listen().await?;
    site.service.stop().await?;
    assert_eq!(detail(events.wait("stopped", "ORDERS").await?, "stopped", "ORDERS"), json!({"position": 5}));
    Ok(())
}

#[tokio::test]
async fn a_missing_source_stream_is_held_told_once_and_repaired() -> Result<()> {
    let site = begin().await?;
    let mut events = site.listen().await?;
    site.send("config.add", site.document("LATER")).await?;
    let held = detail(events.wait("held", "LATER").await?, "held", "LATER");
    assert!(held["message"].as_str().is_some_and(|text| text.contains("LATER")), "{held}");
    let row = site.row_when("LATER", "is held", |row| row["state"] == "held").await?;
    assert_eq!(
        (&row["last_error"]["kind"], &row["last_error"]["message"]),
        (&json!("hold"), &held["message"]),
        "{row}"
    );

    site.filled("LATER", 5).await?;
    // A changed document releases it at once.
    site.send("config.update", site.document_with("LATER", json!({"max_age": "1d"}))).await?;
    site.copied("LATER", 5).await?;
    detail(events.wait("repaired", "LATER").await?, "repaired", "LATER");
    assert_eq!(events.kinds("LATER").iter().filter(|kind| **kind == "held").count(), 1, "{:?}", events.seen());
    Ok(())
}

#[tokio::test]
async fn a_refused_document_is_told_with_its_problems() -> Result<()> {
    let site = begin().await?;
    let mut events = site.listen().await?;
    site.put("ORDERS", site.document_with("ORDERS", json!({"max_age": "soon", "colour": 1})).to_string()).await?;
    let told = detail(events.wait("config-rejected", "ORDERS").await?, "config-rejected", "ORDERS");
    assert_eq!(told["revision"], 2);
    let paths: Vec<_> = told["problems"].as_array().unwrap().iter().map(|problem| &problem["path"]).collect();
    assert_eq!(paths, ["/colour", "/max_age"], "{told}");
    Ok(())
}

#[tokio::test]
async fn a_target_that_goes_and_comes_back_is_stalled_and_repaired() -> Result<()> {
    let mut site = begin().await?;
    site.replicate("ORDERS", 5).await?;
    let mut events = site.listen().await?;
    site.target.kill()?;
    site.publish("ORDERS", 1..=5).await?;
    detail(events.wait("stalled", "ORDERS").await?, "stalled", "ORDERS");
    site.target.restart().await?;
    site.copied("ORDERS", 10).await?;
    detail(events.wait("repaired", "ORDERS").await?, "repaired", "ORDERS");
    assert_eq!(site.target().await?.read_stream("ORDERS").await?.len(), 10);
    Ok(())
}
