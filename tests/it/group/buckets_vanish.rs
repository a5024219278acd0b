//! Buckets of the service that somebody deletes while it runs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Service, Site, site::merged, wait_for};

const BUCKETS: [&str; 4] = ["REPLICATOR_CONFIG", "REPLICATOR_POSITIONS", "REPLICATOR_LEASES", "REPLICATOR_STATE"];

/// A site with its own control server, one instance `one`, and the monitor.
async fn site() -> Result<Site> {
    Site::builder().args(["--instance", "one", "--monitor", "127.0.0.1:0"]).start().await
}

async fn another(site: &Site, instance: &str) -> Result<Service> {
    let service = Service::builder(&site.service_url(), "TEST").instance(instance);
    service.args(["--monitor", "127.0.0.1:0"]).start().await
}

async fn delete(site: &Site, bucket: &str) -> Result<()> {
    jetstream::new(site.client.clone()).delete_key_value(bucket).await?;
    Ok(())
}

/// When the stream of a bucket was created; `None` if there is none.
async fn created(site: &Site, bucket: &str) -> Option<String> {
    let mut raw = Raw::connect(&site.control().url()).await.ok()?;
    let info = raw.api(&format!("STREAM.INFO.KV_{bucket}"), Value::Null).await.ok()?;
    info["created"].as_str().map(str::to_owned)
}

/// Deletes a bucket and waits until it is there again.
async fn recreated(site: &Site, bucket: &str) -> Result<()> {
    let before = created(site, bucket).await.context("the bucket")?;
    delete(site, bucket).await?;
    let again = async || created(site, bucket).await.is_some_and(|now| now != before);
    wait_for(&format!("`{bucket}` to be there again"), LIMIT, again).await.with_context(|| site.service.log())
}

/// More messages arrive at the target.
async fn copies_on(site: &Site, stream: &str, from: u64) -> Result<()> {
    site.publish(stream, from + 1..=from + 10).await?;
    site.copied(stream, from + 10).await.with_context(|| site.service.log())?;
    site.settled(stream, from + 10).await?;
    Ok(())
}

/// Everything of the configuration that was there before is there now.
async fn key_is(site: &Site, bucket: &str, key: &str, what: impl Fn(&Value) -> bool) -> Result<()> {
    let there = async || {
        let Ok(bucket) = site.bucket(bucket).await else { return false };
        let Ok(Some(value)) = bucket.get(key).await else { return false };
        serde_json::from_slice(&value).is_ok_and(|value| what(&value))
    };
    wait_for(&format!("key `{key}` of `{bucket}`"), LIMIT, there).await.with_context(|| site.service.log())
}

#[tokio::test]
async fn each_bucket_is_recreated_with_what_was_in_it() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    site.replicate("RESTS", 10).await?;
    site.settled("RESTS", 10).await?;
    ensure!(site.ask("pause", "RESTS").await?.error.is_none());
    let mut last = 10;
    for (count, bucket) in (1..).zip(BUCKETS) {
        recreated(&site, bucket).await?;
        copies_on(&site, "ORDERS", last).await?;
        last += 10;
        let told = site.events.all("bucket-recreated", count).await?;
        assert_eq!(told.last().map(|event| &event["bucket"]), Some(&json!(bucket)));
        assert_eq!(site.row("RESTS").await.context("the row")?["state"], "paused", "{bucket}");
    }
    key_is(&site, "REPLICATOR_CONFIG", "ORDERS", |value| value["stream"] == "ORDERS").await?;
    key_is(&site, "REPLICATOR_CONFIG", "RESTS/paused", |_| true).await?;
    key_is(&site, "REPLICATOR_CONFIG", "site", |value| value["name"] == "TEST").await?;
    key_is(&site, "REPLICATOR_POSITIONS", "RESTS", |value| value["source"]["seq"] == 10).await?;
    key_is(&site, "REPLICATOR_POSITIONS", "ORDERS", |value| value["source"]["seq"] == last).await?;
    key_is(&site, "REPLICATOR_LEASES", "lease.ORDERS", |value| value["instance"] == "one").await?;
    key_is(&site, "REPLICATOR_LEASES", "session.one", |value| value["instance"] == "one").await?;
    let (code, page) = site.service.get("/metrics").await?;
    assert_eq!(code, 200);
    ensure!(page.contains(r#"choria_stream_replicator_buckets_recreated{replicator="TEST"} 4"#), "{page}");
    // The new ones are as good as the old ones: changes by request and by hand take effect.
    site.filled("LATER", 5).await?;
    site.add("LATER", json!({})).await?;
    site.copied("LATER", 5).await?;
    site.put("ORDERS", site.document_with("ORDERS", json!({"description": "by hand"})).to_string()).await?;
    ensure!(site.ask("config.delete", "LATER").await?.error.is_none());
    assert_eq!(site.position("LATER").await?, None);
    Ok(())
}

#[tokio::test]
async fn a_bucket_is_recreated_also_behind_a_restart() -> Result<()> {
    let mut site = site().await?;
    site.replicate("ORDERS", 10).await?;
    for bucket in BUCKETS {
        recreated(&site, bucket).await?;
    }
    copies_on(&site, "ORDERS", 10).await?;
    site.stop().await?;
    site.service.restart().await?;
    copies_on(&site, "ORDERS", 20).await?;
    assert_eq!(site.at_target("ORDERS").await?, 30);
    recreated(&site, "REPLICATOR_CONFIG").await?;
    copies_on(&site, "ORDERS", 30).await
}

#[tokio::test]
async fn two_instances_survive_the_loss_of_each_bucket() -> Result<()> {
    let site = site().await?;
    let two = another(&site, "two").await?;
    let ids = ["AA", "BB", "CC"];
    for id in ids {
        site.replicate(id, 10).await?;
    }
    for (round, bucket) in BUCKETS.into_iter().enumerate() {
        recreated(&site, bucket).await?;
        for id in ids {
            copies_on(&site, id, 10 + round as u64 * 10).await.with_context(|| two.log())?;
        }
        // One of them, and not both.
        site.events.all("bucket-recreated", round + 1).await?;
    }
    for id in ids {
        assert_eq!(site.at_target(id).await?, 50, "{id}");
        ensure!(site.events.kinds(id).iter().all(|kind| kind != "target-shared" && kind != "held"));
    }
    Ok(())
}

#[tokio::test]
async fn all_buckets_at_once_come_back() -> Result<()> {
    let site = site().await?;
    let two = another(&site, "two").await?;
    site.replicate("ORDERS", 10).await?;
    for bucket in BUCKETS {
        delete(&site, bucket).await?;
    }
    for bucket in BUCKETS {
        wait_for(bucket, LIMIT, async || created(&site, bucket).await.is_some()).await?;
    }
    copies_on(&site, "ORDERS", 10).await.with_context(|| two.log())?;
    for service in [&site.service, &two] {
        let ready = async || service.get("/readyz").await.is_ok_and(|(code, _)| code == 200);
        wait_for("it to be ready", LIMIT, ready).await?;
    }
    Ok(())
}

#[tokio::test]
async fn readyz_is_false_while_a_bucket_is_missing() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    for bucket in ["REPLICATOR_LEASES", "REPLICATOR_POSITIONS"] {
        let ready = async || site.service.get("/readyz").await.is_ok_and(|(code, _)| code == 200);
        wait_for("it to be ready", LIMIT, ready).await?;
        // Nothing can be created under this name, as long as another stream has the subjects.
        delete(&site, bucket).await?;
        let mut raw = Raw::connect(&site.control().url()).await?;
        let (name, subjects) = (format!("IN_THE_WAY_{bucket}"), format!("$KV.{bucket}.>"));
        raw.create_stream(&name, json!({"subjects": [subjects]})).await?;
        let told = async || {
            let answer = site.service.get("/readyz").await;
            answer
                .is_ok_and(|(code, why)| code == 503 && why.contains(bucket) && why.contains("cannot be created again"))
        };
        wait_for("it to be not ready", LIMIT, told).await.with_context(|| site.service.log())?;
        raw.api(&format!("STREAM.DELETE.{name}"), Value::Null).await?;
        wait_for("it to be ready again", LIMIT, ready).await?;
    }
    assert_eq!(site.service.log().matches("cannot be created again").count(), 2, "{}", site.service.log());
    copies_on(&site, "ORDERS", 10).await
}

#[tokio::test]
async fn what_is_missing_for_long_is_written_back() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    let bucket = "REPLICATOR_CONFIG";
    delete(&site, bucket).await?;
    // Nothing can be created under this name, as long as another stream has the subjects.
    let mut raw = Raw::connect(&site.control().url()).await?;
    raw.create_stream("IN_THE_WAY", json!({"subjects": [format!("$KV.{bucket}.>")]})).await?;
    // Until every watch has reported an error.
    for text in ["the configuration is not watched", "answering requests with the configuration read before"] {
        wait_for(text, LIMIT, async || site.service.log().contains(text)).await?;
    }
    copies_on(&site, "ORDERS", 10).await?;
    raw.api("STREAM.DELETE.IN_THE_WAY", Value::Null).await?;
    key_is(&site, bucket, "ORDERS", |value| value["stream"] == "ORDERS").await?;
    // A change by hand takes effect: the watch follows the new bucket.
    let put = site.put("ORDERS", site.document_with("ORDERS", json!({"max_age": "1d"})).to_string()).await?;
    site.row_when("ORDERS", "follows it", |row| row["config_revision"] == put).await?;
    copies_on(&site, "ORDERS", 20).await?;
    site.events.quiet(&["stopped"])
}

/// An instance that starts while a bucket is missing creates it at once, empty.
#[tokio::test]
async fn what_a_start_recreates_is_filled_by_those_who_run() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    site.replicate("RESTS", 10).await?;
    ensure!(site.ask("pause", "RESTS").await?.error.is_none());
    delete(&site, "REPLICATOR_CONFIG").await?;
    let two = another(&site, "two").await?;
    key_is(&site, "REPLICATOR_CONFIG", "ORDERS", |value| value["stream"] == "ORDERS").await?;
    key_is(&site, "REPLICATOR_CONFIG", "RESTS/paused", |_| true).await?;
    copies_on(&site, "ORDERS", 10).await.with_context(|| two.log())?;
    assert_eq!(site.row("RESTS").await.context("the row")?["state"], "paused");
    Ok(())
}

#[tokio::test]
async fn what_people_recreate_counts_as_it_is() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    site.replicate("LOST", 10).await?;
    delete(&site, "REPLICATOR_CONFIG").await?;
    let config = jetstream::kv::Config { bucket: "REPLICATOR_CONFIG".into(), history: 10, ..Default::default() };
    jetstream::new(site.client.clone()).create_key_value(config).await?;
    site.put("ORDERS", site.document("ORDERS").to_string()).await?;
    wait_for("what is not in it to stop", LIMIT, async || site.row("LOST").await.is_none()).await?;
    copies_on(&site, "ORDERS", 10).await?;
    site.events.quiet(&["bucket-recreated"])
}

#[tokio::test]
async fn senders_are_written_again_into_a_new_bucket() -> Result<()> {
    let mut site = site().await?;
    let mut source = site.source_stream("NODES", json!({})).await?;
    let node = |name: &str| Outgoing::new("nodes.a", format!(r#"{{"sender":"{name}"}}"#));
    source.publish_all(["n1", "n2", "n3"].map(node)).await?;
    site.add("NODES", json!({"inspect_field": "sender", "inspect_duration": "1h"})).await?;
    site.copied("NODES", 3).await?;
    for name in ["n1", "n2", "n3"] {
        key_is(&site, "REPLICATOR_STATE", &format!("NODES.{name}"), |value| value["copied"].is_string()).await?;
    }
    recreated(&site, "REPLICATOR_STATE").await?;
    for name in ["n1", "n2", "n3"] {
        key_is(&site, "REPLICATOR_STATE", &format!("NODES.{name}"), |value| value["copied"].is_string()).await?;
    }
    // No sender is new, not even after a restart.
    site.stop().await?;
    site.service.restart().await?;
    source.publish_all(["n1", "n2", "n3", "n4"].map(node)).await?;
    site.settled("NODES", 7).await?;
    assert_eq!(site.at_target("NODES").await?, 4);
    Ok(())
}

#[tokio::test]
async fn a_recreated_bucket_is_neither_copied_nor_written_to() -> Result<()> {
    let site = site().await?;
    let refused = async |document: Value, id: &str| {
        site.send("config.add", document).await?;
        let held = |row: &Value| {
            row["state"] == "held" && row["last_error"]["message"].to_string().contains("is a bucket of this service")
        };
        site.row_when(id, "is held", held).await?;
        anyhow::Ok(())
    };
    for bucket in BUCKETS {
        recreated(&site, bucket).await?;
    }
    let control = site.control().url();
    for bucket in BUCKETS {
        let stream = format!("KV_{bucket}");
        let source = json!({"stream": stream, "source_url": control, "target_url": site.target.url()});
        refused(source, &stream).await?;
    }
    site.filled("ORDERS", 3).await?;
    let into = json!({"target_url": control, "target_stream": "KV_REPLICATOR_STATE", "target_update": true});
    refused(merged(site.document("ORDERS"), into), "ORDERS").await
}

#[tokio::test]
async fn an_invalid_document_of_an_old_bucket_is_over_in_the_new() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    for i in 0..20 {
        site.put("OTHER", format!("garbage {i}")).await?;
    }
    site.put("ORDERS", "garbage").await?;
    let invalid = |row: &Value| row["last_error"]["kind"] == "invalid" && row["last_error"]["current"] == true;
    site.row_when("ORDERS", "reports the document", invalid).await?;
    delete(&site, "REPLICATOR_CONFIG").await?;
    let config = jetstream::kv::Config { bucket: "REPLICATOR_CONFIG".into(), history: 10, ..Default::default() };
    jetstream::new(site.client.clone()).create_key_value(config).await?;
    let put = site.put("ORDERS", site.document_with("ORDERS", json!({"max_age": "1d"})).to_string()).await?;
    let over = |row: &Value| row["config_revision"] == put && row["last_error"]["current"] == false;
    site.row_when("ORDERS", "has a valid document", over).await?;
    Ok(())
}

/// An instance that leads nothing while the bucket is gone takes over afterwards.
#[tokio::test]
async fn a_standby_takes_over_after_the_leases_were_lost() -> Result<()> {
    let mut site = Site::builder().args(["--instance", "one", "--lease-ttl", "3s"]).start().await?;
    site.replicate("ORDERS", 10).await?;
    let two = Service::builder(&site.service_url(), "TEST").instance("two").args(["--lease-ttl", "3s"]).start().await?;
    recreated(&site, "REPLICATOR_LEASES").await?;
    copies_on(&site, "ORDERS", 10).await?;
    site.service.kill()?;
    site.publish("ORDERS", 21..=30).await?;
    site.copied("ORDERS", 30).await.with_context(|| two.log())?;
    let long = Duration::from_secs(120);
    wait_for("the other to lead", long, async || site.row("ORDERS").await.is_some_and(|row| row["leader"] == "two"))
        .await
}

/// Nothing is copied that would save the position: it is compared now and then.
#[tokio::test]
async fn an_idle_position_is_written_over_an_older_one() -> Result<()> {
    let site = site().await?;
    site.replicate("ORDERS", 10).await?;
    let saved = async |seq: u64| {
        let is = async || site.position("ORDERS").await.is_ok_and(|p| p.is_some_and(|p| p["source"]["seq"] == seq));
        wait_for(&format!("position {seq} in the bucket"), 4 * LIMIT, is).await.with_context(|| site.service.log())
    };
    saved(10).await?;
    let bucket = site.bucket("REPLICATOR_POSITIONS").await?;
    let older = bucket.get("ORDERS").await?.context("a record")?;
    site.publish("ORDERS", 11..=20).await?;
    site.settled("ORDERS", 20).await?;
    saved(20).await?;
    // As somebody does who restores it.
    bucket.put("ORDERS", older).await?;
    saved(20).await?;
    let mut raw = Raw::connect(&site.control().url()).await?;
    raw.api("STREAM.PURGE.KV_REPLICATOR_POSITIONS", json!({})).await?;
    saved(20).await?;
    site.events.quiet(&["stalled", "target-reset", "source-reset"])
}

/// Neither who leads nor the standby has a lease or a session in the bucket any more.
#[tokio::test]
async fn purged_leases_come_back() -> Result<()> {
    let mut site = site().await?;
    let _two = another(&site, "two").await?;
    let ids = ["AA", "BB", "CC"];
    for id in ids {
        site.replicate(id, 10).await?;
    }
    let mut raw = Raw::connect(&site.control().url()).await?;
    raw.api("STREAM.PURGE.KV_REPLICATOR_LEASES", json!({})).await?;
    for id in ids {
        copies_on(&site, id, 10).await?;
    }
    site.service.kill()?;
    for id in ids {
        copies_on(&site, id, 20).await?;
        assert_eq!(site.at_target(id).await?, 30, "{id}");
    }
    Ok(())
}
