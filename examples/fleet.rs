//! `make demo-fleet`: nodes of two sites publish registration data of both protocol versions; adapters store it at each
//! site, sampled replications copy it to the centre, with the advisories about nodes that go silent, return or expire. At the end
//! all counts are compared with each other. Needs about a minute and leaves nothing behind.

#[path = "fleet/mod.rs"]
mod fleet;

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Simulates a fleet of nodes at two sites and compares what was seen where.
#[derive(Debug, Parser)]
struct Arguments {
    /// Nodes of both sites together.
    #[arg(long, default_value_t = 500)]
    nodes: usize,
    /// Seconds between two reports of a node.
    #[arg(long, default_value_t = 1.0)]
    every: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let every = Duration::from_secs_f64(arguments.every.clamp(0.1, 60.0));
    let plan = fleet::Plan { nodes: arguments.nodes, every, warn: every * 5, inspect: every * 15 };
    // Leaving through here drops, and so ends, the servers and the services.
    let outcome = tokio::select! {
        outcome = fleet::run(plan) => outcome.map(drop),
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nthe fleet demo failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}
