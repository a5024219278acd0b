//! Reads streams for [`super::find`]: messages of ours at the target, in pieces of bounded size, and which of them the
//! source has. A search keeps as many messages as can be in flight, however long the target is.

use std::{collections::HashMap, future::Future};

use nats_lane::{
    Error, Lane, Message,
    jetstream::{Api, Delivery, StoredMessage},
};

use super::{Ours, SEARCH_STEP, Sides, Witness, is_consumed, ours};
use crate::{
    copy::{
        source::{durable::Durable, locate, reader::scan},
        target::{
            mode::Foreign,
            provenance::{OtherSiteCopy, Tag},
        },
    },
    status::OnlyAtTarget,
    store::Orphans,
};

/// Bytes searched first, and messages at the least, where payloads have to be read.
const SEARCH_BYTES: u64 = 4 << 20;
const SEARCH_LEAST: u64 = 8;
/// The largest piece of the target that is searched at once.
const SEARCH_MOST: u64 = 65_536;
/// So many messages of ours at the end of the target are kept at most, unless more can be in flight.
const KEPT: usize = 262_144;

/// Everything in a range of the target beside messages of ours.
#[derive(Debug, Default)]
pub(super) struct RangeFindings {
    /// Messages of all writers.
    pub messages: u64,
    /// The newest message of another writer.
    pub foreign: Option<Foreign>,
    /// Messages that differ from ours in the site alone, if they are requested.
    pub others: Option<Vec<OtherSiteCopy>>,
}

impl RangeFindings {
    /// Notes a message of another writer.
    fn foreign(&mut self, tag: &Tag, header: &[u8], foreign: Foreign) {
        if let Some(others) = &mut self.others {
            others.extend(tag.other_site(header));
        }
        self.foreign = Some(foreign);
    }
}

/// Messages of ours at the end of the target, in target order.
#[derive(Debug)]
pub(super) struct Tail {
    /// The last one is the newest that the source has.
    pub ours: Vec<Ours>,
    /// Whether these are all that were ever stored.
    pub whole: bool,
}

/// The result of a search for the newest message of ours that the source has.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// That message, and as many before it as can matter.
    pub tail: Option<Tail>,
    /// Messages of ours after it, which the source does not have.
    pub lost: OnlyAtTarget,
}

/// Messages of ours in a range of the target.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// In target order; the newest, where there are many.
    pub ours: Vec<Ours>,
    /// Whether older ones were dropped: more than can have been stored before any that is missing.
    pub is_cut: bool,
}

/// The source's answer for several messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    /// It has this one, and none of those after it.
    At(usize),
    /// It has none of them, and no messages at their sequences.
    Nothing,
    /// It has none of them, but other messages at their sequences.
    Contradiction,
}

/// The evidence that is required to believe that a message of ours came from this source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// The source still has it.
    Message,
    /// The source has it, or all of them expired or were replaced so that nothing can be compared.
    NoContradiction,
}

impl Sides<'_> {
    /// Stored times (ms) at the source of those of these sequences that it has.
    pub(super) async fn source_times(
        &mut self,
        seqs: impl Iterator<Item = u64> + Clone,
    ) -> Result<HashMap<u64, i64>, Error> {
        let (low, high) = (seqs.clone().min().unwrap_or_default(), seqs.clone().max().unwrap_or_default());
        let high = high.min(self.source.state.last_seq);
        // `None` until it was found. Messages between the requested ones are not kept.
        let mut times: HashMap<u64, Option<i64>> = seqs.map(|seq| (seq, None)).collect();
        let mut note = |seq: u64, time_ns: i64| {
            if let Some(time) = times.get_mut(&seq) {
                *time = Some(time_ns.div_euclid(1_000_000));
            }
        };
        let Self { source_lane, target_lane, source_names, source, replication, .. } = self;
        let stream = &replication.source.stream;
        if low <= high && Durable::is_needed(source) {
            let first = source.state.first_seq.max(low);
            let each = |found: StoredMessage| note(found.sequence, found.time_ns);
            let mut api = Api::new(source_lane);
            beside(target_lane, api.messages(stream, first, high, each)).await?;
        } else if low <= high {
            let each = |delivery: &Delivery, _: &Message<'_>| note(delivery.stream_seq, delivery.time_ns);
            beside(target_lane, scan(source_lane, stream, source_names, low, high, each)).await?;
        }
        Ok(times.into_iter().filter_map(|(seq, time)| Some((seq, time?))).collect())
    }

    /// Messages of ours in a range of the target; `seen` gets the newest of another writer.
    pub(super) async fn between(&mut self, from: u64, to: u64, seen: &mut RangeFindings) -> Result<Vec<Ours>, Error> {
        let mut found = Vec::new();
        self.each_between(from, to, seen, |ours| found.push(ours)).await?;
        Ok(found)
    }

    /// The same for messages that are `wanted`; only the newest, where there are many.
    pub(super) async fn newest_between(
        &mut self,
        from: u64,
        to: u64,
        seen: &mut RangeFindings,
        wanted: impl Fn(&Ours) -> bool,
    ) -> Result<Kept, Error> {
        let (mut kept, most) = (Kept::default(), self.most_kept());
        self.each_between(from, to, seen, |ours| {
            if wanted(&ours) {
                kept.push(ours, most);
            }
        })
        .await?;
        kept.cut(most);
        Ok(kept)
    }

    fn most_kept(&self) -> usize {
        KEPT.max(self.overlap())
    }

    async fn each_between(
        &mut self,
        from: u64,
        to: u64,
        seen: &mut RangeFindings,
        mut each: impl FnMut(Ours),
    ) -> Result<(), Error> {
        let (tag, by_subject) = (self.tag, self.keeps() > 0);
        let Self { source_lane, target_lane, target_names, target, replication, .. } = self;
        let stream = &replication.target.stream;
        if is_consumed(target) {
            // A consumer would count as one that takes messages away.
            let from = from.max(target.state.first_seq);
            let look = |stored: StoredMessage| {
                seen.messages += 1;
                let subject = by_subject.then_some(stored.subject.as_bytes());
                match ours(tag, stored.sequence, &stored.header, subject) {
                    Some(ours) => each(ours),
                    None => {
                        let foreign = Foreign { seq: stored.sequence, subject: stored.subject };
                        seen.foreign(tag, &stored.header, foreign);
                    }
                }
            };
            let mut api = Api::new(target_lane);
            return beside(source_lane, api.messages(stream, from, to, look)).await;
        }
        let look = |delivery: &Delivery, message: &Message<'_>| {
            seen.messages += 1;
            let subject = by_subject.then_some(message.subject);
            match ours(tag, delivery.stream_seq, message.header, subject) {
                Some(ours) => each(ours),
                None => {
                    let subject = String::from_utf8_lossy(message.subject).into_owned();
                    seen.foreign(tag, message.header, Foreign { seq: delivery.stream_seq, subject });
                }
            }
        };
        beside(source_lane, scan(target_lane, stream, target_names, from, to, look)).await
    }

    /// The newest message of ours at the target.
    pub(super) async fn last_of_ours(&mut self) -> Result<Option<Ours>, Error> {
        Ok(self.backwards(|ours| !ours.is_empty()).await?.pop())
    }

    /// The oldest message of ours among the first of the target.
    pub(super) async fn first_of_ours(&mut self) -> Result<Option<Ours>, Error> {
        let (first, last) = (self.target.state.first_seq.max(1), self.target.state.last_seq);
        let to = last.min(first.saturating_add(SEARCH_MOST - 1));
        let mut found = None;
        if first <= to {
            self.each_between(first, to, &mut RangeFindings::default(), |ours| _ = found.get_or_insert(ours)).await?;
        }
        Ok(found)
    }

    /// All messages of ours that are `wanted` and have a greater source sequence; only the newest, where there are
    /// many.
    pub(super) async fn newest_after(&mut self, seq: u64, wanted: impl Fn(&Ours) -> bool) -> Result<Kept, Error> {
        let (overlap, most) = (self.overlap(), self.most_kept());
        let ours = self
            .backwards(|ours| {
                let before = ours.iter().filter(|message| message.origin.seq <= seq).count();
                ours.iter().filter(|message| wanted(message)).count() > most
                    || before > overlap
                    || ours.iter().any(|message| message.complete && message.origin.seq <= seq)
            })
            .await?;
        Ok(Kept::newest(ours, most, wanted))
    }

    /// Messages that are searched first: fewer where they are large and have to be read with their payloads.
    fn search_step(&self) -> u64 {
        let average = locate::average_bytes(&self.target.state).max(1);
        if is_consumed(self.target) { (SEARCH_BYTES / average).clamp(SEARCH_LEAST, SEARCH_STEP) } else { SEARCH_STEP }
    }

    /// Messages of ours from the end of the target backwards until there are enough, in target order.
    async fn backwards(&mut self, enough: impl Fn(&[Ours]) -> bool) -> Result<Vec<Ours>, Error> {
        let mut found: Vec<Ours> = Vec::new();
        let mut pieces = Pieces::of(self);
        while !enough(&found)
            && let Some((from, to)) = pieces.next()
        {
            let mut piece = self.between(from, to, &mut RangeFindings::default()).await?;
            piece.append(&mut found);
            found = piece;
        }
        Ok(found)
    }

    /// Messages of ours from the newest that the source has backwards, as many as can matter. Messages after it are
    /// counted and dropped, piece by piece: it may be all of a long target.
    pub(super) async fn newest_known(&mut self, mut proof: Proof) -> Result<Search, Error> {
        let overlap = self.overlap();
        let mut search = Search::default();
        let mut ours: Vec<Ours> = Vec::new();
        let mut pieces = Pieces::of(self);
        while let Some((from, to)) = pieces.next() {
            let mut piece = self.between(from, to, &mut RangeFindings::default()).await?;
            if ours.is_empty() && !piece.is_empty() {
                match self.newest_match(&piece).await? {
                    Match::At(index) => {
                        note(&mut search.lost, &piece[index + 1..]);
                        piece.truncate(index + 1);
                    }
                    Match::Nothing if proof == Proof::NoContradiction => {}
                    Match::Nothing | Match::Contradiction => {
                        proof = Proof::Message;
                        note(&mut search.lost, &piece);
                        // Messages older than the oldest of the source cannot match either. Its time is requested only
                        // here: on a work queue or an interest stream it comes with the whole message.
                        let oldest = self.oldest_at_source().await?;
                        if oldest.is_none_or(|oldest| piece.iter().all(|m| m.origin.time_ms < oldest)) {
                            return Ok(search);
                        }
                        piece.clear();
                    }
                }
            }
            piece.append(&mut ours);
            ours = piece;
            if ours.len() > overlap + 1 || ours.iter().any(|message| message.complete) {
                break;
            }
        }
        let whole = pieces.is_over() && pieces.first == 1;
        search.tail = (!ours.is_empty()).then_some(Tail { ours, whole });
        Ok(search)
    }

    /// Stored time (ms) of the oldest message of the source; `None` if it has none. The message that was the oldest may
    /// have expired meanwhile, which says nothing about the others.
    async fn oldest_at_source(&mut self) -> Result<Option<i64>, Error> {
        let first = self.source.state.first_seq.max(1);
        let mut oldest = self.point_at(first).await?.time_ns;
        if oldest.is_none() {
            let stream = &self.replication.source.stream;
            let next = Api::new(self.source_lane).message_from(stream, first).await?;
            oldest = next.map(|message| message.time_ns);
        }
        Ok(oldest.map(|ns| ns.div_euclid(1_000_000)))
    }

    /// The rest of a loss. A source that was restored has these messages again: they are copied already, and none of
    /// them is only at the target. The first of them shows whether that happened.
    pub(super) async fn still_lost(
        &mut self,
        orphans: Orphans,
        only: OnlyAtTarget,
    ) -> Result<(Option<Orphans>, Option<OnlyAtTarget>), Error> {
        let first = self.ours_at(only.target_from).await?;
        let is_back = match first {
            Some(first) => self.witness(first.origin).await? == Witness::Holds,
            None => false,
        };
        if !is_back {
            return Ok((Some(orphans), Some(only)));
        }
        let mut lost = OnlyAtTarget::default();
        let mut from = only.target_from;
        while from <= orphans.to {
            let to = orphans.to.min(from + SEARCH_MOST - 1);
            let mut piece = self.between(from, to, &mut RangeFindings::default()).await?;
            if let Match::At(index) = self.newest_match(&piece).await? {
                lost = OnlyAtTarget::default();
                piece.drain(..=index);
            }
            note(&mut lost, &piece);
            from = to + 1;
        }
        if lost.messages == 0 {
            return Ok((None, None));
        }
        Ok((Some(Orphans { from: lost.target_from, ..orphans }), Some(lost)))
    }

    /// The newest of these messages that the source still has.
    async fn newest_match(&mut self, ours: &[Ours]) -> Result<Match, Error> {
        let Some(newest) = ours.last() else { return Ok(Match::Nothing) };
        let known = self.witness(newest.origin).await?;
        if known == Witness::Holds {
            return Ok(Match::At(ours.len() - 1));
        }
        let times = self.source_times(ours.iter().map(|message| message.origin.seq)).await?;
        let last = self.source.state.last_seq;
        if let Some(found) = ours.iter().rposition(|m| times.get(&m.origin.seq) == Some(&m.origin.time_ms)) {
            return Ok(Match::At(found));
        }
        let broken = |m: &Ours| m.origin.seq > last || times.get(&m.origin.seq).is_some_and(|t| *t != m.origin.time_ms);
        let contradicted = known == Witness::Broken || ours.iter().any(broken);
        Ok(if contradicted { Match::Contradiction } else { Match::Nothing })
    }
}

impl Kept {
    /// The newest of the messages that are `wanted`. Others do not count: only for wanted messages it follows that
    /// older ones cannot matter.
    fn newest(mut ours: Vec<Ours>, most: usize, wanted: impl Fn(&Ours) -> bool) -> Self {
        ours.retain(wanted);
        let mut kept = Self { ours, is_cut: false };
        kept.cut(most);
        kept
    }

    /// Half as many again are dropped at once, not one by one.
    fn push(&mut self, ours: Ours, most: usize) {
        if self.ours.len() >= most + most / 2 {
            self.cut(most);
        }
        self.ours.push(ours);
    }

    fn cut(&mut self, most: usize) {
        let more = self.ours.len().saturating_sub(most);
        self.ours.drain(..more);
        self.is_cut |= more > 0;
    }
}

/// Ranges of the target from its end backwards, each larger than the one before, up to a bound.
struct Pieces {
    first: u64,
    to: u64,
    step: u64,
}

impl Pieces {
    fn of(sides: &Sides<'_>) -> Self {
        Self { first: sides.target.state.first_seq.max(1), to: sides.target.state.last_seq, step: sides.search_step() }
    }

    fn is_over(&self) -> bool {
        self.to < self.first
    }

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.is_over() {
            return None;
        }
        let (from, to) = (self.to.saturating_sub(self.step - 1).max(self.first), self.to);
        self.to = from - 1;
        self.step = (4 * self.step).min(SEARCH_MOST);
        Some((from, to))
    }
}

/// Counts copies that the source does not have.
pub(super) fn note(lost: &mut OnlyAtTarget, copies: &[Ours]) {
    for copy in copies {
        let (seq, target_seq) = (copy.origin.seq, copy.target_seq);
        if lost.messages == 0 {
            *lost = OnlyAtTarget { from: seq, to: seq, target_from: target_seq, target_to: target_seq, messages: 0 };
        }
        lost.from = lost.from.min(seq);
        lost.to = lost.to.max(seq);
        lost.target_from = lost.target_from.min(target_seq);
        lost.target_to = lost.target_to.max(target_seq);
        lost.messages += 1;
    }
}

/// Does something that may take long, and keeps the idle lane alive meanwhile: a server closes a connection that
/// does not answer its pings.
async fn beside<T>(waits: &mut Lane, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let keep = async {
        loop {
            if let Err(error) = waits.turn().await {
                return error;
            }
        }
    };
    tokio::select! {
        biased;
        result = work => result,
        error = keep => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use nats_lane::jetstream::StreamInfo;
    use serde_json::{Value, json};
    use tokio::time::Instant;

    use super::{super::ReadMessages, *};
    use crate::copy::{
        source::{
            clock::{ClockReading, SourceClock},
            consumers::Names,
        },
        target::provenance::MessageOrigin,
    };

    /// The oldest message of a source whose sequence 5 was its first when it was asked for its state.
    async fn oldest(answers: &[&Value]) -> Option<i64> {
        let (mut source, mut server) = nats_lane::pipe::lane().await;
        let (mut target, _other) = nats_lane::pipe::lane().await;
        let document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        let replication = crate::config::parse_value(&document, "SITE").unwrap();
        let stream: StreamInfo = serde_json::from_value(
            json!({"config": {}, "state": {"messages": 5, "bytes": 50, "first_seq": 5, "last_seq": 9}}),
        )
        .unwrap();
        let now = Instant::now();
        let heard = ClockReading { sent: now, received: now, server: None, local: chrono::DateTime::UNIX_EPOCH };
        let mut sides = Sides {
            replication: &replication,
            tag: &Tag::new("S", "SITE", "SITE"),
            source_lane: &mut source,
            target_lane: &mut target,
            source_names: &mut Names::new("s"),
            target_names: &mut Names::new("t"),
            source: &stream,
            clock: SourceClock::new(&heard),
            target: &stream,
            durable: None,
            acked: None,
            chain_broke_after: None,
            orphans: None,
            most_in_flight: 0,
            read: ReadMessages::default(),
        };
        let answer = async {
            for answer in answers {
                let asked = server.asked().await;
                server.answer(&asked, &answer.to_string()).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            oldest = sides.oldest_at_source() => oldest.unwrap(),
            () = answer => unreachable!(),
        }
    }

    #[tokio::test]
    async fn a_first_message_that_goes_meanwhile_is_not_the_end() {
        let stored = json!({"message": {"subject": "s", "seq": 6, "time": "1970-01-01T00:00:07.5Z"}});
        let nothing = json!({"error": {"code": 404, "err_code": 10037, "description": "no message found"}});
        assert_eq!(oldest(&[&stored]).await, Some(7_500));
        assert_eq!(oldest(&[&nothing, &stored]).await, Some(7_500));
        assert_eq!(oldest(&[&nothing, &nothing]).await, None);
    }

    #[test]
    fn what_is_not_wanted_cuts_nothing() {
        let at = |seq: u64| Ours {
            origin: MessageOrigin { seq, time_ms: 1 },
            target_seq: seq,
            complete: false,
            subject: None,
            confirmed: false,
        };
        let newest = |wanted: fn(&Ours) -> bool| {
            let Kept { ours, is_cut } = Kept::newest((1..=9).map(at).collect(), 4, wanted);
            (ours.iter().map(|message| message.origin.seq).collect::<Vec<_>>(), is_cut)
        };
        assert_eq!(newest(|_| true), (vec![6, 7, 8, 9], true));
        assert_eq!(newest(|message| message.origin.seq > 7), (vec![8, 9], false));
        assert_eq!(newest(|message| message.origin.seq > 5), (vec![6, 7, 8, 9], false));
    }
}
