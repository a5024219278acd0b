//! `verify`: a mark beside the document, which has the leader compare both streams.

use bytes::Bytes;
use nats_lane::entropy;
use tracing::{debug, info};

use super::{RequestContext, check_id, in_time, named, position::runnable, reply, written};
use crate::{
    config::{SamplePart, VerifyEffort, VerifyRange},
    control::{
        api::{Changed, Failure, NamedRequest, VerifyRequest, VerifyShown, VerifyStarted},
        service::Request,
    },
    status::Verification,
    store::{MarkKind, VerifyMark},
    verify::cannot_repair,
};

/// Most messages in a second.
const FASTEST: u64 = 10_000_000;

pub(super) async fn verify(context: &RequestContext, request: Request) -> Result<VerifyStarted, Failure> {
    in_time(&request)?;
    let asked = named(&request.body, |replication| VerifyRequest { replication, ..VerifyRequest::default() })?;
    let sample = wanted(&asked)?;
    let VerifyRequest { replication: id, range, mut effort } = asked;
    effort.sample = sample.map(|sample| sample.to_string());
    let entry = context.existing(&id).await?;
    let replication = runnable(context, entry).await?;
    let refused = |why: &str| Failure::new(409, format!("replication `{id}` {why}"));
    if replication.patterns.is_some() {
        return Err(refused("finds streams and copies none itself: verify the replications of its streams"));
    }
    if let Some(why) = cannot_repair(&replication).filter(|_| range.repair) {
        return Err(refused(&format!("cannot be repaired: {why}")));
    }
    let unavailable = |error: crate::store::Error| Failure::new(503, error.to_string());
    let marked = context.config.marked(&id, MarkKind::Verify).await.map_err(unavailable)?;
    let (before, revision) = context.positions.verification(&id).await.map_err(unavailable)?;
    if let Some((revision, value)) = marked {
        let running = VerifyMark::read(&value, revision).job;
        // The mark of one that has ended is removed in a moment.
        if before.as_ref().is_none_or(|before| before.job != running || !before.state.is_over()) {
            return Err(refused(&format!("is being verified by job `{running}`: wait for its end, or cancel it")));
        }
    }
    let mark = VerifyMark { range, effort, ..VerifyMark::now(&entropy::name()) };
    let value = Bytes::from(reply(&mark)?);
    let marked = written(&id, context.config.mark(&id, MarkKind::Verify, value).await)?;
    // The leader may have begun meanwhile, and then it has written more than this.
    let mut waiting = Verification::requested(&mark.job, mark.at, before.as_ref());
    (waiting.sample, waiting.rate, waiting.repair) = (mark.effort.sample, mark.effort.rate, mark.range.repair);
    if let Err(error) = context.positions.save_verification(&id, &waiting, revision).await {
        debug!(replication = id, "the request to verify is not shown yet: {error}");
    }
    info!(replication = id, job = mark.job, "both streams will be compared by request");
    Ok(VerifyStarted { replication: id, revision: marked, job: mark.job })
}

/// Checks the values of a request.
fn wanted(asked: &VerifyRequest) -> Result<Option<SamplePart>, Failure> {
    let wrong = |message: String| Failure::new(400, message);
    let VerifyRequest { range: VerifyRange { from, to, .. }, effort: VerifyEffort { sample, rate }, .. } = asked;
    if let Some(from) = from.filter(|from| *from == 0) {
        return Err(wrong(format!("`from` is {from}: sequences begin with 1")));
    }
    if let (from, Some(to)) = (from.unwrap_or(1), *to)
        && to < from
    {
        return Err(wrong(format!("`to` is {to}, before `from`, which is {from}")));
    }
    if let Some(rate) = rate.filter(|rate| !(1..=FASTEST).contains(rate)) {
        return Err(wrong(format!("`rate` is {rate}: it is 1 to {FASTEST} messages in a second")));
    }
    let sample = sample.as_deref().filter(|text| !text.is_empty());
    let sample = sample.map(|text| SamplePart::parse(text).map_err(|why| wrong(format!("`sample` `{text}` {why}"))));
    sample.transpose()
}

pub(super) async fn verify_status(context: &RequestContext, request: Request) -> Result<VerifyShown, Failure> {
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    check_id(&replication)?;
    if context.supervisor.row(&replication).is_none() {
        return Err(context.not_found(&replication).await);
    }
    let verification = context.supervisor.verification(&replication);
    Ok(VerifyShown { replication, verification })
}

pub(super) async fn verify_cancel(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let NamedRequest { replication } = named(&request.body, |replication| NamedRequest { replication })?;
    context.existing(&replication).await?;
    let marked = context.config.marked(&replication, MarkKind::Verify).await;
    if marked.map_err(|error| Failure::new(503, error.to_string()))?.is_none() {
        return Err(Failure::new(409, format!("replication `{replication}` is not being verified")));
    }
    let revision = written(&replication, context.config.unmark(&replication, MarkKind::Verify, None).await)?;
    info!(replication, revision, "comparing cancelled by request");
    Ok(Changed { replication, revision })
}
