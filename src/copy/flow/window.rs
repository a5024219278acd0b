//! Messages that were handed out and are not settled yet: the end of the longest settled prefix is the position. Pure.

use std::collections::VecDeque;

/// Sequence and time of a message in the source stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourcePoint {
    /// Sequence; 0 is before the first message.
    pub seq: u64,
    /// Stored time, nanoseconds since the Unix epoch; `None` where no message was stored or its time is not known.
    pub time_ns: Option<i64>,
}

/// A message of ours at the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TargetPoint {
    /// Target sequence.
    pub seq: u64,
    /// Source sequence of the message.
    pub source_seq: u64,
}

/// Names one message that was handed out. Numbers grow by one per message.
pub type Token = u64;

/// An impossible settlement: a bug here or an ack that is not ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// The same message settled before.
    #[error("message {0} settled twice")]
    Twice(Token),
    /// No such message was handed out.
    #[error("message {0} settled but was never sent")]
    Unknown(Token),
}

/// Size of a message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MessageSize {
    /// Bytes of subject, headers and payload.
    pub bytes: usize,
    /// Bytes of the payload alone.
    pub payload: usize,
}

#[derive(Debug)]
struct Entry {
    own: SourcePoint,
    /// Own source point, or that of the last skipped message after it.
    through: SourcePoint,
    size: MessageSize,
    read_at: u64,
    settled: bool,
    target_seq: Option<u64>,
}

/// One message that left the window at its front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Its size.
    pub size: MessageSize,
    /// The time it was handed out, as given to [`Window::hand_out`].
    pub read_at: u64,
}

/// Messages that were sent and are not all settled.
#[derive(Debug)]
pub struct Window {
    entries: VecDeque<Entry>,
    first: Token,
    bytes: usize,
    position: SourcePoint,
    target: Option<TargetPoint>,
    /// Where the copies in the settled prefix end: the target sequence is a lower bound unless it is that of `target`.
    end: TargetPoint,
    last_popped: u64,
    /// The known target sequence does not move beyond this.
    target_limit: u64,
    /// The known target sequence does not move until this message has left too.
    keep_through: Token,
}

impl Window {
    /// An empty window after a position.
    pub fn new(position: SourcePoint, target: Option<TargetPoint>) -> Self {
        Self {
            entries: VecDeque::new(),
            first: 1,
            bytes: 0,
            position,
            target,
            end: target.unwrap_or_default(),
            last_popped: 0,
            target_limit: u64::MAX,
            keep_through: 0,
        }
    }

    /// Everything up to here is settled.
    pub fn position(&self) -> SourcePoint {
        self.position
    }

    /// The newest message of ours in the settled prefix whose target sequence is known.
    pub fn target(&self) -> Option<TargetPoint> {
        self.target
    }

    /// The newest message of ours in the settled prefix, where it is after [`Window::target`]; its target sequence is
    /// this one or a later one.
    pub fn after_target(&self) -> Option<TargetPoint> {
        let known = self.target.map_or(0, |target| target.seq);
        Some(self.end).filter(|end| end.seq > known)
    }

    /// Notes such a message of an earlier run.
    #[must_use]
    pub fn with_after_target(self, end: Option<TargetPoint>) -> Self {
        Self { end: end.filter(|end| end.seq > self.end.seq).unwrap_or(self.end), ..self }
    }

    fn locate(&mut self, target: TargetPoint) {
        (self.target, self.end) = (Some(target), target);
    }

    /// Messages handed out that are not in the settled prefix.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether everything handed out is settled.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the messages that [`Window::len`] counts.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The oldest message that is not in the settled prefix.
    pub fn oldest(&self) -> Option<SourcePoint> {
        self.entries.front().map(|entry| entry.own)
    }

    /// The newest source point that was handed out or skipped.
    pub fn newest(&self) -> SourcePoint {
        self.entries.back().map_or(self.position, |entry| entry.through)
    }

    /// Adds a message that is about to be sent. `target_seq` is its target sequence where the chain determines
    /// it beforehand.
    pub fn hand_out(&mut self, source: SourcePoint, size: MessageSize, read_at: u64, target_seq: Option<u64>) -> Token {
        self.entries.push_back(Entry { own: source, through: source, size, read_at, settled: false, target_seq });
        self.bytes += size.bytes;
        self.first + self.entries.len() as u64 - 1
    }

    /// Adds a message that is not sent: it settles with the ones before it.
    pub fn skip(&mut self, source: SourcePoint) {
        match self.entries.back_mut() {
            Some(entry) => entry.through = source,
            None => self.position = source,
        }
    }

    /// The known target sequence does not move beyond `limit`, because messages of ours that were not met yet may
    /// come after it: a search for messages after the position begins at the known target sequence.
    pub fn limit_target(&mut self, limit: u64) {
        self.target_limit = limit;
    }

    /// Adds a message that the target already has. It settles with the ones before it, and its target sequence may be
    /// lower than theirs: until they have left, the known target sequence does not move.
    pub fn stored_before(&mut self, source: SourcePoint, target_seq: u64) {
        self.skip(source);
        if !self.entries.is_empty() {
            self.keep_through = self.first + self.entries.len() as u64 - 1;
        } else if target_seq <= self.target_limit {
            self.locate(TargetPoint { seq: target_seq, source_seq: source.seq });
        } else {
            self.end = TargetPoint { seq: target_seq.max(self.end.seq), source_seq: source.seq };
        }
    }

    /// Settles one message.
    pub fn settle(&mut self, token: Token, target_seq: Option<u64>) -> Result<(), WindowError> {
        let index = token.checked_sub(self.first).ok_or(WindowError::Twice(token))?;
        let entry = self.entries.get_mut(index as usize).ok_or(WindowError::Unknown(token))?;
        if entry.settled {
            return Err(WindowError::Twice(token));
        }
        entry.settled = true;
        entry.target_seq = target_seq.or(entry.target_seq);
        Ok(())
    }

    /// Notes the target sequence of a message, if it is still here or was the last to leave.
    pub fn set_target_seq(&mut self, token: Token, target_seq: u64) {
        if token + 1 == self.first {
            if target_seq > self.target_limit || token < self.keep_through {
                return;
            }
            self.locate(TargetPoint { seq: target_seq, source_seq: self.last_popped });
        } else if let Some(index) = token.checked_sub(self.first)
            && let Some(entry) = self.entries.get_mut(index as usize)
        {
            entry.target_seq = Some(target_seq);
        }
    }

    /// The source point of a message that is still here.
    pub fn source_of(&self, token: Token) -> Option<SourcePoint> {
        let index = token.checked_sub(self.first)?;
        self.entries.get(index as usize).map(|entry| entry.own)
    }

    /// The target sequence of a message that is still here, if it is known.
    pub fn target_seq_of(&self, token: Token) -> Option<u64> {
        let index = token.checked_sub(self.first)?;
        self.entries.get(index as usize).and_then(|entry| entry.target_seq)
    }

    /// Messages handed out that are not settled, in the settled prefix or after it.
    pub fn in_flight(&self) -> usize {
        self.entries.iter().filter(|entry| !entry.settled).count()
    }

    /// Settles every message up to and with this one; those settled before stay so.
    pub fn settle_through(&mut self, token: Token) -> Result<(), WindowError> {
        if token >= self.first + self.entries.len() as u64 {
            return Err(WindowError::Unknown(token));
        }
        let count = (token + 1).saturating_sub(self.first) as usize;
        for entry in self.entries.iter_mut().take(count) {
            entry.settled = true;
        }
        Ok(())
    }

    /// Removes the next message of the settled prefix and moves the position to it.
    pub fn pop(&mut self) -> Option<Done> {
        if !self.entries.front()?.settled {
            return None;
        }
        let entry = self.entries.pop_front()?;
        self.first += 1;
        self.bytes -= entry.size.bytes;
        self.position = entry.through;
        self.last_popped = entry.own.seq;
        let (left, source_seq) = (self.first - 1, entry.own.seq);
        match entry.target_seq {
            Some(seq) if left >= self.keep_through && seq <= self.target_limit => {
                self.locate(TargetPoint { seq, source_seq });
            }
            // One that was sent again may be before others.
            Some(seq) if seq < self.end.seq => {}
            Some(seq) => self.end = TargetPoint { seq, source_seq },
            None => self.end = TargetPoint { seq: self.end.seq + 1, source_seq },
        }
        Some(Done { size: entry.size, read_at: entry.read_at })
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    fn at(seq: u64) -> SourcePoint {
        SourcePoint { seq, time_ns: Some(seq as i64) }
    }

    fn size(bytes: usize) -> MessageSize {
        MessageSize { bytes, payload: bytes }
    }

    fn drain(window: &mut Window) -> usize {
        std::iter::from_fn(|| window.pop()).count()
    }

    #[test]
    fn the_position_is_the_longest_settled_prefix() {
        let mut window = Window::new(at(10), None);
        let tokens: Vec<_> = (11..=14).map(|seq| window.hand_out(at(seq), size(5), 0, None)).collect();
        window.settle(tokens[1], Some(101)).unwrap();
        assert_eq!((drain(&mut window), window.position()), (0, at(10)));
        window.settle(tokens[0], Some(100)).unwrap();
        assert_eq!((drain(&mut window), window.position()), (2, at(12)));
        assert_eq!(window.target(), Some(TargetPoint { seq: 101, source_seq: 12 }));
        window.settle_through(tokens[3]).unwrap();
        assert_eq!((drain(&mut window), window.position(), window.bytes()), (2, at(14), 0));
        assert_eq!(window.target(), Some(TargetPoint { seq: 101, source_seq: 12 }));
    }

    #[test]
    fn copies_after_the_known_target_sequence_are_counted() {
        let known = TargetPoint { seq: 7, source_seq: 10 };
        let mut window = Window::new(at(10), Some(known)).with_after_target(None);
        assert_eq!(window.after_target(), None);
        let tokens: Vec<_> = (11..=14).map(|seq| window.hand_out(at(seq), size(5), 0, None)).collect();
        window.settle_through(tokens[2]).unwrap();
        drain(&mut window);
        assert_eq!(
            (window.target(), window.after_target()),
            (Some(known), Some(TargetPoint { seq: 10, source_seq: 13 }))
        );
        // Another writer stored some in between.
        window.settle(tokens[3], Some(25)).unwrap();
        drain(&mut window);
        assert_eq!((window.target(), window.after_target()), (Some(TargetPoint { seq: 25, source_seq: 14 }), None));
        // What an earlier run left counts until a later copy is known.
        let left = TargetPoint { seq: 9, source_seq: 12 };
        let window = Window::new(at(12), Some(known)).with_after_target(Some(left));
        assert_eq!(window.after_target(), Some(left));
        assert_eq!(
            Window::new(at(12), Some(TargetPoint { seq: 9, source_seq: 12 }))
                .with_after_target(Some(left))
                .after_target(),
            None
        );
    }

    #[test]
    fn skipped_messages_settle_with_those_before_them() {
        let mut window = Window::new(at(0), None);
        window.skip(at(1));
        assert_eq!(window.position(), at(1));
        let token = window.hand_out(at(2), size(1), 0, Some(1));
        window.skip(at(3));
        window.skip(at(4));
        assert_eq!((window.position(), window.newest()), (at(1), at(4)));
        window.settle(token, None).unwrap();
        assert_eq!(drain(&mut window), 1);
        assert_eq!(window.position(), at(4));
        assert_eq!(window.target(), Some(TargetPoint { seq: 1, source_seq: 2 }));
    }

    #[test]
    fn settling_twice_or_out_of_nowhere_is_an_error() {
        let mut window = Window::new(at(0), None);
        let token = window.hand_out(at(1), size(1), 0, None);
        assert_eq!(window.settle(token + 1, None), Err(WindowError::Unknown(token + 1)));
        assert_eq!(window.settle_through(token + 1), Err(WindowError::Unknown(token + 1)));
        window.settle(token, None).unwrap();
        assert_eq!(window.settle(token, None), Err(WindowError::Twice(token)));
        drain(&mut window);
        assert_eq!(window.settle(token, None), Err(WindowError::Twice(token)));
    }

    #[test]
    fn what_lies_at_the_target_already_keeps_its_turn() {
        let mut window = Window::new(at(0), None);
        let token = window.hand_out(at(1), size(1), 0, None);
        window.stored_before(at(2), 7);
        assert_eq!((drain(&mut window), window.position()), (0, at(0)));
        window.settle(token, Some(9)).unwrap();
        assert_eq!((drain(&mut window), window.position()), (1, at(2)));
        assert_eq!(window.target(), Some(TargetPoint { seq: 9, source_seq: 1 }));
    }

    #[test]
    fn the_known_sequence_waits_for_earlier_copies_after_it() {
        let mut window = Window::new(at(0), Some(TargetPoint { seq: 3, source_seq: 0 }));
        let tokens: Vec<_> = (1..=2).map(|seq| window.hand_out(at(seq), size(1), 0, None)).collect();
        window.stored_before(at(3), 4);
        window.settle(tokens[0], Some(9)).unwrap();
        // A search after 9 would not find message 3, which is at 4.
        assert_eq!((drain(&mut window), window.position()), (1, at(1)));
        assert_eq!(window.target().map(|target| target.seq), Some(3));
        window.settle(tokens[1], Some(10)).unwrap();
        assert_eq!((drain(&mut window), window.position()), (1, at(3)));
        assert_eq!(window.target(), Some(TargetPoint { seq: 10, source_seq: 2 }));
    }

    #[test]
    fn the_known_place_stays_before_what_has_not_come_by() {
        let mut window = Window::new(at(0), Some(TargetPoint { seq: 3, source_seq: 0 }));
        window.limit_target(0);
        let token = window.hand_out(at(1), size(1), 0, None);
        window.settle(token, Some(9)).unwrap();
        drain(&mut window);
        window.stored_before(at(2), 7);
        assert_eq!((window.position(), window.target().map(|t| t.seq)), (at(2), Some(3)));
        window.limit_target(u64::MAX);
        window.stored_before(at(3), 8);
        assert_eq!((window.position(), window.target().map(|t| t.seq)), (at(3), Some(8)));
    }

    #[test]
    fn the_known_sequence_ends_before_the_first_unknown_one() {
        let mut window = Window::new(at(0), None);
        let tokens: Vec<_> = (1..=3).map(|seq| window.hand_out(at(seq), size(1), 0, None)).collect();
        // The confirmation of what lies at 2 was lost.
        window.limit_target(1);
        window.settle(tokens[0], Some(1)).unwrap();
        window.settle(tokens[1], Some(3)).unwrap();
        assert_eq!((drain(&mut window), window.position()), (2, at(2)));
        // A known sequence: otherwise a target that loses everything looks like one without any copy.
        assert_eq!(window.target(), Some(TargetPoint { seq: 1, source_seq: 1 }));
    }

    /// Against the plainest model: a list of flags.
    #[test]
    fn random_settlements_agree_with_a_list() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut window = Window::new(at(0), None);
            let mut model: Vec<(u64, bool)> = Vec::new();
            let mut tokens = Vec::new();
            for seq in 1..200u64 {
                if random.random_bool(0.3) {
                    window.skip(at(seq));
                    model.push((seq, true));
                } else {
                    tokens.push((window.hand_out(at(seq), size(1), 0, None), model.len()));
                    model.push((seq, false));
                }
                while random.random_bool(0.45) && !tokens.is_empty() {
                    let (token, index) = tokens.swap_remove(random.random_range(0..tokens.len()));
                    window.settle(token, None).unwrap();
                    model[index].1 = true;
                }
                drain(&mut window);
                let prefix = model.iter().take_while(|(_, settled)| *settled).last().map_or(0, |(seq, _)| *seq);
                assert_eq!(window.position().seq, prefix, "seed {seed} at {seq}");
            }
        }
    }
}
