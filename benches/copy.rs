//! What we claim about speed, measured in one run on the same two servers: this program beside a native
//! JetStream source and beside a copier that waits for each acknowledgement.
//!
//!     make bench                               all of it
//!     make bench ARGS="--quick"                fewer messages, one round
//!     make bench ARGS="--only 1024"            one payload size

#[path = "../tests/harness/mod.rs"]
mod harness;

#[path = "copy/frozen.rs"]
mod frozen;
#[path = "copy/pair.rs"]
mod pair;
#[path = "copy/table.rs"]
mod table;
#[path = "copy/ways.rs"]
mod ways;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use pair::Pair;
use ways::{Sample, Way};

/// Copies streams in three ways and compares speed, CPU and memory.
#[derive(Parser)]
struct Arguments {
    /// Fewer messages, one round.
    #[arg(long)]
    quick: bool,
    /// Only this payload size, in bytes.
    #[arg(long, value_name = "BYTES")]
    only: Option<usize>,
    /// Rounds; the table shows medians.
    #[arg(long)]
    rounds: Option<usize>,
    /// Leave this program out, to measure the others alone.
    #[arg(long)]
    without_service: bool,
    /// Leave out the scenario of the frozen target.
    #[arg(long)]
    without_freeze: bool,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Payload size and number of messages.
const LOADS: [(usize, u64); 3] = [(128, 400_000), (1024, 400_000), (16 * 1024, 20_000)];

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Leaving through here drops, and so ends, the servers and the service.
    let outcome = tokio::select! {
        outcome = run(&arguments) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("the bench failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 3 });
    let ways: Vec<Way> = Way::ALL.into_iter().filter(|w| !(arguments.without_service && *w == Way::Service)).collect();
    let mut pair = Pair::start().await?;
    table::head(&pair, rounds);
    let mut all = Vec::new();
    for (payload, messages) in LOADS {
        if arguments.only.is_some_and(|only| only != payload) {
            continue;
        }
        let messages = if arguments.quick { messages / 10 } else { messages };
        pair.preload(payload, messages).await?;
        let mut samples: Vec<(Way, Sample)> = Vec::new();
        // Interleaved, so that what disturbs the machine for a while disturbs all of them.
        for round in 1..=rounds {
            for way in &ways {
                let sample = way.measure(&pair).await?;
                eprintln!("  {payload} B, round {round}, {way}: {:.0} msg/s", sample.rate());
                samples.push((*way, sample));
            }
        }
        table::rows(payload, &ways, &samples);
        all.append(&mut samples);
    }
    table::foot(&all);
    if !arguments.without_service && !arguments.without_freeze {
        let messages = if arguments.quick { 50_000 } else { 200_000 };
        frozen::run(&mut pair, messages).await?;
    }
    Ok(())
}
