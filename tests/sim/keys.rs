//! The positions bucket in memory: compare-and-swap, answers that get lost, and writes that arrive late.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::pending};
use stream_replicator::store::{Cells, Changes, Error, PutError, Stored};
use tokio::{
    sync::oneshot,
    time::{Duration, sleep},
};

use super::world::World;

/// What a request waits for its answer at most.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Looks at every value in the moment in which it is written.
type Witness = Box<dyn Fn(&[u8]) + Send + Sync>;

pub struct Keys {
    world: World,
    state: Mutex<State>,
    witness: Witness,
}

#[derive(Default)]
struct State {
    revision: u64,
    keys: BTreeMap<String, Stored>,
    trouble: bool,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    pub fn new(world: World, witness: Witness) -> Arc<Self> {
        Arc::new(Self { world, state: Mutex::default(), witness })
    }

    /// While there is trouble, answers get lost and writes arrive late or never.
    pub fn trouble(&self, on: bool) {
        self.state.lock().expect("keys").trouble = on;
    }

    /// The value of a key now.
    pub fn value(&self, key: &str) -> Option<Bytes> {
        self.state.lock().expect("keys").keys.get(key)?.value.clone()
    }

    /// Puts an older value back, as from a backup.
    pub fn put_back(&self, key: &str, value: Bytes) {
        let mut state = self.state.lock().expect("keys");
        state.revision += 1;
        let revision = state.revision;
        state.keys.insert(key.to_owned(), Stored { revision, value: Some(value) });
    }

    /// Somebody deletes a key.
    pub fn lose(&self, key: &str) {
        let mut state = self.state.lock().expect("keys");
        state.revision += 1;
        let revision = state.revision;
        state.keys.insert(key.to_owned(), Stored { revision, value: None });
    }

    fn apply(&self, key: &str, value: Bytes, expected: u64) -> Result<u64, PutError> {
        let mut state = self.state.lock().expect("keys");
        if state.keys.get(key).map_or(0, |stored| stored.revision) != expected {
            return Err(PutError::Conflict);
        }
        self.world.note("keys", &value);
        (self.witness)(&value);
        state.revision += 1;
        let revision = state.revision;
        state.keys.insert(key.to_owned(), Stored { revision, value: Some(value) });
        Ok(revision)
    }

    fn error(&self) -> Error {
        Error { bucket: "positions".to_owned(), message: "no answer".to_owned() }
    }

    fn in_trouble(&self) -> bool {
        self.state.lock().expect("keys").trouble && self.world.once_in(2)
    }
}

/// Own copy of the handle, for what goes on when the one who asked is gone.
#[derive(Debug, Clone)]
pub struct Handle(pub Arc<Keys>);

impl Cells for Handle {
    fn name(&self) -> &str {
        "positions"
    }

    fn last<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Stored>, Error>> {
        let keys = &self.0;
        async move {
            if keys.in_trouble() {
                sleep(TIMEOUT).await;
                return Err(keys.error());
            }
            sleep(keys.world.millis(0, 5)).await;
            Ok(keys.state.lock().expect("keys").keys.get(key).cloned())
        }
        .boxed()
    }

    fn put<'a>(&'a self, key: &'a str, value: Bytes, expected: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        let keys = self.0.clone();
        let key = key.to_owned();
        // How long it takes, whether it arrives at all, and whether the answer does.
        let (mut way, mut arrives, mut answered) = (keys.world.millis(0, 20), true, true);
        if keys.in_trouble() {
            way = keys.world.millis(0, 6_000);
            arrives = !keys.world.once_in(3);
            answered = keys.world.once_in(2);
        }
        let (answer, waiting) = oneshot::channel();
        let writer = keys.clone();
        tokio::spawn(async move {
            sleep(way).await;
            if arrives {
                let result = writer.apply(&key, value, expected);
                if answered {
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
                _ => Err(PutError::Unknown(keys.error())),
            }
        }
        .boxed()
    }

    fn mark_deleted<'a>(&'a self, key: &'a str, _: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        self.0.lose(key);
        async { Ok(0) }.boxed()
    }

    fn forget_through<'a>(&'a self, key: &'a str, _: u64) -> BoxFuture<'a, Result<(), Error>> {
        self.forget(key)
    }

    fn forget<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        self.0.state.lock().expect("keys").keys.remove(key);
        async { Ok(()) }.boxed()
    }

    fn watch(&self) -> BoxFuture<'_, Result<Changes, Error>> {
        async { Ok(pending().boxed()) }.boxed()
    }
}
