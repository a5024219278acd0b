//! The run of a document with patterns: lists the streams of the source from time to time and writes those that match into the
//! configuration bucket, where all instances find them. It copies nothing itself.

use std::{collections::BTreeSet, time::Duration};

use nats_lane::{Dial, backoff::jitter, jetstream::Api};
use serde_json::json;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::{Replication, StreamPatterns, member_id},
    copy::{Error, ErrorKind, PositionWriter},
    events::Event,
    names,
    status::{Lag, State},
    store::{MarkKind, StreamsMark, WriteError},
    supervisor::context::Context,
};

/// Pause between two lists, at most.
const PAUSE: Duration = Duration::from_secs(12);
/// The same while a stream is missing in the last one.
const SOON: Duration = Duration::from_secs(2);
/// Time limit for a list.
const LIMIT: Duration = Duration::from_secs(30);
/// How often they are written again because another change was faster.
const TRIES: usize = 5;
/// Streams of one document, at most: their names are one value of the bucket.
const MOST: usize = 10_000;

/// Follows the streams until the stop or an error.
pub(super) async fn run(
    context: &Context,
    replication: &Replication,
    patterns: &StreamPatterns,
    writer: &mut PositionWriter,
    stop: &CancellationToken,
) -> Result<(), Error> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(()),
        result = follow(context, replication, patterns, writer) => result,
    }
}

async fn follow(
    context: &Context,
    replication: &Replication,
    patterns: &StreamPatterns,
    writer: &mut PositionWriter,
) -> Result<(), Error> {
    let name = format!("{} {}", names::PROGRAM, context.id);
    let connected = context.deps.rules.dial(&replication.source.place, &name).await;
    let mut lane = connected.map_err(Error::of_source)?;
    let one_account = context.known_streams.is_one_account(replication);
    let mut missing = BTreeSet::new();
    loop {
        let listed = timeout(LIMIT, Api::new(&mut lane).all_stream_names()).await;
        let timed_out = |_| Error::of_source(nats_lane::Error::retry(format!("no list of the streams for {LIMIT:?}")));
        let listed = listed.map_err(timed_out)?.map_err(Error::of_source)?;
        let others = listed.into_iter().filter(|stream| !context.deps.own_streams.has_name(stream));
        let found = patterns.select(others, one_account);
        if found.len() > MOST {
            let message = format!("{} streams match, {MOST} are possible: use several documents", found.len());
            return Err(Error::new(ErrorKind::Hold, message));
        }
        missing = update(context, patterns, &found, &missing).await?;
        show(context, &lane.info().server_name);
        // Other instances answer from there.
        let row = context.cell.row();
        if writer.record().status.as_ref().is_none_or(|saved| saved.state != row.state || saved.epoch != row.epoch) {
            writer.save_row(row).await?;
        }
        sleep(jitter(if missing.is_empty() { PAUSE } else { SOON }, rand::random())).await;
    }
}

/// Writes what differs. Returns the streams that are missing for the first time.
async fn update(
    context: &Context,
    patterns: &StreamPatterns,
    found: &BTreeSet<String>,
    missing: &BTreeSet<String>,
) -> Result<BTreeSet<String>, Error> {
    let Context { deps, id, .. } = context;
    let failed = |error: String| Error::new(ErrorKind::Retry, format!("the streams that were found: {error}"));
    let mut tries = 0..TRIES;
    let (appeared, gone, missing) = loop {
        let stored = deps.config.marked(id, MarkKind::Streams).await.map_err(|error| failed(error.to_string()))?;
        let revision = stored.as_ref().map_or(0, |(revision, _)| *revision);
        let before = stored.and_then(|(_, value)| StreamsMark::read(&value));
        let known = before.clone().unwrap_or_default();
        let FoundStreams { mark, appeared, gone, missing } = compare(known, patterns, found, missing);
        if before.as_ref() == Some(&mark) {
            break (appeared, gone, missing);
        }
        let value = json!(mark).to_string().into();
        match deps.config.put(&MarkKind::Streams.key(id), value, Some(revision)).await {
            Ok(_) => break (appeared, gone, missing),
            // A stream that is gone was deleted by request.
            Err(WriteError::Conflict { .. } | WriteError::Missing) if tries.next().is_some() => {}
            Err(error) => return Err(failed(error.to_string())),
        }
    };
    for stream in appeared {
        let member = member_id(id, &stream);
        info!(replication = member, stream, "a stream matches the patterns of `{id}`");
        deps.events.emit(Event::StreamAppeared { stream }, &member);
    }
    for stream in gone {
        warn!(replication = member_id(id, &stream), stream, "the source no longer has a stream of `{id}`");
    }
    Ok(missing)
}

/// What a list changes.
struct FoundStreams {
    mark: StreamsMark,
    appeared: Vec<String>,
    gone: Vec<String>,
    /// Missing for the first time: they are gone if the next list does not have them either.
    missing: BTreeSet<String>,
}

fn compare(
    known: StreamsMark,
    patterns: &StreamPatterns,
    found: &BTreeSet<String>,
    missing: &BTreeSet<String>,
) -> FoundStreams {
    let appeared: Vec<_> = found.difference(&known.streams).cloned().collect();
    let absent: BTreeSet<_> =
        known.streams.difference(found).filter(|stream| patterns.matches(stream)).cloned().collect();
    let gone: Vec<_> = absent.intersection(missing).cloned().collect();
    let first: BTreeSet<_> = absent.difference(missing).cloned().collect();
    let streams = found.union(&first).cloned().collect();
    let were_gone = known.gone.into_iter().filter(|stream| !found.contains(stream) && patterns.matches(stream));
    let mark = StreamsMark { version: 1, streams, gone: were_gone.chain(gone.iter().cloned()).collect() };
    FoundStreams { mark, appeared, gone, missing: first }
}

fn show(context: &Context, server: &str) {
    context.cell.status().send_modify(|(state, copy)| {
        *state = State::Running;
        // Nothing waits here: each stream has a row of its own.
        copy.lag = Some(Lag::default());
        copy.source.connected = true;
        server.clone_into(&mut copy.source.server);
        if let Some(error) = &mut copy.last_error {
            error.ran();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &str) -> BTreeSet<String> {
        all.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_stream_is_gone_when_it_is_missing_twice() {
        let patterns = StreamPatterns {
            include: vec!["*".to_owned()],
            exclude: vec!["X*".to_owned()],
            target_stream: String::new(),
        };
        let check = |known: (&str, &str),
                     found: &str,
                     missing: &str,
                     expect: (&str, &str),
                     appeared: &str,
                     first: &str| {
            let known = StreamsMark { version: 1, streams: names(known.0), gone: names(known.1) };
            let step = compare(known, &patterns, &names(found), &names(missing));
            assert_eq!((step.mark.streams, step.mark.gone), (names(expect.0), names(expect.1)), "{found}");
            assert_eq!((step.appeared.into_iter().collect(), step.missing), (names(appeared), names(first)), "{found}");
        };
        check(("", ""), "A B", "", ("A B", ""), "A B", "");
        check(("A B", ""), "A B", "", ("A B", ""), "", "");
        check(("A B", ""), "B", "", ("A B", ""), "", "A");
        check(("A B", ""), "B", "A", ("B", "A"), "", "");
        check(("A B", ""), "A B", "A", ("A B", ""), "", "");
        check(("B", "A"), "B", "", ("B", "A"), "", "");
        check(("B", "A"), "A B", "", ("A B", ""), "A", "");
        // What no longer matches is not missing.
        check(("A X1", "X2"), "A", "", ("A", ""), "", "");
    }
}
