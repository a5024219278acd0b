//! `stream-replicator link`: fields that replications between the same clusters share.

use super::{
    client::Client,
    document::{FileArgs, UpdateArgs, change_each, link_at_revision, stored_link, write},
    edit::{self, EditedKind},
    error::{CommandVerdict, Error, problem, problems},
    files,
    global::Global,
    output::{Colour, Output, Table},
    reply::Reply,
};
use crate::{
    config::pretty_document,
    control::api::{LinkChanged, LinkList, LinkNamed, LinkValidation},
};

/// Name two clusters once, for replications with `link: NAME`
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: LinkVerb,
}

#[derive(Debug, clap::Subcommand)]
enum LinkVerb {
    /// Add a link
    Add(FileArgs),
    /// Replace the document of a link; all replications that use it follow
    Update(UpdateArgs),
    /// Check a document, also for the replications that use the link of this name
    Validate(FileArgs),
    /// Show the document of a link, secrets as `***`
    Get(LinkNameArgs),
    /// List links
    #[command(visible_alias = "list")]
    Ls(Global),
    /// Remove links that nothing uses
    #[command(visible_alias = "delete")]
    Rm(LinkNamesArgs),
    /// Change the document of a link in `$VISUAL` or `$EDITOR`
    Edit(LinkNameArgs),
}

#[derive(Debug, clap::Args)]
struct LinkNameArgs {
    /// Link
    name: String,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct LinkNamesArgs {
    /// Links
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            LinkVerb::Add(args) | LinkVerb::Validate(args) => &args.global,
            LinkVerb::Update(args) => &args.global,
            LinkVerb::Get(args) | LinkVerb::Edit(args) => &args.global,
            LinkVerb::Ls(global) => global,
            LinkVerb::Rm(args) => &args.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let global = args.global();
    match &args.verb {
        LinkVerb::Add(args) => write(global, "link.add", &args.file, None, link_at_revision, out).await,
        LinkVerb::Update(args) => write(global, "link.update", &args.file, args.revision, link_at_revision, out).await,
        LinkVerb::Validate(args) => validate(args, out).await,
        LinkVerb::Get(args) => get(args, out).await,
        LinkVerb::Ls(_) => list(global, out).await,
        LinkVerb::Rm(args) => remove(args, out).await,
        LinkVerb::Edit(args) => {
            let client = Client::connect(&args.global).await?;
            edit::edit_one(&client, &args.name, &EditedKind::Link, out).await?;
            Ok(CommandVerdict::Good)
        }
    }
}

async fn validate(args: &FileArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let document = files::read_document(&args.file)?;
    let client = Client::connect(&args.global).await?;
    let reply: Reply<LinkValidation> = client.check_document("link.validate", document).await?;
    let LinkValidation { valid, problems, .. } = &reply.value;
    out.reply(&reply, |_| {
        let lines = problems.iter().map(|one| format!("\nproblem: {}", problem(one)));
        let verdict = if *valid { "valid" } else { "not valid" };
        format!("{verdict}{}", lines.collect::<String>())
    });
    Ok(if *valid { CommandVerdict::Good } else { CommandVerdict::Bad })
}

async fn get(args: &LinkNameArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let shown = stored_link(&Client::connect(&args.global).await?, &args.name).await?;
    if !out.json() {
        let used_by = match shown.value.used_by.as_slice() {
            [] => "not used".to_owned(),
            users => format!("used by {}", users.join(", ")),
        };
        out.note(&format!("{}, revision {}, {used_by}", shown.value.link, shown.value.revision));
        problems(out, &shown.value.problems);
    }
    out.reply(&shown, |shown| pretty_document(&shown.config));
    Ok(CommandVerdict::Good)
}

async fn list(global: &Global, out: &mut Output) -> Result<CommandVerdict, Error> {
    let reply: Reply<LinkList> = Client::connect(global).await?.pages("link.list").await?;
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    let mut table = Table::new(&["LINK", "STATE", "REVISION", "USED BY"]).right(&[2, 3]).painted(1);
    for row in reply.value.links {
        let (colour, state) = if row.valid { (Colour::Green, "valid") } else { (Colour::Red, "invalid") };
        table.row(colour, vec![row.link, state.to_owned(), row.revision.to_string(), row.used_by.to_string()]);
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

async fn remove(args: &LinkNamesArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let requests = args.names.iter().map(|name| LinkNamed { link: name.clone() });
    let words = |changed: &LinkChanged| format!("{} is removed", changed.link);
    change_each(&Client::connect(&args.global).await?, "link.delete", requests, words, out).await
}
