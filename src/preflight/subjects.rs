//! Subjects with wildcards as sets of subjects. Pure.

use std::collections::BTreeSet;

use nats_lane::jetstream::StreamInfo;

use crate::{
    config::{Mapping, Replication, patterns::intersection},
    copy::target::subjects::{InScope, Origins},
};

/// How much of a pattern a list of patterns holds. A pattern that only several of them hold together is held in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Share {
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
    pub(super) fn of(replication: &Replication, source: Option<&StreamInfo>, origins: &Origins) -> Self {
        let InScope { from, vague } = InScope::of(replication, source, origins);
        Self::through(from, &replication.mapping, vague)
    }

    /// What a further replication copies of what arrived.
    pub(super) fn onward(&self, replication: &Replication) -> Self {
        Self::through(replication.scope.of(self.to.iter().map(String::as_str)), &replication.mapping, self.vague)
    }

    fn through(from: BTreeSet<String>, mapping: &Mapping, vague: bool) -> Self {
        let to = mapping.patterns(&from);
        let vague = vague || !mapping.remove.is_empty() && from.iter().any(|subject| subject.contains(['*', '>']));
        Self { from, to, vague }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config;

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
            assert_eq!(Flow::of(&replication, Some(&source), &Origins::default()), expect, "{document}");
        };
        let orders = json!({"subjects": ["orders.*", "returns"]});
        check(json!({}), orders.clone(), &["orders.*", "returns"], &["orders.*", "returns"], false);
        check(json!({"filter_subject": "orders.eu"}), orders.clone(), &["orders.eu"], &["orders.eu"], false);
        check(json!({"filter_subject": "x"}), orders.clone(), &[], &[], false);
        let several = json!({"filter_subjects": ["*.eu", "*.us", "x"], "exclude_subjects": ["orders.us"]});
        check(several, orders.clone(), &["orders.eu"], &["orders.eu"], false);
        let transform = json!({"subject_transforms": [{"src": "orders.*", "dest": "{{left(1,2)}}.orders"}]});
        check(transform, orders.clone(), &["orders.*", "returns"], &["*.orders", "returns"], false);
        let prefix = json!({"target_subject_prefix": "east"});
        check(prefix, orders.clone(), &["orders.*", "returns"], &["east.orders.*", "east.returns"], false);
        let remove = json!({"target_subject_remove": "orders."});
        check(remove, orders, &["orders.*", "returns"], &["*", "returns"], true);
        check(json!({}), json!({"mirror": {"name": "M"}}), &[">"], &[">"], true);
        check(json!({"filter_subject": "a.>"}), json!({"sources": [{}], "subjects": ["x"]}), &["a.>"], &["a.>"], true);
    }
}
