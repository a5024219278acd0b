//! Events about the replicator, published on the control connection as
//! `<prefix>.event.<kind>.<replication id>`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use chrono::{SecondsFormat, Utc};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

/// Events that may wait for the connection.
const QUEUE: usize = 1024;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A run began to copy.
    Started,
    /// A run ended by request.
    Stopped,
    /// A document changed and the replication follows it.
    ConfigChanged,
    /// A document was refused.
    ConfigRejected,
    /// The replication went on after an error.
    Repaired,
    /// An error stopped the copy; it is tried again.
    Stalled,
    /// Source messages were gone before they were read.
    Gap,
    /// Somebody has to act.
    Held,
    /// The source lost its end or is another stream.
    SourceReset,
    /// The target lost stored data or is another stream.
    TargetReset,
    /// Somebody else writes to the target.
    TargetShared,
}

impl Kind {
    /// The name in the subject and in the body.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Stopped => "stopped",
            Self::ConfigChanged => "config-changed",
            Self::ConfigRejected => "config-rejected",
            Self::Repaired => "repaired",
            Self::Stalled => "stalled",
            Self::Gap => "gap",
            Self::Held => "held",
            Self::SourceReset => "source-reset",
            Self::TargetReset => "target-reset",
            Self::TargetShared => "target-shared",
        }
    }
}

/// Publishes events; cheap to clone. Never blocks and never fails: an event that cannot be sent is logged.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Item>,
}

/// What is the same in every event, and what was lost.
#[derive(Debug)]
struct Shared {
    prefix: String,
    site: String,
    instance: String,
    dropped: AtomicU64,
}

#[derive(Debug)]
enum Item {
    Event { subject: String, body: Vec<u8> },
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// Starts the task that publishes; it ends when the last clone is gone.
    pub fn new(client: async_nats::Client, prefix: &str, site: &str, instance: &str) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        tokio::spawn(publish(client, waiting));
        let shared = Shared {
            prefix: prefix.to_owned(),
            site: site.to_owned(),
            instance: instance.to_owned(),
            dropped: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared), queue }
    }

    /// Publishes one event. `detail` goes into the body beside `kind`, `replication`, `site`, `instance`, `time`.
    pub fn emit(&self, kind: Kind, replication: &str, detail: Map<String, Value>) {
        let subject = format!("{}.event.{}.{replication}", self.shared.prefix, kind.name());
        let body = self.body(kind, replication, detail);
        if self.queue.try_send(Item::Event { subject, body }).is_err()
            && self.shared.dropped.fetch_add(1, Ordering::Relaxed) == 0
        {
            warn!(replication, kind = kind.name(), "events are dropped: {QUEUE} wait for the control connection");
        }
    }

    /// Events that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything emitted so far has been written to the server.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = written.await;
        }
    }

    fn body(&self, kind: Kind, replication: &str, mut detail: Map<String, Value>) -> Vec<u8> {
        let time = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        detail.insert("kind".to_owned(), kind.name().into());
        detail.insert("replication".to_owned(), replication.into());
        detail.insert("site".to_owned(), self.shared.site.as_str().into());
        detail.insert("instance".to_owned(), self.shared.instance.as_str().into());
        detail.insert("time".to_owned(), time.into());
        Value::Object(detail).to_string().into_bytes()
    }
}

/// Publishes until every [`Events`] is gone. While the control connection is down the client's own queue fills,
/// then ours does.
async fn publish(client: async_nats::Client, mut waiting: mpsc::Receiver<Item>) {
    while let Some(item) = waiting.recv().await {
        match item {
            Item::Event { subject, body } => {
                if let Err(error) = client.publish(subject.clone(), body.into()).await {
                    warn!(subject, "event was not published: {error}");
                }
            }
            Item::Flush(done) => {
                if let Err(error) = client.flush().await {
                    debug!("events may not have been written: {error}");
                }
                let _ = done.send(());
            }
        }
    }
}
