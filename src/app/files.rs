//! How many files the process may open: each connection of a copy is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, warn};

/// Connections of one copy: source and target.
const PER_REPLICATION: u64 = 2;
/// Control connection, monitor, log, runtime, credentials that are being read.
const OTHERS: u64 = 32;

/// Raises the limit to what the system allows; it is often set to 1,024 only for the sake of very old programs.
pub(super) fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        debug!("the limit of open files stays at {current:?} of {maximum:?}: {error}");
    }
}

/// Says so if the limit is too low for so many replications.
pub(super) fn check_limit(replications: usize) {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return };
    let needed = needed(replications);
    if needed > limit {
        warn!(limit, needed, replications, "too few files may be open for all replications, raise `ulimit -n`");
    }
}

fn needed(replications: usize) -> u64 {
    (replications as u64).saturating_mul(PER_REPLICATION).saturating_add(OTHERS)
}
