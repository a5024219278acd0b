//! What everything that works for one replication shares.

use std::sync::Arc;

use super::{Deps, known_streams::KnownStreams, server_outages::ServerOutages, status_cell::StatusCell};
use crate::{copy, events::Event};

/// The replication that a task runs, and what the task works with.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) deps: Arc<Deps>,
    pub(super) id: String,
    pub(super) cell: Arc<StatusCell>,
    pub(super) known_streams: KnownStreams,
    pub(super) outages: ServerOutages,
}

impl Context {
    /// Prefix of the names of the copy's own consumers.
    pub(super) fn consumers(&self) -> String {
        copy::consumer_prefix(&self.deps.site, &self.deps.installation, &self.id)
    }

    pub(super) fn emit(&self, event: Event) {
        self.deps.events.emit(event, &self.id);
    }
}
