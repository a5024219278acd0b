//! Several writers into one target: replications of one and of several services, foreign publishers, kills, and the
//! three words of `target_mode`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::raw::wait_messages;
use crate::harness::server::NEWEST;
use crate::harness::site::merged;
use crate::harness::{
    Cluster, Expect, Outgoing, Raw, Role, SITE, Service, Site, checker, request, wait_for, wait_value,
};

const LONG: Duration = Duration::from_secs(120);
const SOURCES: [&str; 3] = ["A", "B", "C"];
const TARGET: &str = "T";

/// The target of all of them: with batches where the server has them, if they are wanted.
async fn target(site: &Site, batched: bool, more: Value) -> Result<bool> {
    let mut config = merged(json!({"subjects": ["a.>", "b.>", "c.>", "x.>"]}), more);
    let fast = batched && site.target.at_least(2, 14);
    if fast {
        config["allow_batched"] = true.into();
    }
    site.target_stream(TARGET, config).await?;
    Ok(fast)
}

async fn sources(site: &Site, count: u64) -> Result<()> {
    for stream in SOURCES {
        let mut raw = site.source_stream(stream, json!({})).await?;
        let subject = stream.to_lowercase();
        raw.publish_all((1..=count).map(|i| Outgoing::new(format!("{subject}.{}", i % 7), format!("{i:0>100}"))))
            .await?;
    }
    Ok(())
}

fn into_target(site: &Site, stream: &str, more: Value) -> Value {
    site.document_with(stream, merged(json!({"target_stream": TARGET}), more))
}

/// Each message of each source once; in order where the target has batches.
async fn verify(site: &Site, fast: bool) -> Result<()> {
    for stream in SOURCES {
        let expect = Expect::copy_of(stream).shared();
        let expect = if fast { expect } else { expect.late_allowed() };
        site.verify(TARGET, &expect).await.with_context(|| format!("source {stream}"))?;
    }
    Ok(())
}

async fn stored(site: &Site) -> u64 {
    site.at_target(TARGET).await.unwrap_or_default()
}

/// Another writer that publishes to the target until it is stopped; in the end, how often.
struct OtherPublisher {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<u64>>,
}

impl OtherPublisher {
    async fn start(site: &Site, subject: &str, pause: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut raw, subject, stopped) = (site.target().await?, subject.to_owned(), stop.clone());
        let task = tokio::spawn(async move {
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                raw.publish(&Outgoing::new(&subject, "foreign")).await?;
                count += 1;
                tokio::time::sleep(pause).await;
            }
            Ok(count)
        });
        Ok(Self { stop, task })
    }

    async fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}

/// A service of its own beside that of the site: neither knows the other's documents.
async fn beside(site: &Site, prefix: &str) -> Result<Service> {
    let arguments = ["--prefix", prefix, "--bucket-prefix", prefix];
    Service::builder(&site.service_url(), SITE).instance("only").args(arguments).start().await
}

async fn row(site: &Site, prefix: &str, id: &str) -> Option<Value> {
    let reply = request(&site.client, &format!("{prefix}.status"), Value::Null).await.ok()?;
    reply["replications"].as_array()?.iter().find(|row| row["replication"] == id).cloned()
}

async fn settled(site: &Site, prefix: &str, id: &str, seq: u64) -> Result<Value> {
    let mut last = None;
    let what = format!("{prefix} {id} to settle");
    let found = wait_value(&what, LONG, async || {
        last = row(site, prefix, id).await;
        let runs = last.clone().filter(|row| row["state"] == "running");
        runs.filter(|row| row["position"]["source_seq"] == seq && row["lag"]["messages"] == 0)
    });
    found.await.with_context(|| format!("{last:?}\n{}", site.service.log()))
}

/// Three services that know nothing of each other, with one replication each; all are killed again and again.
async fn three_services(batched: bool, foreign: bool) -> Result<()> {
    const COUNT: u64 = 40_000;
    const KILLS: u64 = 8;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let site = Site::start().await?;
    let fast = target(&site, batched, json!({})).await?;
    sources(&site, COUNT).await?;
    let mut services = Vec::new();
    for stream in SOURCES {
        let service = beside(&site, stream).await?;
        let subject = format!("{stream}.config.add");
        request(&site.client, &subject, into_target(&site, stream, json!({}))).await?;
        services.push(service);
    }
    let mut publishers = Vec::new();
    if foreign {
        for subject in ["a.1", "x.1"] {
            publishers.push(OtherPublisher::start(&site, subject, Duration::from_millis(1)).await?);
        }
    }
    for kill in 1..=KILLS {
        let share = 3 * COUNT / (KILLS + 2);
        let at = share * kill - random.random_range(0..share / 2);
        wait_for("the copies to continue", LONG, async || stored(&site).await >= at).await?;
        let service = &mut services[random.random_range(0..SOURCES.len())];
        service.kill()?;
        service.restart().await?;
    }
    for stream in SOURCES {
        let row = settled(&site, stream, stream, COUNT).await?;
        assert_eq!(row["transport"], if fast { "fast_ingest" } else { "pipelined" }, "{row}");
        assert_eq!(row["ordering"], if fast { "strict" } else { "relaxed" }, "{row}");
    }
    let mut others = 0;
    for publisher in publishers {
        others += publisher.stop().await?;
    }
    verify(&site, fast).await?;
    assert_eq!(stored(&site).await, 3 * COUNT + others);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_services_that_are_killed_often_copy_exactly() -> Result<()> {
    three_services(true, false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn three_killed_services_and_foreign_publishers_by_fast_ingest() -> Result<()> {
    three_services(true, true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_killed_services_and_foreign_publishers_pipelined() -> Result<()> {
    three_services(false, true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replications_into_one_target_are_shared_from_the_start() -> Result<()> {
    const COUNT: u64 = 30_000;
    for batched in [true, false] {
        let mut site = Site::builder().args(["--instance", "one"]).start().await?;
        let fast = target(&site, batched, json!({})).await?;
        sources(&site, COUNT).await?;
        site.stop().await?;
        for stream in SOURCES {
            site.put(stream, into_target(&site, stream, json!({})).to_string()).await?;
        }
        site.service.restart().await?;
        for kill in 1..=4 {
            wait_for("the copies to continue", LONG, async || stored(&site).await >= 3 * COUNT * kill / 6).await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        for stream in SOURCES {
            let row = site.settled_within(stream, COUNT, LONG).await?;
            assert_eq!((&row["target_mode"], &row["counters"]["errors"]), (&json!("shared"), &json!(0)), "{row}");
        }
        verify(&site, fast).await?;
        assert_eq!(stored(&site).await, 3 * COUNT);
        // Nothing has turned out.
        site.events.quiet(&["target-shared", "target-reset", "stalled", "held"])?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_replication_makes_the_first_one_shared() -> Result<()> {
    let mut site = Site::start().await?;
    let fast = target(&site, true, json!({})).await?;
    sources(&site, 500).await?;
    for stream in ["A", "B"] {
        request(&site.client, "replicator.config.add", into_target(&site, stream, json!({}))).await?;
        let row = site.settled(stream, 500).await?;
        assert_eq!(row["target_mode"], if stream == "A" { "exclusive" } else { "shared" }, "{row}");
    }
    site.stop().await?;
    site.service.restart().await?;
    let row = site.settled("A", 500).await?;
    assert_eq!(row["target_mode"], "shared", "{row}");
    let told = site.events.ever("target-shared").await?;
    assert_eq!(told["replication"], "A", "{told}");
    for stream in SOURCES.iter().skip(2) {
        request(&site.client, "replicator.config.add", into_target(&site, stream, json!({}))).await?;
        site.settled(stream, 500).await?;
    }
    verify(&site, fast).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_source_under_two_names_is_copied_twice_and_each_once() -> Result<()> {
    const COUNT: u64 = 20_000;
    for batched in [true, false] {
        let mut site = Site::builder().args(["--instance", "one"]).start().await?;
        let fast = target(&site, batched, json!({})).await?;
        sources(&site, COUNT).await?;
        for name in ["one", "two"] {
            let document = into_target(&site, "A", json!({"name": name}));
            request(&site.client, "replicator.config.add", document).await?;
        }
        for kill in 1..=3 {
            wait_for("the copies to continue", LONG, async || stored(&site).await >= 2 * COUNT * kill / 5).await?;
            site.service.kill()?;
            site.service.restart().await?;
        }
        for name in ["one", "two"] {
            site.settled_within(&format!("A.{name}"), COUNT, LONG).await?;
            let expect = Expect::copy_of("A").name(name).shared();
            site.verify(TARGET, &if fast { expect } else { expect.late_allowed() }).await?;
        }
        assert_eq!(stored(&site).await, 2 * COUNT);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_turns_shared_in_a_copy_is_copied_exactly() -> Result<()> {
    const COUNT: u64 = 60_000;
    for batched in [true, false] {
        for killed in [false, true] {
            let mut site = Site::builder().args(["--instance", "one"]).start().await?;
            let fast = target(&site, batched, json!({})).await?;
            sources(&site, COUNT).await?;
            let slow = json!({"limits": {"messages_in_flight": 500, "messages_per_second": 20_000}});
            request(&site.client, "replicator.config.add", into_target(&site, "A", slow)).await?;
            wait_for("the copy to begin", LONG, async || stored(&site).await >= COUNT / 10).await?;
            // What lies there before a first save is nobody's business.
            let saved = async || site.position("A").await.is_ok_and(|r| r.is_some_and(|r| !r["target"].is_null()));
            wait_for("a position to be saved", LONG, saved).await?;
            let row = site.row("A").await.context("a row")?;
            assert_eq!(row["target_mode"], "exclusive", "{row}");
            let at = site.target().await?.publish(&Outgoing::new("x.foreign", "x")).await?;
            ensure!(at < COUNT, "the copy was too fast to be disturbed");
            if killed {
                site.service.kill()?;
                site.service.restart().await?;
            }
            site.settled_within("A", COUNT, LONG).await?;
            // One message among this many in flight is seen once they have all settled, by a run that ends with that.
            let shared = |row: &Value| row["state"] == "running" && row["target_mode"] == "shared";
            site.row_when("A", "has turned shared", shared).await?;
            site.settled_within("A", COUNT, LONG).await?;
            site.events.ever("target-shared").await?;
            let told = site.events.told("target-shared");
            let reason = format!("message {at} on `x.foreign` is not of this replication");
            // Killed before it was saved, it turned out again.
            let enough = !told.is_empty() && told.len() <= 1 + usize::from(killed);
            ensure!(enough, "batched {batched}, killed {killed}: {told:?}\n{}", site.service.log());
            assert_eq!((&told[0]["target_seq"], &told[0]["reason"]), (&json!(at), &json!(reason)));
            ensure!(site.service.log().contains("TargetShared"), "{}", site.service.log());
            let expect = Expect::copy_of("A").shared();
            site.verify(TARGET, &if fast { expect } else { expect.late_allowed() }).await?;
            assert_eq!(stored(&site).await, COUNT + 1);
            // Kept over a start, and not reported again.
            site.stop().await?;
            site.service.restart().await?;
            let row = site.settled("A", COUNT).await?;
            assert_eq!(row["target_mode"], "shared", "{row}");
            assert_eq!(site.events.told("target-shared").len(), told.len());
        }
    }
    Ok(())
}

/// Publishes to the source until the row says what is expected.
async fn until(site: &Site, last: &mut u64, what: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_value(what, LONG, async || {
        *last = site.publish("A", *last + 1..=*last + 5).await.ok()?;
        site.row("A").await.filter(|row| when(row))
    })
    .await
    .with_context(|| site.service.log())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exclusive_copy_is_held_while_others_write() -> Result<()> {
    for batched in [true, false] {
        let mut site = Site::start().await?;
        let fast = target(&site, batched, json!({})).await?;
        sources(&site, 1_000).await?;
        let document = into_target(&site, "A", json!({"target_mode": "exclusive"}));
        request(&site.client, "replicator.config.add", document).await?;
        site.settled("A", 1_000).await?;
        let publisher = OtherPublisher::start(&site, "x.others", Duration::from_millis(5)).await?;
        let mut last = 1_000;
        let held = until(&site, &mut last, "the copy to be held", |row| row["state"] == "held").await?;
        let message = held["last_error"]["message"].as_str().unwrap_or_default().to_owned();
        ensure!(message.contains("on `x.others`") && message.contains("stream `T`"), "{message}");
        ensure!(message.contains("set `target_mode` to `shared`"), "{message}");
        let told = site.events.wait("held", "A").await?;
        assert_eq!((&told["message"], &held["target_mode"]), (&json!(message), &json!("exclusive")), "{told}");
        // A retry changes nothing while others write.
        request(&site.client, "replicator.retry", json!({"replication": "A"})).await?;
        let errors = held["counters"]["errors"].as_u64();
        let again = |row: &Value| row["state"] == "held" && row["counters"]["errors"].as_u64() > errors;
        site.row_when("A", "is held again", again).await?;
        let others = publisher.stop().await?;
        // By request at once; by itself it takes up to ten seconds.
        let settled = |row: &Value| row["state"] == "running" && row["position"]["source_seq"] == last;
        wait_for("the copy to continue", LONG, async || {
            let _ = site.send("retry", json!({"replication": "A"})).await;
            site.row("A").await.is_some_and(|row| settled(&row))
        })
        .await?;
        let row = site.settled("A", last).await?;
        assert_eq!(row["target_mode"], "exclusive", "{row}");
        let expect = Expect::copy_of("A").shared();
        site.verify(TARGET, &if fast { expect } else { expect.late_allowed() }).await?;
        assert_eq!(stored(&site).await, last + others);
        site.events.wait("repaired", "A").await?;
        site.events.quiet(&["target-shared", "target-reset"])?;
    }
    Ok(())
}

#[tokio::test]
async fn the_document_goes_before_what_turned_out() -> Result<()> {
    let site = Site::start().await?;
    target(&site, true, json!({})).await?;
    sources(&site, 100).await?;
    let mode = async |word: &str, seq: u64| {
        let document = into_target(&site, "A", json!({"target_mode": word}));
        let revision = request(&site.client, "replicator.config.update", document).await?["revision"].take();
        let follows = |row: &Value| row["config_revision"] == revision && row["state"] == "running";
        site.row_when("A", "follows the document", follows).await?;
        site.publish("A", seq..=seq).await?;
        let row = site.settled("A", seq).await?;
        anyhow::Ok(row["target_mode"].as_str().unwrap_or_default().to_owned())
    };
    request(&site.client, "replicator.config.add", into_target(&site, "A", json!({"target_mode": "shared"}))).await?;
    let row = site.settled("A", 100).await?;
    assert_eq!(row["target_mode"], "shared", "{row}");
    assert_eq!(mode("auto", 101).await?, "shared");
    assert_eq!(mode("exclusive", 102).await?, "exclusive");
    assert_eq!(mode("auto", 103).await?, "exclusive");
    assert_eq!(mode("shared", 104).await?, "shared");
    site.verify(TARGET, &Expect::copy_of("A").shared()).await?;
    assert_eq!(stored(&site).await, 104);
    site.events.quiet(&["target-shared", "held", "stalled"])
}

#[tokio::test]
async fn a_target_that_cannot_be_exclusive_is_refused() -> Result<()> {
    let site = Site::start().await?;
    sources(&site, 10).await?;
    let mut raw = site.target().await?;
    raw.create_stream("ORIGIN", json!({"subjects": ["origin"]})).await?;
    let mut kinds = vec![
        ("sources", json!({"sources": [{"name": "ORIGIN"}]})),
        ("interest retention", json!({"retention": "interest"})),
        ("workqueue retention", json!({"retention": "workqueue"})),
    ];
    if site.target.at_least(2, 12) {
        let markers = json!({"subject_delete_marker_ttl": 1_000_000_000, "allow_msg_ttl": true, "allow_rollup_hdrs": true,
            "max_msgs_per_subject": 5});
        kinds.push(("delete markers", markers));
    }
    for (index, (word, config)) in kinds.into_iter().enumerate() {
        let (stream, prefix) = (format!("N{index}"), format!("n{index}"));
        raw.create_stream(&stream, merged(json!({"subjects": [format!("{prefix}.>")]}), config)).await?;
        let fields = json!({"name": prefix, "target_stream": stream, "target_subject_prefix": prefix, "target_mode": "exclusive"});
        let document = site.document_with("A", fields);
        let reply = request(&site.client, "replicator.config.validate", document.clone()).await?;
        let problem = &reply["problems"][0];
        assert_eq!((&reply["valid"], &problem["path"]), (&json!(false), &json!("/target_mode")), "{reply:#}");
        let text = problem["message"].as_str().unwrap_or_default();
        ensure!(text.contains(&format!("stream `{stream}` cannot be exclusive")) && text.contains(word), "{text}");
        request(&site.client, "replicator.config.add", document.clone()).await?;
        let id = format!("A.{prefix}");
        let row = site.row_when(&id, "is held", |row| row["state"] == "held").await?;
        let text = row["last_error"]["message"].as_str().unwrap_or_default();
        ensure!(text.contains("cannot be exclusive") && text.contains(word), "{row}");
        // By itself it is shared.
        request(&site.client, "replicator.config.update", merged(document, json!({"target_mode": "auto"}))).await?;
        let row = site.settled(&id, 10).await?;
        assert_eq!(row["target_mode"], "shared", "{row}");
    }
    Ok(())
}

#[tokio::test]
async fn validate_names_a_neighbour_of_an_exclusive_replication() -> Result<()> {
    let site = Site::start().await?;
    target(&site, true, json!({})).await?;
    sources(&site, 10).await?;
    request(&site.client, "replicator.config.add", into_target(&site, "A", json!({}))).await?;
    site.settled("A", 10).await?;
    let validate = async |mode: &str| {
        let document = into_target(&site, "B", json!({"target_mode": mode}));
        request(&site.client, "replicator.config.validate", document).await
    };
    let reply = validate("exclusive").await?;
    let text = reply["warnings"][0]["message"].as_str().unwrap_or_default();
    assert_eq!((&reply["valid"], &reply["warnings"][0]["path"]), (&json!(true), &json!("/target_mode")), "{reply:#}");
    ensure!(text.contains("replication `A` writes to target stream `T` too"), "{text}");
    let reply = validate("auto").await?;
    assert_eq!(reply["warnings"], json!([]), "{reply:#}");
    Ok(())
}

/// Two replicators of one site and name write the same ids into three replicas at the same time: the target meets ids
/// whose message is still on its way (10158, or up to 2.10 a duplicate without a sequence).
async fn same_ids_at_once(version: &str) -> Result<()> {
    const COUNT: u64 = 5_000;
    let cluster = Cluster::start_with(Role::Target, |server| server.version(version)).await?;
    let site = Site::small().await?;
    let mut raw = site.source_stream("A", json!({})).await?;
    raw.publish_all((1..=COUNT).map(|i| Outgoing::new(format!("a.{}", i % 7), i.to_string()))).await?;
    let mut at_target = Raw::connect(&cluster.servers[0].url()).await?;
    at_target.create_stream("A", json!({"subjects": ["a.>"], "num_replicas": 3})).await?;
    let document = json!({"stream": "A", "source_url": site.source.url(), "target_url": cluster.url(),
        "target_mode": "shared"});
    let _other = beside(&site, "other").await?;
    for prefix in ["replicator", "other"] {
        request(&site.client, &format!("{prefix}.config.add"), document.clone()).await?;
    }
    let mut errors = 0;
    for prefix in ["replicator", "other"] {
        let row = settled(&site, prefix, "A", COUNT).await?;
        errors += row["counters"]["errors"].as_u64().unwrap_or_default();
        println!("{version} {prefix}: {} errors, last {}", row["counters"]["errors"], row["last_error"]["message"]);
    }
    println!("{version}: {errors} runs ended with an error");
    let (from, copied) = (raw.read_stream("A").await?, cluster.read_stream("A").await?);
    checker::compare(&from, &copied, &Expect::copy_of("A").late_allowed()).verify()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_are_in_process_are_tried_again_on_2_10() -> Result<()> {
    same_ids_at_once("2.10.26").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_are_in_process_are_tried_again_on_the_newest() -> Result<()> {
    same_ids_at_once(NEWEST).await
}

/// A batch that stays open until the server forgets it.
async fn open_batch(raw: &mut Raw, id: u64) -> Result<()> {
    raw.send_with_reply(&Outgoing::new("x.open", "1"), &format!("_INBOX.open.{id}.1.fail.1.0.$FI")).await
}

#[tokio::test]
async fn more_open_batches_than_a_server_takes_are_waited_for() -> Result<()> {
    let mut site = Site::start().await?;
    if !target(&site, true, json!({})).await? {
        return Ok(());
    }
    sources(&site, 2_000).await?;
    let mut raw = site.target().await?;
    for id in 0..1_000 {
        open_batch(&mut raw, id).await?;
    }
    wait_messages(&mut site.target().await?, TARGET, 1_000, LONG).await?;
    request(&site.client, "replicator.config.add", into_target(&site, "A", json!({}))).await?;
    let told = site.events.wait("stalled", "A").await?;
    ensure!(told["message"].as_str().is_some_and(|text| text.contains("(10211)")), "{told}");
    let row = site.settled_within("A", 2_000, LONG).await?;
    ensure!(row["last_error"]["kind"] == "retry", "{row}");
    site.verify(TARGET, &Expect::copy_of("A").shared()).await?;
    assert_eq!(stored(&site).await, 3_000);
    site.events.quiet(&["held", "poison"])
}
