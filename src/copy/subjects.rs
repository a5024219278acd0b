//! What a replication copies, as subjects, by what the configuration of a source tells. Pure.

use std::collections::BTreeSet;

use crate::{
    config::{Mapping, Replication, patterns},
    nats::{Error, jetstream::StreamInfo},
};

/// Where a stream gets messages from with subjects that its configuration does not tell.
const ELSEWHERE: [&str; 3] = ["mirror", "sources", "subject_transform"];

/// Subjects of a source that are in scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InScope {
    /// Patterns that hold all of them.
    pub(crate) from: BTreeSet<String>,
    /// Whether these are only bounds: the source takes over or changes subjects that its configuration does not tell.
    pub(crate) vague: bool,
}

impl InScope {
    /// Of a stream that is not known everything is possible.
    pub(crate) fn of(replication: &Replication, source: Option<&StreamInfo>) -> Self {
        let own = source.map(StreamInfo::subjects).unwrap_or_default();
        let vague = own.is_empty() || source.is_some_and(|source| ELSEWHERE.iter().any(|field| source.has(field)));
        let subjects = if vague { vec![">"] } else { own };
        Self { from: replication.scope.of(subjects), vague }
    }
}

/// Whether messages of different subjects stay apart at the target: there, what a message says of its subject (a rollup,
/// how many are kept) must not meet messages of another one. Of a source that tells too little, what the transforms are
/// for is looked at.
pub(crate) fn stay_apart(replication: &Replication, source: &StreamInfo) -> bool {
    let mapping: &Mapping = &replication.mapping;
    let InScope { from, vague } = InScope::of(replication, Some(source));
    if vague && !replication.scope.is_filtered() {
        let known = mapping.transforms.iter().map(|transform| transform.src().to_owned()).collect();
        return mapping.keeps_apart(&known);
    }
    mapping.keeps_apart(&from)
}

/// What a target that is made for a source listens on.
pub(super) fn of_target(replication: &Replication, source: &StreamInfo) -> Result<Vec<String>, Error> {
    let (scope, name) = (&replication.scope, &replication.source.stream);
    let cannot = |why: String| {
        Err(Error::hold(format!("target stream `{}` cannot be created: {why}", replication.target.stream)))
    };
    let InScope { from, vague } = InScope::of(replication, Some(source));
    let own = source.subjects();
    if own.is_empty() && !scope.is_filtered() {
        return cannot(format!(
            "source stream `{name}` has no subjects of its own; create the target or set `filter_subject`"
        ));
    }
    let from = if vague && !scope.is_filtered() { scope.of(own.iter().copied()) } else { from };
    if from.is_empty() {
        return cannot(format!(
            "filters and exclusions leave nothing of the subjects of source stream `{name}`, which are `{}`",
            own.join("`, `")
        ));
    }
    Ok(patterns::disjoint(replication.mapping.patterns(&from)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config;

    fn replication(fields: Value) -> Replication {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        config::parse_value(&document, "SITE").unwrap()
    }

    fn stream(config: Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    #[test]
    fn a_target_listens_on_what_is_in_scope_mapped() {
        let check = |fields: Value, config: Value, expect: &[&str]| {
            let found = of_target(&replication(fields.clone()), &stream(config.clone())).unwrap();
            assert_eq!(found, expect, "{fields} {config}");
        };
        let orders = json!({"subjects": ["orders.>", "returns"]});
        check(json!({}), orders.clone(), &["orders.>", "returns"]);
        check(json!({"filter_subject": "orders.eu.>"}), orders.clone(), &["orders.eu.>"]);
        check(json!({"filter_subjects": ["*.eu", "returns"]}), orders.clone(), &["orders.eu", "returns"]);
        check(json!({"exclude_subjects": ["returns", "orders.x"]}), orders.clone(), &["orders.>"]);
        let transforms = |src: &str, dest: &str| json!({"subject_transforms": [{"src": src, "dest": dest}]});
        check(transforms("orders.*", "o.{{partition(9,1)}}.$1"), orders.clone(), &["o.*.*", "orders.>", "returns"]);
        check(transforms("orders.>", "eu.>"), orders.clone(), &["eu.>", "returns"]);
        // What overlaps after the mapping is one.
        check(transforms("returns", "orders.returns"), orders.clone(), &["orders.>"]);
        check(json!({"target_subject_prefix": "p", "filter_subject": "returns"}), orders, &["p.returns"]);
        check(json!({"filter_subject": "a.>"}), json!({"sources": [{}], "subjects": ["x"]}), &["a.>"]);
        check(json!({}), json!({"sources": [{}], "subjects": ["x"]}), &["x"]);
        check(json!({"filter_subjects": ["a", "b"]}), json!({"mirror": {"name": "M"}}), &["a", "b"]);
    }

    #[test]
    fn a_target_without_subjects_is_not_made() {
        let check = |fields: Value, config: Value, expect: &str| {
            let error = of_target(&replication(fields), &stream(config)).unwrap_err();
            assert!(error.message.contains(expect), "{error}");
        };
        check(json!({}), json!({"mirror": {"name": "M"}}), "has no subjects of its own");
        check(json!({"filter_subject": "x"}), json!({"subjects": ["a", "b"]}), "leave nothing");
        check(json!({"exclude_subjects": ["*"]}), json!({"subjects": ["a", "b"]}), "which are `a`, `b`");
    }

    #[test]
    fn subjects_that_become_one_are_told() {
        let check = |src: &str, dest: &str, config: Value, expect| {
            let fields = json!({"subject_transforms": [{"src": src, "dest": dest}]});
            assert_eq!(stay_apart(&replication(fields), &stream(config.clone())), expect, "{src} {dest} {config}");
        };
        check("$KV.A.>", "$KV.B.>", json!({"subjects": ["$KV.A.>"]}), true);
        check("$KV.A.>", "$KV.B.>", json!({"mirror": {"name": "KV_A"}}), true);
        check("a.*.*", "a.$1", json!({"subjects": ["a.>"]}), false);
        check("a.x", "a.y", json!({"subjects": ["a.*"]}), false);
        check("a.*.*", "a.$1", json!({"mirror": {"name": "M"}}), false);
    }
}
