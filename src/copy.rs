//! One copy of one stream, from what was saved to the first error or the stop. A run owns its two lanes: when
//! [`run`] returns, or its future is dropped, nothing more of it reaches either server.
//!
//! One message's way: [`reader`] -> [`decide`] -> [`writer`] -> [`window`] -> [`progress`].

mod advisories;
mod appetite;
mod batches;
pub(crate) mod bridge;
mod budget;
pub(crate) mod clock;
mod consumers;
pub(crate) mod dead_letter;
mod decide;
mod drops;
pub(crate) mod duplicates;
pub(crate) mod durable;
mod feed;
mod frame;
mod gap;
mod glance;
mod headroom;
mod intake;
mod join;
pub(crate) mod learn;
mod line;
mod locate;
pub(crate) mod mark;
mod objects;
mod pipelined;
mod probe;
mod progress;
pub(crate) mod provenance;
mod reader;
mod refusal;
mod reject;
mod renewal;
mod resume;
mod run;
mod sampler;
pub(crate) mod sharing;
mod source_end;
mod stray;
pub(crate) mod subjects;
pub(crate) mod target;
mod target_end;
pub(crate) mod target_limits;
mod target_watch;
mod throttle;
mod transform;
mod unsaved;
mod watchdog;
mod window;
mod writer;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use budget::Budget;
pub use consumers::consumer_prefix;
pub(crate) use duplicates::LONGEST_PAUSE;
#[doc(hidden)]
pub use feed::{INBOX, feed};
pub use glance::{Glance, glance};
pub use headroom::{Looks, Outlook, Shortage, Turn};
pub use locate::{At, Located, Place, locate};
pub use progress::Ledger;
pub use sampler::Samples;
pub use watchdog::Escalation;

use crate::{
    config::{OnReject, Replication},
    events::Events,
    nats,
    status::{CopyStatus, Row, State},
    store::{OwnStreams, SaveError, SourceMessage},
};

/// What to copy, and in whose name.
#[derive(Debug, Clone)]
pub struct Job {
    /// The site's name, for provenance.
    pub site: String,
    /// What the instances of the installation share, and no other installation has.
    pub installation: String,
    /// What to copy.
    pub replication: Replication,
    /// The row to save with the position; its `state` and `copy` are filled in by the run.
    pub row: Row,
    /// Bytes that all replications of the process may read ahead together.
    pub budget: Budget,
    /// A message that can never be stored and is left out by request.
    pub skip: Option<SourceMessage>,
    /// Another replication of this service that writes to the same target stream.
    pub neighbour: Option<String>,
    /// What the names of its own consumers begin with, see [`consumer_prefix`].
    pub consumers: String,
    /// The streams of the service's own buckets.
    pub own_streams: OwnStreams,
    /// No other process is to be reckoned with, and the copy goes on where the position cannot be saved.
    pub standalone: bool,
    /// What is known of senders; a replication that is sampled and has none copies everything.
    pub samples: Option<Samples>,
    /// Makes the connections to both sides.
    pub dial: Arc<dyn nats::Dial>,
}

/// What the caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It passes: try again soon.
    Retry,
    /// People or the target have to change something: try again slowly.
    Hold,
    /// Another instance holds the replication: stop for good.
    Superseded,
}

/// Why a run ended.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can do.
    pub kind: ErrorKind,
    /// What happened, without secrets.
    pub message: String,
    /// The message that can never be stored at the target, if that is the reason.
    pub poison: Option<SourceMessage>,
    /// The longest protocol line that the target did not confirm, where it ended the connection.
    unconfirmed_line: Option<usize>,
    /// Messages that the server refused for good.
    refused: Vec<refusal::Refusal>,
    /// Source sequence of a message for which no stream answered, or another one.
    unheard: Option<u64>,
    /// Whether the target's last sequence was not what was expected.
    chain_broken: bool,
    /// Whether the run was given up because nothing moved.
    stalled: bool,
    /// Whether a server ended the login of a connection that was in use.
    login_ended: bool,
}

impl Error {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            kind,
            message,
            poison: None,
            unconfirmed_line: None,
            refused: Vec::new(),
            unheard: None,
            chain_broken: false,
            stalled: false,
            login_ended: false,
        }
    }

    /// Nothing moved any more.
    pub(crate) fn stalled(message: impl Into<String>) -> Self {
        Self { stalled: true, ..Self::new(ErrorKind::Retry, message) }
    }
}

impl From<nats::Error> for Error {
    fn from(error: nats::Error) -> Self {
        let kind = match error.kind {
            nats::ErrorKind::Retry | nats::ErrorKind::ChainBroken | nats::ErrorKind::NoResponders => ErrorKind::Retry,
            nats::ErrorKind::Hold | nats::ErrorKind::Poison | nats::ErrorKind::NotFound => ErrorKind::Hold,
        };
        let login_ended = error.login_ended();
        let chain_broken = error.kind == nats::ErrorKind::ChainBroken;
        Self { chain_broken, login_ended, ..Self::new(kind, error.message) }
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

/// Copies until `stop` is cancelled (then what is in the air settles and the position is saved) or something
/// fails. `status` is kept current a few times a second: counters go on from the values found there, and `state`
/// goes from [`State::Starting`] to [`State::Running`] once the run has found out where to resume, but from
/// [`State::Retrying`] and [`State::Held`] only once it has copied or found nothing to copy.
pub async fn run(
    job: &Job,
    ledger: &mut Ledger,
    status: &watch::Sender<(State, CopyStatus)>,
    events: &Events,
    stop: CancellationToken,
) -> Result<(), Error> {
    let mut refused = reject::Refused::default();
    if let Some(limit) = ledger.max_line {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            raised = line::is_raised(job, limit) => ledger.max_line = ledger.max_line.filter(|_| !raised),
        }
    }
    let result = loop {
        let started = tokio::select! {
            biased;
            // Before the first message is read there is nothing to settle.
            () = stop.cancelled() => break Ok(()),
            started = run::Run::start(job, ledger, status, events, &mut refused) => started,
        };
        let mut result = match started {
            Ok(run) => run.copy(ledger, stop.clone()).await,
            Err(error) => Err(error),
        };
        let again = match &mut result {
            Ok(run::Ended::BeginsAgain) => true,
            // The next login reads the credentials again, and shows whether it is refused.
            Err(error) if error.login_ended && ledger.logs_in_again(tokio::time::Instant::now()) => {
                info!(replication = job.replication.id, "the login ended: logging in again: {error}");
                true
            }
            // Nobody has to act upon it: the next run knows what becomes of these messages.
            Err(error) if error.poison.is_some() && job.replication.on_reject != OnReject::Hold => {
                refused.add(std::mem::take(&mut error.refused))
            }
            Err(Error { unconfirmed_line: Some(sent), .. }) => {
                let found = tokio::select! {
                    biased;
                    () = stop.cancelled() => None,
                    found = line::limit(job, *sent) => found,
                };
                let found = found.filter(|limit| ledger.max_line.is_none_or(|old| *limit < old));
                ledger.max_line = found.or(ledger.max_line);
                // The next run finds these messages before they are sent.
                found.is_some()
            }
            _ => false,
        };
        if again {
            disconnected(status);
            continue;
        }
        match result.as_ref().err().and_then(|error| error.unheard) {
            None => break result.map(|_| ()),
            Some(seq) => match stray::mended(job, seq, &stop).await {
                // The target takes the message now.
                Ok(true) => {}
                Ok(false) => break result.map(|_| ()),
                Err(held) => break Err(held),
            },
        }
    };
    disconnected(status);
    match result {
        Err(error) if error.chain_broken => match ledger.chain_broke(tokio::time::Instant::now()) {
            Ok(false) => Err(error),
            Ok(true) => {
                let message =
                    format!("messages that an earlier run had in flight may have arrived late: {}", error.message);
                Err(Error { message, ..error })
            }
            Err(held) => Err(held),
        },
        result => result,
    }
}

/// A run is over, and the next one has not connected yet.
fn disconnected(status: &watch::Sender<(State, CopyStatus)>) {
    status.send_modify(|(_, copy)| {
        copy.source.connected = false;
        copy.target.connected = false;
        copy.in_flight = Default::default();
    });
}
