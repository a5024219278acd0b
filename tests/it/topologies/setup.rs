//! A folder of `contrib/topologies` as it runs, with other ports than its files say.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::process::Process;
use crate::harness::server::{binary, free_port};
use crate::harness::{LIMIT, Raw, Role, Service, connect, request, wait_value, wait_while_moving};

/// Where the topologies are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/topologies")
}

/// The files of a topology with this extension: their names without it, and their texts.
pub fn files(topology: &str, extension: &str) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder().join(topology))? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            found.insert(name, fs::read_to_string(&path)?);
        }
    }
    Ok(found)
}

/// Ports of its own for those in the files.
#[derive(Debug, Default)]
struct Ports(BTreeMap<String, u16>);

impl Ports {
    /// Replaces all numbers of four digits: they are ports.
    fn replace(&mut self, text: &str) -> Result<String> {
        let (mut out, mut rest) = (String::new(), text);
        while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
            let (before, digits) = rest.split_at(at);
            let (number, after) = digits.split_at(digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len()));
            out += before;
            if number.len() == 4 {
                let port = match self.0.get(number) {
                    Some(port) => *port,
                    None => *self.0.entry(number.to_owned()).or_insert(free_port()?),
                };
                out += &port.to_string();
            } else {
                out += number;
            }
            rest = after;
        }
        Ok(out + rest)
    }
}

/// One of its servers.
#[derive(Debug)]
struct Node {
    url: String,
    process: Option<Process>,
}

/// All of it; ends when dropped.
pub struct Topology {
    name: String,
    work: TempDir,
    ports: Ports,
    servers: BTreeMap<String, Node>,
    /// By the names of instances.
    instances: BTreeMap<String, Service>,
    control: String,
    documents: Vec<Value>,
}

impl Topology {
    /// Starts the servers, makes the streams, starts the instances and adds the documents.
    pub async fn start(name: &str) -> Result<Self> {
        let work = tempfile::Builder::new().prefix("topology-").tempdir()?;
        let mut new = Self {
            name: name.to_owned(),
            work,
            ports: Ports::default(),
            servers: BTreeMap::new(),
            instances: BTreeMap::new(),
            control: String::new(),
            documents: Vec::new(),
        };
        new.start_servers().await?;
        for (file, text) in files(name, "stream")? {
            let (server, stream) = file.split_once('.').context("a stream's file is named <server>.<STREAM>")?;
            let config: Value = serde_json::from_str(&text)?;
            new.raw(server).await?.api(&format!("STREAM.CREATE.{stream}"), config).await?;
        }
        new.start_instances().await?;
        let client = new.client().await?;
        for (_, text) in files(name, "replication")? {
            let document: Value = serde_json::from_str(&new.ports.replace(&text)?)?;
            request(&client, "replicator.config.add", document.clone()).await?;
            new.documents.push(document);
        }
        Ok(new)
    }

    async fn start_servers(&mut self) -> Result<()> {
        for (server, text) in files(&self.name, "conf")? {
            let text = self.ports.replace(&text)?;
            let port = text.lines().find_map(|line| line.strip_prefix("port: ")).context("a port")?.to_owned();
            fs::write(self.work.path().join(format!("{server}.conf")), text)?;
            self.servers.insert(server.clone(), Node { url: format!("nats://127.0.0.1:{port}"), process: None });
            self.restart(&server).await?;
        }
        Ok(())
    }

    async fn start_instances(&mut self) -> Result<()> {
        let text = fs::read_to_string(folder().join(&self.name).join("instances"))?;
        for line in self.ports.replace(&text)?.lines() {
            let arguments: Vec<_> = line.split(' ').collect();
            let after = |flag: &str| {
                let at = arguments.iter().position(|argument| *argument == flag)?;
                arguments.get(at + 1).map(|value| (*value).to_owned())
            };
            self.control = after("--server").context("a control server")?;
            let instance = after("--instance").context("a name")?;
            let service = Service::with_arguments(std::iter::once("serve").chain(arguments.iter().copied()));
            self.instances.insert(instance, service.start().await?);
        }
        Ok(())
    }

    /// The names of all servers and instances.
    pub fn parts(&self) -> Vec<String> {
        self.servers.keys().chain(self.instances.keys()).cloned().collect()
    }

    /// Kills a server or an instance with SIGKILL.
    pub fn kill(&mut self, part: &str) -> Result<()> {
        if let Some(service) = self.instances.get_mut(part) {
            return service.kill();
        }
        let node = self.servers.get_mut(part).context("no such part")?;
        node.process.take().context("it does not run")?.kill()
    }

    /// Starts it again.
    pub async fn restart(&mut self, part: &str) -> Result<()> {
        if let Some(service) = self.instances.get_mut(part) {
            return service.restart().await;
        }
        let work = self.work.path();
        let node = self.servers.get_mut(part).context("no such part")?;
        let mut command = Command::new(binary(Role::Control));
        command.arg("-c").arg(work.join(format!("{part}.conf"))).arg("-sd").arg(work.join(part));
        node.process = Some(Process::spawn(&mut command, &work.join(format!("{part}.log")))?);
        let url = node.url.clone();
        let is_up = async || Raw::connect(&url).await.ok()?.api("INFO", Value::Null).await.ok();
        wait_value(&format!("server `{part}`"), LIMIT, is_up).await.with_context(|| self.logs())?;
        Ok(())
    }

    /// A connection to a server.
    pub async fn raw(&self, server: &str) -> Result<Raw> {
        Raw::connect(&self.servers.get(server).context("no such server")?.url).await
    }

    /// A client of the control server.
    pub async fn client(&self) -> Result<async_nats::Client> {
        connect(&self.control).await
    }

    /// The document in the README of the topology.
    pub fn document_of_readme(&mut self) -> Result<Value> {
        let text = fs::read_to_string(folder().join(&self.name).join("README.md"))?;
        let (_, block) = text.split_once("```json\n").context("a document")?;
        let (document, _) = block.split_once("```").context("its end")?;
        Ok(serde_json::from_str(&self.ports.replace(document)?)?)
    }

    /// Waits until every replication has settled all messages of its source; nothing may happen for this long at most.
    pub async fn settled_within(&self, limit: Duration) -> Result<()> {
        let client = self.client().await?;
        let probe = async || {
            let reply = request(&client, "replicator.status", json!({})).await.unwrap_or_default();
            let rows = reply["replications"].as_array().cloned().unwrap_or_default();
            let mut positions = Vec::new();
            let mut all = rows.len() == self.documents.len();
            for document in &self.documents {
                let stream = document["stream"].as_str().unwrap_or_default();
                let id = match document["name"].as_str() {
                    Some(name) => format!("{stream}.{name}"),
                    None => stream.to_owned(),
                };
                let row = rows.iter().find(|row| row["replication"] == id.as_str()).cloned().unwrap_or_default();
                let last = last_seq(document, stream).await;
                let position = row["position"]["source_seq"].clone();
                all &= row["state"] == "running" && last.is_some() && position.as_u64() == last;
                positions.push(format!("{id} {} {position} of {last:?}", row["state"]));
            }
            if all { Ok(()) } else { Err(positions) }
        };
        wait_while_moving("all replications to settle everything", limit, probe).await.with_context(|| self.logs())
    }

    /// What the instances have logged.
    pub fn logs(&self) -> String {
        self.instances.values().map(Service::logs).collect()
    }
}

/// Last sequence of the source of a document.
async fn last_seq(document: &Value, stream: &str) -> Option<u64> {
    let raw = Raw::connect(document["source_url"].as_str()?).await.ok()?;
    let mut raw = match document["source_domain"].as_str() {
        Some(domain) => raw.with_api(&format!("$JS.{domain}.API")),
        None => raw,
    };
    raw.stream_state(stream).await.ok()?["last_seq"].as_u64()
}
