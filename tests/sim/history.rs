//! All that was ever sent and stored, and what may be said of it: every copy is judged in the moment in which the
//! target stores it, every save in the moment in which it is written.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use serde_json::Value;
use stream_replicator::store::SenderRecord;
use tokio::time::Duration;

use super::{
    plan::{Fault, Plan},
    run::LARGE,
    stream::{Ack, Stream, matches, value},
    traffic::LIFE,
    world::{Host, World},
};

const LEFT_OUT: &str = "skipped by request";

/// Sequence and stored time (ns).
type Key = (u64, i64);

/// A source message; its index is its number, in the order in which they were sent.
#[derive(Debug)]
pub struct Original {
    pub seq: u64,
    pub time_ns: i64,
    pub subject: String,
    pub payload: Vec<u8>,
    /// Header lines that its copy has to have.
    pub lines: String,
    /// Streams that were cut or recreated are others from there on.
    incarnation: u32,
    /// Whether it is to be copied at all.
    wanted: bool,
    /// Need not be copied (any more), and why.
    pub excused: Option<&'static str>,
    /// When it was lost with the end of its stream, or with all of it.
    cut: Option<Duration>,
    purged: bool,
    copies: Vec<usize>,
    /// By itself: later ones may be stored before it.
    refused: bool,
    /// Generations of its dead letters.
    letters: Vec<usize>,
    /// Its message id, by generation.
    ids: Vec<(usize, String)>,
}

/// A copy that the target stored.
#[derive(Debug)]
struct Copy {
    target_seq: u64,
    at: Duration,
    opened: Duration,
    generation: usize,
    /// When the target lost it.
    lost: Option<Duration>,
    /// The target keeps so many per subject, and has newer ones.
    replaced: bool,
}

impl Copy {
    fn is_there(&self) -> bool {
        self.lost.is_none() && !self.replaced
    }
}

/// What comes to the target.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    pub subject: &'a str,
    pub header: &'a [u8],
    pub payload: &'a [u8],
    /// When its connection was opened.
    pub opened: Duration,
    /// That its sender copies with.
    pub epoch: u64,
    pub batched: bool,
}

/// The record as it was saved last.
#[derive(Debug, Default, Clone)]
struct Saved {
    epoch: u64,
    holder: String,
    source: Value,
    target: Value,
    resets: usize,
}

pub struct History {
    world: World,
    plan: Plan,
    pub originals: Vec<Original>,
    by_key: HashMap<Key, usize>,
    /// What the source holds, by sequence.
    held: BTreeMap<u64, usize>,
    incarnation: u32,
    /// When the source lost its end last.
    cut: Option<Duration>,
    copies: Vec<Copy>,
    by_target: HashMap<u64, Vec<(usize, u64)>>,
    ids: HashMap<String, usize>,
    /// The newest that is stored, by incarnation and generation.
    newest: HashMap<(u32, usize), usize>,
    /// Moves of the position back: when, and after which sequence.
    moves: Vec<(Duration, u64)>,
    saved: Saved,
    /// The greatest epoch that somebody acted with, and who that was.
    acted: (u64, &'static str),
    /// The greatest epoch of a chained message that was stored.
    chained: u64,
    /// The position went back, after this many resets were reported: one more has to be reported by now.
    back: Option<(usize, String)>,
    /// The next save may stand anywhere: people changed the record.
    pub any_position: bool,
    /// When each sender was seen last, and when the message was stored that was copied last, by its records (ns).
    senders: HashMap<String, (i64, i64)>,
    pub told: Vec<Value>,
    /// Kinds of events that have to be reported in the end.
    pub due: Vec<&'static str>,
    pub broken: Vec<String>,
}

impl History {
    pub fn new(world: World, plan: Plan) -> Self {
        Self {
            world,
            plan,
            originals: Vec::new(),
            by_key: HashMap::new(),
            held: BTreeMap::new(),
            incarnation: 0,
            cut: None,
            copies: Vec::new(),
            by_target: HashMap::new(),
            ids: HashMap::new(),
            newest: HashMap::new(),
            moves: Vec::new(),
            saved: Saved::default(),
            acted: (0, ""),
            chained: 0,
            back: None,
            any_position: false,
            senders: HashMap::new(),
            told: Vec::new(),
            due: Vec::new(),
            broken: Vec::new(),
        }
    }

    fn breach(&mut self, what: String) {
        let at = self.world.elapsed();
        self.broken.push(format!("{at:?}: {what}"));
    }

    /// Somebody sent a message to the source. `lines` are what its copy has to have; `passed` if it came through this
    /// replication before.
    pub fn sent(&mut self, stream: &Stream, lines: &str, passed: bool) {
        let seq = stream.last;
        let message = &stream.messages[&seq];
        let wanted = !passed && self.plan.filter.as_ref().is_none_or(|filter| matches(filter, &message.subject));
        let number = self.originals.len();
        self.originals.push(Original {
            seq,
            time_ns: message.time_ns,
            subject: message.subject.clone(),
            payload: message.payload.clone(),
            lines: lines.to_owned(),
            incarnation: self.incarnation,
            wanted,
            excused: None,
            cut: None,
            purged: false,
            copies: Vec::new(),
            refused: false,
            letters: Vec::new(),
            ids: Vec::new(),
        });
        self.by_key.insert((seq, message.time_ns), number);
        self.held.insert(seq, number);
        if stream.config.per_subject.is_some() {
            self.held.retain(|seq, _| stream.messages.contains_key(seq));
        }
    }

    /// The source removed its oldest messages, as far as `first`.
    pub fn purged(&mut self, first: u64) {
        let kept = self.held.split_off(&first);
        for number in std::mem::replace(&mut self.held, kept).into_values() {
            self.originals[number].purged = true;
        }
    }

    /// Nobody was interested in what the source dropped for that.
    pub fn uninteresting(&mut self, gone: &[u64]) {
        for number in gone.iter().filter_map(|seq| self.held.remove(seq)) {
            self.originals[number].excused = Some("nobody was interested");
        }
    }

    /// The source forgets what was acknowledged: it has to be settled.
    pub fn acknowledged(&mut self, gone: &[u64]) {
        for seq in gone {
            let Some(number) = self.held.remove(seq) else {
                self.breach(format!("the source forgot {seq}, which it did not have"));
                continue;
            };
            // An ack may be on its way when the position is moved back.
            let copied = self.originals[number].copies.iter().any(|copy| self.copies[*copy].lost.is_none());
            if !copied && !self.is_done(number) {
                self.breach(format!("{seq} was acknowledged at the source before it was settled"));
            }
            self.sender_is_known(number);
        }
    }

    /// The record of its sender says that a message was seen, which is not delivered again.
    fn sender_is_known(&mut self, number: usize) {
        let Original { seq, time_ns, wanted, excused, subject, copies, .. } = &self.originals[number];
        let Some(inspect) = self.plan.inspect.filter(|_| !self.plan.records_fail()) else { return };
        // A sender that is not seen for this time is forgotten.
        let age = self.world.now_ns(Host::Source) - time_ns;
        if !wanted || excused.is_some() || age >= inspect.as_nanos() as i64 {
            return;
        }
        // That it was seen is written now and then.
        let slack = inspect.as_nanos() as i64 / 8;
        let (seen, copied) =
            self.senders.get(subject.trim_start_matches("s.")).copied().unwrap_or((i64::MIN, i64::MIN));
        // A run cannot know of what settled before it whether it was copied or a dead letter. If a copy is not in the record yet,
        // the run takes it for a dead letter: its sender was seen, and has another message copied.
        let as_seen = copies.is_empty() || self.plan.dead_letters;
        let known = if as_seen { seen.saturating_add(slack).max(copied) } else { copied };
        if known < *time_ns {
            let what = format!("{seq} was acknowledged at the source, and the record of its sender does not know it");
            self.breach(what);
        }
    }

    /// What the source has yet though it was settled a while ago and somebody takes it.
    pub fn unacknowledged(&self) -> Option<String> {
        let taken = |seq: &u64| {
            self.plan.filter.as_ref().is_none_or(|filter| matches(filter, &self.originals[self.held[seq]].subject))
        };
        let there: Vec<u64> = self.held.keys().copied().filter(taken).collect();
        let first = there.first()?;
        Some(format!("{} were never acknowledged at the source, first {first}", there.len()))
    }

    /// What is known of a sender is written: what it says was copied has to be settled.
    pub fn sender(&mut self, record: &SenderRecord) {
        let time = |time: Option<DateTime<Utc>>| time.and_then(|time| time.timestamp_nanos_opt()).unwrap_or(i64::MIN);
        let (seen, copied) = self.senders.entry(record.sender.clone()).or_insert((i64::MIN, i64::MIN));
        (*seen, *copied) = (time(Some(record.seen)).max(*seen), time(record.copied).max(*copied));
        let Some(copied) = record.copied.and_then(|time| time.timestamp_nanos_opt()) else { return };
        let of = |original: &Original| {
            original.time_ns == copied && original.subject.strip_prefix("s.") == Some(&*record.sender)
        };
        let number = self.originals.iter().position(of);
        if !number.is_some_and(|number| self.is_stored(number, Some(self.grace()))) {
            self.breach(format!("the record of sender {} says {copied} was copied, which is not there", record.sender));
        }
    }

    /// Whether another message of its sender was copied so shortly before that it is not to be.
    fn is_sampled(&self, number: usize, grace: Option<Duration>) -> bool {
        let Some(inspect) = self.plan.inspect else { return false };
        let Original { subject, time_ns, .. } = &self.originals[number];
        let from = time_ns - inspect.as_nanos() as i64;
        let before = self.originals[..number].iter().enumerate().rev();
        let mut before = before.take_while(|(_, other)| other.time_ns >= from);
        before.any(|(other, original)| original.subject == *subject && self.is_stored(other, grace))
    }

    /// Whether a message needs no copy any more; one that is too old may never have one.
    fn is_done(&mut self, number: usize) -> bool {
        let original = &self.originals[number];
        if !original.wanted || original.excused.is_some() || self.is_stored(number, Some(self.grace())) {
            return true;
        }
        if self.is_old(original) {
            self.originals[number].excused = Some("too old");
            return true;
        }
        // Newer copies that the target has just lost count as well: what was skipped for them was settled.
        self.is_replaced(number, Some(self.grace())) || self.is_sampled(number, Some(self.grace()))
    }

    /// The source lost everything after a sequence.
    pub fn cut(&mut self, keep: u64) {
        let at = self.world.elapsed();
        // A stream that keeps few messages of a subject may have none left that shows the loss, unless it is recreated.
        let tells = keep == 0 || self.plan.source_keeps.is_none() && !self.plan.is_consumed();
        if tells && self.saved.source["seq"].as_u64().is_some_and(|seq| seq > keep) && !self.plan.unsure() {
            self.due.push("source-reset");
        }
        for number in self.held.split_off(&(keep + 1)).into_values() {
            self.originals[number].cut = Some(at);
        }
        // Earlier ones count as well: their stream is another one.
        if keep == 0 {
            self.originals.iter_mut().for_each(|original| original.cut = original.cut.or(Some(at)));
        }
        self.incarnation += 1;
        self.cut = Some(at);
    }

    /// The target lost everything after a sequence.
    pub fn lost(&mut self, keep: u64) {
        let at = self.world.elapsed();
        // What others store at the lost sequences may be replaced in turn: then the copy there may have been as well.
        let tells = keep == 0 || self.plan.keeps.is_none() || self.plan.neighbour.is_empty();
        let saved = self.saved.target["seq"].as_u64().is_some_and(|seq| seq > keep);
        if tells && saved && !self.plan.unsure() {
            self.due.push("target-reset");
        }
        if saved && !tells {
            let settled = self.saved.source["seq"].as_u64().unwrap_or_default();
            for original in self.originals.iter_mut().filter(|o| o.seq <= settled && !o.copies.is_empty()) {
                original.excused = original.excused.or(Some("lost by a target that does not show it"));
            }
        }
        for copy in self.copies.iter_mut().filter(|copy| copy.target_seq > keep && copy.lost.is_none()) {
            copy.lost = Some(at);
        }
        self.newest.clear();
        for (number, original) in self.originals.iter().enumerate() {
            for copy in original.copies.iter().map(|copy| &self.copies[*copy]).filter(|copy| copy.lost.is_none()) {
                let newest = self.newest.entry((original.incarnation, copy.generation)).or_default();
                *newest = number.max(*newest);
            }
        }
    }

    /// The position was moved by request: `from` is where it stood.
    pub fn moved(&mut self, from: u64, to: u64) {
        if to < from {
            self.moves.push((self.world.elapsed(), to));
        }
        for number in
            self.held.range(..=to).filter(|(seq, _)| **seq > from).map(|(_, number)| *number).collect::<Vec<_>>()
        {
            let stored = self.is_stored(number, None);
            if !stored {
                self.originals[number].excused = Some("passed over by request");
            }
        }
    }

    /// A message is skipped by request.
    pub fn skipped(&mut self, seq: u64, time_ns: i64) {
        match self.by_key.get(&(seq, time_ns)) {
            // What is gone already is lost, whatever is asked for.
            Some(number) if self.originals[*number].purged => {}
            Some(number) => self.originals[*number].excused = Some(LEFT_OUT),
            None => self.breach(format!("asked to skip {seq} of {time_ns}, which never was")),
        }
    }

    fn generation(&self, opened: Duration) -> usize {
        self.moves.iter().filter(|(at, _)| *at <= opened).count()
    }

    /// Somebody who was granted a lease with this epoch does a step of its work.
    pub fn acts(&mut self, instance: &'static str, epoch: u64) {
        let (greatest, by) = self.acted;
        // Leases that were put back or removed say nothing of a holder that has not claimed the position yet; the claims of two
        // holders exclude each other.
        let is_forgotten = |fault| matches!(fault, Fault::LeasePutBack | Fault::BucketGone { leases: true, .. });
        if epoch == greatest && by != instance && !self.plan.has(is_forgotten) {
            self.breach(format!("`{by}` and `{instance}` both act with epoch {epoch}"));
        }
        if epoch < greatest && self.plan.is_lawful() {
            self.breach(format!("`{instance}` acts with epoch {epoch}, and `{by}` did with epoch {greatest}"));
        }
        if epoch > greatest {
            self.acted = (epoch, instance);
        }
    }

    /// The position record is gone, and its epoch with it.
    pub fn record_lost(&mut self) {
        self.saved = Saved::default();
    }

    /// Something came to the target, and this is what it did with it.
    pub fn arrived(&mut self, arrival: Arrival<'_>, result: Option<Result<Ack, u32>>) {
        let Some(number) = self.origin(arrival) else { return self.unknown(arrival) };
        match result {
            Some(Ok(ack)) if !ack.duplicate => self.stored(number, ack.seq, arrival),
            Some(Ok(_)) => {}
            // What follows in a batch is refused too.
            None | Some(Err(_)) => self.originals[number].refused |= !arrival.batched,
        }
    }

    fn unknown(&mut self, arrival: Arrival<'_>) {
        let header = String::from_utf8_lossy(arrival.header).into_owned();
        self.breach(format!("nobody sent what arrived: {header:?}"));
    }

    /// The message that a copy says it is of.
    fn origin(&self, arrival: Arrival<'_>) -> Option<usize> {
        let origin = arrival.header.rsplit(|byte| *byte == b'\n').find_map(|line| {
            let line = std::str::from_utf8(line).ok()?.trim_end().strip_prefix("Choria-SR-Source: S ")?;
            let words: Vec<&str> = line.split(' ').collect();
            let [seq, "SITE", "SITE", time_ms] = words.as_slice() else { return None };
            Some((seq.parse::<u64>().ok()?, time_ms.parse::<i64>().ok()?))
        });
        let (seq, time_ms) = origin?;
        // Recreated streams give the same sequences again.
        self.originals.iter().rposition(|o| o.seq == seq && o.time_ns.div_euclid(1_000_000) == time_ms)
    }

    /// Whether a stream that remembers ids for two minutes still remembers all of them.
    fn remembers_ids(&self) -> bool {
        self.world.elapsed() < Duration::from_secs(120) && !self.plan.has(|fault| !fault.hosts().is_empty())
    }

    /// What comes to the source is a dead letter: a message that the target can never store, with what it was about. Once
    /// a stream has it, it is settled.
    pub fn dead_letter(&mut self, arrival: Arrival<'_>, result: Option<Result<Ack, u32>>) {
        let Some(number) = self.origin(arrival) else { return self.unknown(arrival) };
        let Some(Ok(ack)) = result else { return };
        let generation = self.generation(arrival.opened);
        let original = &self.originals[number];
        let seq = original.seq;
        let (subject, error) = (value(arrival.header, "Choria-SR-Subject"), value(arrival.header, "Choria-SR-Error"));
        if !self.plan.dead_letters || original.payload.len() <= LARGE {
            self.breach(format!("{seq} is a dead letter, and the target could have stored it"));
        } else if arrival.payload != original.payload || subject.as_ref() != Some(&original.subject) || error.is_none()
        {
            self.breach(format!("the dead letter of {seq} is another message"));
        } else if !ack.duplicate && original.letters.contains(&generation) && self.remembers_ids() {
            self.breach(format!("{seq} is a dead letter twice"));
        }
        let original = &mut self.originals[number];
        original.letters.push(generation);
        original.excused = original.excused.or(Some("a dead letter"));
    }

    fn stored(&mut self, number: usize, target_seq: u64, arrival: Arrival<'_>) {
        let at = self.world.elapsed();
        let generation = self.generation(arrival.opened);
        let chained = value(arrival.header, "Nats-Expected-Last-Sequence").is_some();
        if let Err(what) = self.content(number, target_seq, generation, arrival) {
            let header = String::from_utf8_lossy(arrival.header).into_owned();
            let original = &self.originals[number];
            let what =
                format!("{what}: {header:?} of {:?} {:?} at {:?}", original.seq, original.lines, arrival.subject);
            self.breach(what);
        }
        let original = &self.originals[number];
        let seq = original.seq;
        if !original.wanted {
            self.breach(format!("{seq} was copied, which nobody asked for"));
        }
        // Messages that an older holder had in flight come before all of the newer one's or not at all: the first that does not
        // fit ends its batch, and nothing follows. Without the leases the two could take turns, and where batches are switched
        // off in flight, one that fits by itself may be among those of the newer one.
        let ends_with_batch = !self.plan.has(|fault| fault == Fault::Batches);
        if chained && arrival.epoch < self.chained && self.plan.is_lawful() && ends_with_batch {
            let (epoch, chained) = (arrival.epoch, self.chained);
            self.breach(format!("{seq} of epoch {epoch} is stored after what was chained with epoch {chained}"));
        }
        if chained {
            self.chained = self.chained.max(arrival.epoch);
        }
        let original = &self.originals[number];
        let before: Vec<usize> = original.copies.iter().copied().filter(|copy| self.copies[*copy].is_there()).collect();
        for copy in &before {
            let copy = &self.copies[*copy];
            // Copied again because people want it so.
            if self.moves.iter().any(|(moved, to)| copy.opened <= *moved && *moved <= arrival.opened && *to < seq) {
                continue;
            }
            // Of two runs, messages that the older one had in flight may arrive when the newer one has read the end: then the ids
            // have to drop them, as long as they are remembered. The chain refuses them always.
            let late =
                !chained && (arrival.opened < copy.opened || copy.opened < arrival.opened && copy.at >= arrival.opened);
            if !late {
                let what = format!(
                    "{seq} is stored twice: at {} ({:?}, connection of {:?}) and at {target_seq} (connection of {:?})",
                    copy.target_seq, copy.at, copy.opened, arrival.opened
                );
                return self.breach(what);
            }
        }
        if let Some(newer) = self.newer_of_subject(number, (!chained).then_some(arrival.opened)) {
            self.breach(format!("{seq} is after {newer} of its subject, which replaced it"));
        }
        let original = &self.originals[number];
        let is_old = self.is_old(original);
        // Skipped by a run that could not write of which sender it had copied an earlier one, which the source has forgotten.
        let new_again = self.plan.forgets_senders() || self.may_be_letter(number);
        let newest = self.newest.entry((original.incarnation, generation)).or_default();
        let first = !original.copies.iter().any(|copy| self.copies[*copy].lost.is_none());
        // The newer run does not send again, so that the ids cannot drop it, what is gone at the source, too old or passed over.
        let alone = !chained && (!self.held.contains_key(&seq) || is_old || original.excused.is_some());
        // Skipped as too old by a run that could not save that, and young again for the next one.
        let young_again = is_old && self.plan.has(Fault::sets_source_back);
        if first && !alone && !young_again && !new_again && *newest > number && (self.plan.strict || !original.refused)
        {
            let newest = self.originals[*newest].seq;
            self.breach(format!("{seq} is after {newest}, and was never refused"));
        } else {
            *newest = number.max(*newest);
        }
        self.originals[number].copies.push(self.copies.len());
        self.by_target.entry(target_seq).or_default().push((self.copies.len(), seq));
        self.copies.push(Copy { target_seq, at, opened: arrival.opened, generation, lost: None, replaced: false });
        self.replace(number);
    }

    /// Whether a message was skipped for a copy that the record of its sender does not have: if that settled before a run
    /// began, the run cannot know it from a dead letter, and copies the next message of the sender.
    fn may_be_letter(&self, number: usize) -> bool {
        let Some(inspect) = self.plan.inspect.filter(|_| self.plan.dead_letters) else { return false };
        let Original { subject, time_ns, .. } = &self.originals[number];
        let written = self.senders.get(subject.trim_start_matches("s.")).map_or(i64::MIN, |(_, copied)| *copied);
        let from = (time_ns - inspect.as_nanos() as i64).max(written.saturating_add(1));
        let before = self.originals[..number].iter().enumerate();
        let mut before = before.filter(|(_, other)| other.subject == *subject && other.time_ns >= from);
        before.any(|(other, _)| self.is_stored(other, None))
    }

    /// Copies of newer messages of the same subject that are so many that this one is no longer needed. Those that
    /// came over other connections, after the one of this message was opened at `late`, do not count: nothing but the
    /// ids, as long as they are remembered, keeps it from being stored after them.
    fn newer_of_subject(&self, number: usize, late: Option<Duration>) -> Option<u64> {
        let keep = self.plan.keeps?;
        let original = &self.originals[number];
        let newer = self.originals[number + 1..].iter().filter(|other| {
            let same = other.subject == original.subject && other.incarnation == original.incarnation;
            let counts = |copy: &Copy| copy.is_there() && late.is_none_or(|late| copy.opened == late || copy.at < late);
            same && other.cut.is_none()
                && !self.moves.iter().any(|(_, to)| *to < original.seq)
                && other.copies.iter().any(|copy| counts(&self.copies[*copy]))
        });
        newer.map(|other| other.seq).nth(keep - 1)
    }

    /// The target keeps the newest few of a subject.
    fn replace(&mut self, number: usize) {
        let Some(keep) = self.plan.keeps else { return };
        let subject = &self.originals[number].subject;
        let same = self.originals.iter().filter(|other| other.subject == *subject);
        let mut there: Vec<usize> =
            same.flat_map(|other| &other.copies).copied().filter(|copy| self.copies[*copy].is_there()).collect();
        there.sort_unstable();
        let old = there.len().saturating_sub(keep);
        there[..old].iter().for_each(|copy| self.copies[*copy].replaced = true);
    }

    /// Payload, subject and headers by the rules of the documents, written down a second time.
    fn content(
        &mut self,
        number: usize,
        target_seq: u64,
        generation: usize,
        arrival: Arrival<'_>,
    ) -> Result<(), String> {
        let original = &mut self.originals[number];
        if arrival.payload != original.payload {
            return Err("another payload".to_owned());
        }
        if arrival.subject != format!("t.{}", original.subject) {
            return Err("another subject".to_owned());
        }
        let header = std::str::from_utf8(arrival.header).map_err(|error| error.to_string())?;
        let rest = header.strip_prefix("NATS/1.0\r\n").ok_or("no version line")?;
        let (last, rest) = value_of(rest, "Nats-Expected-Last-Sequence");
        let (id, rest) = value_of(rest, "Nats-Msg-Id");
        if last.is_some_and(|last| last != (target_seq - 1).to_string()) {
            return Err("another expected sequence".to_owned());
        }
        if let Some(id) = id.filter(|id| id.len() == 32) {
            let known = original.ids.iter().find(|(of, _)| *of == generation);
            if known.is_some_and(|(_, known)| known != id) {
                return Err(format!("had id {known:?} before"));
            }
            original.ids.push((generation, id.to_owned()));
            if *self.ids.entry(id.to_owned()).or_insert(number) != number {
                return Err("an id of another message".to_owned());
            }
        } else if last.is_none() || !arrival.batched {
            return Err("no header of the replication".to_owned());
        }
        let rest = rest.strip_prefix("Nats-Expected-Stream: T\r\n").unwrap_or(rest);
        let (time_ns, time_ms) = (original.time_ns, original.time_ns.div_euclid(1_000_000));
        let lives = original.lines.contains(LIFE);
        let life = lives.then(|| value(arrival.header, "Nats-TTL").ok_or("no time to live")).transpose()?;
        let rest =
            life.as_ref().map_or(rest.to_owned(), |life| rest.replacen(&format!("Nats-TTL: {life}\r\n"), LIFE, 1));
        let expected = format!("{}Choria-SR-Source: S {} SITE SITE {time_ms}\r\n\r\n", original.lines, original.seq);
        if rest != expected {
            return Err("other headers".to_owned());
        }
        life.map_or(Ok(()), |life| self.life(time_ns, &life, arrival.opened))
    }

    /// Of an hour, what is left after the age of a message by the clock of the source: no less than when it came, no more
    /// than when the connection was opened that it came over, but for what keeps answers back.
    fn life(&self, time_ns: i64, life: &str, opened: Duration) -> Result<(), String> {
        const HOUR: i64 = 3_600;
        let life: i64 = life.parse().map_err(|_| format!("a time to live of {life:?}"))?;
        let kept_back = self.plan.kept_back();
        let left = |now_ns: i64| (HOUR - (now_ns - time_ns).max(0) / 1_000_000_000).max(1);
        let least = left(self.world.latest_ns(kept_back));
        let since = (self.world.elapsed() - opened + kept_back).as_nanos() as i64;
        let set = self.plan.has(|fault| fault.hosts().contains(&Host::Source));
        let most = if set { HOUR } else { left(self.world.now_ns(Host::Source) - since) };
        match (least..=most).contains(&life) {
            true => Ok(()),
            false => Err(format!("{life} s to live instead of {least} to {most}")),
        }
    }

    /// Whether a copy is there; what the target lost counts until `grace` after the loss.
    fn is_stored(&self, number: usize, grace: Option<Duration>) -> bool {
        let original = &self.originals[number];
        let now = self.world.elapsed();
        let since = self.moves.iter().filter(|(_, to)| *to < original.seq).map(|(at, _)| *at).max();
        original.copies.iter().map(|copy| &self.copies[*copy]).any(|copy| {
            let there = copy.lost.is_none_or(|lost| grace.is_some_and(|grace| now <= lost + grace));
            there && since.is_none_or(|since| copy.at >= since)
        })
    }

    fn is_old(&self, original: &Original) -> bool {
        let age = self.world.latest_ns(self.plan.kept_back()) - original.time_ns;
        self.plan.max_age.is_some_and(|max_age| i128::from(age) > max_age.as_nanos() as i128)
    }

    /// So many newer ones of its subject are stored that the target would keep none more.
    fn is_replaced(&self, number: usize, grace: Option<Duration>) -> bool {
        let Some(keep) = self.plan.keeps else { return false };
        let subject = &self.originals[number].subject;
        let newer = (number + 1..self.originals.len())
            .filter(|newer| self.originals[*newer].subject == *subject && self.is_stored(*newer, grace));
        newer.take(keep).count() >= keep
    }

    /// A position that goes back is reported before it is saved; the event is on its way for a moment.
    pub fn back_was_told(&mut self) {
        if let Some((resets, what)) = self.back.take()
            && resets == self.told.iter().filter(|event| is_reset(event)).count()
        {
            self.breach(what);
        }
    }

    /// Judges a record in the moment in which it is written.
    pub fn saves(&mut self, record: &[u8]) {
        self.back_was_told();
        let record: Value = serde_json::from_slice(record).expect("a record");
        let epoch = record["epoch"].as_u64().expect("an epoch");
        let holder = record["holder"].as_str().expect("a holder").to_owned();
        let resets = self.told.iter().filter(|event| is_reset(event)).count();
        let now = Saved { epoch, holder, source: record["source"].clone(), target: record["target"].clone(), resets };
        let before = std::mem::replace(&mut self.saved, now.clone());
        // A write that was on its way while the bucket was removed may find the revision that it expects in the new one.
        let removed = self.plan.has(|fault| matches!(fault, Fault::BucketGone { leases: false, .. }));
        let late = removed && self.plan.has(|fault| matches!(fault, Fault::Trouble(_)));
        if epoch < before.epoch && !late {
            self.breach(format!("epoch {epoch} saved after epoch {}", before.epoch));
        }
        if epoch == before.epoch && now.holder != before.holder {
            self.breach(format!("`{}` and `{}` hold epoch {epoch}", before.holder, now.holder));
        }
        let Some(seq) = now.source["seq"].as_u64() else { return };
        let last = before.source["seq"].as_u64().unwrap_or(0);
        // A write of unknown outcome that arrives after all is the holder's own: it writes over it what it knows.
        let late = epoch == before.epoch && self.plan.unsure();
        // With the record, the fence between two holders is gone: each writes what it knows until they meet.
        let lost = |fault| matches!(fault, Fault::RecordLost | Fault::BucketGone { leases: false, .. });
        let unfenced = self.plan.begins.len() > 1 && !self.plan.is_lawful() && self.plan.has(lost);
        if seq < last && !late && !unfenced && !std::mem::take(&mut self.any_position) {
            self.back = Some((before.resets, format!("the position goes back from {last} to {seq}, without an event")));
        }
        if now.source != before.source {
            self.source_witness(seq, &now.source);
        }
        if now.target != before.target {
            self.target_witness(&now.target);
        }
    }

    fn grace(&self) -> Duration {
        self.plan.grace()
    }

    /// The source witness is true, and all before it is settled.
    fn source_witness(&mut self, seq: u64, witness: &Value) {
        let now = self.world.elapsed();
        let recently = |cut: Option<Duration>| cut.is_none_or(|cut| now <= cut + self.grace());
        match witness["time_ns"].as_i64() {
            None if seq == 0 => return,
            None => {
                let there = self.held.get(&seq).map(|number| &self.originals[*number]);
                // Gone then, and there again in a stream recreated a moment ago.
                let anew = self.originals.iter().filter_map(|original| original.cut).max();
                if let Some(there) = there
                    && (anew.is_none() || !recently(anew))
                {
                    let what = format!("saved {witness}, but the source has {seq} of {}", there.time_ns);
                    return self.breach(what);
                }
            }
            Some(time_ns) => {
                let Some(number) = self.by_key.get(&(seq, time_ns)) else {
                    return self.breach(format!("saved {witness}, which never was"));
                };
                let cut = self.originals[*number].cut;
                if !recently(cut) {
                    return self.breach(format!("saved {witness}, which was lost at {cut:?}"));
                }
                if cut.is_some() {
                    return;
                }
            }
        }
        // A save from before the loss of the end may arrive late: it says nothing of what was stored since then.
        let late = self.cut.is_some() && recently(self.cut);
        let before = witness["time_ns"].as_i64().filter(|_| late).unwrap_or(i64::MAX);
        let settled: Vec<usize> = self.held.range(..=seq).map(|(_, number)| *number).collect();
        for number in settled {
            if self.originals[number].time_ns <= before && !self.is_done(number) {
                let Original { seq, time_ns, .. } = self.originals[number];
                return self.breach(format!("saved {witness} before {seq} of {time_ns} was settled"));
            }
        }
    }

    fn target_witness(&mut self, witness: &Value) {
        let Some(seq) = witness["seq"].as_u64() else { return };
        let source_seq = witness["source_seq"].as_u64().expect("a sequence");
        // What lies there says nothing: the position was moved.
        if source_seq == 0 {
            return;
        }
        let (now, grace) = (self.world.elapsed(), self.grace());
        let there = self.by_target.get(&seq).into_iter().flatten().any(|(copy, source)| {
            *source == source_seq && self.copies[*copy].lost.is_none_or(|lost| now <= lost + grace)
        });
        if !there {
            self.breach(format!("saved {witness}, which does not lie there"));
        }
    }

    /// What is missing, if anything is.
    pub fn missing(&self) -> Option<String> {
        let missing: Vec<usize> = self.held.values().copied().filter(|number| self.is_missing(*number)).collect();
        let first = &self.originals[*missing.first()?];
        Some(format!("{} are missing, first {} of {}", missing.len(), first.seq, first.time_ns))
    }

    /// How many may have to be copied yet: what the source has removed may have been read before.
    pub fn backlog(&self) -> usize {
        let waits = |o: &&Original| o.wanted && o.excused.is_none() && o.cut.is_none() && o.copies.is_empty();
        let unread = self.originals.iter().filter(waits).count();
        // With few messages of each subject at the target, the progress of the copy is unknown: it restarts.
        let restarts = |fault: Fault| fault.target_loses() || fault.source_changes();
        if self.plan.keeps.is_some() && self.plan.has(restarts) {
            return unread.max(self.held.len());
        }
        unread.max(self.held.values().filter(|number| self.is_missing(**number)).count())
    }

    fn is_missing(&self, number: usize) -> bool {
        let original = &self.originals[number];
        if !original.wanted || original.excused.is_some() || self.is_stored(number, None) {
            return false;
        }
        // What the target lost may be too old by now.
        let lost = self.plan.has(|fault| fault.target_loses()) && self.is_old(original);
        !lost && !self.is_replaced(number, None) && !self.is_sampled(number, None)
    }

    /// Source messages that were gone before they were copied.
    pub fn gone(&self) -> BTreeSet<u64> {
        self.gone_numbers().map(|number| self.originals[number].seq).collect()
    }

    /// Those of them that the target would not keep any more.
    pub fn gone_but_replaced(&self) -> BTreeSet<u64> {
        let replaced = self.gone_numbers().filter(|number| self.is_replaced(*number, None));
        replaced.map(|number| self.originals[number].seq).collect()
    }

    /// Source messages that are gone, and of whose copies the target has kept none: nobody can know that they were copied.
    pub fn gone_without_trace(&self) -> usize {
        let there = |o: &Original| o.copies.iter().any(|copy| self.copies[*copy].is_there());
        self.originals.iter().filter(|o| o.purged && !o.copies.is_empty() && !there(o)).count()
    }

    fn gone_numbers(&self) -> impl Iterator<Item = usize> {
        let gone = self.originals.iter().enumerate();
        gone.filter(|(_, o)| o.purged && o.copies.is_empty() && o.excused.is_none()).map(|(number, _)| number)
    }

    /// Whether a message was copied, or need not be.
    pub fn is_settled(&self, seq: u64) -> bool {
        self.originals.iter().any(|o| o.seq == seq && (!o.copies.is_empty() || o.excused.is_some()))
    }

    /// Messages that were skipped by request.
    pub fn left_out(&self) -> BTreeSet<u64> {
        self.originals.iter().filter(|o| o.excused == Some(LEFT_OUT)).map(|original| original.seq).collect()
    }

    /// A message that the source still has and that was skipped by request, without an event. Another holder may
    /// have found it too old, or replaced, before it was asked.
    pub fn left_out_untold(&self) -> Option<u64> {
        let asked = self.originals.iter().enumerate().filter(|(number, o)| {
            let asked = o.excused == Some(LEFT_OUT) && self.held.contains_key(&o.seq) && o.cut.is_none();
            asked && !self.is_old(o) && !self.is_replaced(*number, None)
        });
        let asked = asked.map(|(_, original)| original);
        let told: BTreeSet<u64> = self.events("poison").filter_map(|event| event["source_seq"].as_u64()).collect();
        asked.map(|original| original.seq).find(|seq| !told.contains(seq))
    }

    pub fn events(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.told.iter().filter(move |event| event["kind"] == kind)
    }
}

fn is_reset(event: &Value) -> bool {
    event["kind"] == "source-reset" || event["kind"] == "target-reset"
}

/// The value of the header that comes next, if it has this name, and what follows it.
fn value_of<'h>(rest: &'h str, name: &str) -> (Option<&'h str>, &'h str) {
    let line = rest.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")?.split_once("\r\n"));
    line.map_or((None, rest), |(value, rest)| (Some(value), rest))
}
