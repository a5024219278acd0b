//! Documents with what they name: the links that they use, and one document for each stream that a document with patterns has
//! found. All instances derive the same from the same bucket. A document of the bucket with the id of a derived one takes
//! precedence.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use serde_json::{Map, Value};
use tracing::warn;

use super::{
    config_change::{ConfigChange, ConfigEntry, Family},
    error::Error,
    marks::{Mark, MarkKind, StreamsMark},
};
use crate::{
    config::{self, Json, LinkUse, Links, StreamPatterns, member_document, member_id},
    names::{ADAPTERS_PREFIX, LINKS_PREFIX},
};

/// The changes of a bucket, resolved. `purpose` is that of the watch.
pub(super) fn resolved(
    changes: BoxStream<'static, Result<ConfigChange, Error>>,
    purpose: &str,
) -> BoxStream<'static, Result<ConfigChange, Error>> {
    // One watch of a process reports.
    let state = LinkResolver { reports: purpose == "supervisor", ..LinkResolver::default() };
    stream::unfold((changes, state), |(mut changes, mut state)| async move {
        loop {
            if let Some(change) = state.queue.pop_front() {
                return Some((Ok(change), (changes, state)));
            }
            match changes.next().await? {
                Ok(change) => state.apply(change),
                Err(error) => return Some((Err(error), (changes, state))),
            }
        }
    })
    .boxed()
}

/// What is known of the bucket, and what follows from it.
#[derive(Default)]
struct LinkResolver {
    links: Links,
    /// Documents that name a link or have patterns, by key.
    documents: BTreeMap<String, WrittenDocument>,
    /// Keys of all documents.
    written: BTreeSet<String>,
    /// Streams that were found, by key of the document with patterns.
    found: BTreeMap<String, StreamsMark>,
    /// The newest valid document, where the newest is not valid.
    kept: BTreeMap<String, Bytes>,
    /// What was delivered for `documents`.
    given: BTreeMap<String, ConfigEntry>,
    loaded: bool,
    reports: bool,
    queue: VecDeque<ConfigChange>,
}

/// A document that depends on other keys.
struct WrittenDocument {
    entry: ConfigEntry,
    /// Link that it names.
    link: Option<String>,
    /// What derived documents are made of, where it has patterns.
    family: Option<FamilyDocument>,
}

/// A document with patterns.
#[derive(Clone)]
struct FamilyDocument {
    revision: u64,
    fields: Map<String, Value>,
    patterns: StreamPatterns,
    link: Option<String>,
}

impl FamilyDocument {
    fn read(document: &Value, revision: u64) -> Option<Self> {
        let patterns = StreamPatterns::of(document)?;
        let link = config::named_link(document).map(str::to_owned);
        Some(Self { revision, fields: document.as_object()?.clone(), patterns, link })
    }
}

impl LinkResolver {
    fn apply(&mut self, change: ConfigChange) {
        match change {
            ConfigChange::Put(entry) if entry.key.starts_with(LINKS_PREFIX) => {
                let name = entry.key[LINKS_PREFIX.len()..].to_owned();
                self.links.put(&name, entry.revision, &entry.value);
                self.queue.push_back(ConfigChange::Put(entry));
                self.refresh_users(&name);
            }
            ConfigChange::Deleted { key, revision } if key.starts_with(LINKS_PREFIX) => {
                let name = key[LINKS_PREFIX.len()..].to_owned();
                self.links.remove(&name);
                self.queue.push_back(ConfigChange::Deleted { key, revision });
                self.refresh_users(&name);
            }
            ConfigChange::Put(entry) if !entry.key.starts_with(ADAPTERS_PREFIX) => self.put(entry),
            ConfigChange::Deleted { key, revision } if !key.starts_with(ADAPTERS_PREFIX) => self.delete(key, revision),
            ConfigChange::Marked(mark) => {
                self.mark(&mark);
                self.queue.push_back(ConfigChange::Marked(mark));
            }
            ConfigChange::Loaded => {
                self.loaded = true;
                let keys: Vec<_> = self.documents.keys().cloned().collect();
                keys.iter().for_each(|key| self.refresh(key));
                self.queue.push_back(ConfigChange::Loaded);
            }
            other => self.queue.push_back(other),
        }
    }

    fn mark(&mut self, mark: &Mark) {
        match (mark.kind, &mark.value) {
            (MarkKind::Streams, Some(value)) => {
                // Garbage changes nothing: the instance that lists the streams writes it again.
                let Some(found) = StreamsMark::read(value) else { return };
                self.found.insert(mark.id.clone(), found);
            }
            // Nor does a removal, while the document is there.
            (MarkKind::Streams, None) if self.documents.contains_key(&mark.id) => return,
            (MarkKind::Streams, None) => _ = self.found.remove(&mark.id),
            (MarkKind::Valid, Some(value)) => _ = self.kept.insert(mark.id.clone(), value.clone()),
            (MarkKind::Valid, None) => _ = self.kept.remove(&mark.id),
            _ => return,
        }
        self.refresh(&mark.id);
    }

    fn put(&mut self, entry: ConfigEntry) {
        let key = entry.key.clone();
        self.written.insert(key.clone());
        let before = self.documents.remove(&key);
        let json = Json::read(&entry.value).ok().map(|json| json.value).filter(Value::is_object);
        let (link, family) = match &json {
            Some(document) => {
                (config::named_link(document).map(str::to_owned), FamilyDocument::read(document, entry.revision))
            }
            // What cannot be read replaces nothing.
            None => before.as_ref().map(|before| (before.link.clone(), None)).unwrap_or_default(),
        };
        let has_patterns = json.as_ref().is_none_or(|document| document.get("streams").is_some());
        let family = family.or_else(|| before.and_then(|before| before.family).filter(|_| has_patterns));
        let is_unreadable_family = has_patterns && self.found.contains_key(&key);
        if link.is_none() && family.is_none() && !is_unreadable_family {
            self.given.remove(&key);
            self.queue.push_back(ConfigChange::Put(entry));
        } else {
            self.documents.insert(key.clone(), WrittenDocument { entry, link, family });
        }
        self.refresh(&key);
    }

    fn delete(&mut self, key: String, revision: u64) {
        self.written.remove(&key);
        self.documents.remove(&key);
        self.given.remove(&key);
        self.remove_members(&key, &BTreeSet::new(), revision);
        let is_member_of = self.documents.keys().filter(|family| key.starts_with(&format!("{family}.")));
        let families: Vec<_> = is_member_of.cloned().collect();
        self.queue.push_back(ConfigChange::Deleted { key, revision });
        families.iter().for_each(|family| self.refresh(family));
    }

    fn refresh_users(&mut self, link: &str) {
        let uses = |document: &WrittenDocument| {
            let of_family = document.family.as_ref().and_then(|family| family.link.as_deref());
            document.link.as_deref() == Some(link) || of_family == Some(link)
        };
        let users = self.documents.iter().filter(|(_, document)| uses(document)).map(|(key, _)| key.clone());
        let users: Vec<_> = users.collect();
        users.iter().for_each(|key| self.refresh(key));
    }

    fn link(&self, name: Option<&str>) -> Option<LinkUse> {
        name.map(|name| self.links.get(name))
    }

    /// Delivers what is new of a document, and of those that are derived from it.
    fn refresh(&mut self, key: &str) {
        if !self.loaded {
            return;
        }
        let Some(document) = self.documents.get(key) else {
            self.remove_members(key, &BTreeSet::new(), 0);
            return;
        };
        let entry = ConfigEntry { link: self.link(document.link.as_deref()), ..document.entry.clone() };
        let revision = entry.revision;
        let family = document.family.clone().or_else(|| {
            // After a start with a document that cannot be read: the one that ran.
            FamilyDocument::read(&Json::read(self.kept.get(key)?).ok()?.value, revision)
        });
        self.give(entry);
        let members = family.map(|family| self.members(key, &family)).unwrap_or_default();
        let keys = members.iter().map(|member| member.key.clone()).collect();
        self.remove_members(key, &keys, revision);
        members.into_iter().for_each(|member| self.give(member));
    }

    fn give(&mut self, entry: ConfigEntry) {
        if self.given.get(&entry.key) != Some(&entry) {
            self.given.insert(entry.key.clone(), entry.clone());
            self.queue.push_back(ConfigChange::Put(entry));
        }
    }

    /// The documents of the streams that were found and match.
    fn members(&self, family_id: &str, family: &FamilyDocument) -> Vec<ConfigEntry> {
        let Some(StreamsMark { streams, gone, .. }) = self.found.get(family_id) else { return Vec::new() };
        let link = self.link(family.link.as_deref());
        let all = streams.iter().map(|stream| (stream, false)).chain(gone.iter().map(|stream| (stream, true)));
        let all = all.filter(|(stream, gone)| family.patterns.matches(stream) && !(*gone && streams.contains(*stream)));
        let member = |(stream, gone): (&String, bool)| {
            let key = member_id(family_id, stream);
            if self.written.contains(&key) {
                if self.reports {
                    warn!(
                        replication = key,
                        "a document of this id is in the bucket: the one that `{family_id}` has for it is not used"
                    );
                }
                return None;
            }
            let document = Value::Object(member_document(family_id, &family.fields, stream));
            let (of, family) = (family, Some(Family { id: family_id.to_owned(), gone }));
            let value = config::compact_document(&document).into();
            Some(ConfigEntry { key, revision: of.revision, value, link: link.clone(), family })
        };
        all.filter_map(member).collect()
    }

    /// Removes derived documents that are not among `kept`.
    fn remove_members(&mut self, family_id: &str, kept: &BTreeSet<String>, revision: u64) {
        let is_member = |entry: &ConfigEntry| entry.family.as_ref().is_some_and(|family| family.id == family_id);
        let gone = self.given.values().filter(|entry| is_member(entry) && !kept.contains(&entry.key));
        let gone: Vec<_> = gone.map(|entry| entry.key.clone()).collect();
        for key in gone {
            self.given.remove(&key);
            if !self.written.contains(&key) {
                self.queue.push_back(ConfigChange::Deleted { key, revision });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn put(key: &str, revision: u64, value: Value) -> ConfigChange {
        ConfigChange::Put(ConfigEntry::new(key, revision, value.to_string().into()))
    }

    fn found(id: &str, streams: &[&str], gone: &[&str]) -> ConfigChange {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mark = StreamsMark { version: 1, streams: names(streams), gone: names(gone) };
        let value = Some(serde_json::to_vec(&mark).unwrap().into());
        ConfigChange::Marked(Mark { id: id.to_owned(), kind: MarkKind::Streams, revision: 9, value })
    }

    /// What follows from a change: the key, and the maximum age as resolved, what is wrong, or that it is deleted or gone.
    fn apply(resolver: &mut LinkResolver, change: ConfigChange) -> Vec<(String, String)> {
        resolver.apply(change);
        let shown = |change| match change {
            ConfigChange::Put(entry) if entry.key.starts_with(LINKS_PREFIX) => None,
            ConfigChange::Put(entry) => {
                let text = match entry.resolved() {
                    Ok(json) => json.value["max_age"].as_str().unwrap_or("-").to_owned(),
                    Err(problems) => problems.to_string(),
                };
                let gone = if entry.is_gone() { " gone" } else { "" };
                Some((entry.key, text + gone))
            }
            ConfigChange::Deleted { key, .. } if key.starts_with(LINKS_PREFIX) => None,
            ConfigChange::Deleted { key, .. } => Some((key, "deleted".to_owned())),
            _ => None,
        };
        resolver.queue.drain(..).filter_map(shown).collect()
    }

    #[track_caller]
    fn check(found: &[(String, String)], expect: &[(&str, &str)]) {
        assert_eq!(found.len(), expect.len(), "{found:?}");
        for ((key, text), (expect_key, expect_text)) in found.iter().zip(expect) {
            assert!(key == expect_key && text.contains(expect_text), "{found:?}");
        }
    }

    #[test]
    fn a_link_that_changes_changes_those_that_use_it() {
        let mut resolver = LinkResolver::default();
        let one = json!({"stream": "A", "link": "eu"});
        check(&apply(&mut resolver, put("A", 1, one.clone())), &[]);
        check(&apply(&mut resolver, put("B", 2, json!({"stream": "B"}))), &[("B", "-")]);
        check(&apply(&mut resolver, put("links/eu", 3, json!({"max_age": "1h"}))), &[]);
        check(&apply(&mut resolver, ConfigChange::Loaded), &[("A", "1h")]);
        check(&apply(&mut resolver, put("links/eu", 4, json!({"max_age": "2h"}))), &[("A", "2h")]);
        check(&apply(&mut resolver, put("links/eu", 5, json!({"max_age": "2h"}))), &[]);
        check(&apply(&mut resolver, put("links/us", 6, json!({"max_age": "3h"}))), &[]);
        check(&apply(&mut resolver, put("links/eu", 7, json!({"max_age": "x"}))), &[("A", "link `eu` is not valid")]);
        let deleted = ConfigChange::Deleted { key: "links/eu".to_owned(), revision: 8 };
        check(&apply(&mut resolver, deleted), &[("A", "link `eu` does not exist")]);
        check(&apply(&mut resolver, put("links/eu", 9, json!({"max_age": "4h"}))), &[("A", "4h")]);
        check(&apply(&mut resolver, put("A", 10, json!({"stream": "A"}))), &[("A", "-")]);
        check(&apply(&mut resolver, put("links/eu", 11, json!({"max_age": "5h"}))), &[]);
    }

    #[test]
    fn each_stream_that_was_found_has_a_document() {
        let mut resolver = LinkResolver::default();
        let family = |exclude: &[&str]| json!({"id": "f", "link": "eu", "streams": ["O*"], "exclude_streams": exclude});
        apply(&mut resolver, found("f", &["OA", "OB", "X"], &[]));
        apply(&mut resolver, put("f", 1, family(&[])));
        apply(&mut resolver, put("links/eu", 2, json!({"max_age": "1h"})));
        let loaded = apply(&mut resolver, ConfigChange::Loaded);
        check(&loaded, &[("f", "1h"), ("f.OA", "1h"), ("f.OB", "1h")]);
        check(&apply(&mut resolver, found("f", &["OA", "OC"], &["OB"])), &[("f.OC", "1h"), ("f.OB", "1h gone")]);
        // Excluded ones end.
        check(
            &apply(&mut resolver, put("f", 3, family(&["OC"]))),
            &[("f", "1h"), ("f.OC", "deleted"), ("f.OA", "1h"), ("f.OB", "1h gone")],
        );
        // What cannot be read replaces nothing.
        let garbage = ConfigChange::Put(ConfigEntry::new("f", 4, "{".into()));
        let after = apply(&mut resolver, garbage);
        assert_eq!(after.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["f"]);
        check(&apply(&mut resolver, put("f", 5, family(&["OC"]))), &[("f", "1h"), ("f.OA", "1h"), ("f.OB", "1h gone")]);
        // A document of the bucket takes precedence.
        check(
            &apply(&mut resolver, put("f.OA", 6, json!({"stream": "OA", "id": "f.OA", "max_age": "9h"}))),
            &[("f.OA", "9h")],
        );
        let deleted = |key: &str| ConfigChange::Deleted { key: key.to_owned(), revision: 7 };
        check(&apply(&mut resolver, deleted("f.OA")), &[("f.OA", "deleted"), ("f.OA", "1h")]);
        check(&apply(&mut resolver, deleted("f")), &[("f.OA", "deleted"), ("f.OB", "deleted"), ("f", "deleted")]);
    }

    #[test]
    fn after_a_start_an_unreadable_document_keeps_its_streams() {
        let mut resolver = LinkResolver::default();
        apply(&mut resolver, found("f", &["OA"], &[]));
        let kept = json!({"id": "f", "streams": ["O*"], "max_age": "1h"}).to_string().into();
        let kept = Mark { id: "f".to_owned(), kind: MarkKind::Valid, revision: 3, value: Some(kept) };
        apply(&mut resolver, ConfigChange::Marked(kept));
        apply(&mut resolver, ConfigChange::Put(ConfigEntry::new("f", 4, "garbage".into())));
        let loaded = apply(&mut resolver, ConfigChange::Loaded);
        assert_eq!(loaded.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["f", "f.OA"]);
        assert_eq!(loaded[1].1, "1h");
    }
}
