//! Heartbeats: small messages at regular times on subjects that streams listen on, so that observers of the copies
//! see that everything on the way works. The heartbeats come from the configuration bucket, else from the file of the
//! site; `plan` decides which, `publisher` publishes until the plan changes.

mod plan;
mod publisher;
mod stats;

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, info, warn};

use self::{
    plan::{HeartbeatPlan, HeartbeatPlanner},
    publisher::Publisher,
    stats::HeartbeatStats,
};
use nats_lane::ServerRef;

use crate::{
    allow::AllowList,
    config::{Heartbeats, Problem, Problems, one_line},
    events::{Event, Events},
    metrics,
    names::HEARTBEATS_KEY,
    status::Origin,
    store::{ConfigStore, Stored},
};

/// Deadline for the end: a campaign releases its key.
const GRACE: Duration = Duration::from_secs(3);

/// Dependencies of the heartbeats.
#[derive(Debug)]
pub struct HeartbeatDeps {
    /// The site's name.
    pub site: String,
    /// This process, as the server shows it.
    pub instance: String,
    /// Name of this host, for the header and as a candidate.
    pub host: String,
    /// The servers that they may connect to.
    pub rules: AllowList,
    /// The store of their documents.
    pub config: ConfigStore,
    /// The stored document, as the supervisor sees it; `None` before its first read.
    pub stored: watch::Receiver<Option<Stored>>,
    /// The document in the file of the site, valid by these rules; `null` for none.
    pub file: Value,
    /// Publishes events.
    pub events: Events,
}

/// The running heartbeats, and a rejected document.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Origin of the running document.
    pub origin: Origin,
    /// Its revision, if it is from the bucket.
    pub revision: Option<u64>,
    /// As written, secrets and all; `null` for nothing.
    pub document: Value,
    /// The newest in the bucket, if it is not valid.
    pub rejected: Option<RefusedHeartbeats>,
    /// Revision of the bucket that this takes into account.
    seen: u64,
}

/// A rejected document of heartbeats.
#[derive(Debug, Clone, PartialEq)]
pub struct RefusedHeartbeats {
    /// Their revision.
    pub revision: u64,
    /// As written; `null` if that is no JSON.
    pub document: Value,
    /// Their problems.
    pub problems: Vec<Problem>,
}

/// Begins to publish the planned heartbeats.
pub fn start(deps: HeartbeatDeps) -> (HeartbeatHandle, Runner) {
    let stop = CancellationToken::new();
    let (shown, view) = watch::channel(View::default());
    let stats = Arc::new(HeartbeatStats::new(&deps.host));
    let handle = HeartbeatHandle { view, stats: stats.clone() };
    let work = HeartbeatWork { planner: HeartbeatPlanner::new(&deps), deps, stats, shown, runs: None, refused: 0 };
    let task = AbortOnDropHandle::new(tokio::spawn(work.run(stop.clone())));
    (handle, Runner { stop, task })
}

/// The running heartbeats, for their stop.
#[derive(Debug)]
pub struct Runner {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Runner {
    /// Stops publishing, and releases the election's key; `false` if that took too long.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        timeout(GRACE, self.task).await.is_ok()
    }
}

/// The queries of the control and HTTP interfaces; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct HeartbeatHandle {
    view: watch::Receiver<View>,
    stats: Arc<HeartbeatStats>,
}

impl HeartbeatHandle {
    /// The running heartbeats.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until this revision of the bucket has been taken into account.
    pub async fn considered(&self, revision: u64) {
        // An error means that the heartbeats have stopped.
        let _ = self.view.clone().wait_for(|view| view.seen >= revision).await;
    }

    /// For the metrics page; `None` where nothing is configured.
    pub fn reading(&self) -> Option<metrics::HeartbeatReading> {
        self.stats.reading()
    }

    /// The state of the election, if one is configured.
    pub fn election(&self) -> Option<metrics::ElectionReading> {
        self.stats.election()
    }
}

/// Compares the plan with the running heartbeats.
struct HeartbeatWork {
    deps: HeartbeatDeps,
    planner: HeartbeatPlanner,
    stats: Arc<HeartbeatStats>,
    shown: watch::Sender<View>,
    runs: Option<Running>,
    /// The last revision that was rejected.
    refused: u64,
}

/// A publisher at work.
struct Running {
    heartbeats: Heartbeats,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl HeartbeatWork {
    async fn run(mut self, stop: CancellationToken) {
        let mut stored = self.deps.stored.clone();
        loop {
            let newest = stored.borrow_and_update().clone();
            if let Some(newest) = newest {
                let Some(plan) = stop.run_until_cancelled(self.planner.plan(&newest)).await else { break };
                self.refuse(plan.view.rejected.as_ref());
                self.change(plan).await;
            }
            if stop.run_until_cancelled(changed(&mut stored)).await.is_none() {
                break;
            }
        }
        self.end().await;
    }

    /// Reports the problems of each revision once.
    fn refuse(&mut self, rejected: Option<&RefusedHeartbeats>) {
        let Some(RefusedHeartbeats { revision, problems, .. }) =
            rejected.filter(|found| found.revision != self.refused)
        else {
            return;
        };
        self.refused = *revision;
        error!(revision, "heartbeats refused, the previous ones continue: {}", one_line(problems));
        let event = Event::ConfigRejected { revision: *revision, problems: problems.clone() };
        self.deps.events.emit(event, HEARTBEATS_KEY);
    }

    async fn change(&mut self, plan: HeartbeatPlan) {
        let running = self.runs.as_ref().map(|running| &running.heartbeats);
        if running != plan.heartbeats.as_ref() {
            self.end().await;
            self.begin(plan.heartbeats, &plan.view);
        }
        self.shown.send_replace(plan.view);
    }

    fn begin(&mut self, heartbeats: Option<Heartbeats>, view: &View) {
        self.stats.begin(heartbeats.as_ref());
        let Some(heartbeats) = heartbeats else { return info!("no heartbeats are published") };
        let (origin, subjects, server) = (view.origin.name(), heartbeats.subjects.len(), &heartbeats.place);
        info!(origin, revision = view.revision, subjects, %server, "heartbeats are published");
        if view.origin == Origin::Kv && self.planner.has_file() {
            warn!(
                "the heartbeats in the configuration bucket take precedence over those of the file, which are not published"
            );
        }
        if let ServerRef::Known(connection) = &heartbeats.place
            && connection.endpoint.tls.insecure
        {
            warn!(%server, "the certificate of the server for heartbeats is not verified");
        }
        let stop = CancellationToken::new();
        let publisher = Publisher::new(&self.deps, heartbeats.clone(), self.stats.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(publisher.run(stop.clone())));
        self.runs = Some(Running { heartbeats, stop, task });
    }

    async fn end(&mut self) {
        let Some(Running { stop, task, .. }) = self.runs.take() else { return };
        stop.cancel();
        let _ = task.await;
    }
}

/// Waits until the stored document changes.
async fn changed(stored: &mut watch::Receiver<Option<Stored>>) {
    if stored.changed().await.is_err() {
        // The supervisor is gone; the stop is on its way.
        std::future::pending::<()>().await;
    }
}

impl RefusedHeartbeats {
    fn new(revision: u64, document: Value, problems: Problems) -> Self {
        Self { revision, document, problems: problems.bounded().0 }
    }
}
