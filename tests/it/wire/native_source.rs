//! Kind `source`: the target stream has a source that the service feeds, beside its own subjects and other sources.

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use nats_lane::{
    Connection, Endpoint, Turn,
    leafnode::{Leaf, LeafLogin},
};
use serde_json::{Value, json};
use stream_replicator::native::FeedSubjects;

use super::{
    leafnode::VERSIONS,
    mirror::{begin_as, error, message},
};
use crate::harness::{
    Cluster, LIMIT, Outgoing, Raw, SITE, Service, Site, Stored,
    client::refused,
    connect,
    raw::{header_values, wait_messages},
    request,
    site::merged,
    wait_for,
};

const STREAM: &str = "ORDERS";
const OTHER: &str = "RETURNS";
const TARGET: &str = "ARCHIVE";

/// What a target stream has of one source stream, as that has it: each message with its sequence there.
fn taken(target: &[Stored], stream: &str) -> Vec<(u64, Stored)> {
    let of = |stored: &Stored| {
        let from = header_values(&stored.header, "Nats-Stream-Source").pop()?;
        let (name, rest) = from.split_once(' ')?;
        let (seq, _) = rest.split_once(' ')?;
        (name.split(':').next() == Some(stream)).then(|| (seq.parse().expect("a sequence"), stored.clone()))
    };
    target.iter().filter_map(of).collect()
}

/// Header lines of a message, without what servers and the feed may do to them.
fn lines(block: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(block);
    let lines = text.split("\r\n").skip(1).filter(|line| !line.is_empty() && !line.starts_with("Nats-Stream-Source:"));
    lines.map(|line| line.replace("Nats-Msg-Id", "Choria-SR-Msg-Id")).collect()
}

/// Everything of a source stream is at the target once and in order; returns how many messages.
async fn verify(site: &Site, stream: &str, what: &str) -> Result<usize> {
    let from = site.source().await?.read_stream(stream).await?;
    let to = taken(&site.target().await?.read_stream(TARGET).await?, stream);
    for (original, (seq, copy)) in from.iter().zip(&to) {
        let same = original.seq == *seq
            && original.subject == copy.subject
            && original.payload == copy.payload
            && lines(&original.header) == lines(&copy.header);
        ensure!(same, "{what}: {original:?} became {copy:?}\n{}", site.service.log());
    }
    ensure!(from.len() == to.len(), "{what}: {} messages became {}\n{}", from.len(), to.len(), site.service.log());
    Ok(from.len())
}

fn into(fields: &Value) -> Value {
    merged(fields.clone(), json!({"target_stream": TARGET}))
}

/// Messages of another stream, with ids that those of the first one have too.
fn other(number: u64) -> Outgoing {
    Outgoing::new("returns.x", format!("{number}")).with_lines(&[&format!("Nats-Msg-Id: {}", number % 500)])
}

/// Waits until the target has messages of a source stream.
async fn begins(site: &Site, stream: &str) -> Result<()> {
    let any = async || {
        let Ok(mut target) = site.target().await else { return false };
        target.read_stream(TARGET).await.is_ok_and(|all| !taken(&all, stream).is_empty())
    };
    wait_for("the source to begin", LIMIT, any).await.with_context(|| site.service.log())
}

/// The names of the sources of the target stream.
async fn sources(site: &Site) -> Result<Vec<String>> {
    let info = site.target().await?.api(&format!("STREAM.INFO.{TARGET}"), Value::Null).await?;
    let all = info["config"]["sources"].as_array().cloned().unwrap_or_default();
    Ok(all.iter().map(|source| source["name"].as_str().unwrap_or_default().to_owned()).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sources_and_own_writes_survive_kills() -> Result<()> {
    const MESSAGES: u64 = 4_000;
    for version in VERSIONS {
        let (mut site, fields) = begin_as("source", version, &[]).await?;
        let fields = into(&merged(fields, json!({"target_update": true})));
        // Ids may be repeated in a stream after a while, and servers before 2.14 would drop what has a known one.
        let window = json!({"duplicate_window": 100_000_000});
        let mut source = site.source_stream(STREAM, window.clone()).await?;
        site.source_stream(OTHER, window).await?;
        let mut target = site.target_stream(TARGET, json!({"subjects": ["own.>"]})).await?;
        site.add(STREAM, fields.clone()).await?;
        site.add(OTHER, fields).await?;
        let url = site.source.url();
        let load = tokio::spawn(async move {
            let mut raw = Raw::connect(&url).await?;
            for first in (1..=MESSAGES).step_by(50) {
                raw.publish_all((first..first + 50).map(|number| message(number, ""))).await?;
                raw.publish_all((first..first + 50).map(other)).await?;
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        });
        begins(&site, STREAM).await?;
        begins(&site, OTHER).await?;
        target.publish(&Outgoing::new("own.1", "own")).await?;
        site.service.kill()?;
        site.service.restart().await?;
        site.target.kill()?;
        site.target.restart().await?;
        load.await??;
        let last =
            async |raw: &mut Raw, stream: &str| raw.stream_state(stream).await.map(|state| state["last_seq"].clone());
        for stream in [STREAM, OTHER] {
            let seq = last(&mut source, stream).await?.as_u64().context("a sequence")?;
            // A target that asked while no feed was connected asks again within 50 s.
            let row = site.settled_within(stream, seq, 2 * LIMIT).await.with_context(|| version.to_owned())?;
            assert_eq!((&row["transport"], &row["target_mode"]), (&json!("feed"), &json!("shared")), "{row}");
            assert_eq!(verify(&site, stream, version).await? as u64, seq);
        }
        let own = site.target().await?.read_stream(TARGET).await?;
        assert_eq!(own.iter().filter(|stored| stored.subject == "own.1").count(), 1);

        // With the replication goes its source, and the other one stays.
        request(&site.client, "replicator.config.delete", json!({"replication": OTHER})).await?;
        assert_eq!(sources(&site).await?, [STREAM], "{version}");
        source.publish(&message(1, "")).await?;
        let seq = last(&mut source, STREAM).await?.as_u64().context("a sequence")?;
        site.settled(STREAM, seq).await?;
        verify(&site, STREAM, version).await?;
    }
    Ok(())
}

/// Streams are added to a target at the same time by two instances, and each is fed by the one that leads it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_add_and_feed_many_sources() -> Result<()> {
    const SOURCES: usize = 6;
    let (site, fields) = begin_as("source", "2.15.1", &["--instance", "one", "--lease-ttl", "3s"]).await?;
    let arguments = ["--lease-ttl", "3s"];
    let two = Service::builder(&site.service_url(), SITE).instance("two").args(arguments).start().await?;
    let names: Vec<String> = (0..SOURCES).map(|number| format!("S{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        let mut source = site.source_stream(name, json!({"subjects": [format!("s{number}.>")]})).await?;
        source.publish_all((0..100).map(|each| Outgoing::new(format!("s{number}.{each}"), "x"))).await?;
    }
    let adds = names.iter().map(|name| site.add(name, into(&fields)));
    futures_util::future::try_join_all(adds).await?;
    for name in &names {
        site.settled(name, 100).await.with_context(|| two.log())?;
    }
    let (old, new) = match site.row("S0").await.context("a row")?["leader"] == "one" {
        true => (&site.service, "two"),
        false => (&two, "one"),
    };
    old.freeze()?;
    let led = async || site.row("S0").await.is_some_and(|row| row["leader"] == new);
    wait_for("a successor", LIMIT, led).await?;
    for (number, _) in names.iter().enumerate() {
        let mut source = site.source().await?;
        source.publish_all((0..50).map(|each| Outgoing::new(format!("s{number}.{each}"), "y"))).await?;
    }
    let all = async || site.at_target(TARGET).await.is_ok_and(|messages| messages >= 150 * SOURCES as u64);
    wait_for("everything", LIMIT, all).await.with_context(|| two.log())?;
    old.thaw()?;
    let mut listed = sources(&site).await?;
    listed.sort();
    assert_eq!(listed, names);
    for name in &names {
        assert_eq!(verify(&site, name, name).await?, 150);
    }
    Ok(())
}

#[tokio::test]
async fn what_does_not_belong_together_is_held() -> Result<()> {
    let (site, fields) = begin_as("source", "2.15.1", &[]).await?;
    site.filled(STREAM, 100).await?;
    let mut target = site.target_stream(TARGET, json!({"subjects": ["own.>"]})).await?;
    let held = async |text: &str| {
        let row = site.row_when(STREAM, text, |row| row["state"] == "held" && error(row).contains(text)).await?;
        anyhow::Ok(row)
    };
    let retry = async || site.send("retry", json!({"replication": STREAM})).await;
    // Nobody said that the stream may be changed.
    site.add(STREAM, into(&fields)).await?;
    held("set `target_update`").await?;
    // As the message says.
    let report = request(&site.client, "replicator.config.validate", site.document_with(STREAM, into(&fields))).await?;
    let text = report["preflight"]["target"]["checks"].to_string();
    let root = &text[text.find("$SR.").context("a prefix")?..][..20];
    let mut config = target.api(&format!("STREAM.INFO.{TARGET}"), Value::Null).await?["config"].take();
    let external = json!({"api": format!("{root}.API"), "deliver": format!("{root}.D")});
    config["sources"] = json!([{"name": STREAM, "external": external}]);
    target.api(&format!("STREAM.UPDATE.{TARGET}"), config.clone()).await?;
    retry().await?;
    site.settled(STREAM, 100).await?;
    assert_eq!(verify(&site, STREAM, "by hand").await?, 100);

    // What the target removes stays removed, also when its server begins again.
    target.api(&format!("STREAM.PURGE.{TARGET}"), Value::Null).await?;
    site.source().await?.publish(&message(101, "")).await?;
    site.settled(STREAM, 101).await?;
    assert_eq!(taken(&target.read_stream(TARGET).await?, STREAM).len(), 1);

    // The source becomes another stream.
    let moved = site.send("pause", json!({"replication": STREAM})).await?;
    assert!(moved.error.is_none());
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    let moved = site.send("position", json!({"replication": STREAM, "source_seq": 3})).await?;
    refused(&moved, 409, "cannot be moved");
    site.source().await?.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    site.filled(STREAM, 150).await?;
    request(&site.client, "replicator.resume", json!({"replication": STREAM})).await?;
    held("is not the one that").await?;
    assert_eq!(taken(&target.read_stream(TARGET).await?, STREAM).len(), 1);

    // The source in the target is changed.
    config["sources"][0]["external"]["deliver"] = "other.D".into();
    target.api(&format!("STREAM.UPDATE.{TARGET}"), config).await?;
    retry().await?;
    held("the source was changed").await.map(drop)
}

/// Subjects are filtered and mapped on the way, and a stream that removes what is acknowledged gives everything once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_filters_and_mappings_are_fed() -> Result<()> {
    const MESSAGES: u64 = 1_000;
    for version in ["2.10.26", "2.15.1"] {
        for kind in ["mirror", "source"] {
            let (mut site, fields) = begin_as(kind, version, &[]).await?;
            let mut source = site.source_stream(STREAM, json!({"retention": "workqueue", "subjects": ["q.>"]})).await?;
            let job = |number: u64| Outgoing::new(format!("q.{}", number % 4), format!("{number}"));
            source.publish_all((1..=MESSAGES).map(job)).await?;
            let mapped = json!({"target_stream": TARGET, "filter_subjects": ["q.0", "q.1", "q.2"],
                "exclude_subjects": ["q.2"], "subject_transforms": [{"src": "q.*", "dest": "done.$1"}]});
            site.add(STREAM, merged(fields, mapped)).await?;
            let what = format!("{kind} at {version}");
            let kept = |up_to: u64| (1..=up_to).filter(|number| number % 4 < 2).count() as u64;
            // What no filter matches stays in the queue, for other consumers.
            let left = |up_to: u64| (1..=up_to).filter(|number| number % 4 == 3).count() as u64;
            let empties = async |source: &mut Raw, up_to: u64| {
                let mut last = Value::Null;
                let empty = async || {
                    last = source.stream_state(STREAM).await.unwrap_or_default();
                    last["messages"] == left(up_to)
                };
                let emptied = wait_for("the queue to have given everything", LIMIT, empty).await;
                emptied.with_context(|| format!("{what}: {last}\n{}", site.service.log()))
            };
            empties(&mut source, MESSAGES).await?;
            let log = site.service.log();
            ensure!(!log.contains("trying again"), "{what}: the consumer delivers from its creation on\n{log}");
            site.service.kill()?;
            site.service.restart().await?;
            source.publish_all((MESSAGES + 1..=2 * MESSAGES).map(job)).await?;
            let empties = async |source: &mut Raw, up_to: u64| {
                let empty =
                    async || source.stream_state(STREAM).await.is_ok_and(|state| state["messages"] == left(up_to));
                wait_for("the queue to have given the rest", LIMIT, empty).await.with_context(|| site.service.log())
            };
            empties(&mut source, 2 * MESSAGES).await.context(what.clone())?;
            let copies = site.target().await?.read_stream(TARGET).await?;
            assert_eq!(copies.len() as u64, kept(2 * MESSAGES), "{what}");
            let numbers = (1..=2 * MESSAGES).filter(|number| number % 4 < 2);
            for (number, copy) in numbers.zip(&copies) {
                assert_eq!(copy.payload, number.to_string().into_bytes(), "{what}: {copy:?}");
                assert_eq!(copy.subject, format!("done.{}", number % 4), "{what}");
                assert!(kind == "source" || copy.seq == number, "{what}: {copy:?}");
            }
        }
    }
    Ok(())
}

/// Replaces a stream by its backup, as `nats stream restore` does: its messages are the same, and `created` is not.
async fn restore(site: &Site, stream: &str) -> Result<()> {
    let client = connect(&site.source.url()).await?;
    let inbox = client.new_inbox();
    let mut chunks = client.subscribe(inbox.clone()).await?;
    let call = async |subject: String, body: Vec<u8>| {
        let reply = client.request(subject, body.into()).await?;
        let reply: Value = serde_json::from_slice(&reply.payload).unwrap_or_default();
        ensure!(reply.get("error").is_none(), "{reply}");
        Ok(reply)
    };
    let asked = json!({"deliver_subject": inbox, "no_consumers": true, "chunk_size": 65_536});
    let backup = call(format!("$JS.API.STREAM.SNAPSHOT.{stream}"), serde_json::to_vec(&asked)?).await?;
    let mut data = Vec::new();
    loop {
        let chunk = tokio::time::timeout(LIMIT, chunks.next()).await?.context("a chunk")?;
        if chunk.payload.is_empty() {
            break;
        }
        data.push(chunk.payload.clone());
        if let Some(reply) = chunk.reply {
            client.publish(reply, "".into()).await?;
        }
    }
    call(format!("$JS.API.STREAM.DELETE.{stream}"), Vec::new()).await?;
    let asked = json!({"config": backup["config"], "state": backup["state"]});
    let begun = call(format!("$JS.API.STREAM.RESTORE.{stream}"), serde_json::to_vec(&asked)?).await?;
    let to = begun["deliver_subject"].as_str().context("a subject")?.to_owned();
    for chunk in data {
        call(to.clone(), chunk.to_vec()).await?;
    }
    call(to, Vec::new()).await.map(drop)
}

/// A native source of server 2.15 copies everything again when its origin was restored from a backup.
#[tokio::test]
async fn a_restored_source_is_not_copied_again() -> Result<()> {
    let (mut site, fields) = begin_as("source", "2.15.1", &[]).await?;
    site.filled(STREAM, 60).await?;
    site.add(STREAM, into(&fields)).await?;
    site.settled(STREAM, 60).await?;
    let created = async || {
        let info = site.source().await?.api(&format!("STREAM.INFO.{STREAM}"), Value::Null).await?;
        anyhow::Ok(info["created"].clone())
    };
    let before = created().await?;
    restore(&site, STREAM).await?;
    ensure!(created().await? != before, "the restored stream is the old one");
    site.publish(STREAM, 61..=70).await?;
    site.settled(STREAM, 70).await?;
    assert_eq!(verify(&site, STREAM, "after the restore").await?, 70);
    // Nor when the target determines by itself where to continue.
    site.target.kill()?;
    site.target.restart().await?;
    site.publish(STREAM, 71..=80).await?;
    site.settled_within(STREAM, 80, 2 * LIMIT).await?;
    assert_eq!(verify(&site, STREAM, "after a restart").await?, 80);
    Ok(())
}

/// A mirror becomes a stream that takes messages of its own, and nothing is lost on the way.
#[tokio::test]
async fn a_mirror_is_promoted() -> Result<()> {
    let (site, fields) = begin_as("mirror", "2.15.1", &[]).await?;
    site.filled(STREAM, 50).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 50).await?;
    let promote = async |fields: Value| site.send("promote", merged(json!({"replication": STREAM}), fields)).await;
    let dry = promote(json!({"dry_run": true})).await?.body;
    assert_eq!((&dry["dry_run"], &dry["lag"], &dry["last_seq"]), (&json!(true), &json!(0), &json!(50)), "{dry}");
    let mut target = site.target().await?;
    let config = async |target: &mut Raw| {
        anyhow::Ok(target.api(&format!("STREAM.INFO.{STREAM}"), Value::Null).await?["config"].take())
    };
    assert!(config(&mut target).await?["mirror"].is_object());

    // Messages that the mirror cannot get: not without `force`, and the feed continues then.
    site.target.freeze()?;
    site.publish(STREAM, 51..=55).await?;
    let refused_now = promote(json!({})).await?;
    assert!(refused_now.error.is_some(), "{:?}", refused_now.body);
    site.target.thaw()?;
    site.settled(STREAM, 55).await?;

    let done = site.cli().ok(["promote", STREAM]).await?;
    ensure!(done.contains("has all messages of its source, replication deleted"), "{done}");
    let now = config(&mut target).await?;
    assert!(now.get("mirror").is_none(), "{now}");
    assert_eq!(
        now["subjects"],
        site.source().await?.api(&format!("STREAM.INFO.{STREAM}"), Value::Null).await?["config"]["subjects"]
    );
    assert_eq!(target.publish(&Outgoing::new("orders.own", "own")).await?, 56);
    assert_eq!(site.ask("config.get", STREAM).await?.error, Some(404));

    // Only a mirror is promoted, and only by servers that can.
    site.filled(OTHER, 5).await?;
    site.add(OTHER, json!({})).await?;
    refused(&site.send("promote", json!({"replication": OTHER})).await?, 409, "feeds no mirror");
    let (old, fields) = begin_as("mirror", "2.10.26", &[]).await?;
    old.filled(STREAM, 5).await?;
    old.add(STREAM, fields).await?;
    old.settled(STREAM, 5).await?;
    refused(&old.send("promote", json!({"replication": STREAM})).await?, 409, "cannot turn a mirror");
    Ok(())
}

/// Answers the next request below an API prefix as another feed, and delivers messages from this one on.
async fn feed_instead(leaf: &mut Leaf, root: &str, from: u64, messages: u64) -> Result<()> {
    let (mut asked, mut listens) = (false, false);
    let mut poked: Vec<String> = Vec::new();
    // The subject of the durable consumer, on which the target listens all the time.
    let own = format!("{root}.D.S");
    while !listens {
        if let Turn::Received(batch) = leaf.turn().await? {
            for message in batch.iter() {
                if !String::from_utf8_lossy(message.subject).contains(".CONSUMER.RESET.") {
                    continue;
                }
                let config = json!({"name": "OTHER", "deliver_subject": own, "deliver_policy": "all",
                    "ack_policy": "flow_control", "flow_control": true, "idle_heartbeat": 1_000_000_000,
                    "max_ack_pending": 1_000, "replay_policy": "instant"});
                let answer = json!({"type": "io.nats.jetstream.api.v1.consumer_reset_response", "name": "OTHER",
                    "stream_name": STREAM, "config": config, "reset_seq": from,
                    "delivered": {"consumer_seq": 0, "stream_seq": from - 1}});
                leaf.send(message.reply, b"", b"", answer.to_string().as_bytes());
                asked = true;
            }
        }
        for interest in leaf.take_interest().into_iter().filter(|interest| interest.begins) {
            listens |= asked && interest.subject == own;
            if interest.subject.starts_with(&format!("{root}.D.")) && !poked.contains(&interest.subject) && !listens {
                // The target asks again where a heartbeat contradicts it.
                let header =
                    b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 999999\r\nNats-Last-Stream: 9\r\n\r\n";
                leaf.send(interest.subject.as_bytes(), b"", header, b"");
                poked.push(interest.subject);
            }
        }
    }
    for (number, seq) in (from..from + messages).enumerate() {
        let reply = format!("$JS.ACK.{STREAM}.OTHER.1.{seq}.{}.1000.0@orders.x", number + 1);
        leaf.send(own.as_bytes(), reply.as_bytes(), b"", b"other");
    }
    leaf.round_trip().await?;
    Ok(())
}

#[tokio::test]
async fn another_feed_of_the_same_target_is_detected() -> Result<()> {
    let (site, fields) = begin_as("source", "2.15.1", &[]).await?;
    site.filled(STREAM, 50).await?;
    let url = fields["target_leaf_url"].as_str().context("a URL")?.to_owned();
    site.add(STREAM, into(&fields)).await?;
    site.settled(STREAM, 50).await?;
    let info = site.target().await?.api(&format!("STREAM.INFO.{TARGET}"), Value::Null).await?;
    let api = info["config"]["sources"][0]["external"]["api"].as_str().context("a prefix")?.to_owned();
    let root = api.strip_suffix(".API").context("the prefix")?;
    site.publish(STREAM, 51..=60).await?;
    site.settled(STREAM, 60).await?;
    site.service.freeze()?;
    let name = "somebody-else".to_owned();
    let login = LeafLogin { account: name.clone(), name, subscriptions: vec![format!("{api}.>")] };
    let mut leaf = Leaf::connect(&Connection::to(Endpoint::parse(&url).expect("a URL")), &login).await?;
    tokio::time::timeout(LIMIT, feed_instead(&mut leaf, root, 61, 5)).await.context("to be asked")??;
    let copied = async || site.at_target(TARGET).await.is_ok_and(|messages| messages == 65);
    wait_for("messages of the other feed", LIMIT, copied).await?;
    drop(leaf);
    site.publish(STREAM, 61..=70).await?;
    site.service.thaw()?;
    let held = |row: &Value| row["state"] == "held" && error(row).contains("another feed answers");
    site.row_when(STREAM, "is held", held).await?;
    assert_eq!(site.at_target(TARGET).await?, 65);
    Ok(())
}

/// A new leader of a replicated stream asks at once when a leafnode connection comes, and again when it knows what
/// the stream holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicated_target_that_asks_twice_gets_each_once() -> Result<()> {
    const MESSAGES: u64 = 20_000;
    let (cluster, leaf_url) = Cluster::with_leafnode_ports().await?;
    let site = Site::small().await?;
    site.filled(STREAM, MESSAGES).await?;
    let mut raw = Raw::connect(&cluster.servers[0].url()).await?;
    for round in 0..16 {
        // Each replication has a prefix of its own.
        let (id, target) = (format!("R{round}"), format!("{TARGET}{round}"));
        let subjects = FeedSubjects::of(SITE, &id);
        let source = json!({"name": STREAM, "external": {"api": subjects.api(), "deliver": subjects.deliver()}});
        cluster.create_stream(&target, json!({"subjects": [], "num_replicas": 3, "sources": [source]})).await?;
        // The leafnode connection comes at another moment of the new leader's first 0.6 s each time.
        tokio::time::sleep(std::time::Duration::from_millis(25 * round)).await;
        let fields = json!({"kind": "source", "name": id, "id": id, "target_url": cluster.url(),
            "target_leaf_url": leaf_url, "target_stream": target});
        request(&site.client, "replicator.config.add", site.document_with(STREAM, fields)).await?;
        wait_messages(&mut raw, &target, MESSAGES, LIMIT).await.with_context(|| site.service.log())?;
        let found = raw.stream_state(&target).await?["messages"].as_u64();
        ensure!(found == Some(MESSAGES), "round {round}: {found:?} messages\n{}", site.service.log());
        request(&site.client, "replicator.config.delete", json!({"replication": id, "keep": true})).await?;
        raw.api(&format!("STREAM.DELETE.{target}"), Value::Null).await?;
    }
    Ok(())
}
