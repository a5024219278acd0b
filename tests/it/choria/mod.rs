//! The files of Choria's replicator, run as they are: `replicate`.

mod adapters;
mod broker;
mod files;
mod fleet;
mod handover;
mod identities;
pub mod metrics;
mod old;
mod origin;
mod refused;
mod sampled;
mod signals;
mod takeover;
mod targets;
mod tls;
mod transfer;

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::harness::server::free_port;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Service, Stored, raw::wait_messages};

/// Two servers, and a folder for what a file names.
struct Place {
    source: Server,
    target: Server,
    folder: TempDir,
    port: u16,
}

impl Place {
    async fn start() -> Result<Self> {
        let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
        Ok(Self { source, target, folder: tempfile::tempdir()?, port: free_port()? })
    }

    async fn source(&self) -> Result<Raw> {
        Raw::connect(&self.source.url()).await
    }

    async fn target(&self) -> Result<Raw> {
        Raw::connect(&self.target.url()).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// One of the files in `yaml/`, with our servers, ports and folders in the place of the invented ones.
    fn file(&self, name: &str) -> Result<PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/choria/yaml").join(format!("{name}.yaml"));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let folder = self.folder.path().display().to_string();
        let text = text
            .replace("east.acme.example:4222", &format!("127.0.0.1:{}", self.source.port()))
            .replace("east2.acme.example:4222", &format!("127.0.0.1:{}", self.source.port()))
            .replace("broker.acme.example:4222", &format!("127.0.0.1:{}", self.source.port()))
            .replace("hub.acme.example:4222", &format!("127.0.0.1:{}", self.target.port()))
            .replace("/etc/stream-replicator/tls", &folder)
            .replace("/etc/stream-replicator", &folder)
            .replace("/var/log", &folder)
            .replace("/var/lib", &folder);
        let lines = text.lines().map(|line| match line.strip_prefix("monitor_port:") {
            Some(_) => format!("monitor_port: {}", self.port),
            None => line.to_owned(),
        });
        self.write(&lines.collect::<Vec<_>>().join("\n"))
    }

    fn write(&self, text: &str) -> Result<PathBuf> {
        let path = self.path("sr.yaml");
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Runs one of the files.
    fn run(&self, name: &str) -> Result<Service> {
        Service::replicate(&self.file(name)?).spawn()
    }

    /// A document of the file's form for stream `S`, which is on `s.>`.
    fn stream(&self, more: &str) -> String {
        let (source, target) = (self.source.url(), self.target.url());
        format!("  - stream: S\n    source_url: {source}\n    target_url: {target}\n{more}")
    }

    fn log(&self) -> io::Result<String> {
        fs::read_to_string(self.path("stream-replicator.log"))
    }
}

/// Messages with the payloads `from` to `to` on the subjects `<prefix>.<i % 3>`.
fn messages(prefix: &str, from: u64, to: u64) -> impl Iterator<Item = Outgoing> {
    (from..=to).map(move |i| Outgoing::new(format!("{prefix}.{}", i % 3), i.to_string()))
}

async fn copied(raw: &mut Raw, stream: &str, count: u64, service: &Service) -> Result<Vec<Stored>> {
    wait_messages(raw, stream, count, LIMIT).await.with_context(|| service.log())?;
    raw.read_stream(stream).await
}
