//! Asks the service: a request becomes a reply or the reason why there is none.

use std::{
    io::Write,
    marker::PhantomData,
    time::{Duration, Instant},
};

use async_nats::{Event, HeaderMap, Message, RequestErrorKind, jetstream};
use bytes::Bytes;
use chrono::Utc;
use nats_lane::{ServerRef, client::connect_once};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{error::Error, global::Global, output::clean, reply::Reply};
use crate::{
    control::api::{AdapterList, ErrorReply, Failure, Instances, LinkList, List, Status, StreamReport},
    names::{DEADLINE_HEADER, EXPECTED_REVISION_HEADER, TIME_HEADER},
};

/// A connection to where the service is asked.
#[derive(Debug)]
pub(super) struct Client {
    nats: async_nats::Client,
    /// Without secrets.
    server: String,
    /// Prefix of the subjects of the JetStream API.
    api_prefix: String,
    prefix: String,
    answer_within: Duration,
    /// Whether requests and replies are printed.
    trace: bool,
    /// The server's last error for this connection; empty for none.
    refusal: watch::Sender<String>,
}

/// A reply that may be one page of several.
pub(super) trait Paged: DeserializeOwned {
    /// The field with the rows.
    const ROWS: &'static str;
    /// Fields with lists that belong to the rows of a page.
    const BESIDE: &'static [&'static str] = &[];
}

impl Paged for Status {
    const ROWS: &'static str = "replications";
}

impl Paged for List {
    const ROWS: &'static str = "replications";
}

impl Paged for AdapterList {
    const ROWS: &'static str = "adapters";
}

impl Paged for LinkList {
    const ROWS: &'static str = "links";
}

impl Paged for Instances {
    const ROWS: &'static str = "instances";
}

impl Paged for StreamReport {
    const ROWS: &'static str = "replications";
    const BESIDE: &'static [&'static str] = &["streams", "native"];
}

impl Client {
    pub(super) async fn connect(global: &Global) -> Result<Self, Error> {
        Self::connect_as(global, Ok).await
    }

    /// The same with another identity, which `identify` puts into the connection; its errors show no secret.
    pub(super) async fn connect_as(
        global: &Global,
        identify: impl FnOnce(ServerRef) -> Result<ServerRef, String>,
    ) -> Result<Self, Error> {
        let answer_within = global.asking.timeout().map_err(Error::Usage)?;
        let place = global.asking.place().and_then(identify).map_err(Error::Usage)?;
        let refusal = watch::Sender::new(String::new());
        let last = refusal.clone();
        let tell = move |event| match event {
            Event::ServerError(error) => _ = last.send_replace(error.to_string()),
            Event::Disconnected => tell("the connection is lost"),
            _ => {}
        };
        let connected = connect_once(&place, &global.asking.connection_name(), answer_within, tell).await;
        let (nats, connection) = connected.map_err(|error| Error::Failed(clean(&error.to_string())))?;
        let (server, api_prefix) = (connection.endpoint.to_string(), connection.api_prefix);
        Ok(Self {
            nats,
            server,
            api_prefix,
            prefix: global.prefix.clone(),
            answer_within,
            trace: global.trace,
            refusal,
        })
    }

    /// JetStream where it is connected to.
    pub(super) fn jetstream(&self) -> jetstream::Context {
        let mut context = jetstream::with_prefix(self.nats.clone(), &self.api_prefix);
        context.set_timeout(self.answer_within);
        context
    }

    /// Waits less for each answer: many are asked for.
    pub(super) fn answering_within(self, most: Duration) -> Self {
        Self { answer_within: self.answer_within.min(most), ..self }
    }

    /// The connection, for everything but requests.
    pub(super) fn nats(&self) -> &async_nats::Client {
        &self.nats
    }

    /// Prefix of the subjects of the JetStream API.
    pub(super) fn api_prefix(&self) -> &str {
        &self.api_prefix
    }

    /// Prefix of the service's subjects.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Where it is connected to, without secrets.
    pub(super) fn server(&self) -> &str {
        &self.server
    }

    /// Waits until the server refuses a subscription of ours; its words.
    pub(super) async fn subscription_refused(&self) -> String {
        let mut refusal = self.refusal.subscribe();
        let refused = |said: &String| said.to_lowercase().contains("permissions violation for subscription");
        match refusal.wait_for(refused).await {
            Ok(said) => clean(&said),
            // No more answers can arrive.
            Err(_) => std::future::pending().await,
        }
    }

    /// How long an answer is waited for.
    pub(super) fn answer_within(&self) -> Duration {
        self.answer_within
    }

    /// Asks for something that changes nothing.
    pub(super) async fn query<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        request: &impl Serialize,
    ) -> Result<Reply<T>, Error> {
        self.send(endpoint, HeaderMap::new(), body(request)?).await
    }

    /// Sends a document that is only checked.
    pub(super) async fn check_document<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        body: Bytes,
    ) -> Result<Reply<T>, Error> {
        self.send(endpoint, HeaderMap::new(), body).await
    }

    /// Asks for a change, not to be made after we gave up.
    pub(super) async fn change<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        request: &impl Serialize,
    ) -> Result<Reply<T>, Error> {
        self.change_at(endpoint, body(request)?, None).await
    }

    /// Asks for a change, if given only to this revision.
    pub(super) async fn change_at<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        body: Bytes,
        expected: Option<u64>,
    ) -> Result<Reply<T>, Error> {
        let mut headers = HeaderMap::new();
        let within = i64::try_from(self.answer_within.as_millis()).unwrap_or(i64::MAX);
        let deadline = |now: i64| now.saturating_add(within).to_string();
        headers.insert(DEADLINE_HEADER, deadline(Utc::now().timestamp_millis()));
        if let Some(revision) = expected {
            headers.insert(EXPECTED_REVISION_HEADER, revision.to_string());
        }
        let mut message = self.ask(endpoint, headers.clone(), body.clone()).await?;
        if let Some(now) = refused_at(&message) {
            // It was refused in time, so the clock of this host is behind that of the service: by the service's clock then.
            headers.insert(DEADLINE_HEADER, deadline(now));
            message = self.ask(endpoint, headers, body).await?;
        }
        self.reply(endpoint, message)
    }

    /// Asks for all pages of a list.
    pub(super) async fn pages<T: Paged>(&self, endpoint: &str) -> Result<Reply<T>, Error> {
        let first: Reply<Value> = self.send(endpoint, HeaderMap::new(), Bytes::new()).await?;
        let mut pages = Pages::<T>::new(first);
        while let Some(offset) = pages.missing() {
            let next: Reply<Value> = self.query(endpoint, &json!({"offset": offset})).await?;
            pages.add(next.value);
        }
        pages.joined().map_err(|error| self.not_understood(endpoint, &error))
    }

    async fn send<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Reply<T>, Error> {
        let message = self.ask(endpoint, headers, body).await?;
        self.reply(endpoint, message)
    }

    async fn ask(&self, endpoint: &str, headers: HeaderMap, body: Bytes) -> Result<Message, Error> {
        let subject = format!("{}.{endpoint}", self.prefix);
        let bytes = body.len();
        let mut request = async_nats::Request::new().payload(body).timeout(Some(self.answer_within));
        if !headers.is_empty() {
            request = request.headers(headers);
        }
        let begun = Instant::now();
        let answer = self.nats.send_request(subject.clone(), request).await;
        if self.trace {
            trace(&subject, bytes, begun.elapsed(), answer.as_ref().ok());
        }
        answer.map_err(|error| Error::Failed(self.unanswered(&subject, &error)))
    }

    fn reply<T: DeserializeOwned>(&self, endpoint: &str, message: Message) -> Result<Reply<T>, Error> {
        if let Some(failure) = failure(&message) {
            return Err(failure.into());
        }
        let value = serde_json::from_slice(&message.payload);
        let value = value.map_err(|error| self.not_understood(endpoint, &error))?;
        Ok(Reply { raw: message.payload, value })
    }

    fn unanswered(&self, subject: &str, error: &async_nats::RequestError) -> String {
        let server = &self.server;
        match error.kind() {
            RequestErrorKind::NoResponders => {
                format!("no service answers on `{subject}` at `{server}`: is it running, and is `--prefix` right?")
            }
            RequestErrorKind::TimedOut => {
                let refusal = self.refusal.send_replace(String::new());
                let reason =
                    if refusal.is_empty() { String::new() } else { format!("; the server says: {}", clean(&refusal)) };
                let within = self.answer_within;
                format!("no answer on `{subject}` at `{server}` within {within:?}{reason}")
            }
            _ => format!("request on `{subject}` at `{server}`: {}", clean(&error.to_string())),
        }
    }

    fn not_understood(&self, endpoint: &str, error: &serde_json::Error) -> Error {
        let subject = format!("{}.{endpoint}", self.prefix);
        Error::Failed(format!("the answer on `{subject}` at `{}` is not understood: {error}", self.server))
    }
}

/// A request may hold secrets and is not shown; the service masks those of its replies.
fn trace(subject: &str, bytes: usize, took: Duration, reply: Option<&Message>) {
    tell(&format!(">>> {subject}: {bytes} bytes"));
    match reply {
        Some(reply) => tell(&format!("<<< {took:.1?}: {}", clean(&String::from_utf8_lossy(&reply.payload)))),
        None => tell(&format!("<<< {took:.1?}: no reply")),
    }
}

fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn body(request: &impl Serialize) -> Result<Bytes, Error> {
    let body = serde_json::to_vec(request).map_err(|error| Error::Failed(error.to_string()))?;
    Ok(body.into())
}

/// The content of an error reply.
fn failure(message: &Message) -> Option<Failure> {
    let headers = message.headers.as_ref()?;
    let code = headers.get("Nats-Service-Error-Code")?.as_str().parse().unwrap_or(500);
    let text = headers.get("Nats-Service-Error").map(|text| text.as_str()).unwrap_or_default();
    let body = serde_json::from_slice::<ErrorReply>(&message.payload);
    Some(body.map_or_else(|_| Failure::new(code, text), |reply| reply.error))
}

/// The time of the service that refused a request because of its deadline, unix ms.
fn refused_at(message: &Message) -> Option<i64> {
    let headers = message.headers.as_ref()?;
    let is_late = headers.get("Nats-Service-Error-Code")?.as_str() == "408";
    headers.get(TIME_HEADER).filter(|_| is_late)?.as_str().parse().ok()
}

/// Pages of one list, as they come.
struct Pages<T> {
    first: Bytes,
    joined: Value,
    pages: usize,
    /// The last page had no rows.
    dry: bool,
    list: PhantomData<T>,
}

impl<T: Paged> Pages<T> {
    fn new(first: Reply<Value>) -> Self {
        let dry = rows::<T>(&first.value) == 0;
        Self { first: first.raw, joined: first.value, pages: 1, dry, list: PhantomData }
    }

    /// Where the next page begins, if there is one.
    fn missing(&self) -> Option<usize> {
        let (shown, total) = (rows::<T>(&self.joined), self.joined["total"].as_u64().unwrap_or_default());
        (!self.dry && (shown as u64) < total).then_some(shown)
    }

    fn add(&mut self, page: Value) {
        self.pages += 1;
        self.dry = rows::<T>(&page) == 0;
        let (Value::Object(joined), Value::Object(mut page)) = (&mut self.joined, page) else { return };
        for list in [T::ROWS].iter().chain(T::BESIDE) {
            if let (Some(Value::Array(all)), Some(Value::Array(more))) = (joined.get_mut(*list), page.remove(*list)) {
                all.extend(more);
            }
        }
        // the newest number counts: rows may come and go meanwhile
        joined.insert("total".to_owned(), page.remove("total").unwrap_or_default());
    }

    fn joined(mut self) -> Result<Reply<T>, serde_json::Error> {
        if self.pages == 1 {
            return Ok(Reply { value: serde_json::from_value(self.joined)?, raw: self.first });
        }
        self.joined["limit"] = rows::<T>(&self.joined).into();
        Ok(Reply { raw: self.joined.to_string().into(), value: serde_json::from_value(self.joined)? })
    }
}

fn rows<T: Paged>(page: &Value) -> usize {
    page[T::ROWS].as_array().map_or(0, Vec::len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(ids: &[&str], offset: usize, total: usize) -> Reply<Value> {
        let row = |id: &&str| json!({"replication": id, "revision": 1, "origin": "kv", "state": "running", "new": 1});
        let rows: Vec<_> = ids.iter().map(row).collect();
        let value = json!({"replications": rows, "offset": offset, "limit": 2, "total": total});
        Reply { raw: value.to_string().into(), value }
    }

    #[test]
    fn pages_become_one_list() {
        let mut pages = Pages::<List>::new(page(&["A", "B"], 0, 3));
        assert_eq!(pages.missing(), Some(2));
        pages.add(page(&["C"], 2, 3).value);
        assert_eq!(pages.missing(), None);
        let joined = pages.joined().unwrap();
        let ids: Vec<_> = joined.value.replications.iter().map(|row| row.replication.as_str()).collect();
        assert_eq!(ids, ["A", "B", "C"]);
        let raw: Value = serde_json::from_slice(&joined.raw).unwrap();
        assert_eq!((&raw["offset"], &raw["limit"], &raw["total"]), (&json!(0), &json!(3), &json!(3)));
        // what this program does not know is passed on
        assert_eq!(raw["replications"][2]["new"], 1);
    }

    #[test]
    fn one_page_is_passed_on_as_it_was_sent() {
        let raw = Bytes::from_static(b"{ \"total\":0,\"limit\":9,\"offset\":0,\"replications\":[] }");
        let value = serde_json::from_slice(&raw).unwrap();
        let pages = Pages::<List>::new(Reply { raw: raw.clone(), value });
        assert_eq!(pages.missing(), None);
        assert_eq!(pages.joined().unwrap().raw, raw);
    }

    #[test]
    fn a_list_that_shrinks_meanwhile_comes_to_an_end() {
        let mut pages = Pages::<List>::new(page(&["A", "B"], 0, 5));
        pages.add(page(&[], 2, 5).value);
        assert_eq!(pages.missing(), None);
        assert!(Pages::<List>::new(Reply { raw: Bytes::new(), value: json!([]) }).joined().is_err());
    }
}
