//! The right to run one replication: it ends with a signal, or by the clock.

use std::{
    future::{Future, poll_fn},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures_util::{FutureExt, task::AtomicWaker};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::boottime;

/// Until when the leases of this process are valid, by its own clock; cheap to clone.
#[derive(Debug, Clone)]
pub struct Validity {
    begin: Instant,
    /// Nanoseconds after `begin`.
    until: Arc<AtomicU64>,
}

impl Validity {
    /// A term that is over.
    pub(super) fn new(now: Instant) -> Self {
        Self { begin: now, until: Arc::new(AtomicU64::new(0)) }
    }

    /// Sets the end of the term; `None` ends it now.
    pub(super) fn set(&self, until: Option<Instant>) {
        let left = until.map_or(Duration::ZERO, |until| until.saturating_duration_since(self.begin));
        self.until.store(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX), Ordering::Release);
    }

    /// Whether it is valid now.
    pub(super) fn holds_now(&self) -> bool {
        self.holds(boottime::now())
    }

    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begin).as_nanos() < u128::from(self.until.load(Ordering::Acquire))
    }
}

/// The right to run one replication, from a grant to its end.
#[derive(Debug, Clone)]
pub struct Grant {
    /// Greater than the epoch of every earlier holder.
    pub epoch: u64,
    term: Validity,
    signals: Arc<Signals>,
}

/// The state for its holder; read whenever the work is polled, so it is cheap.
#[derive(Debug, Default)]
struct Signals {
    /// Another instance gets it.
    yields: AtomicBool,
    /// It is lost.
    lost: AtomicBool,
    reason: OnceLock<String>,
    waker: AtomicWaker,
}

impl Grant {
    pub(super) fn new(epoch: u64, term: Validity) -> Self {
        Self { epoch, term, signals: Arc::default() }
    }

    /// Asks the holder to end gracefully.
    pub(super) fn ask_back(&self) {
        self.signals.yields.store(true, Ordering::Release);
        self.signals.waker.wake();
    }

    /// Ends the grant: no further step of the work may run.
    pub(super) fn revoke(&self, reason: String) {
        let _ = self.signals.reason.set(reason);
        self.signals.lost.store(true, Ordering::Release);
        self.signals.waker.wake();
    }

    /// Why it was lost.
    pub fn why_lost(&self) -> &str {
        self.signals.reason.get().map_or("the session of this instance was not renewed in time", String::as_str)
    }

    /// Does the work while the grant is valid; returns `None` if it was lost. The clock is checked before each step of the
    /// work: a process that was suspended does nothing more, whatever is ready when it wakes. `stop` is cancelled when
    /// another instance is to get the lease: then the work has to end gracefully. One holder at a time.
    pub async fn hold<T>(&self, stop: &CancellationToken, mut work: impl Future<Output = T> + Unpin) -> Option<T> {
        let Signals { yields, lost, waker, .. } = &*self.signals;
        poll_fn(|cx| {
            waker.register(cx.waker());
            if lost.load(Ordering::Acquire) || !self.term.holds_now() {
                return Poll::Ready(None);
            }
            if yields.swap(false, Ordering::AcqRel) {
                stop.cancel();
            }
            work.poll_unpin(cx).map(Some)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, pin::pin};

    use tokio::time::{advance, sleep};

    use super::*;

    async fn grant(seconds: u64) -> Grant {
        let term = Validity::new(Instant::now());
        term.set(Some(Instant::now() + Duration::from_secs(seconds)));
        Grant::new(1, term)
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_was_frozen_beyond_the_term_is_not_touched_again() {
        let grant = grant(2).await;
        let mut done = false;
        let work = async {
            sleep(Duration::from_secs(1)).await;
            done = true;
        };
        {
            let stop = CancellationToken::new();
            let mut held = pin!(grant.hold(&stop, Box::pin(work)));
            assert!(futures_util::poll!(held.as_mut()).is_pending());
            // Both the work and the end of the term are ready now.
            advance(Duration::from_secs(5)).await;
            assert_eq!(held.await, None);
        }
        assert!(!done);
    }

    #[tokio::test(start_paused = true)]
    async fn work_of_a_suspended_host_is_not_touched_after_the_term() {
        let grant = grant(10).await;
        let mut touched = 0;
        let work = std::future::poll_fn(|_| {
            touched += 1;
            Poll::<()>::Pending
        });
        {
            let stop = CancellationToken::new();
            let mut held = pin!(grant.hold(&stop, work));
            assert!(futures_util::poll!(held.as_mut()).is_pending());
            boottime::pretend_suspended(Duration::from_secs(60));
            assert_eq!(held.await, None);
        }
        assert_eq!(touched, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_revocation_ends_the_work_at_once_and_a_term_is_prolonged() {
        let grant = grant(2).await;
        grant.term.set(Some(Instant::now() + Duration::from_secs(10)));
        let revoke = async {
            sleep(Duration::from_secs(5)).await;
            grant.revoke("lost".to_owned());
            pending::<()>().await;
        };
        let stop = CancellationToken::new();
        let held = grant.hold(&stop, pending::<()>());
        let begun = Instant::now();
        tokio::select! {
            result = held => assert_eq!(result, None),
            () = revoke => {}
        }
        assert_eq!((begun.elapsed(), grant.why_lost()), (Duration::from_secs(5), "lost"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_back_ends_in_order() {
        let grant = grant(60).await;
        let stop = CancellationToken::new();
        let work = Box::pin(async {
            stop.cancelled().await;
            sleep(Duration::from_secs(1)).await;
            "settled"
        });
        let ask = async {
            sleep(Duration::from_secs(5)).await;
            grant.ask_back();
        };
        assert_eq!(tokio::join!(grant.hold(&stop, work), ask).0, Some("settled"));
    }
}
