//! One stream as a server keeps it. Pure: time comes in, acks and refusals go out.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

/// A stored message.
#[derive(Debug, Clone)]
pub struct Stored {
    pub subject: String,
    pub header: Vec<u8>,
    pub payload: Vec<u8>,
    pub time_ns: i64,
}

/// A confirmed publish.
#[derive(Debug, Clone, Copy)]
pub struct Ack {
    pub seq: u64,
    pub duplicate: bool,
}

/// A refused one, with the codes of the server's error table.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub err_code: u32,
    pub description: String,
}

impl Refusal {
    pub fn new(err_code: u32, description: impl Into<String>) -> Self {
        Self { err_code, description: description.into() }
    }

    pub fn json(&self) -> Value {
        json!({"code": 400, "err_code": self.err_code, "description": self.description})
    }
}

/// What a stream is made with.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub batched: bool,
    /// How long message ids are remembered, by the wall clock.
    pub window_ns: i64,
    /// So many are kept of each subject, the newest.
    pub per_subject: Option<usize>,
    /// Larger payloads are refused.
    pub max_size: Option<usize>,
    /// Whether messages may carry a time to live.
    pub lives: bool,
    pub retention: Retention,
    /// API level of its leader.
    pub level: u32,
}

impl Config {
    /// Of a stream that is made by request.
    pub const DEFAULT: Self = Self {
        batched: false,
        window_ns: 120_000_000_000,
        per_subject: None,
        max_size: None,
        lives: false,
        retention: Retention::Limits,
        level: 4,
    };
}

/// What makes a stream forget a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    Limits,
    /// That it was acknowledged.
    WorkQueue,
    /// The same, and that nobody takes it.
    Interest,
}

#[derive(Debug)]
pub struct Stream {
    pub name: String,
    pub created: String,
    pub config: Config,
    /// Full with so many: more are refused.
    pub max_messages: Option<usize>,
    pub messages: BTreeMap<u64, Stored>,
    pub first: u64,
    pub last: u64,
    /// Up to here, what nobody takes was dropped.
    pub swept: u64,
    /// `mirror` or `sources` of the configuration.
    pub origin: Option<Value>,
    /// Sequence and time of the message that carried the id.
    ids: HashMap<String, (u64, i64)>,
}

/// What this target does not take, as servers of some version do not.
const REFUSED: [(&str, u32); 6] = [
    ("Nats-TTL", 10166),
    ("Nats-Rollup", 10111),
    ("Nats-Stream-Source", 10227),
    ("Nats-Batch-Id", 10188),
    ("Nats-Schedule-Next", 10212),
    ("Nats-Incr", 10168),
];

impl Stream {
    pub fn new(name: &str, config: Config, now_ns: i64) -> Self {
        Self {
            name: name.to_owned(),
            created: chrono::DateTime::from_timestamp_nanos(now_ns).to_rfc3339(),
            config,
            max_messages: None,
            messages: BTreeMap::new(),
            first: 1,
            last: 0,
            swept: 0,
            origin: None,
            ids: HashMap::new(),
        }
    }

    /// Subjects `<name in lower case>.>`.
    pub fn takes(&self, subject: &str) -> bool {
        subject.strip_prefix(&self.name.to_lowercase()).is_some_and(|rest| rest.starts_with('.'))
    }

    /// What the server checks before it stores, in its order.
    pub fn publish(&mut self, subject: &str, header: &[u8], payload: &[u8], now_ns: i64) -> Result<Ack, Refusal> {
        let refuse = |err_code, description: &str| Err(Refusal::new(err_code, description));
        let refused = |name: &str| value(header, name).is_some() && !(self.config.lives && name == "Nats-TTL");
        if let Some((name, code)) = REFUSED.iter().find(|(name, _)| refused(name)) {
            return refuse(*code, &format!("{name} is not taken"));
        }
        if value(header, "Nats-Expected-Stream").is_some_and(|expected| expected != self.name) {
            return refuse(10060, "expected stream does not match");
        }
        let id = value(header, "Nats-Msg-Id");
        if let Some(id) = &id
            && let Some((seq, time_ns)) = self.ids.get(id)
        {
            if now_ns - time_ns < self.config.window_ns {
                return Ok(Ack { seq: *seq, duplicate: true });
            }
            self.ids.remove(id);
        }
        let expected = value(header, "Nats-Expected-Last-Sequence").and_then(|text| text.parse::<u64>().ok());
        if expected.is_some_and(|expected| expected != self.last) {
            return refuse(10071, &format!("wrong last sequence: {}", self.last));
        }
        if self.config.max_size.is_some_and(|max| payload.len() > max) {
            return refuse(10054, "message size exceeds maximum allowed");
        }
        if self.max_messages.is_some_and(|max| self.messages.len() >= max) {
            return refuse(10077, "maximum messages exceeded");
        }
        if let Some(id) = id {
            self.ids.insert(id, (self.last + 1, now_ns));
        }
        Ok(Ack { seq: self.store(subject, header, payload, now_ns), duplicate: false })
    }

    /// Stores without a check.
    pub fn store(&mut self, subject: &str, header: &[u8], payload: &[u8], now_ns: i64) -> u64 {
        self.last += 1;
        let (header, payload) = (header.to_vec(), payload.to_vec());
        self.messages.insert(self.last, Stored { subject: subject.to_owned(), header, payload, time_ns: now_ns });
        if let Some(keep) = self.config.per_subject {
            let same: Vec<u64> =
                self.messages.iter().filter(|(_, kept)| kept.subject == subject).map(|(seq, _)| *seq).collect();
            for seq in &same[..same.len().saturating_sub(keep)] {
                self.messages.remove(seq);
            }
        }
        self.first = self.messages.keys().next().copied().unwrap_or(self.last + 1);
        self.last
    }

    /// The server started again: ids are found in what is stored, as far as they are younger than the window.
    pub fn restart(&mut self, now_ns: i64) {
        let window_ns = self.config.window_ns;
        let young = self.messages.iter().filter(|(_, message)| now_ns - message.time_ns < window_ns);
        let ids =
            young.filter_map(|(seq, message)| Some((value(&message.header, "Nats-Msg-Id")?, (*seq, message.time_ns))));
        self.ids = ids.collect();
    }

    /// The end of the stream is lost, as after a power cut: the same sequences are given again. Returns the last that
    /// is left.
    pub fn lose_end(&mut self, count: u64) -> u64 {
        // Of a stream that forgets what is acknowledged, the sequences of what is gone are lost too.
        let least = if self.config.retention == Retention::Limits { self.first - 1 } else { 0 };
        let keep = self.last.saturating_sub(count).max(least);
        self.messages.split_off(&(keep + 1));
        (self.last, self.swept) = (keep, self.swept.min(keep));
        self.first = self.messages.keys().next().copied().unwrap_or(keep + 1);
        keep
    }

    /// Removes one message.
    pub fn remove(&mut self, seq: u64) {
        self.messages.remove(&seq);
        self.first = self.messages.keys().next().copied().unwrap_or(self.last + 1);
    }

    /// Removes everything below a sequence.
    pub fn purge_below(&mut self, seq: u64) {
        self.messages = self.messages.split_off(&seq.min(self.last + 1));
        self.first = self.messages.keys().next().copied().unwrap_or(self.last + 1);
    }

    pub fn info(&self) -> Value {
        let retention = match self.config.retention {
            Retention::Limits => "limits",
            Retention::WorkQueue => "workqueue",
            Retention::Interest => "interest",
        };
        let mut info = json!({
            "config": {
                "name": self.name, "subjects": [format!("{}.>", self.name.to_lowercase())], "retention": retention,
                "storage": "file", "num_replicas": 1, "duplicate_window": self.config.window_ns,
                "allow_batched": self.config.batched, "allow_msg_ttl": self.config.lives, "metadata": {"_nats.level": self.config.level.to_string()},
                "max_msgs_per_subject": self.config.per_subject.map_or(-1, |keep| keep as i64),
            },
            "created": self.created,
            "state": {"messages": self.messages.len(), "first_seq": self.first, "last_seq": self.last},
        });
        // Of others, a copy has to meet the bound by itself.
        if let Some(max) = self.config.max_size.filter(|_| self.origin.is_some()) {
            info["config"]["max_msg_size"] = max.into();
        }
        for (field, value) in self.origin.iter().filter_map(Value::as_object).flatten() {
            info["config"][field] = value.clone();
        }
        info
    }
}

/// The first value of a header, as the server looks it up.
pub fn value(header: &[u8], name: &str) -> Option<String> {
    let text = std::str::from_utf8(header).ok()?;
    let line = text.split("\r\n").find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Whether a filter takes a subject.
pub fn matches(filter: &str, subject: &str) -> bool {
    let (mut filter, mut subject) = (filter.split('.'), subject.split('.'));
    loop {
        match (filter.next(), subject.next()) {
            (Some(">"), Some(_)) | (None, None) => return true,
            (Some(one), Some(other)) if one == "*" || one == other => {}
            _ => return false,
        }
    }
}
