//! The file into the configuration bucket, and back.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::messages;
use crate::harness::{Site, cli::failed, request};

#[tokio::test]
async fn a_file_is_imported_and_exported_and_imported_again() -> Result<()> {
    let site = Site::small().await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sr.yaml").display().to_string();
    let source = site.source.url_as("u:hunter2");
    let text = format!(
        "name: TEST\nx-link: &link\n  source_url: {source}\n  target_url: {}\nstreams:\n  - <<: *link\n    stream: S\n    \
         filter_subject: s.>\n    max_age: 1.5d\n  - <<: *link\n    stream: T\n    inspect_subject_token: 1\n    inspect_duration: 1h\n\
         heartbeats:\n  url: {}\n  subjects:\n    - subject: beats.a\nadapters:\n  - name: inventory\n    stream:\n      \
         topic: reg.%s\n      servers: {source}\n    ingest:\n      topic: choria.broadcast.agent.registration\n      protocol: \
         request\n      servers: {source}\n",
        site.target.url(),
        site.source.url()
    );
    fs::write(&path, &text)?;
    let (cli, dry) = (site.cli(), ["config", "import", "--dry-run", path.as_str()]);
    let shown = cli.ok(dry).await?;
    ensure!(shown.contains("dry run, nothing was changed: 2 added"), "{shown}");
    let list = request(&site.client, "replicator.config.list", json!({})).await?;
    ensure!(list["total"] == 0, "{list}");

    let shown = cli.ok(["config", "import", path.as_str()]).await?;
    ensure!(shown.contains("2 added") && shown.contains("heartbeats are at revision"), "{shown}");
    ensure!(shown.contains("adapter inventory is at revision"), "{shown}");
    let adapters = request(&site.client, "replicator.adapter.list", json!({})).await?;
    ensure!(adapters["total"] == 1 && adapters["adapters"][0]["origin"] == "kv", "{adapters}");
    let stored = request(&site.client, "replicator.config.get", json!({"replication": "S"})).await?;
    let config = &stored["config"];
    ensure!(config["hand_back"] == true && config["max_age"] == "129600s", "{stored}");
    ensure!(!stored.to_string().contains("hunter2"), "{stored}");

    let yaml = cli.ok(["config", "export"]).await?;
    ensure!(yaml.contains("stream: \"S\"") && yaml.contains("subject: \"beats.a\""), "{yaml}");
    ensure!(yaml.contains("name: \"inventory\"") && !yaml.contains("hunter2"), "{yaml}");
    fs::write(&path, &yaml)?;
    let shown = cli.ok(["config", "import", path.as_str()]).await?;
    ensure!(shown.contains("0 added, 0 updated, 2 unchanged"), "{shown}\n{yaml}");
    let adapter = site.bucket("REPLICATOR_CONFIG").await?.get("adapters/inventory").await?.context("the adapter")?;
    ensure!(String::from_utf8_lossy(&adapter).contains("u:hunter2@"), "the password is lost");
    let one = cli.json(["config", "export", "T"]).await?;
    ensure!(one["streams"][0]["stream"] == "T" && one["name"] == "TEST" && one.get("heartbeats").is_none(), "{one}");

    site.source_stream("S", json!({"subjects": ["s.>"]})).await?;
    site.source().await?.publish_all(messages("s", 1, 5)).await?;
    site.copied("S", 5).await
}

#[tokio::test]
async fn what_is_wrong_with_a_file_changes_nothing() -> Result<()> {
    let site = Site::small().await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sr.yaml").display().to_string();
    let (source, target) = (site.source.url(), site.target.url());
    let of = |name: &str, more: &str| {
        format!("name: {name}\nstreams:\n  - stream: S\n    source_url: {source}\n    target_url: {target}\n{more}")
    };
    fs::write(&path, of("TEST", "    max_age: 10\n"))?;
    let refused = site.cli().run(["config", "import", path.as_str()]).await?;
    let at = format!("{path}:6: streams[0].max_age");
    ensure!(refused.code == Some(2) && refused.stderr.contains(&at), "{refused:?}");
    fs::write(&path, of("OTHER", ""))?;
    failed(&site.cli().run(["config", "import", path.as_str()]).await?, &["`name` is `OTHER`", "site `TEST`"]);
    let list = request(&site.client, "replicator.config.list", json!({})).await?;
    ensure!(list["total"] == 0, "{list}");
    Ok(())
}
