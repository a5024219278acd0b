//! The whole on real processes: three instances run twenty replications between two clusters of three servers, with
//! publishers on every stream, while everything fails that can. A plan drawn from a seed kills, freezes, stops and cuts off
//! instances and servers, takes a server's disk away, and restarts everything one by one in the end. Then each copy has to be
//! complete, once and in order, and what the instances had confirmed must not interleave.

mod acks;
mod load;
mod plan;
mod storm;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tempfile::TempDir;

use self::{
    acks::Acks,
    load::{Confirmed, Load, kept, remembered},
    plan::{Plan, THREE},
    storm::{Instances, Paths, Servers},
};
use crate::harness::checker::{Faults, compare};
use crate::harness::site::merged;
use crate::harness::{Cluster, Expect, LIMIT, Proxy, Role, SITE, Server, Service, request, wait_for};

const NAMES: [&str; THREE] = ["one", "two", "three"];
/// Everything has caught up this long after the last fault is over.
const CATCH_UP: Duration = Duration::from_secs(60);
const LOG: &str = "info,stream_replicator=debug,stream_replicator::settled=trace,async_nats=off";

/// What the source keeps, and what kind of copy it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Fast-ingest by the chain.
    Exclusive,
    /// The target takes no batches.
    Pipelined,
    /// The same, one message in flight.
    Strict,
    /// Another replication writes to the target too, and a foreigner.
    Shared,
    /// The same without batches.
    SharedPipelined,
    /// By the chain, from a source that forgets what was acknowledged.
    Interest,
    WorkQueue,
}

/// Source stream, which is the replication's id too, and target stream.
const COPIES: [(&str, &str, Kind); 20] = [
    ("E1", "E1", Kind::Exclusive),
    ("E2", "E2", Kind::Exclusive),
    ("E3", "E3", Kind::Exclusive),
    ("E4", "E4", Kind::Exclusive),
    ("E5", "E5", Kind::Exclusive),
    ("E6", "E6", Kind::Exclusive),
    ("E7", "E7", Kind::Exclusive),
    ("P1", "P1", Kind::Pipelined),
    ("P2", "P2", Kind::Pipelined),
    ("O1", "O1", Kind::Strict),
    ("S1", "SHARED1", Kind::Shared),
    ("S2", "SHARED1", Kind::Shared),
    ("S3", "SHARED2", Kind::Shared),
    ("S4", "SHARED2", Kind::Shared),
    ("M1", "MIXED", Kind::SharedPipelined),
    ("M2", "MIXED", Kind::SharedPipelined),
    ("I1", "I1", Kind::Interest),
    ("I2", "I2", Kind::Interest),
    ("I3", "I3", Kind::Interest),
    ("W1", "W1", Kind::WorkQueue),
];

impl Kind {
    fn is_shared(self) -> bool {
        matches!(self, Kind::Shared | Kind::SharedPipelined)
    }

    fn batched(self) -> bool {
        !matches!(self, Kind::Pipelined | Kind::Strict | Kind::SharedPipelined)
    }

    /// Whether a refusal may put a message after later ones.
    fn is_relaxed(self) -> bool {
        matches!(self, Kind::Pipelined | Kind::SharedPipelined)
    }

    /// Whether the source forgets what was acknowledged.
    fn forgets(self) -> bool {
        matches!(self, Kind::Interest | Kind::WorkQueue)
    }

    fn source(self) -> Value {
        match self {
            Kind::Interest => json!({"retention": "interest"}),
            Kind::WorkQueue => json!({"retention": "workqueue"}),
            _ => json!({}),
        }
    }

    fn document(self) -> Value {
        if self == Kind::Strict { json!({"ordering": "strict"}) } else { json!({}) }
    }
}

/// Names of the target streams, each once, with their kinds.
fn targets() -> Vec<(&'static str, Kind)> {
    let mut targets: Vec<_> = COPIES.iter().map(|(_, target, kind)| (*target, *kind)).collect();
    targets.dedup_by_key(|(target, _)| *target);
    targets
}

struct World {
    source: Cluster,
    target: Cluster,
    services: Vec<Service>,
    paths: Vec<Paths>,
    client: async_nats::Client,
    /// The contexts of each instance.
    _homes: Vec<TempDir>,
}

impl World {
    async fn start() -> Result<Self> {
        let (source, target) = tokio::try_join!(Cluster::start(Role::Source), Cluster::start(Role::Target))?;
        try_join_all(COPIES.iter().map(|(stream, _, kind)| {
            let config = json!({"subjects": [format!("{}.>", stream.to_lowercase())]});
            source.create_stream(stream, merged(config, kind.source()))
        }))
        .await?;
        try_join_all(targets().into_iter().map(|(target_stream, kind)| {
            let sources = COPIES.iter().filter(|(_, to, _)| *to == target_stream);
            let mut subjects: Vec<_> = sources.map(|(stream, ..)| format!("{}.>", stream.to_lowercase())).collect();
            subjects.push(format!("{}.>", foreign(target_stream)));
            target.create_stream(target_stream, json!({"subjects": subjects, "allow_batched": kind.batched()}))
        }))
        .await?;
        let addresses = source.servers.iter().map(|server| server.url().parse::<async_nats::ServerAddr>());
        let addresses: Vec<_> = addresses.collect::<Result<_, _>>()?;
        // A server may freeze.
        let options = async_nats::ConnectOptions::new().ping_interval(Duration::from_millis(500));
        let client = options.connect(addresses).await?;
        let mut world = Self { source, target, services: Vec::new(), paths: Vec::new(), client, _homes: Vec::new() };
        for name in NAMES {
            world.start_instance(name).await?;
        }
        for (stream, to, kind) in COPIES {
            let document = json!({"stream": stream, "target_stream": to, "source_context": "source",
                "target_context": "target"});
            request(&world.client, "replicator.config.add", merged(document, kind.document())).await?;
        }
        Ok(world)
    }

    async fn start_instance(&mut self, name: &str) -> Result<()> {
        let ways =
            async |cluster: &Cluster| try_join_all(cluster.servers.iter().map(Server::port).map(Proxy::start)).await;
        let (control, source) = (ways(&self.source).await?, ways(&self.source).await?);
        let paths = Paths { control, source, target: ways(&self.target).await? };
        let home = tempfile::tempdir()?;
        let folder = home.path().join("nats/context");
        fs::create_dir_all(&folder)?;
        for (context, proxies) in [("source", &paths.source), ("target", &paths.target)] {
            fs::write(folder.join(format!("{context}.json")), json!({"url": urls(proxies)}).to_string())?;
        }
        let service = Service::builder(&urls(&paths.control), SITE)
            .instance(name)
            .args(["--lease-ttl", "3s", "--bucket-replicas", "3", "--log-level", LOG])
            .env("XDG_CONFIG_HOME", &home.path().display().to_string());
        self.services.push(service.start().await?);
        self.paths.push(paths);
        self._homes.push(home);
        Ok(())
    }

    /// Publishers on every stream of the source, and strangers at the shared targets.
    fn load(&self, seed: u64) -> (Load, Load) {
        let (mut load, mut strangers) = (Load::new(), Load::new());
        let urls = |cluster: &Cluster| cluster.servers.iter().map(Server::url).collect::<Vec<_>>();
        for (stream, ..) in COPIES {
            load.publish(stream, urls(&self.source), seed);
        }
        for (target, _) in targets().into_iter().filter(|(_, kind)| kind.is_shared()) {
            strangers.publish(&foreign(target), urls(&self.target), seed);
        }
        (load, strangers)
    }

    async fn weather(&mut self, plan: &Plan) -> Result<Outcome> {
        let running = async || self.behind(&HashMap::new()).await.is_empty();
        wait_for("all to run", CATCH_UP, running).await?;
        let (mut load, mut strangers) = self.load(plan.seed);
        let (source_streams, target_streams) = (names(&self.source).await?, names(&self.target).await?);
        let Self { source, target, services, paths, client, .. } = self;
        let ways = |of: fn(&Paths) -> Vec<&Vec<Proxy>>| {
            std::array::from_fn(|server| paths.iter().flat_map(of).map(|proxies| &proxies[server]).collect())
        };
        let instances =
            Instances { services, paths, client, replications: COPIES.map(|(id, ..)| id.to_owned()).to_vec() };
        let from = Servers {
            name: "source",
            cluster: source,
            streams: source_streams,
            ways: ways(|paths| vec![&paths.control, &paths.source]),
        };
        let to = Servers {
            name: "target",
            cluster: target,
            streams: target_streams,
            ways: ways(|paths| vec![&paths.target]),
        };
        let begun = Instant::now();
        storm::rage(plan, instances, from, to).await?;
        let stormy = begun.elapsed();
        let over = Instant::now();
        let confirmed = load.stop().await?;
        strangers.stop().await?;
        self.caught_up(&confirmed).await?;
        let caught_up = over.elapsed();
        let (acks, forgotten) = self.judge(&confirmed, plan).await?;
        let messages = confirmed.values().map(Confirmed::len).sum();
        Ok(Outcome { faults: plan.faults(), messages, forgotten, acks, stormy, caught_up })
    }

    /// What is not where it should be.
    async fn behind(&self, confirmed: &HashMap<String, Confirmed>) -> Vec<String> {
        let reply = request(&self.client, "replicator.status", Value::Null).await.unwrap_or_default();
        let rows = reply["replications"].as_array().cloned().unwrap_or_default();
        let mut behind = Vec::new();
        for (id, ..) in COPIES {
            let row = rows.iter().find(|row| row["replication"] == id).cloned().unwrap_or_default();
            let last = confirmed.get(id).and_then(|confirmed| confirmed.keys().last().copied());
            let at = row["position"]["source_seq"].as_u64();
            if row["state"] != "running" || at < last || row["lag"]["messages"] != 0 {
                behind.push(format!("{id} should be at {last:?}: {row}"));
            }
        }
        behind
    }

    async fn caught_up(&self, confirmed: &HashMap<String, Confirmed>) -> Result<()> {
        let mut behind = Vec::new();
        let all = wait_for("everything to catch up", CATCH_UP, async || {
            behind = self.behind(confirmed).await;
            behind.is_empty()
        });
        all.await.with_context(|| behind.join("\n"))?;
        for (stream, ..) in COPIES.iter().filter(|(_, _, kind)| kind.forgets()) {
            let last = confirmed[*stream].keys().last().copied();
            // What is acknowledged a server may keep for longer, after a restart.
            let acknowledged = async || {
                let info = self.source.ask(&format!("CONSUMER.INFO.{stream}.SR_{SITE}"), &Value::Null).await;
                info.is_some_and(|info| info["ack_floor"]["stream_seq"].as_u64() >= last)
            };
            wait_for(&format!("all messages of `{stream}` to be acknowledged"), LIMIT, acknowledged).await?;
        }
        Ok(())
    }

    /// Each message once, in order, as it was; and the logs.
    async fn judge(&self, confirmed: &HashMap<String, Confirmed>, plan: &Plan) -> Result<(Acks, usize)> {
        let (mut acks, mut forgotten) = (Acks::default(), 0);
        for (service, name) in self.services.iter().zip(NAMES) {
            let log = service.logs();
            acks.read(name, &log)?;
            let told = |line: &&str| line.contains(" found ") && LOSSES.iter().any(|loss| line.contains(loss));
            ensure!(!log.lines().any(|line| told(&line)), "{name}: {:?}", log.lines().find(told));
        }
        for (stream, to, kind) in COPIES {
            let copies = self.target.read_stream(to).await?;
            let confirmed = &confirmed[stream];
            let source = if kind.forgets() {
                remembered(confirmed, &copies)
            } else {
                let source = self.source.read_stream(stream).await?;
                kept(confirmed, &source).with_context(|| format!("source stream `{stream}`"))?;
                source
            };
            let expect = Expect::copy_of(stream).site(SITE);
            let expect = if kind.is_shared() { expect.shared() } else { expect };
            let expect = if kind.is_relaxed() { expect.late_allowed() } else { expect };
            let mut report = compare(&source, &copies, &expect);
            if kind == Kind::Interest && plan.source_loses_a_disk() {
                // A server that starts empty keeps nothing of what comes before it knows of the consumer, as if nobody had an
                // interest in it (2.15). When it leads the consumer later, it passes over that, and it is gone.
                forgotten += report.lost.count;
                report.lost = Faults::default();
            }
            report.verify().with_context(|| stream)?;
            let (last, end) = (acks.last(stream), copies.last().map_or(0, |copy| copy.seq));
            ensure!(0 < last && last <= end, "{stream}: the last ack was for {last}, the target ends at {end}");
        }
        acks.verify()?;
        Ok((acks, forgotten))
    }

    /// Everything that was written, for whoever looks for the cause.
    fn keep_logs(&self, seed: u64) -> Result<PathBuf> {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("chaos-{seed}"));
        fs::create_dir_all(&folder)?;
        for (service, name) in self.services.iter().zip(NAMES) {
            fs::write(folder.join(format!("{name}.log")), service.logs())?;
        }
        for server in self.source.servers.iter().chain(&self.target.servers) {
            fs::write(folder.join(format!("{}.log", server.name())), server.log())?;
        }
        Ok(folder)
    }
}

/// Events without a cause: nothing was removed, rolled back or recreated.
const LOSSES: [&str; 3] = ["event=Gap", "event=SourceReset", "event=TargetReset"];

struct Outcome {
    faults: usize,
    messages: usize,
    /// Messages that a server of the source never had, though the cluster confirmed them.
    forgotten: usize,
    acks: Acks,
    stormy: Duration,
    caught_up: Duration,
}

fn foreign(target: &str) -> String {
    format!("foreign-{}", target.to_lowercase())
}

fn urls(proxies: &[Proxy]) -> String {
    proxies.iter().map(Proxy::url).collect::<Vec<_>>().join(",")
}

/// All streams of a cluster, those of the buckets too.
async fn names(cluster: &Cluster) -> Result<Vec<String>> {
    let reply = cluster.ask("STREAM.NAMES", &json!({})).await.context("the names of streams")?;
    Ok(serde_json::from_value(reply["streams"].clone())?)
}

async fn chaos(seed: u64, seconds: u64) -> Result<()> {
    let begun = Instant::now();
    let plan = Plan::draw(seed, Duration::from_secs(seconds));
    println!("{plan}");
    let mut world = World::start().await?;
    println!("started after {:.1?}", begun.elapsed());
    let outcome = match world.weather(&plan).await {
        Ok(outcome) => outcome,
        Err(error) => {
            let folder = world.keep_logs(seed)?;
            let again = format!("make chaos SEED={seed} SECONDS={seconds}");
            return Err(error.context(format!("seed {seed}: again with `{again}`; logs are in {}", folder.display())));
        }
    };
    let Outcome { faults, messages, forgotten, acks, stormy, caught_up } = outcome;
    println!(
        "seed {seed}: {faults} faults and a restart of everything in {stormy:.1?}; {messages} messages, {forgotten} forgotten \
         by the source; {} takeovers, {} \
         epochs, {} lines of acks; caught up after {caught_up:.1?}; {:.1?} in all",
        acks.takeovers(),
        acks.epochs(),
        acks.lines,
        begun.elapsed()
    );
    ensure!(acks.takeovers() > 0, "nothing was taken over");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_replications_survive_a_short_storm() -> Result<()> {
    chaos(14, 25).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make chaos"]
async fn twenty_replications_survive_a_long_storm() -> Result<()> {
    let number = |name: &str| env::var(name).ok().filter(|value| !value.is_empty()).map(|value| value.parse());
    let seed = number("SEED").transpose().context("SEED is no number")?;
    let seconds = number("CHAOS_SECONDS").transpose().context("SECONDS is no number")?;
    chaos(seed.unwrap_or_else(|| rand::random_range(0..1_000_000)), seconds.unwrap_or(120)).await
}
