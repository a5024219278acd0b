//! Servers that form a cluster, for replicated streams, leader changes and restarts, with a proxy in front of each.

use std::{sync::Mutex, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::client::{wait_for, wait_value};
use super::proxy::Proxy;
use super::raw::{Raw, Stored};
use super::server::{Builder, Role, Server, free_port};
use super::{LIMIT, client};

/// While there is no leader a request is not answered at all: ask again after this.
const ANSWER: Duration = Duration::from_secs(2);
/// The same where the moment matters.
const QUICK: Duration = Duration::from_millis(300);

/// How often ports are looked for.
const ATTEMPTS: usize = 5;

/// How a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// kill -9
    Killed,
    /// SIGTERM, and its own time to hand over.
    Stopped,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    pub servers: Vec<Server>,
    /// One in front of each server, in the same order.
    pub proxies: Vec<Proxy>,
}

impl Cluster {
    /// Three servers of one role; returns when a stream with three replicas can be made.
    pub async fn start(role: Role) -> Result<Self> {
        Self::start_with(role, |server| server).await
    }

    /// The same with each server refined.
    pub async fn start_with(role: Role, refine: impl Fn(Builder) -> Builder) -> Result<Self> {
        let mut last = anyhow!("no free ports for routes");
        for _ in 0..ATTEMPTS {
            let Some(cluster) = Self::attempt(role, &refine).await? else { continue };
            match cluster.wait_ready().await {
                Ok(()) => return Ok(cluster),
                // Old servers on a busy machine sometimes do not find each other: after a restart they do.
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Three target servers with a leafnode port each, and the `target_leaf_url` that names them.
    pub async fn with_leafnode_ports() -> Result<(Self, String)> {
        Self::with_leafnode_ports_of(None).await
    }

    /// The same with servers of a version.
    pub async fn with_leafnode_ports_of(version: Option<&str>) -> Result<(Self, String)> {
        Self::with_leafnode_ports_and(version, "").await
    }

    /// The same with more configuration of each server.
    pub async fn with_leafnode_ports_and(version: Option<&str>, more: &str) -> Result<(Self, String)> {
        let hosts = Mutex::new(Vec::new());
        let cluster = Self::start_with(Role::Target, |server| {
            let host = format!("127.0.0.1:{}", free_port().expect("a port"));
            // They advertise each other: a feed goes to those that its document names.
            let config = format!("leafnodes {{ listen: \"{host}\" }}\nhttp: \"127.0.0.1:-1\"\n{more}");
            hosts.lock().expect("hosts").push(host);
            let server = server.config(&config);
            match version {
                Some(version) => server.version(version),
                None => server,
            }
        });
        let cluster = cluster.await?;
        // Those of an attempt that failed are before those of the cluster.
        let hosts = hosts.into_inner().expect("hosts");
        let url = format!("nats-leaf://{}", hosts[hosts.len() - cluster.servers.len()..].join(","));
        Ok((cluster, url))
    }

    /// `None` if somebody else has taken a port for routes meanwhile: a server notices that after it took clients.
    async fn attempt(role: Role, refine: &impl Fn(Builder) -> Builder) -> Result<Option<Self>> {
        let ports = [free_port()?, free_port()?, free_port()?];
        let routes: Vec<String> = ports.iter().map(|p| format!("\"nats-route://127.0.0.1:{p}\"")).collect();
        let mut servers = Vec::new();
        for (i, port) in ports.iter().enumerate() {
            // Nobody learns the addresses behind the proxies.
            let config = format!(
                "cluster {{ name: \"{role:?}\", listen: \"127.0.0.1:{port}\", no_advertise: true, routes: [{}] }}",
                routes.join(", ")
            );
            let name = format!("{role:?}-{}", i + 1).to_lowercase();
            let server = refine(Server::builder(role).name(&name).config(&config)).start().await?;
            let listens = wait_value("nats-server to listen for routes", LIMIT, async || {
                let log = server.log();
                let taken = log.contains("address already in use");
                (taken || log.contains("Listening for route connections")).then_some(!taken)
            });
            if !listens.await? {
                return Ok(None);
            }
            servers.push(server);
        }
        Self::behind_proxies(servers).await.map(Some)
    }

    /// One server, with the same handles.
    pub async fn single(role: Role) -> Result<Self> {
        Self::behind_proxies(vec![Server::start(role).await?]).await
    }

    async fn behind_proxies(servers: Vec<Server>) -> Result<Self> {
        let proxies = try_join_all(servers.iter().map(|server| Proxy::start(server.port()))).await?;
        Ok(Self { servers, proxies })
    }

    /// All addresses, as a client takes them.
    pub fn url(&self) -> String {
        self.servers.iter().map(Server::url).collect::<Vec<_>>().join(",")
    }

    /// All addresses of the proxies.
    pub fn proxied_url(&self) -> String {
        self.proxies.iter().map(Proxy::url).collect::<Vec<_>>().join(",")
    }

    /// Which server leads a stream now; `None` while nobody does.
    pub async fn leader(&self, stream: &str) -> Option<usize> {
        if self.servers.len() == 1 {
            return Some(0);
        }
        for server in &self.servers {
            let Ok(Ok(info)) = timeout(ANSWER, info(server, stream)).await else { continue };
            let name = info["cluster"]["leader"].as_str()?;
            return self.servers.iter().position(|s| s.name() == name);
        }
        None
    }

    /// Waits until each of these streams has a leader that answers, other than the server `not`, and so has the
    /// cluster, without which nobody can make a consumer.
    pub async fn wait_leaders(&self, streams: &[&str], not: Option<usize>) -> Result<()> {
        let not = not.map(|not| self.servers[not].name());
        let led = async || self.ask("INFO", &Value::Null).await.is_some();
        wait_for("a leader of the cluster", 2 * LIMIT, led).await?;
        for stream in streams {
            let led = async || {
                for server in self.servers.iter().filter(|s| s.pid().is_some() && Some(s.name()) != not) {
                    let Ok(Ok(info)) = timeout(QUICK, info(server, stream)).await else { continue };
                    return self.servers.len() == 1 || info["cluster"]["leader"].as_str() != not;
                }
                false
            };
            wait_for(&format!("a leader of `{stream}` that answers"), 2 * LIMIT, led).await?;
        }
        Ok(())
    }

    /// Waits until all replicas of these streams have everything.
    pub async fn wait_current(&self, streams: &[&str]) -> Result<()> {
        for stream in streams {
            let current = async || {
                for server in self.servers.iter().filter(|s| s.pid().is_some()) {
                    let Ok(Ok(info)) = timeout(QUICK, info(server, stream)).await else { continue };
                    let replicas = info["cluster"]["replicas"].as_array().cloned().unwrap_or_default();
                    return replicas.iter().all(|r| r["current"] == true && r["offline"] != true);
                }
                false
            };
            wait_for(&format!("all replicas of `{stream}`"), 4 * LIMIT, current).await?;
        }
        Ok(())
    }

    /// Ends one server.
    pub async fn end(&mut self, server: usize, how: End) -> Result<()> {
        match how {
            End::Killed => self.servers[server].kill(),
            End::Stopped => self.servers[server].stop().await,
        }
    }

    /// Ends all servers at one moment and starts them again.
    pub async fn restart_all(&mut self, how: End) -> Result<()> {
        match how {
            End::Killed => self.servers.iter_mut().try_for_each(Server::kill)?,
            End::Stopped => {
                try_join_all(self.servers.iter_mut().map(Server::stop)).await?;
            }
        }
        try_join_all(self.servers.iter_mut().map(Server::restart)).await?;
        Ok(())
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

    /// Makes a stream with a replica on each server, and waits for its leader.
    pub async fn create_stream(&self, stream: &str, mut config: Value) -> Result<()> {
        config["name"] = stream.into();
        config["num_replicas"] = self.servers.len().into();
        let made = async || self.ask(&format!("STREAM.CREATE.{stream}"), &config).await;
        wait_value(&format!("stream `{stream}`"), LIMIT, made).await?;
        self.wait_leaders(&[stream], None).await
    }

    /// Sends a request to the JetStream API through any server that runs; `None` without an answer, or with an error.
    pub async fn ask(&self, what: &str, body: &Value) -> Option<Value> {
        for server in self.servers.iter().filter(|s| s.pid().is_some()) {
            let asked = async { Raw::connect(&server.url()).await?.api(what, body.clone()).await };
            if let Ok(Ok(answer)) = timeout(QUICK, asked).await {
                return Some(answer);
            }
        }
        None
    }

    /// Reads a whole stream through a server that runs, trying again while there is no leader.
    pub async fn read_stream(&self, stream: &str) -> Result<Vec<Stored>> {
        let read = async || {
            for server in self.servers.iter().filter(|s| s.pid().is_some()) {
                let attempt = async {
                    let mut raw = Raw::connect(&server.url()).await?;
                    // The leader answers this; the consumer may be on a replica that lacks messages.
                    let state = raw.stream_state(stream).await?;
                    let stored = raw.read_stream(stream).await?;
                    let all = state["messages"].as_u64().context("no number of messages")?;
                    ensure!(stored.len() as u64 >= all, "read {} of {all} messages", stored.len());
                    Ok::<_, anyhow::Error>(stored)
                };
                if let Ok(Ok(stored)) = timeout(LIMIT, attempt).await {
                    return Some(stored);
                }
            }
            None
        };
        wait_value(&format!("`{stream}` to be readable"), 3 * LIMIT, read).await
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
