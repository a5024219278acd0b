//! Compares both streams of a replication while this instance leads it: by request, and as often as the document says. A request is a
//! mark beside the document; it stays until the comparison has ended. So if the leader changes, the next one begins the comparison
//! again.

use std::{convert::Infallible, future::pending, panic::AssertUnwindSafe, sync::Arc};

use chrono::{SubsecRound, TimeDelta, Utc};
use futures_util::FutureExt;
use nats_lane::entropy;
use tokio::{
    sync::watch,
    time::{Duration, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{context::Context, requests::Requests};
use crate::{
    config::{NativeKind, Replication, SamplePart, Sharing, VerifyEffort, VerifyRange},
    copy::source::consumers::ConsumerLabels,
    events::Event,
    status::{State, TargetMode, Verification, VerificationState},
    store::{MarkKind, VerifyMark, WriteError},
    verify::{self, VerifyJob},
};

/// How often progress is saved.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How long after a failed write or read the next one is tried.
const AGAIN: Duration = Duration::from_secs(2);
/// How long the watch may take to deliver a request.
const DELIVERED: Duration = Duration::from_secs(5);
/// How often a job begins before it is given up.
const STARTS: u64 = 5;
/// How often a schedule is compared with the time.
const CHECK_SCHEDULE: Duration = Duration::from_secs(1);

/// Compares when that is requested, for as long as it is polled.
pub(super) async fn run(context: Context, requests: watch::Receiver<Requests>, epoch: u64) {
    let mut verifier = Verifier { context, requests, epoch, newest: None, revision: 0 };
    verifier.load().await;
    verifier.end_withdrawn().await;
    loop {
        let (revision, mark) = verifier.next().await;
        verifier.carry_out(revision, mark).await;
    }
}

struct Verifier {
    context: Context,
    requests: watch::Receiver<Requests>,
    epoch: u64,
    /// The newest verification, as it is saved at this revision.
    newest: Option<Verification>,
    revision: u64,
}

/// How a job ended.
enum JobEnd {
    Withdrawn,
    Ended(Result<(), String>),
}

impl Verifier {
    async fn load(&mut self) {
        loop {
            match self.context.deps.positions.verification(&self.context.id).await {
                Ok((newest, revision)) => {
                    (self.newest, self.revision) = (newest, revision);
                    return;
                }
                Err(error) => debug!(replication = self.context.id, "the verification was not read: {error}"),
            }
            sleep(AGAIN).await;
        }
    }

    /// A verification whose request was withdrawn while there was no leader.
    async fn end_withdrawn(&mut self) {
        // Marks are known once the watch has delivered them, which is before the first lease.
        let waits = self.requests.borrow().verify.is_some();
        if let Some(mut newest) = self.newest.clone().filter(|newest| !newest.state.is_over() && !waits) {
            newest.state = VerificationState::Cancelled;
            newest.ended_at = Some(Utc::now().trunc_subsecs(3));
            self.save(&newest).await;
        }
    }

    /// The next request: one that is there, or one that the document makes.
    async fn next(&mut self) -> (u64, VerifyMark) {
        loop {
            if let Some((revision, value)) = self.requests.borrow_and_update().verify.clone() {
                return (revision, VerifyMark::read(&value, revision));
            }
            tokio::select! {
                biased;
                changed = self.requests.changed() => if changed.is_err() {
                    return pending().await;
                },
                () = sleep(CHECK_SCHEDULE) => self.request_if_due().await,
            }
        }
    }

    /// Makes the request of the document. It is a mark like any other: it is seen, and withdrawn, in the same way.
    async fn request_if_due(&mut self) {
        let Context { id, deps, cell, .. } = &self.context;
        let replication = cell.replication().borrow().clone();
        let Some(schedule) = replication.and_then(|replication| replication.verify) else { return };
        let row = cell.row();
        if row.state != State::Running || row.copy.position.source_seq == 0 {
            return;
        }
        let last = self.newest.as_ref().map(|newest| newest.ended_at.unwrap_or(newest.requested_at));
        let every = TimeDelta::from_std(schedule.every).unwrap_or(TimeDelta::MAX);
        if last.is_some_and(|last| Utc::now().signed_duration_since(last) < every) {
            return;
        }
        let sample = schedule.sample.map(|sample| sample.to_string());
        let effort = VerifyEffort { sample, rate: schedule.rate };
        let mark = VerifyMark { scheduled: true, effort, ..VerifyMark::now(&entropy::name()) };
        let Ok(value) = serde_json::to_vec(&mark) else { return };
        if let Err(error) = deps.config.mark(id, MarkKind::Verify, value.into()).await {
            debug!(replication = id, "the verification was not requested: {error}");
            sleep(AGAIN).await;
            return;
        }
        let mut requests = self.requests.clone();
        // The watch delivers it.
        let _ = timeout(DELIVERED, requests.wait_for(|requests| requests.verify.is_some())).await;
    }

    /// Compares, saves the result and removes the request.
    async fn carry_out(&mut self, revision: u64, mark: VerifyMark) {
        self.load().await;
        if self.newest.as_ref().is_some_and(|newest| newest.job == mark.job && newest.state.is_over()) {
            // An earlier leader ended before it removed the request.
            return self.remove_request(revision).await;
        }
        let begun = self.begin(&mark);
        self.save(&begun).await;
        let Context { id, deps, .. } = &self.context;
        info!(replication = id, job = mark.job, "compares both streams");
        let mut span = deps.traces.begin("verify", id, self.epoch);
        let (progress, shown) = watch::channel(begun);
        let starts = shown.borrow().starts;
        let end = match given_up(starts) {
            Some(error) => JobEnd::Ended(Err(error)),
            None => self.work(revision, &mark, progress, shown.clone()).await,
        };
        let mut ended = shown.borrow().clone();
        ended.ended_at = Some(Utc::now().trunc_subsecs(3));
        (ended.state, ended.error) = match end {
            JobEnd::Withdrawn => (VerificationState::Cancelled, None),
            JobEnd::Ended(Ok(())) => (VerificationState::Done, None),
            JobEnd::Ended(Err(error)) => (VerificationState::Failed, Some(error)),
        };
        span.number("source.messages", ended.source_messages);
        span.number("target.messages", ended.target_messages);
        span.number("findings", ended.findings);
        if let Some(error) = &ended.error {
            span.fail("verify", error);
        }
        drop(span);
        self.save(&ended).await;
        self.report(&ended);
        self.remove_request(revision).await;
    }

    fn begin(&self, mark: &VerifyMark) -> Verification {
        let before = self.newest.as_ref();
        let starts = before.filter(|before| before.job == mark.job).map_or(0, |before| before.starts);
        let mut begun = Verification::requested(&mark.job, mark.at, before);
        begun.state = VerificationState::Running;
        begun.scheduled = mark.scheduled;
        begun.started_at = Some(Utc::now().trunc_subsecs(3));
        begun.instance = Some(self.context.deps.instance.clone());
        begun.starts = starts + 1;
        let VerifyMark { range: VerifyRange { from, to, repair }, effort, .. } = mark;
        (begun.from, begun.to) = (from.unwrap_or_default(), to.unwrap_or_default());
        (begun.sample, begun.rate, begun.repair) = (effort.sample.clone(), effort.rate, *repair);
        begun
    }

    async fn work(
        &mut self,
        revision: u64,
        mark: &VerifyMark,
        progress: watch::Sender<Verification>,
        shown: watch::Receiver<Verification>,
    ) -> JobEnd {
        let (requests, context, epoch) = (self.requests.clone(), self.context.clone(), self.epoch);
        let compare = async {
            let job = match job(&context, mark, epoch).await {
                Ok(job) => job,
                Err(error) => return Err(error),
            };
            let result = AssertUnwindSafe(verify::run(&job, &progress)).catch_unwind().await;
            result
                .unwrap_or_else(|_| Err(nats_lane::Error::hold("comparing panicked")))
                .map_err(|error| error.to_string())
        };
        tokio::select! {
            biased;
            () = withdrawn(requests, revision) => JobEnd::Withdrawn,
            result = compare => JobEnd::Ended(result),
            never = self.keep_saving(shown) => match never {},
        }
    }

    async fn keep_saving(&mut self, shown: watch::Receiver<Verification>) -> Infallible {
        let mut saved = shown.borrow().clone();
        loop {
            sleep(SAVE_EVERY).await;
            let now = shown.borrow().clone();
            if now != saved {
                self.save(&now).await;
                saved = now;
            }
        }
    }

    /// Saves a verification, again after another write. What cannot be saved now is saved with the next one; the result is tried
    /// until it is saved.
    async fn save(&mut self, verification: &Verification) {
        loop {
            let Context { id, deps, .. } = &self.context;
            match deps.positions.save_verification(id, verification, self.revision).await {
                Ok(Some(revision)) => {
                    (self.newest, self.revision) = (Some(verification.clone()), revision);
                    return;
                }
                Ok(None) => {}
                Err(error) => {
                    debug!(replication = id, "the verification was not saved: {error}");
                    if !verification.state.is_over() {
                        return;
                    }
                    sleep(AGAIN).await;
                }
            }
            self.load().await;
        }
    }

    fn report(&self, ended: &Verification) {
        let Verification { job, state, from, to, source_messages: messages, findings, error, .. } = ended.clone();
        let id = &self.context.id;
        match (&error, findings) {
            (Some(error), _) => warn!(replication = id, job, "comparing failed: {error}"),
            (None, 0) => info!(replication = id, job, ?state, messages, findings, "compared both streams"),
            (None, _) => warn!(replication = id, job, ?state, messages, findings, "both streams differ"),
        }
        let repaired = ended.repaired.as_ref().map(|repaired| repaired.stored);
        self.context.emit(Event::Verified { job, state, from, to, messages, findings, repaired, message: error });
    }

    async fn remove_request(&mut self, revision: u64) {
        let Context { id, deps, .. } = &self.context;
        // A conflict means that it was put again, or is gone.
        while let Err(WriteError::Store(error)) = deps.config.unmark(id, MarkKind::Verify, Some(revision)).await {
            debug!(replication = id, "the request to verify was not removed: {error}");
            sleep(AGAIN).await;
        }
        let _ = self.requests.wait_for(|requests| requests.verify.as_ref().is_none_or(|(at, _)| *at != revision)).await;
    }
}

/// Why a job is not begun once more, where the leaders before ended while they compared.
fn given_up(starts: u64) -> Option<String> {
    (starts > STARTS).then(|| {
        format!(
            "it began {STARTS} times, and each time the leader stopped or changed before it ended: see why in the logs of the \
             instances, or compare smaller ranges, with `from` and `to`"
        )
    })
}

/// Waits until a request is no longer there.
async fn withdrawn(mut requests: watch::Receiver<Requests>, revision: u64) {
    let gone = |requests: &Requests| requests.verify.as_ref().is_none_or(|(at, _)| *at != revision);
    if requests.wait_for(gone).await.is_err() {
        pending::<()>().await;
    }
}

/// What a request asks for; the error says why nothing can be compared.
async fn job(context: &Context, mark: &VerifyMark, epoch: u64) -> Result<VerifyJob, String> {
    let Context { deps, id, cell, known_streams, .. } = context;
    let mut known = cell.replication();
    let Ok(found) = known.wait_for(Option::is_some).await.map(|known| known.clone()) else { return pending().await };
    let replication: Arc<Replication> = found.ok_or("there is no document that can run")?;
    known_streams.loaded().await;
    let VerifyMark { range: VerifyRange { from, to, repair }, effort, .. } = mark;
    let sample = effort
        .sample
        .as_deref()
        .map(|text| SamplePart::parse(text).map_err(|wrong| format!("`sample` `{text}` {wrong}")));
    let sample = sample.transpose()?;
    if let Some(why) = verify::cannot_repair(&replication).filter(|_| *repair) {
        return Err(format!("it cannot be repaired: {why}"));
    }
    let record = loop {
        match deps.positions.read(id).await {
            Ok((record, _)) if record.epoch >= epoch => break record,
            // Not claimed yet: what the leader before copied is settled all the same.
            Ok((record, _)) if record.source.is_some() => break record,
            Ok(_) => {}
            Err(error) => debug!(replication = id, "the position was not read: {error}"),
        }
        sleep(Duration::from_millis(200)).await;
    };
    let row = cell.row();
    let saved = record.source.as_ref().map_or(0, |source| source.seq);
    // A copy that runs is further than what was saved last.
    let settled = match row.state {
        State::Running => saved.max(row.copy.position.source_seq),
        _ => saved,
    };
    let is_source = replication.native.as_ref().is_some_and(|native| native.kind == NativeKind::Source);
    let is_shared = is_source
        || replication.target_mode == Sharing::Shared
        || record.target_mode == TargetMode::Shared
        || row.copy.target_mode == TargetMode::Shared
        || known_streams.other_writer(&replication).is_some();
    Ok(VerifyJob {
        job: mark.job.clone(),
        site: deps.site.clone(),
        dial: Arc::new(deps.rules.clone()),
        consumers: context.consumers(),
        labels: ConsumerLabels::new(&deps.site, id, Some(&deps.instance)),
        ways_back: known_streams.ways_back(&replication),
        from_target: record.from_target.clone(),
        generation: record.generation,
        settled,
        is_shared,
        // What the copy will find at its next message is found here first.
        admits_others: is_shared || replication.target_mode == Sharing::Auto,
        from: *from,
        to: *to,
        sample,
        rate: effort.rate.filter(|rate| *rate > 0),
        repair: *repair,
        replication: Arc::unwrap_or_clone(replication),
    })
}
