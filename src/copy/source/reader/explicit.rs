//! Reads from a durable pull consumer with explicit acks: for streams that remove acknowledged messages, on servers
//! before 2.14 or where such a consumer exists already. Pulls are those of [`Reader`], so the bytes read ahead are
//! bounded; the consumer's `max_ack_pending` bounds the unacknowledged messages.
//!
//! A message is acknowledged once everything up to it is settled. Messages that were delivered to an earlier run and
//! not acknowledged are redelivered first, in order, and each of them crosses the line once (2.10 to 2.15):
//!
//! * A NAK with a delay takes a message out of the server's redelivery queue, and a plain NAK puts it at the end of
//!   that queue, unless it is in it already. So one pass of each over all pending sequences sorts the queue, whatever
//!   state earlier runs left. Without that, a pull after the `ack_wait` of a part of the messages gets them out of
//!   order.
//! * The server handles NAKs from a queue of its own, in order. The last one asks for an answer, and no pull is sent
//!   before: it would bring new messages first.
//! * A pull that ends because the next message exceeds its bytes puts that message at the end of the queue, which is
//!   then out of order. So there is only one pull at a time, and the queue is sorted again before the next one.
//!
//! There is no deadline for all of this, only for silence: a slow line may take long.

mod pending;

use std::{collections::VecDeque, time::Duration, vec};

use bytes::BytesMut;
use nats_lane::{
    Batch, Error, Lane,
    jetstream::{Api, ConsumerInfo, SequencePair, answer_in, decode},
};
use tokio::time::Instant;

use super::{DeliveryVerdict, Reader, SILENCE};
use crate::copy::{flow::budget::Budget, source::durable::Durable};

/// Interval of the requests for the ack floor: acks are lost when the leader of a consumer changes.
const AUDIT: Duration = Duration::from_secs(10);
/// Most sequences that one audit acknowledges again.
const AUDIT_MOST: u64 = 100_000;
/// Most bytes of commands that wait in the lane, however far apart the first and the last pending message are.
const WAITING: usize = 256 * 1024;
/// Requests a redelivery: puts the message at the end of the server's redelivery queue, unless it is in it already.
const NAK: &[u8] = b"-NAK";
/// The same after this time, which takes the message out of that queue. If no other command follows, because the
/// process ends, it is redelivered then.
const NAK_LATER: &[u8] = b"-NAK 10m";
/// How often the queue is sorted again after new messages came before owed redeliveries; then the run ends.
const MOST_SORTS: u32 = 5;
/// Pulls in a row without a message after which no redelivery is owed any more.
const EMPTY: u32 = 2;
/// A killed run may still have a pull open, which takes redeliveries away: how often the pending messages are requested
/// again if that happened. It ends with its connection, or with the bytes that it asked for.
const SORTED_AGAIN: u32 = 10;

/// Reads from and acknowledges to one durable pull consumer.
#[derive(Debug)]
pub(crate) struct Explicit {
    pub(in crate::copy) reader: Reader,
    acks: ExplicitAcks,
    sort: Sort,
    /// Number of deliveries when the last pull for redeliveries was sent.
    pulled_at: u64,
    /// The unanswered audit, with the position when it was sent.
    audit: Option<(String, u64)>,
    next_audit: Instant,
    /// Acknowledged up to here before the audit before.
    audited: u64,
}

/// Whether the server's redelivery queue is in order.
#[derive(Debug)]
enum Sort {
    /// Unknown: it is sorted before the next pull.
    Due,
    /// The commands are being written.
    SortCommands(SortCommands),
    /// The commands are written; the last request, and when it was sent.
    Asked(String, Instant),
    Done,
}

/// Commands that sort the queue and are not written yet.
#[derive(Debug)]
struct SortCommands {
    later: vec::IntoIter<u64>,
    now: vec::IntoIter<u64>,
}

/// Redeliveries of messages that an earlier run did not acknowledge: they come first, ascending.
#[derive(Debug, Default)]
struct Owed {
    /// Messages that were not redelivered yet.
    left: u64,
    /// All of them are at this stream sequence or below.
    to: u64,
    /// That one was delivered to this run and dropped: in a sorted queue it is redelivered last.
    is_last: bool,
    /// A newer message came while some were owed, in the present pull.
    passed_over: bool,
    /// Pulls in which that happened, and those in a row without a message.
    doubts: u32,
    empty: u32,
}

/// Deliveries and acks.
#[derive(Debug)]
struct ExplicitAcks {
    subject: String,
    /// Everything in the stream up to here is settled.
    settled: u64,
    /// The ack floor when the run began.
    floor: u64,
    /// Highest sequence that was delivered to this run.
    newest: u64,
    /// Delivered and not settled, ascending.
    waiting: VecDeque<u64>,
    /// Settled, and redelivered.
    again: Vec<u64>,
    owed: Owed,
    /// Sequences, ascending, that contain every unacknowledged message that was delivered to earlier runs, and the
    /// messages that were dropped since.
    candidates: Vec<u64>,
    /// Most messages that may wait.
    most: usize,
}

impl Explicit {
    /// Reads after `position`, up to which everything is settled.
    pub(in crate::copy) async fn open(
        lane: &mut Lane,
        stream: &str,
        durable: Durable,
        position: u64,
        bytes: usize,
    ) -> Result<Self, Error> {
        let Durable { name, info, .. } = durable;
        let subject = format!("$JS.ACK.{stream}.{name}.1");
        let (info, candidates) = request_redelivery(lane, stream, &name, &subject, info).await?;
        let owed = Owed { left: info.num_ack_pending, to: info.delivered.stream_seq, ..Owed::default() };
        let most = info.config["max_ack_pending"].as_u64().filter(|most| *most > 0);
        Ok(Self {
            reader: Reader::from_existing(lane, stream, name, position, &info, bytes),
            acks: ExplicitAcks {
                subject,
                settled: position,
                floor: info.ack_floor.stream_seq,
                newest: 0,
                waiting: VecDeque::new(),
                again: Vec::new(),
                owed,
                candidates,
                most: most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX),
            },
            sort: Sort::Done,
            pulled_at: 0,
            audit: None,
            next_audit: Instant::now() + AUDIT,
            audited: 0,
        })
    }

    /// Messages of the stream that match and are not taken yet, by the last report.
    pub(in crate::copy) fn pending(&self) -> u64 {
        self.reader.pending() + self.acks.owed.left
    }

    /// Requests more where that is due. Redeliveries are requested by one pull at a time, from a sorted queue.
    pub(in crate::copy) fn pull(&mut self, lane: &mut Lane, budget: &Budget) {
        self.reader.owed = self.acks.owed.left;
        if self.reader.owed == 0 {
            return self.reader.pull(lane, budget);
        }
        if self.reader.is_asking() {
            return;
        }
        match &self.sort {
            Sort::Due => self.sort = Sort::SortCommands(SortCommands::of(self.acks.not_redelivered())),
            Sort::SortCommands(_) | Sort::Asked(..) => {}
            Sort::Done => {
                self.pulled_at = self.reader.consumer_seq;
                self.reader.pull(lane, budget);
                if self.reader.is_asking() {
                    self.sort = Sort::Due;
                }
            }
        }
        if let Sort::SortCommands(asking) = &mut self.sort {
            let (subject, delivery) = (&self.acks.subject, self.reader.consumer_seq);
            if asking.write(lane.output(), subject, delivery) {
                let request = lane.send_request(&last(subject, self.acks.owed.to, delivery), NAK);
                // Progress of the commands is a sign of life.
                lane.ping();
                self.sort = Sort::Asked(request, Instant::now());
            }
        }
    }

    /// Handles a batch that the lane received.
    pub(in crate::copy) fn accept(&mut self, batch: Batch) -> Result<(), Error> {
        if let Some((request, settled)) = &self.audit {
            let answer = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == request.as_bytes());
            if let Some(info) = answer.map(|answer| decode::<ConsumerInfo>(answer.payload)) {
                let (settled, info) = (*settled, info?);
                self.audit = None;
                self.audited(settled, &info);
            }
        }
        if let Sort::Asked(request, _) = &self.sort
            && let Some(answer) = answer_in(&batch, request)
        {
            answer?;
            self.sort = Sort::Done;
        }
        let acks = &mut self.acks;
        let (pending, last, asking) = (self.reader.pending, self.reader.consumer_seq, self.reader.is_asking());
        let owes = acks.owed.left > 0;
        self.reader.accept_if(batch, |delivery| acks.judge(delivery.stream_seq)).map_err(|lost| lost.error)?;
        if self.reader.consumer_seq == last && (owes || self.is_barred()) {
            // A pull that expired while the server waits for acks does not show the number of the following messages.
            self.reader.pending = pending;
        }
        if owes && asking && !self.reader.is_asking() && self.reader.need == 0 {
            self.acks.owed.pull_ended(self.reader.consumer_seq > self.pulled_at);
        }
        Ok(())
    }

    /// An error if the consumer gives no more signs of life.
    pub(in crate::copy) fn check(&self, lane: &Lane, now: Instant) -> Result<(), Error> {
        if let Sort::Asked(_, at) = &self.sort
            && now.duration_since(lane.arrived_at().max(lane.drained()).max(*at)) > SILENCE
        {
            return Err(Error::retry(format!(
                "consumer of stream `{}` does not answer within {SILENCE:?} when it is asked to redeliver unacknowledged messages",
                self.reader.stream
            )));
        }
        self.reader.check(lane, now)
    }

    /// Whether the server delivers no more before a message is acknowledged.
    pub(in crate::copy) fn is_barred(&self) -> bool {
        self.acks.waiting.len() >= self.acks.most
    }

    /// Acknowledges everything up to a position, and checks now and then whether the acks arrived.
    pub(in crate::copy) fn settled(&mut self, lane: &mut Lane, position: u64) {
        self.acks.settle(lane.output(), position);
        let now = Instant::now();
        if self.audit.is_none() && now >= self.next_audit {
            self.next_audit = now + AUDIT;
            let subject =
                format!("{}.CONSUMER.INFO.{}.{}", lane.api_prefix(), self.reader.stream, self.reader.consumer);
            self.audit = Some((lane.send_request(&subject, b""), self.acks.settled));
        }
    }

    /// Acks that were sent before the last audit have arrived by now, or are lost.
    fn audited(&mut self, settled: u64, info: &ConsumerInfo) {
        let before = std::mem::replace(&mut self.audited, settled);
        let floor = info.ack_floor.stream_seq;
        if info.num_ack_pending > self.acks.waiting.len() as u64 && floor < before {
            self.acks.again.extend(floor + 1..=before.min(floor + AUDIT_MOST));
        }
    }

    /// Ends the subscription; the consumer stays.
    pub(in crate::copy) fn close(self, lane: &mut Lane) {
        lane.close_inbox(self.reader.sid);
    }
}

impl SortCommands {
    fn of(asked: Vec<u64>) -> Self {
        Self { later: asked.clone().into_iter(), now: asked.into_iter() }
    }

    /// Writes as many commands as may wait in a lane; returns whether that was the rest.
    fn write(&mut self, output: &mut BytesMut, subject: &str, delivery: u64) -> bool {
        while output.len() < WAITING {
            let later = self.later.next().map(|seq| (seq, NAK_LATER));
            let Some((seq, word)) = later.or_else(|| self.now.next().map(|seq| (seq, NAK))) else { return true };
            write(output, subject, seq, delivery, word);
        }
        false
    }
}

impl Owed {
    /// Judges a delivery. The server redelivers before it delivers a new message: a new one means that the rest
    /// expired or was acknowledged by acks of the earlier run that were in flight, or that the server forgot its queue.
    /// So it is dropped, and requested again with the rest. Once it is redelivered, messages missing before it are
    /// gone.
    fn takes(&mut self, seq: u64) -> DeliveryVerdict {
        if seq < self.to || seq == self.to && !self.is_last {
            self.left -= 1;
            return DeliveryVerdict::Keep;
        }
        if seq == self.to {
            self.left = 0;
            return DeliveryVerdict::Keep;
        }
        if self.doubts >= MOST_SORTS {
            return DeliveryVerdict::Wrong(self.to);
        }
        (self.to, self.is_last, self.passed_over) = (seq, true, true);
        self.left += 1;
        DeliveryVerdict::Drop
    }

    /// A pull ended, other than for its bytes, and redeliveries are still owed.
    fn pull_ended(&mut self, brought_any: bool) {
        self.doubts += u32::from(std::mem::take(&mut self.passed_over));
        self.empty = if brought_any { 0 } else { self.empty + 1 };
        if self.empty >= EMPTY {
            self.left = 0;
        }
    }
}

impl ExplicitAcks {
    /// Sequences that contain every message that was not redelivered yet, ascending.
    fn not_redelivered(&self) -> Vec<u64> {
        let (back, to) = (self.newest.max(self.floor), self.owed.to);
        self.candidates.iter().copied().filter(|seq| *seq > back && *seq <= to).collect()
    }

    fn judge(&mut self, seq: u64) -> DeliveryVerdict {
        // Redeliveries come first and in order: otherwise one would be skipped.
        if self.owed.left > 0 {
            if seq <= self.newest {
                // In flight for longer than the consumer's `ack_wait`.
                let waits = self.waiting.binary_search(&seq).is_ok();
                return if waits { DeliveryVerdict::Drop } else { DeliveryVerdict::Wrong(self.newest) };
            }
            let verdict = self.owed.takes(seq);
            if verdict == DeliveryVerdict::Drop {
                self.candidates.push(seq);
            }
            if verdict != DeliveryVerdict::Keep {
                return verdict;
            }
        }
        if self.owed.left == 0 {
            // No redelivery is requested again.
            self.candidates = Vec::new();
        }
        let is_new = seq > self.newest;
        self.newest = self.newest.max(seq);
        if seq <= self.settled {
            self.again.push(seq);
            DeliveryVerdict::Drop
        } else if is_new {
            self.waiting.push_back(seq);
            DeliveryVerdict::Keep
        } else if self.waiting.binary_search(&seq).is_ok() {
            // Still in flight: it is acknowledged when it settles.
            DeliveryVerdict::Drop
        } else {
            DeliveryVerdict::Wrong(self.newest)
        }
    }

    fn settle(&mut self, output: &mut BytesMut, position: u64) {
        self.settled = self.settled.max(position);
        for seq in self.again.drain(..) {
            write(output, &self.subject, seq, seq, b"");
        }
        while self.waiting.front().is_some_and(|seq| *seq <= position) {
            if let Some(seq) = self.waiting.pop_front() {
                write(output, &self.subject, seq, seq, b"");
            }
        }
    }
}

/// Writes an ack, or the command `word`, for the message at a stream sequence.
fn write(output: &mut BytesMut, subject: &str, seq: u64, delivery: u64, word: &[u8]) {
    let mut number = itoa::Buffer::new();
    output.extend_from_slice(b"PUB ");
    output.extend_from_slice(subject.as_bytes());
    output.extend_from_slice(b".");
    output.extend_from_slice(number.format(seq).as_bytes());
    output.extend_from_slice(b".");
    output.extend_from_slice(number.format(delivery).as_bytes());
    output.extend_from_slice(b".0.0 ");
    output.extend_from_slice(number.format(word.len()).as_bytes());
    output.extend_from_slice(b"\r\n");
    output.extend_from_slice(word);
    output.extend_from_slice(b"\r\n");
}

/// Requests the redelivery of all unacknowledged messages, in order; returns the state of the consumer afterwards, and
/// sequences that contain all of these messages.
async fn request_redelivery(
    lane: &mut Lane,
    stream: &str,
    name: &str,
    subject: &str,
    mut info: ConsumerInfo,
) -> Result<(ConsumerInfo, Vec<u64>), Error> {
    for _ in 0..SORTED_AGAIN {
        if info.num_ack_pending == 0 {
            return Ok((info, Vec::new()));
        }
        // A NAK counts only with a delivery that is neither acknowledged nor to come.
        let delivered = info.delivered;
        let range = info.ack_floor.stream_seq + 1..=delivered.stream_seq;
        let candidates = pending::candidates(lane, stream, &info.config, range, info.num_ack_pending).await?;
        sort_now(lane, subject, &candidates, delivered).await?;
        let now = Api::new(lane).consumer_info(stream, name).await?;
        info = now.ok_or_else(|| Error::retry(format!("consumer `{name}` of stream `{stream}` is gone")))?;
        if info.delivered.consumer_seq == delivered.consumer_seq {
            return Ok((info, candidates));
        }
    }
    // What that pull took would be missing among the redeliveries, and count as gone.
    Err(Error::retry(format!("an earlier run still has a pull open at consumer `{name}` of stream `{stream}`")))
}

/// Sorts and waits until the server has finished: it handles NAKs from a queue of its own, in order, and answers the
/// last one. A pull that it serves before that would bring new messages before the requested redeliveries.
async fn sort_now(lane: &mut Lane, subject: &str, asked: &[u64], delivered: SequencePair) -> Result<(), Error> {
    let mut asking = SortCommands::of(asked.to_vec());
    while !asking.write(lane.output(), subject, delivered.consumer_seq) {
        flush(lane).await?;
    }
    lane.request(&last(subject, delivered.stream_seq, delivered.consumer_seq), NAK).await.map(drop)
}

/// Subject of the command that is answered.
fn last(subject: &str, to: u64, delivery: u64) -> String {
    format!("{subject}.{to}.{delivery}.0.0")
}

/// Writes all output; messages that arrive meanwhile are dropped.
async fn flush(lane: &mut Lane) -> Result<(), Error> {
    while !lane.output().is_empty() {
        lane.turn().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acks(settled: u64, left: u64, to: u64) -> ExplicitAcks {
        ExplicitAcks {
            subject: "$JS.ACK.S.C.1".to_owned(),
            settled,
            floor: 0,
            newest: 0,
            waiting: VecDeque::new(),
            again: Vec::new(),
            owed: Owed { left, to, ..Owed::default() },
            candidates: vec![6, 7, 8],
            most: 10,
        }
    }

    fn settle(acks: &mut ExplicitAcks, position: u64) -> Vec<u64> {
        let mut output = BytesMut::new();
        acks.settle(&mut output, position);
        let text = String::from_utf8(output.to_vec()).unwrap();
        let commands = text.split("PUB $JS.ACK.S.C.1.").skip(1);
        commands.map(|command| command.split('.').next().unwrap().parse().unwrap()).collect()
    }

    #[test]
    fn what_settled_is_acknowledged_once_and_in_order() {
        let mut acks = acks(4, 0, 0);
        for seq in [5, 7, 8] {
            assert_eq!(acks.judge(seq), DeliveryVerdict::Keep, "{seq}");
        }
        assert_eq!(settle(&mut acks, 4), [0; 0]);
        // A position may lie where nothing was delivered.
        assert_eq!(settle(&mut acks, 6), [5]);
        assert_eq!(settle(&mut acks, 8), [7, 8]);
        assert_eq!(settle(&mut acks, 8), [0; 0]);
    }

    #[test]
    fn redeliveries_are_dropped_and_acknowledged_when_settled() {
        let mut acks = acks(4, 2, 5);
        assert_eq!(acks.judge(3), DeliveryVerdict::Drop);
        assert_eq!(acks.judge(5), DeliveryVerdict::Keep);
        assert_eq!(acks.judge(5), DeliveryVerdict::Drop);
        assert_eq!(settle(&mut acks, 4), [3]);
        assert_eq!(settle(&mut acks, 5), [5]);
        assert_eq!(acks.judge(5), DeliveryVerdict::Drop);
        assert_eq!(settle(&mut acks, 5), [5]);
    }

    #[test]
    fn what_was_passed_over_is_an_error() {
        let mut late = acks(4, 0, 0);
        assert_eq!(late.judge(21), DeliveryVerdict::Keep);
        assert_eq!(late.judge(6), DeliveryVerdict::Wrong(21));
        let mut unsorted = acks(4, 3, 8);
        assert_eq!(unsorted.judge(8), DeliveryVerdict::Keep);
        assert_eq!(
            unsorted.judge(3),
            DeliveryVerdict::Wrong(8),
            "also what is settled: the order is not what was asked for"
        );
    }

    #[test]
    fn a_new_message_before_what_comes_back_is_asked_for_again() {
        let mut acks = acks(4, 2, 8);
        assert_eq!(acks.judge(6), DeliveryVerdict::Keep);
        // The server forgot its queue.
        assert_eq!((acks.judge(9), acks.judge(10)), (DeliveryVerdict::Drop, DeliveryVerdict::Drop));
        assert_eq!((acks.owed.left, acks.owed.to), (3, 10));
        // Only messages that may be pending, in order, and dropped ones.
        assert_eq!(acks.not_redelivered(), [7, 8, 9, 10]);
        acks.owed.pull_ended(true);
        for seq in [8, 9, 10, 11] {
            assert_eq!(acks.judge(seq), DeliveryVerdict::Keep, "{seq}");
        }
        assert_eq!(acks.owed.left, 0);
        assert_eq!(settle(&mut acks, 11), [6, 8, 9, 10, 11]);
    }

    #[test]
    fn what_does_not_come_back_twice_is_gone() {
        let mut expired = acks(4, 2, 8);
        assert_eq!(expired.judge(9), DeliveryVerdict::Drop);
        expired.owed.pull_ended(true);
        assert_eq!((expired.judge(9), expired.judge(10)), (DeliveryVerdict::Keep, DeliveryVerdict::Keep));
        assert_eq!(expired.owed.left, 0);
        let mut empty = acks(4, 2, 8);
        empty.owed.pull_ended(false);
        assert_eq!(empty.owed.left, 2);
        empty.owed.pull_ended(false);
        assert_eq!((empty.owed.left, empty.judge(9)), (0, DeliveryVerdict::Keep));
    }

    #[test]
    fn a_queue_that_is_forgotten_again_loses_nothing() {
        let mut acks = acks(4, 3, 8);
        // A leader that has just taken over and has no queue; another one, that delivers new messages first, twice.
        acks.owed.pull_ended(false);
        assert_eq!(acks.judge(9), DeliveryVerdict::Drop);
        acks.owed.pull_ended(true);
        assert_eq!(acks.judge(10), DeliveryVerdict::Drop);
        acks.owed.pull_ended(true);
        for seq in [6, 7, 8, 9, 10, 11] {
            assert_eq!(acks.judge(seq), DeliveryVerdict::Keep, "{seq}");
        }
        assert_eq!(settle(&mut acks, 11), [6, 7, 8, 9, 10, 11]);
    }

    #[test]
    fn what_never_comes_back_in_order_is_an_error() {
        let mut acks = acks(4, 3, 8);
        for seq in 9..9 + u64::from(MOST_SORTS) {
            assert_eq!(acks.judge(seq), DeliveryVerdict::Drop, "{seq}");
            acks.owed.pull_ended(true);
        }
        assert_eq!(acks.judge(20), DeliveryVerdict::Wrong(13));
        assert_eq!(settle(&mut acks, 20), [0; 0]);
    }

    #[test]
    fn an_ack_is_one_line() {
        let mut output = BytesMut::new();
        write(&mut output, "$JS.ACK.S.C.1", 42, 42, b"");
        write(&mut output, "$JS.ACK.S.C.1", 43, 7, NAK);
        assert_eq!(&output[..], b"PUB $JS.ACK.S.C.1.42.42.0.0 0\r\n\r\nPUB $JS.ACK.S.C.1.43.7.0.0 4\r\n-NAK\r\n");
    }
}
