//! What happens to one message. Pure: time comes in, nothing waits.

use std::time::Duration;

use super::provenance::Tag;
use crate::config::Scope;

/// The rules of one replication.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Which subjects are copied, of those that the server lets through.
    pub scope: Scope,
    /// Older messages are skipped.
    pub max_age: Option<Duration>,
    /// Ours: a message that bears it has been copied by this replication before.
    pub tag: Tag,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send it.
    Copy,
    /// Leave it out.
    Skip(Reason),
}

/// Why a message is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Stored longer ago than `max_age`.
    Old,
    /// Its subject is excluded.
    Excluded,
    /// It came round a ring of replications.
    Loop,
    /// Its sender was copied not long ago.
    Sampled,
}

impl Rules {
    /// Decides about a message stored at `time_ns`, at the time `now_ns` (both nanoseconds since the Unix epoch).
    pub fn decide(&self, subject: &[u8], time_ns: i64, header: &[u8], now_ns: i64) -> Decision {
        if let Some(max_age) = self.max_age
            && i128::from(now_ns) - i128::from(time_ns) > max_age.as_nanos() as i128
        {
            return Decision::Skip(Reason::Old);
        }
        if self.scope.excludes(subject) {
            return Decision::Skip(Reason::Excluded);
        }
        if !header.is_empty() && self.tag.passed(header) {
            return Decision::Skip(Reason::Loop);
        }
        Decision::Copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_subjects_and_loops() {
        let tag = Tag::new("ORDERS", "SITE", "worker");
        let scope = Scope::new(vec!["a.>".to_owned()], vec!["a.*.x".to_owned()]);
        let rules = Rules { scope: scope.clone(), max_age: Some(Duration::from_secs(10)), tag: tag.clone() };
        let check = |time_s: i64, header: &[u8], expect| {
            assert_eq!(rules.decide(b"a.b", time_s * 1_000_000_000, header, 100_000_000_000), expect, "{time_s}");
        };
        check(100, b"", Decision::Copy);
        check(90, b"", Decision::Copy);
        check(89, b"", Decision::Skip(Reason::Old));
        check(200, b"", Decision::Copy);
        check(100, b"NATS/1.0\r\nChoria-SR-Source: ORDERS 1 SITE worker 1\r\n\r\n", Decision::Skip(Reason::Loop));
        check(100, b"NATS/1.0\r\nChoria-SR-Source: ORDERS 1 OTHER worker 1\r\n\r\n", Decision::Copy);
        let forever = Rules { scope, max_age: None, tag };
        assert_eq!(forever.decide(b"a.b", i64::MIN, b"", i64::MAX), Decision::Copy);
        assert_eq!(forever.decide(b"a.b.x", i64::MIN, b"", i64::MAX), Decision::Skip(Reason::Excluded));
        assert_eq!(forever.decide(b"a.x", i64::MIN, b"", i64::MAX), Decision::Copy);
    }
}
