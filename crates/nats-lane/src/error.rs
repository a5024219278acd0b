//! Errors of connections and of the JetStream API: the kind says what the caller can do.

use std::io;

use serde::Deserialize;

use super::verdicts::{self, Verdict};

/// What the caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It passes: connect again and go on.
    Retry,
    /// People have to change something: permissions, credentials, a full or sealed stream.
    Hold,
    /// This message can never be stored as it is.
    Poison,
    /// The target's last sequence is not what was expected: somebody else wrote.
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
    /// The JetStream error behind it, if there is one.
    pub api: Option<ApiError>,
}

/// What a lane says of a connection that its server closed.
pub(super) const CLOSED: &str = "closed the connection";

/// Between a server and the text of its `-ERR` line.
const SAYS: &str = " says: ";

impl Error {
    /// An error that passes.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Retry, message: message.into(), api: None }
    }

    /// An error that people have to end.
    pub fn hold(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Hold, message: message.into(), api: None }
    }

    /// An `-ERR` line; `let_in`: of a connection that was in use already.
    pub(super) fn of_err_line(address: &str, text: &str, let_in: bool) -> Self {
        let verdict = verdicts::err_line(text, let_in);
        Self { kind: verdict.kind, message: with_remedy(format!("`{address}`{SAYS}{text}"), verdict.remedy), api: None }
    }

    /// A failed TLS handshake.
    pub(super) fn of_tls(error: &io::Error) -> Self {
        let Verdict { kind, remedy } = verdicts::tls(error);
        Self { kind, message: with_remedy(format!("TLS handshake failed: {error}"), remedy), api: None }
    }

    /// A consumer or a pull ended with a status.
    pub fn of_status(stream: &str, code: u16, text: &str) -> Self {
        let Verdict { kind, remedy } = verdicts::status(code, text);
        let message = format!("consumer of stream `{stream}` ended: {code} {text}");
        Self { kind, message: with_remedy(message, remedy), api: None }
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

    /// Whether a server ended the login of a connection that was in use, as it does when the login expires or is revoked.
    pub fn login_ended(&self) -> bool {
        let said = self.message.rsplit_once(SAYS).map(|(_, text)| text);
        self.kind == ErrorKind::Retry && said.is_some_and(verdicts::ends_login)
    }

    /// Whether the JetStream error behind it has this `err_code`.
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
    /// Text for people.
    pub description: String,
}

impl ApiError {
    /// What the caller can do.
    pub fn kind(&self) -> ErrorKind {
        verdicts::api(self).kind
    }
}

impl From<ApiError> for Error {
    fn from(api: ApiError) -> Self {
        let Verdict { kind, remedy } = verdicts::api(&api);
        let message = format!("{} ({})", api.description, api.err_code);
        Self { kind, message: with_remedy(message, remedy), api: Some(api) }
    }
}

impl From<super::parser::ParseError> for Error {
    fn from(error: super::parser::ParseError) -> Self {
        Self::retry(error.to_string())
    }
}

fn with_remedy(message: String, remedy: &str) -> String {
    if remedy.is_empty() { message } else { format!("{message}: {remedy}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_login_is_told_from_other_refusals() {
        let ended =
            |text: &str, let_in| Error::of_err_line("expired:4222", text, let_in).context("source").login_ended();
        for text in ["User Authentication Expired", "User Authentication Revoked", "Account Authentication Expired"] {
            assert!(ended(text, true) && !ended(text, false), "{text}");
        }
        for text in ["Authentication Timeout", "Stale Connection", "Permissions Violation for Publish to \"expired\""] {
            assert!(!ended(text, true) && !ended(text, false), "{text}");
        }
    }

    #[test]
    fn what_passes_is_tried_again() {
        let check = |err_code, expect| {
            let error = ApiError { code: 400, err_code, description: String::new() };
            assert_eq!(error.kind(), expect, "{err_code}");
        };
        // An id whose message is still on its way, too many open batches, a batch that was forgotten.
        for err_code in [10158, 10211, 10208] {
            check(err_code, ErrorKind::Retry);
        }
        check(10071, ErrorKind::ChainBroken);
        check(10060, ErrorKind::Hold);
    }
}
