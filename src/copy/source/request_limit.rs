//! How much a run requests from a source at once. A server closes the connection of a client for which more than its
//! `max_pending` bytes wait; it does not publish that limit. After repeated closes of this kind the next runs request
//! less, until the connection lasts. Pure.

use tokio::time::{Duration, Instant};

/// A connection that lasted longer was not cut for the amount of its first requests.
const YOUNG: Duration = Duration::from_secs(10);
/// Cuts that are further apart are unrelated.
const TOGETHER: Duration = Duration::from_secs(60);
/// How long without a cut until a run requests more again.
const RECOVERS: Duration = Duration::from_secs(600);
/// Divisor of each reduction.
const STEP: usize = 4;
/// The smallest useful limit, bytes.
const LEAST: usize = 128 * 1024;

/// The limit of requests to a source; none by default.
#[derive(Debug, Default)]
pub(in crate::copy) struct RequestLimit {
    most: Option<usize>,
    cuts: u32,
    last: Option<Instant>,
}

impl RequestLimit {
    /// Whether a run that begins now may request more than the one before: then it is worth another run.
    pub fn recovers(&self, now: Instant) -> bool {
        self.most.is_some() && self.last.is_some_and(|last| now.duration_since(last) > RECOVERS)
    }

    /// Bytes that the run that begins may request.
    pub fn begin(&mut self, wanted: usize, now: Instant) -> usize {
        if self.recovers(now) {
            self.most = self.most.map(|most| most.saturating_mul(STEP)).filter(|most| *most < wanted);
            self.last = self.most.map(|_| now);
        }
        self.most.map_or(wanted, |most| most.min(wanted))
    }

    /// The source cut a connection that lasted for `lived`, while it owed messages; `asked` for so many bytes. Returns
    /// the limit from now on, if that is less.
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
        let (mut request_limit, now) = (RequestLimit::default(), Instant::now());
        assert_eq!(request_limit.begin(16 * MIB, now), 16 * MIB);
        assert_eq!(request_limit.cut(16 * MIB, SOON, now), None);
        assert_eq!(request_limit.cut(16 * MIB, SOON, now + SOON), Some(4 * MIB));
        assert_eq!(request_limit.begin(16 * MIB, now + SOON), 4 * MIB);
        assert_eq!(request_limit.cut(4 * MIB, SOON, now + 2 * SOON), Some(MIB));
        assert_eq!(request_limit.cut(MIB, SOON, now + 3 * SOON), Some(MIB / 4));
        assert_eq!(request_limit.cut(MIB / 4, SOON, now + 4 * SOON), Some(LEAST));
        assert_eq!(request_limit.cut(LEAST, SOON, now + 5 * SOON), None);
        assert_eq!(request_limit.begin(16 * MIB, now + 6 * SOON), LEAST);
        let mut later = now + 5 * SOON;
        for expect in [MIB / 2, 2 * MIB, 8 * MIB, 16 * MIB, 16 * MIB] {
            assert!(!request_limit.recovers(later + SOON));
            later += RECOVERS + SOON;
            assert_eq!(request_limit.recovers(later), request_limit.most.is_some());
            assert_eq!(request_limit.begin(16 * MIB, later), expect);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_break_now_and_then_change_nothing() {
        let (mut request_limit, now) = (RequestLimit::default(), Instant::now());
        for minute in 0..10 {
            let now = now + minute * (TOGETHER + SOON);
            assert_eq!(request_limit.cut(16 * MIB, SOON, now), None);
        }
        for second in 0..10 {
            assert_eq!(request_limit.cut(16 * MIB, YOUNG + SOON, now + second * SOON), None);
        }
    }
}
