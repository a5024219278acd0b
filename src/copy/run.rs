//! The loop of one run: one owner of both lanes, of the messages that were read and of those in flight.

use std::{future::poll_fn, task::Poll};

use nats_lane::{Batch, Lane, Turn, jetstream::StreamInfo};
use tokio::time::{Duration, Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    Error, ErrorKind,
    decide::CopyRules,
    flow::{
        bounds::Bounds,
        logins::LoginWatch,
        position::{PositionWriter, SenderRecords, Witnesses},
        throttle,
        watchdog::{DRAIN, LAST_SAVE},
        window::Window,
    },
    reject::Rejects,
    reporter::Reporter,
    sampling_driver::{SamplingDriver, SamplingEvent},
    source::{clock::SourceClock, source_half::SourceHalf},
    target::{
        line,
        target_half::TargetHalf,
        writer::{Supply, Writer},
    },
};
use crate::{config::OnReject, store::SaveError};

mod begin;
mod pump;
mod repair;
mod upkeep;

/// Time for the source to take the last acks of a run that ends by request.
const LAST_ACKS: Duration = Duration::from_millis(1_500);
/// How long a run that ends waits for its advisories.
const LAST_ADVISORIES: Duration = Duration::from_secs(1);

/// Why the loop should end once nothing is in flight.
#[derive(Debug)]
pub(super) enum Ending {
    Stopped,
    /// A login is about to end and its successor is available, the source acts on other headers than before, or may be
    /// asked for more.
    BeginsAgain,
    Failed(Error),
}

/// Why a run ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunEnd {
    /// By request.
    Stopped,
    /// To log in again, to copy by another configuration of the source or to ask it for more: the next run begins at
    /// once.
    BeginsAgain,
}

/// One run, with everything that is dropped with it.
pub(super) struct Run<'a> {
    pub(super) report: Reporter<'a>,
    pub(super) source: SourceHalf,
    pub(super) target: TargetHalf,
    pub(super) bounds: Bounds,
    pub(super) rules: CopyRules,
    pub(super) rejects: Rejects<'a>,
    pub(super) sampler: Option<SamplingDriver>,
    pub(super) times: Times,
    /// Why the run ends, and how long the messages in flight may take to settle.
    pub(super) ending: Option<(Ending, Instant)>,
}

/// When the parts of the upkeep are due.
#[derive(Debug)]
pub(super) struct Times {
    began: Instant,
    next_tick: Instant,
    /// When to read the files of a login that is about to end.
    logins: LoginWatch,
}

impl Times {
    /// Everything is due now.
    pub fn new(now: Instant) -> Self {
        Self { began: now, next_tick: now, logins: LoginWatch::default() }
    }
}

impl Run<'_> {
    /// Copies until the stop or an error; the position is saved at the end of both.
    pub async fn copy(mut self, positions: &mut PositionWriter, stop: CancellationToken) -> Result<RunEnd, Error> {
        let result = self.copy_loop(positions, &stop).await;
        positions.gaps = std::mem::take(&mut self.source.gaps);
        positions.drops = std::mem::take(&mut self.target.watch.drops);
        self.settle();
        self.report_rejected(true);
        self.update_status();
        // What a run does at its end takes no memory while it runs: thousands of them wait.
        match result {
            Ok(ended) => Box::pin(self.ended_well(positions)).await.map(|()| ended),
            Err(error) if error.kind == ErrorKind::Superseded => Err(error),
            Err(error) => Err(Box::pin(self.failed(error, positions)).await),
        }
    }

    async fn ended_well(mut self, positions: &mut PositionWriter) -> Result<(), Error> {
        if self.sampler.is_some() {
            // A save that fails is tried again at the end.
            let first = positions.save_now(self.witnesses(), self.report.row()).await;
            if let Err(conflict @ SaveError::Conflict { .. }) = first {
                return Err(conflict.into());
            }
            let saved = self.saved_position(positions);
            self.write_senders(saved, positions.reads_after()).await;
        }
        let _ = tokio::time::timeout(LAST_ACKS, self.flush_acks()).await;
        let Self { report, mut source, target, bounds, sampler, .. } = self;
        source.reader.close(&mut source.lane);
        // The server removes the consumer later by itself; deleting it here is a courtesy that must not delay a stop.
        let _ = tokio::time::timeout(LAST_SAVE, source.lane.round_trip()).await;
        let sampled = sampler.as_ref().map(SamplingDriver::sampled);
        let streams = (&source.info, target.created.as_str());
        let witnesses = witnesses(&bounds.window, &target.writer, &source.clock, streams, sampled);
        // Messages that did not settle in time.
        positions.left_in_flight(&bounds.window, Instant::now());
        positions.save_now(witnesses, report.row()).await?;
        Ok(())
    }

    /// Saves the position of a run that failed; returns why it ended.
    async fn failed(self, mut error: Error, positions: &mut PositionWriter) -> Error {
        let Self { report, source, target, bounds, sampler, .. } = self;
        let sampled = sampler.as_ref().map(SamplingDriver::sampled);
        // First of all nothing more may be sent. Where `on_reject` holds, no dead letters are on the source lane, which is
        // needed once more.
        drop(target.lane);
        let reads = error.poison.is_some() && report.replication.on_reject == OnReject::Hold;
        let lane = reads.then_some(source.lane);
        if error.chain_broken {
            let (exact, by_ids) = (target.writer.exact(&bounds.window), target.writer.is_by_ids());
            positions.broke_at(exact, &bounds.window, by_ids, Instant::now());
        } else {
            positions.left_in_flight(&bounds.window, Instant::now());
        }
        let streams = (&source.info, target.created.as_str());
        let witnesses = witnesses(&bounds.window, &target.writer, &source.clock, streams, sampled);
        // What is not saved then, the next run reads from the target.
        let saved = tokio::time::timeout(LAST_SAVE, positions.save_now(witnesses, report.row())).await;
        if let Ok(Err(conflict @ SaveError::Conflict { .. })) = saved {
            return conflict.into();
        }
        if let (Some(lane), Some(poison)) = (lane, &mut error.poison) {
            report.describe(lane, poison).await;
        }
        error
    }

    /// The content of the position record as of now.
    fn witnesses(&self) -> Witnesses<'_> {
        let (source, target) = (&self.source, &self.target);
        let streams = (&source.info, target.created.as_str());
        let sampled = self.sampler.as_ref().map(SamplingDriver::sampled);
        witnesses(&self.bounds.window, &target.writer, &source.clock, streams, sampled)
    }

    /// Waits a short time until the records of senders contain everything that is known of them.
    async fn write_senders(&mut self, saved: u64, reads_after: u64) {
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.report.copy.sampling) {
            sampler.settled(self.bounds.window.position().seq, saved);
            let _ = tokio::time::timeout(LAST_SAVE, sampler.finish(saved, reads_after, status)).await;
            let _ = tokio::time::timeout(LAST_ADVISORIES, sampler.finish_post(status)).await;
        }
    }

    /// Up to where everything has settled, and is saved. Where the copy continues without saves, they are not waited for.
    fn saved_position(&self, positions: &PositionWriter) -> u64 {
        let settled = self.bounds.window.position().seq;
        if self.report.job.standalone { settled } else { positions.position().min(settled) }
    }

    /// Up to where the source may forget copied messages.
    fn forgettable(&self, now: Instant) -> u64 {
        let position = self.bounds.window.position().seq;
        self.sampler.as_ref().map_or(position, |sampler| sampler.may_forget(position, now))
    }

    /// Waits until the source has the acks of all copied messages: some consumers take acks only now and then. The rest
    /// is delivered to the next run, which skips it.
    async fn flush_acks(&mut self) -> Result<(), Error> {
        loop {
            let forgettable = self.forgettable(Instant::now());
            self.source.reader.settled(&mut self.source.lane, forgettable);
            if self.source.reader.is_acked() {
                return Ok(());
            }
            if let Turn::Received(batch) = self.source.lane.turn().await? {
                self.source.reader.accept(batch).map_err(|lost| lost.error)?;
            }
        }
    }

    async fn copy_loop(&mut self, positions: &mut PositionWriter, stop: &CancellationToken) -> Result<RunEnd, Error> {
        loop {
            let now = Instant::now();
            self.pump(now);
            self.target.writer.outcome(&self.bounds.window, self.target.lane.drained(), now)?;
            if let Some(end) = self.ended(now) {
                return end;
            }
            if now >= self.times.next_tick || self.source.silent_at.is_some_and(|at| now >= at) {
                self.tick(now, positions)?;
            }
            let wake = self.wake(now, positions);
            let (source, target) = (&mut self.source, &mut self.target);
            tokio::select! {
                biased;
                () = stop.cancelled(), if self.ending.is_none() => self.end(Ending::Stopped),
                // Before the lanes: it is rarely ready, and while both lanes are busy it would never be polled.
                saved = poll_fn(|cx| positions.poll(cx)) => self.saved(saved, positions)?,
                moved = poll_fn(|cx| self.sampler.as_mut().map_or(Poll::Pending, |sampler| sampler.poll(cx))) => {
                    self.sampled(moved);
                }
                turn = target.lane.turn() => {
                    if let Turn::Received(batch) = turn.map_err(|error| self.lost_target(error))? {
                        self.take_acks(&batch)?;
                    }
                }
                turn = source.lane.turn(), if source.reads => {
                    if let Turn::Received(batch) = turn.map_err(|error| self.lost_source(positions, error))? {
                        self.take_messages(batch)?;
                    }
                }
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Does the work that is due at each turn of the loop; returns when the next turn is due at the latest.
    fn wake(&mut self, now: Instant, positions: &PositionWriter) -> Instant {
        self.source.silent_at = self.source.next_check(now);
        let supply = self.supply();
        self.target.writer.commit_if_due(&mut self.target.lane, supply, now);
        self.sample(now, positions);
        let forgettable = self.forgettable(now);
        self.source.reader.settled(&mut self.source.lane, forgettable);
        self.source.reads = self.source.reader.may_read(&self.report.job.budget);
        let due = [self.target.writer.next_commit(supply), self.bounds.throttled, self.source.silent_at];
        due.into_iter().flatten().fold(self.times.next_tick, Instant::min)
    }

    /// The target ended the connection: perhaps because a line was too long.
    fn lost_target(&self, error: nats_lane::Error) -> Error {
        let unconfirmed = self.target.writer.unconfirmed_line(&self.bounds.window);
        let unconfirmed_line = unconfirmed.filter(|line| *line > line::LEAST);
        Error { unconfirmed_line, ..Error::of_target(error) }
    }

    /// The source ended the connection: perhaps because more was requested than it lets wait.
    fn lost_source(&self, positions: &mut PositionWriter, error: nats_lane::Error) -> Error {
        let (now, replication) = (Instant::now(), &self.report.replication);
        // A connection that ends with an error line was not cut for pending output: a slow consumer gets none.
        if self.source.reader.pending() > 0 && error.is_cut() {
            let asked = throttle::read_ahead(&replication.limits);
            if let Some(bytes) = positions.request_limit.cut(asked, now.duration_since(self.times.began), now) {
                let id = &replication.id;
                warn!(replication = id, bytes, "the source cut the connection again: asking it for less at once");
            }
        }
        Error::of_source(error)
    }

    /// Writes the records of senders and publishes their advisories, as far as that is due. The records are never ahead of the
    /// saved position: an instance that takes over would read skipped messages again, and copy those that are before the last
    /// copy in the record.
    fn sample(&mut self, now: Instant, positions: &PositionWriter) {
        let saved = self.saved_position(positions);
        let window = &self.bounds.window;
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.report.copy.sampling) {
            let all = self.source.reader.pending() == 0 && self.source.renewal.is_none();
            sampler.was_read(window.newest().seq, all);
            sampler.settled(window.position().seq, saved);
            sampler.write(saved, positions.reads_after(), now);
            sampler.publish(status, now);
        }
    }

    /// Handles the events that sampling waited for.
    fn sampled(&mut self, moved: SamplingEvent) {
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.report.copy.sampling) {
            sampler.accept(moved, status, Instant::now());
        }
    }

    fn supply(&self) -> Supply {
        let reader = &self.source.reader;
        if self.ending.is_some() || reader.pending() == 0 {
            Supply::Dry
        } else if reader.is_barred()
            || reader.peek().is_some_and(|incoming| {
                self.full(incoming.bytes()) || self.waits_for_known(incoming.delivery.stream_seq)
            })
        {
            Supply::Barred
        } else {
            Supply::Coming
        }
    }

    fn take_acks(&mut self, batch: &Batch) -> Result<(), Error> {
        let now = Instant::now();
        let (target, window) = (&mut self.target, &mut self.bounds.window);
        if let Some(gate) = &mut target.gate {
            gate.accept(batch)?;
        }
        if let Some(info) = self.rejects.answer(batch, now)? {
            target.writer.target_is(&info);
        }
        for message in batch.iter() {
            if message.sid == Lane::REQUEST_SID {
                target.says(&message)?;
            }
            if message.sid == Lane::REQUEST_SID || target.watch.awaits(message.sid) {
                let (position, in_flight) = (window.position().seq, !window.is_empty());
                let stream = &self.report.replication.target.stream;
                target.watch.accept(&mut target.lane, stream, &message, position, in_flight);
            }
            target.writer.accept(&message, window, now)?;
        }
        self.settle();
        Ok(())
    }

    /// Removes the settled messages from the window.
    fn settle(&mut self) {
        let now = Instant::now();
        let elapsed = now.duration_since(self.times.began).as_micros() as u64;
        let mut observed = (0, 0);
        let (window, copy) = (&mut self.bounds.window, &mut self.report.copy);
        window.limit_target(self.target.limit());
        while let Some(done) = window.pop() {
            self.bounds.moved = now;
            copy.counters.copied += 1;
            copy.counters.copied_bytes += done.size.bytes as u64;
            copy.metered.copied_payload += done.size.payload as u64;
            // Messages read together are observed together.
            if done.read_at != observed.0 {
                copy.processing.observe((elapsed - observed.0.min(elapsed)) as f64 / 1e6, observed.1);
                observed = (done.read_at, 0);
            }
            observed.1 += 1;
        }
        copy.processing.observe((elapsed - observed.0.min(elapsed)) as f64 / 1e6, observed.1);
    }

    fn saved(&mut self, result: Result<(), SaveError>, positions: &mut PositionWriter) -> Result<(), Error> {
        match result {
            Err(conflict @ SaveError::Conflict { .. }) => return Err(conflict.into()),
            // The copy continues for a while: the target itself shows where it is. The next save tries again.
            Err(error) => {
                debug!(replication = self.report.replication.id, %error, "position not saved");
                self.report.copy.counters.position_save_errors += 1;
            }
            Ok(()) => {}
        }
        self.report_saves(Instant::now(), positions);
        Ok(())
    }

    fn end(&mut self, ending: Ending) {
        let now = Instant::now();
        self.target.writer.commit(&mut self.target.lane, now);
        self.ending = Some((ending, now + DRAIN));
    }

    /// Whether an ending that was begun is complete.
    fn ended(&mut self, now: Instant) -> Option<Result<RunEnd, Error>> {
        let (_, deadline) = self.ending.as_ref()?;
        if !self.all_settled() && now < *deadline {
            return None;
        }
        if !self.all_settled() {
            let messages = self.bounds.window.len() + self.rejects.in_flight().0;
            let id = &self.report.replication.id;
            warn!(replication = id, messages, "not settled in time; the next run looks for them");
        }
        let (ending, _) = self.ending.take()?;
        Some(match ending {
            Ending::Failed(error) => Err(error),
            Ending::Stopped => Ok(RunEnd::Stopped),
            Ending::BeginsAgain => Ok(RunEnd::BeginsAgain),
        })
    }
}

/// The content of the position record, from the source stream as it was when the run began, and `created` of the target.
fn witnesses<'w>(
    window: &'w Window,
    writer: &Writer,
    clock: &SourceClock,
    (source, target_created): (&'w StreamInfo, &'w str),
    sampled: Option<SenderRecords>,
) -> Witnesses<'w> {
    Witnesses {
        window,
        now: clock.now(Instant::now()),
        mode: writer.mode(),
        stamps: writer.stamps(),
        source_created: &source.created,
        opened_at: source.ts,
        target_created,
        sampled,
    }
}
