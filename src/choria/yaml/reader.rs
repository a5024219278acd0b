//! Nodes become JSON, field by field; everything that is wrong is found in one go.

use std::collections::BTreeMap;

use nats_lane::endpoint::nearest;
use serde_json::{Map, Value};

use super::{
    YamlProblem,
    fields::{FieldKind, FileField},
    node::{MappingEntry, NodeContent, YamlNode},
    scalar::{PlainScalar, duration},
};

/// Longest part of a value that a message shows.
const SHOWN: usize = 60;

/// What is read so far.
#[derive(Debug, Default)]
pub(super) struct YamlReader {
    /// What is wrong.
    pub(super) problems: Vec<YamlProblem>,
    /// Fields that do not exist: wrong too, unless the caller is lenient.
    pub(super) unknown: Vec<YamlProblem>,
    /// What is right and has no effect.
    pub(super) notices: Vec<YamlProblem>,
    /// Where each value is: JSON pointer and line.
    pub(super) lines: BTreeMap<String, usize>,
}

impl YamlReader {
    fn problem(&mut self, line: usize, path: &str, message: String) {
        self.problems.push(YamlProblem::new(line, path, message));
    }

    /// The mapping at `path` with the names that the fields have; skips values that are wrong or empty.
    pub(super) fn group(&mut self, path: &str, entries: &[MappingEntry], fields: &[FileField]) -> Map<String, Value> {
        let mut group = Map::new();
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for entry in entries {
            let known = fields.iter().find(|field| field.name.eq_ignore_ascii_case(&entry.key));
            let Some(field) = known else {
                // The first level may hold anchors for the other ones.
                if !(path.is_empty() && is_extension(&entry.key)) {
                    self.unknown_field(path, entry, fields);
                }
                continue;
            };
            let at = format!("{path}/{}", field.name);
            if let Some(first) = seen.insert(field.name, entry.line) {
                if !entry.merged {
                    let message = format!("`{}` is there twice, first in line {first}: remove one of them", field.name);
                    self.problem(entry.line, &at, message);
                }
                continue;
            }
            let line = if entry.merged { entry.value.line } else { entry.line };
            self.lines.insert(at.clone(), line);
            if let Some(value) = self.value(&at, field, line, &entry.value) {
                group.insert(field.name.to_owned(), value);
            }
        }
        group
    }

    fn unknown_field(&mut self, path: &str, entry: &MappingEntry, fields: &[FileField]) {
        // Who writes this file means one of the Go program's fields.
        let near = |ours: bool| nearest(&entry.key, fields.iter().filter(|f| f.ours == ours).map(|field| field.name));
        let near = near(false).or_else(|| near(true));
        let near = near.map(|near| format!("did you mean `{near}`? ")).unwrap_or_default();
        let shown = shown(&entry.key);
        let message = format!("`{shown}` is unknown here; {near}Choria's replicator ignores it without a word");
        self.unknown.push(YamlProblem::new(entry.line, &format!("{path}/{shown}"), message));
    }

    /// The value of one field; `None` for one that is empty or wrong.
    fn value(&mut self, path: &str, field: &FileField, line: usize, node: &YamlNode) -> Option<Value> {
        if is_nothing(node) {
            return None;
        }
        match (field.kind, &node.content) {
            (FieldKind::Group(fields), NodeContent::Mapping(entries)) => {
                Some(Value::Object(self.group(path, entries, fields)))
            }
            (FieldKind::Entries(fields), NodeContent::List(list)) => Some(self.entries(path, list, fields)),
            (FieldKind::Headers, NodeContent::Mapping(entries)) => Some(self.headers(path, entries)),
            (FieldKind::Any, _) => Some(self.any(path, node)),
            (FieldKind::Group(_) | FieldKind::Headers, _) => {
                let message = format!("`{}` is not a mapping: write its fields below it, indented", field.name);
                self.problem(line, path, message);
                None
            }
            (FieldKind::Entries(_), _) => {
                let message = format!("`{}` is not a list: write `- ` in front of each entry", field.name);
                self.problem(line, path, message);
                None
            }
            (kind, NodeContent::Scalar { text, plain }) => self.scalar(path, field.name, kind, line, (text, *plain)),
            (_, NodeContent::List(_) | NodeContent::Mapping(_)) => {
                let message = format!("`{}` holds one value, not a list or a mapping", field.name);
                self.problem(line, path, message);
                None
            }
        }
    }

    fn entries(&mut self, path: &str, list: &[YamlNode], fields: &[FileField]) -> Value {
        let mut entries = Vec::new();
        for (index, node) in list.iter().enumerate() {
            let at = format!("{path}/{index}");
            self.lines.insert(at.clone(), node.line);
            let entry = match &node.content {
                NodeContent::Mapping(entries) => self.group(&at, entries, fields),
                _ => {
                    self.problem(node.line, &at, "this entry is not a mapping of fields".to_owned());
                    Map::new()
                }
            };
            entries.push(Value::Object(entry));
        }
        Value::Array(entries)
    }

    fn headers(&mut self, path: &str, entries: &[MappingEntry]) -> Value {
        let mut headers: Map<String, Value> = Map::new();
        for entry in entries {
            let at = format!("{path}/{}", entry.key.replace('~', "~0").replace('/', "~1"));
            if headers.contains_key(&entry.key) {
                if !entry.merged {
                    self.problem(entry.line, &at, format!("header `{}` is there twice", shown(&entry.key)));
                }
                continue;
            }
            self.lines.insert(at.clone(), entry.line);
            let value = match &entry.value.content {
                NodeContent::Scalar { text, plain } => self.text(&at, &shown(&entry.key), entry.line, (text, *plain)),
                _ => {
                    self.problem(entry.line, &at, format!("header `{}` is not a text", shown(&entry.key)));
                    None
                }
            };
            headers.insert(entry.key.clone(), value.unwrap_or_else(|| Value::from("")));
        }
        Value::Object(headers)
    }

    /// As YAML 1.1 has it, without a table of fields.
    fn any(&mut self, path: &str, node: &YamlNode) -> Value {
        self.lines.entry(path.to_owned()).or_insert(node.line);
        match &node.content {
            NodeContent::Scalar { text, plain: false } => Value::from(text.as_str()),
            NodeContent::Scalar { text, plain: true } => match PlainScalar::read(text) {
                PlainScalar::Nothing => Value::Null,
                PlainScalar::Truth(truth) => Value::from(truth),
                PlainScalar::Whole(number) => {
                    u64::try_from(number).map_or_else(|_| Value::from(number as f64), Value::from)
                }
                PlainScalar::Real(number) => Value::from(number),
                PlainScalar::Text => Value::from(text.as_str()),
            },
            NodeContent::List(list) => {
                let list = list.iter().enumerate();
                Value::Array(list.map(|(index, node)| self.any(&format!("{path}/{index}"), node)).collect())
            }
            NodeContent::Mapping(entries) => {
                let mut fields = Map::new();
                for entry in entries {
                    let at = format!("{path}/{}", entry.key);
                    if fields.contains_key(&entry.key) {
                        if !entry.merged {
                            self.problem(entry.line, &at, format!("`{}` is there twice", shown(&entry.key)));
                        }
                        continue;
                    }
                    let value = self.any(&at, &entry.value);
                    if !value.is_null() {
                        fields.insert(entry.key.clone(), value);
                    }
                }
                Value::Object(fields)
            }
        }
    }

    fn scalar(
        &mut self,
        path: &str,
        name: &str,
        kind: FieldKind,
        line: usize,
        (text, plain): (&str, bool),
    ) -> Option<Value> {
        let read = if plain { PlainScalar::read(text) } else { PlainScalar::Text };
        let wanted = match (kind, read) {
            (FieldKind::Text, _) => return self.text(path, name, line, (text, plain)),
            (FieldKind::Flag, PlainScalar::Truth(truth)) => return Some(Value::from(truth)),
            (FieldKind::Flag, _) => "true or false, without quotes".to_owned(),
            (FieldKind::Whole(least, most), PlainScalar::Whole(number)) if (least..=most).contains(&number) => {
                return Some(match u64::try_from(number) {
                    Ok(number) => Value::from(number),
                    Err(_) => Value::from(number as i64),
                });
            }
            (FieldKind::Whole(least, most), _) => format!("a whole number from {least} to {most}, without quotes"),
            (FieldKind::Decimal, PlainScalar::Whole(number)) if (0..=1 << 53).contains(&number) => {
                return Some(Value::from(number as u64));
            }
            (FieldKind::Decimal, PlainScalar::Real(number)) if (0.0..9e15).contains(&number) => {
                return Some(Value::from(number.ceil() as u64));
            }
            (FieldKind::Decimal, _) => "a number of bytes, 0 or more, without quotes".to_owned(),
            (FieldKind::Span(positive), PlainScalar::Text) => return self.span(path, name, line, text, positive),
            (FieldKind::Span(_), _) => "a duration with its unit, such as `10s`".to_owned(),
            _ => return None, // no scalar belongs here, which was said
        };
        let is = if plain { shown(text) } else { format!("\"{}\"", shown(text)) };
        self.problem(line, path, format!("`{name}` is `{is}`: it must be {wanted}"));
        None
    }

    fn text(&mut self, path: &str, name: &str, line: usize, (text, plain): (&str, bool)) -> Option<Value> {
        let read = if plain { PlainScalar::read(text) } else { PlainScalar::Text };
        let what = match read {
            PlainScalar::Nothing => return None,
            PlainScalar::Text => return Some(Value::from(text)),
            PlainScalar::Truth(truth) => format!("the boolean {truth}"),
            PlainScalar::Whole(_) | PlainScalar::Real(_) => "a number".to_owned(),
        };
        let text = shown(text);
        self.problem(line, path, format!("`{name}` is `{text}`, which YAML reads as {what}: put it in quotes"));
        None
    }

    fn span(&mut self, path: &str, name: &str, line: usize, text: &str, positive: bool) -> Option<Value> {
        match duration(text) {
            Ok(Some(duration)) => return Some(Value::from(duration)),
            Ok(None) if text.trim().is_empty() => {}
            Ok(None) if positive => {
                self.problem(line, path, format!("`{name}` is `{}`: it must be more than 0", shown(text)));
            }
            Ok(None) => {
                let message = format!("`{name}` is `{}`, which is not more than 0: it has no effect", shown(text));
                self.notices.push(YamlProblem::new(line, path, message));
            }
            Err(wrong) => self.problem(line, path, format!("`{name}` is `{}`: it {wrong}", shown(text))),
        }
        None
    }
}

/// A key of the first level that only holds anchors.
fn is_extension(key: &str) -> bool {
    key.starts_with("x-") || key.starts_with("X-")
}

/// A field without a value is as good as none.
fn is_nothing(node: &YamlNode) -> bool {
    match &node.content {
        NodeContent::Scalar { text, plain } => *plain && PlainScalar::read(text) == PlainScalar::Nothing,
        NodeContent::List(_) | NodeContent::Mapping(_) => false,
    }
}

/// A value in a message: short, without what may be a password.
fn shown(text: &str) -> String {
    if text.contains('@') || text.contains("://") {
        return "***".to_owned();
    }
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.escape_debug().to_string(),
    }
}
