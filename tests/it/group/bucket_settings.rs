//! Buckets that somebody made with other settings than the service does.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, kv};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Service, Site, wait_for, wait_value};

const STATE: &str = "REPLICATOR_STATE";

async fn config(url: &str, bucket: &str) -> Result<Value> {
    let mut raw = Raw::connect(url).await?;
    Ok(raw.api(&format!("STREAM.INFO.KV_{bucket}"), Value::Null).await?["config"].take())
}

/// Replaces a bucket by one that is made as `nats kv add` makes it.
async fn by_hand(site: &Site, config: kv::Config) -> Result<()> {
    let context = jetstream::new(site.client.clone());
    context.delete_key_value(&config.bucket).await?;
    context.create_key_value(config).await?;
    Ok(())
}

fn plain(bucket: &str) -> kv::Config {
    kv::Config { bucket: bucket.to_owned(), history: 1, ..kv::Config::default() }
}

async fn report(site: &Site, senders: std::ops::Range<u32>) -> Result<u64> {
    let message = |n: u32| Outgoing::new("nodes.report", json!({"sender": format!("n{n}")}).to_string());
    site.source().await?.publish_all(senders.map(message)).await
}

async fn keys(site: &Site) -> Result<u64> {
    let mut raw = Raw::connect(&site.service_url()).await?;
    let info = raw.api(&format!("STREAM.INFO.KV_{STATE}"), json!({})).await?;
    info["state"]["messages"].as_u64().context("messages")
}

#[tokio::test]
async fn markers_end_in_a_state_bucket_that_was_made_by_hand() -> Result<()> {
    let site = Site::start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", json!({"inspect_field": "sender", "inspect_duration": "1h"})).await?;
    let last = report(&site, 0..10).await?;
    site.settled("NODES", last).await?;
    let written = async |count| keys(&site).await.is_ok_and(|keys| keys == count);
    wait_for("ten records", LIMIT, async || written(10).await).await?;
    by_hand(&site, plain(STATE)).await?;
    // Senders that the bucket does not have yet, and those that it had.
    let last = report(&site, 10..20).await?;
    site.settled("NODES", last).await?;
    wait_for("all records", LIMIT, async || written(20).await).await.with_context(|| site.service.log())?;
    if site.control().at_least(2, 11) {
        let repaired = async || {
            let config = config(&site.service_url(), STATE).await.unwrap_or_default();
            config["allow_msg_ttl"] == true && config["subject_delete_marker_ttl"].as_u64() > Some(0)
        };
        wait_for("the time to live of markers", LIMIT, repaired).await.with_context(|| site.service.log())?;
    }
    // A removed record leaves a marker; what follows is written, too.
    ensure!(site.ask("config.delete", "NODES").await?.error.is_none());
    site.add("NODES", json!({"inspect_field": "sender", "inspect_duration": "2h"})).await?;
    let last = report(&site, 20..30).await?;
    site.settled("NODES", last).await?;
    site.row_when("NODES", "has written all", |row| row["sampling"]["write_lag_seconds"] == 0.0).await?;
    Ok(())
}

#[tokio::test]
async fn markers_end_in_a_state_bucket_that_was_there_before() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let client = crate::harness::connect(&control.url()).await?;
    jetstream::new(client).create_key_value(plain(STATE)).await.map_err(|error| anyhow::anyhow!("{error}"))?;
    let service = Service::start(&control.url()).await?;
    let repaired = async || config(&control.url(), STATE).await.is_ok_and(|config| config["allow_msg_ttl"] == true);
    if control.at_least(2, 11) {
        wait_for("the time to live of markers", LIMIT, repaired).await.with_context(|| service.log())?;
    }
    Ok(())
}

#[tokio::test]
async fn a_bucket_that_would_lose_entries_is_reported() -> Result<()> {
    let site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    let ready = async |code: u16, text: &str| {
        let is = async || site.service.get("/readyz").await.is_ok_and(|(now, body)| now == code && body.contains(text));
        wait_for(&format!("{code} {text}"), LIMIT, is).await.with_context(|| site.service.log())
    };
    ready(200, "").await?;
    for bucket in ["REPLICATOR_POSITIONS", STATE] {
        let hour = std::time::Duration::from_secs(3_600);
        by_hand(&site, kv::Config { max_age: hour, ..plain(bucket) }).await?;
        ready(503, bucket).await?;
        ready(503, "max_age").await?;
        // As the message says.
        let mut config = config(&site.service_url(), bucket).await?;
        config["max_age"] = json!(0);
        Raw::connect(&site.service_url()).await?.api(&format!("STREAM.UPDATE.KV_{bucket}"), config).await?;
        ready(200, "").await?;
    }
    Ok(())
}

/// A bucket that was recreated is as little a source of a copy as the one before.
#[tokio::test]
async fn a_recreated_bucket_is_not_copied() -> Result<()> {
    let site = Site::small().await?;
    for bucket in ["REPLICATOR_POSITIONS", STATE] {
        by_hand(&site, plain(bucket)).await?;
        let document =
            json!({"stream": format!("KV_{bucket}"), "source_url": site.source.url(), "target_url": site.target.url()});
        let refused = async || {
            let reply = site.send("config.validate", document.clone()).await.ok()?;
            let problems = reply.body["problems"].to_string();
            problems.contains("is a bucket of this service").then_some(())
        };
        wait_value("the bucket to be refused", LIMIT, refused).await.with_context(|| site.service.log())?;
    }
    Ok(())
}
