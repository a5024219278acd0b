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
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::{
    bucket::{Bucket, chain, is_marker},
    error::Error,
    live::Live,
};
/// Format of the record that this program writes. It never overwrites a record of a newer format.
const VERSION: u32 = 1;
/// Writes that wait for their acks together.
const TOGETHER: usize = 512;
/// Time limit for the acks of writes that were sent together.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// Silence that ends the first read.
const SILENCE: Duration = Duration::from_secs(5);
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
    /// Source sequence of the message that was copied last.
    #[serde(default)]
    pub sequence: u64,
    /// Advisories about it that have not been confirmed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<PendingAdvisory>,
    /// Unseen for too long: kept only until its advisory is confirmed.
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
        let live = Live::open(&self.bucket, &purpose, &format!("{replication}.*"), DeliverPolicy::All).await?;
        let mut recreations = self.bucket.recreations();
        recreations.mark_unchanged();
        let following = Following {
            bucket: self.bucket.clone(),
            recreations,
            loading: true,
            pending: live.pending,
            live,
            seen: 0,
            prefix: self.bucket.subject(&format!("{replication}.")),
        };
        let stream = futures_util::stream::unfold(Some(following), |following| async {
            let mut following = following?;
            match following.next().await {
                Ok(change) => Some((Ok(change), Some(following))),
                Err(error) => Some((Err(error), None)),
            }
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
struct Following {
    bucket: Bucket,
    /// Changes when the bucket was recreated: revisions begin again.
    recreations: watch::Receiver<u64>,
    live: Live,
    /// Newest revision that was read.
    seen: u64,
    loading: bool,
    /// Messages that were there when it began and are not delivered yet.
    pending: u64,
    prefix: String,
}

impl Following {
    /// Continues after what was read. For a while an error is one of a server that has just started.
    async fn resume(&mut self) -> Result<(), Error> {
        let since = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        loop {
            match self.live.resume(self.seen).await {
                Err(_) if since.elapsed() < SILENCE => sleep(backoff.next(rand::random())).await,
                resumed => return resumed,
            }
        }
    }

    async fn next(&mut self) -> Result<(u64, SenderChange), Error> {
        if self.loading && self.pending == 0 {
            self.loading = false;
            return Ok((0, SenderChange::Loaded));
        }
        let message = loop {
            let limit = if self.loading { SILENCE } else { Duration::MAX };
            let message = tokio::select! {
                biased;
                Ok(()) = self.recreations.changed() => return Err(self.bucket.error("was recreated")),
                message = timeout(limit, self.live.next()) => {
                    message.map_err(|_| self.bucket.error("cannot be read: no more comes"))?
                }
            };
            match message {
                Some((delivery, message)) => {
                    (self.seen, self.pending) = (delivery.stream_seq, delivery.pending);
                    break message;
                }
                None if self.loading => return Err(self.bucket.error("cannot be read: the consumer was lost")),
                None => self.resume().await?,
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
