//! What must hold for any input. Shared by the fuzz targets in `fuzz/` and by their bounded twins in `fuzz_twins.rs`.

use stream_replicator::config::{self, Endpoint, Mapping, mask_document, mask_url, unmask_document};

/// Stands for a password: nothing else looks like it.
pub const SECRET: &str = "5ecretPassw0rd5";

/// A document is any bytes.
pub fn document(bytes: &[u8]) {
    let parsed = config::parse(bytes, "SITE");
    let Ok(value) = config::to_value(bytes) else {
        assert!(parsed.is_err(), "what is no JSON object is a document");
        return;
    };
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
    // Behind a `?` stand options, which are file names and no secrets, and what stands in front of it is a host; in front of the first `:` stands the user; behind
    // the last `@` stands the host.
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
    let mapping = Mapping { prefix: prefix.to_owned(), remove: remove.to_owned() };
    let mapped = mapping.apply(subject);
    assert_eq!(mapped, model(prefix, remove, subject), "{mapping:?} of {subject:?}");
    let whole = mapped.is_empty() || mapped.split('.').all(|token| !token.is_empty());
    assert!(whole, "{mapping:?} makes {mapped:?} of {subject:?}");
    let blank = |text: &str| text.contains(|c: char| c.is_whitespace() || c.is_control());
    if !blank(prefix) && !blank(subject) {
        assert!(!blank(&mapped), "{mapping:?} makes {mapped:?} of {subject:?}");
    }
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
