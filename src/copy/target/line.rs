//! The target's `max_control_line`: no server publishes it, and a server drops the connection at a longer line. Where
//! that may have happened, lines of padding are sent, each on a connection of its own and to a subject without
//! subscribers, until the limit is known.

use futures_util::{FutureExt, future::BoxFuture};
use nats_lane::Lane;
use tokio::time::{Duration, timeout};

use crate::{copy::Job, names};

/// Deadline for the whole search.
const WITHIN: Duration = Duration::from_secs(8);
/// Lower end of the search, bytes: the `CONNECT` line of a client is hardly shorter.
pub(in crate::copy) const LEAST: usize = 512;

/// The longest line that the target accepts, if that is shorter than `sent`; `None` if it is not, or cannot be known.
pub(in crate::copy) async fn limit(job: &Job, sent: usize) -> Option<usize> {
    timeout(WITHIN, search(sent, |line| takes(job, line).boxed())).await.ok().flatten()
}

/// Whether the target accepts a line that is longer than the limit found before.
pub(in crate::copy) async fn is_raised(job: &Job, limit: usize) -> bool {
    timeout(WITHIN, takes(job, limit + 1)).await.ok().flatten() == Some(true)
}

async fn search<'a>(sent: usize, mut takes: impl FnMut(usize) -> BoxFuture<'a, Option<bool>> + Send) -> Option<usize> {
    // Twice: a connection may break for other reasons.
    if sent <= LEAST || takes(sent).await? || takes(sent).await? {
        return None;
    }
    let (mut low, mut high) = (LEAST, sent);
    if !takes(low).await? {
        return None;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if takes(middle).await? { low = middle } else { high = middle }
    }
    // Once more for both: of all these connections, one may have broken for other reasons.
    (takes(low).await? && !takes(low + 1).await?).then_some(low)
}

/// Whether the target accepts a line of so many bytes after its keyword; `None` if it cannot be reached, or ends the
/// connection for another reason.
async fn takes(job: &Job, line: usize) -> Option<bool> {
    let name = format!("{} {}", names::PROGRAM, job.replication.id);
    let mut lane: Lane = job.dial.dial(&job.replication.target.place, &name).await.ok()?;
    let (_, inbox) = lane.reserve_inbox();
    // A subject, a blank and the size 0.
    let padding = line.checked_sub(inbox.len() + 3)?;
    let command = format!("PUB {inbox}.{} 0\r\n\r\n", "x".repeat(padding));
    lane.output().extend_from_slice(command.as_bytes());
    match lane.round_trip().await {
        Ok(()) => Some(true),
        Err(error) => {
            let text = error.message.to_ascii_lowercase();
            let is = |words: &str| text.contains(words);
            // The line was read, and refused for its subject.
            if is("permissions violation") {
                return Some(true);
            }
            // The server's error line may be lost with the connection.
            (is("maximum control line") || error.is_cut()).then_some(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    #[tokio::test]
    async fn the_limit_is_found_to_the_byte() {
        for limit in [512, 1_000, 1_024, 2_047] {
            assert_eq!(search(2_048, |line| ready(Some(line <= limit)).boxed()).await, Some(limit));
        }
        assert_eq!(search(2_048, |line| ready(Some(line <= 4_096)).boxed()).await, None);
        assert_eq!(search(2_048, |_| ready(Some(false)).boxed()).await, None);
        assert_eq!(search(2_048, |_| ready(None).boxed()).await, None);
    }

    #[tokio::test]
    async fn one_broken_connection_proves_nothing() {
        let mut asked = 0;
        let found = search(2_048, |_| {
            asked += 1;
            ready(Some(asked > 1)).boxed()
        });
        assert_eq!(found.await, None);
    }
}
