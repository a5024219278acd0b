//! Peers that lie: servers that name other servers, hosts of which some addresses are dead, secrets in the wrong fields,
//! and people who change a document at the same moment.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nats_lane::{Connection, Endpoint, Lane};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use crate::harness::{
    Cli, LIMIT, Outgoing, Role, Server, Service, Site,
    client::{Reply, refused, request},
    connect,
    process::{HOSTS, Process, with_file},
    raw::wait_messages,
    secrets,
    server::free_port,
    service::binary,
    site::merged,
    wait_for,
};

/// A server that nobody named. It notes the first line of everybody who comes.
struct Trap {
    port: u16,
    said: Arc<Mutex<Vec<String>>>,
    accept: JoinHandle<()>,
}

impl Trap {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let said = Arc::new(Mutex::new(Vec::new()));
        let notes = said.clone();
        let accept = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let notes = notes.clone();
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let info =
                        json!({"server_id": "trap", "version": "2.14.6", "max_payload": 1 << 20, "headers": true});
                    let _ = stream.write_all(format!("INFO {info}\r\n").as_bytes()).await;
                    let mut line = String::new();
                    let _ = timeout(LIMIT, stream.read_line(&mut line)).await;
                    notes.lock().expect("notes").push(line);
                });
            }
        });
        Ok(Self { port, said, accept })
    }

    fn said(&self) -> Vec<String> {
        self.said.lock().expect("notes").clone()
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

/// A server that names a trap as another server of its cluster.
struct Liar {
    port: u16,
    accepted: Arc<AtomicU64>,
    cut: watch::Sender<bool>,
    accept: JoinHandle<()>,
}

impl Liar {
    async fn start(server: &Server, trap: &Trap) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (accepted, (cut, ended)) = (Arc::new(AtomicU64::new(0)), watch::channel(false));
        let (count, to) = (accepted.clone(), server.port());
        let urls = json!([format!("127.0.0.1:{}", trap.port), format!("nats://127.0.0.1:{}", trap.port)]);
        let accept = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let (urls, mut ended) = (urls.clone(), ended.clone());
                if *ended.borrow() {
                    continue;
                }
                tokio::spawn(async move {
                    tokio::select! {
                        _ = Self::lie(client, to, urls) => {}
                        _ = ended.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Ok(Self { port, accepted, cut, accept })
    }

    async fn lie(mut client: TcpStream, to: u16, urls: Value) -> Result<()> {
        let mut server = BufReader::new(TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?);
        let mut line = String::new();
        server.read_line(&mut line).await?;
        let mut info: Value = serde_json::from_str(line.strip_prefix("INFO ").context("no INFO")?)?;
        info["connect_urls"] = urls;
        client.write_all(format!("INFO {info}\r\n").as_bytes()).await?;
        copy_bidirectional(&mut client, &mut server).await?;
        Ok(())
    }

    fn url(&self, login: &str) -> String {
        format!("nats://{login}127.0.0.1:{}", self.port)
    }

    fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Lets nobody in any more and waits until somebody has tried again so often.
    async fn fail(&self, times: u64) -> Result<()> {
        let before = self.accepted();
        self.cut.send_replace(true);
        wait_for("attempts to connect again", LIMIT, async || self.accepted() >= before + times).await
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.accept.abort();
    }
}

/// A server that delivers messages under another subject of the same length than the one that they are stored under.
async fn renaming(server: &Server, from: &'static str, to: &'static str) -> Result<(u16, JoinHandle<()>)> {
    ensure!(from.len() == to.len(), "the sizes in protocol lines stay as they are");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let (port, server) = (listener.local_addr()?.port(), server.port());
    let accept = tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await?;
                let ((mut from_server, mut to_server), (mut from_client, mut to_client)) =
                    (stream.into_split(), client.into_split());
                let requests = tokio::io::copy(&mut from_client, &mut to_server);
                let answers = async {
                    let mut buffer = vec![0; 1 << 16];
                    loop {
                        let count = from_server.read(&mut buffer).await?;
                        if count == 0 {
                            return std::io::Result::Ok(());
                        }
                        let mut bytes = buffer[..count].to_vec();
                        while let Some(at) = bytes.windows(from.len()).position(|part| part == from.as_bytes()) {
                            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
                        }
                        to_client.write_all(&bytes).await?;
                    }
                };
                tokio::select! {
                    _ = requests => {}
                    _ = answers => {}
                }
                std::io::Result::Ok(())
            });
        }
    });
    Ok((port, accept))
}

/// A site whose users log in everywhere, and the login.
async fn guarded(control: Option<Server>) -> Result<(Site, String)> {
    let password = secrets::secret();
    let users = format!("authorization {{ users: [{{user: u, password: {password}}}] }}");
    let start = async |role| Server::builder(role).config(&users).start().await;
    let (source, target) = tokio::try_join!(start(Role::Source), start(Role::Target))?;
    let control = match control {
        Some(control) => control,
        None => Server::start(Role::Control).await?,
    };
    let site = Site::builder().on(source, target).control(control).start().await?;
    Ok((site, format!("u:{password}@")))
}

/// The control connection, and the heartbeats, whose login is in a document.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_and_heartbeats_follow_no_discovered_server() -> Result<()> {
    let (site, login) = guarded(None).await?;
    let trap = Trap::start().await?;
    let (control, target) = tokio::try_join!(Liar::start(site.control(), &trap), Liar::start(&site.target, &trap))?;
    // A second service whose control server lies.
    let service = Service::builder(&control.url(""), "OTHER").args(["--prefix", "other", "--bucket-prefix", "OTHER"]);
    let service = service.start().await?;
    let client = connect(&site.control().url()).await?;
    let mut raw = crate::harness::Raw::connect(&site.target.url_as(login.trim_end_matches('@'))).await?;
    raw.create_stream("HB", json!({"subjects": ["hb"]})).await?;
    let heartbeats = json!({"url": target.url(&login), "interval": "200ms", "subjects": [{"subject": "hb"}]});
    request(&client, "other.heartbeat.set", heartbeats).await?;
    wait_messages(&mut raw, "HB", 2, LIMIT).await.with_context(|| service.log())?;
    target.fail(4).await.with_context(|| service.log())?;
    control.fail(4).await.with_context(|| service.log())?;
    assert_eq!(trap.said(), [""; 0], "{}", service.log());
    Ok(())
}

/// The connections of documents: copies with dead letters, election, preflight; by URL and by context.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_follow_no_discovered_server() -> Result<()> {
    let (site, login) = guarded(None).await?;
    let trap = Trap::start().await?;
    let (source, target, hub) = tokio::try_join!(
        Liar::start(&site.source, &trap),
        Liar::start(&site.target, &trap),
        Liar::start(&site.source, &trap)
    )?;
    let folder = tempfile::tempdir()?;
    let contexts = folder.path().join("nats/context");
    fs::create_dir_all(&contexts)?;
    fs::write(contexts.join("hub.json"), json!({"url": hub.url(&login)}).to_string())?;
    let service = Service::builder(&site.control().url(), "OTHER")
        .args(["--prefix", "other", "--bucket-prefix", "OTHER"])
        .env("XDG_CONFIG_HOME", &folder.path().display().to_string());
    let service = service.start().await?;

    let as_user = login.trim_end_matches('@');
    let mut raw = crate::harness::Raw::connect(&site.source.url_as(as_user)).await?;
    for (stream, config) in [
        ("A", json!({"subjects": ["a"]})),
        ("DEAD", json!({"subjects": ["dead"]})),
        (
            "KV_CHORIA_LEADER_ELECTION",
            json!({"subjects": ["$KV.CHORIA_LEADER_ELECTION.>"], "max_age": 3_000_000_000u64, "max_msgs_per_subject": 1,
                "allow_rollup_hdrs": true, "deny_delete": true, "discard": "new"}),
        ),
    ] {
        raw.create_stream(stream, config).await?;
    }
    let mut at_target = crate::harness::Raw::connect(&site.target.url_as(as_user)).await?;
    at_target.create_stream("A", json!({"subjects": ["a"], "max_msg_size": 1_000})).await?;
    raw.publish(&Outgoing::new("a", "x")).await?;
    raw.publish(&Outgoing::new("a", "x".repeat(2_000))).await?;
    let document = json!({"stream": "A", "source_url": source.url(&login), "target_url": target.url(&login),
        "on_reject": "dead_letter", "dead_letter": {"subject": "dead"}, "leader_election_name": "one"});
    let checked = request(&site.client, "other.config.validate", document.clone()).await?;
    assert_eq!(checked["valid"], true, "{checked}");
    request(&site.client, "other.config.add", document).await?;
    let by_context = json!({"stream": "A", "name": "hub", "source_context": "hub", "target_url": target.url(&login),
        "target_stream": "HUB", "target_subject_prefix": "hub"});
    request(&site.client, "other.config.add", by_context).await?;
    wait_messages(&mut raw, "DEAD", 1, LIMIT).await.with_context(|| service.log())?;
    wait_messages(&mut at_target, "HUB", 2, LIMIT).await.with_context(|| service.log())?;
    for liar in [&target, &source, &hub] {
        liar.fail(3).await.with_context(|| service.log())?;
    }
    let again = json!({"stream": "A", "name": "again", "source_url": source.url(&login), "target_url": target.url(&login),
        "target_stream": "AGAIN", "target_subject_prefix": "again"});
    let checked = request(&site.client, "other.config.validate", again).await?;
    assert_eq!(checked["valid"], false, "{checked}");
    assert_eq!(trap.said(), [""; 0], "{}", service.log());
    Ok(())
}

/// A command that lives long, and one that is short.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_follow_no_discovered_server() -> Result<()> {
    let site = Site::small().await?;
    let trap = Trap::start().await?;
    let liar = Liar::start(&site.source, &trap).await?;
    let cli = Cli::new(&liar.url(""));
    cli.ok(["status"]).await?;
    let before = liar.accepted();
    let follow = cli.start(["events", "--follow"], "")?;
    wait_for("the command to connect", LIMIT, async || liar.accepted() > before).await?;
    site.filled("A", 1).await?;
    site.add("A", json!({})).await?;
    wait_for("an event", LIMIT, async || !follow.shown().is_empty()).await?;
    liar.fail(4).await?;
    let ended = cli.run(["status", "--timeout", "1s"]).await?;
    assert_ne!(ended.code, Some(0), "{ended:?}");
    assert_eq!(trap.said(), [""; 0]);
    Ok(())
}

/// A websocket that is answered by a redirection is none, and nobody goes there.
#[tokio::test]
async fn a_redirected_websocket_is_not_followed() -> Result<()> {
    let site = Site::small().await?;
    let trap = Trap::start().await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let url = format!("ws://u:{}@127.0.0.1:{}", secrets::secret(), listener.local_addr()?.port());
    let (asked, port) = (Arc::new(AtomicU64::new(0)), trap.port);
    let count = asked.clone();
    let redirects = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let mut request = vec![0; 4096];
            let _ = stream.read(&mut request).await;
            let answer = format!("HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:{port}/\r\nContent-Length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    site.filled("A", 1).await?;
    site.add("A", json!({"target_url": url})).await?;
    site.send("heartbeat.set", json!({"url": url, "interval": "200ms", "subjects": [{"subject": "hb"}]})).await?;
    let told = |row: &Value| row["last_error"]["message"].as_str().is_some_and(|text| text.contains("no websocket"));
    site.row_when("A", "reports that there is no websocket", told).await?;
    wait_for("several attempts", LIMIT, async || asked.load(Ordering::SeqCst) >= 6).await?;
    redirects.abort();
    assert_eq!(trap.said(), [""; 0]);
    Ok(())
}

/// The target login may do everything, and the source delivers what the target would act on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_delivers_api_requests_is_held() -> Result<()> {
    let site = Site::small().await?;
    let mut target = site.target_stream("VICTIM", json!({})).await?;
    target.publish(&Outgoing::new("victim.a", "x")).await?;
    let (from, to) = ("s.aaaaaaaaaaaaaaaaaaaaaaaaaa", "$JS.API.STREAM.DELETE.VICTIM");
    let mut source = site.source_stream("S", json!({})).await?;
    source.publish(&Outgoing::new("s.1", "x")).await?;
    source.publish(&Outgoing::new(from, "")).await?;
    for (name, fields) in [("a", json!({"target_mode": "exclusive"})), ("b", json!({"target_mode": "shared"}))] {
        let (port, renames) = renaming(&site.source, from, to).await?;
        let stream = name.to_uppercase();
        let fields = merged(
            json!({"name": name, "target_stream": stream, "target_subject_remove": "",
            "source_url": format!("nats://127.0.0.1:{port}")}),
            fields,
        );
        site.target_stream(&stream, json!({"subjects": [format!("{name}.>"), "s.>"]})).await?;
        site.add("S", fields).await?;
        let held =
            |row: &Value| row["state"] == "held" && row["last_error"]["message"].to_string().contains("act on it");
        site.row_when(&format!("S.{name}"), "is held", held).await?;
        renames.abort();
        request(&site.client, "replicator.config.delete", json!({"replication": format!("S.{name}")})).await?;
        target.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
    }
    assert_eq!(target.stream_state("VICTIM").await?["messages"], 1);
    Ok(())
}

/// What a document gives to a server, that server has.
#[tokio::test]
async fn a_server_sees_the_login_that_is_used_there() -> Result<()> {
    let (site, trap) = (Site::small().await?, Trap::start().await?);
    let secret = secrets::secret();
    site.filled("A", 1).await?;
    site.add("A", json!({"target_url": format!("nats://u:{secret}@127.0.0.1:{}", trap.port)})).await?;
    wait_for("the login", LIMIT, async || trap.said().iter().any(|line| line.contains(&secret))).await?;
    Ok(())
}

/// Connections to it stay without an answer: the system accepts them, and no program does.
async fn mute(port: u16, address: Ipv4Addr) -> Result<TcpListener> {
    Ok(TcpListener::bind((address, port)).await?)
}

/// Connections to it are not even accepted; as far as a full queue makes the system drop them.
async fn full(port: u16, address: Ipv4Addr) -> Result<(TcpListener, Vec<TcpStream>)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, port).into())?;
    let listener = socket.listen(1)?;
    let mut waiting = Vec::new();
    for _ in 0..16 {
        match timeout(Duration::from_millis(100), TcpStream::connect((address, port))).await {
            Ok(stream) => waiting.push(stream?),
            Err(_) => break,
        }
    }
    Ok((listener, waiting))
}

#[tokio::test]
async fn each_address_of_a_name_has_its_own_attempt() -> Result<()> {
    let server = Server::builder(Role::Target).config("ping_interval: 10").start().await?;
    let connection = Connection::to(Endpoint::parse(&server.url()).map_err(anyhow::Error::msg)?);
    let host = connection.endpoint.hosts.first().context("a host")?.clone();
    let (mute, full) = (mute(0, Ipv4Addr::new(127, 0, 0, 3)).await?, full(free_port()?, Ipv4Addr::LOCALHOST).await?);
    let closed: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()?).into();
    let good: SocketAddr = (Ipv4Addr::LOCALHOST, server.port()).into();
    let (mute, swallows) = (mute.local_addr()?, full.0.local_addr()?);
    let within = connection.endpoint.connect_timeout;
    for addresses in [
        vec![good],
        vec![closed, good],
        vec![mute, good],
        vec![swallows, good],
        vec![swallows, mute, closed, good, mute],
        vec![mute; 8].into_iter().chain([good]).collect(),
    ] {
        let begun = tokio::time::Instant::now();
        let lane = Lane::try_addresses(&connection, &host, addresses.iter().copied(), "x").await;
        assert_eq!(lane?.info().version, server.version(), "{addresses:?}");
        // Nobody waited until one of them was given up.
        assert!(begun.elapsed() < within, "{addresses:?}: {:?}", begun.elapsed());
    }
    let short = Endpoint::parse(&format!("{}?connect_timeout=300ms", server.url())).map_err(anyhow::Error::msg)?;
    let failed = Lane::try_addresses(&Connection::to(short), &host, [mute, closed].into_iter(), "x").await;
    let error = failed.err().context("somebody let us in")?.message;
    assert!(error.starts_with("127.0.0.3: no answer within 300ms; 127.0.0.1: "), "{error}");
    Ok(())
}

/// Every kind of connection, to a name whose first and last address accept and say nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_with_mute_addresses_serves_every_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let hosts = folder.path().join("hosts");
    let names = ["127.0.0.1 localhost", "127.0.0.3 several.test", "127.0.0.5 several.test", "127.0.0.7 several.test"];
    fs::write(&hosts, names.join("\n") + "\n")?;
    if with_file(&hosts, HOSTS).is_none() {
        println!("not run: this system does not let a test give addresses to a name");
        return Ok(());
    }
    let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let (mut urls, mut tasks, mut holes) = (Vec::new(), Vec::new(), Vec::new());
    for server in [&source, &target] {
        let (port, to) = (free_port()?, server.port());
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 5), port)).await?;
        tasks.push(tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
                    copy_bidirectional(&mut client, &mut server).await
                });
            }
        }));
        for last in [3, 7] {
            holes.push(mute(port, Ipv4Addr::new(127, 0, 0, last)).await?);
        }
        urls.push(format!("nats://several.test:{port}"));
    }
    let run = |arguments: &[&str], log: &str| -> Result<Process> {
        let mut command = with_file(&hosts, HOSTS).context("no way to give addresses to a name")?;
        command.arg(binary()?).args(arguments);
        Process::spawn(&mut command, &folder.path().join(log))
    };
    let log = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    let _service = run(&["serve", "--server", &urls[0], "--name", "TEST"], "service")?;
    let client = connect(&source.url()).await?;
    let ready = async || request(&client, "replicator.status", Value::Null).await.is_ok();
    wait_for("the service by its control connection", LIMIT, ready).await.with_context(|| log("service"))?;
    let mut raw = crate::harness::Raw::connect(&source.url()).await?;
    raw.create_stream("A", json!({"subjects": ["a"]})).await?;
    raw.publish(&Outgoing::new("a", "x")).await?;
    let document = json!({"stream": "A", "source_url": urls[0], "target_url": urls[1]});
    let checked = request(&client, "replicator.config.validate", document.clone()).await?;
    assert_eq!(checked["valid"], true, "{checked}");
    request(&client, "replicator.config.add", document).await?;
    let mut at_target = crate::harness::Raw::connect(&target.url()).await?;
    wait_messages(&mut at_target, "A", 1, LIMIT).await.with_context(|| log("service"))?;
    at_target.create_stream("HB", json!({"subjects": ["hb"]})).await?;
    let heartbeats = json!({"url": urls[1], "interval": "200ms", "subjects": [{"subject": "hb"}]});
    request(&client, "replicator.heartbeat.set", heartbeats).await?;
    wait_messages(&mut at_target, "HB", 1, LIMIT).await.with_context(|| log("service"))?;
    let mut command = run(&["status", "--server", &urls[0]], "command")?;
    wait_for("the command to end", LIMIT, async || command.exited().is_some()).await?;
    assert!(log("command").contains("running"), "{}", log("command"));
    tasks.iter().for_each(JoinHandle::abort);
    Ok(())
}

/// A document was refused, and one of its problems says so.
#[track_caller]
fn problem(reply: &Reply, expect: &str) {
    let problems = &reply.body["error"]["problems"];
    let says = |problem: &Value| problem["message"].as_str().is_some_and(|text| text.contains(expect));
    assert!(reply.error == Some(400) && problems.as_array().is_some_and(|all| all.iter().any(says)), "{reply:?}");
}

#[tokio::test]
async fn a_stray_url_in_a_domain_is_refused_and_never_shown() -> Result<()> {
    let site = Site::small().await?;
    site.filled("A", 1).await?;
    let secret = secrets::secret();
    secrets::register(&secret);
    for field in ["source_domain", "target_domain", "source_api_prefix", "target_api_prefix"] {
        for stray in
            [format!("nats://u:{secret}@h"), format!("u:{secret}"), format!("{secret}@h"), format!("a/{secret}")]
        {
            let document = site.document_with("A", json!({field: stray}));
            let reply = site.send("config.add", document.clone()).await?;
            problem(&reply, "cannot contain `:`, `/` or `@`");
            site.send("config.validate", document.clone()).await?;
            // By hand the same.
            site.put("A", document.to_string()).await?;
            site.row_when("A", "is invalid", |row| row["state"] == "invalid").await?;
            site.ask("config.get", json!({"replication": "A"}).to_string()).await?;
        }
    }
    let heartbeats = json!({"url": "tls://h", "subjects": [{"subject": "hb"}],
        "choria": {"seed_file": "/s", "jwt_file": "/j", "collective": format!("u:{secret}@h")}});
    problem(&site.send("heartbeat.set", heartbeats).await?, "cannot contain `:`, `/` or `@`");
    secrets::check("the log", &site.service.log());
    Ok(())
}

/// Somebody stores a new password, and somebody else sends back what was shown before, at the same moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_is_not_undone_by_a_masked_update_beside_it() -> Result<()> {
    let site = Site::small().await?;
    let url = |secret: &str| format!("nats://u:{secret}@127.0.0.1:1");
    let document =
        |secret: &str, text: &str| merged(site.document("A"), json!({"target_url": url(secret), "description": text}));
    let heartbeats = |secret: &str, seconds: u64| json!({"url": url(secret), "interval": format!("{seconds}s"), "subjects": [{"subject": "hb"}]});
    site.send("config.add", document(&secrets::secret(), "")).await?;
    site.send("heartbeat.set", heartbeats(&secrets::secret(), 1)).await?;
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    let stored = async |key: &str, field: &str| -> Result<Value> {
        let value = bucket.get(key).await?.context("nothing is stored")?;
        Ok(serde_json::from_slice::<Value>(&value)?[field].clone())
    };
    for round in 2..42 {
        let secret = secrets::secret();
        let (one, other, three, four) = tokio::try_join!(
            site.send("config.update", document("***", &round.to_string())),
            site.send("config.update", document(&secret, "")),
            site.send("heartbeat.set", heartbeats("***", round)),
            site.send("heartbeat.set", heartbeats(&secret, 1)),
        )?;
        for reply in [one, other, three, four] {
            ensure!(reply.error.is_none(), "round {round}: {reply:?}");
        }
        assert_eq!(stored("A", "target_url").await?, url(&secret), "round {round}: the old password came back");
        assert_eq!(stored("heartbeats", "url").await?, url(&secret), "round {round}: the old password came back");
    }
    // Nor is a secret of what was deleted meanwhile brought back.
    let reply = site.send("config.add", document("***", "again")).await?;
    refused(&reply, 409, "update it");
    site.send("config.delete", json!({"replication": "A"})).await?;
    let reply = site.send("config.add", document("***", "again")).await?;
    problem(&reply, "none is stored");
    Ok(())
}

#[tokio::test]
async fn a_pattern_of_addresses_allows_no_name() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let site =
        Site::builder().control(control).args(["--allow-url", "127.0.*", "--allow-url", "nats-*"]).start().await?;
    site.replicate("A", 1).await?;
    for bad in ["127.0.evil.org", "nats-1.evil.org", "127.0.0.1.evil.org"] {
        let document = site.document_with("B", json!({"source_url": format!("nats://{bad}")}));
        problem(&site.send("config.add", document).await?, "is not allowed by this service");
    }
    Ok(())
}

/// What a server says becomes part of a status row: of any length, it would hide the rows after it and keep the position
/// from being saved.
#[tokio::test]
async fn an_endless_error_of_a_server_hides_nothing() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let info = json!({"server_id": "x", "version": "2.14.6", "max_payload": 1 << 20, "headers": true});
                let _ = stream.write_all(format!("INFO {info}\r\n").as_bytes()).await;
                let mut line = String::new();
                let _ = timeout(LIMIT, stream.read_line(&mut line)).await;
                let _ = stream.write_all(format!("-ERR '{}'\r\n", "x".repeat(900_000)).as_bytes()).await;
                let _ = timeout(LIMIT, stream.read_line(&mut line)).await;
            });
        }
    });
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    site.source_stream("AAA", json!({})).await?;
    site.add("AAA", json!({"target_url": format!("nats://127.0.0.1:{port}")})).await?;
    let says = |row: &Value| row["last_error"]["message"].as_str().is_some_and(|text| text.contains("(900000 bytes)"));
    site.row_when("AAA", "says what the server said", says).await?;
    let all = site.ask("status", "").await?.body;
    let ids: Vec<_> = all["replications"].as_array().context("rows")?.iter().map(|row| &row["replication"]).collect();
    ensure!(ids == ["AAA", "ORDERS"], "{ids:?}");
    let saved = async || site.position("AAA").await.is_ok_and(|record| record.is_some_and(|r| says(&r["status"])));
    wait_for("the row to be saved", LIMIT, saved).await
}
