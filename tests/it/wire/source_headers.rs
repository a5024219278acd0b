//! Headers that the source stores and does not act on have no effect at the target either.

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::raw::{header_values, wait_messages};
use crate::harness::{LIMIT, Outgoing, Raw, Site};

const STREAM: &str = "H";

/// Messages with these header lines in a stream that allows neither a time to live nor rollups: a server before 2.11 stores
/// `Nats-TTL` as it is, and a mirror whatever its origin stored.
async fn stored_as_data(site: &Site, lines: &[&str]) -> Result<(Raw, u64)> {
    let messages = lines.iter().enumerate().map(|(i, line)| Outgoing::new(format!("h.{i}"), "x").with_lines(&[line]));
    let newer = site.source.at_least(2, 11);
    let mut raw = site.source().await?;
    if newer {
        let config = json!({"subjects": ["h.>"], "allow_msg_ttl": true, "allow_rollup_hdrs": true});
        raw.create_stream("ORIGIN", config).await?;
        for message in messages {
            raw.publish(&message).await?;
        }
        raw.create_stream(STREAM, json!({"subjects": [], "mirror": {"name": "ORIGIN"}})).await?;
    } else {
        raw.create_stream(STREAM, json!({"subjects": ["h.>"]})).await?;
        for message in messages {
            raw.publish(&message).await?;
        }
    }
    wait_messages(&mut raw, STREAM, lines.len() as u64, LIMIT).await?;
    Ok((raw, lines.len() as u64))
}

#[tokio::test]
async fn a_time_to_live_that_means_nothing_at_the_source_is_left_out() -> Result<()> {
    let site = Site::start().await?;
    let config = json!({"subjects": ["h.>"], "allow_rollup_hdrs": true});
    let config = match site.target.at_least(2, 11) {
        true => crate::harness::site::merged(config, json!({"allow_msg_ttl": true})),
        false => config,
    };
    site.target_stream(STREAM, config).await?;
    let lines = ["Nats-TTL: 3", "Nats-TTL: 1h", "Nats-TTL: never", "Nats-TTL: 0"];
    // Newer servers refuse the last one.
    let lines = if site.source.at_least(2, 11) { &lines[..3] } else { &lines[..] };
    let (mut raw, count) = stored_as_data(&site, lines).await?;
    let before = raw.read_stream(STREAM).await?;
    assert_eq!(before.len() as u64, count);
    site.add(STREAM, json!({})).await?;
    let row = site.settled(STREAM, count).await?;
    assert_eq!((&row["counters"]["headers_removed"], &row["counters"]["errors"]), (&json!(count), &json!(0)), "{row}");
    let copied = site.target().await?.read_stream(STREAM).await?;
    assert_eq!(copied.len() as u64, count);
    for message in &copied {
        assert_eq!(header_values(&message.header, "Nats-TTL"), Vec::<String>::new());
    }
    Ok(())
}

#[tokio::test]
async fn a_time_to_live_that_is_switched_on_later_counts() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 11) || !site.target.at_least(2, 11) {
        // These servers have no such setting.
        return Ok(());
    }
    site.target_stream(STREAM, json!({"subjects": ["h.>"], "allow_msg_ttl": true})).await?;
    let mut raw = site.source_stream(STREAM, json!({"subjects": ["h.>"]})).await?;
    site.add(STREAM, json!({})).await?;
    raw.publish(&Outgoing::new("h.a", "a")).await?;
    site.settled(STREAM, 1).await?;
    let config = json!({"name": STREAM, "subjects": ["h.>"], "allow_msg_ttl": true});
    raw.api(&format!("STREAM.UPDATE.{STREAM}"), config).await?;
    // The source is asked for its configuration now and then.
    let mut last = 1;
    let mut target = site.target().await?;
    let counts = async |raw: &mut Raw, target: &mut Raw, last: u64| -> Result<bool> {
        raw.publish(&Outgoing::new("h.b", "b").with_lines(&["Nats-TTL: 1h"])).await?;
        site.settled(STREAM, last).await?;
        let copied = target.read_stream(STREAM).await?;
        Ok(copied.last().is_some_and(|message| !header_values(&message.header, "Nats-TTL").is_empty()))
    };
    let limit = std::time::Instant::now() + LIMIT;
    loop {
        last += 1;
        if counts(&mut raw, &mut target, last).await? {
            break;
        }
        anyhow::ensure!(std::time::Instant::now() < limit, "a time to live is never forwarded");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let errors = site.row(STREAM).await.map(|row| row["counters"]["errors"].clone());
    assert_eq!(errors, Some(Value::from(0)));
    Ok(())
}

#[tokio::test]
async fn a_rollup_that_means_nothing_at_the_source_removes_nothing() -> Result<()> {
    let site = Site::start().await?;
    if !site.source.at_least(2, 14) {
        // Only a mirror stores one as data, and that of 2.12 refuses it and stops.
        return Ok(());
    }
    site.target_stream(STREAM, json!({"subjects": ["h.>"], "allow_rollup_hdrs": true})).await?;
    let (mut raw, _) = stored_as_data(&site, &["A: 1", "A: 2", "Nats-Rollup: sub"]).await?;
    let source = raw.read_stream(STREAM).await?;
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 3).await?;
    let copied = site.target().await?.read_stream(STREAM).await?;
    assert_eq!(copied.len(), source.len());
    assert!(copied.iter().all(|message| header_values(&message.header, "Nats-Rollup").is_empty()));
    Ok(())
}

/// Such a message removes everything else in its stream: at a target that was there before, also what is not of the copy.
#[tokio::test]
async fn a_rollup_of_all_spares_what_others_stored() -> Result<()> {
    let site = Site::small().await?;
    let mut raw = site.source_stream("R", json!({"subjects": ["r.>"], "allow_rollup_hdrs": true})).await?;
    let before = json!({"subjects": ["r.>", "theirs"], "allow_rollup_hdrs": true});
    let mut target = site.target_stream("R", before).await?;
    target.publish(&Outgoing::new("theirs", "not of the copy")).await?;
    site.add("R", json!({})).await?;
    site.add("R", json!({"name": "own", "target_stream": "OWN", "target_subject_prefix": "own"})).await?;
    for id in ["R", "R.own"] {
        site.row_when(id, "runs", |row| row["state"] == "running").await?;
    }
    raw.publish(&Outgoing::new("r.a", "1")).await?;
    site.settled("R", 1).await?;
    site.settled("R.own", 1).await?;
    raw.publish(&Outgoing::new("r.a", "2").with_lines(&["Nats-Rollup: all"])).await?;
    raw.publish(&Outgoing::new("r.b", "3")).await?;
    let row = site.settled("R", 3).await?;
    assert_eq!(row["counters"]["headers_removed"], 1, "{row}");
    let stored = async |stream: &str| -> Result<Vec<String>> {
        let stored = site.target().await?.read_stream(stream).await?;
        Ok(stored.iter().map(|message| message.subject.clone()).collect())
    };
    assert_eq!(stored("R").await?, ["theirs", "r.a", "r.a", "r.b"]);
    let row = site.settled("R.own", 3).await?;
    assert_eq!(row["counters"]["headers_removed"], 0, "{row}");
    assert_eq!(stored("OWN").await?, ["own.r.a", "own.r.b"]);
    Ok(())
}
