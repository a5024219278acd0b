//! What the operator allows: servers and files that documents may name, and a service that cannot be changed.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::Result;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::{LIMIT, Role, Server, Service, Site, client::ask, connect, request, wait_for};

/// A port that counts who comes.
async fn trap() -> Result<(u16, Arc<AtomicUsize>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    Ok((port, count))
}

#[tokio::test]
async fn documents_name_only_what_the_operator_allows() -> Result<()> {
    let (source, target) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let folder = tempfile::tempdir()?;
    let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
    fs::create_dir(&inside)?;
    fs::create_dir(&outside)?;
    let args = vec![
        "--allow-url".to_owned(),
        format!("nats://127.0.0.1:{}", source.port()),
        "--allow-url".to_owned(),
        format!("nats://127.0.0.*:{}", target.port()),
        "--allow-credentials".to_owned(),
        inside.display().to_string(),
    ];
    let site = Site::builder().on(source, target).control_at_source().args(args).start().await?;
    site.replicate("GOOD", 10).await?;

    let (port, visits) = trap().await?;
    site.filled("BAD", 5).await?;
    let elsewhere = json!({"target_url": format!("nats://u:s3cret@127.0.0.1:{port}")});
    let reply = site.send("config.add", site.document_with("BAD", elsewhere.clone())).await?;
    assert_eq!(reply.error, Some(400));
    let problem = reply.body["error"]["problems"][0].clone();
    assert_eq!(problem["path"], "/target_url", "{problem}");
    let message = problem["message"].as_str().unwrap_or_default();
    assert!(message.contains(&format!("server `nats://127.0.0.1:{port}` is not allowed")), "{message}");
    assert!(message.contains("allowed are `nats://127.0.0.1:") && !message.contains("s3cret"), "{message}");

    let file = outside.join("x.creds");
    let outside = json!({"target_url": format!("{}?credentials={}", site.target.url(), file.display())});
    let reply = site.send("config.add", site.document_with("BAD", outside)).await?;
    assert_eq!(reply.body["error"]["problems"][0]["path"], "/target_url", "{}", reply.body);

    // By hand the same: nothing runs, and what runs is not replaced.
    site.put("BAD", site.document_with("BAD", elsewhere.clone()).to_string()).await?;
    let row = site.row_when("BAD", "is invalid", |row| row["state"] == "invalid").await?;
    assert!(row["last_error"]["message"].as_str().is_some_and(|text| text.contains("is not allowed")), "{row}");
    site.put("GOOD", site.document_with("GOOD", elsewhere).to_string()).await?;
    let refused =
        |row: &Value| row["last_error"]["message"].as_str().is_some_and(|text| text.contains("is not allowed"));
    site.row_when("GOOD", "refuses the edit", refused).await?;
    site.publish("GOOD", 11..=20).await?;
    site.copied("GOOD", 20).await?;
    assert_eq!(visits.load(Ordering::Relaxed), 0, "somebody connected");
    assert!(!site.service.log().contains("s3cret"));
    Ok(())
}

#[tokio::test]
async fn a_link_that_is_moved_later_is_not_followed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let inside = folder.path().join("in");
    fs::create_dir(&inside)?;
    fs::write(folder.path().join("secret.nk"), "x")?;
    let args = ["--allow-credentials".to_owned(), inside.display().to_string()];
    let site = Site::builder().control_at_source().args(args).start().await?;
    // Allowed when it was written: the file is not there yet.
    let seed = inside.join("later.nk");
    site.filled("A", 1).await?;
    site.add("A", json!({"target_url": format!("{}?nkey={}", site.target.url(), seed.display())})).await?;
    let message = |row: &Value| row["last_error"]["message"].as_str().unwrap_or_default().to_owned();
    site.row_when("A", "misses the file", |row| message(row).contains("No such file")).await?;
    std::os::unix::fs::symlink(folder.path().join("secret.nk"), &seed)?;
    let row = site.row_when("A", "refuses the link", |row| message(row).contains("is not allowed")).await?;
    assert_eq!(row["last_error"]["kind"], "hold", "{row}");
    Ok(())
}

#[tokio::test]
async fn a_read_only_service_answers_questions_and_refuses_changes() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--read-only"]).start().await?;
    site.filled("A", 10).await?;
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let endpoints = info["endpoints"].as_array().cloned().unwrap_or_default();
    let subject = |endpoint: &Value| endpoint["subject"].as_str().unwrap_or_default().to_owned();
    let changes: Vec<_> = endpoints.iter().filter(|e| e["queue_group"] == "q").map(subject).collect();
    assert!(changes.len() >= 3, "{info}");
    let changes = changes.iter().filter(|change| {
        ![".validate", ".report", ".drift", ".consumers.export", ".dlq.list", ".dlq.show"]
            .iter()
            .any(|end| change.ends_with(end))
    });
    for change in changes {
        let reply = ask(&site.client, change, site.document("A").to_string().as_bytes()).await?;
        assert_eq!(reply.error, Some(403), "{change}: {}", reply.body);
        let text = reply.body["error"]["description"].as_str().unwrap_or_default().to_owned();
        assert!(text.contains("read-only"), "{text}");
    }
    assert_eq!(request(&site.client, "replicator.config.list", Value::Null).await?["total"], 0);
    // A document may be checked, and nobody is connected to for that.
    let checked = request(&site.client, "replicator.config.validate", site.document("A")).await?;
    assert_eq!((&checked["valid"], &checked["preflight"]), (&json!(true), &Value::Null), "{checked}");
    // Who may write to the bucket still may: that is the server's permission to give.
    site.put("A", site.document("A").to_string()).await?;
    site.copied("A", 10).await?;
    assert_eq!(request(&site.client, "replicator.status", json!({"replication": "A"})).await?["total"], 1);
    Ok(())
}

#[tokio::test]
async fn a_service_that_others_reach_warns_when_anything_may_be_named() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    // Not this machine by its name; the connection is made through the second server.
    let url = format!("nats://192.0.2.1:1,127.0.0.1:{}?connect_timeout=100ms", control.port());
    let warned = async |args: &[&str]| -> Result<bool> {
        let service = Service::builder(&url, "TEST").args(args.iter().copied()).start().await?;
        Ok(service.log().contains("--allow-url"))
    };
    let folder = tempfile::tempdir()?;
    let credentials = folder.path().display().to_string();
    assert!(warned(&[]).await?);
    assert!(!warned(&["--allow-url", "*.example.net", "--allow-credentials", &credentials]).await?);
    let local = Service::start(&control.url()).await?;
    assert!(!local.log().contains("--allow-url"));
    // It works all the same.
    let client = connect(&control.url()).await?;
    wait_for("an answer", LIMIT, async || ask(&client, "replicator.status", b"").await.is_ok()).await
}
