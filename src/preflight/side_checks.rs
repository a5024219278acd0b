//! Asks one side for everything that the checks need.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use nats_lane::{
    Connection, Error, ErrorKind, Lane, ServerInfo, ServerRef, Turn, entropy, headers,
    jetstream::{ConsumerInfo, StoredMessage, StreamInfo, decode, decode_message},
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::{Duration, Instant, timeout, timeout_at};

use super::{permissions::Permissions, subjects::Share};
use crate::{
    allow::AllowList,
    config::{Replication, Side},
    copy::{
        source::{
            clock::{ClockReading, SourceClock},
            durable::{Durable, Way},
            learn,
        },
        target::{
            bridge,
            subjects::{Learned, Origins},
        },
    },
    names,
    nats::{self, account::AccountInfo},
};

/// Deadline for a login at one side, with all of its servers.
const CONNECT_WITHIN: Duration = Duration::from_millis(1_400);
/// Subjects that are looked up at most.
const MAX_SUBJECTS: usize = 64;
/// Subject on which a server reports the permissions of a user.
const USER_INFO: &str = "$SYS.REQ.USER.INFO";
/// Name of a consumer that does not exist.
pub(super) const NO_CONSUMER: &str = "sr_preflight";

/// Source or target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SideRole {
    Source,
    Target,
}

/// The result of a request.
#[derive(Debug, Clone, Default)]
pub(super) enum CheckAnswer<T> {
    Got(T),
    /// The answer is no.
    Failed(String),
    /// There was no answer, or one without the information.
    Unclear(String),
    /// An earlier check failed.
    #[default]
    NotAsked,
}

impl<T> CheckAnswer<T> {
    pub(super) fn got(&self) -> Option<&T> {
        match self {
            Self::Got(value) => Some(value),
            _ => None,
        }
    }
}

impl CheckAnswer<Option<StreamInfo>> {
    /// The stream, if it was seen.
    pub(super) fn there(&self) -> Option<&StreamInfo> {
        self.got().and_then(Option::as_ref)
    }
}

/// Streams by a subject, or a pattern, that they listen on.
pub(super) type Listeners = CheckAnswer<BTreeMap<String, Vec<String>>>;

/// Answers of one side.
#[derive(Debug, Clone, Default)]
pub(super) struct SideFacts {
    /// Addresses, without secrets; the name of a context that could not be read.
    pub(super) address: String,
    /// JSON pointer to the field that says where this side is.
    pub(super) path: &'static str,
    /// Login and addresses; `None` if the context could not be read.
    pub(super) connection: Option<Connection>,
    pub(super) connect: CheckAnswer<ServerInfo>,
    pub(super) jetstream: CheckAnswer<()>,
    pub(super) stream: CheckAnswer<Option<StreamInfo>>,
    /// How far the clock of the server that leads the stream is ahead of ours, seconds; `None` in it if the server does not
    /// report its time.
    pub(super) clock: CheckAnswer<Option<f64>>,
    pub(super) permissions: CheckAnswer<Permissions>,
    /// Usage and limits of the account.
    pub(super) account: CheckAnswer<AccountInfo>,
    /// Whether the calls that a copy needs are permitted, where the server does not report permissions.
    pub(super) calls: CheckAnswer<()>,
    /// The consumers of a source that forgets what was acknowledged.
    pub(super) consumers: CheckAnswer<Vec<ConsumerInfo>>,
    /// Subjects that a source stores although its configuration does not list them, as far as they were learned in time.
    pub(super) learned: Learned,
    /// The streams that listen on the subjects that the copy publishes to.
    pub(super) listeners: Listeners,
    /// If the other side is the same account, reached through leafnodes: the streams here that listen on the subjects
    /// published there.
    pub(super) beside: Listeners,
}

impl SideFacts {
    /// Prefix of the JetStream API; empty if the context could not be read.
    pub(super) fn api_prefix(&self) -> &str {
        self.connection.as_ref().map_or("", |connection| connection.api_prefix.as_str())
    }
}

/// The checks of one side while they run.
pub(super) struct SideChecks {
    pub(super) facts: SideFacts,
    name: String,
    lane: Option<Lane>,
    until: Instant,
}

/// Why a request got no answer.
enum Silence {
    /// An error; `lasting` if an operator has to correct it.
    Error {
        lasting: bool,
        message: String,
    },
    Late,
}

/// A request: subject and body. Without a body the answer does not matter.
type CallRequest = (String, Option<String>);

impl SideChecks {
    /// Connects and sends the requests that do not depend on the other side.
    pub(super) async fn at(rules: &AllowList, role: SideRole, replication: &Replication, until: Instant) -> Self {
        let side = match role {
            SideRole::Source => &replication.source,
            SideRole::Target => &replication.target,
        };
        let name = format!("{} {} preflight", names::PROGRAM, replication.id);
        let facts = SideFacts { path: place_path(role, &side.place), ..SideFacts::default() };
        let mut checks = Self { facts, name, lane: None, until };
        match rules.resolve(&side.place) {
            Ok(connection) => checks.use_connection(connection),
            Err(error) => {
                checks.facts.address = side.place.to_string();
                checks.facts.connect = CheckAnswer::Failed(error.message);
                return checks;
            }
        }
        checks.facts.connect = checks.connect().await;
        if checks.facts.connect.got().is_some() {
            checks.ask_permissions().await;
            checks.ask_stream(side).await;
            checks.ask_account().await;
            if checks.facts.permissions.got().is_none() {
                checks.ask_calls(role, replication).await;
            }
            if role == SideRole::Source && checks.facts.stream.there().is_some_and(Durable::is_needed) {
                checks.ask_consumers(side).await;
            }
            if role == SideRole::Source {
                checks.learn(replication).await;
            }
        }
        checks
    }

    fn use_connection(&mut self, connection: Connection) {
        let hosts = connection.endpoint.hosts.iter();
        self.facts.address = hosts.map(ToString::to_string).collect::<Vec<_>>().join(",");
        self.facts.connection = Some(connection);
    }

    fn lane(&self) -> impl Future<Output = Result<Lane, Error>> + Send + use<> {
        let (connection, name) = (self.facts.connection.clone(), self.name.clone());
        async move {
            let connection = connection.ok_or_else(|| Error::hold("there is nowhere to connect to"))?;
            Lane::connect(&connection, &name).await
        }
    }

    /// Tries one server after the other and stays with the one that accepts the login. Each gets its part of the time; a
    /// server that a copy would give more time is not judged by its silence.
    async fn connect(&mut self) -> CheckAnswer<ServerInfo> {
        let Some(all) = self.facts.connection.clone() else { return CheckAnswer::NotAsked };
        let end = self.until.min(Instant::now() + CONNECT_WITHIN);
        let (mut said, mut cut) = (Vec::new(), false);
        for (index, host) in all.endpoint.hosts.iter().enumerate() {
            let left = u32::try_from(all.endpoint.hosts.len() - index).unwrap_or(u32::MAX);
            let part = end.saturating_duration_since(Instant::now()) / left;
            let mut one = all.clone();
            one.endpoint.hosts = vec![host.clone()];
            let limit = one.endpoint.connect_timeout;
            let attempt = Lane::connect(&one, &self.name);
            // Within its own limit, the lane gives up and reports it.
            let attempt = if limit <= part { Ok(attempt.await) } else { timeout(part, attempt).await };
            match attempt {
                Ok(Ok(lane)) => {
                    self.facts.connection = Some(one);
                    return CheckAnswer::Got(self.lane.insert(lane).info().clone());
                }
                Ok(Err(error)) => said.push(error.message),
                Err(_) => {
                    cut = true;
                    said.push(format!(
                        "no answer from `{host}` within {part:.1?}, and a copy would wait for {limit:?}: whether it lets \
                         us in is not known"
                    ));
                }
            }
        }
        let said = said.join("; ");
        if cut { CheckAnswer::Unclear(said) } else { CheckAnswer::Failed(said) }
    }

    /// Prefix of the subjects of the JetStream API.
    fn api_prefix(&self) -> String {
        self.facts.connection.as_ref().map(|connection| connection.api_prefix.clone()).unwrap_or_default()
    }

    async fn ask_permissions(&mut self) {
        self.facts.permissions = match self.ask(&[(USER_INFO.to_owned(), Some(String::new()))]).await {
            Ok(answers) => match answers.first().and_then(Option::as_ref).and_then(|body| Permissions::parse(body)) {
                Some(permissions) => CheckAnswer::Got(permissions),
                None => CheckAnswer::Unclear(format!("the server does not answer `{USER_INFO}`")),
            },
            Err(Silence::Error { message, .. }) => CheckAnswer::Unclear(message),
            Err(Silence::Late) => CheckAnswer::Unclear(format!("no answer to `{USER_INFO}` in time")),
        };
    }

    /// Sent only where it is known to be allowed: a refusal would end the connection.
    async fn ask_account(&mut self) {
        let subject = format!("{}.INFO", self.api_prefix());
        let allowed = self.facts.permissions.got().is_some_and(|all| all.publish(&subject) == Share::All);
        if !allowed || self.facts.jetstream.got().is_none() {
            return;
        }
        self.facts.account = match self.ask(&[(subject.clone(), Some(String::new()))]).await.as_deref() {
            Ok([Some(body)]) => decode(body).map_or_else(|error| CheckAnswer::Unclear(error.message), CheckAnswer::Got),
            Ok(_) => CheckAnswer::Unclear(format!("there was no answer to `{subject}`")),
            Err(Silence::Error { message, .. }) => CheckAnswer::Unclear(message.clone()),
            Err(Silence::Late) => CheckAnswer::Unclear(format!("no answer to `{subject}` in time")),
        };
    }

    async fn ask_stream(&mut self, side: &Side) {
        let subject = format!("{}.STREAM.INFO.{}", self.api_prefix(), side.stream);
        let sent = Instant::now();
        let answer = self.ask(&[(subject.clone(), Some(String::new()))]).await;
        let (received, local) = (Instant::now(), entropy::now());
        (self.facts.jetstream, self.facts.stream) = match answer.as_deref() {
            Ok([Some(body)]) => match decode::<StreamInfo>(body) {
                Ok(info) => (CheckAnswer::Got(()), CheckAnswer::Got(Some(info))),
                Err(error) if error.kind == ErrorKind::NotFound => (CheckAnswer::Got(()), CheckAnswer::Got(None)),
                Err(error) if error.kind == ErrorKind::Hold => {
                    (CheckAnswer::Failed(error.message), CheckAnswer::NotAsked)
                }
                Err(error) => (CheckAnswer::Got(()), CheckAnswer::Unclear(format!("`{subject}`: {error}"))),
            },
            Ok(_) => {
                let message = format!("no responders for `{subject}`: JetStream is not enabled");
                (CheckAnswer::Failed(message), CheckAnswer::NotAsked)
            }
            Err(Silence::Error { lasting: true, message }) => {
                (CheckAnswer::NotAsked, CheckAnswer::Failed(message.clone()))
            }
            Err(Silence::Error { message, .. }) => (CheckAnswer::NotAsked, CheckAnswer::Unclear(message.clone())),
            Err(Silence::Late) => {
                (CheckAnswer::NotAsked, CheckAnswer::Unclear(format!("no answer to `{subject}` in time")))
            }
        };
        if let Some(info) = self.facts.stream.there().filter(|info| info.is_leaders()) {
            let heard = ClockReading { sent, received, server: info.ts, local };
            self.facts.clock = CheckAnswer::Got(SourceClock::new(&heard).offset(received, local));
        }
    }

    /// A copy does not need the permission for this request: without an answer nothing is known.
    async fn ask_consumers(&mut self, side: &Side) {
        #[derive(Deserialize)]
        struct StreamListReply {
            consumers: Option<Vec<ConsumerInfo>>,
        }
        let subject = format!("{}.CONSUMER.LIST.{}", self.api_prefix(), side.stream);
        let allowed = self.facts.permissions.got().is_some_and(|user| user.publish(&subject) == Share::All);
        if !allowed {
            return;
        }
        if let Ok(answers) = self.ask(&[(subject, Some("{}".to_owned()))]).await
            && let Some(list) =
                answers.first().and_then(Option::as_ref).and_then(|body| decode::<StreamListReply>(body).ok())
        {
            self.facts.consumers = CheckAnswer::Got(list.consumers.unwrap_or_default());
        }
    }

    /// Asks for the subjects that a source stores. Streams that it takes messages from are asked for where that is known to
    /// be allowed.
    async fn learn(&mut self, replication: &Replication) {
        let Some(source) = self.facts.stream.there().cloned() else { return };
        let mut origins = Origins::default();
        let prefix = self.api_prefix();
        let may_ask = |(external, name): &(String, String)| {
            let api = if external.is_empty() { &prefix } else { external };
            let subject = format!("{api}.STREAM.INFO.{name}");
            self.facts.permissions.got().is_some_and(|user| user.publish(&subject) == Share::All)
        };
        let may_ask = origins.missing(&source).iter().all(may_ask);
        let Ok(mut lane) = self.taken().await else { return };
        let asked = async {
            if may_ask {
                learn::origins(&mut lane, &source, &mut origins).await?;
            }
            learn::stored(&mut lane, replication, &source, origins.clone(), None).await
        };
        match timeout_at(self.until, asked).await {
            Ok(Ok(learned)) => {
                self.facts.learned = learned;
                self.lane = Some(lane);
            }
            _ => self.facts.learned.origins = origins,
        }
    }

    /// The connection, or a new one.
    async fn taken(&mut self) -> Result<Lane, Error> {
        match self.lane.take() {
            Some(lane) => Ok(lane),
            None => self.lane().await,
        }
    }

    /// If a server does not report permissions, the calls of a copy are made in a way that changes nothing:
    /// what is asked for does not exist, or contradicts its subject.
    async fn ask_calls(&mut self, role: SideRole, replication: &Replication) {
        let Some(stream) = self.facts.stream.got() else { return };
        let questions = calls(role, replication, stream.as_ref(), &self.api_prefix());
        self.facts.calls = match self.ask(&questions).await {
            Ok(_) => CheckAnswer::Got(()),
            Err(Silence::Error { lasting: true, message }) => CheckAnswer::Failed(message),
            Err(Silence::Error { message, .. }) => CheckAnswer::Unclear(message),
            Err(Silence::Late) => CheckAnswer::Unclear("no answer to the calls of a copy in time".to_owned()),
        };
    }

    /// Asks which streams listen on subjects.
    pub(super) async fn ask_who_listens(&mut self, subjects: BTreeSet<String>, until: Instant) -> Listeners {
        #[derive(Deserialize)]
        struct StreamNamesReply {
            streams: Option<Vec<String>>,
        }
        if self.facts.stream.got().is_none() {
            return CheckAnswer::NotAsked;
        }
        self.until = until;
        let subjects: Vec<_> = subjects.into_iter().filter(|subject| !subject.is_empty()).take(MAX_SUBJECTS).collect();
        let what = format!("{}.STREAM.NAMES", self.api_prefix());
        let question = |subject: &String| (what.clone(), Some(json!({ "subject": subject }).to_string()));
        let answers = self.ask(&subjects.iter().map(question).collect::<Vec<_>>()).await;
        match answers {
            Ok(answers) => {
                let streams = answers
                    .into_iter()
                    .map(|body| decode::<StreamNamesReply>(&body?).ok()?.streams.or(Some(Vec::new())));
                match streams.collect::<Option<Vec<_>>>() {
                    Some(streams) => CheckAnswer::Got(subjects.into_iter().zip(streams).collect()),
                    None => CheckAnswer::Unclear(format!("`{what}` is not answered as it should be")),
                }
            }
            Err(Silence::Error { message, .. }) => CheckAnswer::Unclear(message),
            Err(Silence::Late) => CheckAnswer::Unclear(format!("no answer to `{what}` in time")),
        }
    }

    /// Messages at some sequences of a stream, as far as they are there and answered in time.
    pub(super) async fn ask_messages(&mut self, stream: &str, seqs: &[u64], until: Instant) -> Vec<StoredMessage> {
        self.until = until;
        let what = format!("{}.STREAM.MSG.GET.{stream}", self.api_prefix());
        let question = |seq: &u64| (what.clone(), Some(json!({ "seq": seq }).to_string()));
        let answers = self.ask(&seqs.iter().map(question).collect::<Vec<_>>()).await.unwrap_or_default();
        answers.into_iter().flatten().filter_map(|body| decode_message(&body).ok().flatten()).collect()
    }

    /// Whether what is published here reaches the other side: then both are one account, over leafnodes or gateways. Not
    /// known where a connection is missing or may not do that.
    pub(super) async fn reaches(&mut self, other: &mut Self, until: Instant) -> Option<bool> {
        self.until = until;
        other.until = until;
        let (Ok(Ok(mut from)), Ok(Ok(mut to))) =
            (timeout_at(until, self.taken()).await, timeout_at(until, other.taken()).await)
        else {
            return None;
        };
        // Nothing that comes in less time says nothing.
        let enough = until.saturating_duration_since(Instant::now()) >= bridge::REACHES_WITHIN;
        let reaches = match enough {
            true => nats::reaches(&mut from, &mut to, bridge::REACHES_WITHIN).await.ok(),
            false => None,
        };
        // Whoever publishes without the permission loses the connection.
        other.lane = Some(to);
        reaches
    }

    /// Asks everything at once and waits for all answers; `None` where nobody is there to answer. A permission that
    /// is missing ends the connection; the next question makes another one.
    async fn ask(&mut self, questions: &[CallRequest]) -> Result<Vec<Option<Bytes>>, Silence> {
        let Ok(answers) = timeout_at(self.until, self.try_ask(questions)).await else {
            self.lane = None;
            return Err(Silence::Late);
        };
        answers.map_err(|error| {
            self.lane = None;
            Silence::Error { lasting: error.kind == ErrorKind::Hold, message: error.message }
        })
    }

    async fn try_ask(&mut self, questions: &[CallRequest]) -> Result<Vec<Option<Bytes>>, Error> {
        let lane = self.taken().await?;
        let lane = self.lane.insert(lane);
        let server = lane.info().server_id.clone();
        let mut waiting = BTreeMap::new();
        for (index, (subject, body)) in questions.iter().enumerate() {
            let reply = lane.send_request(subject, body.as_deref().unwrap_or_default().as_bytes());
            if body.is_some() {
                waiting.insert(reply.into_bytes(), index);
            }
        }
        let mut answers = vec![None; questions.len()];
        while !waiting.is_empty() {
            let Turn::Received(batch) = lane.turn().await? else { continue };
            for message in batch.iter().filter(|message| message.sid == Lane::REQUEST_SID) {
                let Some(index) = waiting.get(message.subject).copied() else { continue };
                let subject = &questions[index].0;
                let responders = headers::status(message.header) != Some(503);
                if subject == USER_INFO && responders && !Permissions::are_from(message.payload, &server) {
                    continue;
                }
                waiting.remove(message.subject);
                if let Some(stream) = storing_stream(message.payload) {
                    return Err(Error::hold(format!(
                        "`{subject}` was stored by stream `{stream}`: the API prefix is a subject of that stream"
                    )));
                }
                if responders {
                    answers[index] = Some(Bytes::copy_from_slice(message.payload));
                }
            }
        }
        Ok(answers)
    }
}

/// The field of a document that says where a side is.
fn place_path(role: SideRole, place: &ServerRef) -> &'static str {
    match (role, place) {
        (SideRole::Source, ServerRef::Known(_)) => "/source_url",
        (SideRole::Source, ServerRef::Context { .. }) => "/source_context",
        (SideRole::Target, ServerRef::Known(_)) => "/target_url",
        (SideRole::Target, ServerRef::Context { .. }) => "/target_context",
    }
}

/// The stream that took a question for a message, by what it says to whoever publishes; answers of the API have a
/// `type`.
fn storing_stream(answer: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct StoringAck {
        stream: String,
        #[serde(rename = "seq")]
        _seq: u64,
        r#type: Option<String>,
    }
    let ack: StoringAck = serde_json::from_slice(answer).ok()?;
    ack.r#type.is_none().then_some(ack.stream)
}

/// The calls of the JetStream API that a copy makes at one side, beside `STREAM.INFO`, with bodies that change nothing:
/// the server checks permissions first, and then finds nothing of that name or a body of another subject.
pub(super) fn calls(
    role: SideRole,
    replication: &Replication,
    there: Option<&StreamInfo>,
    prefix: &str,
) -> Vec<CallRequest> {
    const NOTHING_THERE: &str = r#"{"seq":9223372036854775807}"#;
    let question = |what: String, body: Option<&str>| (format!("{prefix}.{what}"), body.map(str::to_owned));
    // Only a consumer with one filter bears it in its subject.
    let (stream, filter) = match (role, replication.scope.filters()) {
        (SideRole::Source, [filter]) => (&replication.source.stream, Some(filter)),
        (SideRole::Source, _) => (&replication.source.stream, None),
        (SideRole::Target, _) => (&replication.target.stream, None),
    };
    let durable = there.filter(|stream| role == SideRole::Source && Durable::is_needed(stream));
    let consumer = durable.map_or_else(|| NO_CONSUMER.to_owned(), |_| Durable::name(replication));
    let mut calls = vec![
        // First, because its refusal has to come before the answers to the others.
        question(format!("CONSUMER.MSG.NEXT.{stream}.{NO_CONSUMER}"), None),
        question(format!("STREAM.MSG.GET.{stream}"), Some(NOTHING_THERE)),
        // To look for a place to begin at, a copy also reads what its filter leaves out.
        question(format!("CONSUMER.CREATE.{stream}.{consumer}"), Some("{}")),
        question(format!("CONSUMER.DELETE.{stream}.{NO_CONSUMER}"), Some("")),
    ];
    if let Some(filter) = filter {
        calls.push(question(format!("CONSUMER.CREATE.{stream}.{consumer}.{filter}"), Some("{}")));
    }
    if role == SideRole::Source {
        calls.push(question(format!("CONSUMER.INFO.{stream}.{}", Durable::name(replication)), Some("")));
    }
    if !replication.consumers.is_empty() {
        calls.push(question(format!("CONSUMER.LIST.{stream}"), Some("")));
        calls.push(question(format!("CONSUMER.INFO.{stream}.{NO_CONSUMER}"), Some("")));
    }
    if let Some(source) = durable {
        let way = Way::of(source);
        if way == Way::FlowControl {
            calls.push(question(format!("CONSUMER.RESET.{stream}.{NO_CONSUMER}"), Some("")));
        }
        // Beside the API; nobody answers these.
        let acks = match way {
            Way::Explicit => format!("$JS.ACK.{stream}.{NO_CONSUMER}.1.1.1.0.0"),
            Way::FlowControl => format!("$JS.FC.{stream}.{NO_CONSUMER}.none"),
        };
        calls.insert(0, (acks, None));
    }
    if there.is_none() && replication.create_target && role == SideRole::Target {
        calls.push(question(format!("STREAM.CREATE.{stream}"), Some("{}")));
    }
    if there.is_some() && replication.update_target && role == SideRole::Target {
        calls.push(question(format!("STREAM.UPDATE.{stream}"), Some("{}")));
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stream_says_to_a_publisher_is_no_answer() {
        assert_eq!(storing_stream(br#"{"stream":"ORDERS","seq":5}"#).as_deref(), Some("ORDERS"));
        assert_eq!(storing_stream(br#"{"stream":"ORDERS","domain":"d","seq":5}"#).as_deref(), Some("ORDERS"));
        for answer in ["", "{}", r#"{"type":"io.nats.x","stream":"ORDERS","seq":5}"#, r#"{"streams":["A"],"total":1}"#]
        {
            assert_eq!(storing_stream(answer.as_bytes()), None, "{answer}");
        }
    }
}
