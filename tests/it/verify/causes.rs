//! What has a reason to be without a copy is counted under it, and a fault beside it is still found.

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, object_store};
use serde_json::{Value, json};

use super::{ID, message, ranges, verified};
use crate::harness::{LIMIT, Outgoing, Raw, Site, connect, raw::wait_messages, request, site::merged, wait_for};

/// Deletes a message of a stream at the target.
async fn delete(site: &Site, stream: &str, seq: u64) -> Result<()> {
    let deleted = site.target().await?.api(&format!("STREAM.MSG.DELETE.{stream}"), json!({"seq": seq})).await?;
    ensure!(deleted["success"] == true, "{deleted}");
    Ok(())
}

/// Checks what a comparison counted under a cause, and the missing messages, which are all that it found.
fn check(found: &Value, expected: &Value, missing: &[(u64, u64)], site: &Site) -> Result<()> {
    let messages: u64 = missing.iter().map(|(from, to)| to - from + 1).sum();
    let good = found["state"] == "done"
        && found["expected"] == *expected
        && ranges(found, "missing") == missing
        && found["findings"] == messages;
    ensure!(good, "not {expected} and {missing:?}: {found:#}\n{}", site.service.log());
    Ok(())
}

#[tokio::test]
async fn what_expired_at_one_side_is_expected() -> Result<()> {
    let site = Site::small().await?;
    let mut source = site.source_stream(ID, json!({"allow_msg_ttl": true})).await?;
    let mut target = site.target_stream(ID, json!({})).await?;
    site.add(ID, json!({})).await?;
    site.row_when(ID, "runs", |row| row["state"] == "running").await?;
    let short = |i: u64| i.is_multiple_of(10);
    let messages = (1..=200).map(|i| {
        let message = Outgoing::new(format!("orders.{}", i % 7), i.to_string());
        if short(i) { message.with_lines(&["Nats-TTL: 3s"]) } else { message.with_lines(&["Nats-TTL: 1h"]) }
    });
    source.publish_all(messages).await?;
    site.settled(ID, 200).await?;
    wait_for("the short ones to expire", LIMIT, async || match site.source().await {
        Ok(mut source) => source.stream_state(ID).await.is_ok_and(|state| state["messages"] == 180),
        Err(_) => false,
    })
    .await?;
    // Those that the copy read in time; they have no time to live at this target.
    let kept = target.stream_state(ID).await?["messages"].as_u64().context("messages")? - 180;
    ensure!(kept > 0, "all expired before they were copied");
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"removed_at_source": kept}), &[], &site)?;
    // One that has not expired.
    let copies = site.target().await?.read_stream(ID).await?;
    let lost = copies.iter().find(|copy| copy.payload == b"55").context("message 55")?;
    delete(&site, ID, lost.seq).await?;
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"removed_at_source": kept}), &[(55, 55)], &site)
}

/// Changes fields of the target stream.
async fn update_target(site: &Site, fields: Value) -> Result<()> {
    let mut target = site.target().await?;
    let config = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?["config"].take();
    target.api(&format!("STREAM.UPDATE.{ID}"), merged(config, fields)).await?;
    Ok(())
}

const SECOND: u64 = 1_000_000_000;

#[tokio::test]
async fn what_only_the_target_lets_expire_is_expected() -> Result<()> {
    let site = Site::small().await?;
    let mut source = site.source_stream(ID, json!({"max_age": 3_600 * SECOND})).await?;
    site.target_stream(ID, json!({"max_age": SECOND})).await?;
    site.add(ID, json!({})).await?;
    // Messages expire before and while it compares.
    let mut written = 0;
    let mut expired = 0;
    for _ in 0..4 {
        for _ in 0..10 {
            source.publish_all((written + 1..=written + 100).map(message)).await?;
            written += 100;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let found = verified(&site, ID, json!({"rate": 20_000})).await?;
        let removed = found["expected"]["removed_at_target"].as_u64().unwrap_or_default();
        expired = removed.max(expired);
        check(&found, &found["expected"], &[], &site)?;
    }
    ensure!(expired > 0, "nothing expired while it compared");
    wait_for("all to expire", LIMIT, async || site.at_target(ID).await.is_ok_and(|messages| messages == 0)).await?;
    site.settled(ID, written).await?;
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"removed_at_target": written}), &[], &site)?;
    // From now on none expires, and the one that is lost is found.
    update_target(&site, json!({"max_age": 600 * SECOND})).await?;
    source.publish_all((written + 1..=written + 300).map(message)).await?;
    site.settled(ID, written + 300).await?;
    delete(&site, ID, written + 150).await?;
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"removed_at_target": written}), &[(written + 150, written + 150)], &site)
}

#[tokio::test]
async fn dead_letters_are_expected() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    let mut target = site.target_stream(ID, json!({"max_msg_size": 1_000})).await?;
    let large = |i: u64| i.is_multiple_of(25);
    let payload = |i: u64| if large(i) { "x".repeat(3_000) } else { i.to_string() };
    let messages = (1..=200).map(|i| Outgoing::new(format!("orders.{}", i % 7), payload(i)));
    site.source_stream(ID, json!({})).await?.publish_all(messages).await?;
    site.add(ID, json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.letters"}})).await?;
    site.settled(ID, 200).await?;
    // From now on only the dead letters explain them.
    let mut config = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?["config"].take();
    config["max_msg_size"] = json!(-1);
    target.api(&format!("STREAM.UPDATE.{ID}"), config).await?;
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"rejected": 8}), &[], &site)?;
    // The copies of 10 and 24, and a dead letter that was deleted: its message may be repaired.
    delete(&site, ID, 10).await?;
    delete(&site, ID, 24).await?;
    site.source().await?.api("STREAM.MSG.DELETE.DEAD", json!({"seq": 2})).await?;
    let found = verified(&site, ID, json!({})).await?;
    check(&found, &json!({"rejected": 7}), &[(10, 10), (24, 24), (50, 50)], &site)
}

/// Bytes of a chunk; small, so that an object has ten.
const CHUNK: usize = 1_000;

async fn put(store: &object_store::ObjectStore, name: &str) -> Result<()> {
    let meta = object_store::ObjectMetadata { name: name.to_owned(), chunk_size: Some(CHUNK), ..Default::default() };
    store.put(meta, &mut &vec![7; 10 * CHUNK][..]).await?;
    Ok(())
}

/// The copy begins in an object. Its counters are lost in a restart; what is skipped stays skipped.
#[tokio::test]
async fn incomplete_objects_are_expected_after_a_restart() -> Result<()> {
    let mut site = Site::start().await?;
    let source = jetstream::new(connect(&site.source.url()).await?);
    let config = object_store::Config { bucket: "files".into(), ..Default::default() };
    let store = source.create_object_store(config).await?;
    for name in ["half", "whole", "third"] {
        put(&store, name).await?;
    }
    site.add("OBJ_files", json!({"start_sequence": 5})).await?;
    site.settled("OBJ_files", 33).await?;
    site.service.kill()?;
    site.service.restart().await?;
    // Not only the row that was saved before: the position that it has may be an earlier one.
    site.settled("OBJ_files", 33).await?;
    let expected = json!({"before_start": 4, "incomplete": 1});
    let found = verified(&site, "OBJ_files", json!({})).await?;
    check(&found, &expected, &[], &site)?;
    // The description of the second one, and a chunk of the third.
    let copies = site.target().await?.read_stream("OBJ_files").await?;
    ensure!(copies.len() == 28, "{} copies", copies.len());
    delete(&site, "OBJ_files", copies[16].seq).await?;
    delete(&site, "OBJ_files", copies[19].seq).await?;
    let found = verified(&site, "OBJ_files", json!({"repair": true})).await?;
    check(&found, &expected, &[(22, 22), (25, 25)], &site)?;
    assert_eq!((&found["repaired"]["stored"], &found["repaired"]["left"]), (&json!(2), &json!(0)), "{found:#}");
    let found = verified(&site, "OBJ_files", json!({})).await?;
    check(&found, &json!({"before_start": 4, "incomplete": 1, "repaired": 2}), &[], &site)
}

#[tokio::test]
async fn what_returns_through_a_loop_is_expected() -> Result<()> {
    let site = Site::small().await?;
    let (source, target) = (site.source.url(), site.target.url());
    site.source_stream(ID, json!({})).await?.publish_all((1..=100).map(|i| message(5 * i))).await?;
    let mut at_target = site.target_stream(ID, json!({})).await?;
    let way = |name: &str, from: &str, to: &str| json!({"stream": ID, "name": name, "source_url": from, "target_url": to, "target_mode": "shared"});
    request(&site.client, "replicator.config.add", way("there", &source, &target)).await?;
    wait_messages(&mut at_target, ID, 100, LIMIT).await?;
    request(&site.client, "replicator.config.add", way("back", &target, &source)).await?;
    at_target.publish_all((1..=50).map(|i| Outgoing::new("orders.back", i.to_string()))).await?;
    wait_messages(&mut Raw::connect(&source).await?, ID, 150, LIMIT).await?;
    for (id, expected) in [("ORDERS.there", 50), ("ORDERS.back", 100)] {
        site.row_when(id, "has read all", |row| row["position"]["source_seq"] == 150).await?;
        let found = verified(&site, id, json!({})).await?;
        check(&found, &json!({"loop": expected, "other_writer": expected}), &[], &site).context(id)?;
    }
    delete(&site, ID, 10).await?;
    let probe = async || site.at_target(ID).await.is_ok_and(|messages| messages == 149);
    wait_for("the message to be gone", LIMIT, probe).await?;
    let found = verified(&site, "ORDERS.there", json!({})).await?;
    check(&found, &json!({"loop": 50, "other_writer": 50}), &[(10, 10)], &site)
}
