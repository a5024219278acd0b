//! Three servers that form a cluster, for replicated streams and leader changes.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::client::{wait_for, wait_value};
use super::raw::{Raw, Stored};
use super::server::{Builder, Role, Server, free_port};
use super::{LIMIT, client};

/// While there is no leader a request is not answered at all: ask again after this.
const ANSWER: Duration = Duration::from_secs(2);

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    pub servers: Vec<Server>,
}

impl Cluster {
    /// Three servers of one role; returns when a stream with three replicas can be made.
    pub async fn start(role: Role) -> Result<Self> {
        Self::start_with(role, |server| server).await
    }

    /// The same with each server refined.
    pub async fn start_with(role: Role, refine: impl Fn(Builder) -> Builder) -> Result<Self> {
        let ports = [free_port()?, free_port()?, free_port()?];
        let routes: Vec<String> = ports.iter().map(|p| format!("\"nats-route://127.0.0.1:{p}\"")).collect();
        let mut servers = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            let config = format!(
                "cluster {{ name: \"{role:?}\", listen: \"127.0.0.1:{port}\", routes: [{}] }}",
                routes.join(", ")
            );
            let name = format!("{role:?}-{}", i + 1).to_lowercase();
            servers.push(refine(Server::builder(role).name(&name).config(&config)).start().await?);
        }
        let cluster = Self { servers };
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    /// All addresses, as a client takes them.
    pub fn url(&self) -> String {
        self.servers.iter().map(Server::url).collect::<Vec<_>>().join(",")
    }

    /// Which server leads a stream now; `None` while nobody does.
    pub async fn leader(&self, stream: &str) -> Option<usize> {
        for server in &self.servers {
            let Ok(Ok(info)) = timeout(ANSWER, info(server, stream)).await else { continue };
            let name = info["cluster"]["leader"].as_str()?;
            return self.servers.iter().position(|s| s.name() == name);
        }
        None
    }

    /// Makes the leader of a stream hand over, and waits until there is a leader again.
    pub async fn step_down(&self, stream: &str) -> Result<()> {
        let leader = self.leader(stream).await.context("no leader")?;
        let mut raw = Raw::connect(&self.servers[leader].url()).await?;
        // The answer may get lost in the change, so what counts is the next leader.
        let subject = format!("STREAM.LEADER.STEPDOWN.{stream}");
        let _ = timeout(ANSWER, raw.api(&subject, Value::Null)).await;
        let again = async || self.leader(stream).await.is_some_and(|now| now != leader);
        wait_for("another leader", LIMIT, again).await
    }

    /// Reads a whole stream through a server that runs, trying again while there is no leader.
    pub async fn read_stream(&self, stream: &str) -> Result<Vec<Stored>> {
        let read = async || {
            for server in self.servers.iter().filter(|s| s.pid().is_some()) {
                let attempt = async { Raw::connect(&server.url()).await?.read_stream(stream).await };
                if let Ok(Ok(stored)) = timeout(3 * ANSWER, attempt).await {
                    return Some(stored);
                }
            }
            None
        };
        wait_value(&format!("`{stream}` to be readable"), LIMIT, read).await
    }

    async fn wait_ready(&self) -> Result<()> {
        let client = client::connect(&self.servers[0].url()).await?;
        let body = json!({"name": "PROBE", "subjects": ["probe"], "num_replicas": 3, "storage": "memory"}).to_string();
        // Until all three know each other it is refused.
        let made = async || {
            let reply = timeout(ANSWER, client::ask(&client, "$JS.API.STREAM.CREATE.PROBE", body.as_bytes())).await;
            reply.is_ok_and(|r| r.is_ok_and(|r| r.body.get("error").is_none()))
        };
        wait_for("the cluster to take a stream with three replicas", LIMIT, made).await?;
        client::ask(&client, "$JS.API.STREAM.DELETE.PROBE", b"").await?;
        Ok(())
    }
}

async fn info(server: &Server, stream: &str) -> Result<Value> {
    Raw::connect(&server.url()).await?.api(&format!("STREAM.INFO.{stream}"), Value::Null).await
}
