//! Adapters of a file beside those of the bucket.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Place;
use crate::harness::client::{ask, refused};
use crate::harness::{LIMIT, Outgoing, Service, connect, raw::wait_messages, request, wait_for};

/// What nodes publish, and what becomes of it.
const VECTORS: &str = include_str!("../../data/choria-adapter.json");

#[tokio::test]
async fn an_adapter_of_the_bucket_takes_precedence() -> Result<()> {
    let place = Place::start().await?;
    let (source, target) = (place.source.url(), place.target.url());
    // The control connection is that of the adapter.
    let text = format!(
        "name: A\nadapters:\n  - name: inventory\n    ingest: {{topic: reg, protocol: request, servers: \"{source}\"}}\n    \
         stream: {{type: jetstream, topic: in.%s, servers: \"{target}\", create: {{name: IN}}}}\n  \
         - name: old\n    ingest: {{topic: old, servers: \"{source}\"}}\n    stream: {{type: nats_stream}}\n"
    );
    let mut service = Service::replicate(&place.write(&text)?).spawn()?;
    service.wait_ready().await?;
    ensure!(service.log().contains("this adapter does not run"), "{}", service.log());
    let client = connect(&target).await?;
    let row = async || {
        let reply = ask(&client, "replicator.adapter.status", b"inventory").await.ok()?;
        reply.body["adapters"].get(0).cloned()
    };
    let runs = async |origin: &str, queue: u64| {
        row().await.is_some_and(|row| {
            row["origin"] == origin && row["state"] == "running" && row["queue"]["capacity"] == queue
        })
    };
    wait_for("the file's adapter to run", LIMIT, async || runs("file", 1_000).await)
        .await
        .with_context(|| service.log())?;
    let vectors: Value = serde_json::from_str(VECTORS)?;
    let vector = vectors["vectors"].as_array().and_then(|all| all.iter().find(|one| one["name"] == "v2_request"));
    let vector = vector.context("no vector")?;
    place.source().await?.send_only(&Outgoing::new("reg", vector["in"].as_str().context("no input")?)).await?;
    let mut stored = place.target().await?;
    wait_messages(&mut stored, "IN", 1, LIMIT).await.with_context(|| service.log())?;
    let stored = stored.read_stream("IN").await?;
    ensure!(String::from_utf8_lossy(&stored[0].payload) == vector["out"].as_str().unwrap_or_default(), "{stored:?}");

    let document = json!({
        "name": "inventory", "queue_len": 77,
        "ingest": {"topic": "reg", "protocol": "request", "servers": source},
        "stream": {"type": "jetstream", "topic": "in.%s", "servers": target},
    });
    for (endpoint, body) in [("delete", json!({"adapter": "inventory"})), ("update", document.clone())] {
        let reply = ask(&client, &format!("replicator.adapter.{endpoint}"), body.to_string().as_bytes()).await?;
        refused(&reply, 409, "is configured in the file of instance");
    }
    request(&client, "replicator.adapter.add", document).await?;
    wait_for("the bucket's to run", LIMIT, async || runs("kv", 77).await).await.with_context(|| service.log())?;
    request(&client, "replicator.adapter.delete", json!({"adapter": "inventory"})).await?;
    wait_for("the file's to run again", LIMIT, async || runs("file", 1_000).await)
        .await
        .with_context(|| service.log())?;
    Ok(())
}
