//! `stream-replicator status`: the state and progress of replications, once, as they change, or when they have caught up.

use std::time::Duration;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    global::Global,
    output::Output,
    status_view::{StatusView, lines},
    wait, watch,
};

/// Time limit for one answer while waiting for the result.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

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

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let id = args.id.as_deref();
    if args.wait_caught_up {
        let client = client.answering_within(ANSWER_WITHIN);
        return wait::until_caught_up(&client, id, args.global.asking.limit(), out).await;
    }
    if args.watch {
        return watch::run(&client, id, out).await;
    }
    let view = StatusView::request(&client, id).await?;
    if out.json() {
        out.reply(&view.reply, |_| String::new());
    } else {
        for line in lines(&view, id, None, out) {
            out.line(&line);
        }
    }
    Ok(CommandVerdict::Good)
}
