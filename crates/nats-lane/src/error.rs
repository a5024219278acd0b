//! Errors of connections and of the JetStream API: the kind says what the caller can do.

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

/// What a lane says of a connection that its server closed.
pub(crate) const CLOSED: &str = "closed the connection";

impl Error {
    /// A transient error.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Retry, message: message.into(), api: None }
    }

    /// An error that lasts until an operator acts.
    pub fn hold(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Hold, message: message.into(), api: None }
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
