//! A source or a target that lost its end: an older copy of its store is put back under a killed server.

use std::ops::RangeInclusive;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{
    Cluster, Copies, Direction, End, Expect, Kind, LIMIT, Outgoing, Proxy, Role, SITE, Server, Site, request,
    wait_value,
};

const STREAM: &str = "S";

/// Copies 60 messages, keeps the store of one side, copies up to 100, and stops there.
async fn kept_at_60(fields: Value, side: fn(&mut Site) -> &mut Server) -> Result<Site> {
    let mut site = Site::start().await?;
    site.source_stream(STREAM, json!({})).await?;
    site.publish(STREAM, 1..=60).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 60).await?;
    side(&mut site).keep("old").await?;
    site.publish(STREAM, 61..=100).await?;
    site.settled(STREAM, 100).await?;
    side(&mut site).keep("new").await?;
    site.settled(STREAM, 100).await?;
    Ok(site)
}

async fn held(site: &Site) -> Result<Value> {
    site.row_when(STREAM, "is held", |row| row["state"] == "held").await
}

async fn update(site: &Site, fields: Value) -> Result<()> {
    request(&site.client, "replicator.config.update", site.document_with(STREAM, fields)).await.map(drop)
}

/// Payloads at the target by sequence.
async fn stored(site: &Site) -> Result<Vec<(u64, u64, Vec<u8>)>> {
    let stored = site.target().await?.read_stream(STREAM).await?;
    Ok(stored.into_iter().map(|message| (message.seq, message.time, message.payload)).collect())
}

fn only_at_target(seqs: RangeInclusive<u64>) -> Value {
    let (from, to) = (*seqs.start(), *seqs.end());
    json!({"from": from, "to": to, "target_from": from, "target_to": to, "messages": to - from + 1})
}

#[tokio::test]
async fn a_source_put_back_holds_the_copy_until_it_may_follow() -> Result<()> {
    let mut site = kept_at_60(json!({"on_source_loss": "hold"}), |site| &mut site.source).await?;
    let before = stored(&site).await?;
    site.source.put_back("old").await?;
    let row = held(&site).await?;
    assert_eq!(row["only_at_target"], only_at_target(61..=100), "{row}");
    let error = row["last_error"]["message"].as_str().context("no error")?;
    assert!(error.contains("61 to 100") && error.contains("`on_source_loss`") && error.contains("`follow`"), "{error}");
    let event = site.events.wait("source-reset", STREAM).await?;
    assert_eq!((&event["action"], &event["only_at_target"]), (&json!("held"), &only_at_target(61..=100)), "{event}");
    // Without the chain nothing proves that all before 60 is there: what is there is recognized, message by message.
    assert!(event["saved"] == 100 && event["resumed"].as_u64().is_some_and(|seq| seq <= 60), "{event}");
    // Neither a restart nor new messages in the places of those that are lost change that.
    site.publish(STREAM, 901..=960).await?;
    site.stop().await?;
    site.service.restart().await?;
    let row = held(&site).await?;
    assert_eq!(row["only_at_target"], only_at_target(61..=100), "{row}");
    assert_eq!(stored(&site).await?, before);
    // Until somebody says so.
    update(&site, json!({"on_source_loss": "follow"})).await?;
    let row = site.settled(STREAM, 120).await?;
    assert_eq!(row["only_at_target"], only_at_target(61..=100), "{row}");
    let after = stored(&site).await?;
    assert_eq!((after.len(), &after[..100]), (160, &before[..]));
    assert!(site.events.told("source-reset").iter().any(|event| event["action"] == "followed"));
    // It is remembered over a restart.
    site.stop().await?;
    site.service.restart().await?;
    site.publish(STREAM, 961..=970).await?;
    let row = site.settled(STREAM, 130).await?;
    assert_eq!((&row["only_at_target"], stored(&site).await?.len()), (&only_at_target(61..=100), 170), "{row}");
    Ok(())
}

/// Without a position record the target alone says that the source lost its end.
#[tokio::test]
async fn a_source_put_back_holds_the_copy_also_without_a_record() -> Result<()> {
    let mut site = kept_at_60(json!({"on_source_loss": "hold"}), |site| &mut site.source).await?;
    site.stop().await?;
    site.bucket("REPLICATOR_POSITIONS").await?.delete(STREAM).await?;
    site.source.put_back("old").await?;
    site.service.restart().await?;
    let row = held(&site).await?;
    assert_eq!(row["only_at_target"], only_at_target(61..=100), "{row}");
    update(&site, json!({"on_source_loss": "follow"})).await?;
    site.publish(STREAM, 901..=910).await?;
    let row = site.settled(STREAM, 70).await?;
    assert_eq!((&row["only_at_target"], stored(&site).await?.len()), (&only_at_target(61..=100), 110), "{row}");
    Ok(())
}

#[tokio::test]
async fn a_loss_that_holds_is_reported_once_whatever_else_arrives() -> Result<()> {
    let mut site = kept_at_60(json!({"on_source_loss": "hold"}), |site| &mut site.source).await?;
    site.source.put_back("old").await?;
    let mut row = held(&site).await?;
    for last in [905, 915] {
        site.publish(STREAM, last - 4..=last).await?;
        let errors = row["counters"]["errors"].as_u64().context("no errors")?;
        request(&site.client, "replicator.retry", json!({"replication": STREAM})).await?;
        let again = |row: &Value| row["state"] == "held" && row["counters"]["errors"].as_u64() > Some(errors);
        row = site.row_when(STREAM, "is held again", again).await?;
    }
    site.events.all("source-reset", 1).await?;
    site.events.all("held", 1).await.map(drop)
}

#[tokio::test]
async fn a_source_that_is_restored_ends_the_hold_without_a_trace() -> Result<()> {
    let mut site = kept_at_60(json!({"on_source_loss": "hold"}), |site| &mut site.source).await?;
    site.source.put_back("old").await?;
    held(&site).await?;
    site.source.put_back("new").await?;
    site.publish(STREAM, 101..=110).await?;
    let row = site.settled(STREAM, 110).await?;
    assert_eq!(row["only_at_target"], Value::Null, "{row}");
    assert_eq!(site.events.told("source-reset").len(), 1);
    site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await
}

#[tokio::test]
async fn a_source_put_back_is_followed_by_default() -> Result<()> {
    let mut site = kept_at_60(json!({}), |site| &mut site.source).await?;
    let before = stored(&site).await?;
    site.source.put_back("old").await?;
    let event = site.events.wait("source-reset", STREAM).await?;
    assert_eq!(
        (&event["action"], &event["only_at_target"]),
        (&json!("followed"), &only_at_target(61..=100)),
        "{event}"
    );
    site.publish(STREAM, 901..=910).await?;
    let row = site.settled(STREAM, 70).await?;
    assert_eq!(row["only_at_target"], only_at_target(61..=100), "{row}");
    let after = stored(&site).await?;
    assert_eq!((after.len(), &after[..100]), (110, &before[..]));
    Ok(())
}

#[tokio::test]
async fn a_deleted_or_recreated_source_leaves_the_target_alone() -> Result<()> {
    for on_loss in ["hold", "follow"] {
        let site = Site::start().await?;
        let mut raw = site.source_stream(STREAM, json!({})).await?;
        site.publish(STREAM, 1..=50).await?;
        site.add(STREAM, json!({"on_source_loss": on_loss})).await?;
        site.settled(STREAM, 50).await?;
        let before = stored(&site).await?;
        raw.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
        held(&site).await?;
        site.source_stream(STREAM, json!({})).await?;
        site.publish(STREAM, 1..=10).await?;
        let lost = |row: &Value| row["only_at_target"] == only_at_target(1..=50);
        if on_loss == "hold" {
            site.row_when(STREAM, "is held by the loss", |row| row["state"] == "held" && lost(row)).await?;
            assert_eq!(stored(&site).await?, before);
        } else {
            let row = site.settled(STREAM, 10).await?;
            assert!(lost(&row), "{row}");
            let after = stored(&site).await?;
            assert_eq!((after.len(), &after[..50]), (60, &before[..]));
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_target_put_back_gets_what_it_lost_again() -> Result<()> {
    for on_loss in ["hold", "follow"] {
        let mut site = kept_at_60(json!({"on_source_loss": on_loss}), |site| &mut site.target).await?;
        site.target.put_back("old").await?;
        site.events.wait("target-reset", STREAM).await?;
        site.publish(STREAM, 101..=110).await?;
        let row = site.settled(STREAM, 110).await?;
        assert_eq!(row["only_at_target"], Value::Null, "{row}");
        site.events.quiet(&["source-reset"])?;
        site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE)).await?;
    }
    Ok(())
}

/// The cluster heals a replica by itself: nothing is lost, and nothing is held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_damaged_replica_of_three_on_either_side_is_no_loss() -> Result<()> {
    let (source, target) = tokio::try_join!(Cluster::start(Role::Source), Cluster::start(Role::Target))?;
    let mut copies = Copies::start(source, target, &[Kind::Exclusive], json!({"on_source_loss": "hold"})).await?;
    for at_source in [true, false] {
        damage(if at_source { &mut copies.source } else { &mut copies.target }).await?;
        copies.wait_leaders().await?;
        copies.wait_current().await?;
        copies.wait_moving("a damaged replica", Instant::now(), LIMIT).await?;
    }
    copies.verify().await?;
    copies.events.quiet(&["source-reset", "target-reset", "gap"])
}

/// One server of three is killed, and has an older store when it is back.
async fn damage(cluster: &mut Cluster) -> Result<()> {
    cluster.end(0, End::Stopped).await?;
    cluster.servers[0].snapshot("old")?;
    cluster.servers[0].restart().await?;
    let streams: Vec<String> = streams(cluster).await?;
    let streams: Vec<&str> = streams.iter().map(String::as_str).collect();
    cluster.wait_leaders(&streams, None).await?;
    cluster.wait_current(&streams).await?;
    cluster.servers[0].put_back("old").await
}

async fn streams(cluster: &Cluster) -> Result<Vec<String>> {
    let ask = async || cluster.ask("STREAM.NAMES", &json!({})).await;
    let names = wait_value("names of streams", LIMIT, ask).await?;
    Ok(serde_json::from_value(names["streams"].clone())?)
}

/// A message that was refused waits while as many later ones were stored as could be in flight with it and, when all
/// before it had settled, after it; then the target loses its end.
#[tokio::test]
async fn a_rejected_message_is_found_after_all_that_was_in_flight() -> Result<()> {
    for (limit, later) in [(None, 12_000), (Some(20_000), 25_000)] {
        let limits = |messages: Option<u64>| json!({"limits": {"messages_in_flight": messages.unwrap_or(8_192)}});
        let mut site = Site::start().await?;
        site.source_stream(STREAM, json!({})).await?;
        site.target_stream(STREAM, json!({})).await?;
        site.publish(STREAM, 1..=10).await?;
        site.add(STREAM, limits(limit)).await?;
        site.settled(STREAM, 10).await?;
        site.stop().await?;
        let last = site.publish(STREAM, 11..=11 + later).await?;
        let source = site.source().await?.read_stream(STREAM).await?;
        let copies = source.iter().filter(|message| message.seq > 10 && message.seq != 12).map(|m| {
            let provenance = format!("Choria-SR-Source: {STREAM} {} {SITE} {SITE} {}", m.seq, m.time / 1_000_000);
            let id = format!("Nats-Msg-Id: by-hand-{}", m.seq);
            Outgoing::new(&*m.subject, m.payload.clone()).with_lines(&[&provenance, &id])
        });
        site.target().await?.publish_all(copies).await?;
        let mut record = site.position(STREAM).await?.context("no position record")?;
        record["target"]["seq"] = (2 * last).into();
        site.bucket("REPLICATOR_POSITIONS").await?.put(STREAM, serde_json::to_vec(&record)?.into()).await?;
        // The next run has a smaller limit.
        let document = site.document_with(STREAM, limits(limit.map(|_| 5)));
        site.put(STREAM, serde_json::to_vec(&document)?).await?;
        site.service.restart().await?;
        let row = site.settled(STREAM, last).await?;
        assert_eq!(row["counters"]["copied"], 1, "{row}");
        site.verify(STREAM, &Expect::copy_of(STREAM).site(SITE).late_allowed()).await?;
    }
    Ok(())
}

/// The source's server closes a connection that does not answer its pings: it is kept alive while the target is searched.
#[tokio::test]
async fn a_long_search_at_the_target_keeps_the_source_connected() -> Result<()> {
    let pings = "ping_interval: \"500ms\"\nping_max: 1";
    let source = Server::builder(Role::Source).config(pings).start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let proxy = Proxy::start(site.target.port()).await?;
    let fields = json!({"target_mode": "shared", "target_url": proxy.url()});
    site.source_stream(STREAM, json!({})).await?;
    let mut target = site.target_stream(STREAM, json!({})).await?;
    site.publish(STREAM, 1..=10).await?;
    site.add(STREAM, fields).await?;
    site.settled(STREAM, 10).await?;
    request(&site.client, "replicator.pause", json!({"replication": STREAM})).await?;
    site.row_when(STREAM, "is paused", |row| row["state"] == "paused").await?;
    // Others write: their headers take ten seconds to read.
    let filler = format!("Filler: {}", "x".repeat(900));
    let foreign = (0..2_000).map(|i| Outgoing::new(format!("s.foreign.{i}"), []).with_lines(&[&filler]));
    target.publish_all(foreign).await?;
    // A new connection: the source's server ends those that answer no PING, as ours did while it published to the target.
    site.source().await?.publish(&Outgoing::new("s.last", "last")).await?;
    proxy.throttle(&[Direction::ToClient], Some(200_000));
    request(&site.client, "replicator.resume", json!({"replication": STREAM})).await?;
    let row = site.settled(STREAM, 11).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    Ok(())
}
