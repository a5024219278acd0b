//! How much is asked of a source at once. A server closes the connection of a client for which more than its
//! `max_pending` waits; it does not publish that limit. A run that such a server cut again and again is followed by one
//! that asks for less, until it works. Pure.

use tokio::time::{Duration, Instant};

/// A connection that lived longer was not cut for what was asked for at its beginning.
const YOUNG: Duration = Duration::from_secs(10);
/// Cuts that are further apart have nothing to do with each other.
const TOGETHER: Duration = Duration::from_secs(60);
/// How long without a cut until a run asks for more again.
const RECOVERS: Duration = Duration::from_secs(600);
/// So much less each time.
const STEP: usize = 4;
/// The least that is worth asking for.
const LEAST: usize = 128 * 1024;

/// What a source may be asked for; not limited by default.
#[derive(Debug, Default)]
pub(in crate::copy) struct Appetite {
    most: Option<usize>,
    cuts: u32,
    last: Option<Instant>,
}

impl Appetite {
    /// Whether a run that begins now may ask for more than the one before: then it is worth another run.
    pub fn recovers(&self, now: Instant) -> bool {
        self.most.is_some() && self.last.is_some_and(|last| now.duration_since(last) > RECOVERS)
    }

    /// Bytes that the run that begins may ask for.
    pub fn begin(&mut self, wanted: usize, now: Instant) -> usize {
        if self.recovers(now) {
            self.most = self.most.map(|most| most.saturating_mul(STEP)).filter(|most| *most < wanted);
            self.last = self.most.map(|_| now);
        }
        self.most.map_or(wanted, |most| most.min(wanted))
    }

    /// The source cut a connection that lived for so long, while it owed messages; `asked` for so many bytes. Returns
    /// what is asked for from now on, if that is less.
    pub fn cut(&mut self, asked: usize, lived: Duration, now: Instant) -> Option<usize> {
        if lived > YOUNG {
            return None;
        }
        let together = self.last.is_some_and(|last| now.duration_since(last) <= TOGETHER);
        self.cuts = if together { self.cuts + 1 } else { 1 };
        self.last = Some(now);
        let less = (asked / STEP).max(LEAST);
        if self.cuts < 2 || less >= asked {
            return None;
        }
        self.most = Some(less);
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;
    const SOON: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn less_is_asked_for_after_each_cut_but_the_first() {
        let (mut appetite, now) = (Appetite::default(), Instant::now());
        assert_eq!(appetite.begin(16 * MIB, now), 16 * MIB);
        assert_eq!(appetite.cut(16 * MIB, SOON, now), None);
        assert_eq!(appetite.cut(16 * MIB, SOON, now + SOON), Some(4 * MIB));
        assert_eq!(appetite.begin(16 * MIB, now + SOON), 4 * MIB);
        assert_eq!(appetite.cut(4 * MIB, SOON, now + 2 * SOON), Some(MIB));
        assert_eq!(appetite.cut(MIB, SOON, now + 3 * SOON), Some(MIB / 4));
        assert_eq!(appetite.cut(MIB / 4, SOON, now + 4 * SOON), Some(LEAST));
        assert_eq!(appetite.cut(LEAST, SOON, now + 5 * SOON), None);
        assert_eq!(appetite.begin(16 * MIB, now + 6 * SOON), LEAST);
        let mut later = now + 5 * SOON;
        for expect in [MIB / 2, 2 * MIB, 8 * MIB, 16 * MIB, 16 * MIB] {
            assert!(!appetite.recovers(later + SOON));
            later += RECOVERS + SOON;
            assert_eq!(appetite.recovers(later), appetite.most.is_some());
            assert_eq!(appetite.begin(16 * MIB, later), expect);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_break_now_and_then_change_nothing() {
        let (mut appetite, now) = (Appetite::default(), Instant::now());
        for minute in 0..10 {
            let now = now + minute * (TOGETHER + SOON);
            assert_eq!(appetite.cut(16 * MIB, SOON, now), None);
        }
        for second in 0..10 {
            assert_eq!(appetite.cut(16 * MIB, YOUNG + SOON, now + second * SOON), None);
        }
    }
}
