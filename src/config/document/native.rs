//! What a document says of a native feed.

use nats_lane::{Scheme, ServerRef};
use serde_json::Value;

use super::{Checker, Document, SideFields, text};
use crate::config::{NativeFeed, NativeKind, Problem};

/// The side of the leafnode connection, as its fields begin.
const LEAF: &str = "target_leaf";

/// Fields that say what a native feed does not do: the target's server stores what it is given.
const NOT_FED: [(&str, &str); 2] = [
    ("ordering", "the order is always that of the source"),
    ("leader_election_name", "Choria's replicator feeds no streams"),
];
/// Fields that one of the kinds does not act on.
const NOT_A_MIRRORS: [(&str, &str); 5] = [
    ("loop_protection", ALL_OF_ORIGIN),
    ("target_origin", ALL_OF_ORIGIN),
    ("target_mode", "a mirror takes messages from its origin only"),
    ("target_update", "a mirror that exists is left as it is"),
    ("on_source_loss", CANNOT_GO_BACK),
];
const NOT_A_SOURCES: [(&str, &str); 2] =
    [("target_mode", "a stream with sources takes messages of others, too"), ("on_source_loss", CANNOT_GO_BACK)];
const ALL_OF_ORIGIN: &str = "a mirror takes every message of its origin";
const CANNOT_GO_BACK: &str = "the target cannot go back: the replication is held when the source lost messages";

/// Limits that are not applied to a native feed.
const NOT_LIMITED: [(&str, &str); 2] = [
    ("messages_per_second", "the target is fed as fast as it stores"),
    ("bytes_per_second", "the target is fed as fast as it stores"),
];

/// What is wrong with the scheme of the URL of a side.
pub(super) fn wrong_scheme(side: &str, scheme: Scheme) -> Option<&'static str> {
    match (side == LEAF, scheme) {
        (true, Scheme::Nats) => Some("`nats://` is the port for clients: write `nats-leaf://`"),
        (false, Scheme::Leaf) => Some("`nats-leaf://` is only for `target_leaf_url`: write `nats://`"),
        _ => None,
    }
}

impl Checker {
    /// How the target is fed, for the kinds `mirror` and `source`.
    pub(super) fn native(&mut self, document: &Document) -> Option<NativeFeed> {
        let url = text(&document.target_leaf_url);
        let own_tls = document.target_leaf_tls.as_ref();
        self.tls("target_leaf_tls", own_tls);
        let kind = match text(&document.kind) {
            Some("mirror") => NativeKind::Mirror,
            Some("source") => NativeKind::Source,
            _ => {
                let set = [("target_leaf_url", url.is_some()), ("target_leaf_tls", own_tls.is_some())];
                for (field, _) in set.into_iter().filter(|(_, set)| *set) {
                    let message = format!("`{field}` has no effect, because `kind` is neither `mirror` nor `source`");
                    self.problem(field, message);
                }
                return None;
            }
        };
        self.not_fed(kind, document);
        let Some(url) = url else {
            if self.problems.iter().all(|problem| problem.path != "/target_leaf_url") {
                let message =
                    format!("`target_leaf_url` is required where `kind` is `{kind}`: the leafnode port of the target");
                self.problem("target_leaf_url", message);
            }
            return None;
        };
        let fields = SideFields {
            side: LEAF,
            url: ("target_leaf_url", Some(url)),
            context: ("", None),
            domain: ("", None),
            api_prefix: ("", None),
            own_tls: own_tls.or(document.target_tls.as_ref()),
            tls: document.tls.as_ref(),
            choria: None,
        };
        let leaf = ServerRef::Known(Box::new(self.known("target_leaf_url", url, &fields, None)?));
        self.places.push((LEAF, leaf.clone()));
        Some(NativeFeed { kind, leaf })
    }

    fn not_fed(&mut self, kind: NativeKind, document: &Document) {
        let Ok(Value::Object(written)) = serde_json::to_value(document) else { return };
        let is_default = |value: &Value| match value {
            Value::String(text) => text.is_empty(),
            Value::Number(number) => number.as_i64() == Some(0),
            Value::Bool(flag) => !flag,
            Value::Object(fields) => fields.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Null => true,
        };
        let of_kind = match kind {
            NativeKind::Mirror => NOT_A_MIRRORS.as_slice(),
            NativeKind::Source => &NOT_A_SOURCES,
        };
        for (field, why) in NOT_FED.iter().chain(of_kind) {
            if written.get(*field).is_some_and(|value| !is_default(value)) {
                self.problem(field, format!("`{field}` is not for kind `{kind}`: {why}"));
            }
        }
        for (field, why) in NOT_LIMITED {
            if written.get("limits").and_then(|limits| limits.get(field)).is_some() {
                let message = format!("`limits.{field}` is not for kind `{kind}`: {why}");
                self.problems.push(Problem::new(format!("/limits/{field}"), message));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Replication, parse};

    fn document(fields: Value) -> Result<Replication, Vec<Problem>> {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b", "kind": "mirror",
            "target_leaf_url": "nats-leaf://u:p@b"});
        document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        parse(document.to_string().as_bytes(), "SITE").map_err(|problems| problems.0)
    }

    #[test]
    fn a_mirror_has_a_leafnode_port() {
        let leaf = |fields| match document(fields).unwrap().native.unwrap().leaf {
            ServerRef::Known(connection) => connection,
            other @ ServerRef::Context { .. } => panic!("{other}"),
        };
        let connection = leaf(json!({}));
        assert_eq!(connection.endpoint.hosts[0].port, 7422);
        let tls = json!({"target_tls": {"ca": "/t"}, "target_leaf_tls": {"ca": "/l"}});
        assert_eq!(leaf(tls).endpoint.tls.ca.as_deref(), Some(std::path::Path::new("/l")));
        assert_eq!(
            leaf(json!({"target_tls": {"ca": "/t"}})).endpoint.tls.ca.as_deref(),
            Some(std::path::Path::new("/t"))
        );
        assert!(document(json!({"kind": "copy", "target_leaf_url": ""})).unwrap().native.is_none());
    }

    #[track_caller]
    fn check(fields: Value, path: &str, text: &str) {
        let problems = document(fields).unwrap_err();
        assert!(problems.iter().any(|p| p.path == path && p.message.contains(text)), "{problems:?}");
    }

    #[test]
    fn what_a_feed_does_not_do_is_refused() {
        for (field, value) in [
            ("ordering", json!("strict")),
            ("on_source_loss", json!("follow")),
            ("target_mode", json!("shared")),
            ("leader_election_name", json!("x")),
        ] {
            check(json!({ field: value }), &format!("/{field}"), "is not for kind `mirror`");
            check(json!({ "kind": "source", field: value }), &format!("/{field}"), "is not for kind `source`");
        }
        check(json!({"target_update": true}), "/target_update", "is not for kind `mirror`");
        document(json!({"kind": "source", "target_update": true})).unwrap();
        for limit in ["messages_per_second", "bytes_per_second"] {
            check(json!({"limits": {limit: 70_000}}), &format!("/limits/{limit}"), "is not for kind `mirror`");
        }
        let in_flight = |limits: Value| {
            let limits = document(limits).unwrap().limits;
            (limits.messages_in_flight, limits.bytes_in_flight)
        };
        assert_eq!(in_flight(json!({})), (262_144, 64 << 20));
        assert_eq!(in_flight(json!({"limits": {"bytes_in_flight": 1_048_576}})), (262_144, 1_048_576));
        assert_eq!(in_flight(json!({"limits": {"messages_in_flight": 7}})), (7, 64 << 20));
        let copies = crate::config::Limits::default();
        assert_eq!(
            in_flight(json!({"kind": "copy", "target_leaf_url": ""})),
            (copies.messages_in_flight, copies.bytes_in_flight)
        );
        let limits = json!({"messages_in_flight": 100, "bytes_in_flight": 1_048_576});
        document(json!({"on_reject": "hold", "max_age": "1h", "start_at_end": true, "target_update": false, "limits": limits})).unwrap();
        let sampling = json!({"inspect_field": "sender", "inspect_duration": "1h", "warn_duration": "5m", "size_trigger": 10,
            "advisory": {"subject": "a.%s"}, "limits": {"senders": 100, "sender_bytes": 70_000}});
        assert!(document(sampling).unwrap().sampling.is_some());
        let subjects = json!({"filter_subjects": ["a.>", "b"], "exclude_subjects": ["a.b"], "target_subject_prefix": "x",
            "subject_transforms": [{"src": "a.>", "dest": "c.>"}], "target_subject_remove": "y"});
        document(subjects).unwrap();
    }

    #[test]
    fn leafnode_urls_are_only_for_leafnodes() {
        check(json!({"target_leaf_url": ""}), "/target_leaf_url", "is required");
        check(json!({"target_leaf_url": "nats://b"}), "/target_leaf_url", "`nats-leaf://`");
        check(json!({"target_url": "nats-leaf://b"}), "/target_url", "only for `target_leaf_url`");
        check(json!({"kind": "copy"}), "/target_leaf_url", "has no effect");
        check(json!({"kind": "other"}), "/kind", "mirror");
    }
}
