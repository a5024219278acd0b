//! `stream-replicator status`: the state and progress of replications, once, as they change, or when they have caught up.

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    global::Global,
    output::Output,
    status_filter::{StatusFilter, StatusSort},
    status_table::{TableStyle, lines},
    status_view::{StatusView, state_name},
    wait, watch, yaml,
};
use crate::status::State;

/// Show the state and progress of replications, the worst first
///
/// With one id, everything about one replication.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replications, or patterns of their ids such as `'S0*'` [default: all]
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Only replications in this state; may be repeated
    #[arg(long = "state", value_name = "STATE", value_parser = state, value_delimiter = ',')]
    states: Vec<State>,

    /// Order of the rows [default: worst; as sent for JSON and YAML]
    #[arg(long, value_name = "ORDER")]
    sort: Option<StatusSort>,

    /// Format of the output
    #[arg(long, short, value_name = "FORMAT", value_enum, conflicts_with = "json")]
    output: Option<StatusFormat>,

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

/// How the status is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StatusFormat {
    /// The answer as the service sent it, without the rows that are not wanted
    Json,
    /// The same as YAML
    Yaml,
    /// A table with all columns and whole texts, however wide and long
    Wide,
}

impl Args {
    /// Whether the output is for a program.
    pub(super) fn json(&self) -> bool {
        self.global.json || self.output == Some(StatusFormat::Json)
    }

    fn is_for_programs(&self) -> bool {
        self.json() || self.output == Some(StatusFormat::Yaml)
    }

    fn style(&self) -> TableStyle {
        if self.output == Some(StatusFormat::Wide) { TableStyle::Wide } else { TableStyle::Fitted }
    }

    fn filter(&self) -> StatusFilter {
        let worst = (!self.is_for_programs()).then_some(StatusSort::Worst);
        StatusFilter { ids: self.ids.clone(), states: self.states.clone(), sort: self.sort.or(worst) }
    }
}

/// Parses the name of a state.
pub(super) fn state(text: &str) -> Result<State, String> {
    let found = State::ALL.into_iter().find(|state| state_name(*state) == text);
    found.ok_or_else(|| format!("a state is one of {}", State::ALL.map(state_name).join(", ")))
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    if args.output == Some(StatusFormat::Yaml) && (args.watch || args.wait_caught_up) {
        return Err(Error::Usage("`--output yaml` shows the status once: use `--output json` here".to_owned()));
    }
    let client = Client::connect(&args.global).await?;
    let filter = args.filter();
    if args.wait_caught_up {
        let client = client.answering_within(wait::ANSWER_WITHIN);
        return wait::until_caught_up(&client, &filter, args.global.asking.limit(), out).await;
    }
    if args.watch {
        return watch::run(&client, &filter, args.style(), out).await;
    }
    let view = StatusView::request(&client, &filter).await?;
    match args.output {
        Some(StatusFormat::Yaml) => {
            out.text(&yaml::write(&serde_json::from_slice(&view.reply.raw).unwrap_or_default()))
        }
        _ if out.json() => out.reply(&view.reply, |_| String::new()),
        _ => {
            let lines = lines(&view, filter.only_id().is_some(), None, args.style(), out);
            // the prompt needs a line too
            let room = out.size().filter(|_| args.style() == TableStyle::Fitted).map(|(_, height)| height - 1);
            for line in lines.fit(room.unwrap_or(usize::MAX)) {
                out.line(&line);
            }
        }
    }
    Ok(CommandVerdict::Good)
}
