//! Compares the target with the record's witness of it: the copy that was there when the position was saved.

use nats_lane::{Error, jetstream::Api};

use super::{Known, Resume, Sides, is_complete, is_consumed};
use crate::{
    copy::flow::window::TargetPoint,
    store::{AfterTarget, PositionRecord, TargetWitness},
};

impl Sides<'_> {
    /// Compares the target with the saved message there.
    pub(super) async fn with_target(
        &mut self,
        known: Known,
        target: &TargetWitness,
        chained: bool,
        record: &PositionRecord,
    ) -> Result<Resume, Error> {
        // After a move back there is nothing to compare; messages after it were stored since.
        if target.source_seq == 0 {
            return self.with_tail(known, false).await;
        }
        if target.seq < self.target.state.first_seq {
            return match self.target_was_refilled(record) {
                Some(reason) => self.target_lost(known, reason).await,
                None => self.with_tail(known, false).await,
            };
        }
        match self.at_target(target.seq).await? {
            Some(message) if self.tag.origin(&message.header).is_some_and(|o| o.seq == target.source_seq) => {
                // If the target message was written in a chain, the following ones may be too; otherwise some may wait
                // for their turn.
                self.with_tail(known, chained && is_complete(&message.header)).await
            }
            Some(_) => {
                let reason = format!("another message is at the saved sequence {}", target.seq);
                self.target_lost(known, reason).await
            }
            None => {
                if let Some(reason) = self.target_was_refilled(record) {
                    return self.target_lost(known, reason).await;
                }
                // Replaced by a newer message (a KV bucket keeps one per key), consumed, or lost.
                let resume = self.with_tail(Known { after_target: None, ..known }, false).await?;
                let newer = !resume.already.is_empty() || resume.target.is_some_and(|found| found.seq > target.seq);
                // Or consumed, or no consumer was interested any more.
                let replaced = is_consumed(self.target) || self.keeps() > 0 && self.target.state.last_seq > target.seq;
                if newer || replaced || self.target.flag("allow_msg_ttl") {
                    return Ok(resume);
                }
                // Messages of an older run that were in flight may have arrived, and replaced it, since the stream was
                // read.
                let now = Api::new(self.target_lane).stream_info(&self.replication.target.stream).await?;
                if self.keeps() > 0 && now.is_some_and(|now| now.state.last_seq > self.target.state.last_seq) {
                    return Err(Error::retry("the target stored messages while it was checked"));
                }
                let reason = format!("no message is at the saved sequence {}", target.seq);
                self.target_lost(known, reason).await
            }
        }
    }

    pub(super) fn target_is_short(&self, record: &PositionRecord) -> Option<String> {
        let saved = record.target.as_ref().map_or(0, |target| target.seq);
        let saved = saved.max(record.after_target.map_or(0, |copy| copy.at_least));
        match self.target.state.last_seq {
            last if last >= saved => None,
            0 => Some("it is empty and new".to_owned()),
            last => Some(format!("its last sequence is {last}, below the saved {saved}")),
        }
    }

    /// Why the target, which has no message at the saved sequence, is another one: it was deleted, and a run that could not save
    /// its position filled it again. Its creation time alone says little, but no message is left that could contradict it.
    /// Where messages are consumed, none of ours may be left to resume after.
    fn target_was_refilled(&self, record: &PositionRecord) -> Option<String> {
        let saved = record.target.as_ref().filter(|target| !target.created.is_empty())?;
        let another = saved.created != self.target.created && self.target.state.messages > 0;
        (another && !is_consumed(self.target))
            .then(|| format!("it was recreated and has no message at the saved sequence {}", saved.seq))
    }

    /// The copy that has to be after the saved target sequence, unless the target may have removed it.
    pub(super) async fn has_to_be_there(&mut self, record: &PositionRecord) -> Result<Option<TargetPoint>, Error> {
        let Some(AfterTarget { at_least, source_seq }) = record.after_target else { return Ok(None) };
        let begin = record.target.as_ref().map_or(0, |target| target.seq).max(1);
        if is_consumed(self.target) || self.keeps() > 0 || self.target.state.first_seq > begin {
            return Ok(None);
        }
        // It expires with the message at the source.
        if self.target.flag("allow_msg_ttl") && self.point_at(source_seq).await?.time_ns.is_none() {
            return Ok(None);
        }
        Ok(Some(TargetPoint { seq: at_least, source_seq }))
    }
}
