//! Which consumers are moved, from which position on, and what they are at the target. Pure.

use std::collections::BTreeSet;

use nats_lane::jetstream::ConsumerInfo;
use serde_json::{Map, Value, json};
use wildmatch::WildMatch;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::{Replication, patterns};

/// Which replication of which site moves a consumer.
const OWNER: &str = "stream-replicator.consumer-of";
/// The source sequence up to which everything was acknowledged when it was created.
const POSITION: &str = "stream-replicator.position";
/// When the source stream was created that the position is one of.
const SOURCE: &str = "stream-replicator.source-created";
/// Hash of its configuration without the position: servers add fields to what they are sent.
const HASH: &str = "stream-replicator.config";
/// Labels of consumers that this service reads through.
const OWN_LABELS: [&str; 2] = ["stream-replicator.instance", "stream-replicator.installation"];
/// What servers write into the metadata.
const OF_SERVER: &str = "_nats.";
/// Names that the service gives its own consumers.
const OWN_PREFIX: &str = "sr_";
/// What servers may write into a field for a time that is not set.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// The consumers that are moved.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selection(Vec<WildMatch>);

impl Selection {
    /// Names, or patterns of names; all durable consumers without.
    pub(crate) fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| WildMatch::new(name)).collect())
    }

    /// Whether a consumer is one of them: durable, and none of the service's own.
    pub(crate) fn takes(&self, consumer: &ConsumerInfo) -> bool {
        let is_durable = consumer.config["durable_name"].as_str().is_some_and(|name| !name.is_empty());
        let metadata = &consumer.config["metadata"];
        let is_own =
            consumer.name.starts_with(OWN_PREFIX) || OWN_LABELS.iter().any(|label| metadata[*label].is_string());
        is_durable && !is_own && (self.0.is_empty() || self.0.iter().any(|pattern| pattern.matches(&consumer.name)))
    }
}

/// Where a consumer at the target begins, and why.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConsumerStart<'a> {
    /// `created` of the source stream; `None` where an import does not have it.
    pub(super) source_created: Option<&'a str>,
    /// Everything up to this source sequence is acknowledged.
    pub(super) position: u64,
    /// The sequence of the target.
    pub(super) start: u64,
}

/// The replication that a consumer at the target was created for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConsumerOwner(String);

impl ConsumerOwner {
    pub(super) fn of(site: &str, replication: &str) -> Self {
        Self(format!("{site} {replication}"))
    }

    pub(super) fn owns(&self, consumer: &ConsumerInfo) -> bool {
        consumer.config["metadata"][OWNER] == self.0.as_str()
    }
}

/// The source sequence up to which everything is acknowledged.
pub(super) fn position(consumer: &ConsumerInfo) -> u64 {
    // Until the first ack, some servers report an ack floor of 0 for a consumer that begins later.
    let begun = consumer.config["opt_start_seq"].as_u64().map_or(0, |start| start.saturating_sub(1));
    let floor = consumer.ack_floor.stream_seq.max(begun);
    match consumer.num_ack_pending {
        0 => floor.max(consumer.delivered.stream_seq),
        _ => floor,
    }
}

/// Whether subscribers of the target use a consumer, or have used it.
pub(super) fn is_used(consumer: &ConsumerInfo) -> bool {
    consumer.num_waiting > 0
        || consumer.push_bound
        || consumer.num_ack_pending > 0
        || consumer.delivered.consumer_seq > 0
}

/// The configuration at the target of a consumer that begins at `start` there; an error if it would get nothing.
pub(super) fn target_config(
    consumer: &ConsumerInfo,
    replication: &Replication,
    owner: &ConsumerOwner,
    at: &ConsumerStart<'_>,
) -> Result<Value, String> {
    let mut config = consumer.config.as_object().cloned().unwrap_or_default();
    // Replicas are those of the stream; a stream of the target may have fewer.
    config.remove("num_replicas");
    map_filters(&mut config, replication)?;
    Ok(placed(config, owner, at))
}

/// A configuration that is one of the target already, with another position.
pub(super) fn imported(config: &Value, owner: &ConsumerOwner, position: u64, start: u64) -> Value {
    let at = ConsumerStart { source_created: config["metadata"][SOURCE].as_str(), position, start };
    placed(config.as_object().cloned().unwrap_or_default(), owner, &at)
}

fn placed(mut config: Map<String, Value>, owner: &ConsumerOwner, at: &ConsumerStart<'_>) -> Value {
    config.remove("opt_start_time");
    config.remove("opt_start_seq");
    config.retain(|_, value| value != NO_TIME);
    let mut metadata = own_metadata(&config);
    config.insert("deliver_policy".into(), "by_start_sequence".into());
    config.insert("metadata".into(), metadata.clone().into());
    let hash = format!("{:016x}", xxh3_64(Value::from(config.clone()).to_string().as_bytes()));
    metadata.insert(OWNER.into(), owner.0.clone().into());
    metadata.insert(POSITION.into(), at.position.to_string().into());
    if let Some(created) = at.source_created {
        metadata.insert(SOURCE.into(), created.into());
    }
    metadata.insert(HASH.into(), hash.into());
    config.insert("metadata".into(), metadata.into());
    config.insert("opt_start_seq".into(), at.start.into());
    config.into()
}

/// Metadata without that of servers and of an earlier move.
fn own_metadata(config: &Map<String, Value>) -> Map<String, Value> {
    let all = config.get("metadata").and_then(Value::as_object).into_iter().flatten();
    let kept =
        all.filter(|(key, _)| !key.starts_with(OF_SERVER) && ![OWNER, POSITION, SOURCE, HASH].contains(&key.as_str()));
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// What becomes of the subjects that a consumer is for.
fn map_filters(config: &mut Map<String, Value>, replication: &Replication) -> Result<(), String> {
    let one = config.remove("filter_subject").and_then(|filter| filter.as_str().map(str::to_owned));
    let list = config.remove("filter_subjects");
    let several = list.as_ref().and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let filters: Vec<String> =
        one.into_iter().chain(several.map(str::to_owned)).filter(|filter| !filter.is_empty()).collect();
    if filters.is_empty() {
        return Ok(());
    }
    let in_scope: BTreeSet<String> = replication.scope.of(filters.iter().map(String::as_str));
    let mapped = patterns::disjoint(replication.mapping.patterns(&in_scope));
    match mapped.as_slice() {
        [] => Err(format!("nothing of `{}` is at the target", filters.join("`, `"))),
        [filter] => {
            config.insert("filter_subject".into(), filter.as_str().into());
            Ok(())
        }
        filters => {
            config.insert("filter_subjects".into(), json!(filters));
            Ok(())
        }
    }
}

/// Whether a consumer of ours begins where it should, and was created with the same configuration.
pub(super) fn is_same(there: &Value, wanted: &Value) -> bool {
    let same = |key: &str| there["metadata"][key] == wanted["metadata"][key];
    there["opt_start_seq"] == wanted["opt_start_seq"] && same(HASH) && same(SOURCE)
}

/// Whether a consumer of ours was made for another stream of the source than the one that was created then.
pub(super) fn is_made_for_other(there: &Value, created: &str) -> bool {
    there["metadata"][SOURCE].as_str().is_some_and(|made_for| made_for != created)
}

/// Whether a consumer of ours was made for another stream of the source than the wanted one.
pub(super) fn is_of_earlier_stream(there: &Value, wanted: &Value) -> bool {
    wanted["metadata"][SOURCE].as_str().is_some_and(|created| is_made_for_other(there, created))
}

/// The stream of the source that a consumer of ours was made for, if the wanted one does not name any.
pub(super) fn loses_its_stream<'a>(there: &'a Value, wanted: &Value) -> Option<&'a str> {
    there["metadata"][SOURCE].as_str().filter(|_| !wanted["metadata"][SOURCE].is_string())
}

/// Position and start of a consumer of ours.
pub(super) fn placement(there: &Value) -> (u64, u64) {
    let position = there["metadata"][POSITION].as_str().and_then(|position| position.parse().ok());
    (position.unwrap_or_default(), there["opt_start_seq"].as_u64().unwrap_or_default())
}

/// The configuration of a consumer that nothing moves any more.
pub(super) fn released(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(fields) = config.as_object_mut() {
        let metadata = own_metadata(fields);
        fields.insert("metadata".into(), metadata.into());
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consumer(info: Value) -> ConsumerInfo {
        serde_json::from_value(info).unwrap()
    }

    fn replication(fields: Value) -> Replication {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        crate::config::parse_value(&document, "EAST").unwrap()
    }

    #[test]
    fn durable_consumers_of_others_are_selected() {
        let check = |names: &[&str], name: &str, config: Value, expect: bool| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let one = consumer(json!({"name": name, "config": config}));
            assert_eq!(Selection::new(&names).takes(&one), expect, "{names:?} {config}");
        };
        let durable = json!({"durable_name": "billing"});
        check(&[], "billing", durable.clone(), true);
        check(&["bill*"], "billing", durable.clone(), true);
        check(&["shop"], "billing", durable, false);
        check(&[], "billing", json!({}), false);
        check(&[], "sr_0123_1", json!({"durable_name": "sr_0123_1"}), false);
        check(&[], "SR_A", json!({"durable_name": "SR_A", "metadata": {"stream-replicator.installation": "x"}}), false);
        check(&[], "a", json!({"durable_name": "a", "metadata": {OWNER: "WEST B"}}), true);
    }

    #[test]
    fn a_position_is_what_is_acknowledged() {
        let check = |info: Value, expect: u64| assert_eq!(position(&consumer(info.clone())), expect, "{info}");
        check(json!({}), 0);
        check(json!({"ack_floor": {"stream_seq": 7}, "delivered": {"stream_seq": 9}, "num_ack_pending": 2}), 7);
        check(json!({"ack_floor": {"stream_seq": 7}, "delivered": {"stream_seq": 9}}), 9);
        check(json!({"config": {"opt_start_seq": 50}, "delivered": {"stream_seq": 60}, "num_ack_pending": 3}), 49);
        check(json!({"delivered": {"stream_seq": 49}}), 49);
    }

    #[test]
    fn a_consumer_that_is_used_is_known() {
        for info in [
            json!({"num_waiting": 1}),
            json!({"push_bound": true}),
            json!({"num_ack_pending": 1}),
            json!({"delivered": {"consumer_seq": 1}}),
        ] {
            assert!(is_used(&consumer(info.clone())), "{info}");
        }
        assert!(!is_used(&consumer(json!({"delivered": {"stream_seq": 40}}))));
    }

    #[test]
    fn a_consumer_keeps_everything_but_position_and_subjects() {
        let owner = ConsumerOwner::of("EAST", "S");
        let config = json!({"durable_name": "a", "deliver_policy": "by_start_time", "opt_start_time": "t",
            "num_replicas": 3, "ack_policy": "explicit", "backoff": [1, 2], "headers_only": true, "priority_groups": ["g"],
            "pause_until": "2030-01-01T00:00:00Z", "filter_subject": "s.eu", "metadata": {"team": "x", "_nats.ver": "2"}});
        let one = consumer(json!({"name": "a", "config": config}));
        let renamed = replication(json!({"target_subject_prefix": "p"}));
        let at = ConsumerStart { source_created: Some("then"), position: 40, start: 7 };
        let made = target_config(&one, &renamed, &owner, &at).unwrap();
        let hash = made["metadata"][HASH].clone();
        let expect = json!({"durable_name": "a", "deliver_policy": "by_start_sequence", "opt_start_seq": 7,
            "ack_policy": "explicit", "backoff": [1, 2], "headers_only": true, "priority_groups": ["g"],
            "pause_until": "2030-01-01T00:00:00Z", "filter_subject": "p.s.eu",
            "metadata": {"team": "x", OWNER: "EAST S", POSITION: "40", SOURCE: "then", HASH: hash}});
        assert_eq!(made, expect);
        assert!(owner.owns(&consumer(json!({"config": made}))) && !ConsumerOwner::of("EAST", "T").owns(&one));
        // What a server adds does not count; another start or another setting does.
        let mut there = made.clone();
        there["max_waiting"] = 512.into();
        assert!(is_same(&there, &made));
        let later = target_config(&one, &renamed, &owner, &ConsumerStart { position: 41, start: 8, ..at }).unwrap();
        assert!(!is_same(&there, &later) && !is_of_earlier_stream(&there, &later));
        assert_eq!(placement(&there), (40, 7));
        // Another stream of the source; an export has it, and what was written by hand may not.
        let recreated = ConsumerStart { source_created: Some("now"), ..at };
        let recreated = target_config(&one, &renamed, &owner, &recreated).unwrap();
        assert!(is_of_earlier_stream(&there, &recreated) && is_made_for_other(&there, "now"));
        assert!(is_of_earlier_stream(&there, &imported(&recreated, &owner, 40, 7)));
        let unknown = imported(&one.config, &owner, 40, 7);
        assert!(!is_of_earlier_stream(&there, &unknown) && !is_made_for_other(&unknown, "now"));
        assert!(loses_its_stream(&there, &unknown).is_some() && loses_its_stream(&unknown, &unknown).is_none());
        assert!(loses_its_stream(&there, &recreated).is_none() && loses_its_stream(&unknown, &there).is_none());
        let mut other = one.config.clone();
        other["headers_only"] = false.into();
        let other = consumer(json!({"name": "a", "config": other}));
        assert!(!is_same(&there, &target_config(&other, &renamed, &owner, &at).unwrap()));
        assert_eq!(released(&made)["metadata"], json!({"team": "x"}));
        let mut never_paused = one.config.clone();
        never_paused["pause_until"] = NO_TIME.into();
        assert_eq!(imported(&never_paused, &owner, 40, 7).get("pause_until"), None);
    }

    #[test]
    fn filters_become_those_of_the_target() {
        let check = |document: Value, filters: Value, expect: Result<Value, &str>| {
            let mut config = filters.as_object().unwrap().clone();
            match (map_filters(&mut config, &replication(document.clone())), expect) {
                (Ok(()), Ok(expect)) => assert_eq!(Value::from(config), expect, "{document} {filters}"),
                (Err(found), Err(expect)) => assert!(found.contains(expect), "{found}"),
                (found, expect) => panic!("{found:?} {expect:?}"),
            }
        };
        check(json!({}), json!({}), Ok(json!({})));
        check(json!({}), json!({"filter_subject": ""}), Ok(json!({})));
        let two = json!({"filter_subjects": ["s.a", "s.b"]});
        check(json!({"target_subject_prefix": "p"}), two.clone(), Ok(json!({"filter_subjects": ["p.s.a", "p.s.b"]})));
        let joined = json!({"subject_transforms": [{"src": "s.*", "dest": "t"}]});
        check(joined, two.clone(), Ok(json!({"filter_subject": "t"})));
        check(json!({"filter_subject": "s.b"}), two.clone(), Ok(json!({"filter_subject": "s.b"})));
        check(json!({"filter_subject": "s.c"}), two, Err("nothing of `s.a`, `s.b`"));
    }
}
