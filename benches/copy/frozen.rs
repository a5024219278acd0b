//! A large backlog and a target that answers nothing for some seconds: how much memory does the service take?

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::harness::{Service, connect, request, wait_for};
use crate::pair::{Load, Pair, source_stream};
use crate::ways::Way;

const PAYLOAD: usize = 1024;
const FROZEN: Duration = Duration::from_secs(5);

/// Prints the peak memory of the service.
pub(crate) async fn run(pair: &mut Pair, messages: u64) -> Result<()> {
    pair.preload(Load { payload: PAYLOAD, messages, streams: 1, replicas: pair.load.replicas }).await?;
    Way::Exclusive.make_targets(pair).await?;
    let mut service = Service::builder(&pair.source.url(), "BENCH").instance("bench").start().await?;
    let idle = service.usage().rss;
    let client = connect(&pair.source.url()).await?;
    request(&client, "replicator.config.add", Way::Exclusive.document(pair, 0)).await?;
    let begun = async || pair.copied().await.is_ok_and(|n| n > messages / 20);
    wait_for("the copy to be under way", Duration::from_secs(30), begun).await?;

    let at = pair.copied().await?;
    pair.targets[0].freeze()?;
    let begin = Instant::now();
    let mut peak = 0;
    // Sampled, because the highest value ever would include what came before and after.
    while begin.elapsed() < FROZEN {
        peak = peak.max(service.usage().rss);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    pair.targets[0].thaw()?;
    pair.wait_copied(messages).await?;

    let mib = |bytes: u64| bytes as f64 / 1048576.0;
    println!(
        "\nBacklog of {messages} messages of {PAYLOAD} B, target frozen for {} s at message {at}:",
        FROZEN.as_secs()
    );
    println!(
        "memory of the service idle {:.1} MiB, while the target was frozen {:.1} MiB, peak of the run {:.1} MiB; all copied.",
        mib(idle),
        mib(peak),
        mib(service.usage().rss_peak)
    );
    request(&client, "replicator.config.delete", serde_json::json!({"replication": source_stream(0)}))
        .await
        .context("clean-up")?;
    service.stop().await?;
    pair.delete_targets().await
}
