//! Every secret that the tests use, and the search for them in everything that the service prints or sends.
//!
//! [`secret`] makes one and [`register`] names one that comes from elsewhere; what stands in the documents and
//! arguments that the harness hands to the service is registered by itself, the contents of the files that they name
//! too. [`check`] is called with every log, reply, event, page and position record that the harness sees.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;

/// What is shorter is found everywhere.
const SHORTEST: usize = 5;

static KNOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn known() -> MutexGuard<'static, BTreeSet<String>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new secret, fit for any place.
pub fn secret() -> String {
    let text = format!("s3cret{}", nuid::next());
    register(&text);
    text
}

/// Nothing that the service prints or sends may hold this text from now on, in any spelling.
pub fn register(text: &str) {
    let decoded = percent_decode_str(text).decode_utf8_lossy().into_owned();
    let encoded = utf8_percent_encode(&decoded, NON_ALPHANUMERIC).to_string();
    let escaped = Value::from(decoded.as_str()).to_string();
    let escaped = escaped[1..escaped.len() - 1].to_owned();
    let spellings = [text.to_owned(), decoded, encoded, escaped];
    known().extend(spellings.into_iter().filter(|text| is_distinctive(text)));
}

/// A plain word, such as `secret`, stands in honest messages too.
fn is_distinctive(text: &str) -> bool {
    text.len() >= SHORTEST && !text.contains("***") && !text.bytes().all(|byte| byte.is_ascii_lowercase())
}

/// Registers what is secret in a document: passwords and tokens of URLs, and what lies in the files that it names.
pub fn register_document(document: &Value) {
    match document {
        Value::String(text) => text.split_whitespace().for_each(register_url),
        Value::Array(values) => values.iter().for_each(register_document),
        Value::Object(fields) => {
            fields.values().for_each(register_document);
            if let Some(Value::String(path)) = fields.get("key") {
                register_file(path);
            }
        }
        _ => {}
    }
}

/// Registers password or token of a URL, and what lies in the files of its options.
pub fn register_url(url: &str) {
    let Some((_, rest)) = url.split_once("://") else { return };
    let (servers, query) = rest.split_once('?').unwrap_or((rest, ""));
    for server in servers.split(',') {
        let server = server.split_once("://").map_or(server, |(_, rest)| rest);
        if let Some((user, _)) = server.rsplit_once('@') {
            register(user.split_once(':').map_or(user, |(_, password)| password));
        }
    }
    for option in query.split('&') {
        if let Some((_, path)) =
            option.split_once('=').filter(|(name, _)| ["credentials", "nkey", "jwt"].contains(name))
        {
            register_file(&percent_decode_str(path).decode_utf8_lossy());
        }
    }
}

/// Registers the lines of a seed, JWT, credentials or key file that are no words for people.
pub fn register_file(path: &str) {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().map(str::trim).filter(|line| line.len() >= 20);
    lines.filter(|line| !line.contains([' ', '*']) && !line.starts_with("--")).for_each(register);
}

/// The first secret in a text, with what stands around it.
pub fn found_in(text: &str) -> Option<String> {
    let known = known();
    let (secret, at) = known.iter().find_map(|secret| Some((secret, text.find(secret.as_str())?)))?;
    let around = &text.as_bytes()[at.saturating_sub(200)..(at + secret.len() + 100).min(text.len())];
    Some(format!("`{secret}` in: {}", String::from_utf8_lossy(around)))
}

/// Fails the test if a secret is in the text.
pub fn check(what: &str, text: &str) {
    if let Some(found) = found_in(text) {
        panic!("a secret is shown in {what}: {found}");
    }
}
