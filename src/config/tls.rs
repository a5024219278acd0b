//! TLS files as people write them.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `tls`, `source_tls` and `target_tls` of a document. PEM files on the machine of the replicator.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(rename = "Tls", deny_unknown_fields)]
pub struct TlsDocument {
    /// Certificate authorities to trust instead of the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub ca: Option<PathBuf>,
    /// Client certificate chain; together with `key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub cert: Option<PathBuf>,
    /// Client private key; together with `cert`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String")]
    pub key: Option<PathBuf>,
}
