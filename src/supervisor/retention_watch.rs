//! Tells when the source is going to remove what is not copied yet. While a run is under way its status says how long
//! that will take. While none is, which is when people need to know most, the source is looked at now and then, by few
//! at a time.

use std::{convert::Infallible, future::pending, time::Duration};

use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::replication::Context;
use crate::{
    config::Replication,
    copy::{Error, ErrorKind, Looks, Outlook, Shortage, Turn, peek},
    events::Event,
    status::{CopyStatus, Headroom, State},
};

/// Looks at sources of the whole process that may be under way: a thousand paused replications must not connect at once.
static AT_ONCE: Semaphore = Semaphore::const_new(4);
/// The first look after the end of a run.
const FIRST: Duration = Duration::from_secs(1);
/// Then after a tenth of the time that is left, or that the source keeps what comes now, within these bounds; in any case
/// the pause grows from the shortest to the longest: the lag is reported from these checks.
const SOONEST: Duration = Duration::from_secs(5);
const LATEST: Duration = Duration::from_secs(60);
/// So long a look may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What is known of one replication's headroom.
#[derive(Debug, Default)]
pub(super) struct Watch {
    looks: Looks,
    shortage: Shortage,
    /// When the source is looked at next, while no run is under way.
    next: Option<Instant>,
    /// Checks since the last run, or since the source began or ceased to answer.
    checks: u32,
}

impl Watch {
    /// While a replication is to run: beside each run, and between them. A run reports for itself once it is connected.
    pub(super) async fn follow(&mut self, context: &Context, replication: &Replication) -> Infallible {
        let mut status = context.board.status().subscribe();
        loop {
            tokio::select! {
                biased;
                Ok(_) = status.wait_for(|(_, copy)| copy.source.connected) => {}
                never = self.alone(context, Some(replication)) => match never {},
            }
            (self.next, self.checks) = (None, 0);
            self.beside(context, &mut status).await;
        }
    }

    /// Until a run is over.
    async fn beside(&mut self, context: &Context, status: &mut watch::Receiver<(State, CopyStatus)>) {
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

    /// While no run is under way. Dropped and called again it goes on.
    pub(super) async fn alone(&mut self, context: &Context, replication: Option<&Replication>) -> Infallible {
        let Some(replication) = replication else { return pending().await };
        loop {
            let next = *self.next.get_or_insert_with(|| Instant::now() + FIRST);
            sleep_until(next).await;
            let pause = self.look(context, replication).await;
            let most = SOONEST * 2_u32.saturating_pow(self.checks);
            self.checks = (self.checks + 1).min(4);
            self.next = Some(Instant::now() + pause.min(most));
        }
    }

    /// Checks the source once; returns how long the next check may wait.
    async fn look(&mut self, context: &Context, replication: &Replication) -> Duration {
        let Ok(_one_of_few) = AT_ONCE.acquire().await else { return LATEST };
        let (state, copy) = context.board.status().borrow().clone();
        let known = copy.lag.is_some();
        if state == State::Paused
            && let Ok((record, _)) = context.deps.positions.read(&context.id).await
        {
            // Another instance may have moved it.
            context.board.looked_up(&record);
        }
        let position = context.board.mark().position.source_seq;
        if position == 0 && !known {
            // It has not begun: where it will, and so what waits, is not known.
            return LATEST;
        }
        let consumers = context.consumers();
        let looked = peek(&context.deps.rules, replication, &consumers, position, &mut self.looks);
        let looked = timeout(LIMIT, looked).await;
        let looked = looked.unwrap_or_else(|_| Err(Error::new(ErrorKind::Retry, format!("no answer for {LIMIT:?}"))));
        if looked.is_ok() != known {
            self.checks = 0;
        }
        let glance = match looked {
            Ok(glance) => glance,
            Err(error) => {
                debug!(replication = context.id, "the source was not checked: {error}");
                context.board.glanced(None, None);
                return LATEST;
            }
        };
        let headroom = match glance.outlook {
            Outlook::Left(headroom) => Some(headroom),
            Outlook::Unknown | Outlook::Safe => None,
        };
        context.board.glanced(Some(&glance), headroom);
        context.board.measured(glance.clock_offset);
        self.judge(context, headroom, glance.lag.messages == 0);
        let left = headroom.map(|headroom| headroom.seconds);
        match left.into_iter().chain(glance.kept).reduce(f64::min) {
            _ if glance.outlook == Outlook::Unknown => SOONEST,
            Some(seconds) => Duration::from_secs_f64(seconds.min(1e6) / 10.0).clamp(SOONEST, LATEST),
            None => LATEST,
        }
    }

    fn judge(&mut self, context: &Context, headroom: Option<Headroom>, caught_up: bool) {
        let position = context.board.mark().position.source_seq;
        match self.shortage.judge(headroom, caught_up) {
            Some(Turn::Low(Headroom { seconds, limit, .. })) => {
                warn!(
                    replication = context.id,
                    seconds,
                    ?limit,
                    "the source will soon remove messages that are not copied"
                );
                context.emit(Event::HeadroomLow { seconds: seconds as u64, limit, position });
            }
            Some(Turn::Restored) => {
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
