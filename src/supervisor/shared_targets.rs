//! Which replications of this service write to the same target stream: from all documents, whether the replications run
//! here, elsewhere or are paused. In memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use nats_lane::Connection;

use crate::{
    allow::AllowList,
    config::{Replication, Side},
    store::ConfigEntry,
};

/// The targets of all replications, by id; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct SharedTargets {
    site: String,
    rules: AllowList,
    targets: Arc<Mutex<BTreeMap<String, Side>>>,
}

impl SharedTargets {
    pub(super) fn new(site: &str, rules: &AllowList) -> Self {
        Self { site: site.to_owned(), rules: rules.clone(), targets: Arc::default() }
    }

    /// Adds or replaces a document; an invalid one replaces nothing.
    pub(super) fn put(&self, entry: &ConfigEntry) {
        if let Ok(Replication { id, target, .. }) = self.rules.parse(&entry.value, &self.site)
            && id == entry.key
        {
            self.targets.lock().unwrap_or_else(PoisonError::into_inner).insert(id, target);
        }
    }

    /// The document was deleted.
    pub(super) fn remove(&self, id: &str) {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// Another replication that writes to the same stream, identified by the stream's name, a server, the login and the
    /// prefix of the API. The same stream under another address or user is detected when the expected sequence is refused.
    pub(super) fn other_writer(&self, replication: &Replication) -> Option<String> {
        let Replication { id, target, .. } = replication;
        let others: Vec<(String, Side)> = {
            let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
            let same = targets.iter().filter(|(other, side)| *other != id && side.stream == target.stream);
            same.map(|(other, side)| (other.clone(), side.clone())).collect()
        };
        if others.is_empty() {
            return None;
        }
        let own = self.rules.resolve(&target.place).ok()?;
        let resolved = |side: &Side| self.rules.resolve(&side.place).ok();
        others.into_iter().find(|(_, side)| resolved(side).is_some_and(|there| same(&own, &there))).map(|(id, _)| id)
    }
}

fn same(one: &Connection, other: &Connection) -> bool {
    let (here, there) = (&one.endpoint, &other.endpoint);
    one.api_prefix == other.api_prefix
        && here.auth == there.auth
        && here.hosts.iter().any(|host| there.hosts.contains(host))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn entry(name: &str, fields: Value) -> ConfigEntry {
        let mut document =
            json!({"stream": "S", "name": name, "source_url": "a", "target_url": "b", "target_stream": "T"});
        for (field, value) in fields.as_object().unwrap() {
            document[field] = value.clone();
        }
        ConfigEntry { key: format!("S.{name}"), revision: 1, value: document.to_string().into() }
    }

    #[test]
    fn another_writer_is_known_by_stream_server_and_login() {
        let rules = AllowList::default();
        let check = |own: Value, other: Value, expect: bool| {
            let shared_targets = SharedTargets::new("SITE", &rules);
            let (own, other) = (entry("own", own), entry("other", other));
            shared_targets.put(&own);
            shared_targets.put(&other);
            let replication = rules.parse(&own.value, "SITE").unwrap();
            let found = shared_targets.other_writer(&replication);
            assert_eq!(found, expect.then(|| "S.other".to_owned()), "{own:?} {other:?}");
            shared_targets.remove("S.other");
            assert_eq!(shared_targets.other_writer(&replication), None);
        };
        check(json!({}), json!({}), true);
        check(json!({}), json!({"target_url": "c,b:4222"}), true);
        check(json!({}), json!({"target_url": "c"}), false);
        check(json!({}), json!({"target_url": "b:4223"}), false);
        check(json!({}), json!({"target_stream": "U"}), false);
        check(json!({}), json!({"target_domain": "hub"}), false);
        check(json!({"target_api_prefix": "$JS.hub.API"}), json!({"target_domain": "hub"}), true);
        check(json!({"target_url": "u:p@b"}), json!({"target_url": "v:p@b"}), false);
    }

    #[test]
    fn a_document_that_cannot_run_replaces_nothing() {
        let rules = AllowList::default();
        let shared_targets = SharedTargets::new("SITE", &rules);
        shared_targets.put(&entry("other", json!({})));
        shared_targets.put(&entry("other", json!({"target_stream": 5})));
        shared_targets.put(&ConfigEntry { key: "X".to_owned(), ..entry("third", json!({})) });
        let replication = rules.parse(&entry("own", json!({})).value, "SITE").unwrap();
        assert_eq!(shared_targets.other_writer(&replication).as_deref(), Some("S.other"));
    }
}
