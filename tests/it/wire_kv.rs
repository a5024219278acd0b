//! A KV bucket is copied so that it reads the same through the KV API.

use std::collections::BTreeMap;

use anyhow::Result;
use async_nats::jetstream::{self, kv};
use futures_util::TryStreamExt;
use serde_json::json;

use crate::harness::{LIMIT, Outgoing, Site, connect, wait_for};

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

/// A key with a time to live of its own goes from the copy as well, and is marked as gone there as at the source.
#[tokio::test]
async fn a_key_that_expires_is_gone_from_the_copy_too() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 11) || !site.target.at_least(2, 11) {
        return Ok(());
    }
    let config = json!({"subjects": ["$KV.t.>"], "max_msgs_per_subject": 5, "allow_rollup_hdrs": true,
        "deny_delete": true, "allow_msg_ttl": true, "subject_delete_marker_ttl": 3_600_000_000_000_u64});
    let mut raw = site.source_stream("KV_t", config).await?;
    raw.publish(&Outgoing::new("$KV.t.short", "here").with_lines(&["Nats-TTL: 3s"])).await?;
    raw.publish(&Outgoing::new("$KV.t.long", "here").with_lines(&["Nats-TTL: 1h"])).await?;
    site.add("KV_t", json!({})).await?;
    let bucket =
        |url: String| async move { anyhow::Ok(jetstream::new(connect(&url).await?).get_key_value("t").await?) };
    site.settled("KV_t", 2).await?;
    let (source, copy) = (bucket(site.source.url()).await?, bucket(site.target.url()).await?);
    assert_eq!(copy.get("short").await?.as_deref(), Some(b"here".as_slice()));
    for (bucket, where_) in [(&source, "source"), (&copy, "copy")] {
        // What is left is the server's marker: empty to clients that do not know such markers.
        let gone = async || bucket.get("short").await.is_ok_and(|value| value.is_none_or(|value| value.is_empty()));
        wait_for(&format!("the key to expire at the {where_}"), LIMIT, gone).await?;
    }
    // The server's marker is a message like any other.
    let state = site.source().await?.stream_state("KV_t").await?;
    site.settled("KV_t", state["last_seq"].as_u64().unwrap_or_default()).await?;
    assert_eq!(contents(&copy).await?, contents(&source).await?);
    assert_eq!(copy.get("long").await?.as_deref(), Some(b"here".as_slice()));
    let row = site.row("KV_t").await.unwrap_or_default();
    assert_eq!(row["counters"]["headers_removed"], 0, "{row}");
    Ok(())
}
