//! The reaction of a server to what it receives: publishes, batches, consumers and the JetStream API, as far as a copy needs
//! them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::{
    durable::Acks,
    history::Arrival,
    server::State,
    stream::{Ack, Config, Refusal, Stream, matches},
    world::Host,
};

/// A batch without traffic is forgotten.
const BATCH_IDLE: Duration = Duration::from_secs(10);
pub struct Consumer {
    pub stream: String,
    config: Value,
    pub(super) filter: Option<String>,
    pub(super) next: u64,
    pub(super) delivered: u64,
    pub(super) last_stream_seq: u64,
    headers_only: bool,
    /// It delivers nothing more, and gives signs of life.
    pub mute: bool,
    pub(super) pulls: Vec<Pull>,
    /// The last pull was open then.
    active: Instant,
    /// Of a durable one.
    pub(super) acks: Option<Acks>,
}

impl Consumer {
    pub(super) fn name(&self) -> &str {
        self.config["name"].as_str().expect("a name")
    }

    /// Whether its last pull is longer ago than it is kept.
    fn is_forgotten(&self, now: Instant) -> bool {
        let inactive = self.config["inactive_threshold"].as_u64().map(Duration::from_nanos);
        !self.is_durable() && inactive.is_some_and(|inactive| now - self.active >= inactive)
    }

    pub(super) fn takes(&self, subject: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| matches(filter, subject))
    }
}

pub(super) struct Pull {
    pub(super) reply: String,
    /// Bytes and messages that it still takes.
    pub(super) left: usize,
    pub(super) batch: u64,
    expires: Instant,
    /// Zero for none.
    pub(super) heartbeat: Duration,
    pub(super) next_heartbeat: Instant,
}

impl Pull {
    /// The status that ends it.
    pub(super) fn ends(&self, why: &str) -> String {
        let left = self.left;
        format!("NATS/1.0 {why}\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: {left}\r\n\r\n")
    }
}

pub struct FastBatch {
    next: u64,
    flow: u64,
    stream: String,
    last_seq: u64,
    used: Instant,
}

impl State {
    /// Somebody whose connection was opened at a time sends something.
    pub(super) fn publish(
        &mut self,
        (opened, epoch): (Duration, u64),
        subject: &str,
        reply: &str,
        header: &[u8],
        payload: &[u8],
    ) {
        let batched = reply.ends_with(".$FI");
        let arrival = Arrival { subject, header, payload, opened, epoch, batched };
        if self.leaderless.is_some_and(|until| until > Instant::now()) {
            if !header.is_empty() && !subject.starts_with('$') {
                self.judge(arrival, None);
            }
            self.nobody_leads(subject, reply);
        } else if let Some(call) = subject.strip_prefix("$JS.API.") {
            self.api(call, reply, payload);
        } else if subject.starts_with("$JS.ACK.") {
            self.ack(subject, reply, payload);
        } else if subject.starts_with("$JS.FC.") {
            self.flow_control(subject, header);
        } else if batched {
            self.batch(reply, arrival);
        } else {
            match self.store(arrival) {
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

    /// There is no leader: there is no answer, or a server answers that has the stream's name and none of its messages.
    fn nobody_leads(&mut self, subject: &str, reply: &str) {
        let name = subject.strip_prefix("$JS.API.STREAM.INFO.");
        let answers = self.world.elapsed().as_millis().is_multiple_of(2);
        match name.and_then(|name| self.streams.get(name)).filter(|_| answers).map(Stream::info) {
            Some(mut info) => {
                info["cluster"] = json!({"name": "C", "leader": ""});
                info["state"] = json!({"messages": 0, "first_seq": 0, "last_seq": 0});
                info["ts"] = rfc3339(self.world.now_ns(self.host)).into();
                self.answer(reply, &info);
            }
            None => self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b""),
        }
    }

    fn store(&mut self, arrival: Arrival<'_>) -> Option<(String, Result<Ack, Refusal>)> {
        let now_ns = self.world.now_ns(self.host);
        let refused = self.refusals.contains(&0);
        self.refusals.retain(|after| *after > 0);
        self.refusals.iter_mut().for_each(|after| *after -= 1);
        let stream = self.streams.values_mut().find(|stream| stream.takes(arrival.subject));
        let result = stream.map(|stream| {
            let stored = match refused {
                true => Err(Refusal::new(10008, "JetStream system temporarily unavailable")),
                false => stream.publish(arrival.subject, arrival.header, arrival.payload, now_ns),
            };
            (stream.name.clone(), stored)
        });
        let judged = result.as_ref().map(|(_, result)| result.as_ref().copied().map_err(|refusal| refusal.err_code));
        self.judge(arrival, judged);
        result
    }

    fn judge(&self, arrival: Arrival<'_>, result: Option<Result<Ack, u32>>) {
        let mut history = self.history.lock().expect("history");
        match self.host {
            Host::Target => history.arrived(arrival, result),
            _ => history.dead_letter(arrival, result),
        }
    }

    /// A message of a fast-ingest batch (ADR-50) with gap mode `fail`.
    fn batch(&mut self, reply: &str, arrival: Arrival<'_>) {
        let tokens: Vec<&str> = reply.rsplit('.').collect();
        let [_, operation, sequence, _, flow, id, ..] = tokens.as_slice() else { return };
        let (sequence, flow) = (sequence.parse::<u64>().expect("a sequence"), flow.parse::<u64>().expect("a flow"));
        if *operation == "0" {
            // The server may choose a smaller distance than the one asked for.
            let flow = if self.world.once_in(4) { self.world.between(1, flow.max(1)) } else { flow };
            let batch = FastBatch { next: 1, flow, stream: String::new(), last_seq: 0, used: Instant::now() };
            self.batches.insert((*id).to_owned(), batch);
            self.answer(reply, &json!({"type": "ack", "seq": 0, "msgs": flow}));
        }
        let Some(batch) = self.batches.get_mut(*id) else {
            let error = Refusal::new(10208, "batch publish ID unknown");
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
        match self.store(arrival) {
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

    fn api(&mut self, call: &str, reply: &str, payload: &[u8]) {
        let words: Vec<&str> = call.split('.').collect();
        let body: Value = serde_json::from_slice(payload).unwrap_or_default();
        let not_found = json!({"error": {"code": 404, "err_code": 10059, "description": "stream not found"}});
        match words.as_slice() {
            ["STREAM", "INFO", stream] => {
                let mut info = self.streams.get(*stream).map_or(not_found, Stream::info);
                if let Some(ingest) =
                    self.ingest.as_ref().filter(|ingest| ingest.stream == *stream && !ingest.is_mirror)
                {
                    info["sources"] = ingest.progress();
                }
                if self.nodes > 1 {
                    let others = (0..self.nodes).filter(|node| *node != self.leader);
                    let replicas: Vec<Value> = others.map(|node| json!({"name": self.node_name(node)})).collect();
                    let leader = self.node_name(self.leader);
                    info["config"]["num_replicas"] = self.nodes.into();
                    info["cluster"] = json!({"name": "C", "leader": leader, "replicas": replicas});
                }
                info["ts"] = rfc3339(self.world.now_ns(self.host)).into();
                self.answer(reply, &info);
            }
            ["STREAM", "CREATE", stream] => {
                let made = {
                    let config = Config { batched: body["allow_batched"] == true, ..Config::DEFAULT };
                    Stream::new(stream, config, self.world.now_ns(self.host))
                };
                let info = made.info();
                self.streams.entry((*stream).to_owned()).or_insert(made);
                self.answer(reply, &info);
            }
            ["STREAM", "LEADER", "STEPDOWN", _] => {
                self.move_leader();
                self.answer(reply, &json!({"success": true}));
            }
            ["STREAM", "MSG", "GET", stream] => {
                let found = self.streams.get(*stream).and_then(|stream| {
                    let wanted = body["seq"].as_u64()?;
                    let (seq, message) = stream.messages.range(wanted..).next()?;
                    (*seq == wanted || body["next_by_subj"] == ">").then_some((*seq, message))
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
            ["CONSUMER", "CREATE", stream, name, ..] => {
                if body["config"]["durable_name"].is_null() {
                    assert_eq!(body["action"], "create", "a copy creates consumers under names of its own");
                }
                self.create_consumer(stream, name, &body["config"], reply);
            }
            ["CONSUMER", "INFO", _, name] => {
                let info = self.consumer_info(name);
                self.answer(reply, &info);
            }
            ["CONSUMER", "RESET", _, name] => {
                self.reset_consumer(name, body["seq"].as_u64());
                let info = self.consumer_info(name);
                self.answer(reply, &info);
                self.deliver_durable(name);
            }
            ["CONSUMER", "DELETE", _, name] => {
                let answer = match self.delete_consumer(name) {
                    true => json!({"success": true}),
                    false => json!({"error": {"code": 404, "err_code": 10014, "description": "consumer not found"}}),
                };
                self.answer(reply, &answer);
            }
            ["CONSUMER", "MSG", "NEXT", _, name] => {
                let Some(consumer) = self.consumers.get_mut(*name) else {
                    return self.answer_raw(reply, b"NATS/1.0 503\r\n\r\n", b"");
                };
                let bytes = body["max_bytes"].as_u64().expect("max_bytes") as usize;
                let time = |field: &str| Duration::from_nanos(body[field].as_u64().unwrap_or_default());
                let heartbeat = time("idle_heartbeat");
                let now = Instant::now();
                consumer.active = now;
                consumer.pulls.push(Pull {
                    reply: reply.to_owned(),
                    left: bytes,
                    batch: body["batch"].as_u64().expect("a number"),
                    expires: now + time("expires"),
                    heartbeat,
                    next_heartbeat: now + heartbeat,
                });
                self.deliver(name);
            }
            _ => panic!("the simulation does not know `$JS.API.{call}`"),
        }
    }

    fn consumer_info(&self, name: &str) -> Value {
        let known = self.consumers.get(name).and_then(|of| Some((of, self.streams.get(&of.stream)?)));
        let reach = self.reach();
        let Some((consumer, stream)) = known else {
            return json!({"error": {"code": 404, "err_code": 10014, "description": "consumer not found"}});
        };
        let takes = |seq: u64, subject: &str| seq <= reach && consumer.takes(subject);
        let mut info = json!({
            "name": name,
            "config": consumer.config,
            "num_pending": stream.messages.range(consumer.next..).filter(|(seq, m)| takes(**seq, &m.subject)).count(),
            "delivered": {"consumer_seq": consumer.delivered, "stream_seq": consumer.last_stream_seq},
        });
        if let Some(acks) = &consumer.acks {
            acks.describe(&mut info);
        }
        info
    }

    fn create_consumer(&mut self, stream: &str, name: &str, config: &Value, reply: &str) {
        let Some(of) = self.streams.get(stream) else {
            let error = json!({"code": 404, "err_code": 10059, "description": "stream not found"});
            return self.answer(reply, &json!({"error": error}));
        };
        if let Some(existing) = self.consumers.get_mut(name) {
            if let Some(acks) = &mut existing.acks {
                acks.change(config);
                existing.config = config.clone();
                existing.filter = config["filter_subject"].as_str().map(str::to_owned);
                let info = self.consumer_info(name);
                return self.answer(reply, &info);
            }
            if existing.config != *config {
                let error = json!({"code": 400, "err_code": 10148, "description": "consumer already exists"});
                return self.answer(reply, &json!({"error": error}));
            }
            // The same request, sent once more.
            let info = self.consumer_info(name);
            return self.answer(reply, &info);
        }
        let next = match config["deliver_policy"].as_str() {
            Some("by_start_sequence") => config["opt_start_seq"].as_u64().expect("a sequence").max(of.first),
            Some("by_start_time") => {
                let time = config["opt_start_time"].as_str().expect("a time");
                let time = DateTime::parse_from_rfc3339(time).expect("a time").timestamp_nanos_opt().expect("a time");
                let found = of.messages.iter().find(|(_, message)| message.time_ns >= time);
                found.map_or(of.last + 1, |(seq, _)| *seq)
            }
            Some("all") => of.first,
            other => panic!("the simulation does not know the deliver policy {other:?}"),
        };
        let filter = config["filter_subject"].as_str().map(str::to_owned);
        let taken = |subject: &str| filter.as_ref().is_none_or(|filter| matches(filter, subject));
        let reach = self.reach();
        let there = of.messages.range(next..).filter(|(seq, message)| **seq <= reach && taken(&message.subject));
        let pending = there.count();
        let consumer = Consumer {
            filter,
            config: config.clone(),
            stream: stream.to_owned(),
            next,
            delivered: 0,
            last_stream_seq: next - 1,
            headers_only: config["headers_only"] == true,
            mute: false,
            pulls: Vec::new(),
            active: Instant::now(),
            acks: Acks::of(config, next - 1),
        };
        if consumer.is_durable() {
            self.consumers.insert(name.to_owned(), consumer);
            let info = self.consumer_info(name);
            self.answer(reply, &info);
            return self.deliver_durable(name);
        }
        self.consumers.insert(name.to_owned(), consumer);
        let at = json!({"consumer_seq": 0, "stream_seq": next - 1});
        self.answer(reply, &json!({"name": name, "num_pending": pending, "delivered": at, "ack_floor": at}));
    }

    /// The last sequence that consumers have.
    fn reach(&self) -> u64 {
        self.behind.filter(|(until, _)| *until > Instant::now()).map_or(u64::MAX, |(_, last)| last)
    }

    pub(super) fn deliver_all(&mut self) {
        let names: Vec<_> = self.consumers.keys().cloned().collect();
        names.iter().for_each(|name| self.deliver(name));
    }

    /// Delivers what there is to the pulls that wait, oldest first.
    fn deliver(&mut self, name: &str) {
        if self.consumers.get(name).is_some_and(Consumer::is_durable) {
            return self.deliver_durable(name);
        }
        let reach = self.reach();
        loop {
            let Some(consumer) = self.consumers.get_mut(name).filter(|consumer| !consumer.mute) else { return };
            let Some(stream) = self.streams.get(&consumer.stream) else { return };
            let Some(pull) = consumer.pulls.first_mut() else { return };
            let next = consumer.next.max(stream.first);
            let filter = consumer.filter.as_deref();
            let takes = |seq: u64, subject: &str| seq <= reach && filter.is_none_or(|filter| matches(filter, subject));
            let mut waiting = stream.messages.range(next..).filter(|(seq, m)| takes(**seq, &m.subject));
            let Some((seq, message)) = waiting.next() else { return };
            let seq = *seq;
            let pending = waiting.count();
            let delivered = consumer.delivered + 1;
            let ack = format!("$JS.ACK.{}.{name}.1.{seq}.{delivered}.{}.{pending}", consumer.stream, message.time_ns);
            let payload: &[u8] = if consumer.headers_only { b"" } else { &message.payload };
            let size = message.subject.len() + ack.len() + message.header.len() + payload.len();
            let reply = pull.reply.clone();
            if size > pull.left {
                let status = pull.ends("409 Message Size Exceeds MaxBytes");
                consumer.pulls.remove(0);
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

    /// Pulls that expire, heartbeats, batches and consumers that are not used.
    pub(super) fn tick(&mut self) {
        let now = Instant::now();
        if self.down || self.frozen.is_some_and(|until| until > now) {
            return;
        }
        self.batches.retain(|_, batch| now - batch.used < BATCH_IDLE);
        self.tick_ingest();
        let mut answers = Vec::new();
        for consumer in self.consumers.values_mut() {
            let (delivered, last) = (consumer.delivered, consumer.last_stream_seq);
            consumer.pulls.retain_mut(|pull| {
                if now >= pull.expires {
                    answers.push((pull.reply.clone(), pull.ends("408 Request Timeout")));
                    return false;
                }
                if now >= pull.next_heartbeat && !pull.heartbeat.is_zero() {
                    pull.next_heartbeat = now + pull.heartbeat;
                    answers.push((pull.reply.clone(), format!(
                        "NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: {delivered}\r\nNats-Last-Stream: {last}\r\n\r\n"
                    )));
                }
                true
            });
            if !consumer.pulls.is_empty() {
                consumer.active = now;
            }
        }
        self.consumers.retain(|_, consumer| !consumer.is_forgotten(now));
        for (reply, status) in answers {
            self.answer_raw(&reply, status.as_bytes(), b"");
        }
        self.tick_durable(now);
    }
}

pub(super) fn rfc3339(time_ns: i64) -> String {
    DateTime::from_timestamp_nanos(time_ns).to_rfc3339_opts(SecondsFormat::Nanos, true)
}
