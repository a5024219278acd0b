//! Documents that people write into the bucket themselves, as `nats kv put` and `nats kv del` do.

use anyhow::{Context, Result};
use async_nats::jetstream::kv;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::harness::raw::wait_messages;
use crate::harness::{LIMIT, Outgoing, PROMPT, Site, timed, wait_for};

/// A site whose target takes the subjects of `stream` also after the prefix `east`.
async fn with_target(stream: &str, messages: u64) -> Result<Site> {
    let site = Site::small().await?;
    site.filled(stream, messages).await?;
    let subject = format!("{}.>", stream.to_lowercase());
    site.target_stream(stream, json!({"subjects": [subject, format!("east.{subject}")]})).await?;
    Ok(site)
}

/// How many messages of the target begin with `prefix`.
async fn behind(site: &Site, stream: &str, prefix: &str) -> Result<usize> {
    let stored = site.target().await?.read_stream(stream).await?;
    Ok(stored.iter().filter(|message| message.subject.starts_with(prefix)).count())
}

fn error_text(row: &Value) -> &str {
    row["last_error"]["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn put_edit_and_delete_take_effect_within_a_second() -> Result<()> {
    let site = with_target("ORDERS", 5).await?;
    let mut target = site.target().await?;
    let (_, started) = timed(async {
        site.put("ORDERS", site.document("ORDERS").to_string()).await?;
        wait_messages(&mut target, "ORDERS", 1, LIMIT).await
    })
    .await?;
    site.copied("ORDERS", 5).await?;

    let edited = site.document_with("ORDERS", json!({"target_subject_prefix": "east"}));
    let (_, changed) = timed(async {
        let revision = site.put("ORDERS", edited.to_string()).await?;
        let runs = |row: &Value| row["config_revision"] == revision && row["state"] == "running";
        site.row_when("ORDERS", "runs the edited document", runs).await
    })
    .await?;
    site.publish("ORDERS", 1..=5).await?;
    site.copied("ORDERS", 10).await?;
    assert_eq!(behind(&site, "ORDERS", "east.").await?, 5);

    let (_, stopped) = timed(async {
        site.bucket("REPLICATOR_CONFIG").await?.delete("ORDERS").await?;
        wait_for("the row to go", LIMIT, async || site.row("ORDERS").await.is_none()).await
    })
    .await?;
    let kept = site.position("ORDERS").await?.context("the position is kept")?;
    assert_eq!(kept["source"]["seq"], 10, "{kept}");
    println!("started in {started:?}, changed in {changed:?}, stopped in {stopped:?}");
    assert!(started.max(changed).max(stopped) < PROMPT, "{started:?} {changed:?} {stopped:?}");

    // It continues from its position.
    site.publish("ORDERS", 1..=1).await?;
    site.put("ORDERS", edited.to_string()).await?;
    let row = site.settled("ORDERS", 11).await?;
    assert_eq!((&row["counters"]["copied"], &row["epoch"]), (&json!(1), &json!(2)), "{row}");
    Ok(())
}

#[tokio::test]
async fn garbage_keeps_what_runs_and_is_told() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    let mut events = site.listen().await?;
    for (garbage, path, why) in [
        ("garbage".to_owned(), "", "not valid JSON"),
        (site.document_with("ORDERS", json!({"max_age": "soon"})).to_string(), "/max_age", "`soon`"),
        (String::new(), "", "not valid JSON"),
    ] {
        let revision = site.put("ORDERS", garbage).await?;
        let event = events.wait("config-rejected", "ORDERS").await?;
        assert_eq!((&event["revision"], &event["problems"][0]["path"]), (&json!(revision), &json!(path)), "{event}");
        assert!(event["problems"][0]["message"].as_str().is_some_and(|text| text.contains(why)), "{event}");
        let told = |row: &Value| row["last_error"]["kind"] == "invalid" && error_text(row).contains(why);
        let row = site.row_when("ORDERS", "says what is wrong", told).await?;
        assert!(error_text(&row).contains(&format!("revision {revision} ")), "{row}");
        assert_eq!((&row["state"], &row["config_revision"]), (&json!("running"), &json!(2)), "{row}");
    }
    site.publish("ORDERS", 1..=5).await?;
    site.copied("ORDERS", 10).await?;
    assert_eq!(events.kinds("ORDERS"), ["config-rejected"; 3], "the run was touched");

    // Stored documents can be read, and repaired by request.
    let shown = site.ask("config.get", "ORDERS").await?.body;
    assert_eq!((&shown["config"], shown["problems"].as_array().map(Vec::len)), (&Value::Null, Some(1)), "{shown}");
    let fixed = site.send("config.update", site.document_with("ORDERS", json!({"max_age": "1h"}))).await?;
    assert_eq!(fixed.error, None, "{fixed:?}");
    let revision = &fixed.body["revision"];
    site.row_when("ORDERS", "runs again", |r| r["config_revision"] == *revision && r["state"] == "running").await?;
    Ok(())
}

#[tokio::test]
async fn a_document_under_another_key_is_reported_and_not_run() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    site.filled("OTHER", 5).await?;
    let mut events = site.listen().await?;
    site.put("WRONG", site.document("ORDERS").to_string()).await?;
    let event = events.wait("config-rejected", "WRONG").await?;
    assert!(event["problems"][0]["message"].as_str().is_some_and(|text| text.contains("`ORDERS`")), "{event}");
    let row = site.row_when("WRONG", "is invalid", |row| row["state"] == "invalid").await?;
    assert!(row["last_error"]["kind"] == "invalid" && error_text(&row).contains("`ORDERS`"), "{row}");
    // Something put later runs, and this still does not.
    site.put("OTHER", site.document("OTHER").to_string()).await?;
    site.copied("OTHER", 5).await?;
    assert_eq!(site.at_target("ORDERS").await?, 0);
    assert_eq!((site.row("ORDERS").await, site.position("WRONG").await?), (None, None));
    // It can be deleted like any other.
    assert_eq!(site.ask("config.delete", "WRONG").await?.error, None);
    assert_eq!(site.row("WRONG").await, None);
    Ok(())
}

#[tokio::test]
async fn after_a_crash_the_newest_valid_revision_runs() -> Result<()> {
    let mut site = with_target("ORDERS", 5).await?;
    site.put("ORDERS", site.document("ORDERS").to_string()).await?;
    site.copied("ORDERS", 5).await?;
    let edited = site.document_with("ORDERS", json!({"target_subject_prefix": "east"}));
    let valid = site.put("ORDERS", edited.to_string()).await?;
    site.row_when("ORDERS", "runs the edited document", |row| row["config_revision"] == valid).await?;
    site.put("ORDERS", "garbage").await?;
    let garbage = site.put("ORDERS", "more garbage").await?;
    let told = |row: &Value| error_text(row).contains(&format!("revision {garbage} "));
    site.row_when("ORDERS", "says what is wrong", told).await?;

    site.service.kill()?;
    site.publish("ORDERS", 1..=5).await?;
    let mut events = site.listen().await?;
    site.service.restart().await?;
    site.copied("ORDERS", 10).await?;
    assert_eq!(behind(&site, "ORDERS", "east.").await?, 5);
    let row =
        site.row_when("ORDERS", "runs and says what is wrong", |row| row["state"] == "running" && told(row)).await?;
    assert_eq!((&row["config_revision"], &row["last_error"]["kind"]), (&json!(valid), &json!("invalid")), "{row}");
    assert_eq!(events.wait("config-rejected", "ORDERS").await?["revision"], garbage);
    Ok(())
}

#[tokio::test]
async fn changes_of_one_replication_do_not_touch_another() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("QUIET", 10).await?;
    site.replicate("ORDERS", 10).await?;
    let mut events = site.listen().await?;
    let before = site.settled("QUIET", 10).await?;

    let limited = site.document_with("ORDERS", json!({"limits": {"messages_in_flight": 7}}));
    site.put("ORDERS", limited.to_string()).await?;
    events.wait("config-changed", "ORDERS").await?;
    site.put("ORDERS", "garbage").await?;
    events.wait("config-rejected", "ORDERS").await?;
    site.put("BROKEN", "garbage").await?;
    events.wait("config-rejected", "BROKEN").await?;
    site.send("config.add", site.document("MISSING")).await?;
    events.wait("held", "MISSING").await?;
    site.bucket("REPLICATOR_CONFIG").await?.purge("ORDERS").await?;
    events.wait("stopped", "ORDERS").await?;
    site.ask("config.delete", "BROKEN").await?;

    let after = site.row("QUIET").await.context("the row")?;
    for field in ["state", "leader", "epoch", "config_revision", "position", "counters", "last_error"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    site.publish("QUIET", 1..=10).await?;
    site.copied("QUIET", 20).await?;
    let after = site.row("QUIET").await.context("the row")?;
    assert_eq!(after["counters"]["consumers_recreated"], before["counters"]["consumers_recreated"]);
    assert!(events.kinds("QUIET").is_empty(), "{:?}", events.seen());
    Ok(())
}

#[tokio::test]
async fn a_bucket_that_was_lost_and_made_anew_is_followed() -> Result<()> {
    let site = Site::small().await?;
    site.filled("LOST", 5).await?;
    site.replicate("ORDERS", 5).await?;
    for i in 0..3 {
        site.send("config.update", site.document_with("ORDERS", json!({"description": format!("{i}")}))).await?;
    }
    site.send("config.add", site.document("LOST")).await?;
    site.copied("LOST", 5).await?;
    let jetstream = async_nats::jetstream::new(site.client.clone());
    jetstream.delete_key_value("REPLICATOR_CONFIG").await?;
    let config = kv::Config { bucket: "REPLICATOR_CONFIG".to_owned(), history: 10, ..kv::Config::default() };
    jetstream.create_key_value(config).await?;
    let put = site.put("ORDERS", site.document_with("ORDERS", json!({"max_age": "1d"})).to_string()).await?;
    site.row_when("ORDERS", "follows the new bucket", |row| row["config_revision"] == put).await?;
    wait_for("what is not in it to stop", LIMIT, async || site.row("LOST").await.is_none()).await?;

    let reply = site.ask("config.delete", "ORDERS").await?;
    assert_eq!(reply.error, None, "{reply:?}");
    assert_eq!((site.row("ORDERS").await, site.position("ORDERS").await?), (None, None));
    Ok(())
}

#[tokio::test]
async fn an_unreadable_position_is_reported_and_not_overwritten() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    site.service.stop().await?;
    let positions = site.bucket("REPLICATOR_POSITIONS").await?;
    positions.put("ORDERS", "garbage".into()).await?;
    site.service.restart().await?;
    let told = |row: &Value| error_text(row).contains("holds no position record");
    let row = site.row_when("ORDERS", "says what is wrong", told).await?;
    assert_eq!((&row["state"], &row["leader"]), (&json!("retrying"), &Value::Null), "{row}");
    assert_eq!(positions.get("ORDERS").await?.as_deref(), Some(b"garbage".as_slice()));

    // As the message says: without the record the position is determined again.
    positions.delete("ORDERS").await?;
    site.publish("ORDERS", 1..=5).await?;
    site.settled("ORDERS", 10).await?;
    assert_eq!(site.at_target("ORDERS").await?, 10);
    Ok(())
}

/// What was written last to a key of the flood.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Valid,
    /// After a valid document.
    Garbage,
    Deleted,
    /// After a deletion.
    Again,
    /// A document that belongs under another key, and before it nothing else either.
    Wrong,
}

#[tokio::test]
async fn the_last_of_a_thousand_edits_run_also_after_a_restart() -> Result<()> {
    const EDITS: usize = 1_000;
    const KEYS: [(&str, Last); 6] = [
        ("VALID", Last::Valid),
        ("GARBAGE", Last::Garbage),
        ("DELETED", Last::Deleted),
        ("AGAIN", Last::Again),
        ("WRONG", Last::Wrong),
        ("NEW", Last::Valid),
    ];
    let mut site = Site::small().await?;
    site.replicate("QUIET", 10).await?;
    let quiet = site.settled("QUIET", 10).await?;
    for (stream, _) in KEYS.iter().filter(|(_, last)| *last != Last::Wrong) {
        site.filled(stream, 5).await?;
    }
    for stream in ["VALID", "GARBAGE", "DELETED", "AGAIN"] {
        site.add(stream, json!({})).await?;
        site.copied(stream, 5).await?;
    }

    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let edits = edits(&mut random, &site, &KEYS, EDITS);
    let mut raw = site.source().await?;
    let first = raw.stream_state("KV_REPLICATOR_CONFIG").await?["last_seq"].as_u64().context("last_seq")? + 1;
    let (last, time) = timed(raw.publish_all(edits)).await?;
    println!("{EDITS} edits in {time:?}");
    assert_eq!(last, first + EDITS as u64 - 1);
    assert!(time < PROMPT, "{time:?}");

    let revisions = right_ones_run(&site, &KEYS).await?;
    let row = site.row("QUIET").await.context("the row")?;
    for field in ["state", "leader", "epoch", "config_revision", "position", "counters", "last_error"] {
        assert_eq!(row[field], quiet[field], "{field}");
    }
    for (stream, _) in KEYS.iter().filter(|(_, last)| matches!(last, Last::Valid | Last::Garbage | Last::Again)) {
        site.publish(stream, 6..=10).await?;
        site.copied(stream, 10).await?;
    }
    site.service.kill()?;
    site.service.restart().await?;
    assert_eq!(right_ones_run(&site, &KEYS).await?, revisions, "other revisions run after a restart");
    site.publish("GARBAGE", 11..=15).await?;
    site.copied("GARBAGE", 15).await?;
    site.settled("QUIET", 10).await?;
    assert!(!site.service.log().contains("panic"));
    Ok(())
}

/// Puts of valid and invalid documents and deletions, in random order, but for the last ones of each key.
fn edits(random: &mut StdRng, site: &Site, keys: &[(&str, Last)], count: usize) -> Vec<Outgoing> {
    let to = |key: &str, text: String| Outgoing::new(format!("$KV.REPLICATOR_CONFIG.{key}"), text);
    let delete = |key: &str| to(key, String::new()).with_lines(&["KV-Operation: DEL"]);
    let mut number = 0;
    let mut valid = |key: &str| {
        number += 1;
        let stream = if key == "WRONG" { "QUIET" } else { key };
        let limits = json!({"messages_in_flight": 1_000 + number, "bytes_in_flight": 1 << 20});
        to(key, site.document_with(stream, json!({"limits": limits, "description": format!("{number}")})).to_string())
    };
    let garbage = |key: &str| to(key, "{\"stream\": garbage".to_owned());
    let mut last = Vec::new();
    for (key, end) in keys {
        last.extend(match end {
            Last::Valid => vec![garbage(key), valid(key)],
            Last::Garbage => vec![valid(key), garbage(key), garbage(key), garbage(key)],
            Last::Deleted => vec![valid(key), delete(key)],
            Last::Again => vec![valid(key), delete(key), valid(key)],
            Last::Wrong => vec![garbage(key), valid(key)],
        });
    }
    let mut edits = Vec::new();
    while edits.len() + last.len() < count {
        let key = keys[random.random_range(0..keys.len())].0;
        edits.push(match random.random_range(0..10) {
            0..=5 => valid(key),
            6 => delete(key),
            _ => garbage(key),
        });
    }
    edits.extend(last);
    edits
}

/// Revisions and texts that are kept of a key, oldest first.
async fn history(site: &Site, key: &str) -> Result<Vec<(u64, String)>> {
    let subject = format!("$KV.REPLICATOR_CONFIG.{key}");
    let stored = site.source().await?.read_stream("KV_REPLICATOR_CONFIG").await?.into_iter();
    let of_key = stored.filter(|message| message.subject == subject);
    Ok(of_key.map(|message| (message.seq, String::from_utf8_lossy(&message.payload).into_owned())).collect())
}

/// Waits until each key does what was written last; the revisions that run.
async fn right_ones_run(site: &Site, keys: &[(&str, Last)]) -> Result<Vec<(String, u64)>> {
    let mut revisions = Vec::new();
    for (key, last) in keys {
        let history = history(site, key).await?;
        let stored = history.last().context("nothing is stored")?.0;
        let (right, what) = match last {
            Last::Valid | Last::Again => (stored, "runs the last revision"),
            // Three of garbage follow the last valid one.
            Last::Garbage => {
                let valid = history.iter().rev().find(|(_, text)| serde_json::from_str::<Value>(text).is_ok());
                (valid.context("no valid revision")?.0, "runs the newest valid revision")
            }
            Last::Deleted => {
                wait_for("the row of the deleted one to go", LIMIT, async || site.row(key).await.is_none()).await?;
                continue;
            }
            Last::Wrong => {
                let row = site.row_when(key, "is invalid", |row| row["state"] == "invalid").await?;
                assert!(error_text(&row).contains(&format!("revision {stored} ")), "{row}");
                continue;
            }
        };
        site.row_when(key, what, |row| row["config_revision"] == right && row["state"] == "running").await?;
        if *last == Last::Garbage {
            let told = |row: &Value| error_text(row).contains(&format!("revision {stored} "));
            site.row_when(key, "says what is wrong", told).await?;
        }
        revisions.push(((*key).to_owned(), right));
    }
    Ok(revisions)
}

#[tokio::test]
async fn the_newest_valid_document_runs_after_many_wrong_ones() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    for round in 0..12 {
        site.put("ORDERS", format!("garbage {round}")).await?;
    }
    let kept = site.bucket("REPLICATOR_CONFIG").await?;
    wait_for("the document to be kept", PROMPT, async || {
        kept.get("ORDERS/valid").await.is_ok_and(|kept| kept.is_some())
    })
    .await?;
    site.service.kill()?;
    site.publish("ORDERS", 11..=20).await?;
    site.service.restart().await?;
    site.copied("ORDERS", 20).await?;
    let row = site.row_when("ORDERS", "runs", |row| row["state"] == "running").await?;
    assert_eq!(row["last_error"]["kind"], "invalid", "{row}");
    // A deletion is one for all revisions.
    kept.delete("ORDERS").await?;
    wait_for("the kept one to go", PROMPT, async || kept.get("ORDERS/valid").await.is_ok_and(|kept| kept.is_none()))
        .await?;
    Ok(())
}

/// So many problems that no message holds them all.
#[tokio::test]
async fn garbage_of_any_size_hides_no_other_replication() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    let mut events = site.listen().await?;
    let junk = |fields: u32| -> String {
        let fields = (0..fields).map(|i| (format!("no field {i}"), json!(i)));
        Value::Object(fields.collect()).to_string()
    };
    site.put("AAA", junk(2_000)).await?;
    let event = events.wait("config-rejected", "AAA").await?;
    let problems = event["problems"].as_array().context("problems")?;
    assert!(
        problems.len() < 100
            && problems[problems.len() - 1]["message"].as_str().is_some_and(|m| m.ends_with("more problems"))
    );
    let row = site.row_when("AAA", "is invalid", |row| row["state"] == "invalid").await?;
    assert!(error_text(&row).contains("`no field 0` is unknown"), "{row}");
    let all = site.ask("status", "").await?.body;
    let ids: Vec<_> = all["replications"].as_array().context("rows")?.iter().map(|row| &row["replication"]).collect();
    assert_eq!(ids, ["AAA", "ORDERS"]);
    let shown = site.ask("config.get", "AAA").await?;
    assert!(shown.error.is_none() && shown.body["problems"].as_array().is_some_and(|p| p.len() == problems.len()));
    // Nothing waits while something so large is read.
    site.put("AAB", junk(30_000)).await?;
    let event = events.wait("config-rejected", "AAB").await?;
    assert!(
        event["problems"][0]["message"].as_str().is_some_and(|m| m.ends_with("bytes, 65536 are possible")),
        "{event}"
    );
    let running = site.row("ORDERS").await.context("a row")?;
    assert_eq!((&running["state"], &running["epoch"]), (&json!("running"), &json!(1)), "{running}");
    // A key is shown without the password that was written in its place.
    site.put("BBB", r#"{"nats://joe:hunter2@host": 1}"#).await?;
    let event = events.wait("config-rejected", "BBB").await?;
    assert!(!event.to_string().contains("hunter2"), "{event}");
    // Heartbeats are judged alike.
    site.put("heartbeats", r#"{"url": "nats://a", "subjects": [{"subject": "hb.a"}], "url": "nats://b"}"#).await?;
    let event = events.wait("config-rejected", "heartbeats").await?;
    assert_eq!(event["problems"][0]["message"], "`url` occurs more than once; keep one of them", "{event}");
    Ok(())
}
