//! The ways to copy a stream that are measured side by side.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use async_nats::jetstream::{self, AckKind, consumer, stream};
use futures_util::StreamExt;
use serde_json::json;

use crate::harness::process::{Usage, machine_cpu_seconds};
use crate::harness::{Raw, Service, connect, request};
use crate::pair::{DOMAIN, PREFIX, Pair, SOURCE, TARGET};

/// The slow way gets no more than this, at any payload.
const STOP_AND_WAIT_MESSAGES: u64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// This program.
    Service,
    /// A stream at the target that sources the one at the source, over the leafnode.
    Native,
    /// Read one, publish it, wait for the ack, acknowledge it, read the next.
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
    /// Peak memory of the copier, in bytes; zero where there is none or it is not told apart from the bench.
    pub(crate) memory: u64,
}

impl Sample {
    pub(crate) fn rate(&self) -> f64 {
        self.messages as f64 / self.elapsed.as_secs_f64()
    }

    /// CPU seconds per million messages.
    pub(crate) fn per_million(&self, cpu: f64) -> f64 {
        cpu * 1e6 / self.messages as f64
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "stream-replicator",
            Self::Native => "native source",
            Self::StopAndWait => "stop-and-wait",
        })
    }
}

impl Way {
    pub(crate) const ALL: [Self; 3] = [Self::Service, Self::Native, Self::StopAndWait];

    /// Copies the source's stream into a new stream and removes that again.
    pub(crate) async fn measure(self, pair: &Pair) -> Result<Sample> {
        let sample = match self {
            Self::Service => service(pair).await,
            Self::Native => native(pair).await,
            Self::StopAndWait => stop_and_wait(pair).await,
        };
        let sample = sample.with_context(|| self.to_string())?;
        pair.delete_target().await?;
        Ok(sample)
    }
}

/// CPU and time since its creation.
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

/// The document that copies the bench's stream.
pub(crate) fn document(pair: &Pair, target_url: &str) -> serde_json::Value {
    json!({"stream": SOURCE, "target_stream": TARGET, "target_subject_prefix": PREFIX,
        "source_url": pair.source.url(), "target_url": target_url})
}

async fn service(pair: &Pair) -> Result<Sample> {
    // A new process each time, so that its peak memory is that of this copy. Its time to start is not counted,
    // the time from the request on is.
    let mut service = Service::builder(&pair.source.url(), "BENCH").instance("bench").start().await?;
    let client = connect(&pair.source.url()).await?;
    let before = service.usage().cpu_seconds;
    let clock = Clock::start(pair);
    request(&client, "replicator.config.add", document(pair, &pair.target.url())).await?;
    pair.wait_copied(pair.messages).await?;
    let usage = service.usage();
    let sample = clock.stop(pair, pair.messages, usage.cpu_seconds - before, usage.rss_peak);
    request(&client, "replicator.config.delete", json!({"replication": SOURCE})).await?;
    service.stop().await?;
    Ok(sample)
}

async fn native(pair: &Pair) -> Result<Sample> {
    let mut raw = Raw::connect(&pair.target.url()).await?;
    let clock = Clock::start(pair);
    let source = json!({"name": SOURCE, "external": {"api": format!("$JS.{DOMAIN}.API")}});
    raw.create_stream(TARGET, json!({"sources": [source]})).await?;
    pair.wait_copied(pair.messages).await?;
    Ok(clock.stop(pair, pair.messages, 0.0, 0))
}

async fn stop_and_wait(pair: &Pair) -> Result<Sample> {
    let messages = pair.messages.min(STOP_AND_WAIT_MESSAGES);
    let source = jetstream::new(connect(&pair.source.url()).await?);
    let target = jetstream::new(connect(&pair.target.url()).await?);
    let subjects = vec![format!("{PREFIX}.bench.>")];
    let config = stream::Config { name: TARGET.to_owned(), subjects, ..Default::default() };
    target.create_stream(config).await?;
    let from = source.get_stream(SOURCE).await?;
    let config = consumer::pull::Config { ack_policy: consumer::AckPolicy::Explicit, ..Default::default() };
    let mut reader = from.create_consumer(config).await?.stream().max_messages_per_batch(500).messages().await?;

    let clock = Clock::start(pair);
    for _ in 0..messages {
        let next = tokio::time::timeout(Duration::from_secs(10), reader.next()).await;
        let message = next.context("no message")?.context("the consumer ended")??;
        let ack = target.publish(format!("{PREFIX}.{}", message.subject), message.payload.clone()).await?;
        ack.await?;
        message.ack_with(AckKind::Ack).await.map_err(|e| anyhow!("{e}"))?;
    }
    let copier_cpu = clock.bench_cpu();
    let sample = clock.stop(pair, messages, 0.0, 0);
    pair.wait_copied(messages).await?;
    Ok(Sample { copier_cpu, ..sample })
}
