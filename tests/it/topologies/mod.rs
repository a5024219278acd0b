//! The setups of `contrib/topologies`, built from their own files: each of their servers and instances is killed while
//! messages are under way, and all of it converges.

mod setup;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use self::setup::Topology;
use crate::harness::client::{ask, refused};
use crate::harness::{LIMIT, Outgoing, request, wait_while_moving};

/// Messages of each publisher before each kill.
const PART: u64 = 300;

/// A stream, and the publishers whose messages it ends with.
type End = (&'static str, &'static str, &'static [&'static str]);

/// Publishes messages `<subject> <number>`.
async fn publish(topology: &Topology, server: &str, subject: &str, numbers: (u64, u64)) -> Result<()> {
    let messages = (numbers.0 + 1..=numbers.1).map(|i| Outgoing::new(subject, format!("{subject} {i}")));
    topology.raw(server).await?.publish_all(messages).await?;
    Ok(())
}

/// Kills everything once while messages of all `publishers` (server, subject) are under way, and checks all `ends`.
async fn converges(name: &str, publishers: &[(&str, &str)], ends: &[End]) -> Result<()> {
    converges_within(name, publishers, ends, LIMIT).await.map(drop)
}

/// The same where nothing may happen for longer; returns what still runs.
async fn converges_within(name: &str, publishers: &[(&str, &str)], ends: &[End], limit: Duration) -> Result<Topology> {
    let mut topology = Topology::start(name).await?;
    let mut sent = 0;
    for victim in topology.parts() {
        for (server, subject) in publishers {
            publish(&topology, server, subject, (sent, sent + PART)).await?;
        }
        sent += PART;
        topology.kill(&victim)?;
        topology.restart(&victim).await?;
    }
    for end in ends {
        arrived_within(&topology, *end, sent, limit).await.with_context(|| topology.logs())?;
    }
    topology.settled_within(limit).await?;
    for end in ends {
        has_each_once(&topology, *end, sent).await?;
    }
    Ok(topology)
}

/// Waits until the stream has as many messages as it should.
async fn arrived_within(topology: &Topology, (server, stream, from): End, sent: u64, limit: Duration) -> Result<()> {
    let all = sent * from.len() as u64;
    let probe = async || {
        let Ok(mut raw) = topology.raw(server).await else { return Err(0) };
        let messages = raw.stream_state(stream).await.unwrap_or_default()["messages"].as_u64().unwrap_or_default();
        if messages >= all { Ok(()) } else { Err(messages) }
    };
    wait_while_moving(&format!("{all} messages in {stream} at {server}"), limit, probe).await
}

/// The messages of each publisher are there once, and in their order.
async fn has_each_once(topology: &Topology, (server, stream, from): End, sent: u64) -> Result<()> {
    let stored = topology.raw(server).await?.read_stream(stream).await?;
    let payloads: Vec<_> =
        stored.iter().map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect();
    for subject in from {
        let found: Vec<_> = payloads.iter().filter(|payload| payload.starts_with(&format!("{subject} "))).collect();
        let expect: Vec<_> = (1..=sent).map(|i| format!("{subject} {i}")).collect();
        let differs = found.iter().zip(&expect).position(|(found, expect)| *found != expect);
        let count = found.len();
        ensure!(
            differs.is_none() && count == expect.len(),
            "{stream} at {server} has {count} of {sent} {subject}, first difference at {differs:?}\n{}",
            topology.logs()
        );
    }
    ensure!(payloads.len() as u64 == sent * from.len() as u64, "{} messages in {stream} at {server}", payloads.len());
    Ok(())
}

#[tokio::test]
async fn two_way() -> Result<()> {
    let both: &[&str] = &["orders.east", "orders.west"];
    let publishers = [("east", "orders.east"), ("west", "orders.west")];
    converges("two-way", &publishers, &[("east", "ORDERS", both), ("west", "ORDERS", both)]).await
}

#[tokio::test]
async fn fan_in() -> Result<()> {
    let publishers = [("site-1", "orders.one"), ("site-2", "orders.two"), ("site-3", "orders.three")];
    converges("fan-in", &publishers, &[("centre", "ALL_ORDERS", &["orders.one", "orders.two", "orders.three"])]).await
}

#[tokio::test]
async fn a_chain_of_three_hops() -> Result<()> {
    let publishers = ["factory", "region", "country", "archive"].map(|server| (server, format!("events.{server}")));
    let publishers = publishers.each_ref().map(|(server, subject)| (*server, subject.as_str()));
    let ends: [End; 4] = [
        ("factory", "EVENTS", &["events.factory"]),
        ("region", "EVENTS", &["events.factory", "events.region"]),
        ("country", "EVENTS", &["events.factory", "events.region", "events.country"]),
        ("archive", "EVENTS", &["events.factory", "events.region", "events.country", "events.archive"]),
    ];
    converges("chain", &publishers, &ends).await
}

#[tokio::test]
async fn an_archive_and_its_report() -> Result<()> {
    let all: &[&str] = &["orders.new", "returns.new", "notes.new"];
    let publishers = [("shop", "orders.new"), ("shop", "returns.new"), ("vault", "notes.new")];
    converges("archive-report", &publishers, &[("vault", "ARCHIVE", all), ("office", "REPORT", all)]).await
}

/// A target of a native feed may wait for up to 50 s before it asks again.
const ASKS_WITHIN: Duration = Duration::from_secs(120);

/// The stream at the mirror's server has the sequences, times and messages of the other one.
async fn is_mirrored(topology: &Topology, stream: (&str, &str), mirror: (&str, &str)) -> Result<()> {
    let (from, to) = (
        topology.raw(stream.0).await?.read_stream(stream.1).await?,
        topology.raw(mirror.0).await?.read_stream(mirror.1).await?,
    );
    ensure!(from == to, "{mirror:?} differs from {stream:?}: {} and {} messages", to.len(), from.len());
    Ok(())
}

#[tokio::test]
async fn an_archive_and_its_report_natively() -> Result<()> {
    let all: &[&str] = &["orders.new", "returns.new", "notes.new"];
    let publishers = [("shop", "orders.new"), ("shop", "returns.new"), ("vault", "notes.new")];
    let ends = [("vault", "ARCHIVE", all), ("office", "REPORT", all)];
    let topology = converges_within("archive-report-native", &publishers, &ends, ASKS_WITHIN).await?;
    is_mirrored(&topology, ("vault", "ARCHIVE"), ("office", "REPORT")).await
}

const CINEMAS: [(&str, &str); 3] = [("cinema-1", "tickets.1.new"), ("cinema-2", "tickets.2.new"), ("hub", "films.new")];
const SALES: &[&str] = &["tickets.1.new", "tickets.2.new"];

#[tokio::test]
async fn cinemas() -> Result<()> {
    let ends: [End; 2] = [("hub", "sales", SALES), ("cinema-1", "films", &["films.new"])];
    converges("cinemas", &CINEMAS, &ends).await
}

#[tokio::test]
async fn cinemas_natively() -> Result<()> {
    let ends: [End; 2] = [("hub", "sales", SALES), ("cinema-1", "films", &["films.new"])];
    let topology = converges_within("cinemas-native", &CINEMAS, &ends, ASKS_WITHIN).await?;
    is_mirrored(&topology, ("hub", "films"), ("cinema-1", "films")).await
}

#[tokio::test]
async fn disaster_recovery() -> Result<()> {
    let mut topology = Topology::start("disaster-recovery").await?;
    let mut sent = 0;
    for victim in topology.parts() {
        publish(&topology, "main", "orders.old", (sent, sent + PART)).await?;
        sent += PART;
        topology.kill(&victim)?;
        topology.restart(&victim).await?;
    }
    // A mirror waits for up to 50 s before it asks again.
    let all = ("standby", "ORDERS", ["orders.old"].as_slice());
    arrived_within(&topology, all, sent, LIMIT * 4).await.with_context(|| topology.logs())?;
    let equal = (
        topology.raw("main").await?.read_stream("ORDERS").await?,
        topology.raw("standby").await?.read_stream("ORDERS").await?,
    );
    ensure!(equal.0 == equal.1, "the mirror differs from its source");

    topology.kill("main")?;
    let promote = json!({"replication": "ORDERS", "force": true, "subjects": ["orders.>"]});
    let promoted = request(&topology.client().await?, "replicator.promote", promote).await;
    let promoted = promoted.with_context(|| topology.logs())?;
    ensure!(promoted["last_seq"] == sent, "{promoted}");
    publish(&topology, "standby", "orders.new", (0, PART)).await?;
    topology.restart("main").await?;
    let back = topology.document_of_readme()?;
    request(&topology.client().await?, "replicator.config.add", back).await?;
    let probe = async || {
        let mut raw = topology.raw("main").await.map_err(|_| 0_u64)?;
        let messages =
            raw.stream_state("ORDERS_NEW").await.unwrap_or_default()["messages"].as_u64().unwrap_or_default();
        if messages == sent + PART { Ok(()) } else { Err(messages) }
    };
    wait_while_moving("everything to be back at the main site", LIMIT, probe).await.with_context(|| topology.logs())?;
    let reply = ask(&topology.client().await?, "replicator.promote", b"ORDERS").await?;
    refused(&reply, 404, "ORDERS");
    let at_main = topology.raw("main").await?.read_stream("ORDERS_NEW").await?;
    let payloads = at_main.iter().map(|message| String::from_utf8_lossy(&message.payload).into_owned());
    let expect = (1..=sent).map(|i| format!("orders.old {i}")).chain((1..=PART).map(|i| format!("orders.new {i}")));
    ensure!(payloads.eq(expect), "what came back is not what the standby has");
    Ok(())
}

/// Every folder has a test, and is in the list of the README.
#[test]
fn all_are_tested_and_listed() -> Result<()> {
    let readme = std::fs::read_to_string(setup::folder().join("README.md"))?;
    let tested = [
        "archive-report",
        "archive-report-native",
        "chain",
        "cinemas",
        "cinemas-native",
        "disaster-recovery",
        "fan-in",
        "two-way",
    ];
    let mut found = Vec::new();
    for entry in std::fs::read_dir(setup::folder())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.file_name().into_string().unwrap_or_default());
        }
    }
    found.sort();
    assert_eq!(found, tested);
    for name in tested {
        ensure!(readme.contains(&format!("({name}/README.md)")), "{name} is not listed");
        let documents = setup::files(name, "replication")?;
        ensure!(documents.iter().all(|(_, text)| serde_json::from_str::<Value>(text).is_ok()), "{name}");
    }
    Ok(())
}
