//! A second stream, behind a leafnode and in the same account, listens on the subjects of the target: its acks say
//! nothing about the target.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::server::free_port;
use crate::harness::site::merged;
use crate::harness::{Expect, LIMIT, Outgoing, Raw, Role, Server, Site, request, wait_for, wait_value};

const COUNT: u64 = 12_000;
/// So much the target takes before it is full.
const ROOM: u64 = 700;
/// So much more each time: enough that the second stream, which is further away, answers while it is copied.
const MORE_ROOM: u64 = 500;

/// Where a second stream is, and what it is called.
#[derive(Debug, Clone, Copy)]
struct Second {
    name: &'static str,
    /// Domain of the leaf.
    domain: Option<&'static str>,
}

/// A hub, and a leaf of it in the same account.
async fn hub_and_leaf(second: Second) -> Result<(Server, Server)> {
    let port = free_port()?;
    let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
    let hub = Server::builder(Role::Target).domain("hub").config(&listen).start().await?;
    let remote = format!("leafnodes {{ remotes: [{{ url: \"nats://127.0.0.1:{port}\" }}] }}");
    let leaf = Server::builder(Role::Target).config(&remote);
    let leaf = second.domain.into_iter().fold(leaf, |leaf, domain| leaf.domain(domain)).start().await?;
    Ok((hub, leaf))
}

/// The source stream, a target that is soon full, and a second stream that is not.
async fn begin(second: Second, batched: bool, fields: Value) -> Result<(Site, Server)> {
    let (hub, leaf) = hub_and_leaf(second).await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, hub).start().await?;
    let mut raw = site.source_stream("A", json!({})).await?;
    raw.publish_all((1..=COUNT).map(|i| Outgoing::new(format!("a.{}", i % 3), i.to_string()))).await?;
    let batches = if batched && site.target.at_least(2, 14) { json!({"allow_batched": true}) } else { json!({}) };
    let listens = merged(json!({"subjects": ["a.>"]}), batches);
    let mut at_leaf = Raw::connect(&leaf.url()).await?;
    at_leaf.create_stream(second.name, listens.clone()).await?;
    let mut target = site.target().await?;
    let reaches = async || target.request("a.probe", b"x").await.is_ok();
    wait_for("the leaf to take what is published at the hub", LIMIT, reaches).await?;
    // Both begin at the same sequence: also the chain fits both.
    let probes = at_leaf.stream_state(second.name).await?["last_seq"].as_u64().context("last_seq")?;
    at_leaf.api(&format!("STREAM.PURGE.{}", second.name), Value::Null).await?;
    let soon_full = json!({"max_msgs": ROOM, "discard": "new", "first_seq": probes + 1});
    site.target_stream("A", merged(listens, soon_full)).await?;
    request(&site.client, "replicator.config.add", site.document_with("A", fields)).await?;
    Ok((site, leaf))
}

/// Copies of the source at the target.
async fn copies(site: &Site) -> Result<u64> {
    let stored = site.target().await?.read_stream("A").await?;
    Ok(stored.iter().filter(|message| message.subject != "a.probe").count() as u64)
}

/// The target takes so many messages from now on.
async fn resize(site: &Site, max_msgs: i64) -> Result<()> {
    let mut target = site.target().await?;
    let mut config = target.api("STREAM.INFO.A", Value::Null).await?["config"].take();
    config["max_msgs"] = max_msgs.into();
    target.api("STREAM.UPDATE.A", config).await?;
    Ok(())
}

async fn check(second: Second, batched: bool, mode: &str) -> Result<()> {
    let (site, leaf) = begin(second, batched, json!({"target_mode": mode})).await?;
    // The target, soon full, may be the first to refuse something. With more room both take messages again.
    let mut room = ROOM;
    let row = wait_value("the second stream to be reported", LIMIT, async || {
        let row = site.row_when("A", "is held", |row| row["state"] == "held").await.ok()?;
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        if message.contains("listens on the same subjects") && message.contains("target stream `A`") {
            return Some(row);
        }
        room += MORE_ROOM;
        resize(&site, room.cast_signed()).await.ok()?;
        let _ = site.send("retry", json!({"replication": "A"})).await;
        None
    })
    .await
    .with_context(|| site.service.log())?;
    // It is tried again; however often, the target has what counts as copied.
    let errors = row["counters"]["errors"].as_u64();
    request(&site.client, "replicator.retry", json!({"replication": "A"})).await?;
    let again = |row: &Value| row["state"] == "held" && row["counters"]["errors"].as_u64() > errors;
    let row = site.row_when("A", "is held again", again).await?;
    let (settled, there) = (row["position"]["source_seq"].as_u64(), copies(&site).await?);
    ensure!(settled <= Some(there), "{settled:?} settled, {there} at the target: {row}");
    let record = site.position("A").await?.context("a record")?;
    ensure!(record["source"]["seq"].as_u64().unwrap_or_default() <= there, "{there} at the target: {record}");
    // One event tells that it is held, with the first reason: whichever of the two it was.
    let told = site.events.ever("held").await?;
    let text = told["message"].as_str().unwrap_or_default();
    ensure!(["listens", "maximum messages exceeded"].iter().any(|reason| text.contains(reason)), "{told}");
    // The second stream goes, and the target gets room.
    Raw::connect(&leaf.url()).await?.api(&format!("STREAM.DELETE.{}", second.name), Value::Null).await?;
    resize(&site, -1).await?;
    wait_for("the copy to continue", LIMIT, async || {
        let _ = site.send("retry", json!({"replication": "A"})).await;
        site.row("A").await.is_some_and(|row| row["state"] == "running")
    })
    .await?;
    site.settled("A", COUNT).await?;
    site.verify("A", &Expect::copy_of("A").shared().late_allowed()).await?;
    assert_eq!(copies(&site).await?, COUNT);
    Ok(())
}

const SECONDS: [Second; 3] = [
    Second { name: "A", domain: Some("leaf") },
    Second { name: "A", domain: None },
    Second { name: "OTHER", domain: Some("leaf") },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_of_a_second_stream_do_not_count_by_fast_ingest() -> Result<()> {
    for second in SECONDS {
        for mode in ["auto", "shared"] {
            check(second, true, mode).await.with_context(|| format!("{second:?} {mode}"))?;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_of_a_second_stream_do_not_count_pipelined() -> Result<()> {
    for second in SECONDS {
        for mode in ["auto", "shared"] {
            check(second, false, mode).await.with_context(|| format!("{second:?} {mode}"))?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_second_stream_at_the_source_is_told_before_anything_runs() -> Result<()> {
    let second = Second { name: "A", domain: Some("leaf") };
    let (hub, leaf) = hub_and_leaf(second).await?;
    Raw::connect(&hub.url()).await?.create_stream("A", json!({"subjects": ["a.>", "to.>"]})).await?;
    let mut raw = Raw::connect(&leaf.url()).await?;
    raw.create_stream("A", json!({"subjects": ["a.>"]})).await?;
    let bridge = async || raw.request("$JS.hub.API.INFO", b"").await.is_ok();
    wait_for("the leafnode connection", LIMIT, bridge).await?;
    let site = Site::builder().on(leaf, hub).control(Server::start(Role::Control).await?).start().await?;
    let reply = request(&site.client, "replicator.config.validate", site.document("A")).await?;
    let warning = reply["warnings"][0]["message"].as_str().unwrap_or_default();
    ensure!(warning.contains("stream `A` beside the source listens on `a.>` too"), "{reply:#}");
    let mapped = site.document_with("A", json!({"target_subject_prefix": "to"}));
    let reply = request(&site.client, "replicator.config.validate", mapped).await?;
    assert_eq!((&reply["valid"], &reply["warnings"]), (&json!(true), &json!([])), "{reply:#}");
    Ok(())
}

/// A copy from one side of a leafnode connection to the other, into a target that does not exist: found by `validate`
/// and by the run, and nothing is stored or created. With other subjects it is copied.
async fn check_both_ways(from_hub: bool, hub_domain: Option<&str>) -> Result<()> {
    let port = free_port()?;
    let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
    let hub = Server::builder(if from_hub { Role::Source } else { Role::Target }).config(&listen);
    let hub = hub_domain.into_iter().fold(hub, |hub, domain| hub.domain(domain)).start().await?;
    let remote = format!("leafnodes {{ remotes: [{{ url: \"nats://127.0.0.1:{port}\" }}] }}");
    let leaf = Server::builder(if from_hub { Role::Target } else { Role::Source }).config(&remote);
    let leaf = leaf.domain("leaf").start().await?;
    let (source, target) = if from_hub { (hub, leaf) } else { (leaf, hub) };
    let site = Site::builder().on(source, target).control(Server::start(Role::Control).await?).start().await?;
    let mut raw = site.source_stream("A", json!({})).await?;
    // Another stream on the same account, on subjects that only a prefix leads to.
    site.source_stream("THIRD", json!({"subjects": ["third.a.>"]})).await?;
    raw.publish_all((1..=100).map(|i| Outgoing::new(format!("a.{}", i % 3), i.to_string()))).await?;
    let mut target = site.target().await?;
    wait_for("the leafnode connection", LIMIT, async || target.request("a.probe", b"").await.is_ok()).await?;
    let before = raw.stream_state("A").await?["last_seq"].clone();

    for (fields, stream, subject) in [
        (json!({"name": "same"}), "A", "a.>"),
        (json!({"name": "third", "target_stream": "B", "target_subject_prefix": "third"}), "THIRD", "third.a.>"),
    ] {
        let id = format!("A.{}", fields["name"].as_str().unwrap_or_default());
        let reply =
            request(&site.client, "replicator.config.validate", site.document_with("A", fields.clone())).await?;
        let warning = reply["warnings"][0]["message"].as_str().unwrap_or_default();
        let says = format!("stream `{stream}` beside the source listens on `{subject}` too");
        ensure!(warning.contains(&says) && warning.contains("target_subject_prefix"), "{reply:#}");
        site.add("A", fields).await?;
        let row = site.row_when(&id, "is held", |row| row["state"] == "held").await?;
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        let says = format!("stream `{stream}` at the source listens on `{subject}` too");
        ensure!(message.contains(&says) && message.contains("target_subject_prefix"), "{row}");
    }
    assert_eq!(raw.stream_state("A").await?["last_seq"], before, "nothing more is stored at the source");
    assert_eq!(raw.stream_state("THIRD").await?["messages"], 0);
    for stream in ["A", "B"] {
        ensure!(target.stream_state(stream).await.is_err(), "target stream `{stream}` was created");
    }
    let apart = json!({"name": "apart", "target_stream": "C", "target_subject_prefix": "to"});
    let reply = request(&site.client, "replicator.config.validate", site.document_with("A", apart.clone())).await?;
    assert_eq!((&reply["valid"], &reply["warnings"]), (&json!(true), &json!([])), "{reply:#}");
    site.add("A", apart).await?;
    site.settled("A.apart", before.as_u64().context("a sequence")?).await?;
    Ok(())
}

#[tokio::test]
async fn a_target_that_would_be_fed_back_is_not_created() -> Result<()> {
    for (from_hub, hub_domain) in [(true, None), (true, Some("hub")), (false, None), (false, Some("hub"))] {
        check_both_ways(from_hub, hub_domain).await.with_context(|| format!("from hub: {from_hub}, {hub_domain:?}"))?;
    }
    Ok(())
}

/// Domains differ, subjects are the same, and no account is shared: the ordinary case.
#[tokio::test]
async fn two_accounts_with_the_same_subjects_are_no_second_stream() -> Result<()> {
    let source = Server::builder(Role::Source).domain("one").start().await?;
    let target = Server::builder(Role::Target).domain("two").start().await?;
    let site = Site::builder().on(source, target).control(Server::start(Role::Control).await?).start().await?;
    site.filled("A", 20).await?;
    let reply = request(&site.client, "replicator.config.validate", site.document("A")).await?;
    assert_eq!((&reply["valid"], &reply["warnings"]), (&json!(true), &json!([])), "{reply:#}");
    site.add("A", json!({})).await?;
    site.settled("A", 20).await?;
    Ok(())
}

/// The leafnode connection does not pass the subjects of the copies: both sides are one account, and no copy comes back.
#[tokio::test]
async fn subjects_that_a_leafnode_does_not_pass_are_copied() -> Result<()> {
    let port = free_port()?;
    let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
    let hub = Server::builder(Role::Source).domain("hub").config(&listen).start().await?;
    let denied = r#"deny_imports: ["a.>"], deny_exports: ["a.>"]"#;
    let remote = format!("leafnodes {{ remotes: [{{ url: \"nats://127.0.0.1:{port}\", {denied} }}] }}");
    let leaf = Server::builder(Role::Target).domain("leaf").config(&remote).start().await?;
    let site = Site::builder().on(hub, leaf).control(Server::start(Role::Control).await?).start().await?;
    site.filled("A", 20).await?;
    let mut target = site.target().await?;
    wait_for("the leafnode connection", LIMIT, async || target.request("$JS.hub.API.INFO", b"").await.is_ok()).await?;
    site.add("A", json!({})).await?;
    site.settled("A", 20).await?;
    assert_eq!(site.source().await?.stream_state("A").await?["messages"], 20);
    Ok(())
}

/// A login that may publish copies and nothing else cannot ask whether the source is in the same account.
#[tokio::test]
async fn a_bridge_that_cannot_be_asked_is_unknown() -> Result<()> {
    let user = "authorization { users: [{ user: u, password: p,
        permissions: { publish: [\"s.>\", \"$JS.API.>\"], subscribe: \"_INBOX.>\" } }] }";
    let source = Server::builder(Role::Source).domain("one").start().await?;
    let target = Server::builder(Role::Target).domain("two").config(user).start().await?;
    let site = Site::builder().on(source, target).start().await?;
    site.filled("S", 1).await?;
    let subjects = async |url: String| -> Result<Value> {
        let reply = site.send("config.validate", site.document_with("S", json!({ "target_url": url }))).await?;
        let checks = reply.body["preflight"]["target"]["checks"].as_array().cloned().unwrap_or_default();
        checks.into_iter().find(|check| check["name"] == "subjects").with_context(|| reply.body.to_string())
    };
    let check = subjects(site.target.url_as("u:p")).await?;
    assert_eq!(check["result"], "unknown", "{check}");
    ensure!(check["message"].as_str().is_some_and(|text| text.contains("are one account")), "{check}");
    // The copy continues without knowing.
    site.add("S", json!({"target_url": site.target.url_as("u:p")})).await?;
    site.settled("S", 1).await?;
    Ok(())
}
