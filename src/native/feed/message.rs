//! What becomes of a message that was read: it is delivered, skipped and counted, or cannot be delivered. Pure.

use crate::{
    config::Scope,
    copy::{MessageSize, ReturnedMessages},
    native::session::is_control,
    status::{CopyStatus, Counters},
};

/// Why a message that was read is not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotFed {
    /// Stored longer ago than `max_age`.
    Old,
    /// Its subject is excluded.
    Excluded,
    /// It came from the target.
    Loop,
    /// Its sender was copied recently.
    Sampled,
    /// The target refuses it.
    Refused,
    /// The same, and it is stored as a dead letter.
    DeadLettered,
}

impl NotFed {
    pub fn counter(self, counters: &mut Counters) -> &mut u64 {
        match self {
            Self::Old => &mut counters.skipped_old,
            Self::Excluded => &mut counters.skipped_filtered,
            Self::Loop => &mut counters.skipped_loop,
            Self::Sampled => &mut counters.skipped_sampled,
            Self::Refused => &mut counters.skipped_refused,
            Self::DeadLettered => &mut counters.dead_lettered,
        }
    }
}

/// Why a message of this subject, header and stored time is skipped, if it is.
pub(super) fn skipped(
    (subject, header, time_ns): (&[u8], &[u8], i64),
    oldest: Option<i64>,
    scope: &Scope,
    returned: &ReturnedMessages,
) -> Option<NotFed> {
    if oldest.is_some_and(|oldest| time_ns < oldest) {
        return Some(NotFed::Old);
    }
    if scope.excludes(subject) {
        return Some(NotFed::Excluded);
    }
    returned.includes(header).then_some(NotFed::Loop)
}

/// Counts a message that was read.
pub(super) fn count(copy: &mut CopyStatus, size: MessageSize, skipped: Option<NotFed>) {
    let counters = &mut copy.counters;
    counters.received += 1;
    counters.received_bytes += size.bytes as u64;
    copy.metered.received_payload += size.payload as u64;
    if let Some(skipped) = skipped {
        *skipped.counter(counters) += 1;
        if skipped == NotFed::DeadLettered {
            return;
        }
        counters.skipped_bytes += size.bytes as u64;
        copy.metered.skipped_payload += size.payload as u64;
    }
}

/// Why a message cannot be delivered.
pub(super) fn undeliverable(
    header: &[u8],
    payload: &[u8],
    subject: &[u8],
    splits_at_last: bool,
) -> Option<&'static str> {
    if is_control(header, payload) {
        return Some(
            "has a status and no payload: a target takes it for a sign of life of its origin, and cannot store it; delete it \
             at the source",
        );
    }
    if splits_at_last && subject.contains(&b'@') {
        return Some(
            "has `@` in its subject, and servers before 2.11 would store it under the part after the last one: map the \
             subject to another one, or use a newer server",
        );
    }
    subject
        .is_empty()
        .then_some("has no subject left after the mapping; change the mapping, or delete it at the source")
}

/// Whether a server takes what is after the last `@` of a reply subject for the subject of the message, and not what is
/// after the first one.
pub(super) fn splits_at_last(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0_u32));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next()) < (2, 11)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_target_stores_as_it_is_says_why() {
        let check = |header: &[u8], subject: &[u8], old: bool, expect: Option<&str>| {
            let why = undeliverable(header, b"", subject, old);
            assert_eq!(why.is_some(), expect.is_some(), "{why:?}");
            assert!(why.unwrap_or_default().contains(expect.unwrap_or_default()), "{why:?}");
        };
        check(b"", b"a.b@c", false, None);
        check(b"", b"a.b@c", true, Some("`@`"));
        check(b"", b"", false, Some("no subject"));
        check(b"NATS/1.0 100 x\r\n\r\n", b"a", false, Some("status"));
    }

    #[test]
    fn servers_that_split_at_the_last_sign() {
        assert!(splits_at_last("2.10.26") && splits_at_last("2.9.0"));
        assert!(!splits_at_last("2.11.0") && !splits_at_last("2.15.1") && !splits_at_last("3.0.0-dev"));
    }

    #[test]
    fn a_message_is_skipped_for_the_first_reason() {
        let scope = Scope::new(Vec::new(), vec!["a.x".to_owned()]);
        let counted = |subject: &[u8], time_ns: i64| {
            let (mut copy, returned) = (CopyStatus::default(), ReturnedMessages::default());
            let skipped = skipped((subject, b"", time_ns), Some(5), &scope, &returned);
            count(&mut copy, MessageSize { bytes: 7, payload: 3 }, skipped);
            let counters = copy.counters;
            assert_eq!((counters.received, counters.received_bytes), (1, 7));
            (counters.skipped_old, counters.skipped_filtered, counters.skipped_bytes)
        };
        assert_eq!(counted(b"a.x", 4), (1, 0, 7));
        assert_eq!(counted(b"a.x", 5), (0, 1, 7));
        assert_eq!(counted(b"a.y", 5), (0, 0, 0));
    }
}
