//! Advisories about a sender (Choria's schema `io.choria.sr.v2.age_advisory`).

use std::{collections::BTreeSet, sync::Arc};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use svix_ksuid::{Ksuid, KsuidLike};
use xxhash_rust::xxh3::xxh3_128;

use crate::config::{self, Replication};

/// Kind of a change of a sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdvisoryKind {
    /// Seen for the first time, or again after it was forgotten.
    New,
    /// Unseen for `warn_duration`.
    Timeout,
    /// Seen again after a timeout.
    Recover,
    /// Unseen for `inspect_duration`, and forgotten.
    Expire,
}

impl AdvisoryKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::New, Self::Timeout, Self::Recover, Self::Expire];

    /// The name in subjects, bodies and labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Timeout => "timeout",
            Self::Recover => "recover",
            Self::Expire => "expire",
        }
    }
}

/// A change of a sender. Times are nanoseconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advisory {
    /// Kind of the change.
    pub kind: AdvisoryKind,
    /// The sender.
    pub sender: Arc<str>,
    /// When it was due, by the times of the source.
    pub due_ns: i64,
    /// When the sender was seen before that.
    pub seen_ns: i64,
}

/// Names and subject of the advisories of one replication.
#[derive(Debug, Clone)]
pub struct AdvisoryTemplate {
    replication: String,
    site: String,
    /// Name of the site in ids: the first that it had, so that an advisory keeps its id when the site is renamed.
    first_site: String,
    inspected: String,
    subject: String,
}

/// Body of an advisory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AgeAdvisory {
    /// `io.choria.sr.v2.age_advisory`.
    #[schemars(extend("enum" = [PROTOCOL]))]
    pub protocol: String,
    /// KSUID of the occurrence: the same each time it is published.
    pub event_id: String,
    /// Where messages name their sender: the path of a field, the name of a header, or the token of the subject.
    #[schemars(length(min = 1))]
    pub inspect_field: String,
    /// How long the sender was unseen, seconds; 0 for `new`.
    pub age: i64,
    /// When it was seen last, seconds since the Unix epoch.
    pub seen: i64,
    /// The site's name.
    pub replicator: String,
    /// When it happened, by the times of the source, seconds since the Unix epoch.
    pub timestamp: i64,
    /// Kind of the change.
    pub event: AdvisoryKind,
    /// The sender.
    #[schemars(length(min = 1))]
    pub value: String,
}

const PROTOCOL: &str = "io.choria.sr.v2.age_advisory";
/// The first bytes of every body.
const BEGIN: &[u8] = br#"{"protocol":"io.choria.sr.v2.age_advisory","#;
const NANO: i64 = 1_000_000_000;

impl AdvisoryTemplate {
    /// For the advisories of one replication.
    pub fn new(replication: &Replication, site: &str, sampling: &config::Sampling) -> Option<Self> {
        let advisory = sampling.advisory.as_ref()?;
        Some(Self {
            replication: replication.id.clone(),
            site: site.to_owned(),
            first_site: replication.former.first().map_or(site, |former| &former.site).to_owned(),
            inspected: sampling.inspect.label(),
            subject: advisory.subject.clone(),
        })
    }

    /// Id of an advisory: a KSUID of the time it was due and of its content, so that every publisher of it uses the
    /// same one.
    pub fn id(&self, advisory: &Advisory) -> String {
        let Advisory { kind, sender, due_ns, seen_ns } = advisory;
        let (name, site) = (kind.name(), &self.first_site);
        // No part contains the byte between them.
        let whole = format!("{}\0{site}\0{sender}\0{name}\0{seen_ns}", self.replication);
        let due = DateTime::<Utc>::from_timestamp(due_ns.div_euclid(NANO), 0);
        Ksuid::new(due, Some(&xxh3_128(whole.as_bytes()).to_be_bytes())).to_string()
    }

    /// The subject: `%s` is the event, `%v` the sender; characters of the sender that a subject cannot contain are `_`.
    pub fn subject(&self, advisory: &Advisory) -> String {
        self.subject_of(advisory.kind, &advisory.sender)
    }

    fn subject_of(&self, kind: AdvisoryKind, sender: &str) -> String {
        fill(&self.subject, kind, &tokens(sender))
    }

    /// The body.
    pub fn body(&self, advisory: &Advisory) -> AgeAdvisory {
        let Advisory { kind, sender, due_ns, seen_ns } = advisory;
        AgeAdvisory {
            protocol: PROTOCOL.to_owned(),
            event_id: self.id(advisory),
            inspect_field: self.inspected.clone(),
            // To the nearest second, as Choria's replicator does. Both may be what somebody wrote into a record.
            age: due_ns.saturating_sub(*seen_ns).saturating_add(NANO / 2).div_euclid(NANO),
            seen: seen_ns.div_euclid(NANO),
            replicator: self.site.clone(),
            timestamp: due_ns.div_euclid(NANO),
            event: *kind,
            value: sender.to_string(),
        }
    }
}

/// Whether a payload is an advisory, of this replicator or another one. Advisories do not count as messages of a
/// sender: a stream may store the advisories of several replicators, and each would cause others.
pub fn is_advisory(payload: &[u8]) -> bool {
    // All bodies begin so, those of Choria's replicator too: no parsing is needed.
    payload.starts_with(BEGIN)
}

/// Where the advisories of a document's `advisory.subject` are, as patterns. A sender may be several tokens, so any
/// tokens may follow.
pub fn patterns(subject: &str) -> BTreeSet<String> {
    let pattern = |kind| match subject.split_once("%v") {
        None => fill(subject, kind, ""),
        Some((before, _)) => fill(&before[..before.rfind('.').map_or(0, |dot| dot + 1)], kind, "") + ">",
    };
    AdvisoryKind::ALL.map(pattern).into()
}

/// A subject with the event for `%s` and the sender for `%v`.
fn fill(subject: &str, kind: AdvisoryKind, sender: &str) -> String {
    let mut parts = subject.split('%');
    let mut filled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut rest = part.chars();
        match rest.next() {
            Some('s') => filled.push_str(kind.name()),
            Some('v') => filled.push_str(sender),
            _ => {
                filled.push('%');
                rest = part.chars();
            }
        }
        filled.push_str(rest.as_str());
    }
    filled
}

/// A sender as tokens of a subject.
fn tokens(sender: &str) -> String {
    let legal = |c: char| if c.is_whitespace() || c.is_control() || "*>".contains(c) { '_' } else { c };
    let token = |token: &str| if token.is_empty() { "_".to_owned() } else { token.chars().map(legal).collect() };
    sender.split('.').map(token).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(subject: &str) -> AdvisoryTemplate {
        AdvisoryTemplate {
            replication: "NODES".to_owned(),
            site: "EAST".to_owned(),
            first_site: "EAST".to_owned(),
            inspected: "sender".to_owned(),
            subject: subject.to_owned(),
        }
    }

    fn advisory(kind: AdvisoryKind, sender: &str) -> Advisory {
        Advisory { kind, sender: sender.into(), due_ns: 1_700_000_660 * NANO, seen_ns: 1_700_000_000 * NANO }
    }

    #[test]
    fn subjects_hold_event_and_sender() {
        let check = |subject: &str, sender: &str, expect: &str| {
            assert_eq!(template(subject).subject(&advisory(AdvisoryKind::Timeout, sender)), expect);
        };
        check("adv", "n1", "adv");
        check("adv.%s.%v", "n1.example.net", "adv.timeout.n1.example.net");
        check("adv.%v", "a b*>\t.é..", "adv.a_b___.é._._");
        check("%v.%s", "%s", "%s.timeout");
        check("a%b.%%s", "n", "a%b.%timeout");
    }

    #[test]
    fn patterns_hold_all_subjects_of_a_document() {
        let check = |subject: &str, expect: &[&str]| {
            assert_eq!(patterns(subject), expect.iter().map(|pattern| (*pattern).to_owned()).collect(), "{subject}");
        };
        check("adv", &["adv"]);
        check("adv.%s", &["adv.new", "adv.timeout", "adv.recover", "adv.expire"]);
        check("adv.%v", &["adv.>"]);
        check("adv.%v.%s", &["adv.>"]);
        check("%s.node-%v.x", &["new.>", "timeout.>", "recover.>", "expire.>"]);
        check("%v", &[">"]);
    }

    #[test]
    fn an_id_is_the_same_each_time_and_of_nothing_else() {
        let id = |kind, sender, shift: i64| {
            let one = advisory(kind, sender);
            template("x").id(&Advisory { seen_ns: one.seen_ns + shift, ..one })
        };
        let first = id(AdvisoryKind::Timeout, "n1", 0);
        assert_eq!(first, id(AdvisoryKind::Timeout, "n1", 0));
        assert_eq!(first.len(), 27);
        for other in
            [id(AdvisoryKind::Expire, "n1", 0), id(AdvisoryKind::Timeout, "n2", 0), id(AdvisoryKind::Timeout, "n1", 1)]
        {
            assert_ne!(first, other);
        }
        assert_eq!(first[..5], id(AdvisoryKind::Timeout, "n2", 0)[..5], "begins with the time");
    }

    #[test]
    fn impossible_times_have_an_age() {
        let one = Advisory { seen_ns: i64::MIN, due_ns: i64::MAX, ..advisory(AdvisoryKind::Expire, "n1") };
        assert_eq!(template("x").body(&one).age, i64::MAX / NANO);
    }

    #[test]
    fn a_body_is_chorias() {
        let body = template("x").body(&advisory(AdvisoryKind::Timeout, "n1"));
        let json = serde_json::to_value(&body).unwrap();
        assert_eq!(json["protocol"], PROTOCOL);
        assert_eq!((json["age"].as_i64(), json["seen"].as_i64()), (Some(660), Some(1_700_000_000)));
        assert_eq!((json["event"].as_str(), json["timestamp"].as_i64()), (Some("timeout"), Some(1_700_000_660)));
        assert_eq!((json["value"].as_str(), json["replicator"].as_str()), (Some("n1"), Some("EAST")));
        assert_eq!(json["inspect_field"], "sender");
        assert_eq!(json.as_object().unwrap().len(), 9);
        assert!(is_advisory(&serde_json::to_vec(&body).unwrap()));
        assert!(!is_advisory(b"") && !is_advisory(br#"{"sender":"n1"}"#));
    }
}
