//! The time of the source server. Stored times are the server's, so ages are measured by its clock: the clock of this
//! host can differ, differs between instances, and can be set while a run is under way. Pure: moments and answers are
//! arguments, times are the result.
//!
//! Servers from 2.10 on write their time into every answer about a stream (`ts` of `STREAM.INFO`). It was written after
//! the question was sent and before the answer was received, which bounds the server's time at a moment of our
//! monotonic clock from both sides. Every answer narrows the bounds or, when the server's clock was set or another
//! server leads the stream, moves them as far as needed and no further. The lower bound counts as the server's time: no
//! message counts as older than it is.

use chrono::{DateTime, Utc};
use tokio::time::{Duration, Instant};

use crate::events::Event;

/// A larger difference between the two clocks is reported.
const APART: f64 = 5.0;
/// A reported difference is over once it is no larger than this.
const TOGETHER: f64 = 2.5;
/// The status follows changes of at least this size: a row that changes is saved.
const SHOWN: f64 = 0.05;

/// One answer of the server that leads the source stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClockReading {
    /// When the question was sent.
    pub sent: Instant,
    /// When its answer was received.
    pub received: Instant,
    /// The server's time in the answer; `None` if there is none.
    pub server: Option<DateTime<Utc>>,
    /// The wall clock of this host when the answer was received.
    pub local: DateTime<Utc>,
}

/// The clock of the source server; the clock of this host where the server does not report its time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SourceClock {
    /// A moment.
    at: Instant,
    /// The server's time at that moment, nanoseconds since the Unix epoch: lower bound, and upper bound.
    least: i64,
    most: i64,
    /// Whether the server reported it.
    reported: bool,
}

impl SourceClock {
    /// The clock by one answer.
    pub fn new(heard: &ClockReading) -> Self {
        let (least, most) = bounds(heard);
        Self { at: heard.received, least, most, reported: heard.server.is_some() }
    }

    /// When the newest answer was received.
    pub fn heard_at(&self) -> Instant {
        self.at
    }

    /// Follows a later answer.
    pub fn hear(&mut self, heard: &ClockReading) {
        let next = Self::new(heard);
        *self = match self.reported && next.reported {
            true => {
                let passed = nanoseconds(heard.received.saturating_duration_since(self.at));
                let within = |time: i64| time.saturating_add(passed).clamp(next.least, next.most);
                Self { least: within(self.least), most: within(self.most), ..next }
            }
            false => next,
        };
    }

    /// The server's time, nanoseconds since the Unix epoch.
    pub fn now_ns(&self, now: Instant) -> i64 {
        self.least.saturating_add(self.passed(now))
    }

    /// The server's time.
    pub fn now(&self, now: Instant) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(self.now_ns(now))
    }

    /// The server's time `ago` before now.
    pub fn ago(&self, now: Instant, ago: Duration) -> DateTime<Utc> {
        let ago = chrono::Duration::from_std(ago).unwrap_or(chrono::Duration::MAX);
        self.now(now).checked_sub_signed(ago).unwrap_or(DateTime::UNIX_EPOCH)
    }

    /// How far the server's clock is ahead of the clock of this host, seconds: the smallest difference that agrees with
    /// the measurements. `None` if the server does not report its time.
    pub fn offset(&self, now: Instant, local: DateTime<Utc>) -> Option<f64> {
        let local = local.timestamp_nanos_opt()?;
        let ahead = |time: i64| time.saturating_add(self.passed(now)).saturating_sub(local);
        let offset = 0.clamp(ahead(self.least), ahead(self.most));
        self.reported.then(|| (offset / 1_000_000) as f64 / 1e3)
    }

    fn passed(&self, now: Instant) -> i64 {
        nanoseconds(now.saturating_duration_since(self.at))
    }
}

fn bounds(heard: &ClockReading) -> (i64, i64) {
    let nanos = |time: DateTime<Utc>| time.timestamp_nanos_opt().unwrap_or_default();
    match heard.server.map(nanos) {
        Some(least) => {
            let way = nanoseconds(heard.received.saturating_duration_since(heard.sent));
            (least, least.saturating_add(way))
        }
        None => (nanos(heard.local), nanos(heard.local)),
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// The offset in the status, after it showed `before`.
pub(crate) fn shown(before: Option<f64>, offset: Option<f64>) -> Option<f64> {
    match (before, offset) {
        (Some(before), Some(offset)) if (offset - before).abs() < SHOWN => Some(before),
        _ => offset,
    }
}

/// Describes a difference between the clocks of the source server and of this host that is too large; `None` if it is
/// not.
pub(crate) fn apart(offset: Option<f64>) -> Option<String> {
    match offset {
        None => Some(
            "the source server does not report its time: ages are measured by the clock of this host, and are wrong by \
             the difference between the two clocks"
                .to_owned(),
        ),
        Some(offset) if offset.abs() > APART => {
            let (size, direction) = (offset.abs(), if offset > 0.0 { "ahead of" } else { "behind" });
            Some(format!(
                "the clock of the source server is {size:.1} s {direction} the clock of this host: ages are measured by the \
                 server's clock; synchronize both clocks"
            ))
        }
        Some(_) => None,
    }
}

/// Whether a difference between the clocks was reported.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    raised: Option<ClockProblem>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClockProblem {
    Apart,
    NotReported,
}

impl Alarm {
    /// The event about an offset, once at its begin and once at its end.
    pub fn judge(&mut self, offset: Option<f64>) -> Option<Event> {
        let offset_ms = offset.map(|offset| (offset * 1e3) as i64);
        if let Some(reason) = apart(offset) {
            let cause = if offset.is_some() { ClockProblem::Apart } else { ClockProblem::NotReported };
            let known = self.raised.replace(cause) == Some(cause);
            return (!known).then_some(Event::ClockOffset { offset_ms, reason });
        }
        let offset_ms = offset_ms.filter(|_| offset.is_some_and(|offset| offset.abs() <= TOGETHER))?;
        self.raised.take().map(|_| Event::ClockOk { offset_ms })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn time(ms: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + chrono::Duration::milliseconds(1_000_000 + ms)
    }

    /// An answer that was under way from `sent` to `received`, milliseconds after the beginning; the clock of this host
    /// shows the time since then.
    fn heard(began: Instant, sent: u64, received: u64, server: Option<i64>) -> ClockReading {
        let moment = |ms| began + Duration::from_millis(ms);
        ClockReading {
            sent: moment(sent),
            received: moment(received),
            server: server.map(time),
            local: time(received as i64),
        }
    }

    #[test]
    fn the_server_s_time_goes_on_from_its_answer() {
        let began = Instant::now();
        let clock = SourceClock::new(&heard(began, 100, 200, Some(-89_850)));
        let now = began + Duration::from_millis(1_200);
        assert_eq!(clock.now(now), time(-88_850));
        // It wrote its time when 100 to 200 ms had passed here, so it is 89.95 to 90.05 s behind.
        assert_eq!(clock.offset(now, time(1_200)), Some(-89.95));
        // The clock of this host was set meanwhile: the source's time is the same.
        assert_eq!(clock.offset(now, time(1_200 - 90_000)), Some(0.0));
        assert_eq!(clock.now_ns(now + Duration::from_secs(1)) - clock.now_ns(now), SECOND);
    }

    #[test]
    fn a_slow_answer_neither_moves_the_time_nor_raises_an_alarm() {
        let began = Instant::now();
        // Both clocks are the same, and the first answer takes 9 s to come.
        let mut clock = SourceClock::new(&heard(began, 0, 9_000, Some(0)));
        let now = began + Duration::from_secs(9);
        assert_eq!(clock.offset(now, time(9_000)), Some(0.0));
        // Never older than it is.
        assert!(clock.now(now) <= time(9_000));
        clock.hear(&heard(began, 20_000, 20_010, Some(20_005)));
        let now = began + Duration::from_millis(20_010);
        assert_eq!(clock.now(now), time(20_005));
        // On its way there, or on its way back.
        for (server, expect) in [(30_001, 39_995), (38_999, 39_999)] {
            clock.hear(&heard(began, 30_000, 39_000, Some(server)));
            assert_eq!(clock.offset(began + Duration::from_secs(39), time(39_000)), Some(0.0), "{server}");
            assert_eq!(clock.now(began + Duration::from_secs(40)), time(expect), "{server}");
        }
    }

    #[test]
    fn the_clock_of_a_new_leader_counts_from_its_first_answer() {
        let began = Instant::now();
        let mut clock = SourceClock::new(&heard(began, 0, 2, Some(1)));
        for (at, ahead) in [(10_000, 120_000), (20_000, -7_000), (30_000, 0)] {
            clock.hear(&heard(began, at, at + 2, Some(at as i64 + 1 + ahead)));
            let now = began + Duration::from_millis(at + 2);
            let offset = clock.offset(now, time(at as i64 + 2)).unwrap();
            assert!((offset * 1e3 - ahead as f64).abs() <= 1.0, "{ahead}: {offset}");
            let beyond = clock.now(now) - time(at as i64 + 1 + ahead);
            assert!((0..=2).contains(&beyond.num_milliseconds()), "{ahead}: {beyond}");
        }
    }

    #[test]
    fn without_the_server_s_time_the_clock_of_this_host_counts() {
        let began = Instant::now();
        let mut clock = SourceClock::new(&heard(began, 0, 50, None));
        let now = began + Duration::from_secs(1);
        assert_eq!((clock.now(now), clock.offset(now, time(1_000))), (time(1_000), None));
        // It was set, and is followed.
        let set = ClockReading { local: time(95_000), ..heard(began, 10_000, 10_050, None) };
        clock.hear(&set);
        assert_eq!(clock.now(began + Duration::from_millis(10_050)), time(95_000));
        clock.hear(&heard(began, 20_000, 20_000, Some(50_000)));
        assert_eq!(clock.now(began + Duration::from_secs(20)), time(50_000));
        clock.hear(&heard(began, 30_000, 30_000, None));
        assert_eq!(clock.now(began + Duration::from_secs(30)), time(30_000));
    }

    #[test]
    fn a_difference_is_reported_once_and_its_end_too() {
        let mut alarm = Alarm::default();
        let mut judge = |offset: Option<f64>| {
            alarm.judge(offset).map(|event| match event {
                Event::ClockOffset { offset_ms, reason } => (offset_ms, !reason.is_empty()),
                Event::ClockOk { offset_ms } => (Some(offset_ms), false),
                other => panic!("{other:?}"),
            })
        };
        let story = [
            (Some(0.0), None),
            (Some(5.0), None),
            (Some(-5.1), Some((Some(-5_100), true))),
            (Some(-90.0), None),
            (Some(4.0), None), // not yet over
            (Some(6.0), None),
            (Some(2.0), Some((Some(2_000), false))),
            (None, Some((None, true))),
            (None, None),
            (Some(8.0), Some((Some(8_000), true))),
            (None, Some((None, true))),
            (Some(-1.0), Some((Some(-1_000), false))),
            (Some(-1.0), None),
        ];
        for (index, (offset, expect)) in story.into_iter().enumerate() {
            assert_eq!(judge(offset), expect, "{index}");
        }
    }

    #[test]
    fn the_status_does_not_follow_every_millisecond() {
        let table = [
            (None, Some(0.01), Some(0.01)),
            (Some(0.01), Some(0.05), Some(0.01)),
            (Some(0.01), Some(0.07), Some(0.07)),
            (Some(90.0), None, None),
            (None, None, None),
        ];
        for (before, offset, expect) in table {
            assert_eq!(shown(before, offset), expect, "{before:?} {offset:?}");
        }
    }
}
