//! `stream-replicator status`: what runs and how far it is, once, as it changes, or when it has caught up.

use std::time::Duration;

use chrono::Utc;
use serde::Deserialize;
use serde_json::Value;

use super::{
    client::{Client, Reply},
    config::{state_colour, state_name},
    error::{Error, Verdict},
    global::Global,
    output::{Colour, Output, Table, clean},
    wait, watch,
    words::{bytes, count, counted, seconds, time},
};
use crate::{
    control::api::{NamedRequest, Status},
    status::{Headroom, Lag, LastError, Ordering, Position, RetentionLimit, Row, TargetMode, Transport},
};

/// A caller that waits longer asks again after this time without an answer.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// Show the state and progress of replications
///
/// With an id, everything about one replication.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replication
    id: Option<String>,

    /// Show it again and again: once a second on a terminal, else a line for each change
    #[arg(long, short)]
    watch: bool,

    /// Wait until nothing is left to copy, for two seconds; exit code 1 after `--timeout`, or when a replication is
    /// held, invalid or stopped
    #[arg(long, conflicts_with = "watch")]
    wait_caught_up: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// A status as it came, and the rows in it.
pub(super) struct StatusView {
    pub(super) reply: Reply<Status>,
}

impl StatusView {
    /// Asks for one replication or for all.
    pub(super) async fn ask(client: &Client, id: Option<&str>) -> Result<Self, Error> {
        let reply = match id {
            Some(id) => client.query("status", &NamedRequest { replication: id.to_owned() }).await?,
            None => client.pages("status").await?,
        };
        Ok(Self { reply })
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.reply.value.replications
    }

    /// The rows as they were sent.
    pub(super) fn raw_rows(&self) -> Vec<Value> {
        #[derive(Deserialize)]
        struct RawStatus {
            replications: Vec<Value>,
        }
        serde_json::from_slice::<RawStatus>(&self.reply.raw).map(|raw| raw.replications).unwrap_or_default()
    }
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<Verdict, Error> {
    let client = Client::connect(&args.global).await?;
    let id = args.id.as_deref();
    if args.wait_caught_up {
        let client = client.answering_within(LOOK_WITHIN);
        return wait::until_caught_up(&client, id, args.global.asking.limit(), out).await;
    }
    if args.watch {
        return watch::run(&client, id, out).await;
    }
    let view = StatusView::ask(&client, id).await?;
    if out.json() {
        out.reply(&view.reply, |_| String::new());
    } else {
        for line in lines(&view, id, None, out) {
            out.line(&line);
        }
    }
    Ok(Verdict::Good)
}

/// The output for people: everything about one replication, or a table. `rates` are messages per second, in the order
/// of the rows.
pub(super) fn lines(view: &StatusView, id: Option<&str>, rates: Option<&[Option<f64>]>, out: &Output) -> Vec<String> {
    match (id, view.rows()) {
        (Some(_), [row]) => detail(row, rates.and_then(|rates| *rates.first()?), out),
        (_, rows) => out.render(&table(rows, rates)),
    }
}

fn table(rows: &[Row], rates: Option<&[Option<f64>]>) -> Table {
    let mut table = match rates {
        None => Table::new(&["REPLICATION", "STATE", "LAG", "BEHIND", "POSITION", "TRANSPORT", "LEADER", "LAST ERROR"])
            .right(&[2, 3, 4]),
        Some(_) => Table::new(&[
            "REPLICATION",
            "STATE",
            "LAG",
            "BEHIND",
            "POSITION",
            "RATE",
            "TRANSPORT",
            "LEADER",
            "LAST ERROR",
        ])
        .right(&[2, 3, 4, 5]),
    }
    .painted(1);
    for (index, row) in rows.iter().enumerate() {
        let copy = &row.copy;
        let mut cells = vec![
            row.replication.clone(),
            state_name(row.state),
            known(copy.lag.map(|lag| count(lag.messages))),
            known(copy.lag.and_then(|lag| lag.seconds).map(seconds)),
            known(row.knows_position().then(|| count(copy.position.source_seq))),
        ];
        if let Some(rates) = rates {
            cells.push(rate(rates.get(index).copied().flatten()));
        }
        let error = current_error(row).map_or_else(String::new, |error| shortened(&error.message));
        cells.extend([transport(copy.transport).to_owned(), leader(row), error]);
        table.row(state_colour(row.state), cells);
    }
    table
}

fn detail(row: &Row, now: Option<f64>, out: &Output) -> Vec<String> {
    let copy = &row.copy;
    let connected = |yes: bool| if yes { "connected" } else { "not connected" };
    let server = |server: &str| if server.is_empty() { String::new() } else { format!(" at {server}") };
    let counters = &copy.counters;
    let mode = match copy.target_mode {
        TargetMode::Exclusive => "exclusive",
        TargetMode::Shared => "shared",
    };
    let order = match copy.ordering {
        Ordering::Relaxed => "relaxed",
        Ordering::Strict => "strict",
    };
    let (source, target) = (&copy.source, &copy.target);
    let mut fields = vec![
        ("state", out.paint(state_colour(row.state), &state_name(row.state))),
        ("leader", format!("{}, epoch {}", leader(row), row.epoch)),
        ("document", format!("{}, revision {}", row.origin, row.config_revision)),
        (
            "source",
            format!(
                "{}{}, {}, sequences {} to {}",
                source.stream,
                server(&source.server),
                connected(source.connected),
                known(source.first_seq.map(count)),
                known(source.last_seq.map(count))
            ),
        ),
        (
            "target",
            format!(
                "{}{}, {}, last sequence {}",
                target.stream,
                server(&target.server),
                connected(target.connected),
                known(target.last_seq.map(count))
            ),
        ),
        ("position", known(row.knows_position().then(|| position(copy.position)))),
        ("lag", lag(copy.lag, ", ")),
        ("headroom", headroom(copy.headroom)),
        ("clock", clock_offset(source.clock_offset_seconds)),
        ("transport", format!("{}, {mode}, {order} order", transport(copy.transport))),
        ("in flight", format!("{}, {}", counted(copy.in_flight.messages, "message"), bytes(copy.in_flight.bytes))),
        ("received", format!("{}, {}", counted(counters.received, "message"), bytes(counters.received_bytes))),
        ("copied", format!("{}, {}", counted(counters.copied, "message"), bytes(counters.copied_bytes))),
    ];
    if now.is_some() {
        fields.push(("rate", rate(now)));
    }
    let skipped = [
        (counters.skipped_old, "too old"),
        (counters.skipped_filtered, "filtered"),
        (counters.skipped_sampled, "sampled"),
        (counters.skipped_refused, "skipped"),
        (counters.dead_lettered, "dead-lettered"),
        (counters.gap_messages, "gone before they were read"),
        (counters.refused, "refused"),
    ];
    let skipped: Vec<_> = skipped
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, why)| format!("{} {why}", count(*number)))
        .collect();
    if !skipped.is_empty() {
        fields.push(("not copied", skipped.join(", ")));
    }
    if counters.target_dropped > 0 {
        let dropped = counted(counters.target_dropped, "message");
        fields.push(("dropped", format!("{dropped} by the target while the source had them")));
    }
    if let Some(sampling) = &copy.sampling {
        let (senders, waiting) = (count(sampling.senders), count(sampling.advisories_waiting));
        fields.push(("senders", format!("{senders}, advisories to be published: {waiting}")));
        if sampling.untracked > 0 {
            let untracked = counted(sampling.untracked, "message");
            fields.push(("untracked", format!("{untracked} of further senders were copied")));
        }
        if let Some(error) = &sampling.advisory_error {
            fields.push(("advisories", clean(error)));
        }
    }
    fields.push(("errors", count(counters.errors)));
    if let Some(error) = &copy.last_error {
        let message = clean(&error.message);
        let age = seconds((Utc::now() - error.at).as_seconds_f64());
        let over = if error.current { "" } else { ", over" };
        fields.push(("last error", format!("{}, {age} ago{over}, {}: {message}", time(error.at), error.kind)));
        if let Some(seq) = error.source_seq {
            fields.push(("message", format!("source sequence {seq} can never be stored")));
        }
    }
    if let Some(todo) = &row.todo {
        fields.push(("do", clean(todo)));
    }
    let head = out.paint(Colour::Bold, &clean(&row.replication));
    let fields = fields.into_iter().map(|(name, text)| format!("  {name:<11} {text}"));
    std::iter::once(head).chain(fields).collect()
}

/// One row in one line.
pub(super) fn line(row: &Row) -> String {
    let copy = &row.copy;
    let error = current_error(row).map(|error| format!(", last error: {}", error.message));
    clean(&format!(
        "{} {}, lag {}, position {}, leader {}{}",
        row.replication,
        state_name(row.state),
        lag(copy.lag, " and "),
        known(row.knows_position().then(|| copy.position.source_seq.to_string())),
        leader(row),
        error.unwrap_or_default()
    ))
}

/// `-` where it is not known.
fn known(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn position(at: Position) -> String {
    format!("source {}, target {}", count(at.source_seq), count(at.target_seq))
}

/// The lag in words: messages and seconds.
pub(super) fn lag(lag: Option<Lag>, between: &str) -> String {
    let Some(lag) = lag else { return "-".to_owned() };
    format!("{}{between}{}", counted(lag.messages, "message"), known(lag.seconds.map(seconds)))
}

/// The last error, as long as it matters.
fn current_error(row: &Row) -> Option<&LastError> {
    row.copy.last_error.as_ref().filter(|error| error.current)
}

fn leader(row: &Row) -> String {
    clean(row.leader.as_deref().unwrap_or("-"))
}

/// How long the source keeps messages that are not copied.
fn headroom(headroom: Option<Headroom>) -> String {
    let Some(Headroom { seconds: left, limit, low_below }) = headroom else { return "-".to_owned() };
    let limit = match limit {
        RetentionLimit::Age => "age",
        RetentionLimit::Messages => "messages",
        RetentionLimit::Bytes => "bytes",
    };
    let low = if left < low_below { ", low" } else { "" };
    format!("{} by the limit of {limit}{low}", seconds(left))
}

/// How the clock of the source server differs from the clock of the instance's host.
fn clock_offset(offset: Option<f64>) -> String {
    match offset {
        None => "-".to_owned(),
        Some(offset) if offset.abs() < 0.0005 => "source server agrees with the instance".to_owned(),
        Some(offset) => {
            let direction = if offset > 0.0 { "ahead of" } else { "behind" };
            format!("source server is {} {direction} the instance", seconds(offset.abs()))
        }
    }
}

fn transport(transport: Transport) -> &'static str {
    match transport {
        Transport::FastIngest => "fast_ingest",
        Transport::Pipelined => "pipelined",
        Transport::Feed => "feed",
    }
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/s", count(rate.round() as u64)))
}

/// The beginning of a message, for a table.
fn shortened(message: &str) -> String {
    const MOST: usize = 70;
    match message.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message.to_owned(),
    }
}
