//! What the JetStream API says of an account: what it uses and what it may use.

use std::collections::BTreeMap;

use serde::Deserialize;

/// `INFO` of the JetStream API, the parts that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AccountInfo {
    /// Of the whole account.
    #[serde(flatten)]
    pub total: AccountUsage,
    /// By number of replicas (`R1`, `R3`), where the account has limits by tier.
    pub tiers: BTreeMap<String, AccountUsage>,
}

/// What is used, and the limits on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AccountUsage {
    /// Bytes in memory.
    pub memory: i64,
    /// Bytes on disk.
    pub storage: i64,
    /// Streams.
    pub streams: i64,
    /// Consumers.
    pub consumers: i64,
    /// The limits.
    pub limits: AccountLimits,
}

/// AccountLimits of an account; 0 and below mean none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AccountLimits {
    /// Bytes in memory.
    pub max_memory: i64,
    /// Bytes on disk.
    pub max_storage: i64,
    /// Streams.
    pub max_streams: i64,
    /// Consumers.
    pub max_consumers: i64,
    /// Bytes in memory that one stream may ask for.
    pub memory_max_stream_bytes: i64,
    /// Bytes on disk that one stream may ask for.
    pub storage_max_stream_bytes: i64,
    /// Whether each stream has to have a bound in bytes.
    pub max_bytes_required: bool,
}

impl AccountInfo {
    /// What counts for streams of so many replicas; `None` where the account may have none of them.
    pub fn of_replicas(&self, replicas: i64) -> Option<&AccountUsage> {
        match self.tiers.is_empty() {
            true => Some(&self.total),
            false => self.tiers.get(&format!("R{}", replicas.max(1))),
        }
    }
}

impl AccountUsage {
    /// Bytes used of this storage, the limit on them, and the limit for one stream.
    pub fn bytes(&self, in_memory: bool) -> (i64, i64, i64) {
        match in_memory {
            true => (self.memory, self.limits.max_memory, self.limits.memory_max_stream_bytes),
            false => (self.storage, self.limits.max_storage, self.limits.storage_max_stream_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_with_and_without_tiers() {
        let plain: AccountInfo =
            serde_json::from_str(r#"{"storage":5,"streams":1,"limits":{"max_streams":3,"max_storage":-1}}"#).unwrap();
        assert_eq!(plain.of_replicas(3), Some(&plain.total));
        assert_eq!((plain.total.limits.max_streams, plain.total.bytes(false)), (3, (5, -1, 0)));
        let tiered: AccountInfo = serde_json::from_str(
            r#"{"storage":9,"limits":{},"tiers":{"R1":{"memory":2,"streams":4,"limits":{"max_memory":7}}}}"#,
        )
        .unwrap();
        assert_eq!(tiered.of_replicas(0).map(|tier| tier.bytes(true)), Some((2, 7, 0)));
        assert_eq!(tiered.of_replicas(3), None);
    }
}
