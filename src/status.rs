//! What a replication says about itself: one [`Row`] per replication, the same in `replicator.status`, in
//! the position record and, as numbers, in the metrics. Field names are the wire contract.

mod drift;
mod verification;

use chrono::{DateTime, TimeDelta, Utc};
use nats_lane::entropy;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::drift::{DriftSetting, GroupDrift, KnownDrift, setting_words};
pub use self::verification::{
    DifferenceExample, DifferenceKind, DifferenceSummary, ExpectedCause, RepairResult, SequenceRange, Verification,
    VerificationResult, VerificationState, VerificationSummary,
};

/// One replication as its leader sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// Replication id.
    pub replication: String,
    /// State of the replication.
    pub state: State,
    /// Where its document is: `kv`, the configuration bucket, or `file`, the file of an instance.
    pub origin: String,
    /// Instance that runs it; `null` while none does.
    pub leader: Option<String>,
    /// Grows with every new holder.
    pub epoch: u64,
    /// KV revision of the document that runs.
    pub config_revision: u64,
    /// What the copy says.
    #[serde(flatten)]
    pub copy: CopyStatus,
    /// The last comparison of both streams; `null` where there was none.
    #[serde(default)]
    pub verify: Option<VerificationSummary>,
    /// Action for the operator, in short; `null` where none is needed.
    #[serde(rename = "do", default)]
    pub todo: Option<String>,
}

impl Row {
    /// The source server's time when the host clock of the instance that wrote the row shows `host`.
    pub fn source_time(&self, host: DateTime<Utc>) -> DateTime<Utc> {
        host.checked_add_signed(self.clock_offset()).unwrap_or(host)
    }

    /// What the host clock of the instance that wrote the row shows when the source server's time is `source`.
    pub fn host_time(&self, source: DateTime<Utc>) -> DateTime<Utc> {
        source.checked_sub_signed(self.clock_offset()).unwrap_or(source)
    }

    fn clock_offset(&self) -> TimeDelta {
        let ahead = self.copy.source.clock_offset_seconds.unwrap_or_default();
        TimeDelta::try_milliseconds((ahead * 1e3) as i64).unwrap_or_default()
    }

    /// Brings everything that depends on the time up to `now`, the source server's time: to be called when a row is read.
    pub fn at(&mut self, now: DateTime<Utc>) {
        let copy = &mut self.copy;
        if let Some(lag) = &mut copy.lag {
            let passed = lag.at(now);
            if let Some(headroom) = &mut copy.headroom {
                headroom.seconds = (headroom.seconds - passed).max(0.0);
            }
        }
        self.todo = self.advice();
    }

    /// The leader is gone, or has not reported for itself yet: so are its connections and what was in flight, and whether
    /// nothing waits any more is not known.
    pub fn not_running(&mut self) {
        let Self { copy, .. } = self;
        (copy.source.connected, copy.target.connected) = (false, false);
        copy.in_flight = InFlight::default();
        copy.lag = copy.lag.filter(|lag| lag.messages > 0);
        if copy.lag.is_none() {
            (copy.source.first_seq, copy.source.last_seq) = (None, None);
        }
    }

    /// Whether it is known up to where everything is settled; otherwise the position is 0 only because nothing is known.
    pub fn knows_position(&self) -> bool {
        self.leader.is_some() || self.copy.position.source_seq > 0
    }

    fn advice(&self) -> Option<String> {
        let error = self.copy.last_error.as_ref().filter(|error| error.current);
        let low = self.copy.headroom.is_some_and(|headroom| headroom.seconds < headroom.low_below);
        let advice = match (self.state, error) {
            (State::Held, Some(LastError { source_seq: Some(seq), .. })) => {
                return Some(format!("let the target take source message {seq}, or skip it: `skip`"));
            }
            (State::Held, Some(error)) if error.kind == "gone" => {
                "nothing if the stream returns: it resumes then; otherwise delete this replication"
            }
            (State::Held, _) => "fix the cause that `last_error` names; it is tried every 10 s, at once with `retry`",
            (State::Invalid, _) => "correct the document: `last_error` names its problems",
            (State::Running | State::Paused, Some(error)) if error.kind == "invalid" => {
                "correct the newest revision of the document: `last_error` names its problems"
            }
            (State::Retrying, _) => {
                "nothing if it ends within minutes; otherwise check the server that `last_error` names"
            }
            (State::Stopped, _) => "nothing if an instance takes it over soon; otherwise check `instances`",
            (State::Paused, _) if low => {
                "`resume` it, or give the source stream more room: it will soon remove messages"
            }
            (State::Paused, _) => "`resume` it when it should continue",
            (State::Running, _) if low => "give the source stream more room, or find the reason why the copy is slow",
            (State::Starting | State::Running, _) => return None,
        };
        Some(advice.to_owned())
    }
}

/// Where a document lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// In the configuration bucket.
    Kv,
    /// In the file of the site, `serve --config`.
    File,
    /// Nowhere.
    #[default]
    None,
}

impl Origin {
    /// As on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::File => "file",
            Self::None => "none",
        }
    }
}

/// Where the document of a replication is, by its revision: `kv`, the configuration bucket, or `file`, the file of an
/// instance, whose documents have revision 0.
pub fn origin(revision: u64) -> &'static str {
    if revision == 0 { "file" } else { "kv" }
}

/// State of a replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Connecting, or determining where to resume, for the first time: after an error it stays `retrying` or `held`.
    Starting,
    /// Copying, or waiting for messages to copy.
    Running,
    /// Stopped by request, position kept.
    Paused,
    /// A run ended with a transient error, and none since has copied or found nothing to copy.
    Retrying,
    /// A cause that only an operator or the target can remove; tried again slowly, and `held` meanwhile.
    Held,
    /// The document cannot run.
    Invalid,
    /// Not running here and not going to by itself.
    Stopped,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Starting, Self::Running, Self::Paused, Self::Retrying, Self::Held, Self::Invalid, Self::Stopped];
}

/// The part of a row that the copy path fills in.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CopyStatus {
    /// Source stream.
    pub source: SourceStatus,
    /// Target stream.
    pub target: TargetStatus,
    /// The settled position.
    pub position: Position,
    /// How far it lags behind; `null` where the source has not been asked or does not answer.
    pub lag: Option<Lag>,
    /// How long the source still keeps messages that are not copied yet; `null` where nothing lags, nothing limits the
    /// source, or it is not known.
    pub headroom: Option<Headroom>,
    /// How messages go to the target.
    pub transport: Transport,
    /// Whether others write to the target.
    pub target_mode: TargetMode,
    /// Effect on the order when the target refuses a message.
    pub ordering: Ordering,
    /// Read and not settled.
    pub in_flight: InFlight,
    /// Totals since this leader began.
    pub counters: Counters,
    /// State of sampling; `null` without it.
    pub sampling: Option<SamplingStatus>,
    /// The consumers that the document names in `consumers`; `null` if it names none, and before the first pass over them.
    pub consumers: Option<ConsumersStatus>,
    /// Messages that only the target still has since the source lost them; `null` where no loss is known.
    pub only_at_target: Option<OnlyAtTarget>,
    /// The last error; kept when it is over, with `current` as `false`.
    pub last_error: Option<LastError>,
    /// Time from read to settled; a metric only.
    #[serde(skip)]
    pub processing: Histogram,
    /// Totals that only metrics show.
    #[serde(skip)]
    pub metered: Metered,
}

/// Copies of messages that the source lost: only the target still has them. The ranges are those of the newest loss;
/// messages in them that were never copied are not at the target either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct OnlyAtTarget {
    /// First source sequence of these messages.
    pub from: u64,
    /// Last source sequence of these messages.
    pub to: u64,
    /// First target sequence of these copies.
    pub target_from: u64,
    /// Last target sequence of these copies.
    pub target_to: u64,
    /// How many copies there are; at least, where the target is long and has nothing that the source still has.
    pub messages: u64,
}

/// Source side of a row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SourceStatus {
    /// Stream name.
    pub stream: String,
    /// Name of the server that the lane is connected to.
    pub server: String,
    /// Whether the lane is up.
    pub connected: bool,
    /// First sequence of the stream, from the same check as `lag`; `null` where that is.
    pub first_seq: Option<u64>,
    /// Last sequence of the stream, from the same check as `lag`; `null` where that is.
    pub last_seq: Option<u64>,
    /// Offset of the clock of the stream leader's server to the clock of the instance's host, seconds, when last
    /// measured; negative where it is slow. Ages are measured by the server's clock. `null` where it is not known.
    pub clock_offset_seconds: Option<f64>,
}

/// Target side of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TargetStatus {
    /// Stream name.
    pub stream: String,
    /// Name of the server that the lane is connected to.
    pub server: String,
    /// Whether the lane is up.
    pub connected: bool,
    /// Last sequence of the stream that we know of; `null` before the first run.
    pub last_seq: Option<u64>,
}

/// The source sequence up to which everything is settled, and the newest message of ours at the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Position {
    /// Source sequence.
    pub source_seq: u64,
    /// Target sequence; 0 while none of ours is known to be there.
    pub target_seq: u64,
}

/// How far it lags behind the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lag {
    /// Messages in scope that are not settled.
    pub messages: u64,
    /// Age of the oldest of them at the time of the answer, seconds; 0 when there is none, `null` when it is not known.
    pub seconds: Option<f64>,
    /// Stored time of the oldest of them; absent when there is none or it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest: Option<DateTime<Utc>>,
}

impl Lag {
    /// So many messages wait, the oldest of them stored at `oldest`, as seen at `now`, the source's time.
    pub fn new(messages: u64, oldest: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Self {
        let mut lag = Self { messages, seconds: None, oldest: oldest.filter(|_| messages > 0) };
        lag.at(now);
        lag
    }

    /// Counts the seconds up to `now`; returns how many passed since they were counted last.
    fn at(&mut self, now: DateTime<Utc>) -> f64 {
        let seconds = match self.oldest {
            _ if self.messages == 0 => Some(0.0),
            Some(oldest) => Some(seconds_between(oldest, now)),
            // As an older program left it, which saved no time.
            None => self.seconds,
        };
        let passed = seconds.zip(self.seconds).map_or(0.0, |(now, before)| (now - before).max(0.0));
        self.seconds = seconds;
        passed
    }
}

/// Seconds from the stored time of a message to `now`, which is the source's time; none for one that is younger.
pub fn seconds_between(stored: DateTime<Utc>, now: DateTime<Utc>) -> f64 {
    (now - stored).as_seconds_f64().max(0.0)
}

/// How long the source still keeps the oldest message that is not copied yet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Headroom {
    /// Until the source removes it, seconds.
    pub seconds: f64,
    /// The limit that will remove it.
    pub limit: RetentionLimit,
    /// Below this, seconds, it is low: the event `headroom-low` is published.
    pub low_below: f64,
}

/// The limit by which a stream removes messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RetentionLimit {
    /// `max_age`.
    Age,
    /// `max_msgs`.
    Messages,
    /// `max_bytes`.
    Bytes,
}

/// How messages go to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// ADR-50 fast-ingest batches.
    FastIngest,
    /// One publish with an ack per message, many in flight.
    #[default]
    Pipelined,
    /// The target's server takes them as a mirror, over a leafnode connection.
    Feed,
}

/// Whether others write to the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TargetMode {
    /// There are no other writers.
    #[default]
    Exclusive,
    /// There may be other writers.
    Shared,
}

/// Effect on the order when the target refuses a message while others are in flight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// The refused message comes after those that were in flight with it.
    #[default]
    Relaxed,
    /// Nothing.
    Strict,
}

/// Read and not settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct InFlight {
    /// Messages.
    pub messages: u64,
    /// Bytes of their subjects, headers and payloads.
    pub bytes: u64,
}

/// Totals since this leader began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Counters {
    /// Messages read.
    pub received: u64,
    /// Bytes of subject, headers and payload read.
    pub received_bytes: u64,
    /// Messages stored at the target.
    pub copied: u64,
    /// Bytes of those, as they were read.
    pub copied_bytes: u64,
    /// Bytes of skipped messages, as they were read.
    pub skipped_bytes: u64,
    /// Skipped by sampling.
    pub skipped_sampled: u64,
    /// Skipped because older than `max_age`.
    pub skipped_old: u64,
    /// Skipped by a filter.
    pub skipped_filtered: u64,
    /// Skipped because they returned through a replication loop.
    pub skipped_loop: u64,
    /// Skipped, by request or by `on_reject`, because the target can never store them.
    pub skipped_refused: u64,
    /// Descriptions of objects skipped because the target does not have all of their chunks.
    pub skipped_incomplete: u64,
    /// Published to the dead letter subject.
    pub dead_lettered: u64,
    /// Source messages that were gone before they were read.
    pub gap_messages: u64,
    /// Copies that the target removed by its limits while the source still had the messages.
    pub target_dropped: u64,
    /// Saves of the position that failed.
    pub position_save_errors: u64,
    /// Headers removed because they would not have the effect that they have at the source.
    pub headers_removed: u64,
    /// Messages that the target refused.
    pub refused: u64,
    /// Source consumers recreated after the first.
    pub consumers_recreated: u64,
    /// Runs that ended with an error.
    pub errors: u64,
    /// The part that was recreated to end a stall, or after a transient error.
    pub repairs: Repairs,
}

/// Totals since this leader began that only metrics show, as Choria's replicator counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Metered {
    /// Payload bytes of the messages read.
    pub received_payload: u64,
    /// Payload bytes of the messages stored at the target.
    pub copied_payload: u64,
    /// Payload bytes of the messages skipped.
    pub skipped_payload: u64,
    /// Source consumers created, the first one included.
    pub consumers: u64,
    /// Gossip about senders that was received from other replicators.
    pub gossip: u64,
}

/// The consumers of the source that are kept at the target, as the last pass left them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ConsumersStatus {
    /// How many of them are not kept there, and one more if the last pass was not completed.
    pub failing: u64,
    /// Why, for at most 20 of these, by name.
    pub errors: Vec<ConsumerError>,
}

/// Why a consumer is not kept at the target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ConsumerError {
    /// Its name; `null` where the last pass over all of them was not completed.
    pub consumer: Option<String>,
    /// The reason.
    pub message: String,
}

/// State of sampling. Totals are since this leader started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SamplingStatus {
    /// Senders that are known.
    pub senders: u64,
    /// Messages that name no sender; they are copied.
    pub without_sender: u64,
    /// Messages whose sender is not tracked, because there are as many as `limits.senders` and `limits.sender_bytes`
    /// allow; they are copied.
    pub untracked: u64,
    /// Messages copied because they say so themselves.
    pub forced: u64,
    /// Advisories that were published, and confirmed if they are reliable, by event.
    pub advised: Advised,
    /// Advisories that wait to be published or confirmed.
    pub advisories_waiting: u64,
    /// Advisories that were dropped because too many waited.
    pub advisories_dropped: u64,
    /// Attempts to publish an advisory that failed, by event.
    pub advisory_errors: Advised,
    /// Why an advisory was not published or not confirmed, as long as that is so; else `null`.
    pub advisory_error: Option<String>,
    /// Records of senders written.
    pub records_written: u64,
    /// How long ago everything known of senders was written last, seconds; 0 while all of it is.
    pub write_lag_seconds: f64,
}

/// Advisories by event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Advised {
    /// Senders seen for the first time.
    pub new: u64,
    /// Senders unseen for `warn_duration`.
    pub timeout: u64,
    /// Senders seen again after that.
    pub recover: u64,
    /// Senders unseen for `inspect_duration`, and forgotten.
    pub expire: u64,
}

/// How often each step of a repair was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Repairs {
    /// The consumer at the source, inside a run.
    pub consumer: u64,
    /// Both connections, by ending the run.
    pub connections: u64,
    /// Everything, the claim of the record included.
    pub everything: u64,
}

/// The last error of a replication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LastError {
    /// When it happened.
    pub at: DateTime<Utc>,
    /// How it can be resolved: `retry` it is transient and tried again soon, `hold` an operator or the target has to
    /// change something, `superseded` another instance runs the replication, `invalid` the document cannot run.
    #[schemars(extend("enum" = Self::KINDS))]
    pub kind: String,
    /// Description, without secrets.
    pub message: String,
    /// Whether it is still so; `false` once it is over.
    #[serde(default = "yes")]
    pub current: bool,
    /// Source sequence of the message that can never be stored, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_seq: Option<u64>,
    /// Stored time of that message, nanoseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_time_ns: Option<i64>,
    /// Subject of that message, where it was read again after the target refused it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_subject: Option<String>,
    /// Bytes of subject, headers and payload of that message, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_bytes: Option<u64>,
}

impl LastError {
    /// All that `kind` can be.
    pub const KINDS: [&str; 5] = ["retry", "hold", "superseded", "invalid", "gone"];

    /// One of these kinds that happens now and is about no message. What is too long for a row is cut.
    pub fn now(kind: &str, message: &str) -> Self {
        Self {
            at: entropy::now(),
            kind: kind.to_owned(),
            message: shortened(message),
            current: true,
            source_seq: None,
            source_time_ns: None,
            source_subject: None,
            source_bytes: None,
        }
    }

    /// What a copy that runs proves to be over: everything but a wrong document.
    pub fn ran(&mut self) {
        self.current &= self.kind == "invalid";
    }
}

/// Bytes of the text of an error in a row, at most. A row is saved and shown with others in one message.
const LONGEST_ERROR: usize = 4096;

fn shortened(text: &str) -> String {
    match text.len() {
        0..=LONGEST_ERROR => text.to_owned(),
        length => format!("{}... ({length} bytes)", nats_lane::beginning(text, LONGEST_ERROR)),
    }
}

/// An older program does not say whether an error is over.
fn yes() -> bool {
    true
}

/// Times in seconds, counted in fixed buckets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Observations per bucket of [`Histogram::BOUNDS`] (not cumulative); the last one is above all bounds.
    pub counts: [u64; Histogram::BOUNDS.len() + 1],
    /// Sum of all observations.
    pub sum: f64,
}

impl Histogram {
    /// Upper bounds, seconds.
    pub const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0];

    /// Counts `times` observations of `seconds`.
    pub fn observe(&mut self, seconds: f64, times: u64) {
        let bucket = Self::BOUNDS.partition_point(|bound| *bound < seconds);
        self.counts[bucket] += times;
        self.sum += seconds * times as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
    }

    fn row(state: State, lag: Option<Lag>) -> Row {
        Row {
            replication: "ORDERS".to_owned(),
            state,
            origin: "kv".to_owned(),
            leader: Some("one".to_owned()),
            epoch: 1,
            config_revision: 1,
            copy: CopyStatus { lag, ..CopyStatus::default() },
            verify: None,
            todo: None,
        }
    }

    #[test]
    fn the_age_of_what_waits_is_counted_when_it_is_read() {
        let waits = Lag::new(5, Some(time(0)), time(3));
        assert_eq!(waits.seconds, Some(3.0));
        let mut row = row(State::Held, Some(waits));
        row.copy.headroom = Some(Headroom { seconds: 50.0, limit: RetentionLimit::Age, low_below: 10.0 });
        // As it is saved and read elsewhere.
        let mut row: Row = serde_json::from_value(serde_json::to_value(row).unwrap()).unwrap();
        for (now, lag, headroom) in
            [(3, 3.0, 50.0), (10, 10.0, 43.0), (10, 10.0, 43.0), (9, 9.0, 43.0), (90, 90.0, 0.0)]
        {
            row.at(time(now));
            let left = row.copy.headroom.map(|headroom| headroom.seconds);
            assert_eq!((row.copy.lag.and_then(|lag| lag.seconds), left), (Some(lag), Some(headroom)), "{now}");
        }
        // A source whose clock is ahead.
        row.at(time(-5));
        assert_eq!(row.copy.lag.and_then(|lag| lag.seconds), Some(0.0));
    }

    /// The record may be written by hand.
    #[test]
    fn an_impossible_clock_offset_is_none() {
        let mut row = row(State::Running, None);
        for offset in [1e300, -1e300, 1e15, -1e15, f64::NAN] {
            row.copy.source.clock_offset_seconds = Some(offset);
            assert_eq!((row.source_time(time(1)), row.host_time(time(2))), (time(1), time(2)), "{offset}");
        }
        row.copy.source.clock_offset_seconds = Some(1.5);
        assert_eq!(row.source_time(time(1)), time(1) + TimeDelta::milliseconds(1500));
    }

    #[test]
    fn a_long_error_is_cut() {
        let error = LastError::now("retry", &"\u{e9}".repeat(100_000));
        assert!(error.message.len() < LONGEST_ERROR + 32 && error.message.ends_with("... (200000 bytes)"));
        assert_eq!(LastError::now("retry", "why").message, "why");
    }

    #[test]
    fn what_is_not_known_is_no_number() {
        let seconds = |messages, oldest| Lag::new(messages, oldest, time(3)).seconds;
        assert_eq!((seconds(0, None), seconds(0, Some(time(0))), seconds(5, None)), (Some(0.0), Some(0.0), None));
        let json = serde_json::to_value(row(State::Starting, None)).unwrap();
        for field in ["/lag", "/source/first_seq", "/source/last_seq", "/target/last_seq", "/headroom", "/do"] {
            assert_eq!(json.pointer(field), Some(&serde_json::Value::Null), "{field} of {json}");
        }
        let json = serde_json::to_value(Lag::new(0, None, time(0))).unwrap();
        assert_eq!(json, serde_json::json!({"messages": 0, "seconds": 0.0}));
    }

    #[test]
    fn a_row_of_an_older_program_is_read() {
        let mut json = serde_json::to_value(row(State::Retrying, None)).unwrap();
        json.as_object_mut().unwrap().remove("do");
        json["lag"] = serde_json::json!({"messages": 5, "seconds": 1.5});
        json["source"]["last_seq"] = 10.into();
        json["last_error"] = serde_json::json!({"at": time(0), "kind": "retry", "message": "timed out"});
        let mut row: Row = serde_json::from_value(json).unwrap();
        row.at(time(100));
        assert_eq!((row.copy.lag.and_then(|lag| lag.seconds), row.copy.source.last_seq), (Some(1.5), Some(10)));
        assert!(row.copy.last_error.is_some_and(|error| error.current));
    }

    #[test]
    fn without_a_leader_it_is_not_known_that_nothing_waits() {
        let mut caught_up = row(State::Stopped, Some(Lag::new(0, None, time(0))));
        caught_up.copy.source = SourceStatus { connected: true, last_seq: Some(10), ..SourceStatus::default() };
        caught_up.copy.in_flight = InFlight { messages: 3, bytes: 30 };
        caught_up.not_running();
        let CopyStatus { lag, source, in_flight, .. } = caught_up.copy;
        assert_eq!((lag, source.connected, source.last_seq), (None, false, None));
        assert_eq!(in_flight, InFlight::default());
        let mut behind = row(State::Stopped, Some(Lag::new(5, Some(time(0)), time(0))));
        behind.not_running();
        behind.at(time(60));
        assert_eq!(behind.copy.lag.and_then(|lag| lag.seconds), Some(60.0));
    }

    #[test]
    fn what_to_do_follows_from_the_state_and_the_error() {
        let advice = |state, kind: &str, source_seq| {
            let mut row = row(state, None);
            row.copy.last_error = Some(LastError { source_seq, ..LastError::now(kind, "why") });
            row.at(time(0));
            row.todo
        };
        assert_eq!(
            advice(State::Held, "hold", Some(7)).as_deref(),
            Some("let the target take source message 7, or skip it: `skip`")
        );
        assert!(advice(State::Held, "hold", None).is_some_and(|text| text.contains("`retry`")));
        assert!(advice(State::Held, "gone", None).is_some_and(|text| text.contains("returns")));
        assert!(advice(State::Running, "invalid", None).is_some_and(|text| text.contains("document")));
        assert_eq!(advice(State::Running, "retry", None), None);
        assert_eq!(advice(State::Starting, "retry", None), None);
    }

    #[test]
    fn copying_ends_an_error_but_not_that_of_a_document() {
        let after = |kind| {
            let mut error = LastError::now(kind, "why");
            error.ran();
            error.current
        };
        assert_eq!(LastError::KINDS.map(after), [false, false, false, true, false]);
    }
}
