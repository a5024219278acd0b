//! Keeps an outage from being told at every attempt. Pure.

use crate::{
    copy::{Error, ErrorKind},
    events::{Event, PoisonAction, Step},
};

/// Distinct errors of one kind that are reported in one outage; more of them are one that carries a number in its text.
const TOLD: usize = 16;

/// From the first error of a replication until it goes on.
#[derive(Debug, Default)]
pub(super) struct Outage {
    open: bool,
    /// The last step of the repair that was told.
    step: Option<Step>,
    told: Vec<(ErrorKind, String)>,
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
    /// An error ended a run; `step` is what is made anew if it passes.
    pub(super) fn failed(&mut self, error: &Error, step: Step) -> Report {
        let Error { kind, message, poison, .. } = error;
        let mut same_kind = self.told.iter().filter(|(told, _)| told == kind);
        let news = same_kind.clone().count() < TOLD && !same_kind.any(|(_, told)| told == message);
        if news {
            self.told.push((*kind, message.clone()));
        }
        let began = !std::mem::replace(&mut self.open, true);
        let event = match kind {
            // Told when an outage begins, and when a repair goes further than before.
            ErrorKind::Retry if began || step == Step::Everything && self.step != Some(step) => {
                self.step = Some(step);
                Some(Event::Stalled { message: message.clone(), step })
            }
            ErrorKind::Retry => None,
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

    const STEP: Step = Step::Connections;

    fn stalled(message: &str) -> Event {
        Event::Stalled { message: message.to_owned(), step: STEP }
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
        let first = outage.failed(&retry("connection refused"), STEP);
        assert_eq!(first, Report { news: true, events: vec![stalled("connection refused")] });
        let again = outage.failed(&retry("connection refused"), STEP);
        assert_eq!(again, Report { news: false, events: vec![] });
        let other = outage.failed(&retry("timed out"), STEP);
        assert_eq!(other, Report { news: true, events: vec![] });
    }

    #[test]
    fn many_transient_errors_hide_no_permanent_one() {
        let mut outage = Outage::default();
        for number in 0..2 * TOLD {
            outage.failed(&retry(&format!("error {number}")), STEP);
        }
        let held = Event::Held { message: "full".to_owned() };
        assert_eq!(outage.failed(&hold("full"), STEP), Report { news: true, events: vec![held] });
    }

    #[test]
    fn a_repair_that_goes_further_is_told() {
        let mut outage = Outage::default();
        let mut told = |step| -> Vec<_> { outage.failed(&retry("nothing moved"), step).events };
        assert_eq!(told(Step::Connections), [stalled("nothing moved")]);
        assert!(told(Step::Connections).is_empty());
        let everything = Event::Stalled { message: "nothing moved".to_owned(), step: Step::Everything };
        assert_eq!(told(Step::Everything), [everything]);
        assert!(told(Step::Connections).is_empty());
        assert!(told(Step::Everything).is_empty());
    }

    #[test]
    fn each_reason_to_hold_is_an_event_once() {
        let mut outage = Outage::default();
        let mut told =
            |message| -> Vec<_> { outage.failed(&hold(message), STEP).events.iter().map(Event::kind).collect() };
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
            outage.failed(&error, STEP).events.iter().map(Event::kind).collect()
        };
        assert_eq!(told(5, "5 is too large"), ["held", "poison"]);
        assert!(told(5, "5 is too large").is_empty());
        assert_eq!(told(7, "7 is too large"), ["held", "poison"]);
    }

    #[test]
    fn after_a_repair_the_same_error_is_news() {
        let mut outage = Outage::default();
        outage.failed(&retry("timed out"), STEP);
        assert!(outage.is_open());
        outage.over();
        assert!(!outage.is_open());
        let report = outage.failed(&retry("timed out"), STEP);
        assert_eq!(report, Report { news: true, events: vec![stalled("timed out")] });
    }

    #[test]
    fn errors_that_never_repeat_do_not_fill_the_log() {
        let mut outage = Outage::default();
        let news = (0..1000).filter(|i| outage.failed(&hold(&format!("error {i}")), STEP).news).count();
        assert_eq!(news, TOLD);
    }
}
