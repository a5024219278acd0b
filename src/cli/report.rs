//! `stream-replicator report`: the streams of both sides and what fills them, as tables and as pictures.

mod dot;
mod graph;
mod svg;

use std::{
    collections::HashSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use serde_json::Value;

use self::graph::Graph;
use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{bytes, count, seconds},
    global::Global,
    output::{Colour, Output, Table},
    reply::Reply,
    status_view::{known, state_name},
};
use crate::control::api::{ReplicationKind, ReportReplication, ReportStream, StreamKind, StreamReport};

/// Show the streams of both sides of all replications, and the replications, as `nats stream report` does
///
/// The figures are those that the servers report now. Mirrors and sources of these streams that the replicator does not
/// feed are in the list too.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Write a graph in the language of Graphviz to this file, `-` for the output, instead of the tables
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json"])]
    dot: Option<PathBuf>,

    /// Write a picture to this file, `-` for the output, instead of the tables
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json"])]
    svg: Option<PathBuf>,

    #[command(flatten)]
    pub(super) global: Global,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let pages: Reply<StreamReport> = Client::connect(&args.global).await?.pages("report").await?;
    let reply = each_once(pages)?;
    if args.dot.is_some() || args.svg.is_some() {
        let graph = Graph::of(&reply.value);
        if let Some(file) = &args.dot {
            save(file, &dot::write(&graph), out)?;
        }
        if let Some(file) = &args.svg {
            save(file, &svg::write(&graph), out)?;
        }
        return Ok(CommandVerdict::Good);
    }
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    out.table(&streams(&reply.value.streams));
    out.line("");
    out.table(&replications(&reply.value));
    Ok(CommandVerdict::Good)
}

/// A stream of several replications is on the page of each.
fn each_once(reply: Reply<StreamReport>) -> Result<Reply<StreamReport>, Error> {
    let mut raw: Value = serde_json::from_slice(&reply.raw).unwrap_or_default();
    let mut changed = false;
    for list in ["streams", "native"] {
        let Some(Value::Array(rows)) = raw.get_mut(list) else { continue };
        let (before, mut seen) = (rows.len(), HashSet::new());
        // Figures may differ between the pages: the first counts.
        let identity = |row: &Value| match list {
            "streams" => row["node"].to_string(),
            _ => {
                Value::from_iter([&row["target"], &row["kind"], &row["from"], &row["source_stream"]].map(Value::clone))
                    .to_string()
            }
        };
        rows.retain(|row| seen.insert(identity(row)));
        changed |= rows.len() < before;
    }
    if !changed {
        return Ok(reply);
    }
    let value = serde_json::from_value(raw.clone());
    let value = value.map_err(|error| Error::Failed(format!("the pages of the report do not fit: {error}")))?;
    Ok(Reply { raw: raw.to_string().into(), value })
}

fn save(file: &Path, text: &str, out: &mut Output) -> Result<(), Error> {
    if file == Path::new("-") {
        out.text(text);
        return Ok(());
    }
    let written = fs::File::create(file).and_then(|mut created| created.write_all(text.as_bytes()));
    written.map_err(|error| Error::Failed(format!("cannot write `{}`: {error}", file.display())))
}

fn streams(rows: &[ReportStream]) -> Table {
    let headers = [
        "STREAM",
        "CLUSTER",
        "STORAGE",
        "KIND",
        "REPLICAS",
        "CONSUMERS",
        "MESSAGES",
        "BYTES",
        "LOST",
        "DELETED",
        "ERROR",
    ];
    let mut table = Table::new(&headers).right(&[4, 5, 6, 7, 8, 9]).painted(10);
    for row in rows {
        let number = |number: Option<u64>| known(number.map(count));
        let cells = vec![
            row.stream.clone(),
            place(row),
            known(row.storage.clone()),
            known(row.kind.map(|kind| stream_kind(kind).to_owned())),
            number(row.replicas),
            number(row.consumers),
            number(row.messages),
            known(row.bytes.map(bytes)),
            number(row.lost),
            number(row.deleted),
            row.error.clone().unwrap_or_default(),
        ];
        table.row(colour(row.error.is_some()), cells);
    }
    table
}

/// Cluster and domain of a stream; its servers where it was not seen.
fn place(row: &ReportStream) -> String {
    match (&row.cluster, &row.domain) {
        (Some(cluster), Some(domain)) => format!("{cluster} ({domain})"),
        (Some(cluster), None) => cluster.clone(),
        (None, _) => address(row),
    }
}

/// The servers of a stream, and its domain, or else its API prefix, where that is another one than that of the servers: the domains of
/// leafnodes are reached by one address.
fn address(row: &ReportStream) -> String {
    match &row.api_prefix {
        Some(prefix) => format!("{} ({})", row.url, row.domain.as_ref().unwrap_or(prefix)),
        None => row.url.clone(),
    }
}

/// Where a replication reads.
fn origin(row: &ReportReplication, streams: &[ReportStream]) -> String {
    let source = streams.iter().find(|stream| row.source.as_ref() == Some(&stream.node));
    match source.filter(|source| row.from.as_ref() == Some(&source.url)) {
        Some(source) => address(source),
        None => row.from.clone().unwrap_or_default(),
    }
}

fn stream_kind(kind: StreamKind) -> &'static str {
    match kind {
        StreamKind::Stream => "Stream",
        StreamKind::Mirror => "Mirror",
        StreamKind::Source => "Source",
    }
}

fn replications(report: &StreamReport) -> Table {
    let headers =
        ["STREAM", "KIND", "FROM", "SOURCE STREAM", "ACTIVE", "LAG", "REPLICATION", "STATE", "DRIFT", "ERROR"];
    let mut table = Table::new(&headers).right(&[4, 5, 8]).painted(9);
    for row in report.replications.iter().chain(&report.native) {
        let cells = vec![
            row.stream.clone(),
            replication_kind(row.kind).to_owned(),
            origin(row, &report.streams),
            row.source_stream.clone(),
            known(row.active.map(seconds)),
            known(row.lag.map(count)),
            row.replication.clone().unwrap_or_default(),
            row.state.map(state_name).unwrap_or_default(),
            row.replication.as_ref().map(|_| known(row.drift.map(count))).unwrap_or_default(),
            row.error.clone().unwrap_or_default(),
        ];
        table.row(colour(row.error.is_some()), cells);
    }
    table
}

fn replication_kind(kind: ReplicationKind) -> &'static str {
    match kind {
        ReplicationKind::Copy => "Copy",
        ReplicationKind::Mirror => "Mirror",
        ReplicationKind::Source => "Source",
    }
}

/// What a row says in the pictures.
fn lag_words(row: &ReportReplication) -> String {
    row.lag.map_or_else(|| "lag unknown".to_owned(), |lag| format!("lag {}", count(lag)))
}

fn colour(is_bad: bool) -> Colour {
    if is_bad { Colour::Red } else { Colour::Plain }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn domains_behind_one_address_are_known_apart() {
        let row = |fields: &[(&str, &str)]| -> ReportStream {
            let mut row = json!({"node": "1", "stream": "S", "url": "nats://a"});
            fields.iter().for_each(|(name, value)| row[*name] = (*value).into());
            serde_json::from_value(row).unwrap()
        };
        let seen = [("api_prefix", "$JS.hub.API"), ("domain", "hub"), ("cluster", "C")];
        for (fields, expect, at) in [
            (&seen[..], "nats://a (hub)", "C (hub)"),
            (&seen[..1], "nats://a ($JS.hub.API)", "nats://a ($JS.hub.API)"),
            (&seen[1..], "nats://a", "C (hub)"),
            (&[], "nats://a", "nats://a"),
        ] {
            let replication =
                json!({"stream": "T", "kind": "copy", "source_stream": "S", "from": "nats://a", "source": "1"});
            let replication: ReportReplication = serde_json::from_value(replication).unwrap();
            let stream = row(fields);
            assert_eq!((place(&stream).as_str(), origin(&replication, &[stream]).as_str()), (at, expect));
            assert_eq!(origin(&replication, &[]), "nats://a");
        }
    }

    #[test]
    fn a_stream_of_two_pages_is_one_row() {
        let stream =
            |node: &str, messages: u64| json!({"node": node, "stream": "S", "url": "nats://a", "messages": messages});
        let native =
            |lag: u64| json!({"stream": "S", "kind": "mirror", "source_stream": "O", "target": "1", "lag": lag});
        let raw = json!({"site": "X", "streams": [stream("1", 5), stream("2", 7), stream("1", 6)],
            "native": [native(0), native(1)], "replications": [], "offset": 0, "limit": 2, "total": 0, "later": 1});
        let reply = Reply { value: serde_json::from_value(raw.clone()).unwrap(), raw: raw.to_string().into() };
        let once = each_once(reply).unwrap();
        let found: Vec<_> = once.value.streams.iter().map(|row| (row.node.as_str(), row.messages)).collect();
        assert_eq!(found, [("1", Some(5)), ("2", Some(7))]);
        assert_eq!(once.value.native.len(), 1);
        let raw: Value = serde_json::from_slice(&once.raw).unwrap();
        assert_eq!((raw["streams"].as_array().map(Vec::len), &raw["later"]), (Some(2), &json!(1)));
    }
}
