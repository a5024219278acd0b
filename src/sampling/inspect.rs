//! Who sent a message, and whether it wants to be copied in any case.

use std::borrow::Cow;

use super::path::Path;
use crate::{
    config::{self, Inspect},
    nats::{Message, headers},
};

/// Longest value, bytes, that is told apart. What is longer counts as no value: its messages are copied.
pub const MAX_VALUE: usize = 1024;

/// Looks into messages as one replication's document says.
#[derive(Debug, Clone)]
pub struct Inspector {
    place: Place,
    force: Option<Path>,
}

#[derive(Debug, Clone)]
enum Place {
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
            Inspect::Field(path) => Place::Field(Path::new(path)),
            Inspect::Header(name) => Place::Header(name.clone()),
            Inspect::Token(token) => Place::Token(token.saturating_sub(1)),
            Inspect::Subject => Place::Subject,
        };
        Self { place, force: sampling.force_field.as_deref().map(Path::new) }
    }

    /// The sender, if the message names one: not empty, valid UTF-8 of up to [`MAX_VALUE`] bytes.
    pub fn sender<'a>(&self, message: &Message<'a>) -> Option<Cow<'a, str>> {
        let text = |bytes: &'a [u8]| std::str::from_utf8(bytes).ok().map(Cow::Borrowed);
        let value = match &self.place {
            Place::Field(path) => path.text(message.payload),
            Place::Header(name) => {
                headers::lines(message.header).find_map(|line| headers::value_of(line, name.as_bytes())).and_then(text)
            }
            Place::Token(token) => message.subject.split(|byte| *byte == b'.').nth(*token).and_then(text),
            Place::Subject => text(message.subject),
        };
        value.filter(|value| !value.is_empty() && value.len() <= MAX_VALUE)
    }

    /// Whether the field that forces a copy is true.
    pub fn forced(&self, payload: &[u8]) -> bool {
        self.force.as_ref().is_some_and(|path| path.is_true(payload))
    }
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
    fn what_cannot_be_told_apart_is_no_sender() {
        let long = |length: usize| sender(Inspect::Subject, &"x".repeat(length), b"", b"").map(|value| value.len());
        assert_eq!((long(MAX_VALUE), long(MAX_VALUE + 1), long(0)), (Some(MAX_VALUE), None, None));
        let header = b"NATS/1.0\r\nA: \xff\r\n\r\n";
        assert_eq!(sender(Inspect::Header("A".into()), "a", header, b""), None);
    }
}
