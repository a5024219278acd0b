//! Kind `mirror`: the target's server stores what the service feeds it, with the sequences and times of the source.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nats_lane::{
    Connection, Endpoint, Turn,
    leafnode::{Leaf, LeafLogin},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::leafnode::VERSIONS;
use crate::harness::{
    Cluster, End, LIMIT, Outgoing, Raw, Role, SITE, Server, Service, Site, Stored, client::refused, request,
    server::free_port, wait_for,
};

const STREAM: &str = "ORDERS";

/// A site whose target has a leafnode port, and the fields of a document that mirrors.
async fn begin(version: &str, arguments: &[&str]) -> Result<(Site, Value)> {
    begin_as("mirror", version, arguments).await
}

/// The same for a native kind.
pub(crate) async fn begin_as(kind: &str, version: &str, arguments: &[&str]) -> Result<(Site, Value)> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
    let target = Server::builder(Role::Target).version(version).config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target);
    let site = site.args(arguments.iter().copied()).start().await?;
    let fields = json!({"kind": kind, "target_leaf_url": format!("nats-leaf://127.0.0.1:{port}")});
    Ok((site, fields))
}

/// A server's configuration: a leafnode port, and an account with the users `admin` and `leaf`, of which the second one has
/// these permissions.
pub(super) fn leaf_users(port: u16, permissions: &str) -> String {
    format!(
        "leafnodes {{ listen: \"127.0.0.1:{port}\" }}\naccounts {{ A: {{ jetstream: enabled, users: [ \
         {{ user: admin, password: admin }}, {{ user: leaf, password: leaf, {permissions} }} ] }} }}"
    )
}

/// Message `number` of a source: every kind of header that a mirror keeps on all versions.
pub(super) fn message(number: u64, at: &str) -> Outgoing {
    let subject = format!("orders.{}{at}", number % 7);
    let message = Outgoing::new(subject, vec![b'x'; number as usize % 300]);
    match number % 5 {
        0 => message,
        1 => message.with_lines(&["Color: blue", "color:  2", "Color: red"]),
        2 => message.with_block(&b"NATS/1.0\r\nno colon\r\n A : \xff\xfe \r\nB:\r\n\r\n"[..]),
        3 => message.with_lines(&[&format!("Nats-Msg-Id: {number}")]),
        _ => message.with_lines(&["Choria-SR-Source: X 1 Y Z 5"]),
    }
}

/// What is stored at both sides is the same: sequence, time, subject, headers and payload.
async fn verify(site: &Site, what: &str) -> Result<usize> {
    let (from, to) = (site.source().await?.read_stream(STREAM).await?, site.target().await?.read_stream(STREAM).await?);
    for (original, copy) in from.iter().zip(&to) {
        ensure!(original == copy, "{what}: {original:?} became {copy:?}\n{}", site.service.log());
    }
    ensure!(from.len() == to.len(), "{what}: {} messages became {}\n{}", from.len(), to.len(), site.service.log());
    let states = (site.source().await?.stream_state(STREAM).await?, site.target().await?.stream_state(STREAM).await?);
    ensure!(states.0["last_seq"] == states.1["last_seq"], "{what}: {states:?}");
    Ok(from.len())
}

#[tokio::test]
async fn a_mirror_equals_its_source() -> Result<()> {
    const MESSAGES: u64 = 10_000;
    for version in VERSIONS {
        let (site, fields) = begin(version, &[]).await?;
        let mut source = site.source_stream(STREAM, json!({"duplicate_window": 100_000_000})).await?;
        // Servers of 2.10 split the subject at the last `@`.
        let at = if version == "2.10.26" { "" } else { ".a@b" };
        let half = MESSAGES / 2;
        source.publish_all((1..=half).map(|number| message(number, at))).await?;
        for hole in (10..half).step_by(10) {
            source.api(&format!("STREAM.MSG.DELETE.{STREAM}"), json!({"seq": hole})).await?;
        }
        site.add(STREAM, fields).await?;
        source.publish_all((half + 1..=MESSAGES).map(|number| message(number, at))).await?;
        let row = site.settled(STREAM, MESSAGES).await.context(version)?;
        assert_eq!(row["transport"], "feed", "{row}");
        assert_eq!(row["position"]["target_seq"], MESSAGES, "{row}");
        let equal = verify(&site, version).await?;
        assert_eq!(equal as u64, MESSAGES - half / 10 + 1);
        // One session served all of it.
        let log = site.service.log();
        assert_eq!(log.matches("the target asked for messages").count(), 1, "{version}: {log}");
    }
    Ok(())
}

/// What is published in the background, a little at a time, until it is stopped.
struct Load {
    stop: CancellationToken,
    published: JoinHandle<Result<u64>>,
}

impl Load {
    fn start(site: &Site) -> Self {
        let (url, stop) = (site.source.url(), CancellationToken::new());
        let until = stop.clone();
        let published = tokio::spawn(async move {
            let mut raw = Raw::connect(&url).await?;
            let mut last = 0;
            while !until.is_cancelled() {
                raw.publish_all((last + 1..=last + 50).map(|number| message(number, ""))).await?;
                last += 50;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(last)
        });
        Self { stop, published }
    }

    /// Returns how many messages there are.
    async fn end(self) -> Result<u64> {
        self.stop.cancel();
        self.published.await?
    }
}

/// Waits until the mirror has moved past where it is.
async fn moves(site: &Site, what: &str) -> Result<()> {
    let last = async || site.target().await.ok()?.stream_state(STREAM).await.ok()?["last_seq"].as_u64();
    let before = last().await.unwrap_or_default();
    wait_for(what, LIMIT, async || last().await.is_some_and(|now| now > before))
        .await
        .with_context(|| site.service.log())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_of_everything_lose_and_double_nothing() -> Result<()> {
    for version in VERSIONS {
        let (mut site, fields) = begin(version, &[]).await?;
        site.source_stream(STREAM, json!({})).await?;
        site.add(STREAM, fields).await?;
        let load = Load::start(&site);
        moves(&site, "the mirror to begin").await?;
        for _ in 0..3 {
            site.service.kill()?;
            site.service.restart().await?;
            // The target waits for the feed that is gone: a heartbeat contradicts it.
            moves(&site, "the mirror to continue after a kill of the service").await?;
        }
        site.target.kill()?;
        site.target.restart().await?;
        moves(&site, "the mirror to continue after a kill of the target").await?;
        let messages = load.end().await?;
        site.settled(STREAM, messages).await.context(version)?;
        assert_eq!(verify(&site, version).await? as u64, messages);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_feeds_while_the_old_feed_is_frozen() -> Result<()> {
    const TTL: &str = "3s";
    for version in ["2.10.26", "2.15.1"] {
        let (site, fields) = begin(version, &["--instance", "one", "--lease-ttl", TTL]).await?;
        site.source_stream(STREAM, json!({})).await?;
        site.add(STREAM, fields).await?;
        let load = Load::start(&site);
        moves(&site, "the mirror to begin").await?;
        let arguments = ["--lease-ttl", TTL];
        let two = Service::builder(&site.service_url(), SITE).instance("two").args(arguments).start().await?;
        let leads = async |leader: &str| site.row(STREAM).await.is_some_and(|row| row["leader"] == leader);
        wait_for("a leader", LIMIT, async || leads("one").await || leads("two").await).await?;
        let (old, new) = if leads("one").await { (&site.service, "two") } else { (&two, "one") };
        old.freeze()?;
        wait_for("a successor", LIMIT, async || leads(new).await).await?;
        moves(&site, "the successor to feed").await?;
        old.thaw()?;
        let messages = load.end().await?;
        wait_for("everything", LIMIT, async || {
            let row = site.row(STREAM).await.unwrap_or_default();
            row["position"]["source_seq"] == messages && row["lag"]["messages"] == 0
        })
        .await
        .with_context(|| two.log())?;
        assert_eq!(verify(&site, version).await? as u64, messages);
    }
    Ok(())
}

pub(super) fn error(row: &Value) -> &str {
    row["last_error"]["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_recreated_source_is_held_and_nothing_is_changed() -> Result<()> {
    let (site, fields) = begin("2.15.1", &[]).await?;
    site.filled(STREAM, 100).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 100).await?;
    let before = site.target().await?.read_stream(STREAM).await?;
    let mut source = site.source().await?;
    source.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    for messages in [50, 150] {
        // Shorter than the mirror first, then longer.
        if messages == 50 {
            site.source_stream(STREAM, json!({})).await?;
        }
        let from = if messages == 50 { 1 } else { 51 };
        site.publish(STREAM, from..=messages).await?;
        let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
        assert!(error(&row).contains("is not the one that"), "{row}");
    }
    site.send("retry", json!({"replication": STREAM})).await?;
    let other = |row: &Value| row["state"] == "held" && error(row).contains("stored at another time");
    site.row_when(STREAM, "is held for another stream", other).await?;
    assert_eq!(site.target().await?.read_stream(STREAM).await?, before);
    Ok(())
}

#[tokio::test]
async fn a_promoted_mirror_is_held() -> Result<()> {
    let (site, fields) = begin("2.15.1", &[]).await?;
    site.filled(STREAM, 100).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 100).await?;
    let mut target = site.target().await?;
    let mut config = target.api(&format!("STREAM.INFO.{STREAM}"), Value::Null).await?["config"].take();
    config.as_object_mut().context("a configuration")?.remove("mirror");
    config["subjects"] = json!(["orders.>"]);
    target.api(&format!("STREAM.UPDATE.{STREAM}"), config).await?;
    assert_eq!(target.publish(&Outgoing::new("orders.own", "own")).await?, 101);
    site.publish(STREAM, 101..=120).await?;
    let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
    assert!(error(&row).contains("is not a mirror"), "{row}");
    assert_eq!(site.target().await?.stream_state(STREAM).await?["messages"], 101);
    Ok(())
}

#[tokio::test]
async fn other_targets_and_sources_are_held_with_the_reason() -> Result<()> {
    let (site, fields) = begin("2.15.1", &[]).await?;
    site.source_stream("QUEUE", json!({"retention": "workqueue"})).await?;
    site.add("QUEUE", crate::harness::site::merged(fields.clone(), json!({"start_at_end": true}))).await?;
    let row = site.row_when("QUEUE", "is held", |row| row["state"] == "held").await?;
    assert!(error(&row).contains("is a work queue"), "{row}");
    site.filled(STREAM, 10).await?;
    site.target_stream(STREAM, json!({})).await?;
    site.add(STREAM, fields).await?;
    let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
    assert!(error(&row).contains("is not a mirror"), "{row}");
    // Without its stream there is room for the mirror.
    site.target().await?.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    site.send("retry", json!({"replication": STREAM})).await?;
    site.settled(STREAM, 10).await?;
    verify(&site, "after the stream was deleted").await?;
    // Its position is that of the mirror.
    request(&site.client, "replicator.pause", json!({"replication": STREAM})).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    let moved = site.send("position", json!({"replication": STREAM, "source_seq": 3})).await?;
    refused(&moved, 409, "cannot be moved");
    site.publish(STREAM, 11..=20).await?;
    request(&site.client, "replicator.resume", json!({"replication": STREAM})).await?;
    site.settled(STREAM, 20).await?;
    verify(&site, "after a pause").await.map(drop)
}

/// A mirror that begins in the middle keeps the sequences of the source.
#[tokio::test]
async fn a_mirror_begins_where_the_document_says() -> Result<()> {
    for version in VERSIONS {
        let (site, fields) = begin(version, &[]).await?;
        let mut source = site.source_stream(STREAM, json!({})).await?;
        site.publish(STREAM, 1..=100).await?;
        source.api(&format!("STREAM.PURGE.{STREAM}"), json!({"seq": 21})).await?;
        let middle = source.read_stream(STREAM).await?.into_iter().find(|message| message.seq == 61);
        let middle = i64::try_from(middle.context("a message")?.time)?;
        let middle = chrono::DateTime::from_timestamp_nanos(middle).to_rfc3339_opts(chrono::SecondsFormat::Nanos, true);
        for (name, start, first) in [
            ("all", json!({}), 21),
            ("sequence", json!({"start_sequence": 51}), 51),
            ("time", json!({"start_time": middle}), 61),
            ("delta", json!({"start_delta": "1h"}), 21),
            ("end", json!({"start_at_end": true}), 101),
        ] {
            let mut document = site.document_with(STREAM, fields.clone());
            document["name"] = name.into();
            document["target_stream"] = name.into();
            for (field, value) in start.as_object().context("an object")? {
                document[field] = value.clone();
            }
            request(&site.client, "replicator.config.add", document).await?;
            site.settled(&format!("{STREAM}.{name}"), 100).await.with_context(|| format!("{version} {name}"))?;
            let state = site.target().await?.stream_state(name).await?;
            assert_eq!(state["first_seq"], first, "{version} {name}: {state}");
        }
        site.publish(STREAM, 101..=110).await?;
        site.settled(&format!("{STREAM}.end"), 110).await?;
        let all = site.source().await?.read_stream(STREAM).await?;
        for (name, first) in [("all", 21), ("sequence", 51), ("time", 61), ("delta", 21), ("end", 101)] {
            site.settled(&format!("{STREAM}.{name}"), 110).await?;
            let expect: Vec<_> = all.iter().filter(|message| message.seq >= first).cloned().collect();
            assert_eq!(site.target().await?.read_stream(name).await?, expect, "{version} {name}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_way_back_is_a_loop() -> Result<()> {
    let (site, fields) = begin("2.15.1", &[]).await?;
    site.filled(STREAM, 5).await?;
    site.target_stream(STREAM, json!({})).await?;
    let cycle = async || {
        let document = site.document_with(STREAM, fields.clone());
        let report = request(&site.client, "replicator.config.validate", document).await?;
        let checks = report["preflight"]["target"]["checks"].as_array().context("checks")?.clone();
        checks.into_iter().find(|check| check["name"] == "cycle").context("the check for loops")
    };
    assert_eq!(cycle().await?["result"], "ok");
    let back =
        json!({"stream": STREAM, "name": "back", "source_url": site.target.url(), "target_url": site.source.url()});
    request(&site.client, "replicator.config.add", back).await?;
    let found = cycle().await?;
    let text = found["message"].as_str().context("a message")?;
    ensure!(found["result"] == "warning" && text.contains("`ORDERS.back`"), "{found}");
    Ok(())
}

/// A target that stores nothing for a while: lag and headroom are known meanwhile, and end with it.
#[tokio::test]
async fn a_mirror_that_lags_shows_lag_and_headroom() -> Result<()> {
    let (site, fields) = begin("2.15.1", &[]).await?;
    site.source_stream(STREAM, json!({"max_age": 3_600_000_000_000_u64})).await?;
    site.publish(STREAM, 1..=10).await?;
    site.add(STREAM, fields).await?;
    let row = site.settled(STREAM, 10).await?;
    assert_eq!(
        (&row["headroom"], &row["target_mode"], &row["ordering"]),
        (&Value::Null, &json!("exclusive"), &json!("strict"))
    );
    site.target.freeze()?;
    site.publish(STREAM, 11..=20).await?;
    let lags = |row: &Value| row["lag"]["messages"] == 10 && row["headroom"]["limit"] == "age";
    let row = site.row_when(STREAM, "lags", lags).await?;
    let left = row["headroom"]["seconds"].as_f64().context("seconds")?;
    ensure!((3_000.0..=3_600.0).contains(&left) && row["in_flight"]["messages"] == 10, "{row}");
    site.target.thaw()?;
    site.settled(STREAM, 20).await?;
    site.row_when(STREAM, "has caught up", |row| row["headroom"].is_null() && row["lag"]["seconds"] == 0.0).await?;
    verify(&site, "after the pause").await.map(drop)
}

/// A bucket: messages are replaced and rolled up, and the target is a JetStream domain that is asked by its name.
#[tokio::test]
async fn a_bucket_is_mirrored_into_a_domain() -> Result<()> {
    const BUCKET: &str = "KV_B";
    for version in VERSIONS {
        let port = free_port()?;
        let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
        let target = Server::builder(Role::Target).version(version).domain("hub").config(&leafnodes).start().await?;
        let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
        let mut source = site.source_stream(
            BUCKET,
            json!({"subjects": ["$KV.B.>"], "max_msgs_per_subject": 2, "allow_rollup_hdrs": true, "deny_delete": true,
                "allow_direct": true, "discard": "new"}),
        )
        .await?;
        let put = |key: u64, value: u64| Outgoing::new(format!("$KV.B.{key}"), value.to_string());
        source.publish_all((0..30).map(|number| put(number % 5, number))).await?;
        let fields = json!({"kind": "mirror", "target_domain": "hub", "name": "hub",
            "limits": {"messages_in_flight": 8, "bytes_in_flight": 1_048_576},
            "target_leaf_url": format!("nats-leaf://127.0.0.1:{port}")});
        site.add(BUCKET, fields).await?;
        let id = format!("{BUCKET}.hub");
        site.settled(&id, 30).await.context(version)?;
        source.publish_all((30..40).map(|number| put(number % 5, number))).await?;
        source.publish(&put(3, 99).with_lines(&["Nats-Rollup: sub"])).await?;
        site.settled(&id, 41).await.context(version)?;
        let (from, to) = (source.read_stream(BUCKET).await?, site.target().await?.read_stream(BUCKET).await?);
        ensure!(from.len() == 9 && from == to, "{version}: {from:?} became {to:?}");
    }
    Ok(())
}

/// The block that `config validate` prints is enough, and lets the leaf user do nothing else.
#[tokio::test]
async fn a_leaf_user_with_the_permissions_that_validate_prints() -> Result<()> {
    for (version, kind) in VERSIONS.into_iter().flat_map(|version| [(version, "mirror"), (version, "source")]) {
        let port = free_port()?;
        let users = |permissions: &str| leaf_users(port, permissions);
        let target = Server::builder(Role::Target).version(version).config(&users("")).start().await?;
        let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
        let fields = json!({"kind": kind, "target_url": site.target.url_as("admin:admin"),
            "target_leaf_url": format!("nats-leaf://leaf:leaf@127.0.0.1:{port}")});
        site.filled(STREAM, 50).await?;
        let validate = async || {
            let document = site.document_with(STREAM, fields.clone());
            let report = request(&site.client, "replicator.config.validate", document).await?;
            let checks = report["preflight"]["target"]["checks"].as_array().context("checks")?.clone();
            let leaf = checks.iter().find(|check| check["name"] == "leafnode").context("the leafnode check")?.clone();
            anyhow::Ok((report, leaf))
        };
        let (report, leaf) = validate().await?;
        assert_eq!(report["valid"], true, "{version}: {report}");
        let text = leaf["message"].as_str().context("a message")?;
        let block = &text[text.find("permissions: {").context("a block")?..];
        let mut site = site;
        site.target.restart_with(&users(block)).await?;
        site.add(STREAM, fields.clone()).await?;
        site.settled(STREAM, 50).await.with_context(|| format!("{version} with {block}"))?;
        let admin = Raw::connect(&site.target.url_as("admin:admin")).await?.read_stream(STREAM).await?;
        let from = site.source().await?.read_stream(STREAM).await?;
        let contents = |all: &[Stored]| all.iter().map(|m| (m.subject.clone(), m.payload.clone())).collect::<Vec<_>>();
        assert_eq!(contents(&admin), contents(&from), "{kind} at {version}");
        assert!(kind == "source" || admin == from, "{version}");
        // The same user may not do anything else: not even listen for answers.
        let client = Raw::connect(&format!("nats://leaf:leaf@127.0.0.1:{}", site.target.port())).await;
        assert!(client.is_err(), "{version}");
        let api = &block[block.find("$SR.").context("a prefix")?..][..20];
        let url = Connection::to(Endpoint::parse(&format!("nats-leaf://leaf:leaf@127.0.0.1:{port}")).expect("a URL"));
        let allowed = format!("{api}.API.>");
        let (name, subscriptions) = ("x".to_owned(), vec!["orders.>".to_owned(), ">".to_owned(), allowed]);
        let mut leaf = Leaf::connect(&url, &LeafLogin { account: name.clone(), name, subscriptions }).await?;
        let mut admin = Raw::connect(&site.target.url_as("admin:admin")).await?;
        for subject in ["orders.1".to_owned(), "other".to_owned(), format!("{api}.API.last")] {
            admin.send_only(&Outgoing::new(subject, "x")).await?;
        }
        let heard = async {
            let mut heard: Vec<String> = Vec::new();
            while !heard.iter().any(|subject| subject.ends_with(".API.last")) {
                if let Turn::Received(batch) = leaf.turn().await? {
                    heard.extend(batch.iter().map(|m| String::from_utf8_lossy(m.subject).into_owned()));
                }
            }
            anyhow::Ok(heard)
        };
        let heard = tokio::time::timeout(LIMIT, heard).await.with_context(|| version.to_owned())??;
        assert!(heard.iter().all(|subject| subject.starts_with(api)), "{version}: {heard:?}");
        if version != "2.10.26" {
            leaf.send(b"orders.1", b"", b"", b"no");
            let error = leaf.round_trip().await.err().with_context(|| format!("{version}: it may publish"))?;
            assert!(error.message.contains("Permissions Violation"), "{version}: {error}");
        }
    }
    Ok(())
}

/// A stream that a person made with the prefix that `config validate` shows, on three servers with a leafnode port each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicated_mirror_made_by_hand_survives_its_servers() -> Result<()> {
    let (mut cluster, leaf_url) = Cluster::with_leafnode_ports().await?;
    let site = Site::small().await?;
    site.source_stream(STREAM, json!({})).await?;
    let fields = json!({"kind": "mirror", "target_url": cluster.url(), "target_leaf_url": leaf_url,
        "no_target_create": true});
    let report =
        request(&site.client, "replicator.config.validate", site.document_with(STREAM, fields.clone())).await?;
    let checks = report["preflight"]["target"]["checks"].as_array().context("checks")?;
    let text = checks.iter().find_map(|check| (check["name"] == "leafnode").then(|| check["message"].as_str())?);
    let text = text.context("the leafnode check")?;
    let root = &text[text.find("$SR.").context("a prefix")?..][..20];
    let external = json!({"api": format!("{root}.API"), "deliver": format!("{root}.D")});
    let mirror = json!({"num_replicas": 3, "mirror": {"name": STREAM, "external": external}});
    cluster.create_stream(STREAM, mirror).await?;
    site.add(STREAM, fields).await?;
    let load = Load::start(&site);
    let position =
        async || site.row(STREAM).await.unwrap_or_default()["position"]["source_seq"].as_u64().unwrap_or_default();
    let moves = async |what: &str| {
        let before = position().await;
        let moved = wait_for(what, 2 * LIMIT, async || position().await > before).await;
        moved.with_context(|| site.service.log())
    };
    moves("the mirror to begin").await?;
    cluster.step_down(STREAM).await?;
    moves("the mirror to continue after a stepdown").await?;
    // The feed is connected to the first server.
    cluster.end(0, End::Killed).await?;
    moves("the mirror to continue without the server of its leafnode").await?;
    cluster.servers[0].restart().await?;
    let messages = load.end().await?;
    site.settled_within(STREAM, messages, 2 * LIMIT).await?;
    cluster.wait_leaders(&[STREAM], None).await?;
    let (from, to) = (site.source().await?.read_stream(STREAM).await?, cluster.read_stream(STREAM).await?);
    ensure!(from == to, "{} messages became {}\n{}", from.len(), to.len(), site.service.log());
    Ok(())
}
