//! Comparing both streams: each kind of difference is found and named, and what is equal, or differs for a known reason, gives no
//! finding.

mod causes;
mod clean;
mod findings;
mod jobs;
mod large;
mod repair;
mod same_names;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Site, Stored, client::wait_while_moving, request};

const ID: &str = "ORDERS";

/// Message `number` of a source: every kind of header, subject and size.
fn message(number: u64) -> Outgoing {
    let subject = format!("orders.{}", number % 7);
    let message = Outgoing::new(subject, format!("{number}-{}", "x".repeat(number as usize % 200)));
    match number % 5 {
        0 => message,
        1 => message.with_lines(&["Colour: blue", "colour:  2", "Colour: red"]),
        2 => message.with_block(&b"NATS/1.0\r\nno colon\r\n A : \xff\xfe \r\nB:\r\n\r\n"[..]),
        3 => message.with_lines(&[&format!("Nats-Msg-Id: {number}"), "Nats-Expected-Stream: ORDERS"]),
        _ => message.with_lines(&["Choria-SR-Source: X 1 Y Z 5"]),
    }
}

/// So many messages, copied.
async fn copied(site: &Site, fields: Value, messages: u64) -> Result<()> {
    let mut source = site.source_stream(ID, json!({})).await?;
    source.publish_all((1..=messages).map(message)).await?;
    site.add(ID, fields).await?;
    site.settled(ID, messages).await?;
    Ok(())
}

/// Begins a comparison and waits for its end.
async fn verified(site: &Site, id: &str, fields: Value) -> Result<Value> {
    let started =
        request(&site.client, "replicator.verify", crate::harness::site::merged(json!({"replication": id}), fields))
            .await?;
    ended(site, id, &started["job"]).await
}

async fn shown(site: &Site, id: &str) -> Result<Value> {
    let mut shown = request(&site.client, "replicator.verify.status", json!({"replication": id})).await?;
    Ok(shown["verification"].take())
}

fn is_over(shown: &Value) -> bool {
    shown["state"].as_str().is_some_and(|state| !["waiting", "running"].contains(&state))
}

/// Waits until a job has ended.
async fn ended(site: &Site, id: &str, job: &Value) -> Result<Value> {
    let mut last = Value::Null;
    let probe = async || {
        last = shown(site, id).await.unwrap_or_default();
        if last["job"] == *job && is_over(&last) {
            return Ok(last.clone());
        }
        Err((last["starts"].clone(), last["source_messages"].clone(), last["target_messages"].clone()))
    };
    let found = wait_while_moving("the comparison to end", LIMIT, probe).await;
    found.with_context(|| format!("it is {last:#}\n{}", site.service.log()))
}

/// What a comparison found of one kind: the ranges.
fn ranges(found: &Value, kind: &str) -> Vec<(u64, u64)> {
    let all = found["differences"].as_array().into_iter().flatten().filter(|of| of["kind"] == kind);
    let ranges = all.flat_map(|of| of["ranges"].as_array().cloned().unwrap_or_default());
    ranges.filter_map(|range| Some((range["from"].as_u64()?, range["to"].as_u64()?))).collect()
}

/// Kinds of differences.
fn kinds(found: &Value) -> Vec<&str> {
    found["differences"].as_array().into_iter().flatten().filter_map(|of| of["kind"].as_str()).collect()
}

fn details(found: &Value) -> Vec<String> {
    let all = found["differences"].as_array().into_iter().flatten();
    let examples = all.flat_map(|of| of["examples"].as_array().cloned().unwrap_or_default());
    examples.filter_map(|example| Some(example["detail"].as_str()?.to_owned())).collect()
}

/// An error unless a comparison is done and found nothing.
fn clean(found: &Value, site: &Site) -> Result<()> {
    let good = found["state"] == "done" && found["findings"] == 0 && found["differences"] == json!([]);
    ensure!(good, "{found:#}\n{}", site.service.log());
    Ok(())
}

/// Stores at the target, in a new stream of the same name, what `change` makes of its messages. The replication is paused.
async fn tamper(site: &Site, stream: &str, change: impl FnOnce(&mut Vec<Stored>)) -> Result<()> {
    request(&site.client, "replicator.pause", json!({"replication": stream})).await?;
    site.row_when(stream, "is paused", |row| row["state"] == "paused").await?;
    let mut target = site.target().await?;
    let mut messages = target.read_stream(stream).await?;
    let config = target.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take();
    change(&mut messages);
    target.api(&format!("STREAM.DELETE.{stream}"), Value::Null).await?;
    target.create_stream(stream, config).await?;
    store(&mut target, &messages).await
}

/// Publishes messages as they were stored, without what a server would act on.
async fn store(target: &mut Raw, messages: &[Stored]) -> Result<()> {
    let outgoing = messages.iter().map(|message| {
        let mut block = Vec::new();
        for line in message.header.split_inclusive(|byte| *byte == b'\n') {
            if !line.starts_with(b"Nats-Expected-") && !line.starts_with(b"Nats-Msg-Id:") {
                block.extend_from_slice(line);
            }
        }
        Outgoing::new(message.subject.clone(), message.payload.clone()).with_block(block)
    });
    target.publish_all(outgoing).await?;
    Ok(())
}
