//! Messages that the target can never store, and what becomes of them by `on_reject`. What is found before it is sent is
//! dealt with inside the run; what the server refuses ends the run, and the next one knows.

use std::collections::BTreeMap;

use nats_lane::{
    Batch, Error, ErrorKind, Lane,
    jetstream::{StreamInfo, decode},
};
use serde_json::Value;
use tokio::time::{Duration, Instant};

use super::{
    Error as RunError,
    error::Refusal,
    flow::window::{SourcePoint, Window},
    source::reader::Incoming,
    target::{dead_letter::DeadLetters, provenance::Tag, refusal::about},
};
use crate::{
    config::{Limits, OnReject, Replication},
    events::{Event, PoisonAction},
    status::Counters,
};

/// What the target last said of itself is believed for so long where a message would be left out because of it.
const FRESH: Duration = Duration::from_secs(1);
/// Messages that are told one by one between two looks of the run at its clock; of more, one event tells together.
const TOLD_SINGLY: u64 = 4;

/// What the target refused in the runs before, as long as its stream is as it was then.
#[derive(Debug, Default)]
pub(super) struct Refused {
    messages: BTreeMap<u64, (i64, String)>,
    /// Configuration of the stream, and when it was made.
    stream: Option<(Value, String)>,
}

impl Refused {
    /// A run begins behind a position. What another stream, or the same with other settings, refused is tried again.
    pub fn begin(&mut self, target: &StreamInfo, position: u64) {
        let stream = Some((target.config.clone(), target.created.clone()));
        if self.stream != stream {
            self.messages.clear();
            self.stream = stream;
        }
        self.messages = self.messages.split_off(&(position + 1));
    }

    /// A run ended because of these; whether they are news.
    pub fn add(&mut self, refusals: Vec<Refusal>) -> bool {
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

/// What becomes of messages that can never be stored, in one run.
#[derive(Debug)]
pub(super) struct Rejects<'a> {
    refused: &'a Refused,
    fate: Fate,
    telling: Telling,
    target: String,
    /// When the target was asked about itself last because of a message.
    answered: Option<Instant>,
    /// Reply subject of a question to the target.
    asked: Option<String>,
}

#[derive(Debug)]
enum Fate {
    Hold,
    Skip,
    DeadLetter(Box<DeadLetters>),
}

impl<'a> Rejects<'a> {
    /// Prepares for what the replication wants; dead letters go over the source lane.
    pub fn open(lane: &mut Lane, replication: &Replication, tag: &Tag, generation: u64, refused: &'a Refused) -> Self {
        let (id, stream) = (&replication.id, &replication.source.stream);
        let fate = match &replication.on_reject {
            OnReject::Hold => Fate::Hold,
            OnReject::Skip => Fate::Skip,
            OnReject::DeadLetter { subject } => {
                Fate::DeadLetter(Box::new(DeadLetters::open(lane, subject, id, stream, tag.clone(), generation)))
            }
        };
        let target = replication.target.stream.clone();
        Self { refused, fate, telling: Telling::default(), target, answered: None, asked: None }
    }

    /// Why the target refused a message in a run before.
    pub fn known(&self, incoming: &Incoming<'_>) -> Option<Error> {
        self.refused.find(incoming.delivery.stream_seq, incoming.delivery.time_ns)
    }

    /// Whether dead letters are in the air. What is behind them is not touched before they are stored: messages at the
    /// target prove that all before them are settled.
    pub fn in_the_air(&self) -> bool {
        self.letters().is_some_and(|letters| letters.len() > 0)
    }

    /// Messages and bytes in the air, and the oldest of them.
    pub fn in_flight(&self) -> (usize, usize, Option<SourcePoint>) {
        self.letters().map_or((0, 0, None), |letters| (letters.len(), letters.bytes(), letters.oldest()))
    }

    /// Whether the bounds keep back another dead letter of so many bytes.
    pub fn full(&self, limits: &Limits, bytes: usize) -> bool {
        let (letters, in_the_air, _) = self.in_flight();
        letters >= limits.messages_in_flight || letters > 0 && in_the_air + bytes > limits.bytes_in_flight
    }

    fn letters(&self) -> Option<&DeadLetters> {
        match &self.fate {
            Fate::DeadLetter(letters) => Some(letters),
            Fate::Hold | Fate::Skip => None,
        }
    }

    /// Whether a limit of the target stream may be another one by now: it is asked then, and the message waits.
    pub fn ask(&mut self, lane: &mut Lane, now: Instant) -> bool {
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

    /// What the target stream is now, if that is in what the target's lane received.
    pub fn answer(&mut self, batch: &Batch, now: Instant) -> Result<Option<StreamInfo>, Error> {
        let Some(asked) = &self.asked else { return Ok(None) };
        let answer = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == asked.as_bytes());
        let Some(message) = answer else { return Ok(None) };
        self.asked = None;
        self.answered = Some(now);
        decode(message.payload).map(Some)
    }

    /// Deals with a message that can never be stored; an error ends the run.
    pub fn reject(
        &mut self,
        lane: &mut Lane,
        window: &mut Window,
        counters: &mut Counters,
        incoming: &Incoming<'_>,
        error: Error,
        now: Instant,
    ) -> Result<(), RunError> {
        let seq = incoming.delivery.stream_seq;
        let source = SourcePoint { seq, time_ns: Some(incoming.delivery.time_ns) };
        match &mut self.fate {
            Fate::Hold => return Err(about(error, Some(source))),
            Fate::Skip => {
                counters.skipped_refused += 1;
                counters.skipped_bytes += incoming.bytes() as u64;
                window.skip(source);
                self.telling.note(seq, error.message, PoisonAction::Skipped);
            }
            Fate::DeadLetter(letters) => letters.send(lane, incoming, &error, now)?,
        }
        Ok(())
    }

    /// Takes acks of dead letters; what they settle is settled in the window. Returns how many, and why the run has to end
    /// if one was refused: those that are left are nobody's then.
    pub fn accept(&mut self, batch: &Batch, window: &mut Window) -> (u64, Option<RunError>) {
        let Fate::DeadLetter(letters) = &mut self.fate else { return (0, None) };
        if letters.len() == 0 {
            return (0, None);
        }
        let refused = batch.iter().find_map(|message| letters.accept(&message).err());
        let mut settled = 0;
        while let Some(letter) = letters.pop() {
            window.skip(letter.source);
            self.telling.note(letter.source.seq, letter.reason, PoisonAction::DeadLettered);
            settled += 1;
        }
        if refused.is_some() {
            letters.give_up();
        }
        (settled, refused)
    }

    /// Whether everything in the air is on its way.
    pub fn check(&mut self, lane: &mut Lane, now: Instant) -> Result<(), RunError> {
        match &mut self.fate {
            Fate::DeadLetter(letters) => letters.check(lane, now),
            Fate::Hold | Fate::Skip => Ok(()),
        }
    }

    /// What is to be told now; all of it at a look at the clock or at the end of the run.
    pub fn tell(&mut self, all: bool) -> Vec<Event> {
        self.telling.take(all)
    }
}

/// Keeps thousands of messages in a row from being as many events.
#[derive(Debug, Default)]
struct Telling {
    ready: Vec<Event>,
    told: u64,
    /// Those that are told together.
    rest: Option<Event>,
}

impl Telling {
    fn note(&mut self, seq: u64, why: String, what: PoisonAction) {
        self.told += 1;
        if self.told <= TOLD_SINGLY {
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

    fn refusal(seq: u64) -> Refusal {
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
        let mut telling = Telling::default();
        let of = |events: Vec<Event>| -> Vec<_> {
            let seqs = events.iter().map(|event| match event {
                Event::Poison { source_seq, to, messages, .. } => (*source_seq, *to, *messages),
                other => panic!("{other:?}"),
            });
            seqs.collect()
        };
        (1..=2).for_each(|seq| telling.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(telling.take(false)), [(1, None, None), (2, None, None)]);
        (3..=5).for_each(|seq| telling.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(telling.take(false)), [(3, None, None), (4, None, None)]);
        (6..=1000).for_each(|seq| telling.note(seq, "x".into(), PoisonAction::Skipped));
        assert_eq!(of(telling.take(false)), []);
        assert_eq!(of(telling.take(true)), [(5, Some(1000), Some(996))]);
        assert_eq!(of(telling.take(true)), []);
        telling.note(1001, "x".into(), PoisonAction::Skipped);
        assert_eq!(of(telling.take(false)), [(1001, None, None)]);
    }
}
