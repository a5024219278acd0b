//! Reads from a durable pull consumer with explicit acks: the way for streams that forget what was acknowledged, on
//! servers before 2.14 or where such a consumer is there already. Pulls are those of [`Reader`], so what is read ahead
//! is bounded in bytes; the consumer's `max_ack_pending` bounds what is not acknowledged.
//!
//! A message is acknowledged once everything up to it is settled. What was delivered to a run before this one and not
//! acknowledged comes back first, in order, and each of these messages crosses the line once:
//!
//! * A NAK with a delay takes a message out of the server's queue of what is redelivered, and a plain NAK puts it at the
//!   end of that queue. So one pass of each over all that may be pending sorts the queue, whatever earlier runs left in
//!   it.
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

use super::{Reader, SILENCE, Verdict};
use crate::copy::{flow::budget::Budget, source::durable::Durable};

/// How often the server is asked what it still waits for: acks are lost when the leader of a consumer changes.
const AUDIT: Duration = Duration::from_secs(10);
/// Sequences that one audit acknowledges again at most.
const AUDIT_MOST: u64 = 100_000;
/// Bytes of commands that wait in the lane at most: however far apart the first and the last pending message are.
const WAITING: usize = 256 * 1024;
/// Asks for a message again: it goes to the end of the server's queue of what is redelivered, unless it is in it already.
const NAK: &[u8] = b"-NAK";
/// The same after this time, which takes the message out of that queue. If nothing else follows, because the process
/// ends, it is redelivered then.
const NAK_LATER: &[u8] = b"-NAK 10m";
/// The queue is sorted again where new messages came before what is owed, at most so often: then the run ends.
const PASSED_OVER: u32 = 5;
/// So many pulls in a row that brought nothing mean that nothing is owed any more.
const EMPTY: u32 = 2;
/// A killed run may still have had a pull open: what is pending is asked for again if it changed meanwhile, so often.
const SORTED_AGAIN: u32 = 3;

/// Reads and acknowledges.
#[derive(Debug)]
pub(in crate::copy) struct Explicit {
    pub(in crate::copy) reader: Reader,
    acks: Acks,
    sort: Sort,
    /// Deliveries that had come when the last pull for what comes back was sent.
    pulled_at: u64,
    /// Sent and not answered yet, with the position when it was sent.
    audit: Option<(String, u64)>,
    next_audit: Instant,
    /// Acknowledged before the audit before.
    audited: u64,
}

/// Whether the server's queue of what is redelivered is in order.
#[derive(Debug)]
enum Sort {
    /// Not known: it is sorted before the next pull.
    Due,
    /// The server is being asked.
    Asking(Asking),
    /// The server was asked; the request, and when.
    Asked(String, Instant),
    Done,
}

/// Commands that sort the queue and are not written yet.
#[derive(Debug)]
struct Asking {
    later: vec::IntoIter<u64>,
    now: vec::IntoIter<u64>,
}

/// What was delivered to an earlier run and not acknowledged: it comes back first, ascending.
#[derive(Debug, Default)]
struct Owed {
    /// Messages that have not come back.
    left: u64,
    /// All of them are at this stream sequence or below.
    to: u64,
    /// That one was delivered to this run and dropped: of a sorted queue it comes back last.
    is_last: bool,
    /// A newer message came while some were owed, in the present pull.
    passed_over: bool,
    /// Pulls in which that happened, and those in a row that brought nothing.
    doubts: u32,
    empty: u32,
}

/// What was delivered and what of it is acknowledged.
#[derive(Debug)]
struct Acks {
    subject: String,
    /// Everything in the stream up to here is settled.
    settled: u64,
    /// Up to here the server had everything acknowledged when the run began.
    floor: u64,
    /// Highest sequence that was delivered to this run.
    newest: u64,
    /// Delivered and not settled, ascending.
    waiting: VecDeque<u64>,
    /// Settled, and delivered again.
    again: Vec<u64>,
    owed: Owed,
    /// Sequences, ascending, among which everything is that was delivered to earlier runs and is not acknowledged, and what
    /// was dropped since.
    candidates: Vec<u64>,
    /// So many may wait.
    most: usize,
}

impl Explicit {
    /// Reads behind `position`, where everything is settled.
    pub(in crate::copy) async fn open(
        lane: &mut Lane,
        stream: &str,
        durable: Durable,
        position: u64,
        bytes: usize,
    ) -> Result<Self, Error> {
        let Durable { name, info, .. } = durable;
        let subject = format!("$JS.ACK.{stream}.{name}.1");
        let (info, candidates) = ask_back(lane, stream, &name, &subject, info).await?;
        let owed = Owed { left: info.num_ack_pending, to: info.delivered.stream_seq, ..Owed::default() };
        let most = info.config["max_ack_pending"].as_u64().filter(|most| *most > 0);
        Ok(Self {
            reader: Reader::over(lane, stream, name, position, &info, bytes),
            acks: Acks {
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

    /// Messages of the stream that match and are not taken yet, as last heard.
    pub(in crate::copy) fn pending(&self) -> u64 {
        self.reader.pending() + self.acks.owed.left
    }

    /// Asks for more where that is due. What comes back is asked for by one pull at a time, from a sorted queue.
    pub(in crate::copy) fn pull(&mut self, lane: &mut Lane, budget: &Budget) {
        self.reader.owed = self.acks.owed.left;
        if self.reader.owed == 0 {
            return self.reader.pull(lane, budget);
        }
        if self.reader.is_asking() {
            return;
        }
        match &self.sort {
            Sort::Due => self.sort = Sort::Asking(Asking::of(self.acks.not_back())),
            Sort::Asking(_) | Sort::Asked(..) => {}
            Sort::Done => {
                self.pulled_at = self.reader.consumer_seq;
                self.reader.pull(lane, budget);
                if self.reader.is_asking() {
                    self.sort = Sort::Due;
                }
            }
        }
        if let Sort::Asking(asking) = &mut self.sort {
            let (subject, delivery) = (&self.acks.subject, self.reader.consumer_seq);
            if asking.write(lane.output(), subject, delivery) {
                let request = lane.send_request(&last(subject, self.acks.owed.to, delivery), NAK);
                // What the server takes of the commands is a sign of life.
                lane.ping();
                self.sort = Sort::Asked(request, Instant::now());
            }
        }
    }

    /// Takes in what the lane received.
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
            // A pull that ran out while the server waits for acks says nothing about what follows.
            self.reader.pending = pending;
        }
        if owes && asking && !self.reader.is_asking() && self.reader.need == 0 {
            self.acks.owed.pull_ended(self.reader.consumer_seq > self.pulled_at);
        }
        Ok(())
    }

    /// Whether the consumer still gives signs of life.
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

    /// Whether the server delivers no more before something is acknowledged.
    pub(in crate::copy) fn is_barred(&self) -> bool {
        self.acks.waiting.len() >= self.acks.most
    }

    /// Acknowledges everything up to a position, and asks now and then whether that arrived.
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

    /// What was acknowledged before the last audit has arrived by now, or is lost.
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

impl Asking {
    fn of(asked: Vec<u64>) -> Self {
        Self { later: asked.clone().into_iter(), now: asked.into_iter() }
    }

    /// Writes as much as may wait in a lane; whether that was the rest.
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
    /// What becomes of a delivery. The server redelivers before it delivers anything new: a new message means that the rest
    /// is gone (expired, or acknowledged by what the run before had in flight), or that the server forgot its queue. So it
    /// is dropped, and asked back with the rest. Once it comes back, what has not come before it is gone.
    fn takes(&mut self, seq: u64) -> Verdict {
        if seq < self.to || seq == self.to && !self.is_last {
            self.left -= 1;
            return Verdict::Keep;
        }
        if seq == self.to {
            self.left = 0;
            return Verdict::Keep;
        }
        if self.doubts >= PASSED_OVER {
            return Verdict::Wrong(self.to);
        }
        (self.to, self.is_last, self.passed_over) = (seq, true, true);
        self.left += 1;
        Verdict::Drop
    }

    /// A pull ended, other than for its bytes, and some are still owed.
    fn pull_ended(&mut self, brought_any: bool) {
        self.doubts += u32::from(std::mem::take(&mut self.passed_over));
        self.empty = if brought_any { 0 } else { self.empty + 1 };
        if self.empty >= EMPTY {
            self.left = 0;
        }
    }
}

impl Acks {
    /// Sequences among which everything is that has not come back, ascending.
    fn not_back(&self) -> Vec<u64> {
        let (back, to) = (self.newest.max(self.floor), self.owed.to);
        self.candidates.iter().copied().filter(|seq| *seq > back && *seq <= to).collect()
    }

    fn judge(&mut self, seq: u64) -> Verdict {
        // What comes back comes first and in order: else something would be passed over.
        if self.owed.left > 0 {
            if seq <= self.newest {
                // In flight for longer than the consumer's `ack_wait`.
                let waits = self.waiting.binary_search(&seq).is_ok();
                return if waits { Verdict::Drop } else { Verdict::Wrong(self.newest) };
            }
            let verdict = self.owed.takes(seq);
            if verdict == Verdict::Drop {
                self.candidates.push(seq);
            }
            if verdict != Verdict::Keep {
                return verdict;
            }
        }
        if self.owed.left == 0 {
            // Nothing is asked for again.
            self.candidates = Vec::new();
        }
        let is_new = seq > self.newest;
        self.newest = self.newest.max(seq);
        if seq <= self.settled {
            self.again.push(seq);
            Verdict::Drop
        } else if is_new {
            self.waiting.push_back(seq);
            Verdict::Keep
        } else if self.waiting.binary_search(&seq).is_ok() {
            // Still in the air: it is acknowledged when it settles.
            Verdict::Drop
        } else {
            Verdict::Wrong(self.newest)
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

/// An ack, or what `word` says, for the message at a stream sequence.
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

/// Asks for everything that was delivered and not acknowledged, in order; returns the consumer as it is then, and among
/// which sequences all of that is.
async fn ask_back(
    lane: &mut Lane,
    stream: &str,
    name: &str,
    subject: &str,
    mut info: ConsumerInfo,
) -> Result<(ConsumerInfo, Vec<u64>), Error> {
    let mut candidates = Vec::new();
    for _ in 0..SORTED_AGAIN {
        if info.num_ack_pending == 0 {
            break;
        }
        // A NAK counts only with a delivery that is neither acknowledged nor to come.
        let delivered = info.delivered;
        let range = info.ack_floor.stream_seq + 1..=delivered.stream_seq;
        candidates = pending::candidates(lane, stream, &info.config, range, info.num_ack_pending).await?;
        sort_now(lane, subject, &candidates, delivered).await?;
        let now = Api::new(lane).consumer_info(stream, name).await?;
        info = now.ok_or_else(|| Error::retry(format!("consumer `{name}` of stream `{stream}` is gone")))?;
        if info.delivered.consumer_seq == delivered.consumer_seq {
            break;
        }
    }
    Ok((info, candidates))
}

/// Sorts and waits until the server is through with it: it takes NAKs from a queue of its own, in order, and answers the
/// last one. A pull that it serves before that would bring new messages in front of what was asked back.
async fn sort_now(lane: &mut Lane, subject: &str, asked: &[u64], delivered: SequencePair) -> Result<(), Error> {
    let mut asking = Asking::of(asked.to_vec());
    while !asking.write(lane.output(), subject, delivered.consumer_seq) {
        flush(lane).await?;
    }
    lane.request(&last(subject, delivered.stream_seq, delivered.consumer_seq), NAK).await.map(drop)
}

/// Subject of the command that is answered.
fn last(subject: &str, to: u64, delivery: u64) -> String {
    format!("{subject}.{to}.{delivery}.0.0")
}

/// Writes everything; what arrives meanwhile is nobody's.
async fn flush(lane: &mut Lane) -> Result<(), Error> {
    while !lane.output().is_empty() {
        lane.turn().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acks(settled: u64, left: u64, to: u64) -> Acks {
        Acks {
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

    fn settle(acks: &mut Acks, position: u64) -> Vec<u64> {
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
            assert_eq!(acks.judge(seq), Verdict::Keep, "{seq}");
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
        assert_eq!(acks.judge(3), Verdict::Drop);
        assert_eq!(acks.judge(5), Verdict::Keep);
        assert_eq!(acks.judge(5), Verdict::Drop);
        assert_eq!(settle(&mut acks, 4), [3]);
        assert_eq!(settle(&mut acks, 5), [5]);
        assert_eq!(acks.judge(5), Verdict::Drop);
        assert_eq!(settle(&mut acks, 5), [5]);
    }

    #[test]
    fn what_was_passed_over_is_an_error() {
        let mut late = acks(4, 0, 0);
        assert_eq!(late.judge(21), Verdict::Keep);
        assert_eq!(late.judge(6), Verdict::Wrong(21));
        let mut unsorted = acks(4, 3, 8);
        assert_eq!(unsorted.judge(8), Verdict::Keep);
        assert_eq!(unsorted.judge(3), Verdict::Wrong(8), "also what is settled: the order is not what was asked for");
    }

    #[test]
    fn a_new_message_before_what_comes_back_is_asked_for_again() {
        let mut acks = acks(4, 2, 8);
        assert_eq!(acks.judge(6), Verdict::Keep);
        // The server forgot its queue.
        assert_eq!((acks.judge(9), acks.judge(10)), (Verdict::Drop, Verdict::Drop));
        assert_eq!((acks.owed.left, acks.owed.to), (3, 10));
        // Only what may be pending, in order, and what was dropped.
        assert_eq!(acks.not_back(), [7, 8, 9, 10]);
        acks.owed.pull_ended(true);
        for seq in [8, 9, 10, 11] {
            assert_eq!(acks.judge(seq), Verdict::Keep, "{seq}");
        }
        assert_eq!(acks.owed.left, 0);
        assert_eq!(settle(&mut acks, 11), [6, 8, 9, 10, 11]);
    }

    #[test]
    fn what_does_not_come_back_twice_is_gone() {
        let mut expired = acks(4, 2, 8);
        assert_eq!(expired.judge(9), Verdict::Drop);
        expired.owed.pull_ended(true);
        assert_eq!((expired.judge(9), expired.judge(10)), (Verdict::Keep, Verdict::Keep));
        assert_eq!(expired.owed.left, 0);
        let mut empty = acks(4, 2, 8);
        empty.owed.pull_ended(false);
        assert_eq!(empty.owed.left, 2);
        empty.owed.pull_ended(false);
        assert_eq!((empty.owed.left, empty.judge(9)), (0, Verdict::Keep));
    }

    #[test]
    fn a_queue_that_is_forgotten_again_loses_nothing() {
        let mut acks = acks(4, 3, 8);
        // A leader that has just taken over and has no queue; another one, that delivers new messages first, twice.
        acks.owed.pull_ended(false);
        assert_eq!(acks.judge(9), Verdict::Drop);
        acks.owed.pull_ended(true);
        assert_eq!(acks.judge(10), Verdict::Drop);
        acks.owed.pull_ended(true);
        for seq in [6, 7, 8, 9, 10, 11] {
            assert_eq!(acks.judge(seq), Verdict::Keep, "{seq}");
        }
        assert_eq!(settle(&mut acks, 11), [6, 7, 8, 9, 10, 11]);
    }

    #[test]
    fn what_never_comes_back_in_order_is_an_error() {
        let mut acks = acks(4, 3, 8);
        for seq in 9..9 + u64::from(PASSED_OVER) {
            assert_eq!(acks.judge(seq), Verdict::Drop, "{seq}");
            acks.owed.pull_ended(true);
        }
        assert_eq!(acks.judge(20), Verdict::Wrong(13));
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
