//! `stream-replicator site`: which site the buckets belong to, and its explicit renaming. It works on the buckets: for a
//! renaming no instance may run that could be asked.

use std::{collections::BTreeMap, time::Duration};

use futures_util::StreamExt;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    global::{Global, bucket_prefix, site},
    output::Output,
};
use crate::{
    config::document_id,
    names,
    store::{Buckets, ConfigChange, ConfigStore, LeaseChange, LeaseStore, SessionRecord, SiteKey, SiteRecord},
};

/// Show and rename the site that the buckets belong to
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: SiteVerb,
}

#[derive(Debug, clap::Subcommand)]
enum SiteVerb {
    /// Show the name of the site and its former names
    Show(ShowArgs),
    /// Rename the site while none of its instances runs; it keeps recognizing its earlier copies
    ///
    /// Afterwards, start every instance with `--name NEW`. If the site is called NEW already, OLD is added to its former names:
    /// copies that were made under OLD count as its own.
    Rename(RenameArgs),
    /// Take over the durable consumers of an installation whose buckets are lost, while no instance runs
    ///
    /// INSTALLATION is the id that the error of a held replication names. Make sure that the installation runs nowhere: two that
    /// use one consumer copy a part of the messages each. Nothing is deleted; it takes effect with the next start.
    Adopt(AdoptArgs),
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    #[command(flatten)]
    buckets: BucketArgs,
}

#[derive(Debug, clap::Args)]
struct RenameArgs {
    /// Name that the site has
    #[arg(value_parser = site)]
    old: String,

    /// Name that it gets
    #[arg(value_parser = site)]
    new: String,

    #[command(flatten)]
    buckets: BucketArgs,
}

#[derive(Debug, clap::Args)]
struct AdoptArgs {
    /// Id of the installation
    #[arg(value_parser = site)]
    installation: String,

    #[command(flatten)]
    buckets: BucketArgs,
}

#[derive(Debug, clap::Args)]
struct BucketArgs {
    /// Prefix of the names of buckets
    #[arg(
        long,
        value_name = "PREFIX",
        env = "STREAM_REPLICATOR_BUCKET_PREFIX",
        hide_env_values = true,
        default_value = names::DEFAULT_BUCKET_PREFIX,
        value_parser = bucket_prefix
    )]
    bucket_prefix: String,

    #[command(flatten)]
    global: Global,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            SiteVerb::Show(args) => &args.buckets.global,
            SiteVerb::Rename(args) => &args.buckets.global,
            SiteVerb::Adopt(args) => &args.buckets.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    match &args.verb {
        SiteVerb::Show(args) => {
            let (config, _) = open(&args.buckets).await?;
            let name = format!("{}_CONFIG", args.buckets.bucket_prefix);
            match config.site().await.map_err(failed)? {
                SiteKey::Record(record, _) => show(&record, out),
                SiteKey::Missing => return Err(Error::Failed(format!("bucket `{name}` belongs to no site yet"))),
                SiteKey::Unreadable(why, _) => return Err(unreadable(&name, &why)),
            }
        }
        SiteVerb::Rename(args) => rename(args, out).await?,
        SiteVerb::Adopt(args) => adopt(args, out).await?,
    }
    Ok(CommandVerdict::Good)
}

async fn open(args: &BucketArgs) -> Result<(ConfigStore, LeaseStore), Error> {
    let client = Client::connect(&args.global).await?;
    Buckets::existing(client.nats().clone(), client.api_prefix(), &args.bucket_prefix).await.map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Failed(error.to_string())
}

fn unreadable(bucket: &str, why: &str) -> Error {
    Error::Failed(format!("key `{}` of bucket `{bucket}` is not the record of a site: {why}", names::SITE_KEY))
}

fn show(record: &SiteRecord, out: &mut Output) {
    if out.json() {
        out.value(record);
        return;
    }
    let former = record.former.join(", ");
    out.line(&if former.is_empty() { record.name.clone() } else { format!("{} (before: {former})", record.name) });
}

async fn rename(args: &RenameArgs, out: &mut Output) -> Result<(), Error> {
    let RenameArgs { old, new, buckets } = args;
    if old == new {
        return Err(Error::Usage(format!("`{old}` and `{new}` are the same name")));
    }
    let bucket = format!("{}_CONFIG", buckets.bucket_prefix);
    let (config, leases) = open(buckets).await?;
    let (current, revision) = match config.site().await.map_err(failed)? {
        SiteKey::Record(record, revision) => (record, revision),
        SiteKey::Missing => (SiteRecord::new(old), 0),
        SiteKey::Unreadable(why, _) => return Err(unreadable(&bucket, &why)),
    };
    let renamed = after(&current, old, new).map_err(|why| Error::Failed(format!("bucket `{bucket}`: {why}")))?;
    if current != renamed {
        keeps_ids(&config, &current.name, new).await?;
        check_none_runs(&leases, out).await?;
        config.put_site(&renamed, revision).await.map_err(failed)?;
    }
    show(&renamed, out);
    out.note(&format!("start every instance with `--name {new}` from now on"));
    Ok(())
}

async fn adopt(args: &AdoptArgs, out: &mut Output) -> Result<(), Error> {
    let AdoptArgs { installation, buckets } = args;
    let (config, leases) = open(buckets).await?;
    check_none_runs(&leases, out).await?;
    config.adopt(installation).await.map_err(failed)?;
    if out.json() {
        out.value(&serde_json::json!({ "installation": installation }));
    } else {
        out.line(&format!("installation {installation}"));
    }
    out.note("its durable consumers are used from the next start on");
    Ok(())
}

/// The record after the renaming.
fn after(current: &SiteRecord, old: &str, new: &str) -> Result<SiteRecord, String> {
    if current.name == old {
        return Ok(current.renamed(new));
    }
    if current.name != new {
        return Err(format!("it belongs to site `{}`, not to `{old}`", current.name));
    }
    let mut record = current.clone();
    if !record.former.iter().any(|former| former == old) {
        record.former.push(old.to_owned());
    }
    Ok(record)
}

/// A `name` in a document that is the site's is not part of the replication's id: ids must not change with the site.
async fn keeps_ids(config: &ConfigStore, old: &str, new: &str) -> Result<(), Error> {
    let mut changes = config.watch("site").await.map_err(failed)?;
    let mut changed = Vec::new();
    while let Some(change) = changes.next().await {
        match change.map_err(failed)? {
            ConfigChange::Put(entry) => {
                let document: Value = serde_json::from_slice(&entry.value).unwrap_or_default();
                if document_id(&document, old) != document_id(&document, new) {
                    changed.push(format!("`{}`", entry.key));
                }
            }
            ConfigChange::Loaded => break,
            _ => {}
        }
    }
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "the ids of replications {} would change, because the `name` in their documents is `{old}` or `{new}`: start an instance \
         as site `{old}`, remove a `name` that is `{old}` from the documents, and choose a site name that no document has",
        changed.join(", ")
    )))
}

/// A session that is not renewed within its time to live is that of a process that was killed.
async fn check_none_runs(leases: &LeaseStore, out: &mut Output) -> Result<(), Error> {
    let mut changes = leases.watch().await.map_err(failed)?;
    let mut silent: BTreeMap<String, SessionRecord> = BTreeMap::new();
    let (mut loaded, mut end) = (false, Instant::now());
    loop {
        let next = match loaded {
            true if silent.is_empty() => return Ok(()),
            true => timeout_at(end, changes.next()).await,
            false => Ok(changes.next().await),
        };
        let Ok(next) = next else { return Ok(()) };
        match next.ok_or_else(|| Error::Failed("the watch on the leases ended".to_owned()))?.map_err(failed)? {
            LeaseChange::Session { instance, record: Some(_), .. } if loaded => return Err(running(&[instance])),
            LeaseChange::Session { instance, record: Some(record), .. } => _ = silent.insert(instance, record),
            LeaseChange::Session { instance, record: None, .. } => _ = silent.remove(&instance),
            LeaseChange::Loaded => {
                loaded = true;
                let longest = silent.values().map(|record| record.ttl_ms).max().unwrap_or_default();
                end = Instant::now() + Duration::from_millis(longest);
                if longest > 0 {
                    let names: Vec<_> = silent.keys().map(|instance| format!("`{instance}`")).collect();
                    out.note(&format!("checking whether {} still runs: up to {longest} ms", names.join(", ")));
                }
            }
            LeaseChange::Lease { .. } | LeaseChange::Recreated => {}
        }
    }
}

fn running(instances: &[String]) -> Error {
    Error::Failed(format!("instance `{}` is running: stop all instances of the site first", instances.join("`, `")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_is_renamed_once_and_only_under_its_own_name() {
        let one = SiteRecord::new("ONE");
        let two = after(&one, "ONE", "TWO").unwrap();
        assert_eq!((two.name.as_str(), two.former.as_slice()), ("TWO", ["ONE".to_owned()].as_slice()));
        assert_eq!(after(&two, "ONE", "TWO"), Ok(two.clone()));
        // Copies from a time when nothing was written down.
        assert_eq!(after(&two, "ZERO", "TWO").unwrap().former, ["ONE", "ZERO"]);
        assert_eq!(after(&two, "THREE", "FOUR").unwrap_err(), "it belongs to site `TWO`, not to `THREE`");
    }
}
