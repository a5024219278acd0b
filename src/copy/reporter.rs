//! Reporting of a run: its status, its events and its log lines.

use std::sync::Arc;

use nats_lane::{Lane, entropy as chance, excerpt, jetstream::Api};
use tokio::{
    sync::watch,
    time::{Duration, Instant},
};
use tracing::{info, warn};

use super::{
    Job, PoisonMessage,
    decide::Reason,
    flow::{
        position::PositionWriter,
        unsaved::{Copied, News},
    },
    objects::Incomplete,
    source::clock::SourceClock,
};
use crate::{
    config::Replication,
    events::{Event, Events, PoisonAction},
    status::{CopyStatus, LastError, Row, State},
    store::SourceMessage,
};

/// Time for the source to show a message that the target refused.
const DESCRIBED: Duration = Duration::from_secs(2);

/// Reports what one run does.
#[derive(Debug)]
pub(super) struct Reporter<'a> {
    pub job: &'a Job,
    /// What is copied, with the bounds of this run.
    pub replication: Arc<Replication>,
    status: &'a watch::Sender<(State, CopyStatus)>,
    events: &'a Events,
    pub copy: CopyStatus,
    /// The reported state: an error of before remains until this run has copied.
    state: State,
    /// Where the run began.
    from: u64,
    /// It was reported that the position is not saved.
    unsaved: bool,
}

impl<'a> Reporter<'a> {
    /// For a run that resumes after a position and continues from the values in the status.
    pub fn new(
        job: &'a Job,
        replication: Arc<Replication>,
        status: &'a watch::Sender<(State, CopyStatus)>,
        events: &'a Events,
        from: u64,
    ) -> Self {
        let (state, copy) = status.borrow().clone();
        let state = if matches!(state, State::Retrying | State::Held) { state } else { State::Running };
        Self { job, replication, status, events, copy, state, from, unsaved: false }
    }

    /// Reports an event.
    pub fn emit(&self, event: Event) {
        self.events.emit(event, &self.replication.id);
    }

    /// Reports a finding about the streams.
    pub fn found(&mut self, event: Event) {
        if let Event::Gap { messages, .. } = &event {
            self.copy.counters.gap_messages += messages;
        }
        warn!(replication = self.replication.id, ?event, "found");
        self.emit(event);
    }

    /// Reports a message that was skipped, where a person has to know.
    pub fn skipped(&self, source_seq: u64, reason: Reason) {
        match reason {
            Reason::Requested => self.skipped_by_request(source_seq),
            Reason::Incomplete(object) => self.incomplete(source_seq, object),
            Reason::Old | Reason::Excluded | Reason::Loop | Reason::Sampled => {}
        }
    }

    /// Reports that a message was skipped by request, and why the request was made.
    fn skipped_by_request(&self, source_seq: u64) {
        let error = self.status.borrow().1.last_error.clone().filter(|error| error.source_seq == Some(source_seq));
        let message = error.map_or_else(|| "skipped by request".to_owned(), |error| error.message);
        warn!(replication = self.replication.id, source_seq, "skipped by request: {message}");
        self.emit(Event::poison(source_seq, message, PoisonAction::Skipped));
    }

    /// Reports that the description of an object was skipped.
    fn incomplete(&self, source_seq: u64, Incomplete { object, chunks, found }: Incomplete) {
        // The publisher chooses it.
        let object = excerpt(&object).into_owned();
        warn!(
            replication = self.replication.id,
            source_seq, object, chunks, found, "object skipped: it does not have all of its chunks"
        );
        self.emit(Event::ObjectIncomplete { source_seq, object, chunks, found });
    }

    /// Reports messages that could not be stored.
    pub fn rejected(&self, events: Vec<Event>) {
        for event in events {
            warn!(replication = self.replication.id, ?event, "skipped, because the target can never store it");
            self.emit(event);
        }
    }

    /// Adds subject and size to a message that the target refused: from the error that is shown, if it is about the same
    /// message, else from the source.
    pub async fn describe(&self, mut lane: Lane, poison: &mut PoisonMessage) {
        let SourceMessage { seq, time_ns } = poison.message;
        let known = self.status.borrow().1.last_error.as_ref().and_then(|error| {
            let same = error.source_seq == Some(seq) && error.source_time_ns == Some(time_ns);
            error.source_subject.clone().zip(error.source_bytes).filter(|_| same)
        });
        if poison.content.is_none() {
            poison.content = known;
        }
        if poison.content.is_some() {
            return;
        }
        let stream = &self.replication.source.stream;
        let read = tokio::time::timeout(DESCRIBED, Api::new(&mut lane).message(stream, seq)).await;
        // It is described by the next run, if it is still held then.
        let Ok(Ok(Some(message))) = read else { return };
        if message.time_ns == time_ns {
            let bytes = message.subject.len() + message.header.len() + message.payload;
            poison.content = Some((excerpt(&message.subject).into_owned(), bytes as u64));
        }
    }

    /// Shows an error that does not end the run.
    pub fn shows_error(&self, message: &str) {
        let error = LastError::now("retry", message);
        self.status.send_modify(|(_, told)| told.last_error = Some(error));
    }

    /// Up to where the run may copy while the position is not saved.
    pub fn copy_limit(&self, positions: &mut PositionWriter, now: Instant) -> Option<Copied> {
        positions.copy_limit(self.copy.counters.into(), now).filter(|_| !self.job.standalone)
    }

    /// Reports, once, that the position is not saved, and later that it is saved again.
    pub fn saves(&mut self, position: u64, now: Instant, positions: &mut PositionWriter) {
        let id = &self.replication.id;
        match positions.unsaved.news(now) {
            Some(News::Unsaved(why)) => {
                let message = format!("the position is not saved: {why}");
                warn!(replication = id, position, "{message}");
                let saved = positions.record().source.as_ref().map_or(0, |source| source.seq);
                self.shows_error(&message);
                self.emit(Event::PositionUnsaved { message, saved, position });
            }
            Some(News::Saved) => {
                info!(replication = id, position, "the position is saved again");
                self.emit(Event::PositionSaved { position });
            }
            None => {}
        }
        self.knows_saves(positions);
    }

    /// Takes over from the position writer whether it was reported that the position is not saved.
    pub fn knows_saves(&mut self, positions: &PositionWriter) {
        self.unsaved = positions.unsaved.is_reported();
    }

    /// Reports, once, that the clocks of the source and of this host differ, and later that they no longer do.
    pub fn clock(&self, clock: &SourceClock, positions: &mut PositionWriter) {
        let (id, server) = (&self.replication.id, &self.copy.source.server);
        let offset = clock.offset(Instant::now(), chance::now());
        match positions.clock.judge(offset) {
            Some(event @ Event::ClockOk { .. }) => {
                info!(
                    replication = id,
                    server,
                    ?offset,
                    "the clocks of the source server and of this host agree again"
                );
                self.emit(event);
            }
            Some(event) => {
                if let Event::ClockOffset { reason, .. } = &event {
                    warn!(replication = id, server, ?offset, "{reason}");
                }
                self.emit(event);
            }
            None => {}
        }
    }

    /// Publishes the status. The run is well if no problem is reported; `waits` says that it waits for saves.
    pub fn publish(&mut self, position: u64, waits: bool, is_stalled: bool) {
        let caught_up = self.copy.lag.is_some_and(|lag| lag.messages == 0);
        if caught_up || position > self.from {
            self.state = State::Running;
        }
        let shown = if waits { State::Retrying } else { self.state };
        let well = shown == State::Running && !is_stalled && !self.unsaved;
        let copy = &mut self.copy;
        self.status.send_modify(|(state, told)| {
            *state = shown;
            // The caller's notes on earlier errors stay.
            let mut last_error = told.last_error.take();
            if let Some(error) = last_error.as_mut().filter(|_| well) {
                error.ran();
            }
            copy.last_error = last_error;
            // Counted beside the run.
            copy.metered.gossip = told.metered.gossip;
            copy.consumers.clone_from(&told.consumers);
            *told = copy.clone();
        });
    }

    /// The row that is saved with the position.
    pub fn row(&self) -> Row {
        Row { state: self.state, copy: self.copy.clone(), todo: None, ..self.job.row.clone() }
    }
}
