//! The wire contract of `drift`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ReplicationKind;

/// Which replications to compare; empty for all. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DriftRequest {
    /// Replication id, or a pattern of ids with `*` and `?`; all without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<String>,
    /// Applies the safe changes where the document has `target_update`.
    pub fix: bool,
    /// How many rows to skip at the beginning; 0 by default.
    pub offset: usize,
    /// How many rows to show at most, 1,000 by default; fewer are shown where one message does not hold them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// Reply of `drift`: how the target streams differ from what they would be created with now. There are more rows if `offset`
/// and those shown are less than `total`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriftReport {
    /// The site's name.
    pub site: String,
    /// The replications, sorted by id.
    pub replications: Vec<DriftRow>,
    /// Rows skipped at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One replication.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriftRow {
    /// Replication id.
    pub replication: String,
    /// How the target is filled.
    pub kind: ReplicationKind,
    /// The source stream.
    pub source_stream: String,
    /// The target stream.
    pub target_stream: String,
    /// Fields that are `safe` or `unsafe` and not fixed; `null` where the streams were not compared: `error` says why.
    pub drift: Option<u64>,
    /// The fields that differ.
    pub fields: Vec<DriftField>,
    /// Why `fix` does not apply the safe changes; `null` where it does.
    pub not_fixed: Option<String>,
    /// Why the streams were not compared.
    pub error: Option<String>,
}

/// One field that differs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DriftField {
    /// Name of the field in the configuration of the stream.
    pub field: String,
    /// Name of the setting of the key-value bucket or object store, where it has another one.
    pub setting: Option<String>,
    /// What can be done.
    pub class: DriftClass,
    /// Value at the source; `null` for none.
    pub source: Value,
    /// Value at the target; with `fixed`, the one before; `null` for none.
    pub target: Value,
    /// Value that the target would be created with; `null` for none, or where it is not known.
    pub wanted: Value,
    /// Why it differs, or why it is not changed.
    pub reason: String,
    /// Whether this request changed it.
    pub fixed: bool,
    /// Why the change failed.
    pub failed: Option<String>,
}

/// What can be done about a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriftClass {
    /// `fix` changes it where the document has `target_update`: no stored message is affected, and none is refused.
    Safe,
    /// An operator has to decide.
    Unsafe,
    /// It differs on purpose, and is no drift.
    Expected,
}
