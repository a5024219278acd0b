//! The JSON schema of a replication document.

use std::{borrow::Cow, sync::LazyLock};

use jsonschema::{
    JsonType, ValidationError, Validator,
    error::{TypeKind, ValidationErrorKind},
};
use nats_lane::endpoint::nearest;
use serde_json::Value;

use super::Problem;
pub(super) use super::problems::shorten;

/// Of a replication document.
pub(super) static REPLICATION: LazyLock<Schema> = LazyLock::new(|| {
    let json = include_str!("../../schemas/replication.json");
    Schema::new(serde_json::from_str(json).expect("the built-in schema is JSON"))
});

/// `schemas/replication.json` as compiled into the program.
pub fn replication_schema() -> &'static Value {
    &REPLICATION.root
}

/// Type of a field of a replication document, by its path; `None` for one that may be of several types, or is unknown.
pub fn field_type(path: &[&str]) -> Option<&'static str> {
    let schema: &'static Schema = &REPLICATION;
    path.iter().fold(&schema.root, |part, name| schema.part(part, name))["type"].as_str()
}

/// What documents of one kind look like.
#[derive(Debug)]
pub(super) struct Schema {
    pub(super) root: Value,
    validator: Validator,
}

/// What the schema says about a document.
#[derive(Debug, Default)]
pub(super) struct SchemaFindings {
    /// What is wrong for certain.
    pub(super) problems: Vec<Problem>,
    /// Patterns that do not match: reported only where no semantic check has a better message.
    pub(super) patterns: Vec<Problem>,
}

impl Schema {
    /// A schema that was built in.
    pub(super) fn new(root: Value) -> Self {
        let validator = jsonschema::validator_for(&root).expect("the built-in schema is a schema");
        Self { root, validator }
    }

    /// Checks a document.
    pub(super) fn check(&self, document: &Value) -> SchemaFindings {
        let mut findings = SchemaFindings::default();
        for error in self.validator.iter_errors(document) {
            let path = error.instance_path().as_str();
            match error.kind() {
                ValidationErrorKind::AdditionalProperties { unexpected } => {
                    let unknown = unexpected.iter().map(|field| self.unknown_field(path, field));
                    findings.problems.extend(unknown);
                }
                ValidationErrorKind::Required { property } => {
                    let field = property.as_str().unwrap_or_default();
                    findings.problems.push(Problem::new(join(path, field), format!("`{field}` is required")));
                }
                // "One of two fields": the reader of the fields has a better message.
                ValidationErrorKind::AnyOf { .. } => {}
                ValidationErrorKind::Pattern { .. } => findings.patterns.push(explain(&error)),
                _ => findings.problems.push(explain(&error)),
            }
        }
        findings
    }

    fn unknown_field(&self, path: &str, field: &str) -> Problem {
        let parts = path.split('/').skip(1);
        let schema = parts.fold(&self.root, |schema, part| self.part(schema, part));
        let shown = shorten(field);
        let message = match nearest(field, known_fields(schema)) {
            Some(near) => format!("`{shown}` is unknown, did you mean `{near}`?"),
            None => format!("`{shown}` is unknown"),
        };
        Problem::new(join(path, field), message)
    }

    /// The schema of a field of an object, or of an entry of a list; `null` where nothing is known of it.
    pub(super) fn part<'a>(&'a self, schema: &'a Value, part: &str) -> &'a Value {
        let part = match (&schema["properties"][part], schema.get("items")) {
            (Value::Null, Some(items)) => items,
            (Value::Null, None) => &schema["additionalProperties"],
            (known, _) => known,
        };
        // A field that may be `null` has its definition beside that.
        let to = part["$ref"].as_str().or_else(|| part["anyOf"][0]["$ref"].as_str());
        match to.and_then(|to| self.root.pointer(to.strip_prefix('#')?)) {
            Some(definition) => definition,
            None => part,
        }
    }
}

fn known_fields(schema: &Value) -> impl Iterator<Item = &str> {
    schema["properties"].as_object().into_iter().flat_map(|fields| fields.keys().map(String::as_str))
}

fn explain(error: &ValidationError<'_>) -> Problem {
    let path = error.instance_path().as_str();
    let wanted = match error.kind() {
        ValidationErrorKind::Type { kind: TypeKind::Single(kind) } => format!("must be of type {kind}"),
        ValidationErrorKind::MinLength { .. } => "must not be empty".to_owned(),
        ValidationErrorKind::MaxLength { limit } => format!("must not be longer than {limit} characters"),
        ValidationErrorKind::MinItems { limit } => format!("{limit} or more are needed"),
        ValidationErrorKind::MaxItems { limit } => format!("{limit} or fewer are possible"),
        ValidationErrorKind::Minimum { limit } => format!("must be {limit} or more"),
        ValidationErrorKind::Maximum { limit } => format!("must be {limit} or less"),
        ValidationErrorKind::Pattern { pattern } => format!("must match the pattern `{pattern}`"),
        ValidationErrorKind::Enum { options } => format!("must be {}", choice(options)),
        other => format!("does not follow the schema (`{}`)", other.keyword()),
    };
    let value = match (error.kind(), error.instance().as_ref()) {
        (ValidationErrorKind::MinItems { .. } | ValidationErrorKind::MaxItems { .. }, Value::Array(list)) => {
            return Problem::new(path.to_owned(), entries(path, list.len(), &wanted));
        }
        // Where a group of fields is due, a text says nothing to people and may be a secret.
        (ValidationErrorKind::Type { kind: TypeKind::Single(JsonType::Object) }, Value::String(_)) => "a text".into(),
        (_, value) => show(value),
    };
    let message = match path.trim_start_matches('/').replace('/', ".") {
        field if field.is_empty() => format!("the document is {value}: {wanted}"),
        field => format!("`{field}` is {value}: {wanted}"),
    };
    Problem::new(path.to_owned(), message)
}

fn entries(path: &str, count: usize, wanted: &str) -> String {
    let field = path.trim_start_matches('/').replace('/', ".");
    match count {
        0 => format!("`{field}` has no entry: {wanted}"),
        count => format!("`{field}` has {count} entries: {wanted}"),
    }
}

/// `a`, `b` or `c`; an empty text is the same as none.
fn choice(options: &Value) -> String {
    let words = options.as_array().into_iter().flatten().filter_map(Value::as_str).filter(|word| !word.is_empty());
    let words: Vec<_> = words.map(|word| format!("`{word}`")).collect();
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// A value in a message: short, and never a secret, wherever in the document it was written.
fn show(value: &Value) -> Cow<'static, str> {
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "an array".into(),
        Value::String(text) => format!("`{}`", shorten(text)).into(),
        other => format!("`{other}`").into(),
    }
}

/// A JSON pointer one level deeper.
pub(super) fn join(path: &str, field: &str) -> String {
    format!("{path}/{}", field.replace('~', "~0").replace('/', "~1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties<'a>(prefix: &str, schema: &'a Value, all: &mut Vec<(String, &'a Value)>) {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = join(prefix, field);
            properties(&path, property, all);
            all.push((path, property));
        }
    }

    #[test]
    fn every_property_is_described() {
        let mut all = Vec::new();
        properties("", replication_schema(), &mut all);
        properties("/$defs", &replication_schema()["$defs"]["tls"], &mut all);
        assert!(all.len() > 20);
        for (path, property) in all {
            assert!(property["title"].is_string(), "{path} has no title");
            let text = property["description"].as_str().unwrap_or_default();
            let said = text.contains("Default:") || property["type"] == "object";
            assert!(said, "{path} does not say its default");
        }
    }

    #[test]
    fn examples_are_valid() {
        for example in replication_schema()["examples"].as_array().unwrap() {
            assert!(REPLICATION.validator.is_valid(example), "{example}");
        }
    }

    #[test]
    fn nearest_only_when_near() {
        let check = |word: &str, expect: Option<&str>| {
            assert_eq!(nearest(word, known_fields(replication_schema())), expect, "{word}");
        };
        check("streem", Some("stream"));
        check("target_strem", Some("target_stream"));
        check("Source_URL", Some("source_url"));
        check("filter_subjct", Some("filter_subject"));
        check("colour", None);
        check("", None);
    }
}
