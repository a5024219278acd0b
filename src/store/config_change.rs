//! What a watch of the configuration bucket delivers.

use bytes::Bytes;

use super::{bucket::Stored, marks::Mark};
use crate::{
    allow::AllowList,
    config::{self, Json, LinkUse, Problem, Problems, Replication},
};

/// One revision of a document as it is in the bucket. Buckets can be edited by hand: it may be anything.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigEntry {
    /// The key.
    pub key: String,
    /// Revision of the key.
    pub revision: u64,
    /// The document as written; of a stream that a document with patterns has found, what it makes for this stream.
    pub value: Bytes,
    /// The link that the document names, as it is now.
    pub link: Option<LinkUse>,
    /// Where it comes from, if it is not in the bucket itself.
    pub family: Option<Family>,
}

/// Which document with patterns a document was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// Its key.
    pub id: String,
    /// Whether the source no longer has the stream.
    pub gone: bool,
}

impl ConfigEntry {
    /// A document that is as written.
    pub fn new(key: impl Into<String>, revision: u64, value: Bytes) -> Self {
        Self { key: key.into(), revision, value, link: None, family: None }
    }

    /// The document with the fields of its link, and what is wrong with its text.
    pub fn resolved(&self) -> Result<Json, Problems> {
        let json = Json::read(&self.value)?;
        match config::resolve(&json.value, self.link.as_ref()) {
            Ok(value) => Ok(Json { value, ..json }),
            Err(problems) => json.checked(Err(problems)),
        }
    }

    /// What runs.
    pub fn replication(&self, rules: &AllowList, site: &str) -> Result<Replication, Problems> {
        let parsed = self.resolved().and_then(|json| {
            let parsed = rules.parse_value(&json.value, site);
            json.checked(parsed)
        });
        let linked = self.link.is_some();
        parsed.map(|replication| Replication { linked, ..replication }).map_err(Problems::bounded)
    }

    /// [`Self::replication`], if it is the one of this key.
    pub fn accept(&self, rules: &AllowList, site: &str) -> Result<Replication, Problems> {
        let replication = self.replication(rules, site)?;
        if replication.id == self.key {
            return Ok(replication);
        }
        let message =
            format!("the document is that of replication `{}`, but its key is `{}`", replication.id, self.key);
        Err(Problems(vec![Problem { path: String::new(), message }]))
    }

    /// Whether the source no longer has its stream.
    pub fn is_gone(&self) -> bool {
        self.family.as_ref().is_some_and(|family| family.gone)
    }
}

/// What the watch reports.
#[derive(Debug, Clone, PartialEq)]
pub enum ConfigChange {
    /// A document was written, or was there when the watch began.
    Put(ConfigEntry),
    /// A document was deleted or purged.
    Deleted {
        /// The key.
        key: String,
        /// Revision of the deletion.
        revision: u64,
    },
    /// The heartbeats were written or removed, or were there when the watch began.
    Heartbeats(Stored),
    /// The record of the site was written or removed, or was there when the watch began.
    Site(Stored),
    /// A mark was put, changed or removed, or was there when the watch began.
    Marked(Mark),
    /// The bucket was recreated, or restored: revisions start again. What differs follows.
    Recreated,
    /// Everything that was there when the watch began has been delivered.
    Loaded,
}
