//! Choria's own broker beside the adapter, in one queue group. `CHORIA` names the program: it is started as
//! `choria broker run --disable-tls --config FILE`.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::harness::{
    LIMIT, Outgoing, REGISTRATION as TOPIC, Registration, Server, Site,
    process::Process,
    raw::{Stored, wait_messages},
    request, wait_value,
};

const MESSAGES: u64 = 2_000;

/// The broker with an adapter as the site's.
fn start(program: &PathBuf, folder: &std::path::Path, site: &Site) -> Result<Process> {
    let (ingest, stream) = (address(&site.source), address(&site.target));
    // The broker reads its security files, though it verifies nothing with them.
    let key = rcgen::generate_simple_self_signed(["broker.example.net".to_owned()])?;
    let (certificate_file, key_file) = (folder.join("broker.pem"), folder.join("broker.key"));
    std::fs::write(&certificate_file, key.cert.pem())?;
    std::fs::write(&key_file, key.signing_key.serialize_pem())?;
    let adapter = "plugin.choria.adapter.inventory";
    let (certificate, key) = (certificate_file.display(), key_file.display());
    let text = format!(
        "identity = broker.example.net\nplugin.choria.use_srv = false\nplugin.choria.middleware_hosts = {ingest}\n\
         plugin.security.provider = file\nplugin.security.file.certificate = {certificate}\n\
         plugin.security.file.key = {key}\nplugin.security.file.ca = {certificate}\n\
         plugin.security.file.cache = {}\nplugin.choria.adapters = inventory\n{adapter}.type = jetstream\n\
         {adapter}.queue_len = 10000\n{adapter}.stream.topic = reg.%s\n{adapter}.stream.servers = {stream}\n\
         {adapter}.ingest.topic = {TOPIC}\n{adapter}.ingest.protocol = request\n",
        folder.display(),
    );
    let file = folder.join("broker.conf");
    std::fs::write(&file, text)?;
    let mut command = Command::new(program);
    command.args(["broker", "run", "--disable-tls", "--config"]).arg(&file);
    Process::spawn(&mut command, &folder.join("broker.log"))
}

fn address(server: &Server) -> String {
    format!("nats://127.0.0.1:{}", server.port())
}

/// What readers of a stream see of its messages, but for their order: the sender in the subject, and the payload. The
/// adapter adds a message id, so that the target drops what is sent twice; it has no other header.
fn seen(stored: &[Stored]) -> Result<BTreeSet<(String, String)>> {
    let of = |one: &Stored| {
        let header = String::from_utf8_lossy(&one.header);
        let others: Vec<_> = header.lines().skip(1).filter(|line| !line.is_empty()).collect();
        ensure!(others.iter().all(|line| line.starts_with("Nats-Msg-Id: ")), "{header}");
        Ok((one.subject[4..].to_owned(), String::from_utf8_lossy(&one.payload).into_owned()))
    };
    stored.iter().map(of).collect()
}

#[tokio::test]
async fn chorias_broker_shares_and_writes_the_same() -> Result<()> {
    let Some(program) = std::env::var_os("CHORIA").map(PathBuf::from) else {
        println!("skipped: CHORIA does not name the program of Choria's broker");
        return Ok(());
    };
    let site = Site::builder().control_at_source().start().await?;
    let mut target = site.target().await?;
    target.create_stream("REG", json!({"subjects": ["reg.>"]})).await?;
    let folder = tempfile::tempdir()?;
    let broker = start(&program, folder.path(), &site)?;
    let log = || std::fs::read_to_string(folder.path().join("broker.log")).unwrap_or_default();
    let mut source = site.source().await?;
    let registration = |number: u64| {
        let (id, data) = (format!("{number:032x}"), format!("{{\"n\":{number}}}"));
        let sender = format!("n{}.example.net", number % 50);
        let registration = Registration { id: &id, sender: &sender, data: &data, time: 1_577_873_472_000_000_000 };
        Outgoing::new(TOPIC, registration.v1())
    };
    // It is alone first: what it stores shows that it reads.
    wait_value("the broker to read", LIMIT, async || {
        source.send_only(&registration(MESSAGES)).await.ok()?;
        let state = target.stream_state("REG").await.ok()?;
        (state["messages"].as_u64()? > 0).then_some(())
    })
    .await
    .with_context(log)?;

    // Another queue group gets every message: what the adapter makes of those of the broker.
    target.create_stream("ALL", json!({"subjects": ["all.>"]})).await?;
    for (name, topic) in [("inventory", "reg.%s"), ("compared", "all.%s")] {
        let adapter = json!({
            "name": name, "queue_len": 10_000,
            "ingest": {"topic": TOPIC, "protocol": "request", "servers": site.source.url()},
            "stream": {"type": "jetstream", "topic": topic, "servers": site.target.url()},
        });
        request(&site.client, "replicator.adapter.add", adapter).await?;
    }
    let row = async |name: &str| Some(site.ask("adapter.status", name).await.ok()?.body["adapters"].get(0)?.clone());
    for name in ["inventory", "compared"] {
        let runs = async || row(name).await.filter(|row| row["state"] == "running");
        wait_value("the adapter to run", LIMIT, runs).await?;
    }
    target.api("STREAM.PURGE.REG", json!({})).await?;
    for number in 0..MESSAGES {
        source.send_only(&registration(number)).await?;
    }
    wait_messages(&mut target, "REG", MESSAGES, LIMIT).await.with_context(log)?;
    wait_messages(&mut target, "ALL", MESSAGES, LIMIT).await?;
    let ours = row("inventory").await.context("a row")?["stored"].as_u64().unwrap_or_default();
    println!("of {MESSAGES} messages the adapter stored {ours}, the broker {}", MESSAGES - ours);
    ensure!(ours > 0 && ours < MESSAGES, "{ours}");

    let (shared, all) = (target.read_stream("REG").await?, target.read_stream("ALL").await?);
    ensure!(shared.len() as u64 == MESSAGES, "{} messages", shared.len());
    let (shared, all) = (seen(&shared)?, seen(&all)?);
    let differs = shared.symmetric_difference(&all).next();
    ensure!(shared.len() as u64 == MESSAGES && differs.is_none(), "{differs:?}");
    drop(broker);
    Ok(())
}
