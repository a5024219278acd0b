//! The logins of an adapter: those of docs/permissions.md suffice, and a missing permission is named.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::raw::wait_messages;
use crate::harness::{LIMIT, Outgoing, REGISTRATION, Raw, Registration, Role, Server, Site, request, wait_value};

const STREAM: &str = "CHORIA_REGISTRATION";
const INGEST: &str = "REGISTRATION_IN";
const MESSAGES: u64 = 20;

/// The three blocks of the section: ingest, durable ingest, stream.
fn documented() -> Result<[String; 3]> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/permissions.md"))?;
    let (_, section) = page.split_once("\n## Adapters\n").context("no section")?;
    let blocks = section.split("```\npermissions {").skip(1).filter_map(|rest| rest.split("```").next());
    let blocks: Vec<String> = blocks.map(|block| format!("permissions {{{block}")).collect();
    blocks.try_into().ok().context("not three blocks")
}

/// An adapter whose logins have these permissions.
async fn site(ingest: &str, stream: &str, durable: bool) -> Result<Site> {
    let users = |permissions: &str| {
        format!("authorization {{ users: [{{user: me, password: p, {permissions}}}, {{user: all, password: p}}] }}")
    };
    let source = Server::builder(Role::Source).config(&users(ingest)).start().await?;
    let target = Server::builder(Role::Target).config(&users(stream)).start().await?;
    let site = Site::builder().on(source, target).start().await?;
    let mut document = json!({
        "name": "inventory",
        "ingest": {"topic": REGISTRATION, "protocol": "request", "servers": site.source.url_as("me:p")},
        "stream": {"type": "jetstream", "topic": "choria.stream.input.registration.%s",
            "servers": site.target.url_as("me:p"), "create": {"name": STREAM, "max_msgs_per_subject": 1_000}},
    });
    if durable {
        let config = json!({"subjects": [REGISTRATION], "retention": "workqueue"});
        Raw::connect(&site.source.url_as("all:p")).await?.create_stream(INGEST, config).await?;
        document["durable"] = true.into();
        document["ingest"]["stream"] = INGEST.into();
    }
    request(&site.client, "replicator.adapter.add", document).await?;
    Ok(site)
}

async fn row_when(site: &Site, what: &str, when: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_value(what, LIMIT, async || {
        last = site.ask("adapter.status", "inventory").await.ok()?.body["adapters"][0].clone();
        when(&last).then(|| last.clone())
    });
    found.await.with_context(|| format!("{last}"))
}

async fn publish(site: &Site) -> Result<()> {
    let mut raw = Raw::connect(&site.source.url_as("all:p")).await?;
    for number in 0..MESSAGES {
        let (id, sender) = (format!("{number:032}"), format!("n{number}.example.net"));
        let registration = Registration { id: &id, sender: &sender, data: "{}", time: 1_577_873_472_000_000_000 };
        raw.send_only(&Outgoing::new(REGISTRATION, registration.v1())).await?;
    }
    raw.api("INFO", Value::Null).await.map(drop)
}

#[tokio::test]
async fn documented_logins_of_an_adapter_suffice() -> Result<()> {
    let [ingest, durable_ingest, stream] = documented()?;
    for (durable, ingest) in [(false, ingest), (true, durable_ingest)] {
        let site = site(&ingest, &stream, durable).await?;
        row_when(&site, "it runs", |row| row["state"] == "running").await?;
        publish(&site).await?;
        let mut target = Raw::connect(&site.target.url_as("all:p")).await?;
        wait_messages(&mut target, STREAM, MESSAGES, LIMIT).await?;
        row_when(&site, "all are acknowledged", |row| row["stored"] == MESSAGES).await?;
        for log in [site.source.log(), site.target.log()] {
            let refused = log.lines().find(|line| line.to_lowercase().contains("violation"));
            ensure!(refused.is_none(), "{}", refused.unwrap_or_default());
        }
    }
    Ok(())
}

/// Each permission is taken away, and the status names it.
#[tokio::test]
async fn a_missing_permission_of_an_adapter_is_named() -> Result<()> {
    let [ingest, durable_ingest, stream] = documented()?;
    let cases = [
        (&ingest, "choria.broadcast.agent.registration nats_ingest_inventory", false),
        (&durable_ingest, "$JS.API.STREAM.INFO.REGISTRATION_IN", true),
        (&durable_ingest, "$JS.API.CONSUMER.INFO.REGISTRATION_IN.nats_ingest_inventory", true),
        (&durable_ingest, "$JS.API.CONSUMER.CREATE.REGISTRATION_IN.nats_ingest_inventory", true),
        (&durable_ingest, "$JS.API.CONSUMER.MSG.NEXT.REGISTRATION_IN.nats_ingest_inventory", true),
        (&durable_ingest, "$JS.ACK.REGISTRATION_IN.nats_ingest_inventory.>", true),
        (&durable_ingest, "_INBOX.>", true),
        (&ingest, "_INBOX.>", false),
        (&stream, "_INBOX.>", false),
        (&stream, "choria.stream.input.registration.>", false),
        (&stream, "$JS.API.STREAM.INFO.CHORIA_REGISTRATION", false),
        (&stream, "$JS.API.STREAM.CREATE.CHORIA_REGISTRATION", false),
    ];
    for (block, missing, durable) in cases {
        let less = block.replace(&format!("\"{missing}"), "\"other");
        ensure!(less != *block, "{missing} is not in the block");
        let site =
            if block == &stream { site(&ingest, &less, durable).await? } else { site(&less, &stream, durable).await? };
        row_when(&site, "it runs or fails", |row| row["state"] == "running" || !row["last_error"].is_null()).await?;
        publish(&site).await?;
        let subject = missing.split([' ', '>']).next().unwrap_or_default();
        row_when(&site, missing, |row| {
            let error = row["last_error"]["message"].as_str().unwrap_or_default().to_lowercase();
            row["last_error"]["hold"] == true
                && error.contains("permissions violation")
                && error.contains(&subject.to_lowercase())
        })
        .await?;
    }
    Ok(())
}
