//! What a feed asks both streams about themselves, and what follows from the answers: whether the reader is one of the stream that was
//! compared, whether the target has room, and what it holds of what it was given.
//!
//! An answer to flow control means that the target has processed what came before it. It gives that also after a message that it
//! refused, so what counts as stored is what its stream is seen to hold afterwards.

use nats_lane::{
    Batch, entropy, headers,
    jetstream::{Api, StreamInfo, answer_in, decode_message, leaders_info},
    parser::number,
};
use serde_json::json;
use tokio::time::{Duration, Instant};
use tracing::{debug, warn};

use super::{
    ASKED_AGAIN, Feed, POKE_EVERY, Served, held,
    room::{TargetRoom, lacks_room, refuses_late},
};
use crate::{
    config::NativeKind,
    copy::{Error, ErrorKind, source::clock::ClockReading},
    names,
    native::{
        session::poke,
        target::{self, Fit},
    },
};

/// How often the target is asked what it holds while it is given messages.
const PROVEN_EVERY: Duration = Duration::from_millis(500);
/// The same once a quarter of what may be in flight waits for that: with narrow limits the source gives no more before.
const PROVEN_SOON: Duration = Duration::from_millis(10);
/// After this time without an answer the target is asked again.
const UNANSWERED: Duration = Duration::from_secs(2);
/// After this time without a proof that a target with sources holds what it has processed, it is made to ask: its request says
/// what it holds.
const UNPROVEN: Duration = Duration::from_secs(10);
/// How often that is done at most.
const UNPROVEN_EVERY: Duration = Duration::from_secs(30);

/// Requests about the streams that are not answered, with when they were sent, and how old the newest answer of the target is.
#[derive(Debug)]
pub(super) struct FeedStates {
    source: Option<(String, Instant)>,
    target: Option<(String, Instant)>,
    /// For the newest message of a subject at a target with sources.
    newest: Option<(String, Instant)>,
    /// When the target was asked last.
    asked: Instant,
    /// When it was asked for the state that is known.
    as_of: Instant,
}

impl FeedStates {
    pub fn new(now: Instant) -> Self {
        Self { source: None, target: None, newest: None, asked: now, as_of: now }
    }

    /// How old the state of the target is that is known.
    pub fn as_of(&self) -> Instant {
        self.as_of
    }

    /// Whether the target was asked and may still answer.
    fn waits(&self, now: Instant) -> bool {
        self.target.as_ref().is_some_and(|(_, sent)| now.saturating_duration_since(*sent) < UNANSWERED)
    }
}

/// A target that is full, and waits for room.
#[derive(Debug)]
pub(super) struct FullTarget {
    /// Bytes of subject, headers and payload of the message that it has no room for.
    pub bytes: usize,
    /// The error in the status.
    pub why: String,
}

impl Feed<'_> {
    pub(super) async fn read_source(&mut self) -> Result<(), Error> {
        let stream = &self.job.replication.source.stream;
        let sent = Instant::now();
        let info = Api::new(&mut self.source).stream_info(stream).await.map_err(Error::of_source)?;
        let info = info.ok_or_else(|| held(format!("source stream `{stream}` does not exist")))?;
        self.source_is(info, sent);
        Ok(())
    }

    /// Takes over an answer of the source about its stream.
    fn source_is(&mut self, info: StreamInfo, sent: Instant) {
        let received = Instant::now();
        self.clock.hear(&ClockReading { sent, received, server: info.ts, local: entropy::now() });
        self.polls.add(received, info.state.clone());
        self.source_info = info;
    }

    /// Reads the state of the target; `false` if it has no leader now.
    pub(super) async fn read_target(&mut self) -> Result<bool, Error> {
        let stream = &self.job.replication.target.stream;
        let sent = Instant::now();
        let info = Api::new(&mut self.target).stream_info(stream).await.map_err(Error::of_target)?;
        let Some(info) = info else { return Ok(false) };
        // An answer that arrived meanwhile was passed over.
        (self.states.target, self.states.newest) = (None, None);
        (self.states.as_of, self.target_info) = (sent, info);
        self.measure_room();
        Ok(true)
    }

    /// How much a target may be given that loses what it has no room for, by what is known of it.
    fn measure_room(&mut self) {
        let in_flight = self.session.as_ref().map(|served| served.session.in_flight()).unwrap_or_default();
        let is_measured = self.kind == NativeKind::Mirror || refuses_late(&self.target_info);
        self.target_room = is_measured.then(|| TargetRoom::of(&self.target_info, in_flight)).flatten();
    }

    /// The target has no room for the next message, and everything before it is stored: it is full, or to be asked again.
    pub(super) fn lacks_room_for(&mut self, bytes: usize) {
        match lacks_room(&self.target_info, bytes) {
            Some(why) => self.is_full(bytes, &why),
            None => self.times.info = self.times.info.min(self.states.asked + PROVEN_EVERY),
        }
    }

    /// Nothing is given until the target has room.
    pub(super) fn is_full(&mut self, bytes: usize, why: &str) {
        let stream = &self.job.replication.target.stream;
        let why = format!(
            "target stream `{stream}` is full and refuses new messages: {why}; the feed continues when it has room"
        );
        warn!(replication = self.job.replication.id, "{why}");
        self.full = Some(FullTarget { bytes, why });
    }

    pub(super) fn ask_states(&mut self, now: Instant) {
        let subject = format!("{}.STREAM.INFO.{}", self.source.api_prefix(), self.job.replication.source.stream);
        self.states.source = Some((self.source.send_request(&subject, b""), now));
        self.ask_target(now);
    }

    /// Asks the target for its state, unless it was asked and may still answer.
    fn ask_target(&mut self, now: Instant) {
        if self.states.waits(now) {
            return;
        }
        let subject = format!("{}.STREAM.INFO.{}", self.target.api_prefix(), self.job.replication.target.stream);
        self.states.target = Some((self.target.send_request(&subject, b""), now));
        self.states.asked = now;
    }

    /// When the target is to be asked outside of its turn; `None` where nothing depends on that.
    pub(super) fn asks_target_at(&self, now: Instant) -> Option<Instant> {
        let states = &self.states;
        if states.waits(now) {
            return None;
        }
        if self.refusals.noticed().is_some_and(|noticed| states.as_of < noticed) {
            return Some(states.asked + PROVEN_SOON);
        }
        let unproven = self.session.as_ref().map(|served| served.session.unproven()).unwrap_or_default();
        if unproven.messages == 0 {
            return self.full.is_some().then(|| states.asked + ASKED_AGAIN);
        }
        let limits = &self.job.replication.limits;
        let narrow = 4 * unproven.messages >= limits.messages_in_flight as u64
            || 4 * unproven.bytes >= limits.bytes_in_flight as u64;
        Some(states.asked + if narrow { PROVEN_SOON } else { PROVEN_EVERY })
    }

    pub(super) fn ask_target_where_due(&mut self, now: Instant) {
        if self.asks_target_at(now).is_some_and(|at| now >= at) {
            self.ask_target(now);
        }
    }

    /// Takes an answer of the source, if it is among these messages.
    pub(super) fn hear_source_state(&mut self, batch: &Batch) -> Result<(), Error> {
        let answer = self.states.source.as_ref().and_then(|(request, sent)| Some((answer_in(batch, request)?, *sent)));
        let Some((answer, sent)) = answer else { return Ok(()) };
        self.states.source = None;
        // Without a leader there is no answer that counts; the next question follows.
        match answer.and_then(leaders_info) {
            Ok(Some(info)) => {
                if let Some(served) = &mut self.session {
                    if info.created != self.source_info.created {
                        let message = "the source was recreated while it was read";
                        return Err(Error::new(ErrorKind::Retry, message));
                    }
                    served.is_of_compared = true;
                }
                self.source_is(info, sent);
                self.end_of_source()
            }
            Err(error) if error.kind == nats_lane::ErrorKind::NotFound => {
                let stream = &self.job.replication.source.stream;
                Err(held(format!("source stream `{stream}` does not exist")))
            }
            Ok(None) | Err(_) => {
                self.times.info = self.times.info.min(Instant::now() + ASKED_AGAIN);
                Ok(())
            }
        }
    }

    /// A consumer can survive a source that lost its end.
    fn end_of_source(&self) -> Result<(), Error> {
        let last = self.source_info.state.last_seq;
        match &self.session {
            Some(served) if last < served.session.last().seq => Err(Error::new(
                ErrorKind::Retry,
                format!("the source ends at sequence {last}, before what was read of it"),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn hear_target_state(&mut self, batch: &Batch) -> Result<(), Error> {
        for refused in self.target.take_refused() {
            debug!(replication = self.job.replication.id, "the target's server refused a request: {refused}");
        }
        self.hear_newest(batch);
        let answer = self.states.target.as_ref().and_then(|(request, sent)| Some((answer_in(batch, request)?, *sent)));
        let Some((answer, sent)) = answer else { return Ok(()) };
        let info = answer.and_then(leaders_info);
        self.states.target = None;
        let name = &self.job.replication.target.stream;
        match info {
            Ok(Some(info)) => {
                let fit = target::check(self.kind, &self.job.replication, &info, &self.subjects);
                let fit = fit.map_err(Error::of_target)?;
                (self.states.as_of, self.target_info) = (sent, info);
                if fit == Fit::Lacks {
                    // The next run adds it again, if the stream may be changed.
                    let message = format!("the source was removed from target stream `{name}`");
                    return Err(Error::new(ErrorKind::Retry, message));
                }
                self.prove(sent);
                self.measure_room();
                self.full.take_if(|full| lacks_room(&self.target_info, full.bytes).is_none());
                Ok(())
            }
            Err(error) if error.kind == nats_lane::ErrorKind::NotFound => {
                Err(Error::new(ErrorKind::Retry, format!("target stream `{name}` was deleted")))
            }
            // Between two leaders.
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Compares what the target holds with what it has processed.
    fn prove(&mut self, asked: Instant) {
        let known = match self.kind {
            NativeKind::Mirror => Some(self.target_info.state.last_seq),
            NativeKind::Source => target::taken(&self.target_info, &self.subjects),
        };
        match known {
            Some(seq) => self.holds(seq, asked),
            None => self.ask_for_newest(asked),
        }
    }

    /// The target was asked at this time, and holds everything up to a sequence of the source. If it has processed more, it has
    /// refused that, and is made to ask for it again: by itself it does that when the next message arrives.
    fn holds(&mut self, seq: u64, asked: Instant) {
        let Some(Served { session, leaf, .. }) = &mut self.session else { return };
        let lacks = session.processed_before(asked).is_some_and(|last| seq < last);
        let (stored, now) = (session.holds(seq), Instant::now());
        if let Some(subject) = session.subject()
            && lacks
            && now >= self.times.poke
        {
            self.times.poke = now + POKE_EVERY;
            self.leaves.leaf(*leaf).send(subject.as_bytes(), b"", &poke(), b"");
        }
        if let Some((amount, last)) = stored {
            self.stored(amount, last);
        }
    }

    /// A server that does not say what it has of a source has it in the headers of its messages: asks for the newest one of the
    /// subject of the last message that it has processed.
    fn ask_for_newest(&mut self, now: Instant) {
        let Some(Served { session, leaf, .. }) = &self.session else { return };
        let (Some(subject), Some(since)) = (session.processed_subject(), session.processed_since()) else { return };
        if self.states.newest.as_ref().is_none_or(|(_, sent)| now.duration_since(*sent) > UNANSWERED) {
            let body = json!({ "last_by_subj": String::from_utf8_lossy(subject) }).to_string();
            let call = format!("{}.STREAM.MSG.GET.{}", self.target.api_prefix(), self.job.replication.target.stream);
            self.states.newest = Some((self.target.send_request(&call, body.as_bytes()), now));
        }
        // Perhaps others store messages of that subject, or it was removed.
        if let Some(subject) = session.subject()
            && now.duration_since(since) > UNPROVEN
            && now >= self.times.poke
        {
            self.times.poke = now + UNPROVEN_EVERY;
            self.leaves.leaf(*leaf).send(subject.as_bytes(), b"", &poke(), b"");
        }
    }

    fn hear_newest(&mut self, batch: &Batch) {
        let answer = self.states.newest.as_ref().and_then(|(request, _)| answer_in(batch, request));
        let Some(answer) = answer else { return };
        let found = answer.and_then(decode_message).ok().flatten();
        self.states.newest = None;
        let index = self.subjects.source_index(&self.job.replication.source.stream);
        let taken = found.and_then(|found| {
            let value = headers::last(&found.header, names::STREAM_SOURCE_HEADER.as_bytes())?;
            let mut fields = value.split(|byte| *byte == b' ');
            fields.next().filter(|first| *first == index.as_bytes())?;
            number(fields.next()?)
        });
        let stored = taken.and_then(|seq| self.session.as_mut()?.session.holds(seq));
        if let Some((amount, last)) = stored {
            self.stored(amount, last);
        }
    }
}
