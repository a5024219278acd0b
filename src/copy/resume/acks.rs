//! The ack floor of a durable consumer as the position to resume at.

use nats_lane::{Error, jetstream::Api};

use super::{Resume, Sides};
use crate::{copy::source::durable::Durable, events::Event};

impl Sides<'_> {
    /// Whether the target, which holds no copy of ours, cannot have held one either: nothing was ever removed from it.
    pub(super) fn target_never_held_any(&self) -> bool {
        let state = &self.target.state;
        state.last_seq == 0 || state.first_seq <= 1 && state.messages == state.last_seq
    }

    /// The durable consumer of Choria's replicator is ahead of the target, which was deleted meanwhile or is not the one that it
    /// copied to. The copy begins as at a first start, but not after the ack floor of the consumer.
    pub(super) async fn before_acks_of_others(&mut self, floor: u64) -> Result<Resume, Error> {
        let start = self.configured_start().await?;
        let start = if start.seq <= floor { start } else { self.point_at(floor).await? };
        let mut resume = Resume::at(start, None);
        let reason = format!(
            "durable consumer `{}` at the source says that messages up to {floor} were copied, and the target has none of \
             them",
            Durable::name(self.replication)
        );
        let resumed = resume.position.seq;
        resume.findings.push(Event::TargetReset { saved: floor, resumed, reason });
        Ok(resume)
    }

    /// Up to where a durable consumer has everything acknowledged: the consumer of this replication, or that of
    /// Choria's replicator at a stream that keeps its messages.
    pub(super) async fn acked(&mut self) -> Result<Option<u64>, Error> {
        if Durable::is_needed(self.source) {
            return Ok(self.durable.map(|durable| durable.floor(self.source)));
        }
        if let Some(acked) = self.acked {
            return Ok(acked);
        }
        for name in Durable::names(self.replication) {
            let choria = Api::new(self.source_lane).consumer_info(&self.replication.source.stream, &name).await?;
            if let Some(info) = choria {
                return Ok(Some(info.ack_floor.stream_seq));
            }
        }
        Ok(None)
    }

    /// Acknowledged messages are settled at the source, whatever else was found: they are not redelivered. This does
    /// not hold if the source lost its end, or may have done so and grown again: then those were other messages.
    pub(super) async fn not_before_acks(&mut self, resume: &mut Resume) -> Result<(), Error> {
        let Some(durable) = self.durable else { return Ok(()) };
        let floor = durable.floor(self.source);
        let lost = resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. }));
        if floor <= resume.position.seq || lost && durable.is_stale(self.source) {
            return Ok(());
        }
        let (lane, position) = (&mut *self.source_lane, resume.position.seq);
        if durable.may_pass_over(lane, self.replication, self.source, position).await? {
            return Ok(());
        }
        for finding in &mut resume.findings {
            if let Event::TargetReset { resumed, reason, .. } | Event::SourceReset { resumed, reason, .. } = finding {
                *reason = format!(
                    "{reason}; messages that were acknowledged at the source, up to {floor}, are not redelivered"
                );
                *resumed = floor;
            }
        }
        resume.position = self.point_at(floor).await?;
        resume.already.forget_to(floor);
        Ok(())
    }
}
