//! `stream-replicator admin`: what sampling knows of senders, and their advisories.

use std::{cell::Cell, fmt::Display};

use async_nats::{Message, jetstream::consumer::DeliverPolicy};
use chrono::{DateTime, Local, TimeDelta, Utc};
use clap::{Args as ClapArgs, Subcommand};
use futures_util::StreamExt;
use serde_json::json;

use super::{
    choria_forms::{self, ChoriaFlags, GossipArgs, StateArgs, go_duration},
    client::Client,
    error::{CommandVerdict, Error},
    format::{When, bytes, parse_time, parse_when, seconds, time},
    global::{Global, bucket_prefix},
    output::{Colour, Output, Table, clean},
    reply::Reply,
    stream_reader::{self, StoredMessages},
};
use crate::{
    control::api::{SenderRow, SendersPage, SendersRequest},
    names,
    sampling::{AdvisoryKind, AgeAdvisory},
    store::SenderRecord,
};

/// Show the senders of sampled replications
#[derive(Debug, ClapArgs)]
pub(super) struct Args {
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Subcommand)]
enum AdminCommand {
    Senders(SendersArgs),
    #[command(visible_alias = "adv")]
    Advisories(AdvisoriesArgs),
    State(StateArgs),
    Gossip(GossipArgs),
    Watch(WatchArgs),
}

/// Show the senders that are known, newest first
#[derive(Debug, ClapArgs)]
struct SendersArgs {
    /// Replication
    id: String,

    /// Only senders that match this regular expression
    #[arg(long, value_name = "REGEX")]
    value: Option<String>,

    /// Only senders seen since this time: RFC 3339, or how long ago, such as `1h`
    #[arg(long, value_name = "TIME", value_parser = parse_when)]
    since: Option<When>,

    /// Only senders that are missing: unseen for `warn_duration`
    #[arg(long)]
    advised: bool,

    /// Rows to show at most
    #[arg(long, value_name = "ROWS", default_value_t = 100)]
    limit: usize,

    #[command(flatten)]
    global: Global,
}

/// Show advisories that a stream keeps
#[derive(Debug, ClapArgs)]
struct AdvisoriesArgs {
    /// Stream that stores the advisories, where `--server` or `--context` leads
    stream: String,

    /// Only advisories about this sender
    value: Option<String>,

    /// Only advisories stored since this time: RFC 3339, or how long ago, such as `1h`
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1m")]
    since: DateTime<Utc>,

    /// Continue with new ones
    #[arg(long, short)]
    follow: bool,

    #[command(flatten)]
    global: Global,

    #[command(flatten)]
    choria: ChoriaFlags,
}

/// Show changes of sender records as they are written
#[derive(Debug, ClapArgs)]
struct WatchArgs {
    /// Replication
    id: String,

    /// Prefix of the names of buckets
    #[arg(long, value_name = "PREFIX", default_value = names::DEFAULT_BUCKET_PREFIX, value_parser = bucket_prefix)]
    bucket_prefix: String,

    #[command(flatten)]
    global: Global,
}

impl Args {
    /// Whether the output is for a program.
    pub(super) fn json(&self) -> bool {
        match &self.command {
            AdminCommand::Senders(args) => args.global.json,
            AdminCommand::Advisories(args) => args.global.json,
            AdminCommand::State(args) => args.json,
            AdminCommand::Gossip(args) => args.global.json,
            AdminCommand::Watch(args) => args.global.json,
        }
    }
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    match &args.command {
        AdminCommand::Senders(args) => senders(args, &Client::connect(&args.global).await?, out).await?,
        AdminCommand::Advisories(args) => {
            let client = Client::connect_as(&args.global, |place| args.choria.over(place)).await?;
            advisories(args, &client, out).await?;
        }
        AdminCommand::State(args) => return choria_forms::state(args, out),
        AdminCommand::Gossip(args) => {
            let client = Client::connect_as(&args.global, |place| args.choria.over(place)).await?;
            return choria_forms::gossip(args, &client, out).await;
        }
        AdminCommand::Watch(args) => watch(args, &Client::connect(&args.global).await?, out).await?,
    }
    Ok(CommandVerdict::Good)
}

async fn senders(args: &SendersArgs, client: &Client, out: &mut Output) -> Result<(), Error> {
    let request = SendersRequest {
        replication: args.id.clone(),
        value: args.value.clone(),
        since: args.since.as_ref().map(|since| match since {
            When::At(time) => time.to_rfc3339(),
            When::Ago(ago) => ago.clone(),
        }),
        advised: args.advised.then_some(true),
        offset: 0,
        limit: Some(args.limit),
    };
    let reply: Reply<SendersPage> = client.query("senders", &request).await?;
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(());
    }
    let mut table = Table::new(&["SENDER", "SEEN", "COPIED", "SIZE", "SEQUENCE", ""]).right(&[1, 2, 3, 4]);
    let shown = reply.value.senders.len();
    let now = reply.value.now.unwrap_or_else(Utc::now);
    let ago = |time: DateTime<Utc>| format!("{} ago", seconds((now - time).max(TimeDelta::zero()).as_seconds_f64()));
    for SenderRow { sender, seen, copied, size, advised, sequence } in reply.value.senders {
        let copied = copied.map_or_else(|| "never".to_owned(), ago);
        let colour = if advised { Colour::Yellow } else { Colour::Plain };
        let missing = if advised { "missing" } else { "" };
        let size = size.map_or_else(|| "-".to_owned(), |size| bytes(size.into()));
        let sequence = sequence.map_or_else(|| "-".to_owned(), |sequence| sequence.to_string());
        let cells = vec![clean(&sender), ago(seen), copied, size, sequence, missing.to_owned()];
        table.row(colour, cells);
    }
    out.table(&table);
    if shown < reply.value.total {
        out.note(&format!("{shown} of {} senders; `--limit`, `--value` and `--since` choose", reply.value.total));
    }
    Ok(())
}

/// Shows advisories in the form of Choria's replicator. Without any message in that time it fails, as there.
async fn advisories(args: &AdvisoriesArgs, client: &Client, out: &mut Output) -> Result<(), Error> {
    let (stream, since, follow) = (args.stream.as_str(), Some(args.since), args.follow);
    let stored =
        StoredMessages { what: "advisories", stream, subjects: Vec::new(), since, from: DeliverPolicy::All, follow };
    let (wanted, found) = (args.value.as_deref(), Cell::new(false));
    let show = |message: &Message, left: u64, out: &mut Output| {
        if !found.replace(true) && !out.json() {
            out.line(&match wanted {
                Some(wanted) => {
                    format!("Searching {} messages for advisories related to {}\n", left + 1, clean(wanted))
                }
                None => "Searching for advisories\n".to_owned(),
            });
        }
        show_advisory(message, wanted, out);
    };
    stream_reader::read(client, stored, out, show).await?;
    match found.get() || follow {
        true => Ok(()),
        false => Err(Error::Failed(format!("did not find any messages for {:?}", wanted.unwrap_or_default()))),
    }
}

/// One advisory in one line; anything else is skipped.
fn show_advisory(message: &Message, wanted: Option<&str>, out: &mut Output) {
    let Ok(advisory) = serde_json::from_slice::<AgeAdvisory>(&message.payload) else { return };
    if wanted.is_some_and(|wanted| wanted != advisory.value) {
        return;
    }
    if out.json() {
        out.line(String::from_utf8_lossy(&message.payload).trim());
    } else {
        let AgeAdvisory { event, value, seen, replicator, timestamp, .. } = advisory;
        let at = DateTime::from_timestamp(timestamp, 0).unwrap_or_default().with_timezone(&Local);
        let kind = out.paint(colour(event), &format!("{:>7}", event.name()));
        let earlier = go_duration(TimeDelta::try_seconds(timestamp.saturating_sub(seen)).unwrap_or_default());
        let (at, value, replicator) = (at.format("%Y-%m-%d %H:%M:%S"), clean(&value), clean(&replicator));
        out.line(&format!("[{at}] {kind} {value} seen {earlier} earlier on {replicator}"));
    }
    out.flush();
}

fn colour(kind: AdvisoryKind) -> Colour {
    match kind {
        AdvisoryKind::New => Colour::Cyan,
        AdvisoryKind::Timeout => Colour::Yellow,
        AdvisoryKind::Recover => Colour::Green,
        AdvisoryKind::Expire => Colour::Red,
    }
}

async fn watch(args: &WatchArgs, client: &Client, out: &mut Output) -> Result<(), Error> {
    let bucket = format!("{}_STATE", args.bucket_prefix);
    let failed = |error: &dyn Display| Error::Failed(format!("bucket `{bucket}`: {error}"));
    let store = client.jetstream().get_key_value(bucket.as_str()).await.map_err(|error| failed(&error))?;
    // Refuses an id that is no part of a key.
    let mut changes = store.watch(format!("{}.*", args.id)).await.map_err(|error| failed(&error))?;
    while !out.closed() {
        let Some(change) = changes.next().await else { break };
        let entry = change.map_err(|error| failed(&error))?;
        let line = match serde_json::from_slice::<SenderRecord>(&entry.value) {
            Ok(record) if out.json() => serde_json::to_string(&record).unwrap_or_default(),
            Ok(record) => words(&record),
            Err(_) if out.json() => json!({"key": entry.key, "removed": true}).to_string(),
            Err(_) => format!("{}  forgotten", clean(&entry.key)),
        };
        out.line(&line);
        out.flush();
    }
    Ok(())
}

/// One record in one line.
fn words(record: &SenderRecord) -> String {
    let copied = record.copied.map_or_else(|| "never copied".to_owned(), |at| format!("copied {}", time(at)));
    let missing = if record.advised { "  missing" } else { "" };
    let waiting: Vec<_> = record.pending.iter().map(|pending| pending.event.as_str()).collect();
    let waiting = if waiting.is_empty() { String::new() } else { format!("  to be published: {}", waiting.join(", ")) };
    let line = format!("{}  seen {}  {copied}{missing}{waiting}", record.sender, time(record.seen));
    clean(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line() {
        let seen = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let mut record = SenderRecord::new("n1\n", seen);
        assert_eq!(words(&record), "n1   seen 2023-11-14T22:13:20.000Z  never copied");
        (record.copied, record.advised) = (Some(seen), true);
        assert!(words(&record).ends_with("copied 2023-11-14T22:13:20.000Z  missing"));
    }
}
