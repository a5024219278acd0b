//! The service's own buckets as source or target of a replication.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::Site;
use crate::harness::site::merged;

#[tokio::test]
async fn own_buckets_are_neither_copied_nor_written_to() -> Result<()> {
    let site = Site::small().await?;
    let control = site.control().url();
    let refused = async |document: Value, id: &str| {
        let reply = site.send("config.validate", document.clone()).await?;
        let problems = reply.body["problems"].to_string();
        assert!(reply.body["valid"] == false && problems.contains("is a bucket of this service"), "{reply:?}");
        site.send("config.add", document).await?;
        let held = |row: &Value| {
            row["state"] == "held" && row["last_error"]["message"].to_string().contains("is a bucket of this service")
        };
        site.row_when(id, "is held", held).await?;
        anyhow::Ok(())
    };
    for bucket in ["CONFIG", "POSITIONS", "LEASES", "STATE"] {
        let stream = format!("KV_REPLICATOR_{bucket}");
        let source = json!({"stream": stream, "source_url": control, "target_url": site.target.url()});
        refused(source, &stream).await?;
    }
    site.filled("ORDERS", 3).await?;
    let into = json!({"target_url": control, "target_stream": "KV_REPLICATOR_STATE", "target_update": true});
    refused(merged(site.document("ORDERS"), into), "ORDERS").await?;
    Ok(())
}

#[tokio::test]
async fn a_stream_of_the_same_name_elsewhere_is_copied() -> Result<()> {
    let site = Site::start().await?;
    let stream = "KV_REPLICATOR_POSITIONS";
    let config = json!({"name": stream, "subjects": ["$KV.REPLICATOR_POSITIONS.>"]});
    let mut source = site.source().await.context("source")?;
    source.api(&format!("STREAM.CREATE.{stream}"), config).await?;
    source.publish(&crate::harness::Outgoing::new("$KV.REPLICATOR_POSITIONS.a", "x")).await?;
    site.add(stream, json!({})).await?;
    site.copied(stream, 1).await
}
