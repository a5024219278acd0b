//! One simulated run: sets the scene, lets the plan happen, and holds the result against the guarantees.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::{Value, json};
use stream_replicator::{
    config,
    copy::{self, Budget, ErrorKind, Job, Ledger},
    events::Events,
    status::{CopyStatus, Row, State},
    store::PositionStore,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    keys::{self, Keys},
    plan::{Fault, Plan, STORMY, Side},
    server::{Network, Server},
    stream::{Stream, value},
    world::World,
};

const ID: &str = "S";
/// After the last fault everything has to be at the target within this time.
const CALM: Duration = Duration::from_secs(600);

/// A source message: which stream it was in (made anew, its sequences come again), and where.
type Origin = (u64, i64);

struct Scene {
    world: World,
    plan: Plan,
    source: Arc<Server>,
    target: Arc<Server>,
    keys: Arc<Keys>,
    broken: Arc<Mutex<Vec<String>>>,
    told: Arc<Mutex<Vec<Value>>>,
    events: Events,
    purged_behind_start: AtomicBool,
}

/// Runs one seed; the error says what was violated.
pub fn run(seed: u64) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let result = runtime.expect("a runtime").block_on(async {
        let world = World::new(seed);
        let plan = Plan::draw(&world);
        let scene = Scene::set(world, plan.clone());
        scene.play().await.map_err(|error| format!("{error}\n{plan:#?}"))
    });
    result.map_err(|error| format!("seed {seed}: {error}"))
}

impl Scene {
    fn set(world: World, plan: Plan) -> Arc<Self> {
        let (source, target) = (Server::start(&world, "source"), Server::start(&world, "target"));
        source.make(Stream::new("S", true, world.now_ns()));
        target.make(Stream::new("T", plan.batched, world.now_ns()));
        let broken = Arc::new(Mutex::new(Vec::new()));
        let witness = {
            let (broken, source, target, epochs) = (broken.clone(), source.clone(), target.clone(), Mutex::new(0));
            // What lost data is allowed to be missing until it is found out.
            let lossless = !plan.has(loses);
            Box::new(move |record: &[u8]| {
                let record: Value = serde_json::from_slice(record).expect("a record");
                let mut newest = epochs.lock().expect("epochs");
                let epoch = record["epoch"].as_u64().expect("an epoch");
                if epoch < *newest {
                    broken.lock().expect("broken").push(format!("epoch {epoch} saved behind epoch {newest}"));
                }
                *newest = epoch.max(*newest);
                if lossless && let Some(missing) = missing(&source, &target, record["source"]["seq"].as_u64()) {
                    broken.lock().expect("broken").push(format!("saved before it settled: {missing:?} of {record}"));
                }
            })
        };
        let keys = Keys::new(world.clone(), witness);
        let (sink, mut events) = mpsc::unbounded_channel::<(String, Vec<u8>)>();
        let told = Arc::new(Mutex::new(Vec::new()));
        let into = told.clone();
        tokio::spawn(async move {
            while let Some((_, body)) = events.recv().await {
                into.lock().expect("events").push(serde_json::from_slice(&body).expect("an event"));
            }
        });
        let events = Events::to(sink, "replicator", "SITE", "one");
        Arc::new(Self {
            world,
            plan,
            source,
            target,
            keys,
            broken,
            told,
            events,
            purged_behind_start: AtomicBool::new(false),
        })
    }

    async fn play(self: Arc<Self>) -> Result<(), String> {
        let publisher = tokio::spawn(self.clone().publish());
        let status = Arc::new(watch::Sender::new((State::Starting, CopyStatus::default())));
        let mut process = self.process("one", status.clone());
        let second = self.plan.second.map(|at| {
            let (scene, status) =
                (self.clone(), Arc::new(watch::Sender::new((State::Starting, CopyStatus::default()))));
            tokio::spawn(async move {
                sleep(at).await;
                scene.clone().live("two", status).await;
            })
        });
        let mut saved = Vec::new();
        for (at, fault) in self.plan.faults.clone() {
            sleep_until(Instant::now() + at.saturating_sub(self.world.elapsed())).await;
            saved.extend(self.keys.value(ID));
            if let Fault::Crash(time) = fault {
                process.abort();
                let _ = process.await;
                sleep(time).await;
                process = self.process("one", status.clone());
            } else if fault == Fault::PutBack {
                process.abort();
                let _ = process.await;
                if let Some(old) = saved.first() {
                    self.put_back(old.clone());
                }
                process = self.process("one", status.clone());
            } else {
                self.happen(fault).await;
            }
        }
        publisher.await.expect("the publisher");
        sleep_until(Instant::now() + STORMY.saturating_sub(self.world.elapsed())).await;
        self.calm();
        // Of two, the one that lost its replication stays away until it is started again.
        if let Some(second) = second {
            second.abort();
            process.abort();
            let _ = tokio::join!(second, process);
            process = self.process("one", status.clone());
        }
        let result = self.wait_until_right().await;
        tracing::debug!(ended = process.is_finished(), status = ?*status.borrow(), "over");
        process.abort();
        let _ = process.await;
        result
    }

    fn process(
        self: &Arc<Self>,
        instance: &'static str,
        status: Arc<watch::Sender<(State, CopyStatus)>>,
    ) -> JoinHandle<()> {
        tokio::spawn(self.clone().live(instance, status))
    }

    /// What the supervisor does with one replication: claim, run, back off.
    async fn live(self: Arc<Self>, instance: &'static str, status: Arc<watch::Sender<(State, CopyStatus)>>) {
        let document = json!({
            "stream": "S", "target_stream": "T", "source_url": "source", "target_url": "target",
            "target_subject_prefix": "t",
            "limits": {"messages_in_flight": self.plan.in_flight, "bytes_in_flight": 65536},
        });
        let replication = config::parse_value(&document, "SITE").expect("a document");
        let row = Row {
            replication: ID.to_owned(),
            state: State::Starting,
            origin: "kv".to_owned(),
            leader: Some(instance.to_owned()),
            epoch: 0,
            config_revision: 1,
            copy: CopyStatus::default(),
        };
        let job = Job {
            site: "SITE".to_owned(),
            replication,
            row,
            budget: Budget::new(1 << 20),
            skip: None,
            neighbour: None,
            dial: Arc::new(Network(vec![self.source.clone(), self.target.clone()])),
        };
        let store = PositionStore::new(Arc::new(keys::Handle(self.keys.clone())));
        loop {
            let Ok(claim) = store.claim(ID, instance).await else {
                sleep(self.world.millis(50, 1_000)).await;
                continue;
            };
            let mut ledger = Ledger::new(store.clone(), ID, claim);
            loop {
                let stop = CancellationToken::new();
                let result = copy::run(&job, &mut ledger, &status, &self.events, stop).await;
                tracing::debug!(at = ?self.world.elapsed(), instance, ?result, "a run ended");
                match result {
                    Err(error) if error.kind == ErrorKind::Superseded => {
                        return self.tell(instance, &format!("stopped for good: {error}"));
                    }
                    Err(error) if error.kind == ErrorKind::Hold => {
                        self.tell(instance, &format!("held: {error}"));
                        sleep(self.world.millis(5_000, 10_000)).await;
                    }
                    _ => sleep(self.world.millis(50, 1_000)).await,
                }
            }
        }
    }

    /// Notes what happened, for the report of a seed that fails.
    fn tell(&self, instance: &str, what: &str) {
        let told = json!({"at": format!("{:?}", self.world.elapsed()), "instance": instance, "what": what});
        self.told.lock().expect("events").push(told);
    }

    async fn publish(self: Arc<Self>) {
        let mut number = 0;
        for (at, messages) in &self.plan.bursts {
            sleep_until(Instant::now() + at.saturating_sub(self.world.elapsed())).await;
            for _ in 0..*messages {
                number += 1;
                let payload = number.to_string().into_bytes();
                // No two at the same time.
                let now_ns = self.world.now_ns() + number;
                self.source.with("S", |stream| {
                    stream.publish(&format!("s.{}", number % 3), b"", &payload, now_ns).expect("a source takes all")
                });
                if self.world.once_in(20) {
                    sleep(self.world.millis(0, 50)).await;
                }
            }
        }
    }

    async fn happen(&self, fault: Fault) {
        let server = |side| match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        };
        let now_ns = self.world.now_ns();
        match fault {
            Fault::Cut(side) => server(side).cut(),
            Fault::Freeze(side, time) => server(side).freeze(time),
            Fault::Leaderless(side, time) => server(side).leaderless(time),
            Fault::Restart(side, time) => {
                server(side).kill();
                sleep(time).await;
                server(side).revive();
            }
            Fault::Trouble(time) => {
                self.keys.trouble(true);
                sleep(time).await;
                self.keys.trouble(false);
            }
            Fault::Foreign(count) => {
                for _ in 0..count {
                    if self.target.has("T") {
                        self.target.with("T", |stream| _ = stream.publish("t.foreign", b"", b"foreign", now_ns));
                    }
                    if self.world.once_in(3) {
                        sleep(self.world.millis(0, 200)).await;
                    }
                }
            }
            Fault::TargetForgets(count) => {
                self.target.kill();
                self.target.with("T", |stream| stream.lose_end(count));
                self.target.revive();
            }
            Fault::TargetDeleted => {
                self.target.cut();
                self.target.make(Stream::new("T", self.plan.batched, now_ns));
            }
            Fault::SourceForgets(count) => {
                self.source.kill();
                self.source.with("S", |stream| stream.lose_end(count));
                self.source.revive();
            }
            Fault::SourceAnew => {
                self.source.cut();
                self.source.make(Stream::new("S", true, now_ns));
            }
            Fault::Purge(count) => {
                let record = self.keys.value(ID).and_then(|record| serde_json::from_slice::<Value>(&record).ok());
                let started = record.is_some_and(|record| !record["source"].is_null());
                self.purged_behind_start.store(started, Ordering::Relaxed);
                self.source.with("S", |stream| stream.purge_below(stream.first + count));
            }
            Fault::Clock { by, back } => self.world.set_clock(by, back),
            Fault::Crash(_) | Fault::PutBack => {}
        }
    }

    /// A bucket put back holds an older record; who wrote it is as dead as the process that was stopped for it.
    fn put_back(&self, old: bytes::Bytes) {
        let mut record: Value = serde_json::from_slice(&old).expect("a record");
        let now = self.keys.value(ID).expect("a record");
        let now: Value = serde_json::from_slice(&now).expect("a record");
        record["epoch"] = now["epoch"].clone();
        self.keys.put_back(ID, record.to_string().into());
    }

    fn calm(&self) {
        for server in [&self.source, &self.target] {
            server.revive();
            server.heal();
        }
        self.keys.trouble(false);
    }

    async fn wait_until_right(&self) -> Result<(), String> {
        let end = Instant::now() + CALM;
        loop {
            let broken = self.broken.lock().expect("broken").clone();
            if !broken.is_empty() {
                return Err(broken.join("\n"));
            }
            let wrong = self.wrong().or_else(|| self.gaps_are_told().err());
            match wrong {
                None => break,
                Some(wrong) if Instant::now() > end => return Err(wrong),
                Some(_) => sleep(Duration::from_millis(500)).await,
            }
        }
        // And it stays right.
        sleep(Duration::from_secs(5)).await;
        self.wrong().map_or_else(|| self.gaps_are_told(), Err)
    }

    /// What the source removed before it was copied is counted and told, once. Of two processes both may tell it, and
    /// what was gone before a first start is no loss.
    fn gaps_are_told(&self) -> Result<(), String> {
        if self.plan.second.is_some() || !self.purged_behind_start.load(Ordering::Relaxed) {
            return Ok(());
        }
        let found: BTreeSet<u64> = copies(&self.target).into_iter().map(|origin| origin.0).collect();
        let first = self.source.with("S", |stream| stream.first);
        let lost = (1..first).filter(|seq| !found.contains(seq)).count() as u64;
        let told = self.told.lock().expect("events");
        let gaps = told.iter().filter(|event| event["kind"] == "gap");
        let told: u64 = gaps.map(|event| event["messages"].as_u64().expect("a number")).sum();
        if lost == told { Ok(()) } else { Err(format!("{lost} were lost at the source, {told} were told")) }
    }

    /// What the target has that it should not, or has not that it should.
    fn wrong(&self) -> Option<String> {
        let sent: BTreeMap<u64, Origin> = self.source.with("S", |stream| {
            stream.messages.iter().map(|(seq, message)| (*seq, (*seq, message.time_ns / 1_000_000))).collect()
        });
        let copies = copies(&self.target);
        let wanted: BTreeSet<Origin> = sent.values().copied().collect();
        let found: BTreeSet<Origin> = copies.iter().copied().collect();
        let missing: Vec<_> = wanted.difference(&found).collect();
        if !missing.is_empty() {
            let told = self.told.lock().expect("events").clone();
            let record = self.keys.value(ID).map(|value| String::from_utf8_lossy(&value).into_owned());
            return Some(format!("{} are missing, first {:?}; told: {told:#?}; {record:?}", missing.len(), missing[0]));
        }
        if found.len() != copies.len() {
            let mut seen = BTreeSet::new();
            let twice = copies.iter().find(|origin| !seen.insert(**origin));
            return Some(format!("{} are there twice, first {twice:?}: {copies:?}", copies.len() - found.len()));
        }
        // A message that is refused while later ones are in the air comes behind these, where nothing chains them.
        let refused = |fault| matches!(fault, Fault::Leaderless(Side::Target, _));
        let other = |fault| matches!(fault, Fault::SourceAnew | Fault::SourceForgets(_));
        if !self.plan.has(other) && (self.plan.batched || !self.plan.has(refused)) {
            let turned = copies.windows(2).find(|pair| pair[0].0 > pair[1].0);
            if let Some(pair) = turned {
                return Some(format!("{:?} stands behind {:?}: {copies:?}", pair[1], pair[0]));
            }
        }
        None
    }
}

/// Whether a fault takes away what was stored.
fn loses(fault: Fault) -> bool {
    matches!(
        fault,
        Fault::TargetForgets(_)
            | Fault::TargetDeleted
            | Fault::SourceForgets(_)
            | Fault::SourceAnew
            | Fault::Purge(_)
            | Fault::PutBack
    )
}

/// Origins of all copies, in target order.
fn copies(target: &Server) -> Vec<Origin> {
    target.with("T", |stream| {
        let origins = stream.messages.values().filter_map(|message| {
            let origin = value(&message.header, "Choria-SR-Source")?;
            let words: Vec<&str> = origin.split(' ').collect();
            Some((words[1].parse().expect("a sequence"), words[4].parse().expect("a time")))
        });
        origins.collect()
    })
}

/// A source message at or below a saved position that the target does not have.
fn missing(source: &Server, target: &Server, position: Option<u64>) -> Option<Origin> {
    let position = position?;
    let found: BTreeSet<u64> = copies(target).into_iter().map(|origin| origin.0).collect();
    source.with("S", |stream| {
        let mut settled = stream.messages.range(..=position);
        settled.find(|(seq, _)| !found.contains(seq)).map(|(seq, message)| (*seq, message.time_ns))
    })
}
