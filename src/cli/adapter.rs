//! `stream-replicator adapter`: Choria's data adapters.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    client::Client,
    document::{FileArgs, UpdateArgs, change_each, pretty, write},
    error::{CommandVerdict, Error, problem, problems},
    files,
    format::{bytes, count},
    global::Global,
    output::{Colour, Output, Table},
    reply::Reply,
};
use crate::{
    adapter::{AdapterRow, AdapterState},
    choria::adapter::{ImportedAdapters, import_broker},
    control::api::{
        AdapterChanged, AdapterList, AdapterNamed, AdapterShown, AdapterStatus, AdapterStatusRequest,
        AdapterValidation, ErrorReply,
    },
};

/// How long `status` waits for further instances after an answer.
const NEXT_ANSWER: Duration = Duration::from_millis(300);

/// Run Choria's data adapters
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: AdapterVerb,
}

#[derive(Debug, clap::Subcommand)]
enum AdapterVerb {
    /// Add an adapter
    Add(FileArgs),
    /// Replace the document of an adapter
    Update(UpdateArgs),
    /// Check a document
    Validate(FileArgs),
    /// Show the document of an adapter, secrets as `***`
    Get(AdapterNameArgs),
    /// List adapters
    #[command(visible_alias = "list")]
    Ls(Global),
    /// Remove adapters
    #[command(visible_alias = "delete")]
    Rm(AdapterNamesArgs),
    /// Show what the adapters do on each instance
    Status(AdapterStatusArgs),
    /// Stop reading; what was accepted is still published
    Pause(AdapterNamesArgs),
    /// Resume after a pause
    Resume(AdapterNamesArgs),
    /// Add the adapters of a configuration file of Choria's broker
    Import(AdapterImportArgs),
}

#[derive(Debug, clap::Args)]
struct AdapterNameArgs {
    /// Adapter
    name: String,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct AdapterNamesArgs {
    /// Adapters
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct AdapterStatusArgs {
    /// Adapter [default: all]
    name: Option<String>,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct AdapterImportArgs {
    /// `broker.conf` of Choria: its keys `plugin.choria.adapters` and `plugin.choria.adapter.*`
    file: PathBuf,

    /// Servers to read from [default: `plugin.choria.middleware_hosts` of the file]
    #[arg(long, value_name = "URL")]
    servers: Option<String>,

    /// Only print the documents
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            AdapterVerb::Add(args) | AdapterVerb::Validate(args) => &args.global,
            AdapterVerb::Update(args) => &args.global,
            AdapterVerb::Get(args) => &args.global,
            AdapterVerb::Ls(global) => global,
            AdapterVerb::Rm(args) | AdapterVerb::Pause(args) | AdapterVerb::Resume(args) => &args.global,
            AdapterVerb::Status(args) => &args.global,
            AdapterVerb::Import(args) => &args.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let global = args.global();
    match &args.verb {
        AdapterVerb::Add(args) => write(global, "adapter.add", &args.file, None, at_revision, out).await,
        AdapterVerb::Update(args) => write(global, "adapter.update", &args.file, args.revision, at_revision, out).await,
        AdapterVerb::Validate(args) => validate(args, out).await,
        AdapterVerb::Get(args) => get(args, out).await,
        AdapterVerb::Ls(_) => list(global, out).await,
        AdapterVerb::Rm(args) => each(args, "adapter.delete", "is removed", out).await,
        AdapterVerb::Status(args) => status(args, out).await,
        AdapterVerb::Pause(args) => each(args, "adapter.pause", "is paused", out).await,
        AdapterVerb::Resume(args) => each(args, "adapter.resume", "is resumed", out).await,
        AdapterVerb::Import(args) => import(args, out).await,
    }
}

fn at_revision(changed: &AdapterChanged) -> String {
    format!("{} is at revision {}", changed.adapter, changed.revision)
}

async fn validate(args: &FileArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let document = files::read_document(&args.file)?;
    let client = Client::connect(&args.global).await?;
    let reply: Reply<AdapterValidation> = client.check_document("adapter.validate", document).await?;
    let AdapterValidation { valid, problems } = &reply.value;
    out.reply(&reply, |_| {
        let lines = problems.iter().map(|one| format!("\nproblem: {}", problem(one)));
        let verdict = if *valid { "valid" } else { "not valid" };
        format!("{verdict}{}", lines.collect::<String>())
    });
    Ok(if *valid { CommandVerdict::Good } else { CommandVerdict::Bad })
}

async fn get(args: &AdapterNameArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let request = AdapterNamed { adapter: args.name.clone() };
    let shown: Reply<AdapterShown> = Client::connect(&args.global).await?.query("adapter.get", &request).await?;
    let found = shown.value.problems.clone();
    out.reply(&shown, |shown| {
        format!("{}, origin {}, revision {}\n{}", shown.adapter, shown.origin, shown.revision, pretty(&shown.config))
    });
    problems(out, &found);
    Ok(CommandVerdict::Good)
}

async fn list(global: &Global, out: &mut Output) -> Result<CommandVerdict, Error> {
    let reply: Reply<AdapterList> = Client::connect(global).await?.pages("adapter.list").await?;
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    let mut table = Table::new(&["ADAPTER", "STATE", "REVISION", "ORIGIN"]).right(&[2]).painted(1);
    for row in reply.value.adapters {
        table.row(colour(row.state), vec![row.adapter, name(row.state), row.revision.to_string(), row.origin]);
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

async fn each(args: &AdapterNamesArgs, endpoint: &str, done: &str, out: &mut Output) -> Result<CommandVerdict, Error> {
    let requests = args.names.iter().map(|name| AdapterNamed { adapter: name.clone() });
    let words = |changed: &AdapterChanged| format!("{} {done}", changed.adapter);
    change_each(&Client::connect(&args.global).await?, endpoint, requests, words, out).await
}

/// Every instance has its own numbers: asks all of them.
async fn status(args: &AdapterStatusArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let request = AdapterStatusRequest { adapter: args.name.clone(), ..AdapterStatusRequest::default() };
    // The first answer has the errors too: of a service that is not there, or of a name that is not.
    let first: Reply<AdapterStatus> = client.query("adapter.status", &request).await?;
    let mut instances = BTreeMap::from([(first.value.instance.clone(), first.value)]);
    let body = serde_json::to_vec(&request).map_err(|error| Error::Failed(error.to_string()))?;
    for status in answers(&client, body.into()).await? {
        instances.insert(status.instance.clone(), status);
    }
    if out.json() {
        out.value(&instances.into_values().collect::<Vec<_>>());
        return Ok(CommandVerdict::Good);
    }
    const COLUMNS: &[&str] =
        &["ADAPTER", "INSTANCE", "STATE", "RECEIVED", "STORED", "DROPPED", "QUEUE", "QUEUE BYTES", "LAST ERROR"];
    let mut table = Table::new(COLUMNS).right(&[3, 4, 5, 6, 7]).painted(2);
    let mut rows: Vec<_> = instances.into_values().flat_map(|status| status.adapters).collect();
    rows.sort_by(|a, b| (&a.adapter, &a.instance).cmp(&(&b.adapter, &b.instance)));
    for row in rows {
        table.row(colour(row.state), cells(row));
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

fn cells(row: AdapterRow) -> Vec<String> {
    let dropped = row.dropped.iter().map(|(reason, count)| format!("{reason} {count}")).collect::<Vec<_>>();
    let error = row.last_error.filter(|error| error.current).map(|error| error.message).unwrap_or_default();
    vec![
        row.adapter,
        row.instance,
        name(row.state),
        count(row.received),
        count(row.stored),
        if dropped.is_empty() { "0".to_owned() } else { dropped.join(", ") },
        count(row.queue.messages as u64),
        bytes(row.queue.bytes as u64),
        error,
    ]
}

/// The answers of all instances, for as long as they come.
async fn answers(client: &Client, request: Bytes) -> Result<Vec<AdapterStatus>, Error> {
    let failed = |error: String| Error::Failed(error);
    let inbox = client.nats().new_inbox();
    let mut replies = client.nats().subscribe(inbox.clone()).await.map_err(|error| failed(error.to_string()))?;
    let subject = format!("{}.adapter.status", client.prefix());
    let sent = client.nats().publish_with_reply(subject, inbox, request).await;
    sent.map_err(|error| failed(error.to_string()))?;
    let mut found = Vec::new();
    while let Ok(Some(reply)) = timeout(NEXT_ANSWER, replies.next()).await {
        if serde_json::from_slice::<ErrorReply>(&reply.payload).is_err() {
            found.extend(serde_json::from_slice(&reply.payload).ok());
        }
    }
    Ok(found)
}

fn name(state: AdapterState) -> String {
    serde_json::to_value(state).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn colour(state: AdapterState) -> Colour {
    match state {
        AdapterState::Running => Colour::Green,
        AdapterState::Starting | AdapterState::Standby | AdapterState::Paused => Colour::Cyan,
        AdapterState::Retrying => Colour::Yellow,
        AdapterState::Invalid => Colour::Red,
    }
}

/// Adds each adapter of the file; those that cannot be added are reported, and the others are added.
async fn import(args: &AdapterImportArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let text = files::read(&args.file)?;
    let text = String::from_utf8_lossy(&text);
    let ImportedAdapters { adapters, problems } = import_broker(&text, args.servers.as_deref());
    let mut verdict = if problems.is_empty() { CommandVerdict::Good } else { CommandVerdict::Bad };
    problems.iter().for_each(|problem| out.note(problem));
    if adapters.is_empty() && problems.is_empty() {
        return Err(Error::Failed("the file has no `plugin.choria.adapters`".to_owned()));
    }
    if args.dry_run {
        let all: Vec<Value> = adapters.into_iter().map(|(_, document)| document).collect();
        out.line(&pretty(&json!(all)));
        return Ok(verdict);
    }
    let client = Client::connect(&args.global).await?;
    for (name, document) in adapters {
        let added: Result<Reply<AdapterChanged>, Error> =
            client.change_at("adapter.add", document.to_string().into(), None).await;
        match added {
            Ok(reply) => out.reply(&reply, at_revision),
            Err(error) => {
                out.note(&format!("adapter `{name}` is not added:"));
                error.print(out);
                verdict = CommandVerdict::Bad;
            }
        }
    }
    Ok(verdict)
}
