//! A thousand replications that have nothing to do: what they cost, and that one more touches none of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use crate::harness::client::http_get;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Service, Site, connect, timed, wait_for, wait_value};

/// What the bounds are made for.
const THOUSAND: usize = 1_000;
/// Of one core, while nothing is to copy: an optimised build may take 5 %. One without optimisation takes twice that on
/// the same machine, and a shared machine may be at half of its speed.
const IDLE_CPU: f64 = if cfg!(debug_assertions) { 0.20 } else { 0.05 };
/// Resident. Without optimisation, futures are larger.
const MEMORY: u64 = if cfg!(debug_assertions) { 240 << 20 } else { 200 << 20 };
/// Messages in a minute that a replication without anything to copy may cause at both servers, in both directions:
/// 24 heartbeats, 10 questions about the source with their answers, 2 pulls, and some for the position. The cost of
/// being idle is in them, whatever the speed of the machine.
const IDLE_MESSAGES: f64 = 60.0;
/// `status` and `config.list`, each page.
const ANSWER: Duration = Duration::from_millis(500);
/// `report`, all pages together: all streams of both sides are asked for.
const REPORT: Duration = Duration::from_secs(1);
/// All of them run within this after the start of the process.
const ALL_RUN: Duration = Duration::from_secs(60);
/// How long the CPU time is measured.
const WATCHED: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_thousand_idle_replications_are_cheap() -> Result<()> {
    let site = start().await?;
    let alone = ScaleNewcomers::add(&site, "ALONE").await?;
    fill(&site, THOUSAND).await?;
    let ((), time) = timed(all_run(&site, THOUSAND)).await?;
    println!("all run {time:?} after the last was added");
    answers_in_time(&site, THOUSAND).await?;
    one_more_touches_none(&site, &alone).await?;
    idle_messages_are_copied_at_once(&site).await?;
    costs_little(&site).await?;
    nothing_was_wrong(&site)
}

/// All at once, as after a crash. `make check-long` runs it.
#[tokio::test]
#[ignore = "takes a minute"]
async fn a_thousand_replications_start_together_and_are_cheap_again() -> Result<()> {
    let mut site = start().await?;
    fill(&site, THOUSAND).await?;
    all_run(&site, THOUSAND).await?;
    for round in 0..2 {
        site.service.kill()?;
        let ((), time) = timed(async {
            site.service.restart().await?;
            all_run(&site, THOUSAND).await
        })
        .await?;
        println!("all run {time:?} after start {round}");
        answers_in_time(&site, THOUSAND).await?;
        costs_little(&site).await?;
        idle_messages_are_copied_at_once(&site).await?;
        nothing_was_wrong(&site)?;
    }
    Ok(())
}

fn nothing_was_wrong(site: &Site) -> Result<()> {
    let log = site.service.log();
    let bad = log.lines().find(|line| ["WARN", "ERROR", "panic"].iter().any(|word| line.contains(word)));
    ensure!(bad.is_none(), "{bad:?}");
    Ok(())
}

/// Servers that tell who is connected.
async fn start() -> Result<Site> {
    let server = |role| Server::builder(role).config("http: \"127.0.0.1:-1\"").start();
    let (source, target) = tokio::try_join!(server(Role::Source), server(Role::Target))?;
    Site::builder().on(source, target).start().await
}

pub(super) fn stream_name(index: usize) -> String {
    format!("IDLE{index:04}")
}

/// So many streams, and a replication of each.
pub(super) async fn fill(site: &Site, count: usize) -> Result<()> {
    let (_, made) = timed(async {
        let mut source = site.source().await?;
        for index in 0..count {
            create(&mut source, &stream_name(index)).await?;
        }
        Ok(())
    })
    .await?;
    let (_, added) = timed(async {
        let indices = stream::iter((0..count).map(Ok));
        indices.try_for_each_concurrent(32, async |index| site.add(&stream_name(index), json!({})).await).await
    })
    .await?;
    println!("{count} streams made in {made:?}, replications added in {added:?}");
    Ok(())
}

async fn create(raw: &mut Raw, stream: &str) -> Result<()> {
    let subject = format!("{}.>", stream.to_lowercase());
    raw.create_stream(stream, json!({"subjects": [subject], "storage": "memory"})).await?;
    Ok(())
}

pub(super) async fn all_run(site: &Site, count: usize) -> Result<()> {
    wait_value("all to run", ALL_RUN, async || {
        let rows = pages(site, "status").await.ok()?.0;
        (rows.len() >= count && rows.iter().all(|row| row["state"] == "running")).then_some(())
    })
    .await
}

/// All rows, and the time that the slowest page took.
async fn pages(site: &Site, endpoint: &str) -> Result<(Vec<Value>, Duration)> {
    let (mut rows, mut slowest) = (Vec::new(), Duration::ZERO);
    loop {
        let asked = site.send(endpoint, json!({"offset": rows.len()}));
        let (reply, time) = timed(asked).await?;
        slowest = slowest.max(time);
        let page = reply.body["replications"].as_array().with_context(|| format!("{reply:?}"))?;
        rows.extend(page.iter().cloned());
        if page.is_empty() || reply.body["total"] == rows.len() {
            return Ok((rows, slowest));
        }
    }
}

async fn costs_little(site: &Site) -> Result<()> {
    // What the start left to do is over: positions are saved, buffers are given back.
    let quiet = async || {
        let before = site.service.usage().cpu_seconds;
        tokio::time::sleep(Duration::from_secs(1)).await;
        site.service.usage().cpu_seconds - before < IDLE_CPU
    };
    wait_for("the start to be over", LIMIT, quiet).await?;
    // What else runs on the machine makes the same work dearer, never cheaper: the least counts.
    let mut least = f64::INFINITY;
    for _ in 0..6 {
        let begun = Instant::now();
        let before = site.service.usage().cpu_seconds;
        tokio::time::sleep(WATCHED).await;
        least = least.min((site.service.usage().cpu_seconds - before) / begun.elapsed().as_secs_f64());
        if least < IDLE_CPU {
            break;
        }
    }
    let after = site.service.usage();
    let rate = messages_a_minute(site).await? / THOUSAND as f64;
    println!(
        "idle: {:.2} % of a core, {rate:.1} messages a minute each, {} MiB resident, at most {} MiB so far",
        least * 100.0,
        after.rss >> 20,
        after.rss_peak >> 20
    );
    ensure!(least < IDLE_CPU, "{least} of a core");
    ensure!(rate < IDLE_MESSAGES, "{rate} messages a minute");
    ensure!(after.rss < MEMORY && after.rss_peak < MEMORY, "{after:?}");
    Ok(())
}

/// What all clients of both servers send and get in a minute.
async fn messages_a_minute(site: &Site) -> Result<f64> {
    let count = async || {
        let mut all = 0;
        for server in [&site.source, &site.target] {
            let (_, body) = http_get(&monitor(server)?, "/varz").await?;
            let varz: Value = serde_json::from_str(&body)?;
            all +=
                varz["in_msgs"].as_u64().context("no in_msgs")? + varz["out_msgs"].as_u64().context("no out_msgs")?;
        }
        anyhow::Ok(all)
    };
    let (before, begun) = (count().await?, Instant::now());
    tokio::time::sleep(WATCHED).await;
    Ok((count().await? - before) as f64 * 60.0 / begun.elapsed().as_secs_f64())
}

/// Host and port at which a server tells who is connected.
fn monitor(server: &Server) -> Result<String> {
    let log = server.log();
    let line = log.lines().find(|line| line.contains("http monitor on ")).context("no monitor")?;
    Ok(line.rsplit(' ').next().context("no address")?.to_owned())
}

/// What else runs on the machine makes answers later, never earlier: one pass in time is enough.
async fn answers_in_time(site: &Site, count: usize) -> Result<()> {
    for endpoint in ["status", "config.list"] {
        wait_value(&format!("{endpoint} to answer within {ANSWER:?}"), LIMIT, async || {
            let (rows, slowest) = pages(site, endpoint).await.ok()?;
            println!("{endpoint}: {} rows, slowest page {slowest:?}", rows.len());
            (rows.len() >= count && slowest < ANSWER).then_some(())
        })
        .await?;
    }
    wait_value(&format!("a report within {REPORT:?}"), LIMIT, async || {
        let (streams, time) = timed(reported(site)).await.ok()?;
        println!("report: {streams} streams in {time:?}");
        (streams >= 2 * count && time < REPORT).then_some(())
    })
    .await
}

/// How many streams the pages of a report show, each with its figures.
async fn reported(site: &Site) -> Result<usize> {
    let (mut streams, mut replications) = (0, 0);
    loop {
        let page = site.send("report", json!({"offset": replications})).await?.body;
        let rows = page["streams"].as_array().with_context(|| format!("{page}"))?;
        ensure!(rows.iter().all(|row| row["messages"].is_u64()), "{page:#}");
        streams += rows.len();
        let shown = page["replications"].as_array().map_or(0, Vec::len);
        replications += shown;
        if shown == 0 || page["total"] == replications {
            return Ok(streams);
        }
    }
}

/// Replications that are added, and how long each takes to copy its first message.
struct ScaleNewcomers {
    median: Duration,
}

impl ScaleNewcomers {
    const COUNT: usize = 7;

    async fn add(site: &Site, name: &str) -> Result<Self> {
        let mut times = Vec::new();
        for index in 0..Self::COUNT {
            let stream = format!("{name}{index}");
            let mut source = site.source().await?;
            create(&mut source, &stream).await?;
            source.publish(&Outgoing::new(format!("{}.x", stream.to_lowercase()), "first")).await?;
            let arrival = ScaleArrival::watch(site, &stream).await?;
            let begun = Instant::now();
            site.add(&stream, json!({})).await?;
            arrival.wait().await?;
            times.push(begun.elapsed());
        }
        let median = median(times);
        println!("{name}: the first message is there {median:?} after the request");
        Ok(Self { median })
    }
}

/// The first message of a stream on its way into the target.
struct ScaleArrival {
    messages: async_nats::Subscriber,
    /// Keeps the subscription.
    _client: async_nats::Client,
}

impl ScaleArrival {
    async fn watch(site: &Site, stream: &str) -> Result<Self> {
        let client = connect(&site.target.url()).await?;
        let messages = client.subscribe(format!("{}.>", stream.to_lowercase())).await?;
        // What comes back on the same connection says that the server knows of the subscription.
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        client.publish(inbox, "".into()).await?;
        tokio::time::timeout(LIMIT, answers.next()).await?.context("no answer")?;
        Ok(Self { messages, _client: client })
    }

    async fn wait(mut self) -> Result<()> {
        tokio::time::timeout(LIMIT, self.messages.next()).await?.context("no message")?;
        Ok(())
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

async fn one_more_touches_none(site: &Site, alone: &ScaleNewcomers) -> Result<()> {
    let (rows, connections) = (quiet_rows(site).await?, connections(site).await?);
    ensure!(connections.len() >= 2 * THOUSAND, "{} connections", connections.len());
    let crowded = ScaleNewcomers::add(site, "CROWDED").await?;
    ensure!(
        crowded.median < alone.median * 2 + Duration::from_millis(100),
        "{:?} instead of {:?}",
        crowded.median,
        alone.median
    );
    let rows_after = quiet_rows(site).await?;
    for (id, row) in &rows {
        ensure!(rows_after.get(id) == Some(row), "`{id}` was {row} and is {:?}", rows_after.get(id));
    }
    let connections_after = self::connections(site).await?;
    for connection in &connections {
        ensure!(connections_after.contains_key(connection.0), "{connection:?} is gone");
    }
    Ok(())
}

/// What must not change of a replication that nothing happens to.
async fn quiet_rows(site: &Site) -> Result<BTreeMap<String, Value>> {
    let rows = pages(site, "status").await?.0.into_iter();
    let keep = |row: Value| {
        let fields = ["state", "leader", "epoch", "config_revision", "position", "counters", "last_error"];
        let kept: Vec<_> = fields.iter().map(|field| row[field].clone()).collect();
        (row["replication"].as_str().unwrap_or_default().to_owned(), Value::Array(kept))
    };
    Ok(rows.map(keep).collect())
}

/// Server and number of each connection of a copy.
async fn connections(site: &Site) -> Result<BTreeMap<(String, u64), String>> {
    let mut found = BTreeMap::new();
    for server in [&site.source, &site.target] {
        let (_, body) = http_get(&monitor(server)?, "/connz?limit=10000").await?;
        let connz: Value = serde_json::from_str(&body)?;
        for connection in connz["connections"].as_array().context("no connections")? {
            let name = connection["name"].as_str().unwrap_or_default();
            if name.starts_with("stream-replicator ") {
                let number = connection["cid"].as_u64().context("no cid")?;
                found.insert((server.name().to_owned(), number), name.to_owned());
            }
        }
    }
    Ok(found)
}

async fn idle_messages_are_copied_at_once(site: &Site) -> Result<()> {
    let mut source = site.source().await?;
    let mut times = Vec::new();
    for index in (0..THOUSAND).step_by(THOUSAND / 25) {
        let stream = stream_name(index);
        let arrival = ScaleArrival::watch(site, &stream).await?;
        let begun = Instant::now();
        source.publish(&Outgoing::new(format!("{}.x", stream.to_lowercase()), "late")).await?;
        arrival.wait().await?;
        times.push(begun.elapsed());
    }
    let slowest = times.iter().max().copied().unwrap_or_default();
    let median = median(times);
    println!("a message on an idle replication arrives after {median:?}, at most {slowest:?}");
    ensure!(median < Duration::from_millis(50), "{median:?}");
    Ok(())
}

/// Soft and hard limit of the files that a process may open.
fn open_files(service: &Service) -> Result<(u64, u64)> {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", service.pid().context("no pid")?))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("no limit")?;
    let mut numbers = line.split_whitespace().map_while(|number| number.parse().ok());
    Ok((numbers.next().context("no soft limit")?, numbers.next().context("no hard limit")?))
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised_or_reported() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let service = Service::builder(&control.url(), "TEST").ulimit("-S -n 128").start().await?;
    let (soft, hard) = open_files(&service)?;
    ensure!(soft == hard && soft > 128, "{soft} of {hard}");
    ensure!(!service.log().contains("ulimit"), "{}", service.log());
    drop(service);

    let bucket = async_nats::jetstream::new(connect(&control.url()).await?).get_key_value("REPLICATOR_CONFIG").await?;
    for index in 0..50 {
        let (stream, url) = (stream_name(index), control.url());
        let document = json!({"stream": stream, "source_url": url, "target_url": url, "target_stream": "COPY"});
        bucket.put(stream, document.to_string().into()).await?;
    }
    let service = Service::builder(&control.url(), "TEST").ulimit("-n 128").start().await?;
    let told = async || service.log().contains("raise `ulimit -n` limit=128 needed=132 replications=50");
    wait_for("the log to tell", LIMIT, told).await
}
