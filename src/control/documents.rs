//! The configuration bucket in memory, so that requests are answered while the bucket is not available.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::{sync::watch, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::{
    config::{self, LinkUse, Links},
    names::{ADAPTERS_PREFIX, LINKS_PREFIX},
    store::{ConfigChange, ConfigEntry, ConfigStore, Error},
};

/// How long a request waits for the newest revision before it is answered from memory.
const CATCH_UP: Duration = Duration::from_millis(100);
/// Time limit for the request for the newest revision.
const ASK: Duration = Duration::from_millis(250);

/// All documents, as last received.
#[derive(Debug)]
pub(super) struct Documents {
    store: ConfigStore,
    known: watch::Receiver<CachedDocuments>,
    _follower: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct CachedDocuments {
    entries: BTreeMap<String, ConfigEntry>,
    /// Links as written, by name.
    link_entries: BTreeMap<String, ConfigEntry>,
    links: Links,
    /// Of the heartbeats, or of their removal; 0 if there never were any.
    heartbeats: u64,
    /// Newest revision received.
    seen: u64,
}

impl Documents {
    /// Reads everything and then follows the changes.
    pub(super) async fn follow(store: ConfigStore) -> Result<Self, Error> {
        let mut changes = store.watch("control").await?;
        let (sender, known) = watch::channel(CachedDocuments::default());
        while let Some(change) = changes.next().await {
            match change? {
                ConfigChange::Loaded => break,
                change => sender.send_modify(|known| known.apply(change)),
            }
        }
        let follower = tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                match change {
                    Ok(change) => sender.send_modify(|known| known.apply(change)),
                    Err(error) => warn!("{error}; answering requests with the configuration read before"),
                }
            }
        });
        Ok(Self { store, known, _follower: AbortOnDropHandle::new(follower) })
    }

    /// One document.
    pub(super) async fn get(&self, id: &str) -> Option<ConfigEntry> {
        self.catch_up().await;
        self.known.borrow().entries.get(id).cloned()
    }

    /// Id and revision of all documents that are in the bucket or in a file, sorted by id.
    pub(super) async fn list(&self) -> Vec<(String, u64)> {
        self.catch_up().await;
        let known = self.known.borrow();
        let written = known.entries.values().filter(|entry| entry.family.is_none());
        written.map(|entry| (entry.key.clone(), entry.revision)).collect()
    }

    /// One link as written.
    pub(super) async fn link(&self, name: &str) -> Option<ConfigEntry> {
        self.catch_up().await;
        self.known.borrow().link_entries.get(name).cloned()
    }

    /// All links as written, sorted by name.
    pub(super) async fn links(&self) -> Vec<ConfigEntry> {
        self.catch_up().await;
        self.known.borrow().link_entries.values().cloned().collect()
    }

    /// The link that a document names.
    pub(super) async fn link_of(&self, document: &Value) -> Option<LinkUse> {
        let name = config::named_link(document)?;
        self.catch_up().await;
        Some(self.known.borrow().links.get(name))
    }

    /// All documents, sorted by id, also those of streams that a document with patterns has found.
    pub(super) async fn all(&self) -> Vec<ConfigEntry> {
        self.catch_up().await;
        self.known.borrow().entries.values().cloned().collect()
    }

    /// Revision of the heartbeats, or of their removal; 0 if there never were any.
    pub(super) async fn heartbeats(&self) -> u64 {
        self.catch_up().await;
        self.known.borrow().heartbeats
    }

    /// Waits until memory has the newest revision: a client that just changed a document sees the change, whichever
    /// instance answers. If the bucket does not answer, or its newest message is gone, the wait is short.
    async fn catch_up(&self) {
        let Ok(Ok(newest)) = timeout(ASK, self.store.last_revision()).await else { return };
        let mut known = self.known.clone();
        let _ = timeout(CATCH_UP, known.wait_for(|known| known.seen >= newest)).await;
    }
}

impl CachedDocuments {
    fn apply(&mut self, change: ConfigChange) {
        match change {
            ConfigChange::Put(ConfigEntry { key, revision, .. }) | ConfigChange::Deleted { key, revision }
                if key.starts_with(ADAPTERS_PREFIX) =>
            {
                self.seen = self.seen.max(revision);
            }
            ConfigChange::Put(entry) if entry.key.starts_with(LINKS_PREFIX) => {
                self.seen = self.seen.max(entry.revision);
                let name = entry.key[LINKS_PREFIX.len()..].to_owned();
                self.links.put(&name, entry.revision, &entry.value);
                self.link_entries.insert(name, entry);
            }
            ConfigChange::Deleted { key, revision } if key.starts_with(LINKS_PREFIX) => {
                self.seen = self.seen.max(revision);
                self.links.remove(&key[LINKS_PREFIX.len()..]);
                self.link_entries.remove(&key[LINKS_PREFIX.len()..]);
            }
            ConfigChange::Put(entry) => {
                self.seen = self.seen.max(entry.revision);
                self.entries.insert(entry.key.clone(), entry);
            }
            ConfigChange::Deleted { key, revision } => {
                self.seen = self.seen.max(revision);
                self.entries.remove(&key);
            }
            ConfigChange::Heartbeats(stored) => {
                self.seen = self.seen.max(stored.revision);
                self.heartbeats = stored.revision;
            }
            ConfigChange::Site(stored) => self.seen = self.seen.max(stored.revision),
            ConfigChange::Marked(mark) => self.seen = self.seen.max(mark.revision),
            ConfigChange::Recreated => self.seen = 0,
            ConfigChange::Loaded => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn revisions_of_a_recreated_bucket_count_from_its_beginning() {
        let put = |key: &str, revision: u64| ConfigChange::Put(ConfigEntry::new(key, revision, Bytes::new()));
        let mut known = CachedDocuments::default();
        known.apply(put("A", 100));
        known.apply(put("B", 99));
        assert_eq!(known.seen, 100);
        known.apply(ConfigChange::Recreated);
        known.apply(put("A", 2));
        known.apply(put("B", 1));
        assert_eq!((known.seen, known.entries.len()), (2, 2));
    }
}
