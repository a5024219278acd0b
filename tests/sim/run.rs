//! One simulated run: sets the scene, lets the plan happen, and holds the result against the guarantees.

use std::{
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use futures_util::FutureExt;
use nats_lane::entropy;
use serde_json::Value;
use stream_replicator::{
    events::Events,
    store::{LeaseRecord, LeaseStore, SourceMessage},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Duration, Instant, sleep, sleep_until},
};

use super::{
    history::History,
    keys::{Handle, Keys},
    plan::{Fault, Plan, Poison, Side, TTL_MS},
    process::{Hands, Switch, process},
    senders::Records,
    server::{Server, Tamper},
    stream::{Config, Retention, Stream},
    traffic,
    world::{Host, World},
};

pub const ID: &str = "S";
pub const INSTANCES: [&str; 3] = ["one", "two", "three"];
/// Larger payloads are poison where a plan has any.
pub const LARGE: usize = 1_500;

pub struct Scene {
    pub world: World,
    pub plan: Plan,
    pub source: Arc<Server>,
    pub target: Arc<Server>,
    /// Position records, and sessions and leases.
    pub keys: Arc<Keys>,
    pub leases: Arc<Keys>,
    pub senders: Arc<Records>,
    pub history: Arc<Mutex<History>>,
    pub events: Events,
    /// What people ask for: kept, whoever runs the replication.
    pub paused: Switch,
    pub release: Mutex<Option<SourceMessage>>,
    /// Runs that are under way.
    pub running: AtomicUsize,
    /// Those that have the lease.
    pub leading: AtomicUsize,
    /// How runs ended, for the report of a seed that fails.
    pub ends: Mutex<Vec<String>>,
    /// Whether something was copied before the source removed what it had.
    pub purged_behind_start: AtomicBool,
    /// Recreated streams do not give the same sequence twice in one millisecond.
    pub cuts: AtomicUsize,
    hands: [Arc<Hands>; 3],
}

/// The report of a seed without a failure.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    /// A hash of all bytes that were exchanged and saved, and when.
    pub trace: u64,
    /// From the end of the faults until all was right, and the limit for that.
    pub took: Duration,
    pub limit: Duration,
}

/// Runs one seed; the error says what was violated.
pub fn run(seed: u64) -> Result<Told, String> {
    run_plan(seed, Plan::draw)
}

/// The same with another plan than the seed's.
pub fn run_plan(seed: u64, plan: fn(&World) -> Plan) -> Result<Told, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let result = runtime.expect("a runtime").block_on(async {
        let world = World::new(seed);
        entropy::stand_in(Some(Rc::new(world.luck(seed))));
        let plan = plan(&world);
        let scene = Scene::set(world, plan.clone());
        let result = scene.clone().play().await;
        result.map_err(|error| format!("{error}\n{}\n{plan:#?}", scene.report()))
    });
    entropy::stand_in(None);
    result.map_err(|error| format!("seed {seed}: {error}"))
}

impl Scene {
    fn set(world: World, plan: Plan) -> Arc<Self> {
        let history = Arc::new(Mutex::new(History::new(world.clone(), plan.clone())));
        let max_payload = if plan.poison == Some(Poison::Noticed) { LARGE } else { 1 << 20 };
        let source = Server::start(&world, "source", 1 << 20, history.clone());
        let target = Server::start(&world, "target", max_payload, history.clone());
        let witness = {
            let history = history.clone();
            Box::new(move |record: &[u8]| history.lock().expect("history").saves(record))
        };
        let keys = Keys::new(world.clone(), "positions", witness);
        let leases = Keys::new(world.clone(), "leases", Box::new(|_| {}));
        let judge = {
            let history = history.clone();
            Box::new(move |record: &_| history.lock().expect("history").sender(record))
        };
        let senders = Records::new(world.clone(), judge);
        let (sink, mut events) = mpsc::unbounded_channel::<(String, Vec<u8>)>();
        let into = history.clone();
        tokio::spawn(async move {
            while let Some((_, body)) = events.recv().await {
                let event = serde_json::from_slice(&body).expect("an event");
                into.lock().expect("history").told.push(event);
            }
        });
        let events = Events::to(sink, "replicator", "SITE", "one");
        let scene = Arc::new(Self {
            world,
            plan,
            source,
            target,
            keys,
            leases,
            senders,
            history,
            events,
            paused: Switch::default(),
            release: Mutex::default(),
            running: AtomicUsize::new(0),
            leading: AtomicUsize::new(0),
            ends: Mutex::default(),
            purged_behind_start: AtomicBool::new(false),
            cuts: AtomicUsize::new(0),
            hands: Default::default(),
        });
        scene.source.make(scene.new_source());
        scene.source.make(scene.new_dead_letters());
        scene.target.make(scene.new_target());
        scene
    }

    fn new_source(&self) -> Stream {
        let config = Config {
            batched: true,
            window_ns: 120_000_000_000,
            per_subject: self.plan.source_keeps,
            max_size: None,
            lives: true,
            retention: self.plan.retention,
            level: if self.plan.is_consumed() && !self.plan.flow_control { 2 } else { 4 },
        };
        Stream::new("S", config, self.world.now_ns(Host::Source))
    }

    /// Takes what the target can never store; nothing ever happens to it.
    fn new_dead_letters(&self) -> Stream {
        Stream::new("DEAD", Config::DEFAULT, self.world.now_ns(Host::Source))
    }

    fn new_target(&self) -> Stream {
        let config = Config {
            batched: self.plan.batched,
            window_ns: self.plan.window.as_nanos() as i64,
            per_subject: self.plan.keeps,
            max_size: (self.plan.poison == Some(Poison::Refused)).then_some(LARGE),
            lives: self.plan.lives,
            retention: Retention::Limits,
            level: 4,
        };
        Stream::new("T", config, self.world.now_ns(Host::Target))
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("history")
    }

    fn report(&self) -> String {
        let told = self.history().told.clone();
        let ends = self.ends.lock().expect("ends").join("\n  ");
        let text = |value: bytes::Bytes| String::from_utf8_lossy(&value).into_owned();
        let record = (self.keys.value(ID).map(text), self.leases.value(&format!("lease.{ID}")).map(text));
        let told: Vec<_> = told.iter().map(ToString::to_string).collect();
        format!("ends:\n  {ends}\ntold:\n  {}\nrecord and lease: {record:?}", told.join("\n  "))
    }

    fn start(self: &Arc<Self>, which: usize, after: Duration) -> JoinHandle<()> {
        let (scene, hands) = (self.clone(), self.hands[which].clone());
        let mine = hands.clone();
        tokio::spawn(async move {
            sleep(after).await;
            process(hands, move || scene.clone().live(which, mine.clone()).boxed()).await;
        })
    }

    /// Buckets as they are reached without faults.
    pub fn handle(&self, keys: &Arc<Keys>) -> Handle {
        Handle { keys: keys.clone(), link: Arc::default(), ttl_ms: (TTL_MS, TTL_MS) }
    }

    async fn play(self: Arc<Self>) -> Result<Told, String> {
        let publisher = tokio::spawn(traffic::publish(self.clone()));
        let neighbour = tokio::spawn(traffic::neighbour(self.clone()));
        let begins = self.plan.begins.iter().enumerate();
        let processes: Vec<_> = begins.map(|(which, after)| self.start(which, *after)).collect();
        let (mut saved, mut leased) = (Vec::new(), Vec::new());
        let lease = format!("lease.{ID}");
        for (at, fault) in self.plan.faults.clone() {
            sleep_until(Instant::now() + at.saturating_sub(self.world.elapsed())).await;
            saved.extend(self.keys.value(ID));
            leased.extend(self.leases.value(&lease));
            match fault {
                Fault::PutBack => self.put_back(saved.first()),
                Fault::LeasePutBack if !leased.is_empty() => self.leases.put_by_hand(&lease, leased.first().cloned()),
                _ => self.happen(fault).await,
            }
        }
        publisher.await.expect("the publisher");
        neighbour.await.expect("the neighbour");
        sleep_until(Instant::now() + self.plan.stormy.saturating_sub(self.world.elapsed())).await;
        self.calm();
        let result = self.wait_until_right().await;
        processes.iter().for_each(JoinHandle::abort);
        let (took, limit) = result?;
        Ok(Told { trace: self.world.trace(), took, limit })
    }

    async fn happen(&self, fault: Fault) {
        let server = |side| match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        };
        tracing::debug!(at = ?self.world.elapsed(), ?fault, "happens");
        match fault {
            Fault::Cut(side) => server(side).cut(),
            Fault::Freeze(side, time) => server(side).freeze(time),
            Fault::Leaderless(side, time) => server(side).leaderless(time),
            Fault::Mute => self.source.mute(),
            Fault::Behind(time) => self.target.behind(time),
            Fault::Restart(side, time) => {
                server(side).kill();
                sleep(time).await;
                server(side).revive();
            }
            Fault::Lose(side, after) => server(side).tamper(after, Tamper::Lose),
            Fault::Twice(side, after) => server(side).tamper(after, Tamper::Twice),
            Fault::HalfOpen(side, way) => server(side).half_open(way),
            Fault::Slow(side, way, by) => server(side).slow(way, by),
            Fault::Crash(which, away) => self.hands[which].kill(away),
            Fault::CrashAt(which, step, away) => self.hands[which].kill_at(step, away),
            Fault::Stop(which, time) => self.hands[which].frozen.begin(time),
            Fault::Leave(which, away) => self.hands[which].leave(away),
            Fault::CutOff(which, time) => self.hands[which].link.cut.begin(time),
            Fault::Deaf(which, time) => self.hands[which].link.deaf.begin(time),
            Fault::Apart(which, side, time) => server(side).apart(INSTANCES[which], time),
            Fault::StepDown => self.step_down().await,
            Fault::Evict(which, time) => {
                self.hands[which].link.deaf.begin(time);
                let session = format!("session.{}", INSTANCES[which]);
                if self.leases.value(&session).is_some() {
                    self.leases.put_by_hand(&session, None);
                }
            }
            Fault::Trouble(time) => {
                self.trouble(true);
                sleep(time).await;
                self.trouble(false);
            }
            Fault::Clock { by, back } => {
                fault.hosts().iter().for_each(|host| self.world.set_clock(*host, by, back));
            }
            Fault::Pause(time) => {
                self.paused.set(true);
                sleep(time).await;
                self.paused.set(false);
            }
            Fault::Full(time) => {
                self.target.with("T", |stream| stream.max_messages = Some(stream.messages.len() + 5));
                sleep(time).await;
                self.target.with("T", |stream| stream.max_messages = None);
            }
            Fault::Refuse(after) => self.target.refuse(after),
            Fault::Batches => self.target.with("T", |stream| stream.config.batched = !stream.config.batched),
            Fault::Move { by, back } => {
                self.paused.set(true);
                // As the service does: while one runs, or is stopped in the middle, nothing is moved.
                let busy =
                    || self.running.load(Ordering::Relaxed) > 0 || self.hands.iter().any(|hands| hands.frozen.lasts());
                let end = Instant::now() + Duration::from_secs(15);
                while busy() && Instant::now() < end {
                    sleep(Duration::from_millis(100)).await;
                }
                if !busy()
                    && let Err(error) = self.move_position(by, back).await
                {
                    self.ends.lock().expect("ends").push(format!("not moved: {error}"));
                }
                self.paused.set(false);
            }
            Fault::Foreign(count) => self.foreign(count).await,
            Fault::TargetForgets(_) | Fault::TargetDeleted => self.target_loses(fault),
            Fault::SourceForgets(_) | Fault::SourceShrinks(_) | Fault::SourceAnew => self.source_changes(fault),
            Fault::Purge(count) => {
                self.purged_behind_start
                    .store(self.record().is_some_and(|r| !r["source"].is_null()), Ordering::Relaxed);
                let first = self.source.with("S", |stream| {
                    stream.purge_below(stream.first + count);
                    stream.first
                });
                self.history().purged(first);
            }
            Fault::RecordLost => {
                self.keys.put_by_hand(ID, None);
                self.history().record_lost();
            }
            Fault::BucketGone { leases, time, known } => {
                let keys = if leases { &self.leases } else { &self.keys };
                keys.vanish();
                sleep(time).await;
                keys.recreate(known);
                if !leases && !known {
                    self.history().record_lost();
                }
            }
            Fault::PutBack | Fault::LeasePutBack => {}
        }
    }

    fn trouble(&self, on: bool) {
        [&self.keys, &self.leases].into_iter().for_each(|keys| keys.trouble(on));
    }

    async fn step_down(&self) {
        let store = LeaseStore::new(Arc::new(self.handle(&self.leases)));
        if let Ok((Some(lease), revision)) = store.lease(ID).await
            && !lease.instance.is_empty()
        {
            let _ = store.put_lease(ID, &LeaseRecord { step_down: true, ..lease }, revision).await;
        }
    }

    async fn foreign(&self, count: u64) {
        for _ in 0..count {
            let now_ns = self.world.now_ns(Host::Target);
            self.target.with("T", |stream| _ = stream.publish("t.foreign", b"", b"foreign", now_ns));
            if self.world.once_in(3) {
                sleep(self.world.millis(0, 200)).await;
            }
        }
    }

    fn target_loses(&self, fault: Fault) {
        let keep = if let Fault::TargetForgets(count) = fault {
            self.target.kill();
            let keep = self.target.with("T", |stream| stream.lose_end(count));
            self.target.revive();
            keep
        } else {
            self.target.cut();
            self.target.make(self.new_target());
            0
        };
        self.history().lost(keep);
    }

    fn source_changes(&self, fault: Fault) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        let keep = if let Fault::SourceForgets(count) = fault {
            self.source.kill();
            let keep = self.source.lose_end("S", count);
            self.source.revive();
            keep
        } else if let Fault::SourceShrinks(count) = fault {
            self.source.with("S", |stream| stream.lose_end(count))
        } else {
            self.source.cut();
            self.source.make(self.new_source());
            0
        };
        self.history().cut(keep);
    }

    pub fn record(&self) -> Option<Value> {
        serde_json::from_slice(&self.keys.value(ID)?).ok()
    }

    /// A bucket put back holds an older record; who wrote it is as dead as the processes that are killed for it.
    fn put_back(&self, old: Option<&bytes::Bytes>) {
        self.hands.iter().for_each(|hands| hands.kill(self.world.millis(0, 100)));
        let (Some(old), Some(now)) = (old, self.record()) else { return };
        let mut record: Value = serde_json::from_slice(old).expect("a record");
        record["epoch"] = now["epoch"].clone();
        self.history().any_position = true;
        self.keys.put_by_hand(ID, Some(record.to_string().into()));
    }

    fn calm(&self) {
        for server in [&self.source, &self.target] {
            server.revive();
            server.heal();
        }
        self.trouble(false);
        self.paused.set(false);
        self.hands.iter().for_each(|hands| hands.heal());
    }
}
