//! The process: start, signals, exit codes, metrics and health.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{LIMIT, PROMPT, Role, Server, Service, Site, connect, request, timed, wait_for};

fn signal(service: &Service, signal: Signal) -> Result<()> {
    let pid = service.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).context("no pid")?;
    Ok(kill_process(pid, signal)?)
}

#[tokio::test]
async fn one_line_says_that_the_service_is_ready_and_where() -> Result<()> {
    let users = "authorization { users: [{user: u, password: hunter2}] }";
    let control = Server::builder(Role::Control).config(users).start().await?;
    let service = Service::builder(&control.url_as("u:hunter2"), "EAST").instance("one").start().await?;
    let log = service.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("ready")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    for part in ["site=\"EAST\"", "instance=\"one\"", &format!("u:***@127.0.0.1:{}", control.port()), "replications=0"]
    {
        assert!(lines[0].contains(part), "`{part}` is not in `{}`", lines[0]);
    }
    // The line is no promise: requests are answered at once.
    let client = connect(&control.url_as("u:hunter2")).await?;
    assert_eq!(request(&client, "replicator.status", Value::Null).await?["site"], "EAST");
    Ok(())
}

#[tokio::test]
async fn sigterm_and_sigint_stop_in_order_and_save_the_position() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    for (round, stop) in [Signal::TERM, Signal::INT].into_iter().enumerate() {
        let all = 20_010 + round as u64 * 20_000;
        site.publish("ORDERS", 1..=20_000).await?;
        signal(&site.service, stop)?;
        let status = site.service.wait(LIMIT).await?;
        assert_eq!(status.code(), Some(0), "{stop:?}: {status}\n{}", site.service.log());
        // In order: everything that is at the target is in the position.
        let (copied, position) = (site.at_target("ORDERS").await?, site.position("ORDERS").await?);
        let position = position.context("a position")?;
        assert_eq!(position["source"]["seq"], copied, "{stop:?}: {position}");
        assert_eq!(position["status"]["state"], "stopped", "{position}");
        assert_eq!(position["status"]["leader"], Value::Null, "{position}");
        site.service.restart().await?;
        site.copied("ORDERS", all).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_stop_ends_in_time_though_the_target_sends_no_acks() -> Result<()> {
    let mut site = Site::small().await?;
    stuck(&site).await?;
    let (status, time) = timed(site.service.stop()).await?;
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(time < Duration::from_secs(12), "{time:?}");
    // Nothing is lost and nothing comes twice.
    site.target.thaw()?;
    site.service.restart().await?;
    site.copied("ORDERS", 20).await?;
    site.settled("ORDERS", 20).await?;
    assert_eq!(site.at_target("ORDERS").await?, 20);
    Ok(())
}

#[tokio::test]
async fn a_second_signal_ends_the_process_at_once() -> Result<()> {
    let mut site = Site::small().await?;
    stuck(&site).await?;
    signal(&site.service, Signal::TERM)?;
    wait_for("the stop to begin", LIMIT, async || site.service.log().contains("SIGTERM: stopping")).await?;
    signal(&site.service, Signal::INT)?;
    let (status, time) = timed(site.service.wait(LIMIT)).await?;
    assert_eq!(status.code(), Some(1), "{status}");
    assert!(time < PROMPT, "{time:?}");
    assert!(site.service.log().contains("SIGINT again: exiting at once"), "{}", site.service.log());
    Ok(())
}

/// A replication with messages in flight that its target does not confirm.
async fn stuck(site: &Site) -> Result<()> {
    site.replicate("ORDERS", 10).await?;
    site.target.freeze()?;
    site.publish("ORDERS", 1..=10).await?;
    let in_the_air = |row: &Value| row["in_flight"]["messages"].as_u64() > Some(0);
    site.row_when("ORDERS", "has messages in flight", in_the_air).await?;
    Ok(())
}

#[tokio::test]
async fn wrong_usage_ends_with_2_and_names_flag_and_value() -> Result<()> {
    let check = async |url: &str, arguments: &[&str], expect: &[&str]| {
        let mut service = Service::builder(url, "TEST").args(arguments.iter().copied()).spawn()?;
        let status = service.wait(LIMIT).await?;
        let log = service.log();
        assert_eq!(status.code(), Some(2), "{arguments:?}: {log}");
        for text in expect {
            assert!(log.contains(text), "`{text}` is not in {log}");
        }
        anyhow::Ok(log)
    };
    let good = "nats://127.0.0.1:4222";
    check(good, &["--instance", "a.b"], &["`--instance`", "`a.b`"]).await?;
    check(good, &["--prefix", "a.*"], &["`--prefix`", "`a.*`"]).await?;
    check(good, &["--bucket-prefix", "a b"], &["`--bucket-prefix`", "`a b`"]).await?;
    check(good, &["--bucket-replicas", "9"], &["--bucket-replicas", "'9'"]).await?;
    check(good, &["--monitor", "8080"], &["`--monitor`", "`8080`"]).await?;
    check(good, &["--log-level", "inof"], &["`inof`"]).await?;
    check(good, &["--log-format", "xml"], &["--log-format", "'xml'"]).await?;
    check(good, &["--colour", "red"], &["--colour"]).await?;
    check("ftp://127.0.0.1", &[], &["`--server`", "`ftp://`"]).await?;
    check("nats://127.0.0.1:99999", &[], &["`--server`", "port"]).await?;
    // All at once, and no password.
    let log = check("nats://u:hunter2@h:x", &["--instance", "a.b"], &["`--server`", "`--instance`"]).await?;
    assert!(!log.contains("hunter2"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_monitor_that_cannot_listen_ends_with_1_and_says_why() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let taken = format!("127.0.0.1:{}", control.port());
    let mut service = Service::builder(&control.url(), "TEST").args(["--monitor", &taken]).spawn()?;
    assert_eq!(service.wait(LIMIT).await?.code(), Some(1));
    assert!(service.log().contains(&format!("`--monitor {taken}`")), "{}", service.log());
    Ok(())
}

#[tokio::test]
async fn a_service_that_starts_before_its_server_waits_for_it() -> Result<()> {
    let mut control = Server::start(Role::Control).await?;
    control.stop().await?;
    let mut service = Service::builder(&control.url(), "TEST").args(["--monitor", "127.0.0.1:0"]).spawn()?;
    assert_eq!(service.get("/livez").await?.0, 200);
    assert_eq!(service.get("/readyz").await?, (503, "the control connection is down\n".to_owned()));
    wait_for("the log to say what is missing", LIMIT, async || {
        service.log().contains(&format!("127.0.0.1:{}", control.port()))
    })
    .await?;
    control.restart().await?;
    service.wait_ready().await?;
    assert_eq!(service.get("/readyz").await?, (200, "ok\n".to_owned()));
    let client = connect(&control.url()).await?;
    assert_eq!(request(&client, "replicator.status", Value::Null).await?["total"], 0);
    Ok(())
}

#[tokio::test]
async fn a_service_without_its_server_can_be_stopped() -> Result<()> {
    let mut control = Server::start(Role::Control).await?;
    control.stop().await?;
    let mut service = Service::builder(&control.url(), "TEST").args(["--monitor", "127.0.0.1:0"]).spawn()?;
    service.get("/livez").await?;
    assert_eq!(service.stop().await?.code(), Some(0), "{}", service.log());
    Ok(())
}

#[tokio::test]
async fn readyz_follows_the_control_connection() -> Result<()> {
    let mut site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    let is = async |site: &Site, code: u16| site.service.get("/readyz").await.is_ok_and(|answer| answer.0 == code);
    assert!(is(&site, 200).await);
    site.source.kill()?;
    wait_for("503 without the control server", LIMIT, async || is(&site, 503).await).await?;
    assert_eq!(site.service.get("/livez").await?.0, 200);
    site.source.restart().await?;
    wait_for("200 with the control server", LIMIT, async || is(&site, 200).await).await?;
    Ok(())
}

/// Counters that Choria's stream-replicator has, under the same names, so that its dashboards keep working.
const CHORIA: [&str; 12] = [
    "total_messages",
    "total_bytes",
    "copied_messages",
    "copied_bytes",
    "skipped_messages",
    "skipped_bytes",
    "too_old_messages",
    "handler_error_count",
    "meta_parse_failed_count",
    "ack_failed_count",
    "consumer_recreated",
    "stream_sequence",
];

#[tokio::test]
async fn metrics_have_chorias_names_and_agree_with_the_status() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.replicate("ORDERS", 100).await?;
    site.filled("NAMED", 10).await?;
    site.send("config.add", site.document_with("NAMED", json!({"name": "second"}))).await?;
    let row = site.settled("ORDERS", 100).await?;
    site.settled("NAMED.second", 10).await?;
    let (code, text) = site.service.get("/metrics").await?;
    assert_eq!(code, 200);
    let samples: HashMap<&str, f64> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' ').and_then(|(name, value)| Some((name, value.parse().ok()?))))
        .collect();
    let value = |name: &str, labels: &str| {
        let sample = format!("choria_stream_replicator_replicator_{name}{{{labels}}}");
        samples.get(sample.as_str()).copied().unwrap_or_else(|| panic!("{sample} is missing in\n{text}"))
    };
    let labels = r#"stream="ORDERS",replicator="TEST",worker="TEST""#;
    for name in CHORIA {
        value(name, labels);
    }
    for (name, field) in [
        ("total_messages", "/counters/received"),
        ("copied_messages", "/counters/copied"),
        ("too_old_messages", "/counters/skipped_old"),
        ("handler_error_count", "/counters/errors"),
        ("stream_sequence", "/position/source_seq"),
        ("stream_lag_messages", "/lag/messages"),
        ("stream_lag_seconds", "/lag/seconds"),
        ("in_flight_messages", "/in_flight/messages"),
        ("epoch", "/epoch"),
        ("target_sequence", "/position/target_seq"),
    ] {
        assert_eq!(Some(value(name, labels)), row.pointer(field).and_then(Value::as_f64), "{name}");
    }
    assert_eq!(value("processing_time_seconds_count", labels), 100.0);
    assert_eq!(value("state", &format!("{labels},state=\"running\"")), 1.0);
    assert_eq!(value("copied_messages", r#"stream="NAMED",replicator="TEST",worker="second""#), 10.0);
    let build = samples.iter().find(|(name, _)| name.starts_with("choria_stream_replicator_build_info{version=\"0."));
    assert_eq!(build.map(|(_, value)| *value), Some(1.0), "{text}");
    let resident = samples.get("process_resident_memory_bytes").copied().unwrap_or_default();
    assert!(resident > 1e6 && resident < 1e9, "{resident}");
    for family in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let name = family.split(' ').next().unwrap_or_default();
        if name.starts_with("process_") {
            continue;
        }
        assert!(name.starts_with("choria_stream_replicator_") && !name.ends_with("_total"), "{name}");
    }
    Ok(())
}

/// A unit of `Type=notify` with a watchdog.
#[tokio::test]
async fn systemd_learns_of_start_state_watchdog_and_stop() -> Result<()> {
    let mut control = Server::start(Role::Control).await?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notify");
    let socket = tokio::net::UnixDatagram::bind(&path)?;
    control.kill()?;
    let mut service = Service::builder(&control.url(), "TEST")
        .env("NOTIFY_SOCKET", path.to_str().context("a path")?)
        .env("WATCHDOG_USEC", "600000")
        .spawn()?;
    let mut heard = Vec::new();
    let mut until = async |text: &str| {
        tokio::time::timeout(LIMIT, async {
            let mut buffer = [0; 1024];
            while !heard.iter().any(|line: &String| line.contains(text)) {
                let length = socket.recv(&mut buffer).await?;
                heard.extend(String::from_utf8_lossy(&buffer[..length]).lines().map(str::to_owned));
            }
            anyhow::Ok(std::mem::take(&mut heard))
        })
        .await
        .with_context(|| format!("no `{text}`"))?
    };
    // The unit is up though its control server is not: systemd does not give up on it.
    let begun = until("STATUS=waiting: the control connection is down").await?;
    assert!(begun.iter().any(|line| line == "READY=1"), "{begun:?}");
    control.restart().await?;
    until("STATUS=ready").await?;
    until("WATCHDOG=1").await?;
    until("WATCHDOG=1").await?;
    control.kill()?;
    until("STATUS=waiting: the control connection is down").await?;
    control.restart().await?;
    until("STATUS=ready").await?;
    signal(&service, Signal::TERM)?;
    let end = until("STATUS=stopping, at most 10s").await?;
    assert!(end.iter().any(|line| line == "STOPPING=1"), "{end:?}");
    assert_eq!(service.wait(LIMIT).await?.code(), Some(0));
    Ok(())
}

#[tokio::test]
async fn a_control_server_without_jetstream_is_named() -> Result<()> {
    let off = Server::builder(Role::Control).without_jetstream().start().await?;
    // On at the server, and not for the account of the login.
    let accounts = "accounts: { SYS: { users: [{ user: s, password: s }] }, A: { users: [{ user: a, password: a }] } }\n\
                    system_account: SYS";
    let of_others = Server::builder(Role::Control).config(accounts).start().await?;
    for url in [off.url(), of_others.url_as("a:a")] {
        let service = Service::builder(&url, "TEST").spawn()?;
        for expect in ["no JetStream answers at the control server", "`nats-server -js`"] {
            let shown = async || service.log().contains(expect);
            wait_for("the log to say so", LIMIT, shown).await.with_context(|| service.log())?;
        }
    }
    Ok(())
}
