//! One copy of one stream, from the saved position to the first error or the stop. A run owns its two lanes: when
//! [`run`] returns, or its future is dropped, nothing more of it reaches either server.
//!
//! One message's way: [`source::reader`] -> [`decide`] -> [`target::writer`] -> [`flow::window`] -> [`flow::position`].

mod advisories;
mod decide;
mod error;
mod feed;
mod flow;
mod job;
pub(crate) mod moved_consumers;
mod objects;
mod open;
mod reject;
mod reporter;
mod resume;
mod returned;
mod run;
mod samples;
pub(crate) mod sampling_driver;
pub(crate) mod source;
pub(crate) mod target;

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use error::{Error, ErrorKind, ErrorSide, PoisonMessage};
#[doc(hidden)]
pub use feed::{INBOX, feed};
pub use flow::{budget::Budget, position::PositionWriter, watchdog::Escalation};
pub(crate) use flow::{
    logins::LoginWatch,
    position::{Fed, another_kind},
    window::MessageSize,
};
pub use job::Job;
pub(crate) use objects::NamedChunks;
pub(crate) use returned::ReturnedMessages;
pub use returned::{KnownOrigins, WaysBack};
pub use samples::{Samples, SeenSender};
pub use source::{
    consumers::consumer_prefix,
    locate::{At, Located, Place, locate},
    peek::{SourcePeek, peek},
    retention::{HeadroomChange, Outlook, PollHistory, Shortage},
};
pub(crate) use target::dedup_window::LONGEST_PAUSE;

use open::Opener;
use run::RunEnd;

use crate::{
    config::OnReject,
    events::Events,
    status::{CopyStatus, State},
};

/// Copies until `stop` is cancelled (then the messages in flight settle and the position is saved) or an error ends the
/// run. `status` is updated a few times a second: counters continue from the values that are in it, and `state` changes
/// from [`State::Starting`] to [`State::Running`] once the run has determined where to resume, but from
/// [`State::Retrying`] and [`State::Held`] only once the run has copied, or there was nothing to copy.
pub async fn run(
    job: &Job,
    positions: &mut PositionWriter,
    status: &watch::Sender<(State, CopyStatus)>,
    events: &Events,
    stop: CancellationToken,
) -> Result<(), Error> {
    let mut refused = reject::Refused::default();
    if let Some(limit) = positions.max_line {
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            raised = target::line::is_raised(job, limit) => positions.max_line = positions.max_line.filter(|_| !raised),
        }
    }
    let opener = Opener { job, status, events };
    let result = loop {
        // In boxes, here and below: the futures of a run are large, and each task that waits for one would contain it.
        let mut result = Box::pin(once(opener, positions, &mut refused, &stop)).await;
        if begins_again(job, &mut result, positions, &mut refused, &stop).await {
            disconnected(status);
            continue;
        }
        match result.as_ref().err().and_then(|error| error.unheard) {
            None => break result.map(|_| ()),
            Some(seq) => match target::stray::mended(job, seq, &stop).await {
                // The target takes the message now.
                Ok(true) => {}
                Ok(false) => break result.map(|_| ()),
                Err(held) => break Err(held),
            },
        }
    };
    disconnected(status);
    result.map_err(|error| explained(error, positions))
}

/// One run.
async fn once(
    opener: Opener<'_>,
    positions: &mut PositionWriter,
    refused: &mut reject::Refused,
    stop: &CancellationToken,
) -> Result<RunEnd, Error> {
    let run = tokio::select! {
        biased;
        // Before the first message is read there is nothing to settle.
        () = stop.cancelled() => return Ok(RunEnd::Stopped),
        run = Box::pin(opener.open(positions, refused)) => run?,
    };
    Box::pin(run.copy(positions, stop.clone())).await
}

/// Whether the next run begins at once, and nothing is reported.
async fn begins_again(
    job: &Job,
    result: &mut Result<RunEnd, Error>,
    positions: &mut PositionWriter,
    refused: &mut reject::Refused,
    stop: &CancellationToken,
) -> bool {
    match result {
        Ok(ended) => *ended == RunEnd::BeginsAgain,
        // The next login reads the credentials again, and shows whether it is refused.
        Err(error) if error.login_ended && positions.logs_in_again(Instant::now()) => {
            info!(replication = job.replication.id, "the login ended: logging in again: {error}");
            true
        }
        // The next run sees whether the target lost its end. If it did not, it had these messages already.
        Err(error) if error.ended_below && positions.acks_singly(Instant::now()) => {
            info!(replication = job.replication.id, "asking for an ack of each message: {error}");
            true
        }
        // No action is needed: the next run knows how to handle these messages.
        Err(error) if error.poison.is_some() && job.replication.on_reject != OnReject::Hold => {
            refused.add(std::mem::take(&mut error.refused))
        }
        Err(Error { unconfirmed_line: Some(sent), .. }) => {
            let found = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                found = target::line::limit(job, *sent) => found,
            };
            let found = found.filter(|limit| positions.max_line.is_none_or(|old| *limit < old));
            positions.max_line = found.or(positions.max_line);
            // The next run finds these messages before they are sent.
            found.is_some()
        }
        Err(_) => false,
    }
}

/// An error, with an explanation where earlier runs contributed to it.
fn explained(error: Error, positions: &mut PositionWriter) -> Error {
    if !error.chain_broken {
        return error;
    }
    match positions.chain_broke(Instant::now()) {
        Ok(false) => error,
        Ok(true) => {
            let message =
                format!("messages that an earlier run had in flight may have arrived late: {}", error.message);
            Error { message, ..error }
        }
        Err(held) => held,
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
