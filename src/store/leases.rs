//! The lease bucket: which instances are present (`session.<instance>`, renewed while they run) and which of them may run
//! each replication (`lease.<id>`, written only when that changes).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, future::ready, stream::BoxStream};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{bucket::PutError, cells::Cells, error::Error, watch::Change};

const SESSION: &str = "session.";
const LEASE: &str = "lease.";

/// Value of a session's key. Readable JSON; fields that this version does not know are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// Format of the record: 1.
    pub version: u32,
    /// Its `--instance`.
    pub instance: String,
    /// Random; another one for each start of the process.
    pub session: String,
    /// Its `--lease-ttl` in milliseconds: who is silent for longer has lost its leases. 15 s where it is missing.
    #[serde(default = "default_ttl")]
    pub ttl_ms: u64,
    /// Name of its host.
    pub host: String,
    /// Its process id on that host.
    pub pid: u32,
    /// What its process id is one of, and when the process began: tells, on the same host, that it is gone. Empty where
    /// the system does not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub process: String,
    /// Version of its program.
    pub program: String,
    /// When it started.
    pub started: DateTime<Utc>,
    /// Grows with every renewal.
    pub nonce: u64,
    /// The process is stopping: it gives its leases back and takes none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Fields of other versions.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

fn default_ttl() -> u64 {
    15_000
}

/// Value of a lease's key: the instance that may run one replication. It is valid while the session that it names is
/// renewed. Readable JSON; fields that this version does not know are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Format of the record: 1.
    pub version: u32,
    /// Who has it; empty when it was released.
    pub instance: String,
    /// The session of that process; empty when it was released.
    pub session: String,
    /// Grows each time it is taken, and is never lost.
    pub epoch: u64,
    /// Written by somebody else to ask the holder to hand over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub step_down: bool,
    /// Who handed over by request, and gets it back only if nobody else wants it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stepped_down: String,
    /// Fields of other versions.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// What the watch reports. A value that cannot be read is `None`, and so is the marker of a removal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseChange {
    /// The session of an instance.
    Session {
        /// By the key.
        instance: String,
        /// Revision of the key.
        revision: u64,
        /// What lies there.
        record: Option<SessionRecord>,
    },
    /// The lease of a replication.
    Lease {
        /// By the key.
        id: String,
        /// Revision of the key.
        revision: u64,
        /// What lies there.
        record: Option<LeaseRecord>,
    },
    /// The bucket was recreated or restored: its revisions cannot be compared with those of before.
    Recreated,
    /// Everything that was there when the watch began has been delivered.
    Loaded,
}

/// The result of a write.
#[derive(Debug)]
pub enum Written<T> {
    /// It lies there at this revision.
    Done(u64),
    /// Something else lies there (`None`: nothing, a marker, or what cannot be read), at this revision.
    Found(Option<T>, u64),
}

/// The lease bucket.
#[derive(Debug, Clone)]
pub struct LeaseStore {
    bucket: Arc<dyn Cells>,
}

impl LeaseStore {
    /// Sessions and leases in these cells.
    pub fn new(bucket: Arc<dyn Cells>) -> Self {
        Self { bucket }
    }

    /// The session of an instance and the revision to write it at, read from the leader of the bucket.
    pub async fn session(&self, instance: &str) -> Result<(Option<SessionRecord>, u64), Error> {
        self.read(&session_key(instance)).await
    }

    /// The lease of a replication and the revision to write it at, read from the leader of the bucket.
    pub async fn lease(&self, id: &str) -> Result<(Option<LeaseRecord>, u64), Error> {
        self.read(&lease_key(id)).await
    }

    async fn read<T: DeserializeOwned>(&self, key: &str) -> Result<(Option<T>, u64), Error> {
        let Some(stored) = self.bucket.last(key).await? else { return Ok((None, 0)) };
        Ok((stored.value.and_then(|value| serde_json::from_slice(&value).ok()), stored.revision))
    }

    /// Writes a session if its key is at `revision`; what else lies there is read back, also when the outcome was
    /// unknown. An error means that nobody knows.
    pub async fn put_session(&self, record: &SessionRecord, revision: u64) -> Result<Written<SessionRecord>, Error> {
        self.put(&session_key(&record.instance), record, revision).await
    }

    /// Writes a lease if its key is at `revision`, as [`LeaseStore::put_session`] does.
    pub async fn put_lease(
        &self,
        id: &str,
        record: &LeaseRecord,
        revision: u64,
    ) -> Result<Written<LeaseRecord>, Error> {
        self.put(&lease_key(id), record, revision).await
    }

    async fn put<T>(&self, key: &str, record: &T, revision: u64) -> Result<Written<T>, Error>
    where
        T: Serialize + DeserializeOwned + PartialEq,
    {
        let error = |message: String| Error { bucket: self.bucket.name().to_owned(), message };
        let value = serde_json::to_vec(record).map_err(|failed| error(failed.to_string()))?;
        let failed = match self.bucket.put(key, Bytes::from(value), revision).await {
            Ok(revision) => return Ok(Written::Done(revision)),
            Err(PutError::Refused(error)) => return Err(error),
            Err(PutError::Conflict) => None,
            Err(PutError::Unknown(error)) => Some(error),
        };
        match (self.read::<T>(key).await?, failed) {
            ((Some(found), at), _) if found == *record => Ok(Written::Done(at)),
            // Nobody wrote, so far not even we.
            ((_, at), Some(error)) if at == revision => Err(error),
            ((found, at), _) => Ok(Written::Found(found, at)),
        }
    }

    /// Removes a session if its key is at `revision`; others see that it is gone.
    pub async fn remove_session(&self, instance: &str, revision: u64) -> Result<(), Error> {
        match self.bucket.mark_deleted(&session_key(instance), revision).await {
            // Somebody else wrote: it is not ours to remove.
            Ok(_) | Err(PutError::Conflict) => Ok(()),
            Err(PutError::Refused(error) | PutError::Unknown(error)) => Err(error),
        }
    }

    /// Removes what a removal left, if nothing was written since.
    pub async fn forget_session(&self, instance: &str, revision: u64) -> Result<(), Error> {
        self.bucket.forget_through(&session_key(instance), revision).await
    }

    /// Removes the lease of a replication that is not there any more, with its epoch, unless it was written again after
    /// this revision.
    pub async fn forget_lease(&self, id: &str, revision: u64) -> Result<(), Error> {
        self.bucket.forget_through(&lease_key(id), revision).await
    }

    /// All sessions and leases as they are, then [`LeaseChange::Loaded`], then every change as it happens, for ever.
    pub async fn watch(&self) -> Result<BoxStream<'static, Result<LeaseChange, Error>>, Error> {
        let changes = self.bucket.watch().await?;
        Ok(changes.filter_map(|change| ready(change.map(told).transpose())).boxed())
    }
}

fn session_key(instance: &str) -> String {
    format!("{SESSION}{instance}")
}

fn lease_key(id: &str) -> String {
    format!("{LEASE}{id}")
}

/// A change of the bucket as a change of sessions and leases; other keys are ignored.
fn told(change: Change) -> Option<LeaseChange> {
    let (key, revision, value) = match change {
        Change::Put { key, revision, value, .. } => (key, revision, Some(value)),
        Change::Deleted { key, revision } => (key, revision, None),
        Change::Recreated => return Some(LeaseChange::Recreated),
        Change::Loaded => return Some(LeaseChange::Loaded),
    };
    if let Some(instance) = key.strip_prefix(SESSION) {
        let record = value.and_then(|value| serde_json::from_slice(&value).ok());
        return Some(LeaseChange::Session { instance: instance.to_owned(), revision, record });
    }
    let id = key.strip_prefix(LEASE)?.to_owned();
    let record = value.and_then(|value| serde_json::from_slice(&value).ok());
    Some(LeaseChange::Lease { id, revision, record })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_other_versions_are_kept() {
        let lease = json!({"version": 2, "instance": "a", "session": "s", "epoch": 3, "later": [1]});
        let record: LeaseRecord = serde_json::from_value(lease.clone()).unwrap();
        assert_eq!(serde_json::to_value(&record).unwrap(), lease);
        let session = json!({"version": 2, "instance": "a", "session": "s", "ttl_ms": 3000, "host": "h", "pid": 1,
            "program": "2.0.0", "started": "2026-01-02T03:04:05Z", "nonce": 7, "later": {"x": 1}});
        let record: SessionRecord = serde_json::from_value(session.clone()).unwrap();
        assert_eq!(serde_json::to_value(&record).unwrap(), session);
    }

    #[test]
    fn other_keys_of_the_bucket_are_left_alone() {
        let put = |key: &str| {
            told(Change::Put { key: key.to_owned(), revision: 1, value: Bytes::from("{}"), age: Duration::ZERO })
        };
        assert_eq!(put("notes"), None);
        let unreadable = LeaseChange::Lease { id: "A.b".to_owned(), revision: 1, record: None };
        assert_eq!(put("lease.A.b"), Some(unreadable));
    }
}
