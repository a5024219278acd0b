//! Decides which errors of an outage are reported: not every attempt again. Pure.

use crate::{
    copy::{Error, ErrorKind},
    events::{Event, PoisonAction, Step},
};

/// Distinct errors of one kind that are reported in one outage; more of them are one that carries a number in its text.
const REPORTED: usize = 16;

/// From the first error of a replication until it copies again.
#[derive(Debug, Default)]
pub(super) struct Outage {
    open: bool,
    /// The last step of the repair that was reported.
    step: Option<Step>,
    reported: Vec<(ErrorKind, String)>,
    /// Source sequence of the last reported message that can never be stored.
    poison: Option<u64>,
}

/// What to report about an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OutageReport {
    /// Whether the error was not reported in this outage before.
    pub(super) news: bool,
    /// The events to emit.
    pub(super) events: Vec<Event>,
}

impl Outage {
    /// An error ended a run; `step` is what the next run opens again if the error is transient.
    pub(super) fn failed(&mut self, error: &Error, step: Step) -> OutageReport {
        let Error { kind, message, poison, .. } = error;
        let mut same_kind = self.reported.iter().filter(|(reported, _)| reported == kind);
        let news = same_kind.clone().count() < REPORTED && !same_kind.any(|(_, reported)| reported == message);
        if news {
            self.reported.push((*kind, message.clone()));
        }
        let began = !std::mem::replace(&mut self.open, true);
        let event = match kind {
            // Reported when an outage starts, and when a repair goes further than before.
            ErrorKind::Retry if began || step == Step::Everything && self.step != Some(step) => {
                self.step = Some(step);
                Some(Event::Stalled { message: message.clone(), step })
            }
            ErrorKind::Retry => None,
            ErrorKind::Hold => news.then(|| Event::Held { message: message.clone() }),
            ErrorKind::Superseded => Some(Event::Stopped { position: None, message: Some(message.clone()) }),
        };
        let mut events: Vec<_> = event.into_iter().collect();
        if let Some(source_seq) =
            poison.as_ref().map(|poison| poison.message.seq).filter(|seq| self.poison != Some(*seq))
        {
            self.poison = Some(source_seq);
            events.push(Event::poison(source_seq, message, PoisonAction::Held));
        }
        OutageReport { news, events }
    }

    /// Whether there is one.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// The replication copies again.
    pub(super) fn over(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{copy::PoisonMessage, store::SourceMessage};

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
    fn an_outage_is_reported_when_it_starts_and_not_per_attempt() {
        let mut outage = Outage::default();
        let first = outage.failed(&retry("connection refused"), STEP);
        assert_eq!(first, OutageReport { news: true, events: vec![stalled("connection refused")] });
        let again = outage.failed(&retry("connection refused"), STEP);
        assert_eq!(again, OutageReport { news: false, events: vec![] });
        let other = outage.failed(&retry("timed out"), STEP);
        assert_eq!(other, OutageReport { news: true, events: vec![] });
    }

    #[test]
    fn many_transient_errors_hide_no_permanent_one() {
        let mut outage = Outage::default();
        for number in 0..2 * REPORTED {
            outage.failed(&retry(&format!("error {number}")), STEP);
        }
        let held = Event::Held { message: "full".to_owned() };
        assert_eq!(outage.failed(&hold("full"), STEP), OutageReport { news: true, events: vec![held] });
    }

    #[test]
    fn a_repair_that_goes_further_is_reported() {
        let mut outage = Outage::default();
        let mut reported = |step| -> Vec<_> { outage.failed(&retry("nothing moved"), step).events };
        assert_eq!(reported(Step::Connections), [stalled("nothing moved")]);
        assert!(reported(Step::Connections).is_empty());
        let everything = Event::Stalled { message: "nothing moved".to_owned(), step: Step::Everything };
        assert_eq!(reported(Step::Everything), [everything]);
        assert!(reported(Step::Connections).is_empty());
        assert!(reported(Step::Everything).is_empty());
    }

    #[test]
    fn each_reason_to_hold_is_an_event_once() {
        let mut outage = Outage::default();
        let mut reported =
            |message| -> Vec<_> { outage.failed(&hold(message), STEP).events.iter().map(Event::kind).collect() };
        assert_eq!(reported("full"), ["held"]);
        assert!(reported("full").is_empty());
        assert_eq!(reported("sealed"), ["held"]);
        assert!(reported("full").is_empty());
    }

    #[test]
    fn a_message_that_cannot_be_stored_is_reported_once() {
        let mut outage = Outage::default();
        let mut reported = |seq, text| -> Vec<_> {
            let mut error = hold(text);
            let message = SourceMessage { seq, time_ns: 1 };
            error.poison = Some(Box::new(PoisonMessage { message, content: None }));
            outage.failed(&error, STEP).events.iter().map(Event::kind).collect()
        };
        assert_eq!(reported(5, "5 is too large"), ["held", "poison"]);
        assert!(reported(5, "5 is too large").is_empty());
        assert_eq!(reported(7, "7 is too large"), ["held", "poison"]);
    }

    #[test]
    fn after_a_repair_the_same_error_is_news() {
        let mut outage = Outage::default();
        outage.failed(&retry("timed out"), STEP);
        assert!(outage.is_open());
        outage.over();
        assert!(!outage.is_open());
        let report = outage.failed(&retry("timed out"), STEP);
        assert_eq!(report, OutageReport { news: true, events: vec![stalled("timed out")] });
    }

    #[test]
    fn errors_that_never_repeat_do_not_fill_the_log() {
        let mut outage = Outage::default();
        let news = (0..1000).filter(|i| outage.failed(&hold(&format!("error {i}")), STEP).news).count();
        assert_eq!(news, REPORTED);
    }
}
