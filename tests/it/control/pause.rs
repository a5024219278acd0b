//! `pause` and `resume`: nothing is copied while the mark is there, whatever happens meanwhile.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::client::{Reply, refused};
use crate::harness::{Expect, Outgoing, PROMPT, Raw, SITE, Server, Service, Site, timed, wait_for};

#[track_caller]
fn changed(reply: &Reply, id: &str) -> u64 {
    assert_eq!((reply.error, &reply.body["replication"]), (None, &json!(id)), "{reply:?}");
    reply.body["revision"].as_u64().expect("a revision")
}

/// Time in which a copy that should not run would have shown itself: it polls every few milliseconds.
async fn copies_nothing(site: &Site, stream: &str, messages: u64) -> Result<()> {
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(site.at_target(stream).await?, messages, "something was copied during a pause");
    Ok(())
}

fn is_paused(row: &Value) -> bool {
    row["state"] == "paused"
}

#[tokio::test]
async fn a_paused_replication_stops_and_goes_on_where_it_was() -> Result<()> {
    let site = Site::small().await?;
    let mut events = site.listen().await?;
    site.replicate("ORDERS", 100).await?;
    site.settled("ORDERS", 100).await?;
    let revision = changed(&site.ask("pause", "ORDERS").await?, "ORDERS");
    let row = site.row("ORDERS").await.context("a row")?;
    assert_eq!(
        (&row["state"], &row["leader"], &row["position"]["source_seq"]),
        (&json!("paused"), &Value::Null, &json!(100))
    );
    assert_eq!(site.position("ORDERS").await?.context("a record")?["source"]["seq"], 100);
    assert_eq!(events.wait("paused", "ORDERS").await?["position"], 100);
    let mark = site.bucket("REPLICATOR_CONFIG").await?.get("ORDERS/paused").await?.context("a mark")?;
    let mark: Value = serde_json::from_slice(&mark)?;
    assert!(mark["version"] == 1 && mark["at"].is_string() && mark["instance"].is_string(), "{mark}");

    site.publish("ORDERS", 1..=50).await?;
    copies_nothing(&site, "ORDERS", 100).await?;
    assert_eq!(changed(&site.ask("pause", "ORDERS").await?, "ORDERS"), revision, "paused again, nothing is written");

    let removed = changed(&site.send("resume", json!({"replication": "ORDERS"})).await?, "ORDERS");
    assert!(removed > revision);
    assert_eq!(events.wait("resumed", "ORDERS").await?["position"], 100);
    site.settled("ORDERS", 150).await?;
    assert_eq!(changed(&site.ask("resume", "ORDERS").await?, "ORDERS"), removed, "resumed again, nothing is written");
    assert_eq!((events.told("paused").len(), events.told("resumed").len()), (1, 1));
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn a_pause_in_the_middle_of_a_stream_loses_and_doubles_nothing() -> Result<()> {
    for pipelined in [false, true] {
        let site = Site::small().await?;
        site.source_stream("ORDERS", json!({})).await?;
        if pipelined {
            site.target_stream("ORDERS", json!({})).await?;
        }
        site.add("ORDERS", json!({})).await?;
        let url = site.source.url();
        let publisher = tokio::spawn(async move {
            let mut raw = Raw::connect(&url).await?;
            raw.publish_all((0..40_000).map(|i| Outgoing::new("orders.x", format!("{i}")))).await
        });
        for _ in 0..5 {
            let (reply, took) = timed(site.ask("pause", "ORDERS")).await?;
            changed(&reply, "ORDERS");
            assert!(took < Duration::from_secs(3), "{took:?}");
            let row = site.row_when("ORDERS", "is paused", is_paused).await?;
            let there = site.at_target("ORDERS").await?;
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(site.at_target("ORDERS").await?, there, "something was copied during a pause");
            assert_eq!(row["position"]["source_seq"], there, "messages in flight have settled");
            changed(&site.ask("resume", "ORDERS").await?, "ORDERS");
        }
        publisher.await??;
        site.settled("ORDERS", 40_000).await?;
        site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pause_survives_kills_and_restarts() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    site.ask("pause", "ORDERS").await?;
    site.publish("ORDERS", 1..=10).await?;
    let events = site.listen().await?;
    for _ in 0..3 {
        site.service.kill()?;
        site.service.restart().await?;
        let row = site.row_when("ORDERS", "is paused", is_paused).await?;
        assert_eq!(row["position"]["source_seq"], 10, "{row}");
        copies_nothing(&site, "ORDERS", 10).await?;
    }
    site.stop().await?;
    site.service.restart().await?;
    site.row_when("ORDERS", "is paused", is_paused).await?;
    copies_nothing(&site, "ORDERS", 10).await?;
    events.quiet(&["paused", "resumed", "started", "leader"])?;
    site.ask("resume", "ORDERS").await?;
    site.settled("ORDERS", 20).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn a_pause_that_was_put_while_nothing_ran_counts_at_once() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    let mut events = site.listen().await?;
    for round in 1..=3 {
        site.service.kill()?;
        site.publish("ORDERS", 1..=10).await?;
        site.put("ORDERS/paused", "by hand, no JSON").await?;
        // Written after the document and after the mark, so that the order in the bucket proves nothing.
        site.put("ORDERS", site.document_with("ORDERS", json!({"description": round.to_string()})).to_string()).await?;
        site.service.restart().await?;
        site.row_when("ORDERS", "is paused", is_paused).await?;
        copies_nothing(&site, "ORDERS", round * 10).await?;
        // Messages copied between the last save and the kill are detected when it continues.
        assert!(events.wait("paused", "ORDERS").await?["position"].as_u64() <= Some(round * 10));
        site.bucket("REPLICATOR_CONFIG").await?.delete("ORDERS/paused").await?;
        site.settled("ORDERS", (round + 1) * 10).await?;
    }
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn a_mark_by_hand_pauses_and_resumes_within_a_second() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    for value in ["", "garbage", "{\"version\":99}"] {
        bucket.put("ORDERS/paused", value.into()).await?;
        wait_for("the pause", PROMPT, async || site.row("ORDERS").await.is_some_and(|row| is_paused(&row))).await?;
        bucket.purge("ORDERS/paused").await?;
        let goes_on = async || site.row("ORDERS").await.is_some_and(|row| row["state"] == "running");
        wait_for("the end of the pause", PROMPT, goes_on).await?;
    }
    // Marks are no documents, and what looks like one and is none is an invalid document.
    bucket.put("ORDERS/paused", "x".into()).await?;
    bucket.put("ORDERS/pause", "x".into()).await?;
    site.row_when("ORDERS/pause", "is invalid", |row| row["state"] == "invalid").await?;
    let list = site.ask("config.list", "").await?.body;
    let ids: Vec<_> =
        list["replications"].as_array().context("a list")?.iter().map(|row| &row["replication"]).collect();
    assert_eq!(ids, ["ORDERS", "ORDERS/pause"]);
    refused(&site.ask("config.get", "ORDERS/paused").await?, 404, "does not exist");
    refused(&site.ask("config.delete", "ORDERS/paused").await?, 404, "does not exist");
    assert!(bucket.get("ORDERS/paused").await?.is_some());
    Ok(())
}

#[tokio::test]
async fn a_flood_of_marks_ends_as_the_last_one_says() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    for i in 0..250 {
        bucket.put("ORDERS/paused", i.to_string().into()).await?;
        bucket.delete("ORDERS/paused").await?;
    }
    site.publish("ORDERS", 1..=10).await?;
    site.settled("ORDERS", 20).await?;
    for i in 0..250 {
        bucket.delete("ORDERS/paused").await?;
        bucket.put("ORDERS/paused", i.to_string().into()).await?;
    }
    site.row_when("ORDERS", "is paused", is_paused).await?;
    site.publish("ORDERS", 1..=10).await?;
    copies_nothing(&site, "ORDERS", 20).await?;
    site.ask("resume", "ORDERS").await?;
    site.settled("ORDERS", 30).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn a_changed_or_broken_document_does_not_end_a_pause() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    site.ask("pause", "ORDERS").await?;
    site.publish("ORDERS", 1..=10).await?;
    let mut events = site.listen().await?;
    let revision =
        site.send("config.update", site.document_with("ORDERS", json!({"max_age": "1d"}))).await?.body["revision"]
            .clone();
    let row = site.row_when("ORDERS", "knows the document", |row| row["config_revision"] == revision).await?;
    assert_eq!(row["state"], "paused");
    assert_eq!(events.wait("config-changed", "ORDERS").await?["revision"], revision);
    site.put("ORDERS", "garbage").await?;
    events.wait("config-rejected", "ORDERS").await?;
    let row = site.row_when("ORDERS", "tells what is wrong", |row| row["last_error"]["kind"] == "invalid").await?;
    assert_eq!(row["state"], "paused");
    copies_nothing(&site, "ORDERS", 10).await?;
    // Resumed, the newest document that can run runs.
    site.ask("resume", "ORDERS").await?;
    let row = site.settled("ORDERS", 20).await?;
    assert_eq!(row["config_revision"], revision);
    Ok(())
}

#[tokio::test]
async fn what_is_held_retrying_or_invalid_can_be_paused() -> Result<()> {
    let mut site = Site::start().await?;
    site.send("config.add", site.document("HELD")).await?;
    site.row_when("HELD", "is held", |row| row["state"] == "held").await?;
    site.put("INVALID", "garbage").await?;
    site.row_when("INVALID", "is invalid", |row| row["state"] == "invalid").await?;
    site.replicate("ORDERS", 10).await?;
    site.target.kill()?;
    site.publish("ORDERS", 1..=10).await?;
    site.row_when("ORDERS", "is retrying", |row| row["state"] == "retrying").await?;
    for id in ["HELD", "INVALID", "ORDERS"] {
        let (reply, took) = timed(site.ask("pause", id)).await?;
        changed(&reply, id);
        assert!(took < Duration::from_secs(3), "{id}: {took:?}");
        site.row_when(id, "is paused", is_paused).await?;
    }
    site.target.restart().await?;
    copies_nothing(&site, "ORDERS", 10).await?;
    for id in ["HELD", "INVALID", "ORDERS"] {
        site.ask("resume", id).await?;
    }
    site.settled("ORDERS", 20).await?;
    site.row_when("HELD", "is held", |row| row["state"] == "held").await?;
    site.row_when("INVALID", "is invalid", |row| row["state"] == "invalid").await?;
    Ok(())
}

#[tokio::test]
async fn a_frozen_target_does_not_hold_up_the_answer_to_a_pause() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    site.target.freeze()?;
    site.publish("ORDERS", 1..=10).await?;
    site.row_when("ORDERS", "has ten messages in flight", |row| row["in_flight"]["messages"] == 10).await?;
    let (reply, took) = timed(site.ask("pause", "ORDERS")).await?;
    refused(&reply, 504, "has not stopped yet");
    assert!(took < Duration::from_secs(3), "{took:?}");
    site.row_when("ORDERS", "is paused", is_paused).await?;
    changed(&site.ask("pause", "ORDERS").await?, "ORDERS");
    site.target.thaw()?;
    site.ask("resume", "ORDERS").await?;
    site.settled("ORDERS", 20).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn deleting_a_paused_replication_removes_the_pause() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    site.ask("pause", "ORDERS").await?;
    changed(&site.send("config.delete", json!({"replication": "ORDERS", "keep": true})).await?, "ORDERS");
    assert!(bucket.get("ORDERS/paused").await?.is_some());
    site.publish("ORDERS", 1..=10).await?;
    site.send("config.add", site.document("ORDERS")).await?;
    site.row_when("ORDERS", "is paused", is_paused).await?;
    copies_nothing(&site, "ORDERS", 10).await?;

    bucket.delete("ORDERS").await?;
    wait_for("the end of it", PROMPT, async || site.row("ORDERS").await.is_none()).await?;
    assert!(bucket.get("ORDERS/paused").await?.is_some(), "a deletion by hand keeps the pause");
    site.send("config.add", site.document("ORDERS")).await?;
    site.row_when("ORDERS", "is paused", is_paused).await?;

    changed(&site.ask("config.delete", "ORDERS").await?, "ORDERS");
    assert_eq!((bucket.get("ORDERS/paused").await?, site.position("ORDERS").await?), (None, None));
    site.send("config.add", site.document("ORDERS")).await?;
    site.copied("ORDERS", 20).await
}

#[tokio::test]
async fn an_instance_that_is_asked_pauses_what_another_one_runs() -> Result<()> {
    let control = Server::start(crate::harness::Role::Control).await?;
    let (source, target) =
        (Server::start(crate::harness::Role::Source).await?, Server::start(crate::harness::Role::Target).await?);
    let client = crate::harness::connect(&control.url()).await?;
    let mut one = Service::builder(&control.url(), SITE).instance("one").start().await?;
    let document = json!({"stream": "ORDERS", "source_url": source.url(), "target_url": target.url()});
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    crate::harness::request(&client, "replicator.config.add", document).await?;
    let _two = Service::builder(&control.url(), SITE).instance("two").start().await?;
    let ask = async |subject: &str| crate::harness::request(&client, subject, json!({"replication": "ORDERS"})).await;
    let row = async || anyhow::Ok(ask("replicator.status").await?["replications"][0].clone());
    let led_by = async |leader: Value, state: &str| {
        // Every instance answers: all of them have to agree.
        let mut agreed = 0;
        wait_for("all to agree", crate::harness::LIMIT, async || {
            let agrees = row().await.is_ok_and(|row| row["leader"] == leader && row["state"] == state);
            agreed = if agrees { agreed + 1 } else { 0 };
            agreed > 20
        })
        .await
    };
    led_by(json!("one"), "running").await?;
    raw.publish_all((0..100).map(|i| Outgoing::new("orders.x", i.to_string()))).await?;
    wait_for("the position", PROMPT, async || row().await.is_ok_and(|row| row["position"]["source_seq"] == 100))
        .await?;
    for _ in 0..6 {
        // Either instance takes the request.
        ask("replicator.pause").await?;
        led_by(Value::Null, "paused").await?;
        ask("replicator.resume").await?;
        led_by(json!("one"), "running").await?;
    }
    // A pause outlives who led before it.
    ask("replicator.pause").await?;
    one.stop().await?;
    led_by(Value::Null, "paused").await?;
    ask("replicator.resume").await?;
    led_by(json!("two"), "running").await
}

#[tokio::test]
async fn any_instance_deletes_the_replication_of_another_one() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    site.filled("ORDERS", 100).await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", 100).await?;
    let _two = Service::builder(&site.control().url(), SITE).instance("two").start().await?;
    let both = async || {
        let reply = crate::harness::request(&site.client, "replicator.instances", Value::Null).await;
        reply.is_ok_and(|reply| reply["total"] == 2)
    };
    wait_for("both to be there", crate::harness::LIMIT, both).await?;
    for _ in 0..6 {
        // Either instance takes the request.
        assert_eq!(site.ask("config.delete", "ORDERS").await?.error, None);
        assert_eq!(site.position("ORDERS").await?, None);
        site.add("ORDERS", json!({})).await?;
        let runs = async || {
            let record = site.position("ORDERS").await.ok().flatten().unwrap_or_default();
            record["status"]["state"] == "running"
        };
        wait_for("one of them to run it", crate::harness::LIMIT, runs).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_or_comes_late_is_not_paused() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    for endpoint in ["pause", "resume"] {
        refused(&site.ask(endpoint, "NONE").await?, 404, "`NONE` does not exist");
        refused(&site.ask(endpoint, "").await?, 400, "send its id");
        refused(&site.ask(endpoint, "a b").await?, 400, "neither");
        let reply = site.ask_with(endpoint, ("Replicator-Deadline", "1000"), "ORDERS").await?;
        assert_eq!(reply.code.as_deref(), Some("408"), "{reply:?}");
    }
    assert_eq!(site.bucket("REPLICATOR_CONFIG").await?.get("ORDERS/paused").await?, None);
    assert_eq!(site.row("ORDERS").await.context("a row")?["state"], "running");
    Ok(())
}
