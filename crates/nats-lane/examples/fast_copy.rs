//! Copies the messages of a stream to a new stream on another server (2.14 or later), by fast-ingest:
//! `cargo run -p nats-lane --example fast_copy -- nats://127.0.0.1:4222 ORDERS nats://127.0.0.1:4223`

use nats_lane::{
    Error, Lane, Turn, entropy,
    fast_ingest::{BatchWriter, parse_ack},
    jetstream::{Api, check_delivered},
};
use serde_json::json;

/// Messages of one pull, and between two acks. At most twice as many are in flight.
const FLOW: u64 = 500;

/// Copies the stream; returns the number of messages in the new one.
pub async fn copy(from: &str, stream: &str, to: &str) -> Result<u64, Error> {
    let (mut source, mut target) = (Lane::open(from, "fast_copy").await?, Lane::open(to, "fast_copy").await?);
    let info = Api::new(&mut source).stream_info(stream).await?;
    let info = info.ok_or_else(|| Error::hold(format!("there is no stream `{stream}` at `{}`", source.address())))?;
    let config = json!({"name": stream, "subjects": info.subjects(), "allow_batched": true});
    Api::new(&mut target).create_stream(stream, &config).await?;
    let consumer = entropy::name();
    let config = json!({"ack_policy": "none", "mem_storage": true, "inactive_threshold": 60_000_000_000_u64});
    let total = Api::new(&mut source).create_consumer(stream, &consumer, &config).await?.num_pending;
    let next = format!("{}.CONSUMER.MSG.NEXT.{stream}.{consumer}", source.api_prefix());
    let (inbox, mut batch) = (source.open_inbox().1, BatchWriter::new(target.open_inbox().1, FLOW as u32));
    let (mut requested, mut stored) = (0, 0);
    while stored < total {
        if requested < total && batch.sent() == requested && requested - stored <= FLOW {
            let pull = json!({"batch": FLOW.min(total - requested), "expires": 30_000_000_000_u64});
            source.publish(&next, &format!("{inbox}.{requested}"), pull.to_string().as_bytes());
            requested += FLOW.min(total - requested);
        }
        tokio::select! {
            turn = source.turn() => if let Turn::Received(messages) = turn? {
                for m in messages.iter() {
                    check_delivered(stream, &m)?;
                    batch.append(target.output(), m.subject, m.header, m.payload);
                    if batch.sent() == total {
                        batch.commit(target.output(), m.subject);
                    }
                }
            },
            turn = target.turn() => if let Turn::Received(acks) = turn? {
                for ack in acks.iter() {
                    stored = parse_ack(ack.payload).map_err(Error::retry)?.stored()?;
                }
            },
        }
    }
    Ok(stored)
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [from, stream, to] = arguments.as_slice() else { return Err(Error::hold("usage: fast_copy FROM STREAM TO")) };
    println!("{} messages", copy(from, stream, to).await?);
    Ok(())
}
