//! Half a million messages with one difference of each kind, and more gaps than are kept.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{ID, kinds, ranges, tamper, verified};
use crate::harness::{Outgoing, Site};

const MESSAGES: u64 = 500_000;
const MIB: u64 = 1 << 20;

fn numbered(number: u64) -> Outgoing {
    let message = Outgoing::new(format!("orders.{}", number % 100), format!("{number:0>128}"));
    if number.is_multiple_of(3) { message.with_lines(&["Colour: red"]) } else { message }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "500,000 messages three times: make check-long"]
async fn five_differences_among_500_000_messages_are_named() -> Result<()> {
    let mut site = Site::start().await?;
    site.source_stream(ID, json!({})).await?.publish_all((1..=MESSAGES).map(numbered)).await?;
    site.add(ID, json!({})).await?;
    site.settled_within(ID, MESSAGES, Duration::from_secs(120)).await?;
    tamper(&site, ID, |messages| {
        messages.swap(99_999, 399_999);
        messages[123_455].payload[50] ^= 1;
        let block = String::from_utf8_lossy(&messages[299_999].header).replace("red", "rod");
        messages[299_999].header = block.into_bytes();
        let again = messages[10].clone();
        messages.push(again);
        messages.remove(249_999);
    })
    .await?;
    // What copying took does not count.
    site.service.kill()?;
    site.service.restart().await?;
    site.row_when(ID, "is paused", |row| row["state"] == "paused").await?;
    let before = site.service.usage().rss;
    let found = verified(&site, ID, json!({})).await?;
    let usage = site.service.usage();
    let seconds = found["seconds"].as_f64().unwrap_or_default();
    println!(
        "{MESSAGES} messages: {seconds:.2} s, {:.0} messages/s; {} MiB before, {} MiB at the most",
        MESSAGES as f64 / seconds,
        before / MIB,
        usage.rss_peak / MIB
    );
    ensure!(found["state"] == "done", "{found:#}");
    assert_eq!(kinds(&found), ["missing", "extra", "payload", "headers", "order"], "{found:#}");
    assert_eq!(ranges(&found, "missing"), [(250_000, 250_000)]);
    assert_eq!(ranges(&found, "extra"), [(MESSAGES, MESSAGES)]);
    assert_eq!(ranges(&found, "payload"), [(123_456, 123_456)]);
    assert_eq!(ranges(&found, "headers"), [(300_000, 300_000)]);
    assert_eq!(ranges(&found, "order"), [(100_000, 100_000), (400_000, 400_000)]);
    assert_eq!((&found["findings"], &found["source_messages"]), (&json!(6), &json!(MESSAGES)), "{found:#}");
    assert!(usage.rss_peak < before + 64 * MIB, "{} MiB became {} MiB", before / MIB, usage.rss_peak / MIB);
    Ok(())
}

/// Each second message has no copy: more separate ranges than are kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "110,000 messages three times: make check-long"]
async fn more_gaps_than_are_kept_are_counted_and_not_repaired() -> Result<()> {
    let site = Site::start().await?;
    site.source_stream(ID, json!({})).await?.publish_all((1..=110_000).map(numbered)).await?;
    site.add(ID, json!({})).await?;
    site.settled_within(ID, 110_000, Duration::from_secs(120)).await?;
    tamper(&site, ID, |messages| messages.retain(|message| message.seq.is_multiple_of(2))).await?;
    let found = verified(&site, ID, json!({"repair": true})).await?;
    assert_eq!((&found["state"], &found["findings"]), (&json!("done"), &json!(55_000)), "{found:#}");
    assert_eq!((&found["repaired"]["stored"], &found["repaired"]["left"]), (&json!(0), &json!(55_000)), "{found:#}");
    let reason = found["repaired"]["reason"].as_str().unwrap_or_default();
    assert!(reason.starts_with("they are in more separate ranges than can be kept"), "{reason}");
    let examples = found["differences"][0]["examples"].as_array().map_or(&[][..], Vec::as_slice);
    let said = "5000 messages after it had no copy and were not read again";
    assert!(examples[0]["detail"].as_str().is_some_and(|detail| detail.contains(said)), "{found:#}");
    assert_eq!(examples[0]["source_seq"], 99_999, "{found:#}");
    // From there on all are judged.
    let found = verified(&site, ID, json!({"from": 100_000})).await?;
    assert_eq!(found["findings"], 5_000, "{found:#}");
    Ok(())
}
