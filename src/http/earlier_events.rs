//! The events from before the start of this process, where a stream keeps them.

use async_nats::jetstream::{
    self,
    context::ContextBuilder,
    stream::{RawMessageErrorKind, Stream},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::time::{Duration, sleep};
use tracing::debug;

use super::{Sources, recent_events};

/// Deadline for one answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Pause before the stream is tried again: at the first start of a group it is created meanwhile.
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is tried. A login that may not read it gets no answer at all.
const TRIES: usize = 10;
/// After so many tries, a stream of another name is searched: that needs one more permission.
const OWN_FIRST: usize = 5;
/// Messages that are asked for at once.
const AT_ONCE: usize = 20;

/// The name of the stream and its last events, oldest first; `None` where there is no stream, or none that may be read.
pub(super) async fn read(sources: &Sources) -> Option<(String, Vec<Bytes>)> {
    let context = ContextBuilder::new().timeout(ANSWER_WITHIN).api_prefix(&sources.api_prefix);
    let context = context.build(sources.client.clone());
    let mut tries = 0;
    while tries < TRIES {
        // While there is no connection, nothing was tried.
        tries += usize::from(sources.connected());
        if let Some(name) = name(&context, sources, tries > OWN_FIRST).await
            && let Some(events) = last(&context, &name).await
        {
            debug!(stream = name, events = events.len(), "earlier events are shown");
            return Some((name, events));
        }
        sleep(AGAIN).await;
    }
    debug!("earlier events are not shown: no stream that keeps them can be read");
    None
}

/// The service's own stream, or else the one that an operator made for the events.
async fn name(context: &jetstream::Context, sources: &Sources, any: bool) -> Option<String> {
    let own = format!("{}_EVENTS", sources.bucket_prefix);
    let subject = format!("{}.event.>", sources.prefix);
    match context.get_stream(&own).await {
        Ok(_) => Some(own),
        Err(_) if any => context.stream_by_subject(subject).await.ok(),
        Err(_) => None,
    }
}

/// The last messages of the stream that are events; `None` where it does not answer.
async fn last(context: &jetstream::Context, name: &str) -> Option<Vec<Bytes>> {
    let stream = context.get_stream(name).await.ok()?;
    let state = &stream.cached_info().state;
    let newest = state.last_sequence;
    let oldest = state.first_sequence.max((newest + 1).saturating_sub(recent_events::MOST as u64)).max(1);
    let read = (oldest..=newest).map(|sequence| message(&stream, sequence));
    let read: Vec<Option<Option<Bytes>>> = stream::iter(read).buffered(AT_ONCE).collect().await;
    read.into_iter().collect::<Option<Vec<_>>>().map(|events| events.into_iter().flatten().collect())
}

/// One message, `Some(None)` for a deleted one; `None` where there is no answer.
async fn message(stream: &Stream, sequence: u64) -> Option<Option<Bytes>> {
    match stream.get_raw_message(sequence).await {
        Ok(message) => Some(Some(message.payload)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Some(None),
        Err(_) => None,
    }
}
