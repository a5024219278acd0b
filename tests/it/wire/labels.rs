//! The metadata of what the service makes on servers: people who list streams and consumers see where they are from.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::mirror::begin_as;
use crate::harness::{Cluster, Raw, Role, SITE, Site};

/// The metadata of the only consumer of a stream.
async fn consumer_labels(site: &Site, stream: &str) -> Result<Value> {
    let mut all = site.source().await?.api(&format!("CONSUMER.LIST.{stream}"), Value::Null).await?;
    let consumers = all["consumers"].as_array_mut().context("no list")?;
    assert_eq!(consumers.len(), 1, "{consumers:?}");
    Ok(consumers[0]["config"]["metadata"].take())
}

#[tokio::test]
async fn consumers_name_site_replication_and_instance() -> Result<()> {
    let (site, feed) = begin_as("mirror", "2.15.1", &["--instance", "one"]).await?;
    for (id, fields) in [("COPIED", json!({})), ("FED", feed)] {
        site.filled(id, 10).await?;
        site.add(id, fields).await?;
        site.settled(id, 10).await?;
        let labels = consumer_labels(&site, id).await?;
        assert_eq!(labels["stream-replicator.site"], SITE, "{labels}");
        assert_eq!(labels["stream-replicator.replication"], id, "{labels}");
        assert_eq!(labels["stream-replicator.instance"], "one", "{labels}");
    }
    // All instances of an installation share a durable consumer.
    site.source_stream("JOBS", json!({"retention": "workqueue"})).await?;
    site.publish("JOBS", 1..=10).await?;
    site.add("JOBS", json!({})).await?;
    site.copied("JOBS", 10).await?;
    let labels = consumer_labels(&site, "JOBS").await?;
    assert_eq!(labels["stream-replicator"], "JOBS", "{labels}");
    assert_eq!(labels["stream-replicator.site"], SITE, "{labels}");
    assert!(labels["stream-replicator.installation"].as_str().is_some_and(|id| !id.is_empty()), "{labels}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_stream_names_the_cluster_of_its_source() -> Result<()> {
    let cluster = Cluster::start(Role::Source).await?;
    let site = Site::small().await?;
    let mut source = Raw::connect(&cluster.servers[0].url()).await?;
    source.create_stream("ORDERS", json!({"subjects": ["orders.>"], "num_replicas": 3})).await?;
    let name = source.api("STREAM.INFO.ORDERS", Value::Null).await?["cluster"]["name"].take();
    assert!(name.as_str().is_some_and(|name| !name.is_empty()), "{name}");
    site.add("ORDERS", json!({"source_url": cluster.url()})).await?;
    site.row_when("ORDERS", "runs", |row| row["state"] == "running").await?;
    let config = site.target().await?.api("STREAM.INFO.ORDERS", Value::Null).await?["config"].take();
    let metadata = &config["metadata"];
    assert_eq!(metadata["replicator.source_cluster"], name, "{metadata}");
    assert_eq!(metadata["replicator.source_stream"], "ORDERS", "{metadata}");
    assert_eq!(metadata["replicator.site"], SITE, "{metadata}");
    Ok(())
}
