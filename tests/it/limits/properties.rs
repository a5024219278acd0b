//! What must hold for any input. Shared by the fuzz targets in `fuzz/` and by their bounded twins in `fuzz_twins.rs`.

use std::{collections::BTreeSet, rc::Rc};

use chrono::{DateTime, Utc};
use nats_lane::{Endpoint, entropy, mask_url};
use stream_replicator::{
    config::{self, Mapping, mask_document, unmask_document},
    copy,
};

/// Stands for a password: nothing else looks like it.
pub const SECRET: &str = "5ecretPassw0rd5";

/// Every run has the same random numbers: batches of the writer have the id 7.
#[derive(Debug)]
struct Always;

impl entropy::Entropy for Always {
    fn random(&self) -> u64 {
        7 << 3
    }

    fn now(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH
    }
}

/// A server sends any bytes: nothing that reads them panics. Returns how many messages they were, `None` if they are not
/// the protocol.
pub fn wire(bytes: &[u8]) -> Option<usize> {
    entropy::stand_in(Some(Rc::new(Always)));
    let fed = copy::feed(bytes);
    entropy::stand_in(None);
    fed
}

/// A document is any bytes.
pub fn document(bytes: &[u8]) {
    let parsed = config::parse(bytes, "SITE");
    let Ok(config::Json { value, problems }) = config::Json::read(bytes) else {
        assert!(parsed.is_err(), "what is no JSON object is a document");
        return;
    };
    assert!(problems.is_empty() || parsed.is_err(), "a key occurs twice in what is a document");
    let masked = mask_document(&value);
    assert_eq!(mask_document(&masked), masked, "what is masked has nothing left to mask");
    let Ok(replication) = parsed else { return };
    assert_eq!(config::document_id(&value, "SITE").as_ref(), Some(&replication.id));
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte);
    assert!(replication.id.bytes().all(legal) && replication.id.split('.').all(|token| !token.is_empty()));
    for field in ["source_url", "target_url"] {
        if let Some(text) = value[field].as_str() {
            url(text);
            assert_eq!(masked[field], mask_url(text));
        }
    }
    let serde_json::Value::Object(mut back) = masked else { panic!("{masked}") };
    unmask_document(&mut back, Some(&value)).expect("all secrets are stored");
    for field in ["source_url", "target_url"] {
        let text =
            |value: Option<&serde_json::Value>| value.and_then(|url| url.as_str()).map(|url| url.trim().to_owned());
        assert_eq!(text(back.get(field)), text(value.get(field)), "sent back, it is what it was");
    }
}

/// A URL is any text.
pub fn url(text: &str) {
    let masked = mask_url(text);
    assert_eq!(mask_url(&masked).trim(), masked.trim(), "{text:?}");
    let Ok(endpoint) = Endpoint::parse(text) else { return };
    let shown = endpoint.to_string();
    assert_eq!(format!("{endpoint:?}"), format!("Endpoint({shown})"));
    for other in [masked, shown.clone()] {
        let again = Endpoint::parse(&other).unwrap_or_else(|error| panic!("{text:?} is shown as {other:?}: {error}"));
        assert_eq!(again.to_string(), shown, "{text:?} is shown as {other:?}");
        let same = (&again.hosts, &again.tls, again.scheme, again.connect_timeout)
            == (&endpoint.hosts, &endpoint.tls, endpoint.scheme, endpoint.connect_timeout);
        assert!(same, "{text:?} is shown as {other:?}");
    }
}

/// A password among any other text, in front of the `@`, is never shown.
pub fn secret_url(before: &str, after: &str, host: &str) {
    // Options follow a `?`; they are file names and no secrets, and the text before it is a host. The user precedes the first `:`, and
    // the host follows the last `@`.
    let is_user = !before.contains(':') && after.contains(':');
    if is_user
        || before.contains('?')
        || host.contains('@')
        || [before, after, host].iter().any(|text| text.contains(SECRET))
    {
        return;
    }
    let text = format!("nats://{before}{SECRET}{after}@{host}");
    if after.contains('?') && Endpoint::parse(&text).is_ok() {
        return;
    }
    let masked = mask_url(&text);
    assert!(!masked.contains(SECRET), "{text:?} is masked as {masked:?}");
    match Endpoint::parse(&text) {
        Ok(endpoint) => assert!(!format!("{endpoint} {endpoint:?}").contains(SECRET), "{text:?} is {endpoint}"),
        Err(error) => assert!(!error.contains(SECRET), "{text:?}: {error}"),
    }
    let json = serde_json::json!({"stream": text, "source_url": text, "target_url": [text], "other": {"x": text},
        "description": text, "max_age": text, "limits": {"messages_in_flight": text}, "tls": {"ca": text, "y": text}});
    if let Err(problems) = config::parse(json.to_string().as_bytes(), "SITE") {
        assert!(!format!("{problems:?} {problems}").contains(SECRET), "{text:?}: {problems}");
    }
    // A blank ends a URL in free text, and what it is then cut into is no URL.
    if !text.contains(char::is_whitespace) {
        let masked = mask_document(&json).to_string();
        assert!(!masked.contains(SECRET), "{text:?}: {masked}");
    }
}

/// The mapping of a subject against a second opinion.
pub fn mapping(prefix: &str, remove: &str, subject: &str) {
    let mapping = Mapping { transforms: Vec::new(), prefix: prefix.to_owned(), remove: remove.to_owned() };
    let mut room = b"left over".to_vec();
    let mapped = std::str::from_utf8(mapping.apply(subject.as_bytes(), &mut room)).expect("text stays text");
    // What is not mapped at all is not touched.
    let expect = if mapping.is_identity() { subject.to_owned() } else { model(prefix, remove, subject) };
    assert_eq!(mapped, expect, "{mapping:?} of {subject:?}");
    let whole = mapped.is_empty() || mapped.split('.').all(|token| !token.is_empty());
    assert!(whole || mapping.is_identity(), "{mapping:?} makes {mapped:?} of {subject:?}");
    let blank = |text: &str| text.contains(|c: char| c.is_whitespace() || c.is_control());
    if !blank(prefix) && !blank(subject) {
        assert!(!blank(mapped), "{mapping:?} makes {mapped:?} of {subject:?}");
    }
}

/// Transforms of two subjects: every text in a document is read or refused, and the claims about patterns hold for the
/// subjects in them. Single functions are compared with servers in `wire/subjects.rs`. Returns
/// whether they were read.
pub fn transforms(pairs: &[(&str, &str)], subjects: [&str; 2]) -> bool {
    let list: Vec<_> = pairs.iter().map(|(src, dest)| serde_json::json!({"src": src, "dest": dest})).collect();
    let document = serde_json::json!({"stream": "S", "source_url": "a", "target_url": "b", "subject_transforms": list});
    let mapping = match config::parse_value(&document, "SITE") {
        Ok(replication) => replication.mapping,
        Err(problems) => {
            for problem in &problems.0 {
                let path = &problem.path;
                assert!(
                    path.starts_with("/subject_transforms/") && !problem.message.is_empty(),
                    "{document}: {problems}"
                );
            }
            return false;
        }
    };
    let literal = |subject: &&str| subject.split('.').all(|token| !matches!(token, "" | "*" | ">"));
    let subjects: Vec<&str> = subjects.into_iter().filter(literal).collect();
    let mut room = Vec::new();
    let mut mapped = |subject: &str| mapping.apply(subject.as_bytes(), &mut room).to_vec();
    // Everything, and what only says how many tokens there are.
    let shapes = subjects.iter().map(|subject| vec!["*"; subject.split('.').count()].join("."));
    for from in [BTreeSet::from([">".to_owned()]), shapes.collect()] {
        let patterns = mapping.patterns(&from);
        for subject in &subjects {
            let mapped = mapped(subject);
            let held = patterns.iter().any(|pattern| holds(pattern, &mapped));
            // A token of deliminators alone vanishes.
            let vanishes = pairs.iter().any(|(_, dest)| dest.to_lowercase().contains("split"));
            assert!(held || vanishes, "{pairs:?}: {subject:?} is {:?}, not in {patterns:?}", mapped.escape_ascii());
        }
        if let [one, other] = subjects[..]
            && one != other
            && mapping.keeps_apart(&from)
        {
            assert_ne!(mapped(one), mapped(other), "{pairs:?}: {one:?} and {other:?}");
        }
    }
    true
}

/// Whether a subject is in a pattern.
fn holds(pattern: &str, subject: &[u8]) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    let subject: Vec<&[u8]> = subject.split(|byte| *byte == b'.').collect();
    let open = pattern.last() == Some(&">");
    let fixed = pattern.len() - usize::from(open);
    let fits = if open { subject.len() > fixed } else { subject.len() == fixed };
    fits && pattern[..fixed].iter().zip(&subject).all(|(token, found)| *token == "*" || token.as_bytes() == *found)
}

/// Letter by letter.
fn model(prefix: &str, remove: &str, subject: &str) -> String {
    let mut rest = if prefix.is_empty() { subject.to_owned() } else { [prefix, subject].join(".") };
    let mut mapped = String::new();
    while let Some(letter) = rest.chars().next() {
        if !remove.is_empty() && rest.starts_with(remove) {
            rest = rest[remove.len()..].to_owned();
            continue;
        }
        mapped.push(letter);
        rest = rest[letter.len_utf8()..].to_owned();
    }
    let mut clean = String::new();
    for letter in mapped.chars() {
        if letter != '.' || !(clean.is_empty() || clean.ends_with('.')) {
            clean.push(letter);
        }
    }
    clean.strip_suffix('.').unwrap_or(&clean).to_owned()
}
