//! Determines which subjects a source stores, where its configuration does not show it: reads the configurations of the
//! streams that it mirrors or aggregates, and lists its stored subjects.
//!
//! A missing permission may end the connection, so other streams are read over a lane of their own. The list of
//! subjects of a stream (`STREAM.INFO` with `subjects_filter`) takes a server seconds for a million: with many subjects
//! a sample of messages is read instead. A subject that is missed is added when a message with it gets no responders
//! (`target/stray.rs`).

use std::collections::HashMap;

use nats_lane::{
    Dial, Error, ErrorKind, Lane,
    jetstream::{Api, StreamInfo, StreamState, decode},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::json;
use tokio::time::{Duration, timeout};
use tracing::debug;

use crate::{
    config::{Replication, Start},
    copy::target::subjects::{InScope, Learned, Learning, Origins},
    names,
};

/// Most streams that are requested where a source takes messages from others.
const MOST_ORIGINS: usize = 64;
/// Deadline for all of them: an unreachable domain must not delay the copy.
const ORIGINS_WITHIN: Duration = Duration::from_secs(3);
/// Most subjects that are requested as a list: for a million, a server builds the list for seconds, and does nothing
/// else.
const MOST_LISTED: u64 = 20_000;
/// With more subjects, this many messages are read, at least and at most, bounded in bytes too.
const SAMPLE: (u64, u64) = (16, 512);
const SAMPLE_BYTES: u64 = 4 << 20;
/// A prime number, as a step through the sequences.
const ODD: u64 = 7_919;

/// Collects everything known about the subjects of a source; `also` is a subject that it stored at some time. A subject
/// that is missed here shows when a message is refused.
pub(in crate::copy) async fn all(
    dial: &dyn Dial,
    lane: &mut Lane,
    replication: &Replication,
    source: &StreamInfo,
    also: Option<&str>,
) -> Result<Learned, Error> {
    let origins = on_lane_of_its_own(dial, replication, source).await;
    stored(lane, replication, source, origins, also).await
}

/// Asks over a connection of its own: a user without permission for these streams may lose the connection.
async fn on_lane_of_its_own(dial: &dyn Dial, replication: &Replication, source: &StreamInfo) -> Origins {
    let mut found = Origins::default();
    if found.missing(source).is_empty() {
        return found;
    }
    let name = format!("{} {} origins", names::PROGRAM, replication.id);
    let asked = async {
        let mut lane = dial.dial(&replication.source.place, &name).await?;
        origins(&mut lane, source, &mut found).await
    };
    if let Ok(Err(error)) = timeout(ORIGINS_WITHIN, asked).await {
        debug!(replication = replication.id, "the streams that the source takes messages from are not known: {error}");
    }
    found
}

/// Reads the streams that a source takes messages from, and those that these take theirs from.
pub(crate) async fn origins(lane: &mut Lane, source: &StreamInfo, found: &mut Origins) -> Result<(), Error> {
    let mut asked: Vec<(String, String)> = Vec::new();
    loop {
        let mut next = found.missing(source);
        next.retain(|origin| !asked.contains(origin));
        let Some((prefix, name)) = next.pop().filter(|_| asked.len() < MOST_ORIGINS) else { return Ok(()) };
        asked.push((prefix.clone(), name.clone()));
        let api = if prefix.is_empty() { lane.api_prefix().to_owned() } else { prefix.clone() };
        let answer = lane.request(&format!("{api}.STREAM.INFO.{name}"), b"").await;
        match answer.and_then(|answer| decode::<StreamInfo>(&answer)) {
            Ok(info) => found.add(&prefix, &name, info),
            // Another account, or a domain that does not exist.
            Err(error) if error.kind != ErrorKind::Hold => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads the subjects of a source's stored messages: of all, or, where they are many, of a sample of messages.
/// Sends no request if the configuration shows the subjects and only a part of the messages is copied.
pub(crate) async fn stored(
    lane: &mut Lane,
    replication: &Replication,
    source: &StreamInfo,
    origins: Origins,
    also: Option<&str>,
) -> Result<Learned, Error> {
    let vague = InScope::of(replication, Some(source), &origins).vague;
    let filter = match replication.scope.filters() {
        [filter] => filter,
        _ => ">",
    };
    let mut learning = Learning::begin(replication, source, origins);
    also.into_iter().for_each(|subject| learning.add_subject(subject));
    if !vague && replication.start != Start::All {
        return Ok(learning.end());
    }
    let name = &replication.source.stream;
    if source.state.num_subjects > MOST_LISTED {
        let sample = sample(&source.state);
        Api::new(lane).messages_of(name, filter, sample, |message| learning.add_subject(&message.subject)).await?;
    } else {
        listed(lane, name, filter).await?.keys().for_each(|subject| learning.add_subject(subject));
    }
    Ok(learning.end())
}

/// Sequences all over a stream, never in step with repeating patterns in it.
fn sample(state: &StreamState) -> impl Iterator<Item = u64> + use<> {
    let size = state.bytes / state.messages.max(1);
    let count = (SAMPLE_BYTES / size.max(1)).clamp(SAMPLE.0, SAMPLE.1);
    let (first, last) = (state.first_seq, state.last_seq);
    let step = ((last + 1).saturating_sub(first) / count).max(1);
    (0..count).map(move |i| first + i * step + i * ODD % step).take_while(move |seq| *seq <= last)
}

async fn listed(lane: &mut Lane, stream: &str, filter: &str) -> Result<HashMap<String, IgnoredAny>, Error> {
    #[derive(Deserialize)]
    struct ListedSubjects {
        state: ListedState,
    }
    #[derive(Deserialize)]
    struct ListedState {
        subjects: Option<HashMap<String, IgnoredAny>>,
    }
    let subject = format!("{}.STREAM.INFO.{stream}", lane.api_prefix());
    let body = json!({ "subjects_filter": filter }).to_string();
    let answer = lane.request(&subject, body.as_bytes()).await?;
    let ListedSubjects { state } = decode(&answer).map_err(|error| error.context("subjects of the source stream"))?;
    Ok(state.subjects.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_bounded_and_not_in_step() {
        let of = |messages: u64, bytes: u64, first_seq: u64| {
            let state = StreamState {
                messages,
                bytes,
                first_seq,
                last_seq: first_seq + messages - 1,
                num_subjects: messages,
                ..StreamState::default()
            };
            sample(&state).collect::<Vec<_>>()
        };
        let million = of(1_000_000, 100_000_000, 5);
        assert_eq!(million.len() as u64, SAMPLE.1);
        assert!(million[0] == 5 && million.is_sorted() && million[million.len() - 1] > 990_000);
        for period in [2, 3, 7, 10, 30] {
            let seen: std::collections::BTreeSet<u64> =
                of(30_000, 3_000_000, 1).iter().map(|seq| seq % period).collect();
            assert_eq!(seen.len() as u64, period);
        }
        assert_eq!(of(100_000, 100_000 << 20, 1).len() as u64, SAMPLE.0);
        assert_eq!(of(3, 30, 1), [1, 2, 3]);
    }
}
