//! Targets that refuse everything for a while: full, sealed, gone, unreachable, forbidden. Each is reported in status, metric,
//! event and log; once it is over, the copy continues, with every message once and in order.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::rejects::transports;
use crate::harness::site::merged;
use crate::harness::{Expect, LIMIT, Outgoing, Role, SITE, Server, Site, wait_for};

/// A held replication looks again by itself within this time; generous for a busy machine.
const BY_ITSELF: Duration = Duration::from_secs(20);
/// A released one continues at once.
const AT_ONCE: Duration = Duration::from_secs(6);

async fn monitored() -> Result<Site> {
    Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await
}

/// Waits until the replication is in this state for this reason, and looks that everything says so.
async fn told(site: &Site, stream: &str, state: &str, words: &[&str]) -> Result<Value> {
    let says = |row: &Value| {
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        row["state"] == state && words.iter().all(|words| message.contains(words))
    };
    let row = site.row_when(stream, &format!("is {state}: {words:?}"), says).await?;
    let (kind, error) = if state == "held" { ("held", "hold") } else { ("stalled", "retry") };
    assert_eq!(row["last_error"]["kind"], error, "{row}");
    let of = |event: &Value| {
        event["replication"] == stream && (state != "held" || event["message"] == row["last_error"]["message"])
    };
    wait_for("the event", LIMIT, async || site.events.told(kind).iter().any(of)).await?;
    if state == "held" {
        let message = row["last_error"]["message"].as_str().unwrap_or_default();
        assert!(site.service.log().contains(&format!("held: {message}")), "{}", site.service.log());
        let (_, text) = site.service.get("/metrics").await?;
        let labels = format!("stream=\"{stream}\",replicator=\"TEST\",worker=\"TEST\",state=\"held\"");
        let line = format!("choria_stream_replicator_replicator_state{{{labels}}} 1");
        assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
    }
    Ok(row)
}

/// Waits until everything is copied and the end of the outage is reported.
async fn over(site: &Site, stream: &str, last: u64, within: Duration) -> Result<Value> {
    let begun = Instant::now();
    let row = site.settled(stream, last).await?;
    let took = begun.elapsed();
    ensure!(took < within, "it took {took:?}: {row}");
    repaired(site, stream).await?;
    site.verify(stream, &Expect::copy_of(stream).site(SITE).late_allowed()).await?;
    Ok(row)
}

/// Waits until the newest event about the outages of a replication reports an end.
async fn repaired(site: &Site, stream: &str) -> Result<()> {
    let newest =
        || site.events.kinds(stream).into_iter().rfind(|kind| ["held", "stalled", "repaired"].contains(&kind.as_str()));
    wait_for("the end of the outage", LIMIT, async || newest().as_deref() == Some("repaired")).await
}

/// The target stream with other settings.
async fn update(site: &Site, stream: &str, config: Value) -> Result<()> {
    let subjects = json!({"name": stream, "subjects": [format!("{}.>", stream.to_lowercase())]});
    site.target().await?.api(&format!("STREAM.UPDATE.{stream}"), merged(subjects, config)).await?;
    Ok(())
}

/// Source and target stream of this name, and so many messages of 100 bytes and more.
async fn begin(site: &Site, stream: &str, target: Value, messages: u64) -> Result<()> {
    site.source_stream(stream, json!({})).await?;
    site.target_stream(stream, target).await?;
    publish(site, stream, 1..=messages).await
}

async fn publish(site: &Site, stream: &str, numbers: std::ops::RangeInclusive<u64>) -> Result<()> {
    let subject = stream.to_lowercase();
    let messages = numbers.map(|i| Outgoing::new(format!("{subject}.{}", i % 5), format!("{i:0>100}")));
    site.source().await?.publish_all(messages).await?;
    Ok(())
}

async fn retry(site: &Site, stream: &str) -> Result<()> {
    ensure!(site.ask("retry", stream).await?.error.is_none());
    Ok(())
}

#[tokio::test]
async fn a_full_target_holds_the_copy_until_there_is_room() -> Result<()> {
    let site = monitored().await?;
    for (stream, target) in transports(&site.target) {
        let limits = |limits: Value| merged(merged(json!({"discard": "new"}), target.clone()), limits);
        begin(&site, stream, limits(json!({"max_msgs": 50})), 200).await?;
        site.add(stream, json!({})).await?;
        let row = told(&site, stream, "held", &["maximum messages exceeded (10077)"]).await?;
        assert!(row["last_error"].get("source_seq").is_none(), "no message is to blame: {row}");
        assert_eq!(site.at_target(stream).await?, 50);
        // More room, and nobody says so.
        update(&site, stream, limits(json!({"max_msgs": 120}))).await?;
        let row = site.row_when(stream, "continues by itself", |row| row["position"]["source_seq"] == 120).await?;
        assert_eq!(row["lag"]["messages"].as_u64().map(|lag| lag > 0), Some(true), "{row}");
        told(&site, stream, "held", &["maximum messages exceeded (10077)"]).await?;
        update(&site, stream, limits(json!({}))).await?;
        retry(&site, stream).await?;
        over(&site, stream, 200, AT_ONCE).await?;

        // Full by bytes, and room made by a purge of what was copied.
        let bytes = site.target().await?.stream_state(stream).await?["bytes"].as_u64().context("bytes")?;
        update(&site, stream, limits(json!({"max_bytes": bytes + 5_000}))).await?;
        publish(&site, stream, 201..=300).await?;
        told(&site, stream, "held", &["maximum bytes exceeded (10077)"]).await?;
        update(&site, stream, limits(json!({"max_bytes": bytes * 10}))).await?;
        over(&site, stream, 300, BY_ITSELF).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_full_target_that_is_purged_loses_and_doubles_nothing() -> Result<()> {
    let site = monitored().await?;
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, merged(json!({"max_msgs": 60, "discard": "new"}), target), 150).await?;
        site.add(stream, json!({})).await?;
        for part in [60_u64, 120] {
            let full = |row: &Value| row["state"] == "held" && row["position"]["source_seq"] == part;
            site.row_when(stream, "is held again", full).await?;
            told(&site, stream, "held", &["maximum messages exceeded"]).await?;
            let stored = site.target().await?.read_stream(stream).await?;
            let payload = |i: u64| format!("{i:0>100}").into_bytes();
            let expect: Vec<_> = (part - 59..=part).map(payload).collect();
            assert_eq!(stored.iter().map(|message| message.payload.clone()).collect::<Vec<_>>(), expect);
            site.target().await?.api(&format!("STREAM.PURGE.{stream}"), Value::Null).await?;
            retry(&site, stream).await?;
        }
        let row = site.settled(stream, 150).await?;
        assert_eq!(row["counters"]["copied"], 150, "{row}");
        assert_eq!(site.at_target(stream).await?, 30);
    }
    Ok(())
}

/// The target's server is away for this time.
async fn unreachable(time: Duration) -> Result<()> {
    let mut site = monitored().await?;
    let streams = transports(&site.target);
    for (stream, target) in &streams {
        begin(&site, stream, target.clone(), 100).await?;
        site.add(stream, json!({})).await?;
        site.settled(stream, 100).await?;
    }
    site.target.stop().await?;
    for (stream, _) in &streams {
        publish(&site, stream, 101..=200).await?;
        let row = told(&site, stream, "retrying", &["target"]).await?;
        assert_eq!(row["target"]["connected"], false, "{row}");
    }
    tokio::time::sleep(time).await;
    for (stream, _) in &streams {
        let row = site.row_when(stream, "is retrying still", |row| row["state"] == "retrying").await?;
        assert_eq!(row["position"]["source_seq"], 100, "{row}");
    }
    site.target.restart().await?;
    for (stream, _) in &streams {
        over(&site, stream, 200, Duration::from_secs(10)).await?;
        // Reported when it began, and not at each try.
        let told = site.events.told("stalled");
        assert_eq!(told.iter().filter(|event| event["replication"] == *stream).count(), 1, "{told:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_target_that_is_unreachable_for_some_seconds_is_tried_again() -> Result<()> {
    unreachable(Duration::from_secs(7)).await
}

#[tokio::test]
#[ignore = "takes more than a minute"]
async fn a_target_that_is_unreachable_for_a_minute_is_tried_again() -> Result<()> {
    unreachable(Duration::from_secs(60)).await
}

const USERS: &str = "authorization { users: [{user: test, password: test}, {user: copy, password: copy";
const WITHDRAWN: &str = "permissions: {publish: {deny: [\"plain.>\", \"fast.>\"]}}";

#[tokio::test]
async fn a_withdrawn_permission_holds_the_copy_until_it_returns() -> Result<()> {
    let all = format!("{USERS}}}] }}");
    let less = format!("{USERS}, {WITHDRAWN}}}] }}");
    let target = Server::builder(Role::Target).config(&all).start().await?;
    let source = Server::start(Role::Source).await?;
    let mut site = Site::builder().on(source, target).args(["--monitor", "127.0.0.1:0"]).start().await?;
    let mut raw = crate::harness::Raw::connect(&site.target.url_as("test:test")).await?;
    for (stream, target) in transports(&site.target) {
        let subjects = json!({"subjects": [format!("{}.>", stream.to_lowercase())]});
        site.source_stream(stream, json!({})).await?;
        raw.create_stream(stream, merged(subjects, target)).await?;
        publish(&site, stream, 1..=100).await?;
        site.add(stream, json!({"target_url": site.target.url_as("copy:copy")})).await?;
        site.settled(stream, 100).await?;
        for (last, by_hand) in [(200, true), (300, false)] {
            site.target.reload_with(&less).await?;
            publish(&site, stream, last - 99..=last).await?;
            let words = ["Permissions Violation for Publish", &stream.to_lowercase()];
            told(&site, stream, "held", &words).await?;
            site.target.reload_with(&all).await?;
            if by_hand {
                retry(&site, stream).await?;
            }
            let begun = Instant::now();
            site.settled(stream, last).await?;
            let within = if by_hand { AT_ONCE } else { BY_ITSELF };
            assert!(begun.elapsed() < within, "{:?}", begun.elapsed());
            repaired(&site, stream).await?;
        }
        // The connection of the site has no login there.
        let report = crate::harness::checker::compare_streams(
            &mut site.source().await?,
            &mut raw,
            stream,
            &Expect::copy_of(stream).site(SITE),
        )
        .await?;
        report.verify()?;
    }
    Ok(())
}

#[tokio::test]
async fn a_target_that_is_sealed_holds_the_copy() -> Result<()> {
    let site = monitored().await?;
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, target.clone(), 100).await?;
        site.add(stream, json!({})).await?;
        site.settled(stream, 100).await?;
        update(&site, stream, merged(json!({"sealed": true}), target.clone())).await?;
        publish(&site, stream, 101..=200).await?;
        told(&site, stream, "held", &["sealed"]).await?;
        // Nothing unseals a stream; a recreated one gets everything that the source has.
        site.target().await?.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
        site.target_stream(stream, target).await?;
        retry(&site, stream).await?;
        over(&site, stream, 200, AT_ONCE).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_target_deleted_under_a_run_is_recreated_or_awaited() -> Result<()> {
    let site = monitored().await?;
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, target.clone(), 100).await?;
        site.add(stream, json!({"no_target_create": true})).await?;
        site.settled(stream, 100).await?;
        site.target().await?.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
        publish(&site, stream, 101..=200).await?;
        told(&site, stream, "held", &["does not exist and `no_target_create` is set"]).await?;
        site.target_stream(stream, target).await?;
        retry(&site, stream).await?;
        over(&site, stream, 200, AT_ONCE).await?;

        site.send("config.update", site.document(stream)).await?;
        site.settled(stream, 200).await?;
        site.target().await?.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
        publish(&site, stream, 201..=300).await?;
        let row = site.settled(stream, 300).await?;
        site.verify(stream, &Expect::copy_of(stream).site(SITE)).await.with_context(|| row.to_string())?;
    }
    Ok(())
}

#[tokio::test]
async fn a_source_deleted_under_a_run_holds_the_copy() -> Result<()> {
    let site = monitored().await?;
    for (stream, target) in transports(&site.target) {
        begin(&site, stream, target, 100).await?;
        site.add(stream, json!({})).await?;
        site.settled(stream, 100).await?;
        site.source().await?.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
        told(&site, stream, "held", &["source stream", "does not exist"]).await?;
        site.source_stream(stream, json!({})).await?;
        publish(&site, stream, 101..=130).await?;
        retry(&site, stream).await?;
        let target_has = async || site.at_target(stream).await.is_ok_and(|messages| messages == 130);
        wait_for("what the new stream has", AT_ONCE, target_has).await?;
        let row = site.settled(stream, 30).await?;
        assert_eq!(row["counters"]["copied"], 130, "{row}");
        let told = async || site.events.kinds(stream).contains(&"source-reset".to_owned());
        wait_for("the new stream to be reported", LIMIT, told).await?;
    }
    Ok(())
}
