//! Reading from a stream with a durable pull consumer, which all instances share. A message is acknowledged when the target
//! has stored it, so what an instance has not stored is redelivered to any of them.
//!
//! Only as many messages are requested as there is room for: nothing is dropped. A message that is redelivered while it waits
//! for the target is ignored; the ack of its first delivery settles it as well.

use std::collections::HashSet;

use nats_lane::{
    Error, ErrorKind, Lane, Message, headers,
    jetstream::{Api, is_delivery, parse_delivery},
    parser::number,
};
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use super::queue::StreamMark;
use crate::config::patterns::overlap;

/// Time after which a message that is not acknowledged is redelivered.
const ACK_WAIT: Duration = Duration::from_secs(20);
/// Most messages that all instances hold together.
const MAX_ACK_PENDING: u64 = 100_000;
/// Expiry of a pull.
const EXPIRES: Duration = Duration::from_secs(30);
/// Interval of the server's heartbeats while it has no message to deliver.
const HEARTBEAT: Duration = Duration::from_millis(2500);
/// Silence after which the connection is made again.
const SILENCE: Duration = Duration::from_secs(6);
/// Bytes of one pull. One message of the size that the server takes always has room.
const PULL_BYTES: usize = 8 << 20;
/// What a message needs in a pull beside its payload and its headers.
const SUBJECTS: usize = 64 << 10;

/// The consumer of an adapter.
#[derive(Debug, Clone)]
pub(super) struct DurableConsumer {
    pub(super) stream: String,
    pub(super) name: String,
    pub(super) topic: String,
}

impl DurableConsumer {
    /// Creates the consumer if it is missing, or reads another topic.
    pub(super) async fn open(&self, lane: &mut Lane) -> Result<(), Error> {
        let Self { stream, name, topic } = self;
        let mut api = Api::new(lane);
        let info = api.stream_info(stream).await?.ok_or_else(|| {
            Error::hold(format!("stream `{stream}` does not exist: create it with the subject `{topic}`"))
        })?;
        let copies = info.config.get("mirror").is_some() || info.has("sources");
        if !copies && !info.subjects().into_iter().any(|subject| overlap(subject, topic)) {
            return Err(Error::hold(format!("stream `{stream}` does not capture `{topic}`: add that to its subjects")));
        }
        if let Some(info) = api.consumer_info(stream, name).await? {
            if info.config["ack_policy"] != "explicit" || info.config.get("deliver_subject").is_some() {
                return Err(Error::hold(format!(
                    "consumer `{name}` of stream `{stream}` is not a pull consumer with explicit acks: delete it"
                )));
            }
            if info.config["filter_subject"].as_str() == Some(topic) {
                return Ok(());
            }
        }
        api.create_consumer(stream, name, &self.config()).await.map(drop).map_err(|error| {
            // Such as another consumer of a work queue.
            let refused = error.api.as_ref().is_some_and(|api| api.code == 400);
            let kind = if refused { ErrorKind::Hold } else { error.kind };
            Error { kind, ..error.context(format!("durable consumer `{name}` of stream `{stream}`")) }
        })
    }

    fn config(&self) -> Value {
        json!({
            "name": self.name,
            "durable_name": self.name,
            "description": "stream-replicator adapter",
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": ACK_WAIT.as_nanos() as u64,
            "max_ack_pending": MAX_ACK_PENDING,
            "replay_policy": "instant",
            "filter_subject": self.topic,
        })
    }
}

/// The pulls of one instance, and what it has not acknowledged.
#[derive(Debug)]
pub(super) struct DurableIngest {
    consumer: DurableConsumer,
    /// Most messages that are requested or wait.
    most: usize,
    /// The subscription of the pulls, and its subject.
    inbox: Option<(u64, String)>,
    /// Messages that are requested and did not arrive yet.
    requested: u64,
    /// The last sign of life, or when the first message was requested.
    heard: Instant,
    /// Sequences of the messages that wait for the target.
    held: HashSet<u64>,
    /// Acks that wait for a connection.
    acks: Vec<String>,
}

impl DurableIngest {
    pub(super) fn new(consumer: DurableConsumer, most: usize) -> Self {
        Self {
            consumer,
            most,
            inbox: None,
            requested: 0,
            heard: Instant::now(),
            held: HashSet::new(),
            acks: Vec::new(),
        }
    }

    /// A connection is up.
    pub(super) fn up(&mut self, lane: &mut Lane) {
        (self.inbox, self.requested) = (None, 0);
        self.acks.drain(..).for_each(|ack| lane.publish(&ack, "", b""));
    }

    /// Requests what there is room for beside the messages that wait.
    pub(super) fn pull(&mut self, lane: &mut Lane, waiting: usize, now: Instant) {
        let room = self.most.saturating_sub(waiting) as u64;
        // Many at a time: each pull is a message of its own.
        let batch = room.saturating_sub(self.requested);
        if batch == 0 || self.requested > 0 && batch < self.most as u64 / 4 {
            return;
        }
        if self.requested == 0 {
            self.heard = now;
        }
        let inbox = &self.inbox.get_or_insert_with(|| lane.open_inbox()).1;
        let DurableConsumer { stream, name, .. } = &self.consumer;
        let subject = format!("{}.CONSUMER.MSG.NEXT.{stream}.{name}", lane.api_prefix());
        let request = json!({
            "batch": batch,
            "max_bytes": PULL_BYTES.max(lane.info().max_payload + SUBJECTS),
            "expires": EXPIRES.as_nanos() as u64,
            "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
        });
        lane.publish(&subject, &format!("{inbox}.p"), request.to_string().as_bytes());
        self.requested += batch;
    }

    /// Requests no more; what the server has sent still arrives.
    pub(super) fn stop(&mut self, lane: &mut Lane) {
        if let Some((sid, _)) = self.inbox.take() {
            lane.close_inbox(sid);
            self.requested = 0;
        }
    }

    /// Handles what arrived; returns a delivery that is new.
    ///
    /// # Errors
    ///
    /// The consumer is of no more use.
    pub(super) fn arrived(&mut self, message: &Message<'_>, now: Instant) -> Result<Option<StreamMark>, Error> {
        let current = self.inbox.as_ref().is_some_and(|(sid, _)| *sid == message.sid);
        if current {
            self.heard = now;
        }
        if !is_delivery(message.reply) {
            return if current { self.status(message).map(|()| None) } else { Ok(None) };
        }
        if current {
            self.requested = self.requested.saturating_sub(1);
        }
        let Some(delivery) = parse_delivery(message.reply) else { return Ok(None) };
        let is_new = self.held.insert(delivery.stream_seq);
        let ack = String::from_utf8_lossy(message.reply).into_owned();
        Ok(is_new.then_some(StreamMark { sequence: delivery.stream_seq, ack }))
    }

    fn status(&mut self, message: &Message<'_>) -> Result<(), Error> {
        let code = headers::status(message.header).unwrap_or_default();
        let left = headers::last(message.header, b"Nats-Pending-Messages").and_then(number);
        match (code, left) {
            (100, _) => Ok(()),
            // The pull ended: it expired, its bytes are used up, or the consumer has another leader.
            (404 | 408 | 409, Some(left)) => {
                self.requested = self.requested.saturating_sub(left);
                Ok(())
            }
            _ => Err(Error::of_status(&self.consumer.stream, code, &headers::status_text(message.header))),
        }
    }

    /// The target has the message, or can never have it.
    pub(super) fn settled(&mut self, mark: StreamMark, lane: Option<&mut Lane>) {
        self.held.remove(&mark.sequence);
        match lane {
            Some(lane) => lane.publish(&mark.ack, "", b""),
            None => self.acks.push(mark.ack),
        }
    }

    /// When the consumer is silent for too long, if it owes a sign of life.
    pub(super) fn silent_at(&self, lane: &Lane) -> Option<Instant> {
        // While a large message arrives, nothing else can.
        (self.requested > 0).then(|| self.heard.max(lane.partial_at()) + SILENCE)
    }
}

/// What is said of a consumer that gives no sign of life.
pub(super) fn silence(stream: &str) -> Error {
    Error::retry(format!("the consumer of stream `{stream}` is silent for {SILENCE:?}"))
}
