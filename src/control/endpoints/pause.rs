//! `pause` and `resume`: a mark beside the document, which the leader of the replication follows.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use super::{RequestContext, in_time, named, reply, written};
use crate::{
    control::{
        api::{Changed, Failure, NamedRequest},
        service::Request,
    },
    store::{MarkKind, PauseMark},
};

/// How long the answer to a pause waits for the copy to stop. It stops in any case.
const STOPS_WITHIN: Duration = Duration::from_millis(2_200);

pub(super) async fn pause(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    let end = Instant::now() + STOPS_WITHIN;
    in_time(&request)?;
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    context.existing(&replication).await?;
    let marked = context.config.marked(&replication, MarkKind::Paused).await;
    let revision = match marked.map_err(|error| Failure::new(503, error.to_string()))? {
        Some((revision, _)) => revision,
        None => {
            let mark = Bytes::from(reply(&PauseMark::now(&context.instance))?);
            let revision = written(&replication, context.config.mark(&replication, MarkKind::Paused, mark).await)?;
            info!(replication, revision, "paused by request");
            revision
        }
    };
    match timeout_at(end, context.supervisor.paused_since(&replication, revision)).await {
        Ok(()) => Ok(Changed { replication, revision }),
        Err(_) => Err(Failure::new(504, format!("replication `{replication}` stops, and has not stopped yet"))),
    }
}

pub(super) async fn resume(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    context.existing(&replication).await?;
    let revision = written(&replication, context.config.unmark(&replication, MarkKind::Paused, None).await)?;
    info!(replication, revision, "resumed by request");
    Ok(Changed { replication, revision })
}
