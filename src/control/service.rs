//! A service as ADR-32 describes it, which knows nothing of replications. async-nats has one, but there an error
//! cannot have a body and every endpoint has a queue group.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{Client, HeaderMap, HeaderValue, Message, SubscribeError, Subscriber};
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::select_all};
use serde_json::{Value, json};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error};

use super::api::{ErrorReply, Failure};
use crate::names;

/// Queue group of the endpoints that only one instance answers.
const QUEUE_GROUP: &str = "q";
/// Time limit from the start of work on a request to its answer.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_500);
/// How long a request may wait before work on it starts.
const WAIT_AT_MOST: Duration = Duration::from_millis(400);
/// How long a start waits for the server.
const REACHABLE_WITHIN: Duration = Duration::from_secs(1);
/// Requests that are worked on at once: queries, and changes.
const PARALLEL: usize = 256;

/// Works on one request; may take longer than the answer can wait.
pub(super) type Handler = Arc<dyn Fn(Request) -> BoxFuture<'static, Result<Vec<u8>, Failure>> + Send + Sync>;

/// Data that an endpoint adds to its numbers in `$SRV.STATS`; of bounded size.
pub(super) type Data = Arc<dyn Fn() -> Value + Send + Sync>;

/// One endpoint.
#[derive(Clone)]
pub(super) struct Route {
    pub(super) name: &'static str,
    pub(super) subject: String,
    pub(super) kind: EndpointKind,
    /// What `$SRV.INFO` says of it besides.
    pub(super) metadata: BTreeMap<&'static str, String>,
    pub(super) handler: Handler,
    pub(super) data: Option<Data>,
}

impl Route {
    /// From now on the endpoint refuses all requests: the service is read-only.
    pub(super) fn refuse(&mut self) {
        self.handler = Arc::new(|_| {
            let failure =
                Failure::new(403, "the service is read-only (`--read-only`): nothing can be changed by request");
            async { Err(failure) }.boxed()
        });
    }
}

/// Which instances answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndpointKind {
    /// Changes nothing: every instance answers, and the first answer wins.
    Query,
    /// Changes nothing but is expensive: one instance answers.
    Inquiry,
    /// One instance acts, even if its client no longer waits for the answer.
    Mutation,
}

impl EndpointKind {
    fn queue_group(self) -> &'static str {
        match self {
            Self::Query => "",
            Self::Inquiry | Self::Mutation => QUEUE_GROUP,
        }
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) body: Bytes,
    pub(super) headers: HeaderMap,
}

/// How the service describes itself.
#[derive(Debug)]
pub(super) struct ServiceIdentity {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) description: String,
    pub(super) metadata: BTreeMap<String, String>,
}

/// The running service.
pub struct Service {
    shared: Arc<ServiceState>,
    stop: CancellationToken,
    loops: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

impl Service {
    pub(super) async fn start(
        client: Client,
        identity: ServiceIdentity,
        routes: Vec<Route>,
    ) -> Result<Self, SubscribeError> {
        let id = nuid::next().to_string();
        let mut queries = Vec::new();
        let mut others = Vec::new();
        for verb in [ServiceVerb::Ping, ServiceVerb::Info, ServiceVerb::Stats] {
            for subject in verb.subjects(&identity.name, &id) {
                queries.push((ServiceRequest::Verb(verb), client.subscribe(subject).await?));
            }
        }
        for (index, route) in routes.iter().enumerate() {
            let asked = ServiceRequest::Route(index);
            let subject = route.subject.clone();
            match route.kind {
                EndpointKind::Query => queries.push((asked, client.subscribe(subject).await?)),
                EndpointKind::Inquiry | EndpointKind::Mutation => {
                    let group = route.kind.queue_group().to_owned();
                    others.push((asked, client.queue_subscribe(subject, group).await?));
                }
            }
        }
        let stats = routes.iter().map(|_| Mutex::default()).collect();
        let (started, tasks) = (Utc::now(), TaskTracker::new());
        let shared = Arc::new(ServiceState { client, id, identity, routes, stats, started, tasks });
        let stop = CancellationToken::new();
        // two loops, so that slow changes never delay a question
        let loops = [queries, others].into_iter();
        let loops = loops.map(|subscribers| tokio::spawn(serve(shared.clone(), subscribers, stop.clone()))).collect();
        let service = Self { shared, stop, loops };
        service.reachable().await;
        Ok(service)
    }

    /// Waits until the server knows the subscriptions, by a request to this service. Without the permission to send it, the
    /// wait is short.
    async fn reachable(&self) {
        let [.., own] = ServiceVerb::Ping.subjects(&self.shared.identity.name, &self.shared.id);
        if !matches!(timeout(REACHABLE_WITHIN, self.shared.client.request(own, Bytes::new())).await, Ok(Ok(_))) {
            debug!("the service does not reach itself");
        }
    }

    /// Runs work beside the requests until the stop.
    pub(super) fn with_task<F>(mut self, work: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.loops.push(tokio::spawn(work(self.stop.clone())));
        self
    }

    /// Accepts no more requests and waits, for a limited time, until the accepted ones are answered.
    pub async fn stop(self) {
        self.stop.cancel();
        for task in self.loops {
            let _ = task.await;
        }
        self.shared.tasks.close();
        let _ = timeout(ANSWER_WITHIN, self.shared.tasks.wait()).await;
        let _ = timeout(ANSWER_WITHIN, self.shared.client.flush()).await;
    }
}

/// What all tasks of the service share.
struct ServiceState {
    client: Client,
    id: String,
    identity: ServiceIdentity,
    routes: Vec<Route>,
    /// In the order of `routes`.
    stats: Vec<Mutex<Stats>>,
    started: DateTime<Utc>,
    tasks: TaskTracker,
}

#[derive(Debug, Clone, Copy)]
enum ServiceRequest {
    Verb(ServiceVerb),
    Route(usize),
}

/// The requests of ADR-32 that every service answers.
#[derive(Debug, Clone, Copy)]
enum ServiceVerb {
    Ping,
    Info,
    Stats,
}

impl ServiceVerb {
    fn subjects(self, name: &str, id: &str) -> [String; 3] {
        let verb = match self {
            Self::Ping => "PING",
            Self::Info => "INFO",
            Self::Stats => "STATS",
        };
        [format!("$SRV.{verb}"), format!("$SRV.{verb}.{name}"), format!("$SRV.{verb}.{name}.{id}")]
    }
}

#[derive(Debug, Default, Clone)]
struct Stats {
    requests: u64,
    errors: u64,
    last_error: String,
    time: Duration,
}

/// Accepts requests until the stop; the subscriptions end with it.
async fn serve(shared: Arc<ServiceState>, subscribers: Vec<(ServiceRequest, Subscriber)>, stop: CancellationToken) {
    let subscribers = subscribers.into_iter();
    let mut requests = select_all(subscribers.map(|(asked, messages)| messages.map(move |message| (asked, message))));
    let permits = Arc::new(Semaphore::new(PARALLEL));
    loop {
        let (asked, message) = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            request = requests.next() => match request {
                Some(request) => request,
                None => return,
            },
        };
        match asked {
            ServiceRequest::Verb(verb) => shared.answer_verb(verb, message).await,
            ServiceRequest::Route(index) => match timeout(WAIT_AT_MOST, permits.clone().acquire_owned()).await {
                Ok(Ok(permit)) => {
                    shared.tasks.spawn(shared.clone().work(index, message, permit));
                }
                _ => shared.busy(index, message).await,
            },
        }
    }
}

impl ServiceState {
    /// Works on a request and answers in time, even where the work continues.
    async fn work(self: Arc<Self>, index: usize, message: Message, permit: OwnedSemaphorePermit) {
        let route = &self.routes[index];
        if message.reply.is_none() && route.kind != EndpointKind::Mutation {
            return;
        }
        let begun = Instant::now();
        let request = Request { body: message.payload, headers: message.headers.unwrap_or_default() };
        // a task of its own: accepted work is finished, and a panic ends only this task
        let mut work = tokio::spawn((route.handler)(request));
        let result = match timeout(ANSWER_WITHIN, &mut work).await {
            Ok(Ok(result)) => result,
            Ok(Err(failed)) => {
                error!(endpoint = route.name, "a request failed: {failed}");
                Err(Failure::new(500, "internal error, see the log"))
            }
            Err(_) => Err(Failure::new(504, "not done in time, it may still happen")),
        };
        self.count(index, result.as_ref().err(), begun.elapsed());
        self.answer(message.reply, result).await;
        if !work.is_finished() {
            let _ = work.await;
        }
        drop(permit);
    }

    async fn busy(&self, index: usize, message: Message) {
        let failure = Failure::new(503, "too many requests at once");
        self.count(index, Some(&failure), Duration::ZERO);
        self.answer(message.reply, Err(failure)).await;
    }

    fn count(&self, index: usize, failure: Option<&Failure>, time: Duration) {
        let mut stats = self.stats[index].lock().unwrap_or_else(PoisonError::into_inner);
        stats.requests += 1;
        stats.time += time;
        if let Some(failure) = failure {
            stats.errors += 1;
            stats.last_error = format!("{}:{}", failure.code, one_line(&failure.description));
        }
    }

    async fn answer(&self, reply: Option<async_nats::Subject>, result: Result<Vec<u8>, Failure>) {
        let Some(reply) = reply else { return };
        let max_payload = self.client.server_info().max_payload;
        let result = match result {
            Ok(body) if body.len() > max_payload => {
                Err(Failure::new(500, format!("the answer has {} bytes, more than a message can have", body.len())))
            }
            result => result,
        };
        let sent = match result {
            Ok(body) => self.client.publish(reply, body.into()).await,
            Err(failure) => {
                let (headers, body) = error_reply(failure, max_payload);
                self.client.publish_with_headers(reply, headers, body.into()).await
            }
        };
        if let Err(failed) = sent {
            debug!("an answer could not be sent: {failed}");
        }
    }

    async fn answer_verb(&self, verb: ServiceVerb, message: Message) {
        let body = match verb {
            ServiceVerb::Ping => self.about("ping_response"),
            ServiceVerb::Info => self.info(),
            ServiceVerb::Stats => self.statistics(),
        };
        self.answer(message.reply, Ok(body.to_string().into_bytes())).await;
    }

    fn about(&self, kind: &str) -> Value {
        json!({
            "type": format!("io.nats.micro.v1.{kind}"),
            "name": self.identity.name,
            "id": self.id,
            "version": self.identity.version,
            "metadata": self.identity.metadata,
        })
    }

    fn info(&self) -> Value {
        let mut info = self.about("info_response");
        info["description"] = self.identity.description.as_str().into();
        let endpoints = self.routes.iter().map(|route| {
            let mut endpoint = route.about();
            endpoint["metadata"] = json!(route.metadata);
            endpoint
        });
        info["endpoints"] = endpoints.collect();
        info
    }

    fn statistics(&self) -> Value {
        let mut statistics = self.about("stats_response");
        statistics["started"] = self.started.to_rfc3339_opts(SecondsFormat::Nanos, true).into();
        let endpoints = self.routes.iter().zip(&self.stats).map(|(route, stats)| {
            let stats = stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let nanoseconds = u64::try_from(stats.time.as_nanos()).unwrap_or(u64::MAX);
            let mut endpoint = route.about();
            endpoint["num_requests"] = stats.requests.into();
            endpoint["num_errors"] = stats.errors.into();
            endpoint["last_error"] = stats.last_error.into();
            endpoint["processing_time"] = nanoseconds.into();
            endpoint["average_processing_time"] = nanoseconds.checked_div(stats.requests).unwrap_or_default().into();
            if let Some(data) = &route.data {
                endpoint["data"] = data();
            }
            endpoint
        });
        statistics["endpoints"] = endpoints.collect();
        statistics
    }
}

impl Route {
    fn about(&self) -> Value {
        json!({"name": self.name, "subject": self.subject, "queue_group": self.kind.queue_group()})
    }
}

fn error_reply(mut failure: Failure, max_payload: usize) -> (HeaderMap, Vec<u8>) {
    const HEADERS: usize = 1024;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Service-Error", header_value(&failure.description));
    headers.insert("Nats-Service-Error-Code", header_value(&failure.code.to_string()));
    if failure.code == 408 {
        // The clock of the sender may be behind ours: with this it can say what it means.
        headers.insert(names::TIME_HEADER, header_value(&Utc::now().timestamp_millis().to_string()));
    }
    loop {
        let body = serde_json::to_vec(&ErrorReply { error: failure.clone() }).unwrap_or_default();
        if body.len() + HEADERS <= max_payload || failure.problems.is_empty() {
            return (headers, body);
        }
        failure.problems.truncate(failure.problems.len() / 2);
    }
}

fn header_value(text: &str) -> HeaderValue {
    one_line(text).parse().unwrap_or_else(|_| HeaderValue::new())
}

/// The start of a text, as a header can carry it.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Problem;

    #[test]
    fn an_error_is_in_headers_and_body() {
        let failure = Failure { problems: vec![Problem::new("/a", "b")], ..Failure::new(400, "two\r\nlines") };
        let (headers, body) = error_reply(failure, 1 << 20);
        assert_eq!(headers.get("Nats-Service-Error").unwrap().as_str(), "two  lines");
        assert_eq!(headers.get("Nats-Service-Error-Code").unwrap().as_str(), "400");
        let expect = json!({"error": {
            "code": 400, "description": "two\r\nlines", "problems": [{"path": "/a", "message": "b"}]
        }});
        assert_eq!(serde_json::from_slice::<Value>(&body).unwrap(), expect);
    }

    #[test]
    fn an_error_fits_into_a_message() {
        let problems = vec![Problem::new("/a", "x".repeat(100)); 1000];
        let (_, body) = error_reply(Failure { problems, ..Failure::new(400, "d") }, 10_000);
        assert!(body.len() < 10_000);
    }
}
