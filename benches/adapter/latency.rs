//! How long a registration takes from its publication to a reader of the stream, at 1,000 a second.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use async_nats::jetstream::{self, consumer};
use futures_util::StreamExt;
use serde::Deserialize;

use crate::fleet::Fleet;
use crate::harness::{LIMIT, connect};
use crate::line;
use crate::place::{Place, STREAM};

const RATE: u64 = 1_000;

/// What the adapter stores; its time is that of the publication.
#[derive(Deserialize)]
struct Output {
    time: chrono::DateTime<chrono::Utc>,
    protocol: String,
}

/// Prints the latencies of so many registrations.
pub(crate) async fn run(count: u64) -> Result<()> {
    let place = Place::start(50_000).await?;
    let target = jetstream::new(connect(&place.target.url()).await?);
    let config = consumer::push::OrderedConfig {
        deliver_subject: format!("_INBOX.{}", nuid::next()),
        deliver_policy: consumer::DeliverPolicy::New,
        ..Default::default()
    };
    let stream = target.get_stream(STREAM).await?;
    let mut arrivals = stream.create_consumer(config).await?.messages().await?;
    let mut fleet = Fleet::connect(&place.ingest.url()).await?;
    let publisher = tokio::spawn(async move { fleet.publish(RATE, count).await });
    let mut times = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let arrival = tokio::time::timeout(LIMIT, arrivals.next()).await.context("nothing arrives")?;
        let arrival = arrival.context("the reader ended")??;
        let now = SystemTime::now();
        let output: Output = serde_json::from_slice(&arrival.payload)?;
        anyhow::ensure!(output.protocol.starts_with("choria:adapters:"), "not of an adapter");
        // The first version of the protocol has seconds only.
        if output.time.timestamp_subsec_nanos() > 0 {
            let sent = SystemTime::from(output.time);
            times.push(now.duration_since(sent).unwrap_or(Duration::ZERO).as_secs_f64() * 1e3);
        }
    }
    publisher.await??;
    times.sort_by(f64::total_cmp);
    let at = |part: f64| format!("{:.2} ms", times[((times.len() - 1) as f64 * part) as usize]);
    line("latency at 1,000/s, p50", at(0.5), "");
    line("latency at 1,000/s, p99", at(0.99), "20 ms");
    line("latency at 1,000/s, worst", at(1.0), "");
    Ok(())
}
