//! `stream-replicator status`: once, as it changes, and when it has caught up.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::cli::failed;
use crate::harness::{Site, wait_for};

#[tokio::test]
async fn status_is_a_table_or_everything_about_one() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let cli = site.cli();
    let table = cli.ok(["status"]).await?;
    assert_eq!(table, "REPLICATION  STATE  LAG  BEHIND  POSITION  TRANSPORT  LEADER  LAST ERROR\n");
    site.replicate("ORDERS", 1500).await?;
    site.settled("ORDERS", 1500).await?;
    site.put("BROKEN", "{}").await?;
    site.row_when("BROKEN", "is invalid", |row| row["state"] == "invalid").await?;

    let table = cli.ok(["status"]).await?;
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 7, "{table}");
    assert_eq!(lines[3..5], ["", "do: correct the document: `last_error` names its problems (BROKEN)"], "{table}");
    assert_eq!(lines[5..], ["", "2: 1 running, 1 invalid; lag 0, unknown of 1"], "{table}");
    let words: Vec<_> = lines[2].split_whitespace().collect();
    assert_eq!(words[..5], ["ORDERS", "running", "0", "0s", "1,500"], "{table}");
    assert_eq!(words[6], "one", "{table}");
    assert!(lines[1].starts_with("BROKEN       invalid") && lines[1].contains("revision 3 cannot run: "), "{table}");
    assert!(!table.contains('\x1b'), "{table:?}");

    let detail = cli.ok(["status", "ORDERS"]).await?;
    for line in [
        "ORDERS",
        "  state       running",
        "  position    source 1,500, target 1,500",
        "  lag         0 messages, 0s",
        "  errors      0",
    ] {
        assert!(detail.lines().any(|found| found == line), "`{line}` is not in\n{detail}");
    }
    assert!(detail.contains("\n  copied      1,500 messages, "), "{detail}");

    let shown = cli.json(["status", "ORDERS"]).await?;
    let asked = site.ask("status", "ORDERS").await?.body;
    assert_eq!(shown["replications"][0]["replication"], asked["replications"][0]["replication"]);
    assert_eq!(shown.as_object().map(|o| o.keys().collect::<Vec<_>>()), asked.as_object().map(|o| o.keys().collect()));
    assert_eq!(cli.json(["status"]).await?["total"], 2);
    failed(&cli.run(["status", "MISSING"]).await?, &["error: replication `MISSING` does not exist (404)"]);
    Ok(())
}

#[tokio::test]
async fn a_watch_prints_a_line_for_each_change() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let words = site.cli().start(["status", "--watch"], "")?;
    let json = site.cli().start(["status", "ORDERS", "--watch", "--json"], "")?;
    words.shows("Z ORDERS running, lag 0 messages and 0s, position 5, leader ").await?;
    json.shows("\"source_seq\":5").await?;
    site.publish("ORDERS", 1..=3).await?;
    words.shows("position 8,").await?;
    json.shows("\"source_seq\":8").await?;
    site.ask("config.delete", "ORDERS").await?;
    words.shows("Z ORDERS is gone").await?;
    // Nothing is said twice.
    let shown = words.shown();
    let lines: Vec<_> = shown.lines().filter_map(|line| line.split_once("Z ").map(|(_, words)| words)).collect();
    assert!(lines.windows(2).all(|two| two[0] != two[1]), "{shown}");
    let ended = json.end().await?;
    failed(&ended, &["`ORDERS` does not exist"]);
    let lines: Vec<Value> = ended.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let (refusal, rows) = lines.split_last().context("lines")?;
    assert!(rows.len() >= 2 && rows.iter().all(|row| row["replication"] == "ORDERS"), "{ended:?}");
    assert_eq!(refusal["error"]["code"], 404);
    Ok(())
}

#[tokio::test]
async fn a_watch_goes_on_when_the_service_was_away() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let watch = site.cli().start(["status", "--watch", "--timeout", "1s"], "")?;
    watch.shows("position 5,").await?;
    site.stop().await?;
    site.publish("ORDERS", 1..=1).await?;
    site.service.restart().await?;
    watch.shows("position 6,").await
}

#[tokio::test]
async fn on_a_terminal_a_watch_is_drawn_again_and_again_in_colours() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let watch = site.cli().on_terminal(["status", "--watch"])?;
    wait_for("three pictures", crate::harness::LIMIT, async || watch.shown().matches("\x1b[H").count() >= 3).await?;
    let shown = watch.shown();
    assert_eq!(shown.matches("\x1b[2J").count(), 1, "{shown:?}");
    assert!(shown.contains("RATE") && shown.contains("0/s"), "{shown:?}");
    assert!(shown.contains("\x1b[32mrunning\x1b[0m"), "{shown:?}");

    let plain = site.cli().env("NO_COLOR", "1").on_terminal(["status"])?.end().await?;
    assert!(plain.stdout.contains("running") && !plain.stdout.contains('\x1b'), "{plain:?}");
    let dumb = site.cli().on_terminal(["status", "ORDERS"])?.end().await?;
    assert!(dumb.stdout.contains("\x1b[32mrunning\x1b[0m"), "{dumb:?}");
    Ok(())
}

#[tokio::test]
async fn caught_up_is_waited_for() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 10).await?;
    let waited = cli.ok(["status", "--wait-caught-up"]).await?;
    assert_eq!(waited, "caught up: 1 replication\n");
    assert_eq!(cli.json(["status", "ORDERS", "--wait-caught-up"]).await?["replications"][0]["lag"]["messages"], 0);

    // A target that confirms nothing holds it up.
    site.target.freeze()?;
    site.publish("ORDERS", 1..=10).await?;
    site.row_when("ORDERS", "is behind", |row| row["lag"]["messages"].as_u64() > Some(0)).await?;
    let late = cli.run(["status", "--wait-caught-up", "--timeout", "1s"]).await?;
    failed(&late, &["not caught up within 1s: `ORDERS` is "]);
    let waiting = cli.start(["status", "ORDERS", "--wait-caught-up", "--timeout", "1m"], "")?;
    let (begun, thawed) = (Instant::now(), Duration::from_secs(1));
    wait_for("a while", Duration::from_secs(2), async || begun.elapsed() > thawed).await?;
    site.target.thaw()?;
    let ended = waiting.end().await?;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(0), "caught up: 1 replication\n"), "{ended:?}");
    site.copied("ORDERS", 20).await?;
    assert_eq!(site.at_target("ORDERS").await?, 20);
    Ok(())
}

#[tokio::test]
async fn the_progress_of_a_copy_is_drawn_on_a_terminal() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.filled("ORDERS", 2_000).await?;
    let slow = site.document_with("ORDERS", json!({"limits": {"messages_per_second": 400}}));
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), slow.to_string())?;
    let path = file.path().to_str().expect("a path");
    let mut running = cli.on_terminal(["config", "add", path, "--wait-caught-up"])?;
    running.shows("ORDERS is at revision").await?;
    running.shows(" messages (").await?;
    running.shows("/s, average ").await?;
    running.shows(" left").await?;
    running.types("")?;
    let ended = running.end().await?;
    assert!(ended.code == Some(0) && ended.stdout.contains("caught up: 1 replication"), "{ended:?}");
    assert_eq!(site.at_target("ORDERS").await?, 2_000);
    // A program gets no line about it.
    let quiet = cli.run(["status", "ORDERS", "--wait-caught-up"]).await?;
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("caught up: 1 replication\n", ""));
    Ok(())
}

#[tokio::test]
async fn who_will_not_catch_up_is_told() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 10).await?;
    site.put("BROKEN", "{}").await?;
    site.row_when("BROKEN", "is invalid", |row| row["state"] == "invalid").await?;
    for arguments in [&["status", "--wait-caught-up"][..], &["status", "BROKEN", "--wait-caught-up"]] {
        failed(&cli.run(arguments).await?, &["error: will not catch up: `BROKEN` is invalid: "]);
    }
    assert_eq!(cli.run(["status", "ORDERS", "--wait-caught-up"]).await?.code, Some(0));
    failed(&cli.run(["status", "MISSING", "--wait-caught-up"]).await?, &["`MISSING` does not exist"]);
    Ok(())
}

#[tokio::test]
async fn many_rows_are_chosen_sorted_and_summed_up() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    for id in ["S01", "S02", "OTHER"] {
        site.replicate(id, 5).await?;
        site.settled(id, 5).await?;
    }
    site.send("config.add", site.document("LATER")).await?;
    site.row_when("LATER", "is held", |row| row["state"] == "held").await?;
    cli.ok(["pause", "S02"]).await?;
    site.row_when("S02", "is paused", |row| row["state"] == "paused").await?;

    let ids = |table: &str| -> Vec<String> {
        let rows = table.lines().skip(1).take_while(|line| !line.is_empty());
        rows.filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
    };
    let table = cli.ok(["status"]).await?;
    assert_eq!(ids(&table), ["LATER", "S02", "OTHER", "S01"], "{table}");
    assert!(table.lines().nth(1).is_some_and(|line| line.contains("s ago: ")), "{table}");
    let advice = "\ndo: fix the cause that `last_error` names; it is tried every 10 s, at once with `retry` (LATER)\n";
    assert!(table.contains(advice), "{table}");
    assert_eq!(table.lines().last(), Some("4: 2 running, 1 paused, 1 held; lag 0, unknown of 2"), "{table}");
    assert_eq!(ids(&cli.ok(["status", "--sort", "id"]).await?), ["LATER", "OTHER", "S01", "S02"]);
    assert_eq!(ids(&cli.ok(["status", "S0*"]).await?), ["S02", "S01"]);
    assert_eq!(ids(&cli.ok(["status", "--state", "running,held"]).await?), ["LATER", "OTHER", "S01"]);
    assert_eq!(ids(&cli.ok(["status", "S01", "OTHER", "--state", "running"]).await?), ["OTHER", "S01"]);

    let json = cli.ok(["status", "S0*", "-o", "json"]).await?;
    let json: Value = serde_json::from_str(&json)?;
    assert_eq!((&json["total"], &json["replications"][1]["state"]), (&2.into(), &"paused".into()), "{json}");
    let yaml = cli.ok(["status", "LATER", "-o", "yaml"]).await?;
    let held = cli.json(["status", "LATER"]).await?["replications"][0].take();
    assert!(yaml.contains(&format!("do: {}\n", held["do"])) && yaml.contains("state: \"held\"\n"), "{yaml}");
    let wide = cli.ok(["status", "-o", "wide"]).await?;
    let error = held["last_error"]["message"].as_str().context("an error")?;
    assert!(wide.lines().next().is_some_and(|line| line.contains("EPOCH")) && wide.contains(error), "{wide}");

    failed(&cli.run(["status", "X*"]).await?, &["none of 4 replications matches `X*`"]);
    failed(&cli.run(["status", "S01", "OTER"]).await?, &["`OTER` does not exist, did you mean `OTHER`?"]);
    failed(&cli.run(["status", "LATR"]).await?, &["`LATR` does not exist, did you mean `LATER`? (404)"]);
    for (arguments, told) in [
        (&["status", "--state", "broken"][..], "a state is one of starting, running"),
        (&["status", "-o", "yaml", "--watch"], "shows the status once"),
    ] {
        let ended = cli.run(arguments).await?;
        assert!(ended.code == Some(2) && ended.stderr.contains(told), "{ended:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_small_terminal_shows_the_worst_and_counts_the_rest() -> Result<()> {
    let site = Site::small().await?;
    for index in 0..20 {
        site.put(&format!("R{index:02}"), "{}").await?;
    }
    let all_known = async || site.ask("status", r#"{"limit":0}"#).await.is_ok_and(|reply| reply.body["total"] == 20);
    wait_for("all to be known", crate::harness::LIMIT, all_known).await?;
    let shown = site.cli().env("NO_COLOR", "1").on_terminal_of((80, 16), ["status"])?.end().await?.stdout;
    let lines: Vec<_> = shown.lines().map(|line| line.trim_end_matches('\r')).collect();
    let mut rows = lines.iter().take_while(|line| !line.is_empty());
    assert!(lines.len() <= 15 && rows.all(|line| line.chars().count() <= 80), "{lines:#?}");
    assert!(lines.iter().any(|line| line.ends_with(" more")), "{lines:#?}");
    assert_eq!(lines.last(), Some(&"20: 20 invalid; lag unknown"));
    let wide = site.cli().on_terminal_of((80, 16), ["status", "-o", "wide"])?.end().await?.stdout;
    assert!((0..20).all(|index| wide.contains(&format!("R{index:02}"))), "{wide}");
    let watch = site.cli().on_terminal_of((80, 16), ["status", "--watch"])?;
    watch.shows(" more\x1b[K").await
}
