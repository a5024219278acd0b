//! Heartbeats: small messages at regular times on subjects that streams listen on, so that whoever watches the copies
//! sees that everything on the way works. What should run comes from the configuration bucket, else from the file of the
//! site; `plan` decides which, `publisher` publishes until something else should run.

mod board;
mod plan;
mod publisher;

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, info, warn};

use self::{
    board::HeartbeatStats,
    plan::{HeartbeatPlan, HeartbeatPlanner},
    publisher::Publisher,
};
use nats_lane::ServerRef;

use crate::{
    allow::AllowList,
    config::{Heartbeats, Problem, Problems},
    events::{Event, Events},
    metrics,
    names::HEARTBEATS_KEY,
    status::Origin,
    store::{ConfigStore, Stored},
};

/// Deadline for the end: a campaign frees its key.
const GRACE: Duration = Duration::from_secs(3);

/// What the heartbeats need from the outside.
#[derive(Debug)]
pub struct Deps {
    /// The site's name.
    pub site: String,
    /// This process, as the server shows it.
    pub instance: String,
    /// Name of this host, for the header and as a candidate.
    pub host: String,
    /// Where they may lead.
    pub rules: AllowList,
    /// Where they are stored.
    pub config: ConfigStore,
    /// What lies there, as the supervisor sees it; `None` before it has looked.
    pub stored: watch::Receiver<Option<Stored>>,
    /// What the file of the site says, valid by these rules; `null` for nothing.
    pub file: Value,
    /// Where events are published.
    pub events: Events,
}

/// What runs, and what does not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Where what runs is from.
    pub origin: Origin,
    /// Its revision, if it is from the bucket.
    pub revision: Option<u64>,
    /// As written, secrets and all; `null` for nothing.
    pub document: Value,
    /// The newest in the bucket, if it cannot run.
    pub rejected: Option<Rejected>,
    /// Revision of the bucket that this considers.
    seen: u64,
}

/// Heartbeats that cannot run.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejected {
    /// Their revision.
    pub revision: u64,
    /// As written; `null` if that is no JSON.
    pub document: Value,
    /// Their problems.
    pub problems: Vec<Problem>,
}

/// Begins to publish what should be published.
pub fn start(deps: Deps) -> (Handle, Runner) {
    let stop = CancellationToken::new();
    let (told, view) = watch::channel(View::default());
    let board = Arc::new(HeartbeatStats::new(&deps.host));
    let handle = Handle { view, board: board.clone() };
    let work = Work { planner: HeartbeatPlanner::new(&deps), deps, board, told, runs: None, refused: 0 };
    let task = AbortOnDropHandle::new(tokio::spawn(work.run(stop.clone())));
    (handle, Runner { stop, task })
}

/// The running heartbeats, for the one who stops them.
#[derive(Debug)]
pub struct Runner {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Runner {
    /// Publishes nothing more, and frees what was won; `false` if that took too long.
    pub async fn stop(self) -> bool {
        self.stop.cancel();
        timeout(GRACE, self.task).await.is_ok()
    }
}

/// What the face may ask; cheap to clone, answers from memory.
#[derive(Debug, Clone)]
pub struct Handle {
    view: watch::Receiver<View>,
    board: Arc<HeartbeatStats>,
}

impl Handle {
    /// What runs.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until this revision of the bucket has been considered.
    pub async fn considered(&self, revision: u64) {
        // An error means that nothing runs any more.
        let _ = self.view.clone().wait_for(|view| view.seen >= revision).await;
    }

    /// For the metrics page; `None` where nothing is configured.
    pub fn reading(&self) -> Option<metrics::HeartbeatReading> {
        self.board.reading()
    }

    /// How the election stands, where one is asked for.
    pub fn election(&self) -> Option<metrics::ElectionReading> {
        self.board.election()
    }
}

/// Holds what should run against what runs.
struct Work {
    deps: Deps,
    planner: HeartbeatPlanner,
    board: Arc<HeartbeatStats>,
    told: watch::Sender<View>,
    runs: Option<Running>,
    /// Revision that was refused last.
    refused: u64,
}

/// A publisher at work.
struct Running {
    heartbeats: Heartbeats,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Work {
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

    /// Tells once per revision what is wrong with it.
    fn refuse(&mut self, rejected: Option<&Rejected>) {
        let Some(Rejected { revision, problems, .. }) = rejected.filter(|found| found.revision != self.refused) else {
            return;
        };
        self.refused = *revision;
        let told: Vec<_> = problems.iter().map(|problem| format!("{}: {}", problem.path, problem.message)).collect();
        error!(revision, "heartbeats refused, the previous ones continue: {}", told.join("; "));
        let event = Event::ConfigRejected { revision: *revision, problems: problems.clone() };
        self.deps.events.emit(event, HEARTBEATS_KEY);
    }

    async fn change(&mut self, plan: HeartbeatPlan) {
        let running = self.runs.as_ref().map(|running| &running.heartbeats);
        if running != plan.heartbeats.as_ref() {
            self.end().await;
            self.begin(plan.heartbeats, &plan.view);
        }
        self.told.send_replace(plan.view);
    }

    fn begin(&mut self, heartbeats: Option<Heartbeats>, view: &View) {
        self.board.begin(heartbeats.as_ref());
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
        let publisher = Publisher::new(&self.deps, heartbeats.clone(), self.board.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(publisher.run(stop.clone())));
        self.runs = Some(Running { heartbeats, stop, task });
    }

    async fn end(&mut self) {
        let Some(Running { stop, task, .. }) = self.runs.take() else { return };
        stop.cancel();
        let _ = task.await;
    }
}

/// Waits until something else lies in the bucket.
async fn changed(stored: &mut watch::Receiver<Option<Stored>>) {
    if stored.changed().await.is_err() {
        // The supervisor is gone; the stop is on its way.
        std::future::pending::<()>().await;
    }
}

impl Rejected {
    fn new(revision: u64, document: Value, problems: Problems) -> Self {
        Self { revision, document, problems: problems.0 }
    }
}
