//! The name of the site is kept in the buckets: another name joins nothing and copies nothing twice.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::cli::failed;
use crate::harness::client::{refused, status};
use crate::harness::raw::header_values;
use crate::harness::{LIMIT, Outgoing, Role, SITE, Server, Service, Site, connect, request, wait_for, wait_value};

const CONFIG: &str = "REPLICATOR_CONFIG";
const KEY: &str = "site";

async fn record(site: &Site) -> Result<Value> {
    let value = site.bucket(CONFIG).await?.get(KEY).await?.context("no record of the site")?;
    Ok(serde_json::from_slice(&value)?)
}

/// A service of another name at the same buckets.
fn named(site: &Site, name: &str) -> Result<Service> {
    Service::builder(&site.service_url(), name).instance("another").spawn()
}

/// It ends with 2 and says all of this.
async fn exits_with_2(mut service: Service, says: &[&str]) -> Result<()> {
    let status = service.wait(LIMIT).await.with_context(|| service.log())?;
    let log = service.log();
    ensure!(status.code() == Some(2), "{status}\n{log}");
    for text in says {
        ensure!(log.contains(text), "`{text}` is not in\n{log}");
    }
    Ok(())
}

/// Site and source sequence of every copy, as its provenance says.
async fn provenance(site: &Site, stream: &str) -> Result<Vec<(String, u64)>> {
    let copies = site.target().await?.read_stream(stream).await?;
    let parse = |value: &String| {
        let words: Vec<&str> = value.split(' ').collect();
        Some(((*words.get(2)?).to_owned(), words.get(1)?.parse().ok()?))
    };
    let of = |header: &[u8]| header_values(header, "Choria-SR-Source").last().and_then(parse);
    copies.iter().map(|copy| of(&copy.header).context("a copy without provenance")).collect()
}

/// Each source message once and in order, up to `last`; those up to `first` copied by site `TEST`, the others by `after`.
async fn copied_once(site: &Site, stream: &str, first: u64, last: u64, after: &str) -> Result<()> {
    let name = |seq| if seq <= first { SITE } else { after };
    let expect: Vec<_> = (1..=last).map(|seq| (name(seq).to_owned(), seq)).collect();
    assert_eq!(provenance(site, stream).await?, expect);
    Ok(())
}

#[tokio::test]
async fn another_name_exits_with_2_and_joins_nothing() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 500).await?;
    assert_eq!(record(&site).await?, json!({"version": 1, "name": SITE}));
    let says = ["belong to site `TEST`", "is of site `TWO`", "stream-replicator site rename TEST TWO"];
    exits_with_2(named(&site, "TWO")?, &says).await?;
    site.stop().await?;
    exits_with_2(named(&site, "TWO")?, &says).await?;
    let leases = site.bucket("REPLICATOR_LEASES").await?;
    assert_eq!(leases.get("session.another").await?, None);
    site.service.restart().await?;
    site.publish("ORDERS", 501..=510).await?;
    site.settled("ORDERS", 510).await?;
    copied_once(&site, "ORDERS", 510, 510, SITE).await
}

#[tokio::test]
async fn of_two_names_that_start_at_once_one_wins() -> Result<()> {
    let control = Server::start(Role::Control).await?;
    let start = |name: &str| Service::builder(&control.url(), name).spawn();
    let mut both = [("ONE", start("ONE")?), ("TWO", start("TWO")?)];
    let client = connect(&control.url()).await?;
    let owner = async || {
        let reply = request(&client, "replicator.status", Value::Null).await.ok()?;
        Some(reply["site"].as_str()?.to_owned())
    };
    let owner = wait_value("one of them to run", LIMIT, owner).await?;
    both.sort_by_key(|(name, _)| *name == owner);
    let [(loser, lost), (winner, mut won)] = both;
    assert_eq!(winner, owner);
    exits_with_2(lost, &[&format!("belong to site `{winner}`"), &format!("is of site `{loser}`")]).await?;
    won.wait_ready().await?;
    assert!(won.stop().await?.success());
    Ok(())
}

#[tokio::test]
async fn a_renamed_site_copies_nothing_twice() -> Result<()> {
    let mut site = Site::builder().control_at_source().args(["--lease-ttl", "2s"]).start().await?;
    let cli = site.cli();
    let rename = ["site", "rename", SITE, "TWO"];
    site.replicate("ORDERS", 500).await?;
    site.source_stream("Q", json!({"subjects": ["q.>"], "retention": "workqueue"})).await?;
    site.add("Q", json!({})).await?;
    site.source().await?.publish_all((1..=50).map(|i| Outgoing::new("q.a", i.to_string()))).await?;
    site.copied("Q", 50).await?;
    failed(&cli.run(rename).await?, &["is running: stop all instances"]);
    site.settled("ORDERS", 500).await?;
    site.stop().await?;
    failed(&cli.run(["site", "rename", "ONE", "TWO"]).await?, &["belongs to site `TEST`, not to `ONE`"]);
    assert_eq!(cli.json(rename).await?, json!({"version": 1, "name": "TWO", "former": [SITE]}));
    // Again, it is the same.
    assert_eq!(cli.ok(rename).await?, "TWO (before: TEST)\n");
    exits_with_2(named(&site, SITE)?, &["belong to site `TWO`", "is of site `TEST`"]).await?;

    let mut two = named(&site, "TWO")?;
    two.wait_ready().await?;
    site.publish("ORDERS", 501..=510).await?;
    site.source().await?.publish_all((51..=60).map(|i| Outgoing::new("q.a", i.to_string()))).await?;
    site.settled("ORDERS", 510).await?;
    site.copied("Q", 60).await?;
    copied_once(&site, "ORDERS", 500, 510, "TWO").await?;
    copied_once(&site, "Q", 50, 60, "TWO").await?;
    // The consumer that knows what is acknowledged stays in use.
    let consumers = site.source().await?.api("CONSUMER.NAMES.Q", Value::Null).await?;
    assert_eq!(consumers["consumers"], json!(["SR_TEST"]), "{consumers}");

    // By provenance alone, too.
    assert!(two.stop().await?.success());
    site.bucket("REPLICATOR_POSITIONS").await?.delete("ORDERS").await?;
    two.restart().await?;
    site.publish("ORDERS", 511..=520).await?;
    site.settled("ORDERS", 520).await?;
    copied_once(&site, "ORDERS", 500, 520, "TWO").await
}

/// Held, because of copies of site `TEST` at the target that this one would make again.
async fn held_for_the_other_site(site: &Site, id: &str, name: &str) -> Result<()> {
    let row = site.row_when(id, "is held", |row| row["state"] == "held").await?;
    let message = row["last_error"]["message"].as_str().unwrap_or_default();
    for text in ["two sites write one target", "`TEST`", &format!("site rename TEST {name}")] {
        ensure!(message.contains(text), "`{text}` is not in {message}");
    }
    Ok(())
}

#[tokio::test]
async fn copies_of_another_site_are_no_reset_but_held() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 500).await?;
    site.settled("ORDERS", 500).await?;
    site.stop().await?;
    site.bucket(CONFIG).await?.delete(KEY).await?;
    let mut two = named(&site, "TWO")?;
    two.wait_ready().await?;
    held_for_the_other_site(&site, "ORDERS", "TWO").await?;
    assert!(two.stop().await?.success());
    // The same where no position is known.
    site.bucket("REPLICATOR_POSITIONS").await?.delete("ORDERS").await?;
    two.restart().await?;
    held_for_the_other_site(&site, "ORDERS", "TWO").await?;
    assert!(two.stop().await?.success());
    assert_eq!(site.at_target("ORDERS").await?, 500);
    site.events.quiet(&["target-reset"])?;
    // What the message says helps.
    site.cli().ok(["site", "rename", SITE, "TWO"]).await?;
    two.restart().await?;
    site.publish("ORDERS", 501..=510).await?;
    site.settled("ORDERS", 510).await?;
    copied_once(&site, "ORDERS", 500, 510, "TWO").await
}

#[tokio::test]
async fn a_site_with_other_buckets_does_not_copy_again() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 100).await?;
    let arguments = ["--bucket-prefix", "OTHER", "--prefix", "other"];
    let _other = Service::builder(&site.service_url(), "OTHER").args(arguments).start().await?;
    request(&site.client, "other.config.add", site.document("ORDERS")).await?;
    let held = async || {
        let reply = request(&site.client, "other.status", Value::Null).await.ok()?;
        (reply["replications"][0]["state"] == "held").then(|| reply["replications"][0]["last_error"].clone())
    };
    let error = wait_value("the other site to be held", LIMIT, held).await?;
    ensure!(
        error["message"].as_str().is_some_and(|text| text.contains("`TEST`") && text.contains("`OTHER`")),
        "{error}"
    );
    assert_eq!(site.at_target("ORDERS").await?, 100);
    Ok(())
}

#[tokio::test]
async fn an_edit_of_the_name_by_hand_ends_the_instance() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    // Deleted, it is written again; unreadable, the name that was known counts, until a start.
    site.bucket(CONFIG).await?.delete(KEY).await?;
    wait_for("the record to be there again", LIMIT, async || record(&site).await.is_ok()).await?;
    assert_eq!(record(&site).await?, json!({"version": 1, "name": SITE}));
    site.put(KEY, "TWO").await?;
    let warned = async || site.service.log().contains("is not the record of a site");
    wait_for("a warning", LIMIT, warned).await?;
    site.publish("ORDERS", 11..=20).await?;
    site.settled("ORDERS", 20).await?;
    exits_with_2(
        named(&site, SITE)?,
        &["key `site` of bucket `REPLICATOR_CONFIG`", r#"{"version": 1, "name": "EAST""#],
    )
    .await?;
    site.put(KEY, json!({"version": 1, "name": "TWO", "note": "by hand"}).to_string()).await?;
    let ended = site.service.wait(LIMIT).await?;
    let log = site.service.log();
    assert_eq!(ended.code(), Some(2), "{log}");
    assert!(log.contains("belong to site `TWO`") && log.contains("is of site `TEST`"), "{log}");
    // A name by hand says nothing of former ones; the command keeps what else is in the record.
    site.cli().ok(["site", "rename", SITE, "TWO"]).await?;
    let expect = json!({"version": 1, "name": "TWO", "former": [SITE], "note": "by hand"});
    assert_eq!(record(&site).await?, expect);
    let mut two = named(&site, "TWO")?;
    two.wait_ready().await?;
    site.publish("ORDERS", 21..=30).await?;
    site.settled("ORDERS", 30).await?;
    copied_once(&site, "ORDERS", 20, 30, "TWO").await
}

#[tokio::test]
async fn the_record_of_the_site_is_no_replication() -> Result<()> {
    let site = Site::small().await?;
    assert_eq!(request(&site.client, "replicator.config.list", Value::Null).await?["total"], 0);
    assert_eq!(status(&site.client, KEY).await, None);
    let reply = site.send("config.add", site.document(KEY)).await?;
    refused(&reply, 400, "not valid");
    let problem = reply.body["error"]["problems"][0]["message"].as_str().unwrap_or_default();
    assert!(problem.contains("the key of the site's own record"), "{reply:?}");
    refused(&site.ask("config.delete", KEY).await?, 404, KEY);
    refused(&site.ask("config.get", KEY).await?, 404, KEY);
    site.source_stream(KEY, json!({"subjects": ["site.>"]})).await?;
    site.add(KEY, json!({"name": "w1"})).await?;
    site.publish(KEY, 1..=5).await?;
    site.settled("site.w1", 5).await?;
    assert_eq!(record(&site).await?, json!({"version": 1, "name": SITE}));
    Ok(())
}

#[tokio::test]
async fn a_new_name_that_would_change_ids_is_refused() -> Result<()> {
    let mut site = Site::small().await?;
    site.filled("ORDERS", 5).await?;
    site.add("ORDERS", json!({"name": "w1", "target_stream": "A"})).await?;
    site.add("ORDERS", json!({"name": SITE, "target_stream": "B"})).await?;
    site.stop().await?;
    let cli = site.cli();
    let says = ["the ids of replications", "would change"];
    failed(&cli.run(["site", "rename", SITE, "w1"]).await?, &[&says[..], &["`ORDERS.w1`"]].concat());
    failed(&cli.run(["site", "rename", SITE, "TWO"]).await?, &[&says[..], &["`ORDERS`"]].concat());
    assert_eq!(cli.ok(["site", "show"]).await?, "TEST\n");
    Ok(())
}
