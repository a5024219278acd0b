//! Whether a run still moves, and the repair if it does not. Pure: observations are arguments, the decision is the
//! result.
//!
//! There are three steps, and each is taken only when the one before did not help: recreate the source consumer, inside
//! the run; reconnect both sides, by ending the run; restart the replication's task. Progress, or a minute without a
//! problem, leads back to the first. An intended wait is no stall: without lag, with no pull open (the byte
//! budget and the bounds on messages in flight hold it back), or for a limit of the rate.

use tokio::time::{Duration, Instant};

use crate::{
    copy::{Error, ErrorKind},
    events::Step,
};

/// Silence after which a consumer that owes a sign of life every 2.5 s counts as lost: two of them and a second.
const SILENCE: Duration = Duration::from_secs(6);
/// One sign of life was missed: the server is asked, and so is whether the connection lives.
const MISSED: Duration = Duration::from_millis(3_500);
/// Time without a delivery, though messages wait, after which the server is asked for the state of its consumer.
const QUIET: Duration = Duration::from_secs(5);
/// Least time between two such questions.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// Time within which a delivery has to come once the server said that its consumer has messages.
const OWED: Duration = Duration::from_secs(2);
/// Time within which a new consumer has to be created.
const ANSWER: Duration = Duration::from_secs(5);
/// Time without any settlement, while messages are in flight, after which the run is ended.
pub(in crate::copy) const STALL: Duration = Duration::from_secs(30);
/// Time for the messages in flight to settle when a run ends by request or at a message that cannot be stored.
pub(in crate::copy) const DRAIN: Duration = Duration::from_secs(5);
/// Time for the last save of a run that failed.
pub(in crate::copy) const LAST_SAVE: Duration = Duration::from_secs(3);
/// How long after a repair a consumer without problems counts as repaired, though no message came: a later stall is
/// another one. Within this time no further stall is reported.
const CALM: Duration = Duration::from_secs(60);
/// Number of runs in a row, stalled without any progress, after which new connections do not help.
const RUNS: u32 = 3;

/// The observable state of a run.
#[derive(Debug, Clone, Copy)]
pub(in crate::copy) struct Observation {
    /// A pull is open: the server owes deliveries, or signs of life.
    pub asking: bool,
    /// Newest source sequence that was delivered.
    pub delivered: u64,
    /// Newest source sequence that was handed out.
    pub handed_out: u64,
    /// Messages that wait, by the consumer's last answer.
    pub pending: u64,
    /// Last sequence of the source stream, by the server's last answer; it may be out of scope.
    pub last_seq: u64,
    /// When the consumer gave its last sign of life, or the first was requested.
    pub consumer_heard: Instant,
    /// When a byte last came over the source's connection.
    pub source_heard: Instant,
    /// A message is arriving from the source: no other can come before it is complete.
    pub receiving: bool,
    /// When bytes last arrived from the source that did not complete a message.
    pub source_partial: Instant,
    /// Messages sent that are not settled.
    pub in_flight: usize,
    /// A message was read and is not sent.
    pub waiting: bool,
    /// It is delayed by intention: for a limit of the rate, or for dead letters before it.
    pub held_back: bool,
    /// When a message last settled or was skipped.
    pub settled: Instant,
    /// When the target last accepted some of the waiting output.
    pub drained: Instant,
    /// Bytes that it has not accepted yet.
    pub unwritten: usize,
}

/// The decision of the watchdog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::copy) enum WatchdogAction {
    /// Ask the server for the state of its consumer.
    Ask,
    /// Recreate the consumer, inside the run.
    Renew {
        /// The observation.
        reason: String,
        /// Whether to report it.
        reporting: Reporting,
    },
    /// End the run.
    GiveUp {
        /// The observation.
        reason: String,
    },
    /// A reported stall is over.
    Repaired,
}

/// Whether a stall is counted and reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) enum Reporting {
    /// No stall: no pull was open for longer than the server keeps an idle consumer.
    Nothing,
    /// Counted; a similar one was reported a moment ago.
    Count,
    /// Counted and reported.
    All,
}

/// The server's answer about a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) enum Consumer {
    /// So many messages wait for it.
    Has(u64),
    /// There is no such consumer.
    Gone,
}

/// Watches one run.
#[derive(Debug)]
pub(in crate::copy) struct Watchdog {
    /// Newest source sequence that was delivered, and when, or when no more was owed.
    delivered: (u64, Instant),
    handed_out: u64,
    asked: Option<Instant>,
    /// Since when the consumer has messages, as the server said.
    owed: Option<Instant>,
    /// The source's last sequence when the server said that no message up to it waits.
    cleared: u64,
    /// When the recreation of the consumer began, if it is under way.
    renewing: Option<Instant>,
    /// When the last one ended, and the newest sequence that had been handed out by then.
    renewed: Option<(Instant, u64)>,
    told: Option<Instant>,
    /// A stall was reported and is not over.
    open: bool,
    /// When the target last made progress.
    moved: Instant,
}

impl Watchdog {
    /// For a run that begins after a source sequence.
    pub fn new(now: Instant, position: u64) -> Self {
        Self {
            delivered: (position, now),
            handed_out: position,
            asked: None,
            owed: None,
            cleared: 0,
            renewing: None,
            renewed: None,
            told: None,
            open: false,
            moved: now,
        }
    }

    /// Decides; to be called now and then, and every second while [`Self::is_alert`].
    pub fn check(&mut self, now: Instant, seen: &Observation) -> Option<WatchdogAction> {
        if let Some(reason) = self.target_stalls(now, seen) {
            return Some(WatchdogAction::GiveUp { reason });
        }
        if let Some(since) = self.renewing {
            // The answer may be queued after messages of the former consumer that were in flight.
            let late = now.duration_since(since.max(seen.source_partial)) > ANSWER;
            return late.then(|| WatchdogAction::GiveUp { reason: format!("no new consumer within {ANSWER:?}") });
        }
        self.note_progress(now, seen);
        if self.open && (self.renewed.is_none() || seen.pending == 0) {
            self.open = false;
            return Some(WatchdogAction::Repaired);
        }
        if !seen.asking || seen.receiving {
            return None;
        }
        let silent = now.duration_since(seen.consumer_heard);
        if silent >= SILENCE && self.asked_since(seen.consumer_heard) && !self.asked_within(now, SILENCE - MISSED) {
            // On a working connection the consumer is lost.
            let alive = seen.source_heard > seen.consumer_heard;
            let reason = format!("it is silent for {SILENCE:?}");
            return Some(if alive {
                self.renew(now, reason)
            } else {
                WatchdogAction::GiveUp { reason: format!("nothing came from the source for {SILENCE:?}") }
            });
        }
        if silent >= MISSED && !self.asked_since(seen.consumer_heard) {
            self.asked = Some(now);
            return Some(WatchdogAction::Ask);
        }
        if self.owed.is_some_and(|since| now.duration_since(since) >= OWED) {
            return Some(self.renew(now, "it delivers nothing, though messages wait for it".to_owned()));
        }
        let recently = self.asked.is_some_and(|asked| now.duration_since(asked) < ASK_EVERY);
        if self.owed.is_none() && !recently && now.duration_since(self.delivered.1) >= QUIET {
            self.asked = Some(now);
            return Some(WatchdogAction::Ask);
        }
        None
    }

    /// When a consumer that owes a sign of life, and gave its last one at `heard`, has to be checked; `None` after that
    /// check. Each sign of life moves this time, without an extra wake-up.
    pub fn silent_at(&self, now: Instant, heard: Instant) -> Option<Instant> {
        let at = match self.asked {
            Some(asked) if self.asked_since(heard) => asked + (SILENCE - MISSED),
            _ => heard + MISSED,
        };
        (at > now).then_some(at)
    }

    fn asked_within(&self, now: Instant, time: Duration) -> bool {
        self.asked.is_some_and(|asked| now.duration_since(asked) < time)
    }

    fn asked_since(&self, heard: Instant) -> bool {
        self.asked.is_some_and(|asked| asked >= heard + MISSED)
    }

    /// Whether a stall was reported, and its end is not yet.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Whether a stall is suspected or being repaired: the next check is due soon.
    pub fn is_alert(&self) -> bool {
        self.owed.is_some() || self.renewing.is_some() || self.open
    }

    /// The answer to [`WatchdogAction::Ask`]; `last_seq` is the source's last sequence as far as known when it was
    /// asked.
    pub fn answered(&mut self, now: Instant, consumer: Consumer, last_seq: u64) -> Option<WatchdogAction> {
        match consumer {
            Consumer::Gone => Some(self.renew(now, "the server has it no more".to_owned())),
            Consumer::Has(0) => {
                self.cleared = self.cleared.max(last_seq);
                self.owed = None;
                None
            }
            Consumer::Has(_) => {
                self.owed.get_or_insert(now);
                None
            }
        }
    }

    /// The consumer is no longer usable; `forgotten` if the server had to forget it.
    pub fn lost(&mut self, now: Instant, seen: &Observation, reason: String, forgotten: bool) -> WatchdogAction {
        self.note_progress(now, seen);
        if forgotten {
            self.renewing = Some(now);
            return WatchdogAction::Renew { reason, reporting: Reporting::Nothing };
        }
        self.renew(now, reason)
    }

    /// The new consumer is created.
    pub fn renewed(&mut self, now: Instant) {
        self.renewing = None;
        self.renewed = Some((now, self.handed_out));
        (self.delivered.1, self.owed, self.asked) = (now, None, None);
    }

    fn renew(&mut self, now: Instant, reason: String) -> WatchdogAction {
        if self.renewed.is_some() {
            return WatchdogAction::GiveUp { reason: format!("{reason}; a new one did not help") };
        }
        self.renewing = Some(now);
        let mut reporting = Reporting::Count;
        if self.told.is_none_or(|told| now.duration_since(told) >= CALM) {
            self.told = Some(now);
            self.open = true;
            reporting = Reporting::All;
        }
        WatchdogAction::Renew { reason, reporting }
    }

    fn note_progress(&mut self, now: Instant, seen: &Observation) {
        let more = seen.pending > 0 || seen.last_seq > seen.delivered.max(self.cleared);
        if seen.delivered != self.delivered.0 || !seen.asking || !more || seen.receiving {
            self.delivered = (seen.delivered, now);
            self.owed = None;
        }
        self.handed_out = seen.handed_out;
        if self.renewed.is_some_and(|(at, before)| seen.handed_out > before || now.duration_since(at) >= CALM) {
            self.renewed = None;
        }
    }

    /// Why the target counts as stalled: no message settles, and no output is accepted.
    fn target_stalls(&mut self, now: Instant, seen: &Observation) -> Option<String> {
        let nothing_due = seen.in_flight == 0 && (!seen.waiting || seen.held_back);
        if nothing_due {
            self.moved = now;
        }
        // A slow connection makes progress; bytes that it accepts while no message waits are signs of life.
        self.moved = self.moved.max(seen.settled).max(seen.drained);
        if now.duration_since(self.moved) <= STALL {
            return None;
        }
        let Observation { in_flight, unwritten, .. } = seen;
        Some(match unwritten {
            0 => format!("nothing moved for {STALL:?}: {in_flight} messages wait for the target's confirmation"),
            _ => format!("nothing moved for {STALL:?}: the target's connection does not take {unwritten} bytes"),
        })
    }
}

/// Watches the runs of one replication.
#[derive(Debug, Default)]
pub struct Escalation {
    /// Runs in a row that stalled without progress.
    stalled: u32,
}

impl Escalation {
    /// A run made progress.
    pub fn over(&mut self) {
        self.stalled = 0;
    }

    /// A run ended with an error: the step to take.
    pub fn failed(&mut self, error: &Error) -> Step {
        if error.kind == ErrorKind::Retry && error.stalled {
            self.stalled += 1;
        }
        if self.stalled < RUNS {
            return Step::Connections;
        }
        self.stalled = 0;
        Step::Everything
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run in good order that has something to do on both sides.
    fn seen(now: Instant) -> Observation {
        Observation {
            asking: true,
            delivered: 10,
            handed_out: 10,
            pending: 5,
            last_seq: 15,
            consumer_heard: now,
            source_heard: now,
            receiving: false,
            source_partial: now,
            in_flight: 3,
            waiting: false,
            held_back: false,
            settled: now,
            drained: now,
            unwritten: 0,
        }
    }

    fn short(action: Option<WatchdogAction>) -> Option<&'static str> {
        action.map(|action| match action {
            WatchdogAction::Ask => "ask",
            WatchdogAction::Renew { reporting: Reporting::All, .. } => "renew",
            WatchdogAction::Renew { reporting: Reporting::Count, .. } => "renew and count",
            WatchdogAction::Renew { reporting: Reporting::Nothing, .. } => "renew quietly",
            WatchdogAction::GiveUp { .. } => "give up",
            WatchdogAction::Repaired => "repaired",
        })
    }

    /// The first action and when (s), with this observation at every second of a minute.
    fn first(change: impl Fn(u64, Instant, &mut Observation)) -> Option<(u64, &'static str)> {
        let began = Instant::now();
        let mut watchdog = Watchdog::new(began, 10);
        (0..=60).find_map(|second| {
            let now = began + Duration::from_secs(second);
            let mut seen = seen(now);
            change(second, began, &mut seen);
            short(watchdog.check(now, &seen)).map(|action| (second, action))
        })
    }

    #[test]
    fn what_waits_on_purpose_or_moves_is_no_stall() {
        type Change = fn(u64, Instant, &mut Observation);
        let table: [(&str, Change); 8] = [
            ("deliveries come", |second, _, seen| seen.delivered = 10 + second),
            ("no lag", |_, _, seen| (seen.pending, seen.last_seq) = (0, 10)),
            ("no pull is open", |_, began, seen| (seen.asking, seen.consumer_heard) = (false, began)),
            ("a large message arrives", |_, began, seen| (seen.receiving, seen.consumer_heard) = (true, began)),
            ("nothing to send", |_, began, seen| {
                *seen = Observation { delivered: 10, pending: 0, last_seq: 10, in_flight: 0, settled: began, ..*seen }
            }),
            ("a limit of the rate", |_, began, seen| {
                *seen =
                    Observation { asking: false, in_flight: 0, waiting: true, held_back: true, settled: began, ..*seen }
            }),
            ("the target's connection is slow", |_, began, seen| {
                *seen = Observation { asking: false, unwritten: 900_000, settled: began, ..*seen }
            }),
            ("a window that drains slowly", |second, began, seen| {
                seen.asking = false;
                seen.settled = began + Duration::from_secs(second / 25 * 25);
            }),
        ];
        for (what, change) in table {
            assert_eq!(first(change), None, "{what}");
        }
    }

    #[test]
    fn each_stall_has_its_step_and_its_time() {
        type Change = fn(u64, Instant, &mut Observation);
        let table: [(&str, Change, (u64, &str)); 5] = [
            ("nothing is delivered", |_, _, _| {}, (5, "ask")),
            ("and only the stream knows", |_, _, seen| seen.pending = 0, (5, "ask")),
            (
                "the target confirms nothing",
                |second, began, seen| (seen.delivered, seen.settled, seen.drained) = (10 + second, began, began),
                (31, "give up"),
            ),
            (
                // What is answered is no progress; that a PING counts as little is for the lane to say.
                "and its connection lives",
                |second, began, seen| {
                    *seen = Observation { delivered: 10 + second, settled: began, drained: began, ..*seen }
                },
                (31, "give up"),
            ),
            (
                "the target's connection takes nothing",
                |second, began, seen| {
                    let delivered = 10 + second;
                    *seen = Observation { delivered, settled: began, drained: began, unwritten: 5_000, ..*seen }
                },
                (31, "give up"),
            ),
        ];
        for (what, change, expect) in table {
            assert_eq!(first(change), Some(expect), "{what}");
        }
    }

    #[test]
    fn a_silent_consumer_is_checked_a_silent_lane_ends_the_run() {
        let check = |lives: bool, expect: &[(u64, &'static str)]| {
            let began = Instant::now();
            let mut watchdog = Watchdog::new(began, 10);
            let done = (0..=7).filter_map(|second| {
                let now = began + Duration::from_secs(second);
                let source_heard = if lives { now } else { began };
                let seen = Observation { pending: 0, last_seq: 10, consumer_heard: began, source_heard, ..seen(now) };
                short(watchdog.check(now, &seen)).map(|action| (second, action))
            });
            assert_eq!(done.collect::<Vec<_>>(), expect);
        };
        check(true, &[(4, "ask"), (7, "renew")]);
        check(false, &[(4, "ask"), (7, "give up")]);
    }

    #[test]
    fn a_silent_consumer_is_checked_at_each_missed_deadline() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut watchdog = Watchdog::new(began, 10);
        assert_eq!(watchdog.silent_at(began, began), Some(at(3_500)));
        assert_eq!(watchdog.silent_at(at(3_000), at(2_500)), Some(at(6_000)), "a sign of life moves it on");
        // It was checked a little late.
        assert_eq!(watchdog.silent_at(at(3_600), began), None);
        let silent = Observation { pending: 0, last_seq: 10, consumer_heard: began, ..seen(at(3_600)) };
        assert_eq!(short(watchdog.check(at(3_600), &silent)), Some("ask"));
        assert_eq!(watchdog.silent_at(at(3_700), began), Some(at(6_100)));
        assert_eq!(short(watchdog.check(at(6_100), &silent)), Some("renew"));
        assert_eq!(watchdog.silent_at(at(6_100), began), None);
        // An answer from before the last sign of life proves nothing about a silence after it.
        assert_eq!(watchdog.silent_at(at(6_200), at(6_150)), Some(at(9_650)));
    }

    /// A watchdog whose consumer delivers nothing, with the clock in seconds.
    struct Story {
        watchdog: Watchdog,
        began: Instant,
        seen: Observation,
    }

    impl Story {
        fn begin() -> Self {
            let began = Instant::now();
            Self { watchdog: Watchdog::new(began, 10), began, seen: seen(began) }
        }

        fn at(&self, second: u64) -> Instant {
            self.began + Duration::from_secs(second)
        }

        fn check(&mut self, second: u64) -> Option<&'static str> {
            let now = self.at(second);
            let (consumer_heard, source_heard, settled) = (now, now, now);
            self.seen = Observation { consumer_heard, source_heard, settled, ..self.seen };
            short(self.watchdog.check(now, &self.seen))
        }

        fn lost(&mut self, second: u64, forgotten: bool) -> Option<&'static str> {
            let now = self.at(second);
            short(Some(self.watchdog.lost(now, &self.seen, "it ended".to_owned(), forgotten)))
        }

        fn answered(&mut self, second: u64, consumer: Consumer) -> Option<&'static str> {
            short(self.watchdog.answered(self.at(second), consumer, self.seen.last_seq))
        }
    }

    #[test]
    fn a_consumer_that_owes_messages_is_renewed_once() {
        let mut story = Story::begin();
        assert_eq!(story.check(5), Some("ask"));
        assert_eq!(story.answered(5, Consumer::Has(5)), None);
        assert!(story.watchdog.is_alert());
        assert_eq!(story.check(6), None);
        assert_eq!(story.check(7), Some("renew"));
        assert_eq!(story.check(8), None);
        story.watchdog.renewed(story.at(8));
        assert_eq!(story.check(9), None);
        assert_eq!(story.check(13), Some("ask"));
        assert_eq!(story.answered(13, Consumer::Has(5)), None);
        assert_eq!(story.check(15), Some("give up"));
    }

    #[test]
    fn a_new_consumer_that_delivers_ends_the_stall() {
        let mut story = Story::begin();
        assert_eq!(story.lost(1, false), Some("renew"));
        story.watchdog.renewed(story.at(2));
        assert_eq!(story.check(2), None);
        (story.seen.delivered, story.seen.handed_out) = (11, 11);
        assert_eq!(story.check(3), Some("repaired"));
        assert!(!story.watchdog.is_alert());
        // Within a minute it is repaired, and not reported again.
        assert_eq!(story.lost(4, false), Some("renew and count"));
        story.watchdog.renewed(story.at(5));
        (story.seen.delivered, story.seen.handed_out) = (12, 12);
        assert_eq!(story.check(6), None);
        assert_eq!(story.lost(90, false), Some("renew"));
    }

    #[test]
    fn a_consumer_without_lag_is_repaired_at_once() {
        let mut story = Story::begin();
        (story.seen.pending, story.seen.last_seq) = (0, 10);
        assert_eq!(story.lost(1, false), Some("renew"));
        story.watchdog.renewed(story.at(2));
        assert_eq!(story.check(2), Some("repaired"));
        let mut soon = Story { watchdog: story.watchdog, ..story };
        assert_eq!(soon.check(61), None);
        assert_eq!(soon.check(62), None);
        assert_eq!(soon.lost(63, false), Some("renew"));
        soon.watchdog.renewed(soon.at(64));
        assert_eq!(soon.lost(70, false), Some("give up"));
    }

    #[test]
    fn an_expired_consumer_is_renewed_without_an_event() {
        let mut story = Story::begin();
        assert_eq!(story.lost(1, true), Some("renew quietly"));
        assert_eq!(story.check(6), None);
        assert_eq!(story.check(7), Some("give up"));
    }

    #[test]
    fn an_answer_after_what_still_arrives_is_not_late() {
        let mut story = Story::begin();
        assert_eq!(story.lost(1, true), Some("renew quietly"));
        for second in 2..=60 {
            story.seen.source_partial = story.at(second);
            assert_eq!(story.check(second), None, "{second}");
        }
        assert_eq!((story.check(65), story.check(66)), (None, Some("give up")));
    }

    #[test]
    fn out_of_scope_is_asked_about_once() {
        let mut story = Story::begin();
        story.seen.pending = 0;
        assert_eq!(story.check(5), Some("ask"));
        assert_eq!(story.answered(5, Consumer::Has(0)), None);
        assert_eq!((20..=40).find_map(|second| story.check(second)), None);
        // Something newer lies there, in scope or not.
        story.seen.last_seq = 16;
        assert_eq!((41..=60).find_map(|second| Some((second, story.check(second)?))), Some((45, "ask")));
        assert_eq!(story.answered(46, Consumer::Gone), Some("renew"));
    }

    #[test]
    fn runs_that_stall_again_and_again_begin_everything_anew() {
        let stalled = Error::stalled(crate::copy::ErrorSide::Source, "nothing moved");
        let refused = Error::new(ErrorKind::Retry, "connection refused");
        let mut escalation = Escalation::default();
        let mut steps = |errors: &[&Error]| -> Vec<Step> { errors.iter().map(|e| escalation.failed(e)).collect() };
        use Step::{Connections, Everything};
        assert_eq!(
            steps(&[&stalled, &stalled, &stalled, &stalled]),
            [Connections, Connections, Everything, Connections]
        );
        assert_eq!(steps(&[&refused; 9]), [Connections; 9]);
        assert_eq!(steps(&[&stalled, &refused, &stalled]), [Connections, Connections, Everything]);
        assert_eq!(escalation.failed(&stalled), Connections);
        assert_eq!(escalation.failed(&stalled), Connections);
        escalation.over();
        assert_eq!(escalation.failed(&stalled), Connections);
    }
}
