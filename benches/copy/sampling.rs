//! Sampling: how fast messages are decided about alone, and end to end with very many senders; what they cost in memory, and
//! how long a start takes that knows them already.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nats_lane::Message;
use serde_json::{Value, json};
use stream_replicator::config;
use stream_replicator::sampling::{Inspector, MessageOutcome, SamplingVerdict, Senders, Sighting};

use crate::harness::client::status;
use crate::harness::site::merged;
use crate::harness::{Outgoing, Raw, Role, Server, Service, connect, request, wait_for};

const LIMIT: Duration = Duration::from_secs(900);
const STREAM: &str = "NODES";

/// A document of so many bytes as an adapter writes it, with the sender at its end.
fn document(sender: u64, bytes: usize) -> String {
    let frame =
        json!({"protocol": "choria:adapters:choria_streams:output:1", "data": "", "time": "2026-11-22T08:00:00Z"});
    let frame = frame.to_string();
    let sender = format!(",\"sender\":\"n{sender:07}.example.net\"}}");
    let room = bytes.saturating_sub(frame.len() + sender.len());
    // Base64, as compressed registration data is.
    let data: String = (0..room).map(|at| char::from(b"QmFzZTY0RGF0YQ"[at % 14])).collect();
    frame.replace("\"data\":\"\"", &format!("\"data\":\"{data}\"")).trim_end_matches('}').to_owned() + &sender
}

/// The same bytes with structure instead of one long string.
fn structured(sender: u64, bytes: usize) -> String {
    let mut text = String::from("{\"facts\":[");
    let mut number = 0;
    while text.len() + 80 < bytes {
        text += &format!("{{\"name\":\"fact{number}\",\"value\":[{number},true,\"text of it\"]}},");
        number += 1;
    }
    text + &format!("null],\"sender\":\"n{sender:07}.example.net\"}}")
}

/// Decides about documents in memory, on one core.
pub(crate) fn decide(seconds: f64) -> Result<()> {
    const BYTES: usize = 16 * 1024;
    let text = json!({
        "stream": "S", "source_url": "nats://a", "target_url": "nats://b", "inspect_field": "sender", "inspect_duration": "1h",
        "size_trigger": 1024
    });
    let replication = config::parse(text.to_string().as_bytes(), "BENCH").map_err(|p| anyhow::anyhow!("{p}"))?;
    let sampling = replication.sampling.context("sampling")?;
    println!("\nDeciding alone, documents of 16 KiB, the sender at the end, one core:");
    for (what, make) in [("one long string", document as fn(u64, usize) -> String), ("many small values", structured)] {
        let documents: Vec<String> = (0..2_000).map(|sender| make(sender, BYTES)).collect();
        let bytes: usize = documents.iter().map(String::len).sum();
        let inspector = Inspector::new(&sampling);
        let mut senders = Senders::new("S", &sampling);
        senders.begin(0, None, false);
        let (mut seq, mut decided, begin) = (0, 0, Instant::now());
        let mut copied = 0;
        while begin.elapsed().as_secs_f64() < seconds {
            for document in &documents {
                seq += 1;
                let message =
                    Message { sid: 1, subject: b"nodes", reply: b"", header: b"", payload: document.as_bytes() };
                let sender = inspector.sender(&message).context("a sender")?;
                let sighting = Sighting {
                    sender: &sender,
                    seq,
                    time_ns: 1_700_000_000_000_000_000 + seq as i64 * 1_000_000,
                    size: document.len() as u32,
                    forced: inspector.forced(message.payload),
                };
                let verdict = black_box(senders.verdict(&sighting));
                let fate =
                    if verdict == SamplingVerdict::Skip { MessageOutcome::Passed } else { MessageOutcome::Stored };
                copied += u64::from(fate == MessageOutcome::Stored);
                senders.observe(&sighting, fate);
            }
            decided += bytes;
        }
        let elapsed = begin.elapsed().as_secs_f64();
        println!(
            "  {what}: {:.2} GB/s, {:.0} ns a message, {copied} of {seq} to be copied",
            decided as f64 / elapsed / 1e9,
            elapsed * 1e9 / seq as f64
        );
    }
    Ok(())
}

/// One run with so many senders.
pub(crate) async fn run(senders: u64) -> Result<()> {
    const BYTES: usize = 1024;
    let source = Server::start(Role::Source).await?;
    let (target, control) = (Server::start(Role::Target).await?, Server::start(Role::Control).await?);
    let mut raw = Raw::connect(&source.url()).await?;
    // With one subject, the sampled copy would skip everything, and its target could not be created.
    raw.create_stream(STREAM, json!({"subjects": ["nodes", "others"]})).await?;
    let mut service = Service::builder(&control.url(), "BENCH").instance("bench").start().await?;
    let client = connect(&control.url()).await?;
    let document_of = |fields: Value| {
        merged(json!({"stream": STREAM, "source_url": source.url(), "target_url": target.url()}), fields)
    };
    let sampled = document_of(json!({"inspect_field": "sender", "inspect_duration": "1d"}));
    let settled = async |id: &str, seq: u64| {
        let there = async || status(&client, id).await.is_some_and(|row| row["position"]["source_seq"] == seq);
        wait_for(&format!("{id} to settle {seq}"), LIMIT, there).await
    };
    println!("\n{senders} senders, documents of {BYTES} B:");
    let messages = || (0..senders).map(|sender| Outgoing::new("nodes", document(sender, BYTES)));
    raw.publish_all(messages()).await?;
    let begin = Instant::now();
    request(&client, "replicator.config.add", sampled).await?;
    settled(STREAM, senders).await?;
    println!("  all new, copied: {:.0} msg/s", senders as f64 / begin.elapsed().as_secs_f64());
    let written = async || {
        let row = status(&client, STREAM).await;
        row.is_some_and(|row| row["sampling"]["records_written"].as_u64() >= Some(senders))
    };
    wait_for("all records", LIMIT, written).await?;
    println!("  all records written after {:.1} s", begin.elapsed().as_secs_f64());
    let mib = |bytes: u64| bytes as f64 / 1048576.0;
    let usage = service.usage();
    println!("  resident memory {:.0} MiB, at its peak {:.0} MiB", mib(usage.rss), mib(usage.rss_peak));

    // The same senders again: nearly all of it is skipped. Beside it, a copy that skips all of it unseen.
    request(&client, "replicator.pause", json!({"replication": STREAM})).await?;
    raw.publish_all(messages()).await?;
    let mut rates = Vec::new();
    let begin = Instant::now();
    request(&client, "replicator.resume", json!({"replication": STREAM})).await?;
    settled(STREAM, 2 * senders).await?;
    rates.push(senders as f64 / begin.elapsed().as_secs_f64());
    let unseen = json!({"name": "UNSEEN", "start_sequence": senders + 1, "exclude_subjects": ["nodes"], "target_stream": "UNSEEN", "target_subject_prefix": "unseen"});
    let begin = Instant::now();
    request(&client, "replicator.config.add", document_of(unseen)).await?;
    settled("NODES.UNSEEN", 2 * senders).await?;
    rates.push(senders as f64 / begin.elapsed().as_secs_f64());
    let row = status(&client, STREAM).await.context("a row")?;
    println!(
        "  again, skipping: {:.0} msg/s, read only: {:.0} msg/s, {:.2} x; {} skipped, {} records written in all",
        rates[0],
        rates[1],
        rates[0] / rates[1],
        row["counters"]["skipped_sampled"],
        row["sampling"]["records_written"]
    );
    let usage = service.usage();
    println!("  resident memory {:.0} MiB, at its peak {:.0} MiB", mib(usage.rss), mib(usage.rss_peak));

    // A start from the full bucket.
    service.stop().await?;
    let begin = Instant::now();
    service.restart().await?;
    let there = async || {
        let row = status(&client, STREAM).await;
        row.is_some_and(|row| row["state"] == "running" && row["sampling"]["senders"] == senders)
    };
    wait_for("all senders to be known", LIMIT, there).await?;
    println!("  cold start: {:.1} s until it runs", begin.elapsed().as_secs_f64());
    let usage = service.usage();
    println!("  resident memory {:.0} MiB, at its peak {:.0} MiB", mib(usage.rss), mib(usage.rss_peak));
    ensure!(service.stop().await?.success(), "stopped gracefully");
    Ok(())
}

/// Messages that name no sender: what looking for one costs a copy.
pub(crate) async fn nameless(messages: u64, rounds: usize) -> Result<()> {
    let source = Server::start(Role::Source).await?;
    let (target, control) = (Server::start(Role::Target).await?, Server::start(Role::Control).await?);
    let service = Service::builder(&control.url(), "BENCH").instance("bench").start().await?;
    let client = connect(&control.url()).await?;
    let mut raw = Raw::connect(&source.url()).await?;
    println!("\n{messages} messages of 1 KiB that name nobody, copied with sampling and without:");
    let body = document(1, 1024).replace("sender", "source");
    for (what, body) in [("no such field", body.into_bytes()), ("no JSON", vec![b'x'; 1024])] {
        let stream = if what == "no JSON" { "TEXT" } else { "FIELDS" };
        raw.create_stream(stream, json!({"subjects": [format!("{stream}.x")]})).await?;
        raw.publish_all((0..messages).map(|_| Outgoing::new(format!("{stream}.x"), body.clone()))).await?;
        let mut ratios = Vec::new();
        for round in 0..rounds {
            let mut rates = Vec::new();
            for (name, fields) in
                [("plain", json!({})), ("sampled", json!({"inspect_field": "sender", "inspect_duration": "1h"}))]
            {
                let fixed = json!({
                    "stream": stream, "name": format!("{name}{round}"), "target_stream": "T", "source_url": source.url(),
                    "target_url": target.url(), "target_subject_prefix": "copy"
                });
                let id = format!("{stream}.{name}{round}");
                let begin = Instant::now();
                request(&client, "replicator.config.add", merged(fixed, fields)).await?;
                let there =
                    async || status(&client, &id).await.is_some_and(|row| row["position"]["source_seq"] == messages);
                wait_for(&format!("{id} to settle"), LIMIT, there).await?;
                rates.push(messages as f64 / begin.elapsed().as_secs_f64());
                request(&client, "replicator.config.delete", json!({"replication": id})).await?;
                Raw::connect(&target.url()).await?.api("STREAM.DELETE.T", Value::Null).await?;
            }
            ratios.push(rates[1] / rates[0]);
        }
        ratios.sort_by(f64::total_cmp);
        println!("  {what}: {:.2} x plain (median of {rounds} rounds)", ratios[ratios.len() / 2]);
    }
    drop(service);
    Ok(())
}
