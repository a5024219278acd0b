//! Ways to a server: websockets, domains, account imports, contexts; what happens when credentials are rotated; and
//! what is said when a connection cannot be made.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as CertificateKey};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::harness::{
    Expect, LIMIT, Outgoing, Raw, Role, Server, Service, Site,
    checker::compare_streams,
    client::status,
    connect, request,
    server::{Builder, NEWEST, free_port},
    wait_for, wait_value,
};

const COUNT: u64 = 300;

/// Small and large ones: websocket frames and TLS records split them anywhere.
fn messages(subject: &str) -> Vec<Outgoing> {
    let size = |i: u64| if i % 50 == 7 { 900_000 } else { (i as usize * 97) % 9_000 };
    let message = |i: u64| Outgoing::new(format!("{subject}.{}", i % 5), vec![i as u8; size(i)]);
    (1..=COUNT).map(message).collect()
}

/// Certificates of one authority for the server and for a client, as files in a folder.
fn certificates(folder: &Path) -> Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, CertificateKey::generate()?)?;
    fs::write(folder.join("ca.pem"), authority.pem())?;
    for (name, host) in [("server", "127.0.0.1"), ("other", "other.example.net"), ("client", "client")] {
        let key = CertificateKey::generate()?;
        let certificate = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &authority)?;
        fs::write(folder.join(format!("{name}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

fn tls(folder: &Path, name: &str, more: &str) -> String {
    let (cert, key) = (path(folder, &format!("{name}.pem")), path(folder, &format!("{name}.key")));
    format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, {more} }}")
}

/// A message comes from the control connection's service.
async fn answers(client: &async_nats::Client) -> bool {
    request(client, "replicator.status", Value::Null).await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_carry_both_sides_and_the_control_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    for scheme in ["ws", "wss"] {
        let secure = if scheme == "wss" { tls(folder.path(), "server", "") } else { "no_tls: true".to_owned() };
        let start = async |role| -> Result<(Server, String)> {
            let port = free_port()?;
            let config = format!("websocket {{ host: \"127.0.0.1\", port: {port}, {secure} }}");
            let server = Server::builder(role).config(&config).start().await?;
            Ok((server, format!("{scheme}://127.0.0.1:{port}")))
        };
        let ((source, source_url), (target, target_url)) = tokio::try_join!(start(Role::Source), start(Role::Target))?;
        let mut raw = Raw::connect(&source.url()).await?;
        raw.create_stream("W", json!({"subjects": ["w.>"]})).await?;
        raw.publish_all(messages("w")).await?;
        let ca = path(folder.path(), "ca.pem");
        let mut service = Service::builder(&format!("{source_url}/nats"), "TEST");
        if scheme == "wss" {
            service = service.args(["--tlsca", &ca]);
        }
        let service = service.start().await?;
        let client = connect(&source.url()).await?;
        let mut document =
            json!({"stream": "W", "source_url": format!("{source_url}/a/path"), "target_url": target_url});
        if scheme == "wss" {
            document["tls"] = json!({"ca": ca});
        }
        request(&client, "replicator.config.add", document).await?;
        let settled = async || status(&client, "W").await.is_some_and(|row| row["position"]["source_seq"] == COUNT);
        wait_for("the copy over websockets", LIMIT, settled).await.with_context(|| service.log())?;
        let mut to = Raw::connect(&target.url()).await?;
        compare_streams(&mut raw, &mut to, "W", &Expect::copy_of("W")).await?.verify()?;
    }
    Ok(())
}

/// A hub and a leaf with JetStream domains of their own.
async fn hub_and_leaf() -> Result<(Server, Server)> {
    join_leaf(Server::builder(Role::Target), Server::builder(Role::Source)).await
}

async fn join_leaf(hub: Builder, leaf: Builder) -> Result<(Server, Server)> {
    let port = free_port()?;
    let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
    let hub = hub.domain("hub").config(&listen).start().await?;
    let remote = format!("leafnodes {{ remotes: [{{ url: \"nats://127.0.0.1:{port}\" }}] }}");
    let leaf = leaf.domain("leaf").config(&remote).start().await?;
    let mut raw = Raw::connect(&leaf.url()).await?.with_api("$JS.hub.API");
    wait_for("the leafnode connection", LIMIT, async || raw.api("INFO", Value::Null).await.is_ok()).await?;
    Ok((hub, leaf))
}

/// The server that makes the target is of another version than the one that the service is connected to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_in_another_domain_is_made_for_its_own_server() -> Result<()> {
    for (hub, leaf, batched) in [("2.12.8", NEWEST, false), (NEWEST, "2.12.8", true)] {
        let (to, from) =
            join_leaf(Server::builder(Role::Target).version(hub), Server::builder(Role::Source).version(leaf)).await?;
        let mut at_leaf = Raw::connect(&from.url()).await?;
        at_leaf.create_stream("L", json!({"subjects": ["l.>"], "allow_msg_ttl": true})).await?;
        at_leaf.publish_all(messages("l")).await?;
        let service = Service::start(&from.url()).await?;
        let client = connect(&from.url()).await?;
        let url = from.url();
        let document = json!({"stream": "L", "source_url": url, "target_url": url, "target_domain": "hub",
            "target_subject_prefix": "at.hub"});
        request(&client, "replicator.config.add", document).await?;
        let settled = async || status(&client, "L").await.is_some_and(|row| row["position"]["source_seq"] == COUNT);
        wait_for("the copy into the hub", LIMIT, settled).await.with_context(|| service.log())?;
        let made = Raw::connect(&to.url()).await?.api("STREAM.INFO.L", Value::Null).await?;
        assert_eq!(made["config"]["allow_batched"] == true, batched, "{made}");
        assert_eq!(made["config"]["allow_msg_ttl"], true, "{made}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_buckets_of_another_domain_through_a_leafnode() -> Result<()> {
    let (hub, leaf) = hub_and_leaf().await?;
    let (mut at_hub, mut at_leaf) = (Raw::connect(&hub.url()).await?, Raw::connect(&leaf.url()).await?);
    at_hub.create_stream("H", json!({"subjects": ["h.>"]})).await?;
    at_leaf.create_stream("L", json!({"subjects": ["l.>"]})).await?;
    at_hub.publish_all(messages("h")).await?;
    at_leaf.publish_all(messages("l")).await?;
    // Everything through the leaf, the buckets of the hub too.
    let service = Service::builder(&leaf.url(), "TEST").args(["--js-domain", "hub"]).start().await?;
    let client = connect(&leaf.url()).await?;
    let url = leaf.url();
    let documents = [
        json!({"stream": "H", "source_domain": "hub", "target_subject_prefix": "at.leaf"}),
        json!({"stream": "L", "target_domain": "hub", "target_subject_prefix": "at.hub"}),
    ];
    for mut document in documents {
        (document["source_url"], document["target_url"]) = (url.clone().into(), url.clone().into());
        request(&client, "replicator.config.add", document).await?;
    }
    for stream in ["H", "L"] {
        let settled = async || status(&client, stream).await.is_some_and(|row| row["position"]["source_seq"] == COUNT);
        wait_for("the copy between domains", LIMIT, settled).await.with_context(|| service.log())?;
    }
    let map = |subject: &str| format!("at.leaf.{subject}");
    compare_streams(&mut at_hub, &mut at_leaf, "H", &Expect::copy_of("H").mapped(map)).await?.verify()?;
    let map = |subject: &str| format!("at.hub.{subject}");
    compare_streams(&mut at_leaf, &mut at_hub, "L", &Expect::copy_of("L").mapped(map)).await?.verify()?;
    assert!(at_hub.stream_state("KV_REPLICATOR_CONFIG").await.is_ok());
    assert!(at_leaf.stream_state("KV_REPLICATOR_CONFIG").await.is_err());
    // A change by hand arrives, too: the watch goes through the domain.
    request(&client, "replicator.config.delete", json!({"replication": "H", "keep": true})).await?;
    let kv = "$JS.hub.API.$KV.REPLICATOR_CONFIG.H";
    let document = json!({"stream": "H", "source_domain": "hub", "target_subject_prefix": "at.leaf",
        "source_url": url, "target_url": url});
    client.request(kv, document.to_string().into()).await?;
    wait_for("the edit by hand", LIMIT, async || status(&client, "H").await.is_some()).await?;
    // The error of a source in a missing domain names the subject without responders.
    let document = json!({"stream": "N", "source_domain": "nowhere", "source_url": url, "target_url": url});
    request(&client, "replicator.config.add", document).await?;
    let message = wait_value("the error", LIMIT, async || {
        Some(status(&client, "N").await?["last_error"]["message"].as_str()?.to_owned())
    });
    assert!(message.await?.contains("`$JS.nowhere.API.STREAM.INFO.N`"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_buckets_of_another_account_through_an_import() -> Result<()> {
    let config = r#"
        accounts {
          OWNER {
            jetstream: enabled
            users: [{ user: owner, password: o }]
            exports: [
              { service: "$JS.API.>", response_type: stream }
              { service: "$KV.>" }
              { service: "copy.>", response_type: stream }
              { stream: "replies.>" }
            ]
          }
          APP {
            users: [{ user: app, password: a }]
            imports: [
              { service: { account: OWNER, subject: "$JS.API.>" }, to: "owner.js.>" }
              { service: { account: OWNER, subject: "$KV.>" }, to: "owner.js.$KV.>" }
              { service: { account: OWNER, subject: "copy.>" } }
              { stream: { account: OWNER, subject: "replies.>" } }
            ]
          }
        }
    "#;
    let server = Server::builder(Role::Source).without_jetstream().config(config);
    let store = tempfile::tempdir()?;
    let jetstream = format!("jetstream {{ store_dir: {:?} }}", store.path().display().to_string());
    let server = server.config(&jetstream).start().await?;
    let mut owner = Raw::connect(&server.url_as("owner:o")).await?;
    owner.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    owner.publish_all(messages("s")).await?;
    let app = server.url_as("app:a");
    let service = Service::builder(&app, "TEST")
        .args(["--js-api-prefix", "owner.js", "--inbox-prefix", "replies"])
        .start()
        .await?;
    let client = connect(&app).await?;
    let document = json!({"stream": "S", "target_stream": "C", "source_url": app, "target_url": app,
        "source_api_prefix": "owner.js", "target_api_prefix": "owner.js", "target_subject_prefix": "copy"});
    request(&client, "replicator.config.add", document).await?;
    let settled = async || status(&client, "S").await.is_some_and(|row| row["position"]["source_seq"] == COUNT);
    wait_for("the copy between accounts", LIMIT, settled).await.with_context(|| service.log())?;
    let mut again = Raw::connect(&server.url_as("owner:o")).await?;
    let map = |subject: &str| format!("copy.{subject}");
    compare_streams(&mut owner, &mut again, "C", &Expect::copy_of("S").mapped(map)).await?.verify()
}

/// A service whose control connection and source are this server, and whose target is another one.
struct Rotation {
    source: Server,
    target: Server,
    service: Service,
}

impl Rotation {
    /// `login` logs the test in; the service goes by `args` and `fields`.
    async fn begin(
        source: Server,
        login: async_nats::ConnectOptions,
        args: &[&str],
        config_home: &Path,
        fields: Value,
    ) -> Result<Self> {
        let target = Server::start(Role::Target).await?;
        let client = login.connect(source.url()).await?;
        let context = async_nats::jetstream::new(client.clone());
        let config = async_nats::jetstream::stream::Config {
            name: "A".into(),
            subjects: vec!["a".into()],
            ..Default::default()
        };
        context.create_stream(config).await?;
        let mut service = Service::builder(&source.url(), "TEST").args(args.iter().copied());
        service = service.env("XDG_CONFIG_HOME", &config_home.display().to_string());
        let service = service.start().await?;
        let mut document = json!({"stream": "A", "target_url": target.url()});
        for (name, value) in fields.as_object().context("fields")? {
            document[name] = value.clone();
        }
        request(&client, "replicator.config.add", document).await?;
        let this = Self { source, target, service };
        this.copies(&client, 1).await?;
        Ok(this)
    }

    /// The server comes back and lets only the new identity in; so do the service and the copy.
    async fn comes_back(&mut self, config: &str, login: async_nats::ConnectOptions) -> Result<()> {
        self.source.restart_with(config).await?;
        let client = login.connect(self.source.url()).await?;
        wait_for("the service to answer again", LIMIT, async || answers(&client).await)
            .await
            .with_context(|| self.service.log())?;
        self.copies(&client, 2).await
    }

    async fn copies(&self, client: &async_nats::Client, number: u64) -> Result<()> {
        let context = async_nats::jetstream::new(client.clone());
        wait_for("a publish", LIMIT, async || match context.publish("a", "x".into()).await {
            Ok(ack) => ack.await.is_ok(),
            Err(_) => false,
        })
        .await?;
        let mut target = Raw::connect(&self.target.url()).await?;
        wait_for("the copy", LIMIT, async || {
            target.stream_state("A").await.is_ok_and(|state| state["messages"].as_u64() >= Some(number))
        })
        .await
        .with_context(|| self.service.log())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_seed_file_is_used_at_the_next_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (old, new) = (KeyPair::new_user(), KeyPair::new_user());
    let config = |key: &KeyPair| format!("authorization {{ users: [{{nkey: {}}}] }}", key.public_key());
    let seed = path(folder.path(), "user.nk");
    fs::write(&seed, old.seed()?)?;
    let source = Server::builder(Role::Source).config(&config(&old)).start().await?;
    let url = format!("{}?nkey={seed}", source.url());
    let login = async_nats::ConnectOptions::with_nkey(old.seed()?);
    let fields = json!({"source_url": url});
    let mut rotation = Rotation::begin(source, login, &["--nkey", &seed], folder.path(), fields).await?;
    fs::write(&seed, new.seed()?)?;
    rotation.comes_back(&config(&new), async_nats::ConnectOptions::with_nkey(new.seed()?)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotated_tls_files_are_used_at_the_next_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (files, servers) = (folder.path().join("files"), folder.path().join("servers"));
    let config = || tls(&servers, "server", &format!("verify: true, ca_file: {:?}", path(&servers, "ca.pem")));
    let renew = || -> Result<()> {
        fs::create_dir_all(&files)?;
        fs::create_dir_all(&servers)?;
        certificates(&files)?;
        for file in fs::read_dir(&files)? {
            let file = file?;
            fs::copy(file.path(), servers.join(file.file_name()))?;
        }
        Ok(())
    };
    let login = || {
        async_nats::ConnectOptions::new()
            .add_root_certificates(files.join("ca.pem"))
            .add_client_certificate(files.join("client.pem"), files.join("client.key"))
            .require_tls(true)
    };
    renew()?;
    let (ca, cert, key) = (path(&files, "ca.pem"), path(&files, "client.pem"), path(&files, "client.key"));
    let source = Server::builder(Role::Source).config(&config()).start().await?;
    let fields = json!({"source_url": source.url(), "source_tls": {"ca": ca, "cert": cert, "key": key}});
    let args = ["--tlsca", &ca, "--tlscert", &cert, "--tlskey", &key];
    let mut rotation = Rotation::begin(source, login(), &args, folder.path(), fields).await?;
    renew()?;
    rotation.comes_back(&config(), login()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_context_is_followed_at_the_next_connection() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::create_dir_all(folder.path().join("nats/context"))?;
    let config = |password: &str| format!("authorization {{ users: [{{user: u, password: {password}}}] }}");
    let source = Server::builder(Role::Source).config(&config("0ld-s3cret")).start().await?;
    let url = source.url();
    let write = |password: &str| {
        let context = json!({"url": url, "user": "u", "password": password, "later": true});
        fs::write(folder.path().join("nats/context/hub.json"), context.to_string())
    };
    let login = |password: &str| async_nats::ConnectOptions::with_user_and_password("u".into(), password.into());
    write("0ld-s3cret")?;
    let fields = json!({"source_context": "hub"});
    let args = ["--context", "hub"];
    let mut rotation = Rotation::begin(source, login("0ld-s3cret"), &args, folder.path(), fields).await?;
    write("n3w-s3cret")?;
    rotation.comes_back(&config("n3w-s3cret"), login("n3w-s3cret")).await?;
    assert!(!rotation.service.log().contains("s3cret"));
    Ok(())
}

/// What a plain TCP listener does with those who come.
async fn silent_listener() -> Result<(u16, tokio::task::JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let task = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    Ok((port, task))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_failure_to_connect_says_what_and_where_and_no_secret() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let file = |name: &str| path(folder.path(), name);
    let seed = KeyPair::new_user();
    fs::write(folder.path().join("user.nk"), seed.seed()?)?;
    fs::write(
        folder.path().join("bad.creds"),
        "-----BEGIN NATS USER JWT-----\ns3cret\n------END NATS USER JWT------\n",
    )?;
    fs::create_dir_all(folder.path().join("nats/context"))?;
    fs::write(folder.path().join("nats/context/nsc.json"), "{\"nsc\": \"nsc://o/a/u?s3cret\"}")?;
    let start = async |config: String| Server::builder(Role::Source).config(&config).start().await;
    let locked = start("authorization { users: [{user: u, password: right}] }".to_owned()).await?;
    let encrypted = start(tls(folder.path(), "server", "")).await?;
    let misnamed = start(tls(folder.path(), "other", "")).await?;
    let strict = start(tls(folder.path(), "server", &format!("verify: true, ca_file: {:?}", file("ca.pem")))).await?;
    let (silent, _listener) = silent_listener().await?;
    let refused = free_port()?;

    let control = Server::start(Role::Control).await?;
    let target = Server::start(Role::Target).await?;
    let home = folder.path().display().to_string();
    let service = Service::builder(&control.url(), "TEST").env("XDG_CONFIG_HOME", &home).start().await?;
    let client = connect(&control.url()).await?;

    let ca = || json!({"ca": file("ca.pem")});
    let at = |server: &Server| format!("127.0.0.1:{}", server.port());
    let cases: Vec<(&str, Value, &str, Vec<String>)> = vec![
        (
            "REFUSED",
            json!({"source_url": format!("nats://127.0.0.1:{refused}")}),
            "retrying",
            vec![format!("source: cannot connect to `127.0.0.1:{refused}`"), "refused".into()],
        ),
        (
            "UNKNOWN",
            json!({"source_url": "nats://there-is-none.invalid:4222"}),
            "retrying",
            vec!["`there-is-none.invalid:4222`: cannot be resolved".into()],
        ),
        (
            "SILENT",
            json!({"source_url": format!("nats://127.0.0.1:{silent}?connect_timeout=200ms")}),
            "retrying",
            vec![format!("`127.0.0.1:{silent}`: no answer within 200ms")],
        ),
        (
            "PASSWORD",
            json!({"source_url": locked.url_as("u:wr0ng-s3cret")}),
            "held",
            vec![at(&locked), "Authorization Violation".into()],
        ),
        (
            "SEED",
            json!({"source_url": format!("{}?nkey={}", locked.url(), file("user.nk"))}),
            "held",
            vec![at(&locked), "Authorization Violation".into()],
        ),
        (
            "CREDS",
            json!({"source_url": format!("{}?credentials={}", locked.url(), file("bad.creds"))}),
            "held",
            vec![format!("credentials file `{}` holds no nkey seed", file("bad.creds"))],
        ),
        (
            "MISSING",
            json!({"source_url": format!("{}?credentials={}", locked.url(), file("none.creds"))}),
            "held",
            vec![format!("cannot read `{}`: No such file", file("none.creds"))],
        ),
        (
            "FOLDER",
            json!({"source_url": format!("{}?nkey={}", locked.url(), file("nats"))}),
            "held",
            vec![format!("cannot read `{}`: ", file("nats"))],
        ),
        (
            "AUTHORITY",
            json!({"source_url": encrypted.url()}),
            "held",
            vec![at(&encrypted), "TLS handshake failed: invalid peer certificate: UnknownIssuer".into()],
        ),
        (
            "HOSTNAME",
            json!({"source_url": misnamed.url(), "source_tls": ca()}),
            "held",
            vec![at(&misnamed), "TLS handshake failed: invalid peer certificate".into(), "other.example.net".into()],
        ),
        ("CERTIFICATE", json!({"source_url": strict.url(), "source_tls": ca()}), "retrying", vec![at(&strict)]),
        (
            "CA",
            json!({"source_url": encrypted.url(), "source_tls": {"ca": file("none.pem")}}),
            "held",
            vec![format!("cannot read certificates in `{}`", file("none.pem"))],
        ),
        (
            "PLAIN",
            json!({"source_url": locked.url_as("u:right").replace("nats://", "tls://")}),
            "held",
            vec![at(&locked), "TLS is asked for, and the server offers none".into()],
        ),
        (
            "SOCKET",
            json!({"source_url": format!("ws://{}", at(&locked))}),
            "retrying",
            vec![format!("`ws://{}`: no websocket", at(&locked))],
        ),
        (
            "CONTEXT",
            json!({"source_context": "there is none"}),
            "held",
            vec!["source: context `there is none`".into(), "there is no such file".into()],
        ),
        ("NSC", json!({"source_context": "nsc"}), "held", vec!["`nsc`: credentials of `nsc` are not supported".into()]),
    ];
    for (stream, fields, ..) in &cases {
        let mut document = json!({"stream": stream, "target_url": target.url()});
        for (name, value) in fields.as_object().context("fields")? {
            document[name] = value.clone();
        }
        request(&client, "replicator.config.add", document).await?;
    }
    for (stream, _, state, texts) in &cases {
        let mut last = Value::Null;
        let told = wait_for(stream, LIMIT, async || {
            last = status(&client, stream).await.unwrap_or_default();
            let message = last["last_error"]["message"].as_str().unwrap_or_default();
            let settled = last["state"] == *state || (*state == "retrying" && last["state"] == "starting");
            settled && texts.iter().all(|text| message.contains(text.as_str()))
        });
        told.await.with_context(|| format!("{stream} should be {state} with {texts:?}: {last}"))?;
        assert!(!last.to_string().contains("s3cret"), "{last}");
    }
    assert!(!service.log().contains("s3cret"));
    Ok(())
}

/// How many connections of each name a server has.
async fn connections(monitor: u16) -> Result<BTreeMap<String, usize>> {
    let mut stream = TcpStream::connect(("127.0.0.1", monitor)).await?;
    stream.write_all(b"GET /connz HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let body: Value = serde_json::from_str(body)?;
    let mut names = BTreeMap::new();
    for connection in body["connections"].as_array().context("no connections")? {
        let name = connection["name"].as_str().unwrap_or_default();
        if name.starts_with("stream-replicator") {
            *names.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(names)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_control_connection_and_one_lane_per_side_and_replication() -> Result<()> {
    let start = async |role| -> Result<(Server, u16)> {
        let port = free_port()?;
        Ok((Server::builder(role).config(&format!("http: \"127.0.0.1:{port}\"")).start().await?, port))
    };
    let ((source, at_source), (target, at_target)) = tokio::try_join!(start(Role::Source), start(Role::Target))?;
    let site = Site::builder().on(source, target).control_at_source().args(["--instance", "one"]).start().await?;
    let streams = ["A", "B", "C"];
    for stream in streams {
        site.replicate(stream, 20).await?;
    }
    for _ in 0..3 {
        request(&site.client, "replicator.config.list", Value::Null).await?;
    }
    let lanes = streams.map(|stream| (format!("stream-replicator {stream}"), 1));
    let mut expect = BTreeMap::from(lanes);
    assert_eq!(connections(at_target).await?, expect);
    expect.insert("stream-replicator TEST/one".to_owned(), 1);
    assert_eq!(connections(at_source).await?, expect);
    Ok(())
}

#[tokio::test]
async fn a_control_connection_that_fails_says_why_in_the_log() -> Result<()> {
    let control =
        Server::builder(Role::Control).config("authorization { users: [{user: u, password: right}] }").start().await?;
    let service = Service::builder(&control.url_as("u:wr0ng-s3cret"), "TEST").spawn()?;
    let told = format!("cannot connect to `127.0.0.1:{}`", control.port());
    wait_for("the reason", Duration::from_secs(10), async || {
        let log = service.log();
        log.contains(&told) && log.contains("Authorization Violation")
    })
    .await
    .with_context(|| service.log())?;
    assert!(!service.log().contains("s3cret"));
    Ok(())
}
