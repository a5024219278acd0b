//! What is shown while something is wrong: states that change only when something changed, a lag that is counted when it
//! is read, and nothing where nothing is known.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::harness::server::free_port;
use crate::harness::{LIMIT, Outgoing, SITE, Service, Site, request, wait_for, wait_value};

const STREAM: &str = "S";
const LONG: Duration = Duration::from_secs(150);
const OFTEN: Duration = Duration::from_millis(50);
const MONITOR: [&str; 2] = ["--monitor", "127.0.0.1:0"];

fn lag_seconds(row: &Value) -> Option<f64> {
    row["lag"]["seconds"].as_f64()
}

/// What was seen of a replication, each time that it was asked about.
#[derive(Default)]
struct Series(Vec<Value>);

impl Series {
    /// Asks until a row says what is expected.
    async fn until(&mut self, site: &Site, what: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
        let seen = async {
            loop {
                // There is none in the moment after it was added.
                if let Some(row) = site.row(STREAM).await {
                    self.0.push(row.clone());
                    if when(&row) {
                        return row;
                    }
                }
                sleep(OFTEN).await;
            }
        };
        timeout(LONG, seen).await.with_context(|| format!("it never {what}"))
    }

    /// States in the order in which they were seen.
    fn states(&self) -> Vec<&str> {
        let mut states: Vec<_> = self.0.iter().filter_map(|row| row["state"].as_str()).collect();
        states.dedup();
        states
    }

    /// Ages of the oldest message in the rows of a state.
    fn ages(&self, state: &str) -> Vec<Option<f64>> {
        self.0.iter().filter(|row| row["state"] == state).map(lag_seconds).collect()
    }
}

/// Every row is of the same age or older than the one before, and the last one is older by so many seconds.
fn grows(ages: &[Option<f64>], by: f64) -> Result<()> {
    let known: Vec<f64> = ages.iter().copied().collect::<Option<_>>().with_context(|| format!("unknown: {ages:?}"))?;
    ensure!(known.windows(2).all(|two| two[0] < two[1]), "it stood still: {known:?}");
    let (first, last) = (known.first().context("none")?, known.last().context("none")?);
    ensure!(last - first >= by, "from {first} to {last}");
    Ok(())
}

/// A number of the monitor's page, if it is there.
async fn metric(service: &Service, name: &str) -> Result<Option<f64>> {
    let (_, text) = service.get("/metrics").await?;
    let prefix = format!("choria_stream_replicator_replicator_{name}{{stream=\"{STREAM}\"");
    let line = text.lines().find(|line| line.starts_with(&prefix));
    Ok(line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()))
}

/// The row of each of so many instances: they all answer.
async fn rows_of_all(site: &Site, instances: usize) -> Result<Vec<Value>> {
    let inbox = site.client.new_inbox();
    let replies = site.client.subscribe(inbox.clone()).await?;
    site.client.publish_with_reply("replicator.status", inbox, STREAM.into()).await?;
    let replies = timeout(LIMIT, replies.take(instances).collect::<Vec<_>>()).await.context("not all answered")?;
    let row = |reply: &async_nats::Message| {
        let body: Value = serde_json::from_slice(&reply.payload)?;
        anyhow::Ok(body["replications"][0].clone())
    };
    replies.iter().map(row).collect()
}

/// A frozen target: connections stay, and nothing answers.
#[tokio::test]
async fn a_silent_outage_is_retrying_until_it_copies() -> Result<()> {
    let site = Site::builder().args(MONITOR).start().await?;
    site.replicate(STREAM, 10).await?;
    site.settled(STREAM, 10).await?;
    let mut series = Series::default();
    site.target.freeze()?;
    site.publish(STREAM, 11..=20).await?;
    let row = series.until(&site, "is retrying", |row| row["state"] == "retrying").await?;
    assert_eq!((&row["last_error"]["current"], &row["last_error"]["kind"]), (&json!(true), &json!("retry")), "{row}");
    assert!(row["do"].is_string(), "{row}");
    let began = metric(&site.service, "stream_lag_seconds").await?.context("a lag")?;
    let failed = row["counters"]["errors"].as_u64().context("errors")?;
    site.publish(STREAM, 21..=25).await?;
    // What came during the outage is found at the source, and agrees with its last sequence.
    let row = series.until(&site, "sees what came meanwhile", |row| row["lag"]["messages"] == 15).await?;
    assert_eq!((&row["source"]["last_seq"], &row["position"]["source_seq"]), (&json!(25), &json!(10)), "{row}");
    let again = |row: &Value| row["counters"]["errors"].as_u64() >= Some(failed + 3);
    series.until(&site, "fails three times more", again).await?;
    let now = metric(&site.service, "stream_lag_seconds").await?.context("a lag")?;
    ensure!(now > began + 2.0, "the metric stood still: {began}, {now}");
    grows(&series.ages("retrying"), 2.0)?;
    site.target.thaw()?;
    let row = series.until(&site, "has caught up", |row| row["position"]["source_seq"] == 25).await?;
    let row = if row["state"] == "running" { row } else { site.settled_within(STREAM, 25, LONG).await? };
    assert_eq!(row["last_error"]["current"], false, "{row}");
    assert_eq!(row["do"], Value::Null, "{row}");
    let states = series.states();
    ensure!(states.starts_with(&["running", "retrying"]) && !states.contains(&"starting"), "{states:?}");
    ensure!(states.iter().filter(|state| **state == "retrying").count() == 1, "{states:?}");
    Ok(())
}

/// The size of an outage that was reported: none of the copies is said to begin, and every lag grows.
#[tokio::test]
#[ignore = "takes minutes: make check-long"]
async fn two_hundred_copies_are_retrying_while_their_target_is_silent() -> Result<()> {
    const COPIES: usize = 205;
    const OUTAGE: Duration = Duration::from_secs(90);
    let site = Site::builder().args(MONITOR).start().await?;
    let mut raw = site.source().await?;
    for n in 0..COPIES {
        raw.create_stream(&format!("S{n}"), json!({"subjects": [format!("s{n}")], "storage": "memory"})).await?;
    }
    let added = stream::iter(0..COPIES).map(async |n| site.add(&format!("S{n}"), json!({})).await);
    added.buffer_unordered(8).try_collect::<Vec<_>>().await?;
    let states = async || -> BTreeMap<String, usize> {
        let reply = request(&site.client, "replicator.status", json!({"limit": COPIES})).await.unwrap_or_default();
        let rows = reply["replications"].as_array().cloned().unwrap_or_default();
        let mut counts = BTreeMap::new();
        rows.iter().for_each(|row| *counts.entry(row["state"].to_string()).or_default() += 1);
        counts
    };
    let all = async |state: &str| states().await == BTreeMap::from([(json!(state).to_string(), COPIES)]);
    // The least of all.
    let lag = async || -> Result<f64> {
        let (_, text) = site.service.get("/metrics").await?;
        let lines =
            text.lines().filter(|line| line.starts_with("choria_stream_replicator_replicator_stream_lag_seconds{"));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        ensure!(values.len() == COPIES, "{} of {COPIES} have a lag", values.len());
        Ok(values.into_iter().fold(f64::MAX, f64::min))
    };
    wait_for("all to run", LONG * 2, async || all("running").await).await?;
    site.target.freeze()?;
    raw.publish_all((0..COPIES).map(|n| Outgoing::new(format!("s{n}"), "waits"))).await?;
    wait_for("all to retry", LONG, async || all("retrying").await).await?;
    let began = lag().await?;
    let (end, mut looks) = (tokio::time::Instant::now() + OUTAGE, 0);
    while tokio::time::Instant::now() < end {
        ensure!(all("retrying").await, "look {looks}: {:?}", states().await);
        looks += 1;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let now = lag().await?;
    println!("{looks} looks, all retrying; a lag of {began:.1} s grew to {now:.1} s");
    ensure!(now - began > OUTAGE.as_secs_f64() / 2.0, "the metric stood still: {began}, {now}");
    // Not one event for each of them: a silent server is noticed within a few seconds by all.
    let (outages, singly) = (site.events.told("outage"), site.events.told("stalled"));
    let together: u64 = outages.iter().filter_map(|outage| outage["count"].as_u64()).sum();
    println!("{} outage events for {together} copies, {} of their own", outages.len(), singly.len());
    ensure!(together + singly.len() as u64 == COPIES as u64, "{together} and {} of {COPIES}", singly.len());
    ensure!(outages.len() + singly.len() <= 20, "{} and {} events", outages.len(), singly.len());
    site.target.thaw()?;
    wait_for("all to run again", LONG * 2, async || all("running").await).await
}

/// Held by one message: it is tried again every ten seconds, and nothing changes by that.
#[tokio::test]
async fn what_is_held_stays_held_while_it_is_tried_again() -> Result<()> {
    let site = Site::small().await?;
    site.target_stream(STREAM, json!({"max_msg_size": 300})).await?;
    site.filled(STREAM, 3).await?;
    let mut raw = site.source().await?;
    raw.publish_all([Outgoing::new("s.1", vec![b'x'; 1000])]).await?;
    site.publish(STREAM, 5..=6).await?;
    site.add(STREAM, json!({})).await?;
    let mut series = Series::default();
    let row = series.until(&site, "is held", |row| row["state"] == "held").await?;
    assert_eq!(row["do"], "let the target take source message 4, or skip it: `skip`", "{row}");
    let mut held = Series::default();
    let row = held.until(&site, "was tried again", |row| row["counters"]["errors"].as_u64() >= Some(3)).await?;
    assert_eq!((&row["lag"]["messages"], &row["last_error"]["current"]), (&json!(3), &json!(true)), "{row}");
    assert_eq!(held.states(), ["held"]);
    grows(&held.ages("held"), 5.0)?;
    assert_eq!(site.ask("skip", STREAM).await?.error, None);
    let row = site.settled(STREAM, 6).await?;
    assert_eq!((&row["last_error"]["current"], &row["last_error"]["source_seq"]), (&json!(false), &json!(4)), "{row}");
    // In tables only while it matters; in full, with its age and that it is over.
    let table = site.cli().ok(["status"]).await?;
    assert!(!table.contains("max_msg_size") && !table.contains("(10054)"), "{table}");
    let detail = site.cli().ok(["status", STREAM]).await?;
    assert!(detail.contains(" ago, over, hold: "), "{detail}");
    Ok(())
}

#[tokio::test]
async fn the_lag_of_a_paused_copy_grows_for_all_who_answer() -> Result<()> {
    let site = Site::builder().args(MONITOR).args(["--instance", "one"]).start().await?;
    site.replicate(STREAM, 5).await?;
    site.settled(STREAM, 5).await?;
    let two = Service::builder(&site.service_url(), SITE).instance("two").args(MONITOR).start().await?;
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    site.publish(STREAM, 6..=10).await?;
    let all_see = async || {
        let rows = rows_of_all(&site, 2).await.ok()?;
        rows.iter().all(|row| row["lag"]["messages"] == 5 && row["source"]["last_seq"] == 10).then_some(rows)
    };
    let before = wait_value("all to see what waits", LONG, all_see).await.with_context(|| two.log())?;
    let mut ages = before.iter().map(lag_seconds).collect::<Option<Vec<_>>>().context("ages")?;
    for _ in 0..3 {
        sleep(OFTEN).await;
        for row in rows_of_all(&site, 2).await? {
            let (age, newest) = (lag_seconds(&row).context("an age")?, ages.iter().copied().fold(0.0, f64::max));
            ensure!(age >= newest - 0.5 && row["state"] == "paused", "{ages:?} then {row}");
            ages.push(age);
        }
    }
    ensure!(ages.windows(3).all(|three| three[0] < three[2]), "it stood still: {ages:?}");
    // One of them knows it by itself, and the other one has no number of its own.
    let (one, two) = (metric(&site.service, "stream_lag_seconds").await?, metric(&two, "stream_lag_seconds").await?);
    ensure!(one.xor(two).is_some_and(|seconds| seconds > 0.0), "{one:?} {two:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_not_known_is_null_absent_or_a_dash() -> Result<()> {
    let mut site = Site::builder().args(MONITOR).start().await?;
    let unknown = |row: &Value| {
        let fields = ["/lag", "/source/first_seq", "/source/last_seq", "/headroom"];
        fields.iter().all(|field| row.pointer(field) == Some(&Value::Null))
    };
    let absent = async |site: &Site| {
        for name in ["stream_lag_messages", "stream_lag_seconds"] {
            ensure!(metric(&site.service, name).await?.is_none(), "{name} has a value");
        }
        anyhow::Ok(())
    };
    // No such source; it never ran.
    site.add(STREAM, json!({})).await?;
    let row = site.row_when(STREAM, "is held", |row| row["state"] == "held").await?;
    ensure!(unknown(&row) && row["target"]["last_seq"].is_null(), "{row}");
    absent(&site).await?;
    let table = site.cli().ok(["status"]).await?;
    let cells: Vec<_> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert_eq!(cells[..4], [STREAM, "held", "-", "-"], "{table}");
    assert!(site.cli().ok(["status", STREAM]).await?.contains("\n  lag         -\n"));
    // It runs, and the source goes away.
    site.filled(STREAM, 10).await?;
    site.ask("retry", STREAM).await?;
    let row = site.settled(STREAM, 10).await?;
    assert_eq!((&row["source"]["last_seq"], &row["lag"]["messages"]), (&json!(10), &json!(0)), "{row}");
    assert_eq!(metric(&site.service, "stream_lag_seconds").await?, Some(0.0));
    site.source.kill()?;
    let row = Series::default().until(&site, "ceases to know", unknown).await?;
    assert_eq!((&row["state"], &row["position"]["source_seq"]), (&json!("retrying"), &json!(10)), "{row}");
    absent(&site).await?;
    site.source.restart().await?;
    site.settled(STREAM, 10).await?;
    // The same where it is frozen.
    site.source.freeze()?;
    Series::default().until(&site, "ceases to know", unknown).await?;
    site.source.thaw()?;
    site.settled(STREAM, 10).await?;
    // And where the stream is deleted while the copy is paused.
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    site.source().await?.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    Series::default().until(&site, "ceases to know", unknown).await?;
    Ok(())
}

#[tokio::test]
async fn paused_before_it_ever_ran_nothing_is_known() -> Result<()> {
    let site = Site::builder().control_at_source().args(MONITOR).start().await?;
    let nobody = format!("nats://127.0.0.1:{}", free_port()?);
    site.add(STREAM, json!({"source_url": nobody})).await?;
    site.ask("pause", STREAM).await?;
    let row = site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    assert_eq!((&row["lag"], &row["source"]["last_seq"]), (&Value::Null, &Value::Null), "{row}");
    // What failed before the pause is not tried any more.
    ensure!(row["last_error"].is_null() || row["last_error"]["current"] == false, "{row}");
    for name in ["stream_lag_messages", "stream_lag_seconds", "stream_sequence", "target_sequence"] {
        assert_eq!(metric(&site.service, name).await?, None, "{name}");
    }
    Ok(())
}

/// Held back, while more comes all the time: whatever is known of the source is known from one check.
#[tokio::test]
async fn the_last_sequence_and_the_lag_agree() -> Result<()> {
    let site = Site::small().await?;
    site.filled(STREAM, 50).await?;
    site.add(STREAM, json!({"limits": {"messages_per_second": 40}})).await?;
    let agree = |row: &Value| {
        let of = |field| row.pointer(field).and_then(Value::as_u64).with_context(|| format!("{field} in {row}"));
        let (last, position, lag) = (of("/source/last_seq")?, of("/position/source_seq")?, of("/lag/messages")?);
        ensure!(last == position + lag, "{last} is not {position} and {lag}: {row}");
        anyhow::Ok(lag)
    };
    site.row_when(STREAM, "copies", |row| row["position"]["source_seq"].as_u64() > Some(0)).await?;
    let (mut most, mut last) = (0, 50);
    for _ in 0..20 {
        last = site.publish(STREAM, last + 1..=last + 20).await?;
        let row = site.row(STREAM).await.context("a row")?;
        most = most.max(agree(&row)?);
    }
    ensure!(most > 20, "it was never behind: {most}");
    site.ask("pause", STREAM).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    site.publish(STREAM, last + 1..=last + 7).await?;
    let row = site.row_when(STREAM, "sees all", |row| row["source"]["last_seq"] == last + 7).await?;
    agree(&row)?;
    // Moved: the messages after the new position are not known before they were counted.
    let moved = json!({"replication": STREAM, "source_seq": 0});
    assert_eq!(site.send("position", moved).await?.error, None);
    let knows = |row: &Value| row["position"]["source_seq"] == 0 && row["lag"].is_object();
    let row = Series::default().until(&site, "knows it again", knows).await?;
    agree(&row)?;
    Ok(())
}

#[tokio::test]
async fn a_wrong_document_is_an_error_until_it_is_corrected() -> Result<()> {
    let site = Site::small().await?;
    site.replicate(STREAM, 5).await?;
    site.settled(STREAM, 5).await?;
    site.put(STREAM, "{}").await?;
    let invalid = |row: &Value| row["last_error"]["kind"] == "invalid" && row["last_error"]["current"] == true;
    let row = site.row_when(STREAM, "says so", invalid).await?;
    assert_eq!(row["state"], "running", "{row}");
    // What it copies meanwhile does not correct the document.
    site.publish(STREAM, 6..=9).await?;
    let row = site.settled(STREAM, 9).await?;
    ensure!(invalid(&row) && row["do"].is_string(), "{row}");
    site.put(STREAM, site.document(STREAM).to_string()).await?;
    let row = site.row_when(STREAM, "is over it", |row| row["last_error"]["current"] == false).await?;
    assert_eq!((&row["state"], &row["do"]), (&json!("running"), &Value::Null), "{row}");
    Ok(())
}
