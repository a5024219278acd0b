//! Sampling in a native feed: it decides as a copy does, whatever is restarted.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::mirror::begin_as;
use crate::harness::{LIMIT, Outgoing, Raw, Site, Stored, site::merged, wait_for};

const STREAM: &str = "NODES";
/// An old server, and one with a durable consumer for its sources.
const TARGETS: [&str; 2] = ["2.10.26", "2.15.1"];

fn report(sender: &str, number: u64) -> Outgoing {
    Outgoing::new("nodes.report", json!({"sender": sender, "number": number}).to_string())
}

/// The reports of three senders, one after another.
fn reports(numbers: std::ops::RangeInclusive<u64>) -> impl Iterator<Item = Outgoing> {
    numbers.flat_map(|number| ["a", "b", "c"].map(|sender| report(sender, number)))
}

async fn sampled(kind: &str, version: &str, stream: Value, fields: Value) -> Result<(Site, Raw)> {
    let (site, feed) = begin_as(kind, version, &["--instance", "one"]).await?;
    let source = site.source_stream(STREAM, merged(json!({"subjects": ["nodes.>"]}), stream)).await?;
    let sampling = json!({"inspect_field": "sender", "inspect_duration": "1h", "size_trigger": 1000});
    site.add(STREAM, merged(merged(feed, sampling), fields)).await?;
    Ok((site, source))
}

/// Sender and number of each message at the target.
fn contents(stored: &[Stored]) -> Result<Vec<(String, u64)>> {
    let of = |message: &Stored| {
        let report: Value = serde_json::from_slice(&message.payload)?;
        let sender = report["sender"].as_str().context("no sender")?;
        anyhow::Ok((sender.to_owned(), report["number"].as_u64().context("no number")?))
    };
    stored.iter().map(of).collect()
}

async fn fed_are(site: &Site, what: &str, expect: &[(&str, u64)]) -> Result<()> {
    let expect: Vec<_> = expect.iter().map(|(sender, number)| ((*sender).to_owned(), *number)).collect();
    let mut found = Vec::new();
    let are = async || {
        let stored = async { site.target().await?.read_stream(STREAM).await };
        found = stored.await.and_then(|stored| contents(&stored)).unwrap_or_default();
        found == expect
    };
    let fed = wait_for("the samples to be fed", LIMIT, are).await;
    fed.with_context(|| format!("{what}: {found:?}\n{}", site.service.log()))
}

#[tokio::test]
async fn each_sender_is_fed_once_over_kills() -> Result<()> {
    for (version, kind) in TARGETS.into_iter().flat_map(|version| [(version, "mirror"), (version, "source")]) {
        let what = format!("{kind} at {version}");
        let (mut site, mut source) = sampled(kind, version, json!({}), json!({})).await?;
        source.publish_all(reports(1..=100)).await?;
        fed_are(&site, &what, &[("a", 1), ("b", 1), ("c", 1)]).await?;
        let row = site.settled(STREAM, 300).await.context(what.clone())?;
        assert_eq!(row["counters"]["skipped_sampled"], 297, "{what}: {row}");
        assert_eq!(row["sampling"]["senders"], 3, "{what}: {row}");

        site.service.kill()?;
        source.publish_all(reports(101..=200)).await?;
        site.service.restart().await?;
        source.publish(&report("d", 1)).await?;
        source.publish(&report(&"e".repeat(10), 7)).await?;
        let expect = [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("eeeeeeeeee", 7)];
        fed_are(&site, &what, &expect).await?;
        site.settled(STREAM, 602).await.context(what.clone())?;
        site.target.kill()?;
        source.publish_all(reports(201..=210)).await?;
        site.target.restart().await?;
        source.publish(&report("f", 9)).await?;
        fed_are(&site, &what, &[&expect[..], &[("f", 9)]].concat()).await?;
        if kind == "mirror" {
            let stored = site.target().await?.read_stream(STREAM).await?;
            let numbers: Vec<_> = stored.iter().map(|message| message.seq).collect();
            assert_eq!(numbers, [1, 2, 3, 601, 602, 633], "{what}");
        }
    }
    Ok(())
}

/// The records of senders hold before the source forgets.
#[tokio::test]
async fn a_sampled_queue_is_fed_and_emptied() -> Result<()> {
    let queue = json!({"retention": "workqueue"});
    let (mut site, mut source) = sampled("source", "2.15.1", queue, json!({})).await?;
    for part in 0..3 {
        source.publish_all(reports(part * 100 + 1..=part * 100 + 100)).await?;
        let mut last = Value::Null;
        let empty = async || {
            last = source.stream_state(STREAM).await.unwrap_or_default();
            last["messages"] == 0
        };
        let emptied = wait_for("the queue to be empty", LIMIT, empty).await;
        emptied.with_context(|| format!("{last}\n{}", site.service.log()))?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    fed_are(&site, "a queue", &[("a", 1), ("b", 1), ("c", 1)]).await
}

/// Advisories go to the source, as those of a copy.
#[tokio::test]
async fn new_senders_of_a_feed_are_advised() -> Result<()> {
    let advisory = json!({"advisory": {"subject": "advice.%s.%v", "reliable": true}});
    let (site, mut source) = sampled("mirror", "2.15.1", json!({}), advisory).await?;
    source.create_stream("ADVICE", json!({"subjects": ["advice.>"]})).await?;
    source.publish_all(reports(1..=20)).await?;
    let mut subjects = Vec::new();
    let advised = async || {
        let stored = source.read_stream("ADVICE").await.unwrap_or_default();
        subjects = stored.into_iter().map(|message| message.subject).collect();
        subjects.len() >= 3
    };
    wait_for("an advisory for each sender", LIMIT, advised).await.with_context(|| site.service.log())?;
    assert_eq!(subjects, ["advice.new.a", "advice.new.b", "advice.new.c"]);
    Ok(())
}
