//! Registration data as a Choria broker's adapter puts it into a stream: a JSON envelope whose `data` is the
//! inventory of a node, again as JSON, 1 to 16 KiB.

use chrono::{SecondsFormat, Utc};
use serde::Serialize;

use crate::inventory::inventory;

/// One message for the stream.
pub(super) struct Message {
    pub(super) subject: String,
    pub(super) body: Vec<u8>,
}

/// The adapter's output; the order of the fields is that of the wire.
#[derive(Serialize)]
struct Output<'a> {
    protocol: &'static str,
    data: &'a str,
    sender: &'a str,
    time: String,
    requestid: String,
}

/// An endless series of registrations, node after node.
pub(super) struct Fleet {
    inventories: Vec<String>,
    next: usize,
}

impl Fleet {
    pub(super) fn new(nodes: usize) -> Self {
        Self { inventories: (1..=nodes).map(|node| inventory(node, &sender(node), 0)).collect(), next: 0 }
    }
}

impl Iterator for Fleet {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        let node = self.next % self.inventories.len();
        self.next += 1;
        let sender = sender(node + 1);
        let output = Output {
            protocol: "choria:adapters:choria_streams:output:1",
            data: &self.inventories[node],
            sender: &sender,
            time: Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true),
            requestid: uuid::Uuid::new_v4().simple().to_string(),
        };
        let body = serde_json::to_vec(&output).ok()?;
        Some(Message { subject: format!("choria.stream.input.registration.{sender}"), body })
    }
}

fn sender(node: usize) -> String {
    format!("n{node}.example.net")
}
