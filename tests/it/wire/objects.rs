//! An object store is copied so that whoever reads the copy finds whole objects or none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, object_store};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::harness::{LIMIT, Site, connect, wait_for};

/// Bytes of a chunk; small, so that an object has many.
const CHUNK: usize = 1_000;

async fn store(url: &str) -> Result<object_store::ObjectStore> {
    let js = jetstream::new(connect(url).await?);
    Ok(js.create_object_store(object_store::Config { bucket: "files".into(), ..Default::default() }).await?)
}

async fn put(store: &object_store::ObjectStore, name: &str, body: &[u8]) -> Result<()> {
    let meta = object_store::ObjectMetadata { name: name.to_owned(), chunk_size: Some(CHUNK), ..Default::default() };
    store.put(meta, &mut &body[..]).await?;
    Ok(())
}

/// What a reader of a store gets: `None` where there is no such object. An object that is broken is an error.
async fn read(store: &object_store::ObjectStore, name: &str) -> Result<Option<Vec<u8>>> {
    let mut object = match store.get(name).await {
        Ok(object) => object,
        Err(error) if error.kind() == object_store::GetErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut body = Vec::new();
    // Checks the digest at the end.
    tokio::time::timeout(LIMIT, object.read_to_end(&mut body)).await.context("a reader hangs")??;
    ensure!(body.len() == object.info().size, "{name}: {} of {} bytes", body.len(), object.info().size);
    Ok(Some(body))
}

fn body(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i * 31 + seed * 7) % 251) as u8).collect()
}

async fn end(site: &Site) -> Result<u64> {
    let state = site.source().await?.stream_state("OBJ_files").await?;
    Ok(state["last_seq"].as_u64().unwrap_or_default())
}

async fn copied(site: &Site) -> Result<Value> {
    site.settled("OBJ_files", end(site).await?).await
}

/// The reader of the copy, all the time while the service is killed again and again and objects are replaced.
#[tokio::test]
async fn a_reader_of_the_copy_never_meets_a_broken_object() -> Result<()> {
    let mut site = Site::start().await?;
    let source = store(&site.source.url()).await?;
    for i in 0..5 {
        put(&source, &format!("object-{i}"), &body(i, 40 * CHUNK + i)).await?;
    }
    site.add("OBJ_files", json!({})).await?;
    copied(&site).await?;
    let target = jetstream::new(connect(&site.target.url()).await?).get_object_store("files").await?;

    let stop = Arc::new(AtomicBool::new(false));
    let reading = tokio::spawn({
        let (stop, target) = (stop.clone(), target.clone());
        async move {
            let mut whole = 0;
            while !stop.load(Ordering::Relaxed) {
                for i in 0..5 {
                    whole += usize::from(read(&target, &format!("object-{i}")).await?.is_some());
                }
                // Each read leaves a consumer for a while, and a server has room for so many.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(whole)
        }
    });
    for round in 1..=6 {
        for i in 0..5 {
            put(&source, &format!("object-{i}"), &body(round * 10 + i, 60 * CHUNK + round)).await?;
        }
        site.service.kill()?;
        site.service.restart().await?;
    }
    source.delete("object-4").await?;
    copied(&site).await?;
    wait_for("the deletion at the copy", LIMIT, async || matches!(read(&target, "object-4").await, Ok(None))).await?;
    stop.store(true, Ordering::Relaxed);
    let whole = reading.await??;
    println!("read whole objects {whole} times meanwhile");
    ensure!(whole > 0, "the reader never read");
    for i in 0..4 {
        let name = format!("object-{i}");
        ensure!(read(&target, &name).await? == Some(body(60 + i, 60 * CHUNK + 6)), "{name} is not the newest");
    }
    Ok(())
}

/// A copy that begins in the middle of an object leaves that object out, and says so.
#[tokio::test]
async fn an_object_without_all_of_its_chunks_is_left_out_and_told() -> Result<()> {
    let site = Site::start().await?;
    let source = store(&site.source.url()).await?;
    put(&source, "half", &body(1, 10 * CHUNK)).await?;
    put(&source, "whole", &body(2, 10 * CHUNK)).await?;
    site.add("OBJ_files", json!({"start_sequence": 5})).await?;
    let row = copied(&site).await?;
    assert_eq!(row["counters"]["skipped_incomplete"], 1, "{row}");
    assert_eq!(row["counters"]["copied"], 6 + 11, "{row}");
    let told = site.events.ever("object-incomplete").await?;
    assert_eq!((&told["object"], &told["chunks"], &told["found"]), (&json!("half"), &json!(10), &json!(6)), "{told}");
    assert_eq!(told["source_seq"], 11, "{told}");
    let target = jetstream::new(connect(&site.target.url()).await?).get_object_store("files").await?;
    assert_eq!(read(&target, "half").await?, None);
    assert_eq!(read(&target, "whole").await?, Some(body(2, 10 * CHUNK)));
    Ok(())
}

/// Chunks are read in the order of the stream: on a target without batches one message is in flight at a time.
#[tokio::test]
async fn the_order_of_chunks_is_strict_on_a_target_without_batches() -> Result<()> {
    let site = Site::start().await?;
    let source = store(&site.source.url()).await?;
    put(&source, "object", &body(1, 200 * CHUNK)).await?;
    let subjects = json!({"subjects": ["$O.files.C.>", "$O.files.M.>"], "allow_rollup_hdrs": true, "discard": "new"});
    site.target_stream("OBJ_files", subjects).await?;
    site.add("OBJ_files", json!({"ordering": "relaxed"})).await?;
    let row = copied(&site).await?;
    assert_eq!((&row["transport"], &row["ordering"]), (&json!("pipelined"), &json!("strict")), "{row}");
    let target = jetstream::new(connect(&site.target.url()).await?).get_object_store("files").await?;
    assert_eq!(read(&target, "object").await?, Some(body(1, 200 * CHUNK)));
    Ok(())
}
