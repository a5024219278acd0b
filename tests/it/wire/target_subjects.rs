//! What a target has to listen on: the subjects that the source stores, whatever its configuration says of them, and
//! those of every source where several are copied into one target.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{
    Expect, Outgoing, Raw, Role, SITE, Server, Service, Site, Stored,
    proxy::{BOTH, Proxy},
    wait_for,
};

const LONG: Duration = Duration::from_secs(120);
const STREAM: &str = "S";

async fn publish(raw: &mut Raw, subjects: &[&str], count: usize) -> Result<u64> {
    raw.publish_all((0..count).map(|i| Outgoing::new(subjects[i % subjects.len()], format!("{i}")))).await
}

async fn config(raw: &mut Raw, stream: &str) -> Result<Value> {
    Ok(raw.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take())
}

async fn listens(site: &Site, stream: &str) -> Result<Vec<String>> {
    Ok(serde_json::from_value(config(&mut site.target().await?, stream).await?["subjects"].take())?)
}

/// Gives a stream other subjects.
async fn edit(raw: &mut Raw, stream: &str, subjects: Value) -> Result<()> {
    let mut config = config(raw, stream).await?;
    config["subjects"] = subjects;
    raw.api(&format!("STREAM.UPDATE.{stream}"), config).await?;
    Ok(())
}

/// What `config.validate` says, as text.
async fn validate(site: &Site, fields: Value) -> Result<Value> {
    Ok(site.send("config.validate", site.document_with(STREAM, fields)).await?.body)
}

/// The target is created for everything that the source stores.
async fn is_created(site: &Site, fields: Value, seq: u64, subjects: &[&str], mapped: fn(&str) -> String) -> Result<()> {
    let said = validate(site, fields.clone()).await?;
    assert_eq!(said["valid"], true, "{said}");
    site.add(STREAM, fields).await?;
    site.settled_within(STREAM, seq, LONG).await?;
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE).mapped(mapped).late_allowed()).await?;
    assert_eq!(listens(site, STREAM).await?, subjects);
    ensure!(!site.service.logs().contains("target stream updated"), "not at once: {}", site.service.logs());
    Ok(())
}

fn same(subject: &str) -> String {
    subject.to_owned()
}

#[tokio::test]
async fn subjects_that_the_source_transforms_are_copied() -> Result<()> {
    let site = Site::start().await?;
    let transform = json!({"src": "in.*.>", "dest": "stored.{{wildcard(1)}}.>"});
    let config = json!({"subjects": ["in.>", "other"], "subject_transform": transform});
    let mut raw = site.source_stream(STREAM, config).await?;
    let last = publish(&mut raw, &["in.a.b", "in.c", "other"], 30).await?;
    is_created(&site, json!({}), last, &["in.>", "other", "stored.*.>"], same).await
}

#[tokio::test]
async fn subjects_that_the_source_had_before_are_copied() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["old.>", "mid"]})).await?;
    publish(&mut raw, &["old.a", "mid"], 20).await?;
    edit(&mut raw, STREAM, json!(["new.*"])).await?;
    let last = publish(&mut raw, &["new.a", "new.b"], 20).await?;
    is_created(&site, json!({}), last, &["mid", "new.*", "old.a"], same).await
}

#[tokio::test]
async fn a_text_removed_inside_a_wildcard_is_copied() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["a.>"]})).await?;
    let last = publish(&mut raw, &["a.b.c", "a.x.y", "a.a.b.d"], 30).await?;
    let removed = |subject: &str| match subject {
        "a.b.c" => "c".to_owned(),
        "a.a.b.d" => "a.d".to_owned(),
        other => other.to_owned(),
    };
    is_created(&site, json!({"target_subject_remove": "a.b"}), last, &["a.>", "c"], removed).await
}

#[tokio::test]
async fn a_removed_token_leaves_a_shorter_subject() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["a.*"]})).await?;
    let last = publish(&mut raw, &["a.x", "a.y"], 20).await?;
    let removed = |subject: &str| subject.strip_suffix(".x").unwrap_or(subject).to_owned();
    is_created(&site, json!({"target_subject_remove": ".x"}), last, &["a", "a.*"], removed).await
}

#[tokio::test]
async fn a_mirror_is_copied_under_the_subjects_of_its_origin() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("ORIGIN", json!({"subjects": ["o.*.>", "p"]})).await?;
    publish(&mut raw, &["o.a.b", "p"], 20).await?;
    site.source_stream(STREAM, json!({"subjects": null, "mirror": {"name": "ORIGIN"}})).await?;
    holds(&mut raw, STREAM, 20).await?;
    is_created(&site, json!({}), 20, &["o.*.>", "p"], same).await
}

#[tokio::test]
async fn an_aggregate_is_copied_under_what_its_sources_make() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("ONE", json!({"subjects": ["one.>", "rest"]})).await?;
    publish(&mut raw, &["one.a", "one.b", "rest"], 30).await?;
    site.source_stream("TWO", json!({"subjects": ["two.*"]})).await?;
    publish(&mut raw, &["two.a"], 10).await?;
    let sources = json!([
        {"name": "ONE", "filter_subject": "one.>"},
        {"name": "TWO", "subject_transforms": [{"src": "two.*", "dest": "second.{{wildcard(1)}}"}]},
    ]);
    site.source_stream(STREAM, json!({"subjects": null, "sources": sources})).await?;
    holds(&mut raw, STREAM, 30).await?;
    is_created(&site, json!({}), 30, &["one.>", "second.*"], same).await
}

/// The origin is gone: nothing but what is stored tells the subjects.
#[tokio::test]
async fn a_mirror_whose_origin_is_gone_is_copied_under_few_subjects() -> Result<()> {
    const COUNT: usize = 30_000;
    let site = Site::start().await?;
    let mut raw = site.source_stream("ORIGIN", json!({"subjects": ["o.>", "p.>"]})).await?;
    let subject = |i: usize| match i % 3 {
        0 => format!("o.{i}"),
        1 => format!("o.eu.{i}.x"),
        _ => "p.one".to_owned(),
    };
    raw.publish_all((0..COUNT).map(|i| Outgoing::new(subject(i), "x"))).await?;
    site.source_stream(STREAM, json!({"subjects": null, "mirror": {"name": "ORIGIN"}})).await?;
    holds(&mut raw, STREAM, COUNT as u64).await?;
    raw.api("STREAM.DELETE.ORIGIN", Value::Null).await?;
    is_created(&site, json!({}), COUNT as u64, &["o.*", "o.*.*.x", "p.one"], same).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn a_million_subjects_without_an_origin_are_few_at_the_target() -> Result<()> {
    const COUNT: u64 = 1_000_000;
    let site = Site::start().await?;
    let mut raw = site.source_stream("ORIGIN", json!({"subjects": ["o.>"]})).await?;
    raw.publish_all((0..COUNT).map(|i| Outgoing::new(format!("o.{}.{i}", i % 3), "x"))).await?;
    site.source_stream(STREAM, json!({"subjects": null, "mirror": {"name": "ORIGIN"}})).await?;
    holds(&mut raw, STREAM, COUNT).await?;
    raw.api("STREAM.DELETE.ORIGIN", Value::Null).await?;
    let begun = std::time::Instant::now();
    site.add(STREAM, json!({})).await?;
    site.row_when(STREAM, "copies", |row| row["position"]["source_seq"].as_u64() > Some(0)).await?;
    println!("copies after {:?}", begun.elapsed());
    site.settled_within(STREAM, COUNT, LONG).await?;
    assert_eq!(listens(&site, STREAM).await?, ["o.0.*", "o.1.*", "o.2.*"]);
    Ok(())
}

async fn holds(raw: &mut Raw, stream: &str, messages: u64) -> Result<()> {
    wait_for(&format!("`{stream}` to hold {messages}"), LONG, async || {
        raw.stream_state(stream).await.is_ok_and(|state| state["messages"] == messages)
    })
    .await
}

#[tokio::test]
async fn a_target_that_was_created_is_widened_while_the_copy_runs() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["s.a.*"]})).await?;
    publish(&mut raw, &["s.a.1"], 20).await?;
    site.add(STREAM, json!({"target_subject_prefix": "t"})).await?;
    site.settled(STREAM, 20).await?;
    edit(&mut raw, STREAM, json!(["s.a.*", "late.>"])).await?;
    let last = publish(&mut raw, &["late.x", "s.a.2", "late.y.z"], 30).await?;
    site.settled_within(STREAM, last, LONG).await?;
    assert_eq!(listens(&site, STREAM).await?, ["t.late.>", "t.s.a.*"]);
    // A subject that is there for a moment only.
    edit(&mut raw, STREAM, json!(["s.a.*", "late.>", "gone.>"])).await?;
    publish(&mut raw, &["gone.x"], 1).await?;
    edit(&mut raw, STREAM, json!(["s.a.*", "late.>"])).await?;
    let last = publish(&mut raw, &["s.a.2"], 10).await?;
    site.settled_within(STREAM, last, LONG).await?;
    let expect = Expect::copy_of(STREAM).site(SITE).mapped(|subject| format!("t.{subject}"));
    site.verify(STREAM, &expect.late_allowed()).await?;
    let subjects = listens(&site, STREAM).await?;
    ensure!(subjects.iter().any(|subject| subject.starts_with("t.gone.")), "{subjects:?}");
    let row = site.row(STREAM).await.context("no row")?;
    assert_eq!(row["state"], "running", "{row}");
    Ok(())
}

/// Connecting alone takes longer there than answers do elsewhere.
#[tokio::test]
async fn a_target_over_slow_lines_is_widened_too() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["s.a.*"]})).await?;
    publish(&mut raw, &["s.a.1"], 20).await?;
    let (source, target) = (Proxy::start(site.source.port()).await?, Proxy::start(site.target.port()).await?);
    site.add(STREAM, json!({"source_url": source.url(), "target_url": target.url()})).await?;
    site.settled(STREAM, 20).await?;
    [&source, &target].into_iter().for_each(|proxy| proxy.latency(BOTH, Duration::from_millis(300)));
    edit(&mut raw, STREAM, json!(["s.a.*", "gone.>"])).await?;
    publish(&mut raw, &["gone.x"], 1).await?;
    edit(&mut raw, STREAM, json!(["s.a.*"])).await?;
    let last = publish(&mut raw, &["s.a.2"], 10).await?;
    site.settled_within(STREAM, last, LONG).await?;
    let subjects = listens(&site, STREAM).await?;
    ensure!(subjects.iter().any(|subject| subject.starts_with("gone.")), "{subjects:?}");
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE).late_allowed()).await
}

/// Waits until the replication is held, and returns why.
async fn held(site: &Site, id: &str) -> Result<String> {
    let row = site.row_when(id, "is held", |row| row["state"] == "held").await?;
    Ok(row["last_error"]["message"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_target_of_others_is_not_widened_but_named() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["s.>"]})).await?;
    let mut target = site.target_stream(STREAM, json!({"subjects": ["s.>"]})).await?;
    publish(&mut raw, &["s.a"], 20).await?;
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 20).await?;
    let before = config(&mut target, STREAM).await?;
    edit(&mut raw, STREAM, json!(["s.>", "late.*"])).await?;
    publish(&mut raw, &["s.a", "s.b", "late.x", "s.a"], 4).await?;
    let message = held(&site, STREAM).await?;
    for part in ["source sequence 23", "`late.x`", "target stream `S`", "`s.>`", "`target_update`"] {
        ensure!(message.contains(part), "{part} is missing: {message}");
    }
    assert_eq!(config(&mut target, STREAM).await?, before);
    // `config validate` says so too, and what would help.
    let said = validate(&site, json!({})).await?.to_string();
    ensure!(said.contains("late.*") && said.contains("does not listen"), "{said}");
    let reply = site.send("config.update", site.document_with(STREAM, json!({"target_update": true}))).await?;
    ensure!(reply.error.is_none(), "{reply:?}");
    site.settled_within(STREAM, 24, LONG).await?;
    assert_eq!(listens(&site, STREAM).await?, ["late.*", "s.>"]);
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE).late_allowed()).await
}

#[tokio::test]
async fn validate_names_a_stored_subject_the_target_does_not_take() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["old.>", "s.>"]})).await?;
    publish(&mut raw, &["s.a", "old.a"], 20).await?;
    edit(&mut raw, STREAM, json!(["s.>"])).await?;
    site.target_stream(STREAM, json!({"subjects": ["s.>"]})).await?;
    let said = validate(&site, json!({})).await?;
    let text = said.to_string();
    ensure!(text.contains("`old.a`") && text.contains("target_update"), "{said}");
    let said = validate(&site, json!({"target_update": true})).await?;
    assert_eq!(said["valid"], true, "{said}");
    ensure!(said.to_string().contains("would be given subjects `old.a`"), "{said}");
    // What is not in scope does not matter.
    let said = validate(&site, json!({"exclude_subjects": ["old.>"]})).await?;
    ensure!(said["valid"] == true && !said.to_string().contains("old.a"), "{said}");
    Ok(())
}

/// Streams `<prefix>-<number>`, each with subjects of its own and messages.
async fn several(site: &Site, count: usize) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for i in 0..count {
        let name = format!("TICKETS-{i}");
        let mut raw = site.source_stream(&name, json!({"subjects": [format!("tickets.{i}.*")]})).await?;
        publish(&mut raw, &[&format!("tickets.{i}.a"), &format!("tickets.{i}.b")], 40).await?;
        names.push(name);
    }
    Ok(names)
}

async fn into_one(site: &Site, count: usize, fields: Value) -> Result<()> {
    let names = several(site, count).await?;
    let documents = names.iter().map(|name| {
        let document = site.document_with(name, json!({"target_stream": "SALES"}));
        crate::harness::site::merged(document, fields.clone())
    });
    let added = futures_util::future::join_all(documents.map(|document| site.send("config.add", document))).await;
    for reply in added {
        let reply = reply?;
        ensure!(reply.error.is_none(), "{reply:?}");
    }
    for name in &names {
        site.settled_within(name, 40, LONG).await?;
    }
    let mut expect: Vec<String> = (0..count).map(|i| format!("tickets.{i}.*")).collect();
    expect.sort();
    assert_eq!(listens(site, "SALES").await?, expect);
    site.events.quiet(&["held"])?;
    for name in &names {
        let of_one = Expect::copy_of(name).site(SITE).shared().late_allowed();
        site.verify("SALES", &of_one).await.with_context(|| name.clone())?;
    }
    Ok(())
}

#[tokio::test]
async fn many_sources_added_at_once_share_a_target_that_is_created() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut two = Service::builder(&site.service_url(), SITE).instance("two").start().await?;
    into_one(&site, 6, json!({})).await?;
    ensure!(two.stop().await?.success(), "{}", two.log());
    Ok(())
}

#[tokio::test]
async fn many_sources_with_target_update_share_a_created_target() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut two = Service::builder(&site.service_url(), SITE).instance("two").start().await?;
    into_one(&site, 4, json!({"target_update": true})).await?;
    ensure!(two.stop().await?.success(), "{}", two.log());
    Ok(())
}

#[tokio::test]
async fn sources_of_two_domains_share_a_target_that_is_created() -> Result<()> {
    let one = Server::builder(Role::Source).domain("one").start().await?;
    let two = Server::builder(Role::Source).domain("two").start().await?;
    let site = Site::builder().on(one, Server::start(Role::Target).await?).start().await?;
    let mut rows = Vec::new();
    for (stream, server, domain) in [("tickets-1", &site.source, "one"), ("tickets-2", &two, "two")] {
        let mut raw = Raw::connect(&server.url()).await?;
        let subject = stream.replace('-', ".");
        let config = json!({"name": stream, "subjects": [format!("{subject}.>")]});
        raw.api(&format!("STREAM.CREATE.{stream}"), config).await?;
        publish(&mut raw, &[&format!("{subject}.a"), &format!("{subject}.b.c")], 20).await?;
        rows.push(json!({
            "stream": stream, "source_url": server.url(), "source_domain": domain, "target_url": site.target.url(),
            "target_stream": "sales"
        }));
    }
    let added = rows.into_iter().map(|document| site.send("config.add", document));
    for reply in futures_util::future::try_join_all(added).await? {
        assert_eq!(reply.error, None, "{reply:?}");
    }
    for stream in ["tickets-1", "tickets-2"] {
        site.row_when(stream, "is copied", |row| row["lag"]["messages"] == 0 && row["counters"]["copied"] == 20)
            .await?;
    }
    assert_eq!(site.at_target("sales").await?, 40);
    Ok(())
}

#[tokio::test]
async fn a_deleted_replication_leaves_its_subjects_at_a_shared_target() -> Result<()> {
    let site = Site::start().await?;
    into_one(&site, 2, json!({})).await?;
    site.send("config.delete", json!({"replication": "TICKETS-1"})).await?;
    wait_for("the replication to be gone", LONG, async || site.row("TICKETS-1").await.is_none()).await?;
    publish(&mut site.source().await?, &["tickets.0.c"], 10).await?;
    site.settled_within("TICKETS-0", 50, LONG).await?;
    assert_eq!(listens(&site, "SALES").await?, ["tickets.0.*", "tickets.1.*"]);
    Ok(())
}

/// The target was created for a source with limits: another source gets room beside it.
#[tokio::test]
async fn a_source_that_joins_brings_room_and_settings() -> Result<()> {
    let site = Site::start().await?;
    let small = json!({"subjects": ["a.>"], "max_msgs": 100, "max_msg_size": 1_000, "max_age": 3_600_000_000_000u64});
    let mut raw = site.source_stream("A", small).await?;
    publish(&mut raw, &["a.x"], 100).await?;
    site.add("A", json!({"target_stream": "T"})).await?;
    site.settled_within("A", 100, LONG).await?;
    site.source_stream("B", json!({"subjects": ["b.>"], "max_msgs": 500, "allow_rollup_hdrs": true})).await?;
    raw.publish_all((0..300).map(|i| Outgoing::new("b.x", "y".repeat(i * 10)))).await?;
    site.add("B", json!({"target_stream": "T"})).await?;
    site.settled_within("B", 300, LONG).await?;
    publish(&mut raw, &["a.y"], 50).await?;
    site.settled_within("A", 150, LONG).await?;
    assert_eq!(site.at_target("T").await?, 450, "nothing was dropped for the other source");
    let config = config(&mut site.target().await?, "T").await?;
    assert!(config["max_msgs"].as_i64() >= Some(600) && config["allow_rollup_hdrs"] == true, "{config}");
    assert_eq!(config["metadata"]["replicator.site"], SITE, "{config}");
    assert_eq!(config["metadata"]["replicator.replications"], "A,B", "{config}");
    assert!(config["metadata"]["replicator.source_stream"].is_string(), "{config}");
    Ok(())
}

/// Somebody took a subject away: the copy gives it back.
#[tokio::test]
async fn a_subject_that_another_update_took_away_is_given_back() -> Result<()> {
    let site = Site::start().await?;
    into_one(&site, 2, json!({})).await?;
    let mut target = site.target().await?;
    edit(&mut target, "SALES", json!(["tickets.0.*"])).await?;
    publish(&mut site.source().await?, &["tickets.1.c"], 10).await?;
    site.settled_within("TICKETS-1", 50, LONG).await?;
    assert_eq!(listens(&site, "SALES").await?, ["tickets.0.*", "tickets.1.*"]);
    Ok(())
}

#[tokio::test]
async fn what_overlaps_names_the_subjects_and_the_other_stream() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["s.>", "free"]})).await?;
    publish(&mut raw, &["s.a"], 5).await?;
    site.target_stream("OTHER", json!({"subjects": ["s.taken.*"]})).await?;
    site.add(STREAM, json!({})).await?;
    let message = held(&site, STREAM).await?;
    for part in ["cannot create target stream `S`", "`free`, `s.>`", "`s.>` overlaps with stream `OTHER`"] {
        ensure!(message.contains(part), "{part} is missing: {message}");
    }
    // The same where a target that was created would be widened.
    site.source_stream("W", json!({"subjects": ["w.>"]})).await?;
    publish(&mut raw, &["w.a"], 5).await?;
    site.add("W", json!({})).await?;
    site.settled("W", 5).await?;
    site.target_stream("TAKER", json!({"subjects": ["late.x"]})).await?;
    edit(&mut raw, "W", json!(["w.>", "late.*"])).await?;
    publish(&mut raw, &["late.y"], 1).await?;
    let message = held(&site, "W").await?;
    for part in ["target stream `W`", "`late.*`", "stream `TAKER`"] {
        ensure!(message.contains(part), "{part} is missing: {message}");
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_whose_name_is_no_key_is_copied() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("$M_msgs", json!({"subjects": ["m.>"], "retention": "interest"})).await?;
    site.add("$M_msgs", json!({"name": "a+b"})).await?;
    let id = "=24M_msgs.a=2Bb";
    let runs = |row: &Value| row["state"] == "running";
    site.row_when(id, "runs", runs).await?;
    publish(&mut raw, &["m.a", "m.b"], 20).await?;
    site.copied("$M_msgs", 20).await?;
    site.service.stop().await?;
    site.service.restart().await?;
    publish(&mut raw, &["m.a", "m.b"], 20).await?;
    site.copied("$M_msgs", 40).await?;
    let settled = |row: &Value| row["state"] == "running" && row["position"]["source_seq"] == 40;
    site.row_when(id, "has settled", settled).await?;
    Ok(())
}

#[tokio::test]
async fn an_id_of_its_own_names_a_replication_everywhere() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = site.source_stream("f\u{fc}r", json!({"subjects": ["f.>"]})).await?;
    publish(&mut raw, &["f.a"], 20).await?;
    site.add("f\u{fc}r", json!({"id": "for", "target_stream": "FOR"})).await?;
    site.settled("for", 20).await?;
    let reply = site.send("config.get", json!({"replication": "for"})).await?;
    assert_eq!(reply.body["config"]["id"], "for", "{reply:?}");
    let position = site.position("for").await?;
    ensure!(position.is_some(), "no position under the id");
    site.events.wait("started", "for").await?;
    // The id cannot be that of another one.
    let reply = site.send("config.add", site.document_with("OTHER", json!({"id": "for"}))).await?;
    ensure!(reply.error.is_some(), "{reply:?}");
    for bad in ["a b", "a..b", ".a", "heartbeats", "a/b", "\u{fc}"] {
        let reply = site.send("config.add", site.document_with("OTHER", json!({"id": bad}))).await?;
        ensure!(reply.error.is_some(), "`{bad}`: {reply:?}");
    }
    let all: Vec<Stored> = site.target().await?.read_stream("FOR").await?;
    assert_eq!(all.len(), 20);
    Ok(())
}
