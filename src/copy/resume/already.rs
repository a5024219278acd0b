//! Copies after the position that the target already has when a run begins.

use std::collections::{BTreeMap, HashMap};

use super::Ours;
use crate::config::Mapping;

/// Messages at the target after the position. A message is identified by sequence and stored time: a stream that was
/// recreated uses the same sequences again.
#[derive(Debug, Default)]
pub(in crate::copy) struct Already {
    /// Source sequence and stored time (ms) to target sequence.
    stored: BTreeMap<(u64, i64), u64>,
    /// The copies by target subject, where the target has a limit per subject.
    subjects: HashMap<Box<[u8]>, Vec<SubjectCopy>>,
    keeps: usize,
    /// Room for a mapped subject.
    room: Vec<u8>,
}

/// A copy that may show that older messages of its subject are not to be sent.
#[derive(Debug)]
struct SubjectCopy {
    seq: u64,
    /// Stored time at the source, ms.
    time: i64,
    /// The source has it: what is before it there is older, whatever the times say.
    confirmed: bool,
}

/// How the target already has a source message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) enum KnownCopy {
    /// It is at this target sequence.
    Stored(u64),
    /// It would be removed at once: the target has as many newer ones of its subject as it keeps.
    Replaced,
}

impl Already {
    pub(super) fn new(ours: Vec<Ours>, keeps: usize) -> Self {
        let mut already = Self { keeps, ..Self::default() };
        for message in ours {
            let key = (message.origin.seq, message.origin.time_ms);
            already.stored.insert(key, message.target_seq);
            if let Some(subject) = message.subject {
                let copy = SubjectCopy { seq: key.0, time: key.1, confirmed: message.confirmed };
                already.subjects.entry(subject).or_default().push(copy);
            }
        }
        already
    }

    /// One message that waits for its turn.
    #[cfg(test)]
    pub(in crate::copy) fn one(seq: u64, time_ms: i64, target_seq: u64) -> Self {
        let ours = Ours {
            origin: crate::copy::target::provenance::MessageOrigin { seq, time_ms },
            target_seq,
            complete: false,
            subject: None,
            confirmed: false,
        };
        Self::new(vec![ours], 0)
    }

    /// Forgets those up to a source sequence.
    pub(super) fn forget_to(&mut self, seq: u64) {
        self.stored.retain(|known, _| known.0 > seq);
    }

    /// Forgets those after a source sequence.
    pub(super) fn forget_after(&mut self, seq: u64) {
        self.stored.retain(|known, _| known.0 <= seq);
        self.subjects.values_mut().for_each(|known| known.retain(|known| known.seq <= seq));
    }

    /// Messages that wait for their turn.
    pub fn len(&self) -> usize {
        self.stored.len()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    /// The greatest source sequence that is left; 0 for none.
    pub fn last(&self) -> u64 {
        self.stored.last_key_value().map_or(0, |((seq, _), _)| *seq)
    }

    /// Removes a message that was read, and all before it.
    pub fn take(&mut self, seq: u64, time_ns: i64, subject: &[u8], mapping: &Mapping) -> Option<KnownCopy> {
        if self.stored.is_empty() {
            return None;
        }
        let key = (seq, time_ns.div_euclid(1_000_000));
        while let Some(first) = self.stored.first_entry()
            && *first.key() < key
        {
            first.remove();
        }
        let known = match self.stored.remove(&key) {
            Some(target_seq) => Some(KnownCopy::Stored(target_seq)),
            None if self.keeps > 0 => {
                let newer = |known: &&SubjectCopy| known.seq > seq && (known.confirmed || known.time >= key.1);
                let mapped = mapping.apply(subject, &mut self.room);
                let newer = self.subjects.get(mapped).map_or(0, |known| known.iter().filter(newer).count());
                (newer >= self.keeps).then_some(KnownCopy::Replaced)
            }
            None => None,
        };
        if self.stored.first_key_value().is_some_and(|(first, _)| first.0 <= seq) {
            self.forget_to(seq);
        }
        known
    }

    /// Whether all that wait are after a target sequence.
    pub fn all_after(&self, target_seq: u64) -> bool {
        self.stored.values().all(|waiting| *waiting > target_seq)
    }

    /// How many of them are in a range of source sequences.
    pub fn within(&self, from: u64, to: u64) -> u64 {
        let mut seqs: Vec<u64> = self.stored.range((from, i64::MIN)..=(to, i64::MAX)).map(|(key, _)| key.0).collect();
        seqs.dedup();
        seqs.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::target::provenance::MessageOrigin;

    fn ours(seq: u64, time_ms: i64, target_seq: u64, subject: Option<&str>) -> Ours {
        let subject = subject.map(|subject| Box::from(subject.as_bytes()));
        Ours { origin: MessageOrigin { seq, time_ms }, target_seq, complete: false, subject, confirmed: false }
    }

    fn take(already: &mut Already, seq: u64, time_ms: i64, subject: &str) -> Option<KnownCopy> {
        already.take(seq, time_ms * 1_000_000 + 999_999, subject.as_bytes(), &Mapping::default())
    }

    #[test]
    fn a_message_is_known_by_sequence_and_time() {
        let stored = vec![ours(5, 50, 1, None), ours(5, 500, 7, None), ours(7, 70, 2, None), ours(9, 90, 3, None)];
        let mut already = Already::new(stored, 0);
        assert_eq!((already.len(), already.within(1, 8)), (4, 2));
        assert!(already.all_after(0) && !already.all_after(1));
        assert_eq!(take(&mut already, 4, 40, "a"), None);
        assert_eq!(take(&mut already, 5, 500, "a"), Some(KnownCopy::Stored(7)));
        assert_eq!(take(&mut already, 6, 60, "a"), None);
        // Another one, stored at another time: the sequence alone proves nothing, and it does not come again.
        assert_eq!(take(&mut already, 7, 71, "a"), None);
        assert_eq!(already.len(), 1);
        // 9 is not there any more.
        assert_eq!(take(&mut already, 10, 100, "a"), None);
        assert!(already.is_empty());
        // Nor if the one that was copied was stored later: the source was put back.
        let mut later = Already::new(vec![ours(9, 90, 3, None)], 0);
        assert_eq!(take(&mut later, 9, 89, "a"), None);
    }

    #[test]
    fn what_the_target_would_not_keep_beside_newer_ones_is_left_out() {
        // The clock of the source was set back before 10, which it has; the copy of `b` may be of another stream.
        let set_back = Ours { confirmed: true, ..ours(10, 45, 4, Some("d")) };
        let stored =
            || vec![ours(8, 80, 1, Some("a")), ours(9, 90, 2, Some("a")), ours(9, 1, 3, Some("b")), set_back.clone()];
        let mut one = Already::new(stored(), 1);
        assert_eq!(take(&mut one, 5, 50, "a"), Some(KnownCopy::Replaced));
        assert_eq!(take(&mut one, 6, 60, "b"), None);
        assert_eq!(take(&mut one, 7, 70, "c"), None);
        assert_eq!(take(&mut one, 7, 70, "d"), Some(KnownCopy::Replaced));
        assert_eq!(take(&mut one, 8, 80, "a"), Some(KnownCopy::Stored(1)));
        // What counts is the subject at the target.
        let mapping = Mapping { prefix: String::new(), remove: "x.".to_owned(), ..Mapping::default() };
        let mut mapped = Already::new(stored(), 1);
        assert_eq!(mapped.take(5, 50_000_000, b"x.a", &mapping), Some(KnownCopy::Replaced));
        let mut three = Already::new(stored(), 3);
        assert_eq!(take(&mut three, 5, 50, "a"), None);
    }
}
