//! What we claim about speed, measured in one run on the same servers: this program beside JetStream's own sources and
//! mirrors and beside a copier that waits for each acknowledgement.
//!
//!     make bench                               all of it
//!     make bench ARGS="--quick"                fewer messages, one round
//!     make bench ARGS="--section distance"     one part

#[path = "../tests/harness/mod.rs"]
mod harness;

#[path = "copy/frozen.rs"]
mod frozen;
#[path = "copy/latency.rs"]
mod latency;
#[path = "copy/pair.rs"]
mod pair;
#[path = "copy/sampling.rs"]
mod sampling;
#[path = "copy/table.rs"]
mod table;
#[path = "copy/ways.rs"]
mod ways;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use pair::{Load, Pair};
use table::Row;
use ways::Way;

/// Copies streams in several ways and compares speed, CPU and memory.
#[derive(Parser)]
struct Arguments {
    /// Fewer messages, one round.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_delimiter = ',')]
    section: Vec<Section>,
    /// Only this payload size, in bytes, where there are several.
    #[arg(long, value_name = "BYTES")]
    only: Option<usize>,
    /// Only these ways, where several are compared.
    #[arg(long, value_delimiter = ',')]
    way: Vec<Way>,
    /// Another build of this program, measured beside it in each of its own ways.
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// Fields that are added to the documents of this program, as JSON: `{"limits": {"messages_in_flight": 1000}}`.
    #[arg(long, value_name = "JSON")]
    fields: Option<serde_json::Value>,
    /// Rounds; the tables show medians.
    #[arg(long)]
    rounds: Option<usize>,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// One stream, by payload size and way.
    Payloads,
    /// One stream into a target with three replicas.
    Replicas,
    /// Several replications at once.
    Many,
    /// A long way to source, target or both.
    Distance,
    /// One message at a time.
    Latency,
    /// A target that stalls under a backlog.
    Frozen,
    /// Very many senders, of which few messages are copied.
    Sampling,
}

/// Payload size and number of messages.
const LOADS: [(usize, u64); 3] = [(128, 400_000), (1024, 400_000), (16 * 1024, 20_000)];
/// Replications at once.
const MANY: [usize; 3] = [1, 4, 16];
/// One way of a connection over a continent.
const FAR: Duration = Duration::from_millis(25);
/// What marks the rows of `--against`.
const OTHER: &str = " (other build)";
/// What is compared where all ways would say nothing more.
const MAIN: [Way; 4] = [Way::Exclusive, Way::Source, Way::Mirror, Way::StopAndWait];

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Leaving through here drops, and so ends, the servers and the service.
    let outcome = tokio::select! {
        outcome = Bench::new(&arguments).run() => outcome,
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

struct Bench<'a> {
    arguments: &'a Arguments,
    rounds: usize,
    /// Everything measured so far.
    all: Vec<Row>,
}

impl<'a> Bench<'a> {
    fn new(arguments: &'a Arguments) -> Self {
        let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 5 });
        Self { arguments, rounds, all: Vec::new() }
    }

    fn wants(&self, section: Section) -> bool {
        self.arguments.section.is_empty() || self.arguments.section.contains(&section)
    }

    fn load(&self, payload: usize, messages: u64, streams: usize, replicas: usize) -> Load {
        let messages = if self.arguments.quick { messages / 10 } else { messages };
        Load { payload, messages, streams, replicas }
    }

    /// Servers for all that follows, `replicas` at the target.
    async fn pair(&self, replicas: usize) -> Result<Pair> {
        let fields = self.arguments.fields.clone().unwrap_or_default();
        Pair::start(replicas, fields).await
    }

    async fn run(mut self) -> Result<()> {
        let mut pair = self.pair(1).await?;
        table::head(pair.source.version(), self.rounds);
        if self.wants(Section::Payloads) {
            self.payloads(&mut pair).await?;
        }
        if self.wants(Section::Many) {
            self.many(&mut pair).await?;
        }
        if self.wants(Section::Distance) {
            self.distance(&mut pair).await?;
        }
        if self.wants(Section::Latency) {
            latency::run(&mut pair, if self.arguments.quick { 100 } else { 1_000 }).await?;
        }
        if self.wants(Section::Frozen) {
            frozen::run(&mut pair, if self.arguments.quick { 50_000 } else { 200_000 }).await?;
        }
        drop(pair);
        if self.wants(Section::Sampling) {
            let quick = self.arguments.quick;
            sampling::decide(if quick { 0.5 } else { 5.0 })?;
            sampling::nameless(if quick { 20_000 } else { 1_000_000 }, self.rounds).await?;
            sampling::run(if quick { 20_000 } else { 1_000_000 }).await?;
        }
        if self.wants(Section::Replicas) {
            let mut cluster = self.pair(3).await?;
            let load = self.load(1024, 200_000, 1, 3);
            let rows = self.compare(&mut cluster, load, &Way::ALL).await?;
            self.table("Three replicas at the target", rows);
        }
        table::foot(&self.all);
        Ok(())
    }

    async fn payloads(&mut self, pair: &mut Pair) -> Result<()> {
        let mut rows = Vec::new();
        for (payload, messages) in LOADS {
            if self.arguments.only.is_some_and(|only| only != payload) {
                continue;
            }
            let ways: &[Way] = if payload == 1024 { &Way::ALL } else { &MAIN };
            let load = self.load(payload, messages, 1, 1);
            rows.extend(self.compare(pair, load, ways).await?);
        }
        self.table("One stream, one replica", rows);
        Ok(())
    }

    async fn many(&mut self, pair: &mut Pair) -> Result<()> {
        let mut rows = Vec::new();
        for streams in MANY {
            let load = self.load(1024, 320_000, streams, 1);
            rows.extend(self.compare(pair, load, &[Way::Exclusive, Way::Source]).await?);
        }
        self.table("Several replications at once", rows);
        Ok(())
    }

    /// The ways of this program and the slow one, near and far from either side; all through the same proxies, but
    /// for the side that is near.
    async fn distance(&mut self, pair: &mut Pair) -> Result<()> {
        let near = Some(Duration::ZERO);
        let places = [
            (near, near, " (near)"),
            (Some(FAR), near, " (source 25 ms away)"),
            (near, Some(FAR), " (target 25 ms away)"),
            (Some(FAR), Some(FAR), " (both 25 ms away)"),
        ];
        let mut ways = vec![Way::Exclusive, Way::Pipelined, Way::FeedSource, Way::FeedMirror, Way::StopAndWait];
        ways.retain(|way| self.wants_way(*way));
        // So many that the first second, in which the windows of the connections grow, is a small part.
        let load = self.load(1024, 1_200_000, 1, 1);
        pair.preload(load).await?;
        let mut rows: Vec<Row> = Vec::new();
        for round in 0..self.rounds {
            for (source, target, note) in places {
                pair.move_away(source, target).await?;
                for &way in &ways {
                    let sample = way.measure(pair, None).await?;
                    eprintln!("  round {}, {way}{note}: {:.0} msg/s", round + 1, sample.rate());
                    match rows.iter_mut().find(|row| row.way == way && row.note == note) {
                        Some(row) => row.samples.push(sample),
                        None => rows.push(Row { load, way, note: note.to_owned(), samples: vec![sample] }),
                    }
                }
            }
        }
        pair.move_away(None, None).await?;
        let near: Vec<Row> = rows.iter().take(ways.len()).cloned().collect();
        self.table("25 ms each way", rows.clone());
        println!();
        for row in &rows[ways.len()..] {
            let base = near.iter().find(|base| base.way == row.way);
            let ratio = base.map_or(f64::NAN, |base| table::ratio(&row.samples, &base.samples));
            println!("{}{}: {ratio:.2} x near", row.way, row.note);
        }
        Ok(())
    }

    /// All ways with one load; interleaved, so that what disturbs the machine for a while disturbs all of them.
    async fn compare(&self, pair: &mut Pair, load: Load, ways: &[Way]) -> Result<Vec<Row>> {
        pair.preload(load).await?;
        let against = self.arguments.against.as_deref();
        let mut rows: Vec<Row> = Vec::new();
        for &way in ways.iter().filter(|way| self.wants_way(**way)) {
            let row = Row { load, way, note: String::new(), samples: Vec::new() };
            if against.is_some() && way.is_ours() {
                rows.push(Row { note: OTHER.to_owned(), ..row.clone() });
            }
            rows.push(row);
        }
        for round in 1..=self.rounds {
            for row in &mut rows {
                let program = against.filter(|_| row.note == OTHER);
                let sample = row.way.measure(pair, program).await?;
                eprintln!("  {} B, round {round}, {}{}: {:.0} msg/s", load.payload, row.way, row.note, sample.rate());
                row.samples.push(sample);
            }
        }
        Ok(rows)
    }

    fn wants_way(&self, way: Way) -> bool {
        self.arguments.way.is_empty() || self.arguments.way.contains(&way)
    }

    fn table(&mut self, title: &str, rows: Vec<Row>) {
        let against = [Way::Exclusive, Way::Source, Way::Mirror, Way::StopAndWait];
        let against: Vec<Way> = against.into_iter().filter(|way| rows.iter().any(|row| row.way == *way)).collect();
        table::print(title, &rows, &against);
        for other in rows.iter().filter(|row| row.note == OTHER) {
            let same = |row: &&Row| row.load == other.load && row.way == other.way && row.note.is_empty();
            if let Some(own) = rows.iter().find(same) {
                let ratio = table::ratio(&own.samples, &other.samples);
                println!("\n{}, {} B: {ratio:.3} x the other build", own.way, own.load.payload);
            }
        }
        self.all.extend(rows);
    }
}
