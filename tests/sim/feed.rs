//! Native feeds: the product's own loop between a simulated source and a target that ingests by the rules of `ingest`, under
//! faults, hand-overs and rivals. What the target has is compared with what the source ever stored.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::FutureExt;
use nats_lane::{
    backoff::{Backoff, jitter},
    entropy,
};
use serde_json::{Value, json};
use stream_replicator::{
    config,
    copy::{self, Budget, ErrorKind, Job, KnownOrigins, PositionWriter, WaysBack},
    events::Events,
    native::{self, FeedSubjects},
    status::{CopyStatus, Row, State},
    store::{ClaimError, OwnStreams, PositionStore},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    history::History,
    ingest::{Ingest, origin_of},
    keys::{Handle, Keys},
    plan::{Plan, Side, TTL_MS, Way},
    process::{Hands, process},
    run::{ID, INSTANCES},
    server::{Network, Server, Tamper, Who},
    stream::{Config, Retention, Stored, Stream},
    world::{Host, World},
};

/// As in the supervisor.
const HELD: Duration = Duration::from_secs(10);
/// A target that asked while no feed was there may wait for this time, and longer after several failures.
const RIGHT_WITHIN: Duration = Duration::from_secs(400);
/// How long nothing of another stream may arrive.
const WATCHED: Duration = Duration::from_secs(120);

/// What happens to a feed.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The process of a feed ends, and is away for a while.
    Crash(usize, Duration),
    /// It does not run for a while.
    Freeze(usize, Duration),
    Cut(Side),
    Restart(Side, Duration),
    FreezeServer(Side, Duration),
    /// A frame between target and feed, after so many others, is lost or arrives twice.
    Tamper(u64, Tamper),
    Slow(Side, Way, Duration),
    HalfOpen(Side, Way),
    /// The source removes this many of its messages.
    Delete(u64),
    /// The other process takes over; the old one hears of it, or not.
    HandOver {
        heard: bool,
    },
}

/// One run.
#[derive(Debug, Clone)]
struct FeedPlan {
    is_mirror: bool,
    /// The target's server is of 2.14 or later.
    is_new: bool,
    /// Both processes feed for all of the time, each with a record of its own.
    rivals: bool,
    /// A subject that is excluded.
    excludes: bool,
    in_flight: u64,
    bursts: Vec<(Duration, u64)>,
    faults: Vec<(Duration, Fault)>,
    /// When the source is replaced by another stream of its name.
    recreated: Option<Duration>,
}

impl FeedPlan {
    fn draw(world: &World) -> Self {
        let time = || world.millis(0, 60_000);
        let side = || if world.once_in(2) { Side::Source } else { Side::Target };
        let way = || if world.once_in(2) { Way::To } else { Way::From };
        let which = || world.between(0, 1) as usize;
        let fault = || match world.between(0, 11) {
            0 | 1 => Fault::Crash(which(), world.millis(0, 30_000)),
            2 | 3 => Fault::Freeze(which(), world.millis(0, 40_000)),
            4 => Fault::Cut(side()),
            5 => Fault::Restart(side(), world.millis(0, 20_000)),
            6 => Fault::FreezeServer(side(), world.millis(0, 15_000)),
            7 => Fault::Tamper(world.between(0, 200), if world.once_in(2) { Tamper::Lose } else { Tamper::Twice }),
            8 => Fault::Slow(side(), way(), world.millis(0, 3_000)),
            9 => Fault::HalfOpen(side(), way()),
            10 => Fault::Delete(world.between(1, 30)),
            _ => Fault::HandOver { heard: world.once_in(2) },
        };
        let mut bursts: Vec<_> = (0..world.between(1, 12)).map(|_| (time(), world.between(1, 120))).collect();
        let mut faults: Vec<_> = (0..world.between(0, 12)).map(|_| (time(), fault())).collect();
        bursts.sort_by_key(|(at, _)| *at);
        faults.sort_by_key(|(at, _)| *at);
        let rivals = world.once_in(6);
        Self {
            is_mirror: world.once_in(2),
            is_new: world.once_in(2),
            rivals,
            excludes: world.once_in(4),
            in_flight: if world.once_in(2) { world.between(1, 20) } else { 2_000 },
            bursts,
            faults,
            recreated: (!rivals && world.once_in(5)).then(|| world.millis(20_000, 60_000)),
        }
    }
}

/// Both processes, and who leads.
struct FeedScene {
    world: World,
    plan: FeedPlan,
    source: Arc<Server>,
    target: Arc<Server>,
    /// One for both, or one for each of two rivals.
    records: [Arc<Keys>; 2],
    hands: [Arc<Hands>; 2],
    /// Odd ones are those of the second process.
    epoch: AtomicU64,
    /// Ends the run of the process that does not lead any more.
    heard: Mutex<CancellationToken>,
    originals: Mutex<BTreeMap<u64, Stored>>,
    /// What the source has removed.
    removed: Mutex<BTreeSet<u64>>,
    is_recreated: Mutex<bool>,
    events: Events,
    ends: Mutex<Vec<String>>,
}

/// Runs one seed; the error says what was violated.
pub fn run(seed: u64) -> Result<Duration, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let result = runtime.expect("a runtime").block_on(async {
        let world = World::new(seed);
        entropy::stand_in(Some(Rc::new(world.luck(seed))));
        let plan = FeedPlan::draw(&world);
        let scene = FeedScene::set(world, plan.clone());
        let result = scene.clone().play().await;
        let ends = scene.ends.lock().expect("ends").join("\n  ");
        result.map_err(|error| format!("{error}\nends:\n  {ends}\n{plan:#?}"))
    });
    entropy::stand_in(None);
    result.map_err(|error| format!("seed {seed}: {error}"))
}

impl FeedScene {
    fn set(world: World, plan: FeedPlan) -> Arc<Self> {
        let history = Arc::new(Mutex::new(History::new(world.clone(), Plan::draw(&world))));
        let source = Server::start(&world, "source", 1 << 20, history.clone());
        let target = Server::start(&world, "target", 1 << 20, history);
        let config = Config { level: if plan.is_new { 4 } else { 2 }, ..Config::DEFAULT };
        assert!(config.retention == Retention::Limits);
        source.make(Stream::new("S", config, world.now_ns(Host::Source)));
        target.make(Stream::new("T", config, world.now_ns(Host::Target)));
        let subjects = FeedSubjects::of("SITE", ID);
        target.ingest(Ingest::new("T", plan.is_mirror, (subjects.api(), subjects.deliver()), plan.is_new));
        let (sink, mut events) = mpsc::unbounded_channel::<(String, Vec<u8>)>();
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let records = || Keys::new(world.clone(), "positions", Box::new(|_| {}));
        let first = records();
        let second = if plan.rivals { records() } else { first.clone() };
        Arc::new(Self {
            events: Events::to(sink, "replicator", "SITE", "one"),
            source,
            target,
            records: [first, second],
            hands: Default::default(),
            epoch: AtomicU64::new(2),
            heard: Mutex::default(),
            originals: Mutex::default(),
            removed: Mutex::default(),
            is_recreated: Mutex::default(),
            ends: Mutex::default(),
            world,
            plan,
        })
    }

    fn handle(&self, which: usize) -> Handle {
        Handle { keys: self.records[which].clone(), link: self.hands[which].link.clone(), ttl_ms: (TTL_MS, TTL_MS) }
    }

    fn leads(&self, which: usize) -> Option<u64> {
        let epoch = self.epoch.load(Ordering::Relaxed);
        (self.plan.rivals || epoch % 2 == which as u64).then_some(epoch)
    }

    fn note(&self, which: usize, end: impl std::fmt::Display) {
        let at = self.world.elapsed();
        self.ends.lock().expect("ends").push(format!("{at:?} `{}` {end}", INSTANCES[which]));
    }

    /// One process: feeds while it leads.
    async fn live(self: Arc<Self>, which: usize) {
        let mut document = json!({
            "stream": "S", "target_stream": "T", "source_url": "source", "target_url": "target",
            "kind": if self.plan.is_mirror { "mirror" } else { "source" }, "target_leaf_url": "nats-leaf://target",
            "no_target_create": true,
            "limits": {"messages_in_flight": self.plan.in_flight, "bytes_in_flight": 65_536},
        });
        if self.plan.excludes {
            document["exclude_subjects"] = json!(["s.3"]);
        }
        let replication = config::parse_value(&document, "SITE").expect("a document");
        let feed = replication.native.clone().expect("a feed");
        let mut backoff = Backoff::RETRY;
        let chance = || self.world.between(0, 1_000) as f64 / 1_000.0;
        loop {
            let Some(epoch) = self.leads(which) else {
                sleep(Duration::from_millis(200)).await;
                continue;
            };
            let heard = self.heard.lock().expect("heard").clone();
            let claim = PositionStore::new(Arc::new(self.handle(which))).claim(ID, INSTANCES[which], epoch).await;
            let claim = match claim {
                Ok(claim) => claim,
                Err(ClaimError::Newer { .. }) => {
                    sleep(Duration::from_secs(1)).await;
                    continue;
                }
                Err(ClaimError::Store(_)) => {
                    sleep(backoff.next(chance())).await;
                    continue;
                }
            };
            let store = PositionStore::new(Arc::new(self.handle(which)));
            let mut writer = PositionWriter::new(store, self.events.clone(), ID, claim);
            let job = self.job(&replication, which, epoch);
            let status = watch::Sender::new((State::Starting, CopyStatus::default()));
            let result = native::run(&job, &feed, &mut writer, &status, &self.events, heard).await;
            let Err(error) = result else { continue };
            tracing::debug!(at = ?self.world.elapsed(), which, %error, "a feed ended");
            self.note(which, format!("{:?}: {error}", error.kind));
            let delay = match error.kind {
                ErrorKind::Superseded => Duration::from_secs(1),
                ErrorKind::Hold => jitter(HELD, chance()),
                ErrorKind::Retry => {
                    if status.borrow().1.position.source_seq > 0 {
                        backoff.reset();
                    }
                    backoff.next(chance())
                }
            };
            sleep(delay).await;
        }
    }

    fn job(&self, replication: &config::Replication, which: usize, epoch: u64) -> Job {
        let who = Who { instance: INSTANCES[which], epoch };
        let servers = vec![self.source.clone(), self.target.clone()];
        Job {
            site: "SITE".to_owned(),
            installation: "1".to_owned(),
            replication: replication.clone(),
            row: Row {
                replication: ID.to_owned(),
                state: State::Starting,
                origin: "kv".to_owned(),
                leader: Some(INSTANCES[which].to_owned()),
                epoch,
                config_revision: 1,
                copy: CopyStatus::default(),
                verify: None,
                todo: None,
            },
            budget: Budget::new(1 << 20),
            neighbour: None,
            ways_back: WaysBack::fixed(KnownOrigins::default()),
            skip: None,
            samples: None,
            consumers: copy::consumer_prefix("SITE", "", ID),
            own_streams: OwnStreams::default(),
            standalone: false,
            dial: Arc::new(Network { servers, who, hands: self.hands[which].clone() }),
        }
    }

    async fn play(self: Arc<Self>) -> Result<Duration, String> {
        let processes: Vec<JoinHandle<()>> = (0..2)
            .map(|which| {
                let (scene, hands) = (self.clone(), self.hands[which].clone());
                tokio::spawn(process(hands, move || scene.clone().live(which).boxed()))
            })
            .collect();
        let publisher = tokio::spawn(self.clone().publish());
        for (at, fault) in self.plan.faults.clone() {
            self.until(at).await;
            self.happen(fault).await;
        }
        publisher.await.expect("the publisher");
        self.until(Duration::from_secs(60)).await;
        self.hands.iter().for_each(|hands| hands.heal());
        self.source.heal();
        self.target.heal();
        // What is half open stays so: connections have to be given up.
        let result = self.judge().await;
        processes.iter().for_each(JoinHandle::abort);
        result
    }

    async fn until(&self, at: Duration) {
        sleep_until(Instant::now() + at.saturating_sub(self.world.elapsed())).await;
    }

    async fn publish(self: Arc<Self>) {
        let number = Cell::new(0_u64);
        for (at, messages) in self.plan.bursts.clone() {
            if let Some(recreated) = self.plan.recreated
                && at >= recreated
                && !*self.is_recreated.lock().expect("recreated")
            {
                self.until(recreated).await;
                self.recreate();
            }
            self.until(at).await;
            for _ in 0..messages {
                number.set(number.get() + 1);
                self.store(number.get());
            }
        }
    }

    fn store(&self, number: u64) {
        let header: &[u8] = match number % 4 {
            0 => b"",
            1 => b"NATS/1.0\r\nA: b\r\n\r\n",
            _ => b"NATS/1.0\r\nodd\r\nA:  c\r\nA: d\r\n\r\n",
        };
        let subject = format!("s.{}", number % 5);
        let is_recreated = *self.is_recreated.lock().expect("recreated");
        // Another stream does not give the same sequence in the same nanosecond.
        let now_ns = self.world.now_ns(Host::Source) + number as i64 + if is_recreated { 500_000 } else { 0 };
        let payload = format!("{number} {is_recreated}");
        let seq = self.source.with("S", |stream| stream.store(&subject, header, payload.as_bytes(), now_ns));
        if !is_recreated {
            let stored = Stored { subject, header: header.to_vec(), payload: payload.into_bytes(), time_ns: now_ns };
            self.originals.lock().expect("originals").insert(seq, stored);
        }
    }

    /// Another stream takes the place of the source, with more messages than the target has. Only where the target, or the
    /// record of a source, can show the difference.
    fn recreate(&self) {
        let last = self.target.with("T", |stream| stream.messages.keys().next_back().copied());
        let saved = self.records[0].value(ID).and_then(|record| serde_json::from_slice::<Value>(&record).ok());
        let saved = saved.and_then(|record| record["source"]["seq"].as_u64()).unwrap_or_default();
        if last.is_none() || (!self.plan.is_mirror && saved == 0) {
            return;
        }
        *self.is_recreated.lock().expect("recreated") = true;
        let before = self.source.with("S", |stream| stream.last);
        let mut another = Stream::new("S", Config::DEFAULT, self.world.now_ns(Host::Source));
        another.config.level = if self.plan.is_new { 4 } else { 2 };
        self.source.make(another);
        for number in 1..=before + 50 {
            self.store(number);
        }
        self.note(0, "(the source is another stream from here on)");
    }

    async fn happen(&self, fault: Fault) {
        tracing::debug!(at = ?self.world.elapsed(), ?fault, "happens");
        let server = |side| match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        };
        match fault {
            Fault::Crash(which, away) => self.hands[which].kill(away),
            Fault::Freeze(which, time) => self.hands[which].frozen.begin(time),
            Fault::Cut(side) => server(side).cut(),
            Fault::Restart(side, time) => {
                server(side).kill();
                sleep(time).await;
                server(side).revive();
            }
            Fault::FreezeServer(side, time) => server(side).freeze(time),
            Fault::Tamper(after, what) => self.target.tamper(after, what),
            Fault::Slow(side, way, by) => server(side).slow(way, by),
            Fault::HalfOpen(side, way) => server(side).half_open(way),
            // Another stream without the message that was taken last looks like the same one.
            Fault::Delete(_) if *self.is_recreated.lock().expect("recreated") => {}
            Fault::Delete(count) => {
                for _ in 0..count {
                    let last = self.source.with("S", |stream| stream.last);
                    let seq = self.world.between(1, last.max(1));
                    self.source.with("S", |stream| stream.remove(seq));
                    self.removed.lock().expect("removed").insert(seq);
                }
            }
            Fault::HandOver { heard } => {
                self.epoch.fetch_add(1, Ordering::Relaxed);
                let old = std::mem::take(&mut *self.heard.lock().expect("heard"));
                if heard {
                    old.cancel();
                }
            }
        }
    }

    /// Waits until the target has everything; it never has anything else.
    async fn judge(&self) -> Result<Duration, String> {
        let begun = Instant::now();
        let limit = if *self.is_recreated.lock().expect("recreated") { WATCHED } else { RIGHT_WITHIN };
        loop {
            self.nothing_else()?;
            let missing = self.missing();
            let is_recreated = *self.is_recreated.lock().expect("recreated");
            if !is_recreated && missing.is_none() {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > limit {
                return match missing {
                    Some(missing) if !is_recreated => Err(format!("message {missing} is not at the target")),
                    _ => Ok(begun.elapsed()),
                };
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    fn excluded(&self, message: &Stored) -> bool {
        self.plan.excludes && message.subject == "s.3"
    }

    /// Sequences at the source that the target has messages of, with those.
    fn at_target(&self) -> Vec<(u64, Stored)> {
        let is_mirror = self.plan.is_mirror;
        self.target.with("T", |stream| {
            let of = |(seq, message): (&u64, &Stored)| {
                let seq = if is_mirror { *seq } else { origin_of(&message.header).expect("its origin") };
                (seq, message.clone())
            };
            stream.messages.iter().map(of).collect()
        })
    }

    /// Every message of the target is one of the source's, as that had it, once and in order.
    fn nothing_else(&self) -> Result<(), String> {
        let originals = self.originals.lock().expect("originals");
        let mut before = 0;
        for (seq, copy) in self.at_target() {
            if seq <= before {
                return Err(format!("message {seq} comes after {before}"));
            }
            before = seq;
            let Some(original) = originals.get(&seq).filter(|original| !self.excluded(original)) else {
                return Err(format!("message {seq} was never to be there: {copy:?}"));
            };
            let same = original.subject == copy.subject
                && original.payload == copy.payload
                && original.time_ns == copy.time_ns
                && (!self.plan.is_mirror || original.header == copy.header);
            if !same {
                return Err(format!("message {seq}: {original:?} became {copy:?}"));
            }
        }
        Ok(())
    }

    /// The first message that the source has and the target has not.
    fn missing(&self) -> Option<u64> {
        let there: BTreeSet<u64> = self.at_target().into_iter().map(|(seq, _)| seq).collect();
        let (originals, removed) = (self.originals.lock().expect("originals"), self.removed.lock().expect("removed"));
        let wanted = originals.iter().filter(|(seq, message)| !removed.contains(seq) && !self.excluded(message));
        wanted.map(|(seq, _)| *seq).find(|seq| !there.contains(seq))
    }
}
