//! The leafnode client of `nats-lane` against real servers.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;
use nats_lane::{
    Connection, Endpoint, ErrorKind, Tls, Turn,
    leafnode::{Interest, Leaf, LeafLogin},
};
use nkeys::KeyPair;
use tokio::time::timeout;

use super::auth::certificates;
use crate::harness::{LIMIT, Role, Server, connect, proxy::Proxy, server::free_port, signed::SignedAccount, wait_for};

/// Versions with another leafnode code each.
pub(super) const VERSIONS: [&str; 3] = ["2.10.26", "2.12.8", "2.15.1"];

fn login(name: &str, subjects: &[&str]) -> LeafLogin {
    let subscriptions = subjects.iter().map(|subject| (*subject).to_owned()).collect();
    LeafLogin { name: name.to_owned(), account: name.to_owned(), subscriptions }
}

fn connection(url: &str) -> Connection {
    Connection::to(Endpoint::parse(url).expect("a URL"))
}

/// A server with a leafnode port and this configuration; and that port.
async fn server(version: &str, leafnodes: &str, config: &str) -> Result<(Server, u16)> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\"\n{leafnodes} }}\n{config}");
    Ok((Server::builder(Role::Target).version(version).config(&leafnodes).start().await?, port))
}

/// A message as it came over the leafnode connection.
#[derive(Debug, PartialEq, Eq)]
struct Came {
    subject: String,
    reply: String,
    header: Vec<u8>,
    payload: Vec<u8>,
}

/// Turns the leaf until something is found in what came.
async fn until<T>(leaf: &mut Leaf, what: &str, mut find: impl FnMut(&[Came], &[Interest]) -> Option<T>) -> Result<T> {
    let (mut came, mut interest) = (Vec::new(), Vec::new());
    let found = async {
        loop {
            if let Turn::Received(batch) = leaf.turn().await? {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                came.extend(batch.iter().map(|m| Came {
                    subject: text(m.subject),
                    reply: text(m.reply),
                    header: m.header.to_vec(),
                    payload: m.payload.to_vec(),
                }));
            }
            interest.extend(leaf.take_interest());
            if let Some(found) = find(&came, &interest) {
                return anyhow::Ok(found);
            }
        }
    };
    timeout(LIMIT, found).await.with_context(|| format!("waited for {what}"))?
}

/// A message of a client arrives as it was sent, headers byte for byte.
async fn arrives(server: &Server, login: &str, leaf: &mut Leaf) -> Result<()> {
    let url = if login.is_empty() { server.url() } else { server.url_as(login) };
    let client = connect(&url).await?;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Color", "blue");
    client.publish_with_reply_and_headers("to.leaf", "back", headers, "hello".into()).await?;
    client.flush().await?;
    until(leaf, "the message", |came, _| came.iter().any(|m| m.subject == "to.leaf").then_some(())).await
}

#[tokio::test]
async fn messages_and_interest_go_both_ways() -> Result<()> {
    for version in VERSIONS {
        let (server, port) = server(version, "", "").await?;
        let url = format!("nats-leaf://127.0.0.1:{port}");
        let mut leaf = Leaf::connect(&connection(&url), &login("one", &["to.>"])).await?;
        assert_eq!(leaf.info().version, version);
        let client = connect(&server.url()).await?;
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Color", "blue");
        client.publish_with_reply_and_headers("to.leaf", "back", headers, "hello".into()).await?;
        client.publish("to.leaf.plain", "x".into()).await?;
        client.flush().await?;
        let first = until(&mut leaf, "two messages", |came, _| {
            let of = |subject: &str| came.iter().find(|m| m.subject == subject);
            of("to.leaf.plain")
                .and_then(|_| of("to.leaf"))
                .map(|m| (m.reply.clone(), m.header.clone(), m.payload.clone()))
        });
        let expect = ("back".to_owned(), b"NATS/1.0\r\nColor: blue\r\n\r\n".to_vec(), b"hello".to_vec());
        assert_eq!(first.await?, expect, "{version}");

        // Subscriptions of the account are announced when they begin and when they end.
        let mut subscription = client.subscribe("from.*").await?;
        client.flush().await?;
        let begins = |begins: bool| {
            move |_: &[Came], all: &[Interest]| {
                all.iter().any(|i| i.subject == "from.*" && i.begins == begins).then_some(())
            }
        };
        until(&mut leaf, "interest", begins(true)).await?;
        let header = b"NATS/1.0\r\nA: b\r\n\r\n";
        leaf.send(b"from.leaf", b"$JS.ACK.S.C.1.7.1.5.0@real.subject", header, b"data");
        leaf.send(b"from.leaf", b"", b"", b"");
        leaf.flush(LIMIT).await;
        let message = timeout(LIMIT, subscription.next()).await?.context("a message")?;
        // The part after `@` is the subject at delivery, and the part before it the reply.
        assert_eq!(message.subject.as_str(), "real.subject", "{version}");
        assert_eq!(message.reply.as_deref(), Some("$JS.ACK.S.C.1.7.1.5.0"));
        assert_eq!(&message.payload[..], b"data");
        let plain = timeout(LIMIT, subscription.next()).await?.context("a message")?;
        assert_eq!(plain.subject.as_str(), "from.leaf");
        subscription.unsubscribe().await?;
        client.flush().await?;
        until(&mut leaf, "the end of interest", begins(false)).await?;

        leaf.subscribe("more");
        leaf.unsubscribe("to.>");
        leaf.flush(LIMIT).await;
        let came = until(&mut leaf, "another subscription", |came, _| {
            came.iter().any(|m| m.subject == "more").then(|| came.iter().any(|m| m.subject == "to.late"))
        });
        let publish = async {
            loop {
                client.publish("to.late", "x".into()).await.ok();
                client.publish("more", "x".into()).await.ok();
                client.flush().await.ok();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            came = came => { came?; }
            () = publish => {}
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_login_of_a_client_is_one_of_a_leaf() -> Result<()> {
    let user = KeyPair::new_user();
    let folder = tempfile::tempdir()?;
    let seed = folder.path().join("user.nk");
    fs::write(&seed, user.seed()?)?;
    for version in VERSIONS {
        let users =
            format!("authorization {{ users: [{{user: us, password: secret}}, {{nkey: {}}}] }}", user.public_key());
        let (by_users, port) = server(version, "", &users).await?;
        let (by_token, token_port) = server(version, "", "authorization { token: t0ken }").await?;
        for (server, client, url) in [
            (&by_users, "us:secret", format!("nats-leaf://us:secret@127.0.0.1:{port}")),
            (&by_users, "us:secret", format!("nats-leaf://127.0.0.1:{port}?nkey={}", seed.display())),
            (&by_token, "t0ken", format!("nats-leaf://t0ken@127.0.0.1:{token_port}")),
        ] {
            let mut leaf = Leaf::connect(&connection(&url), &login("one", &["to.>"])).await.context(url)?;
            arrives(server, client, &mut leaf).await?;
        }
        let wrong = format!("nats-leaf://us:wrong@127.0.0.1:{port}");
        let error = Leaf::connect(&connection(&wrong), &login("one", &["to.>"])).await.unwrap_err();
        assert!(error.kind == ErrorKind::Hold && error.message.contains("Authorization"), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn a_credentials_file_signs_the_nonce() -> Result<()> {
    let signed = SignedAccount::new()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("user.creds");
    let creds = signed.credentials()?;
    fs::write(&file, &creds)?;
    for version in VERSIONS {
        let (server, port) = server(version, "", &signed.config).await?;
        let url = format!("nats-leaf://127.0.0.1:{port}?credentials={}", file.display());
        let mut leaf = Leaf::connect(&connection(&url), &login("one", &["to.>"])).await.context(version)?;
        let client = async_nats::ConnectOptions::with_credentials(&creds)?.connect(server.url()).await?;
        client.publish("to.leaf", "x".into()).await?;
        client.flush().await?;
        until(&mut leaf, "the message", |came, _| came.iter().any(|m| m.subject == "to.leaf").then_some(())).await?;
    }
    Ok(())
}

#[tokio::test]
async fn tls_and_websockets_carry_the_same() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let file = |name: &str| folder.path().join(name).display().to_string();
    let tls = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?} }}",
        file("server.pem"),
        file("server.key"),
        file("ca.pem")
    );
    for version in VERSIONS {
        let (socket, first) = (free_port()?, version != "2.10.26");
        let websocket = format!("websocket {{ listen: \"127.0.0.1:{socket}\", no_tls: true }}");
        let (server, port) = server(version, &tls, &websocket).await?;
        let of = |url: String| {
            let endpoint = Endpoint::parse(&url).expect("a URL");
            if url.starts_with("ws") {
                return Connection::to(endpoint);
            }
            let ca = Some(folder.path().join("ca.pem"));
            Connection::to(endpoint.clone().with_tls(Tls { ca, ..endpoint.tls }).expect("TLS"))
        };
        for url in [format!("tls://127.0.0.1:{port}"), format!("ws://127.0.0.1:{socket}")] {
            let mut leaf = Leaf::connect(&of(url.clone()), &login("one", &["to.>"])).await.context(url)?;
            arrives(&server, "", &mut leaf).await?;
        }
        let unknown = Leaf::connect(&connection(&format!("tls://127.0.0.1:{port}")), &login("one", &["to.>"])).await;
        assert!(unknown.unwrap_err().message.contains("TLS handshake failed"), "{version}");
        if first {
            let (server, port) =
                self::server(version, &tls.replace("tls {", "tls { handshake_first: true,"), "").await?;
            let url = of(format!("tls://127.0.0.1:{port}?tls_handshake_first=true"));
            let mut leaf = Leaf::connect(&url, &login("one", &["to.>"])).await.context(version)?;
            arrives(&server, "", &mut leaf).await?;
        }
    }
    Ok(())
}

/// What fences a feed that was frozen: the server closes its connection when its successor comes.
#[tokio::test]
async fn the_newest_connection_of_a_name_stays() -> Result<()> {
    for version in VERSIONS {
        let (server, port) = server(version, "", "").await?;
        let url = connection(&format!("nats-leaf://127.0.0.1:{port}"));
        let mut old = Leaf::connect(&url, &login("one", &["to.>"])).await?;
        let mut other = Leaf::connect(&url, &login("two", &["to.>"])).await?;
        let mut new = Leaf::connect(&url, &login("one", &["to.>"])).await?;
        let ended = async {
            loop {
                if let Err(error) = old.turn().await {
                    return error;
                }
            }
        };
        let error = timeout(LIMIT, ended).await.context("the old connection lives")?;
        assert!(error.message.contains("Duplicate Remote LeafNode Connection"), "{version}: {error}");
        arrives(&server, "", &mut new).await?;
        arrives(&server, "", &mut other).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_port_for_clients_is_named_as_one() -> Result<()> {
    for version in VERSIONS {
        let (server, _) = server(version, "", "").await?;
        let url = connection(&format!("nats-leaf://127.0.0.1:{}", server.port()));
        let Err(error) = Leaf::connect(&url, &login("one", &["to.>"])).await else { bail!("let in") };
        assert!(error.kind == ErrorKind::Hold && error.message.contains("not a leafnode port"), "{version}: {error}");
    }
    Ok(())
}

/// Two addresses lead to one server, which takes long for a login: the second attempt begins before the first one ends. The server
/// would close the first connection for the second one.
#[tokio::test]
async fn a_slow_server_with_two_addresses_is_one() -> Result<()> {
    for version in VERSIONS {
        let (server, port) = server(version, "", "").await?;
        let proxies = [Proxy::start(port).await?, Proxy::start(port).await?];
        for proxy in &proxies {
            proxy.delay(Duration::from_millis(600));
        }
        let url = format!("nats-leaf://127.0.0.1:{},127.0.0.1:{}", proxies[0].port(), proxies[1].port());
        let mut leaf = Leaf::connect(&connection(&url), &login("one", &["to.>"])).await?;
        ensure!(leaf.server().address.is_some_and(|address| address.port() == proxies[0].port()), "{version}");
        let tried = async || proxies[1].accepted() == 1 && proxies[1].open() == 0;
        wait_for("the second attempt to be over", LIMIT, tried).await.context(version)?;
        leaf.round_trip().await.with_context(|| format!("{version}: {}", server.log()))?;
        let other = Leaf::connect_other(&connection(&url), &login("one", &["to.>"]), &[leaf.server()]).await?;
        ensure!(other.is_none(), "{version}");
        leaf.round_trip().await.with_context(|| format!("{version}: {}", server.log()))?;
        ensure!(!server.log().contains("Duplicate Remote LeafNode"), "{version}: {}", server.log());
    }
    Ok(())
}
