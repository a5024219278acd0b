//! The wire contract of `verify`, `verify.status` and `verify.cancel`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    config::{VerifyEffort, VerifyRange},
    status::Verification,
};

/// What to compare. The plain id, without JSON, means `{"replication": id}`: everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Which messages to compare, and whether to repair.
    #[serde(flatten)]
    pub range: VerifyRange,
    /// How much of them to compare, and how fast.
    #[serde(flatten)]
    pub effort: VerifyEffort,
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
