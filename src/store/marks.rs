//! Marks beside a document, most of them requests of operators, at keys of their own in the configuration bucket. An id
//! cannot contain `/`, so marks never collide with documents, and operators may put and delete them by hand.

use std::collections::BTreeSet;

use bytes::Bytes;
use chrono::{DateTime, SubsecRound, Utc};
use serde::{Deserialize, Serialize};

use crate::config::{VerifyEffort, VerifyRange};

/// The purpose of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkKind {
    /// `<id>/paused`: while it is there, whatever its value, nothing is copied.
    Paused,
    /// `<id>/release`: a held replication tries again at once, or skips the message that blocks it.
    Release,
    /// `<id>/valid`: the newest document that was valid, kept while newer ones are not: these may be more than the
    /// bucket remembers. With the fields of the link that it had then.
    Valid,
    /// `<id>/verify`: both streams are compared, until it is removed.
    Verify,
    /// `<id>/streams`: the streams that a replication of many streams has found.
    Streams,
}

impl MarkKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Paused, Self::Release, Self::Valid, Self::Verify, Self::Streams];

    /// The key of a replication's mark.
    pub fn key(self, id: &str) -> String {
        format!("{id}/{}", self.name())
    }

    /// The replication and the kind of a mark's key; `None` for any other key.
    pub fn of_key(key: &str) -> Option<(&str, Self)> {
        let (id, name) = key.split_once('/')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name)?;
        (!id.is_empty()).then_some((id, kind))
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Paused => "paused",
            Self::Release => "release",
            Self::Valid => "valid",
            Self::Verify => "verify",
            Self::Streams => "streams",
        }
    }
}

/// A mark as it is in the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The replication.
    pub id: String,
    /// What is asked for.
    pub kind: MarkKind,
    /// Revision of the mark, or of its removal.
    pub revision: u64,
    /// As written, by us or by hand; `None` when it was removed.
    pub value: Option<Bytes>,
}

/// One message of a source. The time distinguishes it from another one at the same sequence of a recreated stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceMessage {
    /// Source sequence.
    pub seq: u64,
    /// Stored time, nanoseconds since the Unix epoch.
    pub time_ns: i64,
}

/// Value of a mark that pauses, as this program writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseMark {
    /// Format of the value: 1.
    pub version: u32,
    /// When it was asked for.
    pub at: DateTime<Utc>,
    /// Instance that was asked.
    pub instance: String,
}

impl PauseMark {
    /// A pause that begins now.
    pub fn now(instance: &str) -> Self {
        Self { version: 1, at: Utc::now().trunc_subsecs(3), instance: instance.to_owned() }
    }
}

/// Value of a mark that releases, as this program writes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseMark {
    /// Format of the value: 1.
    pub version: u32,
    /// What is to be done.
    pub action: ReleaseAction,
    /// The message to skip: its source sequence...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_seq: Option<u64>,
    /// ... and its stored time, nanoseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_time_ns: Option<i64>,
    /// When it was asked for.
    pub at: DateTime<Utc>,
}

/// Value of a mark that says which streams were found. Each has a replication of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamsMark {
    /// Format of the value: 1.
    pub version: u32,
    /// Streams that the source has.
    pub streams: BTreeSet<String>,
    /// Streams that the source had: their replications are stopped.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub gone: BTreeSet<String>,
}

impl StreamsMark {
    /// Reads a value, by this program or by hand.
    pub fn read(value: &[u8]) -> Option<Self> {
        serde_json::from_slice(value).ok()
    }
}

/// Value of a mark that asks for a comparison of both streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyMark {
    /// Format of the value: 1.
    pub version: u32,
    /// Identifies the job.
    pub job: String,
    /// When it was asked for.
    pub at: DateTime<Utc>,
    /// The document asks for it.
    #[serde(default)]
    pub scheduled: bool,
    /// Which messages to compare, and whether to repair.
    #[serde(flatten)]
    pub range: VerifyRange,
    /// How much of them to compare, and how fast.
    #[serde(flatten)]
    pub effort: VerifyEffort,
}

impl VerifyMark {
    /// Compares everything.
    pub fn now(job: &str) -> Self {
        Self {
            version: 1,
            job: job.to_owned(),
            at: Utc::now().trunc_subsecs(3),
            scheduled: false,
            range: VerifyRange::default(),
            effort: VerifyEffort::default(),
        }
    }

    /// Reads a value. One that was put by hand and says nothing asks for a comparison of everything; its revision names it.
    pub fn read(value: &[u8], revision: u64) -> Self {
        serde_json::from_slice(value).unwrap_or_else(|_| Self::now(&format!("r{revision}")))
    }
}

/// What a held replication should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReleaseAction {
    /// Try again at once.
    Retry,
    /// Skip one message.
    Skip,
}

impl ReleaseMark {
    /// Tries again, and skips a message if one is given.
    pub fn now(skip: Option<SourceMessage>) -> Self {
        Self {
            version: 1,
            action: if skip.is_some() { ReleaseAction::Skip } else { ReleaseAction::Retry },
            source_seq: skip.map(|message| message.seq),
            source_time_ns: skip.map(|message| message.time_ns),
            at: Utc::now().trunc_subsecs(3),
        }
    }

    /// The message that a value asks to skip. A value that does not exactly name one asks for another try only.
    pub fn skip_in(value: &[u8]) -> Option<SourceMessage> {
        let mark: Self = serde_json::from_slice(value).ok()?;
        let named = mark.source_seq.zip(mark.source_time_ns).filter(|_| mark.action == ReleaseAction::Skip)?;
        Some(SourceMessage { seq: named.0, time_ns: named.1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_known_by_its_key() {
        for kind in MarkKind::ALL {
            assert_eq!(MarkKind::of_key(&kind.key("ORDERS.EAST")), Some(("ORDERS.EAST", kind)));
        }
        for key in ["ORDERS", "ORDERS/", "ORDERS/pause", "/paused", "A/B/paused", "ORDERS/paused/"] {
            assert_eq!(MarkKind::of_key(key), None, "{key}");
        }
    }

    #[test]
    fn only_a_message_named_by_sequence_and_time_is_left_out() {
        let message = SourceMessage { seq: 5, time_ns: 6 };
        let value = |mark: &ReleaseMark| serde_json::to_vec(mark).unwrap();
        assert_eq!(ReleaseMark::skip_in(&value(&ReleaseMark::now(Some(message)))), Some(message));
        assert_eq!(ReleaseMark::skip_in(&value(&ReleaseMark::now(None))), None);
        let untimed = ReleaseMark { source_time_ns: None, ..ReleaseMark::now(Some(message)) };
        assert_eq!(ReleaseMark::skip_in(&value(&untimed)), None);
        for garbage in ["", "retry", "{}", "[1]"] {
            assert_eq!(ReleaseMark::skip_in(garbage.as_bytes()), None, "{garbage}");
        }
    }
}
