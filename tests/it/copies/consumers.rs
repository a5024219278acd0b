//! What is left of our own consumers at the source, the target and the buckets: never more than those of one run.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{Expect, LIMIT, Proxy, Raw, SITE, Service, Site, request, site::merged, wait_for, wait_value};

const BUCKETS: [&str; 4] =
    ["KV_REPLICATOR_CONFIG", "KV_REPLICATOR_POSITIONS", "KV_REPLICATOR_LEASES", "KV_REPLICATOR_STATE"];

/// How often the long tests do it, and the others.
const OFTEN: usize = 50;
const SOME: usize = 6;

async fn names(raw: &mut Raw, stream: &str) -> Result<Vec<String>> {
    let list = raw.api(&format!("CONSUMER.NAMES.{stream}"), Value::Null).await?;
    Ok(serde_json::from_value(list["consumers"].clone()).unwrap_or_default())
}

/// Waits until the stream has no more consumers than `most`.
async fn at_most(raw: &mut Raw, stream: &str, most: usize) -> Result<()> {
    let mut last = Vec::new();
    let few = async || {
        last = names(raw, stream).await.unwrap_or_default();
        last.len() <= most
    };
    let waited = wait_for(&format!("`{stream}` to have at most {most} consumers"), LIMIT, few).await;
    waited.with_context(|| format!("{last:?}"))
}

/// The consumers of one run at the source, none at the target, and so many at each bucket.
async fn nothing_left(site: &Site, at_buckets: &[usize]) -> Result<()> {
    at_most(&mut site.source().await?, "ORDERS", 1).await?;
    at_most(&mut site.target().await?, "ORDERS", 0).await?;
    let mut control = Raw::connect(&site.control().url()).await?;
    for (bucket, most) in BUCKETS.iter().zip(at_buckets) {
        at_most(&mut control, bucket, *most).await?;
    }
    Ok(())
}

/// Consumers at each bucket of a service that runs.
async fn at_buckets(site: &Site) -> Result<Vec<usize>> {
    let mut control = Raw::connect(&site.control().url()).await?;
    let mut counts = Vec::new();
    for bucket in BUCKETS {
        counts.push(names(&mut control, bucket).await?.len());
    }
    Ok(counts)
}

/// `ORDERS` of the site by way of a proxy.
async fn through(site: &Site, config: Value) -> Result<Proxy> {
    let proxy = Proxy::start(site.source.port()).await?;
    site.source_stream("ORDERS", config).await?;
    site.publish("ORDERS", 1..=100).await?;
    site.add("ORDERS", json!({"source_url": proxy.url()})).await?;
    site.settled("ORDERS", 100).await?;
    Ok(proxy)
}

async fn cuts(count: usize) -> Result<()> {
    let site = Site::start().await?;
    let proxy = through(&site, json!({})).await?;
    let healthy = at_buckets(&site).await?;
    let mut last = 100;
    for _ in 0..count {
        proxy.drop_connections();
        site.publish("ORDERS", last + 1..=last + 10).await?;
        last += 10;
        site.settled("ORDERS", last).await?;
        // Before the server would remove a consumer by itself.
        let consumers = names(&mut site.source().await?, "ORDERS").await?;
        assert_eq!(consumers.len(), 1, "{consumers:?}");
    }
    nothing_left(&site, &healthy).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn cut_connections_leave_no_consumers() -> Result<()> {
    cuts(SOME).await
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn fifty_cut_connections_leave_no_consumers() -> Result<()> {
    cuts(OFTEN).await
}

/// `named`: with the same instance id each time; otherwise each process has one of its own.
async fn kills(count: usize, named: bool) -> Result<()> {
    let mut site = Site::start().await?;
    site.replicate("ORDERS", 100).await?;
    let healthy = at_buckets(&site).await?;
    site.stop().await?;
    at_most(&mut site.source().await?, "ORDERS", 0).await?;
    let mut control = Raw::connect(&site.control().url()).await?;
    for bucket in BUCKETS {
        at_most(&mut control, bucket, 0).await?;
    }
    let url = site.service_url();
    let mut last = 100;
    for _ in 0..count {
        let builder = Service::builder(&url, SITE).args(["--lease-ttl", "1s"]);
        let builder = if named { builder.instance("one") } else { builder };
        let mut service = builder.start().await?;
        site.publish("ORDERS", last + 1..=last + 10).await?;
        last += 10;
        site.settled("ORDERS", last).await.with_context(|| service.log())?;
        let consumers = names(&mut site.source().await?, "ORDERS").await?;
        assert_eq!(consumers.len(), 1, "{consumers:?}\n{}", service.log());
        if named {
            // What the process before it left is deleted when it starts, not after a while.
            let now = at_buckets(&site).await?;
            assert!(now.iter().zip(&healthy).all(|(now, healthy)| now <= healthy), "{now:?}, not {healthy:?}");
        }
        service.kill()?;
    }
    let service = Service::builder(&url, SITE).args(["--lease-ttl", "1s"]).start().await?;
    site.settled("ORDERS", last).await.with_context(|| service.log())?;
    nothing_left(&site, &healthy).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn kills_leave_no_consumers() -> Result<()> {
    kills(SOME, true).await
}

#[tokio::test]
async fn kills_of_other_instances_leave_no_consumers() -> Result<()> {
    kills(SOME, false).await
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn fifty_kills_leave_no_consumers() -> Result<()> {
    kills(OFTEN, false).await
}

async fn stepdowns(count: usize) -> Result<()> {
    let mut site = Site::start().await?;
    site.replicate("ORDERS", 100).await?;
    site.stop().await?;
    let start = async |instance: &str| Service::builder(&site.service_url(), SITE).instance(instance).start().await;
    let (one, two) = (start("one").await?, start("two").await?);
    let logs = || format!("--- one\n{}\n--- two\n{}", one.log(), two.log());
    let running = |row: &Value| row["state"] == "running";
    site.row_when("ORDERS", "runs", running).await.with_context(logs)?;
    let mut last = 100;
    let healthy = at_buckets(&site).await?;
    for _ in 0..count {
        let asked = async || {
            let reply = request(&site.client, "replicator.stepdown", json!({"replication": "ORDERS"})).await;
            reply.ok().filter(|reply| !reply["to"].is_null())
        };
        let reply = wait_value("somebody to hand over to", LIMIT, asked).await?;
        let led = |row: &Value| row["leader"] == reply["to"] && row["state"] == "running";
        site.row_when("ORDERS", "is led by the other", led).await.with_context(logs)?;
        site.publish("ORDERS", last + 1..=last + 10).await?;
        last += 10;
        site.settled("ORDERS", last).await.with_context(logs)?;
        let consumers = names(&mut site.source().await?, "ORDERS").await?;
        assert_eq!(consumers.len(), 1, "{consumers:?}\n{}", logs());
    }
    nothing_left(&site, &healthy).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn stepdowns_leave_no_consumers() -> Result<()> {
    stepdowns(SOME).await
}

#[tokio::test]
#[ignore = "takes long: make check-long"]
async fn fifty_stepdowns_leave_no_consumers() -> Result<()> {
    stepdowns(OFTEN).await
}

#[tokio::test]
async fn a_source_with_one_consumer_does_not_wait_for_the_old_one() -> Result<()> {
    let mut site = Site::start().await?;
    // The server would remove the consumer of the run that was cut after 45 s: longer than anything here is waited for.
    let proxy = through(&site, json!({"max_consumers": 1})).await?;
    for last in [110, 120, 130] {
        proxy.drop_connections();
        site.publish("ORDERS", last - 9..=last).await?;
        let row = site.settled("ORDERS", last).await?;
        assert_ne!(row["state"], "held", "{row}");
    }
    assert_eq!(names(&mut site.source().await?, "ORDERS").await?.len(), 1);
    // To read the stream takes a consumer too.
    site.stop().await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn a_paused_look_leaves_room_for_the_only_consumer() -> Result<()> {
    let mut site = Site::start().await?;
    let proxy = through(&site, json!({"max_consumers": 1, "max_age": 60_000_000_000u64})).await?;
    request(&site.client, "replicator.pause", json!({"replication": "ORDERS"})).await?;
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    site.publish("ORDERS", 101..=110).await?;
    // The source is checked while the replication is paused, and such a check is cut off too.
    let known = |row: &Value| row["lag"]["messages"] == 10;
    site.row_when("ORDERS", "was checked at the source", known).await?;
    proxy.drop_connections();
    request(&site.client, "replicator.resume", json!({"replication": "ORDERS"})).await?;
    site.settled("ORDERS", 110).await?;
    site.stop().await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn an_instance_that_was_frozen_leaves_its_successor_alone() -> Result<()> {
    let mut site = Site::start().await?;
    site.replicate("ORDERS", 100).await?;
    site.stop().await?;
    let start = async |instance: &str| {
        Service::builder(&site.service_url(), SITE).instance(instance).args(["--lease-ttl", "2s"]).start().await
    };
    let (one, two) = (start("one").await?, start("two").await?);
    let logs = || format!("--- one\n{}\n--- two\n{}", one.log(), two.log());
    let running = |row: &Value| row["state"] == "running";
    let row = site.row_when("ORDERS", "runs", running).await.with_context(logs)?;
    let (leader, other) = if row["leader"] == "one" { (&one, "two") } else { (&two, "one") };
    leader.freeze()?;
    let led = |row: &Value| row["leader"] == other && row["state"] == "running";
    site.row_when("ORDERS", "is led by the other", led).await.with_context(logs)?;
    site.publish("ORDERS", 101..=200).await?;
    site.settled("ORDERS", 200).await.with_context(logs)?;
    leader.thaw()?;
    for last in [300, 400, 500] {
        site.publish("ORDERS", last - 99..=last).await?;
        site.settled("ORDERS", last).await.with_context(logs)?;
    }
    at_most(&mut site.source().await?, "ORDERS", 1).await.with_context(logs)?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS")).await
}

#[tokio::test]
async fn two_installations_of_one_name_keep_their_consumers() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 100).await?;
    let before = site.settled("ORDERS", 100).await?;
    let builder = || {
        let service = Service::builder(&site.service_url(), SITE).instance("other");
        service.args(["--bucket-prefix", "OTHER", "--prefix", "other"])
    };
    let mut other = builder().start().await?;
    site.target_stream("ARCHIVE", json!({"subjects": ["archive.>"]})).await?;
    let fields = json!({"target_stream": "ARCHIVE", "target_subject_prefix": "archive"});
    request(&site.client, "other.config.add", merged(site.document("ORDERS"), fields)).await?;
    site.copied("ARCHIVE", 100).await.with_context(|| other.log())?;
    let consumers = names(&mut site.source().await?, "ORDERS").await?;
    assert_eq!(consumers.len(), 2, "{consumers:?}");
    other.kill()?;
    let other = builder().start().await?;
    site.publish("ORDERS", 101..=200).await?;
    site.copied("ARCHIVE", 200).await.with_context(|| other.log())?;
    let after = site.settled("ORDERS", 200).await?;
    assert_eq!(after["counters"]["consumers_recreated"], before["counters"]["consumers_recreated"], "{after}");
    at_most(&mut site.source().await?, "ORDERS", 2).await
}
