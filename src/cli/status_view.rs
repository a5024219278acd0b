//! Status rows as text: everything about one replication, or one line each.

use chrono::Utc;
use serde_json::Value;

use super::{
    client::Client,
    error::Error,
    format::{bytes, count, counted, seconds, time},
    output::{Colour, Output, clean},
    progress::{percent, time_left},
    reply::Reply,
    status_filter::{StatusFilter, raw_rows},
};
use crate::{
    control::api::{NamedRequest, Status},
    status::{
        ConsumerError, ConsumersStatus, CopyStatus, Counters, Headroom, Lag, LastError, Ordering, Position,
        RetentionLimit, Row, SamplingStatus, State, TargetMode, Transport,
    },
};

/// A status as it came, and the rows in it.
pub(super) struct StatusView {
    pub(super) reply: Reply<Status>,
}

impl StatusView {
    /// Asks for the replications that are wanted, in the order that is wanted.
    pub(super) async fn request(client: &Client, filter: &StatusFilter) -> Result<Self, Error> {
        let reply = match filter.only_id() {
            Some(id) => client.query("status", &NamedRequest { replication: id.to_owned() }).await?,
            None => filter.apply(client.pages("status").await?)?,
        };
        Ok(Self { reply })
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.reply.value.replications
    }

    /// The rows as they were sent.
    pub(super) fn raw_rows(&self) -> Vec<Value> {
        raw_rows(&self.reply)
    }
}

/// Label and text of one line.
type DetailLine = (&'static str, String);

/// Everything about one replication. `rate` is in messages per second.
pub(super) fn detail(row: &Row, rate: Option<f64>, out: &Output) -> Vec<String> {
    let copy = &row.copy;
    let mut lines = vec![
        ("state", out.paint(state_colour(row.state), &state_name(row.state))),
        ("leader", format!("{}, epoch {}", leader(row), row.epoch)),
        ("document", format!("{}, revision {}", row.origin, row.config_revision)),
    ];
    lines.extend(sides(copy));
    lines.extend(progress(row, rate));
    lines.extend(not_copied(&copy.counters));
    lines.extend(copy.sampling.iter().flat_map(sampling_lines));
    lines.extend(copy.consumers.iter().flat_map(consumer_lines));
    lines.push(("errors", count(copy.counters.errors)));
    lines.extend(copy.last_error.iter().flat_map(error_lines));
    lines.extend(row.todo.iter().map(|todo| ("do", clean(todo))));
    let head = out.paint(Colour::Bold, &clean(&row.replication));
    let lines = lines.into_iter().map(|(label, text)| format!("  {label:<11} {text}"));
    std::iter::once(head).chain(lines).collect()
}

/// Both streams, and the servers that the leader is connected to.
fn sides(copy: &CopyStatus) -> [DetailLine; 2] {
    let (source, target) = (&copy.source, &copy.target);
    let connected = |yes: bool| if yes { "connected" } else { "not connected" };
    let server = |server: &str| if server.is_empty() { String::new() } else { format!(" at {server}") };
    let source_line = format!(
        "{}{}, {}, sequences {} to {}",
        source.stream,
        server(&source.server),
        connected(source.connected),
        known(source.first_seq.map(count)),
        known(source.last_seq.map(count))
    );
    let target_line = format!(
        "{}{}, {}, last sequence {}",
        target.stream,
        server(&target.server),
        connected(target.connected),
        known(target.last_seq.map(count))
    );
    [("source", source_line), ("target", target_line)]
}

/// How far the copy is, how it is written, and how much was read and written.
fn progress(row: &Row, per_second: Option<f64>) -> Vec<DetailLine> {
    let copy = &row.copy;
    let counters = &copy.counters;
    let mode = match copy.target_mode {
        TargetMode::Exclusive => "exclusive",
        TargetMode::Shared => "shared",
    };
    let order = match copy.ordering {
        Ordering::Relaxed => "relaxed",
        Ordering::Strict => "strict",
    };
    let messages = |number: u64, size: u64| format!("{}, {}", counted(number, "message"), bytes(size));
    let mut lines = vec![
        ("position", known(row.knows_position().then(|| position(copy.position)))),
        ("lag", lag(copy.lag, ", ")),
        ("headroom", headroom(copy.headroom)),
        ("clock", clock_offset(copy.source.clock_offset_seconds)),
        ("transport", format!("{}, {mode}, {order} order", transport(copy.transport))),
        ("in flight", messages(copy.in_flight.messages, copy.in_flight.bytes)),
        ("received", messages(counters.received, counters.received_bytes)),
        ("copied", messages(counters.copied, counters.copied_bytes)),
    ];
    if per_second.is_some() {
        lines.push(("rate", rate(per_second)));
    }
    lines.extend(far(copy, per_second).map(|far| ("progress", far)));
    lines
}

/// Messages that were not copied, by reason, and copies that the target removed too early; nothing where there are none.
fn not_copied(counters: &Counters) -> Vec<DetailLine> {
    let reasons = [
        (counters.skipped_old, "too old"),
        (counters.skipped_filtered, "filtered"),
        (counters.skipped_loop, "returned through a loop"),
        (counters.skipped_sampled, "sampled"),
        (counters.skipped_refused, "skipped"),
        (counters.dead_lettered, "dead-lettered"),
        (counters.gap_messages, "gone before they were read"),
        (counters.refused, "refused"),
    ];
    let reasons = reasons.iter().filter(|(number, _)| *number > 0);
    let reasons: Vec<_> = reasons.map(|(number, reason)| format!("{} {reason}", count(*number))).collect();
    let mut lines = Vec::new();
    if !reasons.is_empty() {
        lines.push(("not copied", reasons.join(", ")));
    }
    if counters.target_dropped > 0 {
        let dropped = counted(counters.target_dropped, "message");
        lines.push(("dropped", format!("{dropped} by the target while the source had them")));
    }
    lines
}

fn sampling_lines(sampling: &SamplingStatus) -> Vec<DetailLine> {
    let (senders, waiting) = (count(sampling.senders), count(sampling.advisories_waiting));
    let mut lines = vec![("senders", format!("{senders}, advisories to be published: {waiting}"))];
    if sampling.untracked > 0 {
        let untracked = counted(sampling.untracked, "message");
        lines.push(("untracked", format!("{untracked} of further senders were copied")));
    }
    lines.extend(sampling.advisory_error.iter().map(|error| ("advisories", clean(error))));
    lines
}

/// A line for each consumer that is not kept at the target; nothing where all are.
fn consumer_lines(consumers: &ConsumersStatus) -> Vec<DetailLine> {
    let mut lines: Vec<_> = consumers.errors.iter().map(|error| ("consumers", clean(&consumer_line(error)))).collect();
    let more = consumers.failing.saturating_sub(consumers.errors.len() as u64);
    if more > 0 {
        lines.push(("consumers", format!("{} more are not kept at the target", count(more))));
    }
    lines
}

fn consumer_line(error: &ConsumerError) -> String {
    match &error.consumer {
        Some(consumer) => format!("{consumer} is not kept at the target: {}", error.message),
        None => format!("the last pass was not completed: {}", error.message),
    }
}

fn error_lines(error: &LastError) -> Vec<DetailLine> {
    let message = clean(&error.message);
    let age = error_age(error);
    let over = if error.current { "" } else { ", over" };
    let mut lines = vec![("last error", format!("{}, {age} ago{over}, {}: {message}", time(error.at), error.kind))];
    if let Some(seq) = error.source_seq {
        let content = error.source_subject.as_ref().zip(error.source_bytes);
        let content = content.map(|(subject, size)| format!(", subject {}, {},", clean(subject), bytes(size)));
        lines.push(("message", format!("source sequence {seq}{} can never be stored", content.unwrap_or_default())));
    }
    lines
}

/// How long ago an error happened.
pub(super) fn error_age(error: &LastError) -> String {
    seconds((Utc::now() - error.at).as_seconds_f64())
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
pub(super) fn known(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn position(at: Position) -> String {
    format!("source {}, target {}", count(at.source_seq), count(at.target_seq))
}

/// How far a copy that lags is, by the sequences of the source, and how long it still takes.
fn far(copy: &CopyStatus, per_second: Option<f64>) -> Option<String> {
    let left = copy.lag.map(|lag| lag.messages).filter(|left| *left > 0)?;
    let (first, last) = copy.source.first_seq.zip(copy.source.last_seq)?;
    let all = last.checked_sub(first)? + 1;
    let done = (copy.position.source_seq + 1).saturating_sub(first).min(all);
    let time = time_left(Some(left), per_second).map_or_else(String::new, |time| format!(", {time}"));
    Some(format!("{} of the source's sequences{time}", percent(done, all)))
}

/// The lag in words: messages and seconds.
pub(super) fn lag(lag: Option<Lag>, between: &str) -> String {
    let Some(lag) = lag else { return "-".to_owned() };
    format!("{}{between}{}", counted(lag.messages, "message"), known(lag.seconds.map(seconds)))
}

/// The last error, as long as it matters.
pub(super) fn current_error(row: &Row) -> Option<&LastError> {
    row.copy.last_error.as_ref().filter(|error| error.current)
}

pub(super) fn leader(row: &Row) -> String {
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

pub(super) fn transport(transport: Transport) -> &'static str {
    match transport {
        Transport::FastIngest => "fast_ingest",
        Transport::Pipelined => "pipelined",
        Transport::Feed => "feed",
    }
}

pub(super) fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/s", count(rate.round() as u64)))
}

/// The name of a state, as in JSON.
pub(super) fn state_name(state: State) -> String {
    serde_json::to_value(state).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

pub(super) fn state_colour(state: State) -> Colour {
    match state {
        State::Running => Colour::Green,
        State::Starting | State::Retrying => Colour::Yellow,
        State::Paused => Colour::Cyan,
        State::Held | State::Invalid | State::Stopped => Colour::Red,
    }
}
