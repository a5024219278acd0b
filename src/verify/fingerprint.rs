//! What is compared of a message: fingerprints of its subject, its headers and its payload, in a form that is the same for a message
//! and for its copy. Pure.
//!
//! | kind | headers that are not compared, because they are not the source's |
//! |---|---|
//! | `copy` | what the copy adds (id, expected sequences, our provenance), and `Nats-TTL` and `Nats-Rollup`, whose value depends on the time and on both streams |
//! | `source` | what the target's server adds (`Nats-Stream-Source`) or removes (`Nats-Expected-*`, `Nats-Batch-*`) |
//! | `mirror` | `Nats-Expected-*`, `Nats-Batch-*`, which servers remove |

use nats_lane::{
    Error, Message, headers,
    jetstream::{Delivery, StoredMessage, StreamInfo},
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    config::{NativeKind, Replication},
    copy::target::{
        headers::{Allowed, Passage, Stamp, header_block},
        provenance::{FeedTag, MessageOrigin, Tag},
    },
    names,
};

/// Contents of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub subject: u64,
    pub headers: u64,
    pub payload: u64,
}

/// One message of the source, as its copy should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceMark {
    pub seq: u64,
    pub time_ns: i64,
    pub content: Fingerprint,
}

/// One copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TargetMark {
    /// Source sequence.
    pub seq: u64,
    /// Stored time at the source, where the copy says it.
    pub time: Option<CopyTime>,
    pub target_seq: u64,
    /// A repair or the replay of a dead letter stored it, after newer ones.
    pub repaired: bool,
    pub content: Fingerprint,
}

/// A stored time as a copy carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyTime {
    Ms(i64),
    Ns(i64),
}

impl CopyTime {
    /// Whether a message that was stored then can be the original.
    pub fn fits(self, time_ns: i64) -> bool {
        match self {
            Self::Ms(ms) => time_ns.div_euclid(1_000_000) == ms,
            Self::Ns(ns) => time_ns == ns,
        }
    }
}

/// Takes fingerprints of the messages of one replication.
#[derive(Debug)]
pub(super) struct Fingerprints {
    replication: Replication,
    tag: Tag,
    /// What a native source took over the feed of this replication.
    feed: FeedTag,
    block: Vec<u8>,
    room: Vec<u8>,
}

impl Fingerprints {
    pub fn new(replication: &Replication, site: &str) -> Self {
        let tag = Tag::new(&replication.source.stream, site, &replication.name)
            .with_former(&replication.former)
            .leading(replication.provenance_first);
        let feed = FeedTag::of(replication, site);
        Self { replication: replication.clone(), tag, feed, block: Vec::new(), room: Vec::new() }
    }

    /// An error where the messages of the target do not show from which source they are.
    pub fn check_target(&self, target: &StreamInfo) -> Result<(), Error> {
        if self.kind() == Some(NativeKind::Source) { self.feed.check(target) } else { Ok(()) }
    }

    /// A message of the source.
    pub fn of_source(&mut self, delivery: &Delivery, message: &Message<'_>) -> SourceMark {
        let subject = xxh3_64(self.replication.mapping.apply(message.subject, &mut self.room));
        let headers = match self.kind() {
            Some(_) => self.native_headers(message.header),
            None if message.header.is_empty() => self.hash_lines(b"", &[]),
            None => {
                let mut block = std::mem::take(&mut self.block);
                let origin = MessageOrigin { seq: delivery.stream_seq, time_ms: 0 };
                let stamp = Stamp { chain: None, id: None };
                let passage = Passage { origin, age_secs: 0, stamp, expected_stream: None };
                header_block(&mut block, message.header, Allowed::default(), &self.tag, &passage);
                let hash = self.copied_headers(&block, 1);
                self.block = block;
                hash
            }
        };
        let content = Fingerprint { subject, headers, payload: xxh3_64(message.payload) };
        SourceMark { seq: delivery.stream_seq, time_ns: delivery.time_ns, content }
    }

    /// A copy; `None` for a message that is none.
    pub fn of_target(&mut self, delivery: &Delivery, message: &Message<'_>) -> Option<TargetMark> {
        let (seq, time, repaired) = self.origin(delivery, message.header)?;
        let headers = match self.kind() {
            Some(_) => self.native_headers(message.header),
            None => self.copied_headers(message.header, if repaired { 2 } else { 1 }),
        };
        let content = Fingerprint { subject: xxh3_64(message.subject), headers, payload: xxh3_64(message.payload) };
        Some(TargetMark { seq, time, target_seq: delivery.stream_seq, repaired, content })
    }

    /// The source message that a message of the target is a copy of, and whether a repair stored it.
    pub fn origin(&self, delivery: &Delivery, header: &[u8]) -> Option<(u64, Option<CopyTime>, bool)> {
        match self.kind() {
            Some(NativeKind::Mirror) => Some((delivery.stream_seq, Some(CopyTime::Ns(delivery.time_ns)), false)),
            Some(NativeKind::Source) => self.feed.origin(header).map(|seq| (seq, None, false)),
            None => {
                let ours = |origin: MessageOrigin| (origin.seq, Some(CopyTime::Ms(origin.time_ms)));
                if let Some((seq, time)) = self.tag.origin(header).map(ours) {
                    return Some((seq, time, false));
                }
                let (seq, time) = self.tag.origin_of_later(header).map(ours)?;
                Some((seq, time, true))
            }
        }
    }

    /// The source sequence of a stored message that is a copy.
    pub fn origin_of_stored(&self, message: &StoredMessage) -> Option<u64> {
        let StoredMessage { sequence, time_ns, header, .. } = message;
        let delivery = Delivery { stream_seq: *sequence, consumer_seq: 1, time_ns: *time_ns, pending: 0 };
        self.origin(&delivery, header).map(|(seq, ..)| seq)
    }

    /// Whether a stored message of the target is a copy of a message of the source.
    pub fn is_copy(&self, stored: &StoredMessage, original: &StoredMessage) -> bool {
        let StoredMessage { sequence, time_ns, header, .. } = stored;
        let delivery = Delivery { stream_seq: *sequence, consumer_seq: 1, time_ns: *time_ns, pending: 0 };
        let origin = self.origin(&delivery, header);
        origin.is_some_and(|(seq, time, _)| {
            seq == original.sequence && time.is_none_or(|time| time.fits(original.time_ns))
        })
    }

    /// The headers of the message that was taken last, one a line, as they are compared.
    pub fn lines(&self) -> Vec<u8> {
        self.room.clone()
    }

    fn kind(&self) -> Option<NativeKind> {
        self.replication.native.as_ref().map(|native| native.kind)
    }

    /// Headers of a copy, without those of the copy itself. `hops` of its provenance are ours.
    fn copied_headers(&mut self, block: &[u8], hops: usize) -> u64 {
        const OWN: &[&[u8]] = &[b"Nats-Msg-Id:", b"Nats-Expected-", b"Nats-TTL:", b"Nats-Rollup:"];
        let leads = self.tag.leads();
        let is_hop = |line: &[u8]| headers::value_of(line, names::SOURCE_HEADER.as_bytes()).is_some();
        let all = headers::lines(block).filter(|line| is_hop(line)).count();
        let ours = if leads { 0..hops } else { all.saturating_sub(hops)..all };
        let mut hop = 0;
        self.room.clear();
        self.room.extend_from_slice(version(block));
        for line in headers::lines(block) {
            if is_hop(line) {
                hop += 1;
                if ours.contains(&(hop - 1)) {
                    continue;
                }
            }
            if OWN.iter().any(|own| line.starts_with(own)) {
                continue;
            }
            self.room.push(b'\n');
            self.room.extend_from_slice(line);
        }
        xxh3_64(&self.room)
    }

    fn native_headers(&mut self, block: &[u8]) -> u64 {
        let is_source = self.kind() == Some(NativeKind::Source);
        if !is_source {
            return self.hash_lines(block, &[b"Nats-Expected-", b"Nats-Batch-"]);
        }
        self.room.clear();
        self.room.extend_from_slice(version(block));
        for line in headers::lines(block) {
            // The feed renames that of an earlier hop.
            let dropped: [&[u8]; 4] =
                [b"Nats-Expected-", b"Nats-Batch-", b"Nats-Stream-Source:", b"Choria-SR-Nats-Stream-Source:"];
            if dropped.iter().any(|name| line.starts_with(name)) {
                continue;
            }
            self.room.push(b'\n');
            // The feed renames ids: the target's server would drop a message by them.
            match line.strip_prefix(b"Nats-Msg-Id:") {
                Some(value) => {
                    self.room.extend_from_slice(names::ORIGINAL_ID_HEADER.as_bytes());
                    self.room.push(b':');
                    self.room.extend_from_slice(value);
                }
                None => self.room.extend_from_slice(line),
            }
        }
        xxh3_64(&self.room)
    }

    fn hash_lines(&mut self, block: &[u8], dropped: &[&[u8]]) -> u64 {
        self.room.clear();
        self.room.extend_from_slice(version(block));
        for line in headers::lines(block).filter(|line| !dropped.iter().any(|name| line.starts_with(name))) {
            self.room.push(b'\n');
            self.room.extend_from_slice(line);
        }
        xxh3_64(&self.room)
    }
}

/// The first line where it says more than the version.
fn version(block: &[u8]) -> &[u8] {
    let first = headers::lines_of(block).next().unwrap_or_default().trim_ascii_end();
    if first == headers::VERSION.trim_ascii_end() { b"" } else { first }
}
