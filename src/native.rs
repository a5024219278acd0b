//! The native feed of the kinds `mirror` and `source`: the target stream is a mirror or has a source in the sense of the server, and
//! its origin is this program. The target's server asks for a consumer below an API prefix that only this feed answers, over a leafnode
//! connection of its own; the feed answers, reads the source, and delivers what a consumer would deliver. The server's own
//! code stores it and resumes by itself; as a mirror with the sequence and the stored time of the source.
//!
//! [`open`] makes the connections and the target stream, [`feed`] is the loop, [`witness`] decides whether source and
//! target still belong together. [`headers`], [`request`], [`session`] and [`window`] are pure.

mod feed;
mod headers;
mod leaves;
mod open;
mod request;
mod session;
mod target;
mod window;
mod witness;

use nats_lane::ErrorKind;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use crate::config::FeedSubjects;
pub(crate) use target::{
    Fit, check as check_target, refuse_source, settings as target_settings,
    source::{lacks, remove as remove_source},
};

use feed::FeedEnd;

use crate::{
    config::NativeFeed,
    copy::{self, Job, PositionWriter},
    events::Events,
    status::{CopyStatus, State},
};

/// Feeds the target until `stop` is cancelled (then the position is saved) or something fails, as [`copy::run`] copies.
pub async fn run(
    job: &Job,
    native: &NativeFeed,
    positions: &mut PositionWriter,
    status: &watch::Sender<(State, CopyStatus)>,
    events: &Events,
    stop: CancellationToken,
) -> Result<(), copy::Error> {
    loop {
        let opened = tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            opened = Box::pin(open::open(job, native, positions, status)) => opened,
        };
        let result = match opened {
            Ok(opened) => Box::pin(feed::Feed::new(job, opened, status, events).run(positions, &stop)).await,
            Err(error) => Err(error),
        };
        status.send_modify(|(_, copy)| {
            copy.source.connected = false;
            copy.target.connected = false;
            copy.in_flight = Default::default();
        });
        match result {
            Ok(FeedEnd::Stopped) => return Ok(()),
            Ok(FeedEnd::LogsInAgain) => {
                info!(replication = job.replication.id, "credentials were renewed: logging in again");
            }
            // The next login reads the credentials again, and shows whether it is refused.
            Err(error) if error.login_ended && positions.logs_in_again(Instant::now()) => {
                info!(replication = job.replication.id, "the login ended: logging in again: {error}");
            }
            Err(error) => return Err(error),
        }
    }
}

/// What a server says when another leafnode connection of the same name has taken the place of this one.
const EVICTED: &str = "duplicate remote leafnode connection";

/// An error of the leafnode connection.
fn of_leaf(error: nats_lane::Error) -> copy::Error {
    if error.message.to_ascii_lowercase().contains(EVICTED) {
        let message = format!(
            "target: {}: another feed of this replication took over: a second service with the same `site` feeds the same target",
            error.message
        );
        return copy::Error::new(copy::ErrorKind::Hold, message);
    }
    let refused = error.kind == ErrorKind::Hold && !error.login_refused();
    let mut error = copy::Error::of_target(error);
    if refused {
        error.message += ": `config validate` prints the permissions that the leaf user needs";
    }
    error
}
