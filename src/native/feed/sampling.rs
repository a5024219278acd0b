//! Sampling in a feed: the decisions and records of a copy, begun again for each consumer of the target. A target that has less than
//! the records of senders say is given the messages again.

use tokio::time::{Duration, Instant, timeout};

use super::{FedPoint, Feed, LAST_SAVE, Served, message::NotFed};
use crate::{
    copy::{
        Error, PositionWriter,
        sampling_driver::{SamplingDriver, SamplingEvent},
        source::reader::Incoming,
    },
    sampling::MessageOutcome,
    status::CopyStatus,
};

/// How long the last advisories may take.
const LAST_ADVISORIES: Duration = Duration::from_secs(2);

impl Feed<'_> {
    /// The sampling of a consumer that continues after a message, and the sequence after which it has to read.
    pub(super) async fn begin_sampling(
        &mut self,
        before: FedPoint,
        positions: &mut PositionWriter,
    ) -> Result<(Option<SamplingDriver>, u64), Error> {
        let first = self.source_info.state.first_seq;
        let sampler = SamplingDriver::begin(self.job, before.seq, positions.record(), false, first);
        let mark = self.job.replication.sampling.as_ref().map(|sampling| sampling.inspect.mark());
        positions.samples_from(sampler.as_ref().map(|(_, from)| *from).zip(mark)).await?;
        Ok(sampler.map_or((None, before.seq), |(sampler, from)| (Some(sampler), from)))
    }

    /// Writes the records of senders and publishes their advisories, as far as that is due.
    pub(super) fn sample(&mut self, now: Instant, reads_after: u64) {
        let Some(Served { reader, read, sampler: Some(sampler), .. }) = &mut self.session else { return };
        let Some(status) = &mut self.copy.sampling else { return };
        sampler.settled(self.position.seq, self.position.seq);
        sampler.was_read(read.seq, reader.pending() == 0 && reader.peek().is_none());
        sampler.write(self.position.seq, reads_after, now);
        sampler.publish(status, now);
    }

    /// Finds senders that are unseen, and brings the status up to date.
    pub(super) fn tick_sampling(&mut self, now: Instant) {
        let Some(Served { reader, session, sampler: Some(sampler), .. }) = &mut self.session else { return };
        let Some(status) = &mut self.copy.sampling else { return };
        let idle = session.is_settled() && reader.pending() == 0;
        sampler.tick(idle.then(|| self.clock.now_ns(now)), status, now);
        sampler.update_status(status, now);
        for event in sampler.take_events() {
            self.events.emit(event, &self.job.replication.id);
        }
    }

    /// Handles the event that sampling waited for.
    pub(super) fn sampled(&mut self, moved: SamplingEvent) {
        let Some(Served { sampler: Some(sampler), .. }) = &mut self.session else { return };
        if let Some(status) = &mut self.copy.sampling {
            sampler.accept(moved, status, Instant::now());
        }
    }

    /// Waits a short time until the records contain everything that is known of the senders.
    pub(super) async fn finish_sampling(&mut self, reads_after: u64) {
        let Some(Served { sampler: Some(sampler), .. }) = &mut self.session else { return };
        if let Some(status) = &mut self.copy.sampling {
            sampler.settled(self.position.seq, self.position.seq);
            let _ = timeout(LAST_SAVE, sampler.finish(self.position.seq, reads_after, status)).await;
            let _ = timeout(LAST_ADVISORIES, sampler.finish_post(status)).await;
        }
    }
}

/// Whether a message settled before: then it is read again for sampling only.
pub(super) fn replays(sampler: Option<&mut SamplingDriver>, incoming: &Incoming<'_>, skipped: Option<NotFed>) -> bool {
    let Some(sampler) = sampler.filter(|sampler| sampler.is_replay(incoming.delivery.stream_seq)) else { return false };
    if skipped.is_none() {
        sampler.replay(incoming, false);
    }
    true
}

/// Whether a message is skipped because its sender was copied recently.
pub(super) fn sampled_out(sampler: Option<&mut SamplingDriver>, incoming: &Incoming<'_>) -> Option<NotFed> {
    (!sampler?.wants(incoming)).then_some(NotFed::Sampled)
}

/// Gives sampling the outcome of a message that it was asked about; of one that is skipped before its sender matters, at most that
/// it was too old.
pub(super) fn note(
    sampler: Option<&mut SamplingDriver>,
    incoming: &Incoming<'_>,
    skipped: Option<NotFed>,
    copy: &mut CopyStatus,
) {
    let (Some(sampler), Some(status)) = (sampler, &mut copy.sampling) else { return };
    match skipped {
        None => sampler.took(incoming, MessageOutcome::Sent, status),
        Some(NotFed::Sampled | NotFed::Refused | NotFed::DeadLettered) => {
            sampler.took(incoming, MessageOutcome::Passed, status)
        }
        Some(NotFed::Old) => sampler.passed_over(),
        Some(NotFed::Excluded | NotFed::Loop) => {}
    }
}
