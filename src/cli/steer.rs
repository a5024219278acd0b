//! `stream-replicator pause`, `resume`, `position`, `retry`, `skip`, `promote` and `stepdown`.

use serde::de::DeserializeOwned;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{When, count, counted, parse_when},
    global::Global,
    output::Output,
    reply::Reply,
};
use crate::control::api::{
    Changed, NamedRequest, PositionMove, PositionRequest, PromoteRequest, Promoted, SkipRequest, Skipped, SteppedDown,
};

#[derive(Debug, clap::Args)]
pub(super) struct IdsArgs {
    /// Replications
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Move the position of a paused replication
///
/// Back: messages are copied again. Forward: messages are passed over.
#[derive(Debug, clap::Args)]
pub(super) struct PositionArgs {
    /// Replication
    id: String,

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
#[derive(Debug, clap::Args)]
pub(super) struct SkipArgs {
    /// Replication
    id: String,

    /// Only if this is the message that holds it, by its source sequence
    #[arg(long, value_name = "N")]
    source_seq: Option<u64>,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Turn a mirror into a stream of its own, with the subjects of its source
///
/// The feed stops, the mirror becomes a stream that takes messages of publishers, and the replication is deleted.
#[derive(Debug, clap::Args)]
pub(super) struct PromoteArgs {
    /// Replication of kind `mirror`
    id: String,

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

/// Asks for the same for several replications, one after the other.
async fn all<T: DeserializeOwned>(
    args: &IdsArgs,
    endpoint: &str,
    out: &mut Output,
    words: impl Fn(&T) -> String,
) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let mut verdict = CommandVerdict::Good;
    for id in &args.ids {
        let request = NamedRequest { replication: id.clone() };
        let changed: Result<Reply<T>, Error> = client.change(endpoint, &request).await;
        match changed {
            Ok(reply) => out.reply(&reply, &words),
            Err(error) => {
                error.print(out);
                verdict = CommandVerdict::Bad;
            }
        }
    }
    Ok(verdict)
}

pub(super) async fn position(args: &PositionArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let To { source_seq, time } = args.to.clone();
    let (time, ago) = match time {
        Some(When::At(time)) => (Some(time), None),
        Some(When::Ago(ago)) => (None, Some(ago)),
        None => (None, None),
    };
    let request = PositionRequest { replication: args.id.clone(), source_seq, time, ago, dry_run: args.dry_run };
    let moved: Reply<PositionMove> = Client::connect(&args.global).await?.change("position", &request).await?;
    out.reply(&moved, moved_words);
    Ok(CommandVerdict::Good)
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
    let PromoteArgs { id, dry_run, force, keep, subjects, global } = args;
    let request = PromoteRequest {
        replication: id.clone(),
        dry_run: *dry_run,
        force: *force,
        keep: *keep,
        subjects: subjects.clone(),
    };
    let promoted: Reply<Promoted> = Client::connect(global).await?.change("promote", &request).await?;
    out.reply(&promoted, promoted_words);
    Ok(CommandVerdict::Good)
}

fn promoted_words(promoted: &Promoted) -> String {
    let Promoted { replication, revision, dry_run, stream, subjects, last_seq, lag } = promoted;
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
    format!("{replication}: stream {stream} takes {subjects} after sequence {last} and {lacks}{kept}{dry}")
}

pub(super) async fn skip(args: &SkipArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let request = SkipRequest { replication: args.id.clone(), source_seq: args.source_seq };
    let skipped: Reply<Skipped> = Client::connect(&args.global).await?.change("skip", &request).await?;
    out.reply(&skipped, |skipped| {
        format!("{}: source message {} is skipped", skipped.replication, count(skipped.source_seq))
    });
    Ok(CommandVerdict::Good)
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
