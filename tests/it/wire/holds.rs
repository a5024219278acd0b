//! What is permanent until an operator acts is `held` and says what to do; what is transient is not.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use async_nats::{ConnectOptions, jetstream};
use serde_json::{Value, json};

use super::rejects::transports;
use crate::harness::client::status;
use crate::harness::signed::SignedAccount;
use crate::harness::site::merged;
use crate::harness::{LIMIT, Outgoing, Role, Server, Service, Site, request, wait_for, wait_value};

const LONG: Duration = Duration::from_secs(60);

/// Waits until a replication is held with all of these words.
async fn held(site: &Site, id: &str, words: &[&str]) -> Result<Value> {
    let says = |row: &Value| {
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        row["state"] == "held" && words.iter().all(|word| message.contains(word))
    };
    site.row_when(id, &format!("is held with {words:?}"), says).await
}

async fn released(site: &Site, id: &str, seq: u64) -> Result<()> {
    site.ask("retry", id).await?;
    site.settled_within(id, seq, LONG).await.map(drop)
}

#[tokio::test]
async fn a_subject_that_no_stream_takes_is_held_and_named() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        let subject = stream.to_lowercase();
        let mut raw = site.source_stream(stream, json!({})).await?;
        let narrow = merged(json!({"subjects": [format!("{subject}.a")]}), target.clone());
        let mut at_target = site.target_stream(stream, narrow.clone()).await?;
        let all =
            (1..=9).map(|i| Outgoing::new(format!("{subject}.{}", if i == 6 { "b" } else { "a" }), i.to_string()));
        raw.publish_all(all).await?;
        site.add(stream, json!({})).await?;
        let words = [&format!("`{subject}.b`"), "source sequence 6", "`target_update`", &format!("`{stream}`")];
        let row = held(&site, stream, &words).await?;
        if target == json!({"allow_batched": true}) {
            assert_eq!(row["position"]["source_seq"], 5, "{row}");
        }
        let wide = merged(narrow, json!({"name": stream, "subjects": [format!("{subject}.>")]}));
        at_target.api(&format!("STREAM.UPDATE.{stream}"), wide).await?;
        released(&site, stream, 9).await?;
        assert_eq!(site.at_target(stream).await?, 9);
    }
    Ok(())
}

#[tokio::test]
async fn a_subject_after_a_mapping_is_named_as_it_is_sent() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    site.target_stream("S", json!({"subjects": ["x.s.a"]})).await?;
    for subject in ["s.a", "s.b"] {
        raw.publish(&Outgoing::new(subject, "")).await?;
    }
    site.add("S", json!({"target_subject_prefix": "x"})).await?;
    held(&site, "S", &["`x.s.b`", "source sequence 2"]).await?;
    Ok(())
}

/// A server whose only account has these limits, and one message of 100 KiB in a stream of the source.
async fn with_target_limits(limits: &str) -> Result<Site> {
    let config =
        format!("accounts {{ A {{ jetstream: {{ {limits} }}, users: [{{user: u, password: p}}] }} }}\nno_auth_user: u");
    let target = Server::builder(Role::Target).config(&config).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((0..20).map(|_| Outgoing::new("s.a", "x".repeat(10_000)))).await?;
    Ok(site)
}

#[tokio::test]
async fn an_account_that_is_full_is_held() -> Result<()> {
    let site = with_target_limits("max_file: 100000, max_mem: 100000").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10002)", "raise the JetStream limits of the account"]).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_whose_storage_is_full_is_held() -> Result<()> {
    const ROOM: u64 = 100_000;
    let target = Server::builder(Role::Target).store_limit(ROOM).start().await?;
    let mut site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((0..20).map(|_| Outgoing::new("s.a", "x".repeat(10_000)))).await?;
    site.add("S", json!({})).await?;
    let row = held(&site, "S", &["give the server more room"]).await?;
    assert!(row["position"]["source_seq"].as_u64().is_some_and(|seq| seq < 20), "{row}");
    site.target.restart_with_store_limit(100 * ROOM).await?;
    released(&site, "S", 20).await?;
    assert_eq!(site.at_target("S").await?, 20);
    Ok(())
}

#[tokio::test]
async fn an_account_without_room_for_a_stream_is_held() -> Result<()> {
    let site = with_target_limits("max_streams: 1").await?;
    site.target_stream("OTHER", json!({})).await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10027)", "remove streams that are not needed"]).await?;
    Ok(())
}

#[tokio::test]
async fn a_stream_without_room_for_a_consumer_is_held() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({"max_consumers": 1})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    let consumer = json!({"stream_name": "S", "config": {"durable_name": "other", "ack_policy": "none"}});
    raw.api("CONSUMER.CREATE.S.other", consumer).await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["(10026)", "raise `max_consumers`"]).await?;
    raw.api("CONSUMER.DELETE.S.other", Value::Null).await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn too_few_subscriptions_are_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.source.restart_with("max_subscriptions: 1").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["maximum subscriptions exceeded", "`max_subscriptions`"]).await?;
    site.source.restart_with("").await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn too_few_connections_are_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.source.reload_with("max_connections: 1").await?;
    site.add("S", json!({})).await?;
    held(&site, "S", &["maximum connections exceeded", "`max_connections`"]).await?;
    site.source.reload_with("max_connections: 100").await?;
    released(&site, "S", 1).await
}

#[tokio::test]
async fn a_subject_without_a_leader_is_not_held() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    site.add("S", json!({})).await?;
    raw.publish(&Outgoing::new("s.a", "1")).await?;
    site.settled("S", 1).await?;
    site.target.restart().await?;
    raw.publish_all((2..=50).map(|i| Outgoing::new("s.a", i.to_string()))).await?;
    site.settled_within("S", 50, LONG).await?;
    assert!(site.events.told("held").is_empty(), "{:?}", site.events.told("held"));
    Ok(())
}

/// A target whose `max_control_line` is smaller than any client can know, and a message that is too long for it.
async fn with_short_lines() -> Result<Site> {
    let target = Server::builder(Role::Target).config("max_control_line: 1024").start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    for (stream, config) in transports(&site.target) {
        let subject = stream.to_lowercase();
        let long = format!("{subject}.{}", "x".repeat(1_500));
        let mut raw = site.source_stream(stream, json!({})).await?;
        let all =
            (1..=21).map(|i| Outgoing::new(if i == 11 { long.clone() } else { format!("{subject}.a") }, i.to_string()));
        raw.publish_all(all).await?;
        site.target_stream(stream, config).await?;
    }
    Ok(site)
}

#[tokio::test]
async fn a_line_that_is_too_long_for_the_target_holds_its_message() -> Result<()> {
    let mut site = with_short_lines().await?;
    let streams: Vec<_> = transports(&site.target).into_iter().map(|(stream, _)| stream).collect();
    for stream in &streams {
        site.add(stream, json!({})).await?;
        let row = held(&site, stream, &["message 11", "max_control_line of 1024"]).await?;
        assert_eq!(
            (&row["last_error"]["source_seq"], &row["position"]["source_seq"]),
            (&json!(11), &json!(10)),
            "{row}"
        );
        let of = |event: &Value| event["replication"] == *stream && event["source_seq"] == 11;
        wait_for("the event", LIMIT, async || site.events.told("poison").iter().any(of)).await?;
    }
    site.target.restart_with("max_control_line: 2048").await?;
    for stream in &streams {
        released(&site, stream, 21).await?;
        assert_eq!(site.at_target(stream).await?, 21);
    }
    Ok(())
}

#[tokio::test]
async fn a_line_that_is_too_long_for_the_target_is_skipped() -> Result<()> {
    let site = with_short_lines().await?;
    for (stream, _) in transports(&site.target) {
        site.add(stream, json!({"on_reject": "skip"})).await?;
        let row = site.settled_within(stream, 21, LONG).await?;
        assert_eq!(row["counters"]["skipped_refused"], 1, "{row}");
        assert_eq!(site.at_target(stream).await?, 20);
    }
    assert!(site.events.told("held").is_empty());
    Ok(())
}

#[tokio::test]
async fn a_line_that_is_too_long_for_the_target_is_a_dead_letter() -> Result<()> {
    let site = with_short_lines().await?;
    site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    for (count, (stream, _)) in (1..).zip(transports(&site.target)) {
        let fields = json!({"on_reject": "dead_letter", "dead_letter": {"subject": format!("dead.{stream}")}});
        site.add(stream, fields).await?;
        let row = site.settled_within(stream, 21, LONG).await?;
        assert_eq!(row["counters"]["dead_lettered"], 1, "{row}");
        assert_eq!(site.at_target(stream).await?, 20);
        let dead = site.source().await?.read_stream("DEAD").await?;
        let last = dead.last().context("no dead letter")?;
        assert_eq!((dead.len(), last.payload.as_slice()), (count, b"11".as_slice()), "{row}");
    }
    assert!(site.events.told("held").is_empty());
    Ok(())
}

#[tokio::test]
async fn a_source_that_lets_little_wait_is_asked_for_less() -> Result<()> {
    let source = Server::builder(Role::Source).config("max_payload: 65536\nmax_pending: 262144").start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    for (stream, config) in [("S", json!({})), ("W", json!({"retention": "workqueue"}))] {
        let mut raw = site.source_stream(stream, config).await?;
        let subject = format!("{}.a", stream.to_lowercase());
        raw.publish_all((0..2_000).map(|_| Outgoing::new(subject.clone(), "x".repeat(10_000)))).await?;
        site.add(stream, json!({})).await?;
        let row = site.settled_within(stream, 2_000, LONG).await?;
        assert!(row["counters"]["errors"].as_u64().is_some_and(|errors| errors <= 20), "{row}");
        assert_eq!(site.at_target(stream).await?, 2_000);
    }
    Ok(())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A source whose copy logs in with `file`, which ends `lifetime` seconds from now, and who publishes there.
async fn expiring(signed: &SignedAccount, file: &Path, lifetime: u64) -> Result<(Site, jetstream::Context, u64)> {
    let source = Server::builder(Role::Source).config(&signed.config).start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let client = ConnectOptions::with_credentials(&signed.credentials()?)?.connect(site.source.url()).await?;
    let context = jetstream::new(client);
    let config = jetstream::stream::Config { name: "S".into(), subjects: vec!["s".into()], ..Default::default() };
    context.create_stream(config).await?;
    let until = now() + lifetime;
    fs::write(file, signed.user(Some(until))?.credentials())?;
    let url = format!("{}?credentials={}", site.source.url(), file.display());
    site.add("S", json!({ "source_url": url })).await?;
    context.publish("s", "1".into()).await?.await?;
    site.settled("S", 1).await?;
    Ok((site, context, until))
}

/// Publishes until the credentials have ended for a second; the last sequence.
async fn publish_beyond(context: &jetstream::Context, until: u64) -> Result<u64> {
    loop {
        let last = context.publish("s", "x".into()).await?.await?.sequence;
        if now() > until + 1 {
            return Ok(last);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn rotated_credentials_cost_no_error() -> Result<()> {
    let (signed, folder) = (SignedAccount::new()?, tempfile::tempdir()?);
    let file = folder.path().join("user.creds");
    let (site, context, until) = expiring(&signed, &file, 20).await?;
    fs::write(&file, signed.user(Some(now() + 3_600))?.credentials())?;
    let last = publish_beyond(&context, until).await?;
    copied_without_an_error(&site, last).await?;
    assert_eq!(site.at_target("S").await?, last);
    Ok(())
}

async fn copied_without_an_error(site: &Site, last: u64) -> Result<Value> {
    let row = site.settled("S", last).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    site.events.quiet(&["held", "stalled"])?;
    Ok(row)
}

#[tokio::test]
async fn rotated_credentials_of_the_target_cost_no_error() -> Result<()> {
    let (signed, folder) = (SignedAccount::new()?, tempfile::tempdir()?);
    let file = folder.path().join("user.creds");
    let target = Server::builder(Role::Target).config(&signed.config).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.source_stream("S", json!({"subjects": ["s"]})).await?;
    let context = jetstream::new(async_nats::connect(site.source.url()).await?);
    let until = now() + 20;
    fs::write(&file, signed.user(Some(until))?.credentials())?;
    let url = format!("{}?credentials={}", site.target.url(), file.display());
    site.add("S", json!({ "target_url": url })).await?;
    context.publish("s", "1".into()).await?.await?;
    site.settled("S", 1).await?;
    fs::write(&file, signed.user(Some(now() + 3_600))?.credentials())?;
    let last = publish_beyond(&context, until).await?;
    copied_without_an_error(&site, last).await?;
    let client = ConnectOptions::with_credentials(&signed.credentials()?)?.connect(site.target.url()).await?;
    let mut copy = jetstream::new(client).get_stream("S").await?;
    assert_eq!(copy.info().await?.state.messages, last);
    Ok(())
}

/// The service keeps its leases, and answers.
#[tokio::test]
async fn rotated_credentials_of_the_service_cost_no_lease() -> Result<()> {
    let (signed, folder) = (SignedAccount::new()?, tempfile::tempdir()?);
    let file = folder.path().join("user.creds");
    let control = Server::builder(Role::Control).config(&signed.config).start().await?;
    let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let until = now() + 20;
    fs::write(&file, signed.user(Some(until))?.credentials())?;
    let creds = ["--creds".to_owned(), file.display().to_string()];
    let service = Service::builder(&control.url(), "SITE").args(creds).start().await?;
    let client = ConnectOptions::with_credentials(&signed.credentials()?)?.connect(control.url()).await?;
    let context = jetstream::new(async_nats::connect(source.url()).await?);
    let config = jetstream::stream::Config { name: "S".into(), subjects: vec!["s".into()], ..Default::default() };
    context.create_stream(config).await?;
    let document = json!({"stream": "S", "source_url": source.url(), "target_url": target.url()});
    request(&client, "replicator.config.add", document).await?;
    context.publish("s", "1".into()).await?.await?;
    let settled = async |seq: u64| {
        let at = |row: &Value| row["position"]["source_seq"] == seq;
        wait_value("the copy", LIMIT, async || status(&client, "S").await.filter(at)).await
    };
    let before = settled(1).await?;
    fs::write(&file, signed.user(Some(now() + 3_600))?.credentials())?;
    let last = publish_beyond(&context, until).await?;
    let after = settled(last).await?;
    assert_eq!((&after["epoch"], &after["leader"]), (&before["epoch"], &before["leader"]), "{after}");
    assert_eq!(after["counters"]["errors"], 0, "{after}");
    assert!(service.log().contains("control connection is down"), "the login did not end: {}", service.log());
    Ok(())
}

#[tokio::test]
async fn credentials_without_a_successor_are_held_when_they_end() -> Result<()> {
    let (signed, folder) = (SignedAccount::new()?, tempfile::tempdir()?);
    let file = folder.path().join("user.creds");
    let (site, context, _) = expiring(&signed, &file, 20).await?;
    held(&site, "S", &["Authorization Violation", "the user JWT expired at", "renew it"]).await?;
    let last = context.publish("s", "x".into()).await?.await?.sequence;
    fs::write(&file, signed.user(Some(now() + 3_600))?.credentials())?;
    released(&site, "S", last).await
}
