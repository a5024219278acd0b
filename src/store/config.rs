//! The configuration bucket: key = replication id, value = the document; beside it the replication's marks. The key
//! `heartbeats` is no replication's: what lies there goes to the heartbeats. Nor is the key `site`: it names the site that
//! the buckets belong to.

use bytes::Bytes;
use futures_util::{StreamExt, stream::BoxStream};

use super::{
    bucket::{Bucket, INSTALLATION, PutError, Stored},
    config_change::{ConfigChange, ConfigEntry},
    error::Error,
    file_documents::FileDocuments,
    linked,
    marks::{Mark, MarkKind},
    watch::{self, Change},
};
use crate::names::{HEARTBEATS_KEY, SITE_KEY};

/// Why a document was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// There is one already.
    #[error("there is a document at revision {revision} already")]
    Exists {
        /// Its revision.
        revision: u64,
    },
    /// There is none.
    #[error("there is no such document")]
    Missing,
    /// It is not at the revision that was expected.
    #[error("the document is at revision {revision}")]
    Conflict {
        /// Its revision.
        revision: u64,
    },
    /// The write failed or its outcome is unknown.
    #[error(transparent)]
    Store(#[from] Error),
}

/// The configuration bucket.
#[derive(Debug, Clone)]
pub struct ConfigStore {
    bucket: Bucket,
    file: FileDocuments,
}

impl ConfigStore {
    pub(super) fn new(bucket: Bucket) -> Self {
        Self { bucket, file: FileDocuments::default() }
    }

    /// The same with the documents of a file beside those of the bucket, see [`FileDocuments`]. Watches deliver them with
    /// revision 0; everything else here is about the bucket alone.
    #[must_use]
    pub fn with_file(self, file: FileDocuments) -> Self {
        Self { file, ..self }
    }

    /// Whether the file has a document with this id.
    pub fn is_in_file(&self, id: &str) -> bool {
        self.file.has(id)
    }

    /// Documents come with the links that they name, and those with patterns with one for each stream that was found.
    ///
    /// All keys as they are, then [`ConfigChange::Loaded`], then every change as it happens. Of entries that are read
    /// together the marks come first: a document is never acted on before its pause is known.
    ///
    /// The stream never ends. An error is delivered once and is transient: the changes that happened meanwhile follow,
    /// and nothing else. `purpose` is one word, another one for each watch of a process.
    pub async fn watch(&self, purpose: &str) -> Result<BoxStream<'static, Result<ConfigChange, Error>>, Error> {
        let changes = watch::watch(self.bucket.clone(), purpose, |key| MarkKind::of_key(key).is_some()).await?;
        let changes = self.file.overlay(changes.map(|change| change.map(typed)).boxed(), purpose);
        Ok(linked::resolved(changes, purpose))
    }

    /// Revisions of a key since its last deletion that the bucket still has, newest first.
    pub async fn history(&self, key: &str) -> Result<Vec<ConfigEntry>, Error> {
        let mut entries = Vec::new();
        let mut from = 1;
        while let Some(stored) = self.bucket.next(key, from).await? {
            from = stored.revision + 1;
            match stored.value {
                Some(value) => entries.push(ConfigEntry::new(key, stored.revision, value)),
                None => entries.clear(),
            }
        }
        entries.reverse();
        Ok(entries)
    }

    /// The newest revision of a key, read from the leader of the bucket.
    pub async fn get(&self, key: &str) -> Result<Option<ConfigEntry>, Error> {
        Ok(self.bucket.last(key).await?.and_then(|stored| {
            let value = stored.value?;
            Some(ConfigEntry::new(key, stored.revision, value))
        }))
    }

    /// The newest revision of all keys, read from the leader of the bucket: a watch that has delivered it is up to
    /// date.
    pub async fn last_revision(&self) -> Result<u64, Error> {
        Ok(self.bucket.info().await?.state.last_sequence)
    }

    /// From the next start on, the installation is the one with this id, whose buckets were lost.
    pub async fn adopt(&self, installation: &str) -> Result<(), Error> {
        self.bucket
            .reconfigure(|config| {
                let metadata = config.entry("metadata").or_insert_with(|| serde_json::json!({}));
                metadata[INSTALLATION] = installation.into();
            })
            .await
    }

    /// Writes a document where there is none; returns its revision.
    pub async fn create(&self, key: &str, value: Bytes) -> Result<u64, WriteError> {
        self.write(key, Some(value), |current| match current {
            Some(Stored { revision, value: Some(_) }) => Err(WriteError::Exists { revision: *revision }),
            _ => Ok(()),
        })
        .await
    }

    /// Replaces a document, if given only when it is at the `expected` revision; returns its new revision.
    pub async fn update(&self, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64, WriteError> {
        self.write(key, Some(value), |current| allowed(current, expected)).await
    }

    /// Writes a document whatever is there, or if given only what is at the `expected` revision (0: nothing); returns its
    /// revision.
    pub async fn put(&self, key: &str, value: Bytes, expected: Option<u64>) -> Result<u64, WriteError> {
        self.write(key, Some(value), |current| {
            let there = current.filter(|stored| stored.value.is_some()).map_or(0, |stored| stored.revision);
            match expected {
                Some(expected) if expected != there && there == 0 => Err(WriteError::Missing),
                Some(expected) if expected != there => Err(WriteError::Conflict { revision: there }),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Deletes a document, if given only when it is at the `expected` revision; returns the revision of the
    /// deletion.
    pub async fn delete(&self, key: &str, expected: Option<u64>) -> Result<u64, WriteError> {
        self.write(key, None, |current| allowed(current, expected)).await
    }

    /// Puts a mark, whatever is there; returns its revision.
    pub async fn mark(&self, id: &str, kind: MarkKind, value: Bytes) -> Result<u64, WriteError> {
        self.write(&kind.key(id), Some(value), |_| Ok(())).await
    }

    /// A mark, read from the leader of the bucket: its revision and its value.
    pub async fn marked(&self, id: &str, kind: MarkKind) -> Result<Option<(u64, Bytes)>, Error> {
        Ok(self.get(&kind.key(id)).await?.map(|entry| (entry.revision, entry.value)))
    }

    /// Removes a mark, if given only when it is at the `expected` revision; returns the revision of the removal. If
    /// there is none, that of the one before, and 0 if there never was one.
    pub async fn unmark(&self, id: &str, kind: MarkKind, expected: Option<u64>) -> Result<u64, WriteError> {
        let key = kind.key(id);
        match self.write(&key, None, |current| allowed(current, expected)).await {
            Err(WriteError::Missing) => Ok(self.bucket.last(&key).await?.map_or(0, |stored| stored.revision)),
            result => result,
        }
    }

    /// Writes by compare-and-swap what `check` allows in the face of what is there, and again if somebody else was
    /// faster. A write whose outcome is unknown is read back.
    async fn write(
        &self,
        key: &str,
        value: Option<Bytes>,
        check: impl Fn(Option<&Stored>) -> Result<(), WriteError>,
    ) -> Result<u64, WriteError> {
        for _ in 0..WRITE_TRIES {
            let current = self.bucket.last(key).await?;
            check(current.as_ref())?;
            let at = current.as_ref().map_or(0, |stored| stored.revision);
            let written = match &value {
                Some(value) => self.bucket.put(key, value.clone(), at).await,
                None => self.bucket.mark_deleted(key, at).await,
            };
            match written {
                Ok(revision) => return Ok(revision),
                Err(PutError::Conflict) => {}
                Err(PutError::Refused(error)) => return Err(error.into()),
                Err(PutError::Unknown(error)) => {
                    return match self.bucket.last(key).await? {
                        Some(found) if found.revision > at && found.value == value => Ok(found.revision),
                        _ => Err(error.into()),
                    };
                }
            }
        }
        Err(self.bucket.error(format!("key `{key}` cannot be written: others write it all the time")).into())
    }
}

const WRITE_TRIES: usize = 5;

/// A change of the bucket as a change of the configuration.
fn typed(change: Change) -> ConfigChange {
    let mark = |key: &str, revision: u64, value: Option<&Bytes>| {
        let (id, kind) = MarkKind::of_key(key)?;
        Some(ConfigChange::Marked(Mark { id: id.to_owned(), kind, revision, value: value.cloned() }))
    };
    match change {
        Change::Put { key, revision, value, .. } if key == HEARTBEATS_KEY => {
            ConfigChange::Heartbeats(Stored { revision, value: Some(value) })
        }
        Change::Deleted { key, revision } if key == HEARTBEATS_KEY => {
            ConfigChange::Heartbeats(Stored { revision, value: None })
        }
        Change::Put { key, revision, value, .. } if key == SITE_KEY => {
            ConfigChange::Site(Stored { revision, value: Some(value) })
        }
        Change::Deleted { key, revision } if key == SITE_KEY => ConfigChange::Site(Stored { revision, value: None }),
        Change::Put { key, revision, value, .. } => mark(&key, revision, Some(&value))
            .unwrap_or_else(|| ConfigChange::Put(ConfigEntry::new(key, revision, value))),
        Change::Deleted { key, revision } => {
            mark(&key, revision, None).unwrap_or(ConfigChange::Deleted { key, revision })
        }
        Change::Loaded => ConfigChange::Loaded,
        Change::Recreated => ConfigChange::Recreated,
    }
}

fn allowed(current: Option<&Stored>, expected: Option<u64>) -> Result<(), WriteError> {
    match current {
        Some(Stored { revision, value: Some(_) }) if expected.is_some_and(|expected| expected != *revision) => {
            Err(WriteError::Conflict { revision: *revision })
        }
        Some(Stored { value: Some(_), .. }) => Ok(()),
        _ => Err(WriteError::Missing),
    }
}
