//! Durable consumers of streams that forget what is acknowledged: pulled with explicit acks, or pushed with acks by flow
//! control. What is acknowledged leaves the stream, and is judged in that moment.

use std::{
    collections::{BTreeMap, VecDeque},
    str,
};

use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::{
    jetstream::{Consumer, rfc3339},
    server::State,
    stream::{self, Retention, Stream},
};

/// A server lets half of this be unacknowledged before it asks for acks, and all of it before it waits for them. Real
/// windows are larger, as are real messages.
const WINDOW: usize = 16 * 1024;

/// What a durable consumer knows of its deliveries.
pub struct Acks {
    /// Delivered and not acknowledged: by stream sequence, the number of the delivery and when it was.
    pending: BTreeMap<u64, (u64, Instant)>,
    /// When the last delivery was, while the server runs.
    active_ns: Option<i64>,
    /// Everything up to here is acknowledged: delivery and stream sequence.
    floor: (u64, u64),
    /// Sequences to deliver again, before any other.
    again: VecDeque<u64>,
    most: usize,
    /// How long a delivery waits for its ack; zero for as long as it takes.
    wait: Duration,
    push: Option<Push>,
}

/// A consumer that pushes.
struct Push {
    subject: String,
    /// Subject of the request for acks that is open.
    asked: Option<String>,
    requests: u64,
    /// Bytes since the last ack.
    out: usize,
    heartbeat: Duration,
    next_heartbeat: Instant,
}

impl Acks {
    /// Of a consumer with this configuration; `None` if it takes no acks.
    pub(super) fn of(config: &Value, before: u64) -> Option<Self> {
        let nanos = |field: &str| Duration::from_nanos(config[field].as_u64().unwrap_or_default());
        config["durable_name"].as_str()?;
        let push = config["deliver_subject"].as_str().map(|subject| Push {
            subject: subject.to_owned(),
            asked: None,
            requests: 0,
            out: 0,
            heartbeat: nanos("idle_heartbeat"),
            next_heartbeat: Instant::now() + nanos("idle_heartbeat"),
        });
        assert_eq!(config["ack_policy"], if push.is_some() { "flow_control" } else { "explicit" });
        Some(Self {
            pending: BTreeMap::new(),
            active_ns: None,
            floor: (0, before),
            again: VecDeque::new(),
            most: config["max_ack_pending"].as_u64().expect("max_ack_pending") as usize,
            wait: nanos("ack_wait"),
            push,
        })
    }

    /// The configuration has changed.
    pub(super) fn change(&mut self, config: &Value) {
        self.most = config["max_ack_pending"].as_u64().expect("max_ack_pending") as usize;
        if let (Some(push), Some(subject)) = (&mut self.push, config["deliver_subject"].as_str()) {
            subject.clone_into(&mut push.subject);
        }
    }

    pub(super) fn describe(&self, info: &mut Value) {
        // Before the first ack, a consumer with explicit acks reports nothing of where it began (2.12.8).
        let unused = self.push.is_none() && self.floor.0 == 0;
        let stream_seq = if unused { 0 } else { self.floor.1 };
        info["ack_floor"] = json!({"consumer_seq": self.floor.0, "stream_seq": stream_seq});
        info["num_ack_pending"] = self.pending.len().into();
        if let Some(active_ns) = self.active_ns {
            info["delivered"]["last_active"] = rfc3339(active_ns).into();
        }
    }

    /// One delivery is acknowledged; whether that is news.
    fn one(&mut self, seq: u64, (delivered, last): (u64, u64)) -> bool {
        if self.pending.remove(&seq).is_none() {
            return false;
        }
        self.floor = match self.pending.first_key_value() {
            Some((first, (delivery, _))) => (delivery - 1, first - 1),
            None => (delivered, last),
        };
        true
    }
}

impl Consumer {
    pub(super) fn is_durable(&self) -> bool {
        self.acks.is_some()
    }

    /// Whether a message waits for it.
    fn wants(&self, seq: u64, subject: &str) -> bool {
        let pending = self.acks.as_ref().is_some_and(|acks| acks.pending.contains_key(&seq));
        self.is_durable() && self.takes(subject) && (seq >= self.next || pending)
    }

    /// The server was killed: what it knows by heart is forgotten, and what is on disk is not.
    pub(super) fn restart(&mut self) {
        self.pulls.clear();
        if let Some(acks) = &mut self.acks {
            acks.active_ns = None;
            if let Some(push) = &mut acks.push {
                push.asked = None;
            }
        }
    }
}

impl State {
    /// Whether anybody listens on a subject.
    fn is_heard(&self, subject: &str) -> bool {
        self.patterns().any(|pattern| subject.starts_with(pattern.trim_end_matches(['*', '>'])))
    }

    /// Delivers what there is, until the consumer waits for acks or for pulls.
    pub(super) fn deliver_durable(&mut self, name: &str) {
        loop {
            let Some(consumer) = self.consumers.get(name) else { return };
            let Some(acks) = &consumer.acks else { return };
            let to = match &acks.push {
                Some(push) => push.subject.clone(),
                None => match consumer.pulls.first() {
                    Some(pull) => pull.reply.clone(),
                    None => return,
                },
            };
            let pulled = acks.push.is_none();
            if !self.is_heard(&to) {
                if pulled && let Some(consumer) = self.consumers.get_mut(name) {
                    consumer.pulls.remove(0);
                    continue;
                }
                return;
            }
            if !(if pulled { self.serve_pull(name) } else { self.push_next(name) }) {
                return;
            }
        }
    }

    /// What a consumer delivers next, and whether that is a delivery again; `None` while it waits for acks.
    fn next_of(consumer: &mut Consumer, stream: &Stream) -> Option<(u64, bool)> {
        let acks = consumer.acks.as_mut()?;
        while let Some(seq) = acks.again.front() {
            if acks.pending.contains_key(seq) && stream.messages.contains_key(seq) {
                return Some((*seq, true));
            }
            acks.again.pop_front();
        }
        if acks.pending.len() >= acks.most {
            return None;
        }
        let next = consumer.next.max(stream.first);
        let filter = consumer.filter.as_deref();
        let takes = |subject: &str| filter.is_none_or(|filter| stream::matches(filter, subject));
        stream.messages.range(next..).find(|(_, message)| takes(&message.subject)).map(|(seq, _)| (*seq, false))
    }

    /// Serves the first pull; whether there may be more to do.
    fn serve_pull(&mut self, name: &str) -> bool {
        let now_ns = self.world.now_ns(self.host);
        let Some(consumer) = self.consumers.get_mut(name) else { return false };
        let Some(stream) = self.streams.get(&consumer.stream) else { return false };
        let Some((seq, again)) = Self::next_of(consumer, stream) else { return false };
        let frame = consumer.frame(stream, seq);
        let pull = &mut consumer.pulls[0];
        let reply = pull.reply.clone();
        if frame.size() > pull.left {
            let status = pull.ends("409 Message Size Exceeds MaxBytes");
            consumer.pulls.remove(0);
            self.answer_raw(&reply, status.as_bytes(), b"");
            return true;
        }
        pull.left -= frame.size();
        pull.batch -= 1;
        pull.next_heartbeat = Instant::now() + pull.heartbeat;
        let done = (pull.batch == 0 && pull.left > 0).then(|| pull.ends("409 Batch Completed"));
        if pull.left == 0 || done.is_some() {
            consumer.pulls.remove(0);
        }
        consumer.delivers(seq, again, now_ns);
        self.route(&reply, &frame.subject, &frame.ack, &frame.header, &frame.payload);
        if let Some(done) = done {
            self.answer_raw(&reply, done.as_bytes(), b"");
        }
        true
    }

    /// Pushes one message; whether there may be more to do.
    fn push_next(&mut self, name: &str) -> bool {
        let now_ns = self.world.now_ns(self.host);
        let Some(consumer) = self.consumers.get_mut(name) else { return false };
        let Some(stream) = self.streams.get(&consumer.stream) else { return false };
        let next = Self::next_of(consumer, stream);
        let (acks, waits) = (consumer.acks.as_ref(), next.is_none());
        let Some((pending, most, push)) = acks.and_then(|a| Some((a.pending.len(), a.most, a.push.as_ref()?))) else {
            return false;
        };
        if push.out > WINDOW || waits {
            if push.out > WINDOW || pending >= most {
                self.ask_for_acks(name);
            }
            return false;
        }
        let Some((seq, again)) = next else { return false };
        let (frame, to) = (consumer.frame(stream, seq), push.subject.clone());
        consumer.delivers(seq, again, now_ns);
        let mut full = false;
        if let Some(push) = consumer.acks.as_mut().and_then(|acks| acks.push.as_mut()) {
            push.out += frame.size();
            push.next_heartbeat = Instant::now() + push.heartbeat;
            full = push.out > WINDOW / 2;
        }
        self.route(&to, &frame.subject, &frame.ack, &frame.header, &frame.payload);
        if full {
            self.ask_for_acks(name);
        }
        true
    }

    /// Asks the one who is pushed to how far it is, unless that is asked already.
    fn ask_for_acks(&mut self, name: &str) {
        let Some(consumer) = self.consumers.get_mut(name) else { return };
        let Some(push) = consumer.acks.as_mut().and_then(|acks| acks.push.as_mut()) else { return };
        if push.asked.is_some() {
            return;
        }
        push.requests += 1;
        let asks = format!("$JS.FC.{}.{name}.{}", consumer.stream, push.requests);
        push.asked = Some(asks.clone());
        let to = push.subject.clone();
        self.route(&to, &to, &asks, b"NATS/1.0 100 FlowControl Request\r\n\r\n", b"");
    }

    /// An answer to a request for acks.
    pub(super) fn flow_control(&mut self, subject: &str, header: &[u8]) {
        let Some(name) = subject.split('.').nth(3) else { return };
        let Some(consumer) = self.consumers.get_mut(name) else { return };
        let filter = consumer.filter.clone();
        let Some(acks) = &mut consumer.acks else { return };
        let Some(push) = acks.push.as_mut().filter(|push| push.asked.as_deref() == Some(subject)) else { return };
        (push.asked, push.out) = (None, 0);
        let number = |name: &str| stream::value(header, name).and_then(|text| text.parse::<u64>().ok());
        if let (Some(delivery), Some(seq)) = (number("Nats-Last-Consumer"), number("Nats-Last-Stream"))
            && seq > acks.floor.1
        {
            assert!(delivery <= consumer.delivered && seq <= consumer.last_stream_seq, "an ack of what never came");
            let of = consumer.stream.clone();
            let from = std::mem::replace(&mut acks.floor, (delivery, seq)).1 + 1;
            acks.pending = acks.pending.split_off(&(seq + 1));
            // Also what was passed over: the server takes it for delivered.
            let takes = |subject: &str| filter.as_ref().is_none_or(|filter| stream::matches(filter, subject));
            let gone = self.streams.get(&of).into_iter().flat_map(|of| of.messages.range(from..=seq));
            let gone: Vec<u64> = gone.filter(|(_, m)| takes(&m.subject)).map(|(seq, _)| *seq).collect();
            self.acknowledged(&of, &gone);
        }
        self.deliver_durable(name);
    }

    /// An explicit ack, or the request to deliver a message again.
    pub(super) fn ack(&mut self, subject: &str, reply: &str, payload: &[u8]) {
        let words: Vec<&str> = subject.split('.').collect();
        let [_, _, _, name, _, seq, delivery, ..] = words.as_slice() else { return };
        let (seq, delivery) = (seq.parse::<u64>().expect("a sequence"), delivery.parse::<u64>().expect("a sequence"));
        let Some(consumer) = self.consumers.get_mut(*name) else { return };
        let (delivered, last) = (consumer.delivered, consumer.last_stream_seq);
        let of = consumer.stream.clone();
        let Some(acks) = &mut consumer.acks else { return };
        if payload.starts_with(b"-NAK ") {
            // For longer than a run here takes: it is not delivered again.
            acks.again.retain(|waiting| *waiting != seq);
        } else if payload.starts_with(b"-NAK") {
            let known = delivery > acks.floor.0 && delivery <= delivered && acks.pending.contains_key(&seq);
            if known && !acks.again.contains(&seq) {
                acks.again.push_back(seq);
            }
        } else if acks.one(seq, (delivered, last)) {
            self.acknowledged(&of, &[seq]);
        }
        self.answer_raw(reply, b"", b"");
        self.deliver_durable(name);
    }

    /// What was acknowledged leaves its stream.
    fn acknowledged(&mut self, of: &str, gone: &[u64]) {
        let Some(stream) = self.streams.get_mut(of) else { return };
        // Others may have removed it before.
        let gone: Vec<u64> = gone.iter().copied().filter(|seq| stream.messages.contains_key(seq)).collect();
        gone.iter().for_each(|seq| stream.remove(*seq));
        self.history.lock().expect("history").acknowledged(&gone);
    }

    /// What was purged waits for no ack.
    pub(super) fn drop_purged(&mut self, of: &str) {
        let Some(stream) = self.streams.get(of) else { return };
        for consumer in self.consumers.values_mut().filter(|consumer| consumer.stream == of) {
            let Some(acks) = &mut consumer.acks else { continue };
            let before = acks.pending.len();
            // What was lost with the end of the stream may be there again.
            acks.pending.retain(|seq, _| *seq > stream.last || stream.messages.contains_key(seq));
            if acks.pending.len() < before {
                acks.floor = match acks.pending.first_key_value() {
                    Some((first, (delivery, _))) => (delivery - 1, first - 1),
                    None => (consumer.delivered, consumer.last_stream_seq),
                };
            }
        }
    }

    /// The stream lost what was after a sequence. From 2.14 on, its consumers follow; before, they stay ahead of it.
    pub(super) fn lost_end(&mut self, of: &str, last: u64) {
        let follows = self.streams.get(of).is_some_and(|stream| stream.config.level >= 4);
        let ahead = self.consumers.values_mut().filter(|consumer| consumer.stream == of && consumer.next > last + 1);
        for consumer in ahead.filter(|_| follows) {
            let Some(acks) = &mut consumer.acks else { continue };
            (consumer.next, consumer.last_stream_seq) = (last + 1, last);
            acks.pending.retain(|seq, _| *seq <= last);
            if acks.pending.is_empty() {
                acks.floor = (consumer.delivered, last);
            }
        }
    }

    /// A consumer is deleted. What only it wanted leaves a stream of interest.
    pub(super) fn delete_consumer(&mut self, name: &str) -> bool {
        let Some(gone) = self.consumers.remove(name) else { return false };
        let Some(stream) = self.streams.get(&gone.stream) else { return true };
        if gone.is_durable() && stream.config.retention == Retention::Interest {
            let of = gone.stream.clone();
            let others: Vec<_> = self.consumers.values().filter(|other| other.stream == of).collect();
            let wanted = |seq: u64, subject: &str| others.iter().any(|other| other.wants(seq, subject));
            let alone = stream.messages.iter().filter(|(seq, message)| !wanted(**seq, &message.subject));
            let alone: Vec<u64> = alone.map(|(seq, _)| *seq).collect();
            self.acknowledged(&of, &alone);
        }
        true
    }

    /// Streams of interest do not keep what no consumer takes.
    pub(super) fn drop_uninteresting(&mut self) {
        for stream in self.streams.values_mut().filter(|stream| stream.config.retention == Retention::Interest) {
            let consumers = self.consumers.values().filter(|consumer| consumer.stream == stream.name);
            let consumers: Vec<_> = consumers.filter(|consumer| consumer.is_durable()).collect();
            let from = std::mem::replace(&mut stream.swept, stream.last) + 1;
            let kept = |subject: &str| consumers.iter().any(|consumer| consumer.takes(subject));
            let gone = stream.messages.range(from..).filter(|(_, message)| !kept(&message.subject));
            let gone: Vec<u64> = gone.map(|(seq, _)| *seq).collect();
            gone.iter().for_each(|seq| stream.remove(*seq));
            self.history.lock().expect("history").uninteresting(&gone);
        }
    }

    /// Lets a consumer begin again.
    pub(super) fn reset_consumer(&mut self, name: &str, from: Option<u64>) {
        let Some(consumer) = self.consumers.get_mut(name) else { return };
        let Some(acks) = &mut consumer.acks else { return };
        let next = from.unwrap_or(acks.floor.1 + 1);
        acks.pending.clear();
        acks.again.clear();
        acks.floor = (0, next - 1);
        if let Some(push) = &mut acks.push {
            (push.asked, push.out) = (None, 0);
        }
        (consumer.next, consumer.delivered, consumer.last_stream_seq) = (next, 0, next - 1);
    }

    /// Heartbeats of what is pushed, and deliveries that wait too long for their acks.
    pub(super) fn tick_durable(&mut self, now: Instant) {
        let (mut beats, mut late) = (Vec::new(), Vec::new());
        for (name, consumer) in &mut self.consumers {
            let Some(acks) = &mut consumer.acks else { continue };
            if !acks.wait.is_zero() {
                let overdue = acks.pending.iter().filter(|(_, (_, at))| now - *at > acks.wait).map(|(seq, _)| *seq);
                let overdue: Vec<u64> = overdue.filter(|seq| !acks.again.contains(seq)).collect();
                if !overdue.is_empty() {
                    acks.again.extend(overdue);
                    late.push(name.clone());
                }
            }
            if let Some(push) = acks.push.as_mut().filter(|push| now >= push.next_heartbeat) {
                push.next_heartbeat = now + push.heartbeat;
                let stalled =
                    push.asked.as_ref().map_or(String::new(), |on| format!("Nats-Consumer-Stalled: {on}\r\n"));
                let (delivered, last) = (consumer.delivered, consumer.last_stream_seq);
                let beat = format!(
                    "NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: {delivered}\r\nNats-Last-Stream: {last}\r\n{stalled}\r\n"
                );
                let asks = !acks.pending.is_empty() && push.asked.is_none();
                beats.push((name.clone(), push.subject.clone(), beat, asks));
            }
        }
        for (name, subject, beat, asks) in beats {
            if self.is_heard(&subject) {
                self.answer_raw(&subject, beat.as_bytes(), b"");
                if asks {
                    self.ask_for_acks(&name);
                }
            }
            self.deliver_durable(&name);
        }
        late.iter().for_each(|name| self.deliver_durable(name));
    }
}

/// A message on its way to who reads it.
struct Frame {
    subject: String,
    ack: String,
    header: Vec<u8>,
    payload: Vec<u8>,
}

impl Frame {
    fn size(&self) -> usize {
        self.subject.len() + self.ack.len() + self.header.len() + self.payload.len()
    }
}

impl Consumer {
    fn frame(&self, stream: &Stream, seq: u64) -> Frame {
        let message = &stream.messages[&seq];
        let name = self.name();
        let delivered = self.delivered + 1;
        let after = self.next.max(seq + 1);
        let pending = stream.messages.range(after..).filter(|(_, message)| self.takes(&message.subject)).count();
        let ack = format!("$JS.ACK.{}.{name}.1.{seq}.{delivered}.{}.{pending}", self.stream, message.time_ns);
        let (subject, header, payload) = (message.subject.clone(), message.header.clone(), message.payload.clone());
        Frame { subject, ack, header, payload }
    }

    fn delivers(&mut self, seq: u64, again: bool, now_ns: i64) {
        self.delivered += 1;
        let delivery = (self.delivered, Instant::now());
        if let Some(acks) = &mut self.acks {
            if again {
                acks.again.pop_front();
            }
            acks.pending.insert(seq, delivery);
            acks.active_ns = Some(now_ns);
        }
        if !again {
            (self.next, self.last_stream_seq) = (seq + 1, seq);
        }
    }
}
