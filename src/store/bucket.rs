//! One bucket: current reads and writes by compare-and-swap; the values are opaque here.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{
    Client, HeaderMap, Message, Request, RequestErrorKind, StatusCode,
    header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
    jetstream::{
        self, ErrorCode,
        context::{AccountErrorKind, ContextBuilder, GetStreamErrorKind},
        message::StreamMessage,
        publish::PublishAck,
        response::Response,
        stream::{self, ClusterInfo, DiscardPolicy, Info, RawMessageErrorKind, Stream},
    },
};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use nats_lane::{entropy, jetstream::is_leaders_answer};
use serde_json::{Map, Value, json};
use tokio::{sync::watch as watch_channel, time::timeout};

use super::error::Error;

/// Time limit for one request to the server.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Prefix of the JetStream API of the own account, without a domain.
const API_PREFIX: &str = "$JS.API";

const OPERATION: &str = "KV-Operation";
/// "wrong last sequence", with and without the sequence in the text.
const WRONG_LAST_SEQUENCE: [u64; 2] = [10071, 10164];
const NO_MESSAGE_FOUND: u64 = 10037;
const STREAM_NOT_FOUND: u64 = 10059;

/// Metadata of a bucket that an instance created, at its start or later; each creation has another value.
pub(super) const RECREATED: &str = "stream-replicator.recreated";
/// Metadata of the configuration bucket: identifies the installation if the bucket is not its first one.
pub(super) const INSTALLATION: &str = "stream-replicator.installation";

/// A bucket's handle; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    client: Client,
    /// Name of the bucket, for errors.
    name: String,
    /// This process, in names of consumers.
    instance: String,
    context: jetstream::Context,
    stream: Stream<()>,
    /// `$KV.<bucket>.`, what subjects of stored messages begin with.
    prefix: String,
    /// Prefix of the subjects of the API.
    api_prefix: String,
    /// What subjects of writes have before that: nothing, or the prefix of the API and a dot.
    put_prefix: String,
    /// How often the bucket was recreated while this process had it open.
    recreated: watch_channel::Sender<u64>,
    /// Whether messages of the bucket may have a time to live, as last seen.
    takes_ttl: Arc<AtomicBool>,
}

/// An entry of a key, the current one or an older one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Revision of the key.
    pub revision: u64,
    /// `None` for the marker of a deletion.
    pub value: Option<Bytes>,
}

/// Why a write was not confirmed.
#[derive(Debug)]
pub enum PutError {
    /// The key is not at the expected revision.
    Conflict,
    /// It did not happen.
    Refused(Error),
    /// It may have happened, or may still: read it back.
    Unknown(Error),
}

impl Bucket {
    /// Opens a bucket as it is, or creates it: then, where the server can (2.11), markers of deletions may be given an end.
    pub(super) async fn open(
        client: &Client,
        api_prefix: &str,
        name: &str,
        instance: &str,
        history: i64,
        replicas: usize,
        markers: Option<Duration>,
    ) -> Result<Self, Error> {
        let context = ContextBuilder::new().api_prefix(api_prefix).timeout(TIMEOUT).build(client.clone());
        let error = |message: String| Error { bucket: name.to_owned(), message };
        let is_there = match exists(&context, name).await {
            Ok(is_there) => is_there,
            Err(why) => return Err(error(no_jetstream(&context).await.unwrap_or(why))),
        };
        if !is_there {
            let create = async |markers: Option<Duration>| {
                let config = stream::Config {
                    name: stream_name(name),
                    description: Some("stream-replicator".to_owned()),
                    subjects: vec![format!("$KV.{name}.>")],
                    max_messages_per_subject: history,
                    num_replicas: replicas.max(1),
                    discard: DiscardPolicy::New,
                    allow_rollup: true,
                    deny_delete: true,
                    allow_direct: true,
                    allow_message_ttl: markers.is_some(),
                    subject_delete_marker_ttl: markers,
                    // Where others run and miss it, they write back what was in it.
                    metadata: HashMap::from([(RECREATED.to_owned(), entropy::name())]),
                    ..stream::Config::default()
                };
                context.create_stream(config).await
            };
            let mut created = create(markers).await;
            if created.is_err() && markers.is_some() {
                // A server before 2.11.
                created = create(None).await;
            }
            if let Err(failed) = created {
                // another instance may have been faster, with other settings
                if !exists(&context, name).await.unwrap_or_default() {
                    return Err(error(format!("cannot be created: {}", chain(&failed))));
                }
            }
        }
        Self::of(client, &context, api_prefix, name, instance.to_owned()).await
    }

    /// Opens a bucket that has to be there.
    pub(super) async fn existing(client: &Client, api_prefix: &str, name: &str) -> Result<Self, Error> {
        let context = ContextBuilder::new().api_prefix(api_prefix).timeout(TIMEOUT).build(client.clone());
        let error = |message: String| Error { bucket: name.to_owned(), message };
        if !exists(&context, name).await.map_err(error)? {
            return Err(error("does not exist: is `--bucket-prefix` right?".to_owned()));
        }
        // A command has no name of its own: its consumers go with its connection.
        Self::of(client, &context, api_prefix, name, entropy::name()).await
    }

    async fn of(
        client: &Client,
        context: &jetstream::Context,
        api_prefix: &str,
        name: &str,
        instance: String,
    ) -> Result<Self, Error> {
        let error = |message: String| Error { bucket: name.to_owned(), message };
        let stream = context.get_stream_no_info(stream_name(name)).await.map_err(|failed| error(chain(&failed)))?;
        // The way of all KV clients, and what servers map a domain's subjects by.
        let put_prefix = if api_prefix == API_PREFIX { String::new() } else { format!("{api_prefix}.") };
        let (client, name, prefix) = (client.clone(), name.to_owned(), format!("$KV.{name}."));
        let api_prefix = api_prefix.to_owned();
        let recreated = watch_channel::Sender::new(0);
        let (context, takes_ttl) = (context.clone(), Arc::default());
        Ok(Self { client, name, instance, context, stream, prefix, api_prefix, put_prefix, recreated, takes_ttl })
    }

    /// How often the bucket was recreated; changes as soon as that is known.
    pub(super) fn recreations(&self) -> watch_channel::Receiver<u64> {
        self.recreated.subscribe()
    }

    /// The bucket is another one now.
    pub(super) fn was_recreated(&self) {
        self.recreated.send_modify(|count| *count += 1);
    }

    /// Whether messages of the bucket may have a time to live, as last seen.
    pub(super) fn takes_ttl(&self) -> bool {
        self.takes_ttl.load(Ordering::Relaxed)
    }

    /// The bucket's stream has this configuration now.
    pub(super) fn is_configured(&self, config: &stream::Config) {
        self.takes_ttl.store(config.allow_message_ttl, Ordering::Relaxed);
    }

    /// Changes the configuration of the bucket's stream; what this program does not know of it stays.
    pub(super) async fn reconfigure(&self, change: impl FnOnce(&mut Map<String, Value>)) -> Result<(), Error> {
        let ask = async |verb: &str, body: &Value| -> Result<Value, Error> {
            let subject = format!("STREAM.{verb}.{}", stream_name(&self.name));
            let answer: Value = self
                .in_time(self.context.request(subject, body))
                .await?
                .map_err(|error| self.error(format!("cannot be changed: {}", chain(&error))))?;
            match answer.get("error") {
                None => Ok(answer),
                Some(error) => {
                    let why = error["description"].as_str().unwrap_or("the server refuses it");
                    Err(self.error(format!("cannot be changed: {why}")))
                }
            }
        };
        let mut config = ask("INFO", &json!({})).await?["config"].take();
        if let Some(fields) = config.as_object_mut() {
            change(fields);
        }
        ask("UPDATE", &config).await.map(drop)
    }

    /// Name of the bucket.
    pub(super) fn bucket_name(&self) -> &str {
        &self.name
    }

    pub(super) fn error(&self, message: impl Into<String>) -> Error {
        Error { bucket: self.name.clone(), message: message.into() }
    }

    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    pub(super) fn stream(&self) -> &Stream<()> {
        &self.stream
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Subject that a key is written by.
    pub(super) fn put_subject(&self, key: &str) -> String {
        format!("{}{}", self.put_prefix, self.subject(key))
    }

    /// Subject of pull requests to a consumer.
    pub(super) fn pull_subject(&self, consumer: &str) -> String {
        format!("{}.CONSUMER.MSG.NEXT.{}.{consumer}", self.api_prefix, stream_name(&self.name))
    }

    /// Subject of a key; `>` for all.
    pub(super) fn subject(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The key of a subject.
    pub(super) fn key<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&self.prefix)
    }

    /// The entry at a key now, marker or value, read from the leader.
    pub(super) async fn last(&self, key: &str) -> Result<Option<Stored>, Error> {
        self.check_key(key)?;
        self.last_matching(key).await
    }

    /// What was written last to any key that matches, read from the leader.
    pub(super) async fn last_matching(&self, pattern: &str) -> Result<Option<Stored>, Error> {
        let request = self.stream.raw_message_builder().last_by_subject(self.subject(pattern));
        self.found(self.in_time(request.send()).await?)
    }

    /// The first revision of a key at or above `revision`, read from the leader.
    pub(super) async fn next(&self, key: &str, revision: u64) -> Result<Option<Stored>, Error> {
        self.check_key(key)?;
        let request = self.stream.raw_message_builder().next_by_subject(self.subject(key)).sequence(revision);
        self.found(self.in_time(request.send()).await?)
    }

    /// The first revision of any key at or above `revision`, read from the leader.
    pub(super) async fn next_of_any(&self, revision: u64) -> Result<Option<u64>, Error> {
        let request = self.stream.raw_message_builder().next_by_subject(self.subject(">")).sequence(revision);
        Ok(self.found(self.in_time(request.send()).await?)?.map(|stored| stored.revision))
    }

    fn found(
        &self,
        result: Result<StreamMessage, jetstream::stream::RawMessageError>,
    ) -> Result<Option<Stored>, Error> {
        match result {
            Ok(message) => {
                let value = (!is_marker(&message.headers)).then_some(message.payload);
                Ok(Some(Stored { revision: message.sequence, value }))
            }
            Err(error) => match error.kind() {
                RawMessageErrorKind::NoMessageFound => Ok(None),
                RawMessageErrorKind::JetStream(error) if error.error_code().0 == NO_MESSAGE_FOUND => Ok(None),
                _ => Err(self.error(format!("cannot be read: {}", chain(&error)))),
            },
        }
    }

    /// Writes a value if the key is at `expected` (0: there is nothing); returns the new revision.
    pub(super) async fn put(&self, key: &str, value: Bytes, expected: u64) -> Result<u64, PutError> {
        self.publish(key, value, HeaderMap::new(), expected).await
    }

    /// Leaves the marker of a deletion if the key is at `expected`; returns the marker's revision.
    pub(super) async fn mark_deleted(&self, key: &str, expected: u64) -> Result<u64, PutError> {
        let mut headers = HeaderMap::new();
        headers.insert(OPERATION, "DEL");
        self.publish(key, Bytes::new(), headers, expected).await
    }

    /// A request instead of the library's publish: no queue of pending acks, and its outcome is one of three.
    async fn publish(&self, key: &str, value: Bytes, mut headers: HeaderMap, expected: u64) -> Result<u64, PutError> {
        self.check_key(key).map_err(PutError::Refused)?;
        headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string().as_str());
        let request = Request::new().headers(headers).payload(value).timeout(Some(TIMEOUT));
        let reply = match self
            .in_time(self.client.send_request(self.put_subject(key), request))
            .await
            .map_err(PutError::Unknown)?
        {
            Ok(reply) => reply,
            Err(error) => {
                let outcome = match error.kind() {
                    RequestErrorKind::TimedOut | RequestErrorKind::Other => PutError::Unknown,
                    _ => PutError::Refused,
                };
                return Err(outcome(self.error(format!("cannot be written: {}", chain(&error)))));
            }
        };
        match serde_json::from_slice::<Response<PublishAck>>(&reply.payload) {
            Ok(Response::Ok(ack)) if ack.stream == stream_name(&self.name) => Ok(ack.sequence),
            Ok(Response::Ok(ack)) => {
                let message = format!("stream `{}` answers for it: its subjects overlap", ack.stream);
                Err(PutError::Unknown(self.error(message)))
            }
            Ok(Response::Err { error }) if WRONG_LAST_SEQUENCE.contains(&error.error_code().0) => {
                Err(PutError::Conflict)
            }
            Ok(Response::Err { error }) => Err(PutError::Refused(self.error(format!("cannot be written: {error}")))),
            Err(_) => Err(PutError::Unknown(self.error("the answer to a write is no acknowledgement"))),
        }
    }

    /// Whether the answer to a write says that it is stored.
    pub(super) fn check_ack(&self, reply: &Message) -> Result<(), Error> {
        let why = match serde_json::from_slice::<Response<PublishAck>>(&reply.payload) {
            _ if reply.status == Some(StatusCode::NO_RESPONDERS) => "nobody takes it".to_owned(),
            Ok(Response::Ok(ack)) if ack.stream == stream_name(&self.name) => return Ok(()),
            Ok(Response::Ok(ack)) => format!("stream `{}` answers for it: its subjects overlap", ack.stream),
            Ok(Response::Err { error }) => error.to_string(),
            Err(_) => "the answer to a write is no acknowledgement".to_owned(),
        };
        Err(self.error(format!("cannot be written: {why}")))
    }

    /// Removes all keys that match, as far as they were written up to and with a revision, without leaving markers.
    pub(super) async fn forget_matching(&self, pattern: &str, through: Option<u64>) -> Result<(), Error> {
        let purge = self.stream.purge().filter(self.subject(pattern));
        let purged = match through {
            // There was nothing. The server would purge everything: to it, up to before sequence 1 is no limit.
            Some(0) => return Ok(()),
            Some(revision) => self.in_time(purge.sequence(revision + 1).into_future()).await?,
            None => self.in_time(purge.into_future()).await?,
        };
        purged.map(|_| ()).map_err(|error| self.error(format!("keys `{pattern}` cannot be removed: {}", chain(&error))))
    }

    /// Removes what is at a key up to and with a revision, without leaving a marker.
    pub(super) async fn forget_through(&self, key: &str, revision: u64) -> Result<(), Error> {
        self.check_key(key)?;
        self.forget_matching(key, Some(revision)).await
    }

    /// The bucket's stream as its leader sees it now.
    pub(super) async fn info(&self) -> Result<Info, Error> {
        Ok(self.info_and_time().await?.0)
    }

    /// The bucket's stream as its leader sees it now, and the leader's time, where it reports it.
    pub(super) async fn info_and_time(&self) -> Result<(Info, Option<DateTime<Utc>>), Error> {
        let subject = format!("STREAM.INFO.{}", stream_name(&self.name));
        let answer: Value = self
            .in_time(self.context.request(subject, &json!({})))
            .await?
            .map_err(|error| self.error(chain(&error)))?;
        let time = answer["ts"].as_str().and_then(|text| DateTime::parse_from_rfc3339(text).ok());
        let info: Info = match serde_json::from_value(answer) {
            Ok(Response::Ok(info)) => info,
            Ok(Response::Err { error }) => return Err(self.error(chain(&error))),
            Err(error) => return Err(self.error(format!("the answer about its stream cannot be read: {error}"))),
        };
        let leads = |cluster: &ClusterInfo| {
            let leader = cluster.leader.as_deref().unwrap_or_default();
            is_leaders_answer(leader, cluster.replicas.iter().map(|peer| peer.name.as_str()))
        };
        match info.cluster.as_ref().is_none_or(leads) {
            true => Ok((info, time.map(|time| time.to_utc()))),
            false => Err(self.error("it has no leader, or not the one that answered")),
        }
    }

    /// The client's own limit begins when it has room for the request, which it may not have for as long as it is not
    /// connected.
    async fn in_time<T>(&self, request: impl Future<Output = T>) -> Result<T, Error> {
        timeout(TIMEOUT * 2, request).await.map_err(|_| self.error("no answer in time"))
    }

    fn check_key(&self, key: &str) -> Result<(), Error> {
        if valid_key(key) { Ok(()) } else { Err(self.error(format!("{key:?} is not a key"))) }
    }
}

/// Whether a message is the marker of a deletion: by hand, by this program or by the server.
pub(super) fn is_marker(headers: &HeaderMap) -> bool {
    let deleted = headers.get(OPERATION).is_some_and(|operation| matches!(operation.as_str(), "DEL" | "PURGE"));
    deleted || headers.get("Nats-Marker-Reason").is_some()
}

/// An error with its causes; async-nats names the cause in some of its texts and omits it in others.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

fn stream_name(bucket: &str) -> String {
    format!("KV_{bucket}")
}

async fn exists(context: &jetstream::Context, bucket: &str) -> Result<bool, String> {
    Ok(find_stream(context, bucket).await?.is_some())
}

/// What to do where there is no JetStream; `None` where there is one, or where that is not known.
async fn no_jetstream(context: &jetstream::Context) -> Option<String> {
    let error = context.query_account().await.err()?;
    let is_off = match error.kind() {
        AccountErrorKind::JetStreamUnavailable => true,
        AccountErrorKind::JetStream(error) => {
            matches!(
                error.error_code(),
                ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
            )
        }
        _ => false,
    };
    is_off.then(|| {
        "cannot be opened: no JetStream answers at the control server: switch it on with `nats-server -js`, or with \
         `jetstream {}` in its configuration and `jetstream: enabled` in the account; a cluster may have no leader yet"
            .to_owned()
    })
}

/// The stream of a bucket; `None` if there is none.
pub(super) async fn find_stream(context: &jetstream::Context, bucket: &str) -> Result<Option<Info>, String> {
    match context.get_stream(stream_name(bucket)).await {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code().0 == STREAM_NOT_FOUND => Ok(None),
            _ => Err(format!("cannot be opened: {}", chain(&error))),
        },
    }
}

/// A context for the JetStream whose API subjects begin with `api_prefix`.
pub(super) fn context(client: &Client, api_prefix: &str) -> jetstream::Context {
    ContextBuilder::new().api_prefix(api_prefix).timeout(TIMEOUT).build(client.clone())
}

fn valid_key(key: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte);
    !key.is_empty() && key.split('.').all(|token| !token.is_empty()) && key.bytes().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let check = |key: &str, expect: bool| assert_eq!(valid_key(key), expect, "{key:?}");
        check("ORDERS", true);
        check("ORDERS.EAST-1_=/", true);
        check("", false);
        check(".A", false);
        check("A.", false);
        check("A..B", false);
        check("A B", false);
        check("A*", false);
        check(">", false);
        check("\u{e9}", false);
    }
}
