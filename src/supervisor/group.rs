//! The group in memory: the position records with the status rows that their leaders saved, and the sessions of the lease
//! bucket. Every request about the group is answered from here.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    boottime,
    lease::{Leases, Sessions},
    status::Verification,
    store::{PositionChange, PositionRecord, PositionStore, follow, verification_key},
};

/// The group as last received; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Group {
    records: watch::Receiver<HashMap<String, GroupRecord>>,
    leases: Leases,
    _follower: Arc<AbortOnDropHandle<()>>,
}

/// A position record as last received.
#[derive(Debug)]
struct GroupRecord {
    value: Bytes,
    reported: Option<Reported>,
}

/// When a status row was written. Claims write the record again with the row as it was, so this is kept while
/// `reported_at` stays the same.
#[derive(Debug, Clone, Copy)]
struct Reported {
    /// By the clock of the source server.
    at: DateTime<Utc>,
    heard: Instant,
    /// Its age at that time.
    age: Duration,
}

impl GroupRecord {
    fn new(value: Bytes, age: Duration, before: Option<&Self>, now: Instant) -> Self {
        #[derive(Deserialize)]
        struct Part {
            reported_at: Option<DateTime<Utc>>,
        }
        let part = serde_json::from_slice::<Part>(&value).ok();
        let at = part.and_then(|part| part.reported_at);
        let before = before.and_then(|before| before.reported).filter(|before| Some(before.at) == at);
        let reported = before.or_else(|| Some(Reported { at: at?, heard: now, age }));
        Self { value, reported }
    }

    /// The time of the source server now, whatever the clock of this host shows.
    fn source_time(&self, now: Instant) -> Option<DateTime<Utc>> {
        let Reported { at, heard, age } = self.reported?;
        at.checked_add_signed(TimeDelta::from_std(now.saturating_duration_since(heard).saturating_add(age)).ok()?)
    }
}

impl Group {
    /// Follows the position records until the last clone is dropped.
    pub(super) fn follow(positions: PositionStore, leases: Leases) -> Self {
        let (known, records) = watch::channel(HashMap::new());
        let follower = tokio::spawn(follow(
            "the position records are not watched",
            async move || positions.watch().await,
            move |change| {
                let PositionChange { id, value, age } = change;
                known.send_modify(|known: &mut HashMap<String, GroupRecord>| {
                    let before = known.remove(&id);
                    if let Some(value) = value {
                        known.insert(id, GroupRecord::new(value, age, before.as_ref(), boottime::now()));
                    }
                });
            },
        ));
        Self { records, leases, _follower: Arc::new(AbortOnDropHandle::new(follower)) }
    }

    /// The record of a replication as its holder last saved it.
    pub(super) fn record(&self, id: &str) -> Option<PositionRecord> {
        serde_json::from_slice(&self.records.borrow().get(id)?.value).ok()
    }

    /// The newest verification of a replication, as its leader saved it last.
    pub(super) fn verification(&self, id: &str) -> Option<Verification> {
        serde_json::from_slice(&self.records.borrow().get(&verification_key(id))?.value).ok()
    }

    /// The time of a replication's source server, as counted from what its leader reported last; `None` where it did not.
    pub(super) fn source_time(&self, id: &str) -> Option<DateTime<Utc>> {
        self.records.borrow().get(id)?.source_time(boottime::now())
    }

    /// Waits until the record of a replication, if there is one, is as expected; forever if it never is.
    pub(super) async fn record_when(&self, id: &str, when: impl Fn(&PositionRecord) -> bool) {
        let mut records = self.records.clone();
        let mut seen: Option<Bytes> = None;
        let fits = |records: &HashMap<String, GroupRecord>| {
            let Some(GroupRecord { value, .. }) = records.get(id) else { return true };
            if seen.as_ref() == Some(value) {
                return false;
            }
            seen = Some(value.clone());
            serde_json::from_slice(value).is_ok_and(|record| when(&record))
        };
        // An error means that the follower has ended.
        let _ = records.wait_for(fits).await;
    }

    /// All sessions.
    pub(super) fn sessions(&self) -> Sessions {
        self.leases.sessions().clone()
    }

    /// Whether an instance is known to be gone.
    pub(super) fn is_gone(&self, instance: &str) -> bool {
        self.leases.sessions().is_gone(instance)
    }

    /// Whether an instance seems present, but has been silent long enough to have stopped by itself.
    pub(super) fn is_doubted(&self, instance: &str) -> bool {
        self.leases.sessions().is_doubted(instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_source_goes_on_from_what_its_leader_reported() {
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let time = |second: i64| DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap();
        let record =
            |second: i64| Bytes::from(serde_json::json!({"epoch": 1, "reported_at": time(second)}).to_string());
        // Read 30 s after it was written.
        let first = GroupRecord::new(record(100), Duration::from_secs(30), None, begun);
        assert_eq!(first.source_time(begun), Some(time(130)));
        assert_eq!(first.source_time(after(5)), Some(time(135)));
        // Claimed: written again just now, with the row as it was.
        let claimed = GroupRecord::new(record(100), Duration::ZERO, Some(&first), after(10));
        assert_eq!(claimed.source_time(after(10)), Some(time(140)));
        // Reported again; the source's clock was set back meanwhile.
        let again = GroupRecord::new(record(90), Duration::from_secs(1), Some(&claimed), after(20));
        assert_eq!(again.source_time(after(22)), Some(time(93)));
        // The last times that there are, as somebody may write them by hand.
        let last = Bytes::from(serde_json::json!({"reported_at": DateTime::<Utc>::MAX_UTC}).to_string());
        assert_eq!(GroupRecord::new(last, Duration::from_secs(30), None, begun).source_time(after(5)), None);
        for other in ["{}", "[]", "{\"reported_at\": null}"] {
            assert_eq!(
                GroupRecord::new(Bytes::from(other), Duration::ZERO, Some(&again), after(30)).source_time(after(30)),
                None
            );
        }
    }
}
