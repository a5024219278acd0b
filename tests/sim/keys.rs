//! A bucket in memory: compare-and-swap, answers that get lost, writes that arrive late, and a watch that may stall.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::unfold};
use stream_replicator::store::{Cells, Change, Changes, Error, PutError, Stored};
use tokio::{
    sync::{Notify, oneshot},
    time::{Duration, sleep},
};

use super::{process::Until, world::World};

/// What a request waits for its answer at most.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How often a watch checks whether it can continue.
const LOOK: Duration = Duration::from_millis(100);

/// Checks every value in the moment in which it is written.
type Witness = Box<dyn Fn(&[u8]) + Send + Sync>;

pub struct Keys {
    world: World,
    name: &'static str,
    state: Mutex<State>,
    changed: Notify,
    witness: Witness,
}

#[derive(Default)]
struct State {
    revision: u64,
    keys: BTreeMap<String, Stored>,
    trouble: bool,
    /// Somebody deleted the bucket.
    gone: bool,
    /// How often it was recreated: revisions begin again each time.
    recreated: u64,
}

/// Entries that a watch has delivered.
#[derive(Default)]
struct Told {
    revision: u64,
    recreated: u64,
    loaded: bool,
    keys: BTreeSet<String>,
    /// Keys that were delivered and that the recreated bucket does not have.
    lost: BTreeSet<String>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Keys {
    pub fn new(world: World, name: &'static str, witness: Witness) -> Arc<Self> {
        Arc::new(Self { world, name, state: Mutex::default(), changed: Notify::new(), witness })
    }

    /// While there is trouble, answers get lost, writes arrive late or never, and watches are behind.
    pub fn trouble(&self, on: bool) {
        self.state.lock().expect("keys").trouble = on;
    }

    /// Somebody deletes the bucket.
    pub fn vanish(&self) {
        self.state.lock().expect("keys").gone = true;
    }

    /// An instance recreates the bucket, and those who followed it write what they know, or there was nobody.
    pub fn recreate(&self, known: bool) {
        let mut state = self.state.lock().expect("keys");
        (state.gone, state.revision) = (false, 0);
        state.recreated += 1;
        for (key, Stored { value, .. }) in std::mem::take(&mut state.keys) {
            if known && value.is_some() {
                state.revision += 1;
                let revision = state.revision;
                state.keys.insert(key, Stored { revision, value });
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn is_gone(&self) -> bool {
        self.state.lock().expect("keys").gone
    }

    /// The value of a key now.
    pub fn value(&self, key: &str) -> Option<Bytes> {
        self.state.lock().expect("keys").keys.get(key)?.value.clone()
    }

    /// Another client writes a value, as from a backup, or deletes a key.
    pub fn put_by_hand(&self, key: &str, value: Option<Bytes>) {
        self.store(key, value);
    }

    fn store(&self, key: &str, value: Option<Bytes>) -> u64 {
        let mut state = self.state.lock().expect("keys");
        state.revision += 1;
        let revision = state.revision;
        state.keys.insert(key.to_owned(), Stored { revision, value });
        drop(state);
        self.changed.notify_waiters();
        revision
    }

    fn revision(&self, key: &str) -> u64 {
        self.state.lock().expect("keys").keys.get(key).map_or(0, |stored| stored.revision)
    }

    fn apply(&self, key: &str, value: Option<Bytes>, expected: u64) -> Result<u64, PutError> {
        if self.revision(key) != expected {
            return Err(PutError::Conflict);
        }
        let written = value.as_deref().unwrap_or_default();
        tracing::debug!(at = ?self.world.elapsed(), key, value = %String::from_utf8_lossy(written), "written");
        self.world.note(self.name, written);
        if value.is_some() {
            (self.witness)(written);
        }
        Ok(self.store(key, value))
    }

    /// The first change after the last delivery of a watch.
    fn behind(&self, told: &Told) -> Option<(String, Stored)> {
        let state = self.state.lock().expect("keys");
        let newer = state.keys.iter().filter(|(_, stored)| stored.revision > told.revision);
        let newer = newer.min_by_key(|(_, stored)| stored.revision);
        let lost = || Some((told.lost.first()?.clone(), Stored { revision: state.revision, value: None }));
        newer.map(|(key, stored)| (key.clone(), stored.clone())).or_else(lost)
    }

    /// Whether the bucket is another one than that of a watch.
    fn is_another(&self, told: &Told) -> bool {
        self.state.lock().expect("keys").recreated != told.recreated
    }

    /// A watch begins again with the bucket that was recreated, if it was.
    fn begins_again(&self, told: &mut Told) -> bool {
        let another = self.is_another(told);
        if another {
            let state = self.state.lock().expect("keys");
            (told.revision, told.recreated) = (0, state.recreated);
            told.lost.extend(std::mem::take(&mut told.keys));
            told.lost.retain(|key| !state.keys.contains_key(key));
        }
        another
    }

    pub fn in_trouble(&self) -> bool {
        self.state.lock().expect("keys").trouble && self.world.once_in(2)
    }
}

/// What lies between one instance and the buckets.
#[derive(Debug, Default)]
pub struct Link {
    /// Nothing gets through.
    pub cut: Until,
    /// Watches tell nothing.
    pub deaf: Until,
}

/// A bucket as one instance has it. By the clock of each instance the time to live of all is the same; in the time of
/// the world it is not, which is how their clocks drift.
#[derive(Debug, Clone)]
pub struct Handle {
    pub keys: Arc<Keys>,
    pub link: Arc<Link>,
    /// Milliseconds of the world that this instance takes for its time to live, and that everybody says it is.
    pub ttl_ms: (u64, u64),
}

impl Handle {
    pub fn error(&self) -> Error {
        Error { bucket: self.keys.name.to_owned(), message: "no answer".to_owned() }
    }

    fn with_ttl(value: &Bytes, from: u64, to: u64) -> Bytes {
        let text = String::from_utf8_lossy(value);
        text.replace(&format!("\"ttl_ms\":{from}"), &format!("\"ttl_ms\":{to}")).into()
    }

    fn said(&self, value: &Bytes) -> Bytes {
        Self::with_ttl(value, self.ttl_ms.0, self.ttl_ms.1)
    }

    fn heard(&self, stored: Stored) -> Stored {
        let value = stored.value.map(|value| Self::with_ttl(&value, self.ttl_ms.1, self.ttl_ms.0));
        Stored { value, ..stored }
    }

    /// Continues when the caller is gone.
    fn write(&self, key: &str, value: Option<Bytes>, expected: u64) -> BoxFuture<'static, Result<u64, PutError>> {
        let (this, key) = (self.clone(), key.to_owned());
        let value = value.map(|value| self.said(&value));
        let world = self.keys.world.clone();
        // How long it takes, whether it arrives at all, and whether the answer does.
        let (mut way, mut arrives, mut answered) = (world.millis(0, 20), true, true);
        if self.keys.in_trouble() {
            way = world.millis(0, 6_000);
            arrives = !world.once_in(3);
            answered = world.once_in(2);
        }
        let back = world.millis(0, 20);
        let (answer, waiting) = oneshot::channel();
        let Handle { keys, link, .. } = self.clone();
        tokio::spawn(async move {
            sleep(way).await;
            if arrives && !link.cut.lasts() && !keys.is_gone() {
                let result = keys.apply(&key, value, expected);
                sleep(back).await;
                if answered && !link.cut.lasts() {
                    let _ = answer.send(result);
                    return;
                }
            }
            sleep(TIMEOUT).await;
            drop(answer);
        });
        async move {
            match tokio::time::timeout(TIMEOUT, waiting).await {
                Ok(Ok(result)) => result,
                _ => Err(PutError::Unknown(this.error())),
            }
        }
        .boxed()
    }

    async fn reach(&self) -> Result<(), Error> {
        if self.keys.in_trouble() || self.link.cut.lasts() || self.keys.is_gone() {
            sleep(TIMEOUT).await;
            return Err(self.error());
        }
        sleep(self.keys.world.millis(0, 5)).await;
        Ok(())
    }

    /// The next delivery of a watch that has delivered everything up to a revision.
    async fn next(&self, told: &mut Told) -> Change {
        let Self { keys, link, .. } = self;
        loop {
            let changed = keys.changed.notified();
            if link.cut.lasts() || link.deaf.lasts() || keys.is_gone() {
                sleep(LOOK).await;
                continue;
            }
            if keys.begins_again(told) {
                return Change::Recreated;
            }
            let Some((key, stored)) = keys.behind(told) else {
                if !std::mem::replace(&mut told.loaded, true) {
                    return Change::Loaded;
                }
                changed.await;
                continue;
            };
            sleep(keys.world.millis(0, if keys.in_trouble() { 3_000 } else { 20 })).await;
            if link.cut.lasts() || link.deaf.lasts() || keys.is_another(told) {
                continue;
            }
            told.revision = stored.revision;
            told.lost.remove(&key);
            let Stored { revision, value } = self.heard(stored);
            return match value {
                Some(value) => {
                    told.keys.insert(key.clone());
                    Change::Put { key, revision, value, age: Duration::ZERO }
                }
                None => {
                    told.keys.remove(&key);
                    Change::Deleted { key, revision }
                }
            };
        }
    }
}

impl Cells for Handle {
    fn name(&self) -> &str {
        self.keys.name
    }

    fn last<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Stored>, Error>> {
        async move {
            self.reach().await?;
            let stored = self.keys.state.lock().expect("keys").keys.get(key).cloned();
            Ok(stored.map(|stored| self.heard(stored)))
        }
        .boxed()
    }

    fn put<'a>(&'a self, key: &'a str, value: Bytes, expected: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        self.write(key, Some(value), expected)
    }

    fn mark_deleted<'a>(&'a self, key: &'a str, expected: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        self.write(key, None, expected)
    }

    fn forget_through<'a>(&'a self, key: &'a str, revision: u64) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            self.reach().await?;
            if self.keys.revision(key) <= revision {
                self.keys.state.lock().expect("keys").keys.remove(key);
            }
            Ok(())
        }
        .boxed()
    }

    fn watch(&self) -> BoxFuture<'_, Result<Changes, Error>> {
        let recreated = self.keys.state.lock().expect("keys").recreated;
        let told = Told { recreated, ..Told::default() };
        let changes = unfold((self.clone(), told), |(handle, mut told)| async move {
            let change = handle.next(&mut told).await;
            Some((Ok(change), (handle, told)))
        });
        async { Ok(changes.boxed()) }.boxed()
    }
}
