//! `instances`: who is there and what each runs; and the bounded numbers in `$SRV.STATS`.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::cli::failed;
use crate::harness::{LIMIT, SITE, Service, Site, request, wait_for, wait_value};

async fn instances(site: &Site) -> Result<Vec<Value>> {
    let reply = request(&site.client, "replicator.instances", Value::Null).await?;
    reply["instances"].as_array().cloned().context("a list")
}

async fn names(site: &Site) -> Vec<String> {
    let rows = instances(site).await.unwrap_or_default();
    rows.iter().filter_map(|row| row["instance"].as_str().map(str::to_owned)).collect()
}

/// Waits until whoever answers names these; each instance answers now and then.
async fn present(site: &Site, expect: &[&str]) -> Result<()> {
    let mut agreed = 0;
    wait_for(&format!("{expect:?} alone"), LIMIT, async || {
        agreed = if names(site).await == expect { agreed + 1 } else { 0 };
        agreed > 20
    })
    .await
}

#[tokio::test]
async fn each_instance_is_shown_with_what_it_runs() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    present(&site, &["one"]).await?;
    for stream in ["A", "B"] {
        site.replicate(stream, 1).await?;
    }
    let row = wait_value("what it runs", LIMIT, async || {
        let row = instances(&site).await.ok()?.pop()?;
        (row["leads"] == 2).then_some(row)
    });
    let row = row.await?;
    assert_eq!(row["replications"], json!(["A", "B"]));
    assert_eq!((&row["instance"], &row["version"]), (&json!("one"), &json!(env!("CARGO_PKG_VERSION"))));
    assert!(row["host"].is_string() && row["started"].is_string(), "{row}");
    assert!(row["silent_seconds"].as_f64().is_some_and(|seconds| (0.0..10.0).contains(&seconds)), "{row}");

    let record = site.bucket("REPLICATOR_LEASES").await?.get("session.one").await?.context("a session")?;
    let record: Value = serde_json::from_slice(&record)?;
    assert_eq!((&record["version"], &record["instance"]), (&json!(1), &json!("one")));
    assert_eq!(record["pid"], site.service.pid().context("a process")?);

    let mut two = Service::builder(&site.control().url(), SITE).instance("two").start().await?;
    present(&site, &["one", "two"]).await?;
    // Who comes later leads nothing before it has been there for a while.
    wait_for("the one that leads", LIMIT, async || {
        let rows = instances(&site).await.unwrap_or_default();
        rows.len() == 2 && rows[1]["leads"] == 0 && rows[0]["replications"] == json!(["A", "B"])
    })
    .await?;
    let page = request(&site.client, "replicator.instances", json!({"offset": 1, "limit": 1})).await?;
    assert_eq!((&page["total"], &page["instances"][0]["instance"]), (&json!(2), &json!("two")));

    assert!(two.stop().await?.success());
    present(&site, &["one"]).await?;
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    assert_eq!(leases.get("session.two").await?, None);
    Ok(())
}

#[tokio::test]
async fn what_a_silent_leader_said_last_is_not_believed() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    site.replicate("ORDERS", 5).await?;
    let two = Service::builder(&site.control().url(), SITE).instance("two").start().await?;
    present(&site, &["one", "two"]).await?;
    request(&site.client, "replicator.stepdown", json!({"replication": "ORDERS"})).await?;
    let leads = |row: &Value, state: &str| row["leader"] == "two" && row["state"] == state;
    site.row_when("ORDERS", "is caught up at `two`", |row| leads(row, "running") && row["lag"]["messages"] == 0)
        .await?;
    two.freeze()?;
    site.publish("ORDERS", 1..=5).await?;
    site.row_when("ORDERS", "is doubted", |row| leads(row, "retrying")).await?;
    let late = site.cli().run(["status", "--wait-caught-up", "--timeout", "1s"]).await?;
    failed(&late, &["not caught up within 1s: `ORDERS` is retrying"]);
    two.thaw()?;
    site.row_when("ORDERS", "is believed again", |row| leads(row, "running")).await?;
    site.copied("ORDERS", 10).await
}

#[tokio::test]
async fn a_session_is_renewed_and_taken_over_by_a_restart() -> Result<()> {
    let mut site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    let record = async || -> Option<Value> { serde_json::from_slice(&leases.get("session.one").await.ok()??).ok() };
    let first = wait_value("a session", LIMIT, &record).await?;
    let renewed = async || record().await.filter(|record| record["nonce"].as_u64() > first["nonce"].as_u64());
    let renewed = wait_value("a renewal", LIMIT, renewed).await?;
    assert_eq!(renewed["session"], first["session"]);
    site.service.kill()?;
    site.service.restart().await?;
    let other = async || record().await.filter(|record| record["session"] != first["session"]);
    let other = wait_value("another session", LIMIT, other).await?;
    assert_eq!(other["instance"], "one");
    present(&site, &["one"]).await
}

#[tokio::test]
async fn the_statistics_count_replications_by_state_and_do_not_grow() -> Result<()> {
    let site = Site::small().await?;
    let data = async || -> Result<Value> {
        let stats = request(&site.client, "$SRV.STATS.replicator", Value::Null).await?;
        let endpoints = stats["endpoints"].as_array().context("endpoints")?;
        let mut data =
            endpoints.iter().find(|endpoint| endpoint["name"] == "status").context("status")?["data"].clone();
        let time = data.as_object_mut().and_then(|data| data.remove("time")).context("a time")?;
        chrono::DateTime::parse_from_rfc3339(time.as_str().unwrap_or_default())?;
        Ok(data)
    };
    let counts = |running: u64, paused: u64, held: u64| {
        json!({"replications": {
            "starting": 0, "running": running, "paused": paused, "retrying": 0, "held": held, "invalid": 0, "stopped": 0
        }})
    };
    assert_eq!(data().await?, counts(0, 0, 0));
    site.replicate("A", 1).await?;
    site.replicate("B", 1).await?;
    site.send("config.add", site.document("NONE")).await?;
    site.ask("pause", "B").await?;
    wait_for("the numbers", LIMIT, async || data().await.is_ok_and(|data| data == counts(1, 1, 1))).await
}
