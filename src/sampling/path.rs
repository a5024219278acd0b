//! A value in a JSON document by its path (gjson). Documents come from untrusted clients: they may be invalid JSON,
//! huge, or nested without end.
//!
//! Plain paths (keys and indexes between dots) are followed here: values outside of the path are skipped unread,
//! and nothing recurses. All others are left to the library, which needs valid JSON: that is checked first.

use std::{borrow::Cow, slice};

use serde::de::IgnoredAny;

/// Characters that make a path more than keys between dots (the gjson path syntax).
const SPECIAL: &[char] = &['*', '?', '|', '#', '@', '!', '{', '[', '(', '"', '~'];

/// Deepest nesting for the library, parts of which recurse.
const DEEPEST: usize = 128;

/// Bytes of a string that are read one by one, before a vectorized search is faster.
const SHORT: usize = 16;

/// A parsed path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    text: String,
    /// Its keys, if it is plain.
    keys: Option<Vec<String>>,
}

impl Path {
    /// Accepts any text; a path to nowhere finds no value.
    pub fn new(text: &str) -> Self {
        Self { text: text.to_owned(), keys: keys(text) }
    }

    /// The value there as text: a string without its quotes, a number or boolean as it is written. `None` where there
    /// is nothing, `null`, an object or an array.
    pub fn text<'a>(&self, json: &'a [u8]) -> Option<Cow<'a, str>> {
        let Some(keys) = &self.keys else { return self.library(json, text_of) };
        match Scan::new(json).find(keys)? {
            PathMatch::String { raw, escaped: false } => std::str::from_utf8(raw).ok().map(Cow::Borrowed),
            PathMatch::String { raw, escaped: true } => unescaped(raw).map(Cow::Owned),
            PathMatch::Nested(_) => None,
            PathMatch::Other(token) => {
                let token = std::str::from_utf8(token).ok()?;
                let first = *token.as_bytes().first()?;
                let known = matches!(token, "true" | "false") || first == b'-' || first.is_ascii_digit();
                known.then_some(Cow::Borrowed(token))
            }
        }
    }

    /// The value there as Choria's replicator writes it: as [`Path::text`], but an object or array as its JSON, and a number
    /// that is not written as a whole one by its value.
    pub fn any_text<'a>(&self, json: &'a [u8]) -> Option<Cow<'a, str>> {
        let Some(keys) = &self.keys else { return self.library(json, any_text_of) };
        match Scan::new(json).find(keys)? {
            PathMatch::Nested(raw) => std::str::from_utf8(raw).ok().map(Cow::Borrowed),
            PathMatch::Other(_) => self.text(json).map(by_value),
            PathMatch::String { .. } => self.text(json),
        }
    }

    /// Whether anything is there, also `null`.
    pub fn exists(&self, json: &[u8]) -> bool {
        match &self.keys {
            Some(keys) => Scan::new(json).find(keys).is_some(),
            None => self.library(json, |value| value.exists().then_some(())).is_some(),
        }
    }

    /// Whether the boolean `true` is there.
    pub fn is_true(&self, json: &[u8]) -> bool {
        match &self.keys {
            Some(keys) => matches!(Scan::new(json).find(keys), Some(PathMatch::Other(b"true"))),
            None => self.library(json, |value| (value.kind() == gjson::Kind::True).then_some(())).is_some(),
        }
    }

    fn library<T>(&self, json: &[u8], take: impl FnOnce(&gjson::Value<'_>) -> Option<T>) -> Option<T> {
        serde_json::from_slice::<IgnoredAny>(json).ok()?;
        if Scan::new(json).ends_deep() {
            return None;
        }
        let json = std::str::from_utf8(json).ok()?;
        take(&gjson::get(json, &self.text))
    }
}

fn any_text_of(value: &gjson::Value<'_>) -> Option<Cow<'static, str>> {
    match value.kind() {
        gjson::Kind::Array | gjson::Kind::Object => Some(Cow::Owned(value.json().to_owned())),
        gjson::Kind::Number => text_of(value).map(by_value),
        _ => text_of(value),
    }
}

/// A number as the Go program writes it: as it is if it consists of digits, else without an exponent.
fn by_value(number: Cow<'_, str>) -> Cow<'_, str> {
    let digits = number.strip_prefix('-').unwrap_or(&number);
    if digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return number;
    }
    number.parse::<f64>().map_or(number, |value| Cow::Owned(value.to_string()))
}

fn text_of(value: &gjson::Value<'_>) -> Option<Cow<'static, str>> {
    match value.kind() {
        gjson::Kind::String => Some(Cow::Owned(value.str().to_owned())),
        gjson::Kind::Number | gjson::Kind::True | gjson::Kind::False => Some(Cow::Owned(value.json().to_owned())),
        gjson::Kind::Null | gjson::Kind::Array | gjson::Kind::Object => None,
    }
}

/// The keys of a plain path; a backslash makes the next character part of its key.
fn keys(text: &str) -> Option<Vec<String>> {
    let mut keys = vec![String::new()];
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        let key = keys.last_mut()?;
        match c {
            '\\' => key.push(characters.next()?),
            '.' if key.is_empty() => return None,
            '.' => keys.push(String::new()),
            c if SPECIAL.contains(&c) => return None,
            c => key.push(c),
        }
    }
    keys.iter().all(|key| !key.is_empty()).then_some(keys)
}

/// The text of a string that has escapes.
fn unescaped(raw: &[u8]) -> Option<String> {
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice(&quoted).ok()
}

/// The meaning of a byte outside of strings.
#[derive(Clone, Copy)]
enum Class {
    Other,
    Quote,
    Open,
    Close,
}

static CLASSES: [Class; 256] = {
    let mut classes = [Class::Other; 256];
    classes[b'"' as usize] = Class::Quote;
    classes[b'{' as usize] = Class::Open;
    classes[b'[' as usize] = Class::Open;
    classes[b'}' as usize] = Class::Close;
    classes[b']' as usize] = Class::Close;
    classes
};

/// Skips the rest of a string, with its last quote.
fn pass_string(rest: &mut slice::Iter<'_, u8>) -> Option<()> {
    let mut near = SHORT;
    loop {
        match *rest.next()? {
            b'"' => return Some(()),
            b'\\' => _ = rest.next()?,
            _ => {}
        }
        near -= 1;
        if near == 0 {
            near = SHORT;
            let bytes = rest.as_slice();
            *rest = bytes[memchr::memchr2(b'"', b'\\', bytes)?..].iter();
        }
    }
}

enum PathMatch<'a> {
    /// The text between the quotes.
    String { raw: &'a [u8], escaped: bool },
    /// An object or array.
    Nested(&'a [u8]),
    /// A number, a word or garbage.
    Other(&'a [u8]),
}

/// Reads forward. Malformed input ends it.
struct Scan<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    fn new(json: &'a [u8]) -> Self {
        Self { json, at: 0 }
    }

    fn find(mut self, keys: &[String]) -> Option<PathMatch<'a>> {
        for key in keys {
            match self.next()? {
                b'{' => self.enter_member(key.as_bytes())?,
                b'[' => self.enter_element(key.parse().ok()?)?,
                _ => return None,
            }
        }
        match self.next()? {
            b'"' => {
                let (raw, escaped) = self.string()?;
                Some(PathMatch::String { raw, escaped })
            }
            b'{' | b'[' => {
                let begin = self.at;
                self.pass_nested()?;
                Some(PathMatch::Nested(&self.json[begin..self.at]))
            }
            _ => Some(PathMatch::Other(self.token())),
        }
    }

    /// The next byte that is not blank, without skipping it.
    fn next(&mut self) -> Option<u8> {
        let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        let rest = self.json.get(self.at..)?;
        self.at += rest.iter().take_while(|byte| blank(byte)).count();
        self.json.get(self.at).copied()
    }

    /// Skips this byte, if it is the next one.
    fn pass(&mut self, byte: u8) -> Option<()> {
        (self.next()? == byte).then(|| self.at += 1)
    }

    /// Goes to the value of a member of the object that begins here.
    fn enter_member(&mut self, key: &[u8]) -> Option<()> {
        self.pass(b'{')?;
        loop {
            if self.next()? != b'"' {
                return None;
            }
            let (name, escaped) = self.string()?;
            self.pass(b':')?;
            if name == key || (escaped && unescaped(name).is_some_and(|name| name.as_bytes() == key)) {
                return Some(());
            }
            self.pass_value()?;
            self.pass(b',')?;
        }
    }

    /// Goes to an element, counted from 0, of the array that begins here.
    fn enter_element(&mut self, index: usize) -> Option<()> {
        self.pass(b'[')?;
        for _ in 0..index {
            self.pass_value()?;
            self.pass(b',')?;
        }
        (self.next()? != b']').then_some(())
    }

    fn pass_value(&mut self) -> Option<()> {
        match self.next()? {
            b'"' => self.string().map(|_| ()),
            b'{' | b'[' => self.pass_nested(),
            _ => (!self.token().is_empty()).then_some(()),
        }
    }

    /// Skips the object or array that begins here. Most of a document is skipped so: byte by byte without a bounds
    /// check.
    fn pass_nested(&mut self) -> Option<()> {
        let mut rest = self.json.get(self.at..)?.iter();
        let mut depth = 0_usize;
        loop {
            match CLASSES[usize::from(*rest.next()?)] {
                Class::Other => {}
                Class::Quote => pass_string(&mut rest)?,
                Class::Open => depth += 1,
                Class::Close => {
                    depth -= 1;
                    if depth == 0 {
                        self.at = self.json.len() - rest.len();
                        return Some(());
                    }
                }
            }
        }
    }

    /// Whether any part of the document is nested too deeply.
    fn ends_deep(mut self) -> bool {
        let mut depth = 0_usize;
        while let Some(byte) = self.json.get(self.at) {
            match byte {
                b'"' => match self.string() {
                    Some(_) => continue,
                    None => return true,
                },
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > DEEPEST {
                return true;
            }
            self.at += 1;
        }
        false
    }

    /// Skips the string that begins here; returns the text between its quotes, and whether there are escapes.
    fn string(&mut self) -> Option<(&'a [u8], bool)> {
        let begin = self.at + 1;
        let mut at = begin;
        let mut escaped = false;
        loop {
            let rest = self.json.get(at..)?;
            let stop = |byte: &u8| matches!(byte, b'"' | b'\\');
            let found = rest.iter().take(SHORT).position(stop);
            let found = found.or_else(|| Some(SHORT + memchr::memchr2(b'"', b'\\', rest.get(SHORT..)?)?))?;
            at += found;
            if self.json[at] == b'"' {
                self.at = at + 1;
                return Some((&self.json[begin..at], escaped));
            }
            escaped = true;
            at += 2;
        }
    }

    /// Skips a value that is neither string, object nor array.
    fn token(&mut self) -> &'a [u8] {
        let rest = &self.json[self.at..];
        let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
        let length = rest.iter().position(ends).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn values_as_chorias_replicator_writes_them() {
        let check = |json: &str, expect: Option<&str>, exists| {
            for path in ["a", "a|@this"] {
                let path = Path::new(path);
                assert_eq!(path.any_text(json.as_bytes()).as_deref(), expect, "{json} {path:?}");
                assert_eq!(path.exists(json.as_bytes()), exists, "{json} {path:?}");
            }
        };
        check(r#"{"a":{"b":[1, 2]},"c":1}"#, Some(r#"{"b":[1, 2]}"#), true);
        check(r#"{"a":[1,"}"]}"#, Some(r#"[1,"}"]"#), true);
        for (number, text) in [("1e3", "1000"), ("1000", "1000"), ("-7", "-7"), ("1.50", "1.5"), ("123e-2", "1.23")] {
            check(&format!(r#"{{"a":{number}}}"#), Some(text), true);
        }
        check(r#"{"a":true}"#, Some("true"), true);
        check(r#"{"a":false}"#, Some("false"), true);
        check(r#"{"a":"n1"}"#, Some("n1"), true);
        check(r#"{"a":null}"#, None, true);
        check(r#"{"b":1}"#, None, false);
        check("no JSON", None, false);
    }

    #[track_caller]
    fn check(json: &str, path: &str, expect: Option<&str>) {
        assert_eq!(Path::new(path).text(json.as_bytes()).as_deref(), expect, "{json} {path}");
    }

    #[test]
    fn values_are_found_by_their_path() {
        let json = r#" { "a" : {"b.c": "dot", "b": [1, {"x": "deep"}, [2, "in"]]}, "s": "n1.example.net",
            "n": -12.50, "t": true, "f":false, "z": null, "e": "", "q\"": "quote", "sen\u0064er": "é\n" } "#;
        check(json, "s", Some("n1.example.net"));
        check(json, "a.b\\.c", Some("dot"));
        check(json, "a.b.0", Some("1"));
        check(json, "a.b.1.x", Some("deep"));
        check(json, "a.b.2.1", Some("in"));
        check(json, "a.b.3", None);
        check(json, "n", Some("-12.50"));
        check(json, "t", Some("true"));
        check(json, "f", Some("false"));
        check(json, "e", Some(""));
        check(json, "sender", Some("é\n"));
        check(json, "q\\\"", Some("quote"));
        for nothing in ["z", "a", "a.b", "x", "s.x", "a.x", ".a", "a.", "", "a..b", "\\"] {
            check(json, nothing, None);
        }
        // The library's part of the syntax.
        check(json, "a.b.#", Some("3"));
        check(json, "a.b.#(x==\"deep\").x", Some("deep"));
        check(json, "sen*", Some("é\n"));
        check(json, "a.b.#.x", None);
    }

    #[test]
    fn only_the_boolean_true_is_true() {
        let json = br#"{"a":true,"b":"true","c":1,"d":false,"e":{"f":true},"g":"x"}"#;
        let is_true = |path: &str| Path::new(path).is_true(json);
        assert!(is_true("a") && is_true("e.f") && is_true("e.*"));
        for path in ["b", "c", "d", "e", "g", "x", "b*"] {
            assert!(!is_true(path), "{path}");
        }
    }

    #[test]
    fn what_is_no_json_finds_nothing_and_does_no_harm() {
        for json in [
            "",
            " ",
            "{",
            "[",
            "\"",
            "{\"",
            "{\"a",
            "{\"a\"",
            "{\"a\":",
            "{\"a\" 1}",
            "{a:1}",
            "{\"b\":1 \"a\":2}",
            "nul",
            "{\"a\":}",
            "{\"a\":,}",
            "[1,",
            "{\"b\":\"\\",
            "{\"a\":\"\\",
            "{\"a\":\"\\u12\"}",
            "}{",
            "{]",
            "{\"b\":]",
        ] {
            check(json, "a", None);
            check(json, "a.b", None);
            check(json, "1", None);
            check(json, "a*", None);
        }
        assert_eq!(Path::new("a").text(b"{\"a\":\"\xff\"}"), None);
        // PathMatch before what is wrong.
        check(r#"{"a":"x","b""#, "a", Some("x"));
        let deep = [r#"{"x":"#, &"[".repeat(1 << 20), &"]".repeat(1 << 20), r#","a":"x"}"#].concat();
        let found = |path: &str| Path::new(path).text(deep.as_bytes()).map(Cow::into_owned);
        assert_eq!((found("a").as_deref(), found("a*"), found("@ugly|a")), (Some("x"), None, None));
        assert_eq!(Path::new("a").text("[".repeat(1 << 20).as_bytes()), None);
    }

    #[test]
    fn both_parsers_agree_and_neither_panics() {
        let mut random = StdRng::seed_from_u64(7);
        let whole = br#"{"b":{"x":[{"a":"no"},2,"\"{"],"a":3},"c":[[],{}],"a":"va\\lue","d":{"a":{"a":true}}}"#;
        for path in ["a", "b.a", "b.x.0.a", "b.x.2", "d.a.a", "c.0", "b.x.1"] {
            let plain = Path::new(path);
            let library = Path { keys: None, ..plain.clone() };
            assert_eq!(plain.text(whole), library.text(whole), "{path}");
            for _ in 0..5_000 {
                let mut json = whole.to_vec();
                for _ in 0..random.random_range(1..4) {
                    let at = random.random_range(0..json.len());
                    match random.random_range(0..3) {
                        0 => json[at] = random.random(),
                        1 => json.truncate(at.max(1)),
                        _ => json[at] = *b"\"\\{}[]:,"[..].get(random.random_range(0..8)).unwrap_or(&b'"'),
                    }
                }
                let (one, other) = (plain.text(&json), library.text(&json));
                if other.is_some() {
                    assert_eq!(one, other, "{path} {}", String::from_utf8_lossy(&json));
                }
                assert!(plain.is_true(&json) || !library.is_true(&json));
            }
        }
    }
}
