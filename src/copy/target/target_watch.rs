//! Polls the target for copies that it dropped (see [`drops`](super::drops)): one request beside each to the source,
//! and one more where the first message of the target has changed. Where messages are large, a consumer delivers the
//! headers of that message; otherwise it is read with its payload, once.

use nats_lane::{
    Lane, Message,
    jetstream::{
        ConsumerInfo, StreamInfo, StreamState, create_new_consumer_call, decode, decode_message, is_delivery,
        leaders_info, message_from_call, parse_delivery,
    },
};
use serde_json::json;
use tokio::time::{Duration, Instant};

use crate::copy::{
    source::{consumers::Names, locate, reader::Range},
    target::{
        drops::{Dropped, Drops, First},
        provenance::Tag,
    },
};

/// Most messages of other writers that one poll skips, and their bytes: each is read with its payload.
const READS: u32 = 16;
const READ_BYTES: usize = 64 * 1024;
/// Least time between polls of the target: a poll counts only with an answer of the source that is later by this.
const EVERY: Duration = Duration::from_secs(5);
/// A request is repeated after this, unless a large message is arriving: a server that is no longer the leader may never
/// answer.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the consumer may take to deliver a header: it has the message at once, or not at all.
const HEADER_WITHIN: Duration = Duration::from_secs(2);

/// A request to the target.
#[derive(Debug)]
enum TargetRequest {
    /// Its state; with the position then, if nothing was in flight.
    State { request: String, settled: Option<u64> },
    /// Its first message.
    First { request: String, poll: FirstMessagePoll },
    /// The creation of a consumer that delivers the headers of its first message.
    HeaderConsumer { request: String, consumer: String, poll: FirstMessagePoll },
    /// The message of that consumer, on this subscription.
    Header { sid: u64, consumer: String, poll: FirstMessagePoll },
}

/// A poll whose first message is not known yet.
#[derive(Debug)]
struct FirstMessagePoll {
    state: StreamState,
    settled: Option<u64>,
    /// The first message at this sequence or after it is read.
    from: u64,
    /// Messages of the stream are large.
    heavy: bool,
    /// Messages and bytes that may be read still.
    reads: u32,
    bytes: usize,
}

/// Watches one target stream during a run.
#[derive(Debug)]
pub(in crate::copy) struct TargetWatch {
    pub(in crate::copy) drops: Drops,
    tag: Tag,
    /// Names of consumers at the target.
    names: Names,
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
    /// `names` are those of the run at the target.
    pub fn new(drops: Drops, tag: Tag, names: Names) -> Self {
        Self { drops, tag, names, asked: None, polled: None, asked_early: false, passed: 0 }
    }

    /// Asks for the state of the target, if it is watched, due, and no request is in flight. `settled` is the position,
    /// if no message is in flight.
    pub fn ask_state(&mut self, lane: &mut Lane, stream: &str, settled: Option<u64>, now: Instant) {
        // No request is repeated while an answer arrives.
        let waits = self.asked.as_ref().is_some_and(|(_, at)| now.duration_since(lane.partial_at().max(*at)) < ANSWER);
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

    /// Whether a message on this subscription is the answer of the consumer.
    pub fn awaits(&self, sid: u64) -> bool {
        matches!(&self.asked, Some((TargetRequest::Header { sid: awaited, .. }, _)) if *awaited == sid)
    }

    /// Handles an answer. An error has no effect: the request is repeated when it is due.
    pub fn accept(&mut self, lane: &mut Lane, stream: &str, message: &Message<'_>, position: u64, in_flight: bool) {
        let is_answer = match &self.asked {
            Some((
                TargetRequest::State { request, .. }
                | TargetRequest::First { request, .. }
                | TargetRequest::HeaderConsumer { request, .. },
                _,
            )) => request.as_bytes() == message.subject,
            Some((TargetRequest::Header { sid, .. }, _)) => *sid == message.sid,
            None => false,
        };
        let Some((asked, _)) = self.asked.take_if(|_| is_answer) else { return };
        let now = Instant::now();
        let unmoved = |settled: Option<u64>| settled.filter(|settled| *settled == position && !in_flight);
        match asked {
            TargetRequest::State { settled, .. } => {
                let Ok(Some(info)) = leaders_info(message.payload) else { return };
                let (heavy, state) = (locate::is_heavy(&info), info.state);
                let settled = unmoved(settled);
                if state.messages == 0 {
                    self.drops.target_is_empty(now, &state, position, settled);
                } else if self.drops.wants(state.first_seq) {
                    // Messages of other writers were skipped by the poll before.
                    let from = state.first_seq.max(self.passed + 1);
                    let poll = FirstMessagePoll { state, settled, from, heavy, reads: READS, bytes: READ_BYTES };
                    self.read(lane, stream, poll, now);
                } else {
                    self.drops.target_has(now, &state, None, settled);
                }
            }
            TargetRequest::First { poll, .. } => {
                let Ok(Some(first)) = decode_message(message.payload) else { return };
                self.first_is(lane, stream, poll, (first.sequence, &first.header, message.payload.len()), now);
            }
            TargetRequest::HeaderConsumer { consumer, poll, .. } => match decode::<ConsumerInfo>(message.payload) {
                Ok(_) => self.asked = Some((pull_header(lane, stream, consumer, poll), now)),
                // Where the stream takes no more consumers.
                Err(_) => self.read(lane, stream, FirstMessagePoll { heavy: false, ..poll }, now),
            },
            TargetRequest::Header { sid, consumer, poll } => {
                lane.close_inbox(sid);
                lane.send_request(&format!("{}.CONSUMER.DELETE.{stream}.{consumer}", lane.api_prefix()), b"");
                let Some(delivery) = parse_delivery(message.reply).filter(|_| is_delivery(message.reply)) else {
                    return;
                };
                self.first_is(lane, stream, poll, (delivery.stream_seq, message.header, message.header.len()), now);
            }
        }
    }

    /// Handles the requested first message: its sequence, its headers, and the number of bytes that were read for it.
    fn first_is(
        &mut self,
        lane: &mut Lane,
        stream: &str,
        poll: FirstMessagePoll,
        (seq, header, read): (u64, &[u8], usize),
        now: Instant,
    ) {
        if let Some(origin) = self.tag.origin(header) {
            let first = First { seq, source_seq: origin.seq, time_ms: Some(origin.time_ms) };
            return self.drops.target_has(now, &poll.state, Some(first), poll.settled);
        }
        self.passed = seq;
        let (reads, bytes) = (poll.reads - 1, poll.bytes.saturating_sub(read));
        if reads > 0 && bytes > 0 {
            self.read(lane, stream, FirstMessagePoll { from: seq + 1, reads, bytes, ..poll }, now);
        }
    }

    fn read(&mut self, lane: &mut Lane, stream: &str, poll: FirstMessagePoll, now: Instant) {
        let consumer = poll.heavy.then(|| self.names.next());
        let (what, body) = match &consumer {
            Some(name) => {
                let range = Range { stream, filters: &[], from: poll.from, headers_only: true };
                create_new_consumer_call(stream, name, &range.config(name, self.names.labels()))
            }
            None => message_from_call(stream, poll.from),
        };
        let request = lane.send_request(&format!("{}.{what}", lane.api_prefix()), body.to_string().as_bytes());
        let asked = match consumer {
            Some(consumer) => TargetRequest::HeaderConsumer { request, consumer, poll },
            None => TargetRequest::First { request, poll },
        };
        self.asked = Some((asked, now));
    }

    /// Compares with the source's answer to a request of that time.
    pub fn source_has(&mut self, source: &StreamInfo, asked: Instant, now_ms: i64) -> Option<Dropped> {
        self.drops.source_has(source, asked, now_ms)
    }
}

/// Pulls the first message of a consumer.
fn pull_header(lane: &mut Lane, stream: &str, consumer: String, poll: FirstMessagePoll) -> TargetRequest {
    let (sid, inbox) = lane.open_inbox();
    let pull = json!({ "batch": 1, "expires": HEADER_WITHIN.as_nanos() as u64 });
    let subject = format!("{}.CONSUMER.MSG.NEXT.{stream}.{consumer}", lane.api_prefix());
    lane.publish(&subject, &format!("{inbox}.1"), pull.to_string().as_bytes());
    TargetRequest::Header { sid, consumer, poll }
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
            let watch = TargetWatch::new(drops, Tag::new("S", "SITE", "w"), Names::new("sr"));
            Self { watch, lane, server, now: Instant::now() }
        }

        fn ask_at(&mut self, seconds: u64) {
            self.watch.ask_state(&mut self.lane, "T", None, self.now + Duration::from_secs(seconds));
        }

        /// What is asked after the answer that the target's messages are large.
        async fn asked_about_a_heavy_target(&mut self) -> Vec<StateRequest> {
            self.ask_at(0);
            let asked = self.asked().await;
            let mut heavy = state(7);
            heavy["state"]["bytes"] = json!(100_000_000);
            self.answer(&asked[0], &heavy).await;
            self.asked().await
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
            self.accept().await;
        }

        /// Handles the next batch of the server.
        async fn accept(&mut self) {
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

    #[tokio::test]
    async fn a_heavy_target_shows_headers_and_no_payload() {
        let mut watched = Watched::new().await;
        let mut asked = watched.asked_about_a_heavy_target().await;
        assert!(asked[0].subject.contains("CONSUMER.CREATE.T.sr_0"), "{}", asked[0].subject);
        watched.answer(&asked[0], &json!({})).await;
        asked = watched.asked().await;
        assert!(asked[0].subject.contains("CONSUMER.MSG.NEXT.T.sr_0"), "{}", asked[0].subject);
        let header = "NATS/1.0\r\nChoria-SR-Source: S 5 SITE w 1000\r\n\r\n";
        watched.server.deliver(&asked[0], "$JS.ACK.T.sr_0.1.7.1.1767225605000000000.0", header, 0).await;
        watched.accept().await;
        // The first message is known, and the consumer is deleted.
        assert!(!watched.watch.drops.wants(7) && watched.watch.drops.wants(8));
        asked = watched.asked().await;
        assert!(asked.len() == 1 && asked[0].subject.contains("CONSUMER.DELETE.T.sr_0"), "{asked:?}");
    }

    #[tokio::test]
    async fn a_target_without_room_for_a_consumer_is_read_once() {
        let mut watched = Watched::new().await;
        let asked = watched.asked_about_a_heavy_target().await;
        let refused =
            json!({"error": {"code": 400, "err_code": 10026, "description": "maximum consumers limit reached"}});
        watched.answer(&asked[0], &refused).await;
        let asked = watched.asked().await;
        assert!(asked.len() == 1 && asked[0].subject.contains("STREAM.MSG.GET.T"), "{asked:?}");
    }
}
