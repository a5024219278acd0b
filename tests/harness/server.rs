//! A real nats-server on a loopback port of its own, with JetStream in a temporary folder.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;

use super::LIMIT;
use super::client::wait_value;
use super::process::{Process, Usage};

/// The version that is used when nothing else is said; `contrib/fetch-nats-server` fetches it.
pub const NEWEST: &str = "2.15.1";

/// Which side a server plays; each can run a version of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `NATS_SERVER_SOURCE`
    Source,
    /// `NATS_SERVER_TARGET`
    Target,
    /// `NATS_SERVER`
    Control,
}

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Builder {
    binary: PathBuf,
    name: String,
    domain: Option<String>,
    jetstream: bool,
    store_limit: Option<u64>,
    config: String,
    handshake_first: bool,
}

/// A server, running or stopped. It keeps its port and its store until it is dropped.
#[derive(Debug)]
pub struct Server {
    how: Builder,
    folder: TempDir,
    port: u16,
    process: Option<Process>,
    info: serde_json::Value,
}

impl Builder {
    /// Runs `target/nats-server/<version>/nats-server` whatever the role says.
    pub fn version(mut self, version: &str) -> Self {
        self.binary = fetched(version);
        self
    }

    /// `server_name`; unique by default.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// JetStream domain.
    pub fn domain(mut self, domain: &str) -> Self {
        self.domain = Some(domain.to_owned());
        self
    }

    /// A disk of so many bytes.
    pub fn store_limit(mut self, bytes: u64) -> Self {
        self.store_limit = Some(bytes);
        self
    }

    /// Leaves JetStream out of the generated configuration, so that [`Self::config`] may say it.
    pub fn without_jetstream(mut self) -> Self {
        self.jetstream = false;
        self
    }

    /// More lines for the configuration file: users, accounts, TLS, leafnodes, `max_payload`, ...
    pub fn config(mut self, text: &str) -> Self {
        self.config.push_str(text);
        self.config.push('\n');
        self
    }

    /// The server says nothing before the TLS handshake, so readiness is an open port.
    pub fn handshake_first(mut self) -> Self {
        self.handshake_first = true;
        self
    }

    /// Starts it and waits until it takes connections.
    pub async fn start(self) -> Result<Server> {
        ensure!(
            self.binary.exists() || self.binary.components().count() == 1,
            "there is no {}: run contrib/fetch-nats-server",
            self.binary.display()
        );
        let mut last = anyhow!("no free port");
        // Between the probe and the start somebody else may take the port.
        for _ in 0..10 {
            let folder = tempfile::Builder::new().prefix("nats-").tempdir()?;
            let port = free_port()?;
            let mut server = Server { how: self.clone(), folder, port, process: None, info: serde_json::Value::Null };
            match server.restart().await {
                Ok(()) => return Ok(server),
                Err(e) if server.log().contains("address already in use") => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }
}

impl Server {
    /// A server for `role`, to be refined.
    pub fn builder(role: Role) -> Builder {
        let name = format!("{role:?}-{}", nuid::next()).to_lowercase();
        let (config, domain) = (String::new(), None);
        let binary = binary(role);
        Builder { binary, name, domain, jetstream: true, store_limit: None, config, handshake_first: false }
    }

    /// A plain server with JetStream.
    pub async fn start(role: Role) -> Result<Self> {
        Self::builder(role).start().await
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The URL with credentials in it: `user:password` or a token.
    pub fn url_as(&self, credentials: &str) -> String {
        format!("nats://{credentials}@127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn name(&self) -> &str {
        &self.how.name
    }

    /// Version that the server itself reports, for example `2.15.1`.
    pub fn version(&self) -> &str {
        self.info["version"].as_str().unwrap_or_default()
    }

    /// Whether it is at least `major.minor`.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.version().split('.').map(|p| p.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
    }

    /// Pid of the running process.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn usage(&self) -> Usage {
        self.process.as_ref().map(Process::usage).unwrap_or_default()
    }

    /// What the server wrote to its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join("log")).unwrap_or_default()).into_owned()
    }

    pub fn store_dir(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// The folder of this server, for certificates and the like.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the server is not running")?.kill()
    }

    /// SIGTERM, and waits until it is gone.
    pub async fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the server is not running")?;
        process.terminate(LIMIT).await?;
        Ok(())
    }

    /// Starts again on the same port with the same store; a running server is stopped first.
    pub async fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            self.stop().await?;
        }
        let config = self.folder.path().join("nats.conf");
        fs::write(&config, self.config_text())?;
        let log = self.folder.path().join("log");
        self.process = Some(Process::spawn(Command::new(&self.how.binary).arg("-c").arg(&config), &log)?);
        self.wait_ready().await
    }

    /// Starts again with other configuration lines.
    pub async fn restart_with(&mut self, config: &str) -> Result<()> {
        config.clone_into(&mut self.how.config);
        self.restart().await
    }

    /// Starts again as another version, with the same store: an upgrade or a downgrade.
    pub async fn restart_as(&mut self, version: &str) -> Result<()> {
        self.how.binary = fetched(version);
        self.restart().await
    }

    /// Starts again with a disk of so many bytes.
    pub async fn restart_with_store_limit(&mut self, bytes: u64) -> Result<()> {
        self.how.store_limit = Some(bytes);
        self.restart().await
    }

    /// SIGHUP with other configuration lines: the server continues and applies them.
    pub async fn reload_with(&mut self, config: &str) -> Result<()> {
        config.clone_into(&mut self.how.config);
        fs::write(self.folder.path().join("nats.conf"), self.config_text())?;
        let reloads = || self.log().matches("Reloaded server configuration").count();
        let before = reloads();
        self.process.as_ref().context("the server is not running")?.signal(Signal::HUP)?;
        super::client::wait_for("the server to reload", LIMIT, async || reloads() > before).await
    }

    /// SIGSTOP: connections stay, nothing moves.
    pub fn freeze(&self) -> Result<()> {
        self.process.as_ref().context("the server is not running")?.freeze()
    }

    /// SIGCONT
    pub fn thaw(&self) -> Result<()> {
        self.process.as_ref().context("the server is not running")?.signal(Signal::CONT)
    }

    /// Copies the store of the stopped server under `name`.
    pub fn snapshot(&self, name: &str) -> Result<()> {
        ensure!(self.process.is_none(), "stop the server before a snapshot");
        let copy = self.folder.path().join("snapshots").join(name);
        remove_folder(&copy)?;
        copy_folder(&self.store_dir(), &copy)
    }

    /// Puts a snapshot back while the server is stopped: a disk that was restored from a backup.
    pub fn rollback(&self, name: &str) -> Result<()> {
        ensure!(self.process.is_none(), "stop the server before a rollback");
        remove_folder(&self.store_dir())?;
        copy_folder(&self.folder.path().join("snapshots").join(name), &self.store_dir())
    }

    /// Stops gracefully, keeps a snapshot, and starts again.
    pub async fn keep(&mut self, name: &str) -> Result<()> {
        self.stop().await?;
        self.snapshot(name)?;
        self.restart().await
    }

    /// kill -9, and the store of a snapshot when it is back.
    pub async fn put_back(&mut self, name: &str) -> Result<()> {
        self.kill()?;
        self.rollback(name)?;
        self.restart().await
    }

    /// Empties the store of the stopped server: a disk that was lost.
    pub fn wipe(&self) -> Result<()> {
        ensure!(self.process.is_none(), "stop the server before its store is removed");
        remove_folder(&self.store_dir())
    }

    fn config_text(&self) -> String {
        let Builder { name, domain, jetstream, config, .. } = &self.how;
        let mut text = format!("host: \"127.0.0.1\"\nport: {}\nserver_name: \"{name}\"\n", self.port);
        if *jetstream {
            let domain = domain.as_ref().map(|d| format!("domain: \"{d}\"")).unwrap_or_default();
            let limit = self.how.store_limit.map(|bytes| format!("max_file_store: {bytes}")).unwrap_or_default();
            let store = self.store_dir();
            text += &format!("jetstream {{\n  store_dir: \"{}\"\n  {limit}\n  {domain}\n}}\n", store.display());
        }
        text + config
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let (port, first) = (self.port, self.how.handshake_first);
        let process = self.process.as_mut().context("the server is not running")?;
        let probe = async || match (process.exited(), info(port, first).await) {
            (Some(status), _) => Some(Err(anyhow!("nats-server ended with {status}"))),
            (None, found) => found.map(Ok),
        };
        let found = wait_value("nats-server to take connections", LIMIT, probe).await.and_then(|r| r);
        let found = found.map_err(|e| anyhow!("{e}\n{}", process.tail(20)))?;
        // Our process lives, but is it the one that answers on this port?
        if let Some(name) = found["server_name"].as_str()
            && name != self.how.name
        {
            bail!("port {port} belongs to server `{name}`: address already in use");
        }
        self.info = found;
        Ok(())
    }
}

/// What a server says first; `{}` when it waits for TLS.
async fn info(port: u16, handshake_first: bool) -> Option<serde_json::Value> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
    if handshake_first {
        return Some(serde_json::json!({}));
    }
    let mut line = String::new();
    let mut stream = BufReader::new(stream);
    tokio::time::timeout(Duration::from_secs(2), stream.read_line(&mut line)).await.ok()?.ok()?;
    serde_json::from_str(line.strip_prefix("INFO ")?).ok()
}

/// A port that nobody listens on, and that no test beside was given. Not from the range that the system gives to outgoing
/// connections: a client that tries to reconnect to a stopped server there can be given that very port and talk to itself.
pub fn free_port() -> io::Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(10_000..32_000);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        if free && GIVEN.lock().expect("ports").insert(port) {
            return Ok(port);
        }
    }
}

/// The program that a server of this role runs.
pub fn binary(role: Role) -> PathBuf {
    let specific = match role {
        Role::Source => "NATS_SERVER_SOURCE",
        Role::Target => "NATS_SERVER_TARGET",
        Role::Control => "NATS_SERVER",
    };
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set(specific).or_else(|| set("NATS_SERVER")).or_else(on_path).unwrap_or_else(|| fetched(NEWEST))
}

fn on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("nats-server")).find(|file| file.is_file())
}

/// Where `contrib/fetch-nats-server` puts a version.
pub fn fetched(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/nats-server").join(version).join("nats-server")
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
