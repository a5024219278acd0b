//! `stream-replicator events`: live, and from a stream.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use async_nats::jetstream;
use serde_json::{Value, json};

use crate::harness::cli::{Running, failed};
use crate::harness::{Cli, LIMIT, Role, Server, Service, Site, connect, wait_for, wait_value};

/// Publishes until it is seen: a subscription takes a moment.
async fn published(site: &Site, running: &Running, subject: &str, body: &str, seen: &str) -> Result<()> {
    wait_for(&format!("`{seen}` to be shown"), LIMIT, async || {
        let _ = site.client.publish(subject.to_owned(), body.to_owned().into()).await;
        running.shown().contains(seen)
    })
    .await
}

/// Waits for the stream that the service creates.
async fn kept(site: &Site) -> Result<jetstream::stream::Info> {
    let context = jetstream::new(site.client.clone());
    let stream = async || context.get_stream("REPLICATOR_EVENTS").await.ok();
    Ok(wait_value("the stream of events", LIMIT, stream).await?.cached_info().clone())
}

/// Deletes it: it belongs to the operators.
async fn forgotten(site: &Site) -> Result<()> {
    kept(site).await?;
    jetstream::new(site.client.clone()).delete_stream("REPLICATOR_EVENTS").await?;
    Ok(())
}

async fn capture(site: &Site, name: &str, subject: &str) -> Result<()> {
    let config = jetstream::stream::Config { name: name.into(), subjects: vec![subject.into()], ..Default::default() };
    jetstream::new(site.client.clone()).create_stream(config).await?;
    Ok(())
}

#[tokio::test]
async fn live_events_are_shown_one_a_line() -> Result<()> {
    let mut site = Site::small().await?;
    site.events.of_anybody();
    let cli = site.cli();
    let all = cli.start(["events", "--follow"], "")?;
    let json = cli.start(["events", "--follow", "--json"], "")?;
    let some = cli.start(["events", "ORDERS", "--follow", "--kind", "config-changed", "--kind", "stopped"], "")?;
    for running in [&all, &json] {
        published(
            &site,
            running,
            "replicator.event.x.y",
            "{\"kind\":\"hello\",\"replication\":\"y\",\"time\":\"t\"}",
            "hello",
        )
        .await?;
    }
    published(&site, &some, "replicator.event.stopped.ORDERS", "hello", "hello").await?;

    site.filled("OTHER", 1).await?;
    site.add("OTHER", json!({})).await?;
    site.replicate("ORDERS", 3).await?;
    site.send("config.update", site.document_with("ORDERS", json!({"max_age": "1d"}))).await?;
    for running in [&all, &some] {
        running.shows("Z  config-changed  ORDERS  revision: 4  (").await?;
    }
    all.shows("Z  started         ORDERS  epoch: 1  (").await?;
    all.shows("Z  started         OTHER  epoch: 1  (").await?;
    let shown = some.shown();
    assert!(!shown.contains("started") && !shown.contains("OTHER"), "{shown}");
    json.shows("\"config-changed\"").await?;
    for line in json.shown().lines() {
        assert!(serde_json::from_str::<Value>(line)?.is_object(), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn stored_events_are_shown_and_can_be_followed() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    let config = kept(&site).await?.config;
    assert_eq!((config.max_age.as_secs(), config.max_bytes), (30 * 86_400, 100 << 20));
    assert_eq!(cli.ok(["events"]).await?, "");
    site.replicate("ORDERS", 3).await?;
    site.send("config.update", site.document_with("ORDERS", json!({"max_age": "1d"}))).await?;
    site.filled("OTHER", 1).await?;
    site.add("OTHER", json!({})).await?;
    wait_for("all to be stored", LIMIT, async || {
        let shown = cli.ok(["events"]).await.unwrap_or_default();
        let told = ["started         ORDERS", "config-changed  ORDERS", "started         OTHER"];
        told.iter().all(|told| shown.contains(told))
    })
    .await?;
    let all = cli.ok(["events"]).await?;
    let one = cli.ok(["events", "ORDERS"]).await?;
    assert!(one.contains("config-changed") && !one.contains("OTHER"), "{one}");
    assert_eq!(cli.ok(["events", "--kind", "held"]).await?, "");
    let mut ids = BTreeSet::new();
    for line in cli.ok(["events", "--json"]).await?.lines() {
        let event: Value = serde_json::from_str(line)?;
        let kind = event["kind"].as_str().context("a kind")?;
        let schema_type = format!("io.stream_replicator.event.v1.{}", kind.replace('-', "_"));
        assert_eq!(
            (event["type"].as_str(), &event["timestamp"]),
            (Some(schema_type.as_str()), &event["time"]),
            "{line}"
        );
        assert!(ids.insert(event["id"].as_str().context("an id")?.to_owned()), "{line}");
    }
    assert_eq!(cli.ok(["events", "--since", "2100-01-01T00:00:00Z"]).await?, "");
    assert!(cli.ok(["events", "--since", "1h"]).await?.starts_with(&all));

    let follow = cli.start(["events", "OTHER", "--follow", "--since", "1h"], "")?;
    follow.shows("started         OTHER").await?;
    site.ask("config.delete", "OTHER").await?;
    follow.shows("stopped         OTHER").await
}

#[tokio::test]
async fn where_no_stream_has_them_it_is_told_how_to_make_one() -> Result<()> {
    let site = Site::small().await?;
    forgotten(&site).await?;
    let ended = site.cli().run(["events"]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for text in ["captures `replicator.event.>`", "nats stream add", "--subjects 'replicator.event.>'", "--follow"] {
        assert!(ended.stderr.contains(text), "`{text}` is not in {ended:?}");
    }
    // One that has a part of them is used, and it is said so; one that has all is better.
    capture(&site, "A_PART", "replicator.event.held.>").await?;
    let ended = site.cli().run(["events"]).await?;
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (Some(0), "stream `A_PART` captures only replicator.event.held.>\n")
    );
    Ok(())
}

#[tokio::test]
async fn what_is_no_event_is_shown_as_it_came() -> Result<()> {
    let mut site = Site::small().await?;
    site.events.of_anybody();
    let cli = site.cli();
    kept(&site).await?;
    let bodies: [&[u8]; 6] = [b"", b"\xff\xfe", b"{", b"[1]", b"\x1b[2Jboo", b"{\"kind\":5}"];
    let client = jetstream::new(site.client.clone());
    for body in bodies {
        client.publish("replicator.event.started.ORDERS", body.to_vec().into()).await?.await?;
    }
    let shown = cli.ok(["events"]).await?;
    assert_eq!(shown.lines().count(), bodies.len(), "{shown}");
    assert!(shown.lines().all(|line| line.starts_with("replicator.event.started.ORDERS  ?")), "{shown}");
    assert!(shown.contains(" [2Jboo\n") && shown.contains(" [1]\n") && !shown.contains('\x1b'), "{shown:?}");
    let json = cli.ok(["events", "--json"]).await?;
    for line in json.lines() {
        serde_json::from_str::<Value>(line)?;
    }
    assert_eq!(json.lines().count(), bodies.len());
    let raw = json!({"subject": "replicator.event.started.ORDERS", "raw": "{"}).to_string();
    assert!(json.lines().any(|line| line == raw), "{json}");
    Ok(())
}

#[tokio::test]
async fn who_may_not_listen_is_told() -> Result<()> {
    let deaf = r#"{user: deaf, password: x, permissions: {subscribe: {deny: ["replicator.event.>"]}}}"#;
    let config = format!("authorization {{ users: [{{user: test, password: test}}, {deaf}] }}");
    let server = Server::builder(Role::Control).config(&config).start().await?;
    let ended = Cli::new(&server.url_as("deaf:x")).run(["events", "--follow"]).await?;
    failed(&ended, &["events at `nats://deaf:***@127.0.0.1:", "ermissions Violation for Subscription"]);
    Ok(())
}

#[tokio::test]
async fn a_stream_of_events_is_not_made_where_it_is_not_wanted() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let context = jetstream::new(connect(&control.url()).await?);
    let without = Service::builder(&control.url(), "TEST").args(["--no-event-stream"]).start().await?;
    assert!(context.get_stream("REPLICATOR_EVENTS").await.is_err());
    drop(without);
    // Another stream captures some of them: they are in one stream only.
    let part = vec!["replicator.event.held.>".into()];
    let config = jetstream::stream::Config { name: "HELD".into(), subjects: part, ..Default::default() };
    context.create_stream(config).await?;
    let beside = Service::start(&control.url()).await?;
    wait_for("a log line", LIMIT, async || beside.log().contains("events are kept by another stream")).await?;
    assert!(context.get_stream("REPLICATOR_EVENTS").await.is_err());
    Ok(())
}
