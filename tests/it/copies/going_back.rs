//! A position that goes back because the target lost what it had.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::harness::{Expect, LIMIT, SITE, Site, wait_for};

/// Where few messages of a subject are kept, what is copied again replaces what would tell the next start that the saved
/// place is not what it was. So the bucket has to know first: while it cannot be written, the target stays empty.
#[tokio::test]
async fn nothing_is_sent_before_a_position_that_goes_back_is_saved() -> Result<()> {
    let mut site = Site::builder().args(["--lease-ttl", "60s"]).start().await?;
    site.source_stream("S", json!({})).await?;
    site.publish("S", 1..=50).await?;
    site.add("S", json!({})).await?;
    site.settled("S", 50).await?;
    let saved = async || matches!(site.position("S").await, Ok(Some(record)) if record["source"]["seq"] == 50);
    wait_for("the position to be saved", LIMIT, saved).await?;
    site.control().freeze()?;
    site.target.stop().await?;
    site.target.wipe()?;
    site.target.restart().await?;
    let mut target = site.target().await?;
    let begun = async || target.api("STREAM.INFO.S", Value::Null).await.is_ok();
    wait_for("a run to make the target stream again", LIMIT, begun).await?;
    // What was sent without waiting would be here by now.
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(target.stream_state("S").await?["last_seq"] == 0, "sent before it was saved");
    site.control().thaw()?;
    site.settled("S", 50).await?;
    site.verify("S", &Expect::copy_of("S").site(SITE)).await?;
    site.events.ever("target-reset").await?;
    Ok(())
}
