//! Whether the target removes copies of messages that the source still keeps, by the limits of the target stream. Pure:
//! the reports of both servers are arguments, the loss at the target is the result.
//!
//! The first message of the target says which source messages still have a copy: copies are stored in the order of the
//! source. If it moves past messages that the source keeps for some seconds more, their copies were dropped. Expiry in
//! step with the source is none, and neither is a purge: after one, the target is far from its limits. A smaller
//! `max_msgs_per_subject` removes copies everywhere in the stream. Then the two streams are compared by their number of
//! messages, while nothing is in flight.

use nats_lane::jetstream::{StreamInfo, StreamState};
use tokio::time::{Duration, Instant};

use crate::events::Event;

/// How long the source must still keep a message after its copy is removed: both expire messages by their own clocks.
const IN_STEP: Duration = Duration::from_secs(5);
/// The first copy may be this close to the source's `max_age`, at most a quarter of it, and count as expired in step.
const AGE_TOLERANCE_MS: i64 = 120_000;

/// The limits that can remove copies at the target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::copy) struct DropLimits {
    /// `max_age` is shorter than the source's.
    pub age: bool,
    /// `max_msgs`.
    pub messages: Option<u64>,
    /// `max_bytes`.
    pub bytes: Option<u64>,
    /// `max_msgs_per_subject` is smaller than the source's, and the target holds all of the source and nothing else.
    pub per_subject: bool,
    /// All of them, in words.
    pub words: String,
}

/// The first of our copies that the target has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) struct First {
    /// Its target sequence; where there is none, the sequence of the next message.
    pub seq: u64,
    /// Source sequence of the message.
    pub source_seq: u64,
    /// When that was stored at the source, milliseconds since the Unix epoch.
    pub time_ms: Option<i64>,
}

/// One poll of the target.
#[derive(Debug, Clone, Copy)]
struct TargetPoll {
    at: Instant,
    first: First,
    state: Counted,
}

/// The counted state of the target.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    messages: u64,
    bytes: u64,
    /// The position, where nothing was in flight.
    settled: Option<u64>,
}

/// Copies that the target has dropped.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::copy) struct Dropped {
    /// Copies of messages that the source still had.
    pub messages: u64,
    /// The event, once until the target holds everything again that the source keeps.
    pub event: Option<Event>,
}

/// Compares both sides from poll to poll; outlives a run.
#[derive(Debug, Default, Clone)]
pub(in crate::copy) struct Drops {
    created: String,
    limits: Option<DropLimits>,
    known: Option<First>,
    seen: Option<TargetPoll>,
    /// The poll after that, until that is judged.
    later: Option<TargetPoll>,
    /// Messages that the source has and the target lacks from before.
    lacking: Option<u64>,
    /// Last source sequence of the dropped copies; while the source has it, no more is reported.
    dropped_to: Option<u64>,
}

impl Drops {
    /// A run begins after this position. Without `limits` no copy can be dropped.
    pub fn begin(&mut self, target: &StreamInfo, limits: Option<DropLimits>, position: u64) {
        // Messages that are copied again are out of order.
        let again = self.known.is_some_and(|known| position + 1 < known.source_seq);
        if limits.is_none() || self.created != target.created || again {
            *self = Self::default();
        }
        self.created.clone_from(&target.created);
        self.limits = limits;
        (self.seen, self.later) = (None, None);
        if self.known.is_none() && target.state.messages == 0 {
            self.known = Some(none_at(&target.state, position));
        }
    }

    /// Whether the target has to be polled at all.
    pub fn watches(&self) -> bool {
        self.limits.is_some()
    }

    /// Whether it has to be polled at once: its first message is not known.
    pub fn is_new(&self) -> bool {
        self.watches() && self.known.is_none() && self.seen.is_none()
    }

    /// Whether the first message has to be read.
    pub fn wants(&self, first_seq: u64) -> bool {
        self.known.is_none_or(|known| first_seq > known.seq)
    }

    /// The result of a poll of the target; `first` if its first message has changed. `settled` is the position, if
    /// no message was in flight meanwhile.
    pub fn target_has(&mut self, now: Instant, state: &StreamState, first: Option<First>, settled: Option<u64>) {
        let Some(first) = first.or(self.known) else { return };
        self.known.get_or_insert(first);
        // An earlier poll is judged first, with the source's next answer.
        let state = Counted { messages: state.messages, bytes: state.bytes, settled };
        let seen = Some(TargetPoll { at: now, first, state });
        *(if self.seen.is_none() { &mut self.seen } else { &mut self.later }) = seen;
    }

    /// The result of a poll of an empty target: the next copy is of a message after the position.
    pub fn target_is_empty(&mut self, now: Instant, state: &StreamState, position: u64, settled: Option<u64>) {
        self.target_has(now, state, Some(none_at(state, position)), settled);
    }

    /// Compares the target with the source's answer to a question that was asked at a time.
    pub fn source_has(&mut self, source: &StreamInfo, asked: Instant, now_ms: i64) -> Option<Dropped> {
        let limits = self.limits.clone()?;
        let known = self.known?;
        let seen = self.seen.filter(|seen| asked.duration_since(seen.at) >= IN_STEP)?;
        self.seen = self.later.take();
        let from = known.source_seq.max(source.state.first_seq);
        let to = seen.first.source_seq.saturating_sub(1);
        let messages = match limits.per_subject {
            true => self.lacking(source, seen.state),
            false => {
                self.known = Some(seen.first);
                let dropped = (to + 1).saturating_sub(from).min(seen.first.seq.saturating_sub(known.seq));
                let expired = in_step(source, seen.first.time_ms, now_ms);
                if expired || !limits.reached(seen.state) { 0 } else { dropped.min(source.state.messages) }
            }
        };
        self.dropped_to = self.dropped_to.filter(|to| source.state.first_seq <= *to);
        if messages == 0 {
            return None;
        }
        let (from, to) = if limits.per_subject { (source.state.first_seq, source.state.last_seq) } else { (from, to) };
        let (reason, first) = (limits.words, self.dropped_to.replace(to).is_none());
        Some(Dropped { messages, event: first.then_some(Event::TargetDropped { from, to, messages, reason }) })
    }

    /// How many more messages the target lacks than before.
    fn lacking(&mut self, source: &StreamInfo, target: Counted) -> u64 {
        let Some(position) = target.settled else { return 0 };
        let waiting = source.state.last_seq.saturating_sub(position);
        let lacking = source.state.messages.saturating_sub(waiting).saturating_sub(target.messages);
        let before = *self.lacking.get_or_insert(lacking);
        self.lacking = Some(before.max(lacking));
        lacking.saturating_sub(before)
    }

    /// An empty target lacks the messages of the source before the position.
    pub fn lacks(&mut self, source: &StreamState, position: u64) {
        let waiting = source.last_seq.saturating_sub(position);
        self.lacking.get_or_insert(source.messages.saturating_sub(waiting));
    }
}

impl DropLimits {
    /// Whether a target of this size is so near to a limit that the limit removed messages.
    fn reached(&self, state: Counted) -> bool {
        let near = |limit: Option<u64>, has: u64| limit.is_some_and(|limit| has >= limit / 2);
        self.age || near(self.messages, state.messages) || near(self.bytes, state.bytes)
    }
}

fn none_at(state: &StreamState, position: u64) -> First {
    First { seq: state.last_seq + 1, source_seq: position + 1, time_ms: None }
}

/// Whether the first remaining copy is of a message that the source is about to remove by its age.
fn in_step(source: &StreamInfo, time_ms: Option<i64>, now_ms: i64) -> bool {
    let max_age = source.number("max_age") / 1_000_000;
    let near = max_age - AGE_TOLERANCE_MS.min(max_age / 4);
    max_age > 0 && time_ms.is_some_and(|time| now_ms.saturating_sub(time) >= near)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn stream(config: Value, first: u64, last: u64) -> StreamInfo {
        let state = json!({"messages": last + 1 - first, "bytes": 10 * (last + 1 - first), "first_seq": first, "last_seq": last});
        serde_json::from_value(json!({"config": config, "created": "c", "state": state})).unwrap()
    }

    /// Polls of the target and the source, ten seconds apart.
    struct Watched {
        drops: Drops,
        now: Instant,
    }

    impl Watched {
        fn new(limits: DropLimits) -> Self {
            let mut drops = Drops::default();
            drops.begin(&stream(json!({}), 1, 0), Some(limits), 0);
            Self { drops, now: Instant::now() }
        }

        /// Both hold these; copies have the same sequences.
        fn poll(&mut self, source: &StreamInfo, target: (u64, u64), now_ms: i64) -> Option<(u64, bool)> {
            let target = stream(json!({}), target.0, target.1).state;
            let first =
                First { seq: target.first_seq, source_seq: target.first_seq, time_ms: Some(target.first_seq as i64) };
            let first = self.drops.wants(first.seq).then_some(first);
            self.drops.target_has(self.now, &target, first, Some(target.last_seq));
            self.now += Duration::from_secs(10);
            let dropped = self.drops.source_has(source, self.now, now_ms)?;
            Some((dropped.messages, dropped.event.is_some()))
        }
    }

    #[test]
    fn drops_are_counted_always_and_reported_once() {
        let mut watched = Watched::new(DropLimits { messages: Some(50), ..DropLimits::default() });
        let source = |first, last| stream(json!({}), first, last);
        assert_eq!(watched.poll(&source(1, 50), (1, 50), 0), None);
        assert_eq!(watched.poll(&source(1, 80), (31, 80), 0), Some((30, true)));
        assert_eq!(watched.poll(&source(1, 80), (31, 80), 0), None);
        assert_eq!(watched.poll(&source(1, 90), (41, 90), 0), Some((10, false)));
        // What the source removed, too.
        assert_eq!(watched.poll(&source(51, 100), (51, 100), 0), None);
        assert_eq!(watched.poll(&source(61, 111), (62, 111), 0), Some((1, true)));
        // A purge by hand.
        assert_eq!(watched.poll(&source(61, 111), (111, 111), 0), None);
    }

    #[test]
    fn expiry_in_step_is_no_drop() {
        let source = |first| stream(json!({"max_age": 1_000_000_000_u64}), first, 5_000);
        let mut watched = Watched::new(DropLimits { age: true, ..DropLimits::default() });
        assert_eq!(watched.poll(&source(1), (1, 5_000), 100), None);
        // The first copy that is left is 800 ms old.
        assert_eq!(watched.poll(&source(900), (1_000, 5_000), 1_800), None);
        assert_eq!(watched.poll(&source(1_000), (2_000, 5_000), 2_100), Some((1_000, true)));
    }

    #[test]
    fn copies_removed_in_the_middle_are_counted_by_number() {
        let mut watched = Watched::new(DropLimits { per_subject: true, ..DropLimits::default() });
        watched.drops.lacks(&stream(json!({}), 1, 0).state, 0);
        let source = stream(json!({}), 1, 100);
        assert_eq!(watched.poll(&source, (1, 100), 0), None);
        assert_eq!(watched.poll(&source, (11, 100), 0), Some((10, true)));
        assert_eq!(watched.poll(&source, (11, 100), 0), None);
        assert_eq!(watched.poll(&source, (16, 100), 0), Some((5, false)));
    }

    #[test]
    fn another_stream_or_none_to_watch_begins_again() {
        let mut watched = Watched::new(DropLimits { messages: Some(5), ..DropLimits::default() });
        let source = stream(json!({}), 1, 9);
        assert_eq!(watched.poll(&source, (5, 9), 0), Some((4, true)));
        let mut other = stream(json!({}), 5, 9);
        watched.drops.begin(&other, Some(DropLimits::default()), 9);
        assert!(!watched.drops.is_new());
        other.created = "d".to_owned();
        watched.drops.begin(&other, Some(DropLimits::default()), 9);
        assert!(watched.drops.is_new());
        watched.drops.begin(&other, None, 9);
        assert!(!watched.drops.watches());
    }
}
