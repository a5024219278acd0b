//! Sends messages to the target with many in the air, and turns acks into settlements. Nothing is kept for
//! sending again: after any refusal the run ends and is built anew from what the target then holds.

use std::{fmt::Write as _, ops::Range, sync::Arc};

use bytes::BytesMut;
use nats_lane::{
    ApiError, Error, ErrorKind, Lane, Message, entropy as chance,
    fast_ingest::{self, Ack, Operation},
    headers,
    jetstream::{PublishAck, StreamInfo},
    parser::number,
};
use tokio::time::{Duration, Instant};
use tracing::trace;
use xxhash_rust::xxh3::xxh3_128;

use super::{
    Error as RunError, objects,
    provenance::{Origin, Tag},
    reader::Incoming,
    reject::Refusal,
    target::Abilities,
    transform::{self, Passage, Stamp},
    window::{SourcePoint, Token, Window, WindowError},
};
use crate::{
    config::{Limits, Replication},
    status::{Ordering, TargetMode, Transport},
    store::{PositionRecord, SourceMessage, Stamps},
};

/// Longest protocol line, without its keyword, that a server takes unless it is configured otherwise (`max_control_line`);
/// beyond it, it drops the connection.
const MAX_LINE: usize = 4096;
/// Longest header block that a server takes.
pub(super) const MAX_HEADER: usize = 65_535;
/// The error of a message that is larger than the stream allows.
pub(super) const TOO_LARGE: u32 = 10054;
/// The error of a publish that names another stream than the one that took it.
const STREAM_NOT_EXPECTED: u32 = 10060;
/// Messages between two acks that we ask for at the most; the server may choose fewer.
const FLOW: u32 = 500;
/// Acks that may be outstanding (ADR-50): so many times the server's distance may be in the air.
const OUTSTANDING_ACKS: u64 = 32;
/// An open batch is committed when nothing was sent for this time: the last messages get no ack otherwise.
const COMMIT_IDLE: Duration = Duration::from_millis(20);
/// An open batch is committed when its oldest unsettled message waits longer and no ack is due by itself.
const COMMIT_AFTER: Duration = Duration::from_millis(250);

/// On shared targets an open batch is committed this often: only the end of a batch tells where our messages lie.
const COMMIT_SHARED: Duration = Duration::from_secs(2);
/// How long the end of a refused batch, which tells what was stored, is waited for.
const END_WAIT: Duration = Duration::from_millis(500);

/// First words of requests of the JetStream API.
const REQUESTS: [&[u8]; 7] = [b"INFO", b"STREAM", b"CONSUMER", b"DIRECT", b"ACCOUNT", b"META", b"SERVER"];

/// How long the answer to a commit may take.
const COMMIT_WAIT: Duration = Duration::from_secs(10);

fn window_error(error: WindowError) -> Error {
    Error::retry(format!("acks of the target do not match the sent messages: {error}"))
}

/// What the ack of one publish says.
#[derive(Debug, Clone, Copy)]
struct Published {
    seq: u64,
    duplicate: bool,
}

/// An open fast-ingest batch.
#[derive(Debug)]
struct OpenBatch {
    id: u64,
    /// Token of the message with batch sequence 1.
    first: Token,
    /// Batch sequences given so far.
    sent: u64,
    /// Batch sequences settled.
    settled: u64,
    /// Distance between acks that we ask for.
    flow: u32,
    /// Distance between acks, as the server last said; `None` until it answered the start.
    every: Option<u32>,
    opened: Instant,
    last_sent: Instant,
    last_ack: Instant,
    committing: Option<Instant>,
    refused: Option<Refused>,
    /// A second stream may answer: acks that name no stream do not count.
    doubted: bool,
}

/// The first refusal of a batch.
#[derive(Debug, Clone)]
struct Refused {
    error: Error,
    at: Instant,
    /// Batch sequence of the message, where it is known.
    sequence: Option<u64>,
}

/// Whether there will be more to send soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Supply {
    /// Nothing is known to wait at the source.
    Dry,
    /// More is on its way.
    Coming,
    /// More is here, but the bounds on what is in the air keep it back.
    Barred,
}

#[derive(Debug)]
enum Mode {
    FastIngest {
        batch: Option<OpenBatch>,
        next_id: u64,
    },
    /// Of several refusals that of the oldest message counts; the others are known to the next run if they are for good.
    Pipelined {
        sent: u64,
        /// Messages of ours behind [`Writer::exact`].
        stored: u64,
        refused: Option<(Token, Error)>,
        for_good: Vec<(Token, Error)>,
    },
}

/// Sends to one target stream over one lane.
#[derive(Debug)]
pub(super) struct Writer {
    replication: Arc<Replication>,
    tag: Tag,
    abilities: Abilities,
    sid: u64,
    inbox: String,
    /// What subjects of the target's JetStream API begin with.
    api_prefix: String,
    max_payload: usize,
    /// Largest message that the stream takes, headers included; `None` for no bound.
    max_msg_size: Option<usize>,
    /// Longest protocol line that the target takes.
    max_line: usize,
    /// The longest line that was sent, and its message.
    longest: (usize, Token),
    mode: Mode,
    /// Last sequence of the target after everything that was sent; kept by the chain.
    expected_last: u64,
    /// Only one message is in the air at a time, which makes the chain sound without batches too.
    single: bool,
    /// The next message bears the chain beside its id: what a run before sent by the chain must not arrive behind it.
    fence: bool,
    /// So many messages bear ids beside the chain: what a run before sent by ids may still arrive.
    overlap: usize,
    /// How messages of earlier runs are stamped.
    before: Option<Stamps>,
    /// Nothing has been confirmed by a stream that names itself.
    unproven: bool,
    /// Last sequence of the target before this run: what it stores now lies behind it.
    floor: u64,
    /// Every sequence behind the floor and up to here is that of a message of ours. Pipelined only.
    exact: u64,
    /// A subject that the target listens on, for a commit.
    last_subject: Vec<u8>,
    domain: Option<String>,
    /// Room for a mapped subject.
    room: Vec<u8>,
    /// Subject, header block and what was left out of it: the message that was prepared last.
    subject: Vec<u8>,
    header: Vec<u8>,
    removed: u64,
    reply: BytesMut,
    id: MessageId,
    /// Of the lease that this is written under.
    epoch: u64,
    /// Messages in the window that were refused and so never settle.
    unstored: usize,
    /// Headers left out so far.
    pub headers_removed: u64,
    /// Messages refused so far.
    pub refused: u64,
}

impl Writer {
    /// Prepares for writing behind what `target` tells of the stream. Ids differ between generations of `record`.
    pub fn open(
        lane: &mut Lane,
        replication: Arc<Replication>,
        tag: Tag,
        abilities: Abilities,
        target: &StreamInfo,
        record: &PositionRecord,
    ) -> Self {
        let (sid, inbox) = lane.open_inbox();
        let mode = match abilities.transport {
            // The server knows batches by this id alone, not by the inbox: those of other writers, and of our own
            // runs before this one, must not have the same. Far below `MAX_NUMBER`: it comes back in every ack.
            Transport::FastIngest => Mode::FastIngest { batch: None, next_id: chance::random() >> 3 },
            Transport::Pipelined => Mode::Pipelined { sent: 0, stored: 0, refused: None, for_good: Vec::new() },
        };
        let strict = replication.ordering == Ordering::Strict || objects::is_store(&replication.source.stream);
        let single = abilities.transport == Transport::Pipelined && strict;
        let mut writer = Self {
            tag,
            abilities,
            sid,
            inbox,
            api_prefix: lane.api_prefix().to_owned(),
            max_payload: lane.info().max_payload,
            max_msg_size: None,
            max_line: MAX_LINE,
            longest: (0, 0),
            mode,
            expected_last: target.state.last_seq,
            single,
            fence: false,
            overlap: 0,
            before: None,
            unproven: true,
            floor: target.state.last_seq,
            exact: target.state.last_seq,
            last_subject: Vec::new(),
            domain: target.domain.clone(),
            room: Vec::new(),
            subject: Vec::new(),
            header: Vec::new(),
            removed: 0,
            reply: BytesMut::new(),
            id: MessageId::new(&replication.id, &replication.source.stream, record.generation),
            epoch: record.epoch,
            replication,
            unstored: 0,
            headers_removed: 0,
            refused: 0,
        };
        writer.target_is(target);
        writer
    }

    /// Takes over which protocol line was found to be the longest that the target takes.
    pub fn limit_line(&mut self, found: Option<usize>) {
        self.max_line = found.unwrap_or(MAX_LINE);
    }

    /// The longest protocol line that was sent, unless its message is confirmed.
    pub fn unconfirmed_line(&self, window: &Window) -> Option<usize> {
        let (line, token) = self.longest;
        window.source_of(token).map(|_| line)
    }

    /// What the stream takes now.
    pub fn target_is(&mut self, target: &StreamInfo) {
        self.max_msg_size = usize::try_from(target.number("max_msg_size")).ok().filter(|limit| *limit > 0);
    }

    /// Takes over that the run before stamped its messages in another way, and that some of them may still be on
    /// their way.
    pub fn after(&mut self, before: Stamps) {
        let fast = self.abilities.transport == Transport::FastIngest;
        if before.has_chain() {
            self.fence = fast && !self.chained();
        }
        if before.has_ids() && fast && self.chained() {
            let default = Limits::default().messages_in_flight;
            self.overlap = self.replication.limits.messages_in_flight.max(default);
        }
        self.before = Some(before);
    }

    /// Who else may write to the target.
    pub fn mode(&self) -> TargetMode {
        self.abilities.mode
    }

    /// How the messages of this run are stamped.
    fn own_stamps(&self) -> Stamps {
        if self.chained() && !self.single { Stamps::Chain } else { Stamps::Ids }
    }

    /// How the messages are stamped that may be in flight, those of earlier runs included.
    pub fn stamps(&self) -> Stamps {
        // The first message that is confirmed, or the last one with an id, leaves nothing to what came before.
        let over = if self.chained() { self.overlap == 0 } else { !self.unproven };
        let before = self.before.filter(|_| !over);
        before.map_or(self.own_stamps(), |before| before.and(self.own_stamps()))
    }

    fn chained(&self) -> bool {
        let sound = self.single || self.abilities.transport == Transport::FastIngest;
        sound && self.abilities.mode == TargetMode::Exclusive
    }

    /// Whether the place of a message at the target is certain before it is sent.
    fn places_ahead(&self) -> bool {
        self.chained() && !self.single
    }

    /// Whether only ids keep a message from being stored twice.
    pub fn relies_on_ids(&self) -> bool {
        !self.chained()
    }

    /// Whether the target may still store what is in flight when a run ends, known by its ids alone: a batch or a chain
    /// ends with the first refusal.
    pub fn is_by_ids(&self) -> bool {
        self.relies_on_ids() && self.abilities.transport == Transport::Pipelined
    }

    /// Messages that may be in the air; the document may allow fewer.
    pub fn most_in_air(&self) -> usize {
        if self.single { 1 } else { usize::MAX }
    }

    /// What a refusal can do to the order.
    pub fn ordering(&self) -> Ordering {
        let strict = self.single || self.abilities.transport == Transport::FastIngest;
        if strict { Ordering::Strict } else { Ordering::Relaxed }
    }

    /// Last sequence of the target as far as known here.
    pub fn last_seq(&self) -> u64 {
        self.expected_last
    }

    /// Whether the target's flow control takes another message now.
    pub fn ready(&self) -> bool {
        match &self.mode {
            Mode::FastIngest { batch: None, .. } => true,
            Mode::FastIngest { batch: Some(batch), .. } => {
                let in_air = batch.sent - batch.settled;
                let allowed = match batch.every {
                    Some(every) => (u64::from(every) * OUTSTANDING_ACKS).max(64),
                    None => u64::from(batch.flow),
                };
                let alone = self.unproven || batch.doubted;
                batch.committing.is_none() && batch.refused.is_none() && in_air < allowed && !alone
            }
            Mode::Pipelined { refused, .. } => refused.is_none(),
        }
    }

    /// Makes subject and headers of the next message; an error is one that can never be stored as it is.
    pub fn prepare(&mut self, incoming: &Incoming<'_>, now_ns: i64) -> Result<(), Error> {
        let opens = match &self.mode {
            Mode::FastIngest { batch, .. } => batch.is_none(),
            Mode::Pipelined { sent, .. } => *sent == 0,
        };
        self.write_header(incoming, now_ns, opens);
        self.subject.clear();
        let subject = self.replication.mapping.apply(incoming.message.subject, &mut self.room);
        self.subject.extend_from_slice(subject);
        match self.check(incoming) {
            // What only the first message of a batch says is no reason to leave it out.
            Err(_) if opens => {
                self.write_header(incoming, now_ns, false);
                self.check(incoming)
            }
            checked => checked,
        }
    }

    /// Puts the message that was prepared into the lane's output and into the window.
    pub fn send(&mut self, lane: &mut Lane, window: &mut Window, incoming: &Incoming<'_>, now: Instant, read_at: u64) {
        let source = SourcePoint { seq: incoming.delivery.stream_seq, time_ns: Some(incoming.delivery.time_ns) };
        let bytes = incoming.bytes();
        let target_seq = self.places_ahead().then_some(self.expected_last + 1);
        let token = window.hand_out(source, bytes, read_at, target_seq);
        self.write_reply(token, bytes, now);
        let before = lane.output().len();
        hpub(lane.output(), &self.subject, &self.reply, &self.header, incoming.message.payload);
        let size = self.header.len() + incoming.message.payload.len();
        // Without keyword, blank and the two line ends.
        let line = lane.output().len() - before - size - 9;
        if line > self.longest.0 {
            self.longest = (line, token);
        }
        self.headers_removed += self.removed;
        std::mem::swap(&mut self.last_subject, &mut self.subject);
        if self.places_ahead() {
            self.expected_last += 1;
        }
        self.fence = false;
        self.overlap = self.overlap.saturating_sub(1);
    }

    fn write_header(&mut self, incoming: &Incoming<'_>, now_ns: i64, opens: bool) {
        let delivery = incoming.delivery;
        let age_secs = now_ns.saturating_sub(delivery.time_ns).max(0) as u64 / 1_000_000_000;
        let ids = !self.chained() || self.single || self.overlap > 0;
        let stamp = Stamp {
            chain: (self.chained() || self.fence).then_some(self.expected_last),
            id: if ids { Some(self.id.of(delivery.stream_seq, delivery.time_ns)) } else { None },
        };
        let passage = Passage {
            origin: Origin { seq: delivery.stream_seq, time_ms: delivery.time_ns.div_euclid(1_000_000) },
            age_secs,
            stamp,
            expected_stream: opens.then_some(self.replication.target.stream.as_str()),
        };
        let block = incoming.message.header;
        self.removed = transform::header_block(&mut self.header, block, self.abilities.allowed, &self.tag, &passage);
    }

    fn write_reply(&mut self, token: Token, bytes: usize, now: Instant) {
        self.reply.clear();
        match &mut self.mode {
            Mode::FastIngest { batch, next_id } => {
                let operation = if batch.is_some() { Operation::Append } else { Operation::Start };
                let batch = batch.get_or_insert_with(|| {
                    let id = *next_id;
                    *next_id += 1;
                    OpenBatch {
                        id,
                        first: token,
                        sent: 0,
                        settled: 0,
                        flow: flow(&self.replication.limits, bytes),
                        every: None,
                        opened: now,
                        last_sent: now,
                        last_ack: now,
                        committing: None,
                        refused: None,
                        doubted: false,
                    }
                });
                if batch.sent == batch.settled {
                    batch.last_ack = now;
                }
                batch.sent += 1;
                batch.last_sent = now;
                fast_ingest::reply_subject(&mut self.reply, &self.inbox, batch.id, batch.flow, batch.sent, operation);
            }
            Mode::Pipelined { sent, .. } => {
                *sent += 1;
                let mut number = itoa::Buffer::new();
                self.reply.extend_from_slice(self.inbox.as_bytes());
                self.reply.extend_from_slice(b".");
                self.reply.extend_from_slice(number.format(token).as_bytes());
            }
        }
    }

    /// What would make the server drop the connection or refuse the message is found here, before it is sent, as far as it
    /// can be known.
    fn check(&self, incoming: &Incoming<'_>) -> Result<(), Error> {
        let (size, subject) = (self.header.len() + incoming.message.payload.len(), &self.subject);
        let mut api = None;
        let line = self.line(self.header.len(), size);
        let what = if self.header.len() > MAX_HEADER {
            format!("its headers of {} bytes are longer than {MAX_HEADER}", self.header.len())
        } else if size > self.max_payload {
            format!("its {size} bytes are more than the target's max_payload of {}", self.max_payload)
        } else if let Some(limit) = self.max_msg_size.filter(|limit| size > *limit) {
            api = Some(ApiError { code: 400, err_code: TOO_LARGE, ..ApiError::default() });
            format!("its {size} bytes are more than the target stream's max_msg_size of {limit}")
        } else if line > self.max_line {
            let (subject, limit) = (subject.len(), self.max_line);
            format!(
                "its subject of {subject} bytes is too long: a protocol line of {line} bytes is more than the target's \
                 max_control_line of {limit}"
            )
        } else if subject.is_empty() {
            "its subject is empty after the mapping".to_owned()
        } else if is_request(subject, &self.api_prefix) {
            "its subject is that of a request or an ack, and the target would act on it".to_owned()
        } else {
            return Ok(());
        };
        let message = format!("message {} cannot be stored at the target: {what}", incoming.delivery.stream_seq);
        Err(Error { kind: ErrorKind::Poison, message, api })
    }

    /// Length of the protocol line of the message that was prepared, without its keyword; a byte or two more where its
    /// place in the batch is not known yet.
    fn line(&self, header: usize, size: usize) -> usize {
        let digits = |number: u64| number.checked_ilog10().unwrap_or(0) as usize + 1;
        let reply = match &self.mode {
            // Distance, gap mode, operation, mark and dots beside the numbers.
            Mode::FastIngest { batch, next_id } => {
                let (id, sent) = batch.as_ref().map_or((*next_id, 0), |batch| (batch.id, batch.sent));
                digits(id) + digits(sent + 1) + 3 + 4 + 1 + 3 + 6
            }
            Mode::Pipelined { sent, .. } => digits(sent + 1) + 1,
        };
        self.subject.len() + self.inbox.len() + reply + digits(header as u64) + digits(size as u64) + 3
    }

    /// Takes an ack. What it settles is settled in the window; a refusal is kept until [`Writer::outcome`].
    pub fn accept(&mut self, message: &Message<'_>, window: &mut Window, now: Instant) -> Result<(), RunError> {
        if message.sid != self.sid {
            return Ok(());
        }
        let unavailable = headers::status(message.header) == Some(503);
        match &mut self.mode {
            Mode::FastIngest { batch, .. } => {
                // Acks of a batch that is over are nobody's, but a wrong stream among them must not go unseen.
                let current = batch.as_ref().map(|batch| batch.id);
                // A server may send any subject for a subscription.
                let rest = message.subject.get(self.inbox.len() + 1..).unwrap_or_default();
                let mut words = rest.split(|b| *b == b'.');
                let of_current = words.next().and_then(number) == current;
                // Behind distance and gap mode: whatever is said comes back on the subject of a message.
                let of_message = words.nth(2).and_then(number);
                if unavailable {
                    self.batch_refused(no_responders(), of_message, now);
                } else {
                    self.accept_batch_ack(message.payload, of_current, of_message, window, now)?;
                }
            }
            Mode::Pipelined { .. } => {
                let token = message.subject.rsplit(|b| *b == b'.').next().and_then(number);
                let Some(token) = token else { return Ok(()) };
                let result = if unavailable { Err(no_responders()) } else { self.publish_ack(message.payload) };
                match result {
                    Ok(Published { seq, duplicate }) => {
                        // What is stored now lies behind everything stored before.
                        if !duplicate && seq <= self.known_end(window) {
                            return Err(self.made_anew(seq, window).into());
                        }
                        self.expected_last = self.expected_last.max(seq);
                        self.count(seq);
                        window.settle(token, Some(seq)).map_err(window_error)?;
                        self.log_settled(seq, seq);
                    }
                    // Another stream takes the subject too: whatever else is said about this message, no more may go there.
                    Err(error)
                        if error.is_api(STREAM_NOT_EXPECTED)
                            || error.api.is_none() && error.kind == ErrorKind::Hold =>
                    {
                        let unheard = window.source_of(token).map(|source| source.seq);
                        return Err(RunError { unheard, ..error.into() });
                    }
                    Err(error) => {
                        self.refused += 1;
                        self.unstored += 1;
                        let Mode::Pipelined { refused, for_good, .. } = &mut self.mode else { return Ok(()) };
                        if error.kind == ErrorKind::Poison {
                            for_good.push((token, error.clone()));
                        }
                        if refused.as_ref().is_none_or(|(oldest, _)| token < *oldest) {
                            *refused = Some((token, error));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Counts a message of ours at this place; also what a run before sent and what arrived behind the start of this
    /// one.
    fn count(&mut self, seq: u64) {
        let Mode::Pipelined { stored, .. } = &mut self.mode else { return };
        *stored += u64::from(seq > self.exact);
        if self.exact + *stored == self.expected_last {
            (self.exact, *stored) = (self.expected_last, 0);
        }
    }

    /// Up to here, as far as sequences tell, the target holds nothing but messages of ours that it confirmed.
    pub fn adds_up_to(&self) -> u64 {
        let counts = matches!(self.mode, Mode::Pipelined { .. }) && self.abilities.mode == TargetMode::Exclusive;
        if counts && self.exact != self.expected_last { self.exact } else { u64::MAX }
    }

    /// Behind this place at the target somebody else may have written, and nowhere before it since the run began.
    pub fn exact(&self, window: &Window) -> u64 {
        match self.mode {
            Mode::FastIngest { .. } => self.known_end(window),
            Mode::Pipelined { .. } => self.exact,
        }
    }

    fn publish_ack(&self, payload: &[u8]) -> Result<Published, Error> {
        let ack = PublishAck::parse(payload, "the target").map_err(|error| self.explained(error))?;
        self.expect_stream(&ack.stream, ack.domain.as_deref())?;
        if ack.seq == 0 {
            // 2.10 answers so for an id whose message is not stored yet: that proves nothing.
            return Err(Error::retry("the target acknowledged a duplicate that it has not stored yet"));
        }
        Ok(Published { seq: ack.seq, duplicate: ack.duplicate })
    }

    /// What a refusal means here.
    fn explained(&self, error: impl Into<Error>) -> Error {
        let error = error.into();
        if !error.is_api(STREAM_NOT_EXPECTED) {
            return error;
        }
        let target = &self.replication.target.stream;
        error.context(format!("another stream than target stream `{target}` listens on the same subjects"))
    }

    /// The highest target sequence that is known to have been stored.
    fn known_end(&self, window: &Window) -> u64 {
        self.floor.max(window.target().map_or(0, |target| target.seq))
    }

    fn made_anew(&self, seq: u64, window: &Window) -> Error {
        let before = self.known_end(window);
        Error::retry(format!("the target stored a message at sequence {seq}, though it had {before} before"))
    }

    /// Only the target's own ack counts: over leafnodes a second stream may take the subject too.
    fn expect_stream(&self, stream: &str, domain: Option<&str>) -> Result<(), Error> {
        let target = &self.replication.target.stream;
        // A server tells its domain, if it has one, in the state of a stream as in every ack.
        if stream == target && domain == self.domain.as_deref() {
            return Ok(());
        }
        let place = match (domain, &self.domain) {
            (Some(domain), _) => format!(" of domain `{domain}`"),
            (None, Some(_)) => " of a server without a domain".to_owned(),
            (None, None) => String::new(),
        };
        Err(Error::hold(format!(
            "stream `{stream}`{place} acknowledged a message for target stream `{target}`: it listens on the same subjects"
        )))
    }

    fn accept_batch_ack(
        &mut self,
        payload: &[u8],
        of_current: bool,
        of_message: Option<u64>,
        window: &mut Window,
        now: Instant,
    ) -> Result<(), RunError> {
        let ack = fast_ingest::parse_ack(payload).map_err(|what| Error::retry(format!("the target sent {what}")))?;
        match ack {
            Ack::End { stream, domain, .. } if !of_current => self.expect_stream(&stream, domain.as_deref())?,
            Ack::Failed { error: Some(error), .. } if !of_current && error.err_code == STREAM_NOT_EXPECTED => {
                return Err(self.explained(error).into());
            }
            _ if !of_current => {}
            Ack::Progress { sequence, every } => {
                let Mode::FastIngest { batch: Some(batch), .. } = &mut self.mode else { return Ok(()) };
                // The answer to the start comes once. Only the end of a batch names the stream that stored it.
                batch.doubted |= sequence == 0 && batch.every.is_some();
                batch.every = Some(every);
                batch.last_ack = now;
                if !batch.doubted && !self.unproven {
                    let settled = settle_batch(batch, sequence, window)?;
                    self.log_batch(settled, window);
                }
            }
            Ack::Failed { error: Some(error), sequence } => {
                self.batch_refused(self.explained(error), sequence.or(of_message), now);
            }
            Ack::Failed { error: None, .. } => {
                let error = Error::retry("a message of the batch went missing on its way to the target");
                self.batch_refused(error, None, now);
            }
            Ack::End { stream, domain, stream_sequence, count } => {
                self.expect_stream(&stream, domain.as_deref())?;
                self.end_batch(stream_sequence, count, window)?;
            }
        }
        Ok(())
    }

    fn batch_refused(&mut self, error: Error, sequence: Option<u64>, now: Instant) {
        let Mode::FastIngest { batch: Some(batch), .. } = &mut self.mode else { return };
        if batch.refused.is_none() {
            self.refused += 1;
            batch.refused = Some(Refused { error, at: now, sequence });
        }
    }

    fn end_batch(&mut self, stream_sequence: u64, count: u64, window: &mut Window) -> Result<(), RunError> {
        let Mode::FastIngest { batch: slot, .. } = &mut self.mode else { return Ok(()) };
        let Some(mut batch) = slot.take() else { return Ok(()) };
        self.unproven = false;
        let shared = self.abilities.mode == TargetMode::Shared;
        // On an exclusive target the chain would have told. Of a batch of duplicates the end may be an old place.
        // Without a place nothing was stored: all of it lay there already.
        let placed = stream_sequence > 0;
        if shared && placed && batch.refused.is_none() && count > 0 && stream_sequence < self.known_end(window) {
            return Err(self.made_anew(stream_sequence, window).into());
        }
        // Nothing settles by an id alone where the chain says that it was not stored.
        if !shared && batch.refused.is_none() && count >= batch.sent && stream_sequence != self.expected_last {
            let expected = self.expected_last;
            let text = format!("the batch ended at target sequence {stream_sequence}, not at {expected}");
            return Err(Error::retry(text).into());
        }
        // The commit message itself is no message of the window.
        let count = count.min(batch.sent);
        let settled = settle_batch(&mut batch, count, window)?;
        self.log_batch(settled, window);
        if let Some(Refused { error, .. }) = batch.refused {
            if error.api.is_some() && count == batch.sent {
                let target = &self.replication.target.stream;
                let text = format!(
                    "another stream than target stream `{target}` listens on the same subjects: it refused what the target \
                     stored: {error}"
                );
                return Err(Error::hold(text).into());
            }
            return Err(refusal(error, window.source_of(batch.first + batch.settled)));
        }
        if batch.settled < batch.sent {
            return Err(Error::retry("the target ended the batch before its end").into());
        }
        if shared {
            if placed {
                window.place(batch.first + batch.sent - 1, stream_sequence);
                self.log_settled(stream_sequence, stream_sequence);
            }
            self.expected_last = self.expected_last.max(stream_sequence);
        }
        Ok(())
    }

    /// Logs what an ack inside a batch settled, where the chain says which places that are.
    fn log_batch(&self, settled: Range<Token>, window: &Window) {
        let first = window.place_of(settled.start);
        let last = settled.end.checked_sub(1).and_then(|token| window.place_of(token));
        if let (false, Some(first), Some(last)) = (settled.is_empty(), first, last) {
            self.log_settled(first, last);
        }
    }

    /// One line for each ack: under which epoch it settled which target sequences (docs/operations.md). Nothing reads it but
    /// people and tests, who hold one instance against the other by it.
    fn log_settled(&self, first: u64, last: u64) {
        trace!(target: "stream_replicator::settled", replication = self.replication.id, epoch = self.epoch, first, last);
    }

    /// Whether the target owes an ack for what was sent: of a batch it sends one every so many messages only, so that
    /// over a slow way none may come for long.
    pub fn is_owed(&self, window: &Window) -> bool {
        match &self.mode {
            Mode::FastIngest { batch: None, .. } => false,
            Mode::FastIngest { batch: Some(batch), .. } => {
                let distance = batch.every.map_or(0, u64::from);
                batch.committing.is_some() || batch.sent - batch.settled >= distance
            }
            Mode::Pipelined { .. } => !window.is_empty(),
        }
    }

    /// Whether the run has to end because the target refused something, or somebody else wrote to it.
    /// `drained` is when the target last took some of what waited on the way there.
    pub fn outcome(&mut self, window: &Window, drained: Instant, now: Instant) -> Result<(), RunError> {
        match &mut self.mode {
            // Every sequence is that of a message which we sent.
            Mode::Pipelined { stored, .. }
                if self.abilities.mode == TargetMode::Exclusive
                    && self.expected_last > self.exact + *stored + window.len() as u64 =>
            {
                let (last, ours) = (self.expected_last, self.exact + *stored);
                let message = format!("the target's last sequence is {last} where our messages would make it {ours}");
                Err(Error { kind: ErrorKind::ChainBroken, message, api: None }.into())
            }
            // A batch whose first message was refused never began, and has no end.
            Mode::FastIngest { batch: Some(OpenBatch { refused: Some(refused), first, .. }), .. }
                if refused.sequence == Some(1) || now.duration_since(refused.at) > END_WAIT =>
            {
                // Without the end, and without its sequence, nobody knows which message it was.
                let token = refused.sequence.and_then(|sequence| (*first + sequence).checked_sub(1));
                Err(refusal(refused.error.clone(), token.and_then(|token| window.source_of(token))))
            }
            Mode::FastIngest { batch: Some(OpenBatch { committing: Some(at), last_ack, .. }), .. }
                if now.duration_since(drained.max(*last_ack).max(*at)) > COMMIT_WAIT =>
            {
                Err(RunError::stalled(format!("the target has not confirmed the end of a batch for {COMMIT_WAIT:?}")))
            }
            // What is in the air behind a refusal settles first: it will be found at the target otherwise.
            Mode::Pipelined { refused: Some((token, error)), for_good, .. } if window.in_air() <= self.unstored => {
                let all = for_good.drain(..).flat_map(|(token, error)| refusal(error, window.source_of(token)).refused);
                Err(RunError { refused: all.collect(), ..refusal(error.clone(), window.source_of(*token)) })
            }
            _ => Ok(()),
        }
    }

    /// When [`Writer::commit_if_due`] wants to be called next; `None` while nothing is open.
    pub fn next_commit(&self, supply: Supply) -> Option<Instant> {
        let Mode::FastIngest { batch: Some(batch), .. } = &self.mode else { return None };
        if batch.committing.is_some() {
            return None;
        }
        if let Some(refused) = &batch.refused {
            // Where the refused message was the last one, nothing but a commit makes the server end the batch.
            return Some(refused.at);
        }
        if self.unproven || batch.doubted {
            return Some(batch.last_sent);
        }
        let ack_is_due = batch.sent - batch.settled >= u64::from(batch.every.unwrap_or(batch.flow));
        let mut due = match supply {
            // Nothing more may be sent, and no ack comes by itself that would change that.
            Supply::Barred if !ack_is_due && batch.every.is_some() => Some(batch.last_sent),
            // The ack is on its way, however long that is: a commit would only cost one more.
            Supply::Coming | Supply::Barred if ack_is_due => None,
            Supply::Coming | Supply::Barred => Some(batch.last_sent + COMMIT_AFTER),
            Supply::Dry => Some(batch.last_sent + COMMIT_IDLE),
        };
        if !ack_is_due && batch.sent > batch.settled {
            due = due.map(|at| at.min(batch.last_ack + COMMIT_AFTER));
        }
        if self.abilities.mode == TargetMode::Shared {
            let shared = batch.opened + COMMIT_SHARED;
            due = Some(due.map_or(shared, |at| at.min(shared)));
        }
        due
    }

    /// Commits an open batch that has nothing more to send for now, or whose last messages wait too long.
    pub fn commit_if_due(&mut self, lane: &mut Lane, supply: Supply, now: Instant) {
        if self.next_commit(supply).is_some_and(|at| at <= now) {
            self.commit(lane, now);
        }
    }

    /// Ends the open batch, if there is one, so that everything sent so far gets an ack.
    pub fn commit(&mut self, lane: &mut Lane, now: Instant) {
        let Mode::FastIngest { batch: Some(batch), .. } = &mut self.mode else { return };
        if batch.committing.replace(now).is_some() {
            return;
        }
        self.reply.clear();
        let last = batch.sent + 1;
        fast_ingest::reply_subject(&mut self.reply, &self.inbox, batch.id, batch.flow, last, Operation::Commit);
        let out = lane.output();
        out.extend_from_slice(b"PUB ");
        out.extend_from_slice(&self.last_subject);
        out.extend_from_slice(b" ");
        out.extend_from_slice(&self.reply);
        out.extend_from_slice(b" 0\r\n\r\n");
    }
}

/// Distance between acks to ask for: several fit into what may be in the air, whatever the size of the messages.
fn flow(limits: &Limits, message_bytes: usize) -> u32 {
    let messages = limits.messages_in_flight.min(limits.bytes_in_flight / message_bytes.max(1));
    FLOW.min(u32::try_from(messages / 4).unwrap_or(FLOW)).max(1)
}

/// Whether a server would act on what is published there, with the rights of our login, instead of storing it. No stream
/// has such messages unless it stores everything, but a server may deliver any.
fn is_request(subject: &[u8], api_prefix: &str) -> bool {
    // Keys of buckets and the like may go through the same prefix.
    let acts = |word: Option<&[u8]>| word.is_some_and(|word| REQUESTS.contains(&word));
    if let Some(rest) = subject.strip_prefix(b"$JS.") {
        let mut words = rest.split(|byte| *byte == b'.');
        return match words.next() {
            Some(b"ACK" | b"FC") => true,
            Some(b"API") => acts(words.next()),
            // Of a domain.
            _ => words.next() == Some(b"API") && acts(words.next()),
        };
    }
    let rest = subject.strip_prefix(api_prefix.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
    rest.is_some_and(|rest| acts(rest.split(|byte| *byte == b'.').next()))
}

fn no_responders() -> Error {
    let message = "no stream stores messages for the target at the moment (no responders)".to_owned();
    Error { kind: ErrorKind::NoResponders, message, api: None }
}

/// Whether a refusal may mean that the target does not listen on the subject.
fn is_unheard(error: &Error) -> bool {
    error.is_api(STREAM_NOT_EXPECTED) || error.kind == ErrorKind::NoResponders
}

/// Settles a batch up to and with this sequence of it; returns what that settled.
fn settle_batch(batch: &mut OpenBatch, sequence: u64, window: &mut Window) -> Result<Range<Token>, Error> {
    let first = batch.first + batch.settled;
    if sequence > batch.settled {
        if sequence > batch.sent {
            return Err(Error::retry(format!(
                "the target acknowledged message {sequence} of a batch of {}",
                batch.sent
            )));
        }
        batch.settled = sequence;
        window.settle_through(batch.first + sequence - 1).map_err(window_error)?;
    }
    Ok(first..batch.first + batch.settled)
}

pub(super) fn hpub(out: &mut BytesMut, subject: &[u8], reply: &[u8], header: &[u8], payload: &[u8]) {
    let mut number = itoa::Buffer::new();
    out.reserve(subject.len() + reply.len() + header.len() + payload.len() + 64);
    out.extend_from_slice(b"HPUB ");
    out.extend_from_slice(subject);
    out.extend_from_slice(b" ");
    out.extend_from_slice(reply);
    out.extend_from_slice(b" ");
    out.extend_from_slice(number.format(header.len()).as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(number.format(header.len() + payload.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(header);
    out.extend_from_slice(payload);
    out.extend_from_slice(b"\r\n");
}

/// Names the message that a refusal is about.
fn refusal(error: Error, source: Option<SourcePoint>) -> RunError {
    let unheard = source.filter(|_| is_unheard(&error)).map(|source| source.seq);
    let error = match source {
        Some(source) => error.context(format!("the target refused the message with source sequence {}", source.seq)),
        None => error.context("the target refused a message"),
    };
    let error = about(error, source);
    let refused: Option<Refusal> = error.poison.map(|message| (message, error.message.clone()));
    RunError { refused: refused.into_iter().collect(), unheard, ..error }
}

/// An error about one message: poison, if it says that the message can never be stored.
pub(super) fn about(error: Error, source: Option<SourcePoint>) -> RunError {
    let poison = source.filter(|_| error.kind == ErrorKind::Poison);
    RunError { poison: poison.and_then(named), ..error.into() }
}

fn named(source: SourcePoint) -> Option<SourceMessage> {
    Some(SourceMessage { seq: source.seq, time_ns: source.time_ns? })
}

/// Makes ids of messages: neither a stream made anew or rolled back (other stored times) nor a second replication
/// of the same stream can make the same one, nor what is copied again after the position was moved back.
#[derive(Debug)]
pub(super) struct MessageId {
    key: Vec<u8>,
    prefix: usize,
    text: String,
}

impl MessageId {
    pub fn new(replication: &str, stream: &str, generation: u64) -> Self {
        let mut key = [replication.as_bytes(), b"\0", stream.as_bytes(), b"\0"].concat();
        if generation > 0 {
            key.extend_from_slice(&generation.to_be_bytes());
        }
        Self { prefix: key.len(), key, text: String::with_capacity(32) }
    }

    /// The id of one message.
    pub fn of(&mut self, seq: u64, time_ns: i64) -> &str {
        self.key.truncate(self.prefix);
        self.key.extend_from_slice(&seq.to_be_bytes());
        self.key.extend_from_slice(&time_ns.to_be_bytes());
        self.text.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{:032x}", xxh3_128(&self.key));
        &self.text
    }
}

#[cfg(test)]
mod acks;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_messages_by_their_subject() {
        let check = |subject: &str, prefix: &str, expect: bool| {
            assert_eq!(is_request(subject.as_bytes(), prefix), expect, "{subject}");
        };
        for subject in ["$JS.API.STREAM.DELETE.T", "$JS.hub.API.INFO", "$JS.ACK.S.C.1.1.1.1.0", "$JS.FC.S.C.x"] {
            check(subject, "$JS.API", true);
        }
        check("owner.js.STREAM.DELETE.T", "owner.js", true);
        for subject in [
            "$JS.EVENT.ADVISORY.API",
            "$JSX.a",
            "$KV.B.k",
            "$O.B.M.x",
            "a.$JS.API.INFO",
            "owner.json",
            "$JS",
            "$JS.hub.API.$KV.B.k",
            "owner.js.$KV.B.INFO",
            "owner.js",
        ] {
            check(subject, "owner.js", false);
        }
    }

    #[test]
    fn ids_differ_in_every_part_and_stay_the_same() {
        let id = |replication: &str, stream: &str, generation, seq, time| {
            MessageId::new(replication, stream, generation).of(seq, time).to_owned()
        };
        let one = id("A", "S", 0, 1, 2);
        // The value is part of the contract: another program version must make the same one.
        assert_eq!(one, id("A", "S", 0, 1, 2));
        for other in [
            id("B", "S", 0, 1, 2),
            id("A", "T", 0, 1, 2),
            id("A", "S", 1, 1, 2),
            id("A", "S", 0, 2, 2),
            id("A", "S", 0, 1, 3),
        ] {
            assert_ne!(one, other);
        }
    }
}
