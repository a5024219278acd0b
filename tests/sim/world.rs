//! What everything simulated shares: the clock, the seed and the trace.

use std::{
    cell::RefCell,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use chrono::{DateTime, Utc};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use stream_replicator::chance::Chance;
use tokio::time::{Duration, Instant};

/// 2026-01-01T00:00:00Z.
const BEGINNING_NS: i64 = 1_767_225_600_000_000_000;

/// Cheap to clone. All decisions are drawn from one seed, and time is tokio's paused clock: the same seed gives the
/// same run.
#[derive(Debug, Clone)]
pub struct World {
    began: Instant,
    random: Arc<Mutex<StdRng>>,
    /// By how much the wall clock was set, and the latest time that it ever showed.
    set_by_ns: Arc<AtomicI64>,
    latest_ns: Arc<AtomicI64>,
    trace: Arc<Mutex<DefaultHasher>>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            began: Instant::now(),
            random: Arc::new(Mutex::new(StdRng::seed_from_u64(seed))),
            set_by_ns: Arc::default(),
            latest_ns: Arc::default(),
            trace: Arc::default(),
        }
    }

    /// Wall clock of all servers and of the copying processes.
    pub fn now_ns(&self) -> i64 {
        let now = BEGINNING_NS + self.elapsed().as_nanos() as i64 + self.set_by_ns.load(Ordering::Relaxed);
        self.latest_ns.fetch_max(now, Ordering::Relaxed);
        now
    }

    /// The latest time that the wall clock ever showed.
    pub fn latest_ns(&self) -> i64 {
        self.now_ns().max(self.latest_ns.load(Ordering::Relaxed))
    }

    /// Somebody sets the wall clock.
    pub fn set_clock(&self, by: Duration, back: bool) {
        self.now_ns();
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

    /// Notes bytes that were exchanged, and when.
    pub fn note(&self, who: &str, bytes: &[u8]) {
        (self.elapsed(), who, bytes).hash(&mut *self.trace.lock().expect("trace"));
    }

    /// A hash of all that was noted.
    pub fn trace(&self) -> u64 {
        self.trace.lock().expect("trace").finish()
    }

    /// Where the copy core gets its random numbers and the time of day.
    pub fn luck(&self, seed: u64) -> Luck {
        Luck { world: self.clone(), random: RefCell::new(StdRng::seed_from_u64(!seed)) }
    }
}

/// Drawn from another sequence than what happens: a change of the core leaves the plan of a seed as it was.
pub struct Luck {
    world: World,
    random: RefCell<StdRng>,
}

impl fmt::Debug for Luck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Luck")
    }
}

impl Chance for Luck {
    fn random(&self) -> u64 {
        self.random.borrow_mut().random()
    }

    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(self.world.now_ns())
    }
}
