//! The plan: the newest valid revision in the configuration bucket, else the document in the file.

use bytes::Bytes;
use serde_json::Value;
use tracing::warn;

use super::{HeartbeatDeps, RefusedHeartbeats, View};
use crate::{
    allow::AllowList,
    config::{self, Heartbeats, Json},
    names::HEARTBEATS_KEY,
    status::Origin,
    store::{CONFIG_HISTORY, ConfigStore, MarkKind, Stored, Trouble},
};

/// The heartbeats to publish.
#[derive(Debug)]
pub(super) struct HeartbeatPlan {
    pub(super) heartbeats: Option<Heartbeats>,
    pub(super) view: View,
}

/// Makes a plan of the stored document.
#[derive(Debug)]
pub(super) struct HeartbeatPlanner {
    config: ConfigStore,
    rules: AllowList,
    file: Value,
    /// The newest valid revision in the bucket that is known.
    valid: Option<Valid>,
    /// The valid document that was kept beside rejected ones.
    kept: Option<Bytes>,
    trouble: Trouble,
}

/// Valid heartbeats from the bucket.
#[derive(Debug, Clone)]
struct Valid {
    revision: u64,
    written: Bytes,
    document: Value,
    heartbeats: Heartbeats,
}

impl HeartbeatPlanner {
    pub(super) fn new(deps: &HeartbeatDeps) -> Self {
        let (config, rules, file) = (deps.config.clone(), deps.rules.clone(), deps.file.clone());
        let trouble = Trouble::new("older revisions of the heartbeats cannot be read");
        Self { config, rules, file, valid: None, kept: None, trouble }
    }

    /// Whether the file asks for heartbeats too.
    pub(super) fn has_file(&self) -> bool {
        matches!(self.rules.parse_heartbeats(&self.file), Ok(Some(_)))
    }

    /// The plan for the stored document of now. A call that is dropped can be repeated.
    pub(super) async fn plan(&mut self, newest: &Stored) -> HeartbeatPlan {
        let revision = newest.revision;
        let Some(written) = &newest.value else {
            self.forget();
            return self.file_or_nothing(revision, None);
        };
        let rejected = match read(&self.rules, written) {
            Ok((document, Some(heartbeats))) => {
                self.valid = Some(Valid { revision, written: written.clone(), document, heartbeats });
                None
            }
            // A document that removes them by request was written by hand.
            Ok((_, None)) => {
                self.forget();
                return self.file_or_nothing(revision, None);
            }
            Err((document, problems)) => {
                if self.valid.is_none() {
                    self.valid = self.newest_valid().await;
                }
                self.keep();
                Some(RefusedHeartbeats::new(revision, document, problems))
            }
        };
        let Some(Valid { revision: runs, document, heartbeats, .. }) = self.valid.clone() else {
            return self.file_or_nothing(revision, rejected);
        };
        let view = View { origin: Origin::Kv, revision: Some(runs), document, rejected, seen: revision };
        HeartbeatPlan { heartbeats: Some(heartbeats), view }
    }

    fn file_or_nothing(&self, seen: u64, rejected: Option<RefusedHeartbeats>) -> HeartbeatPlan {
        let heartbeats = self.rules.parse_heartbeats(&self.file).unwrap_or_else(|problems| {
            // A folder that the rules name may have changed since the start.
            warn!("the heartbeats of the file are not published: {problems}");
            None
        });
        let (origin, document) = match &heartbeats {
            Some(_) => (Origin::File, self.file.clone()),
            None => (Origin::None, Value::Null),
        };
        HeartbeatPlan { heartbeats, view: View { origin, revision: None, document, rejected, seen } }
    }

    /// After a removal no older document returns.
    fn forget(&mut self) {
        (self.valid, self.kept) = (None, None);
        let config = self.config.clone();
        tokio::spawn(async move {
            if let Err(error) = config.unmark(HEARTBEATS_KEY, MarkKind::Valid, None).await {
                warn!("the saved copy of the removed heartbeats was not deleted: {error}");
            }
        });
    }

    /// Keeps the running document beside rejected ones: the bucket forgets it after many rejected revisions.
    fn keep(&mut self) {
        let Some(written) = self.valid.as_ref().map(|valid| valid.written.clone()) else { return };
        if self.kept.as_ref() == Some(&written) {
            return;
        }
        self.kept = Some(written.clone());
        let config = self.config.clone();
        tokio::spawn(async move {
            if let Err(error) = config.mark(HEARTBEATS_KEY, MarkKind::Valid, written).await {
                warn!("the newest valid heartbeats were not kept: {error}");
            }
        });
    }

    async fn newest_valid(&mut self) -> Option<Valid> {
        let history = loop {
            match self.config.history(HEARTBEATS_KEY).await {
                Ok(history) => break history,
                Err(error) => self.trouble.wait(&error.to_string()).await,
            }
        };
        let mut all: Vec<_> = history.into_iter().map(|entry| (entry.revision, entry.value)).collect();
        // The history may contain only the last edits that were all rejected.
        while all.len() >= CONFIG_HISTORY {
            match self.config.marked(HEARTBEATS_KEY, MarkKind::Valid).await {
                Ok(kept) => {
                    all.extend(kept);
                    break;
                }
                Err(error) => self.trouble.wait(&error.to_string()).await,
            }
        }
        self.trouble.over();
        all.into_iter().find_map(|(revision, written)| {
            let (document, heartbeats) = read(&self.rules, &written).ok()?;
            Some(Valid { revision, document, heartbeats: heartbeats?, written })
        })
    }
}

type ReadHeartbeats = Result<(Value, Option<Heartbeats>), (Value, config::Problems)>;

fn read(rules: &AllowList, written: &[u8]) -> ReadHeartbeats {
    let json = Json::read(written).map_err(|problems| (Value::Null, problems))?;
    let document = json.value.clone();
    let result = rules.parse_heartbeats(&document);
    match json.checked(result) {
        Ok(heartbeats) => Ok((document, heartbeats)),
        Err(problems) => Err((document, problems)),
    }
}
