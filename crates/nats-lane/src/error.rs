//! Errors of connections and of the JetStream API: the kind says what the caller can do.

use std::borrow::Cow;

use serde::Deserialize;

use crate::parser::ParseError;

/// The way in which a caller can react to an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It is transient: connect again and continue.
    Retry,
    /// It lasts until an operator changes something: permissions, credentials, a full or sealed stream.
    Hold,
    /// This message can never be stored as it is.
    Poison,
    /// The last sequence of the stream is not the one that was expected: another publisher wrote.
    ChainBroken,
    /// The thing asked for is not there.
    NotFound,
    /// No stream took the message: it has no leader at the moment, or no stream listens on the subject.
    NoResponders,
}

/// A failed connection or request. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can do.
    pub kind: ErrorKind,
    /// What happened, with the server or the stream named.
    pub message: String,
    /// The JetStream error that caused it, if there is one.
    pub api: Option<ApiError>,
}

/// Bytes of a text of another program that an error shows at most.
const EXCERPT: usize = 1024;

/// The beginning of a text that another program sent, for errors: these are saved, published and shown, and a server may send
/// a text of any length.
pub fn excerpt(text: &str) -> Cow<'_, str> {
    match text.len() {
        0..=EXCERPT => text.into(),
        length => format!("{}... ({length} bytes)", beginning(text, EXCERPT)).into(),
    }
}

/// At most so many bytes of a text.
pub fn beginning(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or_default()]
}

/// Longest text of an error of ours, which may quote several others.
const LONGEST: usize = 8 * EXCERPT;

/// The texts of parsers quote what they could not read.
fn bounded(mut message: String) -> String {
    if message.len() > LONGEST {
        message.truncate(beginning(&message, LONGEST).len());
        message.push_str("...");
    }
    message
}

/// What a lane says of a connection that its server closed.
pub(crate) const CLOSED: &str = "closed the connection";

impl Error {
    /// A transient error.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Retry, message: bounded(message.into()), api: None }
    }

    /// An error that lasts until an operator acts.
    pub fn hold(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Hold, message: bounded(message.into()), api: None }
    }

    /// The same error with what was being done in front.
    #[must_use]
    pub fn context(mut self, doing: impl std::fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// Whether the server ended the connection and did not say why: as it does with a client for which too much waits, or
    /// that sent a line which is too long.
    pub fn is_cut(&self) -> bool {
        [CLOSED, "reset by peer", "broken pipe"].iter().any(|words| self.message.to_ascii_lowercase().contains(words))
    }

    /// Whether the JetStream error that caused it has this `err_code`.
    pub fn is_api(&self, err_code: u32) -> bool {
        self.api.as_ref().is_some_and(|api| api.err_code == err_code)
    }
}

/// `error` of a JetStream reply (ADR-7).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ApiError {
    /// HTTP-like code.
    pub code: u32,
    /// The precise code of the server's error table.
    pub err_code: u32,
    /// Description.
    pub description: String,
}

impl From<ParseError> for Error {
    fn from(error: ParseError) -> Self {
        Self::retry(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_any_length_is_shown_shortened() {
        assert_eq!(excerpt("short"), "short");
        let long = excerpt(&"\u{e9}".repeat(400_000)).into_owned();
        assert!(long.len() < EXCERPT + 32 && long.ends_with("... (800000 bytes)"), "{long}");
        let api = |description: String| ApiError { code: 503, err_code: 10077, description };
        let errors = [
            Error::from(api("x".repeat(1 << 20))),
            Error::of_err_line("host:4222", &"x".repeat(1 << 20), true),
            Error::of_status("S", 409, &"x".repeat(60_000)),
            Error::retry(
                crate::fast_ingest::parse_ack(format!("{{\"type\":\"{:a<60000}\"}}", "").as_bytes()).unwrap_err(),
            ),
        ];
        for error in errors {
            assert!(error.message.len() < 2 * EXCERPT, "{} bytes", error.message.len());
        }
        // As the parser quotes it.
        let ack = format!("{{\"seq\":\"{:a<60000}\"}}", "");
        let error = crate::jetstream::PublishAck::parse(ack.as_bytes(), "the target").unwrap_err();
        assert!(error.message.len() <= LONGEST + 3, "{} bytes", error.message.len());
    }
}
