//! The wire contract of `dlq.*`, the requests about dead letters.

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which dead letters of a replication to show. The plain id, without JSON, means `{"replication": id}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LettersRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Only those after this sequence of the stream of dead letters: `next` of the page before; 0 by default.
    #[serde(default)]
    pub after: u64,
    /// Dead letters to show at most, 100 by default; fewer where there is no time for more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// One dead letter of a replication.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LetterRequest {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Its sequence in the stream of dead letters.
    pub letter: u64,
}

/// Dead letters of a replication that are replayed or removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LetterChange {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Their sequences in the stream of dead letters, at most 100; in this order.
    pub letters: Vec<u64>,
}

/// Reply of `dlq.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LetterList {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// The stream of dead letters, at the source side.
    pub stream: String,
    /// Sorted by `letter`.
    pub letters: Vec<LetterRow>,
    /// Where the next page begins (`after`); `null` after the last one.
    pub next: Option<u64>,
}

/// One dead letter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LetterRow {
    /// Its sequence in the stream of dead letters.
    pub letter: u64,
    /// When it was stored there.
    pub at: DateTime<Utc>,
    /// Source sequence of the message.
    pub source_seq: u64,
    /// When the source stored the message.
    pub stored: DateTime<Utc>,
    /// Subject of the message at the source.
    pub subject: String,
    /// Bytes of its subject, headers and payload.
    pub bytes: u64,
    /// Why the target could not store it.
    pub error: String,
}

/// Reply of `dlq.show`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LetterShown {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// The stream of dead letters, at the source side.
    pub stream: String,
    /// The row of `dlq.list`.
    pub letter: LetterRow,
    /// The header lines of the message as the source has them, in their order.
    pub headers: Vec<String>,
    /// Its payload, base64; the first bytes of one that does not fit into a message.
    pub payload: String,
    /// Whether `payload` is not the whole.
    pub truncated: bool,
}

/// Reply of `dlq.replay` and `dlq.drop`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LettersChanged {
    /// Replication id: `STREAM`, or `STREAM.NAME` if the document has a name that is not the site's.
    pub replication: String,
    /// Dead letters that were replayed, or only removed: they are no longer in the stream of dead letters.
    pub done: Vec<LetterDone>,
    /// Dead letters that stay where they are; those after them were handled.
    #[serde(default)]
    pub refused: Vec<LetterRefused>,
    /// Those that were not handled, because of `failed`, or because there was no time for them.
    pub left: Vec<u64>,
    /// Why the first of `left` failed.
    pub failed: Option<String>,
}

/// A dead letter that cannot be replayed as long as the target is as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LetterRefused {
    /// Its sequence in the stream of dead letters.
    pub letter: u64,
    /// Why.
    pub reason: String,
}

/// A dead letter that was replayed, or only removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LetterDone {
    /// Its sequence in the stream of dead letters.
    pub letter: u64,
    /// Where the target has the message; `null` for one that was only removed.
    pub target_seq: Option<u64>,
    /// Whether the target had it already.
    pub duplicate: bool,
}
