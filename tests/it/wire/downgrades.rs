//! Servers that are set back to a version that cannot load a stream of a later one.

use anyhow::Result;
use serde_json::json;

use crate::harness::{Outgoing, Role, Server, Site};

const NEW: &str = "2.15.1";
const OLD: &str = "2.12.8";

#[tokio::test]
async fn a_stream_that_its_server_cannot_load_is_held() -> Result<()> {
    let source = Server::builder(Role::Source).version(NEW).start().await?;
    let target = Server::builder(Role::Target).version(NEW).start().await?;
    let mut site = Site::builder().on(source, target).start().await?;
    // A setting that the old version does not know; the target is created with it too.
    site.source_stream("S", json!({"allow_batched": true})).await?;
    site.add("S", json!({})).await?;
    let mut copied = 0;
    for side in [Role::Source, Role::Target] {
        let mut raw = site.source().await?;
        raw.publish_all((1..=100).map(|i| Outgoing::new("s.a", i.to_string()))).await?;
        copied += 100;
        site.settled("S", copied).await?;
        let server = if matches!(side, Role::Source) { &mut site.source } else { &mut site.target };
        server.restart_as(OLD).await?;
        let row = site.row_when("S", "is held", |row| row["state"] == "held").await?;
        let error = row["last_error"]["message"].as_str().unwrap_or_default();
        assert!(error.contains("unsupported") && error.contains("start its server in the version"), "{side:?}: {row}");
        // It continues by itself when that was done.
        let server = if matches!(side, Role::Source) { &mut site.source } else { &mut site.target };
        server.restart_as(NEW).await?;
        site.row_when("S", "runs again", |row| row["state"] == "running").await?;
    }
    assert_eq!(site.at_target("S").await?, copied);
    Ok(())
}
