//! Reads from a durable push consumer that is acknowledged by flow control (ack policy `flow_control`, server 2.14):
//! the server delivers without requests, and asks now and then for the progress. The reply, with the settled prefix in
//! it, is the ack of everything up to there.
//!
//! The unacknowledged messages are bounded by the consumer's `max_ack_pending`; the server asks when that is reached,
//! when half of a window of 2 to 32 MiB is unacknowledged, and with a heartbeat when there is no more to deliver. The
//! reply is sent when half of the deliveries have settled, so that there is always a message on its way, and never
//! before, so that their number stays bounded. The server accepts it only on the subject of its last request, with a
//! delivery number that is not below the last one. The request survives resets and a new inbox: a heartbeat names it,
//! and the first reply is to that.
//!
//! Neither bound follows our limits in bytes. Where messages are larger than the average of the stream, and where the
//! process is short of memory, the socket is not read ([`Pushed::may_read`]): that is the hard bound of our memory.
//! Then the rest waits in the socket and at the server, which drops the connection of a client that does not read for
//! 10 s: a new run begins. Only while the stream's leader is asked about a jump is everything read: its answer comes
//! after all messages that were pushed before it.

use std::{collections::VecDeque, time::Duration};

use nats_lane::{Batch, Error, Lane, Message, headers, jetstream::is_delivery};
use tokio::time::Instant;

use super::{Incoming, SILENCE, SourcePoint, heartbeat, jumps::Jumps, next_delivery, not_contiguous, stash::Stash};
use crate::copy::{
    flow::budget::{Budget, PIECE_MIN, Reservation},
    source::durable::{self, Durable},
};

/// The server repeats its request for a missing ack with each heartbeat. After this many equal requests it does
/// not accept ours: an earlier client of the consumer acknowledged more.
const DEAF: u32 = 5;

/// Reads from one push consumer.
#[derive(Debug)]
pub(crate) struct Pushed {
    stream: String,
    sid: u64,
    stash: Stash,
    /// Most bytes in the stash.
    limit: usize,
    reserved: Option<Reservation>,
    consumer_seq: u64,
    newest: u64,
    pending: u64,
    heard: Instant,
    /// Time of the newest delivery.
    delivered: Instant,
    /// Whether the consumer delivers all messages of the stream.
    all: bool,
    jumps: Jumps,
    acks: FlowControlAcks,
}

/// Deliveries and acks.
#[derive(Debug, Default)]
struct FlowControlAcks {
    /// Everything in the stream up to here is settled.
    settled: u64,
    /// Delivered and not settled, ascending.
    waiting: VecDeque<u64>,
    /// The last delivery that settled: its number, and its sequence in the stream.
    done: (u64, u64),
    /// Number of the last acknowledged delivery.
    told: u64,
    /// Subject for the reply to the server's request for the progress.
    asked: Option<Vec<u8>>,
    /// How often the same progress was sent.
    repeated: u32,
}

impl Pushed {
    /// Opens the consumer, which delivers to `subject` from now on, beginning after its ack floor; messages
    /// at or before `position` are settled. `bytes` bounds the bytes read ahead.
    pub(in crate::copy) fn open(
        lane: &mut Lane,
        stream: &str,
        durable: &Durable,
        (sid, subject): (u64, &str),
        position: u64,
        bytes: usize,
    ) -> Self {
        // Only now: a delivery from before the reset would be mistaken for the first one. And to exactly this subject:
        // a consumer that waits for a subscriber does not notice a wildcard.
        lane.listen(sid, subject);
        let info = &durable.info;
        Self {
            stream: stream.to_owned(),
            sid,
            stash: Stash::new(position),
            limit: bytes.max(PIECE_MIN),
            reserved: None,
            consumer_seq: info.delivered.consumer_seq,
            newest: info.ack_floor.stream_seq,
            pending: info.num_pending,
            heard: Instant::now(),
            delivered: Instant::now(),
            all: durable::filters(&info.config).is_empty(),
            jumps: Jumps::default(),
            acks: FlowControlAcks { settled: position, ..FlowControlAcks::default() },
        }
    }

    pub(in crate::copy) fn pending(&self) -> u64 {
        self.pending + self.stash.len() as u64
    }

    pub(in crate::copy) fn next(&self) -> Option<SourcePoint> {
        self.stash.next()
    }

    pub(in crate::copy) fn peek(&self) -> Option<Incoming<'_>> {
        self.stash.peek().filter(|incoming| self.jumps.are_explained(incoming.delivery.stream_seq))
    }

    /// Asks the stream's leader about skipped sequences.
    pub(in crate::copy) fn ask_about_jumps(&mut self, lane: &mut Lane) {
        self.jumps.ask_leader(lane, &self.stream, Instant::now());
    }

    pub(in crate::copy) fn take(&mut self) {
        self.stash.take();
    }

    /// Handles a batch that the lane received.
    pub(in crate::copy) fn accept(&mut self, batch: Batch) -> Result<(), Error> {
        let now = Instant::now();
        self.jumps.accept(&batch, &self.stream, now)?;
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
            let delivery = next_delivery(&self.stream, &message, &mut self.consumer_seq)?;
            let seq = delivery.stream_seq;
            if seq <= self.newest {
                return Err(not_contiguous(&self.stream, &delivery, self.consumer_seq, self.newest));
            }
            // Messages at or before the position are settled, whichever client acknowledged them.
            let expected = self.newest.max(self.acks.settled) + 1;
            if self.all && seq > expected {
                self.jumps.jumped(expected, seq);
            }
            self.newest = seq;
            self.delivered = now;
            self.pending = delivery.pending;
            if self.acks.delivered(seq) {
                items.push((index as u32, delivery));
            }
        }
        self.stash.push(batch, items);
        if self.acks.repeated >= DEAF {
            return Err(Error::retry(format!(
                "consumer of stream `{}` does not take the acks of its deliveries",
                self.stream
            )));
        }
        Ok(())
    }

    fn status(&mut self, message: &Message<'_>) -> Result<(), Error> {
        if headers::status(message.header) != Some(100) {
            let text = headers::status_text(message.header);
            return Err(Error::retry(format!("consumer of stream `{}` ended: {text}", self.stream)));
        }
        heartbeat(&self.stream, message, self.consumer_seq)?;
        // An unanswered request is named in each heartbeat, also one from before our time.
        let unanswered = headers::last(message.header, b"Nats-Consumer-Stalled");
        let subject = Some(message.reply).filter(|reply| !reply.is_empty()).or(unanswered);
        if let Some(subject) = subject {
            self.acks.asked = Some(subject.to_vec());
        }
        Ok(())
    }

    /// Whether the server delivers no more before a message is acknowledged, as far as that is known.
    pub(in crate::copy) fn is_barred(&self) -> bool {
        self.stash.is_empty() && self.acks.asked.is_some()
    }

    /// Whether more may be read from the socket: not beyond our bound, nor when the process has no more memory.
    pub(in crate::copy) fn may_read(&mut self, budget: &Budget) -> bool {
        let held = self.stash.bytes();
        let reserved = self.reserved.get_or_insert_with(|| budget.force(PIECE_MIN));
        if reserved.bytes() < held {
            // The size of a read is not known before.
            reserved.join(budget.force(held - reserved.bytes()));
        }
        reserved.shrink_to(held + PIECE_MIN);
        if self.jumps.is_asking() {
            // The answer comes after all messages that were pushed before it.
            return true;
        }
        if held >= self.limit {
            return false;
        }
        if reserved.bytes() >= held + PIECE_MIN {
            return true;
        }
        match budget.reserve(PIECE_MIN) {
            Some(more) => {
                reserved.join(more);
                true
            }
            None => held == 0,
        }
    }

    /// Everything up to a position is settled: acknowledges it, if the server asked and it is worth a reply.
    pub(in crate::copy) fn settled(&mut self, lane: &mut Lane, position: u64) {
        if let Some((subject, (delivery, seq))) = self.acks.settle(position, self.consumer_seq) {
            let header = match delivery {
                0 => "NATS/1.0\r\n\r\n".to_owned(),
                _ => format!("NATS/1.0\r\nNats-Last-Consumer: {delivery}\r\nNats-Last-Stream: {seq}\r\n\r\n"),
            };
            let output = lane.output();
            output.extend_from_slice(b"HPUB ");
            output.extend_from_slice(&subject);
            output.extend_from_slice(format!(" {0} {0}\r\n{header}\r\n", header.len()).as_bytes());
        }
    }

    /// Whether everything that settled is acknowledged.
    pub(in crate::copy) fn is_acked(&self) -> bool {
        self.acks.told == self.acks.done.0
    }

    /// An error if the consumer gives no more signs of life; there are none while the socket is not read.
    pub(in crate::copy) fn check(&mut self, lane: &Lane, now: Instant, reads: bool) -> Result<(), Error> {
        // While a large message arrives, no other can.
        let partial = lane.partial_at();
        self.jumps.check(&self.stream, self.delivered.max(partial), now)?;
        if !reads {
            self.heard = now;
        } else if now.duration_since(self.heard.max(partial)) > SILENCE {
            return Err(silent(&self.stream, SILENCE));
        }
        Ok(())
    }

    /// Ends the subscription; the consumer stays.
    pub(in crate::copy) fn close(self, lane: &mut Lane) {
        lane.close_inbox(self.sid);
    }
}

fn silent(stream: &str, silence: Duration) -> Error {
    Error::retry(format!("consumer of stream `{stream}` is silent for {silence:?}"))
}

impl FlowControlAcks {
    /// Handles a delivery; returns whether it is to be copied.
    fn delivered(&mut self, seq: u64) -> bool {
        self.waiting.push_back(seq);
        self.repeated = 0;
        seq > self.settled
    }

    /// Everything up to a position is settled: returns the subject and the content of the ack. `last` is the number of
    /// the newest delivery.
    fn settle(&mut self, position: u64, last: u64) -> Option<(Vec<u8>, (u64, u64))> {
        self.settled = self.settled.max(position);
        while let Some(seq) = self.waiting.front().copied().filter(|seq| *seq <= self.settled) {
            self.waiting.pop_front();
            self.done = (last - self.waiting.len() as u64, seq);
        }
        let (done, out) = (self.done.0 - self.told, last - self.told);
        if !self.waiting.is_empty() && done * 2 < out {
            return None;
        }
        let asked = self.asked.take()?;
        if done == 0 && self.told > 0 {
            self.repeated += 1;
        }
        self.told = self.done.0;
        Some((asked, self.done))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(acks: &mut FlowControlAcks, at: &str) {
        acks.asked = Some(at.as_bytes().to_vec());
    }

    #[test]
    fn acks_are_sent_on_request_and_when_half_has_settled() {
        let mut acks = FlowControlAcks { settled: 10, ..FlowControlAcks::default() };
        for seq in [11, 13, 14, 20] {
            assert!(acks.delivered(seq));
        }
        assert_eq!(acks.settle(12, 4), None);
        asked(&mut acks, "a");
        assert_eq!(acks.settle(12, 4), None);
        assert_eq!(acks.settle(13, 4), Some((b"a".to_vec(), (2, 13))));
        assert_eq!(acks.settle(20, 4), None);
        asked(&mut acks, "b");
        assert_eq!(acks.settle(20, 4), Some((b"b".to_vec(), (4, 20))));
        assert_eq!(acks.repeated, 0);
        asked(&mut acks, "c");
        assert_eq!(acks.settle(20, 4), Some((b"c".to_vec(), (4, 20))));
        assert_eq!(acks.repeated, 1);
    }

    #[test]
    fn what_was_settled_before_is_not_copied_and_is_acknowledged() {
        let mut acks = FlowControlAcks { settled: 12, ..FlowControlAcks::default() };
        assert!(!acks.delivered(11));
        assert!(!acks.delivered(12));
        assert!(acks.delivered(13));
        asked(&mut acks, "a");
        assert_eq!(acks.settle(12, 3), Some((b"a".to_vec(), (2, 12))));
    }

    #[test]
    fn a_request_from_before_our_time_is_answered_at_once() {
        let mut acks = FlowControlAcks { settled: 12, ..FlowControlAcks::default() };
        asked(&mut acks, "a");
        assert_eq!(acks.settle(12, 0), Some((b"a".to_vec(), (0, 0))));
        assert_eq!(acks.repeated, 0);
    }
}
