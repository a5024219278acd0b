//! Old and new replicators in turn: through a chain of two hops, and in a group with Choria's election.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::{TempDir, tempdir};
use tokio::time::sleep;

use super::messages;
use super::old::{OldHop, has_all, make_election_bucket};
use crate::harness::raw::header_values;
use crate::harness::{LIMIT, Raw, Role, Server, Service, wait_for};

/// Of the election's bucket. A leader that dies is followed within this and two seconds.
const ELECTION_TTL: Duration = Duration::from_secs(5);

fn file(folder: &TempDir, hop: &OldHop<'_>, more: &str) -> Result<PathBuf> {
    let (from, to, site) = (hop.from.url(), hop.to.url(), hop.site);
    let text = format!("name: {site}\nstreams:\n  - stream: S\n    source_url: {from}\n    target_url: {to}\n{more}");
    let path = folder.path().join(format!("{site}.yaml"));
    fs::write(&path, text)?;
    Ok(path)
}

/// Waits until the consumer of the way back continues after this sequence.
async fn handed_back(hop: &OldHop<'_>, seq: u64, service: &Service) -> Result<()> {
    let is_there = async || {
        let consumer = hop.consumer().await.unwrap_or_default();
        consumer["delivered"]["stream_seq"] == seq && consumer["num_ack_pending"] == 0
    };
    wait_for("the consumer of the old replicator", LIMIT, is_there).await.with_context(|| service.log())
}

#[tokio::test]
async fn a_chain_of_two_hops_there_and_back() -> Result<()> {
    let servers = (Server::start(Role::Source), Server::start(Role::Control), Server::start(Role::Target));
    let (source, middle, target) = tokio::try_join!(servers.0, servers.1, servers.2)?;
    let first = OldHop { from: &source, to: &middle, site: "A" };
    let second = OldHop { from: &middle, to: &target, site: "B" };
    let mut from = Raw::connect(&source.url()).await?;
    let mut to = Raw::connect(&target.url()).await?;
    for server in [&source, &middle, &target] {
        Raw::connect(&server.url()).await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    }
    from.publish_all(messages("s", 1, 60)).await?;
    first.copies(30, true).await?;
    second.copies(20, true).await?;

    let folder = tempdir()?;
    let mut services = vec![];
    for hop in [&first, &second] {
        services.push(Service::replicate(&file(&folder, hop, "")?).spawn()?);
    }
    has_all(&mut to, 60).await.with_context(|| services[1].log())?;
    from.publish_all(messages("s", 61, 80)).await?;
    has_all(&mut to, 80).await.with_context(|| services[1].log())?;
    for (hop, service) in [&first, &second].into_iter().zip(&mut services) {
        handed_back(hop, 80, service).await?;
        ensure!(service.stop().await?.success(), "{}", service.log());
    }
    from.publish_all(messages("s", 81, 90)).await?;
    first.copies(10, false).await?;
    second.copies(10, false).await?;
    has_all(&mut to, 90).await?;
    for (message, seq) in to.read_stream("S").await?.iter().zip(1..) {
        let hops = header_values(&message.header, "Choria-SR-Source");
        let right = hops.len() == 2 && hops[0].starts_with(&format!("S {seq} A A ")) && hops[1].starts_with("S ");
        ensure!(right && hops[1].contains(&format!(" {seq} B B ")), "{seq}: {hops:?}");
    }
    Ok(())
}

/// Publishes to a stream until it is stopped.
struct SteadyLoad {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Result<()>>,
}

impl SteadyLoad {
    async fn start(url: &str) -> Result<Self> {
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, mut raw) = (stop.clone(), sent.clone(), Raw::connect(url).await?);
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::SeqCst) {
                let from = count.load(Ordering::SeqCst) + 1;
                raw.publish_all(messages("s", from, from + 9)).await?;
                count.store(from + 9, Ordering::SeqCst);
                sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        });
        Ok(Self { stop, sent, task })
    }

    /// Stops it; how many messages there are.
    async fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await??;
        Ok(self.sent.load(Ordering::SeqCst))
    }
}

/// Waits until the target has so many messages more than now.
async fn grows(raw: &mut Raw, by: u64) -> Result<()> {
    let count = async |raw: &mut Raw| raw.stream_state("S").await.ok().and_then(|state| state["messages"].as_u64());
    let enough = count(raw).await.unwrap_or_default() + by;
    let grown = async || count(raw).await.is_some_and(|messages| messages >= enough);
    wait_for("more copies", LIMIT, grown).await
}

#[tokio::test]
#[ignore = "waits for the TTL of an election: over 20 s"]
async fn four_hand_overs_of_an_election_under_load() -> Result<()> {
    let servers = (Server::start(Role::Source), Server::start(Role::Target));
    let (source, target) = tokio::try_join!(servers.0, servers.1)?;
    let old = OldHop { from: &source, to: &target, site: "A" };
    let (mut from, mut to) = (Raw::connect(&source.url()).await?, Raw::connect(&target.url()).await?);
    for raw in [&mut from, &mut to] {
        raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    }
    make_election_bucket(&mut from, ELECTION_TTL).await?;
    let folder = tempdir()?;
    let file = file(&folder, &old, "    leader_election_name: NEW\n")?;
    let load = SteadyLoad::start(&source.url()).await?;
    for killed in [false, true] {
        // The new one stands by while the old one leads, and takes over when it stops or dies.
        let (led, service) = tokio::join!(old.leads(100, killed), async {
            grows(&mut to, 1).await?;
            Service::replicate(&file).spawn()
        });
        led?;
        let mut service = service?;
        grows(&mut to, 200).await.with_context(|| service.log())?;
        ensure!(service.stop().await?.success(), "{}", service.log());
    }
    old.leads(100, false).await?;
    let sent = load.stop().await?;
    let service = Service::replicate(&file).spawn()?;
    has_all(&mut to, sent).await.with_context(|| service.log())?;
    let times: Vec<_> = to.read_stream("S").await?.iter().map(|message| message.time).collect();
    let longest = times.windows(2).map(|pair| Duration::from_nanos(pair[1].saturating_sub(pair[0]))).max();
    println!("without a copy for {longest:?} at the most");
    ensure!(longest.is_some_and(|longest| longest < ELECTION_TTL + Duration::from_secs(2)), "{longest:?}");
    Ok(())
}
