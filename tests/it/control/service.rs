//! The service as ADR-32 describes it.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::Site;
use crate::harness::client::{ask, request};

/// Name, subject, queue group.
const ENDPOINTS: [(&str, &str, &str); 46] = [
    ("config-add", "replicator.config.add", "q"),
    ("config-update", "replicator.config.update", "q"),
    ("config-delete", "replicator.config.delete", "q"),
    ("config-validate", "replicator.config.validate", "q"),
    ("config-get", "replicator.config.get", ""),
    ("config-list", "replicator.config.list", ""),
    ("config-schema", "replicator.config.schema", ""),
    ("status", "replicator.status", ""),
    ("report", "replicator.report", "q"),
    ("drift", "replicator.drift", "q"),
    ("instances", "replicator.instances", ""),
    ("senders", "replicator.senders", ""),
    ("pause", "replicator.pause", "q"),
    ("resume", "replicator.resume", "q"),
    ("position", "replicator.position", "q"),
    ("promote", "replicator.promote", "q"),
    ("stepdown", "replicator.stepdown", "q"),
    ("retry", "replicator.retry", "q"),
    ("skip", "replicator.skip", "q"),
    ("consumers-export", "replicator.consumers.export", "q"),
    ("consumers-import", "replicator.consumers.import", "q"),
    ("dlq-list", "replicator.dlq.list", "q"),
    ("dlq-show", "replicator.dlq.show", "q"),
    ("dlq-replay", "replicator.dlq.replay", "q"),
    ("dlq-drop", "replicator.dlq.drop", "q"),
    ("verify", "replicator.verify", "q"),
    ("verify-status", "replicator.verify.status", ""),
    ("verify-cancel", "replicator.verify.cancel", "q"),
    ("schema", "replicator.schema", ""),
    ("adapter-add", "replicator.adapter.add", "q"),
    ("adapter-update", "replicator.adapter.update", "q"),
    ("adapter-validate", "replicator.adapter.validate", "q"),
    ("adapter-get", "replicator.adapter.get", ""),
    ("adapter-list", "replicator.adapter.list", ""),
    ("adapter-delete", "replicator.adapter.delete", "q"),
    ("adapter-status", "replicator.adapter.status", ""),
    ("adapter-pause", "replicator.adapter.pause", "q"),
    ("adapter-resume", "replicator.adapter.resume", "q"),
    ("link-add", "replicator.link.add", "q"),
    ("link-update", "replicator.link.update", "q"),
    ("link-validate", "replicator.link.validate", "q"),
    ("link-get", "replicator.link.get", ""),
    ("link-list", "replicator.link.list", ""),
    ("link-delete", "replicator.link.delete", "q"),
    ("heartbeat-get", "replicator.heartbeat.get", ""),
    ("heartbeat-set", "replicator.heartbeat.set", "q"),
];

#[tokio::test]
async fn the_service_is_found_by_all_by_name_and_by_id() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let ping = request(&site.client, "$SRV.PING", Value::Null).await?;
    let id = ping["id"].as_str().context("an id")?;
    for (verb, kind) in [("PING", "ping"), ("INFO", "info"), ("STATS", "stats")] {
        for subject in
            [format!("$SRV.{verb}"), format!("$SRV.{verb}.replicator"), format!("$SRV.{verb}.replicator.{id}")]
        {
            let reply = request(&site.client, &subject, Value::Null).await?;
            assert_eq!(reply["type"], format!("io.nats.micro.v1.{kind}_response"), "{subject}");
            assert_eq!((&reply["name"], &reply["id"]), (&json!("replicator"), &json!(id)), "{subject}");
            assert_eq!(reply["version"], env!("CARGO_PKG_VERSION"), "{subject}");
            assert_eq!(reply["metadata"], json!({"site": "TEST", "instance": "one"}), "{subject}");
        }
    }
    for subject in ["$SRV.PING.other", "$SRV.PING.replicator.other"] {
        assert!(ask(&site.client, subject, b"").await.is_err(), "{subject} is answered");
    }
    Ok(())
}

#[tokio::test]
async fn info_and_stats_list_the_endpoints() -> Result<()> {
    let site = Site::small().await?;
    let expect: Vec<_> = ENDPOINTS.map(|(name, subject, group)| json!([name, subject, group])).into();
    for verb in ["INFO", "STATS"] {
        let reply = request(&site.client, &format!("$SRV.{verb}.replicator"), Value::Null).await?;
        let endpoints = reply["endpoints"].as_array().context("endpoints")?.iter();
        let endpoints: Vec<_> = endpoints.map(|e| json!([e["name"], e["subject"], e["queue_group"]])).collect();
        assert_eq!(endpoints, expect, "{verb}");
    }
    let info = request(&site.client, "$SRV.INFO", Value::Null).await?;
    assert!(info["description"].as_str().is_some_and(|text| !text.is_empty()));
    let stats = request(&site.client, "$SRV.STATS", Value::Null).await?;
    let started = stats["started"].as_str().context("started")?;
    assert!(chrono::DateTime::parse_from_rfc3339(started).is_ok(), "{started}");
    Ok(())
}

#[tokio::test]
async fn requests_and_errors_are_counted() -> Result<()> {
    let site = Site::small().await?;
    let stats = async |name: &str| {
        let stats = request(&site.client, "$SRV.STATS.replicator", Value::Null).await?;
        let endpoints = stats["endpoints"].as_array().context("endpoints")?;
        endpoints.iter().find(|endpoint| endpoint["name"] == name).cloned().context("the endpoint")
    };
    let before = stats("config-get").await?;
    assert_eq!(
        (&before["num_requests"], &before["num_errors"], &before["last_error"]),
        (&json!(0), &json!(0), &json!(""))
    );
    site.send("config.add", site.document("ORDERS")).await?;
    for id in ["ORDERS", "NONE", "ORDERS", "a b", "ORDERS"] {
        site.ask("config.get", id).await?;
    }
    let after = stats("config-get").await?;
    assert_eq!((&after["num_requests"], &after["num_errors"]), (&json!(5), &json!(2)), "{after}");
    assert!(after["last_error"].as_str().is_some_and(|error| error.starts_with("400:")), "{after}");
    let (total, average) = (after["processing_time"].as_u64(), after["average_processing_time"].as_u64());
    assert!(total > Some(0) && average == total.map(|total| total / 5), "{after}");
    assert_eq!(stats("config-add").await?["num_requests"], 1);
    assert_eq!(stats("status").await?["num_errors"], 0);
    Ok(())
}

#[tokio::test]
async fn an_error_is_in_the_headers_and_in_the_body() -> Result<()> {
    let site = Site::small().await?;
    let reply = site.ask_with("config.get", ("Any", "header"), "NONE").await?;
    let text = "replication `NONE` does not exist";
    assert_eq!((reply.code.as_deref(), reply.error.as_deref()), (Some("404"), Some(text)));
    assert_eq!(reply.body, json!({"error": {"code": 404, "description": text, "problems": []}}));
    Ok(())
}

#[tokio::test]
async fn the_prefix_moves_the_endpoints_and_not_the_name() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--prefix", "acme.copy"]).start().await?;
    assert_eq!(request(&site.client, "acme.copy.status", Value::Null).await?["total"], 0);
    assert_eq!(request(&site.client, "$SRV.PING.replicator", Value::Null).await?["name"], "replicator");
    assert!(ask(&site.client, "replicator.status", b"").await.is_err());
    Ok(())
}
