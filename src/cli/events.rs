//! `stream-replicator events`: stored ones, where a stream captures them, and new ones.

use std::{fmt::Display, pin::pin};

use async_nats::{
    Message,
    jetstream::{self, consumer::DeliverPolicy, context::RequestErrorKind, response::Response},
};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, stream::select_all};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use wildmatch::WildMatch;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::parse_time,
    global::Global,
    output::{Colour, Output, clean},
    select::is_pattern,
    stream_reader::{self, StoredMessages},
};
use crate::events::Event;

/// Show events: stored ones, where a stream captures them, or live ones
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replications, or patterns of their ids such as `'S0*'` [default: all]
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Only events of this kind; can be given several times
    #[arg(long = "kind", short, value_name = "KIND", value_parser = Event::KINDS)]
    kinds: Vec<String>,

    /// Show events as they are published; with `--since` first those stored since then
    #[arg(long, short)]
    follow: bool,

    /// Only events stored since this time: RFC 3339, or how long ago, such as `1h`
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<DateTime<Utc>>,

    #[command(flatten)]
    pub(super) global: Global,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    if let Some(id) = args.ids.iter().find(|id| !is_pattern(id) && !is_id(id)) {
        return Err(Error::Usage(format!("`{}` is not the id of a replication", clean(id))));
    }
    let client = Client::connect(&args.global).await?;
    let subjects = subjects(client.prefix(), &args.ids, &args.kinds);
    let wanted = EventFilter::new(&args.ids);
    if args.follow && args.since.is_none() {
        live(&client, subjects, &wanted, out).await?;
    } else {
        stored(&client, subjects, &wanted, args, out).await?;
    }
    Ok(CommandVerdict::Good)
}

/// An id becomes part of a subject.
fn is_id(id: &str) -> bool {
    id.split('.').all(|token| !token.is_empty() && token.chars().all(|c| c.is_ascii_graphic() && !"*>".contains(c)))
}

/// Subjects of these kinds and ids. For a pattern all ids are read, and the filter picks.
fn subjects(prefix: &str, ids: &[String], kinds: &[String]) -> Vec<String> {
    let all = ids.is_empty() || ids.iter().any(|id| is_pattern(id));
    let ids: Vec<&str> = if all { vec![">"] } else { ids.iter().map(String::as_str).collect() };
    let kinds: Vec<&str> = if kinds.is_empty() { vec!["*"] } else { kinds.iter().map(String::as_str).collect() };
    let of_kind = |kind: &&str| ids.iter().map(|id| format!("{prefix}.event.{kind}.{id}")).collect::<Vec<_>>();
    kinds.iter().flat_map(of_kind).collect()
}

/// Which replications' events are shown.
struct EventFilter(Vec<WildMatch>);

impl EventFilter {
    fn new(ids: &[String]) -> Self {
        Self(ids.iter().map(|id| WildMatch::new(id)).collect())
    }

    /// An event that does not name its replication is shown: there is more wrong than that.
    fn takes(&self, event: &Value) -> bool {
        let id = event.get("replication").and_then(Value::as_str);
        self.0.is_empty() || id.is_none_or(|id| self.0.iter().any(|pattern| pattern.matches(id)))
    }
}

async fn live(client: &Client, subjects: Vec<String>, wanted: &EventFilter, out: &mut Output) -> Result<(), Error> {
    let failed = |error: &dyn Display| Error::Failed(format!("events at `{}`: {error}", client.server()));
    let mut subscriptions = Vec::new();
    for subject in subjects {
        subscriptions.push(client.nats().subscribe(subject).await.map_err(|error| failed(&error))?);
    }
    client.nats().flush().await.map_err(|error| failed(&error))?;
    let mut messages = select_all(subscriptions);
    let mut refused = pin!(client.subscription_refused());
    while !out.closed() {
        tokio::select! {
            message = messages.next() => match message {
                Some(message) => show(&message, wanted, out),
                None => break,
            },
            said = &mut refused => return Err(failed(&said)),
        }
    }
    Ok(())
}

async fn stored(
    client: &Client,
    subjects: Vec<String>,
    wanted: &EventFilter,
    args: &Args,
    out: &mut Output,
) -> Result<(), Error> {
    let stream = capturing(&client.jetstream(), client, out).await?;
    let (since, follow) = (args.since, args.follow);
    let stored = StoredMessages { what: "events", stream: &stream, subjects, since, from: DeliverPolicy::All, follow };
    stream_reader::read(client, stored, out, |message, _, out| show(message, wanted, out)).await
}

/// Name of the stream that captures the events; best of all one that captures all of them.
async fn capturing(context: &jetstream::Context, client: &Client, out: &Output) -> Result<String, Error> {
    #[derive(Deserialize)]
    struct EventStreamNames {
        streams: Option<Vec<String>>,
    }
    #[derive(Deserialize)]
    struct Info {
        config: Config,
    }
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        subjects: Vec<String>,
    }
    let all = format!("{}.event.>", client.prefix());
    let server = client.server();
    let failed = |error: &dyn Display| Error::Failed(format!("streams at `{server}` cannot be read: {error}"));
    let names: EventStreamNames =
        ask(context, "STREAM.NAMES", &json!({"subject": all})).await.map_err(|error| failed(&error))?;
    let names = names.streams.unwrap_or_default();
    let mut partial = None;
    for name in names {
        let info: Info =
            ask(context, &format!("STREAM.INFO.{name}"), &json!({})).await.map_err(|error| failed(&error))?;
        let subjects = info.config.subjects;
        if subjects.iter().any(|subject| covers(subject, &all)) {
            return Ok(name);
        }
        partial.get_or_insert((name, subjects));
    }
    let Some((name, subjects)) = partial else {
        return Err(Error::Failed(format!(
            "no stream at `{server}` captures `{all}`: a start of the service without \
             `--no-event-stream` makes one, as does `nats stream add EVENTS --subjects '{all}' --max-age 30d --defaults`; \
             `--follow` shows new events"
        )));
    };
    out.note(&format!("stream `{name}` captures only {}", subjects.join(", ")));
    Ok(name)
}

async fn ask<T: DeserializeOwned>(context: &jetstream::Context, subject: &str, request: &Value) -> Result<T, String> {
    match context.request(subject.to_owned(), request).await {
        Ok(Response::Ok(reply)) => Ok(reply),
        Ok(Response::Err { error }) => Err(error.to_string()),
        Err(error) if error.kind() == RequestErrorKind::NoResponders => Err("there is no JetStream".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether all that matches `wanted` matches `subject`.
fn covers(subject: &str, wanted: &str) -> bool {
    let mut wanted = wanted.split('.');
    for token in subject.split('.') {
        match (token, wanted.next()) {
            (">", Some(_)) => return true,
            ("*", Some(other)) if other != ">" => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    wanted.next().is_none()
}

/// One event in one line; anything else is shown as received.
fn show(message: &Message, wanted: &EventFilter, out: &mut Output) {
    let body = serde_json::from_slice::<Value>(&message.payload);
    if body.as_ref().is_ok_and(|event| !wanted.takes(event)) {
        return;
    }
    let text = match (&body, out.json()) {
        (Ok(event), true) => event.to_string(),
        (Err(_), true) => {
            json!({"subject": message.subject.as_str(), "raw": String::from_utf8_lossy(&message.payload)}).to_string()
        }
        (body, false) => {
            let (kind, [before, after]) = body.as_ref().ok().and_then(words).unwrap_or_else(|| raw(message));
            format!("{before}{}{after}", out.paint(colour(&kind), &format!("{kind:<15}")))
        }
    };
    out.line(&text);
    out.flush();
}

/// Kind of an event, and the texts before and after it. Fields of all kinds look the same, so that one which this
/// program does not know reads as well.
fn words(event: &Value) -> Option<(String, [String; 2])> {
    const COMMON: [&str; 8] = ["kind", "replication", "site", "instance", "time", "type", "id", "timestamp"];
    let event = event.as_object()?;
    let text = |name: &str| event.get(name).and_then(Value::as_str).map(clean);
    let (kind, replication, time) = (text("kind")?, text("replication")?, text("time")?);
    let fields = event.iter().filter(|(name, _)| !COMMON.contains(&name.as_str()));
    let fields = fields.map(|(name, value)| match value {
        Value::String(value) => format!("  {name}: {value}"),
        value => format!("  {name}: {value}"),
    });
    let instance = text("instance").map(|instance| format!("  ({instance})"));
    let after = format!(" {replication}{}{}", clean(&fields.collect::<String>()), instance.unwrap_or_default());
    Some((kind, [format!("{time}  "), after]))
}

fn raw(message: &Message) -> (String, [String; 2]) {
    let body = clean(&String::from_utf8_lossy(&message.payload));
    ("?".to_owned(), [format!("{}  ", clean(&message.subject)), format!(" {body}")])
}

fn colour(kind: &str) -> Colour {
    match kind {
        "held" | "poison" | "gap" | "config-rejected" | "source-reset" | "target-reset" | "target-dropped"
        | "headroom-low" => Colour::Red,
        "stalled" | "target-shared" | "position-moved" | "promoted" | "clock-offset" => Colour::Yellow,
        "started" | "resumed" | "repaired" | "headroom-ok" | "clock-ok" => Colour::Green,
        _ => Colour::Cyan,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_captures_what_its_subjects_cover() {
        let check = |subject: &str, expect: bool| assert_eq!(covers(subject, "a.event.>"), expect, "{subject}");
        check("a.event.>", true);
        check("a.>", true);
        check(">", true);
        check("*.event.>", true);
        check("a.event.*", false);
        check("a.event.held.>", false);
        check("b.event.>", false);
        check("a.event", false);
    }

    #[test]
    fn an_event_is_one_line_whatever_its_kind() {
        let check = |event: Value, expect: &str| {
            let (kind, [before, after]) = words(&event).unwrap();
            assert_eq!(format!("{before}{kind}{after}"), expect);
        };
        let common = json!({"kind": "held", "replication": "S", "site": "X", "instance": "i", "time": "2026"});
        let with = |name: &str, value: Value| {
            let mut event = common.clone();
            event[name] = value;
            event
        };
        check(common.clone(), "2026  held S  (i)");
        check(with("message", json!("two\nlines\u{1b}[2J")), "2026  held S  message: two lines [2J  (i)");
        check(with("from", json!(5)), "2026  held S  from: 5  (i)");
        check(with("kind", json!("unheard-of")), "2026  unheard-of S  (i)");
        for garbage in [json!(5), json!([]), json!({"kind": "held"}), with("time", json!(7))] {
            assert!(words(&garbage).is_none(), "{garbage}");
        }
    }

    #[test]
    fn an_id_that_is_no_subject_is_refused() {
        for good in ["ORDERS", "ORDERS.EAST", "a-b_c=d"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", ".", "a.", "a b", "*", "a.>", "\u{e9}", "a\n"] {
            assert!(!is_id(bad), "{bad}");
        }
    }
}
