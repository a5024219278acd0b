//! Messages that the target can never store, and their handling by `on_reject`. A message that is found before it is
//! sent is handled inside the run; a refusal by the server ends the run, and the next one knows of it.

use std::collections::BTreeMap;

use nats_lane::{
    Batch, Error, ErrorKind, Lane,
    jetstream::{StreamInfo, decode},
};
use serde_json::Value;
use tokio::time::{Duration, Instant};

use super::{
    Error as RunError,
    error::RefusedMessage,
    flow::window::{SourcePoint, Window},
    source::reader::Incoming,
    target::{dead_letter::DeadLetters, provenance::Tag, refusal::about_incoming},
};
use crate::{
    config::{Limits, OnReject, Replication},
    events::{Event, PoisonAction},
    status::CopyStatus,
};

/// How long the last answer of the target about its limits is trusted before a message is skipped because of it.
const FRESH: Duration = Duration::from_secs(1);
/// Messages reported one by one between two ticks of the run; one event reports all further ones together.
const REPORTED_SINGLY: u64 = 4;

/// Messages that the target refused in earlier runs, valid as long as its stream is unchanged.
#[derive(Debug, Default)]
pub(super) struct Refused {
    messages: BTreeMap<u64, (i64, String)>,
    /// Configuration of the stream, and when it was created.
    stream: Option<(Value, String)>,
}

impl Refused {
    /// A run begins after a position. Messages that another stream, or the same with other settings, refused are tried
    /// again.
    pub fn begin(&mut self, target: &StreamInfo, position: u64) {
        let stream = Some((target.config.clone(), target.created.clone()));
        if self.stream != stream {
            self.messages.clear();
            self.stream = stream;
        }
        self.messages = self.messages.split_off(&(position + 1));
    }

    /// Adds the refusals that ended a run; returns whether any of them is new.
    pub fn add(&mut self, refusals: Vec<RefusedMessage>) -> bool {
        let before = self.messages.len();
        self.messages.extend(refusals.into_iter().map(|(message, why)| (message.seq, (message.time_ns, why))));
        self.messages.len() > before
    }

    /// Why a message was refused.
    fn find(&self, seq: u64, time_ns: i64) -> Option<Error> {
        let (_, why) = self.messages.get(&seq).filter(|(time, _)| *time == time_ns)?;
        Some(Error { kind: ErrorKind::Poison, message: why.clone(), api: None })
    }
}

/// Handles messages that can never be stored, in one run.
#[derive(Debug)]
pub(super) struct Rejects<'a> {
    refused: &'a Refused,
    fate: OnRejected,
    queue: ReportQueue,
    target: String,
    /// When the target last answered a question about itself because of a message.
    answered: Option<Instant>,
    /// Reply subject of a question to the target.
    asked: Option<String>,
}

#[derive(Debug)]
enum OnRejected {
    Hold,
    Skip,
    DeadLetter(Box<DeadLetters>),
}

impl<'a> Rejects<'a> {
    /// Prepares for the `on_reject` of the replication; dead letters are sent over the source lane.
    pub fn open(lane: &mut Lane, replication: &Replication, tag: &Tag, generation: u64, refused: &'a Refused) -> Self {
        let (id, stream) = (&replication.id, &replication.source.stream);
        let fate = match &replication.on_reject {
            OnReject::Hold => OnRejected::Hold,
            OnReject::Skip => OnRejected::Skip,
            OnReject::DeadLetter { subject } => {
                OnRejected::DeadLetter(Box::new(DeadLetters::open(lane, subject, id, stream, tag.clone(), generation)))
            }
        };
        let target = replication.target.stream.clone();
        Self { refused, fate, queue: ReportQueue::default(), target, answered: None, asked: None }
    }

    /// Why the target refused a message in an earlier run.
    pub fn known(&self, incoming: &Incoming<'_>) -> Option<Error> {
        self.refused.find(incoming.delivery.stream_seq, incoming.delivery.time_ns)
    }

    /// Whether dead letters are in flight. Messages after them wait until they are stored: messages at the
    /// target prove that all before them are settled.
    pub fn any_in_flight(&self) -> bool {
        self.letters().is_some_and(|letters| letters.len() > 0)
    }

    /// Messages and bytes in flight, and the oldest of them.
    pub fn in_flight(&self) -> (usize, usize, Option<SourcePoint>) {
        self.letters().map_or((0, 0, None), |letters| (letters.len(), letters.bytes(), letters.oldest()))
    }

    /// Whether the bounds keep back another dead letter of so many bytes.
    pub fn full(&self, limits: &Limits, bytes: usize) -> bool {
        let (letters, any_in_flight, _) = self.in_flight();
        letters >= limits.messages_in_flight || letters > 0 && any_in_flight + bytes > limits.bytes_in_flight
    }

    fn letters(&self) -> Option<&DeadLetters> {
        match &self.fate {
            OnRejected::DeadLetter(letters) => Some(letters),
            OnRejected::Hold | OnRejected::Skip => None,
        }
    }

    /// Whether a limit of the target stream may have changed: then the target is asked, and the message waits.
    pub fn ask_limits(&mut self, lane: &mut Lane, now: Instant) -> bool {
        let fresh = self.answered.is_some_and(|answered| now.duration_since(answered) <= FRESH);
        if fresh && self.asked.is_none() {
            return false;
        }
        if self.asked.is_none() {
            let subject = format!("{}.STREAM.INFO.{}", lane.api_prefix(), self.target);
            self.asked = Some(lane.send_request(&subject, b""));
        }
        true
    }

    /// The target stream as it is now, if the batch that the target's lane received contains the answer.
    pub fn answer(&mut self, batch: &Batch, now: Instant) -> Result<Option<StreamInfo>, Error> {
        let Some(asked) = &self.asked else { return Ok(None) };
        let answer = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == asked.as_bytes());
        let Some(message) = answer else { return Ok(None) };
        self.asked = None;
        self.answered = Some(now);
        decode(message.payload).map(Some)
    }

    /// Handles a message that can never be stored; an error ends the run.
    pub fn reject(
        &mut self,
        lane: &mut Lane,
        window: &mut Window,
        copy: &mut CopyStatus,
        incoming: &Incoming<'_>,
        error: Error,
        now: Instant,
    ) -> Result<(), RunError> {
        let seq = incoming.delivery.stream_seq;
        let source = SourcePoint { seq, time_ns: Some(incoming.delivery.time_ns) };
        match &mut self.fate {
            OnRejected::Hold => return Err(about_incoming(error, incoming)),
            OnRejected::Skip => {
                copy.counters.skipped_refused += 1;
                copy.counters.skipped_bytes += incoming.bytes() as u64;
                copy.metered.skipped_payload += incoming.message.payload.len() as u64;
                window.skip(source);
                self.queue.note(seq, error.message, PoisonAction::Skipped);
            }
            OnRejected::DeadLetter(letters) => letters.send(lane, incoming, &error, now)?,
        }
        Ok(())
    }

    /// Takes acks of dead letters; the messages that they settle are settled in the window. Returns how many, and why
    /// the run has to end if one was refused: then the rest are not handled any more.
    pub fn accept(&mut self, batch: &Batch, window: &mut Window) -> (u64, Option<RunError>) {
        let OnRejected::DeadLetter(letters) = &mut self.fate else { return (0, None) };
        if letters.len() == 0 {
            return (0, None);
        }
        let refused = batch.iter().find_map(|message| letters.accept(&message).err());
        let mut settled = 0;
        while let Some(letter) = letters.pop() {
            window.skip(letter.source);
            self.queue.note(letter.source.seq, letter.reason, PoisonAction::DeadLettered);
            settled += 1;
        }
        if refused.is_some() {
            letters.give_up();
        }
        (settled, refused)
    }

    /// An error if a dead letter in flight is overdue.
    pub fn check(&mut self, lane: &mut Lane, now: Instant) -> Result<(), RunError> {
        match &mut self.fate {
            OnRejected::DeadLetter(letters) => letters.check(lane, now),
            OnRejected::Hold | OnRejected::Skip => Ok(()),
        }
    }

    /// The events that are due; all of them at a tick or at the end of the run.
    pub fn take_events(&mut self, all: bool) -> Vec<Event> {
        self.queue.take(all)
    }
}

/// Keeps thousands of messages in a row from becoming as many events.
#[derive(Debug, Default)]
struct ReportQueue {
    ready: Vec<Event>,
    told: u64,
    /// Messages that are reported together.
    rest: Option<Event>,
}

impl ReportQueue {
    fn note(&mut self, seq: u64, why: String, what: PoisonAction) {
        self.told += 1;
        if self.told <= REPORTED_SINGLY {
            self.ready.push(Event::poison(seq, why, what));
            return;
        }
        match &mut self.rest {
            Some(Event::Poison { to, messages, .. }) => {
                *to = Some(seq);
                *messages = Some(messages.unwrap_or(1) + 1);
            }
            _ => self.rest = Some(Event::poison(seq, why, what)),
        }
    }

    fn take(&mut self, all: bool) -> Vec<Event> {
        if all {
            self.ready.extend(self.rest.take());
            self.told = 0;
        }
        std::mem::take(&mut self.ready)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::SourceMessage;

    fn stream(config: Value, created: &str) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "created": created, "state": {}})).unwrap()
    }

    fn refusal(seq: u64) -> RefusedMessage {
        (SourceMessage { seq, time_ns: 7 }, format!("{seq} is refused"))
    }

    #[test]
    fn what_was_refused_is_known_while_the_stream_stays_as_it_was() {
        let mut refused = Refused::default();
        let one = stream(json!({"max_msg_size": 1}), "a");
        refused.begin(&one, 0);
        assert!(refused.add(vec![refusal(5), refusal(9)]));
        assert!(!refused.add(vec![refusal(5)]));
        refused.begin(&one, 4);
        assert_eq!(
            refused.find(5, 7).map(|error| (error.kind, error.message)),
            Some((ErrorKind::Poison, "5 is refused".into()))
        );
        assert_eq!(refused.find(5, 8), None);
        assert_eq!(refused.find(6, 7), None);
        refused.begin(&one, 5);
        assert!(refused.find(5, 7).is_none() && refused.find(9, 7).is_some());
        refused.begin(&stream(json!({"max_msg_size": 2}), "a"), 5);
        assert_eq!(refused.find(9, 7), None);
        assert!(refused.add(vec![refusal(9)]));
        refused.begin(&stream(json!({"max_msg_size": 2}), "b"), 5);
        assert_eq!(refused.find(9, 7), None);
    }

    #[test]
    fn a_few_are_told_singly_and_many_together() {
        let mut queue = ReportQueue::default();
        let of = |events: Vec<Event>| -> Vec<_> {
            let seqs = events.iter().map(|event| match event {
                Event::Poison { source_seq, to, messages, .. } => (*source_seq, *to, *messages),
                other => panic!("{other:?}"),
            });
            seqs.collect()
        };
        (1..=2).for_each(|seq| queue.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(queue.take(false)), [(1, None, None), (2, None, None)]);
        (3..=5).for_each(|seq| queue.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(queue.take(false)), [(3, None, None), (4, None, None)]);
        (6..=1000).for_each(|seq| queue.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(queue.take(false)), []);
        assert_eq!(of(queue.take(true)), [(5, Some(1000), Some(996))]);
        assert_eq!(of(queue.take(true)), []);
        queue.note(1001, "x".into(), PoisonAction::Skipped);
        assert_eq!(of(queue.take(false)), [(1001, None, None)]);
    }
}
