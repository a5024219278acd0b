//! The sessions of all instances as last received, for requests about the group.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::{boottime, store::SessionRecord};

/// An instance that was silent for longer is no longer shown.
pub(super) const GONE_AFTER: Duration = Duration::from_secs(60);

/// All sessions by instance.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    pub(super) known: BTreeMap<String, LastHeard>,
    /// Whether all of them have been read once.
    pub(super) loaded: bool,
}

/// The last sign of life of one instance.
#[derive(Debug, Clone)]
pub(super) struct LastHeard {
    /// When, by our own clock: clocks of other hosts cannot be trusted.
    pub(super) at: Instant,
    pub(super) revision: u64,
    /// `None` for the marker of a removal, or for a record that cannot be read.
    pub(super) record: Option<SessionRecord>,
}

impl LastHeard {
    fn silent(&self) -> Duration {
        boottime::now().saturating_duration_since(self.at)
    }
}

impl Sessions {
    /// The current entry at the key of an instance.
    pub(super) fn saw(&mut self, instance: String, revision: u64, record: Option<SessionRecord>) {
        self.known.insert(instance, LastHeard { at: boottime::now(), revision, record });
    }

    /// The instances that are present, with the time since their last sign of life.
    pub fn present(&self) -> impl Iterator<Item = (&SessionRecord, Duration)> {
        let all = self.known.values().filter_map(|heard| Some((heard.record.as_ref()?, heard.silent())));
        all.filter(|(_, silent)| *silent <= GONE_AFTER)
    }

    /// Whether an instance is known to be gone.
    pub fn is_gone(&self, instance: &str) -> bool {
        self.loaded && !self.present().any(|(record, _)| record.instance == instance)
    }

    /// Whether an instance seems present, but has been silent long enough to have stopped by itself.
    pub fn is_doubted(&self, instance: &str) -> bool {
        let late = |record: &SessionRecord| Duration::from_millis(record.ttl_ms).mul_f64(2.0 / 3.0);
        self.present().any(|(record, silent)| record.instance == instance && silent > late(record))
    }

    /// Sessions whose silence is long enough to remove them: instance, revision, and whether only a marker is left.
    pub(super) fn stale(&self) -> Vec<(String, u64, bool)> {
        let old = self.known.iter().filter(|(_, heard)| {
            let ttl = heard.record.as_ref().map_or(Duration::ZERO, |record| Duration::from_millis(record.ttl_ms));
            heard.silent() > GONE_AFTER.max(ttl * 4)
        });
        old.map(|(instance, heard)| (instance.clone(), heard.revision, heard.record.is_none())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(instance: &str, seconds: u64) -> (String, LastHeard) {
        let record = SessionRecord { instance: instance.to_owned(), ttl_ms: 15_000, ..SessionRecord::default() };
        let at = Instant::now().checked_sub(Duration::from_secs(seconds)).expect("a clock that is old enough");
        (instance.to_owned(), LastHeard { at, revision: 1, record: Some(record) })
    }

    #[test]
    fn who_has_stopped_by_itself_is_doubted_until_it_is_gone() {
        let known = BTreeMap::from([heard("fresh", 9), heard("late", 11), heard("gone", 61)]);
        let sessions = Sessions { known, loaded: true };
        let all = ["fresh", "late", "gone", "nobody"];
        let doubted: Vec<_> = all.into_iter().filter(|instance| sessions.is_doubted(instance)).collect();
        assert_eq!(doubted, ["late"]);
        assert_eq!(sessions.stale(), [("gone".to_owned(), 1, false)]);
    }

    #[test]
    fn who_was_silent_for_long_is_gone() {
        let mut sessions = Sessions { known: BTreeMap::from([heard("a", 59), heard("b", 61)]), loaded: false };
        let present: Vec<_> = sessions.present().map(|(record, _)| record.instance.as_str()).collect();
        assert_eq!(present, ["a"]);
        // Before all of them were read, no instance is known to be gone.
        assert!(!sessions.is_gone("b") && !sessions.is_gone("c"));
        sessions.loaded = true;
        assert!(!sessions.is_gone("a") && sessions.is_gone("b") && sessions.is_gone("c"));
        sessions.saw("a".to_owned(), 2, None);
        assert!(sessions.is_gone("a"));
    }
}
