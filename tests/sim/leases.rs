//! The rules of leases alone: several instances whose clocks differ, one bucket, and between them messages that are
//! late or lost, partitions, processes that freeze, crash and restart. It checks the purpose of leases: once
//! an instance has acted with an epoch no instance acts with a smaller one, and when the faults are over everything runs.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use stream_replicator::{
    lease::{LeaseAction, LeaseSettings, Machine, RenewalOutcome},
    store::{LeaseRecord, SessionRecord},
};
use tokio::time::Instant;

const INSTANCES: usize = 4;
const TTL: Duration = Duration::from_secs(3);
/// How long faults happen, and the deadline for everything to run again.
const TROUBLE: Duration = Duration::from_secs(120);
const CALM: Duration = Duration::from_secs(200);

/// What lies in the bucket.
#[derive(Debug, Clone)]
enum Value {
    Session(Option<SessionRecord>),
    Lease(LeaseRecord),
}

/// What is to happen.
#[derive(Debug, Clone)]
enum Step {
    /// What was due then, unless another look came first.
    Poll(usize, u64),
    /// A change reaches a process that began as often.
    Reaches(usize, u32, News),
    /// The result of an operation; the first that is reported counts.
    Answered(usize, u32, u64, News),
    /// A request reaches the bucket.
    Asked(usize, u32, u64, Request),
    /// What runs does something.
    Acts(usize, u32, String, u64),
    /// What was asked to end has ended.
    Ends(usize, u32, String, u64),
    Fault,
    Thaws(usize),
    Begins(usize),
}

#[derive(Debug, Clone)]
enum News {
    /// In the bucket that was made so many times.
    Changed(u32, String, u64, Value),
    Loaded,
    Renewed(RenewalOutcome, u64),
    Looked(String, u64, Option<SessionRecord>),
    LookFailed(String),
    Wrote(String, bool, Option<(LeaseRecord, u64)>),
}

#[derive(Debug, Clone)]
enum Request {
    Renew(SessionRecord, u64),
    Look(String),
    Write(String, LeaseRecord, u64),
}

struct Process {
    machine: Machine,
    record: SessionRecord,
    /// Of its session.
    revision: u64,
    /// What runs, with its epoch.
    runs: BTreeMap<String, u64>,
    began: u32,
    alive: bool,
    frozen: bool,
    cut: bool,
    /// Its clock: so much ahead, and so many millionths faster.
    ahead: Duration,
    drift: i64,
    /// What reached it while it was frozen.
    kept: Vec<Step>,
    /// Operations without an outcome.
    open: BTreeSet<u64>,
    polls: u64,
    /// Somebody removed its session by hand: until it hears of that, or stops by itself, it acts beside its successor, and
    /// only the fence is between them.
    removed: Option<Duration>,
    /// How often it has heard that the bucket was recreated.
    heard: u32,
}

struct World {
    rng: StdRng,
    base: Instant,
    now: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    steps: BTreeMap<u64, Step>,
    count: u64,
    revision: u64,
    bucket: BTreeMap<String, (u64, Value)>,
    /// How often it was recreated.
    made: u32,
    /// When it was recreated last.
    remade: Option<Duration>,
    all: Vec<Process>,
    ids: Vec<String>,
    /// Greatest epoch that an instance acted with, when it did last, and which one.
    acted: BTreeMap<String, (u64, Duration, String)>,
    troubled: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let base = Instant::now();
        let ids = (0..rng.random_range(1..12)).map(|n| format!("R{n}")).collect();
        let mut world = Self {
            base,
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            steps: BTreeMap::new(),
            count: 0,
            revision: 0,
            bucket: BTreeMap::new(),
            made: 0,
            remade: None,
            all: Vec::new(),
            ids,
            acted: BTreeMap::new(),
            troubled: true,
            rng,
        };
        for at in 0..INSTANCES {
            let ahead = Duration::from_millis(world.rng.random_range(0..3_600_000));
            let drift = world.rng.random_range(-30_000..30_000);
            let mut process = world.process(at, 0, ahead, drift);
            process.alive = false;
            world.all.push(process);
            let wait = world.millis(0, 15_000);
            world.after(wait, Step::Begins(at));
        }
        world.after(Duration::from_secs(1), Step::Fault);
        world
    }

    fn process(&mut self, at: usize, began: u32, ahead: Duration, drift: i64) -> Process {
        let session = format!("s{at}-{began}");
        let (instance, ttl_ms) = (format!("i{at}"), TTL.as_millis() as u64);
        let record = SessionRecord { instance, session: session.clone(), ttl_ms, ..SessionRecord::default() };
        let settings = LeaseSettings { instance: record.instance.clone(), ttl: TTL, standalone: false };
        let now = self.base + local(self.now, ahead, drift);
        Process {
            machine: Machine::new(settings, session, now),
            record,
            revision: 0,
            runs: BTreeMap::new(),
            began,
            alive: true,
            frozen: false,
            cut: false,
            ahead,
            drift,
            kept: Vec::new(),
            open: BTreeSet::new(),
            polls: 0,
            removed: None,
            heard: self.made,
        }
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(from * 1_000..=to * 1_000))
    }

    fn after(&mut self, delay: Duration, step: Step) {
        self.count += 1;
        self.queue.push(Reverse((self.now + delay, self.count)));
        self.steps.insert(self.count, step);
    }

    fn clock(&self, at: usize) -> Instant {
        self.base + local(self.now, self.all[at].ahead, self.all[at].drift)
    }

    /// A message between an instance and the bucket; lost when one of them is cut off.
    fn send(&mut self, at: usize, step: Step) {
        if self.all[at].cut || (self.troubled && self.rng.random_ratio(1, 50)) {
            return;
        }
        let slow = self.troubled && self.rng.random_ratio(1, 20);
        let delay = self.millis(0, if slow { 2_000 } else { 20 });
        self.after(delay, step);
    }

    fn run(mut self) -> Result<(), String> {
        loop {
            let Some(Reverse((at, number))) = self.queue.pop() else { return Err("nothing happens".to_owned()) };
            self.now = at;
            if self.now > TROUBLE && self.troubled {
                self.troubled = false;
                for at in 0..INSTANCES {
                    self.all[at].cut = false;
                    if self.all[at].frozen {
                        self.after(Duration::ZERO, Step::Thaws(at));
                    }
                    // Lost deliveries are repeated, as a watch does that was opened again.
                    self.tell_all(at);
                }
            }
            if self.now > TROUBLE + CALM {
                return self.everything_runs();
            }
            if let Some(step) = self.steps.remove(&number) {
                self.step(step)?;
            }
        }
    }

    fn everything_runs(&self) -> Result<(), String> {
        for id in &self.ids {
            let by: Vec<_> = self.all.iter().filter(|process| process.runs.contains_key(id)).collect();
            if by.len() != 1 {
                return Err(format!("{id} runs at {} instances when all is calm", by.len()));
            }
        }
        // What was handed over by request stays where it went.
        let by_request = |id: &str| match self.bucket.get(&format!("lease.{id}")) {
            Some((_, Value::Lease(record))) => !record.stepped_down.is_empty(),
            _ => false,
        };
        let load = |process: &Process| process.runs.keys().filter(|id| !by_request(id)).count();
        let most = self.all.iter().map(load).max().unwrap_or(0);
        let bound = (self.ids.len() as f64 * 1.25 / INSTANCES as f64).ceil() as usize;
        if most > bound {
            return Err(format!("one instance runs {most} of {} when all is calm", self.ids.len()));
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), String> {
        let of = match &step {
            Step::Poll(at, _)
            | Step::Reaches(at, ..)
            | Step::Answered(at, ..)
            | Step::Acts(at, ..)
            | Step::Ends(at, ..) => Some(*at),
            _ => None,
        };
        if !matches!(step, Step::Poll(..) | Step::Acts(..)) {
            tracing::debug!(now = ?self.now, ?step);
        }
        if let Some(at) = of.filter(|at| self.all[*at].frozen) {
            self.all[at].kept.push(step);
            return Ok(());
        }
        match step {
            Step::Fault => self.fault(),
            Step::Thaws(at) => {
                self.all[at].frozen = false;
                let mut kept = std::mem::take(&mut self.all[at].kept);
                // In any order: what a process finds ready when it wakes.
                while !kept.is_empty() {
                    let next = kept.swap_remove(self.rng.random_range(0..kept.len()));
                    self.after(Duration::ZERO, next);
                }
            }
            Step::Begins(at) => {
                let old = &self.all[at];
                if old.alive {
                    return Ok(());
                }
                let (began, ahead, drift) = (old.began + 1, old.ahead, old.drift);
                self.all[at] = self.process(at, began, ahead, drift);
                self.all[at].cut = false;
                self.tell_all(at);
                let now = self.clock(at);
                for id in self.ids.clone() {
                    self.all[at].machine.want(now, &id);
                }
                self.poll(at);
            }
            Step::Poll(at, number) => {
                if number == self.all[at].polls {
                    self.poll(at);
                }
            }
            Step::Answered(at, began, operation, news) => {
                let process = &mut self.all[at];
                if process.alive && process.began == began && process.open.remove(&operation) {
                    self.reaches(at, news);
                    self.poll(at);
                }
            }
            Step::Reaches(at, began, news) => {
                if self.all[at].alive && self.all[at].began == began {
                    self.reaches(at, news);
                    self.poll(at);
                }
            }
            Step::Asked(at, began, operation, request) => self.asked(at, began, operation, request),
            Step::Acts(at, began, id, epoch) => {
                let process = &self.all[at];
                if !process.alive || process.began != began || process.runs.get(&id) != Some(&epoch) {
                    return Ok(());
                }
                // As a grant does: the clock is checked before each step.
                let holds = process.machine.until().is_some_and(|until| self.clock(at) < until);
                if holds {
                    self.acts(at, &id, epoch)?;
                }
                let next = if self.troubled { self.millis(1, 150) } else { self.millis(500, 1_500) };
                self.after(next, Step::Acts(at, began, id, epoch));
            }
            Step::Ends(at, began, id, epoch) => {
                let process = &mut self.all[at];
                if process.alive && process.began == began && process.runs.get(&id) == Some(&epoch) {
                    process.runs.remove(&id);
                    let now = self.clock(at);
                    self.all[at].machine.ended(now, &id, Duration::ZERO);
                    self.poll(at);
                }
            }
        }
        Ok(())
    }

    fn acts(&mut self, at: usize, id: &str, epoch: u64) -> Result<(), String> {
        let me = self.all[at].record.instance.clone();
        let (greatest, when, holder) = self.acted.get(id).cloned().unwrap_or_default();
        if epoch > greatest || epoch == greatest && holder == me {
            self.acted.insert(id.to_owned(), (epoch, self.now, me));
            return Ok(());
        }
        // An instance whose session was removed acts beside its successor until it stops by itself, and a new bucket does
        // not know the epochs of the old one: then only the fence is between them.
        let removed = self.all[at].removed.is_some_and(|removed| self.now < removed + TTL);
        if removed || self.remade.is_some_and(|remade| self.now < remade + TTL * 4) {
            self.refused(at, id);
            return Ok(());
        }
        Err(format!("{:?}: {me} acts on {id} with epoch {epoch}, {holder} acted with {greatest} at {when:?}", self.now))
    }

    /// The position record takes no epoch below its own, and each epoch of one holder only: what runs ends, and its lease is
    /// written again.
    fn refused(&mut self, at: usize, id: &str) {
        self.all[at].runs.remove(id);
        let now = self.clock(at);
        self.all[at].machine.ended(now, id, Duration::from_secs(1));
        self.poll(at);
    }

    fn fault(&mut self) {
        if self.now > TROUBLE {
            return;
        }
        let at = self.rng.random_range(0..INSTANCES);
        let kind = self.rng.random_range(0..7);
        tracing::debug!(now = ?self.now, at, kind, "fault");
        match kind {
            0 => {
                self.all[at].cut = !self.all[at].cut;
                if !self.all[at].cut {
                    self.tell_all(at);
                }
            }
            1 => {
                self.all[at].frozen = true;
                let long = self.millis(100, 8_000);
                self.after(long, Step::Thaws(at));
            }
            2 => {
                let process = &mut self.all[at];
                process.alive = false;
                process.frozen = false;
                process.kept.clear();
                process.open.clear();
                process.runs.clear();
                let wait = self.millis(0, 10_000);
                self.after(wait, Step::Begins(at));
            }
            3 => {
                // An operator asks a leader to hand over.
                let id = self.ids[self.rng.random_range(0..self.ids.len())].clone();
                if let Some((_, Value::Lease(record))) = self.bucket.get(&format!("lease.{id}")).cloned()
                    && !record.instance.is_empty()
                {
                    self.put(format!("lease.{id}"), Value::Lease(LeaseRecord { step_down: true, ..record }));
                }
            }
            4 => {
                // Somebody removes a session by hand.
                self.put(format!("session.i{at}"), Value::Session(None));
                self.all[at].removed = Some(self.now);
            }
            5 => {
                // The bucket is recreated: it is empty, and its revisions begin at 1.
                (self.bucket, self.revision) = (BTreeMap::new(), 0);
                self.made += 1;
                self.remade = Some(self.now);
                self.all.iter_mut().for_each(|process| process.removed = Some(self.now));
            }
            _ => self.all[at].cut = true,
        }
        let next = self.millis(100, 4_000);
        self.after(next, Step::Fault);
    }

    fn put(&mut self, key: String, value: Value) -> u64 {
        self.revision += 1;
        let revision = self.revision;
        self.bucket.insert(key.clone(), (revision, value.clone()));
        for at in 0..self.all.len() {
            let began = self.all[at].began;
            // A watch delivers in order: no delivery overtakes another by much, and lost ones are repeated later.
            self.send(at, Step::Reaches(at, began, News::Changed(self.made, key.clone(), revision, value.clone())));
        }
        revision
    }

    fn tell_all(&mut self, at: usize) {
        let (began, made) = (self.all[at].began, self.made);
        for (key, (revision, value)) in self.bucket.clone() {
            self.after(Duration::from_millis(20), Step::Reaches(at, began, News::Changed(made, key, revision, value)));
        }
        self.after(Duration::from_millis(30), Step::Reaches(at, began, News::Loaded));
    }

    fn asked(&mut self, at: usize, began: u32, operation: u64, request: Request) {
        let news = match request {
            Request::Renew(record, revision) => {
                let key = format!("session.{}", record.instance);
                let found = match self.bucket.get(&key) {
                    Some((_, Value::Session(found))) => found.clone(),
                    _ => None,
                };
                let first = revision == 0;
                // It depends on an earlier read: a write of a session that is gone does not arrive after its successor.
                let successor = &self.all[at].record.session;
                let late =
                    record.session != *successor && found.as_ref().is_some_and(|found| found.session == *successor);
                match found {
                    _ if late => return,
                    Some(found) if found.session != record.session && !first => return,
                    None if !first => News::Renewed(RenewalOutcome::Removed, 0),
                    _ => {
                        let revision = self.put(key, Value::Session(Some(record)));
                        News::Renewed(RenewalOutcome::Confirmed, revision)
                    }
                }
            }
            Request::Look(instance) => match self.bucket.get(&format!("session.{instance}")) {
                Some((revision, Value::Session(record))) => News::Looked(instance, *revision, record.clone()),
                _ => News::Looked(instance, 0, None),
            },
            Request::Write(id, record, revision) => {
                let key = format!("lease.{id}");
                let there = match self.bucket.get(&key) {
                    Some((at, Value::Lease(found))) => (found.clone(), *at),
                    _ => (LeaseRecord::default(), 0),
                };
                if there.1 == revision {
                    let revision = self.put(key, Value::Lease(record.clone()));
                    News::Wrote(id, true, Some((record, revision)))
                } else {
                    News::Wrote(id, there.0 == record, Some(there))
                }
            }
        };
        self.send(at, Step::Answered(at, began, operation, news));
    }

    /// Asks the bucket; `otherwise` is what it is when no answer comes in time.
    fn ask(&mut self, at: usize, request: Request, wait: Duration, otherwise: News) {
        let began = self.all[at].began;
        self.count += 1;
        let operation = self.count;
        self.all[at].open.insert(operation);
        self.send(at, Step::Asked(at, began, operation, request));
        self.after(wait, Step::Answered(at, began, operation, otherwise));
    }

    fn reaches(&mut self, at: usize, news: News) {
        let now = self.clock(at);
        let Process { machine, heard, .. } = &mut self.all[at];
        match news {
            // A watch delivers nothing of the former bucket once it has delivered from the new one.
            News::Changed(made, ..) if made < *heard => {}
            News::Changed(made, key, revision, value) => {
                if made > std::mem::replace(heard, made) {
                    machine.anew();
                }
                match value {
                    Value::Session(record) => {
                        machine.session(now, key.trim_start_matches("session."), revision, record.as_ref());
                    }
                    Value::Lease(record) => {
                        machine.lease(now, key.trim_start_matches("lease."), revision, Some(record));
                    }
                }
            }
            News::Loaded => machine.loaded(),
            News::Renewed(outcome, revision) => {
                if outcome == RenewalOutcome::Confirmed {
                    self.all[at].revision = revision;
                }
                self.all[at].machine.renewed(now, outcome);
            }
            News::Looked(instance, revision, record) => machine.looked(now, &instance, revision, record.as_ref()),
            News::LookFailed(instance) => machine.look_failed(now, &instance),
            News::Wrote(id, done, found) => {
                if let Some(LeaseAction::Grant { id, epoch }) = machine.wrote(now, &id, done, found) {
                    self.all[at].runs.insert(id.clone(), epoch);
                    let (began, next) = (self.all[at].began, self.millis(0, 50));
                    self.after(next, Step::Acts(at, began, id, epoch));
                }
            }
        }
    }

    fn poll(&mut self, at: usize) {
        if !self.all[at].alive {
            return;
        }
        let now = self.clock(at);
        let began = self.all[at].began;
        for action in self.all[at].machine.poll(now) {
            match action {
                LeaseAction::Renew { session, nonce, leaving } => {
                    let process = &mut self.all[at];
                    if process.record.session != session {
                        process.revision = 0;
                    }
                    process.record = SessionRecord { session, nonce, leaving, ..process.record.clone() };
                    let request = Request::Renew(process.record.clone(), process.revision);
                    self.ask(at, request, TTL / 3, News::Renewed(RenewalOutcome::Failed, 0));
                }
                LeaseAction::Look(instance) => {
                    let failed = News::LookFailed(instance.clone());
                    self.ask(at, Request::Look(instance), Duration::from_secs(1), failed);
                }
                LeaseAction::Write { id, mut record, revision, take } => {
                    if let Some((acted, ..)) = self.acted.get(&id).filter(|_| take) {
                        // As the position record says, which outlives the lease.
                        record.epoch = record.epoch.max(acted + 1);
                    }
                    let failed = News::Wrote(id.clone(), false, None);
                    self.ask(at, Request::Write(id, record, revision), Duration::from_secs(1), failed);
                }
                LeaseAction::Grant { .. } => {}
                LeaseAction::Yield(id) => {
                    if let Some(epoch) = self.all[at].runs.get(&id).copied() {
                        let long = self.millis(0, 300);
                        self.after(long, Step::Ends(at, began, id, epoch));
                    }
                }
                LeaseAction::Revoke { id, .. } => {
                    self.all[at].runs.remove(&id);
                    self.all[at].machine.ended(now, &id, Duration::ZERO);
                }
            }
        }
        let next = self.all[at].machine.next(now).saturating_duration_since(now);
        // By its own clock; a little late is what clocks are, and never too often.
        self.all[at].polls += 1;
        let number = self.all[at].polls;
        self.after(next.max(Duration::from_millis(1)), Step::Poll(at, number));
    }
}

/// What the clock of an instance shows.
fn local(now: Duration, ahead: Duration, drift: i64) -> Duration {
    let micros = now.as_micros() as i64;
    ahead + Duration::from_micros((micros + micros * drift / 1_000_000) as u64)
}

#[test]
fn leases_hold_whatever_happens() {
    super::trace();
    for seed in super::seeds() {
        if let Err(error) = World::new(seed).run() {
            println!("seed {seed}: {error}");
            panic!("seed {seed} fails");
        }
    }
}
