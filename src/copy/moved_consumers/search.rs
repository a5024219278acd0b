//! Where the target begins after a source sequence: the first message there that came from a later one.
//!
//! A mirror has the sequences of its source. Other targets have the origin of each message in its headers. Their order is that of
//! the source but for messages that were in flight together, so a binary search finds the place, and as many messages before it
//! as can be in flight are read as well. Where messages of others lie between, the place that is found can be too early: then a
//! subscriber gets messages twice. It is never too late.

use nats_lane::{
    Error, Lane, headers,
    jetstream::{Api, Delivery, StoredMessage, StreamInfo},
};

use crate::{
    config::{NativeKind, Replication},
    copy::{
        source::{consumers::Names, reader::scan},
        target::{provenance::Tag, target_limits::limits},
    },
};

/// A range that is read as a whole.
const PIECE: u64 = 256;
/// Messages of others that are passed at one place of the search.
const PASSED: u64 = 64;
/// Most messages before the place that are read.
const MOST_BEFORE: u64 = 65_536;
/// Header that a server adds to the messages of a source.
const STREAM_SOURCE: &[u8] = b"Nats-Stream-Source";

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
    /// By the header of the server, which names the source stream.
    Source(String),
}

impl OriginOf {
    fn seq(&self, header: &[u8], sequence: u64) -> Option<u64> {
        match self {
            Self::Same => Some(sequence),
            Self::Copy(tag) => tag.origin(header).map(|origin| origin.seq),
            Self::Source(stream) => {
                let value = str::from_utf8(headers::last(header, STREAM_SOURCE)?).ok()?;
                let mut words = value.split(' ');
                // A stream of another account has a hash after its name.
                let name = words.next()?.split(':').next()?;
                words.next()?.parse().ok().filter(|_| name == stream)
            }
        }
    }
}

/// One search in a target.
pub(super) struct StartSearch<'a> {
    lane: &'a mut Lane,
    replication: &'a Replication,
    info: &'a StreamInfo,
    origin: OriginOf,
    names: Names,
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
                let sources = info.config["sources"].as_array().into_iter().flatten();
                if sources.filter(|source| source["name"] == stream.as_str()).count() > 1 {
                    return Err(Error::hold(format!(
                        "the stream has several sources `{stream}`: which messages are from which is not known"
                    )));
                }
                OriginOf::Source(stream.clone())
            }
            None => OriginOf::Copy(
                Tag::new(stream, site, &replication.name)
                    .with_former(&replication.former)
                    .leading(replication.provenance_first),
            ),
        };
        Ok(Self { lane, replication, info, origin, names: Names::new(prefix) })
    }

    /// The first message that came from after `position`. Everything before `from` is known to come from up to there.
    pub(super) async fn after(&mut self, position: u64, from: Option<u64>) -> Result<FoundStart, Error> {
        let (first, last) = (self.info.state.first_seq.max(1), self.info.state.last_seq);
        if matches!(self.origin, OriginOf::Same) {
            return Ok(FoundStart { start: position.min(last) + 1, is_final: position <= last });
        }
        let (mut low, mut high) = (from.unwrap_or(first).clamp(first, last + 1), last + 1);
        while high - low > PIECE {
            let middle = low + (high - low) / 2;
            match self.ours_from(middle, high).await? {
                Some((seq, origin)) if origin <= position => low = seq + 1,
                _ => high = middle,
            }
        }
        let before = (self.replication.limits.messages_in_flight as u64).min(MOST_BEFORE);
        let begin = low.saturating_sub(before).max(from.unwrap_or(first)).max(first);
        let found = self.first_in(begin, high.min(last), position).await?;
        let start = found.unwrap_or(high);
        Ok(FoundStart { start, is_final: start <= last })
    }

    /// The first message of ours at or after a sequence and before another one, if it is near.
    async fn ours_from(&mut self, from: u64, before: u64) -> Result<Option<(u64, u64)>, Error> {
        let mut next = from;
        for _ in 0..PASSED {
            let found = Api::new(self.lane).message_from(&self.replication.target.stream, next).await?;
            let Some(message) = found.filter(|found| found.sequence < before) else { return Ok(None) };
            if let Some(origin) = self.origin.seq(&message.header, message.sequence) {
                return Ok(Some((message.sequence, origin)));
            }
            next = message.sequence + 1;
        }
        Ok(None)
    }

    /// The first message of a range that came from after the position.
    async fn first_in(&mut self, from: u64, to: u64, position: u64) -> Result<Option<u64>, Error> {
        if from > to {
            return Ok(None);
        }
        let Self { lane, replication, info, origin, names } = self;
        let stream = &replication.target.stream;
        let mut found = None;
        let mut note = |seq: u64, header: &[u8]| {
            if found.is_none() && origin.seq(header, seq).is_some_and(|origin| origin > position) {
                found = Some(seq);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_s_header_names_the_origin() {
        let check = |value: &str, expect: Option<u64>| {
            let header = format!("NATS/1.0\r\nNats-Stream-Source: {value}\r\n\r\n");
            let origin = OriginOf::Source("ORDERS".to_owned());
            assert_eq!(origin.seq(header.as_bytes(), 3), expect, "{value}");
        };
        check("ORDERS 12 > > orders.1", Some(12));
        check("ORDERS:aB3x 12 > > orders.1", Some(12));
        check("OTHER 12 > > orders.1", None);
        check("ORDERS x", None);
        check("ORDERS", None);
    }
}
