//! Compares two ordered streams as they are read, in bounded memory. Pure.
//!
//! Both have the source's sequences in ascending order, but for messages out of place. Where the next copy is of a later source
//! message than the next one, either copies are missing in between, or this copy is too early: the latter if a copy of one in between
//! is among the next that were read. Messages of the source without a copy stay known for a while, so that a late copy finds its
//! original.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::{
    fingerprint::{SourceMark, TargetMark},
    ranges::{DifferenceList, MissingRanges},
};
use crate::status::{DifferenceExample, DifferenceKind, ExpectedCause};

/// Copies that are read ahead to see whether the next one is out of place.
pub(super) const AHEAD: usize = 64;
/// Messages of the source without a copy whose fingerprints are kept.
const OPEN: usize = 50_000;
/// Copies that came too early and are kept.
const EARLY: usize = 10_000;
/// Copies whose original is looked up, and contents that are read again for examples.
pub(super) const LOOK_UPS: usize = 1_000;

/// A message whose contents differ, for the second look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Suspect {
    pub seq: u64,
    pub target_seq: u64,
}

/// The first copy that was read of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FirstCopy {
    pub seq: u64,
    pub target_seq: u64,
}

impl FirstCopy {
    /// Its source sequence, if the target has no copy before it, or none that matters: the target begins at `first` now, was read
    /// from `start` on, and has no copy of messages from `missing` on.
    pub fn at_front(self, start: u64, first: u64, missing: u64) -> Option<u64> {
        let is_there = self.target_seq >= first;
        (is_there && (start <= first || self.seq < missing)).then_some(self.seq)
    }
}

/// Messages without a copy, and why each may rightly have none.
#[derive(Debug, Clone, Copy)]
struct OpenMessage {
    mark: SourceMark,
    cause: Option<ExpectedCause>,
    /// A message with a copy is directly before it.
    after_copied: bool,
}

/// All that was found.
#[derive(Debug)]
pub(super) struct Merge {
    from: u64,
    to: u64,
    /// Copies that were read and not compared, in the order of the target.
    ahead: VecDeque<TargetMark>,
    /// Copies that came too early.
    early: HashMap<u64, TargetMark>,
    open: BTreeMap<u64, OpenMessage>,
    /// The source message that was taken last.
    source_taken: u64,
    /// The greatest source sequence that a copy in its place had.
    highest: u64,
    /// The source message that was taken last has a copy.
    copied: bool,
    missing: MissingRanges,
    /// Messages were given up before everything was read: their copies may follow, which are then not compared.
    pub gave_up: bool,
    /// The first copy that was read and that a run made.
    pub first_copy: Option<FirstCopy>,
    /// Copies without an original, to be looked up.
    pub unknown: Vec<TargetMark>,
    pub suspects: Vec<Suspect>,
    differences: BTreeMap<DifferenceKind, DifferenceList>,
    pub expected: BTreeMap<ExpectedCause, u64>,
    pub source_messages: u64,
    pub target_messages: u64,
    /// The highest source sequence of the copies that a run made.
    pub last_copy: u64,
}

impl Merge {
    /// Compares the messages of the source from one sequence to another.
    pub fn new() -> Self {
        Self {
            from: 1,
            to: 0,
            ahead: VecDeque::new(),
            early: HashMap::new(),
            open: BTreeMap::new(),
            source_taken: 0,
            highest: 0,
            copied: true,
            missing: MissingRanges::default(),
            gave_up: false,
            first_copy: None,
            unknown: Vec::new(),
            suspects: Vec::new(),
            differences: BTreeMap::new(),
            expected: BTreeMap::new(),
            source_messages: 0,
            target_messages: 0,
            last_copy: 0,
        }
    }

    /// Begins a range of the source, after those before it.
    pub fn begin(&mut self, from: u64, to: u64) {
        (self.from, self.to) = (from, to);
        (self.source_taken, self.highest, self.copied) = (from - 1, from - 1, true);
        (self.missing, self.gave_up, self.unknown) = (MissingRanges::default(), false, Vec::new());
        self.first_copy = None;
    }

    /// The source message that was taken last.
    pub fn source_taken(&self) -> u64 {
        self.source_taken
    }

    /// Whether more copies should be read before the next step.
    pub fn wants_copies(&self) -> bool {
        self.ahead.len() < AHEAD
    }

    /// Copies that were read and not compared.
    pub fn has_copies(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Takes a copy that was read.
    pub fn copy_read(&mut self, mark: TargetMark) {
        self.target_messages += 1;
        if !mark.repaired {
            self.last_copy = self.last_copy.max(mark.seq);
            self.first_copy.get_or_insert(FirstCopy { seq: mark.seq, target_seq: mark.target_seq });
        }
        // Others are of other ranges, or newer than what was settled at the beginning.
        if (self.from..=self.to).contains(&mark.seq) {
            self.ahead.push_back(mark);
        }
    }

    /// Takes a message of another writer.
    pub fn foreign(&mut self, target_seq: u64, is_admitted: bool, subject: &[u8]) {
        self.target_messages += 1;
        if is_admitted {
            self.expect(ExpectedCause::OtherWriter, 1);
            return;
        }
        let subject = String::from_utf8_lossy(subject).into_owned();
        self.extra(None, target_seq, Some(subject), "is no copy of this replication");
    }

    /// Compares what can be compared before the next source message is taken. Returns whether that may be taken.
    pub fn admits(&mut self, next: u64, target_over: bool) -> bool {
        loop {
            let Some(copy) = self.ahead.front().copied() else { return target_over };
            if self.ahead.len() < AHEAD && !target_over {
                return false;
            }
            if copy.seq >= next {
                let is_early = self.is_early(next, copy.seq);
                if !is_early || self.early.len() >= EARLY {
                    return true;
                }
                self.ahead.pop_front();
                // Of two copies of one message, the second one is the wrong one.
                if let Some(first) = self.early.insert(copy.seq, copy) {
                    self.early.insert(copy.seq, first);
                    self.unknown_copy(copy);
                }
                continue;
            }
            self.ahead.pop_front();
            self.passed(copy);
        }
    }

    /// Whether a copy is stored before some that precede it: the one after it is one of those, or most of the next ones are. One
    /// that is among others in order, with a late one after them, is not.
    fn is_early(&self, next: u64, seq: u64) -> bool {
        let precedes = |other: &&TargetMark| (next..seq).contains(&other.seq);
        let mut others = self.ahead.iter().skip(1);
        others.next().as_ref().is_some_and(precedes)
            || 2 * self.ahead.iter().skip(1).filter(precedes).count() >= self.ahead.len()
    }

    /// Takes the next message of the source; `cause`: why it may have no copy.
    pub fn source(&mut self, mark: SourceMark, cause: Option<ExpectedCause>) {
        self.source_messages += 1;
        self.source_taken = mark.seq;
        if let Some(copy) = self.early.remove(&mark.seq) {
            self.highest = mark.seq;
            self.pair(&mark, &copy);
            self.out_of_place(&copy, "before messages that precede it at the source");
            return;
        }
        match self.ahead.front().copied().filter(|copy| copy.seq == mark.seq) {
            Some(copy) => {
                self.ahead.pop_front();
                self.highest = mark.seq;
                self.pair(&mark, &copy);
            }
            None => {
                self.remember(mark, cause);
                if self.open.len() > OPEN
                    && let Some((_, oldest)) = self.open.pop_first()
                {
                    self.gave_up |= oldest.cause.is_none();
                    self.give_up(oldest);
                }
            }
        }
    }

    /// A message of the source that is not compared.
    pub fn passed_over(&mut self, seq: u64) {
        self.source_taken = seq;
    }

    /// The source has no more messages up to the end of the range: the copies that are left have no original.
    pub fn source_over(&mut self) {
        self.source_taken = self.to;
        while let Some(copy) = self.ahead.pop_front() {
            self.passed(copy);
        }
    }

    /// A copy whose original should have been taken before.
    fn passed(&mut self, copy: TargetMark) {
        if let Some(open) = self.open.get(&copy.seq).copied() {
            if copy.time.is_some_and(|time| !time.fits(open.mark.time_ns)) {
                self.unknown_copy(copy);
                return;
            }
            self.open.remove(&copy.seq);
            match self.open.range_mut(copy.seq..).next() {
                Some((_, next)) => next.after_copied = true,
                None => self.copied = true,
            }
            self.pair(&open.mark, &copy);
            match copy.repaired {
                true => self.expect(ExpectedCause::Repaired, 1),
                false => self.out_of_place(&copy, "after messages that follow it at the source"),
            }
        } else if self.missing.contains(copy.seq) {
            // Of a message that was given up: the second look finds it.
        } else if copy.seq > self.highest {
            // In its place, and the source has nothing there any more.
            self.highest = copy.seq;
            self.expect(ExpectedCause::RemovedAtSource, 1);
        } else {
            self.unknown_copy(copy);
        }
    }

    fn unknown_copy(&mut self, copy: TargetMark) {
        if self.unknown.len() < LOOK_UPS {
            self.unknown.push(copy);
        } else {
            self.extra(Some(copy.seq), copy.target_seq, None, "is a second copy, or its original is another message");
        }
    }

    fn pair(&mut self, source: &SourceMark, copy: &TargetMark) {
        if copy.time.is_some_and(|time| !time.fits(source.time_ns)) {
            // A copy of another message: this one has none.
            self.unknown_copy(*copy);
            self.remember(*source, None);
            return;
        }
        self.copied = true;
        let (was, is) = (source.content, copy.content);
        let differs = [
            (DifferenceKind::Payload, was.payload != is.payload),
            (DifferenceKind::Headers, was.headers != is.headers),
            (DifferenceKind::Subject, was.subject != is.subject),
        ];
        let mut suspect = false;
        for (kind, _) in differs.into_iter().filter(|(_, differs)| *differs) {
            self.list(kind).add(source.seq);
            suspect = true;
        }
        if suspect && self.suspects.len() < LOOK_UPS {
            self.suspects.push(Suspect { seq: source.seq, target_seq: copy.target_seq });
        }
    }

    fn out_of_place(&mut self, copy: &TargetMark, how: &str) {
        let list = self.list(DifferenceKind::Order);
        list.add(copy.seq);
        list.example(DifferenceExample {
            source_seq: Some(copy.seq),
            target_seq: Some(copy.target_seq),
            subject: None,
            detail: format!("is stored {how}"),
        });
    }

    /// Notes a message of the target that is too much.
    pub fn extra(&mut self, seq: Option<u64>, target_seq: u64, subject: Option<String>, detail: &str) {
        let list = self.list(DifferenceKind::Extra);
        list.add(target_seq);
        list.example(DifferenceExample {
            source_seq: seq,
            target_seq: Some(target_seq),
            subject,
            detail: detail.to_owned(),
        });
    }

    pub fn list(&mut self, kind: DifferenceKind) -> &mut DifferenceList {
        self.differences.entry(kind).or_insert_with(|| DifferenceList::new(kind))
    }

    pub fn differences(&self) -> impl Iterator<Item = &DifferenceList> {
        self.differences.values()
    }

    /// Counts differences with a known cause.
    pub fn expect(&mut self, cause: ExpectedCause, messages: u64) {
        *self.expected.entry(cause).or_default() += messages;
    }

    fn remember(&mut self, mark: SourceMark, cause: Option<ExpectedCause>) {
        let after_copied = std::mem::replace(&mut self.copied, false);
        self.open.insert(mark.seq, OpenMessage { mark, cause, after_copied });
    }

    fn give_up(&mut self, open: OpenMessage) {
        if open.after_copied {
            self.missing.close();
        }
        match open.cause {
            Some(cause) => {
                self.missing.close();
                self.expect(cause, 1);
            }
            None => self.missing.add(open.mark.seq),
        }
    }

    /// Ends a range: the messages that have no copy, as far as both sides were read.
    pub fn end(&mut self) -> MissingRanges {
        while let Some((_, open)) = self.open.pop_first() {
            self.give_up(open);
        }
        // Their originals were never read.
        for copy in std::mem::take(&mut self.early).into_values() {
            self.unknown_copy(copy);
        }
        std::mem::take(&mut self.missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::fingerprint::{CopyTime, Fingerprint};

    fn content(seq: u64) -> Fingerprint {
        Fingerprint { subject: 1, headers: 2, payload: seq }
    }

    fn source(seq: u64) -> SourceMark {
        SourceMark { seq, time_ns: seq as i64 * 1_000_000, content: content(seq) }
    }

    fn copy(seq: u64, target_seq: u64) -> TargetMark {
        let time = Some(CopyTime::Ms(seq as i64));
        TargetMark { seq, time, target_seq, repaired: false, content: content(seq) }
    }

    /// Merges sources with copies, both as lists of source sequences.
    fn merge_marks(sources: &[u64], copies: Vec<TargetMark>) -> (Merge, MissingRanges) {
        let mut merge = Merge::new();
        merge.begin(1, 1_000_000);
        let mut copies = copies.into_iter().peekable();
        for seq in sources {
            loop {
                while merge.wants_copies() && copies.peek().is_some() {
                    merge.copy_read(copies.next().unwrap());
                }
                if merge.admits(*seq, copies.peek().is_none()) {
                    break;
                }
            }
            merge.source(source(*seq), None);
        }
        copies.for_each(|copy| merge.copy_read(copy));
        merge.source_over();
        let missing = merge.end();
        (merge, missing)
    }

    fn merged(sources: &[u64], copies: &[u64]) -> (Merge, MissingRanges) {
        merge_marks(sources, copies.iter().enumerate().map(|(at, seq)| copy(*seq, at as u64 + 1)).collect())
    }

    fn ranges(missing: &MissingRanges) -> Vec<(u64, u64)> {
        missing.ranges().iter().map(|range| (range.from, range.to)).collect()
    }

    fn found(merge: &Merge, kind: DifferenceKind) -> Vec<(u64, u64)> {
        let difference = merge.differences.get(&kind).and_then(DifferenceList::difference);
        difference.map(|found| found.ranges.iter().map(|range| (range.from, range.to)).collect()).unwrap_or_default()
    }

    fn without(all: &[u64], gone: &[u64]) -> Vec<u64> {
        all.iter().copied().filter(|seq| !gone.contains(seq)).collect()
    }

    #[test]
    fn equal_streams_do_not_differ() {
        let all: Vec<u64> = (1..=5_000).collect();
        let (merge, missing) = merged(&all, &all);
        assert_eq!((ranges(&missing), merge.unknown.len(), merge.differences.len()), (vec![], 0, 0));
        assert_eq!((merge.source_messages, merge.target_messages), (5_000, 5_000));
    }

    #[test]
    fn missing_messages_are_named() {
        let all: Vec<u64> = (1..=5_000).collect();
        let (merge, missing) = merged(&all, &without(&all, &[1, 700, 701, 5_000]));
        assert_eq!(ranges(&missing), [(1, 1), (700, 701), (5_000, 5_000)]);
        assert!(merge.differences.is_empty() && merge.unknown.is_empty());
        let (_, missing) = merged(&all, &[]);
        assert_eq!(ranges(&missing), [(1, 5_000)]);
    }

    #[test]
    fn what_the_source_removed_is_expected() {
        let all: Vec<u64> = (1..=5_000).collect();
        let (merge, missing) = merged(&without(&all, &[2, 3, 900, 4_999, 5_000]), &all);
        assert_eq!((ranges(&missing), merge.expected[&ExpectedCause::RemovedAtSource]), (vec![], 5));
        assert!(merge.differences.is_empty() && merge.unknown.is_empty(), "{merge:?}");
    }

    #[test]
    fn two_that_changed_places_are_named_and_nothing_else() {
        let all: Vec<u64> = (1..=5_000).collect();
        for (one, other) in [(100_usize, 101_usize), (100, 110), (100, 140), (100, 4_000), (0, 4_999)] {
            let mut copies = all.clone();
            copies.swap(one, other);
            let (merge, missing) = merged(&all, &copies);
            let order = found(&merge, DifferenceKind::Order);
            let expect = [(all[one], all[one]), (all[other], all[other])];
            assert!(!order.is_empty() && order.iter().all(|range| expect.contains(range)), "{order:?}");
            assert_eq!((ranges(&missing), merge.unknown.len(), merge.differences.len()), (vec![], 0, 1));
        }
    }

    #[test]
    fn several_that_are_early_or_late_are_named() {
        let all: Vec<u64> = (1..=5_000).collect();
        let mut copies = all.clone();
        let moved: Vec<u64> = copies.drain(999..1_003).collect();
        copies.extend(moved);
        let early: Vec<u64> = copies.drain(3_000..3_003).collect();
        (0..3).for_each(|at| copies.insert(200 + at, early[at]));
        let (merge, missing) = merged(&all, &copies);
        assert_eq!(found(&merge, DifferenceKind::Order), [(3_005, 3_007), (1_000, 1_003)]);
        assert_eq!((ranges(&missing), merge.unknown.len(), merge.differences.len()), (vec![], 0, 1));
    }

    #[test]
    fn second_copies_and_copies_of_others_are_looked_up() {
        let all: Vec<u64> = (1..=500).collect();
        let mut copies: Vec<_> = all.iter().map(|seq| copy(*seq, *seq)).collect();
        copies.push(copy(30, 501));
        copies.insert(200, copy(7, 502));
        let (merge, missing) = merge_marks(&all, copies);
        let unknown: Vec<_> = merge.unknown.iter().map(|copy| (copy.seq, copy.target_seq)).collect();
        assert_eq!((unknown, ranges(&missing)), (vec![(7, 502), (30, 501)], vec![]));
        // Another message under the same sequence.
        let mut copies: Vec<_> = all.iter().map(|seq| copy(*seq, *seq)).collect();
        copies[99].time = Some(CopyTime::Ms(7));
        let (merge, missing) = merge_marks(&all, copies);
        assert_eq!((merge.unknown.len(), ranges(&missing)), (1, vec![(100, 100)]));
    }

    #[test]
    fn contents_are_compared_also_out_of_place() {
        let all: Vec<u64> = (1..=500).collect();
        let mut copies: Vec<_> = all.iter().map(|seq| copy(*seq, *seq)).collect();
        copies[49].content.payload = 0;
        copies[59].content.headers = 0;
        copies[69].content.subject = 0;
        let mut moved = copies.remove(79);
        moved.content.payload = 0;
        moved.repaired = true;
        copies.push(moved);
        let (merge, missing) = merge_marks(&all, copies);
        assert_eq!(found(&merge, DifferenceKind::Payload), [(50, 50), (80, 80)]);
        assert_eq!(found(&merge, DifferenceKind::Headers), [(60, 60)]);
        assert_eq!(found(&merge, DifferenceKind::Subject), [(70, 70)]);
        assert_eq!(found(&merge, DifferenceKind::Order), []);
        assert_eq!((ranges(&missing), merge.suspects.len()), (vec![], 4));
        assert_eq!(merge.expected[&ExpectedCause::Repaired], 1);
    }

    #[test]
    fn late_copies_of_what_was_given_up_are_left_to_find() {
        let all: Vec<u64> = (1..=60_000).collect();
        let late: Vec<u64> = (59_001..=60_000).chain(1..=59_000).collect();
        let (merge, missing) = merged(&all, &late);
        assert!(merge.gave_up);
        assert_eq!(ranges(&missing), [(1, 9_000)], "the others are paired");
        assert_eq!((merge.unknown.len(), found(&merge, DifferenceKind::Extra)), (0, vec![]));
        assert!(merge.expected.is_empty(), "{:?}", merge.expected);
        let (merge, _) = merged(&all[..50_000], &late[..0]);
        assert!(!merge.gave_up);
    }

    #[test]
    fn the_first_copy_says_what_limits_removed() {
        let all: Vec<u64> = (1..=500).collect();
        let mut repaired = copy(1, 1);
        repaired.repaired = true;
        let copies = [vec![repaired], (100..=500).map(|seq| copy(seq, seq + 1_000)).collect()].concat();
        let (merge, _) = merge_marks(&all, copies);
        let first = merge.first_copy.unwrap();
        assert_eq!(first, FirstCopy { seq: 100, target_seq: 1_100 });
        for (start, first_seq, missing, expect) in [
            (1, 1, 1, Some(100)),
            (1, 50, 1, Some(100)),
            (1, 1_100, 1, Some(100)),
            // The target removed it meanwhile.
            (1, 1_101, 1, None),
            // Read from a later message on: before it are other copies.
            (60, 50, 1, None),
            (60, 50, 101, Some(100)),
        ] {
            assert_eq!(first.at_front(start, first_seq, missing), expect, "{start} {first_seq} {missing}");
        }
    }

    #[test]
    fn many_without_a_copy_take_little_memory() {
        let all: Vec<u64> = (1..=300_000).collect();
        let copies: Vec<u64> = all.iter().copied().filter(|seq| seq % 100 == 0).collect();
        let (merge, missing) = merged(&all, &copies);
        assert_eq!(missing.ranges().iter().map(|range| range.messages).sum::<u64>(), 297_000);
        assert!(merge.differences.is_empty() && merge.unknown.is_empty());
    }
}
