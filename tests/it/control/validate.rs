//! `config.validate`: every fault of a document and of both sides is found before anything runs, and nothing is
//! changed by looking.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::server::free_port;
use crate::harness::site::merged;
use crate::harness::{Proxy, Raw, Role, Server, Service, Site, request, timed};

/// Within this an answer is there, whatever the sides do.
const ANSWER: Duration = Duration::from_millis(2_500);
/// For the way to the service and back on a busy machine.
const WAY: Duration = Duration::from_millis(500);

/// The reply to a document; always in time.
async fn validate(site: &Site, document: Value) -> Result<Value> {
    let (reply, time) = timed(site.send("config.validate", document.clone())).await?;
    assert_eq!(reply.error, None, "{document}: {reply:?}");
    assert!(time < ANSWER + WAY, "{document}: {time:?}");
    Ok(reply.body)
}

/// What came out of one check.
fn outcome<'a>(body: &'a Value, side: &str, check: &str) -> &'a str {
    let checks = body["preflight"][side]["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = checks.iter().find(|found| found["name"] == check);
    found.and_then(|found| found["result"].as_str()).unwrap_or_default()
}

/// Exactly one failed check, reported once, in these words; the document is not valid.
#[track_caller]
fn fails(body: &Value, side: &str, check: &str, path: &str, words: &[&str]) {
    assert_eq!(outcome(body, side, check), "failed", "{check}: {body:#}");
    tells(body, "problems", side, path, words);
    assert_eq!((&body["valid"], body["problems"].as_array().map(Vec::len)), (&json!(false), Some(1)), "{body:#}");
}

/// A warning in these words, and the document is valid.
#[track_caller]
fn warns(body: &Value, side: &str, check: &str, path: &str, words: &[&str]) {
    assert_eq!(outcome(body, side, check), "warning", "{check}: {body:#}");
    tells(body, "warnings", side, path, words);
    assert_eq!((&body["valid"], body["warnings"].as_array().map(Vec::len)), (&json!(true), Some(1)), "{body:#}");
}

/// The side, its server and these words are in one entry of the list.
#[track_caller]
fn tells(body: &Value, list: &str, side: &str, path: &str, words: &[&str]) {
    let entries = body[list].as_array().map(Vec::as_slice).unwrap_or_default();
    let side = format!("{side} `");
    let told = entries.iter().any(|entry| {
        let message = entry["message"].as_str().unwrap_or_default();
        entry["path"] == path && message.starts_with(&side) && words.iter().all(|word| message.contains(word))
    });
    assert!(told, "{words:?} at {path} is not in {list}: {body:#}");
}

/// Nothing to say, and every check is in order.
#[track_caller]
fn healthy(body: &Value) {
    let told = json!({"valid": body["valid"], "problems": body["problems"], "warnings": body["warnings"]});
    assert_eq!(told, json!({"valid": true, "problems": [], "warnings": []}), "{body:#}");
    for side in ["source", "target"] {
        let checks = body["preflight"][side]["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert!(checks.len() > 5 && checks.iter().all(|check| check["result"] == "ok"), "{body:#}");
    }
}

/// A server on which user `test` may do everything and others less.
async fn guarded(role: Role, users: &str) -> Result<Server> {
    let config = format!("authorization {{ users: [{{user: test, password: test}}, {users}] }}");
    Server::builder(role).config(&config).start().await
}

/// A site with these sides and a control server of its own.
async fn between(source: Server, target: Server) -> Result<Site> {
    Site::builder().on(source, target).start().await
}

async fn stream(url: &str, name: &str, config: Value) -> Result<()> {
    let config = merged(json!({"subjects": [format!("{}.>", name.to_lowercase())]}), config);
    Raw::connect(url).await?.create_stream(name, config).await?;
    Ok(())
}

#[tokio::test]
async fn a_healthy_pair_has_nothing_against_it_and_stays_as_it_is() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 3).await?;
    let body = validate(&site, site.document("ORDERS")).await?;
    healthy(&body);
    let source = &body["preflight"]["source"];
    assert_eq!(source["server"], site.source.name());
    assert_eq!(source["version"], site.source.version());
    assert_eq!(source["stream"], json!({"messages": 3, "first_seq": 1, "last_seq": 3}));
    assert_eq!(body["preflight"]["target"]["stream"], Value::Null);
    let checks = body["preflight"]["target"]["checks"].as_array().context("checks")?;
    let made = checks.iter().find(|check| check["name"] == "stream").context("a check")?;
    let message = made["message"].as_str().unwrap_or_default();
    assert!(message.contains("would be created with subjects `orders.>`"), "{message}");

    assert!(site.target().await?.stream_state("ORDERS").await.is_err(), "the target was made");
    let info = site.source().await?.api("STREAM.INFO.ORDERS", Value::Null).await?;
    assert_eq!((&info["state"]["consumer_count"], &info["state"]["last_seq"]), (&json!(0), &json!(3)), "{info}");
    assert_eq!(site.send("config.get", json!({"replication": "ORDERS"})).await?.error, Some(404));

    site.target_stream("ORDERS", json!({})).await?;
    healthy(&validate(&site, site.document("ORDERS")).await?);
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_with_the_document_alone_is_told_without_a_look() -> Result<()> {
    let site = Site::small().await?;
    let check = async |body: String, path: &str, words: &str| {
        let reply = site.ask("config.validate", &body).await?;
        assert_eq!((reply.error, &reply.body["valid"]), (None, &json!(false)), "{reply:?}");
        assert_eq!(reply.body["preflight"], Value::Null, "{reply:?}");
        let problem = &reply.body["problems"][0];
        assert_eq!(problem["path"], path, "{reply:?}");
        assert!(problem["message"].as_str().is_some_and(|message| message.contains(words)), "{reply:?}");
        anyhow::Ok(())
    };
    check(String::new(), "", "not valid JSON").await?;
    check("[]".to_owned(), "", "an array").await?;
    check(site.document_with("ORDERS", json!({"max_age": "soon"})).to_string(), "/max_age", "`soon`").await?;
    check(site.document("A").to_string().replace("nats://", "nats://u:***@"), "/source_url", "stands for a").await
}

#[tokio::test]
async fn an_existing_replication_is_told_and_lends_its_secrets() -> Result<()> {
    const SECRET: &str = "t0p-s3cret";
    let target = guarded(Role::Target, &format!("{{user: copy, password: \"{SECRET}\"}}")).await?;
    let site = between(Server::start(Role::Source).await?, target).await?;
    site.filled("ORDERS", 1).await?;
    let url = site.target.url_as(&format!("copy:{SECRET}"));
    site.add("ORDERS", json!({"target_url": url})).await?;
    site.settled("ORDERS", 1).await?;
    let body =
        validate(&site, site.document_with("ORDERS", json!({"target_url": site.target.url_as("copy:***")}))).await?;
    assert_eq!((&body["valid"], &body["problems"]), (&json!(true), &json!([])), "{body:#}");
    assert_eq!(body["warnings"].as_array().map(Vec::len), Some(1), "{body:#}");
    let warning = body["warnings"][0]["message"].as_str().unwrap_or_default();
    assert!(warning.contains("`ORDERS` exists at revision 2"), "{warning}");
    assert!(!body.to_string().contains(SECRET), "{body:#}");
    Ok(())
}

#[tokio::test]
async fn who_cannot_connect_is_told_on_each_side_without_the_secret() -> Result<()> {
    const SECRET: &str = "wr0ng-s3cret";
    let site = between(guarded(Role::Source, "").await?, guarded(Role::Target, "").await?).await?;
    let (from, to) = (site.source.url_as("test:test"), site.target.url_as("test:test"));
    stream(&from, "ORDERS", json!({})).await?;
    let nobody = free_port()?;
    let password = |server: &Server| (server.url_as(&format!("test:{SECRET}")), format!("127.0.0.1:{}", server.port()));
    let closed = (format!("nats://u:{SECRET}@127.0.0.1:{nobody}"), format!("127.0.0.1:{nobody}"));
    let unknown = (format!("nats://u:{SECRET}@no-such-host.invalid"), "no-such-host.invalid:4222".to_owned());
    for ((url, address), words) in
        [(password(&site.source), "Authorization Violation"), (closed.clone(), "refused"), (unknown.clone(), "lookup")]
    {
        let body = validate(&site, json!({"stream": "ORDERS", "source_url": url, "target_url": to})).await?;
        fails(&body, "source", "connect", "/source_url", &[&address, words]);
        assert_eq!(outcome(&body, "source", "stream"), "unknown", "{body:#}");
        assert_eq!(outcome(&body, "target", "connect"), "ok", "{body:#}");
        assert!(!body.to_string().contains(SECRET), "{body:#}");
    }
    for ((url, address), words) in
        [(password(&site.target), "Authorization Violation"), (closed, "refused"), (unknown, "lookup")]
    {
        let body = validate(&site, json!({"stream": "ORDERS", "source_url": from, "target_url": url})).await?;
        fails(&body, "target", "connect", "/target_url", &[&address, words]);
        assert_eq!(outcome(&body, "target", "subjects"), "unknown", "{body:#}");
        assert_eq!(outcome(&body, "source", "stream"), "ok", "{body:#}");
        assert!(!body.to_string().contains(SECRET), "{body:#}");
    }
    Ok(())
}

/// Frozen servers take connections and say nothing; a stalled path does not even do that. Who would be given more time
/// by a copy than there is here may let us in.
#[tokio::test]
async fn a_side_that_is_silent_is_told_in_time() -> Result<()> {
    let site = Site::start().await?;
    site.filled("ORDERS", 1).await?;
    site.target_stream("ORDERS", json!({})).await?;
    site.target.freeze()?;
    let body = validate(&site, site.document("ORDERS")).await?;
    let address = format!("127.0.0.1:{}", site.target.port());
    assert_eq!(body["valid"], true, "{body:#}");
    tells(&body, "warnings", "target", "/target_url", &[&address, "no answer", "would wait for 5s", "not known"]);
    for check in [
        "connect",
        "jetstream",
        "stream",
        "calls",
        "publish",
        "subjects",
        "max_payload",
        "target_mode",
        "headers",
        "duplicates",
    ] {
        assert_eq!(outcome(&body, "target", check), "unknown", "{check}: {body:#}");
    }
    assert_eq!(outcome(&body, "source", "stream"), "ok", "{body:#}");
    let impatient = format!("{}?connect_timeout=300ms", site.target.url());
    let body = validate(&site, site.document_with("ORDERS", json!({"target_url": impatient}))).await?;
    fails(&body, "target", "connect", "/target_url", &[&address, "no answer within 300ms"]);
    site.target.thaw()?;

    let proxy = Proxy::start(site.source.port()).await?;
    proxy.stall();
    let body = validate(&site, site.document_with("ORDERS", json!({"source_url": proxy.url()}))).await?;
    let address = format!("127.0.0.1:{}", proxy.port());
    assert_eq!((&body["valid"], outcome(&body, "source", "connect")), (&json!(true), "unknown"), "{body:#}");
    tells(&body, "warnings", "source", "/source_url", &[&address, "no answer", "would wait for 5s"]);

    // An address that swallows everything among several: the others are still asked.
    proxy.stall();
    let urls = format!("{},{}", proxy.url(), site.source.url());
    healthy(&validate(&site, site.document_with("ORDERS", json!({"source_url": urls}))).await?);
    Ok(())
}

/// The connection is up, and the server that should answer does not: reported as unknown, with the side and its address.
#[tokio::test]
async fn an_answer_that_does_not_come_is_unknown() -> Result<()> {
    let site = Site::start().await?;
    site.filled("ORDERS", 1).await?;
    // Somebody listens where JetStream would, and never answers.
    let target = Server::builder(Role::Target).without_jetstream().start().await?;
    let client = crate::harness::connect(&target.url()).await?;
    let _silent = client.subscribe("$JS.API.>").await?;
    client.flush().await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"target_url": target.url()}))).await?;
    assert_eq!(outcome(&body, "target", "connect"), "ok", "{body:#}");
    assert_eq!(outcome(&body, "target", "stream"), "unknown", "{body:#}");
    let address = format!("127.0.0.1:{}", target.port());
    tells(&body, "warnings", "target", "/target_url", &[&address, "no answer to `$JS.API.STREAM.INFO.ORDERS`"]);
    Ok(())
}

#[tokio::test]
async fn missing_streams_and_missing_jetstream_are_told() -> Result<()> {
    let site = Site::small().await?;
    let none = site.document_with("NONE", json!({}));
    fails(&validate(&site, none).await?, "source", "stream", "/stream", &["source stream `NONE` does not exist"]);

    site.filled("ORDERS", 1).await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"no_target_create": true}))).await?;
    fails(
        &body,
        "target",
        "stream",
        "/target_stream",
        &["target stream `ORDERS` does not exist", "`no_target_create`"],
    );

    let plain = Server::builder(Role::Target).without_jetstream().start().await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"target_url": plain.url()}))).await?;
    fails(&body, "target", "jetstream", "/target_url", &["JetStream is not enabled"]);
    let body = validate(&site, site.document_with("ORDERS", json!({"source_url": plain.url()}))).await?;
    fails(&body, "source", "jetstream", "/source_url", &["JetStream is not enabled"]);

    let accounts = "accounts { A: { jetstream: enabled, users: [{user: a, password: a}] }, B: { users: [{user: b, password: b}] } }";
    let target = Server::builder(Role::Target).config(accounts).start().await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"target_url": target.url_as("b:b")}))).await?;
    fails(&body, "target", "jetstream", "/target_url", &["JetStream not enabled for account"]);
    healthy(&validate(&site, site.document_with("ORDERS", json!({"target_url": target.url_as("a:a")}))).await?);
    Ok(())
}

/// Permissions, once reported by the server and once, where the user may not request them, detected by trying.
async fn permissions(version: Option<&str>) -> Result<()> {
    let users = r#"
        {user: denied, password: x, permissions: {publish: {deny: ["orders.>"]}}},
        {user: part, password: x, permissions: {publish: {deny: ["orders.secret"]}}},
        {user: listed, password: x, permissions: {publish: ["$JS.API.>", "orders.>"]}},
        {user: asks, password: x, permissions: {publish: ["$JS.API.>", "$SYS.REQ.USER.INFO", "other.>"]}},
        {user: nocreate, password: x, permissions: {publish: {deny: ["$JS.API.CONSUMER.CREATE.>"]}}},
        {user: filtered, password: x, permissions: {publish: {deny: ["$JS.API.CONSUMER.CREATE.ORDERS.*"]}}},
        {user: tryfiltered, password: x, permissions: {publish: ["$JS.API.STREAM.>", "$JS.API.CONSUMER.MSG.NEXT.>",
            "$JS.API.CONSUMER.CREATE.ORDERS.*.>", "$JS.API.CONSUMER.DELETE.>", "$JS.API.CONSUMER.INFO.>"]}},
        {user: trycreate, password: x, permissions: {publish: ["$JS.API.STREAM.>", "$JS.API.CONSUMER.MSG.NEXT.>"]}},
        {user: trynext, password: x, permissions: {publish: ["$JS.API.STREAM.>", "$JS.API.CONSUMER.CREATE.>"]}},
        {user: noinfo, password: x, permissions: {publish: {deny: ["$JS.API.STREAM.INFO.>"]}}},
        {user: deaf, password: x, permissions: {subscribe: {deny: ["_INBOX.>"]}}}
    "#;
    let config = format!("authorization {{ users: [{{user: test, password: test}}, {users}] }}");
    let builder = |role| {
        let builder = Server::builder(role).config(&config);
        version.map_or(builder.clone(), |version| builder.version(version))
    };
    let site = between(builder(Role::Source).start().await?, builder(Role::Target).start().await?).await?;
    let url = |server: &Server, user: &str| server.url_as(&format!("{user}:x"));
    stream(&site.source.url_as("test:test"), "ORDERS", json!({})).await?;
    stream(&site.target.url_as("test:test"), "ORDERS", json!({})).await?;
    let with = async |source: &str, target: &str| {
        let (source, target) = (url(&site.source, source), url(&site.target, target));
        validate(&site, json!({"stream": "ORDERS", "source_url": source, "target_url": target})).await
    };
    healthy(&with("denied", "part").await.map(|mut body| {
        // Reading needs no permission to publish; of the target only a part is missing.
        warns(&body, "target", "publish", "/target_url", &["a part of `orders.>` only"]);
        body["warnings"] = json!([]);
        let checks = body["preflight"]["target"]["checks"].as_array_mut().expect("checks");
        checks.retain(|check| check["name"] != "publish");
        body
    })?);
    let body = with("denied", "denied").await?;
    fails(&body, "target", "publish", "/target_url", &["no permission to publish to `orders.>`"]);
    let body = with("denied", "asks").await?;
    fails(&body, "target", "publish", "/target_url", &["no permission to publish to `orders.>`"]);

    let body = with("listed", "listed").await?;
    assert_eq!((&body["valid"], outcome(&body, "target", "publish")), (&json!(true), "unknown"), "{body:#}");
    assert_eq!((outcome(&body, "source", "calls"), outcome(&body, "target", "calls")), ("ok", "ok"), "{body:#}");
    tells(&body, "warnings", "target", "/target_url", &["`orders.>`", "not known", "$SYS.REQ.USER.INFO"]);

    let create = "$JS.API.CONSUMER.CREATE.ORDERS.sr_preflight";
    let body = with("nocreate", "denied").await?;
    tells(&body, "problems", "source", "/source_url", &["no permission to publish to", create]);
    // With a filter there are consumers with it and without it.
    let filtered = async |source: &str| {
        let (source, target) = (url(&site.source, source), url(&site.target, "listed"));
        let filter = "orders.eu.>";
        let document =
            json!({"stream": "ORDERS", "source_url": source, "target_url": target, "filter_subject": filter});
        validate(&site, document).await
    };
    let body = filtered("nocreate").await?;
    let both = format!("`{create}`, `{create}.orders.eu.>`");
    fails(&body, "source", "calls", "/source_url", &["no permission to publish to", &both]);
    let body = filtered("filtered").await?;
    fails(&body, "source", "calls", "/source_url", &["no permission to publish to", &format!("`{create}`")]);
    assert!(!body.to_string().contains(&format!("{create}.")), "{body:#}");
    let body = filtered("tryfiltered").await?;
    fails(&body, "source", "calls", "/source_url", &["Permissions Violation", create]);
    let body = filtered("listed").await?;
    assert_eq!(outcome(&body, "source", "calls"), "ok", "{body:#}");
    let body = with("trycreate", "listed").await?;
    fails(&body, "source", "calls", "/source_url", &["Permissions Violation", create]);
    let body = with("listed", "trycreate").await?;
    fails(&body, "target", "calls", "/target_url", &["Permissions Violation", create]);
    let body = with("trynext", "listed").await?;
    fails(&body, "source", "calls", "/source_url", &["Permissions Violation", "CONSUMER.MSG.NEXT.ORDERS"]);
    let body = with("noinfo", "part").await?;
    fails(&body, "source", "stream", "/source_url", &["Permissions Violation", "$JS.API.STREAM.INFO.ORDERS"]);
    let body = with("denied", "deaf").await?;
    tells(&body, "problems", "target", "/target_url", &["Permissions Violation for Subscription"]);

    for server in [&site.source, &site.target] {
        let info = Raw::connect(&server.url_as("test:test")).await?.api("STREAM.INFO.ORDERS", Value::Null).await?;
        let state = &info["state"];
        assert_eq!((&state["consumer_count"], &state["last_seq"]), (&json!(0), &json!(0)), "{info}");
    }
    Ok(())
}

#[tokio::test]
async fn missing_permissions_are_found_by_asking_or_by_trying() -> Result<()> {
    permissions(None).await
}

#[tokio::test]
async fn missing_permissions_are_found_on_2_10() -> Result<()> {
    permissions(Some("2.10.26")).await
}

#[tokio::test]
async fn where_subjects_end_up_is_told() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("ORDERS", json!({"subjects": ["orders.*.new", "returns"]})).await?;
    site.target_stream("OTHER", json!({"subjects": ["east.orders.>", "x.returns"]})).await?;
    site.target_stream("ORDERS", json!({"subjects": ["orders.eu.>", "returns"]})).await?;
    site.target_stream("ALL", json!({"subjects": ["y.orders.*.*", "y.returns"]})).await?;
    let with = async |fields: Value| validate(&site, site.document_with("ORDERS", fields)).await;

    let body = with(json!({"filter_subject": "returns"})).await?;
    healthy(&body);
    healthy(&with(json!({"filter_subject": "orders.eu.>"})).await?);
    healthy(&with(json!({"target_stream": "ALL", "target_subject_prefix": "y"})).await?);
    let words =
        ["`ORDERS` listens on `orders.eu.>`, `returns` only, a part of `orders.*.new`", "first message beside it"];
    warns(&with(json!({})).await?, "target", "subjects", "/target_stream", &words);
    let body = with(json!({"filter_subject": "orders.us.*"})).await?;
    fails(
        &body,
        "target",
        "subjects",
        "/target_stream",
        &["does not listen on `orders.us.new`, only on `orders.eu.>`"],
    );
    let prefix = json!({"target_subject_prefix": "east", "filter_subject": "orders.>"});
    let words = ["`east.orders.*.new` belongs to stream `OTHER` there, not to `ORDERS`"];
    fails(&with(prefix.clone()).await?, "target", "subjects", "/target_subject_prefix", &words);
    let remove = json!({"target_subject_remove": "returns", "filter_subject": "returns"});
    fails(&with(remove).await?, "target", "subjects", "/target_subject_remove", &["empty after the mapping"]);

    // The same for a target that would be made.
    let body = with(merged(prefix, json!({"target_stream": "NEW"}))).await?;
    let words = ["would be created with subjects `east.orders.*.new`: ", "overlaps with stream `OTHER`"];
    fails(&body, "target", "stream", "/target_subject_prefix", &words);
    let body = with(json!({"target_stream": "NEW", "target_subject_remove": "orders.*.new"})).await?;
    fails(&body, "target", "stream", "/target_subject_remove", &["no stream can have the subject ``"]);
    Ok(())
}

#[tokio::test]
async fn what_a_target_does_not_take_is_told() -> Result<()> {
    let target = Server::builder(Role::Target).config("max_payload: 65536").start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).control_at_source().start().await?;
    let pair = async |name: &str, source: Value, target: Value| {
        let small = json!({"max_msg_size": 60_000});
        site.source_stream(name, merged(small.clone(), source)).await?;
        // Copies are larger.
        site.target_stream(name, merged(json!({"max_msg_size": 61_000}), target)).await?;
        validate(&site, site.document(name)).await
    };
    healthy(&pair("GOOD", json!({}), json!({})).await?);
    let body = pair("PAYLOAD", json!({"max_msg_size": -1}), json!({"max_msg_size": -1})).await?;
    warns(&body, "target", "max_payload", "/target_url", &["`max_payload` of the server is 65536", "up to 1048576"]);
    let body = pair("SIZE", json!({}), json!({"max_msg_size": 1000})).await?;
    warns(&body, "target", "max_payload", "/target_stream", &["`max_msg_size` of the stream is 1000", "up to 60000"]);
    let body = pair("ROLLUP", json!({"allow_rollup_hdrs": true}), json!({})).await?;
    warns(&body, "target", "headers", "/target_stream", &["`allow_rollup_hdrs`", "copied without `Nats-Rollup`"]);
    if site.source.at_least(2, 11) {
        let body = pair("TTL", json!({"allow_msg_ttl": true}), json!({})).await?;
        warns(&body, "target", "headers", "/target_stream", &["`allow_msg_ttl`", "copied without `Nats-TTL`"]);
    }
    let body = pair("WINDOW", json!({}), json!({"duplicate_window": 10_000_000_000_u64})).await?;
    warns(&body, "target", "duplicates", "/target_stream", &["duplicate window of the target is 10s", "58s"]);
    let body = pair("NOACK", json!({}), json!({"no_ack": true})).await?;
    fails(&body, "target", "stream", "/target_stream", &["`NOACK` does not acknowledge messages"]);
    healthy(&pair("QUEUE", json!({"retention": "workqueue"}), json!({"retention": "interest"})).await?);

    site.filled("SEALED", 1).await?;
    let mut raw = site.target_stream("SEALED", json!({"max_msg_size": -1})).await?;
    let sealed = json!({"name": "SEALED", "subjects": ["sealed.>"], "sealed": true});
    raw.api("STREAM.UPDATE.SEALED", sealed).await?;
    let body = validate(&site, site.document("SEALED")).await?;
    tells(&body, "problems", "target", "/target_stream", &["`SEALED` is sealed"]);
    raw.create_stream("MIRROR", json!({"mirror": {"name": "GOOD"}})).await?;
    let body = validate(&site, site.document_with("GOOD", json!({"target_stream": "MIRROR"}))).await?;
    tells(&body, "problems", "target", "/target_stream", &["`MIRROR` is a mirror"]);
    Ok(())
}

#[tokio::test]
async fn a_filter_or_a_start_that_finds_nothing_is_told() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    let filtered = site.document_with("ORDERS", json!({"filter_subject": "returns.>"}));
    // A target that is made listens on what is in scope: on nothing.
    let body = validate(&site, filtered.clone()).await?;
    tells(&body, "problems", "target", "/target_stream", &["cannot be created: filters and exclusions leave nothing"]);
    site.target_stream("ORDERS", json!({})).await?;
    let body = validate(&site, filtered).await?;
    warns(&body, "source", "filter", "/filter_subject", &["`returns.>` matches no subject", "`ORDERS`", "`orders.>`"]);
    healthy(&validate(&site, site.document_with("ORDERS", json!({"start_sequence": 6}))).await?);
    let body = validate(&site, site.document_with("ORDERS", json!({"start_sequence": 7}))).await?;
    warns(&body, "source", "start", "/start_sequence", &["7 is beyond the end", "`ORDERS`", "at 5"]);
    Ok(())
}

#[tokio::test]
async fn where_advisories_go_is_told() -> Result<()> {
    let users = r#"{user: quiet, password: x, permissions: {publish: {deny: ["told.>"]}}}"#;
    let site = between(guarded(Role::Source, users).await?, Server::start(Role::Target).await?).await?;
    let admin = site.source.url_as("test:test");
    stream(&admin, "NODES", json!({})).await?;
    let with = async |user: &str, subject: &str, reliable: bool| {
        let advisory = json!({"subject": subject, "reliable": reliable});
        let sampling = json!({"inspect_field": "sender", "inspect_duration": "1h", "advisory": advisory});
        let (source, target) = (site.source.url_as(user), site.target.url());
        let document = json!({"stream": "NODES", "source_url": source, "target_url": target});
        validate(&site, merged(document, sampling)).await
    };
    let (path, subject) = ("/advisory/subject", "told.%s.%v");
    healthy(&with("test:test", subject, false).await?);
    let body = with("test:test", subject, true).await?;
    warns(&body, "source", "advisory", path, &["no stream stores reliable advisories", "`told.new.>`", "at most 8"]);
    stream(&admin, "TOLD", json!({"subjects": ["told.new.>", "told.timeout.>", "told.recover.*"]})).await?;
    let body = with("test:test", subject, true).await?;
    warns(&body, "source", "advisory", path, &["no stream stores reliable advisories to `told.expire.>`:"]);
    stream(&admin, "LOST", json!({"subjects": ["told.expire.>"]})).await?;
    healthy(&with("test:test", subject, true).await?);
    let body = with("quiet:x", subject, true).await?;
    fails(&body, "source", "advisory", path, &["no permission to publish advisories to", "`told.expire.>`"]);
    let body = with("test:test", "nodes.told.%v", true).await?;
    warns(&body, "source", "advisory", path, &["source stream `NODES`", "`nodes.told.>`", "without a sender"]);
    Ok(())
}

#[tokio::test]
async fn a_stream_into_itself_is_found_by_whatever_address() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    let proxy = Proxy::start(site.source.port()).await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"target_url": proxy.url()}))).await?;
    fails(&body, "target", "stream", "/target_url", &["`ORDERS` is the source stream itself, by another address"]);
    // Another stream of the same server is something else.
    let fields = json!({"target_url": proxy.url(), "target_stream": "COPY", "target_subject_prefix": "copy"});
    healthy(&validate(&site, site.document_with("ORDERS", fields)).await?);
    Ok(())
}

/// Two accounts of one server may have copies of one backup, made in the same moment; from here they look like one
/// stream that is seen by two users.
#[tokio::test]
async fn what_looks_like_the_source_to_another_user_may_be_a_copy() -> Result<()> {
    let site = between(guarded(Role::Source, "{user: other, password: x}").await?, Server::start(Role::Target).await?);
    let site = site.await?;
    let url = site.source.url_as("test:test");
    stream(&url, "ORDERS", json!({})).await?;
    let document = |target: &str| json!({"stream": "ORDERS", "source_url": url, "target_url": target});
    let body = validate(&site, document(&site.source.url_as("other:x"))).await?;
    assert_eq!((&body["valid"], outcome(&body, "target", "stream")), (&json!(true), "warning"), "{body:#}");
    let words = ["`ORDERS` was made in the same moment on the same server", "restored from its backup"];
    tells(&body, "warnings", "target", "/target_url", &words);
    Ok(())
}

#[tokio::test]
async fn an_api_prefix_that_a_stream_stores_is_told_after_one_message() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    site.target_stream("ODD", json!({"subjects": ["odd.>"]})).await?;
    let body = validate(&site, site.document_with("ORDERS", json!({"target_api_prefix": "odd"}))).await?;
    let words = ["`odd.STREAM.INFO.ORDERS` was stored by stream `ODD`", "the API prefix is a subject of that stream"];
    fails(&body, "target", "stream", "/target_url", &words);
    assert_eq!(site.target().await?.stream_state("ODD").await?["messages"], 1);
    Ok(())
}

#[tokio::test]
async fn a_fault_of_a_context_points_at_the_context() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    let folder = tempfile::tempdir()?;
    std::fs::create_dir_all(folder.path().join("nats/context"))?;
    let closed = format!("nats://127.0.0.1:{}", free_port()?);
    for (name, url) in [("closed", &closed), ("hub", &site.target.url())] {
        let file = folder.path().join(format!("nats/context/{name}.json"));
        std::fs::write(file, json!({"url": url}).to_string())?;
    }
    let service =
        Service::builder(&site.service_url(), "OTHER").args(["--prefix", "other", "--bucket-prefix", "OTHER"]);
    let _service = service.env("XDG_CONFIG_HOME", &folder.path().display().to_string()).start().await?;
    let with = async |source: &str, target: &str| {
        let document = json!({"stream": "ORDERS", "source_context": source, "target_context": target});
        request(&site.client, "other.config.validate", document).await
    };
    fails(&with("closed", "hub").await?, "source", "connect", "/source_context", &["cannot connect to", "refused"]);
    let body = with("hub", "closed").await?;
    tells(&body, "problems", "target", "/target_context", &["cannot connect to", "refused"]);
    let body = with("none", "hub").await?;
    tells(&body, "problems", "source", "/source_context", &["no such file"]);
    Ok(())
}

#[tokio::test]
async fn a_ring_with_known_replications_is_told() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    let back = |stream: &str, fields: Value| {
        merged(json!({"stream": stream, "source_url": site.target.url(), "target_url": site.source.url()}), fields)
    };
    // ORDERS -> MIDDLE at the target -> LAST at the source -> ORDERS.
    site.add("ORDERS", json!({"target_stream": "MIDDLE"})).await?;
    site.settled("ORDERS", 1).await?;
    let fields = json!({"target_stream": "LAST", "target_subject_prefix": "last"});
    healthy(&validate(&site, back("MIDDLE", fields.clone())).await?);
    site.send("config.add", back("MIDDLE", fields)).await?;
    site.settled("MIDDLE", 1).await?;

    let home = json!({"target_stream": "ORDERS", "target_url": site.source.url(), "target_subject_remove": "last."});
    let body = validate(&site, site.document_with("LAST", home.clone())).await?;
    let words = ["closes a replication loop with replication `ORDERS`, `MIDDLE`", "source stream `LAST`"];
    healthy(&body);
    let checks = body["preflight"]["target"]["checks"].as_array().into_iter().flatten();
    let said: String = checks.filter_map(|check| check["message"].as_str()).collect();
    assert!(words.iter().all(|word| said.contains(word)) && said.contains("`loop_protection`"), "{body:#}");
    let off = merged(home.clone(), json!({"loop_protection": false}));
    let why = "`loop_protection` is false for replication `LAST`";
    let body = validate(&site, site.document_with("LAST", off)).await?;
    warns(&body, "target", "cycle", "/target_url", &[words.as_slice(), &["stored a second time", why]].concat());
    // By another address the servers' names tell.
    let proxy = Proxy::start(site.source.port()).await?;
    let home = merged(home, json!({"source_url": proxy.url(), "target_url": proxy.url()}));
    let body = validate(&site, site.document_with("LAST", home.clone())).await?;
    let why = "under another address or login: add `TEST TEST` to its `target_origin`";
    warns(&body, "target", "cycle", "/target_url", &[words.as_slice(), &["`LAST`", "`ORDERS`", why]].concat());
    Ok(())
}

/// Servers that differ in what they know: one side or the other is old.
#[tokio::test]
async fn a_healthy_pair_with_an_old_server_has_nothing_against_it() -> Result<()> {
    let old = |role| Server::builder(role).version("2.10.26").start();
    let (source, target) = (Server::start(Role::Source).await?, old(Role::Target).await?);
    let site = Site::builder().on(source, target).control_at_source().start().await?;
    site.filled("ORDERS", 1).await?;
    healthy(&validate(&site, site.document("ORDERS")).await?);
    site.target_stream("ORDERS", json!({})).await?;
    healthy(&validate(&site, site.document("ORDERS")).await?);
    if site.source.at_least(2, 11) {
        // What would be made there cannot have it.
        site.source_stream("TTL", json!({"allow_msg_ttl": true})).await?;
        let body = validate(&site, site.document("TTL")).await?;
        warns(&body, "target", "headers", "/target_stream", &["`allow_msg_ttl`"]);
    }
    Ok(())
}
