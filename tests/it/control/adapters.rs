//! Choria's data adapters on real servers: what nodes publish becomes messages of a stream, each once, through outages and stops.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::client::refused;
use crate::harness::raw::{header_values, wait_messages};
use crate::harness::{
    LIMIT, Outgoing, REGISTRATION as TOPIC, Raw, Registration, SITE, Service, Site, Stored, request, wait_value,
    wait_while_moving,
};

/// What nodes publish, and what becomes of it.
const VECTORS: &str = include_str!("../../data/choria-adapter.json");
const STREAM: &str = "CHORIA_REGISTRATION";

async fn site() -> Result<Site> {
    Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await
}

/// An adapter that reads at the source and creates its stream at the target.
fn document(site: &Site, more: Value) -> Value {
    let base = json!({
        "name": "inventory",
        "ingest": {"topic": TOPIC, "protocol": "request", "servers": site.source.url()},
        "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s", "servers": site.target.url(),
            "create": {"name": STREAM, "max_msgs_per_subject": 1_000_000}},
    });
    crate::harness::site::merged(base, more)
}

/// Adds the adapter and waits until it reads and publishes.
async fn add(site: &Site, more: Value) -> Result<()> {
    request(&site.client, "replicator.adapter.add", document(site, more)).await?;
    row_when(site, "it runs", |row| row["state"] == "running").await.map(drop)
}

async fn row(site: &Site) -> Option<Value> {
    let reply = site.ask("adapter.status", "inventory").await.ok()?;
    reply.body["adapters"].get(0).cloned()
}

async fn row_when(site: &Site, what: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_value(what, LIMIT, async || row(site).await.filter(|row| when(row))).await
}

/// A registration of the first version, as a node publishes it.
fn registration(number: u64, sender: &str) -> Outgoing {
    let (id, data) = (format!("{number:032x}"), format!("{{\"n\":{number}}}"));
    let registration = Registration { id: &id, sender, data: &data, time: 1_577_873_472_000_000_000 };
    Outgoing::new(TOPIC, registration.v1())
}

async fn publish(raw: &mut Raw, numbers: impl Iterator<Item = u64>) -> Result<()> {
    for number in numbers {
        raw.send_only(&registration(number, &format!("n{}.example.net", number % 7))).await?;
    }
    // The server has read everything before this.
    raw.api("INFO", Value::Null).await.map(drop)
}

/// The numbers that a stream has; each once.
fn numbers(stored: &[Stored]) -> Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for message in stored {
        let body: Value = serde_json::from_slice(&message.payload)?;
        let data: Value = serde_json::from_str(body["data"].as_str().context("no data")?)?;
        let number = data["n"].as_u64().context("no number")?;
        ensure!(numbers.insert(number), "{number} is stored twice");
    }
    Ok(numbers)
}

/// The value of a metric `choria_adapter_*` in the line that has this word.
async fn metric(service: &Service, name: &str, word: &str) -> Option<u64> {
    let (_, page) = service.get("/metrics").await.ok()?;
    let start = format!("choria_adapter_{name}{{");
    let line = page.lines().find(|line| line.starts_with(&start) && line.contains(word))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Another instance, with metrics.
async fn other(site: &Site) -> Result<Service> {
    Service::builder(&site.service_url(), SITE).instance("other").args(["--monitor", "127.0.0.1:0"]).start().await
}

#[tokio::test]
async fn registrations_become_messages_of_a_stream() -> Result<()> {
    let site = site().await?;
    add(&site, json!({})).await?;
    let vectors: Value = serde_json::from_str(VECTORS)?;
    let vectors = vectors["vectors"].as_array().context("no vectors")?;
    let chosen: Vec<_> =
        vectors.iter().filter(|one| ["v1_request_z", "v2_request"].contains(&one["name"].as_str().unwrap())).collect();
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for vector in &chosen {
        source.send_only(&Outgoing::new(TOPIC, vector["in"].as_str().unwrap())).await?;
    }
    // What is discarded, each for a reason of its own.
    let v2 = chosen[1]["in"].as_str().unwrap();
    for wrong in
        ["no JSON", "{\"protocol\":\"choria:transport:9\"}", &v2.replace("\"headers\":{", "\"headers\":null,\"x\":{")]
    {
        source.send_only(&Outgoing::new(TOPIC, wrong)).await?;
    }
    for sender in ["a b", "a.*.>", ""] {
        source.send_only(&registration(1, sender)).await?;
    }
    // The same request again is stored once.
    source.send_only(&Outgoing::new(TOPIC, v2)).await?;
    let row = row_when(&site, "everything is settled", |row| row["received"] == 9 && row["stored"] == 3).await?;
    assert_eq!(row["dropped"], json!({"malformed": 2, "protocol": 1, "sender": 3}));
    assert_eq!((&row["accepted"], &row["duplicates"], &row["queue"]["messages"]), (&json!(3), &json!(1), &json!(0)));
    let stored = target.read_stream(STREAM).await?;
    assert_eq!(stored.len(), 2);
    for (message, vector) in stored.iter().zip(&chosen) {
        assert_eq!(String::from_utf8_lossy(&message.payload), vector["out"].as_str().unwrap());
        assert_eq!(message.subject, "choria.stream.input.registration.n1.example.net");
        assert_eq!(header_values(&message.header, "Nats-Msg-Id")[0].len(), 32);
    }
    for path in ["/metrics", "/choria/prometheus"] {
        let (code, page) = site.service.get(path).await?;
        ensure!(code == 200, "{path}: {code}");
        for (metric, value) in [("received_msgs", "3"), ("duplicate_messages", "1"), ("queue_capacity", "1000")] {
            let found = page.lines().any(|line| {
                line.starts_with(&format!("choria_adapter_{metric}{{")) && line.ends_with(&format!(" {value}"))
            });
            ensure!(found, "{path} has no {metric} {value}: {page}");
        }
    }

    // A pause ends reading; what is published meanwhile is gone, as with any subscriber of a subject.
    request(&site.client, "replicator.adapter.pause", json!({"adapter": "inventory"})).await?;
    row_when(&site, "it is paused", |row| row["state"] == "paused" && row["ingest"]["connected"] == false).await?;
    publish(&mut source, 100..110).await?;
    request(&site.client, "replicator.adapter.resume", json!({"adapter": "inventory"})).await?;
    row_when(&site, "it runs again", |row| row["state"] == "running").await?;
    publish(&mut source, 200..210).await?;
    row_when(&site, "the last ones are stored", |row| row["stored"] == 13).await?;
    assert_eq!(target.read_stream(STREAM).await?.len(), 12);
    request(&site.client, "replicator.adapter.delete", json!({"adapter": "inventory"})).await?;
    refused(&site.ask("adapter.status", "inventory").await?, 404, "does not exist");
    Ok(())
}

/// The target is killed and restarted under load: everything that was accepted is stored, once.
#[tokio::test]
async fn a_target_that_restarts_loses_nothing() -> Result<()> {
    const MESSAGES: u64 = 6_000;
    let mut site = site().await?;
    add(&site, json!({"queue_len": 10_000})).await?;
    let mut source = site.source().await?;
    publish(&mut source, 0..MESSAGES / 3).await?;
    site.target.kill()?;
    publish(&mut source, MESSAGES / 3..2 * MESSAGES / 3).await?;
    row_when(&site, "the target is missed", |row| row["stream"]["connected"] == false).await?;
    site.target.restart().await?;
    publish(&mut source, 2 * MESSAGES / 3..MESSAGES).await?;
    let stored = |row: &Value| row["stored"].as_u64().unwrap_or_default();
    let row = wait_while_moving("all are stored", LIMIT, async || match row(&site).await {
        Some(row) if stored(&row) == MESSAGES => Ok(row),
        row => Err(row.as_ref().map(stored)),
    })
    .await?;
    assert_eq!((&row["accepted"], &row["dropped"]), (&json!(MESSAGES), &json!({})));
    let found = numbers(&site.target().await?.read_stream(STREAM).await?)?;
    assert_eq!(found.len() as u64, MESSAGES);
    Ok(())
}

/// A queue that is full drops what comes, counts it, and says so once.
#[tokio::test]
async fn a_full_queue_drops_and_counts() -> Result<()> {
    let mut site = site().await?;
    add(&site, json!({"queue_len": 10})).await?;
    site.target.kill()?;
    row_when(&site, "the target is missed", |row| row["stream"]["connected"] == false).await?;
    publish(&mut site.source().await?, 0..50).await?;
    let row = row_when(&site, "all are received", |row| row["received"] == 50).await?;
    assert_eq!((&row["accepted"], &row["dropped"]), (&json!(10), &json!({"queue_full": 40})));
    assert_eq!((&row["state"], &row["queue"]["messages"]), (&json!("retrying"), &json!(10)));
    let told = site.events.ever("adapter-dropped").await?;
    assert_eq!((&told["reason"], &told["messages"]), (&json!("queue_full"), &Value::Null));
    site.target.restart().await?;
    row_when(&site, "the queue is stored", |row| row["stored"] == 10 && row["state"] == "running").await?;
    assert_eq!(numbers(&site.target().await?.read_stream(STREAM).await?)?, (0..10).collect());
    Ok(())
}

/// Two instances share the messages; one that is stopped publishes what it had accepted.
#[tokio::test]
async fn instances_share_and_a_stopped_one_drains() -> Result<()> {
    const MESSAGES: u64 = 4_000;
    let site = site().await?;
    add(&site, json!({"queue_len": 10_000})).await?;
    let mut other = other(&site).await?;
    wait_value("the other one reads", LIMIT, async || {
        metric(&other, "connected", "input").await.filter(|value| *value == 1)
    })
    .await?;
    let mut source = site.source().await?;
    publish(&mut source, 0..MESSAGES / 2).await?;
    let shared = wait_value("the other one has a share", LIMIT, async || {
        metric(&other, "received_msgs", "input").await.filter(|count| *count > 0)
    })
    .await?;
    ensure!(shared < MESSAGES / 2, "{shared} is everything");
    let stop = async { other.stop().await };
    let rest = async { publish(&mut source, MESSAGES / 2..MESSAGES).await };
    let (stopped, published) = tokio::join!(stop, rest);
    published?;
    ensure!(stopped?.success(), "{}", other.log());
    let mut target = site.target().await?;
    wait_messages(&mut target, STREAM, MESSAGES, LIMIT).await?;
    assert_eq!(numbers(&target.read_stream(STREAM).await?)?.len() as u64, MESSAGES);
    Ok(())
}

/// Documents by hand, by request and by command: an invalid one does not replace the one that runs.
#[tokio::test]
async fn documents_are_edited_by_hand_and_by_command() -> Result<()> {
    let site = site().await?;
    let secret = crate::harness::secrets::secret();
    let wrong = document(&site, json!({"queue_len": 0, "stream": {"type": "nats_stream"}}));
    refused(&site.send("adapter.add", wrong.clone()).await?, 400, "not valid");
    let checked = site.send("adapter.validate", wrong).await?.body;
    assert_eq!((&checked["valid"], checked["problems"].as_array().map(Vec::len)), (&json!(false), Some(2)));
    let url = format!("nats://me:{secret}@{}", site.target.url().trim_start_matches("nats://"));
    site.put("adapters/inventory", document(&site, json!({"stream": {"servers": url}})).to_string()).await?;
    row_when(&site, "it runs", |row| row["state"] == "running").await?;
    let shown = site.ask("adapter.get", "inventory").await?.body;
    ensure!(shown["config"]["stream"]["servers"].as_str().is_some_and(|url| url.contains("me:***@")), "{shown}");
    // What is shown comes back with its secret, and with another queue.
    let mut changed = shown["config"].clone();
    changed["queue_len"] = json!(77);
    request(&site.client, "replicator.adapter.update", changed).await?;
    row_when(&site, "the queue is another one", |row| row["queue"]["capacity"] == 77 && row["state"] == "running")
        .await?;
    site.put("adapters/inventory", "{\"name\": \"inventory\"}").await?;
    let told = site.events.ever("config-rejected").await?;
    ensure!(told["problems"].as_array().is_some_and(|problems| !problems.is_empty()), "{told}");
    let row = row(&site).await.context("no row")?;
    assert_eq!((&row["state"], &row["queue"]["capacity"]), (&json!("running"), &json!(77)));
    let listed = site.cli().ok(["adapter", "ls"]).await?;
    ensure!(listed.contains("inventory") && listed.contains("running"), "{listed}");
    let status = site.cli().json(["adapter", "status"]).await?;
    assert_eq!(status[0]["adapters"][0]["adapter"], "inventory");
    site.cli().ok(["adapter", "rm", "inventory"]).await?;

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("broker.conf");
    let conf = format!(
        "plugin.choria.middleware_hosts = {}\nplugin.choria.adapters = one, two\nplugin.choria.adapter.one.type = jetstream\n\
         plugin.choria.adapter.one.stream.topic = in.%s\nplugin.choria.adapter.one.ingest.topic = {TOPIC}\n\
         plugin.choria.adapter.one.ingest.protocol = request\nplugin.choria.adapter.two.type = nats_stream\n",
        site.source.url().trim_start_matches("nats://")
    );
    std::fs::write(&file, conf)?;
    let ended = site.cli().run(["adapter", "import", &file.display().to_string()]).await?;
    ensure!(
        ended.stdout.contains("one is at revision") && ended.stderr.contains("`two`: type `nats_stream` is retired"),
        "{ended:?}"
    );
    Ok(())
}

/// With `exclusive` one instance reads; another one takes over when it stops.
#[tokio::test]
async fn an_exclusive_adapter_reads_on_one_instance() -> Result<()> {
    let mut site = site().await?;
    add(&site, json!({"exclusive": true})).await?;
    let other = Service::builder(&site.service_url(), SITE).instance("other").start().await?;
    let states = async |count: usize| {
        let all = site.cli().json(["adapter", "status"]).await.ok()?;
        let all = all.as_array()?.iter().map(|one| one["adapters"][0]["state"].as_str().unwrap_or_default().to_owned());
        let all: BTreeSet<_> = all.collect();
        (all.len() == count).then_some(all)
    };
    let both = wait_value("one reads, one stands by", LIMIT, async || {
        states(2).await.filter(|all| all.contains("standby") && all.contains("running"))
    })
    .await?;
    assert_eq!(both.len(), 2);
    publish(&mut site.source().await?, 0..20).await?;
    wait_messages(&mut site.target().await?, STREAM, 20, LIMIT).await?;
    site.service.stop().await?;
    wait_value("the other one reads", LIMIT, async || {
        let reply = site.ask("adapter.status", "inventory").await.ok()?.body;
        (reply["instance"] == "other" && reply["adapters"][0]["state"] == "running").then_some(())
    })
    .await?;
    publish(&mut site.source().await?, 20..40).await?;
    wait_messages(&mut site.target().await?, STREAM, 40, LIMIT).await?;
    drop(other);
    Ok(())
}

const INGEST: &str = "REGISTRATION_IN";

/// A durable adapter; the stream that it reads is a work queue at the source.
async fn add_durable(site: &Site) -> Result<()> {
    let ingest = json!({"topic": TOPIC, "protocol": "request", "servers": site.source.url(), "stream": INGEST});
    request(&site.client, "replicator.adapter.add", document(site, json!({"durable": true, "ingest": ingest}))).await?;
    let row = row_when(site, "the stream is missed", |row| row["state"] == "retrying").await?;
    let told = row["last_error"]["message"].as_str().unwrap_or_default();
    ensure!(told.contains("stream `REGISTRATION_IN` does not exist") && row["last_error"]["hold"] == true, "{row}");
    let mut source = site.source().await?;
    source.create_stream(INGEST, json!({"subjects": [TOPIC], "retention": "workqueue"})).await?;
    row_when(site, "it runs", |row| row["state"] == "running").await.map(drop)
}

async fn wait_stored(site: &Site, messages: u64) -> Result<()> {
    let mut target = site.target().await?;
    let stored = wait_while_moving("all are stored", 2 * LIMIT, async || {
        let state = target.stream_state(STREAM).await.unwrap_or_default();
        let count = state["messages"].as_u64().unwrap_or_default();
        if count == messages { Ok(()) } else { Err(count) }
    });
    stored.await
}

/// Everything in the stream that is read is acknowledged, and so removed.
async fn wait_acknowledged(source: &mut Raw) -> Result<()> {
    let mut last = Value::Null;
    let empty = wait_value("everything is acknowledged", 2 * LIMIT, async || {
        last = source.stream_state(INGEST).await.ok()?;
        (last["messages"] == 0).then_some(())
    });
    empty.await.with_context(|| format!("{last}"))
}

/// Two instances share a durable consumer; one is killed in the middle, then both are: each message is stored, once.
#[tokio::test]
async fn a_durable_adapter_loses_nothing_to_kill_9() -> Result<()> {
    const MESSAGES: u64 = 3_000;
    let mut site = site().await?;
    add_durable(&site).await?;
    let mut other = other(&site).await?;
    wait_value("the other one reads", LIMIT, async || {
        metric(&other, "connected", "input").await.filter(|value| *value == 1)
    })
    .await?;
    let mut source = site.source().await?;
    source.send_only(&Outgoing::new(TOPIC, "no JSON")).await?;
    publish(&mut source, 0..MESSAGES / 3).await?;
    wait_value("the other one has a share", LIMIT, async || {
        metric(&other, "received_msgs", "input").await.filter(|count| *count > 0)
    })
    .await?;
    let (publishing, killing) = tokio::join!(publish(&mut source, MESSAGES / 3..MESSAGES), async { other.kill() });
    publishing?;
    killing?;
    wait_stored(&site, MESSAGES).await?;
    wait_acknowledged(&mut source).await?;

    site.service.kill()?;
    publish(&mut source, MESSAGES..MESSAGES + 200).await?;
    site.service.restart().await?;
    wait_stored(&site, MESSAGES + 200).await?;
    wait_acknowledged(&mut source).await?;
    let found = numbers(&site.target().await?.read_stream(STREAM).await?)?;
    assert_eq!(found, (0..MESSAGES + 200).collect());
    Ok(())
}

/// What arrives while a durable adapter is paused, stopped or without its target is stored later; so is what it held.
#[tokio::test]
async fn a_durable_adapter_catches_up() -> Result<()> {
    let mut site = site().await?;
    add_durable(&site).await?;
    let mut source = site.source().await?;
    request(&site.client, "replicator.adapter.pause", json!({"adapter": "inventory"})).await?;
    row_when(&site, "it is paused", |row| row["state"] == "paused").await?;
    publish(&mut source, 0..10).await?;
    request(&site.client, "replicator.adapter.resume", json!({"adapter": "inventory"})).await?;
    wait_stored(&site, 10).await?;

    site.target.kill()?;
    row_when(&site, "the target is missed", |row| row["stream"]["connected"] == false).await?;
    publish(&mut source, 10..20).await?;
    site.target.restart().await?;
    wait_stored(&site, 20).await?;
    let row = row_when(&site, "it runs", |row| row["state"] == "running" && row["stored"] == 20).await?;
    assert_eq!(row["dropped"], json!({}));
    wait_acknowledged(&mut source).await?;

    ensure!(site.service.stop().await?.success(), "{}", site.service.log());
    publish(&mut source, 20..30).await?;
    site.service.restart().await?;
    wait_stored(&site, 30).await?;
    wait_acknowledged(&mut source).await?;
    assert_eq!(numbers(&site.target().await?.read_stream(STREAM).await?)?, (0..30).collect());

    // The consumer is deleted by hand: it is created again.
    source.api(&format!("CONSUMER.DELETE.{INGEST}.nats_ingest_inventory"), Value::Null).await?;
    publish(&mut source, 30..40).await?;
    wait_stored(&site, 40).await?;
    wait_acknowledged(&mut source).await
}

/// What is lost with a killed instance is what its metrics show as queued.
#[tokio::test]
async fn a_killed_instance_loses_its_queue_at_most() -> Result<()> {
    const MESSAGES: u64 = 600;
    let mut site = site().await?;
    add(&site, json!({})).await?;
    let mut other = other(&site).await?;
    wait_value("the other one reads", LIMIT, async || {
        metric(&other, "connected", "input").await.filter(|value| *value == 1)
    })
    .await?;
    site.target.kill()?;
    row_when(&site, "the target is missed", |row| row["stream"]["connected"] == false).await?;
    publish(&mut site.source().await?, 0..MESSAGES).await?;
    let queued = wait_value("all are accepted", LIMIT, async || {
        let all = [&site.service, &other].map(|service| metric(service, "queue_length", "inventory"));
        let [mine, others] = all;
        let (mine, others) = (mine.await?, others.await?);
        (mine + others == MESSAGES).then_some(others)
    })
    .await?;
    ensure!(queued > 0 && queued < MESSAGES, "{queued} of {MESSAGES}");
    other.kill()?;
    site.target.restart().await?;
    wait_stored(&site, MESSAGES - queued).await?;
    let found = numbers(&site.target().await?.read_stream(STREAM).await?)?;
    assert_eq!(found.len() as u64, MESSAGES - queued);
    Ok(())
}

/// A member of the queue group that is not ours, such as Choria's broker, gets its share.
#[tokio::test]
async fn another_member_of_the_queue_group_shares() -> Result<()> {
    const MESSAGES: u64 = 2_000;
    let site = site().await?;
    add(&site, json!({"queue_len": 10_000})).await?;
    let mut broker = site.client.queue_subscribe(TOPIC, "nats_ingest_inventory".to_owned()).await?;
    site.client.flush().await?;
    publish(&mut site.source().await?, 0..MESSAGES).await?;
    let mut shared = 0;
    let (row, shared) = wait_value("each message is with one of both", LIMIT, async || {
        while let Some(Some(_)) = futures_util::FutureExt::now_or_never(futures_util::StreamExt::next(&mut broker)) {
            shared += 1;
        }
        let row = row(&site).await?;
        (row["stored"].as_u64()? + shared == MESSAGES).then_some((row, shared))
    })
    .await?;
    ensure!(shared > 0 && shared < MESSAGES, "{shared}");
    assert_eq!(row["received"], MESSAGES - shared);
    Ok(())
}
