//! Keeps an outage from being told at every attempt. Pure.

use crate::{
    copy::{Error, ErrorKind},
    events::{Event, PoisonAction},
};

/// Distinct errors of one outage that are told; more of them are one that carries a number in its text.
const TOLD: usize = 16;

/// From the first error of a replication until it goes on.
#[derive(Debug, Default)]
pub(super) struct Outage {
    open: bool,
    told: Vec<String>,
    /// Source sequence of the message told last that can never be stored.
    poison: Option<u64>,
}

/// What an error calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    /// Whether the error has not been told in this outage.
    pub(super) news: bool,
    /// The events to emit.
    pub(super) events: Vec<Event>,
}

impl Outage {
    /// An error ended a run.
    pub(super) fn failed(&mut self, error: &Error) -> Report {
        let Error { kind, message, poison, .. } = error;
        let news = self.told.len() < TOLD && !self.told.iter().any(|told| told == message);
        if news {
            self.told.push(message.clone());
        }
        let began = !std::mem::replace(&mut self.open, true);
        let event = match kind {
            ErrorKind::Retry => began.then(|| Event::Stalled { message: message.clone() }),
            ErrorKind::Hold => news.then(|| Event::Held { message: message.clone() }),
            ErrorKind::Superseded => Some(Event::Stopped { position: None, message: Some(message.clone()) }),
        };
        let mut events: Vec<_> = event.into_iter().collect();
        if let Some(source_seq) = poison.map(|message| message.seq).filter(|seq| self.poison != Some(*seq)) {
            self.poison = Some(source_seq);
            events.push(Event::poison(source_seq, message, PoisonAction::Held));
        }
        Report { news, events }
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
    use crate::store::SourceMessage;

    fn stalled(message: &str) -> Event {
        Event::Stalled { message: message.to_owned() }
    }

    fn retry(message: &str) -> Error {
        Error::new(ErrorKind::Retry, message)
    }

    fn hold(message: &str) -> Error {
        Error::new(ErrorKind::Hold, message)
    }

    #[test]
    fn an_outage_is_told_when_it_begins_and_not_per_attempt() {
        let mut outage = Outage::default();
        let first = outage.failed(&retry("connection refused"));
        assert_eq!(first, Report { news: true, events: vec![stalled("connection refused")] });
        let again = outage.failed(&retry("connection refused"));
        assert_eq!(again, Report { news: false, events: vec![] });
        let other = outage.failed(&retry("timed out"));
        assert_eq!(other, Report { news: true, events: vec![] });
    }

    #[test]
    fn each_reason_to_hold_is_an_event_once() {
        let mut outage = Outage::default();
        let mut told = |message| -> Vec<_> { outage.failed(&hold(message)).events.iter().map(Event::kind).collect() };
        assert_eq!(told("full"), ["held"]);
        assert!(told("full").is_empty());
        assert_eq!(told("sealed"), ["held"]);
        assert!(told("full").is_empty());
    }

    #[test]
    fn a_message_that_cannot_be_stored_is_told_once() {
        let mut outage = Outage::default();
        let mut told = |seq, text| -> Vec<_> {
            let mut error = hold(text);
            error.poison = Some(SourceMessage { seq, time_ns: 1 });
            outage.failed(&error).events.iter().map(Event::kind).collect()
        };
        assert_eq!(told(5, "5 is too large"), ["held", "poison"]);
        assert!(told(5, "5 is too large").is_empty());
        assert_eq!(told(7, "7 is too large"), ["held", "poison"]);
    }

    #[test]
    fn after_a_repair_the_same_error_is_news() {
        let mut outage = Outage::default();
        outage.failed(&retry("timed out"));
        assert!(outage.is_open());
        outage.over();
        assert!(!outage.is_open());
        let report = outage.failed(&retry("timed out"));
        assert_eq!(report, Report { news: true, events: vec![stalled("timed out")] });
    }

    #[test]
    fn errors_that_never_repeat_do_not_fill_the_log() {
        let mut outage = Outage::default();
        let news = (0..1000).filter(|i| outage.failed(&hold(&format!("error {i}"))).news).count();
        assert_eq!(news, TOLD);
    }
}
