//! What everything simulated shares: the clock and the seed.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicI64, Ordering},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Duration, Instant};

/// 2026-01-01T00:00:00Z.
const BEGINNING_NS: i64 = 1_767_225_600_000_000_000;

/// Cheap to clone. All decisions are drawn from one seed, and time is tokio's paused clock: the same seed gives the
/// same run.
#[derive(Debug, Clone)]
pub struct World {
    began: Instant,
    random: Arc<Mutex<StdRng>>,
    /// By how much the wall clock of the servers was set.
    set_by_ns: Arc<AtomicI64>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            began: Instant::now(),
            random: Arc::new(Mutex::new(StdRng::seed_from_u64(seed))),
            set_by_ns: Arc::default(),
        }
    }

    /// Wall clock of all servers.
    pub fn now_ns(&self) -> i64 {
        BEGINNING_NS + self.elapsed().as_nanos() as i64 + self.set_by_ns.load(Ordering::Relaxed)
    }

    /// Somebody sets the wall clock.
    pub fn set_clock(&self, by: Duration, back: bool) {
        let by = by.as_nanos() as i64;
        self.set_by_ns.fetch_add(if back { -by } else { by }, Ordering::Relaxed);
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// A number in `from..=to`.
    pub fn between(&self, from: u64, to: u64) -> u64 {
        self.random.lock().expect("random").random_range(from..=to)
    }

    /// Once in so many times.
    pub fn once_in(&self, times: u64) -> bool {
        self.between(1, times) == 1
    }

    pub fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.between(from, to))
    }
}
