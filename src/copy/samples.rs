//! The known senders, for all runs of a replication.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;

use crate::{sampling::Senders, store::SenderWrites};

/// The part of sampling that outlives a run: the known senders and the store of their records.
#[derive(Debug, Clone)]
pub struct Samples {
    /// The senders.
    pub senders: Arc<Mutex<Senders>>,
    /// Their records.
    pub store: Arc<dyn SenderWrites>,
    /// Receives each sender that is seen, for other replicators; nothing waits for it.
    pub report: Option<mpsc::Sender<SeenSender>>,
}

/// A sender whose message was just seen. Times are nanoseconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenSender {
    /// The sender.
    pub sender: String,
    /// Stored time of the message.
    pub seen_ns: i64,
    /// Stored time of its message that was copied last before, if one was.
    pub copied_ns: Option<i64>,
    /// Bytes of the message's payload.
    pub size: u32,
    /// Whether its `timeout` advisory was published, and this is not after its return.
    pub advised: bool,
}

impl Samples {
    /// Locks the senders, for a short time.
    pub fn lock(&self) -> MutexGuard<'_, Senders> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
