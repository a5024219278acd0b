//! What is not passed on: counted by reason, and reported once per stretch. Pure.

use tokio::time::{Duration, Instant};

use crate::choria::adapter::Discard;

/// A stretch of drops ends when there was none for this long.
const CALM: Duration = Duration::from_secs(10);

/// Why a message was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DropReason {
    /// It was wrong when it came.
    Discarded(Discard),
    /// The queue is full.
    QueueFull,
    /// The target's server does not take messages of this size.
    TooLarge,
    /// The stream can never store the message.
    Refused,
    /// The process stopped before the target had stored the message.
    Stopped,
}

impl DropReason {
    /// All of them.
    pub(super) const ALL: [Self; 10] = {
        let mut all = [Self::Stopped; 10];
        let mut at = 0;
        while at < Discard::ALL.len() {
            all[at] = Self::Discarded(Discard::ALL[at]);
            at += 1;
        }
        (all[6], all[7], all[8]) = (Self::QueueFull, Self::TooLarge, Self::Refused);
        all
    };

    /// Its place among all of them.
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Discarded(discard) => discard as usize,
            Self::QueueFull => 6,
            Self::TooLarge => 7,
            Self::Refused => 8,
            Self::Stopped => 9,
        }
    }

    /// Its name in metrics, events and the status.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Discarded(discard) => discard.name(),
            Self::QueueFull => "queue_full",
            Self::TooLarge => "too_large",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
        }
    }

    /// Whether the message never was in the queue.
    pub(super) const fn is_of_input(self) -> bool {
        matches!(self, Self::Discarded(_) | Self::QueueFull)
    }
}

impl From<Discard> for DropReason {
    fn from(discard: Discard) -> Self {
        Self::Discarded(discard)
    }
}

/// Number of reasons.
const REASONS: usize = DropReason::ALL.len();

/// Counts by reason.
pub(super) type DropCounts = [u64; REASONS];

/// Drops of one reason, from the first until there was none for a while.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    before: u64,
    last: Instant,
}

/// All drops of an adapter.
#[derive(Debug, Default)]
pub(super) struct AdapterDrops {
    counts: DropCounts,
    stretches: [Option<Stretch>; REASONS],
}

/// The end of a stretch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StretchEnd {
    pub(super) reason: DropReason,
    /// Messages that were dropped in it.
    pub(super) messages: u64,
}

impl AdapterDrops {
    pub(super) fn counts(&self) -> &DropCounts {
        &self.counts
    }

    /// Counts messages; `true` for the first of a stretch.
    pub(super) fn count(&mut self, reason: DropReason, messages: u64, now: Instant) -> bool {
        let (count, stretch) = (&mut self.counts[reason.index()], &mut self.stretches[reason.index()]);
        let first = stretch.is_none();
        stretch.get_or_insert(Stretch { before: *count, last: now }).last = now;
        *count += messages;
        first
    }

    /// When the next stretch may end.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.stretches.iter().flatten().map(|stretch| stretch.last + CALM).min()
    }

    /// The stretches that are over.
    pub(super) fn ended(&mut self, now: Instant) -> Vec<StretchEnd> {
        let mut ended = Vec::new();
        for reason in DropReason::ALL {
            let at = reason.index();
            if let Some(stretch) = self.stretches[at].take_if(|stretch| stretch.last + CALM <= now) {
                ended.push(StretchEnd { reason, messages: self.counts[at] - stretch.before });
            }
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENDER: DropReason = DropReason::Discarded(Discard::Sender);

    #[test]
    fn reasons_are_in_their_order() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index(), index, "{}", reason.name());
        }
    }

    #[tokio::test]
    async fn a_stretch_is_reported_at_its_begin_and_at_its_end() {
        let (mut drops, begin) = (AdapterDrops::default(), Instant::now());
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        assert!(drops.count(DropReason::QueueFull, 1, at(0)));
        assert!(!drops.count(DropReason::QueueFull, 5, at(9)));
        assert!(drops.count(SENDER, 1, at(12)));
        assert_eq!((drops.next_end(), drops.ended(at(18))), (Some(at(19)), vec![]));
        assert_eq!(drops.ended(at(19)), [StretchEnd { reason: DropReason::QueueFull, messages: 6 }]);
        assert!(drops.count(DropReason::QueueFull, 2, at(20)));
        let expect = [(SENDER, 1), (DropReason::QueueFull, 2)];
        assert_eq!(drops.ended(at(40)), expect.map(|(reason, messages)| StretchEnd { reason, messages }));
        assert_eq!(drops.next_end(), None);
        assert_eq!(drops.counts()[DropReason::QueueFull.index()], 8);
    }
}
