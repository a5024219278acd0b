//! Metrics, health and the status page over HTTP. Decides nothing: every answer is read from the state of other modules.

mod auth;
mod earlier_events;
mod history;
mod listener;
mod live;
mod otlp;
mod page;
mod recent_events;
mod rows;

use std::{future::IntoFuture, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Path, Request, State},
    http::{
        StatusCode,
        header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use self::{
    auth::MonitorAuth,
    otlp::{OtlpClient, check_url as check_collector},
};
use self::{
    auth::{Admission, LoginGate},
    listener::LimitedListener,
    live::LivePage,
};
use crate::{
    adapter::AdapterHandle,
    events::Events,
    heartbeat,
    lease::Leases,
    metrics::{self, InstanceReading},
    names,
    status::GroupDrift,
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
    /// Subject prefix of the events.
    pub prefix: String,
    /// How much is shown of each replication.
    pub detail: metrics::Detail,
    /// The control connection.
    pub client: async_nats::Client,
    /// Prefix of its JetStream API.
    pub api_prefix: String,
    /// What the names of the buckets begin with, and that of the stream of events.
    pub bucket_prefix: String,
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
    /// The drift of all replications as it is known, from the same moment on.
    pub drift: Option<watch::Receiver<Arc<GroupDrift>>>,
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
    /// Listens on `address` (`HOST:PORT`; port 0 takes any that is free) and answers from now on; with `auth` only those who
    /// log in, but for the health.
    pub async fn start(address: &str, auth: Option<MonitorAuth>, sources: Sources) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        if auth.is_none() && !address.ip().is_loopback() {
            warn!(
                %address,
                "everyone who reaches the monitor sees the replications of the group, their streams, servers and errors: set \
                 `--monitor-auth`, or listen on a loopback address"
            );
        }
        let live = LivePage::new(sources.clone(), stop.clone());
        let router = router(sources, auth, live.clone());
        let server =
            axum::serve(LimitedListener(listener), router).with_graceful_shutdown(stop.clone().cancelled_owned());
        let task = tokio::spawn(async move {
            let (ended, ()) = tokio::join!(server.into_future(), live.run());
            if let Err(error) = ended {
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

/// Health is for everyone; the rest is for those who may see it.
fn router(sources: Sources, auth: Option<MonitorAuth>, live: Arc<LivePage>) -> Router {
    let page = Router::new()
        .route("/live", get(follow))
        .route("/replication/{id}", get(details))
        .with_state(live)
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/topology.js", get(page::topology))
        .route("/icon.svg", get(page::icon));
    let metrics = Router::new()
        .route("/metrics", get(show_metrics))
        // Where dashboards of Choria's broker look for its adapters.
        .route("/choria/prometheus", get(show_metrics))
        .with_state(sources.clone());
    let mut guarded = page.merge(metrics);
    if let Some(auth) = auth {
        guarded = guarded.layer(from_fn_with_state(Arc::new(LoginGate::new(auth)), admit));
    }
    let health = Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).with_state(sources);
    guarded.merge(health).layer(from_fn(page::protect))
}

async fn admit(State(gate): State<Arc<LoginGate>>, request: Request, next: Next) -> Response {
    match gate.admit(request.headers().get(AUTHORIZATION)).await {
        Admission::Granted => next.run(request).await,
        Admission::Refused => {
            let challenge = [(WWW_AUTHENTICATE, "Basic realm=\"stream-replicator\", charset=\"UTF-8\"")];
            (StatusCode::UNAUTHORIZED, challenge, "a login is needed: `--monitor-auth` has its user\n").into_response()
        }
        Admission::Busy => busy("too many logins are being checked: try again\n"),
    }
}

fn busy(why: &'static str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "5")], why).into_response()
}

async fn follow(State(live): State<Arc<LivePage>>) -> Response {
    match live.join() {
        Some(body) => ([(CONTENT_TYPE, "text/event-stream")], body).into_response(),
        None => busy("too many viewers: close some\n"),
    }
}

async fn details(State(live): State<Arc<LivePage>>, Path(id): Path<String>) -> Response {
    match live.details(&id).map(|details| serde_json::to_string(&details)) {
        Some(Ok(json)) => ([(CONTENT_TYPE, "application/json")], json).into_response(),
        Some(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        None => (StatusCode::NOT_FOUND, "there is no such replication\n").into_response(),
    }
}

async fn show_metrics(State(sources): State<Sources>) -> Response {
    match metrics_page(&sources) {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn metrics_page(sources: &Sources) -> Result<String, prometheus::Error> {
    let Progress { supervisor, heartbeats, adapters, recreated, drift, .. } = sources.progress.borrow().clone();
    let (rows, all, elections) = supervisor
        .map(|supervisor| (supervisor.own_rows(), supervisor.rows(), supervisor.elections()))
        .unwrap_or_default();
    let beats = heartbeats.as_ref().and_then(heartbeat::HeartbeatHandle::election);
    let mut page = metrics::render(&sources.site, &rows, sources.events.dropped(), sources.detail)?;
    if let Some(drift) = drift {
        page += &metrics::render_drift(&sources.site, &rows, &drift.borrow())?;
    }
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
