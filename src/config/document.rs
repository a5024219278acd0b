//! The document as people write it.

mod notices;

use chrono::{DateTime, Utc};
use nats_lane::{
    Auth, Connection, ContextFields, Endpoint, ServerRef, Tls, check_context_name, endpoint, parse_duration,
    server_ref::{domain_prefix, looks_like_url, subject_prefix},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    AdvisorySettings, ChoriaDocument, Inspect, Json, Limits, Mapping, OnReject, OnSourceLoss, Problem, Problems,
    Replication, Sampling, Scope, SenderBounds, Sharing, Side, Start, TlsDocument, Transform, TransformDocument,
    json::whole_numbers,
    patterns::{self, Wildcards, wrong_subject},
    schema::{self, join, shorten},
    stream_patterns,
};
use crate::{
    choria::ChoriaIdentity,
    names::{self, HEARTBEATS_KEY, SITE_KEY},
    status::Ordering,
};

mod consumers;
mod limits;
mod loops;
mod native;
mod parts;
mod streams;
mod verify;

pub use self::{
    parts::{AdvisoryDocument, DeadLetterDocument, LimitsDocument},
    verify::VerifyDocument,
};

/// Longest id; it becomes part of keys and subjects.
const MAX_ID: usize = 512;

/// A replication document, field for field as written. `schemas/replication.json` says what each field means.
///
/// An optional text that is empty is the same as leaving the field out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Document {
    /// Source stream.
    pub stream: String,
    /// Patterns of source streams, instead of one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<String>,
    /// Streams that match one of these are not replicated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_streams: Vec<String>,
    /// Link that has defaults for the other fields.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Id of the replication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of this copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Target stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_stream: Option<String>,
    /// Where the source is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_url: Option<String>,
    /// Where the target is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_url: Option<String>,
    /// Where the source is, by a context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_context: Option<String>,
    /// Where the target is, by a context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_context: Option<String>,
    /// JetStream domain of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_domain: Option<String>,
    /// JetStream domain of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_domain: Option<String>,
    /// Prefix of the source's JetStream API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_api_prefix: Option<String>,
    /// Prefix of the target's JetStream API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_api_prefix: Option<String>,
    /// Only matching subjects are copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter_subject: Option<String>,
    /// Only subjects that match one of these are copied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filter_subjects: Vec<String>,
    /// Subjects that match one of these are not copied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude_subjects: Vec<String>,
    /// What subjects become.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subject_transforms: Vec<TransformDocument>,
    /// Goes in front of subjects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_subject_prefix: Option<String>,
    /// Is removed from subjects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_subject_remove: Option<String>,
    /// Start with the next message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_at_end: Option<bool>,
    /// Start with this sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_sequence: Option<u64>,
    /// Start this long ago.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_delta: Option<String>,
    /// Start at this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<String>,
    /// Skip what is older.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<String>,
    /// Do not create the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_target_create: Option<bool>,
    /// Our provenance comes before that of earlier hops.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_initiated: Option<bool>,
    /// Accepted, without effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<bool>,
    /// Candidate in Choria's leader election.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader_election_name: Option<String>,
    /// The durable consumer of Choria's replicator is moved along.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hand_back: Option<bool>,
    /// Decides about senders as Choria's replicator does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<String>,
    /// A created target is made like the whole source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_like_source: Option<bool>,
    /// Senders are identified by this field of the payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspect_field: Option<String>,
    /// Senders are identified by this header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspect_header: Option<String>,
    /// Senders are identified by this token of the subject.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspect_subject_token: Option<i64>,
    /// Where this field is true, the message is copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspect_force_field: Option<String>,
    /// How often each sender is copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inspect_duration: Option<String>,
    /// How long a sender may be unseen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warn_duration: Option<String>,
    /// Change of size that has a message copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_trigger: Option<u64>,
    /// Where to publish advisories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advisory: Option<AdvisoryDocument>,
    /// What becomes of messages that the target can never store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_reject: Option<String>,
    /// Where they go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<DeadLetterDocument>,
    /// Whether other writers may publish to the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_mode: Option<String>,
    /// Action when the source lost its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_source_loss: Option<String>,
    /// Whether to add missing settings to the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_update: Option<bool>,
    /// Whether messages that have been in the target stream before are skipped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loop_protection: Option<bool>,
    /// Sites of other groups that copy the target stream.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub target_origin: Vec<String>,
    /// Whether a refusal may change the order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ordering: Option<String>,
    /// Durable consumers of the source that the target gets too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub consumers: Vec<String>,
    /// Free text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsDocument>,
    /// TLS files of both sides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsDocument>,
    /// TLS files of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_tls: Option<TlsDocument>,
    /// TLS files of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_tls: Option<TlsDocument>,
    /// When both streams are compared by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyDocument>,
    /// `copy`, `mirror` or `source`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Where the leafnodes of the target are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_leaf_url: Option<String>,
    /// TLS of its own for the leafnodes of the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_leaf_tls: Option<TlsDocument>,
    /// An identity of Choria's for both sides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choria: Option<ChoriaDocument>,
    /// An identity of Choria's for the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_choria: Option<ChoriaDocument>,
    /// An identity of Choria's for the target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_choria: Option<ChoriaDocument>,
}

/// Checks a document (schema first, then what a schema cannot say) and turns it into what runs. `site` is the
/// default for `name`. All problems come at once.
pub fn parse(json: &[u8], site: &str) -> Result<Replication, Problems> {
    let json = Json::read(json)?;
    let result = parse_value(&json.value, site);
    json.checked(result)
}

/// [`parse`] for a document that was read already.
pub fn parse_value(value: &Value, site: &str) -> Result<Replication, Problems> {
    parse_judged(value, site, |_, _| Vec::new())
}

/// [`parse_value`] with a judge of places, who is asked about each side (`source`, `target`) whose place can be read,
/// whatever else is wrong with the document.
pub fn parse_judged(
    value: &Value,
    site: &str,
    judge: impl Fn(&str, &ServerRef) -> Vec<Problem>,
) -> Result<Replication, Problems> {
    let findings = schema::REPLICATION.check(value);
    let mut checker = Checker { problems: findings.problems, places: Vec::new() };
    let document = checker.readable_part(value);
    let replication = checker.replication(&document, site);
    for (side, place) in std::mem::take(&mut checker.places) {
        checker.problems.extend(judge(side, &place));
    }
    for problem in findings.patterns {
        if checker.problems.iter().all(|known| known.path != problem.path) {
            checker.problems.push(problem);
        }
    }
    match replication {
        Some(replication) if checker.problems.is_empty() => Ok(replication),
        _ => Err(checker.into_problems()),
    }
}

/// The id that a document claims, whatever else is wrong with it.
pub fn document_id(document: &Value, site: &str) -> Option<String> {
    let field = |field: &str| document.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    if stream_patterns::StreamPatterns::of(document).is_some() {
        return stream_patterns::family_id(document);
    }
    let stream = document.get("stream")?.as_str()?;
    Some(field("id").map_or_else(|| id(stream, field("name").filter(|name| *name != site)), str::to_owned))
}

/// What is under a key of the configuration bucket that no replication can have.
fn reserved(id: &str) -> Option<&'static str> {
    match id {
        HEARTBEATS_KEY => Some("under which the heartbeats are configured"),
        SITE_KEY => Some("of the site's own record"),
        _ => None,
    }
}

fn id(stream: &str, name: Option<&str>) -> String {
    match name {
        Some(name) => format!("{}.{}", names::key_token(stream), names::key_token(name)),
        None => names::key_token(stream).into_owned(),
    }
}

/// What a document says of one side: names and texts of its fields.
struct SideFields<'a> {
    side: &'static str,
    url: (&'static str, Option<&'a str>),
    context: (&'static str, Option<&'a str>),
    domain: (&'static str, Option<&'a str>),
    api_prefix: (&'static str, Option<&'a str>),
    own_tls: Option<&'a TlsDocument>,
    tls: Option<&'a TlsDocument>,
    /// The identity of Choria's that applies, and the field that it is in.
    choria: Option<(&'static str, &'a ChoriaDocument)>,
}

/// Collects problems while the fields are read one by one; a field with a problem reads as `None` or a default,
/// which is never shown, because a document with a problem is refused.
struct Checker {
    problems: Vec<Problem>,
    /// Where the sides are, as far as that can be read.
    places: Vec<(&'static str, ServerRef)>,
}

impl Checker {
    fn problem(&mut self, field: &str, message: String) {
        self.problems.push(Problem::new(join("", field), message));
    }

    /// The document without the fields that the schema refused, so that the others can be checked too.
    fn readable_part(&mut self, value: &Value) -> Document {
        let Value::Object(fields) = value else { return Document::default() };
        let refused = |field: &str| {
            let path = join("", field);
            let inside = format!("{path}/");
            self.problems.iter().any(|problem| problem.path == path || problem.path.starts_with(&inside))
        };
        let kept = fields.iter().filter(|(field, _)| !refused(field));
        let kept = kept.map(|(field, value)| (field.clone(), whole_numbers(value))).collect();
        serde_json::from_value(Value::Object(kept)).unwrap_or_else(|error| {
            self.problems.push(Problem::new("", format!("the document cannot be read: {error}")));
            Document::default()
        })
    }

    fn replication(&mut self, document: &Document, site: &str) -> Option<Replication> {
        self.link(document);
        let patterns = self.patterns_of_streams(document);
        let stream = match &patterns {
            Some(patterns) => Some(patterns.shown()),
            None => self.stream_name("stream", &document.stream),
        };
        let target_stream = match text(&document.target_stream) {
            Some(name) => self.stream_name("target_stream", name),
            None => stream.clone(),
        };
        let name = text(&document.name);
        let own_name = name.filter(|name| *name != site);
        if let Some(name) = name {
            self.name(name);
        }
        let loop_protection = self.loop_protection(document, target_stream.as_deref());
        let (source, target) = self.side_fields(document);
        let source = self.side(&source, stream);
        let target = self.side(&target, target_stream);
        self.not_into_itself(source.as_ref(), target.as_ref());
        let scope = self.scope(document);
        let mapping = self.mapping(document);
        let start = self.start(document);
        let max_age = self.duration("max_age", text(&document.max_age));
        let sampling = self.sampling(document);
        let on_reject = self.on_reject(document);
        let native = self.native(document);
        let consumers = self.consumers(document);
        let verify = self.verify(document);
        let id = self.id(document, own_name);
        // What does these for many streams copies nothing itself.
        let alone = patterns.is_none();
        Some(Replication {
            id,
            linked: false,
            name: name.unwrap_or(site).to_owned(),
            former: Vec::new(),
            description: document.description.clone().unwrap_or_default(),
            source: source?,
            target: target?,
            scope,
            mapping,
            start,
            max_age,
            leader_election_name: text(&document.leader_election_name).filter(|_| alone).map(str::to_owned),
            hand_back: document.hand_back.unwrap_or_default() && alone,
            target_like_source: document.target_like_source.unwrap_or_default(),
            provenance_first: document.target_initiated.unwrap_or_default(),
            sampling: sampling.filter(|_| alone),
            on_reject,
            create_target: !document.no_target_create.unwrap_or_default(),
            update_target: document.target_update.unwrap_or_default(),
            target_mode: sharing(document),
            on_source_loss: on_source_loss(document),
            ordering: ordering(document),
            loop_protection,
            limits: limits::in_flight(document),
            notices: notices::notices(document),
            verify: verify.filter(|_| alone),
            native: native.filter(|_| alone),
            consumers,
            patterns,
        })
    }

    /// The connection fields of both sides, with their names in the document; checks the TLS settings.
    fn side_fields<'a>(&mut self, document: &'a Document) -> (SideFields<'a>, SideFields<'a>) {
        let tls = document.tls.as_ref();
        let (source_tls, target_tls) = (document.source_tls.as_ref(), document.target_tls.as_ref());
        self.tls("tls", tls);
        self.tls("source_tls", source_tls);
        self.tls("target_tls", target_tls);
        let choria = document.choria.as_ref().map(|choria| ("choria", choria));
        let source_choria = document.source_choria.as_ref().map(|choria| ("source_choria", choria)).or(choria);
        let target_choria = document.target_choria.as_ref().map(|choria| ("target_choria", choria)).or(choria);
        let source = SideFields {
            side: "source",
            url: ("source_url", text(&document.source_url)),
            context: ("source_context", text(&document.source_context)),
            domain: ("source_domain", text(&document.source_domain)),
            api_prefix: ("source_api_prefix", text(&document.source_api_prefix)),
            own_tls: source_tls,
            tls,
            choria: source_choria,
        };
        let target = SideFields {
            side: "target",
            url: ("target_url", text(&document.target_url)),
            context: ("target_context", text(&document.target_context)),
            domain: ("target_domain", text(&document.target_domain)),
            api_prefix: ("target_api_prefix", text(&document.target_api_prefix)),
            own_tls: target_tls,
            tls,
            choria: target_choria,
        };
        (source, target)
    }

    fn stream_name(&mut self, field: &str, name: &str) -> Option<String> {
        if name.is_empty() {
            if self.problems.iter().all(|problem| problem.path != join("", field)) {
                self.problem(field, format!("`{field}` is required"));
            }
            return None;
        }
        let illegal = |c: char| c.is_whitespace() || c.is_control() || ".*>/\\".contains(c);
        if let Some(c) = name.chars().find(|c| illegal(*c)) {
            let name = shorten(name);
            self.problem(
                field,
                format!("`{field}` is `{name}`: a stream name cannot contain {c:?}, nor blanks or . * > / \\"),
            );
            return None;
        }
        Some(name.to_owned())
    }

    /// The name goes into a header with blanks between the fields and makes a consumer's name.
    fn name(&mut self, name: &str) {
        let illegal = |c: char| !c.is_ascii_graphic() || ".*>/\\".contains(c);
        if let Some(c) = name.chars().find(|c| illegal(*c)) {
            let name = shorten(name);
            let message = format!(
                "`name` is `{name}`: a name is one subject token, it cannot contain {c:?}: use letters, digits, - _ and ="
            );
            self.problem("name", message);
        }
    }

    /// The id is the key of the document.
    fn id(&mut self, document: &Document, name: Option<&str>) -> String {
        let own = text(&document.id);
        let (field, id) = match own {
            Some(own) => ("id", own.to_owned()),
            None if !document.streams.is_empty() => return self.id_of_streams(),
            None => ("stream", id(&document.stream, name)),
        };
        let refused = self.problems.iter().any(|problem| problem.path == join("", field));
        if refused {
            return id;
        }
        if own.is_some() && !id.split('.').all(names::is_key_token) {
            let shown = shorten(&id);
            self.problem(field, format!("`id` is `{shown}`: use letters, digits, - _ and =, with single dots between"));
        } else if id.len() > MAX_ID {
            let length = id.len();
            let message =
                format!("the id of this replication would have {length} characters, more than {MAX_ID}: set `id`");
            self.problem(field, message);
        } else if let Some(what) = reserved(&id) {
            let message = format!(
                "the id of this replication would be `{id}`, the key {what}: give it a `name`, which makes the id \
                 `{id}.<name>`, or another `id`"
            );
            self.problem(field, message);
        }
        id
    }

    fn side(&mut self, fields: &SideFields<'_>, stream: Option<String>) -> Option<Side> {
        let api = self.api(fields);
        let (url, context) = (fields.url, fields.context);
        let place = match (url.1, context.1) {
            (Some(_), Some(_)) => {
                let message = format!("`{}` and `{}` both name the servers: remove one of them", url.0, context.0);
                self.problem(context.0, message);
                return None;
            }
            (None, None) => {
                let has_problem = |field: &str| self.problems.iter().any(|problem| problem.path == join("", field));
                if !has_problem(url.0) && !has_problem(context.0) {
                    self.problem(url.0, format!("`{}` or `{}` is required", url.0, context.0));
                }
                return None;
            }
            (Some(text), None) => ServerRef::Known(Box::new(self.known(url.0, text, fields, api)?)),
            (None, Some(name)) => self.context(context.0, name, fields, api)?,
        };
        self.places.push((fields.side, place.clone()));
        Some(Side { stream: stream?, place })
    }

    fn known(&mut self, field: &str, url: &str, fields: &SideFields<'_>, api: Option<String>) -> Option<Connection> {
        let endpoint = Endpoint::parse(url).map_err(|error| self.problem(field, format!("`{field}`: {error}"))).ok()?;
        if endpoint::is_masked(url) {
            self.problem(field, format!("`{field}`: `***` stands for a secret that is not here: write the secret"));
            return None;
        }
        if let Some(wrong) = native::wrong_scheme(fields.side, endpoint.scheme) {
            self.problem(field, format!("`{field}`: {wrong}"));
            return None;
        }
        let TlsDocument { ca, cert, key } = fields.own_tls.or(fields.tls).cloned().unwrap_or_default();
        let tls = Tls { ca, cert, key, ..endpoint.tls };
        let endpoint =
            endpoint.with_tls(tls).map_err(|error| self.problem(field, format!("`{field}`: {error}"))).ok()?;
        let endpoint = match self.choria(fields) {
            // That of both sides is for those whose URL has none.
            Some(_)
                if endpoint.auth != Auth::Anonymous && fields.choria.is_some_and(|(field, _)| field == "choria") =>
            {
                endpoint
            }
            Some(identity) => {
                identity.at(endpoint).map_err(|error| self.problem(field, format!("`{field}`: {error}"))).ok()?
            }
            None => endpoint,
        };
        let connection = Connection::to(endpoint);
        Some(Connection { api_prefix: api.unwrap_or(connection.api_prefix), ..connection })
    }

    fn choria(&mut self, fields: &SideFields<'_>) -> Option<ChoriaIdentity> {
        let (field, document) = fields.choria?;
        let (identity, problems) = document.identity(field);
        self.problems.extend(problems);
        identity
    }

    fn context(&mut self, field: &str, name: &str, fields: &SideFields<'_>, api: Option<String>) -> Option<ServerRef> {
        if let Some((choria, document)) = fields.choria
            && document.identity(choria).0.is_some()
        {
            let message = format!("`{choria}` and `{field}` are two identities: remove one of them, or write a URL");
            self.problem(field, message);
        }
        if let Err(right) = check_context_name(name) {
            let is = if name.contains([':', '@']) { String::new() } else { format!(" is `{}`", shorten(name)) };
            self.problem(field, format!("`{field}`{is}: {right}"));
            return None;
        }
        let files = |tls: Option<&TlsDocument>| {
            let TlsDocument { ca, cert, key } = tls.cloned().unwrap_or_default();
            ContextFields { ca, cert, key, ..ContextFields::default() }
        };
        let over = ContextFields { jetstream_api_prefix: api, ..files(fields.own_tls) };
        let (over, under) = (Box::new(over), Box::new(files(fields.tls)));
        Some(ServerRef::Context { name: name.to_owned(), over, under })
    }

    fn api(&mut self, fields: &SideFields<'_>) -> Option<String> {
        let (domain, prefix) = (fields.domain, fields.api_prefix);
        let (field, text, parsed) = match (domain.1, prefix.1) {
            (None, None) => return None,
            (Some(_), Some(_)) => {
                let message = format!("`{}` and `{}` set the same: remove one of them", domain.0, prefix.0);
                self.problem(prefix.0, message);
                return None;
            }
            (Some(text), None) => (domain.0, text, domain_prefix(text)),
            (None, Some(text)) => (prefix.0, text, subject_prefix(text)),
        };
        let is = if looks_like_url(text) { String::new() } else { format!(" is `{}`", shorten(text)) };
        parsed.map_err(|error| self.problem(field, format!("`{field}`{is}: {error}"))).ok()
    }

    fn tls(&mut self, field: &str, tls: Option<&TlsDocument>) {
        let Some(tls) = tls else { return };
        let missing = match (&tls.cert, &tls.key) {
            (Some(_), None) => "key",
            (None, Some(_)) => "cert",
            _ => return,
        };
        self.problem(field, format!("`{field}` has no `{missing}`: `cert` and `key` go together"));
    }

    fn not_into_itself(&mut self, source: Option<&Side>, target: Option<&Side>) {
        if source.is_some() && source == target {
            let message = "target and `target_stream` name the source stream: a stream cannot be copied into itself";
            self.problem("target_url", message.to_owned());
        }
    }

    fn mapping(&mut self, document: &Document) -> Mapping {
        let prefix = text(&document.target_subject_prefix).unwrap_or_default().trim_matches('.');
        if !prefix.is_empty() {
            self.subject("target_subject_prefix", prefix, Wildcards::Refused);
        }
        let remove = text(&document.target_subject_remove).unwrap_or_default();
        let transforms = document.subject_transforms.iter().enumerate();
        let transforms = transforms.filter_map(|(index, transform)| self.transform(index, transform)).collect();
        Mapping { transforms, prefix: prefix.to_owned(), remove: remove.to_owned() }
    }

    fn transform(&mut self, index: usize, TransformDocument { src, dest }: &TransformDocument) -> Option<Transform> {
        if !self.subject(&format!("subject_transforms/{index}/src"), src, Wildcards::Allowed) {
            return None;
        }
        let transform = Transform::parse(src, dest).map_err(|wrong| {
            let (field, text) = if wrong.in_src { ("src", src) } else { ("dest", dest) };
            self.wrong_subject(&format!("subject_transforms/{index}/{field}"), text, &wrong.message);
        });
        transform.ok()
    }

    fn scope(&mut self, document: &Document) -> Scope {
        let one = text(&document.filter_subject);
        if let Some(filter) = one {
            self.subject("filter_subject", filter, Wildcards::Allowed);
        }
        let several = &document.filter_subjects;
        if one.is_some() && !several.is_empty() {
            let message = "`filter_subject` and `filter_subjects` both select the messages: remove one of them";
            self.problem("filter_subjects", message.to_owned());
        }
        self.patterns("filter_subjects", several);
        for (index, filter) in several.iter().enumerate() {
            // Servers refuse such a consumer.
            if let Some(other) = several[..index].iter().find(|other| patterns::overlap(other, filter)) {
                let message = format!(
                    "it overlaps with `{}`, and each message is read by one of them: remove one, or write one pattern \
                     for both",
                    shorten(other)
                );
                self.wrong_subject(&format!("filter_subjects/{index}"), filter, &message);
            }
        }
        self.patterns("exclude_subjects", &document.exclude_subjects);
        let filters = one.map_or_else(|| several.clone(), |filter| vec![filter.to_owned()]);
        Scope::new(filters, document.exclude_subjects.clone())
    }

    fn patterns(&mut self, field: &str, patterns: &[String]) {
        for (index, pattern) in patterns.iter().enumerate() {
            self.subject(&format!("{field}/{index}"), pattern, Wildcards::Allowed);
        }
    }

    /// Whether a subject is valid; if not, what is wrong is a problem of the field, whose path is given with slashes.
    fn subject(&mut self, field: &str, subject: &str, wildcards: Wildcards) -> bool {
        let wrong = wrong_subject(subject, wildcards);
        if let Some(wrong) = &wrong {
            self.wrong_subject(field, subject, wrong);
        }
        wrong.is_none()
    }

    fn wrong_subject(&mut self, field: &str, subject: &str, wrong: &str) {
        let (name, subject) = (field.replace('/', "."), shorten(subject));
        self.problems.push(Problem::new(format!("/{field}"), format!("`{name}` is `{subject}`: {wrong}")));
    }

    /// How senders are sampled; `None`, with a notice elsewhere, also where something is missing: Choria's replicator
    /// takes such documents and copies everything.
    fn sampling(&mut self, document: &Document) -> Option<Sampling> {
        let token = document.inspect_subject_token.filter(|token| *token != 0);
        let field = text(&document.inspect_field).map(|field| ("inspect_field", Inspect::Field(field.to_owned())));
        let header = text(&document.inspect_header).map(|name| ("inspect_header", Inspect::Header(name.to_owned())));
        let token = token.map(|token| {
            let whole = Inspect::Subject;
            ("inspect_subject_token", usize::try_from(token).map_or(whole, Inspect::Token))
        });
        let mut modes = [field, header, token].into_iter().flatten();
        let mode = modes.next();
        for (other, _) in modes {
            let first = mode.as_ref().map_or("", |(first, _)| first);
            let message = format!("`{first}` and `{other}` both select how senders are identified: remove one of them");
            self.problem(other, message);
        }
        if let Some(name) = text(&document.inspect_header)
            && let Some(c) = name.chars().find(|c| !c.is_ascii_graphic() || *c == ':')
        {
            let message = format!("`inspect_header` is `{}`: a header's name cannot contain {c:?}", shorten(name));
            self.problem("inspect_header", message);
        }
        let every = self.duration("inspect_duration", text(&document.inspect_duration));
        let warn = self.duration("warn_duration", text(&document.warn_duration));
        let advisory = document.advisory.as_ref().and_then(|advisory| self.advisory(advisory));
        let (inspect, every) = (mode?.1, every?);
        Some(Sampling {
            inspect,
            every,
            warn: warn.unwrap_or(every / 2),
            size_trigger: document.size_trigger.filter(|bytes| *bytes > 0),
            force_field: text(&document.inspect_force_field).map(str::to_owned),
            advisory,
            bounds: limits::of_senders(document.limits.as_ref()),
            as_choria: text(&document.compat).is_some(),
        })
    }

    fn advisory(&mut self, AdvisoryDocument { subject, reliable }: &AdvisoryDocument) -> Option<AdvisorySettings> {
        if subject.is_empty() {
            return None; // the schema has said so
        }
        let example = subject.replace("%s", "new").replace("%v", "sender");
        let wrong = of_server(&example).or_else(|| wrong_subject(&example, Wildcards::Refused));
        // Names of buckets and the like stand in the second token.
        let own = if subject.starts_with('$') { 2 } else { 1 };
        let wrong = wrong.or_else(|| {
            subject.split('.').take(own).any(|token| token.contains("%v")).then(|| {
                "`%v` at the beginning would let publishers choose the subject: begin with a token of your own, such as \
                 `advisories.%s.%v`"
                    .to_owned()
            })
        });
        if let Some(wrong) = wrong {
            let message = format!("`advisory.subject` is `{}`: {wrong}", shorten(subject));
            self.problems.push(Problem::new("/advisory/subject", message));
        }
        Some(AdvisorySettings { subject: subject.clone(), reliable: reliable.unwrap_or_default() })
    }

    fn on_reject(&mut self, document: &Document) -> OnReject {
        let subject = document.dead_letter.as_ref().map(|dead_letter| dead_letter.subject.as_str());
        if let Some(subject) = subject.filter(|subject| !subject.is_empty()) {
            self.dead_letter_subject(subject);
        }
        match (text(&document.on_reject), subject) {
            (Some("dead_letter"), Some(subject)) => return OnReject::DeadLetter { subject: subject.to_owned() },
            (Some("dead_letter"), None) => {
                let refused = self.problems.iter().any(|problem| problem.path.starts_with("/dead_letter"));
                if !refused {
                    let message =
                        "`dead_letter` is required where `on_reject` is `dead_letter`: write {\"subject\": \"...\"}";
                    self.problem("dead_letter", message.to_owned());
                }
            }
            (other, Some(_)) => {
                let is = other.map_or_else(|| "is not set".to_owned(), |other| format!("is `{}`", shorten(other)));
                let message =
                    format!("`dead_letter` has no effect, because `on_reject` {is}: it goes with `dead_letter`");
                self.problem("dead_letter", message);
            }
            (Some("skip"), None) => return OnReject::Skip,
            (Some("hold") | None, None) => {}
            (Some(other), None) => {
                let other = shorten(other);
                let message = format!("`on_reject` is `{other}`: it is `hold`, `skip` or `dead_letter`");
                self.problem("on_reject", message);
            }
        }
        OnReject::Hold
    }

    /// Beside what makes a subject: the servers' own subjects take no messages for a stream.
    fn dead_letter_subject(&mut self, subject: &str) {
        let wrong = of_server(subject).or_else(|| wrong_subject(subject, Wildcards::Refused));
        if let Some(wrong) = wrong {
            let message = format!("`dead_letter.subject` is `{}`: {wrong}", shorten(subject));
            self.problems.push(Problem::new("/dead_letter/subject", message));
        }
    }

    fn start(&mut self, document: &Document) -> Start {
        let delta = self.duration("start_delta", text(&document.start_delta));
        let time = text(&document.start_time).and_then(|time| self.time("start_time", time));
        let sequence = document.start_sequence.filter(|sequence| *sequence > 0);
        match (document.start_at_end, sequence, delta, time) {
            (Some(true), ..) => Start::AtEnd,
            (_, Some(sequence), ..) => Start::Sequence(sequence),
            (.., Some(delta), _) => Start::Delta(delta),
            (.., Some(time)) => Start::Time(time),
            _ => Start::All,
        }
    }

    fn duration(&mut self, field: &str, text: Option<&str>) -> Option<std::time::Duration> {
        let text = text?;
        let duration = parse_duration(text);
        duration.map_err(|error| self.problem(field, format!("`{field}` is `{}`: it {error}", shorten(text)))).ok()
    }

    fn time(&mut self, field: &str, text: &str) -> Option<DateTime<Utc>> {
        let time = DateTime::parse_from_rfc3339(text);
        if time.is_err() {
            let text = shorten(text);
            self.problem(field, format!("`{field}` is `{text}`: it is not a time such as `2026-01-31T08:00:00Z`"));
        }
        time.ok().map(|time| time.with_timezone(&Utc))
    }

    fn into_problems(mut self) -> Problems {
        self.problems.sort_by(|a, b| a.path.cmp(&b.path));
        self.problems.dedup();
        Problems(self.problems)
    }
}

/// What is wrong with a subject that belongs to the servers.
fn of_server(subject: &str) -> Option<String> {
    let start = ["$JS.", "$SYS.", "_"].into_iter().find(|start| subject.starts_with(start))?;
    Some(format!("subjects that begin with `{start}` are the servers' own"))
}

/// A text that is there and not empty.
fn text(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

/// Other words are refused by the schema.
fn sharing(document: &Document) -> Sharing {
    match text(&document.target_mode) {
        Some("exclusive") => Sharing::Exclusive,
        Some("shared") => Sharing::Shared,
        _ => Sharing::Auto,
    }
}

/// Other words are refused by the schema.
fn on_source_loss(document: &Document) -> OnSourceLoss {
    match text(&document.on_source_loss) {
        Some("hold") => OnSourceLoss::Hold,
        _ => OnSourceLoss::Follow,
    }
}

fn ordering(document: &Document) -> Ordering {
    match text(&document.ordering) {
        Some("strict") => Ordering::Strict,
        _ => Ordering::Relaxed,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn with(more: Value) -> Value {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        let fields = document.as_object_mut().unwrap();
        for (field, value) in more.as_object().unwrap() {
            fields.insert(field.clone(), value.clone());
        }
        document
    }

    fn good(more: Value) -> Replication {
        parse_value(&with(more.clone()), "SITE").unwrap_or_else(|problems| panic!("{more}: {problems}"))
    }

    fn endpoint(side: &Side) -> &Endpoint {
        let ServerRef::Known(connection) = &side.place else { panic!("{side:?}") };
        &connection.endpoint
    }

    fn problems(document: &Value) -> Vec<(String, String)> {
        let problems = parse_value(document, "SITE").expect_err(&document.to_string());
        problems.0.into_iter().map(|problem| (problem.path, problem.message)).collect()
    }

    #[test]
    fn the_smallest_document() {
        let replication = parse(br#"{"stream":"S","source_url":"nats://a","target_url":"b:1"}"#, "SITE").unwrap();
        assert_eq!(replication.id, "S");
        assert_eq!(replication.name, "SITE");
        assert_eq!(replication.target.stream, "S");
        assert_eq!(*endpoint(&replication.target), Endpoint::parse("nats://b:1").unwrap());
        assert_eq!(replication.start, Start::All);
        assert_eq!(replication.limits, Limits::default());
        assert_eq!(replication.mapping, Mapping::default());
        assert!(
            replication.create_target
                && !replication.update_target
                && replication.notices.is_empty()
                && replication.max_age.is_none()
        );
    }

    #[test]
    fn sampling_has_one_mode_and_defaults() {
        let hourly = |more: Value| {
            let mut document = json!({"inspect_duration": "1h"});
            document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            document
        };
        let sampling = good(hourly(json!({"inspect_field": "sender"}))).sampling.unwrap();
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        assert_eq!((sampling.inspect, sampling.every), (Inspect::Field("sender".into()), minutes(60)));
        assert_eq!((sampling.warn, sampling.size_trigger, sampling.advisory), (minutes(30), None, None));
        let mode = |more: Value| good(hourly(more)).sampling.unwrap().inspect;
        assert_eq!(mode(json!({"inspect_header": "A"})), Inspect::Header("A".into()));
        assert_eq!(mode(json!({"inspect_subject_token": 3, "inspect_field": ""})), Inspect::Token(3));
        assert_eq!(mode(json!({"inspect_subject_token": -1})), Inspect::Subject);
        let fields =
            json!({"inspect_field": "a", "advisory": {"subject": "x.%s.%v", "reliable": true}, "size_trigger": 7});
        let sampling = good(hourly(fields)).sampling.unwrap();
        assert_eq!(sampling.advisory, Some(AdvisorySettings { subject: "x.%s.%v".into(), reliable: true }));
        assert_eq!(sampling.size_trigger, Some(7));
        // Choria's replicator takes these and copies everything.
        for (more, words) in [
            (json!({"inspect_field": "a"}), "without `inspect_duration`"),
            (json!({"inspect_duration": "1h"}), "without `inspect_field`"),
            (json!({"inspect_subject_token": 0, "warn_duration": "1h"}), "`warn_duration` has no effect"),
        ] {
            let replication = good(more);
            assert_eq!(replication.sampling, None);
            assert!(replication.notices[0].contains(words), "{:?}", replication.notices);
        }
        let check = |more: Value, path: &str, words: &str| {
            let found = problems(&with(hourly(more.clone())));
            assert!(found.iter().any(|(at, text)| at == path && text.contains(words)), "{more}: {found:?}");
        };
        check(json!({"inspect_field": "a", "inspect_header": "b"}), "/inspect_header", "`inspect_field` and");
        check(json!({"inspect_header": "a", "inspect_subject_token": 1}), "/inspect_subject_token", "remove one");
        check(json!({"inspect_header": "a b"}), "/inspect_header", "cannot contain ' '");
        check(json!({"inspect_subject_token": -2}), "/inspect_subject_token", "-1");
        check(json!({"inspect_field": "a", "warn_duration": "x"}), "/warn_duration", "`x`");
        check(json!({"inspect_field": "a", "advisory": {}}), "/advisory/subject", "required");
        check(json!({"inspect_field": "a", "advisory": {"subject": "a b"}}), "/advisory/subject", "cannot contain");
        check(json!({"inspect_field": "a", "advisory": {"subject": "$JS.%v"}}), "/advisory/subject", "servers' own");
        check(json!({"inspect_field": "a", "advisory": {"subject": "a", "x": 1}}), "/advisory/x", "unknown");
        for subject in ["%v", "%v.adv", "a%v.adv", "%v%s", "$KV.%v.x", "$KV.a%v"] {
            check(
                json!({"inspect_field": "a", "advisory": {"subject": subject}}),
                "/advisory/subject",
                "let publishers",
            );
        }
        good(json!({"inspect_field": "a", "advisory": {"subject": "%s.%v"}}));
        good(json!({"inspect_field": "a", "advisory": {"subject": "$KV.BUCKET.%v"}}));
        check(json!({"inspect_fields": "a"}), "/inspect_fields", "did you mean `inspect_field`");
    }

    #[test]
    fn the_most_specific_choria_identity_applies_as_a_whole() {
        let files = |name: &str| json!({"seed_file": format!("/{name}.seed"), "jwt_file": "/jwt", "collective": "c"});
        let seed = |side: &Side| match &endpoint(side).auth {
            Auth::Custom(identity) => identity.files()[0].1.display().to_string(),
            other => format!("{other:?}"),
        };
        let both = good(json!({"choria": files("both"), "target_choria": files("own")}));
        assert_eq!([seed(&both.source), seed(&both.target)], ["/both.seed", "/own.seed"]);
        let none = good(json!({"choria": files("both"), "target_choria": {}}));
        assert_eq!([seed(&none.source), seed(&none.target)], ["/both.seed", "Anonymous"]);
        let check = |more: Value, path: &str, words: &str| {
            let found = problems(&with(more.clone()));
            assert!(found.iter().any(|(at, text)| at == path && text.contains(words)), "{more}: {found:?}");
        };
        check(json!({"choria": {"seed_file": "/s"}}), "/choria", "has no `jwt_file`");
        check(json!({"source_choria": {"seed_file": "/s", "jwt_file": "/j"}}), "/source_choria/collective", "required");
        check(json!({"source_choria": files("a"), "source_url": "nats://u:p@a"}), "/source_url", "another one");
        let by_url = good(json!({"choria": files("both"), "target_url": "nats://b?credentials=/c"}));
        assert_eq!([seed(&by_url.source), seed(&by_url.target)], ["/both.seed", "CredentialsFile(\"/c\")"]);
        check(json!({"choria": {"seed": "/s"}}), "/choria/seed", "did you mean `seed_file`");
        let mut context = with(json!({"choria": files("a"), "source_context": "east"}));
        context.as_object_mut().unwrap().remove("source_url");
        assert!(problems(&context).iter().any(|(at, text)| at == "/source_context" && text.contains("two identities")));
    }

    #[test]
    fn id_and_name() {
        let check = |more: Value, id: &str, name: &str| {
            let replication = good(more);
            assert_eq!((replication.id.as_str(), replication.name.as_str()), (id, name));
        };
        check(json!({"name": "EAST"}), "S.EAST", "EAST");
        check(json!({"name": "SITE"}), "S", "SITE");
        check(json!({"name": ""}), "S", "SITE");
    }

    #[test]
    fn start_in_order_of_precedence() {
        let all = json!({"start_at_end": true, "start_sequence": 7, "start_delta": "1h", "start_time": "2026-01-01T00:00:00Z"});
        let without = |fields: &[&str]| {
            let mut all = all.clone();
            fields.iter().for_each(|field| drop(all.as_object_mut().unwrap().remove(*field)));
            good(all).start
        };
        assert_eq!(without(&[]), Start::AtEnd);
        assert_eq!(without(&["start_at_end"]), Start::Sequence(7));
        assert_eq!(without(&["start_at_end", "start_sequence"]), Start::Delta(Duration::from_secs(3600)));
        assert!(matches!(without(&["start_at_end", "start_sequence", "start_delta"]), Start::Time(_)));
        assert_eq!(good(json!({"start_at_end": false, "start_sequence": 0, "start_time": ""})).start, Start::All);
        assert_eq!(good(json!({"start_sequence": 1e3})).start, Start::Sequence(1000));
    }

    #[test]
    fn most_specific_tls_wins_as_a_whole() {
        let replication = good(json!({
            "tls": {"ca": "/ca", "cert": "/cert", "key": "/key"}, "target_tls": {"ca": "/other"},
            "target_url": "tls://b?insecure=true"
        }));
        assert_eq!(endpoint(&replication.source).tls.key, Some("/key".into()));
        let target = endpoint(&replication.target).tls.clone();
        assert_eq!((target.ca, target.cert, target.key), (Some("/other".into()), None, None));
        assert!(target.insecure);
    }

    #[test]
    fn contexts_instead_of_urls() {
        let replication = parse(
            br#"{"stream":"S","source_context":"east","source_url":"","target_context":"hub","target_domain":"d",
                 "tls":{"ca":"/ca"},"target_tls":{"cert":"/c","key":"/k"}}"#,
            "SITE",
        )
        .unwrap();
        let ServerRef::Context { name, over, under } = replication.target.place else { panic!("a URL") };
        assert_eq!((name.as_str(), over.jetstream_api_prefix.as_deref()), ("hub", Some("$JS.d.API")));
        assert_eq!((over.key, under.ca), (Some("/k".into()), Some("/ca".into())));
        assert_eq!(replication.source.place.to_string(), "context `east`");
    }

    #[test]
    fn domains_and_prefixes() {
        let prefix = |side: &Side| {
            let ServerRef::Known(connection) = &side.place else { panic!("{side:?}") };
            connection.api_prefix.clone()
        };
        let replication = good(json!({"source_domain": "east", "target_api_prefix": "hub.js.", "target_domain": ""}));
        assert_eq!(prefix(&replication.source), "$JS.east.API");
        assert_eq!(prefix(&replication.target), "hub.js");
        // the same servers, another domain: not the same stream
        good(json!({"target_url": "nats://a", "target_domain": "leaf"}));
    }

    #[test]
    fn the_rest_of_the_fields() {
        let replication = good(json!({
            "target_stream": "T", "filter_subject": "a.*.>", "target_subject_prefix": "east.", "target_subject_remove": "a.",
            "max_age": "1d", "no_target_create": true, "target_update": true, "target_initiated": true, "ephemeral": true, "description": "d",
            "limits": {"messages_in_flight": 5}, "leader_election_name": "rust1.example.net"
        }));
        assert_eq!(replication.target.stream, "T");
        assert_eq!(replication.scope, Scope::new(vec!["a.*.>".to_owned()], Vec::new()));
        assert_eq!(replication.mapping.apply(b"a.b", &mut Vec::new()), b"east.b");
        assert_eq!(replication.max_age, Some(Duration::from_secs(86_400)));
        assert!(!replication.create_target && replication.update_target);
        assert_eq!(replication.notices.len(), 2);
        assert_eq!(replication.limits, Limits { messages_in_flight: 5, ..Limits::default() });
        assert_eq!(replication.on_reject, OnReject::Hold);
        assert_eq!(replication.leader_election_name.as_deref(), Some("rust1.example.net"));
        assert_eq!(good(json!({"leader_election_name": ""})).leader_election_name, None);
    }

    #[test]
    fn what_becomes_of_refused_messages_and_how_fast() {
        let on_reject = |more: Value| good(more).on_reject;
        assert_eq!(on_reject(json!({"on_reject": ""})), OnReject::Hold);
        assert_eq!(on_reject(json!({"on_reject": "hold"})), OnReject::Hold);
        assert_eq!(on_reject(json!({"on_reject": "skip"})), OnReject::Skip);
        let dead = json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.orders"}});
        assert_eq!(on_reject(dead), OnReject::DeadLetter { subject: "dead.orders".to_owned() });
        let limits = good(json!({"limits": {"messages_per_second": 10, "bytes_per_second": 2048}})).limits;
        assert_eq!((limits.messages_per_second, limits.bytes_per_second), (Some(10), Some(2048)));
        assert_eq!((Limits::default().messages_per_second, Limits::default().bytes_per_second), (None, None));
    }

    #[test]
    fn scope_and_transforms() {
        let replication = good(json!({
            "filter_subject": "", "filter_subjects": ["a.>", "b"], "exclude_subjects": ["a.x"],
            "subject_transforms": [{"src": "a.*", "dest": "{{wildcard(1)}}"}], "target_subject_prefix": "p"
        }));
        assert_eq!(replication.scope.filters(), ["a.>", "b"]);
        assert!(replication.scope.excludes(b"a.x") && !replication.scope.excludes(b"b"));
        assert_eq!(replication.mapping.apply(b"a.b", &mut Vec::new()), b"p.b");
        assert!(good(json!({"exclude_subjects": [], "subject_transforms": []})).scope.is_whole());
    }

    #[test]
    fn words_choose_mode_and_order() {
        let check = |mode: &str, ordering: &str, expect: (Sharing, Ordering)| {
            let replication = good(json!({"target_mode": mode, "ordering": ordering}));
            assert_eq!((replication.target_mode, replication.ordering), expect, "{mode} {ordering}");
        };
        check("", "", (Sharing::Auto, Ordering::Relaxed));
        check("auto", "relaxed", (Sharing::Auto, Ordering::Relaxed));
        check("exclusive", "strict", (Sharing::Exclusive, Ordering::Strict));
        check("shared", "", (Sharing::Shared, Ordering::Relaxed));
        let replication = good(json!({}));
        assert_eq!((replication.target_mode, replication.ordering), Default::default());
        for (text, expect) in
            [("", OnSourceLoss::Follow), ("follow", OnSourceLoss::Follow), ("hold", OnSourceLoss::Hold)]
        {
            assert_eq!(good(json!({"on_source_loss": text})).on_source_loss, expect, "{text}");
        }
        assert_eq!(replication.on_source_loss, OnSourceLoss::Follow);
    }

    #[test]
    fn an_id_is_a_key_whatever_the_names_are() {
        let check = |more: Value, expect: &str| {
            let document = with(more);
            assert_eq!(parse_value(&document, "SITE").map(|replication| replication.id), Ok(expect.to_owned()));
            assert_eq!(document_id(&document, "SITE").as_deref(), Some(expect));
        };
        check(json!({"stream": "$MQTT_msgs"}), "=24MQTT_msgs");
        check(json!({"stream": "a+b", "name": "c:d"}), "a=2Bb.c=3Ad");
        check(json!({"stream": "f\u{fc}r", "name": "SITE"}), "f=C3=BCr");
        check(json!({"stream": "a+b", "id": "mine.x", "name": "c"}), "mine.x");
        check(json!({"stream": "A", "id": "", "name": "c"}), "A.c");
    }

    #[test]
    fn one_problem_each() {
        let check = |more: Value, path: &str, expect: &str| {
            let found = problems(&with(more.clone()));
            assert_eq!(found.len(), 1, "{more}: {found:?}");
            assert_eq!(found[0].0, path, "{more}: {found:?}");
            assert!(found[0].1.contains(expect), "{more}: {found:?}");
        };
        check(json!({"stream": "a.b"}), "/stream", "`a.b`: a stream name cannot contain '.'");
        check(json!({"stream": "a b"}), "/stream", "' '");
        check(json!({"stream": ""}), "/stream", "must not be empty");
        check(json!({"stream": 5}), "/stream", "`stream` is `5`: must be of type string");
        check(json!({"stream": "S".repeat(256)}), "/stream", "longer than 255");
        check(json!({"target_stream": "a>"}), "/target_stream", "'>'");
        check(json!({"name": "a b"}), "/name", "one subject token");
        check(json!({"name": "a.b"}), "/name", "one subject token");
        check(json!({"id": "a:b"}), "/id", "`id` is `a:b`: use letters, digits");
        check(json!({"id": ".a"}), "/id", "single dots between");
        check(json!({"id": "heartbeats"}), "/id", "the key under which the heartbeats are configured");
        check(
            json!({"stream": "\u{20ac}".repeat(60)}),
            "/stream",
            "would have 540 characters, more than 512: set `id`",
        );
        check(json!({"source_url": "http://h"}), "/source_url", "not `nats://`");
        check(json!({"source_url": "nats://a:***@h"}), "/source_url", "stands for a secret");
        check(json!({"target_url": "nats://a"}), "/target_url", "into itself");
        check(json!({"source_url": ""}), "/source_url", "`source_url` or `source_context` is required");
        check(json!({"source_context": "x"}), "/source_context", "remove one of them");
        check(json!({"source_url": "", "source_context": "../x"}), "/source_context", "`../x`: the name of a context");
        check(json!({"source_domain": "a.b"}), "/source_domain", "`a.b`: the name of a domain is one token");
        check(json!({"target_api_prefix": "a.*"}), "/target_api_prefix", "cannot contain '*'");
        for field in ["source_domain", "target_domain", "source_api_prefix", "target_api_prefix"] {
            for stray in ["u:s3cret", "s3cret@h", "nats://u:s3cret@h", "h/s3cret", "nats://u:s3cret@a b"] {
                let message = &problems(&with(json!({field: stray})))[0].1;
                let right = format!("`{field}`: it cannot contain `:`, `/` or `@`");
                assert!(message.starts_with(&right) && !message.contains("s3cret"), "{message}");
            }
        }
        let message = &problems(&with(json!({"source_url": "", "source_context": "u:s3cret/h"})))[0].1;
        assert!(
            message.starts_with("`source_context`: the name of a context") && !message.contains("s3cret"),
            "{message}"
        );
        check(
            json!({"target_domain": "a", "target_api_prefix": "b"}),
            "/target_api_prefix",
            "`target_domain` and `target_api_prefix` set the same",
        );
        check(json!({"filter_subject": "a..b"}), "/filter_subject", "empty token");
        check(json!({"filter_subject": "a.>.b"}), "/filter_subject", "only possible at the end");
        check(json!({"filter_subject": "a.b*"}), "/filter_subject", "are whole tokens");
        check(json!({"filter_subject": "a b"}), "/filter_subject", "cannot contain ' '");
        check(json!({"filter_subjects": []}), "/filter_subjects", "`filter_subjects` has no entry: 1 or more");
        check(json!({"filter_subjects": vec!["a"; 257]}), "/filter_subjects", "257 entries: 256 or fewer");
        check(json!({"filter_subjects": "a"}), "/filter_subjects", "must be of type array");
        check(
            json!({"filter_subjects": ["a", "b..c"]}),
            "/filter_subjects/1",
            "`filter_subjects.1` is `b..c`: a subject",
        );
        check(json!({"filter_subjects": ["a", ""]}), "/filter_subjects/1", "must not be empty");
        check(
            json!({"filter_subjects": ["a.*", "b", "*.b"]}),
            "/filter_subjects/2",
            "`filter_subjects.2` is `*.b`: it overlaps with `a.*`",
        );
        check(json!({"filter_subjects": ["a", "a"]}), "/filter_subjects/1", "overlaps with `a`");
        check(
            json!({"filter_subject": "a", "filter_subjects": ["b"]}),
            "/filter_subjects",
            "`filter_subject` and `filter_subjects` both select",
        );
        check(json!({"exclude_subjects": ["a", "a.>.b"]}), "/exclude_subjects/1", "`exclude_subjects.1` is `a.>.b`");
        let transform = |src: &str, dest: &str| json!({"subject_transforms": [{"src": "a", "dest": "b"}, {"src": src, "dest": dest}]});
        check(transform("a b", "x"), "/subject_transforms/1/src", "`subject_transforms.1.src` is `a b`: a subject");
        check(transform("a.*", "x.$2"), "/subject_transforms/1/dest", "`subject_transforms.1.dest` is `x.$2`: `$2`");
        check(transform("a.>", "x"), "/subject_transforms/1/dest", "has to end with `>` too");
        check(transform("a", "x.>"), "/subject_transforms/1/src", "`src` has to end with `>` too");
        check(transform("a", ""), "/subject_transforms/1/dest", "must not be empty");
        check(json!({"subject_transforms": [{"src": "a"}]}), "/subject_transforms/0/dest", "`dest` is required");
        check(
            json!({"subject_transforms": [{"src": "a", "dest": "b", "dst": "b"}]}),
            "/subject_transforms/0/dst",
            "did you mean `dest`",
        );
        check(json!({"target_subject_prefix": "a.*"}), "/target_subject_prefix", "wildcards are not possible");
        check(json!({"start_sequence": -1}), "/start_sequence", "`-1`: must be 0 or more");
        check(json!({"start_sequence": 1.5}), "/start_sequence", "of type integer");
        check(json!({"start_sequence": 1e300}), "/start_sequence", "or less");
        check(json!({"start_delta": "5x"}), "/start_delta", "`5x`: it is not a duration");
        check(json!({"start_delta": "0s"}), "/start_delta", "more than 0");
        check(json!({"start_time": "yesterday"}), "/start_time", "`yesterday`: it is not a time such as");
        check(json!({"max_age": "-1h"}), "/max_age", "more than 0");
        check(
            json!({"limits": {"messages_in_flight": 0}}),
            "/limits/messages_in_flight",
            "`limits.messages_in_flight` is `0`: must be 1 or more",
        );
        check(json!({"limits": {"bytes_in_flight": 1}}), "/limits/bytes_in_flight", "65536 or more");
        check(
            json!({"limits": {"message_in_flight": 1}}),
            "/limits/message_in_flight",
            "did you mean `messages_in_flight`",
        );
        check(json!({"limits": {"messages_per_second": 0}}), "/limits/messages_per_second", "must be 1 or more");
        check(json!({"limits": {"bytes_per_second": 1000}}), "/limits/bytes_per_second", "must be 1024 or more");
        check(json!({"limits": {"bytes_per_second": 1e12}}), "/limits/bytes_per_second", "must be 10737418240 or less");
        check(json!({"limits": []}), "/limits", "an array: must be of type object");
        check(json!({"tls": {"cert": "/c"}}), "/tls", "go together");
        for tls in ["tls", "target_tls"] {
            let fields = json!({"source_url": "wss://h", "target_url": "ws://h", tls: {"ca": "/ca"}});
            check(fields, "/target_url", "`target_url`: `ws://` is without TLS");
        }
        check(json!({"source_tls": {"keys": "/c"}}), "/source_tls/keys", "did you mean `key`");
        let dead = |subject: &str| json!({"on_reject": "dead_letter", "dead_letter": {"subject": subject}});
        check(json!({"on_reject": "drop"}), "/on_reject", "`drop`: it is `hold`, `skip` or `dead_letter`");
        check(json!({"on_reject": 1}), "/on_reject", "of type string");
        check(json!({"on_reject": "dead_letter"}), "/dead_letter", "`dead_letter` is required");
        check(json!({"on_reject": "skip", "dead_letter": {"subject": "a"}}), "/dead_letter", "`on_reject` is `skip`");
        check(json!({"dead_letter": {"subject": "a"}}), "/dead_letter", "`on_reject` is not set");
        check(json!({"on_reject": "dead_letter", "dead_letter": {}}), "/dead_letter/subject", "`subject` is required");
        check(dead(""), "/dead_letter/subject", "must not be empty");
        check(dead("dead.>"), "/dead_letter/subject", "`dead.>`: wildcards are not possible");
        check(dead("dead..x"), "/dead_letter/subject", "empty token");
        check(dead("$JS.API.x"), "/dead_letter/subject", "the servers' own");
        check(dead("_INBOX.x"), "/dead_letter/subject", "the servers' own");
        check(json!({"on_reject": "dead_letter", "dead_letter": "x"}), "/dead_letter", "of type object");
        check(
            json!({"dead_letter": {"subjet": "a", "subject": "a"}, "on_reject": "dead_letter"}),
            "/dead_letter/subjet",
            "did you mean `subject`",
        );
        check(json!({"leader_election_name": "n".repeat(129)}), "/leader_election_name", "longer than 128");
        check(json!({"leader_election": "n"}), "/leader_election", "did you mean `leader_election_name`");
        check(json!({"on_source_loss": "skip"}), "/on_source_loss", "`skip`: must be `follow` or `hold`");
        check(json!({"target_mode": "alone"}), "/target_mode", "`alone`: must be `auto`, `exclusive` or `shared`");
        check(json!({"ordering": "STRICT"}), "/ordering", "`STRICT`: must be `relaxed` or `strict`");
        check(json!({"streem": "x"}), "/streem", "did you mean `stream`");
        check(json!({"colour": "x"}), "/colour", "`colour` is unknown");
        check(json!({"a/b~c": 1}), "/a~1b~0c", "`a/b~c` is unknown");
    }

    #[test]
    fn all_problems_at_once() {
        let document = json!({
            "stream": "a b", "source_url": 5, "filter_subject": ">.>", "max_age": "x", "limits": {"bytes_in_flight": 0},
            "tls": {"key": "/k"}, "colour": 1
        });
        let found = problems(&document);
        let paths: Vec<_> = found.iter().map(|(path, _)| path.as_str()).collect();
        let expect = [
            "/colour",
            "/filter_subject",
            "/limits/bytes_in_flight",
            "/max_age",
            "/source_url",
            "/stream",
            "/target_url",
            "/tls",
        ];
        assert_eq!(paths, expect, "{found:?}");
    }

    #[test]
    fn any_bytes_are_an_answer() {
        let check = |json: &[u8], expect: &str| {
            let error = parse(json, "SITE").unwrap_err();
            assert!(error.to_string().contains(expect), "{error}");
        };
        check(b"", "not valid JSON");
        check(b"{\n  \"stream\": ,", "line 2 column 13");
        check(b"\xff\xfe", "not valid JSON");
        check("[".repeat(50_000).as_bytes(), "not valid JSON");
        check(b"[]", "the document is an array: must be of type object");
        check(b"null", "the document is `null`");
        check(b"{}", "`stream` is required");
        check(b"\"nats://a:s3cret@h\"", "the document is a text: must be of type object");
    }

    #[test]
    fn problems_show_no_secret() {
        let documents = [
            json!({"stream": "nats://u:s3cret@h", "source_url": ["nats://u:s3cret@h"], "target_url": "nats://u:s3cret@h:x"}),
            with(json!({"limits": "nats://u:s3cret@h", "source_url": "nats://s3cret@h1,nats://s3cret2@h2"})),
            with(json!({"name": "nats://u:s3cret@h", "filter_subject": "nats://u:s3cret@ h"})),
        ];
        for document in documents {
            let text = parse_value(&document, "SITE").unwrap_err().to_string();
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    /// A field that only one of them knows would be accepted and ignored, or refused and documented.
    #[test]
    fn schema_and_types_agree() {
        let schema = schema::replication_schema();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let tls = TlsDocument { ca: Some("a".into()), cert: Some("b".into()), key: Some("c".into()) };
        let choria = ChoriaDocument { seed_file: "a".into(), jwt_file: "b".into(), collective: "c".into() };
        let some = || Some("x".to_owned());
        // no `..Default::default()`: a new field has to be named here
        let full = Document {
            stream: "S".into(),
            streams: vec!["S*".to_owned()],
            exclude_streams: vec!["T".to_owned()],
            link: some(),
            id: some(),
            name: some(),
            target_stream: some(),
            source_url: some(),
            target_url: some(),
            source_context: some(),
            target_context: some(),
            source_domain: some(),
            target_domain: some(),
            source_api_prefix: some(),
            target_api_prefix: some(),
            filter_subject: some(),
            filter_subjects: vec!["a".to_owned(), "b.*".to_owned()],
            exclude_subjects: vec!["c".to_owned()],
            subject_transforms: vec![TransformDocument { src: "a".to_owned(), dest: "b".to_owned() }],
            target_subject_prefix: some(),
            target_subject_remove: some(),
            start_at_end: Some(true),
            start_sequence: Some(1),
            start_delta: some(),
            start_time: some(),
            max_age: some(),
            no_target_create: Some(true),
            target_initiated: Some(true),
            ephemeral: Some(true),
            leader_election_name: some(),
            hand_back: Some(true),
            compat: Some("choria".into()),
            target_like_source: Some(true),
            inspect_field: some(),
            inspect_header: some(),
            inspect_subject_token: Some(1),
            inspect_force_field: some(),
            inspect_duration: some(),
            warn_duration: some(),
            size_trigger: Some(1),
            advisory: Some(AdvisoryDocument { subject: "x".into(), reliable: Some(true) }),
            on_reject: Some("dead_letter".into()),
            dead_letter: Some(DeadLetterDocument { subject: "x".into() }),
            verify: Some(VerifyDocument {
                every: "1h".into(),
                effort: crate::config::VerifyEffort { sample: some(), rate: Some(1) },
            }),
            target_mode: Some("shared".into()),
            on_source_loss: Some("hold".into()),
            target_update: Some(true),
            loop_protection: Some(true),
            target_origin: vec![some().unwrap()],
            ordering: Some("strict".into()),
            consumers: vec!["a".to_owned()],
            description: some(),
            limits: Some(LimitsDocument {
                messages_in_flight: Some(1),
                bytes_in_flight: Some(65536),
                messages_per_second: Some(1),
                bytes_per_second: Some(1024),
                senders: Some(1),
                sender_bytes: Some(65536),
            }),
            tls: Some(tls.clone()),
            source_tls: Some(tls.clone()),
            target_tls: Some(tls.clone()),
            kind: Some("mirror".into()),
            target_leaf_url: some(),
            target_leaf_tls: Some(tls),
            choria: Some(choria.clone()),
            source_choria: Some(choria.clone()),
            target_choria: Some(choria),
        };
        let full = serde_json::to_value(full).unwrap();
        assert_eq!(keys(&full), keys(&schema["properties"]));
        assert_eq!(keys(&full["limits"]), keys(&schema["properties"]["limits"]["properties"]));
        assert_eq!(keys(&full["advisory"]), keys(&schema["properties"]["advisory"]["properties"]));
        assert_eq!(keys(&full["dead_letter"]), keys(&schema["properties"]["dead_letter"]["properties"]));
        assert_eq!(keys(&full["tls"]), keys(&schema["$defs"]["tls"]["properties"]));
        assert_eq!(keys(&full["choria"]), keys(&schema["$defs"]["choria"]["properties"]));
        let transform = &schema["properties"]["subject_transforms"]["items"];
        assert_eq!(keys(&full["subject_transforms"][0]), keys(&transform["properties"]));
        let findings = schema::REPLICATION.check(&full);
        assert!(findings.problems.is_empty() && findings.patterns.is_empty(), "{findings:?}");

        let written = keys(&serde_json::to_value(Document::default()).unwrap());
        assert_eq!(written, ["stream"]);

        let limits = &schema["properties"]["limits"]["properties"];
        assert_eq!(limits["messages_in_flight"]["default"], Limits::default().messages_in_flight);
        assert_eq!(limits["bytes_in_flight"]["default"], Limits::default().bytes_in_flight);
        assert_eq!(limits["senders"]["default"], SenderBounds::default().senders);
        assert_eq!(limits["sender_bytes"]["default"], SenderBounds::default().bytes);
    }
}
