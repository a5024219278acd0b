//! Which replications of this service write to the same target stream, and which copy messages back from there: from all
//! documents, whether the replications run here, elsewhere or are paused. In memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use nats_lane::{Connection, ServerRef};
use tokio::sync::watch;

use crate::{
    allow::AllowList,
    config::{FeedSubjects, NativeKind, OriginTag, Replication, Side},
    copy::{KnownOrigins, WaysBack},
    store::ConfigEntry,
};

/// The streams of all replications; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct KnownStreams {
    site: String,
    rules: AllowList,
    /// By id.
    sides: Arc<Mutex<BTreeMap<String, KnownSides>>>,
    /// Changes after each change of `sides`.
    changes: Arc<watch::Sender<u64>>,
    /// Whether all documents have been read once.
    loaded: Arc<watch::Sender<bool>>,
}

/// Both streams of one replication.
#[derive(Debug, Clone)]
pub struct KnownSides {
    /// Where messages are read.
    pub source: Side,
    /// Where messages are stored.
    pub target: Side,
    /// As what a native feed fills the target; `None` for a copy.
    pub native: Option<NativeKind>,
    /// What its copies carry; empty for a mirror.
    tags: Vec<OriginTag>,
    /// The document as it runs.
    pub replication: Arc<Replication>,
}

impl KnownSides {
    /// Whether streams, kind and tags are the same, whatever else the documents say.
    fn is_like(&self, other: &Self) -> bool {
        (&self.source, &self.target, self.native, &self.tags)
            == (&other.source, &other.target, other.native, &other.tags)
    }
}

/// How two connections compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    /// One account and one JetStream.
    Same,
    /// The same servers, under another login.
    Unknown,
    /// Other servers, or another domain; or the same under another address.
    Other,
}

impl KnownStreams {
    pub(super) fn new(site: &str, rules: &AllowList) -> Self {
        Self {
            site: site.to_owned(),
            rules: rules.clone(),
            sides: Arc::default(),
            changes: Arc::default(),
            loaded: Arc::default(),
        }
    }

    /// Adds or replaces a document; an invalid one replaces nothing.
    pub(super) fn put(&self, entry: &ConfigEntry) {
        let Ok(replication) = entry.accept(&self.rules, &self.site) else { return };
        if replication.patterns.is_some() {
            // It copies nothing itself.
            return self.remove(&replication.id);
        }
        let native = replication.native.as_ref().map(|native| native.kind);
        let tags = replication.origin_tags(&self.site);
        let replication = Arc::new(replication);
        let Replication { id, source, target, .. } = &*replication;
        let (id, source, target) = (id.clone(), source.clone(), target.clone());
        let sides = KnownSides { source, target, native, tags, replication };
        let before = self.lock().insert(id, sides.clone());
        if !before.is_some_and(|before| before.is_like(&sides)) {
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// The document was deleted.
    pub(super) fn remove(&self, id: &str) {
        if self.lock().remove(id).is_some() {
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    /// Both streams of every replication, by id.
    pub(super) fn all(&self) -> BTreeMap<String, KnownSides> {
        self.lock().clone()
    }

    /// Whether both streams of a replication are known to be in one account.
    pub(super) fn is_one_account(&self, replication: &Replication) -> bool {
        self.compare(&replication.source, &replication.target) != Comparison::Other
    }

    /// All documents have been read.
    pub(super) fn mark_loaded(&self) {
        self.loaded.send_replace(true);
    }

    /// Waits until all documents have been read.
    pub(super) async fn loaded(&self) {
        // The sender is ours.
        let _ = self.loaded.subscribe().wait_for(|loaded| *loaded).await;
    }

    /// Another replication that writes to the same stream, identified by the stream's name, a server, the login and the
    /// prefix of the API. The same stream under another address or user is detected when the expected sequence is refused.
    pub(super) fn other_writer(&self, replication: &Replication) -> Option<String> {
        let Replication { id, target, .. } = replication;
        let others = self.others(id, |sides| sides.target.stream == target.stream);
        others.into_iter().find(|(_, sides)| self.compare(target, &sides.target) == Comparison::Same).map(|(id, _)| id)
    }

    /// The replications that copy messages from the target of this one, now and later.
    pub(super) fn ways_back(&self, replication: &Replication) -> WaysBack {
        let (known, id, target) = (self.clone(), replication.id.clone(), replication.target.clone());
        WaysBack::new(self.changes.subscribe(), move || known.origins(&id, &target))
    }

    /// What copies of streams of the target's name carry.
    fn origins(&self, id: &str, target: &Side) -> KnownOrigins {
        let mut origins = KnownOrigins::default();
        for (id, sides) in self.others(id, |sides| sides.source.stream == target.stream) {
            match self.compare(target, &sides.source) {
                Comparison::Same if sides.native == Some(NativeKind::Mirror) => {
                    origins.mirrors.push(FeedSubjects::of(&self.site, &id).api());
                }
                Comparison::Same => origins.target.extend(sides.tags),
                Comparison::Other => origins.others.extend(sides.tags),
                Comparison::Unknown => {}
            }
        }
        origins
    }

    /// The replications but for `id` that `wanted` is true for.
    fn others(&self, id: &str, wanted: impl Fn(&KnownSides) -> bool) -> Vec<(String, KnownSides)> {
        let all = self.lock();
        let others = all.iter().filter(|(other, sides)| *other != id && wanted(sides));
        others.map(|(id, sides)| (id.clone(), sides.clone())).collect()
    }

    /// Compares the connections of two streams; files of contexts are read now.
    fn compare(&self, one: &Side, other: &Side) -> Comparison {
        if let (ServerRef::Known(one), ServerRef::Known(other)) = (&one.place, &other.place) {
            return compare(one, other);
        }
        match (self.rules.resolve(&one.place), self.rules.resolve(&other.place)) {
            (Ok(one), Ok(other)) => compare(&one, &other),
            _ => Comparison::Unknown,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, KnownSides>> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn compare(one: &Connection, other: &Connection) -> Comparison {
    let (here, there) = (&one.endpoint, &other.endpoint);
    let servers = here.hosts.iter().any(|host| there.hosts.contains(host));
    match (servers && one.api_prefix == other.api_prefix, here.auth == there.auth) {
        (false, _) => Comparison::Other,
        (true, true) => Comparison::Same,
        (true, false) => Comparison::Unknown,
    }
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
        ConfigEntry::new(format!("S.{name}"), 1, document.to_string().into())
    }

    #[test]
    fn another_writer_is_known_by_stream_server_and_login() {
        let rules = AllowList::default();
        let check = |own: Value, other: Value, expect: bool| {
            let known_streams = KnownStreams::new("SITE", &rules);
            let (own, other) = (entry("own", own), entry("other", other));
            known_streams.put(&own);
            known_streams.put(&other);
            let replication = rules.parse(&own.value, "SITE").unwrap();
            let found = known_streams.other_writer(&replication);
            assert_eq!(found, expect.then(|| "S.other".to_owned()), "{own:?} {other:?}");
            known_streams.remove("S.other");
            assert_eq!(known_streams.other_writer(&replication), None);
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
    fn ways_back_are_known_by_stream_server_and_login() {
        let rules = AllowList::default();
        let check = |other: Value, target: &[&str], others: &[&str]| {
            let known_streams = KnownStreams::new("SITE", &rules);
            let own = entry("own", json!({}));
            known_streams.put(&own);
            let mut back = json!({"stream": "T", "source_url": "b", "target_url": "a", "target_stream": "S"});
            for (field, value) in other.as_object().unwrap() {
                back[field] = value.clone();
            }
            let back = ConfigEntry { key: "T.back".to_owned(), ..entry("back", back) };
            known_streams.put(&back);
            let replication = rules.parse(&own.value, "SITE").unwrap();
            let tags = |names: &[&str]| -> Vec<OriginTag> {
                let tag = |name: &&str| OriginTag {
                    stream: "T".to_owned(),
                    site: "SITE".to_owned(),
                    name: Some((*name).to_owned()),
                    fed: None,
                };
                names.iter().map(tag).collect()
            };
            let mut expect = KnownOrigins { target: tags(target), others: tags(others), mirrors: Vec::new() };
            match other["kind"].as_str() {
                Some("mirror") => expect.mirrors.push(FeedSubjects::of("SITE", "T.back").api()),
                Some(_) => expect.target.push(OriginTag::fed("T", "SITE", "T.back")),
                None => {}
            }
            assert_eq!(known_streams.origins("S.own", &replication.target), expect, "{back:?}");
            known_streams.remove("T.back");
            assert_eq!(known_streams.origins("S.own", &replication.target), KnownOrigins::default());
        };
        check(json!({}), &["back"], &[]);
        check(json!({"target_url": "elsewhere"}), &["back"], &[]);
        check(json!({"source_url": "x,b:4222"}), &["back"], &[]);
        check(json!({"source_url": "c"}), &[], &["back"]);
        check(json!({"source_domain": "hub"}), &[], &["back"]);
        // Another login may be another account, or not.
        check(json!({"source_url": "u:p@b"}), &[], &[]);
        // Messages that the target's server took itself have its own mark, those of a mirror have none.
        for kind in ["mirror", "source"] {
            check(json!({"kind": kind, "target_leaf_url": "nats-leaf://a"}), &[], &[]);
        }
    }

    #[test]
    fn a_document_that_cannot_run_replaces_nothing() {
        let rules = AllowList::default();
        let known_streams = KnownStreams::new("SITE", &rules);
        known_streams.put(&entry("other", json!({})));
        known_streams.put(&entry("other", json!({"target_stream": 5})));
        known_streams.put(&ConfigEntry { key: "X".to_owned(), ..entry("third", json!({})) });
        let replication = rules.parse(&entry("own", json!({})).value, "SITE").unwrap();
        assert_eq!(known_streams.other_writer(&replication).as_deref(), Some("S.other"));
    }
}
