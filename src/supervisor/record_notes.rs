//! What the position record says while no run writes it: that the replication is paused, how much waits at the source
//! meanwhile, and that it waits for Choria's election. Other instances answer from there.

use std::{convert::Infallible, future::pending};

use tracing::debug;

use super::context::Context;
use crate::{
    status::{CopyStatus, Row, State},
    store::{Claim, PositionRecord, SaveError},
};

/// Whose record was found when a pause was saved.
pub(super) enum PauseNote {
    /// The record of this instance. It says that the replication is paused; `news` if it did not before.
    Ours { news: bool },
    /// Another instance took it.
    Anothers,
}

/// Saves in the record that the replication is paused, unless it says so or belongs to a newer leader.
pub(super) async fn note_pause(context: &Context, epoch: u64) -> Result<PauseNote, SaveError> {
    let Context { deps, id, cell, .. } = context;
    let (record, revision) = deps.positions.read(id).await?;
    cell.looked_up(&record);
    if record.status.as_ref().is_some_and(|row| row.state == State::Paused) {
        return Ok(PauseNote::Ours { news: false });
    }
    if epoch < record.epoch && record.holder != deps.instance {
        return Ok(PauseNote::Anothers);
    }
    let row = Row { epoch: record.epoch, ..cell.row() };
    let nonce = u64::from(rand::random::<u32>());
    deps.positions.save(id, PositionRecord { nonce, ..record }.reporting(row), revision).await?;
    Ok(PauseNote::Ours { news: true })
}

/// While the replication is paused, keeps the lag and the headroom in the record up to date, as far as this instance
/// sees them.
pub(super) async fn keep_pause_current(context: &Context) -> Infallible {
    let Context { deps, id, cell, .. } = context;
    let mut status = cell.status().subscribe();
    // The lag is counted by the source's clock.
    let waits = |copy: &CopyStatus| (copy.lag.map(|lag| (lag.messages, lag.oldest)), copy.source.clock_offset_seconds);
    let mut noted = None;
    loop {
        let seen = waits(&status.borrow_and_update().1);
        if noted != Some(seen) {
            let result: Result<(), String> = async {
                let (mut record, revision) = deps.positions.read(id).await.map_err(|error| error.to_string())?;
                let own = cell.row().copy;
                let Some(mut row) = record.status.take().filter(|row| row.state == State::Paused) else {
                    return Ok(());
                };
                let moved = row.copy.position.source_seq != own.position.source_seq;
                if moved || waits(&row.copy) == seen {
                    return Ok(());
                }
                (row.copy.lag, row.copy.headroom) = (own.lag, own.headroom);
                row.copy.source.first_seq = own.source.first_seq;
                row.copy.source.last_seq = own.source.last_seq;
                row.copy.source.clock_offset_seconds = own.source.clock_offset_seconds;
                record.nonce = u64::from(rand::random::<u32>());
                deps.positions
                    .save(id, record.reporting(row), revision)
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string())
            }
            .await;
            match result {
                Ok(()) => noted = Some(seen),
                Err(error) => debug!(replication = id, "lag and headroom of the source were not saved: {error}"),
            }
        }
        if status.changed().await.is_err() {
            return pending().await;
        }
    }
}

/// Saves in the record that this instance has the lease and waits for Choria's election.
pub(super) async fn note_election_wait(context: &Context, epoch: u64) -> Infallible {
    let Context { deps, id, cell, .. } = context;
    let noted: Result<(), String> = async {
        let claim = deps.positions.claim(id, &deps.instance, epoch).await.map_err(|error| error.to_string())?;
        let Claim { record, revision, .. } = claim;
        cell.looked_up(&record);
        let row = Row { epoch: record.epoch, ..cell.row() };
        let nonce = u64::from(rand::random::<u32>());
        let record = PositionRecord { electing: true, nonce, ..record }.reporting(row);
        deps.positions.save(id, record, revision).await.map(drop).map_err(|error| error.to_string())
    }
    .await;
    if let Err(error) = noted {
        debug!(replication = id, "that it waits for Choria's election was not saved: {error}");
    }
    pending().await
}
