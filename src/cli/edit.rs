//! `stream-replicator config edit`: opens the document in an editor and writes it back if it was not changed meanwhile.

use std::{env, fs, io::Write, path::Path, process::Command};

use futures_util::FutureExt;
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::spawn_blocking,
};

use super::{
    client::Client,
    diff::{diff, show_diff},
    document::{at_revision, is_id_of, link_as_document, link_at_revision, site, stored, stored_link},
    error::{CommandVerdict, Error, problems},
    global::Global,
    output::{self, Output},
    select::SelectedIds,
};
use crate::{
    config::{link_name, pretty_document},
    control::api::StoredDocument,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    selected: SelectedIds,

    #[command(flatten)]
    pub(super) global: Global,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    let site = site(&client).await?;
    for id in args.selected.resolve(&client).await? {
        edit_one(&client, &id, &EditedKind::Replication { site: site.clone() }, out).await?;
    }
    Ok(CommandVerdict::Good)
}

/// What kind of document is edited.
pub(super) enum EditedKind {
    /// One of a replication, at this site.
    Replication { site: String },
    /// A link.
    Link,
}

impl EditedKind {
    async fn stored(&self, client: &Client, id: &str) -> Result<StoredDocument, Error> {
        match self {
            Self::Replication { .. } => Ok(stored(client, id).await?.value),
            Self::Link => Ok(link_as_document(stored_link(client, id).await?.value)),
        }
    }

    /// Stores a document; then prints how it differs.
    async fn change(
        &self,
        client: &Client,
        text: Vec<u8>,
        revision: u64,
        difference: &str,
        out: &mut Output,
    ) -> Result<(), Error> {
        match self {
            Self::Replication { .. } => {
                let reply = client.change_at("config.update", text.into(), Some(revision)).await?;
                show_diff(difference, out);
                out.reply(&reply, at_revision);
            }
            Self::Link => {
                let reply = client.change_at("link.update", text.into(), Some(revision)).await?;
                show_diff(difference, out);
                out.reply(&reply, link_at_revision);
            }
        }
        Ok(())
    }

    /// Refuses a document that would be another one's. Text that is no JSON is refused by the service.
    fn same(&self, text: &[u8], id: &str) -> Result<(), Error> {
        let edited = serde_json::from_slice::<Value>(text).unwrap_or_default();
        match self {
            Self::Replication { site } => is_id_of(&edited, id, site),
            Self::Link if link_name(&edited).is_none_or(|name| name == id) => Ok(()),
            Self::Link => Err(Error::Failed(format!("only the document of link `{id}` can be changed here"))),
        }
    }
}

/// The first that cannot be changed ends it: the user is asked about each.
pub(super) async fn edit_one(client: &Client, id: &str, kind: &EditedKind, out: &mut Output) -> Result<(), Error> {
    let document = kind.stored(client, id).await?;
    problems(out, &document.problems);
    let before = pretty_document(&document.config) + "\n";
    let file = draft(&before)?;
    let edited = edit(client, &document, kind, &before, file.path(), out).await;
    // what was written is not lost with the change that was refused
    let is_draft = fs::read(file.path()).is_ok_and(|text| text != before.as_bytes());
    if edited.is_err()
        && is_draft
        && let Ok((_, path)) = file.keep()
    {
        out.note(&format!("your version is kept in `{}`", path.display()));
    }
    edited
}

/// A file with the document that only this user can read: the user may add secrets.
fn draft(text: &str) -> Result<tempfile::NamedTempFile, Error> {
    let failed = |error| Error::Failed(format!("cannot write a temporary file: {error}"));
    let file = tempfile::Builder::new().prefix("stream-replicator-").suffix(".json").tempfile();
    let mut file = file.map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.flush()).map_err(failed)?;
    Ok(file)
}

async fn edit(
    client: &Client,
    document: &StoredDocument,
    kind: &EditedKind,
    before: &str,
    path: &Path,
    out: &mut Output,
) -> Result<(), Error> {
    loop {
        open_editor(path).await?;
        let text = fs::read(path).map_err(|error| Error::Failed(format!("cannot read the edited file: {error}")))?;
        if text == before.as_bytes() {
            out.note("not changed");
            return Ok(());
        }
        let refused = match kind.same(&text, &document.replication) {
            Ok(()) => {
                let edited = serde_json::from_slice::<Value>(&text).unwrap_or_default();
                let difference = diff(Some(document), &document.replication, "edited", &edited);
                let changed = kind.change(client, text, document.revision, &difference, out).await;
                let Err(error) = changed else { return Ok(()) };
                if was_overtaken(client, kind, document, &error).await {
                    error.print(out);
                    let id = &document.replication;
                    return Err(Error::Failed(format!("`{id}` was changed meanwhile: nothing was overwritten")));
                }
                if error.code() != Some(400) {
                    return Err(error);
                }
                error
            }
            Err(error) => error,
        };
        if !output::can_ask() {
            return Err(refused);
        }
        refused.print(out);
        if !again().await {
            return Err(Error::Failed("nothing was changed".to_owned()));
        }
    }
}

/// Whether a change was refused because another change was faster. That may also read as a problem with the document: a
/// secret that `***` stands for is gone.
async fn was_overtaken(client: &Client, kind: &EditedKind, document: &StoredDocument, error: &Error) -> bool {
    match error.code() {
        Some(409) => true,
        Some(400) => {
            let now = kind.stored(client, &document.replication).await;
            now.is_ok_and(|now| now.revision != document.revision)
        }
        _ => false,
    }
}

/// Lets the user edit; the connection is kept alive meanwhile. As in a shell, ctrl-c is the editor's.
async fn open_editor(path: &Path) -> Result<(), Error> {
    let mut editors = ["VISUAL", "EDITOR"].into_iter().filter_map(|name| env::var(name).ok());
    let editor = editors.find(|editor| !editor.trim().is_empty()).unwrap_or_else(|| "vi".to_owned());
    let _interrupts = signal(SignalKind::interrupt());
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{editor} \"$1\"")).arg("sh").arg(path);
    let ended = spawn_blocking(move || command.status()).await.map_err(std::io::Error::other).flatten();
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::Failed(format!("the editor `{editor}` ended with {status}: nothing was changed"))),
        Err(error) => Err(Error::Failed(format!("the editor `{editor}` cannot be started: {error}"))),
    }
}

/// Whether the user wants to continue; ctrl-c means no.
async fn again() -> bool {
    let Ok(mut interrupts) = signal(SignalKind::interrupt()) else { return false };
    while interrupts.recv().now_or_never().is_some() {}
    tokio::select! {
        answer = spawn_blocking(|| output::confirm("edit again? [y/N]")) => matches!(answer, Ok(Some(true))),
        _ = interrupts.recv() => false,
    }
}
