//! `stream-replicator doctor`.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::harness::cli::Cli;
use crate::harness::server::free_port;
use crate::harness::{Role, SITE, Server, Service, Site, Skew};

/// Result and message of each check of this name.
fn found(report: &Value, name: &str) -> Vec<(String, String)> {
    let text = |check: &Value, field: &str| check[field].as_str().unwrap_or_default().to_owned();
    let checks = report["checks"].as_array().into_iter().flatten().filter(|check| check["name"] == name);
    checks.map(|check| (text(check, "result"), text(check, "message"))).collect()
}

#[track_caller]
fn has(report: &Value, name: &str, result: &str, message: &str) {
    let found = found(report, name);
    let is = |(shown, words): &(String, String)| shown == result && words.contains(message);
    assert!(found.iter().any(is), "{name} {result} `{message}`: {report:#}");
}

/// What it reports; the exit code says whether a check failed.
async fn report(cli: &Cli, more: &[&str]) -> Result<Value> {
    let arguments = ["doctor", "-o", "json"].iter().chain(more);
    let ended = cli.run(arguments).await?;
    let report: Value = serde_json::from_str(&ended.stdout).with_context(|| format!("{ended:?}"))?;
    assert_eq!(ended.code, Some(i32::from(report["result"] == "failed")), "{report:#}");
    Ok(report)
}

#[tokio::test]
async fn a_healthy_site_needs_nothing() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let shown = cli.ok(["doctor"]).await?;
    assert!(shown.starts_with("CHECK") && shown.ends_with("\nnothing to do\n"), "{shown}");
    let report = report(&cli, &["--serve"]).await?;
    assert_eq!(report["result"], "ok", "{report:#}");
    for name in ["connection", "jetstream", "buckets", "permissions", "service", "clocks", "instances", "replications"]
    {
        assert!(!found(&report, name).is_empty(), "no {name}: {report:#}");
    }
    has(&report, "clocks", "ok", "instance one");
    has(&report, "service", "ok", "1 instance: ");
    has(&report, "replications", "ok", "1 replication");

    site.ask("config.delete", "ORDERS").await?;
    site.send("config.add", site.document("LATER")).await?;
    site.row_when("LATER", "is held", |row| row["state"] == "held").await?;
    let ended = cli.run(["doctor"]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("held: LATER") && ended.stdout.contains("\ndo: LATER: fix the cause"), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn a_wrong_clock_of_an_instance_is_found() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--instance", "one"]).start().await?;
    let skew = Skew::of(3_600)?;
    let (name, value) = skew.variable();
    let _two = Service::builder(&site.service_url(), SITE).instance("two").env(name, &value).start().await?;
    let report = report(&site.cli(), &[]).await?;
    has(&report, "clocks", "warning", "instance two: ");
    has(&report, "clocks", "warning", " ahead of this host");
    assert!(!found(&report, "clocks")[0].1.contains("instance one"), "{report:#}");
    has(&report, "service", "ok", "2 instances: ");
    assert_eq!(report["result"], "warning", "{report:#}");
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_named_with_what_to_do() -> Result<()> {
    let nowhere = Cli::new(&format!("nats://127.0.0.1:{}", free_port()?));
    let nobody = report(&nowhere, &["--timeout", "1s"]).await?;
    has(&nobody, "connection", "failed", "127.0.0.1");
    assert!(nobody["checks"][0]["do"].as_str().is_some_and(|todo| todo.contains("--server")), "{nobody:#}");

    let bare = Server::start(Role::Control).await?;
    let empty = report(&Cli::new(&bare.url()), &["--timeout", "1s"]).await?;
    has(&empty, "buckets", "failed", "no service has run here");
    has(&empty, "service", "failed", "no instance answers");
    has(&empty, "connection", "ok", "server ");
    Ok(())
}

#[tokio::test]
async fn a_login_is_compared_with_what_is_needed() -> Result<()> {
    let operator = "{ user: operator, password: hunter2, permissions { publish: [\"replicator.>\", \"$SRV.>\", \"$SYS.REQ.USER.INFO\"], \
                    subscribe: \"_INBOX.>\" } }";
    let reader = "{ user: reader, password: hunter2, permissions { publish: [\"replicator.status\", \"$SYS.REQ.USER.INFO\"], \
                  subscribe: \"_INBOX.>\" } }";
    let users = format!("authorization {{ users: [{{ user: all, password: p }}, {operator}, {reader}] }}");
    let server = Server::builder(Role::Control).config(&users).start().await?;
    let _service = Service::builder(&server.url_as("all:p"), SITE).start().await?;
    let as_user = |user: &str| Cli::new(&server.url_as(&format!("{user}:hunter2")));
    let quick = ["--timeout", "1s"];
    let operator = report(&as_user("operator"), &quick).await?;
    has(&operator, "permissions", "ok", "all requests");
    has(&operator, "service", "ok", "1 instance: ");
    let serving = report(&as_user("operator"), &["--serve", "--timeout", "1s"]).await?;
    has(&serving, "permissions", "failed", "$JS.API.INFO");
    let reader = report(&as_user("reader"), &quick).await?;
    has(&reader, "permissions", "warning", "replicator.>");
    has(&report(&Cli::new(&server.url_as("all:p")), &["--serve"]).await?, "permissions", "ok", "`serve`");
    Ok(())
}
