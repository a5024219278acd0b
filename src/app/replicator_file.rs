//! The file of Choria's replicator, checked: what it says becomes what runs.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use nats_lane::{Auth, Connection, Endpoint, MASK, ServerRef};
use serde_json::{Map, Value};

use crate::{
    allow::AllowList,
    choria::{ReplicatorYaml, YamlControl, YamlProblem},
    config::{
        LinkUse, MAX_DOCUMENT, Replication, URLS, adapter_name, document_id, link_name, named_link, resolve, shorten,
    },
    names::{self, ADAPTERS_PREFIX},
};

/// A file in which everything is right.
#[derive(Debug, Clone)]
pub struct ReplicatorFile {
    /// What it says.
    pub yaml: ReplicatorYaml,
    /// Its replications, in the order of the file.
    pub replications: Vec<Replication>,
    /// Their documents, with the fields of the links of the file.
    resolved: Vec<Value>,
    /// What is right and has no effect, with its line.
    pub notices: Vec<YamlProblem>,
    /// The control connection.
    pub server: ServerRef,
}

impl ReplicatorFile {
    /// Reads and checks a file. Everything that is wrong comes at once, each in a line of its own that begins with file and
    /// line. If `lenient`, unknown keys are notices.
    pub fn read(path: &Path, lenient: bool) -> Result<Self, Vec<String>> {
        Self::read_with(path, lenient, Value::clone)
    }

    /// The same for a file in whose URLs `***` may stand for a secret that is stored; its `server` is of no use.
    pub fn read_masked(path: &Path, lenient: bool) -> Result<Self, Vec<String>> {
        Self::read_with(path, lenient, |document| {
            let mut document = document.clone();
            for url in URLS.into_iter().chain(["url"]) {
                if let Some(Value::String(url)) = document.get_mut(url) {
                    *url = url.replace(MASK, "x");
                }
            }
            document
        })
    }

    /// `unmask` makes of a document what is checked.
    fn read_with(path: &Path, lenient: bool, unmask: impl Fn(&Value) -> Value) -> Result<Self, Vec<String>> {
        let placed = |problem: YamlProblem| format!("{}:{problem}", path.display());
        let text = fs::read(path).map_err(|error| vec![format!("{}: {error}", path.display())])?;
        let text = String::from_utf8(text).map_err(|error| {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            vec![placed(YamlProblem::new(line, "", "it is not a text in UTF-8"))]
        })?;
        let yaml = ReplicatorYaml::read(&text, lenient)
            .map_err(|problems| problems.into_iter().map(placed).collect::<Vec<_>>())?;
        Self::check(yaml, unmask).map_err(|problems| problems.into_iter().map(placed).collect())
    }

    fn check(yaml: ReplicatorYaml, unmask: impl Fn(&Value) -> Value) -> Result<Self, Vec<YamlProblem>> {
        let mut problems = Vec::new();
        let mut problem = |path: &str, message: String| {
            problems.push(YamlProblem::new(yaml.line(path), path, message));
        };
        if let Err(right) = names::check_token(&yaml.name) {
            problem("/name", format!("`name`: `{}` is not possible; it must be {right}", shorten(&yaml.name)));
        }
        let rules = AllowList::default();
        let mut links = BTreeMap::new();
        for (index, link) in yaml.links.iter().enumerate() {
            let (at, link) = (format!("/links/{index}"), Value::Object(link.clone()));
            let name = link_name(&link);
            let parsed = rules.parse_link(&unmask(&link), None).map(|link| link.fields).map_err(|found| {
                found.0.into_iter().for_each(|wrong| problem(&(at.clone() + &wrong.path), wrong.message));
                format!("link `{}` of this file is not valid", name.as_deref().unwrap_or_default())
            });
            let Some(name) = name else { continue };
            if links.insert(name.clone(), LinkUse { name: name.clone(), fields: parsed }).is_some() {
                problem(&at, format!("there is another link `{name}` in this file: give one another `name`"));
            }
        }
        let (mut replications, mut resolved) = (Vec::new(), Vec::new());
        let mut ids: BTreeMap<String, usize> = BTreeMap::new();
        for (index, stream) in yaml.streams.iter().enumerate() {
            let (at, written) = (format!("/streams/{index}"), Value::Object(stream.clone()));
            let link = named_link(&written).map(|name| in_file(&links, name));
            let document = match resolve(&unmask(&written), link.as_ref()) {
                Ok(Value::Object(fields)) => document(&fields),
                Ok(_) => continue,
                Err(found) => {
                    found.0.into_iter().for_each(|wrong| problem(&(at.clone() + &wrong.path), wrong.message));
                    continue;
                }
            };
            if let Some(wrong) = oversize(&document) {
                problem(&at, wrong);
            }
            match rules.parse_value(&document, &yaml.name) {
                Ok(replication) => {
                    replications.push(replication);
                    resolved.push(document.clone());
                }
                Err(found) => found.0.into_iter().for_each(|wrong| problem(&(at.clone() + &wrong.path), wrong.message)),
            }
            let Some(id) = document_id(&document, &yaml.name) else { continue };
            if let Some(first) = ids.get(&id) {
                let line = yaml.line(&format!("/streams/{first}"));
                let message =
                    format!("it is replication `{id}`, as the one in line {line}: give one a `name` of its own");
                problem(&at, message);
            } else {
                ids.insert(id, index);
            }
        }
        let heartbeats = rules.parse_heartbeats(&unmask(&yaml.heartbeats)).unwrap_or_else(|found| {
            found.0.into_iter().for_each(|wrong| problem(&format!("/heartbeats{}", wrong.path), wrong.message));
            None
        });
        let (mut adapters, mut refused_adapters) = (Vec::new(), Vec::new());
        for (index, document) in yaml.adapters.iter().enumerate() {
            let at = format!("/adapters/{index}");
            if adapter_name(document).is_none() {
                problem(&format!("{at}/name"), "an adapter needs a `name` of letters, digits, `-` and `_`".to_owned());
            }
            match rules.parse_adapter(&unmask(document)) {
                Ok(adapter) => adapters.push(adapter),
                // The others run all the same.
                Err(found) => refused_adapters.extend(found.0.into_iter().map(|wrong| {
                    let path = at.clone() + &wrong.path;
                    YamlProblem::new(yaml.line(&path), &path, format!("this adapter does not run: {}", wrong.message))
                })),
            }
        }
        let prefixes = [
            ("bucket_prefix", yaml.control.bucket_prefix.as_deref(), names::check_bucket_prefix as fn(&str) -> _),
            ("prefix", yaml.control.prefix.as_deref(), names::check_prefix),
        ];
        for (field, value, check) in prefixes {
            if let Some(value) = value
                && let Err(right) = check(value)
            {
                let wrong = format!("`control.{field}`: `{}` is not possible; it must be {right}", shorten(value));
                problem(&format!("/control/{field}"), wrong);
            }
        }
        let own = control_server(&yaml.control).unwrap_or_else(|(field, wrong)| {
            problem(&format!("/control/{field}"), format!("`control.{field}`: {wrong}"));
            None
        });
        let first = replications.first().map(|replication| replication.source.place.clone());
        let adapter = adapters.into_iter().next().map(|adapter| adapter.target);
        let server = own.or(first).or(heartbeats.map(|heartbeats| heartbeats.place)).or(adapter);
        let Some(server) = server.filter(|_| problems.is_empty()) else {
            problems.sort();
            return Err(problems);
        };
        let mut notices = notices(&yaml, &replications);
        notices.extend(refused_adapters);
        Ok(Self { yaml, replications, resolved, notices, server })
    }

    /// The documents by id.
    pub fn documents(&self) -> BTreeMap<String, Bytes> {
        let documents = self.replications.iter().zip(&self.resolved);
        let documents = documents.map(|(replication, document)| (replication.id.clone(), document.to_string().into()));
        let adapters = self.yaml.adapters.iter().filter_map(|document| {
            Some((format!("{ADAPTERS_PREFIX}{}", adapter_name(document)?), document.to_string().into()))
        });
        documents.chain(adapters).collect()
    }

    /// The links as documents, in the order of the file.
    pub fn links(&self) -> Vec<Value> {
        self.yaml.links.iter().cloned().map(Value::Object).collect()
    }

    /// The streams as documents, in the order of the file. What a stream leaves to its link, it still does.
    pub fn streams(&self) -> Vec<Value> {
        let of_stream = |(stream, resolved): (&Map<String, Value>, &Value)| match stream.contains_key("link") {
            true => with_link(stream, resolved),
            false => document(stream),
        };
        self.yaml.streams.iter().zip(&self.resolved).map(of_stream).collect()
    }

    /// Whether this file differs from another one in its streams at the most.
    pub fn has_streams_only(&self, other: &Self) -> bool {
        let rest = |file: &Self| {
            let ReplicatorYaml { name, heartbeats, control, monitor_port, loglevel, logfile, state_store, .. } =
                &file.yaml;
            let files = (logfile.clone(), state_store.clone());
            (name.clone(), heartbeats.clone(), control.clone(), *monitor_port, loglevel.clone(), files)
        };
        rest(self) == rest(other)
    }

    /// What the names of the buckets begin with. Sites that share a server have buckets of their own.
    pub fn bucket_prefix(&self) -> String {
        let own = self.yaml.control.bucket_prefix.clone();
        own.unwrap_or_else(|| format!("{}_{}", names::DEFAULT_BUCKET_PREFIX, self.yaml.name.replace('=', "_")))
    }

    /// Subject prefix of the service and of events.
    pub fn prefix(&self) -> String {
        self.yaml.control.prefix.clone().unwrap_or_else(|| names::DEFAULT_PREFIX.to_owned())
    }

    /// Where metrics are served, `HOST:PORT`, if anywhere.
    pub fn monitor(&self) -> Option<String> {
        (self.yaml.monitor_port > 0).then(|| format!("0.0.0.0:{}", self.yaml.monitor_port))
    }

    /// Folder of the files with what sampling knows of senders, for Choria's replicator.
    pub fn state_store(&self) -> Option<PathBuf> {
        self.yaml.state_store.clone().filter(|folder| !folder.as_os_str().is_empty())
    }

    /// Level of the log: as in the Go program, everything but `debug` and `warn` is `info`.
    pub fn log_level(&self) -> &'static str {
        match self.yaml.loglevel.as_str() {
            "debug" => "debug",
            "warn" => "warn",
            _ => "info",
        }
    }

    /// Where the log goes instead of standard error.
    pub fn log_file(&self) -> Option<PathBuf> {
        self.yaml.logfile.clone().filter(|file| !file.as_os_str().is_empty())
    }
}

/// A stream of the file as a document. Choria's replicator can take over again from where it stops, unless it begins again
/// at each start anyway, or resumes by what the target holds.
fn document(stream: &Map<String, Value>) -> Value {
    let mut document = stream.clone();
    let is = |field: &str| stream.get(field) == Some(&Value::Bool(true));
    if !is("ephemeral") && !is("target_initiated") {
        document.entry("hand_back").or_insert(Value::Bool(true));
    }
    // The readers of its copies expect the streams that it makes.
    document.entry("target_like_source").or_insert(Value::Bool(true));
    Value::Object(document)
}

/// A stream that names a link, with what [`document`] adds where neither of them says it.
fn with_link(stream: &Map<String, Value>, resolved: &Value) -> Value {
    let mut document = stream.clone();
    for field in ["hand_back", "target_like_source"] {
        if !stream.contains_key(field) && resolved[field] == Value::Bool(true) {
            document.insert(field.to_owned(), Value::Bool(true));
        }
    }
    Value::Object(document)
}

/// The link of this name. Those of the bucket do not count: a file says everything that it needs.
fn in_file(links: &BTreeMap<String, LinkUse>, name: &str) -> LinkUse {
    let missing =
        || format!("link `{}` is not in `links` of this file: add it there, or correct the name", shorten(name));
    let known = links.get(name).cloned();
    known.unwrap_or_else(|| LinkUse { name: name.to_owned(), fields: Err(missing()) })
}

/// A document beyond the size that the service accepts.
fn oversize(document: &Value) -> Option<String> {
    let size = document.to_string().len();
    (size > MAX_DOCUMENT).then(|| format!("the stream has {size} bytes as JSON, {MAX_DOCUMENT} are possible"))
}

/// What the fields say that have no effect, by the line of their stream.
fn notices(yaml: &ReplicatorYaml, replications: &[Replication]) -> Vec<YamlProblem> {
    let mut notices = yaml.notices.clone();
    for (index, replication) in replications.iter().enumerate() {
        let path = format!("/streams/{index}");
        notices.extend(replication.notices.iter().map(|notice| YamlProblem::new(yaml.line(&path), &path, notice)));
    }
    notices.sort();
    notices
}

/// The server that `control` names, if it names one; else the field that is wrong.
fn control_server(control: &YamlControl) -> Result<Option<ServerRef>, (&'static str, String)> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let credentials = control.credentials.clone().filter(|file| !file.as_os_str().is_empty());
    let Some(server) = given(&control.server) else {
        return match credentials {
            Some(_) => Err(("credentials", "it goes with `control.server`, which is missing".to_owned())),
            None => Ok(None),
        };
    };
    let mut endpoint = Endpoint::parse(&server).map_err(|wrong| ("server", wrong))?;
    if let Some(credentials) = credentials {
        if endpoint.auth != Auth::Anonymous {
            let wrong = "`control.server` has an identity already: remove one of them".to_owned();
            return Err(("credentials", wrong));
        }
        endpoint.auth = Auth::CredentialsFile(credentials);
    }
    Ok(Some(ServerRef::Known(Box::new(Connection::to(endpoint)))))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nats_lane::ServerRef;

    use super::*;
    use crate::config::{Inspect, Side, Start};

    /// A file's text, read.
    fn read(text: &str, lenient: bool) -> Result<ReplicatorFile, Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sr.yaml");
        fs::write(&path, text).unwrap();
        let from = format!("{}:", path.display());
        let short = |problem: String| problem.strip_prefix(&from).map(str::to_owned).unwrap_or(problem);
        ReplicatorFile::read(&path, lenient).map_err(|problems| problems.into_iter().map(short).collect())
    }

    fn good(text: &str) -> ReplicatorFile {
        read(text, false).unwrap_or_else(|problems| panic!("{problems:#?}"))
    }

    macro_rules! file {
        ($name:literal) => {
            good(include_str!(concat!("../../tests/it/choria/yaml/", $name, ".yaml")))
        };
    }

    fn endpoint(side: &Side) -> &Endpoint {
        let ServerRef::Known(connection) = &side.place else { panic!("{side:?}") };
        &connection.endpoint
    }

    fn ids(file: &ReplicatorFile) -> Vec<&str> {
        file.replications.iter().map(|replication| replication.id.as_str()).collect()
    }

    #[test]
    fn a_packaged_file() {
        let file = file!("01-packaged-default");
        assert_eq!((file.yaml.name.as_str(), ids(&file)), ("FRA1", vec!["ORDERS"]));
        assert_eq!((file.monitor().as_deref(), file.log_level()), (Some("0.0.0.0:9100"), "info"));
        assert_eq!(file.log_file(), Some("/var/log/stream-replicator.log".into()));
        let orders = &file.replications[0];
        assert_eq!((orders.target.stream.as_str(), orders.mapping.prefix.as_str()), ("ORDERS_COPY", "COPY"));
        assert_eq!((file.bucket_prefix(), &file.server), ("REPLICATOR_FRA1".to_owned(), &orders.source.place));
        assert_eq!(file.state_store(), Some("/var/lib/stream-replicator".into()));
    }

    #[test]
    fn streams_have_the_fields_of_the_links_of_the_file() {
        let head = "name: A\ntls:\n  ca: /ca.pem\nlinks:\n  - name: eu\n    source_url: nats://u:p@a\n    target_url: nats://b\n";
        let file =
            good(&format!("{head}    hand_back: false\nstreams:\n  - stream: S\n    link: eu\n    max_age: 1h\n"));
        let documents = file.documents();
        let document: Value = serde_json::from_slice(&documents["S"]).unwrap();
        let text = |field: &str| document[field].as_str().unwrap_or("-").to_owned();
        assert_eq!(
            (text("source_url"), text("max_age"), text("link")),
            ("nats://u:p@a".into(), "1h".into(), "-".into())
        );
        assert_eq!((&document["tls"]["ca"], &document["hand_back"]), (&"/ca.pem".into(), &false.into()));
        // As written, for the configuration of a service.
        let written = &file.streams()[0];
        assert_eq!((&written["link"], written.get("source_url"), written.get("tls")), (&"eu".into(), None, None));
        assert_eq!(file.links()[0]["source_url"], "nats://u:p@a");

        let wrong = |more: &str, expect: &str| {
            let problems = read(&format!("{head}{more}"), false).unwrap_err();
            assert!(problems.iter().any(|problem| problem.contains(expect)), "{problems:?}");
        };
        let stream = |link: &str| format!("streams:\n  - stream: S\n    link: {link}\n");
        wrong(&stream("us"), "10: streams[0].link: link `us` is not in `links` of this file");
        wrong(&format!("    stream: S\n{}", stream("eu")), "8: links[0].stream: `stream` belongs to one replication");
        wrong(&format!("  - name: eu\n{}", stream("eu")), "8: links[1]: there is another link `eu` in this file");
        wrong(&format!("    max_age: soon\n{}", stream("eu")), "8: links[0].max_age");
    }

    #[test]
    fn a_stream_beyond_the_size_of_a_document_is_refused() {
        let text = |length: usize| {
            let description = "x".repeat(length);
            format!(
                "name: A\nstreams:\n  - stream: S\n    source_url: nats://a\n    target_url: nats://b\n    filter_subjects: [{description}]\n"
            )
        };
        let found = read(&text(MAX_DOCUMENT), false).unwrap_err();
        assert!(
            found.iter().any(|problem| problem.starts_with("3: ") && problem.contains("are possible")),
            "{found:?}"
        );
    }

    #[test]
    fn starts_in_every_way() {
        let file = file!("03-starts-and-age");
        let starts: Vec<_> = file.replications.iter().map(|replication| replication.start.clone()).collect();
        let time = chrono::DateTime::parse_from_rfc3339("2020-05-01T04:30:00Z").unwrap().to_utc();
        let delta = Duration::from_secs(36 * 3600);
        assert_eq!(starts, [Start::Sequence(51), Start::Time(time), Start::Delta(delta), Start::AtEnd, Start::All]);
        assert_eq!(file.replications[4].max_age, Some(Duration::from_secs(7 * 86_400)));
        assert_eq!(ids(&file)[0], "METRICS.from-seq");
        assert_eq!(file.log_level(), "debug");
    }

    #[test]
    fn sampling_in_every_way() {
        let file = file!("04-registration-sampled");
        let sampling = file.replications[0].sampling.as_ref().unwrap();
        assert_eq!((sampling.warn, sampling.size_trigger), (Duration::from_secs(660), Some(1024)));
        assert!(sampling.advisory.as_ref().unwrap().reliable && sampling.force_field.as_deref() == Some("changed"));
        let file = file!("10-anchors-and-sampling-kinds");
        let how: Vec<_> = file.replications.iter().map(|r| r.sampling.as_ref().unwrap().inspect.clone()).collect();
        assert_eq!(how, [Inspect::Header("Choria-Identity".into()), Inspect::Token(2), Inspect::Subject]);
        assert_eq!(ids(&file), ["SENSORS.by-header", "SENSORS.by-token", "SENSORS.whole-subject"]);
        assert!(file.replications[2].scope.filters().is_empty());
    }

    #[test]
    fn the_most_specific_tls_applies_as_a_whole() {
        let file = file!("06-tls-levels");
        let files = |side: &Side| {
            let tls = endpoint(side).tls.clone();
            [tls.ca, tls.cert, tls.key]
                .map(|file| file.map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()))
        };
        let names = |names: [Option<&str>; 3]| names.map(|name| name.map(str::to_owned));
        let [billing, audit] = &file.replications[..] else { panic!() };
        assert_eq!(files(&billing.source), names([Some("ca.pem"), Some("sr.pem"), Some("sr.key")]));
        assert_eq!(files(&billing.target), names([Some("hub-ca.pem"), None, None]));
        assert_eq!(files(&audit.source), names([Some("audit-src-ca.pem"), Some("audit.pem"), Some("audit.key")]));
        assert_eq!(files(&audit.target), names([Some("audit-ca.pem"), None, None]));
        assert!(endpoint(&billing.target).tls.handshake_first && endpoint(&audit.target).tls.insecure);
    }

    #[test]
    fn the_most_specific_identity_applies_as_a_whole() {
        let file = file!("07-choria-jwt");
        let seed = |side: &Side| match &endpoint(side).auth {
            Auth::Custom(identity) => {
                let files = identity.files();
                files[0].1.file_name().unwrap().to_str().unwrap().to_owned()
            }
            other => format!("{other:?}").split(['(', ' ']).next().unwrap_or_default().to_owned(),
        };
        let [events, machine] = &file.replications[..] else { panic!() };
        assert_eq!([seed(&events.source), seed(&events.target)], ["choria.seed", "CredentialsFile"]);
        assert_eq!([seed(&machine.source), seed(&machine.target)], ["reader.seed", "NkeyFile"]);
    }

    #[test]
    fn the_other_files() {
        assert_eq!(ids(&file!("02-site-to-hub")), ["NODE_DATA.NODES"]);
        let file = file!("05-partitions-ha");
        assert_eq!(ids(&file), ["NODE_DATA.P0", "NODE_DATA.P1"]);
        assert_eq!(file.replications[0].leader_election_name.as_deref(), Some("replicator-a"));
        let file = file!("08-kv-ephemeral");
        assert_eq!((ids(&file), file.replications[1].create_target), (vec!["KV_SETTINGS", "EVENTS"], false));
        let file = file!("09-heartbeats-only");
        assert_eq!((ids(&file).len(), file.monitor().as_deref()), (0, Some("0.0.0.0:9101")));
        let heartbeats = AllowList::default().parse_heartbeats(&file.yaml.heartbeats).unwrap().unwrap();
        assert_eq!((heartbeats.subjects[1].interval, heartbeats.leader_election), (Duration::from_secs(3), true));
        assert_eq!(file.server, heartbeats.place);
    }

    const STREAM: &str = "name: A\nstreams:\n  - stream: S\n    source_url: nats://a\n    target_url: nats://b\n";

    #[test]
    fn what_is_wrong_is_said_with_its_line_and_field() {
        let stream = |more: &str| format!("{STREAM}    {more}\n");
        let top = |more: &str| format!("{STREAM}{more}\n");
        let wrong = [
            (String::new(), "1: name: `name`, the name of the site, is required"),
            ("name: A".to_owned(), "1: streams: there is nothing to do"),
            ("name: A\nstreams: []".to_owned(), "2: streams: there is nothing to do"),
            (
                STREAM.replace("name: A", "name: NO"),
                "1: name: `name` is `NO`, which YAML reads as the boolean false: put it in quotes",
            ),
            (
                STREAM.replace("name: A", "name: 17"),
                "1: name: `name` is `17`, which YAML reads as a number: put it in quotes",
            ),
            (
                STREAM.replace("name: A", "name: a.b"),
                "1: name: `name`: `a.b` is not possible; it must be 1 to 128 letters",
            ),
            (STREAM.replace("name: A", "name: [a]"), "1: name: `name` holds one value"),
            (
                stream("filter_subjcts: a.>"),
                "6: streams[0].filter_subjcts: `filter_subjcts` is unknown here; did you mean `filter_subject`? Choria's",
            ),
            (top("loglvl: info"), "6: loglvl: `loglvl` is unknown here; did you mean `loglevel`?"),
            (
                stream("advisory:\n      subjct: a"),
                "7: streams[0].advisory.subjct: `subjct` is unknown here; did you mean `subject`?",
            ),
            (stream("Stream: T"), "6: streams[0].stream: `stream` is there twice, first in line 3"),
            (top("name: B"), "6: name: `name` is there twice, first in line 1"),
            (STREAM.replace("stream: S", "name: x"), "3: streams[0].stream: `stream` is required"),
            (
                STREAM.replace("    source_url: nats://a\n", ""),
                "streams[0].source_url: `source_url` or `source_context` is required",
            ),
            (STREAM.replace("nats://b", "http://u:hunter2@b"), "5: streams[0].target_url: "),
            (
                format!("{STREAM}  - stream: S\n    source_url: nats://a\n    target_url: nats://c\n"),
                "6: streams[1]: it is replication `S`, as the one in line 3",
            ),
            (
                stream("inspect_duration: 10"),
                "6: streams[0].inspect_duration: `inspect_duration` is `10`: it must be a duration with its unit",
            ),
            (stream("max_age: 1H"), "6: streams[0].max_age: `max_age` is `1H`: it"),
            (stream("warn_duration: 1d12h"), "6: streams[0].warn_duration: "),
            (
                stream("start_time: yesterday"),
                "6: streams[0].start_time: `start_time` is `yesterday`: it is not a time",
            ),
            (
                stream("start_sequence: '51'"),
                "6: streams[0].start_sequence: `start_sequence` is `\"51\"`: it must be a whole number",
            ),
            (stream("start_sequence: -1"), "6: streams[0].start_sequence: `start_sequence` is `-1`"),
            (
                stream("target_initiated: 'yes'"),
                "6: streams[0].target_initiated: `target_initiated` is `\"yes\"`: it must be true or false, without quotes",
            ),
            (
                stream("size_trigger: many"),
                "6: streams[0].size_trigger: `size_trigger` is `many`: it must be a number of bytes",
            ),
            (
                stream("inspect_field: a\n    inspect_header: b"),
                "7: streams[0].inspect_header: `inspect_field` and `inspect_header`",
            ),
            (stream("advisory: yes"), "6: streams[0].advisory: `advisory` is not a mapping"),
            (stream("tls:\n      cert: /c"), "6: streams[0].tls: `tls` has no `key`"),
            (stream("choria:\n      seed_file: /s"), "6: streams[0].choria: `choria` has no `jwt_file`"),
            (
                top("monitor_port: 80800"),
                "6: monitor_port: `monitor_port` is `80800`: it must be a whole number from 0 to 65535",
            ),
            (top("streams: []"), "6: streams: `streams` is there twice"),
            ("name: A\nstreams: {stream: S}".to_owned(), "2: streams: `streams` is not a list"),
            (top("heartbeats:\n  url: nats://a"), "6: heartbeats.subjects: `subjects` is required"),
            (
                top("heartbeats:\n  url: nats://a\n  subjects: [{subject: a, interval: 0s}]"),
                "8: heartbeats.subjects[0].interval: `interval` is `0s`: it must be more than 0",
            ),
            (
                top("heartbeats:\n  url: nats://a\n  headers: {noop: true}\n  subjects: [{subject: a}]"),
                "8: heartbeats.headers.noop: `noop` is `true`, which YAML reads as the boolean true: put it in quotes",
            ),
            (
                top("control:\n  credentials: /c"),
                "7: control.credentials: `control.credentials`: it goes with `control.server`",
            ),
            ("name: A\n\tstreams: []".to_owned(), "it is not valid YAML"),
            ("name: A\nstreams: *link".to_owned(), "2: it is not valid YAML"),
            ("- name: A".to_owned(), "1: the file is a list"),
            ("name: A\n---\nname: B".to_owned(), "a second YAML document begins here"),
        ];
        for (text, expect) in wrong {
            let problems = read(&text, false).expect_err(&text);
            assert!(problems.iter().any(|problem| problem.contains(expect)), "{text}\n{expect}\n{problems:#?}");
            assert!(!problems.concat().contains("hunter2"), "{problems:#?}");
            assert!(problems.iter().all(|problem| problem.starts_with(|c: char| c.is_ascii_digit())), "{problems:#?}");
        }
    }

    #[test]
    fn everything_that_is_wrong_comes_at_once() {
        let text = format!("{STREAM}    filter_subjcts: a.>\n    max_age: 10\nloglvl: x\n");
        let problems = read(&text, false).unwrap_err();
        let lines: Vec<_> =
            problems.iter().map(|problem| problem.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines, ["6 streams[0].filter_subjcts", "7 streams[0].max_age", "8 loglvl"]);
    }

    #[test]
    fn lenient_warns_of_unknown_keys_and_of_nothing_else() {
        let text = format!("{STREAM}    filter_subjcts: a.>\n");
        let file = read(&text, true).unwrap();
        assert_eq!((file.notices[0].line, file.notices[0].field.as_str()), (6, "streams[0].filter_subjcts"));
        assert!(read(&format!("{text}    max_age: 10\n"), true).is_err());
    }

    #[test]
    fn what_the_go_program_reads_is_read() {
        let check = |more: &str, judge: fn(&Replication) -> bool| {
            let file = good(&format!("{STREAM}    {more}\n"));
            assert!(judge(&file.replications[0]), "{more}: {:?}", file.replications[0]);
        };
        check("start_sequence: 0x33", |r| r.start == Start::Sequence(51));
        check("NO_TARGET_CREATE: Yes", |r| !r.create_target);
        check("no_target_create: off", |r| r.create_target);
        check("max_age: ' 1h '", |r| r.max_age == Some(Duration::from_secs(3600)));
        check("max_age: ''", |r| r.max_age.is_none());
        check("max_age: -1h", |r| r.max_age.is_none());
        check("tls: ~", |r| endpoint(&r.source).tls.ca.is_none());
        check("tls: {ca: ''}", |r| endpoint(&r.source).tls.ca.is_none());
        check("inspect_field: a\n    inspect_duration: 1y\n    size_trigger: 1024.5", |r| {
            r.sampling.as_ref().is_some_and(|sampling| sampling.size_trigger == Some(1025))
        });
        let windows = format!("\u{feff}{}", STREAM.replace('\n', "\r\n"));
        assert_eq!(ids(&good(&windows)), ["S"]);
        assert_eq!(
            ids(&good(r#"{"name": "A", "streams": [{"stream": "S", "source_url": "a", "target_url": "b"}]}"#)),
            ["S"]
        );
    }

    #[test]
    fn what_works_here_only_is_noticed() {
        let file = good(&format!("{STREAM}    target_initiated: true\n    max_age: 1h\n"));
        let of = |field: &str| file.notices.iter().find(|notice| notice.field == format!("streams[0].{field}"));
        assert!(of("max_age").is_some_and(|notice| notice.line == 7 && notice.message.contains("refuses")));
        assert!(of("filter_subject").is_some());
    }

    #[test]
    fn control_has_a_server_of_its_own() {
        let control = "control: {server: 'nats://c', credentials: /c.creds, bucket_prefix: X, prefix: sr}\n";
        let file = good(&format!("{STREAM}{control}"));
        let ServerRef::Known(connection) = &file.server else { panic!() };
        assert_eq!(connection.endpoint.hosts[0].host, "c");
        assert_eq!(connection.endpoint.auth, Auth::CredentialsFile("/c.creds".into()));
        assert_eq!((file.bucket_prefix().as_str(), file.prefix().as_str()), ("X", "sr"));
    }
}
