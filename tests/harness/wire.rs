//! The promises of the service, read from the files in `schemas/` and compared with everything that it sends: every reply,
//! every request that it served, every event of every test. A reply may get more fields one day, but not one that no
//! schema describes, so here unknown fields are refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use jsonschema::{Registry, Validator};
use serde_json::{Value, json};

/// Folder of the schemas.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas")
}

/// All schemas, by the path of their file without `.json`.
static SCHEMAS: LazyLock<HashMap<String, Validator>> = LazyLock::new(|| load().expect("the folder `schemas`"));

/// Checks the reply to a request; `failed` says whether it is an error by its headers.
pub fn check_reply(subject: &str, failed: bool, body: &Value) -> Result<()> {
    let Some(endpoint) = endpoint(subject)? else { return Ok(()) };
    let schema = if failed { "error".to_owned() } else { format!("{endpoint}.reply") };
    check(&schema, body).with_context(|| format!("reply to `{subject}`"))
}

/// Checks a request that was served: nothing but what its schema allows is taken.
pub fn check_request(subject: &str, body: &[u8]) -> Result<()> {
    let Some(endpoint) = endpoint(subject)? else { return Ok(()) };
    check(&format!("{endpoint}.request"), &meant(endpoint_name(endpoint), body))
        .with_context(|| format!("request to `{subject}`"))
}

/// Checks an event: subject and body.
pub fn check_event(subject: &str, body: &Value) -> Result<()> {
    let (kind, replication) = (&body["kind"], &body["replication"]);
    let (kind, replication) = (kind.as_str().unwrap_or_default(), replication.as_str().unwrap_or_default());
    check(&format!("event/{kind}"), body).with_context(|| format!("event on `{subject}`"))?;
    let expect = format!(".event.{kind}.{replication}");
    ensure!(subject.ends_with(&expect), "event on `{subject}` says that it is on `{expect}`");
    Ok(())
}

/// Checks against one schema, named as its file without `.json`.
pub fn check(schema: &str, value: &Value) -> Result<()> {
    let validator = SCHEMAS.get(schema).with_context(|| format!("there is no schema `{schema}.json`"))?;
    let wrong = validator.iter_errors(value).map(|error| format!("`{}`: {error}", error.instance_path().as_str()));
    let wrong: Vec<_> = wrong.collect();
    ensure!(wrong.is_empty(), "`{schema}.json` does not allow {value}: {}", wrong.join("; "));
    Ok(())
}

/// The field that plain text stands for.
fn endpoint_name(endpoint: &str) -> &'static str {
    match endpoint.split('.').next() {
        Some("adapter") => "adapter",
        Some("link") => "link",
        _ => "replication",
    }
}

/// What a request means in JSON: nothing is `{}`, and plain text is an id.
fn meant(id: &str, body: &[u8]) -> Value {
    let text = String::from_utf8_lossy(body.trim_ascii());
    match text.chars().next() {
        None => json!({}),
        Some('{') => serde_json::from_str(&text).unwrap_or_default(),
        Some(_) => json!({ id: text }),
    }
}

/// The endpoint of a subject, whatever the prefix; none for the subjects of the server and of every service.
fn endpoint(subject: &str) -> Result<Option<&str>> {
    if subject.starts_with('$') {
        return Ok(None);
    }
    let names = SCHEMAS.keys().filter_map(|schema| schema.strip_suffix(".reply"));
    let behind = |name: &&str| subject.strip_suffix(*name).is_some_and(|prefix| prefix.ends_with('.'));
    match names.filter(behind).max_by_key(|name| name.len()) {
        Some(name) => Ok(Some(&subject[subject.len() - name.len()..])),
        None => bail!("no schema for what `{subject}` answers"),
    }
}

fn load() -> Result<HashMap<String, Validator>> {
    let mut schemas = Vec::new();
    for (path, mut schema) in read(&folder())? {
        refuse_unknown_fields(&mut schema);
        schemas.push((path, schema));
    }
    let mut registry = Registry::new();
    for (_, schema) in &schemas {
        let id = schema["$id"].as_str().context("a schema without `$id`")?;
        registry = registry.add(id, schema.clone())?;
    }
    let registry = registry.prepare()?;
    let options = jsonschema::options().with_registry(&registry).should_validate_formats(true);
    let compiled = schemas.into_iter().map(|(path, schema)| {
        let validator = options.clone().offline().build(&schema);
        anyhow::Ok((path.clone(), validator.map_err(|error| anyhow::anyhow!("`{path}.json`: {error}"))?))
    });
    compiled.collect()
}

/// All schemas of a folder, by their path without `.json`.
pub fn read(folder: &Path) -> Result<Vec<(String, Value)>> {
    let mut schemas = Vec::new();
    for prefix in ["", "event/"] {
        for entry in std::fs::read_dir(folder.join(prefix))? {
            let path = entry?.path();
            if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) {
                let text = std::fs::read_to_string(&path)?;
                let schema = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
                schemas.push((format!("{prefix}{name}"), schema));
            }
        }
    }
    Ok(schemas)
}

/// Closes every object of a schema.
fn refuse_unknown_fields(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("type") == Some(&json!("object")) && fields.get("properties").is_some_and(Value::is_object) {
                fields.entry("additionalProperties").or_insert(false.into());
            }
            fields.values_mut().for_each(refuse_unknown_fields);
        }
        Value::Array(all) => all.iter_mut().for_each(refuse_unknown_fields),
        _ => {}
    }
}
