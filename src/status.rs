//! What a replication says about itself: one [`Row`] per replication, the same in `replicator.status`, in
//! the position record and, as numbers, in the metrics. Field names are the wire contract.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::chance;

/// One replication as its leader sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// Replication id.
    pub replication: String,
    /// What it is doing.
    pub state: State,
    /// Where its document lives: `kv`.
    pub origin: String,
    /// Instance that runs it; `null` while nobody does.
    pub leader: Option<String>,
    /// Grows with every new holder.
    pub epoch: u64,
    /// KV revision of the document that runs.
    pub config_revision: u64,
    /// What the copy says.
    #[serde(flatten)]
    pub copy: CopyStatus,
}

/// Where a document lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// In the configuration bucket.
    Kv,
    /// In the file of the site, `serve --config`.
    File,
    /// Nowhere.
    #[default]
    None,
}

impl Origin {
    /// As on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::File => "file",
            Self::None => "none",
        }
    }
}

/// State of a replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Connecting, or finding out where to resume.
    Starting,
    /// Copying, or waiting for messages to copy.
    Running,
    /// Stopped by request, position kept.
    Paused,
    /// An error passed or is passing; the next try is scheduled.
    Retrying,
    /// Something that only people or the target can change; tried again slowly.
    Held,
    /// The document cannot run.
    Invalid,
    /// Not running here and not going to by itself.
    Stopped,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Starting, Self::Running, Self::Paused, Self::Retrying, Self::Held, Self::Invalid, Self::Stopped];
}

/// The part of a row that the copy path fills in.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CopyStatus {
    /// Source stream.
    pub source: SourceStatus,
    /// Target stream.
    pub target: TargetStatus,
    /// What is settled.
    pub position: Position,
    /// How far behind.
    pub lag: Lag,
    /// How long the source still keeps what is not copied yet; `null` where nothing lags, nothing limits the source, or
    /// it is not known.
    pub headroom: Option<Headroom>,
    /// How messages go to the target.
    pub transport: Transport,
    /// Whether others write to the target.
    pub target_mode: TargetMode,
    /// What a refusal by the target can do to the order.
    pub ordering: Ordering,
    /// Read and not settled.
    pub in_flight: InFlight,
    /// Totals since this leader began.
    pub counters: Counters,
    /// What sampling knows and tells; `null` without it.
    pub sampling: Option<SamplingStatus>,
    /// The last error, kept after it passed.
    pub last_error: Option<LastError>,
    /// Time from read to settled; a metric only.
    #[serde(skip)]
    pub processing: Histogram,
}

/// Source side of a row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SourceStatus {
    /// Stream name.
    pub stream: String,
    /// Name of the server that the lane is connected to.
    pub server: String,
    /// Whether the lane is up.
    pub connected: bool,
    /// First sequence of the stream when last asked.
    pub first_seq: u64,
    /// Last sequence of the stream when last heard.
    pub last_seq: u64,
    /// How far the clock of the server that leads the stream is ahead of the clock of the instance's host, seconds, when
    /// last asked; below 0 it is behind. Ages are measured by the server's clock. `null` where it is not known.
    pub clock_offset_seconds: Option<f64>,
}

/// Target side of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TargetStatus {
    /// Stream name.
    pub stream: String,
    /// Name of the server that the lane is connected to.
    pub server: String,
    /// Whether the lane is up.
    pub connected: bool,
    /// Last sequence of the stream that we know of.
    pub last_seq: u64,
}

/// The source sequence up to which everything is settled, and the newest message of ours at the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Position {
    /// Source sequence.
    pub source_seq: u64,
    /// Target sequence.
    pub target_seq: u64,
}

/// How far behind the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lag {
    /// Messages in scope that are not settled.
    pub messages: u64,
    /// Age of the oldest of them, seconds; 0 when there is none.
    pub seconds: f64,
}

/// How long the source still keeps the oldest message that is not copied yet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Headroom {
    /// Until the source removes it, seconds.
    pub seconds: f64,
    /// What will remove it.
    pub limit: RetentionLimit,
    /// Below this, seconds, it is low: the event `headroom-low` is told.
    pub low_below: f64,
}

/// What makes a stream remove messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RetentionLimit {
    /// `max_age`.
    Age,
    /// `max_msgs`.
    Messages,
    /// `max_bytes`.
    Bytes,
}

/// How messages go to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// ADR-50 fast-ingest batches.
    FastIngest,
    /// One publish with an ack per message, many in the air.
    #[default]
    Pipelined,
}

/// Whether others write to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TargetMode {
    /// Nobody else does.
    #[default]
    Exclusive,
    /// Somebody else may.
    Shared,
}

/// What a refusal by the target, while others are in the air, can do to the order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// The refused message comes after those that were in the air with it.
    #[default]
    Relaxed,
    /// Nothing.
    Strict,
}

/// Read and not settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct InFlight {
    /// Messages.
    pub messages: u64,
    /// Bytes of their subjects, headers and payloads.
    pub bytes: u64,
}

/// Totals since this leader began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Counters {
    /// Messages read.
    pub received: u64,
    /// Bytes of subject, headers and payload read.
    pub received_bytes: u64,
    /// Messages stored at the target.
    pub copied: u64,
    /// Bytes of those, as they were read.
    pub copied_bytes: u64,
    /// Bytes of skipped messages, as they were read.
    pub skipped_bytes: u64,
    /// Skipped by sampling.
    pub skipped_sampled: u64,
    /// Skipped because older than `max_age`.
    pub skipped_old: u64,
    /// Skipped by a filter or because they had been here before.
    pub skipped_filtered: u64,
    /// Skipped, by request or by `on_reject`, because the target can never store them.
    pub skipped_refused: u64,
    /// Descriptions of objects skipped because the target does not have all of their chunks.
    pub skipped_incomplete: u64,
    /// Published to the dead letter subject.
    pub dead_lettered: u64,
    /// Source messages that were gone before they were read.
    pub gap_messages: u64,
    /// Headers left out because the target does not allow them.
    pub headers_removed: u64,
    /// Messages that the target refused.
    pub refused: u64,
    /// Source consumers made anew after the first.
    pub consumers_recreated: u64,
    /// Runs that ended with an error.
    pub errors: u64,
    /// What was made anew to end a stall, or after an error that passes.
    pub repairs: Repairs,
}

/// What sampling knows and tells. Totals are since this leader began.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SamplingStatus {
    /// Senders that are known.
    pub senders: u64,
    /// Messages that name no sender; they are copied.
    pub without_sender: u64,
    /// Messages copied because they say so themselves.
    pub forced: u64,
    /// Advisories that were published, and confirmed if they are reliable, by event.
    pub advised: Advised,
    /// Advisories that wait to be published or confirmed.
    pub advisories_waiting: u64,
    /// Advisories that were dropped because too many waited.
    pub advisories_dropped: u64,
    /// Attempts to publish an advisory that failed, by event.
    pub advisory_errors: Advised,
    /// Records of senders written.
    pub records_written: u64,
    /// How long ago everything known of senders was written last, seconds; 0 while all of it is.
    pub write_lag_seconds: f64,
}

/// Advisories by event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Advised {
    /// Senders seen for the first time.
    pub new: u64,
    /// Senders unseen for `warn_duration`.
    pub timeout: u64,
    /// Senders seen again after that.
    pub recover: u64,
    /// Senders unseen for `inspect_duration`, and forgotten.
    pub expire: u64,
}

/// How often each step of a repair was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Repairs {
    /// The consumer at the source, inside a run.
    pub consumer: u64,
    /// Both connections, by ending the run.
    pub connections: u64,
    /// Everything, the claim of the record included.
    pub everything: u64,
}

/// The last error of a replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LastError {
    /// When it happened.
    pub at: DateTime<Utc>,
    /// What can be done about it: `retry` it passes and is tried again soon, `hold` people or the target have to change
    /// something, `superseded` another instance runs the replication, `invalid` the document cannot run.
    #[schemars(extend("enum" = Self::KINDS))]
    pub kind: String,
    /// What happened, without secrets.
    pub message: String,
    /// Source sequence of the message that can never be stored, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_seq: Option<u64>,
    /// Stored time of that message, nanoseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_time_ns: Option<i64>,
}

impl LastError {
    /// All that `kind` can be.
    pub const KINDS: [&str; 4] = ["retry", "hold", "superseded", "invalid"];

    /// One of these kinds that happens now and is about no message.
    pub fn now(kind: &str, message: &str) -> Self {
        Self {
            at: chance::now(),
            kind: kind.to_owned(),
            message: message.to_owned(),
            source_seq: None,
            source_time_ns: None,
        }
    }
}

/// Times in seconds, counted in fixed buckets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Observations per bucket of [`Histogram::BOUNDS`] (not cumulative); the last one is above all bounds.
    pub counts: [u64; Histogram::BOUNDS.len() + 1],
    /// Sum of all observations.
    pub sum: f64,
}

impl Histogram {
    /// Upper bounds, seconds.
    pub const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

    /// Counts `times` observations of `seconds`.
    pub fn observe(&mut self, seconds: f64, times: u64) {
        let bucket = Self::BOUNDS.partition_point(|bound| *bound < seconds);
        self.counts[bucket] += times;
        self.sum += seconds * times as f64;
    }
}
