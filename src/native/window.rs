//! How much may be delivered that is not known to be stored. Pure.
//!
//! What a target has received and not stored waits in its memory, so that is bounded to a few parts. What is on the line is not in its
//! memory: a far target that stores fast has more parts in flight, as many as it stores in a round trip of the line.

use std::time::Duration;

use tokio::time::Instant;

/// Parts that a target keeps in memory at most.
const PARTS: u64 = 4;
/// Largest part: a target that is slow holds about this much of each part in memory.
const LARGEST_PART: u64 = 2 << 20;
/// Time over which the rate is measured at least.
const MEASURED_OVER: Duration = Duration::from_millis(200);

/// Messages and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub messages: u64,
    pub bytes: u64,
    /// Bytes of the payloads alone.
    pub payload: u64,
}

impl Amount {
    pub fn add(&mut self, other: Self) {
        self.messages += other.messages;
        self.bytes += other.bytes;
        self.payload += other.payload;
    }

    pub fn subtract(&mut self, other: Self) {
        self.messages -= other.messages;
        self.bytes -= other.bytes;
        self.payload -= other.payload;
    }
}

/// The window of one consumer.
#[derive(Debug)]
pub(super) struct FeedWindow {
    part: Amount,
    /// Parts in flight at most, whatever the line is like.
    most: u64,
    /// Parts that may be in flight now.
    parts: u64,
    /// Time from the target and back.
    round_trip: Duration,
    /// Since when parts are counted, once one is in flight.
    since: Option<Instant>,
    /// Parts that were stored since then.
    stored: u64,
}

impl FeedWindow {
    /// A window over a line with this round trip that never has more than `bound` in flight.
    pub fn new(bound: Amount, round_trip: Duration) -> Self {
        let bytes = (bound.bytes / PARTS).clamp(1, LARGEST_PART);
        let most = (bound.bytes / bytes).max(PARTS);
        let part = Amount { messages: (bound.messages / most).max(1), bytes, payload: 0 };
        Self { part, most, parts: PARTS, round_trip, since: None, stored: 0 }
    }

    /// Whether this much is a part.
    pub fn is_part(&self, amount: &Amount) -> bool {
        amount.messages >= self.part.messages || amount.bytes >= self.part.bytes
    }

    /// Whether no more may be sent while so many parts are in flight.
    pub fn is_full(&self, parts: usize) -> bool {
        parts as u64 >= self.parts
    }

    /// A part is sent. Idle time before it is no measure of the target.
    pub fn sent(&mut self, before: usize, now: Instant) {
        if before == 0 {
            (self.since, self.stored) = (Some(now), 0);
        }
    }

    /// The target has stored so many parts.
    pub fn stored(&mut self, parts: usize, now: Instant) {
        self.stored += parts as u64;
        let Some(since) = self.since else { return };
        let took = now.saturating_duration_since(since);
        if took < MEASURED_OVER.max(2 * self.round_trip) {
            return;
        }
        let on_the_line = self.stored as f64 * self.round_trip.as_secs_f64() / took.as_secs_f64();
        self.parts = (PARTS + on_the_line.ceil() as u64).min(self.most);
        (self.since, self.stored) = (Some(now), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BOUND: Amount = Amount { messages: 65_536, bytes: 16 * MIB, payload: 0 };

    /// Parts that may be in flight with a target that stores so many parts in a second, after so many seconds.
    fn parts(bound: Amount, round_trip_ms: u64, parts_per_second: u64) -> u64 {
        let mut window = FeedWindow::new(bound, Duration::from_millis(round_trip_ms));
        let begin = Instant::now();
        window.sent(0, begin);
        for stored in 1..=5 * parts_per_second {
            window.stored(1, begin + Duration::from_secs(1) * stored as u32 / parts_per_second as u32);
        }
        window.parts
    }

    #[test]
    fn a_near_or_slow_target_holds_four_parts() {
        assert_eq!(parts(BOUND, 0, 100), PARTS);
        // One part is on a long line, however slowly it moves.
        assert_eq!(parts(BOUND, 300, 1), PARTS + 1);
        assert_eq!(parts(BOUND, 50, 5), PARTS + 1);
    }

    #[test]
    fn a_far_and_fast_target_has_more_on_the_line() {
        assert_eq!(parts(BOUND, 50, 50), PARTS + 3);
        assert_eq!(parts(BOUND, 50, 100), 8, "the bound in bytes");
        assert_eq!(parts(Amount { bytes: 64 * MIB, ..BOUND }, 50, 200), PARTS + 10);
    }

    #[test]
    fn the_bounds_hold_whatever_the_line_is_like() {
        for (messages, bytes) in [(1, 65_536), (8, 65_536), (1000, MIB), (65_536, 16 * MIB), (100, 64 * MIB)] {
            let bound = Amount { messages, bytes, payload: 0 };
            let window = FeedWindow::new(bound, Duration::from_secs(1));
            assert!(window.most * window.part.bytes <= bytes.max(1), "{window:?}");
            assert!(window.most * window.part.messages <= messages.max(window.most), "{window:?}");
        }
    }

    #[test]
    fn idle_time_is_not_measured() {
        let mut window = FeedWindow::new(BOUND, Duration::from_millis(50));
        let begin = Instant::now();
        window.sent(0, begin);
        window.stored(1, begin + Duration::from_millis(50));
        let later = begin + Duration::from_secs(60);
        window.sent(0, later);
        for part in 1..=40 {
            window.stored(1, later + Duration::from_millis(10) * part);
        }
        assert!(window.parts > PARTS, "{window:?}");
    }
}
