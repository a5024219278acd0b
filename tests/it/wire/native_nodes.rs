//! Native feeds of replicated targets: a leafnode connection to each server that the document names, and the loss of any of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use stream_replicator::native::FeedSubjects;
use tokio::{task::JoinHandle, time::Instant};

use super::native_faults::{ASKS_WITHIN, equal, load_until};
use crate::harness::{
    Cluster, End, LIMIT, SITE, Server, Site,
    client::{http_get, request},
    site::merged,
    wait_for,
};

const STREAM: &str = "ORDERS";
/// What the URL for the leafnode connections begins with.
const LEAF_USER: &str = "nats-leaf://leaf:leaf@";

/// A feed of a replicated target while messages are published, and what it is judged by.
struct Fed {
    cluster: Cluster,
    site: Site,
    kind: &'static str,
    last: Arc<AtomicU64>,
    load: JoinHandle<Result<()>>,
}

impl Fed {
    /// `leafs` makes the URL for the leafnode connections of that with all servers.
    async fn begin(kind: &'static str, version: &str, leafs: impl Fn(&str) -> String) -> Result<Self> {
        let subjects = FeedSubjects::of(SITE, STREAM);
        // The leaf user may do no more than what `config validate` says.
        let users = format!(
            "accounts {{ A: {{ jetstream: enabled, users: [ {{ user: admin, password: admin }}, \
             {{ user: leaf, password: leaf, {} }} ] }} }}\nno_auth_user: admin",
            subjects.permissions()
        );
        let (cluster, leaf_url) = Cluster::with_leafnode_ports_and(Some(version), &users).await?;
        let leaf_url = leaf_url.replace("nats-leaf://", LEAF_USER);
        let site = Site::small().await?;
        site.source_stream(STREAM, json!({})).await?;
        let origin = json!({"name": STREAM, "external": {"api": subjects.api(), "deliver": subjects.deliver()}});
        let config = if kind == "mirror" { json!({ "mirror": origin }) } else { json!({ "sources": [origin] }) };
        cluster.create_stream(STREAM, config).await?;
        let fields = json!({"kind": kind, "target_url": cluster.url(), "target_leaf_url": leafs(&leaf_url)});
        site.add(STREAM, fields.clone()).await?;
        let report = request(&site.client, "replicator.config.validate", site.document_with(STREAM, fields)).await?;
        let printed = serde_json::Value::from(subjects.permissions()).to_string();
        ensure!(report.to_string().contains(printed.trim_matches('"')), "{printed} is not in {report}");
        let last = Arc::new(AtomicU64::new(u64::MAX));
        let load = load_until(site.source.url(), last.clone(), 20, Duration::from_millis(30));
        let fed = Self { cluster, site, kind, last, load };
        fed.moves("begin").await?;
        Ok(fed)
    }

    async fn position(&self) -> u64 {
        self.site.row(STREAM).await.unwrap_or_default()["position"]["source_seq"].as_u64().unwrap_or_default()
    }

    /// Waits until more is stored.
    async fn moves(&self, what: &str) -> Result<()> {
        let (before, begun) = (self.position().await, Instant::now());
        let moved = wait_for(what, ASKS_WITHIN, async || self.position().await > before).await;
        eprintln!("{}: {what}: flows again after {:?}", self.kind, begun.elapsed());
        moved.with_context(|| self.site.service.log())
    }

    /// Ends the load, and compares both sides.
    async fn finish(self) -> Result<()> {
        let Self { cluster, site, kind, last, load } = self;
        last.store(0, Ordering::Relaxed);
        load.await??;
        let published = site.source().await?.stream_state(STREAM).await?["last_seq"].as_u64().context("a sequence")?;
        site.settled_within(STREAM, published, ASKS_WITHIN).await?;
        let from = site.source().await?.read_stream(STREAM).await?;
        equal(kind, &from, &cluster.read_stream(STREAM).await?, &site.service.log())
    }
}

/// How many leafnode connections of the feed a server has.
async fn leafs(server: &Server) -> Result<usize> {
    let log = server.log();
    let (_, monitor) = log.rsplit_once("Starting http monitor on ").context("no monitor")?;
    let (_, body) = http_get(monitor.lines().next().unwrap_or_default(), "/leafz").await?;
    let leafz: Value = serde_json::from_str(&body)?;
    let name = format!("sr-{SITE}-{STREAM}");
    let all = leafz["leafs"].as_array().cloned().unwrap_or_default();
    Ok(all.iter().filter(|leaf| leaf["name"] == name.as_str()).count())
}

/// Each server ends once, whichever of them leads the stream or has the connection over which messages go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loss_of_any_server_of_the_target_is_short() -> Result<()> {
    for (kind, version) in [("mirror", "2.15.1"), ("source", "2.15.1"), ("mirror", "2.10.26")] {
        let mut fed = Fed::begin(kind, version, str::to_owned).await?;
        for server in 0..3 {
            let leader = fed.cluster.leader(STREAM).await;
            fed.cluster.end(server, End::Killed).await?;
            fed.moves(&format!("{version}: without server {server}, {leader:?} led")).await?;
            fed.cluster.servers[server].restart().await?;
            fed.cluster.wait_leaders(&[STREAM], None).await?;
            fed.cluster.wait_current(&[STREAM]).await?;
            fed.moves("with it").await?;
        }
        fed.finish().await.context(version)?;
    }
    Ok(())
}

/// All three servers pass each request on: as many consumers begin as the target has asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_answered_once() -> Result<()> {
    let fed = Fed::begin("mirror", "2.15.1", str::to_owned).await?;
    let begun = || fed.site.service.log().matches("the target asked for messages").count();
    for round in 1..=3 {
        let before = begun();
        fed.cluster.step_down(STREAM).await?;
        fed.moves(&format!("stepdown {round}")).await?;
        let asked = begun() - before;
        ensure!((1..=2).contains(&asked), "{asked} consumers for one new leader\n{}", fed.site.service.log());
    }
    fed.finish().await
}

/// Two of the three are named, one of them twice; the servers name all three to each other and to the feed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_named_server_has_one_connection() -> Result<()> {
    let named = |url: &str| {
        let hosts: Vec<&str> = url.trim_start_matches(LEAF_USER).split(',').collect();
        format!("{LEAF_USER}{},{},{}", hosts[0], hosts[0].replace("127.0.0.1", "localhost"), hosts[1])
    };
    let mut fed = Fed::begin("mirror", "2.15.1", named).await?;
    let connected = async |fed: &Fed, expect: [usize; 3]| {
        let all = async || {
            for (server, expect) in fed.cluster.servers.iter().zip(expect) {
                if !leafs(server).await.is_ok_and(|found| found == expect) {
                    return false;
                }
            }
            true
        };
        wait_for(&format!("{expect:?} leafnode connections"), LIMIT, all).await.with_context(|| fed.site.service.log())
    };
    connected(&fed, [1, 1, 0]).await?;
    for server in [1, 0] {
        fed.cluster.end(server, End::Killed).await?;
        fed.moves("without one").await?;
        fed.cluster.servers[server].restart().await?;
        connected(&fed, [1, 1, 0]).await?;
    }
    let log = fed.site.service.log();
    ensure!(!log.contains("another feed of this replication took over"), "{log}");
    fed.finish().await
}

/// A replicated target that refuses new messages at a limit checks the limit when its replicas agree on a message. What it was given
/// beyond the limit would be lost without a word: it is given no more than it has room for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_replicated_target_loses_nothing() -> Result<()> {
    const ALL: u64 = 400;
    for (version, limit) in [("2.15.1", json!({"max_msgs": 100})), ("2.12.8", json!({"max_bytes": 20_000}))] {
        let (cluster, leaf_url) = Cluster::with_leafnode_ports_of(Some(version)).await?;
        let site = Site::small().await?;
        site.source_stream(STREAM, json!({})).await?;
        site.publish(STREAM, 1..=ALL).await?;
        let subjects = FeedSubjects::of(SITE, STREAM);
        let origin = json!({"name": STREAM, "external": {"api": subjects.api(), "deliver": subjects.deliver()}});
        let config = merged(json!({"sources": [origin], "discard": "new"}), limit);
        cluster.create_stream(STREAM, config).await?;
        site.add(STREAM, json!({"kind": "source", "target_url": cluster.url(), "target_leaf_url": leaf_url})).await?;
        let mut found: Vec<u64> = Vec::new();
        while found.last().is_none_or(|last| *last < ALL) {
            let full_or_done = async || {
                let row = site.row(STREAM).await.unwrap_or_default();
                let error = row["last_error"]["message"].as_str().unwrap_or_default();
                let stops = row["state"] == "held" && error.contains("is full") || row["position"]["source_seq"] == ALL;
                let info = cluster.ask(&format!("STREAM.INFO.{STREAM}"), &Value::Null).await.unwrap_or_default();
                // The row may be one from before there was room.
                stops && info["state"]["messages"].as_u64().is_some_and(|messages| messages > 0)
            };
            let waited = wait_for("the target to be full", ASKS_WITHIN, full_or_done).await;
            waited.with_context(|| format!("{version}, {} found\n{}", found.len(), site.service.log()))?;
            let stored = cluster.read_stream(STREAM).await?;
            for message in &stored {
                found.push(String::from_utf8_lossy(&message.payload).parse()?);
            }
            // Consumers take what is there.
            let last = stored.last().with_context(|| format!("{version}\n{}", site.service.log()))?.seq;
            let purged = cluster.ask(&format!("STREAM.PURGE.{STREAM}"), &json!({"seq": last + 1})).await;
            ensure!(purged.as_ref().is_some_and(|purged| purged["success"] == true), "{purged:?}");
        }
        let wrong = found.iter().zip(1..).find(|(found, expect)| **found != *expect);
        ensure!(found.len() as u64 == ALL && wrong.is_none(), "{version}: {} found, {wrong:?}", found.len());
    }
    Ok(())
}
