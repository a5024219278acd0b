//! Deletes what a document with patterns has made: a replication for each stream.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde_json::json;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{
    super::api::{Changed, Failure},
    RequestContext, STOP_WITHIN,
    durable::Leaving,
    forget, stopped_elsewhere, written,
};
use crate::store::{ConfigEntry, Family, MarkKind, StreamsMark};

/// Replications whose records are removed at the same time.
const AT_ONCE: usize = 32;
/// How often the list of streams is written again because the instance that follows them was faster.
const TRIES: usize = 5;

/// The replications of a document that is about to be deleted.
pub(super) struct Members(Vec<(String, Leaving)>);

impl Members {
    /// Reads them before the document is deleted.
    pub(super) async fn of(context: &RequestContext, family: &str) -> Self {
        let mut members = Vec::new();
        let is_member = |entry: &ConfigEntry| entry.family.as_ref().is_some_and(|of| of.id == family);
        for entry in context.documents.all().await.into_iter().filter(is_member) {
            let id = entry.key.clone();
            members.push((id, Leaving::of_entry(context, entry).await));
        }
        Self(members)
    }

    /// Waits until none of them runs and removes their records, after the deletion at `revision`.
    pub(super) async fn forget(self, context: &RequestContext, family: &str, revision: u64) -> Result<(), Failure> {
        let each = self.0.into_iter().map(|(id, leaving)| async move {
            let stopped = async {
                context.supervisor.stopped_since(&id, revision).await;
                stopped_elsewhere(context, &id).await;
            };
            if timeout(STOP_WITHIN, stopped).await.is_err() {
                warn!(replication = id, "was deleted and did not stop within {STOP_WITHIN:?}");
            }
            forget(context, &id, revision, leaving).await.map_err(|error| Failure::new(503, error.to_string()))
        });
        let results: Vec<_> = stream::iter(each).buffer_unordered(AT_ONCE).collect().await;
        results.into_iter().collect::<Result<Vec<()>, _>>()?;
        written(family, context.config.unmark(family, MarkKind::Streams, None).await).map(drop)
    }
}

/// Deletes the replication of a stream that is gone; that of another stream is only excluded.
pub(super) async fn delete_member(
    context: &RequestContext,
    entry: ConfigEntry,
    family: Family,
    keep: bool,
) -> Result<Changed, Failure> {
    let (id, family_id) = (entry.key.as_str(), family.id.as_str());
    if !family.gone {
        let message = format!(
            "replication `{id}` is one of `{family_id}`, which has patterns: exclude its stream there, with \
             `exclude_streams`"
        );
        return Err(Failure::new(409, message));
    }
    let leaving = Leaving::of(context, id).await;
    let revision = drop_gone(context, family_id, id).await?;
    let removed = context.supervisor.removed_with_mark(id, revision);
    if timeout(STOP_WITHIN.min(Duration::from_secs(2)), removed).await.is_err() {
        warn!(replication = id, "was deleted and did not stop in time");
    }
    if !keep {
        let forgotten = forget(context, id, revision, leaving).await;
        forgotten.map_err(|error| Failure::new(503, error.to_string()))?;
    }
    info!(replication = id, revision, "the replication of a stream that is gone was deleted by request");
    Ok(Changed { replication: entry.key, revision })
}

/// Takes a stream out of the list of those that are gone.
async fn drop_gone(context: &RequestContext, family: &str, id: &str) -> Result<u64, Failure> {
    let unavailable = |error: crate::store::Error| Failure::new(503, error.to_string());
    for _ in 0..TRIES {
        let stored = context.config.marked(family, MarkKind::Streams).await.map_err(unavailable)?;
        let Some((revision, mut mark)) =
            stored.and_then(|(revision, value)| Some((revision, StreamsMark::read(&value)?)))
        else {
            break;
        };
        mark.gone.retain(|stream| crate::config::member_id(family, stream) != id);
        let value = json!(mark).to_string().into();
        match context.config.put(&MarkKind::Streams.key(family), value, Some(revision)).await {
            Err(crate::store::WriteError::Conflict { .. } | crate::store::WriteError::Missing) => {}
            result => return written(id, result),
        }
    }
    Err(Failure::new(503, format!("the streams of `{family}` cannot be written: others write them all the time")))
}
