//! Keeps an outage from being told at every attempt. Pure.

use crate::{copy::ErrorKind, events::Event};

/// Distinct errors of one outage that are told; more of them are one that carries a number in its text.
const TOLD: usize = 16;

/// From the first error of a replication until it goes on.
#[derive(Debug, Default)]
pub(super) struct Outage {
    open: bool,
    told: Vec<String>,
}

/// What an error calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    /// Whether the error has not been told in this outage.
    pub(super) news: bool,
    /// The event to emit.
    pub(super) event: Option<Event>,
}

impl Outage {
    /// An error ended a run.
    pub(super) fn failed(&mut self, kind: ErrorKind, message: &str) -> Report {
        let news = self.told.len() < TOLD && !self.told.iter().any(|told| told == message);
        if news {
            self.told.push(message.to_owned());
        }
        let began = !std::mem::replace(&mut self.open, true);
        let event = match kind {
            ErrorKind::Retry => began.then(|| Event::Stalled { message: message.to_owned() }),
            ErrorKind::Hold => news.then(|| Event::Held { message: message.to_owned() }),
            ErrorKind::Superseded => Some(Event::Stopped { position: None, message: Some(message.to_owned()) }),
        };
        Report { news, event }
    }

    /// Whether there is one.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// The replication went on.
    pub(super) fn over(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stalled(message: &str) -> Event {
        Event::Stalled { message: message.to_owned() }
    }

    #[test]
    fn an_outage_is_told_when_it_begins_and_not_per_attempt() {
        let mut outage = Outage::default();
        let first = outage.failed(ErrorKind::Retry, "connection refused");
        assert_eq!(first, Report { news: true, event: Some(stalled("connection refused")) });
        let again = outage.failed(ErrorKind::Retry, "connection refused");
        assert_eq!(again, Report { news: false, event: None });
        let other = outage.failed(ErrorKind::Retry, "timed out");
        assert_eq!(other, Report { news: true, event: None });
    }

    #[test]
    fn each_reason_to_hold_is_an_event_once() {
        let mut outage = Outage::default();
        assert_eq!(outage.failed(ErrorKind::Hold, "full").event.map(|event| event.kind()), Some("held"));
        assert_eq!(outage.failed(ErrorKind::Hold, "full").event, None);
        assert_eq!(outage.failed(ErrorKind::Hold, "sealed").event.map(|event| event.kind()), Some("held"));
        assert_eq!(outage.failed(ErrorKind::Hold, "full").event, None);
    }

    #[test]
    fn after_a_repair_the_same_error_is_news() {
        let mut outage = Outage::default();
        outage.failed(ErrorKind::Retry, "timed out");
        assert!(outage.is_open());
        outage.over();
        assert!(!outage.is_open());
        let report = outage.failed(ErrorKind::Retry, "timed out");
        assert_eq!(report, Report { news: true, event: Some(stalled("timed out")) });
    }

    #[test]
    fn errors_that_never_repeat_do_not_fill_the_log() {
        let mut outage = Outage::default();
        let news = (0..1000).filter(|i| outage.failed(ErrorKind::Hold, &format!("error {i}")).news).count();
        assert_eq!(news, TOLD);
    }
}
