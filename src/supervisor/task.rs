//! The task of one replication: it stands by until this instance gets the lease, then runs the replication until the
//! lease is lost, the document is deleted or the process stops.
//!
//! [`ReplicationTask`] stands by; a [`LeaderTerm`] decides what runs while the lease is ours; its
//! [`CopyRunner`](super::runner::CopyRunner) keeps that running. Terms and runs are futures of this task, not tasks of their
//! own: dropping the term drops the run and with it every connection of the copy path.

use std::{pin::pin, time::Duration};

use tokio::{sync::watch, time::sleep};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::warn;

use super::{
    context::Context, desired::Planner, leader_term::LeaderTerm, refused_documents::RefusedDocuments,
    requests::Requests, runner::CopyRunner, standby_senders::StandbySenders, verifier,
};
use crate::{
    events::Event,
    lease::{Candidacy, Grant},
    status::State,
};

/// The task of one replication in this process.
pub(super) struct ReplicationTask {
    context: Context,
    planner: Planner,
    requests: watch::Receiver<Requests>,
    candidacy: Candidacy,
    stop: CancellationToken,
    refused: RefusedDocuments,
    /// The senders of a sampled replication while another instance leads.
    senders: Option<StandbySenders>,
}

impl ReplicationTask {
    pub(super) fn new(
        context: Context,
        planner: Planner,
        requests: watch::Receiver<Requests>,
        candidacy: Candidacy,
        stop: CancellationToken,
    ) -> Self {
        Self { context, planner, requests, candidacy, stop, refused: RefusedDocuments::default(), senders: None }
    }

    /// Runs until the stop, after a `delay`.
    pub(super) async fn run(mut self, delay: Duration) {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = sleep(delay) => {}
        }
        loop {
            let grant = tokio::select! {
                biased;
                () = stop.cancelled() => return self.context.cell.set_state(State::Stopped),
                grant = self.stand_by() => grant,
            };
            let again = self.lead(&grant).await;
            self.candidacy.ended(again);
        }
    }

    /// Waits for the lease, and shows meanwhile whether the document could run.
    async fn stand_by(&mut self) -> Grant {
        let Self { context, planner, candidacy, senders, .. } = self;
        let mut granted = pin!(candidacy.granted());
        let mut newest = false;
        loop {
            let plan = async { if newest { planner.next().await } else { planner.current().await } };
            tokio::select! {
                biased;
                grant = &mut granted => return grant,
                plan = plan => {
                    newest = true;
                    let cell = &context.cell;
                    match &plan.rejected {
                        Some(rejected) => cell.rejected(&rejected.message()),
                        None => cell.accepted(),
                    }
                    let sampling = plan.work.as_ref().and_then(|work| work.replication.sampling.as_ref());
                    if senders.as_ref().is_some_and(|senders| sampling.is_none_or(|sampling| !senders.knows_enough(sampling))) {
                        *senders = None;
                    }
                    if let (None, Some(sampling)) = (&senders, sampling) {
                        *senders = Some(StandbySenders::follow(&context.deps.senders, &context.id, sampling));
                    }
                    cell.set_samples(senders.as_ref().map(StandbySenders::samples));
                    match plan.work {
                        Some(work) => {
                            cell.adopt(&work.replication, work.revision);
                            cell.set_state(State::Starting);
                        }
                        None => cell.set_state(State::Invalid),
                    }
                }
            }
        }
    }

    /// Runs the replication while the lease is ours. Returns how long to leave the lease alone after that.
    async fn lead(&mut self, grant: &Grant) -> Duration {
        let stop = self.stop.child_token();
        let Self { context, planner, requests, refused, senders, .. } = self;
        context.cell.set_leads(true);
        // Reads both streams beside the copy, and ends with the lease.
        let verifier = verifier::run(context.clone(), requests.clone(), grant.epoch);
        let _verifier = AbortOnDropHandle::new(tokio::spawn(verifier));
        let runner = CopyRunner::new(context.clone(), requests.clone(), grant.epoch, senders.take());
        let term = LeaderTerm { context, planner, requests: requests.clone(), stop: stop.clone(), runner, refused };
        // In a box: a future inside a future takes its space twice.
        let held = grant.hold(&stop, Box::pin(term.run())).await;
        let Context { id, cell, .. } = &*context;
        cell.set_leads(false);
        held.unwrap_or_else(|| {
            cell.run_over();
            cell.released();
            cell.set_state(State::Stopped);
            let position = cell.row().copy.position.source_seq;
            let why = grant.why_lost();
            warn!(replication = id, epoch = grant.epoch, position, "stopped, the lease is lost: {why}");
            let message = Some(why.to_owned());
            context.emit(Event::Stopped { position: Some(position), message });
            Duration::ZERO
        })
    }
}
