//! Copies what a stream holds to a new stream on another server (2.14 or later), by fast-ingest:
//!
//! `cargo run -p nats-lane --example fast_copy -- nats://127.0.0.1:4222 ORDERS nats://127.0.0.1:4223`

use bytes::BytesMut;
use nats_lane::{
    Connection, Endpoint, Error, Lane, Turn, entropy,
    fast_ingest::{Ack, Operation, parse_ack, reply_subject},
    headers::{status, status_text},
    jetstream::{Api, is_delivery},
};
use serde_json::json;

/// Messages of one pull, and between two acks. At most twice as many are in flight.
const FLOW: u64 = 500;

/// Copies the stream; returns how many messages the new one has stored.
pub async fn copy(from: &str, stream: &str, to: &str) -> Result<u64, Error> {
    let (mut source, mut target) = (connect(from).await?, connect(to).await?);
    let info = Api::new(&mut source).stream_info(stream).await?;
    let info = info.ok_or_else(|| Error::hold(format!("there is no stream `{stream}` at `{}`", source.address())))?;
    let config = json!({"name": stream, "subjects": info.subjects(), "allow_batched": true});
    Api::new(&mut target).create_stream(stream, &config).await?;
    let consumer = entropy::name();
    let config = json!({"ack_policy": "none", "mem_storage": true, "inactive_threshold": 60_000_000_000_u64});
    let total = Api::new(&mut source).create_consumer(stream, &consumer, &config).await?.num_pending;

    let next = format!("{}.CONSUMER.MSG.NEXT.{stream}.{consumer}", source.api_prefix());
    let ((_, deliveries), (_, acks)) = (source.open_inbox(), target.open_inbox());
    let (mut requested, mut sent, mut stored, mut reply) = (0, 0, 0, BytesMut::new());
    while stored < total {
        if requested < total && sent == requested && sent - stored <= FLOW {
            let batch = FLOW.min(total - requested);
            let pull = json!({"batch": batch, "expires": 30_000_000_000_u64});
            source.publish(&next, &format!("{deliveries}.{requested}"), pull.to_string().as_bytes());
            requested += batch;
        }
        tokio::select! {
            turn = source.turn() => if let Turn::Received(batch) = turn? {
                for message in batch.iter() {
                    if !is_delivery(message.reply) {
                        let code = status(message.header).unwrap_or_default();
                        return Err(Error::of_status(stream, code, &status_text(message.header)));
                    }
                    sent += 1;
                    reply.clear();
                    let operation = if sent == 1 { Operation::Start } else { Operation::Append };
                    reply_subject(&mut reply, &acks, 1, FLOW as u32, sent, operation);
                    publish(target.output(), message.subject, &reply, message.header, message.payload);
                    if sent == total {
                        // The commit is not stored: it asks for the ack of everything before it.
                        reply.clear();
                        reply_subject(&mut reply, &acks, 1, FLOW as u32, sent + 1, Operation::Commit);
                        publish(target.output(), message.subject, &reply, b"", b"");
                    }
                }
            },
            turn = target.turn() => if let Turn::Received(batch) = turn? {
                for message in batch.iter() {
                    stored = match parse_ack(message.payload).map_err(Error::retry)? {
                        Ack::Progress { sequence, .. } => sequence,
                        Ack::End { count, .. } => return Ok(count),
                        Ack::Failed { error, .. } => {
                            return Err(error.map_or_else(|| Error::retry("a message of the batch was lost"), Error::from));
                        }
                    };
                }
            },
        }
    }
    Ok(stored)
}

async fn connect(url: &str) -> Result<Lane, Error> {
    Lane::connect(&Connection::to(Endpoint::parse(url).map_err(Error::hold)?), "fast_copy").await
}

fn publish(out: &mut BytesMut, subject: &[u8], reply: &[u8], header: &[u8], payload: &[u8]) {
    let (verb, size) = if header.is_empty() { ("PUB", String::new()) } else { ("HPUB", format!("{} ", header.len())) };
    let end = format!(" {size}{}\r\n", header.len() + payload.len());
    for part in [verb.as_bytes(), b" ", subject, b" ", reply, end.as_bytes(), header, payload, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [from, stream, to] = arguments.as_slice() else {
        return Err(Error::hold("usage: fast_copy <URL of the source> <stream> <URL of the target>"));
    };
    println!("{} messages", copy(from, stream, to).await?);
    Ok(())
}
