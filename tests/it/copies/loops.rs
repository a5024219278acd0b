//! Replication loops that no single installation can see in its configuration.

use anyhow::{Context, Result};
use serde_json::json;

use crate::harness::site::merged;
use crate::harness::{Service, Site, request};

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
