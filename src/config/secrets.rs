//! Documents as they are shown, and as they come back.

use serde_json::{Map, Value};

use super::{
    Problem,
    endpoint::{MASK, is_masked, mask_url, unmask},
    schema::{join, replication_schema},
};

/// The fields of a document that are URLs: `***` may stand for a secret there.
pub const URLS: [&str; 2] = ["source_url", "target_url"];

/// A document without its secrets. Documents that people wrote by hand may be anything: of a field that no document
/// has (it may be a password that somebody thought to belong here) no text is shown.
pub fn mask_document(document: &Value) -> Value {
    match document {
        Value::Object(fields) => Value::Object(fields.iter().map(mask_field).collect()),
        other => mask_anywhere(other),
    }
}

/// Replaces `***` in the URLs of a document that came back by what is stored.
pub fn unmask_document(document: &mut Map<String, Value>, stored: Option<&Value>) -> Result<(), Vec<Problem>> {
    let mut problems = Vec::new();
    for field in URLS {
        let Some(Value::String(url)) = document.get_mut(field) else { continue };
        let stored = stored.and_then(|stored| stored[field].as_str());
        match unmask(url, stored) {
            Ok(unmasked) => *url = unmasked,
            Err(error) => problems.push(Problem::new(join("", field), format!("`{field}`: {error}"))),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Whether a URL of the document has `***` in the place of a secret.
pub fn has_mask(document: &Map<String, Value>) -> bool {
    URLS.iter().any(|field| document.get(*field).and_then(Value::as_str).is_some_and(is_masked))
}

fn mask_field((field, value): (&String, &Value)) -> (String, Value) {
    let schema = replication_schema();
    let known = schema["properties"].get(field);
    let is_tls = known.is_some_and(|property| property.get("$ref").is_some());
    let masked = match value {
        Value::String(url) if URLS.contains(&field.as_str()) => Value::String(mask_url(url)),
        Value::String(text) if known.is_some_and(|property| property["type"] == "string") => {
            Value::String(mask_words(text))
        }
        Value::Object(files) if is_tls => {
            let masked = files.iter().map(|(name, file)| match file {
                Value::String(path) if schema["$defs"]["tls"]["properties"].get(name).is_some() => {
                    (name.clone(), Value::String(mask_words(path)))
                }
                other => (name.clone(), mask_anywhere(other)),
            });
            Value::Object(masked.collect())
        }
        other => mask_anywhere(other),
    };
    (field.clone(), masked)
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

fn mask_anywhere(value: &Value) -> Value {
    match value {
        Value::String(text) if text.contains('@') || text.contains("://") => Value::String(mask_url(text)),
        Value::String(_) => Value::String(MASK.to_owned()),
        Value::Array(values) => Value::Array(values.iter().map(mask_anywhere).collect()),
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(field, value)| (field.clone(), mask_anywhere(value))).collect())
        }
        other => other.clone(),
    }
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
        check(json!({"password": "p", "x": {"y": ["p", 5]}}), json!({"password": "***", "x": {"y": ["***", 5]}}));
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
        check(json!(5), json!(5));
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
}
