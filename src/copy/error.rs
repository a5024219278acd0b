//! Why a run ended, and what its caller has to do.

use nats_lane as nats;

use crate::store::{SaveError, SourceMessage};

/// A message that the server refused permanently, and the reason.
pub(super) type RefusedMessage = (SourceMessage, String);

/// A message that can never be stored at the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoisonMessage {
    /// Its sequence and stored time.
    pub message: SourceMessage,
    /// Its subject and its bytes of subject, headers and payload; `None` for a refusal of the server until the message is
    /// read again.
    pub content: Option<(String, u64)>,
}

/// What the caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Transient error: try again soon.
    Retry,
    /// A person or the target has to change something: try again slowly.
    Hold,
    /// Another instance holds the replication: stop permanently.
    Superseded,
}

impl ErrorKind {
    /// As in the status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Hold => "hold",
            Self::Superseded => "superseded",
        }
    }
}

/// The connection that an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorSide {
    /// The one to the source.
    Source,
    /// The one to the target.
    Target,
}

/// Why a run ended.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can do.
    pub kind: ErrorKind,
    /// Description, without secrets.
    pub message: String,
    /// The connection that it is about, where it is about one.
    pub side: Option<ErrorSide>,
    /// The message that can never be stored at the target, if that is the reason.
    pub poison: Option<Box<PoisonMessage>>,
    /// Length in bytes of the longest protocol line that the target had not confirmed when it ended the connection.
    pub(super) unconfirmed_line: Option<usize>,
    /// Messages that the server refused permanently.
    pub(super) refused: Vec<RefusedMessage>,
    /// Source sequence of a message that got no responders, or an answer of another stream.
    pub(super) unheard: Option<u64>,
    /// Whether the target's last sequence was not what was expected.
    pub(super) chain_broken: bool,
    /// Whether a batch ended at a target sequence below one that was known: the target lost its end, or had the messages
    /// already.
    pub(super) ended_below: bool,
    /// Whether the run was given up because nothing moved.
    pub(super) stalled: bool,
    /// Whether a server ended the login of a connection that was in use.
    pub(crate) login_ended: bool,
    /// Whether a server refused the login of a new connection.
    pub login_refused: bool,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            kind,
            message,
            side: None,
            poison: None,
            unconfirmed_line: None,
            refused: Vec::new(),
            unheard: None,
            chain_broken: false,
            ended_below: false,
            stalled: false,
            login_ended: false,
            login_refused: false,
        }
    }

    /// An error of the connection to the source, which its text names.
    pub(crate) fn of_source(error: nats::Error) -> Self {
        Self { side: Some(ErrorSide::Source), ..error.context("source").into() }
    }

    /// An error of the connection to the target, which its text names.
    pub(crate) fn of_target(error: nats::Error) -> Self {
        Self { side: Some(ErrorSide::Target), ..error.context("target").into() }
    }

    /// An error of a run that made no more progress.
    pub(crate) fn stalled(side: ErrorSide, message: impl Into<String>) -> Self {
        Self { stalled: true, side: Some(side), ..Self::new(ErrorKind::Retry, message) }
    }
}

impl From<nats::Error> for Error {
    fn from(error: nats::Error) -> Self {
        let kind = match error.kind {
            nats::ErrorKind::Retry | nats::ErrorKind::ChainBroken | nats::ErrorKind::NoResponders => ErrorKind::Retry,
            nats::ErrorKind::Hold | nats::ErrorKind::Poison | nats::ErrorKind::NotFound => ErrorKind::Hold,
        };
        let (login_ended, login_refused) = (error.login_ended(), error.login_refused());
        let chain_broken = error.kind == nats::ErrorKind::ChainBroken;
        Self { chain_broken, login_ended, login_refused, ..Self::new(kind, error.message) }
    }
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Conflict { .. } => Self::new(ErrorKind::Superseded, error.to_string()),
            SaveError::Deleted { .. } | SaveError::Store(_) => Self::new(ErrorKind::Retry, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_a_connection_has_its_side_and_names_it() {
        let error = Error::of_target(nats::Error::retry("connection refused"));
        assert_eq!((error.side, error.message.as_str()), (Some(ErrorSide::Target), "target: connection refused"));
        let error = Error::of_source(nats::Error::hold("not permitted"));
        assert_eq!((error.side, error.kind), (Some(ErrorSide::Source), ErrorKind::Hold));
        assert_eq!(Error::from(nats::Error::retry("the target refused it")).side, None);
        let error = Error::stalled(ErrorSide::Source, "nothing came");
        assert!(error.stalled && error.side == Some(ErrorSide::Source));
    }
}
