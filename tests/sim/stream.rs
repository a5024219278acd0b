//! One stream as a server keeps it. Pure: time comes in, acks and refusals go out.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

/// As the stream tells it.
const DUPLICATE_WINDOW_NS: i64 = 120_000_000_000;

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
    pub fn json(&self) -> Value {
        json!({"code": 400, "err_code": self.err_code, "description": self.description})
    }
}

#[derive(Debug)]
pub struct Stream {
    pub name: String,
    pub created: String,
    pub batched: bool,
    pub messages: BTreeMap<u64, Stored>,
    pub first: u64,
    pub last: u64,
    /// Never forgotten: no run lasts as long as the duplicate window.
    ids: HashMap<String, u64>,
}

impl Stream {
    pub fn new(name: &str, batched: bool, now_ns: i64) -> Self {
        Self {
            name: name.to_owned(),
            created: chrono::DateTime::from_timestamp_nanos(now_ns).to_rfc3339(),
            batched,
            messages: BTreeMap::new(),
            first: 1,
            last: 0,
            ids: HashMap::new(),
        }
    }

    /// Subjects `<name in lower case>.>`.
    pub fn takes(&self, subject: &str) -> bool {
        subject.strip_prefix(&self.name.to_lowercase()).is_some_and(|rest| rest.starts_with('.'))
    }

    /// What the server checks before it stores, in its order.
    pub fn publish(&mut self, subject: &str, header: &[u8], payload: &[u8], now_ns: i64) -> Result<Ack, Refusal> {
        let refuse = |err_code, description: String| Err(Refusal { err_code, description });
        if value(header, "Nats-Expected-Stream").is_some_and(|expected| expected != self.name) {
            return refuse(10060, "expected stream does not match".into());
        }
        let id = value(header, "Nats-Msg-Id");
        if let Some(seq) = id.as_ref().and_then(|id| self.ids.get(id)) {
            return Ok(Ack { seq: *seq, duplicate: true });
        }
        let expected = value(header, "Nats-Expected-Last-Sequence").and_then(|text| text.parse::<u64>().ok());
        if expected.is_some_and(|expected| expected != self.last) {
            return refuse(10071, format!("wrong last sequence: {}", self.last));
        }
        self.last += 1;
        if let Some(id) = id {
            self.ids.insert(id, self.last);
        }
        let (header, payload) = (header.to_vec(), payload.to_vec());
        self.messages.insert(self.last, Stored { subject: subject.to_owned(), header, payload, time_ns: now_ns });
        Ok(Ack { seq: self.last, duplicate: false })
    }

    /// The end of the stream is lost, as after a power cut: the same sequences are given again.
    pub fn lose_end(&mut self, count: u64) {
        let keep = self.last.saturating_sub(count).max(self.first - 1);
        self.messages.split_off(&(keep + 1));
        self.last = keep;
        self.ids.retain(|_, seq| *seq <= keep);
    }

    /// Removes everything below a sequence.
    pub fn purge_below(&mut self, seq: u64) {
        self.first = seq.clamp(self.first, self.last + 1);
        self.messages = self.messages.split_off(&self.first);
    }

    pub fn info(&self) -> Value {
        json!({
            "config": {
                "name": self.name, "subjects": [format!("{}.>", self.name.to_lowercase())], "retention": "limits",
                "storage": "file", "num_replicas": 1, "duplicate_window": DUPLICATE_WINDOW_NS,
                "allow_batched": self.batched, "metadata": {"_nats.level": "4"},
            },
            "created": self.created,
            "state": {"messages": self.messages.len(), "first_seq": self.first, "last_seq": self.last},
        })
    }
}

/// The first value of a header, as the server looks it up.
pub fn value(header: &[u8], name: &str) -> Option<String> {
    let text = std::str::from_utf8(header).ok()?;
    let line = text.split("\r\n").find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}
