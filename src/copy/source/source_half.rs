//! The source side of a run: its lane, the state of the stream, and its reader.

use nats_lane::{
    Batch, Error, Lane, entropy as chance,
    jetstream::{StreamInfo, answer_in, leaders_info},
};
use tokio::time::{Duration, Instant};

use crate::{
    config::Replication,
    copy::{
        flow::watchdog::Watchdog,
        resume::Already,
        source::{
            clock::{ClockReading, SourceClock},
            consumers::Names,
            gap::Gaps,
            intake::Intake,
            renewal::ConsumerRenewal,
            retention::{PollHistory, Retention},
            source_end::{Questions, SourceEnd, StateRequest},
        },
    },
};

/// How often the source is asked for its state.
pub(in crate::copy) const INFO_EVERY: Duration = Duration::from_secs(10);
/// The same while messages wait that the source may soon remove.
pub(in crate::copy) const INFO_SOONEST: Duration = Duration::from_secs(1);
/// After that the consumer may be asked for its state again, though it has not answered.
const CONSUMER_ANSWER: Duration = Duration::from_secs(5);

/// The source side of a run.
#[derive(Debug)]
pub(in crate::copy) struct SourceHalf {
    pub lane: Lane,
    pub info: StreamInfo,
    /// The time of the source server: ages are by it.
    pub clock: SourceClock,
    pub reader: Intake,
    /// Names of consumers at the source.
    pub names: Names,
    /// Whether the source is read now.
    pub reads: bool,
    pub gaps: Gaps,
    /// Whether jumps in the source's sequences may be losses.
    pub plain: bool,
    /// Removals below this sequence were reported or noted already.
    pub reported_first: u64,
    pub polls: StatePolls,
    /// The limits by which the source removes messages, and its recent polls.
    pub retention: Retention,
    pub poll_history: PollHistory,
    pub watchdog: Watchdog,
    /// The request for the state of the consumer, while it is unanswered, and when it was sent.
    pub consumer_request: Option<(String, Instant)>,
    /// When the newest request was sent whose answer said that nothing waits for the consumer.
    pub cleared_at: Option<Instant>,
    pub renewal: Option<ConsumerRenewal>,
    /// When the consumer is checked unless it gives a sign of life before.
    pub silent_at: Option<Instant>,
}

/// Requests to the source for its state.
#[derive(Debug)]
pub(in crate::copy) struct StatePolls {
    questions: Questions,
    /// When the last one was sent.
    asked: Instant,
    /// Whether the source still has everything that was read.
    pub end: SourceEnd,
}

impl StatePolls {
    /// The state was read at this time.
    pub fn new(asked: Instant) -> Self {
        Self { questions: Questions::default(), asked, end: SourceEnd::default() }
    }
}

impl SourceHalf {
    /// Notes the sequences that were skipped before a message, unless the target has it already: then it is not lost.
    pub fn note_jump(&mut self, after: u64, seq: u64, already: &Already) {
        let expected = (after + 1).max(self.reported_first);
        if self.plain && seq > expected && already.within(expected, seq - 1) < seq - expected {
            self.gaps.jumped(expected, seq - 1);
        }
        // Once, even if the message has to wait.
        self.reported_first = self.reported_first.max(seq);
    }

    /// Whether the stream should be asked for its state now, where that is due after `every`.
    pub fn is_due(&mut self, every: Duration, now: Instant) -> bool {
        let StatePolls { questions, asked, .. } = &self.polls;
        let due = now.duration_since(*asked) >= every && questions.may_ask(now);
        due || (questions.is_empty() && self.gaps.should_ask(now))
    }

    /// Asks the stream for its state; everything up to `read` was stored there.
    pub fn ask_state(&mut self, replication: &Replication, read: u64, now: Instant) {
        self.polls.asked = now;
        let subject = format!("{}.STREAM.INFO.{}", self.lane.api_prefix(), replication.source.stream);
        let request = self.lane.send_request(&subject, b"");
        self.polls.questions.ask(StateRequest { request, at: now, read });
    }

    /// The state of the stream, if its leader's answer is in the batch, and when it was requested.
    pub fn state_in(&mut self, batch: &Batch) -> Result<Option<(StreamInfo, Instant)>, Error> {
        let Some((question, info)) = self.polls.questions.newest(|request| answer_in(batch, request)) else {
            return Ok(None);
        };
        let Some(info) = leaders_info(info?)? else { return Ok(None) };
        self.clock.hear(&heard(question.at, Instant::now(), &info));
        self.polls.end.ask(question.read);
        Ok(Some((info, question.at)))
    }

    /// Asks the server for the state of the consumer, where that can be recreated.
    pub fn ask_consumer(&mut self, stream: &str) {
        let Some(reader) = self.reader.plain() else { return };
        let subject = format!("{}.CONSUMER.INFO.{stream}.{}", self.lane.api_prefix(), reader.consumer());
        self.consumer_request = Some((self.lane.send_request(&subject, b""), Instant::now()));
    }

    /// The payload of the answer about the consumer, if it is in the batch, and when it was requested.
    pub fn consumer_in<'b>(&mut self, batch: &'b Batch) -> Option<(Result<&'b [u8], Error>, Instant)> {
        let (request, asked) = self.consumer_request.as_ref()?;
        let answer = answer_in(batch, request)?;
        let asked = *asked;
        self.consumer_request = None;
        Some((answer, asked))
    }

    /// Whether the consumer can be asked for its state, and is not being asked.
    pub fn may_ask_consumer(&self, now: Instant) -> bool {
        let unanswered = |(_, asked): &(String, Instant)| now.duration_since(*asked) < CONSUMER_ANSWER;
        self.reader.plain().is_some() && !self.consumer_request.as_ref().is_some_and(unanswered)
    }

    /// Up to when it is known that nothing waited at the source, given that the consumer last said so. A plain one may deliver
    /// nothing, though messages wait: its own word counts. The others are not asked.
    pub fn clear_until(&self, now: Instant) -> Option<Instant> {
        if self.reader.plain().is_some() { self.cleared_at } else { Some(now) }
    }

    /// When the consumer has to be checked unless it gives a sign of life before. Called at each turn of the loop.
    pub fn next_check(&self, now: Instant) -> Option<Instant> {
        let reader = self.reader.plain()?;
        let owes = reader.is_asking() && !self.lane.is_receiving();
        let heard = reader.heard().max(self.lane.partial_at());
        owes.then(|| self.watchdog.silent_at(now, heard)).flatten()
    }
}

/// The time of the server in an answer about the source stream.
pub(in crate::copy) fn heard(sent: Instant, received: Instant, info: &StreamInfo) -> ClockReading {
    ClockReading { sent, received, server: info.ts, local: chance::now() }
}
