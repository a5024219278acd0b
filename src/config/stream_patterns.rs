//! Replications of many streams: `streams` and `exclude_streams` of a document, and the documents that it makes, one for each
//! stream. Pure.

use std::collections::BTreeSet;

use serde_json::{Map, Value};
use wildmatch::WildMatch;

use super::schema::shorten;
use crate::names;

/// What stands for the name of the source stream in `target_stream`.
pub(super) const STREAM_FIELD: &str = "{stream}";

/// Which streams of a source are replicated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamPatterns {
    /// A stream matches one of these...
    pub include: Vec<String>,
    /// ... and none of these.
    pub exclude: Vec<String>,
    /// Name of the target stream, as written.
    pub target_stream: String,
}

impl StreamPatterns {
    /// The patterns of a document; `None` if it is one of a single stream, or cannot be read.
    pub fn of(document: &Value) -> Option<Self> {
        let texts = |field: &str| -> Option<Vec<String>> {
            let Some(list) = document.get(field) else { return Some(Vec::new()) };
            list.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
        };
        let include = texts("streams").filter(|include| !include.is_empty())?;
        let target_stream = document["target_stream"].as_str().unwrap_or_default().to_owned();
        Some(Self { include, exclude: texts("exclude_streams")?, target_stream })
    }

    /// Whether a stream matches.
    pub fn matches(&self, stream: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| WildMatch::new(pattern).matches(stream));
        any(&self.include) && !any(&self.exclude)
    }

    /// The streams that match. Where source and target are in one account, the targets of the others are none of them.
    pub fn select(&self, all: impl IntoIterator<Item = String>, one_account: bool) -> BTreeSet<String> {
        let mut matching: BTreeSet<String> = all.into_iter().filter(|stream| self.matches(stream)).collect();
        if one_account {
            let into = |stream: &String| Some(self.target(stream)).filter(|target| target != stream);
            let targets: BTreeSet<String> = matching.iter().filter_map(into).collect();
            matching.retain(|stream| !targets.contains(stream));
        }
        matching
    }

    /// Name of the target of a stream.
    fn target(&self, stream: &str) -> String {
        match self.target_stream.as_str() {
            "" => stream.to_owned(),
            name => name.replace(STREAM_FIELD, stream),
        }
    }

    /// For the status.
    pub fn shown(&self) -> String {
        shorten(&self.include.join(",")).into_owned()
    }
}

/// The id of the document itself, whose replications have ids that begin with it: `id`, or the name of its link.
pub(super) fn family_id(document: &Value) -> Option<String> {
    let field = |field: &str| document[field].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    field("id").or_else(|| field("link"))
}

/// Id of the replication of one stream.
pub fn member_id(family: &str, stream: &str) -> String {
    format!("{family}.{}", names::key_token(stream))
}

/// The document of one stream.
pub fn member_document(family: &str, document: &Map<String, Value>, stream: &str) -> Map<String, Value> {
    let own = |field: &String| !matches!(field.as_str(), "streams" | "exclude_streams" | "stream" | "id");
    let fields = document.iter().filter(|(field, _)| own(field));
    let mut member: Map<_, _> = fields.map(|(field, value)| (field.clone(), value.clone())).collect();
    member.insert("id".to_owned(), member_id(family, stream).into());
    member.insert("stream".to_owned(), stream.into());
    member
}

/// Writes the name of the source stream into that of the target.
pub(super) fn fill_in(document: &mut Map<String, Value>) {
    let Some(Value::String(stream)) = document.get("stream").cloned() else { return };
    if let Some(Value::String(target)) = document.get_mut("target_stream") {
        *target = target.replace(STREAM_FIELD, &stream);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn streams_match_one_pattern_and_no_exclusion() {
        let check = |document: Value, expect: Option<&[&str]>| {
            let all = ["ORDERS_EU", "ORDERS_US", "EVENTS", "OTHER"];
            let found = StreamPatterns::of(&document)
                .map(|patterns| patterns.select(all.map(str::to_owned), false).into_iter().collect::<Vec<_>>());
            assert_eq!(found, expect.map(|expect| expect.iter().map(|one| (*one).to_owned()).collect()), "{document}");
        };
        check(json!({"streams": ["ORDERS_*", "EVENTS"]}), Some(&["EVENTS", "ORDERS_EU", "ORDERS_US"]));
        check(json!({"streams": ["*"], "exclude_streams": ["ORDERS_*", "OTHER"]}), Some(&["EVENTS"]));
        check(json!({"streams": ["NONE"]}), Some(&[]));
        check(json!({"streams": []}), None);
        check(json!({"streams": "ORDERS"}), None);
        check(json!({"streams": [5]}), None);
        check(json!({"streams": ["A"], "exclude_streams": 5}), None);
        check(json!({"stream": "ORDERS"}), None);
    }

    #[test]
    fn copies_in_the_account_of_their_source_are_not_copied_again() {
        let check = |target: &str, one_account: bool, expect: &[&str]| {
            let patterns = StreamPatterns::of(&json!({"streams": ["*"], "target_stream": target})).unwrap();
            let found = patterns.select(["A", "B", "EU_A", "EU_EU_A", "ALL"].map(str::to_owned), one_account);
            assert_eq!(found.into_iter().collect::<Vec<_>>(), expect, "{target}");
        };
        check("EU_{stream}", true, &["A", "ALL", "B"]);
        check("EU_{stream}", false, &["A", "ALL", "B", "EU_A", "EU_EU_A"]);
        check("ALL", true, &["A", "B", "EU_A", "EU_EU_A"]);
        check("", true, &["A", "ALL", "B", "EU_A", "EU_EU_A"]);
    }

    #[test]
    fn each_stream_has_a_document_of_its_own() {
        let document =
            json!({"link": "eu", "streams": ["*"], "exclude_streams": ["X"], "target_stream": "EU_{stream}"});
        let mut member = member_document("eu", document.as_object().unwrap(), "a+b");
        assert_eq!(
            Value::Object(member.clone()),
            json!({"id": "eu.a=2Bb", "link": "eu", "stream": "a+b", "target_stream": "EU_{stream}"})
        );
        fill_in(&mut member);
        assert_eq!(member["target_stream"], "EU_a+b");
        assert_eq!(family_id(&document).as_deref(), Some("eu"));
        assert_eq!(family_id(&json!({"id": "x", "link": "eu"})).as_deref(), Some("x"));
    }
}
