//! The service as the `nats` tool shows it, where that tool is here.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    doc_commands::Background,
    packages::{have, output},
};
use crate::harness::{LIMIT, Site, wait_for};

/// Runs the tool beside the servers of the test.
async fn nats(site: &Site, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("nats");
    command.args(["--server", &site.control().url()]).args(arguments);
    tokio::task::spawn_blocking(move || output(&mut command)).await?
}

#[tokio::test]
async fn the_nats_tool_shows_requests_documents_and_events() -> Result<()> {
    if !have(&["nats"]) {
        return Ok(());
    }
    let site = Site::start().await?;
    // Of every endpoint: what it does, and what goes in and comes out.
    let info: Value = serde_json::from_str(&nats(&site, &["micro", "info", "replicator", "--json"]).await?)?;
    let endpoints = info["info"]["endpoints"].as_array().context("no endpoints")?;
    ensure!(endpoints.len() > 30, "{info}");
    for endpoint in endpoints {
        for field in ["description", "request_schema", "reply_schema"] {
            let text = endpoint["metadata"][field].as_str().unwrap_or_default();
            ensure!(!text.is_empty(), "{field} of {endpoint}");
        }
    }
    let shown = nats(&site, &["micro", "info", "replicator"]).await?;
    ensure!(shown.contains("config.add.request") && shown.contains("replicator.config.add"), "{shown}");

    site.filled("ORDERS", 10).await?;
    let document = site.document("ORDERS").to_string();
    let added: Value =
        serde_json::from_str(&nats(&site, &["req", "--raw", "replicator.config.add", &document]).await?)?;
    ensure!(added["replication"] == "ORDERS", "{added}");
    site.settled("ORDERS", 10).await?;
    let stored: Value =
        serde_json::from_str(&nats(&site, &["kv", "get", "REPLICATOR_CONFIG", "ORDERS", "--raw"]).await?)?;
    ensure!(stored["stream"] == "ORDERS", "{stored}");
    let history = nats(&site, &["kv", "history", "REPLICATOR_CONFIG", "ORDERS"]).await?;
    ensure!(history.contains("ORDERS"), "{history}");

    // As they happen, by type.
    let log = tempfile::NamedTempFile::new()?;
    let mut listens = Command::new("nats");
    listens.args(["--server", &site.control().url(), "events", "--subjects", "replicator.event.>"]);
    let _listens = Background(listens.stdin(Stdio::null()).stdout(log.reopen()?).stderr(log.reopen()?).spawn()?);
    let shows = || fs::read_to_string(log.path()).unwrap_or_default();
    // It says nothing of when it listens.
    let seen = async || {
        for pause in ["pause", "resume"] {
            let _ = site.ask(pause, "ORDERS").await;
        }
        shows().contains("io.stream_replicator.event.v1.paused")
    };
    wait_for("the event in `nats events`", LIMIT, seen).await.with_context(shows)
}
