//! A source that goes back and comes back: an older copy of its store, and then the newer one again; in a cluster; and where
//! the source forgets what was acknowledged.

use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{Cluster, Expect, LIMIT, Outgoing, Raw, Role, SITE, Site, request, wait_value};

const STREAM: &str = "S";

fn only_at_target(from: u64, to: u64) -> Value {
    json!({"from": from, "to": to, "target_from": from, "target_to": to, "messages": to - from + 1})
}

/// A copy of 100 messages, with the store of the source as it was at 60, 80 and 100.
async fn kept(target: Value) -> Result<Site> {
    let mut site = Site::start().await?;
    site.source_stream(STREAM, json!({})).await?;
    if target != Value::Null {
        site.target_stream(STREAM, target).await?;
    }
    site.publish(STREAM, 1..=60).await?;
    site.add(STREAM, json!({})).await?;
    for (last, name) in [(60, "old"), (80, "middle"), (100, "new")] {
        if last > 60 {
            site.publish(STREAM, last - 19..=last).await?;
        }
        site.settled(STREAM, last).await?;
        site.source.keep(name).await?;
    }
    site.settled(STREAM, 100).await?;
    site.source.put_back("old").await?;
    site.events.wait("source-reset", STREAM).await?;
    let row = site.settled(STREAM, 60).await?;
    assert_eq!(row["only_at_target"], only_at_target(61, 100), "{row}");
    Ok(site)
}

/// Of both transports; message ids are forgotten at once, so that they do not hide what is copied again.
fn targets() -> [Value; 2] {
    [Value::Null, json!({"duplicate_window": 100_000_000})]
}

#[tokio::test]
async fn what_a_restored_source_has_again_is_not_copied_again() -> Result<()> {
    for target in targets() {
        let mut site = kept(target).await?;
        site.source.put_back("new").await?;
        site.publish(STREAM, 101..=110).await?;
        let row = site.settled(STREAM, 110).await?;
        assert_eq!(row["only_at_target"], Value::Null, "{row}");
        site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await?;
        // Nor does a restart bring it back.
        site.stop().await?;
        site.service.restart().await?;
        site.publish(STREAM, 111..=120).await?;
        let row = site.settled(STREAM, 120).await?;
        assert_eq!(row["only_at_target"], Value::Null, "{row}");
        assert_eq!(site.events.told("source-reset").len(), 1);
        site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_a_restored_source_still_lacks_is_still_named() -> Result<()> {
    for target in targets() {
        let mut site = kept(target).await?;
        site.source.put_back("middle").await?;
        let row = site.settled(STREAM, 80).await?;
        assert_eq!(row["only_at_target"], only_at_target(81, 100), "{row}");
        site.publish(STREAM, 901..=910).await?;
        let row = site.settled(STREAM, 90).await?;
        assert_eq!((&row["only_at_target"], site.at_target(STREAM).await?), (&only_at_target(81, 100), 110), "{row}");
        // Other messages are there by now: what is back takes their places.
        site.source.put_back("new").await?;
        site.publish(STREAM, 101..=110).await?;
        let row = site.settled(STREAM, 110).await?;
        let lost = json!({"from": 81, "to": 90, "target_from": 101, "target_to": 110, "messages": 10});
        assert_eq!((&row["only_at_target"], site.at_target(STREAM).await?), (&lost, 120), "{row}");
    }
    Ok(())
}

/// The replication is connected to another server than the one that has the stream, and stays so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_without_replicas_in_a_cluster_goes_back() -> Result<()> {
    for on_loss in ["follow", "hold"] {
        let mut source = Cluster::start(Role::Source).await?;
        let mut site = Site::start().await?;
        let config = json!({"name": STREAM, "subjects": ["s.>"], "num_replicas": 1});
        let create = async || source.ask(&format!("STREAM.CREATE.{STREAM}"), &config).await;
        wait_value("a stream", LIMIT, create).await?;
        source.wait_leaders(&[STREAM], None).await?;
        let at = source.leader(STREAM).await.context("no leader")?;
        let other = source.servers[(at + 1) % 3].url();
        let publish = async |numbers: RangeInclusive<u64>| -> Result<u64> {
            let mut messages = numbers.map(|i| Outgoing::new("s.a", i.to_string()));
            let first = messages.next().context("no message")?;
            // The other server learns only now that there is somebody who stores it.
            let stored = async || Raw::connect(&other).await.ok()?.publish(&first).await.ok();
            wait_value("the stream to take messages", LIMIT, stored).await?;
            Raw::connect(&other).await?.publish_all(messages).await
        };
        publish(1..=60).await?;
        site.add(STREAM, json!({"source_url": other, "on_source_loss": on_loss})).await?;
        site.settled(STREAM, 60).await?;
        source.servers[at].keep("old").await?;
        source.wait_leaders(&[STREAM], None).await?;
        publish(61..=100).await?;
        // A cluster of version 2.10 that has lost a server may take its time for a new consumer.
        site.settled_within(STREAM, 100, 2 * LIMIT).await?;
        source.servers[at].put_back("old").await?;
        let event = site.events.wait("source-reset", STREAM).await?;
        assert_eq!(event["only_at_target"], only_at_target(61, 100), "{event}");
        source.wait_leaders(&[STREAM], None).await?;
        publish(901..=910).await?;
        if on_loss == "hold" {
            let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
            assert_eq!(row["only_at_target"], only_at_target(61, 100), "{row}");
            assert_eq!(site.at_target(STREAM).await?, 100);
        } else {
            let row = site.settled(STREAM, 70).await?;
            assert_eq!(row["only_at_target"], only_at_target(61, 100), "{row}");
            assert_eq!(site.at_target(STREAM).await?, 110);
        }
    }
    Ok(())
}

/// The older store has messages again that were copied and acknowledged since, and lacks newer ones.
#[tokio::test]
async fn a_work_queue_put_back_is_copied_once() -> Result<()> {
    for on_loss in ["follow", "hold"] {
        let mut site = Site::start().await?;
        site.source_stream(STREAM, json!({"retention": "workqueue"})).await?;
        site.publish(STREAM, 1..=60).await?;
        site.add(STREAM, json!({"on_source_loss": on_loss})).await?;
        site.settled(STREAM, 60).await?;
        site.stop().await?;
        site.publish(STREAM, 61..=80).await?;
        site.source.keep("old").await?;
        site.service.restart().await?;
        site.settled(STREAM, 80).await?;
        site.publish(STREAM, 81..=100).await?;
        site.settled(STREAM, 100).await?;
        let before = site.target().await?.read_stream(STREAM).await?.len();
        assert_eq!(before, 100);
        site.source.put_back("old").await?;
        let event = site.events.wait("source-reset", STREAM).await?;
        assert_eq!(event["only_at_target"], only_at_target(81, 100), "{event}");
        if on_loss == "hold" {
            site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
            request(&site.client, "replicator.config.update", site.document(STREAM)).await?;
        }
        site.publish(STREAM, 901..=910).await?;
        let row = site.settled(STREAM, 90).await?;
        assert_eq!(row["only_at_target"], only_at_target(81, 100), "{row}");
        let payloads = site.target().await?.read_stream(STREAM).await?.into_iter().map(|message| message.payload);
        let expect = (1..=100).chain(901..=910).map(|i: u64| i.to_string().into_bytes());
        assert_eq!(payloads.collect::<Vec<_>>(), expect.collect::<Vec<_>>());
    }
    Ok(())
}
