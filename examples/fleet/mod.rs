//! The fleet demo, from the first report to the comparison; a test runs it in small.

mod checks;
mod nodes;
mod sampling_model;
mod site;

#[path = "../demo/inventory.rs"]
mod inventory;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tokio::time::{MissedTickBehavior, interval};

use crate::harness::{LIMIT, Raw, Role, Server};
use checks::Checks;
use nodes::{Habit, Node};
use site::FleetSite;

pub(super) const STREAM: &str = "CHORIA_REGISTRATION";
pub(super) const ADVISORIES: &str = "CHORIA_REGISTRATION_ADVISORIES";
/// Difference in bytes at which a report is copied at once.
const SIZE_TRIGGER: usize = 512;
const SITES: [&str; 2] = ["EAST", "WEST"];
/// No part of the demo waits longer than this for the advisories that end it.
const PART_LIMIT: Duration = LIMIT.saturating_mul(6);

/// How large and how fast the fleet is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Nodes of both sites together.
    pub(super) nodes: usize,
    /// Time between two reports of a node.
    pub(super) every: Duration,
    /// `warn_duration` and `inspect_duration` of the replications.
    pub(super) warn: Duration,
    pub(super) inspect: Duration,
}

/// Two sites and the centre, while they run.
pub(super) struct Fleet {
    plan: Plan,
    pub(super) centre: Server,
    sites: Vec<FleetSite>,
}

/// Runs the demo. An error if any two numbers disagree; else the fleet, which still runs.
pub(super) async fn run(plan: Plan) -> Result<Fleet> {
    ensure!(plan.nodes >= 20, "a fleet has at least 20 nodes");
    let mut fleet = Fleet::start(plan).await?;
    fleet.live().await?;
    title("What was seen where");
    fleet.settle().await?;
    fleet.compare().await?;
    Ok(fleet)
}

impl Fleet {
    async fn start(plan: Plan) -> Result<Self> {
        title("Two sites and a centre");
        let centre = Server::builder(Role::Target).name("centre").start().await?;
        println!("  nats-server {} `centre` at {}", centre.version(), centre.url());
        let mut sites = Vec::new();
        for (index, name) in SITES.into_iter().enumerate() {
            let nodes = (1..=plan.nodes).filter(|number| number % SITES.len() == index);
            let nodes = nodes.map(|number| Node::new(number, name)).collect();
            let site = FleetSite::start(name, nodes, &centre, &plan).await?;
            println!("  {name}: nats-server at {}, a service with an adapter and two replications", site.url());
            sites.push(site);
        }
        Ok(Self { plan, centre, sites })
    }

    /// Nodes report, go silent, change and return; each part lasts until its advisories are stored. On a busy machine other nodes
    /// may time out too, and silent nodes may expire early: then a node that returns is new.
    async fn live(&mut self) -> Result<()> {
        let all = |_: &Node| true;
        title(&format!("{} nodes report every {:?}", self.plan.nodes, self.plan.every));
        self.part("all are known", all, |_, kinds| kinds.contains(&"new")).await?;
        for site in &mut self.sites {
            site.report_twice().await?;
            site.send_broken().await?;
        }
        println!("  some reports were sent twice, and some were no reports");

        self.sites.iter_mut().flat_map(|site| &mut site.nodes).for_each(Node::install_packages);
        let talks = |node: &Node| node.habit == Habit::Steady;
        self.part("a fifth has new packages, two fifths are silent: they time out", talks, |node, kinds| {
            node.habit == Habit::Steady || matches!(kinds.last(), Some(&("timeout" | "expire")))
        })
        .await?;
        let talks = |node: &Node| node.habit != Habit::LongSilent;
        self.part("half of the silent nodes return: they recover", talks, |node, kinds| {
            node.habit != Habit::ShortSilent || kinds.contains(&"recover") || times_new(kinds) > 1
        })
        .await?;
        self.part("the other half expires", talks, |node, kinds| {
            node.habit != Habit::LongSilent || kinds.last() == Some(&"expire")
        })
        .await?;
        self.part("they return: they are new", all, |node, kinds| {
            node.habit != Habit::LongSilent || times_new(kinds) > 1
        })
        .await?;
        self.part("the fleet is switched off: all expire", |_| false, |_, kinds| kinds.last() == Some(&"expire")).await
    }

    /// The nodes that talk report until the advisories about each node are as they should be.
    async fn part(
        &mut self,
        what: &str,
        talks: impl Fn(&Node) -> bool,
        done: impl Fn(&Node, &[&str]) -> bool,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut tick = interval(self.plan.every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let mut waiting = 0;
            for site in &mut self.sites {
                site.report(&talks).await?;
                site.read_advisories().await?;
                waiting += site.nodes.iter().filter(|node| !done(node, &site.advisories_of(node))).count();
            }
            if waiting == 0 {
                println!("  {what} ({:.1} s)", begun.elapsed().as_secs_f64());
                return Ok(());
            }
            if begun.elapsed() > PART_LIMIT {
                bail!("waited {PART_LIMIT:?} for: {what}; {waiting} nodes are not as expected");
            }
        }
    }

    /// Waits until nothing moves: everything is copied, and nothing waits to be published.
    async fn settle(&mut self) -> Result<()> {
        for site in &mut self.sites {
            site.settle().await?;
        }
        Ok(())
    }

    /// Compares everything with everything; an error if any two numbers disagree.
    pub(super) async fn compare(&mut self) -> Result<()> {
        let mut centre = Raw::connect(&self.centre.url()).await?;
        let copies = centre.read_stream(STREAM).await?;
        let advisories = centre.read_stream(ADVISORIES).await?;
        let mut checks = Checks::default();
        for site in &mut self.sites {
            site.compare(&copies, &advisories, &self.plan, &mut checks).await?;
        }
        let of_sites: usize = self.sites.iter().map(|site| site.count_mine(&copies)).sum();
        checks.equal("", "messages at the centre", copies.len(), "copies of both sites", of_sites);
        checks.print_table();
        for site in &self.sites {
            title(&format!("Metrics of {}, for Prometheus and Grafana", site.name));
            site.print_metrics().await?;
        }
        title("Comparison");
        checks.verdict()
    }
}

fn times_new(kinds: &[&str]) -> usize {
    kinds.iter().filter(|kind| **kind == "new").count()
}

fn title(text: &str) {
    println!("\n== {text}");
}
