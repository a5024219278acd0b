//! `retry` and `skip`: how people release a replication that is held.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::client::refused;
use crate::harness::site::merged;
use crate::harness::{Expect, LIMIT, Outgoing, Role, SITE, Server, Site, wait_for};

fn is_held(row: &Value) -> bool {
    row["state"] == "held"
}

/// 20 messages, of which these are large.
async fn publish(site: &Site, large: &[u64]) -> Result<()> {
    let payload = |i| if large.contains(&i) { "x".repeat(3_000) } else { i.to_string() };
    let messages = (1..=20).map(|i| Outgoing::new(format!("orders.{i}"), payload(i)));
    site.source().await?.publish_all(messages).await?;
    Ok(())
}

/// A replication that messages 10 and 15 hold; the target takes no message of their size.
async fn poisoned(target: Value) -> Result<Site> {
    let site = Site::small().await?;
    site.source_stream("ORDERS", json!({})).await?;
    publish(&site, &[10, 15]).await?;
    site.target_stream("ORDERS", merged(json!({"max_msg_size": 1_000}), target)).await?;
    site.add("ORDERS", json!({})).await?;
    Ok(site)
}

async fn held_by(site: &Site, seq: u64) -> Result<Value> {
    let held = |row: &Value| is_held(row) && row["last_error"]["source_seq"] == seq;
    site.row_when("ORDERS", &format!("is held by {seq}"), held).await
}

async fn mark_is_gone(site: &Site) -> Result<()> {
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    let gone = async || bucket.get("ORDERS/release").await.is_ok_and(|mark| mark.is_none());
    wait_for("the release to be removed", LIMIT, gone).await
}

/// Both transports.
fn targets() -> [Value; 2] {
    [json!({}), json!({"allow_batched": true})]
}

#[tokio::test]
async fn a_poison_message_is_named_and_skipped_on_request() -> Result<()> {
    for target in targets() {
        let site = poisoned(target).await?;
        let row = held_by(&site, 10).await?;
        assert_eq!((&row["last_error"]["kind"], &row["position"]["source_seq"]), (&json!("hold"), &json!(9)), "{row}");
        let told = site.events.ever("poison").await?;
        assert_eq!((&told["source_seq"], &told["action"]), (&json!(10), &json!("held")), "{told}");
        assert_eq!(told["message"], row["last_error"]["message"]);
        refused(
            &site.send("skip", json!({"replication": "ORDERS", "source_seq": 15})).await?,
            409,
            "by source message 10, not 15",
        );

        let begun = Instant::now();
        let reply = site.send("skip", json!({"replication": "ORDERS", "source_seq": 10})).await?;
        assert_eq!((reply.error, &reply.body["source_seq"]), (None, &json!(10)), "{reply:?}");
        held_by(&site, 15).await?;
        assert!(begun.elapsed() < Duration::from_secs(8), "it waited for the next try by itself");
        let reply = site.ask("skip", "ORDERS").await?;
        assert_eq!((reply.error, &reply.body["source_seq"]), (None, &json!(15)), "{reply:?}");
        let row = site.settled("ORDERS", 20).await?;
        assert_eq!(row["counters"]["skipped_refused"], 2, "{row}");
        mark_is_gone(&site).await?;
        let told = site.events.all("poison", 4).await?;
        let told: Vec<_> = told.iter().map(|event| json!([event["source_seq"], event["action"]])).collect();
        assert_eq!(told, [json!([10, "held"]), json!([10, "skipped"]), json!([15, "held"]), json!([15, "skipped"])]);
        refused(&site.ask("skip", "ORDERS").await?, 409, "is not held: it is running");
        let expect = Expect::copy_of("ORDERS").site(SITE).only(|m| m.seq != 10 && m.seq != 15).late_allowed();
        site.verify("ORDERS", &expect).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_refusal_of_the_last_message_names_it_too() -> Result<()> {
    for target in targets() {
        let site = Site::small().await?;
        site.source_stream("ORDERS", json!({})).await?;
        publish(&site, &[20]).await?;
        site.target_stream("ORDERS", merged(json!({"max_msg_size": 1_000}), target)).await?;
        site.add("ORDERS", json!({})).await?;
        held_by(&site, 20).await?;
        assert_eq!(site.at_target("ORDERS").await?, 19);
        assert_eq!(site.ask("skip", "ORDERS").await?.error, None);
        site.settled("ORDERS", 20).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_is_full_per_subject_is_a_message_that_can_be_left_out() -> Result<()> {
    for target in targets() {
        let site = Site::small().await?;
        site.source_stream("ORDERS", json!({})).await?;
        let full = json!({"max_msgs_per_subject": 2, "discard": "new", "discard_new_per_subject": true});
        site.target_stream("ORDERS", merged(full, target)).await?;
        let subjects = ["a", "b", "a", "a", "b", "c"].map(|name| Outgoing::new(format!("orders.{name}"), "x"));
        site.source().await?.publish_all(subjects).await?;
        site.add("ORDERS", json!({})).await?;
        // Only the server knew before it was sent, so the message is read at the source.
        let error = held_by(&site, 4).await?["last_error"].clone();
        assert_eq!((&error["source_subject"], &error["source_bytes"]), (&json!("orders.a"), &json!(9)), "{error}");
        let reply = site.ask("skip", "ORDERS").await?;
        assert_eq!((reply.error, &reply.body["subject"]), (None, &json!("orders.a")), "{reply:?}");
        site.settled("ORDERS", 6).await?;
        site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE).only(|m| m.seq != 4).late_allowed()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn messages_beyond_max_payload_are_found_before_sending() -> Result<()> {
    let target = Server::builder(Role::Target).config("max_payload: 2048").start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).control_at_source().start().await?;
    site.source_stream("ORDERS", json!({})).await?;
    publish(&site, &[10, 11]).await?;
    site.add("ORDERS", json!({})).await?;
    for seq in [10, 11] {
        held_by(&site, seq).await?;
        assert_eq!(site.ask("skip", "ORDERS").await?.error, None);
    }
    site.settled("ORDERS", 20).await?;
    let told = site.events.all("poison", 4).await?;
    let told: Vec<_> = told.iter().map(|event| (event["source_seq"].clone(), event["action"].clone())).collect();
    let expect = [(10, "held"), (10, "skipped"), (11, "held"), (11, "skipped")];
    for (seq, action) in expect {
        assert!(told.contains(&(json!(seq), json!(action))), "{seq} {action} is not in {told:?}");
    }
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE).only(|m| m.seq != 10 && m.seq != 11)).await
}

#[tokio::test]
async fn a_skip_outlives_a_kill() -> Result<()> {
    for target in targets() {
        let mut site = poisoned(target).await?;
        for seq in [10, 15] {
            held_by(&site, seq).await?;
            site.ask("skip", "ORDERS").await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        site.settled("ORDERS", 20).await?;
        mark_is_gone(&site).await?;
        // Skipped for good, also where everything is read again.
        site.service.kill()?;
        site.service.restart().await?;
        site.settled("ORDERS", 20).await?;
        let expect = Expect::copy_of("ORDERS").site(SITE).only(|m| m.seq != 10 && m.seq != 15).late_allowed();
        site.verify("ORDERS", &expect).await?;
    }
    Ok(())
}

#[tokio::test]
async fn only_the_very_message_is_left_out() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 20).await?;
    // Message 10, but one that was stored at another time.
    let mark =
        json!({"version": 1, "action": "skip", "source_seq": 10, "source_time_ns": 1, "at": "2026-01-01T00:00:00Z"});
    site.put("ORDERS/release", mark.to_string()).await?;
    site.add("ORDERS", json!({})).await?;
    let row = site.settled("ORDERS", 20).await?;
    assert_eq!(row["counters"]["skipped_refused"], 0, "{row}");
    mark_is_gone(&site).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS").site(SITE)).await
}

#[tokio::test]
async fn retry_makes_a_held_replication_try_at_once() -> Result<()> {
    let site = Site::small().await?;
    site.send("config.add", site.document("ORDERS")).await?;
    site.row_when("ORDERS", "is held", is_held).await?;
    refused(
        &site.ask("skip", "ORDERS").await?,
        409,
        "not held by a message that can be skipped: source stream `ORDERS`",
    );
    site.filled("ORDERS", 10).await?;
    // A try by itself comes after 10 s only, and one may just have been made.
    let begun = Instant::now();
    let reply = site.ask("retry", "ORDERS").await?;
    assert_eq!((reply.error, &reply.body["replication"]), (None, &json!("ORDERS")), "{reply:?}");
    site.settled("ORDERS", 10).await?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    mark_is_gone(&site).await?;
    refused(&site.ask("retry", "ORDERS").await?, 409, "is not held or retrying: it is running");
    site.ask("pause", "ORDERS").await?;
    for endpoint in ["retry", "skip"] {
        refused(&site.ask(endpoint, "ORDERS").await?, 409, "it is paused; resume it");
        refused(&site.ask(endpoint, "NONE").await?, 404, "`NONE` does not exist");
        refused(&site.ask(endpoint, "").await?, 400, "send its id");
        let reply = site.ask_with(endpoint, ("Replicator-Deadline", "1000"), "ORDERS").await?;
        assert_eq!(reply.code.as_deref(), Some("408"), "{reply:?}");
    }
    Ok(())
}

#[tokio::test]
async fn any_value_by_hand_releases() -> Result<()> {
    let site = Site::small().await?;
    site.send("config.add", site.document("ORDERS")).await?;
    site.row_when("ORDERS", "is held", is_held).await?;
    site.filled("ORDERS", 10).await?;
    site.put("ORDERS/release", "garbage").await?;
    let begun = Instant::now();
    site.settled("ORDERS", 10).await?;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    mark_is_gone(&site).await?;
    site.row("ORDERS").await.context("a row").map(|_| ())
}

#[tokio::test]
async fn a_retry_that_cannot_begin_is_not_tried_without_end() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    site.ask("pause", "ORDERS").await?;
    let positions = site.bucket("REPLICATOR_POSITIONS").await?;
    positions.put("ORDERS", "no record".into()).await?;
    site.ask("resume", "ORDERS").await?;
    site.row_when("ORDERS", "is retrying", |row| row["state"] == "retrying").await?;
    let errors = async || {
        Ok::<_, anyhow::Error>(
            site.row("ORDERS").await.unwrap_or_default()["counters"]["errors"].as_u64().unwrap_or_default(),
        )
    };
    let before = errors().await?;
    assert_eq!(site.ask("retry", "ORDERS").await?.error, None);
    // One more at once, and then as the backoff has it.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(errors().await? < before + 30, "{before}, then {}", errors().await?);
    positions.delete("ORDERS").await?;
    site.settled("ORDERS", 10).await?;
    Ok(())
}
