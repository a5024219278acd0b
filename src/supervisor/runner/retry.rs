//! After an error: what is reported, what is repaired, and how long the next attempt waits.

use std::{future::pending, pin::pin, time::Duration};

use nats_lane::{ServerRef, backoff::jitter};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::{CatchUp, CopyRunner, release::clear_release};
use crate::{
    config::Replication,
    copy::{self, Error, ErrorKind, ErrorSide, PositionWriter},
    events::{Event, Step},
    status::State,
    supervisor::{
        context::Context,
        requests::{Release, Requests},
    },
};

/// Pause before the next attempt when the last one took longer than its backoff.
const SOON: Duration = Duration::from_millis(200);

/// Pauses between attempts while held.
const HELD: Duration = copy::LONGEST_PAUSE;

impl CopyRunner {
    /// The state until the next attempt, and how long that one waits.
    fn next_attempt(&mut self, kind: ErrorKind, begun: Instant) -> (State, Duration) {
        if kind == ErrorKind::Hold {
            return (State::Held, jitter(HELD, rand::random()));
        }
        // An attempt that waited for missing answers has waited enough.
        let delay = self.backoff.next(rand::random());
        let left = delay.saturating_sub(begun.elapsed());
        (State::Retrying, left.max(delay.min(jitter(SOON, rand::random()))))
    }

    /// Reports an error of the attempt that began at `begun`, and waits until the next one is due. Returns what that one
    /// has to open again, or an error if the record turns out to belong to another instance.
    pub(super) async fn wait_after_error(
        &mut self,
        error: Error,
        replication: &Replication,
        begun: Instant,
        stop: &CancellationToken,
    ) -> Result<Step, Error> {
        if stop.is_cancelled() {
            warn!(replication = self.context.id, "ended with an error while it was stopped: {error}");
            self.context.cell.failed(&error, None);
            return Ok(Step::Connections);
        }
        if !self.outage.is_open() {
            self.escalation.over();
        }
        let step = self.escalation.failed(&error);
        self.report(&error, step, server_of(&error, replication));
        let copied = self.context.cell.copied();
        self.catching_up.get_or_insert_with(|| CatchUp::from(copied));
        let (state, delay) = self.next_attempt(error.kind, begun);
        let wake = Instant::now() + delay;
        self.context.cell.set_state(state);
        let saved = self.writer.as_ref().map(PositionWriter::saved);
        let (context, mut requests, acted_upon) = (self.context.clone(), self.requests.clone(), self.released);
        let asked = requests.clone();
        let released =
            |requests: &Requests| requests.release.is_some_and(|release| Some(release.revision) != acted_upon);
        let cleared = async {
            match saved {
                Some(saved) => {
                    // A release that was not handled yet is for the next attempt.
                    let due = |release: &Release| Some(release.revision) == acted_upon;
                    clear_release(&context, asked, saved, due).await
                }
                None => pending().await,
            }
        };
        let mut save_and_wait = pin!(async {
            self.save_row().await?;
            tokio::select! {
                () = sleep_until(wake) => {}
                Ok(_) = requests.wait_for(released) => {
                    // The operator asked for a retry: its result is not known yet.
                    self.backoff.reset();
                    context.cell.set_state(State::Starting);
                }
            }
            Ok(())
        });
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(step),
            result = &mut save_and_wait => result.map(|()| step),
            never = cleared => match never {},
        }
    }

    pub(super) fn end_superseded(&mut self, error: &Error) {
        self.writer = None;
        self.superseded = true;
        self.report(error, Step::Connections, None);
        self.context.cell.released();
        self.context.cell.set_state(State::Stopped);
    }

    /// `server` is the one that a transient error is about.
    fn report(&mut self, error: &Error, step: Step, server: Option<String>) {
        let Error { kind, message, .. } = error;
        let Context { id, cell, .. } = &self.context;
        cell.failed(error, (*kind == ErrorKind::Retry).then_some(step));
        let report = self.outage.failed(error, step);
        match (report.news, kind) {
            (false, _) => debug!(replication = id, "again: {message}"),
            (true, ErrorKind::Retry) => warn!(replication = id, "stalled, trying again: {message}"),
            (true, ErrorKind::Hold) => error!(replication = id, "held: {message}"),
            (true, ErrorKind::Superseded) => error!(replication = id, "gives it up: {message}"),
        }
        if *kind != ErrorKind::Retry {
            self.context.outages.left(id);
        }
        for event in report.events {
            match (&event, &server) {
                (Event::Stalled { .. }, Some(server)) => self.context.outages.stalled(server.clone(), id, event),
                _ => self.context.emit(event),
            }
        }
    }
}

/// The server that an error is about, without secrets.
fn server_of(error: &Error, replication: &Replication) -> Option<String> {
    let side = match error.side? {
        ErrorSide::Source => &replication.source,
        ErrorSide::Target => &replication.target,
    };
    Some(match &side.place {
        ServerRef::Known(connection) => {
            connection.endpoint.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        }
        context @ ServerRef::Context { .. } => context.to_string(),
    })
}
