//! Heartbeats with an identity of Choria's. A stock server knows nothing of those, so the one here is written out: it speaks
//! as much of the protocol as a login and a confirmed message take, and notes what it hears.

use std::fs;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::{KeyPair, KeyPairType};
use rcgen::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ServerConfig, crypto::ring};
use tokio_util::sync::CancellationToken;

use crate::harness::{LIMIT, Site, secrets, wait_for, wait_value};

const NONCE: &str = "toomanysecrets";
/// Of that nonce by the seed 00 01 02 ... 1f, as Choria makes it.
const SIGNATURE: &str = "PJ5Rj6L-llZQQOE0HTYMb_a4aKzk9NfwPDlJMV3ORO7njWK9ZtTrUV3Kvlh_xiB7GgWoCjl9acooL7AfY5MmDQ";
/// Unix seconds.
const NEVER: u64 = 4_102_444_800;

/// One connection.
#[derive(Debug, Clone, Default)]
struct HeardHeartbeat {
    connect: Value,
    subscriptions: Vec<String>,
    /// Subjects of messages.
    published: Vec<String>,
}

/// A server that asks for TLS and a signature.
struct Broker {
    port: u16,
    heard: Arc<Mutex<Vec<HeardHeartbeat>>>,
    /// Ends the present connections.
    cut: Arc<Mutex<CancellationToken>>,
    nonce: Arc<Mutex<String>>,
}

impl Broker {
    async fn start() -> Result<Self> {
        let CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["elsewhere.example.net".to_owned()])?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)?;
        let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await?);
        let broker = Self {
            port: listener.local_addr()?.port(),
            heard: Arc::default(),
            cut: Arc::default(),
            nonce: Arc::new(Mutex::new(NONCE.to_owned())),
        };
        let (heard, cut, nonce) = (broker.heard.clone(), broker.cut.clone(), broker.nonce.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let cut = cut.lock().expect("cut").clone();
                let nonce = nonce.lock().expect("nonce").clone();
                let serve = serve(socket, acceptor.clone(), nonce, heard.clone());
                tokio::spawn(async move { cut.run_until_cancelled(serve).await });
            }
        });
        Ok(broker)
    }

    /// From now on with this nonce; every client has to connect again.
    fn restart(&self, nonce: &str) {
        nonce.clone_into(&mut self.nonce.lock().expect("nonce"));
        std::mem::take(&mut *self.cut.lock().expect("cut")).cancel();
    }

    fn heard(&self) -> Vec<HeardHeartbeat> {
        self.heard.lock().expect("heard").clone()
    }

    /// Waits for a connection after the first `known` on which something was published.
    async fn beats(&self, known: usize) -> Result<HeardHeartbeat> {
        let beats = async || self.heard().into_iter().skip(known).find(|heard| !heard.published.is_empty());
        wait_value("a heartbeat", LIMIT, beats).await.with_context(|| format!("{:?}", self.heard()))
    }
}

async fn serve(
    mut socket: TcpStream,
    acceptor: TlsAcceptor,
    nonce: String,
    heard: Arc<Mutex<Vec<HeardHeartbeat>>>,
) -> Result<()> {
    let info = json!({"server_id": "B", "server_name": "broker", "version": "2.14.0", "proto": 1, "headers": true,
        "max_payload": 1 << 20, "nonce": nonce, "auth_required": true, "tls_required": true, "host": "127.0.0.1", "port": 4222});
    socket.write_all(format!("INFO {info}\r\n").as_bytes()).await?;
    let (read, mut write) = tokio::io::split(acceptor.accept(socket).await?);
    let mut read = BufReader::new(read);
    let mut index = None;
    let mut line = String::new();
    loop {
        line.clear();
        if read.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let words: Vec<_> = line.split_whitespace().collect();
        let note = |change: &dyn Fn(&mut HeardHeartbeat)| {
            let mut all = heard.lock().expect("heard");
            index.and_then(|index: usize| all.get_mut(index)).into_iter().for_each(change);
        };
        match words.as_slice() {
            ["CONNECT", ..] => {
                let mut all = heard.lock().expect("heard");
                all.push(HeardHeartbeat {
                    connect: serde_json::from_str(line["CONNECT ".len()..].trim())?,
                    ..HeardHeartbeat::default()
                });
                index = Some(all.len() - 1);
            }
            ["PING"] => write.write_all(b"PONG\r\n").await?,
            ["SUB", subject, _] => note(&|heard| heard.subscriptions.push((*subject).to_owned())),
            ["HPUB", subject, reply, _, total] => {
                note(&|heard| heard.published.push((*subject).to_owned()));
                let mut message = vec![0; total.parse::<usize>()? + 2];
                read.read_exact(&mut message).await?;
                let ack = r#"{"stream":"HB","seq":1}"#;
                write.write_all(format!("MSG {reply} 1 {}\r\n{ack}\r\n", ack.len()).as_bytes()).await?;
            }
            _ => {}
        }
    }
}

fn token(claims: Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let token = format!("{}.{}.c2lnbmF0dXJl", part(&json!({"alg": "EdDSA", "typ": "JWT"})), part(&claims));
    secrets::register(&token);
    token
}

fn signature(nonce: &str) -> Result<String> {
    let seed: [u8; 32] = std::array::from_fn(|index| index as u8);
    Ok(URL_SAFE_NO_PAD.encode(KeyPair::new_from_raw(KeyPairType::User, seed)?.sign(nonce.as_bytes())?))
}

#[tokio::test]
async fn a_token_is_read_and_signed_for_every_connection() -> Result<()> {
    let (broker, site, folder) = (Broker::start().await?, Site::small().await?, tempfile::tempdir()?);
    let file = |name: &str| folder.path().join(name).display().to_string();
    let seed: String = (0..32).map(|byte| format!("{byte:02x}")).collect();
    secrets::register(&seed);
    fs::write(file("seed"), format!("{seed}\n"))?;
    let client =
        |exp: u64| token(json!({"purpose": "choria_client_id", "callerid": "choria=sr.example.net", "exp": exp}));
    let first = client(NEVER);
    fs::write(file("jwt"), format!("{first}\n"))?;
    let document = json!({
        "url": format!("nats://127.0.0.1:{}", broker.port), "interval": "100ms", "subjects": [{"subject": "hb.a"}],
        "choria": {"seed_file": file("seed"), "jwt_file": file("jwt"), "collective": "choria"}
    });
    assert_eq!(site.send("heartbeat.set", document.clone()).await?.error, None);
    assert_eq!(site.ask("heartbeat.get", "").await?.body["config"], document);
    let heard = broker.beats(0).await.with_context(|| site.service.log())?;
    let fields =
        |heard: &HeardHeartbeat| ["auth_token", "jwt", "sig", "nkey"].map(|field| heard.connect[field].clone());
    assert_eq!(fields(&heard), [json!(first), json!(first), json!(SIGNATURE), Value::Null]);
    let inbox = "choria.reply.02c204b39fb9fba618388c8ac0877850.";
    assert!(!heard.subscriptions.is_empty() && heard.subscriptions.iter().all(|subject| subject.starts_with(inbox)));
    assert_eq!(heard.published[0], "hb.a");
    let unverified = site.service.log().lines().filter(|line| line.contains("is not verified")).count();
    assert_eq!(unverified, 1, "{}", site.service.log());

    // Another token, of somebody else, and another nonce.
    let second = token(json!({"purpose": "choria_server", "identity": "ginkgo.example.net", "issexp": NEVER}));
    fs::write(file("jwt"), &second)?;
    let known = broker.heard().len();
    broker.restart("another nonce");
    let heard = broker.beats(known).await.with_context(|| site.service.log())?;
    assert_eq!(fields(&heard), [json!(second), json!(second), json!(signature("another nonce")?), Value::Null]);
    let inbox = "choria.reply.3f7c3a791b0eb10da51dca4cdedb9418.";
    assert!(heard.subscriptions.iter().all(|subject| subject.starts_with(inbox)), "{:?}", heard.subscriptions);

    // A configuration that no broker would take is not sent, is reported, and is tried again until it is right.
    for (text, expect) in [
        (client(1_577_836_800), "expired at 2020-01-01T00:00:00Z"),
        (token(json!({"purpose": "choria_provisioning", "exp": NEVER})), "the purpose of the token in"),
        ("no token".to_owned(), "holds no JWT"),
    ] {
        fs::write(file("jwt"), text)?;
        broker.restart("a third nonce");
        wait_for(expect, LIMIT, async || site.service.log().contains(expect))
            .await
            .with_context(|| site.service.log())?;
    }
    let logins = broker.heard().len();
    assert!(broker.heard().iter().all(|heard| heard.connect["jwt"] == *first || heard.connect["jwt"] == *second));
    fs::write(file("jwt"), &first)?;
    broker.beats(logins).await.with_context(|| site.service.log())?;
    Ok(())
}
