//! Senders that a publisher invents: memory is bounded, and every message is copied.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::site::merged;
use crate::harness::{LIMIT, Outgoing, Proxy, Service, Site, proxy::Direction, request, wait_for, wait_value};

const STATE: &str = "REPLICATOR_STATE";
const LONG: Duration = Duration::from_secs(900);
const MIB: u64 = 1 << 20;

fn report(sender: &str) -> Outgoing {
    Outgoing::new("nodes.report", json!({"sender": sender}).to_string())
}

fn sampled(fields: Value) -> Value {
    merged(json!({"inspect_field": "sender", "inspect_duration": "1h"}), fields)
}

fn advised(fields: Value) -> Value {
    let advisory = json!({"subject": "advisories.%s.%v", "reliable": true});
    sampled(merged(json!({"advisory": advisory}), fields))
}

async fn site(fields: Value) -> Result<Site> {
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.source_stream("ADVISORIES", json!({})).await?;
    site.add("NODES", fields).await?;
    Ok(site)
}

async fn publish(site: &Site, senders: impl IntoIterator<Item = String>) -> Result<u64> {
    site.source().await?.publish_all(senders.into_iter().map(|sender| report(&sender))).await
}

async fn record(site: &Site, key: &str) -> Option<Value> {
    let stored = site.bucket(STATE).await.ok()?.get(key).await.ok()??;
    serde_json::from_slice(&stored).ok()
}

/// 100 senders fill the bound, 100 others follow; everybody reports twice.
async fn beyond(limits: Value) -> Result<()> {
    let mut site = site(advised(json!({"limits": limits}))).await?;
    let names = |from: u32| (from..from + 100).map(|number| format!("n{number:0>3}{}", "-".repeat(652)));
    for from in [0, 100, 0, 100] {
        publish(&site, names(from)).await?;
    }
    let row = site.settled("NODES", 400).await?;
    assert_eq!((&row["counters"]["copied"], &row["counters"]["skipped_sampled"]), (&json!(300), &json!(100)), "{row}");
    assert_eq!((&row["sampling"]["senders"], &row["sampling"]["untracked"]), (&json!(100), &json!(200)), "{row}");
    let event = site.events.wait("senders-untracked", "NODES").await?;
    assert_eq!(event["senders"], 100, "{event}");
    site.row_when("NODES", "reports tracked senders", |row| row["sampling"]["advised"]["new"] == 100).await?;
    let (_, metrics) = site.service.get("/metrics").await?;
    let line =
        r#"choria_stream_replicator_tracker_untracked_messages{stream="NODES",replicator="TEST",worker="TEST"} 200"#;
    assert!(metrics.contains(line), "{metrics}");
    // Once: more of them are no news.
    publish(&site, names(200)).await?;
    let row = site.settled("NODES", 500).await?;
    assert_eq!((&row["sampling"]["senders"], &row["sampling"]["untracked"]), (&json!(100), &json!(300)), "{row}");
    let said = site.events.told("senders-untracked").len();
    assert_eq!(said, 1);
    Ok(())
}

#[tokio::test]
async fn further_senders_than_limits_senders_are_copied() -> Result<()> {
    beyond(json!({"senders": 100})).await
}

#[tokio::test]
async fn further_senders_than_limits_sender_bytes_are_copied() -> Result<()> {
    // As stored a name has 131 bytes: 500 names fill 65,500 of the 65,536 bytes.
    let mut site = site(sampled(json!({"limits": {"sender_bytes": 65536}}))).await?;
    let names = |from: u32| (from..from + 600).map(|number| format!("n{number:0>4}{}", "-".repeat(652)));
    publish(&site, names(0)).await?;
    let last = publish(&site, names(0)).await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!((&row["sampling"]["senders"], &row["sampling"]["untracked"]), (&json!(500), &json!(200)), "{row}");
    assert_eq!((&row["counters"]["copied"], &row["counters"]["skipped_sampled"]), (&json!(700), &json!(500)), "{row}");
    site.events.wait("senders-untracked", "NODES").await?;
    Ok(())
}

#[tokio::test]
async fn a_long_value_is_stored_as_its_beginning_and_a_hash() -> Result<()> {
    let site = site(advised(json!({}))).await?;
    let (longest, one, two) = ("x".repeat(256), "x".repeat(257), format!("{}y", "x".repeat(256)));
    let all = [&longest, &one, &two, &longest, &one, &two].map(String::clone);
    let last = publish(&site, all).await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!((&row["counters"]["copied"], &row["sampling"]["senders"]), (&json!(3), &json!(3)), "{row}");
    let reply = request(&site.client, "replicator.senders", json!({"replication": "NODES"})).await?;
    let mut names: Vec<_> = reply["senders"].as_array().context("rows")?.iter().map(|row| &row["sender"]).collect();
    names.sort_by_key(|name| name.as_str().map(str::len));
    let is_short = |name: &Value| name.as_str().is_some_and(|name| name.len() < 200 && name.starts_with("xxxxxxxx"));
    assert!(is_short(names[0]) && is_short(names[1]) && *names[2] == json!(longest), "{reply}");
    site.row_when("NODES", "reports them", |row| row["sampling"]["advised"]["new"] == 3).await?;
    let stored = site.source().await?.read_stream("ADVISORIES").await?;
    for message in stored {
        let body: Value = serde_json::from_slice(&message.payload)?;
        assert!(names.contains(&&body["value"]), "{body}");
    }
    Ok(())
}

#[tokio::test]
async fn the_record_of_an_older_program_for_a_long_value_counts() -> Result<()> {
    let mut site = site(sampled(json!({}))).await?;
    let long = "x".repeat(300);
    let last = publish(&site, [long.clone()]).await?;
    site.settled("NODES", last).await?;
    let reply = request(&site.client, "replicator.senders", json!({"replication": "NODES"})).await?;
    let short = reply["senders"][0]["sender"].as_str().context("a name")?.to_owned();
    let key = format!("NODES.{}", short.replace('.', "=2E"));
    let mut known = wait_value("the record", LIMIT, async || record(&site, &key).await).await?;
    // As it would be without the shorter form.
    site.stop().await?;
    let bucket = site.bucket(STATE).await?;
    bucket.purge(&key).await?;
    known["sender"] = json!(long);
    let old = "NODES.".to_owned() + &"x".repeat(166) + "==" + &short[short.len() - 32..];
    bucket.put(&old, known.to_string().into()).await?;
    site.service.restart().await?;
    let last = publish(&site, [long.clone()]).await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!((&row["counters"]["skipped_sampled"], &row["sampling"]["senders"]), (&json!(1), &json!(1)), "{row}");
    wait_for("the record to move", LIMIT, async || {
        record(&site, &old).await.is_none() && record(&site, &key).await.is_some()
    })
    .await?;
    Ok(())
}

/// MiB of a process.
struct Memory {
    before: u64,
    most: u64,
}

impl Memory {
    fn growth(&self) -> u64 {
        self.most.saturating_sub(self.before)
    }
}

/// A leader and a standby of a replication with reliable advisories, and so many invented senders of 1 kB: the memory of both.
async fn invented(count: u64) -> Result<(Memory, Memory)> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let service = Service::builder(&site.control().url(), "TEST").instance("two").start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.source_stream("ADVISORIES", json!({})).await?;
    site.add("NODES", advised(json!({}))).await?;
    let leader = site.row_when("NODES", "runs", |row| row["state"] == "running").await?["leader"].clone();
    let (leader, standby) = if leader == "two" { (&service, &site.service) } else { (&site.service, &service) };
    let before = (leader.usage().rss, standby.usage().rss);
    let last = publish(&site, (0..count).map(|number| format!("{number:0>9}.{}", "invented".repeat(125)))).await?;
    let row = site.settled_within("NODES", last, LONG).await?;
    assert_eq!((&row["sampling"]["senders"], &row["sampling"]["untracked"]), (&json!(count), &json!(0)), "{row}");
    wait_for("all advisories to be confirmed", LONG, async || {
        site.row("NODES").await.is_some_and(|row| row["sampling"]["advised"]["new"] == count)
    })
    .await?;
    let memory = |before: u64, most: u64| Memory { before: before / MIB, most: most / MIB };
    let (leader, standby) = (memory(before.0, leader.usage().rss_peak), memory(before.1, standby.usage().rss_peak));
    println!(
        "{count} senders of 1 kB: leader {} MiB before, {} MiB at the most, standby {} and {} MiB",
        leader.before, leader.most, standby.before, standby.most
    );
    Ok((leader, standby))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_15_000_invented_senders() -> Result<()> {
    let (leader, standby) = invented(15_000).await?;
    // Of an unoptimized build the program itself takes more than the senders.
    let (leader, standby) = (leader.growth(), standby.growth());
    assert!(leader < 40 && standby < 40, "leader {leader} MiB more, standby {standby} MiB more");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "300,000 senders with advisories: make check-long"]
async fn memory_of_300_000_invented_senders_is_below_256_mib() -> Result<()> {
    let (leader, standby) = invented(300_000).await?;
    let (leader, standby) = (leader.most, standby.most);
    assert!(leader < 256 && standby < 256, "leader {leader} MiB, standby {standby} MiB");
    Ok(())
}

/// Writes records of this many senders of 20 characters that were seen now, about 250 bytes each.
async fn write_records(site: &Site, count: u64) -> Result<()> {
    let (now, mut raw) = (chrono::Utc::now(), site.source().await?);
    let records = (0..count).map(|number| {
        let sender = format!("node-{number:0>15}");
        let record = json!({"version": 1, "sender": sender, "seen": now, "copied": now, "size": 100, "sequence": 0});
        Outgoing::new(format!("$KV.{STATE}.NODES.{sender}"), record.to_string())
            .with_lines(&["Replicator-Instance: one"])
    });
    raw.publish_all(records).await?;
    Ok(())
}

/// Resident memory and its peak, in MiB.
fn memory(service: &Service) -> (u64, u64) {
    let usage = service.usage();
    (usage.rss / MIB, usage.rss_peak / MIB)
}

/// A leader and a standby start with the records of this many senders, then the standby leads: peak memory of the first
/// leader and of the next one, in MiB.
async fn known_from_records(count: u64) -> Result<(u64, u64)> {
    let mut site = Site::builder().control_at_source().args(["--instance", "one", "--lease-ttl", "2s"]).start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", sampled(json!({}))).await?;
    site.row_when("NODES", "runs", |row| row["state"] == "running").await?;
    site.service.kill()?;
    write_records(&site, count).await?;
    let began = std::time::Instant::now();
    let builder = Service::builder(&site.control().url(), "TEST").instance("two").args(["--lease-ttl", "2s"]);
    let mut two = builder.spawn()?;
    site.service.restart().await?;
    two.wait_ready().await?;
    let all = json!(count);
    let all = |row: &Value| row["state"] == "running" && row["sampling"]["senders"] == all;
    let know = async || site.row("NODES").await.filter(all);
    let row = wait_value("the leader to know all senders", LONG, know).await?;
    println!("{count} senders: the leader knows them after {:?}", began.elapsed());
    let (leader, standby) = if row["leader"] == "two" { (&two, &site.service) } else { (&site.service, &two) };
    let peaks = (memory(leader), memory(standby));
    println!("{count} senders: leader {:?} MiB, standby {:?} MiB, now and at the most", peaks.0, peaks.1);
    // No sender is new: the standby knows them too.
    let led_by = row["leader"].clone();
    let other = if led_by == "two" { "one" } else { "two" };
    if led_by == "two" {
        two.kill()?
    } else {
        site.service.kill()?
    }
    let began = std::time::Instant::now();
    let know = async || site.row("NODES").await.filter(|row| row["leader"] == other && all(row));
    wait_value("the standby to lead", LONG, know).await?;
    println!("{count} senders: the standby leads after {:?}", began.elapsed());
    let last = publish(&site, (0..100).map(|number| format!("node-{number:0>15}"))).await?;
    let row = site.settled_within("NODES", last, LONG).await?;
    assert_eq!((&row["counters"]["skipped_sampled"], &row["counters"]["copied"]), (&json!(100), &json!(0)), "{row}");
    let standby = memory(if other == "two" { &two } else { &site.service });
    println!("{count} senders: the next leader {standby:?} MiB");
    Ok((peaks.0.1, standby.1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_records_are_loaded_in_little_memory() -> Result<()> {
    let (leader, standby) = known_from_records(100_000).await?;
    assert!(leader < 96 && standby < 96, "leader {leader} MiB, standby {standby} MiB");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a million records: make check-long"]
async fn a_million_records_are_loaded_in_less_than_256_mib() -> Result<()> {
    let (leader, standby) = known_from_records(1_000_000).await?;
    assert!(leader < 256 && standby < 256, "leader {leader} MiB, standby {standby} MiB");
    Ok(())
}

/// Over a line that takes longer than any deadline, and breaks twice: no record that was read is read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_over_a_broken_slow_line_continues() -> Result<()> {
    const COUNT: u64 = 20_000;
    let site = site(sampled(json!({}))).await?;
    site.row_when("NODES", "runs", |row| row["state"] == "running").await?;
    write_records(&site, COUNT).await?;
    let proxy = Proxy::start(site.control().port()).await?;
    // About 8 MB: 10 s, with two breaks.
    proxy.throttle(&[Direction::ToClient], Some(800_000));
    let two = Service::builder(&proxy.url(), "TEST").instance("two").start().await?;
    let standby = async || two.log().contains("all records of senders were read");
    for _ in 0..2 {
        proxy.cut_after(Direction::ToClient, 2_500_000);
        wait_for("the line to break", LONG, async || !proxy.cut_pending(Direction::ToClient)).await?;
        assert!(!standby().await, "{}", two.log());
    }
    wait_for("the standby to know all", LONG, standby).await?;
    let log = two.log();
    assert_eq!(log.matches("all records of senders were read").count(), 1, "{log}");
    assert!(!log.contains("the records of senders cannot be followed"), "{log}");
    let line = log.lines().find(|line| line.contains("all records of senders were read")).context("a line")?;
    let delivered =
        line.split("delivered=").nth(1).and_then(|rest| rest.split_whitespace().next()).context("a number")?;
    // Records in flight when the line broke are delivered twice.
    let delivered: u64 = delivered.parse()?;
    assert!((COUNT..COUNT + COUNT / 4).contains(&delivered), "{line}");
    // Where the consumer begins that follows the breaks.
    let list = json!({"offset": 0});
    let consumers = site.source().await?.api("CONSUMER.LIST.KV_REPLICATOR_STATE", list).await?["consumers"].clone();
    let consumers = consumers.as_array().context("consumers")?;
    let of_nodes = consumers.iter().map(|consumer| &consumer["config"]).filter(|config| {
        config["filter_subject"].as_str().is_some_and(|subject| subject.starts_with("$KV.REPLICATOR_STATE.NODES."))
    });
    let begins = of_nodes.filter_map(|config| config["opt_start_seq"].as_u64()).max();
    assert!(begins.is_some_and(|begins| begins > COUNT / 4), "{consumers:?}");
    Ok(())
}

/// What makes the state bucket refuse records, and take them again.
async fn bound_records(site: &Site, bytes: i64) -> Result<()> {
    let mut raw = site.source().await?;
    let mut config = raw.api("STREAM.INFO.KV_REPLICATOR_STATE", json!({})).await?["config"].clone();
    config["max_msg_size"] = json!(bytes);
    raw.api("STREAM.UPDATE.KV_REPLICATOR_STATE", config).await?;
    Ok(())
}

#[tokio::test]
async fn a_copy_in_flight_while_its_record_was_written_counts() -> Result<()> {
    let mut site = site(sampled(json!({}))).await?;
    publish(&site, ["n1".to_owned()]).await?;
    site.settled("NODES", 1).await?;
    let first = async || record(&site, "NODES.n1").await.filter(|record| record["sequence"] == 1);
    let mut known = wait_value("the first record", LIMIT, first).await?;
    // Long ago, so that its next message is copied, and its record written for being seen.
    let ago = |minutes: i64| json!(chrono::Utc::now() - chrono::Duration::minutes(minutes));
    (known["seen"], known["copied"]) = (ago(50), ago(120));
    site.bucket(STATE).await?.put("NODES.n1", known.to_string().into()).await?;
    wait_for("the edit to be followed", LIMIT, async || {
        let reply = request(&site.client, "replicator.senders", json!({"replication": "NODES"})).await;
        reply.is_ok_and(|reply| reply["senders"][0]["copied"] != reply["senders"][0]["seen"])
    })
    .await?;
    site.target.freeze()?;
    publish(&site, ["n1".to_owned()]).await?;
    let edited = known["seen"].clone();
    let seen = async || record(&site, "NODES.n1").await.filter(|record| record["seen"] != edited);
    let written = wait_value("its record while the copy is in flight", LIMIT, seen).await?;
    assert_eq!(written["sequence"], 1, "{written}");
    // It settles, the position says so, and the record does not.
    bound_records(&site, 8).await?;
    site.target.thaw()?;
    wait_for("the position", LIMIT, async || {
        site.position("NODES").await.is_ok_and(|position| position.is_some_and(|it| it["source"]["seq"] == 2))
    })
    .await?;
    site.service.kill()?;
    let record = record(&site, "NODES.n1").await.context("a record")?;
    assert_eq!(record["sequence"], 1, "{record}");
    bound_records(&site, -1).await?;
    site.service.restart().await?;
    publish(&site, ["n1".to_owned()]).await?;
    let row = site.settled("NODES", 3).await?;
    assert_eq!((site.at_target("NODES").await?, &row["counters"]["skipped_sampled"]), (2, &json!(1)), "{row}");
    Ok(())
}

#[tokio::test]
async fn a_standby_leads_though_the_newest_marker_expired_unseen() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one", "--lease-ttl", "2s"]);
    let mut site = site.start().await?;
    let mut raw = site.source_stream("NODES", json!({})).await?;
    let state = raw.api("STREAM.INFO.KV_REPLICATOR_STATE", json!({})).await?;
    let mut config = state["config"].clone();
    if config["allow_msg_ttl"] != true {
        return Ok(()); // a server whose markers do not expire
    }
    // A marker that expires leaves no other one.
    config.as_object_mut().context("a configuration")?.remove("subject_delete_marker_ttl");
    raw.api("STREAM.UPDATE.KV_REPLICATOR_STATE", config).await?;
    site.add("NODES", sampled(json!({}))).await?;
    publish(&site, ["n1".to_owned()]).await?;
    site.settled("NODES", 1).await?;
    wait_for("the record", LIMIT, async || record(&site, "NODES.n1").await.is_some()).await?;
    let service = Service::builder(&site.control().url(), "TEST").instance("two").args(["--lease-ttl", "2s"]);
    let two = service.start().await?;
    let watch = wait_value("the watch of the standby", LIMIT, async || {
        let names = site.source().await.ok()?.api("CONSUMER.NAMES.KV_REPLICATOR_STATE", json!({})).await.ok()?;
        let names = names["consumers"].as_array()?.iter().filter_map(Value::as_str).map(str::to_owned);
        names.into_iter().find(|name| name.starts_with("sr_two_senders_"))
    });
    let watch = watch.await?;
    // The standby gets no more of the bucket, whose newest message is a marker that will expire.
    let until = json!({"pause_until": chrono::Utc::now() + chrono::Duration::hours(1)});
    raw.api(&format!("CONSUMER.PAUSE.KV_REPLICATOR_STATE.{watch}"), until).await?;
    let marker = Outgoing::new("$KV.REPLICATOR_STATE.NODES.n1", "");
    raw.publish(&marker.with_lines(&["KV-Operation: DEL", "Nats-TTL: 8s"])).await?;
    site.service.kill()?;
    let led = |row: &Value| row["leader"] == "two" && row["state"] == "running";
    site.row_when("NODES", "is led by two", led).await.with_context(|| two.log())?;
    Ok(())
}
