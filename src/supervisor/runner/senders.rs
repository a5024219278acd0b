//! The senders of a sampled replication, before each run.

use super::{CopyRunner, state_file::StateFile};
use crate::{
    config::Replication,
    copy::{Error, ErrorKind, PositionWriter, Samples},
    supervisor::{context::Context, standby_senders::StandbySenders},
};

impl CopyRunner {
    /// The senders of the replication, once they are known.
    pub(super) fn samples(&self) -> Option<Samples> {
        self.senders.as_ref().map(StandbySenders::samples)
    }

    /// Loads the senders of a sampled replication. Forgets them if it is no longer sampled, or identifies senders in
    /// another way than before.
    pub(super) async fn know_senders(&mut self, replication: &Replication) -> Result<(), Error> {
        let Self { context: Context { deps, id, cell, .. }, senders, writer, .. } = self;
        let sampling = replication.sampling.as_ref();
        let record = writer.as_ref().map(PositionWriter::record);
        let were_known = record.is_some_and(|record| record.sampled.is_some());
        let known_by = record.and_then(|record| record.inspected.as_ref());
        let identified_otherwise =
            known_by.is_some_and(|mark| sampling.is_some_and(|sampling| sampling.inspect.mark() != *mark));
        let unfit = senders.as_ref().is_some_and(|senders| sampling.is_none_or(|sampling| !senders.fits(sampling)));
        if unfit || identified_otherwise || (sampling.is_none() && were_known) {
            *senders = None;
            let emptied = deps.senders.empty(id).await;
            emptied.map_err(|error| Error::new(ErrorKind::Retry, error.to_string()))?;
        }
        if let Some(sampling) = sampling {
            if senders.as_ref().is_some_and(|senders| !senders.knows_enough(sampling)) {
                *senders = None;
            }
            let senders = senders.get_or_insert_with(|| StandbySenders::follow(&deps.senders, id, sampling));
            let known = senders.lead(sampling).await;
            known.map_err(|error| Error::new(ErrorKind::Retry, error.to_string()))?;
            let samples = senders.samples();
            let nothing_is_known = !were_known && samples.lock().is_empty();
            if let Some(file) = StateFile::of(deps.state_store.as_deref(), replication).filter(|_| nothing_is_known) {
                file.load(&samples, sampling).await;
            }
        }
        cell.set_samples(senders.as_ref().map(StandbySenders::samples));
        Ok(())
    }
}
