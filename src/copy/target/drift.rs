//! How the configuration of an existing target differs from the one that it would be created with now. Pure.
//!
//! A difference to what would be created is a drift. A difference to the source alone is expected, and has a reason.

use std::collections::BTreeSet;

use nats_lane::jetstream::StreamInfo;
use serde_json::{Map, Value, json};

use crate::{
    config::{NativeKind, Replication},
    copy::target::{
        mark,
        stream::{self, Extent, Maker, Update},
        subjects::Learned,
    },
};

/// Settings that are compared, in the order in which they are shown; others that a side has follow.
const KNOWN: [&str; 21] = [
    "subjects",
    "storage",
    "retention",
    "discard",
    "max_age",
    "max_msgs",
    "max_bytes",
    "max_msgs_per_subject",
    "max_msg_size",
    "num_replicas",
    "duplicate_window",
    "compression",
    "allow_batched",
    "allow_msg_ttl",
    "allow_rollup_hdrs",
    "allow_direct",
    "mirror_direct",
    "deny_delete",
    "deny_purge",
    "description",
    "metadata",
];
const LIMITS: [&str; 5] = ["max_age", "max_msgs", "max_bytes", "max_msgs_per_subject", "max_msg_size"];
/// A replicated stream is created with at most so many replicas where there are fewer servers than the source has.
const FEWER_REPLICAS: i64 = 3;
/// A target whose account has room for less gets this many times the bytes of its source, or the bytes themselves.
const SMALLER_ROOM: [i64; 2] = [4, 1];

/// What can be done about a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DriftKind {
    /// The change that removes it affects no stored message, and refuses none that is accepted now.
    Safe,
    /// An operator has to decide.
    Unsafe,
    /// It is meant to be.
    Expected,
}

/// One setting that differs between source and target, or from what the target would be created with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct SettingDrift {
    /// Name of the field.
    pub(crate) field: String,
    /// What can be done.
    pub(crate) kind: DriftKind,
    /// Values of both sides as the servers report them; `null` for none.
    pub(crate) source: Value,
    pub(crate) target: Value,
    /// The value that a target is created with.
    pub(crate) wanted: Value,
    /// Why it differs, or why it cannot be changed.
    pub(crate) reason: String,
}

impl SettingDrift {
    /// Whether it is none that is meant to be.
    pub(crate) fn is_drift(&self) -> bool {
        self.kind != DriftKind::Expected
    }
}

/// Both streams of a replication.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamPair<'a> {
    pub(crate) replication: &'a Replication,
    /// The site's name, by which its targets are marked.
    pub(crate) site: &'a str,
    pub(crate) source: &'a StreamInfo,
    pub(crate) target: &'a StreamInfo,
}

impl StreamPair<'_> {
    /// The differences; `native` has the settings of a target that is a mirror or has a source.
    pub(crate) fn differences(&self, native: Option<&Value>) -> Vec<SettingDrift> {
        let Self { replication, source, target, .. } = self;
        let copied;
        let wanted = match native {
            Some(settings) => settings.as_object(),
            None => {
                let replicas = source.number("num_replicas").max(1);
                copied = stream::settings(replication, source, Maker::of_leader(target), replicas);
                Some(&copied)
            }
        };
        let Some(wanted) = wanted else { return Vec::new() };
        let names = |info: &StreamInfo| -> Vec<String> {
            info.config.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect()
        };
        let others: BTreeSet<String> = names(source).into_iter().chain(names(target)).collect();
        let others = others.into_iter().filter(|name| !KNOWN.contains(&name.as_str()) && name != "name");
        let all = KNOWN.iter().map(|name| (*name).to_owned()).chain(others);
        all.filter_map(|name| self.difference(&name, wanted)).collect()
    }

    fn difference(&self, name: &str, wanted: &Map<String, Value>) -> Option<SettingDrift> {
        let native = self.replication.native.as_ref().map(|native| native.kind);
        match name {
            "subjects" => return self.of_subjects(native),
            "metadata" => return self.of_metadata(wanted),
            // Where the messages of a feed come from is checked by the feed.
            "mirror" if native == Some(NativeKind::Mirror) => return None,
            "sources" if native == Some(NativeKind::Source) => return None,
            // A server creates streams without one with a window of its own.
            "duplicate_window" if native.is_some() || !wanted.contains_key(name) => return None,
            // With a limit per subject, servers switch it on by themselves.
            "allow_direct" if native == Some(NativeKind::Mirror) => return None,
            _ => {}
        }
        let raw = |config: Option<&Value>| config.cloned().unwrap_or_default();
        let (source, target) = (raw(self.source.config.get(name)), raw(self.target.config.get(name)));
        let plan = normal(name, &raw(wanted.get(name)));
        let (from, is) = (normal(name, &source), normal(name, &target));
        let (kind, reason) = if is == plan {
            (is != from).then(|| (DriftKind::Expected, self.meant(name)))?
        } else {
            self.judge(name, &is, &plan)
        };
        let wanted = match plan {
            Value::Null if LIMITS.contains(&name) => if name == "max_age" { 0 } else { -1 }.into(),
            Value::Null if source.is_boolean() || target.is_boolean() => false.into(),
            plan => plan,
        };
        Some(SettingDrift { field: name.to_owned(), kind, source, target, wanted, reason })
    }

    /// Why the target is created with another value than the source has.
    fn meant(&self, name: &str) -> String {
        let native = self.replication.native.is_some();
        match name {
            "retention" => "a target keeps its messages up to its limits, whatever is consumed at the source",
            "max_bytes" | "max_msg_size" if !native => {
                "a copy is larger than its message by the headers that it carries"
            }
            "max_msgs_per_subject" if !native => "subjects of the source become one at the target",
            "max_msgs" | "discard" | "discard_new_per_subject" => {
                "a source that refuses messages when it is full does not limit how many it held over time"
            }
            "allow_batched" => "the copy publishes in batches where the target's server can",
            "allow_msg_ttl" => "the target's server does not know it",
            "mirror" | "sources" => "the messages of the target come from this replication",
            "mirror_direct" | "allow_direct" => "a mirror has a setting of its own for direct reads",
            "description" => "the target describes what it is a copy of",
            "placement" => "where a stream is stored is up to its cluster",
            _ => "the target does not take it over",
        }
        .to_owned()
    }

    /// What can be done about a value that is not the one that the target would be created with.
    fn judge(&self, name: &str, is: &Value, plan: &Value) -> (DriftKind, String) {
        use DriftKind::{Expected, Safe, Unsafe};
        let (kind, reason) = match name {
            "description" if self.replication.target_like_source => (Safe, "the description of the source has changed"),
            "description" => (Expected, "a text for people"),
            "placement" => (Expected, "where a stream is stored is up to its cluster"),
            "num_replicas" => self.of_replicas(is, plan),
            name if LIMITS.contains(&name) => self.of_limit(name, is, plan),
            "discard" if self.has_less_room() => (Expected, LESS_ROOM),
            "discard" => (Unsafe, "it decides which messages stay when the target is full"),
            "duplicate_window" if !self.is_ours() => (Unsafe, OF_OTHERS),
            "duplicate_window" if is.as_i64() < plan.as_i64() => {
                (Safe, "repeated messages are recognised for a shorter time")
            }
            "duplicate_window" => (Unsafe, "a shorter window forgets messages that may be repeated"),
            "compression" if self.is_ours() => (Safe, "blocks that are written from now on change"),
            "compression" => (Unsafe, OF_OTHERS),
            "storage" => (Unsafe, "no server changes the storage of a stream: create the target again"),
            "retention" => (Unsafe, "messages are removed at the target when they are consumed there"),
            "allow_rollup_hdrs" if *plan == true && self.target.flag("deny_purge") => {
                (Unsafe, "a stream with `deny_purge` takes no rollups, and no server switches that off")
            }
            "allow_batched" | "allow_msg_ttl" | "allow_rollup_hdrs" | "allow_direct" | "mirror_direct"
                if *plan == true =>
            {
                (Safe, "the target lacks it")
            }
            "allow_batched" | "allow_rollup_hdrs" | "allow_direct" | "mirror_direct" => {
                (Unsafe, "publishers or readers of the target may use it")
            }
            "allow_msg_ttl" => (Unsafe, "no server switches it off"),
            "deny_delete" | "deny_purge" if *plan == true => (Unsafe, "no server switches it off again"),
            "deny_delete" | "deny_purge" => (Unsafe, "no server switches it off"),
            "mirror" | "sources" => (Unsafe, "messages of other streams reach the target"),
            "subject_transform" => (Unsafe, "it changes the subjects of the copies"),
            "sealed" => (Unsafe, "the target takes no messages any more: create it again"),
            _ => (Unsafe, "the target would be created without it"),
        };
        (kind, reason.to_owned())
    }

    fn of_limit(&self, name: &str, is: &Value, plan: &Value) -> (DriftKind, &'static str) {
        use DriftKind::{Expected, Safe, Unsafe};
        let limit = |value: &Value| value.as_i64().unwrap_or(i64::MAX);
        let is_looser = limit(is) > limit(plan);
        if !self.is_ours() {
            return (Unsafe, OF_OTHERS);
        }
        match (is_looser, name) {
            (true, _) if self.is_shared() => (Expected, "other replications are copied into the target"),
            (true, "max_bytes") if is.is_null() => {
                (Expected, "a target has no limit where its account has no room for the reservation")
            }
            (true, "max_msg_size") => (Unsafe, "a lower limit refuses messages that are accepted now"),
            (true, _) => (Unsafe, "a lower limit removes messages that are stored"),
            (false, "max_bytes") if self.has_less_room() => (Expected, LESS_ROOM),
            (false, "max_msg_size") => (Safe, "the target refuses messages that the source takes"),
            (false, _) => (Safe, "the target removes or refuses messages that the source keeps"),
        }
    }

    fn of_replicas(&self, is: &Value, plan: &Value) -> (DriftKind, &'static str) {
        let (is, plan) = (is.as_i64().unwrap_or(1), plan.as_i64().unwrap_or(1));
        let is_clustered = self.target.cluster.is_some();
        if is < plan && (!is_clustered || is == FEWER_REPLICAS) {
            return (DriftKind::Expected, "the cluster of the target has fewer servers");
        }
        (DriftKind::Unsafe, "how many servers of the target store it is up to their operator")
    }

    /// The server refused the reservation of a full copy when the service created the target.
    fn has_less_room(&self) -> bool {
        let (source, target) = (self.source.number("max_bytes"), self.target.number("max_bytes"));
        let is_room = |times: &i64| source > 0 && target == source.saturating_mul(*times);
        self.is_ours() && self.target.text("discard") == "new" && SMALLER_ROOM.iter().any(is_room)
    }

    fn is_ours(&self) -> bool {
        mark::is_ours(&self.target.config, self.site, &self.replication.former)
    }

    /// Whether the target is one for several replications, too.
    fn is_shared(&self) -> bool {
        self.is_ours() && !mark::is_of(self.target, self.site, self.replication)
    }

    fn of_subjects(&self, native: Option<NativeKind>) -> Option<SettingDrift> {
        let Self { replication, source, target, .. } = self;
        let list = |info: &StreamInfo| json!(info.subjects());
        let (from, is) = (list(source), list(target));
        let update =
            || Update::of(replication, source, &Learned::default(), target, Maker::of_leader(target), Extent::Subjects);
        let (kind, wanted, reason) = match native {
            Some(NativeKind::Mirror) => (DriftKind::Expected, json!([]), "a mirror listens on no subjects".to_owned()),
            Some(NativeKind::Source) => {
                (DriftKind::Expected, is.clone(), "a stream with a source has subjects of its own".to_owned())
            }
            None => match update() {
                Ok(Some(Update { config, subjects, .. })) => {
                    let reason = format!("it does not listen on {}", stream::quoted(&subjects));
                    (DriftKind::Safe, config["subjects"].clone(), reason)
                }
                Ok(None) => {
                    let reason = "it listens on what is copied, and on what it was given beside that".to_owned();
                    (DriftKind::Expected, is.clone(), reason)
                }
                Err(error) => (DriftKind::Unsafe, Value::Null, error.message),
            },
        };
        let sorted = |list: &Value| -> BTreeSet<String> {
            list.as_array().into_iter().flatten().map(Value::to_string).collect()
        };
        let differs = kind != DriftKind::Expected || sorted(&from) != sorted(&is);
        differs.then(|| SettingDrift { field: "subjects".to_owned(), kind, source: from, target: is, wanted, reason })
    }

    /// What servers and the service wrote there does not count.
    fn of_metadata(&self, wanted: &Map<String, Value>) -> Option<SettingDrift> {
        let own = |config: Option<&Value>| -> Map<String, Value> {
            let all = config.and_then(Value::as_object).into_iter().flatten();
            let kept = all.filter(|(key, _)| !key.starts_with("_nats.") && !key.starts_with(mark::PREFIX));
            kept.map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        let (from, is) = (own(self.source.config.get("metadata")), own(self.target.config.get("metadata")));
        let plan = own(wanted.get("metadata"));
        let lacks = plan.iter().any(|(key, value)| is.get(key) != Some(value));
        let (kind, reason) = match lacks {
            true => (DriftKind::Safe, "the metadata of the source has changed"),
            false if from == is => return None,
            false => (DriftKind::Expected, "metadata belongs to each stream"),
        };
        let mut all = is.clone();
        all.extend(plan);
        let (source, target) = (from.into(), is.into());
        Some(SettingDrift {
            field: "metadata".to_owned(),
            kind,
            source,
            target,
            wanted: all.into(),
            reason: reason.to_owned(),
        })
    }
}

const OF_OTHERS: &str = "the target was not created by this service: its settings are those of its creator";
const LESS_ROOM: &str = "the account of the target had no room for more when the target was created";

/// A configuration with these differences removed.
pub(crate) fn without<'a>(config: &Value, differences: impl IntoIterator<Item = &'a SettingDrift>) -> Value {
    let mut config = config.clone();
    for SettingDrift { field, wanted, .. } in differences {
        match (field.as_str(), wanted) {
            // Those of the servers and of the service stay.
            ("metadata", Value::Object(wanted)) => {
                if !config["metadata"].is_object() {
                    config["metadata"] = json!({});
                }
                wanted.iter().for_each(|(key, value)| config["metadata"][key] = value.clone());
            }
            _ => config[field] = wanted.clone(),
        }
    }
    config
}

/// A value without the ways in which a server writes the same.
fn normal(name: &str, value: &Value) -> Value {
    let text = |default: &str| match value.as_str() {
        None | Some("") => default.into(),
        Some(text) => text.into(),
    };
    match name {
        "storage" => text("file"),
        "retention" => text("limits"),
        "discard" => text("old"),
        "compression" => text("none"),
        "num_replicas" => value.as_i64().unwrap_or_default().max(1).into(),
        "persist_mode" if *value == "default" => Value::Null,
        name if LIMITS.contains(&name) || name == "max_consumers" => {
            value.as_i64().filter(|limit| *limit > 0).map_or(Value::Null, Value::from)
        }
        _ => match value {
            Value::Bool(false) => Value::Null,
            Value::Number(number) if number.as_i64() == Some(0) => Value::Null,
            Value::String(text) if text.is_empty() => Value::Null,
            Value::Array(list) if list.is_empty() => Value::Null,
            Value::Object(fields) if fields.is_empty() => Value::Null,
            value => value.clone(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(config: Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    fn found(document: Value, source: Value, target: Value) -> Vec<(String, DriftKind)> {
        let mut all = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        all.as_object_mut().unwrap().extend(document.as_object().unwrap().clone());
        let replication = crate::config::parse_value(&all, "EAST").unwrap();
        let (source, target) = (stream(source), stream(target));
        let pair = StreamPair { replication: &replication, site: "EAST", source: &source, target: &target };
        pair.differences(None).into_iter().map(|found| (found.field, found.kind)).collect()
    }

    fn ours(more: Value) -> Value {
        let mark = json!({"replicator.site": "EAST", "replicator.replications": "S"});
        let mut config = json!({"name": "S", "subjects": ["s.>"], "description": "copy of stream S", "metadata": mark,
            "max_age": 0, "max_msgs": -1, "max_bytes": -1, "storage": "file", "duplicate_window": 120});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    fn source(more: Value) -> Value {
        let mut config = json!({"name": "S", "subjects": ["s.>"], "storage": "file", "duplicate_window": 120});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    }

    #[test]
    fn what_differs_is_safe_unsafe_or_expected() {
        use DriftKind::{Expected, Safe, Unsafe};
        let check = |from: Value, to: Value, expect: &[(&str, DriftKind)]| {
            let found = found(json!({}), source(from.clone()), ours(to.clone()));
            let found: Vec<_> = found.iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
            let found: Vec<_> = found.into_iter().filter(|found| *found != ("description", Expected)).collect();
            assert_eq!(found, expect, "{from} {to}");
        };
        check(json!({}), json!({}), &[]);
        check(json!({}), json!({"max_age": 5}), &[("max_age", Safe)]);
        check(json!({"max_age": 9}), json!({"max_age": 5}), &[("max_age", Safe)]);
        check(json!({"max_age": 9}), json!({"max_age": 10}), &[("max_age", Unsafe)]);
        check(json!({"max_age": 9}), json!({}), &[("max_age", Unsafe)]);
        check(json!({"max_bytes": 1000}), json!({}), &[("max_bytes", Expected)]);
        check(json!({}), json!({"subjects": ["s.a"]}), &[("subjects", Safe)]);
        check(json!({}), json!({"subjects": ["*.a"]}), &[("subjects", Unsafe)]);
        check(json!({}), json!({"subjects": ["s.>", "t"]}), &[("subjects", Expected)]);
        check(json!({"retention": "workqueue"}), json!({}), &[("retention", Expected)]);
        check(json!({}), json!({"retention": "interest"}), &[("retention", Unsafe)]);
        check(json!({}), json!({"storage": "memory"}), &[("storage", Unsafe)]);
        check(json!({"compression": "s2"}), json!({}), &[("compression", Safe)]);
        check(json!({"num_replicas": 3}), json!({}), &[("num_replicas", Expected)]);
        check(json!({"allow_direct": true}), json!({}), &[("allow_direct", Safe)]);
        check(json!({}), json!({"allow_direct": true}), &[("allow_direct", Unsafe)]);
        check(json!({"deny_delete": true}), json!({}), &[("deny_delete", Unsafe)]);
        check(json!({}), json!({"metadata": {"replicator.site": "EAST", "team": "a"}}), &[("metadata", Expected)]);
        check(json!({}), json!({"subject_transform": {"src": "s.>", "dest": "t.>"}}), &[("subject_transform", Unsafe)]);
        check(json!({"republish": {"src": "s.>", "dest": "t.>"}}), json!({}), &[("republish", Expected)]);
        check(json!({}), json!({"later": 5}), &[("later", Unsafe)]);
        check(json!({}), json!({"later": false, "other": 0}), &[]);
    }

    #[test]
    fn limits_of_others_are_theirs() {
        let target = json!({"name": "S", "subjects": ["s.>"], "max_age": 5, "duplicate_window": 120});
        let expect = [("max_age".to_owned(), DriftKind::Unsafe), ("allow_direct".to_owned(), DriftKind::Safe)];
        let found = found(json!({}), source(json!({"allow_direct": true})), target);
        let found: Vec<_> = found.into_iter().filter(|(name, _)| name != "description").collect();
        assert_eq!(found, expect);
    }

    #[test]
    fn a_mended_configuration_keeps_everything_else() {
        let difference = |field: &str, wanted: Value| SettingDrift {
            field: field.to_owned(),
            kind: DriftKind::Safe,
            source: Value::Null,
            target: Value::Null,
            wanted,
            reason: String::new(),
        };
        let config = json!({"max_age": 5, "new_field": 7, "metadata": {"_nats.level": "4"}});
        let all = [difference("max_age", 0.into()), difference("metadata", json!({"team": "a"}))];
        let expect = json!({"max_age": 0, "new_field": 7, "metadata": {"_nats.level": "4", "team": "a"}});
        assert_eq!(without(&config, &all), expect);
    }
}
