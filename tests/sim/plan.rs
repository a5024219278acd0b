//! What happens in one simulated run, drawn from its seed.

use rand::RngExt;
use tokio::time::Duration;

use super::{
    stream::Retention,
    world::{Host, World},
};

#[derive(Debug, Clone)]
pub struct Plan {
    /// Faults come within this time; then everything has to become right by itself.
    pub stormy: Duration,
    /// Whether the target takes fast-ingest batches.
    pub batched: bool,
    pub in_flight: usize,
    /// How long the target remembers message ids.
    pub window: Duration,
    /// Only these subjects are copied.
    pub filter: Option<String>,
    /// Older messages are skipped.
    pub max_age: Option<Duration>,
    /// So many messages are kept per subject: at the target, and at the source.
    pub keeps: Option<usize>,
    pub source_keeps: Option<usize>,
    /// Whether the target takes a time to live.
    pub lives: bool,
    /// Some messages are larger than the target takes: which side detects it.
    pub poison: Option<Poison>,
    /// Whether the source forgets what is acknowledged.
    pub retention: Retention,
    /// Whether its acks go with flow control, where there are any.
    pub flow_control: bool,
    /// What another replication of the site writes into the same target: when, and how many messages at once.
    pub neighbour: Vec<(Duration, u64)>,
    /// Whether the order is kept whatever the target refuses.
    pub strict: bool,
    /// Whether what the target can never store becomes a dead letter.
    pub dead_letters: bool,
    /// Of each subject no more is copied than one message in this time.
    pub inspect: Option<Duration>,
    /// Messages come from so many senders, each with a subject of its own.
    pub senders: i64,
    /// Some messages are so many times as large.
    pub large: usize,
    /// Bounds of the copy: messages and bytes a second.
    pub rates: Option<(u64, u64)>,
    /// Source messages: when, and how many at once.
    pub bursts: Vec<(Duration, u64)>,
    /// When each instance begins.
    pub begins: Vec<Duration>,
    /// So many milliseconds of the world each of them takes for the time to live of leases, by its own clock.
    pub ttls: Vec<u64>,
    /// What happens when.
    pub faults: Vec<(Duration, Fault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poison {
    /// The server, when it is sent.
    Refused,
    /// The writer, before it is sent.
    Noticed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the server.
    To,
    /// From the server.
    From,
}

/// Where a process ends that is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// After it was polled so often.
    Polls(u64),
    /// After it sent so many bytes to the target.
    Bytes(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// All connections of a side break.
    Cut(Side),
    /// A server does nothing for a while.
    Freeze(Side, Duration),
    /// A server is killed and comes back.
    Restart(Side, Duration),
    /// The stream of a side has no leader for a while.
    Leaderless(Side, Duration),
    /// Connections to the target break, and for a while its consumers live on a server that lacks the end of the stream.
    Behind(Duration),
    /// Of what goes to subscribers, the next but so many is lost, as for a slow consumer.
    Lose(Side, u64),
    /// The same comes twice.
    Twice(Side, u64),
    /// Connections that are open are dead in one direction without a sign; new ones are not.
    HalfOpen(Side, Way),
    /// Bytes of the connections that are open take so much longer in one direction.
    Slow(Side, Way, Duration),
    /// A copying process is killed, wherever it stands, and starts again.
    Crash(usize, Duration),
    /// The same, at an exact step.
    CrashAt(usize, Step, Duration),
    /// A copying process is stopped and continues: its timers jump.
    Stop(usize, Duration),
    /// A copying process is asked to end, and starts again.
    Leave(usize, Duration),
    /// An instance cannot reach the buckets for a while, or only its watches stall.
    CutOff(usize, Duration),
    Deaf(usize, Duration),
    /// An instance alone cannot reach one of the servers.
    Apart(usize, Side, Duration),
    /// An operator asks who copies to hand over.
    StepDown,
    /// Somebody removes the session of an instance, whose watches stall for a while.
    Evict(usize, Duration),
    /// The source's consumers of now deliver nothing more, though they give signs of life.
    Mute,
    /// The bucket loses answers, and writes arrive late.
    Trouble(Duration),
    /// Wall clocks are set, forward or back: see [`Fault::hosts`].
    Clock {
        by: Duration,
        back: bool,
    },
    /// The replication is paused and resumed.
    Pause(Duration),
    /// The target is full for a while.
    Full(Duration),
    /// Of the messages that come to the target, the next but so many is refused, though it could be stored.
    Refuse(u64),
    /// The target stream begins or ceases to take fast-ingest batches, while copying processes are killed.
    Batches,
    /// Another writer writes this many messages into the target.
    Foreign(u64),
    /// The target restarts without its last messages.
    TargetForgets(u64),
    /// The target stream is deleted.
    TargetDeleted,
    /// The source restarts without its last messages.
    SourceForgets(u64),
    /// The source stream loses its last messages under its consumers, which stay: drawn by no plan, since a stream that grows
    /// again before it is checked gives no sign of it.
    SourceShrinks(u64),
    /// The source stream is deleted and made again.
    SourceAnew,
    /// The source removes this many of its oldest messages.
    Purge(u64),
    /// The bucket is put back to what it held a while ago.
    PutBack,
    /// The lease is put back to what it was a while ago.
    LeasePutBack,
    /// The position record is deleted.
    RecordLost,
    /// The bucket of leases, or else that of positions, is deleted and recreated after a while, with what it held where
    /// an instance knows it.
    BucketGone {
        leases: bool,
        time: Duration,
        known: bool,
    },
    /// The replication is paused and its position moved by so many sequences.
    Move {
        by: u64,
        back: bool,
    },
}

/// What all instances say that their leases live, in milliseconds.
pub const TTL_MS: u64 = 3_000;

impl Fault {
    /// Whose clocks are set.
    pub fn hosts(self) -> &'static [Host] {
        const ONE: [[Host; 1]; 3] = [[Host::Service], [Host::Source], [Host::Target]];
        match self {
            Self::Clock { by, .. } => match by.as_millis() % 4 {
                3 => &[Host::Service, Host::Source, Host::Target],
                one => &ONE[one as usize],
            },
            _ => &[],
        }
    }

    /// Whether the source's clock is set back.
    pub fn sets_source_back(self) -> bool {
        matches!(self, Self::Clock { back: true, .. }) && self.hosts().contains(&Host::Source)
    }

    /// Whether it takes messages or positions away, or sets the clock that sampling goes by.
    pub fn changes_what_is_there(self) -> bool {
        let moved = matches!(self, Self::Purge(_) | Self::PutBack | Self::RecordLost | Self::Move { .. });
        moved || self.target_loses() || self.source_changes() || self.hosts().contains(&Host::Source)
    }

    /// Whether the target loses what it had stored.
    pub fn target_loses(self) -> bool {
        matches!(self, Self::TargetForgets(_) | Self::TargetDeleted)
    }

    /// Whether the source becomes another stream.
    pub fn source_changes(self) -> bool {
        matches!(self, Self::SourceForgets(_) | Self::SourceShrinks(_) | Self::SourceAnew)
    }
}

impl Plan {
    pub fn draw(world: &World) -> Self {
        let stormy = if world.once_in(8) { 200_000 } else { 30_000 };
        let instances = [1, 1, 2, 3][world.between(0, 3) as usize];
        let mut bursts: Vec<_> =
            (0..world.between(1, 5)).map(|_| (world.millis(0, stormy), world.between(1, 150))).collect();
        // Messages all the time: whoever takes over has something to do.
        if instances > 1 && world.once_in(2) {
            bursts.extend((0..60).map(|_| (world.millis(0, stormy.min(40_000)), world.between(1, 12))));
        }
        bursts.sort_unstable();
        // Most faults come while there is something to copy.
        let at = || {
            if world.once_in(3) {
                return world.millis(0, stormy);
            }
            let burst = world.between(0, bursts.len() as u64 - 1) as usize;
            bursts[burst].0 + world.millis(0, 1_500)
        };
        let begins = (0..instances).map(|which| if which == 0 { Duration::ZERO } else { at() }).collect();
        // By up to 3 % their clocks may differ and leases still keep two from copying at once. Rarely one is so slow that
        // only the fence below the leases does.
        let wild = (instances > 1 && world.once_in(6)).then(|| world.between(0, instances as u64 - 1));
        let ttls = (0..instances as u64).map(|which| match wild == Some(which) {
            true => TTL_MS * world.between(2, 4),
            false => TTL_MS + world.between(0, 180) - 90,
        });
        let ttls = ttls.collect();
        let mut faults = Vec::new();
        for _ in 0..world.between(0, 8) {
            faults.push((at(), Self::ordinary(world, instances)));
        }
        // Silent for the others and not for itself: only the fence is between it and its successor.
        if let Some(wild) = wild.map(|which| which as usize) {
            for _ in 0..world.between(0, 3) {
                let time = world.millis(TTL_MS, 4 * TTL_MS);
                let fault = if world.once_in(2) { Fault::Stop(wild, time) } else { Fault::CutOff(wild, time) };
                faults.push((at(), fault));
            }
        }
        // Copies change their transport, again and again and with messages in flight.
        if world.once_in(6) {
            for _ in 0..world.between(1, 4) {
                let at = at();
                faults.push((at, Fault::Batches));
                for _ in 0..world.between(0, 3) {
                    let which = world.between(0, instances as u64 - 1) as usize;
                    let at = at + world.millis(0, 1_500);
                    faults
                        .push((at, Fault::CrashAt(which, Step::Bytes(world.between(1, 5_000)), world.millis(1, 500))));
                }
                if world.once_in(2) {
                    faults.push((at, Fault::Slow(Side::Target, Way::To, world.millis(1, 4_000))));
                }
            }
        }
        // At most one fault that loses data or changes what the streams are.
        if world.once_in(2) {
            let count = world.between(1, 40);
            let fault = match world.between(1, 10) {
                1 => Fault::Foreign(count),
                2 => Fault::TargetForgets(count),
                3 => Fault::TargetDeleted,
                4 => Fault::SourceForgets(count),
                5 => Fault::SourceAnew,
                6 => Fault::Purge(5 * count),
                7 => Fault::PutBack,
                8 => Fault::RecordLost,
                9 => Fault::LeasePutBack,
                _ => Fault::Move { by: count, back: world.once_in(2) },
            };
            let at = at();
            faults.push((at, fault));
            // Each new run searches for what the source lost and the target still has.
            if matches!(fault, Fault::SourceForgets(_)) && world.once_in(2) {
                faults.extend((1..=4).map(|cut| (at + Duration::from_millis(1_500 * cut), Fault::Cut(Side::Target))));
            }
            // What is removed while nobody reads is lost.
            if matches!(fault, Fault::Purge(_)) {
                let before = at.saturating_sub(Duration::from_millis(1_500));
                faults.extend((0..instances).map(|which| (before, Fault::Crash(which, Duration::from_secs(3)))));
            }
        }
        faults.sort_by_key(|(at, _)| *at);
        let keeps = world.once_in(8).then(|| world.between(1, 3) as usize);
        let batched = world.once_in(2);
        let in_flight = world.between(1, 64) as usize;
        let plan = Self {
            stormy: Duration::from_millis(stormy),
            batched,
            in_flight,
            window: Duration::from_secs([120, 120, 20, 3][world.between(0, 3) as usize]),
            filter: world.once_in(6).then(|| ["s.1", "s.*", "s.>", "s.none"][world.between(0, 3) as usize].to_owned()),
            max_age: world.once_in(8).then(|| world.millis(2_000, 20_000)),
            keeps,
            // Messages that an older holder had in flight may be stored after what a newer one read later, and the source may not have
            // them any more: pipelined, no id stops that.
            source_keeps: keeps.filter(|_| instances == 1 && world.once_in(2)),
            poison: match world.between(1, 12) {
                1 => Some(Poison::Refused),
                2 => Some(Poison::Noticed),
                _ => None,
            },
            lives: in_flight.is_multiple_of(2),
            retention: Retention::Limits,
            flow_control: false,
            neighbour: Vec::new(),
            strict: false,
            dead_letters: false,
            inspect: None,
            senders: 3,
            large: 1,
            rates: None,
            bursts,
            begins,
            ttls,
            faults,
        };
        plan.widen(world)
    }

    /// The source shrinks under a consumer that survives, and grows again later.
    pub fn shrinking(world: &World) -> Self {
        let seconds = Duration::from_secs;
        Self {
            stormy: seconds(70),
            filter: None,
            max_age: None,
            keeps: None,
            source_keeps: None,
            poison: None,
            retention: Retention::Limits,
            neighbour: Vec::new(),
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: vec![(seconds(1), 100), (seconds(60), 100)],
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: vec![(seconds(10), Fault::SourceShrinks(40))],
            ..Self::draw(world)
        }
    }

    /// The source's clock is set back between messages of a subject of which the target keeps the newest, and the process is
    /// killed before the position is saved.
    pub fn set_back(world: &World) -> Self {
        let at = |from: u64, to: u64| Duration::from_millis(world.between(from, to));
        // Of the source, see `Fault::hosts`.
        let by = Duration::from_millis(4 * world.between(15_000, 1_500_000) + 1);
        Self {
            batched: false,
            in_flight: 16,
            filter: None,
            max_age: None,
            keeps: Some(1),
            source_keeps: None,
            poison: None,
            retention: Retention::Limits,
            neighbour: Vec::new(),
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: vec![(at(900, 1_000), 40), (at(4_000, 4_050), 40), (at(4_200, 4_250), 40)],
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: vec![
                (at(3_900, 4_300), Fault::Refuse(1)),
                (at(4_060, 4_190), Fault::Clock { by, back: true }),
                (at(4_250, 4_900), Fault::Crash(0, at(50, 400))),
            ],
            ..Self::draw(world)
        }
    }

    /// The source's clock is set back, and messages of others from before that stay in the work queue; then the process is
    /// killed.
    pub fn set_back_queue(world: &World) -> Self {
        let at = |from: u64, to: u64| Duration::from_millis(world.between(from, to));
        Self {
            keeps: None,
            filter: Some("s.1".to_owned()),
            senders: 3,
            retention: Retention::WorkQueue,
            bursts: vec![(at(900, 1_000), 40), (at(4_000, 4_050), 40), (at(4_200, 4_250), 40)],
            faults: Self::set_back(world)
                .faults
                .into_iter()
                .filter(|(_, fault)| !matches!(fault, Fault::Refuse(_)))
                .chain([(at(7_000, 8_000), Fault::Crash(0, at(50, 400)))])
                .collect(),
            ..Self::set_back(world)
        }
    }

    /// With sampling, the bucket is in trouble between a write of the records of senders and the save of the position, and the
    /// process is killed.
    pub fn unsaved_records(world: &World) -> Self {
        let at = |from: u64, to: u64| Duration::from_millis(world.between(from, to));
        let begin = world.between(4_800, 5_200);
        Self {
            batched: false,
            filter: None,
            max_age: None,
            keeps: None,
            source_keeps: None,
            poison: None,
            retention: Retention::Limits,
            neighbour: Vec::new(),
            dead_letters: false,
            inspect: Some(at(1_500, 2_500)),
            senders: 3,
            large: 1,
            rates: None,
            bursts: (0..30).map(|nth| (Duration::from_millis(1_000 + nth * 200), 6)).collect(),
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: vec![
                (Duration::from_millis(begin), Fault::Trouble(at(2_000, 4_000))),
                (at(begin + 50, begin + 1_500), Fault::Crash(0, at(50, 400))),
            ],
            ..Self::draw(world)
        }
    }

    /// A source loses its end while the process is down. What it still has was copied, and was replaced by copies of what it
    /// lost: only their ids show the target that it had them.
    pub fn replaced(world: &World) -> Self {
        let at = |from: u64, to: u64| Duration::from_millis(world.between(from, to));
        let down = at(4_000, 4_400);
        let neighbours = if world.once_in(2) { 24 } else { 0 };
        // An exclusive target gets ids only while it takes no batches.
        let batched = neighbours > 0;
        let batches = (!batched).then_some((down, Fault::Batches));
        let faults = [(down, Fault::Crash(0, at(3_000, 4_000))), (down, Fault::SourceForgets(world.between(20, 80)))];
        Self {
            batched,
            window: Duration::from_secs(120),
            filter: None,
            max_age: None,
            keeps: Some(2),
            source_keeps: None,
            poison: None,
            retention: if world.once_in(2) { Retention::Interest } else { Retention::Limits },
            flow_control: true,
            neighbour: (0..neighbours).map(|nth| (at(nth * 500, nth * 500 + 400), 3)).collect(),
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: vec![(at(900, 1_100), 120), (at(2_800, 3_000), 140), (at(4_450, 4_600), 60)],
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: faults.into_iter().chain(batches).collect(),
            ..Self::draw(world)
        }
    }

    /// A message that was sent with its id is refused, and later ones are stored; then the target takes batches, whose chain
    /// begins with it, and the process is killed again and again.
    pub fn holes(world: &World) -> Self {
        let at = |from: u64, to: u64| Duration::from_millis(world.between(from, to));
        let kill = |nth: u64| (at(3_300 + nth * 700, 3_900 + nth * 700), Fault::Crash(0, at(50, 400)));
        let first = world.once_in(2).then(|| (at(900, 1_000), 20));
        Self {
            batched: true,
            in_flight: 10,
            window: Duration::from_millis(500),
            filter: None,
            max_age: None,
            keeps: None,
            source_keeps: None,
            poison: None,
            retention: Retention::Limits,
            neighbour: Vec::new(),
            strict: false,
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: first.into_iter().chain([(at(3_000, 3_050), world.between(2, 10))]).collect(),
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: [
                (at(1_500, 1_600), Fault::Batches),
                (at(1_610, 1_700), Fault::Crash(0, at(50, 200))),
                (at(2_900, 3_040), Fault::Refuse(0)),
                (at(3_060, 3_200), Fault::Batches),
            ]
            .into_iter()
            .chain((0..5).map(kill))
            .collect(),
            ..Self::draw(world)
        }
    }

    /// A shared target loses its end in the middle of a batch, whose messages it confirms without their sequences.
    pub fn forgetting(world: &World) -> Self {
        let lost = Duration::from_millis(3_000) + world.millis(0, 600);
        // Where a missing copy may have been replaced, the target's end alone shows the loss: others must not move it.
        let keeps = world.once_in(2).then_some(1_000);
        let before = Duration::from_secs(if keeps.is_some() { 1 } else { 8 });
        let neighbour = (0..20).map(|at| Duration::from_millis(at * 400)).filter(|at| *at < before);
        Self {
            batched: true,
            in_flight: 14,
            filter: None,
            max_age: None,
            keeps,
            source_keeps: None,
            poison: None,
            retention: Retention::Limits,
            neighbour: neighbour.map(|at| (at, 3)).collect(),
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: vec![(Duration::from_secs(1), 20), (Duration::from_secs(3), 100)],
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: vec![(lost, Fault::TargetForgets(world.between(10, 60)))],
            ..Self::draw(world)
        }
    }

    /// A reader with explicit acks is killed again and again, while much is pending and its pull is open.
    pub fn killed(world: &World) -> Self {
        let kill = |at: u64| {
            let at = Duration::from_millis(at * 1_000 + world.between(0, 900));
            let away = Duration::from_millis(world.between(5, 400));
            (at, Fault::CrashAt(0, Step::Polls(world.between(1, 200)), away))
        };
        Self {
            filter: None,
            max_age: None,
            keeps: None,
            source_keeps: None,
            poison: None,
            retention: Retention::WorkQueue,
            flow_control: false,
            neighbour: Vec::new(),
            dead_letters: false,
            inspect: None,
            large: 1,
            rates: None,
            bursts: (1..25).map(|at| (Duration::from_secs(at), world.between(20, 120))).collect(),
            begins: vec![Duration::ZERO],
            ttls: vec![TTL_MS],
            faults: (2..25).map(kill).collect(),
            ..Self::draw(world)
        }
    }

    /// What else may be of another kind; drawn from another sequence, so that plans without it stay as they are.
    fn widen(mut self, world: &World) -> Self {
        let mut random = world.aside(16);
        if random.random_range(0..5) == 0 {
            self.retention = if random.random() { Retention::WorkQueue } else { Retention::Interest };
            self.flow_control = random.random();
            self.source_keeps = None;
        }
        self.widen_copy(world);
        // Where copies may be gone or wanted again, nobody can say what had to be copied.
        let mut random = world.aside(18);
        if random.random_range(0..8) == 0 {
            self.inspect = Some(Duration::from_millis(random.random_range(2_000..10_000)));
            (self.max_age, self.keeps, self.source_keeps, self.poison) = (None, None, None, None);
            self.faults.retain(|(_, fault)| !fault.changes_what_is_there());
            // Of many senders, many messages are in flight that are to be copied.
            self.senders = if random.random() { 40 } else { 3 };
        }
        let mut random = world.aside(20);
        let loses = |fault: Fault| {
            let record = matches!(fault, Fault::PutBack | Fault::LeasePutBack | Fault::RecordLost | Fault::Move { .. });
            record
                || fault.source_changes()
                || fault.target_loses()
                || matches!(fault, Fault::Purge(_) | Fault::Foreign(_))
        };
        // The end of a source that forgets is lost, and messages come before anybody reads again.
        let quiet = !self.has(loses) && self.inspect.is_none();
        // Nothing shows which messages of an interest stream are later than others once its clock was set back.
        let undecidable = self.retention == Retention::Interest && self.has(Fault::sets_source_back);
        if quiet && !undecidable && self.is_consumed() && world.aside(21).random() {
            let burst = random.random_range(0..self.bursts.len());
            let at = self.bursts[burst].0 + Duration::from_millis(random.random_range(0..3_000));
            let away = Duration::from_millis(random.random_range(500..6_000));
            let away = (0..self.begins.len()).map(|which| (at, Fault::Crash(which, away)));
            self.faults.extend(away);
            self.faults.push((at, Fault::SourceForgets(random.random_range(1..100))));
            self.bursts.push((at + Duration::from_millis(random.random_range(0..1_000)), random.random_range(1..150)));
            self.bursts.sort_unstable();
        }
        if random.random_range(0..8) == 0 && !self.has(loses) && self.inspect.is_none() {
            let at = Duration::from_millis(random.random_range(0..self.stormy.as_millis() as u64));
            let (leases, known) = (random.random(), random.random());
            let time = Duration::from_millis(random.random_range(1_000..5_000));
            self.faults.push((at, Fault::BucketGone { leases, time, known }));
        }
        let mut random = world.aside(19);
        if random.random_range(0..4) == 0 {
            for _ in 0..random.random_range(1..6) {
                let burst = random.random_range(0..self.bursts.len());
                self.faults.push((self.bursts[burst].0, Fault::Refuse(random.random_range(0..60))));
            }
        }
        self.faults.sort_by_key(|(at, _)| *at);
        self
    }

    /// What the document may ask for, and who else writes.
    fn widen_copy(&mut self, world: &World) {
        let mut random = world.aside(17);
        if random.random_range(0..8) == 0 {
            let stormy = self.stormy.as_millis() as u64;
            let mut burst = || (Duration::from_millis(random.random_range(0..stormy)), random.random_range(1..8));
            self.neighbour = (0..40).map(|_| burst()).collect();
            self.neighbour.sort_unstable();
        }
        self.strict = random.random_range(0..4) == 0;
        // What is poison has to be larger than anything else.
        if self.poison.is_none() && random.random_range(0..12) == 0 {
            self.large = random.random_range(2..300);
        }
        if random.random_range(0..12) == 0 {
            self.rates = Some((random.random_range(20..500), random.random_range(20_000..200_000)));
        }
        if random.random_range(0..12) == 0 {
            (self.dead_letters, self.large) = (true, 1);
            self.poison = self.poison.or(Some([Poison::Refused, Poison::Noticed][random.random_range(0..2)]));
        }
    }

    /// Whether the source forgets what is acknowledged.
    pub fn is_consumed(&self) -> bool {
        self.retention != Retention::Limits
    }

    fn ordinary(world: &World, processes: usize) -> Fault {
        let side = if world.once_in(2) { Side::Source } else { Side::Target };
        let way = if world.once_in(2) { Way::To } else { Way::From };
        let who = world.between(1, processes as u64) as usize - 1;
        let short = world.millis(1, 3_000);
        let long = world.millis(1, 20_000);
        let time = if world.once_in(3) { long } else { short };
        match world.between(1, 30) {
            1 => Fault::Cut(side),
            2 => Fault::Freeze(side, time),
            3 => Fault::Restart(side, short),
            4 => Fault::Leaderless(side, short),
            5 => Fault::Lose(side, world.between(0, 60)),
            6 => Fault::Twice(side, world.between(0, 60)),
            7 => Fault::HalfOpen(side, way),
            8 | 9 => Fault::Slow(side, way, world.millis(1, 8_000)),
            10 | 11 => Fault::Crash(who, short),
            12 | 13 => Fault::CrashAt(who, Step::Polls(world.between(1, 400)), short),
            14 | 15 => Fault::CrashAt(who, Step::Bytes(world.between(1, 20_000)), short),
            16 => Fault::Stop(who, time),
            17 => Fault::Clock { by: world.millis(1, 3_600_000), back: world.once_in(2) },
            18 => Fault::Pause(short),
            19 => Fault::Full(time),
            20 => Fault::Mute,
            21 | 22 => Fault::Leave(who, short),
            23 | 24 => Fault::CutOff(who, time),
            25 => Fault::Deaf(who, time),
            26 => Fault::Apart(who, side, time),
            27 => Fault::StepDown,
            28 if world.once_in(2) => Fault::Evict(who, short),
            29 => Fault::Behind(short),
            _ => Fault::Trouble(long),
        }
    }

    pub fn has(&self, wanted: impl Fn(Fault) -> bool) -> bool {
        self.faults.iter().any(|(_, fault)| wanted(*fault))
    }

    /// Whether a process may not know what it saved: it goes by what it knows.
    pub fn unsure(&self) -> bool {
        self.has(|fault| matches!(fault, Fault::Trouble(_) | Fault::CutOff(..) | Fault::BucketGone { .. }))
    }

    /// Whether the records of senders cannot be written for longer than acks at the source wait.
    pub fn records_fail(&self) -> bool {
        self.unsure() || self.has(|fault| matches!(fault, Fault::Stop(..)))
    }

    /// Whether the source may forget messages before the records of their senders are written.
    pub fn forgets_senders(&self) -> bool {
        self.inspect.is_some() && self.is_consumed() && self.records_fail()
    }

    /// Whether leases alone keep an older holder from doing anything once a newer one has: clocks do not differ by more
    /// than they may, no live session is removed, and no lease is written by hand.
    pub fn is_lawful(&self) -> bool {
        let drifts = self.ttls.iter().any(|ttl| ttl.abs_diff(TTL_MS) > TTL_MS / 10);
        let by_hand = |fault| matches!(fault, Fault::Evict(..) | Fault::LeasePutBack | Fault::BucketGone { .. });
        !drifts && !self.has(by_hand)
    }

    /// How late an answer of the source about its time may be: who asked knows no more than that it is not earlier.
    pub fn kept_back(&self) -> Duration {
        let parts = self.faults.iter().map(|(_, fault)| match fault {
            Fault::Slow(Side::Source, _, time) | Fault::Freeze(Side::Source, time) | Fault::Stop(_, time) => *time,
            // What was sent into nothing counts as unanswered only then, while anything else arrives.
            Fault::HalfOpen(Side::Source, _) => Duration::from_secs(30),
            _ => Duration::ZERO,
        });
        Duration::from_secs(1) + parts.sum::<Duration>()
    }

    /// For how long after a fault a record may still describe the state before it, until the messages of the fault are known.
    /// Connections break with the fault, a last save may take 3 s and arrive after 6 s more, and a process that is
    /// stopped meanwhile saves later.
    pub fn grace(&self) -> Duration {
        let stops = self.faults.iter().map(|(_, fault)| match fault {
            Fault::Stop(_, time) => *time,
            _ => Duration::ZERO,
        });
        Duration::from_secs(15) + stops.sum::<Duration>()
    }
}
