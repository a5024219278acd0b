//! `stream-replicator verify`: compares both streams of a replication.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{bytes, count, counted, time},
    global::Global,
    output::{self, Output, clean},
    progress::{percent, time_left},
    reply::Reply,
};
use crate::{
    config::{VerifyEffort, VerifyRange},
    control::api::{Changed, NamedRequest, VerifyRequest, VerifyShown, VerifyStarted},
    status::{DifferenceKind, DifferenceSummary, Verification, VerificationState},
};

/// How often progress is asked for.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// Ranges of one kind that are printed.
const RANGES: usize = 10;

/// Compare both streams of a replication, message by message
///
/// The leader compares what was settled when it began, and nothing is changed. Exit code 1 with `--follow` or `--status`: they
/// differ, or could not be compared.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    /// First source sequence to compare
    #[arg(long, value_name = "SEQ")]
    from: Option<u64>,

    /// Last source sequence to compare
    #[arg(long, value_name = "SEQ")]
    to: Option<u64>,

    /// Compare a part of the messages only, such as `1%`
    #[arg(long, value_name = "N%")]
    sample: Option<String>,

    /// Messages of the source to read in a second, at most
    #[arg(long, value_name = "R")]
    rate: Option<u64>,

    /// Copy what is missing at the target, after everything that it has
    #[arg(long)]
    repair: bool,

    /// Do not ask before a repair; required without a terminal
    #[arg(long, visible_alias = "yes", requires = "repair")]
    force: bool,

    /// Wait for the result and show progress
    #[arg(long, short)]
    follow: bool,

    /// Show the newest result, or how far it is
    #[arg(long, conflicts_with_all = ["from", "to", "sample", "rate", "repair", "cancel"])]
    status: bool,

    /// End the comparison that runs
    #[arg(long, conflicts_with_all = ["from", "to", "sample", "rate", "repair", "follow"])]
    cancel: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let named = NamedRequest { replication: args.id.clone() };
    if args.cancel {
        let reply: Reply<Changed> = client.change("verify.cancel", &named).await?;
        out.reply(&reply, |changed| clean(&format!("{}: the comparison is cancelled", changed.replication)));
        return Ok(CommandVerdict::Good);
    }
    if args.status {
        return match args.follow {
            true => follow(&client, args, None, out).await,
            false => {
                let reply: Reply<VerifyShown> = client.query("verify.status", &named).await?;
                out.reply(&reply, shown_words);
                Ok(verdict(reply.value.verification.as_ref()))
            }
        };
    }
    if args.repair && !args.force {
        confirm(&args.id, out)?;
    }
    let request = VerifyRequest {
        replication: args.id.clone(),
        range: VerifyRange { from: args.from, to: args.to, repair: args.repair },
        effort: VerifyEffort { sample: args.sample.clone(), rate: args.rate },
    };
    let reply: Reply<VerifyStarted> = client.change("verify", &request).await?;
    let VerifyStarted { replication, job, .. } = &reply.value;
    if args.follow {
        return follow(&client, args, Some(job), out).await;
    }
    out.reply(&reply, |_| {
        clean(&format!(
            "{replication}: both streams are compared, job {job}; `verify {replication} --status` shows the result"
        ))
    });
    Ok(CommandVerdict::Good)
}

fn confirm(id: &str, out: &Output) -> Result<(), Error> {
    if !output::can_ask() {
        return Err(Error::Usage(format!(
            "no terminal to ask on: `verify {id} --repair --force` repairs without asking"
        )));
    }
    out.note(&format!(
        "{id}: messages that are missing are copied, after those that the target has; a target that is exclusive becomes shared"
    ));
    match output::confirm("compare and repair? [y/N]") {
        Some(true) => Ok(()),
        _ => Err(Error::Failed("nothing was compared or repaired".to_owned())),
    }
}

/// Waits for the end of a job, of the newest one by default.
async fn follow(client: &Client, args: &Args, job: Option<&str>, out: &mut Output) -> Result<CommandVerdict, Error> {
    let named = NamedRequest { replication: args.id.clone() };
    let (mut before, mut interrupted): (Option<(Instant, u64)>, _) = (None, None);
    loop {
        let reply: Reply<VerifyShown> = client.query("verify.status", &named).await?;
        let newest = reply.value.verification.as_ref();
        // Every instance answers, and some may not have heard of it yet.
        let mine = newest.filter(|newest| job.is_none_or(|job| newest.job == job));
        let over = match (mine, job) {
            (Some(newest), _) => newest.state.is_over(),
            (None, None) => true,
            (None, Some(_)) => false,
        };
        if over {
            out.progress("");
            out.reply(&reply, shown_words);
            return Ok(verdict(reply.value.verification.as_ref()));
        }
        if let Some(newest) = mine
            && newest.error != interrupted
        {
            out.progress("");
            out.note(&clean(&interruption_words(&args.id, newest.error.as_deref())));
            interrupted.clone_from(&newest.error);
        }
        if let Some(newest) = mine.filter(|_| out.shows_progress()) {
            let now = Instant::now();
            let rate = before.map(|(at, messages)| {
                newest.source_messages.saturating_sub(messages) as f64 / now.duration_since(at).as_secs_f64()
            });
            before = Some((now, newest.source_messages));
            out.progress(&progress_words(newest, rate));
        }
        sleep(ASK_EVERY).await;
    }
}

fn verdict(verification: Option<&Verification>) -> CommandVerdict {
    match verification {
        Some(found) if found.findings > 0 || found.state == VerificationState::Failed => CommandVerdict::Bad,
        _ => CommandVerdict::Good,
    }
}

fn interruption_words(id: &str, error: Option<&str>) -> String {
    error.map_or_else(|| format!("{id}: continues"), |error| format!("{id}: cannot continue now: {error}"))
}

fn progress_words(found: &Verification, rate: Option<f64>) -> String {
    if found.state == VerificationState::Waiting {
        return "waits for the leader".to_owned();
    }
    let all = (found.to + 1).saturating_sub(found.from);
    let done = (found.position + 1).saturating_sub(found.from).min(all);
    let mut words = vec![format!("{} compared ({})", counted(found.source_messages, "message"), percent(done, all))];
    words.extend(rate.map(|rate| format!("{}/s", count(rate.round() as u64))));
    words.extend(time_left(Some(all - done), rate));
    words.push(counted(found.findings, "difference"));
    words.join(", ")
}

fn shown_words(shown: &VerifyShown) -> String {
    let Some(found) = &shown.verification else {
        return clean(&format!("{}: was never verified", shown.replication));
    };
    let mut lines = vec![state_words(&shown.replication, found)];
    let read = format!(
        "compared  {} of the source with {} of the target, {}, {:.1} s",
        counted(found.source_messages, "message"),
        counted(found.target_messages, "message"),
        bytes(found.bytes),
        found.seconds
    );
    lines.push(read);
    lines.push(format!("range     {} to {}", count(found.from), count(found.to)));
    lines.extend(found.sample.as_ref().map(|sample| format!("sample    {sample}")));
    for difference in &found.differences {
        lines.extend(difference_words(difference));
    }
    for (cause, messages) in &found.expected {
        lines.push(format!("expected  {} {}", counted(*messages, "message"), cause.words()));
    }
    if let Some(repaired) = &found.repaired {
        lines.push(format!("repaired  {}, {} left", counted(repaired.stored, "message"), count(repaired.left)));
        lines.extend(repaired.reason.as_ref().map(|reason| format!("          {reason}")));
    }
    lines.iter().map(|line| clean(line)).collect::<Vec<_>>().join("\n")
}

fn state_words(id: &str, found: &Verification) -> String {
    let at = found.ended_at.or(found.started_at).map(|at| format!(", {}", time(at))).unwrap_or_default();
    match found.state {
        VerificationState::Waiting => format!("{id}: waits for the leader"),
        VerificationState::Running => {
            let why =
                found.error.as_ref().map(|error| format!("; it cannot continue now: {error}")).unwrap_or_default();
            format!("{id}: is being compared{at}, {} so far{why}", counted(found.findings, "difference"))
        }
        VerificationState::Done if found.findings == 0 => format!("{id}: no differences{at}"),
        VerificationState::Done => format!("{id}: {}{at}", counted(found.findings, "difference")),
        VerificationState::Cancelled => {
            format!("{id}: cancelled{at}, {} so far", counted(found.findings, "difference"))
        }
        VerificationState::Failed => {
            format!("{id}: cannot be compared{at}: {}", found.error.as_deref().unwrap_or_default())
        }
    }
}

fn difference_words(difference: &DifferenceSummary) -> Vec<String> {
    let DifferenceSummary { kind, messages, ranges, unlisted, examples } = difference;
    let listed = ranges.iter().take(RANGES).map(|range| match range.from == range.to {
        true => range.from.to_string(),
        false => format!("{}-{}", range.from, range.to),
    });
    let mut where_: Vec<String> = listed.collect();
    if ranges.len() > RANGES || *unlisted > 0 {
        where_.push("..".to_owned());
    }
    let side = if *kind == DifferenceKind::Extra { "target" } else { "source" };
    let mut lines =
        vec![format!("{:<8}  {}: {side} {}", kind.name(), counted(*messages, "message"), where_.join(", "))];
    for example in examples {
        let mut words = Vec::new();
        words.extend(example.source_seq.map(|seq| format!("source {seq}")));
        words.extend(example.target_seq.map(|seq| format!("target {seq}")));
        words.extend(example.subject.as_ref().map(|subject| format!("`{subject}`")));
        lines.push(format!("          {}: {}", words.join(", "), example.detail));
    }
    lines
}
