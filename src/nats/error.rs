//! Errors of connections and of the JetStream API: the kind says what the caller can do.

use serde::Deserialize;

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

impl Error {
    /// An error that passes.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Retry, message: message.into(), api: None }
    }

    /// An error that people have to end.
    pub fn hold(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Hold, message: message.into(), api: None }
    }

    /// The same error with what was being done in front.
    #[must_use]
    pub fn context(mut self, doing: impl std::fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
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
    /// What the caller can do. The codes are those of the server's `errors.json`.
    pub fn kind(&self) -> ErrorKind {
        match self.err_code {
            10014 | 10037 | 10059 => ErrorKind::NotFound,
            // With and without the sequence in the text.
            10071 | 10164 => ErrorKind::ChainBroken,
            // "maximum messages per subject exceeded" shares its code with "maximum messages exceeded".
            10077 if self.description.contains("per subject") => ErrorKind::Poison,
            // Stream full; other errors of the store bear the same code and pass.
            10077 if self.description.contains("maximum") => ErrorKind::Hold,
            // Sealed, not the stream expected (a second stream takes the subject), no JetStream for us.
            10109 | 10060 | 10039 | 10076 => ErrorKind::Hold,
            // Message or headers too large, a header that this stream does not take.
            10054 | 10097 | 10111 | 10165 | 10166 | 10168 | 10188 | 10212 | 10227 => ErrorKind::Poison,
            _ if self.code == 403 || self.code == 401 => ErrorKind::Hold,
            _ => ErrorKind::Retry,
        }
    }
}

impl From<ApiError> for Error {
    fn from(api: ApiError) -> Self {
        Self { kind: api.kind(), message: format!("{} ({})", api.description, api.err_code), api: Some(api) }
    }
}

impl From<super::parser::ParseError> for Error {
    fn from(error: super::parser::ParseError) -> Self {
        Self::retry(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
