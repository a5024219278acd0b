//! One stream under steady load and its copies to all kinds of targets at once, each side a cluster or a single
//! server behind proxies: what tests of faults begin with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::checker::{Expect, compare};
use super::client::{connect, request, status, wait_for, wait_value};
use super::raw::header_values;
use super::site::{Events, SITE, merged};
use super::{Cluster, LIMIT, Role, Server, Service};

/// After a fault is over, the copy continues by itself within this time.
pub const GOES_ON: Duration = Duration::from_secs(10);

/// The source stream.
pub const SOURCE: &str = "LOAD";

/// Messages that are published at once, and how often.
const BURST: u64 = 5;
const PAUSE: Duration = Duration::from_millis(10);
/// A publisher whose server is down looks for it this often.
const RECONNECT: Duration = Duration::from_millis(100);

/// What a target stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No other writer, and fast-ingest where the server knows it.
    Exclusive,
    /// The same, with another writer all the time.
    Shared,
    /// It takes no fast-ingest.
    Plain,
}

pub const KINDS: [Kind; 3] = [Kind::Exclusive, Kind::Shared, Kind::Plain];

impl Kind {
    /// Its stream.
    pub fn stream(self) -> &'static str {
        match self {
            Kind::Exclusive => "EXCLUSIVE",
            Kind::Shared => "SHARED",
            Kind::Plain => "PLAIN",
        }
    }

    fn prefix(self) -> String {
        self.stream().to_lowercase()
    }

    /// Its replication.
    pub fn id(self) -> String {
        format!("{SOURCE}.{}", self.prefix())
    }
}

/// All of it; ends when dropped.
pub struct Copies {
    pub source: Cluster,
    pub target: Cluster,
    pub service: Service,
    pub client: async_nats::Client,
    pub events: Events,
    /// Which copies there are.
    pub kinds: Vec<Kind>,
    control: Server,
    load: Load,
    foreign: Load,
}

impl Copies {
    /// Copies of each of `kinds`, begun and running under load.
    pub async fn start(source: Cluster, target: Cluster, kinds: &[Kind], fields: Value) -> Result<Self> {
        let control = Server::start(Role::Control).await?;
        let client = connect(&control.url()).await?;
        let events = Events::of(&client, "replicator.event.>").await?;
        let service = Service::builder(&control.url(), SITE).args(["--instance", "one"]).start().await?;
        source.create_stream(SOURCE, json!({"subjects": ["load.>"]})).await?;
        let batched = target.servers[0].at_least(2, 14);
        for kind in kinds {
            let mut config = json!({"subjects": [format!("{}.>", kind.prefix())]});
            if batched && *kind != Kind::Plain {
                config["allow_batched"] = true.into();
            }
            target.create_stream(kind.stream(), config).await?;
        }
        let load = Load::start(&source, "load.", BURST, PAUSE).await?;
        let foreign = match kinds.contains(&Kind::Shared) {
            true => Load::start(&target, "shared.foreign.", 1, 2 * PAUSE).await?,
            false => Load::none(),
        };
        let kinds = kinds.to_vec();
        let copies = Self { source, target, service, client, events, kinds, control, load, foreign };
        for kind in &copies.kinds {
            let document = json!({"stream": SOURCE, "name": kind.prefix(), "target_stream": kind.stream(),
                "target_subject_prefix": kind.prefix(), "source_url": copies.source.proxied_url(),
                "target_url": copies.target.proxied_url()});
            request(&copies.client, "replicator.config.add", merged(document, fields.clone())).await?;
        }
        copies.wait_moving("the start", Instant::now(), LIMIT).await?;
        copies.expect_modes(batched).await?;
        Ok(copies)
    }

    /// The copies are what they are meant to be.
    async fn expect_modes(&self, batched: bool) -> Result<()> {
        for kind in &self.kinds {
            let fast = batched && *kind != Kind::Plain;
            let transport = if fast { "fast_ingest" } else { "pipelined" };
            // Without the chain nothing tells that others write.
            let shared = fast && *kind == Kind::Shared;
            let right = async || {
                let row = self.row(*kind).await;
                row["transport"] == transport && (!shared || row["target_mode"] == "shared")
            };
            wait_for(&format!("{kind:?} to be a {transport} copy"), LIMIT, right).await?;
        }
        Ok(())
    }

    /// The status row of a copy.
    pub async fn row(&self, kind: Kind) -> Value {
        status(&self.client, &kind.id()).await.unwrap_or_default()
    }

    /// The streams at the target.
    pub fn targets(&self) -> Vec<&'static str> {
        self.kinds.iter().map(|kind| kind.stream()).collect()
    }

    /// All streams of both sides have a leader that answers: the end of a fault of servers.
    pub async fn wait_leaders(&self) -> Result<()> {
        self.source.wait_leaders(&[SOURCE], None).await?;
        self.target.wait_leaders(&self.targets(), None).await
    }

    /// All replicas of all streams have everything: the next server may go.
    pub async fn wait_current(&self) -> Result<()> {
        self.source.wait_current(&[SOURCE]).await?;
        self.target.wait_current(&self.targets()).await
    }

    /// The fault ended now: every copy continues within [`GOES_ON`].
    pub async fn go_on(&self, after: &str) -> Result<()> {
        self.wait_moving(after, Instant::now(), GOES_ON).await
    }

    /// Waits until something that was published after `end` has been copied, by each copy.
    pub async fn wait_moving(&self, after: &str, end: Instant, limit: Duration) -> Result<()> {
        let last = async || Some(self.source_last().await?);
        let last = wait_value("the source to answer", limit, last).await?;
        let mut waiting = self.kinds.clone();
        while !waiting.is_empty() {
            for kind in std::mem::take(&mut waiting) {
                let copied = self.copied(kind).await > last;
                let elapsed = end.elapsed();
                if elapsed > limit {
                    let row = self.row(kind).await;
                    bail!("{after}: {kind:?} does not continue within {limit:?}: {row}\n{}", self.service.log());
                }
                if copied {
                    println!("{after}: {kind:?} continues {:.2} s after the end", elapsed.as_secs_f64());
                } else {
                    waiting.push(kind);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The last sequence of the source, if it answers.
    pub async fn source_last(&self) -> Option<u64> {
        let info = self.source.ask(&format!("STREAM.INFO.{SOURCE}"), &Value::Null).await?;
        info["state"]["last_seq"].as_u64()
    }

    /// Source sequence of the newest message of a copy; 0 while nothing answers.
    pub async fn copied(&self, kind: Kind) -> u64 {
        let body = json!({"last_by_subj": format!("{}.load.>", kind.prefix())});
        let found = self.target.ask(&format!("STREAM.MSG.GET.{}", kind.stream()), &body).await;
        found.and_then(|found| provenance(&found["message"])).unwrap_or_default()
    }

    /// Ends the load and holds every copy against the source.
    pub async fn verify(&mut self) -> Result<()> {
        self.load.stop().await;
        self.foreign.stop().await;
        self.source.wait_leaders(&[SOURCE], None).await?;
        // What the client had still in its buffer is there now or never.
        let mut last = 0;
        wait_for("the load to end", LIMIT, async || {
            let before = std::mem::replace(&mut last, self.source_last().await.unwrap_or_default());
            tokio::time::sleep(10 * PAUSE).await;
            last > 0 && before == last
        })
        .await?;
        for kind in &self.kinds {
            let settled = async || {
                let row = self.row(*kind).await;
                row["state"] == "running" && row["position"]["source_seq"] == last && row["lag"]["messages"] == 0
            };
            let what = format!("{kind:?} to settle {last}");
            let settled = wait_for(&what, 2 * LIMIT, settled).await;
            if settled.is_err() {
                let row = self.row(*kind).await;
                settled.with_context(|| format!("the row is {row}\n{}", self.service.log()))?;
            }
        }
        let from = self.source.read_stream(SOURCE).await?;
        println!("{} messages", from.len());
        for kind in &self.kinds {
            let prefix = kind.prefix();
            let mapped = |subject: &str| format!("{prefix}.{subject}");
            let expect = Expect::copy_of(SOURCE).site(SITE).mapped(mapped);
            let expect = if *kind == Kind::Shared { expect.shared() } else { expect };
            let pipelined = *kind == Kind::Plain || !self.target.servers[0].at_least(2, 14);
            let expect = if pipelined { expect.late_allowed() } else { expect };
            let report = compare(&from, &self.target.read_stream(kind.stream()).await?, &expect);
            report.verify().with_context(|| format!("{kind:?}\n{}", self.service.log()))?;
        }
        Ok(())
    }
}

fn provenance(message: &Value) -> Option<u64> {
    let header = STANDARD.decode(message["hdrs"].as_str()?).ok()?;
    header_values(&header, "Choria-SR-Source").pop()?.split(' ').nth(1)?.parse().ok()
}

/// Publishes all the time, past the proxies, through each server on its own: some of them may be down or frozen.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    fn none() -> Self {
        Self { stop: Arc::default(), tasks: Vec::new() }
    }

    /// Subjects are `<prefix><n>`.
    async fn start(to: &Cluster, prefix: &'static str, burst: u64, pause: Duration) -> Result<Self> {
        let mut load = Self::none();
        for server in &to.servers {
            let options = async_nats::ConnectOptions::new().reconnect_delay_callback(|_| RECONNECT);
            let client = options.connect(server.url()).await?;
            let stopped = load.stop.clone();
            let pause = pause * to.servers.len() as u32;
            load.tasks.push(tokio::spawn(async move {
                let mut next = 0u64;
                while !stopped.load(Ordering::SeqCst) {
                    for _ in 0..burst {
                        let payload = format!("{next:0>200}").into();
                        // Nobody waits for it: what the servers took is what counts.
                        let published = client.publish(format!("{prefix}{}", next % 7), payload);
                        let _ = tokio::time::timeout(LIMIT, published).await;
                        next += 1;
                    }
                    tokio::time::sleep(pause).await;
                }
                let _ = tokio::time::timeout(LIMIT, client.flush()).await;
            }));
        }
        Ok(load)
    }

    async fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks.drain(..) {
            let _ = task.await;
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
