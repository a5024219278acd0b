//! JSON as people write it, by request and by hand: keys that occur twice, and texts that are not JSON.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::harness::Site;

/// The text of a document with another key in front of its first one.
fn twice(document: &Value, first: &str) -> String {
    document.to_string().replacen('{', &format!("{{{first},"), 1)
}

#[tokio::test]
async fn keys_that_occur_twice_are_refused_in_requests() -> Result<()> {
    let site = Site::small().await?;
    site.filled("ORDERS", 1).await?;
    let document = site.document_with("ORDERS", json!({"limits": {"messages_in_flight": 10}}));
    let nested =
        document.to_string().replacen("\"messages_in_flight\"", "\"messages_in_flight\":5,\"messages_in_flight\"", 1);
    let check = async |request: &str, body: String, paths: &[&str]| {
        let reply = site.ask(request, &body).await?;
        assert_eq!(reply.error, Some(400), "{request} {body}: {reply:?}");
        let problems = reply.body["error"]["problems"].as_array().context("problems")?;
        let found: Vec<_> = problems.iter().filter_map(|problem| problem["path"].as_str()).collect();
        assert_eq!(found, paths, "{reply:?}");
        assert!(problems.iter().all(|problem| problem.to_string().contains("occurs more than once")), "{reply:?}");
        anyhow::Ok(())
    };
    let two_targets = twice(&document, "\"target_url\":\"nats://other.example.net\"");
    check("config.add", two_targets.clone(), &["/target_url"]).await?;
    check("config.add", nested.clone(), &["/limits/messages_in_flight"]).await?;
    check("config.add", twice(&document, "\"stream\":\"ORDERS\""), &["/stream"]).await?;
    check("pause", r#"{"replication":"A","replication":"ORDERS"}"#.to_owned(), &["/replication"]).await?;
    check("position", r#"{"replication":"A","source_seq":1,"source_seq":2}"#.to_owned(), &["/source_seq"]).await?;
    let heartbeats = r#"{"url":"nats://h","interval":"1s","interval":"2s","subjects":[{"subject":"a","subject":"b"}]}"#;
    check("heartbeat.set", heartbeats.to_owned(), &["/interval", "/subjects/0/subject"]).await?;

    // All problems at once.
    let body = twice(&site.document_with("ORDERS", json!({"max_age": "soon"})), "\"stream\":\"OTHER\"");
    let reply = site.ask("config.validate", &body).await?;
    let paths: Vec<_> = reply.body["problems"].as_array().context("problems")?.iter().map(|p| &p["path"]).collect();
    assert_eq!(paths, ["/stream", "/max_age"], "{reply:?}");
    assert_eq!(site.row("ORDERS").await, None);
    Ok(())
}

#[tokio::test]
async fn hand_edits_that_are_not_clean_json_say_what_they_are() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 5).await?;
    let document = site.document("ORDERS").to_string();
    let utf16 = document.encode_utf16().flat_map(u16::to_le_bytes);
    let nested = site.document_with("ORDERS", json!({"limits": {"messages_in_flight": 10}})).to_string();
    let nested = nested.replacen("\"messages_in_flight\"", "\"messages_in_flight\":5,\"messages_in_flight\"", 1);
    let texts: [(Vec<u8>, &str); 8] = [
        (nested.into(), "/limits/messages_in_flight: `messages_in_flight` occurs more than once"),
        (
            twice(&site.document("ORDERS"), "\"target_url\":\"nats://other\"").into(),
            "`target_url` occurs more than once",
        ),
        ([b"\xef\xbb\xbf", document.as_bytes()].concat(), "byte order mark"),
        ([0xff, 0xfe].into_iter().chain(utf16).collect(), "it is UTF-16"),
        (format!("// the orders\n{document}").into(), "it has comments"),
        (document.replacen(',', ", /* here */", 1).into(), "it has comments"),
        (b"stream: ORDERS\nsource_url: nats://a\n".to_vec(), "it is YAML"),
        (b" ".to_vec(), "it is empty"),
    ];
    for (text, expect) in texts {
        let revision = site.put("ORDERS", text).await?;
        let says = |row: &Value| {
            let text = row["last_error"]["message"].as_str().unwrap_or_default();
            text.contains(&format!("revision {revision} ")) && text.contains(expect)
        };
        let row = site.row_when("ORDERS", expect, says).await?;
        assert_eq!((&row["state"], &row["config_revision"]), (&json!("running"), &json!(2)), "{row}");
        let problems = site.ask("config.get", "ORDERS").await?.body["problems"].to_string();
        let expect = expect.rsplit(": ").next().unwrap_or_default();
        assert!(problems.contains(expect), "{problems}");
    }
    site.publish("ORDERS", 1..=5).await?;
    site.copied("ORDERS", 10).await
}
