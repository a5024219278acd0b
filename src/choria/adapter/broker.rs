//! The adapters of a configuration file of Choria's broker, as documents.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// What a file has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImportedAdapters {
    /// Name and document of each adapter, in the order of the file.
    pub adapters: Vec<(String, Value)>,
    /// One line for each adapter, or key, that cannot be read; without values, which may be secrets.
    pub problems: Vec<String>,
}

/// Key of the list of adapters; each has its own keys below it.
const ADAPTERS: &str = "plugin.choria.adapters";
const ADAPTER: &str = "plugin.choria.adapter.";
/// Key of the broker's own servers.
const MIDDLEWARE: &str = "plugin.choria.middleware_hosts";

/// Reads the text of `broker.conf`. `servers` are those to read from, instead of the broker's own. Names and values are as in
/// go-choria: keys in any case, one `key = value` a line, `#` begins a comment line.
pub fn import_broker(text: &str, servers: Option<&str>) -> ImportedAdapters {
    let keys: BTreeMap<String, &str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_ascii_lowercase(), value.trim()))
        .collect();
    let list = |key: &str| {
        let value = keys.get(key).copied().unwrap_or_default();
        value.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    };
    let middleware = list(MIDDLEWARE).join(",");
    let servers = servers.unwrap_or(&middleware);
    let mut found = ImportedAdapters::default();
    for name in list(ADAPTERS) {
        match adapter(&name, &keys, servers) {
            Ok(document) => found.adapters.push((name, document)),
            Err(problem) => found.problems.push(format!("adapter `{name}`: {problem}")),
        }
    }
    found
}

fn adapter(name: &str, keys: &BTreeMap<String, &str>, servers: &str) -> Result<Value, String> {
    let prefix = format!("{ADAPTER}{}.", name.to_ascii_lowercase());
    let key = |key: &str| keys.get(&format!("{prefix}{key}")).copied().filter(|value| !value.is_empty());
    let kind = key("type").ok_or_else(|| format!("`{prefix}type` is required"))?;
    match kind {
        "jetstream" | "choria_streams" => {}
        "nats_stream" => return Err("type `nats_stream` is retired: NATS Streaming ended in 2023".to_owned()),
        _ => return Err("its type is neither `jetstream` nor `choria_streams`".to_owned()),
    }
    let topic = key("ingest.topic").ok_or_else(|| format!("`{prefix}ingest.topic` is required"))?;
    let number = |field: &str| match key(field) {
        None => Ok(None),
        Some(value) => value.parse::<u64>().map(Some).map_err(|_| format!("`{prefix}{field}` is not a number")),
    };
    // Choria takes any other value for `reply`.
    let protocol = if key("ingest.protocol") == Some("request") { "request" } else { "reply" };
    let mut ingest = Map::from_iter([("topic".to_owned(), json!(topic)), ("protocol".to_owned(), json!(protocol))]);
    let mut stream = Map::from_iter([("type".to_owned(), json!(kind))]);
    let mut document = Map::from_iter([("name".to_owned(), json!(name))]);
    let set = |map: &mut Map<String, Value>, field: &str, value: Option<Value>| {
        if let Some(value) = value {
            map.insert(field.to_owned(), value);
        }
    };
    set(&mut document, "queue_len", number("queue_len")?.map(Value::from));
    set(&mut ingest, "workers", number("ingest.workers")?.map(Value::from));
    set(&mut ingest, "servers", Some(servers).filter(|servers| !servers.is_empty()).map(Value::from));
    set(&mut stream, "topic", key("stream.topic").map(Value::from));
    set(&mut stream, "workers", number("stream.workers")?.map(Value::from));
    set(&mut stream, "servers", key("stream.servers").map(Value::from));
    document.insert("ingest".to_owned(), ingest.into());
    document.insert("stream".to_owned(), stream.into());
    Ok(document.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_of_a_broker_become_documents() {
        let text = "
            # the broker
            plugin.choria.middleware_hosts = b1:4222, b2:4222
            plugin.choria.adapters = inventory, old ,pings,broken,nothing
            plugin.choria.adapter.inventory.type = jetstream
            plugin.choria.adapter.inventory.queue_len = 5000
            plugin.choria.adapter.inventory.stream.topic = choria.stream.input.registration.%s
            plugin.choria.adapter.inventory.stream.servers = s1:4222,s2:4222
            plugin.choria.adapter.inventory.stream.workers = 2
            plugin.choria.adapter.inventory.ingest.topic = mcollective.broadcast.agent.registration
            plugin.choria.adapter.inventory.ingest.protocol = request
            plugin.choria.adapter.inventory.ingest.workers = 3
            plugin.choria.adapter.old.type = nats_stream
            plugin.choria.adapter.Pings.Type = choria_streams
            plugin.choria.adapter.pings.ingest.topic = mcollective.reply.>
            plugin.choria.adapter.broken.type = jetstream
            plugin.choria.adapter.broken.ingest.topic = a
            plugin.choria.adapter.broken.queue_len = many
        ";
        let found = import_broker(text, None);
        let expect = [
            (
                "inventory".to_owned(),
                json!({
                    "name": "inventory", "queue_len": 5000,
                    "ingest": {"topic": "mcollective.broadcast.agent.registration", "protocol": "request", "workers": 3,
                        "servers": "b1:4222,b2:4222"},
                    "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s", "workers": 2,
                        "servers": "s1:4222,s2:4222"},
                }),
            ),
            (
                "pings".to_owned(),
                json!({
                    "name": "pings",
                    "ingest": {"topic": "mcollective.reply.>", "protocol": "reply", "servers": "b1:4222,b2:4222"},
                    "stream": {"type": "choria_streams"},
                }),
            ),
        ];
        assert_eq!(found.adapters, expect);
        let problems = found.problems.join("\n");
        for part in ["`old`: type `nats_stream` is retired", "`broken`: ", "queue_len` is not a number", "`nothing`: "]
        {
            assert!(problems.contains(part), "{part}: {problems}");
        }
        let other = import_broker(text, Some("nats://x:1"));
        assert_eq!(other.adapters[1].1["ingest"]["servers"], "nats://x:1");
        assert_eq!(import_broker("", None), ImportedAdapters::default());
    }
}
