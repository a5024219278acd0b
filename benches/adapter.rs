//! What we claim about Choria's data adapter, measured with its servers on one machine: rate, an outage of the target,
//! memory, CPU and latency.
//!
//!     make bench-adapter                            all of it
//!     make bench-adapter ARGS="--quick"             a few seconds each
//!     make bench-adapter ARGS="--section latency"   one part

#[path = "../tests/harness/mod.rs"]
mod harness;

#[path = "adapter/fleet.rs"]
mod fleet;
#[path = "adapter/latency.rs"]
mod latency;
#[path = "adapter/place.rs"]
mod place;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

use crate::harness::LIMIT;
use fleet::Fleet;
use place::Place;

/// Measures an adapter between two servers.
#[derive(Parser)]
struct Arguments {
    /// A few seconds for each part.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_delimiter = ',')]
    section: Vec<Section>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// 10,000 registrations a second: all are stored, once; CPU for each.
    Rate,
    /// The target is killed for 3 s at 5,000 a second.
    Outage,
    /// Memory while the queue is full.
    Memory,
    /// Latency at 1,000 a second.
    Latency,
}

const RATE: u64 = 10_000;
const OUTAGE_RATE: u64 = 5_000;
const OUTAGE: Duration = Duration::from_secs(3);

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
    let wants = |section| arguments.section.is_empty() || arguments.section.contains(&section);
    let seconds = if arguments.quick { 4 } else { 30 };
    println!("Registrations of 1 to 4 kB from {} senders, both protocol versions. {}\n", fleet::SENDERS, load());
    println!("| figure | measured | bound |\n|---|--:|--:|");
    if wants(Section::Rate) {
        rate(seconds).await?;
    }
    if wants(Section::Outage) {
        outage(seconds.max(8)).await?;
    }
    if wants(Section::Memory) {
        memory().await?;
    }
    if wants(Section::Latency) {
        latency::run(1_000 * seconds).await?;
    }
    println!("\n{}", load());
    Ok(())
}

async fn rate(seconds: u64) -> Result<()> {
    let place = Place::start(50_000).await?;
    let mut fleet = Fleet::connect(&place.ingest.url()).await?;
    let (begun, cpu) = (Instant::now(), place.cpu());
    let sent = fleet.publish(RATE, RATE * seconds).await?;
    let published = sent as f64 / begun.elapsed().as_secs_f64();
    let row = place.wait_stored(sent).await?;
    let stored = sent as f64 / begun.elapsed().as_secs_f64();
    let (service, servers) = place.cpu();
    let each = |seconds: f64| format!("{:.1} us", seconds * 1e6 / sent as f64);
    line("published per second", format!("{published:.0}"), format!("{RATE}"));
    line("stored per second", format!("{stored:.0}"), format!("{RATE}"));
    line("published, accepted, stored", format!("{sent}, {}, {}", row["accepted"], row["stored"]), "all the same");
    line("stored more than once or not at all", place.wrong(&row).await?, "0");
    line("CPU of the service per message", each(service - cpu.0), "12 us");
    line("CPU of both servers per message", each(servers - cpu.1), "");
    line("memory of the service, highest", mib(place.service.usage().rss_peak), "150 MiB");
    Ok(())
}

async fn outage(seconds: u64) -> Result<()> {
    let mut place = Place::start(50_000).await?;
    let url = place.ingest.url();
    let publisher = tokio::spawn(async move {
        let mut fleet = Fleet::connect(&url).await?;
        fleet.publish(OUTAGE_RATE, OUTAGE_RATE * seconds).await
    });
    place.wait_moving(OUTAGE_RATE).await?;
    place.target.kill()?;
    tokio::time::sleep(OUTAGE).await;
    place.target.restart().await?;
    let sent = publisher.await??;
    let row = place.wait_stored(sent).await?;
    line(
        "outage at 5,000/s: published, accepted, stored",
        format!("{sent}, {}, {}", row["accepted"], row["stored"]),
        "all the same",
    );
    line("outage: stored more than once or not at all", place.wrong(&row).await?, "0");
    line("outage: sent again, of these stored before", format!("{}, {}", row["retried"], row["duplicates"]), "");
    line("outage: memory of the service, highest", mib(place.service.usage().rss_peak), "150 MiB");
    Ok(())
}

/// The default bound in bytes is reached before that in messages.
async fn memory() -> Result<()> {
    let mut place = Place::start(1_000_000).await?;
    place.target.kill()?;
    let mut fleet = Fleet::connect(&place.ingest.url()).await?;
    let end = Instant::now() + LIMIT;
    let row = loop {
        fleet.publish(RATE, RATE / 2).await?;
        let row = place.row().await?;
        if row["dropped"]["queue_full"].as_u64().is_some() {
            break row;
        }
        ensure!(Instant::now() < end, "the queue does not become full: {row}");
    };
    let (messages, bytes) = (&row["queue"]["messages"], row["queue"]["bytes"].as_u64().unwrap_or_default());
    line("queue full: messages, bytes in it", format!("{messages}, {}", mib(bytes)), "");
    line("queue full: memory of the service, highest", mib(place.service.usage().rss_peak), "150 MiB");
    Ok(())
}

/// A line of the table.
fn line(figure: &str, measured: impl std::fmt::Display, bound: impl std::fmt::Display) {
    println!("| {figure} | {measured} | {bound} |");
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

/// How busy the machine is: figures of a busy one are indicative.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("Load average {load} on {cores} cores.")
}
