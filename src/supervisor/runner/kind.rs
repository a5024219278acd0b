//! One run of a replication, of whatever kind its document says.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    copy::{self, Error, Job, PositionWriter},
    events::Events,
    native,
    status::{CopyStatus, State},
};

/// Copies or feeds until `stop` is cancelled or something fails.
pub(super) async fn run(
    job: &Job,
    writer: &mut PositionWriter,
    status: &watch::Sender<(State, CopyStatus)>,
    events: &Events,
    stop: CancellationToken,
) -> Result<(), Error> {
    // In boxes: a future in a future takes its room twice.
    match &job.replication.native {
        Some(feed) => Box::pin(native::run(job, feed, writer, status, events, stop)).await,
        None => Box::pin(copy::run(job, writer, status, events, stop)).await,
    }
}
