//! Events about the replicator, published on the control connection as
//! `<prefix>.event.<kind>.<replication id>`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use chrono::{DateTime, SubsecRound, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use crate::{
    config::Problem,
    status::{OnlyAtTarget, RetentionLimit, VerificationState},
};

/// Events that may wait for the connection.
const QUEUE: usize = 1024;

/// What happened, and what is said of it. The names of kinds and fields are the wire contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Event {
    /// An adapter is connected to its target for the first time.
    AdapterStarted {},
    /// An adapter ended.
    AdapterStopped {
        /// Messages that were accepted and are not stored: the target did not take them in time.
        not_stored: u64,
    },
    /// An adapter drops messages: the first of a stretch, or its end.
    AdapterDropped {
        /// The reason, as in the status.
        reason: String,
        /// Messages dropped in the stretch, at its end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        messages: Option<u64>,
    },
    /// A run began to copy.
    Started {
        /// Epoch of the holder.
        epoch: u64,
    },
    /// The replication ended by request, or for good because another instance holds it.
    Stopped {
        /// Source sequence up to which everything is settled, where that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        position: Option<u64>,
        /// The reason, if it was not requested.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
    /// A stream at the source matches the patterns of a document: it has a replication from now on.
    StreamAppeared {
        /// Name of the stream.
        stream: String,
    },
    /// The source no longer has the stream that a pattern found: its replication is stopped.
    StreamGone {
        /// Name of the stream.
        stream: String,
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// The replication was paused: nothing more is copied.
    Paused {
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// The replication resumes after a pause.
    Resumed {
        /// Source sequence after which it resumes.
        position: u64,
    },
    /// An instance took the replication.
    Leader {
        /// Its epoch.
        epoch: u64,
        /// Instance that ran it before; none the first time.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        previous: Option<String>,
    },
    /// The position of a paused replication was moved by request.
    PositionMoved {
        /// Position before.
        from: u64,
        /// Position now.
        to: u64,
        /// Source messages in between that are copied again.
        copied_again: u64,
        /// Source messages in between that are passed over.
        passed_over: u64,
    },
    /// A mirror was turned into a stream that publishers write to.
    Promoted {
        /// Name of the stream.
        stream: String,
        /// Its subjects.
        subjects: Vec<String>,
        /// Last sequence of the mirror.
        last_seq: u64,
        /// Messages of the source that it lacks; `null` where the source did not answer.
        lag: Option<u64>,
        /// The replication stays, and is paused.
        kept: bool,
    },
    /// A document changed and the replication follows it.
    ConfigChanged {
        /// Revision of the document.
        revision: u64,
    },
    /// A document was refused; the previous one continues to run.
    ConfigRejected {
        /// Revision of the document.
        revision: u64,
        /// Its problems.
        problems: Vec<Problem>,
    },
    /// The replication recovered from an error.
    Repaired {
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// The copy stands still and is being repaired.
    Stalled {
        /// Description.
        message: String,
        /// The part that is recreated.
        step: Step,
    },
    /// A server stalls many replications of an instance: one event instead of a `stalled` for each.
    Outage {
        /// The server, or the context, as the documents name it; no secrets.
        server: String,
        /// Description, from one of the replications.
        message: String,
        /// How many replications are stalled.
        count: u64,
        /// Their ids, sorted; the first 1,000.
        replications: Vec<String>,
    },
    /// The end of `outage`: all of these replications copy again, or no longer wait for that server.
    OutageOver {
        /// The server, as in `outage`.
        server: String,
        /// How many replications copy again.
        count: u64,
        /// Their ids, sorted; the first 1,000.
        replications: Vec<String>,
        /// How long it took, seconds.
        seconds: u64,
    },
    /// Both streams were compared, or that ended before.
    Verified {
        /// Identifies the job.
        job: String,
        /// How it ended.
        state: VerificationState,
        /// First source sequence that was compared.
        from: u64,
        /// Last source sequence that was compared.
        to: u64,
        /// Messages of the source that were compared.
        messages: u64,
        /// Unexpected differences.
        findings: u64,
        /// Missing messages that a repair stored; none where it was not requested.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        repaired: Option<u64>,
        /// Why it failed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
    },
    /// Nothing is left to copy, for the first time since the replication started or was repaired.
    CaughtUp {
        /// Source sequence up to which everything is settled.
        position: u64,
        /// Messages that were copied meanwhile.
        copied: u64,
        /// How long it took, seconds.
        seconds: u64,
    },
    /// Source messages were gone before they were read.
    Gap {
        /// First source sequence that is gone.
        from: u64,
        /// Last source sequence that is gone.
        to: u64,
        /// How many of them were not copied.
        messages: u64,
    },
    /// The source will soon remove messages that are not copied.
    HeadroomLow {
        /// Time until the first removal, seconds, at the current rates.
        seconds: u64,
        /// The limit that will remove them.
        limit: RetentionLimit,
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// Messages that are not copied stay at the source for long enough again, or there are none left.
    HeadroomOk {
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// An operator has to act.
    Held {
        /// Description.
        message: String,
    },
    /// A message can never be stored at the target: it blocks the replication, was skipped, or went to the dead
    /// letters.
    Poison {
        /// Its source sequence.
        source_seq: u64,
        /// Why it cannot be stored.
        message: String,
        /// Action taken.
        action: PoisonAction,
        /// Where many come within a moment, one event reports several: source sequence of the last one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<u64>,
        /// How many these are, between `source_seq` and `to`, both included.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        messages: Option<u64>,
    },
    /// The description of an object (of an object store) was skipped: the target does not have all of its chunks.
    ObjectIncomplete {
        /// Source sequence of the description.
        source_seq: u64,
        /// Name of the object.
        object: String,
        /// Chunks that it has at the source.
        chunks: u64,
        /// Chunks that are at the target.
        found: u64,
    },
    /// The source lost its end or is another stream.
    SourceReset {
        /// Position before.
        saved: u64,
        /// Position now; with the action `held` the one that `on_source_loss: follow` would resume at.
        resumed: u64,
        /// The observation that led to it.
        reason: String,
        /// Whether the copy continues.
        #[serde(default)]
        action: LossAction,
        /// Messages that only the target still has, if there are any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        only_at_target: Option<OnlyAtTarget>,
    },
    /// The target lost stored data or is another stream.
    TargetReset {
        /// Position before.
        saved: u64,
        /// Position now.
        resumed: u64,
        /// The observation that led to it.
        reason: String,
    },
    /// The target removed copies of messages that the source still has, by the limits of its stream. Reported once, until
    /// the source has removed these messages, too.
    TargetDropped {
        /// First source sequence of these messages.
        from: u64,
        /// Last source sequence of these messages.
        to: u64,
        /// How many copies were removed so far.
        messages: u64,
        /// Limits of the target stream that can remove copies.
        reason: String,
    },
    /// Another writer publishes to the target.
    TargetShared {
        /// Target sequence of a message that is not ours, if one was found.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target_seq: Option<u64>,
        /// The observation that led to it.
        reason: String,
    },
    /// Messages may be stored twice at the target, because it forgets ids too soon.
    DuplicateWindow {
        /// The target's duplicate window, milliseconds.
        window_ms: u64,
        /// The required value, milliseconds.
        needed_ms: u64,
        /// The observation that led to it.
        reason: String,
    },
    /// An advisory was refused: the login may not publish its subject, no stream stores it, or its protocol line is too
    /// long. The copy and other advisories continue. Reported once, until advisories are confirmed again.
    AdvisoryRefused {
        /// Kind of the advisory: `new`, `timeout`, `recover` or `expire`.
        advisory: String,
        /// Why it was refused.
        message: String,
    },
    /// A consumer that the document names in `consumers` is not kept at the target. Reported once for each reason.
    ConsumerRefused {
        /// Its name; `null` where two passes over all of them were not completed.
        consumer: Option<String>,
        /// Why it is not kept there.
        message: String,
    },
    /// Sampling tracks as many senders as the limits allow: messages of further senders are copied. Reported once, until
    /// there is room again.
    SendersUntracked {
        /// Senders that are tracked.
        senders: u64,
        /// Description.
        message: String,
    },
    /// The clock of the source server differs from the clock of the host of the instance by more than 5 s, or the server
    /// does not report its time.
    ClockOffset {
        /// Offset of the server's clock, milliseconds; negative where it is slow. `null` where it is not reported.
        offset_ms: Option<i64>,
        /// Description.
        reason: String,
    },
    /// A bucket of the service was deleted while it ran, and an instance recreated it.
    BucketRecreated {
        /// Name of the bucket.
        bucket: String,
    },
    /// The position is not saved: after a crash, messages copied since then are searched at the target, or copied
    /// again.
    PositionUnsaved {
        /// Why.
        message: String,
        /// Source sequence that was saved last.
        saved: u64,
        /// Source sequence up to which everything is settled.
        position: u64,
    },
    /// The end of `position-unsaved`.
    PositionSaved {
        /// Source sequence that is saved.
        position: u64,
    },
    /// The end of `clock-offset`: the clocks differ by no more than 2.5 s.
    ClockOk {
        /// Offset of the server's clock, milliseconds; negative where it is slow.
        offset_ms: i64,
    },
}

/// The part that is recreated to end a stall, each time a larger one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The consumer at the source, inside the run: connections and messages in flight stay.
    Consumer,
    /// Both connections: the run ends, and the next one determines where to resume.
    Connections,
    /// Everything: the record is claimed again and the document loaded again, as after a start.
    Everything,
}

/// Consequence of a loss at the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LossAction {
    /// The copy continues with the messages that the source has.
    #[default]
    Followed,
    /// Nothing is copied until the source has these messages again, or `on_source_loss` is `follow`.
    Held,
}

/// Action taken on a message that can never be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoisonAction {
    /// It blocks the replication until an operator acts.
    Held,
    /// It was skipped.
    Skipped,
    /// It was published to the dead letter subject.
    #[serde(rename = "dead_lettered")]
    DeadLettered,
}

impl Event {
    /// One message that can never be stored.
    pub fn poison(source_seq: u64, message: impl Into<String>, action: PoisonAction) -> Self {
        Self::Poison { source_seq, message: message.into(), action, to: None, messages: None }
    }

    /// Names of all kinds, as in subjects and bodies.
    pub const KINDS: [&str; 39] = [
        "adapter-started",
        "adapter-stopped",
        "adapter-dropped",
        "started",
        "stopped",
        "paused",
        "resumed",
        "leader",
        "stream-appeared",
        "stream-gone",
        "position-moved",
        "promoted",
        "config-changed",
        "config-rejected",
        "repaired",
        "stalled",
        "outage",
        "outage-over",
        "verified",
        "caught-up",
        "gap",
        "headroom-low",
        "headroom-ok",
        "held",
        "poison",
        "object-incomplete",
        "source-reset",
        "target-reset",
        "target-dropped",
        "target-shared",
        "duplicate-window",
        "advisory-refused",
        "consumer-refused",
        "senders-untracked",
        "clock-offset",
        "clock-ok",
        "bucket-recreated",
        "position-unsaved",
        "position-saved",
    ];

    /// The name in the subject and in the body.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::AdapterStarted {} => "adapter-started",
            Self::AdapterStopped { .. } => "adapter-stopped",
            Self::AdapterDropped { .. } => "adapter-dropped",
            Self::Started { .. } => "started",
            Self::Stopped { .. } => "stopped",
            Self::StreamAppeared { .. } => "stream-appeared",
            Self::StreamGone { .. } => "stream-gone",
            Self::Paused { .. } => "paused",
            Self::Resumed { .. } => "resumed",
            Self::Leader { .. } => "leader",
            Self::PositionMoved { .. } => "position-moved",
            Self::Promoted { .. } => "promoted",
            Self::ConfigChanged { .. } => "config-changed",
            Self::ConfigRejected { .. } => "config-rejected",
            Self::Repaired { .. } => "repaired",
            Self::Stalled { .. } => "stalled",
            Self::Outage { .. } => "outage",
            Self::OutageOver { .. } => "outage-over",
            Self::Verified { .. } => "verified",
            Self::CaughtUp { .. } => "caught-up",
            Self::Gap { .. } => "gap",
            Self::HeadroomLow { .. } => "headroom-low",
            Self::HeadroomOk { .. } => "headroom-ok",
            Self::Held { .. } => "held",
            Self::Poison { .. } => "poison",
            Self::ObjectIncomplete { .. } => "object-incomplete",
            Self::SourceReset { .. } => "source-reset",
            Self::TargetReset { .. } => "target-reset",
            Self::TargetDropped { .. } => "target-dropped",
            Self::TargetShared { .. } => "target-shared",
            Self::DuplicateWindow { .. } => "duplicate-window",
            Self::AdvisoryRefused { .. } => "advisory-refused",
            Self::ConsumerRefused { .. } => "consumer-refused",
            Self::SendersUntracked { .. } => "senders-untracked",
            Self::ClockOffset { .. } => "clock-offset",
            Self::ClockOk { .. } => "clock-ok",
            Self::BucketRecreated { .. } => "bucket-recreated",
            Self::PositionUnsaved { .. } => "position-unsaved",
            Self::PositionSaved { .. } => "position-saved",
        }
    }
}

/// Body of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Notice {
    /// Description.
    #[serde(flatten)]
    pub event: Event,
    /// Replication id; `heartbeats` for the heartbeats; the name of the bucket for `bucket-recreated`; the instance for `outage`
    /// and `outage-over`.
    pub replication: String,
    /// The site's name.
    pub site: String,
    /// Instance that tells it.
    pub instance: String,
    /// When it was published.
    pub time: DateTime<Utc>,
    /// The type of the event, as in the events of NATS: `io.stream_replicator.event.v1.` and the kind with `_`.
    #[serde(rename = "type", default)]
    pub schema_type: String,
    /// Identifies the event.
    #[serde(default)]
    pub id: String,
    /// The same as `time`, under the name that events of NATS have.
    #[serde(default)]
    pub timestamp: DateTime<Utc>,
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
    Event {
        subject: String,
        body: Vec<u8>,
    },
    /// Tells that what was queued before is with the client.
    Mark(oneshot::Sender<()>),
    /// The same, when it is written.
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// Starts the task that publishes; it ends when the last clone is gone.
    pub fn new(client: async_nats::Client, prefix: &str, site: &str, instance: &str) -> Self {
        let (events, waiting) = Self::queue(prefix, site, instance);
        tokio::spawn(publish(client, waiting));
        events
    }

    fn queue(prefix: &str, site: &str, instance: &str) -> (Self, mpsc::Receiver<Item>) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        let shared = Shared {
            prefix: prefix.to_owned(),
            site: site.to_owned(),
            instance: instance.to_owned(),
            dropped: AtomicU64::new(0),
        };
        (Self { shared: Arc::new(shared), queue }, waiting)
    }

    /// Events for a caller that takes them as subject and body, instead of a server.
    pub fn to(sink: mpsc::UnboundedSender<(String, Vec<u8>)>, prefix: &str, site: &str, instance: &str) -> Self {
        let (events, mut waiting) = Self::queue(prefix, site, instance);
        tokio::spawn(async move {
            while let Some(item) = waiting.recv().await {
                match item {
                    Item::Event { subject, body } => _ = sink.send((subject, body)),
                    Item::Mark(done) | Item::Flush(done) => _ = done.send(()),
                }
            }
        });
        events
    }

    /// Publishes one event.
    pub fn emit(&self, event: Event, replication: &str) {
        let kind = event.kind();
        let Shared { prefix, site, instance, dropped } = &*self.shared;
        let subject = format!("{prefix}.event.{kind}.{replication}");
        let time = Utc::now().trunc_subsecs(3);
        let notice = Notice {
            event,
            replication: replication.to_owned(),
            site: site.clone(),
            instance: instance.clone(),
            time,
            schema_type: format!("io.stream_replicator.event.v1.{}", kind.replace('-', "_")),
            id: nuid::next().to_string(),
            timestamp: time,
        };
        let body = serde_json::to_vec(&notice).unwrap_or_default();
        if self.queue.try_send(Item::Event { subject, body }).is_err() && dropped.fetch_add(1, Ordering::Relaxed) == 0 {
            warn!(replication, kind, "events are dropped: {QUEUE} wait for the control connection");
        }
    }

    /// Events that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything emitted so far is on its way: anything sent later on the same connection arrives after
    /// it.
    pub fn on_the_way(&self) -> impl Future<Output = ()> + Send + 'static {
        let queue = self.queue.clone();
        async move {
            let (done, passed) = oneshot::channel();
            if queue.send(Item::Mark(done)).await.is_ok() {
                let _ = passed.await;
            }
        }
    }

    /// Waits until everything emitted so far has been written to the server.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = written.await;
        }
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
            Item::Mark(done) => _ = done.send(()),
            Item::Flush(done) => {
                if let Err(error) = client.flush().await {
                    debug!("events may not have been written: {error}");
                }
                let _ = done.send(());
            }
        }
    }
}
