//! The file of a site, `serve --config`: Choria's YAML, as far as it is read here.

use nats_lane::endpoint::nearest;
use serde_json::{Map, Value};

use super::{Problem, adapters::adapter_name, schema::shorten};
use crate::names;

/// The fields of the first level.
const KNOWN: [&str; 3] = ["name", "heartbeats", "adapters"];

/// What a file says.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteFile {
    /// Name of the site.
    pub name: String,
    /// Heartbeats as written; `null` for none.
    pub heartbeats: Value,
    /// Adapters as written, each with a name; whether they can run is not known.
    pub adapters: Vec<Value>,
}

/// Reads the file's text. Everything that is wrong comes at once, without the file's name and without secrets. `name` is
/// that of the site if it is known from elsewhere; `judge` says what is wrong with the heartbeats, `null` for none.
pub fn parse_file(
    yaml: &str,
    name: Option<&str>,
    judge: impl FnOnce(&Value) -> Vec<Problem>,
) -> Result<SiteFile, Vec<String>> {
    let mut fields = read(yaml).map_err(|problem| vec![problem])?;
    let unknown = fields.keys().filter(|field| !KNOWN.contains(&field.as_str()));
    let mut problems: Vec<_> = unknown.map(|field| unknown_field(field)).collect();
    let own = match fields.get("name") {
        Some(Value::String(own)) if !own.is_empty() => Some(own.clone()),
        None | Some(Value::Null | Value::String(_)) => {
            problems.push("`name`, the name of the site, is required".to_owned());
            None
        }
        Some(_) => {
            problems.push("`name` is not a text: write it in quotes".to_owned());
            None
        }
    };
    if let Some(own) = &own {
        let shown = shorten(own);
        if let Err(right) = names::check_token(own) {
            problems.push(format!("`name`: `{shown}` is not possible; it must be {right}"));
        } else if let Some(name) = name.filter(|name| name != own) {
            problems
                .push(format!("`name` is `{shown}`, and `--name` is `{name}`: remove `--name`, or make both agree"));
        }
    }
    let heartbeats = fields.remove("heartbeats").unwrap_or_default();
    let adapters = match fields.remove("adapters").unwrap_or_default() {
        Value::Null => Vec::new(),
        Value::Array(adapters) => adapters,
        _ => {
            problems.push("`adapters` is no list".to_owned());
            Vec::new()
        }
    };
    if adapters.iter().any(|adapter| adapter_name(adapter).is_none()) {
        problems.push("`adapters`: each needs a `name` of letters, digits, `-` and `_`".to_owned());
    }
    let place = |problem: Problem| format!("`/heartbeats{}`: {}", problem.path, problem.message);
    problems.extend(judge(&heartbeats).into_iter().map(place));
    match own {
        Some(name) if problems.is_empty() => Ok(SiteFile { name, heartbeats, adapters }),
        _ => Err(problems),
    }
}

fn unknown_field(field: &str) -> String {
    let [name, heartbeats, adapters] = KNOWN;
    let known = format!("`{name}`, `{heartbeats}` and `{adapters}`");
    let near = nearest(field, KNOWN).map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
    format!("`{}` is unknown on the first level{near}; known are {known}", shorten(field))
}

/// YAML as JSON has it, merged keys in their places.
fn read(yaml: &str) -> Result<Map<String, Value>, String> {
    let wrong = |error: yaml_serde::Error| match error.location() {
        Some(at) => format!("it is not valid YAML (line {}, column {})", at.line(), at.column()),
        None => "it is not valid YAML".to_owned(),
    };
    let mut value: yaml_serde::Value = yaml_serde::from_str(yaml).map_err(wrong)?;
    value.apply_merge().map_err(wrong)?;
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err("it is no mapping: `name: ...` and so on".to_owned()),
        Err(_) => Err("it has keys or values that JSON cannot express".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(yaml: &str, name: Option<&str>) -> Result<SiteFile, Vec<String>> {
        parse_file(yaml, name, |heartbeats| match heartbeats["url"] {
            Value::Number(_) => vec![Problem::new("/url", "is wrong")],
            _ => Vec::new(),
        })
    }

    #[test]
    fn a_file_names_the_site_and_its_heartbeats() {
        let file = parsed("name: US\nheartbeats:\n  interval: 10s\n  subjects:\n    - subject: a.b\n", None);
        let heartbeats = json!({"interval": "10s", "subjects": [{"subject": "a.b"}]});
        assert_eq!(file, Ok(SiteFile { name: "US".to_owned(), heartbeats, adapters: Vec::new() }));
        let merged =
            "name: US\nheartbeats:\n  headers: &a {x: y}\n  subjects: [{subject: s, headers: {<<: *a, z: z}}]\n";
        let merged = parsed(merged, Some("US")).unwrap();
        assert_eq!(merged.heartbeats["subjects"][0]["headers"], json!({"x": "y", "z": "z"}));
        assert_eq!(parsed("name: US", None).unwrap().heartbeats, Value::Null);
    }

    #[test]
    fn what_is_not_known_or_does_not_agree_is_told_all_at_once() {
        let check = |yaml: &str, expect: &[&str]| {
            let problems = parsed(yaml, Some("US")).unwrap_err();
            assert_eq!(problems.len(), expect.len(), "{yaml}: {problems:?}");
            for (problem, expect) in problems.iter().zip(expect) {
                assert!(problem.contains(expect), "{yaml}: {problems:?}");
            }
        };
        check("", &["`name`, the name of the site, is required"]);
        check("name: ''", &["is required"]);
        check("name: 5", &["is not a text"]);
        check("name: a.b", &["`a.b` is not possible"]);
        check("name: EU", &["`name` is `EU`, and `--name` is `US`"]);
        check(
            "name: US\nstreams: []\nheartbeat: {}\n",
            &["`heartbeat` is unknown on the first level, did you mean `heartbeats`?", "`streams` is unknown"],
        );
        check(
            "name: US\nstreams: []",
            &["`streams` is unknown on the first level; known are `name`, `heartbeats` and `adapters`"],
        );
        check("name: EU\nheartbeats: {url: 5}", &["`name` is `EU`", "`/heartbeats/url`: is wrong"]);
        check("- name", &["no mapping"]);
        check("name: US\nname: US", &["not valid YAML"]);
        check("name: US\nheartbeats: {url: 'nats://u:hunter2@h", &["not valid YAML (line "]);
        check("name: US\nheartbeats: *hunter2", &["not valid YAML"]);
    }

    #[test]
    fn what_is_no_yaml_is_told_without_its_content() {
        for yaml in ["name: *hunter2", "a: hunter2: b", "hunter2: 1\nhunter2: 2", "[hunter2"] {
            let problems = parsed(yaml, None).unwrap_err();
            assert!(!problems.concat().contains("hunter2"), "{yaml}: {problems:?}");
        }
    }
}
