//! Sampling per sender: which messages are copied, which advisories follow, and what is known after crashes and takeovers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::harness::raw::{Stored, header_values};
use crate::harness::site::merged;
use crate::harness::{LIMIT, Outgoing, Raw, Role, SITE, Server, Service, Site, request, wait_for, wait_value, wire};

const STATE: &str = "REPLICATOR_STATE";

fn by_field(fields: Value) -> Value {
    merged(json!({"inspect_field": "sender", "inspect_duration": "1h"}), fields)
}

fn report(sender: &str, number: u64) -> Outgoing {
    Outgoing::new("nodes.report", json!({"sender": sender, "number": number}).to_string())
}

async fn site(fields: Value) -> Result<Site> {
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", fields).await?;
    Ok(site)
}

/// Source sequences of the messages at the target, in its order.
async fn copied(site: &Site) -> Result<Vec<u64>> {
    let stored = site.target().await?.read_stream("NODES").await?;
    stored.iter().map(source_seq).collect()
}

fn source_seq(stored: &Stored) -> Result<u64> {
    let values = header_values(&stored.header, "Choria-SR-Source");
    let seq = values.last().and_then(|value| value.split(' ').nth(1)).context("provenance")?;
    Ok(seq.parse()?)
}

async fn publish(site: &Site, messages: impl IntoIterator<Item = Outgoing>) -> Result<u64> {
    site.source().await?.publish_all(messages).await
}

async fn record(site: &Site, key: &str) -> Result<Option<Value>> {
    let stored = site.bucket(STATE).await?.get(key).await?;
    Ok(stored.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
}

/// Waits until the record of a sender says what is expected.
async fn record_when(site: &Site, key: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
    let what = format!("the record {key}");
    wait_value(&what, LIMIT, async || record(site, key).await.ok().flatten().filter(|record| when(record))).await
}

#[tokio::test]
async fn each_sender_is_copied_by_interval_and_at_changes() -> Result<()> {
    let site = site(by_field(json!({"size_trigger": 100, "inspect_force_field": "now"}))).await?;
    let message = |body: Value| Outgoing::new("nodes.report", body.to_string());
    let last = publish(
        &site,
        [
            report("n1", 1),                                          // 1 new
            report("n2", 2),                                          // 2 new
            report("n1", 3),                                          // 3
            message(json!({"sender": "n1", "pad": "x".repeat(120)})), // 4 larger
            message(json!({"sender": "n1", "pad": "x".repeat(130)})), // 5
            report("n1", 6),                                          // 6 smaller again
            message(json!({"sender": "n1", "now": true})),            // 7 says so
            message(json!({"sender": "n1", "now": "true"})),          // 8
            message(json!({"sender": 7})),                            // 9 a number
            message(json!({"sender": 7})),                            // 10
            message(json!({"sender": null})),                         // 11 nobody
            message(json!({"other": "n1"})),                          // 12 nobody
            Outgoing::new("nodes.report", "not json"),                // 13 nobody
            message(json!({"sender": {"a": 1}})),                     // 14 nobody
            message(json!({"sender": ""})),                           // 15 nobody
            message(json!({"sender": "x".repeat(1025)})),             // 16 nobody
            report("n2", 17),                                         // 17
        ],
    )
    .await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!(copied(&site).await?, [1, 2, 4, 6, 7, 9, 11, 12, 13, 14, 15, 16], "{row}");
    assert_eq!((&row["counters"]["skipped_sampled"], &row["counters"]["copied"]), (&json!(5), &json!(12)));
    let sampling = &row["sampling"];
    assert_eq!((&sampling["senders"], &sampling["without_sender"]), (&json!(3), &json!(6)), "{row}");
    assert_eq!(sampling["forced"], 1);

    let record = record_when(&site, "NODES.n1", |record| record["sequence"] == 7).await?;
    assert_eq!((&record["sender"], &record["advised"], &record["version"]), (&json!("n1"), &json!(false), &json!(1)));
    let size = json!({"sender": "n1", "now": true}).to_string().len();
    assert_eq!(record["size"], size);
    assert!(record["seen"].as_str() >= record["copied"].as_str(), "{record}");

    let (_, metrics) = site.service.get("/metrics").await?;
    for line in [
        r#"tracker_total_items{stream="NODES",replicator="TEST",worker="TEST"} 3"#,
        r#"limiter_messages_without_limit_field_count{limiter="memory",stream="SR_TEST",replicator="TEST"} 6"#,
        r#"limiter_messages_copy_forced_count{limiter="memory",stream="SR_TEST",replicator="TEST"} 1"#,
    ] {
        assert!(metrics.contains(&format!("\nchoria_stream_replicator_{line}\n")), "{line}\n{metrics}");
    }
    Ok(())
}

#[tokio::test]
async fn senders_are_identified_by_header_or_subject_token() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    let odd = ["n1.example.net", "a b*c>", "\u{e9}\u{1f600}", &"long.".repeat(200), "=", "..."];
    for (name, mode) in [
        ("field", json!({"inspect_field": "sender"})),
        ("header", json!({"inspect_header": "Choria-Identity"})),
        ("token", json!({"inspect_subject_token": 2})),
        ("subject", json!({"inspect_subject_token": -1})),
    ] {
        let stream = name.to_uppercase();
        let mut raw = site.source_stream(&stream, json!({})).await?;
        site.add(&stream, merged(json!({"inspect_duration": "1h"}), mode)).await?;
        let mut messages = Vec::new();
        for _ in 0..2 {
            for (number, sender) in odd.iter().enumerate() {
                let subject = format!("{name}.t{number}.x");
                let message = Outgoing::new(subject, json!({"sender": sender}).to_string());
                messages.push(message.with_lines(&[&format!("Choria-Identity: {sender}")]));
            }
        }
        let last = raw.publish_all(messages).await?;
        let row = site.settled(&stream, last).await?;
        assert_eq!(row["counters"]["copied"], odd.len(), "{name} {row}");
        assert_eq!(row["counters"]["skipped_sampled"], odd.len(), "{name} {row}");
        let reply = request(&site.client, "replicator.senders", json!({"replication": stream})).await?;
        assert_eq!(reply["total"], odd.len(), "{reply}");
    }
    let shown = request(&site.client, "replicator.senders", json!("FIELD")).await;
    ensure!(shown.is_err(), "a JSON string is no id");
    let reply = request(&site.client, "replicator.senders", json!({"replication": "FIELD", "value": "^n1\\."})).await?;
    assert_eq!(reply["senders"][0]["sender"], "n1.example.net", "{reply}");
    // What is in the bucket is what is known.
    let bucket = site.bucket(STATE).await?;
    let names = wait_value("all records", LIMIT, async || {
        let mut names = BTreeSet::new();
        let mut keys = futures_util::StreamExt::boxed(bucket.keys().await.ok()?);
        while let Some(Ok(key)) = futures_util::StreamExt::next(&mut keys).await {
            if key.starts_with("FIELD.") {
                let value: Value = serde_json::from_slice(&bucket.get(&key).await.ok()??).ok()?;
                names.insert(value["sender"].as_str()?.to_owned());
            }
        }
        (names.len() == odd.len()).then_some(names)
    });
    // All but the long one as they are.
    let (long, names): (Vec<_>, Vec<_>) = names.await?.into_iter().partition(|name| name.len() > 100);
    let odd: BTreeSet<_> = odd.iter().filter(|sender| sender.len() < 100).map(|&sender| sender.to_owned()).collect();
    assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), odd);
    assert!(long.len() == 1 && long[0].starts_with("long.long.") && long[0].len() < 256, "{long:?}");
    Ok(())
}

#[tokio::test]
async fn senders_are_listed_newest_first_and_in_pages() -> Result<()> {
    let site = site(by_field(json!({}))).await?;
    let last = publish(&site, (1..=2_500).map(|number| report(&format!("n{number:04}"), number))).await?;
    site.settled("NODES", last).await?;
    let ask = async |body: Value| {
        request(&site.client, "replicator.senders", merged(json!({"replication": "NODES"}), body)).await
    };
    let first = ask(json!({})).await?;
    assert_eq!((&first["total"], &first["limit"]), (&json!(2_500), &json!(1_000)));
    let names = |reply: &Value| -> Vec<String> {
        let rows = reply["senders"].as_array().cloned().unwrap_or_default();
        rows.iter().filter_map(|row| row["sender"].as_str().map(str::to_owned)).collect()
    };
    // As texts they have more or fewer digits.
    let time = |row: &Value| chrono::DateTime::parse_from_rfc3339(row["seen"].as_str().unwrap_or_default());
    let seen: Vec<_> = first["senders"].as_array().context("rows")?.iter().map(time).collect::<Result<_, _>>()?;
    assert!(seen.is_sorted_by(|a, b| a >= b), "newest first");
    let mut all = BTreeSet::new();
    while all.len() < 2_500 {
        let page = names(&ask(json!({"offset": all.len()})).await?);
        ensure!(!page.is_empty(), "page at {}", all.len());
        all.extend(page);
    }
    assert_eq!(names(&ask(json!({"value": "n000[12]", "limit": 5})).await?).len(), 2);
    assert_eq!(ask(json!({"since": "1h"})).await?["total"], 2_500);
    assert_eq!(ask(json!({"since": "2100-01-01T00:00:00Z"})).await?["total"], 0);
    assert_eq!(ask(json!({"advised": true})).await?["total"], 0);
    assert_eq!(ask(json!({"advised": false})).await?["total"], 2_500);
    for (body, words) in [(json!({"value": "("}), "regular expression"), (json!({"since": "soon"}), "`since`")] {
        let error = ask(body).await.expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
    }
    let error = request(&site.client, "replicator.senders", json!({"replication": "NONE"})).await;
    assert!(error.expect_err("refused").to_string().contains("does not exist"));
    site.source_stream("PLAIN", json!({})).await?;
    site.add("PLAIN", json!({})).await?;
    let error = wait_value("the refusal", LIMIT, async || {
        let asked = request(&site.client, "replicator.senders", json!({"replication": "PLAIN"})).await;
        asked.err().map(|error| error.to_string()).filter(|error| error.contains("is not sampled"))
    });
    error.await?;
    Ok(())
}

/// Advisories as a stream stored them: kind, sender, id.
async fn advisories(site: &Site) -> Result<Vec<(String, String, Value)>> {
    let stored = site.source().await?.read_stream("ADVISORIES").await?;
    let mut found = Vec::new();
    for message in stored {
        let body: Value = serde_json::from_slice(&message.payload)?;
        let text = |field: &str| body[field].as_str().unwrap_or_default().to_owned();
        assert_eq!(header_values(&message.header, "Nats-Msg-Id"), [text("event_id")]);
        assert_eq!(message.subject, format!("advisories.{}.{}", text("event"), text("value")));
        found.push((text("event"), text("value"), body));
    }
    Ok(found)
}

fn told(fields: Value) -> Value {
    let advisory = json!({"subject": "advisories.%s.%v", "reliable": true});
    by_field(merged(json!({"advisory": advisory}), fields))
}

async fn advised_site(fields: Value) -> Result<Site> {
    advised(Site::builder().control_at_source().start().await?, fields).await
}

/// With a stream for advisories and a replication that tells them.
async fn advised(site: Site, fields: Value) -> Result<Site> {
    site.source_stream("ADVISORIES", json!({})).await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", told(fields)).await?;
    Ok(site)
}

async fn advisory(site: &Site, kind: &str, sender: &str) -> Result<Value> {
    let what = format!("{kind} of {sender}");
    let found = async || {
        let all = advisories(site).await.ok()?;
        all.into_iter().find(|(is, of, _)| is == kind && of == sender).map(|(_, _, body)| body)
    };
    wait_value(&what, LIMIT, found).await.with_context(|| site.service.log())
}

/// A sender that reports all the time.
struct Reporting {
    stop: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Reporting {
    fn start(site: &Site, sender: &'static str) -> Self {
        let (url, stop) = (site.source.url(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut raw = Raw::connect(&url).await?;
            for number in 2.. {
                if stopped.is_cancelled() {
                    break;
                }
                raw.publish(&report(sender, number)).await?;
                sleep(Duration::from_millis(200)).await;
            }
            Ok(())
        });
        Self { stop, task }
    }

    async fn end(self) -> Result<()> {
        self.stop.cancel();
        self.task.await?
    }
}

/// The consumer of a run that begins where the source has removed messages counts these as delivered, and none of them arrives: it
/// has no more to deliver all the same, and the senders are silent.
#[tokio::test]
async fn all_senders_are_missed_behind_a_purge() -> Result<()> {
    let fields = json!({"inspect_duration": "1h", "warn_duration": "2s", "filter_subjects": ["nodes.report"]});
    let mut site = advised_site(fields).await?;
    publish(&site, [report("quiet", 1)]).await?;
    advisory(&site, "new", "quiet").await?;
    site.service.kill()?;
    publish(&site, (0..500).map(|number| Outgoing::new("nodes.other", number.to_string()))).await?;
    site.source().await?.api("STREAM.PURGE.NODES", json!({"seq": 400})).await?;
    site.service.restart().await?;
    advisory(&site, "timeout", "quiet").await?;
    Ok(())
}

#[tokio::test]
async fn senders_that_come_go_and_return_are_told_of_once() -> Result<()> {
    let site = advised_site(json!({"inspect_duration": "10s", "warn_duration": "2s"})).await?;
    publish(&site, [report("stays", 1), report("returns", 1), report("goes", 1)]).await?;
    let schema: Value = serde_json::from_slice(&std::fs::read(wire::folder().join("age_advisory.json"))?)?;
    let schema = jsonschema::validator_for(&schema)?;
    for sender in ["stays", "returns", "goes"] {
        let body = advisory(&site, "new", sender).await?;
        assert!(schema.is_valid(&body), "{body}");
        assert_eq!((&body["protocol"], &body["age"]), (&json!("io.choria.sr.v2.age_advisory"), &json!(0)));
        assert_eq!((&body["inspect_field"], &body["replicator"]), (&json!("sender"), &json!(SITE)));
        assert_eq!(body["seen"], body["timestamp"]);
    }
    // One sender reports all the time, until there are advisories for the others.
    let reporting = Reporting::start(&site, "stays");
    let timeout = advisory(&site, "timeout", "returns").await?;
    assert_eq!(timeout["age"], 2, "{timeout}");
    let goes = record_when(&site, "NODES.goes", |record| record["advised"] == true).await?;
    assert_eq!(goes.get("pending"), None, "{goes}");
    let reply = request(&site.client, "replicator.senders", json!({"replication": "NODES", "advised": true})).await?;
    assert_eq!(reply["total"], 2, "{reply}");
    publish(&site, [report("returns", 2)]).await?;
    let recover = advisory(&site, "recover", "returns").await?;
    assert!(recover["age"].as_i64().is_some_and(|age| (2..10).contains(&age)), "{recover}");
    let expire = advisory(&site, "expire", "goes").await?;
    assert_eq!((&expire["age"], &expire["seen"]), (&json!(10), &timeout["seen"]), "{expire}");
    wait_for("the record of the one that went to go", LIMIT, async || {
        record(&site, "NODES.goes").await.is_ok_and(|record| record.is_none())
    })
    .await?;
    publish(&site, [report("goes", 2)]).await?;
    wait_for("it to be new again", LIMIT, async || {
        let all = advisories(&site).await.unwrap_or_default();
        all.iter().filter(|(kind, sender, _)| kind == "new" && sender == "goes").count() == 2
    })
    .await?;
    reporting.end().await?;
    let mut of: HashMap<String, Vec<String>> = HashMap::new();
    for (kind, sender, _) in advisories(&site).await? {
        of.entry(sender).or_default().push(kind);
    }
    assert_eq!(of["goes"][..4], ["new", "timeout", "expire", "new"]);
    assert_eq!(of["returns"][..3], ["new", "timeout", "recover"]);
    site.row_when("NODES", "counts them", |row| row["sampling"]["advised"]["new"].as_u64() >= Some(4)).await?;
    Ok(())
}

#[tokio::test]
async fn a_reliable_advisory_waits_for_its_stream_also_over_a_restart() -> Result<()> {
    let mut site = Site::builder().control_at_source().start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", told(json!({}))).await?;
    let last = publish(&site, (1..=50).map(|number| report(&format!("n{number}"), number))).await?;
    site.settled("NODES", last).await?;
    let waits = |row: &Value| {
        row["sampling"]["advisories_waiting"] == 50 && row["sampling"]["advisory_errors"]["new"].as_u64() > Some(0)
    };
    site.row_when("NODES", "has advisories that wait", waits).await?;
    let pending = record_when(&site, "NODES.n7", |record| record["pending"][0]["event"] == "new").await?;
    assert_eq!(pending["advised"], false);
    site.service.kill()?;
    site.service.restart().await?;
    site.row_when("NODES", "still has them", |row| row["sampling"]["advisories_waiting"] == 50).await?;
    site.source_stream("ADVISORIES", json!({})).await?;
    site.row_when("NODES", "has published", |row| row["sampling"]["advisories_waiting"] == 0).await?;
    let all = advisories(&site).await?;
    let senders: BTreeSet<_> = all.iter().map(|(_, sender, _)| sender).collect();
    assert_eq!((all.len(), senders.len()), (50, 50));
    record_when(&site, "NODES.n7", |record| record.get("pending").is_none()).await?;
    Ok(())
}

#[tokio::test]
async fn an_advisory_that_no_stream_takes_is_in_nobodys_way() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    let mut raw = site.source_stream("ADVISORIES", json!({"subjects": ["advisories.*.taken.>"]})).await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", told(json!({}))).await?;
    let senders = |kind: &'static str| (0..300u64).map(move |number| report(&format!("{kind}.{number}"), number));
    publish(&site, senders("lost").chain(senders("taken"))).await?;
    let taken = |row: &Value| row["sampling"]["advised"]["new"] == 300 && row["sampling"]["advisories_waiting"] == 300;
    site.row_when("NODES", "has published what is taken", taken).await?;
    let refused = site.row("NODES").await.context("a row")?["sampling"]["advisory_errors"]["new"].as_u64();
    let again = |row: &Value| row["sampling"]["advisory_errors"]["new"].as_u64() > refused.map(|count| count + 300);
    let row = site.row_when("NODES", "has tried again", again).await?;
    assert!(taken(&row), "{row}");
    raw.api("STREAM.UPDATE.ADVISORIES", json!({"name": "ADVISORIES", "subjects": ["advisories.>"]})).await?;
    let row = site.row_when("NODES", "has published all", |row| row["sampling"]["advisories_waiting"] == 0).await?;
    assert_eq!(row["sampling"]["advised"]["new"], 600, "{row}");
    assert_eq!(advisories(&site).await?.len(), 600);
    assert_eq!(site.service.log().matches("advisories are refused").count(), 1);
    Ok(())
}

#[tokio::test]
async fn a_standby_publishes_unconfirmed_advisories() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one", "--lease-ttl", "2s"]);
    let mut site = site.start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", by_field(json!({}))).await?;
    let service = Service::builder(&site.control().url(), SITE).instance("two").args(["--lease-ttl", "2s"]);
    let _two = service.start().await?;
    let stands_by =
        async || site.cli().run(["instances", "--json"]).await.is_ok_and(|it| it.stdout.contains("\"two\""));
    wait_for("the second one to be known", LIMIT, stands_by).await?;
    let last = publish(&site, [report("n0", 0)]).await?;
    site.settled("NODES", last).await?;
    request(&site.client, "replicator.config.update", site.document_with("NODES", told(json!({})))).await?;
    site.row_when("NODES", "follows the update", |row| row["config_revision"] == 3 && row["state"] == "running")
        .await?;
    publish(&site, (1..=20).map(|number| report(&format!("n{number}"), number))).await?;
    let waits = |row: &Value| row["sampling"]["advisories_waiting"] == 20;
    site.row_when("NODES", "has advisories that wait", waits).await?;
    record_when(&site, "NODES.n20", |record| record["pending"][0]["event"] == "new").await?;
    site.service.kill()?;
    site.source_stream("ADVISORIES", json!({})).await?;
    let led = |row: &Value| row["leader"] == "two" && row["state"] == "running";
    site.row_when("NODES", "is led by two", led).await?;
    let all = async || advisories(&site).await.map_or(0, |all| all.len());
    wait_for("all advisories", LIMIT, async || all().await == 20).await?;
    Ok(())
}

#[tokio::test]
async fn a_standby_forgets_senders_with_those_of_the_leader() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one", "--lease-ttl", "2s"]);
    let mut site = site.start().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", by_field(json!({}))).await?;
    let service = Service::builder(&site.control().url(), SITE).instance("two").args(["--lease-ttl", "2s"]);
    let two = service.start().await?;
    let last = publish(&site, (1..=20).map(|number| report(&format!("n{number}"), number))).await?;
    site.settled("NODES", last).await?;
    record_when(&site, "NODES.n20", |record| record["sequence"] == 20).await?;
    let stands_by =
        async || site.cli().run(["instances", "--json"]).await.is_ok_and(|it| it.stdout.contains("\"two\""));
    wait_for("the second one to be known", LIMIT, stands_by).await?;
    let document = site.document_with("NODES", json!({"inspect_subject_token": 2, "inspect_duration": "1h"}));
    request(&site.client, "replicator.config.update", document).await?;
    let gone = async || record(&site, "NODES.n1").await.is_ok_and(|record| record.is_none());
    wait_for("the old records to go", LIMIT, gone).await?;
    let last = publish(&site, [report("n1", 21)]).await?;
    site.settled("NODES", last).await?;
    record_when(&site, "NODES.report", |record| record["sequence"] == 21).await?;
    site.service.kill()?;
    let led = |row: &Value| row["leader"] == "two" && row["state"] == "running" && row["sampling"]["senders"] == 1;
    site.row_when("NODES", "is led by two, which knows one sender", led).await.with_context(|| two.log())?;
    Ok(())
}

#[tokio::test]
async fn what_is_too_old_to_be_read_makes_nobody_lost() -> Result<()> {
    let mut site = advised_site(json!({"inspect_duration": "1m", "warn_duration": "3s", "max_age": "2s"})).await?;
    publish(&site, [report("n1", 1)]).await?;
    advisory(&site, "new", "n1").await?;
    site.stop().await?;
    // No advisory says that `n1` continues, and later none is read.
    publish(&site, [report("n1", 2)]).await?;
    sleep(Duration::from_secs(4)).await;
    let restarted = chrono::Utc::now().timestamp();
    site.service.restart().await?;
    let told = advisory(&site, "timeout", "n1").await?;
    assert!(told["timestamp"].as_i64() >= Some(restarted + 2), "{told} after {restarted}");
    Ok(())
}

#[tokio::test]
async fn advisories_that_are_not_reliable_are_published_once() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    let mut listener = futures_util::StreamExt::boxed(site.client.subscribe("told.>").await?);
    site.client.flush().await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", by_field(json!({"advisory": {"subject": "told.%s.%v"}}))).await?;
    let last = publish(&site, [report("n1", 1), report("n1", 2)]).await?;
    let message = tokio::time::timeout(LIMIT, futures_util::StreamExt::next(&mut listener)).await?.context("one")?;
    assert_eq!((message.subject.as_str(), message.headers.is_none()), ("told.new.n1", true));
    site.settled("NODES", last).await?;
    let confirmed = |row: &Value| row["sampling"]["advised"]["new"] == 1 && row["sampling"]["advisories_waiting"] == 0;
    site.row_when("NODES", "has published one", confirmed).await?;
    Ok(())
}

#[tokio::test]
async fn advisories_that_the_source_stores_too_bring_no_others() -> Result<()> {
    // Each subject is a sender, so each advisory would be the first message of one.
    let advisory = json!({"subject": "nodes.told.%s.%v", "reliable": true});
    let site = site(json!({"inspect_subject_token": -1, "inspect_duration": "1h", "advisory": advisory})).await?;
    let first = ["a", "b", "c"].map(|node| Outgoing::new(format!("nodes.{node}"), ""));
    publish(&site, first).await?;
    site.row_when("NODES", "three advisories", |row| row["sampling"]["advised"]["new"] == 3).await?;
    publish(&site, [Outgoing::new("nodes.d", "")]).await?;
    site.row_when("NODES", "the fourth", |row| row["sampling"]["advised"]["new"] == 4).await?;
    let row = site.settled("NODES", 8).await?;
    let sampling = &row["sampling"];
    assert_eq!((&sampling["senders"], &sampling["without_sender"]), (&json!(4), &json!(4)), "{row}");
    assert_eq!(sampling["advisories_waiting"], 0, "{row}");
    assert_eq!(copied(&site).await?, (1..=8).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn a_login_that_may_not_publish_advisories_copies_and_says_so() -> Result<()> {
    let quiet = r#"{user: quiet, password: x, permissions: {publish: {deny: ["told.>"]}}}"#;
    let users = format!("authorization {{ users: [{{user: test, password: test}}, {quiet}] }}");
    let source = Server::builder(Role::Source).config(&users).start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let mut raw = Raw::connect(&site.source.url_as("test:test")).await?;
    raw.create_stream("NODES", json!({"subjects": ["nodes.>"]})).await?;
    let advisory = json!({"subject": "told.%s.%v"});
    site.add("NODES", by_field(json!({"source_url": site.source.url_as("quiet:x"), "advisory": advisory}))).await?;
    let last = raw.publish_all([report("n1", 1)]).await?;
    site.settled("NODES", last).await?;
    let row = site.row_when("NODES", "says so", |row| row["sampling"]["advisory_error"].is_string()).await?;
    let message = row["sampling"]["advisory_error"].as_str().unwrap_or_default();
    assert!(message.contains("Permissions Violation") && message.contains("told.new.n1"), "{row}");
    assert_eq!((&row["state"], &row["sampling"]["advisory_errors"]["new"]), (&json!("running"), &json!(1)), "{row}");
    Ok(())
}

#[tokio::test]
async fn records_edited_or_deleted_by_hand_take_effect() -> Result<()> {
    let site = site(by_field(json!({}))).await?;
    let last = publish(&site, [report("n1", 1), report("n2", 2), report("n3", 3)]).await?;
    site.settled("NODES", last).await?;
    let mut edited = record_when(&site, "NODES.n1", |record| record["sequence"] == 1).await?;
    record_when(&site, "NODES.n2", |record| record["sequence"] == 2).await?;
    let bucket = site.bucket(STATE).await?;
    edited["copied"] = json!("2020-01-01T00:00:00Z");
    bucket.put("NODES.n1", edited.to_string().into()).await?;
    bucket.delete("NODES.n2").await?;
    bucket.put("NODES.n3", "garbage".into()).await?;
    wait_for("the deletion to be followed", LIMIT, async || {
        let reply = request(&site.client, "replicator.senders", json!({"replication": "NODES"})).await;
        reply.is_ok_and(|reply| reply["total"] == 2 && reply.to_string().contains("2020-01-01"))
    })
    .await?;
    let last = publish(&site, [report("n1", 4), report("n2", 5), report("n3", 6), report("n1", 7)]).await?;
    site.settled("NODES", last).await?;
    assert_eq!(copied(&site).await?, [1, 2, 3, 4, 5]);
    let log = site.service.log();
    assert!(log.contains("not a record of a sender"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_deletion_removes_senders_unless_they_are_kept() -> Result<()> {
    let site = site(by_field(json!({}))).await?;
    let last = publish(&site, [report("n1", 1)]).await?;
    site.settled("NODES", last).await?;
    record_when(&site, "NODES.n1", |record| record["sequence"] == 1).await?;
    request(&site.client, "replicator.config.delete", json!({"replication": "NODES", "keep": true})).await?;
    assert!(record(&site, "NODES.n1").await?.is_some());
    site.add("NODES", by_field(json!({}))).await?;
    let last = publish(&site, [report("n1", 2)]).await?;
    site.settled("NODES", last).await?;
    assert_eq!(copied(&site).await?, [1]);
    request(&site.client, "replicator.config.delete", json!({"replication": "NODES"})).await?;
    assert!(record(&site, "NODES.n1").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn senders_told_apart_in_another_way_begin_anew() -> Result<()> {
    let site = site(by_field(json!({}))).await?;
    let last = publish(&site, [report("n1", 1)]).await?;
    site.settled("NODES", last).await?;
    record_when(&site, "NODES.n1", |record| record["sequence"] == 1).await?;
    let document = site.document_with("NODES", json!({"inspect_subject_token": 2, "inspect_duration": "1h"}));
    request(&site.client, "replicator.config.update", document).await?;
    wait_for("the old records to go", LIMIT, async || record(&site, "NODES.n1").await.is_ok_and(|it| it.is_none()))
        .await?;
    let last = publish(&site, [report("n1", 2), report("n2", 3)]).await?;
    site.settled("NODES", last).await?;
    assert_eq!(copied(&site).await?, [1, 2], "both have the token `report`");
    // Without sampling everything is copied, and nothing is known.
    request(&site.client, "replicator.config.update", site.document("NODES")).await?;
    site.row_when("NODES", "is not sampled", |row| row["sampling"].is_null()).await?;
    let last = publish(&site, [report("n1", 4)]).await?;
    site.settled("NODES", last).await?;
    assert_eq!(copied(&site).await?, [1, 2, 4]);
    assert!(record(&site, "NODES.report").await?.is_none());
    Ok(())
}

/// What must be at the target of a stream in which each message of each sender stands at most once: the first of each.
async fn check_copies(site: &Site, sent: &HashMap<u64, String>) -> Result<usize> {
    let copied = copied(site).await?;
    ensure!(copied.is_sorted_by(|a, b| a < b), "not in order or twice: {copied:?}");
    let copied: BTreeSet<u64> = copied.into_iter().collect();
    let mut first: BTreeMap<&str, u64> = BTreeMap::new();
    for (seq, sender) in sent {
        let entry = first.entry(sender).or_insert(*seq);
        *entry = (*entry).min(*seq);
    }
    for (sender, seq) in &first {
        ensure!(copied.contains(seq), "the first message of {sender} ({seq}) is missing");
    }
    Ok(copied.len() - first.len())
}

/// Kills the service so often while it copies.
async fn kills(rounds: u64, batched: bool) -> Result<()> {
    const SENDERS: u64 = 4_000;
    let site = Site::builder().control_at_source().start().await?;
    if !batched {
        site.target_stream("NODES", json!({})).await?;
    }
    let mut site = advised(site, json!({})).await?;
    let (url, mut sent, mut next) = (site.source.url(), HashMap::new(), 0);
    let mut raw = Raw::connect(&url).await?;
    for round in 0..rounds {
        // New senders in each round, and those of before again.
        let from = round * SENDERS / rounds;
        let senders = (0..from + SENDERS / rounds).rev().take(400).map(|number| format!("n{number}"));
        let batch: Vec<String> = senders.collect();
        let messages = batch.iter().map(|sender| report(sender, round));
        let last = raw.publish_all(messages).await?;
        for sender in batch {
            next += 1;
            sent.insert(next, sender);
        }
        ensure!(last == next, "{last} {next}");
        sleep(Duration::from_millis(rand::rng().random_range(0..300))).await;
        site.service.kill()?;
        site.service.restart().await?;
    }
    site.settled_within("NODES", next, 2 * LIMIT).await?;
    let extra = check_copies(&site, &sent).await?;
    site.row_when("NODES", "has published all", |row| row["sampling"]["advisories_waiting"] == 0).await?;
    let all = advisories(&site).await?;
    let senders: BTreeSet<_> = sent.values().collect();
    let told: BTreeSet<_> = all.iter().map(|(_, sender, _)| sender).collect();
    println!("{} senders, {} messages, {extra} extra copies, {} advisories", senders.len(), sent.len(), all.len());
    assert_eq!(told, senders);
    assert_eq!(all.len(), senders.len(), "each once");
    Ok(())
}

#[tokio::test]
async fn twenty_kills_lose_no_copy_and_no_advisory() -> Result<()> {
    kills(20, true).await
}

#[tokio::test]
async fn ten_kills_lose_no_copy_and_tell_each_advisory_once_pipelined() -> Result<()> {
    kills(10, false).await
}

#[tokio::test]
async fn a_standby_that_takes_over_knows_all_senders() -> Result<()> {
    let source = Server::start(Role::Source).await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).control_at_source();
    let mut site = site.args(["--instance", "one", "--lease-ttl", "2s"]).start().await?;
    site.source_stream("ADVISORIES", json!({})).await?;
    site.source_stream("NODES", json!({})).await?;
    site.add("NODES", told(json!({}))).await?;
    let senders: Vec<_> = (0..1_000).map(|number| format!("n{number}")).collect();
    let last = publish(&site, senders.iter().map(|sender| report(sender, 1))).await?;
    site.settled("NODES", last).await?;
    let service = Service::builder(&site.control().url(), SITE).instance("two").args(["--lease-ttl", "2s"]);
    let mut two = service.start().await?;
    site.row_when("NODES", "has published all", |row| row["sampling"]["advised"]["new"] == 1_000).await?;
    record_when(&site, "NODES.n999", |record| record.get("pending").is_none()).await?;
    site.service.kill()?;
    site.row_when("NODES", "is led by two", |row| row["leader"] == "two" && row["state"] == "running").await?;
    let last = publish(&site, senders.iter().map(|sender| report(sender, 2))).await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!(row["counters"]["skipped_sampled"], 1_000, "{row}\n{}", two.log());
    assert_eq!(site.at_target("NODES").await?, 1_000);
    assert_eq!(advisories(&site).await?.len(), 1_000);
    // In order too.
    assert!(two.stop().await?.success());
    site.service.restart().await?;
    let last = publish(&site, senders.iter().map(|sender| report(sender, 3))).await?;
    site.settled("NODES", last).await?;
    assert_eq!((site.at_target("NODES").await?, advisories(&site).await?.len()), (1_000, 1_000));
    Ok(())
}

#[tokio::test]
async fn sampling_works_with_work_queues_prefixes_and_filters() -> Result<()> {
    for retention in ["interest", "workqueue"] {
        let site = Site::builder().control_at_source().start().await?;
        site.source_stream("NODES", json!({"retention": retention})).await?;
        let fields =
            json!({"target_subject_prefix": "central", "exclude_subjects": ["nodes.private"], "max_age": "1h"});
        site.add("NODES", by_field(fields)).await?;
        site.row_when("NODES", "runs", |row| row["state"] == "running").await?;
        let private = Outgoing::new("nodes.private", r#"{"sender":"n9"}"#);
        let messages = [report("n1", 1), report("n1", 2), private, report("n2", 4)];
        let last = publish(&site, messages).await?;
        let row = site.settled("NODES", last).await?;
        assert_eq!((&row["counters"]["copied"], &row["counters"]["skipped_sampled"]), (&json!(2), &json!(1)), "{row}");
        assert_eq!(row["sampling"]["senders"], 2);
        let stored = site.target().await?.read_stream("NODES").await?;
        assert!(stored.iter().all(|message| message.subject == "central.nodes.report"));
        wait_for("the source to be drained", LIMIT, async || {
            let Ok(mut source) = site.source().await else { return false };
            source.stream_state("NODES").await.is_ok_and(|state| state["messages"] == 0)
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_clock_of_a_backlog_is_the_sources() -> Result<()> {
    let mut site = advised_site(json!({"inspect_duration": "1m", "warn_duration": "4s"})).await?;
    publish(&site, [report("n1", 1), report("n2", 1)]).await?;
    advisory(&site, "new", "n2").await?;
    site.stop().await?;
    // While it is down, one of them continues, for longer than the other may be unseen.
    let reporting = Reporting::start(&site, "n1");
    sleep(Duration::from_secs(6)).await;
    site.service.restart().await?;
    advisory(&site, "timeout", "n2").await?;
    let all = advisories(&site).await?;
    assert!(all.iter().all(|(kind, sender, _)| sender == "n2" || kind == "new"), "{all:?}");
    reporting.end().await
}
