//! The last events of the group, in memory. Pure.

use std::collections::VecDeque;

use serde::Serialize;
use serde_json::Value;

/// Events that are kept.
const MOST: usize = 200;
/// Characters of each text of one.
const LONGEST: usize = 600;
/// Fields that all events have.
const COMMON: [&str; 8] = ["kind", "replication", "site", "instance", "time", "type", "id", "timestamp"];

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct RecentEvent {
    /// Grows with each.
    pub number: u64,
    time: String,
    kind: String,
    replication: String,
    instance: String,
    /// Its other fields.
    text: String,
}

/// The last events, oldest first.
#[derive(Debug, Default)]
pub(super) struct RecentEvents {
    events: VecDeque<RecentEvent>,
    last: u64,
}

impl RecentEvents {
    /// Adds the body of an event; what is not one is ignored: everyone who may publish there can send anything.
    pub(super) fn push(&mut self, body: &[u8]) {
        let Ok(Value::Object(event)) = serde_json::from_slice(body) else { return };
        let text = |name: &str| event.get(name).and_then(Value::as_str).map(short);
        let (Some(kind), Some(replication), Some(time)) = (text("kind"), text("replication"), text("time")) else {
            return;
        };
        let mut fields = String::new();
        for (name, value) in event.iter().filter(|(name, _)| !COMMON.contains(&name.as_str())) {
            let between = if fields.is_empty() { "" } else { ", " };
            match value {
                Value::Null => continue,
                Value::String(value) => fields += &format!("{between}{}: {}", short(name), short(value)),
                value => fields += &format!("{between}{}: {}", short(name), short(&value.to_string())),
            }
            if fields.len() > LONGEST {
                break;
            }
        }
        self.last += 1;
        let instance = text("instance").unwrap_or_default();
        self.events.push_back(RecentEvent {
            number: self.last,
            time,
            kind,
            replication,
            instance,
            text: short(&fields),
        });
        self.events.drain(..self.events.len().saturating_sub(MOST));
    }

    /// Those after this number.
    pub(super) fn since(&self, number: u64) -> Vec<RecentEvent> {
        self.events.iter().filter(|event| event.number > number).cloned().collect()
    }
}

fn short(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(kind: &str) -> Value {
        json!({"kind": kind, "replication": "S", "site": "X", "instance": "i", "time": "2026"})
    }

    #[test]
    fn a_million_events_take_the_room_of_the_last() {
        let mut recent = RecentEvents::default();
        let mut long = event("held");
        long["message"] = "\u{e4}".repeat(10_000).into();
        let (long, short) = (long.to_string(), event("started").to_string());
        for number in 0..1_000_000 {
            recent.push(if number % 5_000 == 0 { long.as_bytes() } else { short.as_bytes() });
        }
        for _ in 0..2 * MOST {
            recent.push(long.as_bytes());
        }
        assert_eq!((recent.events.len(), recent.last), (MOST, 1_000_000 + 2 * MOST as u64));
        assert!(recent.events.capacity() <= 4 * MOST);
        let bytes: usize = recent.events.iter().map(|event| event.text.capacity()).sum();
        assert!(bytes <= MOST * LONGEST * 4, "{bytes}");
        assert_eq!(recent.since(recent.last - 3).len(), 3);
    }

    #[test]
    fn fields_become_one_text() {
        let mut recent = RecentEvents::default();
        let mut held = event("held");
        held["message"] = "<b>full</b>".into();
        held["source_seq"] = 7.into();
        held["to"] = Value::Null;
        recent.push(held.to_string().as_bytes());
        assert_eq!(recent.since(0)[0].text, "message: <b>full</b>, source_seq: 7");
        for garbage in ["", "5", "[]", "{}", r#"{"kind":"held","replication":5,"time":"2026"}"#] {
            recent.push(garbage.as_bytes());
        }
        assert_eq!(recent.last, 1);
    }
}
