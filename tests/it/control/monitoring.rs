//! What people monitor with: the page of metrics, the alert rules and the dashboards name metrics that exist, and
//! Prometheus takes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use stream_replicator::metrics::{
    self, AdapterReading, Detail, ElectionReading, HeartbeatReading, HeartbeatSubject, InstanceReading,
};
use stream_replicator::status::{
    ConsumersStatus, CopyStatus, GroupDrift, Headroom, KnownDrift, Lag, LastError, Position, RetentionLimit, Row,
    SamplingStatus, State, VerificationResult, VerificationState, VerificationSummary,
};

use super::schemas::is_current;
use crate::choria::metrics::{PANELS, PLAIN_PANELS};
use crate::harness::client::http_get;
use crate::harness::server::free_port;
use crate::harness::{LIMIT, Outgoing, Site, wait_value};

const RULES: &str = "contrib/prometheus/alerts.yml";
const DASHBOARD: &str = "contrib/grafana/dashboard.json";

/// One metric of the page that the service shows.
#[derive(Debug)]
struct Shown {
    name: String,
    kind: String,
    help: String,
    labels: Vec<String>,
}

fn file(path: &str) -> Result<String> {
    std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A page on which everything is known.
fn everything() -> Result<String> {
    let mut copy = CopyStatus {
        lag: Some(Lag { messages: 1, seconds: Some(1.0), oldest: None }),
        headroom: Some(Headroom { seconds: 1.0, limit: RetentionLimit::Age, low_below: 60.0 }),
        position: Position { source_seq: 1, target_seq: 1 },
        sampling: Some(SamplingStatus::default()),
        consumers: Some(ConsumersStatus::default()),
        last_error: Some(LastError::now("retry", "timed out")),
        ..CopyStatus::default()
    };
    copy.source.clock_offset_seconds = Some(0.0);
    let row = Row {
        replication: "ORDERS".to_owned(),
        state: State::Running,
        origin: "kv".to_owned(),
        leader: Some("one".to_owned()),
        epoch: 1,
        config_revision: 1,
        copy,
        verify: Some(VerificationSummary {
            state: VerificationState::Done,
            last: Some(VerificationResult { at: chrono::Utc::now(), messages: 1, findings: 1 }),
        }),
        todo: None,
    };
    let drift = Arc::new(KnownDrift::compared(chrono::Utc::now(), Vec::new(), None));
    let drift = GroupDrift::from([(row.replication.clone(), drift)]);
    let rows = [row];
    let election = ElectionReading {
        election: "ORDERS".to_owned(),
        identity: "one".to_owned(),
        as_candidate: 1,
        as_leader: 1,
        leads: true,
        interval: Duration::from_secs(1),
    };
    let subjects = vec![HeartbeatSubject { subject: "beat".to_owned(), ..HeartbeatSubject::default() }];
    let heartbeats = HeartbeatReading { host: "one".to_owned(), paused: false, subjects };
    let adapter =
        AdapterReading { name: "NODES".to_owned(), dropped: vec![("queue_full", 1)], ..AdapterReading::default() };
    Ok([
        metrics::render("US", &rows, 0, Detail::Full)?,
        metrics::render_drift("US", &rows, &drift)?,
        metrics::render_instance("US", &InstanceReading::of(true, "one", &rows))?,
        metrics::render_buckets("US", 0)?,
        metrics::render_process("1.0.0")?,
        metrics::render_elections("US", &[election], None)?,
        metrics::render_heartbeats("US", &heartbeats)?,
        metrics::render_adapters("one", &[adapter])?,
    ]
    .concat())
}

/// The metrics of a page in Prometheus' text format, in its order.
fn shown(page: &str) -> Result<Vec<Shown>> {
    let mut all: Vec<Shown> = Vec::new();
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            all.push(Shown { name: name.to_owned(), kind: String::new(), help: help.to_owned(), labels: Vec::new() });
            continue;
        }
        let last = all.last_mut().with_context(|| format!("`{line}` has no help"))?;
        if let Some((_, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            kind.clone_into(&mut last.kind);
        } else if last.labels.is_empty()
            && let Some((labels, _)) = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'))
        {
            let names = labels.split("\",").filter_map(|pair| pair.split_once('=')).map(|(name, _)| name.to_owned());
            last.labels = names.filter(|name| name != "le").collect();
        }
    }
    Ok(all)
}

/// Names of metrics in a text, without what a histogram appends.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = words.filter(|word| word.starts_with("choria_") || word.starts_with("process_"));
    let whole = |word: &str| {
        let end = ["_bucket", "_sum"].into_iter().find_map(|end| word.strip_suffix(end));
        end.unwrap_or(word).to_owned()
    };
    ours.map(whole).collect()
}

/// The alerts, each with the metrics of its expression.
fn alerts() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = file(RULES)?;
    let rules = text.split("- alert: ").skip(1);
    let rules = rules.map(|rule| {
        let (name, rest) = rule.split_once('\n').context("a rule")?;
        let (expression, _) = rest.split_once("labels:").context("labels")?;
        Ok((name.trim().to_owned(), named(expression)))
    });
    rules.collect()
}

const BEGIN: &str = "<!-- `make generate` writes what follows. -->\n";
const END: &str = "<!-- end -->\n";

/// Parts of the page: title, what the names of its metrics begin with, and what is to be said of all of them.
const PARTS: [(&str, &[&str], &str); 7] = [
    ("Replications", &["choria_stream_replicator_replicator_"], "Only the leader of a replication has its series."),
    (
        "Sampling",
        &[
            "choria_stream_replicator_tracker_",
            "choria_stream_replicator_limiter_",
            "choria_stream_replicator_advisor_",
        ],
        "Only of replications with [sampling](sampling.md).",
    ),
    ("Heartbeats", &["choria_stream_replicator_heartbeat_"], "See [heartbeats](heartbeats.md)."),
    (
        "Elections",
        &["choria_stream_replicator_election_"],
        "Of Choria's [leader election](operations.md#beside-chorias-stream-replicator).",
    ),
    ("Instance", &["choria_stream_replicator_"], "One series for each instance."),
    ("Adapters", &["choria_adapter_"], "Of [Choria's data adapters](adapters.md#metrics)."),
    ("Process", &["process_"], "As Prometheus' own libraries show it; on Linux."),
];

fn tables() -> Result<String> {
    let (mut rest, alerts) = (shown(&everything()?)?, alerts()?);
    let mut text = String::from(BEGIN);
    for (title, prefixes, about) in PARTS {
        let is_in = |one: &Shown| prefixes.iter().any(|prefix| one.name.starts_with(prefix));
        let (mut part, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(is_in);
        rest = others;
        part.sort_by(|one, other| one.name.cmp(&other.name));
        text += &format!(
            "\n## {title}\n\n{about}\n\n| metric | type | labels | meaning | alert |\n|---|---|---|---|---|\n"
        );
        for Shown { name, kind, help, labels } in part {
            let alerts = alerts.iter().filter(|(_, metrics)| metrics.contains(&name)).map(|(alert, _)| alert.as_str());
            let (alerts, labels) = (alerts.collect::<Vec<_>>().join(", "), labels.join(", "));
            text += &format!("| `{name}` | {kind} | {labels} | {help} | {alerts} |\n");
        }
    }
    ensure!(rest.is_empty(), "no part of the page has {rest:?}");
    Ok(text + END)
}

#[test]
fn current_metrics_are_on_the_page() -> Result<()> {
    let page = file("docs/metrics.md")?;
    let (before, rest) = page.split_once(BEGIN).context("the page has no generated part")?;
    let (_, after) = rest.split_once(END).context("the generated part has no end")?;
    is_current(&root().join("docs/metrics.md"), &format!("{before}{}{after}", tables()?))
}

#[test]
fn rules_and_dashboards_name_metrics_that_exist() -> Result<()> {
    let known: BTreeSet<_> = shown(&everything()?)?.into_iter().map(|one| one.name).collect();
    for path in [RULES, DASHBOARD] {
        let named = named(&file(path)?);
        ensure!(named.len() > 10, "{path} names {named:?}");
        let unknown: Vec<_> = named.difference(&known).collect();
        ensure!(unknown.is_empty(), "{path} names {unknown:?}: there is no such metric");
    }
    Ok(())
}

/// Prometheus and promtool: those of the host, or of its package, which is unpacked below `target`.
fn prometheus() -> Result<Option<PathBuf>> {
    static FOUND: OnceLock<Result<Option<PathBuf>, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| find_prometheus().map_err(|error| format!("{error:#}")));
    found.clone().map_err(|error| anyhow!(error))
}

fn find_prometheus() -> Result<Option<PathBuf>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |folder: &Path| ["prometheus", "promtool"].iter().all(|name| folder.join(name).is_file());
    if let Some(folder) = std::env::split_paths(&path).find(|folder| has(folder)) {
        return Ok(Some(folder));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prometheus");
    if has(&folder.join("usr/bin")) {
        return Ok(Some(folder.join("usr/bin")));
    }
    std::fs::create_dir_all(&folder)?;
    let fetched = Command::new("apt-get").args(["download", "prometheus"]).current_dir(&folder).output();
    if !fetched.is_ok_and(|fetched| fetched.status.success()) {
        println!("skipped: neither Prometheus nor a package of it (`apt-get download prometheus`) is there");
        return Ok(None);
    }
    let package = std::fs::read_dir(&folder)?.filter_map(Result::ok).map(|entry| entry.path());
    let package =
        package.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb")).context("no package")?;
    let unpacked = Command::new("dpkg-deb").arg("-x").arg(&package).arg(&folder).output()?;
    ensure!(unpacked.status.success(), "{}", said(&unpacked));
    Ok(Some(folder.join("usr/bin")))
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn promtool_accepts_the_rules_and_sees_each_fire() -> Result<()> {
    let Some(tools) = prometheus()? else { return Ok(()) };
    let folder = root().join("contrib/prometheus");
    let run = |arguments: [&str; 3]| -> Result<String> {
        let output = Command::new(tools.join("promtool")).args(arguments).current_dir(&folder).output()?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(said(&output))
    };
    let checked = run(["check", "rules", "alerts.yml"])?;
    ensure!(checked.contains(&format!("{} rules found", alerts()?.len())), "{checked}");
    run(["test", "rules", "alerts_test.yml"])?;
    let tested = file("contrib/prometheus/alerts_test.yml")?;
    let untested: Vec<_> = alerts()?.into_keys().filter(|alert| !tested.contains(&format!("\"{alert}\""))).collect();
    ensure!(untested.is_empty(), "no test of {untested:?}");
    Ok(())
}

/// Every expression of a dashboard, at any depth, with its variables as Grafana fills them in.
fn expressions(dashboard: &Value, found: &mut Vec<String>) {
    match dashboard {
        Value::Object(fields) => {
            if let Some(expression) = fields.get("expr").and_then(Value::as_str) {
                let variables =
                    [("$__rate_interval", "1m"), ("$__interval", "1m"), ("$replicator", ".*"), ("$stream", ".*")];
                found.push(
                    variables.iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value)),
                );
            }
            fields.values().for_each(|value| expressions(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

/// A process that is ended with the test.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A real Prometheus reads the service and answers every query of the dashboards.
#[tokio::test]
async fn prometheus_answers_every_query_of_the_dashboards() -> Result<()> {
    let Some(tools) = prometheus()? else { return Ok(()) };
    let site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    let mut source = site.source_stream("ORDERS", json!({})).await?;
    site.add("ORDERS", json!({})).await?;
    source.publish_all((0..100).map(|number| Outgoing::new("orders.new", number.to_string()))).await?;
    site.copied("ORDERS", 100).await?;
    let folder = site.source.folder().join("prometheus");
    std::fs::create_dir_all(&folder)?;
    let monitor = site.service.monitor().await?;
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [\"{}\"]\n\
         scrape_configs:\n- job_name: r\n  static_configs:\n  - targets: [\"{monitor}\"]\n",
        root().join(RULES).display()
    );
    std::fs::write(folder.join("prometheus.yml"), config)?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let log = std::fs::File::create(folder.join("log"))?;
    let child = Command::new(tools.join("prometheus"))
        .arg("--config.file=prometheus.yml")
        .arg("--storage.tsdb.path=data")
        .arg(format!("--web.listen-address={address}"))
        .current_dir(&folder)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let running = Running(child);
    let ask = async |query: &str| -> Result<Vec<Value>> {
        let path = format!("/api/v1/query?query={}", encoded(query));
        let body: Value = serde_json::from_str(&http_get(&address, &path).await?.1)?;
        ensure!(body["status"] == "success", "{query}: {body}");
        Ok(body["data"]["result"].as_array().cloned().unwrap_or_default())
    };
    let copied = "choria_stream_replicator_replicator_copied_messages == 100 and on () (count_over_time(up[1h]) > 2)";
    let seen = async || ask(copied).await.ok().filter(|found| !found.is_empty());
    wait_value("Prometheus to have read the service", LIMIT, seen)
        .await
        .with_context(|| std::fs::read_to_string(folder.join("log")).unwrap_or_default())?;
    let mut queries = Vec::new();
    expressions(&serde_json::from_str(&file(DASHBOARD)?)?, &mut queries);
    ensure!(queries.len() > 20, "{queries:?}");
    for name in PANELS {
        let labels = "{replicator=~\".*\",stream=~\".*\"}";
        queries.push(format!("sum by (stream, replicator) (rate(choria_stream_replicator_{name}{labels}[1m]))"));
    }
    queries.extend(PLAIN_PANELS.map(|name| format!("sum(choria_stream_replicator_{name})")));
    for query in queries {
        ask(&query).await?;
    }
    for query in [
        "sum(choria_stream_replicator_replications_running) == 1",
        "choria_stream_replicator_replicator_state{state=\"running\"} == 1",
        "rate(process_cpu_seconds_total[1m]) and on (instance) choria_stream_replicator_build_info",
    ] {
        ensure!(!ask(query).await?.is_empty(), "`{query}` has no answer");
    }
    ensure!(ask("ALERTS{alertstate=\"firing\"}").await?.is_empty(), "alerts fire");
    drop(running);
    Ok(())
}

/// For the query of a URL.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}
