//! Kinds of streams that need rules of their own: refused with a reason, never copied wrong.

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::{Outgoing, Site};

/// Settings of such streams, the server version that has them, and what the refusal says.
const KINDS: [(&str, (u32, u32), &str); 2] = [
    ("allow_msg_counter", (2, 12), "is a counter stream, which needs rules of its own"),
    ("allow_msg_schedules", (2, 12), "schedules messages, which needs rules of its own"),
];

#[tokio::test]
async fn counters_and_schedules_are_refused_on_either_side() -> Result<()> {
    let site = Site::start().await?;
    for (index, (setting, (major, minor), reason)) in KINDS.into_iter().enumerate() {
        let settings = |subject: String| -> Value { json!({"subjects": [subject], setting: true}) };
        if site.source.at_least(major, minor) {
            let name = format!("FROM{index}");
            let mut source = site.source_stream(&name, settings(format!("from{index}.>"))).await?;
            let lines: &[&str] = if setting == "allow_msg_counter" { &["Nats-Incr: +5"] } else { &[] };
            source.publish(&Outgoing::new(format!("from{index}.a"), "").with_lines(lines)).await?;
            site.add(&name, json!({})).await?;
            let row = site.row_when(&name, "held", |row| row["state"] == "held").await?;
            let message = row["last_error"]["message"].as_str().unwrap_or_default();
            assert!(message.contains(&format!("source stream `{name}` {reason}")), "{row}");
            assert_eq!(row["counters"]["copied"], 0, "{row}");
        }
        if site.target.at_least(major, minor) {
            let name = format!("TO{index}");
            site.source_stream(&name, json!({"subjects": [format!("to{index}.>")]})).await?;
            site.publish(&name, 1..=3).await?;
            site.target_stream(&name, settings(format!("to{index}.>"))).await?;
            site.add(&name, json!({})).await?;
            let row = site.row_when(&name, "held", |row| row["state"] == "held").await?;
            let message = row["last_error"]["message"].as_str().unwrap_or_default();
            assert!(message.contains(&format!("target stream `{name}` {reason}")), "{row}");
            assert_eq!(site.at_target(&name).await?, 0);
        }
    }
    Ok(())
}

/// Names that a server takes for a stream, and one whose first message has a sequence of its own.
#[tokio::test]
async fn streams_of_any_name_are_copied() -> Result<()> {
    let mut site = Site::start().await?;
    let names = ["$MQTT_msgs", "\u{d6}L", "A#1", "x~y", "a,b", "=41"];
    let mut ids = Vec::new();
    for (index, name) in names.into_iter().enumerate() {
        let retention = if index % 2 == 1 { "workqueue" } else { "limits" };
        let config = json!({"subjects": [format!("n{index}.>")], "retention": retention, "first_seq": 1_001});
        let mut raw = site.source_stream(name, config).await?;
        raw.publish_all((0..20).map(|i| Outgoing::new(format!("n{index}.{i}"), i.to_string()))).await?;
        let reply = site.send("config.add", site.document(name)).await?;
        assert_eq!(reply.error, None, "{name}: {reply:?}");
        ids.push(reply.body["replication"].as_str().unwrap_or_default().to_owned());
    }
    for (id, name) in ids.iter().zip(names) {
        site.settled(id, 1_020).await?;
        assert_eq!(site.at_target(name).await?, 20, "{name}");
    }
    site.service.kill()?;
    for index in 0..names.len() {
        let messages = (20..30).map(|i| Outgoing::new(format!("n{index}.{i}"), i.to_string()));
        site.source().await?.publish_all(messages).await?;
    }
    site.service.restart().await?;
    for (id, name) in ids.iter().zip(names) {
        site.settled(id, 1_030).await?;
        assert_eq!(site.at_target(name).await?, 30, "{name}");
        for request in ["pause", "resume", "config.delete"] {
            let reply = site.ask(request, id).await?;
            assert_eq!(reply.error, None, "{request} {name}: {reply:?}");
        }
    }
    Ok(())
}
