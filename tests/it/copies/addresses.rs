//! Control connections to names with several addresses of which the first says nothing. The connect timeout is longer than any
//! test waits: who waits for one address is never connected.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{CertificateParams, KeyPair};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinHandle,
};

use crate::harness::{
    LIMIT, Outgoing, Raw, Role, Server, connect,
    process::{HOSTS, Process, RESOLV, with_file},
    raw::wait_messages,
    request,
    server::free_port,
    service::binary,
    wait_for, wait_value,
};

const NAME: &str = "several.test";
const MUTE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
const SILENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
const GOOD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 5);

/// Passes on what comes to the good address, and leaves the mute one without an answer.
async fn addresses(to: u16) -> Result<(u16, JoinHandle<()>, TcpListener)> {
    let port = free_port()?;
    let (good, mute) = (TcpListener::bind((GOOD, port)).await?, TcpListener::bind((MUTE, port)).await?);
    let passes = tokio::spawn(async move {
        while let Ok((mut client, _)) = good.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    Ok((port, passes, mute))
}

/// A server, and a name of which one address leads to it.
struct Named {
    folder: tempfile::TempDir,
    url: String,
    ca: Option<String>,
    _passes: Passes,
    _mute: TcpListener,
}

/// Ends with its owner.
struct Passes(JoinHandle<()>);

impl Drop for Passes {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Named {
    /// `None` where the system does not let a test give addresses to a name.
    async fn new(scheme: &str, to: u16, ca: Option<&Path>) -> Result<Option<Self>> {
        let folder = tempfile::tempdir()?;
        let hosts = folder.path().join("hosts");
        fs::write(&hosts, format!("127.0.0.1 localhost\n{MUTE} {NAME}\n{GOOD} {NAME}\n"))?;
        if with_file(&hosts, HOSTS).is_none() {
            println!("not run: this system does not let a test give addresses to a name");
            return Ok(None);
        }
        let (port, passes, mute) = addresses(to).await?;
        let url = format!("{scheme}://{NAME}:{port}?connect_timeout=10m");
        let ca = ca.map(|ca| ca.display().to_string());
        Ok(Some(Self { folder, url, ca, _passes: Passes(passes), _mute: mute }))
    }

    /// Runs the program where the name has its addresses.
    fn run(&self, arguments: &[&str], log: &str) -> Result<Process> {
        let hosts = self.folder.path().join("hosts");
        let mut command = with_file(&hosts, HOSTS).context("no way to give addresses to a name")?;
        command.arg(binary()?).args(arguments).args(["--server", &self.url]);
        self.ca.iter().for_each(|ca| _ = command.args(["--tlsca", ca]));
        Process::spawn(&mut command, &self.folder.path().join(log))
    }

    /// Runs a command; whether it succeeded.
    async fn command(&self, log: &str) -> Result<bool> {
        let mut command = self.run(&["status", "--json"], log)?;
        let ended = async || command.exited().map(|status| status.success());
        wait_value("the command to end", LIMIT, ended).await.with_context(|| self.log(log))
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }
}

/// A service and a command reach a server by the name, and the service does again after the server was away.
async fn reached(mut server: Server, scheme: &str, to: u16, ca: Option<&Path>) -> Result<()> {
    let Some(named) = Named::new(scheme, to, ca).await? else { return Ok(()) };
    let _service = named.run(&["serve", "--name", "TEST"], "service")?;
    let client = connect(&server.url()).await?;
    let ready = async || request(&client, "replicator.status", Value::Null).await.is_ok();
    wait_for("the service by its control connection", LIMIT, ready).await.with_context(|| named.log("service"))?;
    assert!(named.command("command").await?, "{}", named.log("command"));
    server.restart().await?;
    wait_for("the service after a restart", LIMIT, ready).await.with_context(|| named.log("service"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mute_address_costs_no_connect_timeout() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let port = server.port();
    reached(server, "nats", port, None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_reach_an_address_that_is_not_the_first() -> Result<()> {
    let port = free_port()?;
    let config = format!("websocket {{ host: \"127.0.0.1\", port: {port}, no_tls: true }}");
    reached(Server::builder(Role::Source).config(&config).start().await?, "ws", port, None).await
}

/// A server with a certificate for one name; its port for websockets, and the certificate.
async fn certified(folder: &Path, name: &str) -> Result<(Server, u16, PathBuf)> {
    let (certificate, key) = (folder.join("server.pem"), folder.join("server.key"));
    let pair = KeyPair::generate()?;
    fs::write(&certificate, CertificateParams::new(vec![name.to_owned()])?.self_signed(&pair)?.pem())?;
    fs::write(&key, pair.serialize_pem())?;
    let port = free_port()?;
    let tls = format!("tls {{ cert_file: {certificate:?}, key_file: {key:?} }}");
    let config = format!("websocket {{ host: \"127.0.0.1\", port: {port}, {tls} }}");
    Ok((Server::builder(Role::Source).config(&config).start().await?, port, certificate))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_verified_for_the_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (server, port, certificate) = certified(folder.path(), NAME).await?;
    reached(server, "wss", port, Some(&certificate)).await
}

/// Also one for the address, which is not what was asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_other_names_are_refused() -> Result<()> {
    for other in ["other.test".to_owned(), GOOD.to_string()] {
        let folder = tempfile::tempdir()?;
        let (_server, port, certificate) = certified(folder.path(), &other).await?;
        let Some(named) = Named::new("wss", port, Some(&certificate)).await? else { return Ok(()) };
        assert!(!named.command("command").await?, "{other}: {}", named.log("command"));
    }
    Ok(())
}

/// A name server that takes questions and never answers; `None` where the system does not let a test be one.
async fn silent_name_server(folder: &Path) -> Result<Option<(UdpSocket, PathBuf)>> {
    let Ok(socket) = UdpSocket::bind((SILENT, 53)).await else { return Ok(None) };
    let file = folder.join("resolv.conf");
    // A lookup hangs for minutes.
    fs::write(&file, format!("nameserver {SILENT}\noptions timeout:30 attempts:5\n"))?;
    let Some(mut shell) = with_file(&file, RESOLV) else { return Ok(None) };
    let mut lookup = Process::spawn(shell.args(["getent", "ahosts", "hangs.test"]), &folder.join("lookup"))?;
    // Some systems do not ask the name servers of this file.
    let mut question = [0; 512];
    let asked = tokio::select! {
        question = socket.recv(&mut question) => question.is_ok(),
        _ = wait_for("the lookup to end", LIMIT, async || lookup.exited().is_some()) => false,
    };
    Ok(asked.then_some((socket, file)))
}

/// The service, a copy and a command get to the server that has an address; a stop waits for no lookup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_whose_lookup_hangs_delays_no_other_server() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some((_name_server, file)) = silent_name_server(folder.path()).await? else {
        println!("not run: this system does not let a test be a name server");
        return Ok(());
    };
    let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let url = |server: &Server| format!("nats://a.test:1,b.test:1,c.test:1,127.0.0.1:{}", server.port());
    let run = |arguments: &[&str], log: &str| -> Result<Process> {
        let mut command = with_file(&file, RESOLV).context("no way to replace a file")?;
        command.arg(binary()?).args(arguments).args(["--server", &url(&source)]);
        Process::spawn(&mut command, &folder.path().join(log))
    };
    let log = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    let mut service = run(&["serve", "--name", "TEST"], "service")?;
    let client = connect(&source.url()).await?;
    let ready = async || request(&client, "replicator.status", Value::Null).await.is_ok();
    wait_for("the service by its control connection", LIMIT, ready).await.with_context(|| log("service"))?;
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream("A", json!({"subjects": ["a"]})).await?;
    raw.publish(&Outgoing::new("a", "x")).await?;
    let document = json!({"stream": "A", "source_url": url(&source), "target_url": url(&target)});
    request(&client, "replicator.config.add", document).await?;
    let mut at_target = Raw::connect(&target.url()).await?;
    wait_messages(&mut at_target, "A", 1, LIMIT).await.with_context(|| log("service"))?;
    let mut command = run(&["status", "--json"], "command")?;
    let ended = async || command.exited().map(|status| status.success());
    assert!(wait_value("the command to end", LIMIT, ended).await?, "{}", log("command"));
    service.signal(Signal::TERM)?;
    let ended = async || service.exited().map(|status| status.success());
    assert!(wait_value("the service to end", LIMIT, ended).await?, "{}", log("service"));
    Ok(())
}
