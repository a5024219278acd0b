//! Durable consumers at the source that belong to another replication, or to another installation.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{
    LIMIT, Outgoing, Raw, Role, Server, Service, Site,
    client::{request, status},
    connect, wait_for,
};

const WAYS: [&str; 2] = ["workqueue", "interest"];

fn messages(count: u64) -> impl Iterator<Item = Outgoing> {
    (0..count).map(|i| Outgoing::new(format!("q.{}", i % 5), i.to_string()))
}

async fn consumer(raw: &mut Raw, name: &str) -> Result<Value> {
    Ok(raw.api(&format!("CONSUMER.INFO.Q.{name}"), Value::Null).await?["config"].take())
}

/// Changes the metadata of a consumer past the service.
async fn mark(raw: &mut Raw, name: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut config = consumer(raw, name).await?;
    change(&mut config["metadata"]);
    let body = json!({"stream_name": "Q", "config": config});
    raw.api(&format!("CONSUMER.CREATE.Q.{name}"), body).await.map(drop)
}

fn is_held_by(row: &Value, texts: &[&str]) -> bool {
    let message = row["last_error"]["message"].as_str().unwrap_or_default();
    row["state"] == "held" && texts.iter().all(|text| message.contains(text))
}

/// Another installation: its own control server and target.
struct OtherDurable {
    control: Server,
    target: Server,
    service: Service,
    client: async_nats::Client,
}

impl OtherDurable {
    async fn start(site: &str) -> Result<Self> {
        let (control, target) = tokio::try_join!(Server::start(Role::Control), Server::start(Role::Target))?;
        let service = Service::builder(&control.url(), site).start().await?;
        let client = connect(&control.url()).await?;
        Ok(Self { control, target, service, client })
    }

    async fn add(&self, source: &Server, name: &str) -> Result<()> {
        let document = json!({"stream": "Q", "source_url": source.url(), "target_url": self.target.url(), "name": name, "id": "Q"});
        request(&self.client, "replicator.config.add", document).await.map(drop)
    }

    async fn row_when(&self, what: &str, when: impl Fn(&Value) -> bool) -> Result<()> {
        let is = async || status(&self.client, "Q").await.is_some_and(|row| when(&row));
        wait_for(what, LIMIT, is).await.with_context(|| format!("{}\n{}", self.control.url(), self.service.log()))
    }
}

async fn source(site: &Site, retention: &str) -> Result<Raw> {
    site.source_stream("Q", json!({"subjects": ["q.>"], "retention": retention})).await
}

#[tokio::test]
async fn of_two_installations_with_one_name_one_is_held() -> Result<()> {
    for retention in WAYS {
        for site_name in ["OTHER", "TEST"] {
            let site = Site::start().await?;
            let other = OtherDurable::start(site_name).await?;
            let mut raw = source(&site, retention).await?;
            site.add("Q", json!({"name": "shared", "id": "Q"})).await?;
            site.row_when("Q", "runs", |row| row["state"] == "running").await?;
            other.add(&site.source, "shared").await?;
            let texts = ["`SR_shared`", "site `TEST` (installation ", &format!("of site `{site_name}` (installation ")];
            other.row_when("the second one is held", |row| is_held_by(row, &texts)).await?;
            raw.publish_all(messages(2_000)).await?;
            site.copied("Q", 2_000).await?;
            site.settled("Q", 2_000).await?;

            // As the message says: under a name of its own.
            if retention == "interest" {
                let document = json!({"stream": "Q", "source_url": site.source.url(),
                    "target_url": other.target.url(), "name": "mine", "id": "Q"});
                request(&other.client, "replicator.config.update", document).await?;
                other.row_when("the second one runs", |row| row["state"] == "running").await?;
                raw.publish_all(messages(100)).await?;
                site.copied("Q", 2_100).await?;
                let mut target = Raw::connect(&other.target.url()).await?;
                // And what the first one has not acknowledged yet.
                let enough = |state: &Value| state["messages"].as_u64().is_some_and(|messages| messages >= 100);
                let there = async || target.stream_state("Q").await.is_ok_and(|state| enough(&state));
                wait_for("the second copy", LIMIT, there).await?;
            } else {
                // Deleting the one that is held leaves the other's consumer alone.
                request(&other.client, "replicator.config.delete", json!({"replication": "Q"})).await?;
                consumer(&mut raw, "SR_shared").await?;
                raw.publish_all(messages(100)).await?;
                site.copied("Q", 2_100).await?;
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_validation_names_both_installations() -> Result<()> {
    let site = Site::start().await?;
    let other = OtherDurable::start("OTHER").await?;
    source(&site, "workqueue").await?;
    site.add("Q", json!({"name": "shared"})).await?;
    site.row_when("Q.shared", "runs", |row| row["state"] == "running").await?;
    let document =
        json!({"stream": "Q", "source_url": site.source.url(), "target_url": other.target.url(), "name": "shared"});
    let reply = request(&other.client, "replicator.config.validate", document).await?;
    let problems = reply["problems"].to_string();
    ensure!(reply["valid"] == false, "{reply}");
    ensure!(problems.contains("site `TEST`") && problems.contains("site `OTHER`"), "{reply}");
    Ok(())
}

#[tokio::test]
async fn of_two_replications_of_one_name_one_is_held() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = source(&site, "workqueue").await?;
    site.add("Q", json!({"id": "first"})).await?;
    site.row_when("first", "runs", |row| row["state"] == "running").await?;
    site.add("Q", json!({"id": "second", "target_stream": "Q2", "target_subject_prefix": "second"})).await?;
    site.row_when("second", "is held", |row| is_held_by(row, &["`first`", "`second`"])).await?;
    raw.publish_all(messages(1_000)).await?;
    site.copied("Q", 1_000).await?;
    ensure!(site.ask("config.delete", "second").await?.error.is_none());
    consumer(&mut raw, "SR_TEST").await.map(drop)
}

#[tokio::test]
async fn a_consumer_of_an_earlier_version_is_taken_over_and_marked() -> Result<()> {
    for retention in WAYS {
        let mut site = Site::start().await?;
        let mut raw = source(&site, retention).await?;
        site.add("Q", json!({})).await?;
        site.row_when("Q", "runs", |row| row["state"] == "running").await?;
        raw.publish_all(messages(100)).await?;
        site.settled("Q", 100).await?;
        let made = consumer(&mut raw, "SR_TEST").await?["metadata"].clone();
        ensure!(
            made["stream-replicator.site"] == "TEST" && made["stream-replicator.installation"].is_string(),
            "{made}"
        );
        site.stop().await?;
        mark(&mut raw, "SR_TEST", |metadata| *metadata = json!({"stream-replicator": "Q"})).await?;
        // The record of an earlier version knows no installation either.
        let positions = site.bucket("REPLICATOR_POSITIONS").await?;
        let mut record = site.position("Q").await?.context("the record")?;
        record.as_object_mut().context("an object")?.remove("installation");
        positions.put("Q", record.to_string().into()).await?;
        site.service.restart().await?;
        raw.publish_all(messages(100)).await?;
        site.settled("Q", 200).await?;
        let now = consumer(&mut raw, "SR_TEST").await?["metadata"].clone();
        assert_eq!(now["stream-replicator.installation"], made["stream-replicator.installation"], "{now}");
        assert_eq!(site.at_target("Q").await?, 200);
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_of_chorias_replicator_is_taken_over_unchanged() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = source(&site, "interest").await?;
    let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
        "ack_wait": 30_000_000_000u64, "max_ack_pending": 900});
    raw.api("CONSUMER.CREATE.Q.SR_TEST", json!({"stream_name": "Q", "config": config})).await?;
    raw.publish_all(messages(100)).await?;
    site.add("Q", json!({})).await?;
    site.copied("Q", 100).await?;
    site.settled("Q", 100).await?;
    let now = consumer(&mut raw, "SR_TEST").await?;
    ensure!(now["metadata"].get("stream-replicator").is_none(), "{now}");
    assert_eq!(now["max_ack_pending"], 900);
    Ok(())
}

#[tokio::test]
async fn our_own_consumer_is_ours_after_the_configuration_was_lost() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = source(&site, "workqueue").await?;
    site.add("Q", json!({})).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    raw.publish_all(messages(100)).await?;
    site.settled("Q", 100).await?;
    site.stop().await?;
    // Its bucket identified the installation.
    async_nats::jetstream::new(site.client.clone()).delete_key_value("REPLICATOR_CONFIG").await?;
    site.service.restart().await?;
    site.add("Q", json!({})).await?;
    raw.publish_all(messages(100)).await?;
    site.settled("Q", 200).await?;
    assert_eq!(site.at_target("Q").await?, 200);
    Ok(())
}
