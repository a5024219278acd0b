//! Position records: the position of each replication, its leader, and its status row.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::{DateTime, SubsecRound, Utc};
use futures_util::{StreamExt, future::ready, stream::BoxStream};
use nats_lane::entropy;
use serde::{Deserialize, Deserializer, Serialize};

use super::{bucket::PutError, cells::Cells, error::Error, watch::Change};
use crate::{
    config::{NativeKind, OriginTag},
    status::{OnlyAtTarget, Row, State, TargetMode, Verification},
};

/// Value of a replication's key in the positions bucket. Readable JSON; fields that this version does not
/// know are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionRecord {
    /// Format of the record: 1.
    pub version: u32,
    /// Grows with every new holder; the fence against older ones.
    pub epoch: u64,
    /// Instance that holds the replication.
    pub holder: String,
    /// Changes with every write, so that a write whose outcome is unknown can be recognised when read back.
    pub nonce: u64,
    /// Everything at the source up to here is settled.
    pub source: Option<SourceWitness>,
    /// The newest message of ours that is known to be at the target.
    pub target: Option<TargetWitness>,
    /// The newest message of ours, where it is after `target`: a shared target confirms the messages of a batch without
    /// their sequences. It is looked for at the next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_target: Option<AfterTarget>,
    /// When source and target were saved last, by the clock of the source server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_at: Option<DateTime<Utc>>,
    /// Kept because a target that turned out to be shared stays so.
    #[serde(default)]
    pub target_mode: TargetMode,
    /// The deduplication headers of messages that may be in flight; `None` where no run has saved them. Saved before a
    /// run sends the first message with another header than the record has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamps: Option<Stamps>,
    /// The kind of native feed that the target holds messages of; `None` where it was never fed. Saved before the first
    /// message is delivered, and removed before the first copy is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fed: Option<NativeKind>,
    /// The position was moved back, and no run has begun since: messages at the target are copied again as far as they
    /// come after the position.
    #[serde(default, skip_serializing_if = "is_default")]
    pub moved_back: bool,
    /// How often the position was moved back. Part of the message ids, or the target would take what is copied again
    /// for duplicates.
    #[serde(default, skip_serializing_if = "is_default")]
    pub generation: u64,
    /// Copies at the target of what the source has lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orphans: Option<Orphans>,
    /// What only the target still has, by the newest loss at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only_at_target: Option<OnlyAtTarget>,
    /// The most messages that any run of this position could have in flight: so many may be stored before one that was
    /// sent earlier. Saved before a run sends the first message under a greater limit.
    #[serde(default, skip_serializing_if = "is_default")]
    pub most_in_flight: u64,
    /// Whether a durable consumer may have been made at the source, to be deleted with the replication.
    #[serde(default, skip_serializing_if = "is_default")]
    pub durable: bool,
    /// What identifies the installation in the metadata of that consumer: another one's is not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub installation: Option<String>,
    /// With sampling: what the records of senders say holds for everything up to this source sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampled: Option<u64>,
    /// With sampling: how senders are identified there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inspected: Option<String>,
    /// With sampling: what was stored before this may not have been seen, so nobody counts as unseen for that time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unseen_from: Option<DateTime<Utc>>,
    /// What copies from the target stream carry, as far as it was known. Kept, because such copies can still be under way
    /// after the replication that made them was deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_target: Option<FromTarget>,
    /// The holder waits for Choria's election, and somebody else copies.
    #[serde(default, skip_serializing_if = "is_default")]
    pub electing: bool,
    /// When the status row was written, by the clock of the source server as the writer knew it. Other instances count
    /// ages from here: their own clocks may be wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<DateTime<Utc>>,
    /// Status row at the time of the write. One that cannot be read (an edit by hand, another version) is none: the
    /// rest of the record is worth more than it.
    #[serde(default, deserialize_with = "readable")]
    pub status: Option<Row>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl PositionRecord {
    /// Whether only what the replication reports of itself, while it is paused, differs from another record.
    pub fn only_reports(&self, other: &Self) -> bool {
        let is_paused = |record: &Self| record.status.as_ref().is_none_or(|row| row.state == State::Paused);
        let same =
            Self { status: other.status.clone(), reported_at: other.reported_at, nonce: other.nonce, ..self.clone() };
        is_paused(self) && same == *other
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn readable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Row>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

/// A sequence of the source stream and the proof that it is the same stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceWitness {
    /// Source sequence; 0 before the first message.
    pub seq: u64,
    /// Stored time of the message at `seq`, nanoseconds since the Unix epoch; `None` if there was none.
    pub time_ns: Option<i64>,
    /// When there was none, by the source server's clock: a message that was stored at or below `seq` after this time is
    /// one that the stream stored again after it had lost its end. `None` where the server reports no time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub none_at: Option<DateTime<Utc>>,
    /// `created` of the stream; a hint, not an identity.
    pub created: String,
}

/// A sequence of the target stream and the proof that it is the same stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetWitness {
    /// Target sequence; 0 while nothing of ours is known to be there.
    pub seq: u64,
    /// Source sequence of the message that lies there; 0 after the position was moved back, when what lies there and
    /// before says nothing about what was copied.
    pub source_seq: u64,
    /// `created` of the stream; a hint, not an identity.
    pub created: String,
}

/// A message of ours that the target confirmed without its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AfterTarget {
    /// The lowest target sequence that it can have.
    pub at_least: u64,
    /// Source sequence.
    pub source_seq: u64,
}

/// What copies from the target stream carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromTarget {
    /// `created` of the target stream; what was known of another one does not count.
    pub created: String,
    /// What they carry.
    pub tags: Vec<OriginTag>,
}

/// What the messages of a run carry so that none is stored twice and no two runs write at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stamps {
    /// `Nats-Expected-Last-Sequence`.
    Chain,
    /// `Nats-Msg-Id`.
    Ids,
    /// Some of the messages have the one, some the other.
    Both,
}

impl Stamps {
    /// Whether some of the messages may carry an expected sequence and no id.
    pub fn has_chain(self) -> bool {
        self != Self::Ids
    }

    /// Whether some of the messages may carry ids.
    pub fn has_ids(self) -> bool {
        self != Self::Chain
    }

    /// Of these messages and those.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if self == other { self } else { Self::Both }
    }
}

/// The copies, after all others at the time, whose source messages went with the end of the source. They stay, and
/// prove nothing: a start that finds them at the end of the target does not take them for new copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphans {
    /// First target sequence.
    pub from: u64,
    /// Last target sequence.
    pub to: u64,
}

impl Orphans {
    /// Whether a target sequence is one of theirs.
    pub fn contains(&self, seq: u64) -> bool {
        (self.from..=self.to).contains(&seq)
    }
}

/// A change of one record, from the watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionChange {
    /// Replication id.
    pub id: String,
    /// The record as it is in the bucket; `None` when it was removed.
    pub value: Option<Bytes>,
    /// How long ago it was written.
    pub age: Duration,
}

/// Why a save did not happen.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Another process wrote the record: the epoch decides which one continues.
    #[error("the position record was written by instance `{}` (epoch {})", .record.holder, .record.epoch)]
    Conflict {
        /// What is there now.
        record: Box<PositionRecord>,
        /// Its revision.
        revision: u64,
    },
    /// The record is gone: deleted by hand or with its bucket.
    #[error("the position record was deleted")]
    Deleted {
        /// Revision that a new record has to be written at.
        revision: u64,
    },
    /// The write failed or its outcome is unknown; the same write may be tried again.
    #[error(transparent)]
    Store(#[from] Error),
}

/// The positions bucket.
#[derive(Debug, Clone)]
pub struct PositionStore {
    bucket: Arc<dyn Cells>,
}

impl PositionStore {
    /// Position records in these cells.
    pub fn new(bucket: Arc<dyn Cells>) -> Self {
        Self { bucket }
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error { bucket: self.bucket.name().to_owned(), message: message.into() }
    }

    /// The record of a replication and the revision to write it at, read from the leader of the bucket. Where there
    /// is none it is one that nobody has held.
    pub async fn read(&self, id: &str) -> Result<(PositionRecord, u64), Error> {
        Ok(match self.current(id).await? {
            Current::Record(record, revision) => (*record, revision),
            Current::Nothing { revision } => (PositionRecord::new(), revision),
        })
    }

    /// All records as they are, then every change as it happens, for ever.
    pub async fn watch(&self) -> Result<BoxStream<'static, Result<PositionChange, Error>>, Error> {
        let changes = self.bucket.watch().await?;
        let told = |change| match change {
            Change::Put { key, value, age, .. } => Some(PositionChange { id: key, value: Some(value), age }),
            Change::Deleted { key, .. } => Some(PositionChange { id: key, value: None, age: Duration::ZERO }),
            Change::Recreated | Change::Loaded => None,
        };
        Ok(changes.filter_map(move |change| ready(change.map(told).transpose())).boxed())
    }

    async fn current(&self, id: &str) -> Result<Current, Error> {
        let Some(stored) = self.bucket.last(id).await? else { return Ok(Current::Nothing { revision: 0 }) };
        let Some(value) = stored.value else { return Ok(Current::Nothing { revision: stored.revision }) };
        match serde_json::from_slice::<Box<PositionRecord>>(&value) {
            Ok(record) if record.version > VERSION => {
                let version = record.version;
                let hint = "run that program, or delete the key so that the position is searched again";
                Err(self.error(format!(
                    "key `{id}` holds a record of version {version}, of a newer program than this one, which knows {VERSION}: {hint}"
                )))
            }
            Ok(record) => Ok(Current::Record(record, stored.revision)),
            Err(error) => {
                let hint = "correct it, or delete the key so that the position is searched again";
                Err(self.error(format!("key `{id}` holds no position record ({error}): {hint}")))
            }
        }
    }

    /// Makes `holder` the holder with the epoch of its lease, by compare-and-swap (again after another write at the
    /// same moment). This is the fence: from now on every save of an older holder is refused. It is refused itself if
    /// the record is that of a newer one.
    pub async fn claim(&self, id: &str, holder: &str, epoch: u64) -> Result<Claim, ClaimError> {
        for _ in 0..CLAIM_TRIES {
            let (before, revision) = self.read(id).await?;
            if before.epoch > epoch || (before.epoch == epoch && before.holder != holder) {
                return Err(ClaimError::Newer { holder: before.holder, epoch: before.epoch });
            }
            let previous = before.holder.clone();
            let record = before.taken_by(holder, epoch).awake();
            match self.save(id, record.clone(), revision).await {
                Ok(revision) => return Ok(Claim { record, revision, previous }),
                Err(SaveError::Conflict { .. } | SaveError::Deleted { .. }) => {}
                Err(SaveError::Store(error)) => return Err(error.into()),
            }
        }
        Err(self.error(format!("key `{id}` cannot be claimed: others write it all the time")).into())
    }

    /// Writes the record if the key is still at `revision`; returns the new revision. A write whose outcome is
    /// unknown is read back before it is judged (content: holder, epoch, nonce).
    pub fn save(
        &self,
        id: &str,
        record: PositionRecord,
        revision: u64,
    ) -> impl Future<Output = Result<u64, SaveError>> + Send + 'static {
        let (store, id) = (self.clone(), id.to_owned());
        async move {
            let value = serde_json::to_vec(&record).map_err(|error| store.error(error.to_string()))?;
            let failed = match store.bucket.put(&id, value.into(), revision).await {
                Ok(revision) => return Ok(revision),
                Err(PutError::Refused(error)) => return Err(error.into()),
                // a conflict may be with our own write, after a try with unknown outcome
                Err(PutError::Conflict) => None,
                Err(PutError::Unknown(error)) => Some(error),
            };
            match (store.current(&id).await?, failed) {
                (Current::Record(found, at), _) if found.same_write(&record) => Ok(at),
                (Current::Record(_, at) | Current::Nothing { revision: at }, Some(error)) if at == revision => {
                    Err(error.into()) // nobody wrote, so far not even we
                }
                (Current::Record(record, revision), _) => Err(SaveError::Conflict { record, revision }),
                (Current::Nothing { revision }, _) => Err(SaveError::Deleted { revision }),
            }
        }
    }

    /// Whether the key is still at `revision`; an error says what is there instead, as that of [`PositionStore::save`] does.
    /// What cannot be read now is not known to be another one.
    pub fn confirm(&self, id: &str, revision: u64) -> impl Future<Output = Result<u64, SaveError>> + Send + 'static {
        let (store, id) = (self.clone(), id.to_owned());
        async move {
            match store.current(&id).await {
                Ok(Current::Record(record, at)) if at != revision => Err(SaveError::Conflict { record, revision: at }),
                Ok(Current::Nothing { revision }) => Err(SaveError::Deleted { revision }),
                Ok(Current::Record(..)) | Err(_) => Ok(revision),
            }
        }
    }

    /// The newest verification of a replication, and the revision to write the next one at.
    pub async fn verification(&self, id: &str) -> Result<(Option<Verification>, u64), Error> {
        let stored = self.bucket.last(&verification_key(id)).await?;
        let revision = stored.as_ref().map_or(0, |stored| stored.revision);
        let value = stored.and_then(|stored| stored.value);
        // One that cannot be read is written again.
        Ok((value.and_then(|value| serde_json::from_slice(&value).ok()), revision))
    }

    /// Writes a verification if its key is still at `revision`; returns the new revision, and `None` after another write.
    pub async fn save_verification(
        &self,
        id: &str,
        verification: &Verification,
        revision: u64,
    ) -> Result<Option<u64>, Error> {
        let value = serde_json::to_vec(verification).map_err(|error| self.error(error.to_string()))?;
        match self.bucket.put(&verification_key(id), value.into(), revision).await {
            Ok(revision) => Ok(Some(revision)),
            Err(PutError::Conflict) => Ok(None),
            Err(PutError::Refused(error) | PutError::Unknown(error)) => Err(error),
        }
    }

    /// Forgets the verification of a replication.
    pub async fn remove_verification(&self, id: &str) -> Result<(), Error> {
        let (key, (_, revision)) = (verification_key(id), self.verification(id).await?);
        self.bucket.forget_through(&key, revision).await
    }

    /// Revision of the record of a replication, whatever it is; 0 if there is none.
    pub async fn revision(&self, id: &str) -> Result<u64, Error> {
        Ok(self.bucket.last(id).await?.map_or(0, |stored| stored.revision))
    }

    /// Forgets a replication: what was written up to and with a revision is removed without a trace.
    pub async fn remove(&self, id: &str, revision: u64) -> Result<(), Error> {
        self.bucket.forget_through(id, revision).await
    }
}

/// The key of the newest verification of a replication. An id has no `/`.
pub fn verification_key(id: &str) -> String {
    format!("{id}/verify")
}

const CLAIM_TRIES: usize = 10;
/// Format of the record that this program writes. It never overwrites a record of a newer format.
const VERSION: u32 = 1;

/// Why a record was not claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another process wrote it with a greater epoch.
    #[error("the position record was written by instance `{holder}` with epoch {epoch}")]
    Newer {
        /// Who wrote it.
        holder: String,
        /// Its epoch.
        epoch: u64,
    },
    /// It cannot be read or written now.
    #[error(transparent)]
    Store(#[from] Error),
}

/// A record that was claimed.
#[derive(Debug, Clone)]
pub struct Claim {
    /// As written.
    pub record: PositionRecord,
    /// Its revision.
    pub revision: u64,
    /// Who held it before; empty if nobody did.
    pub previous: String,
}

/// The entry at a key.
enum Current {
    Record(Box<PositionRecord>, u64),
    /// Never written (revision 0), removed, or the marker of a deletion by hand.
    Nothing {
        revision: u64,
    },
}

impl PositionRecord {
    /// That of a replication that has never run.
    pub(crate) fn new() -> Self {
        Self {
            version: VERSION,
            epoch: 0,
            holder: String::new(),
            nonce: 0,
            source: None,
            target: None,
            after_target: None,
            saved_at: None,
            target_mode: TargetMode::default(),
            stamps: None,
            moved_back: false,
            generation: 0,
            orphans: None,
            only_at_target: None,
            most_in_flight: 0,
            durable: false,
            installation: None,
            sampled: None,
            inspected: None,
            unseen_from: None,
            from_target: None,
            fed: None,
            electing: false,
            reported_at: None,
            status: None,
            other: BTreeMap::new(),
        }
    }

    /// The record with another holder and epoch: every save of an older holder is refused.
    fn taken_by(self, holder: &str, epoch: u64) -> Self {
        Self { epoch, holder: holder.to_owned(), nonce: entropy::random() >> 32, ..self }
    }

    /// Whoever claims it is not paused, and waits for nobody.
    fn awake(mut self) -> Self {
        self.electing = false;
        if let Some(row) = self.status.as_mut().filter(|row| row.state == State::Paused) {
            row.state = State::Starting;
        }
        self
    }

    /// The record with a status row that is written now.
    #[must_use]
    pub fn reporting(self, row: Row) -> Self {
        Self {
            reported_at: Some(row.source_time(nats_lane::entropy::now()).trunc_subsecs(3)),
            status: Some(row),
            ..self
        }
    }

    /// The record with another position, taken by the instance that moves it; `now` is the source server's time.
    #[must_use]
    pub fn moved(self, to: SourceWitness, by: &str, now: DateTime<Utc>) -> Self {
        let epoch = self.epoch + 1;
        let mut record = self.taken_by(by, epoch);
        // Where nothing was saved yet, the target may have copies from before all the same.
        if record.source.as_ref().is_none_or(|from| to.seq < from.seq) {
            record.moved_back = true;
            record.after_target = None;
            record.generation += 1;
        }
        if let Some(row) = &mut record.status {
            row.epoch = record.epoch;
            row.copy.position.source_seq = to.seq;
            // What waits behind it is not known yet.
            (row.copy.lag, row.copy.headroom) = (None, None);
            (row.copy.source.first_seq, row.copy.source.last_seq) = (None, None);
        }
        // What senders sent in between was not seen, or is seen as if it were news.
        if record.sampled.is_some() {
            record.sampled = Some(to.seq);
            record.unseen_from = Some(now);
        }
        record.source = Some(to);
        record
    }

    /// Who leads the replication, as far as the record knows.
    pub fn leader(&self) -> Option<&str> {
        match &self.status {
            Some(row) if row.epoch == self.epoch => row.leader.as_deref(),
            _ => Some(self.holder.as_str()).filter(|holder| !holder.is_empty()),
        }
    }

    fn same_write(&self, other: &Self) -> bool {
        (&self.holder, self.epoch, self.nonce) == (&other.holder, other.epoch, other.nonce)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_other_versions_are_kept() {
        let json = serde_json::json!({
            "version": 2, "epoch": 3, "holder": "a", "nonce": 4, "source": {"seq": 5, "time_ns": 6, "created": "c"},
            "target": null, "target_mode": "shared", "status": null, "later": {"x": [1]}
        });
        let record: PositionRecord = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(record.target_mode, TargetMode::Shared);
        assert_eq!(serde_json::to_value(&record).unwrap(), json);
    }

    #[test]
    fn a_move_back_is_remembered_and_fences_older_holders() {
        let at = |seq| SourceWitness { seq, time_ns: Some(1), none_at: None, created: "c".to_owned() };
        let now = DateTime::from_timestamp_nanos(7);
        let check = |from: Option<u64>, to: u64, expect: (bool, u64)| {
            let record = PositionRecord { epoch: 4, source: from.map(at), ..PositionRecord::new() };
            let moved = record.moved(at(to), "b", now);
            assert_eq!((moved.epoch, moved.holder.as_str(), moved.source), (5, "b", Some(at(to))));
            assert_eq!((moved.moved_back, moved.generation), expect, "{from:?} {to}");
        };
        check(Some(5), 4, (true, 1));
        check(Some(5), 0, (true, 1));
        check(Some(5), 6, (false, 0));
        check(Some(5), 5, (false, 0));
        check(None, 0, (true, 1));
        let back = PositionRecord { source: Some(at(5)), ..PositionRecord::new() }.moved(at(1), "b", now);
        let forth = back.moved(at(3), "b", now);
        assert!(forth.moved_back && forth.generation == 1);
        assert_eq!(forth.unseen_from, None);
        let sampled = PositionRecord { source: Some(at(5)), sampled: Some(4), ..PositionRecord::new() };
        let moved = sampled.moved(at(9), "b", now);
        assert_eq!((moved.sampled, moved.unseen_from), (Some(9), Some(now)));
    }

    #[test]
    fn a_report_says_when_it_was_made_by_the_clock_of_the_source() {
        let mut row: Row = serde_json::from_value(serde_json::json!({
            "replication": "S", "state": "paused", "origin": "kv", "leader": "a", "epoch": 1, "config_revision": 1
        }))
        .unwrap();
        row.copy.source.clock_offset_seconds = Some(3_600.0);
        let before = PositionRecord::new();
        let record = before.clone().reporting(row);
        let ahead = (record.reported_at.unwrap() - chrono::Utc::now()).num_seconds();
        assert!((3_500..3_700).contains(&ahead), "{ahead}");
        assert!(record.only_reports(&before));
        assert!(!PositionRecord { generation: 1, ..record }.only_reports(&before));
    }

    #[test]
    fn a_status_row_that_cannot_be_read_does_not_cost_the_position() {
        let json = serde_json::json!({
            "version": 1, "epoch": 3, "holder": "a", "nonce": 4, "source": {"seq": 5, "time_ns": 6, "created": "c"},
            "target": null, "status": {"state": "a state of the future"}
        });
        let record: PositionRecord = serde_json::from_value(json).unwrap();
        assert_eq!((record.source.map(|source| source.seq), record.status), (Some(5), None));
    }
}
