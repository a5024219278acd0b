//! A server in memory that speaks the client protocol over pipes: enough of JetStream for a copy, with the faults
//! that real servers and networks have.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat};
use futures_util::{FutureExt, future::BoxFuture};
use serde_json::{Value, json};
use stream_replicator::{
    config::Place,
    nats::{Dial, Error, Lane},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    stream::{Refusal, Stream},
    world::World,
};

const PIPE: usize = 64 * 1024;
const TICK: Duration = Duration::from_millis(250);
/// A batch without traffic is forgotten.
const BATCH_IDLE: Duration = Duration::from_secs(10);

pub struct Server {
    world: World,
    name: &'static str,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    down: bool,
    frozen: Option<Instant>,
    leaderless: Option<Instant>,
    streams: BTreeMap<String, Stream>,
    consumers: BTreeMap<String, Consumer>,
    batches: HashMap<String, FastBatch>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
}

struct Connection {
    subscriptions: Vec<(u64, String)>,
    out: UnboundedSender<(Instant, Vec<u8>)>,
    cut: CancellationToken,
    latency: Duration,
}

struct Consumer {
    stream: String,
    next: u64,
    delivered: u64,
    last_stream_seq: u64,
    headers_only: bool,
    mute: bool,
    pulls: Vec<Pull>,
}

struct Pull {
    reply: String,
    left: usize,
    expires: Instant,
    heartbeat: Duration,
    next_heartbeat: Instant,
}

struct FastBatch {
    next: u64,
    flow: u64,
    stream: String,
    last_seq: u64,
    used: Instant,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.name)
    }
}

impl Server {
    pub fn start(world: &World, name: &'static str) -> Arc<Self> {
        let server = Arc::new(Self { world: world.clone(), name, state: Mutex::default() });
        let ticking = Arc::downgrade(&server);
        tokio::spawn(async move {
            loop {
                sleep(TICK).await;
                let Some(server) = ticking.upgrade() else { return };
                server.lock().tick();
            }
        });
        server
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("server")
    }

    /// Does something to a stream, and delivers what became due.
    pub fn with<T>(&self, stream: &str, work: impl FnOnce(&mut Stream) -> T) -> T {
        let mut state = self.lock();
        let result = work(state.streams.get_mut(stream).expect("a stream"));
        state.deliver_all();
        result
    }

    pub fn has(&self, stream: &str) -> bool {
        self.lock().streams.contains_key(stream)
    }

    /// Makes a stream, or makes it anew: its consumers are gone.
    pub fn make(&self, stream: Stream) {
        let mut state = self.lock();
        state.consumers.retain(|_, consumer| consumer.stream != stream.name);
        state.streams.insert(stream.name.clone(), stream);
    }

    /// All connections break; what was on its way is lost.
    pub fn cut(&self) {
        let mut state = self.lock();
        for connection in std::mem::take(&mut state.connections).into_values() {
            connection.cut.cancel();
        }
    }

    /// The process is gone: so is all that it had in memory only.
    pub fn kill(&self) {
        self.cut();
        let mut state = self.lock();
        state.down = true;
        state.consumers.clear();
        state.batches.clear();
        state.frozen = None;
    }

    pub fn revive(&self) {
        self.lock().down = false;
    }

    /// Nothing is read, done or sent for a while.
    pub fn freeze(&self, time: Duration) {
        self.lock().frozen = Some(Instant::now() + time);
    }

    /// The consumers of now deliver nothing more: heartbeats and the ends of pulls are all that comes.
    pub fn mute(&self) {
        self.lock().consumers.values_mut().for_each(|consumer| consumer.mute = true);
    }

    /// Streams have no leader for a while: nobody takes messages or answers.
    pub fn leaderless(&self, time: Duration) {
        self.lock().leaderless = Some(Instant::now() + time);
    }

    /// No more faults.
    pub fn heal(&self) {
        let mut state = self.lock();
        (state.frozen, state.leaderless) = (None, None);
    }

    fn connect(self: &Arc<Self>) -> Option<DuplexStream> {
        let mut state = self.lock();
        if state.down {
            return None;
        }
        let (theirs, ours) = duplex(PIPE);
        let (out, sending) = unbounded_channel();
        let cut = CancellationToken::new();
        let latency = self.world.millis(0, if self.world.once_in(3) { 300 } else { 20 });
        let info = json!({"server_name": self.name, "version": "2.15.1", "max_payload": 1 << 20, "headers": true});
        let _ = out.send((Instant::now() + latency, format!("INFO {info}\r\n").into_bytes()));
        state.next_connection += 1;
        let id = state.next_connection;
        state.connections.insert(id, Connection { subscriptions: Vec::new(), out, cut: cut.clone(), latency });
        drop(state);
        let server = self.clone();
        tokio::spawn(async move {
            let (reading, writing) = tokio::io::split(ours);
            let work = server.clone().work(id, reading, latency);
            let send = server.clone().send(sending, writing);
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                ((), ()) = async { tokio::join!(work, send) } => {}
            }
            server.lock().connections.remove(&id);
        });
        Some(theirs)
    }

    /// Takes commands, each piece after its way through the network.
    async fn work(
        self: Arc<Self>,
        id: u64,
        mut reading: impl tokio::io::AsyncRead + Unpin + Send + 'static,
        latency: Duration,
    ) {
        let (arriving, mut arrived) = unbounded_channel();
        let reader = async move {
            let mut buffer = vec![0; PIPE];
            while let Ok(read @ 1..) = reading.read(&mut buffer).await {
                if arriving.send((Instant::now() + latency, buffer[..read].to_vec())).is_err() {
                    return;
                }
            }
        };
        let worker = async {
            let mut input = Vec::new();
            while let Some((due, bytes)) = arrived.recv().await {
                sleep_until(due).await;
                self.thawed().await;
                input.extend_from_slice(&bytes);
                let mut state = self.lock();
                let used = state.commands(id, &input, &self.world);
                drop(state);
                input.drain(..used);
            }
        };
        tokio::join!(reader, worker);
    }

    async fn send(
        self: Arc<Self>,
        mut sending: UnboundedReceiver<(Instant, Vec<u8>)>,
        mut writing: impl tokio::io::AsyncWrite + Unpin,
    ) {
        while let Some((due, bytes)) = sending.recv().await {
            sleep_until(due).await;
            self.thawed().await;
            // Whoever is gone hears nothing; what it sent before is worked on all the same.
            let _ = writing.write_all(&bytes).await;
        }
    }

    async fn thawed(&self) {
        loop {
            let Some(until) = self.lock().frozen.filter(|until| *until > Instant::now()) else { return };
            sleep_until(until.min(Instant::now() + TICK)).await;
        }
    }
}

impl State {
    /// Works on all complete commands; returns the bytes used.
    fn commands(&mut self, id: u64, input: &[u8], world: &World) -> usize {
        let mut at = 0;
        while let Some(end) = input[at..].windows(2).position(|pair| pair == b"\r\n") {
            let line = String::from_utf8_lossy(&input[at..at + end]).into_owned();
            let body = at + end + 2;
            let words: Vec<&str> = line.split_whitespace().collect();
            let (size, header_size) = match words.as_slice() {
                ["PUB", .., size] => (size.parse::<usize>().expect("a size"), 0),
                ["HPUB", .., header, size] => {
                    (size.parse::<usize>().expect("a size"), header.parse::<usize>().expect("a size"))
                }
                _ => {
                    self.control(id, &words);
                    at = body;
                    continue;
                }
            };
            if input.len() < body + size + 2 {
                break;
            }
            let (header, payload) = input[body..body + size].split_at(header_size);
            let reply = match (words[0], words.len()) {
                ("PUB", 4) => words[2],
                ("HPUB", 5) => words[2],
                _ => "",
            };
            self.publish(words[1], reply, header, payload, world);
            at = body + size + 2;
        }
        at
    }

    fn control(&mut self, id: u64, words: &[&str]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match words {
            ["PING"] => {
                let _ = connection.out.send((Instant::now() + connection.latency, b"PONG\r\n".to_vec()));
            }
            ["SUB", subject, sid] => {
                connection.subscriptions.push((sid.parse().expect("a sid"), (*subject).to_owned()));
            }
            ["UNSUB", sid] => connection.subscriptions.retain(|(known, _)| known.to_string() != *sid),
            _ => {}
        }
    }

    fn publish(&mut self, subject: &str, reply: &str, header: &[u8], payload: &[u8], world: &World) {
        if self.leaderless.is_some_and(|until| until > Instant::now()) {
            self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b"");
        } else if let Some(call) = subject.strip_prefix("$JS.API.") {
            self.api(call, reply, payload, world);
        } else if reply.ends_with(".$FI") {
            self.batch(subject, reply, header, payload, world);
        } else {
            match self.store(subject, header, payload, world) {
                None => self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b""),
                Some((stream, Ok(ack))) => {
                    let mut json = json!({"stream": stream, "seq": ack.seq});
                    if ack.duplicate {
                        json["duplicate"] = true.into();
                    }
                    self.answer(reply, &json);
                }
                Some((stream, Err(refusal))) => {
                    self.answer(reply, &json!({"stream": stream, "seq": 0, "error": refusal.json()}));
                }
            }
        }
    }

    fn store(
        &mut self,
        subject: &str,
        header: &[u8],
        payload: &[u8],
        world: &World,
    ) -> Option<(String, Result<super::stream::Ack, Refusal>)> {
        let stream = self.streams.values_mut().find(|stream| stream.takes(subject))?;
        let result = stream.publish(subject, header, payload, world.now_ns());
        Some((stream.name.clone(), result))
    }

    /// A message of a fast-ingest batch (ADR-50) with gap mode `fail`.
    fn batch(&mut self, subject: &str, reply: &str, header: &[u8], payload: &[u8], world: &World) {
        let tokens: Vec<&str> = reply.rsplit('.').collect();
        let [_, operation, sequence, _, flow, id, ..] = tokens.as_slice() else { return };
        let (sequence, flow) = (sequence.parse::<u64>().expect("a sequence"), flow.parse::<u64>().expect("a flow"));
        if *operation == "0" {
            let batch = FastBatch { next: 1, flow, stream: String::new(), last_seq: 0, used: Instant::now() };
            self.batches.insert((*id).to_owned(), batch);
            self.answer(reply, &json!({"type": "ack", "seq": 0, "msgs": flow}));
        }
        let Some(batch) = self.batches.get_mut(*id) else {
            let error = Refusal { err_code: 10208, description: "batch publish ID unknown".into() };
            self.answer(reply, &json!({"error": error.json()}));
            return;
        };
        batch.used = Instant::now();
        if sequence != batch.next {
            let gap = json!({"type": "gap", "last_seq": batch.next, "seq": sequence});
            self.answer(reply, &gap);
            return self.end_batch(id, reply);
        }
        if *operation == "3" {
            return self.end_batch(id, reply);
        }
        match self.store(subject, header, payload, world) {
            None => self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b""),
            Some((_, Err(refusal))) => {
                self.answer(reply, &json!({"type": "err", "seq": sequence, "error": refusal.json()}));
                self.end_batch(id, reply);
            }
            Some((stream, Ok(ack))) => {
                let Some(batch) = self.batches.get_mut(*id) else { return };
                batch.next += 1;
                batch.stream = stream;
                batch.last_seq = ack.seq;
                if sequence.is_multiple_of(batch.flow) {
                    let flow = batch.flow;
                    self.answer(reply, &json!({"type": "ack", "seq": sequence, "msgs": flow}));
                }
            }
        }
    }

    fn end_batch(&mut self, id: &str, reply: &str) {
        let Some(batch) = self.batches.remove(id) else { return };
        let stream = if batch.stream.is_empty() {
            self.streams.keys().next().cloned().unwrap_or_default()
        } else {
            batch.stream
        };
        self.answer(reply, &json!({"stream": stream, "seq": batch.last_seq, "batch": id, "count": batch.next - 1}));
    }

    fn api(&mut self, call: &str, reply: &str, payload: &[u8], world: &World) {
        let words: Vec<&str> = call.split('.').collect();
        let body: Value = serde_json::from_slice(payload).unwrap_or_default();
        let not_found = json!({"error": {"code": 404, "err_code": 10059, "description": "stream not found"}});
        match words.as_slice() {
            ["STREAM", "INFO", stream] => {
                let info = self.streams.get(*stream).map_or(not_found, Stream::info);
                self.answer(reply, &info);
            }
            ["STREAM", "CREATE", stream] => {
                let made = Stream::new(stream, body["allow_batched"] == true, world.now_ns());
                let info = made.info();
                self.streams.entry((*stream).to_owned()).or_insert(made);
                self.answer(reply, &info);
            }
            ["STREAM", "MSG", "GET", stream] => {
                let found = self.streams.get(*stream).and_then(|stream| {
                    let seq = body["seq"].as_u64()?;
                    Some((seq, stream.messages.get(&seq)?))
                });
                let answer = match found {
                    Some((seq, message)) => json!({"message": {
                        "subject": message.subject, "seq": seq, "hdrs": STANDARD.encode(&message.header),
                        "data": STANDARD.encode(&message.payload), "time": rfc3339(message.time_ns),
                    }}),
                    None => json!({"error": {"code": 404, "err_code": 10037, "description": "no message found"}}),
                };
                self.answer(reply, &answer);
            }
            ["CONSUMER", "CREATE", stream, name, ..] => self.create_consumer(stream, name, &body["config"], reply),
            ["CONSUMER", "INFO", _, name] => {
                let known = self.consumers.get(*name).and_then(|of| Some((of, self.streams.get(&of.stream)?)));
                let answer = match known {
                    Some((consumer, stream)) => json!({
                        "name": name,
                        "num_pending": stream.messages.range(consumer.next..).count(),
                        "delivered": {"consumer_seq": consumer.delivered, "stream_seq": consumer.last_stream_seq},
                    }),
                    None => json!({"error": {"code": 404, "err_code": 10014, "description": "consumer not found"}}),
                };
                self.answer(reply, &answer);
            }
            ["CONSUMER", "DELETE", _, name] => {
                self.consumers.remove(*name);
                self.answer(reply, &json!({"success": true}));
            }
            ["CONSUMER", "MSG", "NEXT", _, name] => {
                let Some(consumer) = self.consumers.get_mut(*name) else {
                    return self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b"");
                };
                let bytes = body["max_bytes"].as_u64().expect("max_bytes") as usize;
                let time = |field: &str| Duration::from_nanos(body[field].as_u64().expect("a duration"));
                let heartbeat = time("idle_heartbeat");
                let now = Instant::now();
                consumer.pulls.push(Pull {
                    reply: reply.to_owned(),
                    left: bytes,
                    expires: now + time("expires"),
                    heartbeat,
                    next_heartbeat: now + heartbeat,
                });
                self.deliver(name);
            }
            _ => panic!("the simulation does not know `$JS.API.{call}`"),
        }
    }

    fn create_consumer(&mut self, stream: &str, name: &str, config: &Value, reply: &str) {
        let Some(of) = self.streams.get(stream) else {
            let error = json!({"code": 404, "err_code": 10059, "description": "stream not found"});
            return self.answer(reply, &json!({"error": error}));
        };
        let next = match config["deliver_policy"].as_str() {
            Some("by_start_sequence") => config["opt_start_seq"].as_u64().expect("a sequence").max(of.first),
            Some("by_start_time") => {
                let time = config["opt_start_time"].as_str().expect("a time");
                let time = DateTime::parse_from_rfc3339(time).expect("a time").timestamp_nanos_opt().expect("a time");
                let found = of.messages.iter().find(|(_, message)| message.time_ns >= time);
                found.map_or(of.last + 1, |(seq, _)| *seq)
            }
            other => panic!("the simulation does not know the deliver policy {other:?}"),
        };
        let pending = of.messages.range(next..).count();
        let consumer = Consumer {
            stream: stream.to_owned(),
            next,
            delivered: 0,
            last_stream_seq: next - 1,
            headers_only: config["headers_only"] == true,
            mute: false,
            pulls: Vec::new(),
        };
        self.consumers.insert(name.to_owned(), consumer);
        let at = json!({"consumer_seq": 0, "stream_seq": next - 1});
        self.answer(reply, &json!({"name": name, "num_pending": pending, "delivered": at, "ack_floor": at}));
    }

    fn deliver_all(&mut self) {
        let names: Vec<_> = self.consumers.keys().cloned().collect();
        names.iter().for_each(|name| self.deliver(name));
    }

    /// Delivers what there is to the pulls that wait, oldest first.
    fn deliver(&mut self, name: &str) {
        loop {
            let Some(consumer) = self.consumers.get_mut(name).filter(|consumer| !consumer.mute) else { return };
            let Some(stream) = self.streams.get(&consumer.stream) else { return };
            let Some(pull) = consumer.pulls.first_mut() else { return };
            let next = consumer.next.max(stream.first);
            let Some((seq, message)) = stream.messages.range(next..).next() else { return };
            let seq = *seq;
            let pending = stream.messages.range(seq + 1..).count();
            let delivered = consumer.delivered + 1;
            let ack = format!("$JS.ACK.{}.{name}.1.{seq}.{delivered}.{}.{pending}", consumer.stream, message.time_ns);
            let payload: &[u8] = if consumer.headers_only { b"" } else { &message.payload };
            let size = message.subject.len() + ack.len() + message.header.len() + payload.len();
            let reply = pull.reply.clone();
            if size > pull.left {
                let left = pull.left;
                consumer.pulls.remove(0);
                let status = format!(
                    "NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: {left}\r\n\r\n"
                );
                self.answer_raw(&reply, status.as_bytes(), b"");
                continue;
            }
            pull.left -= size;
            pull.next_heartbeat = Instant::now() + pull.heartbeat;
            let used_up = pull.left == 0;
            let frame = (message.subject.clone(), ack, message.header.clone(), payload.to_vec());
            consumer.next = seq + 1;
            consumer.delivered = delivered;
            consumer.last_stream_seq = seq;
            if used_up {
                consumer.pulls.remove(0);
            }
            self.route(&reply, &frame.0, &frame.1, &frame.2, &frame.3);
        }
    }

    /// Pulls that expire, heartbeats, batches that nobody uses.
    fn tick(&mut self) {
        let now = Instant::now();
        if self.down || self.frozen.is_some_and(|until| until > now) {
            return;
        }
        self.batches.retain(|_, batch| now - batch.used < BATCH_IDLE);
        let mut answers = Vec::new();
        for consumer in self.consumers.values_mut() {
            let (delivered, last) = (consumer.delivered, consumer.last_stream_seq);
            consumer.pulls.retain_mut(|pull| {
                if now >= pull.expires {
                    let left = pull.left;
                    let status = format!(
                        "NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: {left}\r\n\r\n"
                    );
                    answers.push((pull.reply.clone(), status));
                    return false;
                }
                if now >= pull.next_heartbeat {
                    pull.next_heartbeat = now + pull.heartbeat;
                    answers.push((pull.reply.clone(), format!(
                        "NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: {delivered}\r\nNats-Last-Stream: {last}\r\n\r\n"
                    )));
                }
                true
            });
        }
        for (reply, status) in answers {
            self.answer_raw(&reply, status.as_bytes(), b"");
        }
    }

    fn answer(&self, reply: &str, json: &Value) {
        self.answer_raw(reply, b"", json.to_string().as_bytes());
    }

    fn answer_raw(&self, reply: &str, header: &[u8], payload: &[u8]) {
        if !reply.is_empty() {
            self.route(reply, reply, "", header, payload);
        }
    }

    /// Sends to whoever subscribed to `to`, shown under `subject`.
    fn route(&self, to: &str, subject: &str, reply: &str, header: &[u8], payload: &[u8]) {
        for connection in self.connections.values() {
            for (sid, pattern) in &connection.subscriptions {
                let prefix = pattern.trim_end_matches(['*', '>']);
                if !to.starts_with(prefix) {
                    continue;
                }
                let reply = if reply.is_empty() { String::new() } else { format!(" {reply}") };
                let mut frame = if header.is_empty() {
                    format!("MSG {subject} {sid}{reply} {}\r\n", payload.len()).into_bytes()
                } else {
                    let total = header.len() + payload.len();
                    format!("HMSG {subject} {sid}{reply} {} {total}\r\n", header.len()).into_bytes()
                };
                frame.extend_from_slice(header);
                frame.extend_from_slice(payload);
                frame.extend_from_slice(b"\r\n");
                let _ = connection.out.send((Instant::now() + connection.latency, frame));
            }
        }
    }
}

fn rfc3339(time_ns: i64) -> String {
    DateTime::from_timestamp_nanos(time_ns).to_rfc3339_opts(SecondsFormat::Nanos, true)
}

/// Connects to the servers of a simulation by the names of their hosts.
#[derive(Debug, Clone)]
pub struct Network(pub Vec<Arc<Server>>);

impl Dial for Network {
    fn dial<'a>(&'a self, place: &'a Place, name: &'a str) -> BoxFuture<'a, Result<Lane, Error>> {
        async move {
            let Place::Known(connection) = place else { panic!("the simulation has no contexts") };
            let endpoint = &connection.endpoint;
            let host = endpoint.hosts[0].host.as_str();
            let server = self.0.iter().find(|server| server.name == host).expect("a known server");
            sleep(server.world.millis(0, 20)).await;
            let pipe = server.connect().ok_or_else(|| Error::retry(format!("`{host}`: connection refused")))?;
            let greeting = Lane::greet(Box::new(pipe), host, connection, name);
            let limit = endpoint.connect_timeout;
            tokio::time::timeout(limit, greeting)
                .await
                .map_err(|_| Error::retry(format!("`{host}`: no answer within {limit:?}")))?
        }
        .boxed()
    }
}
