//! What was accepted and is not stored yet. Pure.
//!
//! A message waits, is sent, and leaves when the target has acknowledged it. After an error it waits again under the same
//! id: a target that had stored it refuses the second one as a duplicate.

use std::collections::{BTreeSet, HashMap, VecDeque};

use tokio::time::Instant;

/// Bytes of a message beside its body: subject, headers and what the queue needs.
const OVERHEAD: usize = 256;

/// A message for the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueuedMessage {
    pub(super) subject: String,
    /// Its `Nats-Msg-Id`.
    pub(super) id: [u8; 32],
    pub(super) body: Vec<u8>,
    /// When it was accepted.
    pub(super) since: Instant,
    /// Where it is from, if it is to be acknowledged there.
    pub(super) mark: Option<StreamMark>,
}

/// A message of a stream that waits for its ack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StreamMark {
    pub(super) sequence: u64,
    /// Subject of the ack.
    pub(super) ack: String,
}

impl QueuedMessage {
    fn size(&self) -> usize {
        self.subject.len() + self.body.len() + OVERHEAD
    }
}

#[derive(Debug)]
struct QueueSlot {
    message: QueuedMessage,
    /// When it was sent, if it is in flight.
    sent: Option<Instant>,
}

/// A queue that is bounded in messages and bytes.
#[derive(Debug)]
pub(super) struct OutputQueue {
    most: usize,
    most_bytes: usize,
    slots: HashMap<u64, QueueSlot>,
    /// Tokens that wait, the oldest first.
    waiting: BTreeSet<u64>,
    /// Tokens in the order in which they were sent; some are settled or wait again.
    sent: VecDeque<(Instant, u64)>,
    next: u64,
    bytes: usize,
    bytes_in_flight: usize,
}

/// Tokens begin here: lower numbers are those of requests on the same connection.
const FIRST_TOKEN: u64 = 1 << 32;

impl OutputQueue {
    pub(super) fn new(most: usize, most_bytes: usize) -> Self {
        Self {
            most,
            most_bytes,
            slots: HashMap::new(),
            waiting: BTreeSet::new(),
            sent: VecDeque::new(),
            next: FIRST_TOKEN,
            bytes: 0,
            bytes_in_flight: 0,
        }
    }

    /// Messages that wait or are in flight.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Their bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Messages in flight, and their bytes.
    pub(super) fn in_flight(&self) -> (usize, usize) {
        (self.slots.len() - self.waiting.len(), self.bytes_in_flight)
    }

    /// Adds a message; `false` if there is no room for it.
    pub(super) fn push(&mut self, message: QueuedMessage) -> bool {
        let size = message.size();
        // Of a stream only as much is requested as there is room for.
        let requested = message.mark.is_some();
        if !requested && (self.slots.len() >= self.most || self.bytes + size > self.most_bytes) {
            return false;
        }
        self.bytes += size;
        self.waiting.insert(self.next);
        self.slots.insert(self.next, QueueSlot { message, sent: None });
        self.next += 1;
        true
    }

    /// The oldest message that waits; it is in flight from now on.
    pub(super) fn send(&mut self, now: Instant) -> Option<(u64, &QueuedMessage)> {
        let token = self.waiting.pop_first()?;
        let slot = self.slots.get_mut(&token)?;
        slot.sent = Some(now);
        self.sent.push_back((now, token));
        self.bytes_in_flight += slot.message.size();
        Some((token, &slot.message))
    }

    /// A message leaves the queue; `None` if it is not in it.
    pub(super) fn settle(&mut self, token: u64) -> Option<QueuedMessage> {
        let QueueSlot { message, sent } = self.slots.remove(&token)?;
        self.bytes -= message.size();
        if sent.is_some() {
            self.bytes_in_flight -= message.size();
        } else {
            self.waiting.remove(&token);
        }
        Some(message)
    }

    /// A message in flight waits again; `false` if it is not in flight.
    pub(super) fn again(&mut self, token: u64) -> bool {
        let Some(slot) = self.slots.get_mut(&token).filter(|slot| slot.sent.is_some()) else { return false };
        slot.sent = None;
        self.bytes_in_flight -= slot.message.size();
        self.waiting.insert(token)
    }

    /// The connection is lost: everything in flight waits again. Returns how many messages that are.
    pub(super) fn all_again(&mut self) -> usize {
        let sent = std::mem::take(&mut self.sent);
        sent.into_iter().filter(|(_, token)| self.again(*token)).count()
    }

    /// When the oldest message in flight was sent.
    pub(super) fn oldest_sent(&mut self) -> Option<Instant> {
        while let Some((at, token)) = self.sent.front() {
            if self.slots.get(token).is_some_and(|slot| slot.sent == Some(*at)) {
                return Some(*at);
            }
            self.sent.pop_front();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn message(body: &str) -> QueuedMessage {
        QueuedMessage { subject: "a".to_owned(), id: [b'0'; 32], body: body.into(), since: Instant::now(), mark: None }
    }

    fn bodies(queue: &mut OutputQueue, now: Instant) -> Vec<(u64, String)> {
        std::iter::from_fn(|| {
            let (token, message) = queue.send(now)?;
            Some((token - FIRST_TOKEN, String::from_utf8(message.body.clone()).unwrap()))
        })
        .collect()
    }

    #[test]
    fn messages_and_bytes_are_bounded() {
        let mut queue = OutputQueue::new(2, 1 << 20);
        assert!(queue.push(message("a")) && queue.push(message("b")));
        assert!(!queue.push(message("c")));
        assert_eq!((queue.len(), queue.bytes()), (2, 2 * (OVERHEAD + 2)));
        let mut queue = OutputQueue::new(100, 2 * OVERHEAD + 4);
        assert!(queue.push(message("a")) && !queue.push(message("long")) && queue.push(message("b")));
        assert!(!queue.push(message("")));
        let mark = Some(StreamMark { sequence: 1, ack: "a".to_owned() });
        assert!(queue.push(QueuedMessage { mark, ..message("it was requested") }));
    }

    #[tokio::test]
    async fn what_is_acknowledged_leaves_and_makes_room() {
        let mut queue = OutputQueue::new(2, 1 << 20);
        queue.push(message("a"));
        queue.push(message("b"));
        let now = Instant::now();
        assert_eq!(bodies(&mut queue, now), [(0, "a".to_owned()), (1, "b".to_owned())]);
        assert_eq!(queue.in_flight().0, 2);
        assert_eq!(queue.settle(FIRST_TOKEN + 1).map(|message| message.body), Some(b"b".to_vec()));
        assert_eq!(queue.settle(FIRST_TOKEN + 1), None);
        assert!(queue.push(message("c")));
        assert_eq!(queue.oldest_sent(), Some(now));
        queue.settle(FIRST_TOKEN);
        assert_eq!((queue.in_flight(), queue.len(), queue.oldest_sent()), ((0, 0), 1, None));
    }

    #[tokio::test]
    async fn after_an_error_the_oldest_come_first_again() {
        let mut queue = OutputQueue::new(9, 1 << 20);
        for body in ["a", "b", "c", "d"] {
            queue.push(message(body));
        }
        let first = Instant::now();
        for _ in 0..3 {
            queue.send(first);
        }
        assert!(queue.again(FIRST_TOKEN + 1) && !queue.again(FIRST_TOKEN + 1) && !queue.again(FIRST_TOKEN + 3));
        assert_eq!(queue.all_again(), 2);
        assert_eq!((queue.in_flight(), queue.oldest_sent()), ((0, 0), None));
        let second = first + Duration::from_secs(1);
        let order: Vec<_> = bodies(&mut queue, second).into_iter().map(|(_, body)| body).collect();
        assert_eq!(order, ["a", "b", "c", "d"]);
        assert_eq!(queue.oldest_sent(), Some(second));
        for token in 0..4 {
            queue.settle(FIRST_TOKEN + token);
        }
        assert_eq!((queue.bytes(), queue.is_empty()), (0, true));
    }
}
