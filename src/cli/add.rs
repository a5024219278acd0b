//! `stream-replicator config add` and `config set`: documents from files and from flags.

use std::path::Path;

use bytes::Bytes;
use nats_lane::Secret;
use serde_json::{Map, Value, json};

use super::{
    assign::{Assignment, parse_assignment},
    client::Client,
    diff::{diff, show_diff},
    document::{at_revision, is_id_of, site, stored},
    error::{CommandVerdict, Error},
    files,
    global::Global,
    output::Output,
    reply::Reply,
    select::expand,
    template::{required, template},
    validation::print_validation,
    wait,
};
use crate::{
    config::pretty_document,
    control::api::{Changed, Validation},
};

/// Add a replication, from a file or from flags
///
/// Both clusters are checked first, and nothing is added if the replication could not run.
#[derive(Debug, clap::Args)]
pub(super) struct AddArgs {
    /// Document, JSON or YAML; `-` for stdin. With flags of a document: the id of the replication [default: the stream]
    #[arg(value_name = "FILE|ID")]
    what: Option<String>,

    #[command(flatten)]
    fields: FieldFlags,

    /// Add it without checking both clusters
    #[arg(long)]
    no_preflight: bool,

    /// Check it, print the document and add nothing
    #[arg(long)]
    dry_run: bool,

    /// Wait until everything is copied, and show the progress on a terminal; exit code 1 after `--timeout`
    #[arg(long, conflicts_with_all = ["dry_run", "template"])]
    wait_caught_up: bool,

    /// Print a document to fill in, with the fields that are given, and ask no service
    #[arg(long, conflicts_with = "dry_run")]
    template: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Fields of a document as flags.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Document")]
struct FieldFlags {
    /// Where the source is: a URL, or a context of the `nats` tool on the host of the service
    #[arg(long, value_name = "CONTEXT|URL")]
    source: Option<Secret>,

    /// Where the target is: a URL, or a context of the `nats` tool on the host of the service
    #[arg(long, value_name = "CONTEXT|URL")]
    target: Option<Secret>,

    /// Link that has the fields which are not given here
    #[arg(long, value_name = "NAME")]
    link: Option<String>,

    /// Stream to copy [default: the id]
    #[arg(long, value_name = "STREAM")]
    stream: Option<String>,

    /// Stream to copy into [default: the same name]
    #[arg(long, value_name = "STREAM")]
    target_stream: Option<String>,

    /// Copy only subjects that match; may be repeated
    #[arg(long = "filter", value_name = "SUBJECT")]
    filters: Vec<String>,

    /// Do not copy subjects that match; may be repeated
    #[arg(long = "exclude", value_name = "SUBJECT")]
    excludes: Vec<String>,

    /// Any other field, such as `limits.messages_in_flight=500`; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE", value_parser = parse_assignment)]
    sets: Vec<Assignment>,
}

/// Change fields of a document
///
/// The change is shown, secrets as `***`. `config schema` describes the fields.
#[derive(Debug, clap::Args)]
pub(super) struct FieldSetArgs {
    /// Replication, or a pattern of ids such as `'S0*'`
    id: String,

    /// Field and value, such as `max_age=7d`, `limits.messages_in_flight=500` or `filter_subjects=a.>,b.>`; without a value
    /// the field is removed
    #[arg(required = true, value_name = "PATH=VALUE", value_parser = parse_assignment)]
    assignments: Vec<Assignment>,

    /// Only show the changes
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

impl FieldFlags {
    fn given(&self) -> bool {
        let Self { source, target, link, stream, target_stream, filters, excludes, sets } = self;
        [source, target].iter().any(|place| place.is_some())
            || [link, stream, target_stream].iter().any(|stream| stream.is_some())
            || !(filters.is_empty() && excludes.is_empty() && sets.is_empty())
    }

    /// The document of replication `id`.
    fn document(&self, id: Option<&str>) -> Result<Value, Error> {
        let Some(stream) = self.stream.as_deref().or(id) else {
            return Err(Error::Usage("name the stream to copy: `--stream STREAM`, or an ID".to_owned()));
        };
        let mut fields = Map::new();
        fields.insert("stream".to_owned(), stream.into());
        if let Some(id) = id.filter(|id| *id != stream) {
            fields.insert("id".to_owned(), id.into());
        }
        if let Some(link) = &self.link {
            fields.insert("link".to_owned(), link.as_str().into());
        }
        for (side, place) in [("source", &self.source), ("target", &self.target)] {
            if let Some(place) = place {
                let field = if place.reveal().contains("://") { "url" } else { "context" };
                fields.insert(format!("{side}_{field}"), place.reveal().into());
            }
        }
        if let Some(target) = &self.target_stream {
            fields.insert("target_stream".to_owned(), target.as_str().into());
        }
        for (field, subjects) in [("filter_subjects", &self.filters), ("exclude_subjects", &self.excludes)] {
            if !subjects.is_empty() {
                fields.insert(field.to_owned(), json!(subjects));
            }
        }
        let mut document = Value::Object(fields);
        for assignment in &self.sets {
            assignment.apply(&mut document).map_err(Error::Usage)?;
        }
        Ok(document)
    }
}

/// Carries out `config add`.
pub(super) async fn add(args: &AddArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    if args.template {
        let given = args.what.is_some() || args.fields.given();
        let document = if given { args.fields.document(args.what.as_deref())? } else { required().into() };
        match (out.json(), document.as_object()) {
            (false, Some(fields)) => out.text(&template(fields)),
            _ => out.value(&document),
        }
        return Ok(CommandVerdict::Good);
    }
    let document: Bytes = match (&args.what, args.fields.given()) {
        (id, true) => args.fields.document(id.as_deref())?.to_string().into(),
        (Some(file), false) => files::read_document(Path::new(file))?,
        (None, false) => {
            let message = "name a FILE, or say what to copy: `config add ID --source CONTEXT --target CONTEXT`";
            return Err(Error::Usage(message.to_owned()));
        }
    };
    let client = Client::connect(&args.global).await?;
    if !args.no_preflight && !passes(&client, document.clone(), args.dry_run, out).await? {
        return Ok(CommandVerdict::Bad);
    }
    if args.dry_run {
        let value = serde_json::from_slice(&document).unwrap_or_default();
        out.line(&pretty_document(&crate::config::mask_document(&value)));
        return Ok(CommandVerdict::Good);
    }
    let changed: Reply<Changed> = client.change_at("config.add", document, None).await?;
    out.reply(&changed, at_revision);
    if args.wait_caught_up {
        return wait::added(client, &changed.value.replication, args.global.asking.limit(), out).await;
    }
    Ok(CommandVerdict::Good)
}

/// Whether the replication could run. What is wrong with the document alone is left to the request that adds it.
async fn passes(client: &Client, document: Bytes, dry_run: bool, out: &mut Output) -> Result<bool, Error> {
    let reply: Reply<Validation> = client.check_document("config.validate", document).await?;
    let Validation { valid, preflight, warnings, .. } = &reply.value;
    if *valid || preflight.is_none() && !dry_run {
        warnings.iter().for_each(|one| out.note(&format!("warning: {}", super::error::problem(one))));
        return Ok(true);
    }
    if out.json() {
        out.reply(&reply, |_| String::new());
    } else {
        print_validation(&reply.value, out);
    }
    out.note("error: it could not run, nothing was added; `--no-preflight` adds it all the same");
    Ok(false)
}

/// Carries out `config set`.
pub(super) async fn set(args: &FieldSetArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let site = site(&client).await?;
    let mut verdict = CommandVerdict::Good;
    for id in expand(&client, std::slice::from_ref(&args.id)).await? {
        if let Err(error) = set_one(&client, &id, &site, args, out).await {
            error.print(out);
            verdict = CommandVerdict::Bad;
        }
    }
    Ok(verdict)
}

async fn set_one(client: &Client, id: &str, site: &str, args: &FieldSetArgs, out: &mut Output) -> Result<(), Error> {
    let before = stored(client, id).await?.value;
    let mut document = before.config.clone();
    for assignment in &args.assignments {
        assignment.apply(&mut document).map_err(Error::Failed)?;
    }
    is_id_of(&document, id, site)?;
    show_diff(&diff(Some(&before), id, "as set", &document), out);
    if args.dry_run {
        return Ok(());
    }
    let body = document.to_string().into();
    let changed: Reply<Changed> = client.change_at("config.update", body, Some(before.revision)).await?;
    out.reply(&changed, at_revision);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> FieldFlags {
        let (filters, excludes, sets) = (Vec::new(), Vec::new(), Vec::new());
        FieldFlags {
            source: None,
            target: None,
            link: None,
            stream: None,
            target_stream: None,
            filters,
            excludes,
            sets,
        }
    }

    #[test]
    fn flags_make_a_document() {
        let all = FieldFlags {
            source: Some("east".into()),
            target: Some("nats://u:p@hub".into()),
            link: None,
            stream: Some("ORDERS".to_owned()),
            target_stream: Some("ALL".to_owned()),
            filters: vec!["orders.>".to_owned()],
            excludes: vec!["orders.test".to_owned()],
            sets: vec![parse_assignment("limits.messages_in_flight=5").unwrap()],
        };
        assert!(all.given() && !flags().given());
        let expect = json!({"stream": "ORDERS", "id": "east", "source_context": "east", "target_url": "nats://u:p@hub",
            "target_stream": "ALL", "filter_subjects": ["orders.>"], "exclude_subjects": ["orders.test"],
            "limits": {"messages_in_flight": 5}});
        assert_eq!(all.document(Some("east")).unwrap(), expect);
        let short = FieldFlags { source: Some("east".into()), ..flags() };
        assert_eq!(short.document(Some("ORDERS")).unwrap(), json!({"stream": "ORDERS", "source_context": "east"}));
        assert!(short.document(None).unwrap_err().to_string().contains("`--stream STREAM`"));
    }
}
