//! The site that the buckets belong to: read before this instance joins the group, and watched from then on.

use std::time::Duration;

use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use crate::{
    names::SITE_KEY,
    store::{ConfigStore, Error, SiteKey, SiteRecord, Stored},
};

/// Pause before a record that could not be written is written again.
const AGAIN: Duration = Duration::from_secs(1);

/// The process cannot run with these settings: the exit code is that of wrong usage.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misconfigured(String);

/// The site of these buckets, if this process was started with its name. Buckets that have no site yet get this one.
pub(super) async fn claim(
    config: &ConfigStore,
    name: &str,
    buckets: &str,
) -> Result<Result<SiteRecord, Misconfigured>, Error> {
    Ok(match config.claim_site(&SiteRecord::new(name)).await? {
        SiteKey::Record(record, _) if record.name == name => Ok(record),
        SiteKey::Record(record, _) => Err(Misconfigured(another(&record.name, name, buckets))),
        SiteKey::Unreadable(why, _) => Err(Misconfigured(unreadable(&why, buckets))),
        // It was deleted in this moment.
        SiteKey::Missing => return Box::pin(claim(config, name, buckets)).await,
    })
}

/// Watches the key; ends with a reason when the buckets belong to another site. A record that was deleted is written
/// again: without it another site could take over the buckets.
pub(super) async fn keep(
    config: &ConfigStore,
    own: &SiteRecord,
    mut seen: watch::Receiver<Option<Stored>>,
    buckets: &str,
) -> Misconfigured {
    let mut known = own.clone();
    loop {
        let stored = seen.borrow_and_update().clone();
        match stored.map(|stored| stored.value.map(|value| SiteRecord::parse(&value))) {
            None => {}
            Some(Some(Ok(record))) if record.name != own.name => {
                return Misconfigured(another(&record.name, &own.name, buckets));
            }
            Some(Some(Ok(record))) => {
                if record.former != own.former {
                    info!(site = own.name, "the former names of the site changed; they count after a restart");
                }
                known = record;
            }
            Some(Some(Err(why))) => warn!("{}; continuing as site `{}`", unreadable(&why, buckets), own.name),
            Some(None) => match config.claim_site(&known).await {
                Ok(SiteKey::Record(record, _)) if record.name != own.name => {
                    return Misconfigured(another(&record.name, &own.name, buckets));
                }
                Ok(_) => {
                    warn!(site = own.name, "key `{SITE_KEY}` of `{buckets}_CONFIG` was deleted; it is written again")
                }
                Err(error) => {
                    warn!("key `{SITE_KEY}` was deleted and cannot be written again: {error}");
                    sleep(AGAIN).await;
                    continue;
                }
            },
        }
        if seen.changed().await.is_err() {
            // The supervisor is gone: the stop follows.
            std::future::pending::<()>().await;
        }
    }
}

fn another(owner: &str, name: &str, buckets: &str) -> String {
    format!(
        "buckets `{buckets}_*` belong to site `{owner}`, and this instance is of site `{name}`: start it with `--name {owner}`, \
         give it buckets of its own with `--bucket-prefix`, or, to rename the site, stop all of its instances and run \
         `stream-replicator site rename {owner} {name}`"
    )
}

fn unreadable(why: &str, buckets: &str) -> String {
    format!(
        "key `{SITE_KEY}` of bucket `{buckets}_CONFIG` is not the record of a site: {why}. Correct it; if it is the document of \
         a replication, put that under another id, with a `name` in it, and delete the key"
    )
}
