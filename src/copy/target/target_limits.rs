//! The limits that a target needs to hold a copy of everything that the source can hold. Pure.
//!
//! A copy is larger than its source message: it carries provenance and chain or id, and its subject may be longer. So a
//! limit in bytes that is right for the source is too small for the target.

use nats_lane::{Error, jetstream::StreamInfo};
use serde_json::{Map, Value};

use crate::{
    config::{OnReject, Replication},
    copy::target::{drops, subjects},
    names,
};

/// Limits of a source that a target takes over if the source too keeps messages up to its limits.
const TAKEN_OVER: [&str; 4] = ["max_msgs", "max_bytes", "max_msgs_per_subject", "discard"];
/// The store's own bytes for a message without headers, at least: in memory 16, in a file 30.
const STORED: u64 = 16;
/// `NATS/1.0`, the empty line at the end, and the four bytes in which a file store keeps the length of headers.
const HEADER_BLOCK: u64 = 10 + 2 + 4;
/// `Nats-Expected-Last-Sequence` with the largest number, and `Nats-Msg-Id` with a hash.
const STAMP: u64 = (27 + 2 + 20 + 2) + (11 + 2 + 32 + 2);
/// Header lines of the source that are renamed, or whose value becomes longer. Only a message that has such lines,
/// which are longer than what is added to them, is that much larger.
const RENAMED: u64 = 8 * 10;
/// The longest name of a site.
const LONGEST_SITE: u64 = 128;
/// The server keeps `max_msg_size` in 32 bits.
const LARGEST_SIZE: u64 = i32::MAX as u64;

/// Whether a stream keeps messages up to its limits, and not until they are consumed.
pub(crate) fn limits(info: &StreamInfo) -> bool {
    matches!(info.text("retention"), "" | "limits")
}

/// How much larger than its source message a copy can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Overhead {
    /// Headers that every copy carries.
    headers: u64,
    /// Growth of its subject; `None` if that has no bound.
    subject: Option<u64>,
}

impl Overhead {
    fn of(replication: &Replication) -> Self {
        let length = |text: &str| text.len() as u64;
        let Replication { source, target, name, .. } = replication;
        // Without a name of its own it has the site's.
        let site = if replication.id == source.stream { length(name) } else { LONGEST_SITE };
        // Two numbers of up to 20 digits, blanks between the five words, and the end of the line.
        let provenance =
            length(names::SOURCE_HEADER) + 2 + length(&source.stream) + site + length(name) + 2 * 20 + 4 + 2;
        let expected = 20 + 2 + length(&target.stream) + 2;
        Self { headers: HEADER_BLOCK + STAMP + provenance + expected, subject: replication.mapping.growth() }
    }

    /// The growth that counts for `max_msg_size`: subjects do not count.
    fn of_size(self) -> u64 {
        self.headers + RENAMED
    }
}

/// A limit of a stream; `None` for no limit.
fn limit(stream: &StreamInfo, name: &str) -> Option<u64> {
    u64::try_from(stream.number(name)).ok().filter(|limit| *limit > 0)
}

/// The target's limit in bytes for a limit of the source, if at most so many messages count. Without a count, as
/// many messages as fit: each takes at least the store's own bytes and the shortest subject.
fn bytes_for_copies(replication: &Replication, source: &StreamInfo, max_bytes: u64) -> Option<u64> {
    let Overhead { headers, subject } = Overhead::of(replication);
    let shortest = source.subjects().iter().map(|subject| subject.len() as u64).min().unwrap_or(1);
    let fit = max_bytes / (STORED + shortest);
    let messages = limit(source, "max_msgs").map_or(fit, |max| max.min(fit));
    Some(max_bytes.saturating_add(messages.saturating_mul(headers + subject?)))
}

/// Size of the largest message of a source at the target; `None` if the source has no limit or it needs none.
fn size_for_copies(replication: &Replication, source: &StreamInfo) -> Option<u64> {
    let size = limit(source, "max_msg_size")? + Overhead::of(replication).of_size();
    Some(size).filter(|size| *size <= LARGEST_SIZE)
}

/// The largest copy of a message of so many bytes.
pub(crate) fn largest_copy(replication: &Replication, size: usize) -> usize {
    size.saturating_add(usize::try_from(Overhead::of(replication).of_size()).unwrap_or_default())
}

/// Puts the limits into the configuration of a target that is created. `apart` says whether messages of different
/// subjects keep different subjects there.
///
/// A source with `discard: new` refuses messages when it is full, until a message is removed. Removals are not copied,
/// so the copies of everything that it ever held would not fit: these limits are not taken over. Neither are the limits
/// of a work queue, which bound the waiting messages.
pub(in crate::copy) fn take_over(
    config: &mut Map<String, Value>,
    replication: &Replication,
    source: &StreamInfo,
    apart: bool,
) {
    let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
    if limit(source, "max_msg_size").is_some() {
        set("max_msg_size", size_for_copies(replication, source).map_or(Value::from(-1), Value::from));
    }
    if !limits(source) {
        return;
    }
    let refuses = source.text("discard") == "new";
    let of_subject = apart && !(refuses && source.flag("discard_new_per_subject"));
    for name in TAKEN_OVER {
        let taken = match name {
            "max_msgs" | "max_bytes" => !refuses,
            "max_msgs_per_subject" => of_subject,
            _ => true,
        };
        if let (true, Some(value)) = (taken, source.config.get(name)) {
            set(name, value.clone());
        }
    }
    if let (false, Some(max)) = (refuses, limit(source, "max_bytes")) {
        let bytes = bytes_for_copies(replication, source, max).and_then(|bytes| i64::try_from(bytes).ok());
        set("max_bytes", bytes.unwrap_or(-1).into());
    }
}

/// Error codes of a stream whose `max_bytes` an account or a server has no room for, or that needs one.
const NO_ROOM: [u32; 6] = [10002, 10023, 10028, 10047, 10113, 10122];
/// A copy is at most this many times as large as its message, unless messages are tiny.
const COPIES_TAKE: i64 = 4;

/// Whether a stream was refused for its reservation of storage.
pub(in crate::copy) fn is_about_room(error: &Error) -> bool {
    NO_ROOM.iter().any(|code| error.is_api(*code))
}

/// The reservation of a created target: a server sets `max_bytes` aside. After a refusal the next one is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) enum Room {
    /// The size of all copies of a full source, see [`take_over`].
    Copies,
    /// No `max_bytes`: nothing is set aside.
    Unbounded,
    /// A multiple of the bytes of the source, for accounts that require a bound. No message may be dropped that the
    /// source keeps, so a full target refuses, and the replication gets the state `held`.
    Times,
    /// The bytes of the source, with the same effect.
    Source,
}

impl Room {
    /// The next reservation to try after a refusal; `None` after the last.
    pub(in crate::copy) fn next(self, source: &StreamInfo) -> Option<Self> {
        let bounded = limit(source, "max_bytes").is_some();
        match self {
            Self::Copies => Some(Self::Unbounded),
            Self::Unbounded => bounded.then_some(Self::Times),
            Self::Times => Some(Self::Source),
            Self::Source => None,
        }
    }

    pub(in crate::copy) fn reserve(self, config: &mut Value, source: &StreamInfo) {
        let bytes = source.number("max_bytes");
        let max_bytes = match self {
            Self::Copies => return,
            Self::Unbounded => -1,
            Self::Times => bytes.saturating_mul(COPIES_TAKE),
            Self::Source => bytes,
        };
        config["max_bytes"] = max_bytes.into();
        if self != Self::Unbounded {
            config["discard"] = "new".into();
        }
    }
}

/// Limits of an existing target that remove or refuse copies of messages that the source keeps, with both numbers.
pub(crate) fn too_small(replication: &Replication, source: &StreamInfo, target: &StreamInfo) -> Vec<String> {
    // Messages that consumers remove are gone on either side, whatever the limits are.
    if !limits(source) || !limits(target) {
        return Vec::new();
    }
    let refuses = target.text("discard") == "new";
    let mut found = Vec::new();
    let mut check = |name: &str, needed: Option<u64>, has: &str, refuses: bool, show: fn(u64) -> String| {
        let Some(at_target) = limit(target, name).filter(|limit| needed.is_none_or(|needed| *limit < needed)) else {
            return;
        };
        let does = if refuses { "refuses copies of" } else { "removes copies of" };
        let needs = needed.map_or_else(|| format!("{has} no limit"), |needed| format!("{has} {}", show(needed)));
        found.push(format!("`{name}` is {} and {needs}: it {does} messages that the source keeps", show(at_target)));
    };
    let source_has = "that of the source is";
    let source_is = |limit: Option<u64>| if limit.is_some() { source_has } else { "the source has" };
    let age = limit(source, "max_age");
    check("max_age", age, source_is(age), false, |ns| format!("{:?}", std::time::Duration::from_nanos(ns)));
    let count = limit(source, "max_msgs");
    check("max_msgs", count, source_is(count), refuses, |count| count.to_string());
    let of_subject = limit(source, "max_msgs_per_subject");
    let refuses_subject = refuses && target.flag("discard_new_per_subject");
    if subjects::stay_apart(replication, source) {
        let has = source_is(of_subject);
        check("max_msgs_per_subject", of_subject, has, refuses_subject, |count| count.to_string());
    } else {
        let has = "subjects of the source become one, which has";
        check("max_msgs_per_subject", None, has, refuses_subject, |count| count.to_string());
    }
    match limit(source, "max_bytes") {
        None => check("max_bytes", None, "the source has", refuses, |bytes| format!("{bytes} bytes")),
        Some(max) => {
            let needed = bytes_needed(replication, source, max);
            let has = format!("that of the source is {max} bytes, for whose copies it needs");
            check("max_bytes", Some(needed), &has, refuses, |bytes| format!("{bytes} bytes"));
        }
    }
    found
}

/// The size of the copies of messages of the present size in the source; for an empty source, the largest possible
/// size.
fn bytes_needed(replication: &Replication, source: &StreamInfo, max_bytes: u64) -> u64 {
    let Overhead { headers, subject } = Overhead::of(replication);
    let state = &source.state;
    let fit = u128::from(max_bytes) * u128::from(state.messages) / u128::from(state.bytes.max(1));
    if state.messages == 0 {
        return bytes_for_copies(replication, source, max_bytes).unwrap_or(max_bytes);
    }
    let messages = u64::try_from(fit).unwrap_or(u64::MAX);
    let messages = limit(source, "max_msgs").map_or(messages, |max| max.min(messages));
    max_bytes.saturating_add(messages.saturating_mul(headers + subject.unwrap_or(0)))
}

/// The limits that can remove copies at the target of messages that the source keeps; `None` if none can. `whole` says
/// that the target gets all messages of the source and no others.
pub(in crate::copy) fn that_drop(
    replication: &Replication,
    source: &StreamInfo,
    target: &StreamInfo,
    whole: bool,
) -> Option<drops::DropLimits> {
    if !limits(source) || !limits(target) {
        return None;
    }
    let smaller = |name: &str| {
        let at_target = limit(target, name);
        at_target.is_some_and(|at_target| limit(source, name).is_none_or(|at_source| at_target < at_source))
    };
    let removes = target.text("discard") != "new";
    let bound = |name: &str| limit(target, name).filter(|_| removes);
    let merged = limit(target, "max_msgs_per_subject").is_some() && !subjects::stay_apart(replication, source);
    let per_subject = smaller("max_msgs_per_subject") || merged;
    let (age, messages, bytes) = (smaller("max_age"), bound("max_msgs"), bound("max_bytes"));
    let shown = [
        age.then(|| {
            format!("`max_age` {:?}", std::time::Duration::from_nanos(target.number("max_age").unsigned_abs()))
        }),
        messages.map(|limit| format!("`max_msgs` {limit}")),
        bytes.map(|limit| format!("`max_bytes` {limit}")),
        per_subject.then(|| format!("`max_msgs_per_subject` {}", target.number("max_msgs_per_subject"))),
    ];
    let words: Vec<_> = shown.into_iter().flatten().collect();
    (!words.is_empty()).then(|| drops::DropLimits {
        age,
        messages,
        bytes,
        per_subject: per_subject && whole,
        words: format!("limits of target stream `{}`: {}", replication.target.stream, words.join(", ")),
    })
}

/// The handling of a message that is too large for the target, in words.
pub(crate) fn fate_of_too_large(on_reject: &OnReject) -> String {
    match on_reject {
        OnReject::Hold => "the copy stops at one that is larger".to_owned(),
        OnReject::Skip => "one that is larger is skipped".to_owned(),
        OnReject::DeadLetter { subject } => format!("one that is larger goes to `{subject}`"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    fn of_new(fields: Value, source: Value, apart: bool) -> Value {
        let mut config = Map::new();
        take_over(&mut config, &replication(fields), &stream(source), apart);
        Value::Object(config)
    }

    #[test]
    fn the_overhead_covers_the_longest_header_block() {
        use crate::copy::target::{
            headers::{Allowed, Passage, Stamp, header_block},
            provenance::{MessageOrigin, Tag},
        };
        let id = "f".repeat(32);
        let passage = Passage {
            origin: MessageOrigin { seq: u64::MAX, time_ms: i64::MAX },
            age_secs: 0,
            stamp: Stamp { chain: Some(u64::MAX), id: Some(&id) },
            expected_stream: Some("S"),
        };
        let mut out = Vec::new();
        header_block(&mut out, b"", Allowed::default(), &Tag::new("S", "SITE", "SITE"), &passage);
        let overhead = Overhead::of(&replication(json!({})));
        let (most, real) = (overhead.headers, out.len() as u64 + 4);
        assert!(most >= real && most <= real + 8, "{most} for {real}");
        assert!(Overhead::of(&replication(json!({"name": "W"}))).headers > most, "the site may be longer");
    }

    #[test]
    fn a_byte_limit_is_widened_by_what_all_copies_add() {
        let one = Overhead::of(&replication(json!({}))).headers;
        let source = json!({"subjects": ["a.>", "abcd"], "max_bytes": 1_900, "max_msgs": -1, "discard": "old"});
        let made = of_new(json!({}), source.clone(), true);
        assert_eq!(made["max_bytes"], 1_900 + 1_900 / (16 + 3) * one);
        let few = of_new(json!({}), json!({"subjects": ["a"], "max_bytes": 1_900, "max_msgs": 2}), true);
        assert_eq!((&few["max_bytes"], &few["max_msgs"]), (&json!(1_900 + 2 * one), &json!(2)));
        let prefixed = of_new(json!({"target_subject_prefix": "east"}), source.clone(), true);
        assert_eq!(prefixed["max_bytes"], 1_900 + 100 * (one + 5));
        // How long a subject becomes is not known.
        let transforms = json!([{"src": "a.*", "dest": "a.{{wildcard(1)}}.{{wildcard(1)}}"}]);
        assert_eq!(of_new(json!({"subject_transforms": transforms}), source, true)["max_bytes"], -1);
        assert_eq!(of_new(json!({}), json!({"subjects": ["a"], "max_bytes": -1}), true)["max_bytes"], -1);
        assert_eq!(of_new(json!({}), json!({"max_bytes": i64::MAX}), true)["max_bytes"], -1);
    }

    #[test]
    fn a_size_gets_room_for_what_is_added() {
        let added = Overhead::of(&replication(json!({}))).of_size();
        assert_eq!(of_new(json!({}), json!({"max_msg_size": 100}), true)["max_msg_size"], 100 + added);
        assert_eq!(of_new(json!({}), json!({"max_msg_size": i32::MAX}), true)["max_msg_size"], -1);
        assert_eq!(of_new(json!({}), json!({"max_msg_size": -1}), true).get("max_msg_size"), None);
        let queue = json!({"max_msg_size": 100, "max_bytes": 5, "retention": "workqueue"});
        assert_eq!(of_new(json!({}), queue, true), json!({"max_msg_size": 100 + added}));
    }

    #[test]
    fn limits_that_refuse_are_left_out() {
        let bucket = json!({"max_msgs": 5, "max_bytes": 100, "max_msgs_per_subject": 3, "discard": "new"});
        assert_eq!(of_new(json!({}), bucket.clone(), true), json!({"max_msgs_per_subject": 3, "discard": "new"}));
        assert_eq!(of_new(json!({}), bucket.clone(), false), json!({"discard": "new"}));
        let mut per_subject = bucket;
        per_subject["discard_new_per_subject"] = true.into();
        assert_eq!(of_new(json!({}), per_subject, true), json!({"discard": "new"}));
    }

    #[test]
    fn a_reservation_that_does_not_fit_is_followed_by_another_one() {
        let tried = |source: Value| {
            let (source, mut room, mut tried) = (stream(source), Some(Room::Copies), Vec::new());
            while let Some(now) = room {
                let mut config = json!({"max_bytes": 900, "discard": "old"});
                now.reserve(&mut config, &source);
                tried.push((config["max_bytes"].as_i64().unwrap(), config["discard"].as_str().unwrap().to_owned()));
                room = now.next(&source);
            }
            tried
        };
        let expect = |list: &[(i64, &str)]| list.iter().map(|(max, how)| (*max, (*how).to_owned())).collect::<Vec<_>>();
        let all = [(900, "old"), (-1, "old"), (400, "new"), (100, "new")];
        assert_eq!(tried(json!({"max_bytes": 100})), expect(&all));
        assert_eq!(tried(json!({})), expect(&all[..2]));
        let refusal = |err_code| Error::from(nats_lane::ApiError { code: 400, err_code, ..Default::default() });
        assert!(is_about_room(&refusal(10047)) && is_about_room(&refusal(10113)) && !is_about_room(&refusal(10065)));
    }

    #[test]
    fn a_target_that_keeps_less_is_found_with_both_numbers() {
        let check = |fields: Value, source: Value, target: Value, expect: &[&str]| {
            let found = too_small(&replication(fields), &stream(source.clone()), &stream(target.clone()));
            assert_eq!(found.len(), expect.len(), "{source} {target}: {found:?}");
            assert!(found.iter().zip(expect).all(|(found, words)| found.contains(words)), "{found:?}");
        };
        let none = json!({});
        check(none.clone(), json!({"max_msgs": 5}), json!({"max_msgs": 5}), &[]);
        check(
            none.clone(),
            json!({"max_msgs": 5}),
            json!({"max_msgs": 4}),
            &["`max_msgs` is 4 and that of the source is 5"],
        );
        check(
            none.clone(),
            json!({}),
            json!({"max_msgs": 4, "discard": "new"}),
            &["the source has no limit: it refuses"],
        );
        let second = 1_000_000_000_u64;
        check(
            none.clone(),
            json!({"max_age": 2 * second}),
            json!({"max_age": second}),
            &["`max_age` is 1s and that of the source is 2s"],
        );
        check(none.clone(), json!({"max_age": second}), json!({"max_age": second}), &[]);
        check(
            none.clone(),
            json!({"max_bytes": 500}),
            json!({"max_bytes": 500}),
            &["`max_bytes` is 500 bytes and that of the source is 500"],
        );
        check(none.clone(), json!({"max_bytes": 500}), json!({"max_bytes": -1}), &[]);
        check(
            none.clone(),
            json!({"max_msgs_per_subject": 5}),
            json!({"max_msgs_per_subject": 1}),
            &["is 1 and that of the source is 5"],
        );
        check(none.clone(), json!({"retention": "workqueue"}), json!({"max_msgs": 1}), &[]);
        check(none, json!({}), json!({"max_msgs": 1, "retention": "interest"}), &[]);
        let merges = json!({"subject_transforms": [{"src": "a.*", "dest": "b"}]});
        let bucket = json!({"subjects": ["a.*"], "max_msgs_per_subject": 1});
        check(merges, bucket.clone(), bucket, &["`max_msgs_per_subject` is 1 and subjects of the source become one"]);
    }
}
