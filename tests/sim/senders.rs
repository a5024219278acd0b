//! The records of senders in memory: written behind by whoever copies, each judged in the moment in which it is written.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
};

use futures_util::{FutureExt, future::BoxFuture};
use stream_replicator::{
    config::Sampling,
    copy::Samples,
    sampling::Senders,
    store::{Error, SenderRecord, SenderWrites},
};
use tokio::time::{Duration, sleep};

use super::{keys::Handle, run::ID, world::World};

/// Judges a record in the moment in which it is written.
pub type Judge = Box<dyn Fn(&SenderRecord) + Send + Sync>;

/// How long a write waits for its answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is stored of senders, by sender.
pub struct Records {
    world: World,
    judge: Judge,
    stored: Mutex<BTreeMap<String, SenderRecord>>,
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Records")
    }
}

impl Records {
    pub fn new(world: World, judge: Judge) -> Arc<Self> {
        Arc::new(Self { world, judge, stored: Mutex::default() })
    }

    /// What an instance knows that begins to copy: all that is stored now.
    pub fn load(self: &Arc<Self>, sampling: &Sampling, handle: Handle) -> Samples {
        let mut senders = Senders::new(ID, sampling);
        senders.begin_load();
        self.stored.lock().expect("records").values().for_each(|record| senders.take_over(record.clone()));
        senders.end_load();
        let store = Arc::new(Writes { records: self.clone(), handle });
        Samples { senders: Arc::new(Mutex::new(senders)), store, report: None }
    }
}

/// The records as one instance writes them.
#[derive(Debug)]
struct Writes {
    records: Arc<Records>,
    handle: Handle,
}

impl SenderWrites for Writes {
    fn write_all<'a>(
        &'a self,
        _: &'a str,
        writes: &'a [(String, Option<SenderRecord>)],
    ) -> BoxFuture<'a, Result<(), Error>> {
        async move {
            let (world, error) = (&self.records.world, || self.handle.error());
            for (sender, record) in writes {
                sleep(world.millis(0, 20)).await;
                if self.handle.link.cut.lasts() || self.handle.keys.in_trouble() {
                    sleep(TIMEOUT).await;
                    return Err(error());
                }
                let mut stored = self.records.stored.lock().expect("records");
                world.note("senders", format!("{record:?}").as_bytes());
                tracing::debug!(at = ?world.elapsed(), sender, ?record, "written");
                match record {
                    Some(record) => {
                        (self.records.judge)(record);
                        stored.insert(sender.clone(), record.clone());
                    }
                    None => _ = stored.remove(sender),
                }
            }
            Ok(())
        }
        .boxed()
    }
}
