//! Subjects with wildcards as sets of subjects. Pure.

use std::collections::BTreeSet;

use crate::{
    config::{Mapping, Replication},
    nats::jetstream::StreamInfo,
};

/// The subjects that two patterns share: always one pattern, or none.
pub(super) fn intersection(a: &str, b: &str) -> Option<String> {
    let (mut a, mut b) = (a.split('.'), b.split('.'));
    let mut shared = Vec::new();
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Some(shared.join(".")),
            (Some(">"), Some(token)) => {
                shared.push(token);
                shared.extend(b);
                return Some(shared.join("."));
            }
            (Some(token), Some(">")) => {
                shared.push(token);
                shared.extend(a);
                return Some(shared.join("."));
            }
            (Some("*"), Some(token)) | (Some(token), Some("*")) => shared.push(token),
            (Some(one), Some(other)) if one == other => shared.push(one),
            _ => return None,
        }
    }
}

/// How much of a pattern a list of patterns holds. A pattern that only several of them hold together is held in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Share {
    None,
    Part,
    All,
}

/// How much of `subject` is in `list`.
pub(super) fn share(list: &[impl AsRef<str>], subject: &str) -> Share {
    let shares = list.iter().map(|pattern| match intersection(pattern.as_ref(), subject) {
        Some(shared) if shared == subject => Share::All,
        Some(_) => Share::Part,
        None => Share::None,
    });
    shares.max().unwrap_or(Share::None)
}

/// What of a source is copied, as subjects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Flow {
    /// At the source.
    pub(super) from: BTreeSet<String>,
    /// The same at the target.
    pub(super) to: BTreeSet<String>,
    /// Whether these are only bounds: the source takes over or changes subjects that its configuration does not
    /// tell, or a text is removed that a wildcard may stand for.
    pub(super) vague: bool,
}

impl Flow {
    /// What a replication copies of a stream; of a stream that is not known everything is possible.
    pub(super) fn of(replication: &Replication, source: Option<&StreamInfo>) -> Self {
        let own = source.map(StreamInfo::subjects).unwrap_or_default();
        let elsewhere = ["mirror", "sources", "subject_transform"];
        let vague = own.is_empty() || source.is_some_and(|source| elsewhere.iter().any(|field| source.has(field)));
        let subjects = if vague { vec![">"] } else { own };
        let mut flow = Self { from: BTreeSet::new(), to: BTreeSet::new(), vague };
        flow.through(subjects.into_iter(), replication.filter_subject.as_deref(), &replication.mapping);
        flow
    }

    /// What a further replication copies of what arrived.
    pub(super) fn onward(&self, replication: &Replication) -> Self {
        let mut flow = Self { from: BTreeSet::new(), to: BTreeSet::new(), vague: self.vague };
        let subjects = self.to.iter().map(String::as_str);
        flow.through(subjects, replication.filter_subject.as_deref(), &replication.mapping);
        flow
    }

    fn through<'a>(&mut self, subjects: impl Iterator<Item = &'a str>, filter: Option<&str>, mapping: &Mapping) {
        self.from = subjects.filter_map(|subject| intersection(subject, filter.unwrap_or(">"))).collect();
        self.to = self.from.iter().map(|subject| mapping.apply(subject)).collect();
        self.vague |= !mapping.remove.is_empty() && self.from.iter().any(|subject| subject.contains(['*', '>']));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config;

    #[test]
    fn patterns_share_one_pattern_or_nothing() {
        let check = |a: &str, b: &str, expect: Option<&str>| {
            assert_eq!(intersection(a, b).as_deref(), expect, "{a} and {b}");
            assert_eq!(intersection(b, a).as_deref(), expect, "{b} and {a}");
        };
        check("a.b", "a.b", Some("a.b"));
        check("a.b", "a.c", None);
        check("a.b", "a", None);
        check("a.>", "a", None);
        check("a.>", "a.b.c", Some("a.b.c"));
        check("a.>", "*.b.*", Some("a.b.*"));
        check("a.*", "*.b", Some("a.b"));
        check("a.*.>", "*.b.>", Some("a.b.>"));
        check(">", ">", Some(">"));
        check("*", "a.b", None);
    }

    #[test]
    fn a_list_holds_all_part_or_nothing_of_a_pattern() {
        let check =
            |list: &[&str], subject: &str, expect| assert_eq!(share(list, subject), expect, "{list:?} {subject}");
        check(&["a.>"], "a.*", Share::All);
        check(&["x", "a.b"], "a.*", Share::Part);
        check(&["x"], "a.*", Share::None);
        check(&[], "a", Share::None);
    }

    #[test]
    fn what_is_copied_as_subjects() {
        let check = |fields: Value, stream: Value, from: &[&str], to: &[&str], vague: bool| {
            let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
            document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let replication = config::parse_value(&document, "SITE").unwrap();
            let source: StreamInfo = serde_json::from_value(json!({"config": stream, "state": {}})).unwrap();
            let set = |list: &[&str]| list.iter().map(|subject| (*subject).to_owned()).collect();
            let expect = Flow { from: set(from), to: set(to), vague };
            assert_eq!(Flow::of(&replication, Some(&source)), expect, "{document}");
        };
        let orders = json!({"subjects": ["orders.*", "returns"]});
        check(json!({}), orders.clone(), &["orders.*", "returns"], &["orders.*", "returns"], false);
        check(json!({"filter_subject": "orders.eu"}), orders.clone(), &["orders.eu"], &["orders.eu"], false);
        check(json!({"filter_subject": "x"}), orders.clone(), &[], &[], false);
        let prefix = json!({"target_subject_prefix": "east"});
        check(prefix, orders.clone(), &["orders.*", "returns"], &["east.orders.*", "east.returns"], false);
        let remove = json!({"target_subject_remove": "orders."});
        check(remove, orders, &["orders.*", "returns"], &["*", "returns"], true);
        check(json!({}), json!({"mirror": {"name": "M"}}), &[">"], &[">"], true);
        check(json!({"filter_subject": "a.>"}), json!({"sources": [{}], "subjects": ["x"]}), &["a.>"], &["a.>"], true);
    }
}
