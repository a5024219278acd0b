//! When each sender was seen and copied last: which messages are copied, and which senders are missing. One million
//! senders is the design size: a sender takes one slot and its name.
//!
//! Times are stored times at the source, nanoseconds since the Unix epoch. Each message moves the time on, and
//! deadlines before it are judged first: decisions and advisories depend on the messages alone, whenever and however
//! often they are read. Only when there is no message to read does the clock move the time.

mod forgotten;
pub(super) mod records;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use hashbrown::HashTable;
use nats_lane::entropy;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use forgotten::{Forgotten, LastCopy};

use super::{
    advisory::{Advisory, AdvisoryKind},
    outbox::Outbox,
};
use crate::{
    config::{Sampling, SenderBounds},
    store::sender_hash,
};

/// No time.
const NEVER: i64 = i64::MIN;

/// A message of a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting<'a> {
    /// The sender.
    pub sender: &'a str,
    /// Source sequence.
    pub seq: u64,
    /// Stored time.
    pub time_ns: i64,
    /// Bytes of the payload.
    pub size: u32,
    /// Whether the message itself demands to be copied.
    pub forced: bool,
}

/// The decision about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SamplingVerdict {
    /// Copy it.
    Copy(CopyCause),
    /// Its sender was copied recently.
    Skip,
}

/// Why a message is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyCause {
    /// No message of its sender was copied before.
    New,
    /// Its sender was copied long enough ago.
    Due,
    /// Its size changed.
    Size,
    /// The message demands it.
    Forced,
    /// It is not after the message that was copied last: the target lost that one, or the position was moved back.
    Again,
    /// It is older than the last copied message by more than a tenth of the interval: the source's clock went back.
    Clock,
}

/// The outcome of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageOutcome {
    /// It is in flight, and counts as copied when it has settled.
    Sent,
    /// It is at the target.
    Stored,
    /// It is not copied.
    Passed,
}

/// All records that were due at one moment.
#[derive(Debug)]
struct Round {
    /// The settled position at that moment.
    position: u64,
    slots: Vec<u32>,
    forgotten: Vec<Arc<str>>,
}

/// One sender, as listed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Listed<'a> {
    /// The value that messages carry.
    pub sender: &'a str,
    /// When it was seen last.
    pub seen_ns: i64,
    /// When it was copied last, if it was.
    pub copied_ns: Option<i64>,
    /// Bytes of that message's payload.
    pub size: u32,
    /// Whether its `timeout` advisory was published.
    pub advised: bool,
    /// Source sequence of the message that was copied last.
    pub sequence: u64,
}

/// The rules, in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct SamplingRules {
    every: i64,
    warn: i64,
    size_trigger: Option<u32>,
    /// Whether a size is compared with that of the message before, copied or not, as Choria's replicator does.
    by_size_seen: bool,
    /// Whether advisories are published.
    advises: bool,
    bounds: SenderBounds,
}

#[derive(Debug)]
struct SenderSlot {
    name: Arc<str>,
    seen: i64,
    copied: i64,
    /// Source sequence of the last copied message; of the first one seen before any was copied.
    sequence: u64,
    /// `seen` in the stored record.
    written: i64,
    /// When the next deadline is.
    due: i64,
    size: u32,
    /// Payload size of the newest message, where sizes are compared with that.
    size_seen: u32,
    generation: u32,
    /// Number of the last load that had its record.
    loaded_in: u32,
    live: bool,
    dirty: bool,
    /// It timed out, and was not seen since.
    late: bool,
    /// `seen` is from the stored record, so up to a quarter of `warn` too old.
    loaded: bool,
}

/// A copy that is in flight, or stored, and not covered by the saved position.
#[derive(Debug, Clone, Copy)]
struct Sent {
    seq: u64,
    time: i64,
    size: u32,
    slot: u32,
    generation: u32,
}

impl SenderSlot {
    /// The copy that settled last.
    fn last_copy(&self) -> LastCopy {
        LastCopy { time: self.copied, seq: self.sequence, size: self.size }
    }
}

impl Sent {
    fn last_copy(&self) -> LastCopy {
        LastCopy { time: self.time, seq: self.seq, size: self.size }
    }
}

/// All senders of one replication.
#[derive(Debug)]
pub struct Senders {
    rules: SamplingRules,
    salt: u64,
    seed: u64,
    table: HashTable<u32>,
    slots: Vec<SenderSlot>,
    free: Vec<u32>,
    due: BinaryHeap<Reverse<(i64, u32)>>,
    /// In source order.
    sent: VecDeque<Sent>,
    /// The newest of them, by slot.
    newest: HashMap<u32, Sent>,
    /// Everything up to this source sequence has settled.
    stored: u64,
    dirty: Vec<u32>,
    /// Forgotten senders whose records still exist, or of which messages may be read again.
    forgotten: HashMap<Arc<str>, Forgotten>,
    /// Bytes of the names of known and of forgotten senders.
    names: usize,
    /// Names that are too long for keys, by the hash in the key.
    hashed: HashMap<u128, Arc<str>>,
    /// Messages whose sender is not tracked, because the bounds are reached.
    untracked: u64,
    /// Whether there are such messages, and whether that has been reported.
    full: Option<bool>,
    leaving: Vec<Arc<str>>,
    /// Forgotten senders that wait only until no message of theirs can be read again.
    unsettled: Vec<Arc<str>>,
    round: Option<Round>,
    /// Advisories that wait.
    pub outbox: Outbox,
    /// Everything up to here has been seen, and all due records of it are written.
    written_to: u64,
    /// Newest source sequence that was seen.
    read: u64,
    /// No sender counts as unseen before this time.
    floor: i64,
    /// Whether a run has begun.
    begun: bool,
    load: u32,
    /// Unknown fields of records, from other versions.
    other: HashMap<Box<str>, BTreeMap<String, serde_json::Value>>,
    /// Records of a newer program, which must not be overwritten.
    newer: HashSet<Box<str>>,
}

impl Senders {
    /// Without known senders.
    pub fn new(replication: &str, sampling: &Sampling) -> Self {
        let reliable = sampling.is_reliable();
        Self {
            rules: SamplingRules::new(sampling),
            salt: xxh3_64(replication.as_bytes()),
            seed: entropy::random(),
            table: HashTable::new(),
            slots: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            sent: VecDeque::new(),
            newest: HashMap::new(),
            stored: 0,
            dirty: Vec::new(),
            forgotten: HashMap::new(),
            names: 0,
            hashed: HashMap::new(),
            untracked: 0,
            full: None,
            leaving: Vec::new(),
            unsettled: Vec::new(),
            round: None,
            outbox: Outbox::new(reliable),
            written_to: 0,
            read: 0,
            floor: NEVER,
            begun: false,
            load: 0,
            other: HashMap::new(),
            newer: HashSet::new(),
        }
    }

    /// Applies changed rules.
    pub fn adopt(&mut self, sampling: &Sampling) {
        self.rules = SamplingRules::new(sampling);
        self.outbox.set_reliable(sampling.is_reliable());
        if !self.rules.advises {
            self.outbox.clear();
            self.leaving.extend(self.forgotten.keys().cloned());
        }
        if self.begun {
            self.schedule_all();
        }
    }

    fn schedule_all(&mut self) {
        self.due.clear();
        for index in 0..self.slots.len() as u32 {
            if self.slots[index as usize].live {
                self.schedule(index);
            }
        }
    }

    /// Number of known senders.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Messages whose sender is not tracked, because there are too many senders.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Whether the bounds were reached since the last call: reported once, until there is room again.
    pub fn became_full(&mut self) -> bool {
        let SenderBounds { senders, bytes } = self.rules.bounds;
        if self.full == Some(true) && self.tracked() * 10 < senders * 9 && self.names * 10 < bytes * 9 {
            self.full = None;
        }
        self.full == Some(false) && self.full.replace(true).is_some()
    }

    /// Senders that take room: known ones, and forgotten ones whose records still exist.
    fn tracked(&self) -> usize {
        self.table.len() + self.forgotten.len()
    }

    /// Whether there is no room for an unknown sender.
    fn is_full(&self, sender: &str) -> bool {
        let SenderBounds { senders, bytes } = self.rules.bounds;
        let is_new = !self.forgotten.contains_key(sender);
        is_new && (self.tracked() >= senders || self.names + sender.len() > bytes)
    }

    /// The same for a loaded record, which may come before that of another one is removed.
    fn is_overfull(&self, sender: &str) -> bool {
        let SenderBounds { senders, bytes } = self.rules.bounds;
        let is_new = self.find(sender).is_none() && !self.forgotten.contains_key(sender);
        let most = |bound: usize| bound + bound / 8 + 4_096;
        is_new && (self.tracked() >= most(senders) || self.names + sender.len() > most(bytes))
    }

    /// The name of a sender, shared by all its entries. Called before its first entry is made.
    fn name(&mut self, sender: &str) -> Arc<str> {
        if let Some(index) = self.find(sender) {
            return self.slots[index as usize].name.clone();
        }
        if let Some((name, _)) = self.forgotten.get_key_value(sender) {
            return name.clone();
        }
        let name: Arc<str> = sender.into();
        self.names += name.len();
        if let Some(hash) = sender_hash(sender) {
            self.hashed.insert(hash, name.clone());
        }
        name
    }

    /// An entry of a sender was removed: its name is removed with the last one.
    fn release(&mut self, sender: &str) {
        if self.find(sender).is_none() && !self.forgotten.contains_key(sender) {
            self.names = self.names.saturating_sub(sender.len());
            if let Some(hash) = sender_hash(sender) {
                self.hashed.remove(&hash);
            }
        }
    }

    /// Whether no sender is known.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Decides about a message; changes nothing.
    pub fn verdict(&self, sighting: &Sighting<'_>) -> SamplingVerdict {
        let LastCopy { time: copied, seq: sequence, size } = self.last_copy(sighting);
        let since = sighting.time_ns.saturating_sub(copied);
        let resized = |trigger: u32| (i64::from(size) - i64::from(sighting.size)).unsigned_abs() >= u64::from(trigger);
        SamplingVerdict::Copy(match () {
            () if copied == NEVER => CopyCause::New,
            () if sighting.seq <= sequence => CopyCause::Again,
            () if sighting.forced => CopyCause::Forced,
            () if since >= self.rules.every - self.splay(sighting.sender, sequence) => CopyCause::Due,
            () if since < -(self.rules.every / 10) => CopyCause::Clock,
            () if self.rules.size_trigger.is_some_and(resized) => CopyCause::Size,
            () => return SamplingVerdict::Skip,
        })
    }

    /// What a message is compared with.
    fn last_copy(&self, sighting: &Sighting<'_>) -> LastCopy {
        if let Some(forgotten) = self.forgotten.get(sighting.sender).filter(|forgotten| sighting.seq <= forgotten.read)
        {
            return forgotten.last_copy();
        }
        self.find(sighting.sender).map_or(LastCopy::NONE, |index| {
            let slot = &self.slots[index as usize];
            let copy = self.newest.get(&index).map_or(slot.last_copy(), Sent::last_copy);
            LastCopy { size: if self.rules.by_size_seen { slot.size_seen } else { copy.size }, ..copy }
        })
    }

    /// How much this sender's interval is shorter this time: up to a tenth.
    fn splay(&self, sender: &str, sequence: u64) -> i64 {
        let hash = xxh3_64_with_seed(sender.as_bytes(), self.salt ^ sequence);
        ((i128::from(self.rules.every / 10) * i128::from(hash >> 32)) >> 32) as i64
    }

    /// Notes a message and its outcome. A message that is read again does not show when its sender was seen.
    pub fn observe(&mut self, sighting: &Sighting<'_>, fate: MessageOutcome) {
        let Sighting { sender, seq, time_ns, size, .. } = *sighting;
        let news = seq > self.read;
        if news {
            // A sender that this message shows to be gone is not in it, or is new with it.
            self.advance(time_ns);
            self.read = seq;
        }
        if let Some(forgotten) = self.forgotten.get_mut(sender).filter(|forgotten| seq <= forgotten.read) {
            return forgotten.observe(sighting, fate);
        }
        let index = match self.find(sender) {
            Some(index) => {
                if news {
                    self.seen_again(index, time_ns);
                }
                index
            }
            None if !news => return,
            None if self.is_full(sender) => {
                self.untracked += 1;
                self.full.get_or_insert(false);
                return;
            }
            None => {
                // It is back: it stays in `forgotten` only until no earlier message of it can be read again.
                self.leaving.extend(self.forgotten.get_key_value(sender).map(|(name, _)| name.clone()));
                let index = self.insert(sender, time_ns, seq);
                self.schedule(index);
                self.touch(index);
                let name = self.slots[index as usize].name.clone();
                self.happened(AdvisoryKind::New, name, time_ns, time_ns);
                index
            }
        };
        if news && self.rules.by_size_seen {
            self.sized(index, size);
        }
        if fate != MessageOutcome::Passed {
            self.copied(index, sighting);
        }
    }

    /// Notes the size of the newest message. Its record is written where the next decision may depend on it.
    fn sized(&mut self, index: u32, size: u32) {
        let before = std::mem::replace(&mut self.slots[index as usize].size_seen, size);
        if before != size && self.rules.size_trigger.is_some() {
            self.touch(index);
        }
    }

    fn seen_again(&mut self, index: u32, time: i64) {
        let slot = &mut self.slots[index as usize];
        let before = std::mem::replace(&mut slot.seen, time);
        slot.loaded = false;
        let moved = slot.written == NEVER || time.abs_diff(slot.written) >= self.rules.slack().unsigned_abs();
        let back = std::mem::replace(&mut slot.late, false);
        if moved || back {
            self.touch(index);
        }
        if back {
            let sender = self.slots[index as usize].name.clone();
            self.schedule(index);
            self.happened(AdvisoryKind::Recover, sender, time, before);
        }
    }

    /// Notes a message that settled before and is read again: the same notes as then, as far as they are
    /// lost.
    pub fn replay(&mut self, sighting: &Sighting<'_>, fate: MessageOutcome) {
        let known = self.find(sighting.sender);
        let slot = known.map(|index| &self.slots[index as usize]);
        let is_copied = slot.is_some_and(|slot| slot.last_copy().covers(sighting.seq));
        let forgotten = self.forgotten.get(sighting.sender).filter(|forgotten| sighting.seq <= forgotten.read);
        if forgotten.map_or(is_copied, |forgotten| forgotten.last_copy().covers(sighting.seq)) {
            self.read = self.read.max(sighting.seq);
            return;
        }
        let is_seen = slot.is_some_and(|slot| slot.loaded && sighting.time_ns <= slot.seen);
        let fate = if self.verdict(sighting) == SamplingVerdict::Skip { MessageOutcome::Passed } else { fate };
        match known.filter(|_| is_seen && forgotten.is_none()) {
            Some(index) => {
                // Its record was written while the copy was in flight.
                if fate == MessageOutcome::Stored {
                    self.copied(index, sighting);
                }
                self.read = self.read.max(sighting.seq);
            }
            None => self.observe(sighting, fate),
        }
    }

    /// The message is the sender's newest copy. Its record says so once the position after it is saved.
    fn copied(&mut self, index: u32, Sighting { seq, time_ns, size, .. }: &Sighting<'_>) {
        let generation = self.slots[index as usize].generation;
        let sent = Sent { seq: *seq, time: *time_ns, size: *size, slot: index, generation };
        self.sent.push_back(sent);
        self.newest.insert(index, sent);
    }

    /// Everything up to `stored` has settled, and everything up to `saved` is never read again by an instance that takes over:
    /// messages in flight up to there count as copied. Lists show those up to `stored`.
    pub fn settled(&mut self, stored: u64, saved: u64) {
        self.stored = stored;
        while let Some(sent) = self.sent.front().copied().filter(|sent| sent.seq <= saved) {
            self.sent.pop_front();
            let slot = &mut self.slots[sent.slot as usize];
            if slot.generation != sent.generation {
                continue;
            }
            (slot.copied, slot.sequence, slot.size) = (sent.time, sent.seq, sent.size);
            if self.newest.get(&sent.slot).is_some_and(|newest| newest.seq == sent.seq) {
                self.newest.remove(&sent.slot);
            }
            self.touch(sent.slot);
        }
    }

    /// A run begins after `position`. Messages in flight are lost or unknown: they are read again. Returns the sequence
    /// after which to read, so that the state is complete for everything up to the position: `saved` says up to where
    /// it held when it was written, which counts for the first run only; in `another` stream it does not count.
    pub fn begin(&mut self, position: u64, saved: Option<u64>, another: bool) -> u64 {
        self.sent.clear();
        self.newest.clear();
        self.stored = position;
        self.outbox.take_back();
        self.forgotten.values_mut().for_each(|forgotten| forgotten.begin(position));
        if !std::mem::replace(&mut self.begun, true) {
            self.schedule_all();
            self.written_to = saved.unwrap_or(position);
            self.read = self.written_to;
            self.leaving.extend(self.forgotten.keys().cloned());
        }
        if another {
            (self.written_to, self.read) = (position, position);
            // Their messages were of the other stream: they are not read again.
            self.forgotten.values_mut().for_each(|forgotten| forgotten.read = forgotten.read.min(position));
        }
        self.written_to.min(position)
    }

    /// Whether [`Self::advance`] may find a sender unseen at this time.
    pub fn is_due(&self, now: i64) -> bool {
        self.due.peek().is_some_and(|Reverse((at, _))| *at < now)
    }

    /// Judges which senders are unseen for too long at this time. A sender that is due both ways times out before it
    /// expires.
    pub fn advance(&mut self, now: i64) {
        while let Some(Reverse((at, index))) = self.due.peek().copied().filter(|Reverse((at, _))| *at < now) {
            self.due.pop();
            let slot = &self.slots[index as usize];
            if !slot.live || slot.due != at {
                continue;
            }
            let due = self.next_due(index);
            if due >= now {
                self.schedule(index);
                continue;
            }
            let slot = &mut self.slots[index as usize];
            let (seen, sender) = (slot.seen, slot.name.clone());
            let from = seen.max(self.floor);
            if self.rules.warns() && !slot.late {
                slot.late = true;
                self.touch(index);
                self.schedule(index);
                self.happened(AdvisoryKind::Timeout, sender, from.saturating_add(self.rules.warn), seen);
            } else {
                let size = if self.rules.by_size_seen { slot.size_seen } else { slot.size };
                let settled = LastCopy { size, ..slot.last_copy() };
                let in_flight = self.newest.get(&index).map(Sent::last_copy);
                self.remove(index);
                self.forgotten.insert(sender.clone(), Forgotten::new(self.read, settled, in_flight));
                self.leaving.push(sender.clone());
                self.happened(AdvisoryKind::Expire, sender, from.saturating_add(self.rules.every), seen);
            }
        }
    }

    /// Messages before this time were lost before they were read: no sender counts as unseen up to it.
    pub fn begin_at(&mut self, time: i64) {
        self.floor = self.floor.max(time);
    }

    /// That time, if messages before it were lost.
    pub fn unseen_from(&self) -> Option<DateTime<Utc>> {
        (self.floor != NEVER).then(|| DateTime::from_timestamp_nanos(self.floor))
    }

    fn happened(&mut self, kind: AdvisoryKind, sender: Arc<str>, due_ns: i64, seen_ns: i64) {
        if !self.rules.advises {
            return;
        }
        let index = self.find(&sender);
        if self.outbox.add(Advisory { kind, sender, due_ns, seen_ns })
            && let Some(index) = index
        {
            self.touch(index);
        }
    }

    /// The advisory was confirmed, or published if no stream confirms it.
    pub fn confirmed(&mut self, number: u64) -> Option<AdvisoryKind> {
        let advisory = self.outbox.confirm(number)?;
        match self.find(&advisory.sender) {
            Some(index) => self.touch(index),
            None if self.forgotten.contains_key(&advisory.sender) => self.leaving.push(advisory.sender),
            None => {}
        }
        Some(advisory.kind)
    }

    fn find(&self, sender: &str) -> Option<u32> {
        let hash = xxh3_64_with_seed(sender.as_bytes(), self.seed);
        self.table.find(hash, |index| *self.slots[*index as usize].name == *sender).copied()
    }

    fn insert(&mut self, sender: &str, seen: i64, sequence: u64) -> u32 {
        let slot = SenderSlot {
            name: self.name(sender),
            seen,
            copied: NEVER,
            sequence,
            written: NEVER,
            due: NEVER,
            size: 0,
            size_seen: 0,
            generation: 0,
            loaded_in: self.load,
            live: true,
            dirty: false,
            late: false,
            loaded: false,
        };
        let index = match self.free.pop() {
            Some(index) => {
                let generation = self.slots[index as usize].generation;
                self.slots[index as usize] = SenderSlot { generation, ..slot };
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        let (slots, seed) = (&self.slots, self.seed);
        let hash = |index: &u32| xxh3_64_with_seed(slots[*index as usize].name.as_bytes(), seed);
        self.table.insert_unique(hash(&index), index, hash);
        index
    }

    fn remove(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.live = false;
        slot.dirty = false;
        slot.generation = slot.generation.wrapping_add(1);
        let hash = xxh3_64_with_seed(slot.name.as_bytes(), self.seed);
        if let Ok(entry) = self.table.find_entry(hash, |other| *other == index) {
            entry.remove();
        }
        self.newest.remove(&index);
        self.free.push(index);
    }

    fn next_due(&self, index: u32) -> i64 {
        let slot = &self.slots[index as usize];
        let after = if self.rules.warns() && !slot.late { self.rules.warn } else { self.rules.every };
        let slack = if slot.loaded { self.rules.slack() } else { 0 };
        slot.seen.max(self.floor).saturating_add(after).saturating_add(slack)
    }

    fn schedule(&mut self, index: u32) {
        let due = self.next_due(index);
        self.slots[index as usize].due = due;
        self.due.push(Reverse((due, index)));
    }

    /// Marks its record to be written.
    fn touch(&mut self, index: u32) {
        if !std::mem::replace(&mut self.slots[index as usize].dirty, true) {
            self.dirty.push(index);
        }
    }

    /// Number of slots, for [`Senders::list`].
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// What is known of one sender.
    pub fn listed(&self, sender: &str) -> Option<Listed<'_>> {
        self.find(sender).map(|index| self.listed_at(index as usize))
    }

    fn listed_at(&self, at: usize) -> Listed<'_> {
        let slot = &self.slots[at];
        let stored = self.newest.get(&(at as u32)).filter(|sent| sent.seq <= self.stored);
        let copy = stored.map_or(slot.last_copy(), Sent::last_copy);
        Listed {
            sender: &slot.name,
            seen_ns: slot.seen,
            copied_ns: (copy.time != NEVER).then_some(copy.time),
            size: if self.rules.by_size_seen { slot.size_seen } else { copy.size },
            advised: slot.late,
            sequence: copy.seq,
        }
    }

    /// Another replicator copies from now on, until a run begins again: deadlines would pile up.
    pub fn stand_by(&mut self) {
        self.begun = false;
        self.due.clear();
    }

    /// Forgets the senders that were seen before this time, without an advisory: another replicator published it.
    pub fn forget_unseen(&mut self, since: DateTime<Utc>) {
        let since = nanos(since);
        let unseen = |(index, slot): (usize, &SenderSlot)| (slot.live && slot.seen < since).then_some(index as u32);
        let unseen: Vec<u32> = self.slots.iter().enumerate().filter_map(unseen).collect();
        for index in unseen {
            let name = self.slots[index as usize].name.clone();
            self.outbox.forget(&name);
            self.remove(index);
            self.forgotten.insert(name.clone(), Forgotten::without_messages(0));
            self.leaving.push(name);
        }
    }

    /// The senders in a part of the slots, each with its slot.
    pub fn list(&self, part: std::ops::Range<usize>) -> impl Iterator<Item = (usize, Listed<'_>)> {
        let part = part.start.min(self.slots.len())..part.end.min(self.slots.len());
        part.filter(move |at| self.slots[*at].live).map(move |at| (at, self.listed_at(at)))
    }
}

impl SamplingRules {
    fn new(sampling: &Sampling) -> Self {
        let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
        let trigger = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self {
            every: nanos(sampling.every),
            warn: nanos(sampling.warn),
            size_trigger: sampling.size_trigger.map(trigger),
            by_size_seen: sampling.as_choria,
            advises: sampling.advisory.is_some(),
            bounds: sampling.bounds,
        }
    }

    /// Whether an advisory is due before it expires.
    fn warns(&self) -> bool {
        self.advises && self.warn < self.every
    }

    /// How much older than the present value `seen` in a record may be.
    fn slack(&self) -> i64 {
        self.warn.min(self.every) / 4
    }
}

fn time(ns: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(ns)
}

fn nanos(time: DateTime<Utc>) -> i64 {
    time.timestamp_nanos_opt().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::{records::pending, *};
    use crate::{
        config::{self, Inspect},
        sampling::inspect::shortened,
        store::SenderRecord,
    };

    const SECOND: i64 = 1_000_000_000;

    /// Every 100 s, warned after 40 s.
    fn sampling(advises: bool) -> Sampling {
        Sampling {
            inspect: Inspect::Field("sender".to_owned()),
            every: Duration::from_secs(100),
            warn: Duration::from_secs(40),
            size_trigger: Some(10),
            force_field: None,
            advisory: advises.then(|| config::AdvisorySettings { subject: "a".to_owned(), reliable: true }),
            bounds: SenderBounds::default(),
            as_choria: false,
        }
    }

    fn senders() -> Senders {
        let mut senders = Senders::new("NODES", &sampling(true));
        senders.begin(0, None, false);
        senders
    }

    fn sight(seq: u64, seconds: f64, sender: &str) -> Sighting<'_> {
        let time_ns = 1_000_000 * SECOND + (seconds * SECOND as f64) as i64;
        Sighting { sender, seq, time_ns, size: 100, forced: false }
    }

    /// Takes a message as a run does; it settles at once.
    fn take(senders: &mut Senders, sighting: Sighting<'_>) -> SamplingVerdict {
        let verdict = senders.verdict(&sighting);
        senders.observe(
            &sighting,
            if verdict == SamplingVerdict::Skip { MessageOutcome::Passed } else { MessageOutcome::Sent },
        );
        senders.settled(sighting.seq, sighting.seq);
        verdict
    }

    /// All advisories, as they are written and confirmed.
    fn tell(senders: &mut Senders, position: u64) -> Vec<(AdvisoryKind, String, i64)> {
        let mut told = Vec::new();
        loop {
            while let Some(write) = senders.next_write(position, position, 3) {
                senders.wrote(&write);
            }
            let Some((number, advisory)) = senders.outbox.take_next() else { return told };
            told.push((advisory.kind, advisory.sender.to_string(), advisory.due_ns / SECOND - 1_000_000));
            senders.confirmed(number);
        }
    }

    fn all_records(senders: &mut Senders, position: u64) -> Vec<(String, Option<SenderRecord>)> {
        let mut records = Vec::new();
        while let Some(write) = senders.next_write(position, position, 100) {
            senders.wrote(&write);
            records.extend(write.records);
        }
        records
    }

    #[test]
    fn a_slot_is_small() {
        assert!(size_of::<SenderSlot>() <= 80, "{}", size_of::<SenderSlot>());
    }

    #[test]
    fn what_is_copied_row_by_row() {
        use CopyCause::{Again, Clock, Due, Forced, New, Size};
        use SamplingVerdict::{Copy, Skip};
        // Seconds, sender, size, force, and what is due.
        let rows: &[(f64, &str, u32, bool, SamplingVerdict)] = &[
            (0.0, "a", 100, false, Copy(New)),
            (0.0, "a", 100, false, Skip),
            (0.5, "b", 100, true, Copy(New)),
            (10.0, "a", 109, false, Skip),
            (10.0, "a", 110, false, Copy(Size)),
            (11.0, "a", 101, false, Skip),
            (11.0, "a", 100, false, Copy(Size)),
            (12.0, "a", 100, true, Copy(Forced)),
            // No interval is shorter by more than a tenth, or longer.
            (101.9, "a", 100, false, Skip),
            (112.0, "a", 100, false, Copy(Due)),
            (112.0, "a", 100, false, Skip),
            // The clock goes back, a little and then by more than a tenth of the interval.
            (102.5, "a", 100, false, Skip),
            (101.5, "a", 100, false, Copy(Clock)),
            (101.6, "a", 100, false, Skip),
        ];
        let mut senders = senders();
        for (index, (at, sender, size, forced, expect)) in rows.iter().enumerate() {
            let sighting = Sighting { size: *size, forced: *forced, ..sight(index as u64 + 1, *at, sender) };
            assert_eq!(take(&mut senders, sighting), *expect, "row {index}: {sighting:?}");
        }
        // Messages that are read again restart with the first of them.
        assert_eq!(take(&mut senders, sight(12, 101.55, "a")), Copy(Again));
        assert_eq!(take(&mut senders, sight(13, 101.5, "a")), Skip);
    }

    #[test]
    fn a_copy_that_settles_late_does_not_hide_a_newer_one() {
        let mut senders = senders();
        let sized = |seq: u64, size: u32| Sighting { size, ..sight(seq, seq as f64, "a") };
        // After a restart 10 is sent again, and 20, of another size, is at the target already.
        senders.observe(&sized(10, 100), MessageOutcome::Sent);
        senders.observe(&sized(20, 200), MessageOutcome::Stored);
        senders.settled(15, 15);
        senders.settled(20, 20);
        assert_eq!(senders.verdict(&sized(30, 100)), SamplingVerdict::Copy(CopyCause::Size));
        assert_eq!(senders.verdict(&sized(30, 200)), SamplingVerdict::Skip);
    }

    #[test]
    fn messages_of_a_forgotten_sender_are_decided_as_before() {
        use SamplingVerdict::{Copy, Skip};
        for advises in [true, false] {
            let mut senders = Senders::new("NODES", &sampling(advises));
            senders.begin(0, None, false);
            assert_eq!(take(&mut senders, sight(1, 0.0, "a")), Copy(CopyCause::New));
            // In flight when the run ends: what follows is read again.
            senders.observe(&sight(2, 10.0, "b"), MessageOutcome::Sent);
            assert_eq!(senders.verdict(&sight(3, 50.0, "a")), Skip);
            senders.observe(&sight(3, 50.0, "a"), MessageOutcome::Passed);
            senders.observe(&sight(4, 200.0, "b"), MessageOutcome::Sent);
            assert!(senders.listed("a").is_none());

            // Another process knows only the records.
            let records: Vec<_> = all_records(&mut senders, 1).into_iter().filter_map(|(_, record)| record).collect();
            let mut successor = Senders::new("NODES", &sampling(advises));
            records.into_iter().for_each(|record| successor.take_over(record));
            for (what, senders) in [("the same process", &mut senders), ("another", &mut successor)] {
                senders.begin(1, Some(1), false);
                assert_eq!(senders.verdict(&sight(3, 50.0, "a")), Skip, "{what}, advises: {advises}");
                assert_eq!(senders.verdict(&sight(5, 201.0, "a")), Copy(CopyCause::New), "{what}");
                // It is back, and the run ends once more before anything settled.
                (2..=5).zip(["b", "a", "b", "a"]).for_each(|(seq, sender)| {
                    let sighting = sight(seq, if seq == 3 { 50.0 } else { 200.0 }, sender);
                    let is_copied = senders.verdict(&sighting) != Skip;
                    senders.observe(&sighting, if is_copied { MessageOutcome::Sent } else { MessageOutcome::Passed });
                });
                all_records(senders, 1);
                senders.begin(1, None, false);
                assert_eq!(senders.verdict(&sight(3, 50.0, "a")), Skip, "{what}, advises: {advises}");
                // Once everything is written, nothing of it is kept.
                (2..=5).zip(["b", "a", "b", "a"]).for_each(|(seq, sender)| {
                    take(senders, sight(seq, if seq == 3 { 50.0 } else { 200.0 }, sender));
                });
                tell(senders, 5);
                all_records(senders, 5);
                all_records(senders, 5);
                assert!(senders.forgotten.is_empty(), "{what}, advises: {advises}: {:?}", senders.forgotten);
            }
        }
    }

    #[test]
    fn a_forgotten_record_stays_until_the_position_is_saved() {
        let mut senders = Senders::new("NODES", &sampling(false));
        senders.begin(0, None, false);
        take(&mut senders, sight(1, 0.0, "a"));
        all_records(&mut senders, 1);
        take(&mut senders, sight(2, 200.0, "b"));
        assert!(senders.listed("a").is_none());
        let mut written = |saved| {
            let write = senders.next_write(2, saved, 100);
            write.map(|write| write.records.into_iter().find(|(name, _)| name == "a").map(|(_, record)| record))
        };
        // All is written, but a successor reads message 1 again.
        let Some(Some(Some(record))) = written(0) else { panic!("no record") };
        assert!(record.expired && record.copied_sequence == Some(1), "{record:?}");
        assert!(written(0).is_none() && written(0).is_none());
        while written(2) != Some(Some(None)) {}
    }

    #[test]
    fn a_replayed_message_counts_as_read() {
        let mut before = Senders::new("NODES", &sampling(false));
        before.begin(0, None, false);
        take(&mut before, sight(1, 0.0, "a"));
        take(&mut before, sight(2, 50.0, "a"));
        let records = all_records(&mut before, 2).into_iter().filter_map(|(_, record)| record);
        let mut senders = Senders::new("NODES", &sampling(false));
        records.for_each(|record| senders.take_over(record));
        // The records hold to 2, but the saved position does not say so.
        assert_eq!(senders.begin(2, Some(0), false), 0);
        senders.replay(&sight(1, 0.0, "a"), MessageOutcome::Stored);
        senders.replay(&sight(2, 50.0, "a"), MessageOutcome::Stored);
        senders.advance(200 * SECOND + 1_000_000 * SECOND);
        assert!(senders.listed("a").is_none());
        senders.begin(2, Some(0), false);
        senders.replay(&sight(2, 50.0, "a"), MessageOutcome::Stored);
        assert_eq!(senders.forgotten["a"].last_copy().seq, 1, "2 was skipped");
    }

    #[test]
    fn who_only_follows_keeps_nothing_that_piles_up() {
        let mut senders = Senders::new("NODES", &sampling(true));
        let record = |seen: i64| {
            let mut record = SenderRecord::new("a", time(sight(0, 0.0, "").time_ns + seen * SECOND));
            record.pending.push(pending(&Advisory {
                kind: AdvisoryKind::New,
                sender: "a".into(),
                due_ns: seen,
                seen_ns: seen,
            }));
            record
        };
        (0..100).for_each(|seen| senders.take_over(record(seen)));
        assert_eq!((senders.due.len(), senders.outbox.len(), senders.len()), (0, 1, 1));
        // Who takes over knows when it is due, once.
        senders.adopt(&sampling(true));
        senders.begin(0, None, false);
        assert_eq!(senders.due.len(), 1);
        senders.advance(sight(0, 300.0, "").time_ns);
        let kinds: Vec<_> = tell(&mut senders, 0).into_iter().map(|(kind, ..)| kind).collect();
        assert_eq!(kinds, [AdvisoryKind::New, AdvisoryKind::Timeout, AdvisoryKind::Expire]);
    }

    #[test]
    fn intervals_differ_by_up_to_a_tenth() {
        let mut senders = senders();
        let mut gone = Vec::new();
        for number in 0..1_000 {
            take(&mut senders, sight(number + 1, 0.0, &format!("n{number}")));
        }
        for tenth in 890..=1_000 {
            let at = f64::from(tenth) / 10.0;
            let due = (0..1_000)
                .filter(|number| senders.verdict(&sight(5_000, at, &format!("n{number}"))) != SamplingVerdict::Skip)
                .count();
            gone.push(due);
        }
        assert_eq!((gone[0], gone[9], *gone.last().unwrap()), (0, 0, 1_000));
        assert!((400..600).contains(&gone[60]), "half of them in the middle: {}", gone[60]);
    }

    #[test]
    fn advisories_row_by_row() {
        use AdvisoryKind::{Expire, New, Recover, Timeout};
        let check = |messages: &[(f64, &str)], until: f64, expect: &[(AdvisoryKind, &str, i64)]| {
            let mut senders = senders();
            for (index, (at, sender)) in messages.iter().enumerate() {
                take(&mut senders, sight(index as u64 + 1, *at, sender));
            }
            senders.advance(sight(0, until, "").time_ns);
            let told = tell(&mut senders, 1_000);
            let told: Vec<_> = told.iter().map(|(kind, sender, due)| (*kind, sender.as_str(), *due)).collect();
            assert_eq!(told, expect, "{messages:?} {until}");
        };
        check(&[(0.0, "a")], 40.0, &[(New, "a", 0)]);
        check(&[(0.0, "a")], 40.1, &[(New, "a", 0), (Timeout, "a", 40)]);
        check(&[(0.0, "a")], 100.0, &[(New, "a", 0), (Timeout, "a", 40)]);
        let gone = [(New, "a", 0), (Timeout, "a", 40), (Expire, "a", 100)];
        check(&[(0.0, "a")], 100.1, &gone);
        check(&[(0.0, "a")], 100_000.0, &gone);
        // Exactly at the border it is in time.
        check(&[(0.0, "a"), (40.0, "a")], 80.0, &[(New, "a", 0)]);
        check(&[(0.0, "a"), (40.1, "a")], 80.0, &[(New, "a", 0), (Timeout, "a", 40), (Recover, "a", 40)]);
        check(&[(0.0, "a"), (100.0, "a")], 101.0, &[(New, "a", 0), (Timeout, "a", 40), (Recover, "a", 100)]);
        let back = [(New, "a", 0), (Timeout, "a", 40), (Expire, "a", 100), (New, "a", 101)];
        check(&[(0.0, "a"), (101.0, "a")], 101.0, &back);
        // Other senders move the time on, and each is reported in its own order.
        check(
            &[(0.0, "a"), (30.0, "b"), (90.0, "b"), (200.0, "b")],
            200.0,
            &[
                (New, "a", 0),
                (New, "b", 30),
                (Timeout, "a", 40),
                (Timeout, "b", 70),
                (Recover, "b", 90),
                (Expire, "a", 100),
                (Timeout, "b", 130),
                (Expire, "b", 190),
                (New, "b", 200),
            ],
        );
        // A clock that goes back loses nobody.
        check(&[(50.0, "a"), (20.0, "a"), (55.0, "a")], 60.0, &[(New, "a", 50)]);
    }

    #[test]
    fn after_a_restart_nobody_is_lost_before_its_time() {
        let mut before = senders();
        take(&mut before, sight(1, 0.0, "a"));
        // Not written again: it moved by less than a quarter of 40 s.
        let mut records = all_records(&mut before, 1);
        take(&mut before, sight(2, 9.0, "a"));
        records.extend(all_records(&mut before, 2));
        assert_eq!(records.len(), 1, "{records:?}");
        let load = || {
            let mut after = Senders::new("NODES", &sampling(true));
            after.take_over(records[0].1.clone().unwrap());
            after.begin(2, Some(2), false);
            after
        };
        let mut after = load();
        after.advance(sight(0, 50.0, "").time_ns);
        let kinds =
            |senders: &mut Senders| -> Vec<AdvisoryKind> { tell(senders, 9).into_iter().map(|told| told.0).collect() };
        assert_eq!(kinds(&mut after), [AdvisoryKind::New], "not confirmed before");
        after.advance(sight(0, 50.1, "").time_ns);
        assert_eq!(kinds(&mut after), [AdvisoryKind::Timeout]);
        // It was down for hours, and the source lost what was sent meanwhile.
        let mut after = load();
        after.begin_at(sight(0, 20_000.0, "").time_ns);
        take(&mut after, sight(900, 20_000.0, "b"));
        after.advance(sight(0, 20_040.0, "").time_ns);
        assert_eq!(kinds(&mut after), [AdvisoryKind::New, AdvisoryKind::New]);
        after.advance(sight(0, 20_051.0, "").time_ns);
        assert_eq!(kinds(&mut after), [AdvisoryKind::Timeout, AdvisoryKind::Timeout]);
        assert_eq!(after.verdict(&sight(901, 20_052.0, "a")), SamplingVerdict::Copy(CopyCause::Due));
    }

    #[test]
    fn only_what_settled_is_written_as_copied() {
        let mut senders = senders();
        senders.observe(&sight(1, 0.0, "a"), MessageOutcome::Sent);
        assert_eq!(senders.verdict(&sight(2, 1.0, "a")), SamplingVerdict::Skip);
        assert!(all_records(&mut senders, 0).is_empty(), "it is new with what has not settled");
        assert_eq!(senders.listed("a").unwrap().copied_ns, None);
        senders.settled(1, 0);
        assert_eq!(senders.listed("a").unwrap().sequence, 1, "lists do not wait until the position is saved");
        assert!(all_records(&mut senders, 0).is_empty(), "an instance that takes over reads it again");
        senders.settled(1, 1);
        let records = all_records(&mut senders, 1);
        assert_eq!(records[0].1.as_ref().unwrap().sequence, 1);
        assert_eq!(senders.written_to(), 1);
        senders.observe(&sight(2, 100.0, "a"), MessageOutcome::Sent);
        assert_eq!(senders.listed("a").unwrap().sequence, 1, "in flight");
        let records = all_records(&mut senders, 1);
        assert_eq!(records[0].1.as_ref().unwrap().sequence, 1, "seen, and not copied");
        // The run ends; what was sent is sent again.
        senders.begin(1, None, false);
        assert_eq!(senders.verdict(&sight(2, 100.0, "a")), SamplingVerdict::Copy(CopyCause::Due));
    }

    #[test]
    fn sizes_are_compared_as_the_document_says() {
        use CopyCause::{New, Size};
        // Sizes of messages within the interval, trigger 10, and what is copied by our rule and by Choria's.
        let rows = [
            (100, SamplingVerdict::Copy(New), SamplingVerdict::Copy(New)),
            (106, SamplingVerdict::Skip, SamplingVerdict::Skip),
            (112, SamplingVerdict::Copy(Size), SamplingVerdict::Skip),
            (118, SamplingVerdict::Skip, SamplingVerdict::Skip),
            (107, SamplingVerdict::Skip, SamplingVerdict::Copy(Size)),
        ];
        for as_choria in [false, true] {
            let mut senders = Senders::new("NODES", &Sampling { as_choria, ..sampling(false) });
            senders.begin(0, None, false);
            for (seq, (size, ours, chorias)) in (1..).zip(rows) {
                let sighting = Sighting { size, ..sight(seq, seq as f64, "a") };
                let expect = if as_choria { chorias } else { ours };
                assert_eq!(take(&mut senders, sighting), expect, "{as_choria} {size}");
            }
        }
    }

    #[test]
    fn what_settled_before_a_crash_is_known_when_it_is_read_again() {
        let mut senders = Senders::new("NODES", &sampling(true));
        // Written up to 1, and 4 messages are after that.
        assert_eq!(senders.begin(5, Some(1), false), 1);
        for (seq, sender) in [(2, "a"), (3, "a"), (4, "b"), (5, "b")] {
            senders.replay(&sight(seq, 0.0, sender), MessageOutcome::Stored);
        }
        assert_eq!(senders.verdict(&sight(6, 1.0, "a")), SamplingVerdict::Skip);
        let records: BTreeMap<_, _> = all_records(&mut senders, 5).into_iter().collect();
        assert_eq!(records["a"].as_ref().unwrap().sequence, 2);
        assert_eq!(records["b"].as_ref().unwrap().sequence, 4);
        assert_eq!(senders.written_to(), 5);
        // Read once more, it changes nothing.
        senders.begin(5, None, false);
        senders.replay(&sight(2, 0.0, "a"), MessageOutcome::Stored);
        assert!(all_records(&mut senders, 5).is_empty());
        // Where some of it may have been refused, an extra copy is the lesser evil.
        let mut senders = Senders::new("NODES", &sampling(true));
        senders.begin(5, Some(1), false);
        senders.replay(&sight(2, 0.0, "a"), MessageOutcome::Passed);
        assert_eq!(senders.verdict(&sight(6, 1.0, "a")), SamplingVerdict::Copy(CopyCause::New));
    }

    #[test]
    fn a_copy_in_flight_at_a_record_write_counts_after_a_crash() {
        let mut senders = senders();
        take(&mut senders, sight(1, 0.0, "a"));
        for (seq, at) in [(10, 30.0), (20, 60.0), (30, 89.0)] {
            assert_eq!(take(&mut senders, sight(seq, at, "a")), SamplingVerdict::Skip);
        }
        let due = sight(50, 100.0, "a");
        assert_eq!(senders.verdict(&due), SamplingVerdict::Copy(CopyCause::Due));
        senders.observe(&due, MessageOutcome::Sent);
        let record = all_records(&mut senders, 30).swap_remove(0).1.unwrap();
        assert_eq!((record.sequence, nanos(record.seen)), (1, due.time_ns));
        // A crash after it has settled: it is read again, and so is one that was skipped.
        let mut after = Senders::new("NODES", &sampling(true));
        after.take_over(record);
        after.begin(60, Some(30), false);
        after.replay(&due, MessageOutcome::Stored);
        after.replay(&sight(52, 101.0, "a"), MessageOutcome::Stored);
        assert_eq!(after.verdict(&sight(61, 189.0, "a")), SamplingVerdict::Skip);
        assert_eq!(after.verdict(&sight(61, 200.0, "a")), SamplingVerdict::Copy(CopyCause::Due));
        after.settled(60, 60);
        assert_eq!(all_records(&mut after, 60)[0].1.as_ref().map(|record| record.sequence), Some(50));
    }

    #[test]
    fn an_expired_sender_is_kept_until_its_advisory_is_published() {
        let mut senders = senders();
        take(&mut senders, sight(1, 0.0, "a"));
        tell(&mut senders, 1);
        take(&mut senders, sight(2, 200.0, "b"));
        let mut records = all_records(&mut senders, 1);
        let at = records.iter().position(|(sender, _)| sender == "a").unwrap();
        let record = records.swap_remove(at).1.unwrap();
        let events: Vec<_> = record.pending.iter().map(|pending| pending.event.as_str()).collect();
        assert_eq!((record.expired, events), (true, vec!["timeout", "expire"]));
        // A crash.
        let mut after = Senders::new("NODES", &sampling(true));
        after.take_over(record);
        after.begin(2, Some(0), false);
        after.replay(&sight(1, 0.0, "a"), MessageOutcome::Stored);
        assert!(after.is_empty());
        after.replay(&sight(2, 200.0, "b"), MessageOutcome::Stored);
        let told: Vec<_> = tell(&mut after, 2).into_iter().map(|told| told.0).collect();
        assert_eq!(told, [AdvisoryKind::Timeout, AdvisoryKind::Expire, AdvisoryKind::New]);
        assert!(after.forgotten.is_empty() && after.len() == 1, "its record went when all was published");
    }

    #[test]
    fn edited_records_count_and_newer_formats_stay() {
        let mut senders = senders();
        take(&mut senders, sight(1, 0.0, "a"));
        let mut record = all_records(&mut senders, 1)[0].1.clone().unwrap();
        record.copied = None;
        record.other.insert("note".to_owned(), "mine".into());
        senders.take_over(record.clone());
        assert_eq!(take(&mut senders, sight(2, 1.0, "a")), SamplingVerdict::Copy(CopyCause::New));
        let written = all_records(&mut senders, 2)[0].1.clone().unwrap();
        assert_eq!((written.sequence, written.other.get("note")), (2, Some(&"mine".into())));
        senders.taken_away("a");
        assert!(senders.is_empty());
        assert_eq!(take(&mut senders, sight(3, 2.0, "a")), SamplingVerdict::Copy(CopyCause::New));
        record.version = 2;
        senders.take_over(record);
        take(&mut senders, sight(4, 3.0, "a"));
        assert!(all_records(&mut senders, 4).is_empty());
    }

    #[test]
    fn who_is_not_told_by_a_load_is_forgotten() {
        let mut senders = Senders::new("NODES", &sampling(true));
        let record = |sender: &str| SenderRecord::new(sender, DateTime::UNIX_EPOCH);
        senders.begin_load();
        senders.take_over(record("a"));
        senders.take_over(record("b"));
        senders.end_load();
        senders.begin_load();
        senders.take_over(record("b"));
        senders.end_load();
        let left: Vec<_> = senders.list(0..9).map(|(_, listed)| listed.sender).collect();
        assert_eq!(left, ["b"]);
        let token = |sender: &str| format!("{}=={:032x}", "x".repeat(166), sender_hash(sender).unwrap());
        let long = "x.".repeat(120);
        senders.take_over(record(&long));
        senders.taken_away(&token(&long));
        senders.taken_away("b");
        assert!(senders.is_empty());
    }

    fn bounded(senders: usize, bytes: usize) -> Senders {
        let sampling = Sampling { bounds: SenderBounds { senders, bytes }, ..sampling(true) };
        let mut senders = Senders::new("NODES", &sampling);
        senders.begin(0, None, false);
        senders
    }

    #[test]
    fn senders_beyond_the_bounds_are_copied_and_counted() {
        for mut senders in [bounded(3, 1_000), bounded(1_000, 6)] {
            for (seq, sender) in (1..).zip(["n1", "n2", "n3", "n4", "n4", "n1", "n5", "n4"]) {
                let expect = if sender == "n1" && seq > 1 {
                    SamplingVerdict::Skip
                } else {
                    SamplingVerdict::Copy(CopyCause::New)
                };
                assert_eq!(take(&mut senders, sight(seq, 0.0, sender)), expect, "{seq}");
                assert_eq!(senders.became_full(), seq == 4, "said once");
            }
            assert_eq!((senders.len(), senders.names, senders.untracked()), (3, 6, 4));
            let new = tell(&mut senders, 8).into_iter().map(|(_, sender, _)| sender);
            assert_eq!(new.collect::<Vec<_>>(), ["n1", "n2", "n3"], "an advisory is of a tracked sender");
            // Forgotten senders take room until their records are gone.
            take(&mut senders, sight(9, 200.0, "n6"));
            assert_eq!((senders.len(), senders.forgotten.len(), senders.names, senders.untracked()), (0, 3, 6, 5));
            tell(&mut senders, 9);
            tell(&mut senders, 9);
            assert_eq!((senders.forgotten.len(), senders.names, senders.hashed.len()), (0, 0, 0));
            take(&mut senders, sight(10, 201.0, "n6"));
            assert_eq!((senders.len(), senders.names, senders.untracked()), (1, 2, 5));
            assert!(!senders.became_full());
            for (seq, sender) in (11..).zip(["n7", "n8", "n9"]) {
                take(&mut senders, sight(seq, 202.0, sender));
            }
            assert!(senders.became_full() && !senders.became_full(), "said again after there was room");
        }
    }

    #[test]
    fn all_records_are_written_again_also_of_senders_that_expired() {
        let mut senders = senders();
        take(&mut senders, sight(1, 0.0, "gone"));
        take(&mut senders, sight(2, 200.0, "here"));
        let names = |records: Vec<(String, Option<SenderRecord>)>| -> Vec<_> {
            let expired = |record: Option<SenderRecord>| record.map(|record| (record.expired, record.pending.len()));
            let mut names: Vec<_> = records.into_iter().map(|(name, record)| (name, expired(record))).collect();
            names.sort();
            names
        };
        let before = names(all_records(&mut senders, 2));
        assert_eq!(before.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["gone", "here"]);
        assert!(matches!(before[0].1, Some((true, 1..))), "{before:?}");
        assert!(all_records(&mut senders, 2).is_empty());
        senders.write_all_again();
        assert_eq!(names(all_records(&mut senders, 2)), before);
    }

    #[test]
    fn bytes_of_names_come_back_however_a_sender_goes() {
        let odd = |number: usize| format!("{number}{}", "=".repeat(100));
        let mut senders = Senders::new("NODES", &sampling(true));
        let record = |number: usize| SenderRecord::new(&odd(number), DateTime::UNIX_EPOCH);
        let token = |number: usize| format!("=={:032x}", sender_hash(&odd(number)).unwrap());
        (0..4).for_each(|number| senders.take_over(record(number)));
        assert_eq!((senders.names, senders.hashed.len()), (404, 4));
        // Its record says that it expired, and then goes; the other one is removed at once.
        senders.take_over(SenderRecord { expired: true, ..record(0) });
        assert_eq!((senders.len(), senders.names, senders.hashed.len()), (3, 404, 4));
        (0..2).for_each(|number| senders.taken_away(&token(number)));
        senders.taken_away(&token(0));
        assert_eq!((senders.len(), senders.forgotten.len(), senders.names, senders.hashed.len()), (2, 0, 202, 2));
        senders.forget_all();
        assert_eq!((senders.len(), senders.names, senders.hashed.len()), (0, 0, 0));
    }

    #[test]
    fn a_record_of_a_long_value_is_replaced_by_a_short_one() {
        let long = "x".repeat(300);
        let short = shortened(&long).unwrap();
        let mut senders = Senders::new("NODES", &sampling(true));
        let mut record = SenderRecord::new(&long, time(sight(0, 0.0, "").time_ns));
        (record.copied, record.sequence, record.size) = (Some(record.seen), 1, 100);
        senders.take_over(record);
        senders.begin(1, None, false);
        assert_eq!(take(&mut senders, sight(2, 1.0, &short)), SamplingVerdict::Skip);
        let records: BTreeMap<_, _> = all_records(&mut senders, 2).into_iter().collect();
        assert_eq!(records.keys().map(String::as_str).collect::<Vec<_>>(), [&short, &long]);
        assert!(records[&long].is_none() && records[&short].as_ref().is_some_and(|record| record.sequence == 1));
        assert_eq!((senders.len(), senders.names), (1, short.len()));
    }

    /// What the rules say, by a list of everything that ever came: no slots, no order of what is due, no records.
    #[derive(Default)]
    struct Plain(HashMap<String, PlainSender>);

    #[derive(Clone, Copy)]
    struct PlainSender {
        seen: i64,
        copied: i64,
        size: u32,
        late: bool,
    }

    impl Plain {
        fn take(&mut self, sighting: &Sighting<'_>) -> (Option<bool>, Vec<(AdvisoryKind, String)>) {
            let mut told = self.advance(sighting.time_ns);
            let sender = sighting.sender.to_owned();
            let Some(known) = self.0.get_mut(&sender) else {
                told.push((AdvisoryKind::New, sender.clone()));
                let Sighting { time_ns, size, .. } = *sighting;
                self.0.insert(sender, PlainSender { seen: time_ns, copied: time_ns, size, late: false });
                return (Some(true), told);
            };
            if std::mem::take(&mut known.late) {
                told.push((AdvisoryKind::Recover, sender));
            }
            known.seen = sighting.time_ns;
            let since = sighting.time_ns - known.copied;
            let must = sighting.forced || since >= 100 * SECOND || known.size.abs_diff(sighting.size) >= 10;
            (if must { Some(true) } else { (since < 90 * SECOND).then_some(false) }, told)
        }

        fn copied(&mut self, sighting: &Sighting<'_>) {
            let known = self.0.get_mut(sighting.sender).unwrap();
            (known.copied, known.size) = (sighting.time_ns, sighting.size);
        }

        fn advance(&mut self, now: i64) -> Vec<(AdvisoryKind, String)> {
            let mut told = Vec::new();
            self.0.retain(|sender, known| {
                let unseen = now - known.seen;
                if unseen > 40 * SECOND && !std::mem::replace(&mut known.late, true) {
                    told.push((AdvisoryKind::Timeout, sender.clone()));
                } else if unseen <= 40 * SECOND {
                    known.late = false;
                }
                if unseen > 100 * SECOND {
                    told.push((AdvisoryKind::Expire, sender.clone()));
                }
                unseen <= 100 * SECOND
            });
            told
        }
    }

    #[test]
    fn decisions_are_those_of_the_plain_rules() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let (mut senders, mut plain) = (senders(), Plain::default());
            let (mut at, mut told, mut expect) = (0.0, Vec::new(), Vec::new());
            for seq in 1..500 {
                at += f64::from(random.random_range(0..200)) / 10.0;
                let sender = format!("n{}", random.random_range(0..12));
                let size = if random.random_ratio(1, 10) { 110 } else { 100 };
                let sighting = Sighting { size, forced: random.random_ratio(1, 30), ..sight(seq, at, &sender) };
                let (must, events) = plain.take(&sighting);
                expect.extend(events);
                let verdict = take(&mut senders, sighting);
                if let Some(must) = must {
                    assert_eq!(verdict != SamplingVerdict::Skip, must, "seed {seed}: {sighting:?}");
                }
                if verdict != SamplingVerdict::Skip {
                    plain.copied(&sighting);
                }
                if random.random_ratio(1, 2) {
                    told.extend(tell(&mut senders, seq));
                }
            }
            told.extend(tell(&mut senders, 500));
            assert_eq!(senders.outbox.dropped(), 0, "seed {seed}");
            // Of each sender in its order; of several that are due between two messages, in any.
            for number in 0..12 {
                let name = format!("n{number}");
                let ours: Vec<_> = told.iter().filter(|told| told.1 == name).map(|told| told.0).collect();
                let plain: Vec<_> = expect.iter().filter(|told| told.1 == name).map(|told| told.0).collect();
                assert_eq!(ours, plain, "seed {seed} {name}");
            }
        }
    }
}
