//! `stream-replicator check`: what a monitoring system sees.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::{Cli, Role, Server, Site};

#[tokio::test]
async fn the_exit_code_is_the_result_in_every_format() -> Result<()> {
    let site = Site::small().await?;
    let cli = site.cli();
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    let check = async |arguments: &[&str], code: i32, begin: &str| {
        let ended = cli.run(["check"].iter().chain(arguments)).await?;
        assert!(ended.code == Some(code) && ended.stdout.starts_with(begin), "{arguments:?}: {ended:?}");
        anyhow::Ok(ended.stdout)
    };
    let ok = check(&["--lag-warn", "1", "--behind-critical", "1m"], 0, "OK replications: ORDERS is running | ").await?;
    assert!(ok.contains(" lag=0;1; behind=0s;;60\n"), "{ok}");

    site.target.freeze()?;
    site.publish("ORDERS", 1..=10).await?;
    site.row_when("ORDERS", "is behind", |row| row["lag"]["messages"] == 10).await?;
    check(&["--lag-warn", "10", "--lag-critical", "11"], 1, "WARNING replications: ORDERS is behind by 10").await?;
    check(&["ORD*", "--lag-warn", "5", "--lag-critical", "10"], 2, "CRITICAL replications: ORDERS").await?;
    check(&["--lag-critical", "11", "--behind-critical", "1h"], 0, "OK").await?;
    site.target.thaw()?;
    site.settled("ORDERS", 15).await?;

    site.send("config.add", site.document("LATER")).await?;
    site.row_when("LATER", "is held", |row| row["state"] == "held").await?;
    let held = check(&[], 2, "CRITICAL replications: LATER is held: ").await?;
    assert!(held.contains(" | replications=2 ") && held.contains(" held=1"), "{held}");
    check(&["--held", "warning"], 1, "WARNING").await?;
    check(&["--held", "ok"], 0, "OK replications: 2 replications OK").await?;
    check(&["ORDERS"], 0, "OK").await?;
    let metrics = check(&["--format", "prometheus"], 2, "# HELP stream_replicator_check_").await?;
    assert!(metrics.contains("stream_replicator_check_state{replication=\"LATER\",state=\"held\"} 1\n"), "{metrics}");
    check(&["--format", "text"], 2, "CRITICAL\nCRITICAL LATER is held").await?;
    for flags in [&["--format", "json"][..], &["--json"]] {
        let report: Value = serde_json::from_str(&check(flags, 2, "{").await?)?;
        assert_eq!((&report["status"], &report["status_code"]), (&json!("CRITICAL"), &json!(2)));
        let critical = report["critical"][0].as_str().context("a message")?;
        assert!(critical.starts_with("LATER is held: ") && report["perf_data"][0]["name"] == "replications");
    }
    check(&["ORDRES"], 2, "CRITICAL replications: replication `ORDRES` does not exist, did you mean `ORDERS`?").await?;
    Ok(())
}

#[tokio::test]
async fn no_answer_is_critical_and_wrong_usage_unknown() -> Result<()> {
    let server = Server::start(Role::Control).await?;
    let cli = Cli::new(&server.url());
    let ended = cli.run(["check"]).await?;
    let told = ended.stdout.starts_with("CRITICAL replications: no service answers on `replicator.status`");
    assert!(ended.code == Some(2) && told, "{ended:?}");
    for arguments in [&["check", "--lag-warn", "many"][..], &["check", "--behind-warn", "soon"], &["check", "--nope"]] {
        let ended = cli.run(arguments).await?;
        assert!(ended.code == Some(3) && ended.stdout.is_empty() && !ended.stderr.is_empty(), "{ended:?}");
    }
    let ended = cli.run(["check", "--server", "ftp://h"]).await?;
    assert!(ended.code == Some(3) && ended.stdout.starts_with("UNKNOWN"), "{ended:?}");
    assert_eq!(cli.run(["check", "--help"]).await?.code, Some(0));
    Ok(())
}
