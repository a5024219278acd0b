//! The target side of a run: its lane, its writer, and the copies that are known to be there.

use nats_lane::{
    Lane, Message,
    jetstream::{StreamInfo, decode},
};
use tokio::time::Instant;

use crate::{
    config::{Mapping, Replication},
    copy::{
        Error, ErrorSide,
        flow::window::{SourcePoint, Window},
        objects::Gate,
        resume::{Already, KnownCopy},
        source::reader::Incoming,
        target::{
            frame::Outgoing,
            liveness::{self, Liveness, LivenessStep},
            target_watch::TargetWatch,
            writer::Writer,
        },
    },
};

/// The target side of a run.
#[derive(Debug)]
pub(in crate::copy) struct TargetHalf {
    pub lane: Lane,
    /// When the stream was created.
    pub created: String,
    pub writer: Writer,
    /// Copies after the position when the run begins.
    pub already: Already,
    /// The last source sequence that was found at the target when the run began; 0 once everything up to it has
    /// settled.
    pub known_to: u64,
    /// Keeps objects whole, where the source is an object store.
    pub gate: Option<Gate>,
    pub probe: Liveness,
    probe_request: Option<String>,
    pub watch: TargetWatch,
}

impl TargetHalf {
    /// Over a lane to a stream without known copies.
    pub fn new(lane: Lane, info: &StreamInfo, writer: Writer, gate: Option<Gate>, watch: TargetWatch) -> Self {
        Self {
            lane,
            created: info.created.clone(),
            writer,
            already: Already::default(),
            known_to: 0,
            gate,
            probe: Liveness::new(info.cluster.clone().unwrap_or_default().leader),
            probe_request: None,
            watch,
        }
    }

    /// How far the known target sequence may move, see [`target_limit`].
    pub fn limit(&self) -> u64 {
        target_limit(&self.already, &self.writer)
    }

    /// Sends the prepared message.
    pub fn send(
        &mut self,
        outgoing: Outgoing,
        window: &mut Window,
        incoming: &Incoming<'_>,
        now: Instant,
        read_at: u64,
    ) {
        self.writer.send(outgoing, &mut self.lane, window, incoming, now, read_at);
        if let Some(gate) = &mut self.gate {
            gate.sent(incoming.message.subject, incoming.message.payload);
        }
    }

    /// Asks which chunks of an object the target has, once everything before is settled.
    pub fn ask_chunks(&mut self, chunks: String, settled: bool, mapping: &Mapping, now: Instant) {
        if let Some(gate) = &mut self.gate {
            gate.ask_chunks(chunks, settled, &mut self.lane, mapping, now);
        }
    }

    /// Settles a message that the target already has.
    pub fn stored_before(&self, window: &mut Window, source: SourcePoint, known: KnownCopy) {
        let KnownCopy::Stored(target_seq) = known else { return window.skip(source) };
        // A position without any target sequence could not show that the target lost all of it.
        let first = window.target().is_none() && self.already.all_after(target_seq);
        let limit = self.limit();
        window.limit_target(if first { u64::MAX } else { limit });
        window.stored_before(source, target_seq);
        window.limit_target(limit);
    }

    /// Asks the target where confirmations are overdue; `moved` is the time of the last confirmation.
    pub fn check_liveness(
        &mut self,
        replication: &Replication,
        window: &Window,
        moved: Instant,
        now: Instant,
    ) -> Result<(), Error> {
        let owed = self.writer.is_owed(window).then_some(moved);
        if owed.is_some_and(|since| now.duration_since(since) >= liveness::ASK) {
            self.lane.check_delivery();
        }
        match self.probe.step(owed, self.lane.alive(), now) {
            LivenessStep::Wait => Ok(()),
            LivenessStep::Ask => {
                self.lane.ping();
                let subject = format!("{}.STREAM.INFO.{}", self.lane.api_prefix(), replication.target.stream);
                self.probe_request = Some(self.lane.send_request(&subject, b""));
                Ok(())
            }
            LivenessStep::Lost(why) => Err(Error::stalled(ErrorSide::Target, why)),
        }
    }

    /// Handles an answer to the liveness question.
    pub fn says(&mut self, message: &Message<'_>) -> Result<(), Error> {
        if self.probe_request.as_ref().is_none_or(|request| request.as_bytes() != message.subject) {
            return Ok(());
        }
        self.probe_request = None;
        // An error means that the stream has no leader, or is deleted: the next run will report it.
        let Ok(info) = decode::<StreamInfo>(message.payload) else { return Ok(()) };
        let leader = info.cluster.unwrap_or_default().leader;
        self.probe.answered(&leader).map_err(|why| Error::stalled(ErrorSide::Target, why))
    }
}

/// How far the known target sequence may move: after it there may be messages of ours that were not met yet. They are
/// from before the run, or an older holder sent them while it began.
pub(in crate::copy) fn target_limit(already: &Already, writer: &Writer) -> u64 {
    if already.is_empty() { writer.adds_up_to() } else { 0 }
}
