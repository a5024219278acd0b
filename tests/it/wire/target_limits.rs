//! Limits of targets: one that is created takes a copy of everything that the source can hold; one that exists and keeps
//! less is warned of, and what it drops is counted and reported.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::site::merged;
use crate::harness::{Outgoing, Raw, Role, Server, Site, request, wait_for, wait_value};

/// Both sides are polled every ten seconds, and a drop is known after two or three polls.
const FOUND_WITHIN: Duration = Duration::from_secs(180);
const SECOND: u64 = 1_000_000_000;

async fn publish(raw: &mut Raw, subject: &str, messages: u64, size: usize) -> Result<()> {
    let message = |i: u64| Outgoing::new(format!("{subject}.{}", i % 5), format!("{i:0>size$}"));
    raw.publish_all((0..messages).map(message)).await?;
    Ok(())
}

/// Copies everything that the source has into a target that is created; returns the configuration of that.
async fn copied_whole(site: &Site, stream: &str, fields: Value) -> Result<Value> {
    site.add(stream, fields.clone()).await?;
    let target = fields["target_stream"].as_str().unwrap_or(stream);
    let messages = site.source().await?.stream_state(stream).await?["messages"].clone();
    let what = format!("`{target}` to hold {messages} messages");
    let mut raw = site.target().await?;
    wait_for(&what, FOUND_WITHIN, async || raw.stream_state(target).await.is_ok_and(|s| s["messages"] == messages))
        .await
        .with_context(|| site.service.log())?;
    Ok(raw.api(&format!("STREAM.INFO.{target}"), Value::Null).await?["config"].take())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_created_target_takes_all_that_a_full_source_holds() -> Result<()> {
    let site = Site::start().await?;
    for storage in ["file", "memory"] {
        let stream = format!("FULL-{storage}");
        let limits = json!({"max_bytes": 1_000_000, "discard": "old", "storage": storage});
        let mut raw = site.source_stream(&stream, limits).await?;
        publish(&mut raw, &stream.to_lowercase(), 40_000, 10).await?;
        let state = raw.stream_state(&stream).await?;
        ensure!(state["first_seq"].as_u64() > Some(1), "the source is not full: {state}");
        copied_whole(&site, &stream, json!({})).await?;
        // With longer subjects.
        let east = format!("{stream}-east");
        let prefix = json!({"name": "w", "target_stream": east, "target_subject_prefix": "a.long.way.to.the.east"});
        copied_whole(&site, &stream, prefix).await?;
        // One hop further.
        let document = json!({"stream": stream, "name": "next", "source_url": site.target.url(),
            "target_url": site.source.url(), "target_stream": "LAST", "target_subject_prefix": "last"});
        request(&site.client, "replicator.config.add", document).await?;
        let mut raw = site.source().await?;
        let all = async || raw.stream_state("LAST").await.is_ok_and(|last| last["messages"] == state["messages"]);
        wait_for("the copy of the copy", FOUND_WITHIN, all).await?;
        request(&site.client, "replicator.config.delete", json!({"replication": format!("{stream}.next")})).await?;
        raw.api("STREAM.DELETE.LAST", Value::Null).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_created_target_takes_the_largest_message_of_its_source() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("SIZE", json!({"max_msg_size": 1_000})).await?;
    publish(&mut raw, "size", 3, 1_000).await?;
    raw.publish(&Outgoing::new("size.id", vec![b'x'; 900]).with_lines(&["Nats-Msg-Id: its-own-id"])).await?;
    let config = copied_whole(&site, "SIZE", json!({})).await?;
    ensure!(config["max_msg_size"].as_u64() > Some(1_000), "{config}");
    // As `nats kv add --max-value-size=100` makes a bucket.
    let bucket = json!({"subjects": ["$KV.small.>"], "max_msg_size": 100, "max_msgs_per_subject": 1, "discard": "new",
        "deny_delete": true, "allow_rollup_hdrs": true, "allow_direct": true});
    let mut raw = site.source_stream("KV_small", bucket).await?;
    for size in [60, 100] {
        raw.publish(&Outgoing::new("$KV.small.key", vec![b'x'; size])).await?;
        raw.publish(&Outgoing::new(format!("$KV.small.{size}"), vec![b'x'; size])).await?;
    }
    let config = copied_whole(&site, "KV_small", json!({})).await?;
    assert_eq!((&config["max_msgs_per_subject"], &config["deny_delete"]), (&json!(1), &json!(true)), "{config}");
    Ok(())
}

/// Messages are removed at the source by its users, and new ones take their place; removals are not copied.
#[tokio::test]
async fn a_created_target_never_refuses_what_its_source_took() -> Result<()> {
    let site = Site::start().await?;
    let limits = [
        ("COUNT", json!({"max_msgs": 10})),
        ("BYTES", json!({"max_bytes": 800})),
        ("SUBJECT", json!({"max_msgs_per_subject": 2, "discard_new_per_subject": true})),
    ];
    for (stream, limits) in limits {
        let mut raw = site.source_stream(stream, merged(limits, json!({"discard": "new"}))).await?;
        site.add(stream, json!({})).await?;
        for round in 1..=3 {
            publish(&mut raw, &stream.to_lowercase(), 10, 1).await.with_context(|| stream.to_owned())?;
            let row = site.settled(stream, round * 10).await?;
            assert_eq!(row["counters"]["refused"], 0, "{row}");
            raw.api(&format!("STREAM.PURGE.{stream}"), Value::Null).await?;
        }
        assert_eq!(site.at_target(stream).await?, 30, "{stream}");
    }
    Ok(())
}

#[tokio::test]
async fn a_limit_that_the_target_has_no_room_for_is_left_out() -> Result<()> {
    let target = Server::builder(Role::Target).store_limit(4_000_000).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).control_at_source().start().await?;
    let mut raw = site.source_stream("ROOM", json!({"max_bytes": 1_000_000, "discard": "old"})).await?;
    publish(&mut raw, "room", 1_000, 10).await?;
    let config = copied_whole(&site, "ROOM", json!({})).await?;
    assert_eq!(config["max_bytes"], -1, "{config}");
    Ok(())
}

/// An existing target, and what `config.validate` says of it.
async fn warned(site: &Site, stream: &str, source: Value, target: Value, words: &[&str]) -> Result<Raw> {
    let raw = site.source_stream(stream, source).await?;
    site.target_stream(stream, target).await?;
    let body = request(&site.client, "replicator.config.validate", site.document(stream)).await?;
    let warnings = body["warnings"].as_array().context("warnings")?;
    let all = |text: &str| words.iter().all(|word| text.contains(word));
    let found = warnings.iter().any(|warning| warning["message"].as_str().is_some_and(all));
    ensure!(body["valid"] == true && (words.is_empty() && warnings.is_empty() || found), "{words:?}: {body:#}");
    Ok(raw)
}

#[tokio::test]
async fn a_target_that_keeps_less_than_its_source_is_warned_of() -> Result<()> {
    let site = Site::small().await?;
    let check = async |stream: &str, source: Value, target: Value, words: &[&str]| {
        warned(&site, stream, source, target, words).await.map(drop).with_context(|| stream.to_owned())
    };
    let same =
        json!({"max_msgs": 10, "max_age": 100 * SECOND, "max_msgs_per_subject": 3, "duplicate_window": 100 * SECOND});
    check("SAME", same.clone(), same, &[]).await?;
    check("NONE", json!({"max_bytes": 1_000}), json!({}), &[]).await?;
    let bytes = json!({"max_bytes": 1_000_000});
    check("BYTES", bytes.clone(), bytes, &["`max_bytes` is 1000000 bytes", "that of the source is 1000000"]).await?;
    check("COUNT", json!({}), json!({"max_msgs": 7}), &["`max_msgs` is 7 and the source has no limit: it removes"])
        .await?;
    let refuses = json!({"max_msgs": 7, "discard": "new"});
    check("FULL", json!({"max_msgs": 8}), refuses, &["`max_msgs` is 7 and that of the source is 8: it refuses"])
        .await?;
    let age = json!({"max_age": 200 * SECOND});
    check("AGE", json!({"max_age": 300 * SECOND}), age, &["`max_age` is 200s and that of the source is 300s"]).await?;
    let one = json!({"max_msgs_per_subject": 1});
    check("SUBJECT", json!({"max_msgs_per_subject": 5}), one, &["`max_msgs_per_subject` is 1", "source is 5"]).await?;
    let size = json!({"max_msg_size": 1_000});
    check("SIZE", size.clone(), size, &["`max_msg_size` of the stream is 1000 bytes", "copies up to"]).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_a_target_drops_are_counted_and_reported_once() -> Result<()> {
    let site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    let bounded = json!({"max_bytes": 300_000, "discard": "old"});
    let streams = [
        ("BYTES", bounded.clone(), bounded, "`max_bytes` 300000"),
        ("COUNT", json!({}), json!({"max_msgs": 100}), "`max_msgs` 100"),
        ("AGE", json!({}), json!({"max_age": 2 * SECOND, "duplicate_window": SECOND}), "`max_age` 2s"),
        ("SUBJECT", json!({}), json!({"max_msgs_per_subject": 2}), "`max_msgs_per_subject` 2"),
    ];
    // In step with the source, and removed by hand: neither is a drop.
    let age = json!({"max_age": 3 * SECOND, "duplicate_window": SECOND, "max_msgs": 1_000_000});
    let quiet = [("STEP", age), ("PURGED", json!({"max_msgs": 1_000}))];
    for (stream, limits) in &quiet {
        let mut raw = site.source_stream(stream, limits.clone()).await?;
        site.target_stream(stream, limits.clone()).await?;
        publish(&mut raw, &stream.to_lowercase(), 300, 10).await?;
        site.add(stream, json!({})).await?;
    }
    wait_for("a copy to purge", FOUND_WITHIN, async || site.at_target("PURGED").await.is_ok_and(|n| n == 300)).await?;
    site.target().await?.api("STREAM.PURGE.PURGED", json!({"keep": 10})).await?;
    for (stream, source, target, _) in &streams {
        let mut raw = site.source_stream(stream, source.clone()).await?;
        site.target_stream(stream, target.clone()).await?;
        publish(&mut raw, &stream.to_lowercase(), 5_000, 10).await?;
        site.add(stream, json!({})).await?;
    }
    for (stream, _, _, limit) in &streams {
        let (at_source, id) = (site.source().await?.stream_state(stream).await?, (*stream).to_owned());
        let what = format!("drops of {stream}");
        let row = wait_value(&what, FOUND_WITHIN, async || {
            let (row, at_target) = (site.row(&id).await?, site.at_target(&id).await.ok()?);
            let lost = at_source["messages"].as_u64()?.checked_sub(at_target)?;
            (lost > 0 && row["counters"]["target_dropped"] == lost).then_some(row)
        });
        row.await.with_context(|| format!("{at_source}\n{}", site.service.log()))?;
        let told: Vec<_> =
            site.events.told("target-dropped").into_iter().filter(|e| e["replication"] == *stream).collect();
        ensure!(told.len() == 1 && told[0]["reason"].as_str().is_some_and(|r| r.contains(limit)), "{stream}: {told:?}");
    }
    // More of the same: counted, and not reported again.
    let mut raw = site.source().await?;
    publish(&mut raw, "count", 50, 10).await?;
    site.row_when("COUNT", "dropped more", |row| row["counters"]["target_dropped"] == 4_950).await?;
    assert_eq!(site.events.told("target-dropped").len(), streams.len());
    let (_, text) = site.service.get("/metrics").await?;
    let line = "target_dropped_messages{stream=\"COUNT\",replicator=\"TEST\",worker=\"TEST\"} 4950";
    ensure!(text.contains(line), "{line} is missing in\n{text}");
    for (stream, _) in &quiet {
        let row = site.row(stream).await.context("a row")?;
        assert_eq!(row["counters"]["target_dropped"], 0, "{row}");
    }
    Ok(())
}
