//! Taking over from Choria's replicator, and handing back to it. The old one is played by a client that does to consumer and
//! target what the Go program does.

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{Place, copied, messages};
use crate::harness::raw::header_values;
use crate::harness::server::free_port;
use crate::harness::{LIMIT, Raw, Role, Server, Service, connect, wait_value};

/// Servers before and after consumers could be moved.
const VERSIONS: [&str; 2] = ["2.10.26", "2.15.1"];

async fn place(version: &str) -> Result<Place> {
    let source = Server::builder(Role::Source).version(version).start();
    let target = Server::builder(Role::Target).version(version).start();
    let (source, target) = tokio::try_join!(source, target)?;
    Ok(Place { source, target, folder: tempdir()?, port: free_port()? })
}

/// The old replicator of site `A`: copies the next messages that its consumer has, one after the other. The last one is not
/// acknowledged if it is killed.
async fn old_copies(place: &Place, count: usize, killed: bool) -> Result<()> {
    let mut source = place.source().await?;
    if consumer(&mut source).await.is_err() {
        let config = json!({"durable_name": "SR_A", "description": "Choria Stream Replicator A", "deliver_policy": "all",
            "ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 1, "max_deliver": -1,
            "replay_policy": "instant"});
        let body = json!({"stream_name": "S", "config": config});
        source.api("CONSUMER.DURABLE.CREATE.S.SR_A", body).await?;
    }
    let from = jetstream::new(connect(&place.source.url()).await?);
    let to = jetstream::new(connect(&place.target.url()).await?);
    let consumer =
        from.get_stream("S").await?.get_consumer::<pull::Config>("SR_A").await.map_err(anyhow::Error::from_boxed)?;
    for index in 1..=count {
        let mut batch = consumer.fetch().max_messages(1).expires(LIMIT).messages().await?;
        let message = batch.next().await.context("nothing to copy")?.map_err(anyhow::Error::from_boxed)?;
        let info = message.info().map_err(anyhow::Error::from_boxed)?;
        let (seq, time_ms) = (info.stream_sequence, info.published.unix_timestamp_nanos() / 1_000_000);
        let mut headers = HeaderMap::new();
        headers.insert("Choria-SR-Source", format!("S {seq} A A {time_ms}").as_str());
        to.publish_with_headers(message.subject.clone(), headers, message.payload.clone()).await?.await?;
        if !(killed && index == count) {
            message.double_ack().await.map_err(anyhow::Error::from_boxed)?;
        }
    }
    Ok(())
}

async fn consumer(raw: &mut Raw) -> Result<Value> {
    raw.api("CONSUMER.INFO.S.SR_A", Value::Null).await
}

/// Waits until the consumer continues after this sequence, with nothing delivered that is not acknowledged.
async fn consumer_at(place: &Place, seq: u64, service: &Service) -> Result<()> {
    let mut raw = place.source().await?;
    let mut last = Value::Null;
    let at = async || {
        last = consumer(&mut raw).await.unwrap_or_default();
        (last["delivered"]["stream_seq"] == seq && last["num_ack_pending"] == 0).then_some(())
    };
    let found = wait_value(&format!("the consumer after {seq}"), LIMIT, at).await;
    found.with_context(|| format!("{last}\n{}", service.log()))
}

/// The payloads at the target are the numbers from 1 on, each once and in order.
async fn is_complete(place: &Place, count: u64, service: &Service) -> Result<()> {
    let stored = copied(&mut place.target().await?, "S", count, service).await?;
    let numbers: Vec<String> = stored.iter().map(|m| String::from_utf8_lossy(&m.payload).into_owned()).collect();
    let expect: Vec<String> = (1..=count).map(|number| number.to_string()).collect();
    ensure!(numbers == expect, "{numbers:?}\n{}", service.log());
    Ok(())
}

async fn sources(place: &Place, count: u64) -> Result<Raw> {
    let mut source = place.source().await?;
    source.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    source.publish_all(messages("s", 1, count)).await?;
    Ok(source)
}

#[tokio::test]
async fn there_and_back_without_loss_or_duplicate() -> Result<()> {
    for (version, killed) in VERSIONS.into_iter().flat_map(|version| [(version, false), (version, true)]) {
        let place = place(version).await?;
        let mut source = sources(&place, 200).await?;
        place.target().await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
        old_copies(&place, 80, killed).await?;

        let file = place.write(&format!("name: A\nstreams:\n{}", place.stream("")))?;
        let mut service = Service::replicate(&file).spawn()?;
        is_complete(&place, 200, &service).await.with_context(|| format!("{version}, killed: {killed}"))?;
        consumer_at(&place, 200, &service).await.with_context(|| format!("{version}, killed: {killed}"))?;
        source.publish_all(messages("s", 201, 250)).await?;
        is_complete(&place, 250, &service).await?;
        // Once at the stop, or while nothing happens.
        if killed {
            consumer_at(&place, 250, &service).await?;
            service.kill()?;
        } else {
            ensure!(service.stop().await?.success(), "{}", service.log());
        }
        source.publish_all(messages("s", 251, 260)).await?;
        old_copies(&place, 10, false).await?;
        is_complete(&place, 260, &service).await.with_context(|| format!("{version}, killed: {killed}"))?;

        let mut service = Service::replicate(&file).spawn()?;
        source.publish_all(messages("s", 261, 270)).await?;
        is_complete(&place, 270, &service).await.with_context(|| format!("{version}, killed: {killed}"))?;
        ensure!(service.stop().await?.success(), "{}", service.log());
    }
    Ok(())
}

#[tokio::test]
async fn a_new_copy_leaves_a_consumer_behind() -> Result<()> {
    for version in VERSIONS {
        let place = place(version).await?;
        sources(&place, 20).await?;
        let stream = place.stream("    filter_subject: s.>\n");
        let mut service = Service::replicate(&place.write(&format!("name: A\nstreams:\n{stream}"))?).spawn()?;
        is_complete(&place, 20, &service).await?;
        ensure!(service.stop().await?.success(), "{}", service.log());
        consumer_at(&place, 20, &service).await?;
        let config = consumer(&mut place.source().await?).await?["config"].take();
        let expect = json!({"ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 1, "max_deliver": -1,
            "filter_subject": "s.>", "description": "Choria Stream Replicator A", "durable_name": "SR_A"});
        for (field, value) in expect.as_object().context("an object")? {
            ensure!(config[field] == *value, "{field}: {config}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_ahead_of_a_new_target_skips_nothing() -> Result<()> {
    let place = Place::start().await?;
    sources(&place, 50).await?;
    place.target().await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    old_copies(&place, 30, false).await?;
    place.target().await?.api("STREAM.DELETE.S", Value::Null).await?;
    let service = Service::replicate(&place.write(&format!("name: A\nstreams:\n{}", place.stream("")))?).spawn()?;
    is_complete(&place, 50, &service).await?;
    Ok(())
}

#[tokio::test]
async fn a_target_initiated_copy_has_its_provenance_first() -> Result<()> {
    let place = Place::start().await?;
    let mut source = place.source().await?;
    source.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    let hop = |i: u64| format!("Choria-SR-Source: FAR {i} FAR FAR 1700000000000");
    let sent = messages("s", 1, 5).zip(1..).map(|(message, i)| message.with_lines(&[&hop(i)]));
    source.publish_all(sent.collect::<Vec<_>>()).await?;
    let stream = place.stream("    target_initiated: true\n    filter_subject: s.>\n");
    let file = place.write(&format!("name: A\nstreams:\n{stream}"))?;
    let mut service = Service::replicate(&file).spawn()?;
    is_complete(&place, 5, &service).await?;
    service.signal(Signal::KILL)?;
    service.wait(LIMIT).await?;
    let stored = place.target().await?.read_stream("S").await?;
    for (message, seq) in stored.iter().zip(1..) {
        let values = header_values(&message.header, "Choria-SR-Source");
        ensure!(values.len() == 2 && values[0].starts_with(&format!("S {seq} A A ")), "{values:?}");
    }
    ensure!(consumer(&mut place.source().await?).await.is_err(), "it needs no consumer");
    // Without its record it finds its own messages again.
    for bucket in ["CONFIG", "POSITIONS", "LEASES", "STATE"] {
        place.source().await?.api(&format!("STREAM.DELETE.KV_REPLICATOR_A_{bucket}"), Value::Null).await?;
    }
    let service = Service::replicate(&file).spawn()?;
    source.publish_all(messages("s", 6, 9)).await?;
    is_complete(&place, 9, &service).await?;
    Ok(())
}
