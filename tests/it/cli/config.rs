//! `stream-replicator config`, as people and scripts use it.

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::cli::Ended;
use crate::harness::{Cli, LIMIT, Role, Server, Site, connect, wait_for};

#[track_caller]
fn failed(ended: &Ended, code: i32, expect: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended:?}");
    for text in expect {
        assert!(ended.stderr.contains(text), "`{text}` is not in {ended:?}");
    }
}

#[tokio::test]
async fn a_document_goes_in_is_shown_listed_changed_and_removed() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 3).await?;
    let cli = site.cli();
    let document = site.document("ORDERS");

    let added = cli.run_with(["config", "add", "-"], &document.to_string()).await?;
    assert_eq!((added.code, added.stdout.as_str()), (Some(0), "ORDERS is at revision 2\n"), "{added:?}");
    site.settled("ORDERS", 3).await?;

    let raw = cli.ok(["config", "get", "ORDERS", "--raw"]).await?;
    assert_eq!(serde_json::from_str::<Value>(&raw)?, document);
    let shown = cli.run(["config", "get", "ORDERS"]).await?;
    assert_eq!((shown.stdout, shown.stderr.as_str()), (raw, "ORDERS, revision 2\n"));
    let reply = json!({"replication": "ORDERS", "revision": 2, "config": document});
    assert_eq!(cli.json(["config", "get", "ORDERS"]).await?, reply);

    // Every column begins at the same offset.
    let listed = cli.ok(["config", "ls"]).await?;
    assert_eq!(listed, "REPLICATION  STATE    REVISION  ORIGIN\nORDERS       running         2  kv\n");
    let row = json!({"replication": "ORDERS", "revision": 2, "origin": "kv", "state": "running"});
    assert_eq!(cli.json(["config", "ls"]).await?["replications"], json!([row]));

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("orders.json");
    std::fs::write(&file, site.document_with("ORDERS", json!({"max_age": "1d"})).to_string())?;
    let update = ["config".as_ref(), "update".as_ref(), file.as_os_str()];
    let updated = cli.ok(update).await?;
    let begin = format!("--- ORDERS (revision 2)\n+++ ORDERS ({})\n@@ ", file.display());
    assert!(updated.starts_with(&begin) && updated.contains("\n+  \"max_age\": \"1d\"\n"), "{updated}");
    assert!(updated.ends_with("\nORDERS is at revision 3\n"), "{updated}");
    let late = cli.run(update.into_iter().chain(["--revision".as_ref(), "2".as_ref()])).await?;
    failed(&late, 1, &["error: replication `ORDERS` is at revision 3 (409)"]);

    assert_eq!(cli.ok(["config", "rm", "ORDERS", "--force"]).await?, "ORDERS is removed\n");
    failed(&cli.run(["config", "get", "ORDERS"]).await?, 1, &["`ORDERS` does not exist (404)"]);
    assert_eq!(cli.ok(["config", "ls"]).await?, "REPLICATION  STATE  REVISION  ORIGIN\n");
    Ok(())
}

#[tokio::test]
async fn a_removal_can_keep_the_position() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    for (keep, expect) in [(true, true), (false, false)] {
        site.add("ORDERS", json!({})).await?;
        site.row_when("ORDERS", "is there", |row| row["epoch"].as_u64() > Some(0)).await?;
        let arguments = ["config", "rm", "MISSING", "ORDERS", "--force"];
        let ended = cli.run(arguments.into_iter().chain(keep.then_some("--keep"))).await?;
        // One after the other, whatever becomes of the first.
        failed(&ended, 1, &["`MISSING` does not exist"]);
        assert_eq!(ended.stdout, "ORDERS is removed\n");
        assert_eq!(site.position("ORDERS").await?.is_some(), expect, "keep: {keep}");
    }
    Ok(())
}

#[tokio::test]
async fn a_removal_asks_and_needs_force_where_nobody_can_be_asked() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.add("ORDERS", json!({})).await?;
    failed(&cli.run(["config", "rm", "ORDERS"]).await?, 2, &["`--force`"]);
    for (answer, code) in [("\n", 1), ("n\n", 1), ("y\n", 0)] {
        let mut running = cli.on_terminal(["config", "rm", "ORDERS"])?;
        running.shows("remove ORDERS (with position and state)? [y/N]").await?;
        assert_eq!(site.ask("config.get", "ORDERS").await?.error, None);
        running.types(answer)?;
        let ended = running.end().await?;
        assert_eq!(ended.code, Some(code), "{answer:?}: {ended:?}");
    }
    assert_eq!(site.ask("config.get", "ORDERS").await?.error, Some(404));
    Ok(())
}

#[tokio::test]
async fn every_problem_is_told_with_its_path_and_no_secret() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    let document =
        json!({"streem": "A", "source_url": "http://u:hunter2@h", "target_url": "nats://h", "max_age": "soon"});
    for verb in ["add", "update"] {
        let ended = cli.run_with(["config", verb, "-"], &document.to_string()).await?;
        let lines = ["\n  /streem: ", "did you mean `stream`?", "\n  /source_url: ", "\n  /max_age: ", "\n  /stream: "];
        failed(&ended, 1, &lines);
        failed(&ended, 1, &["error: the document is not valid (400)\n"]);
        assert!(!ended.stderr.contains("hunter2") && ended.stdout.is_empty(), "{ended:?}");
    }
    let ended = cli.run_with(["config", "add", "-", "--json"], "{\"stream\": \"A\"").await?;
    failed(&ended, 1, &["error: the document is not valid (400)\n  document: the document is not valid JSON: "]);
    // A program reads the refusal as it was sent.
    let body: Value = serde_json::from_str(&ended.stdout)?;
    assert_eq!((&body["error"]["code"], &body["error"]["problems"][0]["path"]), (&json!(400), &json!("")));
    failed(&cli.run(["config", "add", "/no/such/file"]).await?, 1, &["cannot read `/no/such/file`: No such file"]);
    Ok(())
}

#[tokio::test]
async fn a_document_that_somebody_broke_is_shown_with_what_is_wrong() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.put("BROKEN", json!({"stream": "BROKEN", "source_url": "nats://u:hunter2@h"}).to_string()).await?;
    let shown = cli.run(["config", "get", "BROKEN"]).await?;
    assert!(shown.stderr.starts_with("BROKEN, revision 2\n  /target_url: `target_url` or "), "{shown:?}");
    assert!(shown.stdout.contains("nats://u:***@h") && !shown.stdout.contains("hunter2"), "{shown:?}");
    let raw = cli.run(["config", "get", "BROKEN", "--raw"]).await?;
    assert!(serde_json::from_str::<Value>(&raw.stdout).is_ok() && raw.stderr.contains("/target_url: "), "{raw:?}");
    Ok(())
}

#[tokio::test]
async fn the_schema_is_the_one_of_the_service() -> Result<()> {
    let site = Site::small().await?;
    let schema: Value = serde_json::from_str(include_str!("../../../schemas/replication.json"))?;
    assert_eq!(site.cli().json(["config", "schema"]).await?, schema);
    assert_eq!(serde_json::from_str::<Value>(&site.cli().ok(["config", "schema"]).await?)?, schema);
    Ok(())
}

#[tokio::test]
async fn wrong_usage_ends_with_2_and_says_what_is_wrong() -> Result<()> {
    // Nothing of this asks a server.
    let cli = Cli::new("nats://127.0.0.1:1");
    let check = async |arguments: &[&str], expect: &str| {
        failed(&cli.run(arguments).await?, 2, &[expect]);
        anyhow::Ok(())
    };
    check(&[], "Usage: stream-replicator").await?;
    check(&["config"], "Usage: stream-replicator config").await?;
    check(&["config", "add"], "FILE").await?;
    check(&["config", "rm"], "ID").await?;
    check(&["pause"], "ID").await?;
    check(&["status", "--colour"], "--colour").await?;
    check(&["status", "--watch", "--wait-caught-up"], "cannot be used with").await?;
    check(&["status", "--timeout", "soon"], "soon").await?;
    check(&["status", "--prefix", "a.*"], "'a.*'").await?;
    check(&["position", "ORDERS"], "--source-seq").await?;
    check(&["position", "ORDERS", "--source-seq", "1", "--time", "1h"], "cannot be used with").await?;
    check(&["position", "ORDERS", "--time", "yesterday"], "neither a time such as").await?;
    check(&["position", "ORDERS", "--source-seq", "-1"], "-1").await?;
    check(&["events", "--kind", "explosion"], "started, stopped, paused").await?;
    check(&["events", "a b"], "`a b` is not the id of a replication").await?;
    check(&["completions", "cmd"], "'cmd'").await?;
    check(&["status", "--server", "ftp://h"], "`ftp://`").await?;
    Ok(())
}

#[tokio::test]
async fn nobody_who_answers_is_told_with_subject_and_server() -> Result<()> {
    let server = Server::start(Role::Control).await?;
    let cli = Cli::new(&server.url());
    let address = format!("127.0.0.1:{}", server.port());
    let ended = cli.run(["status", "--prefix", "elsewhere"]).await?;
    failed(&ended, 1, &["no service answers on `elsewhere.status`", &address, "--prefix"]);
    let document = json!({"stream": "A"}).to_string();
    let ended = cli.run_with(["config", "add", "-"], &document).await?;
    failed(&ended, 1, &["no service answers on `replicator.config.validate`", &address]);

    // Somebody listens who never answers, and somebody who talks about something else.
    let client = connect(&server.url()).await?;
    let _silent = client.subscribe("silent.status").await?;
    let mut other = client.subscribe("other.status").await?;
    client.flush().await?;
    let ended = cli.run(["status", "--prefix", "silent", "--timeout", "300ms"]).await?;
    failed(&ended, 1, &["no answer on `silent.status`", &address, "within 300ms"]);
    let asked = cli.start(["status", "--prefix", "other"], "")?;
    let request = futures_util::StreamExt::next(&mut other).await.expect("a request");
    client.publish(request.reply.expect("a reply subject"), "hello".into()).await?;
    failed(&asked.end().await?, 1, &["the answer on `other.status`", "is not understood"]);
    Ok(())
}

#[tokio::test]
async fn a_refused_login_is_reported_without_the_password() -> Result<()> {
    let config = "authorization { users: [{user: me, password: \"right\"}] }";
    let server = Server::builder(Role::Control).config(config).start().await?;
    let ended = Cli::new(&server.url_as("me:hunter2")).run(["status"]).await?;
    failed(&ended, 1, &["cannot connect to `127.0.0.1:", "Authorization Violation"]);
    assert!(!ended.stderr.contains("hunter2"), "{ended:?}");
    let ended = Cli::new("nats://me:hunter2@127.0.0.1:1").run(["status"]).await?;
    failed(&ended, 1, &["cannot connect to `127.0.0.1:1`", "refused"]);
    assert!(!ended.stderr.contains("hunter2"), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn what_the_server_does_not_permit_is_told() -> Result<()> {
    let config = "authorization { users: [{user: me, password: p, permissions: {publish: {deny: \"replicator.>\"}}}] }";
    let server = Server::builder(Role::Control).config(config).start().await?;
    let ended = Cli::new(&server.url_as("me:p")).run(["status", "--timeout", "500ms"]).await?;
    let refusal = "permissions violation for publish to \"replicator.status\"";
    failed(&ended, 1, &["no answer on `replicator.status`"]);
    assert!(ended.stderr.to_lowercase().contains(refusal), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn lists_of_several_pages_are_shown_as_one() -> Result<()> {
    const MANY: usize = 120;
    let control = Server::builder(Role::Control).config("max_payload: 8192").start().await?;
    let target = Server::start(Role::Target).await?;
    let site = Site::builder().on(control, target).control_at_source().start().await?;
    for i in 0..MANY {
        site.put(&format!("R{i:03}"), "{}").await?;
    }
    let last = format!("R{:03}", MANY - 1);
    let all_known = async || site.ask("status", r#"{"limit":0}"#).await.is_ok_and(|reply| reply.body["total"] == MANY);
    wait_for("all to be known", LIMIT, all_known).await?;
    // It is several pages indeed.
    for endpoint in ["config.list", "status"] {
        let page = site.ask(endpoint, "").await?.body["replications"].as_array().map(Vec::len);
        assert!(page < Some(MANY), "{page:?}");
    }
    for arguments in [&["config", "ls"][..], &["status"]] {
        let json = site.cli().json(arguments).await?;
        let rows = json["replications"].as_array().map_or(0, Vec::len);
        assert_eq!(
            (rows, &json["total"], &json["limit"], &json["offset"]),
            (MANY, &json!(MANY), &json!(MANY), &json!(0))
        );
        let text = site.cli().ok(arguments).await?;
        let rows: Vec<_> = text.lines().skip(1).take_while(|line| !line.is_empty()).collect();
        assert_eq!(rows.len(), MANY);
        assert!(rows.last().is_some_and(|line| line.starts_with(&last)), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn a_closed_output_changes_neither_work_nor_exit_code() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.add("ORDERS", json!({})).await?;
    for arguments in [
        &["config", "schema"][..],
        &["config", "ls"],
        &["status", "--json"],
        &["status", "--watch"],
        &["man"],
        &["completions", "bash"],
        &["config", "rm", "ORDERS", "--force"],
    ] {
        let ended = cli.unread(arguments).await?;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
    assert_eq!(site.ask("config.get", "ORDERS").await?.error, Some(404));
    let ended = cli.unread(["config", "rm", "ORDERS", "--force"]).await?;
    failed(&ended, 1, &["does not exist"]);
    Ok(())
}

#[tokio::test]
async fn flags_add_a_replication_that_was_checked_first() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 4).await?;
    let cli = site.cli();
    let document = site.document("ORDERS");
    let url = |side: &str| document[side].as_str().unwrap_or_default().to_owned();
    let (source, target) = (url("source_url"), url("target_url"));
    let add = async |more: &[&str]| {
        let arguments = ["config", "add", "EU", "--source", &source, "--target", &target];
        cli.run(arguments.iter().chain(more)).await
    };
    let missing = add(&["--stream", "MISSING"]).await?;
    failed(&missing, 1, &["could not run, nothing was added; `--no-preflight`"]);
    assert!(missing.stdout.starts_with("not valid\n") && missing.stdout.contains("failed"), "{missing:?}");
    failed(&add(&["--stream", "ORDERS", "--set", "max_agee=1d"]).await?, 1, &["did you mean `max_age`?"]);
    let dry = add(&["--stream", "ORDERS", "--dry-run"]).await?;
    assert!(dry.code == Some(0) && dry.stdout.starts_with("{\n  \"stream\": \"ORDERS\",\n  \"id\": \"EU\""), "{dry:?}");
    assert_eq!(site.ask("config.list", "").await?.body["total"], 0);

    let flags = ["--stream", "ORDERS", "--filter", "orders.>", "--set", "limits.messages_in_flight=50"];
    let added = add(&flags).await?;
    assert_eq!((added.code, added.stdout.as_str()), (Some(0), "EU is at revision 2\n"), "{added:?}");
    let stored = site.ask("config.get", "EU").await?.body["config"].take();
    assert_eq!((&stored["id"], &stored["filter_subjects"]), (&json!("EU"), &json!(["orders.>"])), "{stored}");
    assert_eq!(stored["limits"]["messages_in_flight"], 50);
    site.settled("EU", 4).await?;
    assert_eq!(
        cli.run(["config", "add", "LATER", "--source", &source, "--target", &target, "--no-preflight"]).await?.code,
        Some(0)
    );
    let usage = cli.run(["config", "add", "--source", &source]).await?;
    failed(&usage, 2, &["`--stream STREAM`"]);
    failed(&cli.run_with(["config", "add", "-"], " \n").await?, 1, &["`stdin` is empty"]);
    Ok(())
}

#[tokio::test]
async fn fields_are_set_and_removed_and_the_change_is_shown() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    let target = site.target.url_as("copy:hunter2");
    for id in ["S01", "S02"] {
        site.add(id, json!({"target_url": target})).await?;
    }
    let set = cli.ok(["config", "set", "S0*", "max_age=1d", "limits.messages_in_flight=50"]).await?;
    for text in ["--- S01 (revision 2)\n+++ S01 (as set)\n", "\n+  \"max_age\": \"1d\"", "S02 is at revision 5\n"] {
        assert!(set.contains(text) && !set.contains("hunter2"), "`{text}` is not in {set}");
    }
    let entry = site.bucket("REPLICATOR_CONFIG").await?.get("S01").await?.unwrap_or_default();
    assert!(String::from_utf8_lossy(&entry).contains("copy:hunter2@"), "the secret is kept");
    cli.ok(["config", "set", "S01", "max_age="]).await?;
    let config = site.ask("config.get", "S01").await?.body["config"].take();
    assert_eq!((&config["max_age"], &config["limits"]), (&Value::Null, &json!({"messages_in_flight": 50})));
    let dry = cli.ok(["config", "set", "S01", "max_age=2d", "--dry-run"]).await?;
    assert!(dry.contains("+  \"max_age\": \"2d\"") && !dry.contains("is at revision"), "{dry}");
    failed(&cli.run(["config", "set", "S01", "max_age=soon"]).await?, 1, &["/max_age: "]);
    failed(&cli.run(["config", "set", "S01", "stream=OTHER"]).await?, 1, &["makes this `OTHER`"]);
    failed(&cli.run(["config", "set", "S01", "stream.x=1"]).await?, 1, &["`stream` has no part `x`"]);
    failed(&cli.run(["config", "set", "S01", "max_age"]).await?, 2, &["write it as `path=value`"]);
    Ok(())
}
