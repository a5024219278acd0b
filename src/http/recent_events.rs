//! The last events of the group, in memory. Pure.

use std::collections::{HashSet, VecDeque};

use serde::Serialize;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

/// Events that are kept.
pub(super) const MOST: usize = 200;
/// Characters of each text of one.
const LONGEST: usize = 600;
/// Bytes of an event that is kept as it is.
const LONGEST_BODY: usize = 4_096;
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

/// The last events, oldest first. They are read when they are shown: a flood of them costs next to nothing while there are no
/// viewers, and does not pile up in front of this.
#[derive(Debug, Default)]
pub(super) struct RecentEvents {
    events: VecDeque<KeptEvent>,
    last: u64,
    /// Hashes of those that were read from a stream: the newest of them may arrive once more.
    earlier: HashSet<u64>,
}

#[derive(Debug)]
enum KeptEvent {
    /// As it was published, with its number.
    Raw(u64, Box<[u8]>),
    /// Read and cut, because it is long, and the hash of its body.
    Short(RecentEvent, u64),
}

impl KeptEvent {
    /// Of the body as it was published.
    fn hash(&self) -> u64 {
        match self {
            Self::Raw(_, body) => xxh3_64(body),
            Self::Short(_, hash) => *hash,
        }
    }
}

impl RecentEvents {
    /// Adds the body of an event.
    pub(super) fn push(&mut self, body: &[u8]) {
        if !self.earlier.is_empty() && self.earlier.remove(&xxh3_64(body)) {
            return;
        }
        self.append(body);
    }

    /// Puts events that were read from a stream, oldest first, before those that arrived meanwhile. All get new numbers.
    pub(super) fn put_before(&mut self, earlier: &[impl AsRef<[u8]>]) {
        self.earlier = earlier.iter().map(|body| xxh3_64(body.as_ref())).collect();
        let arrived = std::mem::take(&mut self.events);
        earlier.iter().for_each(|body| self.append(body.as_ref()));
        for mut event in arrived {
            if self.earlier.remove(&event.hash()) {
                continue;
            }
            self.last += 1;
            match &mut event {
                KeptEvent::Raw(number, _) => *number = self.last,
                KeptEvent::Short(event, _) => event.number = self.last,
            }
            self.events.push_back(event);
        }
        self.forget_oldest();
    }

    fn forget_oldest(&mut self) {
        self.events.drain(..self.events.len().saturating_sub(MOST));
    }

    fn append(&mut self, body: &[u8]) {
        let number = self.last + 1;
        let kept = match body.len() {
            ..=LONGEST_BODY => KeptEvent::Raw(number, body.into()),
            _ => match read(number, body) {
                Some(event) => KeptEvent::Short(event, xxh3_64(body)),
                None => return,
            },
        };
        self.last = number;
        self.events.push_back(kept);
        self.forget_oldest();
    }

    /// Those after this number. What is no event is ignored: everyone who may publish there can send anything.
    pub(super) fn since(&self, number: u64) -> Vec<RecentEvent> {
        let newer = self.events.iter().rev().map_while(|kept| match kept {
            KeptEvent::Raw(at, body) => (*at > number).then(|| read(*at, body)),
            KeptEvent::Short(event, _) => (event.number > number).then(|| Some(event.clone())),
        });
        let mut newer: Vec<_> = newer.flatten().collect();
        newer.reverse();
        newer
    }
}

/// The event that a body is; `None` if it is none.
fn read(number: u64, body: &[u8]) -> Option<RecentEvent> {
    let Ok(Value::Object(event)) = serde_json::from_slice(body) else { return None };
    let text = |name: &str| event.get(name).and_then(Value::as_str).map(short);
    let (kind, replication, time) = (text("kind")?, text("replication")?, text("time")?);
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
    let instance = text("instance").unwrap_or_default();
    Some(RecentEvent { number, time, kind, replication, instance, text: short(&fields) })
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
        let bytes = |kept: &KeptEvent| match kept {
            KeptEvent::Raw(_, body) => body.len(),
            KeptEvent::Short(event, _) => event.text.capacity(),
        };
        assert!(recent.events.iter().all(|kept| bytes(kept) <= LONGEST_BODY));
        assert_eq!(recent.since(recent.last - 3).len(), 3);
    }

    #[test]
    fn earlier_events_come_first_and_once() {
        earlier_come_first_and_once(0);
    }

    #[test]
    fn long_earlier_events_come_first_and_once() {
        earlier_come_first_and_once(2 * LONGEST_BODY);
    }

    fn earlier_come_first_and_once(padding: usize) {
        let body = |number: usize| {
            let mut event = event("held");
            (event["message"], event["note"]) = (number.to_string().into(), "x".repeat(padding).into());
            event.to_string().into_bytes()
        };
        let mut recent = RecentEvents::default();
        // 3 arrived before the stream was read, 4 is in it and arrives after that.
        [3, 5].into_iter().for_each(|number| recent.push(&body(number)));
        recent.put_before(&[1, 2, 3, 4].map(body));
        [4, 6].into_iter().for_each(|number| recent.push(&body(number)));
        let shown = recent.since(0);
        let texts: Vec<_> = shown.iter().filter_map(|event| event.text.split(',').next()).collect();
        assert_eq!(texts, [1, 2, 3, 4, 5, 6].map(|number| format!("message: {number}")));
        assert!(shown.windows(2).all(|pair| pair[0].number < pair[1].number));
        recent.put_before(&(0..2 * MOST).map(body).collect::<Vec<_>>());
        assert_eq!(recent.since(0).len(), MOST);
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
        assert_eq!(recent.since(0).len(), 1);
    }
}
