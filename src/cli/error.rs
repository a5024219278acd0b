//! How a command ends, and how its errors are printed.

use std::process::ExitCode;

use super::output::{Output, clean};
use crate::{
    config::Problem,
    control::api::{ErrorReply, Failure},
};

/// Exit code of wrong usage or configuration; clap uses the same.
pub(super) const USAGE: u8 = 2;

/// Result of a command that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommandVerdict {
    /// All is well.
    Good,
    /// Something is not, and has been printed.
    Bad,
    /// The exit code is the result.
    Code(u8),
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It was called in a way that cannot work.
    #[error("{0}")]
    Usage(String),
    /// It did not work.
    #[error("{0}")]
    Failed(String),
    /// The service refused it.
    #[error("{0}")]
    Refused(#[from] Failure),
}

impl Error {
    /// Code of the service's refusal.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(failure) => Some(failure.code),
            Self::Usage(_) | Self::Failed(_) => None,
        }
    }

    /// Prints the error on stderr, every problem with its path on a line; programs get a refusal on stdout as it was sent.
    pub(super) fn print(&self, out: &mut Output) {
        out.note(&format!("error: {self}"));
        if let Self::Refused(failure) = self {
            problems(out, &failure.problems);
            if out.json() {
                out.value(&ErrorReply { error: failure.clone() });
            }
        }
    }

    /// The exit code of the process.
    pub(super) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(USAGE),
            Self::Failed(_) | Self::Refused(_) => ExitCode::FAILURE,
        }
    }
}

/// A problem in one line, with its location.
pub(super) fn problem(problem: &Problem) -> String {
    let path = if problem.path.is_empty() { "document" } else { &problem.path };
    clean(&format!("{path}: {}", problem.message))
}

/// Prints problems on stderr.
pub(super) fn problems(out: &mut Output, problems: &[Problem]) {
    for one in problems {
        out.note(&format!("  {}", problem(one)));
    }
}
