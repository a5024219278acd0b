//! What the other instances say, kept in memory: the position records with the rows that their leaders saved, and
//! the sessions of the lease bucket. Every question about the group is answered from here.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    lease::{Leases, Sessions},
    store::{PositionRecord, PositionStore, follow},
};

/// The group as it was last heard of; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Group {
    records: watch::Receiver<HashMap<String, Bytes>>,
    leases: Leases,
    _follower: Arc<AbortOnDropHandle<()>>,
}

impl Group {
    /// Follows the position records for as long as somebody has a clone.
    pub(super) fn follow(positions: PositionStore, leases: Leases) -> Self {
        let (known, records) = watch::channel(HashMap::new());
        let follower = tokio::spawn(follow(
            "the position records are not watched",
            async move || positions.watch().await,
            move |change| {
                known.send_modify(|known| {
                    match change.value {
                        Some(value) => known.insert(change.id, value),
                        None => known.remove(&change.id),
                    };
                });
            },
        ));
        Self { records, leases, _follower: Arc::new(AbortOnDropHandle::new(follower)) }
    }

    /// The record of a replication as its holder last saved it.
    pub(super) fn record(&self, id: &str) -> Option<PositionRecord> {
        serde_json::from_slice(self.records.borrow().get(id)?).ok()
    }

    /// Waits until the record of a replication, if there is one, says what is expected; for ever if it never does.
    pub(super) async fn record_when(&self, id: &str, when: impl Fn(&PositionRecord) -> bool) {
        let mut records = self.records.clone();
        let mut seen: Option<Bytes> = None;
        let fits = |records: &HashMap<String, Bytes>| {
            let Some(value) = records.get(id) else { return true };
            if seen.as_ref() == Some(value) {
                return false;
            }
            seen = Some(value.clone());
            serde_json::from_slice(value).is_ok_and(|record| when(&record))
        };
        // An error means that nobody follows any more.
        let _ = records.wait_for(fits).await;
    }

    /// All sessions.
    pub(super) fn sessions(&self) -> Sessions {
        self.leases.sessions().clone()
    }

    /// Whether an instance is known not to be there any more.
    pub(super) fn is_gone(&self, instance: &str) -> bool {
        self.leases.sessions().is_gone(instance)
    }

    /// Whether an instance is there as far as is known, but was silent for so long that it has stopped by itself.
    pub(super) fn is_doubted(&self, instance: &str) -> bool {
        self.leases.sessions().is_doubted(instance)
    }
}
