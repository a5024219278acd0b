//! The sender of a message, and whether the message demands to be copied.

use std::borrow::Cow;

use nats_lane::{Message, headers};
use xxhash_rust::xxh3::xxh3_128;

use super::path::Path;
use crate::config::{self, Inspect};

/// Longest value of a sender, bytes. A longer one counts as no value: its messages are copied.
pub const MAX_VALUE: usize = 1024;
/// Longest value, bytes, that is stored unchanged. For a longer one its first bytes and a hash are stored.
pub const MAX_STORED: usize = 256;
/// Number of these first bytes.
const BEGINNING: usize = 96;

/// Inspects messages by the document of one replication.
#[derive(Debug, Clone)]
pub struct Inspector {
    place: SenderPath,
    force: Option<Path>,
    as_choria: bool,
}

#[derive(Debug, Clone)]
enum SenderPath {
    Field(Path),
    Header(String),
    /// Counted from 0.
    Token(usize),
    Subject,
}

impl Inspector {
    /// For the messages of one replication.
    pub fn new(sampling: &config::Sampling) -> Self {
        let place = match &sampling.inspect {
            Inspect::Field(path) => SenderPath::Field(Path::new(path)),
            Inspect::Header(name) => SenderPath::Header(name.clone()),
            Inspect::Token(token) => SenderPath::Token(token.saturating_sub(1)),
            Inspect::Subject => SenderPath::Subject,
        };
        let force = sampling.force_field.as_deref().map(Path::new);
        Self { place, force, as_choria: sampling.as_choria }
    }

    /// The sender, if the message names one: not empty, valid UTF-8 of up to [`MAX_VALUE`] bytes; in its stored form.
    pub fn sender<'a>(&self, message: &Message<'a>) -> Option<Cow<'a, str>> {
        let text = |bytes: &'a [u8]| std::str::from_utf8(bytes).ok().map(Cow::Borrowed);
        let value = match &self.place {
            SenderPath::Field(path) if self.as_choria => path.any_text(message.payload),
            SenderPath::Field(path) => path.text(message.payload),
            SenderPath::Header(name) => {
                headers::lines(message.header).find_map(|line| headers::value_of(line, name.as_bytes())).and_then(text)
            }
            SenderPath::Token(token) => message.subject.split(|byte| *byte == b'.').nth(*token).and_then(text),
            SenderPath::Subject => text(message.subject),
        };
        let value = value.filter(|value| !value.is_empty() && value.len() <= MAX_VALUE)?;
        Some(shortened(&value).map_or(value, Cow::Owned))
    }

    /// Whether the field that forces a copy is true; by the rules of Choria's replicator, whether it exists.
    pub fn forced(&self, payload: &[u8]) -> bool {
        let by_field = |path: &Path| if self.as_choria { path.exists(payload) } else { path.is_true(payload) };
        self.force.as_ref().is_some_and(by_field)
    }
}

/// The stored form of a value longer than [`MAX_STORED`]: its first bytes, three dots and a hash of all of it.
pub fn shortened(value: &str) -> Option<String> {
    if value.len() <= MAX_STORED {
        return None;
    }
    let end = (0..=BEGINNING).rev().find(|end| value.is_char_boundary(*end)).unwrap_or_default();
    Some(format!("{}...{:032x}", &value[..end], xxh3_128(value.as_bytes())))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sender(inspect: Inspect, subject: &str, header: &[u8], payload: &[u8]) -> Option<String> {
        let sampling = config::Sampling {
            inspect,
            every: Duration::from_secs(1),
            warn: Duration::from_secs(1),
            size_trigger: None,
            force_field: None,
            advisory: None,
            bounds: config::SenderBounds::default(),
            as_choria: false,
        };
        let message = Message { sid: 0, subject: subject.as_bytes(), reply: b"", header, payload };
        Inspector::new(&sampling).sender(&message).map(Cow::into_owned)
    }

    #[test]
    fn a_sender_is_found_in_each_place() {
        let header = b"NATS/1.0\r\nchoria-identity: no\r\nChoria-Identity:  n1 \r\nChoria-Identity: n2\r\n\r\n";
        let check = |inspect: Inspect, expect: Option<&str>| {
            let payload = br#"{"data":{"id":"n3"},"n":7}"#;
            assert_eq!(sender(inspect.clone(), "a.b.n4", header, payload).as_deref(), expect, "{inspect:?}");
        };
        check(Inspect::Field("data.id".into()), Some("n3"));
        check(Inspect::Field("n".into()), Some("7"));
        check(Inspect::Field("data".into()), None);
        check(Inspect::Header("Choria-Identity".into()), Some("n1"));
        check(Inspect::Header("Choria".into()), None);
        check(Inspect::Token(1), Some("a"));
        check(Inspect::Token(3), Some("n4"));
        check(Inspect::Token(4), None);
        check(Inspect::Subject, Some("a.b.n4"));
    }

    #[test]
    fn a_long_value_is_stored_as_its_beginning_and_a_hash() {
        let stored = |value: &str| sender(Inspect::Subject, value, b"", b"").unwrap();
        let (longest, longer) = ("x".repeat(MAX_STORED), "x".repeat(MAX_STORED + 1));
        assert_eq!(stored(&longest), longest);
        let short = stored(&longer);
        assert!(short.starts_with(&longer[..BEGINNING]) && short.len() < MAX_STORED, "{short}");
        assert_ne!(short, stored(&format!("{longer}x")));
        assert_eq!(stored(&short), short, "it is stored as it is");
        // No character is cut: the boundary lies inside of one.
        let accents = format!("x{}", "\u{e9}".repeat(200));
        assert!(stored(&accents).starts_with("x\u{e9}") && stored(&accents).len() == BEGINNING - 1 + 35);
    }

    #[test]
    fn what_cannot_be_told_apart_is_no_sender() {
        let long = |length: usize| sender(Inspect::Subject, &"x".repeat(length), b"", b"").map(|value| value.len());
        let stored = BEGINNING + 3 + 32;
        assert_eq!((long(MAX_VALUE), long(MAX_VALUE + 1), long(0)), (Some(stored), None, None));
        let header = b"NATS/1.0\r\nA: \xff\r\n\r\n";
        assert_eq!(sender(Inspect::Header("A".into()), "a", header, b""), None);
    }
}
