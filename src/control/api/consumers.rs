//! The wire contract of `consumers.export` and `consumers.import`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which consumers to export. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsumersRequest {
    /// Replication id.
    pub replication: String,
    /// Names of consumers, or patterns with `*` and `?`; without, those of the document, or all durable ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub consumers: Vec<String>,
}

/// Reply of `consumers.export`: durable consumers of the source, as the target would get them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportedConsumers {
    /// Replication id.
    pub replication: String,
    /// The source stream.
    pub stream: String,
    /// The target stream.
    pub target_stream: String,
    /// The consumers.
    pub consumers: Vec<ExportedConsumer>,
}

/// One consumer of the source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ExportedConsumer {
    /// Its name.
    pub name: String,
    /// Everything up to this source sequence is acknowledged.
    pub position: u64,
    /// Sequence of the target stream that it would begin with.
    pub start: u64,
    /// Its configuration at the target; `null` with an error.
    pub config: Value,
    /// Why the target can have no such consumer.
    pub error: Option<String>,
}

/// Consumers to create at the target, from an export.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// Replication id.
    pub replication: String,
    /// The consumers.
    pub consumers: Vec<ImportedConsumer>,
}

/// One consumer to create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportedConsumer {
    /// Its name.
    pub name: String,
    /// The source sequence up to which everything is acknowledged.
    pub position: u64,
    /// Sequence of the target stream that it begins with.
    pub start: u64,
    /// Its configuration at the target.
    pub config: Value,
}

/// Reply of `consumers.import`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ImportedConsumers {
    /// Replication id.
    pub replication: String,
    /// The target stream.
    pub target_stream: String,
    /// The consumers.
    pub consumers: Vec<MovedConsumer>,
}

/// What became of one consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MovedConsumer {
    /// Its name.
    pub name: String,
    /// Everything up to this source sequence is acknowledged.
    pub position: u64,
    /// Sequence of the target stream that it begins with.
    pub start: u64,
    /// What became of it.
    pub outcome: MoveOutcome,
    /// Why it was refused, or not refreshed.
    pub reason: Option<String>,
}

/// What became of a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MoveOutcome {
    /// It is new at the target.
    Created,
    /// It begins with another message now, or has another configuration.
    Moved,
    /// It was there already.
    Current,
    /// Subscribers of the target use it: it was left as it is.
    InUse,
    /// Another program created it, or the target cannot have it.
    Refused,
    /// It is as the pass before left it, or does not exist; only in a reply of `promote`, where `position` and `start` are those of
    /// the consumer at the target, 0 if it does not exist or cannot be read.
    NotRefreshed,
}
