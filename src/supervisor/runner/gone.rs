//! A stream that a pattern found is gone: its replication is stopped, and keeps its position.

use tokio::time::sleep;
use tracing::{debug, warn};

use super::{CopyRunner, RETRY};
use crate::{copy::ErrorKind, events::Event, status::State, supervisor::context::Context};

impl CopyRunner {
    /// Shows and saves that the source no longer has the stream. Returns whether the record is still ours.
    pub(in crate::supervisor) async fn note_gone(&mut self, stream: &str) -> bool {
        let message = format!("the source no longer has stream `{stream}`: nothing is copied, the position is kept");
        self.context.cell.run_over();
        self.context.cell.gone(&message);
        self.outage.over();
        let mut backoff = RETRY;
        loop {
            let claimed = self.claim().await;
            let Err(error) = claimed else { break };
            if error.kind == ErrorKind::Superseded {
                self.end_superseded(&error);
                return false;
            }
            debug!(replication = self.context.id, "that the stream is gone was not saved: {error}");
            sleep(backoff.next(rand::random())).await;
        }
        let says_so = |row: &crate::status::Row| {
            let error = row.copy.last_error.as_ref().filter(|error| error.current);
            row.state == State::Held && error.is_some_and(|error| error.kind == "gone")
        };
        let saved = self.writer.as_ref().and_then(|writer| writer.record().status.as_ref());
        if !saved.is_some_and(says_so) {
            let Context { id, cell, .. } = &self.context;
            let position = cell.row().copy.position.source_seq;
            warn!(replication = id, position, "{message}");
            self.context.emit(Event::StreamGone { stream: stream.to_owned(), position });
        }
        // A claim shows what it has read.
        self.context.cell.gone(&message);
        match self.save_row().await {
            Ok(()) => true,
            Err(superseded) => {
                self.end_superseded(&superseded);
                false
            }
        }
    }
}
