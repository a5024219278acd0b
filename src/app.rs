//! Composition root: starts all parts of the service, top to bottom, and stops them gracefully.

mod files;
mod replicator_file;
mod signals;
mod site;
mod systemd;

use std::{
    convert::Infallible, env, fmt::Display, fs, io, path::PathBuf, pin::pin, process, sync::Arc, time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use async_nats::Client;
use nats_lane::{ServerRef, backoff::Backoff, client};
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{error, info, warn};

pub use self::{replicator_file::ReplicatorFile, signals::HangupHook, site::Misconfigured};
use crate::{
    adapter,
    allow::AllowList,
    control,
    copy::Budget,
    events::{Event, Events},
    heartbeat,
    http::{Monitor, MonitorAuth, OtlpClient, Progress, Sources},
    lease::{self, Driver, Leases, ProcessIdentity},
    metrics::Detail,
    names,
    status::GroupDrift,
    store::{Buckets, Condition, FileDocuments, Keeper, Stored, event_stream},
    supervisor::{self, Deps, Supervisor},
    traces::{self, TraceSender, Traces},
};

/// Everything stops within this.
const GRACE: Duration = Duration::from_secs(10);

/// The part of it in which the service refuses new requests...
const SERVICE_GRACE: Duration = Duration::from_secs(1);

/// ... and the part for the last messages on the control connection.
const CONNECTION_GRACE: Duration = Duration::from_secs(2);

/// What `serve` runs with; every value has been checked.
#[derive(Debug, Clone)]
pub struct AppSettings {
    /// The control connection.
    pub server: ServerRef,
    /// Where documents may connect to.
    pub rules: AllowList,
    /// Whether every change by request is refused.
    pub read_only: bool,
    /// Name of the site.
    pub site: String,
    /// This process.
    pub instance: String,
    /// Where metrics and health are served, `HOST:PORT`.
    pub monitor: Option<String>,
    /// Who may see the monitor; everyone without it.
    pub monitor_auth: Option<MonitorAuth>,
    /// How much the metrics show of each replication.
    pub metrics_detail: Detail,
    /// The collector that gets spans, a URL that was checked.
    pub otlp: Option<String>,
    /// Subject prefix of the service and of events.
    pub prefix: String,
    /// What bucket names begin with.
    pub bucket_prefix: String,
    /// Replicas of buckets that are created.
    pub bucket_replicas: usize,
    /// Whether a stream for the events is created.
    pub event_stream: bool,
    /// How long this process may be silent before others take its leases. 1 s to 1 h.
    pub lease_ttl: Duration,
    /// The operator declared this the only instance.
    pub standalone: bool,
    /// Heartbeats as the site's file has them, checked; `null` for none.
    pub heartbeats: Value,
    /// Folder of the state files of Choria's replicator, where they are read and written.
    pub state_store: Option<PathBuf>,
    /// Replication documents of the site's file, checked.
    pub documents: FileDocuments,
    /// What SIGHUP does; without it, SIGHUP and SIGQUIT end the process as they do by default.
    pub on_hangup: Option<HangupHook>,
}

/// Runs until SIGTERM or SIGINT. An error means that the start failed or the stop was not graceful.
pub async fn run(settings: AppSettings) -> anyhow::Result<()> {
    files::raise_limit();
    let stop = CancellationToken::new();
    stop_on_signals(stop.clone()).context("cannot handle signals")?;
    let mut system = System::start(&settings).await?;
    if let Some(hook) = settings.on_hangup.clone() {
        signals::serve(hook, system.progress.subscribe()).context("cannot handle signals")?;
    }
    let traces = Collector::start(&settings)?;
    let result = system.work(&settings, &traces.traces, &stop).await;
    systemd::stopping(GRACE);
    let late = system.stop().await;
    traces.finish().await;
    result?;
    if late.is_empty() {
        info!("stopped");
        return Ok(());
    }
    bail!("did not stop gracefully in time: {}", late.join(", "))
}

/// The collector that gets spans, if there is one.
struct Collector {
    traces: Traces,
    sender: Option<TraceSender>,
}

impl Collector {
    fn start(settings: &AppSettings) -> anyhow::Result<Self> {
        let Some(url) = &settings.otlp else { return Ok(Self { traces: Traces::default(), sender: None }) };
        let client = OtlpClient::new(tokio::runtime::Handle::current());
        let (traces, sender) = traces::start(url, &settings.site, &settings.instance, client)
            .map_err(|error| anyhow!("cannot send spans to `--otlp {url}`: {error}"))?;
        Ok(Self { traces, sender: Some(sender) })
    }

    /// Sends the last spans.
    async fn finish(self) {
        let Some(sender) = self.sender else { return };
        // A panic there must not change how the process ends.
        let _ = tokio::task::spawn_blocking(|| sender.finish()).await;
    }
}

/// Bytes that all replications together may have asked for or read and not sent.
const READ_AHEAD: usize = 256 << 20;

/// The first signal stops gracefully, the second at once.
fn stop_on_signals(stop: CancellationToken) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let name = next().await;
        info!("{name}: stopping, at most {GRACE:?}");
        stop.cancel();
        let name = next().await;
        error!("{name} again: exiting at once");
        process::exit(1);
    });
    Ok(())
}

/// The started parts, in the order of their start.
struct System {
    client: Client,
    /// Prefix of the JetStream API of the buckets.
    api_prefix: String,
    events: Events,
    progress: watch::Sender<Progress>,
    monitor: Option<Monitor>,
    driver: Option<Driver>,
    supervisor: Option<Supervisor>,
    heartbeats: Option<heartbeat::Runner>,
    adapters: Option<adapter::AdapterRunner>,
    service: Option<control::Service>,
}

impl System {
    /// Starts the parts that work without a server: the control connection is made in the background.
    async fn start(settings: &AppSettings) -> anyhow::Result<Self> {
        let AppSettings { server, site, instance, monitor, monitor_auth, prefix, .. } = settings;
        let (client, connection) =
            client::connect(server, &format!("{} {site}/{instance}", names::PROGRAM), "control connection").await?;
        let events = Events::new(client.clone(), prefix, site, instance);
        let (progress, view) = watch::channel(Progress::default());
        let host = display_host(instance);
        let sources = Sources {
            site: site.clone(),
            host,
            instance: instance.clone(),
            prefix: prefix.clone(),
            detail: settings.metrics_detail,
            client: client.clone(),
            api_prefix: connection.api_prefix.clone(),
            bucket_prefix: settings.bucket_prefix.clone(),
            events: events.clone(),
            progress: view,
        };
        let monitor = match monitor {
            Some(address) => {
                let started = Monitor::start(address, monitor_auth.clone(), sources.clone()).await;
                Some(started.with_context(|| format!("cannot listen on `--monitor {address}`"))?)
            }
            None => None,
        };
        systemd::start(sources);
        if settings.rules.is_open() && !settings.read_only && !connection.endpoint.is_local() {
            warn!(
                "every client that may publish to `{prefix}.>` decides which servers this process connects to and which \
                 credentials it uses there; limit that with `--allow-url`, `--allow-credentials` and `--read-only`"
            );
        }
        let api_prefix = connection.api_prefix;
        Ok(Self {
            client,
            api_prefix,
            events,
            progress,
            monitor,
            driver: None,
            supervisor: None,
            heartbeats: None,
            adapters: None,
            service: None,
        })
    }

    /// Maintains the buckets until this is dropped.
    fn keep(&self, keeper: Keeper) -> AbortOnDropHandle<Infallible> {
        let (events, progress) = (self.events.clone(), self.progress.clone());
        let say = move |condition| match condition {
            Condition::Recreated { bucket } => {
                progress.send_modify(|progress| progress.recreated += 1);
                events.emit(Event::BucketRecreated { bucket: bucket.clone() }, &bucket);
            }
            Condition::Usable(problem) => {
                progress.send_if_modified(|progress| {
                    progress.buckets != problem && {
                        progress.buckets = problem;
                        true
                    }
                });
            }
        };
        AbortOnDropHandle::new(tokio::spawn(keeper.keep(say)))
    }

    fn create_event_stream(&self, settings: &AppSettings) -> AbortOnDropHandle<()> {
        let (client, api_prefix) = (self.client.clone(), self.api_prefix.clone());
        let AppSettings { prefix, bucket_prefix, bucket_replicas, .. } = settings.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            event_stream::create(client, &api_prefix, &bucket_prefix, &prefix, bucket_replicas).await;
        }))
    }

    /// Opens the buckets, starts all other parts and runs until the stop.
    async fn work(&mut self, settings: &AppSettings, traces: &Traces, stop: &CancellationToken) -> anyhow::Result<()> {
        let AppSettings { site, instance, bucket_prefix, bucket_replicas, .. } = settings;
        let open = async || {
            let (client, api_prefix) = (self.client.clone(), &self.api_prefix);
            Buckets::open(client, api_prefix, bucket_prefix, *bucket_replicas, instance).await
        };
        let opened = persist("the buckets cannot be opened", stop, open).await;
        let Some((buckets, keeper)) = opened else { return Ok(()) };
        let buckets = Buckets { config: buckets.config.with_file(settings.documents.clone()), ..buckets };
        let _keeping = self.keep(keeper);

        let claim = async || site::claim(&buckets.config, site, bucket_prefix).await;
        let Some(record) = persist("the site of the buckets cannot be read", stop, claim).await else {
            return Ok(());
        };
        let record = record?;
        let _event_stream = settings.event_stream.then(|| self.create_event_stream(settings));
        let rules = settings.rules.clone().with_former(&record.former);

        let Parts { leases, driver, handle, supervisor, heartbeats, runner, site_record } =
            start_parts(settings, &rules, &buckets, (&self.events, traces));
        let adapter_deps = adapter::AdapterDeps {
            site: site.clone(),
            instance: instance.clone(),
            rules: settings.rules.clone(),
            config: buckets.config.clone(),
            events: self.events.clone(),
            leases: leases.clone(),
        };
        let (adapters, adapter_runner) = adapter::start(adapter_deps);
        self.adapters = Some(adapter_runner);
        let (driver, supervisor) = (self.driver.insert(driver), self.supervisor.insert(supervisor));
        self.heartbeats = Some(runner);
        self.progress.send_modify(|progress| {
            progress.supervisor = Some(handle.clone());
            progress.heartbeats = Some(heartbeats.clone());
            progress.adapters = Some(adapters.clone());
            progress.leases = Some(leases.clone());
        });

        let drift = (settings.monitor.is_some() && !settings.read_only).then(|| {
            let (sender, known) = watch::channel(Arc::default());
            self.progress.send_modify(|progress| progress.drift = Some(known));
            sender
        });
        let register = async || {
            let (client, events) = (self.client.clone(), self.events.clone());
            let (leases, works) = (leases.clone(), (handle.clone(), heartbeats.clone()));
            let control = control_config(settings, &rules, drift.clone());
            control::start(client, control, buckets.clone(), leases, works, adapters.clone(), events).await
        };
        let mut keep = pin!(site::keep(&buckets.config, &record, site_record, bucket_prefix));
        let registered = tokio::select! {
            registered = persist("the control service cannot be registered", stop, register) => registered,
            other = &mut keep => return Err(other.into()),
        };
        let Some(service) = registered else { return Ok(()) };
        self.service = Some(service);
        self.progress.send_modify(|progress| progress.registered = true);

        let ready = async {
            if handle.loaded().await {
                report_ready(settings, handle.rows().len());
            }
            supervisor.ended().await;
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            () = ready => bail!("the supervisor ended unasked"),
            reason = driver.ended() => bail!(reason),
            other = keep => Err(other.into()),
        }
    }

    /// Stops everything gracefully; returns the parts that were late.
    async fn stop(self) -> Vec<String> {
        let end = Instant::now() + GRACE;
        let mut late = Vec::new();
        self.progress.send_modify(|progress| progress.registered = false);
        if let Some(driver) = &self.driver {
            driver.leave();
        }
        if let Some(service) = self.service
            && timeout(SERVICE_GRACE, service.stop()).await.is_err()
        {
            late.push("control service".to_owned());
        }
        let heartbeats = async {
            match self.heartbeats {
                Some(heartbeats) => heartbeats.stop().await,
                None => true,
            }
        };
        let adapters = async {
            match self.adapters {
                Some(adapters) => adapters.stop().await,
                None => true,
            }
        };
        let replications = async {
            let Some(supervisor) = self.supervisor else { return Vec::new() };
            let grace = end.saturating_duration_since(Instant::now()).saturating_sub(CONNECTION_GRACE);
            supervisor.stop(grace).await
        };
        let (in_time, adapters_in_time, late_replications) = tokio::join!(heartbeats, adapters, replications);
        if !in_time {
            late.push("heartbeats".to_owned());
        }
        if !adapters_in_time {
            late.push("adapters".to_owned());
        }
        late.extend(late_replications.into_iter().map(|id| format!("replication `{id}`")));
        if let Some(driver) = self.driver {
            driver.stop().await;
        }
        let connected = self.client.connection_state() == async_nats::connection::State::Connected;
        let close = async {
            self.events.flush().await;
            let _ = self.client.drain().await;
        };
        if connected && timeout_at(end, close).await.is_err() {
            late.push("control connection".to_owned());
        }
        if let Some(monitor) = self.monitor {
            monitor.stop().await;
        }
        late
    }
}

/// The parts that need the buckets, started.
struct Parts {
    leases: Leases,
    driver: Driver,
    handle: supervisor::Handle,
    supervisor: Supervisor,
    heartbeats: heartbeat::HeartbeatHandle,
    runner: heartbeat::Runner,
    /// The site record of the configuration bucket as it changes.
    site_record: watch::Receiver<Option<Stored>>,
}

/// Starts the leases, the supervisor and the heartbeats.
fn start_parts(
    settings: &AppSettings,
    rules: &AllowList,
    buckets: &Buckets,
    (events, traces): (&Events, &Traces),
) -> Parts {
    let AppSettings { site, instance, standalone, .. } = settings;
    let (site_updates, site_record) = watch::channel(None);
    let (heartbeat_updates, stored) = watch::channel(None);
    let identity = ProcessIdentity::own(instance.clone(), host_name(), names::VERSION.to_owned());
    let Buckets { leases, positions, .. } = buckets.clone();
    let (leases, driver) = lease::start(leases, positions, identity, settings.lease_ttl, *standalone);
    let deps = Deps {
        site: site.clone(),
        instance: instance.clone(),
        installation: buckets.installation.clone(),
        own_streams: buckets.streams.clone(),
        standalone: *standalone,
        rules: rules.clone(),
        config: buckets.config.clone(),
        positions: buckets.positions.clone(),
        leases: leases.clone(),
        senders: buckets.senders.clone(),
        events: events.clone(),
        traces: traces.clone(),
        state_store: settings.state_store.clone(),
        budget: Budget::new(READ_AHEAD),
        heartbeats: heartbeat_updates,
        site_record: site_updates,
    };
    // A token of its own: the service has to refuse requests before the replications stop.
    let (handle, supervisor) = supervisor::start(deps, &CancellationToken::new());
    let (heartbeats, runner) = heartbeat::start(heartbeat::HeartbeatDeps {
        site: site.clone(),
        instance: instance.clone(),
        host: display_host(instance),
        rules: settings.rules.clone(),
        config: buckets.config.clone(),
        stored,
        file: settings.heartbeats.clone(),
        events: events.clone(),
    });
    Parts { leases, driver, handle, supervisor, heartbeats, runner, site_record }
}

fn control_config(
    settings: &AppSettings,
    rules: &AllowList,
    drift: Option<watch::Sender<Arc<GroupDrift>>>,
) -> control::ControlConfig {
    control::ControlConfig {
        prefix: settings.prefix.clone(),
        site: settings.site.clone(),
        instance: settings.instance.clone(),
        version: names::VERSION.to_owned(),
        rules: rules.clone(),
        read_only: settings.read_only,
        drift,
    }
}

/// Logs that the service is ready, and warns if it may open too few files.
fn report_ready(settings: &AppSettings, replications: usize) {
    let AppSettings { site, instance, prefix, bucket_prefix: buckets, .. } = settings;
    let server = settings.server.to_string();
    info!(site, instance, server, prefix, buckets, replications, "ready");
    files::check_limit(replications);
}

/// Name of this host, or else of the instance.
fn display_host(instance: &str) -> String {
    Some(host_name()).filter(|host| !host.is_empty()).unwrap_or_else(|| instance.to_owned())
}

/// Name of this host, as far as it is known.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| env::var("HOSTNAME").ok());
    name.unwrap_or_default().trim().to_owned()
}

/// Tries until it works or everything stops; each distinct error is logged once.
async fn persist<T, E: Display>(
    what: &str,
    stop: &CancellationToken,
    attempt: impl AsyncFn() -> Result<T, E>,
) -> Option<T> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut logged = String::new();
    let tries = async {
        loop {
            let error = match attempt().await {
                Ok(done) => return done,
                Err(error) => error.to_string(),
            };
            if error != logged {
                warn!("{what}, trying again: {error}");
                logged = error;
            }
            sleep(backoff.next(rand::random())).await;
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        done = tries => Some(done),
    }
}
