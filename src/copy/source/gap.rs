//! Jumps in the sequences of a source, and which of them are losses: messages that the source removed before they were
//! read. Pure. Deleting single messages makes jumps too; only messages below the stream's first sequence were removed
//! in a way that loses messages.

use tokio::time::{Duration, Instant};

/// Jumps remembered until the server is asked; beyond that the earliest count (they are the lost ones).
const MAX_JUMPS: usize = 4_096;
/// Least time between two questions to the server because of jumps.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Jumps without an explanation yet.
#[derive(Debug, Default)]
pub(in crate::copy) struct Gaps {
    jumps: Vec<(u64, u64)>,
    asked: Option<Instant>,
}

impl Gaps {
    /// Notes that no message was read from `from` to `to`.
    pub fn jumped(&mut self, from: u64, to: u64) {
        let room = self.jumps.len() < MAX_JUMPS;
        match self.jumps.last_mut() {
            Some(last) if last.1 + 1 == from => last.1 = to,
            _ if room => self.jumps.push((from, to)),
            _ => {}
        }
    }

    /// Whether the server should be asked for the stream's first sequence now.
    pub fn should_ask(&mut self, now: Instant) -> bool {
        let due = !self.jumps.is_empty() && self.asked.is_none_or(|asked| now.duration_since(asked) >= ASK_EVERY);
        if due {
            self.asked = Some(now);
        }
        due
    }

    /// Hands the unexplained jumps of a run to the next one, which resumes after `position` and itself reports those
    /// for which `told` is true: only jumps that it will not see again are kept.
    pub fn left_over(&mut self, position: u64, told: impl Fn(u64) -> bool) {
        self.jumps.retain(|(from, to)| *to <= position && !told(*from));
        self.asked = None;
    }

    /// The first sequence of the stream is known: returns the losses, first and last sequence of each.
    pub fn first_is(&mut self, first: u64) -> Vec<(u64, u64)> {
        let lost = self.jumps.iter().filter(|(from, _)| *from < first).map(|(from, to)| (*from, (*to).min(first - 1)));
        let lost = lost.collect();
        self.jumps.clear();
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_below_the_first_sequence_is_lost() {
        let mut gaps = Gaps::default();
        let now = Instant::now();
        assert!(!gaps.should_ask(now));
        gaps.jumped(5, 9);
        gaps.jumped(10, 12);
        gaps.jumped(20, 29);
        gaps.jumped(40, 40);
        assert!(gaps.should_ask(now));
        assert!(!gaps.should_ask(now));
        assert_eq!(gaps.first_is(25), [(5, 12), (20, 24)]);
        assert!(!gaps.should_ask(now + ASK_EVERY));
        gaps.jumped(50, 51);
        assert!(gaps.should_ask(now + ASK_EVERY));
        assert_eq!(gaps.first_is(25), []);
    }

    #[test]
    fn what_the_next_run_does_not_see_again_is_left_for_it() {
        let mut gaps = Gaps::default();
        gaps.jumped(5, 9);
        gaps.jumped(20, 29);
        gaps.jumped(40, 44);
        gaps.left_over(30, |seq| seq == 5);
        assert_eq!(gaps.first_is(100), [(20, 29)]);
    }
}
