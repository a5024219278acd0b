//! Reads a stream in order from a pull consumer of its own: ephemeral, without acks, in memory. The position is ours,
//! the server keeps no state that matters. Two overlapping pulls keep the messages flowing; the bytes that are
//! requested and not yet taken are bounded.
//!
//! * Deliveries of one consumer are numbered without holes, and its heartbeats name the last one. So the loss of any
//!   delivery is detected, also of the last.
//! * A message from a stream has a reply subject that begins with `$JS.ACK.`; only what has none is a status. Servers
//!   up to 2.11 store messages whose first header line has a status.
//! * A pull whose bytes are too few for the next message ends with status 409, each time. So the next pull is larger.

pub(in crate::copy) mod explicit;
mod jumps;
pub(in crate::copy) mod pushed;
mod stash;

use std::{collections::VecDeque, time::Duration};

use serde_json::json;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use self::stash::Stash;
use nats_lane::{
    Batch, Error, Lane, Message, Turn, entropy as chance, excerpt, headers,
    jetstream::{
        Api, CONSUMER_EXISTS, ConsumerInfo, Delivery, StoredMessage, TOO_MANY_CONSUMERS, is_delivery, parse_delivery,
    },
    parser::number,
};

use crate::copy::{
    flow::{
        budget::{Budget, PIECE_MIN, Reservation},
        window::{MessageSize, SourcePoint},
    },
    source::consumers::{ConsumerLabels, Names},
};

/// Interval of the server's heartbeats while it has no message to deliver.
const HEARTBEAT: Duration = Duration::from_millis(2500);
/// Silence after which a scan, or the reading of a durable consumer, is given up.
const SILENCE: Duration = Duration::from_secs(6);
/// How often the consumer of a single read is checked for silence.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How long no byte may arrive during the creation of a consumer before another name is tried, and how often.
const PLACED: Duration = Duration::from_secs(2);
const ELSEWHERE: u32 = 2;
/// A cluster may count a consumer for a moment after it was deleted: how long to wait before the next try, and how
/// often.
const COUNTED: Duration = Duration::from_millis(100);
const COUNTED_AGAIN: u32 = 5;
/// Expiry of a pull that got no message.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// The same for redeliveries, which are available at once.
const BACK_EXPIRES: Duration = Duration::from_secs(2);
/// How long the server keeps a consumer without a pull.
const INACTIVE: Duration = Duration::from_secs(45);
/// Growth of the next pull after one that was smaller than one message.
const PIECE_STEP: usize = 4;
/// How much larger than the last large message the next one may be, bytes.
const BESIDE_LARGE: usize = 64 * 1024;
/// Upper bound of a message with its subjects and headers, bytes.
const PIECE_LARGEST: usize = 66 << 20;

/// Size of the first pull where messages wait already, bytes.
const PIECE_BACKLOG: usize = 1 << 20;

/// The range to read.
#[derive(Debug, Clone)]
pub(crate) struct Range<'a> {
    /// The stream.
    pub stream: &'a str,
    /// Only subjects that match one of these; empty for all.
    pub filters: &'a [String],
    /// The first sequence wanted.
    pub from: u64,
    /// Without payloads.
    pub headers_only: bool,
}

/// One message read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    /// Its position in the stream, and the number of the following messages.
    pub delivery: Delivery,
    /// The sequence before the first one that this message stands for: messages in between were filtered or
    /// removed.
    pub after: u64,
    /// Subject, headers and payload.
    pub message: Message<'a>,
}

impl Incoming<'_> {
    /// Bytes of subject, headers and payload.
    pub fn bytes(&self) -> usize {
        self.message.subject.len() + self.message.header.len() + self.message.payload.len()
    }

    /// The same, and what of it is payload.
    pub fn size(&self) -> MessageSize {
        MessageSize { bytes: self.bytes(), payload: self.message.payload.len() }
    }
}

/// Why a consumer is no longer usable.
#[derive(Debug)]
pub(crate) struct Lost {
    /// The observation.
    pub error: Error,
    /// No pull was open for longer than the server keeps an idle consumer: not an error.
    pub forgotten: bool,
}

impl From<Error> for Lost {
    fn from(error: Error) -> Self {
        Self { error, forgotten: false }
    }
}

#[derive(Debug)]
struct Pull {
    id: u64,
    bytes: usize,
}

/// Reads one range of a stream.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: String,
    consumer: String,
    sid: u64,
    inbox: String,
    pulls: VecDeque<Pull>,
    next_pull: u64,
    /// Bytes of open pulls that the server has not used, by its own way of counting.
    unspent: i64,
    /// Size of the next pull; grows while the server uses the whole size.
    piece: usize,
    piece_max: usize,
    /// Known least size of the next message; 0 where unknown.
    need: usize,
    /// Size of the newest message, if it is larger than a piece; 0 otherwise. The next one may be as large, and a pull that
    /// is smaller costs a round trip.
    large: usize,
    /// Whether a message that is larger than a piece is requested before the one before it was sent.
    large_ahead: bool,
    stash: Stash,
    reserved: Option<Reservation>,
    consumer_seq: u64,
    accepted: u64,
    pending: u64,
    /// Redeliveries that come first: only that many are requested, by one pull at a time; 0 for none.
    owed: u64,
    heard: Instant,
    /// When a pull was last open.
    asked: Instant,
    /// When the last pull was sent.
    sent: Instant,
    /// How long the server received no pull before the present ones; zero once one of them got a message.
    rested: Duration,
    /// How long the server keeps the consumer without a pull.
    inactive: Duration,
    abandoned: bool,
}

impl Range<'_> {
    /// How a consumer of this range is configured.
    pub fn config(&self, name: &str, labels: &ConsumerLabels) -> serde_json::Value {
        let mut config = json!({
            "name": name,
            "description": "stream-replicator",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.from.max(1),
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": INACTIVE.as_nanos() as u64,
            "num_replicas": 1,
            "mem_storage": true,
            "headers_only": self.headers_only,
            // Unlike any other: a run that was superseded must not mistake its successor's consumer for its own.
            "metadata": { "run": chance::name() },
        });
        match self.filters {
            [] => {}
            [filter] => config["filter_subject"] = filter.as_str().into(),
            filters => config["filter_subjects"] = filters.into(),
        }
        labels.put(&mut config);
        config
    }
}

impl Reader {
    /// Creates the consumer. `bytes` bounds the bytes read ahead (but one message always passes).
    pub async fn open(lane: &mut Lane, range: &Range<'_>, names: &mut Names, bytes: usize) -> Result<Self, Error> {
        let (mut left, mut counted) = (ELSEWHERE, COUNTED_AGAIN);
        loop {
            let consumer = names.next();
            let config = range.config(&consumer, names.labels());
            let created = Api::new(lane).create_new_consumer_within(range.stream, &consumer, &config, PLACED).await;
            // If a cluster assigned the consumer to a server that does not answer, another name is tried.
            let info = match created {
                Err(error) if error.is_api(TOO_MANY_CONSUMERS) && counted > 0 => {
                    counted -= 1;
                    sleep(COUNTED).await;
                    continue;
                }
                // Being deleted, or of a run that does not know yet that it was superseded.
                Err(error) if error.is_api(CONSUMER_EXISTS) && left > 0 => {
                    left -= 1;
                    continue;
                }
                Err(error) => return Err(error),
                Ok(Some(info)) => info,
                // It may still be created.
                Ok(None) => {
                    delete(lane, range.stream, &consumer);
                    if left > 0 {
                        left -= 1;
                        continue;
                    }
                    let stream = range.stream;
                    return Err(Error::retry(format!("no consumer of stream `{stream}` was made within {PLACED:?}")));
                }
            };
            return Ok(Self::from_new(lane, range, consumer, bytes, &info));
        }
    }

    /// Reads from a consumer that was just created for this range.
    pub fn from_new(lane: &mut Lane, range: &Range<'_>, consumer: String, bytes: usize, info: &ConsumerInfo) -> Self {
        let before = range.from.max(1) - 1;
        Self { accepted: before, ..Self::from_existing(lane, range.stream, consumer, before, info, bytes) }
    }

    /// Reads from an existing consumer, after its last delivery; the message after `after` comes next.
    fn from_existing(
        lane: &mut Lane,
        stream: &str,
        consumer: String,
        after: u64,
        info: &ConsumerInfo,
        bytes: usize,
    ) -> Self {
        let (sid, inbox) = lane.open_inbox();
        let piece_max = (bytes / 2).max(PIECE_MIN);
        let now = Instant::now();
        Self {
            stream: stream.to_owned(),
            consumer,
            sid,
            inbox,
            pulls: VecDeque::new(),
            next_pull: 0,
            unspent: 0,
            // A backlog is requested in large pieces at once.
            piece: if info.num_pending + info.num_ack_pending > 0 { PIECE_BACKLOG.min(piece_max) } else { PIECE_MIN },
            piece_max,
            need: 0,
            large: 0,
            large_ahead: false,
            stash: Stash::new(after),
            reserved: None,
            consumer_seq: info.delivered.consumer_seq,
            accepted: 0,
            pending: info.num_pending,
            owed: 0,
            heard: now,
            asked: now,
            sent: now,
            rested: Duration::ZERO,
            inactive: inactive(&info.config),
            abandoned: false,
        }
    }

    /// Messages of this size are likely, in bytes: the first pull has room for one.
    pub fn expect(&mut self, size: usize) {
        self.large = if size > self.piece { (size + BESIDE_LARGE).min(PIECE_LARGEST) } else { 0 };
    }

    /// Whether a large message may be requested while one arrives; to be set while those that were read are sent at once.
    pub fn set_large_ahead(&mut self, ahead: bool) {
        self.large_ahead = ahead;
    }

    /// The consumer is no longer usable: messages that were read and not taken are dropped, and no more are requested.
    /// Returns the request that deletes it.
    pub fn abandon(&mut self, lane: &mut Lane) -> String {
        self.pending = self.pending();
        self.stash = Stash::new(self.accepted);
        self.pulls.clear();
        self.unspent = 0;
        self.reserved = None;
        self.abandoned = true;
        self.end(lane)
    }

    /// Whether the server owes deliveries, or signs of life.
    pub fn is_asking(&self) -> bool {
        !self.pulls.is_empty()
    }

    /// When the consumer gave its last sign of life, or the first was requested after an idle time.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Name of the consumer.
    pub fn consumer(&self) -> &str {
        &self.consumer
    }

    /// The newest source sequence that was delivered.
    pub fn delivered(&self) -> u64 {
        self.accepted
    }

    /// How many messages its consumer delivered. A consumer with filters counts the stream's sequences that it passed over as
    /// delivered, and no message of them arrives.
    pub fn deliveries(&self) -> u64 {
        self.consumer_seq
    }

    /// Corrects the number of messages that wait after the newest one delivered.
    pub fn correct_pending(&mut self, pending: u64) {
        self.pending = pending;
    }

    /// Messages of the stream that match and are not taken yet, by the last report.
    pub fn pending(&self) -> u64 {
        self.pending + self.stash.len() as u64
    }

    /// A sequence that the stream reached: each message that waits after the newest one
    /// delivered has a sequence of its own.
    pub fn seen(&self) -> u64 {
        if self.abandoned { 0 } else { self.accepted + self.pending }
    }

    /// The oldest message that was read and not taken.
    pub fn next(&self) -> Option<SourcePoint> {
        self.stash.next()
    }

    /// Handles a batch that the lane received; messages for other subscriptions are ignored.
    pub fn accept(&mut self, batch: Batch) -> Result<(), Lost> {
        let mut accepted = self.accepted;
        let outcome = self.accept_if(batch, |delivery| {
            let before = std::mem::replace(&mut accepted, delivery.stream_seq);
            if delivery.stream_seq <= before { DeliveryVerdict::Wrong(before) } else { DeliveryVerdict::Keep }
        });
        self.accepted = accepted;
        outcome
    }

    /// The same for deliveries whose order the caller judges.
    fn accept_if(&mut self, batch: Batch, mut judge: impl FnMut(&Delivery) -> DeliveryVerdict) -> Result<(), Lost> {
        if self.abandoned {
            return Ok(());
        }
        let now = Instant::now();
        let mut items = Vec::with_capacity(batch.len());
        for (index, message) in batch.iter().enumerate() {
            if message.sid != self.sid {
                continue;
            }
            self.heard = now;
            if !is_delivery(message.reply) {
                self.status(&message)?;
                continue;
            }
            let delivery = self.delivery(&message)?;
            match judge(&delivery) {
                DeliveryVerdict::Keep => items.push((index as u32, delivery)),
                DeliveryVerdict::Drop => {}
                DeliveryVerdict::Wrong(before) => {
                    return Err(not_contiguous(&self.stream, &delivery, self.consumer_seq, before).into());
                }
            }
        }
        self.stash.push(batch, items);
        Ok(())
    }

    fn delivery(&mut self, message: &Message<'_>) -> Result<Delivery, Error> {
        self.rested = Duration::ZERO;
        let delivery = next_delivery(&self.stream, message, &mut self.consumer_seq)?;
        self.pending = delivery.pending;
        self.need = 0;
        // The server counts the same parts against max_bytes.
        let parts = [message.subject, message.reply, message.header, message.payload];
        let size: usize = parts.iter().map(|part| part.len()).sum();
        self.unspent -= size as i64;
        self.large = if size > self.piece { size + BESIDE_LARGE } else { 0 };
        if self.unspent <= 0 {
            // A pull that is used up to the last byte may end without a status.
            self.pulls.clear();
            self.unspent = 0;
            self.grow();
        }
        Ok(delivery)
    }

    fn status(&mut self, message: &Message<'_>) -> Result<(), Lost> {
        let text = headers::status_text(message.header);
        match headers::status(message.header) {
            Some(100) => {
                self.rested = Duration::ZERO;
                Ok(heartbeat(&self.stream, message, self.consumer_seq)?)
            }
            Some(404 | 408) => {
                if self.end_pull(message).is_some() {
                    // No message came until it expired: pending messages were removed, and little need be reserved.
                    self.pending = 0;
                    self.piece = PIECE_MIN;
                }
                Ok(())
            }
            Some(409) if text.contains("Batch Completed") => {
                self.end_pull(message);
                self.grow();
                Ok(())
            }
            Some(409) if text.contains("MaxBytes") => {
                match self.end_pull(message) {
                    // The next message is larger than the whole pull.
                    Some(bytes) => self.need = self.need.max((bytes * PIECE_STEP).min(PIECE_LARGEST)),
                    None => self.grow(),
                }
                Ok(())
            }
            Some(code) => {
                let error = Error::of_status(&self.stream, code, &text);
                // A little before that the answer to a pull may cross its end.
                let forgotten = code == 503 && self.rested >= self.inactive * 8 / 9;
                Err(Lost { error, forgotten })
            }
            None => {
                Err(Error::retry(format!("consumer of stream `{}` sent a message that is none", self.stream)).into())
            }
        }
    }

    /// Removes a pull from the list; returns its bytes if none of them were used.
    fn end_pull(&mut self, message: &Message<'_>) -> Option<usize> {
        let id = message.subject.rsplit(|b| *b == b'.').next().and_then(number);
        let index = self.pulls.iter().position(|pull| Some(pull.id) == id)?;
        let pull = self.pulls.remove(index)?;
        let left = headers::last(message.header, b"Nats-Pending-Bytes").and_then(number).unwrap_or(pull.bytes as u64);
        self.unspent -= left as i64;
        if self.pulls.is_empty() || self.unspent <= 0 {
            // The rest of the list was used up to the last byte and ended without a status.
            self.pulls.clear();
            self.unspent = 0;
        }
        (left == pull.bytes as u64).then_some(pull.bytes)
    }

    fn grow(&mut self) {
        self.piece = (self.piece * 2).min(self.piece_max);
    }

    /// The next message, if one was read; [`Reader::take`] removes it.
    pub fn peek(&self) -> Option<Incoming<'_>> {
        self.stash.peek()
    }

    /// Removes the message that [`Reader::peek`] shows.
    pub fn take(&mut self) {
        self.stash.take();
    }

    /// Requests more where that is due: two pulls while there is a backlog, one otherwise.
    pub fn pull(&mut self, lane: &mut Lane, budget: &Budget) {
        if self.abandoned {
            return;
        }
        let now = Instant::now();
        if !self.pulls.is_empty() {
            self.asked = now;
        }
        let open: usize = self.pulls.iter().map(|pull| pull.bytes).sum();
        if let Some(reserved) = &mut self.reserved {
            reserved.shrink_to(open + self.stash.bytes());
        }
        let wanted = if self.pending > 0 && self.owed == 0 { 2 } else { 1 };
        while self.pulls.len() < wanted {
            let held: usize = self.pulls.iter().map(|pull| pull.bytes).sum::<usize>() + self.stash.bytes();
            let next = self.next_piece();
            // A large message is requested while the one before arrives: on a long line that is the time of a round trip. Not
            // where it is larger than all that may be requested: that bound may be what the server lets wait.
            let bytes = self.piece_max * 2;
            let most = if self.large_ahead && next <= bytes { bytes.max(next * 2) } else { bytes };
            if held > 0 && held + next > most {
                break;
            }
            let Some(bytes) = self.reserve(budget, held == 0) else { break };
            if self.pulls.is_empty() {
                // No sign of life was owed until now.
                self.heard = now;
                self.rested = now.duration_since(self.asked);
                self.asked = now;
            }
            // While a large message arrives, pulls end, and the status of that is queued after it.
            self.rested = self.rested.max(now.duration_since(self.sent));
            self.sent = now;
            self.next_pull += 1;
            let subject = format!("{}.CONSUMER.MSG.NEXT.{}.{}", lane.api_prefix(), self.stream, self.consumer);
            // Must not be the limit that ends a pull: each message counts at least its reply subject.
            let batch = bytes as u64 / 32;
            let request = if self.owed > 0 {
                let expires = BACK_EXPIRES.as_nanos() as u64;
                json!({ "batch": batch.min(self.owed), "max_bytes": bytes, "expires": expires })
            } else {
                json!({
                    "batch": batch,
                    "max_bytes": bytes,
                    "expires": PULL_EXPIRES.as_nanos() as u64,
                    "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
                })
            };
            lane.publish(&subject, &format!("{}.{}", self.inbox, self.next_pull), request.to_string().as_bytes());
            self.pulls.push_back(Pull { id: self.next_pull, bytes });
            self.unspent += bytes as i64;
        }
    }

    /// Bytes that the next pull requests, if there is room.
    fn next_piece(&self) -> usize {
        self.piece.max(self.need).max(self.large)
    }

    /// Reserves bytes for the next pull: a piece, or the smallest useful one when the process is short of memory. A
    /// reader without messages always gets that, so that none starves.
    fn reserve(&mut self, budget: &Budget, holds_nothing: bool) -> Option<usize> {
        let least = self.need.max(self.large).max(PIECE_MIN);
        let reservation = match budget.reserve(self.next_piece().max(least)) {
            Some(reservation) => reservation,
            None if holds_nothing => budget.force(least),
            None if least == PIECE_MIN => budget.reserve(PIECE_MIN)?,
            None => return None,
        };
        let bytes = reservation.bytes();
        match &mut self.reserved {
            Some(reserved) => reserved.join(reservation),
            None => self.reserved = Some(reservation),
        }
        Some(bytes)
    }

    /// An error if the consumer gives no more signs of life.
    pub fn check(&self, lane: &Lane, now: Instant) -> Result<(), Error> {
        // While a large message arrives, no other can.
        if self.is_asking() && now.duration_since(self.heard.max(lane.partial_at())) > SILENCE {
            return Err(Error::retry(format!("consumer of stream `{}` is silent for {SILENCE:?}", self.stream)));
        }
        Ok(())
    }

    /// Ends the subscription and asks the server to delete the consumer, without waiting for the answer.
    pub fn close(self, lane: &mut Lane) {
        if !self.abandoned {
            self.end(lane);
        }
    }

    /// Closes a reader and waits a short time until its consumer is deleted: the next one may be the last that the
    /// stream allows.
    async fn close_now(self, lane: &mut Lane) {
        lane.close_inbox(self.sid);
        let deleted = timeout(PLACED, Api::new(lane).delete_consumer(&self.stream, &self.consumer)).await;
        if !matches!(deleted, Ok(Ok(()))) {
            debug!(stream = self.stream, consumer = self.consumer, "deletion of a consumer was not confirmed");
        }
    }

    fn end(&self, lane: &mut Lane) -> String {
        lane.close_inbox(self.sid);
        delete(lane, &self.stream, &self.consumer)
    }
}

/// Asks the server to delete a consumer; returns the request.
fn delete(lane: &mut Lane, stream: &str, consumer: &str) -> String {
    let subject = format!("{}.CONSUMER.DELETE.{stream}.{consumer}", lane.api_prefix());
    lane.send_request(&subject, b"")
}

/// How long a consumer is kept without a pull: the requested time, or less where the stream limits it.
fn inactive(config: &serde_json::Value) -> Duration {
    config["inactive_threshold"].as_u64().filter(|nanos| *nanos > 0).map_or(INACTIVE, Duration::from_nanos)
}

/// The judgement of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeliveryVerdict {
    Keep,
    Drop,
    /// Impossible order: the stream sequence of the delivery before it.
    Wrong(u64),
}

/// Parses the reply subject of a delivered message. Deliveries are counted without holes.
fn next_delivery(stream: &str, message: &Message<'_>, consumer_seq: &mut u64) -> Result<Delivery, Error> {
    let Some(delivery) = parse_delivery(message.reply) else {
        let reply = String::from_utf8_lossy(message.reply).into_owned();
        return Err(Error::retry(format!("a message with an unknown kind of reply subject `{}`", excerpt(&reply))));
    };
    if delivery.consumer_seq != *consumer_seq + 1 {
        return Err(not_contiguous(stream, &delivery, *consumer_seq, 0));
    }
    *consumer_seq = delivery.consumer_seq;
    Ok(delivery)
}

fn not_contiguous(stream: &str, delivery: &Delivery, consumer_seq: u64, before: u64) -> Error {
    let Delivery { consumer_seq: got, stream_seq, .. } = delivery;
    let behind = if before > 0 { format!("sequence {before}") } else { format!("delivery {consumer_seq}") };
    Error::retry(format!(
        "deliveries of stream `{stream}` are not contiguous: {got} (sequence {stream_seq}) after {behind}"
    ))
}

/// A heartbeat names the last delivery: so the loss of the very last message is detected too.
fn heartbeat(stream: &str, message: &Message<'_>, consumer_seq: u64) -> Result<(), Error> {
    let last = headers::last(message.header, b"Nats-Last-Consumer").and_then(number);
    match last {
        Some(last) if last != consumer_seq => Err(Error::retry(format!(
            "deliveries of stream `{stream}` are missing: got {consumer_seq}, the server sent {last}"
        ))),
        _ => Ok(()),
    }
}

/// Reads subject, headers and stored time of the message at a sequence, without its payload. `None` where the consumer
/// has none: it may be on a server that has less of the stream than its leader, so only the leader's answer is proof.
pub(in crate::copy) async fn headers_at(
    lane: &mut Lane,
    stream: &str,
    names: &mut Names,
    seq: u64,
) -> Result<Option<StoredMessage>, Error> {
    let range = Range { stream, filters: &[], from: seq, headers_only: true };
    let mut reader = Reader::open(lane, &range, names, 0).await?;
    // One pull for one message.
    reader.owed = 1;
    let (budget, mut found) = (Budget::new(usize::MAX), None);
    let mut asked = reader.pending() == 0;
    while found.is_none() && (!asked || reader.is_asking()) {
        if !asked {
            reader.pull(lane, &budget);
            asked = true;
        }
        match timeout(CHECK_EVERY, lane.turn()).await {
            Ok(turn) => {
                if let Turn::Received(batch) = turn? {
                    reader.accept(batch).map_err(|lost| lost.error)?;
                }
            }
            Err(_) => reader.check(lane, Instant::now())?,
        }
        found = reader.peek().map(|Incoming { delivery, message, .. }| StoredMessage {
            subject: String::from_utf8_lossy(message.subject).into_owned(),
            sequence: delivery.stream_seq,
            time_ns: delivery.time_ns,
            header: message.header.to_vec(),
            payload: message.payload.len(),
        });
    }
    reader.close(lane);
    Ok(found.filter(|found| found.sequence == seq))
}

/// Reads the headers of all messages in a range of sequences, in order. The consumer for it may be on a server that has
/// less of the stream than its leader: then this is a transient error.
pub(in crate::copy) async fn scan(
    lane: &mut Lane,
    stream: &str,
    names: &mut Names,
    from: u64,
    to: u64,
    mut each: impl FnMut(&Delivery, &Message<'_>),
) -> Result<(), Error> {
    let range = Range { stream, filters: &[], from, headers_only: true };
    let mut reader = Reader::open(lane, &range, names, 4 << 20).await?;
    let budget = Budget::new(usize::MAX);
    let mut done = reader.pending() == 0 || from > to;
    let mut seen = from.saturating_sub(1);
    let mut read = Instant::now();
    while !done {
        // A counted message may be removed before it is delivered; signs of life alone must not block us for ever.
        if read.max(lane.partial_at()).elapsed() > SILENCE {
            return Err(Error::retry(format!("stream `{stream}` cannot be read: nothing came for {SILENCE:?}")));
        }
        reader.pull(lane, &budget);
        if let Turn::Received(batch) = tokio::time::timeout(SILENCE, lane.turn())
            .await
            .map_err(|_| Error::retry(format!("stream `{stream}` cannot be read: nothing came for {SILENCE:?}")))??
        {
            reader.accept(batch).map_err(|lost| lost.error)?;
        }
        while let Some(Incoming { delivery, message, .. }) = reader.peek() {
            read = Instant::now();
            if delivery.stream_seq <= to {
                each(&delivery, &message);
            }
            seen = delivery.stream_seq;
            done = seen >= to || delivery.pending == 0;
            reader.take();
        }
    }
    reader.close_now(lane).await;
    if seen >= to {
        return Ok(());
    }
    match Api::new(lane).message_from(stream, seen + 1).await? {
        Some(next) if next.sequence <= to => Err(Error::retry(format!(
            "stream `{stream}` was read up to sequence {seen}, but its leader has a message at {}: a server that has to catch up \
             was asked",
            next.sequence
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use nats_lane::pipe::{self, Pipe, PipeRequest};
    use tokio::time::advance;

    use super::*;

    /// The pulls that arrive until the lane is empty.
    async fn pulls(lane: &mut Lane, server: &mut Pipe) -> Vec<PipeRequest> {
        lane.publish("end", "end", b"");
        let mut asked = Vec::new();
        loop {
            let request = tokio::select! {
                request = server.asked() => request,
                turn = lane.turn() => {
                    turn.unwrap();
                    continue;
                }
            };
            if request.subject == "end" {
                return asked;
            }
            if request.subject.contains("MSG.NEXT") {
                asked.push(request);
            }
        }
    }

    /// Handles the next batch of the server.
    async fn accept(lane: &mut Lane, reader: &mut Reader) -> Result<(), Lost> {
        loop {
            if let Turn::Received(batch) = lane.turn().await? {
                return reader.accept(batch);
            }
        }
    }

    #[tokio::test]
    async fn a_pull_after_a_large_message_has_room_for_another_one() {
        let (mut lane, mut server) = pipe::lane().await;
        let info: ConsumerInfo = serde_json::from_value(json!({"num_pending": 0})).unwrap();
        let range = Range { stream: "S", filters: &[], from: 1, headers_only: false };
        let mut reader = Reader::from_new(&mut lane, &range, "c".to_owned(), 16 << 20, &info);
        reader.pull(&mut lane, &Budget::new(usize::MAX));
        let asked = pulls(&mut lane, &mut server).await;
        for (number, size) in [(1, 700_000), (2, 100)] {
            let reply = format!("$JS.ACK.S.c.1.{number}.{number}.1767225605000000000.0");
            server.deliver(&asked[0], &reply, "NATS/1.0\r\n\r\n", size).await;
            accept(&mut lane, &mut reader).await.unwrap();
            assert!((size..size + (1 << 20)).contains(&reader.next_piece()), "{size}: {}", reader.next_piece());
        }
        assert_eq!(reader.large, 0);
    }

    #[tokio::test]
    async fn large_messages_are_requested_while_one_arrives() {
        let (mut lane, mut server) = pipe::lane().await;
        let info: ConsumerInfo = serde_json::from_value(json!({"num_pending": 9})).unwrap();
        let range = Range { stream: "S", filters: &[], from: 1, headers_only: false };
        let budget = Budget::new(usize::MAX);
        let mut reader = Reader::from_new(&mut lane, &range, "c".to_owned(), 8 << 20, &info);
        // What is known of the stream spares the search for the size of the first one.
        reader.expect(6 << 20);
        reader.pull(&mut lane, &budget);
        assert_eq!(pulls(&mut lane, &mut server).await.len(), 1);
        assert!(reader.pulls[0].bytes >= 6 << 20, "{}", reader.pulls[0].bytes);
        reader.set_large_ahead(true);
        reader.pull(&mut lane, &budget);
        reader.pull(&mut lane, &budget);
        assert_eq!(pulls(&mut lane, &mut server).await.len(), 1, "one more than the one that arrives");

        let mut reader = Reader::from_new(&mut lane, &range, "c".to_owned(), 8 << 20, &info);
        reader.expect(9 << 20);
        reader.set_large_ahead(true);
        reader.pull(&mut lane, &budget);
        assert_eq!(pulls(&mut lane, &mut server).await.len(), 1, "larger than all that may be requested");
    }

    #[tokio::test(start_paused = true)]
    async fn a_consumer_that_went_while_a_message_arrived_is_forgotten() {
        for (seconds, expect) in [(160, true), (20, false)] {
            let (mut lane, mut server) = pipe::lane().await;
            let info = json!({"num_pending": 3, "config": {"inactive_threshold": 45_000_000_000_u64}});
            let info: ConsumerInfo = serde_json::from_value(info).unwrap();
            let range = Range { stream: "S", filters: &[], from: 1, headers_only: false };
            let budget = Budget::new(usize::MAX);
            let mut reader = Reader::from_new(&mut lane, &range, "c".to_owned(), 1 << 20, &info);
            reader.pull(&mut lane, &budget);
            let asked = pulls(&mut lane, &mut server).await;
            assert_eq!(asked.len(), 2);
            // The status of the second pull is queued after the message.
            advance(Duration::from_secs(seconds)).await;
            let header = "NATS/1.0\r\nA: b\r\n\r\n";
            server.deliver(&asked[0], "$JS.ACK.S.c.1.1.1.1767225605000000000.2", header, 0).await;
            accept(&mut lane, &mut reader).await.unwrap();
            for (pull, line) in asked.iter().zip(["409 Batch Completed", "408 Request Timeout"]) {
                server.status(pull, line).await;
                accept(&mut lane, &mut reader).await.unwrap();
            }
            reader.pull(&mut lane, &budget);
            let asked = pulls(&mut lane, &mut server).await;
            server.status(&asked[0], "503").await;
            let lost = accept(&mut lane, &mut reader).await.unwrap_err();
            assert_eq!(lost.forgotten, expect, "{seconds}: {lost:?}");
        }
    }

    #[test]
    fn a_heartbeat_tells_that_the_last_delivery_is_missing() {
        let check = |header: &str| {
            let header = format!("NATS/1.0 100 Idle Heartbeat\r\n{header}\r\n");
            let message = Message { sid: 2, subject: b"inbox", reply: b"", header: header.as_bytes(), payload: b"" };
            heartbeat("S", &message, 7)
        };
        check("Nats-Last-Consumer: 7\r\nNats-Last-Stream: 90\r\n").unwrap();
        check("").unwrap();
        for other in [6, 8] {
            let error = check(&format!("Nats-Last-Consumer: {other}\r\n")).unwrap_err();
            assert!(error.message.contains(&format!("got 7, the server sent {other}")), "{error}");
        }
    }
}
