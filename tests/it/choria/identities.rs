//! Tokens of Choria: a broker that takes logins as Choria's does, by an auth callout of a real server.

use std::collections::BTreeMap;
use std::fs;
use std::future::ready;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, stream};
use async_nats::{Client, ConnectOptions};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::Utc;
use futures_util::StreamExt;
use md5::{Digest, Md5};
use nkeys::{KeyPair, KeyPairType};
use serde_json::{Value, json};

use super::Place;
use crate::harness::cli::{Cli, failed};
use crate::harness::server::free_port;
use crate::harness::signed::{Granted, SignedAccount, answer_logins};
use crate::harness::{LIMIT, Role, Server, secrets, wait_for};
use crate::wire::auth::certificates;

/// A token, and the key that it is bound to.
struct Issued {
    caller: String,
    key: KeyPair,
    /// Subjects that such a client subscribes to, beside its replies.
    subjects: Vec<&'static str>,
}

/// What the broker knows of, by token; and the callers that it let in.
#[derive(Default)]
struct Broker {
    issued: Mutex<BTreeMap<String, Issued>>,
    let_in: Mutex<Vec<String>>,
}

impl Broker {
    /// Writes the files of an identity as Choria leaves them: the token ends with a newline.
    fn issue(&self, folder: &Path, name: &str, caller: &str, subjects: &[&'static str]) -> Result<()> {
        let seed: [u8; 32] = rand::random();
        let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let claims = json!({"purpose": "choria_client_id", "callerid": caller, "exp": Utc::now().timestamp() + 3600});
        let head = encode(&json!({"alg": "EdDSA", "typ": "JWT"}));
        let token = format!("{head}.{}.{}", encode(&claims), URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()));
        fs::write(folder.join(format!("{name}.seed")), format!("{hex}\n"))?;
        fs::write(folder.join(format!("{name}.jwt")), format!("{token}\n"))?;
        secrets::register(&hex);
        secrets::register(&token);
        let key = KeyPair::new_from_raw(KeyPairType::User, seed)?;
        let issued = Issued { caller: caller.to_owned(), key, subjects: subjects.to_vec() };
        self.issued.lock().unwrap().insert(token, issued);
        Ok(())
    }

    /// Decides as Choria's broker: by the token, and by the signature of the nonce with the key that it is bound to.
    fn judge(&self, nats: &Value) -> Result<Granted, String> {
        let sent = &nats["connect_opts"];
        if sent["user"] == "test" {
            return Ok(Granted::default());
        }
        let nonce = nats["client_info"]["nonce"].as_str().ok_or("no nonce")?;
        let signature = sent["sig"].as_str().and_then(|sig| URL_SAFE_NO_PAD.decode(sig).ok()).ok_or("no signature")?;
        let issued = self.issued.lock().unwrap();
        let known = sent["auth_token"].as_str().and_then(|token| issued.get(token)).ok_or("unknown token")?;
        known.key.verify(nonce.as_bytes(), &signature).map_err(|_| "wrong signature")?;
        let uid: String = Md5::digest(known.caller.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        let mut subscribe = vec![format!("choria.reply.{uid}.>")];
        subscribe.extend(known.subjects.iter().map(|subject| (*subject).to_owned()));
        self.let_in.lock().unwrap().push(known.caller.clone());
        Ok(Granted { permissions: json!({ "sub": { "allow": subscribe } }), ..Default::default() })
    }

    fn lets_in(&self, caller: &str) -> usize {
        self.let_in.lock().unwrap().iter().filter(|name| *name == caller).count()
    }
}

async fn login(server: &Server, folder: &Path, user: &str) -> Result<Client> {
    let options = ConnectOptions::with_user_and_password(user.to_owned(), user.to_owned());
    let options = options.add_root_certificates(folder.join("ca.pem")).require_tls(true);
    Ok(options.connect(server.url()).await?)
}

/// A server that asks `broker` who may log in. A user with an nkey makes it send a nonce.
async fn start_broker(folder: &Path, broker: &Arc<Broker>) -> Result<Server> {
    let issuer = KeyPair::new_account();
    let file = |name: &str| folder.join(name).display().to_string();
    let config = format!(
        "tls {{ cert_file: {:?}, key_file: {:?} }}\n\
         accounts {{ AUTH: {{ users: [{{user: auth, password: auth}}, {{nkey: {}}}] }}, APP: {{ jetstream: enabled }} }}\n\
         authorization {{ auth_callout {{ issuer: {}, auth_users: [auth], account: AUTH }} }}",
        file("server.pem"),
        file("server.key"),
        KeyPair::new_user().public_key(),
        issuer.public_key()
    );
    let server = Server::builder(Role::Source).config(&config).start().await?;
    let judge = broker.clone();
    answer_logins(login(&server, folder, "auth").await?, issuer, move |nats| ready(judge.judge(&nats))).await?;
    Ok(server)
}

async fn fill(client: &Client, stream: &str, subject: &str, count: u64) -> Result<()> {
    let context = jetstream::new(client.clone());
    let config = stream::Config { name: stream.into(), subjects: vec![subject.into()], ..Default::default() };
    context.get_or_create_stream(config).await?;
    for i in 0..count {
        context.publish(subject.to_owned(), i.to_string().into()).await?.await?;
    }
    Ok(())
}

/// A command logs in with the same files, and a broker that does not know them is named.
async fn advisories_are_shown(place: &Place, client: &Client) -> Result<()> {
    let advisory = json!({"protocol": "io.choria.sr.v2.age_advisory", "event_id": "2bQ", "inspect_field": "sender", "age": 0,
        "seen": 1_700_000_000, "replicator": "ORG1", "timestamp": 1_700_000_000, "event": "new", "value": "n1"});
    let context = jetstream::new(client.clone());
    let config = stream::Config { name: "ADV".into(), subjects: vec!["adv".into()], ..Default::default() };
    context.create_stream(config).await?;
    context.publish("adv", advisory.to_string().into()).await?.await?;
    let file = |name: &str| place.path(name).display().to_string();
    let (seed, token, stranger) = (file("reader.seed"), file("reader.jwt"), file("machine.seed"));
    let cli = Cli::new(&place.source.url());
    let show = |seed: &str| {
        let files = ["--choria-seed", seed, "--choria-token", token.as_str(), "--choria-collective", "choria"];
        ["admin", "adv", "ADV", "--since", "1h"].into_iter().chain(files).map(str::to_owned).collect::<Vec<_>>()
    };
    let shown = cli.ok(&show(&seed)).await?;
    ensure!(shown.contains("new n1 seen 0s earlier on ORG1"), "{shown}");
    failed(&cli.run(&show(&stranger)).await?, &["Authorization Violation"]);
    Ok(())
}

#[tokio::test]
async fn each_connection_has_the_identity_of_its_place() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let broker = Arc::new(Broker::default());
    // The control connection is that of the first source: it subscribes to requests too.
    broker.issue(folder.path(), "choria", "choria=sr.example.net", &["replicator.>", "$SRV.>"])?;
    broker.issue(folder.path(), "reader", "choria=reader.example.net", &[])?;
    broker.issue(folder.path(), "machine", "choria=machine.example.net", &[])?;
    let source = start_broker(folder.path(), &broker).await?;
    let hub = SignedAccount::new()?;
    let user = hub.user(None)?;
    for (name, text) in [("hub.creds", &hub.credentials()?), ("hub.jwt", &user.jwt), ("hub.nk", &user.seed)] {
        fs::write(folder.path().join(name), text)?;
        secrets::register(text);
    }
    let target = Server::builder(Role::Target).config(&hub.config).start().await?;
    let client = login(&source, folder.path(), "test").await?;
    fill(&client, "CHORIA_EVENTS", "choria.lifecycle.event", 5).await?;
    fill(&client, "CHORIA_MACHINE", "choria.machine.transition", 7).await?;
    let mut beats = client.subscribe("choria.node_metadata._monitor").await?;
    client.flush().await?;
    let to = jetstream::new(ConnectOptions::with_credentials(&hub.credentials()?)?.connect(target.url()).await?);
    let has = async |stream: &str, count: u64| match to.get_stream(stream).await {
        Ok(mut stream) => stream.info().await.is_ok_and(|info| info.state.messages == count),
        Err(_) => false,
    };
    let mut place = Place { source, target, folder, port: free_port()? };
    let mut service = place.run("07-choria-jwt")?;
    wait_for("the events", LIMIT, async || has("ORG1_EVENTS", 5).await).await.with_context(|| service.log())?;
    wait_for("the machines", LIMIT, async || has("ORG1_MACHINE", 7).await).await.with_context(|| service.log())?;
    let beat = tokio::time::timeout(LIMIT, beats.next()).await;
    ensure!(beat.is_ok_and(|beat| beat.is_some()), "no heartbeat: {}", service.log());
    let machine = broker.lets_in("choria=machine.example.net");
    ensure!(broker.lets_in("choria=reader.example.net") > 0 && machine == 0, "{:?}", broker.let_in);
    advisories_are_shown(&place, &client).await?;
    // The file is read again at the next connection.
    broker.issue(place.folder.path(), "choria", "choria=renewed.example.net", &["replicator.>", "$SRV.>"])?;
    place.source.restart().await?;
    let renewed = async || broker.lets_in("choria=renewed.example.net") > 0;
    wait_for("a login with the new token", LIMIT, renewed).await.with_context(|| service.log())?;
    let client = login(&place.source, place.folder.path(), "test").await?;
    fill(&client, "CHORIA_EVENTS", "choria.lifecycle.event", 5).await?;
    wait_for("the next events", LIMIT, async || has("ORG1_EVENTS", 10).await).await.with_context(|| service.log())?;
    ensure!(service.stop().await?.success(), "{}", service.log());
    secrets::check("the log", &service.log());
    Ok(())
}
