//! Messages that the target can never store: `on_reject`, on both transports.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nats_lane::{ApiError, ErrorKind};
use serde_json::{Value, json};

use crate::harness::raw::header_values;
use crate::harness::site::merged;
use crate::harness::{Expect, LIMIT, Outgoing, Raw, Role, SITE, Server, Site, Stored, wait_for};

const LONG: Duration = Duration::from_secs(60);

/// Stream names, and what a target stream of that name needs for each transport that its server knows.
pub(super) fn transports(target: &Server) -> Vec<(&'static str, Value)> {
    let mut all = vec![("PLAIN", json!({}))];
    if target.at_least(2, 14) {
        all.push(("FAST", json!({"allow_batched": true})));
    }
    all
}

fn dead_letters() -> Value {
    json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.letters"}})
}

/// The source stream that takes dead letters.
async fn dead_letter_stream(site: &Site) -> Result<Raw> {
    site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await
}

/// So many messages, of which those that `large` names have 3,000 bytes.
async fn publish(site: &Site, stream: &str, count: u64, large: impl Fn(u64) -> bool) -> Result<()> {
    let subject = stream.to_lowercase();
    let payload = |i| if large(i) { "x".repeat(3_000) } else { i.to_string() };
    let messages = (1..=count).map(|i| Outgoing::new(format!("{subject}.{}", i % 5), payload(i)));
    site.source().await?.publish_all(messages).await?;
    Ok(())
}

/// Source and target stream of this name, the target with a bound of 1,000 bytes a message.
async fn narrow(site: &Site, stream: &str, target: Value) -> Result<()> {
    site.source_stream(stream, json!({})).await?;
    site.target_stream(stream, merged(json!({"max_msg_size": 1_000}), target)).await?;
    Ok(())
}

/// Source sequences in the events of a kind of action, including those that one event combines.
fn told(site: &Site, stream: &str, action: &str) -> u64 {
    let of = |event: &&Value| event["replication"] == stream && event["action"] == action;
    site.events.told("poison").iter().filter(of).map(|event| event["messages"].as_u64().unwrap_or(1)).sum()
}

async fn all_told(site: &Site, stream: &str, action: &str, count: u64) -> Result<()> {
    wait_for("all to be reported", LIMIT, async || told(site, stream, action) >= count).await?;
    assert_eq!(told(site, stream, action), count, "{:?}", site.events.told("poison"));
    Ok(())
}

/// One run did all of it, without an error.
#[track_caller]
fn one_run(row: &Value) {
    let counters = &row["counters"];
    assert_eq!((&counters["errors"], &counters["consumers_recreated"]), (&json!(0), &json!(0)), "{row}");
}

async fn metric(site: &Site, name: &str, stream: &str) -> Result<f64> {
    let (_, text) = site.service.get("/metrics").await?;
    let start = format!("choria_stream_replicator_replicator_{name}{{stream=\"{stream}\"");
    let line = text.lines().find(|line| line.starts_with(&start)).with_context(|| text.clone())?;
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}

async fn letters(site: &Site) -> Result<Vec<Stored>> {
    site.source().await?.read_stream("DEAD").await
}

/// Source sequences of dead letters of a stream, by their provenance.
fn origins(letters: &[Stored], stream: &str) -> Vec<u64> {
    let last = letters.iter().filter_map(|letter| header_values(&letter.header, "Choria-SR-Source").pop());
    let words: Vec<Vec<String>> = last.map(|value| value.split(' ').map(str::to_owned).collect()).collect();
    words
        .iter()
        .filter(|words| words[0] == stream && words[2] == SITE)
        .filter_map(|words| words[1].parse().ok())
        .collect()
}

#[tokio::test]
async fn thousands_that_are_too_large_are_left_out_in_one_run() -> Result<()> {
    const COUNT: u64 = 6_000;
    let large = |i: u64| (1_000..4_000).contains(&i) || i.is_multiple_of(50);
    let site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    for (stream, target) in transports(&site.target) {
        narrow(&site, stream, target).await?;
        publish(&site, stream, COUNT, large).await?;
        site.add(stream, json!({"on_reject": "skip"})).await?;
        let row = site.settled_within(stream, COUNT, LONG).await?;
        one_run(&row);
        let expect = (1..=COUNT).filter(|i| large(*i)).count() as u64;
        let counters = &row["counters"];
        assert_eq!(
            (&counters["skipped_refused"], &counters["copied"]),
            (&json!(expect), &json!(COUNT - expect)),
            "{row}"
        );
        assert!(counters["skipped_bytes"].as_u64() > Some(expect * 3_000), "{row}");
        assert_eq!(metric(&site, "skipped_refused_messages", stream).await?, expect as f64);
        all_told(&site, stream, "skipped", expect).await?;
        let events = site.events.told("poison").len();
        assert!(events < 1_000, "{events} events");
        site.events.quiet(&["held", "stalled"])?;
        assert!(
            site.service.log().contains("3094 bytes are more than the target stream's max_msg_size of 1000")
                || site.service.log().contains("max_msg_size of 1000")
        );
        site.verify(stream, &Expect::copy_of(stream).site(SITE).only(|m| !large(m.seq))).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_largest_message_that_a_stream_takes_is_copied() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        narrow(&site, stream, target).await?;
        let subject = format!("{}.a", stream.to_lowercase());
        let messages = (700..1_000).map(|size| Outgoing::new(&subject, vec![b'x'; size]));
        site.source().await?.publish_all(messages).await?;
        site.add(stream, json!({"on_reject": "skip"})).await?;
        let row = site.settled(stream, 300).await?;
        // The server refused none, and none that it would have stored was skipped.
        one_run(&row);
        let stored = site.target().await?.read_stream(stream).await?;
        let largest = stored.iter().map(|message| message.header.len() + message.payload.len()).max();
        assert_eq!(largest, Some(1_000));
        assert_eq!(row["counters"]["skipped_refused"], 300 - stored.len() as u64);
    }
    Ok(())
}

#[tokio::test]
async fn a_limit_that_is_raised_while_the_copy_runs_is_heard_of() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        narrow(&site, stream, target.clone()).await?;
        publish(&site, stream, 10, |_| false).await?;
        site.add(stream, json!({"on_reject": "skip"})).await?;
        site.settled(stream, 10).await?;
        let config = merged(
            json!({"name": stream, "subjects": [format!("{}.>", stream.to_lowercase())], "max_msg_size": 5_000}),
            target,
        );
        site.target().await?.api(&format!("STREAM.UPDATE.{stream}"), config).await?;
        publish(&site, stream, 10, |_| true).await?;
        let row = site.settled(stream, 20).await?;
        one_run(&row);
        assert_eq!(row["counters"]["skipped_refused"], 0, "{row}");
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn messages_beyond_max_payload_become_dead_letters() -> Result<()> {
    let target = Server::builder(Role::Target).config("max_payload: 2048").start().await?;
    let site = Site::builder()
        .on(Server::start(Role::Source).await?, target)
        .args(["--monitor", "127.0.0.1:0"])
        .start()
        .await?;
    dead_letter_stream(&site).await?;
    for (stream, target) in transports(&site.target) {
        let large = |i: u64| (100..1_100).contains(&i) || i.is_multiple_of(100);
        site.source_stream(stream, json!({})).await?;
        site.target_stream(stream, target).await?;
        publish(&site, stream, 2_000, large).await?;
        // A header block near the bound of a server, and one with a status, which older servers store.
        let long = format!("X: {}", "h".repeat(3_000));
        let subject = format!("{}.x", stream.to_lowercase());
        site.source().await?.publish(&Outgoing::new(subject, "p").with_lines(&[&long])).await?;
        site.add(stream, dead_letters()).await?;
        let row = site.settled_within(stream, 2_001, LONG).await?;
        one_run(&row);
        let large = |i: u64| large(i) || i == 2_001;
        let expect: Vec<_> = (1..=2_001).filter(|i| large(*i)).collect();
        let counters = &row["counters"];
        assert_eq!(
            (&counters["dead_lettered"], &counters["skipped_refused"]),
            (&json!(expect.len()), &json!(0)),
            "{row}"
        );
        assert_eq!(metric(&site, "dead_lettered_messages", stream).await?, expect.len() as f64);
        all_told(&site, stream, "dead_lettered", expect.len() as u64).await?;
        assert_eq!(origins(&letters(&site).await?, stream), expect);
        site.verify(stream, &Expect::copy_of(stream).site(SITE).only(|m| !large(m.seq))).await?;
    }
    site.events.quiet(&["held", "stalled"])
}

#[tokio::test]
async fn a_dead_letter_has_all_of_its_message_and_replays_nothing() -> Result<()> {
    let site = Site::start().await?;
    // Whatever a server acts on would be acted on here.
    let mut acts = json!({"subjects": ["dead.>"], "allow_rollup_hdrs": true});
    if site.source.at_least(2, 11) {
        acts["allow_msg_ttl"] = true.into();
    }
    let mut raw = site.source_stream("DEAD", acts).await?;
    raw.publish(&Outgoing::new("dead.before", "still there")).await?;
    let (stream, target) = ("PLAIN", json!({}));
    site.source_stream(stream, json!({"allow_rollup_hdrs": true})).await?;
    site.target_stream(stream, merged(json!({"max_msg_size": 1_000}), target)).await?;
    let lines = [
        "A: 1",
        "b:2",
        "A:  3 ",
        "Nats-Msg-Id: original",
        "Nats-Expected-Stream: PLAIN",
        "Nats-Expected-Last-Sequence: 0",
        "Nats-Rollup: all",
        "Choria-SR-Source: FIRST 9 HOP one 1700000000000",
    ];
    let payload = "x".repeat(3_000);
    site.source().await?.publish(&Outgoing::new("plain.some.subject", payload.clone()).with_lines(&lines)).await?;
    site.add(stream, dead_letters()).await?;
    site.settled(stream, 1).await?;

    let stored = letters(&site).await?;
    assert_eq!(stored.len(), 2, "the message before was rolled up");
    let letter = &stored[1];
    assert_eq!((letter.subject.as_str(), &letter.payload[..]), ("dead.letters", payload.as_bytes()));
    let value = |name: &str| header_values(&letter.header, name);
    assert_eq!(value("A"), ["1", "3"]);
    assert_eq!(value("b"), ["2"]);
    assert_eq!(value("Choria-SR-Subject"), ["plain.some.subject"]);
    let error = value("Choria-SR-Error").pop().context("no error")?;
    assert!(
        error.contains("message 1 cannot be stored at the target") && error.contains("max_msg_size of 1000"),
        "{error}"
    );
    let hops = value("Choria-SR-Source");
    assert_eq!(hops[0], "FIRST 9 HOP one 1700000000000");
    assert!(hops[1].starts_with("PLAIN 1 TEST TEST "), "{hops:?}");
    for line in lines.iter().filter(|line| line.starts_with("Nats-")) {
        let (name, original) = line.split_once(": ").context("a header")?;
        assert_eq!(value(&format!("Choria-SR-{name}")), [original]);
        assert_ne!(value(name), [original], "{name} is replayed");
    }
    let of_server: Vec<_> = crate::harness::raw::header_lines(&letter.header)
        .into_iter()
        .filter(|line| line.starts_with(b"Nats-"))
        .collect();
    assert_eq!(of_server.len(), 1, "only our id: {:?}", String::from_utf8_lossy(&letter.header));
    Ok(())
}

#[tokio::test]
async fn kills_repeat_no_dead_letter_and_lose_none() -> Result<()> {
    const COUNT: u64 = 4_000;
    let large = |i: u64| i.is_multiple_of(3) || (1_000..2_000).contains(&i);
    let mut site = Site::builder().args(["--instance", "one"]).start().await?;
    dead_letter_stream(&site).await?;
    for (stream, target) in transports(&site.target) {
        narrow(&site, stream, target).await?;
        publish(&site, stream, COUNT, large).await?;
        let before = letters(&site).await?.len() as u64;
        site.add(stream, merged(dead_letters(), json!({"limits": {"messages_in_flight": 200}}))).await?;
        let all = (1..=COUNT).filter(|i| large(*i)).count() as u64;
        for share in 1..=6 {
            let stored = async || {
                let state = site.source().await?.stream_state("DEAD").await?;
                Ok::<_, anyhow::Error>(state["messages"].as_u64().unwrap_or_default())
            };
            wait_for("dead letters", LONG, async || stored().await.is_ok_and(|now| now >= before + all * share / 8))
                .await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        site.settled_within(stream, COUNT, LONG).await?;
        let found = origins(&letters(&site).await?, stream);
        let distinct: HashSet<_> = found.iter().copied().collect();
        assert_eq!((found.len() as u64, distinct), (all, (1..=COUNT).filter(|i| large(*i)).collect()));
        site.verify(stream, &Expect::copy_of(stream).site(SITE).only(|m| !large(m.seq))).await?;
    }
    Ok(())
}

/// A replication that sends dead letters to where `dead` says, held by the first of two of them.
async fn undeliverable(site: &Site, stream: &str, target: Value, expect: &[&str]) -> Result<()> {
    narrow(site, stream, target).await?;
    publish(site, stream, 20, |i| i == 10 || i == 11).await?;
    site.add(stream, dead_letters()).await?;
    held(site, stream, expect).await
}

async fn held(site: &Site, stream: &str, expect: &[&str]) -> Result<()> {
    let row = site.row_when(stream, "is held", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].as_str().unwrap_or_default().to_owned();
    for words in expect {
        assert!(message.contains(words), "`{words}` is not in {row}");
    }
    assert_eq!((&row["last_error"]["source_seq"], &row["position"]["source_seq"]), (&json!(10), &json!(9)), "{row}");
    let of = |event: &Value| event["replication"] == stream && event["message"] == message.as_str();
    for kind in ["held", "poison"] {
        wait_for("the event", LIMIT, async || site.events.told(kind).iter().any(of)).await?;
    }
    Ok(())
}

async fn both_delivered(site: &Site, stream: &str) -> Result<()> {
    let begun = Instant::now();
    ensure!(site.ask("retry", stream).await?.error.is_none());
    let row = site.settled(stream, 20).await?;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    assert_eq!(row["counters"]["dead_lettered"], 2, "{row}");
    assert_eq!(origins(&letters(site).await?, stream), [10, 11]);
    site.verify(stream, &Expect::copy_of(stream).site(SITE).only(|m| m.seq != 10 && m.seq != 11)).await
}

#[tokio::test]
async fn dead_letters_that_no_stream_stores_hold_and_nothing_is_lost() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        let expect =
            ["message 10 cannot be stored at the target", "`dead.letters` at the source", "no stream listens there"];
        undeliverable(&site, stream, target, &expect).await?;
        dead_letter_stream(&site).await?;
        both_delivered(&site, stream).await?;
        site.source().await?.api("STREAM.DELETE.DEAD", Value::Null).await?;
    }
    Ok(())
}

#[tokio::test]
async fn rejected_dead_letters_hold_and_nothing_is_lost() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        let full = json!({"subjects": ["dead.>"], "max_msgs": 1, "discard": "new"});
        let mut raw = site.source_stream("DEAD", full.clone()).await?;
        raw.publish(&Outgoing::new("dead.x", "full")).await?;
        undeliverable(&site, stream, target, &["maximum messages exceeded", "dead letter"]).await?;
        raw.api("STREAM.UPDATE.DEAD", merged(full, json!({"name": "DEAD", "max_msgs": 100}))).await?;
        both_delivered(&site, stream).await?;
        raw.api("STREAM.DELETE.DEAD", Value::Null).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_too_large_dead_letter_holds_and_can_be_skipped() -> Result<()> {
    let source = Server::builder(Role::Source).config("max_payload: 4096").start().await?;
    let target = Server::builder(Role::Target).config("max_payload: 4096").start().await?;
    let site = Site::builder().on(source, target).start().await?;
    dead_letter_stream(&site).await?;
    for (stream, target) in transports(&site.target) {
        site.source_stream(stream, json!({})).await?;
        site.target_stream(stream, target).await?;
        publish(&site, stream, 9, |_| false).await?;
        let subject = format!("{}.large", stream.to_lowercase());
        site.source().await?.publish(&Outgoing::new(subject, "x".repeat(4_090))).await?;
        publish(&site, stream, 10, |_| false).await?;
        site.add(stream, dead_letters()).await?;
        held(
            &site,
            stream,
            &["the target's max_payload of 4096", "nor can it be published as a dead letter", "with the added headers"],
        )
        .await?;
        ensure!(site.ask("skip", stream).await?.error.is_none());
        let row = site.settled(stream, 20).await?;
        assert_eq!(
            (&row["counters"]["skipped_refused"], &row["counters"]["dead_lettered"]),
            (&json!(1), &json!(0)),
            "{row}"
        );
        site.verify(stream, &Expect::copy_of(stream).site(SITE).only(|m| m.seq != 10)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_source_of_its_own_dead_letters_is_refused() -> Result<()> {
    let site = Site::start().await?;
    let (stream, target) = ("PLAIN", json!({}));
    narrow(&site, stream, target).await?;
    publish(&site, stream, 20, |i| i == 10).await?;
    let fields = json!({"on_reject": "dead_letter", "dead_letter": {"subject": "plain.dead"}});
    let document = site.document_with(stream, fields.clone());
    let body = site.send("config.validate", document.clone()).await?.body;
    let said = body["preflight"]["source"]["checks"].as_array().context("checks")?.clone();
    let check = said.iter().find(|check| check["name"] == "dead_letter").context("no check")?;
    assert_eq!((&body["valid"], &check["result"]), (&json!(false), &json!("failed")), "{body:#}");
    assert!(
        check["message"].as_str().unwrap_or_default().contains("is a subject of source stream `PLAIN` itself"),
        "{body:#}"
    );
    site.add(stream, fields).await?;
    let row = site.row_when(stream, "is held", |row| row["state"] == "held").await?;
    assert!(
        row["last_error"]["message"].as_str().unwrap_or_default().contains("of source stream `PLAIN` itself"),
        "{row}"
    );
    assert_eq!(site.source().await?.stream_state(stream).await?["last_seq"], 20);

    Ok(())
}

#[tokio::test]
async fn a_source_that_takes_dead_letters_later_stores_one() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        narrow(&site, stream, target).await?;
        publish(&site, stream, 20, |_| false).await?;
        site.add(stream, dead_letters()).await?;
        site.settled(stream, 20).await?;
        let subjects = format!("{}.>", stream.to_lowercase());
        let mut raw = site.source().await?;
        let update = format!("STREAM.UPDATE.{stream}");
        raw.api(&update, json!({"name": stream, "subjects": [&subjects, "dead.>"]})).await?;
        publish(&site, stream, 1, |_| true).await?;
        let row = site.row_when(stream, "is held", |row| row["state"] == "held").await?;
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(&format!("source stream `{stream}` itself")), "{row}");
        assert_eq!(raw.stream_state(stream).await?["last_seq"], 22, "once");

        raw.api(&update, json!({"name": stream, "subjects": [&subjects]})).await?;
        dead_letter_stream(&site).await?;
        ensure!(site.ask("retry", stream).await?.error.is_none());
        let row = site.settled(stream, 22).await?;
        let counters = &row["counters"];
        assert_eq!((&counters["dead_lettered"], &counters["skipped_loop"]), (&json!(1), &json!(1)), "{row}");
        assert_eq!(origins(&letters(&site).await?, stream), [21]);
        raw.api("STREAM.DELETE.DEAD", Value::Null).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_preflight_knows_whether_dead_letters_would_be_stored() -> Result<()> {
    let users = "authorization { users: [{user: test, password: test}, \
                 {user: few, password: test, permissions: {publish: {deny: [\"dead.>\"]}}}] }";
    let source = Server::builder(Role::Source).config(users).start().await?;
    let control = Server::start(Role::Control).await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).control(control).start().await?;
    let mut raw = Raw::connect(&site.source.url_as("test:test")).await?;
    raw.create_stream("PLAIN", json!({"subjects": ["plain.>"]})).await?;
    let check = async |user: &str, result: &str, words: &str| {
        let document =
            site.document_with("PLAIN", merged(dead_letters(), json!({"source_url": site.source.url_as(user)})));
        let body = site.send("config.validate", document).await?.body;
        let checks = body["preflight"]["source"]["checks"].as_array().context("checks")?.clone();
        let found = checks.iter().find(|check| check["name"] == "dead_letter").context("no check")?;
        assert_eq!(found["result"], result, "{body:#}");
        assert!(found["message"].as_str().unwrap_or_default().contains(words), "{body:#}");
        Ok::<_, anyhow::Error>(())
    };
    check("test:test", "warning", "no stream stores dead letters to `dead.letters`").await?;
    raw.create_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    check("test:test", "ok", "").await?;
    check("few:test", "failed", "no permission to publish dead letters to `dead.letters`").await
}

#[tokio::test]
async fn a_plain_subscriber_stores_no_dead_letters() -> Result<()> {
    let site = Site::start().await?;
    let listener = crate::harness::connect(&site.source.url()).await?;
    let _heard = listener.subscribe("dead.>").await?;
    listener.flush().await?;
    narrow(&site, "PLAIN", json!({})).await?;
    publish(&site, "PLAIN", 20, |i| i == 10).await?;
    site.add("PLAIN", dead_letters()).await?;
    held(&site, "PLAIN", &["no stream acknowledged it within 20s"]).await
}

#[tokio::test]
async fn what_the_server_refuses_is_left_out_by_the_next_run() -> Result<()> {
    let site = Site::start().await?;
    dead_letter_stream(&site).await?;
    let full = json!({"max_msgs_per_subject": 2, "discard": "new", "discard_new_per_subject": true});
    for (stream, target) in transports(&site.target) {
        for (policy, fields) in [("skip", json!({"on_reject": "skip"})), ("dead", dead_letters())] {
            let (name, to) = (format!("{policy}-{stream}"), format!("{stream}-{policy}"));
            let prefix = to.to_lowercase();
            if policy == "skip" {
                site.source_stream(stream, json!({})).await?;
                let subject =
                    |i: u64| format!("{}.{}", stream.to_lowercase(), if i.is_multiple_of(4) { i } else { i % 4 });
                let messages = (1..=100).map(|i| Outgoing::new(subject(i), i.to_string()));
                site.source().await?.publish_all(messages).await?;
            }
            let config = merged(full.clone(), merged(json!({"subjects": [format!("{prefix}.>")]}), target.clone()));
            site.target_stream(&to, config).await?;
            let more = json!({"name": name, "target_stream": to, "target_subject_prefix": prefix});
            site.add(stream, merged(fields, more)).await?;
            let id = format!("{stream}.{name}");
            let row = site.settled_within(&id, 100, LONG).await?;
            // Two of each of three subjects are stored, and everything with a subject of its own.
            let stored = |m: &Stored| m.seq.is_multiple_of(4) || m.seq <= 7;
            let counter = if policy == "skip" { "skipped_refused" } else { "dead_lettered" };
            assert_eq!((&row["counters"][counter], site.at_target(&to).await?), (&json!(69), 31), "{row}");
            assert_eq!((&row["counters"]["errors"], &row["last_error"]), (&json!(0), &Value::Null), "{row}");
            if stream == "PLAIN" {
                // What is refused together is known together.
                let runs = row["counters"]["consumers_recreated"].as_u64().unwrap_or_default();
                assert!(runs <= 3, "{row}");
            }
            all_told(&site, &id, if policy == "skip" { "skipped" } else { "dead_lettered" }, 69).await?;
            let expect = Expect::copy_of(stream).site(SITE).only(stored).mapped(|s| format!("{prefix}.{s}"));
            site.verify(&to, &expect.late_allowed()).await?;
            if policy == "dead" {
                assert_eq!(origins(&letters(&site).await?, stream).len(), 69);
            }
        }
    }
    site.events.quiet(&["held", "stalled"])
}

#[tokio::test]
async fn a_header_that_the_target_stops_to_allow_holds_or_is_left_out() -> Result<()> {
    let site = Site::start().await?;
    for (stream, target) in transports(&site.target) {
        for policy in ["hold", "skip"] {
            let (name, to) = (format!("{policy}-{stream}"), format!("{stream}-{policy}"));
            let prefix = to.to_lowercase();
            let config = merged(json!({"subjects": [format!("{prefix}.>")]}), target.clone());
            site.source_stream(&to, json!({"subjects": [format!("s.{prefix}.>")], "allow_rollup_hdrs": true})).await?;
            site.target_stream(&to, merged(config.clone(), json!({"allow_rollup_hdrs": true}))).await?;
            let fields = json!({"name": name, "on_reject": policy, "target_subject_remove": "s."});
            let subject = format!("s.{prefix}.a");
            let message = |i: u64| Outgoing::new(&subject, i.to_string()).with_lines(&["Nats-Rollup: sub"]);
            site.source().await?.publish(&Outgoing::new(&subject, "first")).await?;
            site.add(&to, fields).await?;
            let id = format!("{to}.{name}");
            site.settled(&id, 1).await?;
            site.target().await?.api(&format!("STREAM.UPDATE.{to}"), merged(config, json!({"name": to}))).await?;
            site.source().await?.publish(&message(2)).await?;
            if policy == "hold" {
                let row = site.row_when(&id, "is held", |row| row["state"] == "held").await?;
                assert_eq!(row["last_error"]["source_seq"], 2, "{row}");
                assert!(row["last_error"]["message"].as_str().unwrap_or_default().contains("(10111)"), "{row}");
                ensure!(site.ask("retry", &id).await?.error.is_none());
            }
            // The next run knows that the target does not allow it, and the message goes without.
            let row = site.settled(&id, 2).await?;
            assert_eq!(row["counters"]["headers_removed"], 1, "{row}");
            assert_eq!(
                (&row["counters"]["skipped_refused"], &row["counters"]["copied"]),
                (&json!(0), &json!(2)),
                "{row}"
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_header_that_the_target_cannot_read_is_left_out() -> Result<()> {
    // Older servers store it unread.
    let source = Server::builder(Role::Source).version("2.10.26").start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    if !site.target.at_least(2, 11) {
        return Ok(());
    }
    for (stream, target) in transports(&site.target) {
        site.source_stream(stream, json!({})).await?;
        site.target_stream(stream, merged(target, json!({"allow_msg_ttl": true}))).await?;
        let subject = format!("{}.a", stream.to_lowercase());
        let message = |i: u64| match i {
            5 | 6 => Outgoing::new(&subject, i.to_string()).with_lines(&["Nats-TTL: soon"]),
            i => Outgoing::new(&subject, i.to_string()),
        };
        site.source().await?.publish_all((1..=10).map(message)).await?;
        site.add(stream, json!({})).await?;
        // It means nothing at the source: the message is copied without it, and it is counted.
        let row = site.settled(stream, 10).await?;
        assert_eq!((&row["counters"]["headers_removed"], &row["counters"]["errors"]), (&json!(2), &json!(0)), "{row}");
        let copied = site.target().await?.read_stream(stream).await?;
        assert_eq!(copied.len(), 10);
        assert!(copied.iter().all(|message| header_values(&message.header, "Nats-TTL").is_empty()), "{copied:?}");
    }
    Ok(())
}

/// What a server says to one publish into a stream of this kind.
async fn refusal(server: &Server, name: &str, stream: Value, message: Outgoing) -> Result<Option<ApiError>> {
    let mut raw = Raw::connect(&server.url()).await?;
    raw.create_stream(name, merged(json!({"subjects": ["s"]}), stream)).await?;
    for filler in ["first", "second"] {
        // Some need a message before them.
        if raw.publish(&Outgoing::new("s", filler)).await.is_err() {
            break;
        }
    }
    let error = raw.publish(&message).await.err();
    raw.api(&format!("STREAM.DELETE.{name}"), Value::Null).await?;
    let Some(error) = error.map(|error| error.to_string()) else { return Ok(None) };
    let json = error.strip_prefix("publish was refused: ").with_context(|| error.clone())?;
    Ok(Some(serde_json::from_str(json)?))
}

#[tokio::test]
async fn every_refusal_is_known_for_what_it_is() -> Result<()> {
    let server = Server::start(Role::Target).await?;
    let plain = || Outgoing::new("s", "x");
    let with = |line: &str| plain().with_lines(&[line]);
    let per_subject = json!({"max_msgs_per_subject": 1, "discard": "new", "discard_new_per_subject": true});
    let cases = [
        ((2, 10), json!({"max_msg_size": 10}), Outgoing::new("s", "x".repeat(11)), 10054, ErrorKind::Poison),
        ((2, 10), per_subject, plain(), 10077, ErrorKind::Poison),
        ((2, 10), json!({"max_msgs": 2, "discard": "new"}), plain(), 10077, ErrorKind::Hold),
        (
            (2, 10),
            json!({"max_bytes": 200, "discard": "new"}),
            Outgoing::new("s", "x".repeat(300)),
            10077,
            ErrorKind::Hold,
        ),
        ((2, 10), json!({}), with(&format!("X: {}", "x".repeat(70_000))), 10097, ErrorKind::Poison),
        ((2, 10), json!({}), with("Nats-Rollup: sub"), 10111, ErrorKind::Poison),
        ((2, 11), json!({}), with("Nats-TTL: 60"), 10166, ErrorKind::Poison),
        ((2, 11), json!({"allow_msg_ttl": true}), with("Nats-TTL: soon"), 10165, ErrorKind::Poison),
        ((2, 12), json!({}), with("Nats-Incr: +1"), 10168, ErrorKind::Poison),
        ((2, 12), json!({}), with("Nats-Schedule: @at 2099-01-01T00:00:00Z"), 10188, ErrorKind::Poison),
        ((2, 14), json!({}), with("Nats-Scheduler: x"), 10212, ErrorKind::Poison),
        ((2, 15), json!({}), with("Nats-Stream-Source: x"), 10227, ErrorKind::Poison),
        ((2, 10), json!({}), with("Nats-Expected-Stream: OTHER"), 10060, ErrorKind::Hold),
        ((2, 10), json!({}), with("Nats-Expected-Last-Sequence: 9"), 10071, ErrorKind::ChainBroken),
    ];
    for (number, ((major, minor), stream, message, code, kind)) in cases.into_iter().enumerate() {
        let known = server.at_least(major, minor);
        // A server may still be removing the store of a deleted stream when one of its name is created (10049).
        let name = format!("S{number}");
        let found = refusal(&server, &name, stream.clone(), message).await?;
        println!("{}: {stream}: {found:?}", server.version());
        let found = found.map(|error| (error.err_code, error.kind()));
        if known {
            assert_eq!(found, Some((code, kind)), "{} {stream}", server.version());
        } else {
            assert_eq!(found, None, "{} {stream} {code}", server.version());
        }
    }
    Ok(())
}
