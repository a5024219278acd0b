//! Warns before the source removes messages that are not copied yet. During a run, its status has the time that is left.
//! Between runs, when operators need that most, the source is checked from time to time, for few replications at once.

use std::{convert::Infallible, future::pending, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::context::Context;
use crate::{
    config::Replication,
    copy::{Error, ErrorKind, HeadroomChange, Outlook, PollHistory, Shortage, peek},
    events::Event,
    status::{CopyStatus, Headroom, State},
};

/// Checks of sources that the whole process may have under way: a thousand paused replications must not connect at once.
static AT_ONCE: Semaphore = Semaphore::const_new(4);
/// Time from the end of a run to the first check.
const FIRST: Duration = Duration::from_secs(1);
/// The next check follows after a tenth of the time that is left, or of the time that the source keeps new messages,
/// within these bounds. In any case the pause starts with the shortest and doubles: these checks report the lag.
const SOONEST: Duration = Duration::from_secs(5);
const LATEST: Duration = Duration::from_secs(60);
/// Time limit for a check.
const LIMIT: Duration = Duration::from_secs(10);

/// Follows the headroom of one replication.
#[derive(Debug, Default)]
pub(super) struct RetentionWatch {
    observations: PollHistory,
    shortage: Shortage,
    /// When the source is checked next, while no run is under way.
    next: Option<Instant>,
    /// Checks since the last run, or since the source started or ceased to answer.
    checks: u32,
}

impl RetentionWatch {
    /// Follows a replication that is to run, during and between runs. A run reports the headroom once it is connected.
    pub(super) async fn follow(&mut self, context: &Context, replication: &Replication) -> Infallible {
        let mut status = context.cell.status().subscribe();
        loop {
            tokio::select! {
                biased;
                Ok(_) = status.wait_for(|(_, copy)| copy.source.connected) => {}
                never = self.follow_between_runs(context, Some(replication)) => match never {},
            }
            (self.next, self.checks) = (None, 0);
            self.follow_run(context, &mut status).await;
        }
    }

    /// Follows the status of a run until it is over.
    async fn follow_run(&mut self, context: &Context, status: &mut watch::Receiver<(State, CopyStatus)>) {
        loop {
            let (headroom, caught_up) = {
                let (state, copy) = &*status.borrow_and_update();
                if !copy.source.connected {
                    return;
                }
                let nothing_waits = copy.lag.is_some_and(|lag| lag.messages == 0);
                (copy.headroom, *state == State::Running && nothing_waits)
            };
            self.judge(context, headroom, caught_up);
            if status.changed().await.is_err() {
                return pending().await;
            }
        }
    }

    /// Checks the source while no run is under way. After a drop, the next call continues the schedule.
    pub(super) async fn follow_between_runs(
        &mut self,
        context: &Context,
        replication: Option<&Replication>,
    ) -> Infallible {
        let Some(replication) = replication else { return pending().await };
        loop {
            let next = *self.next.get_or_insert_with(|| Instant::now() + FIRST);
            sleep_until(next).await;
            let pause = self.check_source(context, replication).await;
            let most = SOONEST * 2_u32.saturating_pow(self.checks);
            self.checks = (self.checks + 1).min(4);
            self.next = Some(Instant::now() + pause.min(most));
        }
    }

    /// Checks the source once; returns how long the next check may wait.
    async fn check_source(&mut self, context: &Context, replication: &Replication) -> Duration {
        let Ok(_one_of_few) = AT_ONCE.acquire().await else { return LATEST };
        let (state, copy) = context.cell.status().borrow().clone();
        let known = copy.lag.is_some();
        if state == State::Paused
            && let Ok((record, _)) = context.deps.positions.read(&context.id).await
        {
            // Another instance may have moved it.
            context.cell.looked_up(&record);
        }
        let position = context.cell.progress().position.source_seq;
        if position == 0 && !known {
            // It has not started, so the start, and with it the lag, is not known.
            return LATEST;
        }
        let consumers = context.consumers();
        let peeked = peek(&context.deps.rules, replication, &consumers, position, &mut self.observations);
        let peeked = timeout(LIMIT, peeked).await;
        let peeked = peeked.unwrap_or_else(|_| Err(Error::new(ErrorKind::Retry, format!("no answer for {LIMIT:?}"))));
        if peeked.is_ok() != known {
            self.checks = 0;
        }
        let peeked = match peeked {
            Ok(peeked) => peeked,
            Err(error) => {
                debug!(replication = context.id, "the source was not checked: {error}");
                context.cell.peeked(None, None);
                return LATEST;
            }
        };
        let headroom = match peeked.outlook {
            Outlook::Left(headroom) => Some(headroom),
            Outlook::Unknown | Outlook::Safe => None,
        };
        context.cell.peeked(Some(&peeked), headroom);
        context.cell.measured(peeked.clock_offset);
        self.judge(context, headroom, peeked.lag.messages == 0);
        let left = headroom.map(|headroom| headroom.seconds);
        match left.into_iter().chain(peeked.kept).reduce(f64::min) {
            _ if peeked.outlook == Outlook::Unknown => SOONEST,
            Some(seconds) => Duration::from_secs_f64(seconds.min(1e6) / 10.0).clamp(SOONEST, LATEST),
            None => LATEST,
        }
    }

    fn judge(&mut self, context: &Context, headroom: Option<Headroom>, caught_up: bool) {
        let position = context.cell.progress().position.source_seq;
        match self.shortage.judge(headroom, caught_up) {
            Some(HeadroomChange::Low(Headroom { seconds, limit, .. })) => {
                warn!(
                    replication = context.id,
                    seconds,
                    ?limit,
                    "the source will soon remove messages that are not copied"
                );
                context.emit(Event::HeadroomLow { seconds: seconds as u64, limit, position });
            }
            Some(HeadroomChange::Restored) => {
                info!(
                    replication = context.id,
                    "messages that are not copied stay at the source for long enough again"
                );
                context.emit(Event::HeadroomOk { position });
            }
            None => {}
        }
    }
}
