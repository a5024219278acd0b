//! The messages of a bucket as they are stored, in order: a push consumer with a name that the next process with the same
//! instance id knows and deletes. Otherwise the server deletes the consumer soon after the connection ends.

use std::{sync::atomic::Ordering, time::Duration};

use async_nats::{
    Message, StatusCode, Subscriber,
    connection::State,
    jetstream::consumer::{AckPolicy, DeliverPolicy, push},
};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all};
use nats_lane::jetstream::{Delivery, parse_delivery};
use tokio::time::{Instant, sleep, timeout};

use super::{
    bucket::{Bucket, chain},
    error::Error,
};
/// The server says that it is there this often while it has nothing to deliver.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Silence after which the consumer counts as lost.
const SILENCE: Duration = Duration::from_secs(11);
/// How often the connection is checked.
const CHECK: Duration = Duration::from_millis(250);
/// The server deletes a consumer that has had no subscriber for this long.
const INACTIVE: Duration = Duration::from_secs(5);
/// Time limit for the answer to a deletion.
const ANSWER: Duration = Duration::from_secs(2);
/// Names that are used in turn, so that a deletion that arrives late does not meet the next consumer.
const SLOTS: usize = 4;

/// A consumer and its subscription.
pub(super) struct Live {
    bucket: Bucket,
    /// What names begin with.
    prefix: String,
    slot: usize,
    filter: String,
    messages: Subscriber,
    /// Messages that it had to deliver when it was created.
    pub(super) pending: u64,
    consumer_seq: u64,
    connects: u64,
    heard: Instant,
}

impl Live {
    /// Creates the consumer for keys that match `filter`. `purpose` is one word; a process has one consumer of a bucket for each.
    pub(super) async fn open(bucket: &Bucket, purpose: &str, filter: &str, from: DeliverPolicy) -> Result<Self, Error> {
        let prefix = format!("sr_{}_{purpose}", bucket.instance());
        let connects = connects(bucket);
        let deleted = (0..SLOTS).map(|slot| delete(bucket, &prefix, slot));
        let existed = join_all(deleted).await;
        // Another one than the process before used last.
        let slot = existed.iter().rposition(|existed| *existed).map_or(0, |last| (last + 1) % SLOTS);
        let filter = bucket.subject(filter);
        let (messages, pending) = create(bucket, format!("{prefix}_{slot}"), &filter, from).await?;
        let (bucket, heard) = (bucket.clone(), Instant::now());
        Ok(Self { bucket, prefix, slot, filter, messages, pending, consumer_seq: 0, connects, heard })
    }

    /// Replaces a consumer that is lost; the new one delivers what was stored after a revision.
    pub(super) async fn resume(&mut self, after: u64) -> Result<(), Error> {
        let connects = connects(&self.bucket);
        delete(&self.bucket, &self.prefix, self.slot).await;
        self.slot = (self.slot + 1) % SLOTS;
        let from = DeliverPolicy::ByStartSequence { start_sequence: after + 1 };
        let name = format!("{}_{}", self.prefix, self.slot);
        (self.messages, self.pending) = create(&self.bucket, name, &self.filter, from).await?;
        (self.consumer_seq, self.connects, self.heard) = (0, connects, Instant::now());
        Ok(())
    }

    /// The next message; `None` when the consumer is lost. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<(Delivery, Message)> {
        loop {
            let message = tokio::select! {
                biased;
                message = self.messages.next() => message?,
                () = sleep(CHECK) => match self.is_lost() {
                    true => return None,
                    false => continue,
                },
            };
            self.heard = Instant::now();
            match message.status {
                None => {
                    let delivery = parse_delivery(message.reply.as_deref()?.as_bytes())?;
                    self.consumer_seq += 1;
                    return (delivery.consumer_seq == self.consumer_seq).then_some((delivery, message));
                }
                Some(StatusCode::IDLE_HEARTBEAT) => self.heartbeat(message).await?,
                Some(_) => return None,
            }
        }
    }

    /// Answers a flow control request. A heartbeat names what was delivered last; `None` if that did not arrive.
    async fn heartbeat(&self, message: Message) -> Option<()> {
        let header = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str());
        let asked = message.reply.as_deref().or_else(|| header("Nats-Consumer-Stalled"));
        if let Some(asked) = asked {
            let _ = self.bucket.client().publish(asked.to_owned(), Bytes::new()).await;
            return Some(());
        }
        let last = header("Nats-Last-Consumer").and_then(|last| last.parse::<u64>().ok());
        last.is_none_or(|last| last == self.consumer_seq).then_some(())
    }

    /// Whether the connection was made again, or nothing came for too long on one that is open.
    fn is_lost(&mut self) -> bool {
        if self.bucket.client().connection_state() != State::Connected {
            self.heard = Instant::now();
            return false;
        }
        self.connects != connects(&self.bucket) || self.heard.elapsed() > SILENCE
    }
}

fn connects(bucket: &Bucket) -> u64 {
    bucket.client().statistics().connects.load(Ordering::Relaxed)
}

/// Deletes a consumer; returns whether it existed. Errors are reported by the creation of the next one.
async fn delete(bucket: &Bucket, prefix: &str, slot: usize) -> bool {
    let name = format!("{prefix}_{slot}");
    timeout(ANSWER, bucket.stream().delete_consumer(&name)).await.is_ok_and(|deleted| deleted.is_ok())
}

async fn create(
    bucket: &Bucket,
    name: String,
    filter: &str,
    deliver_policy: DeliverPolicy,
) -> Result<(Subscriber, u64), Error> {
    let failed = |error: &dyn std::error::Error| bucket.error(format!("cannot be watched: {}", chain(error)));
    let deliver_subject = bucket.client().new_inbox();
    let messages = bucket.client().subscribe(deliver_subject.clone()).await.map_err(|error| failed(&error))?;
    let config = push::Config {
        deliver_subject,
        name: Some(name),
        description: Some("stream-replicator".to_owned()),
        filter_subject: filter.to_owned(),
        deliver_policy,
        ack_policy: AckPolicy::None,
        max_deliver: 1,
        flow_control: true,
        idle_heartbeat: HEARTBEAT,
        inactive_threshold: INACTIVE,
        num_replicas: 1,
        memory_storage: true,
        ..push::Config::default()
    };
    let consumer = bucket.stream().create_consumer(config).await.map_err(|error| failed(&error))?;
    Ok((messages, consumer.cached_info().num_pending))
}
