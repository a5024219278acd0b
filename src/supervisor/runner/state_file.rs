//! The state file of Choria's replicator, `<state_store>/<stream>_<name>.json`: read where nothing else is known of the
//! senders of a sampled replication, and written beside the records, so that Choria's replicator finds it.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    future::pending,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::DateTime;
use nats_lane::entropy;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    choria::{StateFileText, TrackedSender, no_time, read_state},
    config::{Replication, Sampling},
    copy::Samples,
    sampling::Listed,
    store::SenderRecord,
};

/// How often it is written, as often as the Go program does.
const WRITE_EVERY: Duration = Duration::from_secs(10);
/// A write that takes long is repeated less often: pauses are this much longer than the write.
const PAUSES: u32 = 20;
/// How long the last write of a run may take.
const LAST_WRITE: Duration = Duration::from_secs(2);
/// Slots that are read together: nothing is sampled meanwhile.
const TOGETHER: usize = 4_096;

/// The state file of one replication.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    /// Hash of what was written last.
    written: Option<u128>,
    /// Whether it has been logged that it cannot be written.
    failing: bool,
}

impl StateFile {
    /// In a folder, if there is one and the replication is sampled.
    pub(super) fn of(folder: Option<&Path>, replication: &Replication) -> Option<Self> {
        replication.sampling.as_ref()?;
        let name = format!("{}_{}.json", replication.source.stream, replication.name);
        Some(Self { path: folder?.join(name), written: None, failing: false })
    }

    /// Takes over the senders of the file, if there is one. The Go program forgets those that were not seen for
    /// `inspect_duration` when it reads it; after twice that time it does not publish `expire` either.
    pub(super) async fn load(&self, samples: &Samples, sampling: &Sampling) {
        let path = self.path.clone();
        let read = spawn_blocking(move || fs::read(path)).await.unwrap_or_else(|error| Err(io::Error::other(error)));
        let text = match read {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return self.unread(&error.to_string()),
        };
        let items = match read_state(&text) {
            Ok(items) => items,
            Err(error) => return self.unread(&error.to_string()),
        };
        let path = self.path.display();
        info!(file = %path, senders = items.len(), "takes over the state file of Choria's replicator");
        take_over(samples, items, sampling);
    }

    fn unread(&self, why: &str) {
        warn!(file = %self.path.display(), "the state file of Choria's replicator cannot be read, continuing without: {why}");
    }

    /// Writes the file; it is removed when no sender is known.
    async fn write(&mut self, samples: &Samples) {
        let text = text_of(samples).await;
        let hash = text.as_deref().map_or(0, xxh3_128);
        if self.written == Some(hash) {
            return;
        }
        let path = self.path.clone();
        let stored = spawn_blocking(move || match text {
            Some(text) => store(&path, &text),
            None => {
                fs::remove_file(&path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
            }
        });
        match stored.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => (self.written, self.failing) = (Some(hash), false),
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(file = %self.path.display(), "the state file for Choria's replicator is not written: {error}");
                }
            }
        }
    }
}

fn take_over(samples: &Samples, items: BTreeMap<String, TrackedSender>, sampling: &Sampling) {
    let since = entropy::now().checked_sub_signed(chrono::TimeDelta::from_std(sampling.every * 2).unwrap_or_default());
    for (value, item) in items {
        if !value.is_empty() && since.is_none_or(|since| item.seen >= since) {
            samples.lock().learn(record(&TrackedSender { value, ..item }));
        }
    }
}

/// What our records say of such a sender.
pub(super) fn record(sender: &TrackedSender) -> SenderRecord {
    let mut record = SenderRecord::new(&sender.value, sender.seen);
    record.copied = sender.copied();
    record.size = u32::try_from(sender.size).unwrap_or(u32::MAX);
    record.advised = sender.advised;
    record
}

/// A sender of ours as the Go program has it.
pub(super) fn tracked(listed: &Listed<'_>) -> TrackedSender {
    TrackedSender {
        seen: DateTime::from_timestamp_nanos(listed.seen_ns),
        copied: listed.copied_ns.map_or_else(no_time, DateTime::from_timestamp_nanos),
        advised: listed.advised,
        size: listed.size.into(),
        value: listed.sender.to_owned(),
    }
}

async fn text_of(samples: &Samples) -> Option<Vec<u8>> {
    let mut text = StateFileText::default();
    let mut from = 0;
    loop {
        {
            let senders = samples.lock();
            if from >= senders.slots() {
                break;
            }
            senders.list(from..from + TOGETHER).for_each(|(_, listed)| text.add(tracked(&listed)));
        }
        from += TOGETHER;
        tokio::task::yield_now().await;
    }
    text.end()
}

/// Replaces a file in one step. Only its owner may read it, and enter a folder that is created.
fn store(path: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

/// Writes the file while this is polled.
pub(super) async fn follow(file: &mut Option<StateFile>, samples: Option<Samples>) -> Infallible {
    let (Some(file), Some(samples)) = (file, samples) else { return pending().await };
    loop {
        let begun = Instant::now();
        file.write(&samples).await;
        sleep(WRITE_EVERY.max(begun.elapsed() * PAUSES)).await;
    }
}

/// Writes the file at the end of a run.
pub(super) async fn finish(file: Option<StateFile>, samples: Option<Samples>) {
    let (Some(mut file), Some(samples)) = (file, samples) else { return };
    if timeout(LAST_WRITE, file.write(&samples)).await.is_err() {
        warn!(file = %file.path.display(), "the state file for Choria's replicator was not written within {LAST_WRITE:?}");
    }
}
