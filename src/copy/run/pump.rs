//! Decides about the messages that were read, and sends them as far as the bounds allow.

use tokio::time::Instant;

use super::{Ending, Run, upkeep::TICK};
use crate::{
    config::OnReject,
    copy::{
        Error,
        decide::{Decision, DecisionInputs, Reason, verdict},
        flow::window::SourcePoint,
        sampling_driver::SamplingDriver,
        source::reader::Incoming,
        target::refusal::TOO_LARGE,
    },
};

/// Output that waits for the target's socket, in bytes: filled up to the first mark, and again when it is below the
/// second. In between, every message would move the waiting output to the front of the buffer.
const OUTPUT_HIGH: usize = 256 * 1024;
const OUTPUT_LOW: usize = 32 * 1024;

/// The times of a decision.
#[derive(Debug, Clone, Copy)]
struct Moment {
    now: Instant,
    /// The time of the source server.
    now_ns: i64,
    /// Microseconds since the run began.
    read_at: u64,
}

impl Run<'_> {
    /// Decides about the messages that were read and sends them, as far as the bounds allow; then requests more.
    pub(super) fn pump(&mut self, now: Instant) {
        self.bounds.throttled = None;
        if self.ending.is_some() {
            return;
        }
        // Before the messages that were read: what copied them was known to the service before it began to copy.
        self.rules.returned.update();
        let now_ns = self.source.clock.now_ns(now);
        let read_at = now.duration_since(self.times.began).as_micros() as u64;
        if self.target.lane.output().len() < OUTPUT_LOW && self.source.lane.output().len() < OUTPUT_HIGH {
            while self.next(Moment { now, now_ns, read_at }) {}
        }
        self.report_rejected(false);
        if self.ending.is_none() {
            let drained = self.target.lane.output().len() < OUTPUT_LOW;
            self.source.reader.pull(&mut self.source.lane, &self.report.job.budget, drained);
        }
    }

    /// Handles the next message; returns whether another one may follow.
    fn next(&mut self, at: Moment) -> bool {
        if self.rejects.any_in_flight() && !self.is_dead_letter(at.now_ns) {
            return false;
        }
        let Some(incoming) = self.source.reader.peek() else { return false };
        let (after, seq, bytes) = (incoming.after, incoming.delivery.stream_seq, incoming.bytes());
        if !self.may_take(seq, bytes, at.now) {
            return false;
        }
        if self.replays(seq, at.now_ns) {
            return true;
        }
        self.source.note_jump(after, seq, &self.target.already);
        self.handle_next(at).unwrap_or_else(|error| {
            self.end(Ending::Failed(error));
            false
        })
    }

    /// Whether the bounds let the next message pass.
    fn may_take(&mut self, seq: u64, bytes: usize, now: Instant) -> bool {
        if self.full(bytes) || !self.target.writer.ready() || self.target.lane.output().len() >= OUTPUT_HIGH {
            return false;
        }
        if self.bounds.is_throttled(bytes, now) || self.waits_for_known(seq) {
            return false;
        }
        if seq > self.target.known_to {
            self.target.known_to = 0;
        }
        true
    }

    /// Handles the next message if it settled before this run, and is read for sampling only.
    fn replays(&mut self, seq: u64, now_ns: i64) -> bool {
        let Some(sampler) = self.sampler.as_mut().filter(|sampler| sampler.is_replay(seq)) else { return false };
        let Some(incoming) = self.source.reader.peek() else { return false };
        let facts = DecisionInputs { skip: None, known: None, sampling: || true, gate: None, prepare: || Ok(()) };
        let decision = verdict(&self.rules, facts, &incoming, now_ns);
        if decision == Decision::Send(()) {
            sampler.replay(&incoming, self.report.replication.on_reject != OnReject::Hold);
        }
        self.source.reader.take();
        true
    }

    /// Whether the next message will be a dead letter too: only such a one may follow those in flight.
    fn is_dead_letter(&mut self, now_ns: i64) -> bool {
        let Self { report, source, target, rules, rejects, sampler, .. } = self;
        let Some(incoming) = source.reader.peek().filter(|_| target.already.is_empty()) else { return false };
        let sampling = || wants(sampler.as_mut(), &incoming);
        let prepare = || rejects.known(&incoming).map_or_else(|| target.writer.prepare(&incoming, now_ns), Err);
        let facts = DecisionInputs { skip: report.job.skip, known: None, sampling, gate: None, prepare };
        matches!(verdict(rules, facts, &incoming, now_ns), Decision::Reject(_))
    }

    /// Executes the decision about the next message; returns whether another one may follow. An error ends the run.
    fn handle_next(&mut self, at: Moment) -> Result<bool, Error> {
        let Self { report, source, target, bounds, rules, rejects, sampler, times, .. } = self;
        let Some(incoming) = source.reader.peek() else { return Ok(false) };
        let (seq, time_ns, bytes) = (incoming.delivery.stream_seq, incoming.delivery.time_ns, incoming.bytes());
        let payload = incoming.message.payload.len() as u64;
        let (point, mapping) = (SourcePoint { seq, time_ns: Some(time_ns) }, &report.replication.mapping);
        let known = target.already.take(seq, time_ns, incoming.message.subject, mapping);
        bounds.window.limit_target(target.limit());
        let sampling = || wants(sampler.as_mut(), &incoming);
        let prepare = || rejects.known(&incoming).map_or_else(|| target.writer.prepare(&incoming, at.now_ns), Err);
        let facts = DecisionInputs { skip: report.job.skip, known, sampling, gate: target.gate.as_ref(), prepare };
        let decision = verdict(rules, facts, &incoming, at.now_ns);
        if let Decision::Reject(error) = &decision
            && error.is_api(TOO_LARGE)
            && rejects.ask_limits(&mut target.lane, at.now)
        {
            return Ok(false);
        }
        let fate = decision.fate();
        decision.count(&mut report.copy.counters, bytes);
        report.copy.metered.received_payload += payload;
        match decision {
            Decision::Wait(chunks) => {
                target.ask_chunks(chunks, bounds.window.is_empty(), mapping, at.now);
                return Ok(false);
            }
            Decision::Stored(known) => target.stored_before(&mut bounds.window, point, known),
            Decision::Skip(reason) => {
                bounds.skip(point, at.now);
                if let (Reason::Old, Some(sampler)) = (&reason, sampler.as_mut()) {
                    sampler.passed_over();
                }
                report.copy.metered.skipped_payload += payload;
                report.skipped(seq, reason);
            }
            Decision::Send(outgoing) => {
                bounds.send(bytes, at.now);
                target.send(outgoing, &mut bounds.window, &incoming, at.now, at.read_at);
            }
            Decision::Reject(error) => {
                bounds.moved = at.now;
                let (lane, copy) = (&mut source.lane, &mut report.copy);
                rejects.reject(lane, &mut bounds.window, copy, &incoming, error, at.now)?;
            }
        }
        report.copy.counters.received += 1;
        report.copy.counters.received_bytes += bytes as u64;
        if let (Some(sampler), Some(fate), Some(status)) = (sampler, fate, &mut report.copy.sampling) {
            sampler.took(&incoming, fate, status);
        }
        source.reader.take();
        times.next_tick = times.next_tick.min(at.now + TICK);
        Ok(true)
    }

    /// Whether the bounds keep back a message of so many bytes.
    pub(super) fn full(&self, bytes: usize) -> bool {
        let limits = &self.report.replication.limits;
        self.bounds.are_full(limits, self.target.writer.most_in_air(), bytes)
            || self.rejects.full(limits, bytes)
            || self.bounds.are_beyond_saves(&self.report.copy.counters, bytes)
    }

    /// Whether a message waits until everything up to the last one that was found at the target has settled. Otherwise
    /// each run could store another window of messages after one that is refused every time, and no search would know
    /// how far before the end of the target something may be missing.
    pub(super) fn waits_for_known(&self, seq: u64) -> bool {
        self.target.known_to > 0 && seq > self.target.known_to && !self.all_settled()
    }

    /// Whether no message that was read waits for an ack.
    pub(super) fn all_settled(&self) -> bool {
        self.bounds.window.is_empty() && !self.rejects.any_in_flight()
    }
}

/// Whether the sender of a message is to be copied.
fn wants(sampler: Option<&mut SamplingDriver>, incoming: &Incoming<'_>) -> bool {
    sampler.is_none_or(|sampler| sampler.wants(incoming))
}
