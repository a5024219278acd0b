//! Documents as they are shown, and as they come back.

use nats_lane::{
    MASK, Tls,
    endpoint::{is_masked, mask_url, unmask},
    server_ref::looks_like_url,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Problem, TlsDocument,
    adapters::ADAPTER,
    heartbeats::HEARTBEATS,
    links::LINK,
    schema::{REPLICATION, Schema, join},
};

/// The fields of a document that are URLs: `***` may stand for a secret there.
pub const URLS: [&str; 3] = ["source_url", "target_url", "target_leaf_url"];

/// Fields that make subjects of requests. A URL that strayed there is refused, and it is not shown where it was written
/// past the service.
const NO_URLS: [&str; 5] = ["source_domain", "target_domain", "source_api_prefix", "target_api_prefix", "collective"];

/// One kind of document: its schema, and its URLs with the fields that say with which TLS files.
struct SecretFields {
    schema: &'static Schema,
    urls: &'static [(&'static str, &'static [&'static str])],
}

fn replication() -> SecretFields {
    SecretFields {
        schema: &REPLICATION,
        urls: &[
            ("source_url", &["source_tls", "tls"]),
            ("target_url", &["target_tls", "tls"]),
            ("target_leaf_url", &["target_leaf_tls", "target_tls", "tls"]),
        ],
    }
}

fn heartbeats() -> SecretFields {
    SecretFields { schema: &HEARTBEATS, urls: &[("url", &["tls"])] }
}

/// A document without its secrets. Documents that people wrote by hand may be anything: of a field that no document
/// has (it may be a password that was written in the wrong place) no text and no number is shown.
pub fn mask_document(document: &Value) -> Value {
    replication().mask(document)
}

/// Replaces `***` in a document that came back by what is stored: the secrets in its URLs, and texts that are as they
/// were shown.
pub fn unmask_document(document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
    replication().unmask(document, stored)
}

/// Whether something in the document may stand for what is stored.
pub fn has_mask(document: &Map<String, Value>) -> bool {
    replication().has_mask(document)
}

/// The fields of a link are those of a replication.
fn link() -> SecretFields {
    SecretFields { schema: &LINK, ..replication() }
}

/// [`mask_document`] for a link.
pub fn mask_link(document: &Value) -> Value {
    link().mask(document)
}

/// [`unmask_document`] for a link.
pub fn unmask_link(document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
    link().unmask(document, stored)
}

/// [`mask_document`] for heartbeats.
pub fn mask_heartbeats(document: &Value) -> Value {
    heartbeats().mask(document)
}

/// [`unmask_document`] for heartbeats.
pub fn unmask_heartbeats(document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
    heartbeats().unmask(document, stored)
}

/// [`has_mask`] for heartbeats.
pub fn has_heartbeats_mask(document: &Map<String, Value>) -> bool {
    heartbeats().has_mask(document)
}

/// One side of an adapter; the URL and its TLS files are beside each other.
fn adapter_side() -> SecretFields {
    SecretFields { schema: &ADAPTER, urls: &[("servers", &["tls"])] }
}

/// [`mask_document`] for an adapter.
pub fn mask_adapter(document: &Value) -> Value {
    adapter_side().mask(document)
}

/// [`unmask_document`] for an adapter.
pub fn unmask_adapter(document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
    let mut problems = Vec::new();
    for side in SIDES {
        let Some(Value::Object(fields)) = document.get_mut(side) else { continue };
        let stored = stored.map(|stored| &stored[side]);
        let found = adapter_side().unmask(fields, stored).err().unwrap_or_default().into_iter();
        problems.extend(found.map(|one| Problem::new(format!("/{side}{}", one.path), one.message)));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// [`has_mask`] for an adapter.
pub fn has_adapter_mask(document: &Map<String, Value>) -> bool {
    SIDES
        .iter()
        .any(|side| document.get(*side).and_then(Value::as_object).is_some_and(|side| adapter_side().has_mask(side)))
}

/// The fields of an adapter that say where servers are.
const SIDES: [&str; 2] = ["ingest", "stream"];

impl SecretFields {
    fn is_url(&self, field: &str) -> bool {
        self.urls.iter().any(|(url, _)| *url == field)
    }

    fn mask(&self, document: &Value) -> Value {
        self.mask_as(document, &self.schema.root)
    }

    fn unmask(&self, document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
        let mut problems = Vec::new();
        if let Some(stored) = stored {
            let texts = document.iter_mut().filter(|(field, _)| !self.is_url(field));
            texts.for_each(|(field, value)| unmask_words(value, &stored[field]));
        }
        for (field, tls) in self.urls {
            let Some(url) = document.get(*field).and_then(Value::as_str) else { continue };
            let new = (url, tls_files(|name| document.get(name), tls));
            let stored = stored.and_then(|stored| {
                let url = stored[field].as_str()?;
                Some((url, tls_files(|name| stored.get(name), tls)))
            });
            match unmask(new, stored) {
                Ok(unmasked) => _ = document.insert((*field).to_owned(), unmasked.into()),
                Err(error) => problems.push(Problem::new(join("", field), format!("`{field}`: {error}"))),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn has_mask(&self, document: &Map<String, Value>) -> bool {
        document.iter().any(|(field, value)| match value {
            Value::String(url) if self.is_url(field) => is_masked(url),
            value => has_masked_words(value),
        })
    }

    /// Masks a value by the schema of its field; that of an unknown field is `null`.
    fn mask_as(&self, value: &Value, schema: &Value) -> Value {
        match value {
            Value::String(text) if schema["type"] == "string" => Value::String(mask_words(text)),
            Value::String(text) if text.contains('@') || text.contains("://") => Value::String(mask_url(text)),
            Value::Number(_) if schema["type"] != "integer" && schema["type"][0] != "integer" => {
                Value::String(MASK.to_owned())
            }
            Value::String(_) => Value::String(MASK.to_owned()),
            Value::Array(values) => {
                let each = |value| self.mask_as(value, self.schema.part(schema, ""));
                Value::Array(values.iter().map(each).collect())
            }
            Value::Object(fields) => {
                let each = |(field, value): (&String, &Value)| {
                    let masked = match (self.schema.part(schema, field), value) {
                        (known, Value::String(url)) if known.is_object() && self.is_url(field) => mask_url(url).into(),
                        (_, Value::String(text)) if NO_URLS.contains(&field.as_str()) && looks_like_url(text) => {
                            MASK.into()
                        }
                        (known, value) => self.mask_as(value, known),
                    };
                    (field.clone(), masked)
                };
                Value::Object(fields.iter().map(each).collect())
            }
            Value::Number(_) | Value::Bool(_) | Value::Null => value.clone(),
        }
    }
}

/// The TLS files that a URL goes with: those of the first of these fields that is there.
fn tls_files<'a>(field: impl Fn(&str) -> Option<&'a Value>, names: &[&str]) -> Tls {
    let files = names.iter().find_map(|name| {
        // What cannot be read is refused with the document.
        Option::<TlsDocument>::deserialize(field(name)?).ok().flatten()
    });
    let TlsDocument { ca, cert, key } = files.unwrap_or_default();
    Tls { ca, cert, key, ..Tls::default() }
}

fn unmask_words(value: &mut Value, stored: &Value) {
    match (value, stored) {
        (Value::String(text), Value::String(stored)) if *text == mask_words(stored) => text.clone_from(stored),
        (Value::Object(fields), stored) => {
            fields.iter_mut().for_each(|(name, value)| unmask_words(value, &stored[name]))
        }
        (Value::Array(values), Value::Array(stored)) => {
            values.iter_mut().zip(stored).for_each(|(value, stored)| unmask_words(value, stored));
        }
        _ => {}
    }
}

fn has_masked_words(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains(MASK),
        Value::Object(fields) => fields.values().any(has_masked_words),
        Value::Array(values) => values.iter().any(has_masked_words),
        _ => false,
    }
}

/// A text that is no URL, where `@` means nothing by itself; a URL that strayed into it loses its secret all the
/// same.
fn mask_words(text: &str) -> String {
    let words = text.split_inclusive(char::is_whitespace).map(|word| {
        let is_url = word.split_once("://").is_some_and(|(_, rest)| rest.contains('@'));
        let (word, blank) = word.split_at(word.trim_end().len());
        if is_url { mask_url(word) + blank } else { format!("{word}{blank}") }
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_masked_wherever_they_are() {
        let check = |document: Value, expect: Value| assert_eq!(mask_document(&document), expect);
        check(
            json!({"stream": "S", "source_url": "nats://u:p@h", "target_url": "token@h", "description": "ask a@b"}),
            json!({"stream": "S", "source_url": "nats://u:***@h", "target_url": "***@h", "description": "ask a@b"}),
        );
        check(json!({"sorce_url": "nats://u:p@h"}), json!({"sorce_url": "nats://u:***@h"}));
        check(json!({"tls": "p", "limits": "p"}), json!({"tls": "***", "limits": "***"}));
        check(json!({"password": 53, "x": {"y": ["p", 5]}}), json!({"password": "***", "x": {"y": ["***", "***"]}}));
        check(
            json!({"limits": {"messages_in_flight": 5, "pin": 5}}),
            json!({"limits": {"messages_in_flight": 5, "pin": "***"}}),
        );
        check(json!({"start_sequence": 5, "name": 5}), json!({"start_sequence": 5, "name": "***"}));
        check(json!({"ephemeral": true, "x": [false, null]}), json!({"ephemeral": true, "x": [false, null]}));
        check(
            json!({"limits": {"x": ["u:p@h"]}, "source_url": ["p@h"]}),
            json!({"limits": {"x": ["u:***@h"]}, "source_url": ["***@h"]}),
        );
        check(json!("nats://u:p@h:x"), json!("nats://***@h:x"));
        check(json!({"stream": "nats://u:p@h"}), json!({"stream": "nats://u:***@h"}));
        check(
            json!({"description": "from\nnats://u:p@h by a@b, see https://c/d"}),
            json!({"description": "from\nnats://u:***@h by a@b, see https://c/d"}),
        );
        check(json!({"tls": {"ca": "/a@b", "x": "p@h"}}), json!({"tls": {"ca": "/a@b", "x": "***@h"}}));
        check(json!({"filter_subject": "a@b.>"}), json!({"filter_subject": "a@b.>"}));
        check(
            json!({"source_domain": "u:p", "target_domain": "hub", "source_api_prefix": "p@h", "target_api_prefix": "a.b"}),
            json!({"source_domain": "***", "target_domain": "hub", "source_api_prefix": "***", "target_api_prefix": "a.b"}),
        );
        check(
            json!({"filter_subjects": ["a.>", 5], "subject_transforms": [{"src": "a", "dest": "b", "x": "p"}]}),
            json!({"filter_subjects": ["a.>", "***"], "subject_transforms": [{"src": "a", "dest": "b", "x": "***"}]}),
        );
        check(json!(53), json!("***"));
    }

    #[test]
    fn masked_heartbeats_come_back_with_their_secrets() {
        let stored = json!({
            "url": "nats://u:p@h", "headers": {"X-Site": "a@b", "X-Url": "nats://u:p@h"},
            "subjects": [{"subject": "a", "headers": {"X-Url": "nats://u:p@h"}}], "tls": {"ca": "/ca"}
        });
        let shown = mask_heartbeats(&stored);
        let expect = json!({
            "url": "nats://u:***@h", "headers": {"X-Site": "a@b", "X-Url": "nats://u:***@h"},
            "subjects": [{"subject": "a", "headers": {"X-Url": "nats://u:***@h"}}], "tls": {"ca": "/ca"}
        });
        assert_eq!(shown, expect);
        let mut back = shown.clone();
        assert!(has_heartbeats_mask(back.as_object().unwrap()));
        unmask_heartbeats(back.as_object_mut().unwrap(), Some(&stored)).unwrap();
        assert_eq!(back, stored);
        let mut elsewhere = shown;
        elsewhere["tls"] = json!({});
        let problems = unmask_heartbeats(elsewhere.as_object_mut().unwrap(), Some(&stored)).unwrap_err();
        assert_eq!(problems[0].path, "/url", "{problems:?}");
        let garbage = json!({"password": "p", "subjects": ["p", {"pin": 5}], "choria": {"seed": "p"}});
        let expect = json!({"password": "***", "subjects": ["***", {"pin": "***"}], "choria": {"seed": "***"}});
        assert_eq!(mask_heartbeats(&garbage), expect);
    }

    #[test]
    fn a_document_comes_back_as_it_was() {
        let stored = json!({"stream": "S", "source_url": "nats://u:p@h", "target_url": "nats://h"});
        let mut back = mask_document(&stored);
        unmask_document(back.as_object_mut().unwrap(), Some(&stored)).unwrap();
        assert_eq!(back, stored);
        let mut back = mask_document(&stored);
        let problems = unmask_document(back.as_object_mut().unwrap(), None).unwrap_err();
        assert_eq!(problems[0].path, "/source_url");
    }

    #[test]
    fn a_text_that_comes_back_as_it_was_shown_is_kept() {
        let stored = json!({
            "stream": "S", "source_url": "nats://h", "description": "see https://chat/@ops or nats://u:p@h",
            "tls": {"ca": "/x://y@z"}
        });
        let shown = mask_document(&stored);
        assert_eq!(shown["description"], "see https://***@ops or nats://u:***@h");
        let mut back = shown.clone();
        assert!(has_mask(back.as_object().unwrap()));
        unmask_document(back.as_object_mut().unwrap(), Some(&stored)).unwrap();
        assert_eq!(back, stored);
        let mut changed = shown;
        changed["description"] = "***, by hand".into();
        let expect = changed["description"].clone();
        unmask_document(changed.as_object_mut().unwrap(), Some(&stored)).unwrap();
        assert_eq!(changed["description"], expect);
        assert!(!has_mask(stored.as_object().unwrap()));
    }

    #[test]
    fn a_stored_secret_does_not_leave_its_tls() {
        let document = |url: &str, fields: Value| {
            let mut document = json!({"stream": "S", "target_url": url});
            document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            document
        };
        let check = |stored: (&str, Value), new: (&str, Value), allowed: bool| {
            let (stored, mut new) = (
                document(&format!("nats://u:p@{}", stored.0), stored.1),
                document(&format!("nats://u:***@{}", new.0), new.1),
            );
            let text = new.to_string();
            match unmask_document(new.as_object_mut().unwrap(), Some(&stored)) {
                Ok(()) => assert!(allowed && new["target_url"].as_str().unwrap().contains("u:p@"), "{text}"),
                Err(problems) => {
                    assert!(!allowed && problems[0].path == "/target_url", "{text}");
                    assert!(problems[0].message.contains("only with the TLS"), "{text}: {problems:?}");
                }
            }
        };
        let none = json!({});
        let ca = json!({"tls": {"ca": "/ca"}});
        check(("h", ca.clone()), ("h", ca.clone()), true);
        check(("h", ca.clone()), ("h?connect_timeout=1s", ca.clone()), true);
        check(("h", ca.clone()), ("h", json!({"target_tls": {"ca": "/ca"}})), true);
        check(("h", none.clone()), ("h", ca.clone()), true);
        check(("h", ca.clone()), ("h", none.clone()), false);
        check(("h", ca.clone()), ("h?connect_timeout=1s", none.clone()), false);
        check(("h", ca.clone()), ("h", json!({"tls": {"ca": "/mine"}})), false);
        check(("h", ca.clone()), ("h", json!({"tls": {"ca": "/ca"}, "target_tls": {}})), false);
        check(("h", ca.clone()), ("h", json!({"tls": {"ca": "/ca"}, "source_tls": {}})), true);
        check(("h", ca), ("h?tls_handshake_first", none.clone()), false);
        check(("h?tls_handshake_first", none.clone()), ("h", none.clone()), false);
        check(("h", json!({"target_tls": {"cert": "/c", "key": "/k"}})), ("h", none), false);
    }
}
