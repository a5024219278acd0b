//! How long one message takes from its publication at the source to a reader of the target, when nothing else is on
//! its way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use async_nats::jetstream::{self, consumer};
use futures_util::StreamExt;
use serde_json::json;

use crate::harness::{Service, connect, request};
use crate::pair::{Load, Pair, source_stream, target_stream};
use crate::ways::Way;

/// Between two messages: everything has come to rest.
const PAUSE: Duration = Duration::from_millis(25);
const LIMIT: Duration = Duration::from_secs(20);

/// Prints the latencies of `messages` in each way.
pub(crate) async fn run(pair: &mut Pair, messages: usize) -> Result<()> {
    println!("\n### One message at a time, 1 KiB: from publication to a reader of the target\n");
    println!("| way | p50 ms | p99 ms | worst ms | p99 x native source |");
    println!("|---|--:|--:|--:|--:|");
    let mut native = f64::NAN;
    for way in [Way::Source, Way::Exclusive, Way::Shared, Way::Pipelined] {
        // The way before left its messages.
        pair.preload(Load { payload: 1024, messages: 1, streams: 1, replicas: pair.load.replicas }).await?;
        let mut times = measure(pair, way, messages).await.with_context(|| way.to_string())?;
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        if way == Way::Source {
            native = at(0.99);
        }
        let (p50, p99, worst) = (at(0.5), at(0.99), at(1.0));
        println!("| {way} | {p50:.2} | {p99:.2} | {worst:.2} | {:.2} |", p99 / native);
        pair.delete_targets().await?;
        pair.forget();
    }
    Ok(())
}

/// Milliseconds of each message.
async fn measure(pair: &Pair, way: Way, messages: usize) -> Result<Vec<f64>> {
    way.make_targets(pair).await?;
    let control = connect(&pair.source.url()).await?;
    let mut service = None;
    if way != Way::Source {
        service = Some(Service::builder(&pair.source.url(), "BENCH").instance("bench").start().await?);
        request(&control, "replicator.config.add", way.document(pair, 0)).await?;
    }
    pair.wait_copied(1).await?;
    let source = jetstream::new(control.clone());
    let target = jetstream::new(connect(&pair.targets[0].url()).await?);
    let config = consumer::push::OrderedConfig {
        deliver_subject: target_inbox(),
        deliver_policy: consumer::DeliverPolicy::New,
        ..Default::default()
    };
    let stream = target.get_stream(target_stream(0)).await?;
    let mut arrivals = stream.create_consumer(config).await?.messages().await?;
    let mut times = Vec::with_capacity(messages);
    let body = bytes::Bytes::from(vec![b'x'; 1024]);
    for _ in 0..messages {
        tokio::time::sleep(PAUSE).await;
        let begin = Instant::now();
        // Its ack is not waited for: the copy does not wait for it either.
        let ack = source.publish("bench0.latency", body.clone()).await?;
        let arrival = tokio::time::timeout(LIMIT, arrivals.next()).await.context("nothing arrives")?;
        arrival.context("the reader ended")??;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        ack.await?;
    }
    if let Some(mut service) = service {
        request(&control, "replicator.config.delete", json!({"replication": source_stream(0)})).await?;
        service.stop().await?;
    }
    Ok(times)
}

fn target_inbox() -> String {
    format!("_INBOX.{}", nuid::next())
}
