//! Links: the fields that replications between the same two clusters share, named once. A replication with `link: NAME` has the
//! fields of the link as defaults. Pure.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
};

use nats_lane::{Endpoint, ServerRef};
use serde_json::{Map, Value, json};

use super::{
    Json, Problem, Problems,
    document::parse_judged,
    problems::one_line,
    schema::{REPLICATION, Schema, join, shorten},
    stream_patterns::{self, STREAM_FIELD},
};

/// Fields of replications that a link cannot have: they make a replication this one and no other.
const NOT_IN_LINKS: [&str; 6] = ["stream", "streams", "exclude_streams", "id", "link", "name"];
/// Names that marks have: the key of such a link would be that of a mark.
const NOT_NAMES: [&str; 4] = ["paused", "release", "valid", "streams"];
/// Longest name.
const MAX_NAME: usize = 64;
/// Fields that say the same in different ways: one of them in a replication replaces all of them in its link.
const ALTERNATIVES: [&[&str]; 7] = [
    &["source_url", "source_context"],
    &["target_url", "target_context"],
    &["source_domain", "source_api_prefix"],
    &["target_domain", "target_api_prefix"],
    &["filter_subject", "filter_subjects"],
    &["inspect_field", "inspect_header", "inspect_subject_token"],
    &["start_at_end", "start_sequence", "start_delta", "start_time"],
];
/// URLs, with the fields that say how their servers are recognised and as whom to log in there.
const TRUST: [(&str, &[&str]); 3] = [
    ("source_url", &["tls", "source_tls"]),
    ("target_url", &["tls", "target_tls"]),
    ("target_leaf_url", &["tls", "target_tls", "target_leaf_tls"]),
];

/// The schema of links: the fields of a replication that may be in one.
pub(super) static LINK: LazyLock<Schema> = LazyLock::new(|| {
    let mut root = REPLICATION.root.clone();
    if let Some(root) = root.as_object_mut() {
        for keyword in ["$schema", "$id", "allOf", "examples"] {
            root.remove(keyword);
        }
    }
    root["title"] = "Link".into();
    root["description"] =
        "Defaults for the fields of replications that name this link. A field of a replication takes precedence \
        over that of its link."
            .into();
    if let Some(fields) = root["properties"].as_object_mut() {
        NOT_IN_LINKS.iter().for_each(|field| _ = fields.remove(*field));
        let name = json!({
            "title": "Name",
            "description": "Name of the link, 1 to 64 letters, digits, - and _: replications name it in `link`. Required in \
                requests. Default in a document that is written into the bucket: the end of its key.",
            "type": "string",
            "maxLength": MAX_NAME,
            "examples": ["east-west"],
        });
        fields.insert("name".to_owned(), name);
    }
    Schema::new(root)
});

/// The JSON schema of a link.
pub fn link_schema() -> &'static Value {
    &LINK.root
}

/// Why this cannot be the name of a link.
pub fn wrong_link_name(name: &str) -> Option<&'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(legal) {
        return Some("the name of a link has 1 to 64 letters, digits, `-` and `_`");
    }
    NOT_NAMES.contains(&name).then_some("this name has a meaning of its own: choose another one")
}

/// The name that a link has, if it has one.
pub fn link_name(link: &Value) -> Option<String> {
    link["name"].as_str().filter(|name| wrong_link_name(name).is_none()).map(str::to_owned)
}

/// The link that a replication document names.
pub fn named_link(document: &Value) -> Option<&str> {
    document["link"].as_str().filter(|name| !name.is_empty())
}

/// A link that can be used.
#[derive(Debug, Clone, PartialEq)]
pub struct UsableLink {
    /// Its name.
    pub name: String,
    /// Defaults for the fields of replications.
    pub fields: Arc<Map<String, Value>>,
}

/// Checks a link. All problems come at once. `key` is the name that its key has: then the document needs none. `judge` is asked
/// about each side (`source`, `target`) whose servers can be read.
pub fn parse_link(
    value: &Value,
    key: Option<&str>,
    judge: impl Fn(&str, &ServerRef) -> Vec<Problem>,
) -> Result<UsableLink, Problems> {
    let Some(document) = value.as_object() else { return Err(Problems(LINK.check(value).problems)) };
    let mut problems = Vec::new();
    let name = name(document, key, &mut problems);
    for field in NOT_IN_LINKS.into_iter().filter(|field| *field != "name" && document.contains_key(*field)) {
        let message = format!("`{field}` belongs to one replication: write it there, not in a link");
        problems.push(Problem::new(join("", field), message));
    }
    let fields: Map<_, _> =
        document.iter().filter(|(field, _)| !NOT_IN_LINKS.contains(&field.as_str())).map(owned).collect();
    problems.extend(field_problems(&fields, judge));
    match name {
        Some(name) if problems.is_empty() => Ok(UsableLink { name, fields: Arc::new(fields) }),
        _ => Err(Problems(problems)),
    }
}

/// [`parse_link`] for the text at a key of the configuration bucket.
pub fn read_link(key: &str, text: &[u8]) -> Result<UsableLink, Problems> {
    let json = Json::read(text)?;
    let link = parse_link(&json.value, Some(key), |_, _| Vec::new());
    json.checked(link)
}

fn owned((field, value): (&String, &Value)) -> (String, Value) {
    (field.clone(), value.clone())
}

fn name(document: &Map<String, Value>, key: Option<&str>, problems: &mut Vec<Problem>) -> Option<String> {
    let mut wrong = |message: String| {
        problems.push(Problem::new("/name", message));
        None
    };
    let name = match (document.get("name"), key) {
        (None, Some(key)) => key,
        (None, None) => return wrong("`name` is required: the name of the link".to_owned()),
        (Some(Value::String(name)), _) => name,
        (Some(_), _) => return wrong("`name` must be of type string".to_owned()),
    };
    if let Some(why) = wrong_link_name(name) {
        return wrong(format!("`name` is `{}`: {why}", shorten(name)));
    }
    match key {
        Some(key) if key != name => {
            wrong(format!("`name` is `{name}`, and the key is that of `{key}`: make both agree, or remove `name`"))
        }
        _ => Some(name.to_owned()),
    }
}

/// What is wrong with the fields for any replication. What a replication may add is not missing.
fn field_problems(fields: &Map<String, Value>, judge: impl Fn(&str, &ServerRef) -> Vec<Problem>) -> Vec<Problem> {
    let mut document = fields.clone();
    document.insert("stream".to_owned(), "SOURCE".into());
    let target = match fields.get("target_stream") {
        Some(Value::String(name)) => name.replace(STREAM_FIELD, "SOURCE").into(),
        Some(other) => other.clone(),
        None => Value::from("TARGET"),
    };
    document.insert("target_stream".to_owned(), target);
    let found = parse_judged(&Value::Object(document), "", judge).err().map(|problems| problems.0).unwrap_or_default();
    // A path shows a field that nothing knows shortened, so only a field that is known can be missing.
    let known = &REPLICATION.root["properties"];
    let is_of_link = |problem: &Problem| {
        let field = problem.path.split('/').nth(1).unwrap_or_default();
        fields.contains_key(field) || known.get(field).is_none()
    };
    found.into_iter().filter(is_of_link).collect()
}

/// What a replication document that names a link is resolved with.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkUse {
    /// Name of the link.
    pub name: String,
    /// Its fields, or why there are none.
    pub fields: Result<Arc<Map<String, Value>>, String>,
}

/// The links of an installation, by name: those that can be used, and why the others cannot.
#[derive(Debug, Clone, Default)]
pub struct Links(BTreeMap<String, Result<Arc<Map<String, Value>>, String>>);

impl Links {
    /// A link was written, at this revision of its key.
    pub fn put(&mut self, name: &str, revision: u64, text: &[u8]) {
        let link = read_link(name, text).map(|link| link.fields).map_err(|problems| {
            format!("link `{name}` is not valid: revision {revision}: {}", one_line(&problems.bounded().0))
        });
        self.0.insert(name.to_owned(), link);
    }

    /// A link was deleted.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// The link of this name as it is now.
    pub fn get(&self, name: &str) -> LinkUse {
        let missing =
            || format!("link `{}` does not exist: add it with `link add`, or correct the name", shorten(name));
        let fields = self.0.get(name).cloned().unwrap_or_else(|| Err(missing()));
        LinkUse { name: name.to_owned(), fields }
    }
}

/// The document that runs: that of a replication with the fields of its link where it has none of its own, and with the names of
/// its streams filled in.
pub fn resolve(document: &Value, link: Option<&LinkUse>) -> Result<Value, Problems> {
    let Value::Object(own) = document else { return Ok(document.clone()) };
    let mut resolved = own.clone();
    if let (Some(name), Some(link)) = (named_link(document), link) {
        let problem = |message: &str| Problems(vec![Problem::new("/link", message)]);
        let fields = link.fields.as_ref().map_err(|why| problem(why))?;
        debug_assert_eq!(name, link.name);
        let problems = trust_problems(own, fields, name);
        if !problems.is_empty() {
            return Err(Problems(problems));
        }
        resolved.remove("link");
        if own.contains_key("streams") && !own.contains_key("id") {
            resolved.insert("id".to_owned(), name.into());
        }
        let defaults = fields.iter().filter(|(field, _)| !own.contains_key(*field) && !is_replaced(field, own));
        resolved.extend(defaults.map(owned));
    }
    stream_patterns::fill_in(&mut resolved);
    Ok(Value::Object(resolved))
}

/// Whether the document says in another way what this field of its link says.
fn is_replaced(field: &str, own: &Map<String, Value>) -> bool {
    let says = |other: &&str| own.get(*other).is_some_and(|value| !is_nothing(value));
    ALTERNATIVES.iter().any(|group| group.contains(&field) && group.iter().any(says))
}

fn is_nothing(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false)) || *value == 0 || *value == "" || *value == json!([])
}

/// The secrets of a link go to its servers only, recognised as the link says: whoever may write replications but not this link
/// must not be able to choose other certificate authorities for them.
fn trust_problems(own: &Map<String, Value>, link: &Map<String, Value>, name: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (url, trust) in TRUST {
        let has_secret = link.get(url).and_then(Value::as_str).is_some_and(has_secret);
        if !has_secret || own.contains_key(url) || is_replaced(url, own) {
            continue;
        }
        for field in trust.iter().filter(|field| own.contains_key(**field)) {
            let message = format!("`{field}`: the login of `{url}` is that of link `{name}`: set `{field}` there");
            problems.push(Problem::new(join("", field), message));
        }
    }
    problems.dedup_by(|a, b| a.path == b.path);
    problems
}

fn has_secret(url: &str) -> bool {
    Endpoint::parse(url).is_ok_and(|endpoint| endpoint.auth != nats_lane::Auth::Anonymous)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(fields: Value) -> LinkUse {
        let mut links = Links::default();
        links.put("eu", 3, fields.to_string().as_bytes());
        links.get("eu")
    }

    #[test]
    fn own_fields_take_precedence_over_those_of_the_link() {
        let fields = json!({
            "source_url": "nats://a", "target_url": "nats://b", "max_age": "1h", "filter_subject": "a.>",
            "limits": {"messages_per_second": 5}, "start_at_end": true,
        });
        let check = |own: Value, expect: Value| {
            let mut document = json!({"stream": "S", "link": "eu"});
            document.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
            let mut all = fields.clone();
            all["stream"] = "S".into();
            for (field, value) in expect.as_object().unwrap() {
                match value {
                    Value::Null => _ = all.as_object_mut().unwrap().remove(field),
                    value => all[field] = value.clone(),
                }
            }
            assert_eq!(resolve(&document, Some(&link(fields.clone()))), Ok(all), "{document}");
        };
        check(json!({}), json!({}));
        check(json!({"max_age": "2h"}), json!({"max_age": "2h"}));
        // An empty value switches the default off.
        check(json!({"filter_subject": ""}), json!({"filter_subject": ""}));
        check(json!({"limits": {"bytes_in_flight": 7}}), json!({"limits": {"bytes_in_flight": 7}}));
        // The same said in another way.
        check(json!({"filter_subjects": ["b"]}), json!({"filter_subjects": ["b"], "filter_subject": null}));
        check(json!({"source_context": "c"}), json!({"source_context": "c", "source_url": null}));
        check(json!({"start_sequence": 9}), json!({"start_sequence": 9, "start_at_end": null}));
        check(json!({"start_sequence": 0}), json!({"start_sequence": 0}));
        check(json!({"target_stream": "EU_{stream}"}), json!({"target_stream": "EU_S"}));
    }

    #[test]
    fn a_link_that_is_missing_or_wrong_is_named() {
        let document = json!({"stream": "S", "link": "eu"});
        let check = |link: &LinkUse, expect: &str| {
            let problems = resolve(&document, Some(link)).unwrap_err();
            assert_eq!(problems.0[0].path, "/link");
            assert!(problems.0[0].message.contains(expect), "{problems:?}");
        };
        check(&Links::default().get("eu"), "link `eu` does not exist");
        check(&link(json!({"max_age": "soon"})), "link `eu` is not valid: revision 3: /max_age: `max_age`");
        check(&link(json!(5)), "link `eu` is not valid: revision 3");
        let mut twice = Links::default();
        twice.put("eu", 4, br#"{"max_age": "1h", "max_age": "2h"}"#);
        check(&twice.get("eu"), "`max_age` occurs more than once");
    }

    #[test]
    fn a_link_needs_only_what_it_has() {
        let check = |fields: Value, expect: &[&str]| {
            let found = parse_link(&fields, Some("eu"), |_, _| Vec::new()).err().map(|problems| problems.0);
            let paths: Vec<_> = found.iter().flatten().map(|problem| problem.path.as_str()).collect();
            assert_eq!(paths, expect, "{fields} {found:?}");
        };
        check(json!({}), &[]);
        check(json!({"name": "eu", "source_url": "nats://u:p@h", "tls": {"ca": "/ca"}}), &[]);
        check(json!({"source_url": "nats://h", "target_url": "nats://h"}), &[]);
        check(json!({"target_stream": "EU_{stream}", "on_reject": "dead_letter"}), &[]);
        check(json!({"name": "us"}), &["/name"]);
        check(json!({"name": "e.u"}), &["/name"]);
        check(json!({"name": 5}), &["/name"]);
        check(json!({"stream": "S", "id": "x"}), &["/stream", "/id"]);
        check(json!({"sorce_url": "nats://h"}), &["/sorce_url"]);
        check(json!({"so/rce": 1}), &["/so~1rce"]);
        check(json!({"source_url": "http://h", "max_age": 5}), &["/max_age", "/source_url"]);
        check(json!({"tls": {"cert": "/c"}}), &["/tls"]);
        let long = "x".repeat(10_000);
        let refused = parse_link(&json!({long: 1}), Some("eu"), |_, _| Vec::new()).unwrap_err();
        assert!(refused.0[0].message.contains("is unknown"), "{refused:?}");
        let without_name = parse_link(&json!({}), None, |_, _| Vec::new()).unwrap_err();
        assert_eq!(without_name.0[0].path, "/name");
        for name in NOT_NAMES {
            assert!(wrong_link_name(name).is_some());
        }
    }

    #[test]
    fn the_login_of_a_link_keeps_its_tls() {
        let check = |fields: Value, own: Value, expect: &[&str]| {
            let mut document = json!({"stream": "S", "link": "eu"});
            document.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
            let found = resolve(&document, Some(&link(fields))).err().map(|problems| problems.0);
            let paths: Vec<_> = found.iter().flatten().map(|problem| problem.path.as_str()).collect();
            assert_eq!(paths, expect, "{document}");
        };
        let (secret, open) = (json!({"target_url": "tls://u:p@h"}), json!({"target_url": "tls://h"}));
        check(secret.clone(), json!({"target_tls": {"ca": "/x"}}), &["/target_tls"]);
        check(secret.clone(), json!({"tls": {"ca": "/x"}}), &["/tls"]);
        check(secret.clone(), json!({"source_tls": {"ca": "/x"}}), &[]);
        check(secret, json!({"target_tls": {"ca": "/x"}, "target_url": "tls://other"}), &[]);
        check(open, json!({"target_tls": {"ca": "/x"}}), &[]);
    }

    #[test]
    fn the_schema_has_the_fields_of_a_replication_but_its_own() {
        let fields = link_schema()["properties"].as_object().unwrap();
        assert!(fields.contains_key("source_url") && fields.contains_key("name"));
        assert!(NOT_IN_LINKS.iter().all(|field| *field == "name" || !fields.contains_key(*field)));
    }
}
