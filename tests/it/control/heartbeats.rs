//! Heartbeats on real servers: from a file, from the bucket, by request, and by one of several instances.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::random;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::client::{ask, refused};
use crate::harness::raw::{header_values, wait_messages};
use crate::harness::{LIMIT, PROMPT, Raw, Role, Server, Service, Site, Stored, connect, secrets, timed, wait_for};

const METRICS: &str = "choria_stream_replicator_heartbeat_";

/// A server with a stream that listens on `hb.>`.
async fn listening() -> Result<(Server, Raw)> {
    let server = Server::start(Role::Target).await?;
    let mut raw = Raw::connect(&server.url()).await?;
    raw.create_stream("HB", json!({"subjects": ["hb.>"]})).await?;
    Ok((server, raw))
}

/// A small site whose target listens, with more arguments.
async fn site(args: &[&str]) -> Result<(Site, Raw)> {
    let (target, raw) = listening().await?;
    let source = Server::start(Role::Source).await?;
    let args = args.iter().map(|argument| (*argument).to_owned());
    Ok((Site::builder().on(source, target).control_at_source().args(args).start().await?, raw))
}

fn heartbeats(url: &str, subject: &str) -> Value {
    json!({"url": url, "interval": "200ms", "subjects": [{"subject": subject}]})
}

/// Messages on one subject.
async fn on(raw: &mut Raw, subject: &str) -> Result<Vec<Stored>> {
    Ok(raw.read_stream("HB").await?.into_iter().filter(|message| message.subject == subject).collect())
}

/// Waits for so many more on one subject.
async fn more(raw: &mut Raw, subject: &str, count: usize) -> Result<()> {
    let enough = on(raw, subject).await?.len() + count;
    let what = format!("{enough} heartbeats on `{subject}`");
    wait_for(&what, LIMIT, async || on(raw, subject).await.is_ok_and(|all| all.len() >= enough)).await
}

fn header(message: &Stored, name: &str) -> Vec<String> {
    header_values(&message.header, name)
}

fn config(folder: &TempDir, yaml: &str) -> Result<String> {
    let file = folder.path().join(format!("{:x}.yaml", random::<u64>()));
    std::fs::write(&file, yaml)?;
    Ok(file.display().to_string())
}

/// One number of the metrics page.
async fn metric(service: &Service, series: &str) -> Result<Option<f64>> {
    let (_, page) = service.get("/metrics").await?;
    let start = format!("{METRICS}{series} ");
    let found = page.lines().find_map(|line| line.strip_prefix(&start)).map(str::parse);
    Ok(found.transpose()?)
}

async fn paused(service: &Service) -> Option<bool> {
    let series = format!("paused{{hostname=\"{}\",replicator=\"TEST\"}}", host());
    Some(metric(service, &series).await.ok()?? == 1.0)
}

fn host() -> String {
    std::fs::read_to_string(Path::new("/proc/sys/kernel/hostname")).unwrap_or_default().trim().to_owned()
}

#[tokio::test]
async fn heartbeats_of_a_file_have_body_headers_and_interval() -> Result<()> {
    let (target, mut raw) = listening().await?;
    let folder = tempfile::tempdir()?;
    let url = target.url_as(&format!("me:{}", secrets::secret()));
    let yaml = format!(
        "name: TEST\nheartbeats:\n  url: {url}\n  interval: 1s\n  headers: {{X-All: all, X-Both: all}}\n  subjects:\n  \
         - subject: hb.slow\n  - subject: hb.fast\n    interval: 200ms\n    headers: {{X-Both: own}}\n"
    );
    let file = config(&folder, &yaml)?;
    let source = Server::start(Role::Source).await?;
    let arguments = ["--config", file.as_str(), "--monitor", "127.0.0.1:0"];
    let site = Site::builder().on(source, target).control_at_source().args(arguments).start().await?;
    wait_for("three slow ones", LIMIT, async || on(&mut raw, "hb.slow").await.is_ok_and(|all| all.len() >= 3)).await?;
    let (slow, fast) = (on(&mut raw, "hb.slow").await?, on(&mut raw, "hb.fast").await?);
    for (message, both) in slow.iter().map(|m| (m, "all")).chain(fast.iter().map(|m| (m, "own"))) {
        let body: i64 = String::from_utf8(message.payload.clone())?.parse()?;
        let stored = i64::try_from(message.time / 1_000_000_000)?;
        assert!((stored - 2..=stored).contains(&body), "{body} was stored at {stored}");
        assert_eq!(header(message, "Choria-SR-Originator"), [host()]);
        assert_eq!(header(message, "Choria-SR-Subject"), std::slice::from_ref(&message.subject));
        assert_eq!((header(message, "X-All"), header(message, "X-Both")), (vec!["all".into()], vec![both.into()]));
    }
    // Never more often than they should be; the first of all may have been late by itself.
    for (all, interval) in [(&slow, 1000), (&fast, 200)] {
        let time = (all[all.len() - 1].time - all[1].time) / 1_000_000;
        let least = (all.len() as u64 - 2) * interval;
        assert!(time + interval / 2 >= least, "{} in {time} ms", all.len());
    }
    assert!(fast.len() > 2 * slow.len(), "{} and {}", fast.len(), slow.len());

    let shown = site.ask("heartbeat.get", "").await?.body;
    assert_eq!(
        (&shown["origin"], &shown["revision"], &shown["rejected"]),
        (&json!("file"), &Value::Null, &Value::Null)
    );
    assert!(shown["config"]["url"].as_str().is_some_and(|url| url.contains("me:***@")), "{shown}");

    let labels = "{replicator=\"TEST\",subject=\"hb.fast\"}";
    assert_eq!(metric(&site.service, "subjects_count{replicator=\"TEST\"}").await?, Some(2.0));
    assert_eq!(paused(&site.service).await, Some(false));
    assert_eq!(metric(&site.service, &format!("published_error_count{labels}")).await?, Some(0.0));
    let published = metric(&site.service, &format!("published_count{labels}")).await?.context("no counter")?;
    assert!(published >= fast.len() as f64, "{published} of {}", fast.len());
    assert!(metric(&site.service, &format!("publish_time_count{labels}")).await? >= Some(published));
    assert!(metric(&site.service, &format!("publish_time_sum{labels}")).await? > Some(0.0));
    Ok(())
}

#[tokio::test]
async fn an_edited_key_takes_effect_and_is_no_replication() -> Result<()> {
    let (site, mut raw) = site(&[]).await?;
    let url = site.target.url();
    let (_, begun) = timed(async {
        site.put("heartbeats", heartbeats(&url, "hb.a").to_string()).await?;
        wait_messages(&mut raw, "HB", 1, LIMIT).await
    })
    .await?;
    let (_, changed) = timed(async {
        site.put("heartbeats", heartbeats(&url, "hb.b").to_string()).await?;
        more(&mut raw, "hb.b", 1).await
    })
    .await?;
    let old = on(&mut raw, "hb.a").await?.len();
    more(&mut raw, "hb.b", 3).await?;
    assert_eq!(on(&mut raw, "hb.a").await?.len(), old, "the old ones continue");
    for (endpoint, rows) in [("config.list", "replications"), ("status", "replications")] {
        assert_eq!(site.ask(endpoint, "").await?.body[rows], json!([]));
    }
    for (endpoint, code) in [("config.get", 404), ("config.delete", 404), ("pause", 404)] {
        assert_eq!(site.ask(endpoint, "heartbeats").await?.error, Some(code), "{endpoint}");
    }
    let (_, ended) = timed(async {
        site.bucket("REPLICATOR_CONFIG").await?.delete("heartbeats").await?;
        let none = async || site.ask("heartbeat.get", "").await.is_ok_and(|shown| shown.body["origin"] == "none");
        wait_for("the end", LIMIT, none).await
    })
    .await?;
    assert!(begun.max(changed).max(ended) < PROMPT, "{begun:?} {changed:?} {ended:?}");
    let all = raw.read_stream("HB").await?.len();
    site.put("heartbeats", heartbeats(&url, "hb.c").to_string()).await?;
    more(&mut raw, "hb.c", 3).await?;
    assert_eq!(raw.read_stream("HB").await?.len(), all + on(&mut raw, "hb.c").await?.len(), "a deleted one continues");
    Ok(())
}

#[tokio::test]
async fn an_invalid_value_replaces_nothing_also_after_a_restart() -> Result<()> {
    let (mut site, mut raw) = site(&[]).await?;
    let url = site.target.url();
    let valid = site.put("heartbeats", heartbeats(&url, "hb.a").to_string()).await?;
    more(&mut raw, "hb.a", 1).await?;
    let wrong = json!({"url": url, "interval": "soon", "subjects": [{"subject": "hb.*"}], "colour": "s3cretive"});
    secrets::register("s3cretive");
    for (garbage, config, paths) in [
        ("garbage".to_owned(), Value::Null, vec![""]),
        (wrong.to_string(), Value::Null, vec!["/colour", "/interval", "/subjects/0/subject"]),
    ] {
        let revision = site.put("heartbeats", garbage.clone()).await?;
        let event = site.events.wait("config-rejected", "heartbeats").await?;
        assert_eq!(event["revision"], revision, "{event}");
        let told: Vec<_> = event["problems"].as_array().context("problems")?.iter().map(|one| &one["path"]).collect();
        assert_eq!(told, paths, "{event}");
        let shown = site.ask("heartbeat.get", "").await?.body;
        assert_eq!((&shown["origin"], &shown["revision"]), (&json!("kv"), &json!(valid)), "{shown}");
        assert_eq!(
            (&shown["rejected"]["revision"], &shown["rejected"]["problems"]),
            (&json!(revision), &event["problems"])
        );
        if garbage == "garbage" {
            assert_eq!(shown["rejected"]["config"], config);
        }
        more(&mut raw, "hb.a", 2).await?;
    }
    // More than the bucket remembers.
    for _ in 0..12 {
        site.put("heartbeats", wrong.to_string()).await?;
    }
    let kept = async || {
        let bucket = site.bucket("REPLICATOR_CONFIG").await;
        matches!(bucket, Ok(bucket) if bucket.get("heartbeats/valid").await.is_ok_and(|value| value.is_some()))
    };
    wait_for("the valid one to be kept", LIMIT, kept).await?;
    site.stop().await?;
    let before = on(&mut raw, "hb.a").await?.len();
    site.service.restart().await?;
    let again = async || on(&mut raw, "hb.a").await.is_ok_and(|all| all.len() > before);
    wait_for("heartbeats after the restart", LIMIT, again).await.with_context(|| site.service.log())?;
    Ok(())
}

#[tokio::test]
async fn requests_store_show_and_remove_and_keep_secrets() -> Result<()> {
    let (site, mut raw) = site(&[]).await?;
    let secret = secrets::secret();
    let url = site.target.url_as(&format!("me:{secret}"));
    let set = async |body: &Value| site.send("heartbeat.set", body.clone()).await;
    let stored = set(&heartbeats(&url, "hb.a")).await?;
    let revision = stored.body["revision"].as_u64().with_context(|| format!("{stored:?}"))?;
    let shown = site.ask("heartbeat.get", "").await?.body;
    assert_eq!((&shown["origin"], &shown["revision"]), (&json!("kv"), &json!(revision)), "{shown}");
    more(&mut raw, "hb.a", 1).await?;

    // What is shown can be edited and sent back, and the secret stays.
    let mut edited = shown["config"].clone();
    edited["subjects"][0]["subject"] = json!("hb.b");
    let expected = revision.to_string();
    let changed =
        site.ask_with("heartbeat.set", ("Replicator-Expected-Revision", &expected), edited.to_string()).await?;
    assert_eq!(changed.code, None, "{changed:?}");
    let value = site.bucket("REPLICATOR_CONFIG").await?.get("heartbeats").await?.context("nothing is stored")?;
    assert_eq!(serde_json::from_slice::<Value>(&value)?["url"], url);
    more(&mut raw, "hb.b", 1).await?;
    let conflict =
        site.ask_with("heartbeat.set", ("Replicator-Expected-Revision", &expected), edited.to_string()).await?;
    assert_eq!(conflict.code.as_deref(), Some("409"), "{conflict:?}");
    // The same again changes nothing.
    assert_eq!(set(&edited).await?.body, changed.body);

    let other = json!({"url": "nats://me:***@127.0.0.1:1", "subjects": [{"subject": "hb.a"}]});
    let reply = set(&other).await?;
    assert_eq!((reply.error, &reply.body["error"]["problems"][0]["path"]), (Some(400), &json!("/url")), "{reply:?}");
    let reply = set(&json!({"url": url, "interval": "1", "subject": []})).await?;
    let paths =
        reply.body["error"]["problems"].as_array().map(|all| all.iter().map(|one| one["path"].clone()).collect());
    let expect = vec![json!("/interval"), json!("/subject"), json!("/subjects")];
    assert_eq!((reply.error, paths), (Some(400), Some(expect)), "{reply:?}");
    refused(&site.ask("heartbeat.set", "").await?, 400, "`{}` to remove");
    let late = site.ask_with("heartbeat.set", ("Replicator-Deadline", "1"), "{}").await?;
    assert_eq!(late.code.as_deref(), Some("408"), "{late:?}");
    refused(&site.ask("config.delete", "heartbeats").await?, 404, "does not exist");
    more(&mut raw, "hb.b", 1).await?;

    let removed = set(&json!({})).await?;
    assert!(removed.body["revision"].as_u64() > Some(revision), "{removed:?}");
    let shown = site.ask("heartbeat.get", "").await?.body;
    assert_eq!(shown, json!({"origin": "none", "revision": null, "config": null, "rejected": null}));
    refused(&set(&json!({})).await?, 404, "no heartbeats are stored");
    set(&heartbeats(&url, "hb.c")).await?;
    more(&mut raw, "hb.c", 1).await?;
    // `null` means the same, which its schema does not say: most tools send it by mistake.
    let reply = site.client.request("replicator.heartbeat.set", "null".into()).await?;
    assert!(reply.headers.is_none(), "{reply:?}");
    assert_eq!(site.ask("heartbeat.get", "").await?.body["origin"], "none");
    Ok(())
}

#[tokio::test]
async fn commands_show_and_set_them() -> Result<()> {
    let (site, mut raw) = site(&[]).await?;
    let folder = tempfile::tempdir()?;
    let file = config(&folder, &heartbeats(&site.target.url(), "hb.a").to_string())?;
    let said = site.cli().ok(["heartbeat", "set", file.as_str()]).await?;
    assert!(said.starts_with("heartbeats are at revision "), "{said}");
    more(&mut raw, "hb.a", 1).await?;
    let shown = site.cli().ok(["heartbeat", "get"]).await?;
    assert!(shown.starts_with("origin kv, revision ") && shown.contains("\"hb.a\""), "{shown}");
    assert_eq!(site.cli().json(["heartbeat", "get"]).await?["origin"], "kv");
    site.put("heartbeats", "garbage").await?;
    let told = async || {
        let ended = site.cli().run(["heartbeat", "get"]).await;
        ended.is_ok_and(|ended| ended.stdout.contains("\"hb.a\"") && ended.stderr.contains("not valid JSON"))
    };
    wait_for("the problem to be shown", LIMIT, told).await
}

#[tokio::test]
async fn the_bucket_goes_before_the_file_and_the_file_comes_back() -> Result<()> {
    let (target, mut raw) = listening().await?;
    let folder = tempfile::tempdir()?;
    let yaml = format!("name: TEST\nheartbeats: {}\n", heartbeats(&target.url(), "hb.file"));
    let file = config(&folder, &yaml)?;
    let source = Server::start(Role::Source).await?;
    let mut site =
        Site::builder().on(source, target).control_at_source().args(["--config", file.as_str()]).start().await?;
    more(&mut raw, "hb.file", 1).await?;
    let of_kv = heartbeats(&site.target.url(), "hb.kv");
    let origin = async || site.ask("heartbeat.get", "").await.map(|shown| shown.body["origin"].clone());
    assert_eq!(origin().await?, "file");
    // One that never was valid leaves the file's alone.
    site.put("heartbeats", "garbage").await?;
    let rejected = async || site.ask("heartbeat.get", "").await.is_ok_and(|shown| !shown.body["rejected"].is_null());
    wait_for("the garbage to be reported", LIMIT, rejected).await?;
    assert_eq!(origin().await?, "file");
    site.send("heartbeat.set", of_kv).await?;
    more(&mut raw, "hb.kv", 1).await?;
    assert_eq!(origin().await?, "kv");
    let log = site.service.log();
    assert!(log.contains("take precedence over those of the file"), "{log}");
    let of_file = on(&mut raw, "hb.file").await?.len();
    more(&mut raw, "hb.kv", 3).await?;
    assert_eq!(on(&mut raw, "hb.file").await?.len(), of_file);
    site.send("heartbeat.set", json!({})).await?;
    more(&mut raw, "hb.file", 1).await?;
    assert_eq!(origin().await?, "file");
    site.stop().await
}

#[tokio::test]
async fn what_the_operator_does_not_allow_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let credentials = folder.path().display().to_string();
    let (target, _) = listening().await?;
    let allowed = format!("nats://127.0.0.1:{}", target.port());
    let args = ["--allow-url", &allowed, "--allow-credentials", &credentials];
    let source = Server::start(Role::Source).await?;
    let site = Site::builder().on(source, target).control_at_source().args(args).start().await?;
    let set = async |more: Value| {
        let body = crate::harness::site::merged(heartbeats(&site.target.url(), "hb.a"), more);
        site.send("heartbeat.set", body).await
    };
    assert_eq!(set(json!({})).await?.error, None);
    let choria = json!({"seed_file": "/etc/seed", "jwt_file": "/etc/jwt", "collective": "choria"});
    let paths = ["/choria/jwt_file", "/choria/seed_file"];
    for (more, paths) in [
        (json!({"url": site.source.url()}), &["/url"][..]),
        (json!({"tls": {"ca": "/etc/ca"}}), &["/tls/ca"][..]),
        (json!({ "choria": choria }), &paths[..]),
    ] {
        let reply = set(more).await?;
        let problems = reply.body["error"]["problems"].as_array().context("problems")?;
        assert_eq!(problems.iter().map(|one| &one["path"]).collect::<Vec<_>>(), paths, "{reply:?}");
        assert!(problems.iter().all(|one| one.to_string().contains("is not allowed by this service")), "{reply:?}");
    }
    let still =
        Service::builder(&site.service_url(), "TEST").args(["--read-only", "--prefix", "still"]).start().await?;
    let reply = ask(&site.client, "still.heartbeat.set", b"{}").await?;
    refused(&reply, 403, "read-only");
    assert_eq!(ask(&site.client, "still.heartbeat.get", b"").await?.body["origin"], "kv");
    drop(still);
    Ok(())
}

#[tokio::test]
async fn a_replication_cannot_have_the_id_of_their_key() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("heartbeats", json!({})).await?;
    let reply = site.send("config.add", site.document("heartbeats")).await?;
    let problem = &reply.body["error"]["problems"][0];
    assert_eq!((reply.error, &problem["path"]), (Some(400), &json!("/stream")), "{reply:?}");
    assert!(problem["message"].as_str().is_some_and(|text| text.contains("give it a `name`")), "{problem}");
    site.add("heartbeats", json!({"name": "copy"})).await?;
    site.settled("heartbeats.copy", 0).await?;
    Ok(())
}

#[tokio::test]
async fn with_an_election_one_publishes_and_another_takes_over() -> Result<()> {
    let (target, mut raw) = listening().await?;
    // Long enough that a busy machine moves nothing.
    let ttl = Duration::from_secs(10).as_nanos() as u64;
    let bucket = json!({"subjects": ["$KV.CHORIA_LEADER_ELECTION.>"], "max_age": ttl, "max_msgs_per_subject": 1,
        "discard": "new", "allow_rollup_hdrs": true});
    raw.create_stream("KV_CHORIA_LEADER_ELECTION", bucket).await?;
    let control = Server::start(Role::Control).await?;
    let start = async |instance: &str| {
        Service::builder(&control.url(), "TEST").instance(instance).args(["--monitor", "127.0.0.1:0"]).start().await
    };
    let (one, two) = tokio::try_join!(start("one"), start("two"))?;
    let client = connect(&control.url()).await?;
    let mut document = heartbeats(&target.url(), "hb.a");
    document["leader_election"] = json!(true);
    ask(&client, "replicator.heartbeat.set", document.to_string().as_bytes()).await?;
    let exactly_one = async |one: &Service, two: &Service| matches!((paused(one).await, paused(two).await), (Some(a), Some(b)) if a != b);
    wait_for("a leader", LIMIT, async || exactly_one(&one, &two).await).await.with_context(|| one.log())?;
    let (mut leader, mut other) = if paused(&one).await == Some(false) { (one, two) } else { (two, one) };
    more(&mut raw, "hb.a", 3).await?;
    let labels = "{replicator=\"TEST\",subject=\"hb.a\"}";
    assert_eq!(metric(&other, &format!("published_count{labels}")).await?, Some(0.0));
    let (_, page) = leader.get("/metrics").await?;
    let won = format!(
        "choria_stream_replicator_election_leader{{election=\"SR_TEST_HB\",identity=\"{}\",replicator=\"unknown\"}} 1",
        host()
    );
    assert!(page.contains(&won), "{page}");
    let held = raw.read_stream("KV_CHORIA_LEADER_ELECTION").await?;
    let held = held.last().context("no key")?;
    assert_eq!(
        (held.subject.as_str(), held.payload.as_slice()),
        ("$KV.CHORIA_LEADER_ELECTION.SR_TEST_HB", host().as_bytes())
    );

    // A crash: the other one wins when the key is over.
    leader.kill()?;
    wait_for("the other to take over", LIMIT, async || paused(&other).await == Some(false)).await?;
    more(&mut raw, "hb.a", 2).await?;
    assert!(metric(&other, &format!("published_count{labels}")).await? > Some(0.0));
    leader.restart().await?;
    wait_for("the first to stand by", LIMIT, async || paused(&leader).await == Some(true)).await?;

    // A graceful stop, after which no instance has to wait for the key.
    ensure!(other.stop().await?.success(), "{}", other.log());
    wait_for("the first to lead again", LIMIT, async || paused(&leader).await == Some(false)).await?;
    more(&mut raw, "hb.a", 1).await
}

#[tokio::test]
async fn without_an_election_every_instance_publishes() -> Result<()> {
    let (site, mut raw) = site(&["--monitor", "127.0.0.1:0"]).await?;
    let second = Service::builder(&site.service_url(), "TEST").args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.send("heartbeat.set", heartbeats(&site.target.url(), "hb.a")).await?;
    more(&mut raw, "hb.a", 4).await?;
    for service in [&site.service, &second] {
        let series = "published_count{replicator=\"TEST\",subject=\"hb.a\"}";
        let publishes = async || metric(service, series).await.is_ok_and(|count| count > Some(1.0));
        wait_for("each to publish", LIMIT, publishes).await?;
        assert_eq!(paused(service).await, Some(false));
    }
    Ok(())
}

#[tokio::test]
async fn an_outage_of_their_server_is_counted_told_once_and_survived() -> Result<()> {
    let (mut site, mut raw) = site(&["--monitor", "127.0.0.1:0"]).await?;
    site.send("heartbeat.set", heartbeats(&site.target.url(), "hb.a")).await?;
    more(&mut raw, "hb.a", 2).await?;
    let labels = "{replicator=\"TEST\",subject=\"hb.a\"}";
    let errors = async |site: &Site| metric(&site.service, &format!("published_error_count{labels}")).await;
    assert_eq!(errors(&site).await?, Some(0.0));
    site.target.kill()?;
    wait_for("errors to be counted", LIMIT, async || errors(&site).await.is_ok_and(|count| count >= Some(10.0)))
        .await?;
    let log = site.service.log();
    let refused = log.lines().filter(|line| line.contains("no heartbeats:")).count();
    let down = log.lines().filter(|line| line.contains("the connection for heartbeats is down")).count();
    assert_eq!((refused, down), (1, 1), "{log}");
    let unconfirmed = log.lines().filter(|line| line.contains("a heartbeat was not stored")).count();
    assert!(unconfirmed <= 1, "{log}");
    site.target.restart().await?;
    let mut raw = Raw::connect(&site.target.url()).await?;
    more(&mut raw, "hb.a", 3).await.with_context(|| site.service.log())?;

    // A stream that is gone is another outage, and the stop does not hang in it.
    let before = errors(&site).await?;
    raw.api("STREAM.DELETE.HB", Value::Null).await?;
    wait_for("errors without a stream", LIMIT, async || errors(&site).await.is_ok_and(|count| count > before)).await?;
    let told = async || site.service.log().contains("no stream listens on this subject");
    wait_for("the reason", LIMIT, told).await?;
    raw.create_stream("HB", json!({"subjects": ["hb.>"]})).await?;
    more(&mut raw, "hb.a", 1).await?;
    wait_for("the end of the outage", LIMIT, async || site.service.log().contains("are stored again")).await?;
    site.target.freeze()?;
    let (stopped, time) = timed(site.stop()).await?;
    site.target.thaw()?;
    assert!(time < Duration::from_secs(8), "{time:?} {stopped:?}");
    Ok(())
}

#[tokio::test]
async fn an_invalid_file_ends_the_start_with_all_problems() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (yaml, expect) in [
        (
            "name: TEST\nstreams: []\nheartbeat: {}\n",
            vec![
                "`streams` is unknown on the first level",
                "did you mean `heartbeats`?",
                "known are `name`, `heartbeats` and `adapters`",
            ],
        ),
        ("heartbeats: {}\n", vec!["`name`, the name of the site, is required"]),
        ("name: OTHER\n", vec!["`name` is `OTHER`, and `--name` is `TEST`"]),
        ("name: TEST\nheartbeats: {url: 'nats://u:hunter2@h", vec!["it is not valid YAML (line "]),
        (
            "name: TEST\nheartbeats: {url: 'nats://u:hunter2@h:x', interval: 1, subjects: [{subject: a, every: 1s}]}\n",
            vec!["`/heartbeats/url`: ", "`/heartbeats/interval`: ", "`/heartbeats/subjects/0/every`: "],
        ),
    ] {
        let file = config(&folder, yaml)?;
        let mut service = Service::builder("nats://127.0.0.1:1", "TEST").args(["--config", &file]).spawn()?;
        let status = service.wait(LIMIT).await?;
        let log = service.log();
        assert_eq!(status.code(), Some(2), "{log}");
        assert!(expect.iter().all(|expect| log.contains(expect)), "{yaml}: {log}");
        assert!(log.contains(&format!("error: `--config {file}`: ")) && !log.contains("hunter2"), "{log}");
    }
    Ok(())
}
