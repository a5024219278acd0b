//! What happens in one run, drawn from its seed alone: a seed gives the same plan on every machine. When exactly a step
//! comes is up to the processes: each lane begins its next step when the one before is over and healed.

use std::fmt;
use std::time::Duration;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::harness::{BOTH, Direction, Newcomers};

/// How many there are of instances, and of servers in each cluster.
pub const THREE: usize = 3;

/// What a server needs to be whole again, roughly; an instance needs less. For the length of a plan only.
const HEALING: Duration = Duration::from_secs(4);

/// Three lanes that run side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub seed: u64,
    pub instances: Vec<Step<InstanceFault>>,
    /// Of the servers of the source, which hold the buckets too.
    pub source: Vec<Step<ServerFault>>,
    pub target: Vec<Step<ServerFault>>,
}

/// One fault and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step<F> {
    /// Calm before it.
    pub pause: Duration,
    pub fault: F,
    pub lasts: Duration,
}

/// Whose connections: each instance has a path of its own for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Control,
    Source,
    Target,
}

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Connections end and nobody gets in.
    Cut,
    /// Connections end; new ones work.
    Dropped,
    /// Nothing moves, and everything continues afterwards.
    Stalled,
    /// Bytes in these directions are lost without a sign to the sender.
    HalfOpen(&'static [Direction], Newcomers),
    /// So much later.
    Slow(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceFault {
    /// kill -9, and a new start at the end.
    Kill(usize),
    /// SIGTERM, and a new start at the end.
    Stop(usize),
    /// SIGSTOP and SIGCONT.
    Freeze(usize),
    /// A replication, by its place in the list, is to be handed over.
    StepDown(usize),
    Network(usize, Way, Trouble),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerFault {
    /// kill -9, and a new start at the end.
    Kill(usize),
    /// SIGTERM, and a new start at the end.
    Stop(usize),
    /// SIGSTOP and SIGCONT.
    Freeze(usize),
    /// Killed, its storage is gone, and it starts empty under the same name.
    Lose(usize),
    /// All of the cluster are killed at one moment.
    KillAll,
    /// The leader of a stream, by its place in the list, hands over.
    StepDown(usize),
    /// On the way of all instances to this server.
    Network(usize, Trouble),
}

impl Plan {
    /// A storm of about this length, without the time to heal at its end.
    pub fn draw(seed: u64, length: Duration) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Self {
            seed,
            instances: lane(&mut random, length, 8, Duration::from_secs(1), instance_fault),
            source: lane(&mut random, length, 8, HEALING, server_fault),
            target: lane(&mut random, length, 8, HEALING, server_fault),
        }
    }

    /// Whether a server of the source starts empty.
    pub fn source_loses_a_disk(&self) -> bool {
        self.source.iter().any(|step| matches!(step.fault, ServerFault::Lose(_)))
    }

    /// Faults in all lanes.
    pub fn faults(&self) -> usize {
        self.instances.len() + self.source.len() + self.target.len()
    }
}

/// Each of the kinds occurs before one is repeated, in a new order every time.
fn lane<F>(
    random: &mut StdRng,
    length: Duration,
    kinds: usize,
    healing: Duration,
    fault: impl Fn(usize, &mut StdRng) -> F,
) -> Vec<Step<F>> {
    let (mut steps, mut bag, mut taken) = (Vec::new(), Vec::new(), Duration::ZERO);
    while taken < length {
        if bag.is_empty() {
            bag.extend(0..kinds);
            bag.shuffle(random);
        }
        let Some(kind) = bag.pop() else { break };
        let pause = millis(random, 200, 1_500);
        let fault = fault(kind, random);
        // Shorter and longer than a lease lasts.
        let lasts = millis(random, 300, 5_000);
        taken += pause + lasts + healing;
        steps.push(Step { pause, fault, lasts });
    }
    steps
}

fn instance_fault(kind: usize, random: &mut StdRng) -> InstanceFault {
    let which = random.random_range(0..THREE);
    match kind {
        0 | 1 => InstanceFault::Kill(which),
        2 => InstanceFault::Stop(which),
        3 => InstanceFault::Freeze(which),
        4 => InstanceFault::StepDown(random.random_range(0..1_000)),
        5 => InstanceFault::Network(which, Way::Control, trouble(random)),
        6 => InstanceFault::Network(which, Way::Source, trouble(random)),
        _ => InstanceFault::Network(which, Way::Target, trouble(random)),
    }
}

fn server_fault(kind: usize, random: &mut StdRng) -> ServerFault {
    let which = random.random_range(0..THREE);
    match kind {
        0 | 1 => ServerFault::Kill(which),
        2 => ServerFault::Stop(which),
        3 => ServerFault::Freeze(which),
        4 => ServerFault::Lose(which),
        5 => ServerFault::KillAll,
        6 => ServerFault::StepDown(random.random_range(0..1_000)),
        _ => ServerFault::Network(which, trouble(random)),
    }
}

fn trouble(random: &mut StdRng) -> Trouble {
    let directions = [BOTH, &[Direction::ToServer], &[Direction::ToClient]][random.random_range(0..3)];
    match random.random_range(0..6) {
        0 => Trouble::Cut,
        1 => Trouble::Dropped,
        2 => Trouble::Stalled,
        3 => Trouble::HalfOpen(directions, Newcomers::Work),
        4 => Trouble::HalfOpen(directions, Newcomers::Hang),
        _ => Trouble::Slow(millis(random, 20, 300)),
    }
}

fn millis(random: &mut StdRng, from: u64, to: u64) -> Duration {
    Duration::from_millis(random.random_range(from..to))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}, {} faults", self.seed, self.faults())?;
        self.instances.iter().try_for_each(|step| write!(f, "\n  instances {step:?}"))?;
        self.source.iter().try_for_each(|step| write!(f, "\n  source {step:?}"))?;
        self.target.iter().try_for_each(|step| write!(f, "\n  target {step:?}"))
    }
}

#[test]
fn a_seed_gives_the_same_plan_and_another_one_another() {
    let length = Duration::from_secs(60);
    assert_eq!(Plan::draw(1, length), Plan::draw(1, length));
    assert_ne!(Plan::draw(1, length).to_string(), Plan::draw(2, length).to_string());
}

#[test]
fn a_long_plan_holds_every_kind_of_fault_in_each_lane() {
    for seed in 0..50 {
        let plan = Plan::draw(seed, Duration::from_secs(120));
        let instances = plan.instances.iter();
        assert!(instances.clone().any(|step| matches!(step.fault, InstanceFault::Kill(_))));
        assert!(instances.clone().any(|step| matches!(step.fault, InstanceFault::Network(_, Way::Control, _))));
        for lane in [&plan.source, &plan.target] {
            assert!(lane.iter().any(|step| matches!(step.fault, ServerFault::Lose(_))), "{plan}");
            assert!(lane.iter().any(|step| step.fault == ServerFault::KillAll), "{plan}");
        }
    }
}
