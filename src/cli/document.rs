//! What the commands about configuration documents share.

use serde_json::Value;

use super::{client::Client, error::Error, reply::Reply};
use crate::control::api::{Changed, NamedRequest, Status, StatusRequest, StoredDocument};

/// JSON for people.
pub(super) fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// The document of a replication as the service shows it.
pub(super) async fn stored(client: &Client, id: &str) -> Result<Reply<StoredDocument>, Error> {
    client.query("config.get", &NamedRequest { replication: id.to_owned() }).await
}

/// The line that is printed for a change.
pub(super) fn at_revision(changed: &Changed) -> String {
    format!("{} is at revision {}", changed.replication, changed.revision)
}

/// Name of the site, which is in ids.
pub(super) async fn site(client: &Client) -> Result<String, Error> {
    let request = StatusRequest { limit: Some(0), ..StatusRequest::default() };
    let status: Reply<Status> = client.query("status", &request).await?;
    Ok(status.value.site)
}
