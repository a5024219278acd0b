//! What a publisher at the source can do by the names of senders: nothing to the copy, and nothing to the advisories of
//! other senders.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::harness::raw::header_values;
use crate::harness::site::merged;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Site, request};

/// A stream that takes every advisory, and a replication whose login at the source is `user:secret`.
async fn advised(config: &str, subject: &str, reliable: bool) -> Result<Site> {
    let source = Server::builder(Role::Source).config(config).start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    let mut raw = Raw::connect(&admin(&site)).await?;
    raw.create_stream("NODES", json!({"subjects": ["nodes.>"]})).await?;
    raw.create_stream("ADV", json!({"subjects": ["adv.>"]})).await?;
    let document = json!({
        "stream": "NODES",
        "source_url": site.source.url_as("user:secret"),
        "target_url": site.target.url(),
        "inspect_field": FIELD,
        "inspect_duration": "1h",
        "advisory": {"subject": subject, "reliable": reliable},
    });
    request(&site.client, "replicator.config.add", document).await?;
    Ok(site)
}

/// An advisory names it, so that one can be longer than any request for a consumer.
const FIELD: &str = "the_identity_of_the_node_that_registered_as_it_is_written_in_its_certificate_and_known_to_all_of_\
                     the_others_in_its_collective";

fn admin(site: &Site) -> String {
    site.source.url_as("admin:secret")
}

/// Publishes one message of each sender; returns the last sequence.
async fn publish(site: &Site, senders: &[&str]) -> Result<u64> {
    let mut raw = Raw::connect(&admin(site)).await?;
    raw.publish_all(senders.iter().map(|sender| Outgoing::new("nodes.a", json!({FIELD: sender}).to_string()))).await
}

/// The senders whose `new` a stream has stored.
async fn stored(site: &Site) -> Result<Vec<String>> {
    let stored = Raw::connect(&admin(site)).await?.read_stream("ADV").await?;
    let sender = |payload: &[u8]| -> Result<String> {
        let body: Value = serde_json::from_slice(payload)?;
        Ok(body["value"].as_str().context("a value")?.to_owned())
    };
    stored.iter().map(|message| sender(&message.payload)).collect()
}

const USERS: &str = r#"authorization { users = [
    {user: admin, password: secret}
    {user: user, password: secret, permissions: {publish: {allow: ["$JS.>", "_INBOX.>", "adv.*.*"]}, subscribe: ">"}}
] }"#;

/// The copy and the other advisories continue, beside senders whose advisories the server refuses.
async fn refused(config: &str, subject: &str, reliable: bool, bad: &[&str]) -> Result<()> {
    let mut site = advised(config, subject, reliable).await?;
    let mut senders = vec!["n1"];
    senders.extend(bad);
    senders.push("n2");
    let last = publish(&site, &senders).await?;
    site.settled("NODES", last).await?;
    let (good, bad_count) = (2, bad.len() as u64);
    let row = site
        .row_when("NODES", "counts refused advisories", |row| {
            let sampling = &row["sampling"];
            sampling["advised"]["new"] == good
                && sampling["advisory_errors"]["new"].as_u64() >= Some(bad_count)
                && sampling["advisory_error"].is_string()
        })
        .await?;
    let waiting = if reliable { bad_count } else { 0 };
    assert_eq!(row["sampling"]["advisories_waiting"], waiting, "{row}");
    assert_eq!((&row["state"], &row["counters"]["errors"]), (&json!("running"), &json!(0)), "{row}");
    let event = site.events.wait("advisory-refused", "NODES").await?;
    assert_eq!(event["advisory"], "new", "{event}");
    // What follows is copied, and its advisory arrives.
    let last = publish(&site, &["n3", "n3"]).await?;
    let row = site.settled("NODES", last).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    site.row_when("NODES", "publishes others", |row| row["sampling"]["advised"]["new"] == good + 1).await?;
    let expect: BTreeSet<_> = ["n1", "n2", "n3"].map(str::to_owned).into();
    assert_eq!(stored(&site).await?.into_iter().collect::<BTreeSet<_>>(), expect);
    Ok(())
}

#[tokio::test]
async fn a_sender_whose_advisory_the_login_may_not_publish() -> Result<()> {
    refused(USERS, "adv.%s.%v", true, &["host.example.net"]).await
}

#[tokio::test]
async fn the_same_with_plain_advisories() -> Result<()> {
    refused(USERS, "adv.%s.%v", false, &["host.example.net", "other.example.net"]).await
}

#[tokio::test]
async fn the_same_with_names_that_servers_quote() -> Result<()> {
    refused(USERS, "adv.%s.%v", true, &["a.\"quoted\"", "a.back\\slash", "a.zero\u{200b}width", "a.\u{e9}"]).await
}

const SHORT_LINES: &str = r#"
    max_control_line: 512
    authorization { users = [{user: admin, password: secret}, {user: user, password: secret}] }"#;

#[tokio::test]
async fn a_sender_whose_protocol_line_is_too_long() -> Result<()> {
    let long = "x".repeat(250);
    refused(SHORT_LINES, "adv.%s.%v.%v", true, &[&long]).await
}

#[tokio::test]
async fn a_plain_advisory_whose_protocol_line_is_too_long() -> Result<()> {
    let (one, two) = ("x".repeat(250), "y".repeat(251));
    refused(SHORT_LINES, "adv.%s.%v.%v", false, &[&one, &two]).await
}

#[tokio::test]
async fn a_server_that_takes_no_advisory_of_this_size() -> Result<()> {
    let config = r#"
        max_payload: 540
        authorization { users = [{user: admin, password: secret}, {user: user, password: secret}] }"#;
    refused(config, "adv.%s.%v", false, &["x".repeat(240).as_str()]).await
}

#[tokio::test]
async fn an_answer_that_names_no_stream_confirms_nothing() -> Result<()> {
    let site = Site::small().await?;
    site.source_stream("NODES", json!({})).await?;
    // A service on the subject of the advisories, and no stream.
    let mut listener = site.client.subscribe("told.>").await?;
    site.client.flush().await?;
    let client = site.client.clone();
    let answers = tokio::spawn(async move {
        for answer in ["{}", "{\"seq\":5}", "{\"stream\":\"X\"}", "+OK", "", "{\"stream\":\"\",\"seq\":1}"] {
            let message = timeout(LIMIT, listener.next()).await?.context("an advisory")?;
            client.publish(message.reply.context("a reply subject")?, answer.into()).await?;
        }
        anyhow::Ok(listener)
    });
    let fields = json!({"inspect_field": "sender", "inspect_duration": "1h"});
    let advisory = json!({"advisory": {"subject": "told.%s.%v", "reliable": true}});
    site.add("NODES", merged(fields, advisory)).await?;
    site.source().await?.publish(&Outgoing::new("nodes.a", json!({"sender": "n1"}).to_string())).await?;
    let _listener = answers.await??;
    let refused = |row: &Value| row["sampling"]["advisory_errors"]["new"].as_u64() >= Some(5);
    let row = site.row_when("NODES", "is not confirmed", refused).await?;
    assert_eq!((&row["sampling"]["advised"]["new"], &row["sampling"]["advisories_waiting"]), (&json!(0), &json!(1)));
    // A stream confirms it.
    drop(_listener);
    site.source_stream("TOLD", json!({})).await?;
    site.row_when("NODES", "is confirmed", |row| row["sampling"]["advisories_waiting"] == 0).await?;
    let stored = site.source().await?.read_stream("TOLD").await?;
    assert_eq!(stored.len(), 1);
    assert_eq!(header_values(&stored[0].header, "Nats-Msg-Id").len(), 1);
    Ok(())
}
