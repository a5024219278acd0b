//! `position`: moves the position of a paused replication.

use std::time::Duration;

use nats_lane::parse_duration;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::info;

use super::{RequestContext, in_time, named};
use crate::{
    config::Replication,
    control::{
        api::{Failure, PositionMove, PositionRequest},
        service::Request,
    },
    copy::{At, Located, Place, consumer_prefix, locate},
    events::Event,
    status::State,
    store::{ConfigEntry, MarkKind, PositionRecord, SaveError},
};

/// Deadline for everything but the last write.
const WITHIN: Duration = Duration::from_millis(2_100);
/// Of it, how long to wait for the end of a copy that was just paused.
const STOPS_WITHIN: Duration = Duration::from_millis(700);

pub(super) async fn position(context: &RequestContext, request: Request) -> Result<PositionMove, Failure> {
    let end = Instant::now() + WITHIN;
    in_time(&request)?;
    let PositionRequest { replication: id, source_seq, time, ago, dry_run } =
        named(&request.body, |replication| PositionRequest { replication, ..PositionRequest::default() })?;
    let at = match (source_seq, time, ago) {
        (Some(seq), None, None) => At::After(seq),
        (None, Some(time), None) => At::Time(time),
        (None, None, Some(ago)) => At::Ago(
            parse_duration(&ago).map_err(|error| Failure::new(400, format!("`ago` {error}, such as `1h`: `{ago}`")))?,
        ),
        _ => return Err(Failure::new(400, "the request needs one of `source_seq`, `time` and `ago`")),
    };
    let entry = context.existing(&id).await?;
    rests(context, &id).await?;
    let (record, revision) = context.positions.read(&id).await.map_err(unavailable)?;
    if record.status.as_ref().is_some_and(|row| row.state != State::Paused) {
        return Err(stopping(&id));
    }
    let replication = runnable(context, entry).await?;
    if let Some(native) = &replication.native {
        let description = format!(
            "target stream `{}` is fed as kind `{}`, and its server continues after the last message that it took: the \
             position cannot be moved",
            replication.target.stream, native.kind
        );
        return Err(Failure::new(409, description));
    }
    let place = at_source(context, &replication, at, end).await?;
    let from = record.source.as_ref().map_or(0, |source| source.seq);
    let to = place.position.seq;
    // The requested position, even if the stream no longer has it.
    let asked = if let At::After(seq) = at { seq } else { to };
    if place.forgets && asked < from {
        let description = format!(
            "source stream `{}` removes copied messages: the position {from} can only be moved forward, not to {asked}",
            replication.source.stream
        );
        return Err(Failure::new(409, description));
    }
    let between = place.between(from, to);
    let (copied_again, passed_over) = if to < from { (between, 0) } else { (0, between) };
    let mut moved = PositionMove { replication: id, revision: None, dry_run, from, to, copied_again, passed_over };
    if dry_run {
        return Ok(moved);
    }
    let id = moved.replication.as_str();
    moved.revision = Some(save_moved(context, id, &record, revision, &place, end).await?);
    info!(replication = id, from, to, "position moved by request");
    context.events.emit(Event::PositionMoved { from, to, copied_again, passed_over }, id);
    Ok(moved)
}

/// Saves a moved position. Reports of the paused replication about its source meanwhile do not prevent that.
async fn save_moved(
    context: &RequestContext,
    id: &str,
    before: &PositionRecord,
    mut revision: u64,
    place: &Place,
    end: Instant,
) -> Result<u64, Failure> {
    let mut record = before.clone();
    loop {
        let moved = record.clone().moved(place.position.clone(), &context.instance, place.now);
        match context.positions.save(id, moved, revision).await {
            Ok(revision) => return Ok(revision),
            Err(SaveError::Store(error)) => return Err(unavailable(error)),
            Err(SaveError::Conflict { record: there, revision: newer })
                if there.only_reports(before) && Instant::now() < end =>
            {
                (record, revision) = (*there, newer);
            }
            Err(SaveError::Conflict { .. } | SaveError::Deleted { .. }) => {
                let description = format!("the position of replication `{id}` was changed by another writer meanwhile");
                return Err(Failure::new(409, description));
            }
        }
    }
}

fn unavailable(error: crate::store::Error) -> Failure {
    Failure::new(503, error.to_string())
}

fn stopping(id: &str) -> Failure {
    Failure::new(409, format!("replication `{id}` is still stopping; try again when its state is `paused`"))
}

/// An error unless the replication is paused and has stopped.
async fn rests(context: &RequestContext, id: &str) -> Result<(), Failure> {
    let marked = context.config.marked(id, MarkKind::Paused).await.map_err(unavailable)?;
    let Some((revision, _)) = marked else {
        return Err(Failure::new(409, format!("replication `{id}` is not paused; pause it first")));
    };
    timeout(STOPS_WITHIN, context.supervisor.paused_since(id, revision)).await.map_err(|_| stopping(id))
}

/// The newest document that can run.
pub(super) async fn runnable(context: &RequestContext, entry: ConfigEntry) -> Result<Replication, Failure> {
    if let Ok(replication) = entry.accept(&context.rules, &context.site) {
        return Ok(replication);
    }
    let older = context.config.history(&entry.key).await.map_err(unavailable)?;
    // As it was kept when its link could be used.
    let kept = context.config.marked(&entry.key, MarkKind::Valid).await.map_err(unavailable)?;
    let kept = kept.map(|(revision, value)| ConfigEntry::new(&*entry.key, revision, value));
    let of_link = |old: ConfigEntry| ConfigEntry { link: entry.link.clone(), ..old };
    let none = || Failure::new(409, format!("replication `{}` has no document that can run", entry.key));
    let mut all = older.into_iter().map(of_link).chain(kept);
    all.find_map(|entry| entry.accept(&context.rules, &context.site).ok()).ok_or_else(none)
}

async fn at_source(
    context: &RequestContext,
    replication: &Replication,
    at: At,
    end: Instant,
) -> Result<Place, Failure> {
    let stream = &replication.source.stream;
    let consumers = consumer_prefix(&context.site, &context.installation, &replication.id);
    match timeout_at(end, locate(&context.rules, replication, &consumers, at)).await {
        Ok(Ok(Located::At(place))) => Ok(place),
        Ok(Ok(Located::Beyond { last_seq })) => {
            Err(Failure::new(409, format!("the last sequence of source stream `{stream}` is {last_seq}")))
        }
        Ok(Err(error)) => Err(Failure::new(503, format!("the source cannot be asked: {error}"))),
        Err(_) => Err(Failure::new(503, format!("the source of stream `{stream}` did not answer in time"))),
    }
}
