//! Keeps one document running: claims the position record, copies, waits after errors and tries again.

mod consumers;
mod discovery;
mod gone;
mod gossip;
mod hand_back;
mod kind;
mod login_grace;
mod pause;
mod record;
mod release;
mod retry;
mod senders;
mod state_file;

use std::{convert::Infallible, future::pending, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;
use nats_lane::backoff::Backoff;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    consumers::ConsumerRefresh, gossip::Gossip, hand_back::HandBack, login_grace::LoginGrace, release::clear_release,
    state_file::StateFile,
};
use super::{
    context::Context,
    outage::Outage,
    record_notes::note_election_wait,
    requests::Requests,
    retention_watch::RetentionWatch,
    standby_senders::StandbySenders,
    status_cell::{CopyProgress, StatusCell},
};
use crate::{
    config::{Replication, StreamPatterns},
    copy::{Error, ErrorKind, Escalation, Job, PositionWriter},
    election::{Campaign, Election, Leadership, lost, won},
    events::{Event, Step},
    status::{CopyStatus, State},
    store::SourceMessage,
    traces::TraceSpan,
};

/// Pauses between attempts after transient errors.
const RETRY: Backoff = Backoff::RETRY;

/// A runner that found another instance's record under its own lease leaves the lease alone for this long.
const AGAIN: Duration = Duration::from_secs(1);

/// Time limit for the last save of the status row, and for a claim that is under way at a stop.
const LAST_SAVE: Duration = Duration::from_secs(2);

/// How long a run must have been copying before an outage is over.
const STEADY: Duration = Duration::from_secs(1);

/// Why the runner stopped copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunnerEnd {
    /// By request.
    Stopped,
    /// Another instance leads the replication.
    Superseded,
    /// Nothing moves, even after connecting again.
    Stalled,
}

/// What was copied since a start or an error, until nothing is left to copy.
#[derive(Debug, Clone, Copy)]
pub(super) struct CatchUp {
    since: Instant,
    /// Messages that were copied before.
    copied: u64,
}

impl CatchUp {
    fn from(copied: u64) -> Self {
        Self { since: Instant::now(), copied }
    }
}

/// Keeps a document running under one lease.
pub(super) struct CopyRunner {
    context: Context,
    requests: watch::Receiver<Requests>,
    /// Revision of the release that was handled last.
    released: Option<u64>,
    /// Taken out while in use. `None` until the record is claimed, and after a write that was dropped or refused: then the
    /// content of the bucket is in doubt.
    writer: Option<PositionWriter>,
    /// The writer in doubt: a standalone instance continues with it while it cannot reach the bucket.
    doubted: Option<PositionWriter>,
    backoff: Backoff,
    outage: Outage,
    escalation: Escalation,
    pub(super) retention: RetentionWatch,
    login_grace: LoginGrace,
    /// The start of this document was reported.
    start_reported: bool,
    /// From the takeover from another instance until it copies.
    takeover: Option<TraceSpan>,
    /// Until it is reported that nothing is left to copy.
    catching_up: Option<CatchUp>,
    /// The last row was not saved, even if the writer remembers it.
    unsaved: bool,
    /// Another instance owns the record: this one does not write it again.
    pub(super) superseded: bool,
    /// Epoch of the lease.
    epoch: u64,
    /// The leader event of this lease was published.
    leader_reported: bool,
    /// The end of a pause was reported, and no pause since.
    resume_reported: bool,
    /// The senders of a sampled replication.
    senders: Option<StandbySenders>,
}

impl CopyRunner {
    pub(super) fn new(
        context: Context,
        requests: watch::Receiver<Requests>,
        epoch: u64,
        senders: Option<StandbySenders>,
    ) -> Self {
        Self {
            context,
            requests,
            released: None,
            writer: None,
            doubted: None,
            backoff: RETRY,
            outage: Outage::default(),
            escalation: Escalation::default(),
            retention: RetentionWatch::default(),
            login_grace: LoginGrace::default(),
            start_reported: false,
            takeover: None,
            catching_up: None,
            unsaved: false,
            superseded: false,
            epoch,
            leader_reported: false,
            resume_reported: false,
            senders,
        }
    }

    /// Copies until `stop`, until another instance leads the replication, or until only a complete restart may help. If
    /// the replication takes part in Choria's election, it copies only while it wins.
    pub(super) async fn copy(
        &mut self,
        replication: &Replication,
        revision: u64,
        stop: &CancellationToken,
    ) -> RunnerEnd {
        let Some(election) = Election::of(replication) else {
            return Box::pin(self.keep_copying(replication, revision, stop)).await;
        };
        let dial = Arc::new(self.context.deps.rules.clone());
        let campaign = Campaign::start(dial, replication.source.place.clone(), election);
        self.context.cell.set_poll(Some(campaign.poll()));
        let ended = Box::pin(self.copy_while_won(replication, revision, stop, campaign.led())).await;
        self.context.cell.set_poll(None);
        // Messages in flight have settled, and the position is saved.
        campaign.stop().await;
        ended
    }

    async fn copy_while_won(
        &mut self,
        replication: &Replication,
        revision: u64,
        stop: &CancellationToken,
        mut led: watch::Receiver<Leadership>,
    ) -> RunnerEnd {
        let (id, cell) = (self.context.id.clone(), self.context.cell.clone());
        cell.adopt(replication, revision);
        loop {
            cell.set_state(State::Stopped);
            let seen = led.clone();
            let context = self.context.clone();
            let epoch = self.epoch;
            tokio::select! {
                biased;
                () = stop.cancelled() => return RunnerEnd::Stopped,
                won = won(&mut led) => if !won {
                    return RunnerEnd::Stalled;
                },
                never = show_election_errors(&cell, seen) => match never {},
                never = note_election_wait(&context, epoch) => match never {},
                never = self.hear_gossip(replication) => match never {},
            }
            self.forget_unseen(replication);
            info!(replication = id, "won Choria's election");
            tokio::select! {
                biased;
                // Polled first whenever this task wakes.
                () = lost(&mut led) => {
                    warn!(replication = id, "lost Choria's election: nothing is copied until it is won again");
                    cell.run_over();
                    cell.released();
                    // The next claim reads the record again.
                    self.doubt();
                    let message = Some("Choria's election was lost".to_owned());
                    let position = Some(cell.row().copy.position.source_seq);
                    self.context.emit(Event::Stopped { position, message });
                }
                ended = self.keep_copying(replication, revision, stop) => return ended,
            }
        }
    }

    /// Copies until `stop`, until another instance leads the replication, or until only a complete restart may help.
    /// Follows the lag and the headroom meanwhile.
    async fn keep_copying(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> RunnerEnd {
        let (context, mut retention) = (self.context.clone(), std::mem::take(&mut self.retention));
        let ended = tokio::select! {
            biased;
            ended = self.keep_trying(replication, revision, stop) => ended,
            never = retention.follow(&context, replication), if replication.patterns.is_none() => match never {},
        };
        self.retention = retention;
        if ended != RunnerEnd::Stalled {
            context.outages.left(&context.id);
        }
        ended
    }

    async fn keep_trying(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> RunnerEnd {
        self.start_reported = false;
        self.catching_up = Some(CatchUp::from(self.context.cell.copied()));
        self.backoff.reset();
        self.context.cell.adopt(replication, revision);
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let mut span = self.begin_span(replication);
            let copied = self.context.cell.copied();
            let result = self.attempt(replication, stop).await;
            self.context.cell.run_over();
            span.number("copied", self.context.cell.copied().saturating_sub(copied));
            span.number("position", self.context.cell.row().copy.position.source_seq);
            if let Err(error) = &result {
                span.fail(error.kind.name(), &error.message);
            }
            drop(span);
            let error = match result {
                Ok(()) if stop.is_cancelled() => return RunnerEnd::Stopped,
                Ok(()) => Error::new(ErrorKind::Retry, "it ended unasked"),
                Err(error) => self.login_grace.judge(error, replication, begun),
            };
            let outcome = match error.kind {
                ErrorKind::Superseded => Err(error),
                _ => Box::pin(self.wait_after_error(error, replication, begun, stop)).await,
            };
            match outcome {
                Ok(Step::Everything) if !stop.is_cancelled() => {
                    // The bucket decides, not the memory of it.
                    self.doubt();
                    return RunnerEnd::Stalled;
                }
                Ok(_) => {}
                Err(superseded) => {
                    self.end_superseded(&superseded);
                    return RunnerEnd::Superseded;
                }
            }
        }
        RunnerEnd::Stopped
    }

    /// The span of a run.
    fn begin_span(&self, replication: &Replication) -> TraceSpan {
        let mut span = self.context.deps.traces.begin("run", &self.context.id, self.epoch);
        span.text("source.stream", &replication.source.stream);
        span.text("target.stream", &replication.target.stream);
        span
    }

    /// One run.
    async fn attempt(&mut self, replication: &Replication, stop: &CancellationToken) -> Result<(), Error> {
        self.context.cell.begin();
        // Before anything can fail: each release is handled once.
        let release = self.requests.borrow().release;
        self.released = release.map(|release| release.revision);
        {
            // Boxed, as everything else that is over or far away while a replication is idle.
            let mut claim = Box::pin(async {
                self.claim().await?;
                self.know_senders(replication).await
            });
            tokio::select! {
                biased;
                claimed = &mut claim => claimed?,
                () = stop.cancelled() => {
                    // Its write may be under way: a deletion waits for the end of this task to remove the record, and
                    // the record must not be written after that.
                    let _ = timeout(LAST_SAVE, claim).await;
                    return Ok(());
                }
            }
        }
        if let Some(patterns) = &replication.patterns {
            return Box::pin(self.discover(replication, patterns, stop)).await;
        }
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        let mut job = self.job(replication, release.and_then(|release| release.skip));
        let Self { context, requests, start_reported, takeover, catching_up, outage, .. } = self;
        let Context { deps, cell, .. } = &*context;
        let saved = writer.saved();
        let before = cell.progress();
        let mut hand_back = HandBack::for_replication(replication);
        let mut consumers = ConsumerRefresh::for_replication(replication, cell);
        let mut state_file = StateFile::of(deps.state_store.as_deref(), replication);
        let samples = job.samples.clone();
        let gossip = Gossip::of(replication);
        let (mut gossip, report) = gossip.map_or((None, None), |(gossip, report)| (Some(gossip), Some(report)));
        if let Some(samples) = &mut job.samples {
            samples.report = report;
        }
        let run = Box::pin(kind::run(&job, &mut writer, cell.status(), &deps.events, stop.clone()));
        let run = AssertUnwindSafe(run).catch_unwind();
        let result = tokio::select! {
            biased;
            result = run => result,
            never = report_progress(context, before, replication, (start_reported, takeover, catching_up, outage)) => match never {},
            never = hand_back::follow(&mut hand_back, context, replication) => match never {},
            never = consumers::follow(&mut consumers, context, replication) => match never {},
            never = gossip::publish(&mut gossip, context, replication) => match never {},
            never = state_file::follow(&mut state_file, samples.clone()) => match never {},
            never = clear_release(context, requests.clone(), saved, |_| true) => match never {},
        };
        consumers::finish(consumers, &self.context).await;
        if self.context.cell.progress() != before {
            self.backoff.reset();
            self.escalation.over();
        }
        let result = result
            .map_err(|panic| Error::new(ErrorKind::Retry, format!("the copy panicked: {}", panic_text(&*panic))))?;
        if result.is_ok() && stop.is_cancelled() {
            let position = *writer.saved().borrow();
            let moved = hand_back::finish(hand_back, &self.context, replication, position);
            tokio::join!(moved, state_file::finish(state_file, samples));
        }
        self.writer = Some(writer);
        result
    }

    /// One run of a document with patterns.
    async fn discover(
        &mut self,
        replication: &Replication,
        patterns: &StreamPatterns,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        let Self { context, start_reported, takeover, catching_up, outage, .. } = self;
        let before = context.cell.progress();
        let result = tokio::select! {
            biased;
            result = discovery::run(context, replication, patterns, &mut writer, stop) => result,
            never = report_progress(context, before, replication, (start_reported, takeover, catching_up, outage)) => match never {},
        };
        self.writer = Some(writer);
        result
    }

    /// What a run copies, and what it works with.
    fn job(&self, replication: &Replication, skip: Option<SourceMessage>) -> Job {
        let Context { deps, cell, known_streams, .. } = &self.context;
        Job {
            site: deps.site.clone(),
            installation: deps.installation.clone(),
            replication: replication.clone(),
            row: cell.row(),
            budget: deps.budget.clone(),
            skip,
            neighbour: known_streams.other_writer(replication),
            ways_back: known_streams.ways_back(replication),
            samples: self.samples(),
            consumers: self.context.consumers(),
            own_streams: deps.own_streams.clone(),
            standalone: deps.standalone,
            dial: Arc::new(deps.rules.clone()),
        }
    }

    /// The lease ends: reports that and saves the last row. Returns how long to leave the lease alone.
    pub(super) async fn finish(mut self) -> Duration {
        if self.superseded {
            return AGAIN;
        }
        let Context { id, cell, .. } = &self.context;
        cell.run_over();
        cell.set_state(State::Stopped);
        let position = cell.row().copy.position.source_seq;
        if cell.released() {
            info!(replication = id, position, "stopped");
            self.context.emit(Event::Stopped { position: Some(position), message: None });
        }
        let _ = timeout(LAST_SAVE, self.save_row()).await;
        Duration::ZERO
    }
}

/// Shows errors that keep this instance out of Choria's election.
async fn show_election_errors(cell: &StatusCell, mut led: watch::Receiver<Leadership>) -> Infallible {
    let mut shown = None;
    loop {
        let error = led.borrow_and_update().error.clone();
        if let Some(text) = error.as_ref().filter(|_| error != shown) {
            cell.failed(&Error::new(ErrorKind::Retry, format!("Choria's election: {text}")), None);
        }
        if error.is_none() && shown.is_some() {
            cell.at_rest();
        }
        shown = error;
        if led.changed().await.is_err() {
            return pending().await;
        }
    }
}

/// Reports when a run has started to copy and when an outage is over: the run has been copying for a while, and
/// progresses unless it is caught up.
async fn report_progress(
    context: &Context,
    before: CopyProgress,
    replication: &Replication,
    (start_reported, takeover, catching_up, outage): (
        &mut bool,
        &mut Option<TraceSpan>,
        &mut Option<CatchUp>,
        &mut Outage,
    ),
) -> Infallible {
    let mut status = context.cell.status().subscribe();
    let _ = status.wait_for(|(state, _)| *state == State::Running).await;
    // It ends now.
    *takeover = None;
    if !std::mem::replace(start_reported, true) {
        let (source, target) = (&replication.source.stream, &replication.target.stream);
        info!(replication = context.id, source, target, "copying");
        context.emit(Event::Started { epoch: context.cell.row().epoch });
    }
    while outage.is_open() {
        sleep(STEADY).await;
        let row = context.cell.row();
        let caught_up = row.copy.lag.is_some_and(|lag| lag.messages == 0);
        if row.state == State::Running && (caught_up || context.cell.progress() != before) {
            outage.over();
            info!(replication = context.id, position = row.copy.position.source_seq, "repaired");
            context.outages.repaired(&context.id, Event::Repaired { position: row.copy.position.source_seq });
        }
    }
    let is_caught_up =
        |(state, copy): &(State, CopyStatus)| *state == State::Running && copy.lag.is_some_and(|lag| lag.messages == 0);
    if let Some(CatchUp { since, copied }) = catching_up.filter(|_| replication.patterns.is_none()) {
        let _ = status.wait_for(is_caught_up).await;
        *catching_up = None;
        let (position, copied) =
            (context.cell.row().copy.position.source_seq, context.cell.copied().saturating_sub(copied));
        context.emit(Event::CaughtUp { position, copied, seconds: since.elapsed().as_secs() });
    }
    pending().await
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
