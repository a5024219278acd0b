//! Another source for a target that this service created for a first one: the limits of the stream leave room for both.
//! Pure.

use serde_json::{Map, Value};

/// Limits that all sources of a stream share: each source needs its own part.
const SHARED: [&str; 2] = ["max_msgs", "max_bytes"];
/// Limits for each message or subject.
const EACH: [&str; 3] = ["max_age", "max_msg_size", "max_msgs_per_subject"];

/// Raises the limits of a stream to those it would be created with for another source; returns the names of the limits
/// that change.
pub(crate) fn room(config: &mut Value, wanted: &Value) -> Vec<&'static str> {
    let Some(config) = config.as_object_mut() else { return Vec::new() };
    let shared = SHARED.into_iter().filter(|name| widen(config, name, wanted, i64::saturating_add));
    let mut changed: Vec<_> = shared.collect();
    changed.extend(EACH.into_iter().filter(|name| widen(config, name, wanted, i64::max)));
    changed
}

/// A limit that is missing or not positive is none.
fn widen(config: &mut Map<String, Value>, name: &str, wanted: &Value, both: fn(i64, i64) -> i64) -> bool {
    let limit = |value: Option<&Value>| value.and_then(Value::as_i64).filter(|limit| *limit > 0);
    let Some(there) = limit(config.get(name)) else { return false };
    match limit(wanted.get(name)).map(|wanted| both(there, wanted)) {
        Some(same) if same == there => return false,
        Some(more) => config.insert(name.to_owned(), more.into()),
        None => config.remove(name),
    };
    true
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_stream_gets_room_for_another_source() {
        let check = |config: Value, wanted: Value, expect: Value, changed: &[&str]| {
            let mut found = config.clone();
            assert_eq!(room(&mut found, &wanted), changed, "{config} {wanted}");
            assert_eq!(found, expect, "{config} {wanted}");
        };
        let both = json!({"max_msgs": 10, "max_age": 5, "max_msg_size": 100});
        let sum = json!({"max_msgs": 13, "max_age": 9, "max_msg_size": 100});
        check(both.clone(), json!({"max_msgs": 3, "max_age": 9, "max_msg_size": 7}), sum, &["max_msgs", "max_age"]);
        check(both, json!({"max_msgs": -1}), json!({}), &["max_msgs", "max_age", "max_msg_size"]);
        check(json!({"max_bytes": -1}), json!({"max_bytes": 5}), json!({"max_bytes": -1}), &[]);
    }
}
