//! `target_update`: an existing target stream is given what it lacks for a copy, and nothing else of it changes.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{Expect, Outgoing, Raw, SITE, Site, site::merged};

const STREAM: &str = "U";

/// A source with subjects and settings that the target lacks, and messages on all of its subjects.
async fn begin(target: Value) -> Result<(Site, Raw)> {
    let site = Site::start().await?;
    let mut config = json!({"subjects": ["u.>", "v.*"], "allow_rollup_hdrs": true, "allow_direct": true});
    if site.source.at_least(2, 11) {
        config["allow_msg_ttl"] = true.into();
    }
    let mut source = site.source_stream(STREAM, config).await?;
    let subjects = ["u.a", "v.b", "u.c.d"];
    source.publish_all((0..90).map(|i| Outgoing::new(subjects[i % 3], format!("{i}")))).await?;
    let target = site.target_stream(STREAM, target).await?;
    Ok((site, target))
}

async fn config(raw: &mut Raw) -> Result<Value> {
    Ok(raw.api(&format!("STREAM.INFO.{STREAM}"), Value::Null).await?["config"].take())
}

/// What the preflight says of the target stream.
async fn preflight(site: &Site) -> Result<Value> {
    let body = site.send("config.validate", site.document_with(STREAM, json!({"target_update": true}))).await?.body;
    let checks = body["preflight"]["target"]["checks"].as_array().cloned().unwrap_or_default();
    checks.into_iter().find(|check| check["name"] == "stream").with_context(|| body.to_string())
}

#[tokio::test]
async fn an_existing_target_is_given_what_it_lacks_and_nothing_else() -> Result<()> {
    let own = json!({"subjects": ["u.a", "mine.>"], "max_msgs": 1_000_000, "max_age": 3_600_000_000_000u64,
        "description": "kept", "allow_direct": false});
    let (mut site, mut target) = begin(own).await?;
    let before = config(&mut target).await?;

    // Nobody asked for it: nothing changes.
    site.add(STREAM, json!({})).await?;
    site.row_when(STREAM, "finds no stream for a subject", |row| row["counters"]["errors"] != 0).await?;
    assert_eq!(config(&mut target).await?, before);

    let said = preflight(&site).await?;
    let message = said["message"].as_str().unwrap_or_default();
    assert_eq!(said["result"], "ok", "{said}");
    assert!(message.contains("target stream `U` would be given subjects `u.>`, `v.*`"), "{said}");
    assert_eq!(config(&mut target).await?, before);

    let reply = site.send("config.update", site.document_with(STREAM, json!({"target_update": true}))).await?;
    assert!(reply.error.is_none(), "{reply:?}");
    let row = site.settled(STREAM, 90).await?;
    let fast = site.target.at_least(2, 14);
    assert_eq!(row["transport"], if fast { "fast_ingest" } else { "pipelined" }, "{row}");
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE).late_allowed()).await?;
    let after = config(&mut target).await?;
    let mut expect =
        merged(before, json!({"subjects": ["mine.>", "u.>", "v.*"], "allow_rollup_hdrs": true, "allow_direct": true}));
    for (flag, is_given) in
        [("allow_batched", fast), ("allow_msg_ttl", site.source.at_least(2, 11) && site.target.at_least(2, 11))]
    {
        if is_given {
            expect[flag] = true.into();
        }
    }
    // What the server says of its own version depends on what is switched on.
    if let Some(metadata) = after.get("metadata") {
        expect["metadata"] = metadata.clone();
    }
    assert_eq!(after, expect);

    // Nothing is lacking now.
    assert_eq!(preflight(&site).await?["message"].as_str().unwrap_or_default(), "");
    site.service.stop().await?;
    site.service.restart().await?;
    site.settled(STREAM, 90).await?;
    assert_eq!(site.service.logs().matches("target stream updated").count(), 1, "{}", site.service.logs());
    Ok(())
}

#[tokio::test]
async fn an_impossible_target_update_is_reported_and_not_made() -> Result<()> {
    let (site, mut target) = begin(json!({"subjects": ["u.>"]})).await?;
    site.target_stream("OTHER", json!({"subjects": ["v.b"]})).await?;
    let before = config(&mut target).await?;
    let said = preflight(&site).await?;
    assert_eq!(said["result"], "failed", "{said}");
    let message = said["message"].as_str().unwrap_or_default();
    assert!(message.contains("would be given subjects `v.*`"), "{said}");
    assert!(message.contains("`v.*` overlaps with stream `OTHER` there"), "{said}");
    site.add(STREAM, json!({"target_update": true})).await?;
    let row = site.row_when(STREAM, "cannot change the target", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("target stream `U` cannot be given what it lacks (subjects `v.*`"), "{row}");
    assert!(message.contains("overlap"), "{row}");
    assert_eq!(config(&mut target).await?, before);
    Ok(())
}

#[tokio::test]
async fn a_target_is_not_made_to_listen_on_more_than_is_copied() -> Result<()> {
    let site = Site::start().await?;
    site.source_stream(STREAM, json!({"subjects": ["u.*.c"]})).await?;
    let mut target = site.target_stream(STREAM, json!({"subjects": ["u.b.*"]})).await?;
    let before = config(&mut target).await?;
    let words = "it listens on `u.b.*`, and only `u.*.*` would hold both";
    let said = preflight(&site).await?;
    assert_eq!(said["result"], "failed", "{said}");
    assert!(said["message"].as_str().unwrap_or_default().contains(words), "{said}");
    site.add(STREAM, json!({"target_update": true})).await?;
    let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
    assert!(row["last_error"]["message"].as_str().unwrap_or_default().contains(words), "{row}");
    assert_eq!(config(&mut target).await?, before);
    Ok(())
}
