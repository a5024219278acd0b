//! `stream-replicator pause`, `resume`, `position`, `retry`, `skip`, `instances` and `config validate`.

use anyhow::Result;
use serde_json::json;

use crate::harness::cli::{Ended, failed};
use crate::harness::{Outgoing, Site};

#[tokio::test]
async fn replications_are_paused_and_go_on() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 10).await?;
    site.replicate("OTHER", 10).await?;
    assert_eq!(cli.ok(["pause", "ORDERS", "OTHER"]).await?, "ORDERS is paused\nOTHER is paused\n");
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    failed(&cli.run(["status", "ORDERS", "--wait-caught-up"]).await?, &["will not catch up: `ORDERS` is paused"]);
    site.row_when("OTHER", "is paused", |row| row["state"] == "paused").await?;
    assert_eq!(cli.ok(["status", "--wait-caught-up"]).await?, "caught up: 0 replications (2 paused)\n");
    let ended = cli.run(["resume", "MISSING", "ORDERS"]).await?;
    failed(&ended, &["`MISSING` does not exist"]);
    assert_eq!(ended.stdout, "ORDERS is resumed\n");
    site.row_when("ORDERS", "continues", |row| row["state"] == "running").await?;
    assert_eq!(cli.json(["resume", "OTHER"]).await?["replication"], "OTHER");
    assert_eq!(cli.ok(["status", "--wait-caught-up"]).await?, "caught up: 2 replications\n");
    Ok(())
}

#[tokio::test]
async fn the_position_of_a_paused_replication_is_moved() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 100).await?;
    site.settled("ORDERS", 100).await?;
    failed(&cli.run(["position", "ORDERS", "--source-seq", "10"]).await?, &["(409)"]);
    cli.ok(["pause", "ORDERS"]).await?;
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    let words = "ORDERS: position 100 -> 10, 90 source messages in between: copied again";
    let dry = cli.ok(["position", "ORDERS", "--source-seq", "10", "--dry-run"]).await?;
    assert_eq!(dry, format!("{words} (dry run)\n"));
    let moved = cli.json(["position", "ORDERS", "--time", "1h", "--dry-run"]).await?;
    assert_eq!((&moved["from"], &moved["to"], &moved["dry_run"]), (&json!(100), &json!(0), &json!(true)));
    assert_eq!(cli.ok(["position", "ORDERS", "--source-seq", "10"]).await?, format!("{words}\n"));
    Ok(())
}

#[tokio::test]
async fn what_is_not_held_cannot_be_retried_or_skipped() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    for arguments in [&["retry", "MISSING"][..], &["skip", "MISSING"]] {
        failed(&site.cli().run(arguments).await?, &["`MISSING` does not exist (404)"]);
    }
    failed(&site.cli().run(["skip", "ORDERS"]).await?, &["error: ", "(409)"]);
    failed(&site.cli().run(["skip", "ORDERS", "--source-seq", "7"]).await?, &["error: ", "(409)"]);
    Ok(())
}

#[tokio::test]
async fn instances_are_listed_with_what_they_run() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    site.replicate("ORDERS", 10).await?;
    let shown = site.cli().ok(["instances"]).await?;
    let lines: Vec<_> = shown.lines().collect();
    assert!(lines[0].starts_with("INSTANCE  VERSION") && lines[0].ends_with("REPLICATIONS"), "{shown}");
    assert!(lines.len() == 2 && lines[1].starts_with("one ") && lines[1].ends_with(" 1  ORDERS"), "{shown}");
    assert_eq!(site.cli().json(["instances"]).await?["instances"][0]["instance"], "one");
    Ok(())
}

#[tokio::test]
async fn a_document_is_checked_with_what_both_sides_say() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.filled("ORDERS", 5).await?;
    let good = cli.run_with(["config", "validate", "-"], &site.document("ORDERS").to_string()).await?;
    assert!(good.code == Some(0) && good.stdout.starts_with("valid\n"), "{good:?}");
    for text in ["\nsource: server ", ", stream with 5 messages, 1 to 5\n", "\ntarget: server ", "CHECK", "RESULT"] {
        assert!(good.stdout.contains(text), "`{text}` is not in {}", good.stdout);
    }
    let missing = cli.run_with(["config", "validate", "-"], &site.document("MISSING").to_string()).await?;
    assert!(missing.code == Some(1) && missing.stdout.starts_with("not valid\n"), "{missing:?}");
    assert!(missing.stdout.contains("stream ") && missing.stdout.contains("failed"), "{missing:?}");
    let wrong = cli.run_with(["config", "validate", "-", "--json"], "{\"streem\": \"A\"}").await?;
    let reply: serde_json::Value = serde_json::from_str(&wrong.stdout)?;
    assert_eq!((wrong.code, &reply["valid"], &reply["preflight"]), (Some(1), &json!(false), &json!(null)));
    assert_eq!(site.ask("config.list", "").await?.body["total"], 0);
    Ok(())
}

#[tokio::test]
async fn what_is_held_is_tried_again_or_goes_on_without_a_message() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.send("config.add", site.document("LATER")).await?;
    site.row_when("LATER", "is held", |row| row["state"] == "held").await?;
    assert_eq!(cli.ok(["retry", "LATER"]).await?, "LATER is tried again\n");

    site.source_stream("ORDERS", json!({})).await?;
    let payload = |i| if i == 10 { "x".repeat(3_000) } else { String::new() };
    site.source().await?.publish_all((1..=20).map(|i| Outgoing::new("orders.x", payload(i)))).await?;
    site.target_stream("ORDERS", json!({"max_msg_size": 1_000})).await?;
    site.add("ORDERS", json!({})).await?;
    site.row_when("ORDERS", "is held", |row| row["last_error"]["source_seq"] == 10).await?;
    failed(&cli.run(["skip", "ORDERS", "--source-seq", "11"]).await?, &["(409)"]);
    let skipped = cli.ok(["skip", "ORDERS", "--source-seq", "10"]).await?;
    let expect = "ORDERS: source message 10 (subject orders.x, 2.9 KiB, stored 20";
    assert!(skipped.starts_with(expect) && skipped.ends_with("Z) is skipped\n"), "{skipped}");
    site.settled("ORDERS", 20).await?;
    Ok(())
}

#[tokio::test]
async fn skip_shows_the_message_and_asks() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.source_stream("ORDERS", json!({})).await?;
    let payload = |i| if i == 3 || i == 5 { "x".repeat(3_000) } else { String::new() };
    site.source().await?.publish_all((1..=6).map(|i| Outgoing::new("orders.x", payload(i)))).await?;
    site.target_stream("ORDERS", json!({"max_msg_size": 1_000})).await?;
    site.add("ORDERS", json!({})).await?;
    site.row_when("ORDERS", "is held", |row| row["last_error"]["source_seq"] == 3).await?;
    let unasked = cli.run(["skip", "ORDERS"]).await?;
    assert_eq!(unasked.code, Some(2), "{unasked:?}");
    assert!(unasked.stderr.contains("`skip ORDERS --source-seq 3`"), "{unasked:?}");
    for (answer, code) in [("n\n", 1), ("\u{4}", 1), ("y\n", 0)] {
        let mut running = cli.on_terminal(["skip", "ORDERS"])?;
        running.shows("skip it? It will not be at the target [y/N]").await?;
        let shown = running.shown();
        assert!(shown.contains("ORDERS: source message 3 (subject orders.x, 2.9 KiB, stored 20"), "{shown}");
        running.types(answer)?;
        let ended = running.end().await?;
        assert_eq!(ended.code, Some(code), "{answer:?}: {ended:?}");
    }
    site.row_when("ORDERS", "is held again", |row| row["last_error"]["source_seq"] == 5).await?;
    let skipped = cli.json(["skip", "ORDERS", "--yes"]).await?;
    assert_eq!((&skipped["source_seq"], &skipped["subject"]), (&json!(5), &json!("orders.x")), "{skipped}");
    site.settled("ORDERS", 6).await?;
    Ok(())
}

#[tokio::test]
async fn patterns_and_all_name_several_replications() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    for id in ["S01", "S02", "OTHER"] {
        site.replicate(id, 3).await?;
        site.settled(id, 3).await?;
    }
    assert_eq!(cli.ok(["config", "ls", "--ids"]).await?, "OTHER\nS01\nS02\n");
    assert_eq!(cli.ok(["pause", "S0*"]).await?, "S01 is paused\nS02 is paused\n");
    assert_eq!(cli.ok(["pause", "--all"]).await?, "OTHER is paused\nS01 is paused\nS02 is paused\n");
    for id in ["S01", "S02", "OTHER"] {
        site.row_when(id, "is paused", |row| row["state"] == "paused").await?;
    }
    let moved = cli.ok(["position", "S0?", "--time", "1h", "--dry-run"]).await?;
    assert!(moved.starts_with("S01: position 3 -> 0, ") && moved.contains("\nS02: position 3 -> 0, "), "{moved}");
    // A pattern that matches none stops before anything is done.
    failed(&cli.run(["resume", "S01", "X*"]).await?, &["none of 3 replications matches `X*`"]);
    assert_eq!(cli.json(["status", "S01"]).await?["replications"][0]["state"], "paused");
    assert_eq!(cli.ok(["resume", "*1", "S01"]).await?, "S01 is resumed\n");
    let typo = failed_text(&cli.run(["resume", "OTHRE"]).await?);
    assert!(typo.contains("`OTHRE` does not exist, did you mean `OTHER`? (404)"), "{typo}");
    for arguments in [
        &["pause"][..],
        &["pause", "S01", "--all"],
        &["skip", "--all", "--source-seq", "5"],
        &["promote", "S0*", "--subject", "a"],
    ] {
        let ended = cli.run(arguments).await?;
        assert!(ended.code == Some(2) && ended.stdout.is_empty(), "{arguments:?}: {ended:?}");
    }

    let mut running = cli.on_terminal(["config", "rm", "S0*"])?;
    running.shows("remove 2 replications, S01, S02 (with position and state)? [y/N]").await?;
    running.types("y\n")?;
    assert_eq!(running.end().await?.code, Some(0));
    assert_eq!(cli.ok(["config", "ls", "--ids"]).await?, "OTHER\n");
    Ok(())
}

fn failed_text(ended: &Ended) -> String {
    failed(ended, &["error: "]);
    ended.stderr.clone()
}
