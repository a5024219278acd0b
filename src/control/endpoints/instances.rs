//! `instances`: the instances of the group and the replications that each runs, from memory.

use super::{Page, RequestContext, options, page};
use crate::{
    control::{
        api::{Failure, InstanceRow, Instances, InstancesRequest},
        service::Request,
    },
    supervisor::Peer,
};

/// Ids shown of one instance.
const SHOWN: usize = 1_000;

pub(super) async fn instances(context: &RequestContext, request: Request) -> Result<Instances, Failure> {
    let InstancesRequest { offset, limit } = options(&request.body)?;
    // A row is never so large that a page could hold none.
    let most = context.room() / 4;
    let rows = context.supervisor.peers().into_iter().map(|peer| row(peer, most)).collect();
    let Page { rows: instances, limit, total } = page(rows, offset, limit, context.room());
    Ok(Instances { site: context.site.clone(), instances, offset, limit, total })
}

fn row(peer: Peer, most: usize) -> InstanceRow {
    let Peer { session, silent, mut leads } = peer;
    let count = leads.len();
    let mut bytes = 0;
    let fits = |id: &&String| {
        bytes += id.len() + 3;
        bytes <= most
    };
    let shown = leads.iter().take(SHOWN).take_while(fits).count();
    leads.truncate(shown);
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
