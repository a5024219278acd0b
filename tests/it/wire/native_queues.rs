//! Native feeds of work-queue and interest streams: the source removes what is acknowledged, so nothing is before the target holds it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    mirror::{begin_as, error},
    native_faults::ASKS_WITHIN,
};
use crate::harness::{Outgoing, Raw, Site, site::merged, wait_for};

const STREAM: &str = "ORDERS";
const TARGET: &str = "COPIED";

/// A site whose source is a work queue.
async fn begin(kind: &str, version: &str) -> Result<(Site, Value)> {
    let (site, fields) = begin_as(kind, version, &[]).await?;
    site.source_stream(STREAM, json!({"retention": "workqueue", "allow_rollup_hdrs": true})).await?;
    Ok((site, merged(fields, json!({"target_stream": TARGET}))))
}

/// Changes the configuration of the target stream.
async fn change(site: &Site, change: &Value) -> Result<()> {
    let mut target = site.target().await?;
    let config = target.api(&format!("STREAM.INFO.{TARGET}"), Value::Null).await?["config"].clone();
    target.api(&format!("STREAM.UPDATE.{TARGET}"), merged(config, change.clone())).await?;
    Ok(())
}

/// Waits until the source has removed everything, which it does when that is acknowledged.
async fn acknowledged(source: &mut Raw) -> Result<()> {
    let empty = async || source.stream_state(STREAM).await.is_ok_and(|state| state["messages"] == 0);
    wait_for("the source to remove its messages", ASKS_WITHIN, empty).await
}

/// The newest message is refused by the target, whose server answers flow control all the same.
#[tokio::test]
async fn a_refused_message_stays_in_the_queue() -> Result<()> {
    let per_subject = json!({"discard": "new", "max_msgs_per_subject": 1, "discard_new_per_subject": true});
    let no_rollup = json!({"allow_rollup_hdrs": false});
    let cases = [
        ("mirror", "2.15.1", &per_subject),
        ("mirror", "2.12.8", &no_rollup),
        ("mirror", "2.10.26", &no_rollup),
        ("source", "2.15.1", &per_subject),
        ("source", "2.12.8", &no_rollup),
        ("source", "2.10.26", &no_rollup),
    ];
    let cases = cases.map(async |(kind, version, config)| {
        let what = format!("{kind} at {version}");
        let (mut site, fields) = begin(kind, version).await?;
        let mut source = site.source().await?;
        source.publish_all((1..=5).map(|number| Outgoing::new(format!("orders.{number}"), "x"))).await?;
        site.add(STREAM, fields).await?;
        site.settled_within(STREAM, 5, ASKS_WITHIN).await.with_context(|| what.clone())?;
        acknowledged(&mut source).await.with_context(|| what.clone())?;
        change(&site, config).await?;
        let message = Outgoing::new("orders.1", "y");
        let rolls_up = config == &no_rollup;
        source.publish(&if rolls_up { message.with_lines(&["Nats-Rollup: sub"]) } else { message }).await?;
        let held = |row: &Value| row["state"] == "held" && error(row).contains("does not store source message 6");
        let is_held = async || site.row(STREAM).await.is_some_and(|row| held(&row));
        let found = wait_for("the feed to be held", ASKS_WITHIN, is_held).await;
        found.with_context(|| format!("{what}\n{}", site.service.log()))?;
        let row = site.row(STREAM).await.context("a row")?;
        ensure!(row["position"]["source_seq"] == 5 && row["counters"]["copied"] == 5, "{what}: {row}");
        let left = source.stream_state(STREAM).await?;
        ensure!(left["messages"] == 1, "{what}: {left}");
        // The target can store it now.
        let can = json!({"discard": "old", "max_msgs_per_subject": -1, "discard_new_per_subject": false,
            "allow_rollup_hdrs": true});
        change(&site, &can).await?;
        if kind == "mirror" {
            // Without that, its server expects another sequence after each message that it refused.
            site.target.restart().await?;
        }
        site.send("retry", json!({"replication": STREAM})).await?;
        site.settled_within(STREAM, 6, ASKS_WITHIN).await.with_context(|| what.clone())?;
        acknowledged(&mut source).await.with_context(|| what.clone())?;
        let stored = site.target().await?.read_stream(TARGET).await?;
        ensure!(stored.iter().any(|message| message.payload == b"y"), "{what}: {stored:?}");
        anyhow::Ok(())
    });
    for case in futures_util::future::join_all(cases).await {
        case?;
    }
    Ok(())
}

/// The queue pushes more than the reader may hold before the source has said that it is the stream that was compared.
#[tokio::test]
async fn a_narrow_bound_does_not_stall_the_start() -> Result<()> {
    for kind in ["mirror", "source"] {
        let (site, fields) = begin(kind, "2.15.1").await?;
        let mut source = site.source().await?;
        source
            .publish_all((0..1_000).map(|number| Outgoing::new("orders.x", vec![b'a' + number as u8 % 26; 3_000])))
            .await?;
        site.add(STREAM, merged(fields, json!({"limits": {"bytes_in_flight": 65_536}}))).await?;
        site.settled_within(STREAM, 1_000, ASKS_WITHIN).await.with_context(|| site.service.log())?;
        acknowledged(&mut source).await?;
    }
    Ok(())
}
