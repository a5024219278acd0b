//! The rules of sessions and leases (no I/O, no clock): observations and results of writes are passed in with the time,
//! [`Machine::poll`] returns the actions.
//!
//! * A session holds a lease, and the lease is valid while that session is renewed. A session that was silent for its
//!   time to live, by our own clock, is read once more, because watches may stall, and then counts as ended.
//! * A holder of leases stops by itself when two thirds of that time have passed since it sent its last confirmed
//!   renewal: before another instance can take them, even if the clocks run at slightly different speeds.
//! * Each grant is based on a write of the lease with a greater epoch.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::placement;
use crate::store::{LeaseRecord, SessionRecord};

/// How long an instance must have been there before leases are handed over to it, and gone before the others share its
/// part: an instance that flaps moves nothing.
const SETTLED: Duration = Duration::from_secs(10);
/// Leases that may be handed over to other instances at the same time.
const HANDED_AT_ONCE: usize = 8;
/// Format of leases that this program writes. It never overwrites a lease of a newer format.
const VERSION: u32 = 1;
/// How long a lease that was handed over and came back stays at its instance.
const KEPT: Duration = Duration::from_secs(120);
/// Pause before a failed write is repeated.
const AGAIN: Duration = Duration::from_millis(200);

/// The settings that an instance is started with.
#[derive(Debug, Clone)]
pub struct LeaseSettings {
    /// Its `--instance`.
    pub instance: String,
    /// How long it may be silent before the others take its leases. 1 s to 1 h.
    pub ttl: Duration,
    /// The operator declared this the only instance: it takes all leases, and keeps them while the bucket is unreachable.
    pub standalone: bool,
}

/// An action for the driver.
#[derive(Debug, Clone, PartialEq)]
pub enum LeaseAction {
    /// Write our session record, with this session and nonce.
    Renew {
        /// Random; a new one after the previous session was lost.
        session: String,
        /// Grows with every renewal.
        nonce: u64,
        /// This instance takes no further leases.
        leaving: bool,
    },
    /// Read the session of an instance from the leader of the bucket.
    Look(String),
    /// Write a lease at its revision. With `take` it becomes ours, with an epoch above that of the position record.
    Write {
        /// Replication.
        id: String,
        /// What to write.
        record: LeaseRecord,
        /// Revision of the key.
        revision: u64,
        /// Whether it becomes ours.
        take: bool,
    },
    /// The replication may run here, with this epoch.
    Grant {
        /// Replication.
        id: String,
        /// Of the lease.
        epoch: u64,
    },
    /// The work under it has to end gracefully.
    Yield(String),
    /// What runs has to end at once.
    Revoke {
        /// Replication.
        id: String,
        /// Why.
        reason: String,
    },
}

/// The result of a renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenewalOutcome {
    /// The write was confirmed.
    Confirmed,
    /// Our session was removed.
    Removed,
    /// It failed, or its outcome is not known.
    Failed,
}

/// Sessions and leases as one instance knows them.
#[derive(Debug)]
pub struct Machine {
    settings: LeaseSettings,
    own: OwnSession,
    loaded: bool,
    others: BTreeMap<String, OtherInstance>,
    leases: BTreeMap<String, Lease>,
    /// The best instance for each wanted replication, and the instances that may take free leases.
    members: Places,
    electors: Places,
}

/// Our own session.
#[derive(Debug)]
struct OwnSession {
    session: String,
    nonce: u64,
    /// The renewal that is under way, and when it was sent.
    sent: Option<Instant>,
    /// When it was confirmed first.
    since: Option<Instant>,
    /// Until when we may lead.
    until: Option<Instant>,
    next: Instant,
    member: bool,
    /// The process is stopping: it releases its leases and takes none.
    leaving: bool,
    /// The last renewal that was sent says so.
    announced: bool,
}

/// Another instance.
#[derive(Debug)]
struct OtherInstance {
    /// Its session; `None` when it was removed.
    session: Option<String>,
    ttl: Duration,
    revision: u64,
    /// Its last sign of life.
    heard: Instant,
    /// Since when it has been present without a break.
    since: Instant,
    /// When it was found to be gone.
    ended: Option<Instant>,
    /// It is being read.
    looking: bool,
    /// Earliest time of the next read.
    look_at: Option<Instant>,
    /// Whether leases are to be placed there.
    member: bool,
    /// It announced that it takes no further leases.
    leaving: bool,
}

impl OtherInstance {
    fn is_alive(&self) -> bool {
        self.session.is_some() && self.ended.is_none()
    }

    /// Whether it takes a lease that is free.
    fn may_take(&self) -> bool {
        self.is_alive() && !self.leaving
    }

    /// Whether it has been present without a break for this long.
    fn was_there(&self, long: Duration) -> bool {
        self.heard.saturating_duration_since(self.since) >= long
    }
}

#[derive(Debug)]
struct Lease {
    record: LeaseRecord,
    revision: u64,
    /// Greatest epoch that was seen: a lease that is restored to an older value must not repeat an epoch.
    epoch: u64,
    /// When this revision was seen.
    seen: Instant,
    /// It existed when the bucket was first read.
    old: bool,
    /// Our configuration wants it to run.
    wanted: bool,
    role: LeaseRole,
    /// It has to be handed over before it may run here again.
    leaving: bool,
    /// It was handed over and came back: how long it stays.
    kept: Option<Instant>,
    handed: bool,
    /// Nothing is written before then.
    not_before: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaseRole {
    /// Nothing runs here.
    Idle,
    /// A write is under way, and nothing runs here.
    Writing { take: bool },
    /// Granted.
    Leading,
    /// The work was asked to end gracefully.
    Yielding,
    /// The work was ordered to end at once, and has not confirmed its end.
    Revoked,
}

/// The placement of replications on instances.
#[derive(Debug, Default)]
struct Places {
    instances: Vec<String>,
    best: HashMap<String, usize>,
    /// The replications have changed.
    stale: bool,
}

impl Places {
    fn of(&self, id: &str) -> Option<&str> {
        self.best.get(id).map(|at| self.instances[*at].as_str())
    }

    fn update(&mut self, instances: Vec<String>, leases: &BTreeMap<String, Lease>) {
        if !self.stale && instances == self.instances {
            return;
        }
        let wanted = leases.iter().filter(|(_, lease)| lease.wanted).map(|(id, _)| id.as_str());
        let names: Vec<&str> = instances.iter().map(String::as_str).collect();
        self.best = placement::place(wanted, &names).into_iter().map(|(id, at)| (id.to_owned(), at)).collect();
        self.instances = instances;
        self.stale = false;
    }
}

impl Machine {
    /// An instance that has seen nothing yet. `session` is random.
    pub fn new(settings: LeaseSettings, session: String, now: Instant) -> Self {
        let own = OwnSession {
            session,
            nonce: 0,
            sent: None,
            since: None,
            until: None,
            next: now,
            member: false,
            leaving: false,
            announced: false,
        };
        Self {
            settings,
            own,
            loaded: false,
            others: BTreeMap::new(),
            leases: BTreeMap::new(),
            members: Places::default(),
            electors: Places::default(),
        }
    }

    /// Until when work under our grants may run; `None` while none may.
    pub fn until(&self) -> Option<Instant> {
        self.own.until
    }

    /// From now on this instance takes no leases, and the others do not wait for it.
    pub fn leave(&mut self, now: Instant) {
        self.own.leaving = true;
        self.own.next = now;
    }

    /// Whether our session is being written, or a lease, or a lease is ours and not released.
    pub fn is_busy(&self) -> bool {
        self.own.sent.is_some()
            || self.leases.values().any(|lease| self.is_ours(lease) || lease.role != LeaseRole::Idle)
    }

    /// The bucket was recreated or restored: its entries follow, and their revisions cannot be compared with earlier ones.
    pub fn anew(&mut self) {
        self.leases.values_mut().for_each(|lease| lease.revision = 0);
        self.others.values_mut().for_each(|other| other.revision = 0);
    }

    /// The bucket has been read once.
    pub fn loaded(&mut self) {
        self.loaded = true;
    }

    /// The session of an instance, from the watch or a read.
    pub fn session(&mut self, now: Instant, instance: &str, revision: u64, record: Option<&SessionRecord>) {
        if instance == self.settings.instance {
            return;
        }
        let other = self.others.entry(instance.to_owned()).or_insert_with(|| OtherInstance {
            session: None,
            ttl: Duration::ZERO,
            revision: 0,
            heard: now,
            since: now,
            ended: None,
            looking: false,
            look_at: None,
            member: false,
            leaving: false,
        });
        // Not only greater ones: the revisions of a recreated bucket restart.
        if revision == other.revision {
            return;
        }
        other.revision = revision;
        let Some(record) = record else {
            other.session = None;
            other.ended.get_or_insert(now);
            return;
        };
        if other.session.as_ref() != Some(&record.session) || other.ended.is_some() {
            other.session = Some(record.session.clone());
            other.since = now;
            other.ended = None;
        }
        other.ttl = Duration::from_millis(record.ttl_ms);
        other.leaving = record.leaving;
        other.heard = now;
        other.look_at = None;
    }

    /// Reading a session failed: whether the instance is there is not known.
    pub fn look_failed(&mut self, now: Instant, instance: &str) {
        if let Some(other) = self.others.get_mut(instance) {
            other.looking = false;
            other.look_at = Some(now + AGAIN);
        }
    }

    /// Reading a session returned this revision of it.
    pub fn looked(&mut self, now: Instant, instance: &str, revision: u64, record: Option<&SessionRecord>) {
        self.session(now, instance, revision, record);
        if let Some(other) = self.others.get_mut(instance) {
            let silent = now.saturating_duration_since(other.heard) >= other.ttl;
            if other.looking && silent {
                other.ended.get_or_insert(now);
            }
            other.looking = false;
        }
    }

    /// The process of a session is known to be gone.
    pub fn gone(&mut self, now: Instant, instance: &str) {
        if let Some(other) = self.others.get_mut(instance) {
            other.ended.get_or_insert(now);
        }
    }

    /// The marker that the removal of a session left at this revision is gone, too.
    pub fn forget(&mut self, instance: &str, revision: u64) {
        if let Some(other) = self.others.get(instance)
            && other.session.is_none()
            && other.revision == revision
        {
            self.others.remove(instance);
        }
    }

    /// The entry at the key of a lease, from the watch.
    pub fn lease(&mut self, now: Instant, id: &str, revision: u64, record: Option<LeaseRecord>) {
        let (loaded, me) = (self.loaded, self.settings.instance.clone());
        let lease = self.entry(now, id);
        if revision <= lease.revision {
            return;
        }
        let record = record.unwrap_or_else(|| LeaseRecord { epoch: lease.record.epoch, ..LeaseRecord::default() });
        let (holder, session) = (record.instance.clone(), record.session.clone());
        lease.becomes(now, record, revision, &me);
        lease.old = !loaded;
        self.wrote_lease(now, &holder, &session, revision);
    }

    /// An instance that takes a lease is present, even if its session was not seen since.
    fn wrote_lease(&mut self, now: Instant, holder: &str, session: &str, revision: u64) {
        let Some(other) = self.others.get_mut(holder) else { return };
        if other.session.as_deref() == Some(session) && revision > other.revision {
            other.heard = now;
            if other.ended.take().is_some() {
                other.since = now;
            }
        }
    }

    fn entry(&mut self, now: Instant, id: &str) -> &mut Lease {
        self.leases.entry(id.to_owned()).or_insert_with(|| Lease {
            record: LeaseRecord::default(),
            revision: 0,
            epoch: 0,
            seen: now,
            old: false,
            wanted: false,
            role: LeaseRole::Idle,
            leaving: false,
            kept: None,
            handed: false,
            not_before: None,
        })
    }

    /// A replication was added: it may run here.
    pub fn want(&mut self, now: Instant, id: &str) {
        let lease = self.entry(now, id);
        lease.wanted = true;
        lease.not_before = None;
        self.members.stale = true;
        self.electors.stale = true;
    }

    /// A replication was deleted, and no longer runs here.
    pub fn unwant(&mut self, id: &str) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.wanted = false;
            lease.over();
        }
        self.members.stale = true;
        self.electors.stale = true;
    }

    /// The work under a grant has ended; the lease is not granted again before `pause` has passed.
    pub fn ended(&mut self, now: Instant, id: &str, pause: Duration) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.over();
            lease.not_before = Some(now + pause);
        }
    }

    /// The result of the renewal that was under way.
    pub fn renewed(&mut self, now: Instant, outcome: RenewalOutcome) {
        let Some(sent) = self.own.sent.take() else { return };
        match outcome {
            RenewalOutcome::Confirmed => {
                self.own.since.get_or_insert(sent);
                let until = match self.settings.standalone {
                    true => now + Duration::from_secs(u64::from(u32::MAX)),
                    false => sent + self.settings.ttl.mul_f64(2.0 / 3.0),
                };
                self.own.until = Some(until);
                let announced = self.own.announced == self.own.leaving;
                self.own.next = if announced { sent + self.settings.ttl / 4 } else { now };
            }
            // Other instances may have taken our leases since: we hold none any more.
            RenewalOutcome::Removed if !self.settings.standalone => {
                self.own.session = nats_lane::entropy::name();
                (self.own.since, self.own.until, self.own.next) = (None, None, now);
            }
            RenewalOutcome::Removed => self.own.next = now,
            RenewalOutcome::Failed => self.own.next = now + AGAIN.min(self.settings.ttl / 16),
        }
    }

    /// The result of a write of a lease, and the current entry if it is known.
    pub fn wrote(
        &mut self,
        now: Instant,
        id: &str,
        done: bool,
        found: Option<(LeaseRecord, u64)>,
    ) -> Option<LeaseAction> {
        let holds = self.own.until.is_some_and(|until| now < until);
        let session = self.own.session.clone();
        let lease = self.leases.get_mut(id)?;
        let LeaseRole::Writing { take } = lease.role else { return None };
        lease.role = LeaseRole::Idle;
        // An entry that was read back is from the stream leader: it counts even if its revision is lower, as in a recreated
        // bucket.
        if let Some((record, revision)) = found
            && (!done || revision > lease.revision)
        {
            lease.becomes(now, record, revision, &self.settings.instance);
        }
        if !done {
            lease.not_before = Some(now + AGAIN);
            let (record, revision) = (lease.record.clone(), lease.revision);
            self.wrote_lease(now, &record.instance, &record.session, revision);
            return None;
        }
        lease.leaving = false;
        if !take {
            return None;
        }
        // Another instance's write after ours was seen meanwhile.
        let ours = lease.record.session == session;
        if std::mem::take(&mut lease.handed) {
            lease.kept = Some(now + KEPT);
        }
        (lease.wanted && holds && ours).then(|| {
            lease.role = LeaseRole::Leading;
            LeaseAction::Grant { id: id.to_owned(), epoch: lease.record.epoch }
        })
    }

    /// Everything that is due.
    pub fn poll(&mut self, now: Instant) -> Vec<LeaseAction> {
        let mut actions = Vec::new();
        if self.own.sent.is_none() && now >= self.own.next {
            self.own.nonce += 1;
            self.own.sent = Some(now);
            self.own.announced = self.own.leaving;
            let OwnSession { session, nonce, leaving, .. } = &self.own;
            actions.push(LeaseAction::Renew { session: session.clone(), nonce: *nonce, leaving: *leaving });
        }
        for (instance, other) in &mut self.others {
            let silent = now.saturating_duration_since(other.heard) >= other.ttl;
            if silent && other.is_alive() && !other.looking && other.look_at.is_none_or(|at| now >= at) {
                other.looking = true;
                actions.push(LeaseAction::Look(instance.clone()));
            }
        }
        self.count_members(now);
        let mut handed = self.leases.values().filter(|lease| lease.role == LeaseRole::Yielding).count();
        let mut leases = std::mem::take(&mut self.leases);
        leases.retain(|id, lease| {
            actions.extend(self.decide(now, id, lease, &mut handed));
            // All others are neither known nor wanted any more.
            lease.wanted || lease.revision > 0 || lease.role != LeaseRole::Idle
        });
        self.leases = leases;
        actions
    }

    fn decide(&self, now: Instant, id: &str, lease: &mut Lease, handed: &mut usize) -> Option<LeaseAction> {
        let holds = self.own.until.is_some_and(|until| now < until);
        let ours = self.is_ours(lease);
        match lease.role {
            LeaseRole::Leading | LeaseRole::Yielding if !holds || !ours => {
                lease.role = LeaseRole::Revoked;
                let reason = match (holds, lease.record.instance.as_str()) {
                    (false, _) => "the session of this instance was not renewed in time".to_owned(),
                    (true, "") => format!("its lease was released by hand, with epoch {}", lease.record.epoch),
                    (true, by) => format!("instance `{by}` took over with epoch {}", lease.record.epoch),
                };
                Some(LeaseAction::Revoke { id: id.to_owned(), reason })
            }
            LeaseRole::Leading if lease.record.step_down || self.better_elsewhere(now, id, lease, *handed) => {
                *handed += 1;
                lease.role = LeaseRole::Yielding;
                lease.leaving = true;
                lease.handed = !lease.record.step_down;
                Some(LeaseAction::Yield(id.to_owned()))
            }
            LeaseRole::Idle if !holds || self.due_at(id, lease).is_none_or(|at| now < at) => None,
            LeaseRole::Idle if self.is_to_go(lease) => {
                let stepped_down = match lease.record.step_down {
                    true => self.settings.instance.clone(),
                    false => lease.record.stepped_down.clone(),
                };
                let (instance, session) = Default::default();
                let record = LeaseRecord { instance, session, step_down: false, stepped_down, ..lease.record.clone() };
                Some(lease.write(id, record, false))
            }
            LeaseRole::Idle => {
                let record = LeaseRecord {
                    version: VERSION,
                    instance: self.settings.instance.clone(),
                    session: self.own.session.clone(),
                    epoch: lease.epoch + 1,
                    step_down: false,
                    stepped_down: Some(lease.record.stepped_down.clone())
                        .filter(|instance| *instance != self.settings.instance)
                        .unwrap_or_default(),
                    other: lease.record.other.clone(),
                };
                Some(lease.write(id, record, true))
            }
            _ => None,
        }
    }

    fn is_ours(&self, lease: &Lease) -> bool {
        lease.record.instance == self.settings.instance && lease.record.session == self.own.session
    }

    /// Whether a lease is ours and is to be released.
    fn is_to_go(&self, lease: &Lease) -> bool {
        self.is_ours(lease) && (lease.leaving || !lease.wanted)
    }

    /// When a lease without running work has to be written; `None` while it is not wanted, or while another instance has it.
    fn due_at(&self, id: &str, lease: &Lease) -> Option<Instant> {
        let at = match self.is_ours(lease) {
            true => lease.seen,
            false if lease.wanted && !self.own.leaving => self.free_since(lease)? + self.patience(id, lease),
            false => return None,
        };
        Some(lease.not_before.map_or(at, |not_before| at.max(not_before)))
    }

    /// Since when the lease is free.
    fn free_since(&self, lease: &Lease) -> Option<Instant> {
        if !self.loaded || lease.record.version > VERSION {
            return None;
        }
        let holder = &lease.record.instance;
        if holder.is_empty() || *holder == self.settings.instance || (self.settings.standalone && lease.old) {
            return Some(lease.seen);
        }
        let Some(other) = self.others.get(holder) else {
            // The session of a holder whose lease was read first will follow.
            return Some(if lease.old { lease.seen } else { lease.seen + self.settings.ttl * 2 });
        };
        let held = other.session.as_ref() == Some(&lease.record.session);
        match other.ended {
            // Read from the leader of the bucket, which was purged: its holder has no session, and renews none unnoticed.
            Some(ended) if other.session.is_none() && other.revision == 0 => {
                Some(ended.max(lease.seen + self.settings.ttl))
            }
            Some(ended) if held || other.revision > lease.revision => Some(ended.max(lease.seen)),
            // Its process restarted. A session that is older than the lease is not its newest.
            None if !held && other.revision > lease.revision => Some(other.since.max(lease.seen)),
            _ => None,
        }
    }

    /// How long a free lease is left to instances that take precedence over this one.
    fn patience(&self, id: &str, lease: &Lease) -> Duration {
        let me = self.settings.instance.as_str();
        let step = (self.settings.ttl / 2).clamp(Duration::from_millis(500), Duration::from_secs(5));
        let gave = lease.record.stepped_down.as_str();
        if !gave.is_empty() {
            return self.patience_after(id, gave, step);
        }
        if !self.electors.instances.iter().any(|instance| instance == me) {
            return step * 2;
        }
        if self.electors.of(id) == Some(me) { Duration::ZERO } else { step }
    }

    /// The same for a lease that instance `gave` handed over by request: the other instances take precedence, `gave` is last.
    fn patience_after(&self, id: &str, gave: &str, step: Duration) -> Duration {
        let me = self.settings.instance.as_str();
        let electors = || self.electors.instances.iter().map(String::as_str).filter(|instance| *instance != gave);
        // After a request, an instance that has not settled yet is better than the one that handed it over.
        let alive = self.others.iter().filter(|(_, other)| other.may_take()).map(|(instance, _)| instance.as_str());
        let present = alive.chain((!self.own.leaving).then_some(me)).filter(|instance| *instance != gave);
        let first = match self.electors.of(id).filter(|best| *best != gave) {
            Some(best) => Some(best),
            None => placement::first(id, electors()).or_else(|| placement::first(id, present)),
        };
        match first {
            None => Duration::ZERO,
            Some(first) if first == me => Duration::ZERO,
            Some(_) if me == gave || !electors().any(|instance| instance == me) => step * 2,
            Some(_) => step,
        }
    }

    /// Whether a lease of ours has to move to the best instance for it.
    fn better_elsewhere(&self, now: Instant, id: &str, lease: &Lease, handed: usize) -> bool {
        let Some(best) = self.members.of(id).filter(|best| *best != self.settings.instance) else { return false };
        let settled = |other: &OtherInstance| other.may_take() && other.was_there(self.settled());
        handed < HANDED_AT_ONCE
            && lease.kept.is_none_or(|until| now >= until)
            && !self.settings.standalone
            && lease.record.stepped_down != best
            && self.others.get(best).is_some_and(settled)
    }

    fn settled(&self) -> Duration {
        SETTLED.max(self.settings.ttl)
    }

    /// The instances that leases are placed on, and those that may take free leases.
    fn count_members(&mut self, now: Instant) {
        let settled = self.settled();
        let long = |since: Instant| now.saturating_duration_since(since) >= settled;
        self.own.member |= self.own.since.is_some_and(long);
        let me = (self.settings.instance.clone(), self.own.member, !self.own.leaving);
        for other in self.others.values_mut() {
            match other.ended {
                None => other.member |= other.was_there(settled),
                Some(ended) => other.member &= !long(ended),
            }
        }
        let others = self.others.iter().map(|(instance, other)| (instance.clone(), other.member, other.may_take()));
        let mut all: Vec<(String, bool, bool)> = others.chain([me]).collect();
        all.sort_unstable();
        let names = |pick: fn(&(String, bool, bool)) -> bool| -> Vec<String> {
            all.iter().filter(|entry| pick(entry)).map(|(instance, ..)| instance.clone()).collect()
        };
        let mut electors = names(|(_, member, alive)| *member && *alive);
        if electors.is_empty() {
            electors = names(|(_, _, alive)| *alive);
        }
        if self.members.instances != names(|(_, member, _)| *member) {
            // The group changed: a lease that came back once may be handed over now.
            self.leases.values_mut().for_each(|lease| lease.kept = None);
        }
        self.members.update(names(|(_, member, _)| *member), &self.leases);
        self.electors.update(electors, &self.leases);
    }

    /// When [`Machine::poll`] has something to do even without new observations; that may be in the past.
    pub fn next(&self, now: Instant) -> Instant {
        let mut next = self.own.next;
        if self.own.sent.is_some() {
            // The renewal decides; before it, only work that ends by itself is due.
            next = now + self.settings.ttl;
        }
        let mut due = |at: Option<Instant>| next = at.map_or(next, |at| next.min(at));
        let runs = |lease: &Lease| matches!(lease.role, LeaseRole::Leading | LeaseRole::Yielding);
        due(self.own.until.filter(|until| now < *until || self.leases.values().any(runs)));
        let settled = self.settled();
        due(self.own.since.filter(|_| !self.own.member).map(|since| since + settled));
        for other in self.others.values() {
            if other.is_alive() {
                let silent = other.heard + other.ttl;
                due(Some(silent.max(other.look_at.unwrap_or(silent))).filter(|_| !other.looking));
            } else {
                due(other.ended.filter(|_| other.member).map(|ended| ended + settled));
            }
        }
        if self.own.until.is_some_and(|until| now < until) {
            for (id, lease) in &self.leases {
                due(lease.kept.filter(|until| lease.role == LeaseRole::Leading && *until > now));
                if lease.role == LeaseRole::Idle {
                    due(self.due_at(id, lease));
                }
            }
        }
        next
    }
}

impl Lease {
    /// The entry has another revision.
    fn becomes(&mut self, now: Instant, record: LeaseRecord, revision: u64, me: &str) {
        if !record.instance.is_empty() && record.instance != me {
            (self.handed, self.kept) = (false, None);
        }
        self.epoch = self.epoch.max(record.epoch);
        self.record = record;
        self.revision = revision;
        self.seen = now;
        self.old = false;
    }

    fn over(&mut self) {
        if !matches!(self.role, LeaseRole::Writing { .. }) {
            self.role = LeaseRole::Idle;
        }
    }

    fn write(&mut self, id: &str, record: LeaseRecord, take: bool) -> LeaseAction {
        self.role = LeaseRole::Writing { take };
        LeaseAction::Write { id: id.to_owned(), record, revision: self.revision, take }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(3);
    const EPSILON: Duration = Duration::from_millis(1);

    /// One instance, `me`, and a bucket in which every write of it works.
    struct Bench {
        machine: Machine,
        now: Instant,
        revision: u64,
        /// Renewals are answered.
        answers: bool,
        /// Nothing is left of the sessions of others.
        purged: bool,
        granted: Vec<(String, u64)>,
        yielded: Vec<String>,
        revoked: Vec<String>,
        looked: Vec<String>,
        written: Vec<LeaseRecord>,
    }

    impl Bench {
        fn new(standalone: bool) -> Self {
            let now = Instant::now();
            let settings = LeaseSettings { instance: "me".to_owned(), ttl: TTL, standalone };
            Self {
                machine: Machine::new(settings, "mine".to_owned(), now),
                now,
                revision: 0,
                answers: true,
                purged: false,
                granted: Vec::new(),
                yielded: Vec::new(),
                revoked: Vec::new(),
                looked: Vec::new(),
                written: Vec::new(),
            }
        }

        /// With the bucket read and one replication wanted.
        fn ready() -> Self {
            let mut bench = Self::new(false);
            bench.machine.loaded();
            bench.machine.want(bench.now, "R");
            bench
        }

        fn session(&mut self, instance: &str, session: &str) {
            self.revision += 1;
            let record = record(instance, session);
            self.machine.session(self.now, instance, self.revision, Some(&record));
        }

        fn lease(&mut self, instance: &str, session: &str, epoch: u64) {
            self.revision += 1;
            let record = lease(instance, session, epoch);
            self.machine.lease(self.now, "R", self.revision, Some(record));
        }

        /// Lets so much time pass, in which others renew their sessions.
        fn pass(&mut self, time: Duration, others: &[(&str, &str)]) {
            let end = self.now + time;
            let mut renew = self.now + TTL / 4;
            loop {
                self.poll();
                let next = self.machine.next(self.now).min(renew).max(self.now + EPSILON);
                if next > end {
                    break;
                }
                self.now = next;
                if self.now >= renew {
                    renew += TTL / 4;
                    others.iter().for_each(|(instance, session)| self.session(instance, session));
                }
            }
            self.now = end;
            self.poll();
        }

        fn poll(&mut self) {
            // What it does leads to more.
            for _ in 0..10 {
                for action in self.machine.poll(self.now) {
                    self.act(action);
                }
            }
        }

        fn act(&mut self, action: LeaseAction) {
            match action {
                LeaseAction::Renew { .. } if self.answers => {
                    self.revision += 1;
                    self.machine.renewed(self.now, RenewalOutcome::Confirmed);
                }
                LeaseAction::Renew { .. } => self.machine.renewed(self.now, RenewalOutcome::Failed),
                LeaseAction::Look(instance) if self.purged => {
                    self.machine.looked(self.now, &instance, 0, None);
                    self.looked.push(instance);
                }
                LeaseAction::Look(instance) => {
                    let revision = self.machine.others[&instance].revision;
                    let found =
                        record(&instance, self.machine.others[&instance].session.as_deref().unwrap_or_default());
                    self.machine.looked(self.now, &instance, revision, Some(&found));
                    self.looked.push(instance);
                }
                LeaseAction::Write { id, record, revision, .. } => {
                    assert_eq!(revision, self.machine.leases[&id].revision);
                    self.revision += 1;
                    self.written.push(record.clone());
                    let found = Some((record, self.revision));
                    if let Some(grant) = self.machine.wrote(self.now, &id, true, found) {
                        self.act(grant);
                    }
                }
                LeaseAction::Grant { id, epoch } => self.granted.push((id, epoch)),
                LeaseAction::Yield(id) => {
                    self.machine.ended(self.now, &id, Duration::ZERO);
                    self.yielded.push(id);
                }
                LeaseAction::Revoke { id, .. } => {
                    self.machine.ended(self.now, &id, Duration::ZERO);
                    self.revoked.push(id);
                }
            }
        }

        fn grants(&self) -> Vec<u64> {
            self.granted.iter().map(|(_, epoch)| *epoch).collect()
        }
    }

    fn record(instance: &str, session: &str) -> SessionRecord {
        let (instance, session) = (instance.to_owned(), session.to_owned());
        SessionRecord { instance, session, ttl_ms: TTL.as_millis() as u64, ..SessionRecord::default() }
    }

    fn lease(instance: &str, session: &str, epoch: u64) -> LeaseRecord {
        let (instance, session) = (instance.to_owned(), session.to_owned());
        LeaseRecord { version: 1, instance, session, epoch, ..LeaseRecord::default() }
    }

    /// One whose outcome is not known is read back: an older one must not be taken for it.
    #[test]
    fn no_two_renewals_are_the_same() {
        let mut bench = Bench::ready();
        let mut nonces = Vec::new();
        while nonces.len() < 5 {
            for action in bench.machine.poll(bench.now) {
                if let LeaseAction::Renew { nonce, .. } = action {
                    nonces.push(nonce);
                    bench.machine.renewed(bench.now, RenewalOutcome::Failed);
                }
            }
            bench.now += TTL / 8;
        }
        let different: std::collections::BTreeSet<u64> = nonces.iter().copied().collect();
        assert_eq!(different.len(), nonces.len(), "{nonces:?}");
    }

    #[test]
    fn the_lease_of_a_holder_whose_session_was_purged_is_taken() {
        let mut bench = Bench::ready();
        bench.session("other", "theirs");
        bench.lease("other", "theirs", 7);
        bench.purged = true;
        bench.pass(TTL - EPSILON, &[]);
        assert!(bench.grants().is_empty() && bench.looked.is_empty());
        bench.pass(TTL * 3, &[]);
        assert_eq!(bench.grants(), [8]);
    }

    #[test]
    fn a_free_lease_is_taken_after_reading_with_a_session() {
        let mut bench = Bench::new(false);
        bench.machine.want(bench.now, "R");
        bench.answers = false;
        bench.pass(TTL, &[]);
        bench.answers = true;
        bench.pass(TTL, &[]);
        assert_eq!(bench.written, []);
        bench.machine.loaded();
        bench.poll();
        assert_eq!(bench.written, [lease("me", "mine", 1)]);
        assert_eq!(bench.grants(), [1]);
    }

    #[test]
    fn a_leader_stops_at_two_thirds_and_restarts_with_a_new_epoch() {
        let mut bench = Bench::ready();
        bench.poll();
        assert_eq!(bench.machine.until(), Some(bench.now + Duration::from_secs(2)));
        bench.answers = false;
        bench.pass(Duration::from_secs(2) - EPSILON, &[]);
        assert!(bench.revoked.is_empty());
        bench.pass(EPSILON, &[]);
        assert_eq!(bench.revoked, ["R"]);
        bench.pass(TTL, &[]);
        assert_eq!(bench.grants(), [1]);
        bench.answers = true;
        bench.pass(TTL, &[]);
        assert_eq!(bench.grants(), [1, 2]);
    }

    #[test]
    fn a_silent_session_is_checked_before_its_leases_are_free() {
        let mut bench = Bench::ready();
        bench.session("other", "s");
        bench.lease("other", "s", 7);
        bench.pass(TTL - EPSILON, &[]);
        assert!(bench.looked.is_empty() && bench.written.is_empty());
        bench.pass(EPSILON, &[]);
        assert_eq!(bench.looked, ["other"]);
        // No list has the other one first any more.
        assert_eq!(bench.grants(), [8]);
    }

    #[test]
    fn who_is_found_to_be_there_by_a_look_keeps_its_leases() {
        let mut bench = Bench::ready();
        bench.session("other", "s");
        bench.lease("other", "s", 7);
        bench.poll();
        bench.now += TTL;
        let actions = bench.machine.poll(bench.now);
        assert!(actions.contains(&LeaseAction::Look("other".to_owned())), "{actions:?}");
        actions
            .into_iter()
            .filter(|action| !matches!(action, LeaseAction::Look(_)))
            .for_each(|action| bench.act(action));
        bench.machine.looked(bench.now, "other", bench.revision + 1, Some(&record("other", "s")));
        bench.pass(TTL - EPSILON, &[]);
        assert!(bench.granted.is_empty());
        bench.machine.look_failed(bench.now, "other");
        bench.pass(AGAIN, &[]);
        assert_eq!(bench.grants(), [8]);
    }

    #[test]
    fn a_released_lease_or_one_of_a_new_session_is_taken_at_once() {
        for (instance, session) in [("", ""), ("me", "mine before"), ("other", "before"), ("removed", "x")] {
            let mut bench = Bench::ready();
            bench.machine.loaded = false;
            bench.lease(instance, session, 3);
            bench.session("other", "now");
            bench.revision += 1;
            bench.machine.session(bench.now, "removed", bench.revision, None);
            bench.machine.loaded();
            bench.pass(EPSILON, &[]);
            // Other instances might take precedence.
            bench.pass(TTL / 2, &[("other", "now")]);
            assert_eq!(bench.grants(), [4], "{instance} {session}");
        }
    }

    #[test]
    fn a_lease_of_a_session_that_was_not_heard_of_yet_is_not_free() {
        for known in [false, true] {
            let mut bench = Bench::ready();
            bench.poll();
            if known {
                bench.session("new", "older");
            }
            bench.lease("new", "newer", 9);
            bench.pass(TTL / 2, &[]);
            assert_eq!((bench.revoked.len(), bench.grants()), (1, vec![1]), "{known}");
            bench.pass(TTL * 4, &[("new", "newer")]);
            assert_eq!(bench.grants(), [1], "{known}");
        }
    }

    #[test]
    fn who_takes_a_lease_is_there_though_its_session_was_silent() {
        let mut bench = Bench::ready();
        bench.session("other", "s");
        bench.lease("other", "s", 1);
        bench.pass(TTL, &[]);
        assert_eq!(bench.grants(), [2]);
        bench.lease("other", "s", 3);
        bench.pass(TTL - EPSILON, &[]);
        assert_eq!((bench.revoked.len(), bench.grants()), (1, vec![2]));
        bench.pass(EPSILON, &[]);
        assert_eq!((bench.looked.len(), bench.grants()), (2, vec![2, 4]));
    }

    #[test]
    fn an_instance_without_a_session_is_forgotten() {
        let mut bench = Bench::ready();
        bench.session("other", "s");
        bench.machine.forget("other", bench.revision);
        assert_eq!(bench.machine.others.len(), 1);
        bench.revision += 1;
        let removed = bench.revision;
        bench.machine.session(bench.now, "other", removed, None);
        bench.session("other", "t");
        bench.machine.forget("other", removed);
        assert!(bench.machine.others["other"].is_alive());
        bench.revision += 1;
        bench.machine.session(bench.now, "other", bench.revision, None);
        bench.machine.forget("other", bench.revision);
        assert!(bench.machine.others.is_empty());
        // Its leases are free.
        bench.lease("other", "t", 3);
        bench.pass(TTL * 3, &[]);
        assert_eq!(bench.grants(), [4]);
    }

    #[test]
    fn a_restored_lease_repeats_no_epoch() {
        let mut bench = Bench::ready();
        bench.lease("", "", 4);
        bench.poll();
        bench.lease("", "", 2);
        bench.poll();
        bench.pass(TTL, &[]);
        assert_eq!((bench.grants(), bench.revoked.len()), (vec![5, 6], 1));
    }

    #[test]
    fn a_lease_of_a_newer_format_is_left_alone() {
        let mut bench = Bench::ready();
        bench.revision += 1;
        let newer = LeaseRecord { version: VERSION + 1, ..LeaseRecord::default() };
        bench.machine.lease(bench.now, "R", bench.revision, Some(newer));
        bench.pass(TTL * 10, &[]);
        assert_eq!(bench.written, []);
    }

    #[test]
    fn a_process_that_is_known_to_be_gone_keeps_nothing() {
        let mut bench = Bench::ready();
        bench.session("other", "s");
        bench.lease("other", "s", 1);
        bench.machine.gone(bench.now, "other");
        bench.poll();
        assert_eq!(bench.grants(), [2]);
    }

    /// A replication that is best placed at `best`, of the two.
    fn best_at(best: &str) -> String {
        let of = |n: u32| format!("R{n}");
        let at = |id: &String| placement::place([id.as_str()], &["me", "other"])[id.as_str()];
        let wanted = usize::from(best == "other");
        (0..100).map(of).find(|id| at(id) == wanted).expect("one of so many")
    }

    #[test]
    fn a_lease_moves_once_the_better_instance_has_settled() {
        let id = best_at("other");
        let mut bench = Bench::new(false);
        bench.machine.loaded();
        bench.machine.want(bench.now, &id);
        bench.pass(SETTLED * 2, &[]);
        assert_eq!(bench.grants(), [1]);
        bench.session("other", "s");
        bench.pass(SETTLED - EPSILON, &[("other", "s")]);
        assert!(bench.yielded.is_empty());
        bench.pass(TTL / 4, &[("other", "s")]);
        assert_eq!((bench.yielded.len(), bench.written.last().unwrap().instance.as_str()), (1, ""));
        // No instance takes it: it comes back, and stays.
        bench.pass(SETTLED * 2, &[("other", "s")]);
        assert_eq!((bench.yielded.len(), bench.grants()), (1, vec![1, 2]));
        bench.pass(KEPT, &[("other", "s")]);
        assert_eq!((bench.yielded.len(), bench.grants()), (2, vec![1, 2, 3]));
    }

    #[test]
    fn nothing_is_handed_to_one_that_comes_and_goes() {
        let id = best_at("other");
        let mut bench = Bench::new(false);
        bench.machine.loaded();
        bench.machine.want(bench.now, &id);
        bench.pass(SETTLED * 2, &[]);
        for round in 0..5 {
            let session = format!("s{round}");
            bench.session("other", &session);
            bench.pass(SETTLED - Duration::from_secs(1), &[("other", &session)]);
            bench.pass(TTL * 2, &[]);
        }
        assert!(bench.yielded.is_empty());
    }

    #[test]
    fn a_bucket_that_was_made_anew_is_believed() {
        let mut bench = Bench::ready();
        bench.revision = 1_000;
        bench.session("other", "s");
        bench.lease("other", "s", 5);
        bench.poll();
        bench.revision = 0;
        bench.machine.anew();
        bench.session("other", "t");
        bench.lease("other", "t", 6);
        bench.pass(TTL * 2, &[("other", "t")]);
        assert_eq!(bench.grants(), [0; 0]);
        bench.lease("", "", 6);
        bench.pass(TTL, &[("other", "t")]);
        assert_eq!(bench.grants(), [7]);

        // An instance that was gone and is back holds the leases that it took, even if its session is not seen.
        let mut bench = Bench::ready();
        bench.revision = 1_000;
        bench.session("other", "s");
        bench.machine.session(bench.now, "other", 1_001, None);
        bench.revision = 7;
        bench.machine.anew();
        bench.lease("other", "t", 6);
        bench.pass(TTL - EPSILON, &[]);
        assert_eq!(bench.grants(), [0; 0]);
    }

    #[test]
    fn who_hands_over_by_request_is_the_last_to_take_it_back() {
        let stepped_down = |others: &[(&str, &str)]| {
            let mut bench = Bench::ready();
            bench.poll();
            others.iter().for_each(|(other, session)| bench.session(other, session));
            let asked = LeaseRecord { step_down: true, ..bench.written[0].clone() };
            bench.revision += 1;
            bench.machine.lease(bench.now, "R", bench.revision, Some(asked));
            bench
        };
        let other = [("other", "s")];
        let mut bench = stepped_down(&other);
        bench.pass(TTL - EPSILON, &other);
        let released = bench.written.last().unwrap();
        assert_eq!((released.instance.as_str(), released.stepped_down.as_str()), ("", "me"));
        assert!(!released.step_down);
        assert_eq!(bench.grants(), [1]);
        bench.pass(EPSILON, &other);
        assert_eq!((bench.grants(), bench.written.last().unwrap().stepped_down.as_str()), (vec![1, 2], ""));

        // A single instance waits for no other.
        let mut bench = stepped_down(&[]);
        bench.pass(EPSILON, &[]);
        assert_eq!(bench.grants(), [1, 2]);
    }

    /// A replication that is best placed at `best` of the three, and then at `second`.
    fn best_at_and_then_at(best: &str, second: &str) -> String {
        let ranked = |id: &String| {
            let rest = ["me", "other", "third"].into_iter().filter(|instance| *instance != best);
            placement::first(id, ["me", "other", "third"].into_iter()) == Some(best)
                && placement::first(id, rest) == Some(second)
        };
        (0..200).map(|n| format!("R{n}")).find(ranked).expect("one of so many")
    }

    #[test]
    fn the_next_best_instance_takes_a_handed_over_lease_at_once() {
        let others = [("other", "s"), ("third", "t")];
        for (second, expect) in [("me", vec![2]), ("third", vec![])] {
            let id = best_at_and_then_at("other", second);
            let mut bench = Bench::new(false);
            bench.machine.loaded();
            bench.machine.want(bench.now, &id);
            others.iter().for_each(|(instance, session)| bench.session(instance, session));
            bench.revision += 1;
            bench.machine.lease(bench.now, &id, bench.revision, Some(lease("other", "s", 1)));
            bench.pass(SETTLED * 2, &others);
            let given = LeaseRecord { stepped_down: "other".to_owned(), ..lease("", "", 1) };
            bench.revision += 1;
            bench.machine.lease(bench.now, &id, bench.revision, Some(given));
            bench.poll();
            assert_eq!(bench.grants(), expect, "second is {second}");
            // It is next after the instance that takes precedence and did not take it.
            bench.pass(TTL / 2, &others);
            assert_eq!(bench.grants(), [2], "second is {second}");
        }
    }

    #[test]
    fn a_request_hands_over_to_an_instance_that_has_just_come() {
        let id = best_at("other");
        for (gave, expect) in [("me", vec![1]), ("other", vec![1, 2])] {
            let mut bench = Bench::new(false);
            bench.machine.loaded();
            bench.machine.want(bench.now, &id);
            bench.pass(SETTLED * 2, &[]);
            assert_eq!(bench.grants(), [1]);
            bench.session("other", "s");
            let given = LeaseRecord { stepped_down: gave.to_owned(), ..lease("", "", 1) };
            bench.revision += 1;
            bench.machine.lease(bench.now, &id, bench.revision, Some(given));
            bench.pass(TTL / 2, &[("other", "s")]);
            assert_eq!(bench.grants(), expect, "given by {gave}");
        }
    }

    #[test]
    fn nobody_waits_for_an_instance_that_is_leaving() {
        let id = best_at("other");
        let mut bench = Bench::new(false);
        bench.machine.loaded();
        bench.machine.want(bench.now, &id);
        bench.session("other", "s");
        bench.revision += 1;
        bench.machine.lease(bench.now, &id, bench.revision, Some(lease("other", "s", 1)));
        bench.pass(SETTLED * 2, &[("other", "s")]);
        bench.revision += 1;
        let leaving = SessionRecord { leaving: true, ..record("other", "s") };
        bench.machine.session(bench.now, "other", bench.revision, Some(&leaving));
        bench.poll();
        assert!(bench.grants().is_empty(), "what it still has stays its own");
        bench.revision += 1;
        bench.machine.lease(bench.now, &id, bench.revision, Some(lease("", "", 1)));
        bench.poll();
        assert_eq!(bench.grants(), [2]);
    }

    #[test]
    fn an_instance_that_is_leaving_announces_it_and_takes_nothing() {
        let mut bench = Bench::ready();
        let renewals = |actions: &[LeaseAction]| -> Vec<bool> {
            let leaving = |action: &LeaseAction| match action {
                LeaseAction::Renew { leaving, .. } => Some(*leaving),
                _ => None,
            };
            actions.iter().filter_map(leaving).collect()
        };
        // Also where a renewal is in flight.
        assert_eq!(renewals(&bench.machine.poll(bench.now)), [false]);
        bench.machine.leave(bench.now);
        bench.machine.renewed(bench.now, RenewalOutcome::Confirmed);
        assert_eq!(renewals(&bench.machine.poll(bench.now)), [true]);
        bench.machine.renewed(bench.now, RenewalOutcome::Confirmed);
        bench.pass(TTL * 4, &[]);
        assert!(bench.granted.is_empty(), "{:?}", bench.granted);
    }

    #[test]
    fn who_stands_alone_takes_what_it_finds_and_keeps_it_in_silence() {
        let mut bench = Bench::new(true);
        bench.machine.want(bench.now, "R");
        bench.session("other", "s");
        bench.lease("other", "s", 4);
        bench.machine.loaded();
        bench.pass(TTL * 2, &[("other", "s")]);
        assert_eq!(bench.grants(), [5]);
        bench.answers = false;
        bench.pass(TTL * 100, &[("other", "s")]);
        assert!(bench.revoked.is_empty());
        // Despite the declaration, another instance exists and took it.
        bench.lease("other", "s", 6);
        bench.pass(TTL, &[("other", "s")]);
        assert_eq!((bench.revoked.len(), bench.grants()), (1, vec![5]));
    }

    #[test]
    fn an_unwanted_lease_is_released_a_removed_one_is_lost() {
        let mut bench = Bench::ready();
        bench.poll();
        bench.machine.unwant("R");
        bench.poll();
        assert_eq!(bench.written.last(), Some(&lease("", "", 1)));
        assert!(!bench.machine.is_busy());
        bench.machine.want(bench.now, "R");
        bench.poll();
        assert_eq!(bench.grants(), [1, 2]);
        let actions = bench.machine.poll(bench.now + TTL / 4);
        assert_eq!(actions.len(), 1, "{actions:?}");
        bench.machine.renewed(bench.now, RenewalOutcome::Removed);
        bench.poll();
        assert_eq!(bench.revoked, ["R"]);
        bench.poll();
        assert_eq!(bench.grants(), [1, 2, 3]);
    }
}
