//! The senders of one replication as this process knows them. While another instance leads, this one follows the records
//! that the leader writes, so that it can take over at once. While this instance leads, it follows edits by hand only.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use futures_util::StreamExt;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Duration, timeout},
};
use tracing::{info, warn};

use crate::{
    config::{Inspect, Sampling},
    copy::Samples,
    sampling::Senders,
    store::{self, SenderChange, SenderStore, Trouble},
};

/// How long to wait for the newest record before the bucket is asked again which one that is.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The senders of one replication, and the task that follows their records; it ends with this.
#[derive(Debug)]
pub(super) struct StandbySenders {
    id: String,
    inspect: Inspect,
    /// Whether unconfirmed advisories were loaded from the records.
    reliable: bool,
    store: SenderStore,
    samples: Samples,
    leads: Arc<AtomicBool>,
    /// Newest revision that was applied; `None` until all existing records have been.
    applied: watch::Receiver<Option<u64>>,
    task: JoinHandle<()>,
}

impl Drop for StandbySenders {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl StandbySenders {
    /// Starts to follow the records.
    pub(super) fn follow(store: &SenderStore, id: &str, sampling: &Sampling) -> Self {
        let senders = Arc::new(Mutex::new(Senders::new(id, sampling)));
        let samples = Samples { senders, store: Arc::new(store.clone()), report: None };
        let store = store.clone();
        let leads = Arc::new(AtomicBool::new(false));
        let (report, applied) = watch::channel(None);
        let following = SenderFollower {
            id: id.to_owned(),
            store: store.clone(),
            samples: samples.clone(),
            leads: leads.clone(),
            report,
        };
        let task = tokio::spawn(following.run());
        let (inspect, reliable) = (sampling.inspect.clone(), sampling.is_reliable());
        Self { id: id.to_owned(), inspect, reliable, store, samples, leads, applied, task }
    }

    /// Whether the records loaded so far have what this sampling needs to lead.
    pub(super) fn knows_enough(&self, sampling: &Sampling) -> bool {
        self.fits(sampling) && (self.reliable == sampling.is_reliable() || self.leads.load(Ordering::Relaxed))
    }

    /// Whether senders are identified in the way that this sampling asks for.
    pub(super) fn fits(&self, sampling: &Sampling) -> bool {
        self.inspect == sampling.inspect
    }

    /// What the copy needs.
    pub(super) fn samples(&self) -> Samples {
        self.samples.clone()
    }

    /// From now on this process writes the records: waits until it has applied the newest one.
    pub(super) async fn lead(&mut self, sampling: &Sampling) -> Result<(), store::Error> {
        if !self.leads.load(Ordering::Relaxed) {
            loop {
                let newest = self.store.newest(&self.id).await?;
                let known = self.applied.wait_for(|applied| applied.is_some_and(|applied| applied >= newest));
                // An error means that the task has ended with its owner. The newest record may be a marker that expires
                // before the watch delivers it: then an older one is the newest.
                if timeout(ASK_AGAIN, known).await.is_ok() {
                    break;
                }
            }
            let known = self.samples.lock().len();
            info!(replication = self.id, senders = known, "senders are known");
            self.leads.store(true, Ordering::Relaxed);
        }
        self.samples.lock().adopt(sampling);
        Ok(())
    }
}

struct SenderFollower {
    id: String,
    store: SenderStore,
    samples: Samples,
    leads: Arc<AtomicBool>,
    report: watch::Sender<Option<u64>>,
}

impl SenderFollower {
    async fn run(self) {
        let mut trouble = Trouble::new("the records of senders cannot be followed");
        let mut recreations = self.store.recreations();
        loop {
            let error = match self.store.watch(&self.id).await {
                Ok(mut changes) => {
                    let now = self.store.recreations();
                    let recreated = std::mem::replace(&mut recreations, now) != now;
                    if recreated {
                        // Memory has more than the bucket: the leader writes all of it again.
                        self.samples.lock().write_all_again();
                    }
                    let standby = !self.leads() && !recreated;
                    if standby {
                        self.samples.lock().begin_load();
                    }
                    let mut newest = 0;
                    loop {
                        match changes.next().await {
                            Some(Ok((revision, change))) => {
                                newest = newest.max(revision);
                                self.apply(change, standby, newest);
                                trouble.over();
                            }
                            Some(Err(error)) => break error.to_string(),
                            None => break "the watch ended".to_owned(),
                        }
                    }
                }
                Err(error) => error.to_string(),
            };
            trouble.wait(&error).await;
        }
    }

    fn leads(&self) -> bool {
        self.leads.load(Ordering::Relaxed)
    }

    fn apply(&self, change: SenderChange, standby: bool, newest: u64) {
        let mut senders = self.samples.lock();
        match change {
            SenderChange::Put { record, by_hand } if by_hand || !self.leads() => senders.take_over(*record),
            SenderChange::Removed { token, by_hand } if by_hand || !self.leads() => senders.taken_away(&token),
            SenderChange::Emptied if !self.leads() => senders.forget_all(),
            SenderChange::Put { .. } | SenderChange::Removed { .. } | SenderChange::Emptied => {}
            SenderChange::Loaded => {
                if standby && !self.leads() {
                    senders.end_load();
                }
                self.report.send_replace(Some(newest));
            }
            SenderChange::Unreadable { key, message } => {
                warn!(replication = self.id, key, "not a record of a sender: {message}; delete or correct it");
            }
        }
        let advance = |applied: &mut Option<u64>| {
            applied.as_mut().is_some_and(|applied| std::mem::replace(applied, newest) != newest)
        };
        self.report.send_if_modified(advance);
    }
}
