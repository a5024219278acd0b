//! Sends messages to the target with many in flight, and turns acks into settlements. No message is kept to be sent
//! again: after any refusal the run ends, and the next one begins from the present state of the target.
//!
//! | target | transport | every message carries |
//! |---|---|---|
//! | `allow_batched` and API level 4 (server 2.14), no other writer | fast-ingest batch | `Nats-Expected-Last-Sequence`: the chain |
//! | the same, with other writers | fast-ingest batch | `Nats-Msg-Id` |
//! | any other | pipelined publish | `Nats-Msg-Id` |
//! | any other, `ordering: strict` and no other writer | pipelined publish, one in flight | both |
//!
//! The chain is sound only where one refusal ends the unit: in a batch of gap mode `fail`, or with one message in
//! flight. With pipelined publishes a message of another writer takes the sequence of a refused one, the numbers match
//! again, and everything after the hole is stored (2.10 to 2.15, with one and with three replicas).
//!
//! Messages of an earlier run with the other header may still arrive from socket buffers. The position record says
//! which headers may be in flight. After a chain, the first message with an id carries the chain too: once it is
//! stored, the old chain matches nowhere. After ids, a window of chained messages carries ids too.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::time::Instant;

pub(in crate::copy) use crate::copy::target::batches::Supply;
use nats_lane::{Error, Lane, Message, jetstream::StreamInfo};

use crate::{
    config::{Limits, Replication},
    copy::{
        Error as RunError,
        flow::window::{SourcePoint, Window},
        objects,
        source::reader::Incoming,
        target::{
            batches::Batches,
            frame::{FrameWriter, Outgoing, Stamping},
            pipelined::Pipelined,
            provenance::Tag,
            stream::Abilities,
            target_end::TargetEnd,
        },
    },
    status::{Ordering, TargetMode, Transport},
    store::{PositionRecord, Stamps},
};

/// The way messages are sent.
#[derive(Debug)]
enum Sink {
    Batches(Batches),
    Pipelined(Pipelined),
}

/// Sends to one target stream over one lane.
#[derive(Debug)]
pub(in crate::copy) struct Writer {
    replication: Arc<Replication>,
    abilities: Abilities,
    sid: u64,
    inbox: String,
    reply: BytesMut,
    frame: FrameWriter,
    sink: Sink,
    end: TargetEnd,
    /// Only one message is in flight at a time, which makes the chain sound without batches too.
    single: bool,
    /// The next message carries the chain beside its id: chained messages of an earlier run must not be stored after
    /// it.
    fence: bool,
    /// Messages that still carry ids beside the chain: messages of an earlier run with ids may still arrive.
    overlap: usize,
    /// The greatest limit that a run had of messages in flight, or the default limit.
    most_in_flight: usize,
    /// The headers that identify messages of earlier runs.
    before: Option<Stamps>,
    /// Headers removed so far.
    pub headers_removed: u64,
}

impl Writer {
    /// Prepares for writing after the end of `target`. Ids differ between generations of `record`.
    pub fn open(
        lane: &mut Lane,
        replication: Arc<Replication>,
        tag: Tag,
        abilities: Abilities,
        target: &StreamInfo,
        record: &PositionRecord,
    ) -> Self {
        let (sid, inbox) = lane.open_inbox();
        let strict = replication.ordering == Ordering::Strict || objects::is_store(&replication.source.stream);
        let single = abilities.transport == Transport::Pipelined && strict;
        let mut frame = FrameWriter::new(lane, replication.clone(), tag, abilities.allowed, record.generation);
        frame.target_is(target);
        let end = TargetEnd::new(replication.clone(), target, record.epoch, abilities.mode);
        let sink = match abilities.transport {
            Transport::FastIngest => Sink::Batches(Batches::new()),
            // A feed has no writer.
            Transport::Pipelined | Transport::Feed => Sink::Pipelined(Pipelined::new(end.floor)),
        };
        Self {
            replication,
            abilities,
            sid,
            inbox,
            reply: BytesMut::new(),
            frame,
            sink,
            end,
            single,
            fence: false,
            overlap: 0,
            most_in_flight: usize::try_from(record.most_in_flight)
                .unwrap_or(usize::MAX)
                .max(Limits::default().messages_in_flight),
            before: None,
            headers_removed: 0,
        }
    }

    /// Sets the longest protocol line that the target accepts, if that was measured.
    pub fn limit_line(&mut self, found: Option<usize>) {
        self.frame.limit_line(found);
    }

    /// The longest protocol line that was sent, unless its message is confirmed.
    pub fn unconfirmed_line(&self, window: &Window) -> Option<usize> {
        self.frame.unconfirmed_line(window)
    }

    /// Updates the limits of the target stream.
    pub fn target_is(&mut self, target: &StreamInfo) {
        self.frame.target_is(target);
    }

    /// Takes over that the run before identified its messages in another way, and that some of them may still be in
    /// flight.
    pub fn after(&mut self, before: Stamps) {
        let fast = self.abilities.transport == Transport::FastIngest;
        if before.has_chain() {
            self.fence = fast && !self.chained();
        }
        if before.has_ids() && fast && self.chained() {
            self.overlap = self.most_in_flight.max(self.replication.limits.messages_in_flight);
        }
        self.before = Some(before);
    }

    /// Whether other writers may write to the target.
    pub fn mode(&self) -> TargetMode {
        self.abilities.mode
    }

    /// The headers that identify the messages of this run.
    fn own_stamps(&self) -> Stamps {
        if self.chained() && !self.single { Stamps::Chain } else { Stamps::Ids }
    }

    /// The headers that identify messages in flight, those of earlier runs included.
    pub fn stamps(&self) -> Stamps {
        // After the first confirmed message, or the last one with an id, no earlier message can be stored.
        let over = if self.chained() { self.overlap == 0 } else { self.is_proven() };
        let before = self.before.filter(|_| !over);
        before.map_or(self.own_stamps(), |before| before.and(self.own_stamps()))
    }

    fn chained(&self) -> bool {
        let sound = self.single || self.abilities.transport == Transport::FastIngest;
        sound && self.abilities.mode == TargetMode::Exclusive
    }

    /// Whether the target sequence of a message is certain before it is sent.
    fn knows_target_seqs(&self) -> bool {
        self.chained() && !self.single
    }

    /// Whether only ids keep a message from being stored twice.
    pub fn relies_on_ids(&self) -> bool {
        !self.chained()
    }

    /// Whether the target may still store messages in flight after the end of a run, identified by their ids alone: a
    /// batch or a chain ends with the first refusal.
    pub fn is_by_ids(&self) -> bool {
        self.relies_on_ids() && self.abilities.transport == Transport::Pipelined
    }

    /// Most messages in flight; the document may allow fewer.
    pub fn most_in_air(&self) -> usize {
        if self.single { 1 } else { usize::MAX }
    }

    /// How a refusal can affect the order.
    pub fn ordering(&self) -> Ordering {
        let strict = self.single || self.abilities.transport == Transport::FastIngest;
        if strict { Ordering::Strict } else { Ordering::Relaxed }
    }

    /// The known last sequence of the target.
    pub fn last_seq(&self) -> u64 {
        self.end.expected_last
    }

    /// Whether a stream that names itself has confirmed a batch.
    fn is_proven(&self) -> bool {
        matches!(&self.sink, Sink::Batches(batches) if batches.is_proven())
    }

    /// Messages refused since the last call.
    pub fn take_refused(&mut self) -> u64 {
        match &mut self.sink {
            Sink::Batches(batches) => std::mem::take(&mut batches.refused),
            Sink::Pipelined(pipelined) => std::mem::take(&mut pipelined.refused),
        }
    }

    /// Whether the target's flow control takes another message now.
    pub fn ready(&self) -> bool {
        match &self.sink {
            Sink::Batches(batches) => batches.ready(),
            Sink::Pipelined(pipelined) => pipelined.ready(),
        }
    }

    /// Builds subject and headers of the next message; an error means that it can never be stored as it is.
    pub fn prepare(&mut self, incoming: &Incoming<'_>, now_ns: i64) -> Result<Outgoing, Error> {
        let (opens, reply) = match &self.sink {
            Sink::Batches(batches) => (batches.opens(), batches.reply_len()),
            Sink::Pipelined(pipelined) => (pipelined.opens(), pipelined.reply_len()),
        };
        let stamping = Stamping {
            chain: (self.chained() || self.fence).then_some(self.end.expected_last),
            id: !self.chained() || self.single || self.overlap > 0,
        };
        self.frame.prepare(incoming, now_ns, stamping, self.inbox.len() + reply, opens)
    }

    /// Puts the prepared message into the lane's output and into the window.
    pub fn send(
        &mut self,
        outgoing: Outgoing,
        lane: &mut Lane,
        window: &mut Window,
        incoming: &Incoming<'_>,
        now: Instant,
        read_at: u64,
    ) {
        let source = SourcePoint { seq: incoming.delivery.stream_seq, time_ns: Some(incoming.delivery.time_ns) };
        let size = incoming.size();
        let target_seq = self.knows_target_seqs().then_some(self.end.expected_last + 1);
        let token = window.hand_out(source, size, read_at, target_seq);
        self.reply.clear();
        match &mut self.sink {
            Sink::Batches(batches) => {
                batches.reply(&mut self.reply, &self.inbox, token, (&self.replication.limits, size.bytes), now);
            }
            Sink::Pipelined(pipelined) => pipelined.reply(&mut self.reply, &self.inbox, token),
        }
        self.headers_removed += self.frame.put(outgoing, lane.output(), &self.reply, incoming.message.payload, token);
        if self.knows_target_seqs() {
            self.end.expected_last += 1;
        }
        self.fence = false;
        self.overlap = self.overlap.saturating_sub(1);
    }

    /// Handles an ack. The messages that it confirms are settled in the window; a refusal is kept until
    /// [`Writer::outcome`].
    pub fn accept(&mut self, message: &Message<'_>, window: &mut Window, now: Instant) -> Result<(), RunError> {
        if message.sid != self.sid {
            return Ok(());
        }
        match &mut self.sink {
            Sink::Batches(batches) => {
                // A server may send any subject for a subscription.
                let rest = message.subject.get(self.inbox.len() + 1..).unwrap_or_default();
                batches.accept(rest, message, &mut self.end, window, now)
            }
            Sink::Pipelined(pipelined) => pipelined.accept(message, &mut self.end, window),
        }
    }

    /// Up to here, as far as sequences show, the target holds only messages of ours that it confirmed.
    pub fn adds_up_to(&self) -> u64 {
        match &self.sink {
            Sink::Batches(_) => u64::MAX,
            Sink::Pipelined(pipelined) => pipelined.adds_up_to(&self.end),
        }
    }

    /// The target sequence after which another writer may have written; before it none has since the run began.
    pub fn exact(&self, window: &Window) -> u64 {
        match &self.sink {
            Sink::Batches(_) => self.end.known_end(window),
            Sink::Pipelined(pipelined) => pipelined.exact,
        }
    }

    /// Whether the target owes an ack for messages that were sent: within a batch it sends one per several messages, so
    /// on a slow connection there may be none for long.
    pub fn is_owed(&self, window: &Window) -> bool {
        match &self.sink {
            Sink::Batches(batches) => batches.is_owed(),
            Sink::Pipelined(_) => !window.is_empty(),
        }
    }

    /// Whether the run has to end because the target refused a message, or another writer wrote to it.
    /// `drained` is when the target last accepted some of the waiting output.
    pub fn outcome(&mut self, window: &Window, drained: Instant, now: Instant) -> Result<(), RunError> {
        match &mut self.sink {
            Sink::Batches(batches) => batches.outcome(window, drained, now),
            Sink::Pipelined(pipelined) => pipelined.outcome(&self.end, window),
        }
    }

    /// When [`Writer::commit_if_due`] wants to be called next; `None` without an open batch.
    pub fn next_commit(&self, supply: Supply) -> Option<Instant> {
        match &self.sink {
            Sink::Batches(batches) => batches.next_commit(supply, self.end.is_shared()),
            Sink::Pipelined(_) => None,
        }
    }

    /// Commits an open batch that has no more to send for now, or whose last messages wait too long.
    pub fn commit_if_due(&mut self, lane: &mut Lane, supply: Supply, now: Instant) {
        if self.next_commit(supply).is_some_and(|at| at <= now) {
            self.commit(lane, now);
        }
    }

    /// Ends the open batch, if there is one, so that every message sent so far gets an ack.
    pub fn commit(&mut self, lane: &mut Lane, now: Instant) {
        let Sink::Batches(batches) = &mut self.sink else { return };
        self.reply.clear();
        if !batches.commit(&mut self.reply, &self.inbox, now) {
            return;
        }
        let out = lane.output();
        out.extend_from_slice(b"PUB ");
        out.extend_from_slice(&self.frame.last_subject);
        out.extend_from_slice(b" ");
        out.extend_from_slice(&self.reply);
        out.extend_from_slice(b" 0\r\n\r\n");
    }
}

#[cfg(test)]
mod acks;
