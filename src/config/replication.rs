//! A replication as it runs: every value parsed, every default filled in, every reference resolved.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::Place;
use crate::status::Ordering;

/// One configured copy of a source stream into a target stream, valid by construction
/// (see [`super::parse`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Replication {
    /// `STREAM`, or `STREAM.NAME` when `name` is set and is not the site's name.
    pub id: String,
    /// The worker's name in provenance, metrics and consumer names; the site's name by default.
    pub name: String,
    /// Free text for people.
    pub description: String,
    /// Where messages are read.
    pub source: Side,
    /// Where messages are stored.
    pub target: Side,
    /// Only messages whose subject matches are copied; `None` copies all.
    pub filter_subject: Option<String>,
    /// How a source subject becomes a target subject.
    pub mapping: Mapping,
    /// Where a first start begins.
    pub start: Start,
    /// Messages stored longer ago than this are skipped and counted.
    pub max_age: Option<Duration>,
    /// Whether a missing target stream is created.
    pub create_target: bool,
    /// Who else may write to the target.
    pub target_mode: Sharing,
    /// Whether a refusal by the target may change the order, where it can.
    pub ordering: Ordering,
    /// Bounds on what is in the air.
    pub limits: Limits,
    /// What a document says that is accepted and changes nothing; to be logged once.
    pub notices: Vec<String>,
}

/// A stream on a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// Name of the stream.
    pub stream: String,
    /// Where it is, and as whom to connect.
    pub place: Place,
}

/// Choria's subject mapping: a prefix goes in front, then a literal text is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Goes in front of the subject with a dot between; empty for none.
    pub prefix: String,
    /// Every literal occurrence is removed after the prefix was added; empty for none.
    pub remove: String,
}

impl Mapping {
    /// The target subject of a source subject: prefix and a dot in front, then every literal occurrence of the
    /// removed text goes, then runs of dots become one and none stays at the ends. Empty if nothing is left.
    pub fn apply(&self, subject: &str) -> String {
        let mut mapped = String::with_capacity(self.prefix.len() + 1 + subject.len());
        if !self.prefix.is_empty() {
            mapped.push_str(&self.prefix);
            mapped.push('.');
        }
        mapped.push_str(subject);
        if !self.remove.is_empty() && mapped.contains(&self.remove) {
            mapped = mapped.replace(&self.remove, "");
        }
        if mapped.contains("..") || mapped.starts_with('.') || mapped.ends_with('.') {
            let tokens: Vec<_> = mapped.split('.').filter(|token| !token.is_empty()).collect();
            mapped = tokens.join(".");
        }
        mapped
    }
}

/// Where a first start begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// With the first message that the source still has.
    All,
    /// With the next message that arrives.
    AtEnd,
    /// With this source sequence.
    Sequence(u64),
    /// With the first message stored within this time before the start.
    Delta(Duration),
    /// With the first message stored at or after this time.
    Time(DateTime<Utc>),
}

/// Who else may write to the target stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody, until it turns out that somebody does.
    #[default]
    Auto,
    /// Nobody: who does stops the copy.
    Exclusive,
    /// Anybody.
    Shared,
}

/// Bounds on what one replication has read but not settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Unsettled messages, 1 to 1,000,000.
    pub messages_in_flight: usize,
    /// Unsettled bytes, 64 KiB to 1 GiB. One message larger than this still passes, alone.
    pub bytes_in_flight: usize,
}

impl Default for Limits {
    /// Enough for 100,000 messages/s of 1 KiB over a round trip of 80 ms; more would only wait at the target.
    fn default() -> Self {
        Self { messages_in_flight: 8_192, bytes_in_flight: 16 << 20 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_mapped() {
        let check = |prefix: &str, remove: &str, subject: &str, expect: &str| {
            let mapping = Mapping { prefix: prefix.to_owned(), remove: remove.to_owned() };
            assert_eq!(mapping.apply(subject), expect, "prefix {prefix:?}, remove {remove:?}, subject {subject:?}");
        };
        check("", "", "a.b", "a.b");
        check("east", "", "a.b", "east.a.b");
        check("east.", "", "a.b", "east.a.b");
        check("east", "a", "a.b", "est.b");
        check("x", "b", "a.b.c", "x.a.c");
        check("", "b.", "a.b.c", "a.c");
        check("", ".b", "a.b.c", "a.c");
        check("", "a", "a.b.a.c.a", "b.c");
        check("", "b", "a.bb.c", "a.c");
        check("", "ab", "aabb", "ab");
        check("x", "x.a", "a.b", "b");
        check("", "a.b", "a.b", "");
        check("", "nothing", "a.b", "a.b");
    }
}
