//! Whether the source still reaches as far as it was read. Pure. A consumer can survive a source that lost its end,
//! such as a cluster in which a damaged replica became the leader: it waits until the stream has grown as far again,
//! and messages stored before that would never be copied.

use std::collections::VecDeque;

use tokio::time::{Duration, Instant};

/// Questions that may be in flight: an answer comes after all messages that the source delivers before it.
const IN_FLIGHT: usize = 8;
/// Time until another one is sent while so many are in flight: they may never be answered.
const UNANSWERED: Duration = Duration::from_secs(30);

/// A request for the state of the source.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::copy) struct StateRequest {
    pub request: String,
    pub at: Instant,
    /// The newest sequence that was read then; 0 for none.
    pub read: u64,
}

/// Unanswered requests, oldest first: over a slow line an answer may take longer than the time between two.
#[derive(Debug, Default)]
pub(in crate::copy) struct Questions(VecDeque<StateRequest>);

impl Questions {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn may_ask(&self, now: Instant) -> bool {
        self.0.len() < IN_FLIGHT || self.0.back().is_none_or(|last| now.duration_since(last.at) >= UNANSWERED)
    }

    pub fn ask(&mut self, question: StateRequest) {
        if self.0.len() >= IN_FLIGHT {
            self.0.pop_front();
        }
        self.0.push_back(question);
    }

    /// The newest request that is answered, with its answer; earlier ones are forgotten.
    pub fn newest<T>(&mut self, answer: impl Fn(&str) -> Option<T>) -> Option<(StateRequest, T)> {
        let (index, found) = (0..self.0.len()).rev().find_map(|i| Some((i, answer(&self.0[i].request)?)))?;
        let question = self.0.drain(..=index).next_back()?;
        Some((question, found))
    }
}

/// Compares the newest sequence that was read with the last sequence of the source.
#[derive(Debug, Default)]
pub(in crate::copy) struct SourceEnd {
    /// The newest sequence that was read when the source was asked.
    read: u64,
    /// The last answer was below the newest sequence that was read.
    is_doubted: bool,
}

impl SourceEnd {
    /// The next answer is to a request before which everything up to `read` was stored at the source.
    pub fn ask(&mut self, read: u64) {
        self.read = read;
    }

    /// Whether the source should be asked again soon.
    pub fn is_doubted(&self) -> bool {
        self.is_doubted
    }

    /// Handles the source's answer. Two answers in a row prove a loss: a new leader may answer before it has applied
    /// everything that another replica delivered.
    pub fn answered(&mut self, last: u64) -> Option<String> {
        let short = last < self.read;
        let again = std::mem::replace(&mut self.is_doubted, short);
        (short && again)
            .then(|| format!("the source lost its end: its last sequence is {last}, below {} that was read", self.read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_take_longer_than_the_next_question_count() {
        let (mut questions, now) = (Questions::default(), Instant::now());
        let at = |second: u64| now + Duration::from_secs(second);
        let question = |second: u64| StateRequest { request: second.to_string(), at: at(second), read: second };
        let only = |known: &'static str| move |request: &str| (request == known).then_some(());
        for second in 0..IN_FLIGHT as u64 {
            assert!(questions.may_ask(at(second)));
            questions.ask(question(second));
        }
        // Not without bound, and not never.
        assert!(!questions.may_ask(at(8)) && questions.may_ask(at(37)));
        assert_eq!(questions.newest(only("2")), Some((question(2), ())));
        assert_eq!((questions.newest(only("2")), questions.newest(only("1"))), (None, None));
        assert!(questions.may_ask(at(8)));
        // Of several answers that come together the newest counts.
        assert_eq!(questions.newest(|_| Some(())), Some((question(7), ())));
        assert!(questions.is_empty());
        for second in 0..=IN_FLIGHT as u64 {
            questions.ask(question(100 + second));
        }
        assert_eq!(questions.newest(only("100")), None);
        assert_eq!(questions.newest(only("101")), Some((question(101), ())));
    }

    #[test]
    fn a_loss_is_two_answers_in_a_row_below_what_was_read() {
        let mut end = SourceEnd::default();
        // What was read before the first question is nobody's claim.
        assert_eq!((end.answered(0), end.is_doubted()), (None, false));
        end.ask(10);
        assert_eq!((end.answered(10), end.is_doubted()), (None, false));
        assert_eq!((end.answered(9), end.is_doubted()), (None, true));
        // A leader that had not applied everything.
        end.ask(12);
        assert_eq!((end.answered(12), end.is_doubted()), (None, false));
        assert_eq!(end.answered(6), None);
        end.ask(12);
        let why = end.answered(7).unwrap();
        assert!(why.contains("last sequence is 7") && why.contains("12"), "{why}");
    }
}
