//! Calls of the JetStream API over a lane: streams, consumers, stored messages. All reads are answered by the leader of the
//! stream (`STREAM.INFO`, `STREAM.MSG.GET`); direct gets can be stale.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use crate::{
    ApiError, Batch, Error, ErrorKind, Lane, Message, headers,
    parser::{self, count},
};

/// The stream or the account has as many consumers as it may have.
pub const TOO_MANY_CONSUMERS: u32 = 10026;
/// A consumer of this name exists, with another configuration.
pub const CONSUMER_EXISTS: u32 = 10148;

/// Questions of one kind that are on their way together.
const ASKED_TOGETHER: usize = 64;

/// A consumer that asks for more unacknowledged messages than it may, and for a longer rest without being deleted.
const MAX_ACK_PENDING_EXCEEDED: u32 = 10121;
const INACTIVE_THRESHOLD_EXCEEDED: u32 = 10153;

/// `STREAM.INFO`.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamInfo {
    /// The configuration exactly as the server tells it.
    #[serde(deserialize_with = "object")]
    pub config: Value,
    /// When the stream was made; a hint, not an identity.
    #[serde(default)]
    pub created: String,
    /// Sequences and counts.
    pub state: StreamState,
    /// How far the sources have come, where the server says that (2.15 and later).
    #[serde(default)]
    pub sources: Vec<SourceProgress>,
    /// How far a mirror has come; `None` for other streams.
    #[serde(default)]
    pub mirror: Option<SourceProgress>,
    /// JetStream domain of the server that answered, if it has one.
    #[serde(default)]
    pub domain: Option<String>,
    /// Who holds the stream in a cluster; servers on their own say nothing.
    #[serde(default)]
    pub cluster: Option<StreamCluster>,
    /// Time of the server that answered, when it did; `None` where it reports none.
    #[serde(default, deserialize_with = "point_in_time")]
    pub ts: Option<DateTime<Utc>>,
}

/// A configuration is read and changed by the names of its fields.
fn object<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    Map::deserialize(deserializer).map(Value::Object)
}

/// A time that cannot be read, or that was never set, is none: the rest of the answer is worth more than it.
fn point_in_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    let value = Option::<Value>::deserialize(deserializer)?;
    let time = value.as_ref().and_then(Value::as_str).and_then(|text| DateTime::parse_from_rfc3339(text).ok());
    Ok(time.map(|time| time.to_utc()).filter(|time| *time > DateTime::UNIX_EPOCH))
}

/// `mirror`, or one of `sources`, of [`StreamInfo`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SourceProgress {
    /// Name of the stream that the messages come from.
    pub name: String,
    /// Messages there that are not here yet, as far as the server knows.
    #[serde(deserialize_with = "count")]
    pub lag: u64,
    /// Time since the server heard of it last, nanoseconds; negative where it never did.
    pub active: i64,
    /// Why it does not progress.
    pub error: Option<ApiError>,
    /// Where it comes from, if that is no stream of the same account and domain.
    pub external: Option<SourceExternal>,
    /// Last sequence of the source that was taken; 0 where none was, or the server does not say that.
    pub seq: u64,
}

/// `external` of [`SourceProgress`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct SourceExternal {
    /// The API prefix.
    pub api: String,
}

/// `cluster` of [`StreamInfo`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct StreamCluster {
    /// Name of the cluster.
    pub name: String,
    /// Name of the server that leads the stream; empty while the stream has no leader.
    pub leader: String,
    /// The others that hold the stream: all but the server that answered.
    pub replicas: Vec<StreamPeer>,
}

/// One of `replicas` of [`StreamCluster`].
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct StreamPeer {
    /// Name of the server.
    pub name: String,
}

/// `state` of [`StreamInfo`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StreamState {
    /// Messages stored.
    #[serde(deserialize_with = "count")]
    pub messages: u64,
    /// Bytes that they take.
    #[serde(deserialize_with = "count")]
    pub bytes: u64,
    /// First sequence; last + 1 when empty.
    #[serde(deserialize_with = "count")]
    pub first_seq: u64,
    /// Last sequence ever given.
    #[serde(deserialize_with = "count")]
    pub last_seq: u64,
    /// Consumers of the stream.
    #[serde(rename = "consumer_count")]
    pub consumers: i64,
    /// Different subjects of the messages stored.
    #[serde(deserialize_with = "count")]
    pub num_subjects: u64,
    /// Sequences between the first and the last that were removed.
    #[serde(rename = "num_deleted", deserialize_with = "count")]
    pub deleted: u64,
    /// Messages that the server found damaged on its disk.
    #[serde(deserialize_with = "lost_messages")]
    pub lost: u64,
}

/// How many messages `lost` of a stream's state names.
fn lost_messages<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    struct LostMessages {
        msgs: Option<Vec<u64>>,
    }
    let lost = Option::<LostMessages>::deserialize(deserializer)?;
    Ok(lost.and_then(|lost| lost.msgs).map_or(0, |sequences| sequences.len() as u64))
}

/// Whether the leader of a stream answered a question about it: not if the stream has no leader, or if the leader is one of the others.
/// While there is no leader, and for some seconds after it was started, a server answers from whatever it has of the stream:
/// with an empty disk, nothing.
pub fn is_leaders_answer<'a>(leader: &str, mut others: impl Iterator<Item = &'a str>) -> bool {
    !leader.is_empty() && others.all(|other| other != leader)
}

impl StreamInfo {
    /// Whether the leader of the stream says this: nothing else proves what the stream holds.
    pub fn is_leaders(&self) -> bool {
        let names = |cluster: &StreamCluster| {
            is_leaders_answer(&cluster.leader, cluster.replicas.iter().map(|peer| peer.name.as_str()))
        };
        self.cluster.as_ref().is_none_or(names)
    }

    /// A configuration value that is a string; empty if there is none.
    pub fn text(&self, name: &str) -> &str {
        self.config.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// A configuration value that is a number; 0 if there is none.
    pub fn number(&self, name: &str) -> i64 {
        self.config.get(name).and_then(Value::as_i64).unwrap_or_default()
    }

    /// A configuration value that is true.
    pub fn flag(&self, name: &str) -> bool {
        self.config.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    /// A configuration value that is a list or an object with something in it.
    pub fn has(&self, name: &str) -> bool {
        match self.config.get(name) {
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(fields)) => !fields.is_empty(),
            _ => false,
        }
    }

    /// The subjects that the stream listens on.
    pub fn subjects(&self) -> Vec<&str> {
        self.config
            .get("subjects")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default()
    }

    /// API level of the server that leads the stream (ADR-44); 0 before 2.11.
    pub fn api_level(&self) -> u32 {
        let level = self.config.pointer("/metadata/_nats.level").and_then(Value::as_str);
        level.and_then(|level| level.parse().ok()).unwrap_or_default()
    }
}

/// A stored message, as `STREAM.MSG.GET` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredMessage {
    /// Subject.
    pub subject: String,
    /// Stream sequence.
    pub sequence: u64,
    /// Stored time, nanoseconds since the Unix epoch.
    pub time_ns: i64,
    /// Header block; empty for none.
    pub header: Vec<u8>,
    /// Bytes of the payload; 0 where only the headers were read.
    pub payload: usize,
}

/// `CONSUMER.CREATE` and `CONSUMER.INFO`, the parts that matter here.
#[derive(Debug, Clone, Deserialize)]
pub struct ConsumerInfo {
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// The configuration exactly as the server tells it.
    #[serde(default)]
    pub config: Value,
    /// Messages that match and have not been delivered.
    #[serde(default, deserialize_with = "count")]
    pub num_pending: u64,
    /// What was delivered last.
    #[serde(default)]
    pub delivered: SequencePair,
    /// Up to where everything is acknowledged.
    #[serde(default)]
    pub ack_floor: SequencePair,
    /// Messages that were delivered and are not acknowledged.
    #[serde(default, deserialize_with = "count")]
    pub num_ack_pending: u64,
    /// Pull requests that wait for messages.
    #[serde(default, deserialize_with = "count")]
    pub num_waiting: u64,
    /// Whether a subscriber listens where it delivers to.
    #[serde(default)]
    pub push_bound: bool,
}

/// A consumer's and a stream's sequence.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct SequencePair {
    /// Sequence of the deliveries of the consumer.
    #[serde(default, deserialize_with = "count")]
    pub consumer_seq: u64,
    /// Sequence of the stream.
    #[serde(default, deserialize_with = "count")]
    pub stream_seq: u64,
    /// When that was, by the consumer's leader, since it became the leader.
    #[serde(default)]
    pub last_active: Option<DateTime<Utc>>,
}

/// The ack of one publish: which stream stored it, and where.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct PublishAck<'a> {
    /// Stream that stored the message.
    #[serde(default, borrow)]
    pub stream: Cow<'a, str>,
    /// JetStream domain of that stream, if it has one.
    #[serde(default, borrow)]
    pub domain: Option<Cow<'a, str>>,
    /// Sequence in the stream; 0 where nothing is stored yet.
    #[serde(default, deserialize_with = "count")]
    pub seq: u64,
    /// Whether the stream has a message of the same id already.
    #[serde(default)]
    pub duplicate: bool,
    error: Option<ApiError>,
}

impl<'a> PublishAck<'a> {
    /// Whether it names a stream that has the message. Any subscriber can answer a publish, with `{}` for example.
    pub fn is_of_a_stream(&self) -> bool {
        !self.stream.is_empty() && (self.seq > 0 || self.duplicate)
    }

    /// Reads an ack; the error is the server's, or says that `whose` ack is none.
    pub fn parse(payload: &'a [u8], whose: &str) -> Result<Self, Error> {
        let mut ack: Self = serde_json::from_slice(payload)
            .map_err(|error| Error::retry(format!("{whose} sent an ack that is not valid: {error}")))?;
        match ack.error.take() {
            Some(error) => Err(error.into()),
            None => Ok(ack),
        }
    }
}

/// `STREAM.NAMES`, one page.
#[derive(Deserialize)]
struct NamesPage {
    #[serde(default)]
    total: usize,
    streams: Option<Vec<String>>,
}

/// `CONSUMER.LIST`, one page.
#[derive(Deserialize)]
struct ConsumersPage {
    #[serde(default)]
    total: usize,
    consumers: Option<Vec<ConsumerInfo>>,
    /// Those whose leader did not answer.
    missing: Option<Vec<String>>,
}

/// The consumers of a stream.
#[derive(Debug, Clone, Default)]
pub struct ConsumerList {
    /// Those whose leaders answered.
    pub consumers: Vec<ConsumerInfo>,
    /// Whether these are all.
    pub is_complete: bool,
}

/// Pages of the list of streams that are read; the server has 1,024 names on each.
const MAX_PAGES: usize = 100;

#[derive(Deserialize)]
struct ApiReply<T> {
    error: Option<ApiError>,
    #[serde(flatten)]
    value: Option<T>,
}

/// The JetStream API of one side, over its lane and below the lane's prefix.
#[derive(Debug)]
pub struct Api<'a> {
    lane: &'a mut Lane,
}

impl<'a> Api<'a> {
    /// The API that the lane's prefix leads to.
    pub fn new(lane: &'a mut Lane) -> Self {
        Self { lane }
    }

    async fn call<T: DeserializeOwned>(&mut self, what: &str, body: &Value) -> Result<T, Error> {
        let subject = format!("{}.{what}", self.lane.api_prefix());
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let reply = self.lane.request(&subject, body.as_bytes()).await?;
        decode(&reply).map_err(|error| error.context(what))
    }

    /// Asks for a stream; `None` if there is none. An answer of a server that does not lead it is a transient error.
    pub async fn stream_info(&mut self, stream: &str) -> Result<Option<StreamInfo>, Error> {
        self.stream_info_beside(stream, |_, _| {}).await
    }

    /// The same beside requests that were sent before; `others` is that of [`Lane::request_beside`].
    pub async fn stream_info_beside(
        &mut self,
        stream: &str,
        others: impl FnMut(&[u8], Bytes),
    ) -> Result<Option<StreamInfo>, Error> {
        let subject = format!("{}.STREAM.INFO.{stream}", self.lane.api_prefix());
        let reply = self.lane.request_beside(&subject, b"", others).await?;
        read_info(stream, &reply)
    }

    /// Asks for many streams, many at a time: `each` gets the name and what [`Api::stream_info`] would say of it.
    ///
    /// # Errors
    ///
    /// The connection failed: the streams that `each` did not get are not known.
    pub async fn stream_infos(
        &mut self,
        streams: impl IntoIterator<Item = String>,
        mut each: impl FnMut(String, Result<Option<StreamInfo>, Error>),
    ) -> Result<(), Error> {
        let (mut streams, mut waiting) = (streams.into_iter().peekable(), HashMap::new());
        while streams.peek().is_some() || !waiting.is_empty() {
            for stream in streams.by_ref().take(ASKED_TOGETHER - waiting.len()) {
                let subject = format!("{}.STREAM.INFO.{stream}", self.lane.api_prefix());
                waiting.insert(self.lane.send_request(&subject, b"").into_bytes(), stream);
            }
            for (reply, answer) in self.lane.answers().await? {
                if let Some(stream) = waiting.remove(&reply) {
                    let info = read_info(&stream, &answer);
                    each(stream, info);
                }
            }
        }
        Ok(())
    }

    /// Names of the streams that listen on a subject, or on a part of a pattern; the first page of them.
    pub async fn stream_names(&mut self, subject: &str) -> Result<Vec<String>, Error> {
        let names: NamesPage = self.call("STREAM.NAMES", &json!({ "subject": subject })).await?;
        Ok(names.streams.unwrap_or_default())
    }

    /// Names of all streams. An error also where the list changed while it was read, so that no name is missing.
    pub async fn all_stream_names(&mut self) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        let (mut read, mut expected) = (0, None);
        for _ in 0..MAX_PAGES {
            let NamesPage { total, streams } = self.call("STREAM.NAMES", &json!({ "offset": read })).await?;
            let page = streams.unwrap_or_default();
            if expected.is_some_and(|expected| expected != total) || (page.is_empty() && read < total) {
                return Err(Error::retry("the list of streams changed while it was read"));
            }
            expected = Some(total);
            read += page.len();
            names.extend(page);
            if read >= total {
                return Ok(names);
            }
        }
        Err(Error::hold(format!("there are more than {read} streams: more than can be listed")))
    }

    /// Creates a stream.
    pub async fn create_stream(&mut self, stream: &str, config: &Value) -> Result<StreamInfo, Error> {
        self.call(&format!("STREAM.CREATE.{stream}"), config).await
    }

    /// Gives a stream another configuration, the whole of it.
    pub async fn update_stream(&mut self, stream: &str, config: &Value) -> Result<StreamInfo, Error> {
        self.call(&format!("STREAM.UPDATE.{stream}"), config).await
    }

    /// Reads the message at a sequence; `None` if there is none.
    pub async fn message(&mut self, stream: &str, sequence: u64) -> Result<Option<StoredMessage>, Error> {
        self.get(stream, &json!({ "seq": sequence })).await
    }

    /// Reads the first message at or after a sequence; `None` if there is none.
    pub async fn message_from(&mut self, stream: &str, sequence: u64) -> Result<Option<StoredMessage>, Error> {
        self.get(stream, &message_from_call(stream, sequence).1).await
    }

    /// Reads the first message of a subject at or after a sequence; `None` if there is none.
    pub async fn message_of(
        &mut self,
        stream: &str,
        subject: &str,
        sequence: u64,
    ) -> Result<Option<StoredMessage>, Error> {
        self.get(stream, &json!({ "seq": sequence, "next_by_subj": subject })).await
    }

    /// Reads the last message of a subject; `None` if there is none.
    pub async fn last_message_of(&mut self, stream: &str, subject: &str) -> Result<Option<StoredMessage>, Error> {
        self.get(stream, &json!({ "last_by_subj": subject })).await
    }

    /// Reads the message at a sequence, and its payload; `None` if there is none.
    pub async fn whole_message(
        &mut self,
        stream: &str,
        sequence: u64,
    ) -> Result<Option<(StoredMessage, Vec<u8>)>, Error> {
        let (what, body) = message_call(stream, sequence);
        let subject = format!("{}.{what}", self.lane.api_prefix());
        let reply = self.lane.request(&subject, body.to_string().as_bytes()).await?;
        let Some(message) = decode_message(&reply).map_err(|error| error.context(&what))? else { return Ok(None) };
        let StoredPayload { message: PayloadField { data } } = decode(&reply).map_err(|error| error.context(&what))?;
        let payload = STANDARD.decode(data.unwrap_or_default());
        let payload = payload.map_err(|error| Error::retry(format!("{what}: the payload is not base64: {error}")))?;
        Ok(Some((message, payload)))
    }

    /// Deletes the message at a sequence; one that is gone already is no error.
    pub async fn delete_message(&mut self, stream: &str, sequence: u64) -> Result<(), Error> {
        let what = format!("STREAM.MSG.DELETE.{stream}");
        found(self.call::<Value>(&what, &json!({ "seq": sequence, "no_erase": true })).await).map(|_| ())
    }

    async fn get(&mut self, stream: &str, wanted: &Value) -> Result<Option<StoredMessage>, Error> {
        let what = format!("STREAM.MSG.GET.{stream}");
        let subject = format!("{}.{what}", self.lane.api_prefix());
        let reply = self.lane.request(&subject, wanted.to_string().as_bytes()).await?;
        decode_message(&reply).map_err(|error| error.context(what))
    }

    /// Reads the first message of a subject that a pattern holds at or after each of some sequences, many at a time.
    pub async fn messages_of(
        &mut self,
        stream: &str,
        filter: &str,
        sequences: impl IntoIterator<Item = u64>,
        mut each: impl FnMut(StoredMessage),
    ) -> Result<(), Error> {
        let what = format!("STREAM.MSG.GET.{stream}");
        let subject = format!("{}.{what}", self.lane.api_prefix());
        let (mut sequences, mut waiting) = (sequences.into_iter().peekable(), HashSet::new());
        while sequences.peek().is_some() || !waiting.is_empty() {
            for seq in sequences.by_ref().take(ASKED_TOGETHER - waiting.len()) {
                let body = json!({ "seq": seq, "next_by_subj": filter }).to_string();
                waiting.insert(self.lane.send_request(&subject, body.as_bytes()).into_bytes());
            }
            for (reply, answer) in self.lane.answers().await? {
                if waiting.remove(&reply) {
                    decode_message(&answer).map_err(|error| error.context(&what))?.into_iter().for_each(&mut each);
                }
            }
        }
        Ok(())
    }

    /// Reads everything in a range of sequences, in order, by asking for each, many at a time: for streams on which a
    /// consumer would count as one that takes messages away.
    pub async fn messages(
        &mut self,
        stream: &str,
        from: u64,
        to: u64,
        mut each: impl FnMut(StoredMessage),
    ) -> Result<(), Error> {
        let what = format!("STREAM.MSG.GET.{stream}");
        let subject = format!("{}.{what}", self.lane.api_prefix());
        let mut asked = VecDeque::new();
        let mut next = from;
        let mut answers: HashMap<Vec<u8>, Bytes> = HashMap::new();
        while next <= to || !asked.is_empty() {
            while next <= to && asked.len() < ASKED_TOGETHER {
                let body = json!({ "seq": next }).to_string();
                asked.push_back(self.lane.send_request(&subject, body.as_bytes()).into_bytes());
                next += 1;
            }
            answers.extend(self.lane.answers().await?);
            while let Some(answer) = asked.front().and_then(|first| answers.remove(first)) {
                asked.pop_front();
                let message = decode_message(&answer).map_err(|error| error.context(&what))?;
                message.into_iter().for_each(&mut each);
            }
        }
        Ok(())
    }

    /// Creates a consumer under the given name, or changes the one that is there. Where the stream, the account or the
    /// server limits what a consumer may ask for, it asks for that much.
    pub async fn create_consumer(&mut self, stream: &str, name: &str, config: &Value) -> Result<ConsumerInfo, Error> {
        self.create_within_limits(config, |config| create_consumer_call(stream, name, config)).await
    }

    /// The same under a name that no other consumer may have.
    pub async fn create_new_consumer(
        &mut self,
        stream: &str,
        name: &str,
        config: &Value,
    ) -> Result<ConsumerInfo, Error> {
        self.create_within_limits(config, |config| create_new_consumer_call(stream, name, config)).await
    }

    /// [`Api::create_new_consumer`] that waits `limit` after the last byte that moved; `None` if no answer arrived by
    /// then: the server may still create the consumer.
    pub async fn create_new_consumer_within(
        &mut self,
        stream: &str,
        name: &str,
        config: &Value,
        limit: Duration,
    ) -> Result<Option<ConsumerInfo>, Error> {
        let mut config = Cow::Borrowed(config);
        loop {
            let (what, body) = create_new_consumer_call(stream, name, &config);
            let subject = format!("{}.{what}", self.lane.api_prefix());
            let reply = self.lane.request_within(&subject, body.to_string().as_bytes(), limit).await?;
            let Some(reply) = reply else { return Ok(None) };
            match decode(&reply).map_err(|error| error.context(what)) {
                Ok(info) => return Ok(Some(info)),
                Err(error) => config = Cow::Owned(within_limit(&config, &error).ok_or(error)?),
            }
        }
    }

    async fn create_within_limits(
        &mut self,
        config: &Value,
        call: impl Fn(&Value) -> (String, Value),
    ) -> Result<ConsumerInfo, Error> {
        let mut config = Cow::Borrowed(config);
        loop {
            let (what, body) = call(&config);
            let error = match self.call(&what, &body).await {
                Ok(info) => return Ok(info),
                Err(error) => error,
            };
            config = Cow::Owned(within_limit(&config, &error).ok_or(error)?);
        }
    }

    /// Asks for a consumer; `None` if there is none.
    pub async fn consumer_info(&mut self, stream: &str, name: &str) -> Result<Option<ConsumerInfo>, Error> {
        found(self.call(&format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null).await)
    }

    /// Asks for all consumers of a stream. It is incomplete where leaders of consumers did not answer, and where the list
    /// changed while it was read.
    pub async fn consumers(&mut self, stream: &str) -> Result<ConsumerList, Error> {
        let mut list = ConsumerList { consumers: Vec::new(), is_complete: true };
        let mut first_total = None;
        for _ in 0..MAX_PAGES {
            let body = json!({ "offset": list.consumers.len() });
            let page: ConsumersPage = self.call(&format!("CONSUMER.LIST.{stream}"), &body).await?;
            let more = page.consumers.unwrap_or_default();
            let is_last = more.is_empty() || list.consumers.len() + more.len() >= page.total;
            list.is_complete &= page.missing.is_none_or(|missing| missing.is_empty());
            list.is_complete &= *first_total.get_or_insert(page.total) == page.total;
            list.consumers.extend(more);
            if is_last {
                list.is_complete &= list.consumers.len() == page.total;
                return Ok(list);
            }
        }
        Ok(ConsumerList { is_complete: false, ..list })
    }

    /// Lets a consumer begin again (server 2.14): at a sequence, or after what is acknowledged. Its deliveries are
    /// counted from 1 again.
    pub async fn reset_consumer(&mut self, stream: &str, name: &str, from: Option<u64>) -> Result<ConsumerInfo, Error> {
        let body = from.map_or(Value::Null, |from| json!({ "seq": from }));
        self.call(&format!("CONSUMER.RESET.{stream}.{name}"), &body).await
    }

    /// Deletes a consumer; one that is gone already is no error.
    pub async fn delete_consumer(&mut self, stream: &str, name: &str) -> Result<(), Error> {
        found(self.call::<Value>(&format!("CONSUMER.DELETE.{stream}.{name}"), &Value::Null).await).map(|_| ())
    }
}

/// What an answer to `STREAM.INFO` says; `None` if there is no such stream.
fn read_info(stream: &str, answer: &[u8]) -> Result<Option<StreamInfo>, Error> {
    if answer.is_empty() {
        return Err(Error::retry(format!("STREAM.INFO.{stream}: no responders")));
    }
    let info: Option<StreamInfo> =
        found(decode(answer).map_err(|error| error.context(format!("STREAM.INFO.{stream}"))))?;
    match info {
        Some(info) if !info.is_leaders() => {
            Err(Error::retry(format!("stream `{stream}` has no leader, or not the one that answered")))
        }
        info => Ok(info),
    }
}

/// The configuration of a consumer that was refused because it asks for more than a limit, within that limit, which the
/// refusal names; `None` if that was not the reason. Only what is lowered by it counts, so that trying comes to an end.
pub fn within_limit(config: &Value, error: &Error) -> Option<Value> {
    let api = error.api.as_ref()?;
    let limit = api.description.rsplit_once("limit of ")?.1.trim();
    let (field, limit) = match api.err_code {
        MAX_ACK_PENDING_EXCEEDED => ("max_ack_pending", limit.parse().ok()?),
        INACTIVE_THRESHOLD_EXCEEDED => ("inactive_threshold", go_duration(limit)?),
        _ => return None,
    };
    let lowers = limit > 0 && config[field].as_u64().is_none_or(|wanted| wanted > limit);
    lowers.then(|| {
        let mut config = config.clone();
        config[field] = limit.into();
        config
    })
}

/// Nanoseconds of a duration as the server writes it, such as `1m30s` or `1.5s`.
fn go_duration(text: &str) -> Option<u64> {
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c: char| c != '.' && !c.is_ascii_digit())?);
        let (unit, tail) = tail.split_at(tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len()));
        let nanos = match unit {
            "h" => 3_600e9,
            "m" => 60e9,
            "s" => 1e9,
            "ms" => 1e6,
            "µs" | "us" => 1e3,
            "ns" => 1.0,
            _ => return None,
        };
        sum += number.parse::<f64>().ok()? * nanos;
        rest = tail;
    }
    (sum >= 1.0).then_some(sum as u64)
}

/// What creates a consumer under the given name: the end of the subject, and the body.
pub fn create_consumer_call(stream: &str, name: &str, config: &Value) -> (String, Value) {
    let filter = config.get("filter_subject").and_then(Value::as_str);
    let what = match filter {
        Some(filter) => format!("CONSUMER.CREATE.{stream}.{name}.{filter}"),
        None => format!("CONSUMER.CREATE.{stream}.{name}"),
    };
    (what, json!({ "stream_name": stream, "config": config }))
}

/// The same for a name that no other consumer may have.
pub fn create_new_consumer_call(stream: &str, name: &str, config: &Value) -> (String, Value) {
    let (what, mut body) = create_consumer_call(stream, name, config);
    body["action"] = "create".into();
    (what, body)
}

/// What reads the message at a sequence: the end of the subject, and the body.
pub fn message_call(stream: &str, sequence: u64) -> (String, Value) {
    (format!("STREAM.MSG.GET.{stream}"), json!({ "seq": sequence }))
}

/// What reads the first message at a sequence or after it: the end of the subject, and the body.
pub fn message_from_call(stream: &str, sequence: u64) -> (String, Value) {
    (format!("STREAM.MSG.GET.{stream}"), json!({ "seq": sequence, "next_by_subj": ">" }))
}

/// Decodes the answer to [`message_call`] or [`message_from_call`]; `None` if there is none.
pub fn decode_message(payload: &[u8]) -> Result<Option<StoredMessage>, Error> {
    let got: Option<Got> = found(decode(payload))?;
    got.map(Got::message).transpose()
}

/// The answer to a request that was sent with [`Lane::send_request`], if it is among these messages.
pub fn answer_in<'b>(batch: &'b Batch, request: &str) -> Option<Result<&'b [u8], Error>> {
    let message = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == request.as_bytes())?;
    if headers::status(message.header) == Some(503) {
        return Some(Err(Error::retry("no responders")));
    }
    Some(Ok(message.payload))
}

#[derive(Deserialize)]
struct Got {
    message: StoredFields,
}

#[derive(Deserialize)]
struct StoredFields {
    #[serde(deserialize_with = "count")]
    seq: u64,
    #[serde(default)]
    subject: String,
    time: DateTime<Utc>,
    #[serde(default)]
    hdrs: String,
    #[serde(default, rename = "data", deserialize_with = "base64_bytes")]
    payload: usize,
}

#[derive(Deserialize)]
struct StoredPayload {
    message: PayloadField,
}

#[derive(Deserialize)]
struct PayloadField {
    #[serde(default)]
    data: Option<String>,
}

/// How many bytes a base64 text stands for; the text is not kept.
fn base64_bytes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    struct Length;
    impl serde::de::Visitor<'_> for Length {
        type Value = usize;

        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("a base64 text")
        }

        fn visit_str<E>(self, text: &str) -> Result<usize, E> {
            Ok(text.trim_end_matches('=').len() * 3 / 4)
        }

        fn visit_unit<E>(self) -> Result<usize, E> {
            Ok(0)
        }
    }
    deserializer.deserialize_any(Length)
}

impl Got {
    fn message(self) -> Result<StoredMessage, Error> {
        let StoredFields { seq, subject, time, hdrs, payload } = self.message;
        let header =
            STANDARD.decode(&hdrs).map_err(|error| Error::retry(format!("headers are not base64: {error}")))?;
        let time_ns = time.timestamp_nanos_opt().unwrap_or_default();
        Ok(StoredMessage { sequence: seq, subject, time_ns, header, payload })
    }
}

/// Decodes a reply of the API: its value, or its error.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Error> {
    let reply: ApiReply<T> =
        serde_json::from_slice(payload).map_err(|error| Error::retry(format!("a reply that is not valid: {error}")))?;
    match (reply.error, reply.value) {
        (Some(error), _) => Err(error.into()),
        (None, Some(value)) => Ok(value),
        (None, None) => Err(Error::retry("a reply without the fields that were asked for")),
    }
}

/// What the leader of a stream says of it; `None` where another server answered: it may have less of the stream.
pub fn leaders_info(payload: &[u8]) -> Result<Option<StreamInfo>, Error> {
    let info: StreamInfo = decode(payload)?;
    Ok(Some(info).filter(|info| info.is_leaders()))
}

fn found<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the reply subject of a delivered message tells (ADR-15): `$JS.ACK.<stream>.<consumer>.<delivered>.<stream
/// sequence>.<consumer sequence>.<time ns>.<pending>`, with `<domain>.<account>` after `ACK` in the longer form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// Sequence in the stream.
    pub stream_seq: u64,
    /// Sequence of this delivery of this consumer, from 1 without holes.
    pub consumer_seq: u64,
    /// Stored time, nanoseconds since the Unix epoch.
    pub time_ns: i64,
    /// Messages that match and come after this one.
    pub pending: u64,
}

/// Whether a reply subject marks a delivered message. Only messages without one are statuses: servers up to 2.11 store
/// messages whose own header block begins like a status.
pub fn is_delivery(reply: &[u8]) -> bool {
    reply.starts_with(b"$JS.ACK.")
}

/// Checks that a message on the inbox of a pull is a delivery of the stream.
///
/// # Errors
///
/// It is a status: the pull expired, the consumer is gone, and so on.
pub fn check_delivered(stream: &str, message: &Message<'_>) -> Result<(), Error> {
    if is_delivery(message.reply) {
        return Ok(());
    }
    let code = headers::status(message.header).unwrap_or_default();
    Err(Error::of_status(stream, code, &headers::status_text(message.header)))
}

/// Parses the reply subject of a delivery; `None` if it is another subject.
pub fn parse_delivery(reply: &[u8]) -> Option<Delivery> {
    let mut starts = [0usize; 16];
    let mut count = 1;
    for at in memchr::memchr_iter(b'.', reply) {
        *starts.get_mut(count)? = at + 1;
        count += 1;
    }
    let first = match count {
        9 => 4,
        11 | 12 => 6,
        _ => return None,
    };
    let token = |n: usize| {
        let end = if n + 1 < count { starts[n + 1] - 1 } else { reply.len() };
        parser::number(&reply[starts[n]..end])
    };
    Some(Delivery {
        stream_seq: token(first + 1)?,
        consumer_seq: token(first + 2)?,
        time_ns: i64::try_from(token(first + 3)?).ok()?,
        pending: token(first + 4)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_in_both_forms() {
        let expect = Delivery { stream_seq: 42, consumer_seq: 7, time_ns: 1_700_000_000_000_000_001, pending: 3 };
        for reply in [
            "$JS.ACK.S.C.1.42.7.1700000000000000001.3",
            "$JS.ACK.hub.Abc.S.C.1.42.7.1700000000000000001.3",
            "$JS.ACK._.Abc.S.C.1.42.7.1700000000000000001.3.rnd",
        ] {
            assert!(is_delivery(reply.as_bytes()));
            assert_eq!(parse_delivery(reply.as_bytes()), Some(expect), "{reply}");
        }
        for reply in ["", "$JS.ACK.S.C.1.42.7", "$JS.ACK.S.C.1.x.7.1.3", "_INBOX.a.b"] {
            assert_eq!(parse_delivery(reply.as_bytes()), None, "{reply}");
        }
    }

    #[test]
    fn a_stored_message_says_how_large_it_is() {
        let check = |data: &str, expect: usize| {
            let reply = format!(
                r#"{{"message":{{"subject":"a","seq":3,"time":"2026-01-01T00:00:00Z","hdrs":"TkFUUw=="{data}}}}}"#
            );
            let message = decode_message(reply.as_bytes()).unwrap().unwrap();
            assert_eq!((message.header.as_slice(), message.payload), (&b"NATS"[..], expect), "{data}");
        };
        check("", 0);
        check(r#","data":null"#, 0);
        check(r#","data":"""#, 0);
        check(r#","data":"YQ==""#, 1);
        check(r#","data":"YWI=""#, 2);
        check(r#","data":"YWJj""#, 3);
        check(r#","data":"YWJjZA==""#, 4);
    }

    #[test]
    fn an_error_in_a_reply_is_an_error() {
        let missing = br#"{"type":"x","error":{"code":404,"err_code":10059,"description":"stream not found"}}"#;
        assert_eq!(decode::<StreamInfo>(missing).unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(decode::<StreamInfo>(b"{}").unwrap_err().kind, ErrorKind::Retry);
        assert_eq!(decode::<StreamInfo>(b"").unwrap_err().kind, ErrorKind::Retry);
        let info: StreamInfo =
            decode(br#"{"config":{"name":"S","metadata":{"_nats.level":"4"}},"created":"c","state":{"last_seq":3}}"#)
                .unwrap();
        assert_eq!((info.api_level(), info.state.last_seq), (4, 3));
    }

    #[test]
    fn durations_of_the_server() {
        for (text, expect) in [
            ("5s", Some(5_000_000_000)),
            ("1m30s", Some(90_000_000_000)),
            ("1.5s", Some(1_500_000_000)),
            ("1h0m0s", Some(3_600_000_000_000)),
            ("250ms", Some(250_000_000)),
            ("", None),
            ("0s", None),
            ("5", None),
            ("5 apples", None),
        ] {
            assert_eq!(go_duration(text), expect, "{text}");
        }
    }

    #[test]
    fn a_refused_consumer_is_requested_within_the_named_limit() {
        let check = |err_code, description: &str, expect: Option<Value>| {
            let config = json!({"inactive_threshold": 45_000_000_000u64, "max_ack_pending": 512});
            let error = ApiError { code: 400, err_code, description: description.to_owned() };
            assert_eq!(within_limit(&config, &error.into()), expect, "{description}");
        };
        let inactive = json!({"inactive_threshold": 5_000_000_000u64, "max_ack_pending": 512});
        check(10153, "consumer inactive threshold exceeds system limit of 5s", Some(inactive));
        let pending = json!({"inactive_threshold": 45_000_000_000u64, "max_ack_pending": 100});
        check(10121, "consumer max ack pending exceeds system limit of 100", Some(pending));
        check(10121, "consumer max ack pending exceeds system limit of 512", None);
        check(10121, "consumer max ack pending exceeds system limit of -1", None);
        check(10026, "maximum consumers limit reached", None);
    }

    #[test]
    fn a_server_s_time_is_read_where_there_is_one() {
        let time = |ts: &str| {
            let info = format!(r#"{{"config":{{}},"state":{{}}{ts}}}"#);
            decode::<StreamInfo>(info.as_bytes()).unwrap().ts.map(|time| time.timestamp_micros())
        };
        assert_eq!(time(r#","ts":"2026-11-29T12:17:28.21521119Z""#), Some(1_795_954_648_215_211));
        assert_eq!(time(r#","ts":"2026-11-29T13:17:28+01:00""#), Some(1_795_954_648_000_000));
        for none in ["", r#","ts":null"#, r#","ts":"""#, r#","ts":5"#, r#","ts":"0001-01-01T00:00:00Z""#] {
            assert_eq!(time(none), None, "{none}");
        }
    }

    #[tokio::test]
    async fn only_the_leader_says_what_a_stream_has() {
        let (mut lane, mut server) = crate::pipe::lane().await;
        let asked = async |lane: &mut Lane, server: &mut crate::pipe::Pipe, info: &str| {
            let answer = async {
                let asked = server.asked().await;
                server.answer(&asked, info).await;
            };
            let mut api = Api::new(lane);
            tokio::join!(api.stream_info("S"), answer).0
        };
        let info = |leader: &str| {
            format!(
                r#"{{"config":{{}},"state":{{"last_seq":7}},"cluster":{{"leader":"{leader}","replicas":[{{"name":"b"}}]}}}}"#
            )
        };
        let leaders = asked(&mut lane, &mut server, &info("a")).await.unwrap().unwrap();
        assert_eq!(leaders.state.last_seq, 7);
        assert!(leaders_info(info("a").as_bytes()).unwrap().is_some());
        for other in ["b", ""] {
            let error = asked(&mut lane, &mut server, &info(other)).await.unwrap_err();
            assert!(error.kind == ErrorKind::Retry && error.message.contains("no leader"), "{error}");
            assert!(leaders_info(info(other).as_bytes()).unwrap().is_none());
        }
    }

    #[track_caller]
    fn is_leaders(cluster: &str, expect: bool) {
        let info = format!(r#"{{"config":{{}},"state":{{}}{cluster}}}"#);
        assert_eq!(decode::<StreamInfo>(info.as_bytes()).unwrap().is_leaders(), expect, "{cluster}");
    }

    #[test]
    fn answers_of_leader_and_follower_are_distinguished() {
        is_leaders("", true);
        is_leaders(r#","cluster":{"leader":"a"}"#, true);
        is_leaders(r#","cluster":{"leader":"a","replicas":[{"name":"b"},{"name":"c"}]}"#, true);
        is_leaders(r#","cluster":{"leader":"b","replicas":[{"name":"b"},{"name":"c"}]}"#, false);
        is_leaders(r#","cluster":{"replicas":[{"name":"a"},{"name":"b"},{"name":"c"}]}"#, false);
    }
}
