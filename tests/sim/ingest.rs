//! What the target's own server does with a stream that is a mirror or has a source, where a feed is the origin: it asks for
//! a consumer below an API prefix, over leafnode connections, and stores what is delivered. As seen at real servers.

use serde_json::{Value, json};
use stream_replicator::native::FeedSubjects;
use tokio::time::{Duration, Instant};

use super::{
    server::State,
    stream::{Config, Stream, value},
};

/// At most one request in this time.
const THROTTLE: Duration = Duration::from_secs(2);
/// How long an answer is awaited.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// The same of the request that a durable consumer begins again.
const DURABLE_ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// A consumer that gives no sign of life for this time is given up; the wait after a failure is this, times their number.
const STALLED: Duration = Duration::from_secs(10);
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// How a target asks: that depends on its server's version and on its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// Until 2.13: it listens on a subject of its own, and asks again when a leaf connects.
    Old,
    /// From 2.14 on: it listens on the subject of the answer.
    New,
    /// From 2.15 on, for a durable consumer: that begins again, always on the same subject. After a request without an answer, a sign
    /// of life there has it ask again.
    Durable,
}

/// A request that is not answered.
#[derive(Debug)]
struct Asked {
    reply: String,
    /// The subject that was offered.
    own: String,
    since: Instant,
}

/// The consumer that it was given.
#[derive(Debug)]
struct Fed {
    name: String,
    subject: String,
    delivered: u64,
    heard: Instant,
}

/// The state of one mirror or source.
#[derive(Debug)]
pub struct Ingest {
    pub stream: String,
    pub is_mirror: bool,
    subjects: FeedSubjects,
    asks: Asks,
    /// It listens for a sign of life of a durable consumer.
    probes: bool,
    /// It has begun to lead the stream, and knows only then what that holds of a source.
    knows_at: Option<Instant>,
    /// Last sequence of the origin that a source has taken.
    taken: u64,
    /// The same of a mirror, refused ones included.
    passed: u64,
    asked: Option<Asked>,
    fed: Option<Fed>,
    last_request: Option<Instant>,
    due: Instant,
    failures: u32,
    requests: u64,
}

/// What the server does then.
#[derive(Debug, PartialEq, Eq)]
pub enum Out {
    /// It announces a subscription, or its end.
    Interest { subject: String, begins: bool },
    /// It sends this to the leafs.
    Message { subject: String, reply: String, header: Vec<u8>, payload: Vec<u8> },
}

impl Ingest {
    pub fn new(stream: &str, is_mirror: bool, subjects: FeedSubjects, asks: Asks) -> Self {
        Self {
            stream: stream.to_owned(),
            is_mirror,
            subjects,
            asks,
            probes: false,
            knows_at: None,
            taken: 0,
            passed: 0,
            asked: None,
            fed: None,
            last_request: None,
            due: Instant::now(),
            failures: 0,
            requests: 0,
        }
    }

    /// Its part of the configuration of the stream.
    pub fn config(&self) -> Value {
        let mut origin =
            json!({"name": "S", "external": {"api": self.subjects.api(), "deliver": self.subjects.deliver()}});
        if self.asks == Asks::Durable {
            origin["consumer"] = json!({"name": "SR", "deliver_subject": self.subjects.durable()});
        }
        if self.is_mirror { json!({ "mirror": origin }) } else { json!({ "sources": [origin] }) }
    }

    /// What it reports of a source in the state of its stream.
    pub fn progress(&self) -> Value {
        json!([{"name": "S", "external": {"api": self.subjects.api()}, "seq": self.taken}])
    }

    /// The process began again: where to continue is found in what is stored.
    pub fn restart(&mut self, stream: &Stream) {
        (self.asked, self.fed, self.last_request, self.failures, self.probes) = (None, None, None, 0, false);
        self.due = Instant::now() + Duration::from_millis(300);
        self.knows_at = None;
        self.taken = last_taken(stream);
    }

    /// Another server leads the stream. It asks once that is decided; of a source, it asks from the beginning if a leaf connects
    /// before it knows what the stream holds.
    fn leads_anew(&mut self, elected: Instant, knows_at: Instant) -> Vec<Out> {
        let probed = std::mem::take(&mut self.probes).then(|| self.subjects.durable());
        let listened = self.fed.take().map(|fed| fed.subject).or(probed);
        (self.asked, self.last_request, self.failures) = (None, None, 0);
        self.due = elected;
        if !self.is_mirror {
            (self.taken, self.knows_at, self.due) = (0, Some(knows_at), knows_at);
        }
        listened.into_iter().map(|subject| Out::Interest { subject, begins: false }).collect()
    }

    /// A leaf has connected: what it is to hear of.
    fn connected(&mut self, stream: &Stream) -> Vec<Out> {
        if self.knows_at.is_some() && self.asked.is_none() && self.fed.is_none() {
            return self.ask(stream);
        }
        if self.asks == Asks::Old && self.asked.take().is_some() {
            self.due = Instant::now();
        }
        let probed = self.probes.then(|| self.subjects.durable());
        let listens = self.fed.as_ref().map(|fed| fed.subject.clone()).or(probed);
        listens.into_iter().map(|subject| Out::Interest { subject, begins: true }).collect()
    }

    fn tick(&mut self, stream: &Stream) -> Vec<Out> {
        let now = Instant::now();
        let mut out = Vec::new();
        if self.knows_at.is_some_and(|at| now >= at) {
            (self.knows_at, self.asked) = (None, None);
            self.taken = self.taken.max(last_taken(stream));
            self.last_request = None;
            out.extend(self.give_up(now));
        }
        if self.fed.as_ref().is_some_and(|fed| now - fed.heard >= STALLED) {
            out.extend(self.give_up(now));
        }
        let is_durable = self.asks == Asks::Durable;
        let within = if is_durable { DURABLE_ANSWERS_WITHIN } else { ANSWERS_WITHIN };
        if self.asked.as_ref().is_some_and(|asked| now - asked.since >= within) {
            self.fails(now);
            if is_durable {
                self.probes = true;
                out.push(Out::Interest { subject: self.subjects.durable(), begins: true });
            }
        }
        if self.fed.is_none() && self.asked.is_none() && now >= self.due {
            out.extend(self.ask(stream));
        }
        out
    }

    fn fails(&mut self, now: Instant) {
        self.asked = None;
        self.failures += 1;
        self.due = now + (STALLED * self.failures).min(LONGEST_WAIT);
    }

    /// Ends the consumer; the next one is asked for as soon as that is allowed.
    fn give_up(&mut self, now: Instant) -> Option<Out> {
        self.due = self.last_request.map_or(now, |last| now.max(last + THROTTLE));
        self.fed.take().map(|fed| Out::Interest { subject: fed.subject, begins: false })
    }

    fn ask(&mut self, stream: &Stream) -> Vec<Out> {
        let now = Instant::now();
        if let Some(last) = self.last_request.filter(|last| now < *last + THROTTLE) {
            self.due = last + THROTTLE;
            return Vec::new();
        }
        self.last_request = Some(now);
        self.requests += 1;
        let last = if self.is_mirror { stream.last } else { self.taken };
        let (number, reply) = (self.requests, format!("$JSC.R.{}", self.requests));
        let (api, header) = (self.subjects.api(), Vec::new());
        if self.asks == Asks::Durable {
            let own = self.subjects.durable();
            let probed = std::mem::take(&mut self.probes);
            let probed = probed.then(|| Out::Interest { subject: own.clone(), begins: false });
            self.asked = Some(Asked { reply: reply.clone(), own, since: now });
            let (subject, payload) = (format!("{api}.CONSUMER.RESET.S.SR"), Vec::new());
            return probed.into_iter().chain([Out::Message { subject, reply, header, payload }]).collect();
        }
        let own = format!("{}.M.{number}", self.subjects.deliver());
        let mut config = json!({"name": format!("JS_{number}"), "deliver_subject": own, "deliver_policy": "all",
            "ack_policy": "none", "flow_control": true, "idle_heartbeat": 1_000_000_000, "direct": true});
        if last > 0 {
            (config["deliver_policy"], config["opt_start_seq"]) = ("by_start_sequence".into(), (last + 1).into());
        }
        if self.asks == Asks::New {
            config["sourcing"] = true.into();
        }
        let payload = json!({"stream_name": "S", "config": config, "action": ""}).to_string().into_bytes();
        self.asked = Some(Asked { reply: reply.clone(), own, since: now });
        vec![Out::Message { subject: format!("{api}.CONSUMER.CREATE.S"), reply, header, payload }]
    }

    /// A leaf sends something.
    fn hears(&mut self, subject: &str, reply: &str, header: &[u8], payload: &[u8], stream: &mut Stream) -> Vec<Out> {
        if self.asked.as_ref().is_some_and(|asked| asked.reply == subject) {
            return self.answered(payload, stream);
        }
        if self.probes && self.failures > 0 && self.subjects.durable() == subject {
            let now = Instant::now();
            (self.failures, self.due) = (0, self.last_request.map_or(now, |last| now.max(last + THROTTLE)));
        }
        if self.fed.as_ref().is_none_or(|fed| fed.subject != subject) {
            return Vec::new();
        }
        let is_control = payload.is_empty() && header.starts_with(b"NATS/1.0 100");
        if is_control { self.control(reply, header) } else { self.data(reply, header, payload, stream) }
    }

    fn answered(&mut self, payload: &[u8], stream: &mut Stream) -> Vec<Out> {
        let now = Instant::now();
        let Some(asked) = self.asked.take() else { return Vec::new() };
        let answer: Value = serde_json::from_slice(payload).unwrap_or_default();
        let (name, config) = (answer["name"].as_str(), &answer["config"]);
        let (Some(name), true) = (name, answer["error"].is_null()) else {
            self.fails(now);
            return Vec::new();
        };
        if self.asks == Asks::Durable && config["ack_policy"] != "flow_control" {
            self.fails(now);
            return Vec::new();
        }
        self.failures = 0;
        // A command: a mirror is there at once.
        let before = answer["delivered"]["stream_seq"].as_u64().expect("a sequence");
        if self.is_mirror && before > stream.last {
            stream.last = before;
            if stream.messages.is_empty() {
                stream.first = before + 1;
            }
        }
        self.passed = stream.last;
        let given = config["deliver_subject"].as_str().expect("a subject").to_owned();
        let subject = if self.asks == Asks::New { given } else { asked.own };
        let fed = Fed { name: name.to_owned(), subject: subject.clone(), delivered: 0, heard: now };
        self.fed = Some(fed);
        vec![Out::Interest { subject, begins: true }]
    }

    /// From whomever it comes: it names no consumer.
    fn control(&mut self, reply: &str, header: &[u8]) -> Vec<Out> {
        let now = Instant::now();
        let Some(fed) = &mut self.fed else { return Vec::new() };
        fed.heard = now;
        if !reply.is_empty() {
            // From 2.14 on with what it has taken.
            let taken = if self.is_mirror { self.passed } else { self.taken };
            let says =
                format!("NATS/1.0\r\nNats-Last-Consumer: {}\r\nNats-Last-Stream: {taken}\r\n\r\n", fed.delivered);
            let header = if self.asks == Asks::Old { Vec::new() } else { says.into_bytes() };
            let (subject, reply, payload) = (reply.to_owned(), String::new(), Vec::new());
            return vec![Out::Message { subject, reply, header, payload }];
        }
        let last = value(header, "Nats-Last-Consumer").and_then(|last| last.parse::<u64>().ok()).unwrap_or_default();
        if last > 0 && last != fed.delivered { self.give_up(now).into_iter().collect() } else { Vec::new() }
    }

    fn data(&mut self, reply: &str, header: &[u8], payload: &[u8], stream: &mut Stream) -> Vec<Out> {
        let now = Instant::now();
        let Some(fed) = &mut self.fed else { return Vec::new() };
        let (ack, subject) = reply.split_once('@').expect("a subject behind `@`");
        let tokens: Vec<&str> = ack.split('.').collect();
        let ["$JS", "ACK", "S", consumer, "1", seq, delivered, time_ns, _] = tokens[..] else {
            panic!("no server takes `{ack}` for a delivery")
        };
        if consumer != fed.name {
            return Vec::new();
        }
        fed.heard = now;
        let number = |text: &str| text.parse::<u64>().expect("a number");
        let (seq, delivered) = (number(seq), number(delivered));
        if delivered <= fed.delivered {
            return Vec::new();
        }
        if delivered > fed.delivered + 1 {
            return self.give_up(now).into_iter().collect();
        }
        fed.delivered = delivered;
        let last = if self.is_mirror { self.passed } else { self.taken };
        if seq <= last {
            return Vec::new();
        }
        let time_ns: i64 = time_ns.parse().expect("a time");
        if self.is_mirror {
            let before = std::mem::replace(&mut self.passed, seq);
            // It notices a message that it refused by the next one.
            if before != stream.last {
                return self.give_up(now).into_iter().collect();
            }
            if !is_refused(stream, header, payload) {
                stream.last = seq - 1;
                stream.store(subject, header, payload, time_ns);
            }
        } else {
            let header = sourced(header, seq);
            // It asks again for what it refused.
            if is_refused(stream, &header, payload) {
                return self.give_up(now).into_iter().collect();
            }
            self.taken = seq;
            stream.store(subject, &header, payload, time_ns);
        }
        Vec::new()
    }
}

/// The header with which a source stores a message.
pub fn sourced(header: &[u8], seq: u64) -> Vec<u8> {
    let lines = std::str::from_utf8(header).expect("text").strip_suffix("\r\n").unwrap_or("NATS/1.0\r\n");
    format!("{lines}Nats-Stream-Source: S:1 {seq} > >\r\n\r\n").into_bytes()
}

/// Whether a stream that is a mirror or has a source never stores a message.
pub fn is_unstorable(config: &Config, header: &[u8], payload: &[u8]) -> bool {
    value(header, "Nats-Rollup").is_some() || config.max_size.is_some_and(|max| header.len() + payload.len() > max)
}

/// Whether it does not store it now.
fn is_refused(stream: &Stream, header: &[u8], payload: &[u8]) -> bool {
    let is_full = stream.max_messages.is_some_and(|max| stream.messages.len() >= max);
    is_full || is_unstorable(&stream.config, header, payload)
}

/// The last sequence of its origin that a stream with a source holds.
fn last_taken(stream: &Stream) -> u64 {
    stream.messages.values().filter_map(|message| origin_of(&message.header)).max().unwrap_or_default()
}

/// The sequence at its origin that a message of a source has.
pub fn origin_of(header: &[u8]) -> Option<u64> {
    value(header, "Nats-Stream-Source")?.split(' ').nth(1)?.parse().ok()
}

impl State {
    fn ingests(&mut self, work: impl FnOnce(&mut Ingest, &mut Stream) -> Vec<Out>) -> Vec<Out> {
        let Some(ingest) = &mut self.ingest else { return Vec::new() };
        let Some(stream) = self.streams.get_mut(&ingest.stream) else { return Vec::new() };
        work(ingest, stream)
    }

    /// A leaf has logged in.
    pub(super) fn leaf_connected(&mut self, id: u64) {
        let (name, node) = (self.leaf_name(id), self.node_of(id));
        let same = |other: u64, of: &str| other != id && of == name && self.node_of(other) == node;
        let olds: Vec<u64> = self.leafs().filter(|(other, of)| same(*other, of)).map(|(other, _)| other).collect();
        for old in olds {
            self.evict(old, b"-ERR 'Duplicate Remote LeafNode Connection'\r\n");
        }
        for out in self.ingests(|ingest, stream| ingest.connected(stream)) {
            let only = matches!(out, Out::Interest { .. }).then_some(id);
            self.leaf_out(only, &out);
        }
    }

    /// A leaf sends a message.
    pub(super) fn leaf_sends(&mut self, subject: &str, reply: &str, header: &[u8], payload: &[u8]) {
        for _ in 0..self.times() {
            let out = self.ingests(|ingest, stream| ingest.hears(subject, reply, header, payload, stream));
            out.iter().for_each(|out| self.leaf_out(None, out));
        }
    }

    pub(super) fn tick_ingest(&mut self) {
        let out = self.ingests(|ingest, stream| ingest.tick(stream));
        out.iter().for_each(|out| self.leaf_out(None, out));
    }

    /// Another server leads its stream.
    pub(super) fn leads_anew(&mut self, elected: Instant, knows_at: Instant) {
        let out = self.ingests(|ingest, _| ingest.leads_anew(elected, knows_at));
        out.iter().for_each(|out| self.leaf_out(None, out));
    }

    pub(super) fn restart_ingest(&mut self) {
        self.ingests(|ingest, stream| {
            ingest.restart(stream);
            Vec::new()
        });
    }

    /// Sends to one leaf, or to all that subscribed.
    fn leaf_out(&mut self, only: Option<u64>, out: &Out) {
        let (frame, subject) = match out {
            Out::Interest { subject, begins } => {
                let sign = if *begins { '+' } else { '-' };
                (format!("LS{sign} {subject}\r\n").into_bytes(), None)
            }
            Out::Message { subject, reply, header, payload } => {
                let reply = if reply.is_empty() { String::new() } else { format!(" {reply}") };
                let (before, total) = (header.len(), header.len() + payload.len());
                let mut frame = match before {
                    0 => format!("LMSG {subject}{reply} {total}\r\n"),
                    _ => format!("HMSG {subject}{reply} {before} {total}\r\n"),
                }
                .into_bytes();
                frame.extend_from_slice(header);
                frame.extend_from_slice(payload);
                frame.extend_from_slice(b"\r\n");
                (frame, Some(subject.as_str()))
            }
        };
        let times = if subject.is_some() { self.times() } else { 1 };
        for _ in 0..times {
            self.send_to_leafs(only, subject, &frame);
        }
    }
}
