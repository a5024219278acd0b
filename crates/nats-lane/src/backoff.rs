//! Jittered exponential backoff. Pure: the caller brings the random number and does the waiting.

use std::time::Duration;

/// Delays that double from `first` to `max`; each is shortened at random by up to half, so that many that
/// failed at one moment do not come back at one moment.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    step: Duration,
}

impl Backoff {
    /// Retries after a transient error: the first one at once, later ones at most 3 s apart.
    pub const RETRY: Self = Self::new(Duration::from_millis(50), Duration::from_secs(3));

    /// A backoff whose first delay is at most `first` and whose later ones are at most `max`.
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max, step: first }
    }

    /// The next delay; `random` is uniform in `0.0..1.0`.
    pub fn next(&mut self, random: f64) -> Duration {
        let delay = jitter(self.step, random);
        self.step = self.step.saturating_mul(2).min(self.max);
        delay
    }

    /// Begins again with the first delay.
    pub fn reset(&mut self) {
        self.step = self.first;
    }
}

/// `delay` shortened by up to half; `random` is uniform in `0.0..1.0`.
pub fn jitter(delay: Duration, random: f64) -> Duration {
    delay.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_maximum() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        let delays: Vec<_> = (0..9).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(delays, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn jitter_takes_away_at_most_half() {
        assert_eq!(jitter(Duration::from_secs(10), 0.0), Duration::from_secs(5));
        assert_eq!(jitter(Duration::from_secs(10), 0.5), Duration::from_millis(7500));
        assert_eq!(jitter(Duration::from_secs(10), 7.0), Duration::from_secs(10));
    }

    #[test]
    fn a_reset_begins_with_the_first_delay() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        backoff.next(0.3);
        backoff.next(0.3);
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_millis(50));
    }
}
