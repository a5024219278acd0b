//! A stream at the source that listens on the subjects of the copies, where both sides are one account over leafnodes
//! or gateways: it would store the copies again. Found before the first message is sent.
//!
//! A publish goes to every stream of the account that listens on its subject, in whichever JetStream domain: each
//! stores it and each sends an ack.

use std::collections::{BTreeMap, BTreeSet};

use nats_lane::{
    DEFAULT_API_PREFIX, Error, Lane, Turn, headers,
    jetstream::{Api, PublishAck, StreamInfo},
};
use tokio::time::{Duration, Instant, timeout_at};
use tracing::debug;

use crate::{
    config::patterns,
    copy::{Job, source::learn, target::subjects},
    names, nats,
};

/// Longest time of a message on its way from the target to the source.
pub(crate) const REACHES_WITHIN: Duration = Duration::from_millis(250);
/// The same for its answers.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// Replaces a wildcard in the subject of a probe, and is the name of a stream that does not exist.
const PROBE: &str = "stream-replicator-probe";
/// Most streams at the source that are checked besides the source stream.
const MAX_STREAMS: usize = 8;

/// Whether two sides are one JetStream, in which no two streams listen on the same subject. Sites that are one account
/// and do not have the same JetStream differ in its domain.
pub(crate) fn same_jetstream(source: &StreamInfo, target: &nats_lane::ServerInfo, api_prefix: &str) -> bool {
    let domain = match api_prefix.strip_prefix("$JS.").and_then(|rest| rest.strip_suffix(".API")) {
        Some(domain) => Some(domain),
        None if api_prefix == DEFAULT_API_PREFIX => target.domain.as_deref(),
        // The API prefix may lead to another JetStream.
        None => return false,
    };
    domain == source.domain.as_deref()
}

/// Refuses a first run whose copies a stream at the source would store again. Requests that need more permissions than
/// a copy use connections of their own: if they are refused, the question stays open, and the acks of the copies show
/// it later.
pub(in crate::copy) async fn check(
    job: &Job,
    source: &mut Lane,
    target: &mut Lane,
    info: &StreamInfo,
) -> Result<(), Error> {
    let replication = &job.replication;
    if same_jetstream(info, target.info(), target.api_prefix()) || !is_bridged(job, source).await {
        return Ok(());
    }
    let learned = learn::all(&*job.dial, source, replication, info, None).await?;
    let Ok(wanted) = subjects::of_target(replication, info, &learned) else { return Ok(()) };
    let mut listening = streams_at_source(job, &wanted).await.unwrap_or_default();
    let own = info.subjects().into_iter().map(str::to_owned).collect();
    listening.insert(replication.source.stream.clone(), own);
    let exists = Api::new(target).stream_info(&replication.target.stream).await?.is_some();
    for (stream, listens) in &listening {
        let shared = wanted.iter().find_map(|one| listens.iter().find_map(|other| patterns::intersection(one, other)));
        let Some(shared) = shared else { continue };
        // The target itself answers, too.
        if answers_at_target(job, &literal(&shared)).await > usize::from(exists) {
            return Err(Error::hold(beside(stream, &shared)));
        }
    }
    Ok(())
}

fn beside(stream: &str, subject: &str) -> String {
    format!(
        "stream `{stream}` at the source listens on `{subject}` too, and what is published at the target reaches it, because \
         both are one account over leafnodes or gateways: it would store each copy again; give the copies other subjects, \
         with `target_subject_prefix` or `subject_transforms`"
    )
}

async fn is_bridged(job: &Job, source: &mut Lane) -> bool {
    let name = format!("{} {} bridge", names::PROGRAM, job.replication.id);
    let Ok(mut from) = job.dial.dial(&job.replication.target.place, &name).await else { return false };
    match nats::reaches(&mut from, source, REACHES_WITHIN).await {
        Ok(reaches) => reaches,
        Err(error) => {
            debug!(replication = job.replication.id, %error, "whether both sides are one account is not known");
            false
        }
    }
}

/// The streams at the source that listen on any of these subjects, with all of theirs.
async fn streams_at_source(job: &Job, wanted: &[String]) -> Result<BTreeMap<String, Vec<String>>, Error> {
    let name = format!("{} {} bridge", names::PROGRAM, job.replication.id);
    let mut lane = job.dial.dial(&job.replication.source.place, &name).await?;
    let mut streams = BTreeSet::new();
    for subject in wanted {
        streams.extend(Api::new(&mut lane).stream_names(subject).await?);
    }
    let mut listening = BTreeMap::new();
    for stream in streams.into_iter().take(MAX_STREAMS) {
        if let Some(info) = Api::new(&mut lane).stream_info(&stream).await? {
            listening.insert(stream, info.subjects().into_iter().map(str::to_owned).collect());
        }
    }
    Ok(listening)
}

/// A subject that matches a pattern.
fn literal(pattern: &str) -> String {
    let tokens = pattern.split('.').map(|token| if matches!(token, "*" | ">") { PROBE } else { token });
    tokens.collect::<Vec<_>>().join(".")
}

/// [`answers`] over a connection of its own: 0 where the login may not publish that subject.
async fn answers_at_target(job: &Job, subject: &str) -> usize {
    let name = format!("{} {} bridge", names::PROGRAM, job.replication.id);
    let Ok(mut lane) = job.dial.dial(&job.replication.target.place, &name).await else { return 0 };
    answers(&mut lane, subject).await.unwrap_or_default()
}

/// How many streams listen on a subject: a message that names a stream which does not exist is refused by each of them,
/// and stored by none.
async fn answers(lane: &mut Lane, subject: &str) -> Result<usize, Error> {
    let header = format!("NATS/1.0\r\nNats-Expected-Stream: {PROBE}\r\n\r\n");
    let request = lane.send_request_with(subject, header.as_bytes(), b"");
    let end = Instant::now() + ANSWERS_WITHIN;
    let mut answers = 0;
    while let Ok(turn) = timeout_at(end, lane.turn()).await {
        let Turn::Received(batch) = turn? else { continue };
        for message in batch.iter().filter(|message| message.subject == request.as_bytes()) {
            if headers::status(message.header) == Some(503) {
                return Ok(answers);
            }
            let refused = matches!(PublishAck::parse(message.payload, "a stream"), Err(error) if error.api.is_some());
            answers += usize::from(refused);
        }
        if answers > 1 {
            break;
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_jetstream_has_one_domain() {
        let check = |source: Option<&str>, target: Option<&str>, prefix: &str, expect: bool| {
            let source: StreamInfo =
                serde_json::from_value(json!({"config": {}, "state": {}, "domain": source})).unwrap();
            let mut server = nats_lane::ServerInfo::default();
            server.domain = target.map(str::to_owned);
            assert_eq!(same_jetstream(&source, &server, prefix), expect, "{source:?} {target:?} {prefix}");
        };
        check(None, None, "$JS.API", true);
        check(Some("hub"), Some("hub"), "$JS.API", true);
        check(Some("hub"), Some("leaf"), "$JS.API", false);
        check(Some("hub"), Some("hub"), "$JS.leaf.API", false);
        check(Some("leaf"), Some("hub"), "$JS.leaf.API", true);
        check(None, None, "imported", false);
    }

    #[test]
    fn a_probe_is_on_a_subject_of_the_pattern() {
        for pattern in ["a.b", "a.*.c", "a.>", "*", ">"] {
            assert!(patterns::matches(pattern, literal(pattern).as_bytes()), "{pattern}");
        }
    }
}
