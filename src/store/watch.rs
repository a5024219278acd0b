//! The watch on a bucket: one stream of changes that outlives server restarts, lost consumers and a recreated bucket.
//!
//! A consumer that is lost is replaced by one that continues after the last sequence that was seen: it never delivers a
//! purge without a marker, or writes to a recreated bucket. So each time the watch is opened, and when the state of the
//! stream shows that it fell behind, everything is read and compared with what was reported.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use async_nats::{
    Message,
    jetstream::{consumer::DeliverPolicy, stream},
};
use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::{
    FutureExt, StreamExt,
    future::join_all,
    stream::{BoxStream, unfold},
};
use nats_lane::{backoff::Backoff, jetstream::Delivery};
use tokio::{
    sync::watch as watch_channel,
    time::{Instant, sleep_until, timeout},
};

use super::{
    bucket::{Bucket, PutError, RECREATED, Stored, is_marker},
    error::Error,
    live::{Live, LiveDelivery},
};

/// How often the stream is checked.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Silence that ends the first read.
const SNAPSHOT_SILENCE: Duration = Duration::from_secs(5);
/// A watch that was lost is opened again within this time, or that is an error.
const LOST: Duration = Duration::from_secs(5);

/// Writes that wait for their answers together.
const PUTS: usize = 64;

/// What the watch reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A key was written, or was there when the watch began.
    Put {
        /// The key.
        key: String,
        /// Its revision.
        revision: u64,
        /// As written.
        value: Bytes,
        /// How long ago it was written, by the clock of the server that stored it.
        age: Duration,
    },
    /// A key was deleted or purged.
    Deleted {
        /// The key.
        key: String,
        /// Revision of the deletion.
        revision: u64,
    },
    /// The bucket was recreated or restored: its revisions cannot be compared with those of before. Its entries follow.
    Recreated,
    /// Everything that was there when the watch began has been delivered.
    Loaded,
}

/// Changes of a bucket, forever.
pub type Changes = BoxStream<'static, Result<Change, Error>>;

/// Opens the watch; fails if the bucket cannot be read now. `purpose` is one word, another one for each watch of a
/// bucket in a process. Of entries that are read together, the keys that are `first` are delivered before all others.
///
/// The stream never ends. An error is delivered once and is transient: the changes that happened meanwhile follow, and
/// nothing else.
pub(super) async fn watch(bucket: Bucket, purpose: &str, first: fn(&str) -> bool) -> Result<Changes, Error> {
    let recreations = bucket.recreations();
    let mut watch = Watch {
        bucket,
        purpose: purpose.to_owned(),
        first,
        live: None,
        lost: None,
        delivered: HashMap::new(),
        seen: 0,
        checked: None,
        next_check: Instant::now() + CHECK_EVERY,
        queue: VecDeque::new(),
        backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
        failing: false,
        recreations,
        recreation: None,
        clock: None,
    };
    watch.open().await?;
    watch.queue.push_back(Ok(Change::Loaded));
    Ok(unfold(watch, |mut watch| async { Some((watch.next().await, watch)) }).boxed())
}

struct Watch {
    bucket: Bucket,
    purpose: String,
    first: fn(&str) -> bool,
    /// Changes as they happen; `None` when it has to be opened.
    live: Option<Live>,
    /// The consumer that is to be replaced, and since when; `None` where everything has to be read.
    lost: Option<(Live, Instant)>,
    /// The entry that was delivered last for each key that has a value.
    delivered: HashMap<String, Delivered>,
    /// Newest revision of all keys that was seen.
    seen: u64,
    /// The stream at the last check.
    checked: Option<StreamCheck>,
    next_check: Instant,
    /// Read and not yet delivered.
    queue: VecDeque<Result<Change, Error>>,
    backoff: Backoff,
    /// The current error was delivered.
    failing: bool,
    /// Changes when the bucket was recreated.
    recreations: watch_channel::Receiver<u64>,
    /// What the metadata of the bucket said of its last recreation.
    recreation: Option<String>,
    /// The server's time, and when it was reported; `None` where it reports none.
    clock: Option<(DateTime<Utc>, Instant)>,
}

/// The last value of a key.
struct Delivered {
    revision: u64,
    value: Bytes,
}

impl Watch {
    async fn next(&mut self) -> Result<Change, Error> {
        loop {
            if let Some(change) = self.queue.pop_front() {
                return change;
            }
            match self.live.take() {
                Some(live) => self.live = self.follow(live).await,
                None => self.reopen().await,
            }
        }
    }

    /// Waits for a change or finds that the consumer is of no more use.
    async fn follow(&mut self, mut live: Live) -> Option<Live> {
        loop {
            tokio::select! {
                message = live.next() => {
                    let Some((delivery, message)) = message else {
                        self.lost = Some((live, Instant::now()));
                        return None;
                    };
                    let (key, stored) = read(&self.bucket, delivery, &message)?;
                    self.deliver(key, stored, self.age(delivery.time_ns), self.seen);
                    if !self.queue.is_empty() {
                        return Some(live);
                    }
                }
                // The stream is another one, and its consumer is gone with the one before.
                Ok(()) = self.recreations.changed() => return None,
                _ = sleep_until(self.next_check) => {
                    self.next_check = Instant::now() + CHECK_EVERY;
                    // while the server does not answer there is nothing to compare with
                    let Ok(info) = self.info().await else { continue };
                    let look = StreamCheck::new(&info);
                    if look.behind(self.checked, self.seen) {
                        // Compared again by who reads everything: whether it is another stream.
                        return None;
                    }
                    self.checked = Some(look);
                }
            }
        }
    }

    async fn reopen(&mut self) {
        let opened = match self.lost.take() {
            Some((live, since)) => self.resume(live, since).await,
            None => self.open().await,
        };
        match opened {
            Ok(()) => {
                self.backoff.reset();
                self.failing = false;
            }
            Err(error) => {
                if self.lost.is_none() && !std::mem::replace(&mut self.failing, true) {
                    self.queue.push_back(Err(error));
                }
                tokio::time::sleep(self.backoff.next(rand::random())).await;
            }
        }
    }

    /// Continues after what was seen, if this is the same bucket. For a while an error is one of a server that has just
    /// started.
    async fn resume(&mut self, mut live: Live, since: Instant) -> Result<(), Error> {
        let resumed = async {
            let look = StreamCheck::new(&self.info().await?);
            let same = !look.is_another(self.checked, self.seen);
            if same {
                live.resume(self.seen).await?;
            }
            Ok(same)
        };
        match resumed.await {
            Ok(true) => {
                self.live = Some(live);
                Ok(())
            }
            Ok(false) => self.open().await,
            Err(error) => {
                self.lost = (since.elapsed() < LOST).then_some((live, since));
                Err(error)
            }
        }
    }

    /// Reads everything, delivers the differences to the last delivery, and follows from there.
    async fn open(&mut self) -> Result<(), Error> {
        let mut before = self.info().await?;
        if self.put_back(&before).await? {
            before = self.info().await?;
        }
        let (live, newest, mut snapshot) = snapshot(&self.bucket, &self.purpose).await?;
        let last = before.state.last_sequence;
        // The consumer may live on a server that has less of the bucket than its leader.
        if newest < last
            && let Some(missed) = self.bucket.next_of_any(newest + 1).await?
            && missed <= last
        {
            let reason = format!("read up to revision {newest}, but the leader has {missed}: a server has to catch up");
            return Err(self.bucket.error(reason));
        }
        snapshot.sort_by_key(|(key, ..)| !(self.first)(key));
        let there: HashSet<_> = snapshot.iter().map(|(key, ..)| key).collect();
        let gone: Vec<_> = self.delivered.keys().filter(|key| !there.contains(key)).cloned().collect();
        if StreamCheck::new(&before).is_another(self.checked, self.seen) {
            self.seen = 0;
            self.delivered.values_mut().for_each(|delivered| delivered.revision = 0);
            self.queue.push_back(Ok(Change::Recreated));
        }
        let known = self.seen;
        for (key, stored, time_ns) in snapshot {
            self.deliver(key, stored, self.age(time_ns), known);
        }
        self.seen = self.seen.max(last);
        for key in gone {
            // no marker, so the revision is not known exactly: it was gone by the time of this one
            self.deliver(key, Stored { revision: self.seen, value: None }, Duration::ZERO, known);
        }
        self.checked = Some(StreamCheck::new(&before));
        self.recreation = recreation(&before).cloned();
        self.live = Some(live);
        Ok(())
    }

    /// Writes known entries again into a bucket that was deleted and that an instance recreated, unless their keys exist.
    /// Every watch does so before it looks for deleted keys, so that no instance takes a part of the entries for all. A
    /// bucket that an operator recreated or restored counts as it is. Returns whether entries were written.
    async fn put_back(&self, info: &stream::Info) -> Result<bool, Error> {
        let recreation = recreation(info);
        let news = recreation.is_some() && recreation != self.recreation.as_ref();
        if self.checked.is_none() || !news || !StreamCheck::new(info).is_another(self.checked, self.seen) {
            return Ok(false);
        }
        let known: Vec<_> =
            self.delivered.iter().map(|(key, delivered)| (key.clone(), delivered.value.clone())).collect();
        for some in known.chunks(PUTS) {
            let puts: Vec<_> = some.iter().map(|(key, value)| self.bucket.put(key, value.clone(), 0).boxed()).collect();
            for put in join_all(puts).await {
                match put {
                    Ok(_) | Err(PutError::Conflict) => {}
                    Err(PutError::Refused(error) | PutError::Unknown(error)) => return Err(error),
                }
            }
        }
        Ok(true)
    }

    /// The stream as its leader sees it now; notes the leader's time.
    async fn info(&mut self) -> Result<stream::Info, Error> {
        let (info, time) = self.bucket.info_and_time().await?;
        self.clock = time.map(|time| (time, Instant::now()));
        Ok(info)
    }

    /// How long ago something was stored.
    fn age(&self, time_ns: i64) -> Duration {
        let age = self.clock.map(|(time, at)| {
            let stored = DateTime::from_timestamp_nanos(time_ns);
            (time - stored) + TimeDelta::from_std(at.elapsed()).unwrap_or_default()
        });
        age.and_then(|age| age.to_std().ok()).unwrap_or_default()
    }

    /// Queues a change, unless it was delivered. A deletion after the last `known` revision is delivered for a key that
    /// was never there, too: its caller waits for it.
    fn deliver(&mut self, key: String, stored: Stored, age: Duration, known: u64) {
        let revision = stored.revision;
        let news = revision > known;
        self.seen = self.seen.max(revision);
        match stored.value {
            Some(_) if self.delivered.get(&key).is_some_and(|delivered| delivered.revision == revision) => {}
            Some(value) => {
                self.delivered.insert(key.clone(), Delivered { revision, value: value.clone() });
                self.queue.push_back(Ok(Change::Put { key, revision, value, age }));
            }
            None if self.delivered.remove(&key).is_some() || news => {
                self.queue.push_back(Ok(Change::Deleted { key, revision }));
            }
            None => {}
        }
    }
}

/// The value that the last recreation by an instance left in the metadata of a bucket.
fn recreation(info: &stream::Info) -> Option<&String> {
    info.config.metadata.get(RECREATED)
}

/// The consumer, the newest revision that it had, and the last revision of every key with its stored time.
async fn snapshot(bucket: &Bucket, purpose: &str) -> Result<(Live, u64, Vec<(String, Stored, i64)>), Error> {
    let mut live = Live::open(bucket, purpose, ">", DeliverPolicy::LastPerSubject, LiveDelivery::Push).await?;
    let mut pending = live.pending;
    let (mut newest, mut snapshot) = (0, Vec::new());
    while pending > 0 {
        let Ok(Some((delivery, message))) = timeout(SNAPSHOT_SILENCE, live.next()).await else {
            return Err(bucket.error("cannot be watched: the server stopped sending"));
        };
        (pending, newest) = (delivery.pending, delivery.stream_seq);
        let read = read(bucket, delivery, &message);
        snapshot.extend(read.map(|(key, stored)| (key, stored, delivery.time_ns)));
    }
    Ok((live, newest, snapshot))
}

fn read(bucket: &Bucket, delivery: Delivery, message: &Message) -> Option<(String, Stored)> {
    let key = bucket.key(&message.subject)?.to_owned();
    let marker = message.headers.as_ref().is_some_and(is_marker);
    let value = (!marker).then(|| message.payload.clone());
    Some((key, Stored { revision: delivery.stream_seq, value }))
}

/// Result of a check of the stream.
#[derive(Debug, Clone, Copy, PartialEq)]
struct StreamCheck {
    created_ns: i128,
    last: u64,
    messages: u64,
}

impl StreamCheck {
    fn new(info: &stream::Info) -> Self {
        Self {
            created_ns: info.created.unix_timestamp_nanos(),
            last: info.state.last_sequence,
            messages: info.state.messages,
        }
    }

    /// Whether revisions restart: another stream, or one whose end went back.
    fn is_another(self, before: Option<Self>, seen: u64) -> bool {
        before.is_some_and(|before| self.created_ns != before.created_ns) || self.last < seen
    }

    /// Whether a watch that saw everything up to `seen` missed something: another stream, an end that went back,
    /// a change that did not come within a whole interval, or messages that went without one.
    fn behind(self, before: Option<Self>, seen: u64) -> bool {
        let Some(before) = before else { return false };
        let quiet = self.last == before.last;
        self.is_another(Some(before), seen)
            || (quiet && self.last > seen)
            || (quiet && self.messages != before.messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_that_missed_something_is_found_out() {
        let look = |created_ns: i128, last: u64, messages: u64| StreamCheck { created_ns, last, messages };
        let check = |before: StreamCheck, now: StreamCheck, seen: u64, expect: bool| {
            assert_eq!(now.behind(Some(before), seen), expect, "{before:?} {now:?} {seen}");
        };
        check(look(1, 5, 3), look(1, 5, 3), 5, false);
        check(look(1, 5, 3), look(1, 9, 3), 5, false); // on its way
        check(look(1, 9, 3), look(1, 9, 3), 5, true);
        check(look(1, 5, 3), look(1, 4, 3), 5, true);
        check(look(1, 5, 3), look(1, 5, 2), 5, true);
        check(look(1, 5, 3), look(2, 5, 3), 5, true);
        assert!(!look(1, 5, 3).behind(None, 0));
    }
}
