//! `make demo-fleet` in small, and its comparison, which notices a message that is missing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::harness::Raw;

#[path = "../../../examples/fleet/mod.rs"]
mod demo;

/// Everything is stored and copied once, each node has its advisories, and all numbers agree.
#[tokio::test]
async fn a_fleet_is_seen_alike_everywhere() -> Result<()> {
    let every = Duration::from_millis(250);
    let plan = demo::Plan { nodes: 60, every, warn: every * 4, inspect: every * 16 };
    let mut fleet = demo::run(plan).await?;

    let mut centre = Raw::connect(&fleet.centre.url()).await?;
    centre.api("STREAM.MSG.DELETE.CHORIA_REGISTRATION", json!({"seq": 1})).await?;
    let error = fleet.compare().await.err().context("a missing copy is not noticed")?.to_string();
    ensure!(error.contains("copied and sampled away") && error.contains("had to be copied"), "{error}");
    Ok(())
}
