//! JSON as people write it: keys that occur twice are problems, and what is something else is named.

use std::{cell::RefCell, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{
    Problem, Problems,
    schema::{join, shorten},
};

/// Size of a document, bytes: a document is read and checked at once, and every reply that shows one stays far from the limit of
/// a message.
pub const MAX_DOCUMENT: usize = 64 << 10;

/// A JSON value, and the keys that occur twice in one of its objects: of each, the value holds the last.
#[derive(Debug, Clone, PartialEq)]
pub struct Json {
    /// The value.
    pub value: Value,
    /// One problem for each key that occurs more than once.
    pub problems: Vec<Problem>,
}

impl Json {
    /// Reads a whole text. What is not JSON is one problem that says what it is instead, where that can be seen.
    pub fn read(text: &[u8]) -> Result<Self, Problems> {
        if text.len() > MAX_DOCUMENT {
            let message = format!("the document has {} bytes, {MAX_DOCUMENT} are possible", text.len());
            return Err(Problems(vec![Problem::new("", message)]));
        }
        serde_json::from_slice(text).map_err(|error| {
            Problems(vec![Problem::new("", format!("the document is not valid JSON: {}", why_not_json(text, &error)))])
        })
    }

    /// The result of a check of the value, with the problems of the text first.
    pub fn checked<T>(self, result: Result<T, Problems>) -> Result<T, Problems> {
        match (self.problems, result) {
            (problems, Ok(good)) if problems.is_empty() => Ok(good),
            (mut problems, result) => {
                problems.extend(result.err().map(|others| others.0).unwrap_or_default());
                Err(Problems(problems))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let problems = RefCell::default();
        let value = JsonReader { path: "", problems: &problems }.deserialize(deserializer)?;
        Ok(Self { value, problems: problems.into_inner() })
    }
}

/// What a text is that the parser refused. It is not quoted: it may hold secrets.
pub fn why_not_json(text: &[u8], error: &serde_json::Error) -> String {
    something_else(text, error).map_or_else(|| error.to_string(), str::to_owned)
}

fn something_else(text: &[u8], error: &serde_json::Error) -> Option<&'static str> {
    let rest = text.trim_ascii_start();
    let is_utf16 = [&b"\xff\xfe"[..], b"\xfe\xff", b"{\0", b"\0{"].iter().any(|begin| text.starts_with(begin));
    if is_utf16 {
        Some("it is UTF-16; save it as UTF-8")
    } else if text.starts_with(b"\xef\xbb\xbf") {
        Some("it begins with a byte order mark (BOM); save it as UTF-8 without BOM")
    } else if rest.is_empty() {
        Some("it is empty")
    } else if std::str::from_utf8(text).is_err() {
        Some("it is not UTF-8")
    } else if is_comment(text, error) {
        Some("it has comments, and JSON has none; remove them")
    } else if !rest.starts_with(b"{") && !rest.starts_with(b"[") && is_yaml(text) {
        Some("it is YAML; write it as JSON, `{\"stream\": \"ORDERS\", ...}`")
    } else {
        None
    }
}

/// Whether the parser stopped where a comment begins.
fn is_comment(text: &[u8], error: &serde_json::Error) -> bool {
    let line = text.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let at = line.get(error.column().saturating_sub(1)..).unwrap_or_default();
    at.starts_with(b"#") || at.starts_with(b"//") || at.starts_with(b"/*")
}

/// Whether the first line that says something is a key or the beginning of a YAML document.
fn is_yaml(text: &[u8]) -> bool {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.into_iter().find(|line| !line.is_empty() && !line.starts_with(b"#")).unwrap_or_default();
    let first = first.strip_prefix(b"- ").unwrap_or(first);
    let end = first.iter().position(|byte| *byte == b':').unwrap_or_default();
    let (key, rest) = first.split_at(end);
    let is_key = !key.is_empty() && key.iter().all(|byte| is_plain(*byte)) && matches!(rest, b":" | [b':', b' ', ..]);
    first.starts_with(b"---") || first.starts_with(b"%YAML") || is_key
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-\"' ".contains(&byte)
}

/// Reads the value at one path.
struct JsonReader<'a> {
    path: &'a str,
    problems: &'a RefCell<Vec<Problem>>,
}

impl<'de> DeserializeSeed<'de> for JsonReader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for JsonReader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        loop {
            let path = join(self.path, &values.len().to_string());
            match seq.next_element_seed(JsonReader { path: &path, problems: self.problems })? {
                Some(value) => values.push(value),
                None => return Ok(values.into()),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let path = join(self.path, &key);
            let value = map.next_value_seed(JsonReader { path: &path, problems: self.problems })?;
            let message = format!("`{}` occurs more than once; keep one of them", shorten(&key));
            if fields.insert(key, value).is_some() {
                let mut problems = self.problems.borrow_mut();
                if problems.iter().all(|known| known.path != path) {
                    problems.push(Problem::new(path, message));
                }
            }
        }
        Ok(fields.into())
    }
}

/// JSON knows one kind of number: `1.0` and `1e3` are whole.
pub(super) fn whole_numbers(value: &Value) -> Value {
    const EXACT: f64 = (1_u64 << 53) as f64;
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && (0.0..=EXACT).contains(&float) => {
                Value::from(float as u64)
            }
            _ => value.clone(),
        },
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(field, value)| (field.clone(), whole_numbers(value))).collect())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_that_occurs_twice_is_a_problem_with_its_path() {
        let check = |text: &str, expect: &[&str]| {
            let json = Json::read(text.as_bytes()).unwrap();
            let paths: Vec<_> = json.problems.iter().map(|problem| problem.path.as_str()).collect();
            assert_eq!(paths, expect, "{text}");
        };
        check(r#"{"a": 1, "b": {"a": 1}}"#, &[]);
        check(r#"{"a": 1, "a": 1}"#, &["/a"]);
        check(r#"{"a": 1, "a": 2, "a": 3}"#, &["/a"]);
        // The same key by another spelling.
        check(r#"{"a": 1, "\u0061": 2}"#, &["/a"]);
        check(r#"{"l": [{}, {"x/y": {}, "x/y": {}}]}"#, &["/l/1/x~1y"]);
        check(r#"{"a": {"b": 1, "b": 2}, "c": 1, "a": 5, "c": 2}"#, &["/a/b", "/a", "/c"]);
        let problem = &Json::read(br#"{"a": 1, "a": 2}"#).unwrap().problems[0];
        assert_eq!(problem.message, "`a` occurs more than once; keep one of them");
    }

    #[test]
    fn values_are_those_of_the_parser() {
        let texts = [
            r#"{"a": [1, -1, 1.5, 1e3, 18446744073709551615, true, null, "x\u00e9\ud83d\ude00"], "b": {}}"#,
            "5",
            "\"text\"",
            "null",
        ];
        for text in texts {
            let plain: Value = serde_json::from_str(text).unwrap();
            assert_eq!(Json::read(text.as_bytes()).unwrap(), Json { value: plain, problems: Vec::new() });
        }
    }

    #[test]
    fn problems_of_the_text_come_before_those_of_its_value() {
        let twice = || Json::read(br#"{"a": 1, "a": 2}"#).unwrap();
        assert_eq!(twice().checked(Ok(1)).unwrap_err().0.len(), 1);
        let both = twice().checked::<()>(Err(Problems(vec![Problem::new("/a", "is wrong")]))).unwrap_err();
        assert_eq!(both.to_string(), "`a` occurs more than once; keep one of them; is wrong");
        assert_eq!(Json { value: json!({}), problems: Vec::new() }.checked(Ok(1)), Ok(1));
    }

    #[test]
    fn what_is_not_json_is_named() {
        let check = |text: &[u8], expect: &str| {
            let message = Json::read(text).unwrap_err().to_string();
            let expect = format!("the document is not valid JSON: {expect}");
            assert!(message.starts_with(&expect), "{}: {message}", String::from_utf8_lossy(text));
        };
        check(b"\xef\xbb\xbf{}", "it begins with a byte order mark");
        check(b"\xff\xfe{\0}\0", "it is UTF-16");
        check(b"\xfe\xff\0{\0}", "it is UTF-16");
        check(b"{\0}\0", "it is UTF-16");
        check(b"{\"a\": \"\xe9\"}", "it is not UTF-8");
        check(b" \n", "it is empty");
        check(b"{\n  // the copy\n  \"a\": 1}", "it has comments");
        check(b"{\"a\": 1, /* x */ \"b\": 2}", "it has comments");
        check(b"{\"a\": 1} # end", "it has comments");
        check(b"# first\n{\"a\": 1}", "it has comments");
        check(b"stream: ORDERS\nsource_url: nats://u:hunter2@h", "it is YAML");
        check(b"---\nstream: ORDERS\n", "it is YAML");
        check(b"- stream: ORDERS\n", "it is YAML");
        check(b"# a copy\nstream: ORDERS\n", "it");
        check(b"{\"a\": 1,}", "trailing comma");
        check(b"{'a': 1}", "key must be a string");
        check(b"nats://host", "expected");
        check("[".repeat(50_000).as_bytes(), "recursion limit");
        // A text with what begins a comment elsewhere is no comment.
        assert!(Json::read(br#"{"a": "nats://h # x"}"#).is_ok());
    }
}
