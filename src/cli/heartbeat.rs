//! `stream-replicator heartbeat`: what is published as heartbeats.

use std::path::PathBuf;

use serde_json::json;

use super::{
    client::Client,
    document::pretty,
    error::{CommandVerdict, Error, problems},
    files,
    global::Global,
    output::Output,
    reply::Reply,
};
use crate::control::api::{HeartbeatsChanged, HeartbeatsShown};

/// Show and set the heartbeats of the site
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: HeartbeatVerb,
}

#[derive(Debug, clap::Subcommand)]
enum HeartbeatVerb {
    /// Show the heartbeats in effect, secrets as `***`
    Get(Global),
    /// Replace the stored heartbeats; `{}` removes them
    Set(SetArgs),
}

#[derive(Debug, clap::Args)]
struct SetArgs {
    /// JSON document; `-` for stdin. A `***` in the URL keeps the stored secret
    file: PathBuf,

    /// Only if the stored heartbeats are at this revision
    #[arg(long, value_name = "N")]
    revision: Option<u64>,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            HeartbeatVerb::Get(global) => global,
            HeartbeatVerb::Set(args) => &args.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let global = args.global();
    match &args.verb {
        HeartbeatVerb::Get(_) => {
            let shown: Reply<HeartbeatsShown> =
                Client::connect(global).await?.query("heartbeat.get", &json!({})).await?;
            let rejected = shown.value.rejected.clone();
            out.reply(&shown, |shown| {
                let revision = shown.revision.map(|revision| format!(", revision {revision}")).unwrap_or_default();
                format!("origin {}{revision}\n{}", shown.origin.name(), pretty(&shown.config))
            });
            if let Some(rejected) = rejected {
                out.note(&format!("revision {} cannot be published:", rejected.revision));
                problems(out, &rejected.problems);
            }
        }
        HeartbeatVerb::Set(args) => {
            let document = files::read(&args.file)?;
            let client = Client::connect(global).await?;
            let changed: Reply<HeartbeatsChanged> = client.change_at("heartbeat.set", document, args.revision).await?;
            out.reply(&changed, |changed| format!("heartbeats are at revision {}", changed.revision));
        }
    }
    Ok(CommandVerdict::Good)
}
