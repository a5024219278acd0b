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
