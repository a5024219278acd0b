//! `docs/configuration.md`, made from `schemas/replication.json`.

use std::fmt::{self, Write as _};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::schemas::is_current;
use crate::harness::wire;

const INTRODUCTION: &str = "\
# Configuration

<!-- Made from schemas/replication.json by `make generate`. -->

A replication is one JSON document: the stream, its source and its target. Send it to the service with
`stream-replicator config add FILE` or `nats req replicator.config.add`, see [requests](requests.md). It is stored in the bucket
`REPLICATOR_CONFIG` under its id: its `id`, else `STREAM`, or `STREAM.NAME` if it has a name that is not the site's.

```console
$ stream-replicator config add orders.json
$ stream-replicator config validate orders.json
$ nats kv get REPLICATOR_CONFIG ORDERS --raw
```

";

/// What a schema says of one field.
#[derive(Deserialize)]
struct Field {
    #[serde(rename = "$ref")]
    reference: Option<String>,
    title: Option<String>,
    description: Option<String>,
    #[serde(rename = "type", default)]
    kind: Value,
    #[serde(rename = "enum", default)]
    values: Vec<Value>,
    default: Option<Value>,
    #[serde(default)]
    examples: Vec<Value>,
    #[serde(default)]
    required: Vec<String>,
    #[serde(default)]
    properties: Fields,
    items: Option<Box<Field>>,
    pattern: Option<String>,
    #[serde(rename = "minLength")]
    min_length: Option<u64>,
    #[serde(rename = "maxLength")]
    max_length: Option<u64>,
    minimum: Option<i64>,
    maximum: Option<i64>,
    #[serde(rename = "minItems")]
    min_items: Option<u64>,
    #[serde(rename = "maxItems")]
    max_items: Option<u64>,
    #[serde(rename = "$defs", default)]
    definitions: Fields,
}

/// Fields in the order in which the file has them.
#[derive(Default)]
struct Fields(Vec<(String, Field)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("fields")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[test]
fn current_configuration_reference_is_in_the_docs() -> Result<()> {
    let schema = read()?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    is_current(&page, &reference(&schema)?)
}

#[test]
fn the_configuration_reference_tells_of_every_field() -> Result<()> {
    let schema = read()?;
    let page = reference(&schema)?;
    ensure!(schema.properties.0.len() > 15);
    for (name, field) in &schema.properties.0 {
        ensure!(page.matches(&format!("\n### `{name}`\n")).count() == 1, "`{name}`");
        for (inner, _) in &schema.resolve(field)?.properties.0 {
            ensure!(page.contains(&format!("\n| `{name}.{inner}` |")), "`{name}.{inner}`");
        }
    }
    Ok(())
}

fn read() -> Result<Field> {
    Ok(serde_json::from_str(&std::fs::read_to_string(wire::folder().join("replication.json"))?)?)
}

/// The whole page.
fn reference(schema: &Field) -> Result<String> {
    let mut page = INTRODUCTION.to_owned();
    writeln!(page, "{}\n", text(schema.description.as_deref().unwrap_or_default()))?;
    for example in &schema.examples {
        writeln!(page, "```json\n{}\n```\n", serde_json::to_string_pretty(example)?)?;
    }
    writeln!(page, "## Fields\n")?;
    for (name, field) in &schema.properties.0 {
        section(&mut page, schema, name, field)?;
    }
    page.truncate(page.trim_end().len());
    page.push('\n');
    Ok(page)
}

fn section(page: &mut String, schema: &Field, name: &str, field: &Field) -> Result<()> {
    let shape = schema.resolve(field)?;
    let (says, default) = field.says();
    writeln!(page, "### `{name}`\n\n**{}.** {says}\n", field.title.as_deref().unwrap_or(name))?;
    writeln!(page, "* Type: {}", shape.shape(schema)?)?;
    if let Some(default) = default {
        writeln!(page, "* Default: {default}")?;
    }
    let examples = if field.examples.is_empty() { &shape.examples } else { &field.examples };
    for example in examples {
        writeln!(page, "* Example: `{example}`")?;
    }
    // Fields of an object, or of the objects in a list.
    let item = shape.items.as_deref().map(|item| schema.resolve(item)).transpose()?;
    let (inner, step) = item.map_or((shape, ""), |item| (item, "[]"));
    if !inner.properties.0.is_empty() {
        writeln!(page, "\n| field | type | default | |\n|---|---|---|---|")?;
    }
    for (inner_name, field) in &inner.properties.0 {
        let shape = schema.resolve(field)?.shape(schema)?.replace('|', "\\|");
        let (says, default) = field.says();
        let required = inner.required.iter().any(|required| required == inner_name);
        let default = if required { "required".to_owned() } else { default.unwrap_or_default() };
        writeln!(page, "| `{name}{step}.{inner_name}` | {shape} | {default} | {says} |")?;
    }
    page.push('\n');
    Ok(())
}

impl Field {
    /// The field itself, or what it refers to in the definitions of this schema.
    fn resolve<'a>(&'a self, field: &'a Field) -> Result<&'a Field> {
        let Some(reference) = &field.reference else { return Ok(field) };
        let name = reference.strip_prefix("#/$defs/").with_context(|| format!("`{reference}` is not in $defs"))?;
        let found = self.definitions.0.iter().find(|(definition, _)| definition == name);
        Ok(&found.with_context(|| format!("`{reference}` does not exist"))?.1)
    }

    /// Description and default, the latter from the words behind `Default:`, which say it better, or from the schema.
    fn says(&self) -> (String, Option<String>) {
        let description = self.description.as_deref().unwrap_or_default();
        match description.split_once("Default: ") {
            Some((says, default)) => (text(says.trim_end()), Some(text(default.trim_end_matches('.')))),
            None => (text(description), self.default.as_ref().map(|value| format!("`{value}`"))),
        }
    }

    /// Type and bounds in words.
    fn shape(&self, schema: &Field) -> Result<String> {
        let kinds: Vec<&str> = match &self.kind {
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
            kind => kind.as_str().into_iter().collect(),
        };
        let mut words: Vec<_> = kinds.into_iter().map(kind_in_words).collect();
        if !self.values.is_empty() {
            // An empty text is as good as none.
            let values: Vec<_> =
                self.values.iter().filter(|value| *value != "").map(|value| format!("`{value}`")).collect();
            words = vec![format!("one of {}", values.join(", "))];
        }
        let mut shape = words.join(" or ");
        if let Some(item) = &self.items {
            write!(shape, " of: {}", schema.resolve(item)?.shape(schema)?)?;
        }
        let bounds = [
            between(self.min_length.map(u64::cast_signed), self.max_length.map(u64::cast_signed), " characters"),
            between(self.minimum, self.maximum, ""),
            between(self.min_items.map(u64::cast_signed), self.max_items.map(u64::cast_signed), " entries"),
            self.pattern.as_ref().map(|pattern| format!("matching `{pattern}`")),
        ];
        for bound in bounds.into_iter().flatten() {
            write!(shape, ", {bound}")?;
        }
        Ok(shape)
    }
}

fn kind_in_words(kind: &str) -> String {
    let words = match kind {
        "string" => "text",
        "integer" => "whole number",
        "boolean" => "true or false",
        "array" => "list",
        other => other,
    };
    words.to_owned()
}

fn between(least: Option<i64>, most: Option<i64>, unit: &str) -> Option<String> {
    match (least, most) {
        (Some(least), Some(most)) => Some(format!("{least} to {most}{unit}")),
        (Some(least), None) => Some(format!("{least}{unit} or more")),
        (None, Some(most)) => Some(format!("up to {most}{unit}")),
        (None, None) => None,
    }
}

/// Text of the schema, safe in Markdown and in a table.
fn text(text: &str) -> String {
    let mut safe = String::new();
    for c in text.chars() {
        if matches!(c, '*' | '<' | '>' | '|' | '\\') {
            safe.push('\\');
        }
        safe.push(c);
    }
    safe
}
