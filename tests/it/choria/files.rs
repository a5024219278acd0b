//! Each file copies what the Go program copies: subjects and counts.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::old::make_election_bucket;
use super::{Place, copied, messages};
use crate::harness::client::{http_get, status};
use crate::harness::{LIMIT, Outgoing, Stored, connect, wait_for};

fn subjects(stored: &[Stored]) -> Vec<&str> {
    stored.iter().map(|message| message.subject.as_str()).collect()
}

#[tokio::test]
async fn a_packaged_file_with_log_and_metrics() -> Result<()> {
    let place = Place::start().await?;
    let mut source = place.source().await?;
    source.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    source.publish_all(messages("orders", 1, 10)).await?;
    let mut service = place.run("01-packaged-default")?;
    let stored = copied(&mut source, "ORDERS_COPY", 10, &service).await?;
    ensure!(subjects(&stored)[..3] == ["COPY.orders.1", "COPY.orders.2", "COPY.orders.0"], "{:?}", subjects(&stored));
    let metric =
        "choria_stream_replicator_replicator_copied_messages{stream=\"ORDERS\",replicator=\"FRA1\",worker=\"FRA1\"} 10";
    wait_for("the metric", LIMIT, async || {
        let got = http_get(&format!("127.0.0.1:{}", place.port), "/metrics").await;
        got.is_ok_and(|(code, text)| code == 200 && text.lines().any(|line| line == metric))
    })
    .await?;
    ensure!(service.stop().await?.success(), "{}", place.log()?);
    ensure!(service.log().is_empty(), "nothing goes to standard error: {}", service.log());
    for line in place.log()?.lines() {
        let line: Value = serde_json::from_str(line)?;
        ensure!(line["level"].is_string() && line["msg"].is_string() && line["time"].is_string(), "{line}");
    }
    Ok(())
}

#[tokio::test]
async fn a_site_copies_to_a_hub_under_another_name() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("NODE_DATA", json!({"subjects": ["NODE_DATA.>"]})).await?;
    source.publish_all(messages("NODE_DATA.n", 1, 6)).await?;
    let mut service = place.run("02-site-to-hub")?;
    let stored = copied(&mut target, "FLEET_NODES", 6, &service).await?;
    ensure!(subjects(&stored)[0] == "FLEET_NODES.n.1", "{:?}", subjects(&stored));
    ensure!(service.stop().await?.success(), "{}", service.log());
    Ok(())
}

#[tokio::test]
async fn every_way_to_begin() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("METRICS", json!({"subjects": ["m.>"]})).await?;
    source.publish_all(messages("m", 1, 60)).await?;
    let mut service = place.run("03-starts-and-age")?;
    for (stream, count, first) in
        [("M_SEQ", 10, "seq.m.0"), ("M_TIME", 60, "time.m.1"), ("M_DELTA", 60, "delta.m.1"), ("M_AGE", 60, "age.m.1")]
    {
        let stored = copied(&mut target, stream, count, &service).await?;
        ensure!(subjects(&stored)[0] == first, "{stream}: {:?}", subjects(&stored));
    }
    service.wait_ready().await?;
    let client = connect(&place.source.url()).await?;
    let runs = async || status(&client, "METRICS.from-end").await.is_some_and(|row| row["state"] == "running");
    wait_for("the copy that begins at the end", LIMIT, runs).await?;
    source.publish_all(messages("m", 61, 65)).await?;
    let stored = copied(&mut target, "M_END", 5, &service).await?;
    ensure!(stored.iter().all(|message| message.subject.starts_with("end.m.")), "{:?}", subjects(&stored));
    copied(&mut target, "M_SEQ", 15, &service).await?;
    Ok(())
}

#[tokio::test]
async fn registration_is_sampled_and_its_advisories_are_copied() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("CHORIA_REGISTRATION", json!({"subjects": ["choria.stream.input.registration"]})).await?;
    let advisories = json!({"subjects": ["choria.stream.input.registration_advisories.>"]});
    source.create_stream("CHORIA_REGISTRATION_ADVISORIES", advisories).await?;
    let of = |sender: &str, more: Value| {
        let mut body = json!({"sender": sender});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Outgoing::new("choria.stream.input.registration", body.to_string())
    };
    let big = "x".repeat(2_000);
    let sent = [
        of("n1", json!({})),
        of("n2", json!({})),
        of("n1", json!({})),
        of("n1", json!({"changed": true})),
        of("n2", json!({"data": big})),
        of("n2", json!({})),
    ];
    source.publish_all(sent).await?;
    let mut service = place.run("04-registration-sampled")?;
    // New twice, by force once, by size twice.
    copied(&mut target, "CHORIA_REGISTRATION", 5, &service).await?;
    let stored = copied(&mut target, "CHORIA_REGISTRATION_ADVISORIES", 2, &service).await?;
    let expect = ["n1", "n2"].map(|sender| format!("choria.stream.input.registration_advisories.new.{sender}"));
    ensure!(subjects(&stored) == expect, "{:?}", subjects(&stored));
    ensure!(service.stop().await?.success(), "{}", place.log()?);
    Ok(())
}

#[tokio::test]
async fn two_partitions_make_one_target_under_elections() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    make_election_bucket(&mut source, Duration::from_secs(4)).await?;
    source.create_stream("NODE_DATA", json!({"subjects": ["NODES.>"]})).await?;
    source.publish_all(messages("NODES.EU1.0", 1, 20).chain(messages("NODES.EU1.1", 1, 20))).await?;
    let service = place.run("05-partitions-ha")?;
    let stored = copied(&mut target, "NODE_DATA", 40, &service).await?;
    let of = |partition: &str| subjects(&stored).iter().filter(|subject| subject.starts_with(partition)).count();
    ensure!((of("NODES.EU1.0."), of("NODES.EU1.1.")) == (20, 20), "{:?}", subjects(&stored));
    Ok(())
}

#[tokio::test]
async fn a_bucket_and_a_target_that_was_there() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    let bucket = json!({"subjects": ["$KV.SETTINGS.>"], "max_msgs_per_subject": 1, "allow_rollup_hdrs": true});
    source.create_stream("KV_SETTINGS", bucket).await?;
    source.create_stream("EVENTS", json!({"subjects": ["events.>"]})).await?;
    target.create_stream("ARCHIVE", json!({"subjects": ["archive.>"]})).await?;
    source.publish_all((0..5).map(|i| Outgoing::new(format!("$KV.SETTINGS.k{i}"), "v"))).await?;
    let deleted = Outgoing::new("$KV.SETTINGS.k0", "").with_lines(&["KV-Operation: DEL"]);
    source.publish(&deleted).await?;
    source.publish_all(messages("events", 1, 7)).await?;
    let service = place.run("08-kv-ephemeral")?;
    let stored = copied(&mut target, "KV_SETTINGS", 5, &service).await?;
    ensure!(subjects(&stored).last() == Some(&"$KV.SETTINGS.k0"), "{:?}", subjects(&stored));
    let stored = copied(&mut target, "ARCHIVE", 7, &service).await?;
    ensure!(subjects(&stored)[0] == "archive.events.1", "{:?}", subjects(&stored));
    Ok(())
}

#[tokio::test]
async fn heartbeats_alone() -> Result<()> {
    let place = Place::start().await?;
    let mut source = place.source().await?;
    make_election_bucket(&mut source, Duration::from_secs(4)).await?;
    source.create_stream("BEATS", json!({"subjects": ["choria.node_metadata._monitor", "example._monitor"]})).await?;
    let service = place.run("09-heartbeats-only")?;
    let stored = copied(&mut source, "BEATS", 3, &service).await?;
    let found = subjects(&stored);
    ensure!(found.contains(&"choria.node_metadata._monitor") && found.contains(&"example._monitor"), "{found:?}");
    Ok(())
}

#[tokio::test]
async fn sampling_by_header_and_by_subject() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("SENSORS", json!({"subjects": ["sensors.>"]})).await?;
    // Six messages of two hosts, on three subjects, whose second token has two values.
    let sent = (0..6).map(|i| {
        let subject = ["sensors.a.x", "sensors.a.y", "sensors.b.x"][i % 3];
        Outgoing::new(subject, i.to_string()).with_lines(&[&format!("Choria-Identity: host{}", i % 2)])
    });
    source.publish_all(sent.collect::<Vec<_>>()).await?;
    let service = place.run("10-anchors-and-sampling-kinds")?;
    for (stream, count) in [("SENSORS_S", 3), ("SENSORS_H", 2), ("SENSORS_T", 2)] {
        copied(&mut target, stream, count, &service).await?;
    }
    Ok(())
}
