//! A replication that is added again while it is being deleted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Proxy, Site, connect, request, wait_for};

/// Deletes a replication whose source does not answer, so that the deletion takes its time, and has `meanwhile` done in
/// between.
async fn deleted<T>(site: &Site, meanwhile: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
    let client = connect(&site.service_url()).await?;
    let deletion =
        tokio::spawn(
            async move { request(&client, "replicator.config.delete", json!({"replication": "ORDERS"})).await },
        );
    let gone = async || site.ask("config.get", "ORDERS").await.is_ok_and(|reply| reply.error == Some(404));
    wait_for("the document to be gone", LIMIT, gone).await?;
    let done = meanwhile().await?;
    let _ = tokio::time::timeout(Duration::from_secs(20), deletion).await?;
    Ok(done)
}

async fn lease(site: &Site) -> Result<Value> {
    let lease = site.bucket("REPLICATOR_LEASES").await?.get("lease.ORDERS").await?.context("no lease")?;
    Ok(serde_json::from_slice(&lease)?)
}

#[tokio::test]
async fn what_is_added_again_meanwhile_keeps_its_lease_and_pause() -> Result<()> {
    let site = Site::start().await?;
    let proxy = Proxy::start(site.target.port()).await?;
    site.filled("ORDERS", 10).await?;
    let document = site.document_with("ORDERS", json!({"target_url": proxy.url()}));
    request(&site.client, "replicator.config.add", document.clone()).await?;
    site.copied("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    let before = lease(&site).await?["epoch"].as_u64().context("an epoch")?;
    // What is in flight now does not settle: the copy takes its time to stop.
    proxy.stall();
    site.publish("ORDERS", 11..=20).await?;
    site.row_when("ORDERS", "has messages in flight", |row| row["in_flight"]["messages"] != 0).await?;
    deleted(&site, async || {
        request(&site.client, "replicator.config.add", document).await?;
        request(&site.client, "replicator.pause", json!({"replication": "ORDERS"})).await.ok();
        Ok(())
    })
    .await?;
    proxy.resume();
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    let config = site.bucket("REPLICATOR_CONFIG").await?;
    ensure!(config.get("ORDERS/paused").await?.is_some(), "the pause was forgotten\n{}", site.service.log());
    // The replication that was added again took the lease once; a new lease would begin with the first epoch.
    let taken = async || lease(&site).await.is_ok_and(|lease| lease["instance"] != "");
    wait_for("the lease to be taken", LIMIT, taken).await?;
    let after = lease(&site).await.context("the lease was forgotten")?;
    assert_eq!(after["epoch"].as_u64(), Some(before + 1), "{after}");
    ensure!(site.ask("resume", "ORDERS").await?.error.is_none());
    site.copied("ORDERS", 20).await?;
    site.settled("ORDERS", 20).await?;
    assert_eq!(site.at_target("ORDERS").await?, 20);

    // Without anything in between all of it goes.
    ensure!(site.ask("config.delete", "ORDERS").await?.error.is_none());
    assert_eq!(site.position("ORDERS").await?, None);
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    let gone = async || leases.get("lease.ORDERS").await.is_ok_and(|lease| lease.is_none());
    wait_for("the lease to be gone", LIMIT, gone).await
}
