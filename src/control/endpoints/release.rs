//! `retry` and `skip`: a mark beside the document that releases a held replication.

use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta};
use tokio::time::timeout;
use tracing::info;

use super::{RequestContext, in_time, named, reply, written};
use crate::{
    control::{
        api::{Changed, Failure, NamedRequest, SkipRequest, Skipped},
        service::Request,
    },
    status::{Row, State},
    store::{MarkKind, ReleaseMark, SourceMessage},
};

/// A held replication tries again from time to time: how long to wait for such an attempt...
const TRY_WITHIN: Duration = Duration::from_millis(1_500);
/// ... and the maximum age of the error of such an attempt.
const TRY_AFTER: TimeDelta = TimeDelta::seconds(30);

pub(super) async fn retry(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    waiting(context, &replication, "held or retrying", |state| matches!(state, State::Held | State::Retrying)).await?;
    // A message that is to be skipped still is.
    let marked = context.config.marked(&replication, MarkKind::Release).await;
    let marked = marked.map_err(|error| Failure::new(503, error.to_string()))?;
    let skip = marked.and_then(|(_, value)| ReleaseMark::skip_in(&value));
    let revision = release(context, &replication, skip).await?;
    info!(replication, revision, "tries again by request");
    Ok(Changed { replication, revision })
}

pub(super) async fn skip(context: &RequestContext, request: Request) -> Result<Skipped, Failure> {
    in_time(&request)?;
    let SkipRequest { replication, source_seq } =
        named(&request.body, |replication| SkipRequest { replication, source_seq: None })?;
    let row = waiting(context, &replication, "held", |state| state == State::Held).await?;
    let message = message_that_holds(&row).ok_or_else(|| {
        let why = row.copy.last_error.as_ref().map_or("", |error| &error.message);
        let description = format!("replication `{replication}` is not held by a message that can be skipped: {why}");
        Failure::new(409, description)
    })?;
    if let Some(other) = source_seq.filter(|seq| *seq != message.seq) {
        let description = format!("replication `{replication}` is held by source message {}, not {other}", message.seq);
        return Err(Failure::new(409, description));
    }
    let revision = release(context, &replication, Some(message)).await?;
    info!(replication, revision, source_seq = message.seq, "message will be skipped by request");
    let (subject, bytes) =
        row.copy.last_error.map(|error| (error.source_subject, error.source_bytes)).unwrap_or_default();
    let stored = Some(DateTime::from_timestamp_nanos(message.time_ns));
    Ok(Skipped { replication, revision, source_seq: message.seq, stored, subject, bytes })
}

fn message_that_holds(row: &Row) -> Option<SourceMessage> {
    let error = row.copy.last_error.as_ref()?;
    Some(SourceMessage { seq: error.source_seq?, time_ns: error.source_time_ns? })
}

async fn release(context: &RequestContext, id: &str, skip: Option<SourceMessage>) -> Result<u64, Failure> {
    let mark = Bytes::from(reply(&ReleaseMark::now(skip))?);
    written(id, context.config.mark(id, MarkKind::Release, mark).await)
}

/// The row of a replication that waits for the operator; an error if it does not wait.
async fn waiting(context: &RequestContext, id: &str, what: &str, waits: fn(State) -> bool) -> Result<Row, Failure> {
    context.existing(id).await?;
    let starting = || Failure::new(409, format!("replication `{id}` is not {what}: it is about to start"));
    let (mut row, source_time) = context.supervisor.row_and_time(id).ok_or_else(starting)?;
    // By the clock of the instance that reported it.
    let now = row.host_time(source_time);
    let recent = row.copy.last_error.as_ref().is_some_and(|error| now - error.at < TRY_AFTER);
    if recent && matches!(row.state, State::Starting | State::Running) {
        let again = timeout(TRY_WITHIN, context.supervisor.row_when(id, |row| waits(row.state))).await;
        row = again.unwrap_or(row);
    }
    if waits(row.state) {
        return Ok(row);
    }
    let is = match row.state {
        State::Starting => "starting",
        State::Running => "running",
        State::Paused => "paused; resume it",
        State::Retrying => "retrying by itself",
        State::Held => "held",
        State::Invalid => "invalid; correct its document",
        State::Stopped => "stopped",
    };
    Err(Failure::new(409, format!("replication `{id}` is not {what}: it is {is}")))
}
