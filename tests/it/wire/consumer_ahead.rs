//! A source that forgets what is acknowledged loses its end, and its durable consumer does not: servers before 2.14 leave
//! the consumer ahead of the stream, and it never delivers what the stream stores at the lost sequences.

use std::{fs, path::Path, path::PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Site, wait_for};

async fn publish(raw: &mut Raw, numbers: impl Iterator<Item = u64>) -> Result<()> {
    raw.publish_all(numbers.map(|i| Outgoing::new("q.a", i.to_string()))).await.map(drop)
}

/// Where a server stores the messages of the stream.
fn messages(store: &Path) -> Result<PathBuf> {
    let accounts = fs::read_dir(store.join("jetstream"))?.collect::<Result<Vec<_>, _>>()?;
    let folders = accounts.iter().map(|account| account.path().join("streams/Q/msgs"));
    folders.into_iter().find(|folder| folder.is_dir()).context("the stream is not stored")
}

/// The stopped server has the messages of its snapshot, and its consumers as they are.
fn lose_end(server: &Server) -> Result<()> {
    let now = messages(&server.store_dir())?;
    fs::remove_dir_all(&now)?;
    Ok(fs::rename(messages(&server.folder().join("snapshots/old"))?, now)?)
}

async fn steer(site: &Site, how: &str) -> Result<()> {
    let reply = site.ask(how, "Q").await?;
    ensure!(reply.error.is_none(), "{reply:?}");
    Ok(())
}

async fn drained(raw: &mut Raw) -> Result<()> {
    let empty = async || raw.stream_state("Q").await.is_ok_and(|state| state["messages"] == 0);
    wait_for("the source to be empty", LIMIT, empty).await
}

async fn copied(site: &Site) -> Result<Vec<u64>> {
    let stored = site.target().await?.read_stream("Q").await?;
    stored.iter().map(|message| Ok(String::from_utf8_lossy(&message.payload).parse()?)).collect()
}

/// Everything is at the target once and in order.
async fn finish(site: &Site, last: u64) -> Result<()> {
    let mut seen = Vec::new();
    let all = async || {
        seen = copied(site).await.unwrap_or_default();
        seen.len() as u64 >= last
    };
    let arrived = wait_for("everything to be at the target", LIMIT, all).await;
    arrived.with_context(|| format!("{} of {last} are at the target: {}", seen.len(), site.service.log()))?;
    drained(&mut site.source().await?).await.with_context(|| site.service.log())?;
    let seen = copied(site).await?;
    ensure!(seen == (1..=last).collect::<Vec<_>>(), "at the target: {seen:?}");
    Ok(())
}

/// Copies 100 messages and acknowledges them; then the source has what it had when 41 to 60 were not copied yet.
async fn lost_behind_60(retention: &str, choria: bool, stopped: bool) -> Result<Site> {
    lost_behind_60_at(Site::start().await?, retention, choria, stopped).await
}

async fn lost_behind_60_at(mut site: Site, retention: &str, choria: bool, stopped: bool) -> Result<Site> {
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": retention})).await?;
    if choria {
        let config = json!({"name": "SR_TEST", "durable_name": "SR_TEST", "ack_policy": "explicit",
            "ack_wait": 300_000_000_000u64, "max_ack_pending": 500});
        raw.api("CONSUMER.CREATE.Q.SR_TEST", json!({"stream_name": "Q", "config": config})).await?;
    }
    site.add("Q", json!({})).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    publish(&mut raw, 1..=40).await?;
    site.settled("Q", 40).await?;
    drained(&mut raw).await?;
    steer(&site, "pause").await?;
    site.row_when("Q", "is paused", |row| row["state"] == "paused").await?;
    publish(&mut raw, 41..=60).await?;
    site.source.stop().await?;
    site.source.snapshot("old")?;
    site.source.restart().await?;
    steer(&site, "resume").await?;
    let mut raw = site.source().await?;
    publish(&mut raw, 61..=100).await?;
    site.settled("Q", 100).await?;
    drained(&mut raw).await?;
    if stopped {
        site.stop().await?;
    }
    // In order, so that the consumer is stored as it is.
    site.source.stop().await?;
    lose_end(&site.source)?;
    site.source.restart().await?;
    Ok(site)
}

async fn grows_by(more: u64) -> Result<()> {
    for (retention, stopped) in [("workqueue", true), ("workqueue", false), ("interest", true), ("interest", false)] {
        let mut site = lost_behind_60(retention, false, stopped).await?;
        publish(&mut site.source().await?, 101..=100 + more).await?;
        if stopped {
            site.service.restart().await?;
        }
        finish(&site, 100 + more).await.with_context(|| format!("{retention}, stopped: {stopped}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_stream_that_stays_behind_its_old_acks_is_copied() -> Result<()> {
    grows_by(30).await
}

#[tokio::test]
async fn a_stream_that_grows_past_its_old_acks_is_copied() -> Result<()> {
    grows_by(80).await
}

/// A source server that keeps its consumers as they are when a stream loses its end.
async fn old_source() -> Result<Site> {
    let source = Server::builder(Role::Source).version("2.12.8").start().await?;
    Site::builder().on(source, Server::start(Role::Target).await?).start().await
}

/// Waits until the record's position is that of a message that is gone.
async fn gone_at(site: &Site, seq: u64) -> Result<()> {
    wait_for("a position without a message", LIMIT, async || {
        let Ok(bucket) = site.bucket("REPLICATOR_POSITIONS").await else { return false };
        let record =
            bucket.get("Q").await.ok().flatten().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        record.is_some_and(|record| record["source"]["seq"] == seq && record["source"]["none_at"].is_string())
    })
    .await
}

/// All that was there before the first start is gone: no copy shows what the stream was, and perhaps no record.
#[tokio::test]
async fn an_end_lost_before_the_first_copy_is_noticed() -> Result<()> {
    for (retention, recorded) in [("workqueue", true), ("workqueue", false), ("interest", true), ("interest", false)] {
        let mut site = old_source().await?;
        let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": retention})).await?;
        publish(&mut raw, 1..=30).await?;
        raw.api("STREAM.PURGE.Q", Value::Null).await?;
        site.source.stop().await?;
        site.source.snapshot("old")?;
        site.source.restart().await?;
        let mut raw = site.source().await?;
        publish(&mut raw, 31..=60).await?;
        raw.api("STREAM.PURGE.Q", Value::Null).await?;
        site.add("Q", json!({})).await?;
        site.row_when("Q", "runs", |row| row["state"] == "running").await?;
        gone_at(&site, 60).await?;
        site.stop().await?;
        if !recorded {
            site.bucket("REPLICATOR_POSITIONS").await?.purge("Q").await?;
        }
        site.source.stop().await?;
        lose_end(&site.source)?;
        site.source.restart().await?;
        publish(&mut site.source().await?, 61..=140).await?;
        site.service.restart().await?;
        let all = async || copied(&site).await.is_ok_and(|copied| copied.len() >= 80);
        let arrived = wait_for("everything to be at the target", LIMIT, all).await;
        arrived.with_context(|| format!("{retention}, recorded: {recorded}: {}", site.service.log()))?;
        ensure!(copied(&site).await? == (61..=140).collect::<Vec<_>>(), "{retention}, recorded: {recorded}");
        drained(&mut site.source().await?).await?;
    }
    Ok(())
}

/// The position is that of a message that was acknowledged and is gone.
#[tokio::test]
async fn an_end_lost_while_the_position_has_no_message() -> Result<()> {
    let mut site = old_source().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    publish(&mut raw, 1..=40).await?;
    site.source.stop().await?;
    site.source.snapshot("old")?;
    site.source.restart().await?;
    let mut raw = site.source().await?;
    publish(&mut raw, 41..=60).await?;
    site.add("Q", json!({})).await?;
    site.settled("Q", 60).await?;
    drained(&mut raw).await?;
    site.stop().await?;
    // Found by the copies: the last save may be missing after a crash.
    site.bucket("REPLICATOR_POSITIONS").await?.purge("Q").await?;
    site.service.restart().await?;
    gone_at(&site, 60).await?;
    site.stop().await?;
    site.source.stop().await?;
    lose_end(&site.source)?;
    site.source.restart().await?;
    publish(&mut site.source().await?, 61..=140).await?;
    site.service.restart().await?;
    finish(&site, 140).await
}

/// A consumer that this program did not make is never deleted: the status says what to do.
#[tokio::test]
async fn a_consumer_of_choria_that_is_ahead_holds_the_copy() -> Result<()> {
    let mut site = lost_behind_60("workqueue", true, true).await?;
    let mut raw = site.source().await?;
    publish(&mut raw, 101..=180).await?;
    site.service.restart().await?;
    if !site.source.at_least(2, 14) {
        let row = site.row_when("Q", "is held", |row| row["state"] == "held").await?;
        let error = row["last_error"]["message"].as_str().context("no error")?;
        ensure!(
            error.contains("`SR_TEST`") && error.contains("ahead") && error.contains("Delete this consumer"),
            "{error}"
        );
        ensure!(copied(&site).await? == (1..=100).collect::<Vec<_>>());
        raw.api("CONSUMER.DELETE.Q.SR_TEST", Value::Null).await?;
        steer(&site, "retry").await?;
        return finish(&site, 180).await;
    }
    // What was acknowledged before and is back in the stream is nobody's.
    site.settled("Q", 140).await?;
    ensure!(copied(&site).await? == (1..=180).collect::<Vec<_>>());
    Ok(())
}

/// Servers before 2.14 remove what a consumer that is ahead does not want when another one ends, so a check of the source
/// uses none.
#[tokio::test]
async fn checks_of_a_paused_copy_remove_nothing() -> Result<()> {
    for retention in ["workqueue", "interest"] {
        let source = Server::builder(Role::Source).version("2.12.8").start().await?;
        let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
        let mut site = lost_behind_60_at(site, retention, false, true).await?;
        publish(&mut site.source().await?, 101..=130).await?;
        site.put("Q/paused", "by hand").await?;
        site.service.restart().await?;
        site.row_when("Q", "was checked", |row| row["state"] == "paused" && row["lag"]["messages"] == 0).await?;
        steer(&site, "resume").await?;
        finish(&site, 130).await.with_context(|| retention.to_owned())?;
        // The same while nothing is lost: what waits is counted, and how old it is.
        steer(&site, "pause").await?;
        site.row_when("Q", "is paused", |row| row["state"] == "paused").await?;
        publish(&mut site.source().await?, 131..=150).await?;
        let waits = |row: &Value| row["lag"]["messages"] == 20 && row["lag"]["seconds"].as_f64() > Some(0.0);
        site.row_when("Q", "counts what waits", waits).await?;
    }
    Ok(())
}

/// A source server that needs explicit acks, with an interest stream.
async fn interest() -> Result<(Site, Raw)> {
    let source = Server::builder(Role::Source).version("2.12.8").start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "interest"})).await?;
    Ok((site, raw))
}

async fn consumers(raw: &mut Raw) -> Result<Vec<String>> {
    let names = raw.api("CONSUMER.NAMES.Q", json!({})).await?;
    let mut names: Vec<String> = serde_json::from_value(names["consumers"].clone()).unwrap_or_default();
    names.sort();
    Ok(names)
}

/// What begins to copy a stream deletes no consumer of a neighbour, whatever its name is.
#[tokio::test]
async fn the_consumers_of_neighbours_are_left_alone() -> Result<()> {
    let (site, mut raw) = interest().await?;
    site.add("Q", json!({"name": "TEST_keep", "target_stream": "K", "target_subject_prefix": "k"})).await?;
    site.row_when("Q.TEST_keep", "runs", |row| row["state"] == "running").await?;
    let reply = site.ask("pause", "Q.TEST_keep").await?;
    ensure!(reply.error.is_none(), "{reply:?}");
    site.row_when("Q.TEST_keep", "is paused", |row| row["state"] == "paused").await?;
    publish(&mut raw, 1..=50).await?;
    site.add("Q", json!({})).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    publish(&mut raw, 51..=60).await?;
    site.row_when("Q", "has copied", |row| row["position"]["source_seq"] == 60).await?;
    ensure!(consumers(&mut raw).await? == ["SR_TEST", "SR_TEST_keep"]);
    let reply = site.ask("resume", "Q.TEST_keep").await?;
    ensure!(reply.error.is_none(), "{reply:?}");
    site.copied("K", 60).await
}

/// A process that ended while it recreated its consumer left one that keeps the messages. It goes when the next run has
/// its consumer, and with the replication.
#[tokio::test]
async fn what_an_interrupted_recreation_left_goes() -> Result<()> {
    let (mut site, mut raw) = interest().await?;
    site.add("Q", json!({})).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    publish(&mut raw, 1..=10).await?;
    site.settled("Q", 10).await?;
    site.stop().await?;
    let config = json!({"name": "sr_keep_SR_TEST", "durable_name": "sr_keep_SR_TEST", "ack_policy": "explicit",
        "deliver_policy": "by_start_sequence", "opt_start_seq": 11, "metadata": {"stream-replicator": "Q"}});
    let create = json!({"stream_name": "Q", "config": config});
    raw.api("CONSUMER.CREATE.Q.sr_keep_SR_TEST", create.clone()).await?;
    publish(&mut raw, 11..=20).await?;
    site.service.restart().await?;
    finish(&site, 20).await?;
    ensure!(consumers(&mut raw).await? == ["SR_TEST"]);
    raw.api("CONSUMER.CREATE.Q.sr_keep_SR_TEST", create).await?;
    steer(&site, "config.delete").await?;
    ensure!(consumers(&mut raw).await?.is_empty());
    Ok(())
}
