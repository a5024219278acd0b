//! The request to try again, or to skip a message, after it was met.

use std::{convert::Infallible, future::pending, time::Duration};

use tokio::{sync::watch, time::sleep};
use tracing::debug;

use crate::{
    store::{MarkKind, WriteError},
    supervisor::{
        context::Context,
        requests::{Release, Requests},
    },
};

/// How long after a failed attempt the removal of a request is tried again.
const UNMARK_AGAIN: Duration = Duration::from_secs(5);

/// Removes a release that has been handled: another attempt has started, or the saved position has reached the message to
/// skip. `due` selects the releases to remove.
pub(super) async fn clear_release(
    context: &Context,
    mut requests: watch::Receiver<Requests>,
    mut saved: watch::Receiver<u64>,
    due: impl Fn(&Release) -> bool,
) -> Infallible {
    let Context { deps, id, .. } = context;
    loop {
        let release = requests.borrow_and_update().release.filter(&due);
        let cleared = async {
            let Some(release) = release else { return pending().await };
            if let Some(message) = release.skip
                && saved.wait_for(|seq| *seq >= message.seq).await.is_err()
            {
                return pending().await;
            }
            while let Err(WriteError::Store(error)) =
                deps.config.unmark(id, MarkKind::Release, Some(release.revision)).await
            {
                debug!(replication = id, "the release was not removed: {error}");
                sleep(UNMARK_AGAIN).await;
            }
            // The watch reports the change.
            pending::<()>().await;
        };
        tokio::select! {
            biased;
            changed = requests.changed() => if changed.is_err() {
                return pending().await;
            },
            () = cleared => {}
        }
    }
}
