//! What is known of the heartbeats from the outside.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    config::Heartbeats,
    election::Poll,
    metrics::{self, HeartbeatSubject},
};

/// Numbers, and how the election stands.
#[derive(Debug)]
pub(super) struct HeartbeatStats {
    host: String,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    paused: bool,
    subjects: Vec<HeartbeatSubject>,
    poll: Option<Poll>,
}

impl HeartbeatStats {
    pub(super) fn new(host: &str) -> Self {
        Self { host: host.to_owned(), inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other heartbeats are published from now on; a subject that was there before keeps its numbers.
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
        // Nobody leads before the campaign has said so.
        inner.paused = heartbeats.is_some_and(|heartbeats| heartbeats.leader_election);
        inner.poll = None;
    }

    pub(super) fn stands(&self, poll: Poll) {
        self.inner().poll = Some(poll);
    }

    pub(super) fn paused(&self, paused: bool) {
        self.inner().paused = paused;
    }

    /// Changes the numbers of one subject, by its place in what is published.
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
        self.inner().poll.as_ref().map(Poll::reading)
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
        let board = HeartbeatStats::new("host");
        let paused = || board.reading().map(|reading| reading.paused);
        assert_eq!(paused(), None);
        board.begin(Some(&heartbeats(false)));
        assert_eq!(paused(), Some(false));
        board.begin(Some(&heartbeats(true)));
        assert_eq!(paused(), Some(true));
        board.paused(false);
        assert_eq!(paused(), Some(false));
        board.begin(None);
        assert_eq!(paused(), None);
    }
}
