//! What Choria's replicator knows of senders: in its state files, and in the gossip of its instances. Its times are those
//! at which it handled a message.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize};

/// Prefix of the subjects on which the instances of a group publish the senders that they saw.
pub const GOSSIP_PREFIX: &str = "choria.stream-replicator.sync.";

/// One sender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrackedSender {
    /// When its newest message was handled.
    pub seen: DateTime<Utc>,
    /// When a message of it was copied last; year 1 if none was.
    #[serde(default)]
    pub copied: DateTime<Utc>,
    /// Whether its `timeout` advisory was published, and it has not been seen since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub advised: bool,
    /// Bytes of the payload of its newest message.
    #[serde(default, deserialize_with = "whole")]
    pub size: u64,
    /// The sender; empty in a state file, where it is the key.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub value: String,
}

/// A number of bytes; the Go program has it as a floating point number.
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    f64::deserialize(deserializer).map(|bytes| bytes.max(0.0) as u64)
}

/// What the Go program writes for no time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// The time that stands for none.
pub fn no_time() -> DateTime<Utc> {
    NEVER.parse().unwrap_or(DateTime::<Utc>::MIN_UTC)
}

impl TrackedSender {
    /// When a message of it was copied last, if one was.
    pub fn copied(&self) -> Option<DateTime<Utc>> {
        (self.copied > no_time()).then_some(self.copied)
    }

    /// When it was seen, if it was.
    pub fn seen(&self) -> Option<DateTime<Utc>> {
        (self.seen > no_time()).then_some(self.seen)
    }
}

/// The senders of a state file, by name.
pub fn read_state(file: &[u8]) -> Result<BTreeMap<String, TrackedSender>, serde_json::Error> {
    #[derive(Deserialize)]
    struct SenderItems {
        #[serde(default, rename = "Items")]
        items: Option<BTreeMap<String, TrackedSender>>,
    }
    serde_json::from_slice::<SenderItems>(file).map(|file| file.items.unwrap_or_default())
}

/// A state file, written sender by sender: there may be a million of them.
#[derive(Debug)]
pub struct StateFileText {
    text: Vec<u8>,
    senders: usize,
}

impl Default for StateFileText {
    fn default() -> Self {
        Self { text: b"{\"Items\":{".to_vec(), senders: 0 }
    }
}

impl StateFileText {
    /// Adds a sender; its `value` is the key.
    pub fn add(&mut self, sender: TrackedSender) {
        if self.senders > 0 {
            self.text.push(b',');
        }
        self.senders += 1;
        let (key, sender) = (sender.value.clone(), TrackedSender { value: String::new(), ..sender });
        // Writing to memory does not fail.
        let _ = serde_json::to_writer(&mut self.text, &key);
        self.text.push(b':');
        let _ = serde_json::to_writer(&mut self.text, &sender);
    }

    /// The whole text; `None` without a sender: then there is no file.
    pub fn end(mut self) -> Option<Vec<u8>> {
        self.text.extend_from_slice(b"}}");
        (self.senders > 0).then_some(self.text)
    }
}

/// The subject on which instances publish the senders of an entry that they saw.
pub fn gossip_subject(stream: &str, entry: &str) -> String {
    format!("{GOSSIP_PREFIX}{stream}.{entry}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the Go program wrote it.
    const FILE: &str = r#"{"Items":{"n1.example.net":{"seen":"2026-11-29T09:48:32.522283932Z","copied":"2026-11-29T10:48:30.5+01:00","advised":true,"size":39},"n2":{"seen":"2026-11-29T09:48:33Z","copied":"0001-01-01T00:00:00Z","size":1024.5}}}"#;

    #[test]
    fn a_state_file_is_read_and_written_as_the_go_program_does() {
        let senders = read_state(FILE.as_bytes()).unwrap();
        let (one, two) = (&senders["n1.example.net"], &senders["n2"]);
        assert_eq!((one.size, one.advised, one.copied()), (39, true, "2026-11-29T09:48:30.5Z".parse().ok()));
        assert_eq!((two.size, two.advised, two.copied()), (1024, false, None));
        let mut text = StateFileText::default();
        for (value, sender) in senders {
            text.add(TrackedSender { value, ..sender });
        }
        let text = String::from_utf8(text.end().unwrap()).unwrap();
        let expect = FILE.replace("2026-11-29T10:48:30.5+01:00", "2026-11-29T09:48:30.500Z").replace("1024.5", "1024");
        assert_eq!(text, expect);
        assert_eq!(StateFileText::default().end(), None);
    }

    #[test]
    fn gossip_names_its_sender() {
        let gossip = r#"{"seen":"2026-11-29T09:48:32.5Z","copied":"0001-01-01T00:00:00Z","size":19,"value":"alive"}"#;
        let sender: TrackedSender = serde_json::from_str(gossip).unwrap();
        assert_eq!((sender.value.as_str(), sender.size, sender.copied()), ("alive", 19, None));
        let again = serde_json::to_string(&sender).unwrap();
        assert_eq!(again, gossip.replace("32.5Z", "32.500Z"));
        assert_eq!(gossip_subject("SAMP", "P1"), "choria.stream-replicator.sync.SAMP.P1");
    }

    #[test]
    fn what_is_no_state_file_is_refused() {
        for text in ["", r#"{"Items":[]}"#, r#"{"Items":{"a":{"seen":"x"}}}"#] {
            assert!(read_state(text.as_bytes()).is_err(), "{text}");
        }
        assert!(read_state(b"{}").unwrap().is_empty() && read_state(br#"{"Items":null}"#).unwrap().is_empty());
    }
}
