//! Periodic work: status, save, questions, and the check whether everything still moves.

use chrono::DateTime;
use nats_lane::entropy as chance;
use tokio::time::{Duration, Instant};
use tracing::info;

use super::{Ending, Run};
use crate::{
    copy::{
        Error,
        flow::position::PositionWriter,
        source::{
            clock::shown,
            reader::Reader,
            retention::{Oldest, Outlook, Waiting},
            source_half::{INFO_EVERY, INFO_SOONEST},
        },
    },
    status::{Lag, Position},
};

/// How often the status is updated: while messages move, while none does, and once that is saved.
pub(super) const TICK: Duration = Duration::from_millis(250);
const TICK_IDLE: Duration = Duration::from_secs(1);
const TICK_SAVED: Duration = Duration::from_secs(5);

impl Run<'_> {
    /// Does the periodic work that is due: status, save, questions, and the check whether everything still moves.
    pub(super) fn tick(&mut self, now: Instant, positions: &mut PositionWriter) -> Result<(), Error> {
        self.settle();
        self.report_saves(now, positions);
        self.report_rejected(true);
        self.update_status();
        self.report.clock(&self.source.clock, positions);
        let idle = self.all_settled() && self.source.reader.pending() == 0 && !self.source.watchdog.is_alert();
        self.tick_sampling(idle, now);
        self.rules.returned.update();
        positions.learns_from_target(self.rules.returned.remembered(&self.target.created));
        let saved = positions.save(now, self.witnesses(), || self.report.row());
        self.times.next_tick = now
            + match (idle, saved) {
                (true, true) if self.sampler.is_none() => TICK_SAVED,
                (true, _) => TICK_IDLE,
                (false, _) => TICK,
            };
        self.ask_states(now);
        self.rejects.check(&mut self.source.lane, now)?;
        let replication = &self.report.replication;
        self.target.check_liveness(replication, &self.bounds.window, self.bounds.moved, now)?;
        let seen = self.seen();
        let action = self.source.watchdog.check(now, &seen);
        action.map_or(Ok(()), |action| self.act(action))?;
        self.check_logins(now);
        if self.ending.is_none() && positions.request_limit.recovers(now) {
            let id = &self.report.replication.id;
            info!(replication = id, "the source has not cut a connection for long: asking it for more");
            self.end(Ending::BeginsAgain);
        }
        if self.ending.is_none() && positions.single_acks_end(now) {
            self.end(Ending::BeginsAgain);
        }
        self.source.lane.check_delivery();
        Ok(self.source.reader.check(&self.source.lane, now, self.source.reads)?)
    }

    /// Finds senders that are unseen. With nothing to read, it depends on the consumer whether they are: one that delivers
    /// nothing, though messages wait, would make all of them unseen.
    fn tick_sampling(&mut self, idle: bool, now: Instant) {
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.report.copy.sampling) {
            let source = &mut self.source;
            let clear = source.clear_until(now).filter(|_| idle).map(|until| source.clock.now_ns(until));
            sampler.tick(clear, status, now);
            if idle && sampler.depends_on_clock(source.clock.now_ns(now)) && source.may_ask_consumer(now) {
                source.ask_consumer(&self.report.replication.source.stream);
            }
            for event in sampler.take_events() {
                self.report.emit(event);
            }
        }
    }

    /// Asks both streams for their state, where that is due.
    fn ask_states(&mut self, now: Instant) {
        let (every, settled) = (self.info_every(), self.all_settled());
        let (source, target, replication) = (&mut self.source, &mut self.target, &self.report.replication);
        let window = &self.bounds.window;
        if source.is_due(every, now) {
            // If no message was read at a position, it is unknown whether the source ever reached it.
            let read = window.newest();
            source.ask_state(replication, read.time_ns.map_or(0, |_| read.seq), now);
            let settled = settled.then(|| window.position().seq);
            target.watch.ask_state(&mut target.lane, &replication.target.stream, settled, now);
        }
        target.watch.ask_first(&mut target.lane, &replication.target.stream, now);
    }

    /// More often while the first messages may soon be removed and only the stream's state shows when.
    fn info_every(&self) -> Duration {
        let (source, copy) = (&self.source, &self.report.copy);
        if source.polls.end.is_doubted() {
            return INFO_SOONEST;
        }
        if copy.lag.is_none_or(|lag| lag.messages == 0) || !source.retention.by_count() {
            return INFO_EVERY;
        }
        let headroom = copy.headroom.map_or(0.0, |headroom| headroom.seconds);
        Duration::from_secs_f64(headroom / 10.0).clamp(INFO_SOONEST, INFO_EVERY)
    }

    /// Ends the run in time if a login is about to end and the files have its successor.
    fn check_logins(&mut self, now: Instant) {
        if self.ending.is_some() {
            return;
        }
        let (job, replication) = (self.report.job, &self.report.replication);
        let sides = [
            (self.source.lane.login_expires(), &replication.source.place),
            (self.target.lane.login_expires(), &replication.target.place),
        ];
        if self.times.logins.has_newer(&*job.dial, &sides, now) {
            info!(replication = replication.id, "credentials were renewed: logging in again");
            self.end(Ending::BeginsAgain);
        }
    }

    /// Reports, once, that the position is not saved, and later that it is saved again.
    pub(super) fn report_saves(&mut self, now: Instant, positions: &mut PositionWriter) {
        self.bounds.limit = self.report.copy_limit(positions, now);
        self.report.saves(self.bounds.window.position().seq, now, positions);
    }

    /// Whether the copy waits until the position can be saved.
    pub(super) fn waits_for_saves(&self) -> bool {
        let beyond = |bytes| self.bounds.are_beyond_saves(&self.report.copy.counters, bytes);
        self.bounds.limit.is_some() && self.source.reader.peek().is_some_and(|incoming| beyond(incoming.bytes()))
    }

    /// Reports messages that could not be stored; `all` of those that are not reported yet at the end and now and then.
    pub(super) fn report_rejected(&mut self, all: bool) {
        self.report.rejected(self.rejects.take_events(all));
    }

    /// Updates the status.
    pub(super) fn update_status(&mut self) {
        let (waits, now) = (self.waits_for_saves(), Instant::now());
        self.update_lag(now);
        let (letters, letter_bytes, _) = self.rejects.in_flight();
        let (window, writer, copy) = (&self.bounds.window, &mut self.target.writer, &mut self.report.copy);
        copy.source.clock_offset_seconds =
            shown(copy.source.clock_offset_seconds, self.source.clock.offset(now, chance::now()));
        copy.target.last_seq = Some(writer.last_seq());
        copy.in_flight.messages = (window.len() + letters) as u64;
        copy.in_flight.bytes = (window.bytes() + letter_bytes) as u64;
        if let (Some(sampler), Some(status)) = (&self.sampler, &mut copy.sampling) {
            sampler.update_status(status, Instant::now());
        }
        copy.counters.headers_removed += std::mem::take(&mut writer.headers_removed);
        copy.counters.refused += writer.take_refused();
        self.report.publish(window.position().seq, waits, self.source.watchdog.is_open());
    }

    /// Updates position, lag and headroom in the status.
    fn update_lag(&mut self, now: Instant) {
        let (source, window, copy) = (&self.source, &self.bounds.window, &mut self.report.copy);
        let position = window.position();
        // As long as nothing settles, the oldest message is the same, also where it has not been read (again) yet.
        let before = copy.lag.filter(|_| copy.position.source_seq == position.seq).and_then(|lag| lag.oldest);
        copy.position =
            Position { source_seq: position.seq, target_seq: window.target().map_or(0, |target| target.seq) };
        let (letters, _, letter) = self.rejects.in_flight();
        let counted = source.reader.pending() + (window.len() + letters) as u64;
        let plain = source.reader.plain();
        let seen = window.newest().seq.max(plain.map_or(0, Reader::seen));
        let all = plain.is_some() && self.report.replication.scope.filters().is_empty();
        let Waiting { last_seq, messages } = Waiting::of(&source.info.state, all, position.seq, counted, seen);
        copy.source.first_seq = Some(source.info.state.first_seq);
        copy.source.last_seq = Some(last_seq);
        let oldest = window.oldest().or(letter).or_else(|| source.reader.next());
        // Messages that are replayed for sampling are settled.
        let oldest = oldest.filter(|point| point.seq > position.seq);
        let stored = oldest.and_then(|point| point.time_ns).map(DateTime::from_timestamp_nanos);
        let lag = Lag::new(messages, stored.or(before), source.clock.now(now));
        copy.lag = Some(lag);
        let oldest = Oldest {
            seq: oldest.map_or(position.seq + 1, |point| point.seq),
            age: lag.oldest.and(lag.seconds).map(Duration::from_secs_f64),
        };
        copy.headroom = match source.poll_history.outlook(&source.retention, &oldest) {
            _ if messages == 0 => None,
            Outlook::Left(headroom) => Some(headroom),
            Outlook::Safe => None,
            Outlook::Unknown => copy.headroom,
        };
    }
}
