//! Links on real servers: fields that replications share, changed at one place.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::checker::Expect;
use crate::harness::client::refused;
use crate::harness::site::merged;
use crate::harness::{Outgoing, Role, Server, Site, request};

/// Logins of the target: the second one comes during a rotation.
const TWO_LOGINS: &str = r#"accounts { A { jetstream: enabled, users: [{user: one, password: "first-word"}, {user: two, password: "second-word"}] } }"#;

fn link(site: &Site, more: Value) -> Value {
    merged(json!({"name": "eu", "source_url": site.source.url(), "target_url": site.target.url()}), more)
}

async fn add_link(site: &Site, more: Value) -> Result<Value> {
    request(&site.client, "replicator.link.add", link(site, more)).await
}

async fn add(site: &Site, document: Value) -> Result<Value> {
    request(&site.client, "replicator.config.add", document).await
}

fn error_text(row: &Value) -> &str {
    row["last_error"]["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_replication_has_the_fields_of_its_link() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    let added = add_link(&site, json!({"target_subject_prefix": "eu", "description": "of the link"})).await?;
    assert_eq!((&added["link"], &added["used_by"]), (&json!("eu"), &json!(0)));
    add(&site, json!({"stream": "ORDERS", "link": "eu", "description": "its own"})).await?;
    site.settled("ORDERS", 5).await?;
    let stored = site.target().await?.read_stream("ORDERS").await?;
    assert!(stored.iter().all(|message| message.subject.starts_with("eu.orders.")), "{stored:?}");
    // As written.
    let shown = site.ask("config.get", "ORDERS").await?.body;
    assert_eq!(shown["config"], json!({"stream": "ORDERS", "link": "eu", "description": "its own"}), "{shown}");
    assert_eq!(shown["problems"], Value::Null, "{shown}");
    let link = site.ask("link.get", "eu").await?.body;
    assert_eq!((&link["used_by"], &link["problems"]), (&json!(["ORDERS"]), &Value::Null), "{link}");
    let all = site.ask("link.list", "").await?.body;
    let expect = json!([{"link": "eu", "revision": added["revision"], "valid": true, "used_by": 1}]);
    assert_eq!(all["links"], expect, "{all}");
    // Both clusters are asked with the servers of the link.
    let valid = site.send("config.validate", json!({"stream": "OTHER", "link": "eu"})).await?.body;
    assert_eq!(valid["problems"][0]["path"], "/stream", "{valid}");
    assert!(valid["preflight"]["target"]["server"].as_str().is_some_and(|name| !name.is_empty()), "{valid}");
    Ok(())
}

#[tokio::test]
async fn a_link_that_is_missing_is_named_until_it_is_there() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    let document = json!({"stream": "ORDERS", "link": "eu"});
    let reply = site.send("config.add", document.clone()).await?;
    refused(&reply, 400, "not valid");
    let problem = &reply.body["error"]["problems"][0];
    assert_eq!(problem["path"], "/link", "{problem}");
    assert!(problem["message"].as_str().is_some_and(|text| text.contains("link `eu` does not exist")), "{problem}");
    // By hand it can be there before its link.
    site.put("ORDERS", document.to_string()).await?;
    let row = site.row_when("ORDERS", "is invalid", |row| row["state"] == "invalid").await?;
    assert!(error_text(&row).contains("link `eu` does not exist"), "{row}");
    assert!(row["do"].as_str().is_some_and(|text| text.contains("last_error")), "{row}");
    site.put("links/eu", "{").await?;
    site.row_when("ORDERS", "names the link", |row| error_text(row).contains("link `eu` is not valid")).await?;
    let broken = site.ask("link.get", "eu").await?.body;
    assert!(broken["problems"][0]["message"].as_str().is_some_and(|text| text.contains("JSON")), "{broken}");
    site.put("links/eu", link(&site, json!({})).to_string()).await?;
    let row = site.settled("ORDERS", 5).await?;
    assert_eq!(row["last_error"]["current"], json!(false), "{row}");
    Ok(())
}

#[tokio::test]
async fn a_broken_or_deleted_link_keeps_what_runs() -> Result<()> {
    let mut site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    add_link(&site, json!({"max_age": "1h"})).await?;
    let revision = add(&site, json!({"stream": "ORDERS", "link": "eu"})).await?["revision"].clone();
    site.settled("ORDERS", 5).await?;
    let events = site.listen().await?;
    let mut copied = 5;
    let broken = r#"{"max_age": "1h", "max_age": "soon"}"#;
    for (by_hand, text) in [(Some(broken), "occurs more than once"), (None, "link `eu` does not exist")] {
        match by_hand {
            Some(value) => drop(site.put("links/eu", value).await?),
            None => site.bucket("REPLICATOR_CONFIG").await?.delete("links/eu").await?,
        }
        let told = |row: &Value| row["last_error"]["current"] == true && error_text(row).contains(text);
        let row = site.row_when("ORDERS", "says what is wrong", told).await?;
        assert_eq!((&row["state"], &row["config_revision"]), (&json!("running"), &revision), "{row}");
        assert!(row["do"].as_str().is_some_and(|text| text.contains("newest revision")), "{row}");
        copied += 5;
        site.publish("ORDERS", 1..=5).await?;
        site.copied("ORDERS", copied).await?;
    }
    assert_eq!(events.kinds("ORDERS"), ["config-rejected"; 2], "the run was touched");
    // Also after a start, when nothing is remembered.
    site.service.kill()?;
    site.publish("ORDERS", 1..=5).await?;
    site.service.restart().await?;
    site.copied("ORDERS", copied + 5).await?;
    let told = |row: &Value| row["state"] == "running" && error_text(row).contains("link `eu` does not exist");
    site.row_when("ORDERS", "runs, and says what is wrong", told).await?;
    // The link comes back.
    add_link(&site, json!({"max_age": "2h"})).await?;
    site.row_when("ORDERS", "is well", |row| row["state"] == "running" && row["last_error"]["current"] == false)
        .await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn a_link_in_use_is_not_deleted_nor_broken_by_request() -> Result<()> {
    let site = Site::small().await?;
    add_link(&site, json!({})).await?;
    refused(&site.send("link.add", link(&site, json!({}))).await?, 409, "exists at revision");
    for stream in ["A", "B", "C", "D", "E", "F"] {
        site.filled(stream, 1).await?;
        add(&site, json!({"stream": stream, "link": "eu"})).await?;
    }
    refused(&site.ask("link.delete", "eu").await?, 409, "used by `A`, `B`, `C`, `D`, `E`, 1 more");
    // Without a target none of them could run.
    let without = json!({"name": "eu", "source_url": site.source.url()});
    let reply = site.send("link.update", without.clone()).await?;
    refused(&reply, 400, "not valid");
    let problem = &reply.body["error"]["problems"][0];
    assert_eq!(problem["path"], "/used_by/A/target_url", "{problem}");
    let checked = site.send("link.validate", without).await?.body;
    assert_eq!((&checked["valid"], &checked["used_by"][5]), (&json!(false), &json!("F")), "{checked}");
    let wrong = site.send("link.update", link(&site, json!({"stream": "A"}))).await?;
    assert_eq!(wrong.body["error"]["problems"][0]["path"], "/stream", "{wrong:?}");
    for stream in ["A", "B", "C", "D", "E", "F"] {
        request(&site.client, "replicator.config.delete", json!({"replication": stream})).await?;
    }
    assert_eq!(site.ask("link.delete", "eu").await?.error, None);
    refused(&site.ask("link.get", "eu").await?, 404, "link `eu` does not exist");
    refused(&site.ask("link.delete", "eu").await?, 404, "link `eu` does not exist");
    refused(&site.ask("link.get", "e.u").await?, 400, "the name of a link has");
    Ok(())
}

#[tokio::test]
async fn secrets_of_a_link_are_masked_and_kept() -> Result<()> {
    let target = Server::builder(Role::Target).config(TWO_LOGINS).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).control_at_source().start().await?;
    site.filled("ORDERS", 5).await?;
    let url = site.target.url_as("one:first-word");
    let added = add_link(&site, json!({"target_url": url})).await?;
    add(&site, json!({"stream": "ORDERS", "link": "eu"})).await?;
    site.row_when("ORDERS", "is settled", |row| row["position"]["source_seq"] == 5).await?;
    let mut shown = site.ask("link.get", "eu").await?.body;
    assert!(shown["config"]["target_url"].as_str().is_some_and(|url| url.contains("one:***@")), "{shown}");
    // What was shown comes back with another field, and the secret stays.
    shown["config"]["max_age"] = "1h".into();
    let updated = site.send("link.update", shown["config"].clone()).await?;
    assert_eq!((updated.error, &updated.body["used_by"]), (None, &json!(1)), "{updated:?}");
    assert!(updated.body["revision"].as_u64() > added["revision"].as_u64(), "{updated:?}");
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    let stored = bucket.get("links/eu").await?.context("the link")?;
    assert!(String::from_utf8_lossy(&stored).contains("one:first-word@"));
    // Not with servers of its own, nor with another authority.
    let elsewhere = link(&site, json!({"target_url": "nats://one:***@127.0.0.1:1"}));
    assert_eq!(site.send("link.update", elsewhere).await?.body["error"]["problems"][0]["path"], "/target_url");
    let reply = site.send("config.add", json!({"stream": "X", "link": "eu", "target_tls": {"ca": "/ca.pem"}})).await?;
    assert_eq!(reply.body["error"]["problems"][0]["path"], "/target_tls", "{reply:?}");
    let revision = updated.body["revision"].to_string();
    let stale = ("Replicator-Expected-Revision", added["revision"].to_string());
    let reply = site.ask_with("link.update", (stale.0, &stale.1), shown["config"].to_string()).await?;
    assert_eq!(reply.code.as_deref(), Some("409"), "{reply:?}");
    let reply = site.ask_with("link.update", (stale.0, &revision), shown["config"].to_string()).await?;
    assert_eq!(reply.code, None, "{reply:?}");
    Ok(())
}

/// So many replications of one link, under load, while the login changes.
async fn rotate(count: usize) -> Result<()> {
    let target = Server::builder(Role::Target).config(TWO_LOGINS).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let streams: Vec<String> = (0..count).map(|number| format!("S{number:03}")).collect();
    let mut source = site.source().await?;
    for stream in &streams {
        source.create_stream(stream, json!({"subjects": [format!("{}.>", stream.to_lowercase())]})).await?;
    }
    add_link(&site, json!({"target_url": site.target.url_as("one:first-word")})).await?;
    for stream in &streams {
        add(&site, json!({"stream": stream, "link": "eu"})).await?;
    }
    let publish = async |source: &mut crate::harness::Raw, rounds: std::ops::Range<u32>| {
        for round in rounds {
            let messages =
                streams.iter().map(|stream| Outgoing::new(format!("{}.x", stream.to_lowercase()), round.to_string()));
            source.publish_all(messages).await?;
        }
        anyhow::Ok(())
    };
    let login = |word: &str| format!(r#"accounts {{ A {{ jetstream: enabled, users: [{word}] }} }}"#);
    publish(&mut source, 0..10).await?;
    let events = site.listen().await?;
    let begun = Instant::now();
    // The link first, the server later, while messages come.
    let new = link(&site, json!({"target_url": site.target.url_as("two:second-word")}));
    let changed = request(&site.client, "replicator.link.update", new).await?;
    assert_eq!(changed["used_by"], count, "{changed}");
    publish(&mut source, 10..20).await?;
    let mut site = site;
    site.target.reload_with(&login(r#"{user: two, password: "second-word"}"#)).await?;
    publish(&mut source, 20..30).await?;
    // The server first, the link later: for a moment no login is right.
    site.target.reload_with(&login(r#"{user: two, password: "third-word"}"#)).await?;
    publish(&mut source, 30..40).await?;
    let new = link(&site, json!({"target_url": site.target.url_as("two:third-word")}));
    request(&site.client, "replicator.link.update", new).await?;
    publish(&mut source, 40..50).await?;
    for stream in &streams {
        site.settled(stream, 50).await?;
    }
    println!("{count} replications followed two rotations in {:?}", begun.elapsed());
    events.quiet(&["held", "gap", "target-reset", "source-reset"])?;
    let mut target = crate::harness::Raw::connect(&site.target.url_as("two:third-word")).await?;
    for stream in &streams {
        let expect = Expect::copy_of(stream);
        crate::harness::checker::compare_streams(&mut source, &mut target, stream, &expect).await?.verify()?;
    }
    Ok(())
}

#[tokio::test]
async fn a_new_login_reaches_all_without_a_held_event() -> Result<()> {
    rotate(25).await
}

#[tokio::test]
#[ignore = "takes a minute: make check-long"]
async fn a_new_login_reaches_two_hundred() -> Result<()> {
    rotate(200).await
}

#[tokio::test]
async fn only_replications_that_a_link_changes_restart() -> Result<()> {
    let site = Site::small().await?;
    site.filled("A", 2).await?;
    site.filled("B", 2).await?;
    add_link(&site, json!({"target_subject_prefix": "x"})).await?;
    add(&site, json!({"stream": "A", "link": "eu"})).await?;
    add(&site, json!({"stream": "B", "link": "eu", "target_subject_prefix": "y"})).await?;
    site.settled("A", 2).await?;
    site.settled("B", 2).await?;
    let mut events = site.listen().await?;
    let new = link(&site, json!({"target_subject_prefix": "z", "no_target_create": false, "target_update": true}));
    // What is the same in words is the same.
    let same = link(&site, json!({"target_subject_prefix": "x", "no_target_create": false}));
    request(&site.client, "replicator.link.update", same).await?;
    let new = merged(new, json!({"target_update": false}));
    request(&site.client, "replicator.link.update", new).await?;
    events.wait("config-changed", "A").await?;
    site.publish("A", 3..=4).await?;
    site.publish("B", 3..=4).await?;
    site.settled("B", 4).await?;
    assert_eq!(events.kinds("B"), Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn links_are_handled_from_the_command_line() -> Result<()> {
    let site = Site::small().await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("link.yaml");
    let text = format!("name: eu\nsource_url: {}\ntarget_url: {}\n", site.source.url(), site.target.url());
    std::fs::write(&file, text)?;
    let path = file.to_str().context("a path")?;
    let cli = site.cli();
    assert_eq!(cli.ok(["link", "validate", path]).await?, "valid\n");
    assert!(cli.ok(["link", "add", path]).await?.starts_with("eu is at revision "));
    assert!(cli.ok(["link", "update", path]).await?.starts_with("eu is at revision "));
    assert!(cli.ok(["link", "get", "eu"]).await?.contains("\"source_url\""));
    let list = cli.ok(["link", "list"]).await?;
    assert!(list.contains("eu") && list.contains("valid"), "{list}");
    assert_eq!(cli.ok(["link", "rm", "eu"]).await?, "eu is removed\n");
    Ok(())
}

#[tokio::test]
async fn a_document_is_shown_with_the_fields_of_its_link() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("ORDERS", json!({})).await?;
    let login = site.source.url_as("u:hunter2");
    add_link(&site, json!({"source_url": login, "max_age": "1h"})).await?;
    add(&site, json!({"stream": "ORDERS", "link": "eu", "max_age": "2h"})).await?;
    let cli = site.cli();
    let written: Value = serde_json::from_str(&cli.ok(["config", "get", "ORDERS"]).await?)?;
    assert_eq!(written, json!({"stream": "ORDERS", "link": "eu", "max_age": "2h"}));
    let resolved: Value = serde_json::from_str(&cli.ok(["config", "get", "ORDERS", "--resolved"]).await?)?;
    let masked = login.replace("hunter2", "***");
    assert_eq!((&resolved["source_url"], &resolved["max_age"]), (&json!(masked), &json!("2h")), "{resolved}");
    assert_eq!((&resolved["target_url"], resolved.get("link")), (&json!(site.target.url()), None), "{resolved}");
    Ok(())
}

#[tokio::test]
async fn links_are_exported_applied_and_imported() -> Result<()> {
    let site = Site::small().await?;
    let folder = tempfile::tempdir()?;
    let cli = site.cli();
    let login = site.source.url_as("u:hunter2");
    add_link(&site, json!({"source_url": login})).await?;
    add(&site, json!({"stream": "ORDERS", "link": "eu"})).await?;
    add(&site, json!({"id": "all", "streams": ["B_*"], "link": "eu"})).await?;

    let out = folder.path().join("out");
    let path = out.to_str().context("a path")?;
    let written = cli.ok(["config", "export", "--dir", path]).await?;
    assert_eq!(written, format!("{path}/ORDERS.json\n{path}/all.json\n{path}/link eu.json\n"));
    let same = cli.ok(["config", "apply", path]).await?;
    assert!(same.ends_with("0 added, 0 updated, 3 unchanged, 0 removed\n"), "{same}");
    // The secret is not in the files; elsewhere it has to be written.
    let link = std::fs::read_to_string(out.join("link eu.json"))?;
    assert!(!link.contains("hunter2"), "{link}");
    std::fs::write(
        out.join("link eu.json"),
        link.replace("u:***", "u:hunter2").replacen('{', "{\"max_age\": \"1h\",", 1),
    )?;
    for id in ["ORDERS", "all"] {
        cli.ok(["config", "rm", id, "--force"]).await?;
    }
    cli.ok(["link", "rm", "eu"]).await?;
    let applied = cli.json(["config", "apply", path]).await?;
    let results: Vec<_> = applied["results"].as_array().context("results")?.iter().collect();
    assert_eq!((&results[0]["link"], &results[0]["action"]), (&json!("eu"), &json!("added")), "{applied}");
    assert_eq!((&results[1]["replication"], results.len()), (&json!("ORDERS"), 3), "{applied}");
    site.filled("ORDERS", 5).await?;
    site.copied("ORDERS", 5).await?;
    // Removing what is in no file leaves links alone.
    let pruned = cli.ok(["config", "apply", &format!("{path}/ORDERS.json"), "--prune", "--force"]).await?;
    assert!(pruned.ends_with("1 unchanged, 1 removed\n"), "{pruned}");
    assert!(cli.ok(["link", "ls"]).await?.contains("eu"));

    let yaml = cli.ok(["config", "export"]).await?;
    assert!(yaml.contains("links:\n  - name: \"eu\"") || yaml.contains("name: \"eu\""), "{yaml}");
    let file = folder.path().join("sr.yaml");
    std::fs::write(&file, &yaml)?;
    let file = file.to_str().context("a path")?;
    let imported = cli.ok(["config", "import", file]).await?;
    assert!(imported.contains("link eu: unchanged") && !imported.contains("hunter2"), "{imported}\n{yaml}");
    let shown = cli.ok(["config", "get", "ORDERS"]).await?;
    assert!(shown.contains("\"link\": \"eu\"") && !shown.contains("source_url"), "{shown}");
    Ok(())
}
