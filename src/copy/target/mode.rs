//! Other writers to the target stream: the mode that a run begins in, and the consequence of messages of other writers.
//! Pure.
//!
//! The document takes precedence over the record, and the record over the facts about the target. A stream with sources
//! or `subject_delete_marker_ttl` cannot have one writer, because the server itself stores messages in it; nor can a
//! stream whose messages are consumed.

use nats_lane::jetstream::StreamInfo;

use crate::{
    config::{Replication, Sharing},
    events::Event,
    status::TargetMode,
    store::{PositionRecord, Stamps},
};

/// A message at the target that is not of this replication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::copy) struct Foreign {
    /// Target sequence.
    pub seq: u64,
    /// Its subject.
    pub subject: String,
}

/// Which headers the messages of earlier runs carry that may still be in flight, as far as is known. `newest` are
/// those of the newest message at the target, `broke` whether the chain of the run before broke: then none of its
/// messages fits any more, unless the newest one is of a chain.
pub(in crate::copy) fn stamps_before(record: &PositionRecord, newest: Option<Stamps>, broke: bool) -> Option<Stamps> {
    // Records of older versions lack it. Then only the newest message at the target is evidence, and an id is no
    // proof: it may be that of another writer, unless the target was shared.
    let shared = record.target_mode == TargetMode::Shared;
    let ids = record.stamps.map_or(newest == Some(Stamps::Ids) && shared, Stamps::has_ids);
    let chain = newest == Some(Stamps::Chain) || !broke && record.stamps.is_some_and(Stamps::has_chain);
    match (chain, ids) {
        (true, true) => Some(Stamps::Both),
        (true, false) => Some(Stamps::Chain),
        (false, true) => Some(Stamps::Ids),
        (false, false) => None,
    }
}

/// Why this stream cannot have a single writer; `None` if it can.
pub(crate) fn obstacle(target: &StreamInfo) -> Option<String> {
    let retention = target.text("retention");
    if target.has("sources") {
        Some("it has sources, which write to it".to_owned())
    } else if target.number("subject_delete_marker_ttl") > 0 {
        Some("it writes delete markers (`subject_delete_marker_ttl`)".to_owned())
    } else if !matches!(retention, "" | "limits") {
        Some(format!("it has {retention} retention: copies may be removed at any time"))
    } else {
        None
    }
}

/// The mode by the document and the stream alone, or why they exclude each other.
pub(crate) fn mode(replication: &Replication, target: &StreamInfo) -> Result<TargetMode, String> {
    match (replication.target_mode, obstacle(target)) {
        (Sharing::Shared, _) | (Sharing::Auto, Some(_)) => Ok(TargetMode::Shared),
        (_, None) => Ok(TargetMode::Exclusive),
        (Sharing::Exclusive, Some(why)) => Err(format!(
            "target stream `{}` cannot be exclusive: {why}; set `target_mode` to `auto` or `shared`",
            replication.target.stream
        )),
    }
}

/// The mode that a run begins in, and the event if that is news. `neighbour` is another replication of this service
/// that writes to the same stream.
pub(in crate::copy) fn begin(
    replication: &Replication,
    target: &StreamInfo,
    record: &PositionRecord,
    neighbour: Option<&str>,
) -> (TargetMode, Option<Event>) {
    let reason = match replication.target_mode {
        Sharing::Shared => return (TargetMode::Shared, None),
        Sharing::Exclusive => return (TargetMode::Exclusive, None),
        Sharing::Auto if record.target_mode == TargetMode::Shared => return (TargetMode::Shared, None),
        Sharing::Auto => obstacle(target)
            .or_else(|| neighbour.map(|id| format!("replication `{id}` of this service writes to it too"))),
    };
    let Some(reason) = reason else { return (TargetMode::Exclusive, None) };
    // A first start has no mode that could change.
    let news = record.source.is_some().then_some(Event::TargetShared { target_seq: None, reason });
    (TargetMode::Shared, news)
}

/// The event when a message of another writer is found in mode `auto`.
pub(in crate::copy) fn turned_shared(foreign: &Foreign) -> Event {
    let reason = format!("message {} on `{}` is not of this replication", foreign.seq, foreign.subject);
    Event::TargetShared { target_seq: Some(foreign.seq), reason }
}

/// Messages of other writers for which an exclusive replication is in state `held`.
#[derive(Debug, Default)]
pub(in crate::copy) struct Intruders {
    /// The first one that was found; it is named until the others have stopped.
    named: Option<Foreign>,
    /// The newest of the known ones.
    through: u64,
}

impl Intruders {
    /// Handles the newest message of another writer that a poll of the target found. Returns the reason for the state
    /// `held`; `None` if no other writer has written since the poll before.
    pub fn found(&mut self, stream: &str, newest: Foreign) -> Option<String> {
        if newest.seq <= self.through {
            self.named = None;
            return None;
        }
        self.through = newest.seq;
        let Foreign { seq, subject } = self.named.get_or_insert(newest);
        Some(format!(
            "another writer publishes to target stream `{stream}`, which is exclusive by `target_mode`: message {seq} on \
             `{subject}` is not of this replication; stop that writer, or set `target_mode` to `shared`"
        ))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config;

    fn replication(mode: &str) -> Replication {
        let document = json!({"stream": "S", "source_url": "a", "target_url": "b", "target_mode": mode});
        config::parse_value(&document, "SITE").unwrap()
    }

    fn stream(config: Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    fn record(mode: &str, seq: Option<u64>) -> PositionRecord {
        let source = seq.map(|seq| json!({"seq": seq, "time_ns": 1, "created": ""}));
        let record = json!({"version": 1, "epoch": 1, "holder": "a", "nonce": 1, "source": source, "target": null,
            "target_mode": mode, "status": null});
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn some_streams_cannot_be_exclusive() {
        let check = |config: Value, word: Option<&str>| {
            let target = stream(config.clone());
            let auto = if word.is_some() { TargetMode::Shared } else { TargetMode::Exclusive };
            assert_eq!(mode(&replication("auto"), &target), Ok(auto), "{config}");
            assert_eq!(mode(&replication("shared"), &target), Ok(TargetMode::Shared), "{config}");
            match (mode(&replication("exclusive"), &target), word) {
                (Ok(TargetMode::Exclusive), None) => {}
                (Err(why), Some(word)) => assert!(why.contains(word) && why.contains("stream `S`"), "{why}"),
                other => panic!("{config}: {other:?}"),
            }
        };
        check(json!({}), None);
        check(json!({"retention": "limits", "sources": [], "subject_delete_marker_ttl": 0}), None);
        check(json!({"sources": [{"name": "X"}]}), Some("sources"));
        check(json!({"subject_delete_marker_ttl": 1_000_000_000}), Some("delete markers"));
        check(json!({"retention": "interest"}), Some("interest retention"));
        check(json!({"retention": "workqueue"}), Some("workqueue retention"));
    }

    #[test]
    fn the_document_precedes_the_record_and_it_the_rest() {
        let check =
            |document: &str, record: &PositionRecord, neighbour: Option<&str>, expect: TargetMode, told: bool| {
                let (mode, event) = begin(&replication(document), &stream(json!({})), record, neighbour);
                assert_eq!((mode, event.is_some()), (expect, told), "{document} {neighbour:?} {event:?}");
            };
        use TargetMode::{Exclusive, Shared};
        let (new, exclusive, shared) =
            (record("exclusive", None), record("exclusive", Some(5)), record("shared", Some(5)));
        check("auto", &new, None, Exclusive, false);
        check("auto", &exclusive, None, Exclusive, false);
        check("auto", &shared, None, Shared, false);
        check("auto", &shared, Some("B"), Shared, false);
        // Only a change is news.
        check("auto", &new, Some("B"), Shared, false);
        check("auto", &exclusive, Some("B"), Shared, true);
        check("exclusive", &shared, Some("B"), Exclusive, false);
        check("shared", &exclusive, None, Shared, false);
        let sources = stream(json!({"sources": [{"name": "X"}]}));
        let (mode, event) = begin(&replication("auto"), &sources, &exclusive, None);
        assert_eq!(mode, Shared);
        assert!(matches!(event, Some(Event::TargetShared { target_seq: None, reason }) if reason.contains("sources")));
    }

    #[test]
    fn an_exclusive_replication_is_held_until_nobody_else_writes() {
        let mut intruders = Intruders::default();
        let mut found = |seq, subject: &str| intruders.found("T", Foreign { seq, subject: subject.to_owned() });
        let text = found(5, "a.b").unwrap();
        assert!(
            text.contains("`T`") && text.contains("message 5 on `a.b`") && text.contains("`target_mode`"),
            "{text}"
        );
        // The same words, so that they are reported once.
        assert_eq!(found(9, "c"), Some(text));
        assert_eq!(found(9, "c"), None);
        assert_eq!(found(7, "c"), None);
        assert!(found(12, "d").unwrap().contains("message 12 on `d`"));
    }
}
