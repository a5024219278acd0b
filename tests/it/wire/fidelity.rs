//! What is at the source is at the target, byte for byte and in order.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::{Expect, Outgoing, Role, SITE, Server, Site, raw::header_values};

const LONG: Duration = Duration::from_secs(120);

/// The i-th of many different messages: subjects, empty bodies with headers, repeated values, binary bodies.
fn mixed(i: u64) -> Outgoing {
    let subject = format!("mix.{}.{}", i % 97, i % 7);
    match i % 6 {
        0 => Outgoing::new(subject, format!("plain {i}")),
        1 => Outgoing::new(subject, []).with_lines(&["KV-Operation: DEL", &format!("N: {i}")]),
        2 => Outgoing::new(subject, format!("repeated {i}")).with_lines(&["A: 1", "B: 2", "A: 3", "a: 4", "A: 1"]),
        3 => Outgoing::new(subject, (0..i % 700).map(|n| (n * 31 + i) as u8).collect::<Vec<_>>()),
        4 => Outgoing::new(subject, b"\r\nPING\r\n\0\xff".repeat(1 + (i % 9) as usize)),
        _ => Outgoing::new(subject, []),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_mixed_messages_come_out_equal() -> Result<()> {
    const COUNT: u64 = 100_000;
    let site = Site::start().await?;
    let mut raw = site.source_stream("MIX", json!({})).await?;
    raw.publish_all((1..COUNT).map(mixed)).await?;
    // Near max_payload (1 MiB, headers included, of which ours need some at the target).
    raw.publish(&Outgoing::new("mix.large.0", vec![0xa5; (1 << 20) - 512])).await?;
    site.add("MIX", json!({})).await?;
    let row = site.settled_within("MIX", COUNT, LONG).await?;
    assert_eq!(row["counters"]["copied"], COUNT, "{row}");
    site.verify("MIX", &Expect::copy_of("MIX").site(SITE)).await
}

#[tokio::test]
async fn header_blocks_come_out_byte_for_byte_however_odd_they_are() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("ODD", json!({})).await?;
    let blocks: [&[u8]; 12] = [
        b"NATS/1.0\r\nZ: 1\r\nA: 2\r\nM: 3\r\nB: 4\r\nZ: 5\r\n\r\n",
        b"NATS/1.0\r\nA:1\r\nA:  2  \r\nA:\t3\r\nA:\r\n\r\n",
        b"NATS/1.0\r\nthis line has no colon\r\nA: 1\r\n\r\n",
        b"NATS/1.0\r\nname with blanks : x\r\n: no name\r\n\r\n",
        b"NATS/1.0\r\nBytes: \xff\xfe\x80\r\n\xc3\x28: x\r\n\r\n",
        b"NATS/1.0\r\nFolded: a\r\n b\r\n\tc\r\n\r\n",
        b"NATS/1.0\r\nLone: a\nb\rc\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
        b"NATS/1.0 409 Consumer Deleted\r\nA: 1\r\n\r\n",
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0\r\nnats-expected-stream: other case\r\nNATS-MSG-ID: x\r\n\r\n",
    ];
    for (i, block) in blocks.iter().enumerate() {
        raw.publish(&Outgoing::new(format!("odd.{i}"), format!("body {i}")).with_block(*block)).await?;
        raw.publish(&Outgoing::new(format!("odd.empty.{i}"), []).with_block(*block)).await?;
    }
    let count = 2 * blocks.len() as u64;
    site.add("ODD", json!({})).await?;
    let row = site.settled_within("ODD", count, LONG).await?;
    assert_eq!((&row["counters"]["copied"], &row["counters"]["errors"]), (&json!(count), &json!(0)), "{row}");
    site.verify("ODD", &Expect::copy_of("ODD")).await?;

    // The checker compares lines; the version line with its status is compared here.
    let source = raw.read_stream("ODD").await?;
    let target = site.target().await?.read_stream("ODD").await?;
    let first_line = |block: &[u8]| block.split(|b| *b == b'\r').next().map(<[u8]>::to_vec);
    for (from, to) in source.iter().zip(&target).filter(|(from, _)| !from.header.is_empty()) {
        if site.target.at_least(2, 12) {
            // From 2.12 the server itself takes a status out of what it stores.
            assert_eq!(first_line(&to.header), Some(b"NATS/1.0".to_vec()), "{}", from.subject);
        } else {
            assert_eq!(first_line(&to.header), first_line(&from.header), "{}", from.subject);
        }
    }
    Ok(())
}

#[tokio::test]
async fn headers_that_a_target_acts_on_or_refuses_do_not_stop_a_copy() -> Result<()> {
    let site = Site::start().await?;
    // A 2.10 server stores messages that newer ones refuse: where the source is newer, they are skipped here.
    let mut raw = site.source_stream("HDR", json!({"subjects": ["hdr.>"], "allow_rollup_hdrs": true})).await?;
    let lines: [&[&str]; 16] = [
        &["Nats-Expected-Last-Subject-Sequence: 0", "A: 1"],
        &["Nats-Expected-Stream: HDR"],
        &["Nats-Msg-Id: one", "B: 2"],
        &["Nats-TTL: 1h", "A: 1"],
        &["Nats-Rollup: sub"],
        &["Nats-Schedule: @at 2035-01-01T00:00:00Z", "Nats-Schedule-Target: hdr.x"],
        &["Nats-Scheduler: x", "Nats-Schedule-Next: purge"],
        &["Nats-Incr: +1"],
        &["Nats-Counter-Sources: {}"],
        &["Nats-Batch-Id: b", "Nats-Batch-Sequence: 1"],
        &["Nats-Required-Api-Level: 1"],
        &["Nats-Trace-Dest: t"],
        &["Nats-Stream-Source: OTHER 1 > > x"],
        &["Nats-Marker-Reason: MaxAge"],
        &["KV-Operation: PURGE"],
        &["Nats-Unheard-Of: yes"],
    ];
    let mut stored = 0;
    for (i, lines) in lines.iter().enumerate() {
        let message = Outgoing::new(format!("hdr.{i}"), format!("{i}")).with_lines(lines);
        stored += u64::from(raw.publish(&message).await.is_ok());
    }
    raw.publish(&Outgoing::new("hdr.last", "last")).await?;
    assert!(stored >= 6, "{stored} stored");
    if !site.source.at_least(2, 11) {
        assert_eq!(stored, lines.len() as u64);
    }
    site.add("HDR", json!({})).await?;
    let last = raw.stream_state("HDR").await?["last_seq"].as_u64().unwrap_or_default();
    let row = site.settled_within("HDR", last, LONG).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    site.verify("HDR", &Expect::copy_of("HDR").site(SITE)).await
}

#[tokio::test]
async fn ids_reused_at_the_source_after_their_window_are_all_copied() -> Result<()> {
    let site = Site::start().await?;
    let window = Duration::from_millis(100);
    let config = json!({"subjects": ["ids.>"], "duplicate_window": window.as_nanos() as u64});
    let mut raw = site.source_stream("IDS", config).await?;
    for round in 0..3 {
        for i in 0..5 {
            let message = Outgoing::new("ids.a", format!("{round} {i}")).with_lines(&[&format!("Nats-Msg-Id: id{i}")]);
            let expect = round * 5 + i + 1;
            // The window is over when the server takes the id again.
            while raw.publish(&message).await? != expect {
                tokio::task::yield_now().await;
            }
        }
    }
    site.add("IDS", json!({})).await?;
    site.settled_within("IDS", 15, LONG).await?;
    site.verify("IDS", &Expect::copy_of("IDS")).await
}

#[tokio::test]
async fn subjects_are_filtered_and_mapped() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("MAP", json!({"subjects": ["a.b.>"]})).await?;
    raw.publish_all((0..200).map(|i| Outgoing::new(format!("a.b.{}.{i}", if i % 3 == 0 { "x" } else { "y" }), "1")))
        .await?;
    site.add(
        "MAP",
        json!({"target_stream": "MAPPED", "filter_subject": "a.b.x.>",
        "target_subject_prefix": "eu", "target_subject_remove": "a."}),
    )
    .await?;
    let last = raw.read_stream("MAP").await?.iter().rfind(|m| m.subject.starts_with("a.b.x")).map_or(0, |m| m.seq);
    // Messages that the filter skips may be after it.
    let settled = |row: &Value| row["position"]["source_seq"].as_u64() >= Some(last);
    site.row_when("MAP", "has settled the last one", settled).await?;
    let expect = Expect::copy_of("MAP")
        .only(|m| m.subject.starts_with("a.b.x."))
        .mapped(|subject| format!("eu.{}", subject.trim_start_matches("a.")));
    site.verify("MAPPED", &expect).await
}

#[tokio::test]
async fn too_large_messages_hold_the_copy_and_lose_nothing() -> Result<()> {
    let target = Server::builder(Role::Target).config("max_payload: 4096").start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let mut raw = site.source_stream("BIG", json!({})).await?;
    for size in [10, 3000, 5000, 10] {
        raw.publish(&Outgoing::new("big.a", vec![b'x'; size])).await?;
    }
    site.add("BIG", json!({})).await?;
    let row = site.row_when("BIG", "is held", |row| row["state"] == "held").await?;
    assert_eq!(row["position"]["source_seq"], 2, "{row}");
    let message = row["last_error"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains("message 3") && message.contains("max_payload"), "{message}");
    // Once the message is gone the copy continues.
    raw.api("STREAM.MSG.DELETE.BIG", json!({"seq": 3})).await?;
    site.settled_within("BIG", 4, LONG).await?;
    site.verify("BIG", &Expect::copy_of("BIG")).await
}

#[tokio::test]
async fn a_time_to_live_continues_where_both_sides_support_it() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 11) {
        // This server has no such setting: what it stores is tested with the other headers.
        return Ok(());
    }
    let mut raw = site.source_stream("TTL", json!({"subjects": ["ttl.>"], "allow_msg_ttl": true})).await?;
    raw.publish(&Outgoing::new("ttl.a", "a").with_lines(&["Nats-TTL: 1h", "A: 1"])).await?;
    raw.publish(&Outgoing::new("ttl.b", "b").with_lines(&["Nats-TTL: never"])).await?;
    site.add("TTL", json!({})).await?;
    let row = site.settled_within("TTL", 2, LONG).await?;
    let copied = site.target().await?.read_stream("TTL").await?;
    let ttl = |index: usize| header_values(&copied[index].header, "Nats-TTL").pop();
    if site.target.at_least(2, 11) {
        let left: u64 = ttl(0).unwrap_or_default().parse()?;
        assert!((3500..=3600).contains(&left), "{left}");
        assert_eq!(ttl(1).as_deref(), Some("never"));
    } else {
        assert_eq!((ttl(0), ttl(1)), (None, None));
        assert_eq!(row["counters"]["headers_removed"], 2, "{row}");
    }
    site.verify("TTL", &Expect::copy_of("TTL")).await
}
