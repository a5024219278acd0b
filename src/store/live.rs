//! The messages of a bucket as they are stored, in order: a consumer with a name that the next process with the same
//! instance id knows, and deletes. Of an instance with another id the server deletes it soon after the connection ends.
//!
//! Small buckets are pushed. Buckets of up to a million records are pulled: the client drops pushed messages that arrive
//! faster than they are taken, and of a million records it would drop some again and again. With pulls, only requested
//! messages are in flight or in memory.

use std::{collections::VecDeque, sync::atomic::Ordering, time::Duration};

use async_nats::{
    Message, StatusCode, Subscriber,
    connection::State,
    jetstream::consumer::{self, AckPolicy, DeliverPolicy, pull, push},
};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all};
use nats_lane::jetstream::{Delivery, parse_delivery};
use serde_json::json;
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
/// Messages that one pull requests.
const BATCH: usize = 4_096;
/// Bytes that one pull requests beyond the largest payload: subjects and headers of a message.
const BESIDE_PAYLOAD: usize = 128 * 1024;
/// Pulls that are open while messages wait.
const OPEN: usize = 2;
/// The server ends a pull after this time.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// A status 409 with these words ends a pull, with any others the consumer.
const PULL_ENDS: [&str; 2] = ["MaxBytes", "Batch Completed"];

/// How messages are delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LiveDelivery {
    /// As the server sends them.
    Push,
    /// As they are requested.
    Pull,
}

/// The pulls that the server has not answered in full, oldest first: number, and messages that are still due.
#[derive(Debug, Default)]
struct OpenPulls {
    open: VecDeque<(u64, usize)>,
    last: u64,
}

/// A consumer and its subscription.
pub(super) struct Live {
    bucket: Bucket,
    flow: LiveDelivery,
    inbox: String,
    pulls: OpenPulls,
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
    /// Whether this consumer has given any sign of life.
    pub(super) answered: bool,
}

impl Live {
    /// Creates the consumer for keys that match `filter`. `purpose` is one word; a process has one consumer of a bucket for each.
    pub(super) async fn open(
        bucket: &Bucket,
        purpose: &str,
        filter: &str,
        from: DeliverPolicy,
        flow: LiveDelivery,
    ) -> Result<Self, Error> {
        let prefix = format!("sr_{}_{purpose}", bucket.instance());
        let connects = connects(bucket);
        let deleted = (0..SLOTS).map(|slot| delete(bucket, &prefix, slot));
        let existed = join_all(deleted).await;
        // Another one than the process before used last.
        let slot = existed.iter().rposition(|existed| *existed).map_or(0, |last| (last + 1) % SLOTS);
        let filter = bucket.subject(filter);
        let inbox = bucket.client().new_inbox();
        let (messages, pending) = create(bucket, flow, format!("{prefix}_{slot}"), &inbox, &filter, from).await?;
        let (bucket, heard, pulls) = (bucket.clone(), Instant::now(), OpenPulls::default());
        Ok(Self {
            bucket,
            flow,
            inbox,
            pulls,
            prefix,
            slot,
            filter,
            messages,
            pending,
            consumer_seq: 0,
            connects,
            heard,
            answered: false,
        })
    }

    /// Replaces a consumer that is lost; the new one delivers what was stored after a revision.
    pub(super) async fn resume(&mut self, after: u64) -> Result<(), Error> {
        let connects = connects(&self.bucket);
        delete(&self.bucket, &self.prefix, self.slot).await;
        self.slot = (self.slot + 1) % SLOTS;
        let from = DeliverPolicy::ByStartSequence { start_sequence: after + 1 };
        let name = format!("{}_{}", self.prefix, self.slot);
        let inbox = self.bucket.client().new_inbox();
        (self.messages, self.pending) = create(&self.bucket, self.flow, name, &inbox, &self.filter, from).await?;
        (self.inbox, self.pulls) = (inbox, OpenPulls::default());
        (self.consumer_seq, self.connects, self.heard, self.answered) = (0, connects, Instant::now(), false);
        Ok(())
    }

    /// The next message; `None` when the consumer is lost. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<(Delivery, Message)> {
        loop {
            if self.flow == LiveDelivery::Pull {
                self.pull().await?;
            }
            let message = tokio::select! {
                biased;
                message = self.messages.next() => message?,
                () = sleep(CHECK) => match self.is_lost() {
                    true => return None,
                    false => continue,
                },
            };
            (self.heard, self.answered) = (Instant::now(), true);
            match message.status {
                None => {
                    let delivery = parse_delivery(message.reply.as_deref()?.as_bytes())?;
                    self.consumer_seq += 1;
                    self.pending = delivery.pending;
                    self.pulls.brought_one();
                    return (delivery.consumer_seq == self.consumer_seq).then_some((delivery, message));
                }
                Some(StatusCode::IDLE_HEARTBEAT) => self.heartbeat(message).await?,
                Some(code) if self.flow == LiveDelivery::Pull && ends_pull(code, message.description.as_deref()) => {
                    self.pulls.ended(&message.subject);
                }
                Some(_) => return None,
            }
        }
    }

    /// Whether the server has no message left to deliver: messages that it counted may have been removed since.
    pub(super) async fn is_through(&self) -> bool {
        let name = format!("{}_{}", self.prefix, self.slot);
        let asked = timeout(ANSWER, self.bucket.stream().consumer_info(&name)).await;
        let is_through =
            |info: consumer::Info| info.num_pending == 0 && info.delivered.consumer_sequence == self.consumer_seq;
        asked.is_ok_and(|info| info.is_ok_and(is_through))
    }

    /// Requests more messages: two pulls while messages wait, so that the second arrives while the first is taken, else
    /// one.
    async fn pull(&mut self) -> Option<()> {
        let wanted = if self.pending > self.pulls.to_come() { OPEN } else { 1 };
        while self.pulls.open.len() < wanted {
            let client = self.bucket.client();
            if self.pulls.open.is_empty() {
                // The server owed no sign of life until now.
                self.heard = Instant::now();
            }
            let request = json!({
                "batch": BATCH,
                "max_bytes": client.server_info().max_payload + BESIDE_PAYLOAD,
                "expires": PULL_EXPIRES.as_nanos() as u64,
                "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
            });
            let name = format!("{}_{}", self.prefix, self.slot);
            let subject = self.bucket.pull_subject(&name);
            let reply = format!("{}.{}", self.inbox, self.pulls.last + 1);
            client.publish_with_reply(subject, reply, request.to_string().into()).await.ok()?;
            self.pulls.last += 1;
            self.pulls.open.push_back((self.pulls.last, BATCH));
        }
        Some(())
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

impl OpenPulls {
    /// Messages that the open pulls may still bring.
    fn to_come(&self) -> u64 {
        self.open.iter().map(|(_, left)| *left as u64).sum()
    }

    /// Counts a message: the server serves the oldest pull first.
    fn brought_one(&mut self) {
        if let Some((_, left)) = self.open.front_mut() {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.open.pop_front();
            }
        }
    }

    /// Ends the pull with this subject; it may have ended already.
    fn ended(&mut self, subject: &str) {
        let number = subject.rsplit('.').next().and_then(|token| token.parse::<u64>().ok());
        self.open.retain(|(open, _)| Some(*open) != number);
    }
}

/// Whether a status ends a pull only, and not the consumer.
fn ends_pull(code: StatusCode, description: Option<&str>) -> bool {
    match code.as_u16() {
        404 | 408 => true,
        409 => PULL_ENDS.iter().any(|words| description.unwrap_or_default().contains(words)),
        _ => false,
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
    flow: LiveDelivery,
    name: String,
    inbox: &str,
    filter: &str,
    deliver_policy: DeliverPolicy,
) -> Result<(Subscriber, u64), Error> {
    let failed = |error: &dyn std::error::Error| bucket.error(format!("cannot be watched: {}", chain(error)));
    let subject = if flow == LiveDelivery::Pull { format!("{inbox}.*") } else { inbox.to_owned() };
    let messages = bucket.client().subscribe(subject).await.map_err(|error| failed(&error))?;
    let (name, description) = (Some(name), Some("stream-replicator".to_owned()));
    let (filter_subject, ack_policy, inactive_threshold) = (filter.to_owned(), AckPolicy::None, INACTIVE);
    let (num_replicas, memory_storage) = (1, true);
    let pending = match flow {
        LiveDelivery::Push => {
            let config = push::Config {
                deliver_subject: inbox.to_owned(),
                name,
                description,
                filter_subject,
                deliver_policy,
                ack_policy,
                max_deliver: 1,
                flow_control: true,
                idle_heartbeat: HEARTBEAT,
                inactive_threshold,
                num_replicas,
                memory_storage,
                ..push::Config::default()
            };
            let created = bucket.stream().create_consumer(config).await;
            created.map_err(|error| failed(&error))?.cached_info().num_pending
        }
        LiveDelivery::Pull => {
            let config = pull::Config {
                name,
                description,
                filter_subject,
                deliver_policy,
                ack_policy,
                inactive_threshold,
                num_replicas,
                memory_storage,
                ..pull::Config::default()
            };
            let created = bucket.stream().create_consumer(config).await;
            created.map_err(|error| failed(&error))?.cached_info().num_pending
        }
    };
    Ok((messages, pending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_open_pulls_bring_is_counted() {
        let mut pulls = OpenPulls { open: VecDeque::from([(1, 2), (2, 3)]), last: 2 };
        assert_eq!(pulls.to_come(), 5);
        pulls.brought_one();
        pulls.brought_one();
        assert_eq!((pulls.to_come(), pulls.open.len()), (3, 1));
        // It ended already, and the status arrives late.
        pulls.ended("inbox.1");
        assert_eq!(pulls.to_come(), 3);
        pulls.ended("inbox.2");
        assert_eq!((pulls.to_come(), pulls.open.len()), (0, 0));
        pulls.brought_one();
    }

    #[test]
    fn a_status_ends_a_pull_or_the_consumer() {
        let check = |code: u16, words: &str, expect: bool| {
            assert_eq!(ends_pull(StatusCode::from_u16(code).unwrap(), Some(words)), expect, "{code} {words}");
        };
        check(404, "No Messages", true);
        check(408, "Request Timeout", true);
        check(409, "Message Size Exceeds MaxBytes", true);
        check(409, "Batch Completed", true);
        check(409, "Consumer Deleted", false);
        check(409, "Leadership Change", false);
        check(503, "", false);
    }
}
