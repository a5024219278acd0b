//! Messages that the target refuses. A server does not say that it refuses one: it asks for it again and again. It is the first one
//! that each of these consumers was given, and `on_reject` says what becomes of it.

use std::collections::BTreeMap;

use nats_lane::{Batch, Lane};
use tokio::time::Instant;
use tracing::warn;

use super::{
    Feed, REFUSED, held,
    message::{NotFed, undeliverable},
    room::{is_nearly_full, lacks_room},
};
use crate::{
    config::OnReject,
    copy::{
        Error, Job, PoisonMessage,
        source::reader::Incoming,
        target::{dead_letter::DeadLetters, provenance::Tag},
    },
    events::{Event, Events, PoisonAction},
    native::request::{ConsumerRequest, FeedStart},
    store::SourceMessage,
};

/// What is known of refusals.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// The sequence that was asked for last, and how often after the same message was given.
    start: u64,
    times: u32,
    suspect: Option<SourceMessage>,
    /// A consumer that the target had was given something since the last request.
    delivered: bool,
    /// What the answers begin with of the last consumer that was given something and ended before the target answered: its server may
    /// send them after it has ended the consumer.
    unanswered: Option<Vec<u8>>,
    /// The first message that the newest consumer was given.
    first: Option<FirstGiven>,
    /// Refused for good: `on_reject` is applied when it is read.
    refused: Option<(SourceMessage, String)>,
    /// What no consumer is given any more.
    omitted: BTreeMap<u64, OmittedMessage>,
    /// Nothing was stored since the last message was omitted.
    is_row: bool,
    /// A message that the target cannot store by what is known of it, and when that was noticed: it is asked once more.
    noticed: Option<(SourceMessage, Instant)>,
    /// First and last sequence of a target that was nearly full when it was last seen to refuse a message.
    nearly_full: Option<(u64, u64)>,
    letters: Option<DeadLetters>,
}

#[derive(Debug, Clone)]
struct FirstGiven {
    message: SourceMessage,
    subject: String,
    /// Bytes of subject, headers and payload.
    bytes: usize,
}

/// A message that is omitted.
#[derive(Debug)]
struct OmittedMessage {
    message: SourceMessage,
    why: NotFed,
    /// What to report when it is met for the first time.
    report: Option<(String, PoisonAction)>,
}

/// What a judgement depends on besides the message.
pub(super) struct Judging<'a> {
    pub job: &'a Job,
    pub events: &'a Events,
    /// Bytes of headers and payload that the target takes at most, by its `max_msg_size`; `None` without one.
    pub largest: Option<usize>,
    /// When the target was asked for that.
    pub as_of: Instant,
    /// See [`undeliverable`].
    pub splits_at_last: bool,
    /// Generation of the position record.
    pub generation: u64,
    pub now: Instant,
}

/// What becomes of a message that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RefusalVerdict {
    /// It is a message like others.
    Give,
    /// It is skipped.
    Omit(NotFed),
    /// Until its dead letter is stored, nothing else is given.
    Wait,
}

impl Refusals {
    /// Refusals of a run that skips a message by request; `why` is the reason that the request was made for.
    pub fn of(skip: Option<SourceMessage>, why: Option<String>) -> Self {
        let report = Some((why.unwrap_or_else(|| "skipped by request".to_owned()), PoisonAction::Skipped));
        let omitted = skip.map(|message| OmittedMessage { message, why: NotFed::Refused, report });
        Self { omitted: omitted.map(|omitted| (omitted.message.seq, omitted)).into_iter().collect(), ..Self::default() }
    }

    /// A consumer is given a message.
    pub fn gives(&mut self, incoming: &Incoming<'_>, is_first: bool) {
        if is_first {
            self.first = Some(FirstGiven {
                message: message_of(incoming),
                subject: String::from_utf8_lossy(incoming.message.subject).into_owned(),
                bytes: incoming.bytes(),
            });
        }
    }

    /// A consumer ended that was given something. Unless the target is known to have had it, an answer of it may still arrive.
    pub fn ended(&mut self, is_taken: bool, answers: &[u8]) {
        if is_taken {
            self.delivered = true;
        } else {
            self.unanswered = Some(answers.to_vec());
        }
    }

    /// A message of the target arrived while it has no consumer: perhaps an answer for the one that ended.
    pub fn hear(&mut self, subject: &[u8]) {
        self.delivered |= self.unanswered.take_if(|answers| subject.starts_with(answers)).is_some();
    }

    /// The target has stored something, up to this source sequence: it does not ask for messages before that again.
    pub fn stored(&mut self, seq: u64) {
        self.forget();
        self.is_row = false;
        self.omitted = self.omitted.split_off(&(seq + 1));
    }

    /// What was given and not stored was not refused.
    pub fn forget(&mut self) {
        (self.start, self.times, self.suspect) = (0, 0, None);
        (self.delivered, self.unanswered) = (false, None);
    }

    /// When a message was noticed that the target cannot store by what is known of it.
    pub fn noticed(&self) -> Option<Instant> {
        self.noticed.map(|(_, at)| at)
    }

    /// The first message that was given to the target, if a request for this sequence is one for that message too.
    fn suspected(&self, start: u64) -> Option<&FirstGiven> {
        self.first.as_ref().filter(|first| self.delivered && start <= first.message.seq)
    }

    /// Takes a request into account; the message that is refused, if it is one too many.
    fn counts(&mut self, start: u64) -> Option<(FirstGiven, u32)> {
        // It asks for what comes later than a message that was omitted: then it has stored something since.
        if self.omitted.last_key_value().is_some_and(|(omitted, _)| start > omitted + 1) {
            self.is_row = false;
        }
        let delivered = std::mem::take(&mut self.delivered);
        self.unanswered = None;
        let first = self.first.as_ref().map(|first| first.message).filter(|_| delivered);
        if first.is_none() || start != self.start || first != self.suspect {
            (self.start, self.times, self.suspect) = (start, u32::from(delivered), first);
            return None;
        }
        self.times += 1;
        (self.times >= REFUSED).then(|| Some((self.first.clone()?, self.times))).flatten()
    }

    /// What becomes of a message that is to be given, under the subject `mapped`. What is found to be refused waits until everything
    /// before it is stored (`settled`). Dead letters are sent over the source lane.
    pub fn judge(
        &mut self,
        judging: &Judging<'_>,
        settled: bool,
        lane: &mut Lane,
        incoming: &Incoming<'_>,
        mapped: &[u8],
    ) -> Result<RefusalVerdict, Error> {
        if self.awaits_letter() {
            return Ok(RefusalVerdict::Wait);
        }
        let message = message_of(incoming);
        if let Some(omitted) = self.omitted.get_mut(&message.seq).filter(|omitted| omitted.message == message) {
            omitted.report(&judging.job.replication.id, judging.events);
            return Ok(RefusalVerdict::Omit(omitted.why));
        }
        let asked_for = self.refused.as_ref().filter(|(refused, _)| *refused == message).map(|(_, why)| why.clone());
        let is_known = asked_for.is_some();
        let Some(why) = asked_for.or_else(|| judging.never_stored(incoming, mapped)) else {
            self.noticed = None;
            return Ok(RefusalVerdict::Give);
        };
        if !settled {
            return Ok(RefusalVerdict::Wait);
        }
        // Its limits may have been raised since the target was asked.
        let noticed = self.noticed.filter(|(noticed, _)| *noticed == message).map_or(judging.now, |(_, at)| at);
        self.noticed = Some((message, noticed));
        if !is_known && judging.as_of < noticed {
            return Ok(RefusalVerdict::Wait);
        }
        (self.refused, self.noticed) = (None, None);
        self.refuse(judging, lane, incoming, why)
    }

    /// Does what `on_reject` says.
    fn refuse(
        &mut self,
        judging: &Judging<'_>,
        lane: &mut Lane,
        incoming: &Incoming<'_>,
        why: String,
    ) -> Result<RefusalVerdict, Error> {
        let (replication, message) = (&judging.job.replication, message_of(incoming));
        let (id, stream) = (&replication.id, &replication.source.stream);
        match &replication.on_reject {
            OnReject::Hold => {
                let subject = String::from_utf8_lossy(incoming.message.subject).into_owned();
                Err(poison(why, message, (subject, incoming.bytes() as u64)))
            }
            OnReject::Skip => {
                self.is_row = true;
                let report = Some((why, PoisonAction::Skipped));
                let mut omitted = OmittedMessage { message, why: NotFed::Refused, report };
                omitted.report(id, judging.events);
                self.omitted.insert(message.seq, omitted);
                Ok(RefusalVerdict::Omit(NotFed::Refused))
            }
            OnReject::DeadLetter { subject } => {
                self.is_row = true;
                let letters = self.letters.get_or_insert_with(|| {
                    let tag = Tag::new(stream, &judging.job.site, &replication.name);
                    DeadLetters::open(lane, subject, id, stream, tag, judging.generation)
                });
                letters.send(lane, incoming, &nats_lane::Error::hold(why), judging.now)?;
                Ok(RefusalVerdict::Wait)
            }
        }
    }

    /// Takes acks of dead letters; an error if no stream stored one.
    pub fn accept(&mut self, batch: &Batch) -> Result<(), Error> {
        let Some(letters) = &mut self.letters else { return Ok(()) };
        for message in batch.iter() {
            letters.accept(&message)?;
        }
        while let Some(letter) = letters.pop() {
            let message = SourceMessage { seq: letter.source.seq, time_ns: letter.source.time_ns.unwrap_or_default() };
            let report = Some((letter.reason, PoisonAction::DeadLettered));
            self.omitted.insert(message.seq, OmittedMessage { message, why: NotFed::DeadLettered, report });
        }
        Ok(())
    }

    /// Whether a dead letter is on its way.
    pub fn awaits_letter(&self) -> bool {
        self.letters.as_ref().is_some_and(|letters| letters.len() > 0)
    }

    /// An error if a dead letter is overdue.
    pub fn check(&mut self, lane: &mut Lane, now: Instant) -> Result<(), Error> {
        self.letters.as_mut().map_or(Ok(()), |letters| letters.check(lane, now))
    }
}

impl RefusalVerdict {
    /// Why the message is skipped, if it is.
    pub fn skipped(self) -> Option<NotFed> {
        match self {
            Self::Omit(why) => Some(why),
            Self::Give | Self::Wait => None,
        }
    }
}

impl Judging<'_> {
    /// Why a target can never store a message, as far as that is known before it is given. What its server adds to the headers
    /// comes on top of the size.
    fn never_stored(&self, incoming: &Incoming<'_>, mapped: &[u8]) -> Option<String> {
        let (message, seq) = (&incoming.message, incoming.delivery.stream_seq);
        let bytes = message.header.len() + message.payload.len();
        if let Some(largest) = self.largest.filter(|largest| bytes > *largest) {
            let name = &self.job.replication.target.stream;
            return Some(format!(
                "source message {seq} has {bytes} bytes, and target stream `{name}` takes {largest} (`max_msg_size`)"
            ));
        }
        let why = undeliverable(message.header, message.payload, mapped, self.splits_at_last)?;
        Some(format!("source message {seq} {why}"))
    }
}

impl OmittedMessage {
    fn report(&mut self, id: &str, events: &Events) {
        if let Some((why, action)) = self.report.take() {
            let source_seq = self.message.seq;
            warn!(replication = id, source_seq, ?action, "omitted: {why}");
            events.emit(Event::poison(source_seq, why, action), id);
        }
    }
}

impl Feed<'_> {
    /// A message that the target asks for again and again was refused by it. An error if the replication is to be held for that.
    pub(super) async fn count_refusal(&mut self, asked: &ConsumerRequest) -> Result<(), Error> {
        let start = match asked.wanted {
            FeedStart::All | FeedStart::Time(_) | FeedStart::AfterItsLast => 0,
            FeedStart::From(seq) => seq,
        };
        if self.finds_it_full(start).await? {
            return Ok(());
        }
        let Some((first, times)) = self.refusals.counts(start) else { return Ok(()) };
        let replication = &self.job.replication;
        let why = format!(
            "target stream `{}` does not store source message {}: it asked for it {times} times; the log of the target's server \
             has the reason (`Error processing inbound`); such a message may need `allow_rollup_hdrs` or `allow_msg_ttl` of the \
             stream, or a newer server",
            replication.target.stream, first.message.seq
        );
        // A target that stores nothing at all refuses no message in particular.
        if replication.on_reject == OnReject::Hold || self.refusals.is_row {
            return Err(poison(why, first.message, (first.subject, first.bytes as u64)));
        }
        self.refusals.forget();
        self.refusals.refused = Some((first.message, why));
        Ok(())
    }

    /// Whether a target that asks for a sequence again may have refused it because it is full: then nothing is given until it has room.
    async fn finds_it_full(&mut self, start: u64) -> Result<bool, Error> {
        let Some(bytes) = self.refusals.suspected(start).map(|first| first.bytes) else { return Ok(false) };
        // Without a leader nothing is known.
        let known = self.read_target().await?;
        let state = &self.target_info.state;
        let (nearly, seqs) = (is_nearly_full(&self.target_info, bytes), (state.first_seq, state.last_seq));
        // Others store and remove messages there.
        let moved = nearly && self.refusals.nearly_full != Some(seqs);
        self.refusals.nearly_full = nearly.then_some(seqs);
        if let Some(why) = lacks_room(&self.target_info, bytes) {
            self.is_full(bytes, &why);
        } else if known && !moved {
            return Ok(false);
        }
        self.refusals.forget();
        Ok(true)
    }

    /// Whether the position stays before a message: after a restart, a target asks again for one that is skipped by request, unless it
    /// has stored a later one.
    pub(super) fn keeps_request(&self, seq: u64) -> bool {
        self.job.skip.is_some_and(|skip| self.position.seq < skip.seq && skip.seq <= seq)
    }
}

/// The error of a message that holds the replication.
fn poison(why: String, message: SourceMessage, content: (String, u64)) -> Error {
    let mut error = held(why);
    error.poison = Some(Box::new(PoisonMessage { message, content: Some(content) }));
    error
}

fn message_of(incoming: &Incoming<'_>) -> SourceMessage {
    SourceMessage { seq: incoming.delivery.stream_seq, time_ns: incoming.delivery.time_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(refusals: &mut Refusals, seq: u64) {
        let message = SourceMessage { seq, time_ns: 1 };
        refusals.first = Some(FirstGiven { message, subject: "a".to_owned(), bytes: 2 });
        refusals.ended(true, b"F.");
    }

    fn refused(refusals: &mut Refusals, start: u64) -> Option<u64> {
        refusals.counts(start).map(|(first, _)| first.message.seq)
    }

    #[test]
    fn a_message_that_is_given_three_times_is_refused() {
        let mut refusals = Refusals::default();
        assert_eq!(refused(&mut refusals, 7), None);
        for _ in 0..2 {
            given(&mut refusals, 9);
            assert_eq!(refused(&mut refusals, 7), None);
        }
        given(&mut refusals, 9);
        assert_eq!(refused(&mut refusals, 7), Some(9));
    }

    #[test]
    fn what_no_consumer_has_taken_is_not_refused() {
        let mut refusals = Refusals::default();
        for answered in [false, false, false, true, true, true] {
            given(&mut refusals, 9);
            refusals.delivered = false;
            refusals.ended(false, b"F.C.");
            refusals.hear(if answered { b"F.C.0" } else { b"F.B.0" });
            let is_last = answered && refusals.times == REFUSED - 1;
            assert_eq!(refused(&mut refusals, 7), is_last.then_some(9));
        }
        assert!(refusals.times == REFUSED);
    }

    #[test]
    fn progress_and_other_messages_begin_again() {
        let mut refusals = Refusals::default();
        for (start, seq) in [(7, 7), (7, 7), (8, 8), (8, 8), (8, 9), (8, 9)] {
            given(&mut refusals, seq);
            assert_eq!(refused(&mut refusals, start), None, "{start} {seq}");
        }
        refusals.stored(7);
        given(&mut refusals, 9);
        assert_eq!(refused(&mut refusals, 8), None);
        // Asked for without having been given.
        for _ in 0..5 {
            assert_eq!(refused(&mut refusals, 8), None);
        }
    }
}
