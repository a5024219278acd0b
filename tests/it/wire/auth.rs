//! Every way to log in and every kind of TLS, for the lanes of a copy and for commands, against real servers.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use async_nats::{ConnectOptions, jetstream};
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as CertificateKey};
use serde_json::{Value, json};

use crate::harness::signed::SignedAccount;
use crate::harness::{Cli, Role, Server, Site};

const COUNT: u64 = 25;

/// A site whose source is this server, with some messages in it.
async fn begin(source: Server, login: ConnectOptions) -> Result<Site> {
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let client = login.connect(site.source.url()).await.context("the test cannot log in")?;
    let context = jetstream::new(client);
    let config = jetstream::stream::Config { name: "A".into(), subjects: vec!["a".into()], ..Default::default() };
    context.create_stream(config).await?;
    for i in 0..COUNT {
        context.publish("a", i.to_string().into()).await?.await?;
    }
    Ok(site)
}

async fn copies(site: &Site, fields: Value) -> Result<()> {
    commands_come_in(&fields).await?;
    site.add("A", fields).await?;
    site.settled("A", COUNT).await?;
    let copied = site.target().await?.read_stream("A").await?;
    assert_eq!(copied.len() as u64, COUNT);
    Ok(())
}

/// A command is let in with the same URL and files; that no service answers there is the error of a command that was let in.
async fn commands_come_in(fields: &Value) -> Result<()> {
    let mut cli = Cli::new(fields["source_url"].as_str().context("a URL")?);
    for (name, field) in [("NATS_CA", "ca"), ("NATS_CERT", "cert"), ("NATS_KEY", "key")] {
        if let Some(file) = fields["source_tls"][field].as_str() {
            cli = cli.env(name, file);
        }
    }
    let ended = cli.run(["status"]).await?;
    assert!(ended.stderr.contains("`replicator.status`"), "{ended:?}");
    Ok(())
}

fn url(site: &Site, credentials: &str, options: &str) -> Value {
    json!({ "source_url": format!("nats://{credentials}127.0.0.1:{}{options}", site.source.port()) })
}

#[tokio::test]
async fn user_and_password() -> Result<()> {
    let config = "authorization { users: [{user: us, password: \"p@ss/w0rd\"}] }";
    let source = Server::builder(Role::Source).config(config).start().await?;
    let site = begin(source, ConnectOptions::with_user_and_password("us".into(), "p@ss/w0rd".into())).await?;
    copies(&site, url(&site, "us:p%40ss%2Fw0rd@", "")).await
}

#[tokio::test]
async fn a_token() -> Result<()> {
    let source = Server::builder(Role::Source).config("authorization { token: t0ken }").start().await?;
    let site = begin(source, ConnectOptions::with_token("t0ken".into())).await?;
    copies(&site, url(&site, "t0ken@", "")).await
}

#[tokio::test]
async fn an_nkey_seed_file() -> Result<()> {
    let user = KeyPair::new_user();
    let config = format!("authorization {{ users: [{{nkey: {}}}] }}", user.public_key());
    let source = Server::builder(Role::Source).config(&config).start().await?;
    let folder = tempfile::tempdir()?;
    let seed = folder.path().join("user.nk");
    fs::write(&seed, format!("{}\n", user.seed()?))?;
    let site = begin(source, ConnectOptions::with_nkey(user.seed()?)).await?;
    copies(&site, url(&site, "", &format!("?nkey={}", seed.display()))).await
}

#[tokio::test]
async fn a_credentials_file_and_a_jwt_beside_a_seed() -> Result<()> {
    let signed = SignedAccount::new()?;
    let user = signed.user(None)?;
    let source = Server::builder(Role::Source).config(&signed.config).start().await?;
    let folder = tempfile::tempdir()?;
    let file = |name: &str| folder.path().join(name);
    let creds = user.credentials();
    fs::write(file("user.creds"), &creds)?;
    fs::write(file("user.jwt"), &user.jwt)?;
    fs::write(file("user.nk"), &user.seed)?;
    let site = begin(source, ConnectOptions::with_credentials(&creds)?).await?;
    copies(&site, url(&site, "", &format!("?credentials={}", file("user.creds").display()))).await?;
    // The other spelling is another replication into another stream.
    let options = format!("?jwt={}&nkey={}", file("user.jwt").display(), file("user.nk").display());
    let mut fields = url(&site, "", &options);
    fields["name"] = "second".into();
    fields["target_stream"] = "B".into();
    fields["target_subject_prefix"] = "b".into();
    commands_come_in(&fields).await?;
    site.add("A", fields).await?;
    site.settled("A.second", COUNT).await.map(|_| ())
}

#[tokio::test]
async fn a_wrong_password_is_held_and_told_without_showing_it() -> Result<()> {
    let config = "authorization { users: [{user: us, password: right}] }";
    let source = Server::builder(Role::Source).config(config).start().await?;
    let site = begin(source, ConnectOptions::with_user_and_password("us".into(), "right".into())).await?;
    site.add("A", url(&site, "us:wr0ng-s3cret@", "")).await?;
    let row = site.row_when("A", "is held", |row| row["state"] == "held").await?.to_string();
    assert!(row.contains("Authorization Violation"), "{row}");
    assert!(!row.contains("wr0ng-s3cret") && !site.service.log().contains("wr0ng-s3cret"));
    Ok(())
}

/// Certificates of one authority for the server and for a client, as files in a folder.
pub(crate) fn certificates(folder: &Path) -> Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, CertificateKey::generate()?)?;
    fs::write(folder.join("ca.pem"), authority.pem())?;
    for (name, hosts) in
        [("server", vec!["127.0.0.1".to_owned(), "localhost".to_owned()]), ("client", vec!["client".to_owned()])]
    {
        let key = CertificateKey::generate()?;
        let certificate = CertificateParams::new(hosts)?.signed_by(&key, &authority)?;
        fs::write(folder.join(format!("{name}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

#[tokio::test]
async fn tls_with_authority_client_certificate_and_handshake_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let path = |name: &str| folder.path().join(name);
    let file = |name: &str| path(name).display().to_string();
    for first in [false, true] {
        let config = format!(
            "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true, handshake_first: {first} }}",
            file("server.pem"),
            file("server.key"),
            file("ca.pem")
        );
        let mut source = Server::builder(Role::Source).config(&config);
        if first {
            source = source.handshake_first();
        }
        let mut login = ConnectOptions::new()
            .add_root_certificates(path("ca.pem"))
            .add_client_certificate(path("client.pem"), path("client.key"))
            .require_tls(true);
        if first {
            login = login.tls_first();
        }
        let site = begin(source.start().await?, login).await?;
        let mut fields = url(&site, "", if first { "?tls_handshake_first=true" } else { "" });
        fields["source_tls"] = json!({"ca": file("ca.pem"), "cert": file("client.pem"), "key": file("client.key")});
        copies(&site, fields).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_unknown_authority_is_refused_unless_insecure_is_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let file = |name: &str| folder.path().join(name).display().to_string();
    let config = format!("tls {{ cert_file: {:?}, key_file: {:?} }}", file("server.pem"), file("server.key"));
    let source = Server::builder(Role::Source).config(&config).start().await?;
    let login = ConnectOptions::new().add_root_certificates(folder.path().join("ca.pem")).require_tls(true);
    let site = begin(source, login).await?;
    site.add("A", url(&site, "", "")).await?;
    let message = |row: &Value| row["last_error"]["message"].as_str().unwrap_or_default().to_owned();
    let row = site.row_when("A", "has a TLS error", |row| message(row).contains("TLS")).await?;
    assert!(message(&row).contains("certificate"), "{row}");
    let mut fields = url(&site, "", "?insecure=true");
    fields["name"] = "insecure".into();
    commands_come_in(&fields).await?;
    site.add("A", fields).await?;
    site.settled("A.insecure", COUNT).await.map(|_| ())
}
