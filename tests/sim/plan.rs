//! What happens in one simulated run, drawn from its seed.

use tokio::time::Duration;

use super::world::World;

/// Faults come within this time; then everything has to become right by itself.
pub const STORMY: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub struct Plan {
    /// Whether the target takes fast-ingest batches.
    pub batched: bool,
    pub in_flight: usize,
    /// Source messages: when, and how many at once.
    pub bursts: Vec<(Duration, u64)>,
    /// When a second process begins to copy the same, if one does.
    pub second: Option<Duration>,
    /// What happens when.
    pub faults: Vec<(Duration, Fault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
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
    /// The copying process is killed, wherever it stands, and starts again.
    Crash(Duration),
    /// The source's consumers of now deliver nothing more, though they give signs of life.
    Mute,
    /// The bucket loses answers, and writes arrive late.
    Trouble(Duration),
    /// The servers' wall clock is set, forward or back.
    Clock { by: Duration, back: bool },
    /// Somebody else writes so many messages into the target.
    Foreign(u64),
    /// The target restarts without its last messages.
    TargetForgets(u64),
    /// The target stream is deleted.
    TargetDeleted,
    /// The source restarts without its last messages.
    SourceForgets(u64),
    /// The source stream is deleted and made again.
    SourceAnew,
    /// The source removes this many of its oldest messages.
    Purge(u64),
    /// The bucket is put back to what it held a while ago.
    PutBack,
}

impl Plan {
    pub fn draw(world: &World) -> Self {
        let batched = world.once_in(2);
        let stormy = STORMY.as_millis() as u64;
        let mut bursts: Vec<_> =
            (0..world.between(1, 5)).map(|_| (world.millis(0, stormy), world.between(1, 150))).collect();
        bursts.sort_unstable();
        // Most faults come while there is something to copy.
        let at = || {
            if world.once_in(3) {
                return world.millis(0, stormy);
            }
            let burst = world.between(0, bursts.len() as u64 - 1) as usize;
            bursts[burst].0 + world.millis(0, 1_500)
        };
        let mut faults = Vec::new();
        for _ in 0..world.between(0, 8) {
            faults.push((at(), Self::ordinary(world)));
        }
        // At most one fault that loses data or changes what the streams are.
        if world.once_in(2) {
            let count = world.between(1, 40);
            let fault = match world.between(1, 7) {
                1 => Fault::Foreign(count),
                2 => Fault::TargetForgets(count),
                3 => Fault::TargetDeleted,
                4 => Fault::SourceForgets(count),
                5 => Fault::SourceAnew,
                6 => Fault::Purge(count),
                _ => Fault::PutBack,
            };
            faults.push((at(), fault));
        }
        faults.sort_by_key(|(at, _)| *at);
        let second = world.once_in(4).then(at);
        Self { batched, in_flight: world.between(1, 64) as usize, bursts, second, faults }
    }

    fn ordinary(world: &World) -> Fault {
        let side = if world.once_in(2) { Side::Source } else { Side::Target };
        let short = world.millis(1, 3_000);
        let long = world.millis(1, 20_000);
        match world.between(1, 10) {
            1 => Fault::Cut(side),
            2 => Fault::Freeze(side, if world.once_in(3) { long } else { short }),
            3 => Fault::Restart(side, short),
            4 => Fault::Leaderless(side, short),
            5..=7 => Fault::Crash(short),
            8 => Fault::Clock { by: world.millis(1, 3_600_000), back: world.once_in(2) },
            9 => Fault::Mute,
            _ => Fault::Trouble(long),
        }
    }

    pub fn has(&self, wanted: impl Fn(Fault) -> bool) -> bool {
        self.faults.iter().any(|(_, fault)| wanted(*fault))
    }
}
