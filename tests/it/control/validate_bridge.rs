//! `config.validate` where it is unknown whether both sides are one account: it says so, whatever else it says.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::harness::{Raw, Role, Server, Service, Site, connect, request};

const NOT_KNOWN: &str = "whether both sides are one account could not be checked";

/// Checks of the target that could not be made, with what they say.
fn unknown(reply: &Value) -> Vec<&str> {
    let checks = reply["preflight"]["target"]["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let unknown = checks.iter().filter(|check| check["result"] == "unknown");
    unknown.filter_map(|check| check["message"].as_str()).collect()
}

#[tokio::test]
async fn a_login_that_may_not_ask_is_reported_beside_all_else() -> Result<()> {
    // It may publish the copies, and nothing that would reach the other side.
    let allowed = r#"publish: ["$JS.API.>", "$SYS.REQ.USER.INFO", "orders.>", "returns"]"#;
    let users = format!("{{user: test, password: test}}, {{user: narrow, password: x, permissions: {{{allowed}}}}}");
    let config = format!("authorization {{ users: [{users}] }}");
    let source = Server::builder(Role::Source).domain("east").start().await?;
    let target = Server::builder(Role::Target).domain("west").config(&config).start().await?;
    Raw::connect(&source.url()).await?.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    let control = Server::start(Role::Control).await?;
    let _service = Service::start(&control.url()).await?;
    let client = connect(&control.url()).await?;
    let mut raw = Raw::connect(&target.url_as("test:test")).await?;
    let validate = async |login: &str| {
        let document = json!({"stream": "ORDERS", "source_url": source.url(), "target_url": target.url_as(login)});
        request(&client, "replicator.config.validate", document).await
    };
    // The target takes all of the copies, a part of them, or none.
    for subjects in [json!(["orders.>"]), json!(["orders.eu"]), json!(["returns"])] {
        raw.create_stream("ORDERS", json!({"subjects": subjects})).await?;
        let narrow = validate("narrow:x").await?;
        ensure!(unknown(&narrow).iter().any(|text| text.contains(NOT_KNOWN)), "{subjects}: {narrow:#}");
        ensure!(narrow["warnings"].to_string().contains(NOT_KNOWN), "{subjects}: {narrow:#}");
        // A user that may ask gets no such warning.
        let asked = validate("test:test").await?;
        ensure!(!asked.to_string().contains(NOT_KNOWN), "{subjects}: {asked:#}");
        raw.api("STREAM.DELETE.ORDERS", Value::Null).await?;
    }
    Ok(())
}

/// Without a target stream, and where both are one JetStream, there is nothing to detect.
#[tokio::test]
async fn two_sides_of_one_jetstream_are_not_asked() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    let reply = site.send("config.validate", site.document("ORDERS")).await?.body;
    ensure!(!reply.to_string().contains(NOT_KNOWN) && reply["valid"] == true, "{reply:#}");
    Ok(())
}
