//! What is permanent until an operator acts is `held` and says what to do; what is transient is not.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::wire_rejects::transports;
use crate::harness::site::merged;
use crate::harness::{Outgoing, Role, Server, Site};

const LONG: Duration = Duration::from_secs(60);

/// Waits until a replication is held with all of these words.
async fn held(site: &Site, id: &str, words: &[&str]) -> Result<Value> {
    let says = |row: &Value| {
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        row["state"] == "held" && words.iter().all(|word| message.contains(word))
    };
    site.row_when(id, &format!("is held with {words:?}"), says).await
}

async fn released(site: &Site, id: &str, seq: u64) -> Result<()> {
    site.ask("retry", id).await?;
    site.settled_within(id, seq, LONG).await.map(drop)
}

#[tokio::test]
async fn a_subject_that_no_stream_takes_is_held_and_named() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        let subject = stream.to_lowercase();
        let mut raw = site.source_stream(stream, json!({})).await?;
        let narrow = merged(json!({"subjects": [format!("{subject}.a")]}), target.clone());
        let mut at_target = site.target_stream(stream, narrow.clone()).await?;
        let all =
            (1..=9).map(|i| Outgoing::new(format!("{subject}.{}", if i == 6 { "b" } else { "a" }), i.to_string()));
        raw.publish_all(all).await?;
        site.add(stream, json!({})).await?;
        let words = [&format!("`{subject}.b`"), "source sequence 6", "`target_update`", &format!("`{stream}`")];
        let row = held(&site, stream, &words).await?;
        if target == json!({"allow_batched": true}) {
            assert_eq!(row["position"]["source_seq"], 5, "{row}");
        }
        let wide = merged(narrow, json!({"name": stream, "subjects": [format!("{subject}.>")]}));
        at_target.api(&format!("STREAM.UPDATE.{stream}"), wide).await?;
        released(&site, stream, 9).await?;
        assert_eq!(site.at_target(stream).await?, 9);
    }
    Ok(())
}

#[tokio::test]
async fn a_subject_after_a_mapping_is_named_as_it_is_sent() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    site.target_stream("S", json!({"subjects": ["x.s.a"]})).await?;
    for subject in ["s.a", "s.b"] {
        raw.publish(&Outgoing::new(subject, "")).await?;
    }
    site.add("S", json!({"target_subject_prefix": "x"})).await?;
    held(&site, "S", &["`x.s.b`", "source sequence 2"]).await?;
    Ok(())
}

/// A server whose only account has these limits, and one message of 100 KiB in a stream of the source.
async fn with_target_limits(limits: &str) -> Result<Site> {
    let config =
        format!("accounts {{ A {{ jetstream: {{ {limits} }}, users: [{{user: u, password: p}}] }} }}\nno_auth_user: u");
    let target = Server::builder(Role::Target).config(&config).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((0..20).map(|_| Outgoing::new("s.a", "x".repeat(10_000)))).await?;
    Ok(site)
}

#[tokio::test]
async fn an_account_that_is_full_is_held() -> Result<()> {
    let site = with_target_limits("max_file: 100000, max_mem: 100000").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10002)", "raise the JetStream limits of the account"]).await?;
    Ok(())
}

#[tokio::test]
async fn an_account_without_room_for_a_stream_is_held() -> Result<()> {
    let site = with_target_limits("max_streams: 1").await?;
    site.target_stream("OTHER", json!({})).await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10027)", "remove streams that are not needed"]).await?;
    Ok(())
}

#[tokio::test]
async fn a_stream_without_room_for_a_consumer_is_held() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({"max_consumers": 1})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    let consumer = json!({"stream_name": "S", "config": {"durable_name": "other", "ack_policy": "none"}});
    raw.api("CONSUMER.CREATE.S.other", consumer).await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10026)", "raise `max_consumers`"]).await?;
    raw.api("CONSUMER.DELETE.S.other", Value::Null).await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn too_few_subscriptions_are_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.source.restart_with("max_subscriptions: 1").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["maximum subscriptions exceeded", "`max_subscriptions`"]).await?;
    site.source.restart_with("").await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn too_few_connections_are_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.source.reload_with("max_connections: 1").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["maximum connections exceeded", "`max_connections`"]).await?;
    site.source.reload_with("max_connections: 100").await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn a_subject_without_a_leader_is_not_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    site.add("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.settled("S", 1).await?;
    site.target.restart().await?;
    raw.publish_all((2..=50).map(|i| Outgoing::new("s.a", i.to_string()))).await?;
    site.settled_within("S", 50, LONG).await?;
    assert!(site.events.told("held").is_empty(), "{:?}", site.events.told("held"));
    Ok(())
}
