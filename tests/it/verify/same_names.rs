//! Streams of one name, of several clusters, into one target: each message is known as one of its own source.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{ID, clean, ranges, verified};
use crate::{
    control::consumers::{create, take, wait_position},
    harness::{Outgoing, Raw, Role, Server, Site, site::merged},
    wire::mirror::begin_as,
};

const TARGET: &str = "ALL";
/// Messages in a row of one source: more than a search passes one by one.
const ROW: u64 = 6_000;

async fn begin(kind: &str, version: &str) -> Result<(Site, Value)> {
    if kind != "copy" {
        return begin_as(kind, version, &[]).await;
    }
    let target = Server::builder(Role::Target).version(version).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    Ok((site, json!({})))
}

async fn publish(raw: &mut Raw, side: &str, numbers: std::ops::RangeInclusive<u64>) -> Result<()> {
    raw.publish_all(numbers.map(|number| Outgoing::new(format!("orders.{side}"), number.to_string()))).await?;
    Ok(())
}

async fn are_known_apart(kind: &str, version: &str) -> Result<()> {
    let (site, fields) = begin(kind, version).await?;
    let west = Server::start(Role::Source).await?;
    let mut sources = [site.source_stream(ID, json!({})).await?, Raw::connect(&west.url()).await?];
    sources[1].create_stream(ID, json!({"subjects": ["orders.>"]})).await?;
    let urls = [site.source.url(), west.url()];
    for (url, side) in urls.iter().zip(["east", "west"]) {
        let own = json!({"name": side, "source_url": url, "target_stream": TARGET, "consumers": [format!("{side}-*")]});
        site.add(ID, merged(fields.clone(), own)).await?;
    }
    // Long rows of one source between messages of the other one.
    for (side, numbers) in [(0, 1..=300), (1, 1..=ROW), (0, 301..=700), (1, ROW + 1..=ROW + 100)] {
        let (name, last) = (["east", "west"][side], *numbers.end());
        publish(&mut sources[side], name, numbers).await?;
        site.settled(&format!("{ID}.{name}"), last).await?;
    }
    let mut target = site.target().await?;
    let stored = target.read_stream(TARGET).await?;
    ensure!(stored.len() as u64 == ROW + 800, "{} messages\n{}", stored.len(), site.service.log());
    // Consumers begin exactly after what was acknowledged, before, in and after the rows.
    for (side, acknowledged) in [(0, 0), (0, 200), (0, 300), (0, 450), (0, 700), (1, 3_000), (1, ROW), (1, ROW + 50)] {
        let name = ["east", "west"][side];
        let consumer = format!("{name}-{acknowledged}");
        create(&mut sources[side], ID, &consumer, json!({"max_ack_pending": 10_000})).await?;
        take(&urls[side], ID, &consumer, acknowledged, |_| true).await?;
        let next = (acknowledged + 1).to_string();
        let is_next = |message: &&crate::harness::Stored| {
            message.subject == format!("orders.{name}") && message.payload == next.as_bytes()
        };
        let start = stored.iter().find(is_next).map_or(ROW + 801, |message| message.seq);
        let at_target = wait_position(&mut target, TARGET, &consumer, acknowledged).await?;
        assert_eq!(at_target["config"]["opt_start_seq"], start, "{kind} {version} {consumer}: {at_target}");
    }
    // A loss of one is found, and not in the other one.
    let lost = stored.iter().find(|message| message.subject == "orders.east" && message.payload == b"320");
    let lost = lost.context("message 320")?.seq;
    target.api(&format!("STREAM.MSG.DELETE.{TARGET}"), json!({"seq": lost})).await?;
    let found = verified(&site, "ORDERS.east", json!({})).await?;
    let seen = (ranges(&found, "missing"), &found["findings"], &found["expected"]);
    assert_eq!(seen, (vec![(320, 320)], &json!(1), &json!({"other_writer": ROW + 100})), "{kind} {version}: {found:#}");
    let found = verified(&site, "ORDERS.west", json!({})).await?;
    clean(&found, &site).with_context(|| format!("{kind} {version}"))?;
    let seen = (&found["source_messages"], &found["expected"]);
    assert_eq!(seen, (&json!(ROW + 100), &json!({"other_writer": 699})), "{kind} {version}: {found:#}");
    Ok(())
}

#[tokio::test]
async fn two_sources_of_one_name_are_known_apart() -> Result<()> {
    for version in ["2.10.26", "2.15.1"] {
        are_known_apart("source", version).await?;
    }
    Ok(())
}

#[tokio::test]
async fn two_copies_of_one_name_are_known_apart() -> Result<()> {
    for version in ["2.10.26", "2.15.1"] {
        are_known_apart("copy", version).await?;
    }
    Ok(())
}
