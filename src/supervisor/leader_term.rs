//! What runs while the lease is ours: follows the document, the pause and the stop.

use std::{future::pending, pin::pin, time::Duration};

use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    context::Context,
    desired::{Plan, Planner, RunnableDocument},
    record_notes::keep_pause_current,
    refused_documents::RefusedDocuments,
    requests::Requests,
    runner::{CopyRunner, RunnerEnd},
};
use crate::{config::Replication, events::Event, status::State};

/// How long messages in flight may take to settle when a run stops; then the run is dropped.
const SETTLE: Duration = Duration::from_secs(10);

/// Runs what the document and the requests ask for while the lease is ours.
pub(super) struct LeaderTerm<'a> {
    pub(super) context: &'a Context,
    pub(super) planner: &'a mut Planner,
    pub(super) requests: watch::Receiver<Requests>,
    pub(super) stop: CancellationToken,
    pub(super) runner: CopyRunner,
    pub(super) refused: &'a mut RefusedDocuments,
}

/// Why a document no longer runs.
enum Next {
    /// Another one replaces it.
    Plan(Box<Plan>),
    /// It stalls: everything is closed and opened again.
    Restart,
    /// The replication was paused.
    Pause,
}

impl LeaderTerm<'_> {
    /// Runs until the stop, or until the position record turns out to be another instance's. Returns how long to leave the
    /// lease alone after that.
    pub(super) async fn run(mut self) -> Duration {
        let stop = self.stop.clone();
        let mut plan = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            plan = self.planner.current() => Some(plan),
        };
        while let Some(now) = plan {
            // While paused it is not the planner's.
            if now.rejected.is_none() && !self.requests.borrow().paused {
                self.refused.accept(self.context);
            }
            self.refused.report(self.context, now.rejected);
            plan = match now.work {
                Some(work) if work.gone && !self.requests.borrow().paused => Box::pin(self.wait_for_stream(work)).await,
                work if self.requests.borrow().paused => Box::pin(self.stay_paused(work)).await,
                Some(work) => self.run_document(work).await,
                None => self.wait_for_valid_document().await,
            };
        }
        Box::pin(self.runner.finish()).await
    }

    /// Nothing can run: waits for a better document.
    async fn wait_for_valid_document(&mut self) -> Option<Plan> {
        self.context.cell.set_state(State::Invalid);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            () = paused(&mut self.requests) => Some(Plan { work: None, rejected: None }),
            plan = self.planner.next() => Some(plan),
        }
    }

    /// The source no longer has the stream: copies nothing until it is there again.
    async fn wait_for_stream(&mut self, work: RunnableDocument) -> Option<Plan> {
        let Self { context, planner, requests, stop, runner, refused } = self;
        context.cell.adopt(&work.replication, work.revision);
        {
            let mut noting = pin!(runner.note_gone(&work.replication.source.stream));
            let mut noted = false;
            let mut newest = false;
            loop {
                let newer = async { if newest { planner.next().await } else { planner.current().await } };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return None,
                    () = paused(requests) => break,
                    is_ours = &mut noting, if !noted => {
                        if !is_ours {
                            return None;
                        }
                        (noted, newest) = (true, false);
                    }
                    plan = newer => {
                        newest = true;
                        if plan.rejected.is_none() {
                            refused.accept(context);
                        }
                        if plan.work.as_ref().is_none_or(|new| !new.gone) {
                            context.cell.set_state(State::Starting);
                            context.cell.at_rest();
                            return Some(plan);
                        }
                        refused.report(context, plan.rejected);
                    }
                }
            }
        }
        Some(Plan { work: Some(work), rejected: None })
    }

    /// Copies nothing, whatever the document says, until the pause ends.
    async fn stay_paused(&mut self, mut work: Option<RunnableDocument>) -> Option<Plan> {
        let Self { context, planner, requests, stop, runner, refused } = self;
        let mut retention = std::mem::take(&mut runner.retention);
        if let Some(work) = &work {
            context.cell.knows(&work.replication);
        }
        {
            let mut pausing = pin!(runner.pause());
            let mut is_paused = false;
            // A plan may have been lost before, see `Planner::next`.
            let mut newest = false;
            loop {
                let newer = async { if newest { planner.next().await } else { planner.current().await } };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return None,
                    Ok(_) = requests.wait_for(|requests| !requests.paused) => break,
                    () = &mut pausing, if !is_paused => (is_paused, newest) = (true, false),
                    never = retention.follow_between_runs(context, single(&work)) => match never {},
                    never = keep_pause_current(context), if is_paused => match never {},
                    plan = newer => {
                        newest = true;
                        if plan.rejected.is_none() {
                            refused.accept(context);
                        }
                        refused.report(context, plan.rejected);
                        if let Some(new) = plan.work {
                            context.cell.set_revision(new.revision);
                            context.cell.knows(&new.replication);
                            if work.as_ref().is_some_and(|old| old.replication != new.replication) {
                                context.emit(Event::ConfigChanged { revision: new.revision });
                            }
                            work = Some(new);
                        }
                    }
                }
            }
        }
        runner.retention = retention;
        if runner.superseded || !runner.resume().await {
            return None;
        }
        let mut plan = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            plan = planner.current() => plan,
        };
        plan.work = plan.work.or(work);
        Some(plan)
    }

    /// Runs a document until another one replaces it, and ends that run gracefully.
    async fn run_document(&mut self, mut work: RunnableDocument) -> Option<Plan> {
        let mut next = match self.copy_until_replaced(&mut work).await? {
            Next::Plan(plan) => *plan,
            Next::Pause => return Some(Plan { work: Some(work), rejected: None }),
            Next::Restart => return self.plan_again(work).await,
        };
        if self.planner.is_outdated() {
            next = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                plan = self.planner.current() => plan,
            };
        }
        // Without one, the history no longer has a valid document: the one that ran is the newest.
        let new = next.work.get_or_insert(work);
        // A stream that is gone is reported as such.
        if !new.gone {
            info!(replication = self.context.id, revision = new.revision, "follows the changed document");
            self.context.emit(Event::ConfigChanged { revision: new.revision });
        }
        // The new document may turn out not to run.
        self.context.cell.set_state(State::Starting);
        Some(next)
    }

    /// Plans as after a start, but continues with the document that ran if no other can run.
    async fn plan_again(&mut self, work: RunnableDocument) -> Option<Plan> {
        let mut plan = tokio::select! {
            biased;
            () = self.stop.cancelled() => return None,
            plan = self.planner.current() => plan,
        };
        plan.work.get_or_insert(work);
        Some(plan)
    }

    /// Copies until a document replaces this one. A document that cannot run does not; an equal one only updates the revision.
    async fn copy_until_replaced(&mut self, work: &mut RunnableDocument) -> Option<Next> {
        let replication = work.replication.clone();
        let stop = CancellationToken::new();
        let mut copying = pin!(self.runner.copy(&replication, work.revision, &stop));
        let next = loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break None,
                () = paused(&mut self.requests) => break Some(Next::Pause),
                plan = self.planner.next() => {
                    if plan.rejected.is_none() {
                        self.refused.accept(self.context);
                    }
                    if plan.work.as_ref().is_some_and(|new| new.replication != replication || new.gone) {
                        break Some(Next::Plan(Box::new(plan)));
                    }
                    if let Some(new) = plan.work {
                        self.context.cell.set_revision(new.revision);
                        work.revision = new.revision;
                    }
                    self.refused.keep(self.context, work, plan.rejected.as_ref());
                    self.refused.report(self.context, plan.rejected);
                }
                ended = &mut copying => {
                    if ended == RunnerEnd::Stalled {
                        return Some(Next::Restart);
                    }
                    // Superseded: nothing may run again under this lease, whatever the document says.
                    return None;
                }
            }
        };
        stop.cancel();
        if timeout(SETTLE, copying).await.is_err() {
            let id = &self.context.id;
            warn!(replication = id, "did not settle within {SETTLE:?}; messages in flight are copied again");
        }
        next
    }
}

/// The replication, if it copies a stream.
fn single(work: &Option<RunnableDocument>) -> Option<&Replication> {
    work.as_ref().map(|work| &work.replication).filter(|replication| replication.patterns.is_none())
}

/// Waits until the replication is paused.
async fn paused(requests: &mut watch::Receiver<Requests>) {
    if requests.wait_for(|requests| requests.paused).await.is_err() {
        // The supervisor is gone: the stop follows.
        pending::<()>().await;
    }
}
