//! The known senders, for all runs of a replication.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{sampling::Senders, store::SenderWrites};

/// The part of sampling that outlives a run: the known senders and the store of their records.
#[derive(Debug, Clone)]
pub struct Samples {
    /// The senders.
    pub senders: Arc<Mutex<Senders>>,
    /// Their records.
    pub store: Arc<dyn SenderWrites>,
}

impl Samples {
    /// Locks the senders, for a short time.
    pub fn lock(&self) -> MutexGuard<'_, Senders> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
