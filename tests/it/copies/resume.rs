//! Where a replication resumes: every case of `copy/resume.rs`, made to happen with real servers.

use anyhow::{Context, Result, ensure};
use chrono::{SecondsFormat, Utc};
use serde_json::{Value, json};

use crate::harness::client::status;
use crate::harness::raw::header_values;
use crate::harness::site::merged;
use crate::harness::{
    Events, Expect, LIMIT, Outgoing, Raw, SITE, Server, Service, Site, Stored, request, wait_for, wait_value,
};

/// Source and target stream, and so the replication.
const STREAM: &str = "S";

const RESETS: [&str; 3] = ["source-reset", "target-reset", "target-shared"];
const ALL: [&str; 4] = ["source-reset", "target-reset", "target-shared", "gap"];

/// A source stream on file with `count` messages.
async fn with_source(config: Value, count: u64) -> Result<Site> {
    let site = Site::start().await?;
    site.source_stream(STREAM, config).await?;
    site.publish(STREAM, 1..=count).await?;
    Ok(site)
}

/// The same with its replication.
async fn added(source: Value, target: Option<Value>, document: Value, count: u64) -> Result<Site> {
    let site = with_source(source, count).await?;
    if let Some(config) = target {
        site.target_stream(STREAM, config).await?;
    }
    site.add(STREAM, document).await?;
    Ok(site)
}

/// The same, copied; the service continues.
async fn running(source: Value, target: Option<Value>, document: Value, count: u64) -> Result<Site> {
    let site = added(source, target, document, count).await?;
    site.settled(STREAM, count).await?;
    Ok(site)
}

/// The same; the service is stopped and the position saved.
async fn copied(source: Value, target: Option<Value>, document: Value, count: u64) -> Result<Site> {
    let mut site = running(source, target, document, count).await?;
    site.stop().await?;
    Ok(site)
}

/// Starts the service again and waits until everything up to this source sequence is settled.
async fn resumed(site: &mut Site, seq: u64) -> Result<Value> {
    site.service.restart().await?;
    site.settled(STREAM, seq).await
}

/// The same, and stops it again.
async fn resumed_and_stopped(site: &mut Site, seq: u64) -> Result<()> {
    resumed(site, seq).await?;
    site.stop().await
}

/// Keeps what a server has now, for [`put_back`].
async fn keep(server: &mut Server) -> Result<()> {
    server.stop().await?;
    server.snapshot("old")?;
    server.restart().await
}

/// As an operator who restores a backup.
async fn put_back(server: &mut Server) -> Result<()> {
    server.stop().await?;
    server.rollback("old")?;
    server.restart().await
}

/// Kills the service when the target is this far, and starts it again.
async fn kill_at(site: &mut Site, target_seq: u64) -> Result<()> {
    let mut raw = site.target().await?;
    let some = async || raw.stream_state(STREAM).await.is_ok_and(|s| s["last_seq"].as_u64().unwrap_or(0) >= target_seq);
    wait_for("some messages at the target", LIMIT, some).await?;
    site.service.kill()?;
    site.service.restart().await
}

/// Waits until this time is over.
async fn over(time_ns: u64) -> Result<()> {
    let over = async || Utc::now().timestamp_nanos_opt().is_some_and(|now| now as u64 > time_ns);
    wait_for("time to pass", LIMIT, over).await
}

/// What the copy has to be; more may be allowed.
fn copy() -> Expect<'static> {
    Expect::copy_of(STREAM).site(SITE)
}

/// The position record.
async fn record(site: &Site) -> Result<Value> {
    site.position(STREAM).await?.context("no position record")
}

/// Edits the position record by hand; stop the service first.
async fn edit(site: &Site, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut record = record(site).await?;
    change(&mut record);
    site.bucket("REPLICATOR_POSITIONS").await?.put(STREAM, serde_json::to_vec(&record)?.into()).await?;
    Ok(())
}

/// Deletes the position record by hand.
async fn forget(site: &Site) -> Result<()> {
    Ok(site.bucket("REPLICATOR_POSITIONS").await?.delete(STREAM).await?)
}

/// As if the last save had been before the first message.
async fn save_was_at_the_start(site: &Site) -> Result<()> {
    edit(site, |record| {
        record["source"] = json!({"seq": 0, "time_ns": null, "created": record["source"]["created"]});
        record["target"] = Value::Null;
    })
    .await
}

/// As if the last save had been at this source message: everything after it at the target was stored later.
async fn save_was_at(site: &Site, seq: u64) -> Result<()> {
    let source = site.source().await?.read_stream(STREAM).await?;
    let target = site.target().await?.read_stream(STREAM).await?;
    let message = source.iter().find(|m| m.seq == seq).context("no such source message")?;
    let copy = target.iter().find(|m| origin(m) == Some(seq)).context("it was not copied")?;
    edit(site, |record| {
        record["source"]["seq"] = seq.into();
        record["source"]["time_ns"] = message.time.into();
        record["target"]["seq"] = copy.seq.into();
        record["target"]["source_seq"] = seq.into();
    })
    .await
}

/// Source sequence that a copy names.
fn origin(message: &Stored) -> Option<u64> {
    header_values(&message.header, "Choria-SR-Source").pop()?.split(' ').nth(1)?.parse().ok()
}

/// Targets for both transports; `None` is made by the service, and fast where the server can.
fn targets() -> [Option<Value>; 2] {
    [None, Some(json!({}))]
}

async fn delete_message(raw: &mut Raw, seq: u64) -> Result<()> {
    raw.api(&format!("STREAM.MSG.DELETE.{STREAM}"), json!({"seq": seq, "no_erase": true})).await?;
    Ok(())
}

async fn purge(raw: &mut Raw, options: Value) -> Result<()> {
    raw.api(&format!("STREAM.PURGE.{STREAM}"), options).await?;
    Ok(())
}

async fn delete_stream(raw: &mut Raw) -> Result<()> {
    raw.api(&format!("STREAM.DELETE.{STREAM}"), Value::Null).await?;
    Ok(())
}

/// The memory source after a restart: empty, and the same `created` as a cluster would keep it.
async fn restart_memory_source(site: &mut Site) -> Result<()> {
    site.source.stop().await?;
    site.source.restart().await?;
    let mut raw = site.source().await?;
    let info = raw.create_stream(STREAM, json!({"subjects": ["s.>"], "storage": "memory"})).await?;
    edit(site, |record| record["source"]["created"] = info["created"].clone()).await
}

/// Source sequences at the target, in target order.
async fn at_target(site: &Site) -> Result<Vec<u64>> {
    Ok(site.target().await?.read_stream(STREAM).await?.iter().filter_map(origin).collect())
}

fn seqs(range: std::ops::RangeInclusive<u64>) -> Vec<u64> {
    range.collect()
}

/// Puts copies at the target by hand, as a pipelined writer of this replication leaves them.
async fn put_copies(site: &Site, which: &[u64]) -> Result<()> {
    let source = site.source().await?.read_stream(STREAM).await?;
    let mut target = site.target().await?;
    for seq in which {
        let m = source.iter().find(|m| m.seq == *seq).context("not at the source")?;
        let provenance = format!("Choria-SR-Source: {STREAM} {seq} {SITE} {SITE} {}", m.time / 1_000_000);
        let id = format!("Nats-Msg-Id: by-hand-{seq}");
        target.publish(&Outgoing::new(&*m.subject, m.payload.clone()).with_lines(&[&provenance, &id])).await?;
    }
    Ok(())
}

// Witnesses hold.

#[tokio::test]
async fn a_kill_between_saves_neither_loses_nor_doubles() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 500).await?;
        save_was_at(&site, 120).await?;
        site.publish(STREAM, 501..=600).await?;
        let row = resumed(&mut site, 600).await?;
        assert_eq!(row["counters"]["copied"], 100, "{row}");
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn kills_at_any_moment_leave_an_exact_copy() -> Result<()> {
    for target in targets() {
        let mut site = added(json!({}), target, json!({}), 60_000).await?;
        for share in 1..=4u64 {
            kill_at(&mut site, share * 9_000).await?;
        }
        site.settled(STREAM, 60_000).await?;
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn messages_before_the_first_save_are_found_at_the_target() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 300).await?;
        save_was_at_the_start(&site).await?;
        let row = resumed(&mut site, 300).await?;
        assert_eq!(row["counters"]["copied"], 0, "{row}");
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_refused_message_behind_later_ones_is_sent_again_alone() -> Result<()> {
    let mut site = copied(json!({}), Some(json!({})), json!({}), 10).await?;
    site.publish(STREAM, 11..=60).await?;
    // 12 and 30 were refused, then came the crash.
    let stored: Vec<u64> = (11..=50).filter(|seq| ![12, 30].contains(seq)).collect();
    put_copies(&site, &stored).await?;
    let row = resumed(&mut site, 60).await?;
    assert_eq!(row["counters"]["copied"], 12, "{row}");
    site.verify(STREAM, &copy().late_allowed()).await?;
    // And a crash right after that.
    site.stop().await?;
    save_was_at(&site, 11).await?;
    let row = resumed(&mut site, 60).await?;
    assert_eq!(row["counters"]["copied"], 0, "{row}");
    site.verify(STREAM, &copy().late_allowed()).await?;
    site.events.quiet(&ALL)
}

#[tokio::test]
async fn the_first_message_refused_and_no_record_is_not_lost() -> Result<()> {
    let mut site = with_source(json!({}), 50).await?;
    site.target_stream(STREAM, json!({})).await?;
    put_copies(&site, &seqs(2..=40)).await?;
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 50).await?;
    site.verify(STREAM, &copy().late_allowed()).await?;
    site.stop().await?;
    site.events.quiet(&ALL)
}

#[tokio::test]
async fn a_rejected_message_survives_changes_of_the_transport() -> Result<()> {
    for (record_lost, batched) in [(true, false), (true, true), (false, true)] {
        let mut site = copied(json!({}), Some(json!({})), json!({}), 10).await?;
        if batched && !site.target.at_least(2, 14) {
            continue;
        }
        site.publish(STREAM, 11..=60).await?;
        let stored: Vec<u64> = (11..=50).filter(|seq| *seq != 12).collect();
        put_copies(&site, &stored).await?;
        if batched {
            let config = json!({"name": STREAM, "subjects": ["s.>"], "allow_batched": true});
            site.target().await?.api(&format!("STREAM.UPDATE.{STREAM}"), config).await?;
        }
        if record_lost {
            forget(&site).await?;
        } else {
            // What an even newer run said of itself before anything was sent.
            edit(&site, |record| record["status"]["transport"] = "fast_ingest".into()).await?;
        }
        site.service.restart().await?;
        let fewer = site.document_with(STREAM, json!({"limits": {"messages_in_flight": 5}}));
        request(&site.client, "replicator.config.update", fewer).await?;
        site.settled(STREAM, 60).await?;
        site.verify(STREAM, &copy().late_allowed()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn kills_leave_an_exact_copy_at_a_shared_target() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 10).await?;
        let mut raw = site.target().await?;
        raw.publish(&Outgoing::new("s.foreign", "x")).await?;
        site.publish(STREAM, 11..=40_000).await?;
        site.service.restart().await?;
        for share in 1..=3u64 {
            kill_at(&mut site, share * 9_000).await?;
        }
        let row = site.settled(STREAM, 40_000).await?;
        assert_eq!(row["target_mode"], "shared", "{row}");
        site.verify(STREAM, &copy().shared()).await?;
        site.events.quiet(&["source-reset", "target-reset", "gap"])?;
    }
    Ok(())
}

#[tokio::test]
async fn older_values_never_replace_newer_ones_at_a_kv_like_target() -> Result<()> {
    for batched in [true, false] {
        // Ids must not save us.
        let mut config = json!({"max_msgs_per_subject": 1, "duplicate_window": 100_000_000});
        let site = Site::start().await?;
        if batched && site.target.at_least(2, 14) {
            config["allow_batched"] = true.into();
        }
        drop(site);
        let mut site = copied(json!({}), Some(config), json!({}), 20).await?;
        save_was_at(&site, 16).await?;
        save_was_at_the_start(&site).await?;
        let time = site.target().await?.read_stream(STREAM).await?.last().context("empty")?.time;
        over(time + 300_000_000).await?;
        resumed(&mut site, 20).await?;
        assert_eq!(at_target(&site).await?, seqs(16..=20));
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_message_replaced_at_a_kv_like_target_is_no_loss() -> Result<()> {
    for target in [json!({"max_msgs_per_subject": 1}), json!({"max_msgs_per_subject": 1, "allow_batched": true})] {
        let site = Site::start().await?;
        let fast = site.target.at_least(2, 14);
        drop(site);
        if target["allow_batched"] == true && !fast {
            continue;
        }
        let mut site = copied(json!({}), Some(target), json!({}), 10).await?;
        let saved = record(&site).await?;
        site.publish(STREAM, 11..=20).await?;
        resumed(&mut site, 20).await?;
        site.service.kill()?;
        // As if the kill had come before the save: 10 was replaced by 15 or 20.
        edit(&site, |record| {
            record["source"] = saved["source"].clone();
            record["target"] = saved["target"].clone();
        })
        .await?;
        resumed(&mut site, 20).await?;
        assert_eq!(at_target(&site).await?, seqs(16..=20));
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_purged_target_is_not_filled_again() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 100).await?;
        purge(&mut site.target().await?, json!({})).await?;
        site.publish(STREAM, 101..=120).await?;
        resumed(&mut site, 120).await?;
        assert_eq!(at_target(&site).await?, seqs(101..=120));
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn an_expired_target_is_not_filled_again() -> Result<()> {
    let config = json!({"max_age": 1_000_000_000u64, "duplicate_window": 1_000_000_000u64});
    let mut site = copied(json!({}), Some(config), json!({}), 50).await?;
    let mut raw = site.target().await?;
    let empty = async || raw.stream_state(STREAM).await.is_ok_and(|s| s["messages"] == 0);
    wait_for("the target to expire", LIMIT, empty).await?;
    let row = resumed(&mut site, 50).await?;
    assert_eq!(row["counters"]["copied"], 0, "{row}");
    site.events.quiet(&ALL)
}

#[tokio::test]
async fn a_position_ahead_of_the_target_because_all_was_skipped_holds() -> Result<()> {
    let mut site = with_source(json!({}), 40).await?;
    let mut raw = site.source().await?;
    let time = raw.read_stream(STREAM).await?[39].time;
    over(time + 1_100_000_000).await?;
    site.add(STREAM, json!({"max_age": "1s"})).await?;
    let row = site.settled(STREAM, 40).await?;
    assert_eq!((&row["counters"]["skipped_old"], &row["position"]["target_seq"]), (&json!(40), &json!(0)), "{row}");
    site.stop().await?;
    site.service.restart().await?;
    site.publish(STREAM, 41..=45).await?;
    let row = site.settled(STREAM, 45).await?;
    assert_eq!((&row["counters"]["copied"], &row["counters"]["received"]), (&json!(5), &json!(5)), "{row}");
    site.events.quiet(&ALL)
}

// The target lost something.

/// Copies 60, keeps the target, copies up to `count`, puts the target back.
async fn target_put_back(target: Option<Value>, count: u64) -> Result<Site> {
    let mut site = copied(json!({}), target, json!({}), 60).await?;
    keep(&mut site.target).await?;
    site.publish(STREAM, 61..=count).await?;
    resumed_and_stopped(&mut site, count).await?;
    put_back(&mut site.target).await?;
    Ok(site)
}

#[tokio::test]
async fn a_target_put_back_is_filled_again() -> Result<()> {
    for target in targets() {
        let mut site = target_put_back(target, 100).await?;
        resumed(&mut site, 100).await?;
        let event = site.events.ever("target-reset").await?;
        assert_eq!(event["saved"], 100, "{event}");
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&["source-reset", "gap", "target-shared"])?;
    }
    Ok(())
}

#[tokio::test]
async fn another_message_at_the_saved_place_is_seen() -> Result<()> {
    for target in targets() {
        let mut site = target_put_back(target, 70).await?;
        for i in 0..15 {
            site.target().await?.publish(&Outgoing::new("s.foreign", format!("{i}"))).await?;
        }
        resumed(&mut site, 70).await?;
        site.events.ever("target-reset").await?;
        site.verify(STREAM, &copy().shared()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_hole_at_the_saved_place_is_filled_again() -> Result<()> {
    // The server refuses a deleted message while it knows its id.
    for target in [None, Some(json!({"duplicate_window": 100_000_000}))] {
        let mut site = copied(json!({"duplicate_window": 100_000_000}), target, json!({}), 60).await?;
        let mut raw = site.target().await?;
        let time = raw.read_stream(STREAM).await?[59].time;
        over(time + 300_000_000).await?;
        delete_message(&mut raw, 60).await?;
        resumed(&mut site, 60).await?;
        site.events.ever("target-reset").await?;
        site.verify(STREAM, &copy()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_memory_target_over_a_restart_is_filled_again() -> Result<()> {
    for fast in [true, false] {
        let mut site = with_source(json!({}), 80).await?;
        let mut config = json!({"storage": "memory"});
        if fast && site.target.at_least(2, 14) {
            config["allow_batched"] = true.into();
        }
        site.target_stream(STREAM, config).await?;
        site.add(STREAM, json!({})).await?;
        site.settled(STREAM, 80).await?;
        // While it runs.
        site.target.kill()?;
        site.target.restart().await?;
        site.events.ever("target-reset").await?;
        site.settled(STREAM, 80).await?;
        site.verify(STREAM, &copy()).await?;
        site.publish(STREAM, 81..=90).await?;
        site.settled(STREAM, 90).await?;
        site.verify(STREAM, &copy()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_target_made_anew_starts_over() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 80).await?;
        delete_stream(&mut site.target().await?).await?;
        resumed(&mut site, 80).await?;
        site.events.ever("target-reset").await?;
        site.verify(STREAM, &copy()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_recreated_target_continues_after_a_start_at_the_end() -> Result<()> {
    for filled in [false, true] {
        let mut site = running(json!({}), None, json!({"start_at_end": true}), 50).await?;
        site.publish(STREAM, 51..=80).await?;
        site.settled(STREAM, 80).await?;
        site.stop().await?;
        assert_eq!(at_target(&site).await?, seqs(51..=80));
        site.publish(STREAM, 81..=90).await?;
        delete_stream(&mut site.target().await?).await?;
        if filled {
            // Not even empty: others were faster.
            site.target_stream(STREAM, json!({})).await?;
            site.target().await?.publish(&Outgoing::new("s.foreign", "x")).await?;
        }
        resumed(&mut site, 90).await?;
        site.events.ever("target-reset").await?;
        assert_eq!(at_target(&site).await?, seqs(81..=90));
    }
    Ok(())
}

#[tokio::test]
async fn a_target_made_anew_under_a_running_copy_gets_everything() -> Result<()> {
    for target in targets() {
        let site = with_source(json!({}), 300).await?;
        let config = target.clone().unwrap_or_else(|| json!({"allow_batched": true}));
        if target.is_some() || site.target.at_least(2, 14) {
            site.target_stream(STREAM, config.clone()).await?;
        }
        site.add(STREAM, json!({})).await?;
        site.settled(STREAM, 300).await?;
        let mut raw = site.target().await?;
        delete_stream(&mut raw).await?;
        if target.is_some() || site.target.at_least(2, 14) {
            site.target_stream(STREAM, config).await?;
        }
        site.publish(STREAM, 301..=400).await?;
        site.events.ever("target-reset").await?;
        site.settled(STREAM, 400).await?;
        site.verify(STREAM, &copy().late_allowed()).await?;
    }
    Ok(())
}

// The source lost something.

/// Copies 60, keeps the source, copies up to 100, puts the source back.
async fn source_put_back(config: Value, target: Option<Value>) -> Result<Site> {
    let mut site = copied(config, target, json!({}), 60).await?;
    keep(&mut site.source).await?;
    site.publish(STREAM, 61..=100).await?;
    resumed_and_stopped(&mut site, 100).await?;
    put_back(&mut site.source).await?;
    Ok(site)
}

/// The messages that the source has now are there, once and in order, after the older ones.
async fn verify_now(site: &Site, copied_before: usize) -> Result<()> {
    let source = site.source().await?.read_stream(STREAM).await?;
    let target = site.target().await?.read_stream(STREAM).await?;
    let mut copies = target.iter();
    for message in &source {
        let found = copies.find(|copy| {
            let time = format!(" {}", message.time / 1_000_000);
            origin(copy) == Some(message.seq) && String::from_utf8_lossy(&copy.header).contains(&time)
        });
        ensure!(found.is_some_and(|c| c.payload == message.payload), "source {} is not there in order", message.seq);
    }
    ensure!(target.len() == copied_before, "{} messages at the target, not {copied_before}", target.len());
    Ok(())
}

#[tokio::test]
async fn a_source_put_back_goes_on_behind_what_it_still_has() -> Result<()> {
    for target in targets() {
        let mut site = source_put_back(json!({}), target).await?;
        site.service.restart().await?;
        let event = site.events.ever("source-reset").await?;
        assert_eq!(event["saved"], 100, "{event}");
        site.publish(STREAM, 1001..=1010).await?;
        site.settled(STREAM, 70).await?;
        verify_now(&site, 110).await?;
        site.events.quiet(&["target-reset", "gap", "target-shared"])?;
    }
    Ok(())
}

#[tokio::test]
async fn a_restored_and_refilled_source_loses_nothing() -> Result<()> {
    for target in targets() {
        let mut site = source_put_back(json!({}), target).await?;
        site.publish(STREAM, 1001..=1100).await?;
        site.service.restart().await?;
        site.events.ever("source-reset").await?;
        site.settled(STREAM, 160).await?;
        verify_now(&site, 200).await?;
        // A crash right after it, before a save.
        site.stop().await?;
        save_was_at(&site, 60).await?;
        edit(&site, |record| record["target"]["seq"] = 60.into()).await?;
        let row = resumed(&mut site, 160).await?;
        assert_eq!(row["counters"]["copied"], 0, "{row}");
        verify_now(&site, 200).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_source_cut_inside_the_unsaved_tail_is_seen() -> Result<()> {
    for target in targets() {
        let mut site = source_put_back(json!({}), target).await?;
        site.publish(STREAM, 1001..=1100).await?;
        // The save was before the cut: its witness holds.
        save_was_at(&site, 40).await?;
        site.service.restart().await?;
        site.events.ever("source-reset").await?;
        site.settled(STREAM, 160).await?;
        verify_now(&site, 200).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_kv_like_source_put_back_and_refilled_loses_nothing() -> Result<()> {
    let mut site = source_put_back(json!({"max_msgs_per_subject": 1}), None).await?;
    // 100 lies under another key now, and what is at or below it is newer than the position.
    site.publish(STREAM, 1001..=1038).await?;
    let mut raw = site.source().await?;
    raw.publish_all((0..10).map(|i| Outgoing::new("s.0", format!("again {i}")))).await?;
    site.service.restart().await?;
    site.events.ever("source-reset").await?;
    site.settled(STREAM, 108).await?;
    for message in raw.read_stream(STREAM).await? {
        let there = site.target().await?.read_stream(STREAM).await?;
        ensure!(there.iter().any(|copy| copy.payload == message.payload), "{message:?} is lost");
    }
    Ok(())
}

#[tokio::test]
async fn a_memory_source_over_a_restart_and_refilled_loses_nothing() -> Result<()> {
    for target in [None, Some(json!({"storage": "memory"}))] {
        let mut site = copied(json!({"storage": "memory"}), target, json!({}), 50).await?;
        restart_memory_source(&mut site).await?;
        site.publish(STREAM, 1001..=1020).await?;
        site.service.restart().await?;
        site.events.ever("source-reset").await?;
        site.settled(STREAM, 20).await?;
        verify_now(&site, 70).await?;
        // A crash before a save: the old messages must not be taken for the new ones.
        site.service.kill()?;
        save_was_at_the_start(&site).await?;
        site.publish(STREAM, 1021..=1080).await?;
        resumed(&mut site, 80).await?;
        verify_now(&site, 130).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_emptied_memory_source_is_told_once_and_then_copied() -> Result<()> {
    let mut site = copied(json!({"storage": "memory"}), Some(json!({})), json!({}), 50).await?;
    restart_memory_source(&mut site).await?;
    site.service.restart().await?;
    site.events.ever("source-reset").await?;
    site.settled(STREAM, 0).await?;
    site.stop().await?;
    site.service.restart().await?;
    site.publish(STREAM, 1001..=1020).await?;
    site.settled(STREAM, 20).await?;
    verify_now(&site, 70).await?;
    assert_eq!(site.events.told("source-reset").len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_source_made_anew_starts_over() -> Result<()> {
    for (config, count) in [(json!({}), 90), (json!({"max_msgs_per_subject": 1}), 52)] {
        for target in targets() {
            let mut site = copied(config.clone(), target, json!({}), 50).await?;
            let before = at_target(&site).await?.len();
            delete_stream(&mut site.source().await?).await?;
            site.source_stream(STREAM, config.clone()).await?;
            // The last ones of one key: at the position lies nothing, below it lie new messages.
            site.publish(STREAM, 1001..=1046).await?;
            let mut raw = site.source().await?;
            raw.publish_all((46..count).map(|i| Outgoing::new("s.0", i.to_string()))).await?;
            site.service.restart().await?;
            site.events.ever("source-reset").await?;
            site.settled(STREAM, count).await?;
            if config["max_msgs_per_subject"] == 1 {
                let there = site.target().await?.read_stream(STREAM).await?;
                for message in raw.read_stream(STREAM).await? {
                    ensure!(there.iter().any(|copy| copy.payload == message.payload), "{message:?} is lost");
                }
            } else {
                verify_now(&site, before + count as usize).await?;
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn both_sides_put_back_at_once() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 40).await?;
        keep(&mut site.target).await?;
        site.publish(STREAM, 41..=60).await?;
        keep(&mut site.source).await?;
        site.publish(STREAM, 61..=100).await?;
        resumed_and_stopped(&mut site, 100).await?;
        put_back(&mut site.source).await?;
        put_back(&mut site.target).await?;
        site.service.restart().await?;
        site.events.ever("source-reset").await?;
        site.events.ever("target-reset").await?;
        site.settled(STREAM, 60).await?;
        site.verify(STREAM, &copy()).await?;
    }
    Ok(())
}

// Gaps.

#[tokio::test]
async fn what_was_purged_while_down_is_a_gap_told_once() -> Result<()> {
    let mut site = copied(json!({}), None, json!({}), 50).await?;
    site.publish(STREAM, 51..=100).await?;
    purge(&mut site.source().await?, json!({"seq": 81})).await?;
    let row = resumed(&mut site, 100).await?;
    assert_eq!(row["counters"]["gap_messages"], 30, "{row}");
    let event = site.events.ever("gap").await?;
    assert_eq!((&event["from"], &event["to"], &event["messages"]), (&json!(51), &json!(80), &json!(30)));
    assert_eq!(at_target(&site).await?, [seqs(1..=50), seqs(81..=100)].concat());
    // All of it, and nothing new: still reported only once.
    site.stop().await?;
    site.publish(STREAM, 101..=110).await?;
    purge(&mut site.source().await?, json!({})).await?;
    resumed_and_stopped(&mut site, 110).await?;
    let row = resumed(&mut site, 110).await?;
    assert_eq!(row["counters"]["gap_messages"], 0, "{row}");
    site.events.all("gap", 2).await?;
    site.events.quiet(&RESETS)
}

#[tokio::test]
async fn messages_copied_and_not_saved_are_no_gap() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 50).await?;
        save_was_at(&site, 20).await?;
        purge(&mut site.source().await?, json!({"seq": 41})).await?;
        let row = resumed(&mut site, 50).await?;
        assert_eq!(row["counters"]["gap_messages"], 0, "{row}");
        assert_eq!(at_target(&site).await?, seqs(1..=50));
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn what_a_slow_copy_missed_is_a_gap_while_it_runs() -> Result<()> {
    let site = with_source(json!({"max_msgs": 1_000}), 10).await?;
    site.target_stream(STREAM, json!({})).await?;
    let limits = json!({"limits": {"bytes_in_flight": 65_536, "messages_in_flight": 10}});
    site.add(STREAM, limits).await?;
    site.settled(STREAM, 10).await?;
    site.service.freeze()?;
    let padding = "x".repeat(500);
    let messages = (0..20_000).map(|i| Outgoing::new("s.1", format!("{i} {padding}")));
    site.source().await?.publish_all(messages).await?;
    site.service.thaw()?;
    site.settled(STREAM, 20_010).await?;
    let row = site.row_when(STREAM, "the gap", |row| row["counters"]["gap_messages"].as_u64() > Some(0)).await?;
    site.events.ever("gap").await?;
    let there = at_target(&site).await?;
    let missing = 20_010 - there.len() as u64;
    assert_eq!(row["counters"]["gap_messages"], missing, "{row}");
    ensure!(there.windows(2).all(|w| w[0] < w[1]), "out of order");
    ensure!(there.ends_with(&seqs(19_011..=20_010)), "the source still has some that are not there");
    Ok(())
}

#[tokio::test]
async fn filters_keys_and_deleted_messages_are_no_gaps() -> Result<()> {
    // A filter: others are purged away below.
    let mut site = copied(json!({}), None, json!({"filter_subject": "s.0"}), 50).await?;
    site.publish(STREAM, 51..=100).await?;
    purge(&mut site.source().await?, json!({"seq": 91})).await?;
    resumed(&mut site, 100).await?;
    site.events.quiet(&ALL)?;
    // One message per subject.
    let mut site = copied(json!({"max_msgs_per_subject": 1}), None, json!({}), 50).await?;
    site.publish(STREAM, 51..=100).await?;
    resumed(&mut site, 100).await?;
    site.events.quiet(&ALL)?;
    // Deleted by hand, while down and while it runs.
    let mut site = copied(json!({}), None, json!({}), 50).await?;
    site.publish(STREAM, 51..=100).await?;
    let mut raw = site.source().await?;
    for seq in [50, 55, 56, 70] {
        delete_message(&mut raw, seq).await?;
    }
    resumed(&mut site, 100).await?;
    site.service.freeze()?;
    site.publish(STREAM, 101..=200).await?;
    for seq in 110..130 {
        delete_message(&mut raw, seq).await?;
    }
    site.service.thaw()?;
    let row = site.settled(STREAM, 200).await?;
    assert_eq!(row["counters"]["gap_messages"], 0, "{row}");
    site.events.quiet(&ALL)
}

// No record.

#[tokio::test]
async fn without_a_record_the_provenance_at_the_target_says_where() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 100).await?;
        forget(&site).await?;
        site.publish(STREAM, 101..=130).await?;
        let row = resumed(&mut site, 130).await?;
        assert_eq!(row["counters"]["copied"], 30, "{row}");
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn without_a_record_a_durable_of_choria_says_where() -> Result<()> {
    let site = with_source(json!({}), 50).await?;
    let mut raw = site.source().await?;
    let name = format!("SR_{SITE}");
    let config = json!({"durable_name": name, "ack_policy": "explicit", "deliver_policy": "all"});
    raw.api(&format!("CONSUMER.DURABLE.CREATE.{STREAM}.{name}"), json!({"stream_name": STREAM, "config": config}))
        .await?;
    let jetstream = async_nats::jetstream::new(crate::harness::connect(&site.source.url()).await?);
    let consumer: async_nats::jetstream::consumer::PullConsumer =
        jetstream.get_consumer_from_stream(&name, STREAM).await.map_err(|e| anyhow::anyhow!("{e}"))?;
    let mut messages = consumer.fetch().max_messages(20).messages().await?;
    while let Some(message) = futures_util::StreamExt::next(&mut messages).await {
        message.map_err(|e| anyhow::anyhow!("{e}"))?.double_ack().await.map_err(|e| anyhow::anyhow!("{e}"))?;
    }
    // The durable wins over the configured start.
    site.add(STREAM, json!({"start_at_end": true})).await?;
    site.settled(STREAM, 50).await?;
    assert_eq!(at_target(&site).await?, seqs(21..=50));
    Ok(())
}

#[tokio::test]
async fn without_a_record_the_configured_start_says_where() -> Result<()> {
    let site = with_source(json!({}), 30).await?;
    let mut raw = site.source().await?;
    let later = raw.read_stream(STREAM).await?[29].time + 50_000_000;
    over(later).await?;
    site.publish(STREAM, 31..=60).await?;
    let times: Vec<u64> = raw.read_stream(STREAM).await?.iter().map(|m| m.time).collect();
    let middle = chrono::DateTime::from_timestamp_nanos(times[30] as i64).to_rfc3339_opts(SecondsFormat::Nanos, true);
    let starts = [
        ("all", json!({}), 1),
        ("sequence", json!({"start_sequence": 20}), 20),
        ("time", json!({"start_time": middle}), 31),
        ("delta", json!({"start_delta": "1h"}), 1),
        ("delta over time", json!({"start_delta": "1h", "start_time": middle}), 1),
        ("sequence over delta", json!({"start_sequence": 40, "start_delta": "1h", "start_time": middle}), 40),
        ("end over all", json!({"start_at_end": true, "start_sequence": 40, "start_delta": "1h"}), 61),
        ("sequence to come", json!({"start_sequence": 63}), 63),
    ];
    let mut target = site.target().await?;
    for (index, (_, start, _)) in starts.iter().enumerate() {
        let names = json!({"name": format!("n{index}"), "target_stream": format!("T{index}"),
            "target_subject_prefix": format!("t{index}")});
        site.add(STREAM, merged(names, start.clone())).await?;
    }
    let id = |index: usize| format!("{STREAM}.n{index}");
    for (index, (what, ..)) in starts.iter().enumerate() {
        let runs = async || status(&site.client, &id(index)).await.is_some_and(|row| row["state"] == "running");
        wait_for(what, LIMIT, runs).await?;
    }
    site.publish(STREAM, 61..=61).await?;
    let mut site = site;
    // A restart before the sequence to come has come changes nothing.
    for (index, (what, _, first)) in starts.iter().enumerate().take(7) {
        let want = 62 - first;
        let done = async || target.stream_state(&format!("T{index}")).await.is_ok_and(|s| s["messages"] == want);
        wait_for(&format!("{what}: {want} messages"), LIMIT, done).await?;
    }
    site.stop().await?;
    site.service.restart().await?;
    site.publish(STREAM, 62..=70).await?;
    for (index, (what, _, first)) in starts.iter().enumerate() {
        let name = format!("T{index}");
        let want = 71 - first;
        let done = async || target.stream_state(&name).await.is_ok_and(|s| s["messages"].as_u64() >= Some(want));
        wait_for(&format!("{what}: {want} messages"), LIMIT, done).await?;
        let there: Vec<u64> = target.read_stream(&name).await?.iter().filter_map(origin).collect();
        assert_eq!(there, seqs(*first..=70), "{what}");
    }
    site.events.quiet(&ALL)
}

// The fence.

/// A second service with requests and events of its own.
async fn second(control: &Server, arguments: &[&str]) -> Result<Service> {
    Service::builder(&control.url(), SITE).instance("second").args(["--prefix", "second"]).args(arguments).start().await
}

async fn row_of(client: &async_nats::Client, prefix: &str) -> Option<Value> {
    let reply = request(client, &format!("{prefix}.status"), Value::Null).await.ok()?;
    reply["replications"].as_array()?.iter().find(|row| row["replication"] == STREAM).cloned()
}

#[tokio::test]
async fn a_second_holder_fences_the_first() -> Result<()> {
    for target in targets() {
        let site = running(json!({}), target, json!({}), 100).await?;
        let _second = second(site.control(), &["--standalone"]).await?;
        let mut count = 100;
        let stopped = wait_value("the first to stop", LIMIT, async || {
            site.publish(STREAM, count + 1..=count + 5).await.ok()?;
            count += 5;
            site.events.told("stopped").pop()
        })
        .await?;
        let message = stopped["message"].as_str().unwrap_or_default();
        ensure!(message.contains("`second`") && message.contains("epoch 2"), "{message}");
        let led = async || row_of(&site.client, "replicator").await.is_some_and(|row| row["leader"] == "second");
        wait_for("the first to tell what the second does", LIMIT, led).await?;
        let done =
            async || row_of(&site.client, "second").await.is_some_and(|row| row["position"]["source_seq"] == count);
        wait_for("the second to copy the rest", LIMIT, done).await?;
        site.verify(STREAM, &copy()).await?;
        site.events.quiet(&ALL)?;
    }
    Ok(())
}

#[tokio::test]
async fn two_replicators_of_one_name_without_a_common_record() -> Result<()> {
    let site = with_source(json!({}), 100).await?;
    if !site.target.at_least(2, 14) {
        return Ok(());
    }
    site.add(STREAM, json!({})).await?;
    site.settled(STREAM, 100).await?;
    let _second = second(site.control(), &["--bucket-prefix", "OTHER"]).await?;
    let told = Events::of(&site.client, "second.event.>").await?;
    request(&site.client, "second.config.add", site.document_with(STREAM, json!({}))).await?;
    let mut count = 100;
    let held = wait_value("one of them to be held", LIMIT * 2, async || {
        site.publish(STREAM, count + 1..=count + 3).await.ok()?;
        count += 3;
        let rows = [row_of(&site.client, "replicator").await, row_of(&site.client, "second").await];
        rows.into_iter().flatten().find(|row| row["state"] == "held")
    })
    .await?;
    let message = held["last_error"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("another replicator"), "{message}");
    let mut raw = site.target().await?;
    let all = async || raw.stream_state(STREAM).await.is_ok_and(|s| s["messages"].as_u64() >= Some(count));
    wait_for("all messages at the target", LIMIT, all).await?;
    site.verify(STREAM, &copy()).await?;
    let held = async || !told.told("held").is_empty() || !site.events.told("held").is_empty();
    wait_for("an event that tells it", LIMIT, held).await?;
    site.events.quiet(&ALL)
}

// Foreign messages.

#[tokio::test]
async fn a_foreign_message_in_the_middle_of_a_copy() -> Result<()> {
    let site = with_source(json!({}), 5_000).await?;
    site.add(STREAM, json!({})).await?;
    let fast = site.settled(STREAM, 5_000).await?["transport"] == "fast_ingest";
    let mut target = site.target().await?;
    for round in 1..=5u64 {
        site.publish(STREAM, round * 5_000 + 1..=(round + 1) * 5_000).await?;
        target.publish(&Outgoing::new("s.foreign", "x")).await?;
    }
    let row = site.settled(STREAM, 30_000).await?;
    site.verify(STREAM, &copy().shared().late_allowed()).await?;
    if fast {
        assert_eq!(row["target_mode"], "shared", "{row}");
        site.events.ever("target-shared").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_foreign_message_while_down_is_told_once_and_kept() -> Result<()> {
    for target in targets() {
        let mut site = copied(json!({}), target, json!({}), 100).await?;
        site.target().await?.publish(&Outgoing::new("s.foreign", "x")).await?;
        site.publish(STREAM, 101..=150).await?;
        let row = resumed(&mut site, 150).await?;
        assert_eq!(row["target_mode"], "shared", "{row}");
        site.events.ever("target-shared").await?;
        site.verify(STREAM, &copy().shared()).await?;
        site.stop().await?;
        site.target().await?.publish(&Outgoing::new("s.foreign", "y")).await?;
        site.service.restart().await?;
        site.publish(STREAM, 151..=160).await?;
        let row = site.settled(STREAM, 160).await?;
        assert_eq!(row["target_mode"], "shared", "{row}");
        assert_eq!(site.events.told("target-shared").len(), 1);
        site.verify(STREAM, &copy().shared()).await?;
        site.events.quiet(&["target-reset", "source-reset", "gap"])?;
    }
    Ok(())
}

#[tokio::test]
async fn a_change_to_batches_and_a_kill_double_nothing() -> Result<()> {
    let mut site = copied(json!({}), Some(json!({})), json!({}), 100).await?;
    if !site.target.at_least(2, 14) {
        return Ok(());
    }
    // As if a refused message was still to be sent again when the service was killed...
    let mut target = site.target().await?;
    target.api(&format!("STREAM.MSG.DELETE.{STREAM}"), json!({"seq": 51})).await?;
    // A server that starts knows the ids of what it stores, and not that of the one that was never stored.
    site.target.stop().await?;
    site.target.restart().await?;
    let mut target = site.target().await?;
    save_was_at(&site, 40).await?;
    // ... and then in a batch, after all those that are there.
    let config = json!({"name": STREAM, "subjects": ["s.>"], "storage": "file", "allow_batched": true});
    target.api(&format!("STREAM.UPDATE.{STREAM}"), config).await?;
    let row = resumed(&mut site, 100).await?;
    assert_eq!(row["transport"], "fast_ingest");
    site.stop().await?;
    // Killed before the next save.
    save_was_at(&site, 40).await?;
    resumed_and_stopped(&mut site, 100).await?;
    site.verify(STREAM, &copy().late_allowed()).await
}
