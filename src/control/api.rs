//! The wire contract: what requests and replies look like, for the service and for those who ask it.

mod consumers;
mod drift;
mod letters;
mod report;
mod verify;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::{
    consumers::{
        ConsumersRequest, ExportedConsumer, ExportedConsumers, ImportRequest, ImportedConsumer, ImportedConsumers,
        MoveOutcome, MovedConsumer,
    },
    drift::{DriftClass, DriftField, DriftReport, DriftRequest, DriftRow},
    letters::{
        LetterChange, LetterDone, LetterList, LetterRefused, LetterRequest, LetterRow, LetterShown, LettersChanged,
        LettersRequest,
    },
    report::{ReplicationKind, ReportReplication, ReportRequest, ReportStream, StreamKind, StreamReport},
    verify::{VerifyRequest, VerifyShown, VerifyStarted},
};
use crate::{
    adapter::{AdapterRow, AdapterState},
    config::Problem,
    status::{Origin, Row, State},
};

/// Names one replication. The plain id, without JSON, means the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NamedRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
}

/// The replication to delete. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Keeps position and state, so that the replication resumes there when it is added again.
    #[serde(default)]
    pub keep: bool,
}

/// Which rows to show. An empty request means `{}`: all; the plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StatusRequest {
    /// Replication id, for one alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<String>,
    /// How many rows to skip at the beginning; 0 by default.
    pub offset: usize,
    /// How many rows to show at most, 1,000 by default; fewer are shown where one message does not hold them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// Which rows to show. An empty request means `{}`: all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ListRequest {
    /// How many rows to skip at the beginning; 0 by default.
    pub offset: usize,
    /// How many rows to show at most, 1,000 by default; fewer are shown where one message does not hold them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// Moves the position of a paused replication. One of `source_seq`, `time` and `ago` is needed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PositionRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// The new position: the copy continues after this source sequence. 0 is before the first message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_seq: Option<u64>,
    /// The copy continues with the first source message stored at or after this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<DateTime<Utc>>,
    /// The copy continues with the first source message stored at most this long ago by the clock of the source server, a
    /// duration such as `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ago: Option<String>,
    /// Only reports the effect, without a change.
    #[serde(default)]
    pub dry_run: bool,
}

/// Turns a mirror into a stream of its own. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PromoteRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Only reports the effect, without a change.
    #[serde(default)]
    pub dry_run: bool,
    /// Promotes also a mirror that lacks messages of its source, and with `subjects` one whose source does not answer.
    #[serde(default)]
    pub force: bool,
    /// Keeps the replication, paused; it is deleted otherwise.
    #[serde(default)]
    pub keep: bool,
    /// Subjects of the promoted stream; by default what becomes of those of the source stream.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subjects: Vec<String>,
}

/// Skips the message that blocks a replication. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SkipRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Only if this is the message that holds it, by its source sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_seq: Option<u64>,
}

/// `config.get`. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GetRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Show the document that runs: with the fields of its link, and with the names of its streams filled in.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resolved: bool,
}

/// `instances`; empty for all.
pub type InstancesRequest = ListRequest;

/// `senders`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SendersRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Only senders that match this regular expression, anywhere in their value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Only senders seen since this time (RFC 3339), or within this duration, such as `1h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Only senders that are unseen for `warn_duration`, or only the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advised: Option<bool>,
    /// Rows to skip at the beginning.
    #[serde(default)]
    pub offset: usize,
    /// Rows to show at most; 1,000 by default, fewer if they do not fit into one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// `schema`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SchemaRequest {
    /// Name of the schema, such as `status.reply`, `event/gap` or `replication`; without it the names are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A schema, or the names of all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SchemaShown {
    /// The name of the schema; of all of them where none was asked for.
    pub names: Vec<String>,
    /// The JSON schema (2020-12); only where its name was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
}

/// A change was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the document: the one that it had before an update that changed nothing, and that of its deletion
    /// after a delete; of the mark after a pause, its end or a release, 0 if there never was one.
    pub revision: u64,
}

/// Reply of `position`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PositionMove {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the position record; `null` after a dry run.
    pub revision: Option<u64>,
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Position before.
    pub from: u64,
    /// Position now, or as it would be.
    pub to: u64,
    /// Source messages between the two, filters not considered, that are copied again when the position goes back.
    pub copied_again: u64,
    /// Source messages between the two, filters not considered, that are passed over when the position goes forward.
    pub passed_over: u64,
}

/// Reply of `promote`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Promoted {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the deletion of the document; `null` where it was kept, and after a dry run.
    pub revision: Option<u64>,
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// The stream at the target.
    pub stream: String,
    /// Its subjects from now on.
    pub subjects: Vec<String>,
    /// Its last sequence, which is that of the source.
    pub last_seq: u64,
    /// Source messages that it lacks; `null` if unknown.
    pub lag: Option<u64>,
    /// The consumers that the document names, as they were moved last; empty after a dry run.
    pub consumers: Vec<MovedConsumer>,
}

/// Reply of `skip`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Skipped {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the release.
    pub revision: u64,
    /// Source sequence of the message that is skipped.
    pub source_seq: u64,
    /// Its stored time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<DateTime<Utc>>,
    /// Its subject, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// Bytes of its subject, headers and payload, where they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

/// Reply of `stepdown`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SteppedDown {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Instance that led it and was asked to hand over.
    pub from: String,
    /// Instance that leads it now; `null` if none does yet.
    pub to: Option<String>,
}

/// Names one link. The plain name, without JSON, means the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkNamed {
    /// Name of the link.
    pub link: String,
}

/// A link was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LinkChanged {
    /// Name of the link.
    pub link: String,
    /// Revision of its document, or of the deletion.
    pub revision: u64,
    /// How many documents use it.
    pub used_by: usize,
}

/// Reply of `link.validate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LinkValidation {
    /// Whether the document can be stored: no problems.
    pub valid: bool,
    /// Its problems, and those that the documents that use it would have with it: their paths begin with `/used_by/<id>`.
    pub problems: Vec<Problem>,
    /// Documents that use the link of this name, sorted.
    pub used_by: Vec<String>,
}

/// Reply of `link.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LinkShown {
    /// Name of the link.
    pub link: String,
    /// Revision of its document.
    pub revision: u64,
    /// The document as written, secrets as `***`; `null` if it is not JSON.
    pub config: Value,
    /// What is wrong with it; replications continue with what they had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// Documents that use it, sorted; the first 1,000.
    pub used_by: Vec<String>,
}

/// Reply of `link.list`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LinkList {
    /// Sorted by name.
    pub links: Vec<LinkListRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LinkListRow {
    /// Name of the link.
    pub link: String,
    /// Revision of its document.
    pub revision: u64,
    /// Whether it can be used.
    pub valid: bool,
    /// How many documents use it.
    pub used_by: usize,
}

/// Reply of `config.validate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Validation {
    /// Whether the document can run as it is: no problems.
    pub valid: bool,
    /// Problems of the document, or of both clusters with it.
    pub problems: Vec<Problem>,
    /// It may be intended, or could not be determined.
    pub warnings: Vec<Problem>,
    /// Result of checking both clusters; `null` if the document alone is wrong, and where the service is read-only:
    /// then it opens no connections on request.
    pub preflight: Option<Preflight>,
}

/// Result of checking both clusters for a document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Preflight {
    /// The source.
    pub source: PreflightSide,
    /// The target.
    pub target: PreflightSide,
}

/// Result of checking one cluster for a document.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreflightSide {
    /// Name of the server that let us in; empty if none did.
    pub server: String,
    /// Version of that server; empty if none let us in.
    pub version: String,
    /// The stream; `null` if there is none or if it could not be seen.
    pub stream: Option<PreflightStream>,
    /// The checks, in order.
    pub checks: Vec<Check>,
}

/// A stream as a preflight found it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PreflightStream {
    /// Messages stored.
    pub messages: u64,
    /// First sequence.
    pub first_seq: u64,
    /// Last sequence.
    pub last_seq: u64,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// The check: at both sides `connect`, `jetstream`, `stream`, `calls`; at the source `clock`, `filter`, `start`,
    /// `limits`, and `dead_letter` and `advisory` where these are set; at the target `publish`, `subjects`,
    /// `max_payload`, `limits`, `target_mode`, `headers`, `duplicates`, `cycle`. With kind `mirror` there are
    /// fewer, and `leafnode` at the target.
    pub name: String,
    /// Result.
    pub result: CheckResult,
    /// In words; mostly empty when all is well.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Result of a [`Check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// As it should be.
    Ok,
    /// May be meant so.
    Warning,
    /// The copy would not work, or not as the document says.
    Failed,
    /// Could not be determined, because a check before it failed or took too long.
    Unknown,
}

/// Reply of `instances`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Instances {
    /// The site's name.
    pub site: String,
    /// Sorted by name.
    pub instances: Vec<InstanceRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceRow {
    /// Its `--instance`.
    pub instance: String,
    /// Version of its program.
    pub version: String,
    /// Name of its host.
    pub host: String,
    /// When it started.
    pub started: DateTime<Utc>,
    /// Seconds since it was heard of last.
    pub silent_seconds: f64,
    /// How many replications it runs.
    pub leads: usize,
    /// Ids of these, sorted; the first 1,000.
    pub replications: Vec<String>,
}

/// Reply of `senders`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SendersPage {
    /// The site's name.
    pub site: String,
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// The time of the source server, which the times of senders are to be compared with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub now: Option<DateTime<Utc>>,
    /// Seen last comes first.
    pub senders: Vec<SenderRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// State of one sender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SenderRow {
    /// The value that messages carry.
    pub sender: String,
    /// Stored time of its newest message.
    pub seen: DateTime<Utc>,
    /// Stored time of its message that was copied last; `null` if none was.
    pub copied: Option<DateTime<Utc>>,
    /// Bytes of that message's payload; `null` if none was.
    pub size: Option<u32>,
    /// Whether it is unseen for `warn_duration` and that was published.
    pub advised: bool,
    /// Source sequence of the message that was copied last; `null` if none was.
    pub sequence: Option<u64>,
}

/// Reply of `config.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StoredDocument {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the document.
    pub revision: u64,
    /// The document, secrets as `***`; `null` if the stored value is not JSON.
    pub config: Value,
    /// Its problems, if it was written to the bucket directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Reply of `config.list`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct List {
    /// Sorted by id.
    pub replications: Vec<ListRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ListRow {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Revision of the document.
    pub revision: u64,
    /// Where the document is: `kv`, the configuration bucket, or `file`, the file of an instance, with revision 0.
    pub origin: String,
    /// State of the replication; `null` in the moment before it is known.
    pub state: Option<State>,
}

/// Reply of `status`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// The site's name.
    pub site: String,
    /// Sorted by id.
    pub replications: Vec<Row>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// Reply of `heartbeat.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HeartbeatsShown {
    /// Origin of the published heartbeats. The configuration bucket takes precedence over the file.
    pub origin: Origin,
    /// Revision of the published heartbeats; `null` if they are not from the bucket.
    pub revision: Option<u64>,
    /// The published heartbeats, secrets as `***`; `null` for none.
    pub config: Value,
    /// The content of the bucket, if it cannot be published; `null` if it can, or if there is none.
    pub rejected: Option<RejectedHeartbeats>,
}

/// Heartbeats that were written to the bucket directly, and that cannot be published.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RejectedHeartbeats {
    /// Their revision.
    pub revision: u64,
    /// As written, secrets as `***`; `null` if that is no JSON.
    pub config: Value,
    /// Their problems.
    pub problems: Vec<Problem>,
}

/// Reply of `heartbeat.set`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HeartbeatsChanged {
    /// Revision of the stored heartbeats, unchanged where they are the same; of the removal after `{}`.
    pub revision: u64,
}

/// Names one adapter. The plain name, without JSON, means the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdapterNamed {
    /// Name of the adapter.
    pub adapter: String,
}

/// Which adapters to show. An empty request means `{}`: all; the plain name, without JSON, means `{"adapter": name}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterStatusRequest {
    /// Name of the adapter, for one alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// How many rows to skip at the beginning; 0 by default.
    pub offset: usize,
    /// How many rows to show at most, 1,000 by default; fewer are shown where one message does not hold them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// Reply to a change of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterChanged {
    /// Name of the adapter.
    pub adapter: String,
    /// Revision of the document, of its deletion, or of the mark that pauses it.
    pub revision: u64,
}

/// Reply of `adapter.validate`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterValidation {
    /// Whether the document can run.
    pub valid: bool,
    /// Everything that is wrong with it.
    pub problems: Vec<Problem>,
}

/// Reply of `adapter.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterShown {
    /// Name of the adapter.
    pub adapter: String,
    /// Revision of the document.
    pub revision: u64,
    /// Where the document is: `kv`, the configuration bucket, or `file`, the file of an instance, with revision 0.
    pub origin: String,
    /// The document, secrets as `***`; `null` if the stored value is not JSON.
    pub config: Value,
    /// Its problems, if it was written to the bucket directly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Reply of `adapter.list`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterList {
    /// Sorted by name.
    pub adapters: Vec<AdapterListRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterListRow {
    /// Name of the adapter.
    pub adapter: String,
    /// Revision of the document.
    pub revision: u64,
    /// Where the document is: `kv`, the configuration bucket, or `file`, the file of an instance, with revision 0.
    pub origin: String,
    /// What it does on the instance that answers.
    pub state: AdapterState,
}

/// Reply of `adapter.status`: the numbers of the instance that answers. There are more rows if `offset` and those shown are
/// less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterStatus {
    /// The site's name.
    pub site: String,
    /// The instance that answers.
    pub instance: String,
    /// Sorted by name.
    pub adapters: Vec<AdapterRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// Body of an error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorReply {
    /// The error.
    pub error: Failure,
}

/// Error of a request; code and description are also in the headers `Nats-Service-Error-Code` and `Nats-Service-Error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{description} ({code})")]
pub struct Failure {
    /// 400 the request is wrong, 403 the service is read-only, 404 no such replication, 408 past its deadline, 409 it
    /// conflicts with the current state, 500 a bug, 503 cannot be done now, 504 not done in time: it may still happen.
    pub code: u16,
    /// One line for people.
    pub description: String,
    /// Everything that is wrong with a document.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

impl Failure {
    /// A failure without a list of problems.
    pub fn new(code: u16, description: impl Into<String>) -> Self {
        Self { code, description: description.into(), problems: Vec::new() }
    }
}
