//! Streams whose messages belong together, fed by a native kind: object stores and counters.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, object_store};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::{leafnode::VERSIONS, mirror::begin_as};
use crate::harness::{LIMIT, Outgoing, Site, Stored, connect, wait_for};

const BUCKET: &str = "OBJ_files";
const COUNTERS: &str = "COUNTERS";

/// An object in chunks of 1,000 bytes.
async fn put(store: &object_store::ObjectStore, name: &str, body: &[u8]) -> Result<()> {
    let meta = object_store::ObjectMetadata { name: name.to_owned(), chunk_size: Some(1_000), ..Default::default() };
    store.put(meta, &mut &body[..]).await?;
    Ok(())
}

/// The bytes of an object; its digest is checked.
async fn read(store: &object_store::ObjectStore, name: &str) -> Result<Vec<u8>> {
    let mut object = store.get(name).await?;
    let mut body = Vec::new();
    tokio::time::timeout(LIMIT, object.read_to_end(&mut body)).await.context("a reader hangs")??;
    Ok(body)
}

async fn fed(site: &Site, stream: &str) -> Result<()> {
    let last = site.source().await?.stream_state(stream).await?["last_seq"].as_u64().unwrap_or_default();
    site.settled(stream, last).await?;
    Ok(())
}

/// Objects are replaced and deleted while they are fed: a reader of the target gets the newest.
#[tokio::test]
async fn object_stores_are_fed() -> Result<()> {
    for (version, kind) in VERSIONS.into_iter().flat_map(|version| [(version, "mirror"), (version, "source")]) {
        let what = format!("{version}, {kind}");
        let (site, fields) = begin_as(kind, version, &[]).await?;
        let js = jetstream::new(connect(&site.source.url()).await?);
        let config = object_store::Config { bucket: "files".into(), ..Default::default() };
        let source = js.create_object_store(config).await?;
        put(&source, "kept", &[1; 20_500]).await?;
        put(&source, "replaced", &[2; 30_000]).await?;
        put(&source, "deleted", &[3; 5_000]).await?;
        site.add(BUCKET, fields).await?;
        fed(&site, BUCKET).await.with_context(|| what.clone())?;
        put(&source, "replaced", &[4; 10_001]).await?;
        source.delete("deleted").await?;
        fed(&site, BUCKET).await.with_context(|| what.clone())?;

        let target = jetstream::new(connect(&site.target.url()).await?).get_object_store("files").await?;
        ensure!(read(&target, "kept").await? == [1; 20_500], "{what}");
        ensure!(read(&target, "replaced").await? == [4; 10_001], "{what}");
        let deleted = target.get("deleted").await.err().map(|error| error.kind());
        assert_eq!(deleted, Some(object_store::GetErrorKind::NotFound), "{what}");
    }
    Ok(())
}

/// The newest value of a counter, and how often it was changed.
fn value(stored: &[Stored], subject: &str) -> Result<(i64, usize)> {
    let of: Vec<_> = stored.iter().filter(|message| message.subject == subject).collect();
    let newest: Value = serde_json::from_slice(&of.last().context("no counter")?.payload)?;
    Ok((newest["val"].as_str().context("no value")?.parse()?, of.len()))
}

/// A mirror has what the source stored. A source adds up what it takes, as the server does for its own sources.
#[tokio::test]
async fn counters_are_fed() -> Result<()> {
    for (version, kind) in VERSIONS.into_iter().flat_map(|version| [(version, "mirror"), (version, "source")]) {
        let what = format!("{version}, {kind}");
        let (mut site, fields) = begin_as(kind, version, &[]).await?;
        ensure!(site.source.at_least(2, 12), "the source has no counters");
        let config = json!({"subjects": ["count.>"], "allow_msg_counter": true, "allow_direct": true});
        let mut source = site.source_stream(COUNTERS, config).await?;
        let add =
            |subject: &str, by: i64| Outgoing::new(subject.to_owned(), "").with_lines(&[&format!("Nats-Incr: {by:+}")]);
        source.publish_all([add("count.a", 5), add("count.b", 7), add("count.a", -2)]).await?;
        site.add(COUNTERS, fields).await?;
        fed(&site, COUNTERS).await.with_context(|| what.clone())?;
        site.service.kill()?;
        site.service.restart().await?;
        source.publish_all([add("count.a", 10), add("count.c", 1)]).await?;
        fed(&site, COUNTERS).await.with_context(|| what.clone())?;

        let last = async || site.target().await.ok()?.stream_state(COUNTERS).await.ok()?["last_seq"].as_u64();
        wait_for("the last counter", LIMIT, async || last().await == Some(5)).await?;
        let (from, to) = (source.read_stream(COUNTERS).await?, site.target().await?.read_stream(COUNTERS).await?);
        ensure!(kind == "source" || from == to, "{what}: {from:?} became {to:?}");
        for (subject, expect) in [("count.a", (13, 3)), ("count.b", (7, 1)), ("count.c", (1, 1))] {
            assert_eq!(value(&to, subject).with_context(|| what.clone())?, expect, "{what} {subject}: {to:?}");
        }
    }
    Ok(())
}
