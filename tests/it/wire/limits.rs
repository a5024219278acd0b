//! Bounds: on messages in flight, on the size of pulls, and on batches.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::harness::{Expect, Outgoing, Role, Server, Site};

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn messages_far_larger_than_what_is_asked_for_at_first_pass() -> Result<()> {
    let large = "max_payload: 64MB\nmax_pending: 128MB";
    let source = Server::builder(Role::Source).config(large).start().await?;
    let target = Server::builder(Role::Target).config(large).start().await?;
    let site = Site::builder().on(source, target).start().await?;
    let mut raw = site.source_stream("L", json!({})).await?;
    site.add("L", json!({})).await?;
    site.row_when("L", "runs", |row| row["state"] == "running").await?;
    // The consumer waits with its smallest pull.
    let mut last = 0;
    for size in [10, 100 << 10, 5 << 20, 20 << 20, 10, 300 << 10] {
        last = raw.publish(&Outgoing::new("l.a", vec![b'x'; size])).await?;
        site.settled_within("L", last, LONG).await?;
    }
    // And with a bound that is far below one message.
    site.add(
        "L",
        json!({"name": "small", "target_stream": "L2", "target_subject_prefix": "l2",
        "limits": {"bytes_in_flight": 65536}}),
    )
    .await?;
    let row = site.settled_within("L.small", last, LONG).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}");
    site.verify("L", &Expect::copy_of("L")).await?;
    site.verify("L2", &Expect::copy_of("L").mapped(|subject| format!("l2.{subject}"))).await
}

#[tokio::test]
async fn batches_that_end_at_an_ack_are_no_error() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("B", json!({"subjects": ["b"]})).await?;
    site.add("B", json!({})).await?;
    let mut last = 0;
    for count in [500, 1000, 1, 499, 1500] {
        last = raw.publish_all((0..count).map(|i| Outgoing::new("b", i.to_string()))).await?;
        site.settled_within("B", last, LONG).await?;
        // An open batch is committed when nothing arrives for a moment; the next batch begins after that.
        site.row_when("B", "has nothing in flight", |row| row["in_flight"]["messages"] == 0).await?;
    }
    raw.publish(&Outgoing::new("b", "last")).await?;
    let row = site.settled_within("B", last + 1, LONG).await?;
    assert_eq!((&row["counters"]["errors"], &row["counters"]["consumers_recreated"]), (&json!(0), &json!(0)), "{row}");
    site.verify("B", &Expect::copy_of("B")).await
}

#[tokio::test]
async fn few_messages_in_flight_are_slow_but_do_not_wait_for_clocks() -> Result<()> {
    const COUNT: u64 = 400;
    let site = Site::start().await?;
    let mut raw = site.source_stream("F", json!({"subjects": ["f"]})).await?;
    raw.publish_all((0..COUNT).map(|i| Outgoing::new("f", i.to_string()))).await?;
    for in_flight in [1, 3, 100] {
        let (name, stream) = (format!("w{in_flight}"), format!("F{in_flight}"));
        site.add(
            "F",
            json!({"name": name, "target_stream": stream, "target_subject_prefix": name,
            "limits": {"messages_in_flight": in_flight}}),
        )
        .await?;
        let begin = std::time::Instant::now();
        site.settled_within(&format!("F.{name}"), COUNT, LONG).await?;
        let elapsed = begin.elapsed();
        println!("{in_flight} in flight: {COUNT} messages in {elapsed:?}");
        // One clock tick of 20 ms for each would take 8 s.
        assert!(elapsed < Duration::from_secs(6), "{in_flight} in flight: {elapsed:?}");
        site.verify(&stream, &Expect::copy_of("F").mapped(|subject| format!("{name}.{subject}"))).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_with_a_constant_other_writer_becomes_shared() -> Result<()> {
    let site = Site::start().await?;
    if !site.target.at_least(2, 14) {
        // Without the chain nothing breaks; the messages are counted by their ids.
        return Ok(());
    }
    let mut raw = site.source_stream("O", json!({})).await?;
    raw.publish_all((0..2000).map(|i| Outgoing::new("o.a", i.to_string()))).await?;
    let mut other = site.target_stream("O", json!({"allow_batched": true})).await?;
    let writer =
        tokio::spawn(async move { while other.publish(&Outgoing::new("o.other", "foreign")).await.is_ok() {} });
    site.add("O", json!({})).await?;
    let row = site.row_when("O", "finds its target shared", |row| row["target_mode"] == "shared").await?;
    assert_ne!(row["state"], "held", "{row}");
    site.settled_within("O", 2000, LONG).await?;
    writer.abort();
    site.verify("O", &Expect::copy_of("O").shared()).await
}
