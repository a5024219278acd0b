//! Deletes what a replication made at its source and its target together with it: a durable consumer, and the source of a
//! target stream.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::{RequestContext, position::runnable};
use crate::{
    config::{NativeKind, Replication},
    copy::source::durable::{self, Durable, Owner},
    native::remove_source,
    store::ConfigEntry,
};

/// Deadline for all of a deletion: less than that of a request.
const WITHIN: Duration = Duration::from_millis(2_000);
/// Time that the source gets in any case.
const LEAST: Duration = Duration::from_millis(300);

/// A replication that is about to be deleted, with what is needed to find what it made.
pub(super) struct Leaving {
    replication: Option<Replication>,
    end: Instant,
}

impl Leaving {
    /// Reads it before its document is deleted.
    pub(super) async fn of(context: &RequestContext, id: &str) -> Self {
        match context.existing(id).await {
            Ok(entry) => Self::of_entry(context, entry).await,
            Err(_) => Self { replication: None, end: Instant::now() + WITHIN },
        }
    }

    /// The same for a document that was read.
    pub(super) async fn of_entry(context: &RequestContext, entry: ConfigEntry) -> Self {
        let end = Instant::now() + WITHIN;
        let replication = runnable(context, entry).await.ok();
        // One with patterns makes nothing itself.
        let replication = replication.filter(|replication| replication.patterns.is_none());
        Self { replication, end }
    }

    /// Deletes the consumer that this service created, if the position record says that there may be one. A consumer that
    /// cannot be deleted in time stays and is logged: the answer does not wait for an unreachable source.
    pub(super) async fn remove_durable(self, context: &RequestContext, id: &str) {
        let Ok((record, _)) = context.positions.read(id).await else { return };
        let Some(replication) = self.replication.filter(|_| record.durable) else { return };
        let installation = record.installation.as_ref().unwrap_or(&context.installation);
        let owner = Owner { site: &context.site, installation };
        let (name, stream) = (Durable::name(&replication), replication.source.stream.as_str());
        let end = self.end.max(Instant::now() + LEAST);
        let why = match timeout_at(end, durable::remove(&context.rules, &replication, owner)).await {
            Ok(Ok(true)) => {
                info!(replication = id, consumer = name, stream, "durable consumer deleted at the source");
                return;
            }
            Ok(Ok(false)) => return,
            Ok(Err(error)) => error.message,
            Err(_) => "the source did not answer in time".to_owned(),
        };
        warn!(
            replication = id,
            consumer = name,
            stream,
            "the durable consumer was left at the source, which keeps messages for it; delete it there: {why}"
        );
    }

    /// Removes the source of kind `source` from the target stream, which would ask for it for ever. What cannot be removed in
    /// time stays and is logged.
    pub(super) async fn remove_source(&self, context: &RequestContext, id: &str) {
        let is_source = |replication: &&Replication| {
            replication.native.as_ref().is_some_and(|native| native.kind == NativeKind::Source)
        };
        let Some(replication) = self.replication.as_ref().filter(is_source) else { return };
        let stream = replication.target.stream.as_str();
        let end = self.end.max(Instant::now() + LEAST);
        let why = match timeout_at(end, remove_source(&context.rules, replication, &context.site)).await {
            Ok(Ok(true)) => {
                info!(replication = id, stream, "source removed from the target stream");
                return;
            }
            Ok(Ok(false)) => return,
            Ok(Err(error)) => error.message,
            Err(_) => "the target did not answer in time".to_owned(),
        };
        warn!(replication = id, stream, "the source was left in the target stream; remove it there: {why}");
    }
}
