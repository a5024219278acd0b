//! One site: its server, its service, its nodes, and what becomes of their reports.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::Client;
use serde::Deserialize;
use serde_json::{Value, json};

use super::checks::{AdvisoryCounts, Checks, KINDS};
use super::nodes::{Node, NodeReport};
use super::sampling_model::{StoredReport, silences, wrongly_sampled};
use super::{ADVISORIES, Plan, SIZE_TRIGGER, STREAM};
use crate::harness::client::status;
use crate::harness::{
    LIMIT, Outgoing, REGISTRATION, Raw, Registration, Role, Server, Service, Stored, connect, request, wait_value,
    wait_while_moving,
};

/// How many nodes of each site send a report twice.
const TWICE: usize = 3;

pub(super) struct FleetSite {
    pub(super) name: &'static str,
    pub(super) nodes: Vec<Node>,
    server: Server,
    service: Service,
    client: Client,
    raw: Raw,
    /// Request ids of all reports.
    sent: HashSet<String>,
    sent_twice: usize,
    sent_broken: usize,
    /// Advisories of each node, in their order, and the sequence after the last one.
    advisories: BTreeMap<String, Vec<String>>,
    next_advisory: u64,
}

/// What an adapter stores.
#[derive(Deserialize)]
struct AdapterOutput {
    sender: String,
    requestid: String,
}

#[derive(Deserialize)]
struct Advisory {
    event: String,
    value: String,
}

impl FleetSite {
    pub(super) async fn start(name: &'static str, nodes: Vec<Node>, centre: &Server, plan: &Plan) -> Result<Self> {
        let server = Server::builder(Role::Source).name(name).start().await?;
        let mut raw = Raw::connect(&server.url()).await?;
        raw.create_stream(ADVISORIES, json!({"subjects": ["choria.registration.advisories.>"]})).await?;
        let service = Service::builder(&server.url(), name).instance(&name.to_lowercase());
        let service = service.args(["--monitor", "127.0.0.1:0"]).start().await?;
        let client = connect(&server.url()).await?;
        let site = Self {
            name,
            nodes,
            server,
            service,
            client,
            raw,
            sent: HashSet::new(),
            sent_twice: 0,
            sent_broken: 0,
            advisories: BTreeMap::new(),
            next_advisory: 1,
        };
        site.configure(centre, plan).await.with_context(|| site.service.log())?;
        Ok(site)
    }

    pub(super) fn url(&self) -> String {
        self.server.url()
    }

    async fn configure(&self, centre: &Server, plan: &Plan) -> Result<()> {
        let adapter = json!({
            "name": "inventory",
            "queue_len": 50_000,
            "ingest": {"topic": REGISTRATION, "protocol": "request", "servers": self.url()},
            "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s",
                "create": {"name": STREAM, "max_msgs_per_subject": 100_000}},
        });
        request(&self.client, "replicator.adapter.add", adapter).await?;
        wait_value("the adapter to run", LIMIT, async || self.adapter().await.filter(|row| row["state"] == "running"))
            .await?;
        let sampled = json!({
            "stream": STREAM, "source_url": self.url(), "target_url": centre.url(), "target_mode": "shared",
            "inspect_field": "sender", "inspect_duration": seconds(plan.inspect), "warn_duration": seconds(plan.warn),
            "size_trigger": SIZE_TRIGGER,
            "advisory": {"subject": "choria.registration.advisories.%s.%v", "reliable": true},
        });
        let advisories = json!({
            "stream": ADVISORIES, "source_url": self.url(), "target_url": centre.url(), "target_mode": "shared",
        });
        for document in [sampled, advisories] {
            let stream = document["stream"].as_str().unwrap_or_default().to_owned();
            request(&self.client, "replicator.config.add", document).await?;
            wait_value(&format!("the replication of {stream}"), LIMIT, async || {
                status(&self.client, &stream).await.filter(|row| row["state"] == "running")
            })
            .await?;
        }
        Ok(())
    }

    /// The nodes that talk send a report each.
    pub(super) async fn report(&mut self, talks: impl Fn(&Node) -> bool) -> Result<()> {
        let reports = self.nodes.iter().filter(|node| talks(node)).map(Node::report).collect();
        self.send(reports).await
    }

    /// Some nodes send a report twice, as a network may do.
    pub(super) async fn report_twice(&mut self) -> Result<()> {
        let reports: Vec<NodeReport> = self.nodes.iter().take(TWICE).map(Node::report).collect();
        let again: Vec<Outgoing> = reports.iter().map(|report| report.message.clone()).collect();
        self.sent_twice += again.len();
        self.send(reports).await?;
        self.raw.send_all(&again).await
    }

    /// What an adapter has to drop: no JSON, an unknown protocol, a sender that would change the subject.
    pub(super) async fn send_broken(&mut self) -> Result<()> {
        let unsafe_sender = Registration { id: &"0".repeat(32), sender: "n1.*.>", data: "{}", time: 0 }.v1();
        let broken = ["no JSON", r#"{"protocol":"choria:transport:9"}"#, &unsafe_sender];
        self.sent_broken += broken.len();
        self.raw.send_all(&broken.map(|body| Outgoing::new(REGISTRATION, body))).await
    }

    async fn send(&mut self, reports: Vec<NodeReport>) -> Result<()> {
        let (ids, messages): (Vec<_>, Vec<_>) = reports.into_iter().map(|one| (one.id, one.message)).unzip();
        self.sent.extend(ids);
        self.raw.send_all(&messages).await
    }

    /// Reads the advisories that were stored since the last time.
    pub(super) async fn read_advisories(&mut self) -> Result<()> {
        for stored in self.raw.read_stream_from(ADVISORIES, self.next_advisory).await? {
            let advisory: Advisory = serde_json::from_slice(&stored.payload)?;
            self.advisories.entry(advisory.value).or_default().push(advisory.event);
            self.next_advisory = stored.seq + 1;
        }
        Ok(())
    }

    /// The advisories about a node, in their order.
    pub(super) fn advisories_of(&self, node: &Node) -> Vec<&str> {
        self.advisories.get(&node.identity).into_iter().flatten().map(String::as_str).collect()
    }

    async fn adapter(&self) -> Option<Value> {
        let reply = request(&self.client, "replicator.adapter.status", json!({"adapter": "inventory"})).await.ok()?;
        reply["adapters"].get(0).cloned()
    }

    /// Waits until all reports are stored, the replications have settled all that the streams of the site have, and the status
    /// shows all advisories. Anything that never does is in the comparison.
    pub(super) async fn settle(&mut self) -> Result<()> {
        self.read_advisories().await?;
        let expect = self.sent.len() + self.sent_twice;
        let advisories = self.advisories.values().flatten().count() as u64;
        let mut raw = Raw::connect(&self.server.url()).await?;
        let settled = wait_while_moving("everything to be stored and copied", LIMIT, async || {
            let stored = self.adapter().await.map(|row| row["stored"].clone()).unwrap_or_default();
            let (mut positions, mut settled, mut advised) = (Vec::new(), stored == expect, 0);
            for stream in [STREAM, ADVISORIES] {
                let end = raw.stream_state(stream).await.unwrap_or_default()["last_seq"].clone();
                let row = status(&self.client, stream).await.unwrap_or_default();
                let counts = row["sampling"]["advised"].as_object();
                advised += counts.map_or(0, |counts| counts.values().filter_map(Value::as_u64).sum());
                settled &= row["position"]["source_seq"] == end;
                positions.push(row["position"]["source_seq"].clone());
            }
            if settled && advised == advisories { Ok(()) } else { Err((stored, positions, advised)) }
        });
        if let Err(error) = settled.await {
            println!("  {}: {error:#}", self.name);
        }
        Ok(())
    }

    fn is_mine(&self, sender: &str) -> bool {
        sender.ends_with(&format!(".{}.example.net", self.name.to_lowercase()))
    }

    /// How many of the messages at the centre are from nodes of this site.
    pub(super) fn count_mine(&self, copies: &[Stored]) -> usize {
        outputs(copies).map_or(0, |outputs| outputs.iter().filter(|one| self.is_mine(&one.sender)).count())
    }

    /// Compares what the nodes sent with what both streams, the status and the metrics say.
    pub(super) async fn compare(
        &mut self,
        copies: &[Stored],
        advisories: &[Stored],
        plan: &Plan,
        checks: &mut Checks,
    ) -> Result<()> {
        let (name, sent) = (self.name, self.sent.len());
        let adapter = self.adapter().await.context("no status of the adapter")?;
        let row = status(&self.client, STREAM).await.context("no status of the replication")?;
        let number = |value: &Value| value.as_u64().unwrap_or_default();

        let messages = self.raw.read_stream(STREAM).await?;
        let outputs_here = outputs(&messages)?;
        let stored: Vec<StoredReport<'_>> = messages
            .iter()
            .zip(&outputs_here)
            .map(|(message, output)| StoredReport {
                id: &output.requestid,
                sender: &output.sender,
                time: message.time,
                size: message.payload.len(),
            })
            .collect();
        let ids: HashSet<String> = stored.iter().map(|report| report.id.to_owned()).collect();
        let mine: Vec<AdapterOutput> =
            outputs(copies)?.into_iter().filter(|output| self.is_mine(&output.sender)).collect();
        let copied: HashSet<String> = mine.iter().map(|output| output.requestid.clone()).collect();
        let sampled_away = number(&row["counters"]["skipped_sampled"]);

        checks.show(name, "nodes", self.nodes.len());
        checks.show(name, "reports sent", sent);
        checks.show(name, "  sent twice", self.sent_twice);
        checks.show(name, "  broken, beside them", self.sent_broken);
        checks.show(name, "received by the adapter", &adapter["received"]);
        checks.show(name, "dropped by the adapter", dropped(&adapter));
        checks.show(name, "stored at the site", stored.len());
        checks.show(name, "copied to the centre", mine.len());
        checks.show(name, "sampled away", sampled_away);

        let expect_received = (sent + self.sent_twice + self.sent_broken) as u64;
        checks.equal(name, "received", number(&adapter["received"]), "sent", expect_received);
        let broken = json!({"malformed": 1, "protocol": 1, "sender": 1});
        checks.equal(name, "dropped", &adapter["dropped"], "broken", &broken);
        let twice = self.sent_twice as u64;
        checks.equal(name, "duplicates", number(&adapter["duplicates"]), "sent twice", twice);
        checks.equal(name, "stored at the site", stored.len(), "sent", sent);
        checks.none(name, "reports that the site has not stored", self.sent.difference(&ids).count());
        checks.equal(name, "copied and sampled away", mine.len() as u64 + sampled_away, "stored", stored.len() as u64);
        checks.equal(name, "copied, by the status", number(&row["counters"]["copied"]), "copies", mine.len() as u64);
        checks.equal(name, "copies", mine.len(), "different copies", copied.len());
        checks.none(name, "copies of unknown reports", copied.difference(&ids).count());
        let (missing, needless) = wrongly_sampled(&stored, &copied, plan.inspect);
        checks.none(name, "reports that had to be copied and were not", missing);
        checks.none(name, "copies that were not due", needless);

        let counts = self.compare_advisories(advisories, &row, checks)?;
        let silent = silences(&stored, plan.warn);
        let needless = |(sender, kinds): (&String, &Vec<String>)| {
            let timeouts = kinds.iter().filter(|kind| *kind == "timeout").count();
            timeouts.saturating_sub(silent.get(sender.as_str()).copied().unwrap_or_default())
        };
        checks.none(name, "timeouts of nodes that were not silent", self.advisories.iter().map(needless).sum());
        self.compare_metrics(stored.len() as u64 + twice, mine.len() as u64, sampled_away, &counts, checks).await
    }

    fn compare_advisories(&self, centre: &[Stored], row: &Value, checks: &mut Checks) -> Result<AdvisoryCounts> {
        let mut counts = AdvisoryCounts::default();
        self.advisories.values().flatten().for_each(|kind| counts.add(kind, 1));
        let (mut reported, mut arrived) = (AdvisoryCounts::default(), AdvisoryCounts::default());
        for kind in KINDS {
            reported.add(kind, row["sampling"]["advised"][kind].as_u64().unwrap_or_default());
        }
        for message in centre {
            let advisory: Advisory = serde_json::from_slice(&message.payload)?;
            if self.is_mine(&advisory.value) {
                arrived.add(&advisory.event, 1);
            }
        }
        for (kind, row) in KINDS.into_iter().zip(["advisories: new", "  timeout", "  recover", "  expire"]) {
            checks.show(self.name, row, counts.of(kind));
        }
        checks.equal(self.name, "advisories stored", &counts, "published, by the status", &reported);
        checks.equal(self.name, "advisories stored", &counts, "at the centre", &arrived);
        checks.equal(self.name, "new", counts.of("new"), "expire", counts.of("expire"));
        let ends = counts.of("recover") + counts.of("expire");
        checks.equal(self.name, "timeout", counts.of("timeout"), "recover and expire", ends);
        let wrong = self.nodes.iter().filter(|node| !is_a_story(self.advisories.get(&node.identity)));
        checks.none(self.name, "nodes whose advisories are out of order", wrong.count());
        checks.equal(self.name, "nodes with advisories", self.advisories.len(), "nodes", self.nodes.len());
        Ok(counts)
    }

    async fn compare_metrics(
        &self,
        stored: u64,
        copied: u64,
        sampled_away: u64,
        counts: &AdvisoryCounts,
        checks: &mut Checks,
    ) -> Result<()> {
        let page = self.metrics().await?;
        let of_stream = format!("stream=\"{STREAM}\"");
        let replicator = "choria_stream_replicator_replicator_";
        let rows = [
            ("choria_adapter_received_msgs".to_owned(), "role=\"output\"", stored),
            (format!("{replicator}copied_messages"), of_stream.as_str(), copied),
            (format!("{replicator}skipped_sampled_messages"), of_stream.as_str(), sampled_away),
        ];
        for (metric, label, expect) in rows {
            checks.equal(self.name, &metric, metric_of(&page, &metric, label), "count", expect);
        }
        let metric = "choria_stream_replicator_advisor_total_messages";
        for kind in KINDS {
            let found = metric_of(&page, metric, &format!("advisory=\"{kind}\""));
            checks.equal(self.name, &format!("{metric} of {kind}"), found, "count", counts.of(kind));
        }
        Ok(())
    }

    async fn metrics(&self) -> Result<String> {
        Ok(self.service.get("/metrics").await?.1)
    }

    /// Prints the series that a dashboard of the fleet shows.
    pub(super) async fn print_metrics(&self) -> Result<()> {
        const SHOWN: [&str; 9] = [
            "choria_adapter_received_msgs",
            "choria_adapter_dropped_messages",
            "choria_adapter_duplicate_messages",
            "choria_adapter_queue_length",
            "choria_stream_replicator_replicator_copied_messages",
            "choria_stream_replicator_replicator_skipped_sampled_messages",
            "choria_stream_replicator_replicator_stream_lag_messages",
            "choria_stream_replicator_advisor_total_messages",
            "choria_stream_replicator_tracker_total_items",
        ];
        let page = self.metrics().await?;
        let unused = |line: &str| line.contains("_dropped_messages{") && line.ends_with(" 0");
        let shown = |line: &&str| SHOWN.iter().any(|name| line.starts_with(&format!("{name}{{"))) && !unused(line);
        page.lines().filter(shown).for_each(|line| println!("  {line}"));
        Ok(())
    }
}

/// Whether the advisories about a node follow from each other and end with its end.
fn is_a_story(kinds: Option<&Vec<String>>) -> bool {
    let Some(kinds) = kinds else { return false };
    let mut last = "expire";
    for kind in kinds {
        let follows = match kind.as_str() {
            "new" => last == "expire",
            "timeout" => matches!(last, "new" | "recover"),
            "recover" | "expire" => last == "timeout",
            _ => false,
        };
        if !follows {
            return false;
        }
        last = kind;
    }
    last == "expire"
}

fn outputs(messages: &[Stored]) -> Result<Vec<AdapterOutput>> {
    messages.iter().map(|message| Ok(serde_json::from_slice(&message.payload)?)).collect()
}

fn dropped(adapter: &Value) -> u64 {
    let reasons = adapter["dropped"].as_object();
    reasons.map_or(0, |reasons| reasons.values().filter_map(Value::as_u64).sum())
}

/// The sum of the series of a metric that have this label.
fn metric_of(page: &str, name: &str, label: &str) -> u64 {
    let lines = page.lines().filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

fn seconds(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}
