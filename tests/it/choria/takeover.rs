//! Taking over from Choria's replicator, and handing back to it. The old one is played, see `old.rs`.

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::tempdir;

use super::old::{OldHop, has_all};
use super::{Place, messages};
use crate::harness::raw::header_values;
use crate::harness::server::free_port;
use crate::harness::{LIMIT, Raw, Role, Server, Service, wait_value};

/// Servers before and after consumers could be moved.
const VERSIONS: [&str; 2] = ["2.10.26", "2.15.1"];

async fn place(version: &str) -> Result<Place> {
    let source = Server::builder(Role::Source).version(version).start();
    let target = Server::builder(Role::Target).version(version).start();
    let (source, target) = tokio::try_join!(source, target)?;
    Ok(Place { source, target, folder: tempdir()?, port: free_port()? })
}

/// The old replicator of site `A`.
fn old(place: &Place) -> OldHop<'_> {
    OldHop { from: &place.source, to: &place.target, site: "A" }
}

/// Waits until the consumer continues after this sequence, with nothing delivered that is not acknowledged.
async fn consumer_at(place: &Place, seq: u64, service: &Service) -> Result<()> {
    let mut last = Value::Null;
    let at = async || {
        last = old(place).consumer().await.unwrap_or_default();
        (last["delivered"]["stream_seq"] == seq && last["num_ack_pending"] == 0).then_some(())
    };
    let found = wait_value(&format!("the consumer after {seq}"), LIMIT, at).await;
    found.with_context(|| format!("{last}\n{}", service.log()))
}

/// The payloads at the target are the numbers from 1 on, each once and in order.
async fn is_complete(place: &Place, count: u64, service: &Service) -> Result<()> {
    has_all(&mut place.target().await?, count).await.with_context(|| service.log())
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
        old(&place).copies(80, killed).await?;

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
        old(&place).copies(10, false).await?;
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
        let config = old(&place).consumer().await?["config"].take();
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
    old(&place).copies(30, false).await?;
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
    ensure!(old(&place).consumer().await.is_err(), "it needs no consumer");
    // Without its record it finds its own messages again.
    for bucket in ["CONFIG", "POSITIONS", "LEASES", "STATE"] {
        place.source().await?.api(&format!("STREAM.DELETE.KV_REPLICATOR_A_{bucket}"), Value::Null).await?;
    }
    let service = Service::replicate(&file).spawn()?;
    source.publish_all(messages("s", 6, 9)).await?;
    is_complete(&place, 9, &service).await?;
    Ok(())
}
