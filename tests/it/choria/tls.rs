//! TLS files for the whole file, for one stream, for one side.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use async_nats::jetstream::{self, stream};
use async_nats::{Client, ConnectOptions};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair as CertificateKey};
use tempfile::TempDir;

use super::Place;
use crate::harness::server::free_port;
use crate::harness::{LIMIT, Role, Server, wait_for};

/// One authority and one certificate for each name that a file knows them by.
fn certificates(folder: &Path) -> Result<()> {
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, CertificateKey::generate()?)?;
    for name in ["ca", "hub-ca", "audit-ca", "audit-src-ca"] {
        fs::write(folder.join(format!("{name}.pem")), authority.pem())?;
    }
    for (name, host) in [("server", "127.0.0.1"), ("sr", "sr"), ("audit", "audit")] {
        let key = CertificateKey::generate()?;
        let certificate = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &authority)?;
        fs::write(folder.join(format!("{name}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

async fn start(role: Role, folder: &TempDir, more: &str) -> Result<Server> {
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (cert, key, ca) = (file("server.pem"), file("server.key"), file("ca.pem"));
    let config = format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca:?}, {more} }}");
    Server::builder(role).config(&config).start().await
}

async fn login(server: &Server, folder: &TempDir) -> Result<Client> {
    let path = |name: &str| folder.path().join(name);
    let options = ConnectOptions::new()
        .add_root_certificates(path("ca.pem"))
        .add_client_certificate(path("sr.pem"), path("sr.key"))
        .require_tls(true);
    Ok(options.connect(server.url()).await?)
}

#[tokio::test]
async fn the_most_specific_files_are_used() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    // The source wants a certificate of the client; the target takes both ways to begin.
    let source = start(Role::Source, &folder, "verify: true").await?;
    let target = start(Role::Target, &folder, "handshake_first: \"300ms\"").await?;
    let from = jetstream::new(login(&source, &folder).await?);
    let to = jetstream::new(login(&target, &folder).await?);
    for (name, subject) in [("BILLING", "billing"), ("AUDIT", "audit")] {
        let subjects = vec![format!("{subject}.>")];
        from.create_stream(stream::Config { name: name.to_owned(), subjects, ..Default::default() }).await?;
        for i in 0..5 {
            from.publish(format!("{subject}.{i}"), "x".into()).await?.await?;
        }
    }
    let place = Place { source, target, folder, port: free_port()? };
    let mut service = place.run("06-tls-levels")?;
    for name in ["BILLING", "AUDIT"] {
        let all = async || match to.get_stream(name).await {
            Ok(mut stream) => stream.info().await.is_ok_and(|info| info.state.messages == 5),
            Err(_) => false,
        };
        let found = wait_for(&format!("the copy of {name}"), LIMIT, all).await;
        ensure!(found.is_ok(), "{found:?}\n{}", service.log());
    }
    ensure!(service.stop().await?.success(), "{}", service.log());
    Ok(())
}
