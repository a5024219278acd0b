//! The two servers that all ways are measured on.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::harness::server::free_port;
use crate::harness::{Outgoing, Raw, Role, Server, wait_for};

/// Stream at the source.
pub(crate) const SOURCE: &str = "BENCH";
/// Stream at the target.
pub(crate) const TARGET: &str = "COPY";
/// What the subjects of copies that are published at the target begin with. The source's stream is interested in the
/// subjects of the originals, and its interest reaches the target over the leafnode that only the native source
/// needs: with the same subjects every copy would be matched against that leafnode too.
pub(crate) const PREFIX: &str = "copy";
/// JetStream domain of the source, by which the target's native source reaches it.
pub(crate) const DOMAIN: &str = "factory";

const LIMIT: Duration = Duration::from_secs(120);

/// A source with messages, and a target that is a leaf of it.
pub(crate) struct Pair {
    pub(crate) source: Server,
    pub(crate) target: Server,
    pub(crate) messages: u64,
}

impl Pair {
    pub(crate) async fn start() -> Result<Self> {
        let port = free_port()?;
        let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
        let source = Server::builder(Role::Source).domain(DOMAIN).config(&listen).start().await?;
        let remote = format!("leafnodes {{ remotes: [{{ url: \"nats-leaf://127.0.0.1:{port}\" }}] }}");
        let target = Server::builder(Role::Target).domain("headquarters").config(&remote).start().await?;
        let pair = Self { source, target, messages: 0 };
        pair.wait_leafnode().await?;
        Ok(pair)
    }

    /// Fills the source with `messages` of `payload` bytes, instead of what was there.
    pub(crate) async fn preload(&mut self, payload: usize, messages: u64) -> Result<()> {
        let mut raw = Raw::connect(&self.source.url()).await?;
        if self.messages > 0 {
            raw.api(&format!("STREAM.DELETE.{SOURCE}"), Value::Null).await?;
        }
        raw.create_stream(SOURCE, json!({"subjects": ["bench.>"]})).await?;
        let body = vec![b'x'; payload];
        let last = raw.publish_all((0..messages).map(|i| Outgoing::new(subject(i), body.clone()))).await?;
        ensure!(last == messages, "the source holds {last} of {messages} messages");
        self.messages = messages;
        Ok(())
    }

    /// Waits until the target's stream holds everything, and looks that it is not more.
    pub(crate) async fn wait_copied(&self, messages: u64) -> Result<()> {
        let mut raw = Raw::connect(&self.target.url()).await?;
        let what = format!("{messages} messages at the target");
        wait_for(&what, LIMIT, async || count(&mut raw).await >= messages).await?;
        let found = count(&mut raw).await;
        ensure!(found == messages, "the target holds {found} messages instead of {messages}");
        Ok(())
    }

    /// Messages at the target now.
    pub(crate) async fn copied(&self) -> Result<u64> {
        Ok(count(&mut Raw::connect(&self.target.url()).await?).await)
    }

    pub(crate) async fn delete_target(&self) -> Result<()> {
        let mut raw = Raw::connect(&self.target.url()).await?;
        raw.api(&format!("STREAM.DELETE.{TARGET}"), Value::Null).await?;
        Ok(())
    }

    /// CPU seconds of source and target server so far.
    pub(crate) fn cpu(&self) -> (f64, f64) {
        (self.source.usage().cpu_seconds, self.target.usage().cpu_seconds)
    }

    async fn wait_leafnode(&self) -> Result<()> {
        let mut raw = Raw::connect(&self.target.url()).await?.with_api(&format!("$JS.{DOMAIN}.API"));
        wait_for("the leafnode", LIMIT, async || raw.api("INFO", Value::Null).await.is_ok()).await
    }
}

async fn count(raw: &mut Raw) -> u64 {
    let state = raw.stream_state(TARGET).await.unwrap_or_default();
    state["messages"].as_u64().unwrap_or(0)
}

fn subject(i: u64) -> String {
    format!("bench.n{}.example", i % 1000)
}
