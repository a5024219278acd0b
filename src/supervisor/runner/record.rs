//! The position record while this instance leads: it is claimed before each run, and its status row is saved between
//! runs.

use tracing::{debug, warn};

use super::CopyRunner;
use crate::{
    copy::{Error, ErrorKind, PositionWriter},
    events::Event,
    status::Row,
    store::{ClaimError, SaveError},
    supervisor::context::Context,
};

impl CopyRunner {
    /// The record in memory may differ from the bucket: the next run claims it again.
    pub(super) fn doubt(&mut self) {
        self.doubted = self.writer.take().filter(|_| self.context.deps.standalone).or(self.doubted.take());
    }

    pub(super) async fn claim(&mut self) -> Result<(), Error> {
        // A run has to know which messages came from its target.
        self.context.known_streams.loaded().await;
        if self.writer.is_none() {
            let Context { deps, id, cell, .. } = &self.context;
            let claim = match deps.positions.claim(id, &deps.instance, self.epoch).await {
                Ok(claim) => claim,
                Err(error @ ClaimError::Newer { .. }) => {
                    return Err(Error::new(ErrorKind::Superseded, error.to_string()));
                }
                Err(ClaimError::Store(error)) => {
                    if let Some(doubted) = self.doubted.take() {
                        warn!(
                            replication = id,
                            "cannot save the position; continuing standalone from the position in memory: {error}"
                        );
                        self.writer = Some(doubted);
                        return Ok(());
                    }
                    let message = format!("the position record cannot be claimed: {error}");
                    return Err(Error::new(ErrorKind::Retry, message));
                }
            };
            self.doubted = None;
            cell.claimed(&claim.record);
            if !std::mem::replace(&mut self.leader_reported, true) {
                let another = |holder: &String| !holder.is_empty() && *holder != deps.instance;
                let previous = Some(claim.previous.clone()).filter(another);
                self.takeover = previous.as_ref().map(|previous| {
                    let mut span = deps.traces.begin("takeover", id, claim.record.epoch);
                    span.text("previous", previous);
                    span
                });
                self.context.emit(Event::Leader { epoch: claim.record.epoch, previous });
            }
            self.writer = Some(PositionWriter::new(deps.positions.clone(), deps.events.clone(), id, claim));
        }
        Ok(())
    }

    /// Saves the status row unless the record has an equal one. The only error is that the record belongs to another
    /// instance; all other errors are left to the next run, which needs the record.
    pub(super) async fn save_row(&mut self) -> Result<(), Error> {
        let Some(mut writer) = self.writer.take() else { return Ok(()) };
        let row = self.context.cell.row();
        let error = |row: &Row| row.copy.last_error.as_ref().map(|error| (error.message.clone(), error.current));
        // Readers count its seconds themselves.
        let lag = |row: &Row| row.copy.lag.map(|lag| (lag.messages, lag.oldest));
        let same = |saved: &Row| saved.state == row.state && error(saved) == error(&row) && lag(saved) == lag(&row);
        let is_saved = !self.unsaved && writer.record().status.as_ref().is_some_and(same);
        let saved = if is_saved { Ok(()) } else { writer.save_row(row).await };
        if let Err(error) = &saved {
            debug!(replication = self.context.id, "the status row was not saved: {error}");
        }
        self.unsaved = saved.is_err();
        match saved {
            Err(SaveError::Conflict { record, .. }) if record.epoch > writer.record().epoch => {
                let message = format!("instance `{}` took over with epoch {}", record.holder, record.epoch);
                return Err(Error::new(ErrorKind::Superseded, message));
            }
            // An own write of unknown outcome, or an edit by hand: the next attempt claims the record, which reads it.
            Err(SaveError::Conflict { .. } | SaveError::Deleted { .. }) => {}
            Ok(()) | Err(SaveError::Store(_)) => self.writer = Some(writer),
        }
        Ok(())
    }
}
