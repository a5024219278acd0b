//! Whether messages of the source came from the target: then the replication forms a replication loop with one of another
//! installation, which only the provenance headers of the messages show.

use tokio::time::Instant;

use super::side_checks::SideChecks;
use crate::{config::Replication, copy::target::provenance};

/// Newest messages of the source that are read.
const NEWEST: u64 = 4;

/// A message that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Returned {
    /// Its sequence at the source.
    pub(super) seq: u64,
    /// The site that copied it from the target.
    pub(super) site: String,
    /// The replication of that site.
    pub(super) name: String,
    /// Its sequence at the target.
    pub(super) from: u64,
}

/// Looks for one among the newest messages of the source. The message at the target has to have the stored time that the
/// provenance names: streams elsewhere have the same name.
pub(super) async fn find(
    replication: &Replication,
    source: &mut SideChecks,
    target: &mut SideChecks,
    until: Instant,
) -> Option<Returned> {
    let last = source.facts.stream.there()?.state.last_seq;
    target.facts.stream.there()?;
    let (from, to) = (&replication.source.stream, &replication.target.stream);
    let seqs: Vec<u64> = (last.saturating_sub(NEWEST - 1).max(1)..=last).collect();
    let newest = source.ask_messages(from, &seqs, until).await;
    let hops = newest.iter().rev().flat_map(|message| {
        let hops = provenance::hops_from(&message.header, to).into_iter();
        hops.map(|hop| (message.sequence, hop))
    });
    // Those that the document names are skipped.
    let named = replication.loop_protection.as_ref().map(|known| known.target_origin.as_slice()).unwrap_or_default();
    let is_named = |hop: &provenance::OtherSiteCopy| named.iter().any(|origin| origin.includes(&hop.tag(to)));
    let hops: Vec<_> = hops.filter(|(_, hop)| !is_named(hop)).take(NEWEST as usize).collect();
    let origins: Vec<u64> = hops.iter().map(|(_, hop)| hop.origin.seq).collect();
    let there = target.ask_messages(to, &origins, until).await;
    let came = |hop: &provenance::OtherSiteCopy| {
        there.iter().any(|message| {
            message.sequence == hop.origin.seq && message.time_ns.div_euclid(1_000_000) == hop.origin.time_ms
        })
    };
    let found = hops.into_iter().find(|(_, hop)| came(hop));
    found.map(|(seq, hop)| Returned { seq, site: hop.site, name: hop.name, from: hop.origin.seq })
}
