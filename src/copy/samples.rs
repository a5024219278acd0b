//! What is known of senders, for all runs of a replication.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{sampling::Senders, store::SenderWrites};

/// What outlives a run: the senders that are known and where their records are.
#[derive(Debug, Clone)]
pub struct Samples {
    /// The senders.
    pub senders: Arc<Mutex<Senders>>,
    /// Their records.
    pub store: Arc<dyn SenderWrites>,
}

impl Samples {
    /// The senders, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, Senders> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
