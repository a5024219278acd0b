//! `stream-replicator pause`, `resume`, `position`, `retry`, `skip`, `promote` and `stepdown`.

use chrono::DateTime;
use serde::de::DeserializeOwned;

use super::{
    client::Client,
    consumers::moved_line,
    document::change_each,
    error::{CommandVerdict, Error},
    format::{When, bytes, count, counted, parse_when, time},
    global::Global,
    output::{self, Output, clean},
    reply::Reply,
    select::SelectedIds,
};
use crate::{
    control::api::{
        Changed, NamedRequest, PositionMove, PositionRequest, PromoteRequest, Promoted, SkipRequest, Skipped, Status,
        SteppedDown,
    },
    status::State,
};

#[derive(Debug, clap::Args)]
pub(super) struct IdsArgs {
    #[command(flatten)]
    selected: SelectedIds,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Move the position of a paused replication
///
/// Back: messages are copied again. Forward: messages are passed over.
#[derive(Debug, clap::Args)]
pub(super) struct PositionArgs {
    #[command(flatten)]
    selected: SelectedIds,

    #[command(flatten)]
    to: To,

    /// Only show which messages would be copied again or skipped
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = false)]
struct To {
    /// Continue after this source sequence; 0 is before the first message
    #[arg(long, value_name = "N")]
    source_seq: Option<u64>,

    /// Continue with the first message stored at or after this time: RFC 3339, or how long ago, such as `1h`
    #[arg(long, value_name = "TIME", value_parser = parse_when)]
    time: Option<When>,
}

/// Skip the message that blocks a replication
///
/// It shows the message and asks. `--source-seq` names the message, `--force` takes any: neither asks.
#[derive(Debug, clap::Args)]
pub(super) struct SkipArgs {
    #[command(flatten)]
    selected: SelectedIds,

    /// Only if this is the message that holds it, by its source sequence
    #[arg(long, value_name = "N")]
    source_seq: Option<u64>,

    /// Do not ask; this or `--source-seq` is required without a terminal
    #[arg(long, visible_alias = "yes")]
    force: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Turn a mirror into a stream of its own, with the subjects of its source
///
/// The feed stops, the mirror becomes a stream that takes messages of publishers, and the replication is deleted.
#[derive(Debug, clap::Args)]
pub(super) struct PromoteArgs {
    #[command(flatten)]
    selected: SelectedIds,

    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,

    /// Also if the mirror lacks messages of its source; with --subject, also if the source does not answer
    #[arg(long)]
    force: bool,

    /// Keep the replication, paused
    #[arg(long)]
    keep: bool,

    /// A subject of the promoted stream, instead of those of the source
    #[arg(long = "subject", value_name = "SUBJECT")]
    subjects: Vec<String>,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Asks for a change of several replications, one after the other.
pub(super) async fn each(
    args: &IdsArgs,
    endpoint: &str,
    done: &str,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    all(args, endpoint, out, |changed: &Changed| format!("{} {done}", changed.replication)).await
}

pub(super) async fn stepdown(args: &IdsArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    all(args, "stepdown", out, |stepped: &SteppedDown| {
        let to = stepped.to.as_deref().unwrap_or("no instance yet");
        format!("{}: handed over, {} -> {to}", stepped.replication, stepped.from)
    })
    .await
}

async fn all<T: DeserializeOwned>(
    args: &IdsArgs,
    endpoint: &str,
    out: &mut Output,
    words: impl Fn(&T) -> String,
) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let ids = args.selected.resolve(&client).await?;
    let requests = ids.into_iter().map(|replication| NamedRequest { replication });
    change_each(&client, endpoint, requests, words, out).await
}

pub(super) async fn position(args: &PositionArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let To { source_seq, time } = args.to.clone();
    let (time, ago) = match time {
        Some(When::At(time)) => (Some(time), None),
        Some(When::Ago(ago)) => (None, Some(ago)),
        None => (None, None),
    };
    let client = Client::connect(&args.global).await?;
    let ids = only_one(args.selected.resolve(&client).await?, "--source-seq", source_seq.is_some())?;
    let request =
        |replication| PositionRequest { replication, source_seq, time, ago: ago.clone(), dry_run: args.dry_run };
    change_each(&client, "position", ids.into_iter().map(request), moved_words, out).await
}

/// A flag that is about one replication is not for several.
fn only_one(ids: Vec<String>, flag: &str, given: bool) -> Result<Vec<String>, Error> {
    match ids.len() {
        number if given && number > 1 => {
            Err(Error::Usage(format!("`{flag}` is for one replication, and {number} are named")))
        }
        _ => Ok(ids),
    }
}

fn moved_words(moved: &PositionMove) -> String {
    let effect = match (moved.copied_again, moved.passed_over) {
        (0, 0) => "nothing is copied again or passed over".to_owned(),
        (again, 0) => format!("{} in between: copied again", counted(again, "source message")),
        (_, passed) => format!("{} in between: passed over", counted(passed, "source message")),
    };
    let dry = if moved.dry_run { " (dry run)" } else { "" };
    let (from, to) = (count(moved.from), count(moved.to));
    format!("{}: position {from} -> {to}, {effect}{dry}", moved.replication)
}

pub(super) async fn promote(args: &PromoteArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let PromoteArgs { selected, dry_run, force, keep, subjects, global } = args;
    let client = Client::connect(global).await?;
    let ids = only_one(selected.resolve(&client).await?, "--subject", !subjects.is_empty())?;
    let request = |replication| PromoteRequest {
        replication,
        dry_run: *dry_run,
        force: *force,
        keep: *keep,
        subjects: subjects.clone(),
    };
    change_each(&client, "promote", ids.into_iter().map(request), promoted_words, out).await
}

fn promoted_words(promoted: &Promoted) -> String {
    let Promoted { replication, revision, dry_run, stream, subjects, last_seq, lag, consumers } = promoted;
    let lacks = match lag {
        Some(0) => "has all messages of its source".to_owned(),
        Some(lag) => format!("lacks {} of its source", counted(*lag, "message")),
        None => "may lack messages of its source".to_owned(),
    };
    let (subjects, last) = (subjects.join(", "), count(*last_seq));
    let dry = if *dry_run { " (dry run)" } else { "" };
    let kept = match (dry_run, revision) {
        (true, _) => "",
        (false, Some(_)) => ", replication deleted",
        (false, None) => ", replication paused",
    };
    let moved = consumers.iter().map(|moved| format!("\n{}", moved_line(replication, moved))).collect::<String>();
    format!("{replication}: stream {stream} takes {subjects} after sequence {last} and {lacks}{kept}{dry}{moved}")
}

pub(super) async fn skip(args: &SkipArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let ids = only_one(args.selected.resolve(&client).await?, "--source-seq", args.source_seq.is_some())?;
    let mut requests = Vec::new();
    for replication in ids {
        let mut source_seq = args.source_seq;
        if source_seq.is_none() && !args.force {
            // The service says why nothing can be skipped.
            if let Some(message) = blocking(&client, &replication).await? {
                if !is_confirmed(&replication, &message, out)? {
                    return Err(Error::Failed("nothing was skipped".to_owned()));
                }
                source_seq = Some(message.source_seq);
            }
        }
        requests.push(SkipRequest { replication, source_seq });
    }
    change_each(&client, "skip", requests, |skipped: &Skipped| format!("{} is skipped", message_words(skipped)), out)
        .await
}

/// The message that blocks a replication, as far as the status names one.
async fn blocking(client: &Client, id: &str) -> Result<Option<BlockingMessage>, Error> {
    let request = NamedRequest { replication: id.to_owned() };
    let status: Reply<Status> = match client.query("status", &request).await {
        Err(error) if error.code() == Some(404) => return Ok(None),
        status => status?,
    };
    let held = status.value.replications.into_iter().find(|row| row.replication == id && row.state == State::Held);
    let Some(error) = held.and_then(|row| row.copy.last_error) else { return Ok(None) };
    let Some((source_seq, time_ns)) = error.source_seq.zip(error.source_time_ns) else { return Ok(None) };
    let (subject, bytes) = (error.source_subject, error.source_bytes);
    let stored = Some(DateTime::from_timestamp_nanos(time_ns));
    let skipped = Skipped { replication: id.to_owned(), revision: 0, source_seq, stored, subject, bytes };
    Ok(Some(BlockingMessage { source_seq, words: message_words(&skipped), why: error.message }))
}

/// A message that a replication cannot copy.
struct BlockingMessage {
    source_seq: u64,
    words: String,
    why: String,
}

fn is_confirmed(id: &str, message: &BlockingMessage, out: &Output) -> Result<bool, Error> {
    let BlockingMessage { source_seq, words, why } = message;
    if !output::can_ask() {
        let message = format!(
            "no terminal to ask on: `skip {id} --source-seq {source_seq}` skips this message, `--force` skips any without asking"
        );
        return Err(Error::Usage(message));
    }
    out.note(&format!("{words}\n  {why}"));
    Ok(output::confirm("skip it? It will not be at the target [y/N]") == Some(true))
}

/// Source sequence, subject, size and stored time, as far as they are known.
fn message_words(message: &Skipped) -> String {
    let Skipped { replication, source_seq, stored, subject, bytes: size, .. } = message;
    let about = [
        subject.as_ref().map(|subject| format!("subject {subject}")),
        size.map(bytes),
        stored.map(|stored| format!("stored {}", time(stored))),
    ];
    let about = about.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let about = if about.is_empty() { about } else { format!(" ({about})") };
    clean(&format!("{replication}: source message {}{about}", count(*source_seq)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_says_what_it_means() {
        let check = |to: u64, copied_again: u64, passed_over: u64, dry_run: bool, expect: &str| {
            let (replication, from) = ("S".to_owned(), 1000);
            let moved = PositionMove { replication, revision: None, dry_run, from, to, copied_again, passed_over };
            assert_eq!(moved_words(&moved), expect);
        };
        check(10, 990, 0, false, "S: position 1,000 -> 10, 990 source messages in between: copied again");
        check(1001, 0, 1, true, "S: position 1,000 -> 1,001, 1 source message in between: passed over (dry run)");
        check(1000, 0, 0, false, "S: position 1,000 -> 1,000, nothing is copied again or passed over");
    }
}
