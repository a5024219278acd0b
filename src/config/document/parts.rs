//! Objects within a document.

use serde::{Deserialize, Serialize};

/// `limits` of a document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LimitsDocument {
    /// Unsettled messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages_in_flight: Option<usize>,
    /// Unsettled bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_in_flight: Option<usize>,
    /// Messages sent in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages_per_second: Option<u64>,
    /// Bytes sent in a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// With sampling, senders that are tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub senders: Option<usize>,
    /// With sampling, bytes of the values of senders that are tracked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sender_bytes: Option<usize>,
}

/// `dead_letter` of a document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeadLetterDocument {
    /// Subject at the source side.
    pub subject: String,
}

/// `advisory` of a document.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdvisoryDocument {
    /// Subject at the source side.
    pub subject: String,
    /// Whether each one is confirmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reliable: Option<bool>,
}
