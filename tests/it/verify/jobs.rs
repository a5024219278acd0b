//! Jobs: answered at once, cancelled, refused with the reason, forgotten with the replication.

use anyhow::Result;
use serde_json::{Value, json};

use super::{ID, clean, copied, ended, is_over, shown};
use crate::harness::{LIMIT, Site, client::refused, request, wait_for};

#[tokio::test]
async fn a_job_is_cancelled() -> Result<()> {
    let mut site = Site::small().await?;
    copied(&site, json!({}), 2_000).await?;
    assert_eq!(shown(&site, ID).await?, Value::Null);
    let slow = json!({"replication": ID, "rate": 100});
    let started = request(&site.client, "replicator.verify", slow.clone()).await?;
    wait_for("the comparison to be under way", LIMIT, async || {
        shown(&site, ID).await.is_ok_and(|found| found["state"] == "running")
    })
    .await?;
    let job = started["job"].as_str().unwrap_or_default();
    refused(&site.send("verify", slow.clone()).await?, 409, &format!("is being verified by job `{job}`"));
    let text = site.cli().ok(["verify", ID, "--cancel"]).await?;
    assert_eq!(text, "ORDERS: the comparison is cancelled\n");
    let found = ended(&site, ID, &started["job"]).await?;
    assert_eq!((&found["state"], &found["findings"]), (&json!("cancelled"), &json!(0)), "{found:#}");
    refused(&site.send("verify.cancel", json!({"replication": ID})).await?, 409, "is not being verified");
    let event = site.events.wait("verified", ID).await?;
    assert_eq!(event["state"], "cancelled", "{event}");
    // One that is cancelled while there is no leader ends when there is one.
    let started = request(&site.client, "replicator.verify", slow).await?;
    wait_for("the comparison to be under way", LIMIT, async || {
        shown(&site, ID).await.is_ok_and(|found| found["job"] == started["job"] && found["state"] == "running")
    })
    .await?;
    site.service.kill()?;
    site.bucket("REPLICATOR_CONFIG").await?.delete("ORDERS/verify").await?;
    site.service.restart().await?;
    let found = ended(&site, ID, &started["job"]).await?;
    assert_eq!(found["state"], "cancelled", "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_paused_replication_is_compared_after_a_restart() -> Result<()> {
    let mut site = Site::small().await?;
    copied(&site, json!({}), 500).await?;
    request(&site.client, "replicator.pause", json!({"replication": ID})).await?;
    for _ in 0..3 {
        site.service.kill()?;
        site.service.restart().await?;
        let found = super::verified(&site, ID, json!({})).await?;
        clean(&found, &site)?;
        assert_eq!(found["source_messages"], 500, "{found:#}");
    }
    Ok(())
}

#[tokio::test]
async fn a_job_that_ends_its_leaders_fails() -> Result<()> {
    let site = Site::small().await?;
    copied(&site, json!({}), 10).await?;
    let positions = site.bucket("REPLICATOR_POSITIONS").await?;
    for (job, starts, state) in [("four", 4, "done"), ("five", 5, "failed")] {
        // As after so many leaders that ended while they compared.
        let at = "2026-11-30T12:00:00Z";
        let record = json!({"version": 1, "job": job, "state": "running", "requested_at": at, "starts": starts});
        positions.put("ORDERS/verify", record.to_string().into()).await?;
        site.put("ORDERS/verify", json!({"version": 1, "job": job, "at": at}).to_string()).await?;
        let found = ended(&site, ID, &json!(job)).await?;
        assert_eq!((&found["state"], &found["starts"]), (&json!(state), &json!(starts + 1)), "{found:#}");
        let error = found["error"].as_str().unwrap_or_default();
        assert_eq!(error.starts_with("it began 5 times"), state == "failed", "{found:#}");
        let config = site.bucket("REPLICATOR_CONFIG").await?;
        wait_for("the request to be removed", LIMIT, async || {
            config.get("ORDERS/verify").await.is_ok_and(|mark| mark.is_none())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn wrong_requests_say_what_is_wrong() -> Result<()> {
    let site = Site::small().await?;
    copied(&site, json!({}), 10).await?;
    let with = |fields: Value| crate::harness::site::merged(json!({"replication": ID}), fields);
    for (fields, expect) in [
        (json!({"sample": "half"}), "`sample` `half` is no percentage"),
        (json!({"sample": "0%"}), "`sample` `0%` is no percentage"),
        (json!({"rate": 0}), "`rate` is 0: it is 1 to 10000000"),
        (json!({"from": 0}), "`from` is 0: sequences begin with 1"),
        (json!({"from": 5, "to": 4}), "`to` is 4, before `from`, which is 5"),
        (json!({"frm": 5}), "frm"),
    ] {
        refused(&site.send("verify", with(fields)).await?, 400, expect);
    }
    for endpoint in ["verify", "verify.status", "verify.cancel"] {
        refused(&site.send(endpoint, json!({"replication": "ODERS"})).await?, 404, "did you mean `ORDERS`?");
    }
    Ok(())
}

#[tokio::test]
async fn a_mark_by_hand_compares_and_a_deletion_forgets() -> Result<()> {
    let site = Site::small().await?;
    copied(&site, json!({}), 100).await?;
    site.put("ORDERS/verify", "now").await?;
    wait_for("the comparison to end", LIMIT, async || shown(&site, ID).await.is_ok_and(|found| is_over(&found)))
        .await?;
    clean(&shown(&site, ID).await?, &site)?;
    let bucket = site.bucket("REPLICATOR_CONFIG").await?;
    wait_for("the mark to be removed", LIMIT, async || {
        bucket.get("ORDERS/verify").await.is_ok_and(|mark| mark.is_none())
    })
    .await?;
    request(&site.client, "replicator.config.delete", json!({"replication": ID})).await?;
    let positions = site.bucket("REPLICATOR_POSITIONS").await?;
    assert_eq!(positions.get("ORDERS/verify").await?, None);
    Ok(())
}

/// A side that cannot be reached is named while the job waits for it.
#[tokio::test]
async fn a_side_that_is_away_is_named() -> Result<()> {
    let mut site = Site::small().await?;
    copied(&site, json!({}), 2_000).await?;
    let slow = json!({"replication": ID, "rate": 500});
    let started = request(&site.client, "replicator.verify", slow).await?;
    wait_for("the comparison to be under way", LIMIT, async || {
        shown(&site, ID).await.is_ok_and(|found| found["source_messages"].as_u64() > Some(0))
    })
    .await?;
    site.target.kill()?;
    let names = |found: &Value| found["error"].as_str().is_some_and(|error| error.starts_with("target: "));
    wait_for("the target to be named", LIMIT, async || {
        shown(&site, ID).await.is_ok_and(|found| found["state"] == "running" && names(&found))
    })
    .await?;
    let text = site.cli().ok(["verify", ID, "--status"]).await?;
    assert!(text.contains("it cannot continue now: target: "), "{text}");
    site.target.restart().await?;
    let found = ended(&site, ID, &started["job"]).await?;
    clean(&found, &site)?;
    assert_eq!((&found["error"], &found["source_messages"]), (&Value::Null, &json!(2_000)), "{found:#}");
    Ok(())
}
