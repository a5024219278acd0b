//! Checks the end of a run against the guarantees: all is there, all that happened was reported, and in time.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use tokio::time::{Duration, Instant, sleep};

use super::{
    plan::{Fault, Plan, Poison, Side, Way},
    run::Scene,
};

/// How long messages that are handed over may wait for an instance.
const HANDED_OVER: Duration = Duration::from_secs(5);

/// Servers have forgotten a consumer by then that is not used.
const FORGOTTEN: Duration = Duration::from_secs(60);

/// A kind of event, and its possible cause.
type Cause = (&'static str, fn(Fault) -> bool);

impl Scene {
    /// Waits until everything is right; how long that took, and the limit for it.
    pub async fn wait_until_right(&self) -> Result<(Duration, Duration), String> {
        let began = Instant::now();
        let limit = self.limit();
        loop {
            self.nothing_broken()?;
            match self.wrong() {
                None => break,
                Some(wrong) if began.elapsed() > limit => {
                    return Err(format!("{wrong} {limit:?} after the last fault"));
                }
                Some(_) => sleep(Duration::from_millis(500)).await,
            }
        }
        let took = began.elapsed();
        // And it stays right, but while one hands over to another.
        let end = Instant::now() + Duration::from_secs(60);
        while Instant::now() < end || self.wrong().is_some() && Instant::now() < end + HANDED_OVER {
            sleep(HANDED_OVER / 10).await;
        }
        let end = Instant::now() + FORGOTTEN;
        while Instant::now() < end && self.left_behind().is_some() {
            sleep(HANDED_OVER).await;
        }
        self.nothing_broken()?;
        self.wrong().or_else(|| self.left_behind()).map_or(Ok((took, limit)), Err)
    }

    fn nothing_broken(&self) -> Result<(), String> {
        let mut history = self.history();
        history.back_was_told();
        let broken = &history.broken;
        if broken.is_empty() { Ok(()) } else { Err(broken.join("\n")) }
    }

    /// Whatever a run leaves that was superseded or cut off in the middle of a search goes by inactivity at the latest: only
    /// the consumer of the present run stays.
    fn left_behind(&self) -> Option<String> {
        if let Some(what) = self.plan.is_consumed().then(|| self.history().unacknowledged()).flatten() {
            return Some(what);
        }
        let (source, target) = (self.source.consumers(), self.target.consumers());
        (source.len() > 1 || !target.is_empty())
            .then(|| format!("consumers are left behind: {source:?} at the source, {target:?} at the target"))
    }

    fn wrong(&self) -> Option<String> {
        let missing = self.history().missing();
        let leading = self.leading.load(Ordering::Relaxed);
        let leaders = || (leading != 1).then(|| format!("{leading} instances have the lease"));
        missing.or_else(leaders).or_else(|| self.told_wrong())
    }

    /// How long it may take until everything is right.
    fn limit(&self) -> Duration {
        let seconds = |seconds: f64| Duration::from_secs_f64(seconds);
        // A retry comes after 5 s at the latest; the search for the position takes a dozen questions over the slowest
        // connection, 0.6 s each.
        let mut limit = seconds(5.0 + 12.0 * 0.6);
        // What is left to copy: each windowful takes a way there and back, and the wait for the end of a batch.
        let backlog = self.history().backlog();
        // A batch of messages that the target has already is refused: then they are sent without batches.
        let batched = self.plan.batched && self.plan.keeps.is_none() && !self.plan.has(|fault| fault == Fault::Batches);
        let one_by_one = self.plan.strict && !batched;
        let together = if one_by_one { 1 } else { self.plan.in_flight };
        limit += seconds((backlog / together + 1) as f64 * 0.9);
        if let Some((messages, bytes)) = self.plan.rates {
            let size = 400 + 100 * self.plan.large;
            limit += seconds(2.0 * backlog as f64 * (1.0 / messages as f64).max(size as f64 / bytes as f64));
        }
        limit + self.plan.aftermath(backlog)
    }

    /// Events that were wrong or are missing.
    fn told_wrong(&self) -> Option<String> {
        let history = self.history();
        let causes: [Cause; 4] = [
            ("gap", |fault| matches!(fault, Fault::Purge(_))),
            ("source-reset", Fault::source_changes),
            ("target-reset", Fault::target_loses),
            ("target-shared", |fault| matches!(fault, Fault::Foreign(_))),
        ];
        for (kind, cause) in causes {
            if let Some(event) = history.events(kind).next()
                && !self.plan.has(cause)
            {
                return Some(format!("an event without a cause: {event}"));
            }
        }
        let set = self.plan.has(|fault| !fault.hosts().is_empty());
        let apart = self.world.source_ahead_ns() != 0;
        match history.events("clock-offset").next() {
            Some(event) if !set && !apart => return Some(format!("an event without a cause: {event}")),
            None if !set && apart => return Some("that clocks differ was never reported".to_owned()),
            _ => {}
        }
        for kind in ["source-reset", "target-reset"] {
            let told = history.events(kind).count();
            if told == 0 && history.due.contains(&kind) {
                return Some(format!("a {kind} was never reported"));
            }
            // Messages in flight may arrive after the target was read, and are news to the next run. A process that is killed
            // before it saved what it reported reports it again.
            if told > 2 && !self.told_again() {
                return Some(format!("a {kind} was reported {told} times"));
            }
        }
        if let Some(seq) = history.left_out_untold() {
            return Some(format!("that {seq} was skipped was never reported"));
        }
        drop(history);
        self.gaps_told_wrong()
    }

    /// Whether the same may be reported more than once: by two processes, or when what follows from it was not saved.
    fn told_again(&self) -> bool {
        let cause = |fault: &Fault| fault.source_changes() || fault.target_loses() || matches!(fault, Fault::Purge(_));
        let faults = &self.plan.faults;
        let happened = faults.iter().find(|(_, fault)| cause(fault)).map(|(at, _)| *at).unwrap_or_default();
        let unsaved = |(at, fault): &(Duration, Fault)| match fault {
            Fault::Crash(..) | Fault::Stop(..) => *at >= happened,
            Fault::CrashAt(..) | Fault::Trouble(_) | Fault::Pause(_) | Fault::PutBack => true,
            // The lease is lost, and what runs is dropped.
            Fault::CutOff(..) | Fault::Evict(..) | Fault::LeasePutBack => true,
            _ => false,
        };
        self.plan.begins.len() > 1 || faults.iter().any(unsaved)
    }

    /// Messages that the source removed before they were copied are counted and reported, once unless the process was
    /// killed before it saved that. Messages that were gone before a first start are no loss.
    fn gaps_told_wrong(&self) -> Option<String> {
        let history = self.history();
        let plain = self.plan.filter.is_none() && self.plan.source_keeps.is_none() && !self.plan.is_consumed();
        if !plain {
            return history.events("gap").next().map(|event| format!("no gap can be identified: {event}"));
        }
        if !self.purged_behind_start.load(Ordering::Relaxed) || self.plan.max_age.is_some() {
            return None;
        }
        // Those that newer ones replaced meanwhile may have been skipped for that before they were lost.
        let (gone, replaced) = (history.gone(), history.gone_but_replaced());
        let mut told = BTreeSet::new();
        let mut count = 0;
        for event in history.events("gap") {
            let number = |field: &str| event[field].as_u64().expect("a number");
            told.extend((number("from")..=number("to")).filter(|seq| !history.is_settled(*seq)));
            count += number("messages");
        }
        if !told.is_subset(&gone) || !gone.difference(&told).all(|seq| replaced.contains(seq)) {
            return Some(format!("{gone:?} were lost at the source, {told:?} were reported"));
        }
        // Skipped messages were reported, and may be counted once more by a process that does not know.
        let most = (gone.len() + history.left_out().len() + history.gone_without_trace()) as u64;
        let right =
            ((gone.len() - replaced.len()) as u64..=if self.told_again() { u64::MAX } else { most }).contains(&count);
        (!right).then(|| format!("{} were lost at the source, {count} were reported", gone.len()))
    }
}

impl Plan {
    /// Effects of the faults of a plan that last when they are over.
    fn aftermath(&self, backlog: usize) -> Duration {
        let longest = |part: fn(&Self, Fault) -> u64| {
            let parts = self.faults.iter().map(|(_, fault)| part(self, *fault));
            parts.max().unwrap_or_default()
        };
        let mut seconds = longest(Self::silence) + longest(Self::answers);
        if self.has(|fault| matches!(fault, Fault::Full(_) | Fault::Foreign(_)))
            || !self.neighbour.is_empty()
            || self.begins.len() > 1
        {
            // Held: tried again after 10 s.
            seconds += 10;
        }
        if self.poison.is_some() {
            // Each is held for 10 s before it is skipped, and one may be found in each hundred.
            seconds += 13 * (3 + backlog as u64 / 20);
        }
        Duration::from_secs(seconds) + self.leases()
    }

    /// Until an instance has the lease and keeps it: a session is silent for its time to live and is checked, and others may be
    /// nearer to it, each by its own clock. Later the lease may move once more to its preferred instance; messages in
    /// flight then may take 10 s to settle.
    fn leases(&self) -> Duration {
        let ttl = Duration::from_millis(self.ttls.iter().copied().max().unwrap_or_default());
        let handed = if self.begins.len() > 1 || self.has(|fault| fault == Fault::StepDown) { 15 } else { 0 };
        ttl * 3 + Duration::from_secs(handed)
    }

    /// Until a connection or consumer that is dead is given up.
    fn silence(&self, fault: Fault) -> u64 {
        match fault {
            // At the most: a pull without any answer is renewed after 30 s, and a silent connection is given up after that.
            Fault::HalfOpen(Side::Source, Way::To) => 43,
            Fault::HalfOpen(..) | Fault::Apart(..) => 15,
            // An ack that never comes: the target is asked, and at the latest nothing has moved for 30 s, or the end of a
            // batch has not come for 10 s.
            Fault::Lose(Side::Target, _) => {
                if self.batched && !self.has(|fault| fault == Fault::Batches) {
                    10
                } else {
                    30
                }
            }
            // Where only the stream's last sequence tells that messages wait.
            Fault::Mute => 35,
            // A consumer that is silent until it is given up.
            Fault::Restart(..)
            | Fault::SourceAnew
            | Fault::SourceForgets(_)
            | Fault::SourceShrinks(_)
            | Fault::Lose(Side::Source, _) => 13,
            _ => 0,
        }
    }

    /// Until a bucket or server has answered what it was asked while the fault lasted.
    fn answers(&self, fault: Fault) -> u64 {
        match fault {
            Fault::Trouble(_) => 10,
            Fault::Slow(..) | Fault::Leaderless(..) | Fault::Freeze(..) | Fault::Behind(..) => 8,
            Fault::Stop(..) => 5,
            Fault::CutOff(..) => 3,
            Fault::Leave(..) => 10,
            _ => {
                if self.poison == Some(Poison::Noticed) {
                    1
                } else {
                    0
                }
            }
        }
    }
}
