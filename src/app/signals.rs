//! What signals do that do not stop the process.

use std::{fmt, io, sync::Arc};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

use crate::http::Progress;

/// What SIGHUP does.
#[derive(Clone)]
pub struct HangupHook(Arc<dyn Fn() + Send + Sync>);

impl HangupHook {
    /// Called for each SIGHUP; it may read files.
    pub fn new(hook: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(hook))
    }
}

impl fmt::Debug for HangupHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HangupHook")
    }
}

/// From now on SIGHUP calls the hook, and SIGQUIT writes the state of everything to the log; both continue.
pub(super) fn serve(hook: HangupHook, progress: watch::Receiver<Progress>) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                Some(()) = hangup.recv() => {
                    let hook = hook.0.clone();
                    if tokio::task::spawn_blocking(move || hook()).await.is_err() {
                        warn!("SIGHUP: the file could not be read again");
                    }
                }
                Some(()) = quit.recv() => report(&progress),
                else => return,
            }
        }
    });
    Ok(())
}

fn report(progress: &watch::Receiver<Progress>) {
    let supervisor = progress.borrow().supervisor.clone();
    let rows = supervisor.map(|supervisor| supervisor.rows()).unwrap_or_default();
    warn!(replications = rows.len(), "SIGQUIT: the state of everything follows");
    for row in rows {
        let state = serde_json::to_string(&row).unwrap_or_default();
        info!(replication = row.replication, "state: {state}");
    }
}
