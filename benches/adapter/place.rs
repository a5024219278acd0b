//! Two servers, and a service with an adapter between them.

use std::collections::HashSet;

use anyhow::{Context, Result};
use async_nats::Client;
use serde_json::{Value, json};

use crate::harness::raw::header_values;
use crate::harness::{
    LIMIT, REGISTRATION, Raw, Role, Server, Service, connect, request, wait_value, wait_while_moving,
};

pub(crate) const STREAM: &str = "CHORIA_REGISTRATION";

pub(crate) struct Place {
    pub(crate) ingest: Server,
    pub(crate) target: Server,
    pub(crate) service: Service,
    client: Client,
}

impl Place {
    /// With a queue of so many messages.
    pub(crate) async fn start(queue_len: u64) -> Result<Self> {
        let ingest = Server::start(Role::Source).await?;
        let target = Server::start(Role::Target).await?;
        let service = Service::builder(&ingest.url(), "BENCH").instance("bench").start().await?;
        let client = connect(&ingest.url()).await?;
        let adapter = json!({
            "name": "bench", "queue_len": queue_len,
            "ingest": {"topic": REGISTRATION, "protocol": "request", "servers": ingest.url()},
            "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s", "servers": target.url(),
                "create": {"name": STREAM, "max_msgs_per_subject": 100_000}},
        });
        request(&client, "replicator.adapter.add", adapter).await?;
        let place = Self { ingest, target, service, client };
        wait_value("the adapter to run", LIMIT, async || {
            place.row().await.ok().filter(|row| row["state"] == "running")
        })
        .await?;
        Ok(place)
    }

    /// The status of the adapter.
    pub(crate) async fn row(&self) -> Result<Value> {
        let reply = request(&self.client, "replicator.adapter.status", json!({"adapter": "bench"})).await?;
        reply["adapters"].get(0).cloned().context("no adapter")
    }

    /// Waits until so many are received, and all that were accepted of them are stored.
    pub(crate) async fn wait_stored(&self, count: u64) -> Result<Value> {
        wait_while_moving("everything to be stored", LIMIT, async || match self.row().await {
            Ok(row) if row["received"] == count && row["stored"] == row["accepted"] => Ok(row),
            Ok(row) => Err((row["received"].clone(), row["stored"].clone())),
            Err(_) => Err((Value::Null, Value::Null)),
        })
        .await
    }

    /// Waits until this many or more are stored.
    pub(crate) async fn wait_moving(&self, count: u64) -> Result<()> {
        wait_value("the first messages", LIMIT, async || {
            self.row().await.ok().filter(|row| row["stored"].as_u64() >= Some(count))
        })
        .await
        .map(drop)
    }

    /// How many of the accepted messages the stream does not have, and how many it has more than once.
    pub(crate) async fn wrong(&self, row: &Value) -> Result<u64> {
        let accepted = row["accepted"].as_u64().context("no count")?;
        let mut raw = Raw::connect(&self.target.url()).await?;
        let stored = raw.read_headers(STREAM).await?;
        let ids: HashSet<String> =
            stored.iter().flat_map(|message| header_values(&message.header, "Nats-Msg-Id")).collect();
        let twice = stored.len() - ids.len();
        Ok(accepted.abs_diff(ids.len() as u64) + twice as u64)
    }

    /// CPU seconds of the service, and of both servers, so far.
    pub(crate) fn cpu(&self) -> (f64, f64) {
        let servers = self.ingest.usage().cpu_seconds + self.target.usage().cpu_seconds;
        (self.service.usage().cpu_seconds, servers)
    }
}
