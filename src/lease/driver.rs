//! Brings the machine what is seen in the lease bucket, and does what it says.

use std::{collections::HashMap, fmt, time::Duration};

use chrono::SubsecRound;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use nats_lane::entropy;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, info, warn};

use super::{
    grant::{Grant, Validity},
    machine::{Action, Machine, Renewal, Settings},
    process::{self, Identity},
    sessions::Sessions,
};
use crate::{
    boottime,
    store::{Error, LeaseChange, LeaseRecord, LeaseStore, PositionStore, SessionRecord, Trouble, Written, follow},
};

/// How often what others left is cleared away.
const CLEAR_EVERY: Duration = Duration::from_secs(15);
/// Deadline for releases and the last announcements.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Enters the group. Leases are held from now on, until [`Driver::stop`].
pub fn start(
    store: LeaseStore,
    positions: PositionStore,
    identity: Identity,
    ttl: Duration,
    standalone: bool,
) -> (Leases, Driver) {
    let stop = CancellationToken::new();
    let (leases, work) = enter(store, positions, identity, ttl, standalone, stop.clone());
    (leases.clone(), Driver { leases, stop, task: tokio::spawn(work) })
}

/// Enters the group as [`start`] does, without a task of its own: leases are held while the future is polled. It ends
/// when this instance may do nothing more, and says why, or some time after the stop.
pub fn enter(
    store: LeaseStore,
    positions: PositionStore,
    identity: Identity,
    ttl: Duration,
    standalone: bool,
    stop: CancellationToken,
) -> (Leases, impl Future<Output = Option<String>> + Send) {
    let now = boottime::now();
    let session = entropy::name();
    let settings = Settings { instance: identity.instance.clone(), ttl, standalone };
    let record = SessionRecord {
        version: 1,
        instance: identity.instance,
        session: session.clone(),
        ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
        host: identity.host,
        pid: identity.pid,
        process: identity.mark,
        program: identity.program,
        started: entropy::now().trunc_subsecs(3),
        nonce: 0,
        leaving: false,
        other: Default::default(),
    };
    let (commands, asked) = mpsc::unbounded_channel();
    let (tell, changes) = mpsc::unbounded_channel();
    let watched = store.clone();
    let follower = tokio::spawn(follow(
        "the leases are not watched",
        async move || watched.watch().await,
        move |change| _ = tell.send(change),
    ));
    let (sessions, view) = watch::channel(Sessions::default());
    let term = Validity::new(now);
    let leases = Leases { commands, sessions: view, store: store.clone(), term: term.clone() };
    let work = DriverTask {
        machine: Machine::new(settings, session, now),
        limit: (ttl / 3).max(Duration::from_millis(300)),
        store,
        positions,
        record,
        revision: None,
        confirmed: None,
        term,
        slots: HashMap::new(),
        operations: FuturesUnordered::new(),
        asked,
        changes,
        sessions,
        trouble: Trouble::new("others do not hear of this instance"),
        next_clear: now + CLEAR_EVERY,
        _follower: AbortOnDropHandle::new(follower),
    };
    (leases, work.run(stop))
}

/// The running driver, for the one who stops it.
#[derive(Debug)]
pub struct Driver {
    leases: Leases,
    stop: CancellationToken,
    task: JoinHandle<Option<String>>,
}

impl Driver {
    /// Waits until this instance may do nothing more, and says why. Without a reason it never is.
    pub async fn ended(&mut self) -> String {
        match (&mut self.task).await {
            Ok(reason) => reason.unwrap_or_else(|| "the leases are not looked after any more".to_owned()),
            Err(panic) => format!("the leases are not looked after any more: {panic}"),
        }
    }

    /// Announces the stop, see [`Leases::leave`].
    pub fn leave(&self) {
        self.leases.leave();
    }

    /// Releases what is held, and removes the session. What runs under a grant must have ended.
    pub async fn stop(self) {
        self.stop.cancel();
        if !self.task.is_finished() {
            let _ = timeout(LAST_WORDS * 2, self.task).await;
        }
    }
}

/// What others may ask of the leases; cheap to clone.
#[derive(Clone)]
pub struct Leases {
    commands: mpsc::UnboundedSender<DriverCommand>,
    sessions: watch::Receiver<Sessions>,
    store: LeaseStore,
    term: Validity,
}

impl fmt::Debug for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leases")
    }
}

impl Leases {
    /// From now on a replication may run here, when it is granted.
    pub fn seat(&self, id: &str) -> Candidacy {
        let (sender, grants) = watch::channel(None);
        let _ = self.commands.send(DriverCommand::Want { id: id.to_owned(), sender });
        Candidacy { id: id.to_owned(), commands: self.commands.clone(), grants, last: 0 }
    }

    /// Announces that this process stops: it takes no further leases, and the others do not wait for it. Running copies
    /// continue until their grants are given up.
    pub fn leave(&self) {
        let _ = self.commands.send(DriverCommand::Leave);
    }

    /// Whether what is granted here may run now.
    pub fn hold(&self) -> bool {
        self.term.holds_now()
    }

    /// Processes that were heard of.
    pub fn sessions(&self) -> watch::Ref<'_, Sessions> {
        self.sessions.borrow()
    }

    /// Asks whoever has the lease of a replication to hand over; returns who that is, or `None` if nobody has it.
    pub async fn step_down(&self, id: &str) -> Result<Option<String>, Error> {
        loop {
            let (record, revision) = self.store.lease(id).await?;
            let Some(record) = record.filter(|record| !record.instance.is_empty()) else { return Ok(None) };
            let asked = LeaseRecord { step_down: true, ..record };
            if let Written::Done(_) = self.store.put_lease(id, &asked, revision).await? {
                return Ok(Some(asked.instance));
            }
        }
    }

    /// Revision of the lease of a replication, read from the leader of the bucket.
    pub async fn revision(&self, id: &str) -> Result<u64, Error> {
        Ok(self.store.lease(id).await?.1)
    }

    /// Removes the lease of a replication that is not there any more, with its epoch, unless it was written again after
    /// this revision.
    pub async fn forget(&self, id: &str, revision: u64) -> Result<(), Error> {
        self.store.forget_lease(id, revision).await
    }
}

/// The wish of this instance to run a replication.
#[derive(Debug)]
pub struct Candidacy {
    id: String,
    commands: mpsc::UnboundedSender<DriverCommand>,
    grants: watch::Receiver<Option<Grant>>,
    /// Epoch of the last grant.
    last: u64,
}

impl Candidacy {
    /// Waits for the right to run; for ever if another instance keeps it.
    pub async fn granted(&mut self) -> Grant {
        let last = self.last;
        let newer = |grant: &Option<Grant>| grant.as_ref().is_some_and(|grant| grant.epoch > last);
        let Some(grant) = self.grants.wait_for(newer).await.ok().and_then(|grant| grant.clone()) else {
            // Nobody looks after the leases any more; the stop is on its way.
            return std::future::pending().await;
        };
        self.last = grant.epoch;
        grant
    }

    /// What ran under the last grant has ended; if it is ours still, it is granted again, with a greater epoch, after
    /// `pause`.
    pub fn ended(&self, pause: Duration) {
        let _ = self.commands.send(DriverCommand::Ended { id: self.id.clone(), pause });
    }
}

impl Drop for Candidacy {
    fn drop(&mut self) {
        let _ = self.commands.send(DriverCommand::Unwant { id: self.id.clone() });
    }
}

#[derive(Debug)]
enum DriverCommand {
    Want { id: String, sender: watch::Sender<Option<Grant>> },
    Unwant { id: String },
    Ended { id: String, pause: Duration },
    Leave,
}

/// What became of an operation.
enum Completed {
    Renewed { outcome: Renewal, revision: Option<u64>, taken: Option<SessionRecord>, error: Option<Error> },
    Looked { instance: String, found: Result<(Option<SessionRecord>, u64), Error> },
    Wrote { id: String, done: bool, found: Option<(LeaseRecord, u64)> },
    Forgot { instance: String, revision: u64 },
    Nothing,
}

struct DriverTask {
    machine: Machine,
    store: LeaseStore,
    positions: PositionStore,
    record: SessionRecord,
    /// Of our session; `None` when it has to be read first.
    revision: Option<u64>,
    /// Last confirmed revision of our session.
    confirmed: Option<u64>,
    /// Deadline for a renewal.
    limit: Duration,
    term: Validity,
    slots: HashMap<String, GrantSlot>,
    operations: FuturesUnordered<BoxFuture<'static, Completed>>,
    asked: mpsc::UnboundedReceiver<DriverCommand>,
    changes: mpsc::UnboundedReceiver<LeaseChange>,
    sessions: watch::Sender<Sessions>,
    trouble: Trouble,
    next_clear: Instant,
    _follower: AbortOnDropHandle<()>,
}

/// A grant, seen from the driver.
struct GrantSlot {
    sender: watch::Sender<Option<Grant>>,
    grant: Option<Grant>,
}

impl DriverTask {
    /// Until the stop, or until another process has our name: says which.
    async fn run(mut self, stop: CancellationToken) -> Option<String> {
        let mut end = None;
        loop {
            let now = boottime::now();
            for action in self.machine.poll(now) {
                self.act(action);
            }
            self.term.set(self.machine.until());
            if end.is_some_and(|end| now >= end) || (end.is_some() && !self.machine.is_busy()) {
                break;
            }
            let wake = end.into_iter().fold(self.machine.next(now).min(self.next_clear), Instant::min);
            tokio::select! {
                biased;
                () = stop.cancelled(), if end.is_none() => end = Some(boottime::now() + LAST_WORDS),
                Some(command) = self.asked.recv() => {
                    self.command(command);
                    while let Ok(command) = self.asked.try_recv() {
                        self.command(command);
                    }
                }
                Some(change) = self.changes.recv() => {
                    let mut taken = self.saw(change);
                    while let Ok(change) = self.changes.try_recv() {
                        taken = taken.or(self.saw(change));
                    }
                    if taken.is_some() {
                        return taken.map(|by| self.exit(&by));
                    }
                }
                Some(done) = self.operations.next() => {
                    if let Some(by) = self.done(done) {
                        return Some(self.exit(&by));
                    }
                }
                () = sleep_until(boottime::for_timers(wake)) => {}
            }
            self.clear_away();
        }
        if let Some(revision) = self.confirmed
            && let Ok(Err(error)) =
                timeout(LAST_WORDS, self.store.remove_session(&self.record.instance, revision)).await
        {
            debug!("the session record was not removed: {error}");
        }
        None
    }

    fn exit(&mut self, by: &SessionRecord) -> String {
        let reason = format!(
            "another process is instance `{}` now (host `{}`, process {}): give each its own `--instance`",
            by.instance, by.host, by.pid
        );
        self.term.set(None);
        for slot in self.slots.values() {
            if let Some(grant) = &slot.grant {
                grant.revoke(reason.clone());
            }
        }
        reason
    }

    fn command(&mut self, command: DriverCommand) {
        let now = boottime::now();
        match command {
            DriverCommand::Want { id, sender } => {
                self.machine.want(now, &id);
                self.slots.insert(id, GrantSlot { sender, grant: None });
            }
            DriverCommand::Leave => self.machine.leave(now),
            DriverCommand::Unwant { id } => {
                self.machine.unwant(&id);
                self.slots.remove(&id);
            }
            DriverCommand::Ended { id, pause } => {
                self.machine.ended(now, &id, pause);
                if let Some(slot) = self.slots.get_mut(&id) {
                    slot.grant = None;
                }
            }
        }
    }

    /// Returns who has our name, if another process has.
    fn saw(&mut self, change: LeaseChange) -> Option<SessionRecord> {
        let now = boottime::now();
        match change {
            LeaseChange::Session { instance, revision, record } => {
                self.machine.session(now, &instance, revision, record.as_ref());
                let newer = self.confirmed.is_some_and(|confirmed| revision > confirmed);
                let other = |record: &SessionRecord| record.session != self.record.session;
                if newer && instance == self.record.instance && record.as_ref().is_some_and(other) {
                    return record;
                }
                self.sessions.send_modify(|sessions| sessions.saw(instance, revision, record));
            }
            LeaseChange::Lease { id, revision, record } => self.machine.lease(now, &id, revision, record),
            LeaseChange::Anew => {
                warn!("lease bucket was recreated or restored; reloading it");
                self.machine.anew();
            }
            LeaseChange::Loaded => {
                self.machine.loaded();
                self.sessions.send_modify(|sessions| sessions.loaded = true);
                self.look_for_dead();
            }
        }
        None
    }

    /// After a crash nobody waits for a process of this host that is not there any more.
    fn look_for_dead(&mut self) {
        let sessions = self.sessions.borrow();
        for heard in sessions.known.values() {
            let Some(record) = heard.record.as_ref().filter(|record| record.instance != self.record.instance) else {
                continue;
            };
            if process::is_gone(record.pid, &record.process) {
                info!(instance = record.instance, pid = record.pid, "its process is gone: its leases are free");
                self.machine.gone(boottime::now(), &record.instance);
            }
        }
    }

    fn act(&mut self, action: Action) {
        let operation = match action {
            Action::Renew { session, nonce, leaving } => {
                if session != self.record.session {
                    (self.confirmed, self.revision) = (None, None);
                }
                self.record = SessionRecord { session, nonce, leaving, ..self.record.clone() };
                let first = self.confirmed.is_none();
                let renewal = renew(self.store.clone(), self.record.clone(), self.revision.take(), first);
                let limit = self.limit;
                async move {
                    let late =
                        Completed::Renewed { outcome: Renewal::Failed, revision: None, taken: None, error: None };
                    timeout(limit, renewal).await.unwrap_or(late)
                }
                .boxed()
            }
            Action::Look(instance) => {
                let store = self.store.clone();
                async move { Completed::Looked { found: store.session(&instance).await, instance } }.boxed()
            }
            Action::Write { id, record, revision, take } => {
                write(self.store.clone(), self.positions.clone(), id, record, revision, take).boxed()
            }
            Action::Grant { id, epoch } => return self.grant(&id, epoch),
            Action::Yield(id) => {
                if let Some(grant) = self.slots.get(&id).and_then(|slot| slot.grant.as_ref()) {
                    info!(replication = id, epoch = grant.epoch, "hands over");
                    grant.ask_back();
                }
                return;
            }
            Action::Revoke { id, reason } => {
                if let Some(grant) = self.slots.get(&id).and_then(|slot| slot.grant.as_ref()) {
                    grant.revoke(reason);
                }
                return;
            }
        };
        self.operations.push(operation);
    }

    fn grant(&mut self, id: &str, epoch: u64) {
        // Whoever holds a grant asks it before each step: it must not be over before it began.
        self.term.set(self.machine.until());
        match self.slots.get_mut(id) {
            Some(slot) => {
                let grant = Grant::new(epoch, self.term.clone());
                slot.grant = Some(grant.clone());
                slot.sender.send_replace(Some(grant));
            }
            None => self.machine.unwant(id),
        }
    }

    /// Returns who has our name, if another process has.
    fn done(&mut self, done: Completed) -> Option<SessionRecord> {
        let now = boottime::now();
        match done {
            Completed::Renewed { taken: Some(by), .. } => return Some(by),
            Completed::Renewed { outcome, revision, error, .. } => {
                self.revision = revision;
                match outcome {
                    Renewal::Confirmed => {
                        self.confirmed = revision;
                        self.trouble.over();
                    }
                    Renewal::Removed => {
                        warn!("the session of this instance was removed; writing it again");
                        self.confirmed = None;
                    }
                    Renewal::Failed => {
                        let reason = error.map_or_else(|| "no answer in time".to_owned(), |error| error.to_string());
                        self.trouble.tell(&reason);
                    }
                }
                self.machine.renewed(now, outcome);
            }
            Completed::Looked { instance, found: Ok((record, revision)) } => {
                self.machine.looked(now, &instance, revision, record.as_ref());
            }
            Completed::Looked { instance, found: Err(error) } => {
                debug!(instance, "its session cannot be read: {error}");
                self.machine.look_failed(now, &instance);
            }
            Completed::Wrote { id, done, found } => {
                if let Some(grant) = self.machine.wrote(now, &id, done, found) {
                    self.act(grant);
                }
            }
            Completed::Forgot { instance, revision } => {
                self.machine.forget(&instance, revision);
                self.sessions.send_modify(|sessions| {
                    if sessions.known.get(&instance).is_some_and(|heard| heard.revision == revision) {
                        sessions.known.remove(&instance);
                    }
                });
            }
            Completed::Nothing => {}
        }
        None
    }

    /// Removes sessions that were silent for long, and then what their removal left.
    fn clear_away(&mut self) {
        let now = boottime::now();
        if now < self.next_clear {
            return;
        }
        self.next_clear = now + CLEAR_EVERY;
        let stale = self.sessions.borrow().stale();
        for (instance, revision, marker) in stale.into_iter().filter(|(name, ..)| *name != self.record.instance) {
            let store = self.store.clone();
            self.operations.push(
                async move {
                    if !marker {
                        // Others do the same; one of them succeeds.
                        let _ = store.remove_session(&instance, revision).await;
                        return Completed::Nothing;
                    }
                    match store.forget_session(&instance, revision).await {
                        Ok(()) => Completed::Forgot { instance, revision },
                        Err(_) => Completed::Nothing,
                    }
                }
                .boxed(),
            );
        }
    }
}

/// Writes our session; on the way there anything of ours that was written before, or late. The `first` time it takes the
/// place of whoever had the name.
async fn renew(store: LeaseStore, record: SessionRecord, revision: Option<u64>, first: bool) -> Completed {
    const TRIES: usize = 3;
    let done = |outcome, revision, taken, error| Completed::Renewed { outcome, revision, taken, error };
    let mut known = revision;
    for _ in 0..TRIES {
        let found = match known {
            Some(revision) => match store.put_session(&record, revision).await {
                Ok(Written::Done(revision)) => return done(Renewal::Confirmed, Some(revision), None, None),
                Ok(Written::Found(found, at)) => Ok((found, at)),
                Err(error) => Err(error),
            },
            None => store.session(&record.instance).await,
        };
        match found {
            Ok((Some(found), at)) if found.session == record.session => known = Some(at),
            Ok((Some(other), at)) if first => {
                info!(
                    instance = other.instance,
                    host = other.host,
                    pid = other.pid,
                    "takes over the session of a process that used the same instance id"
                );
                known = Some(at);
            }
            Ok((None, at)) if first => known = Some(at),
            Ok((Some(other), _)) => return done(Renewal::Failed, None, Some(other), None),
            Ok((None, _)) => return done(Renewal::Removed, None, None, None),
            Err(error) => return done(Renewal::Failed, None, None, Some(error)),
        }
    }
    done(Renewal::Failed, None, None, None)
}

/// Writes a lease. One that is taken gets an epoch above that of the position record, which every holder writes.
async fn write(
    store: LeaseStore,
    positions: PositionStore,
    id: String,
    mut record: LeaseRecord,
    revision: u64,
    take: bool,
) -> Completed {
    if take && let Ok((position, _)) = positions.read(&id).await {
        record.epoch = record.epoch.max(position.epoch + 1);
    }
    match store.put_lease(&id, &record, revision).await {
        Ok(Written::Done(revision)) => Completed::Wrote { id, done: true, found: Some((record, revision)) },
        Ok(Written::Found(found, at)) => {
            let unreadable = || LeaseRecord { epoch: record.epoch, ..LeaseRecord::default() };
            Completed::Wrote { id, done: false, found: Some((found.unwrap_or_else(unreadable), at)) }
        }
        Err(error) => {
            debug!(replication = id, "its lease was not written: {error}");
            Completed::Wrote { id, done: false, found: None }
        }
    }
}
