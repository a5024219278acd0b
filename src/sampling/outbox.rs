//! Advisories that are not confirmed yet, in the order of their causes.
//!
//! A reliable advisory is first stored with its sender's record, then published until it is confirmed, and then removed
//! from the record: whatever crashes in between, it is published, and each time with the same id. Any other is
//! published once; again only if the connection ends before the server has shown that it read it.

use std::collections::{BTreeMap, BTreeSet};

use xxhash_rust::xxh3::xxh3_64;

use super::advisory::Advisory;

/// Most unconfirmed advisories of one sender; the oldest is dropped first, and counted.
pub const PER_SENDER: usize = 8;
/// Most reliable advisories in all, some 130 bytes each; beyond that the newest are dropped, and counted.
const RELIABLE: usize = 1_000_000;
/// Most advisories that are not reliable and wait for a connection.
const UNRELIABLE: usize = 1_000;

/// The advisories of one replication that are not confirmed.
#[derive(Debug, Default)]
pub struct Outbox {
    reliable: bool,
    next: u64,
    entries: BTreeMap<u64, Advisory>,
    /// Numbers of the reliable ones, each after a hash of its sender: small, as there may be one million.
    of: BTreeSet<(u64, u64)>,
    /// Numbers of advisories that can be published now.
    ready: BTreeSet<u64>,
    /// Numbers of advisories that are not yet stored with their sender's record.
    fresh: BTreeSet<u64>,
    /// Numbers of advisories in flight.
    taken: BTreeSet<u64>,
    /// Numbers of refused advisories that wait, so that they do not block others.
    refused: BTreeSet<u64>,
    /// Numbers of refused advisories that are tried again.
    probes: BTreeSet<u64>,
    dropped: u64,
}

impl Outbox {
    /// An empty outbox.
    pub fn new(reliable: bool) -> Self {
        Self { reliable, ..Self::default() }
    }

    /// Sets whether advisories are confirmed from now on; waiting ones are published as before.
    pub(super) fn set_reliable(&mut self, reliable: bool) {
        self.reliable = reliable;
    }

    /// Advisories that are not confirmed.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether all are confirmed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Advisories that were dropped because too many waited already.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Adds an advisory of now; returns whether it has to be stored with its sender's record before it is published.
    pub(super) fn add(&mut self, advisory: Advisory) -> bool {
        let Some(number) = self.enter(advisory) else { return false };
        if self.reliable {
            self.fresh.insert(number);
        } else {
            self.ready.insert(number);
            while self.entries.len() > UNRELIABLE {
                let Some(oldest) = self.ready.pop_first() else { break };
                self.entries.remove(&oldest);
                self.dropped += 1;
            }
        }
        self.reliable
    }

    /// Adds an advisory that is stored with its sender's record already.
    pub(super) fn restore(&mut self, advisory: Advisory) {
        if self.reliable
            && let Some(number) = self.enter(advisory)
        {
            self.ready.insert(number);
        }
    }

    fn enter(&mut self, advisory: Advisory) -> Option<u64> {
        if self.reliable && self.entries.len() >= RELIABLE {
            self.dropped += 1;
            return None;
        }
        let number = self.next;
        self.next += 1;
        if self.reliable {
            let mut of = self.kept_for(&advisory.sender).map(|(number, _)| number);
            let oldest = of.next().filter(|_| of.count() + 1 >= PER_SENDER);
            if let Some(oldest) = oldest {
                self.of.remove(&(hash(&advisory.sender), oldest));
                self.entries.remove(&oldest);
                self.fresh.remove(&oldest);
                self.refused.remove(&oldest);
                self.dropped += 1;
            }
            self.of.insert((hash(&advisory.sender), number));
        }
        self.entries.insert(number, advisory);
        Some(number)
    }

    /// The advisories that have to be stored with a sender, oldest first.
    pub(super) fn kept_for(&self, sender: &str) -> impl Iterator<Item = (u64, &Advisory)> {
        let hash = hash(sender);
        let numbers = self.of.range((hash, 0)..=(hash, u64::MAX)).map(|(_, number)| *number);
        let entries = numbers.filter_map(|number| Some((number, self.entries.get(&number)?)));
        entries.filter(move |(_, advisory)| *advisory.sender == *sender)
    }

    /// Whether an advisory about a sender is waiting.
    pub(super) fn has(&self, sender: &str) -> bool {
        self.kept_for(sender).next().is_some()
    }

    /// Notes that these are stored with their sender's record: they can be published.
    pub(super) fn kept(&mut self, numbers: &[u64]) {
        let fresh = &mut self.fresh;
        self.ready.extend(numbers.iter().filter(|number| fresh.remove(number)));
    }

    /// The next one to publish; it counts as in flight until it is confirmed or all are taken back.
    pub fn take_next(&mut self) -> Option<(u64, &Advisory)> {
        while let Some(number) = self.ready.pop_first() {
            // It may have been dropped since.
            if self.entries.contains_key(&number) {
                self.taken.insert(number);
                return self.entries.get(&number).map(|advisory| (number, advisory));
            }
        }
        None
    }

    /// Advisories in flight may be lost: they are published again, before all others.
    pub fn take_back(&mut self) {
        self.ready.append(&mut self.taken);
    }

    /// Notes a refusal: the advisory waits until it is tried again, and others continue.
    pub fn refuse(&mut self, number: u64) {
        if self.taken.remove(&number) && self.entries.contains_key(&number) {
            self.refused.insert(number);
        }
    }

    /// Whether an advisory can be published now.
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether some were refused and wait.
    pub fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Tries the oldest refused ones again, at most so many. If one of them is confirmed, all are tried.
    pub fn try_again(&mut self, most: usize) {
        self.probes.clear();
        while self.probes.len() < most
            && let Some(number) = self.refused.pop_first()
        {
            self.probes.insert(number);
        }
        self.ready.extend(&self.probes);
    }

    /// Removes a confirmed advisory, or a published one that is not confirmed by a stream, and returns it.
    pub(super) fn confirm(&mut self, number: u64) -> Option<Advisory> {
        self.taken.remove(&number);
        if self.probes.remove(&number) {
            self.ready.append(&mut self.refused);
        }
        let advisory = self.entries.remove(&number)?;
        self.of.remove(&(hash(&advisory.sender), number));
        Some(advisory)
    }

    /// Drops the advisories of a sender.
    pub(super) fn forget(&mut self, sender: &str) {
        let numbers: Vec<u64> = self.kept_for(sender).map(|(number, _)| number).collect();
        for number in numbers {
            self.of.remove(&(hash(sender), number));
            self.entries.remove(&number);
            for numbers in [&mut self.fresh, &mut self.ready, &mut self.taken, &mut self.refused] {
                numbers.remove(&number);
            }
        }
    }

    /// Drops all advisories.
    pub(super) fn clear(&mut self) {
        *self = Self { next: self.next, dropped: self.dropped, ..Self::new(self.reliable) };
    }
}

fn hash(sender: &str) -> u64 {
    xxh3_64(sender.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::{super::AdvisoryKind, *};

    fn advisory(sender: &str, due_ns: i64) -> Advisory {
        Advisory { kind: AdvisoryKind::New, sender: sender.into(), due_ns, seen_ns: 0 }
    }

    fn take(outbox: &mut Outbox) -> Option<(u64, i64)> {
        outbox.take_next().map(|(number, advisory)| (number, advisory.due_ns))
    }

    #[test]
    fn a_reliable_advisory_is_published_until_it_is_confirmed() {
        let mut outbox = Outbox::new(true);
        assert!(outbox.add(advisory("a", 1)) && outbox.add(advisory("a", 2)) && outbox.add(advisory("b", 3)));
        assert_eq!(take(&mut outbox), None);
        let numbers: Vec<u64> = outbox.kept_for("a").map(|(number, _)| number).collect();
        outbox.kept(&numbers);
        assert_eq!((take(&mut outbox), take(&mut outbox), take(&mut outbox)), (Some((0, 1)), Some((1, 2)), None));
        assert_eq!(outbox.confirm(0).map(|advisory| advisory.due_ns), Some(1));
        assert_eq!(outbox.confirm(0), None);
        outbox.take_back();
        assert_eq!(take(&mut outbox), Some((1, 2)));
        outbox.confirm(1);
        assert!(!outbox.has("a") && outbox.has("b") && outbox.len() == 1);
    }

    #[test]
    fn one_that_is_refused_is_in_nobodys_way_and_tried_again_later() {
        let mut outbox = Outbox::new(true);
        (1..=4).for_each(|due| outbox.restore(advisory(&due.to_string(), due)));
        for number in 0..3 {
            assert_eq!(take(&mut outbox).map(|(taken, _)| taken), Some(number));
            outbox.refuse(number);
        }
        assert!(outbox.has_refused());
        assert_eq!((take(&mut outbox), take(&mut outbox)), (Some((3, 4)), None));
        // What is confirmed without having been refused says nothing about those that were.
        outbox.confirm(3);
        assert_eq!(take(&mut outbox), None);
        outbox.try_again(1);
        assert_eq!((take(&mut outbox), take(&mut outbox)), (Some((0, 1)), None));
        outbox.refuse(0);
        outbox.try_again(1);
        assert_eq!((take(&mut outbox), take(&mut outbox)), (Some((0, 1)), None));
        outbox.confirm(0);
        assert_eq!((take(&mut outbox), take(&mut outbox), take(&mut outbox)), (Some((1, 2)), Some((2, 3)), None));
        assert!(!outbox.has_refused());
    }

    #[test]
    fn what_is_forgotten_leaves_nothing() {
        let mut outbox = Outbox::new(true);
        for round in 0..3 {
            outbox.restore(advisory("a", round));
            outbox.forget("a");
        }
        assert!(outbox.ready.is_empty() && outbox.of.is_empty() && outbox.is_empty());
    }

    #[test]
    fn what_is_too_much_is_dropped_oldest_first_and_counted() {
        let mut outbox = Outbox::new(true);
        (0..20).for_each(|due| _ = outbox.add(advisory("a", due)));
        assert_eq!((outbox.len(), outbox.dropped()), (PER_SENDER, 12));
        assert_eq!(outbox.kept_for("a").map(|(_, advisory)| advisory.due_ns).min(), Some(12));
        let mut outbox = Outbox::new(false);
        (0..1_005).for_each(|due| _ = outbox.add(advisory("a", due)));
        assert_eq!((outbox.len(), outbox.dropped(), take(&mut outbox)), (UNRELIABLE, 5, Some((5, 5))));
    }
}
