//! `path=value` of a command line: what becomes of a field of a document.

use serde_json::{Map, Value};

use crate::config::field_type;

/// One field and its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Assignment {
    path: Vec<String>,
    /// `None` removes the field.
    value: Option<Value>,
}

/// Parses `limits.messages_in_flight=500`. What the schema says of the field decides how the value is read: a text as it
/// is, a list also as its entries with commas between them, everything else as JSON. Without a value the field is removed.
pub(super) fn parse_assignment(text: &str) -> Result<Assignment, String> {
    let Some((path, value)) = text.split_once('=') else {
        return Err("write it as `path=value`, such as `limits.messages_in_flight=500`".to_owned());
    };
    let path: Vec<String> = path.trim_start_matches('/').split(['.', '/']).map(str::to_owned).collect();
    if path.iter().any(String::is_empty) {
        return Err("the path before `=` has an empty part".to_owned());
    }
    let parts: Vec<&str> = path.iter().map(String::as_str).collect();
    let value = match (field_type(&parts), value) {
        (_, "") => None,
        (Some("string"), text) => Some(text.into()),
        (Some("array"), list) if !list.starts_with('[') => Some(list.split(',').collect()),
        (_, text) => Some(serde_json::from_str(text).unwrap_or_else(|_| text.into())),
    };
    Ok(Assignment { path, value })
}

impl Assignment {
    /// Makes the change in a document. Objects on the way to a new field are added; the error names the part of the path
    /// that is something else.
    pub(super) fn apply(&self, document: &mut Value) -> Result<(), String> {
        let (last, parents) = self.path.split_last().ok_or("the path is empty")?;
        let mut at = document;
        for (index, part) in parents.iter().enumerate() {
            at = child(at, part).ok_or_else(|| self.wrong(&self.path[..index], part))?;
        }
        match (at, &self.value) {
            (Value::Object(fields), Some(value)) => drop(fields.insert(last.clone(), value.clone())),
            (Value::Object(fields), None) => drop(fields.remove(last)),
            (Value::Array(list), value) => match (last.parse::<usize>(), value) {
                (Ok(index), Some(value)) if index < list.len() => list[index] = value.clone(),
                (Ok(index), Some(value)) if index == list.len() => list.push(value.clone()),
                (Ok(index), None) if index < list.len() => drop(list.remove(index)),
                _ => return Err(self.wrong(parents, last)),
            },
            _ => return Err(self.wrong(parents, last)),
        }
        Ok(())
    }

    fn wrong(&self, parents: &[String], part: &str) -> String {
        let (path, parent) = (self.path.join("."), parents.join("."));
        format!("`{path}`: `{parent}` has no part `{part}`: it is neither an object nor a list that long")
    }
}

fn child<'a>(at: &'a mut Value, part: &str) -> Option<&'a mut Value> {
    match at {
        Value::Object(fields) => Some(fields.entry(part).or_insert_with(|| Map::new().into())),
        Value::Array(list) => list.get_mut(part.parse::<usize>().ok()?),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_is_read_as_the_schema_says() {
        let check = |text: &str, expect: Value| {
            let mut document = json!({});
            parse_assignment(text).unwrap().apply(&mut document).unwrap();
            assert_eq!(document, expect, "{text}");
        };
        check("max_age=1h", json!({"max_age": "1h"}));
        check("description=5", json!({"description": "5"}));
        check("description=a=b", json!({"description": "a=b"}));
        check("start_at_end=true", json!({"start_at_end": true}));
        check("limits.messages_in_flight=500", json!({"limits": {"messages_in_flight": 500}}));
        check("/limits/messages_in_flight=500", json!({"limits": {"messages_in_flight": 500}}));
        check("filter_subjects=a.>,b", json!({"filter_subjects": ["a.>", "b"]}));
        check("filter_subjects=[\"a,b\"]", json!({"filter_subjects": ["a,b"]}));
        check("unknown=x", json!({"unknown": "x"}));
    }

    #[test]
    fn fields_and_entries_are_changed_and_removed() {
        let check = |text: &str, expect: Result<Value, &str>| {
            let mut document = json!({"a": {"b": 1}, "list": [{"src": "x"}], "text": "t"});
            let applied = parse_assignment(text).unwrap().apply(&mut document).map(|()| document);
            match (applied, expect) {
                (Ok(found), Ok(expect)) => assert_eq!(found, expect, "{text}"),
                (Err(found), Err(expect)) => assert!(found.contains(expect), "{text}: {found}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        };
        check("a.b=", Ok(json!({"a": {}, "list": [{"src": "x"}], "text": "t"})));
        check("list.0.src=y", Ok(json!({"a": {"b": 1}, "list": [{"src": "y"}], "text": "t"})));
        check("list.1={\"src\":\"z\"}", Ok(json!({"a": {"b": 1}, "list": [{"src": "x"}, {"src": "z"}], "text": "t"})));
        check("list.0=", Ok(json!({"a": {"b": 1}, "list": [], "text": "t"})));
        check("list.5=1", Err("`list.5`: `list` has no part `5`"));
        check("text.x=1", Err("`text.x`: `text` has no part `x`"));
        check("list.7.src=1", Err("`list.7.src`: `list` has no part `7`"));
        for wrong in ["no-value", "=5", "a..b=5"] {
            assert!(parse_assignment(wrong).is_err(), "{wrong}");
        }
    }
}
