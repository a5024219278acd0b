//! Sources that forget what was acknowledged: work queues and interest streams, with every consumer that they can be
//! read with. By default the newest way that the source's server knows, beside it the one of Choria's replicator.

use std::{ops::RangeInclusive, sync::Mutex, time::Duration};

use anyhow::{Context, Result, anyhow, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use crate::harness::{
    Cluster, Expect, LIMIT, Outgoing, Proxy, Raw, Role, SITE, Site, Stored, checker::compare, connect, site::merged,
    timed, wait_for, wait_while_moving,
};

const LONG: Duration = Duration::from_secs(120);

/// How the source is made and read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DurableCase {
    retention: &'static str,
    /// The consumer is there before: with acks message by message, as Choria's replicator makes it.
    choria: bool,
    /// The target is there before, without fast-ingest.
    plain: bool,
}

const QUEUE: DurableCase = DurableCase { retention: "workqueue", choria: false, plain: false };
const INTEREST: DurableCase = DurableCase { retention: "interest", ..QUEUE };

/// The smallest number of messages that a kill now and then does not miss.
const COUNT: u64 = 30_000;

fn message(i: u64) -> Outgoing {
    let lines: &[&str] = if i.is_multiple_of(7) { &["A: 1", "b: 2", "A: 3"] } else { &[] };
    let message = Outgoing::new(format!("q.{}", i % 11), format!("{i:0>200}"));
    if lines.is_empty() { message } else { message.with_lines(lines) }
}

/// All messages of a stream, one by one: a work queue takes no consumer for reading.
async fn snapshot(raw: &mut Raw, stream: &str) -> Result<Vec<Stored>> {
    snapshot_from(raw, stream, 1).await
}

async fn snapshot_from(raw: &mut Raw, stream: &str, first: u64) -> Result<Vec<Stored>> {
    let mut all = Vec::new();
    let last = raw.stream_state(stream).await?["last_seq"].as_u64().context("no end")?;
    let mut next = first;
    while next <= last {
        let wanted = json!({"seq": next, "next_by_subj": ">"});
        let got = raw.api(&format!("STREAM.MSG.GET.{stream}"), wanted).await?["message"].take();
        let text = |name: &str| got[name].as_str().unwrap_or_default();
        let time = DateTime::parse_from_rfc3339(text("time"))?.timestamp_nanos_opt().context("time")?;
        let seq = got["seq"].as_u64().context("seq")?;
        let (header, payload) = (STANDARD.decode(text("hdrs"))?, STANDARD.decode(text("data"))?);
        all.push(Stored { seq, time: u64::try_from(time)?, subject: text("subject").to_owned(), header, payload });
        next = seq + 1;
    }
    Ok(all)
}

async fn consumer(raw: &mut Raw, stream: &str, name: &str) -> Result<Value> {
    raw.api(&format!("CONSUMER.INFO.{stream}.{name}"), Value::Null).await
}

async fn make_consumer(raw: &mut Raw, stream: &str, name: &str, mut config: Value) -> Result<()> {
    (config["name"], config["durable_name"]) = (name.into(), name.into());
    let body = json!({"stream_name": stream, "config": config});
    raw.api(&format!("CONSUMER.CREATE.{stream}.{name}"), body).await.map(drop)
}

async fn messages(raw: &mut Raw, stream: &str) -> Result<u64> {
    raw.stream_state(stream).await?["messages"].as_u64().context("no count")
}

async fn drained(site: &Site, stream: &str) -> Result<()> {
    let mut raw = site.source().await?;
    let mut left = 0;
    let empty = async || {
        left = messages(&mut raw, stream).await.unwrap_or(u64::MAX);
        if left == 0 { Ok(()) } else { Err(left) }
    };
    let drained = wait_while_moving("the source to be empty", LIMIT, empty).await;
    drained.with_context(|| format!("{left} messages are left"))
}

/// A source and a target, and the replication paused with its consumer made, so that nothing is forgotten.
async fn begin(site: &Site, way: DurableCase, fields: Value) -> Result<Raw> {
    let config = json!({"subjects": ["q.>"], "retention": way.retention});
    let mut raw = site.source_stream("Q", config).await?;
    if way.choria {
        let config = json!({"ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 900});
        make_consumer(&mut raw, "Q", "SR_TEST", config).await?;
    }
    if way.plain {
        site.target_stream("Q", json!({"subjects": ["q.>"]})).await?;
    }
    site.add("Q", fields).await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await?;
    steer(site, "pause").await?;
    Ok(raw)
}

/// Publishes messages, of which everything is noted.
async fn fill(raw: &mut Raw, numbers: RangeInclusive<u64>) -> Result<Vec<Stored>> {
    let first = *numbers.start();
    raw.publish_all(numbers.map(message)).await?;
    snapshot_from(raw, "Q", first).await
}

async fn prepare(site: &Site, way: DurableCase, count: u64, fields: Value) -> Result<Vec<Stored>> {
    let mut raw = begin(site, way, fields).await?;
    fill(&mut raw, 1..=count).await
}

/// The consumer of the replication has nothing more to wait for.
async fn acknowledged(raw: &mut Raw, seq: u64) -> Result<()> {
    let done = async || {
        let info = consumer(raw, "Q", "SR_TEST").await.unwrap_or_default();
        info["num_ack_pending"] == 0 && info["ack_floor"]["stream_seq"] == seq
    };
    wait_for("everything to be acknowledged", LIMIT, done).await
}

async fn steer(site: &Site, how: &str) -> Result<()> {
    let reply = site.ask(how, "Q").await?;
    ensure!(reply.error.is_none(), "{reply:?}");
    Ok(())
}

async fn resume(site: &Site) -> Result<()> {
    steer(site, "resume").await
}

/// The copy is complete and right, and the source is empty.
async fn finish(site: &Site, all: &[Stored]) -> Result<()> {
    let last = all.last().context("no messages")?.seq;
    site.settled_within("Q", last, LONG).await?;
    verify(site, "Q", all, &Expect::copy_of("Q").site(SITE)).await?;
    drained(site, "Q").await
}

async fn verify(site: &Site, to: &str, all: &[Stored], expect: &Expect<'_>) -> Result<()> {
    let copied = site.target().await?.read_stream(to).await?;
    compare(all, &copied, expect).verify().with_context(|| site.service.log())
}

async fn at_target(site: &Site) -> u64 {
    site.at_target("Q").await.unwrap_or_default()
}

/// Kills the service at random moments of one copy.
async fn twenty_kills(way: DurableCase) -> Result<()> {
    const KILLS: u64 = 20;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut site = Site::builder().args(["--instance", "one"]).start().await?;
    // Few in flight, so that the copy takes long enough to be disturbed.
    let all = prepare(&site, way, COUNT, json!({"limits": {"messages_in_flight": 500}})).await?;
    resume(&site).await?;
    for kill in 1..=KILLS {
        // At a random count in this kill's share of the copy: early, late and in between.
        let at = (COUNT * kill / (KILLS + 2)).saturating_sub(random.random_range(0..COUNT / 40));
        let goes_on = wait_for("the copy to continue", LONG, async || at_target(&site).await >= at).await;
        goes_on.with_context(|| site.service.log())?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    finish(&site, &all).await?;
    let policy = consumer(&mut site.source().await?, "Q", "SR_TEST").await?["config"]["ack_policy"].take();
    let flow = site.source.at_least(2, 14) && !way.choria;
    assert_eq!(policy, if flow { "flow_control" } else { "explicit" });
    site.events.quiet(&["gap", "source-reset", "target-reset"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_work_queue_is_copied_once_and_in_order_over_twenty_kills() -> Result<()> {
    twenty_kills(QUEUE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interest_stream_is_copied_once_over_twenty_kills() -> Result<()> {
    twenty_kills(INTEREST).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn a_work_queue_is_pipelined_once_over_twenty_kills() -> Result<()> {
    twenty_kills(DurableCase { plain: true, ..QUEUE }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn a_work_queue_of_choria_is_copied_once_over_twenty_kills() -> Result<()> {
    twenty_kills(DurableCase { choria: true, ..QUEUE }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn an_interest_stream_of_choria_is_pipelined_over_twenty_kills() -> Result<()> {
    twenty_kills(DurableCase { choria: true, plain: true, ..INTEREST }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interest_stream_keeps_messages_of_other_consumers() -> Result<()> {
    let mut site = Site::start().await?;
    let mut raw = begin(&site, INTEREST, json!({})).await?;
    make_consumer(&mut raw, "Q", "slow", json!({"ack_policy": "explicit"})).await?;
    let mut all = fill(&mut raw, 1..=2_000).await?;
    resume(&site).await?;
    site.settled("Q", 2_000).await?;
    acknowledged(&mut raw, 2_000).await?;
    // Messages there are neither copied again nor forgotten, whatever is read again.
    site.service.kill()?;
    site.service.restart().await?;
    all.extend(fill(&mut raw, 2_001..=2_100).await?);
    site.settled("Q", 2_100).await?;
    acknowledged(&mut raw, 2_100).await?;
    assert_eq!(messages(&mut raw, "Q").await?, 2_100);
    verify(&site, "Q", &all, &Expect::copy_of("Q")).await?;
    raw.api("CONSUMER.DELETE.Q.slow", Value::Null).await?;
    drained(&site, "Q").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replications_of_several_names_each_copy_everything() -> Result<()> {
    let mut site = Site::start().await?;
    let config = json!({"subjects": ["q.>"], "retention": "interest"});
    let mut raw = site.source_stream("Q", config).await?;
    for name in ["a", "b"] {
        let target = format!("Q{}", name.to_uppercase());
        site.add("Q", json!({"name": name, "target_stream": target, "target_subject_prefix": name})).await?;
        site.row_when(&format!("Q.{name}"), "runs", |row| row["state"] == "running").await?;
    }
    raw.publish_all((1..=1_000).map(message)).await?;
    site.service.kill()?;
    // Nobody takes these yet.
    raw.publish_all((1_001..=2_000).map(message)).await?;
    site.service.restart().await?;
    for (id, target) in [("Q.a", "QA"), ("Q.b", "QB")] {
        site.settled(id, 2_000).await?;
        let copied = site.target().await?.read_stream(target).await?;
        let numbers: Vec<u64> = copied.iter().map(number).collect::<Result<_>>()?;
        assert_eq!(numbers, (1..=2_000).collect::<Vec<_>>(), "{target}");
    }
    drained(&site, "Q").await
}

fn number(message: &Stored) -> Result<u64> {
    Ok(std::str::from_utf8(&message.payload)?.parse()?)
}

/// Servers are killed and stopped in the middle of one copy.
async fn servers_go(way: DurableCase) -> Result<()> {
    println!("{way:?}");
    let mut site = Site::start().await?;
    let all = prepare(&site, way, COUNT, json!({"limits": {"messages_in_flight": 500}})).await?;
    resume(&site).await?;
    for (share, what) in ["source", "target", "source", "source in order"].into_iter().enumerate() {
        let at = COUNT * (share as u64 + 1) / 6;
        wait_for("the copy to continue", LONG, async || at_target(&site).await >= at).await?;
        match what {
            "target" => {
                site.target.kill()?;
                site.target.restart().await?;
            }
            "source" => {
                site.source.kill()?;
                site.source.restart().await?;
            }
            _ => site.source.restart().await?,
        }
    }
    finish(&site, &all).await?;
    site.events.quiet(&["gap", "source-reset", "target-reset"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn servers_are_killed_in_the_copy_of_a_work_queue() -> Result<()> {
    servers_go(QUEUE).await?;
    servers_go(DurableCase { choria: true, plain: true, ..QUEUE }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn servers_are_killed_in_the_copy_of_an_interest_stream() -> Result<()> {
    servers_go(INTEREST).await?;
    servers_go(DurableCase { choria: true, ..INTEREST }).await
}

/// Connections to both sides are cut again and again.
async fn cuts(way: DurableCase) -> Result<()> {
    let site = Site::start().await?;
    let (source, target) = (Proxy::start(site.source.port()).await?, Proxy::start(site.target.port()).await?);
    let fields = json!({"limits": {"messages_in_flight": 500}, "source_url": source.url(), "target_url": target.url()});
    let all = prepare(&site, way, COUNT, fields).await?;
    resume(&site).await?;
    for cut in 1..=8 {
        let at = COUNT * cut / 10;
        wait_for("the copy to continue", LONG, async || at_target(&site).await >= at).await?;
        if cut % 2 == 0 { target.drop_connections() } else { source.drop_connections() }
    }
    finish(&site, &all).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn connections_are_cut_in_the_copy_of_a_work_queue() -> Result<()> {
    cuts(QUEUE).await?;
    cuts(DurableCase { choria: true, plain: true, ..QUEUE }).await
}

/// The stream and its consumer change their leaders.
async fn leaders_step_down(choria: bool) -> Result<()> {
    let cluster = Cluster::start(Role::Source).await?;
    let site = Site::start().await?;
    let mut raw = Raw::connect(&cluster.servers[0].url()).await?;
    let config = json!({"subjects": ["q.>"], "retention": "workqueue", "num_replicas": 3});
    raw.create_stream("Q", config).await?;
    if choria {
        make_consumer(&mut raw, "Q", "SR_TEST", json!({"ack_policy": "explicit", "max_ack_pending": 900})).await?;
    }
    raw.publish_all((1..=COUNT).map(message)).await?;
    let all = snapshot(&mut raw, "Q").await?;
    site.add("Q", json!({"source_url": cluster.url(), "limits": {"messages_in_flight": 500}})).await?;
    for step in 1..=4 {
        let at = COUNT * step / 6;
        wait_for("the copy to continue", LONG, async || at_target(&site).await >= at).await?;
        if step % 2 == 0 {
            cluster.step_down("Q").await?;
        } else {
            raw.api("CONSUMER.LEADER.STEPDOWN.Q.SR_TEST", Value::Null).await?;
        }
    }
    let settled = site.settled_within("Q", COUNT, LONG).await;
    settled.with_context(|| site.service.log())?;
    verify(&site, "Q", &all, &Expect::copy_of("Q")).await?;
    let empty = async || messages(&mut raw, "Q").await.is_ok_and(|left| left == 0);
    wait_for("the source to be empty", LONG, empty).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn leaders_step_down_in_the_copy_of_a_replicated_work_queue() -> Result<()> {
    leaders_step_down(false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn leaders_step_down_in_the_copy_with_a_consumer_of_choria() -> Result<()> {
    leaders_step_down(true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_stops_and_starts_in_order_leave_nothing_behind() -> Result<()> {
    for way in [QUEUE, DurableCase { choria: true, ..INTEREST }] {
        let mut site = Site::start().await?;
        let all = prepare(&site, way, COUNT, json!({"limits": {"messages_in_flight": 500}})).await?;
        resume(&site).await?;
        wait_for("the copy to begin", LONG, async || at_target(&site).await >= COUNT / 10).await?;
        steer(&site, "pause").await?;
        let copied = at_target(&site).await;
        ensure!(copied < COUNT, "the pause came too late to tell anything");
        assert!(consumer(&mut site.source().await?, "Q", "SR_TEST").await?["config"]["durable_name"].is_string());
        resume(&site).await?;
        wait_for("the copy to continue", LONG, async || at_target(&site).await >= COUNT / 3).await?;
        site.stop().await?;
        let stored = at_target(&site).await;
        ensure!(stored < COUNT, "the stop came too late to tell anything");
        site.service.restart().await?;
        finish(&site, &all).await?;
        // Everything that the runs before sent had been settled and saved.
        let row = site.row("Q").await.context("a row")?;
        assert_eq!(row["counters"]["copied"], COUNT - stored, "{row}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skipped_messages_are_acknowledged_filtered_ones_stay() -> Result<()> {
    for choria in [false, true] {
        let site = Site::start().await?;
        let config = json!({"subjects": ["q.>"], "retention": "workqueue"});
        let mut raw = site.source_stream("Q", config).await?;
        if choria {
            let config = json!({"ack_policy": "explicit", "filter_subject": "q.3"});
            let body = json!({"stream_name": "Q", "config": merged(config, json!({"durable_name": "SR_TEST"}))});
            raw.api("CONSUMER.DURABLE.CREATE.Q.SR_TEST", body).await?;
        }
        raw.publish_all((1..=1_100).map(message)).await?;
        let old = snapshot(&mut raw, "Q").await?;
        let age = Duration::from_secs(1);
        let last = old.last().context("messages")?.time;
        let is_old = async || Utc::now().timestamp_nanos_opt().unwrap_or(0) as u64 > last + age.as_nanos() as u64;
        wait_for("the messages to be old", LIMIT, is_old).await?;
        site.add("Q", json!({"filter_subject": "q.3", "max_age": "1s"})).await?;
        site.row_when("Q", "runs", |row| row["counters"]["skipped_old"] == 100).await?;
        raw.publish_all((1_101..=1_210).map(message)).await?;
        site.row_when("Q", "has copied the rest", |row| row["counters"]["copied"] == 10).await?;
        let left = 1_210 - 110;
        let stays = async || messages(&mut raw, "Q").await.is_ok_and(|count| count == left);
        wait_for("what was settled to be gone", LIMIT, stays).await?;
        let copied = site.target().await?.read_stream("Q").await?;
        let numbers: Vec<u64> = copied.iter().map(number).collect::<Result<_>>()?;
        assert_eq!(numbers, (1_101..=1_210).filter(|i| i % 11 == 3).collect::<Vec<_>>());
    }
    Ok(())
}

#[tokio::test]
async fn a_consumer_that_lets_one_message_wait_for_its_ack_is_enough() -> Result<()> {
    for plain in [false, true] {
        let site = Site::start().await?;
        let way = DurableCase { choria: true, plain, ..QUEUE };
        let mut raw = begin(&site, way, json!({})).await?;
        let config = json!({"ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 1});
        make_consumer(&mut raw, "Q", "SR_TEST", config).await.context("changed")?;
        let all = fill(&mut raw, 1..=300).await?;
        let (_, took) = timed(async {
            resume(&site).await?;
            site.settled("Q", 300).await
        })
        .await?;
        println!("one at a time: {:.0} messages/s, plain target: {plain}", 300.0 / took.as_secs_f64());
        finish(&site, &all).await?;
        let stays = consumer(&mut raw, "Q", "SR_TEST").await?["config"].take();
        assert_eq!((&stays["max_ack_pending"], stays.get("deliver_subject")), (&json!(1), None));
    }
    Ok(())
}

/// Another client filters our consumer, and another consumer keeps the messages that it then passes over.
#[tokio::test]
async fn messages_that_the_consumer_skipped_are_copied_in_order() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 14) {
        // Nothing can be read again there.
        return Ok(());
    }
    let mut raw = begin(&site, INTEREST, json!({})).await?;
    make_consumer(&mut raw, "Q", "OTHER", json!({"ack_policy": "explicit"})).await?;
    resume(&site).await?;
    fill(&mut raw, 1..=100).await?;
    site.settled("Q", 100).await?;
    let mut config = consumer(&mut raw, "Q", "SR_TEST").await?["config"].take();
    config["filter_subject"] = "q.3".into();
    make_consumer(&mut raw, "Q", "SR_TEST", config).await?;
    fill(&mut raw, 101..=210).await?;
    site.settled("Q", 210).await?;
    verify(&site, "Q", &snapshot(&mut raw, "Q").await?, &Expect::copy_of("Q").site(SITE)).await?;
    let row = site.row("Q").await.context("a row")?;
    let said = row["last_error"]["message"].as_str().unwrap_or_default();
    assert!(said.contains("the consumer of stream `Q` skipped sequence 101, which the stream leader has"), "{row}");
    assert!(consumer(&mut raw, "Q", "SR_TEST").await?["config"].get("filter_subject").is_none());
    Ok(())
}

/// As where a replica has expired what its leader has not: it goes a moment later.
#[tokio::test]
async fn a_skipped_message_that_is_removed_later_is_no_error() -> Result<()> {
    let site = Site::builder().args(["--log-level", "info,stream_replicator=debug"]).start().await?;
    if !site.source.at_least(2, 14) {
        // Nothing is asked there.
        return Ok(());
    }
    let mut raw = begin(&site, INTEREST, json!({})).await?;
    make_consumer(&mut raw, "Q", "OTHER", json!({"ack_policy": "explicit"})).await?;
    resume(&site).await?;
    fill(&mut raw, 1..=3).await?;
    site.settled("Q", 3).await?;
    let mut config = consumer(&mut raw, "Q", "SR_TEST").await?["config"].take();
    config["filter_subject"] = "q.5".into();
    make_consumer(&mut raw, "Q", "SR_TEST", config).await?;
    fill(&mut raw, 4..=5).await?;
    let asked = "the consumer skipped messages that the leader has: asking the leader again";
    wait_for("the leader to be asked", LIMIT, async || site.service.log().contains(asked)).await?;
    raw.api("STREAM.MSG.DELETE.Q", json!({"seq": 4, "no_erase": true})).await?;
    let row = site.settled("Q", 5).await?;
    assert_eq!((&row["counters"]["errors"], &row["last_error"]), (&json!(0), &Value::Null), "{row}");
    verify(&site, "Q", &snapshot(&mut raw, "Q").await?, &Expect::copy_of("Q").site(SITE)).await
}

#[tokio::test]
async fn what_was_deleted_at_the_source_is_passed_over_without_a_word() -> Result<()> {
    for way in [INTEREST, QUEUE, DurableCase { choria: true, ..INTEREST }] {
        let site = Site::start().await?;
        let mut raw = begin(&site, way, json!({})).await?;
        raw.publish_all((1..=1_000).map(message)).await?;
        for seq in (1..=1_000u64).filter(|seq| seq % 3 == 0) {
            raw.api("STREAM.MSG.DELETE.Q", json!({"seq": seq, "no_erase": true})).await?;
        }
        let all = snapshot(&mut raw, "Q").await?;
        assert_eq!(all.len(), 667);
        resume(&site).await?;
        finish(&site, &all).await?;
        let row = site.row("Q").await.context("a row")?;
        assert_eq!(row["counters"]["errors"], 0, "{row}");
        assert_eq!(row["last_error"], Value::Null, "{row}");
    }
    Ok(())
}

#[tokio::test]
async fn an_unusable_consumer_holds_the_replication() -> Result<()> {
    let site = Site::small().await?;
    let config = json!({"subjects": ["q.>"], "retention": "interest"});
    let mut raw = site.source_stream("Q", config).await?;
    make_consumer(&mut raw, "Q", "SR_TEST", json!({"ack_policy": "explicit", "max_deliver": 3})).await?;
    let said = site.send("config.validate", site.document("Q")).await?.body;
    assert!(said["problems"].to_string().contains("max_deliver"), "{said}");
    site.add("Q", json!({})).await?;
    let row = site.row_when("Q", "is held", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].to_string();
    ensure!(message.contains("`SR_TEST`") && message.contains("`max_deliver`"), "{message}");
    raw.api("CONSUMER.DELETE.Q.SR_TEST", Value::Null).await?;
    steer(&site, "retry").await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await.map(drop)
}

#[tokio::test]
async fn another_consumer_of_a_work_queue_holds_the_replication() -> Result<()> {
    let site = Site::small().await?;
    let config = json!({"subjects": ["q.>"], "retention": "workqueue"});
    let mut raw = site.source_stream("Q", config).await?;
    make_consumer(&mut raw, "Q", "worker", json!({"ack_policy": "explicit"})).await?;
    let said = site.send("config.validate", site.document("Q")).await?.body;
    assert!(said["problems"].to_string().contains("consumer `worker` takes"), "{said}");
    site.add("Q", json!({})).await?;
    let row = site.row_when("Q", "is held", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].to_string();
    ensure!(message.contains("gives each message to one consumer"), "{message}");
    raw.api("CONSUMER.DELETE.Q.worker", Value::Null).await?;
    steer(&site, "retry").await?;
    site.row_when("Q", "runs", |row| row["state"] == "running").await.map(drop)
}

#[tokio::test]
async fn a_work_queue_is_not_begun_in_its_middle() -> Result<()> {
    let site = Site::small().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    raw.publish_all((1..=10).map(message)).await?;
    let said = site.send("config.validate", site.document_with("Q", json!({"start_at_end": true}))).await?.body;
    assert!(said["problems"].to_string().contains("`start_at_end` would take"), "{said}");
    site.add("Q", json!({"start_at_end": true})).await?;
    let row = site.row_when("Q", "is held", |row| row["state"] == "held").await?;
    ensure!(row["last_error"]["message"].to_string().contains("`start_at_end`"), "{row}");
    assert_eq!(messages(&mut raw, "Q").await?, 10);
    Ok(())
}

#[tokio::test]
async fn an_interest_stream_starts_by_document_or_consumer() -> Result<()> {
    let site = Site::small().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "interest"})).await?;
    make_consumer(&mut raw, "Q", "other", json!({"ack_policy": "explicit"})).await?;
    raw.publish_all((1..=10).map(message)).await?;
    let middle = snapshot(&mut raw, "Q").await?[5].time;
    let middle = chrono::DateTime::from_timestamp_nanos(i64::try_from(middle)?).to_rfc3339();
    site.add("Q", json!({"start_time": middle, "name": "time", "target_stream": "T", "target_subject_prefix": "t"}))
        .await?;
    site.add("Q", json!({"start_sequence": 4, "name": "seq", "target_stream": "S", "target_subject_prefix": "s"}))
        .await?;
    make_consumer(
        &mut raw,
        "Q",
        "SR_there",
        json!({"ack_policy": "explicit", "deliver_policy": "by_start_sequence", "opt_start_seq": 9}),
    )
    .await?;
    site.add("Q", json!({"name": "there", "target_stream": "R", "target_subject_prefix": "r"})).await?;
    for (id, stream, first) in [("Q.time", "T", 6), ("Q.seq", "S", 4), ("Q.there", "R", 9)] {
        site.settled(id, 10).await?;
        let copied = site.target().await?.read_stream(stream).await?;
        let numbers: Vec<u64> = copied.iter().map(number).collect::<Result<_>>()?;
        assert_eq!(numbers, (first..=10).collect::<Vec<_>>(), "{id}");
    }
    Ok(())
}

#[tokio::test]
async fn a_position_moves_forward_only_where_the_source_forgets() -> Result<()> {
    for way in [QUEUE, DurableCase { choria: true, ..INTEREST }] {
        let site = Site::small().await?;
        let mut raw = begin(&site, way, json!({})).await?;
        fill(&mut raw, 1..=100).await?;
        resume(&site).await?;
        site.settled("Q", 100).await?;
        steer(&site, "pause").await?;
        fill(&mut raw, 101..=200).await?;
        let back = site.send("position", json!({"replication": "Q", "source_seq": 50})).await?;
        assert_eq!(back.error, Some(409), "{back:?}");
        ensure!(back.body.to_string().contains("removes copied messages"), "{back:?}");
        let forward = site.send("position", json!({"replication": "Q", "source_seq": 150})).await?;
        assert_eq!((forward.error, &forward.body["passed_over"]), (None, &json!(50)), "{forward:?}");
        resume(&site).await?;
        site.settled("Q", 200).await?;
        let copied = site.target().await?.read_stream("Q").await?;
        let numbers: Vec<u64> = copied.iter().map(number).collect::<Result<_>>()?;
        assert_eq!(numbers, (1..=100).chain(151..=200).collect::<Vec<_>>());
        drained(&site, "Q").await?;
    }
    Ok(())
}

#[tokio::test]
async fn deleting_a_replication_removes_the_consumer_that_it_made() -> Result<()> {
    for (way, keep, stays) in
        [(QUEUE, false, false), (INTEREST, true, true), (DurableCase { choria: true, ..QUEUE }, false, true)]
    {
        let site = Site::small().await?;
        let mut raw = begin(&site, way, json!({})).await?;
        let reply = site.send("config.delete", json!({"replication": "Q", "keep": keep})).await?;
        assert_eq!(reply.error, None, "{reply:?}");
        assert_eq!(consumer(&mut raw, "Q", "SR_TEST").await.is_ok(), stays, "{way:?} {keep}");
    }
    Ok(())
}

#[tokio::test]
async fn a_deletion_does_not_wait_for_a_source_that_is_away() -> Result<()> {
    let site = Site::start().await?;
    begin(&site, QUEUE, json!({})).await?;
    site.source.freeze()?;
    let (reply, took) = timed(site.send("config.delete", json!({"replication": "Q"}))).await?;
    site.source.thaw()?;
    assert_eq!(reply.error, None, "{reply:?}");
    ensure!(took < Duration::from_secs(3), "answered after {took:?}");
    let log = site.service.log();
    ensure!(log.contains("left at the source") && log.contains("SR_TEST"), "{log}");
    Ok(())
}

/// Takes everything from a stream at the target as it comes, for as long as it is polled.
async fn work_off(url: String, stream: &str, seen: &Mutex<Vec<u64>>) -> Result<()> {
    let client = connect(&url).await?;
    let stream = async_nats::jetstream::new(client).get_stream(stream).await?;
    let config =
        async_nats::jetstream::consumer::pull::Config { durable_name: Some("worker".to_owned()), ..Default::default() };
    let consumer = stream.get_or_create_consumer("worker", config).await?;
    let mut messages = consumer.messages().await?;
    while let Some(message) = messages.next().await {
        let message = message?;
        seen.lock().expect("seen").push(std::str::from_utf8(&message.payload)?.parse()?);
        message.double_ack().await.map_err(|error| anyhow!("{error}"))?;
    }
    Ok(())
}

/// A target whose messages are gone as soon as somebody has taken them.
async fn target_is_worked_off(retention: &str, batched: bool) -> Result<()> {
    const COUNT: u64 = 6_000;
    let mut site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"]})).await?;
    let mut config = json!({"subjects": ["q.>"], "retention": retention});
    if batched && site.target.at_least(2, 14) {
        config["allow_batched"] = true.into();
    }
    let mut target = site.target_stream("Q", config).await?;
    make_consumer(&mut target, "Q", "worker", json!({"ack_policy": "explicit"})).await?;
    raw.publish_all((1..=COUNT).map(message)).await?;
    let seen = Mutex::new(Vec::new());
    let count = || seen.lock().expect("seen").len() as u64;
    let (url, work) = (site.target.url(), async {
        site.add("Q", json!({"limits": {"messages_in_flight": 200}})).await?;
        for kill in 1..=4 {
            wait_for("the copy to continue", LONG, async || count() >= COUNT * kill / 6).await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        let row = site.settled_within("Q", COUNT, LONG).await?;
        assert_eq!(row["target_mode"], "shared", "{row}");
        wait_for("all to be worked off", LONG, async || count() >= COUNT).await
    });
    tokio::select! {
        ended = work_off(url, "Q", &seen) => ended.context("the worker ended")?,
        done = work => done?,
    }
    let mut seen = seen.into_inner()?;
    if !batched {
        // A refused message may come later.
        seen.sort_unstable();
    }
    assert_eq!(seen, (1..=COUNT).collect::<Vec<_>>());
    site.events.quiet(&["target-reset", "gap"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_a_work_queue_gets_each_message_once() -> Result<()> {
    target_is_worked_off("workqueue", true).await?;
    target_is_worked_off("workqueue", false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interest_target_gets_each_message_once() -> Result<()> {
    target_is_worked_off("interest", true).await?;
    target_is_worked_off("interest", false).await
}

#[tokio::test]
async fn a_target_without_interest_stores_nothing_and_its_acks_count() -> Result<()> {
    for batched in [true, false] {
        let mut site = Site::start().await?;
        let mut raw = site.source_stream("Q", json!({"subjects": ["q.>"]})).await?;
        let mut config = json!({"subjects": ["q.>"], "retention": "interest"});
        if batched && site.target.at_least(2, 14) {
            config["allow_batched"] = true.into();
        }
        site.target_stream("Q", config).await?;
        raw.publish_all((1..=3_000).map(message)).await?;
        site.add("Q", json!({})).await?;
        site.settled("Q", 3_000).await?;
        site.service.kill()?;
        site.service.restart().await?;
        raw.publish_all((3_001..=3_100).map(message)).await?;
        site.settled("Q", 3_100).await?;
        assert_eq!(at_target(&site).await, 0);
        site.events.quiet(&["target-reset", "gap", "source-reset"])?;
    }
    Ok(())
}

#[tokio::test]
async fn a_created_target_keeps_its_messages() -> Result<()> {
    let site = Site::small().await?;
    for retention in ["workqueue", "interest"] {
        let stream = retention.to_uppercase();
        let config =
            json!({"retention": retention, "max_msgs": 1_000, "discard": "new", "max_age": 3_600_000_000_000u64});
        site.source_stream(&stream, config).await?;
        site.add(&stream, json!({})).await?;
        site.row_when(&stream, "runs", |row| row["state"] == "running").await?;
        let made = site.target().await?.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take();
        assert_eq!(made["retention"], "limits", "{made}");
        // How many may wait at the source says nothing about how many to keep.
        assert_eq!((&made["max_msgs"], &made["discard"]), (&json!(-1), &json!("old")), "{made}");
        assert_eq!(made["max_age"], 3_600_000_000_000u64, "{made}");
    }
    Ok(())
}

/// For information: how fast the ways are beside a stream that keeps its messages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn a_work_queue_is_copied_without_waiting_for_each_message() -> Result<()> {
    const COUNT: u64 = 100_000;
    let mut rates = Vec::new();
    for (name, way) in [
        ("limits", DurableCase { retention: "limits", ..QUEUE }),
        ("work queue", QUEUE),
        ("interest", INTEREST),
        ("work queue with Choria's consumer", DurableCase { choria: true, ..QUEUE }),
    ] {
        let site = Site::start().await?;
        let mut raw = begin(&site, way, json!({})).await?;
        raw.publish_all((1..=COUNT).map(message)).await?;
        let copy = async {
            resume(&site).await?;
            site.settled_within("Q", COUNT, LONG).await
        };
        let (_, took) = timed(copy).await?;
        let rate = COUNT as f64 / took.as_secs_f64();
        println!("{name}: {rate:.0} messages/s of 200 bytes");
        rates.push(rate);
        if way.retention != "limits" {
            drained(&site, "Q").await?;
        }
    }
    // One at a time would be a hundredth.
    ensure!(rates.iter().all(|rate| *rate > rates[0] / 20.0), "{rates:?}");
    Ok(())
}
