//! The wire contract of `verify`, `verify.status` and `verify.cancel`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::status::Verification;

/// What to compare. The plain id, without JSON, means `{"replication": id}`: everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// First source sequence to compare; the first one of the source by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Last source sequence to compare; all that are settled by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
    /// Part of the messages to compare, such as `1%`; all by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// Messages of the source that are read in a second, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Copy what is missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repair: bool,
}

/// Reply of `verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyStarted {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// KV revision of the request.
    pub revision: u64,
    /// Identifies the job.
    pub job: String,
}

/// Reply of `verify.status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyShown {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// The newest verification, as its leader saved it last; `null` where there was none.
    pub verification: Option<Verification>,
}
