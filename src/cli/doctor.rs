//! `stream-replicator doctor`: checks what the service depends on, and says what to do. It changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use async_nats::Message;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{bytes, counted, seconds},
    global::{Global, bucket_prefix},
    output::{Colour, Output, Table, clean},
    reply::Reply,
    status_view::state_name,
};
use crate::{
    control::{
        SERVICE_NAME,
        api::{CheckResult, Instances, Status},
    },
    names,
    preflight::{Permissions, Share},
    status::{Row, State},
};

/// Clocks that differ by more than this are reported.
const CLOCK_OFFSET: TimeDelta = TimeDelta::seconds(5);
/// An instance that is silent for longer than this is reported.
const SILENT: Duration = Duration::from_secs(15);
/// Share of a limit of the account, in per cent, from which it is reported.
const NEARLY_FULL: u64 = 90;
/// How long answers of instances are gathered after the last one.
const GATHER: Duration = Duration::from_millis(500);
/// Names in one message, at most.
const LISTED: usize = 5;

/// Check connection, JetStream, buckets, permissions, clocks, instances and replications, and say what to do
///
/// Changes nothing. Exit code 1 if a check failed; a warning is none.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Check the permissions that `serve` needs too: give the connection flags of the service
    #[arg(long)]
    serve: bool,

    /// Format of the output
    #[arg(long, short, value_name = "FORMAT", value_enum, conflicts_with = "json")]
    output: Option<DoctorFormat>,

    /// Prefix of the names of buckets
    #[arg(long, value_name = "PREFIX", default_value = names::DEFAULT_BUCKET_PREFIX, value_parser = bucket_prefix)]
    bucket_prefix: String,

    #[command(flatten)]
    global: Global,
}

/// How the findings are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DoctorFormat {
    /// A table, and what to do
    Text,
    /// One JSON object
    Json,
}

/// Everything that was found; the output of `--json`.
#[derive(Debug, Serialize)]
struct Diagnosis {
    /// The worst result.
    result: CheckResult,
    checks: Vec<DoctorFinding>,
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct DoctorFinding {
    name: &'static str,
    result: CheckResult,
    message: String,
    /// What to do about it.
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    todo: Option<String>,
}

impl Args {
    /// Whether the output is for a program.
    pub(super) fn json(&self) -> bool {
        self.global.json || self.output == Some(DoctorFormat::Json)
    }
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let mut checks = Vec::new();
    match Client::connect(&args.global).await {
        Ok(client) => examine(args, &client, &mut checks).await,
        // Wrong flags are no finding.
        Err(error @ Error::Usage(_)) => return Err(error),
        Err(error) => checks.push(failed(
            "connection",
            error.to_string(),
            "start the server, or correct `--server`, `--context` and the login; `--trace` shows more",
        )),
    }
    let worst = checks.iter().map(|finding| finding.result).max_by_key(|result| rank(*result));
    let diagnosis = Diagnosis { result: worst.unwrap_or(CheckResult::Ok), checks };
    print(&diagnosis, out);
    Ok(if diagnosis.result == CheckResult::Failed { CommandVerdict::Bad } else { CommandVerdict::Good })
}

fn rank(result: CheckResult) -> u8 {
    match result {
        CheckResult::Ok => 0,
        CheckResult::Unknown => 1,
        CheckResult::Warning => 2,
        CheckResult::Failed => 3,
    }
}

fn print(diagnosis: &Diagnosis, out: &mut Output) {
    if out.json() {
        out.value(diagnosis);
        return;
    }
    let mut table = Table::new(&["CHECK", "RESULT", "MESSAGE"]).painted(1);
    for DoctorFinding { name, result, message, .. } in &diagnosis.checks {
        let (result, colour) = match result {
            CheckResult::Ok => ("ok", Colour::Green),
            CheckResult::Warning => ("warning", Colour::Yellow),
            CheckResult::Failed => ("failed", Colour::Red),
            CheckResult::Unknown => ("unknown", Colour::Cyan),
        };
        table.row(colour, vec![(*name).to_owned(), result.to_owned(), message.clone()]);
    }
    out.table(&table);
    let todos: BTreeSet<_> = diagnosis.checks.iter().filter_map(|finding| finding.todo.as_ref()).collect();
    if todos.is_empty() {
        out.line("nothing to do");
    }
    for todo in todos {
        out.line(&clean(&format!("do: {todo}")));
    }
}

async fn examine(args: &Args, client: &Client, checks: &mut Vec<DoctorFinding>) {
    checks.push(connection(client).await);
    let jetstream = jetstream(client).await;
    let works = jetstream.iter().all(|finding| finding.result != CheckResult::Failed);
    checks.extend(jetstream);
    let mut clocks = Vec::new();
    if works {
        checks.extend(buckets(client, &args.bucket_prefix, &mut clocks).await);
    }
    checks.extend(permissions(client, args).await);
    let alive = service(client, &mut clocks, checks).await;
    checks.push(clock(&clocks));
    if alive {
        checks.extend(instances(client).await);
        checks.extend(replications(client).await);
    }
}

fn ok(name: &'static str, message: impl Into<String>) -> DoctorFinding {
    DoctorFinding { name, result: CheckResult::Ok, message: message.into(), todo: None }
}

fn failed(name: &'static str, message: impl Into<String>, todo: impl Into<String>) -> DoctorFinding {
    DoctorFinding { name, result: CheckResult::Failed, message: message.into(), todo: Some(todo.into()) }
}

fn warning(name: &'static str, message: impl Into<String>, todo: impl Into<String>) -> DoctorFinding {
    DoctorFinding { name, result: CheckResult::Warning, message: message.into(), todo: Some(todo.into()) }
}

fn unknown(name: &'static str, message: impl Into<String>) -> DoctorFinding {
    DoctorFinding { name, result: CheckResult::Unknown, message: message.into(), todo: None }
}

/// The first names, and how many more there are.
fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().collect();
    let shown = names.len().min(LISTED);
    let more = if names.len() > shown { format!(" and {} more", names.len() - shown) } else { String::new() };
    format!("{}{more}", names[..shown].join(", "))
}

async fn connection(client: &Client) -> DoctorFinding {
    let begun = Instant::now();
    let flushed = client.nats().flush().await;
    let info = client.nats().server_info();
    match flushed {
        Ok(()) => {
            let took = seconds(begun.elapsed().as_secs_f64());
            let message =
                format!("server {} {} at {}, answers in {took}", info.server_name, info.version, client.server());
            ok("connection", message)
        }
        Err(error) => failed("connection", error.to_string(), "check the path to the server"),
    }
}

/// Asks the API of JetStream, or of the server; the answer, or why there is none.
async fn ask(client: &Client, subject: &str) -> Result<(Value, Sample), String> {
    let sent = Utc::now();
    let request = async_nats::Request::new().timeout(Some(client.answer_within()));
    let answer = client.nats().send_request(subject.to_owned(), request).await;
    let answer = answer.map_err(|error| format!("`{subject}`: {error}"))?;
    let value = serde_json::from_slice(&answer.payload);
    let value = value.map_err(|error| format!("the answer on `{subject}` is not understood: {error}"))?;
    Ok((value, Sample { sent, received: Utc::now() }))
}

/// When something was asked and answered, by the clock of this host.
#[derive(Debug, Clone, Copy)]
struct Sample {
    sent: DateTime<Utc>,
    received: DateTime<Utc>,
}

/// A clock that was compared with that of this host.
#[derive(Debug, Clone)]
struct ComparedClock {
    whose: String,
    /// Ahead of this host's; half the time of the answer is not known.
    offset: TimeDelta,
    uncertain: TimeDelta,
}

impl ComparedClock {
    fn new(whose: String, time: DateTime<Utc>, sample: Sample) -> Self {
        let uncertain = (sample.received - sample.sent) / 2;
        Self { whose, offset: time - (sample.sent + uncertain), uncertain }
    }

    fn is_off(&self) -> bool {
        self.offset.abs() - self.uncertain > CLOCK_OFFSET
    }
}

/// What the account may store, and how much of that it does.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AccountUse {
    streams: i64,
    storage: u64,
    memory: u64,
    limits: AccountBounds,
    error: Option<ApiRefusal>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct AccountBounds {
    max_streams: i64,
    max_storage: i64,
    max_memory: i64,
}

impl Default for AccountBounds {
    fn default() -> Self {
        Self { max_streams: -1, max_storage: -1, max_memory: -1 }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ApiRefusal {
    code: u16,
    description: String,
}

async fn jetstream(client: &Client) -> Vec<DoctorFinding> {
    const ON: &str = "switch JetStream on at the control server (`jetstream {}` in its configuration, or `nats-server -js`), allow it \
                      for the account, or name where it is with `--js-domain`";
    let info = match ask(client, &format!("{}.INFO", client.api_prefix())).await {
        Ok((value, _)) => serde_json::from_value::<AccountUse>(value).unwrap_or_default(),
        Err(why) => return vec![failed("jetstream", why, ON)],
    };
    match &info.error {
        Some(ApiRefusal { description, .. }) => vec![failed("jetstream", description.clone(), ON)],
        None => room(&info),
    }
}

/// How full the account is.
fn room(info: &AccountUse) -> Vec<DoctorFinding> {
    let AccountUse { streams, storage, memory, limits, .. } = info;
    let used = |what: &str, used: u64, limit: i64, shown: fn(u64) -> String| {
        let limit = u64::try_from(limit).ok().filter(|limit| *limit > 0)?;
        let full = used.saturating_mul(100) / limit;
        let message = format!("{what}: {} of {} ({full} %)", shown(used), shown(limit));
        (full >= NEARLY_FULL).then_some(message)
    };
    let full = [
        used("streams", u64::try_from(*streams).unwrap_or_default(), limits.max_streams, |number| number.to_string()),
        used("file storage", *storage, limits.max_storage, bytes),
        used("memory storage", *memory, limits.max_memory, bytes),
    ];
    let full: Vec<_> = full.into_iter().flatten().collect();
    if full.is_empty() {
        let message =
            format!("{}, {} in files", counted(u64::try_from(*streams).unwrap_or_default(), "stream"), bytes(*storage));
        return vec![ok("jetstream", message)];
    }
    let todo = "raise the limits of the account at the control server, or delete what is not needed";
    vec![warning("jetstream", format!("the account is nearly full: {}", full.join(", ")), todo)]
}

/// What a server says about a stream.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BucketInfo {
    config: BucketConfig,
    cluster: BucketCluster,
    ts: Option<DateTime<Utc>>,
    error: Option<ApiRefusal>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BucketConfig {
    num_replicas: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BucketCluster {
    name: String,
    leader: String,
    replicas: Vec<BucketPeer>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BucketPeer {
    name: String,
    current: bool,
    offline: bool,
}

async fn buckets(client: &Client, prefix: &str, clocks: &mut Vec<ComparedClock>) -> Vec<DoctorFinding> {
    let names = ["CONFIG", "POSITIONS", "LEASES", "STATE"].map(|name| format!("KV_{prefix}_{name}"));
    let mut infos = BTreeMap::new();
    for stream in names.iter().chain([&format!("{prefix}_EVENTS")]) {
        let answer = ask(client, &format!("{}.STREAM.INFO.{stream}", client.api_prefix())).await;
        let info = answer.and_then(|(value, sample)| {
            let info: BucketInfo = serde_json::from_value(value).map_err(|error| format!("`{stream}`: {error}"))?;
            Ok((info, sample))
        });
        infos.insert(stream.clone(), info);
    }
    if let Some((name, time, sample)) = infos.values().flatten().find_map(|(info, sample)| {
        let leader = if info.cluster.leader.is_empty() { "the control server" } else { &info.cluster.leader };
        Some((leader.to_owned(), info.ts?, *sample))
    }) {
        clocks.push(ComparedClock::new(name, time, sample));
    }
    let infos: BTreeMap<_, _> = infos.into_iter().map(|(name, info)| (name, info.map(|(info, _)| info))).collect();
    judge_buckets(prefix, &infos)
}

fn judge_buckets(prefix: &str, infos: &BTreeMap<String, Result<BucketInfo, String>>) -> Vec<DoctorFinding> {
    let events = format!("{prefix}_EVENTS");
    let (mut missing, mut findings) = (Vec::new(), Vec::new());
    let mut small = Vec::new();
    for (stream, info) in infos {
        let BucketInfo { config, cluster, error, .. } = match info {
            Ok(info) => info,
            Err(why) => {
                let todo = "allow this login the requests of docs/permissions.md, or use that of the service";
                findings.push(warning("buckets", why.clone(), todo));
                continue;
            }
        };
        match error {
            Some(ApiRefusal { code: 404, .. }) if *stream == events => {
                findings.push(ok("events", format!("there is no stream `{stream}`: events are not kept there")));
            }
            Some(ApiRefusal { code: 404, .. }) => missing.push(stream.as_str()),
            Some(ApiRefusal { description, .. }) => {
                let todo = "see the log of the control server about this stream";
                findings.push(failed("buckets", format!("`{stream}`: {description}"), todo));
            }
            None => {
                let is_cluster = !cluster.name.is_empty();
                if is_cluster && cluster.leader.is_empty() {
                    let todo = "bring back servers of the control cluster: a majority of those that hold the stream is missing";
                    findings.push(failed("buckets", format!("`{stream}` has no leader"), todo));
                }
                let away = cluster.replicas.iter().filter(|peer| peer.offline || !peer.current);
                let away: Vec<_> = away.map(|peer| peer.name.as_str()).collect();
                if !away.is_empty() {
                    let todo = "bring back these servers of the control cluster, or wait until they have caught up";
                    findings.push(warning("buckets", format!("`{stream}` is not current at {}", listed(away)), todo));
                }
                if is_cluster && config.num_replicas < 2 {
                    small.push(stream.as_str());
                }
            }
        }
    }
    if !small.is_empty() {
        let message = format!("one replica in a cluster: {}", listed(small));
        let todo = "`nats stream edit NAME --replicas 3` for each of these streams: with one replica, no replication starts while its \
                    server is away (`--bucket-replicas 3` for new ones)";
        findings.push(warning("buckets", message, todo));
    }
    if missing.len() == infos.len().saturating_sub(1) && !missing.is_empty() {
        let message = format!("there are no buckets `{prefix}_*`: no service has run here");
        let todo =
            "start the service (`stream-replicator serve`), or correct `--bucket-prefix`, the server and the account";
        findings.push(failed("buckets", message, todo));
    } else if !missing.is_empty() {
        let todo = "restart an instance: it creates buckets that are missing";
        findings.push(failed("buckets", format!("missing: {}", listed(missing)), todo));
    } else if !findings.iter().any(|finding| finding.name == "buckets") {
        findings.push(ok("buckets", format!("`{prefix}_*`")));
    }
    findings
}

/// Subjects that the login of `serve` publishes to.
fn needed_by_service(prefix: &str, bucket_prefix: &str, api: &str) -> Vec<String> {
    let mut subjects = vec![format!("{api}.INFO")];
    for bucket in ["CONFIG", "POSITIONS", "LEASES", "STATE"] {
        let name = format!("{bucket_prefix}_{bucket}");
        subjects.extend([
            format!("{api}.STREAM.*.KV_{name}"),
            format!("{api}.STREAM.MSG.GET.KV_{name}"),
            format!("{api}.CONSUMER.*.KV_{name}.>"),
            format!("{api}.DIRECT.GET.KV_{name}.>"),
            format!("$KV.{name}.>"),
        ]);
    }
    subjects.extend([
        format!("{api}.CONSUMER.MSG.NEXT.KV_{bucket_prefix}_STATE.>"),
        "$JS.FC.>".to_owned(),
        format!("{prefix}.event.>"),
        "$SRV.PING.>".to_owned(),
        format!("{api}.STREAM.CREATE.{bucket_prefix}_EVENTS"),
        format!("{api}.STREAM.INFO.{bucket_prefix}_EVENTS"),
        format!("{api}.STREAM.MSG.GET.{bucket_prefix}_EVENTS"),
    ]);
    subjects
}

async fn permissions(client: &Client, args: &Args) -> Vec<DoctorFinding> {
    const ASKED: &str = "$SYS.REQ.USER.INFO";
    let info = client.nats().server_info();
    let request = async_nats::Request::new().timeout(Some(client.answer_within()));
    let answer = client.nats().send_request(ASKED, request).await;
    let granted = match answer {
        Ok(answer) if Permissions::are_from(&answer.payload, &info.server_id) => Permissions::parse(&answer.payload),
        _ => None,
    };
    let Some(granted) = granted else {
        return vec![unknown("permissions", format!("the server does not say what this login may do (`{ASKED}`)"))];
    };
    let mut needed = vec![format!("{}.>", client.prefix()), "$SRV.>".to_owned()];
    if args.serve {
        needed = needed_by_service(client.prefix(), &args.bucket_prefix, client.api_prefix());
    }
    let refused: Vec<_> = needed.iter().filter(|subject| granted.publish(subject) != Share::All).collect();
    if refused.is_empty() {
        let whose = if args.serve { "what `serve` needs" } else { "all requests" };
        return vec![ok("permissions", format!("this login may publish to {whose}"))];
    }
    let none = refused.iter().all(|subject| granted.publish(subject) == Share::None);
    let message = format!("this login may not publish to {}", listed(refused.iter().map(|subject| subject.as_str())));
    let todo = "allow the subjects of docs/permissions.md, or use another login";
    // An operator may be meant to do a part of it only.
    vec![if none || args.serve { failed("permissions", message, todo) } else { warning("permissions", message, todo) }]
}

/// What an instance says about itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InstanceAnswer {
    version: String,
    metadata: BTreeMap<String, String>,
    endpoints: Vec<AnsweringEndpoint>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AnsweringEndpoint {
    data: Option<EndpointData>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EndpointData {
    time: Option<DateTime<Utc>>,
}

/// Asks all instances at once; whether any answers.
async fn service(client: &Client, clocks: &mut Vec<ComparedClock>, checks: &mut Vec<DoctorFinding>) -> bool {
    let sent = Utc::now();
    let answers = match gather(client, &format!("$SRV.STATS.{SERVICE_NAME}")).await {
        Ok(answers) => answers,
        Err(why) => {
            checks.push(unknown("service", why));
            return false;
        }
    };
    let mut versions = BTreeMap::<String, Vec<String>>::new();
    let mut sites = BTreeSet::new();
    for (message, received) in answers {
        let Ok(answer) = serde_json::from_slice::<InstanceAnswer>(&message.payload) else { continue };
        let of = |name: &str| answer.metadata.get(name).cloned().unwrap_or_default();
        let (site, instance) = (of("site"), of("instance"));
        if let Some(time) = answer.endpoints.iter().find_map(|endpoint| endpoint.data.as_ref()?.time) {
            clocks.push(ComparedClock::new(format!("instance {instance}"), time, Sample { sent, received }));
        }
        versions.entry(answer.version.clone()).or_default().push(instance);
        sites.insert(site);
    }
    let number: usize = versions.values().map(Vec::len).sum();
    if number == 0 {
        let todo = "start the service (`stream-replicator serve`), and see its log; it uses the account of this login";
        checks.push(failed("service", format!("no instance answers on `$SRV.STATS.{SERVICE_NAME}`"), todo));
        return false;
    }
    checks.push(judge_versions(number, &versions));
    if sites.len() > 1 {
        let sites = listed(sites.iter().map(String::as_str));
        let todo = "give each site an account or a `--prefix` of its own: requests reach any of them";
        checks.push(warning("service", format!("several sites answer: {sites}"), todo));
    }
    true
}

fn judge_versions(number: usize, versions: &BTreeMap<String, Vec<String>>) -> DoctorFinding {
    let own = names::VERSION;
    let shown = versions
        .iter()
        .map(|(version, instances)| format!("{version} ({})", listed(instances.iter().map(String::as_str))));
    let shown: Vec<_> = shown.collect();
    let message = format!("{}: {}", counted(number as u64, "instance"), shown.join(", "));
    match versions.keys().next() {
        Some(version) if versions.len() == 1 && version == own => ok("service", message),
        Some(_) if versions.len() == 1 => {
            let todo = "use the command of the version that the service has: others may not know its requests";
            warning("service", format!("{message}; this command is {own}"), todo)
        }
        _ => warning("service", message, "bring all instances to one version"),
    }
}

/// All answers to one request, until no more arrive.
async fn gather(client: &Client, subject: &str) -> Result<Vec<(Message, DateTime<Utc>)>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("`{subject}`: {error}");
    let inbox = client.nats().new_inbox();
    let mut answers = client.nats().subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
    let published = client.nats().publish_with_reply(subject.to_owned(), inbox, "".into()).await;
    published.map_err(|error| failed(&error))?;
    let mut gathered = Vec::new();
    let mut within = client.answer_within();
    while let Ok(Some(message)) = tokio::time::timeout(within, answers.next()).await {
        if message.status == Some(async_nats::StatusCode::NO_RESPONDERS) {
            break;
        }
        gathered.push((message, Utc::now()));
        within = GATHER;
    }
    Ok(gathered)
}

fn clock(clocks: &[ComparedClock]) -> DoctorFinding {
    if clocks.is_empty() {
        return unknown("clocks", "no clock could be compared with that of this host");
    }
    let off = clocks.iter().filter(|clock| clock.is_off()).map(|clock| {
        let ahead = if clock.offset > TimeDelta::zero() { "ahead of" } else { "behind" };
        format!("{}: {} {ahead} this host", clock.whose, seconds(clock.offset.as_seconds_f64().abs()))
    });
    let off: Vec<_> = off.collect();
    if off.is_empty() {
        let compared = listed(clocks.iter().map(|clock| clock.whose.as_str()));
        return ok("clocks", format!("within {} of this host: {compared}", seconds(CLOCK_OFFSET.as_seconds_f64())));
    }
    let todo = "synchronize the clocks of these hosts and of this one, with NTP";
    warning("clocks", off.join("; "), todo)
}

async fn instances(client: &Client) -> Vec<DoctorFinding> {
    let reply: Result<Reply<Instances>, Error> = client.pages("instances").await;
    let rows = match reply {
        Ok(reply) => reply.value.instances,
        Err(error) => {
            return vec![failed("instances", error.to_string(), "see the log of the service")];
        }
    };
    let silent = rows.iter().filter(|row| row.silent_seconds > SILENT.as_secs_f64());
    let silent: Vec<_> = silent.map(|row| row.instance.as_str()).collect();
    if !silent.is_empty() {
        let todo = "see whether these instances run and reach the control server";
        return vec![warning("instances", format!("silent: {}", listed(silent)), todo)];
    }
    let message = match rows.len() {
        1 => "one instance: nothing is copied while it is away; start a second one elsewhere".to_owned(),
        number => format!("{number} instances"),
    };
    vec![ok("instances", message)]
}

async fn replications(client: &Client) -> Vec<DoctorFinding> {
    let reply: Result<Reply<Status>, Error> = client.pages("status").await;
    match reply {
        Ok(reply) => judge_replications(&reply.value.replications),
        Err(error) => vec![failed("replications", error.to_string(), "see the log of the service")],
    }
}

fn judge_replications(rows: &[Row]) -> Vec<DoctorFinding> {
    let mut findings = Vec::new();
    for state in [State::Held, State::Invalid, State::Stopped, State::Retrying] {
        let in_state: Vec<_> = rows.iter().filter(|row| row.state == state).collect();
        let Some(first) = in_state.first() else { continue };
        let message = format!("{}: {}", state_name(state), listed(in_state.iter().map(|row| row.replication.as_str())));
        let todo = first.todo.clone().unwrap_or_default();
        let todo = format!("{}: {todo}; `stream-replicator status` shows each", first.replication);
        let result = if state == State::Retrying { CheckResult::Warning } else { CheckResult::Failed };
        findings.push(DoctorFinding { name: "replications", result, message, todo: Some(todo) });
    }
    let off = rows.iter().filter(|row| {
        let offset = row.copy.source.clock_offset_seconds.unwrap_or_default();
        offset.abs() > CLOCK_OFFSET.as_seconds_f64()
    });
    let off: Vec<_> = off.map(|row| row.replication.as_str()).collect();
    if !off.is_empty() {
        let todo =
            "synchronize the clocks of the source servers and of the instances, with NTP: ages are by the source's";
        let message = format!("the clock of the source differs from that of the instance: {}", listed(off));
        findings.push(warning("replications", message, todo));
    }
    if findings.is_empty() {
        findings.push(ok("replications", counted(rows.len() as u64, "replication")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_permissions_are_those_of_the_page() {
        let page = include_str!("../../docs/permissions.md");
        let block = page.split("permissions {").nth(1).and_then(|rest| rest.split("subscribe").next()).unwrap();
        let documented: BTreeSet<_> = block.split('"').skip(1).step_by(2).map(str::to_owned).collect();
        let needed: BTreeSet<_> = needed_by_service("replicator", "REPLICATOR", "$JS.API").into_iter().collect();
        assert_eq!(needed, documented);
    }

    #[test]
    fn a_clock_is_off_beyond_what_the_answer_took() {
        let check = |offset: i64, took: i64, expect: bool| {
            let sent = Utc::now();
            let sample = Sample { sent, received: sent + TimeDelta::seconds(took) };
            let clock = ComparedClock::new("x".to_owned(), sent + TimeDelta::seconds(offset), sample);
            assert_eq!(clock.is_off(), expect, "{offset} {took}");
        };
        check(0, 0, false);
        check(5, 0, false);
        check(6, 0, true);
        check(-6, 0, true);
        check(6, 2, false);
        check(9, 2, true);
    }

    fn bucket(value: Value) -> Result<BucketInfo, String> {
        Ok(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn buckets_are_judged_by_what_servers_say() {
        let names = ["KV_R_CONFIG", "KV_R_LEASES", "KV_R_POSITIONS", "KV_R_STATE", "R_EVENTS"];
        let check = |all: Value, one: Option<Value>, result: CheckResult, expect: &str| {
            let mut infos: BTreeMap<_, _> =
                names.iter().map(|name| ((*name).to_owned(), bucket(all.clone()))).collect();
            if let Some(one) = one {
                infos.insert("KV_R_LEASES".to_owned(), bucket(one));
            }
            let found = judge_buckets("R", &infos);
            let worst = found.iter().max_by_key(|finding| rank(finding.result)).unwrap();
            assert_eq!(worst.result, result, "{found:?}");
            assert!(found.iter().any(|finding| finding.message.contains(expect)), "{found:?}");
        };
        let missing = json!({"error": {"code": 404, "description": "stream not found"}});
        let single = json!({"config": {"num_replicas": 1}});
        let peer = |current: bool| json!([{"name": "b", "current": current}]);
        let replicated = |leader: &str, current: bool| {
            let cluster = json!({"name": "c", "leader": leader, "replicas": peer(current)});
            json!({"config": {"num_replicas": 3}, "cluster": cluster})
        };
        check(missing.clone(), None, CheckResult::Failed, "no service has run here");
        check(single.clone(), Some(missing), CheckResult::Failed, "missing: KV_R_LEASES");
        check(single, None, CheckResult::Ok, "`R_*`");
        check(replicated("a", true), None, CheckResult::Ok, "`R_*`");
        check(replicated("a", true), Some(replicated("", true)), CheckResult::Failed, "`KV_R_LEASES` has no leader");
        check(replicated("a", true), Some(replicated("a", false)), CheckResult::Warning, "is not current at b");
        let one = json!({"config": {"num_replicas": 1}, "cluster": {"name": "c", "leader": "a"}});
        check(replicated("a", true), Some(one), CheckResult::Warning, "one replica in a cluster: KV_R_LEASES");
    }

    #[test]
    fn a_nearly_full_account_is_reported() {
        let check = |info: Value, expect: CheckResult| {
            let found = room(&serde_json::from_value(info.clone()).unwrap());
            assert_eq!(found[0].result, expect, "{info} {found:?}");
        };
        check(json!({"streams": 9, "storage": 5}), CheckResult::Ok);
        check(json!({"streams": 9, "limits": {"max_streams": 10, "max_storage": -1}}), CheckResult::Warning);
        check(json!({"storage": 89, "limits": {"max_storage": 100}}), CheckResult::Ok);
        check(json!({"storage": 91, "limits": {"max_storage": 100}}), CheckResult::Warning);
    }

    #[test]
    fn versions_that_differ_are_reported() {
        let check = |versions: &[&str], expect: CheckResult| {
            let found: BTreeMap<_, _> =
                versions.iter().map(|version| ((*version).to_owned(), vec!["i".to_owned()])).collect();
            assert_eq!(judge_versions(versions.len(), &found).result, expect, "{versions:?}");
        };
        check(&[names::VERSION], CheckResult::Ok);
        check(&["0.0.1"], CheckResult::Warning);
        check(&[names::VERSION, "0.0.1"], CheckResult::Warning);
    }
}
