//! Sends messages to the target with many in the air, and turns acks into settlements. Nothing is kept for
//! sending again: after any refusal the run ends and is built anew from what the target then holds.

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
            frame::{Frame, Outgoing, Stamping},
            pipelined::Pipelined,
            provenance::Tag,
            stream::Abilities,
            target_end::TargetEnd,
        },
    },
    status::{Ordering, TargetMode, Transport},
    store::{PositionRecord, Stamps},
};

/// How messages are sent.
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
    frame: Frame,
    sink: Sink,
    end: TargetEnd,
    /// Only one message is in the air at a time, which makes the chain sound without batches too.
    single: bool,
    /// The next message bears the chain beside its id: what a run before sent by the chain must not arrive behind it.
    fence: bool,
    /// So many messages bear ids beside the chain: what a run before sent by ids may still arrive.
    overlap: usize,
    /// How messages of earlier runs are stamped.
    before: Option<Stamps>,
    /// Headers left out so far.
    pub headers_removed: u64,
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
        let strict = replication.ordering == Ordering::Strict || objects::is_store(&replication.source.stream);
        let single = abilities.transport == Transport::Pipelined && strict;
        let mut frame = Frame::new(lane, replication.clone(), tag, abilities.allowed, record.generation);
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
            before: None,
            headers_removed: 0,
        }
    }

    /// Takes over which protocol line was found to be the longest that the target takes.
    pub fn limit_line(&mut self, found: Option<usize>) {
        self.frame.limit_line(found);
    }

    /// The longest protocol line that was sent, unless its message is confirmed.
    pub fn unconfirmed_line(&self, window: &Window) -> Option<usize> {
        self.frame.unconfirmed_line(window)
    }

    /// What the stream takes now.
    pub fn target_is(&mut self, target: &StreamInfo) {
        self.frame.target_is(target);
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
        let over = if self.chained() { self.overlap == 0 } else { self.is_proven() };
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
        self.end.expected_last
    }

    /// Whether a stream that names itself has confirmed a batch.
    fn is_proven(&self) -> bool {
        matches!(&self.sink, Sink::Batches(batches) if batches.is_proven())
    }

    /// Messages refused since this was asked last.
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

    /// Makes subject and headers of the next message; an error is one that can never be stored as it is.
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

    /// Puts the message that was prepared into the lane's output and into the window.
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
        let bytes = incoming.bytes();
        let target_seq = self.places_ahead().then_some(self.end.expected_last + 1);
        let token = window.hand_out(source, bytes, read_at, target_seq);
        self.reply.clear();
        match &mut self.sink {
            Sink::Batches(batches) => {
                batches.reply(&mut self.reply, &self.inbox, token, (&self.replication.limits, bytes), now);
            }
            Sink::Pipelined(pipelined) => pipelined.reply(&mut self.reply, &self.inbox, token),
        }
        self.headers_removed += self.frame.put(outgoing, lane.output(), &self.reply, incoming.message.payload, token);
        if self.places_ahead() {
            self.end.expected_last += 1;
        }
        self.fence = false;
        self.overlap = self.overlap.saturating_sub(1);
    }

    /// Takes an ack. What it settles is settled in the window; a refusal is kept until [`Writer::outcome`].
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

    /// Up to here, as far as sequences tell, the target holds nothing but messages of ours that it confirmed.
    pub fn adds_up_to(&self) -> u64 {
        match &self.sink {
            Sink::Batches(_) => u64::MAX,
            Sink::Pipelined(pipelined) => pipelined.adds_up_to(&self.end),
        }
    }

    /// Behind this place at the target somebody else may have written, and nowhere before it since the run began.
    pub fn exact(&self, window: &Window) -> u64 {
        match &self.sink {
            Sink::Batches(_) => self.end.known_end(window),
            Sink::Pipelined(pipelined) => pipelined.exact,
        }
    }

    /// Whether the target owes an ack for what was sent: of a batch it sends one every so many messages only, so that
    /// over a slow way none may come for long.
    pub fn is_owed(&self, window: &Window) -> bool {
        match &self.sink {
            Sink::Batches(batches) => batches.is_owed(),
            Sink::Pipelined(_) => !window.is_empty(),
        }
    }

    /// Whether the run has to end because the target refused something, or somebody else wrote to it.
    /// `drained` is when the target last took some of what waited on the way there.
    pub fn outcome(&mut self, window: &Window, drained: Instant, now: Instant) -> Result<(), RunError> {
        match &mut self.sink {
            Sink::Batches(batches) => batches.outcome(window, drained, now),
            Sink::Pipelined(pipelined) => pipelined.outcome(&self.end, window),
        }
    }

    /// When [`Writer::commit_if_due`] wants to be called next; `None` while nothing is open.
    pub fn next_commit(&self, supply: Supply) -> Option<Instant> {
        match &self.sink {
            Sink::Batches(batches) => batches.next_commit(supply, self.end.is_shared()),
            Sink::Pipelined(_) => None,
        }
    }

    /// Commits an open batch that has nothing more to send for now, or whose last messages wait too long.
    pub fn commit_if_due(&mut self, lane: &mut Lane, supply: Supply, now: Instant) {
        if self.next_commit(supply).is_some_and(|at| at <= now) {
            self.commit(lane, now);
        }
    }

    /// Ends the open batch, if there is one, so that everything sent so far gets an ack.
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
