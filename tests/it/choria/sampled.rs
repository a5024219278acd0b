//! Sampled copies: the state file of Choria's replicator, and what the replicators of a group tell each other.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::old::make_election_bucket;
use super::{Place, copied};
use crate::harness::cli::{Cli, failed};
use crate::harness::client::{http_get, status};
use crate::harness::{LIMIT, Outgoing, Service, Stored, connect, wait_for, wait_value};

/// Stream `S` of site `A`, sampled, and a stream with its advisories.
async fn sampled(place: &Place, more: &str) -> Result<String> {
    let mut source = place.source().await?;
    source.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    source.create_stream("ADV", json!({"subjects": ["adv.>"]})).await?;
    place.target().await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    let stream = place.stream(&format!(
        "    inspect_field: sender\n    inspect_duration: 1h\n    advisory:\n      subject: adv.%s.%v\n      reliable: true\n{more}"
    ));
    let (folder, port) = (place.path("state").display().to_string(), place.port);
    Ok(format!("name: A\nstate_store: {folder}\nmonitor_port: {port}\nstreams:\n{stream}"))
}

fn report(sender: &str) -> Outgoing {
    Outgoing::new("s.report", json!({"sender": sender}).to_string())
}

/// What the old replicator leaves after it copied a message of each sender: copies with their headers, and its state file.
async fn old_copied(place: &Place, senders: &[String]) -> Result<()> {
    place.source().await?.publish_all(senders.iter().map(|sender| report(sender))).await?;
    let copy = |(sender, seq): (&String, u64)| {
        report(sender).with_lines(&[&format!("Choria-SR-Source: S {seq} A A 1700000000000")])
    };
    place.target().await?.publish_all(senders.iter().zip(1..).map(copy)).await?;
    let now = Utc::now() - TimeDelta::seconds(5);
    let item = |sender: &String| {
        let item = json!({"seen": now, "copied": now, "size": json!({"sender": sender}).to_string().len()});
        (sender.clone(), item)
    };
    write_state(place, senders.iter().map(item).collect())
}

fn write_state(place: &Place, items: BTreeMap<String, Value>) -> Result<()> {
    fs::create_dir_all(place.path("state"))?;
    Ok(fs::write(place.path("state/S_A.json"), json!({"Items": items}).to_string())?)
}

fn read_state(place: &Place) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(place.path("state/S_A.json"))?)?)
}

fn subjects(stored: &[Stored]) -> Vec<&str> {
    stored.iter().map(|message| message.subject.as_str()).collect()
}

/// Waits until the copy of `S` has settled everything up to a source sequence.
async fn settled(place: &Place, seq: u64, service: &Service) -> Result<()> {
    let client = connect(&place.source.url()).await?;
    let done = async || {
        status(&client, "S").await.is_some_and(|row| row["position"]["source_seq"] == seq && row["state"] == "running")
    };
    wait_for("the position", LIMIT, done).await.with_context(|| service.log())
}

#[tokio::test]
async fn a_state_file_is_taken_over_once_and_written_for_the_way_back() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    let file = place.write(&sampled(&place, "").await?)?;
    old_copied(&place, &["n1".to_owned(), "n2".to_owned()]).await?;
    let mut service = Service::replicate(&file).spawn()?;
    source.publish_all(["n1", "n2", "n3"].map(report)).await?;
    copied(&mut target, "S", 3, &service).await?;
    settled(&place, 5, &service).await?;
    let advisories = copied(&mut source, "ADV", 1, &service).await?;
    ensure!(subjects(&advisories) == ["adv.new.n3"], "{:?}", subjects(&advisories));
    ensure!(service.stop().await?.success(), "{}", service.log());

    let path = place.path("state/S_A.json");
    ensure!(fs::metadata(&path)?.permissions().mode() & 0o777 == 0o600, "only its owner may read it");
    let state = read_state(&place)?;
    let items = state["Items"].as_object().context("items")?;
    ensure!(items.keys().collect::<Vec<_>>() == ["n1", "n2", "n3"], "{state}");
    for item in items.values() {
        let time = |field: &str| item[field].as_str().and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        ensure!(time("seen").is_some() && time("copied").is_some() && item["size"] == 15, "{state}");
    }
    let cli = Cli::new("");
    let (folder, path) = (place.path("state").display().to_string(), path.display().to_string());
    let (folder, path) = (folder.as_str(), path.as_str());
    ensure!(cli.ok(["admin", "state", folder, "--values"]).await? == "n1\nn2\nn3\n", "{state}");
    let shown = cli.ok(["admin", "state", folder, "--value", "3$", "--since", "1h"]).await?;
    ensure!(shown.starts_with("           Value: n3\n       Seen Time: 20"), "{shown}");
    ensure!(shown.ends_with("    Payload Size: 15\n         Advised: false\n\n"), "{shown}");
    let shown = cli.json(["admin", "state", path, "--no-advised"]).await?;
    ensure!(shown[2]["value"] == "n3" && shown[2]["size"] == 15, "{shown}");
    ensure!(cli.ok(["admin", "state", folder, "--value", "x"]).await? == "No items matched\n", "nothing");
    failed(&cli.run(["admin", "state", format!("{folder}/none").as_str()]).await?, &["none", "No such file"]);

    // The records are known now: the file is not read again.
    let now = Utc::now();
    write_state(&place, [("n4".to_owned(), json!({"seen": now, "copied": now, "size": 15}))].into())?;
    let service = Service::replicate(&file).spawn()?;
    source.publish_all(["n1", "n4"].map(report)).await?;
    copied(&mut target, "S", 4, &service).await?;
    let advisories = copied(&mut source, "ADV", 2, &service).await?;
    ensure!(subjects(&advisories)[1] == "adv.new.n4", "{:?}", subjects(&advisories));
    Ok(())
}

#[tokio::test]
async fn twenty_thousand_senders_are_taken_over() -> Result<()> {
    const SENDERS: u64 = 20_000;
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    let file = place.write(&sampled(&place, "").await?)?;
    let senders: Vec<_> = (1..=SENDERS).map(|i| format!("n{i}.example.net")).collect();
    old_copied(&place, &senders).await?;
    source.publish_all(senders.iter().map(|sender| report(sender))).await?;
    source.publish(&report("last")).await?;
    let service = Service::replicate(&file).spawn()?;
    copied(&mut target, "S", SENDERS + 1, &service).await?;
    settled(&place, 2 * SENDERS + 1, &service).await?;
    let advisories = copied(&mut source, "ADV", 1, &service).await?;
    ensure!(subjects(&advisories) == ["adv.new.last"], "{:?}", subjects(&advisories));
    let stored = target.read_stream("S").await?;
    ensure!(stored.last().is_some_and(|message| message.payload == report("last").payload), "{}", stored.len());
    Ok(())
}

/// Choria's replicator copies a message whose force field is there; ours, one whose force field is `true`.
#[tokio::test]
async fn the_rule_of_chorias_replicator_can_be_chosen() -> Result<()> {
    let forced = |value: bool| Outgoing::new("s.report", json!({"sender": "n1", "force": value}).to_string());
    for (compat, expect) in [("", 3), ("    compat: choria\n", 4)] {
        let place = Place::start().await?;
        let more = format!("    inspect_force_field: force\n{compat}");
        let file = place.write(&sampled(&place, &more).await?)?;
        let messages = [report("n1"), forced(false), forced(true), report("n2")];
        place.source().await?.publish_all(messages.clone()).await?;
        let service = Service::replicate(&file).spawn()?;
        let stored = copied(&mut place.target().await?, "S", expect, &service).await?;
        settled(&place, 4, &service).await?;
        let left_out = (expect == 3).then_some(&messages[1].payload);
        let expect = messages.iter().map(|message| &message.payload).filter(|payload| Some(*payload) != left_out);
        ensure!(stored.iter().map(|message| &message.payload).eq(expect), "{compat}: {stored:?}");
    }
    Ok(())
}

#[tokio::test]
async fn what_an_old_leader_told_is_known_when_it_hands_over() -> Result<()> {
    const KEY: &str = "$KV.CHORIA_LEADER_ELECTION.SR_A_S";
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    make_election_bucket(&mut source, Duration::from_secs(30)).await?;
    let file = place.write(&sampled(&place, "    leader_election_name: NEW\n").await?)?;
    source.publish(&Outgoing::new(KEY, "OLD")).await?;
    let service = Service::replicate(&file).spawn()?;
    let client = connect(&place.source.url()).await?;
    let mut told = client.subscribe("choria.stream-replicator.sync.>").await?;
    let cli = Cli::new(&place.source.url());
    let watching = cli.start(["admin", "gossip"], "")?;

    // The old one leads: it publishes a sender before it copies its message.
    let seen = json!({"seen": Utc::now(), "copied": "0001-01-01T00:00:00Z", "size": 15, "value": "n1"});
    wait_for("the gossip to be heard", LIMIT, async || {
        let _ = client.publish("choria.stream-replicator.sync.S.A", seen.to_string().into()).await;
        let page = http_get(&format!("127.0.0.1:{}", place.port), "/metrics").await;
        let heard = |line: &str| line.contains("tracker_seen_by_gossip{") && !line.ends_with(" 0");
        page.is_ok_and(|(_, page)| page.lines().any(heard))
    })
    .await
    .with_context(|| service.log())?;
    old_copied_one(&place).await?;
    source.publish(&Outgoing::new(KEY, "").with_lines(&["KV-Operation: DEL"])).await?;
    source.publish_all(["n1", "n2"].map(report)).await?;
    copied(&mut target, "S", 2, &service).await?;
    settled(&place, 3, &service).await?;
    let advisories = copied(&mut source, "ADV", 1, &service).await?;
    ensure!(subjects(&advisories) == ["adv.new.n2"], "{:?}", subjects(&advisories));

    let ours = wait_value("our own gossip", LIMIT, async || {
        let message = told.next().await?;
        let item: Value = serde_json::from_slice(&message.payload).ok()?;
        (item["value"] == "n2").then_some((message.subject.to_string(), item))
    });
    let (subject, item) = ours.await?;
    ensure!(subject == "choria.stream-replicator.sync.S.A", "{subject}");
    ensure!(item["size"] == 15 && item["copied"] == "0001-01-01T00:00:00Z", "{item}");
    watching.shows("[S.A] size: 15 advised: false: copied: never n2").await?;
    Ok(())
}

/// The old leader copies the message of `n1`.
async fn old_copied_one(place: &Place) -> Result<()> {
    place.source().await?.publish(&report("n1")).await?;
    let copy = report("n1").with_lines(&["Choria-SR-Source: S 1 A A 1700000000000"]);
    place.target().await?.publish(&copy).await.map(|_| ())
}
