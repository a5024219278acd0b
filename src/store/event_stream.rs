//! The stream that keeps the events. It is created at a start that does not find it; from then on it belongs to the
//! operators, who may change or delete it.

use std::time::Duration;

use async_nats::jetstream::{
    context::CreateStreamErrorKind,
    stream::{Config, DiscardPolicy},
};
use tracing::{debug, info, warn};

use super::bucket::{self, chain};

const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3_600);
const MAX_BYTES: i64 = 100 << 20;
/// Error codes of the server: a stream of this name has another configuration; another stream captures the subjects.
const IN_USE: u64 = 10_058;
const OVERLAPS: u64 = 10_065;

/// Creates `<bucket_prefix>_EVENTS` for the events of a service, unless there is a stream for them. Without it the service
/// works as well, so a failure is logged.
pub async fn create(
    client: async_nats::Client,
    api_prefix: &str,
    bucket_prefix: &str,
    service_prefix: &str,
    replicas: usize,
) {
    let (name, subjects) = (format!("{bucket_prefix}_EVENTS"), format!("{service_prefix}.event.>"));
    let config = Config {
        name: name.clone(),
        description: Some("Events of stream-replicator".to_owned()),
        subjects: vec![subjects.clone()],
        max_age: MAX_AGE,
        max_bytes: MAX_BYTES,
        discard: DiscardPolicy::Old,
        num_replicas: replicas,
        allow_direct: true,
        ..Config::default()
    };
    let Err(error) = bucket::context(&client, api_prefix).create_stream(config).await else {
        debug!(stream = name, "events are kept");
        return;
    };
    let code = match error.kind() {
        CreateStreamErrorKind::JetStream(error) => error.error_code().0,
        _ => 0,
    };
    match code {
        IN_USE => debug!(stream = name, "events are kept, by a configuration of its own"),
        OVERLAPS => info!(
            "events are kept by another stream that captures subjects of `{subjects}`, so `{name}` is not created"
        ),
        _ => warn!(
            "events are not kept: stream `{name}` for `{subjects}` cannot be created: {}: allow that, create a stream for \
             them, or start with `--no-event-stream`",
            chain(&error)
        ),
    }
}
