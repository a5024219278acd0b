//! A replication as it runs: every value parsed, every default filled in, every reference resolved.

use std::{fmt, time::Duration};

use chrono::{DateTime, Utc};
use nats_lane::ServerRef;
use serde::{Deserialize, Serialize};

use super::{LoopProtection, Mapping, OriginTag, Scope, StreamPatterns, VerifySchedule};
use crate::status::Ordering;

/// One configured copy of a source stream into a target stream, valid by construction
/// (see [`super::parse`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Replication {
    /// `STREAM`, or `STREAM.NAME` when `name` is set and is not the site's name.
    pub id: String,
    /// Whether some of its fields are from a link.
    pub linked: bool,
    /// Which streams of the source have a replication each; `None` for a replication of one stream. With patterns, nothing is
    /// copied by this one: it finds the streams.
    pub patterns: Option<StreamPatterns>,
    /// The worker's name in provenance, metrics and consumer names; the site's name by default.
    pub name: String,
    /// What stood in provenance for site and name while the site had other names, oldest first.
    pub former: Vec<Former>,
    /// Free text for people.
    pub description: String,
    /// Where messages are read.
    pub source: Side,
    /// Where messages are stored.
    pub target: Side,
    /// Which subjects are copied.
    pub scope: Scope,
    /// How a source subject becomes a target subject.
    pub mapping: Mapping,
    /// Where a first start begins.
    pub start: Start,
    /// Messages stored longer ago than this are skipped and counted.
    pub max_age: Option<Duration>,
    /// As whom to stand in Choria's leader election at the source: messages are copied only while that is won. `None`:
    /// there is no such election.
    pub leader_election_name: Option<String>,
    /// Whether the durable consumer of Choria's replicator at the source is moved along with the copy.
    pub hand_back: bool,
    /// Whether a target that is created gets the subjects of the whole source, its description and its metadata.
    pub target_like_source: bool,
    /// Whether our provenance comes before that of earlier hops: Choria's replicator resumes a target-initiated copy by
    /// the first one.
    pub provenance_first: bool,
    /// Which messages of each sender are copied; `None`: all of them.
    pub sampling: Option<Sampling>,
    /// What becomes of messages that the target can never store.
    pub on_reject: OnReject,
    /// Whether a missing target stream is created.
    pub create_target: bool,
    /// Whether an existing target stream is given what it lacks for this copy.
    pub update_target: bool,
    /// Who else may write to the target.
    pub target_mode: Sharing,
    /// Action when the source lost messages that were copied.
    pub on_source_loss: OnSourceLoss,
    /// Whether a refusal by the target may change the order, where it can.
    pub ordering: Ordering,
    /// How messages that have been in the target stream before are recognised; `None`: they are copied, but for those that
    /// this replication copied itself.
    pub loop_protection: Option<LoopProtection>,
    /// Bounds on messages in flight.
    pub limits: Limits,
    /// What a document says that is accepted and changes nothing; to be logged once.
    pub notices: Vec<String>,
    /// When both streams are compared by itself; `None`: only by request.
    pub verify: Option<VerifySchedule>,
    /// Durable consumers of the source that the target gets too: names, or patterns of names.
    pub consumers: Vec<String>,
    /// How the target is fed natively, kinds `mirror` and `source`; `None` for kind `copy`.
    pub native: Option<NativeFeed>,
}

/// How the target's own server takes the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NativeKind {
    /// The target stream is a mirror: it has the sequences and stored times of its source, and nothing else.
    Mirror,
    /// The target stream has a source beside its own subjects and other sources, and sequences of its own.
    Source,
}

impl fmt::Display for NativeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mirror => "mirror",
            Self::Source => "source",
        })
    }
}

/// A target stream that is a mirror or has a source in the sense of the server, and that this program feeds.
#[derive(Debug, Clone, PartialEq)]
pub struct NativeFeed {
    /// As what the target takes the messages.
    pub kind: NativeKind,
    /// The leafnode port of the target, and as whom to connect there.
    pub leaf: ServerRef,
}

impl Replication {
    /// What the copies of this replication carry, also those that were made under former names of the site. Messages of a
    /// mirror carry nothing.
    pub fn origin_tags(&self, site: &str) -> Vec<OriginTag> {
        match self.native.as_ref().map(|native| native.kind) {
            Some(NativeKind::Mirror) => return Vec::new(),
            Some(NativeKind::Source) => {
                let former = self.former.iter().map(|former| former.site.as_str());
                let sites = std::iter::once(site).chain(former);
                return sites.map(|site| OriginTag::fed(&self.source.stream, site, &self.id)).collect();
            }
            None => {}
        }
        let tag = |site: &str, name: &str| OriginTag {
            stream: self.source.stream.clone(),
            site: site.to_owned(),
            name: Some(name.to_owned()),
            fed: None,
        };
        let former = self.former.iter().map(|former| tag(&former.site, &former.name));
        std::iter::once(tag(site, &self.name)).chain(former).collect()
    }

    /// Where to publish advisories, if that is enabled.
    pub fn advisory(&self) -> Option<&AdvisorySettings> {
        self.sampling.as_ref()?.advisory.as_ref()
    }
}

/// Site and name of a replication under a former name of the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Former {
    /// Name of the site.
    pub site: String,
    /// Name of the replication: the same, unless its document gives it one.
    pub name: String,
}

/// A stream on a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// Name of the stream.
    pub stream: String,
    /// Where it is, and as whom to connect.
    pub place: ServerRef,
}

/// Which messages of each sender are copied, and which advisories are published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sampling {
    /// Where a message says who sent it.
    pub inspect: Inspect,
    /// Each sender is copied once in this time, a tenth less for some; one that is unseen for this long is forgotten.
    pub every: Duration,
    /// A sender that is unseen for this long gets a `timeout` advisory.
    pub warn: Duration,
    /// A payload whose size differs by so many bytes from the one copied last is copied at once.
    pub size_trigger: Option<u64>,
    /// Path of a field (gjson) that has a message copied at once where it is true.
    pub force_field: Option<String>,
    /// Where to publish advisories.
    pub advisory: Option<AdvisorySettings>,
    /// How many senders are tracked.
    pub bounds: SenderBounds,
    /// Whether the rules are those of Choria's replicator: a size is compared with that of the sender's message before,
    /// copied or not; a message is forced where the force field exists; objects, arrays and numbers name senders as
    /// Choria's replicator writes them.
    pub as_choria: bool,
}

/// How many senders are tracked. Messages of others are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenderBounds {
    /// Senders.
    pub senders: usize,
    /// Bytes of their values together.
    pub bytes: usize,
}

impl Default for SenderBounds {
    /// One million senders, with values of 64 bytes on average.
    fn default() -> Self {
        Self { senders: 1_000_000, bytes: 64 << 20 }
    }
}

impl Sampling {
    /// Whether each advisory is to be confirmed.
    pub fn is_reliable(&self) -> bool {
        self.advisory.as_ref().is_some_and(|advisory| advisory.reliable)
    }
}

/// Where a message says who sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inspect {
    /// In a field of its JSON payload, by a path (gjson).
    Field(String),
    /// In a header, by its exact name.
    Header(String),
    /// In a token of its subject, counted from 1.
    Token(usize),
    /// The subject as a whole says it.
    Subject,
}

impl Inspect {
    /// Tells this way from all others, in records.
    pub fn mark(&self) -> String {
        match self {
            Self::Field(path) => format!("field {path}"),
            Self::Header(name) => format!("header {name}"),
            Self::Token(token) => format!("token {token}"),
            Self::Subject => "subject".to_owned(),
        }
    }

    /// What advisories call it.
    pub fn label(&self) -> String {
        match self {
            Self::Field(name) | Self::Header(name) => name.clone(),
            Self::Token(token) => format!("subject token {token}"),
            Self::Subject => "subject".to_owned(),
        }
    }
}

/// Where to publish advisories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdvisorySettings {
    /// Subject at the source side, with `%s` for the event and `%v` for the sender.
    pub subject: String,
    /// Whether each one is confirmed by a stream, and sent again until it is.
    pub reliable: bool,
}

/// Where a first start begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// With the first message that the source still has.
    All,
    /// With the next message that arrives.
    AtEnd,
    /// With this source sequence.
    Sequence(u64),
    /// With the first message stored within this time before the start.
    Delta(Duration),
    /// With the first message stored at or after this time.
    Time(DateTime<Utc>),
}

/// Whether other writers may publish to the target stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Exclusive until another writer is detected, then shared.
    #[default]
    Auto,
    /// No other writer: one that is detected stops the copy.
    Exclusive,
    /// Any other writer.
    Shared,
}

/// What to do when the source lost its end, or is another stream than the one that was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnSourceLoss {
    /// Continue with what the source has now.
    #[default]
    Follow,
    /// Copy nothing until the source has its end again, or the document says otherwise.
    Hold,
}

/// What becomes of a message that the target can never store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum OnReject {
    /// It blocks the replication until an operator acts.
    #[default]
    Hold,
    /// It is skipped and counted.
    Skip,
    /// It is published at the source side instead.
    DeadLetter {
        /// The subject, without wildcards.
        subject: String,
    },
}

/// Bounds on what one replication has read but not settled, and on how fast it sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Unsettled messages, 1 to 1,000,000.
    pub messages_in_flight: usize,
    /// Unsettled bytes, 64 KiB to 1 GiB. Two messages within this pass together; a larger one passes alone.
    pub bytes_in_flight: usize,
    /// Messages sent in a second, 1 to 10,000,000; `None` for no bound.
    pub messages_per_second: Option<u64>,
    /// Bytes of subjects, headers and payloads sent in a second, as they were read, 1 KiB to 10 GiB; `None` for no bound.
    pub bytes_per_second: Option<u64>,
}

impl Default for Limits {
    /// Enough for 100,000 messages/s of 1 KiB over a round trip of 80 ms; more would only wait at the target.
    fn default() -> Self {
        Self { messages_in_flight: 8_192, bytes_in_flight: 16 << 20, messages_per_second: None, bytes_per_second: None }
    }
}
