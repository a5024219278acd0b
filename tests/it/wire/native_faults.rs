//! Native feeds of many messages, of many sources, and over everything that may be killed or frozen.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};

use super::mirror::{begin_as, error, message};
use crate::harness::{
    Cluster, End, LIMIT, Outgoing, Raw, Role, SITE, Server, Service, Site, Stored, raw::header_values, site::merged,
    wait_for,
};

const STREAM: &str = "ORDERS";
/// A target that asked while no feed was there asks again within 50 s.
pub(super) const ASKS_WITHIN: Duration = Duration::from_secs(90);

/// Each version with an ingestion of its own.
const ALL_VERSIONS: [&str; 4] = ["2.10.26", "2.12.8", "2.14.6", "2.15.1"];

/// Publishes in the background up to the last number; every `pause` so many, also when the source is restarted meanwhile.
fn load(url: String, last: u64, part: u64, pause: Duration) -> JoinHandle<Result<()>> {
    load_until(url, Arc::new(AtomicU64::new(last)), part, pause)
}

/// The same where the last number is known later.
pub(super) fn load_until(url: String, last: Arc<AtomicU64>, part: u64, pause: Duration) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        let stored = async || Raw::connect(&url).await.ok()?.stream_state(STREAM).await.ok()?["last_seq"].as_u64();
        loop {
            // Read again each time: a publisher does not know what was stored before a kill.
            if let Some(stored) = stored().await {
                let last = last.load(Ordering::Relaxed);
                if stored >= last {
                    return Ok(());
                }
                let messages = (stored + 1..=(stored + part).min(last)).map(|number| message(number, ""));
                if let Ok(mut raw) = Raw::connect(&url).await {
                    raw.publish_all(messages).await.ok();
                }
            }
            sleep(pause).await;
        }
    })
}

/// The messages of the target without the header that the server adds to those of a source.
fn plain(kind: &str, stored: &[Stored]) -> Vec<(u64, String, Vec<u8>)> {
    let of = |message: &Stored| {
        let seq = match kind {
            "mirror" => message.seq,
            _ => {
                let from = header_values(&message.header, "Nats-Stream-Source").pop().unwrap_or_default();
                from.split(' ').nth(1).and_then(|seq| seq.parse().ok()).unwrap_or_default()
            }
        };
        (seq, message.subject.clone(), message.payload.clone())
    };
    stored.iter().map(of).collect()
}

/// Both have the same messages, each once and in order; a mirror with the same sequences, times and headers.
pub(super) fn equal(kind: &str, from: &[Stored], to: &[Stored], logs: &str) -> Result<()> {
    let original: Vec<_> =
        from.iter().map(|message| (message.seq, message.subject.clone(), message.payload.clone())).collect();
    let copies = plain(kind, to);
    let differs = original.iter().zip(&copies).position(|(one, other)| one != other);
    ensure!(
        original == copies && (kind == "source" || from == to),
        "{} messages became {}, first difference at {differs:?}\n{logs}",
        from.len(),
        to.len()
    );
    Ok(())
}

/// A message of a large stream; ids return after 20,000 messages where that is possible.
fn numbered(number: u64, version: &str) -> Outgoing {
    let old = version == "2.10.26";
    let made = message(number, if old { "" } else { ".a@b.c" });
    match number % 5 {
        3 if !old => {
            made.with_lines(&[&format!("Nats-Msg-Id: {}", number % 20_000), "Two: 1", "two: 2", "Two: 1", "Empty:"])
        }
        _ => made,
    }
}

/// 100,000 messages, a tenth of which are deleted before and while they are fed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make check-long"]
async fn a_large_stream_is_mirrored_as_it_is() -> Result<()> {
    const MESSAGES: u64 = 100_000;
    const PART: u64 = 20_000;
    for version in ALL_VERSIONS {
        let (site, fields) = begin_as("mirror", version, &[]).await?;
        let mut source = site.source_stream(STREAM, json!({"duplicate_window": 100_000_000})).await?;
        let begun = Instant::now();
        let mut deleted = BTreeSet::new();
        for first in (1..=MESSAGES).step_by(PART as usize) {
            let part = Instant::now();
            let stored = source.publish_all((first..first + PART).map(|number| numbered(number, version))).await?;
            assert_eq!(stored, first + PART - 1, "{version}: an id was known");
            for hole in (first + 4..first + PART).step_by(10) {
                source.api(&format!("STREAM.MSG.DELETE.{STREAM}"), json!({"seq": hole})).await?;
                deleted.insert(hole);
            }
            if first == 1 + PART {
                site.add(STREAM, fields.clone()).await?;
            }
            // The ids of this part are forgotten.
            wait_for("the end of the duplicate window", LIMIT, async || part.elapsed() > Duration::from_millis(300))
                .await?;
        }
        site.settled_within(STREAM, MESSAGES, 2 * LIMIT).await.context(version)?;
        let took = begun.elapsed();
        let mut copies = site.target().await?.read_stream(STREAM).await?;
        let all = copies.len();
        // What was deleted after it was fed stays, as at every mirror.
        let late: Vec<_> = copies.iter().filter(|copy| deleted.contains(&copy.seq)).map(|copy| copy.seq).collect();
        assert!(late.iter().all(|seq| *seq > 2 * PART), "{version}: {:?}", late.first());
        copies.retain(|copy| !deleted.contains(&copy.seq));
        let from = source.read_stream(STREAM).await?;
        assert_eq!(from.len() as u64, MESSAGES - MESSAGES / 10);
        equal("mirror", &from, &copies, &site.service.log()).context(version)?;
        eprintln!("{version}: {all} messages in {took:?}, {} of them deleted at the source later", late.len());
    }
    Ok(())
}

/// Server 2.10 would store a message under what is after the last `@` of its subject, and never one with a known id.
#[tokio::test]
async fn what_an_old_target_cannot_store_is_held() -> Result<()> {
    let window = json!({"duplicate_window": 100_000_000, "subjects": ["orders.>"]});
    for (headers, subject, text) in [
        (&[][..], "orders.a@b", "has `@` in its subject"),
        (&["Nats-Msg-Id: 1"][..], "orders.1", "does not store source message 2"),
    ] {
        let (site, fields) = begin_as("mirror", "2.10.26", &[]).await?;
        let mut source = site.source_stream(STREAM, window.clone()).await?;
        source.publish(&Outgoing::new("orders.1", "first").with_lines(&["Nats-Msg-Id: 1"])).await?;
        let known = Instant::now();
        wait_for("the end of the duplicate window", LIMIT, async || known.elapsed() > Duration::from_millis(300))
            .await?;
        let second = Outgoing::new(subject, "second");
        let second = if headers.is_empty() { second } else { second.with_lines(headers) };
        assert_eq!(source.publish(&second).await?, 2);
        // The target asks again when the sequence after the one that it refused arrives.
        source.publish(&Outgoing::new("orders.2", "third")).await?;
        site.add(STREAM, fields).await?;
        let held = |row: &Value| row["state"] == "held" && error(row).contains(text);
        site.row_when(STREAM, text, held).await?;
        assert_eq!(site.at_target(STREAM).await?, 1);
    }
    Ok(())
}

/// A source with three replicas, over everything that can happen to its servers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicated_source_survives_its_servers() -> Result<()> {
    let (mut cluster, leaf_url) = Cluster::with_leafnode_ports().await?;
    let site = Site::small().await?;
    site.source_stream(STREAM, json!({})).await?;
    cluster.create_stream(STREAM, json!({"num_replicas": 3, "subjects": ["own.>"]})).await?;
    let fields =
        json!({"kind": "source", "target_url": cluster.url(), "target_leaf_url": leaf_url, "target_update": true});
    site.add(STREAM, fields).await?;
    let last = Arc::new(AtomicU64::new(u64::MAX));
    let load = load_until(site.source.url(), last.clone(), 20, Duration::from_millis(30));
    let position =
        async || site.row(STREAM).await.unwrap_or_default()["position"]["source_seq"].as_u64().unwrap_or_default();
    let moves = async |what: &str| {
        let (before, begun) = (position().await, Instant::now());
        let moved = wait_for(what, ASKS_WITHIN, async || position().await > before).await;
        eprintln!("{what}: flows again after {:?}", begun.elapsed());
        moved.with_context(|| site.service.log())
    };
    moves("begin").await?;
    for _ in 0..2 {
        cluster.step_down(STREAM).await?;
        moves("stepdown").await?;
    }
    let leader = cluster.leader(STREAM).await.context("a leader")?;
    cluster.end(leader, End::Killed).await?;
    moves("kill of the leader").await?;
    cluster.servers[leader].restart().await?;
    cluster.wait_leaders(&[STREAM], None).await?;
    // The feed is connected to the first server that answers.
    cluster.end(0, End::Killed).await?;
    moves("kill of the server of the leafnode").await?;
    cluster.servers[0].restart().await?;
    cluster.restart_all(End::Killed).await?;
    cluster.wait_leaders(&[STREAM], None).await?;
    moves("kill of all").await?;
    last.store(0, Ordering::Relaxed);
    load.await??;
    let published = site.source().await?.stream_state(STREAM).await?["last_seq"].as_u64().context("a sequence")?;
    site.settled_within(STREAM, published, ASKS_WITHIN).await?;
    cluster.wait_leaders(&[STREAM], None).await?;
    let from = site.source().await?.read_stream(STREAM).await?;
    equal("source", &from, &cluster.read_stream(STREAM).await?, &site.service.log())
}

/// One of two instances does not run for three TTLs, and wakes up beside its successor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_feed_that_was_frozen_for_three_ttls_stays_out() -> Result<()> {
    const MESSAGES: u64 = 12_000;
    const TTL: Duration = Duration::from_secs(3);
    for (kind, version) in [("mirror", "2.15.1"), ("source", "2.15.1"), ("mirror", "2.12.8")] {
        let (site, fields) = begin_as(kind, version, &["--instance", "one", "--lease-ttl", "3s"]).await?;
        site.source_stream(STREAM, json!({})).await?;
        site.add(STREAM, fields).await?;
        let load = load(site.source.url(), MESSAGES, 50, Duration::from_millis(60));
        let two =
            Service::builder(&site.service_url(), SITE).instance("two").args(["--lease-ttl", "3s"]).start().await?;
        let leads = async |leader: &str| site.row(STREAM).await.is_some_and(|row| row["leader"] == leader);
        let any = async || site.at_target(STREAM).await.is_ok_and(|messages| messages > 0);
        wait_for("the feed to begin", LIMIT, any).await.with_context(|| site.service.log())?;
        wait_for("a leader", LIMIT, async || leads("one").await || leads("two").await).await?;
        let (old, successor, new) =
            if leads("one").await { (&site.service, &two, "two") } else { (&two, &site.service, "one") };
        old.freeze()?;
        let frozen = Instant::now();
        wait_for("a successor", LIMIT, async || leads(new).await).await?;
        wait_for("three TTLs", LIMIT, async || frozen.elapsed() > 3 * TTL).await?;
        let before = site.at_target(STREAM).await?;
        wait_for("the successor to feed", ASKS_WITHIN, async || {
            site.at_target(STREAM).await.is_ok_and(|messages| messages > before)
        })
        .await
        .with_context(|| successor.log())?;
        let requests = |service: &Service| service.log().matches("the target asked for messages").count();
        let asked = requests(&site.service) + requests(&two);
        old.thaw()?;
        load.await??;
        site.settled_within(STREAM, MESSAGES, ASKS_WITHIN).await.with_context(|| two.log())?;
        let logs = format!("{}\n{}", site.service.log(), two.log());
        let from = site.source().await?.read_stream(STREAM).await?;
        equal(kind, &from, &site.target().await?.read_stream(STREAM).await?, &logs)
            .with_context(|| version.to_owned())?;
        assert!(leads(new).await, "{logs}");
        // Two that feed by turns are asked again and again.
        let more = requests(&site.service) + requests(&two) - asked;
        assert!(more <= 2, "{kind} at {version}: the target asked {more} times after the old feed woke up\n{logs}");
    }
    Ok(())
}

/// Fifty sites, each an account with a stream of the same name, into one stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_sites_feed_one_stream() -> Result<()> {
    const SITES: usize = 50;
    const EACH: u64 = 300;
    let account =
        |number: usize| format!("S{number}: {{ jetstream: enabled, users: [{{user: s{number}, password: x}}] }}");
    let accounts: Vec<_> = (0..SITES).map(account).collect();
    let accounts = format!("accounts {{ {} }}", accounts.join(", "));
    let sites = Server::builder(Role::Source).config(&accounts).start().await?;
    let (mut site, fields) = begin_as("source", "2.15.1", &[]).await?;
    let url = |number: usize| sites.url_as(&format!("s{number}:x"));
    let publish = async |numbers: RangeInclusive<u64>| {
        for number in 0..SITES {
            let messages = numbers.clone().map(|each| Outgoing::new(format!("orders.{number}"), each.to_string()));
            Raw::connect(&url(number)).await?.publish_all(messages).await?;
        }
        anyhow::Ok(())
    };
    for number in 0..SITES {
        let config = json!({"subjects": ["orders.>"]});
        Raw::connect(&url(number)).await?.create_stream(STREAM, config).await?;
    }
    publish(1..=EACH / 3).await?;
    let documents = (0..SITES).map(|number| {
        let own = json!({"name": format!("site-{number}"), "source_url": url(number), "target_stream": "ALL"});
        site.add(STREAM, merged(fields.clone(), own))
    });
    try_join_all(documents).await?;
    let at_target = async |site: &Site, messages: u64| {
        let mut last = 0;
        let all = async || {
            last = site.at_target("ALL").await.unwrap_or_default();
            last >= messages
        };
        let begun = Instant::now();
        let reached = wait_for("everything in one stream", 2 * ASKS_WITHIN, all).await;
        eprintln!("{last} of {messages} messages after {:?}", begun.elapsed());
        reached.with_context(|| format!("{last} of {messages}\n{}", site.service.log()))
    };
    at_target(&site, SITES as u64 * EACH / 6).await?;
    for part in 1..3 {
        site.service.kill()?;
        site.service.restart().await?;
        publish(part * EACH / 3 + 1..=(part + 1) * EACH / 3).await?;
    }
    at_target(&site, SITES as u64 * EACH).await?;
    let mut by_site: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for message in site.target().await?.read_stream("ALL").await? {
        let number = String::from_utf8_lossy(&message.payload).parse()?;
        by_site.entry(message.subject).or_default().push(number);
    }
    assert_eq!(by_site.len(), SITES);
    let expect: Vec<u64> = (1..=EACH).collect();
    for (subject, numbers) in by_site {
        ensure!(numbers == expect, "{subject}: {} messages\n{}", numbers.len(), site.service.log());
    }
    Ok(())
}

/// Everything is killed while very many messages are under way.
async fn many_kills(kind: &str, version: &str) -> Result<()> {
    const MESSAGES: u64 = 600_000;
    const KILLS: u64 = 20;
    let (mut site, fields) = begin_as(kind, version, &[]).await?;
    let mut source = site.source_stream(STREAM, json!({})).await?;
    source.publish_all((1..=MESSAGES / 2).map(|number| message(number, ""))).await?;
    site.add(STREAM, fields).await?;
    let load = load(site.source.url(), MESSAGES, 2_000, Duration::from_millis(10));
    let mut slowest = Duration::ZERO;
    let at = async |site: &Site| site.at_target(STREAM).await.unwrap_or_default();
    for kill in 1..=KILLS {
        // One after the other part of the stream.
        let reach = kill * MESSAGES / (KILLS + 2);
        wait_for("the next part", 2 * ASKS_WITHIN, async || at(&site).await >= reach)
            .await
            .with_context(|| site.service.log())?;
        site.service.kill()?;
        site.service.restart().await?;
        let (begun, before) = (Instant::now(), at(&site).await);
        match kill % 7 {
            2 => {
                site.target.kill()?;
                site.target.restart().await?;
            }
            5 => {
                site.source.kill()?;
                site.source.restart().await?;
            }
            _ => {
                wait_for("messages to flow", ASKS_WITHIN, async || at(&site).await > before)
                    .await
                    .with_context(|| site.service.log())?;
                slowest = slowest.max(begun.elapsed());
            }
        }
    }
    load.await??;
    site.settled_within(STREAM, MESSAGES, ASKS_WITHIN).await?;
    let from = site.source().await?.read_stream(STREAM).await?;
    assert_eq!(from.len() as u64, MESSAGES);
    equal(kind, &from, &site.target().await?.read_stream(STREAM).await?, &site.service.log())?;
    eprintln!("{kind} at {version}: flows again within {slowest:?} of a restart of the service");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "600,000 messages and 26 kills: make check-long"]
async fn a_mirror_survives_twenty_kills() -> Result<()> {
    many_kills("mirror", "2.15.1").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "600,000 messages and 26 kills: make check-long"]
async fn a_source_survives_twenty_kills() -> Result<()> {
    many_kills("source", "2.15.1").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "600,000 messages and 26 kills: make check-long"]
async fn a_mirror_at_an_old_server_survives_twenty_kills() -> Result<()> {
    many_kills("mirror", "2.10.26").await
}
