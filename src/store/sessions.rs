//! Session records: which processes are there. One key `session.<instance>` per process in the lease bucket, renewed
//! while it lives.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, future::ready, stream::BoxStream};
use serde::{Deserialize, Serialize};

use super::{
    bucket::{Bucket, PutError, Stored},
    buckets::Error,
    watch::{self, Change},
};

const PREFIX: &str = "session.";

/// Value of a session's key. Readable JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Format of the record: 1.
    pub version: u32,
    /// Its `--instance`.
    pub instance: String,
    /// Random; another one for each start of the process.
    pub session: String,
    /// Name of its host.
    pub host: String,
    /// Its process id on that host.
    pub pid: u32,
    /// Version of its program.
    pub program: String,
    /// When it started.
    pub started: DateTime<Utc>,
    /// Grows with every renewal.
    pub nonce: u64,
}

/// What the watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionChange {
    /// A session was written, or was there when the watch began.
    Put {
        /// Its instance, by the key.
        instance: String,
        /// Revision of the key.
        revision: u64,
        /// What was written, if it can be read.
        record: Option<SessionRecord>,
    },
    /// A session was removed.
    Deleted {
        /// Its instance, by the key.
        instance: String,
        /// Revision of the removal.
        revision: u64,
    },
    /// Everything that was there when the watch began has been told.
    Loaded,
}

/// The lease bucket, as far as sessions go.
#[derive(Debug, Clone)]
pub struct SessionStore {
    bucket: Bucket,
}

impl SessionStore {
    pub(super) fn new(bucket: Bucket) -> Self {
        Self { bucket }
    }

    /// The session of an instance and the revision to write it at, read from the leader of the bucket.
    pub async fn read(&self, instance: &str) -> Result<(Option<SessionRecord>, u64), Error> {
        let Some(Stored { revision, value }) = self.bucket.last(&key(instance)).await? else { return Ok((None, 0)) };
        Ok((value.and_then(|value| serde_json::from_slice(&value).ok()), revision))
    }

    /// Writes a session if its key is at `revision`; `None` if it is not. Returns the new revision.
    pub async fn put(&self, record: &SessionRecord, revision: u64) -> Result<Option<u64>, Error> {
        let value = serde_json::to_vec(record).map_err(|error| self.bucket.error(error.to_string()))?;
        outcome(self.bucket.put(&key(&record.instance), Bytes::from(value), revision).await)
    }

    /// Removes a session if its key is at `revision`; `None` if it is not. Returns the revision of the removal.
    pub async fn remove(&self, instance: &str, revision: u64) -> Result<Option<u64>, Error> {
        outcome(self.bucket.mark_deleted(&key(instance), revision).await)
    }

    /// Removes what a removal left, if nothing was written since.
    pub async fn forget(&self, instance: &str, revision: u64) -> Result<(), Error> {
        self.bucket.forget_through(&key(instance), revision).await
    }

    /// All sessions as they are, then [`SessionChange::Loaded`], then every change as it happens, for ever.
    pub async fn watch(&self) -> Result<BoxStream<'static, Result<SessionChange, Error>>, Error> {
        let changes = watch::watch(self.bucket.clone(), |_| false).await?;
        Ok(changes.filter_map(|change| ready(change.map(session).transpose())).boxed())
    }
}

fn key(instance: &str) -> String {
    format!("{PREFIX}{instance}")
}

fn outcome(result: Result<u64, PutError>) -> Result<Option<u64>, Error> {
    match result {
        Ok(revision) => Ok(Some(revision)),
        Err(PutError::Conflict) => Ok(None),
        Err(PutError::Refused(error) | PutError::Unknown(error)) => Err(error),
    }
}

/// What a change of the bucket says of sessions; other keys are left alone.
fn session(change: Change) -> Option<SessionChange> {
    Some(match change {
        Change::Put { key, revision, value } => SessionChange::Put {
            instance: key.strip_prefix(PREFIX)?.to_owned(),
            revision,
            record: serde_json::from_slice(&value).ok(),
        },
        Change::Deleted { key, revision } => {
            SessionChange::Deleted { instance: key.strip_prefix(PREFIX)?.to_owned(), revision }
        }
        Change::Loaded => SessionChange::Loaded,
    })
}
