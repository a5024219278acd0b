//! Holds the set of replications that should run (the configuration bucket) against the set that runs: one task
//! per replication, its "life". The loop here only starts lives, tells them of newer documents and ends them; what
//! a document means and how errors are survived is each life's own business, so none can touch another.

mod board;
mod desired;
mod outage;
mod replication;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    sync::watch,
    task::{Id, JoinError, JoinHandle, JoinSet},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use self::{
    board::Board,
    desired::{Planner, Signal},
    replication::{Context, Life},
};
use crate::{
    copy::{Budget, ErrorKind},
    events::Events,
    nats::Rules,
    status::{Row, State},
    store::{ConfigChange, ConfigEntry, ConfigStore, PositionStore},
};

/// A life that panicked outside a run starts again after this.
const PANIC_DELAY: Duration = Duration::from_secs(5);

/// What the supervisor needs from the outside.
#[derive(Debug, Clone)]
pub struct Deps {
    /// The site's name.
    pub site: String,
    /// This process.
    pub instance: String,
    /// Where documents may lead.
    pub rules: Rules,
    /// What should run.
    pub config: ConfigStore,
    /// Where each replication stands.
    pub positions: PositionStore,
    /// Where notable things are told.
    pub events: Events,
    /// Bytes that all replications together may read ahead.
    pub budget: Budget,
}

/// Begins to follow the configuration. Everything stops in order when `root` is cancelled; call
/// [`Supervisor::stop`] to wait for that.
pub fn start(deps: Deps, root: &CancellationToken) -> (Handle, Supervisor) {
    let (table, view) = watch::channel(Table::default());
    let stop = root.child_token();
    let work = Loop { deps: Arc::new(deps), stop: stop.clone(), table, lives: JoinSet::new(), slots: HashMap::new() };
    let task = tokio::spawn(work.run());
    (Handle { table: view.clone() }, Supervisor { stop, task, table: view })
}

/// The running supervisor, for the one who stops it.
#[derive(Debug)]
pub struct Supervisor {
    stop: CancellationToken,
    task: JoinHandle<()>,
    table: watch::Receiver<Table>,
}

impl Supervisor {
    /// Waits until the loop is over, which without a stop it only is after a bug.
    pub async fn ended(&mut self) {
        let _ = (&mut self.task).await;
    }

    /// Stops all lives in order: readers stop, what is in the air settles, positions are saved. Those that are
    /// not done within `grace` are named in the log, dropped, and returned.
    pub async fn stop(mut self, grace: Duration) -> Vec<String> {
        self.stop.cancel();
        if timeout(grace, &mut self.task).await.is_ok() {
            return Vec::new();
        }
        let late: Vec<_> = self.table.borrow().boards.keys().cloned().collect();
        self.task.abort();
        warn!(replications = late.join(", "), "did not stop within {grace:.1?}; what was in the air is copied again");
        late
    }
}

/// What the face may ask of the supervisor; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct Handle {
    table: watch::Receiver<Table>,
}

impl Handle {
    /// All rows, sorted by id.
    pub fn rows(&self) -> Vec<Row> {
        self.table.borrow().boards.values().map(|board| board.row()).collect()
    }

    /// The row of one replication.
    pub fn row(&self, id: &str) -> Option<Row> {
        self.table.borrow().boards.get(id).map(|board| board.row())
    }

    /// Waits until the deletion at `revision` of the configuration bucket has been seen and what ran before it is
    /// over, also if the replication is already there again.
    pub async fn stopped_since(&self, id: &str, revision: u64) {
        let mut table = self.table.clone();
        let over = |table: &Table| table.seen >= revision && table.boards.get(id).is_none_or(|b| b.born() > revision);
        // An error means that the supervisor is gone, and with it what it ran.
        let _ = table.wait_for(over).await;
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

    /// Whether the supervisor's loop lives.
    pub fn is_alive(&self) -> bool {
        self.table.has_changed().is_ok()
    }
}

/// What a [`Handle`] sees.
#[derive(Debug, Default)]
struct Table {
    /// Whether the configuration has been read once.
    loaded: bool,
    /// The last revision of the configuration bucket that was acted upon.
    seen: u64,
    /// One per life.
    boards: BTreeMap<String, Arc<Board>>,
}

/// Owner of all lives.
struct Loop {
    deps: Arc<Deps>,
    stop: CancellationToken,
    table: watch::Sender<Table>,
    lives: JoinSet<()>,
    slots: HashMap<String, Slot>,
}

/// One life, from the outside.
struct Slot {
    task: Id,
    board: Arc<Board>,
    wanted: watch::Sender<ConfigEntry>,
    /// Cancelled when the document was deleted, or with the process.
    stop: CancellationToken,
    /// Written after the deletion: lives when the old life is over.
    again: Option<ConfigEntry>,
}

impl Loop {
    /// Until the stop; then until the last life is over.
    async fn run(mut self) {
        let mut changes = pin!(desired::changes(self.deps.config.clone()));
        let mut listed = BTreeSet::new();
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                Some(ended) = self.lives.join_next_with_id() => self.ended(ended),
                Some(signal) = changes.next() => self.follow(signal, &mut listed),
            }
        }
        while let Some(ended) = self.lives.join_next_with_id().await {
            self.ended(ended);
        }
    }

    /// `listed` holds the keys told since the watch began: what was deleted while there was no watch is missing.
    fn follow(&mut self, signal: Signal, listed: &mut BTreeSet<String>) {
        match signal {
            Signal::Began => listed.clear(),
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
            Signal::Change(ConfigChange::Loaded) => {
                let gone: Vec<_> = self.slots.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| self.delete(key));
                self.table.send_if_modified(|table| !std::mem::replace(&mut table.loaded, true));
            }
        }
    }

    /// Revisions only grow, unless the bucket was made anew.
    fn saw(&self, revision: u64) {
        self.table.send_modify(|table| table.seen = revision);
    }

    fn put(&mut self, entry: ConfigEntry) {
        match self.slots.get_mut(&entry.key) {
            None => self.begin(entry),
            Some(slot) if slot.stop.is_cancelled() => slot.again = Some(entry),
            // A watch that began anew tells what is already known.
            Some(slot) => {
                slot.board.is_not_younger_than(entry.revision);
                slot.wanted.send_if_modified(|old| update(old, entry));
            }
        }
    }

    fn delete(&mut self, key: &str) {
        if let Some(slot) = self.slots.get_mut(key) {
            slot.again = None;
            slot.stop.cancel();
        }
    }

    fn begin(&mut self, entry: ConfigEntry) {
        let id = entry.key.clone();
        let board = Arc::new(Board::new(&id, entry.revision));
        self.table.send_modify(|table| _ = table.boards.insert(id, board.clone()));
        self.spawn(entry, board, Duration::ZERO);
    }

    fn spawn(&mut self, entry: ConfigEntry, board: Arc<Board>, delay: Duration) {
        let id = entry.key.clone();
        let stop = self.stop.child_token();
        let (wanted, latest) = watch::channel(entry);
        let context = Context { deps: self.deps.clone(), id: id.clone(), board: board.clone() };
        let planner = Planner::new(&self.deps, latest);
        let life = Life::new(context, planner, stop.clone());
        let task = self.lives.spawn(life.run(delay)).id();
        self.slots.insert(id, Slot { task, board, wanted, stop, again: None });
    }

    fn ended(&mut self, ended: Result<(Id, ()), JoinError>) {
        let task = ended.as_ref().map_or_else(JoinError::id, |(task, ())| *task);
        let Some(id) = self.slots.iter().find(|(_, slot)| slot.task == task).map(|(id, _)| id.clone()) else {
            return;
        };
        let Some(slot) = self.slots.remove(&id) else { return };
        if let Err(panic) = ended
            && !slot.stop.is_cancelled()
        {
            error!(replication = id, "starts again in {PANIC_DELAY:?}: {panic}");
            slot.board.failed(ErrorKind::Retry, &panic.to_string());
            slot.board.set_state(State::Retrying);
            let entry = slot.wanted.borrow().clone();
            return self.spawn(entry, slot.board, PANIC_DELAY);
        }
        self.table.send_modify(|table| _ = table.boards.remove(&id));
        match slot.again {
            Some(entry) if !self.stop.is_cancelled() => self.begin(entry),
            _ => debug!(replication = id, "ended"),
        }
    }
}

/// Takes over a newer revision; says whether it was one.
fn update(old: &mut ConfigEntry, new: ConfigEntry) -> bool {
    let newer = new.revision != old.revision || new.value != old.value;
    if newer {
        *old = new;
    }
    newer
}
