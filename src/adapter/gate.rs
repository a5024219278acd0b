//! Whether an adapter reads: not while it is paused, and if it is exclusive only with the lease.

use std::{future::pending, sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{row::AdapterCell, task::IngestGate};
use crate::lease::Candidacy;

/// Opens and closes the gate of one task.
pub(super) struct GateKeeper {
    cell: Arc<AdapterCell>,
    paused: watch::Sender<bool>,
    _task: AbortOnDropHandle<()>,
}

impl GateKeeper {
    /// The keeper, and the gate for the task. Without a candidacy only pauses close it.
    pub(super) fn new(
        cell: Arc<AdapterCell>,
        paused: bool,
        candidacy: Option<Candidacy>,
    ) -> (Self, watch::Receiver<IngestGate>) {
        let (pauses, pause) = watch::channel(paused);
        let (sender, gate) = watch::channel(if paused {
            IngestGate::Paused
        } else if candidacy.is_some() {
            IngestGate::Standby
        } else {
            IngestGate::Open
        });
        let task = AbortOnDropHandle::new(tokio::spawn(keep(sender, pause, candidacy)));
        (Self { cell, paused: pauses, _task: task }, gate)
    }

    pub(super) fn pause(&self, paused: bool) {
        self.paused.send_if_modified(|before| std::mem::replace(before, paused) != paused);
    }

    /// The state of the task.
    pub(super) fn cell(&self) -> Arc<AdapterCell> {
        self.cell.clone()
    }
}

async fn keep(gate: watch::Sender<IngestGate>, pause: watch::Receiver<bool>, candidacy: Option<Candidacy>) {
    let Some(mut candidacy) = candidacy else { return follow(&gate, pause, IngestGate::Open).await };
    loop {
        let grant = tokio::select! {
            () = follow(&gate, pause.clone(), IngestGate::Standby) => return,
            grant = candidacy.granted() => grant,
        };
        let stop = CancellationToken::new();
        let work = async {
            tokio::select! {
                () = follow(&gate, pause.clone(), IngestGate::Open) => {}
                () = stop.cancelled() => {}
            }
        };
        grant.hold(&stop, Box::pin(work)).await;
        let closed = if *pause.borrow() { IngestGate::Paused } else { IngestGate::Standby };
        gate.send_replace(closed);
        candidacy.ended(Duration::ZERO);
    }
}

/// Shows pauses, and otherwise `open`, until it is dropped.
async fn follow(gate: &watch::Sender<IngestGate>, mut pause: watch::Receiver<bool>, open: IngestGate) {
    loop {
        let wanted = if *pause.borrow_and_update() { IngestGate::Paused } else { open };
        gate.send_if_modified(|before| std::mem::replace(before, wanted) != wanted);
        if pause.changed().await.is_err() {
            // The keeper is gone, and this task with it.
            pending::<()>().await;
        }
    }
}
