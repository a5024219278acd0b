//! The published state of the heartbeats.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    config::Heartbeats,
    election::CampaignView,
    metrics::{self, HeartbeatSubject},
};

/// Counters, and the state of the election.
#[derive(Debug)]
pub(super) struct HeartbeatStats {
    host: String,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    paused: bool,
    subjects: Vec<HeartbeatSubject>,
    poll: Option<CampaignView>,
}

impl HeartbeatStats {
    pub(super) fn new(host: &str) -> Self {
        Self { host: host.to_owned(), inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other heartbeats are published from now on; a subject that was among the former ones keeps its counters.
    pub(super) fn begin(&self, heartbeats: Option<&Heartbeats>) {
        let mut inner = self.inner();
        let mut before = std::mem::take(&mut inner.subjects);
        let subjects = heartbeats.into_iter().flat_map(|heartbeats| &heartbeats.subjects);
        inner.subjects = subjects
            .map(|one| match before.iter().position(|known| known.subject == one.subject) {
                Some(at) => before.swap_remove(at),
                None => HeartbeatSubject { subject: one.subject.clone(), ..HeartbeatSubject::default() },
            })
            .collect();
        // There is no leader before the campaign has reported one.
        inner.paused = heartbeats.is_some_and(|heartbeats| heartbeats.leader_election);
        inner.poll = None;
    }

    pub(super) fn stands(&self, poll: CampaignView) {
        self.inner().poll = Some(poll);
    }

    pub(super) fn paused(&self, paused: bool) {
        self.inner().paused = paused;
    }

    /// Changes the counters of one subject, by its index in the document.
    pub(super) fn count(&self, index: usize, change: impl FnOnce(&mut HeartbeatSubject)) {
        if let Some(subject) = self.inner().subjects.get_mut(index) {
            change(subject);
        }
    }

    pub(super) fn reading(&self) -> Option<metrics::HeartbeatReading> {
        let Inner { paused, subjects, .. } = &*self.inner();
        let (host, paused, subjects) = (self.host.clone(), *paused, subjects.clone());
        (!subjects.is_empty()).then_some(metrics::HeartbeatReading { host, paused, subjects })
    }

    pub(super) fn election(&self) -> Option<metrics::ElectionReading> {
        self.inner().poll.as_ref().map(CampaignView::reading)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::parse_heartbeats;

    fn heartbeats(leader_election: bool) -> Heartbeats {
        let document = json!({"url": "a", "subjects": [{"subject": "hb.a"}], "leader_election": leader_election});
        parse_heartbeats(&document, |_| Vec::new()).unwrap().unwrap()
    }

    #[test]
    fn what_an_election_decides_is_paused_until_it_is_won() {
        let stats = HeartbeatStats::new("host");
        let paused = || stats.reading().map(|reading| reading.paused);
        assert_eq!(paused(), None);
        stats.begin(Some(&heartbeats(false)));
        assert_eq!(paused(), Some(false));
        stats.begin(Some(&heartbeats(true)));
        assert_eq!(paused(), Some(true));
        stats.paused(false);
        assert_eq!(paused(), Some(false));
        stats.begin(None);
        assert_eq!(paused(), None);
    }
}
