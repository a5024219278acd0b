//! The state of each sender in sampling: one record per sender, written in bulk.
//!
//! There is one writer, the leader, and a lost or old record costs one extra copy at most. So records are written without
//! compare-and-swap, many at a time. The leader's writes carry a header that edits by hand do not have.

use std::{collections::BTreeMap, fmt, time::Duration};

use async_nats::{HeaderMap, Request, jetstream::consumer::DeliverPolicy};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use nats_lane::backoff::Backoff;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tracing::info;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{
    bucket::{Bucket, chain, is_marker},
    error::Error,
    live::{Live, LiveDelivery},
};
/// Format of the record that this program writes. It never overwrites a record of a newer format.
const VERSION: u32 = 1;
/// Writes that wait for their acks together.
const TOGETHER: usize = 512;
/// Time limit for the acks of writes that were sent together.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// Deadline for the creation of a consumer: then the watch ends, and the next one reads everything again.
const UNREACHABLE: Duration = Duration::from_secs(30);
/// Number of consumers in a row without a sign of life that ends a watch.
const UNANSWERED: u32 = 2;
/// How long no record may arrive during a load before the server is asked whether any is left.
const CHECK: Duration = Duration::from_secs(2);
/// Longest part of a key that is the sender itself.
const LONGEST: usize = 200;
/// Header of records that the program wrote, as opposed to edits by hand.
const WRITER: &str = "Replicator-Instance";

/// What sampling knows of one sender. Readable JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SenderRecord {
    /// Format of the record: 1.
    #[serde(default)]
    pub version: u32,
    /// The value that messages carry.
    pub sender: String,
    /// Stored time of its newest message, as last written: it is written again only when it has moved by a quarter of
    /// `warn_duration`.
    pub seen: DateTime<Utc>,
    /// Stored time of its message that was copied last; `null` if none was.
    #[serde(default)]
    pub copied: Option<DateTime<Utc>>,
    /// Bytes of that message's payload.
    #[serde(default)]
    pub size: u32,
    /// Whether its `timeout` advisory was published, and it has not been seen since.
    #[serde(default)]
    pub advised: bool,
    /// Source sequence of the message that was copied last; of an expired sender, up to where the source was read.
    #[serde(default)]
    pub sequence: u64,
    /// Source sequence of the message of an expired sender that was copied last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied_sequence: Option<u64>,
    /// Advisories about it that have not been confirmed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<PendingAdvisory>,
    /// Unseen for too long: kept only until its advisory is confirmed and none of its messages can be read again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
    /// Fields of other versions.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// An advisory that has not been confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingAdvisory {
    /// Kind of the change.
    pub event: String,
    /// When it was due.
    pub due: DateTime<Utc>,
    /// When the sender was seen before that.
    pub seen: DateTime<Utc>,
}

impl SenderRecord {
    /// Whether a newer program wrote it.
    pub fn is_newer(&self) -> bool {
        self.version > VERSION
    }

    /// A record of this program for a sender that was seen.
    pub fn new(sender: &str, seen: DateTime<Utc>) -> Self {
        Self {
            version: VERSION,
            sender: sender.to_owned(),
            seen,
            copied: None,
            size: 0,
            advised: false,
            sequence: 0,
            copied_sequence: None,
            pending: Vec::new(),
            expired: false,
            other: BTreeMap::new(),
        }
    }
}

/// Last part of the key whose marker means that all records were removed; no sender has it.
const EMPTIED: &str = "=";

/// What the watch reports.
#[derive(Debug, Clone, PartialEq)]
pub enum SenderChange {
    /// A record as it was there or was written now.
    Put {
        /// The record.
        record: Box<SenderRecord>,
        /// Whether it was written by hand.
        by_hand: bool,
    },
    /// A record was removed.
    Removed {
        /// Last part of its key.
        token: String,
        /// Whether somebody did it by hand.
        by_hand: bool,
    },
    /// All records were removed at once.
    Emptied,
    /// All records that were there have been delivered.
    Loaded,
    /// The entry at a key is no record of its sender.
    Unreadable {
        /// The key.
        key: String,
        /// What is wrong.
        message: String,
    },
}

/// Changes of records with their revisions; the first error ends them.
pub type SenderChanges = BoxStream<'static, Result<(u64, SenderChange), Error>>;

/// The bucket of senders.
#[derive(Debug, Clone)]
pub struct SenderStore {
    bucket: Bucket,
    instance: String,
}

/// Where records of senders are written: their bucket, or its replacement in a simulation.
pub trait SenderWrites: fmt::Debug + Send + Sync {
    /// Writes records, or removes what is `None`, and waits until all of it is stored. After an error any part of it may
    /// be: all of it can be written again.
    fn write_all<'a>(
        &'a self,
        replication: &'a str,
        writes: &'a [(String, Option<SenderRecord>)],
    ) -> BoxFuture<'a, Result<(), Error>>;
}

impl SenderWrites for SenderStore {
    fn write_all<'a>(
        &'a self,
        replication: &'a str,
        writes: &'a [(String, Option<SenderRecord>)],
    ) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            for part in writes.chunks(TOGETHER) {
                self.write_together(replication, part).await?;
            }
            Ok(())
        }
        .boxed()
    }
}

impl SenderStore {
    /// The marker of a removed record goes by itself after this, where the bucket allows that: whoever follows has seen
    /// it by then.
    pub(super) const MARKER_TTL: Duration = Duration::from_secs(3600);

    pub(super) async fn open(bucket: Bucket, instance: &str) -> Result<Self, Error> {
        Ok(Self { bucket, instance: instance.to_owned() })
    }

    async fn write_together(&self, id: &str, writes: &[(String, Option<SenderRecord>)]) -> Result<(), Error> {
        let client = self.bucket.client();
        let failed = |what: &dyn std::error::Error| self.bucket.error(format!("cannot be written: {}", chain(what)));
        let inbox = client.new_inbox();
        let mut acks = client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
        for (sender, record) in writes {
            let (headers, value) = match record {
                Some(record) => {
                    let mut headers = HeaderMap::new();
                    headers.insert(WRITER, self.instance.as_str());
                    (headers, Bytes::from(serde_json::to_vec(record).map_err(|error| failed(&error))?))
                }
                None => (self.marker(), Bytes::new()),
            };
            let subject = self.bucket.put_subject(&format!("{id}.{}", token(sender)));
            let published = client.publish_with_reply_and_headers(subject, inbox.clone(), headers, value).await;
            published.map_err(|error| failed(&error))?;
        }
        for _ in writes {
            let ack = timeout(ACK_WAIT, acks.next()).await;
            let Ok(Some(ack)) = ack else { return Err(self.bucket.error("cannot be written: no answer in time")) };
            self.bucket.check_ack(&ack)?;
        }
        let _ = acks.unsubscribe().await;
        Ok(())
    }

    /// All records of a replication as they are, then every change, until something breaks. Begun again, it tells all
    /// from the beginning.
    pub async fn watch(&self, replication: &str) -> Result<SenderChanges, Error> {
        let purpose = format!("senders_{:016x}", xxh3_64(replication.as_bytes()));
        let keys = format!("{replication}.*");
        let live = Live::open(&self.bucket, &purpose, &keys, DeliverPolicy::All, LiveDelivery::Pull).await?;
        let mut recreations = self.bucket.recreations();
        recreations.mark_unchanged();
        let prefix = self.bucket.subject(&format!("{replication}."));
        let to_load = live.pending;
        let records = SenderFeed {
            bucket: self.bucket.clone(),
            live,
            seen: 0,
            delivered: 0,
            to_load: Some(to_load),
            unanswered: 0,
            prefix,
        };
        let stream = futures_util::stream::unfold(Some((recreations, records)), |following| async {
            let (mut recreations, mut records) = following?;
            let change = tokio::select! {
                biased;
                // Revisions restart.
                Ok(()) = recreations.changed() => Err(records.bucket.error("was recreated")),
                change = records.next() => change,
            };
            let rest = change.is_ok().then_some((recreations, records));
            Some((change, rest))
        });
        Ok(stream.boxed())
    }

    /// How often the bucket was recreated while this process had it open.
    pub(crate) fn recreations(&self) -> u64 {
        *self.bucket.recreations().borrow()
    }

    /// Revision of the newest record of a replication, read from the leader; 0 if there is none.
    pub async fn newest(&self, replication: &str) -> Result<u64, Error> {
        Ok(self.bucket.last_matching(&format!("{replication}.*")).await?.map_or(0, |stored| stored.revision))
    }

    /// Removes all records of a replication, for others to come; whoever follows hears of it.
    pub async fn empty(&self, replication: &str) -> Result<(), Error> {
        self.bucket.forget_matching(&format!("{replication}.*"), None).await?;
        let subject = self.bucket.put_subject(&format!("{replication}.{EMPTIED}"));
        let acked =
            self.bucket.client().send_request(subject, Request::new().headers(self.marker()).timeout(Some(ACK_WAIT)));
        let ack = acked.await.map_err(|error| self.bucket.error(format!("cannot be written: {}", chain(&error))))?;
        self.bucket.check_ack(&ack)
    }

    /// Headers of what is left of a removed record.
    fn marker(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(WRITER, self.instance.as_str());
        headers.insert("KV-Operation", "DEL");
        if self.bucket.takes_ttl() {
            headers.insert("Nats-TTL", Self::MARKER_TTL.as_secs().to_string().as_str());
        }
        headers
    }

    /// Forgets what was written of senders of a replication up to and with a revision, without a trace.
    pub async fn remove(&self, replication: &str, revision: u64) -> Result<(), Error> {
        self.bucket.forget_matching(&format!("{replication}.*"), Some(revision)).await
    }
}

/// A watch under way.
struct SenderFeed {
    bucket: Bucket,
    live: Live,
    /// Newest revision that was read.
    seen: u64,
    /// Messages that were delivered since the watch began.
    delivered: u64,
    /// Deliveries left of the records that existed when the watch began; `None` after the last. A record that is written
    /// again meanwhile is delivered at its new revision, after all of these.
    to_load: Option<u64>,
    /// Consumers in a row that gave no sign of life.
    unanswered: u32,
    prefix: String,
}

impl SenderFeed {
    /// Continues after the last revision that was read: no record is read twice, however often that is needed. Errors of a
    /// server that has just started are transient.
    async fn resume(&mut self) -> Result<(), Error> {
        self.unanswered = if self.live.answered { 0 } else { self.unanswered + 1 };
        if self.unanswered >= UNANSWERED {
            let subject = self.bucket.pull_subject("*");
            let message = format!("cannot be read: nothing answers; may the user publish to `{subject}`?");
            return Err(self.bucket.error(message));
        }
        let since = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        loop {
            match self.live.resume(self.seen).await {
                Err(_) if since.elapsed() < UNREACHABLE => sleep(backoff.next(rand::random())).await,
                resumed => {
                    resumed?;
                    self.to_load = self.to_load.map(|left| left.min(self.live.pending));
                    return Ok(());
                }
            }
        }
    }

    async fn next(&mut self) -> Result<(u64, SenderChange), Error> {
        let message = loop {
            if self.to_load.is_some_and(|left| left == 0 || self.live.pending == 0) {
                self.to_load = None;
                let (keys, delivered) = (self.prefix.as_str(), self.delivered);
                info!(keys, delivered, "all records of senders were read");
                return Ok((0, SenderChange::Loaded));
            }
            // A load has no deadline: a million records over a slow line take long.
            let limit = if self.to_load.is_some() { CHECK } else { Duration::MAX };
            match timeout(limit, self.live.next()).await {
                Ok(Some((delivery, message))) => {
                    self.seen = delivery.stream_seq;
                    self.delivered += 1;
                    self.to_load = self.to_load.map(|left| left.saturating_sub(1));
                    break message;
                }
                Ok(None) => self.resume().await?,
                Err(_) if self.live.is_through().await => self.to_load = Some(0),
                Err(_) => {}
            }
        };
        let revision = self.seen;
        let headers = message.headers.as_ref();
        let by_hand = !headers
            .is_some_and(|headers| headers.get(WRITER).is_some() || headers.get("Nats-Marker-Reason").is_some());
        let found = message.subject.strip_prefix(self.prefix.as_str()).unwrap_or_default().to_owned();
        if found == EMPTIED {
            return Ok((revision, SenderChange::Emptied));
        }
        if headers.is_some_and(is_marker) {
            return Ok((revision, SenderChange::Removed { token: found, by_hand }));
        }
        let unreadable = |message: String| SenderChange::Unreadable { key: found.clone(), message };
        let change = match serde_json::from_slice::<Box<SenderRecord>>(&message.payload) {
            Ok(record) if token(&record.sender) == found => SenderChange::Put { record, by_hand },
            Ok(record) => unreadable(format!("its `sender` is `{}`, which belongs to another key", record.sender)),
            Err(error) => unreadable(error.to_string()),
        };
        Ok((revision, change))
    }
}

/// A sender as one token of a key: letters, digits, `-`, `_` and `/` as they are, every other byte as `=` and two digits.
/// A sender that is too long ends in a hash instead.
pub fn token(sender: &str) -> String {
    let mut token = String::with_capacity(sender.len() + 8);
    for byte in sender.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'/' => token.push(char::from(byte)),
            _ => token.push_str(&format!("={byte:02X}")),
        }
    }
    if token.len() > LONGEST {
        token.truncate(LONGEST - 34);
        // Two in a row stand in no other token.
        token.push_str(&format!("=={:032x}", xxh3_128(sender.as_bytes())));
    }
    token
}

/// The hash in the key of a sender that is too long for it.
pub fn hash(sender: &str) -> Option<u128> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_/".contains(&byte);
    let length: usize = sender.bytes().map(|byte| if plain(byte) { 1 } else { 3 }).sum();
    (length > LONGEST).then(|| xxh3_128(sender.as_bytes()))
}

/// The same by the part of the key.
pub fn hash_of_token(token: &str) -> Option<u128> {
    u128::from_str_radix(token.rsplit_once("==")?.1, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn any_sender_is_one_token_of_its_own() {
        let check = |sender: &str, expect: &str| assert_eq!(token(sender), expect);
        check("n1", "n1");
        check("n1.example.net", "n1=2Eexample=2Enet");
        check("a b*>=", "a=20b=2A=3E=3D");
        check("\u{e9}", "=C3=A9");
        let long = "x.".repeat(512);
        let senders =
            [long.clone(), long[1..].to_owned(), format!("{long}y"), "a.b".into(), "a=2Eb".into(), "=".into()];
        let tokens: HashSet<_> = senders.iter().map(|sender| token(sender)).collect();
        assert_eq!(tokens.len(), senders.len());
        assert!(senders.iter().all(|sender| hash(sender) == hash_of_token(&token(sender))));
        assert!(hash(&long).is_some() && hash(&"x".repeat(LONGEST)).is_none());
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=".contains(&byte);
        assert!(tokens.iter().all(|token| token.len() <= LONGEST && token.bytes().all(legal)));
    }

    #[test]
    fn fields_of_other_versions_are_kept() {
        let json = serde_json::json!({
            "version": 2, "sender": "a", "seen": "2026-01-02T03:04:05.123456789Z", "copied": null, "size": 5,
            "advised": false, "sequence": 6, "later": [1]
        });
        let record: SenderRecord = serde_json::from_value(json.clone()).unwrap();
        assert!(record.is_newer());
        assert_eq!(serde_json::to_value(&record).unwrap(), json);
    }
}
