//! The schemas in `schemas/` and the check that every test makes with them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};
use stream_replicator::control::schemas;
use stream_replicator::events::Event;

use crate::harness::{Site, client::request, wire};

/// The command that generates the files again.
pub const COMMAND: &str = "make generate";

#[test]
fn current_schemas_are_in_the_files() -> Result<()> {
    let folder = wire::folder();
    let made = schemas::files();
    for (path, schema) in &made {
        is_current(&folder.join(path), &pretty(schema)?)?;
    }
    for (name, _) in wire::read(&folder)? {
        let path = format!("{name}.json");
        ensure!(path == "replication.json" || made.contains_key(&path), "nothing says what is in schemas/{path}");
    }
    Ok(())
}

/// Compares a generated file with what it should be; with `GENERATE` in the environment, writes it.
pub fn is_current(path: &Path, expect: &str) -> Result<()> {
    if std::env::var_os("GENERATE").is_some() {
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        return Ok(std::fs::write(path, expect)?);
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    ensure!(found == expect, "{} is not what the program says: run `{COMMAND}`", path.display());
    Ok(())
}

fn pretty(schema: &Value) -> Result<String> {
    let mut text = serde_json::to_string_pretty(&Ordered { value: schema, first: &[] })?;
    text.push('\n');
    Ok(text)
}

/// A schema in the order that people read it in.
struct Ordered<'a> {
    value: &'a Value,
    /// Keys that come first, beside those that always do.
    first: &'a [Value],
}

impl Serialize for Ordered<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const FIRST: [&str; 9] =
            ["$schema", "$id", "title", "description", "$ref", "type", "const", "properties", "required"];
        const LAST: &str = "$defs";
        let all = |value| Ordered { value, first: &[] };
        match self.value {
            Value::Object(fields) => {
                let mut sorted: Vec<_> = fields.iter().collect();
                let given = |key: &str| self.first.iter().position(|first| first == key).unwrap_or(self.first.len());
                let usual = |key: &str| FIRST.iter().position(|first| *first == key).unwrap_or(FIRST.len());
                sorted.sort_by_key(|(key, _)| (*key == LAST, given(key), usual(key)));
                let mut map = serializer.serialize_map(Some(sorted.len()))?;
                for (key, value) in sorted {
                    let required = fields.get("required").and_then(Value::as_array).filter(|_| key == "properties");
                    map.serialize_entry(key, &Ordered { value, first: required.map_or(&[], Vec::as_slice) })?;
                }
                map.end()
            }
            Value::Array(values) => serializer.collect_seq(values.iter().map(all)),
            value => value.serialize(serializer),
        }
    }
}

#[test]
fn every_field_of_every_schema_is_described() -> Result<()> {
    fn check(at: &str, schema: &Value) -> Result<()> {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            let described = property["description"].is_string() || property["const"].is_string();
            ensure!(described, "{at}: `{field}` has no description");
        }
        for (name, definition) in schema["$defs"].as_object().into_iter().flatten() {
            ensure!(definition["description"].is_string(), "{at}: `{name}` has no description");
            check(&format!("{at}, `{name}`"), definition)?;
        }
        Ok(())
    }
    for (path, schema) in schemas::files() {
        for keyword in ["$schema", "$id", "title", "description"] {
            ensure!(schema[keyword].is_string(), "{path} has no `{keyword}`");
        }
        check(&path, &schema)?;
    }
    Ok(())
}

#[test]
fn every_kind_of_event_has_a_schema_and_nothing_else_has() {
    let made = schemas::files();
    let kinds: BTreeSet<_> =
        made.keys().filter_map(|path| path.strip_prefix("event/")?.strip_suffix(".json")).collect();
    assert_eq!(kinds, Event::KINDS.into());
}

#[test]
fn requests_have_no_room_for_unknown_fields_and_replies_have() {
    for (path, schema) in schemas::files() {
        let open = schema["additionalProperties"] != false;
        let unread = ["config.schema.request.json", "heartbeat.get.request.json"].contains(&path.as_str());
        if !path.ends_with(".request.json") {
            assert!(open, "{path}");
        } else if schema["type"] == "object" {
            assert!(!open, "{path}");
        } else {
            // A document, which has its own schema, or a value that is not checked.
            assert!(schema.get("$ref").is_some() || unread, "{path}");
        }
    }
}

#[tokio::test]
async fn every_endpoint_has_schemas_for_request_and_reply() -> Result<()> {
    let site = Site::small().await?;
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let made = schemas::files();
    for endpoint in info["endpoints"].as_array().context("endpoints")? {
        let name = endpoint["subject"].as_str().and_then(|subject| subject.strip_prefix("replicator."));
        let name = name.context("a subject")?;
        for direction in ["request", "reply"] {
            ensure!(made.contains_key(&format!("{name}.{direction}.json")), "{name} has no schema of its {direction}");
            let named = &endpoint["metadata"][format!("{direction}_schema")];
            let shown = request(&site.client, "replicator.schema", json!({"name": named})).await?;
            ensure!(shown["schema"] == made[&format!("{name}.{direction}.json")], "{name}: {named}");
        }
        let described = endpoint["metadata"]["description"].as_str().is_some_and(|text| !text.is_empty());
        ensure!(described, "{endpoint}");
    }
    let all = request(&site.client, "replicator.schema", Value::Null).await?;
    let names: Vec<String> = serde_json::from_value(all["names"].clone())?;
    ensure!(names.len() == made.len() + 1 && names.contains(&"replication".to_owned()), "{names:?}");
    for name in &names {
        let shown = request(&site.client, "replicator.schema", json!({"name": name})).await?;
        ensure!(shown["schema"]["$id"].is_string(), "{name}: {shown}");
    }
    let error = request(&site.client, "replicator.schema", json!({"name": "nothing"})).await;
    ensure!(error.expect_err("refused").to_string().contains("404"));
    Ok(())
}

/// The check of all other tests is worth something only if it can fail: it is given what the service sends, with one
/// thing changed.
#[tokio::test]
async fn unknown_fields_and_wrong_types_are_found() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 3).await?;
    site.settled("ORDERS", 3).await?;
    let served = [("status", ""), ("config.list", ""), ("config.get", "ORDERS")];
    for (endpoint, body) in served {
        let reply = site.ask(endpoint, body).await?.body;
        let subject = format!("replicator.{endpoint}");
        each_change_is_found(&reply, |changed| wire::check_reply(&subject, false, changed))?;
    }
    let error = site.ask("config.add", r#"{"stream": "A"}"#).await?;
    ensure!(error.error == Some(400), "{error:?}");
    each_change_is_found(&error.body, |changed| wire::check_reply("replicator.config.add", true, changed))?;

    let (subject, event) = site.events.seen().into_iter().next().context("an event")?;
    each_change_is_found(&event, |changed| wire::check_event(&subject, changed))?;
    ensure!(wire::check_event("replicator.event.gap.ORDERS", &event).is_err(), "the subject is another one's");

    each_change_is_found(&site.document("ORDERS"), |changed| wire::check("config.add.request", changed))?;
    let delete = json!({"replication": "ORDERS", "keep": true});
    each_change_is_found(&delete, |changed| wire::check("config.delete.request", changed))?;
    ensure!(wire::check_request("replicator.config.get", b"").is_err(), "names nothing");
    ensure!(wire::check_request("replicator.config.list", b"ORDERS").is_err(), "takes no name");
    ensure!(wire::check_reply("replicator.unknown", false, &json!({})).is_err(), "is no endpoint");
    wire::check_request("replicator.config.get", b" ORDERS\n")?;
    wire::check_request("acme.copy.status", b"")
}

/// Gives `check` the value as it is, and then with one more field in each object and with each part replaced by one of
/// another type.
fn each_change_is_found(value: &Value, check: impl Fn(&Value) -> Result<()>) -> Result<()> {
    check(value)?;
    let mut places = BTreeMap::new();
    collect("", value, &mut places);
    for (place, part) in places {
        let mut wrong = vec![match part {
            Value::Object(_) | Value::Array(_) => json!(true),
            _ => json!([[]]),
        }];
        if part.is_object() {
            let mut more = part.clone();
            more["surprise"] = json!(1);
            wrong.push(more);
        }
        for other in wrong {
            let mut changed = value.clone();
            *changed.pointer_mut(&place).context("the place")? = other;
            ensure!(check(&changed).is_err(), "a change at `{place}` was not found: {changed}");
        }
    }
    Ok(())
}

fn collect<'a>(at: &str, value: &'a Value, places: &mut BTreeMap<String, &'a Value>) {
    places.insert(at.to_owned(), value);
    let parts: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, part)| (name.clone(), part)).collect(),
        Value::Array(parts) => parts.iter().enumerate().map(|(index, part)| (index.to_string(), part)).collect(),
        _ => Vec::new(),
    };
    for (name, part) in parts {
        collect(&format!("{at}/{name}"), part, places);
    }
}
