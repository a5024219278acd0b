//! Forgotten senders, as long as messages of theirs may be read again.

use super::{MessageOutcome, NEVER, Sighting};

/// The message of a sender that was copied last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LastCopy {
    /// Stored time, or [`NEVER`].
    pub(super) time: i64,
    /// Source sequence.
    pub(super) seq: u64,
    /// Bytes of the payload.
    pub(super) size: u32,
}

/// A forgotten sender. After a restart its messages up to `read` are read again, and decided as before: a message that
/// was skipped would otherwise be copied after later ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forgotten {
    /// Newest source sequence that was read when it was forgotten.
    pub(super) read: u64,
    settled: LastCopy,
    /// A later copy, if it had not settled.
    in_flight: Option<LastCopy>,
}

impl LastCopy {
    /// None.
    pub(super) const NONE: Self = Self { time: NEVER, seq: 0, size: 0 };

    fn of(sighting: &Sighting<'_>) -> Self {
        Self { time: sighting.time_ns, seq: sighting.seq, size: sighting.size }
    }

    /// Whether it is this message, or a later one.
    pub(super) fn covers(&self, seq: u64) -> bool {
        self.time != NEVER && seq <= self.seq
    }
}

impl Forgotten {
    pub(super) fn new(read: u64, settled: LastCopy, in_flight: Option<LastCopy>) -> Self {
        Self { read, settled, in_flight }
    }

    /// Of which no message is decided again.
    pub(super) fn without_messages(read: u64) -> Self {
        Self::new(read, LastCopy::NONE, None)
    }

    /// What messages that are read again are compared with.
    pub(super) fn last_copy(&self) -> LastCopy {
        self.in_flight.unwrap_or(self.settled)
    }

    /// The same when everything up to `position` has settled.
    pub(super) fn settled_at(&self, position: u64) -> LastCopy {
        self.in_flight.filter(|copy| copy.seq <= position).unwrap_or(self.settled)
    }

    /// A run begins after `position`: what was in flight after that is read again.
    pub(super) fn begin(&mut self, position: u64) {
        self.settled = self.settled_at(position);
        self.in_flight = None;
    }

    /// A message that is read again was decided.
    pub(super) fn observe(&mut self, sighting: &Sighting<'_>, fate: MessageOutcome) {
        let copy = LastCopy::of(sighting);
        match fate {
            MessageOutcome::Passed => {}
            MessageOutcome::Stored if self.in_flight.is_none() => self.settled = copy,
            MessageOutcome::Sent | MessageOutcome::Stored => self.in_flight = Some(copy),
        }
    }
}
