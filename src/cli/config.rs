//! `stream-replicator config`: documents in and out.

use serde_json::{Value, json};

use super::{
    add::{self, AddArgs, FieldSetArgs},
    apply,
    client::Client,
    diff::{diff, show_diff},
    document::{FileArgs, UpdateArgs, at_revision, change_each, pretty, site, stored},
    edit,
    error::{CommandVerdict, Error, problems},
    files,
    global::Global,
    output::{self, Colour, Output, Table},
    reply::Reply,
    select::SelectedIds,
    status_view::{state_colour, state_name},
    transfer,
    validation::print_validation,
};
use crate::{
    config::{document_id, pretty_document},
    control::api::{Changed, DeleteRequest, GetRequest, List, StoredDocument, Validation},
};

/// Add, change, show and remove replications
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: ConfigVerb,
}

#[derive(Debug, clap::Subcommand)]
enum ConfigVerb {
    Add(Box<AddArgs>),
    /// Replace the document of a replication; one that is stored already is left alone
    Update(UpdateArgs),
    /// Show the document of a replication, secrets as `***`
    Get(GetArgs),
    /// List all replications
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    /// Remove replications, with position and state
    #[command(visible_alias = "delete")]
    Rm(RmArgs),
    /// Check a document and both clusters before anything runs; exit code 1 if it is not valid
    Validate(FileArgs),
    /// Show the JSON schema of a document
    Schema(Global),
    /// Change the document of a replication in `$VISUAL` or `$EDITOR`
    Edit(edit::Args),
    Set(FieldSetArgs),
    Apply(apply::Args),
    Import(transfer::ImportArgs),
    Export(transfer::ExportArgs),
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    /// Print the ids alone, one on a line
    #[arg(long, conflicts_with = "json")]
    ids: bool,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct GetArgs {
    #[command(flatten)]
    selected: SelectedIds,

    /// Print the document alone
    #[arg(long)]
    raw: bool,

    /// Print the document that runs: with the fields of its link
    #[arg(long)]
    resolved: bool,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct RmArgs {
    #[command(flatten)]
    selected: SelectedIds,

    /// Keep position and state, so that it resumes there when it is added again
    #[arg(long)]
    keep: bool,

    /// Do not ask; required without a terminal
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            ConfigVerb::Add(args) => &args.global,
            ConfigVerb::Validate(args) => &args.global,
            ConfigVerb::Update(args) => &args.global,
            ConfigVerb::Get(args) => &args.global,
            ConfigVerb::Ls(args) => &args.global,
            ConfigVerb::Schema(global) => global,
            ConfigVerb::Rm(args) => &args.global,
            ConfigVerb::Edit(args) => &args.global,
            ConfigVerb::Set(args) => &args.global,
            ConfigVerb::Apply(args) => &args.global,
            ConfigVerb::Import(args) => &args.global,
            ConfigVerb::Export(args) => &args.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let global = args.global();
    match &args.verb {
        ConfigVerb::Add(args) => add::add(args, out).await,
        ConfigVerb::Update(args) => update(args, out).await,
        ConfigVerb::Get(args) => get(args, out).await,
        ConfigVerb::Ls(args) => list(args, out).await,
        ConfigVerb::Rm(args) => remove(args, out).await,
        ConfigVerb::Validate(args) => validate(args, out).await,
        ConfigVerb::Schema(_) => {
            let schema: Reply<Value> = Client::connect(global).await?.query("config.schema", &json!({})).await?;
            out.reply(&schema, pretty);
            Ok(CommandVerdict::Good)
        }
        ConfigVerb::Edit(args) => edit::run(args, out).await,
        ConfigVerb::Set(args) => add::set(args, out).await,
        ConfigVerb::Apply(args) => apply::run(args, out).await,
        ConfigVerb::Import(args) => transfer::import(args, out).await,
        ConfigVerb::Export(args) => transfer::export(args, out).await,
    }
}

async fn update(args: &UpdateArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let document = files::read_document(&args.file)?;
    let client = Client::connect(&args.global).await?;
    if !out.json()
        && let Ok(value) = serde_json::from_slice::<Value>(&document)
        && let Some(id) = document_id(&value, &site(&client).await?)
        && let Ok(before) = stored(&client, &id).await
    {
        show_diff(&diff(Some(&before.value), &id, &args.file.display().to_string(), &value), out);
    }
    let changed: Reply<Changed> = client.change_at("config.update", document, args.revision).await?;
    out.reply(&changed, at_revision);
    Ok(CommandVerdict::Good)
}

async fn get(args: &GetArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let mut verdict = CommandVerdict::Good;
    for id in args.selected.resolve(&client).await? {
        let request = GetRequest { replication: id, resolved: args.resolved };
        match client.query("config.get", &request).await {
            Ok(reply) => show(&reply, args.raw, out),
            Err(error) => {
                error.print(out);
                verdict = CommandVerdict::Bad;
            }
        }
    }
    Ok(verdict)
}

/// The document alone on stdout, so that `validate` and `apply` read it.
fn show(reply: &Reply<StoredDocument>, raw: bool, out: &mut Output) {
    if !out.json() {
        if !raw {
            out.note(&format!("{}, revision {}", reply.value.replication, reply.value.revision));
        }
        problems(out, &reply.value.problems);
    }
    if raw {
        out.line(&pretty_document(&reply.value.config));
    } else {
        out.reply(reply, |document| pretty_document(&document.config));
    }
}

async fn list(args: &ListArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let reply: Reply<List> = Client::connect(&args.global).await?.pages("config.list").await?;
    if args.ids {
        reply.value.replications.iter().for_each(|row| out.line(&row.replication));
        return Ok(CommandVerdict::Good);
    }
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    let mut table = Table::new(&["REPLICATION", "STATE", "REVISION", "ORIGIN"]).right(&[2]).painted(1);
    for row in reply.value.replications {
        let state = row.state.map_or_else(|| "-".to_owned(), state_name);
        let colour = row.state.map_or(Colour::Plain, state_colour);
        table.row(colour, vec![row.replication, state, row.revision.to_string(), row.origin]);
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

async fn remove(args: &RmArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    if !args.force && !output::can_ask() {
        return Err(Error::Usage("no terminal to ask on: `--force` removes without asking".to_owned()));
    }
    let client = Client::connect(&args.global).await?;
    let ids = args.selected.resolve(&client).await?;
    if !args.force && !sure(&ids, args.keep) {
        return Err(Error::Failed("nothing was removed".to_owned()));
    }
    let requests = ids.into_iter().map(|replication| DeleteRequest { replication, keep: args.keep });
    let words = |changed: &Changed| format!("{} is removed", changed.replication);
    change_each(&client, "config.delete", requests, words, out).await
}

fn sure(ids: &[String], keep: bool) -> bool {
    let what = if keep { "position and state are kept" } else { "with position and state" };
    let number = if ids.len() > 1 { format!("{} replications, ", ids.len()) } else { String::new() };
    output::confirm(&format!("remove {number}{} ({what})? [y/N]", ids.join(", "))) == Some(true)
}

async fn validate(args: &FileArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let document = files::read_document(&args.file)?;
    let reply: Reply<Validation> =
        Client::connect(&args.global).await?.check_document("config.validate", document).await?;
    let verdict = if reply.value.valid { CommandVerdict::Good } else { CommandVerdict::Bad };
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(verdict);
    }
    print_validation(&reply.value, out);
    Ok(verdict)
}
