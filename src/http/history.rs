//! Rate and lag of each replication over the last hours, in memory: three series per replication, coarser with age, of a
//! fixed length. Pure.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use serde::Serialize;

/// Seconds of one point, and how many are kept: ten minutes, an hour, eight hours.
pub(super) const STEPS: [(u64, usize); 3] = [(10, 60), (60, 60), (600, 48)];
/// Replications with a history; more have none, so that the memory is bounded: about 1.4 KiB each.
pub(super) const MOST_SERIES: usize = 4_096;
/// The time that the current rate is measured over.
const RATE_OVER: Duration = Duration::from_secs(6);
/// Points of the line in the table.
const LINE: usize = 30;
const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// What is known of one replication at one time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Observed {
    /// Messages copied since its leader began; `None` without a leader.
    pub copied: Option<u64>,
    /// Messages that wait, where that is known.
    pub lag: Option<u64>,
}

/// The series of all replications.
#[derive(Debug, Default)]
pub(super) struct History {
    series: HashMap<String, Series>,
    round: u64,
}

#[derive(Debug, Default)]
struct Series {
    /// When so many were copied; the last few seconds.
    recent: VecDeque<(Duration, u64)>,
    rings: [Ring; STEPS.len()],
    round: u64,
}

/// Points of one length.
#[derive(Debug, Default)]
struct Ring {
    points: VecDeque<Point>,
    open: OpenPoint,
}

/// The point that time is in.
#[derive(Debug, Default)]
struct OpenPoint {
    index: u64,
    messages: u64,
    /// The part of its time in which the messages are known.
    known: Duration,
    lag: Option<u64>,
}

/// Messages per second and the largest lag; not a number where it is not known.
#[derive(Debug, Clone, Copy)]
struct Point {
    rate: f32,
    lag: f32,
}

const UNKNOWN: Point = Point { rate: f32::NAN, lag: f32::NAN };

/// One series, for a viewer.
#[derive(Debug, Serialize)]
pub(super) struct ShownSeries {
    /// Seconds of one point.
    step: u64,
    /// Messages per second, the newest last; `null` where it is not known.
    rate: Vec<Option<f64>>,
    /// Messages that waited, at most.
    lag: Vec<Option<f64>>,
}

impl History {
    /// Notes what is known at `now`, which counts from any time that stays the same. What is not named any more is forgotten.
    pub(super) fn observe<'a>(&mut self, now: Duration, all: impl Iterator<Item = (&'a str, Observed)>) {
        self.round += 1;
        for (id, observed) in all {
            if !self.series.contains_key(id) {
                if self.series.len() >= MOST_SERIES {
                    continue;
                }
                self.series.insert(id.to_owned(), Series::default());
            }
            if let Some(series) = self.series.get_mut(id) {
                series.round = self.round;
                series.observe(now, observed);
            }
        }
        self.series.retain(|_, series| series.round == self.round);
    }

    /// Messages per second in the last seconds, where that is known.
    pub(super) fn rate(&self, id: &str) -> Option<f64> {
        let recent = &self.series.get(id)?.recent;
        let ((from, before), (to, after)) = (recent.front()?, recent.back()?);
        let seconds = to.saturating_sub(*from).as_secs_f64();
        (seconds > 0.0).then(|| (after - before) as f64 / seconds)
    }

    /// The last minutes of the rate and of the lag, each as text: the largest, `|`, and a digit of 64 for each point or `-` where
    /// it is not known.
    pub(super) fn lines(&self, id: &str) -> [String; 2] {
        [self.line(id, |point| point.rate), self.line(id, |point| point.lag)]
    }

    fn line(&self, id: &str, value: fn(&Point) -> f32) -> String {
        let Some(points) = self.series.get(id).map(|series| &series.rings[0].points) else { return String::new() };
        let newest = points.range(points.len().saturating_sub(LINE)..).map(value);
        let most = newest.clone().filter(|value| value.is_finite()).fold(0.0, f32::max);
        let digit = |value: f32| match value.is_finite() {
            true if most > 0.0 => char::from(DIGITS[((value / most * 63.0).round() as usize).min(63)]),
            true => 'A',
            false => '-',
        };
        let digits: String = newest.map(digit).collect();
        if digits.is_empty() { digits } else { format!("{}|{digits}", rounded(f64::from(most))) }
    }

    /// All series of one replication, if it has any.
    pub(super) fn shown(&self, id: &str) -> Vec<ShownSeries> {
        let Some(series) = self.series.get(id) else { return Vec::new() };
        let number = |value: f32| value.is_finite().then(|| rounded(f64::from(value)));
        let rings = series.rings.iter().zip(STEPS);
        rings
            .map(|(ring, (step, _))| ShownSeries {
                step,
                rate: ring.points.iter().map(|point| number(point.rate)).collect(),
                lag: ring.points.iter().map(|point| number(point.lag)).collect(),
            })
            .collect()
    }
}

impl Series {
    fn observe(&mut self, now: Duration, observed: Observed) {
        let before = self.recent.back().copied();
        // A leader begins to count again, and a lower count says so.
        let known = observed.copied.zip(before).filter(|(copied, (_, before))| copied >= before);
        let passed = known.map(|(copied, (at, before))| (now.saturating_sub(at), copied - before));
        for (ring, (step, most)) in self.rings.iter_mut().zip(STEPS) {
            ring.observe(now.as_secs() / step, most, passed, observed.lag);
        }
        if known.is_none() {
            self.recent.clear();
        }
        if let Some(copied) = observed.copied {
            self.recent.push_back((now, copied));
        }
        while self.recent.len() > 2 && self.recent.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= RATE_OVER) {
            self.recent.pop_front();
        }
    }
}

impl Ring {
    fn observe(&mut self, index: u64, most: usize, passed: Option<(Duration, u64)>, lag: Option<u64>) {
        let fresh = self.points.is_empty() && self.open.known.is_zero() && self.open.lag.is_none();
        if !fresh && index > self.open.index {
            self.points.push_back(self.open.point());
            // Time in which the process did not run.
            let missed = usize::try_from(index - self.open.index - 1).unwrap_or(most).min(most);
            self.points.extend(std::iter::repeat_n(UNKNOWN, missed));
            self.points.drain(..self.points.len().saturating_sub(most));
        }
        if fresh || index > self.open.index {
            self.open = OpenPoint { index, ..OpenPoint::default() };
        }
        if let Some((time, messages)) = passed {
            self.open.known += time;
            self.open.messages += messages;
        }
        self.open.lag = self.open.lag.max(lag);
    }
}

impl OpenPoint {
    fn point(&self) -> Point {
        let seconds = self.known.as_secs_f64();
        let rate = if seconds > 0.0 { self.messages as f64 / seconds } else { f64::NAN };
        Point { rate: rate as f32, lag: self.lag.map_or(f32::NAN, |lag| lag as f32) }
    }
}

/// Three digits are enough for a picture, and equal ones are sent once.
pub(super) fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let unit = 10f64.powf(value.abs().log10().floor() - 2.0);
    if unit >= 1.0 { ((value / unit).round() * unit).round() } else { (value / unit).round() / (1.0 / unit).round() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observe(history: &mut History, second: u64, id: &str, copied: Option<u64>, lag: Option<u64>) {
        history.observe(Duration::from_secs(second), [(id, Observed { copied, lag })].into_iter());
    }

    #[test]
    fn a_steady_rate_is_the_same_in_all_series() {
        let mut history = History::default();
        for second in (0..=7_200).step_by(5) {
            observe(&mut history, second, "A", Some(second * 200), Some(second % 60));
        }
        assert_eq!(history.rate("A"), Some(200.0));
        let lags = [[50.0, 55.0].as_slice(), &[55.0], &[55.0]];
        for ((series, (step, most)), lags) in history.shown("A").into_iter().zip(STEPS).zip(lags) {
            assert_eq!((series.step, series.rate.len()), (step, most.min(7_200 / step as usize)));
            assert!(series.rate.iter().all(|rate| *rate == Some(200.0)), "{series:?}");
            assert!(lags.contains(&series.lag.last().unwrap().unwrap()), "{series:?}");
        }
        let [rate, lag] = history.lines("A");
        assert_eq!(rate, format!("200|{}", "/".repeat(LINE)));
        // 5, 15, 25, 35, 45 and 55 of 55 wait in turn.
        assert!(lag.starts_with("55|") && lag.len() == 3 + LINE && lag.contains("/GR"), "{lag}");
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        let mut history = History::default();
        for second in 0..100 {
            let copied = match second {
                0..=29 => Some(second * 10),
                30..=59 => None,
                // Another leader counts from zero.
                _ => Some((second - 60) * 20),
            };
            observe(&mut history, second, "A", copied, None);
        }
        let ten = &history.shown("A")[0];
        let expect = [Some(10.0), Some(10.0), Some(10.0), None, None, None, Some(20.0), Some(20.0), Some(20.0)];
        assert_eq!(ten.rate, expect);
        assert!(ten.lag.iter().all(Option::is_none));
        assert_eq!(history.lines("A"), ["20|ggg---///", "0|---------"]);
        assert_eq!((history.rate("B"), history.lines("B")), (None, [String::new(), String::new()]));
    }

    #[test]
    fn a_process_that_slept_has_a_gap() {
        let mut history = History::default();
        for second in [0, 5, 10, 10_000] {
            observe(&mut history, second, "A", Some(second), Some(0));
        }
        let shown = history.shown("A");
        assert_eq!(shown[0].rate.len(), 60);
        assert!(shown[0].rate[1..].iter().all(Option::is_none), "{shown:?}");
        assert_eq!(shown[2].rate.len(), 16);
    }

    #[test]
    fn memory_is_bounded_by_count() {
        let mut history = History::default();
        let ids: Vec<String> = (0..MOST_SERIES + 500).map(|index| format!("R{index}")).collect();
        for second in (0..200_000).step_by(500) {
            let all = ids.iter().map(|id| (id.as_str(), Observed { copied: Some(second), lag: Some(second) }));
            history.observe(Duration::from_secs(second), all);
        }
        assert_eq!(history.series.len(), MOST_SERIES);
        for series in history.series.values() {
            assert!(series.recent.len() <= 10);
            for (ring, (_, most)) in series.rings.iter().zip(STEPS) {
                assert!(ring.points.len() <= most && ring.points.capacity() <= 4 * most, "{}", ring.points.capacity());
            }
        }
        // What is gone takes no memory.
        observe(&mut history, 200_000, "R1", Some(1), None);
        assert_eq!(history.series.len(), 1);
    }

    #[test]
    fn a_number_has_three_digits() {
        let check = |value: f64, expect: f64| assert_eq!(rounded(value), expect, "{value}");
        check(0.0, 0.0);
        check(123_456.0, 123_000.0);
        check(0.012_345, 0.0123);
        check(1.0, 1.0);
        check(99.96, 100.0);
        check(f64::NAN, 0.0);
    }
}
