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
    native,
    status::{CopyStatus, Row, State},
    store::{ClaimError, OwnStreams, PositionStore, SourceMessage},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    feed_plan::{Fault, FeedPlan, OnReject},
    history::History,
    ingest::{Asks, Ingest, origin_of},
    keys::{Handle, Keys},
    plan::{Plan, Side, TTL_MS},
    process::{Hands, process},
    run::{ID, INSTANCES},
    senders::{Judge, Records},
    server::{Network, Server, Who},
    stream::{Config, Stored, Stream, value},
    world::{Host, World},
};

/// As in the supervisor.
const HELD: Duration = Duration::from_secs(10);
/// A target that asked while no feed was there may wait for this time, and longer after several failures.
const RIGHT_WITHIN: Duration = Duration::from_secs(400);
/// How long nothing of another stream may arrive.
const WATCHED: Duration = Duration::from_secs(120);
/// How much longer all takes for each message that the target refuses.
const REFUSED_WITHIN: Duration = Duration::from_secs(60);

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
    senders: [Arc<Records>; 2],
    /// The message that an operator asked to skip.
    skip: Mutex<Option<SourceMessage>>,
    events: Events,
    breaches: Arc<Mutex<Vec<String>>>,
    ends: Mutex<Vec<String>>,
}

/// Runs one seed; the error says what was violated.
pub fn run(seed: u64) -> Result<Duration, String> {
    run_plan(seed, FeedPlan::draw)
}

/// Runs one seed by a plan of its own.
pub fn run_plan(seed: u64, plan: impl FnOnce(&World) -> FeedPlan) -> Result<Duration, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let result = runtime.expect("a runtime").block_on(async {
        let world = World::new(seed);
        entropy::stand_in(Some(Rc::new(world.luck(seed))));
        let plan = plan(&world);
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
        let config = plan.target();
        source.make(Stream::new("S", Config { max_size: None, ..config }, world.now_ns(Host::Source)));
        source.make(Stream::new("DEAD", Config::DEFAULT, world.now_ns(Host::Source)));
        target.make(Stream::new("T", config, world.now_ns(Host::Target)));
        target.cluster(plan.nodes);
        target.ingest(Ingest::new("T", plan.is_mirror, FeedPlan::subjects(), plan.asks));
        let (sink, mut events) = mpsc::unbounded_channel::<(String, Vec<u8>)>();
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let records = || Keys::new(world.clone(), "positions", Box::new(|_| {}));
        let first = records();
        let second = if plan.rivals { records() } else { first.clone() };
        let breaches = Arc::default();
        let senders = || Records::new(world.clone(), judge_of_records(&plan, target.clone(), &breaches));
        let senders_of_first = senders();
        let senders_of_second = if plan.rivals { senders() } else { senders_of_first.clone() };
        Arc::new(Self {
            events: Events::to(sink, "replicator", "SITE", "one"),
            source,
            target,
            records: [first, second],
            senders: [senders_of_first, senders_of_second],
            skip: Mutex::default(),
            breaches,
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
        if let Some(inspect) = self.plan.inspect {
            document["inspect_subject_token"] = 2.into();
            document["inspect_duration"] = format!("{}ms", inspect.as_millis()).into();
        }
        match self.plan.refuses.map(|refuses| refuses.on_reject) {
            Some(OnReject::Skip) => document["on_reject"] = "skip".into(),
            Some(OnReject::DeadLetter) => {
                document["on_reject"] = "dead_letter".into();
                document["dead_letter"] = json!({"subject": "dead.letter"});
            }
            Some(OnReject::Hold) | None => {}
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
            // A dead letter that cannot be stored now is tried again.
            if let Some(poison) =
                error.poison.as_ref().filter(|_| !error.to_string().contains("nor can it be published"))
            {
                self.is_held(poison.message);
            }
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
            skip: *self.skip.lock().expect("skip"),
            samples: replication
                .sampling
                .as_ref()
                .map(|sampling| self.senders[which].load(sampling, self.handle(which))),
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
        let subject = format!("s.{}", number % 5);
        let is_recreated = *self.is_recreated.lock().expect("recreated");
        // Another stream does not give the same sequence in the same nanosecond.
        let now_ns = self.world.now_ns(Host::Source) + number as i64 + if is_recreated { 500_000 } else { 0 };
        let (header, payload) = self.plan.content(number, is_recreated);
        let seq = self.source.with("S", |stream| stream.store(&subject, &header, &payload, now_ns));
        if !is_recreated {
            let stored = Stored { subject, header, payload, time_ns: now_ns };
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
        another.config.level = if self.plan.asks == Asks::Old { 2 } else { 4 };
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
            Fault::MoveLeader => self.target.move_leader(),
            Fault::NodeDown(node, time) => self.target.node_down(node, time),
            Fault::CutFed => self.target.cut_fed(),
            Fault::Full(time) => {
                self.target.with("T", |stream| stream.max_messages = Some(stream.messages.len()));
                let target = self.target.clone();
                tokio::spawn(async move {
                    sleep(time).await;
                    target.with("T", |stream| stream.max_messages = None);
                });
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
        let limit = match *self.is_recreated.lock().expect("recreated") {
            true => WATCHED,
            false => RIGHT_WITHIN + REFUSED_WITHIN * self.refused().len() as u32,
        };
        loop {
            self.nothing_else()?;
            self.letters_are_right()?;
            if let Some(breach) = self.breaches.lock().expect("breaches").first() {
                return Err(breach.clone());
            }
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
            let Some(original) = originals.get(&seq).filter(|original| !self.plan.is_excluded(original)) else {
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

    /// The first message that the source has, and neither the target nor, where it is refused, a dead letter.
    fn missing(&self) -> Option<u64> {
        let there: BTreeMap<u64, Stored> = self.at_target().into_iter().collect();
        let letters: BTreeSet<Vec<u8>> = self.letters().into_iter().map(|letter| letter.payload).collect();
        let is_lettered = self.plan.refuses.is_some_and(|refuses| refuses.on_reject == OnReject::DeadLetter);
        let (originals, removed) = (self.originals.lock().expect("originals"), self.removed.lock().expect("removed"));
        let wanted =
            originals.iter().filter(|(seq, message)| !removed.contains(seq) && !self.plan.is_excluded(message));
        let is_there = |seq: &u64, message: &Stored| match self.plan.is_refused(*seq, message) {
            true => !is_lettered || letters.contains(&message.payload),
            false => there.contains_key(seq),
        };
        let missing =
            wanted.filter(|(seq, message)| !is_there(seq, message) && !self.is_sampled(**seq, message, &there));
        missing.map(|(seq, _)| *seq).next()
    }

    /// Whether the target has another message of its sender that is so little older that it is not to be given.
    fn is_sampled(&self, seq: u64, message: &Stored, there: &BTreeMap<u64, Stored>) -> bool {
        let Some(inspect) = self.plan.inspect else { return false };
        let before = there.range(..seq).rev().find(|(_, copy)| copy.subject == message.subject);
        before.is_some_and(|(_, copy)| message.time_ns - copy.time_ns <= inspect.as_nanos() as i64)
    }

    /// Sequences of the messages that the target refuses.
    fn refused(&self) -> Vec<u64> {
        let originals = self.originals.lock().expect("originals");
        originals.iter().filter(|(seq, message)| self.plan.is_refused(**seq, message)).map(|(seq, _)| *seq).collect()
    }

    fn letters(&self) -> Vec<Stored> {
        self.source.with("DEAD", |stream| stream.messages.values().cloned().collect())
    }

    /// Each dead letter is one of a message that the target refuses, as it was; a second one only where the stream of dead letters
    /// does not know the id of the first one any more.
    fn letters_are_right(&self) -> Result<(), String> {
        let originals = self.originals.lock().expect("originals");
        let mut letters: BTreeMap<Vec<u8>, i64> = BTreeMap::new();
        for letter in self.letters() {
            let of = originals.iter().find(|(_, original)| original.payload == letter.payload);
            let Some((seq, original)) = of.filter(|(seq, original)| self.plan.is_refused(**seq, original)) else {
                return Err(format!("a dead letter of what the target can store: {letter:?}"));
            };
            if value(&letter.header, "Choria-SR-Subject").as_ref() != Some(&original.subject) {
                return Err(format!("the dead letter of message {seq} is another one: {letter:?}"));
            }
            let before = letters.insert(letter.payload, letter.time_ns);
            let is_known = |before: i64| letter.time_ns - before < Config::DEFAULT.window_ns;
            if before.is_some_and(is_known) && !self.plan.rivals {
                return Err(format!("message {seq} has two dead letters"));
            }
        }
        Ok(())
    }

    /// A feed is held for a message: an operator has it skipped, if it is the message that the target cannot store.
    fn is_held(&self, message: SourceMessage) {
        let originals = self.originals.lock().expect("originals");
        let original = originals.get(&message.seq).filter(|original| original.time_ns == message.time_ns);
        if original.is_some_and(|original| self.plan.is_refused(message.seq, original)) {
            if self.plan.refuses.is_some_and(|refuses| refuses.on_reject == OnReject::Hold) {
                *self.skip.lock().expect("skip") = Some(message);
            } else if self.follows_a_stored_one(&originals, message.seq) {
                let what = format!("held for {message:?}, after others were stored, and `on_reject` is not `hold`");
                self.breaches.lock().expect("breaches").push(what);
            }
        } else if self.plan.faults.iter().any(|(_, fault)| matches!(fault, Fault::Full(_))) {
            // It continues by itself once there is room.
        } else {
            self.breaches.lock().expect("breaches").push(format!("held for {message:?}, which the target can store"));
        }
    }

    /// Whether the target has to store something between a message and the one before it that it refuses.
    fn follows_a_stored_one(&self, originals: &BTreeMap<u64, Stored>, seq: u64) -> bool {
        let removed = self.removed.lock().expect("removed");
        let mut before = originals.range(..seq).rev().filter(|(seq, _)| !removed.contains(seq));
        let next = before.find(|(_, message)| !self.plan.is_excluded(message));
        self.plan.inspect.is_none() && next.is_none_or(|(seq, message)| !self.plan.is_refused(*seq, message))
    }
}

/// What the record of a sender says was copied is at the target. Of rivals, one does not know what the other one gave.
fn judge_of_records(plan: &FeedPlan, target: Arc<Server>, breaches: &Arc<Mutex<Vec<String>>>) -> Judge {
    let breaches = breaches.clone();
    if plan.rivals {
        return Box::new(|_| {});
    }
    Box::new(move |record| {
        let Some(copied) = record.copied.and_then(|time| time.timestamp_nanos_opt()) else { return };
        let subject = format!("s.{}", record.sender);
        let is_copy = |copy: &Stored| copy.time_ns == copied && copy.subject == subject;
        if !target.with("T", |stream| stream.messages.values().any(is_copy)) {
            let what =
                format!("the record of sender {} says that {copied} was copied, which is not there", record.sender);
            breaches.lock().expect("breaches").push(what);
        }
    })
}
