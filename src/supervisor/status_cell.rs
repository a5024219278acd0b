//! The status of one replication: written by its task and its run, read by the control service and the metrics.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use nats_lane::entropy;
use tokio::sync::watch;

use crate::{
    config::Replication,
    copy::{Error, Samples, SourcePeek},
    election::CampaignView,
    events::Step,
    metrics,
    status::{
        ConsumersStatus, CopyStatus, Headroom, InFlight, LastError, Position, Row, SourceStatus, State, TargetStatus,
        origin,
    },
    store::PositionRecord,
};

/// The pieces of a status row.
#[derive(Debug)]
pub(super) struct StatusCell {
    id: String,
    born: AtomicU64,
    head: watch::Sender<Head>,
    status: watch::Sender<(State, CopyStatus)>,
    /// This instance's part in Choria's election.
    poll: watch::Sender<Option<CampaignView>>,
    /// The senders of a sampled replication.
    samples: watch::Sender<Option<Samples>>,
    /// The document that runs, or ran last.
    replication: watch::Sender<Option<Arc<Replication>>>,
}

/// The part of a row that the task owns.
#[derive(Debug, Clone, Default)]
struct Head {
    leader: Option<String>,
    epoch: u64,
    config_revision: u64,
    /// This instance has the lease.
    leads: bool,
    /// Revision of the newest document as the watch reported it. In a recreated bucket, revisions restart.
    newest: u64,
    /// The newest document cannot run, perhaps because of its link.
    rejected: bool,
}

/// How far the copy has come, to detect whether it progresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CopyProgress {
    pub(super) position: Position,
    copied: u64,
}

impl StatusCell {
    /// The status of a task that starts with the document at `revision`.
    pub(super) fn new(id: &str, revision: u64) -> Self {
        let head = Head { config_revision: revision, newest: revision, ..Head::default() };
        let mut copy = CopyStatus::default();
        id.split('.').next().unwrap_or(id).clone_into(&mut copy.source.stream);
        Self {
            id: id.to_owned(),
            born: AtomicU64::new(revision),
            head: watch::Sender::new(head),
            status: watch::Sender::new((State::Starting, copy)),
            poll: watch::Sender::new(None),
            samples: watch::Sender::new(None),
            replication: watch::Sender::new(None),
        }
    }

    /// Revision of the document that the task started with.
    pub(super) fn born(&self) -> u64 {
        self.born.load(Ordering::Relaxed)
    }

    /// The task follows this revision, too: in a recreated bucket, revisions restart.
    pub(super) fn is_not_younger_than(&self, revision: u64) {
        self.born.fetch_min(revision, Ordering::Relaxed);
        self.head.send_modify(|head| head.newest = revision);
    }

    /// The part that the run keeps up to date.
    pub(super) fn status(&self) -> &watch::Sender<(State, CopyStatus)> {
        &self.status
    }

    pub(super) fn row(&self) -> Row {
        let head = self.head.borrow().clone();
        let (state, copy) = self.status.borrow().clone();
        let mut row = Row {
            replication: self.id.clone(),
            state,
            origin: origin(head.config_revision).to_owned(),
            leader: head.leader,
            epoch: head.epoch,
            config_revision: head.config_revision,
            copy,
            verify: None,
            todo: None,
        };
        row.at(row.source_time(entropy::now()));
        row
    }

    pub(super) fn progress(&self) -> CopyProgress {
        let status = self.status.borrow();
        CopyProgress { position: status.1.position, copied: status.1.counters.copied }
    }

    pub(super) fn set_state(&self, state: State) {
        self.status.send_modify(|status| status.0 = state);
    }

    /// Sets the state of an attempt that starts. `retrying` and `held` stay: they are over only when the run copies.
    pub(super) fn begin(&self) {
        self.status.send_if_modified(|(state, _)| {
            let first = !matches!(state, State::Retrying | State::Held);
            if first {
                *state = State::Starting;
            }
            first
        });
    }

    pub(super) fn set_revision(&self, revision: u64) {
        let corrected = self.head.send_if_modified(|head| {
            head.config_revision = revision;
            // An older document may run because the newest cannot.
            revision == head.newest && !head.rejected
        });
        if corrected {
            self.error_over(|error| error.kind == "invalid");
        }
    }

    /// The last error is over if `which` selects it.
    fn error_over(&self, which: impl FnOnce(&LastError) -> bool) {
        self.status.send_if_modified(|(_, copy)| {
            let error = copy.last_error.as_mut().filter(|error| error.current && which(error));
            error.map(|error| error.current = false).is_some()
        });
    }

    /// Nothing is attempted any more that the last error could be about.
    pub(super) fn at_rest(&self) {
        self.error_over(|error| error.kind != "invalid");
    }

    /// A document starts to run.
    pub(super) fn adopt(&self, replication: &Replication, revision: u64) {
        self.set_revision(revision);
        self.knows(replication);
        self.status.send_modify(|(_, copy)| {
            if copy.source.stream != replication.source.stream {
                copy.source = SourceStatus { stream: replication.source.stream.clone(), ..SourceStatus::default() };
            }
            if copy.target.stream != replication.target.stream {
                copy.target = TargetStatus { stream: replication.target.stream.clone(), ..TargetStatus::default() };
            }
        });
    }

    /// The document that runs, or would run if the replication were not paused.
    pub(super) fn knows(&self, replication: &Replication) {
        self.replication.send_if_modified(|known| {
            let news = known.as_deref() != Some(replication);
            if news {
                *known = Some(Arc::new(replication.clone()));
            }
            news
        });
    }

    /// The document that runs, or ran last.
    pub(super) fn replication(&self) -> watch::Receiver<Option<Arc<Replication>>> {
        self.replication.subscribe()
    }

    /// Sets the senders that this process knows; `None` if it no longer follows them.
    pub(super) fn set_samples(&self, samples: Option<Samples>) {
        self.samples.send_replace(samples);
    }

    /// The senders that this process knows.
    pub(super) fn samples(&self) -> Option<Samples> {
        self.samples.borrow().clone()
    }

    /// Sets this instance's part in Choria's election; `None` if it no longer takes part.
    pub(super) fn set_poll(&self, poll: Option<CampaignView>) {
        self.poll.send_replace(poll);
    }

    /// The state of Choria's election, if this instance takes part.
    pub(super) fn election(&self) -> Option<metrics::ElectionReading> {
        self.poll.borrow().as_ref().map(CampaignView::reading)
    }

    /// Whether this instance has the lease.
    pub(super) fn leads(&self) -> bool {
        self.head.borrow().leads
    }

    /// This instance got or lost the lease.
    pub(super) fn set_leads(&self, leads: bool) {
        self.head.send_modify(|head| head.leads = leads);
    }

    /// This instance claimed the position record.
    pub(super) fn claimed(&self, record: &PositionRecord) {
        self.head.send_modify(|head| {
            head.leader = Some(record.holder.clone());
            head.epoch = record.epoch;
        });
        self.status.send_modify(|(_, copy)| {
            copy.position = Position {
                source_seq: record.source.as_ref().map_or(0, |witness| witness.seq),
                target_seq: record.target.as_ref().map_or(0, |witness| witness.seq),
            };
            copy.target_mode = record.target_mode;
        });
    }

    /// This instance gave the position record up. Returns whether it had it.
    pub(super) fn released(&self) -> bool {
        self.head.send_if_modified(|head| head.leader.take().is_some())
    }

    /// A run is over: it has neither connections nor messages in flight. A lag stays known; that there is none does not.
    pub(super) fn run_over(&self) {
        self.status.send_modify(|(_, copy)| {
            copy.lag = copy.lag.filter(|lag| lag.messages > 0);
            copy.source.connected = false;
            copy.target.connected = false;
            copy.in_flight = InFlight::default();
        });
    }

    /// The position record was read while this instance does not write it.
    pub(super) fn looked_up(&self, record: &PositionRecord) {
        let position = Position {
            source_seq: record.source.as_ref().map_or(0, |witness| witness.seq),
            target_seq: record.target.as_ref().map_or(0, |witness| witness.seq),
        };
        self.status.send_modify(|(_, copy)| {
            if copy.position.source_seq != position.source_seq {
                // What waits after another position is not known yet.
                (copy.lag, copy.headroom) = (None, None);
                (copy.source.first_seq, copy.source.last_seq) = (None, None);
            }
            copy.position = position;
        });
    }

    /// The source was checked while no run was under way; `None` if it did not answer, or has no such stream.
    pub(super) fn peeked(&self, peek: Option<&SourcePeek>, headroom: Option<Headroom>) {
        self.status.send_modify(|(_, copy)| {
            copy.lag = peek.map(|peek| peek.lag);
            copy.source.first_seq = peek.map(|peek| peek.first_seq);
            copy.source.last_seq = peek.map(|peek| peek.last_seq);
            copy.headroom = headroom;
        });
    }

    /// The source server's clock was measured while no run was under way.
    pub(super) fn measured(&self, clock_offset: Option<f64>) {
        self.status.send_modify(|(_, copy)| copy.source.clock_offset_seconds = clock_offset);
    }

    /// A run ended with an error; `step` is what the next run opens again, if the error is transient.
    pub(super) fn failed(&self, error: &Error, step: Option<Step>) {
        let kind = error.kind.name();
        let poison = error.poison.as_ref();
        let content = poison.and_then(|poison| poison.content.as_ref());
        self.status.send_modify(|(_, copy)| {
            copy.counters.errors += 1;
            let repairs = &mut copy.counters.repairs;
            match step {
                Some(Step::Everything) => repairs.everything += 1,
                Some(_) => repairs.connections += 1,
                None => {}
            }
            copy.last_error = Some(LastError {
                source_seq: poison.map(|poison| poison.message.seq),
                source_time_ns: poison.map(|poison| poison.message.time_ns),
                source_subject: content.map(|(subject, _)| subject.clone()),
                source_bytes: content.map(|(_, bytes)| *bytes),
                ..LastError::now(kind, &error.message)
            });
        });
    }

    /// The source no longer has the stream.
    pub(super) fn gone(&self, message: &str) {
        self.status.send_modify(|(state, copy)| {
            *state = State::Held;
            copy.last_error = Some(LastError::now("gone", message));
            copy.lag = None;
            (copy.source.first_seq, copy.source.last_seq) = (None, None);
        });
    }

    /// The consumers that the document names, as the last pass over them left them; `None` if it names none.
    pub(super) fn consumers(&self, consumers: Option<ConsumersStatus>) {
        self.status.send_if_modified(|(_, copy)| {
            let is_news = copy.consumers != consumers;
            copy.consumers = consumers;
            is_news
        });
    }

    /// Messages copied since this leader began.
    pub(super) fn copied(&self) -> u64 {
        self.status.borrow().1.counters.copied
    }

    /// The newest document can run.
    pub(super) fn accepted(&self) {
        self.head.send_modify(|head| head.rejected = false);
    }

    /// A document cannot run.
    pub(super) fn rejected(&self, message: &str) {
        self.head.send_modify(|head| head.rejected = true);
        self.status.send_modify(|(_, copy)| copy.last_error = Some(LastError::now("invalid", message)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{status::Lag, store::SourceWitness};

    #[test]
    fn after_a_run_a_lag_stays_known_and_no_lag_does_not() {
        let cell = StatusCell::new("S", 1);
        for (before, after) in [(None, None), (Some(0), None), (Some(3), Some(3))] {
            let lag = before.map(|messages| Lag { messages, ..Lag::default() });
            cell.status().send_modify(|(_, copy)| copy.lag = lag);
            cell.run_over();
            assert_eq!(cell.row().copy.lag.map(|lag| lag.messages), after, "{before:?}");
        }
    }

    #[test]
    fn the_lag_of_another_position_is_not_shown() {
        let cell = StatusCell::new("S", 1);
        let record = |seq| PositionRecord {
            source: Some(SourceWitness { seq, time_ns: None, none_at: None, created: String::new() }),
            ..PositionRecord::new()
        };
        cell.looked_up(&record(12));
        cell.status().send_modify(|(_, copy)| copy.lag = Some(Lag { messages: 3, ..Lag::default() }));
        cell.looked_up(&record(12));
        assert_eq!(cell.row().copy.lag.map(|lag| lag.messages), Some(3));
        cell.looked_up(&record(5));
        assert_eq!((cell.row().copy.position.source_seq, cell.row().copy.lag), (5, None));
    }
}
