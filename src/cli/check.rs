//! `stream-replicator check`: replications as a monitoring plugin judges them, in the formats of `nats server check`.

use prometheus::{GaugeVec, Opts, Registry, TextEncoder};
use serde::Serialize;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{count, counted, seconds},
    global::Global,
    output::{Colour, Output, clean},
    status_filter::StatusFilter,
    status_table::footer,
    status_view::{StatusView, current_error, state_name},
};
use crate::status::{Row, State};

/// Exit code for a check that could not be made.
pub(super) const UNKNOWN: u8 = CheckStatus::Unknown.code();

/// Check replications for a monitoring system
///
/// Exit codes: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN. A replication that is invalid, a service that does not answer, and an
/// id that does not exist are critical; one that is retrying or stopped is a warning; a lag that has a threshold and is
/// not known is unknown.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replications, or patterns of their ids such as `'S0*'` [default: all]
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Warn if this many messages wait
    #[arg(long, value_name = "MESSAGES")]
    lag_warn: Option<u64>,

    /// Critical if this many messages wait
    #[arg(long, value_name = "MESSAGES")]
    lag_critical: Option<u64>,

    /// Warn if the oldest waiting message is this old
    #[arg(long, value_name = "SECONDS", value_parser = age)]
    behind_warn: Option<f64>,

    /// Critical if the oldest waiting message is this old
    #[arg(long, value_name = "SECONDS", value_parser = age)]
    behind_critical: Option<f64>,

    /// Result for a held replication
    #[arg(long, value_name = "RESULT", value_enum, default_value = "critical")]
    held: HeldResult,

    /// Format of the output
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "nagios", conflicts_with = "json")]
    format: CheckFormat,

    #[command(flatten)]
    pub(super) global: Global,
}

/// What a held replication is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum HeldResult {
    Ok,
    Warning,
    Critical,
}

/// How the result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CheckFormat {
    /// One line, with performance data
    Nagios,
    /// Metrics for a textfile collector
    Prometheus,
    /// One JSON object
    Json,
    /// Lines for people
    Text,
}

/// Result of a check; its number is the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum CheckStatus {
    Ok,
    Warning,
    Critical,
    Unknown,
}

impl CheckStatus {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }

    const fn code(self) -> u8 {
        self as u8
    }

    /// The worse of two: an unknown result hides neither a warning nor a critical one.
    fn worse(self, other: Self) -> Self {
        let rank = |status| match status {
            Self::Ok => 0,
            Self::Unknown => 1,
            Self::Warning => 2,
            Self::Critical => 3,
        };
        if rank(other) > rank(self) { other } else { self }
    }
}

/// A number with its thresholds.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct PerformanceData {
    name: &'static str,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    critical: Option<f64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    unit: &'static str,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct CheckReport {
    status: CheckStatus,
    status_code: u8,
    check_suite: &'static str,
    check_name: &'static str,
    ok: Vec<String>,
    warning: Vec<String>,
    critical: Vec<String>,
    unknown: Vec<String>,
    perf_data: Vec<PerformanceData>,
}

/// Seconds, or a duration with units.
fn age(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => Ok(seconds),
        Ok(_) => Err("it is not a number of seconds".to_owned()),
        Err(_) => nats_lane::parse_duration(text)
            .map(|duration| duration.as_secs_f64())
            .map_err(|error| format!("neither a number of seconds nor a duration such as `5m` (it {error})")),
    }
}

impl Args {
    /// Whether errors are for a program too.
    pub(super) fn json(&self) -> bool {
        self.global.json
    }

    fn format(&self) -> CheckFormat {
        if self.global.json { CheckFormat::Json } else { self.format }
    }
}

/// Carries out the check; its exit code is the result.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let filter = StatusFilter { ids: args.ids.clone(), ..StatusFilter::default() };
    let view = match Client::connect(&args.global).await {
        Ok(client) => StatusView::request(&client, &filter).await,
        Err(error) => Err(error),
    };
    let (report, rows) = match &view {
        Ok(view) => (report(args, view.rows()), view.rows()),
        Err(error) => (failed(error), &[][..]),
    };
    match args.format() {
        CheckFormat::Nagios => out.line(&nagios(&report)),
        CheckFormat::Prometheus => out.text(&metrics(&report, rows)?),
        CheckFormat::Json => out.value(&report),
        CheckFormat::Text => text(&report, rows, out),
    }
    Ok(CommandVerdict::Code(report.status_code))
}

impl CheckReport {
    fn new() -> Self {
        Self {
            status: CheckStatus::Ok,
            status_code: 0,
            check_suite: "stream-replicator",
            check_name: "replications",
            ok: Vec::new(),
            warning: Vec::new(),
            critical: Vec::new(),
            unknown: Vec::new(),
            perf_data: Vec::new(),
        }
    }

    fn add(&mut self, status: CheckStatus, message: String) {
        self.status = self.status.worse(status);
        self.status_code = self.status.code();
        let list = match status {
            CheckStatus::Ok => &mut self.ok,
            CheckStatus::Warning => &mut self.warning,
            CheckStatus::Critical => &mut self.critical,
            CheckStatus::Unknown => &mut self.unknown,
        };
        list.push(clean(&message));
    }
}

/// Without an answer: a wrong call leaves the state unknown, anything else is what the check is for.
fn failed(error: &Error) -> CheckReport {
    let mut report = CheckReport::new();
    let status = if matches!(error, Error::Usage(_)) { CheckStatus::Unknown } else { CheckStatus::Critical };
    report.add(status, error.to_string());
    report
}

fn report(args: &Args, rows: &[Row]) -> CheckReport {
    let mut report = CheckReport::new();
    for row in rows {
        let before = report.status_messages();
        state(args, row, &mut report);
        lag(args, row, &mut report);
        if report.status_messages() == before {
            report.add(CheckStatus::Ok, format!("{} is {}", row.replication, state_name(row.state)));
        }
    }
    if rows.is_empty() {
        report.add(CheckStatus::Ok, "there are no replications".to_owned());
    }
    report.perf_data = performance(args, rows);
    report
}

impl CheckReport {
    /// How many messages are not about something that is well.
    fn status_messages(&self) -> usize {
        self.warning.len() + self.critical.len() + self.unknown.len()
    }
}

fn state(args: &Args, row: &Row, report: &mut CheckReport) {
    let error = current_error(row);
    let status = match (row.state, error) {
        (State::Held, _) => match args.held {
            HeldResult::Ok => return,
            HeldResult::Warning => CheckStatus::Warning,
            HeldResult::Critical => CheckStatus::Critical,
        },
        (State::Invalid, _) => CheckStatus::Critical,
        (State::Retrying | State::Stopped, _) => CheckStatus::Warning,
        (_, Some(error)) if error.kind == "invalid" => CheckStatus::Warning,
        (State::Starting | State::Running | State::Paused, _) => return,
    };
    let error = error.map(|error| format!(": {}", error.message)).unwrap_or_default();
    report.add(status, format!("{} is {}{error}", row.replication, state_name(row.state)));
}

fn lag(args: &Args, row: &Row, report: &mut CheckReport) {
    let id = &row.replication;
    let has_lag = args.lag_warn.or(args.lag_critical).is_some();
    let has_age = args.behind_warn.or(args.behind_critical).is_some();
    let Some(lag) = row.copy.lag else {
        if (has_lag || has_age) && matches!(row.state, State::Running | State::Starting) {
            report.add(CheckStatus::Unknown, format!("the lag of {id} is not known"));
        }
        return;
    };
    if let Some(status) = over(&lag.messages, args.lag_warn, args.lag_critical) {
        report.add(status, format!("{id} is behind by {}", counted(lag.messages, "message")));
    }
    let Some(age) = lag.seconds else {
        if has_age {
            report.add(CheckStatus::Unknown, format!("the age of the oldest message that waits for {id} is not known"));
        }
        return;
    };
    if let Some(status) = over(&age, args.behind_warn, args.behind_critical) {
        report.add(status, format!("{id} is behind by {}", seconds(age)));
    }
}

/// What a value is that has reached a threshold.
fn over<T: PartialOrd>(value: &T, warn: Option<T>, critical: Option<T>) -> Option<CheckStatus> {
    let reached = |threshold: Option<T>| threshold.is_some_and(|threshold| *value >= threshold);
    if reached(critical) { Some(CheckStatus::Critical) } else { reached(warn).then_some(CheckStatus::Warning) }
}

/// Numbers over all replications: the thresholds are for each, so the greatest lag and age.
fn performance(args: &Args, rows: &[Row]) -> Vec<PerformanceData> {
    let number = |name, value, warning, critical, unit| PerformanceData { name, value, warning, critical, unit };
    let plain = |name, value: usize| number(name, value as f64, None, None, "");
    let in_state = |state| rows.iter().filter(|row| row.state == state).count();
    let mut data = vec![
        plain("replications", rows.len()),
        plain("running", in_state(State::Running)),
        plain("retrying", in_state(State::Retrying)),
        plain("held", in_state(State::Held)),
    ];
    let lags = rows.iter().filter_map(|row| row.copy.lag);
    let (warn, critical) = (args.lag_warn.map(|lag| lag as f64), args.lag_critical.map(|lag| lag as f64));
    if let Some(lag) = lags.clone().map(|lag| lag.messages).max() {
        data.push(number("lag", lag as f64, warn, critical, ""));
    }
    if let Some(age) = lags.filter_map(|lag| lag.seconds).max_by(f64::total_cmp) {
        data.push(number("behind", (age * 1e3).round() / 1e3, args.behind_warn, args.behind_critical, "s"));
    }
    data
}

/// `CRITICAL replications: ORDERS is held: ... | replications=2 held=1 lag=5;100;1000`
fn nagios(report: &CheckReport) -> String {
    let mut messages: Vec<&str> = Vec::new();
    for list in [&report.critical, &report.warning, &report.unknown] {
        messages.extend(list.iter().map(String::as_str));
    }
    let text = match (&messages[..], &report.ok[..]) {
        ([], [one]) => one.clone(),
        ([], all) => format!("{} OK", counted(all.len() as u64, "replication")),
        (messages, _) => messages.join("; "),
    };
    let threshold = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    let data = report.perf_data.iter().map(|data| {
        let PerformanceData { name, value, warning, critical, unit } = data;
        let limits = match (warning, critical) {
            (None, None) => String::new(),
            _ => format!(";{};{}", threshold(*warning), threshold(*critical)),
        };
        format!("{name}={value}{unit}{limits}")
    });
    let data = data.collect::<Vec<_>>().join(" ");
    let data = if data.is_empty() { data } else { format!(" | {data}") };
    // what follows a bar is taken for performance data
    format!("{} {}: {}{data}", report.status.name(), report.check_name, text.replace('|', "/"))
}

fn metrics(report: &CheckReport, rows: &[Row]) -> Result<String, Error> {
    let failed = |error: prometheus::Error| Error::Failed(format!("the metrics cannot be written: {error}"));
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, labels: &[&str]| {
        let gauge =
            GaugeVec::new(Opts::new(format!("stream_replicator_check_{name}"), help), labels).map_err(failed)?;
        registry.register(Box::new(gauge.clone())).map_err(failed)?;
        Ok::<_, Error>(gauge)
    };
    let result =
        gauge("status_code", "Result of the check: 0 OK, 1 warning, 2 critical, 3 unknown", &["item", "status"])?;
    result.with_label_values(&[report.check_name, report.status.name()]).set(report.status_code.into());
    let states = gauge("state", "1 for the state of the replication", &["replication", "state"])?;
    let lag = gauge("lag_messages", "Messages that wait", &["replication"])?;
    let behind = gauge("behind_seconds", "Age of the oldest waiting message", &["replication"])?;
    for row in rows {
        let id = row.replication.as_str();
        states.with_label_values(&[id, &state_name(row.state)]).set(1.0);
        if let Some(known) = row.copy.lag {
            lag.with_label_values(&[id]).set(known.messages as f64);
            if let Some(age) = known.seconds {
                behind.with_label_values(&[id]).set(age);
            }
        }
    }
    TextEncoder::new().encode_to_string(&registry.gather()).map_err(failed)
}

fn text(report: &CheckReport, rows: &[Row], out: &mut Output) {
    let colour = |status| match status {
        CheckStatus::Ok => Colour::Green,
        CheckStatus::Warning => Colour::Yellow,
        CheckStatus::Critical => Colour::Red,
        CheckStatus::Unknown => Colour::Cyan,
    };
    out.line(&out.paint(colour(report.status), report.status.name()));
    for (status, messages) in [
        (CheckStatus::Critical, &report.critical),
        (CheckStatus::Warning, &report.warning),
        (CheckStatus::Unknown, &report.unknown),
    ] {
        for message in messages {
            out.line(&format!("{} {message}", out.paint(colour(status), &format!("{:<8}", status.name()))));
        }
    }
    out.line(&format!("{} OK", count(report.ok.len() as u64)));
    if !rows.is_empty() {
        out.line(&footer(rows));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::{super::connection::without_environment, *};

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        check: Args,
    }

    fn args(flags: &[&str]) -> Args {
        use clap::{CommandFactory, FromArgMatches};
        let all = ["check"].iter().chain(flags);
        let matches = without_environment(Command::command()).try_get_matches_from(all).unwrap();
        Command::from_arg_matches(&matches).unwrap().check
    }

    fn row(id: &str, state: &str, lag: Value) -> Row {
        serde_json::from_value(json!({"replication": id, "state": state, "origin": "kv", "leader": "i", "epoch": 1,
            "config_revision": 1, "lag": lag}))
        .unwrap()
    }

    fn lagging(messages: u64, seconds: f64) -> Row {
        row("A", "running", json!({"messages": messages, "seconds": seconds}))
    }

    #[test]
    fn thresholds_and_states_make_the_result() {
        let check = |flags: &[&str], row: Row, expect: &str, code: u8| {
            let report = report(&args(flags), &[row]);
            let line = nagios(&report);
            assert!(line.starts_with(expect) && report.status_code == code, "{flags:?}: {line}");
        };
        check(&[], lagging(5000, 900.0), "OK replications: A is running | replications=1 running=1 ", 0);
        check(&["--lag-warn", "10"], lagging(9, 0.0), "OK", 0);
        check(&["--lag-warn", "10"], lagging(10, 0.0), "WARNING replications: A is behind by 10 messages |", 1);
        check(&["--lag-warn", "10", "--lag-critical", "20"], lagging(20, 0.0), "CRITICAL", 2);
        check(&["--behind-warn", "60"], lagging(1, 61.0), "WARNING replications: A is behind by 1m1s |", 1);
        check(&["--behind-critical", "5m"], lagging(1, 300.0), "CRITICAL", 2);
        check(&["--lag-warn", "1"], row("A", "running", Value::Null), "UNKNOWN replications: the lag of A is not", 3);
        check(&["--behind-warn", "1"], row("A", "running", json!({"messages": 1})), "UNKNOWN", 3);
        check(&[], row("A", "held", Value::Null), "CRITICAL replications: A is held |", 2);
        check(&["--held", "warning"], row("A", "held", Value::Null), "WARNING", 1);
        check(&["--held", "ok"], row("A", "held", Value::Null), "OK replications: A is held", 0);
        check(&[], row("A", "invalid", Value::Null), "CRITICAL", 2);
        check(&[], row("A", "retrying", Value::Null), "WARNING", 1);
        check(&["--lag-warn", "1"], row("A", "paused", Value::Null), "OK", 0);
    }

    #[test]
    fn the_worst_counts_and_all_are_named() {
        let rows = [lagging(5, 1.0), row("B", "held", Value::Null), row("C", "retrying", Value::Null)];
        let line = nagios(&report(&args(&["--lag-warn", "5"]), &rows));
        let expect = "CRITICAL replications: B is held; A is behind by 5 messages; C is retrying | replications=3 running=1 \
                      retrying=1 held=1 lag=5;5; behind=1s";
        assert_eq!(line, expect);
        assert_eq!(
            nagios(&report(&args(&[]), &[])),
            "OK replications: there are no replications | replications=0 \
                   running=0 retrying=0 held=0"
        );
    }

    #[test]
    fn metrics_have_the_result_and_each_replication() {
        let rows = [lagging(5, 1.5), row("B", "held", Value::Null)];
        let text = metrics(&report(&args(&[]), &rows), &rows).unwrap();
        for line in [
            "stream_replicator_check_status_code{item=\"replications\",status=\"CRITICAL\"} 2",
            "stream_replicator_check_state{replication=\"B\",state=\"held\"} 1",
            "stream_replicator_check_lag_messages{replication=\"A\"} 5",
            "stream_replicator_check_behind_seconds{replication=\"A\"} 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("lag_messages{replication=\"B\"}"), "{text}");
    }

    #[test]
    fn an_age_is_seconds_or_a_duration() {
        assert_eq!(["30", "1.5", "2m"].map(age), [Ok(30.0), Ok(1.5), Ok(120.0)]);
        for wrong in ["-1", "soon", "", "inf"] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
    }
}
