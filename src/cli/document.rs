//! What the commands about configuration documents share.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    files,
    global::Global,
    output::{Output, clean},
    reply::Reply,
};
use crate::config::document_id;
use crate::control::api::{
    Changed, GetRequest, LinkChanged, LinkNamed, LinkShown, Status, StatusRequest, StoredDocument,
};

/// JSON for people.
pub(super) fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// The document of a replication as the service shows it.
pub(super) async fn stored(client: &Client, id: &str) -> Result<Reply<StoredDocument>, Error> {
    client.query("config.get", &GetRequest { replication: id.to_owned(), resolved: false }).await
}

/// Refuses a document that would be another replication's.
pub(super) fn is_id_of(document: &Value, id: &str, site: &str) -> Result<(), Error> {
    match document_id(document, site) {
        Some(other) if other != id => {
            let other = clean(&other);
            let message = format!(
                "`stream`, `name` or `id` makes this `{other}`: only the document of `{id}` can be changed here"
            );
            Err(Error::Failed(message))
        }
        _ => Ok(()),
    }
}

/// The line that is printed for a change.
pub(super) fn at_revision(changed: &Changed) -> String {
    format!("{} is at revision {}", changed.replication, changed.revision)
}

/// The document of a link as the service shows it.
pub(super) async fn stored_link(client: &Client, name: &str) -> Result<Reply<LinkShown>, Error> {
    client.query("link.get", &LinkNamed { link: name.to_owned() }).await
}

/// A link as a document, with the name that `link add` and `config apply` need.
pub(super) fn link_as_document(shown: LinkShown) -> StoredDocument {
    let LinkShown { link, revision, mut config, problems, .. } = shown;
    if let Value::Object(fields) = &mut config {
        fields.entry("name").or_insert_with(|| link.clone().into());
    }
    StoredDocument { replication: link, revision, config, problems }
}

/// The line that is printed for a change of a link.
pub(super) fn link_at_revision(changed: &LinkChanged) -> String {
    let used_by = match changed.used_by {
        0 => String::new(),
        1 => ", used by 1 document".to_owned(),
        many => format!(", used by {many} documents"),
    };
    format!("{} is at revision {}{used_by}", changed.link, changed.revision)
}

/// Name of the site, which is in ids.
pub(super) async fn site(client: &Client) -> Result<String, Error> {
    let request = StatusRequest { limit: Some(0), ..StatusRequest::default() };
    let status: Reply<Status> = client.query("status", &request).await?;
    Ok(status.value.site)
}

// The help of a verb is that of its variant: no doc comments here.
#[derive(Debug, clap::Args)]
pub(super) struct FileArgs {
    /// Document, JSON or YAML; `-` for stdin
    pub(super) file: PathBuf,

    #[command(flatten)]
    pub(super) global: Global,
}

#[derive(Debug, clap::Args)]
pub(super) struct UpdateArgs {
    /// Document, JSON or YAML; `-` for stdin. A `***` in a URL keeps the stored secret
    pub(super) file: PathBuf,

    /// Only if the document is at this revision
    #[arg(long, value_name = "N")]
    pub(super) revision: Option<u64>,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Stores the document of a file.
pub(super) async fn write<T: DeserializeOwned>(
    global: &Global,
    endpoint: &str,
    file: &Path,
    revision: Option<u64>,
    words: impl FnOnce(&T) -> String,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let document = files::read_document(file)?;
    let changed: Reply<T> = Client::connect(global).await?.change_at(endpoint, document, revision).await?;
    out.reply(&changed, words);
    Ok(CommandVerdict::Good)
}

/// Sends one change after the other; one that is refused is reported, and the others are made.
pub(super) async fn change_each<T: DeserializeOwned>(
    client: &Client,
    endpoint: &str,
    requests: impl IntoIterator<Item = impl Serialize>,
    words: impl Fn(&T) -> String,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let mut verdict = CommandVerdict::Good;
    for request in requests {
        let changed: Result<Reply<T>, Error> = client.change(endpoint, &request).await;
        match changed {
            Ok(reply) => out.reply(&reply, &words),
            Err(error) => {
                error.print(out);
                verdict = CommandVerdict::Bad;
            }
        }
    }
    Ok(verdict)
}
