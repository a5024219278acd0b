//! The buckets of configuration and positions are both lost, and the same documents are added again.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use serde_json::{Value, json};

use crate::harness::cli::failed;
use crate::harness::{Expect, Outgoing, Raw, Site};

async fn publish(raw: &mut Raw, numbers: std::ops::Range<u64>) -> Result<u64> {
    raw.publish_all(numbers.map(|i| Outgoing::new(format!("q.{}", i % 5), i.to_string()))).await
}

async fn lose(site: &Site, buckets: &[&str]) -> Result<()> {
    for bucket in buckets {
        jetstream::new(site.client.clone()).delete_key_value(bucket).await?;
    }
    Ok(())
}

fn message(row: &Value) -> &str {
    row["last_error"]["message"].as_str().unwrap_or_default()
}

/// The installation that a message says to take over.
fn lost_installation(row: &Value) -> Result<String> {
    let (_, rest) = message(row).split_once("`stream-replicator site adopt ").with_context(|| row.to_string())?;
    Ok(rest.split('`').next().unwrap_or_default().to_owned())
}

async fn consumer(raw: &mut Raw) -> Result<Value> {
    raw.api("CONSUMER.INFO.Q.SR_TEST", Value::Null).await
}

/// Copies 100 messages, loses the buckets while 50 wait, and returns with the replication held.
async fn held(retention: &str) -> Result<(Site, Raw, String)> {
    let mut site = Site::builder().args(["--lease-ttl", "2s"]).start().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": retention})).await?;
    site.add("Q", json!({})).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    publish(&mut raw, 0..100).await?;
    site.settled("Q", 100).await?;
    site.stop().await?;
    lose(&site, &["REPLICATOR_CONFIG", "REPLICATOR_POSITIONS"]).await?;
    publish(&mut raw, 100..150).await?;
    site.service.restart().await?;
    site.add("Q", json!({})).await?;
    let row = site.row_when("Q", "is held", |row| row["state"] == "held").await?;
    ensure!(message(&row).contains("Do not delete the consumer while messages wait for it"), "{row}");
    let lost = lost_installation(&row)?;
    Ok((site, raw, lost))
}

#[tokio::test]
async fn the_consumers_of_the_lost_installation_are_adopted() -> Result<()> {
    for retention in ["interest", "workqueue"] {
        let (mut site, mut raw, lost) = held(retention).await?;
        // Held, it touches nothing.
        ensure!(consumer(&mut raw).await?["num_pending"] == 50 || raw.stream_state("Q").await?["messages"] == 50);
        let cli = site.cli();
        failed(&cli.run(["site", "adopt", &lost]).await?, &["is running: stop all instances"]);
        site.stop().await?;
        assert_eq!(cli.ok(["site", "adopt", &lost]).await?, format!("installation {lost}\n"));
        site.service.restart().await?;
        site.settled("Q", 150).await?;
        assert_eq!(site.at_target("Q").await?, 150, "{retention}");
        // And from then on, as before.
        publish(&mut raw, 150..200).await?;
        site.settled("Q", 200).await?;
        site.stop().await?;
        site.service.restart().await?;
        publish(&mut raw, 200..210).await?;
        site.settled("Q", 210).await?;
        let payloads = site.target().await?.read_stream("Q").await?;
        let payloads: Vec<_> =
            payloads.iter().map(|copy| String::from_utf8_lossy(&copy.payload).into_owned()).collect();
        assert_eq!(payloads, (0..210).map(|i: u64| i.to_string()).collect::<Vec<_>>(), "{retention}");
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_with_limits_continues_by_its_provenance() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 100).await?;
    site.settled("ORDERS", 100).await?;
    site.stop().await?;
    lose(&site, &["REPLICATOR_CONFIG", "REPLICATOR_POSITIONS"]).await?;
    site.service.restart().await?;
    site.publish("ORDERS", 101..=150).await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", 150).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

/// What a validation says of the consumer is what a run says.
#[tokio::test]
async fn a_validation_judges_as_the_run_does() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    site.add("Q", json!({})).await?;
    publish(&mut raw, 0..10).await?;
    site.settled("Q", 10).await?;
    site.stop().await?;
    // The position record still names the installation that the consumer belongs to.
    lose(&site, &["REPLICATOR_CONFIG"]).await?;
    site.service.restart().await?;
    let valid = async || -> Result<Value> { Ok(site.send("config.validate", site.document("Q")).await?.body) };
    let before = valid().await?;
    ensure!(before["valid"] == true, "{before}");
    site.add("Q", json!({})).await?;
    publish(&mut raw, 10..20).await?;
    site.settled("Q", 20).await?;
    let after = valid().await?;
    ensure!(after["valid"] == true, "{after}");
    // A replication without a record is judged by what it would run as.
    let other = site.send("config.validate", site.document_with("Q", json!({"id": "OTHER"}))).await?.body;
    ensure!(other["valid"] == false && other["problems"].to_string().contains("`name` of its own"), "{other}");
    Ok(())
}
