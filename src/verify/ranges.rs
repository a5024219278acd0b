//! Sequences as ranges, in a bounded number. Pure.

use crate::status::{DifferenceExample, DifferenceKind, DifferenceSummary, SequenceRange};

/// Ranges of one kind that are listed.
const RANGES: usize = 100;
/// Examples of one kind.
pub(super) const EXAMPLES: usize = 10;

/// Collects the differences of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DifferenceList(DifferenceSummary);

impl DifferenceList {
    pub fn new(kind: DifferenceKind) -> Self {
        Self(DifferenceSummary { kind, messages: 0, ranges: Vec::new(), unlisted: 0, examples: Vec::new() })
    }

    /// Adds a message.
    pub fn add(&mut self, seq: u64) {
        self.add_range(SequenceRange { from: seq, to: seq, messages: 1 });
    }

    /// Adds the messages of a range.
    pub fn add_range(&mut self, range: SequenceRange) {
        let DifferenceSummary { messages, ranges, unlisted, .. } = &mut self.0;
        *messages += range.messages;
        let full = ranges.len() >= RANGES;
        match ranges.last_mut().filter(|last| *unlisted == 0 && range.from == last.to + 1) {
            Some(last) => {
                last.to = range.to;
                last.messages += range.messages;
            }
            None if *unlisted == 0 && !full => ranges.push(range),
            None => *unlisted += range.messages,
        }
    }

    /// Adds messages without a copy.
    pub fn add_missing(&mut self, missing: &MissingRanges) {
        missing.ranges.iter().for_each(|range| self.add_range(*range));
        self.0.messages += missing.beyond;
        self.0.unlisted += missing.beyond;
    }

    /// Whether another example is wanted.
    pub fn wants_example(&self) -> bool {
        self.0.examples.len() < EXAMPLES
    }

    pub fn example(&mut self, example: DifferenceExample) {
        if self.wants_example() {
            self.0.examples.push(example);
        }
    }

    /// The result; `None` where nothing differs.
    pub fn difference(&self) -> Option<DifferenceSummary> {
        (self.0.messages > 0).then(|| self.0.clone())
    }
}

/// Messages of the source without a copy, as ranges of sequences in order. Ranges that do not fit are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct MissingRanges {
    ranges: Vec<SequenceRange>,
    /// The message that was added last ended its range.
    closed: bool,
    /// Messages in ranges that did not fit.
    pub beyond: u64,
}

/// Ranges that are kept.
const KEPT: usize = 50_000;

impl MissingRanges {
    /// Adds the next message, in the order of the source.
    pub fn add(&mut self, seq: u64) {
        let full = self.ranges.len() >= KEPT;
        match self.ranges.last_mut().filter(|_| !self.closed && self.beyond == 0) {
            Some(last) => {
                last.to = last.to.max(seq);
                last.messages += 1;
            }
            None if full => self.beyond += 1,
            None => self.ranges.push(SequenceRange { from: seq, to: seq, messages: 1 }),
        }
        self.closed = false;
    }

    /// Adds ranges that follow, in the order of the source.
    pub fn append(&mut self, following: &Self) {
        for range in &following.ranges {
            if self.ranges.len() < KEPT && self.beyond == 0 {
                self.ranges.push(*range);
            } else {
                self.beyond += range.messages;
            }
        }
        self.beyond += following.beyond;
        self.closed = true;
    }

    /// Messages in all of them.
    pub fn messages(&self) -> u64 {
        self.ranges.iter().map(|range| range.messages).sum::<u64>() + self.beyond
    }

    /// A message that is not missing comes next.
    pub fn close(&mut self) {
        self.closed = true;
    }

    pub fn ranges(&self) -> &[SequenceRange] {
        &self.ranges
    }

    /// Whether a sequence is in one of them.
    pub fn contains(&self, seq: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.to < seq);
        self.ranges.get(after).is_some_and(|range| range.from <= seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(from: u64, to: u64, messages: u64) -> SequenceRange {
        SequenceRange { from, to, messages }
    }

    #[test]
    fn neighbours_join_and_the_rest_is_counted() {
        let mut list = DifferenceList::new(DifferenceKind::Missing);
        [3, 4].into_iter().for_each(|seq| list.add(seq));
        list.add_range(range(5, 9, 1));
        list.add(20);
        let difference = list.difference().unwrap();
        assert_eq!((difference.messages, difference.ranges), (4, vec![range(3, 9, 3), range(20, 20, 1)]));
        (0..500).for_each(|i| list.add(100 + 2 * i));
        let difference = list.difference().unwrap();
        assert_eq!((difference.messages, difference.ranges.len(), difference.unlisted), (504, RANGES, 402));
        assert_eq!(DifferenceList::new(DifferenceKind::Extra).difference(), None);
    }

    #[test]
    fn what_follows_is_added_and_what_does_not_fit_counted() {
        let mut missing = MissingRanges::default();
        missing.add(1);
        let mut following = MissingRanges::default();
        for seq in 2..=50_000_000 / 1_000 {
            following.add(1_000 * seq);
            following.close();
        }
        (0..1_000).for_each(|seq| following.add(100_000_000 + seq));
        missing.append(&following);
        assert_eq!((missing.ranges().len(), missing.beyond, missing.messages()), (KEPT, 1_000, 51_000));
        missing.append(&following);
        assert_eq!((missing.ranges().len(), missing.messages()), (KEPT, 51_000 + 50_999));
        let mut list = DifferenceList::new(DifferenceKind::Missing);
        list.add_missing(&missing);
        let found = list.difference().unwrap();
        assert_eq!((found.messages, found.unlisted), (101_999, 101_999 - 100));
    }

    #[test]
    fn missing_messages_are_found_by_their_range() {
        let mut missing = MissingRanges::default();
        missing.add(3);
        missing.add(5);
        missing.close();
        missing.add(9);
        assert_eq!(missing.ranges(), [range(3, 5, 2), range(9, 9, 1)]);
        assert_eq!(
            [2, 3, 4, 5, 6, 9, 10].map(|seq| missing.contains(seq)),
            [false, true, true, true, false, true, false]
        );
    }
}
