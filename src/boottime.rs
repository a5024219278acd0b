//! The clock of leases and elections: it continues while the host is suspended, as clocks of other hosts do.
//!
//! `Instant` stands still while a virtual machine or a laptop is suspended (`CLOCK_MONOTONIC`). A holder that wakes
//! after minutes would take its right to run for fresh, though others have taken over. Where the system has a clock
//! that continues, the time for which the host was suspended is added.

use std::{sync::OnceLock, time::Duration};

use tokio::time::Instant;

/// The time now. Between two calls at least the time passes for which the host was awake or suspended.
pub(crate) fn now() -> Instant {
    Instant::now() + away()
}

/// An instant of this clock as one that timers understand.
pub(crate) fn for_timers(at: Instant) -> Instant {
    at.checked_sub(away()).unwrap_or(at)
}

#[cfg(not(test))]
fn away() -> Duration {
    suspended()
}

#[cfg(test)]
thread_local! {
    /// What tests add.
    static PRETENDED: std::cell::Cell<Duration> = const { std::cell::Cell::new(Duration::ZERO) };
}

#[cfg(test)]
fn away() -> Duration {
    suspended() + PRETENDED.get()
}

/// As if the host had just been suspended for this time, for this thread.
#[cfg(test)]
pub(crate) fn pretend_suspended(time: Duration) {
    PRETENDED.set(PRETENDED.get() + time);
}

/// For how long the host was suspended since the first call.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn suspended() -> Duration {
    static BEFORE: OnceLock<Duration> = OnceLock::new();
    // A pause between two readings must not look like a suspension: it makes this one too small, the first one too great.
    let ahead = || {
        let boot = read(rustix::time::ClockId::Boottime);
        boot.saturating_sub(read(rustix::time::ClockId::Monotonic))
    };
    let before = BEFORE.get_or_init(|| {
        let monotonic = read(rustix::time::ClockId::Monotonic);
        read(rustix::time::ClockId::Boottime).saturating_sub(monotonic)
    });
    ahead().saturating_sub(*before)
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn read(clock: rustix::time::ClockId) -> Duration {
    let time = rustix::time::clock_gettime(clock);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or_default(), nanos.unwrap_or_default())
}

/// For how long the host was suspended: not known here.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn suspended() -> Duration {
    static BEFORE: OnceLock<Duration> = OnceLock::new();
    *BEFORE.get_or_init(|| Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_awake_is_not_suspended() {
        let before = suspended();
        for _ in 0..100_000 {
            assert_eq!(suspended(), before);
        }
        let at = now();
        assert!(for_timers(at) <= at);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_suspended_counts_and_timers_do_not_wait_for_it() {
        let before = now();
        pretend_suspended(Duration::from_secs(60));
        assert_eq!(now() - before, Duration::from_secs(60));
        assert_eq!(for_timers(before + Duration::from_secs(70)), Instant::now() + Duration::from_secs(10));
    }
}
