//! Peeks at the source of a replication that does not run: the waiting messages, and when they will be removed. Over a
//! connection of its own, which is closed at once.

use chrono::DateTime;
use nats_lane::{
    Dial, Lane, Turn, entropy as chance,
    jetstream::{Api, StoredMessage, StreamInfo},
};
use tokio::time::{Duration, Instant, timeout};

use crate::{
    config::Replication,
    copy::{
        Budget, Error, ErrorKind,
        source::{
            clock::{ClockReading, SourceClock},
            consumers::Names,
            durable::Durable,
            locate::average_bytes,
            reader::{Range, Reader},
            retention::{Oldest, Outlook, PollHistory, Retention, Waiting},
        },
    },
    names,
    status::Lag,
};

/// Bytes to read ahead: the headers of the first messages.
const AHEAD: usize = 64 * 1024;
/// Time for the first message that waits.
const FIRST: Duration = Duration::from_secs(5);

/// Average message size, bytes, up to which a message is read for its stored time alone.
const LARGEST: u64 = 1 << 20;

/// Sequence and stored time (ns) of the first waiting message.
type FirstWaiting = (u64, i64);

/// The result.
#[derive(Debug, Clone, Copy)]
pub struct SourcePeek {
    /// Messages in scope after the position.
    pub lag: Lag,
    /// First sequence of the stream.
    pub first_seq: u64,
    /// Last sequence of the stream; it agrees with the lag.
    pub last_seq: u64,
    /// How long the oldest of them will still be there; [`Outlook::Safe`] if none waits.
    pub outlook: Outlook,
    /// How long the source keeps a message that comes now, seconds, as an estimate; `None` where none is removed.
    pub kept: Option<f64>,
    /// How far the source server's clock is ahead of ours, seconds; `None` where the server does not report its time.
    pub clock_offset: Option<f64>,
}

/// Reads the state of the source after a position. `looks` keeps the earlier states. Names of consumers begin with
/// `consumers`.
pub async fn peek(
    dial: &dyn Dial,
    replication: &Replication,
    consumers: &str,
    position: u64,
    polls: &mut PollHistory,
) -> Result<SourcePeek, Error> {
    let name = format!("{} {}", names::PROGRAM, replication.id);
    let mut lane = dial.dial(&replication.source.place, &name).await?;
    let stream = &replication.source.stream;
    let mut names = Names::clear_of_check(&mut lane, stream, consumers).await?;
    let sent = Instant::now();
    let info = Api::new(&mut lane).stream_info(stream).await?;
    let info = info.ok_or_else(|| Error::new(ErrorKind::Hold, format!("source stream `{stream}` does not exist")))?;
    let (received, local) = (Instant::now(), chance::now());
    let clock = SourceClock::new(&ClockReading { sent, received, server: info.ts, local });
    let clock_offset = clock.offset(received, local);
    let retention = Retention::of(&info);
    polls.add(Instant::now(), info.state.clone());
    let kept = polls.kept(&retention);
    let (pending, first) = if Durable::is_needed(&info) {
        of_durable(&mut lane, replication, &info, position).await?
    } else {
        of_stream(&mut lane, replication, &mut names, position).await?
    };
    let now = clock.now(Instant::now());
    let all = replication.scope.filters().is_empty();
    let (counted, seen) = first.map_or((0, 0), |(seq, _)| (pending, seq + pending.saturating_sub(1)));
    let Waiting { last_seq, messages } = Waiting::of(&info.state, all && first.is_some(), position, counted, seen);
    let oldest = first.map(|(_, time_ns)| DateTime::from_timestamp_nanos(time_ns));
    let lag = Lag::new(messages, oldest, now);
    let outlook = match first {
        Some((seq, _)) => polls.outlook(&retention, &Oldest { seq, age: lag.seconds.map(Duration::from_secs_f64) }),
        None if pending > 0 => Outlook::Unknown,
        None => Outlook::Safe,
    };
    Ok(SourcePeek { lag, first_seq: info.state.first_seq, last_seq, outlook, kept, clock_offset })
}

/// How many messages in scope wait after a position, and the first of them: an ephemeral consumer counts and shows them.
async fn of_stream(
    lane: &mut Lane,
    replication: &Replication,
    names: &mut Names,
    position: u64,
) -> Result<(u64, Option<FirstWaiting>), Error> {
    let (stream, filters) = (&replication.source.stream, replication.scope.filters());
    let range = Range { stream, filters, from: position + 1, headers_only: true };
    let mut reader = Reader::open(lane, &range, names, AHEAD).await?;
    let pending = reader.pending();
    let first = timeout(FIRST, first(lane, &mut reader)).await;
    reader.close(lane);
    let _ = timeout(FIRST, lane.round_trip()).await;
    let first = first.map_err(|_| Error::new(ErrorKind::Retry, format!("nothing came for {FIRST:?}")))??;
    Ok((pending, first))
}

/// The same for a stream that removes acknowledged messages: by its durable consumer and a read of the message, unless
/// messages are large. A work queue allows no second consumer. On an interest stream the end of a second one would
/// remove what the others do not want: on servers before 2.14 that is everything up to the ack floor of a consumer that is
/// ahead of a stream which lost its end, so messages that were not copied yet.
async fn of_durable(
    lane: &mut Lane,
    replication: &Replication,
    info: &StreamInfo,
    position: u64,
) -> Result<(u64, Option<FirstWaiting>), Error> {
    let (stream, filters) = (&replication.source.stream, replication.scope.filters());
    let mut api = Api::new(lane);
    let mut consumer = None;
    for name in Durable::names(replication) {
        consumer = api.consumer_info(stream, &name).await?;
        if consumer.is_some() {
            break;
        }
    }
    let known = consumer.filter(|consumer| consumer.delivered.stream_seq <= info.state.last_seq);
    let pending = match known {
        Some(consumer) => consumer.num_pending.saturating_add(consumer.num_ack_pending),
        None if filters.is_empty() => info.state.messages,
        None => {
            let message = format!("no consumer counts the waiting messages of stream `{stream}`");
            return Err(Error::new(ErrorKind::Retry, message));
        }
    };
    let mut first: Option<FirstWaiting> = None;
    if pending > 0 && average_bytes(&info.state) <= LARGEST {
        let all = [">".to_owned()];
        for filter in if filters.is_empty() { &all } else { filters } {
            let each = |message: StoredMessage| {
                let found = (message.sequence, message.time_ns);
                first = Some(first.map_or(found, |known| known.min(found)));
            };
            api.messages_of(stream, filter, [position + 1], each).await?;
        }
    }
    Ok((pending, first))
}

/// Sequence and stored time of the first message, if there is one.
async fn first(lane: &mut Lane, reader: &mut Reader) -> Result<Option<FirstWaiting>, Error> {
    let budget = Budget::new(usize::MAX);
    while reader.pending() > 0 {
        if let Some(incoming) = reader.peek() {
            return Ok(Some((incoming.delivery.stream_seq, incoming.delivery.time_ns)));
        }
        reader.pull(lane, &budget);
        if let Turn::Received(batch) = lane.turn().await? {
            reader.accept(batch).map_err(|lost| lost.error)?;
        }
    }
    Ok(None)
}
