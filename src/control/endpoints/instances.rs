//! `instances`: who is there and what each runs, from memory.

use super::{Context, Page, options, page};
use crate::{
    control::{
        api::{Failure, InstanceRow, Instances, InstancesRequest},
        service::Request,
    },
    supervisor::Peer,
};

/// Ids shown of one instance.
const SHOWN: usize = 1_000;

pub(super) async fn instances(context: &Context, request: Request) -> Result<Instances, Failure> {
    let InstancesRequest { offset, limit } = options(&request.body)?;
    let rows = context.supervisor.peers().into_iter().map(row).collect();
    let Page { rows: instances, limit, total } = page(rows, offset, limit, context.room());
    Ok(Instances { site: context.site.clone(), instances, offset, limit, total })
}

fn row(peer: Peer) -> InstanceRow {
    let Peer { session, silent, mut leads } = peer;
    let count = leads.len();
    leads.truncate(SHOWN);
    InstanceRow {
        instance: session.instance,
        version: session.program,
        host: session.host,
        started: session.started,
        // Thousandths are enough.
        silent_seconds: silent.as_millis() as f64 / 1e3,
        leads: count,
        replications: leads,
    }
}
