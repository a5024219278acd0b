//! How fast requests are answered while servers are frozen, gone or busy: all within 3 s, questions within 500 ms.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::harness::client::request;
use crate::harness::server::free_port;
use crate::harness::site::merged;
use crate::harness::{Cluster, LIMIT, Role, Server, Site, wait_for};

/// Every request.
const ANSWER: Duration = Duration::from_secs(3);
/// What only asks what there is.
const QUESTION: Duration = Duration::from_millis(500);

/// The slowest answer of each endpoint.
#[derive(Debug, Default)]
struct Slowest(BTreeMap<String, Duration>);

impl Slowest {
    fn add(&mut self, endpoint: &str, time: Duration) {
        let slowest = self.0.entry(endpoint.to_owned()).or_default();
        *slowest = time.max(*slowest);
    }

    /// Prints what was measured and compares it with the bounds.
    fn judge(&self, when: &str) -> Result<()> {
        self.judge_beside(&Self::default(), when)
    }

    /// The same; three times what a reference took at the same time is fast enough too.
    fn judge_beside(&self, reference: &Self, when: &str) -> Result<()> {
        let shown: Vec<_> = self.0.iter().map(|(name, time)| format!("{name} {} ms", time.as_millis())).collect();
        println!("{when}: {}", shown.join(", "));
        ensure!(!self.0.is_empty(), "{when}: nothing was asked");
        for (endpoint, time) in &self.0 {
            let bound = if is_question(endpoint) { QUESTION } else { ANSWER };
            let bound = reference.0.get(endpoint).map_or(bound, |beside| bound.max(*beside * 3));
            ensure!(*time < bound, "{when}: {endpoint} was answered after {time:?}");
        }
        Ok(())
    }
}

fn is_question(endpoint: &str) -> bool {
    ["status", "config-list", "config-get"].contains(&endpoint)
}

/// Sends to each endpoint something that it has work with, in the order of the service's list.
async fn ask_all(site: &Site, id: &str, document: &Value) -> Result<Slowest> {
    let mut slowest = Slowest::default();
    for (endpoint, subject) in endpoints(site).await? {
        let body = match endpoint.rsplit('-').next().unwrap_or_default() {
            "add" | "update" | "validate" => document.to_string(),
            "list" | "schema" | "instances" => String::new(),
            "position" => json!({"replication": id, "source_seq": 1, "dry_run": true}).to_string(),
            // Not the one that the other requests are about.
            "delete" => "NONE".to_owned(),
            _ => id.to_owned(),
        };
        slowest.add(&endpoint, time_of(site, &subject, body).await?);
    }
    slowest.add("status", time_of(site, "replicator.status", String::new()).await?);
    // It must continue, whatever the order was.
    if slowest.0.contains_key("resume") {
        slowest.add("resume", time_of(site, "replicator.resume", id.to_owned()).await?);
    }
    Ok(slowest)
}

async fn endpoints(site: &Site) -> Result<Vec<(String, String)>> {
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    let endpoints = info["endpoints"].as_array().context("no endpoints")?.iter();
    endpoints.map(|endpoint| Ok((text(&endpoint["name"])?, text(&endpoint["subject"])?))).collect()
}

/// The time to any answer, an error too.
async fn time_of(site: &Site, subject: &str, body: String) -> Result<Duration> {
    let begun = Instant::now();
    crate::harness::client::ask(&site.client, subject, body.as_bytes()).await?;
    Ok(begun.elapsed())
}

#[tokio::test]
async fn requests_are_answered_while_source_or_target_is_frozen() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    for (when, server) in [("the source is frozen", &site.source), ("the target is frozen", &site.target)] {
        server.freeze()?;
        // First while the copy does not know it yet, then while it waits for an answer.
        ask_all(&site, "ORDERS", &site.document("ORDERS")).await?.judge(when)?;
        site.send("config.update", site.document_with("ORDERS", json!({"description": when}))).await?;
        let changed = site.document_with("ORDERS", json!({"max_age": "1h"}));
        ask_all(&site, "ORDERS", &changed).await?.judge(&format!("{when}, and the copy restarts"))?;
        let deleted = time_of(&site, "replicator.config.delete", "ORDERS".to_owned()).await?;
        println!("{when}: deleted after {deleted:?}");
        ensure!(deleted < ANSWER, "{deleted:?}");
        server.thaw()?;
        wait_for("the deletion", LIMIT, async || site.row("ORDERS").await.is_none()).await?;
        site.add("ORDERS", json!({})).await?;
        site.row_when("ORDERS", "runs again", |row| row["state"] == "running").await?;
    }
    Ok(())
}

/// A port that gives no answer, not even a refusal: no connection is accepted, and no more fit into the queue.
struct BlackHole {
    url: String,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl BlackHole {
    async fn open() -> Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(([127, 0, 0, 1], 0).into())?;
        let listener = socket.listen(1)?;
        let address = listener.local_addr()?;
        let mut queued = Vec::new();
        while let Ok(connected) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
            queued.push(connected?);
        }
        Ok(Self { url: format!("nats://{address}"), _listener: listener, _queued: queued })
    }
}

/// Where nothing works.
struct ServerTrouble {
    good: String,
    frozen: Server,
    closed: String,
    hole: BlackHole,
}

impl ServerTrouble {
    async fn begin(good: &Server) -> Result<Self> {
        let frozen = Server::start(Role::Source).await?;
        frozen.freeze()?;
        let closed = format!("nats://127.0.0.1:{}", free_port()?);
        Ok(Self { good: good.url(), frozen, closed, hole: BlackHole::open().await? })
    }

    /// Documents of all kinds of trouble, by turns, on either side or on both.
    fn document(&self, index: usize, fields: Value) -> Value {
        let frozen = self.frozen.url();
        let (good, frozen, closed, hole) =
            (self.good.as_str(), frozen.as_str(), self.closed.as_str(), self.hole.url.as_str());
        let (source, target) = match index % 6 {
            0 => (frozen, good),
            1 => (good, frozen),
            2 => (closed, closed),
            3 => (hole, hole),
            4 => (good, hole),
            _ => (frozen, closed),
        };
        merged(json!({"stream": format!("T{index}"), "source_url": source, "target_url": target}), fields)
    }
}

/// Many at once, of all kinds; another round changes the documents again.
async fn burst(site: &Site, document: impl Fn(usize) -> Value, round: usize) -> Result<Slowest> {
    let asked = stream::iter(0..200).map(|index| {
        let mut document = document(index);
        let (endpoint, subject, body) = match index % 4 {
            0 => ("status", "replicator.status", String::new()),
            1 => ("config-list", "replicator.config.list", String::new()),
            2 => ("config-get", "replicator.config.get", document["stream"].as_str().unwrap_or_default().to_owned()),
            _ => {
                document["description"] = format!("{index} in round {round}").into();
                ("config-update", "replicator.config.update", document.to_string())
            }
        };
        async move { anyhow::Ok((endpoint, time_of(site, subject, body).await?)) }
    });
    let times: Vec<_> = asked.buffer_unordered(200).try_collect().await?;
    let mut burst = Slowest::default();
    times.into_iter().for_each(|(endpoint, time)| burst.add(endpoint, time));
    Ok(burst)
}

#[tokio::test]
async fn requests_are_answered_while_fifty_replications_reach_nothing() -> Result<()> {
    const COUNT: usize = 50;
    let site = Site::start().await?;
    let trouble = ServerTrouble::begin(&site.source).await?;
    for index in 0..COUNT {
        site.source_stream(&format!("T{index}"), json!({})).await?;
    }
    site.replicate("ORDERS", 10).await?;
    let mut slowest = Slowest::default();
    for index in 0..COUNT {
        let document = trouble.document(index, json!({}));
        slowest.add("config-add", time_of(&site, "replicator.config.add", document.to_string()).await?);
    }
    for index in 0..6 {
        let document = trouble.document(index, json!({"max_age": "1h"}));
        for (endpoint, time) in ask_all(&site, &format!("T{index}"), &document).await?.0 {
            slowest.add(&endpoint, time);
        }
    }
    slowest.judge("fifty replications reach nothing")?;

    // What else runs on the machine makes answers later, never earlier: one of five bursts is enough, in time or not much
    // slower than the answers of a service beside it that has no trouble.
    let calm = Site::start().await?;
    for index in 0..COUNT {
        calm.source_stream(&format!("T{index}"), json!({})).await?;
        calm.add(&format!("T{index}"), json!({})).await?;
    }
    let mut judged = Ok(());
    for round in 0..5 {
        let (slowest, reference) = tokio::try_join!(
            burst(&site, |index| trouble.document(index % COUNT, json!({})), round),
            burst(&calm, |index| calm.document(&format!("T{}", index % COUNT)), round),
        )?;
        judged = slowest.judge_beside(&reference, &format!("200 requests at once, round {round}"));
        if judged.is_ok() {
            break;
        }
    }
    judged?;

    // All of them stop, and what works was never held up.
    let stopped = stream::iter((0..COUNT).map(|index| format!("T{index}")));
    let times = stopped.map(|id| time_of(&site, "replicator.config.delete", id)).buffer_unordered(COUNT);
    let times: Vec<_> = times.try_collect().await?;
    let mut slowest = Slowest::default();
    times.into_iter().for_each(|time| slowest.add("config-delete", time));
    slowest.judge("fifty deletions at once")?;
    site.publish("ORDERS", 11..=20).await?;
    site.settled("ORDERS", 20).await?;
    Ok(())
}

#[tokio::test]
async fn requests_are_answered_while_the_buckets_do_not_answer() -> Result<()> {
    let mut others = Cluster::start(Role::Control).await?.servers;
    let control = others.remove(0);
    let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let builder = Site::builder().on(source, target).control(control).args(["--bucket-replicas", "3"]);
    let mut site = builder.start().await?;
    site.replicate("ORDERS", 10).await?;
    let changed = site.document_with("ORDERS", json!({"max_age": "1h"}));

    // One of three cannot decide anything, and says so by saying nothing.
    others.iter().try_for_each(Server::freeze)?;
    ask_all(&site, "ORDERS", &changed).await?.judge("the buckets have just lost their quorum")?;
    ask_all(&site, "ORDERS", &changed).await?.judge("the buckets have no quorum")?;
    others.iter().try_for_each(Server::thaw)?;
    ask_all(&site, "ORDERS", &changed).await?.judge("the buckets are just back")?;
    others.iter_mut().try_for_each(Server::kill)?;
    ask_all(&site, "ORDERS", &changed).await?.judge("two of three servers are gone")?;
    for server in &mut others {
        server.restart().await?;
    }
    ask_all(&site, "ORDERS", &changed).await?.judge("they are just back")?;
    let possible = async || site.send("config.update", changed.clone()).await.is_ok_and(|reply| reply.error.is_none());
    wait_for("changes to be possible again", LIMIT, possible).await?;
    site.publish("ORDERS", 11..=20).await?;
    // A pause that was not answered in time may be taken later than what was to end it.
    let continues = async || {
        let resumed = site.ask("resume", "ORDERS").await.is_ok_and(|reply| reply.error.is_none());
        resumed && site.at_target("ORDERS").await.is_ok_and(|there| there == 20)
    };
    wait_for("the copy to continue", LIMIT, continues).await.with_context(|| site.service.log())?;
    site.settled("ORDERS", 20).await?;
    site.stop().await
}

#[tokio::test]
async fn a_restart_of_the_control_server_costs_seconds() -> Result<()> {
    let mut site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    for round in 0..3 {
        site.control_mut().restart().await?;
        let begun = Instant::now();
        wait_for("an answer", LIMIT, async || site.ask("status", "").await.is_ok()).await?;
        let back = begun.elapsed();
        let slowest = ask_all(&site, "ORDERS", &site.document("ORDERS")).await?;
        slowest.judge(&format!("restart {round}, answered again after {back:?}"))?;
        ensure!(back < Duration::from_secs(10), "{back:?}");
    }
    Ok(())
}
