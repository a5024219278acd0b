//! How far copies are, in one line on a terminal: percent, rate, average, bytes per second, and the time that is left.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::format::{bytes, count, seconds};
use crate::status::{Row, State};

/// The rate is that of the last seconds.
const RECENT: Duration = Duration::from_secs(5);

/// What one leader had settled of a replication when it was seen last.
#[derive(Debug, Clone, Copy)]
struct Seen {
    epoch: u64,
    messages: u64,
    bytes: u64,
}

/// Adds up what replications settle while they are watched.
#[derive(Debug)]
pub(super) struct ProgressMeter {
    began: Instant,
    before: BTreeMap<String, Seen>,
    messages: u64,
    bytes: u64,
    recent: VecDeque<(Instant, u64, u64)>,
}

/// How far they are.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CopiesProgress {
    replications: usize,
    caught_up: usize,
    settled: u64,
    /// Messages that are left; `None` where one of the replications does not know.
    left: Option<u64>,
    /// Messages and bytes per second, of the last seconds.
    rate: Option<(f64, f64)>,
    /// Messages per second since the beginning.
    average: Option<f64>,
}

impl ProgressMeter {
    pub(super) fn begin(now: Instant) -> Self {
        Self { began: now, before: BTreeMap::new(), messages: 0, bytes: 0, recent: VecDeque::new() }
    }

    /// Takes the rows of an answer; those that are paused are not expected to copy.
    pub(super) fn update(&mut self, rows: &[Row], now: Instant) -> CopiesProgress {
        let rows: Vec<_> = rows.iter().filter(|row| row.state != State::Paused).collect();
        for row in &rows {
            let (counters, in_flight) = (&row.copy.counters, &row.copy.in_flight);
            let seen = Seen {
                epoch: row.epoch,
                messages: counters.received.saturating_sub(in_flight.messages),
                bytes: counters.received_bytes.saturating_sub(in_flight.bytes),
            };
            let before = self.before.insert(row.replication.clone(), seen);
            // Counters restart with each leader.
            let from = match before {
                Some(before) if before.epoch == seen.epoch => before,
                Some(_) => Seen { messages: 0, bytes: 0, ..seen },
                None => seen,
            };
            self.messages += seen.messages.saturating_sub(from.messages);
            self.bytes += seen.bytes.saturating_sub(from.bytes);
        }
        self.recent.push_back((now, self.messages, self.bytes));
        while self.recent.get(1).is_some_and(|(at, ..)| now.duration_since(*at) >= RECENT) {
            self.recent.pop_front();
        }
        let rate = self.recent.front().and_then(|(at, messages, size)| {
            let passed = now.duration_since(*at).as_secs_f64();
            let per_second = |number: u64| number as f64 / passed;
            (passed > 0.0).then(|| (per_second(self.messages - messages), per_second(self.bytes - size)))
        });
        let passed = now.duration_since(self.began).as_secs_f64();
        let lags = rows.iter().map(|row| row.copy.lag.map(|lag| lag.messages));
        CopiesProgress {
            replications: rows.len(),
            caught_up: lags.clone().filter(|lag| *lag == Some(0)).count(),
            settled: self.messages,
            left: lags.sum(),
            rate,
            average: (passed > 0.0).then(|| self.messages as f64 / passed),
        }
    }
}

impl CopiesProgress {
    /// In one line.
    pub(super) fn words(&self) -> String {
        let Self { replications, caught_up, settled, left, rate, average } = self;
        let mut words = vec![match left {
            Some(left) => {
                let all = settled + left;
                format!("{} of {} messages ({})", count(*settled), count(all), percent(*settled, all))
            }
            None => format!("{} messages", count(*settled)),
        }];
        if let Some((messages, size)) = rate {
            words.push(format!("{}/s", count(messages.round() as u64)));
            words.push(format!("{}/s", bytes(size.round() as u64)));
        }
        words.extend(average.map(|average| format!("average {}/s", count(average.round() as u64))));
        words.extend(time_left(*left, rate.map(|(messages, _)| messages)));
        if *replications != 1 {
            words.push(format!("{caught_up} of {replications} caught up"));
        }
        words.join(", ")
    }
}

/// Messages that are left, at this rate.
pub(super) fn time_left(left: Option<u64>, rate: Option<f64>) -> Option<String> {
    let (left, rate) = left.filter(|left| *left > 0).zip(rate.filter(|rate| *rate >= 0.5))?;
    Some(format!("{} left", seconds(left as f64 / rate)))
}

/// Rounded down: 100 % is all of it.
pub(super) fn percent(part: u64, all: u64) -> String {
    let tenths = if all == 0 { 1_000 } else { (u128::from(part) * 1_000 / u128::from(all)) as u64 };
    format!("{}.{} %", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(id: &str, epoch: u64, received: u64, lag: Option<u64>) -> Row {
        let lag = lag.map(|messages| json!({"messages": messages, "seconds": 1.0}));
        let row = json!({"replication": id, "state": "running", "origin": "kv", "leader": "i", "epoch": epoch,
            "config_revision": 1, "lag": lag, "counters": {"received": received, "received_bytes": received * 1024}});
        serde_json::from_value(row).unwrap()
    }

    #[test]
    fn a_copy_is_measured_from_where_it_was_first_seen() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut meter = ProgressMeter::begin(begun);
        assert_eq!(meter.update(&[row("A", 1, 100, Some(9_000))], begun).words(), "0 of 9,000 messages (0.0 %)");
        let words = meter.update(&[row("A", 1, 3_100, Some(6_000))], at(2)).words();
        assert_eq!(words, "3,000 of 9,000 messages (33.3 %), 1,500/s, 1.5 MiB/s, average 1,500/s, 4.0s left");
        // Another leader counts from 0.
        let words = meter.update(&[row("A", 2, 5_999, Some(1))], at(12)).words();
        assert!(words.starts_with("8,999 of 9,000 messages (99.9 %), 600/s"), "{words}");
    }

    #[test]
    fn several_copies_are_added_up() {
        let begun = Instant::now();
        let mut meter = ProgressMeter::begin(begun);
        let mut paused = row("C", 1, 0, Some(50));
        paused.state = State::Paused;
        let words = meter.update(&[row("A", 1, 0, Some(0)), row("B", 1, 0, Some(8)), paused.clone()], begun).words();
        assert_eq!(words, "0 of 8 messages (0.0 %), 1 of 2 caught up");
        let words = meter.update(&[row("A", 1, 0, Some(0)), row("B", 1, 0, None), paused], begun).words();
        assert_eq!(words, "0 messages, 1 of 2 caught up");
    }

    #[test]
    fn nothing_is_all_of_nothing() {
        assert_eq!(percent(0, 0), "100.0 %");
        assert_eq!(percent(9_999, 10_000), "99.9 %");
        assert_eq!((time_left(Some(10), None), time_left(Some(0), Some(9.0))), (None, None));
    }
}
