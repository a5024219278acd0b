//! The content of the writer's messages, and its reaction to answers: the answers are those of real servers.

use nats_lane::{
    jetstream::Delivery,
    pipe::{self, Pipe},
};
use serde_json::json;

use super::*;
use crate::copy::{
    resume::Already,
    target::{headers, target_half::target_limit},
};

/// A writer after target sequence 10, and its lane.
struct Bench {
    writer: Writer,
    window: Window,
    lane: Lane,
    _pipe: Pipe,
    now: Instant,
    next: u64,
}

impl Bench {
    async fn new(transport: Transport, mode: TargetMode, before: Option<Stamps>) -> Self {
        let document = json!({"stream": "S", "target_stream": "T", "source_url": "nats://a", "target_url": "nats://b"});
        let replication = Arc::new(crate::config::parse(document.to_string().as_bytes(), "SITE").unwrap());
        let target = serde_json::from_value(json!({"config": {}, "state": {"last_seq": 10}})).unwrap();
        let record = json!({"version": 1, "epoch": 3, "holder": "a", "nonce": 4, "source": null, "target": null,
            "target_mode": "exclusive", "status": null});
        let record: PositionRecord = serde_json::from_value(record).unwrap();
        let (mut lane, pipe) = pipe::lane().await;
        let abilities = Abilities { transport, mode, allowed: headers::Allowed::default() };
        let tag = Tag::new("S", "SITE", "w");
        let mut writer = Writer::open(&mut lane, replication, tag, abilities, &target, &record);
        before.into_iter().for_each(|before| writer.after(before));
        let window = Window::new(SourcePoint::default(), None);
        Self { writer, window, lane, _pipe: pipe, now: Instant::now(), next: 1 }
    }

    /// Sends the next message; returns the output.
    fn send(&mut self) -> String {
        let (seq, message) = (self.next, Message { sid: 2, subject: b"s.a", reply: b"", header: b"", payload: b"x" });
        let delivery = Delivery { stream_seq: seq, consumer_seq: seq, time_ns: seq as i64 * 1_000_000, pending: 0 };
        let incoming = Incoming { delivery, after: seq - 1, message };
        self.next += 1;
        self.lane.output().clear();
        let outgoing = self.writer.prepare(&incoming, 0).unwrap();
        self.writer.send(outgoing, &mut self.lane, &mut self.window, &incoming, self.now, 0);
        String::from_utf8_lossy(self.lane.output()).into_owned()
    }

    /// The target answers a message: one of the open batch, or one that was sent by itself.
    fn says(&mut self, number: u64, payload: &str) -> Result<(), RunError> {
        let inbox = &self.writer.inbox;
        let subject = match &self.writer.sink {
            Sink::Batches(batches) => format!("{inbox}.{}.500.fail.{number}.1.$FI", batches.open_id().unwrap()),
            Sink::Pipelined(_) => format!("{inbox}.{number}"),
        };
        let (sid, payload) = (self.writer.sid, payload.as_bytes());
        let message = Message { sid, subject: subject.as_bytes(), reply: b"", header: b"", payload };
        self.writer.accept(&message, &mut self.window, self.now)
    }

    /// The open batch ends with this ack.
    fn ends(&mut self, seq: u64, count: u64) -> Result<(), RunError> {
        self.says(count, &format!(r#"{{"stream":"T","seq":{seq},"batch":"b","count":{count}}}"#))
    }
}

const START: &str = r#"{"type":"ack","seq":0,"msgs":500}"#;
const CHAINED: &str = "Nats-Expected-Last-Sequence: ";
const WITH_ID: &str = "Nats-Msg-Id: ";
const NAMED: &str = "Nats-Expected-Stream: T\r\n";

/// Chained messages of an earlier run that are still in flight are refused once one message is stored here.
#[tokio::test]
async fn what_follows_a_chain_begins_with_it() {
    for (before, fenced) in [(Some(Stamps::Chain), true), (Some(Stamps::Ids), false), (None, false)] {
        let mut bench = Bench::new(Transport::FastIngest, TargetMode::Shared, before).await;
        let first = bench.send();
        assert_eq!(first.contains(&format!("{CHAINED}10\r\n")), fenced, "{first}");
        assert!(first.contains(WITH_ID), "{first}");
        let second = bench.send();
        assert!(!second.contains(CHAINED) && second.contains(WITH_ID), "{second}");
    }
}

/// Messages of an earlier run with ids that are still in flight are duplicates by their ids.
#[tokio::test]
async fn what_follows_ids_bears_them_too_for_a_window() {
    let mut bench = Bench::new(Transport::FastIngest, TargetMode::Exclusive, Some(Stamps::Ids)).await;
    for i in 0..Limits::default().messages_in_flight as u64 {
        let text = bench.send();
        assert!(text.contains(&format!("{CHAINED}{}\r\n", 10 + i)) && text.contains(WITH_ID), "{text}");
    }
    let text = bench.send();
    assert!(text.contains(CHAINED) && !text.contains(WITH_ID), "{text}");
    let mut bench = Bench::new(Transport::FastIngest, TargetMode::Exclusive, Some(Stamps::Chain)).await;
    let text = bench.send();
    assert!(text.contains(CHAINED) && !text.contains(WITH_ID), "{text}");
}

/// Over a leafnode a second stream may listen on the subject too: a second answer to the start shows that.
#[tokio::test]
async fn a_batch_that_two_streams_answer_settles_at_its_end_alone() {
    for (answers, settles) in [(1, 2), (2, 0)] {
        let mut bench = Bench::new(Transport::FastIngest, TargetMode::Exclusive, None).await;
        bench.send();
        bench.says(1, START).unwrap();
        bench.ends(11, 1).unwrap();
        assert_eq!(bench.window.in_flight(), 0);
        bench.send();
        bench.send();
        for _ in 0..answers {
            bench.says(1, START).unwrap();
        }
        bench.says(2, r#"{"type":"ack","seq":2,"msgs":500}"#).unwrap();
        assert_eq!(bench.window.in_flight(), 2 - settles);
        assert_eq!(bench.writer.ready(), answers == 1);
        bench.ends(13, 2).unwrap();
        assert_eq!(bench.window.in_flight(), 0);
    }
}

#[tokio::test]
async fn a_chain_that_ends_elsewhere_settles_nothing() {
    for wrong in [10, 11, 13] {
        let mut bench = Bench::new(Transport::FastIngest, TargetMode::Exclusive, None).await;
        bench.send();
        bench.send();
        bench.says(1, START).unwrap();
        let error = bench.ends(wrong, 2).unwrap_err();
        assert!(error.message.contains(&format!("ended at target sequence {wrong}, not at 12")), "{}", error.message);
        assert_eq!(bench.window.in_flight(), 2);
    }
}

/// Servers of 2.10 answer so while the message with this id is on its way through the cluster: it may still be lost.
#[tokio::test]
async fn a_duplicate_without_a_place_settles_nothing() {
    let mut bench = Bench::new(Transport::Pipelined, TargetMode::Shared, None).await;
    bench.send();
    bench.says(1, r#"{"stream":"T","seq":0,"duplicate":true}"#).unwrap();
    assert_eq!(bench.window.in_flight(), 1);
    let error = bench.writer.outcome(&bench.window, bench.now, bench.now).unwrap_err();
    assert!(error.message.contains("not stored yet"), "{}", error.message);
    let mut bench = Bench::new(Transport::Pipelined, TargetMode::Shared, None).await;
    bench.send();
    bench.says(1, r#"{"stream":"T","seq":9,"duplicate":true}"#).unwrap();
    assert_eq!(bench.window.in_flight(), 0);
}

/// Another stream that listens on the subject refuses the message, and with it the batch.
#[tokio::test]
async fn the_first_message_names_its_stream() {
    let mut bench = Bench::new(Transport::FastIngest, TargetMode::Exclusive, None).await;
    for end in [12, 14] {
        let (first, second) = (bench.send(), bench.send());
        assert!(first.contains(NAMED) && !second.contains(NAMED), "{first}{second}");
        bench.says(1, START).unwrap();
        bench.ends(end, 2).unwrap();
    }
    let mut bench = Bench::new(Transport::Pipelined, TargetMode::Exclusive, None).await;
    let (first, second) = (bench.send(), bench.send());
    assert!(first.contains(NAMED) && !second.contains(NAMED), "{first}{second}");
}

/// A search at the next start begins at the known target sequence: every message that may be ours has to be after it.
#[tokio::test]
async fn the_known_place_passes_neither_holes_nor_what_waits() {
    let mut bench = Bench::new(Transport::Pipelined, TargetMode::Exclusive, None).await;
    let limit = |bench: &Bench| target_limit(&Already::default(), &bench.writer);
    for _ in 0..3 {
        bench.send();
    }
    assert_eq!(limit(&bench), u64::MAX);
    // What lies at 11 and 12 is not known.
    bench.says(2, r#"{"stream":"T","seq":13}"#).unwrap();
    assert_eq!(limit(&bench), 10);
    bench.says(1, r#"{"stream":"T","seq":11}"#).unwrap();
    assert_eq!(limit(&bench), 10);
    bench.says(3, r#"{"stream":"T","seq":12}"#).unwrap();
    assert_eq!(limit(&bench), u64::MAX);
    assert_eq!(target_limit(&Already::one(9, 9, 8), &bench.writer), 0);
}
