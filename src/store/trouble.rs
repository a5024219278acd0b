//! What is tried until it works.

use std::time::Duration;

use futures_util::{StreamExt, stream::BoxStream};
use nats_lane::backoff::Backoff;
use tokio::time::sleep;
use tracing::{info, warn};

use super::error::Error;

const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// An operation that is tried until it works, with each distinct error logged once.
#[derive(Debug)]
pub(crate) struct Trouble {
    what: &'static str,
    told: String,
    backoff: Backoff,
}

impl Trouble {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what, told: String::new(), backoff: BACKOFF }
    }

    /// Tells the reason, if it is news.
    pub(crate) fn tell(&mut self, reason: &str) {
        if self.told != reason {
            warn!("{}: {reason}", self.what);
            reason.clone_into(&mut self.told);
        }
    }

    /// Tells the reason, if it is news, and waits for the next try.
    pub(crate) async fn wait(&mut self, reason: &str) {
        self.tell(reason);
        sleep(self.backoff.next(rand::random())).await;
    }

    /// It worked.
    pub(crate) fn over(&mut self) {
        if !self.told.is_empty() {
            info!("no longer: {}", self.what);
            self.told.clear();
        }
        self.backoff.reset();
    }
}

/// Follows a bucket for ever; a watch that cannot be opened is tried again.
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
