//! Passes the changes of the lease bucket to the machine, and carries out its actions.

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
    machine::{LeaseAction, LeaseSettings, Machine, RenewalOutcome},
    process::{self, ProcessIdentity},
    sessions::Sessions,
};
use crate::{
    boottime,
    store::{Error, LeaseChange, LeaseRecord, LeaseStore, PositionStore, SessionRecord, Trouble, Written, follow},
};

/// How often records that other instances left are removed.
const CLEAR_EVERY: Duration = Duration::from_secs(15);
/// Deadline for releases and the last announcements.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Enters the group. Leases are held from now on, until [`Driver::stop`].
pub fn start(
    store: LeaseStore,
    positions: PositionStore,
    identity: ProcessIdentity,
    ttl: Duration,
    standalone: bool,
) -> (Leases, Driver) {
    let stop = CancellationToken::new();
    let (leases, work) = enter(store, positions, identity, ttl, standalone, stop.clone());
    (leases.clone(), Driver { leases, stop, task: tokio::spawn(work) })
}

/// Enters the group as [`start`] does, without a task of its own: leases are held while the future is polled. The future
/// ends when this instance may no longer act, and returns the reason, or some time after the stop.
pub fn enter(
    store: LeaseStore,
    positions: PositionStore,
    identity: ProcessIdentity,
    ttl: Duration,
    standalone: bool,
    stop: CancellationToken,
) -> (Leases, impl Future<Output = Option<String>> + Send) {
    let now = boottime::now();
    let session = entropy::name();
    let settings = LeaseSettings { instance: identity.instance.clone(), ttl, standalone };
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

/// The running driver, for its owner, which stops it.
#[derive(Debug)]
pub struct Driver {
    leases: Leases,
    stop: CancellationToken,
    task: JoinHandle<Option<String>>,
}

impl Driver {
    /// Waits until this instance may no longer act, and returns the reason. Waits forever if there is none.
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

    /// Releases the leases and removes the session. All work under a grant must have ended.
    pub async fn stop(self) {
        self.stop.cancel();
        if !self.task.is_finished() {
            let _ = timeout(LAST_WORDS * 2, self.task).await;
        }
    }
}

/// The leases as the rest of the service uses them; cheap to clone.
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
    /// From now on this instance competes for the lease of a replication.
    pub fn candidacy(&self, id: &str) -> Candidacy {
        let (sender, grants) = watch::channel(None);
        let _ = self.commands.send(DriverCommand::Want { id: id.to_owned(), sender });
        Candidacy { id: id.to_owned(), commands: self.commands.clone(), grants, last: 0 }
    }

    /// Announces that this process stops: it takes no further leases, and the others do not wait for it. Running copies
    /// continue until their grants are given up.
    pub fn leave(&self) {
        let _ = self.commands.send(DriverCommand::Leave);
    }

    /// Whether work under the grants of this instance may run now.
    pub fn hold(&self) -> bool {
        self.term.holds_now()
    }

    /// The sessions of all instances, as last received.
    pub fn sessions(&self) -> watch::Ref<'_, Sessions> {
        self.sessions.borrow()
    }

    /// Asks the holder of a lease to hand it over; returns the holder, or `None` if there is none.
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

    /// Removes the lease of a deleted replication, with its epoch, unless it was written again after this revision.
    pub async fn forget(&self, id: &str, revision: u64) -> Result<(), Error> {
        self.store.forget_lease(id, revision).await
    }
}

/// This instance competes for the lease of a replication, until this is dropped.
#[derive(Debug)]
pub struct Candidacy {
    id: String,
    commands: mpsc::UnboundedSender<DriverCommand>,
    grants: watch::Receiver<Option<Grant>>,
    /// Epoch of the last grant.
    last: u64,
}

impl Candidacy {
    /// Waits for the lease; forever if another instance keeps it.
    pub async fn granted(&mut self) -> Grant {
        let last = self.last;
        let newer = |grant: &Option<Grant>| grant.as_ref().is_some_and(|grant| grant.epoch > last);
        let Some(grant) = self.grants.wait_for(newer).await.ok().and_then(|grant| grant.clone()) else {
            // The driver has ended: the stop follows.
            return std::future::pending().await;
        };
        self.last = grant.epoch;
        grant
    }

    /// The work under the last grant has ended. If the lease is still ours, it is granted again after `pause`, with a
    /// greater epoch.
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

/// The result of an operation.
enum Completed {
    Renewed { outcome: RenewalOutcome, revision: Option<u64>, taken: Option<SessionRecord>, error: Option<Error> },
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
    /// Revision of our session; `None` when it has to be read first.
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

/// A grant, as the driver sees it.
struct GrantSlot {
    sender: watch::Sender<Option<Grant>>,
    grant: Option<Grant>,
}

impl DriverTask {
    /// Runs until the stop, or until another process has our name: then returns that process.
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

    /// Returns the other process that has our name, if there is one.
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
            LeaseChange::Recreated => {
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

    /// After a crash, the group does not wait for a process of this host that no longer exists.
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

    fn act(&mut self, action: LeaseAction) {
        let operation = match action {
            LeaseAction::Renew { session, nonce, leaving } => {
                if session != self.record.session {
                    (self.confirmed, self.revision) = (None, None);
                }
                self.record = SessionRecord { session, nonce, leaving, ..self.record.clone() };
                let first = self.confirmed.is_none();
                let renewal = renew(self.store.clone(), self.record.clone(), self.revision.take(), first);
                let limit = self.limit;
                async move {
                    let late = Completed::Renewed {
                        outcome: RenewalOutcome::Failed,
                        revision: None,
                        taken: None,
                        error: None,
                    };
                    timeout(limit, renewal).await.unwrap_or(late)
                }
                .boxed()
            }
            LeaseAction::Look(instance) => {
                let store = self.store.clone();
                async move { Completed::Looked { found: store.session(&instance).await, instance } }.boxed()
            }
            LeaseAction::Write { id, record, revision, take } => {
                write(self.store.clone(), self.positions.clone(), id, record, revision, take).boxed()
            }
            LeaseAction::Grant { id, epoch } => return self.grant(&id, epoch),
            LeaseAction::Yield(id) => {
                if let Some(grant) = self.slots.get(&id).and_then(|slot| slot.grant.as_ref()) {
                    info!(replication = id, epoch = grant.epoch, "hands over");
                    grant.ask_back();
                }
                return;
            }
            LeaseAction::Revoke { id, reason } => {
                if let Some(grant) = self.slots.get(&id).and_then(|slot| slot.grant.as_ref()) {
                    grant.revoke(reason);
                }
                return;
            }
        };
        self.operations.push(operation);
    }

    fn grant(&mut self, id: &str, epoch: u64) {
        // The holder checks a grant before each step: the grant must not be over before it starts.
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

    /// Returns the other process that has our name, if there is one.
    fn done(&mut self, done: Completed) -> Option<SessionRecord> {
        let now = boottime::now();
        match done {
            Completed::Renewed { taken: Some(by), .. } => return Some(by),
            Completed::Renewed { outcome, revision, error, .. } => {
                self.revision = revision;
                match outcome {
                    RenewalOutcome::Confirmed => {
                        self.confirmed = revision;
                        self.trouble.over();
                    }
                    RenewalOutcome::Removed => {
                        warn!("the session of this instance was removed; writing it again");
                        self.confirmed = None;
                    }
                    RenewalOutcome::Failed => {
                        let reason = error.map_or_else(|| "no answer in time".to_owned(), |error| error.to_string());
                        self.trouble.log(&reason);
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

    /// Removes sessions that were silent for long, and then the markers that their removal left.
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
                        // Other instances do the same; one of them succeeds.
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

/// Writes our session, over any earlier or late write of our own. The `first` write also replaces the session of another
/// process with our name.
async fn renew(store: LeaseStore, record: SessionRecord, revision: Option<u64>, first: bool) -> Completed {
    const TRIES: usize = 3;
    let done = |outcome, revision, taken, error| Completed::Renewed { outcome, revision, taken, error };
    let mut known = revision;
    for _ in 0..TRIES {
        let found = match known {
            Some(revision) => match store.put_session(&record, revision).await {
                Ok(Written::Done(revision)) => return done(RenewalOutcome::Confirmed, Some(revision), None, None),
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
            Ok((Some(other), _)) => return done(RenewalOutcome::Failed, None, Some(other), None),
            Ok((None, _)) => return done(RenewalOutcome::Removed, None, None, None),
            Err(error) => return done(RenewalOutcome::Failed, None, None, Some(error)),
        }
    }
    done(RenewalOutcome::Failed, None, None, None)
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
