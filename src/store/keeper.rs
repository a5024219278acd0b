//! Maintains the buckets while the service runs: one that was deleted is recreated as it was, and everything that
//! depends on its stream is notified. Its entries are written again by their watches, see `watch.rs`.

use std::{convert::Infallible, time::Duration};

use async_nats::jetstream::{
    self,
    stream::{Config, DiscardPolicy, Info},
};
use futures_util::future::join_all;
use nats_lane::entropy;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{
    SenderStore,
    bucket::{self, Bucket, INSTALLATION, RECREATED, chain},
    own_streams::OwnStreams,
};
/// How often each bucket is checked.
const EVERY: Duration = Duration::from_secs(1);
/// How long a bucket must be missing before it is recreated: an operator may delete it to create or restore it himself.
const MISSING_FOR: Duration = Duration::from_secs(2);
/// A change of a bucket that failed is tried again after this.
const TRY_AGAIN: Duration = Duration::from_secs(300);
/// Prefix of metadata that the server sets.
const OF_SERVER: &str = "_nats.";

/// The condition of the buckets.
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
    /// How long markers of deletions are to be kept, where the server can end them.
    markers: Option<Duration>,
    /// When that is tried to be set for the bucket as it is; `None` once it was.
    next_try: Option<Instant>,
}

impl Keeper {
    /// For these buckets, as they are now. The first one is that of the configuration, the last one that of senders.
    pub(super) fn new(
        context: jetstream::Context,
        buckets: Vec<(Bucket, Info)>,
        streams: OwnStreams,
        installation: String,
    ) -> Self {
        let senders = buckets.last().map(|(_, info)| info.config.name.clone()).unwrap_or_default();
        let kept = |(bucket, info): (Bucket, Info)| {
            let created_ns = info.created.unix_timestamp_nanos();
            streams.is(&info.config.name, created_ns);
            bucket.is_configured(&info.config);
            let markers = (info.config.name == senders).then_some(SenderStore::MARKER_TTL);
            let config = info.config;
            KeptBucket {
                bucket,
                config,
                created_ns,
                missing_since: None,
                logged: None,
                markers,
                next_try: Some(Instant::now()),
            }
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
            let checks = join_all(kept.iter_mut().map(|kept| kept.check_and_log(context, streams))).await;
            let mut problem = None;
            for (result, kept) in checks.into_iter().zip(&self.kept) {
                match result {
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
    async fn check_and_log(&mut self, context: &jetstream::Context, streams: &OwnStreams) -> Result<bool, String> {
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
        if let Some(info) = bucket::find_stream(context, &name).await? {
            self.saw(info, streams);
            self.end_markers().await;
            return unfit(&self.config, &name).map_or(Ok(false), Err);
        }
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < MISSING_FOR {
            return Err("does not exist: it was deleted".to_owned());
        }
        let mark = entropy::name();
        let created = context.create_stream(self.as_it_was(&mark)).await;
        // Another instance may have been faster, or the answer was lost.
        let Some(info) = bucket::find_stream(context, &name).await? else {
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
        self.bucket.is_configured(&self.config);
        if let Some(installation) = installation {
            self.config.metadata.insert(INSTALLATION.to_owned(), installation);
        }
        let created_ns = info.created.unix_timestamp_nanos();
        if created_ns != self.created_ns {
            self.created_ns = created_ns;
            streams.is(&self.config.name, created_ns);
            self.bucket.was_recreated();
            self.next_try = Some(Instant::now());
        }
    }

    /// A bucket that was created by hand keeps markers of deletions forever: sets that they end, once for each bucket. A
    /// server before 2.11 accepts that and does not do it.
    async fn end_markers(&mut self) {
        let due = self.next_try.is_some_and(|at| at <= Instant::now());
        let Some(markers) = self.markers.filter(|_| due && !self.config.allow_message_ttl) else { return };
        let name = self.bucket.bucket_name().to_owned();
        let changed = self
            .bucket
            .reconfigure(|config| {
                config.insert("allow_msg_ttl".to_owned(), true.into());
                config.insert("subject_delete_marker_ttl".to_owned(), (markers.as_nanos() as u64).into());
            })
            .await;
        match changed {
            Ok(()) => {
                self.next_try = None;
                debug!(bucket = name, "markers of deletions end from now on, where the server can do it");
            }
            Err(error) => {
                self.next_try = Some(Instant::now() + TRY_AGAIN);
                warn!(
                    bucket = name,
                    "markers of deletions stay in the bucket, which grows: allow the service to update the stream \
                     `{}`: {error}",
                    self.config.name
                );
            }
        }
    }
}

/// Why a bucket would lose entries, and how to correct that.
fn unfit(config: &Config, bucket: &str) -> Option<String> {
    let stream = &config.name;
    let bounded = [config.max_messages, config.max_bytes].iter().any(|most| *most > 0);
    if !config.max_age.is_zero() {
        return Some(format!(
            "removes its entries after {:?} (`max_age`): set it to 0, `nats stream edit {stream} --max-age=0s`",
            config.max_age
        ));
    }
    if bounded && config.discard != DiscardPolicy::New {
        return Some(format!(
            "removes its oldest entries when it is full (`discard: old`): `nats stream edit {stream} --discard=new`"
        ));
    }
    let keys = format!("$KV.{bucket}.>");
    if !config.subjects.contains(&keys) {
        return Some(format!("does not listen on `{keys}`: delete it, and it is created again as it should be"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_that_loses_entries_is_named_with_what_to_do() {
        let good = Config {
            name: "KV_B".to_owned(),
            subjects: vec!["$KV.B.>".to_owned()],
            discard: DiscardPolicy::New,
            max_bytes: 1 << 20,
            max_messages_per_subject: 1,
            ..Config::default()
        };
        assert_eq!(unfit(&good, "B"), None);
        // Unbounded, nothing is discarded.
        assert_eq!(unfit(&Config { discard: DiscardPolicy::Old, max_bytes: -1, ..good.clone() }, "B"), None);
        let says = |config: Config, text: &str| {
            let why = unfit(&config, "B").unwrap_or_default();
            assert!(why.contains(text), "{why:?} does not contain {text:?}");
        };
        says(Config { max_age: Duration::from_secs(60), ..good.clone() }, "--max-age=0s");
        says(Config { discard: DiscardPolicy::Old, ..good.clone() }, "--discard=new");
        says(Config { subjects: vec!["$KV.A.>".to_owned()], ..good }, "`$KV.B.>`");
    }
}
