//! Heartbeats: what people write ([`HeartbeatsDocument`]) and what runs ([`Heartbeats`]).

use std::{collections::BTreeMap, ops::RangeInclusive, path::PathBuf, sync::LazyLock, time::Duration};

use nats_lane::{Connection, Endpoint, ServerRef, Tls, endpoint, parse_duration};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings, transform::RecursiveTransform};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    ChoriaDocument, Problem, Problems, TlsDocument,
    patterns::{Wildcards, wrong_subject},
    schema::{Schema, join, shorten},
};
use crate::names::{HEARTBEAT_SUBJECT_HEADER, ORIGINATOR_HEADER};

/// Where nothing is said.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
/// Shorter intervals are no heartbeats; with longer ones a missing heartbeat goes unnoticed.
const INTERVALS: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(24 * 60 * 60);
/// Headers that we give a value, or that would make all heartbeats but the first a duplicate.
const NOT_YOURS: [&str; 3] = [ORIGINATOR_HEADER, HEARTBEAT_SUBJECT_HEADER, "Nats-Msg-Id"];

pub(super) static HEARTBEATS: LazyLock<Schema> = LazyLock::new(|| {
    // What each field is without a value is said in its description.
    let without_defaults = RecursiveTransform(|schema: &mut schemars::Schema| {
        schema.remove("default");
    });
    let settings = SchemaSettings::draft2020_12().for_deserialize().with_transform(without_defaults);
    Schema::new(SchemaGenerator::new(settings).into_root_schema_for::<HeartbeatsDocument>().to_value())
});

/// The JSON schema of heartbeats.
pub fn heartbeats_schema() -> &'static Value {
    &HEARTBEATS.root
}

/// Heartbeats as they are written. `***` instead of a secret keeps the stored secret; `{}` removes the stored
/// heartbeats.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Heartbeats")]
pub struct HeartbeatsDocument {
    /// Servers and identity, as in a replication document: `nats://user:password@host:port`. Required.
    pub url: String,
    /// Subjects to publish on, 1 to 256, each on its own interval. Required.
    #[schemars(length(max = 256))]
    pub subjects: Vec<HeartbeatDocument>,
    /// Time between two heartbeats on a subject that says nothing else, 100ms to 1d. Default: 10s.
    #[schemars(length(max = 64))]
    pub interval: String,
    /// Headers of all heartbeats, at most 64. Default: none but `Choria-SR-Originator` and `Choria-SR-Subject`.
    #[schemars(extend("maxProperties" = 64))]
    pub headers: BTreeMap<String, String>,
    /// Whether only the instance publishes that wins Choria's leader election `SR_<site>_HB` on these servers. Default:
    /// false, every instance publishes.
    pub leader_election: bool,
    /// TLS files. Default: the certificate authorities of the system.
    pub tls: TlsDocument,
    /// An identity of Choria's. Default: none.
    pub choria: ChoriaDocument,
}

/// One subject.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Heartbeat")]
pub struct HeartbeatDocument {
    /// Where a stream listens. Required.
    #[schemars(length(max = 1024))]
    pub subject: String,
    /// Time between two heartbeats, 100ms to 1d. Default: that of all.
    #[schemars(length(max = 64))]
    pub interval: String,
    /// Headers, at most 64: instead of those of the same name for all, and beside the others. Default: none.
    #[schemars(extend("maxProperties" = 64))]
    pub headers: BTreeMap<String, String>,
}

/// Heartbeats that can run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeats {
    /// Where to publish.
    pub place: ServerRef,
    /// Whether only an elected instance publishes.
    pub leader_election: bool,
    /// On which subjects; never empty, no subject twice.
    pub subjects: Vec<Heartbeat>,
}

/// One subject with everything that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// The subject, without wildcards.
    pub subject: String,
    /// Time between two, 100 ms to 1 d.
    pub interval: Duration,
    /// Headers beside ours.
    pub headers: Vec<(String, String)>,
}

/// Checks heartbeats and turns them into what runs; `None` where nothing (`null` or `{}`) is asked for. All problems come
/// at once. `judge` is asked about the place, if it can be read.
pub fn parse_heartbeats(
    value: &Value,
    judge: impl FnOnce(&ServerRef) -> Vec<Problem>,
) -> Result<Option<Heartbeats>, Problems> {
    let value = without_nulls(value);
    if is_nothing(&value) {
        return Ok(None);
    }
    let mut checker = HeartbeatChecker { problems: HEARTBEATS.check(&value).problems };
    let heartbeats = checker.heartbeats(&value, judge);
    match heartbeats {
        Some(heartbeats) if checker.problems.is_empty() => Ok(Some(heartbeats)),
        _ => {
            checker.problems.sort_by(|a, b| a.path.cmp(&b.path));
            checker.problems.dedup();
            Err(Problems(checker.problems))
        }
    }
}

/// Whether this asks for no heartbeats.
fn is_nothing(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty)
}

/// A field without a value is as good as none: in YAML people leave it so.
pub(super) fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(field, value)| (field.clone(), without_nulls(value))).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(without_nulls).collect()),
        other => other.clone(),
    }
}

/// Collects problems while the fields are read one by one.
struct HeartbeatChecker {
    problems: Vec<Problem>,
}

impl HeartbeatChecker {
    fn problem(&mut self, path: &str, message: String) {
        self.problems.push(Problem::new(path, message));
    }

    /// Whether something is wrong with a field or below it.
    fn is_refused(&self, path: &str) -> bool {
        let inside = format!("{path}/");
        self.problems.iter().any(|problem| problem.path == path || problem.path.starts_with(&inside))
    }

    fn heartbeats(&mut self, value: &Value, judge: impl FnOnce(&ServerRef) -> Vec<Problem>) -> Option<Heartbeats> {
        let fields = value.as_object()?;
        let kept = fields.iter().filter(|(field, _)| !self.is_refused(&join("", field)));
        let kept: Map<_, _> = kept.map(|(field, value)| (field.clone(), value.clone())).collect();
        let document: HeartbeatsDocument = match serde_json::from_value(Value::Object(kept)) {
            Ok(document) => document,
            // Not the parser's words: they may quote a secret.
            Err(_) => {
                self.problem("", "the document cannot be read".to_owned());
                return None;
            }
        };
        let place = self.place(&document);
        if let Some(place) = &place {
            self.problems.extend(judge(place));
        }
        let interval = self.interval("/interval", &document.interval).unwrap_or(DEFAULT_INTERVAL);
        self.headers("/headers", &document.headers);
        let subjects = self.subjects(&document, interval);
        Some(Heartbeats { place: place?, leader_election: document.leader_election, subjects })
    }

    fn place(&mut self, document: &HeartbeatsDocument) -> Option<ServerRef> {
        let tls = self.tls(&document.tls);
        let (choria, wrong) = document.choria.identity("choria");
        self.problems.extend(wrong);
        if document.url.is_empty() {
            if !self.is_refused("/url") {
                self.problem("/url", "`url` is required".to_owned());
            }
            return None;
        }
        if endpoint::is_masked(&document.url) {
            self.problem("/url", "`url`: `***` stands for a secret that is not here: write the secret".to_owned());
            return None;
        }
        let endpoint = Endpoint::parse(&document.url).and_then(|endpoint| {
            let files = Tls { ca: tls.ca, cert: tls.cert, key: tls.key, ..endpoint.tls.clone() };
            endpoint.with_tls(files)
        });
        let endpoint = endpoint.and_then(|endpoint| match choria {
            Some(choria) => choria.at(endpoint),
            None => Ok(endpoint),
        });
        match endpoint {
            Ok(endpoint) => Some(ServerRef::Known(Box::new(Connection::to(endpoint)))),
            Err(error) => {
                self.problem("/url", format!("`url`: {error}"));
                None
            }
        }
    }

    fn tls(&mut self, tls: &TlsDocument) -> TlsDocument {
        let file = |file: &Option<PathBuf>| file.clone().filter(|file| !file.as_os_str().is_empty());
        let tls = TlsDocument { ca: file(&tls.ca), cert: file(&tls.cert), key: file(&tls.key) };
        let missing = match (&tls.cert, &tls.key) {
            (Some(_), None) => "key",
            (None, Some(_)) => "cert",
            _ => return tls,
        };
        self.problem("/tls", format!("`tls` has no `{missing}`: `cert` and `key` go together"));
        tls
    }

    fn interval(&mut self, path: &str, text: &str) -> Option<Duration> {
        if text.is_empty() {
            return None;
        }
        let interval = parse_duration(text).and_then(|interval| {
            let possible = INTERVALS.contains(&interval).then_some(interval);
            possible.ok_or_else(|| "must be from `100ms` to `1d`".to_owned())
        });
        let name = dotted(path);
        interval.map_err(|wrong| self.problem(path, format!("`{name}` is `{}`: it {wrong}", shorten(text)))).ok()
    }

    fn headers(&mut self, path: &str, headers: &BTreeMap<String, String>) {
        for (name, value) in headers {
            let legal = |c: char| c.is_ascii_graphic() && c != ':';
            let wrong = if name.is_empty() || name.len() > 128 || !name.chars().all(legal) {
                "the name of a header has 1 to 128 characters of ASCII, without blanks and `:`"
            } else if let Some(ours) = NOT_YOURS.iter().find(|ours| ours.eq_ignore_ascii_case(name)) {
                match *ours {
                    "Nats-Msg-Id" => "with the same id all heartbeats but the first would be duplicates",
                    _ => "this header is set for each heartbeat",
                }
            } else if value.len() > 4096 || value.chars().any(char::is_control) {
                "the value of a header has at most 4096 bytes, without line breaks"
            } else {
                continue;
            };
            self.problem(&join(path, name), format!("header `{}`: {wrong}", shorten(name)));
        }
    }

    fn subjects(&mut self, document: &HeartbeatsDocument, interval: Duration) -> Vec<Heartbeat> {
        if document.subjects.is_empty() && !self.is_refused("/subjects") {
            self.problem("/subjects", "`subjects` is required: one or more `{\"subject\": ...}`".to_owned());
        }
        let mut subjects: Vec<Heartbeat> = Vec::new();
        for (index, one) in document.subjects.iter().enumerate() {
            let path = format!("/subjects/{index}");
            self.subject(&format!("{path}/subject"), &one.subject);
            if subjects.iter().any(|other| other.subject == one.subject) {
                let message = format!("subject `{}` is there twice", shorten(&one.subject));
                self.problem(&format!("{path}/subject"), message);
            }
            self.headers(&format!("{path}/headers"), &one.headers);
            subjects.push(Heartbeat {
                subject: one.subject.clone(),
                interval: self.interval(&format!("{path}/interval"), &one.interval).unwrap_or(interval),
                headers: merged(&document.headers, &one.headers),
            });
        }
        subjects
    }

    fn subject(&mut self, path: &str, subject: &str) {
        let of_server = ["$JS.", "$SYS.", "_INBOX."].iter().find(|start| subject.starts_with(**start));
        let wrong = match of_server {
            _ if subject.is_empty() => {
                return self.problem(path, format!("`{}` is required", dotted(path)));
            }
            Some(start) => Some(format!("subjects that begin with `{start}` are the servers' own")),
            None => wrong_subject(subject, Wildcards::Refused),
        };
        if let Some(wrong) = wrong {
            self.problem(path, format!("`{}` is `{}`: {wrong}", dotted(path), shorten(subject)));
        }
    }
}

/// Both; a name that is in both has the value of `own`.
fn merged(all: &BTreeMap<String, String>, own: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let kept = all.iter().filter(|(name, _)| !own.keys().any(|other| other.eq_ignore_ascii_case(name)));
    kept.chain(own).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A JSON pointer for people.
fn dotted(path: &str) -> String {
    path.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use nats_lane::Auth;
    use serde_json::json;

    use super::*;
    use crate::choria::ChoriaIdentity;

    fn parse(value: &Value) -> Result<Option<Heartbeats>, Problems> {
        parse_heartbeats(value, |_| Vec::new())
    }

    /// The smallest document and more fields.
    fn with(more: Value) -> Value {
        let mut document = json!({"url": "nats://h", "subjects": [{"subject": "a.b"}]});
        document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        document
    }

    #[track_caller]
    fn refused(document: Value, expect: &[(&str, &str)]) {
        let problems = parse(&document).unwrap_err().0;
        let paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(paths, expect.iter().map(|(path, _)| *path).collect::<Vec<_>>(), "{document}: {problems:?}");
        for (problem, (_, text)) in problems.iter().zip(expect) {
            assert!(problem.message.contains(text), "{problem:?}");
        }
    }

    #[test]
    fn what_is_left_out_has_its_default_and_a_subject_its_own() {
        let heartbeats = parse(&with(json!({
            "interval": "1m", "headers": {"X-A": "all", "X-B": "all"}, "tls": null, "choria": {"collective": "mine"},
            "subjects": [{"subject": "a"}, {"subject": "b", "interval": "250ms", "headers": {"x-a": "own"}}]
        })));
        let heartbeats = heartbeats.unwrap().unwrap();
        let headers = |of: &[(&str, &str)]| -> Vec<(String, String)> {
            of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let expect = [
            Heartbeat {
                subject: "a".to_owned(),
                interval: Duration::from_secs(60),
                headers: headers(&[("X-A", "all"), ("X-B", "all")]),
            },
            Heartbeat {
                subject: "b".to_owned(),
                interval: Duration::from_millis(250),
                headers: headers(&[("X-B", "all"), ("x-a", "own")]),
            },
        ];
        assert_eq!(heartbeats.subjects, expect);
        let least = parse(&with(json!({}))).unwrap().unwrap();
        assert_eq!((least.subjects[0].interval, least.leader_election), (DEFAULT_INTERVAL, false));
        let ServerRef::Known(connection) = least.place else { panic!("{least:?}") };
        assert_eq!((&connection.endpoint.auth, connection.endpoint.requires_tls()), (&Auth::Anonymous, false));
    }

    #[test]
    fn nothing_asks_for_no_heartbeats() {
        for nothing in [json!(null), json!({}), json!({"url": null, "subjects": null})] {
            assert_eq!(parse(&nothing), Ok(None), "{nothing}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        refused(
            json!({"interval": "1", "urll": "nats://u:p@h", "leader_election": "yes", "subjects": [], "tls": {"key": "k"}}),
            &[
                ("/interval", "`interval` is `1`: it is not a duration"),
                ("/leader_election", "must be of type boolean"),
                ("/subjects", "`subjects` is required"),
                ("/tls", "no `cert`"),
                ("/url", "`url` is required"),
                ("/urll", "did you mean `url`?"),
            ],
        );
        refused(
            with(json!({"interval": "99ms", "subjects": [
                {"subject": "a.*", "interval": "2d"},
                {"subject": "$JS.API.INFO", "headers": {"a b": "c", "choria-sr-subject": "x", "nats-msg-id": "1", "d": "e\nf"}},
                {"subject": "a"}, {"subject": "a"}, {"interval": "1s"}
            ]})),
            &[
                ("/interval", "from `100ms` to `1d`"),
                ("/subjects/0/interval", "`subjects.0.interval` is `2d`: it must be from"),
                ("/subjects/0/subject", "wildcards are not possible here"),
                ("/subjects/1/headers/a b", "without blanks"),
                ("/subjects/1/headers/choria-sr-subject", "is set for each heartbeat"),
                ("/subjects/1/headers/d", "without line breaks"),
                ("/subjects/1/headers/nats-msg-id", "would be duplicates"),
                ("/subjects/1/subject", "the servers' own"),
                ("/subjects/3/subject", "is there twice"),
                ("/subjects/4/subject", "is required"),
            ],
        );
        refused(
            with(json!({"subjects": [{"subject": "a", "intervall": "1s"}]})),
            &[("/subjects/0/intervall", "did you mean `interval`?")],
        );
        refused(with(json!({"headers": {"a": 5}})), &[("/headers/a", "must be of type string")]);
        refused(with(json!({"url": "nats://u:***@h"})), &[("/url", "write the secret")]);
        refused(json!("nats://u:p@h"), &[("", "must be of type object")]);
    }

    #[test]
    fn an_identity_of_chorias_is_whole_and_goes_over_tls() {
        let files = json!({"seed_file": "/s", "jwt_file": "/j", "collective": "choria"});
        let endpoint = |more: Value| {
            let heartbeats = parse(&with(more)).unwrap().unwrap();
            let ServerRef::Known(connection) = heartbeats.place else { panic!("a context") };
            connection.endpoint
        };
        let tls = |tls: Value| endpoint(json!({"choria": files, "tls": tls}));
        let bare = endpoint(json!({"choria": files}));
        let Auth::Custom(identity) = &bare.auth else { panic!("{bare:?}") };
        assert_eq!(identity.downcast::<ChoriaIdentity>().map(|choria| choria.collective.as_str()), Some("choria"));
        assert!(bare.requires_tls() && bare.tls.insecure);
        assert!(!tls(json!({"ca": "/ca"})).tls.insecure);
        assert!(!tls(json!({"cert": "/c", "key": "/k"})).tls.insecure);
        let choria = |more: Value| with(json!({ "choria": more }));
        refused(choria(json!({"seed_file": "/s", "collective": "c"})), &[("/choria", "no `jwt_file`")]);
        refused(choria(json!({"seed_file": "/s", "jwt_file": "/j"})), &[("/choria/collective", "is required")]);
        refused(
            choria(json!({"seed_file": "/s", "jwt_file": "/j", "collective": "a*"})),
            &[("/choria/collective", "are whole tokens")],
        );
        refused(choria(json!({"seed": "/s"})), &[("/choria/seed", "did you mean `seed_file`?")]);
        let url = |url: &str| with(json!({"url": url, "choria": files}));
        refused(url("nats://u:p@h"), &[("/url", "remove one of them")]);
        refused(url("ws://h"), &[("/url", "write `wss://`")]);
    }
}
