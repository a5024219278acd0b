//! What happens in one simulated run of a native feed, drawn from its seed.

use rand::RngExt;
use stream_replicator::native::FeedSubjects;
use tokio::time::Duration;

use super::{
    ingest::{self, Asks},
    plan::{Side, Way},
    run::ID,
    server::Tamper,
    stream::{Config, Stored},
    world::World,
};

/// What happens to a feed.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The process of a feed ends, and is away for a while.
    Crash(usize, Duration),
    /// It does not run for a while.
    Freeze(usize, Duration),
    Cut(Side),
    Restart(Side, Duration),
    FreezeServer(Side, Duration),
    /// A frame between target and feed, after so many others, is lost or arrives twice.
    Tamper(u64, Tamper),
    Slow(Side, Way, Duration),
    HalfOpen(Side, Way),
    /// The source removes this many of its messages.
    Delete(u64),
    /// The other process takes over; the old one hears of it, or not.
    HandOver {
        heard: bool,
    },
    /// Another server of a cluster leads the target stream.
    MoveLeader,
    /// A server of the target's cluster is down for a while.
    NodeDown(usize, Duration),
    /// Of several leafnode connections, that breaks over which the target is fed.
    CutFed,
    /// The target takes no more messages for a while.
    Full(Duration),
}

/// Messages that the target never stores, and what the document says of them.
#[derive(Debug, Clone, Copy)]
pub struct Refuses {
    pub what: Unstorable,
    pub on_reject: OnReject,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unstorable {
    /// They have a header that the target does not take: only its log says so.
    Header,
    /// They are larger than the target takes, or become so by the header that a source adds.
    Large,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnReject {
    Hold,
    Skip,
    DeadLetter,
}

/// Largest message of a target that takes no larger ones.
const LARGEST: usize = 1_000;
/// One message of so many is not storable.
const UNSTORABLE_EVERY: u64 = 31;
/// In a plan where it is away: when a feed is back, after everything else has happened.
pub const BACK_AFTER: Duration = Duration::from_secs(50);
/// Servers of a target that is a cluster.
const NODES: usize = 3;

/// One run.
#[derive(Debug, Clone)]
pub struct FeedPlan {
    pub is_mirror: bool,
    pub asks: Asks,
    /// Both processes feed for all of the time, each with a record of its own.
    pub rivals: bool,
    /// A subject that is excluded.
    pub excludes: bool,
    pub in_flight: u64,
    /// Number of servers of the target.
    pub nodes: usize,
    /// Of each subject no more is given than one message in this time.
    pub inspect: Option<Duration>,
    pub refuses: Option<Refuses>,
    pub bursts: Vec<(Duration, u64)>,
    pub faults: Vec<(Duration, Fault)>,
    /// When the source is replaced by another stream of its name.
    pub recreated: Option<Duration>,
}

impl FeedPlan {
    pub fn draw(world: &World) -> Self {
        let time = || world.millis(0, 60_000);
        let side = || if world.once_in(2) { Side::Source } else { Side::Target };
        let way = || if world.once_in(2) { Way::To } else { Way::From };
        let which = || world.between(0, 1) as usize;
        let fault = || match world.between(0, 11) {
            0 | 1 => Fault::Crash(which(), world.millis(0, 30_000)),
            2 | 3 => Fault::Freeze(which(), world.millis(0, 40_000)),
            4 => Fault::Cut(side()),
            5 => Fault::Restart(side(), world.millis(0, 20_000)),
            6 => Fault::FreezeServer(side(), world.millis(0, 15_000)),
            7 => Fault::Tamper(world.between(0, 200), if world.once_in(2) { Tamper::Lose } else { Tamper::Twice }),
            8 => Fault::Slow(side(), way(), world.millis(0, 3_000)),
            9 => Fault::HalfOpen(side(), way()),
            10 => Fault::Delete(world.between(1, 30)),
            _ => Fault::HandOver { heard: world.once_in(2) },
        };
        let mut bursts: Vec<_> = (0..world.between(1, 12)).map(|_| (time(), world.between(1, 120))).collect();
        let mut faults: Vec<_> = (0..world.between(0, 12)).map(|_| (time(), fault())).collect();
        bursts.sort_by_key(|(at, _)| *at);
        faults.sort_by_key(|(at, _)| *at);
        let rivals = world.once_in(6);
        let plan = Self {
            is_mirror: world.once_in(2),
            asks: if world.once_in(2) { Asks::New } else { Asks::Old },
            rivals,
            excludes: world.once_in(4),
            in_flight: if world.once_in(2) { world.between(1, 20) } else { 2_000 },
            nodes: 1,
            inspect: None,
            refuses: None,
            bursts,
            faults,
            recreated: (!rivals && world.once_in(5)).then(|| world.millis(20_000, 60_000)),
        };
        plan.widen(world)
    }

    /// What else may be; drawn from other sequences, so that plans without it stay as they are.
    fn widen(mut self, world: &World) -> Self {
        if self.asks == Asks::New && world.aside(22).random_range(0..3) == 0 {
            self.asks = Asks::Durable;
        }
        let mut random = world.aside(23);
        if random.random_range(0..6) == 0 {
            self.inspect = Some(Duration::from_millis(random.random_range(1_000..20_000)));
        }
        let mut random = world.aside(24);
        if random.random_range(0..5) == 0 {
            let what = if random.random() { Unstorable::Header } else { Unstorable::Large };
            let all = [OnReject::Hold, OnReject::Skip, OnReject::DeadLetter];
            self.refuses = Some(Refuses { what, on_reject: all[random.random_range(0..all.len())] });
        }
        let mut random = world.aside(25);
        if random.random_range(0..4) == 0 {
            self.nodes = NODES;
            for _ in 0..random.random_range(0..8) {
                let fault = match random.random_range(0..3) {
                    0 => Fault::MoveLeader,
                    1 => Fault::NodeDown(
                        random.random_range(0..NODES),
                        Duration::from_millis(random.random_range(0..20_000)),
                    ),
                    _ => Fault::CutFed,
                };
                self.faults.push((Duration::from_millis(random.random_range(0..60_000)), fault));
            }
            self.faults.sort_by_key(|(at, _)| *at);
        }
        let mut random = world.aside(26);
        if random.random_range(0..10) == 0 && self.refuses.is_none() {
            let full = Fault::Full(Duration::from_millis(random.random_range(0..30_000)));
            self.faults.push((Duration::from_millis(random.random_range(0..60_000)), full));
            self.faults.sort_by_key(|(at, _)| *at);
        }
        self
    }

    /// One message after the other for 25 s, and nothing else that happens.
    fn steady(world: &World) -> Self {
        Self {
            is_mirror: world.once_in(2),
            asks: Asks::New,
            rivals: false,
            excludes: false,
            in_flight: 2_000,
            nodes: 1,
            inspect: None,
            refuses: None,
            bursts: (0..250).map(|nth| (Duration::from_millis(1_000 + nth * 100), 1)).collect(),
            faults: Vec::new(),
            recreated: None,
        }
    }

    /// A target with a durable consumer while the feed is away for long: until 50 s after all else has happened.
    pub fn away(world: &World) -> Self {
        let away = Duration::from_secs(BACK_AFTER.as_secs() + 60 - 10);
        let faults = vec![(Duration::from_secs(10), Fault::Crash(0, away))];
        Self { asks: Asks::Durable, faults, ..Self::steady(world) }
    }

    /// A target that samples, and crashes of the feed.
    pub fn sampled(world: &World) -> Self {
        let crash =
            |nth: u64| (world.millis(nth * 3_000, nth * 3_000 + 2_900), Fault::Crash(0, world.millis(50, 2_000)));
        let slow = (Duration::from_millis(900), Fault::Slow(Side::Target, Way::To, world.millis(200, 1_500)));
        let faults = [slow].into_iter().chain((1..9).map(crash)).collect();
        Self { inspect: Some(world.millis(1_000, 2_500)), faults, ..Self::steady(world) }
    }

    /// A target that refuses messages, and crashes of the feed.
    pub fn rejects(world: &World) -> Self {
        let what = if world.once_in(2) { Unstorable::Header } else { Unstorable::Large };
        let on_reject = if world.once_in(2) { OnReject::Skip } else { OnReject::DeadLetter };
        let crash =
            |nth: u64| (world.millis(nth * 20_000, nth * 20_000 + 9_000), Fault::Crash(0, world.millis(50, 2_000)));
        // All of it at once: the target notices the second one before it says what it has stored.
        let bursts = vec![(Duration::from_secs(1), 150)];
        Self {
            refuses: Some(Refuses { what, on_reject }),
            bursts,
            faults: (1..3).map(crash).collect(),
            ..Self::steady(world)
        }
    }

    /// A far cluster, and connections that break one by one with all that is on its way.
    pub fn cut(world: &World) -> Self {
        let by = world.millis(1_000, 2_000);
        // New connections are as slow.
        let far = (0..100).map(|nth| (Duration::from_millis(900 + nth * 500), Fault::Slow(Side::Target, Way::To, by)));
        let cut = |nth: u64| (world.millis(nth * 4_000, nth * 4_000 + 3_900), Fault::CutFed);
        let mut faults: Vec<_> = far.chain((1..13).map(cut)).collect();
        faults.sort_by_key(|(at, _)| *at);
        let refuses = Some(Refuses { what: Unstorable::Header, on_reject: OnReject::Skip });
        Self { nodes: NODES, faults, refuses, ..Self::steady(world) }
    }

    /// The feed comes back to a cluster while another server begins to lead its stream, and was never saved.
    pub fn elected(world: &World) -> Self {
        let begin = world.between(3_000, 9_000);
        let moves = (0..6).map(|nth| (Duration::from_millis(begin + nth * 500), Fault::MoveLeader));
        let crashes =
            (0..3).map(|nth| (world.millis(begin, begin + 3_000), Fault::Crash(0, world.millis(50, 900 + nth))));
        let mut faults: Vec<_> = moves.chain(crashes).collect();
        faults.sort_by_key(|(at, _)| *at);
        Self { is_mirror: false, nodes: NODES, faults, ..Self::steady(world) }
    }

    pub fn subjects() -> FeedSubjects {
        FeedSubjects::of("SITE", ID)
    }

    /// The configuration of the target stream.
    pub fn target(&self) -> Config {
        let is_large = self.refuses.is_some_and(|refuses| refuses.what == Unstorable::Large);
        let level = if self.asks == Asks::Old { 2 } else { 4 };
        Config { level, max_size: is_large.then_some(LARGEST), ..Config::DEFAULT }
    }

    /// Header and payload of a message of the source.
    pub fn content(&self, number: u64, is_recreated: bool) -> (Vec<u8>, Vec<u8>) {
        let mut header: &[u8] = match number % 4 {
            0 => b"",
            1 => b"NATS/1.0\r\nA: b\r\n\r\n",
            _ => b"NATS/1.0\r\nodd\r\nA:  c\r\nA: d\r\n\r\n",
        };
        let mut payload = format!("{number} {is_recreated}").into_bytes();
        let Some(refuses) = self.refuses.filter(|_| number % UNSTORABLE_EVERY == 7) else {
            return (header.to_vec(), payload);
        };
        match refuses.what {
            Unstorable::Header => header = b"NATS/1.0\r\nNats-Rollup: sub\r\n\r\n",
            // Every second one fits without another header.
            Unstorable::Large if number.is_multiple_of(2) => payload.resize(2 * LARGEST, b' '),
            Unstorable::Large => payload.resize(LARGEST - header.len(), b' '),
        }
        (header.to_vec(), payload)
    }

    /// Whether a message is never given to the target.
    pub fn is_excluded(&self, message: &Stored) -> bool {
        self.excludes && message.subject == "s.3"
    }

    /// Whether the target refuses a message.
    pub fn is_refused(&self, seq: u64, message: &Stored) -> bool {
        let header = match self.is_mirror {
            true => message.header.clone(),
            false => ingest::sourced(&message.header, seq),
        };
        ingest::is_unstorable(&self.target(), &header, &message.payload)
    }
}
