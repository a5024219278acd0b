//! Opens the buckets of an installation, and creates missing ones.

use std::sync::Arc;

use super::{
    ConfigStore, LeaseStore, PositionStore, SenderStore,
    bucket::{self, Bucket, INSTALLATION},
    error::Error,
    keeper::Keeper,
    own_streams::OwnStreams,
};

/// Revisions of each document that are kept.
pub const CONFIG_HISTORY: usize = 10;

/// The buckets of one installation.
#[derive(Debug, Clone)]
pub struct Buckets {
    /// Replication documents, and marks beside them.
    pub config: ConfigStore,
    /// Positions and status rows.
    pub positions: PositionStore,
    /// Which processes are there and what each may run.
    pub leases: LeaseStore,
    /// What sampling knows of senders.
    pub senders: SenderStore,
    /// Identifies the installation to itself: when its configuration bucket was created first.
    pub installation: String,
    /// What must not be copied.
    pub streams: OwnStreams,
}

impl Buckets {
    /// Configuration and leases of an installation; nothing is created.
    pub async fn existing(
        client: async_nats::Client,
        api_prefix: &str,
        prefix: &str,
    ) -> Result<(ConfigStore, LeaseStore), Error> {
        let config = Bucket::existing(&client, api_prefix, &format!("{prefix}_CONFIG")).await?;
        let leases = Bucket::existing(&client, api_prefix, &format!("{prefix}_LEASES")).await?;
        Ok((ConfigStore::new(config), LeaseStore::new(Arc::new(leases))))
    }

    /// Opens `<prefix>_CONFIG`, `<prefix>_POSITIONS`, `<prefix>_LEASES` and `<prefix>_STATE` of the JetStream whose API
    /// begins with `api_prefix`. Missing ones are created with this many `replicas`; existing ones are used as they
    /// are. Bulk writes carry the name of `instance`, and names of its consumers begin with it. The keeper maintains
    /// them.
    pub async fn open(
        client: async_nats::Client,
        api_prefix: &str,
        prefix: &str,
        replicas: usize,
        instance: &str,
    ) -> Result<(Self, Keeper), Error> {
        let config = format!("{prefix}_CONFIG");
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if !config.bytes().all(legal) {
            let message = "a bucket's name has letters, digits, - and _ only".to_owned();
            return Err(Error { bucket: config, message });
        }
        let open = async |name: &str, history: i64| {
            Bucket::open(&client, api_prefix, name, instance, history, replicas, None).await
        };
        let state = format!("{prefix}_STATE");
        let senders =
            Bucket::open(&client, api_prefix, &state, instance, 1, replicas, Some(SenderStore::MARKER_TTL)).await?;
        let config = open(&config, CONFIG_HISTORY as i64).await?;
        let positions = open(&format!("{prefix}_POSITIONS"), 1).await?;
        let leases = open(&format!("{prefix}_LEASES"), 1).await?;
        let mut infos = Vec::new();
        for bucket in [&config, &positions, &leases, &senders] {
            infos.push((bucket.clone(), bucket.info().await?));
        }
        let config_info = &infos[0].1;
        let created = || config_info.created.unix_timestamp_nanos().to_string();
        let installation = config_info.config.metadata.get(INSTALLATION).cloned().unwrap_or_else(created);
        let streams = OwnStreams::default();
        let context = bucket::context(&client, api_prefix);
        let keeper = Keeper::new(context, infos, streams.clone(), installation.clone());
        let senders = SenderStore::open(senders, instance).await?;
        let buckets = Self {
            config: ConfigStore::new(config),
            positions: PositionStore::new(Arc::new(positions)),
            leases: LeaseStore::new(Arc::new(leases)),
            senders,
            installation,
            streams,
        };
        Ok((buckets, keeper))
    }
}
