//! `drift`: differences between the target streams and what they would be created with, named and mended.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, kv, object_store};
use serde_json::{Value, json};

use crate::harness::{
    Raw, Role, SITE, Server, Site,
    cli::failed,
    client::{connect, refused, request},
    server::free_port,
    site::merged,
};

async fn drift(site: &Site, body: Value) -> Result<Value> {
    request(&site.client, "replicator.drift", body).await
}

fn row<'a>(report: &'a Value, id: &str) -> Result<&'a Value> {
    let rows = report["replications"].as_array().into_iter().flatten();
    rows.into_iter().find(|row| row["replication"] == id).with_context(|| format!("no {id} in {report:#}"))
}

/// Class, source value and target value of each field that is no expected difference.
fn found(row: &Value) -> BTreeMap<String, (String, Value, Value)> {
    let fields = row["fields"].as_array().into_iter().flatten().filter(|field| field["class"] != "expected");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    fields.map(|f| (text(&f["field"]), (text(&f["class"]), f["source"].clone(), f["target"].clone()))).collect()
}

async fn change(raw: &mut Raw, stream: &str, fields: Value) -> Result<Value> {
    let config = raw.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take();
    raw.api(&format!("STREAM.UPDATE.{stream}"), merged(config, fields)).await
}

async fn config(raw: &mut Raw, stream: &str) -> Result<Value> {
    Ok(raw.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take())
}

/// Nothing is a drift, and everything was compared.
fn clean(report: &Value, count: usize) -> Result<()> {
    let rows = report["replications"].as_array().context("rows")?;
    ensure!(rows.len() == count, "{} rows", rows.len());
    for row in rows {
        ensure!(row["drift"] == 0 && row["error"].is_null() && found(row).is_empty(), "{row:#}");
    }
    Ok(())
}

const NANOS: u64 = 1_000_000_000;

/// Every setting that a copy takes over.
fn rich() -> Value {
    json!({"max_age": 3600 * NANOS, "max_msgs": 1000, "max_bytes": 1_000_000, "max_msgs_per_subject": 50,
        "max_msg_size": 5000, "duplicate_window": 30 * NANOS, "compression": "s2", "allow_direct": true,
        "allow_rollup_hdrs": true, "deny_delete": true, "max_consumers": 30, "metadata": {"team": "a"}, "description": "own"})
}

#[tokio::test]
async fn a_fresh_target_of_every_kind_has_none() -> Result<()> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
    let target = Server::builder(Role::Target).config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let mut source = site.source().await?;
    site.source_stream("PLAIN", json!({})).await?;
    site.source_stream("RICH", merged(rich(), json!({"allow_msg_ttl": true}))).await?;
    site.source_stream("FULL", json!({"max_msgs": 100, "max_bytes": 9000, "discard": "new", "storage": "memory"}))
        .await?;
    site.source_stream("QUEUE", json!({"retention": "workqueue"})).await?;
    site.source_stream("INTEREST", json!({"retention": "interest"})).await?;
    source.create_stream("MIRRORED", json!({"subjects": null, "mirror": {"name": "PLAIN"}})).await?;
    let js = jetstream::new(connect(&site.source.url()).await?);
    js.create_key_value(kv::Config {
        bucket: "b".into(),
        history: 7,
        max_age: std::time::Duration::from_secs(90),
        ..Default::default()
    })
    .await?;
    js.create_object_store(object_store::Config { bucket: "o".into(), ..Default::default() }).await?;
    site.publish("PLAIN", 1..=20).await?;
    let leaf = format!("nats-leaf://127.0.0.1:{port}");
    let renamed = |to: &str| json!({"name": to, "target_stream": to, "target_subject_prefix": to});
    for (stream, fields) in [
        ("PLAIN", json!({})),
        ("RICH", json!({})),
        ("RICH", merged(renamed("like"), json!({"target_like_source": true}))),
        ("FULL", json!({})),
        ("QUEUE", json!({})),
        ("INTEREST", json!({})),
        ("MIRRORED", renamed("mirrored")),
        ("KV_b", json!({})),
        ("OBJ_o", json!({})),
        ("PLAIN", merged(renamed("filtered"), json!({"filter_subject": "plain.1", "target_update": true}))),
        ("RICH", json!({"name": "mirror", "target_stream": "MIRROR", "kind": "mirror", "target_leaf_url": leaf})),
        ("RICH", json!({"name": "sourced", "target_stream": "SOURCED", "kind": "source", "target_leaf_url": leaf})),
    ] {
        site.add(stream, fields).await?;
    }
    for row in [
        "PLAIN",
        "RICH",
        "RICH.like",
        "FULL",
        "QUEUE",
        "INTEREST",
        "MIRRORED.mirrored",
        "KV_b",
        "OBJ_o",
        "PLAIN.filtered",
        "RICH.mirror",
        "RICH.sourced",
    ] {
        site.row_when(row, "runs", |row| row["state"] == "running").await?;
    }
    let report = drift(&site, json!({})).await?;
    clean(&report, 12)?;
    let queue = row(&report, "QUEUE")?["fields"].as_array().context("fields")?;
    let retention = queue.iter().find(|field| field["field"] == "retention").context("an expected field")?;
    assert_eq!((&retention["source"], &retention["target"]), (&json!("workqueue"), &json!("limits")), "{retention}");
    // The report has the number.
    let shown = request(&site.client, "replicator.report", Value::Null).await?;
    assert!(shown["replications"].as_array().is_some_and(|rows| rows.iter().all(|row| row["drift"] == 0)), "{shown:#}");
    let ended = site.cli().run(["drift"]).await?;
    assert!(ended.code == Some(0), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn an_old_target_lacks_what_its_server_does_not_know() -> Result<()> {
    let target = Server::builder(Role::Target).version("2.10.26").start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.source_stream("RICH", merged(rich(), json!({"allow_msg_ttl": true}))).await?;
    site.publish("RICH", 1..=5).await?;
    site.add("RICH", json!({})).await?;
    site.settled("RICH", 5).await?;
    let report = drift(&site, json!({"replication": "RICH"})).await?;
    clean(&report, 1)?;
    let fields = row(&report, "RICH")?["fields"].as_array().context("fields")?;
    let ttl = fields.iter().find(|field| field["field"] == "allow_msg_ttl").context("an expected field")?;
    assert_eq!((&ttl["source"], &ttl["class"]), (&json!(true), &json!("expected")), "{ttl}");
    Ok(())
}

/// What a person changed at the target, and what becomes of it.
fn changes() -> Value {
    json!({"max_age": 60 * NANOS, "max_msgs": 10, "max_bytes": 2000, "max_msgs_per_subject": 3, "max_msg_size": 300,
        "duplicate_window": 20 * NANOS, "compression": "none", "allow_direct": false, "allow_rollup_hdrs": false,
        "discard": "new", "description": "of a person", "metadata": {"person": "b"},
        "republish": {"src": "drifted.>", "dest": "again.>"}, "subjects": ["drifted.1"],
        "subject_transform": {"src": "drifted.1", "dest": "drifted.1"}})
}

async fn drifted(fields: Value) -> Result<Site> {
    let site = Site::start().await?;
    site.source_stream("DRIFTED", rich()).await?;
    site.add("DRIFTED", fields).await?;
    site.row_when("DRIFTED", "runs", |row| row["state"] == "running").await?;
    let mut target = site.target().await?;
    let mark = config(&mut target, "DRIFTED").await?["metadata"].take();
    let changed = merged(changes(), json!({"metadata": merged(mark, json!({"person": "b"}))}));
    change(&mut target, "DRIFTED", changed).await?;
    Ok(site)
}

#[tokio::test]
async fn each_change_is_named_with_both_values() -> Result<()> {
    let site = drifted(json!({})).await?;
    let before = config(&mut site.target().await?, "DRIFTED").await?;
    let report = drift(&site, json!({"replication": "D*"})).await?;
    let row = row(&report, "DRIFTED")?;
    let fields = found(row);
    let expect = [
        ("max_age", "safe", json!(3600 * NANOS), json!(60 * NANOS)),
        ("max_msgs", "safe", json!(1000), json!(10)),
        ("max_bytes", "safe", json!(1_000_000), json!(2000)),
        ("max_msgs_per_subject", "safe", json!(50), json!(3)),
        ("max_msg_size", "safe", json!(5000), json!(300)),
        ("duplicate_window", "safe", json!(30 * NANOS), json!(20 * NANOS)),
        ("compression", "safe", json!("s2"), json!("none")),
        ("allow_direct", "safe", json!(true), json!(false)),
        ("allow_rollup_hdrs", "safe", json!(true), json!(false)),
        ("subjects", "safe", json!(["drifted.>"]), json!(["drifted.1"])),
        ("discard", "unsafe", json!("old"), json!("new")),
        ("republish", "unsafe", Value::Null, json!({"src": "drifted.>", "dest": "again.>"})),
        ("subject_transform", "unsafe", Value::Null, json!({"src": "drifted.1", "dest": "drifted.1"})),
    ];
    for (field, class, source, target) in &expect {
        let expect = ((*class).to_owned(), source.clone(), target.clone());
        assert_eq!(fields.get(*field), Some(&expect), "{field} in {row:#}");
    }
    assert_eq!(fields.len(), expect.len(), "{row:#}");
    assert_eq!(row["drift"], expect.len(), "{row:#}");
    let named = |name: &str| row["fields"].as_array().into_iter().flatten().find(|field| field["field"] == name);
    for field in ["description", "metadata"] {
        let field = named(field).with_context(|| format!("{row:#}"))?;
        assert_eq!(field["class"], "expected", "{field}");
    }
    let shown = request(&site.client, "replicator.report", Value::Null).await?;
    assert_eq!(shown["replications"][0]["drift"], expect.len(), "{shown:#}");

    // Without `target_update`, nothing is changed.
    let left = drift(&site, json!({"replication": "DRIFTED", "fix": true})).await?;
    let row = self::row(&left, "DRIFTED")?;
    assert_eq!((&row["drift"], found(row)), (&json!(expect.len()), fields), "{row:#}");
    assert!(row["not_fixed"].as_str().is_some_and(|why| why.contains("target_update")), "{row}");
    assert_eq!(config(&mut site.target().await?, "DRIFTED").await?, before);
    let ended = site.cli().run(["drift", "DRIFTED", "--fix", "--force"]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("does not have `target_update`"), "{}", ended.stdout);
    Ok(())
}

#[tokio::test]
async fn a_fix_mends_what_is_safe_and_leaves_the_rest() -> Result<()> {
    let site = drifted(json!({"target_update": true})).await?;
    let ended = site.cli().run(["drift", "--all", "--fix"]).await?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("no terminal to ask on"), "{ended:?}");
    let fixed = site.cli().run(["drift", "--all", "--fix", "--force", "--json"]).await?;
    assert_eq!(fixed.code, Some(1), "{fixed:?}");
    let answer: Value = serde_json::from_str(&fixed.stdout)?;
    let row = row(&answer, "DRIFTED")?;
    let fields = row["fields"].as_array().context("fields")?;
    for field in fields {
        assert_eq!(field["fixed"], field["class"] == "safe", "{field}");
        assert!(field["failed"].is_null(), "{field}");
    }
    assert_eq!(row["drift"], 3, "{row:#}");
    let now = config(&mut site.target().await?, "DRIFTED").await?;
    for (field, value) in [
        ("max_age", json!(3600 * NANOS)),
        ("max_msgs", json!(1000)),
        ("compression", json!("s2")),
        ("subjects", json!(["drifted.>"])),
        ("allow_rollup_hdrs", json!(true)),
        ("discard", json!("new")),
        ("description", json!("of a person")),
        ("republish", json!({"src": "drifted.>", "dest": "again.>"})),
    ] {
        assert_eq!(now[field], value, "{field} in {now:#}");
    }
    assert_eq!((&now["metadata"]["person"], &now["metadata"]["replicator.site"]), (&json!("b"), &json!(SITE)));
    let left = found(self::row(&drift(&site, Value::Null).await?, "DRIFTED")?);
    assert_eq!(left.keys().collect::<Vec<_>>(), ["discard", "republish", "subject_transform"]);
    // What is copied from now on arrives.
    site.publish("DRIFTED", 1..=100).await?;
    site.settled("DRIFTED", 100).await?;
    Ok(())
}

/// A bucket's settings have the bucket's names, and one change that the server refuses keeps no other from being made.
#[tokio::test]
async fn a_refused_change_is_reported_and_others_are_made() -> Result<()> {
    let limited = "accounts { A: { jetstream: { max_file: 4MB, max_mem: 1MB }, users: [{ user: a, password: a }] } }";
    let target = Server::builder(Role::Target).config(limited).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let url = site.target.url_as("a:a");
    let js = jetstream::new(connect(&site.source.url()).await?);
    js.create_key_value(kv::Config { bucket: "b".into(), history: 5, ..Default::default() }).await?;
    site.source_stream("ORDERS", json!({"max_bytes": 20_000, "max_msgs": 50})).await?;
    for stream in ["KV_b", "ORDERS"] {
        site.add(stream, json!({"target_url": url, "target_update": true})).await?;
        site.row_when(stream, "runs", |row| row["state"] == "running").await?;
    }
    clean(&drift(&site, json!({})).await?, 2)?;
    let mut target = Raw::connect(&url).await?;
    let room = config(&mut target, "ORDERS").await?["max_bytes"].as_u64().context("a limit")?;
    ensure!(room > 20_000, "{room}");
    change(&mut target, "ORDERS", json!({"max_bytes": 4000, "max_msgs": 20})).await?;
    change(&mut target, "KV_b", json!({"max_msgs_per_subject": 2})).await?;
    // Nothing is left for the reservation.
    target.create_stream("OTHER", json!({"subjects": ["other"], "max_bytes": 4_190_000})).await?;
    let report = drift(&site, json!({"fix": true})).await?;
    let field = |id: &str, name: &str| -> Result<Value> {
        let fields = row(&report, id)?["fields"].as_array().context("fields")?;
        fields.iter().find(|field| field["field"] == name).cloned().with_context(|| format!("{report:#}"))
    };
    let history = field("KV_b", "max_msgs_per_subject")?;
    assert_eq!((&history["setting"], &history["fixed"]), (&json!("history"), &json!(true)), "{history}");
    let (messages, bytes) = (field("ORDERS", "max_msgs")?, field("ORDERS", "max_bytes")?);
    assert_eq!((&messages["fixed"], &bytes["fixed"]), (&json!(true), &json!(false)), "{report:#}");
    assert!(bytes["failed"].as_str().is_some_and(|why| why.contains("storage")), "{bytes}");
    assert_eq!((&row(&report, "ORDERS")?["drift"], &row(&report, "KV_b")?["drift"]), (&json!(1), &json!(0)));
    let now = config(&mut target, "ORDERS").await?;
    assert_eq!((&now["max_msgs"], &now["max_bytes"]), (&json!(50), &json!(4000)));
    assert_eq!(config(&mut target, "KV_b").await?["max_msgs_per_subject"], 5);
    Ok(())
}

/// A mirror that was changed is named, and left as it is.
#[tokio::test]
async fn a_mirror_that_was_changed_is_named() -> Result<()> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
    let target = Server::builder(Role::Target).config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.filled("ORDERS", 5).await?;
    site.add("ORDERS", json!({"kind": "mirror", "target_leaf_url": format!("nats-leaf://127.0.0.1:{port}")})).await?;
    site.settled("ORDERS", 5).await?;
    change(&mut site.target().await?, "ORDERS", json!({"max_age": 60 * NANOS, "duplicate_window": 0})).await?;
    let report = drift(&site, json!({"replication": "ORDERS", "fix": true})).await?;
    let row = row(&report, "ORDERS")?;
    assert_eq!((&row["kind"], &row["drift"]), (&json!("mirror"), &json!(1)), "{row:#}");
    assert_eq!(found(row)["max_age"], ("safe".to_owned(), json!(0), json!(60 * NANOS)), "{row:#}");
    assert!(row["not_fixed"].as_str().is_some_and(|why| why.contains("mirror")), "{row}");
    assert_eq!(config(&mut site.target().await?, "ORDERS").await?["max_age"], 60 * NANOS);
    Ok(())
}

#[tokio::test]
async fn many_replications_take_two_connections() -> Result<()> {
    const MANY: usize = 200;
    let site = Site::start().await?;
    site.source_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for index in 0..MANY {
        let (id, other) = (
            format!("S{index:03}"),
            json!({"max_age": if index % 10 == 0 { 60 * NANOS } else { 0 }, "duplicate_window": 30 * NANOS}),
        );
        source
            .create_stream(&id, json!({"subjects": [format!("s{index:03}.>")], "duplicate_window": 30 * NANOS}))
            .await?;
        target
            .create_stream(&id, merged(json!({"subjects": [format!("s{index:03}.>")], "allow_batched": true}), other))
            .await?;
        // Paused, they have no connections of their own.
        site.put(&format!("{id}/paused"), "{}").await?;
        site.put(&id, site.document(&id).to_string()).await?;
    }
    site.row_when(&format!("S{:03}", MANY - 1), "is paused", |row| row["state"] == "paused").await?;
    let connections = async |server: &Server| -> Result<u64> {
        // Each connection of a server has a number of its own.
        let client = connect(&server.url()).await?;
        Ok(client.server_info().client_id)
    };
    let before = (connections(&site.source).await?, connections(&site.target).await?);
    let begun = Instant::now();
    let report = drift(&site, json!({"replication": "S*"})).await?;
    println!("{MANY} replications compared in {:?}", begun.elapsed());
    let after = (connections(&site.source).await?, connections(&site.target).await?);
    let rows = report["replications"].as_array().context("rows")?;
    assert_eq!((rows.len(), &report["total"]), (MANY, &json!(MANY)));
    let differ = rows.iter().filter(|row| row["drift"].as_u64().is_some_and(|drift| drift > 0)).count();
    assert_eq!(differ, MANY / 10, "{report:#}");
    // One of the count is the second question's own.
    let used = (after.0 - before.0 - 1, after.1 - before.1 - 1);
    assert!(used.0 <= 2 && used.1 <= 2, "{used:?} connections");
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_compared_says_why() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 3).await?;
    site.settled("ORDERS", 3).await?;
    site.add("MISSING", json!({})).await?;
    site.put("BROKEN", "{}").await?;
    site.row_when("BROKEN", "is invalid", |row| row["state"] == "invalid").await?;
    let report = drift(&site, Value::Null).await?;
    let error = |id: &str| -> Result<String> {
        let row = row(&report, id)?;
        ensure!(row["drift"].is_null(), "{row}");
        Ok(row["error"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(error("MISSING")?, "source: stream `MISSING` does not exist");
    assert!(!error("BROKEN")?.is_empty());
    refused(&site.send("drift", json!({"replication": "ORDRES"})).await?, 404, "did you mean `ORDERS`?");
    refused(&site.send("drift", json!({"replication": "X*"})).await?, 404, "none of 3 replications matches `X*`");
    refused(&site.send("drift", json!({"replication": "a b"})).await?, 400, "an id has letters");
    refused(&site.send("drift", json!({"replications": []})).await?, 400, "unknown field `replications`");
    refused(&site.send("drift", json!({"fix": "yes"})).await?, 400, "expected a boolean");
    refused(&site.ask("drift", "a b").await?, 400, "neither the id");
    let one = site.cli().run(["drift", "ORDERS", "ORD*"]).await?;
    assert!(one.code == Some(0), "{one:?}");
    assert!(one.stdout.contains("1 replication compared: 0 with a drift"), "{}", one.stdout);
    let all = site.cli().run(["drift"]).await?;
    assert_eq!(all.code, Some(1), "{all:?}");
    assert!(all.stdout.contains("does not exist") && all.stdout.contains("2 not compared"), "{}", all.stdout);
    failed(&site.cli().run(["drift", "NONE"]).await?, &["replication `NONE` does not exist"]);
    let wrong = site.cli().run(["drift", "--fix"]).await?;
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    Ok(())
}

#[tokio::test]
async fn a_read_only_service_compares_and_fixes_nothing() -> Result<()> {
    let site = Site::builder().args(["--read-only"]).start().await?;
    site.filled("A", 3).await?;
    site.put("A", site.document("A").to_string()).await?;
    site.settled("A", 3).await?;
    let report = drift(&site, Value::Null).await?;
    assert!(row(&report, "A")?["error"].as_str().is_some_and(|error| error.contains("read-only")), "{report}");
    refused(&site.send("drift", json!({"fix": true})).await?, 403, "read-only");
    Ok(())
}
