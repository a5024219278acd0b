//! Which revision of an adapter's document runs: the newest valid one. Others are reported.

use std::sync::Arc;

use serde_json::Value;
use tracing::warn;

use super::{AdapterDeps, adapter_key};
use crate::{
    allow::AllowList,
    config::{Adapter, Json, Problem, Problems, mask_adapter},
};

/// A document that cannot run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RefusedAdapter {
    pub(super) revision: u64,
    pub(super) problems: Vec<Problem>,
}

/// The documents of one adapter.
#[derive(Debug, Default)]
pub(super) struct AdapterPlan {
    /// The newest revision; `None` if there is no document.
    pub(super) revision: Option<u64>,
    /// The newest document, as written; `null` if that is not JSON.
    pub(super) document: Value,
    /// The newest one, if it is not valid.
    pub(super) refused: Option<RefusedAdapter>,
    /// What runs, and its revision.
    pub(super) adapter: Option<Arc<Adapter>>,
    pub(super) runs: Option<u64>,
}

impl AdapterPlan {
    /// The document was removed: no older one returns.
    pub(super) fn remove(&mut self) {
        *self = Self::default();
    }

    /// A revision was written.
    pub(super) async fn put(&mut self, deps: &AdapterDeps, name: &str, revision: u64, value: &[u8]) {
        self.revision = Some(revision);
        self.document = Json::read(value).map_or(Value::Null, |json| json.value);
        match read(&deps.rules, name, value) {
            Ok(adapter) => {
                self.refused = None;
                self.runs = Some(revision);
                self.adopt(adapter);
            }
            Err(problems) => {
                self.refused = Some(RefusedAdapter { revision, problems: problems.bounded().0 });
                if self.adapter.is_none() {
                    self.look_back(deps, name).await;
                }
            }
        }
    }

    /// The newest valid revision that the bucket still has.
    async fn look_back(&mut self, deps: &AdapterDeps, name: &str) {
        match deps.config.history(&adapter_key(name)).await {
            Ok(history) => {
                let valid = history.into_iter().find_map(|entry| {
                    let adapter = read(&deps.rules, name, &entry.value).ok()?;
                    Some((entry.revision, adapter))
                });
                if let Some((revision, adapter)) = valid {
                    self.runs = Some(revision);
                    self.adopt(adapter);
                }
            }
            Err(error) => warn!(adapter = name, "older revisions cannot be read: {error}"),
        }
    }

    fn adopt(&mut self, adapter: Adapter) {
        if self.adapter.as_deref() != Some(&adapter) {
            self.adapter = Some(Arc::new(adapter));
        }
    }
}

/// Reads the document at the key of this name.
fn read(rules: &AllowList, name: &str, value: &[u8]) -> Result<Adapter, Problems> {
    let json = Json::read(value)?;
    let result = rules.parse_adapter(&json.value).and_then(|adapter| {
        if adapter.name == name {
            return Ok(adapter);
        }
        let shown = mask_adapter(&json.value)["name"].as_str().unwrap_or_default().to_owned();
        let message = format!("`name` is `{shown}`, and the key is that of `{name}`: make both agree");
        Err(Problems(vec![Problem::new("/name", message)]))
    });
    json.checked(result)
}
