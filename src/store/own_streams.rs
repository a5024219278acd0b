//! The streams of the service's own buckets, which are never copied.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use chrono::DateTime;

/// The streams of the buckets of one installation, each with the time at which it was created (Unix epoch, ns): another
/// installation may have streams of the same names.
#[derive(Debug, Clone, Default)]
pub struct OwnStreams(Arc<RwLock<BTreeMap<String, i128>>>);

impl OwnStreams {
    /// Why a stream cannot be copied, or copied into, if it is one of these. `created` is what `STREAM.INFO` says.
    pub fn refuse(&self, stream: &str, created: &str) -> Option<String> {
        let created = DateTime::parse_from_rfc3339(created).ok()?.timestamp_nanos_opt()?;
        let own = self.0.read().unwrap_or_else(PoisonError::into_inner).get(stream).copied();
        (own == Some(i128::from(created))).then(|| {
            format!(
                "stream `{stream}` is a bucket of this service: the service would copy its own saves again, without \
                 end; use `nats stream backup`, or a service of another installation"
            )
        })
    }

    /// Whether a stream has the name of one of these, or of the stream that keeps the events.
    pub fn has_name(&self, stream: &str) -> bool {
        let own = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let keeps_events = |prefix: &str| own.contains_key(&format!("KV_{prefix}_CONFIG"));
        own.contains_key(stream) || stream.strip_suffix("_EVENTS").is_some_and(keeps_events)
    }

    /// A stream of these, as it is now.
    pub(super) fn is(&self, stream: &str, created: i128) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(stream.to_owned(), created);
    }
}
