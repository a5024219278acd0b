//! `promote`: turns the mirror of a native feed into a stream of its own, with the subjects of its source.

use std::time::Duration;

use bytes::Bytes;
use nats_lane::{
    Dial,
    jetstream::{Api, StreamInfo},
};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{info, warn};

use super::{
    RequestContext,
    consumers::{not_refreshed, refresh_last},
    in_time, named,
    position::runnable,
    reply, written,
};
use crate::{
    config::{NativeKind, Replication},
    control::{
        api::{Failure, MoveOutcome, MovedConsumer, PromoteRequest, Promoted},
        service::Request,
    },
    copy::moved_consumers::release,
    events::Event,
    names,
    native::{FeedSubjects, check_target},
    store::{MarkKind, PauseMark},
};

/// Deadline for everything: less than that of a request.
const WITHIN: Duration = Duration::from_millis(2_500);
/// Of it, how long the source may need.
const SOURCE_WITHIN: Duration = Duration::from_millis(1_200);
/// How long before the end the last consumer is begun...
const BEGUN_BEFORE: Duration = Duration::from_millis(1_000);
/// ... and the refresh is over.
const MOVED_BEFORE: Duration = Duration::from_millis(800);
/// Deadline for the list of consumers that were not refreshed.
const LISTED_WITHIN: Duration = Duration::from_millis(300);
/// Consumers that an error names.
const NAMED: usize = 5;
/// Deadline for the marks of consumers, after the promotion, until the request is answered...
const RELEASED_WITHIN: Duration = Duration::from_millis(500);
/// ... and for each of the tries after that: one takes a round trip for each consumer.
const TRY_WITHIN: Duration = Duration::from_secs(60);
const TRIES: u32 = 10;
/// Pause after one that failed.
const AGAIN: Duration = Duration::from_secs(3);
/// Servers from this version on turn a mirror into a stream.
const FIRST: (u32, u32) = (2, 12);

pub(super) async fn promote(context: &RequestContext, request: Request) -> Result<Promoted, Failure> {
    let end = Instant::now() + WITHIN;
    in_time(&request)?;
    let asked = named(&request.body, |replication| PromoteRequest { replication, ..PromoteRequest::default() })?;
    let entry = context.existing(&asked.replication).await?;
    let only_in_file = context.config.is_in_file(&asked.replication) && entry.revision == 0;
    if only_in_file && !asked.keep && !asked.dry_run {
        let description = format!(
            "replication `{}` is configured in a file, and would begin again: use `keep`, and remove it there",
            asked.replication
        );
        return Err(Failure::new(409, description));
    }
    let replication = runnable(context, entry).await?;
    if replication.native.as_ref().is_none_or(|native| native.kind != NativeKind::Mirror) {
        let description = format!(
            "replication `{}` feeds no mirror: only a mirror is promoted, any other target takes messages of others already",
            replication.id
        );
        return Err(Failure::new(409, description));
    }
    let mut plan = within(end, Promotion::of(context, &replication, &asked)).await?;
    let shown = context.supervisor.row(&replication.id).and_then(|row| row.copy.lag).map(|lag| lag.messages);
    if asked.dry_run {
        let lag = within(end, plan.lag(shown)).await?;
        return Ok(plan.promoted(asked, None, lag));
    }
    let paused = within(end, stop_feed(context, &replication.id)).await?;
    let done = async {
        plan.read_target().await?;
        let consumers = plan.move_consumers(context, &replication, asked.force, end).await?;
        let lag = plan.carry_out(&asked, shown).await?;
        Ok((lag, consumers))
    };
    let lag = match within(end, done).await {
        Ok((lag, consumers)) => {
            plan.consumers = consumers;
            lag
        }
        Err(failure) => {
            resume(context, &replication.id, paused).await;
            return Err(failure);
        }
    };
    plan.release_consumers(context, &replication).await;
    info!(replication = replication.id, stream = plan.stream, ?lag, "mirror promoted by request");
    let event = Event::Promoted {
        stream: plan.stream.clone(),
        subjects: plan.subjects.clone(),
        last_seq: plan.last_seq,
        lag,
        kept: asked.keep,
    };
    context.events.emit(event, &replication.id);
    let revision = if asked.keep { None } else { Some(delete(context, &replication.id).await?) };
    Ok(plan.promoted(asked, revision, lag))
}

/// Removes the marks of the consumers after the request is answered, and tries it again while the target does not answer.
fn release_later(context: &RequestContext, replication: &Replication) {
    let (site, rules, supervisor) = (context.site.clone(), context.rules.clone(), context.supervisor.clone());
    let replication = replication.clone();
    let revision = supervisor.row(&replication.id).map(|row| row.config_revision);
    tokio::spawn(async move {
        let id = &replication.id;
        let connection = format!("{} {id}", names::PROGRAM);
        for tries in 1..=TRIES {
            let attempt = async {
                let mut target = rules.dial(&replication.target.place, &connection).await?;
                release(&mut target, &replication, &site).await
            };
            let late = || Err(nats_lane::Error::retry("no answer in time"));
            let Err(error) = timeout(TRY_WITHIN, attempt).await.unwrap_or_else(|_| late()) else { return };
            // The consumers of a replication that was added again are its own.
            let is_new = supervisor.row(id).is_some_and(|row| Some(row.config_revision) != revision);
            if is_new || tries == TRIES {
                warn!(
                    replication = id,
                    "the consumers of the promoted stream keep the mark of the replication: {error}"
                );
                return;
            }
            sleep(AGAIN).await;
        }
    });
}

/// Ends the pause of a mirror that was not promoted.
async fn resume(context: &RequestContext, id: &str, paused: Option<u64>) {
    let Some(revision) = paused else { return };
    if let Err(error) = context.config.unmark(id, MarkKind::Paused, Some(revision)).await {
        warn!(replication = id, %error, "not promoted, and still paused");
    }
}

async fn within<T>(end: Instant, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late = || Failure::new(504, "source and target did not answer in time, or the feed did not stop; try again");
    timeout_at(end, work).await.unwrap_or_else(|_| Err(late()))
}

/// Pauses the replication and waits until its feed has stopped; returns the revision of the pause, unless it was paused before.
async fn stop_feed(context: &RequestContext, id: &str) -> Result<Option<u64>, Failure> {
    let marked = context.config.marked(id, MarkKind::Paused).await;
    if let Some((revision, _)) = marked.map_err(|error| Failure::new(503, error.to_string()))? {
        context.supervisor.paused_since(id, revision).await;
        return Ok(None);
    }
    let mark = Bytes::from(reply(&PauseMark::now(&context.instance))?);
    let revision = written(id, context.config.mark(id, MarkKind::Paused, mark).await)?;
    context.supervisor.paused_since(id, revision).await;
    Ok(Some(revision))
}

/// Deletes the document of a promoted mirror. The records follow when its task has ended.
async fn delete(context: &RequestContext, id: &str) -> Result<u64, Failure> {
    let deleted = context.delete(id.to_owned(), None, false).await;
    deleted.map(|changed| changed.revision).map_err(|failure| {
        let description = format!("the mirror is promoted, but its replication `{id}` was not deleted: {failure}");
        Failure::new(503, description)
    })
}

/// What is to be done, with the connections for it.
struct Promotion {
    source: Option<nats_lane::Lane>,
    /// `None` while it is lent, and once it has not answered.
    target: Option<nats_lane::Lane>,
    /// Why there is no source.
    no_source: Option<String>,
    origin: String,
    stream: String,
    /// The configuration of the promoted stream.
    config: Value,
    subjects: Vec<String>,
    /// Last sequence of the mirror.
    last_seq: u64,
    /// Every message is mirrored.
    whole: bool,
    /// What became of the consumers that the document names.
    consumers: Vec<MovedConsumer>,
}

impl Promotion {
    async fn of(context: &RequestContext, replication: &Replication, asked: &PromoteRequest) -> Result<Self, Failure> {
        let connection = format!("{} {}", names::PROGRAM, replication.id);
        let (source, target) = tokio::join!(
            source_side(context, replication, &connection),
            context.rules.dial(&replication.target.place, &connection),
        );
        let unreachable = |error: nats_lane::Error| Failure::new(503, format!("the target cannot be asked: {error}"));
        let mut target = target.map_err(unreachable)?;
        let stream = replication.target.stream.clone();
        let info = Api::new(&mut target).stream_info(&stream).await.map_err(unreachable)?;
        let info = info.ok_or_else(|| Failure::new(409, format!("target stream `{stream}` does not exist")))?;
        let subjects = FeedSubjects::of(&context.site, &replication.id);
        check_target(NativeKind::Mirror, replication, &info, &subjects)
            .map_err(|error| Failure::new(409, error.message))?;
        if !can_promote(&target.info().version) {
            let description = format!(
                "the target's server has version {}, and servers before {}.{} cannot turn a mirror into a stream",
                target.info().version,
                FIRST.0,
                FIRST.1
            );
            return Err(Failure::new(409, description));
        }
        let mut no_source = None;
        let (source, from) = match source {
            Ok((lane, info)) => (Some(lane), Some(info)),
            Err(failure) if asked.force && !asked.subjects.is_empty() => {
                warn!(replication = replication.id, "promoting without the source: {failure}");
                no_source = Some(failure.description);
                (None, None)
            }
            Err(failure) => return Err(failure),
        };
        let subjects = subjects_of(replication, from.as_ref(), asked)?;
        let config = promoted(&info, &subjects);
        let (origin, last_seq) = (replication.source.stream.clone(), info.state.last_seq);
        let whole = replication.scope.is_whole() && replication.max_age.is_none();
        let target = Some(target);
        Ok(Self { source, target, no_source, origin, stream, config, subjects, last_seq, whole, consumers: Vec::new() })
    }

    /// The last refresh of the consumers, now that the mirror has everything. With `force`, and without the source, those that are
    /// not refreshed stay as they are, and are named.
    async fn move_consumers(
        &mut self,
        context: &RequestContext,
        replication: &Replication,
        force: bool,
        end: Instant,
    ) -> Result<Vec<MovedConsumer>, Failure> {
        if replication.consumers.is_empty() {
            return Ok(Vec::new());
        }
        let moved = match (self.source.take(), self.target.take()) {
            (Some(source), Some(target)) => {
                let times = (end - BEGUN_BEFORE, end - MOVED_BEFORE);
                let (lanes, moved) = refresh_last(context, replication, (source, target), times).await;
                (self.source, self.target) = lanes.unzip();
                moved
            }
            (source, target) => {
                (self.source, self.target) = (source, target);
                Err(self.no_source.clone().unwrap_or_default())
            }
        };
        if self.target.is_none() {
            // That one belongs to a request that is not answered.
            let connection = format!("{} {}", names::PROGRAM, replication.id);
            self.target = context.rules.dial(&replication.target.place, &connection).await.ok();
        }
        let moved = match moved {
            Ok(moved) => moved,
            Err(why) => {
                let named = not_refreshed(context, replication, self.target.as_mut(), &why);
                match timeout(LISTED_WITHIN, named).await {
                    Ok(named) => named,
                    // What is not answered belongs to this lane.
                    Err(_) => {
                        self.target = None;
                        not_refreshed(context, replication, None, &why).await
                    }
                }
            }
        };
        let late: Vec<_> = moved.iter().filter(|moved| moved.outcome == MoveOutcome::NotRefreshed).collect();
        if let Some(first) = late.first().filter(|_| !force) {
            let names: Vec<_> = late.iter().take(NAMED).map(|moved| moved.name.as_str()).collect();
            let more = if late.len() > NAMED { format!(" and {} more", late.len() - NAMED) } else { String::new() };
            return Err(Failure::new(
                503,
                format!(
                    "consumers of `{}` were not refreshed: `{}`{more}: {}; try again, or use `force` to promote it with these as \
                     they are",
                    self.stream,
                    names.join("`, `"),
                    first.reason.as_deref().unwrap_or_default()
                ),
            ));
        }
        Ok(moved)
    }

    fn target(&mut self) -> Result<&mut nats_lane::Lane, Failure> {
        self.target.as_mut().ok_or_else(|| Failure::new(503, "the target cannot be asked: it did not answer in time"))
    }

    /// Nothing moves the consumers from here on, also if the replication is added again.
    async fn release_consumers(&mut self, context: &RequestContext, replication: &Replication) {
        if replication.consumers.is_empty() {
            return;
        }
        let released = match &mut self.target {
            Some(target) => timeout(RELEASED_WITHIN, release(target, replication, &context.site)).await,
            None => Ok(Err(nats_lane::Error::retry("the target did not answer before"))),
        };
        if !matches!(released, Ok(Ok(()))) {
            // What is not answered belongs to this lane.
            self.target = None;
            release_later(context, replication);
        }
    }

    /// Compares both sides, now that the feed has stopped, and changes the stream; returns how many messages the source has that
    /// the mirror lacks, as far as that is known.
    async fn carry_out(&mut self, asked: &PromoteRequest, shown: Option<u64>) -> Result<Option<u64>, Failure> {
        let lag = self.lag(shown).await?;
        if !asked.force && lag != Some(0) {
            let (stream, origin) = (&self.stream, &self.origin);
            let lacks = lag.map_or_else(|| "an unknown number of".to_owned(), |lag| lag.to_string());
            return Err(Failure::new(
                409,
                format!(
                    "mirror `{stream}` lacks {lacks} messages of `{origin}`: stop its publishers and try again, or use `force` to \
                     promote it without them"
                ),
            ));
        }
        let (stream, config) = (self.stream.clone(), self.config.clone());
        let updated = Api::new(self.target()?).update_stream(&stream, &config).await;
        updated.map(|_| lag).map_err(|error| {
            let code = if error.api.as_ref().is_some_and(|api| api.code < 500) { 409 } else { 503 };
            Failure::new(code, format!("target stream `{}` cannot be promoted: {error}", self.stream))
        })
    }

    /// What the source has after the last message of the mirror. Where only a part is mirrored, the lag that the feed `shown` last.
    async fn lag(&mut self, shown: Option<u64>) -> Result<Option<u64>, Failure> {
        let Some(source) = &mut self.source else { return Ok(None) };
        let of_source = |error: nats_lane::Error| Failure::new(503, format!("the source cannot be asked: {error}"));
        let last = self.last_seq;
        if Api::new(source).message_from(&self.origin, last + 1).await.map_err(of_source)?.is_none() {
            return Ok(Some(0));
        }
        if !self.whole {
            return Ok(shown);
        }
        let info = Api::new(source).stream_info(&self.origin).await.map_err(of_source)?;
        Ok(info.map(|info| info.state.last_seq.saturating_sub(last)))
    }

    async fn read_target(&mut self) -> Result<(), Failure> {
        let stream = self.stream.clone();
        let info = Api::new(self.target()?).stream_info(&stream).await;
        let info = info.map_err(|error| Failure::new(503, format!("the target cannot be asked: {error}")))?;
        self.last_seq = info.map_or(self.last_seq, |info| info.state.last_seq);
        Ok(())
    }

    fn promoted(self, asked: PromoteRequest, revision: Option<u64>, lag: Option<u64>) -> Promoted {
        Promoted {
            replication: asked.replication,
            revision,
            dry_run: asked.dry_run,
            stream: self.stream,
            subjects: self.subjects,
            last_seq: self.last_seq,
            lag,
            consumers: self.consumers,
        }
    }
}

async fn source_side(
    context: &RequestContext,
    replication: &Replication,
    connection: &str,
) -> Result<(nats_lane::Lane, StreamInfo), Failure> {
    let stream = &replication.source.stream;
    let asked = async {
        let mut lane = context.rules.dial(&replication.source.place, connection).await?;
        let info = Api::new(&mut lane).stream_info(stream).await?;
        Ok::<_, nats_lane::Error>(info.map(|info| (lane, info)))
    };
    let help = "with `force` and `subjects` it is promoted without its source";
    match timeout(SOURCE_WITHIN, asked).await {
        Ok(Ok(Some(found))) => Ok(found),
        Ok(Ok(None)) => Err(Failure::new(409, format!("source stream `{stream}` does not exist; {help}"))),
        Ok(Err(error)) => Err(Failure::new(503, format!("the source cannot be asked: {error}; {help}"))),
        Err(_) => Err(Failure::new(503, format!("the source of stream `{stream}` did not answer in time; {help}"))),
    }
}

/// The subjects of the promoted stream: those of the request, else what becomes of those of the source.
fn subjects_of(
    replication: &Replication,
    source: Option<&StreamInfo>,
    asked: &PromoteRequest,
) -> Result<Vec<String>, Failure> {
    if !asked.subjects.is_empty() {
        return Ok(asked.subjects.clone());
    }
    let subjects = source.map(StreamInfo::subjects).unwrap_or_default();
    let subjects = replication.mapping.patterns(&replication.scope.of(subjects));
    if subjects.is_empty() {
        let description = format!(
            "source stream `{}` has no subjects of its own: name those of the promoted stream in `subjects`",
            replication.source.stream
        );
        return Err(Failure::new(409, description));
    }
    Ok(subjects.into_iter().collect())
}

/// The configuration of a mirror without its origin.
fn promoted(mirror: &StreamInfo, subjects: &[String]) -> Value {
    let mut config = mirror.config.clone();
    if let Some(fields) = config.as_object_mut() {
        fields.remove("mirror");
        if fields.remove("mirror_direct") == Some(true.into()) {
            fields.insert("allow_direct".to_owned(), true.into());
        }
        fields.insert("subjects".to_owned(), subjects.into());
    }
    config
}

fn can_promote(version: &str) -> bool {
    let mut parts = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next()) >= FIRST
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_promoted_mirror_keeps_everything_but_its_origin() {
        let config = json!({"name": "T", "mirror": {"name": "S"}, "mirror_direct": true, "max_age": 5});
        let mirror: StreamInfo = serde_json::from_value(json!({"config": config, "state": {}})).unwrap();
        let expect = json!({"name": "T", "max_age": 5, "allow_direct": true, "subjects": ["s.>"]});
        assert_eq!(promoted(&mirror, &["s.>".to_owned()]), expect);
    }

    #[test]
    fn servers_that_can_promote() {
        assert!(can_promote("2.12.0") && can_promote("2.15.1") && can_promote("3.0.0-dev"));
        assert!(!can_promote("2.11.9") && !can_promote("2.10.26") && !can_promote(""));
    }
}
