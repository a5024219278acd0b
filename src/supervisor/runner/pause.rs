//! A pause: the run is over, the position record says so, and the lease stays.

use std::time::Duration;

use tokio::time::timeout;
use tracing::info;

use super::CopyRunner;
use crate::{
    events::Event,
    status::State,
    store::Trouble,
    supervisor::{
        context::Context,
        record_notes::{PauseNote, note_pause},
    },
};

/// How long a replication that resumes may take to read its position before it reports that it resumes.
const READ_POSITION: Duration = Duration::from_secs(2);

impl CopyRunner {
    /// Gives the record up, after saving in it that the replication is paused.
    pub(in crate::supervisor) async fn pause(&mut self) {
        if self.superseded {
            return;
        }
        let cell = &self.context.cell;
        cell.run_over();
        cell.released();
        cell.set_state(State::Paused);
        cell.at_rest();
        self.outage.over();
        self.writer = None;
        let mut trouble = Trouble::new("that a replication is paused cannot be saved");
        loop {
            match note_pause(&self.context, self.epoch).await {
                Ok(PauseNote::Ours { news }) => {
                    if news || self.resume_reported {
                        self.report_pause();
                    }
                    return;
                }
                Ok(PauseNote::Anothers) => {
                    self.superseded = true;
                    return self.context.cell.set_state(State::Stopped);
                }
                Err(error) => trouble.wait(&error.to_string()).await,
            }
        }
    }

    fn report_pause(&mut self) {
        let Context { id, cell, .. } = &self.context;
        let position = cell.row().copy.position.source_seq;
        info!(replication = id, position, "paused");
        self.context.emit(Event::Paused { position });
        self.resume_reported = false;
    }

    /// The pause is over. Returns whether this lease may continue: if the position was moved meanwhile, the lease has to be
    /// taken again with a greater epoch.
    pub(in crate::supervisor) async fn resume(&mut self) -> bool {
        self.resume_reported = true;
        let Context { deps, id, cell, .. } = &self.context;
        cell.set_state(State::Starting);
        let mut newest = true;
        if let Ok(Ok((record, _))) = timeout(READ_POSITION, deps.positions.read(id)).await {
            cell.looked_up(&record);
            // As a claim sees it: the instance that moved the position has taken the epoch.
            newest = record.epoch < self.epoch || (record.epoch == self.epoch && record.holder == deps.instance);
        }
        let position = cell.row().copy.position.source_seq;
        info!(replication = id, position, "resumes after a pause");
        self.context.emit(Event::Resumed { position });
        newest
    }
}
