//! The ways to copy a stream that are measured side by side.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use async_nats::jetstream::{self, AckKind, consumer};
use clap::ValueEnum;
use futures_util::StreamExt;
use serde_json::{Value, json};
use stream_replicator::native::FeedSubjects;

use crate::harness::process::{Usage, machine_cpu_seconds};
use crate::harness::site::merged;
use crate::harness::{Service, connect, request};
use crate::pair::{DOMAIN, PREFIX, Pair, source_stream, target_stream};

/// The site of the service.
pub(crate) const SITE: &str = "BENCH";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// This program into a target of its own, which takes fast-ingest batches.
    Exclusive,
    /// This program into such a target that is shared.
    Shared,
    /// This program into a target without batches.
    Pipelined,
    /// A stream at the target that sources the one at the source, over the leafnode.
    Source,
    /// A stream at the target that mirrors it.
    Mirror,
    /// This program as the origin of a source of the target stream.
    FeedSource,
    /// This program as the origin of a mirror.
    FeedMirror,
    /// Ask for one, publish it, wait for the ack, acknowledge it, ask for the next.
    StopAndWait,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) messages: u64,
    pub(crate) elapsed: Duration,
    pub(crate) source_cpu: f64,
    pub(crate) target_cpu: f64,
    pub(crate) copier_cpu: f64,
    /// Cores that processes outside of this bench kept busy.
    pub(crate) others: f64,
    /// Peak memory of the copier, in bytes; zero if there is none, or if it is part of the bench's own process.
    pub(crate) memory: u64,
}

impl Sample {
    pub(crate) fn rate(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64()
    }

    /// CPU in microseconds per message.
    pub(crate) fn per_message(&self, cpu: f64) -> f64 {
        cpu * 1e6 / self.messages as f64
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exclusive => "fast-ingest, exclusive",
            Self::Shared => "fast-ingest, shared",
            Self::Pipelined => "pipelined",
            Self::Source => "native source",
            Self::Mirror => "native mirror",
            Self::FeedSource => "feed-source",
            Self::FeedMirror => "feed-mirror",
            Self::StopAndWait => "stop-and-wait",
        })
    }
}

impl Way {
    /// This program, and what it is held against where all of a table are measured.
    pub(crate) const ALL: [Self; 8] = [
        Self::Exclusive,
        Self::Shared,
        Self::Pipelined,
        Self::FeedSource,
        Self::FeedMirror,
        Self::Source,
        Self::Mirror,
        Self::StopAndWait,
    ];

    /// Whether this program does it.
    pub(crate) fn is_ours(self) -> bool {
        !matches!(self, Self::Source | Self::Mirror | Self::StopAndWait)
    }

    /// Copies the source's streams into new streams and removes these again. `program` is another build than that of
    /// this bench.
    pub(crate) async fn measure(self, pair: &Pair, program: Option<&Path>) -> Result<Sample> {
        let sample = match self {
            Self::StopAndWait => stop_and_wait(pair).await,
            _ if self.is_ours() => self.service(pair, program).await,
            _ => self.native(pair).await,
        };
        let sample = sample.with_context(|| self.to_string())?;
        pair.delete_targets().await?;
        Ok(sample)
    }

    /// Makes the target streams as this way needs them; the native ways begin with this.
    pub(crate) async fn make_targets(self, pair: &Pair) -> Result<()> {
        let origin = |index| json!({"name": source_stream(index), "external": {"api": format!("$JS.{DOMAIN}.API")}});
        let fed = |index| {
            let subjects = FeedSubjects::of(SITE, &source_stream(index));
            json!({"name": source_stream(index), "external": {"api": subjects.api(), "deliver": subjects.deliver()}})
        };
        pair.make_targets(|index| match self {
            Self::Source => json!({"sources": [origin(index)]}),
            Self::Mirror => json!({"mirror": origin(index)}),
            Self::FeedSource => json!({"sources": [fed(index)]}),
            Self::FeedMirror => json!({"mirror": fed(index)}),
            Self::Exclusive | Self::Shared => json!({"subjects": [copied(index)], "allow_batched": true}),
            Self::Pipelined | Self::StopAndWait => json!({"subjects": [copied(index)]}),
        })
        .await
    }

    /// The document of one copy by this program.
    pub(crate) fn document(self, pair: &Pair, index: usize) -> Value {
        let mut document = json!({"stream": source_stream(index), "target_stream": target_stream(index),
            "target_subject_prefix": PREFIX, "source_url": pair.source_url(), "target_url": pair.target_url()});
        if self == Self::Shared {
            document["target_mode"] = "shared".into();
        }
        if let Some(kind) = self.fed_kind() {
            document["kind"] = kind.into();
            document["target_leaf_url"] = pair.target_leaf_url().into();
            document.as_object_mut().map(|document| document.remove("target_subject_prefix"));
        }
        merged(document, pair.fields.clone())
    }

    /// The `kind` of a document that is not a copy.
    fn fed_kind(self) -> Option<&'static str> {
        match self {
            Self::FeedSource => Some("source"),
            Self::FeedMirror => Some("mirror"),
            _ => None,
        }
    }

    async fn service(self, pair: &Pair, program: Option<&Path>) -> Result<Sample> {
        // The program makes the streams of its feeds, but only with the replicas of the source. A stream that exists
        // before its origin answers does not ask again for long.
        if self.fed_kind().is_none() || pair.load.replicas > 1 {
            self.make_targets(pair).await?;
        }
        // A new process each time, so that its peak memory is that of this copy.
        let mut builder = Service::builder(&pair.source.url(), SITE).instance("bench");
        if let Some(program) = program {
            builder = builder.program(program);
        }
        let mut service = builder.start().await?;
        let client = connect(&pair.source.url()).await?;
        for index in 0..pair.load.streams {
            request(&client, "replicator.config.add", self.document(pair, index)).await?;
        }
        let begun = pair.wait_begun().await?;
        let before = service.usage().cpu_seconds;
        let clock = Clock::start(pair);
        pair.wait_copied(pair.load.messages).await?;
        let usage = service.usage();
        let sample = clock.stop(pair, pair.load.messages - begun, usage.cpu_seconds - before, usage.rss_peak);
        for index in 0..pair.load.streams {
            request(&client, "replicator.config.delete", json!({"replication": source_stream(index)})).await?;
        }
        service.stop().await?;
        Ok(sample)
    }

    async fn native(self, pair: &Pair) -> Result<Sample> {
        self.make_targets(pair).await?;
        let begun = pair.wait_begun().await?;
        let clock = Clock::start(pair);
        pair.wait_copied(pair.load.messages).await?;
        Ok(clock.stop(pair, pair.load.messages - begun, 0.0, 0))
    }
}

/// Subjects of a target stream that messages are published to.
fn copied(index: usize) -> String {
    format!("{PREFIX}.bench{index}.>")
}

/// CPU and time since its creation. It begins with the first message at the target: how long a server takes until it asks
/// its origin, and a program to connect, says nothing about the rate.
struct Clock {
    begin: Instant,
    cpu: (f64, f64),
    bench: f64,
    machine: f64,
}

impl Clock {
    fn start(pair: &Pair) -> Self {
        let bench = Usage::of(std::process::id()).cpu_seconds;
        Self { begin: Instant::now(), cpu: pair.cpu(), bench, machine: machine_cpu_seconds() }
    }

    /// `copier` is the CPU time of a copier that is a process of its own.
    fn stop(self, pair: &Pair, messages: u64, copier: f64, memory: u64) -> Sample {
        let elapsed = self.begin.elapsed();
        let (source, target) = pair.cpu();
        let (source_cpu, target_cpu) = (source - self.cpu.0, target - self.cpu.1);
        let ours = source_cpu + target_cpu + copier + self.bench_cpu();
        let others = (machine_cpu_seconds() - self.machine - ours).max(0.0) / elapsed.as_secs_f64();
        Sample { messages, elapsed, source_cpu, target_cpu, copier_cpu: copier, others, memory }
    }

    /// CPU time of the bench itself, which is the copier in stop-and-wait.
    fn bench_cpu(&self) -> f64 {
        Usage::of(std::process::id()).cpu_seconds - self.bench
    }
}

/// The slow way takes part of the first stream only: the time that this takes, at the least.
const STOP_AND_WAIT: Duration = Duration::from_secs(2);

async fn stop_and_wait(pair: &Pair) -> Result<Sample> {
    Way::StopAndWait.make_targets(pair).await?;
    let source = jetstream::new(connect(&pair.source_url()).await?);
    let target = jetstream::new(connect(&pair.target_url()).await?);
    let from = source.get_stream(source_stream(0)).await?;
    let config = consumer::pull::Config { ack_policy: consumer::AckPolicy::Explicit, ..Default::default() };
    let reader = from.create_consumer(config).await?;

    let clock = Clock::start(pair);
    let mut messages = 0;
    while clock.begin.elapsed() < STOP_AND_WAIT && messages < pair.load.messages {
        let mut next = reader.fetch().max_messages(1).expires(Duration::from_secs(10)).messages().await?;
        let message = next.next().await.context("no message")?.map_err(|e| anyhow!("{e}"))?;
        let ack = target.publish(format!("{PREFIX}.{}", message.subject), message.payload.clone()).await?;
        ack.await?;
        message.ack_with(AckKind::Ack).await.map_err(|e| anyhow!("{e}"))?;
        messages += 1;
    }
    let copier_cpu = clock.bench_cpu();
    let sample = clock.stop(pair, messages, 0.0, 0);
    Ok(Sample { copier_cpu, ..sample })
}
