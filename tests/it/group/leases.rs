//! Several instances of one site: which one runs what, which one takes over and when, and that only the leader writes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::client::refused;
use crate::harness::proxy::{BOTH, Newcomers, Proxy};
use crate::harness::{Expect, LIMIT, Raw, SITE, Service, Site, request, wait_for};

/// Time to live of a session in most of these tests.
const TTL: &str = "3s";
/// An instance waits for a lease this long at the most.
const SILENT: Duration = Duration::from_secs(4);

async fn one(arguments: &[&str]) -> Result<Site> {
    Site::builder().args(["--instance", "one", "--lease-ttl", TTL]).args(arguments.iter().copied()).start().await
}

async fn another(site: &Site, instance: &str) -> Result<Service> {
    at(&site.control().url(), instance).await
}

async fn at(url: &str, instance: &str) -> Result<Service> {
    Service::builder(url, SITE).instance(instance).args(["--lease-ttl", TTL]).start().await
}

async fn led_by(site: &Site, id: &str, instance: &str) -> Result<Value> {
    site.row_when(id, &format!("is led by `{instance}`"), |row| row["leader"] == instance && row["state"] == "running")
        .await
}

/// Publishes until the target has one more message than it had; returns how long that took and the last number.
async fn copies_again(site: &Site, stream: &str, last: u64) -> Result<(Duration, u64)> {
    let begun = Instant::now();
    let before = site.at_target(stream).await?;
    let last = site.publish(stream, last + 1..=last + 1).await?;
    wait_for("a message at the target", LIMIT, async || site.at_target(stream).await.is_ok_and(|now| now > before))
        .await?;
    Ok((begun.elapsed(), last))
}

async fn lease(site: &Site, id: &str) -> Result<Value> {
    let lease = site.bucket("REPLICATOR_LEASES").await?.get(&format!("lease.{id}")).await?.context("a lease")?;
    Ok(serde_json::from_slice(&lease)?)
}

/// Each message once and in order.
async fn verify(site: &Site, stream: &str) -> Result<()> {
    site.verify(stream, &Expect::copy_of(stream)).await
}

#[tokio::test]
async fn a_leader_that_stops_hands_over_at_once() -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    let row = led_by(&site, "ORDERS", "one").await?;
    let record = lease(&site, "ORDERS").await?;
    assert_eq!((&record["instance"], &record["epoch"]), (&json!("one"), &row["epoch"]));
    let mut two = another(&site, "two").await?;
    site.stop().await?;
    let stopped = Instant::now();
    let (took, last) = copies_again(&site, "ORDERS", 10).await?;
    ensure!(took < Duration::from_millis(500), "{took:?} after the stop\n{}", two.log());
    println!("graceful: {took:?} after the process was gone ({:?})", stopped.elapsed());
    let next = led_by(&site, "ORDERS", "two").await?;
    assert!(next["epoch"].as_u64() > row["epoch"].as_u64(), "{next}");
    let told = site.events.wait("leader", "ORDERS").await?;
    assert_eq!(told["instance"], "one", "{told}");
    let told = site.events.wait("leader", "ORDERS").await?;
    assert_eq!((&told["instance"], &told["previous"]), (&json!("two"), &json!("one")), "{told}");
    verify(&site, "ORDERS").await?;
    assert_eq!(site.at_target("ORDERS").await?, last);
    assert!(two.stop().await?.success());
    let record = lease(&site, "ORDERS").await?;
    assert_eq!((&record["instance"], &record["epoch"]), (&json!(""), &next["epoch"]), "the epoch stays");
    Ok(())
}

/// Kills or freezes the leader so many times; prints how long it takes until something is copied again.
async fn takeovers(tries: usize, frozen: bool) -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    led_by(&site, "ORDERS", "one").await?;
    let mut two = another(&site, "two").await?;
    let (mut last, mut times) = (10, Vec::new());
    for round in 0..tries {
        let leader = if round % 2 == 0 { "one" } else { "two" };
        led_by(&site, "ORDERS", leader).await?;
        // At any moment between two renewals.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..750))).await;
        let service = if round % 2 == 0 { &mut site.service } else { &mut two };
        if frozen {
            service.freeze()?
        } else {
            service.kill()?
        }
        let (took, at) = copies_again(&site, "ORDERS", last).await?;
        (last, times) = (at, [times, vec![took]].concat());
        ensure!(took < SILENT, "round {round}: {took:?}");
        let service = if round % 2 == 0 { &mut site.service } else { &mut two };
        if frozen {
            service.thaw()?;
            let log = || service.log();
            wait_for("the leader to find that it is none any more", LIMIT, async || lost(&log()) > round / 2).await?;
        } else {
            service.restart().await?;
        }
        verify(&site, "ORDERS").await?;
    }
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{tries} times {}: median {median:?}, worst {worst:?}", if frozen { "frozen" } else { "killed" });
    Ok(())
}

#[tokio::test]
async fn the_leases_of_a_killed_leader_are_taken_within_the_ttl() -> Result<()> {
    takeovers(2, false).await
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn the_leases_of_a_killed_leader_are_taken_twenty_times() -> Result<()> {
    takeovers(20, false).await
}

#[tokio::test]
async fn a_frozen_leader_is_followed_and_writes_nothing_when_it_thaws() -> Result<()> {
    takeovers(2, true).await
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn a_frozen_leader_is_followed_twenty_times() -> Result<()> {
    takeovers(20, true).await
}

#[tokio::test]
async fn a_leader_cut_off_from_its_leases_stops_by_itself() -> Result<()> {
    let mut site = Site::start().await?;
    // The service of the site is not part of it.
    site.stop().await?;
    let proxy = Proxy::start(site.control().port()).await?;
    let one = at(&proxy.url(), "one").await?;
    site.filled("ORDERS", 1_000).await?;
    site.add("ORDERS", json!({})).await?;
    led_by(&site, "ORDERS", "one").await?;
    let two = another(&site, "two").await?;
    let mut last = 1_000;
    // Only its leases: source and target are within reach.
    proxy.half_open(BOTH, Newcomers::Hang);
    let begun = Instant::now();
    wait_for("the other one to lead", LIMIT, async || {
        last = site.publish("ORDERS", last + 1..=last + 5).await.unwrap_or(last);
        site.row("ORDERS").await.is_some_and(|row| row["leader"] == "two")
    })
    .await
    .with_context(|| format!("{}\n{}", one.log(), two.log()))?;
    println!("another one leads after {:?}", begun.elapsed());
    ensure!(begun.elapsed() < SILENT, "{:?}", begun.elapsed());
    proxy.resume();
    proxy.drop_connections();
    site.settled("ORDERS", last).await?;
    verify(&site, "ORDERS").await?;
    assert!(one.log().contains("the lease is lost"), "{}", one.log());
    Ok(())
}

#[tokio::test]
async fn a_starved_leader_harms_nothing_with_or_without_its_lease() -> Result<()> {
    let site = one(&[]).await?;
    site.filled("ORDERS", 5_000).await?;
    site.add("ORDERS", json!({"limits": {"messages_per_second": 400}})).await?;
    led_by(&site, "ORDERS", "one").await?;
    let two = another(&site, "two").await?;
    // It gets moments only, too few for its renewals, and is in the middle of something each time.
    let begun = Instant::now();
    while begun.elapsed() < 3 * SILENT {
        site.service.freeze()?;
        tokio::time::sleep(Duration::from_millis(rand::random_range(300..2_500))).await;
        site.service.thaw()?;
        tokio::time::sleep(Duration::from_millis(rand::random_range(5..80))).await;
    }
    site.settled_within("ORDERS", 5_000, 2 * LIMIT).await.with_context(|| two.log())?;
    let epoch = lease(&site, "ORDERS").await?["epoch"].as_u64();
    println!("epoch {epoch:?} at the end; the starved one lost its lease {} times", lost(&site.service.log()));
    verify(&site, "ORDERS").await?;
    assert_eq!(site.at_target("ORDERS").await?, 5_000);
    Ok(())
}

fn lost(log: &str) -> usize {
    log.matches("the lease is lost").count()
}

#[tokio::test]
async fn a_standalone_instance_copies_without_its_control_server() -> Result<()> {
    let mut site = one(&["--standalone"]).await?;
    site.replicate("ORDERS", 10).await?;
    let epoch = led_by(&site, "ORDERS", "one").await?["epoch"].clone();
    site.control_mut().stop().await?;
    // Longer than anybody would keep a lease.
    let begun = Instant::now();
    let mut last = 10;
    while begun.elapsed() < SILENT {
        last = copies_again(&site, "ORDERS", last).await?.1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    site.control_mut().restart().await?;
    let saved = async || site.position("ORDERS").await.ok()??["source"]["seq"].as_u64();
    wait_for("the position to be saved", LIMIT, async || saved().await == Some(last)).await?;
    let row = site.settled("ORDERS", last).await?;
    assert_eq!(row["epoch"], epoch, "{row}");
    verify(&site, "ORDERS").await
}

#[tokio::test]
async fn a_standalone_instance_writes_a_removed_session_again() -> Result<()> {
    let site = one(&["--standalone"]).await?;
    site.replicate("ORDERS", 10).await?;
    let epoch = led_by(&site, "ORDERS", "one").await?["epoch"].clone();
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    leases.delete("session.one").await?;
    wait_for("a session again", LIMIT, async || leases.get("session.one").await.is_ok_and(|found| found.is_some()))
        .await?;
    let last = copies_again(&site, "ORDERS", 10).await?.1;
    assert_eq!(site.settled("ORDERS", last).await?["epoch"], epoch);
    assert_eq!(site.service.log().matches("the session of this instance was removed").count(), 1);
    verify(&site, "ORDERS").await
}

#[tokio::test]
async fn a_recreated_lease_bucket_is_followed_from_its_beginning() -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    led_by(&site, "ORDERS", "one").await?;
    let two = another(&site, "two").await?;
    let mut raw = Raw::connect(&site.control().url()).await?;
    let bucket = "KV_REPLICATOR_LEASES";
    // Some renewals, so that the new revisions are smaller for a while.
    let renewed = async |raw: &mut Raw| raw.stream_state(bucket).await.ok()?["last_seq"].as_u64();
    wait_for("renewals", LIMIT, async || renewed(&mut raw).await > Some(20)).await?;
    let config = raw.api(&format!("STREAM.INFO.{bucket}"), Value::Null).await?["config"].take();
    raw.api(&format!("STREAM.DELETE.{bucket}"), Value::Null).await?;
    raw.create_stream(bucket, config).await?;
    let is_one = async || lease(&site, "ORDERS").await.is_ok_and(|lease| lease["instance"] == "one");
    wait_for("the lease to be taken again", LIMIT, is_one).await?;
    wait_for("the other to see it", LIMIT, async || two.log().contains("lease bucket was recreated or restored"))
        .await?;
    let last = copies_again(&site, "ORDERS", 10).await?.1;
    site.stop().await?;
    let (took, _) = copies_again(&site, "ORDERS", last).await?;
    ensure!(took < SILENT, "{took:?}\n{}", two.log());
    verify(&site, "ORDERS").await
}

#[tokio::test]
async fn a_leader_hands_over_by_request() -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    led_by(&site, "ORDERS", "one").await?;
    let alone = site.ask("stepdown", "ORDERS").await?;
    refused(&alone, 409, "no other instance");
    refused(&site.ask("stepdown", "NONE").await?, 404, "NONE");
    let two = another(&site, "two").await?;
    let known = async || site.cli().run(["instances", "--json"]).await.is_ok_and(|out| out.stdout.contains("\"two\""));
    wait_for("the second one to be known", LIMIT, known).await?;
    let reply = request(&site.client, "replicator.stepdown", json!({"replication": "ORDERS"})).await?;
    assert_eq!(reply, json!({"replication": "ORDERS", "from": "one", "to": "two"}));
    let (_, last) = copies_again(&site, "ORDERS", 10).await?;
    led_by(&site, "ORDERS", "two").await?;
    assert_eq!(lease(&site, "ORDERS").await?["stepped_down"], "one");
    // By hand it is the same: a field in the record.
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    let mut record = lease(&site, "ORDERS").await?;
    record["step_down"] = json!(true);
    leases.put("lease.ORDERS", record.to_string().into()).await?;
    led_by(&site, "ORDERS", "one").await?;
    site.settled("ORDERS", last).await?;
    verify(&site, "ORDERS").await?;
    assert_eq!(site.events.wait("stopped", "ORDERS").await?["instance"], "one");
    drop(two);
    Ok(())
}

/// What each instance leads, by its own name.
async fn shares(site: &Site) -> Option<Vec<(String, u64)>> {
    let reply = request(&site.client, "replicator.instances", Value::Null).await.ok()?;
    let row = |row: &Value| Some((row["instance"].as_str()?.to_owned(), row["leads"].as_u64()?));
    reply["instances"].as_array()?.iter().map(row).collect()
}

/// Waits until so many instances lead all of `ids` together, none more than 1.35 of its even share (and one).
async fn wait_spread(site: &Site, instances: usize, ids: &[String]) -> Result<Duration> {
    let begun = Instant::now();
    let most = (ids.len() as f64 * 1.35 / instances as f64).max(ids.len() as f64 / instances as f64 + 1.0);
    let even = async || {
        shares(site).await.is_some_and(|all| {
            let sum: u64 = all.iter().map(|(_, leads)| leads).sum();
            all.len() == instances && sum == ids.len() as u64 && all.iter().all(|(_, leads)| *leads as f64 <= most)
        })
    };
    wait_for("all to have their share", Duration::from_secs(30), even).await.with_context(|| site.service.log())?;
    println!("{instances} instances have their share after {:?}: {:?}", begun.elapsed(), shares(site).await);
    Ok(begun.elapsed())
}

/// Holder and epoch of every lease.
async fn owners(site: &Site, ids: &[String]) -> Result<Vec<Value>> {
    let mut owners = Vec::new();
    for id in ids {
        let lease = lease(site, id).await?;
        owners.push(json!([lease["instance"], lease["epoch"]]));
    }
    Ok(owners)
}

/// Waits until nothing moves any more.
async fn calm(site: &Site, ids: &[String]) -> Result<Vec<Value>> {
    let mut last = (owners(site, ids).await?, Instant::now());
    wait_for("nothing to move any more", Duration::from_secs(30), async || {
        let now = owners(site, ids).await.unwrap_or_default();
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(2)
    })
    .await?;
    Ok(last.0)
}

/// An instance that comes and goes again and again moves nothing.
async fn flap(site: &Site, instance: &str) -> Result<()> {
    for _ in 0..3 {
        let mut flapping = another(site, instance).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        flapping.kill()?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

#[tokio::test]
async fn replications_spread_and_stay_while_an_instance_flaps() -> Result<()> {
    let site = one(&[]).await?;
    let ids: Vec<String> = (1..=12).map(|n| format!("S{n}")).collect();
    for id in &ids {
        site.replicate(id, 5).await?;
    }
    let _two = another(&site, "two").await?;
    wait_spread(&site, 2, &ids).await?;
    let before = calm(&site, &ids).await?;
    flap(&site, "three").await?;
    assert_eq!(owners(&site, &ids).await?, before);
    for id in &ids {
        site.publish(id, 6..=10).await?;
        site.settled(id, 10).await?;
        verify(&site, id).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn two_hundred_replications_spread_over_three_instances() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let ids: Vec<String> = (1..=200).map(|n| format!("S{n}")).collect();
    for id in &ids {
        site.replicate(id, 3).await?;
    }
    let start = async |instance: &str| Service::builder(&site.control().url(), SITE).instance(instance).start().await;
    let two = start("two").await?;
    wait_spread(&site, 2, &ids).await?;
    calm(&site, &ids).await?;
    let three = start("three").await?;
    wait_spread(&site, 3, &ids).await?;
    let before = calm(&site, &ids).await?;

    let writes = async || -> Result<u64> {
        let mut raw = Raw::connect(&site.control().url()).await?;
        raw.stream_state("KV_REPLICATOR_LEASES").await?["last_seq"].as_u64().context("a sequence")
    };
    let services = [&site.service, &two, &three];
    let cpu = || services.map(|service| service.usage().cpu_seconds);
    let (first, used, begun) = (writes().await?, cpu(), Instant::now());
    tokio::time::sleep(Duration::from_secs(15)).await;
    let seconds = begun.elapsed().as_secs_f64();
    let rate = (writes().await? - first) as f64 / seconds;
    // Of each write an instance sends its share, gets its answers, and sees all by its watch.
    let messages = rate / 3.0 * 2.0 + rate;
    let busy: Vec<f64> = cpu().iter().zip(used).map(|(now, before)| (now - before) / seconds * 100.0).collect();
    println!("{messages:.1} messages of leases a second and instance; {busy:.1?} % of a core for everything");
    ensure!(messages < 5.0, "{messages}");
    ensure!(busy.iter().all(|percent| *percent < 1.0), "{busy:?}");

    flap(&site, "four").await?;
    assert_eq!(owners(&site, &ids).await?, before);
    for id in &ids {
        site.publish(id, 4..=6).await?;
    }
    for id in &ids {
        site.settled(id, 6).await?;
        verify(&site, id).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_process_whose_name_another_one_took_stops() -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    let second = another(&site, "one").await?;
    let status = site.service.wait(LIMIT).await?;
    assert_eq!(status.code(), Some(1), "{}", site.service.log());
    assert!(site.service.log().contains("another process is instance `one` now"), "{}", site.service.log());
    let (_, last) = copies_again(&site, "ORDERS", 10).await?;
    site.settled("ORDERS", last).await.with_context(|| second.log())?;
    verify(&site, "ORDERS").await
}

#[tokio::test]
async fn removing_a_session_or_a_lease_moves_the_replication() -> Result<()> {
    let site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    let first = led_by(&site, "ORDERS", "one").await?["epoch"].as_u64();
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    let mut last = 10;
    leases.delete("session.one").await?;
    let newer = async |than: Option<u64>| {
        let row =
            site.row_when("ORDERS", "runs again", |row| row["epoch"].as_u64() > than && row["state"] == "running");
        row.await.map(|row| row["epoch"].as_u64())
    };
    let second = newer(first).await?;
    last = copies_again(&site, "ORDERS", last).await?.1;
    let mut record = lease(&site, "ORDERS").await?;
    record["instance"] = json!("");
    record["note"] = json!("moved by hand");
    leases.put("lease.ORDERS", record.to_string().into()).await?;
    newer(second).await?;
    last = copies_again(&site, "ORDERS", last).await?.1;
    let record = lease(&site, "ORDERS").await?;
    assert_eq!((&record["instance"], &record["note"]), (&json!("one"), &json!("moved by hand")));
    leases.put("lease.ORDERS", "no json".into()).await?;
    wait_for("a lease again", LIMIT, async || lease(&site, "ORDERS").await.is_ok_and(|l| l["instance"] == "one"))
        .await?;
    copies_again(&site, "ORDERS", last).await?;
    verify(&site, "ORDERS").await
}

#[tokio::test]
async fn records_of_a_newer_version_are_not_overwritten() -> Result<()> {
    let mut site = one(&[]).await?;
    site.replicate("ORDERS", 10).await?;
    led_by(&site, "ORDERS", "one").await?;
    site.stop().await?;
    let positions = site.bucket("REPLICATOR_POSITIONS").await?;
    let mut record = site.position("ORDERS").await?.context("a record")?;
    record["version"] = json!(2);
    record["later"] = json!({"x": [1]});
    positions.put("ORDERS", record.to_string().into()).await?;
    site.service.restart().await?;
    let row = site.row_when("ORDERS", "says why", |row| row["last_error"]["message"].is_string()).await?;
    let message = row["last_error"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("version 2") && message.contains("newer program"), "{message}");
    site.publish("ORDERS", 11..=20).await?;
    assert_eq!(site.position("ORDERS").await?.as_ref(), Some(&record));
    record["version"] = json!(1);
    positions.put("ORDERS", record.to_string().into()).await?;
    site.settled("ORDERS", 20).await?;
    wait_for("the position to be saved", LIMIT, async || {
        site.position("ORDERS").await.is_ok_and(|saved| saved.is_some_and(|saved| saved["source"]["seq"] == 20))
    })
    .await?;
    assert_eq!(site.position("ORDERS").await?.context("a record")?["later"], json!({"x": [1]}));
    verify(&site, "ORDERS").await
}
