//! What a node says about itself, uncompressed so that people can read it.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;

/// The inventory of a node, 1 to 16 KiB: some nodes have many facts. `installed` are packages that it has got since.
pub(crate) fn inventory(node: usize, identity: &str, installed: usize) -> String {
    let started: DateTime<Utc> = Utc::now() - TimeDelta::hours(node as i64 % 900);
    let packages: serde_json::Map<_, _> = (0..node * 37 % 180 + installed)
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
            "networking": {"fqdn": identity, "ip": format!("10.{}.{}.{}", node / 65536, node / 256 % 256, node % 256)},
            "os": {"family": "Debian", "release": {"full": "12.5"}},
            "boot": started.to_rfc3339(),
            "packages": packages,
        },
        "status": {"identity": identity, "uptime": node * 61, "connected_server": "nats://broker.example.net:4222",
            "provisioning_mode": false, "certificate_expires": "0001-01-01T00:00:00Z"},
        "collectives": ["choria"],
        "build_info": {"version": "0.29.4", "sha": "b91f2ad"},
        "machines": [],
    });
    json!({"protocol": "choria:registration:inventorycontent:1", "content": content}).to_string()
}
