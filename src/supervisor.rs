//! Compares the replications that should run (the configuration bucket) with those that run: one task per replication.
//! The loop here starts the tasks, passes newer documents and requests to them and ends them. What a document means and
//! how a replication recovers from errors is decided inside its task, so replications cannot affect each other.

mod context;
mod desired;
mod group;
mod known_streams;
mod leader_term;
mod outage;
mod record_notes;
mod refused_documents;
mod requests;
mod retention_watch;
mod runner;
mod server_outages;
mod standby_senders;
mod status_cell;
mod task;
mod verifier;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use self::{
    context::Context,
    desired::{Planner, Signal},
    group::Group,
    known_streams::KnownStreams,
    requests::Requests,
    server_outages::ServerOutages,
    status_cell::StatusCell,
    task::ReplicationTask,
};

pub use self::known_streams::KnownSides;
use crate::{
    allow::AllowList,
    copy::{Budget, Error, ErrorKind, Samples},
    events::Events,
    lease::Leases,
    metrics,
    names::{ADAPTERS_PREFIX, HEARTBEATS_KEY, LINKS_PREFIX, SITE_KEY},
    status::{Row, State, Verification},
    store::{
        ConfigChange, ConfigEntry, ConfigStore, MarkKind, OwnStreams, PositionRecord, PositionStore, SenderStore,
        SessionRecord, Stored,
    },
    traces::Traces,
};

/// How often a caller that waits for a row checks it.
const CHECK_ROW: Duration = Duration::from_millis(20);

/// Pause before a task that panicked outside a run starts again.
const PANIC_DELAY: Duration = Duration::from_secs(5);

/// What the supervisor needs from the outside.
#[derive(Debug, Clone)]
pub struct Deps {
    /// The site's name.
    pub site: String,
    /// This process.
    pub instance: String,
    /// Identifies the installation: the same for all its instances, and for no other installation.
    pub installation: String,
    /// The streams of its buckets.
    pub own_streams: OwnStreams,
    /// The operator declared this the only instance: it continues while its buckets are unreachable.
    pub standalone: bool,
    /// Where documents may connect to.
    pub rules: AllowList,
    /// The documents, and the requests beside them.
    pub config: ConfigStore,
    /// The position records.
    pub positions: PositionStore,
    /// The instances of the group, and the replications that each may run.
    pub leases: Leases,
    /// The senders that sampling knows.
    pub senders: SenderStore,
    /// Where events are published.
    pub events: Events,
    /// Where spans go.
    pub traces: Traces,
    /// Folder of the state files of Choria's replicator, where they are read and written.
    pub state_store: Option<PathBuf>,
    /// Bytes that all replications together may read ahead.
    pub budget: Budget,
    /// Receives the heartbeats of the configuration bucket; revision 0 if it has none.
    pub heartbeats: watch::Sender<Option<Stored>>,
    /// Receives the site record of the configuration bucket; revision 0 if it has none.
    pub site_record: watch::Sender<Option<Stored>>,
}

/// Starts to follow the configuration. Everything stops gracefully when `root` is cancelled; call
/// [`Supervisor::stop`] to wait for that.
pub fn start(deps: Deps, root: &CancellationToken) -> (Handle, Supervisor) {
    let (table, view) = watch::channel(StatusTable::default());
    let stop = root.child_token();
    let group = Group::follow(deps.positions.clone(), deps.leases.clone());
    let known_streams = KnownStreams::new(&deps.site, &deps.rules);
    let instance = deps.instance.as_str().into();
    let handle = Handle { table: view.clone(), group, known_streams: known_streams.clone(), instance };
    let outages = ServerOutages::start(deps.events.clone(), &deps.instance);
    let work = TaskLoop {
        deps: Arc::new(deps),
        known_streams,
        outages,
        stop: stop.clone(),
        table,
        tasks: JoinSet::new(),
        running: HashMap::new(),
        requests: HashMap::new(),
    };
    let task = tokio::spawn(work.run());
    (handle, Supervisor { stop, task, table: view })
}

/// The running supervisor, for its owner, which stops it.
#[derive(Debug)]
pub struct Supervisor {
    stop: CancellationToken,
    task: JoinHandle<()>,
    table: watch::Receiver<StatusTable>,
}

impl Supervisor {
    /// Waits until the loop has ended. Without a stop that is a bug.
    pub async fn ended(&mut self) {
        let _ = (&mut self.task).await;
    }

    /// Stops all tasks gracefully: readers stop, messages in flight settle, positions are saved. Replications that are
    /// not done within `grace` are logged, dropped and returned.
    pub async fn stop(mut self, grace: Duration) -> Vec<String> {
        self.stop.cancel();
        if timeout(grace, &mut self.task).await.is_ok() {
            return Vec::new();
        }
        let late: Vec<_> = self.table.borrow().cells.keys().cloned().collect();
        self.task.abort();
        warn!(replications = late.join(", "), "did not stop within {grace:.1?}; messages in flight are copied again");
        late
    }
}

/// Passes a value on, unless it is known: a watch that starts again repeats known values.
fn pass_on(key: &watch::Sender<Option<Stored>>, stored: Stored) {
    key.send_if_modified(|known| {
        let news = known.as_ref() != Some(&stored);
        *known = Some(stored);
        news
    });
}

/// The key does not exist, or was deleted while there was no watch.
fn pass_on_removal(key: &watch::Sender<Option<Stored>>) {
    let known = key.borrow().clone();
    if known.is_none_or(|known| known.value.is_some()) {
        pass_on(key, Stored { revision: 0, value: None });
    }
}

/// What the control service may ask of the supervisor; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct Handle {
    table: watch::Receiver<StatusTable>,
    group: Group,
    known_streams: KnownStreams,
    instance: Arc<str>,
}

/// One process of the group.
#[derive(Debug, Clone)]
pub struct Peer {
    /// What it reports about itself.
    pub session: SessionRecord,
    /// Time since its last sign of life.
    pub silent: Duration,
    /// Ids of the replications that it leads, sorted.
    pub leads: Vec<String>,
}

impl Handle {
    /// All rows as the group sees them, sorted by id.
    pub fn rows(&self) -> Vec<Row> {
        self.table.borrow().cells.values().map(|cell| self.view(cell)).collect()
    }

    /// Both streams of every replication with a valid document, by id; not of those that only find streams.
    pub fn sides(&self) -> BTreeMap<String, KnownSides> {
        self.known_streams.all()
    }

    /// The row of one replication as the group sees it.
    pub fn row(&self, id: &str) -> Option<Row> {
        let cell = self.table.borrow().cells.get(id).cloned()?;
        Some(self.view(&cell))
    }

    /// The row of one replication as the group sees it, and the time of its source server.
    pub fn row_and_time(&self, id: &str) -> Option<(Row, DateTime<Utc>)> {
        let cell = self.table.borrow().cells.get(id).cloned()?;
        let row = self.view(&cell);
        let time = self.source_time(&cell, &row);
        Some((row, time))
    }

    /// The installation whose consumers at the source belong to a replication, if its position record names one.
    pub fn installation(&self, id: &str) -> Option<String> {
        self.group.record(id)?.installation
    }

    /// The time of the source server: the clock of this host counts only for what this process measured itself.
    fn source_time(&self, cell: &StatusCell, row: &Row) -> DateTime<Utc> {
        let reported = (!cell.leads()).then(|| self.group.source_time(&row.replication)).flatten();
        reported.unwrap_or_else(|| row.source_time(nats_lane::entropy::now()))
    }

    /// The senders of a replication as this process knows them, if it is sampled; and whether this process leads it.
    pub fn samples(&self, id: &str) -> Option<(Samples, bool)> {
        let cell = self.table.borrow().cells.get(id).cloned()?;
        Some((cell.samples()?, cell.leads()))
    }

    /// All rows as this process sees them, sorted by id.
    pub fn own_rows(&self) -> Vec<Row> {
        self.table.borrow().cells.values().map(|cell| self.verified(cell.row())).collect()
    }

    /// The state of the Choria elections that this process takes part in.
    pub fn elections(&self) -> Vec<metrics::ElectionReading> {
        self.table.borrow().cells.values().filter_map(|cell| cell.election()).collect()
    }

    /// The instances of the group, sorted by name.
    pub fn peers(&self) -> Vec<Peer> {
        let mut leads: HashMap<String, Vec<String>> = HashMap::new();
        for (id, cell) in &self.table.borrow().cells {
            if let Some(leader) = self.view(cell).leader {
                leads.entry(leader).or_default().push(id.clone());
            }
        }
        let sessions = self.group.sessions();
        let peer = |(session, silent): (&SessionRecord, Duration)| Peer {
            leads: leads.remove(&session.instance).unwrap_or_default(),
            session: session.clone(),
            silent,
        };
        sessions.present().map(peer).collect()
    }

    /// How many replications are in each state, as the group sees them.
    pub fn states(&self) -> BTreeMap<State, usize> {
        let mut states: BTreeMap<_, _> = State::ALL.into_iter().map(|state| (state, 0)).collect();
        for cell in self.table.borrow().cells.values() {
            *states.entry(self.view(cell).state).or_default() += 1;
        }
        states
    }

    /// The newest verification of a replication.
    pub fn verification(&self, id: &str) -> Option<Verification> {
        self.group.verification(id)
    }

    fn verified(&self, mut row: Row) -> Row {
        row.verify = self.group.verification(&row.replication).map(|verification| verification.summary());
        row
    }

    /// The row of a replication: as this process runs it, or as its leader saved it last.
    fn view(&self, cell: &StatusCell) -> Row {
        self.verified(self.view_of_copy(cell))
    }

    fn view_of_copy(&self, cell: &StatusCell) -> Row {
        let mut own = cell.row();
        let Some(record) = self.group.record(&own.replication) else { return own };
        if !cell.leads() {
            let mut row = self.leaders_row(record, own);
            row.at(self.source_time(cell, &row));
            return row;
        }
        let position = record.source.map_or(0, |source| source.seq);
        if own.state == State::Paused && own.copy.position.source_seq != position {
            // Moved by another instance: what waits after it is not known yet.
            own.copy.position.source_seq = position;
            (own.copy.lag, own.copy.headroom) = (None, None);
            (own.copy.source.first_seq, own.copy.source.last_seq) = (None, None);
        }
        own
    }

    fn leaders_row(&self, record: PositionRecord, own: Row) -> Row {
        let leader = record.leader().map(str::to_owned);
        let standing = own.state;
        let fresh = record.status.as_ref().is_some_and(|row| row.epoch == record.epoch);
        let waits = record.electing && fresh && !self.group.is_gone(&record.holder);
        let mut row = Row { leader, epoch: record.epoch, ..record.status.unwrap_or(own) };
        if row.leader.as_ref().is_some_and(|leader| self.group.is_gone(leader)) {
            row.leader = None;
            row.state = State::Stopped;
        } else if row.state == State::Stopped && !waits {
            // Its leader stopped gracefully and this instance stands by to take it.
            row.state = standing;
        } else if !fresh {
            row.state = State::Starting;
        } else if row.state == State::Running && row.leader.as_ref().is_some_and(|leader| self.group.is_doubted(leader))
        {
            // A leader that has stopped by itself must not look caught up: requests would not wait for it.
            row.state = State::Retrying;
            row.not_running();
        }
        if matches!(row.state, State::Stopped | State::Starting) {
            row.not_running();
        }
        row
    }

    /// Waits until the pause marked at `revision` of the configuration bucket has taken effect, here or where the
    /// replication runs, and the position record, if there is one, says so.
    pub async fn paused_since(&self, id: &str, revision: u64) {
        let mut table = self.table.clone();
        // An error means that the supervisor has ended, and its tasks with it.
        let _ = table.wait_for(|table| table.marked >= revision).await;
        let cell = self.table.borrow().cells.get(id).cloned();
        if let Some(cell) = cell.filter(|cell| cell.leads()) {
            let mut status = cell.status().subscribe();
            let _ = status.wait_for(|(state, _)| matches!(state, State::Paused | State::Stopped)).await;
        }
        let says_so = |record: &PositionRecord| record.status.as_ref().is_some_and(|row| row.state == State::Paused);
        self.group.record_when(id, says_so).await;
    }

    /// Waits until the row of a replication is as expected; forever if it never is.
    pub async fn row_when(&self, id: &str, when: impl Fn(&Row) -> bool) -> Row {
        loop {
            if let Some(row) = self.row(id).filter(|row| when(row)) {
                return row;
            }
            sleep(CHECK_ROW).await;
        }
    }

    /// Waits until the deletion at `revision` of the configuration bucket has been seen and the task from before it has
    /// ended, also if the replication was added again meanwhile.
    pub async fn stopped_since(&self, id: &str, revision: u64) {
        let mut table = self.table.clone();
        let over =
            |table: &StatusTable| table.seen >= revision && table.cells.get(id).is_none_or(|b| b.born() > revision);
        // An error means that the supervisor has ended, and its tasks with it.
        let _ = table.wait_for(over).await;
    }

    /// Waits until the mark at `revision` of the configuration bucket, which removed a replication, has taken effect.
    pub async fn removed_with_mark(&self, id: &str, revision: u64) {
        let mut table = self.table.clone();
        // An error means that the supervisor has ended, and its tasks with it.
        let _ = table.wait_for(|table| table.marked >= revision && !table.cells.contains_key(id)).await;
    }

    /// Whether this is the name of another instance that is present, as far as is known.
    pub fn is_other(&self, instance: &str) -> bool {
        *instance != *self.instance && !self.group.is_gone(instance)
    }

    /// Waits until the configuration has been read; `false` if the supervisor ended before.
    pub async fn loaded(&self) -> bool {
        let mut table = self.table.clone();
        table.wait_for(|table| table.loaded).await.is_ok()
    }

    /// Whether the configuration has been read.
    pub fn is_loaded(&self) -> bool {
        self.table.borrow().loaded
    }

    /// Whether the supervisor's loop is running.
    pub fn is_alive(&self) -> bool {
        self.table.has_changed().is_ok()
    }
}

/// What a [`Handle`] sees.
#[derive(Debug, Default)]
struct StatusTable {
    /// Whether the configuration has been read once.
    loaded: bool,
    /// The last revision of a document that was acted upon.
    seen: u64,
    /// The last revision of a mark that was acted upon.
    marked: u64,
    /// One per task.
    cells: BTreeMap<String, Arc<StatusCell>>,
}

/// Owns all tasks.
struct TaskLoop {
    deps: Arc<Deps>,
    known_streams: KnownStreams,
    outages: ServerOutages,
    stop: CancellationToken,
    table: watch::Sender<StatusTable>,
    tasks: JoinSet<()>,
    running: HashMap<String, RunningTask>,
    /// By replication, also of replications without a document.
    requests: HashMap<String, Requests>,
}

/// One task, as its owner sees it.
struct RunningTask {
    task_id: Id,
    cell: Arc<StatusCell>,
    wanted: watch::Sender<ConfigEntry>,
    requests: watch::Sender<Requests>,
    /// Cancelled when the document was deleted, or with the process.
    stop: CancellationToken,
    /// A document written after the deletion: it starts when this task has ended.
    successor: Option<ConfigEntry>,
}

impl TaskLoop {
    /// Runs until the stop, and then until the last task has ended.
    async fn run(mut self) {
        let mut changes = pin!(desired::changes(self.deps.config.clone()));
        let mut listed = BTreeSet::new();
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                Some(signal) = changes.next() => self.follow(signal, &mut listed),
            }
        }
        while let Some(ended) = self.tasks.join_next_with_id().await {
            self.ended(ended);
        }
    }

    /// `listed` holds the keys that the watch has delivered since it started: keys deleted while there was no watch are
    /// missing in it.
    fn follow(&mut self, signal: Signal, listed: &mut BTreeSet<String>) {
        match signal {
            Signal::Began => listed.clear(),
            // These are for the adapters; links come with the documents that name them.
            Signal::Change(
                ConfigChange::Put(ConfigEntry { key, revision, .. }) | ConfigChange::Deleted { key, revision },
            ) if key.starts_with(ADAPTERS_PREFIX) || key.starts_with(LINKS_PREFIX) => {
                self.saw(revision);
            }
            Signal::Change(ConfigChange::Put(entry)) => {
                listed.insert(entry.key.clone());
                let revision = entry.revision;
                self.put(entry);
                self.saw(revision);
            }
            Signal::Change(ConfigChange::Deleted { key, revision }) => {
                listed.remove(&key);
                self.delete(&key);
                self.saw(revision);
            }
            Signal::Change(ConfigChange::Heartbeats(stored)) => {
                if stored.value.is_some() {
                    listed.insert(HEARTBEATS_KEY.to_owned());
                } else {
                    listed.remove(HEARTBEATS_KEY);
                }
                pass_on(&self.deps.heartbeats, stored);
            }
            Signal::Change(ConfigChange::Site(stored)) => {
                if stored.value.is_some() {
                    listed.insert(SITE_KEY.to_owned());
                } else {
                    listed.remove(SITE_KEY);
                }
                pass_on(&self.deps.site_record, stored);
            }
            Signal::Change(ConfigChange::Marked(mark)) => {
                let key = mark.kind.key(&mark.id);
                if mark.value.is_some() {
                    listed.insert(key);
                } else {
                    listed.remove(&key);
                }
                self.change_requests(&mark.id, |requests| requests.apply(&mark));
                self.table.send_modify(|table| table.marked = mark.revision);
            }
            // The revision that comes next counts.
            Signal::Change(ConfigChange::Recreated) => self.table.send_modify(|table| table.seen = 0),
            Signal::Change(ConfigChange::Loaded) => {
                self.remove_requests_not_in(listed);
                if !listed.contains(HEARTBEATS_KEY) {
                    pass_on_removal(&self.deps.heartbeats);
                }
                if !listed.contains(SITE_KEY) {
                    pass_on_removal(&self.deps.site_record);
                }
                let gone: Vec<_> = self.running.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| self.delete(key));
                self.known_streams.mark_loaded();
                self.table.send_if_modified(|table| !std::mem::replace(&mut table.loaded, true));
            }
        }
    }

    /// Requests that were removed while there was no watch are not in `listed`.
    fn remove_requests_not_in(&mut self, listed: &BTreeSet<String>) {
        let gone = |id: &str, requests: &Requests| {
            MarkKind::ALL.into_iter().filter(|kind| requests.has(*kind) && !listed.contains(&kind.key(id))).collect()
        };
        let all: Vec<(String, Vec<MarkKind>)> =
            self.requests.iter().map(|(id, requests)| (id.clone(), gone(id, requests))).collect();
        for (id, kinds) in all {
            self.change_requests(&id, |requests| kinds.iter().for_each(|kind| requests.remove(*kind)));
        }
    }

    /// Changes the requests of a replication and passes them to its task.
    fn change_requests(&mut self, id: &str, change: impl FnOnce(&mut Requests)) {
        let mut requests = self.requests.remove(id).unwrap_or_default();
        change(&mut requests);
        if let Some(task) = self.running.get(id) {
            task.requests.send_if_modified(|old| {
                *old != requests && {
                    old.clone_from(&requests);
                    true
                }
            });
        }
        if requests != Requests::default() {
            self.requests.insert(id.to_owned(), requests);
        }
    }

    /// Revisions only grow, unless the bucket was recreated. Documents of a file have none, and one whose link changed is
    /// delivered with its own.
    fn saw(&self, revision: u64) {
        self.table.send_if_modified(|table| {
            let newer = revision > table.seen;
            table.seen = table.seen.max(revision);
            newer
        });
    }

    fn put(&mut self, entry: ConfigEntry) {
        self.known_streams.put(&entry);
        match self.running.get_mut(&entry.key) {
            None => self.begin(entry),
            Some(task) if task.stop.is_cancelled() => task.successor = Some(entry),
            // A watch that starts again repeats known documents.
            Some(task) => {
                task.cell.is_not_younger_than(entry.revision);
                task.wanted.send_if_modified(|old| update(old, entry));
            }
        }
    }

    fn delete(&mut self, key: &str) {
        self.known_streams.remove(key);
        let (config, id) = (self.deps.config.clone(), key.to_owned());
        // It must not run again because of invalid documents that are written later.
        tokio::spawn(async move {
            if let Err(error) = config.unmark(&id, MarkKind::Valid, None).await {
                debug!(replication = id, "the saved copy of a deleted document was not removed: {error}");
            }
        });
        if let Some(task) = self.running.get_mut(key) {
            task.successor = None;
            task.stop.cancel();
        }
    }

    fn begin(&mut self, entry: ConfigEntry) {
        let id = entry.key.clone();
        let cell = Arc::new(StatusCell::new(&id, entry.revision));
        self.table.send_modify(|table| _ = table.cells.insert(id, cell.clone()));
        self.spawn(entry, cell, Duration::ZERO);
    }

    fn spawn(&mut self, entry: ConfigEntry, cell: Arc<StatusCell>, delay: Duration) {
        let id = entry.key.clone();
        let stop = self.stop.child_token();
        let (wanted, latest) = watch::channel(entry);
        let context = Context {
            deps: self.deps.clone(),
            id: id.clone(),
            cell: cell.clone(),
            known_streams: self.known_streams.clone(),
            outages: self.outages.clone(),
        };
        let planner = Planner::new(&self.deps, latest);
        let (requests, asked) = watch::channel(self.requests.get(&id).cloned().unwrap_or_default());
        let candidacy = self.deps.leases.candidacy(&id);
        let task = ReplicationTask::new(context, planner, asked, candidacy, stop.clone());
        let task_id = self.tasks.spawn(task.run(delay)).id();
        self.running.insert(id, RunningTask { task_id, cell, wanted, requests, stop, successor: None });
    }

    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let task_id = ended.as_ref().map_or_else(JoinError::id, |(task_id, ())| *task_id);
        let Some(id) = self.running.iter().find(|(_, task)| task.task_id == task_id).map(|(id, _)| id.clone()) else {
            return;
        };
        let Some(task) = self.running.remove(&id) else { return };
        if let Err(panic) = ended
            && !task.stop.is_cancelled()
        {
            error!(replication = id, "starts again in {PANIC_DELAY:?}: {panic}");
            task.cell.failed(&Error::new(ErrorKind::Retry, panic.to_string()), None);
            task.cell.set_state(State::Retrying);
            let entry = task.wanted.borrow().clone();
            return self.spawn(entry, task.cell, PANIC_DELAY);
        }
        self.table.send_modify(|table| _ = table.cells.remove(&id));
        match task.successor {
            Some(entry) if !self.stop.is_cancelled() => self.begin(entry),
            _ => debug!(replication = id, "ended"),
        }
    }
}

/// Replaces an older document. Returns whether it was older.
fn update(old: &mut ConfigEntry, new: ConfigEntry) -> bool {
    let newer = new != *old;
    if newer {
        *old = new;
    }
    newer
}
