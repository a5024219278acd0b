//! Holds the set of replications that should run (the configuration bucket) against the set that runs: one task
//! per replication, its "life". The loop here only starts lives, tells them of newer documents and ends them; what
//! a document means and how errors are survived is each life's own business, so none can touch another.

mod board;
mod desired;
mod group;
mod hand_back;
mod headroom;
mod marks;
mod neighbours;
mod outage;
mod replication;
mod roll;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
    board::Board,
    desired::{Planner, Signal},
    group::Group,
    marks::Marks,
    neighbours::Neighbours,
    replication::{Context, Life},
};

use crate::{
    allow::AllowList,
    copy::{Budget, Error, ErrorKind, Samples},
    events::Events,
    lease::Leases,
    metrics,
    names::{HEARTBEATS_KEY, SITE_KEY},
    status::{Row, State},
    store::{
        ConfigChange, ConfigEntry, ConfigStore, FILE_REVISION, MarkKind, OwnStreams, PositionRecord, PositionStore,
        SenderStore, SessionRecord, Stored,
    },
};

/// How often a row is looked at that is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A life that panicked outside a run starts again after this.
const PANIC_DELAY: Duration = Duration::from_secs(5);

/// What the supervisor needs from the outside.
#[derive(Debug, Clone)]
pub struct Deps {
    /// The site's name.
    pub site: String,
    /// This process.
    pub instance: String,
    /// What it shares with the other instances of its installation, and with no other installation.
    pub installation: String,
    /// The streams of its buckets.
    pub own_streams: OwnStreams,
    /// It is the only one, by declaration, and goes on where its buckets are out of reach.
    pub standalone: bool,
    /// Where documents may lead.
    pub rules: AllowList,
    /// What should run.
    pub config: ConfigStore,
    /// Where each replication stands.
    pub positions: PositionStore,
    /// Which processes are there, and what each may run.
    pub leases: Leases,
    /// What sampling knows of senders.
    pub senders: SenderStore,
    /// Where notable things are told.
    pub events: Events,
    /// Bytes that all replications together may read ahead.
    pub budget: Budget,
    /// Gets what the configuration bucket says of heartbeats: revision 0 where nothing lies there.
    pub heartbeats: watch::Sender<Option<Stored>>,
    /// Gets what the configuration bucket says of the site: revision 0 where there is nothing.
    pub site_record: watch::Sender<Option<Stored>>,
}

/// Begins to follow the configuration. Everything stops in order when `root` is cancelled; call
/// [`Supervisor::stop`] to wait for that.
pub fn start(deps: Deps, root: &CancellationToken) -> (Handle, Supervisor) {
    let (table, view) = watch::channel(Table::default());
    let stop = root.child_token();
    let group = Group::follow(deps.positions.clone(), deps.leases.clone());
    let handle = Handle { table: view.clone(), group, instance: deps.instance.as_str().into() };
    let neighbours = Neighbours::new(&deps.site, &deps.rules);
    let work = Loop {
        deps: Arc::new(deps),
        neighbours,
        stop: stop.clone(),
        table,
        lives: JoinSet::new(),
        slots: HashMap::new(),
        marks: HashMap::new(),
    };
    let task = tokio::spawn(work.run());
    (handle, Supervisor { stop, task, table: view })
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
        warn!(replications = late.join(", "), "did not stop within {grace:.1?}; messages in flight are copied again");
        late
    }
}

/// A watch that begins again tells what is already known.
fn news(key: &watch::Sender<Option<Stored>>, stored: Stored) {
    key.send_if_modified(|known| {
        let news = known.as_ref() != Some(&stored);
        *known = Some(stored);
        news
    });
}

/// Nothing is there, or it was removed while there was no watch.
fn removed(key: &watch::Sender<Option<Stored>>) {
    let known = key.borrow().clone();
    if known.is_none_or(|known| known.value.is_some()) {
        news(key, Stored { revision: 0, value: None });
    }
}

/// What the face may ask of the supervisor; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct Handle {
    table: watch::Receiver<Table>,
    group: Group,
    instance: Arc<str>,
}

/// One process of the group.
#[derive(Debug, Clone)]
pub struct Peer {
    /// What it says of itself.
    pub session: SessionRecord,
    /// Time since it was heard of last.
    pub silent: Duration,
    /// Ids of the replications that it leads, sorted.
    pub leads: Vec<String>,
}

impl Handle {
    /// All rows as the group sees them, sorted by id.
    pub fn rows(&self) -> Vec<Row> {
        self.table.borrow().boards.values().map(|board| self.view(board)).collect()
    }

    /// The row of one replication as the group sees it.
    pub fn row(&self, id: &str) -> Option<Row> {
        let board = self.table.borrow().boards.get(id).cloned()?;
        Some(self.view(&board))
    }

    /// The row of one replication as the group sees it, and the time of its source server.
    pub fn row_and_time(&self, id: &str) -> Option<(Row, DateTime<Utc>)> {
        let board = self.table.borrow().boards.get(id).cloned()?;
        let row = self.view(&board);
        let time = self.source_time(&board, &row);
        Some((row, time))
    }

    /// The installation that a replication counts as its own's at the source, where its position record names one.
    pub fn installation(&self, id: &str) -> Option<String> {
        self.group.record(id)?.installation
    }

    /// The time of the source server: the clock of this host counts only for what this process measured itself.
    fn source_time(&self, board: &Board, row: &Row) -> DateTime<Utc> {
        let reported = (!board.leads()).then(|| self.group.source_time(&row.replication)).flatten();
        reported.unwrap_or_else(|| row.source_time(nats_lane::entropy::now()))
    }

    /// The senders of a replication as this process knows them, if it is sampled; and whether this process leads it.
    pub fn samples(&self, id: &str) -> Option<(Samples, bool)> {
        let board = self.table.borrow().boards.get(id).cloned()?;
        Some((board.samples()?, board.leads()))
    }

    /// All rows as this process sees them, sorted by id.
    pub fn own_rows(&self) -> Vec<Row> {
        self.table.borrow().boards.values().map(|board| board.row()).collect()
    }

    /// How Choria's elections stand that this process takes part in.
    pub fn elections(&self) -> Vec<metrics::Election> {
        self.table.borrow().boards.values().filter_map(|board| board.election()).collect()
    }

    /// The processes that are there, sorted by name.
    pub fn peers(&self) -> Vec<Peer> {
        let mut leads: HashMap<String, Vec<String>> = HashMap::new();
        for (id, board) in &self.table.borrow().boards {
            if let Some(leader) = self.view(board).leader {
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
        for board in self.table.borrow().boards.values() {
            *states.entry(self.view(board).state).or_default() += 1;
        }
        states
    }

    /// What this process runs, and of what another one runs what that one saved last.
    fn view(&self, board: &Board) -> Row {
        let mut own = board.row();
        let Some(record) = self.group.record(&own.replication) else { return own };
        if !board.leads() {
            let mut row = self.leaders_row(record, own);
            row.at(self.source_time(board, &row));
            return row;
        }
        let position = record.source.map_or(0, |source| source.seq);
        if own.state == State::Paused && own.copy.position.source_seq != position {
            // Moved by another instance: what waits behind it is not known yet.
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
            // Whoever ended it in order is done with it, and somebody stands by to take it: we do.
            row.state = standing;
        } else if !fresh {
            row.state = State::Starting;
        } else if row.state == State::Running && row.leader.as_ref().is_some_and(|leader| self.group.is_doubted(leader))
        {
            // Nobody waits for what has stopped and looks caught up.
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
        // An error means that the supervisor is gone, and with it what it ran.
        let _ = table.wait_for(|table| table.marked >= revision).await;
        let board = self.table.borrow().boards.get(id).cloned();
        if let Some(board) = board.filter(|board| board.leads()) {
            let mut status = board.status().subscribe();
            let _ = status.wait_for(|(state, _)| matches!(state, State::Paused | State::Stopped)).await;
        }
        let says_so = |record: &PositionRecord| record.status.as_ref().is_some_and(|row| row.state == State::Paused);
        self.group.record_when(id, says_so).await;
    }

    /// Waits until the row of a replication says what is expected; for ever if it never does.
    pub async fn row_when(&self, id: &str, when: impl Fn(&Row) -> bool) -> Row {
        loop {
            if let Some(row) = self.row(id).filter(|row| when(row)) {
                return row;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until the deletion at `revision` of the configuration bucket has been seen and what ran before it is
    /// over, also if the replication is already there again.
    pub async fn stopped_since(&self, id: &str, revision: u64) {
        let mut table = self.table.clone();
        let over = |table: &Table| table.seen >= revision && table.boards.get(id).is_none_or(|b| b.born() > revision);
        // An error means that the supervisor is gone, and with it what it ran.
        let _ = table.wait_for(over).await;
    }

    /// Whether this is the name of another instance that is there, as far as can be told.
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
    /// The last revision of a document that was acted upon.
    seen: u64,
    /// The last revision of a mark that was acted upon.
    marked: u64,
    /// One per life.
    boards: BTreeMap<String, Arc<Board>>,
}

/// Owner of all lives.
struct Loop {
    deps: Arc<Deps>,
    neighbours: Neighbours,
    stop: CancellationToken,
    table: watch::Sender<Table>,
    lives: JoinSet<()>,
    slots: HashMap<String, Slot>,
    /// By replication, also of those that are not there.
    marks: HashMap<String, Marks>,
}

/// One life, from the outside.
struct Slot {
    task: Id,
    board: Arc<Board>,
    wanted: watch::Sender<ConfigEntry>,
    marks: watch::Sender<Marks>,
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
            Signal::Change(ConfigChange::Heartbeats(stored)) => {
                if stored.value.is_some() {
                    listed.insert(HEARTBEATS_KEY.to_owned());
                } else {
                    listed.remove(HEARTBEATS_KEY);
                }
                news(&self.deps.heartbeats, stored);
            }
            Signal::Change(ConfigChange::Site(stored)) => {
                if stored.value.is_some() {
                    listed.insert(SITE_KEY.to_owned());
                } else {
                    listed.remove(SITE_KEY);
                }
                news(&self.deps.site_record, stored);
            }
            Signal::Change(ConfigChange::Marked(mark)) => {
                let key = mark.kind.key(&mark.id);
                if mark.value.is_some() {
                    listed.insert(key);
                } else {
                    listed.remove(&key);
                }
                self.remark(&mark.id, |marks| marks.apply(&mark));
                self.table.send_modify(|table| table.marked = mark.revision);
            }
            // The revision that is told next counts.
            Signal::Change(ConfigChange::Anew) => {}
            Signal::Change(ConfigChange::Loaded) => {
                self.unmark_all_but(listed);
                if !listed.contains(HEARTBEATS_KEY) {
                    removed(&self.deps.heartbeats);
                }
                if !listed.contains(SITE_KEY) {
                    removed(&self.deps.site_record);
                }
                let gone: Vec<_> = self.slots.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                gone.iter().for_each(|key| self.delete(key));
                self.table.send_if_modified(|table| !std::mem::replace(&mut table.loaded, true));
            }
        }
    }

    /// A mark that was removed while there was no watch is not listed.
    fn unmark_all_but(&mut self, listed: &BTreeSet<String>) {
        let gone = |id: &str, marks: &Marks| {
            MarkKind::ALL.into_iter().filter(|kind| marks.has(*kind) && !listed.contains(&kind.key(id))).collect()
        };
        let all: Vec<(String, Vec<MarkKind>)> =
            self.marks.iter().map(|(id, marks)| (id.clone(), gone(id, marks))).collect();
        for (id, kinds) in all {
            self.remark(&id, |marks| kinds.iter().for_each(|kind| marks.remove(*kind)));
        }
    }

    /// Changes what is asked of a replication and tells its life.
    fn remark(&mut self, id: &str, change: impl FnOnce(&mut Marks)) {
        let mut marks = self.marks.remove(id).unwrap_or_default();
        change(&mut marks);
        if let Some(slot) = self.slots.get(id) {
            slot.marks.send_if_modified(|old| {
                *old != marks && {
                    old.clone_from(&marks);
                    true
                }
            });
        }
        if marks != Marks::default() {
            self.marks.insert(id.to_owned(), marks);
        }
    }

    /// Revisions only grow, unless the bucket was recreated. Documents of a file have none.
    fn saw(&self, revision: u64) {
        if revision != FILE_REVISION {
            self.table.send_modify(|table| table.seen = revision);
        }
    }

    fn put(&mut self, entry: ConfigEntry) {
        self.neighbours.put(&entry);
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
        self.neighbours.remove(key);
        let (config, id) = (self.deps.config.clone(), key.to_owned());
        // It must not come back behind wrong documents that are written later.
        tokio::spawn(async move {
            if let Err(error) = config.unmark(&id, MarkKind::Valid, None).await {
                debug!(replication = id, "the saved copy of a deleted document was not removed: {error}");
            }
        });
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
        let context = Context {
            deps: self.deps.clone(),
            id: id.clone(),
            board: board.clone(),
            neighbours: self.neighbours.clone(),
        };
        let planner = Planner::new(&self.deps, latest);
        let (marks, asked) = watch::channel(self.marks.get(&id).cloned().unwrap_or_default());
        let seat = self.deps.leases.seat(&id);
        let life = Life::new(context, planner, asked, seat, stop.clone());
        let task = self.lives.spawn(life.run(delay)).id();
        self.slots.insert(id, Slot { task, board, wanted, marks, stop, again: None });
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
            slot.board.failed(&Error::new(ErrorKind::Retry, panic.to_string()), None);
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
