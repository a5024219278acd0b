//! Detects why the target confirms nothing, long before a stall is an error. Confirmations get lost when a leader
//! dies with the messages, or when a connection falls silent; no error ever shows that. While a confirmation is
//! overdue, the target is asked: by a PING, which the server answers, and for its state, which the leader answers.
//! Pure: the caller sends the questions and receives the answers.

use tokio::time::{Duration, Instant};

/// Time without a confirmation after which the target is asked, and interval of the questions.
pub(in crate::copy) const ASK: Duration = Duration::from_millis(1500);
/// How long after the first question a connection without a received byte counts as dead.
const SILENT: Duration = Duration::from_millis(4500);
/// Answers of the leader without a confirmation that prove a loss: the questions reached it after all messages.
const ANSWERS: u32 = 3;

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::copy) enum LivenessStep {
    /// All is well, or the answer is still on its way.
    Wait,
    /// Ask the target.
    Ask,
    /// The messages in flight will never be confirmed on this connection, for this reason.
    Lost(String),
}

/// The questions since the last confirmation.
#[derive(Debug, Default)]
pub(in crate::copy) struct Liveness {
    /// When the first and the last question went out; `None` while there is no reason to ask.
    asked: Option<(Instant, Instant)>,
    /// Whether the last question was answered.
    answered: bool,
    answers: u32,
    leader: String,
}

impl Liveness {
    /// Watches a target stream with this leader; empty for a single server.
    pub fn new(leader: String) -> Self {
        Self { leader, ..Self::default() }
    }

    /// `overdue` is when the wait for a confirmation began, `heard` when the connection gave the last sign of
    /// life.
    pub fn step(&mut self, overdue: Option<Instant>, heard: Instant, now: Instant) -> LivenessStep {
        let Some(since) = overdue.filter(|since| now.duration_since(*since) >= ASK) else {
            (self.asked, self.answers) = (None, 0);
            return LivenessStep::Wait;
        };
        // A confirmation came since the first question.
        if self.asked.is_some_and(|(first, _)| first < since) {
            (self.asked, self.answers) = (None, 0);
        }
        if self.answers >= ANSWERS {
            let waited = now.duration_since(since);
            return LivenessStep::Lost(format!("the target answers, but has confirmed nothing for {waited:.0?}"));
        }
        match &mut self.asked {
            Some((first, _)) if now.duration_since(heard.max(*first)) >= SILENT => {
                LivenessStep::Lost(format!("the target is silent for {:.0?}", now.duration_since(heard)))
            }
            Some((_, last)) if now.duration_since(*last) < ASK => LivenessStep::Wait,
            Some((_, last)) => {
                *last = now;
                self.answered = false;
                LivenessStep::Ask
            }
            None => {
                self.asked = Some((now, now));
                self.answered = false;
                LivenessStep::Ask
            }
        }
    }

    /// The leader answered the last question. The error is the reason why no confirmation will come any more.
    pub fn answered(&mut self, leader: &str) -> Result<(), String> {
        if self.asked.is_none() || std::mem::replace(&mut self.answered, true) {
            return Ok(());
        }
        self.answers += 1;
        if leader.is_empty() || self.leader.is_empty() || leader == self.leader {
            return Ok(());
        }
        Err(format!("`{leader}` leads the target instead of `{}`, which confirms nothing any more", self.leader))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn nothing_is_asked_while_confirmations_come() {
        let (mut probe, begun) = (Liveness::new("a".into()), Instant::now());
        for second in 0..60 {
            let now = begun + SECOND * second;
            assert_eq!(probe.step(None, begun, now), LivenessStep::Wait);
            assert_eq!(probe.step(Some(now - SECOND), begun, now), LivenessStep::Wait, "{second}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_sign_of_life_is_given_up() {
        let (mut probe, begun) = (Liveness::new("a".into()), Instant::now());
        let mut step = |halves: u32| probe.step(Some(begun), begun, begun + SECOND * halves / 2);
        let steps: Vec<_> = (0..12).map(&mut step).collect();
        let asked: Vec<_> = (0..12).filter(|at| steps[*at] == LivenessStep::Ask).collect();
        assert_eq!(asked, [3, 6, 9], "{steps:?}");
        assert_eq!(step(12), LivenessStep::Lost("the target is silent for 6s".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_target_without_a_leader_is_polled_while_its_server_lives() {
        let (mut probe, begun) = (Liveness::new("a".into()), Instant::now());
        for halves in 0..100 {
            let now = begun + SECOND * halves / 2;
            let step = probe.step(Some(begun), now, now);
            assert_eq!(
                step,
                if halves > 0 && halves % 3 == 0 { LivenessStep::Ask } else { LivenessStep::Wait },
                "{halves}"
            );
        }
        assert!(probe.answered("b").unwrap_err().contains("`b` leads the target instead of `a`"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_answers_without_acks_lost_the_messages() {
        let (mut probe, begun) = (Liveness::new("a".into()), Instant::now());
        let mut step = |second: u32, since: u32| {
            let now = begun + SECOND * second;
            let step = probe.step(Some(begun + SECOND * since), now, now);
            assert_eq!((probe.answered("a"), probe.answered("a")), (Ok(()), Ok(())));
            step
        };
        assert_eq!([step(2, 0), step(4, 0)], [LivenessStep::Ask, LivenessStep::Ask]);
        // A message is confirmed: it restarts.
        assert_eq!(
            [step(6, 5), step(7, 5), step(9, 5), step(11, 5)],
            [LivenessStep::Wait, LivenessStep::Ask, LivenessStep::Ask, LivenessStep::Ask]
        );
        assert!(matches!(step(12, 5), LivenessStep::Lost(_)));
    }
}
