//! What the other instances say, kept in memory: the position records with the rows that their leaders saved, and
//! the sessions of the lease bucket. Every question about the group is answered from here.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream::BoxStream};
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use super::trouble::Trouble;
use crate::store::{Error, PositionRecord, PositionStore, SessionChange, SessionRecord, SessionStore};

/// An instance that was silent for longer is gone.
pub const GONE_AFTER: Duration = Duration::from_secs(60);

/// An instance that was silent for longer missed two renewals: what it said last may not be so any more.
const DOUBTED_AFTER: Duration = Duration::from_secs(10);

/// The group as it was last heard of; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Group {
    records: watch::Receiver<HashMap<String, Bytes>>,
    sessions: watch::Sender<Sessions>,
    _followers: Arc<[AbortOnDropHandle<()>; 2]>,
}

/// All sessions by instance.
#[derive(Debug, Clone, Default)]
pub(super) struct Sessions {
    pub(super) known: BTreeMap<String, Heard>,
    /// Whether all of them have been read once.
    pub(super) loaded: bool,
}

/// What was heard of one instance.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    /// When, on our own clock: nobody else's can be trusted.
    pub(super) at: Instant,
    pub(super) revision: u64,
    /// `None` for what a removal left, or what cannot be read.
    pub(super) record: Option<SessionRecord>,
}

impl Group {
    /// Follows both buckets for as long as somebody has a clone.
    pub(super) fn follow(positions: PositionStore, sessions: SessionStore) -> Self {
        let (known, records) = watch::channel(HashMap::new());
        let records_follower = tokio::spawn(follow(
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
        let all = watch::Sender::new(Sessions::default());
        let heard = all.clone();
        let sessions_follower = tokio::spawn(follow(
            "the sessions are not watched",
            async move || sessions.watch().await,
            move |change| heard.send_modify(|sessions| sessions.apply(change)),
        ));
        let followers = [records_follower, sessions_follower].map(AbortOnDropHandle::new);
        Self { records, sessions: all, _followers: Arc::new(followers) }
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
        self.sessions.borrow().clone()
    }

    /// Whether an instance is known not to be there any more.
    pub(super) fn is_gone(&self, instance: &str) -> bool {
        self.sessions.borrow().is_gone(instance)
    }

    /// Revision of an instance's session, if it has one.
    pub(super) fn session(&self, instance: &str) -> Option<u64> {
        let sessions = self.sessions.borrow();
        sessions.known.get(instance).filter(|heard| heard.record.is_some()).map(|heard| heard.revision)
    }

    /// Whether an instance is there as far as is known, and what it said last may not be so any more.
    pub(super) fn is_doubted(&self, instance: &str) -> bool {
        self.sessions.borrow().is_doubted(instance)
    }

    /// Nothing is left of a session: its key was removed without a trace.
    pub(super) fn forget(&self, instance: &str, revision: u64) {
        let same = |heard: &Heard| heard.revision == revision;
        self.sessions.send_if_modified(|sessions| {
            sessions.known.get(instance).is_some_and(same) && sessions.known.remove(instance).is_some()
        });
    }
}

impl Sessions {
    fn apply(&mut self, change: SessionChange) {
        let (instance, revision, record) = match change {
            SessionChange::Put { instance, revision, record } => (instance, revision, record),
            SessionChange::Deleted { instance, revision } => (instance, revision, None),
            SessionChange::Loaded => {
                self.loaded = true;
                return;
            }
        };
        self.known.insert(instance, Heard { at: Instant::now(), revision, record });
    }

    /// Those that are there, with the time since they were heard of.
    pub(super) fn present(&self) -> impl Iterator<Item = (&SessionRecord, Duration)> {
        let all = self.known.values().filter_map(|heard| Some((heard.record.as_ref()?, heard.at.elapsed())));
        all.filter(|(_, silent)| *silent <= GONE_AFTER)
    }

    /// Whether an instance is known not to be there any more.
    pub(super) fn is_gone(&self, instance: &str) -> bool {
        self.loaded && !self.present().any(|(record, _)| record.instance == instance)
    }

    /// Whether an instance is there as far as is known, and what it said last may not be so any more.
    fn is_doubted(&self, instance: &str) -> bool {
        self.present().any(|(record, silent)| record.instance == instance && silent > DOUBTED_AFTER)
    }
}

/// Follows a bucket for ever; a watch that cannot be opened is tried again.
async fn follow<T>(
    what: &'static str,
    open: impl AsyncFn() -> Result<BoxStream<'static, Result<T, Error>>, Error>,
    mut apply: impl FnMut(T),
) {
    let mut trouble = Trouble::new(what);
    loop {
        match open().await {
            Ok(mut changes) => {
                while let Some(change) = changes.next().await {
                    match change {
                        Ok(change) => {
                            trouble.over();
                            apply(change);
                        }
                        Err(error) => trouble.wait(&error.to_string()).await,
                    }
                }
            }
            Err(error) => trouble.wait(&error.to_string()).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn heard(instance: &str, seconds: u64) -> (String, Heard) {
        let record = SessionRecord {
            version: 1,
            instance: instance.to_owned(),
            session: "s".to_owned(),
            host: String::new(),
            pid: 1,
            program: String::new(),
            started: DateTime::UNIX_EPOCH,
            nonce: 1,
        };
        let at = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("a clock that is old enough");
        (instance.to_owned(), Heard { at, revision: 1, record: Some(record) })
    }

    #[test]
    fn who_missed_renewals_is_doubted_until_it_is_gone() {
        let known = BTreeMap::from([heard("fresh", 9), heard("late", 11), heard("gone", 61)]);
        let sessions = Sessions { known, loaded: true };
        let doubted: Vec<_> =
            ["fresh", "late", "gone", "nobody"].into_iter().filter(|instance| sessions.is_doubted(instance)).collect();
        assert_eq!(doubted, ["late"]);
    }

    #[test]
    fn who_was_silent_for_long_is_gone() {
        let mut sessions = Sessions { known: BTreeMap::from([heard("a", 59), heard("b", 61)]), loaded: false };
        let present: Vec<_> = sessions.present().map(|(record, _)| record.instance.as_str()).collect();
        assert_eq!(present, ["a"]);
        // Before all of them are read nobody is known to be gone.
        assert!(!sessions.is_gone("b") && !sessions.is_gone("c"));
        sessions.apply(SessionChange::Loaded);
        assert!(!sessions.is_gone("a") && sessions.is_gone("b") && sessions.is_gone("c"));
        sessions.apply(SessionChange::Deleted { instance: "a".to_owned(), revision: 2 });
        assert!(sessions.is_gone("a"));
    }
}
