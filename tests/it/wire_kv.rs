//! A KV bucket is copied so that it reads the same through the KV API.

use std::collections::BTreeMap;

use anyhow::Result;
use async_nats::jetstream::{self, kv};
use futures_util::TryStreamExt;
use serde_json::json;

use crate::harness::{LIMIT, Site, connect, wait_for};

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
