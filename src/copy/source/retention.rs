//! How long until the source removes messages that are not copied yet. Pure: the server's answers are arguments,
//! seconds the result.
//!
//! By age it is known to the second. By count and by size it is estimated from the changes of the stream between polls:
//! a full stream removes its first messages as fast as new ones come, and a stream that is not full removes none
//! before it is. `max_msgs_per_subject` is no loss in this sense, and with `discard: new` no message is removed for
//! room.

use std::collections::VecDeque;

use nats_lane::jetstream::{StreamInfo, StreamState};
use tokio::time::{Duration, Instant};

use crate::status::{Headroom, RetentionLimit};

/// How long polls are kept, but always the last two: the time over which a rate is measured.
const KEPT: Duration = Duration::from_secs(60);
/// Least distance between two polls that give a rate.
const APART: Duration = Duration::from_millis(500);
/// A stream with less free room than this fraction (one in 20) is full: sizes vary, and it is filled in steps.
const FULL: f64 = 20.0;
/// Time in seconds that operators need to react.
const TIME_TO_ACT: f64 = 600.0;

/// The waiting messages of a source, so that the last sequence and the number agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Last sequence of the stream.
    pub last_seq: u64,
    /// Messages in scope that are not settled.
    pub messages: u64,
}

impl Waiting {
    /// `counted` messages wait, and the stream has, or had, a message at `seen`. Both are as old as their report.
    /// Where each sequence is one message in scope (`all`), the number follows from the sequences: then it
    /// is as new as the newer of both.
    pub fn of(state: &StreamState, all: bool, position: u64, counted: u64, seen: u64) -> Self {
        let last_seq = state.last_seq.max(seen);
        let before = state.first_seq.saturating_sub(1);
        let whole = state.messages == state.last_seq.saturating_sub(before);
        let messages = if all && whole { last_seq.saturating_sub(position.max(before)) } else { counted };
        Self { last_seq, messages }
    }
}

/// The limits by which a source removes messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    max_age: Option<Duration>,
    max_msgs: Option<u64>,
    max_bytes: Option<u64>,
}

impl Retention {
    /// By the configuration of the stream.
    pub fn of(source: &StreamInfo) -> Self {
        let number = |name| u64::try_from(source.number(name)).ok().filter(|number| *number > 0);
        let removes = source.text("discard") != "new";
        Self {
            max_age: number("max_age").map(Duration::from_nanos),
            max_msgs: number("max_msgs").filter(|_| removes),
            max_bytes: number("max_bytes").filter(|_| removes),
        }
    }

    /// Whether there is a limit besides the age of a message.
    pub fn by_count(&self) -> bool {
        self.max_msgs.is_some() || self.max_bytes.is_some()
    }
}

/// The oldest message in scope that is not settled.
#[derive(Debug, Clone, Copy)]
pub struct Oldest {
    /// Source sequence; at least.
    pub seq: u64,
    /// Time since it was stored, if known.
    pub age: Option<Duration>,
}

/// The estimate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outlook {
    /// There were too few polls.
    Unknown,
    /// No message is going to be removed, as it is now.
    Safe,
    /// The time that is left.
    Left(Headroom),
}

/// The recent polls of the source's stream.
#[derive(Debug, Default)]
pub struct PollHistory {
    polls: VecDeque<(Instant, StreamState)>,
}

/// Sequences and messages per second.
struct StreamRates {
    published: f64,
    removed: f64,
    grown: f64,
}

impl PollHistory {
    /// Notes a poll.
    pub fn add(&mut self, now: Instant, state: StreamState) {
        let made_anew = self.polls.back().is_some_and(|(_, last)| state.last_seq < last.last_seq);
        if made_anew {
            self.polls.clear();
        }
        while self.polls.len() > 1 && self.polls.front().is_some_and(|(at, _)| now.duration_since(*at) > KEPT) {
            self.polls.pop_front();
        }
        self.polls.push_back((now, state));
    }

    fn rates(&self) -> Option<StreamRates> {
        let ((from, old), (to, new)) = (self.polls.front()?, self.polls.back()?);
        let time = to.duration_since(*from);
        let per_second = |new: u64, old: u64| (new as f64 - old as f64) / time.as_secs_f64();
        (time >= APART).then(|| StreamRates {
            published: per_second(new.last_seq, old.last_seq),
            removed: per_second(new.first_seq, old.first_seq),
            grown: per_second(new.messages, old.messages),
        })
    }

    /// How long the source keeps a message that comes now, seconds, estimated.
    pub fn kept(&self, retention: &Retention) -> Option<f64> {
        let published = self.rates().map(|rates| rates.published).filter(|rate| *rate > 0.0);
        let by_age = retention.max_age.map(|age| age.as_secs_f64());
        let by_count = retention.max_msgs.and_then(|max| Some(max as f64 / published?));
        let by_size = retention.max_bytes.and_then(|max| Some(self.fit(max)? / published?));
        [by_age, by_count, by_size].into_iter().flatten().reduce(f64::min)
    }

    /// How many messages of the present average size fit into so many bytes.
    fn fit(&self, max_bytes: u64) -> Option<f64> {
        let (_, StreamState { messages, bytes, .. }) = self.polls.back()?;
        Some(max_bytes as f64 / (*bytes as f64 / (*messages).max(1) as f64).max(1.0))
    }

    /// How long the oldest unsettled message will still be there.
    pub fn outlook(&self, retention: &Retention, oldest: &Oldest) -> Outlook {
        let by_age = match (retention.max_age, oldest.age) {
            (Some(max), Some(age)) => left(max.saturating_sub(age), max.as_secs_f64(), RetentionLimit::Age),
            (Some(_), None) => Outlook::Unknown,
            (None, _) => Outlook::Safe,
        };
        let by_count = retention.max_msgs.map(|max| self.by_count(max as f64, oldest, RetentionLimit::Messages));
        let by_size = retention.max_bytes.map(|max| {
            let fit = self.fit(max);
            fit.map_or(Outlook::Unknown, |fit| self.by_count(fit, oldest, RetentionLimit::Bytes))
        });
        let all = [Some(by_age), by_count, by_size];
        all.into_iter().flatten().fold(Outlook::Safe, sooner)
    }

    fn by_count(&self, max: f64, oldest: &Oldest, limit: RetentionLimit) -> Outlook {
        let (Some(StreamRates { published, removed, grown }), Some((_, now))) = (self.rates(), self.polls.back())
        else {
            return Outlook::Unknown;
        };
        let before = oldest.seq.saturating_sub(now.first_seq) as f64;
        let room = max - now.messages as f64;
        let seconds = if room * FULL < max {
            let rate = if removed > 0.0 { removed } else { published };
            before / rate
        } else if grown > 0.0 {
            room / grown + before / published
        } else {
            f64::INFINITY
        };
        match Duration::try_from_secs_f64(seconds) {
            Ok(time) if published > 0.0 => left(time, max / published, limit),
            _ => Outlook::Safe,
        }
    }
}

/// Low is less than a tenth of the time that the source keeps messages, but at least the time that operators need, and
/// at most half of the former: a source that keeps little would always be low otherwise.
fn left(time: Duration, kept: f64, limit: RetentionLimit) -> Outlook {
    let low_below = (kept / 10.0).max(TIME_TO_ACT).min(kept / 2.0);
    Outlook::Left(Headroom { seconds: time.as_secs_f64(), limit, low_below })
}

fn sooner(one: Outlook, other: Outlook) -> Outlook {
    match (one, other) {
        (Outlook::Left(a), Outlook::Left(b)) => Outlook::Left(if b.seconds < a.seconds { b } else { a }),
        (Outlook::Left(a), _) | (_, Outlook::Left(a)) => Outlook::Left(a),
        (Outlook::Unknown, _) | (_, Outlook::Unknown) => Outlook::Unknown,
        (Outlook::Safe, Outlook::Safe) => Outlook::Safe,
    }
}

/// Whether a warning that little time is left was reported.
#[derive(Debug, Default)]
pub struct Shortage {
    open: bool,
}

/// A change to report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HeadroomChange {
    /// Little time is left.
    Low(Headroom),
    /// There is enough again.
    Restored,
}

impl Shortage {
    /// Judges the present headroom; `caught_up` if there is no lag. A warning ends at one and a half times the headroom
    /// at which it begins, so that a value near the bound is reported once.
    pub fn judge(&mut self, headroom: Option<Headroom>, caught_up: bool) -> Option<HeadroomChange> {
        let enough = headroom.is_some_and(|left| left.seconds >= left.low_below * 1.5);
        match headroom.filter(|left| left.seconds < left.low_below) {
            Some(left) if !self.open => {
                self.open = true;
                Some(HeadroomChange::Low(left))
            }
            None if self.open && (caught_up || enough) => {
                self.open = false;
                Some(HeadroomChange::Restored)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600;

    fn state(first_seq: u64, last_seq: u64, bytes_each: u64) -> StreamState {
        let messages = last_seq + 1 - first_seq;
        StreamState {
            messages,
            first_seq,
            last_seq,
            bytes: messages * bytes_each,
            num_subjects: 1,
            ..StreamState::default()
        }
    }

    /// Looks ten seconds apart.
    fn polls(states: &[StreamState]) -> PollHistory {
        let (began, mut polls) = (Instant::now(), PollHistory::default());
        for (index, state) in states.iter().enumerate() {
            polls.add(began + Duration::from_secs(10 * index as u64), state.clone());
        }
        polls
    }

    fn seconds(outlook: Outlook) -> Option<(f64, RetentionLimit)> {
        match outlook {
            Outlook::Left(Headroom { seconds, limit, .. }) => Some((seconds.round(), limit)),
            Outlook::Unknown | Outlook::Safe => None,
        }
    }

    #[test]
    fn by_count_and_by_size() {
        let count = |max| Retention { max_msgs: Some(max), ..Retention::default() };
        let size = |max| Retention { max_bytes: Some(max), ..Retention::default() };
        use RetentionLimit::{Bytes, Messages};
        // What a stream did in ten seconds, its limit, the oldest unsettled message, and what is left.
        let table = [
            // Full: 10 a second go, and 500 lie before it.
            (count(1_000), (1, 1_000), (101, 1_100), 601, Some((50.0, Messages))),
            // The next one to go.
            (count(1_000), (1, 1_000), (101, 1_100), 101, Some((0.0, Messages))),
            // Gone already.
            (count(1_000), (1, 1_000), (101, 1_100), 50, Some((0.0, Messages))),
            // Half full, 10 a second: 50 s until it is full, and 20 s until the message is the first.
            (count(1_000), (1, 400), (1, 500), 201, Some((70.0, Messages))),
            // Not full, and it does not grow.
            (count(1_000), (1, 500), (101, 600), 201, None),
            // Nobody publishes.
            (count(1_000), (1, 1_000), (1, 1_000), 201, None),
            // 100 bytes each: 1,000 fit in.
            (size(100_000), (1, 1_000), (101, 1_100), 601, Some((50.0, Bytes))),
            (size(100_000), (1, 400), (1, 500), 201, Some((70.0, Bytes))),
        ];
        for (retention, before, now, oldest, expect) in table {
            let polls = polls(&[state(before.0, before.1, 100), state(now.0, now.1, 100)]);
            let outlook = polls.outlook(&retention, &Oldest { seq: oldest, age: None });
            assert_eq!(seconds(outlook), expect, "{retention:?} {before:?} {now:?} {oldest}");
        }
    }

    #[test]
    fn by_age_it_is_known_at_once_and_by_count_after_two_looks() {
        let one = polls(&[state(1, 1_000, 100)]);
        let old = Oldest { seq: 500, age: Some(Duration::from_secs(HOUR)) };
        let age = Retention { max_age: Some(Duration::from_secs(3 * HOUR)), ..Retention::default() };
        assert_eq!(seconds(one.outlook(&age, &old)), Some((7_200.0, RetentionLimit::Age)));
        assert_eq!(one.outlook(&age, &Oldest { age: None, ..old }), Outlook::Unknown);
        let count = Retention { max_msgs: Some(1_000), ..Retention::default() };
        assert_eq!(one.outlook(&count, &old), Outlook::Unknown);
        assert_eq!(one.outlook(&Retention::default(), &old), Outlook::Safe);
        // The sooner one counts.
        let both = Retention { max_msgs: Some(1_000), ..age };
        assert_eq!(seconds(one.outlook(&both, &old)), Some((7_200.0, RetentionLimit::Age)));
        let two = polls(&[state(1, 1_000, 100), state(101, 1_100, 100)]);
        assert_eq!(seconds(two.outlook(&both, &old)), Some((40.0, RetentionLimit::Messages)));
        // A recreated stream has no past.
        let anew = polls(&[state(1, 1_000, 100), state(1, 500, 100)]);
        assert_eq!(anew.outlook(&count, &old), Outlook::Unknown);
    }

    #[test]
    fn the_last_sequence_and_what_waits_agree() {
        let of = |state: StreamState, all, position, counted, seen| {
            let Waiting { last_seq, messages } = Waiting::of(&state, all, position, counted, seen);
            (last_seq, messages)
        };
        // The consumer has heard of more than the last check of the stream, and the other way round.
        assert_eq!(of(state(1, 100, 1), true, 90, 30, 120), (120, 30));
        assert_eq!(of(state(1, 130, 1), true, 90, 30, 120), (130, 40));
        // What the source removed before it was read does not wait.
        assert_eq!(of(state(101, 130, 1), true, 90, 30, 90), (130, 30));
        assert_eq!(of(state(1, 0, 1), true, 0, 0, 0), (0, 0));
        // With a filter, or with holes, the sequences say nothing about the number.
        assert_eq!(of(state(1, 130, 1), false, 90, 5, 95), (130, 5));
        let holes = StreamState { messages: 20, ..state(1, 130, 1) };
        assert_eq!(of(holes, true, 90, 12, 95), (130, 12));
        // Replayed for sampling: settled already.
        assert_eq!(of(state(1, 130, 1), true, 130, 40, 130), (130, 0));
    }

    #[test]
    fn low_is_a_tenth_but_time_to_act_and_at_most_half() {
        for (kept, expect) in [(7 * 24 * HOUR, 60_480.0), (2 * HOUR, 720.0), (HOUR, 600.0), (600, 300.0), (10, 5.0)] {
            let Outlook::Left(Headroom { low_below, .. }) =
                left(Duration::from_secs(1), kept as f64, RetentionLimit::Age)
            else {
                panic!("something is left");
            };
            assert_eq!(low_below, expect, "{kept}");
        }
    }

    #[test]
    fn a_shortage_is_told_once_and_its_end_too() {
        let headroom = |seconds| Some(Headroom { seconds, limit: RetentionLimit::Age, low_below: 100.0 });
        let mut shortage = Shortage::default();
        let mut judge = |seconds: Option<f64>, caught_up| {
            shortage.judge(seconds.and_then(headroom), caught_up).map(|turn| matches!(turn, HeadroomChange::Low(_)))
        };
        let story = [
            (Some(500.0), false, None),
            (Some(99.0), false, Some(true)),
            (Some(50.0), false, None),
            (None, false, None), // nobody knows
            (Some(101.0), false, None),
            (Some(99.0), false, None),
            (Some(150.0), false, Some(false)),
            (Some(101.0), false, None),
            (Some(10.0), false, Some(true)),
            (None, true, Some(false)),
            (None, true, None),
        ];
        for (index, (seconds, caught_up, expect)) in story.into_iter().enumerate() {
            assert_eq!(judge(seconds, caught_up), expect, "{index}");
        }
    }

    #[test]
    fn what_removes_messages_is_read_from_the_configuration() {
        let of = |config| {
            let info = serde_json::json!({"config": config, "state": {}});
            Retention::of(&serde_json::from_value(info).expect("a stream"))
        };
        let hour = 3_600_000_000_000_u64;
        let all = serde_json::json!({"max_age": hour, "max_msgs": 5, "max_bytes": 6, "discard": "old"});
        let age = Some(Duration::from_secs(HOUR));
        assert_eq!(of(all.clone()), Retention { max_age: age, max_msgs: Some(5), max_bytes: Some(6) });
        let mut new = all;
        new["discard"] = "new".into();
        assert_eq!(of(new), Retention { max_age: age, ..Retention::default() });
        let none = serde_json::json!({"max_age": 0, "max_msgs": -1, "max_bytes": -1, "max_msgs_per_subject": 1});
        assert_eq!(of(none), Retention::default());
    }
}
