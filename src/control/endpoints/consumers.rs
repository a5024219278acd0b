//! `consumers.*`: durable consumers of a source, with their positions at the target.

use nats_lane::{Dial, Lane};
use serde_json::Value;
use tokio::time::{Duration, Instant, timeout, timeout_at};
use tracing::info;

use super::{RequestContext, in_time, json, named, position::runnable};
use crate::{
    config::Replication,
    control::{
        api::{
            ConsumersRequest, ExportedConsumer, ExportedConsumers, Failure, ImportRequest, ImportedConsumer,
            ImportedConsumers, MoveOutcome, MovedConsumer,
        },
        service::Request,
    },
    copy::moved_consumers::{self, ConsumerMover, ConsumerOutcome, KnownStarts, PlannedConsumer, Selection},
    names,
};

/// From the request to the answer: less than a request may take.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_400);
/// Deadline of an import, which continues after its answer was due.
const IMPORT_WITHIN: Duration = Duration::from_secs(10);
/// Consumers of one import.
const MOST: usize = 500;

pub(super) async fn consumers_export(context: &RequestContext, request: Request) -> Result<ExportedConsumers, Failure> {
    let end = Instant::now() + ANSWER_WITHIN;
    let ConsumersRequest { replication, consumers } =
        named(&request.body, |replication| ConsumersRequest { replication, ..ConsumersRequest::default() })?;
    let work = async {
        let mut sides = ConsumerSides::open(context, &replication).await?;
        let names = if consumers.is_empty() { sides.replication.consumers.clone() } else { consumers };
        let planned = sides.mover(context).export(&Selection::new(&names)).await.map_err(refused)?;
        Ok((sides.replication, planned))
    };
    let (found, planned) = within(end, work).await?;
    let exported = planned.into_iter().map(|PlannedConsumer { name, position, start, config }| {
        let (config, error) = match config {
            Ok(config) => (config, None),
            Err(error) => (Value::Null, Some(error)),
        };
        ExportedConsumer { name, position, start, config, error }
    });
    Ok(ExportedConsumers {
        replication,
        stream: found.source.stream,
        target_stream: found.target.stream,
        consumers: exported.collect(),
    })
}

pub(super) async fn consumers_import(context: &RequestContext, request: Request) -> Result<ImportedConsumers, Failure> {
    let end = Instant::now() + ANSWER_WITHIN;
    in_time(&request)?;
    let ImportRequest { replication, consumers } = json(&request.body)?;
    if !(1..=MOST).contains(&consumers.len()) {
        let number = consumers.len();
        let description = format!("`consumers` has {number} consumers: one request is for 1 to {MOST} of them");
        return Err(Failure::new(400, description));
    }
    consumers.iter().try_for_each(check)?;
    let work = async {
        let sides = ConsumerSides::open(context, &replication).await?;
        // A task, so that a request that takes too long leaves no consumer deleted.
        let import = tokio::spawn(import(sides, context.site.clone(), context.installation.clone(), consumers));
        import.await.map_err(|error| Failure::new(500, format!("the import ended: {error}")))?
    };
    let (target_stream, done) = within(end, work).await?;
    info!(replication, consumers = done.len(), "consumers imported by request");
    Ok(ImportedConsumers { replication, target_stream, consumers: done.into_iter().map(moved).collect() })
}

/// Creates and moves the consumers; returns the stream of the target too.
async fn import(
    mut sides: ConsumerSides,
    site: String,
    installation: String,
    consumers: Vec<ImportedConsumer>,
) -> Result<(String, Vec<(PlannedConsumer, ConsumerOutcome)>), Failure> {
    let ConsumerSides { replication, source, target } = &mut sides;
    let (site, installation) = (&site, &installation);
    let mut mover = ConsumerMover { replication, site, installation, source, target, until: None };
    let planned: Vec<_> = consumers
        .iter()
        .map(|consumer| mover.exported(&consumer.name, consumer.position, consumer.start, &consumer.config))
        .collect();
    let done = timeout(IMPORT_WITHIN, mover.import(&planned)).await;
    let done = done.unwrap_or_else(|_| Err(nats_lane::Error::retry(format!("no answer for {IMPORT_WITHIN:?}"))));
    let done = done.map_err(refused)?;
    Ok((sides.replication.target.stream, done))
}

/// An export has what a consumer needs; what was written by hand may not.
fn check(consumer: &ImportedConsumer) -> Result<(), Failure> {
    let ImportedConsumer { name, start, config, .. } = consumer;
    let is_name =
        !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c));
    let wrong = if !is_name {
        "its name is empty or has a character that no consumer's name has"
    } else if *start == 0 {
        "`start` is 0: it is the sequence of the first message, at least 1"
    } else if config["durable_name"] != name.as_str() {
        "`config.durable_name` is not its name: only durable consumers are imported"
    } else {
        return Ok(());
    };
    let name: String = name.chars().take(80).collect();
    Err(Failure::new(400, format!("consumer `{}`: {wrong}", name.escape_debug())))
}

async fn within<T>(end: Instant, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let late = || Failure::new(504, "source and target did not answer in time; try again");
    timeout_at(end, work).await.unwrap_or_else(|_| Err(late()))
}

fn refused(error: nats_lane::Error) -> Failure {
    Failure::new(503, format!("consumers cannot be moved: {error}"))
}

/// A replication, connected to both sides.
pub(super) struct ConsumerSides {
    replication: Replication,
    source: Lane,
    target: Lane,
}

impl ConsumerSides {
    async fn open(context: &RequestContext, id: &str) -> Result<Self, Failure> {
        if context.read_only {
            return Err(Failure::new(403, "the service is read-only: it connects to no server on request"));
        }
        let entry = context.existing(id).await?;
        let replication = runnable(context, entry).await?;
        if replication.patterns.is_some() {
            let description =
                format!("replication `{id}` finds streams and has none of its own: name one that it has found");
            return Err(Failure::new(409, description));
        }
        let name = format!("{} {id}", names::PROGRAM);
        let (source, target) = tokio::join!(
            context.rules.dial(&replication.source.place, &name),
            context.rules.dial(&replication.target.place, &name)
        );
        let source = source.map_err(|error| refused(error.context("source")))?;
        let target = target.map_err(|error| refused(error.context("target")))?;
        Ok(Self { replication, source, target })
    }

    fn mover<'a>(&'a mut self, context: &'a RequestContext) -> ConsumerMover<'a> {
        let RequestContext { site, installation, .. } = context;
        let Self { replication, source, target } = self;
        ConsumerMover { replication, site, installation, source, target, until: None }
    }
}

/// The last refresh before a promotion: no consumer is begun after `until`, and the result is there at `end`. The lanes, to the
/// source and to the target, are there again unless a server did not answer.
pub(super) async fn refresh_last(
    context: &RequestContext,
    replication: &Replication,
    lanes: (Lane, Lane),
    (until, end): (Instant, Instant),
) -> (Option<(Lane, Lane)>, Result<Vec<MovedConsumer>, String>) {
    let (site, installation, replication) = (context.site.clone(), context.installation.clone(), replication.clone());
    // A task, so that a consumer that is being moved is not left deleted.
    let task = tokio::spawn(async move {
        let (mut source, mut target) = lanes;
        let selection = Selection::new(&replication.consumers);
        let (source_lane, target_lane, until) = (&mut source, &mut target, Some(until));
        let mut mover = ConsumerMover {
            replication: &replication,
            site: &site,
            installation: &installation,
            source: source_lane,
            target: target_lane,
            until,
        };
        let done = timeout(IMPORT_WITHIN, mover.refresh(&selection, &mut KnownStarts::default())).await;
        ((source, target), done)
    });
    match timeout_at(end, task).await {
        Ok(Ok((lanes, Ok(done)))) => {
            let done = done.map_err(|error| error.to_string());
            (Some(lanes), done.map(|done| done.into_iter().map(moved).collect()))
        }
        Ok(Err(error)) => (None, Err(format!("the refresh ended: {error}"))),
        Ok(Ok((_, Err(_)))) | Err(_) => (None, Err("source or target did not answer in time".to_owned())),
    }
}

/// The consumers of a replication that were not refreshed: those at the target, if it is known, and those that the document has by
/// their names.
pub(super) async fn not_refreshed(
    context: &RequestContext,
    replication: &Replication,
    target: Option<&mut Lane>,
    reason: &str,
) -> Vec<MovedConsumer> {
    let known = match target {
        Some(target) => moved_consumers::at_target(target, replication, &context.site).await.unwrap_or_default(),
        None => Vec::new(),
    };
    let is_name = |name: &&String| !name.contains(['*', '?']) && !known.iter().any(|(known, ..)| known == *name);
    let missing: Vec<_> = replication.consumers.iter().filter(is_name).map(|name| (name.clone(), 0, 0)).collect();
    let all = known.into_iter().chain(missing);
    all.map(|(name, position, start)| MovedConsumer {
        name,
        position,
        start,
        outcome: MoveOutcome::NotRefreshed,
        reason: Some(reason.to_owned()),
    })
    .collect()
}

fn moved((planned, outcome): (PlannedConsumer, ConsumerOutcome)) -> MovedConsumer {
    let PlannedConsumer { name, position, start, .. } = planned;
    let (outcome, reason) = match outcome {
        ConsumerOutcome::Created => (MoveOutcome::Created, None),
        ConsumerOutcome::Moved => (MoveOutcome::Moved, None),
        ConsumerOutcome::Current => (MoveOutcome::Current, None),
        ConsumerOutcome::InUse => (MoveOutcome::InUse, None),
        ConsumerOutcome::Late => (MoveOutcome::NotRefreshed, Some("there was no time left for it".to_owned())),
        ConsumerOutcome::Refused(why) => (MoveOutcome::Refused, Some(why)),
    };
    MovedConsumer { name, position, start, outcome, reason }
}
