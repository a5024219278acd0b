//! The key `site` of the configuration bucket: which site these buckets belong to.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    config::{ConfigStore, WriteError},
    error::Error,
};
use crate::names::{self, SITE_KEY};

/// Value of the key. Readable JSON; fields that this version does not know are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// Format of the record: 1.
    pub version: u32,
    /// Name of the site.
    pub name: String,
    /// Names that it had before, oldest first: copies that were made under them count as its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<String>,
    /// Fields of other versions.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// The content of the key, and its revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SiteKey {
    /// Nothing.
    Missing,
    /// A record.
    Record(SiteRecord, u64),
    /// Something else; the text says what is wrong with it.
    Unreadable(String, u64),
}

impl SiteRecord {
    /// A site that always had this name.
    pub fn new(name: &str) -> Self {
        Self { version: 1, name: name.to_owned(), former: Vec::new(), other: BTreeMap::new() }
    }

    /// Reads a value; people edit it, so an error says what would be right.
    pub fn parse(value: &[u8]) -> Result<Self, String> {
        let right = r#"it must be JSON such as `{"version": 1, "name": "EAST", "former": []}`"#;
        let record: Self = serde_json::from_slice(value).map_err(|error| {
            let error = error.to_string();
            // Without the value that the parser quotes: it may be a secret that was put in the wrong key.
            let ends = error.find('"').zip(error.rfind('"'));
            let error =
                ends.map_or(error.clone(), |(from, to)| format!("{}\"...\"{}", &error[..from], &error[to + 1..]));
            format!("{error}; {right}")
        })?;
        for name in record.former.iter().chain([&record.name]) {
            names::check_token(name)
                .map_err(|right| format!("`{name}` is not the name of a site: it must be {right}"))?;
        }
        Ok(record)
    }

    /// The same site under another name.
    pub fn renamed(&self, name: &str) -> Self {
        let mut record = self.clone();
        record.former.push(std::mem::replace(&mut record.name, name.to_owned()));
        record.former.retain(|former| former != name);
        record
    }

    /// As it is written.
    pub fn value(&self) -> Bytes {
        // Text, numbers and what was read as JSON: this cannot fail.
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}

impl ConfigStore {
    /// What is at the key, read from the leader of the bucket.
    pub async fn site(&self) -> Result<SiteKey, Error> {
        let Some(entry) = self.get(SITE_KEY).await? else { return Ok(SiteKey::Missing) };
        Ok(match SiteRecord::parse(&entry.value) {
            Ok(record) => SiteKey::Record(record, entry.revision),
            Err(why) => SiteKey::Unreadable(why, entry.revision),
        })
    }

    /// What is at the key; where there was nothing, this record. Of several that write at once one wins.
    pub async fn claim_site(&self, record: &SiteRecord) -> Result<SiteKey, Error> {
        match self.site().await? {
            SiteKey::Missing => match self.create(SITE_KEY, record.value()).await {
                Ok(revision) => Ok(SiteKey::Record(record.clone(), revision)),
                Err(WriteError::Store(error)) => Err(error),
                Err(_) => self.site().await,
            },
            found => Ok(found),
        }
    }

    /// Writes the record if the key is at `expected` (0: nothing is there).
    pub async fn put_site(&self, record: &SiteRecord, expected: u64) -> Result<u64, WriteError> {
        self.put(SITE_KEY, record.value(), Some(expected)).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_renamed_site_keeps_its_former_names_and_unknown_fields() {
        let written = json!({"version": 2, "name": "ONE", "former": ["ZERO"], "later": {"x": 1}});
        let record = SiteRecord::parse(written.to_string().as_bytes()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&record.value()).unwrap(), written);
        let two = record.renamed("TWO");
        let expect = json!({"version": 2, "name": "TWO", "former": ["ZERO", "ONE"], "later": {"x": 1}});
        assert_eq!(serde_json::from_slice::<Value>(&two.value()).unwrap(), expect);
        assert_eq!(two.renamed("ONE").former, ["ZERO", "TWO"]);
    }

    #[test]
    fn a_record_that_cannot_be_read_says_what_would_be_right() {
        for (value, expect) in [
            ("", "it must be JSON such as"),
            ("TWO", "it must be JSON such as"),
            (r#"{"name": "TWO"}"#, "missing field `version`"),
            (r#"{"version": 1, "name": "TWO", "name": "ONE"}"#, "duplicate field `name`"),
            (r#"{"version": "nats://u:hunter2@h", "name": "TWO"}"#, "invalid type: string \"...\", expected u32"),
            (r#"{"version": 1, "name": "a.b"}"#, "`a.b` is not the name of a site"),
            (r#"{"version": 1, "name": "a", "former": [""]}"#, "`` is not the name of a site"),
            (r#"{"stream": "site", "source_url": "a", "target_url": "b"}"#, "missing field `version`"),
        ] {
            let error = SiteRecord::parse(value.as_bytes()).unwrap_err();
            assert!(error.contains(expect), "{value}: {error}");
        }
    }
}
