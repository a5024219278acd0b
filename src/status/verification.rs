//! What a verification says: the record in the positions bucket, the answer of `replicator.verify.status`, and the short form in a
//! status row. Field names are the wire contract.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The comparison of both streams of one replication.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Verification {
    /// Format of the record: 1.
    pub version: u32,
    /// Identifies the job.
    pub job: String,
    /// Whether it waits, runs, or how it ended.
    pub state: VerificationState,
    /// Whether the document asked for it, by `verify.every`.
    #[serde(default)]
    pub scheduled: bool,
    /// When it was requested.
    pub requested_at: DateTime<Utc>,
    /// When it began; if the leader changed, when the present one began.
    #[serde(default)]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(default)]
    pub ended_at: Option<DateTime<Utc>>,
    /// Instance that runs it or ran it.
    #[serde(default)]
    pub instance: Option<String>,
    /// How often it began: once for each leader.
    #[serde(default)]
    pub starts: u64,
    /// First source sequence that is compared.
    #[serde(default)]
    pub from: u64,
    /// Last source sequence that is compared: at most the position that was settled when it began.
    #[serde(default)]
    pub to: u64,
    /// Part of the messages that is compared, if not all, such as `1%`.
    #[serde(default)]
    pub sample: Option<String>,
    /// Messages of the source that are read in a second, at most.
    #[serde(default)]
    pub rate: Option<u64>,
    /// Whether missing messages are copied.
    #[serde(default)]
    pub repair: bool,
    /// Source sequence up to which it has compared.
    #[serde(default)]
    pub position: u64,
    /// Messages of the source that were compared.
    #[serde(default)]
    pub source_messages: u64,
    /// Messages of the target that were read.
    #[serde(default)]
    pub target_messages: u64,
    /// Bytes of both.
    #[serde(default)]
    pub bytes: u64,
    /// How long it has read, seconds.
    #[serde(default)]
    pub seconds: f64,
    /// Unexpected differences, in messages.
    #[serde(default)]
    pub findings: u64,
    /// Unexpected differences, one entry for each kind that was found.
    #[serde(default)]
    pub differences: Vec<DifferenceSummary>,
    /// Differences with a known cause, in messages.
    #[serde(default)]
    pub expected: BTreeMap<ExpectedCause, u64>,
    /// What a repair did; `null` where none was requested.
    #[serde(default)]
    pub repaired: Option<RepairResult>,
    /// Why it failed, or while it is running why it cannot continue now.
    #[serde(default)]
    pub error: Option<String>,
    /// The result of the one before that was done.
    #[serde(default)]
    pub previous: Option<VerificationResult>,
}

/// State of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerificationState {
    /// Requested; no leader has begun it.
    Waiting,
    /// It compares.
    Running,
    /// It compared everything.
    Done,
    /// It cannot compare: see `error`.
    Failed,
    /// Ended by request.
    Cancelled,
}

impl VerificationState {
    /// Whether it has ended.
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Waiting | Self::Running)
    }
}

/// All differences of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DifferenceSummary {
    /// What differs.
    pub kind: DifferenceKind,
    /// Messages that differ.
    pub messages: u64,
    /// Where: the first ranges, of source sequences; of target sequences for `extra`.
    pub ranges: Vec<SequenceRange>,
    /// Messages in ranges that are not listed.
    pub unlisted: u64,
    /// Some of them.
    pub examples: Vec<DifferenceExample>,
}

/// What differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// The target does not have a message of the source.
    Missing,
    /// The target has a message that is no copy, or a second copy of a message.
    Extra,
    /// The payload is another one.
    Payload,
    /// A header is another one.
    Headers,
    /// The subject is not what the document makes of that of the source.
    Subject,
    /// It is stored before messages that are before it at the source, or after messages that are after it.
    Order,
}

impl DifferenceKind {
    /// As on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Payload => "payload",
            Self::Headers => "headers",
            Self::Subject => "subject",
            Self::Order => "order",
        }
    }
}

/// Sequences, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SequenceRange {
    /// First sequence.
    pub from: u64,
    /// Last sequence.
    pub to: u64,
    /// Messages of this kind in between.
    pub messages: u64,
}

/// One message that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DifferenceExample {
    /// Its source sequence, if it has one.
    pub source_seq: Option<u64>,
    /// Its target sequence, if it has one.
    pub target_seq: Option<u64>,
    /// Its subject, at the side that has it.
    pub subject: Option<String>,
    /// Description, without contents.
    pub detail: String,
}

/// A known cause of differences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExpectedCause {
    /// The target removed it, by a limit of its stream or by its time to live.
    RemovedAtTarget,
    /// The source removed it after it was copied.
    RemovedAtSource,
    /// Sampling did not copy it.
    Sampled,
    /// It is older than `max_age`.
    TooOld,
    /// It is before the configured start.
    BeforeStart,
    /// It came from the target.
    Loop,
    /// The document no longer has its subject in scope.
    OutOfScope,
    /// The target cannot store it, or it is a dead letter.
    Rejected,
    /// The description of an object whose chunks are not all at the target.
    Incomplete,
    /// Another writer stored it in a target that others may write to.
    OtherWriter,
    /// An earlier repair stored it at the end of the target.
    Repaired,
}

impl ExpectedCause {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::RemovedAtTarget => "removed at the target by its limits",
            Self::RemovedAtSource => "removed at the source after they were copied",
            Self::Sampled => "not copied by sampling",
            Self::TooOld => "older than `max_age`",
            Self::BeforeStart => "before the configured start",
            Self::Loop => "came from the target",
            Self::OutOfScope => "no longer in scope",
            Self::Rejected => "refused by the target, or dead letters",
            Self::Incomplete => "objects that are incomplete",
            Self::OtherWriter => "of other writers",
            Self::Repaired => "repaired earlier, at the end of the target",
        }
    }
}

/// What a repair did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RepairResult {
    /// Missing messages that the target has now.
    pub stored: u64,
    /// Missing messages that were left.
    pub left: u64,
    /// Why the first of those was left.
    pub reason: Option<String>,
}

/// The last verification, as a status row shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerificationSummary {
    /// State of the newest verification.
    pub state: VerificationState,
    /// The newest one that is done; `null` where none is.
    pub last: Option<VerificationResult>,
}

/// The result of a verification that is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerificationResult {
    /// When it ended.
    pub at: DateTime<Utc>,
    /// Messages of the source that were compared.
    pub messages: u64,
    /// Unexpected differences.
    pub findings: u64,
}

impl Verification {
    /// The short form.
    pub fn summary(&self) -> VerificationSummary {
        VerificationSummary { state: self.state, last: self.result() }
    }

    /// The result of the newest verification that is done.
    pub fn result(&self) -> Option<VerificationResult> {
        let own = self.ended_at.filter(|_| self.state == VerificationState::Done);
        let own = own.map(|at| VerificationResult { at, messages: self.source_messages, findings: self.findings });
        own.or_else(|| self.previous.clone())
    }

    /// One that was requested now, after another one.
    pub fn requested(job: &str, at: DateTime<Utc>, before: Option<&Self>) -> Self {
        Self {
            version: 1,
            job: job.to_owned(),
            state: VerificationState::Waiting,
            scheduled: false,
            requested_at: at,
            started_at: None,
            ended_at: None,
            instance: None,
            starts: 0,
            from: 0,
            to: 0,
            sample: None,
            rate: None,
            repair: false,
            position: 0,
            source_messages: 0,
            target_messages: 0,
            bytes: 0,
            seconds: 0.0,
            findings: 0,
            differences: Vec::new(),
            expected: BTreeMap::new(),
            repaired: None,
            error: None,
            previous: before.and_then(Self::result),
        }
    }
}
