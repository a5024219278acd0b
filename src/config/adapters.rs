//! Adapters: what people write ([`AdapterDocument`]) and what runs ([`Adapter`]). The fields are those of Choria's adapters, as
//! its Puppet module has them, with the fields of our connections beside them.

use std::{ops::RangeInclusive, path::PathBuf, sync::LazyLock};

use nats_lane::{Auth, Connection, Endpoint, ServerRef, Tls, check_context_name, endpoint};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings, transform::RecursiveTransform};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    ChoriaDocument, Problem, Problems, TlsDocument,
    heartbeats::without_nulls,
    patterns::{Wildcards, wrong_subject},
    schema::{Schema, join, shorten},
};
use crate::choria::adapter::{CHORIA_STREAMS, IngestProtocol, JETSTREAM, OutputProtocol, TrustedSigners};

/// Messages that wait for the target, where nothing is said.
const DEFAULT_QUEUE: u64 = 1_000;
const QUEUES: RangeInclusive<u64> = 1..=1_000_000;
/// Their bytes.
const DEFAULT_QUEUE_BYTES: u64 = 64 << 20;
const QUEUE_BYTES: RangeInclusive<u64> = 1 << 20..=4 << 30;
/// Members of the queue group, or connections.
const DEFAULT_WORKERS: u64 = 10;
const WORKERS: RangeInclusive<u64> = 1..=256;
/// What the names of marks are: an adapter of such a name would have the key of a mark.
const NOT_NAMES: [&str; 4] = ["paused", "release", "valid", "streams"];
/// Types of an adapter's stream.
const TYPES: [&str; 2] = ["jetstream", "choria_streams"];
/// What begins the subjects of the server's own.
const OF_SERVER: [&str; 3] = ["$JS.", "$SYS.", "_INBOX."];

pub(super) static ADAPTER: LazyLock<Schema> = LazyLock::new(|| {
    let without_defaults = RecursiveTransform(|schema: &mut schemars::Schema| {
        schema.remove("default");
    });
    let settings = SchemaSettings::draft2020_12().for_deserialize().with_transform(without_defaults);
    Schema::new(SchemaGenerator::new(settings).into_root_schema_for::<AdapterDocument>().to_value())
});

/// The JSON schema of an adapter.
pub fn adapter_schema() -> &'static Value {
    &ADAPTER.root
}

/// An adapter as it is written. `***` instead of a secret keeps the stored secret.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Adapter")]
pub struct AdapterDocument {
    /// Name: letters, digits, `-` and `_`. It is part of the queue group `nats_ingest_<name>`. Required.
    #[schemars(length(max = 64))]
    pub name: String,
    /// Messages that may wait for the target, 1 to 1,000,000; more are dropped and counted. Default: 1000.
    pub queue_len: Option<u64>,
    /// Bytes that may wait for the target, 1 MiB to 4 GiB. Default: 64 MiB.
    pub queue_bytes: Option<u64>,
    /// What is read. Required.
    pub ingest: AdapterIngestDocument,
    /// Where it is written. Required.
    pub stream: AdapterStreamDocument,
    /// `choria:adapters:choria_streams:output:1`, or `choria:adapters:jetstream:output:1` for readers that expect that, without
    /// the id of the request. Default: the former.
    #[schemars(length(max = 64))]
    pub output_protocol: String,
    /// Whether only one instance of the group reads, the one with the lease. Default: false, all share the messages.
    pub exclusive: bool,
    /// Whether messages are read from `ingest.stream` by a durable consumer, which is acknowledged when the target has stored them:
    /// nothing is lost while no instance runs. Default: false, the subject is subscribed to.
    pub durable: bool,
    /// Whether senders must have signed their messages (second version of the protocol) with the key of a token that one of
    /// `trusted_signers` has signed. Default: false, as in Choria.
    pub verify: bool,
    /// Public keys that sign the tokens of nodes, 64 hexadecimal digits each. Required with `verify`.
    #[schemars(length(max = 64))]
    pub trusted_signers: Vec<String>,
}

/// A side of an adapter: its own fields, and those of the connection, which both sides have.
macro_rules! adapter_side {
    ($(#[$about:meta])* pub struct $side:ident as $name:literal { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        #[schemars(rename = $name)]
        pub struct $side {
            $($own)*
            /// Servers, as in the URL of a replication: `nats://user:password@host:port`, or `host:port,host:port`. Default:
            /// those of the other side.
            pub servers: String,
            /// Context of the `nats` tool, instead of `servers`.
            #[schemars(length(max = 128))]
            pub context: String,
            /// Credentials file. Default: none.
            #[schemars(length(max = 4096))]
            pub credentials: String,
            /// TLS files. Default: the certificate authorities of the system.
            pub tls: TlsDocument,
            /// An identity of Choria's. Default: none.
            pub choria: ChoriaDocument,
        }

        impl $side {
            fn connection(&self, side: AdapterSide) -> AdapterSideFields<'_> {
                let Self { servers, context, credentials, tls, choria, .. } = self;
                AdapterSideFields { side, servers, context, credentials, tls, choria }
            }
        }
    };
}

adapter_side! {
    /// What an adapter reads.
    pub struct AdapterIngestDocument as "AdapterIngest" {
        /// Subject to read, wildcards allowed, such as `choria.broadcast.agent.registration`. Required.
        #[schemars(length(max = 1024))]
        pub topic: String,
        /// `request` for registration data, or `reply`. Default: reply.
        #[schemars(length(max = 16))]
        pub protocol: String,
        /// Members of the queue group that one instance is, 1 to 256: its share of the messages beside brokers. Default: 10.
        pub workers: Option<u64>,
        /// Stream that captures the topic, with `durable`. Required then.
        #[schemars(length(max = 255))]
        pub stream: String,
    }
}

adapter_side! {
    /// Where an adapter writes.
    pub struct AdapterStreamDocument as "AdapterStream" {
        /// `jetstream` or `choria_streams`, which are the same. Default: jetstream.
        #[serde(rename = "type")]
        #[schemars(length(max = 32))]
        pub kind: String,
        /// Subject to publish to, a subject of a stream; each `%s` becomes the sender, whose dots separate tokens. Default: the
        /// name.
        #[schemars(length(max = 1024))]
        pub topic: String,
        /// Read for the sake of Choria's documents: one connection publishes, and does not wait for one ack before the next
        /// message.
        pub workers: Option<u64>,
        /// A stream to create if there is none of this name. Default: none, the stream exists already.
        pub create: Option<AdapterCreateDocument>,
    }
}

/// A stream that an adapter creates; it is not changed later.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "AdapterCreate")]
pub struct AdapterCreateDocument {
    /// Name of the stream. Required.
    #[schemars(length(max = 255))]
    pub name: String,
    /// Its subjects. Default: everything below the tokens of `topic` before the first `%s`.
    #[schemars(length(max = 64))]
    pub subjects: Vec<String>,
    /// Replicas, 1 to 5. Default: 1.
    pub replicas: Option<u64>,
    /// Whether it is in memory. Default: false, in files.
    pub memory: bool,
    /// Messages that it keeps of each sender. Default: 5.
    pub max_msgs_per_subject: Option<u64>,
    /// Age at which it removes messages, such as `1d`. Default: 1d.
    #[schemars(length(max = 64))]
    pub max_age: String,
    /// Most bytes that it keeps. Default: no limit of its own.
    pub max_bytes: Option<u64>,
}

/// An adapter that can run.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Its name.
    pub name: String,
    /// Messages that may wait.
    pub queue_messages: usize,
    /// Bytes that may wait.
    pub queue_bytes: usize,
    /// Servers to read from.
    pub ingest: ServerRef,
    /// Subject to read.
    pub topic: String,
    /// What is read.
    pub protocol: IngestProtocol,
    /// Members of the queue group.
    pub workers: usize,
    /// Servers to publish to.
    pub target: ServerRef,
    /// Subject to publish to, with `%s`.
    pub target_topic: String,
    /// What is written.
    pub output: OutputProtocol,
    /// Name and configuration of a stream to create.
    pub create: Option<(String, Value)>,
    /// Whether only one instance of the group reads.
    pub exclusive: bool,
    /// The stream to read from, by a durable consumer.
    pub durable: Option<String>,
    /// Whose tokens senders must have, if signatures are verified.
    pub trusted: Option<TrustedSigners>,
}

impl Adapter {
    /// The queue group of all instances and brokers that share the messages, or the durable consumer of the instances.
    pub fn queue_group(&self) -> String {
        format!("nats_ingest_{}", self.name)
    }
}

/// Which connection of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterSide {
    /// The one that reads.
    Ingest,
    /// The one that publishes.
    Stream,
}

impl AdapterSide {
    /// The field of the document.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingest => "ingest",
            Self::Stream => "stream",
        }
    }
}

/// Checks a document and turns it into what runs. All problems come at once. `judge` is asked about the servers of each side
/// that names some.
pub fn parse_adapter(
    value: &Value,
    judge: impl Fn(AdapterSide, &ServerRef) -> Vec<Problem>,
) -> Result<Adapter, Problems> {
    let value = without_nulls(value);
    let mut checker = AdapterChecker { problems: ADAPTER.check(&value).problems };
    let adapter = checker.adapter(&value, judge);
    match adapter {
        Some(adapter) if checker.problems.is_empty() => Ok(adapter),
        _ => {
            checker.problems.sort_by(|a, b| a.path.cmp(&b.path));
            checker.problems.dedup();
            Err(Problems(checker.problems))
        }
    }
}

/// The name that a document has, if it has one.
pub fn adapter_name(value: &Value) -> Option<String> {
    value["name"].as_str().filter(|name| wrong_name(name).is_none()).map(str::to_owned)
}

/// Why this cannot be the name of an adapter.
pub fn wrong_name(name: &str) -> Option<&'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
        return Some("a name has 1 to 64 letters, digits, `-` and `_`");
    }
    NOT_NAMES.contains(&name).then_some("this name has a meaning of its own: choose another one")
}

/// The fields of a side that say where its servers are.
struct AdapterSideFields<'a> {
    side: AdapterSide,
    servers: &'a str,
    context: &'a str,
    credentials: &'a str,
    tls: &'a TlsDocument,
    choria: &'a ChoriaDocument,
}

/// Collects problems while the fields are read one by one.
struct AdapterChecker {
    problems: Vec<Problem>,
}

impl AdapterChecker {
    fn problem(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(Problem::new(path, message));
    }

    /// Whether something is wrong with a field or below it.
    fn is_refused(&self, path: &str) -> bool {
        let inside = format!("{path}/");
        self.problems.iter().any(|problem| problem.path == path || problem.path.starts_with(&inside))
    }

    fn adapter(&mut self, value: &Value, judge: impl Fn(AdapterSide, &ServerRef) -> Vec<Problem>) -> Option<Adapter> {
        let fields = value.as_object()?;
        let kept = fields.iter().filter(|(field, _)| !self.is_refused(&join("", field)));
        let kept: Map<_, _> = kept.map(|(field, value)| (field.clone(), value.clone())).collect();
        let Ok(document) = AdapterDocument::deserialize(Value::Object(kept)) else {
            // Not the parser's words: they may quote a secret.
            self.problem("", "the document cannot be read");
            return None;
        };
        if let Some(wrong) = wrong_name(&document.name).filter(|_| !self.is_refused("/name")) {
            self.problem("/name", format!("`name` is `{}`: {wrong}", shorten(&document.name)));
        }
        let AdapterDocument { ingest, stream, .. } = &document;
        let protocol = self.protocol(ingest);
        let topic = self.ingest_topic(ingest);
        let target_topic = self.target_topic(&document);
        self.kind(stream);
        let output = self.output(&document.output_protocol);
        let trusted = self.trusted(&document);
        let durable = self.durable(&document);
        let (ingest_server, target) = self.servers(&document, judge)?;
        let create = stream.create.as_ref().and_then(|create| self.create(create, &target_topic));
        self.range("/stream/workers", stream.workers, DEFAULT_WORKERS, WORKERS);
        Some(Adapter {
            queue_messages: self.range("/queue_len", document.queue_len, DEFAULT_QUEUE, QUEUES),
            queue_bytes: self.range("/queue_bytes", document.queue_bytes, DEFAULT_QUEUE_BYTES, QUEUE_BYTES),
            workers: self.range("/ingest/workers", ingest.workers, DEFAULT_WORKERS, WORKERS),
            name: document.name,
            ingest: ingest_server,
            topic,
            protocol,
            target,
            target_topic,
            output,
            create,
            exclusive: document.exclusive,
            durable,
            trusted,
        })
    }

    fn range(&mut self, path: &str, value: Option<u64>, default: u64, range: RangeInclusive<u64>) -> usize {
        let value = value.unwrap_or(default);
        if !range.contains(&value) {
            let (first, last) = range.into_inner();
            let name = path.trim_start_matches('/').replace('/', ".");
            self.problem(path, format!("`{name}` is {value}: it must be from {first} to {last}"));
        }
        usize::try_from(value).unwrap_or(usize::MAX)
    }

    fn protocol(&mut self, ingest: &AdapterIngestDocument) -> IngestProtocol {
        match ingest.protocol.as_str() {
            "" | "reply" => IngestProtocol::Reply,
            "request" => IngestProtocol::Request,
            other => {
                let message = format!("`ingest.protocol` is `{}`: it must be `request` or `reply`", shorten(other));
                self.problem("/ingest/protocol", message);
                IngestProtocol::Reply
            }
        }
    }

    fn ingest_topic(&mut self, ingest: &AdapterIngestDocument) -> String {
        let path = "/ingest/topic";
        if ingest.topic.is_empty() {
            if !self.is_refused("/ingest") {
                self.problem(path, "`ingest.topic` is required: the subject to read");
            }
        } else if let Some(wrong) = wrong_subject(&ingest.topic, Wildcards::Allowed) {
            self.problem(path, format!("`ingest.topic` is `{}`: {wrong}", shorten(&ingest.topic)));
        }
        ingest.topic.clone()
    }

    fn target_topic(&mut self, document: &AdapterDocument) -> String {
        let topic = &document.stream.topic;
        if topic.is_empty() {
            return document.name.clone();
        }
        let first = topic.split('.').next().unwrap_or_default();
        let wrong = if first.contains("%s") {
            Some("the first token must not have `%s`: a sender must not choose it".to_owned())
        } else if let Some(own) = OF_SERVER.iter().find(|own| topic.starts_with(**own)) {
            Some(format!("subjects that begin with `{own}` are the servers' own"))
        } else {
            wrong_subject(&topic.replace("%s", "s"), Wildcards::Refused)
        };
        if let Some(wrong) = wrong {
            self.problem("/stream/topic", format!("`stream.topic` is `{}`: {wrong}", shorten(topic)));
        }
        topic.clone()
    }

    fn kind(&mut self, stream: &AdapterStreamDocument) {
        let kind = stream.kind.as_str();
        if kind.is_empty() || TYPES.contains(&kind) {
            return;
        }
        let kinds = "it must be `jetstream` or `choria_streams`";
        let why = match kind {
            "nats_stream" | "natsstream" => "NATS Streaming ended in 2023",
            _ => "this type of adapter is unknown",
        };
        self.problem("/stream/type", format!("`stream.type` is `{}`: {why}; {kinds}", shorten(kind)));
    }

    fn output(&mut self, protocol: &str) -> OutputProtocol {
        match protocol {
            "" | CHORIA_STREAMS => OutputProtocol::ChoriaStreams,
            JETSTREAM => OutputProtocol::JetStream,
            other => {
                let message = format!(
                    "`output_protocol` is `{}`: it must be `{CHORIA_STREAMS}` or `{JETSTREAM}`",
                    shorten(other)
                );
                self.problem("/output_protocol", message);
                OutputProtocol::ChoriaStreams
            }
        }
    }

    fn trusted(&mut self, document: &AdapterDocument) -> Option<TrustedSigners> {
        let path = "/trusted_signers";
        if document.verify == document.trusted_signers.is_empty() {
            self.problem(path, "`verify` and `trusted_signers` go together: whose signatures count");
        }
        match TrustedSigners::new(document.trusted_signers.iter().map(String::as_str)) {
            Ok(trusted) => document.verify.then_some(trusted),
            Err(wrong) => {
                let message =
                    format!("`trusted_signers` has `{}`: a public key has 64 hexadecimal digits", shorten(wrong));
                self.problem(path, message);
                None
            }
        }
    }

    /// The stream that is read with `durable`.
    fn durable(&mut self, document: &AdapterDocument) -> Option<String> {
        let (path, stream) = ("/ingest/stream", &document.ingest.stream);
        if document.durable {
            self.stream_name(path, stream);
        } else if !stream.is_empty() {
            self.problem(path, "`ingest.stream` is read only with `durable`: set that, or remove the stream");
        }
        document.durable.then(|| stream.clone())
    }

    fn stream_name(&mut self, path: &str, name: &str) {
        let legal = |byte: u8| byte.is_ascii_graphic() && !b".*>/\\".contains(&byte);
        if name.is_empty() || !name.bytes().all(legal) {
            let field = path.trim_start_matches('/').replace('/', ".");
            let message =
                format!("`{field}` is required: the name of a stream, without blanks, `.`, `*`, `>` and slashes");
            self.problem(path, message);
        }
    }

    /// The servers of both sides; a side without any has those of the other one.
    fn servers(
        &mut self,
        document: &AdapterDocument,
        judge: impl Fn(AdapterSide, &ServerRef) -> Vec<Problem>,
    ) -> Option<(ServerRef, ServerRef)> {
        let ingest = document.ingest.connection(AdapterSide::Ingest);
        let stream = document.stream.connection(AdapterSide::Stream);
        if [&ingest, &stream].iter().all(|side| side.servers.is_empty() && side.context.is_empty()) {
            if !self.is_refused("/ingest") {
                self.problem("/ingest/servers", "`ingest.servers` is required, or `ingest.context`");
            }
            return None;
        }
        let mut read = |fields: &AdapterSideFields<'_>| {
            let server = self.server(fields);
            if let Some(server) = &server {
                self.problems.extend(judge(fields.side, server));
            }
            server
        };
        let (ingest, stream) = (read(&ingest), read(&stream));
        Some((ingest.clone().or(stream.clone())?, stream.or(ingest)?))
    }

    /// The servers of one side, if it names some and they can be read.
    fn server(&mut self, fields: &AdapterSideFields<'_>) -> Option<ServerRef> {
        let side = fields.side.name();
        let path = |field: &str| format!("/{side}/{field}");
        let (choria, wrong) = fields.choria.identity("choria");
        let wrong = wrong.into_iter();
        self.problems.extend(wrong.map(|one| Problem::new(format!("/{side}{}", one.path), one.message)));
        let file = |file: &Option<PathBuf>| file.clone().filter(|file| !file.as_os_str().is_empty());
        let (ca, cert, key) = (file(&fields.tls.ca), file(&fields.tls.cert), file(&fields.tls.key));
        if cert.is_some() != key.is_some() {
            self.problem(&path("tls"), format!("`{side}.tls`: `cert` and `key` go together"));
        }
        if fields.servers.is_empty() && fields.context.is_empty() {
            let alone = choria.is_some() || !fields.credentials.is_empty() || ca.is_some() || cert.is_some();
            if alone {
                self.problem(&path("servers"), format!("`{side}.servers` is required with an identity or TLS files"));
            }
            return None;
        }
        if !fields.context.is_empty() {
            return self.context(fields);
        }
        if endpoint::is_masked(fields.servers) {
            let message = format!("`{side}.servers`: `***` stands for a secret that is not here: write the secret");
            self.problem(&path("servers"), message);
            return None;
        }
        let endpoint = Endpoint::parse(fields.servers)
            .and_then(|endpoint| endpoint.clone().with_tls(Tls { ca, cert, key, ..endpoint.tls }))
            .and_then(|endpoint| with_credentials(endpoint, fields.credentials))
            .and_then(|endpoint| match choria {
                Some(choria) => choria.at(endpoint),
                None => Ok(endpoint),
            });
        match endpoint {
            Ok(endpoint) => Some(ServerRef::Known(Box::new(Connection::to(endpoint)))),
            Err(error) => {
                self.problem(&path("servers"), format!("`{side}.servers`: {error}"));
                None
            }
        }
    }

    fn context(&mut self, fields: &AdapterSideFields<'_>) -> Option<ServerRef> {
        let side = fields.side.name();
        let path = format!("/{side}/context");
        let more = !fields.servers.is_empty()
            || !fields.credentials.is_empty()
            || *fields.tls != TlsDocument::default()
            || *fields.choria != ChoriaDocument::default();
        if more {
            let message = format!("`{side}.context` has servers, identity and TLS files: remove the other fields");
            self.problem(&path, message);
            return None;
        }
        if let Err(wrong) = check_context_name(fields.context) {
            self.problem(&path, format!("`{side}.context` is `{}`: {wrong}", shorten(fields.context)));
            return None;
        }
        Some(ServerRef::Context { name: fields.context.to_owned(), over: Box::default(), under: Box::default() })
    }

    /// Name and configuration of the stream to create.
    fn create(&mut self, create: &AdapterCreateDocument, topic: &str) -> Option<(String, Value)> {
        let path = |field: &str| format!("/stream/create/{field}");
        self.stream_name(&path("name"), &create.name);
        let age = match create.max_age.as_str() {
            "" => "1d",
            age => age,
        };
        let age = nats_lane::parse_duration(age).map_err(|wrong| {
            self.problem(&path("max_age"), format!("`stream.create.max_age` is `{}`: it {wrong}", shorten(age)));
        });
        let replicas = self.range(&path("replicas"), create.replicas, 1, 1..=5);
        let subjects = match create.subjects.as_slice() {
            [] => vec![everything_below(topic)],
            subjects => subjects.to_vec(),
        };
        for (index, subject) in subjects.iter().enumerate() {
            if let Some(wrong) = wrong_subject(subject, Wildcards::Allowed) {
                let message = format!("`stream.create.subjects` has `{}`: {wrong}", shorten(subject));
                self.problem(&path(&format!("subjects/{index}")), message);
            }
        }
        let mut config = json!({
            "name": create.name,
            "subjects": subjects,
            "storage": if create.memory { "memory" } else { "file" },
            "num_replicas": replicas,
            "retention": "limits",
            "discard": "old",
            "max_msgs_per_subject": create.max_msgs_per_subject.unwrap_or(5),
            "max_age": u64::try_from(age.ok()?.as_nanos()).unwrap_or(u64::MAX),
            "duplicate_window": 120_000_000_000_u64,
        });
        if let Some(bytes) = create.max_bytes {
            config["max_bytes"] = bytes.into();
        }
        Some((create.name.clone(), config))
    }
}

/// The servers with a credentials file.
fn with_credentials(endpoint: Endpoint, file: &str) -> Result<Endpoint, String> {
    match &endpoint.auth {
        _ if file.is_empty() => Ok(endpoint),
        Auth::Anonymous => Ok(Endpoint { auth: Auth::CredentialsFile(file.into()), ..endpoint }),
        _ => Err("the URL has an identity, and `credentials` is another one: remove one of them".to_owned()),
    }
}

/// The subjects that a topic can become.
fn everything_below(topic: &str) -> String {
    let fixed: Vec<_> = topic.split('.').take_while(|token| !token.contains("%s")).collect();
    if fixed.len() == topic.split('.').count() { topic.to_owned() } else { format!("{}.>", fixed.join(".")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest document, and other fields.
    fn with(more: Value) -> Value {
        let mut document = json!({
            "name": "inventory",
            "ingest": {"topic": "choria.broadcast.agent.registration", "protocol": "request", "servers": "a:4222,b:4222"},
            "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s"},
        });
        merge(&mut document, more);
        document
    }

    fn merge(into: &mut Value, more: Value) {
        match (into, more) {
            (Value::Object(into), Value::Object(more)) => {
                more.into_iter().for_each(|(field, value)| merge(into.entry(field).or_insert(Value::Null), value));
            }
            (into, more) => *into = more,
        }
    }

    fn parse(more: Value) -> Result<Adapter, Problems> {
        parse_adapter(&with(more), |_, _| Vec::new())
    }

    #[track_caller]
    fn refused(more: Value, expect: &[(&str, &str)]) {
        let problems = parse(more.clone()).unwrap_err().0;
        let paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(paths, expect.iter().map(|(path, _)| *path).collect::<Vec<_>>(), "{more}: {problems:?}");
        for (problem, (_, text)) in problems.iter().zip(expect) {
            assert!(problem.message.contains(text), "{problem:?}");
        }
    }

    #[test]
    fn a_document_of_choria_is_read_with_its_defaults() {
        let adapter = parse(json!({})).unwrap();
        assert_eq!((adapter.queue_messages, adapter.workers, adapter.queue_bytes), (1_000, 10, 64 << 20));
        assert_eq!((adapter.protocol, adapter.output), (IngestProtocol::Request, OutputProtocol::ChoriaStreams));
        assert_eq!(adapter.queue_group(), "nats_ingest_inventory");
        assert_eq!(adapter.ingest, adapter.target);
        assert!(!adapter.exclusive && adapter.create.is_none() && adapter.durable.is_none());
        let durable = parse(json!({"durable": true, "ingest": {"stream": "IN"}})).unwrap();
        assert_eq!(durable.durable.as_deref(), Some("IN"));
        assert_eq!(parse(json!({"stream": {"topic": null}})).unwrap().target_topic, "inventory");
        assert_eq!(parse(json!({"ingest": {"protocol": null}})).unwrap().protocol, IngestProtocol::Reply);
        let old = parse(json!({"output_protocol": "choria:adapters:jetstream:output:1"})).unwrap();
        assert_eq!(old.output, OutputProtocol::JetStream);
        assert!(parse(json!({"stream": {"type": "choria_streams", "workers": 2}})).is_ok());
    }

    #[test]
    fn each_side_has_its_own_servers_or_those_of_the_other() {
        let both = parse(json!({"stream": {"servers": "c", "credentials": "/x"}})).unwrap();
        assert_ne!(both.ingest, both.target);
        assert_eq!(both.target.to_string(), "nats://c:4222?credentials=/x");
        let only = parse(json!({"ingest": {"servers": null}, "stream": {"servers": "c"}})).unwrap();
        assert_eq!(
            (only.ingest.to_string(), only.target.to_string()),
            ("nats://c:4222".into(), "nats://c:4222".into())
        );
        let context = parse(json!({"stream": {"context": "prod"}})).unwrap();
        assert!(matches!(context.target, ServerRef::Context { .. }));
    }

    #[test]
    fn problems_come_together_with_their_places() {
        refused(json!({"name": ""}), &[("/name", "1 to 64")]);
        refused(json!({"name": "paused"}), &[("/name", "meaning of its own")]);
        refused(json!({"name": "a.b"}), &[("/name", "`a.b`")]);
        refused(json!({"queue_len": 0, "queue_bytes": 1}), &[("/queue_bytes", "from 1048576"), ("/queue_len", "is 0")]);
        refused(json!({"queue_length": 5}), &[("/queue_length", "did you mean `queue_len`?")]);
        refused(json!({"ingest": {"topic": null}}), &[("/ingest/topic", "is required")]);
        refused(json!({"ingest": {"topic": "a b"}}), &[("/ingest/topic", "`a b`")]);
        refused(json!({"ingest": {"protocol": "requests"}}), &[("/ingest/protocol", "`request` or `reply`")]);
        refused(json!({"ingest": {"workers": 0}}), &[("/ingest/workers", "from 1 to 256")]);
        refused(json!({"ingest": {"servers": null}}), &[("/ingest/servers", "is required")]);
        refused(json!({"ingest": {"servers": "nats://u:***@h"}}), &[("/ingest/servers", "write the secret")]);
        refused(json!({"stream": {"type": "nats_stream"}}), &[("/stream/type", "NATS Streaming ended")]);
        refused(json!({"stream": {"type": "kafka"}}), &[("/stream/type", "unknown")]);
        refused(json!({"stream": {"topic": "%s"}}), &[("/stream/topic", "must not choose")]);
        refused(json!({"stream": {"topic": "$JS.API.%s"}}), &[("/stream/topic", "servers' own")]);
        refused(json!({"stream": {"topic": "a.>"}}), &[("/stream/topic", "`a.>`")]);
        refused(json!({"stream": {"credentials": "/x"}}), &[("/stream/servers", "is required with")]);
        refused(json!({"stream": {"context": "a", "servers": "b"}}), &[("/stream/context", "remove the other")]);
        refused(json!({"output_protocol": "x"}), &[("/output_protocol", "choria_streams")]);
        refused(json!({"verify": true}), &[("/trusted_signers", "go together")]);
        refused(json!({"verify": true, "trusted_signers": ["x"]}), &[("/trusted_signers", "64 hexadecimal")]);
        refused(json!({"ingest": {"tls": {"cert": "/c"}}}), &[("/ingest/tls", "go together")]);
        refused(json!({"durable": true}), &[("/ingest/stream", "is required")]);
        refused(json!({"durable": true, "ingest": {"stream": "a.b"}}), &[("/ingest/stream", "without blanks")]);
        refused(json!({"ingest": {"stream": "IN"}}), &[("/ingest/stream", "only with `durable`")]);
    }

    #[test]
    fn servers_are_judged_where_they_are_named() {
        let judged = parse_adapter(&with(json!({})), |side, server| {
            vec![Problem::new(format!("/{}/servers", side.name()), format!("{server} is not allowed"))]
        });
        let problems = judged.unwrap_err().0;
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].path, "/ingest/servers");
    }

    #[test]
    fn a_stream_to_create_takes_what_the_topic_becomes() {
        let create = |more: Value| parse(json!({"stream": {"create": more}})).unwrap().create.unwrap();
        let (name, config) = create(json!({"name": "CHORIA_REGISTRATION", "replicas": 3, "max_age": "2d"}));
        assert_eq!(name, "CHORIA_REGISTRATION");
        assert_eq!(config["subjects"], json!(["choria.stream.input.registration.>"]));
        assert_eq!((&config["num_replicas"], &config["max_age"]), (&json!(3), &json!(172_800_000_000_000_u64)));
        refused(json!({"stream": {"create": {}}}), &[("/stream/create/name", "is required")]);
        refused(json!({"stream": {"create": {"name": "A", "max_age": "x"}}}), &[("/stream/create/max_age", "`x`")]);
    }
}
