//! Maintains the buckets while the service runs: one that was deleted is recreated as it was, and everything that
//! depends on its stream is notified. Its entries are written again by their watches, see `watch.rs`.

use std::{convert::Infallible, time::Duration};

use async_nats::jetstream::{
    self,
    stream::{Config, Info},
};
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::{
    bucket::{self, Bucket, chain},
    buckets::OwnStreams,
    watch::RECREATED,
};
use crate::chance;

/// How often each bucket is looked for.
const EVERY: Duration = Duration::from_secs(1);
/// Who deletes a bucket to make or restore it himself has this long.
const MISSING_FOR: Duration = Duration::from_secs(2);
/// Metadata of the configuration bucket: what identifies the installation, where the bucket is not its first one.
pub(super) const INSTALLATION: &str = "stream-replicator.installation";
/// Metadata that is the server's.
const OF_SERVER: &str = "_nats.";

/// What there is to say of the buckets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// This instance recreated a bucket that was deleted.
    Recreated {
        /// Name of the bucket.
        bucket: String,
    },
    /// Why a bucket cannot be used now; `None` if all of them can.
    Usable(Option<String>),
}

/// Maintains the buckets of one installation.
#[derive(Debug)]
pub struct Keeper {
    context: jetstream::Context,
    kept: Vec<KeptBucket>,
    streams: OwnStreams,
}

/// One bucket.
#[derive(Debug)]
struct KeptBucket {
    bucket: Bucket,
    /// As it was last seen, with what identifies the installation.
    config: Config,
    created_ns: i128,
    missing_since: Option<Instant>,
    /// What is wrong, as it was logged.
    logged: Option<String>,
}

impl Keeper {
    /// For these buckets, as they are now. The first one is that of the configuration.
    pub(super) fn new(
        context: jetstream::Context,
        buckets: Vec<(Bucket, Info)>,
        streams: OwnStreams,
        installation: String,
    ) -> Self {
        let kept = |(bucket, info): (Bucket, Info)| {
            let created_ns = info.created.unix_timestamp_nanos();
            streams.is(&info.config.name, created_ns);
            KeptBucket { bucket, config: info.config, created_ns, missing_since: None, logged: None }
        };
        let mut kept: Vec<_> = buckets.into_iter().map(kept).collect();
        if let Some(first) = kept.first_mut() {
            first.config.metadata.insert(INSTALLATION.to_owned(), installation);
        }
        Self { context, kept, streams }
    }

    /// Maintains them forever, and logs changes.
    pub async fn keep(mut self, mut say: impl FnMut(Condition)) -> Infallible {
        loop {
            let Self { context, kept, streams } = &mut self;
            let looks = join_all(kept.iter_mut().map(|kept| kept.look(context, streams))).await;
            let mut problem = None;
            for (look, kept) in looks.into_iter().zip(&self.kept) {
                match look {
                    Ok(true) => say(Condition::Recreated { bucket: kept.bucket.bucket_name().to_owned() }),
                    Ok(false) => {}
                    Err(why) => _ = problem.get_or_insert(why),
                }
            }
            say(Condition::Usable(problem));
            sleep(EVERY).await;
        }
    }
}

impl KeptBucket {
    /// Whether the bucket was recreated just now, by us; an error if it cannot be used.
    async fn look(&mut self, context: &jetstream::Context, streams: &OwnStreams) -> Result<bool, String> {
        let result = self.check(context, streams).await;
        let name = self.bucket.bucket_name();
        let result = result.map_err(|why| format!("bucket `{name}` {why}"));
        match &result {
            Ok(_) if self.logged.take().is_some() => info!(bucket = name, "the bucket can be used again"),
            Err(why) if self.logged.as_ref() != Some(why) => {
                warn!("{why}");
                self.logged = Some(why.clone());
            }
            _ => {}
        }
        result
    }

    async fn check(&mut self, context: &jetstream::Context, streams: &OwnStreams) -> Result<bool, String> {
        let name = self.bucket.bucket_name().to_owned();
        if let Some(info) = bucket::look(context, &name).await? {
            self.saw(info, streams);
            return Ok(false);
        }
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < MISSING_FOR {
            return Err("does not exist: it was deleted".to_owned());
        }
        let mark = chance::name();
        let created = context.create_stream(self.as_it_was(&mark)).await;
        // Another instance may have been faster, or the answer was lost.
        let Some(info) = bucket::look(context, &name).await? else {
            let why = created.err().map_or_else(|| "it is gone again".to_owned(), |error| chain(&error));
            return Err(format!("was deleted and cannot be created again: {why}"));
        };
        let ours = info.config.metadata.get(RECREATED) == Some(&mark);
        if ours {
            warn!(bucket = name, "the bucket was deleted; it was recreated, and its known content is written again");
        }
        self.saw(info, streams);
        Ok(ours)
    }

    /// The configuration of the bucket that is gone.
    fn as_it_was(&self, mark: &str) -> Config {
        let mut config = self.config.clone();
        config.metadata.retain(|key, _| !key.starts_with(OF_SERVER));
        config.metadata.insert(RECREATED.to_owned(), mark.to_owned());
        config
    }

    fn saw(&mut self, info: Info, streams: &OwnStreams) {
        self.missing_since = None;
        let installation = self.config.metadata.get(INSTALLATION).cloned();
        self.config = info.config;
        if let Some(installation) = installation {
            self.config.metadata.insert(INSTALLATION.to_owned(), installation);
        }
        let created_ns = info.created.unix_timestamp_nanos();
        if created_ns != self.created_ns {
            self.created_ns = created_ns;
            streams.is(&self.config.name, created_ns);
            self.bucket.was_recreated();
        }
    }
}
