//! Copies that stand still: what is recreated, how soon, and what is reported.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chrono::Utc;
use serde_json::{Value, json};

use crate::harness::client::http_get;
use crate::harness::server::free_port;
use crate::harness::{Events, Expect, Outgoing, Proxy, Raw, Role, SITE, Server, Site, wait_for, wait_value};

const STREAM: &str = "S";
const LONG: Duration = Duration::from_secs(120);
/// A backlog that takes a while with few messages in flight.
const BACKLOG: u64 = 60_000;

/// A server whose connections can be inspected.
struct Watched {
    monitor: String,
}

impl Watched {
    async fn start(role: Role) -> Result<(Server, Self)> {
        let port = free_port()?;
        let server = Server::builder(role).config(&format!("http: \"127.0.0.1:{port}\"")).start().await?;
        Ok((server, Self { monitor: format!("127.0.0.1:{port}") }))
    }

    /// The id of the copy's connection.
    async fn lane(&self) -> Result<u64> {
        let (_, body) = http_get(&self.monitor, "/connz").await?;
        let connections: Value = serde_json::from_str(&body)?;
        let list = connections["connections"].as_array().context("connections")?;
        let name = format!("stream-replicator {STREAM}");
        let mut lanes = list.iter().filter(|connection| connection["name"] == name);
        let lane = lanes.next().with_context(|| format!("no connection `{name}` in {body}"))?;
        ensure!(lanes.next().is_none(), "more than one connection `{name}` in {body}");
        lane["cid"].as_u64().context("cid")
    }
}

/// A site whose lanes can be identified, and both servers' monitors.
async fn watched() -> Result<(Site, Watched, Watched)> {
    let ((source, at_source), (target, at_target)) =
        tokio::try_join!(Watched::start(Role::Source), Watched::start(Role::Target))?;
    let site = Site::builder().on(source, target).args(["--instance", "one"]).start().await?;
    Ok((site, at_source, at_target))
}

fn message(i: u64) -> Outgoing {
    Outgoing::new(format!("s.{}", i % 11), format!("{i:0>200}"))
}

/// The consumers of our own at the source.
async fn consumers(raw: &mut Raw) -> Result<Vec<String>> {
    let names = raw.api(&format!("CONSUMER.NAMES.{STREAM}"), Value::Null).await?;
    let names = names["consumers"].as_array().cloned().unwrap_or_default();
    Ok(names.iter().filter_map(Value::as_str).filter(|name| name.starts_with("sr_")).map(str::to_owned).collect())
}

/// As somebody who tidies up: returns how many there were.
async fn delete_consumers(raw: &mut Raw) -> Result<usize> {
    let names = consumers(raw).await?;
    for name in &names {
        // It may have gone by itself meanwhile.
        let _ = raw.api(&format!("CONSUMER.DELETE.{STREAM}.{name}"), Value::Null).await;
    }
    Ok(names.len())
}

/// Steps of the stalls reported so far.
fn steps(events: &Events) -> Vec<Value> {
    events.told("stalled").into_iter().map(|event| event["step"].clone()).collect()
}

#[tokio::test]
async fn a_deleted_consumer_is_recreated_on_the_same_connection() -> Result<()> {
    let (site, at_source, at_target) = watched().await?;
    site.replicate(STREAM, 10).await?;
    site.settled(STREAM, 10).await?;
    let lanes = (at_source.lane().await?, at_target.lane().await?);
    let mut raw = site.source().await?;
    assert_eq!(delete_consumers(&mut raw).await?, 1);
    let began = Instant::now();
    site.publish(STREAM, 11..=20).await?;
    let row = site.settled(STREAM, 20).await?;
    println!("back after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!((at_source.lane().await?, at_target.lane().await?), lanes);
    let counters = &row["counters"];
    assert_eq!(counters["repairs"], json!({"consumer": 1, "connections": 0, "everything": 0}), "{row}");
    assert_eq!((&counters["errors"], &counters["consumers_recreated"]), (&json!(0), &json!(1)), "{row}");
    let error = row["last_error"]["message"].as_str().unwrap_or_default();
    assert!(error.contains("recreating the consumer of stream `S`"), "{row}");
    let stalled = site.events.ever("stalled").await?;
    assert_eq!(stalled["step"], "consumer", "{stalled}");
    assert_eq!(stalled["message"], row["last_error"]["message"]);
    site.events.ever("repaired").await?;
    assert_eq!(site.events.kinds(STREAM), ["leader", "started", "stalled", "repaired"]);
    assert_eq!(site.service.log().matches("stalled: ").count(), 1, "{}", site.service.log());
    // One, and nothing left over.
    assert_eq!(consumers(&mut raw).await?.len(), 1);
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}

/// With a backlog under way: nothing is lost, doubled or turned.
async fn deleted_again_and_again(target: Option<Value>) -> Result<()> {
    let (site, at_source, at_target) = watched().await?;
    let mut raw = site.source_stream(STREAM, json!({})).await?;
    raw.publish_all((1..=BACKLOG).map(message)).await?;
    if let Some(config) = target {
        site.target_stream(STREAM, config).await?;
    }
    site.add(STREAM, json!({"limits": {"messages_in_flight": 500}})).await?;
    let mut lanes = None;
    for share in 1..=5 {
        let far = async || site.at_target(STREAM).await.is_ok_and(|count| count >= BACKLOG * share / 7);
        wait_for("the copy to continue", LONG, far).await?;
        if lanes.is_none() {
            lanes = Some((at_source.lane().await?, at_target.lane().await?));
        }
        delete_consumers(&mut raw).await?;
    }
    let row = site.settled_within(STREAM, BACKLOG, LONG).await?;
    assert_eq!(Some((at_source.lane().await?, at_target.lane().await?)), lanes);
    let repairs = &row["counters"]["repairs"];
    assert!(repairs["consumer"].as_u64() >= Some(1), "{row}");
    assert_eq!((&row["counters"]["errors"], &repairs["connections"]), (&json!(0), &json!(0)), "{row}");
    // Five within seconds are reported once.
    assert_eq!(steps(&site.events), ["consumer"]);
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_consumers_cost_nothing_by_fast_ingest() -> Result<()> {
    deleted_again_and_again(None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_consumers_cost_nothing_pipelined() -> Result<()> {
    deleted_again_and_again(Some(json!({}))).await
}

/// A consumer that people pause gives signs of life and delivers nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_is_alive_and_delivers_nothing_is_made_anew() -> Result<()> {
    let (site, at_source, at_target) = watched().await?;
    if !site.source.at_least(2, 11) {
        return Ok(());
    }
    let mut raw = site.source_stream(STREAM, json!({})).await?;
    raw.publish_all((1..=BACKLOG).map(message)).await?;
    site.add(STREAM, json!({"limits": {"messages_in_flight": 100}})).await?;
    wait_for("the copy to begin", LONG, async || site.at_target(STREAM).await.is_ok_and(|count| count > 0)).await?;
    let lanes = (at_source.lane().await?, at_target.lane().await?);
    let until = Utc::now() + chrono::TimeDelta::hours(1);
    let paused = consumers(&mut raw).await?;
    for name in &paused {
        let body = json!({"pause_until": until.to_rfc3339()});
        raw.api(&format!("CONSUMER.PAUSE.{STREAM}.{name}"), body).await?;
    }
    ensure!(site.at_target(STREAM).await? < BACKLOG, "it was paused too late to tell anything");
    let began = Instant::now();
    let row = site.settled_within(STREAM, BACKLOG, LONG).await?;
    println!("all there {:?} after the pause", began.elapsed());
    assert_eq!(row["counters"]["repairs"], json!({"consumer": 1, "connections": 0, "everything": 0}), "{row}");
    assert_eq!((at_source.lane().await?, at_target.lane().await?), lanes);
    assert_eq!(steps(&site.events), ["consumer"]);
    site.events.ever("repaired").await?;
    assert_ne!(consumers(&mut raw).await?, paused);
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}

#[tokio::test]
async fn a_stream_made_anew_under_a_run_is_not_taken_for_the_old_one() -> Result<()> {
    let site = Site::start().await?;
    site.replicate(STREAM, 50).await?;
    site.settled(STREAM, 50).await?;
    let mut raw = site.source().await?;
    raw.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    site.source_stream(STREAM, json!({})).await?;
    site.publish(STREAM, 1..=200).await?;
    site.copied(STREAM, 250).await?;
    let reset = site.events.ever("source-reset").await?;
    assert_eq!((&reset["saved"], &reset["resumed"]), (&json!(50), &json!(0)), "{reset}");
    let stored = site.target().await?.read_stream(STREAM).await?;
    let payloads: Vec<_> =
        stored.iter().map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect();
    let expect: Vec<_> = (1..=50).chain(1..=200).map(|i: u64| i.to_string()).collect();
    assert_eq!(payloads, expect);
    Ok(())
}

#[tokio::test]
async fn a_source_that_is_silent_for_a_moment_is_no_stall() -> Result<()> {
    let site = Site::start().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    site.filled(STREAM, 10).await?;
    site.add(STREAM, json!({"source_url": proxy.url()})).await?;
    site.settled(STREAM, 10).await?;
    proxy.stall();
    site.publish(STREAM, 11..=20).await?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    proxy.resume();
    let row = site.settled(STREAM, 20).await?;
    assert_eq!(row["counters"]["repairs"], json!({"consumer": 0, "connections": 0, "everything": 0}), "{row}");
    site.events.quiet(&["stalled"])
}

/// A half-open connection and a frozen server look the same from here.
#[tokio::test]
#[ignore = "takes a minute"]
async fn a_silent_source_and_a_frozen_target_are_repaired() -> Result<()> {
    let site = Site::start().await?;
    let proxy = Proxy::start(site.source.port()).await?;
    site.filled(STREAM, 10).await?;
    site.add(STREAM, json!({"source_url": proxy.url()})).await?;
    site.settled(STREAM, 10).await?;
    let noticed = async |stalls: usize| {
        let began = Instant::now();
        let told = async || site.events.told("stalled").into_iter().nth(stalls);
        let told = wait_value("a stall to be reported", Duration::from_secs(40), told).await?;
        println!("reported after {:?}: {told}", began.elapsed());
        ensure!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
        ensure!(told["step"] == "connections", "{told}");
        anyhow::Ok(())
    };
    proxy.stall();
    site.publish(STREAM, 11..=20).await?;
    noticed(0).await?;
    proxy.resume();
    site.settled(STREAM, 20).await?;
    site.events.ever("repaired").await?;

    site.target.freeze()?;
    site.publish(STREAM, 21..=30).await?;
    noticed(1).await?;
    tokio::time::sleep(Duration::from_secs(20)).await;
    site.target.thaw()?;
    let began = Instant::now();
    site.settled(STREAM, 30).await?;
    println!("back {:?} after the thaw", began.elapsed());
    wait_for("the second repair", LONG, async || site.events.told("repaired").len() == 2).await?;
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}

/// Whoever takes the messages is not the stream: they are received, and nothing is ever confirmed.
#[tokio::test]
async fn a_target_that_never_confirms_leads_to_a_new_beginning() -> Result<()> {
    let target = Server::builder(Role::Target).config("mappings = {\"s.>\": \"elsewhere.>\"}").start().await?;
    let mut site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let swallows = async_nats::connect(site.target.url()).await?;
    let _swallowed = swallows.subscribe("elsewhere.>").await?;
    swallows.flush().await?;
    site.filled(STREAM, 10).await?;
    site.add(STREAM, json!({})).await?;
    let began = Instant::now();
    let anew = async || steps(&site.events).contains(&json!("everything")).then_some(());
    wait_value("everything to restart", LONG, anew).await?;
    println!("everything restarts after {:?}", began.elapsed());
    assert_eq!(steps(&site.events), ["connections", "everything"]);
    let row = site.row_when(STREAM, "counts it", |row| row["counters"]["repairs"]["everything"] == 1).await?;
    assert_eq!((&row["counters"]["repairs"]["consumer"], &row["counters"]["copied"]), (&json!(0), &json!(0)), "{row}");
    // Under the same lease: nobody else could do better.
    assert_eq!(row["epoch"], 1, "{row}");
    site.target.restart_with("").await?;
    site.settled_within(STREAM, 10, LONG).await?;
    site.events.ever("repaired").await?;
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}
