//! `stream-replicator consumers`: durable consumers of the source, with their positions at the target.

use std::path::PathBuf;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    files,
    format::count,
    global::Global,
    output::{Output, clean},
    reply::Reply,
};
use crate::control::api::{
    ConsumersRequest, ExportedConsumers, ImportRequest, ImportedConsumer, ImportedConsumers, MoveOutcome, MovedConsumer,
};

/// Move durable consumers of the source to the target, with their positions
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: ConsumersVerb,
}

#[derive(Debug, clap::Subcommand)]
enum ConsumersVerb {
    /// Print the consumers of the source as JSON, as the target would get them
    Export(ConsumersExportArgs),
    /// Create the consumers of an export at the target, or move those that are not used
    Import(ConsumersImportArgs),
}

#[derive(Debug, clap::Args)]
struct ConsumersExportArgs {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    /// Consumer, or pattern of names; without, those of the document, or all durable ones
    #[arg(long = "consumer", value_name = "NAME")]
    consumers: Vec<String>,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct ConsumersImportArgs {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    /// What `export` printed; `-` for stdin
    #[arg(value_name = "FILE", default_value = "-")]
    file: PathBuf,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            ConsumersVerb::Export(args) => &args.global,
            ConsumersVerb::Import(args) => &args.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    match &args.verb {
        ConsumersVerb::Export(args) => export(args, out).await,
        ConsumersVerb::Import(args) => import(args, out).await,
    }
}

async fn export(args: &ConsumersExportArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let request = ConsumersRequest { replication: args.id.clone(), consumers: args.consumers.clone() };
    let reply: Reply<ExportedConsumers> = client.query("consumers.export", &request).await?;
    for (name, error) in reply.value.consumers.iter().filter_map(|one| Some((&one.name, one.error.as_ref()?))) {
        out.note(&clean(&format!("{}: consumer {name} cannot be at the target: {error}", args.id)));
    }
    // A file for `import`, with or without `--json`.
    out.reply(&reply, |exported| serde_json::to_string_pretty(exported).unwrap_or_default());
    Ok(CommandVerdict::Good)
}

async fn import(args: &ConsumersImportArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let text = files::read(&args.file)?;
    let exported: ExportedConsumers = serde_json::from_slice(&text).map_err(|error| {
        Error::Failed(clean(&format!("`{}` is not what `consumers export` prints: {error}", args.file.display())))
    })?;
    let wanted = exported.consumers.into_iter().filter(|one| one.error.is_none());
    let consumers: Vec<_> = wanted
        .map(|one| ImportedConsumer { name: one.name, position: one.position, start: one.start, config: one.config })
        .collect();
    if consumers.is_empty() {
        return Err(Error::Failed(format!("{}: the export has no consumers", clean(&args.id))));
    }
    let client = Client::connect(&args.global).await?;
    let request = ImportRequest { replication: args.id.clone(), consumers };
    let reply: Reply<ImportedConsumers> = client.change("consumers.import", &request).await?;
    out.reply(&reply, |imported| {
        let lines = imported.consumers.iter().map(|moved| moved_line(&imported.replication, moved));
        lines.collect::<Vec<_>>().join("\n")
    });
    let is_refused = |moved: &MovedConsumer| moved.outcome == MoveOutcome::Refused;
    Ok(if reply.value.consumers.iter().any(is_refused) { CommandVerdict::Bad } else { CommandVerdict::Good })
}

/// What became of a consumer, in a line.
pub(super) fn moved_line(replication: &str, moved: &MovedConsumer) -> String {
    let MovedConsumer { name, position, start, outcome, reason } = moved;
    let (start, position) = (count(*start), count(*position));
    let words = match outcome {
        MoveOutcome::Created => format!("created, begins with {start} (source position {position})"),
        MoveOutcome::Moved => format!("moved, begins with {start} (source position {position})"),
        MoveOutcome::Current => format!("is current, begins with {start} (source position {position})"),
        MoveOutcome::InUse => "is used at the target and was left as it is".to_owned(),
        MoveOutcome::Refused => format!("refused: {}", reason.as_deref().unwrap_or("no reason")),
        MoveOutcome::NotRefreshed => format!("was not refreshed: {}", reason.as_deref().unwrap_or("no reason")),
    };
    clean(&format!("{replication}: consumer {name} {words}"))
}
