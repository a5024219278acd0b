//! Metrics and health over HTTP. Decides nothing: every answer is read from the state of other modules.

mod otlp;

use std::{io, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

pub use self::otlp::{OtlpClient, check_url as check_collector};
use crate::{
    adapter::AdapterHandle,
    events::Events,
    heartbeat,
    lease::Leases,
    metrics::{self, InstanceReading},
    names,
    supervisor::Handle,
};

/// Deadline for open connections when the monitor stops.
const GRACE: Duration = Duration::from_millis(500);

/// The state that the monitor shows.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The site's name, for labels.
    pub site: String,
    /// Name of this host.
    pub host: String,
    /// Name of this instance.
    pub instance: String,
    /// How much is shown of each replication.
    pub detail: metrics::Detail,
    /// The control connection.
    pub client: async_nats::Client,
    /// For what was dropped.
    pub events: Events,
    /// How far the process has come.
    pub progress: watch::Receiver<Progress>,
}

/// How far the process has come.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The supervisor, once the buckets are open.
    pub supervisor: Option<Handle>,
    /// The heartbeats, from the same moment on.
    pub heartbeats: Option<heartbeat::HeartbeatHandle>,
    /// The adapters, from the same moment on.
    pub adapters: Option<AdapterHandle>,
    /// Whether the control service answers.
    pub registered: bool,
    /// The session of this instance, once it has one.
    pub leases: Option<Leases>,
    /// Why the buckets cannot be used now.
    pub buckets: Option<String>,
    /// Buckets that this process recreated.
    pub recreated: u64,
}

/// The running monitor.
#[derive(Debug)]
pub struct Monitor {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Monitor {
    /// Listens on `address` (`HOST:PORT`; port 0 takes any that is free) and answers from now on.
    pub async fn start(address: &str, sources: Sources) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let router = Router::new()
            .route("/metrics", get(show_metrics))
            // Where dashboards of Choria's broker look for its adapters.
            .route("/choria/prometheus", get(show_metrics))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .with_state(sources);
        let server = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                error!(%address, "monitor ended: {error}");
            }
        });
        info!(%address, "monitor listens");
        Ok(Self { address, stop, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers what is being asked, then stops.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if timeout(GRACE, &mut self.task).await.is_err() {
            debug!("monitor connections were cut");
            self.task.abort();
        }
    }
}

async fn show_metrics(State(sources): State<Sources>) -> Response {
    match metrics_page(&sources) {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn metrics_page(sources: &Sources) -> Result<String, prometheus::Error> {
    let Progress { supervisor, heartbeats, adapters, recreated, .. } = sources.progress.borrow().clone();
    let (rows, all, elections) = supervisor
        .map(|supervisor| (supervisor.own_rows(), supervisor.rows(), supervisor.elections()))
        .unwrap_or_default();
    let beats = heartbeats.as_ref().and_then(heartbeat::HeartbeatHandle::election);
    let mut page = metrics::render(&sources.site, &rows, sources.events.dropped(), sources.detail)?;
    page +=
        &metrics::render_instance(&sources.site, &InstanceReading::of(sources.connected(), &sources.instance, &all))?;
    page += &metrics::render_buckets(&sources.site, recreated)?;
    page += &metrics::render_process(names::VERSION)?;
    page += &metrics::render_elections(&sources.site, &elections, beats.as_ref())?;
    if let Some(reading) = heartbeats.and_then(|heartbeats| heartbeats.reading()) {
        page += &metrics::render_heartbeats(&sources.site, &reading)?;
    }
    if let Some(adapters) = adapters {
        page += &metrics::render_adapters(&sources.host, &adapters.readings())?;
    }
    Ok(page)
}

async fn livez(State(sources): State<Sources>) -> Response {
    answer(sources.alive())
}

async fn readyz(State(sources): State<Sources>) -> Response {
    answer(sources.ready())
}

impl Sources {
    fn connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// An error says why the process does not work any more and has to be started again.
    pub fn alive(&self) -> Result<(), String> {
        self.progress.borrow().dead().map_or(Ok(()), |why| Err(why.to_owned()))
    }

    /// An error says what is missing until requests are answered and replications run.
    pub fn ready(&self) -> Result<(), String> {
        if !self.connected() {
            return Err("the control connection is down".to_owned());
        }
        self.progress.borrow().ready()
    }
}

impl Progress {
    fn dead(&self) -> Option<&'static str> {
        let dead = self.supervisor.as_ref().is_some_and(|supervisor| !supervisor.is_alive());
        dead.then_some("the supervisor has ended")
    }

    fn ready(&self) -> Result<(), String> {
        if let Some(problem) = &self.buckets {
            return Err(problem.clone());
        }
        let why = match &self.supervisor {
            None => "the buckets are not open",
            Some(supervisor) if !supervisor.is_alive() => "the supervisor has ended",
            Some(supervisor) if !supervisor.is_loaded() => "the configuration has not been read",
            Some(_) if !self.registered => "the control service is not registered",
            Some(_) if self.leases.as_ref().is_some_and(|leases| !leases.hold()) => {
                "the session of this instance is not renewed: nothing may run here"
            }
            Some(_) => return Ok(()),
        };
        Err(why.to_owned())
    }
}

fn answer(result: Result<(), String>) -> Response {
    match result {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}
