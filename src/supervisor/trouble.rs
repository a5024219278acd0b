//! An operation that is tried until it works.

use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use crate::backoff::Backoff;

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// An operation that is tried until it works, with each distinct error told once.
#[derive(Debug)]
pub(super) struct Trouble {
    what: &'static str,
    told: String,
    backoff: Backoff,
}

impl Trouble {
    pub(super) const fn new(what: &'static str) -> Self {
        Self { what, told: String::new(), backoff: BACKOFF }
    }

    /// Tells the reason, if it is news, and waits for the next try.
    pub(super) async fn wait(&mut self, reason: &str) {
        if self.told != reason {
            warn!("{}: {reason}", self.what);
            reason.clone_into(&mut self.told);
        }
        sleep(self.backoff.next(rand::random())).await;
    }

    /// It worked.
    pub(super) fn over(&mut self) {
        if !self.told.is_empty() {
            info!("no longer: {}", self.what);
            self.told.clear();
        }
        self.backoff.reset();
    }
}
