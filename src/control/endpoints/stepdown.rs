//! `stepdown`: the leader of a replication hands it over.

use std::time::Duration;

use tokio::time::timeout;
use tracing::info;

use super::{RequestContext, in_time, named};
use crate::control::{
    api::{Failure, NamedRequest, SteppedDown},
    service::Request,
};

/// How long the answer waits for another leader. The handover continues after that.
const HANDED_WITHIN: Duration = Duration::from_millis(2_000);

pub(super) async fn stepdown(context: &RequestContext, request: Request) -> Result<SteppedDown, Failure> {
    in_time(&request)?;
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    context.existing(&replication).await?;
    if context.supervisor.peers().len() < 2 {
        let description = format!("there is no other instance to take over replication `{replication}`");
        return Err(Failure::new(409, description));
    }
    let asked = context.leases.step_down(&replication).await;
    let from = asked.map_err(|error| Failure::new(503, error.to_string()))?.ok_or_else(|| {
        Failure::new(409, format!("replication `{replication}` has no leader at the moment; try again in a second"))
    })?;
    info!(replication, leader = from, "asked to hand over");
    let another = context.supervisor.row_when(&replication, |row| row.leader.as_ref().is_some_and(|to| *to != from));
    let to = timeout(HANDED_WITHIN, another).await.ok().and_then(|row| row.leader);
    Ok(SteppedDown { replication, from, to })
}
