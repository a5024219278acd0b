//! The servers that all ways are measured on.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::harness::server::free_port;
use crate::harness::{Outgoing, Proxy, Raw, Role, Server, wait_for};

/// What the subjects of copies that are published at the target begin with. The source's streams are interested in the
/// subjects of the originals, and their interest reaches the target over the leafnode that only the native ways
/// need: with the same subjects every copy would be matched against that leafnode too.
pub(crate) const PREFIX: &str = "copy";
/// JetStream domain of the source, by which the target's native ways reach it.
pub(crate) const DOMAIN: &str = "factory";

const LIMIT: Duration = Duration::from_secs(300);

/// What is copied, and onto what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Bytes of each message.
    pub(crate) payload: usize,
    /// Messages of all streams together.
    pub(crate) messages: u64,
    /// Streams, each copied by a replication of its own, at once.
    pub(crate) streams: usize,
    /// Replicas of each target stream.
    pub(crate) replicas: usize,
}

/// A source with messages, and a target (one server, or three in a cluster) that is a leaf of it.
pub(crate) struct Pair {
    pub(crate) source: Server,
    pub(crate) targets: Vec<Server>,
    pub(crate) load: Load,
    /// Fields that the documents of this program have beside the usual ones.
    pub(crate) fields: Value,
    /// Where each target server takes leafnodes.
    leaf_ports: Vec<u16>,
    /// Between us and the servers, where the way is long.
    distance: Distance,
}

/// Proxies that a way goes through.
#[derive(Default)]
struct Distance {
    source: Option<Proxy>,
    target: Option<Proxy>,
    /// The leafnode port of the target.
    leaf: Option<Proxy>,
}

/// Name of a stream at the source.
pub(crate) fn source_stream(index: usize) -> String {
    format!("BENCH{index}")
}

/// Name of its copy.
pub(crate) fn target_stream(index: usize) -> String {
    format!("COPY{index}")
}

impl Pair {
    /// Servers without messages; `replicas` target servers.
    pub(crate) async fn start(replicas: usize, fields: Value) -> Result<Self> {
        let port = free_port()?;
        let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
        let source = Server::builder(Role::Source).domain(DOMAIN).config(&listen).start().await?;
        let routes = (0..replicas).map(|_| free_port()).collect::<Result<Vec<_>, _>>()?;
        let leaf_ports = (0..replicas).map(|_| free_port()).collect::<Result<Vec<_>, _>>()?;
        let all: Vec<String> = routes.iter().map(|port| format!("\"nats-route://127.0.0.1:{port}\"")).collect();
        let mut targets = Vec::new();
        for (index, (route, own)) in routes.iter().zip(&leaf_ports).enumerate() {
            let remotes = format!("remotes: [{{ url: \"nats-leaf://127.0.0.1:{port}\" }}]");
            let mut config = format!("leafnodes {{ host: \"127.0.0.1\", port: {own}, {remotes} }}\n");
            if replicas > 1 {
                let routes = all.join(", ");
                config += &format!("cluster {{ name: hq, listen: \"127.0.0.1:{route}\", routes: [{routes}] }}");
            }
            let name = format!("target-{index}");
            let builder = Server::builder(Role::Target).domain("headquarters").name(&name).config(&config);
            targets.push(builder.start().await?);
        }
        let load = Load { payload: 0, messages: 0, streams: 0, replicas };
        let pair = Self { source, targets, load, fields, leaf_ports, distance: Distance::default() };
        pair.wait_ready().await?;
        Ok(pair)
    }

    /// Fills the source, instead of what was there.
    pub(crate) async fn preload(&mut self, load: Load) -> Result<()> {
        if load == self.load {
            return Ok(());
        }
        let mut raw = Raw::connect(&self.source.url()).await?;
        for index in 0..self.load.streams {
            raw.api(&format!("STREAM.DELETE.{}", source_stream(index)), Value::Null).await?;
        }
        let body = vec![b'x'; load.payload];
        let each = load.messages / load.streams as u64;
        for index in 0..load.streams {
            raw.create_stream(&source_stream(index), json!({"subjects": [format!("bench{index}.>")]})).await?;
            let messages = (0..each).map(|i| Outgoing::new(subject(index, i), body.clone()));
            let last = raw.publish_all(messages).await?;
            ensure!(last == each, "the source holds {last} of {each} messages");
        }
        self.load = Load { messages: each * load.streams as u64, ..load };
        Ok(())
    }

    /// The source no longer has the messages that were loaded: the next load starts from nothing.
    pub(crate) fn forget(&mut self) {
        self.load.messages = 0;
    }

    /// Puts `delay` between us and the servers, in each direction; a side without delay is reached directly.
    pub(crate) async fn move_away(&mut self, source: Option<Duration>, target: Option<Duration>) -> Result<()> {
        let proxy = async |delay: Option<Duration>, port: u16| -> Result<Option<Proxy>> {
            let Some(delay) = delay else { return Ok(None) };
            let proxy = Proxy::start(port).await?;
            proxy.delay(delay);
            Ok(Some(proxy))
        };
        self.distance = Distance {
            source: proxy(source, self.source.port()).await?,
            target: proxy(target, self.targets[0].port()).await?,
            leaf: proxy(target, self.leaf_ports[0]).await?,
        };
        Ok(())
    }

    /// Where a copier reaches the source.
    pub(crate) fn source_url(&self) -> String {
        self.distance.source.as_ref().map_or_else(|| self.source.url(), Proxy::url)
    }

    /// Where a copier reaches the target.
    pub(crate) fn target_url(&self) -> String {
        self.distance.target.as_ref().map_or_else(|| self.targets[0].url(), Proxy::url)
    }

    /// Where a feed reaches the target: all servers, or the one that is far away.
    pub(crate) fn target_leaf_url(&self) -> String {
        let far = self.distance.leaf.as_ref().map(Proxy::port);
        let ports = far.map_or_else(|| self.leaf_ports.clone(), |port| vec![port]);
        let all: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("nats-leaf://{}", all.join(","))
    }

    /// The target as the bench itself asks it.
    pub(crate) async fn target(&self) -> Result<Raw> {
        Raw::connect(&self.targets[0].url()).await
    }

    /// Makes the target streams with these settings, all replicas of each ready to take messages.
    pub(crate) async fn make_targets(&self, settings: impl Fn(usize) -> Value) -> Result<()> {
        let mut raw = self.target().await?;
        for index in 0..self.load.streams {
            let mut config = settings(index);
            config["num_replicas"] = self.load.replicas.into();
            raw.create_stream(&target_stream(index), config).await?;
        }
        Ok(())
    }

    /// Waits until the target's streams hold everything, and looks that it is not more.
    pub(crate) async fn wait_copied(&self, messages: u64) -> Result<()> {
        let each = messages / self.load.streams as u64;
        try_join_all((0..self.load.streams).map(|index| async move {
            let mut raw = self.target().await?;
            let stream = target_stream(index);
            let what = format!("{each} messages in {stream}");
            wait_for(&what, LIMIT, async || count(&mut raw, &stream).await >= each).await?;
            let found = count(&mut raw, &stream).await;
            ensure!(found == each, "{stream} holds {found} messages instead of {each}");
            Ok(())
        }))
        .await?;
        Ok(())
    }

    /// Messages in the first target stream now.
    pub(crate) async fn copied(&self) -> Result<u64> {
        Ok(count(&mut self.target().await?, &target_stream(0)).await)
    }

    /// Waits for the first message in each target stream: how many are in all of them then.
    pub(crate) async fn wait_begun(&self) -> Result<u64> {
        let mut raw = self.target().await?;
        let mut begun = 0;
        for index in 0..self.load.streams {
            let stream = target_stream(index);
            let what = format!("a message in {stream}");
            wait_for(&what, LIMIT, async || count(&mut raw, &stream).await > 0).await?;
        }
        for index in 0..self.load.streams {
            begun += count(&mut raw, &target_stream(index)).await;
        }
        Ok(begun)
    }

    pub(crate) async fn delete_targets(&self) -> Result<()> {
        let mut raw = self.target().await?;
        for index in 0..self.load.streams {
            raw.api(&format!("STREAM.DELETE.{}", target_stream(index)), Value::Null).await?;
        }
        Ok(())
    }

    /// CPU seconds of the source's server and of all target servers so far.
    pub(crate) fn cpu(&self) -> (f64, f64) {
        (self.source.usage().cpu_seconds, self.targets.iter().map(|server| server.usage().cpu_seconds).sum())
    }

    async fn wait_ready(&self) -> Result<()> {
        for server in &self.targets {
            let mut raw = Raw::connect(&server.url()).await?.with_api(&format!("$JS.{DOMAIN}.API"));
            wait_for("the leafnode", LIMIT, async || raw.api("INFO", Value::Null).await.is_ok()).await?;
        }
        // A cluster refuses a stream until all know each other.
        let probe = json!({"name": "PROBE", "subjects": ["probe"], "num_replicas": self.targets.len()});
        let mut raw = self.target().await?;
        let made = async || raw.api("STREAM.CREATE.PROBE", probe.clone()).await.is_ok();
        wait_for("the target to take a stream", LIMIT, made).await?;
        self.target().await?.api("STREAM.DELETE.PROBE", Value::Null).await?;
        Ok(())
    }
}

async fn count(raw: &mut Raw, stream: &str) -> u64 {
    let state = raw.stream_state(stream).await.unwrap_or_default();
    state["messages"].as_u64().unwrap_or(0)
}

fn subject(index: usize, i: u64) -> String {
    format!("bench{index}.n{}.example", i % 1000)
}
