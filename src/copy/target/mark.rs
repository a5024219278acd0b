//! The mark of a target stream that this service created, in its metadata. Pure.

use nats_lane::jetstream::StreamInfo;
use serde_json::{Value, json};

use crate::config::{Former, Replication};

/// What every key of the mark begins with.
pub(crate) const PREFIX: &str = "replicator.";
/// The site that created it.
const SITE: &str = "replicator.site";
/// The source stream of the replication that created it, and the cluster that holds that stream, where it is one.
const SOURCE_STREAM: &str = "replicator.source_stream";
const SOURCE_CLUSTER: &str = "replicator.source_cluster";
/// The replications that are copied into it, with commas between; one that was deleted stays.
const REPLICATIONS: &str = "replicator.replications";

/// Whether a service of this site, under this name or a former one, created the stream with this configuration.
pub(crate) fn is_ours(config: &Value, site: &str, former: &[Former]) -> bool {
    let name = value(config, SITE);
    !name.is_empty() && (name == site || former.iter().any(|former| former.site == name))
}

/// Whether a replication has joined the stream.
pub(crate) fn names(stream: &StreamInfo, id: &str) -> bool {
    value(&stream.config, REPLICATIONS).split(',').any(|known| known == id)
}

/// Whether the stream was created for this replication, and no other one has joined it.
pub(crate) fn is_of(stream: &StreamInfo, site: &str, replication: &Replication) -> bool {
    is_ours(&stream.config, site, &replication.former) && value(&stream.config, REPLICATIONS) == replication.id
}

/// Adds to the configuration of a stream that a replication of the site is copied into it.
pub(crate) fn put(config: &mut Value, site: &str, id: &str) {
    let known = value(config, REPLICATIONS).to_owned();
    let joined = known.split(',').filter(|known| !known.is_empty() && *known != id).chain([id]);
    let joined: Vec<&str> = joined.collect();
    let joined = joined.join(",");
    if !config["metadata"].is_object() {
        config["metadata"] = json!({});
    }
    config["metadata"][SITE] = site.into();
    config["metadata"][REPLICATIONS] = joined.into();
}

/// Adds to the configuration of a stream that is created where its first messages come from.
pub(crate) fn put_source(config: &mut Value, source: &StreamInfo, stream: &str) {
    let cluster = source.cluster.as_ref().map(|cluster| cluster.name.as_str()).filter(|name| !name.is_empty());
    for (key, value) in [(SOURCE_STREAM, Some(stream)), (SOURCE_CLUSTER, cluster)] {
        if let Some(value) = value {
            config["metadata"][key] = value.into();
        }
    }
}

fn value<'a>(config: &'a Value, key: &str) -> &'a str {
    config.get("metadata").and_then(|metadata| metadata.get(key)).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(config: &Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    #[test]
    fn a_stream_names_its_site_and_who_joined() {
        let mut config = json!({"name": "T", "metadata": {"own": "kept"}});
        assert!(!is_ours(&config, "EAST", &[]));
        put(&mut config, "EAST", "A");
        put(&mut config, "EAST", "B.x");
        put(&mut config, "EAST", "A");
        let expect = json!({"own": "kept", "replicator.site": "EAST", "replicator.replications": "B.x,A"});
        assert_eq!(config["metadata"], expect);
        let stream = stream(&config);
        assert!(is_ours(&config, "EAST", &[]) && !is_ours(&config, "WEST", &[]));
        let former = Former { site: "EAST".to_owned(), name: "EAST".to_owned() };
        assert!(is_ours(&config, "WEST", &[former]));
        assert!(names(&stream, "A") && names(&stream, "B.x") && !names(&stream, "B"));
    }

    #[test]
    fn a_stream_names_where_it_is_from() {
        let mut config = json!({"name": "T"});
        put(&mut config, "EAST", "A");
        put_source(&mut config, &stream(&json!({})), "S");
        assert_eq!(config["metadata"]["replicator.source_stream"], "S");
        assert_eq!(config["metadata"].get("replicator.source_cluster"), None);
        let clustered = json!({"config": {}, "state": {}, "cluster": {"name": "c1", "leader": "a"}});
        put_source(&mut config, &serde_json::from_value(clustered).unwrap(), "S");
        assert_eq!(config["metadata"]["replicator.source_cluster"], "c1");
    }

    #[test]
    fn a_stream_without_metadata_is_nobodys() {
        let config = json!({});
        assert!(!is_ours(&config, "", &[]) && !names(&stream(&config), "A"));
    }
}
