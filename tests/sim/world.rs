//! What everything simulated shares: the clock, the seed and the trace.

use std::{
    cell::RefCell,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex},
};

use chrono::{DateTime, Utc};
use nats_lane::entropy::Entropy;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Duration, Instant};

/// 2026-01-01T00:00:00Z.
const BEGINNING_NS: i64 = 1_767_225_600_000_000_000;

/// A machine with a wall clock of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// That of the copying processes.
    Service,
    Source,
    Target,
}

/// A wall clock that is wrong by so much, and when that was changed.
#[derive(Debug, Default)]
struct Clock {
    wrong_by_ns: i64,
    /// By how much it was wrong before, and until when.
    before: Vec<(i64, Duration)>,
}

/// A reader that polls a clock every ten seconds may use the time before it was set for that long, and longer by the delay of
/// the answer.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(15);

/// Cheap to clone. All decisions are drawn from one seed, and time is tokio's paused clock: the same seed gives the
/// same run.
#[derive(Debug, Clone)]
pub struct World {
    seed: u64,
    began: Instant,
    random: Arc<Mutex<StdRng>>,
    clocks: Arc<Mutex<[Clock; 3]>>,
    trace: Arc<Mutex<DefaultHasher>>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            began: Instant::now(),
            random: Arc::new(Mutex::new(StdRng::seed_from_u64(seed))),
            clocks: Arc::new(Mutex::new(clocks(seed))),
            trace: Arc::default(),
        }
    }

    /// The wall clock of a machine.
    pub fn now_ns(&self, host: Host) -> i64 {
        let wrong_by_ns = self.clocks.lock().expect("clocks")[host as usize].wrong_by_ns;
        BEGINNING_NS + self.elapsed().as_nanos() as i64 + wrong_by_ns
    }

    /// The latest time that somebody can have taken for the time of the source by now; answers are kept back by so much at
    /// most.
    pub fn latest_ns(&self, kept_back: Duration) -> i64 {
        let clocks = self.clocks.lock().expect("clocks");
        let Clock { wrong_by_ns, before } = &clocks[Host::Source as usize];
        let until = |set_at: Duration| self.elapsed().min(set_at + FOLLOWED_WITHIN + kept_back);
        let shown = |wrong_by_ns: i64, until: Duration| BEGINNING_NS + until.as_nanos() as i64 + wrong_by_ns;
        let before = before.iter().map(|(wrong_by_ns, set_at)| shown(*wrong_by_ns, until(*set_at)));
        before.fold(shown(*wrong_by_ns, self.elapsed()), i64::max)
    }

    /// Somebody sets the wall clock of a machine.
    pub fn set_clock(&self, host: Host, by: Duration, back: bool) {
        let clock = &mut self.clocks.lock().expect("clocks")[host as usize];
        clock.before.push((clock.wrong_by_ns, self.elapsed()));
        let by = by.as_nanos() as i64;
        clock.wrong_by_ns += if back { -by } else { by };
    }

    /// How far the clock of the source is ahead of that of the copying processes.
    pub fn source_ahead_ns(&self) -> i64 {
        self.now_ns(Host::Source) - self.now_ns(Host::Service)
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Random numbers from a sequence of their own.
    pub fn aside(&self, which: u32) -> StdRng {
        StdRng::seed_from_u64(self.seed.rotate_left(which))
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

/// How wrong the clocks are in the beginning: drawn from another sequence than what happens. The source's is right: what
/// counts is how they differ.
fn clocks(seed: u64) -> [Clock; 3] {
    let mut random = StdRng::seed_from_u64(seed.rotate_left(32));
    let mut wrong = || match random.random_range(0..4) {
        0 | 1 => 0,
        2 => random.random_range(60_000..7_200_000),
        _ => -random.random_range(60_000..7_200_000),
    };
    [wrong(), 0, wrong()].map(|ms| Clock { wrong_by_ns: ms * 1_000_000, before: Vec::new() })
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

impl Entropy for Luck {
    fn random(&self) -> u64 {
        self.random.borrow_mut().random()
    }

    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(self.world.now_ns(Host::Service))
    }
}
