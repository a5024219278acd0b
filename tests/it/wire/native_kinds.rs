//! What surrounds a native feed: a changed `kind`, logins that end, replication loops, ages, a large account.

use std::{
    fs,
    ops::RangeInclusive,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use async_nats::{ConnectOptions, jetstream};
use nats_lane::{
    Connection, Endpoint,
    leafnode::{Leaf, LeafLogin},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use super::{
    leafnode::VERSIONS,
    mirror::{begin_as, error, leaf_users},
};
use crate::harness::{
    LIMIT, Outgoing, Role, Server, Site, Stored, request, server::free_port, signed::SignedAccount, site::merged,
    wait_for,
};

const STREAM: &str = "ORDERS";

/// Subjects and payloads, which say which message it is.
fn contents(stored: &[Stored]) -> Vec<(&str, &[u8])> {
    stored.iter().map(|message| (message.subject.as_str(), message.payload.as_slice())).collect()
}

/// The target has everything of the source once and in order.
async fn has_each_once(site: &Site, what: &str) -> Result<()> {
    let (from, to) = (site.source().await?.read_stream(STREAM).await?, site.target().await?.read_stream(STREAM).await?);
    ensure!(
        contents(&from) == contents(&to),
        "{what}: {} messages became {}\n{}",
        from.len(),
        to.len(),
        site.service.log()
    );
    Ok(())
}

/// A replication that was deleted with its records leaves its messages: added again as another kind, it stores nothing twice.
#[tokio::test]
async fn a_deleted_replication_does_not_return_as_another_kind() -> Result<()> {
    for (first, second) in
        [("copy", "source"), ("source", "copy"), ("copy", "mirror"), ("mirror", "copy"), ("source", "source")]
    {
        let what = format!("{first} and {second}");
        let (site, fields) = begin_as("source", "2.15.1", &[]).await?;
        let of = |kind: &str| {
            let fields = if kind == "copy" { json!({}) } else { merged(fields.clone(), json!({ "kind": kind })) };
            site.document_with(STREAM, fields)
        };
        site.filled(STREAM, 50).await?;
        request(&site.client, "replicator.config.add", of(first)).await?;
        site.settled(STREAM, 50).await?;
        request(&site.client, "replicator.config.delete", json!({"replication": STREAM})).await?;
        let before = site.target().await?.read_stream(STREAM).await?;
        request(&site.client, "replicator.config.add", of(second)).await?;
        if first == second {
            site.publish(STREAM, 51..=60).await?;
            site.settled_within(STREAM, 60, 2 * LIMIT).await.context(what.clone())?;
            has_each_once(&site, &what).await?;
            continue;
        }
        let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await.context(what.clone())?;
        let text = match (first, second) {
            ("copy", "mirror") => "is not a mirror".to_owned(),
            ("mirror", "copy") => "mirror".to_owned(),
            _ => format!("messages that it got while `kind` was `{first}`"),
        };
        ensure!(error(&row).contains(&text), "{what}: {row}");
        ensure!(site.target().await?.read_stream(STREAM).await? == before, "{what}");
    }
    Ok(())
}

/// Servers from 2.14 on can name domain and account in the reply subjects of deliveries. What is fed is the same.
#[tokio::test]
async fn longer_ack_subjects_of_the_source_change_nothing() -> Result<()> {
    for flag in [false, true] {
        let port = free_port()?;
        let flags = format!("feature_flags {{ js_ack_fc_v2: {flag} }}");
        let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}\n{flags}");
        let target = Server::builder(Role::Target).version("2.15.1").config(&leafnodes).start().await?;
        let source = Server::builder(Role::Source).version("2.15.1").config(&flags).start().await?;
        ensure!(target.log().contains("js_ack_fc_v2") && !target.log().contains("Unsupported"), "{}", target.log());
        let site = Site::builder().on(source, target).start().await?;
        let leaf = format!("nats-leaf://127.0.0.1:{port}");
        for retention in ["limits", "workqueue"] {
            let mut source = site.source().await?;
            for kind in ["copy", "mirror", "source"] {
                let stream = format!("{kind}-{retention}");
                let config = json!({"subjects": [format!("{stream}.>")], "retention": retention});
                source.create_stream(&stream, config).await?;
                let messages = (1..=20_000).map(|number| Outgoing::new(format!("{stream}.x"), format!("{number}")));
                source.publish_all(messages).await?;
                let fields = match kind {
                    "copy" => json!({}),
                    _ => json!({"kind": kind, "target_leaf_url": leaf}),
                };
                let begun = Instant::now();
                site.add(&stream, fields).await?;
                site.settled(&stream, 20_000).await.context(stream.clone())?;
                eprintln!("js_ack_fc_v2 {flag}: {stream} in {:?}", begun.elapsed());
                let stored = site.target().await?.read_stream(&stream).await?;
                let payloads = stored.iter().map(|message| String::from_utf8_lossy(&message.payload).into_owned());
                ensure!(payloads.eq((1..=20_000).map(|number| number.to_string())), "{flag}: {stream}");
            }
        }
    }
    Ok(())
}

async fn held_by_kind(site: &Site, before: &str) -> Result<Value> {
    let text = format!("messages that it got while `kind` was `{before}`");
    site.row_when(STREAM, "is held", |row| row["state"] == "held" && error(row).contains(&text)).await
}

/// A copy finds its messages by headers that a feed does not write, and a feed knows no copies: neither continues after
/// the other.
#[tokio::test]
async fn a_changed_kind_is_held_both_ways() -> Result<()> {
    for (first, second) in [("copy", "mirror"), ("mirror", "copy"), ("copy", "source"), ("source", "copy")] {
        let what = format!("{first} to {second}");
        let native = if first == "copy" { second } else { first };
        let (mut site, fields) = begin_as(native, "2.15.1", &[]).await?;
        let update = if native == "source" { json!({"target_update": true}) } else { json!({}) };
        let document = |kind: &str| match kind {
            "copy" => site.document(STREAM),
            _ => site.document_with(STREAM, merged(fields.clone(), update.clone())),
        };
        let (one, other) = (document(first), document(second));
        site.filled(STREAM, 100).await?;
        request(&site.client, "replicator.config.add", one.clone()).await?;
        site.settled(STREAM, 100).await?;
        // By request, or by hand. The record may not have the last messages.
        site.service.kill()?;
        site.service.restart().await?;
        if native == "mirror" {
            request(&site.client, "replicator.config.update", other.clone()).await?;
        } else {
            site.put(STREAM, other.to_string()).await?;
        }
        let errors = held_by_kind(&site, first).await.context(what.clone())?["counters"]["errors"].as_u64();
        let before = site.target().await?.read_stream(STREAM).await?;
        site.publish(STREAM, 101..=120).await?;
        site.send("retry", json!({"replication": STREAM})).await?;
        let again = |row: &Value| row["state"] == "held" && row["counters"]["errors"].as_u64() > errors;
        site.row_when(STREAM, "is held again", again).await.context(what.clone())?;
        assert_eq!(site.target().await?.read_stream(STREAM).await?, before, "{what}");

        // As the message says: back, or from the beginning.
        request(&site.client, "replicator.config.update", one).await?;
        site.settled_within(STREAM, 120, 2 * LIMIT).await.context(what.clone())?;
        has_each_once(&site, &what).await?;
        request(&site.client, "replicator.config.update", other).await?;
        held_by_kind(&site, first).await.context(what.clone())?;
        site.target().await?.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
        site.send("retry", json!({"replication": STREAM})).await?;
        site.settled(STREAM, 120).await.context(what.clone())?;
        has_each_once(&site, &what).await?;
    }
    Ok(())
}

/// The stream takes messages of publishers then, so nothing but the record shows where they came from.
#[tokio::test]
async fn a_promoted_mirror_is_not_copied_into() -> Result<()> {
    let (site, fields) = begin_as("mirror", "2.15.1", &[]).await?;
    site.filled(STREAM, 100).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 100).await?;
    let asked = json!({"replication": STREAM, "keep": true});
    request(&site.client, "replicator.promote", asked).await?;
    let event = site.events.ever("promoted").await?;
    assert_eq!(
        (&event["stream"], &event["subjects"], &event["last_seq"], &event["lag"], &event["kept"]),
        (&json!(STREAM), &json!(["orders.>"]), &json!(100), &json!(0), &json!(true)),
        "{event}"
    );
    request(&site.client, "replicator.config.update", site.document(STREAM)).await?;
    request(&site.client, "replicator.resume", json!({"replication": STREAM})).await?;
    held_by_kind(&site, "mirror").await?;
    assert_eq!(site.at_target(STREAM).await?, 100);
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The credentials of the leafnode connection are read again before they end, and when a server ended them.
#[tokio::test]
async fn credentials_of_the_leaf_are_renewed() -> Result<()> {
    let (signed, folder) = (SignedAccount::new()?, tempfile::tempdir()?);
    let file = |name: &str| folder.path().join(name);
    fs::write(file("target.creds"), signed.credentials()?)?;
    let renew = |lifetime: u64| -> Result<u64> {
        let until = now() + lifetime;
        fs::write(file("leaf.creds"), signed.user(Some(until))?.credentials())?;
        Ok(until)
    };
    let port = free_port()?;
    let config = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}\n{}", signed.config);
    let target = Server::builder(Role::Target).config(&config).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let until = renew(20)?;
    let fields = json!({"kind": "mirror",
        "target_url": format!("{}?credentials={}", site.target.url(), file("target.creds").display()),
        "target_leaf_url": format!("nats-leaf://127.0.0.1:{port}?credentials={}", file("leaf.creds").display())});
    site.filled(STREAM, 10).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 10).await?;
    let next = renew(25)?;
    let renewed = async || site.service.log().contains("credentials were renewed");
    wait_for("another login", LIMIT, renewed).await.with_context(|| site.service.log())?;
    wait_for("the first login to end", LIMIT, async || now() > until + 1).await?;
    site.publish(STREAM, 11..=20).await?;
    let row = site.settled(STREAM, 20).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}\n{}", site.service.log());
    site.events.quiet(&["held", "stalled"])?;

    // Without a successor the replication waits for one, and says so.
    wait_for("the second login to end", LIMIT, async || now() > next).await?;
    let expired = |row: &Value| row["state"] == "held" && error(row).contains("the user JWT expired at");
    site.row_when(STREAM, "is held", expired).await?;
    renew(3_600)?;
    site.publish(STREAM, 21..=30).await?;
    site.send("retry", json!({"replication": STREAM})).await?;
    site.settled_within(STREAM, 30, 2 * LIMIT).await?;
    let client = ConnectOptions::with_credentials(&signed.credentials()?)?.connect(site.target.url()).await?;
    let mut mirror = jetstream::new(client).get_stream(STREAM).await?;
    let state = mirror.info().await?.state.clone();
    assert_eq!((state.messages, state.last_sequence), (30, 30));
    Ok(())
}

/// Messages `<name> <number>` of one side.
fn of(name: &str, numbers: RangeInclusive<u64>) -> impl Iterator<Item = Outgoing> {
    numbers.map(move |number| Outgoing::new(format!("orders.{name}"), format!("{name} {number}")))
}

/// Messages that were copied from the target stream are not fed back to it.
#[tokio::test]
async fn a_feed_skips_what_came_from_its_target() -> Result<()> {
    const EACH: u64 = 500;
    let (mut site, fields) = begin_as("source", "2.15.1", &[]).await?;
    let mut source = site.source_stream(STREAM, json!({})).await?;
    let mut target = site.target_stream(STREAM, json!({})).await?;
    let back = json!({"stream": STREAM, "name": "back", "source_url": site.target.url(),
        "target_url": site.source.url(), "filter_subjects": ["orders.b"]});
    request(&site.client, "replicator.config.add", back).await?;
    site.add(STREAM, merged(fields, json!({"name": "there", "target_update": true}))).await?;
    for part in 0..2 {
        let numbers = part * EACH + 1..=(part + 1) * EACH;
        source.publish_all(of("a", numbers.clone())).await?;
        target.publish_all(of("b", numbers)).await?;
        let mut last = Value::Null;
        let all = async || {
            let row = site.row("ORDERS.there").await.unwrap_or_default();
            let state = source.stream_state(STREAM).await.unwrap_or_default();
            last = json!({"source": state, "row": row});
            // A kill can lose what was counted in the last second.
            let skipped = row["counters"]["skipped_loop"].as_u64() >= Some(EACH);
            skipped && state["messages"] == 2 * (part + 1) * EACH && row["position"]["source_seq"] == state["last_seq"]
        };
        wait_for("everything to be at both sides", 2 * LIMIT, all)
            .await
            .with_context(|| format!("{last}\n{}", site.service.log()))?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    for (raw, side) in [(&mut source, "source"), (&mut target, "target")] {
        let stored = raw.read_stream(STREAM).await?;
        for name in ["a", "b"] {
            let found = stored.iter().filter(|message| message.subject == format!("orders.{name}"));
            let found: Vec<_> = found.map(|message| message.payload.clone()).collect();
            let expect: Vec<_> = of(name, 1..=2 * EACH).map(|message| message.payload).collect();
            ensure!(found == expect, "{} of {name} at the {side}\n{}", found.len(), site.service.log());
        }
    }
    Ok(())
}

/// The target has the messages that were stored after those that are too old.
async fn has_the_rest(site: &Site, kind: &str, what: &str, numbers: RangeInclusive<u64>) -> Result<()> {
    let last = *numbers.end();
    site.publish(STREAM, numbers).await?;
    site.settled_within(STREAM, last, 2 * LIMIT).await.context(what.to_owned())?;
    let copies = site.target().await?.read_stream(STREAM).await?;
    let source = site.source().await?.read_stream_from(STREAM, 51).await?;
    ensure!(contents(&copies) == contents(&source), "{what}: {copies:?}\n{}", site.service.log());
    ensure!(kind == "source" || copies == source, "{what}: {copies:?}");
    Ok(())
}

/// Old messages are missing sequences of a mirror, and are no messages of a source.
#[tokio::test]
async fn old_messages_are_not_fed() -> Result<()> {
    const AGE: Duration = Duration::from_secs(5);
    for version in VERSIONS {
        for kind in ["mirror", "source"] {
            let what = format!("{kind} at {version}");
            let (mut site, fields) = begin_as(kind, version, &[]).await?;
            site.filled(STREAM, 50).await?;
            let filled = Instant::now();
            wait_for("messages to be old", LIMIT, async || filled.elapsed() > AGE).await?;
            site.add(STREAM, merged(fields, json!({"max_age": "5s"}))).await?;
            let row = site.settled(STREAM, 50).await.context(what.clone())?;
            assert_eq!(row["counters"]["skipped_old"], 50, "{what}: {row}");
            has_the_rest(&site, kind, &what, 51..=60).await?;
            site.service.kill()?;
            site.service.restart().await?;
            let runs = async || site.row(STREAM).await.is_some_and(|row| row["state"] == "running");
            wait_for("the feed to continue", 2 * LIMIT, runs).await.with_context(|| site.service.log())?;
            has_the_rest(&site, kind, &what, 61..=70).await?;
        }
    }
    Ok(())
}

/// Opens this many subscriptions in an account, and keeps them for as long as the connection lives.
async fn subscribe(server: &Server, login: &str, subscriptions: usize) -> Result<TcpStream> {
    let mut socket = TcpStream::connect(("127.0.0.1", server.port())).await?;
    let mut text = format!("CONNECT {{\"verbose\":false,\"user\":\"{login}\",\"pass\":\"{login}\"}}\r\n");
    for number in 0..subscriptions {
        text += &format!("SUB clients.{number}.> {number}\r\n");
    }
    text += "PING\r\n";
    socket.write_all(text.as_bytes()).await?;
    let mut read = Vec::new();
    let pong = async {
        while !read.windows(6).any(|part| part == b"PONG\r\n") {
            ensure!(socket.read_buf(&mut read).await? > 0, "{}", String::from_utf8_lossy(&read));
        }
        Ok(())
    };
    tokio::time::timeout(LIMIT, pong).await.context("no PONG")??;
    Ok(socket)
}

/// A leaf user with the least permissions gets interest in its own subjects alone, however many others there are.
#[tokio::test]
async fn a_large_account_costs_a_feed_nothing() -> Result<()> {
    const SUBSCRIPTIONS: usize = 100_000;
    for version in VERSIONS {
        let port = free_port()?;
        let users = |permissions: &str| leaf_users(port, permissions);
        let target = Server::builder(Role::Target).version(version).config(&users("")).start().await?;
        let mut site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
        let leaf_url = format!("nats-leaf://leaf:leaf@127.0.0.1:{port}");
        let fields =
            json!({"kind": "mirror", "target_url": site.target.url_as("admin:admin"), "target_leaf_url": leaf_url});
        site.filled(STREAM, 50).await?;
        let (block, root) = permissions(&site, &fields).await?;
        site.target.restart_with(&users(&block)).await?;
        let _many = subscribe(&site.target, "admin", SUBSCRIPTIONS).await?;

        // The best of a few: the machine has other work.
        let url = Connection::to(Endpoint::parse(&leaf_url).expect("a URL"));
        let (mut fastest, mut lines) = (Duration::MAX, 0);
        for attempt in 0..5 {
            let name = format!("attempt-{attempt}");
            let login = LeafLogin {
                account: name.clone(),
                name,
                subscriptions: vec![format!("{root}.API.>"), format!("{root}.FC.>")],
            };
            let begun = Instant::now();
            let mut leaf = Leaf::connect(&url, &login).await?;
            fastest = fastest.min(begun.elapsed());
            leaf.round_trip().await?;
            lines = lines.max(leaf.take_interest().len());
        }
        eprintln!(
            "{version}: connected after {fastest:?}, {lines} lines of interest beside {SUBSCRIPTIONS} subscriptions"
        );
        assert!(lines < 50, "{version}: {lines} lines of interest");
        assert!(fastest < Duration::from_secs(1), "{version}: connected after {fastest:?}");
        site.add(STREAM, fields).await?;
        site.settled(STREAM, 50).await.context(version)?;
    }
    Ok(())
}

/// The permissions that `config validate` prints for a document, and what the subjects of its feed begin with.
async fn permissions(site: &Site, fields: &Value) -> Result<(String, String)> {
    let document = site.document_with(STREAM, fields.clone());
    let report = request(&site.client, "replicator.config.validate", document).await?;
    let checks = report["preflight"]["target"]["checks"].as_array().context("checks")?.clone();
    let leaf = checks.iter().find(|check| check["name"] == "leafnode").context("the leafnode check")?;
    let text = leaf["message"].as_str().context("a message")?;
    let block = text[text.find("permissions: {").context("a block")?..].to_owned();
    let root = block[block.find("$SR.").context("a prefix")?..][..20].to_owned();
    Ok((block, root))
}

/// A target with a durable consumer listens while no feed is there, and continues at once when one comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_outage_of_the_feed_is_over_at_once() -> Result<()> {
    const OUTAGE: Duration = Duration::from_secs(45);
    let outages = ["mirror", "source"].map(async |kind| {
        let (mut site, fields) = begin_as(kind, "2.15.1", &[]).await?;
        site.filled(STREAM, 50).await?;
        site.add(STREAM, fields).await?;
        site.settled(STREAM, 50).await?;
        site.service.kill()?;
        site.publish(STREAM, 51..=100).await?;
        let killed = Instant::now();
        wait_for("a long outage", 2 * OUTAGE, async || killed.elapsed() > OUTAGE).await?;
        site.service.restart().await?;
        let begun = Instant::now();
        let all = async || site.at_target(STREAM).await.is_ok_and(|messages| messages == 100);
        wait_for("everything", 2 * LIMIT, all).await.with_context(|| site.service.log())?;
        let took = begun.elapsed();
        eprintln!("{kind}: everything is there {took:?} after the service was ready");
        // A target that waits by itself needs 20 s and more after such an outage.
        ensure!(took < Duration::from_secs(15), "{kind}: {took:?}\n{}", site.service.log());
        site.settled(STREAM, 100).await?;
        has_each_once(&site, kind).await
    });
    futures_util::future::try_join_all(outages).await.map(drop)
}
