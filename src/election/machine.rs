//! The rules of Choria's leader election. Pure: the caller passes in the time and random numbers, writes, and passes in
//! the results.
//!
//! The name at the key is that of the leader, for as long as it is rewritten before the bucket's TTL removes it.
//! The creator of the key has won; it leads from the second write on, and a little later, so that a former leader has
//! detected its end. A write that fails ends that at once. One rule is ours alone: without a confirmed write for most
//! of the TTL a process does not lead either, or one that was stopped for a while would continue while another one
//! leads.

use tokio::time::{Duration, Instant};

/// Between two writes, half of it to half more. Candidates of Choria's replicator wait for up to 7.5 s: ours follow a
/// leader that died within the TTL and two seconds.
const STEP: Duration = Duration::from_millis(500);

/// Between two attempts while the entry of a leader that does not write any more has to expire any moment.
const SOON: Duration = Duration::from_millis(125);

/// From the second write to leading.
const GRACE: Duration = Duration::from_millis(200);

/// Deadline for the answer to a write.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Assumed TTL of a bucket whose TTL may not be read: the shortest that Choria's own library campaigns with.
const UNKNOWN_TTL: Duration = Duration::from_secs(4);

/// Times that follow from the TTL of the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// How long we lead after a confirmed write was sent.
    lease: Duration,
    /// Between two writes of the leader, half of it to half more.
    pace: Duration,
    /// An entry that is first seen now may expire after this.
    expiry: Duration,
}

impl Terms {
    /// The bucket removes a key this long after it was written, 1 s to 1 h. A quarter of it is left for clocks that do
    /// not agree; in the rest the leader writes three times at least.
    pub(super) fn of(ttl: Duration) -> Self {
        Self { lease: ttl / 4 * 3, pace: (ttl / 6).min(STEP), expiry: ttl.saturating_sub(2 * STEP) }
    }

    /// For a bucket that may not be asked.
    pub(super) fn unknown() -> Self {
        Self::of(UNKNOWN_TTL)
    }
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElectionStep {
    /// Write our name if the key is at this revision, 0 for none, and report the result.
    Write(u64),
    /// The pending write will not be answered any more.
    Overdue,
    /// No step before this time, without a new observation.
    Wait(Instant),
}

/// Result of a write. One with an unknown result is not passed in: the connection is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElectionWrite {
    /// The key is at this revision now.
    Stored(u64),
    /// The key is not at the expected revision.
    Conflict,
}

/// Number of writes, attempts included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Campaigns {
    /// While the key was not ours.
    pub candidate: u64,
    /// While it was.
    pub leader: u64,
}

/// The state of one candidate.
#[derive(Debug)]
pub(super) struct ElectionMachine {
    terms: Terms,
    state: CampaignState,
    /// When the write was sent that is not answered yet.
    writing: Option<Instant>,
    /// When the next one is due.
    next: Instant,
    interval: Duration,
    /// Revision of the entry of another candidate, and when it was first seen.
    seen: Option<(u64, Instant)>,
    campaigns: Campaigns,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CampaignState {
    /// The key is not ours as far as we know. It is free if it is at this revision: 0 if there is none, that of a
    /// marker of a deletion, or that of our own last write before the connection was lost.
    Candidate { free_at: u64 },
    /// The key is ours.
    Holder {
        revision: u64,
        /// When the last write that was confirmed was sent.
        confirmed: Instant,
        /// `None` before the second write.
        leads_from: Option<Instant>,
    },
}

impl ElectionMachine {
    /// A candidate whose first attempt is due.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            terms: Terms::unknown(),
            state: CampaignState::Candidate { free_at: 0 },
            writing: None,
            next: now,
            interval: Duration::ZERO,
            seen: None,
            campaigns: Campaigns::default(),
        }
    }

    /// There is a connection, to a bucket of these terms: the next write is due.
    pub(super) fn connected(&mut self, terms: Terms, now: Instant) {
        self.terms = terms;
        self.next = now;
    }

    /// The connection is lost, and the result of a write in flight with it.
    pub(super) fn disconnected(&mut self) {
        self.writing = None;
        self.stand_down();
    }

    /// The step that is due.
    pub(super) fn step(&mut self, now: Instant) -> ElectionStep {
        self.expire(now);
        if let Some(sent) = self.writing {
            let limit = sent + WRITE_LIMIT;
            return if now < limit { ElectionStep::Wait(self.changes_at(now, limit)) } else { ElectionStep::Overdue };
        }
        if now < self.next {
            return ElectionStep::Wait(self.changes_at(now, self.next));
        }
        self.writing = Some(now);
        match self.state {
            CampaignState::Candidate { free_at } => {
                self.campaigns.candidate += 1;
                ElectionStep::Write(free_at)
            }
            CampaignState::Holder { revision, .. } => {
                self.campaigns.leader += 1;
                ElectionStep::Write(revision)
            }
        }
    }

    /// Handles the result of a write; `random` is uniform in `0.0..1.0`.
    pub(super) fn written(&mut self, written: ElectionWrite, now: Instant, random: f64) {
        let Some(sent) = self.writing.take() else { return };
        self.state = match (self.state, written) {
            (CampaignState::Candidate { .. }, ElectionWrite::Stored(revision)) => {
                CampaignState::Holder { revision, confirmed: sent, leads_from: None }
            }
            (CampaignState::Holder { leads_from, .. }, ElectionWrite::Stored(revision)) => {
                let leads_from = leads_from.unwrap_or(now + GRACE);
                CampaignState::Holder { revision, confirmed: sent, leads_from: Some(leads_from) }
            }
            (_, ElectionWrite::Conflict) => CampaignState::Candidate { free_at: 0 },
        };
        let step = if self.held().is_some() { self.terms.pace } else { STEP };
        self.interval = step.mul_f64(0.5 + random.clamp(0.0, 1.0));
        self.next = now + self.interval;
        self.expire(now);
    }

    /// The key has only the marker of a deletion: it is free, and the next write is due.
    pub(super) fn saw_marker(&mut self, revision: u64, now: Instant) {
        if let (CampaignState::Candidate { free_at }, None) = (&mut self.state, self.writing) {
            *free_at = revision;
            self.next = now;
        }
    }

    /// The key has this entry of another candidate. One that was not written again for most of the TTL is tried often:
    /// it expires soon.
    pub(super) fn saw_entry(&mut self, revision: u64, now: Instant) {
        let first = self.seen.filter(|(seen, _)| *seen == revision).map_or(now, |(_, first)| first);
        self.seen = Some((revision, first));
        if self.held().is_none() && self.writing.is_none() && now >= first + self.terms.expiry {
            self.next = self.next.min(now + SOON);
        }
    }

    /// Until when we lead, without news before; `None` while we do not.
    pub(super) fn leads_until(&self, now: Instant) -> Option<Instant> {
        let CampaignState::Holder { confirmed, leads_from: Some(from), .. } = self.state else { return None };
        let until = confirmed + self.terms.lease;
        (from <= now && now < until).then_some(until)
    }

    /// Revision of the key while it is ours.
    pub(super) fn held(&self) -> Option<u64> {
        match self.state {
            CampaignState::Holder { revision, .. } => Some(revision),
            CampaignState::Candidate { .. } => None,
        }
    }

    /// Whether a write is not answered yet.
    pub(super) fn is_writing(&self) -> bool {
        self.writing.is_some()
    }

    /// From the last answer to the next write.
    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    /// Number of writes.
    pub(super) fn campaigns(&self) -> Campaigns {
        self.campaigns
    }

    /// Ends leadership without a confirmed write for too long.
    fn expire(&mut self, now: Instant) {
        if let CampaignState::Holder { confirmed, .. } = self.state
            && now >= confirmed + self.terms.lease
        {
            self.stand_down();
        }
    }

    /// No other candidate can have written the key while it is at our revision, so it can be taken again from there.
    fn stand_down(&mut self) {
        if let CampaignState::Holder { revision, .. } = self.state {
            self.state = CampaignState::Candidate { free_at: revision };
        }
    }

    /// When leading begins or ends by the clock, or `then`, whichever comes first.
    fn changes_at(&self, now: Instant, then: Instant) -> Instant {
        let CampaignState::Holder { confirmed, leads_from, .. } = self.state else { return then };
        let begins = leads_from.filter(|from| *from > now).unwrap_or(then);
        then.min(begins).min(confirmed + self.terms.lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);
    /// No jitter.
    const EVEN: f64 = 0.5;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A candidate and when it began; times of tests count from there.
    struct Run {
        machine: ElectionMachine,
        begin: Instant,
    }

    impl Run {
        fn new() -> Self {
            let begin = Instant::now();
            let mut machine = ElectionMachine::new(begin);
            machine.connected(Terms::of(TTL), begin);
            Self { machine, begin }
        }

        /// One that leads since 1,000 ms, wrote revision 3 at 1,000 ms, and is to write again at 1,500 ms.
        fn leading() -> Self {
            let mut run = Self::new();
            for (at, expected) in [(0, 0), (500, 1), (1000, 2)] {
                assert_eq!(run.step(at), ElectionStep::Write(expected));
                run.written(at, ElectionWrite::Stored(expected + 1));
            }
            assert_eq!(run.leads_until(1000), Some(8500));
            run
        }

        fn at(&self, at: u64) -> Instant {
            self.begin + ms(at)
        }

        fn step(&mut self, at: u64) -> ElectionStep {
            self.machine.step(self.at(at))
        }

        fn wait(&self, until: u64) -> ElectionStep {
            ElectionStep::Wait(self.at(until))
        }

        fn written(&mut self, at: u64, written: ElectionWrite) {
            self.machine.written(written, self.at(at), EVEN);
        }

        fn leads_until(&self, at: u64) -> Option<u64> {
            let until = self.machine.leads_until(self.at(at))?;
            Some((until - self.begin).as_millis() as u64)
        }
    }

    #[test]
    fn the_winner_leads_200_ms_after_its_second_write() {
        let mut run = Run::new();
        assert_eq!(run.step(0), ElectionStep::Write(0));
        assert_eq!(run.step(10), run.wait(5000));
        run.written(20, ElectionWrite::Stored(7));
        assert_eq!((run.leads_until(20), run.machine.held()), (None, Some(7)));
        assert_eq!(run.step(20), run.wait(520));
        assert_eq!(run.step(519), run.wait(520));
        assert_eq!(run.step(520), ElectionStep::Write(7));
        run.written(530, ElectionWrite::Stored(9));
        assert_eq!(run.step(530), run.wait(730));
        assert_eq!(run.leads_until(729), None);
        // by the time at which the write was sent, not at which it was confirmed
        assert_eq!(run.leads_until(730), Some(520 + 7500));
        assert_eq!(run.step(730), run.wait(1030));
        assert_eq!(run.step(1030), ElectionStep::Write(9));
        run.written(1040, ElectionWrite::Stored(10));
        assert_eq!((run.leads_until(1040), run.machine.held()), (Some(1030 + 7500), Some(10)));
        assert_eq!(run.machine.campaigns(), Campaigns { candidate: 1, leader: 2 });
    }

    #[test]
    fn candidates_try_often_when_an_entry_has_to_expire() {
        let mut run = Run::new();
        for at in [0, 500, 1000] {
            assert_eq!(run.step(at), ElectionStep::Write(0));
            run.written(at, ElectionWrite::Conflict);
            run.machine.saw_entry(7, run.at(at + 10));
            assert_eq!((run.machine.interval(), run.step(at + 10)), (ms(500), run.wait(at + 500)));
        }
        let mut looks = |revision: u64, at: u64, expect: u64| {
            assert_eq!(run.step(at), ElectionStep::Write(0));
            run.written(at, ElectionWrite::Conflict);
            run.machine.saw_entry(revision, run.at(at));
            assert_eq!(run.step(at), run.wait(at + expect));
        };
        // the TTL is 10 s; the leader wrote again, and then no more
        looks(8, 9_010, 500);
        looks(8, 17_500, 500);
        looks(8, 18_010, 125);
        looks(8, 18_135, 125);
        looks(9, 18_260, 500);
        assert_eq!(run.machine.campaigns(), Campaigns { candidate: 8, leader: 0 });
    }

    #[test]
    fn intervals_by_chance_and_by_the_ttl() {
        let check = |ttl: Duration, stored: bool, random: f64, expect: u64| {
            let mut run = Run::new();
            run.machine.connected(Terms::of(ttl), run.begin);
            run.step(0);
            let written = if stored { ElectionWrite::Stored(1) } else { ElectionWrite::Conflict };
            run.machine.written(written, run.begin, random);
            assert_eq!(run.machine.interval().as_millis() as u64, expect, "{ttl:?} {random}");
        };
        for ttl in [Duration::from_secs(3), TTL, Duration::from_secs(3600)] {
            check(ttl, true, 0.0, 250);
            check(ttl, true, 1.0, 750);
            check(ttl, true, 7.0, 750);
            check(ttl, false, 0.0, 250);
            check(ttl, false, 1.0, 750);
        }
        // three times within the lease of 750 ms
        check(Duration::from_secs(1), true, 0.0, 83);
        check(Duration::from_secs(1), true, 1.0, 249);
        check(Duration::from_secs(1), false, 1.0, 750);
    }

    #[test]
    fn a_conflict_ends_it_at_once() {
        let mut run = Run::leading();
        assert_eq!(run.step(1500), ElectionStep::Write(3));
        assert!(run.leads_until(1510).is_some());
        run.written(1520, ElectionWrite::Conflict);
        assert_eq!((run.leads_until(1520), run.machine.held()), (None, None));
        // what lies there is somebody else's: only a key that is gone is free
        assert_eq!(run.step(2020), ElectionStep::Write(0));
        run.written(2030, ElectionWrite::Conflict);
        assert_eq!(run.machine.interval(), ms(500));
    }

    #[test]
    fn a_conflict_before_the_second_write_is_no_victory() {
        let mut run = Run::new();
        run.step(0);
        run.written(0, ElectionWrite::Stored(1));
        assert_eq!(run.step(500), ElectionStep::Write(1));
        run.written(510, ElectionWrite::Conflict);
        assert_eq!((run.leads_until(10_000), run.machine.held()), (None, None));
    }

    #[test]
    fn a_lost_connection_ends_leadership_and_the_key_is_retaken() {
        let mut run = Run::leading();
        assert_eq!(run.step(1500), ElectionStep::Write(3));
        run.machine.disconnected();
        assert_eq!((run.leads_until(1501), run.machine.held(), run.machine.is_writing()), (None, None, false));
        run.machine.connected(Terms::of(TTL), run.at(2000));
        assert_eq!(run.step(2000), ElectionStep::Write(3));
        run.written(2010, ElectionWrite::Stored(4));
        // like one that just won
        assert_eq!((run.leads_until(2400), run.machine.held()), (None, Some(4)));
        assert_eq!(run.step(2510), ElectionStep::Write(4));
        run.written(2510, ElectionWrite::Stored(5));
        assert_eq!((run.leads_until(2709), run.leads_until(2710)), (None, Some(2510 + 7500)));
    }

    #[test]
    fn a_key_that_others_wrote_meanwhile_is_left_alone() {
        let mut run = Run::leading();
        run.machine.disconnected();
        run.machine.connected(Terms::of(TTL), run.at(2000));
        assert_eq!(run.step(2000), ElectionStep::Write(3));
        run.written(2000, ElectionWrite::Conflict);
        assert_eq!(run.step(2500), ElectionStep::Write(0));
    }

    #[test]
    fn the_clock_alone_ends_it_when_nothing_is_confirmed() {
        let mut run = Run::leading();
        assert_eq!(run.step(1500), ElectionStep::Write(3));
        assert_eq!(run.step(1600), run.wait(6500));
        assert_eq!(run.leads_until(6499), Some(8500));
        assert_eq!(run.step(6500), ElectionStep::Overdue);
        // with a shorter TTL the lease is over before the write is
        let mut run = Run::leading();
        run.machine.connected(Terms::of(Duration::from_secs(4)), run.at(1500));
        assert_eq!(run.step(1500), ElectionStep::Write(3));
        assert_eq!(run.step(1600), run.wait(4000));
        assert_eq!((run.leads_until(3999), run.leads_until(4000)), (Some(4000), None));
        assert_eq!(run.step(4000), run.wait(6500));
        assert_eq!(run.machine.held(), None);
        // an answer that comes later makes it a winner, not a leader
        run.written(4100, ElectionWrite::Stored(4));
        assert_eq!((run.leads_until(4100), run.machine.held()), (None, Some(4)));
    }

    #[test]
    fn who_was_frozen_for_longer_than_the_ttl_does_not_lead() {
        let hour = 3_600_000;
        let mut run = Run::leading();
        assert_eq!(run.leads_until(hour), None);
        assert_eq!(run.step(hour), ElectionStep::Write(3));
        assert_eq!(run.machine.held(), None);
        run.written(hour, ElectionWrite::Conflict);
        assert_eq!(run.leads_until(hour), None);
        // frozen between a write and its answer
        let mut run = Run::leading();
        assert_eq!(run.step(1500), ElectionStep::Write(3));
        run.written(hour, ElectionWrite::Stored(4));
        assert_eq!((run.leads_until(hour), run.machine.held()), (None, None));
        // frozen before it led
        let mut run = Run::new();
        run.step(0);
        run.written(0, ElectionWrite::Stored(1));
        run.step(500);
        run.written(500, ElectionWrite::Stored(2));
        assert_eq!(run.leads_until(hour), None);
    }

    #[test]
    fn a_free_key_is_taken_from_the_marker_at_once() {
        let mut run = Run::new();
        assert_eq!(run.step(0), ElectionStep::Write(0));
        run.written(0, ElectionWrite::Conflict);
        run.machine.saw_marker(5, run.at(10));
        assert_eq!(run.step(10), ElectionStep::Write(5));
        run.written(20, ElectionWrite::Conflict);
        assert_eq!(run.step(20), run.wait(520));
        assert_eq!(run.step(520), ElectionStep::Write(0));
        // one that is heard of too late changes nothing
        run.machine.saw_marker(5, run.at(530));
        run.written(540, ElectionWrite::Stored(9));
        run.machine.saw_marker(5, run.at(550));
        assert_eq!((run.machine.held(), run.step(550)), (Some(9), run.wait(1040)));
    }

    #[test]
    fn a_write_without_an_answer_is_overdue_after_5_s() {
        let mut run = Run::new();
        assert_eq!(run.step(0), ElectionStep::Write(0));
        assert_eq!(run.step(4999), run.wait(5000));
        assert_eq!(run.step(5000), ElectionStep::Overdue);
    }

    #[test]
    fn an_unknown_ttl_is_taken_for_a_short_one() {
        assert_eq!(Terms::unknown(), Terms { lease: ms(3000), pace: ms(500), expiry: ms(3000) });
        assert_eq!(Terms::of(Duration::from_secs(60)), Terms { lease: ms(45_000), pace: ms(500), expiry: ms(59_000) });
    }
}
