//! What is missing is copied on request, once, and the copy continues as before.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{ID, clean, copied, message, ranges, tamper, verified};
use crate::harness::{Outgoing, Service, Site, client::refused, raw::header_values, request};

#[tokio::test]
async fn what_is_missing_is_repaired() -> Result<()> {
    for target in [None, Some(json!({}))] {
        let mut site = Site::small().await?;
        if let Some(config) = target.clone() {
            site.target_stream(ID, config).await?;
        }
        copied(&site, json!({}), 1_000).await?;
        let gone = [1, 500, 501, 777, 1_000];
        tamper(&site, ID, |messages| messages.retain(|message| !gone.contains(&message.seq))).await?;
        let ended = site.cli().run(["verify", ID, "--repair"]).await?;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        let found = verified(&site, ID, json!({"repair": true})).await?;
        let left = |found: &Value, stored: u64| {
            assert_eq!(
                (&found["repaired"]["stored"], &found["repaired"]["left"]),
                (&json!(stored), &json!(1)),
                "{found:#}"
            );
            let reason = found["repaired"]["reason"].as_str().unwrap_or_default();
            assert!(reason.starts_with("message 1000: it is after the last copy that the target has"), "{reason}");
        };
        left(&found, 4);
        assert_eq!(ranges(&found, "missing"), [(1, 1), (500, 501), (777, 777), (1_000, 1_000)], "{found:#}");
        // They are at the end, as copies, and known as repaired.
        let found = verified(&site, ID, json!({})).await?;
        assert_eq!(ranges(&found, "missing"), [(1_000, 1_000)], "{found:#}");
        assert_eq!(found["expected"], json!({"repaired": 4}), "{found:#}");
        let stored = site.target().await?.read_stream(ID).await?;
        assert_eq!(stored.len(), 999);
        let repaired = &stored[996];
        let expect = message(500);
        assert_eq!((&repaired.subject, &repaired.payload), (&expect.subject, &expect.payload));
        let hops = header_values(&repaired.header, "Choria-SR-Source");
        assert!(
            hops.len() == 2
                && hops[0].starts_with("ORDERS 500 TEST TEST ")
                && hops[1].starts_with("ORDERS 500 TEST repair:TEST "),
            "{hops:?}"
        );
        // Only while the last message of its subject was the one that was looked up.
        let condition = header_values(&repaired.header, "Nats-Expected-Last-Subject-Sequence");
        let last =
            stored[..996].iter().rev().find(|stored| stored.subject == repaired.subject).context("one before")?;
        assert_eq!(condition, [last.seq.to_string()]);
        // Once more repairs nothing, and the copy continues where it was, also after a restart.
        let found = verified(&site, ID, json!({"repair": true})).await?;
        left(&found, 0);
        request(&site.client, "replicator.resume", json!({"replication": ID})).await?;
        site.source().await?.publish_all((1_001..=1_100).map(message)).await?;
        site.settled(ID, 1_100).await?;
        site.service.kill()?;
        site.service.restart().await?;
        site.source().await?.publish_all((1_101..=1_200).map(message)).await?;
        site.settled(ID, 1_200).await?;
        assert_eq!(site.at_target(ID).await?, 1_200, "{target:?}\n{}", site.service.log());
        clean(&verified(&site, ID, json!({})).await?, &site)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_repair_replaces_nothing_newer() -> Result<()> {
    let site = Site::small().await?;
    let config = json!({"subjects": ["$KV.b.>"], "max_msgs_per_subject": 2, "allow_rollup_hdrs": true});
    let mut source = site.source_stream("KV_b", config).await?;
    source.publish_all((1..=20).map(|i| Outgoing::new(format!("$KV.b.key{}", i % 10), i.to_string()))).await?;
    site.add("KV_b", json!({})).await?;
    site.settled("KV_b", 20).await?;
    // The older value of a key, and the newer one of another.
    tamper(&site, "KV_b", |messages| messages.retain(|message| ![3, 14].contains(&message.seq))).await?;
    let found = verified(&site, "KV_b", json!({"repair": true})).await?;
    assert_eq!(ranges(&found, "missing"), [(3, 3), (14, 14)], "{found:#}");
    assert_eq!((&found["repaired"]["stored"], &found["repaired"]["left"]), (&json!(1), &json!(1)), "{found:#}");
    let reason = found["repaired"]["reason"].as_str().context("a reason")?;
    assert!(reason.starts_with("message 3: the target has a newer message of its subject"), "{reason}");
    let bucket = async_nats::jetstream::new(crate::harness::client::connect(&site.target.url()).await?)
        .get_key_value("b")
        .await?;
    assert_eq!(bucket.get("key3").await?.as_deref(), Some(&b"13"[..]));
    assert_eq!(bucket.get("key4").await?.as_deref(), Some(&b"14"[..]));
    Ok(())
}

#[tokio::test]
async fn many_repaired_messages_are_not_repaired_again() -> Result<()> {
    const MESSAGES: u64 = 60_100;
    let site = Site::small().await?;
    let number = |number: u64| Outgoing::new("orders.1", number.to_string());
    site.source_stream(ID, json!({})).await?.publish_all((1..=MESSAGES).map(number)).await?;
    site.add(ID, json!({})).await?;
    site.settled(ID, MESSAGES).await?;
    // As after a repair of the first 60,000: they are at the end, with one hop more.
    tamper(&site, ID, |messages| {
        messages.rotate_left(60_000);
        for message in &mut messages[100..] {
            let hop = header_values(&message.header, "Choria-SR-Source").pop().unwrap_or_default();
            message.header.truncate(message.header.len() - 2);
            let hop = hop.replace(" TEST TEST ", " TEST repair:TEST ");
            message.header.extend_from_slice(format!("Choria-SR-Source: {hop}\r\n\r\n").as_bytes());
        }
    })
    .await?;
    let found = verified(&site, ID, json!({"repair": true})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"repaired": 60_000}), "{found:#}");
    assert_eq!(found["repaired"], json!({"stored": 0, "left": 0, "reason": null}), "{found:#}");
    assert_eq!(site.at_target(ID).await?, MESSAGES);
    Ok(())
}

#[tokio::test]
async fn a_renamed_site_knows_what_it_repaired() -> Result<()> {
    let mut site = Site::small().await?;
    copied(&site, json!({}), 100).await?;
    tamper(&site, ID, |messages| messages.retain(|message| ![10, 11].contains(&message.seq))).await?;
    let found = verified(&site, ID, json!({"repair": true})).await?;
    assert_eq!(found["repaired"]["stored"], 2, "{found:#}");
    site.stop().await?;
    site.cli().ok(["site", "rename", "TEST", "TWO"]).await?;
    let two = Service::builder(&site.service_url(), "TWO").start().await?;
    let found = verified(&site, ID, json!({"repair": true})).await?;
    assert_eq!(
        (&found["findings"], &found["expected"]),
        (&json!(0), &json!({"repaired": 2})),
        "{found:#}\n{}",
        two.log()
    );
    assert_eq!(found["repaired"]["stored"], 0, "{found:#}");
    assert_eq!(site.at_target(ID).await?, 100);
    Ok(())
}

#[tokio::test]
async fn what_a_limit_removed_is_not_repaired() -> Result<()> {
    let site = Site::small().await?;
    site.target_stream(ID, json!({"max_msgs": 2_700})).await?;
    copied(&site, json!({"target_mode": "shared"}), 500).await?;
    // The limit removes all copies before these.
    let own = (1..=1_200).map(|i: u64| Outgoing::new("orders.own", i.to_string()));
    site.target().await?.publish_all(own).await?;
    site.source().await?.publish_all((501..=2_000).map(message)).await?;
    site.settled(ID, 2_000).await?;
    let found = verified(&site, ID, json!({"repair": true})).await?;
    clean(&found, &site)?;
    assert_eq!(found["expected"], json!({"other_writer": 1_200, "removed_at_target": 500}), "{found:#}");
    assert_eq!(found["repaired"]["stored"], 0, "{found:#}");
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_repaired_says_why() -> Result<()> {
    for (fields, why) in [
        (json!({"target_mode": "exclusive"}), "its `target_mode` is `exclusive`"),
        (json!({"target_initiated": true}), "provenance before that of earlier hops"),
        (json!({"inspect_subject_token": 2, "inspect_duration": "1h"}), "it is sampled"),
    ] {
        let site = Site::small().await?;
        copied(&site, fields, 10).await?;
        refused(&site.send("verify", json!({"replication": ID, "repair": true})).await?, 409, why);
    }
    Ok(())
}
