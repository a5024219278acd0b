//! `stream-replicator admin`: senders and advisories.

use anyhow::Result;
use serde_json::json;

use crate::harness::cli::failed;
use crate::harness::{Outgoing, Site};

fn report(sender: &str) -> Outgoing {
    Outgoing::new("nodes.report", json!({"sender": sender}).to_string())
}

#[tokio::test]
async fn senders_and_advisories_are_shown_as_tables_lines_and_json() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    site.source_stream("ADVISORIES", json!({})).await?;
    site.source_stream("NODES", json!({})).await?;
    let advisory = json!({"subject": "advisories.%s.%v", "reliable": true});
    site.add("NODES", json!({"inspect_field": "sender", "inspect_duration": "1h", "advisory": advisory})).await?;
    let cli = site.cli();
    let watching = cli.start(["admin", "watch", "NODES"], "")?;
    let following = cli.start(["admin", "advisories", "ADVISORIES", "n2", "--follow", "--since", "1h"], "")?;
    let last = site.source().await?.publish_all([report("n1"), report("n2"), report("n1")]).await?;
    site.settled("NODES", last).await?;
    following.shows("    new n2 seen 0s earlier on TEST").await?;
    watching.shows("n1  seen ").await?;
    watching.shows("  copied ").await?;
    site.row_when("NODES", "has published both", |row| row["sampling"]["advised"]["new"] == 2).await?;

    let table = cli.ok(["admin", "senders", "NODES"]).await?;
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["SENDER", "SEEN", "COPIED", "SIZE", "SEQUENCE"], "{table}");
    assert_eq!((words.len(), words[1][0], words[2][0]), (3, "n1", "n2"), "{table}");
    let only = cli.json(["admin", "senders", "NODES", "--value", "2$", "--since", "1h"]).await?;
    assert_eq!((&only["total"], &only["senders"][0]["sender"]), (&json!(1), &json!("n2")), "{only}");
    assert_eq!(cli.json(["admin", "senders", "NODES", "--advised"]).await?["total"], 0);

    let lines = cli.ok(["admin", "advisories", "ADVISORIES", "--since", "1h"]).await?;
    assert!(lines.starts_with("Searching for advisories\n\n[20"), "{lines}");
    assert!(lines.lines().count() == 4 && lines.contains("]     new n1 seen 0s earlier on TEST"), "{lines}");
    let one = cli.ok(["admin", "adv", "ADVISORIES", "n2", "--since", "1h"]).await?;
    assert!(one.starts_with("Searching 2 messages for advisories related to n2\n\n") && !one.contains("n1"), "{one}");
    let none = cli.run(["admin", "advisories", "ADVISORIES", "n1", "--since", "2099-01-01T00:00:00Z"]).await?;
    failed(&none, &["did not find any messages for \"n1\""]);
    let body = cli.json(["admin", "advisories", "ADVISORIES", "n1", "--since", "1h"]).await?;
    assert_eq!((&body["event"], &body["value"]), (&json!("new"), &json!("n1")));
    assert!(!following.shown().contains("n1"), "{}", following.shown());

    failed(&cli.run(["admin", "senders", "NONE"]).await?, &["NONE", "does not exist"]);
    failed(&cli.run(["admin", "advisories", "NONE"]).await?, &["`NONE`"]);
    failed(&cli.run(["admin", "senders", "NODES", "--value", "("]).await?, &["regular expression"]);
    Ok(())
}
