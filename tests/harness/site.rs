//! One installation as users have it: source, target, control server, the service, and a client that asks. What most
//! tests begin with.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, kv};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::checker::{Expect, compare_streams};
use super::client::{
    Reply, ask, check_reply, checked, connect, request, status, wait_for, wait_value, wait_while_moving,
};
use super::raw::wait_messages;
use super::{Cli, LIMIT, Outgoing, Raw, Role, Server, Service, secrets, wire};

/// The site's name in all of these tests.
pub const SITE: &str = "TEST";

/// How to start a site.
#[derive(Default)]
pub struct Builder {
    servers: Option<(Server, Server)>,
    control_at_source: bool,
    control: Option<Server>,
    login: Option<String>,
    arguments: Vec<String>,
}

/// All of it; ends when dropped.
pub struct Site {
    pub source: Server,
    pub target: Server,
    /// `None` where the source is the control server too.
    control: Option<Server>,
    /// Of the control server, with the login.
    url: String,
    pub service: Service,
    pub client: async_nats::Client,
    /// Everything published since before the service started.
    pub events: Events,
}

impl Builder {
    /// On a source and a target that run already.
    pub fn on(mut self, source: Server, target: Server) -> Self {
        self.servers = Some((source, target));
        self
    }

    /// Without a control server of its own: cheaper, where neither fault nor version of the source is the matter.
    pub fn control_at_source(mut self) -> Self {
        self.control_at_source = true;
        self
    }

    /// With a control server that runs already.
    pub fn control(mut self, server: Server) -> Self {
        self.control = Some(server);
        self
    }

    /// How service and client log in to the control server.
    pub fn login(mut self, login: &str) -> Self {
        self.login = Some(login.to_owned());
        self
    }

    /// More arguments to the service.
    pub fn args<A: Into<String>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub async fn start(self) -> Result<Site> {
        let (source, target) = match self.servers {
            Some(servers) => servers,
            None => tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?,
        };
        let control = match self.control {
            None if self.control_at_source => None,
            None => Some(Server::start(Role::Control).await?),
            given => given,
        };
        let server = control.as_ref().unwrap_or(&source);
        let url = self.login.map_or_else(|| server.url(), |login| server.url_as(&login));
        let client = connect(&url).await?;
        let events = Events::of(&client, "replicator.event.>").await?;
        let service = Service::builder(&url, SITE).args(self.arguments).start().await?;
        Ok(Site { source, target, control, url, service, client, events })
    }
}

impl Site {
    /// Three servers and a service without a replication: neither fault nor version of source and target touches the
    /// service's buckets.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// The cheap one: the source is the control server too.
    pub async fn small() -> Result<Self> {
        Self::builder().control_at_source().start().await
    }

    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The control server, whichever it is.
    pub fn control(&self) -> &Server {
        self.control.as_ref().unwrap_or(&self.source)
    }

    /// Commands that ask this service.
    pub fn cli(&self) -> Cli {
        Cli::new(&self.url)
    }

    /// The control server's URL as service and client use it.
    pub fn service_url(&self) -> String {
        self.url.clone()
    }

    /// The control server, to be restarted.
    pub fn control_mut(&mut self) -> &mut Server {
        self.control.as_mut().unwrap_or(&mut self.source)
    }

    pub async fn source(&self) -> Result<Raw> {
        Raw::connect(&self.source.url()).await
    }

    pub async fn target(&self) -> Result<Raw> {
        Raw::connect(&self.target.url()).await
    }

    /// Creates the source stream; on the subjects `<stream>.>` in lower case unless `config` has others.
    pub async fn source_stream(&self, stream: &str, config: Value) -> Result<Raw> {
        create(self.source().await?, stream, config).await
    }

    /// The same at the target: without `allow_batched` the transport is pipelined on every version.
    pub async fn target_stream(&self, stream: &str, config: Value) -> Result<Raw> {
        create(self.target().await?, stream, config).await
    }

    /// Publishes `<stream in lower case>.<i % 5>` with the payload `i` at the source; returns the last sequence.
    pub async fn publish(&self, stream: &str, numbers: RangeInclusive<u64>) -> Result<u64> {
        let stream = stream.to_lowercase();
        let messages = numbers.map(|i| Outgoing::new(format!("{stream}.{}", i % 5), i.to_string()));
        self.source().await?.publish_all(messages).await
    }

    /// The source stream with so many messages.
    pub async fn filled(&self, stream: &str, messages: u64) -> Result<()> {
        self.source_stream(stream, json!({})).await?;
        self.publish(stream, 1..=messages).await?;
        Ok(())
    }

    /// The smallest document that copies `stream`.
    pub fn document(&self, stream: &str) -> Value {
        json!({"stream": stream, "source_url": self.source.url(), "target_url": self.target.url()})
    }

    /// The smallest document and more fields.
    pub fn document_with(&self, stream: &str, fields: Value) -> Value {
        merged(self.document(stream), fields)
    }

    /// Adds a replication of `stream` with more fields.
    pub async fn add(&self, stream: &str, fields: Value) -> Result<()> {
        request(&self.client, "replicator.config.add", self.document_with(stream, fields)).await?;
        Ok(())
    }

    /// The stream with messages and its replication; waits until everything is at the target.
    pub async fn replicate(&self, stream: &str, messages: u64) -> Result<()> {
        self.filled(stream, messages).await?;
        self.add(stream, json!({})).await?;
        self.copied(stream, messages).await
    }

    /// Waits until the target stream holds so many messages.
    pub async fn copied(&self, stream: &str, messages: u64) -> Result<()> {
        wait_messages(&mut self.target().await?, stream, messages, LIMIT).await
    }

    /// How many messages the target stream holds; 0 without a stream.
    pub async fn at_target(&self, stream: &str) -> Result<u64> {
        let state = self.target().await?.stream_state(stream).await;
        Ok(state.ok().and_then(|state| state["messages"].as_u64()).unwrap_or_default())
    }

    /// The status row of a replication, if there is one.
    pub async fn row(&self, id: &str) -> Option<Value> {
        status(&self.client, id).await
    }

    /// Waits until the status row says what is expected, and returns it.
    pub async fn row_when(&self, id: &str, what: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let probe = async || {
            last = self.row(id).await.unwrap_or_default();
            when(&last).then(|| last.clone())
        };
        let found = wait_value(&format!("`{id}`: {what}"), LIMIT, probe).await;
        found.with_context(|| format!("the row is {last}\n{}", self.service.log()))
    }

    /// Waits until everything up to this source sequence is settled, and nothing is left.
    pub async fn settled(&self, id: &str, seq: u64) -> Result<Value> {
        self.settled_within(id, seq, LIMIT).await
    }

    /// The same for what takes longer without any progress.
    pub async fn settled_within(&self, id: &str, seq: u64, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        let probe = async || {
            last = self.row(id).await.unwrap_or_default();
            let position = last["position"]["source_seq"].clone();
            let settled = last["state"] == "running" && position == seq && last["lag"]["messages"] == 0;
            if settled { Ok(last.clone()) } else { Err(position) }
        };
        let found = wait_while_moving(&format!("`{id}` to settle {seq}"), limit, probe).await;
        found.with_context(|| format!("the row is {last}\n{}", self.service.log()))
    }

    /// Stops the service gracefully, so that the position is saved.
    pub async fn stop(&mut self) -> Result<()> {
        ensure!(self.service.stop().await?.success(), "{}", self.service.log());
        Ok(())
    }

    /// Compares the target stream `to` with what is expected of it.
    pub async fn verify(&self, to: &str, expect: &Expect<'_>) -> Result<()> {
        let report = compare_streams(&mut self.source().await?, &mut self.target().await?, to, expect).await?;
        report.verify().with_context(|| self.service.log())
    }

    /// Sends any bytes to `replicator.<endpoint>`.
    pub async fn ask(&self, endpoint: &str, body: impl AsRef<[u8]>) -> Result<Reply> {
        ask(&self.client, &format!("replicator.{endpoint}"), body.as_ref()).await
    }

    /// Sends JSON to `replicator.<endpoint>`.
    pub async fn send(&self, endpoint: &str, body: Value) -> Result<Reply> {
        self.ask(endpoint, body.to_string()).await
    }

    /// Sends bytes and a header.
    pub async fn ask_with(&self, endpoint: &str, header: (&str, &str), body: impl Into<Bytes>) -> Result<Full> {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(header.0, header.1);
        let (subject, payload) = (format!("replicator.{endpoint}"), body.into());
        secrets::register_document(&serde_json::from_slice(&payload).unwrap_or_default());
        let request = async_nats::Request::new().headers(headers).payload(payload.clone()).timeout(Some(LIMIT));
        let message = self.client.send_request(subject.clone(), request).await?;
        check_reply(endpoint, &message);
        let header = |name: &str| message.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
        let code = header("Nats-Service-Error-Code");
        let body = serde_json::from_slice(&message.payload)?;
        checked(&subject, &payload, code.is_some(), &body);
        Ok(Full { code, error: header("Nats-Service-Error"), body })
    }

    /// A bucket, as the `nats` tool opens it.
    pub async fn bucket(&self, name: &str) -> Result<kv::Store> {
        Ok(jetstream::new(self.client.clone()).get_key_value(name).await?)
    }

    /// Writes a document past the service, as `nats kv put` does; returns its revision.
    pub async fn put(&self, key: &str, value: impl Into<Bytes>) -> Result<u64> {
        let value = value.into();
        secrets::register_document(&serde_json::from_slice(&value).unwrap_or_default());
        Ok(self.bucket("REPLICATOR_CONFIG").await?.put(key, value).await?)
    }

    /// The position record of a replication.
    pub async fn position(&self, id: &str) -> Result<Option<Value>> {
        let value = self.bucket("REPLICATOR_POSITIONS").await?.get(id).await?;
        secrets::check("a position record", &String::from_utf8_lossy(value.as_deref().unwrap_or_default()));
        Ok(value.map(|value| serde_json::from_slice(&value)).transpose()?)
    }

    /// Everything that is published from now on.
    pub async fn listen(&self) -> Result<Events> {
        Events::of(&self.client, "replicator.event.>").await
    }
}

/// A reply with both error headers.
#[derive(Debug)]
pub struct Full {
    pub code: Option<String>,
    pub error: Option<String>,
    pub body: Value,
}

/// Events, collected as they come. One that breaks its schema ends the test, at the latest when this is dropped.
pub struct Events {
    /// Subject and body.
    seen: Arc<Mutex<Vec<(String, Value)>>>,
    /// What broke its schema.
    faults: Arc<Mutex<Vec<String>>>,
    /// How many of them [`Self::wait`] is through with.
    waited: usize,
    of_anybody: bool,
}

impl Events {
    /// Collects what is published on a subject from now on.
    pub async fn of(client: &async_nats::Client, subject: &'static str) -> Result<Self> {
        let mut subscription = client.subscribe(subject).await?;
        // The server's next answer comes after the subscription.
        jetstream::new(client.clone()).query_account().await?;
        let (seen, faults) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let (into, wrong) = (seen.clone(), faults.clone());
        tokio::spawn(async move {
            while let Some(message) = subscription.next().await {
                let body = serde_json::from_slice(&message.payload).unwrap_or_default();
                if let Err(error) = wire::check_event(&message.subject, &body) {
                    wrong.lock().expect("faults").push(format!("{error:#}"));
                }
                into.lock().expect("events").push((message.subject.to_string(), body));
            }
        });
        Ok(Self { seen, faults, waited: 0, of_anybody: false })
    }

    /// Subject and body of all so far.
    #[track_caller]
    pub fn seen(&self) -> Vec<(String, Value)> {
        self.check();
        self.seen.lock().expect("events").clone()
    }

    /// The test publishes on the subjects of events itself: what it publishes follows no schema.
    pub fn of_anybody(&mut self) {
        self.of_anybody = true;
    }

    #[track_caller]
    fn check(&self) {
        if self.of_anybody {
            return;
        }
        let faults = self.faults.lock().expect("faults");
        assert!(faults.is_empty(), "{faults:#?}");
    }

    /// All of one kind so far.
    pub fn told(&self, kind: &str) -> Vec<Value> {
        self.seen().into_iter().map(|(_, body)| body).filter(|body| body["kind"] == kind).collect()
    }

    /// Kinds published so far for a replication, in order. Whether and when it has caught up before something else happens
    /// is a matter of luck: that is not among them.
    pub fn kinds(&self, id: &str) -> Vec<String> {
        let of = self.seen().into_iter().filter(|(_, body)| body["replication"] == id && body["kind"] != "caught-up");
        of.filter_map(|(_, body)| body["kind"].as_str().map(str::to_owned)).collect()
    }

    /// No event of these kinds was published so far.
    pub fn quiet(&self, kinds: &[&str]) -> Result<()> {
        for kind in kinds {
            let told = self.told(kind);
            ensure!(told.is_empty(), "{kind} was published: {told:?}");
        }
        Ok(())
    }

    /// Waits until an event of this kind was published, now or before; returns the last one.
    pub async fn ever(&self, kind: &str) -> Result<Value> {
        let what = format!("event {kind}");
        wait_value(&what, LIMIT, async || self.told(kind).pop()).await
    }

    /// Waits until this many events of this kind were published, and checks that there are no more; returns them. Events take
    /// another way than the status, and may arrive later.
    pub async fn all(&self, kind: &str, count: usize) -> Result<Vec<Value>> {
        let what = format!("{count} events {kind}");
        wait_for(&what, LIMIT, async || self.told(kind).len() >= count).await?;
        let told = self.told(kind);
        ensure!(told.len() == count, "{kind} was published {} times instead of {count}: {told:?}", told.len());
        Ok(told)
    }

    /// Waits for `replicator.event.<kind>.<id>`, the first one after the event that was waited for before; returns its body.
    pub async fn wait(&mut self, kind: &str, id: &str) -> Result<Value> {
        let subject = format!("replicator.event.{kind}.{id}");
        let (seen, waited) = (&self.seen, self.waited);
        let what = format!("an event on `{subject}`");
        let found = wait_value(&what, LIMIT, async || {
            let seen = seen.lock().expect("events");
            let at = waited + seen[waited..].iter().position(|(of, _)| *of == subject)?;
            Some((at, seen[at].1.clone()))
        });
        let (at, body) = found.await.with_context(|| format!("{:?} were published", self.seen()))?;
        ensure!(self.seen().iter().all(|(_, body)| body.is_object()), "not all are JSON: {:?}", self.seen());
        self.waited = at + 1;
        Ok(body)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
            let seen = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            seen.iter().for_each(|(subject, body)| secrets::check(subject, &body.to_string()));
        }
    }
}

/// An object with the fields of another one.
pub fn merged(mut to: Value, from: Value) -> Value {
    for (name, value) in from.as_object().cloned().unwrap_or_default() {
        to[name] = value;
    }
    to
}

/// Tries again, for servers that just restarted and streams that are just going.
async fn create(mut raw: Raw, stream: &str, config: Value) -> Result<Raw> {
    let config = merged(json!({"subjects": [format!("{}.>", stream.to_lowercase())]}), config);
    let mut refused = None;
    let what = format!("stream `{stream}`");
    let made = wait_value(&what, LIMIT, async || {
        let made = raw.create_stream(stream, config.clone()).await;
        made.map_err(|error| refused = Some(error)).ok()
    });
    made.await.with_context(|| format!("{refused:?}"))?;
    Ok(raw)
}
