//! `config add --template`: a document to fill in, made from the schema.

use serde_json::{Map, Value, json};

use super::yaml;
use crate::config::replication_schema;

/// Longest line of a description.
const WIDTH: usize = 110;

/// A document in YAML with these fields, and with every other field as a comment that shows its default or an example.
pub(super) fn template(given: &Map<String, Value>) -> String {
    let schema = replication_schema();
    let mut text = "## A replication: fill it in, then `stream-replicator config add FILE`.\n".to_owned();
    text += "## Remove the `#` in front of what you need. What is shown there is the default, or an example.\n";
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        text += "\n";
        for line in wrapped(field["description"].as_str().unwrap_or_default()) {
            text += &format!("## {line}\n");
        }
        let value = given.get(name).cloned().or_else(|| example(schema, field)).unwrap_or_else(|| "".into());
        let lines = yaml::write(&json!({ name: value }));
        let mark = if given.contains_key(name) { "" } else { "# " };
        lines.lines().for_each(|line| text += &format!("{mark}{line}\n"));
    }
    text
}

/// What a document has at least.
pub(super) fn required() -> Map<String, Value> {
    let schema = replication_schema();
    let fields = ["stream", "source_url", "target_url"].into_iter();
    fields.filter_map(|name| Some((name.to_owned(), example(schema, &schema["properties"][name])?))).collect()
}

/// The default of a field, else an example.
fn example(schema: &Value, field: &Value) -> Option<Value> {
    let definition = field["$ref"].as_str().and_then(|to| schema.pointer(to.strip_prefix('#')?));
    let field = definition.unwrap_or(field);
    if let Some(value) = field.get("default").or_else(|| field["examples"].get(0)) {
        return Some(value.clone());
    }
    if let Some(fields) = field["properties"].as_object() {
        let examples = fields.iter().filter_map(|(name, field)| Some((name.clone(), example(schema, field)?)));
        return Some(Value::Object(examples.collect()));
    }
    if field["type"] == "array" {
        return Some(json!([example(schema, &field["items"])?]));
    }
    field["enum"].as_array()?.iter().find(|choice| **choice != "").cloned()
}

fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        if !lines[last].is_empty() && lines[last].len() + word.len() >= WIDTH {
            lines.push(word.to_owned());
        } else {
            let blank = if lines[last].is_empty() { "" } else { " " };
            lines[last] += blank;
            lines[last] += word;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Value {
        let value: yaml_serde::Value = yaml_serde::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn a_template_is_a_document_that_names_every_field() {
        let text = template(&required());
        let document = read(&text);
        assert_eq!(document["stream"], "ORDERS");
        assert!(crate::config::parse_value(&document, "SITE").is_ok(), "{text}");
        let lines = text.lines().filter(|line| !line.starts_with("##"));
        let all: Vec<_> = lines.map(|line| line.strip_prefix("# ").unwrap_or(line)).collect();
        let all = read(&all.join("\n"));
        for name in replication_schema()["properties"].as_object().unwrap().keys() {
            assert!(all.get(name).is_some(), "{name} is not in {text}");
        }
        assert_eq!((all["limits"].is_object(), &all["on_reject"]), (true, &json!("hold")), "{all}");
        assert!(all["tls"]["ca"].is_string(), "{all}");
        assert!(text.lines().all(|line| line.len() <= WIDTH + 3 || !line.starts_with("##")), "{text}");
    }

    #[test]
    fn given_fields_are_filled_in() {
        let given = json!({"link": "eu", "streams": ["S*"]});
        assert_eq!(read(&template(given.as_object().unwrap())), given);
    }
}
