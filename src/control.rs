//! The NATS service `replicator`: requests and configuration. Everything is answered within 3 s, queries from memory where
//! possible. Changes go through the configuration bucket, and the supervisor follows that.

pub mod api;
mod documents;
mod endpoints;
pub mod schemas;
mod service;

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::{Semaphore, watch};

pub use self::service::Service;
use self::{
    documents::Documents,
    endpoints::{RequestContext, drift_watch},
    service::{EndpointKind, Route},
};
use crate::{
    adapter::AdapterHandle, allow::AllowList, events::Events, heartbeat, lease::Leases, status::GroupDrift,
    store::Buckets, supervisor::Handle,
};

/// Name of the service, whatever its subjects begin with.
pub const SERVICE_NAME: &str = "replicator";

/// Reports that one instance makes at once.
const REPORTS: usize = 2;

/// Settings of the service.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// What the subjects begin with, `replicator` by default.
    pub prefix: String,
    /// The site's name.
    pub site: String,
    /// This process.
    pub instance: String,
    /// Version of the program.
    pub version: String,
    /// Where documents may connect to.
    pub rules: AllowList,
    /// Whether every change by request is refused.
    pub read_only: bool,
    /// Where the drift of all replications is kept, if anything shows it.
    pub drift: Option<watch::Sender<Arc<GroupDrift>>>,
}

/// The service could not start.
#[derive(Debug, thiserror::Error)]
#[error("service `{SERVICE_NAME}`: {0}")]
pub struct Error(String);

/// Starts to answer requests.
pub async fn start(
    client: async_nats::Client,
    control: ControlConfig,
    buckets: Buckets,
    leases: Leases,
    (supervisor, heartbeats): (Handle, heartbeat::HeartbeatHandle),
    adapters: AdapterHandle,
    events: Events,
) -> Result<Service, Error> {
    let identity = service::ServiceIdentity {
        name: SERVICE_NAME.to_owned(),
        version: control.version,
        description: "copies JetStream streams between clusters".to_owned(),
        metadata: BTreeMap::from([
            ("site".to_owned(), control.site.clone()),
            ("instance".to_owned(), control.instance.clone()),
        ]),
    };
    let Buckets { config, positions, senders, installation, streams, .. } = buckets;
    let documents = Documents::follow(config.clone()).await.map_err(|error| Error(error.to_string()))?;
    let ControlConfig { site, instance, rules, read_only, drift, .. } = control;
    let context = Arc::new(RequestContext {
        client: client.clone(),
        site,
        instance,
        installation,
        own_streams: streams,
        rules,
        read_only,
        config,
        documents,
        positions,
        leases,
        senders,
        supervisor,
        heartbeats,
        adapters,
        events,
        reports: Semaphore::new(REPORTS),
    });
    let mut routes = endpoints::routes(&context, &control.prefix);
    if read_only {
        routes.iter_mut().filter(|route| route.kind == EndpointKind::Mutation).for_each(Route::refuse);
    }
    let service = Service::start(client, identity, routes).await.map_err(|error| Error(error.to_string()))?;
    Ok(match drift {
        Some(drift) => service.with_task(|stop| drift_watch::run(context, drift, stop)),
        None => service,
    })
}
