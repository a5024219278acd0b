//! `heartbeat.get` and `heartbeat.set`.

use bytes::Bytes;
use serde_json::{Map, Value};
use tokio::time::{Duration, timeout};
use tracing::info;

use super::{
    super::{
        api::{Failure, HeartbeatsChanged, HeartbeatsShown, RejectedHeartbeats},
        service::Request,
    },
    RequestContext, UNMASK_TRIES, check_size, expected_revision, in_time, refused,
};
use crate::{
    config::{self, Json, Problem, Problems},
    names::HEARTBEATS_KEY,
    status::Origin,
    store::{Error, WriteError},
};

/// How long a request waits until heartbeats that were just stored are applied.
const CONSIDER: Duration = Duration::from_millis(100);

pub(super) async fn heartbeat_get(context: &RequestContext, _: Request) -> Result<HeartbeatsShown, Failure> {
    let newest = context.documents.heartbeats().await;
    let _ = timeout(CONSIDER, context.heartbeats.considered(newest)).await;
    let view = context.heartbeats.view();
    let rejected = view.rejected.map(|rejected| RejectedHeartbeats {
        revision: rejected.revision,
        config: config::mask_heartbeats(&rejected.document),
        problems: rejected.problems,
    });
    let config = config::mask_heartbeats(&view.document);
    Ok(HeartbeatsShown { origin: view.origin, revision: view.revision, config, rejected })
}

pub(super) async fn heartbeat_set(context: &RequestContext, request: Request) -> Result<HeartbeatsChanged, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    let body = &request.body;
    if body.trim_ascii().is_empty() {
        return Err(Failure::new(400, "the request is empty: send the heartbeats, or `{}` to remove them"));
    }
    for _ in 0..UNMASK_TRIES {
        let (heartbeats, found) = read(context, body).await?;
        let Some(CheckedHeartbeats { value, unmasked }) = heartbeats else {
            return changed(context.config.delete(HEARTBEATS_KEY, expected).await, "removed");
        };
        if let Some(revision) = found.filter(|found| expected.is_none_or(|expected| expected == *found)) {
            return Ok(HeartbeatsChanged { revision });
        }
        match context.config.put(HEARTBEATS_KEY, value, expected.or(unmasked)).await {
            // The secret that `***` stands for may have changed.
            Err(WriteError::Conflict { .. } | WriteError::Missing) if expected.is_none() => {}
            written => return changed(written, "stored"),
        }
    }
    Err(Failure::new(503, "the heartbeats cannot be stored: they are changed all the time"))
}

/// Valid heartbeats.
struct CheckedHeartbeats {
    /// The heartbeats to store.
    value: Bytes,
    /// The stored revision that its secrets are from: it may be written only while that revision is stored.
    unmasked: Option<u64>,
}

/// Reads heartbeats, `None` for none at all, and compares them with what is stored: the revision if that is equal.
async fn read(context: &RequestContext, body: &Bytes) -> Result<(Option<CheckedHeartbeats>, Option<u64>), Failure> {
    let Json { value: mut document, problems: mut twice } = Json::read(body).map_err(refused)?;
    let stored = context.config.get(HEARTBEATS_KEY).await.map_err(unavailable)?;
    let revision = stored.as_ref().map(|entry| entry.revision);
    let before = stored.as_ref().and_then(|entry| Json::read(&entry.value).ok()).map(|json| json.value);
    let (unmasked, problems) = match &mut document {
        Value::Object(fields) => unmask(context, fields, stored.is_some(), before.as_ref()),
        _ => (false, Vec::new()),
    };
    twice.extend(problems);
    let problems = twice;
    let heartbeats = match context.rules.parse_heartbeats(&document) {
        Ok(heartbeats) if problems.is_empty() => heartbeats,
        result => return Err(refused(all(problems, result.err()))),
    };
    if heartbeats.is_none() {
        return Ok((None, None));
    }
    let equal = revision.filter(|_| before.as_ref() == Some(&document));
    let value = if unmasked { Bytes::from(document.to_string()) } else { body.clone() };
    check_size(&value)?;
    Ok((Some(CheckedHeartbeats { value, unmasked: revision.filter(|_| unmasked) }), equal))
}

/// Replaces `***` by stored secrets: those of the bucket or, if these heartbeats cannot run, those of the running ones.
/// Returns whether there were any, or the problems. Secrets of removed heartbeats are never restored.
fn unmask(
    context: &RequestContext,
    fields: &mut Map<String, Value>,
    is_stored: bool,
    before: Option<&Value>,
) -> (bool, Vec<Problem>) {
    if !config::has_heartbeats_mask(fields) {
        return (false, Vec::new());
    }
    let view = context.heartbeats.view();
    let runs = (is_stored && view.origin == Origin::Kv).then_some(view.document);
    let mut tried = fields.clone();
    let Err(problems) = config::unmask_heartbeats(&mut tried, before) else {
        *fields = tried;
        return (true, Vec::new());
    };
    match config::unmask_heartbeats(fields, runs.as_ref()) {
        Ok(()) => (true, Vec::new()),
        Err(_) => (false, problems),
    }
}

/// The words about a secret that is not stored are better than those about one that is missing.
fn all(mut problems: Vec<Problem>, others: Option<Problems>) -> Problems {
    let others = others.map(|others| others.0).unwrap_or_default().into_iter();
    let others: Vec<_> = others.filter(|other| problems.iter().all(|problem| problem.path != other.path)).collect();
    problems.extend(others);
    Problems(problems)
}

fn changed(written: Result<u64, WriteError>, how: &str) -> Result<HeartbeatsChanged, Failure> {
    match written {
        Ok(revision) => {
            info!(revision, "heartbeats {how} by request");
            Ok(HeartbeatsChanged { revision })
        }
        Err(WriteError::Missing) => Err(Failure::new(404, "no heartbeats are stored")),
        Err(WriteError::Exists { revision } | WriteError::Conflict { revision }) => {
            Err(Failure::new(409, format!("the heartbeats are at revision {revision}")))
        }
        Err(WriteError::Store(error)) => Err(unavailable(error)),
    }
}

fn unavailable(error: Error) -> Failure {
    Failure::new(503, error.to_string())
}
