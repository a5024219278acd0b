//! Says that this process is there: its session record, renewed while it lives and removed when it stops. Clears
//! away what others left.

use std::time::Duration;

use chrono::{SubsecRound, Utc};
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Handle,
    group::{GONE_AFTER, Group},
};
use crate::store::{Error, SessionRecord, SessionStore};

/// How often the record is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(4);
/// So long the last words may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Who this process is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its `--instance`.
    pub instance: String,
    /// Name of its host.
    pub host: String,
    /// Version of its program.
    pub program: String,
}

/// The session of this process.
#[derive(Debug)]
pub struct Presence {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Presence {
    /// Writes the session record and renews it from now on.
    pub fn start(store: SessionStore, identity: Identity, handle: &Handle) -> Self {
        let record = SessionRecord {
            version: 1,
            instance: identity.instance,
            session: nuid::next().to_string(),
            host: identity.host,
            pid: std::process::id(),
            program: identity.program,
            started: Utc::now().trunc_subsecs(3),
            nonce: 0,
        };
        let stop = CancellationToken::new();
        let work = Renewal {
            store,
            record,
            revision: None,
            group: handle.group.clone(),
            told: String::new(),
            taken_from: None,
        };
        let task = tokio::spawn(work.run(stop.clone()));
        Self { stop, task }
    }

    /// Removes the session record.
    pub async fn stop(self) {
        self.stop.cancel();
        let _ = timeout(LAST_WORDS, self.task).await;
    }
}

struct Renewal {
    store: SessionStore,
    record: SessionRecord,
    /// What we wrote last; `None` before the first time, and when it is not there any more.
    revision: Option<u64>,
    group: Group,
    /// The trouble told last.
    told: String,
    /// Session of another process that was told last.
    taken_from: Option<String>,
}

impl Renewal {
    async fn run(mut self, stop: CancellationToken) {
        let mut renew = interval(RENEW_EVERY);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(renew.tick()).await.is_some() {
            // A write is brought to its end, so that the removal finds it.
            match self.renew().await {
                Ok(true) => self.over(),
                Ok(false) => {}
                Err(error) => self.trouble(&error.to_string()),
            }
            if let Err(error) = self.clear_away().await {
                debug!("what another instance left was not cleared away: {error}");
            }
        }
        if let Some(revision) = self.revision
            && let Err(error) = self.store.remove(&self.record.instance, revision).await
        {
            debug!("the session record was not removed: {error}");
        }
    }

    /// Whether the session was written.
    async fn renew(&mut self) -> Result<bool, Error> {
        self.record.nonce += 1;
        let revision = match self.revision.take() {
            Some(revision) => revision,
            None => {
                let (there, revision) = self.store.read(&self.record.instance).await?;
                let other = there.filter(|other| other.session != self.record.session);
                if let Some(other) = other
                    .filter(|other| self.taken_from.replace(other.session.clone()).as_ref() != Some(&other.session))
                {
                    info!(
                        instance = other.instance,
                        host = other.host,
                        pid = other.pid,
                        "takes over the session of a process that used the same instance id"
                    );
                }
                revision
            }
        };
        self.revision = self.store.put(&self.record, revision).await?;
        Ok(self.revision.is_some())
    }

    /// Removes sessions that were silent for long, and then what their removal left.
    async fn clear_away(&self) -> Result<(), Error> {
        for (instance, heard) in self.group.sessions().known {
            if heard.at.elapsed() <= GONE_AFTER || instance == self.record.instance {
                continue;
            }
            match heard.record {
                Some(_) => _ = self.store.remove(&instance, heard.revision).await?,
                None => {
                    self.store.forget(&instance, heard.revision).await?;
                    self.group.forget(&instance, heard.revision);
                }
            }
        }
        Ok(())
    }

    fn trouble(&mut self, reason: &str) {
        if self.told != reason {
            warn!("others do not hear of this instance: {reason}");
            reason.clone_into(&mut self.told);
        }
    }

    fn over(&mut self) {
        if !self.told.is_empty() {
            info!("others hear of this instance again");
            self.told.clear();
        }
    }
}
