//! Reads from a durable pull consumer with explicit acks: the way for streams that forget what was acknowledged, on
//! servers before 2.14 or where such a consumer is there already. Pulls are those of [`Reader`], so what is read ahead
//! is bounded in bytes; the consumer's `max_ack_pending` bounds what is not acknowledged.
//!
//! A message is acknowledged once everything up to it is settled. What was delivered to a run before this one and not
//! acknowledged comes back first, in order; that is seen to by [`bring_back`].

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use bytes::BytesMut;
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::{Reader, SILENCE, Verdict, next_delivery};
use crate::{
    copy::durable::Durable,
    nats::{
        Batch, Error, Lane, Turn, headers,
        jetstream::{ConsumerInfo, decode, is_delivery},
    },
};

/// How often the server is asked what it still waits for: acks are lost when the leader of a consumer changes.
const AUDIT: Duration = Duration::from_secs(10);
/// Sequences that one audit acknowledges again at most.
const AUDIT_MOST: u64 = 100_000;
/// A pull for what comes back ends after this.
const BACK_EXPIRES: Duration = Duration::from_secs(2);
/// A pull for what comes back asks for so many bytes: a server may cut a client for which much waits.
const BACK_BYTES: usize = 128 * 1024;
/// Commands that are written before the lane is flushed.
const FLUSH_EVERY: usize = 4_096;
/// Asks for a message again.
const NAK: &[u8] = b"-NAK";

/// Reads and acknowledges.
#[derive(Debug)]
pub(in crate::copy) struct Explicit {
    pub(in crate::copy) reader: Reader,
    acks: Acks,
    /// Sent and not answered yet, with the position when it was sent.
    audit: Option<(String, u64)>,
    next_audit: Instant,
    /// Acknowledged before the audit before.
    audited: u64,
}

/// What was delivered and what of it is acknowledged.
#[derive(Debug)]
struct Acks {
    subject: String,
    /// Everything in the stream up to here is settled.
    settled: u64,
    /// Highest sequence that was delivered to this run.
    newest: u64,
    /// Delivered and not settled, ascending.
    waiting: VecDeque<u64>,
    /// Settled, and delivered again.
    again: Vec<u64>,
    /// What comes back first, ascending.
    owed: VecDeque<u64>,
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
        let Durable { name, mut info, .. } = durable;
        let subject = format!("$JS.ACK.{stream}.{name}.1");
        let owed = bring_back(lane, stream, &name, &subject, &mut info).await?;
        let most = info.config["max_ack_pending"].as_u64().filter(|most| *most > 0);
        Ok(Self {
            reader: Reader::over(lane, stream, name, position, &info, bytes),
            acks: Acks {
                subject,
                settled: position,
                newest: 0,
                waiting: VecDeque::new(),
                again: Vec::new(),
                owed,
                most: most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX),
            },
            audit: None,
            next_audit: Instant::now() + AUDIT,
            audited: 0,
        })
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
        let acks = &mut self.acks;
        let (pending, last) = (self.reader.pending, self.reader.consumer_seq);
        self.reader.accept_if(batch, |delivery| acks.judge(delivery.stream_seq)).map_err(|lost| lost.error)?;
        if self.reader.consumer_seq == last && self.is_barred() {
            // A pull that ran out while the server waits for acks says nothing about what follows.
            self.reader.pending = pending;
        }
        Ok(())
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

impl Acks {
    fn judge(&mut self, seq: u64) -> Verdict {
        // What comes back comes first and in order: else something would be passed over.
        if self.owed.pop_front().is_some_and(|owed| owed != seq) {
            return Verdict::Wrong(self.newest);
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

/// Brings back, in order, what was delivered and not acknowledged; returns the sequences that come next.
///
/// A NAK puts a message at the end of the server's queue of what is delivered again, and one that waits there already
/// stays where it is: so what a run before asked back and did not get would come first. Therefore everything is asked
/// back, received and dropped; then nothing waits in that queue, and it is asked back once more, in order.
async fn bring_back(
    lane: &mut Lane,
    stream: &str,
    name: &str,
    subject: &str,
    info: &mut ConsumerInfo,
) -> Result<VecDeque<u64>, Error> {
    if info.num_ack_pending == 0 {
        return Ok(VecDeque::new());
    }
    let (sid, inbox) = lane.open_inbox();
    // A NAK counts only with a delivery that is neither acknowledged nor to come.
    let last = info.delivered.consumer_seq;
    let asked = info.ack_floor.stream_seq + 1..=info.delivered.stream_seq;
    ask_back(lane, subject, asked.clone(), last).await?;
    let mut seen = BTreeSet::new();
    let (mut number, mut bytes) = (0u64, BACK_BYTES);
    loop {
        // New ones among them come back too.
        let back = seen.iter().filter(|seq| asked.contains(seq)).count() as u64;
        let batch = info.num_ack_pending.saturating_sub(back);
        if batch == 0 {
            break;
        }
        number += 1;
        let pull = json!({ "batch": batch, "max_bytes": bytes, "expires": BACK_EXPIRES.as_nanos() as u64 });
        let next = format!("{}.CONSUMER.MSG.NEXT.{stream}.{name}", lane.api_prefix());
        let reply = format!("{inbox}.{number}");
        lane.publish(&next, &reply, pull.to_string().as_bytes());
        let before = seen.len();
        let pull = (sid, reply.as_str(), batch, bytes);
        let end = receive(lane, stream, pull, &mut info.delivered.consumer_seq, &mut seen).await?;
        if end == Back::Bytes && seen.len() == before {
            // The next message alone needs more.
            bytes *= 2;
        } else if end == Back::Nothing && seen.len() == before {
            // The rest is gone: expired, or acknowledged by what the run before had on the way. If it comes all the
            // same, it is noticed.
            break;
        }
    }
    lane.close_inbox(sid);
    ask_back(lane, subject, seen.iter().copied(), info.delivered.consumer_seq).await?;
    Ok(seen.into_iter().collect())
}

/// How a pull for what comes back ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    /// It brought all that was asked for.
    All,
    /// Its bytes were used up, or less than the next message.
    Bytes,
    /// Nothing more came.
    Nothing,
}

/// Receives what a pull brings, by sequence. Of the pull: its subscription, its reply subject, and how many messages and
/// bytes it asks for.
async fn receive(
    lane: &mut Lane,
    stream: &str,
    (sid, reply, mut left, bytes): (u64, &str, u64, usize),
    consumer_seq: &mut u64,
    seen: &mut BTreeSet<u64>,
) -> Result<Back, Error> {
    let deadline = Instant::now() + SILENCE;
    let mut unspent = bytes as i64;
    while left > 0 && unspent > 0 {
        let turn = timeout_at(deadline, lane.turn()).await.map_err(|_| {
            Error::retry(format!(
                "what was delivered of stream `{stream}` before does not come back within {SILENCE:?}"
            ))
        })??;
        let Turn::Received(batch) = turn else { continue };
        for message in batch.iter().filter(|message| message.sid == sid) {
            if is_delivery(message.reply) {
                seen.insert(next_delivery(stream, &message, consumer_seq)?.stream_seq);
                left = left.saturating_sub(1);
                // The server counts the same parts. A pull that is used up to the last byte may end without a word.
                let parts = [message.subject, message.reply, message.header, message.payload];
                unspent -= parts.iter().map(|part| part.len() as i64).sum::<i64>();
                continue;
            }
            let text = headers::status_text(message.header);
            match headers::status(message.header) {
                // Of a pull before.
                _ if message.subject != reply.as_bytes() => {}
                Some(404 | 408) => return Ok(Back::Nothing),
                Some(409) if text.contains("MaxBytes") || text.contains("Batch Completed") => return Ok(Back::Bytes),
                Some(100) => {}
                _ => {
                    return Err(Error::retry(format!("consumer of stream `{stream}` ended: {text}")));
                }
            }
        }
    }
    Ok(if left == 0 { Back::All } else { Back::Bytes })
}

/// Sends NAKs and waits until the server is through with them: it takes them from a queue of its own, in order, and answers
/// the last one. A pull that it serves before that would bring new messages in front of what was asked back.
async fn ask_back(lane: &mut Lane, subject: &str, seqs: impl Iterator<Item = u64>, delivery: u64) -> Result<(), Error> {
    let mut last = None;
    for (index, seq) in seqs.enumerate() {
        if let Some(before) = last.replace(seq) {
            write(lane.output(), subject, before, delivery, NAK);
        }
        if index % FLUSH_EVERY == FLUSH_EVERY - 1 {
            flush(lane).await?;
        }
    }
    match last {
        Some(seq) => lane.request(&format!("{subject}.{seq}.{delivery}.0.0"), NAK).await.map(drop),
        None => Ok(()),
    }
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

    fn acks(settled: u64, owed: &[u64]) -> Acks {
        Acks {
            subject: "$JS.ACK.S.C.1".to_owned(),
            settled,
            newest: 0,
            waiting: VecDeque::new(),
            again: Vec::new(),
            owed: owed.iter().copied().collect(),
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
        let mut acks = acks(4, &[]);
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
    fn what_comes_again_is_dropped_and_acknowledged_when_it_is_settled() {
        let mut acks = acks(4, &[3, 5]);
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
        let mut early = acks(4, &[6, 7]);
        assert_eq!(early.judge(21), Verdict::Wrong(0));
        let mut late = acks(4, &[]);
        assert_eq!(late.judge(21), Verdict::Keep);
        assert_eq!(late.judge(6), Verdict::Wrong(21));
    }

    #[test]
    fn an_ack_is_one_line() {
        let mut output = BytesMut::new();
        write(&mut output, "$JS.ACK.S.C.1", 42, 42, b"");
        write(&mut output, "$JS.ACK.S.C.1", 43, 7, NAK);
        assert_eq!(&output[..], b"PUB $JS.ACK.S.C.1.42.42.0.0 0\r\n\r\nPUB $JS.ACK.S.C.1.43.7.0.0 4\r\n-NAK\r\n");
    }
}
