//! Documents from the file of this instance, beside those of the configuration bucket. A document that the bucket has
//! under the same id takes precedence; the file's runs again when that one is deleted.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::watch;
use tracing::warn;

use super::{
    config_change::{ConfigChange, ConfigEntry},
    error::Error,
};

/// Revision of a document that is in a file: the bucket's begin with 1.
pub const FILE_REVISION: u64 = 0;

type ById = Arc<BTreeMap<String, Bytes>>;

/// The documents of a file by id, as they are now; cheap to clone. Without any by default.
#[derive(Debug, Clone)]
pub struct FileDocuments(watch::Receiver<ById>);

/// Replaces the documents of a file that was read again.
#[derive(Debug)]
pub struct FileReloader(watch::Sender<ById>);

impl Default for FileDocuments {
    fn default() -> Self {
        Self::new(BTreeMap::new()).0
    }
}

impl FileDocuments {
    /// Documents by id. They must be valid: nothing falls back to an earlier one.
    pub fn new(documents: BTreeMap<String, Bytes>) -> (Self, FileReloader) {
        let (sender, receiver) = watch::channel(Arc::new(documents));
        (Self(receiver), FileReloader(sender))
    }

    /// Whether the file has a document with this id.
    pub fn has(&self, id: &str) -> bool {
        self.0.borrow().contains_key(id)
    }

    /// The changes of a bucket, as they are with these documents. `purpose` is that of the watch.
    pub(super) fn overlay(
        &self,
        changes: BoxStream<'static, Result<ConfigChange, Error>>,
        purpose: &str,
    ) -> BoxStream<'static, Result<ConfigChange, Error>> {
        let overlay = Overlay {
            changes,
            file: self.0.clone(),
            given: Arc::default(),
            stored: BTreeSet::new(),
            loaded: false,
            // One watch of a process reports.
            reports: purpose == "supervisor",
            queue: VecDeque::new(),
        };
        stream::unfold(overlay, |mut overlay| async move { overlay.next().await.map(|change| (change, overlay)) })
            .boxed()
    }
}

impl FileReloader {
    /// From now on the file has these.
    pub fn replace(&self, documents: BTreeMap<String, Bytes>) {
        self.0.send_replace(Arc::new(documents));
    }
}

struct Overlay {
    changes: BoxStream<'static, Result<ConfigChange, Error>>,
    file: watch::Receiver<ById>,
    /// The file's documents that were delivered, or would have been but for the bucket's.
    given: ById,
    /// Ids in the bucket.
    stored: BTreeSet<String>,
    loaded: bool,
    reports: bool,
    queue: VecDeque<ConfigChange>,
}

impl Overlay {
    async fn next(&mut self) -> Option<Result<ConfigChange, Error>> {
        loop {
            if let Some(change) = self.queue.pop_front() {
                return Some(Ok(change));
            }
            let mut file = self.file.clone();
            let reloaded = async {
                if !self.loaded || file.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                biased;
                change = self.changes.next() => match change? {
                    Ok(change) => self.apply(change),
                    Err(error) => return Some(Err(error)),
                },
                () = reloaded => self.reload(),
            }
        }
    }

    fn apply(&mut self, change: ConfigChange) {
        match &change {
            ConfigChange::Put(entry) => {
                if self.stored.insert(entry.key.clone()) && self.given.contains_key(&entry.key) {
                    self.report(&entry.key);
                }
                self.queue.push_back(change);
            }
            ConfigChange::Deleted { key, .. } => {
                self.stored.remove(key);
                let of_file = self.given.get(key).filter(|_| self.loaded).map(|value| of_file(key, value));
                self.queue.push_back(change);
                self.queue.extend(of_file);
            }
            ConfigChange::Loaded => {
                self.loaded = true;
                self.reload();
                self.queue.push_back(change);
            }
            _ => self.queue.push_back(change),
        }
    }

    /// Delivers what differs from what was delivered.
    fn reload(&mut self) {
        let now = self.file.borrow_and_update().clone();
        for (id, value) in now.iter().filter(|(id, value)| self.given.get(*id) != Some(value)) {
            if self.stored.contains(id) {
                self.report(id);
            } else {
                self.queue.push_back(of_file(id, value));
            }
        }
        for id in self.given.keys().filter(|id| !now.contains_key(*id) && !self.stored.contains(*id)) {
            self.queue.push_back(ConfigChange::Deleted { key: id.clone(), revision: FILE_REVISION });
        }
        self.given = now;
    }

    fn report(&self, id: &str) {
        if self.reports {
            warn!(
                replication = id,
                "the configuration bucket has a document of this id: the one of the file is not used"
            );
        }
    }
}

fn of_file(id: &str, value: &Bytes) -> ConfigChange {
    ConfigChange::Put(ConfigEntry::new(id, FILE_REVISION, value.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(all: &[(&str, &'static str)]) -> BTreeMap<String, Bytes> {
        all.iter().map(|(id, value)| ((*id).to_owned(), Bytes::from_static(value.as_bytes()))).collect()
    }

    fn put(key: &str, revision: u64, value: &'static str) -> ConfigChange {
        ConfigChange::Put(ConfigEntry::new(key, revision, Bytes::from_static(value.as_bytes())))
    }

    #[tokio::test]
    async fn the_bucket_takes_precedence_and_the_file_comes_back() {
        let deleted = ConfigChange::Deleted { key: "A".to_owned(), revision: 2 };
        let changes = vec![put("A", 1, "kv"), ConfigChange::Loaded, deleted.clone()];
        let changes = stream::iter(changes.into_iter().map(Ok)).chain(stream::pending()).boxed();
        let (file, reloader) = FileDocuments::new(documents(&[("A", "file"), ("B", "file")]));
        let mut seen = file.overlay(changes, "test");
        let mut next = async || seen.next().await.unwrap().unwrap();
        let expect = [put("A", 1, "kv"), put("B", 0, "file"), ConfigChange::Loaded, deleted, put("A", 0, "file")];
        for expect in expect {
            assert_eq!(next().await, expect);
        }
        reloader.replace(documents(&[("A", "newer"), ("C", "file")]));
        assert_eq!(next().await, put("A", 0, "newer"));
        assert_eq!(next().await, put("C", 0, "file"));
        assert_eq!(next().await, ConfigChange::Deleted { key: "B".to_owned(), revision: 0 });
    }

    #[tokio::test]
    async fn without_a_file_nothing_changes() {
        let changes = vec![put("A", 1, "kv"), ConfigChange::Loaded, put("A", 2, "kv")];
        let expect = changes.clone();
        let changes = stream::iter(changes.into_iter().map(Ok)).chain(stream::pending()).boxed();
        let seen: Vec<_> =
            FileDocuments::default().overlay(changes, "test").take(3).map(Result::unwrap).collect().await;
        assert_eq!(seen, expect);
    }
}
