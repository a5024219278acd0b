//! The decision about one message: the same for the loop, for messages that are read again for sampling, and for
//! messages after dead letters; and the table of counters. Pure: the time is an argument, nothing waits.

use std::time::Duration;

use nats_lane::Error;

use super::{
    objects::{Gate, Incomplete, Pass},
    resume::KnownCopy,
    returned::ReturnedMessages,
    source::reader::Incoming,
    target::provenance::Tag,
};
use crate::{config::Scope, sampling::MessageOutcome, status::Counters, store::SourceMessage};

/// The rules of one replication.
#[derive(Debug, Clone)]
pub struct CopyRules {
    /// Which subjects are copied, of those that the server lets through.
    pub scope: Scope,
    /// Older messages are skipped.
    pub max_age: Option<Duration>,
    /// Our provenance tag: a message that carries it has been copied by this replication before.
    pub tag: Tag,
    /// Other messages that have been in the target stream before.
    pub returned: ReturnedMessages,
}

/// Everything else that a decision depends on. Each part is evaluated only if nothing before it has decided.
#[derive(Debug)]
pub struct DecisionInputs<'g, S, P> {
    /// The message that is skipped by request.
    pub skip: Option<SourceMessage>,
    /// How the target already has this message.
    pub known: Option<KnownCopy>,
    /// Whether its sender is to be copied.
    pub sampling: S,
    /// What the target needs before this message.
    pub gate: Option<&'g Gate>,
    /// Builds the outgoing message, or returns why the target can never store it.
    pub prepare: P,
}

/// A decision. `Outgoing` is the message as it is sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<Outgoing> {
    /// Skip it.
    Skip(Reason),
    /// The target has it, or no longer needs it.
    Stored(KnownCopy),
    /// Decide again when the target has answered how many messages it holds on this source subject.
    Wait(String),
    /// The target can never store it.
    Reject(Error),
    /// Send it.
    Send(Outgoing),
}

/// Why a message is skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// By request.
    Requested,
    /// Stored longer ago than `max_age`.
    Old,
    /// Its subject is excluded.
    Excluded,
    /// It returned through a replication loop: it was copied by this replication, or from the target stream.
    Loop,
    /// Its sender was copied recently.
    Sampled,
    /// It describes an object that is incomplete at the target.
    Incomplete(Incomplete),
}

impl CopyRules {
    /// Why a message stored at `time_ns` is skipped at the time `now_ns` (both nanoseconds since the Unix epoch), if it
    /// is.
    pub fn skips(&self, subject: &[u8], time_ns: i64, header: &[u8], now_ns: i64) -> Option<Reason> {
        if let Some(max_age) = self.max_age
            && i128::from(now_ns) - i128::from(time_ns) > max_age.as_nanos() as i128
        {
            return Some(Reason::Old);
        }
        if self.scope.excludes(subject) {
            return Some(Reason::Excluded);
        }
        (!header.is_empty() && (self.tag.passed(header) || self.returned.includes(header))).then_some(Reason::Loop)
    }
}

/// Decides about one message.
pub fn verdict<Outgoing>(
    rules: &CopyRules,
    facts: DecisionInputs<'_, impl FnOnce() -> bool, impl FnOnce() -> Result<Outgoing, Error>>,
    incoming: &Incoming<'_>,
    now_ns: i64,
) -> Decision<Outgoing> {
    let DecisionInputs { skip, known, sampling, gate, prepare } = facts;
    let (message, seq, time_ns) = (&incoming.message, incoming.delivery.stream_seq, incoming.delivery.time_ns);
    if skip == Some(SourceMessage { seq, time_ns }) {
        return Decision::Skip(Reason::Requested);
    }
    if let Some(known) = known {
        return Decision::Stored(known);
    }
    if let Some(reason) = rules.skips(message.subject, time_ns, message.header, now_ns) {
        return Decision::Skip(reason);
    }
    if !sampling() {
        return Decision::Skip(Reason::Sampled);
    }
    match gate.map_or(Pass::Send, |gate| gate.pass(message.subject, message.payload)) {
        Pass::Ask(chunks) => Decision::Wait(chunks),
        Pass::Skip(object) => Decision::Skip(Reason::Incomplete(object)),
        Pass::Send => prepare().map_or_else(Decision::Reject, Decision::Send),
    }
}

impl<Outgoing> Decision<Outgoing> {
    /// Counts a message of so many bytes. A message that can never be stored is counted where it is rejected.
    pub fn count(&self, counters: &mut Counters, bytes: usize) {
        let counter = match self {
            Self::Skip(Reason::Requested) => &mut counters.skipped_refused,
            Self::Skip(Reason::Old) => &mut counters.skipped_old,
            Self::Skip(Reason::Excluded) => &mut counters.skipped_filtered,
            Self::Skip(Reason::Loop) => &mut counters.skipped_loop,
            Self::Skip(Reason::Sampled) => &mut counters.skipped_sampled,
            Self::Skip(Reason::Incomplete(_)) => &mut counters.skipped_incomplete,
            Self::Reject(_) => return counters.refused += 1,
            Self::Stored(_) | Self::Wait(_) | Self::Send(_) => return,
        };
        *counter += 1;
        counters.skipped_bytes += bytes as u64;
    }

    /// The outcome for sampling; `None` for messages that are skipped before their sender matters.
    pub fn fate(&self) -> Option<MessageOutcome> {
        match self {
            Self::Skip(Reason::Old | Reason::Excluded | Reason::Loop) => None,
            Self::Skip(Reason::Requested | Reason::Sampled | Reason::Incomplete(_)) => Some(MessageOutcome::Passed),
            Self::Wait(_) | Self::Reject(_) => Some(MessageOutcome::Passed),
            Self::Stored(_) => Some(MessageOutcome::Stored),
            Self::Send(_) => Some(MessageOutcome::Sent),
        }
    }
}

#[cfg(test)]
mod tests {
    use nats_lane::{Message, jetstream::Delivery};

    use super::*;
    use crate::status::Counters;

    fn rules(max_age: Option<Duration>) -> CopyRules {
        let scope = Scope::new(vec!["a.>".to_owned()], vec!["a.*.x".to_owned()]);
        CopyRules { scope, max_age, tag: Tag::new("ORDERS", "SITE", "worker"), returned: ReturnedMessages::default() }
    }

    fn incoming<'a>(subject: &'a [u8], header: &'a [u8], payload: &'a [u8]) -> Incoming<'a> {
        let message = Message { sid: 2, subject, reply: b"", header, payload };
        let delivery = Delivery { stream_seq: 7, consumer_seq: 7, time_ns: 70_000_000_000, pending: 0 };
        Incoming { delivery, after: 6, message }
    }

    #[test]
    fn age_subjects_and_loops() {
        let rules_with = |max_age| rules(max_age);
        let rules = rules_with(Some(Duration::from_secs(10)));
        let check = |time_s: i64, header: &[u8], expect| {
            assert_eq!(rules.skips(b"a.b", time_s * 1_000_000_000, header, 100_000_000_000), expect, "{time_s}");
        };
        check(100, b"", None);
        check(90, b"", None);
        check(89, b"", Some(Reason::Old));
        check(200, b"", None);
        check(100, b"NATS/1.0\r\nChoria-SR-Source: ORDERS 1 SITE worker 1\r\n\r\n", Some(Reason::Loop));
        check(100, b"NATS/1.0\r\nChoria-SR-Source: ORDERS 1 OTHER worker 1\r\n\r\n", None);
        let forever = rules_with(None);
        assert_eq!(forever.skips(b"a.b", i64::MIN, b"", i64::MAX), None);
        assert_eq!(forever.skips(b"a.b.x", i64::MIN, b"", i64::MAX), Some(Reason::Excluded));
        assert_eq!(forever.skips(b"a.x", i64::MIN, b"", i64::MAX), None);
    }

    #[test]
    fn each_is_asked_only_if_nothing_before_it_decides() {
        let description = br#"{"name":"report","nuid":"one","chunks":2}"#;
        let header = b"NATS/1.0\r\nChoria-SR-Source: ORDERS 1 SITE worker 1\r\n\r\n";
        let gate = Gate::of("OBJ_b", "OBJ_b").unwrap();
        let rules = CopyRules { scope: Scope::default(), ..rules(Some(Duration::from_secs(10))) };
        let decide = |skipped_ns: i64, known, header, wanted, gate, now_s: i64| {
            let incoming = incoming(b"$O.b.M.cmVwb3J0", header, description);
            let skip = Some(SourceMessage { seq: 7, time_ns: skipped_ns });
            let prepare = || Err::<(), _>(Error::hold("too large"));
            let facts = DecisionInputs { skip, known, sampling: || wanted, gate, prepare };
            verdict(&rules, facts, &incoming, now_s * 1_000_000_000)
        };
        let (known, gate, this) = (Some(KnownCopy::Stored(3)), Some(&gate), 70_000_000_000);
        assert_eq!(decide(this, known, header, false, gate, 90), Decision::Skip(Reason::Requested));
        assert_eq!(decide(this + 1, known, header, false, gate, 90), Decision::Stored(KnownCopy::Stored(3)));
        assert_eq!(decide(0, None, header, false, gate, 90), Decision::Skip(Reason::Old));
        assert_eq!(decide(0, None, header, false, gate, 80), Decision::Skip(Reason::Loop));
        assert_eq!(decide(0, None, b"", false, gate, 80), Decision::Skip(Reason::Sampled));
        assert_eq!(decide(0, None, b"", true, gate, 80), Decision::Wait("$O.b.C.one".to_owned()));
        assert_eq!(decide(0, None, b"", true, None, 80), Decision::Reject(Error::hold("too large")));
        let facts = DecisionInputs { skip: None, known: None, sampling: || true, gate, prepare: || Ok(1) };
        assert_eq!(verdict(&rules, facts, &incoming(b"a.b", b"", b""), this), Decision::Send(1));
    }

    #[test]
    fn each_decision_counts_once() {
        let check = |decision: Decision<()>, expect: ((u64, u64, u64, u64, u64, u64), u64, u64), fate| {
            let mut counters = Counters::default();
            decision.count(&mut counters, 5);
            let Counters { skipped_old, skipped_filtered, skipped_sampled, skipped_incomplete, .. } = counters;
            let Counters { skipped_refused, skipped_loop, refused, skipped_bytes, .. } = counters;
            let skipped =
                (skipped_old, skipped_filtered, skipped_sampled, skipped_incomplete, skipped_refused, skipped_loop);
            assert_eq!((skipped, refused, skipped_bytes), expect, "{decision:?}");
            assert_eq!(decision.fate(), fate, "{decision:?}");
        };
        let object = Incomplete { object: "report".to_owned(), chunks: 2, found: 1 };
        check(Decision::Skip(Reason::Old), ((1, 0, 0, 0, 0, 0), 0, 5), None);
        check(Decision::Skip(Reason::Excluded), ((0, 1, 0, 0, 0, 0), 0, 5), None);
        check(Decision::Skip(Reason::Loop), ((0, 0, 0, 0, 0, 1), 0, 5), None);
        check(Decision::Skip(Reason::Sampled), ((0, 0, 1, 0, 0, 0), 0, 5), Some(MessageOutcome::Passed));
        check(Decision::Skip(Reason::Incomplete(object)), ((0, 0, 0, 1, 0, 0), 0, 5), Some(MessageOutcome::Passed));
        check(Decision::Skip(Reason::Requested), ((0, 0, 0, 0, 1, 0), 0, 5), Some(MessageOutcome::Passed));
        check(Decision::Reject(Error::hold("x")), ((0, 0, 0, 0, 0, 0), 1, 0), Some(MessageOutcome::Passed));
        check(Decision::Stored(KnownCopy::Replaced), ((0, 0, 0, 0, 0, 0), 0, 0), Some(MessageOutcome::Stored));
        check(Decision::Send(()), ((0, 0, 0, 0, 0, 0), 0, 0), Some(MessageOutcome::Sent));
    }
}
