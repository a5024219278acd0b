//! Documents with `streams` on real servers: a replication for each stream that matches, now or later.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::checker::{Expect, compare_streams};
use crate::harness::client::{refused, status};
use crate::harness::site::merged;
use crate::harness::{LIMIT, Role, SITE, Server, Service, Site, request, wait_for, wait_value};

/// A list may come 12 s after the one before.
const NEXT_LIST: Duration = Duration::from_secs(30);

async fn add(site: &Site, more: Value) -> Result<Value> {
    let link = json!({"name": "eu", "source_url": site.source.url(), "target_url": site.target.url()});
    request(&site.client, "replicator.link.add", link).await?;
    let document = json!({"link": "eu", "streams": ["ORDERS_*", "EVENTS"], "target_update": true});
    request(&site.client, "replicator.config.add", merged(document, more)).await
}

/// Ids of all rows.
async fn ids(site: &Site) -> Vec<String> {
    let reply = request(&site.client, "replicator.status", Value::Null).await.unwrap_or_default();
    let rows = reply["replications"].as_array().cloned().unwrap_or_default();
    rows.iter().filter_map(|row| row["replication"].as_str().map(str::to_owned)).collect()
}

async fn rows_are(site: &Site, expect: &[&str]) -> Result<()> {
    let mut last = Vec::new();
    let same = async || {
        last = ids(site).await;
        last == expect
    };
    let found = wait_for(&format!("the rows {expect:?}"), NEXT_LIST, same).await;
    found.with_context(|| format!("there are {last:?}\n{}", site.service.log()))
}

async fn gone(site: &Site, id: &str) -> Result<Value> {
    let is_gone = async || {
        let row = site.row(id).await?;
        (row["state"] == "held" && row["last_error"]["kind"] == "gone").then_some(row)
    };
    let found = wait_value(&format!("`{id}` to be gone"), NEXT_LIST, is_gone).await;
    found.with_context(|| site.service.log())
}

#[tokio::test]
async fn each_stream_that_matches_has_a_replication() -> Result<()> {
    let site = Site::start().await?;
    for stream in ["ORDERS_EU", "ORDERS_TEST", "EVENTS", "OTHER"] {
        site.filled(stream, 5).await?;
    }
    let more = json!({"exclude_streams": ["*_TEST"], "target_stream": "X_{stream}"});
    assert_eq!(add(&site, more).await?["replication"], "eu");
    rows_are(&site, &["eu", "eu.EVENTS", "eu.ORDERS_EU"]).await?;
    for stream in ["ORDERS_EU", "EVENTS"] {
        let row = site.settled(&format!("eu.{stream}"), 5).await?;
        assert_eq!(row["target"]["stream"], format!("X_{stream}"), "{row}");
        site.verify(&format!("X_{stream}"), &Expect::copy_of(stream)).await?;
    }
    let row = site.row_when("eu", "runs", |row| row["state"] == "running").await?;
    assert_eq!((&row["source"]["stream"], &row["lag"]["messages"]), (&json!("ORDERS_*,EVENTS"), &json!(0)), "{row}");
    // Both clusters are checked for one of them.
    let document = json!({"id": "next", "link": "eu", "streams": ["O*"], "target_stream": "Y_{stream}"});
    let checked = site.send("config.validate", document.clone()).await?.body;
    assert!(checked["preflight"]["source"]["stream"]["messages"] == 5, "{checked}");
    let none = site.send("config.validate", merged(document, json!({"streams": ["NONE_*"]}))).await?.body;
    assert!(none["valid"] == true && none["warnings"][0]["path"] == "/streams", "{none}");
    // Documents are listed as they were written.
    let list = site.ask("config.list", "").await?.body;
    assert_eq!((&list["total"], &list["replications"][0]["replication"]), (&json!(1), &json!("eu")), "{list}");
    let shown = site.ask("config.get", "eu.EVENTS").await?.body;
    let expect = json!({"id": "eu.EVENTS", "stream": "EVENTS", "link": "eu", "target_update": true, "target_stream": "X_{stream}"});
    assert_eq!(shown["config"], expect, "{shown}");
    refused(&site.ask("config.delete", "eu.EVENTS").await?, 409, "`exclude_streams`");
    // One of them is paused as any other.
    request(&site.client, "replicator.pause", json!({"replication": "eu.EVENTS"})).await?;
    site.row_when("eu.EVENTS", "is paused", |row| row["state"] == "paused").await?;
    // Excluded ones end at once, and keep their position.
    let document = json!({"link": "eu", "streams": ["ORDERS_*", "EVENTS"], "exclude_streams": ["*_TEST", "EVENTS"],
        "target_update": true, "target_stream": "X_{stream}"});
    request(&site.client, "replicator.config.update", document).await?;
    rows_are(&site, &["eu", "eu.ORDERS_EU"]).await?;
    assert_eq!(site.position("eu.EVENTS").await?.context("a position")?["source"]["seq"], 5);
    // Without the document there is nothing.
    request(&site.client, "replicator.config.delete", json!({"replication": "eu"})).await?;
    rows_are(&site, &[]).await?;
    assert_eq!((site.position("eu.ORDERS_EU").await?, site.position("eu").await?), (None, None));
    assert!(site.bucket("REPLICATOR_CONFIG").await?.get("eu/streams").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn streams_appear_go_and_return() -> Result<()> {
    let site = Site::start().await?;
    site.filled("ORDERS_A", 5).await?;
    add(&site, json!({})).await?;
    site.settled("eu.ORDERS_A", 5).await?;
    let mut events = site.listen().await?;
    site.filled("EVENTS", 3).await?;
    rows_are(&site, &["eu", "eu.EVENTS", "eu.ORDERS_A"]).await?;
    let event = events.wait("stream-appeared", "eu.EVENTS").await?;
    assert_eq!(event["stream"], "EVENTS");
    site.settled("eu.EVENTS", 3).await?;
    // One goes.
    site.source().await?.api("STREAM.DELETE.ORDERS_A", Value::Null).await?;
    let row = gone(&site, "eu.ORDERS_A").await?;
    assert!(row["last_error"]["message"].as_str().is_some_and(|text| text.contains("`ORDERS_A`")), "{row}");
    assert!(row["do"].as_str().is_some_and(|text| text.contains("returns")), "{row}");
    assert_eq!(row["position"]["source_seq"], 5, "{row}");
    assert_eq!(events.wait("stream-gone", "eu.ORDERS_A").await?["position"], 5);
    assert_eq!(site.position("eu.ORDERS_A").await?.context("a position")?["source"]["seq"], 5);
    // It returns as another stream, and is copied.
    site.filled("ORDERS_A", 7).await?;
    let returned = async || site.row("eu.ORDERS_A").await.is_some_and(|row| row["state"] == "running");
    wait_for("the stream to return", NEXT_LIST, returned).await.with_context(|| site.service.log())?;
    site.settled("eu.ORDERS_A", 7).await?;
    site.copied("ORDERS_A", 12).await?;
    // It goes for good, and its replication is deleted.
    site.source().await?.api("STREAM.DELETE.ORDERS_A", Value::Null).await?;
    gone(&site, "eu.ORDERS_A").await?;
    request(&site.client, "replicator.config.delete", json!({"replication": "eu.ORDERS_A"})).await?;
    rows_are(&site, &["eu", "eu.EVENTS"]).await?;
    assert_eq!(site.position("eu.ORDERS_A").await?, None);
    assert_eq!(site.at_target("ORDERS_A").await?, 12);
    Ok(())
}

#[tokio::test]
async fn an_unreachable_source_and_garbage_keep_the_rows() -> Result<()> {
    let mut site = Site::start().await?;
    for stream in ["ORDERS_A", "EVENTS"] {
        site.filled(stream, 5).await?;
    }
    add(&site, json!({})).await?;
    let all = ["eu", "eu.EVENTS", "eu.ORDERS_A"];
    rows_are(&site, &all).await?;
    site.settled("eu.EVENTS", 5).await?;
    site.settled("eu.ORDERS_A", 5).await?;
    site.source.kill()?;
    site.row_when("eu", "says so", |row| row["state"] == "retrying").await?;
    // Another start does not need the source to know them.
    site.service.kill()?;
    site.service.restart().await?;
    rows_are(&site, &all).await?;
    site.source.restart().await?;
    site.publish("EVENTS", 1..=5).await?;
    site.settled("eu.EVENTS", 10).await?;
    // Neither does a document that cannot be read.
    site.put("eu", "{").await?;
    let told = |row: &Value| row["last_error"]["kind"] == "invalid" && row["last_error"]["current"] == true;
    site.row_when("eu", "says what is wrong", told).await?;
    site.publish("EVENTS", 1..=5).await?;
    site.copied("EVENTS", 15).await?;
    site.service.kill()?;
    site.service.restart().await?;
    rows_are(&site, &all).await?;
    site.publish("EVENTS", 1..=5).await?;
    site.copied("EVENTS", 20).await?;
    // Nor one whose link was deleted by hand.
    let document = json!({"link": "eu", "streams": ["ORDERS_*", "EVENTS"], "target_update": true});
    site.put("eu", document.to_string()).await?;
    site.bucket("REPLICATOR_CONFIG").await?.delete("links/eu").await?;
    site.row_when("eu.EVENTS", "says what is wrong", told).await?;
    site.publish("EVENTS", 1..=5).await?;
    site.copied("EVENTS", 25).await?;
    rows_are(&site, &all).await
}

#[tokio::test]
async fn another_instance_takes_over_with_the_same_rows() -> Result<()> {
    let mut site = Site::builder().args(["--instance", "one", "--lease-ttl", "3s"]).start().await?;
    for stream in ["ORDERS_A", "ORDERS_B", "EVENTS"] {
        site.filled(stream, 5).await?;
    }
    add(&site, json!({})).await?;
    let all = ["eu", "eu.EVENTS", "eu.ORDERS_A", "eu.ORDERS_B"];
    rows_are(&site, &all).await?;
    for stream in ["ORDERS_A", "ORDERS_B", "EVENTS"] {
        site.settled(&format!("eu.{stream}"), 5).await?;
    }
    let other = Service::builder(&site.service_url(), SITE).instance("two").args(["--lease-ttl", "3s"]).start().await?;
    site.service.kill()?;
    for stream in ["ORDERS_A", "ORDERS_B", "EVENTS"] {
        site.publish(stream, 1..=5).await?;
        let id = format!("eu.{stream}");
        let row = site.settled(&id, 10).await.with_context(|| other.log())?;
        assert_eq!((&row["leader"], &row["counters"]["copied"]), (&json!("two"), &json!(5)), "{row}");
        site.verify(stream, &Expect::copy_of(stream)).await?;
    }
    assert_eq!(ids(&site).await, all);
    site.filled("ORDERS_C", 2).await?;
    rows_are(&site, &["eu", "eu.EVENTS", "eu.ORDERS_A", "eu.ORDERS_B", "eu.ORDERS_C"]).await?;
    site.settled("eu.ORDERS_C", 2).await.map(drop)
}

#[tokio::test]
async fn in_one_account_copies_and_buckets_do_not_match() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    site.filled("ORDERS_A", 5).await?;
    let url = site.source.url();
    let document = json!({"id": "all", "streams": ["*"], "target_stream": "COPY_{stream}", "source_url": url, "target_url": url,
        "target_subject_prefix": "copy"});
    request(&site.client, "replicator.config.add", document).await?;
    rows_are(&site, &["all", "all.ORDERS_A"]).await?;
    site.settled("all.ORDERS_A", 5).await?;
    // The next list has the copy.
    site.source_stream("LATER", json!({})).await?;
    rows_are(&site, &["all", "all.LATER", "all.ORDERS_A"]).await
}

#[tokio::test]
async fn wrong_patterns_are_refused_with_their_path() -> Result<()> {
    let site = Site::small().await?;
    let check = async |more: Value, path: &str, text: &str| -> Result<()> {
        let (source_url, target_url) = (site.source.url(), site.target.url());
        let document = merged(json!({"source_url": source_url, "target_url": target_url}), more);
        let reply = site.send("config.add", document).await?;
        let problems = reply.body["error"]["problems"].as_array().cloned().unwrap_or_default();
        let found = problems.iter().find(|problem| problem["path"] == path);
        assert!(found.is_some_and(|one| one["message"].as_str().is_some_and(|m| m.contains(text))), "{reply:?}");
        Ok(())
    };
    check(json!({"streams": ["A"]}), "/id", "`id` is required with `streams`").await?;
    check(json!({"id": "x", "streams": ["A.B"]}), "/streams/0", "`A.B`").await?;
    check(json!({"id": "x", "streams": ["A"], "exclude_streams": ["b c"]}), "/exclude_streams/0", "`b c`").await?;
    check(json!({"id": "x", "streams": ["A"], "stream": "A"}), "/streams", "remove one").await?;
    check(json!({"stream": "A", "exclude_streams": ["A"]}), "/exclude_streams", "`streams`").await?;
    check(json!({"id": "x", "streams": []}), "/streams", "no entry").await?;
    check(json!({}), "/stream", "`stream` is required").await
}

/// How long it takes until so many replications of one document run, and what they cost while nothing happens.
#[tokio::test]
#[ignore = "a thousand streams take minutes: make check-long"]
async fn a_thousand_replications_of_one_document() -> Result<()> {
    const COUNT: usize = 1_000;
    let source = Server::start(Role::Source).await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let mut raw = site.source().await?;
    for number in 0..COUNT {
        let name = format!("S{number:04}");
        let config = json!({"subjects": [format!("s{number:04}.>")], "storage": "memory"});
        raw.create_stream(&name, config).await?;
    }
    let link = json!({"name": "eu", "source_url": site.source.url(), "target_url": site.target.url()});
    request(&site.client, "replicator.link.add", link).await?;
    let begun = Instant::now();
    request(&site.client, "replicator.config.add", json!({"link": "eu", "streams": ["S*"]})).await?;
    let running = async || {
        let info = request(&site.client, "$SRV.STATS.replicator", Value::Null).await.unwrap_or_default();
        let endpoints = info["endpoints"].as_array().cloned().unwrap_or_default();
        let status = endpoints.iter().find(|endpoint| endpoint["name"] == "status").cloned().unwrap_or_default();
        status["data"]["replications"]["running"] == COUNT + 1
    };
    wait_for("all to run", Duration::from_secs(300), running).await.with_context(|| site.service.log())?;
    let added = begun.elapsed();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let before = site.service.usage();
    let window = Duration::from_secs(30);
    tokio::time::sleep(window).await;
    let after = site.service.usage();
    let cpu = (after.cpu_seconds - before.cpu_seconds) / window.as_secs_f64();
    let asked = Instant::now();
    let reply = request(&site.client, "replicator.status", Value::Null).await?;
    let answered = asked.elapsed();
    println!(
        "{COUNT} replications: running after {added:.1?}, idle {:.1} % of a core, {} MiB resident, status of {} rows in {answered:.0?}",
        cpu * 100.0,
        after.rss >> 20,
        reply["replications"].as_array().map_or(0, Vec::len),
    );
    for number in [0, COUNT / 2, COUNT - 1] {
        let stream = format!("S{number:04}");
        raw.publish(&crate::harness::Outgoing::new(format!("s{number:04}.x"), "hello")).await?;
        let mut target = site.target().await?;
        crate::harness::raw::wait_messages(&mut target, &stream, 1, LIMIT).await?;
        compare_streams(&mut raw, &mut target, &stream, &Expect::copy_of(&stream)).await?.verify()?;
    }
    let deleted = Instant::now();
    let reply = site.send("config.delete", json!({"replication": "eu"})).await?;
    println!("deletion answered after {:.1?} with {:?}", deleted.elapsed(), reply.error);
    wait_for("the rows to go", LIMIT, async || status(&site.client, "eu").await.is_none()).await
}
