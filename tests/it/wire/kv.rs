//! A KV bucket is copied so that it reads the same through the KV API.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use async_nats::jetstream::{self, kv};
use futures_util::TryStreamExt;
use serde_json::json;

use crate::harness::{LIMIT, Outgoing, Site, connect, raw::header_values, site::merged, wait_for};

async fn contents(bucket: &kv::Store) -> Result<BTreeMap<String, Vec<u8>>> {
    let keys: Vec<String> = bucket.keys().await?.try_collect().await?;
    let mut all = BTreeMap::new();
    for key in keys {
        if let Some(value) = bucket.get(&key).await? {
            all.insert(key, value.to_vec());
        }
    }
    Ok(all)
}

async fn history(bucket: &kv::Store, key: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let entries: Vec<kv::Entry> = bucket.history(key).await?.try_collect().await?;
    Ok(entries.into_iter().map(|entry| (format!("{:?}", entry.operation), entry.value.to_vec())).collect())
}

#[tokio::test]
async fn a_bucket_reads_the_same_live() -> Result<()> {
    let site = Site::start().await?;
    let source = jetstream::new(connect(&site.source.url()).await?);
    let bucket = source.create_key_value(kv::Config { bucket: "x".into(), history: 5, ..Default::default() }).await?;
    for i in 0..50 {
        bucket.put(format!("key.{}", i % 10), format!("value {i}").into()).await?;
    }
    let revision = bucket.create("cas", "one".into()).await?;
    let revision = bucket.update("cas", "two".into(), revision).await?;
    bucket.update("cas", "three".into(), revision).await?;
    bucket.delete("key.1").await?;
    bucket.purge("key.2").await?;

    site.add("KV_x", json!({})).await?;
    let target = jetstream::new(connect(&site.target.url()).await?);
    let settled = async || -> Result<()> {
        let state = site.source().await?.stream_state("KV_x").await?;
        site.settled("KV_x", state["last_seq"].as_u64().unwrap_or_default()).await.map(|_| ())
    };
    settled().await?;
    let copy = target.get_key_value("x").await?;
    assert_eq!(contents(&copy).await?, contents(&bucket).await?);
    for key in ["cas", "key.1", "key.2", "key.3"] {
        assert_eq!(history(&copy, key).await?, history(&bucket, key).await?, "{key}");
    }

    // Live, while the copy runs.
    let revision = bucket.entry("cas").await?.map(|entry| entry.revision).unwrap_or_default();
    bucket.update("cas", "four".into(), revision).await?;
    bucket.put("new", "late".into()).await?;
    bucket.delete("key.3").await?;
    bucket.purge("key.4").await?;
    bucket.create("key.1", "again".into()).await?;
    wait_for("the last change at the copy", LIMIT, async || {
        copy.get("key.1").await.ok().flatten().as_deref() == Some(b"again")
    })
    .await?;
    settled().await?;
    assert_eq!(contents(&copy).await?, contents(&bucket).await?);
    for key in ["cas", "new", "key.1", "key.3", "key.4"] {
        assert_eq!(history(&copy, key).await?, history(&bucket, key).await?, "{key}");
    }
    let row = site.row("KV_x").await.unwrap_or_default();
    assert_eq!((&row["counters"]["errors"], &row["counters"]["headers_removed"]), (&json!(0), &json!(0)), "{row}");
    Ok(())
}

/// `silent` removes what is over without a word, `marked` puts a marker in its place.
#[tokio::test]
async fn entries_with_a_time_to_live_expire_at_the_copy_too() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 11) {
        // This server has no such setting.
        return Ok(());
    }
    tokio::try_join!(expires_at_the_copy_too(&site, "silent", false), expires_at_the_copy_too(&site, "marked", true))?;
    site.events.quiet(&["gap", "held", "stalled", "source-reset", "target-reset"])
}

async fn expires_at_the_copy_too(site: &Site, bucket: &str, marked: bool) -> Result<()> {
    // Longer than a busy machine needs to copy the entry and to read the copy.
    const TTL: u64 = 15;
    let known = site.target.at_least(2, 11);
    let mut raw = site.source().await?;
    let (source, target) = (connect(&site.source.url()).await?, connect(&site.target.url()).await?);
    // A server raises a shorter time to live to that of its markers.
    let marker_ttl = json!({"subject_delete_marker_ttl": Duration::from_secs(TTL).as_nanos() as u64});
    // As the `nats` tool and the client libraries make a bucket.
    let config = json!({"subjects": [format!("$KV.{bucket}.>")], "max_msgs_per_subject": 5, "discard": "new",
        "deny_delete": true, "allow_rollup_hdrs": true, "allow_direct": true, "allow_msg_ttl": true});
    let stream = format!("KV_{bucket}");
    raw.create_stream(&stream, merged(config, if marked { marker_ttl } else { json!({}) })).await?;
    let entry = |key: &str| Outgoing::new(format!("$KV.{bucket}.{key}"), key);
    raw.publish(&entry("kept")).await?;
    site.add(&stream, json!({})).await?;
    site.settled(&stream, 1).await?;
    raw.publish(&entry("long").with_lines(&["Nats-TTL: 1h"])).await?;
    raw.publish(&entry("short").with_lines(&[&format!("Nats-TTL: {TTL}s")])).await?;
    let row = site.settled(&stream, 3).await?;
    let copied = site.target().await?.read_stream(&stream).await?;
    let ttls: Vec<u64> =
        copied.iter().flat_map(|m| header_values(&m.header, "Nats-TTL")).flat_map(|ttl| ttl.parse()).collect();
    if known {
        assert!(matches!(ttls[..], [3_500..=3_600, 1..=TTL]), "{ttls:?}");
    } else {
        assert!(ttls.is_empty(), "{ttls:?}");
    }
    assert_eq!(row["counters"]["headers_removed"], if known { 0 } else { 2 }, "{row}");

    let from = jetstream::new(source).get_key_value(bucket).await?;
    let copy = jetstream::new(target).get_key_value(bucket).await?;
    let over = async |bucket: &kv::Store| matches!(bucket.get("short").await, Ok(None));
    wait_for("the entry to expire at the source", LIMIT, async || over(&from).await).await?;
    let last = raw.stream_state(&stream).await?["last_seq"].as_u64().unwrap_or_default();
    let row = site.settled(&stream, last).await?;
    if marked {
        // The marker is copied like any other message, with its own time to live.
        assert_eq!(last, 4, "{row}");
        let marker = site.target().await?.read_stream(&stream).await?.pop().context("no marker")?;
        assert_eq!(header_values(&marker.header, "Nats-Marker-Reason"), ["MaxAge"]);
        assert_eq!(header_values(&marker.header, "Nats-TTL").is_empty(), !known);
    } else {
        // Nothing was copied that would take it away.
        assert_eq!(last, 3, "{row}");
    }
    if known || marked {
        wait_for("the entry to expire at the copy", LIMIT, async || over(&copy).await).await?;
    } else {
        assert!(copy.get("short").await?.is_some(), "this server knows no time to live");
    }
    let both = contents(&from).await?;
    assert!(both.keys().eq(["kept", "long"]), "{both:?}");
    if known || marked {
        assert_eq!(contents(&copy).await?, both);
    }
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    Ok(())
}
