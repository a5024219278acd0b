//! Operations that are repeated until they work.

use std::time::Duration;

use futures_util::{StreamExt, stream::BoxStream};
use nats_lane::backoff::Backoff;
use tokio::time::sleep;
use tracing::{info, warn};

use super::error::Error;

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// The errors of an operation that is repeated until it works; each distinct error is logged once.
#[derive(Debug)]
pub(crate) struct Trouble {
    what: &'static str,
    logged: String,
    backoff: Backoff,
}

impl Trouble {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what, logged: String::new(), backoff: BACKOFF }
    }

    /// Logs the reason, unless it was the last one logged.
    pub(crate) fn log(&mut self, reason: &str) {
        if self.logged != reason {
            warn!("{}: {reason}", self.what);
            reason.clone_into(&mut self.logged);
        }
    }

    /// Logs the reason, unless it was the last one logged, and waits for the next attempt.
    pub(crate) async fn wait(&mut self, reason: &str) {
        self.log(reason);
        sleep(self.backoff.next(rand::random())).await;
    }

    /// It worked.
    pub(crate) fn over(&mut self) {
        if !self.logged.is_empty() {
            info!("no longer: {}", self.what);
            self.logged.clear();
        }
        self.backoff.reset();
    }
}

/// Follows a bucket forever; a watch that cannot be opened is tried again.
pub(crate) async fn follow<T>(
    what: &'static str,
    open: impl AsyncFn() -> Result<BoxStream<'static, Result<T, Error>>, Error>,
    mut apply: impl FnMut(T),
) {
    let mut trouble = Trouble::new(what);
    loop {
        match open().await {
            Ok(mut changes) => {
                while let Some(change) = changes.next().await {
                    match change {
                        Ok(change) => {
                            trouble.over();
                            apply(change);
                        }
                        Err(error) => trouble.wait(&error.to_string()).await,
                    }
                }
            }
            Err(error) => trouble.wait(&error.to_string()).await,
        }
    }
}
