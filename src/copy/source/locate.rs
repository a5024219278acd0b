//! Positions in a source stream: found by sequence or by time, over a lane.
//!
//! Messages are read with `STREAM.MSG.GET`, which the leader answers. Work-queue streams allow no second consumer, and
//! on interest streams a consumer keeps messages: both are searched without one.

use chrono::{DateTime, SecondsFormat, Utc};
use nats_lane as nats;
use nats_lane::{
    Dial, Lane, entropy as chance,
    jetstream::{Api, CONSUMER_EXISTS, StoredMessage, StreamInfo, StreamState, TOO_MANY_CONSUMERS},
};
use serde_json::json;
use tokio::time::{Duration, Instant};

use crate::{
    config::Replication,
    copy::{
        Error, ErrorKind,
        flow::window::SourcePoint,
        source::{
            clock::{ClockReading, SourceClock},
            consumers::Names,
            durable::Durable,
            reader::headers_at,
        },
    },
    names,
    store::SourceWitness,
};

/// Average message size in bytes from which messages are not read for their headers or their stored time alone: an
/// extra request costs less.
pub(in crate::copy) const HEAVY: u64 = 32 * 1024;
/// Names of the consumers of a request outside of a run: a run may be under way.
const QUESTION: &str = "p";

/// The requested position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// After this source sequence; 0 is before the first message.
    After(u64),
    /// Before the first message stored at or after this time.
    Time(DateTime<Utc>),
    /// Before the first message that is at most this old, by the clock of the source server.
    Ago(Duration),
}

/// The source's answer for a position.
#[derive(Debug, Clone)]
pub enum Located {
    /// It is in the stream.
    At(Place),
    /// It is after the last message of the stream.
    Beyond {
        /// Last sequence of the stream.
        last_seq: u64,
    },
}

/// A position in a source stream as it is now.
#[derive(Debug, Clone)]
pub struct Place {
    /// The copy continues after it.
    pub position: SourceWitness,
    /// First sequence of the stream.
    pub first_seq: u64,
    /// Last sequence of the stream.
    pub last_seq: u64,
    /// Whether the stream removes copied messages: they cannot be copied again.
    pub forgets: bool,
    /// The source server's time.
    pub now: DateTime<Utc>,
}

impl Place {
    /// How many sequences of the stream are between two positions, after the lower one.
    pub fn between(&self, one: u64, other: u64) -> u64 {
        let before = self.first_seq.saturating_sub(1);
        let in_stream = |seq: u64| seq.clamp(before, self.last_seq.max(before));
        in_stream(one).abs_diff(in_stream(other))
    }
}

/// Asks the source for a position, over a connection of its own. Messages that were removed before the first one are
/// not part of the stream: a position among them is the one before its first message.
pub async fn locate(dial: &dyn Dial, replication: &Replication, consumers: &str, at: At) -> Result<Located, Error> {
    let name = format!("{} {}", names::PROGRAM, replication.id);
    let connected = dial.dial(&replication.source.place, &name).await;
    let mut lane = connected.map_err(Error::of_source)?;
    let stream = &replication.source.stream;
    let sent = Instant::now();
    let info = Api::new(&mut lane).stream_info(stream).await?;
    let received = Instant::now();
    let info = info.ok_or_else(|| Error::new(ErrorKind::Hold, format!("source stream `{stream}` does not exist")))?;
    let clock = SourceClock::new(&ClockReading { sent, received, server: info.ts, local: chance::now() });
    let StreamState { first_seq, last_seq, .. } = info.state;
    let seq = match at {
        At::After(seq) if seq > last_seq => return Ok(Located::Beyond { last_seq }),
        At::After(seq) => seq,
        At::Time(time) => before_time(&mut lane, stream, &info, &Names::new(consumers), time).await?.min(last_seq),
        At::Ago(ago) => {
            let time = clock.ago(Instant::now(), ago);
            before_time(&mut lane, stream, &info, &Names::new(consumers), time).await?.min(last_seq)
        }
    };
    let seq = seq.max(first_seq.saturating_sub(1));
    let mut names = question_names(consumers);
    let SourcePoint { seq, time_ns } = point_at(&mut lane, stream, &info, &mut names, seq).await?;
    // Otherwise a consumer may outlive the connection.
    lane.round_trip().await?;
    let forgets = Durable::is_needed(&info);
    let none_at = info.ts.filter(|_| time_ns.is_none());
    let position = SourceWitness { seq, time_ns, none_at, created: info.created };
    let now = clock.now(Instant::now());
    Ok(Located::At(Place { position, first_seq, last_seq, forgets, now }))
}

/// Names of the consumers for a request outside of a run.
pub(in crate::copy) fn question_names(consumers: &str) -> Names {
    Names::new(&format!("{consumers}_{QUESTION}"))
}

/// The sequence before the first message stored at or after a time: a consumer finds it at the server. A stream that
/// removes acknowledged messages allows no consumer for a question, and is searched; so is one without room for
/// consumers.
pub(crate) async fn before_time(
    lane: &mut Lane,
    stream: &str,
    info: &StreamInfo,
    names: &Names,
    time: DateTime<Utc>,
) -> Result<u64, nats::Error> {
    if Durable::is_needed(info) {
        return search_time(lane, stream, &info.state, time).await;
    }
    let name = names.by_time();
    let config = json!({
        "name": name,
        "deliver_policy": "by_start_time",
        "opt_start_time": time.to_rfc3339_opts(SecondsFormat::Nanos, true),
        "ack_policy": "none",
        "inactive_threshold": 5_000_000_000u64,
        "num_replicas": 1,
        "mem_storage": true,
        "metadata": { "run": chance::name() },
    });
    let mut api = Api::new(lane);
    match api.create_new_consumer(stream, &name, &config).await {
        Ok(created) => {
            api.delete_consumer(stream, &name).await?;
            Ok(created.delivered.stream_seq)
        }
        Err(error) if error.is_api(TOO_MANY_CONSUMERS) || error.is_api(CONSUMER_EXISTS) => {
            search_time(lane, stream, &info.state, time).await
        }
        Err(error) => Err(error),
    }
}

/// The same by a binary search: one request for each halving of the stream.
pub(in crate::copy) async fn search_time(
    lane: &mut Lane,
    stream: &str,
    state: &StreamState,
    time: DateTime<Utc>,
) -> Result<u64, nats::Error> {
    let time_ns = time.timestamp_nanos_opt().unwrap_or(i64::MAX);
    // Everything below `low` was stored before the time, no message from `high` on.
    let (mut low, mut high) = (state.first_seq.max(1), state.last_seq + 1);
    // The first message from `high` on: sequences before it may be empty.
    let mut first = high;
    while low < high {
        let middle = low + (high - low) / 2;
        match Api::new(lane).message_from(stream, middle).await? {
            Some(found) if found.time_ns < time_ns => low = found.sequence + 1,
            found => {
                high = middle;
                first = found.map_or(state.last_seq + 1, |found| found.sequence);
            }
        }
    }
    Ok(first - 1)
}

/// Stored time of the newest message that a stream still has, by a binary search.
pub(in crate::copy) async fn newest_time(
    lane: &mut Lane,
    stream: &str,
    state: &StreamState,
) -> Result<Option<i64>, nats::Error> {
    let (mut low, mut high) = (state.first_seq.max(1), state.last_seq + 1);
    let mut newest = None;
    while low < high {
        let middle = low + (high - low) / 2;
        match Api::new(lane).message_from(stream, middle).await? {
            Some(found) => (low, newest) = (found.sequence + 1, Some(found.time_ns)),
            None => high = middle,
        }
    }
    Ok(newest)
}

/// A sequence and the stored time of the message there.
pub(in crate::copy) async fn point_at(
    lane: &mut Lane,
    stream: &str,
    info: &StreamInfo,
    names: &mut Names,
    seq: u64,
) -> Result<SourcePoint, nats::Error> {
    if seq == 0 {
        return Ok(SourcePoint::default());
    }
    let message = message_at(lane, stream, info, names, seq).await?;
    Ok(SourcePoint { seq, time_ns: message.map(|message| message.time_ns) })
}

/// The message at a sequence, read from the stream's leader. The payload of a large message is not transferred if a
/// consumer can be used for that: a work queue or an interest stream allows none.
pub(in crate::copy) async fn message_at(
    lane: &mut Lane,
    stream: &str,
    info: &StreamInfo,
    names: &mut Names,
    seq: u64,
) -> Result<Option<StoredMessage>, nats::Error> {
    let StreamState { first_seq, last_seq, .. } = info.state;
    if is_heavy(info) && (first_seq..=last_seq).contains(&seq) {
        match headers_at(lane, stream, names, seq).await {
            Ok(Some(found)) => return Ok(Some(found)),
            Ok(None) => {}
            Err(error) if error.is_api(TOO_MANY_CONSUMERS) || error.is_api(CONSUMER_EXISTS) => {}
            Err(error) => return Err(error),
        }
    }
    Api::new(lane).message(stream, seq).await
}

/// Whether messages of the stream are too large to be read for their headers alone, and a consumer may show those.
pub(in crate::copy) fn is_heavy(info: &StreamInfo) -> bool {
    average_bytes(&info.state) >= HEAVY && !Durable::is_needed(info)
}

/// Average size of a stream's messages, bytes.
pub(in crate::copy) fn average_bytes(state: &StreamState) -> u64 {
    state.bytes.checked_div(state.messages).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_stream_has_is_counted() {
        let check = |first_seq, last_seq, one, other, expect| {
            let position = SourceWitness { seq: 0, time_ns: None, none_at: None, created: String::new() };
            let place = Place { position, first_seq, last_seq, forgets: false, now: DateTime::UNIX_EPOCH };
            assert_eq!(place.between(one, other), expect, "{first_seq}..{last_seq} {one} {other}");
            assert_eq!(place.between(other, one), expect);
        };
        check(1, 100, 0, 100, 100);
        check(1, 100, 10, 100, 90);
        check(51, 100, 0, 60, 10);
        check(51, 100, 0, 50, 0);
        check(51, 100, 60, 900, 40);
        check(0, 0, 0, 7, 0); // never had a message
        check(101, 100, 0, 100, 0); // has none any more
    }
}
