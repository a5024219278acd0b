//! The stored records of senders: which are due, their content, and records that other instances wrote or removed.
//!
//! A record keeps reliable advisories until they are confirmed, also for a sender that is forgotten: it is removed only
//! once no message of the sender can be read again.

use std::sync::Arc;

use chrono::DateTime;

use super::{
    NEVER, Round, SenderSlot, Senders,
    forgotten::{Forgotten, LastCopy},
    nanos, time,
};
use crate::{
    sampling::{
        advisory::{Advisory, AdvisoryKind},
        inspect::shortened,
    },
    store::{PendingAdvisory, SenderRecord, sender_hash_of_token},
};

/// Records to be written together.
#[derive(Debug, Default)]
pub struct Write {
    /// The content of the bucket for each sender; `None` to remove the record.
    pub records: Vec<(String, Option<SenderRecord>)>,
    /// Advisories that are stored with these records.
    kept: Vec<u64>,
}

/// Records of this instance.
impl Senders {
    /// Everything up to here has been seen, and all due records of it are written.
    pub fn written_to(&self) -> u64 {
        self.written_to
    }

    /// Whether an advisory waits only for its record to be written.
    pub fn is_urgent(&self) -> bool {
        self.rules.advises && !self.outbox.is_empty() && !(self.dirty.is_empty() && self.leaving.is_empty())
    }

    /// The next records to write, at most so many, of those due when everything up to `position` had settled;
    /// `None` when all of them are written. Messages up to `saved` are never read again: an instance that takes over
    /// reads from there, with the records alone. So until the position is saved with what the records hold, the record of
    /// a forgotten sender stays.
    pub fn next_write(&mut self, position: u64, saved: u64, most: usize) -> Option<Write> {
        if self.round.is_none() {
            let (slots, forgotten) = (std::mem::take(&mut self.dirty), std::mem::take(&mut self.leaving));
            self.round = Some(Round { position, slots, forgotten });
        }
        let mut round = self.round.take()?;
        let mut write = Write::default();
        while write.records.len() < most
            && let Some(index) = round.slots.pop()
        {
            self.compose(index, round.position, &mut write);
        }
        while write.records.len() < most
            && let Some(sender) = round.forgotten.pop()
        {
            self.compose_forgotten(&sender, (round.position, saved), &mut write);
        }
        if write.records.is_empty() {
            self.written_to = self.written_to.max(round.position);
            let forgotten = &self.forgotten;
            let is_settled =
                |sender: &mut Arc<str>| forgotten.get(sender).is_none_or(|forgotten| forgotten.read <= saved);
            self.leaving.extend(self.unsettled.extract_if(.., is_settled));
            return None;
        }
        self.round = Some(round);
        Some(write)
    }

    fn compose(&mut self, index: u32, position: u64, write: &mut Write) {
        let slot = &mut self.slots[index as usize];
        if !slot.live || !std::mem::replace(&mut slot.dirty, false) {
            return;
        }
        if slot.copied == NEVER && slot.sequence > position {
            // It is new with a message that has not settled: after a crash before that it is found new again.
            return self.touch(index);
        }
        if self.newer.contains(&*slot.name) {
            return;
        }
        slot.written = slot.seen;
        let slot = &self.slots[index as usize];
        let mut record = SenderRecord::new(&slot.name, time(slot.seen));
        record.copied = (slot.copied != NEVER).then(|| time(slot.copied));
        record.size = if self.rules.by_size_seen { slot.size_seen } else { slot.size };
        record.sequence = slot.sequence;
        for (number, advisory) in self.outbox.kept_for(&slot.name) {
            record.pending.push(pending(advisory));
            write.kept.push(number);
        }
        let waits = record.pending.iter().any(|pending| pending.event == AdvisoryKind::Timeout.name());
        record.advised = slot.late && !waits;
        if let Some(other) = self.other.get(&*slot.name) {
            record.other.clone_from(other);
        }
        write.records.push((slot.name.to_string(), Some(record)));
    }

    fn compose_forgotten(&mut self, sender: &str, (position, saved): (u64, u64), write: &mut Write) {
        let Some(forgotten) = self.forgotten.get(sender).copied() else { return };
        let (is_settled, is_back) = (forgotten.read <= saved, self.find(sender).is_some());
        if self.newer.contains(sender) || is_settled && is_back {
            self.forgotten.remove(sender);
            self.release(sender);
            return;
        }
        if !self.outbox.has(sender) || is_back {
            if is_settled {
                self.forgotten.remove(sender);
                self.release(sender);
                self.other.remove(sender);
                return write.records.push((sender.to_owned(), None));
            }
            let name = self.name(sender);
            self.unsettled.push(name);
        }
        if is_back {
            // Its record is that of a known sender, which is written once the message has settled that it came back with.
            return;
        }
        let mut record = SenderRecord::new(sender, DateTime::UNIX_EPOCH);
        (record.expired, record.sequence) = (true, forgotten.read);
        let copy = forgotten.settled_at(position);
        if copy.time != NEVER {
            (record.copied, record.size, record.copied_sequence) = (Some(time(copy.time)), copy.size, Some(copy.seq));
        }
        for (number, advisory) in self.outbox.kept_for(sender) {
            record.seen = time(advisory.seen_ns);
            record.pending.push(pending(advisory));
            write.kept.push(number);
        }
        write.records.push((sender.to_owned(), Some(record)));
    }

    /// These records are stored: their advisories can be published.
    pub fn wrote(&mut self, write: &Write) {
        self.outbox.kept(&write.kept);
    }

    /// These records may not be stored: they are written again.
    pub fn not_wrote(&mut self, write: &Write) {
        // Records of this round that are not written yet go into the next one.
        if let Some(round) = self.round.take() {
            self.dirty.extend(round.slots);
            self.leaving.extend(round.forgotten);
        }
        for (sender, _) in &write.records {
            match self.find(sender) {
                Some(index) => self.touch(index),
                None => {
                    let name = self.name(sender);
                    self.forgotten.entry(name.clone()).or_insert(Forgotten::without_messages(self.read));
                    self.leaving.push(name);
                }
            }
        }
    }

    /// All stored records are gone, but the senders are known: every record is written again.
    pub fn write_all_again(&mut self) {
        let live: Vec<u32> = (0..self.slots.len() as u32).filter(|index| self.slots[*index as usize].live).collect();
        live.into_iter().for_each(|index| self.touch(index));
        if self.begun {
            // Their advisories may not be confirmed yet.
            self.leaving.extend(self.forgotten.keys().cloned());
        }
    }
}

/// Records of other instances.
impl Senders {
    /// A load of all records begins.
    pub fn begin_load(&mut self) {
        self.load = self.load.wrapping_add(1);
    }

    /// All records have been loaded: senders that are not among them are forgotten.
    pub fn end_load(&mut self) {
        let missing =
            |(index, slot): (usize, &SenderSlot)| (slot.live && slot.loaded_in != self.load).then_some(index as u32);
        let missing: Vec<u32> = self.slots.iter().enumerate().filter_map(missing).collect();
        for index in missing {
            self.drop_slot(index);
        }
    }

    /// All records are gone: no sender is known any more.
    pub fn forget_all(&mut self) {
        self.begin_load();
        self.end_load();
        self.forgotten.clear();
        self.outbox.clear();
        self.hashed.clear();
        self.names = 0;
    }

    /// An older program stored the whole of a long value: its record is replaced by one with the present stored form.
    fn shorten(&mut self, record: &mut SenderRecord) -> bool {
        let Some(short) = shortened(&record.sender) else { return false };
        let long = std::mem::replace(&mut record.sender, short);
        let name = self.name(&long);
        self.forgotten.insert(name.clone(), Forgotten::without_messages(0));
        if self.begun {
            self.leaving.push(name);
        }
        true
    }

    /// Takes over the record of a sender that another process wrote.
    pub fn take_over(&mut self, mut record: SenderRecord) {
        if self.is_overfull(&record.sender) {
            return;
        }
        let is_shortened = self.shorten(&mut record);
        let sender = record.sender.as_str();
        if is_shortened && (record.expired || self.find(sender).is_some()) {
            return;
        }
        if record.is_newer() {
            self.newer.insert(sender.into());
        }
        self.outbox.forget(sender);
        if record.expired {
            self.take_over_expired(&record);
        } else {
            let index = self.take_over_known(&record);
            if is_shortened {
                self.touch(index);
            }
        }
        for PendingAdvisory { event, due, seen } in &record.pending {
            let kind = AdvisoryKind::ALL.into_iter().find(|kind| kind.name() == event);
            if let Some(kind) = kind {
                let (due_ns, seen_ns) = (nanos(*due), nanos(*seen));
                let sender = self.name(sender);
                self.outbox.restore(Advisory { kind, sender, due_ns, seen_ns });
            }
        }
    }

    /// Takes over what a replicator of another kind knows of a sender: of that there is no record yet.
    pub fn learn(&mut self, record: SenderRecord) {
        let sender = record.sender.clone();
        self.take_over(record);
        if let Some(index) = self.find(&sender) {
            self.touch(index);
        }
    }

    /// Another process forgot this sender, up to a source sequence; its record still keeps advisories.
    fn take_over_expired(&mut self, record: &SenderRecord) {
        let sender = record.sender.as_str();
        let copied = record.copied.zip(record.copied_sequence);
        let copy = copied.map(|(copied, seq)| LastCopy { time: nanos(copied), seq, size: record.size });
        let name = self.name(sender);
        if let Some(index) = self.find(sender) {
            self.remove(index);
        }
        self.forgotten.insert(name.clone(), Forgotten::new(record.sequence, copy.unwrap_or(LastCopy::NONE), None));
        if self.begun {
            self.leaving.push(name);
        }
    }

    /// Another process saw this sender; returns its slot.
    fn take_over_known(&mut self, record: &SenderRecord) -> u32 {
        let (sender, seen) = (record.sender.as_str(), nanos(record.seen));
        let index = match self.find(sender) {
            Some(index) => index,
            None => self.insert(sender, seen, record.sequence),
        };
        self.forgotten.remove(sender);
        self.newest.remove(&index);
        let waits = record.pending.iter().rev().find_map(|pending| match pending.event.as_str() {
            "timeout" => Some(true),
            "recover" | "new" => Some(false),
            _ => None,
        });
        let slot = &mut self.slots[index as usize];
        slot.seen = seen;
        slot.written = seen;
        slot.copied = record.copied.map_or(NEVER, nanos);
        (slot.size, slot.size_seen, slot.sequence) = (record.size, record.size, record.sequence);
        slot.late = waits.unwrap_or(record.advised);
        slot.loaded = true;
        slot.loaded_in = self.load;
        // Copies in flight were decided by the former state.
        slot.generation = slot.generation.wrapping_add(1);
        // Before that no run handles deadlines: they would pile up where another instance leads.
        if self.begun {
            self.schedule(index);
        }
        if !record.other.is_empty() {
            self.other.insert(sender.into(), record.other.clone());
        }
        index
    }

    /// Another client removed the record of a sender, named by the last part of its key.
    pub fn taken_away(&mut self, token: &str) {
        let name = match decoded(token) {
            Some(sender) => sender,
            // Too long to be in the key.
            None => match sender_hash_of_token(token).and_then(|hash| self.hashed.get(&hash)) {
                Some(name) => name.to_string(),
                None => return,
            },
        };
        let was_forgotten = self.forgotten.remove(name.as_str()).is_some();
        match self.find(&name) {
            Some(index) => self.drop_slot(index),
            None if was_forgotten => self.release(&name),
            None => {}
        }
    }

    fn drop_slot(&mut self, index: u32) {
        let name = self.slots[index as usize].name.clone();
        self.outbox.forget(&name);
        self.other.remove(&*name);
        self.newer.remove(&*name);
        self.remove(index);
        self.release(&name);
    }
}

pub(super) fn pending(advisory: &Advisory) -> PendingAdvisory {
    let (due, seen) = (time(advisory.due_ns), time(advisory.seen_ns));
    PendingAdvisory { event: advisory.kind.name().to_owned(), due, seen }
}

/// The sender of a key's part; `None` if it is too long to be in there.
fn decoded(token: &str) -> Option<String> {
    if token.contains("==") {
        return None;
    }
    let mut bytes = Vec::with_capacity(token.len());
    let mut parts = token.split('=');
    bytes.extend_from_slice(parts.next()?.as_bytes());
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}
