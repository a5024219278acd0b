//! One consumer that a mirror was given: what is delivered under its name, what the target has stored of it, and what is in
//! flight. Pure: frames come out as bytes.
//!
//! Nothing is acknowledged one by one. Now and then a flow control message goes with the data; the target answers it when it has
//! processed everything before it, which bounds what waits in the target's memory. What it holds of that settles when it is seen
//! there.

use std::collections::VecDeque;

use nats_lane::{headers, jetstream::Delivery, parser::number};
use tokio::time::Instant;

use super::window::{Amount, FeedWindow};
use crate::copy::MessageSize;

const FLOW_CONTROL: &[u8] = b"NATS/1.0 100 FlowControl Request\r\n\r\n";
/// Number of the flow control message before the first delivery.
const GREETING: u64 = 0;
/// A number of deliveries that no consumer has reached.
const NEVER_REACHED: u64 = 1 << 60;

/// A message of the source that was delivered, or settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FedPoint {
    /// Its sequence; 0 for none.
    pub seq: u64,
    /// Its stored time, nanoseconds since the Unix epoch; `None` where it is not known.
    pub time_ns: Option<i64>,
}

/// What was delivered between two flow control messages.
#[derive(Debug, Clone, Default)]
struct FeedPart {
    amount: Amount,
    first: FedPoint,
    last: FedPoint,
    /// Subject of the last message.
    subject: Vec<u8>,
    /// How many messages of the consumer were delivered with it.
    delivered: u64,
    /// When the target answered.
    answered: Option<Instant>,
}

/// A consumer of a mirror.
#[derive(Debug)]
pub(super) struct FeedSession {
    /// What the reply subjects of its deliveries begin with, with their dot.
    ack: String,
    /// Where it is delivered to, and another subject that the target may listen on instead.
    deliver: [String; 2],
    /// Which of them the target listens on.
    listens: Option<usize>,
    /// What the subjects of flow control answers begin with, with their dot.
    flow: String,
    /// Whether the target has answered for this consumer: before that, it may have lost the answer to its request, and listen for a
    /// sign of life alone.
    is_taken: bool,
    delivered: u64,
    last: FedPoint,
    /// Since the last flow control message.
    open: FeedPart,
    /// With flow control messages that are not answered, oldest first.
    parts: VecDeque<FeedPart>,
    /// Number of the oldest of them.
    first: u64,
    /// Those that are answered, oldest first, as long as they are not known to be stored.
    processed: VecDeque<FeedPart>,
    in_flight: Amount,
    window: FeedWindow,
}

impl FeedSession {
    /// A consumer that delivers what comes after `before`.
    pub fn new(
        stream: &str,
        consumer: String,
        deliver: [String; 2],
        flow: &str,
        before: FedPoint,
        window: FeedWindow,
    ) -> Self {
        let flow = format!("{flow}.{consumer}.");
        Self {
            ack: format!("$JS.ACK.{stream}.{consumer}.1."),
            deliver,
            listens: None,
            flow,
            is_taken: false,
            delivered: 0,
            last: before,
            open: FeedPart::default(),
            parts: VecDeque::new(),
            first: 1,
            processed: VecDeque::new(),
            in_flight: Amount::default(),
            window,
        }
    }

    /// The target has begun to listen on a subject, or ended: whether it is one of this consumer's.
    pub fn hear(&mut self, subject: &str, begins: bool) -> bool {
        let Some(index) = self.deliver.iter().position(|own| own == subject) else { return false };
        match self.listens {
            None if begins => self.listens = Some(index),
            Some(listens) if !begins && listens == index => self.listens = None,
            _ => return false,
        }
        true
    }

    /// Where to deliver to, once the target listens.
    pub fn subject(&self) -> Option<&str> {
        self.listens.map(|index| self.deliver[index].as_str())
    }

    /// The newest message that was delivered, or the one before the first.
    pub fn last(&self) -> FedPoint {
        self.last
    }

    /// How many messages were delivered.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// What was delivered and is not known to be stored.
    pub fn in_flight(&self) -> Amount {
        self.in_flight
    }

    /// The oldest message that was delivered and is not known to be stored.
    pub fn oldest(&self) -> Option<FedPoint> {
        let part = self.processed.front().or(self.parts.front()).unwrap_or(&self.open);
        (part.amount.messages > 0).then_some(part.first)
    }

    /// Whether the window is full.
    pub fn is_full(&self) -> bool {
        self.window.is_full(self.parts.len())
    }

    /// Whether the target is known to have stored everything that was delivered.
    pub fn is_settled(&self) -> bool {
        self.in_flight.messages == 0
    }

    /// Whether the target has processed everything that was delivered.
    pub fn is_processed(&self) -> bool {
        self.parts.is_empty() && self.open.amount.messages == 0
    }

    /// What the target has processed and is not known to have stored.
    pub fn unproven(&self) -> Amount {
        let mut unproven = Amount::default();
        self.processed.iter().for_each(|part| unproven.add(part.amount));
        unproven
    }

    /// The newest message that the target had processed at a time, and is not known to have stored.
    pub fn processed_before(&self, time: Instant) -> Option<u64> {
        let before = |part: &&FeedPart| part.answered.is_some_and(|answered| answered <= time);
        self.processed.iter().rev().find(before).map(|part| part.last.seq)
    }

    /// Since when the oldest message is processed that is not known to be stored.
    pub fn processed_since(&self) -> Option<Instant> {
        self.processed.front().and_then(|part| part.answered)
    }

    /// Subject of the newest message that is processed, and not known to be stored.
    pub fn processed_subject(&self) -> Option<&[u8]> {
        self.processed.back().map(|part| part.subject.as_slice())
    }

    /// The target holds everything up to a sequence: what of that was processed and not known to be stored, and its last message.
    pub fn holds(&mut self, seq: u64) -> Option<(Amount, FedPoint)> {
        let (mut amount, mut last) = (Amount::default(), None);
        let count = self.processed.iter().take_while(|part| part.last.seq <= seq).count();
        for part in self.processed.drain(..count) {
            amount.add(part.amount);
            last = Some(part.last);
        }
        self.in_flight.subtract(amount);
        last.map(|last| (amount, last))
    }

    /// Takes the next message as delivered, and writes its reply subject: the target finds sequence and time in it, and the
    /// subject of the message after `@`.
    pub fn deliver(&mut self, delivery: &Delivery, subject: &[u8], size: MessageSize, reply: &mut Vec<u8>) {
        self.delivered += 1;
        reply.clear();
        let Delivery { stream_seq, time_ns, pending, .. } = delivery;
        let mut number = itoa::Buffer::new();
        reply.extend_from_slice(self.ack.as_bytes());
        reply.extend_from_slice(number.format(*stream_seq).as_bytes());
        reply.push(b'.');
        reply.extend_from_slice(number.format(self.delivered).as_bytes());
        reply.push(b'.');
        reply.extend_from_slice(number.format(*time_ns).as_bytes());
        reply.push(b'.');
        reply.extend_from_slice(number.format(*pending).as_bytes());
        reply.push(b'@');
        reply.extend_from_slice(subject);
        let amount = Amount { messages: 1, bytes: size.bytes as u64, payload: size.payload as u64 };
        self.last = FedPoint { seq: *stream_seq, time_ns: Some(*time_ns) };
        if self.open.amount.messages == 0 {
            self.open.first = self.last;
        }
        self.open.amount.add(amount);
        self.open.last = self.last;
        self.open.subject.clear();
        self.open.subject.extend_from_slice(subject);
        self.in_flight.add(amount);
    }

    /// Whether the target is known to have this consumer.
    pub fn is_taken(&self) -> bool {
        self.is_taken
    }

    /// What the subjects of its flow control answers begin with.
    pub fn answers(&self) -> &[u8] {
        self.flow.as_bytes()
    }

    /// A flow control message before the first delivery, as its reply subject and header: a target that has this consumer answers it.
    pub fn greeting(&self) -> Option<(String, &'static [u8])> {
        (self.delivered == 0).then(|| (format!("{}{GREETING}", self.flow), FLOW_CONTROL))
    }

    /// The flow control message that is due, as its reply subject and header: at the end of a part, and where no more
    /// messages wait, unless one is on its way already.
    pub fn flow_control(&mut self, dry: bool, now: Instant) -> Option<(String, &'static [u8])> {
        let complete = self.window.is_part(&self.open.amount);
        let due = complete || (dry && self.open.amount.messages > 0 && self.parts.is_empty());
        if !due || self.is_full() {
            return None;
        }
        self.window.sent(self.parts.len(), now);
        let number = self.first + self.parts.len() as u64;
        self.open.delivered = self.delivered;
        self.parts.push_back(std::mem::take(&mut self.open));
        Some((format!("{}{number}", self.flow), FLOW_CONTROL))
    }

    /// Takes the answer to a flow control message: the last message that the target has processed. `None` if it
    /// is none of this consumer's, or old, or if its header says that the target has dropped some of them: servers from 2.14 on say
    /// how many they have taken.
    pub fn answered(&mut self, subject: &[u8], header: &[u8], now: Instant) -> Option<FedPoint> {
        let answered = number(subject.strip_prefix(self.flow.as_bytes())?)?;
        self.is_taken = true;
        let count =
            (answered + 1).checked_sub(self.first).filter(|count| (1..=self.parts.len() as u64).contains(count))?;
        let taken = headers::last(header, b"Nats-Last-Consumer").and_then(number);
        if taken.is_some_and(|taken| taken < self.parts[count as usize - 1].delivered) {
            return None;
        }
        for mut part in self.parts.drain(..count as usize) {
            part.answered = Some(now);
            self.processed.push_back(part);
        }
        self.first += count;
        self.window.stored(count as usize, now);
        self.processed.back().map(|part| part.last)
    }

    /// The header of a sign of life. It names the last delivery, so that the target sees the loss of the very last one.
    pub fn heartbeat(&self) -> Vec<u8> {
        heartbeat(self.delivered, self.last.seq)
    }
}

/// The header of a sign of life that has a target which waits for a consumer of the past ask for another one at once.
pub(super) fn poke() -> Vec<u8> {
    heartbeat(NEVER_REACHED, NEVER_REACHED)
}

fn heartbeat(delivered: u64, seq: u64) -> Vec<u8> {
    format!("NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: {delivered}\r\nNats-Last-Stream: {seq}\r\n\r\n")
        .into_bytes()
}

/// Whether a target would take a stored message for a control message: it has a status and no payload. Servers up to 2.11
/// store such messages.
pub(super) fn is_control(header: &[u8], payload: &[u8]) -> bool {
    payload.is_empty() && headers::status(header) == Some(100)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BOUND: Amount = Amount { messages: 8, bytes: 4000, payload: 0 };

    fn session() -> FeedSession {
        let deliver = ["D.own".to_owned(), "D.M.theirs".to_owned()];
        let window = FeedWindow::new(BOUND, Duration::ZERO);
        FeedSession::new("S", "C".to_owned(), deliver, "F", FedPoint { seq: 10, time_ns: None }, window)
    }

    fn deliver(session: &mut FeedSession, seq: u64) -> String {
        let delivery = Delivery { stream_seq: seq, consumer_seq: 77, time_ns: 5, pending: 3 };
        let mut reply = b"old".to_vec();
        session.deliver(&delivery, b"a.b@c", MessageSize { bytes: 100, payload: 90 }, &mut reply);
        String::from_utf8(reply).unwrap()
    }

    #[test]
    fn deliveries_are_counted_without_holes() {
        let mut session = session();
        assert_eq!(deliver(&mut session, 11), "$JS.ACK.S.C.1.11.1.5.3@a.b@c");
        assert_eq!(deliver(&mut session, 15), "$JS.ACK.S.C.1.15.2.5.3@a.b@c");
        assert_eq!(session.last(), FedPoint { seq: 15, time_ns: Some(5) });
        let heartbeat = String::from_utf8(session.heartbeat()).unwrap();
        assert!(heartbeat.contains("Nats-Last-Consumer: 2\r\n") && heartbeat.contains("Nats-Last-Stream: 15\r\n"));
        assert_eq!(headers::status(heartbeat.as_bytes()), Some(100));
    }

    #[test]
    fn nothing_is_sent_before_the_target_listens() {
        let mut session = session();
        assert_eq!(session.subject(), None);
        assert!(!session.hear("D.M.other", true));
        assert!(session.hear("D.M.theirs", true));
        assert_eq!(session.subject(), Some("D.M.theirs"));
        assert!(!session.hear("D.own", false));
        assert!(session.hear("D.M.theirs", false));
        assert_eq!(session.subject(), None);
        assert!(session.hear("D.own", true));
        assert_eq!(session.subject(), Some("D.own"));
    }

    #[test]
    fn the_window_is_bounded_and_settles_in_order() {
        let mut session = session();
        let now = Instant::now();
        let mut asked = Vec::new();
        let mut seq = 10;
        while !session.is_full() {
            seq += 1;
            deliver(&mut session, seq);
            asked.extend(session.flow_control(false, now).map(|(subject, _)| subject));
        }
        assert_eq!(session.oldest().map(|oldest| oldest.seq), Some(11));
        assert_eq!(asked, ["F.C.1", "F.C.2", "F.C.3", "F.C.4"]);
        assert_eq!(session.in_flight(), Amount { messages: 8, bytes: 800, payload: 720 });
        assert_eq!(session.answered(b"F.X.1", b"", now), None);
        assert!(!session.is_taken() && session.greeting().is_none());
        assert_eq!(session.answered(b"F.C.0", b"", now), None, "nothing was delivered before it");
        assert!(session.is_taken());
        assert_eq!(session.answered(b"F.C.5", b"", now), None);
        assert_eq!(session.answered(b"F.C.2", b"", now).unwrap().seq, 14);
        assert_eq!((session.unproven().messages, session.in_flight().messages), (4, 8));
        assert_eq!(session.oldest().map(|oldest| oldest.seq), Some(11));
        let (amount, last) = session.holds(14).unwrap();
        assert_eq!((amount.messages, last.seq), (4, 14));
        assert_eq!(session.oldest().map(|oldest| oldest.seq), Some(15));
        assert_eq!(session.answered(b"F.C.1", b"", now), None, "an old answer");
        assert!(!session.is_full());
        assert_eq!(session.answered(b"F.C.4", b"", now).unwrap().seq, 18);
        assert!(session.is_processed() && !session.is_settled());
        let (amount, last) = session.holds(18).unwrap();
        assert_eq!((amount.messages, last.seq), (4, 18));
        assert!(session.is_settled() && session.oldest().is_none());
        deliver(&mut session, 19);
        assert!(session.flow_control(true, now).is_some());
        let header = |taken: u64| format!("NATS/1.0\r\nNats-Last-Consumer: {taken}\r\n\r\n").into_bytes();
        assert_eq!(session.answered(b"F.C.5", &header(8), now), None, "the ninth was dropped");
        assert!(session.answered(b"F.C.5", &header(9), now).is_some());
        session.holds(19).unwrap();
        deliver(&mut session, 20);
        assert_eq!(session.oldest().map(|oldest| oldest.seq), Some(20));
    }

    #[test]
    fn what_a_target_refused_is_not_settled() {
        let mut session = session();
        let (before, now) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        for seq in 11..=16 {
            deliver(&mut session, seq);
            session.flow_control(false, now);
        }
        session.answered(b"F.C.3", b"", now).unwrap();
        assert_eq!(session.processed_since(), Some(now));
        assert_eq!((session.processed_before(before), session.processed_before(now)), (None, Some(16)));
        assert_eq!(session.processed_subject(), Some(&b"a.b@c"[..]));
        // It holds the first part, and half of the second.
        let (amount, last) = session.holds(13).unwrap();
        assert_eq!((amount.messages, last.seq), (2, 12));
        assert_eq!(session.oldest().map(|oldest| oldest.seq), Some(13));
        assert!(session.holds(13).is_none() && !session.is_settled());
        assert_eq!((session.unproven().messages, session.in_flight().messages), (4, 4));
    }

    #[test]
    fn a_window_by_bytes_too() {
        let mut session = session();
        let now = Instant::now();
        let delivery = Delivery { stream_seq: 11, consumer_seq: 1, time_ns: 5, pending: 0 };
        session.deliver(&delivery, b"a", MessageSize { bytes: 5000, payload: 4999 }, &mut Vec::new());
        assert!(session.flow_control(false, now).is_some());
    }

    #[test]
    fn the_end_of_a_backlog_is_settled_too() {
        let mut session = session();
        let now = Instant::now();
        assert!(session.flow_control(true, now).is_none(), "nothing to settle");
        deliver(&mut session, 11);
        assert!(session.flow_control(false, now).is_none());
        assert!(session.flow_control(true, now).is_some());
        deliver(&mut session, 12);
        assert!(session.flow_control(true, now).is_none(), "one is on its way");
        session.answered(b"F.C.1", b"", now).unwrap();
        assert!(session.flow_control(true, now).is_some());
        assert_eq!(session.answered(b"F.C.2", b"", now).unwrap().seq, 12);
    }

    #[test]
    fn a_stored_message_that_looks_like_control_is_seen() {
        assert!(is_control(b"NATS/1.0 100 x\r\n\r\n", b""));
        assert!(!is_control(b"NATS/1.0 100 x\r\n\r\n", b"p"));
        assert!(!is_control(b"NATS/1.0\r\nA: 100\r\n\r\n", b""));
        assert!(!is_control(b"", b""));
    }
}
