//! Where the target begins after a source sequence: the first message there that came from a later one.
//!
//! A mirror has the sequences of its source. Other targets have the origin of each message in its headers. Their order is that of
//! the source but for messages that were in flight together, so a binary search finds the place, and as many messages before it
//! as can be in flight are read as well. Where very many messages of others are between, the place that is found can be too early:
//! then a subscriber gets messages twice. It is never too late.

use nats_lane::{
    Error, Lane,
    jetstream::{Api, Delivery, StoredMessage, StreamInfo},
};

use crate::{
    config::{NativeKind, Replication},
    copy::{
        source::{consumers::Names, reader::scan},
        target::{
            provenance::{FeedTag, Tag},
            target_limits::limits,
        },
    },
};

/// A range that is read as a whole.
const PIECE: u64 = 256;
/// Messages of others that are passed one by one at one place of the search.
const PASSED: u64 = 64;
/// After those, so many are read together at first, and then twice as many each time.
const PASSED_TOGETHER: u64 = 4_096;
/// Messages that one search reads to pass those of others.
const MOST_PASSED: u64 = 262_144;
/// Most messages before the place that are read.
const MOST_BEFORE: u64 = 65_536;
/// Where the target begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FoundStart {
    /// Sequence at the target.
    pub(super) start: u64,
    /// Whether the target has a message from a later source sequence: then nothing changes this.
    pub(super) is_final: bool,
}

/// The source sequence of a message of the target.
enum OriginOf {
    /// The target has the sequences of the source.
    Same,
    Copy(Tag),
    /// By the header of the server, which names the feed.
    Source(FeedTag),
}

impl OriginOf {
    fn seq(&self, header: &[u8], sequence: u64) -> Option<u64> {
        match self {
            Self::Same => Some(sequence),
            Self::Copy(tag) => tag.origin(header).map(|origin| origin.seq),
            Self::Source(feed) => feed.origin(header),
        }
    }
}

/// What is at one place of the target.
enum FoundAt {
    /// The first message of ours at or after it, and its source sequence.
    Ours { seq: u64, origin: u64 },
    /// None before the end of what was searched.
    Nothing,
    /// Too many of others.
    Unknown,
}

/// One search in a target.
pub(super) struct StartSearch<'a> {
    lane: &'a mut Lane,
    replication: &'a Replication,
    info: &'a StreamInfo,
    origin: OriginOf,
    names: Names,
    /// Messages that may still be read to pass those of others.
    passable: u64,
}

impl<'a> StartSearch<'a> {
    pub(super) fn new(
        lane: &'a mut Lane,
        replication: &'a Replication,
        site: &str,
        info: &'a StreamInfo,
        prefix: &str,
    ) -> Result<Self, Error> {
        let stream = &replication.source.stream;
        let origin = match replication.native.as_ref().map(|native| native.kind) {
            Some(NativeKind::Mirror) => OriginOf::Same,
            Some(NativeKind::Source) => {
                let feed = FeedTag::of(replication, site);
                feed.check(info)?;
                OriginOf::Source(feed)
            }
            None => OriginOf::Copy(
                Tag::new(stream, site, &replication.name)
                    .with_former(&replication.former)
                    .leading(replication.provenance_first),
            ),
        };
        // One by one, as it is done without a consumer, takes too long.
        let passable = if limits(info) { MOST_PASSED } else { 0 };
        Ok(Self { lane, replication, info, origin, names: Names::new(prefix), passable })
    }

    /// The first message that came from after `position`. Everything before `from` is known to come from up to there.
    pub(super) async fn after(&mut self, position: u64, from: Option<u64>) -> Result<FoundStart, Error> {
        let (first, last) = (self.info.state.first_seq.max(1), self.info.state.last_seq);
        if matches!(self.origin, OriginOf::Same) {
            return Ok(FoundStart { start: position.min(last) + 1, is_final: position <= last });
        }
        let (mut low, mut high) = (from.unwrap_or(first).clamp(first, last + 1), last + 1);
        // Between it and `high` there is none of ours.
        let mut next_ours = high;
        while high - low > PIECE {
            let middle = low + (high - low) / 2;
            match self.ours_from(middle, high).await? {
                FoundAt::Ours { seq, origin } if origin <= position => low = seq + 1,
                FoundAt::Ours { seq, .. } => (high, next_ours) = (middle, seq),
                FoundAt::Nothing => high = middle,
                FoundAt::Unknown => (high, next_ours) = (middle, middle),
            }
        }
        let before = (self.replication.limits.messages_in_flight as u64).min(MOST_BEFORE);
        let begin = low.saturating_sub(before).max(from.unwrap_or(first)).max(first);
        let found = self.first_in(begin, high.min(last), |origin| origin > position).await?;
        let start = found.map_or(next_ours, |(seq, _)| seq);
        Ok(FoundStart { start, is_final: start <= last })
    }

    /// What is at or after a sequence and before another one.
    async fn ours_from(&mut self, from: u64, before: u64) -> Result<FoundAt, Error> {
        let mut next = from;
        for _ in 0..PASSED {
            let found = Api::new(self.lane).message_from(&self.replication.target.stream, next).await?;
            let Some(message) = found.filter(|found| found.sequence < before) else { return Ok(FoundAt::Nothing) };
            if let Some(origin) = self.origin.seq(&message.header, message.sequence) {
                return Ok(FoundAt::Ours { seq: message.sequence, origin });
            }
            next = message.sequence + 1;
        }
        // Another source of the stream can have stored as many in a row as it had.
        let mut together = PASSED_TOGETHER;
        while next < before {
            together = together.min(self.passable);
            if together == 0 {
                return Ok(FoundAt::Unknown);
            }
            self.passable -= together;
            let to = next.saturating_add(together - 1).min(before - 1);
            if let Some((seq, origin)) = self.first_in(next, to, |_| true).await? {
                return Ok(FoundAt::Ours { seq, origin });
            }
            next = to + 1;
            together *= 2;
        }
        Ok(FoundAt::Nothing)
    }

    /// The first message of ours in a range whose source sequence is one that is wanted, and that sequence.
    async fn first_in(
        &mut self,
        from: u64,
        to: u64,
        is_wanted: impl Fn(u64) -> bool,
    ) -> Result<Option<(u64, u64)>, Error> {
        if from > to {
            return Ok(None);
        }
        let Self { lane, replication, info, origin, names, .. } = self;
        let stream = &replication.target.stream;
        let mut found = None;
        let mut note = |seq: u64, header: &[u8]| {
            if found.is_none() {
                found = origin.seq(header, seq).filter(|origin| is_wanted(*origin)).map(|origin| (seq, origin));
            }
        };
        if limits(info) {
            let each =
                |delivery: &Delivery, message: &nats_lane::Message<'_>| note(delivery.stream_seq, message.header);
            scan(lane, stream, names, from, to, each).await?;
        } else {
            // A consumer would count as one that takes messages away.
            let each = |message: StoredMessage| note(message.sequence, &message.header);
            Api::new(lane).messages(stream, from, to, each).await?;
        }
        Ok(found)
    }
}
