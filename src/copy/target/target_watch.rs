//! Polls the target for copies that it dropped (see [`drops`](super::drops)): one request beside each to the source,
//! and one more where the first message of the target has changed.

use nats_lane::{
    Lane, Message,
    jetstream::{StreamInfo, StreamState, decode_message, leaders_info, message_from_call},
};
use tokio::time::{Duration, Instant};

use crate::copy::target::{
    drops::{Dropped, Drops, First},
    provenance::Tag,
};

/// Most messages of other writers that one poll skips, and their bytes: each is read with its payload.
const READS: u32 = 16;
const READ_BYTES: usize = 64 * 1024;
/// Least time between polls of the target: a poll counts only with an answer of the source that is later by this.
const EVERY: Duration = Duration::from_secs(5);
/// A question is repeated after this: a server that is no longer the leader may never answer.
const ANSWER: Duration = Duration::from_secs(30);

/// A request to the target.
#[derive(Debug)]
enum TargetRequest {
    /// Its state; with the position then, if nothing was in flight.
    State { request: String, settled: Option<u64> },
    /// Its first message.
    First { request: String, poll: FirstMessagePoll },
}

/// A poll whose first message is not known yet.
#[derive(Debug)]
struct FirstMessagePoll {
    state: StreamState,
    settled: Option<u64>,
    /// Messages and bytes that may be read still.
    reads: u32,
    bytes: usize,
}

/// Watches one target stream during a run.
#[derive(Debug)]
pub(in crate::copy) struct TargetWatch {
    pub(in crate::copy) drops: Drops,
    tag: Tag,
    /// The unanswered request, and when it was sent.
    asked: Option<(TargetRequest, Instant)>,
    /// When the last poll began.
    polled: Option<Instant>,
    /// The last poll began before it was due.
    asked_early: bool,
    /// Up to here the first messages are those of other writers.
    passed: u64,
}

impl TargetWatch {
    pub fn new(drops: Drops, tag: Tag) -> Self {
        Self { drops, tag, asked: None, polled: None, asked_early: false, passed: 0 }
    }

    /// Asks for the state of the target, if it is watched, due, and no request is in flight. `settled` is the position,
    /// if no message is in flight.
    pub fn ask_state(&mut self, lane: &mut Lane, stream: &str, settled: Option<u64>, now: Instant) {
        let waits = self.asked.as_ref().is_some_and(|(_, at)| now.duration_since(*at) < ANSWER);
        let recent = self.polled.is_some_and(|at| now.duration_since(at) < EVERY);
        if self.drops.watches() && !waits && !recent {
            let subject = format!("{}.STREAM.INFO.{stream}", lane.api_prefix());
            let asked = TargetRequest::State { request: lane.send_request(&subject, b""), settled };
            (self.asked, self.polled) = (Some((asked, now)), Some(now));
        }
    }

    /// The same once before it is due, while the target's first message is unknown.
    pub fn ask_first(&mut self, lane: &mut Lane, stream: &str, now: Instant) {
        if self.drops.is_new() && self.asked.is_none() && !std::mem::replace(&mut self.asked_early, true) {
            self.ask_state(lane, stream, None, now);
        }
    }

    /// Handles an answer. An error has no effect: the request is repeated when it is due.
    pub fn accept(&mut self, lane: &mut Lane, stream: &str, message: &Message<'_>, position: u64, in_flight: bool) {
        let Some((TargetRequest::State { request, .. } | TargetRequest::First { request, .. }, _)) = &self.asked else {
            return;
        };
        if request.as_bytes() != message.subject {
            return;
        }
        let now = Instant::now();
        let unmoved = |settled: Option<u64>| settled.filter(|settled| *settled == position && !in_flight);
        match self.asked.take().map(|(asked, _)| asked) {
            Some(TargetRequest::State { settled, .. }) => {
                let Ok(Some(StreamInfo { state, .. })) = leaders_info(message.payload) else { return };
                let settled = unmoved(settled);
                if state.messages == 0 {
                    self.drops.target_is_empty(now, &state, position, settled);
                } else if self.drops.wants(state.first_seq) {
                    // Messages of other writers were skipped by the poll before.
                    let from = state.first_seq.max(self.passed + 1);
                    self.read(
                        lane,
                        stream,
                        from,
                        FirstMessagePoll { state, settled, reads: READS, bytes: READ_BYTES },
                        now,
                    );
                } else {
                    self.drops.target_has(now, &state, None, settled);
                }
            }
            Some(TargetRequest::First { poll: FirstMessagePoll { state, settled, reads, bytes }, .. }) => {
                let Ok(Some(first)) = decode_message(message.payload) else { return };
                match self.tag.origin(&first.header) {
                    Some(origin) => {
                        let (source_seq, time_ms) = (origin.seq, Some(origin.time_ms));
                        let first = First { seq: first.sequence, source_seq, time_ms };
                        self.drops.target_has(now, &state, Some(first), settled);
                    }
                    None => {
                        self.passed = first.sequence;
                        let bytes = bytes.saturating_sub(message.payload.len());
                        if reads > 1 && bytes > 0 {
                            let poll = FirstMessagePoll { state, settled, reads: reads - 1, bytes };
                            self.read(lane, stream, first.sequence + 1, poll, now);
                        }
                    }
                }
            }
            None => {}
        }
    }

    fn read(&mut self, lane: &mut Lane, stream: &str, from: u64, poll: FirstMessagePoll, now: Instant) {
        let (what, body) = message_from_call(stream, from);
        let subject = format!("{}.{what}", lane.api_prefix());
        let request = lane.send_request(&subject, body.to_string().as_bytes());
        self.asked = Some((TargetRequest::First { request, poll }, now));
    }

    /// Compares with the source's answer to a request of that time.
    pub fn source_has(&mut self, source: &StreamInfo, asked: Instant, now_ms: i64) -> Option<Dropped> {
        self.drops.source_has(source, asked, now_ms)
    }
}

#[cfg(test)]
mod tests {
    use nats_lane::{
        Turn,
        pipe::{self, Pipe, PipeRequest as StateRequest},
    };
    use serde_json::json;

    use super::{super::drops::DropLimits, *};
    /// A watch over a target that drops by number, with what it asks.
    struct Watched {
        watch: TargetWatch,
        lane: Lane,
        server: Pipe,
        now: Instant,
    }

    impl Watched {
        async fn new() -> Self {
            let target =
                serde_json::from_value(json!({"config": {}, "created": "c", "state": {"messages": 1}})).unwrap();
            let mut drops = Drops::default();
            drops.begin(&target, Some(DropLimits { messages: Some(50), ..DropLimits::default() }), 0);
            let (lane, server) = pipe::lane().await;
            let watch = TargetWatch::new(drops, Tag::new("S", "SITE", "w"));
            Self { watch, lane, server, now: Instant::now() }
        }

        fn ask_at(&mut self, seconds: u64) {
            self.watch.ask_state(&mut self.lane, "T", None, self.now + Duration::from_secs(seconds));
        }

        /// The questions that arrive until the lane is empty.
        async fn asked(&mut self) -> Vec<StateRequest> {
            self.lane.publish("end", "end", b"");
            let mut asked = Vec::new();
            loop {
                let question = tokio::select! {
                    question = self.server.asked() => question,
                    turn = self.lane.turn() => {
                        turn.unwrap();
                        continue;
                    }
                };
                if question.subject == "end" {
                    return asked;
                }
                asked.push(question);
            }
        }

        async fn answer(&mut self, to: &StateRequest, payload: &serde_json::Value) {
            self.server.answer(to, &payload.to_string()).await;
            loop {
                let Turn::Received(batch) = self.lane.turn().await.unwrap() else { continue };
                for message in batch.iter() {
                    self.watch.accept(&mut self.lane, "T", &message, 0, false);
                }
                return;
            }
        }
    }

    fn state(first: u64) -> serde_json::Value {
        json!({"config": {}, "created": "c", "state": {"messages": 100, "first_seq": first, "last_seq": first + 99}})
    }

    #[tokio::test]
    async fn a_question_in_flight_is_not_overwritten() {
        let mut watched = Watched::new().await;
        watched.ask_at(0);
        let first = watched.asked().await;
        assert_eq!(first.len(), 1);
        // A slow line, and a source that is polled each second.
        (1..30).for_each(|second| watched.ask_at(second));
        assert_eq!(watched.asked().await.len(), 0);
        watched.answer(&first[0], &state(1)).await;
        let read = watched.asked().await;
        assert_eq!(read.len(), 1);
        assert!(read[0].subject.contains("STREAM.MSG.GET.T"), "{}", read[0].subject);
        // One that is never answered is repeated.
        watched.ask_at(61);
        assert!(watched.asked().await[0].subject.contains("STREAM.INFO.T"));
    }

    #[tokio::test]
    async fn a_poll_reads_few_bytes_of_other_writers() {
        for (size, reads) in [(100, READS as usize), (100 * 1024, 1)] {
            let mut watched = Watched::new().await;
            watched.ask_at(0);
            let mut asked = watched.asked().await;
            watched.answer(&asked[0], &state(1)).await;
            let mut read = 0;
            loop {
                asked = watched.asked().await;
                let Some(question) = asked.first() else { break };
                read += 1;
                let theirs = json!({"message": {"subject": "s", "seq": read, "time": "2026-01-01T00:00:05Z",
                    "data": "A".repeat(size)}});
                watched.answer(question, &theirs).await;
            }
            assert_eq!(read, reads);
            assert_eq!(watched.watch.passed, read as u64);
        }
    }
}
