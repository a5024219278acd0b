//! The wire contract of `report`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ListRequest;
use crate::{config::NativeKind, status::State};

/// `report`; empty for all.
pub type ReportRequest = ListRequest;

/// Reply of `report`: both streams of each replication as their servers describe them, and what feeds them. There are more
/// replications if `offset` and those shown are less than `total`; a stream may be on several pages, with the same `node`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StreamReport {
    /// The site's name.
    pub site: String,
    /// The streams of the replications shown, each once, sorted by name.
    pub streams: Vec<ReportStream>,
    /// Replications of this service, sorted by id.
    pub replications: Vec<ReportReplication>,
    /// Mirrors and sources of these streams that this service does not feed, sorted by stream.
    pub native: Vec<ReportReplication>,
    /// Replications skipped at the beginning.
    pub offset: usize,
    /// Replications shown at most.
    pub limit: usize,
    /// Replications there are.
    pub total: usize,
}

/// One stream, with the figures of `STREAM.INFO`. They are `null` where the stream was not seen: `error` says why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReportStream {
    /// Identifies the stream in this reply and on its other pages.
    pub node: String,
    /// Name of the stream.
    pub stream: String,
    /// Servers that were asked, secrets as `***`; the name of a context that could not be read.
    pub url: String,
    /// Prefix of the subjects of the JetStream API, unless it is `$JS.API`.
    pub api_prefix: Option<String>,
    /// Name of the cluster; of the server where that is in no cluster.
    pub cluster: Option<String>,
    /// JetStream domain of the server, if it has one.
    pub domain: Option<String>,
    /// Server that leads the stream.
    pub leader: Option<String>,
    /// `file` or `memory`.
    pub storage: Option<String>,
    /// How it gets its messages.
    pub kind: Option<StreamKind>,
    /// Configured replicas.
    pub replicas: Option<u64>,
    /// Consumers.
    pub consumers: Option<u64>,
    /// Messages stored.
    pub messages: Option<u64>,
    /// Bytes that they take.
    pub bytes: Option<u64>,
    /// Messages that the server found damaged on its disk.
    pub lost: Option<u64>,
    /// Sequences between the first and the last that were removed.
    pub deleted: Option<u64>,
    /// First sequence.
    pub first_seq: Option<u64>,
    /// Last sequence.
    pub last_seq: Option<u64>,
    /// Why the stream was not seen.
    pub error: Option<String>,
}

/// How a stream gets its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StreamKind {
    /// From publishers.
    Stream,
    /// It is a mirror.
    Mirror,
    /// It has sources, maybe beside publishers.
    Source,
}

/// What fills a stream from another one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ReportReplication {
    /// Replication id; `null` for a mirror or a source that this service does not feed.
    pub replication: Option<String>,
    /// The stream that is filled.
    pub stream: String,
    /// How.
    pub kind: ReplicationKind,
    /// Where the messages come from: of a replication the servers of its source, secrets as `***`; else the API prefix, `null`
    /// for the same account.
    pub from: Option<String>,
    /// The stream that the messages come from.
    pub source_stream: String,
    /// Seconds since the target's server heard of its source; of a copy whose connections are up, since the instance that
    /// runs it showed a sign of life. `null` where it is not known.
    pub active: Option<f64>,
    /// Messages that are not at the target yet; `null` where it is not known.
    pub lag: Option<u64>,
    /// State of the replication; `null` for a mirror or a source that this service does not feed.
    pub state: Option<State>,
    /// The current error.
    pub error: Option<String>,
    /// Fields in which the target differs from what it would be created with now, see `drift`; `null` where that is not known,
    /// and for a mirror or a source that this service does not feed.
    pub drift: Option<u64>,
    /// `node` of the stream that the messages come from, where it is among `streams`.
    pub source: Option<String>,
    /// `node` of the stream that is filled; `null` where the document is not valid.
    pub target: Option<String>,
}

/// How a stream is filled from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReplicationKind {
    /// This service publishes the messages.
    Copy,
    /// The stream is a mirror.
    Mirror,
    /// The stream has a source.
    Source,
}

impl From<Option<NativeKind>> for ReplicationKind {
    fn from(kind: Option<NativeKind>) -> Self {
        match kind {
            None => Self::Copy,
            Some(NativeKind::Mirror) => Self::Mirror,
            Some(NativeKind::Source) => Self::Source,
        }
    }
}
