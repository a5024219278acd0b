//! Reads over slow lines: nothing that arrives slowly counts as silent, nothing is asked for twice while it arrives, and
//! what was delivered before a crash crosses the line again only once.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{
    Outgoing, Proxy, Role, Server, Site, client::http_get, connect, proxy::Direction, server::free_port, wait_for,
};

const LONG: Duration = Duration::from_secs(150);
const TO_CLIENT: &[Direction] = &[Direction::ToClient];

/// A site for large messages, and what the monitors of source and target are asked at.
async fn large() -> Result<(Site, [String; 2])> {
    let ports = [free_port()?, free_port()?];
    // By default a server closes a connection that does not take a message within 10 s.
    let config = |port| format!("max_payload: 8388608\nwrite_deadline: \"2m\"\nhttp: \"127.0.0.1:{port}\"");
    let source = Server::builder(Role::Source).config(&config(ports[0])).start().await?;
    let target = Server::builder(Role::Target).config(&config(ports[1])).start().await?;
    let site = Site::builder().on(source, target).start().await?;
    Ok((site, ports.map(|port| format!("127.0.0.1:{port}"))))
}

/// Bytes that a server has sent to anybody.
async fn sent(monitor: &str) -> Result<u64> {
    let (_, body) = http_get(monitor, "/varz").await?;
    serde_json::from_str::<Value>(&body)?["out_bytes"].as_u64().context("out_bytes")
}

/// The same site, and a proxy in front of its source.
async fn behind_proxy() -> Result<(Site, Proxy)> {
    let (site, _) = large().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    Ok((site, proxy))
}

fn message(stream: &str, number: u64, size: usize) -> Outgoing {
    Outgoing::new(format!("{}.{number}", stream.to_lowercase()), format!("{}{number}", "0".repeat(size)))
}

async fn fill(site: &Site, stream: &str, count: u64, size: usize, config: Value) -> Result<()> {
    let mut raw = site.source_stream(stream, config).await?;
    // Not too much at once, for servers that let little wait.
    for number in 1..=count {
        raw.publish(&message(stream, number, size)).await?;
    }
    Ok(())
}

/// The messages at the target are `1..=count`, once and in order.
async fn is_complete(site: &Site, stream: &str, count: u64) -> Result<()> {
    let copied = site.target().await?.read_stream(stream).await?;
    let number = |payload: &[u8]| -> Result<u64> { Ok(std::str::from_utf8(payload)?.parse()?) };
    let numbers: Vec<u64> = copied.iter().map(|stored| number(&stored.payload)).collect::<Result<_>>()?;
    assert_eq!(numbers, (1..=count).collect::<Vec<_>>());
    Ok(())
}

/// The consumer of Choria's replicator: acks message by message, whatever the server's version.
async fn choria_consumer(site: &Site, stream: &str) -> Result<()> {
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 300_000_000_000u64, "max_ack_pending": 900});
    let body = json!({"stream_name": stream, "config": config});
    site.source().await?.api(&format!("CONSUMER.CREATE.{stream}.SR_TEST"), body).await.map(drop)
}

async fn copied(site: &Site, stream: &str, at_least: u64) -> Result<()> {
    let enough = async || site.at_target(stream).await.unwrap_or_default() >= at_least;
    wait_for("the copy to continue", LONG, enough).await.with_context(|| site.service.log())
}

/// Kills the service in the middle of a copy with explicit acks; returns the errors that were counted after it.
async fn killed_with_much_pending(retention: &str, count: u64, size: usize, rate: Option<u64>) -> Result<u64> {
    let (mut site, proxy) = behind_proxy().await?;
    proxy.throttle(TO_CLIENT, rate);
    site.source_stream("WQ", json!({"retention": retention})).await?;
    choria_consumer(&site, "WQ").await?;
    fill(&site, "WQ", count, size, json!({"retention": retention})).await?;
    site.add("WQ", json!({"source_url": proxy.url()})).await?;
    copied(&site, "WQ", count / 8).await?;
    site.service.kill()?;
    site.service.restart().await?;
    let row = site.settled_within("WQ", count, LONG).await.with_context(|| site.service.log())?;
    is_complete(&site, "WQ", count).await?;
    row["counters"]["errors"].as_u64().context("no count of errors")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_of_a_work_queue_come_back_in_order() -> Result<()> {
    assert_eq!(killed_with_much_pending("workqueue", 400, 200_000, None).await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_all_sizes_of_an_interest_stream_come_back() -> Result<()> {
    for size in [1_000, 40_000] {
        assert_eq!(killed_with_much_pending("interest", 2_000, size, None).await?, 0, "{size}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_pending_comes_back_over_a_slow_line() -> Result<()> {
    assert_eq!(killed_with_much_pending("workqueue", 100, 200_000, Some(720_000)).await?, 0);
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slow {
    Source,
    Target,
}

/// So large that it takes longer on [`RATE`] than any answer may be silent.
const SIZE: usize = 2_000_000;
const RATE: u64 = 300_000;

/// Three large messages are copied; one of both sides is behind the proxy, whose server's monitor is returned.
async fn three_copied(slow: Slow, source: &Value, target: &Value) -> Result<(Site, Proxy, String)> {
    let (site, [at_source, at_target]) = large().await?;
    let (port, side, monitor) = match slow {
        Slow::Source => (site.source.port(), "source_url", at_source),
        Slow::Target => (site.target.port(), "target_url", at_target),
    };
    let proxy = Proxy::start(port).await?;
    let mut raw = site.source_stream("BIG", source.clone()).await?;
    if source["retention"] == "interest" {
        // What it has not taken stays, so that there is something to read.
        let config = json!({"name": "other", "durable_name": "other", "ack_policy": "explicit"});
        raw.api("CONSUMER.CREATE.BIG.other", json!({"stream_name": "BIG", "config": config})).await?;
    }
    site.target_stream("BIG", target.clone()).await?;
    site.add("BIG", json!({ (side): proxy.url() })).await?;
    site.row_when("BIG", "runs", |row| row["state"] == "running").await?;
    for number in 1..=3 {
        raw.publish(&message("BIG", number, SIZE)).await?;
    }
    site.settled("BIG", 3).await?;
    Ok((site, proxy, monitor))
}

/// A small message is copied over the slow line, without an error; returns the status row.
async fn small_follows(site: &Site) -> Result<Value> {
    site.source().await?.publish(&message("BIG", 4, 1_000)).await?;
    let row = site.settled_within("BIG", 4, LONG).await.with_context(|| site.service.log())?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    assert_eq!(site.at_target("BIG").await?, 4);
    site.events.quiet(&["gap", "source-reset", "target-reset"])?;
    Ok(row)
}

/// The copy begins again over the slow line; `most` is what its server may send for that.
async fn begins_again(slow: Slow, source: Value, target: Value, most: usize) -> Result<()> {
    let (mut site, proxy, monitor) = three_copied(slow, &source, &target).await?;
    site.service.stop().await?;
    proxy.throttle(TO_CLIENT, Some(RATE));
    let before = sent(&monitor).await?;
    site.service.restart().await?;
    small_follows(&site).await?;
    let sent = sent(&monitor).await? - before;
    assert!(sent < most as u64, "{slow:?} {source} {target}: {sent} bytes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn witnesses_of_large_messages_are_read_over_slow_lines() -> Result<()> {
    let limits = || json!({});
    tokio::try_join!(
        begins_again(Slow::Source, limits(), limits(), SIZE),
        begins_again(Slow::Target, limits(), limits(), SIZE),
        // No consumer may be asked there: one message, in base64.
        begins_again(Slow::Source, json!({"retention": "interest"}), limits(), 2 * SIZE),
        begins_again(Slow::Target, limits(), json!({"retention": "workqueue"}), 2 * SIZE),
    )?;
    Ok(())
}

/// One message that takes longer than a consumer may be silent, with each of the readers.
async fn takes_long(retention: &str, choria: bool) -> Result<()> {
    let (site, proxy) = behind_proxy().await?;
    proxy.throttle(TO_CLIENT, Some(400_000));
    let mut raw = site.source_stream("ONE", json!({"retention": retention})).await?;
    if choria {
        choria_consumer(&site, "ONE").await?;
    }
    site.add("ONE", json!({"source_url": proxy.url()})).await?;
    site.row_when("ONE", "runs", |row| row["state"] == "running").await?;
    raw.publish(&message("ONE", 1, 7_000_000)).await?;
    let row = site.settled_within("ONE", 1, LONG).await.with_context(|| site.service.log())?;
    assert_eq!(row["counters"]["errors"], 0, "{retention} {choria}: {row}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_takes_long_is_no_silence() -> Result<()> {
    tokio::try_join!(
        takes_long("limits", false),
        takes_long("workqueue", false),
        takes_long("workqueue", true),
        takes_long("interest", false),
    )?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_is_recreated_without_reading_a_large_message() -> Result<()> {
    let (site, proxy, monitor) = three_copied(Slow::Source, &json!({}), &json!({})).await?;
    proxy.throttle(TO_CLIENT, Some(RATE));
    let before = sent(&monitor).await?;
    let mut raw = site.source().await?;
    let names = raw.api("CONSUMER.NAMES.BIG", Value::Null).await?["consumers"].take();
    for name in names.as_array().into_iter().flatten().filter_map(Value::as_str) {
        raw.api(&format!("CONSUMER.DELETE.BIG.{name}"), Value::Null).await?;
    }
    let row = small_follows(&site).await?;
    assert_eq!(row["counters"]["repairs"], json!({"consumer": 1, "connections": 0, "everything": 0}), "{row}");
    let sent = sent(&monitor).await? - before;
    assert!(sent < SIZE as u64, "{sent} bytes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_is_moved_beside_large_messages() -> Result<()> {
    let (site, proxy, _) = three_copied(Slow::Source, &json!({}), &json!({})).await?;
    site.ask("pause", "BIG").await?;
    proxy.throttle(TO_CLIENT, Some(RATE));
    let moved = site.send("position", json!({"replication": "BIG", "source_seq": 2})).await?;
    assert_eq!((moved.error, &moved.body["to"]), (None, &json!(2)), "{}", moved.body);
    Ok(())
}

/// Delivers everything that waits for the consumer to somebody who acknowledges nothing.
async fn taken_and_not_acknowledged(site: &Site, count: u64) -> Result<()> {
    let client = connect(&site.source.url()).await?;
    let _taken = client.subscribe("taken").await?;
    let pull = json!({"batch": count, "expires": 60_000_000_000u64}).to_string();
    client.publish_with_reply("$JS.API.CONSUMER.MSG.NEXT.WQ.SR_TEST", "taken", pull.into()).await?;
    client.flush().await?;
    let mut raw = site.source().await?;
    wait_for("everything to be delivered", LONG, async || {
        let info = raw.api("CONSUMER.INFO.WQ.SR_TEST", Value::Null).await;
        info.is_ok_and(|info| info["num_ack_pending"] == count)
    })
    .await
}

/// What asks for much that is pending takes long on a slow line too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_that_is_pending_is_asked_for_over_a_slow_line() -> Result<()> {
    const COUNT: u64 = 12_000;
    let (site, proxy) = behind_proxy().await?;
    let mut raw = site.source_stream("WQ", json!({"retention": "workqueue"})).await?;
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 300_000_000_000u64, "max_ack_pending": 20_000});
    raw.api("CONSUMER.CREATE.WQ.SR_TEST", json!({"stream_name": "WQ", "config": config})).await?;
    raw.publish_all((1..=COUNT).map(|number| message("WQ", number, 100))).await?;
    taken_and_not_acknowledged(&site, COUNT).await?;
    proxy.throttle(&[Direction::ToServer], Some(100_000));
    site.add("WQ", json!({"source_url": proxy.url()})).await?;
    let row = site.settled_within("WQ", COUNT, LONG).await.with_context(|| site.service.log())?;
    is_complete(&site, "WQ", COUNT).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    Ok(())
}

/// A few pending messages among many that are not for the consumer: the number of requests does not grow with those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pending_far_apart_is_asked_for_by_itself() -> Result<()> {
    const COUNT: u64 = 20;
    const BETWEEN: u64 = 10_000;
    let (site, proxy) = behind_proxy().await?;
    let mut raw = site.source_stream("WQ", json!({"retention": "workqueue"})).await?;
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 300_000_000_000u64, "max_ack_pending": 1_000, "filter_subject": "wq.a"});
    raw.api("CONSUMER.CREATE.WQ.SR_TEST.wq.a", json!({"stream_name": "WQ", "config": config})).await?;
    for number in 1..=COUNT {
        raw.publish_all((0..BETWEEN).map(|_| Outgoing::new("wq.b", "x"))).await?;
        raw.publish(&Outgoing::new("wq.a", number.to_string())).await?;
    }
    taken_and_not_acknowledged(&site, COUNT).await?;
    // A command for each sequence would take minutes.
    proxy.throttle(&[Direction::ToServer], Some(100_000));
    site.add("WQ", json!({"source_url": proxy.url(), "filter_subject": "wq.a"})).await?;
    let last = COUNT * (BETWEEN + 1);
    let row = site.settled_within("WQ", last, Duration::from_secs(60)).await.with_context(|| site.service.log())?;
    is_complete(&site, "WQ", COUNT).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    Ok(())
}

/// Acknowledgements take long on a slow line too, and what is requested arrives after them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_acks_take_long_on_a_slow_line() -> Result<()> {
    const COUNT: u64 = 40_000;
    let (site, proxy) = behind_proxy().await?;
    let mut raw = site.source_stream("WQ", json!({"retention": "workqueue"})).await?;
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 300_000_000_000u64, "max_ack_pending": 20_000});
    raw.api("CONSUMER.CREATE.WQ.SR_TEST", json!({"stream_name": "WQ", "config": config})).await?;
    raw.publish_all((1..=COUNT).map(|number| message("WQ", number, 100))).await?;
    proxy.throttle(&[Direction::ToServer], Some(100_000));
    site.add("WQ", json!({"source_url": proxy.url()})).await?;
    let row = site.settled_within("WQ", COUNT, LONG).await.with_context(|| site.service.log())?;
    is_complete(&site, "WQ", COUNT).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}\n{}", site.service.log());
    Ok(())
}

/// A copy that starts at an empty target reads every message once: no question of it brings a payload along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_run_reads_each_message_once() -> Result<()> {
    let (site, [monitor, _]) = large().await?;
    for (stream, retention) in [("L", "limits"), ("WQ", "workqueue"), ("IN", "interest")] {
        let mut raw = site.source_stream(stream, json!({"retention": retention})).await?;
        if retention == "interest" {
            // Nothing is kept without it.
            let config = json!({"durable_name": "KEEP", "ack_policy": "explicit"});
            let body = json!({"stream_name": stream, "config": config});
            raw.api(&format!("CONSUMER.DURABLE.CREATE.{stream}.KEEP"), body).await?;
        }
        for number in 1..=2 {
            raw.publish(&message(stream, number, SIZE)).await?;
        }
        let before = sent(&monitor).await?;
        site.add(stream, json!({})).await?;
        site.settled(stream, 2).await?;
        let sent = sent(&monitor).await? - before;
        assert!(sent < 3 * SIZE as u64, "{sent} bytes of a stream with {retention}");
    }
    Ok(())
}
