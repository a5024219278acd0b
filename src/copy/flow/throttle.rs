//! The rate limits of a replication: a token bucket for messages and one for bytes. Pure: the time is an argument.
//!
//! A bucket fills up to the amount of one second. A message that costs more is sent as soon as the bucket is
//! full, and leaves a debt that the following ones wait for. A run begins with empty buckets, so that a run that
//! restarts again and again is no faster than one that lasts.

use tokio::time::{Duration, Instant};

use crate::config::Limits;

/// The remaining allowance of one replication's limits.
#[derive(Debug)]
pub(in crate::copy) struct Throttle {
    messages: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl Throttle {
    /// Buckets as the limits have them, empty at `now`.
    pub fn new(limits: &Limits, now: Instant) -> Self {
        let bucket = |rate: Option<u64>| rate.map(|rate| TokenBucket { rate: rate as f64, level: 0.0, at: now });
        Self { messages: bucket(limits.messages_per_second), bytes: bucket(limits.bytes_per_second) }
    }

    /// When a message of so many bytes may be sent, if that is not now.
    pub fn wait(&mut self, bytes: usize, now: Instant) -> Option<Instant> {
        let messages = self.messages.as_mut().and_then(|bucket| bucket.wait(1.0, now));
        let bytes = self.bytes.as_mut().and_then(|bucket| bucket.wait(bytes as f64, now));
        messages.max(bytes)
    }

    /// Subtracts the cost of a message of so many bytes.
    pub fn spend(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.messages {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.level -= bytes as f64;
        }
    }
}

/// Bytes to read ahead: bytes that are not sent for seconds only take room from other replications.
pub(in crate::copy) fn read_ahead(limits: &Limits) -> usize {
    let seconds = limits.bytes_per_second.map(|rate| usize::try_from(rate.saturating_mul(2)).unwrap_or(usize::MAX));
    seconds.map_or(limits.bytes_in_flight, |bytes| bytes.min(limits.bytes_in_flight))
}

#[derive(Debug)]
struct TokenBucket {
    /// Tokens per second, and the capacity; above 0.
    rate: f64,
    /// Tokens in the bucket; below 0 after a message that cost more than there was room for.
    level: f64,
    /// The time of `level`.
    at: Instant,
}

impl TokenBucket {
    fn wait(&mut self, cost: f64, now: Instant) -> Option<Instant> {
        let passed = now.saturating_duration_since(self.at);
        self.level = (self.level + passed.as_secs_f64() * self.rate).min(self.rate);
        self.at = self.at.max(now);
        let missing = cost.min(self.rate) - self.level;
        // A rounding error is no reason to wait.
        (missing > self.rate * 1e-9).then(|| now + Duration::from_secs_f64(missing / self.rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(messages: Option<u64>, bytes: Option<u64>) -> (Throttle, Instant) {
        let limits = Limits { messages_per_second: messages, bytes_per_second: bytes, ..Limits::default() };
        let now = Instant::now();
        (Throttle::new(&limits, now), now)
    }

    /// Sends messages of so many bytes for a time, each as soon as it may; returns how many were sent.
    fn sent_within(throttle: &mut Throttle, from: Instant, time: Duration, bytes: usize) -> u64 {
        let (mut now, mut sent) = (from, 0);
        while now <= from + time {
            match throttle.wait(bytes, now) {
                Some(at) => {
                    assert!(at > now, "a wait that is over at once would never end");
                    now = at;
                }
                None => {
                    throttle.spend(bytes);
                    sent += 1;
                }
            }
        }
        sent
    }

    #[test]
    fn no_limit_is_no_wait() {
        let (mut throttle, now) = throttle(None, None);
        for _ in 0..1000 {
            assert_eq!(throttle.wait(usize::MAX, now), None);
            throttle.spend(usize::MAX);
        }
    }

    #[test]
    fn the_rate_is_kept_from_the_start() {
        let check = |messages, bytes, size, seconds, expect: u64| {
            let (mut throttle, now) = throttle(messages, bytes);
            let sent = sent_within(&mut throttle, now, Duration::from_secs(seconds), size);
            assert!(sent.abs_diff(expect) <= 1, "{messages:?} {bytes:?}: {sent} sent instead of {expect}");
        };
        check(Some(1), None, 100, 60, 60);
        check(Some(1000), None, 100, 10, 10_000);
        check(Some(10_000_000), None, 100, 1, 10_000_000);
        check(None, Some(1024), 100, 100, 1024);
        check(None, Some(10 << 30), 1 << 20, 1, 10 << 10);
        // Whichever is reached first.
        check(Some(10), Some(10_000), 100, 10, 100);
        check(Some(1000), Some(10_000), 100, 10, 1000);
    }

    #[test]
    fn a_pause_allows_a_burst_of_one_second() {
        let (mut throttle, now) = throttle(Some(100), None);
        let later = now + Duration::from_secs(3600);
        assert_eq!(sent_within(&mut throttle, later, Duration::ZERO, 1), 100);
        assert_eq!(sent_within(&mut throttle, later, Duration::from_secs(1), 1), 100);
    }

    #[test]
    fn a_message_larger_than_a_burst_passes_and_the_next_ones_pay() {
        let (mut throttle, now) = throttle(None, Some(1024));
        let full = throttle.wait(10_240, now).expect("an empty bucket");
        assert_eq!(full, now + Duration::from_secs(1));
        assert_eq!(throttle.wait(10_240, full), None);
        throttle.spend(10_240);
        let next = throttle.wait(1024, full).expect("a debt");
        assert_eq!((next - now).as_secs_f64().round(), 11.0);
        assert_eq!(throttle.wait(1024, next), None);
    }

    #[test]
    fn a_clock_that_stands_still_is_no_refill() {
        let (mut throttle, now) = throttle(Some(10), None);
        let later = now + Duration::from_secs(1);
        assert_eq!(sent_within(&mut throttle, later, Duration::ZERO, 1), 10);
        assert!(throttle.wait(1, later).is_some());
        assert!(throttle.wait(1, now).is_some());
    }
}
