//! Replication loops: what returns to its stream is skipped, and what does not is copied.

use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::client::status;
use crate::harness::site::merged;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Service, Site, request, wait_for, wait_while_moving};
use crate::wire::mirror::begin_as;

const STREAM: &str = "ORDERS";

/// A document that copies the stream from one server to another.
fn way(name: &str, from: &Server, to: &Server) -> Value {
    json!({"stream": STREAM, "name": name, "source_url": from.url(), "target_url": to.url()})
}

async fn add(site: &Site, document: Value) -> Result<()> {
    request(&site.client, "replicator.config.add", document).await?;
    Ok(())
}

/// The stream at a server.
async fn create(url: &str) -> Result<()> {
    Raw::connect(url).await?.create_stream(STREAM, json!({"subjects": ["orders.>"]})).await?;
    Ok(())
}

/// Publishes messages `<name> <number>`.
async fn publish(url: &str, name: &str, numbers: RangeInclusive<u64>) -> Result<()> {
    let messages = numbers.map(|i| Outgoing::new(format!("orders.{name}"), format!("{name} {i}")));
    Raw::connect(url).await?.publish_all(messages).await?;
    Ok(())
}

/// Waits until the replications have nothing left, their streams as they are then.
async fn settled(site: &Site, ways: &[(&str, &str)]) -> Result<()> {
    let what = "all replications to settle everything";
    let probe = async || {
        let mut positions = Vec::new();
        let mut all = true;
        for (id, url) in ways {
            let row = status(&site.client, id).await.unwrap_or_default();
            let last = match Raw::connect(url).await {
                Ok(mut raw) => raw.stream_state(STREAM).await.unwrap_or_default()["last_seq"].clone(),
                Err(_) => Value::Null,
            };
            all &= row["state"] == "running" && row["position"]["source_seq"] == last && row["lag"]["messages"] == 0;
            positions.push(format!("{id} {} of {last} {}", row["position"]["source_seq"], row["state"]));
        }
        if all { Ok(()) } else { Err(positions) }
    };
    // A target that lost its answer with the service asks again only after up to 50 s.
    wait_while_moving(what, 2 * LIMIT, probe).await.with_context(|| site.service.log())
}

/// Checks that the stream has the messages of all of these, each once, and those of each in their order.
async fn has_each_once(url: &str, all: &[(&str, u64)]) -> Result<()> {
    let messages = Raw::connect(url).await?.read_stream(STREAM).await?;
    for (name, count) in all {
        let subject = format!("orders.{name}");
        let found = messages.iter().filter(|message| message.subject == subject);
        let found: Vec<_> = found.map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect();
        let expect: Vec<_> = (1..=*count).map(|i| format!("{name} {i}")).collect();
        let differs = found.iter().zip(&expect).position(|(found, expect)| found != expect);
        ensure!(found == expect, "{name} at {url}: {} of {count}, first difference at {differs:?}", found.len());
    }
    let total: u64 = all.iter().map(|(_, count)| count).sum();
    ensure!(messages.len() as u64 == total, "{} messages at {url}, not {total}", messages.len());
    Ok(())
}

async fn skipped(site: &Site, id: &str) -> u64 {
    let row = site.row(id).await.unwrap_or_default();
    row["counters"]["skipped_loop"].as_u64().unwrap_or_default()
}

#[tokio::test]
async fn two_ways_end_equal_over_kills_of_the_service() -> Result<()> {
    const EACH: u64 = 10_000;
    let mut site = Site::start().await?;
    let (a, b) = (site.source.url(), site.target.url());
    tokio::try_join!(create(&a), create(&b))?;
    add(&site, way("there", &site.source, &site.target)).await?;
    add(&site, way("back", &site.target, &site.source)).await?;
    let publish = async {
        for part in 0..10 {
            let numbers = part * EACH / 10 + 1..=(part + 1) * EACH / 10;
            tokio::try_join!(publish(&a, "a", numbers.clone()), publish(&b, "b", numbers))?;
        }
        anyhow::Ok(())
    };
    let kill = async {
        for at in [500, 6_000, 14_000] {
            let mut raw = Raw::connect(&a).await?;
            let what = format!("{at} messages at the first site");
            wait_for(&what, LIMIT, async || {
                raw.stream_state(STREAM).await.is_ok_and(|state| state["messages"].as_u64() >= Some(at))
            })
            .await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        anyhow::Ok(())
    };
    tokio::try_join!(publish, kill)?;
    settled(&site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await?;
    let all = [("a", EACH), ("b", EACH)];
    has_each_once(&a, &all).await?;
    has_each_once(&b, &all).await?;
    // And again, from the beginning of what each has.
    site.service.kill()?;
    site.service.restart().await?;
    publish_more(&site, &all).await
}

async fn publish_more(site: &Site, all: &[(&str, u64)]) -> Result<()> {
    let (a, b) = (site.source.url(), site.target.url());
    publish(&a, "late", 1..=10).await?;
    settled(site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await?;
    let all: Vec<_> = all.iter().copied().chain([("late", 10)]).collect();
    has_each_once(&a, &all).await?;
    has_each_once(&b, &all).await?;
    ensure!(skipped(site, "ORDERS.back").await >= 10, "{:?}", site.row("ORDERS.back").await);
    Ok(())
}

/// The target's server takes the messages of one way itself, and marks them with its own header.
#[tokio::test]
async fn a_copy_knows_what_was_fed_to_its_source() -> Result<()> {
    const EACH: u64 = 10_000;
    for version in ["2.15.1", "2.10.26"] {
        let (mut site, feed) = begin_as("source", version, &[]).await?;
        let (a, b) = (site.source.url(), site.target.url());
        tokio::try_join!(create(&a), create(&b))?;
        let there = merged(way("there", &site.source, &site.target), feed);
        add(&site, merged(there, json!({"target_update": true}))).await?;
        let reply =
            request(&site.client, "replicator.config.validate", way("back", &site.target, &site.source)).await?;
        ensure!(reply.to_string().contains("that comes back there is skipped"), "{reply}");
        add(&site, way("back", &site.target, &site.source)).await?;
        let publish = async {
            for part in 0..10 {
                let numbers = part * EACH / 10 + 1..=(part + 1) * EACH / 10;
                tokio::try_join!(publish(&a, "a", numbers.clone()), publish(&b, "b", numbers))?;
            }
            anyhow::Ok(())
        };
        let kill = async {
            for at in [500, 12_000] {
                let mut raw = Raw::connect(&a).await?;
                let what = format!("{at} messages at the first site");
                wait_for(&what, LIMIT, async || {
                    raw.stream_state(STREAM).await.is_ok_and(|state| state["messages"].as_u64() >= Some(at))
                })
                .await?;
                site.service.kill()?;
                site.service.restart().await?;
            }
            anyhow::Ok(())
        };
        tokio::try_join!(publish, kill)?;
        settled(&site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await.context(version)?;
        let all = [("a", EACH), ("b", EACH)];
        has_each_once(&a, &all).await.context(version)?;
        has_each_once(&b, &all).await.context(version)?;
        site.service.kill()?;
        site.service.restart().await?;
        publish_more(&site, &all).await.context(version)?;
    }
    Ok(())
}

/// The other group says in `target_origin` by which feed its copies came.
#[tokio::test]
async fn a_copy_knows_what_another_group_fed() -> Result<()> {
    let (site, feed) = begin_as("source", "2.15.1", &[]).await?;
    let (a, b) = (site.source.url(), site.target.url());
    tokio::try_join!(create(&a), create(&b))?;
    let there = merged(way("there", &site.source, &site.target), feed);
    add(&site, merged(there, json!({"target_update": true, "target_origin": ["OTHER back"]}))).await?;
    let control = Server::start(Role::Control).await?;
    let other = Service::builder(&control.url(), "OTHER").start().await?;
    let client = crate::harness::client::connect(&control.url()).await?;
    let back = merged(
        way("back", &site.target, &site.source),
        json!({"target_origin": [format!("{} there", crate::harness::SITE)]}),
    );
    request(&client, "replicator.config.add", back).await?;
    tokio::try_join!(publish(&a, "a", 1..=500), publish(&b, "b", 1..=500))?;
    for url in [&a, &b] {
        let all = async || has_each_once(url, &[("a", 500), ("b", 500)]).await;
        wait_while_moving("both", 2 * LIMIT, async || all().await.map_err(|error| error.to_string()))
            .await
            .with_context(|| other.log())?;
    }
    // Each message was read, and none came back.
    let read = async || {
        let row = status(&client, "ORDERS.back").await.unwrap_or_default();
        row["position"]["source_seq"] == 1_000 && row["counters"]["skipped_loop"] == 500
    };
    wait_for("the way back to be read", LIMIT, read).await.with_context(|| other.log())?;
    has_each_once(&a, &[("a", 500), ("b", 500)]).await
}

/// A mirror has nothing else than the stream that it is fed from, and its messages do not say so.
#[tokio::test]
async fn a_mirror_is_not_copied_back_to_its_origin() -> Result<()> {
    let (site, feed) = begin_as("mirror", "2.15.1", &[]).await?;
    create(&site.source.url()).await?;
    publish(&site.source.url(), "a", 1..=50).await?;
    add(&site, merged(way("there", &site.source, &site.target), feed)).await?;
    settled(&site, &[("ORDERS.there", &site.source.url())]).await?;
    let back = way("back", &site.target, &site.source);
    let reply = site.send("config.validate", back.clone()).await?;
    ensure!(format!("{reply:?}").contains("is a mirror that replication `ORDERS.there` feeds"), "{reply:?}");
    // By hand.
    site.put("ORDERS.back", back.to_string()).await?;
    let held = |row: &Value| row["state"] == "held" && row.to_string().contains("is a mirror that is fed from");
    site.row_when("ORDERS.back", "is held", held).await?;
    has_each_once(&site.source.url(), &[("a", 50)]).await
}

#[tokio::test]
async fn a_ring_of_three_sites_ends_equal() -> Result<()> {
    let site = Site::start().await?;
    let servers = [&site.source, &site.target, site.control()];
    let urls = servers.map(Server::url);
    for (url, name) in urls.iter().zip(["a", "b", "c"]) {
        create(url).await?;
        publish(url, name, 1..=1_000).await?;
    }
    add(&site, way("ab", servers[0], servers[1])).await?;
    add(&site, way("bc", servers[1], servers[2])).await?;
    let reply = request(&site.client, "replicator.config.add", way("ca", servers[2], servers[0])).await?;
    ensure!(reply.to_string().contains("ORDERS.ca"), "{reply}");
    let ways = [("ORDERS.ab", urls[0].as_str()), ("ORDERS.bc", &urls[1]), ("ORDERS.ca", &urls[2])];
    let all = [("a", 1_000), ("b", 1_000), ("c", 1_000)];
    for url in &urls {
        crate::harness::raw::wait_messages(&mut Raw::connect(url).await?, STREAM, 3_000, LIMIT).await?;
    }
    settled(&site, &ways).await?;
    for url in &urls {
        has_each_once(url, &all).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_chain_is_not_cut() -> Result<()> {
    // The last hop is in another account of the first server, and the first two hops are two-way.
    let accounts = "accounts { ONE { jetstream: enabled, users: [{user: one, password: pw1chain}] }\n\
                    TWO { jetstream: enabled, users: [{user: two, password: pw2chain}] } }";
    let first = Server::builder(Role::Source).config(accounts).start().await?;
    let second = Server::start(Role::Target).await?;
    let site = Site::builder().on(first, second).control(Server::start(Role::Control).await?).start().await?;
    let (a, b, c) = (site.source.url_as("one:pw1chain"), site.target.url(), site.source.url_as("two:pw2chain"));
    let way = |name: &str, from: &str, to: &str| json!({"stream": STREAM, "name": name, "source_url": from, "target_url": to});
    tokio::try_join!(create(&a), create(&b), create(&c))?;
    tokio::try_join!(publish(&a, "a", 1..=500), publish(&b, "b", 1..=500), publish(&c, "c", 1..=500))?;
    for (name, from, to) in [("bc", &b, &c), ("ab", &a, &b), ("ba", &b, &a)] {
        add(&site, way(name, from, to)).await?;
    }
    crate::harness::raw::wait_messages(&mut Raw::connect(&c).await?, STREAM, 1_500, LIMIT).await?;
    settled(&site, &[("ORDERS.ab", &a), ("ORDERS.ba", &b), ("ORDERS.bc", &b)]).await?;
    has_each_once(&a, &[("a", 500), ("b", 500)]).await?;
    has_each_once(&b, &[("a", 500), ("b", 500)]).await?;
    has_each_once(&c, &[("a", 500), ("b", 500), ("c", 500)]).await
}

#[tokio::test]
async fn two_groups_name_each_other_as_the_origin() -> Result<()> {
    let site = Site::start().await?;
    let (a, b) = (site.source.url(), site.target.url());
    let arguments = ["--bucket-prefix", "OTHER", "--prefix", "other"];
    let _other = Service::builder(&site.control().url(), "OTHER").args(arguments).start().await?;
    tokio::try_join!(create(&a), create(&b))?;
    tokio::try_join!(publish(&a, "a", 1..=1_000), publish(&b, "b", 1..=1_000))?;
    let there = merged(way("TEST", &site.source, &site.target), json!({"target_origin": ["OTHER"]}));
    let back = merged(way("back", &site.target, &site.source), json!({"target_origin": ["TEST TEST"]}));
    add(&site, there).await?;
    request(&site.client, "other.config.add", back).await?;
    for url in [&a, &b] {
        crate::harness::raw::wait_messages(&mut Raw::connect(url).await?, STREAM, 2_000, LIMIT).await?;
    }
    settled(&site, &[("ORDERS", &a)]).await?;
    let caught_up = async || {
        let reply = request(&site.client, "other.status", json!({})).await.unwrap_or_default();
        let row = &reply["replications"][0];
        row["position"]["source_seq"] == 2_000 && row["counters"]["skipped_loop"] == 1_000
    };
    wait_for("the other group to skip what came from its target", LIMIT, caught_up).await?;
    for url in [&a, &b] {
        has_each_once(url, &[("a", 1_000), ("b", 1_000)]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_a_deleted_way_copied_does_not_return() -> Result<()> {
    let mut site = Site::start().await?;
    let (a, b) = (site.source.url(), site.target.url());
    tokio::try_join!(create(&a), create(&b))?;
    add(&site, way("there", &site.source, &site.target)).await?;
    add(&site, way("back", &site.target, &site.source)).await?;
    publish(&b, "b", 1..=10).await?;
    settled(&site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await?;
    request(&site.client, "replicator.pause", json!({"replication": "ORDERS.back"})).await?;
    publish(&a, "a", 1..=100).await?;
    settled(&site, &[("ORDERS.there", &a)]).await?;
    request(&site.client, "replicator.config.delete", json!({"replication": "ORDERS.there"})).await?;
    site.service.kill()?;
    site.service.restart().await?;
    request(&site.client, "replicator.resume", json!({"replication": "ORDERS.back"})).await?;
    settled(&site, &[("ORDERS.back", &b)]).await?;
    let all = [("a", 100), ("b", 10)];
    has_each_once(&a, &all).await?;
    has_each_once(&b, &all).await?;

    // A replication of the same name from elsewhere: its copies look the same, and are not skipped.
    create(&site.control().url()).await?;
    publish(&site.control().url(), "c", 1..=100).await?;
    add(&site, way("there", site.control(), &site.target)).await?;
    crate::harness::raw::wait_messages(&mut Raw::connect(&b).await?, STREAM, 210, LIMIT).await?;
    settled(&site, &[("ORDERS.back", &b)]).await?;
    let all = [("a", 100), ("b", 10), ("c", 100)];
    has_each_once(&a, &all).await
}

#[tokio::test]
async fn forged_provenance_skips_that_message_only() -> Result<()> {
    let site = Site::start().await?;
    let (a, b) = (site.source.url(), site.target.url());
    tokio::try_join!(create(&a), create(&b))?;
    add(&site, way("there", &site.source, &site.target)).await?;
    add(&site, way("back", &site.target, &site.source)).await?;
    let with = |value: &str, payload: &str| {
        Outgoing::new("orders.a", payload).with_lines(&[&format!("Choria-SR-Source: {value}")])
    };
    let forged = [
        with("ORDERS 1 TEST there 5", "copied by this replication"),
        with("ORDERS 1 TEST back 5", "copied from the target"),
        with("ORDERS 1 TEST other 5", "a 1"),
        with("ORDERS 1 OTHER back 5", "a 2"),
        with("OTHERS 1 TEST back 5", "a 3"),
        with("ORDERS x TEST back 5", "a 4"),
    ];
    Raw::connect(&a).await?.publish_all(forged).await?;
    settled(&site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await?;
    has_each_once(&b, &[("a", 4)]).await?;
    ensure!(skipped(&site, "ORDERS.there").await == 2, "{:?}", site.row("ORDERS.there").await);
    Ok(())
}

#[tokio::test]
async fn without_protection_each_message_returns_once() -> Result<()> {
    let site = Site::start().await?;
    let (a, b) = (site.source.url(), site.target.url());
    tokio::try_join!(create(&a), create(&b))?;
    publish(&a, "a", 1..=100).await?;
    let off = json!({"loop_protection": false});
    add(&site, merged(way("there", &site.source, &site.target), off.clone())).await?;
    add(&site, merged(way("back", &site.target, &site.source), off)).await?;
    crate::harness::raw::wait_messages(&mut Raw::connect(&a).await?, STREAM, 200, LIMIT).await?;
    settled(&site, &[("ORDERS.there", &a), ("ORDERS.back", &b)]).await?;
    let at_b = Raw::connect(&b).await?.stream_state(STREAM).await?;
    ensure!(at_b["messages"] == 100 && skipped(&site, "ORDERS.there").await == 100, "{at_b}");
    Ok(())
}

#[tokio::test]
async fn validate_finds_a_loop_through_another_installation() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    let arguments = ["--bucket-prefix", "OTHER", "--prefix", "other"];
    let _other = Service::builder(&site.control().url(), "OTHER").args(arguments).start().await?;
    let warnings = async |fields| {
        let back = json!({"stream": "ORDERS", "source_url": site.target.url(), "target_url": site.source.url()});
        let reply = request(&site.client, "other.config.validate", merged(back, fields)).await?;
        assert_eq!(reply["valid"], true, "{reply}");
        anyhow::Ok(reply["warnings"].to_string())
    };
    let expect =
        "message 10 of source stream `ORDERS` was copied by site `TEST` from message 10 of target stream `ORDERS`";
    let found = warnings(json!({})).await?;
    assert!(found.contains(expect) && found.contains("replication loop"), "{found}");

    // A stream of the same name that is another one.
    site.source_stream("OTHERS", json!({"subjects": ["elsewhere.>"]})).await.context("a stream")?;
    let found = warnings(json!({"target_stream": "OTHERS", "target_subject_prefix": "elsewhere"})).await?;
    assert!(!found.contains("replication loop"), "{found}");
    Ok(())
}

#[tokio::test]
async fn a_chain_of_streams_of_one_name_is_no_loop() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    // The third stream is on the control server, and has messages of its own at the sequences that provenance names.
    let chain = json!({"stream": "ORDERS", "source_url": site.target.url(), "target_url": site.control().url()});
    let mut control = crate::harness::raw::Raw::connect(&site.control().url()).await?;
    control.api("STREAM.CREATE.ORDERS", json!({"name": "ORDERS", "subjects": ["orders.>"]})).await?;
    control.publish_all((0..20).map(|_| crate::harness::Outgoing::new("orders.x", "x"))).await?;
    let reply = request(&site.client, "replicator.config.validate", merged(chain, json!({"name": "chain"}))).await?;
    assert!(!reply["warnings"].to_string().contains("replication loop"), "{reply}");
    Ok(())
}
