//! Choria's data adapters: many in one process, each reads a subject and publishes to a stream, see
//! [`crate::choria::adapter`] for what becomes of a message.
//!
//! Documents are beside those of replications, at the keys `adapters/<NAME>` of the configuration bucket, or in the file of the
//! site. `plan` decides which revision runs, `task` runs it. Every instance reads (they share a queue group), or with
//! `exclusive` the one that has the lease; with `durable` from a stream (`durable.rs`). The lease only decides who reads: what was accepted is published in any case, because
//! ids make that safe.

mod drops;
mod durable;
mod gate;
mod link;
mod plan;
mod queue;
mod row;
mod task;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, future::join_all};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, info, warn};

pub use self::row::{AdapterConnection, AdapterError, AdapterQueue, AdapterRow, AdapterState};
use self::{
    gate::GateKeeper,
    plan::{AdapterPlan, RefusedAdapter},
    row::AdapterCell,
    task::{AdapterJob, AdapterTask},
};
use crate::{
    allow::AllowList,
    config::{Adapter, Problem, one_line},
    events::{Event, Events},
    lease::Leases,
    metrics::AdapterReading,
    names::{self, ADAPTERS_PREFIX},
    status,
    store::{ConfigChange, ConfigStore},
};

/// Deadline for all adapters when the process stops: the queues are published.
const GRACE: Duration = Duration::from_secs(7);
/// Between two attempts to watch the configuration.
const AGAIN: Duration = Duration::from_secs(1);
/// End of the key that pauses an adapter.
const PAUSED: &str = "/paused";

/// Dependencies of the adapters.
#[derive(Debug, Clone)]
pub struct AdapterDeps {
    /// The site's name.
    pub site: String,
    /// This process.
    pub instance: String,
    /// Where documents may connect to.
    pub rules: AllowList,
    /// The store of the documents.
    pub config: ConfigStore,
    /// Publishes events.
    pub events: Events,
    /// The leases, for adapters that only one instance runs.
    pub leases: Leases,
}

/// The key of an adapter's document.
pub fn adapter_key(name: &str) -> String {
    format!("{ADAPTERS_PREFIX}{name}")
}

/// The key that pauses an adapter while it is there.
pub fn pause_key(name: &str) -> String {
    format!("{ADAPTERS_PREFIX}{name}{PAUSED}")
}

/// Begins to run the configured adapters.
pub fn start(deps: AdapterDeps) -> (AdapterHandle, AdapterRunner) {
    let stop = CancellationToken::new();
    let (seen, revision) = watch::channel(0);
    let table = Arc::new(Mutex::new(BTreeMap::new()));
    let handle = AdapterHandle { table: table.clone(), seen: revision };
    let work = AdapterWork { deps, table, seen, running: BTreeMap::new(), draining: Vec::new(), loaded: false };
    let task = AbortOnDropHandle::new(tokio::spawn(work.run(stop.clone())));
    (handle, AdapterRunner { stop, task })
}

/// The running adapters, for their stop.
#[derive(Debug)]
pub struct AdapterRunner {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl AdapterRunner {
    /// Stops reading and publishes what was accepted; `false` if that took too long.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        timeout(GRACE, self.task).await.is_ok()
    }
}

/// One configured adapter.
#[derive(Debug, Clone)]
pub struct AdapterView {
    /// The newest revision.
    pub revision: u64,
    /// The newest document, as written; `null` if that is not JSON.
    pub document: Value,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// Its state in this process.
    pub row: AdapterRow,
}

/// What is shown of one adapter.
#[derive(Debug, Clone)]
struct AdapterEntry {
    revision: u64,
    document: Value,
    problems: Vec<Problem>,
    cell: Arc<AdapterCell>,
}

type AdapterTable = Arc<Mutex<BTreeMap<String, AdapterEntry>>>;

/// The queries of the control and HTTP interfaces; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct AdapterHandle {
    table: AdapterTable,
    seen: watch::Receiver<u64>,
}

impl AdapterHandle {
    /// All adapters, sorted by name.
    pub fn all(&self) -> Vec<AdapterView> {
        lock(&self.table).values().map(AdapterEntry::view).collect()
    }

    /// One adapter.
    pub fn get(&self, name: &str) -> Option<AdapterView> {
        lock(&self.table).get(name).map(AdapterEntry::view)
    }

    /// Waits until this revision of the bucket has been taken into account.
    pub async fn considered(&self, revision: u64) {
        // An error means that the adapters have stopped.
        let _ = self.seen.clone().wait_for(|seen| *seen >= revision).await;
    }

    /// For the metrics page.
    pub fn readings(&self) -> Vec<AdapterReading> {
        let table = lock(&self.table);
        table.values().map(|entry| entry.cell.reading()).filter(|reading| !reading.name.is_empty()).collect()
    }
}

impl AdapterEntry {
    fn view(&self) -> AdapterView {
        let Self { revision, document, problems, cell } = self;
        AdapterView { revision: *revision, document: document.clone(), problems: problems.clone(), row: cell.row() }
    }
}

fn lock(table: &Mutex<BTreeMap<String, AdapterEntry>>) -> MutexGuard<'_, BTreeMap<String, AdapterEntry>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compares the documents with what runs.
struct AdapterWork {
    deps: AdapterDeps,
    table: AdapterTable,
    seen: watch::Sender<u64>,
    running: BTreeMap<String, ConfiguredAdapter>,
    /// Tasks that publish what their adapters had accepted.
    draining: Vec<AbortOnDropHandle<()>>,
    /// Whether everything in the bucket is known, pauses too.
    loaded: bool,
}

/// One adapter with a document, a pause, or both.
#[derive(Default)]
struct ConfiguredAdapter {
    plan: AdapterPlan,
    paused: bool,
    running: Option<RunningAdapter>,
}

/// A task at work.
struct RunningAdapter {
    adapter: Arc<Adapter>,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
    gate: GateKeeper,
}

impl AdapterWork {
    async fn run(mut self, stop: CancellationToken) {
        let _ = stop.run_until_cancelled(self.follow()).await;
        for (_, mut configured) in std::mem::take(&mut self.running) {
            self.end(&mut configured);
        }
        join_all(self.draining).await;
    }

    async fn follow(&mut self) {
        let mut reported = String::new();
        let mut changes = loop {
            match self.deps.config.watch("adapters").await {
                Ok(changes) => break changes,
                Err(found) => {
                    if reported != found.to_string() {
                        reported = found.to_string();
                        warn!("the adapters cannot be read, trying again: {reported}");
                    }
                    sleep(AGAIN).await;
                }
            }
        };
        while let Some(change) = changes.next().await {
            match change {
                Ok(change) => self.change(change).await,
                Err(found) => warn!("{found}; the adapters run as they were configured before"),
            }
        }
    }

    async fn change(&mut self, change: ConfigChange) {
        match change {
            ConfigChange::Put(entry) => {
                if let Some(name) = entry.key.strip_prefix(ADAPTERS_PREFIX) {
                    self.put(name, entry.revision, Some(entry.value)).await;
                }
                self.saw(entry.revision);
            }
            ConfigChange::Deleted { key, revision } => {
                if let Some(name) = key.strip_prefix(ADAPTERS_PREFIX) {
                    self.put(name, revision, None).await;
                }
                self.saw(revision);
            }
            ConfigChange::Heartbeats(stored) | ConfigChange::Site(stored) => self.saw(stored.revision),
            ConfigChange::Marked(mark) => self.saw(mark.revision),
            ConfigChange::Recreated => _ = self.seen.send_replace(0),
            ConfigChange::Loaded => {
                self.loaded = true;
                let names: Vec<_> = self.running.keys().cloned().collect();
                names.iter().for_each(|name| self.apply(name));
            }
        }
    }

    fn saw(&self, revision: u64) {
        self.seen.send_modify(|seen| *seen = revision.max(*seen));
    }

    /// A document or a pause was written or removed.
    async fn put(&mut self, key: &str, revision: u64, value: Option<Bytes>) {
        if let Some(name) = key.strip_suffix(PAUSED) {
            self.running.entry(name.to_owned()).or_default().paused = value.is_some();
            return self.apply(name);
        }
        let name = key.to_owned();
        let configured = self.running.entry(name.clone()).or_default();
        match value {
            None => configured.plan.remove(),
            Some(value) => {
                configured.plan.put(&self.deps, &name, revision, &value).await;
                if let Some(refused) = &configured.plan.refused {
                    report(&self.deps.events, &name, refused);
                }
            }
        }
        self.apply(&name);
    }

    /// Starts, changes or stops what runs.
    fn apply(&mut self, name: &str) {
        if !self.loaded {
            return;
        }
        let Some(mut configured) = self.running.remove(name) else { return };
        let wanted = configured.plan.adapter.clone();
        let runs = configured.running.as_ref().map(|running| running.adapter.clone());
        if runs != wanted {
            // The next one reads before this one ends: nothing is missed in between.
            let next = wanted.map(|adapter| self.begin(name, adapter, &configured));
            self.end(&mut configured);
            configured.running = next;
        }
        if let Some(running) = &configured.running {
            running.gate.pause(configured.paused);
        }
        self.show(name, &configured);
        if configured.plan.revision.is_some() || configured.paused {
            self.running.insert(name.to_owned(), configured);
        }
    }

    fn show(&self, name: &str, configured: &ConfiguredAdapter) {
        let mut table = lock(&self.table);
        let AdapterPlan { revision, document, refused, runs, .. } = &configured.plan;
        let Some(revision) = revision else {
            table.remove(name);
            return;
        };
        let known = table.get(name).map(|entry| entry.cell.clone());
        let cell = configured.running.as_ref().map(|running| running.gate.cell()).or(known).unwrap_or_default();
        {
            let row = &mut cell.lock().row;
            name.clone_into(&mut row.adapter);
            self.deps.instance.clone_into(&mut row.instance);
            status::origin(*revision).clone_into(&mut row.origin);
            row.config_revision = runs.unwrap_or_default();
            if configured.running.is_none() {
                row.state = AdapterState::Invalid;
            }
        }
        let problems = refused.as_ref().map(|refused| refused.problems.clone()).unwrap_or_default();
        let entry = AdapterEntry { revision: *revision, document: document.clone(), problems, cell };
        table.insert(name.to_owned(), entry);
    }

    fn begin(&self, name: &str, adapter: Arc<Adapter>, configured: &ConfiguredAdapter) -> RunningAdapter {
        let AdapterDeps { site, instance, rules, events, leases, .. } = &self.deps;
        let cell = Arc::new(AdapterCell::default());
        {
            let row = &mut cell.lock().row;
            (row.ingest.server, row.stream.server) = (adapter.ingest.to_string(), adapter.target.to_string());
            row.queue.capacity = adapter.queue_messages;
            row.queue.capacity_bytes = adapter.queue_bytes;
        }
        let key = adapter_key(name);
        let stop = CancellationToken::new();
        let candidacy = adapter.exclusive.then(|| leases.candidacy(&key));
        let (keeper, gate) = GateKeeper::new(cell.clone(), configured.paused, candidacy);
        let job = AdapterJob {
            adapter: adapter.clone(),
            rules: rules.clone(),
            events: events.clone(),
            cell,
            gate,
            stop: stop.clone(),
            connection_name: format!("{} {site}/{instance} adapter {name}", names::PROGRAM),
            key,
        };
        info!(adapter = name, revision = configured.plan.runs, exclusive = adapter.exclusive, "adapter starts");
        let task = AbortOnDropHandle::new(tokio::spawn(AdapterTask::new(job).run()));
        RunningAdapter { adapter, stop, task, gate: keeper }
    }

    /// Stops a task, which still publishes what it has accepted.
    fn end(&mut self, configured: &mut ConfiguredAdapter) {
        let Some(RunningAdapter { stop, task, .. }) = configured.running.take() else { return };
        stop.cancel();
        self.draining.retain(|task| !task.is_finished());
        self.draining.push(task);
    }
}

fn report(events: &Events, name: &str, refused: &RefusedAdapter) {
    let RefusedAdapter { revision, problems } = refused;
    error!(adapter = name, revision, "adapter refused, the previous document continues: {}", one_line(problems));
    events.emit(Event::ConfigRejected { revision: *revision, problems: problems.clone() }, &adapter_key(name));
}
