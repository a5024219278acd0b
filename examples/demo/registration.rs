//! Registration data as a Choria broker's adapter puts it into a stream: a JSON envelope whose `data` is the
//! inventory of a node, again as JSON, 1 to 16 KiB.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde::Serialize;
use serde_json::json;

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
        Self { inventories: (1..=nodes).map(inventory).collect(), next: 0 }
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

/// What a node tells about itself, uncompressed so that people can read it. Some nodes have many facts.
fn inventory(node: usize) -> String {
    let sender = sender(node);
    let started: DateTime<Utc> = Utc::now() - TimeDelta::hours(node as i64 % 900);
    let packages: serde_json::Map<_, _> = (0..node * 37 % 180)
        .map(|i| (format!("package_{i:03}"), json!(format!("{}.{}.{}-1+deb12u{}", i % 9, node % 20, i % 7, i % 4))))
        .collect();
    let agent = |name: &str, timeout: u32| {
        json!({"name": name, "version": "0.29.0", "author": "R.I.Pienaar <rip@devco.net>", "license": "Apache-2.0",
            "url": "https://choria.io", "description": format!("Choria agent {name}"), "timeout": timeout})
    };
    let content = json!({
        "agents": [agent("choria_util", 2), agent("rpcutil", 2), agent("scout", 5)],
        "classes": ["roles::base", "profiles::monitoring", "profiles::hardening"],
        "facts": {
            "networking": {"fqdn": sender, "ip": format!("10.{}.{}.{}", node / 65536, node / 256 % 256, node % 256)},
            "os": {"family": "Debian", "release": {"full": "12.5"}},
            "boot": started.to_rfc3339(),
            "packages": packages,
        },
        "status": {"identity": sender, "uptime": node * 61, "connected_server": "nats://broker.example.net:4222",
            "provisioning_mode": false, "certificate_expires": "0001-01-01T00:00:00Z"},
        "collectives": ["choria"],
        "build_info": {"version": "0.29.4", "sha": "b91f2ad"},
        "machines": [],
    });
    json!({"protocol": "choria:registration:inventorycontent:1", "content": content}).to_string()
}
