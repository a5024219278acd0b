//! One adapter at work: one task that owns both connections and the queue between them.
//!
//! It never stops to read: a server cuts off a client that does. What the queue has no room for is dropped and counted. It
//! publishes without waiting for one ack before the next message; what is not acknowledged is sent again with the same id.

use std::{io::Write, sync::Arc};

use nats_lane::{Batch, Error, ErrorKind, Lane, Message, entropy, headers, jetstream::PublishAck, parser::number};
use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    drops::{AdapterDrops, DropReason},
    durable::{DurableConsumer, DurableIngest, silence},
    link::{AdapterLink, LinkEvent, LinkNeed, LinkPlan},
    queue::{OutputQueue, QueuedMessage, StreamMark},
    row::{AdapterCell, AdapterCounters, AdapterState},
};
use crate::{
    allow::AllowList,
    choria::adapter::{Discard, decode, decode_verified, expand_topic},
    config::Adapter,
    events::{Event, Events},
};

/// Messages in flight to the target, and their bytes.
const IN_FLIGHT: usize = 1_000;
const BYTES_IN_FLIGHT: usize = 16 << 20;
/// Messages of a stream that are requested or wait: twice what is in flight, so that the next ones are here when those settle.
const MOST_REQUESTED: usize = 2 * IN_FLIGHT;
/// Bytes of commands that may wait for the system.
const UNWRITTEN: usize = 1 << 20;
/// Deadline for an ack: then the connection is made again.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// Between a refusal and the next message.
const AFTER_REFUSAL: Duration = Duration::from_millis(250);
/// Deadline for what is in the queue when the adapter stops.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the server may take to end the subscriptions.
const LEAVE: Duration = Duration::from_secs(1);
/// How often the end of something is checked.
const TICK: Duration = Duration::from_millis(10);
/// Longest subject: with two sizes and a reply it fits into the control line of a server, 4096 bytes by default.
const LONGEST_SUBJECT: usize = 3_000;

/// Whether an adapter reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IngestGate {
    /// It does.
    Open,
    /// It is paused.
    Paused,
    /// Another instance does.
    Standby,
}

/// What a task needs.
#[derive(Debug, Clone)]
pub(super) struct AdapterJob {
    pub(super) adapter: Arc<Adapter>,
    pub(super) rules: AllowList,
    pub(super) events: Events,
    pub(super) cell: Arc<AdapterCell>,
    pub(super) gate: watch::Receiver<IngestGate>,
    pub(super) stop: CancellationToken,
    /// What servers show of the connections, without the side.
    pub(super) connection_name: String,
    /// Subject of its events.
    pub(super) key: String,
}

/// The end of the subscriptions: they have ended when this PING is answered.
#[derive(Debug, Clone, Copy)]
struct EndingReads {
    ping: u64,
    until: Instant,
}

/// A running adapter.
pub(super) struct AdapterTask {
    job: AdapterJob,
    ingest: AdapterLink,
    target: AdapterLink,
    /// The reading from a stream; without it a subject is subscribed to.
    durable: Option<DurableIngest>,
    queue: OutputQueue,
    drops: AdapterDrops,
    counters: AdapterCounters,
    /// What reply subjects begin with on the connection of now.
    inbox: String,
    largest: usize,
    leaving: Option<EndingReads>,
    /// No message is sent before.
    hold_until: Option<Instant>,
    /// The target refused messages, and has not stored one since.
    refusing: bool,
    drain_until: Option<Instant>,
    started: bool,
}

impl AdapterTask {
    pub(super) fn new(job: AdapterJob) -> Self {
        let adapter = &job.adapter;
        let plan = |server, side: &str, needs| {
            let name = format!("{} {side}", job.connection_name);
            AdapterLink::new(LinkPlan { rules: job.rules.clone(), server, name, needs })
        };
        let consumer = adapter.durable.clone().map(|stream| DurableConsumer {
            stream,
            name: adapter.queue_group(),
            topic: adapter.topic.clone(),
        });
        let ingest = plan(adapter.ingest.clone(), "ingest", consumer.clone().map(LinkNeed::Consumer));
        let create = adapter.create.clone().map(|(stream, config)| LinkNeed::Stream(stream, config));
        let target = plan(adapter.target.clone(), "stream", create);
        let most = adapter.queue_messages.min(MOST_REQUESTED);
        let durable = consumer.map(|consumer| DurableIngest::new(consumer, most));
        let queue = OutputQueue::new(adapter.queue_messages, adapter.queue_bytes);
        Self {
            job,
            ingest,
            target,
            durable,
            queue,
            drops: AdapterDrops::default(),
            counters: AdapterCounters::default(),
            inbox: String::new(),
            largest: 0,
            leaving: None,
            hold_until: None,
            refusing: false,
            drain_until: None,
            started: false,
        }
    }

    /// Runs until the stop, and then until the queue is empty or the deadline has passed.
    pub(super) async fn run(mut self) {
        let (stop, mut gate) = (self.job.stop.clone(), self.job.gate.clone());
        self.target.open();
        loop {
            let now = Instant::now();
            self.follow_gate(now);
            self.fill(now);
            self.pull(now);
            self.check(now);
            self.publish();
            if self.is_drained(now) {
                break;
            }
            let wake = self.wake(now);
            tokio::select! {
                () = stop.cancelled(), if self.drain_until.is_none() => {
                    self.drain_until = Some(Instant::now() + DRAIN);
                }
                _ = gate.changed(), if self.drain_until.is_none() => {}
                event = self.ingest.event() => self.ingested(event),
                event = self.target.event() => self.answered(event),
                () = sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
            }
        }
        self.end();
    }

    /// Opens or ends the connection that reads.
    fn follow_gate(&mut self, now: Instant) {
        let open = self.is_open();
        if open && self.leaving.is_none() {
            return self.ingest.open();
        }
        if self.ingest.is_closed() {
            return;
        }
        let Some(lane) = self.ingest.lane() else { return self.ingest.close() };
        if let Some(durable) = &mut self.durable {
            durable.stop(lane);
            if self.drain_until.is_none() || !self.queue.is_empty() {
                // What waits for the target is acknowledged here.
                return;
            }
        }
        let subscriptions = if self.durable.is_some() { 0 } else { self.job.adapter.workers };
        let leaving = *self.leaving.get_or_insert_with(|| {
            for worker in 0..subscriptions {
                lane.close_inbox(sid_of(worker));
            }
            lane.ping();
            EndingReads { ping: lane.pings(), until: now + LEAVE }
        });
        if lane.answered_pings() >= leaving.ping || now >= leaving.until {
            self.leaving = None;
            self.ingest.close();
            if open {
                self.ingest.open();
            }
        }
    }

    fn is_open(&self) -> bool {
        self.drain_until.is_none() && *self.job.gate.borrow() == IngestGate::Open
    }

    fn is_drained(&self, now: Instant) -> bool {
        let Some(until) = self.drain_until else { return false };
        now >= until || self.ingest.is_closed() && self.queue.is_empty()
    }

    /// When something has to be done that no connection announces.
    fn wake(&mut self, now: Instant) -> Option<Instant> {
        let ack = self.queue.oldest_sent().map(|at| at + ACK_WAIT);
        let leaving = self.leaving.map(|_| now + TICK);
        let silent = self.silent_at();
        [ack, leaving, silent, self.hold_until, self.drain_until, self.drops.next_end()].into_iter().flatten().min()
    }

    fn silent_at(&mut self) -> Option<Instant> {
        let lane = self.ingest.lane()?;
        self.durable.as_ref()?.silent_at(lane)
    }

    /// Requests messages of the stream while the target can take them.
    fn pull(&mut self, now: Instant) {
        let ready = self.is_open() && self.target.lane().is_some();
        let full = self.queue.bytes() >= self.job.adapter.queue_bytes.min(2 * BYTES_IN_FLIGHT);
        let (Some(durable), Some(lane)) = (&mut self.durable, self.ingest.lane()) else { return };
        if ready && !full {
            durable.pull(lane, self.queue.len(), now);
        }
    }

    fn ingested(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Flushed => {}
            LinkEvent::Up => {
                let Some(lane) = self.ingest.lane() else { return };
                let (topic, group) = (&self.job.adapter.topic, self.job.adapter.queue_group());
                let subscriptions = if self.durable.is_some() { 0 } else { self.job.adapter.workers };
                for worker in 0..subscriptions {
                    let line = format!("SUB {topic} {group} {}\r\n", sid_of(worker));
                    lane.output().extend_from_slice(line.as_bytes());
                }
                if let Some(durable) = &mut self.durable {
                    durable.up(lane);
                }
                info!(adapter = self.job.adapter.name, server = lane.address(), topic, group, "adapter reads");
                self.job.cell.lock().row.ingest.connected = true;
            }
            LinkEvent::Received(batch) => {
                self.ingest.works();
                self.accept(&batch);
            }
            LinkEvent::Down(error) => self.ingest_lost(&error),
        }
    }

    fn ingest_lost(&mut self, error: &Error) {
        self.leaving = None;
        self.counters.ingest_errors += 1;
        self.job.cell.lock().row.ingest.connected = false;
        self.failed(error, "the connection that reads");
    }

    /// Takes what arrived into the queue.
    fn accept(&mut self, batch: &Batch) {
        let begun = Instant::now();
        let (mut messages, mut dropped, mut broken) = (0, [0_u64; DropReason::ALL.len()], None);
        for message in batch.iter().filter(|message| message.sid != Lane::REQUEST_SID) {
            let arrived = self.durable.as_mut().map(|durable| durable.arrived(&message, begun));
            let mark = match arrived {
                None => None,
                Some(Ok(Some(mark))) => Some(mark),
                // A status, or a redelivery of what waits.
                Some(Ok(None)) => continue,
                Some(Err(error)) => {
                    broken = Some(error);
                    continue;
                }
            };
            messages += 1;
            self.counters.received_bytes += message.payload.len() as u64;
            match self.take(message.payload, mark, begun) {
                Ok(()) => self.counters.accepted += 1,
                Err(reason) => dropped[reason.index()] += 1,
            }
        }
        self.counters.received += messages;
        if messages > 0 {
            let each = begun.elapsed().as_secs_f64() / messages as f64;
            self.counters.decode_time.observe(each, messages);
        }
        for (reason, count) in DropReason::ALL.into_iter().zip(dropped).filter(|(_, count)| *count > 0) {
            self.drop_messages(reason, count, begun);
        }
        if let Some(error) = broken {
            self.ingest.again();
            self.ingest_lost(&error);
        }
    }

    fn take(&mut self, payload: &[u8], mark: Option<StreamMark>, now: Instant) -> Result<(), DropReason> {
        match self.queued(payload, now) {
            Ok(message) => {
                let has_room = self.queue.push(QueuedMessage { mark, ..message });
                if has_room { Ok(()) } else { Err(DropReason::QueueFull) }
            }
            Err(reason) => {
                self.release(mark);
                Err(reason)
            }
        }
    }

    /// Acknowledges a message of a stream: the target has it, or can never have it.
    fn release(&mut self, mark: Option<StreamMark>) {
        if let (Some(durable), Some(mark)) = (&mut self.durable, mark) {
            durable.settled(mark, self.ingest.lane());
        }
    }

    fn queued(&self, payload: &[u8], now: Instant) -> Result<QueuedMessage, DropReason> {
        let adapter = &self.job.adapter;
        let decoded = match &adapter.trusted {
            None => decode(adapter.protocol, payload)?,
            Some(trusted) => decode_verified(adapter.protocol, payload, trusted, entropy::now().timestamp())?,
        };
        let subject = expand_topic(&adapter.target_topic, &decoded.sender);
        if subject.len() > LONGEST_SUBJECT {
            return Err(Discard::Sender.into());
        }
        let mut body = Vec::new();
        adapter.output.encode(&decoded, &mut body);
        Ok(QueuedMessage { subject, id: decoded.message_id(), body, since: now, mark: None })
    }

    /// Sends what may be in flight.
    fn fill(&mut self, now: Instant) {
        if self.hold_until.is_some_and(|until| now < until) {
            return;
        }
        self.hold_until = None;
        let Some(lane) = self.target.lane() else { return };
        let mut too_large = Vec::new();
        let mut header = Vec::with_capacity(64);
        while self.queue.in_flight().0 < IN_FLIGHT
            && self.queue.in_flight().1 < BYTES_IN_FLIGHT
            && lane.unwritten() < UNWRITTEN
        {
            let Some((token, message)) = self.queue.send(now) else { break };
            header.clear();
            header.extend_from_slice(b"NATS/1.0\r\nNats-Msg-Id: ");
            header.extend_from_slice(&message.id);
            header.extend_from_slice(b"\r\n\r\n");
            if header.len() + message.body.len() > self.largest {
                too_large.extend(self.queue.settle(token));
                continue;
            }
            let mut reply = Vec::with_capacity(self.inbox.len() + 20);
            // A write into memory does not fail.
            let _ = write!(reply, "{}{token}", self.inbox);
            headers::publish(lane.output(), message.subject.as_bytes(), &reply, &header, &message.body);
        }
        if !too_large.is_empty() {
            self.drop_messages(DropReason::TooLarge, too_large.len() as u64, now);
            too_large.into_iter().for_each(|message| self.release(message.mark));
        }
    }

    fn answered(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Flushed => {}
            LinkEvent::Up => {
                let Some(lane) = self.target.lane() else { return };
                lane.keep_refused();
                (self.inbox, self.largest) = (lane.inbox_subject(""), lane.info().max_payload);
                info!(adapter = self.job.adapter.name, server = lane.address(), "adapter publishes");
                self.job.cell.lock().row.stream.connected = true;
                self.start();
            }
            LinkEvent::Received(batch) => {
                let now = Instant::now();
                batch.iter().for_each(|message| self.acknowledged(&message, now));
                let refused = self.target.lane().map(Lane::take_refused).unwrap_or_default();
                if let Some(text) = refused.first() {
                    // The refused messages are not answered: the deadline of their acks makes the connection again.
                    self.refused(
                        &Error::hold(format!("the target refuses messages: {}", nats_lane::excerpt(text))),
                        now,
                    );
                }
            }
            LinkEvent::Down(error) => self.target_lost(&error),
        }
    }

    /// Both connections have been up once.
    fn start(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.job.events.emit(Event::AdapterStarted {}, &self.job.key);
        }
    }

    fn target_lost(&mut self, error: &Error) {
        self.counters.target_errors += 1;
        self.counters.retried += self.queue.all_again() as u64;
        self.job.cell.lock().row.stream.connected = false;
        self.failed(error, "the connection that publishes");
    }

    /// Reads the answer to one message.
    fn acknowledged(&mut self, message: &Message<'_>, now: Instant) {
        let token = message.subject.rsplit(|byte| *byte == b'.').next().and_then(number);
        let Some(token) = token.filter(|_| message.sid == Lane::REQUEST_SID) else { return };
        let answer = if headers::status(message.header) == Some(503) {
            Err(Error::retry("no stream takes the subject, or it has no leader"))
        } else {
            PublishAck::parse(message.payload, "the target").and_then(|ack| match (ack.is_of_a_stream(), ack.seq) {
                (true, 1..) => Ok(ack.duplicate),
                // Servers of 2.10 answer so for an id whose message is not stored yet.
                (true, 0) => Err(Error::retry("the target acknowledged a duplicate that it has not stored yet")),
                (false, _) => Err(Error::retry("the answer is not from a stream")),
            })
        };
        match answer {
            Ok(duplicate) => {
                let Some(settled) = self.queue.settle(token) else { return };
                self.counters.stored += 1;
                self.counters.duplicates += u64::from(duplicate);
                self.counters.stored_bytes += settled.body.len() as u64;
                self.counters.store_time.observe(now.duration_since(settled.since).as_secs_f64(), 1);
                if std::mem::take(&mut self.refusing) {
                    self.job.cell.works();
                }
                self.target.works();
                self.release(settled.mark);
            }
            Err(error) if error.kind == ErrorKind::Poison => {
                if let Some(message) = self.queue.settle(token) {
                    warn!(adapter = self.job.adapter.name, subject = message.subject, "message dropped: {error}");
                    self.drop_messages(DropReason::Refused, 1, now);
                    self.release(message.mark);
                }
            }
            Err(error) => {
                if self.queue.again(token) {
                    self.counters.retried += 1;
                    self.refused(&error, now);
                }
            }
        }
    }

    /// The target refused a message, which waits again.
    fn refused(&mut self, error: &Error, now: Instant) {
        self.hold_until = Some(now + AFTER_REFUSAL);
        if !std::mem::replace(&mut self.refusing, true) {
            self.counters.target_errors += 1;
        }
        self.failed(error, "the stream");
    }

    /// What time shows.
    fn check(&mut self, now: Instant) {
        if self.queue.oldest_sent().is_some_and(|sent| now >= sent + ACK_WAIT) {
            self.target.again();
            self.target_lost(&Error::retry(format!("the target did not acknowledge a message within {ACK_WAIT:?}")));
        }
        if self.silent_at().is_some_and(|at| now >= at) {
            self.ingest.again();
            self.ingest_lost(&silence(self.job.adapter.durable.as_deref().unwrap_or_default()));
        }
        for end in self.drops.ended(now) {
            let (reason, messages) = (end.reason, end.messages);
            warn!(adapter = self.job.adapter.name, messages, reason = reason.name(), "messages were dropped");
            self.job.events.emit(
                Event::AdapterDropped { reason: reason.name().to_owned(), messages: Some(messages) },
                &self.job.key,
            );
        }
    }

    fn drop_messages(&mut self, reason: DropReason, messages: u64, now: Instant) {
        if self.drops.count(reason, messages, now) {
            warn!(adapter = self.job.adapter.name, reason = reason.name(), "messages are dropped");
            self.job
                .events
                .emit(Event::AdapterDropped { reason: reason.name().to_owned(), messages: None }, &self.job.key);
        }
    }

    fn failed(&mut self, error: &Error, what: &str) {
        if self.job.cell.failed(error) {
            warn!(adapter = self.job.adapter.name, "{what}: {error}");
        }
    }

    /// Shows the state of now.
    fn publish(&mut self) {
        let gate = *self.job.gate.borrow();
        let ingest = self.ingest.lane().is_some();
        let target = self.target.lane().is_some();
        let mut cell = self.job.cell.lock();
        cell.row.ingest.connected = ingest;
        cell.row.stream.connected = target;
        cell.row.state = match gate {
            IngestGate::Paused => AdapterState::Paused,
            IngestGate::Standby => AdapterState::Standby,
            IngestGate::Open if ingest && target && !self.refusing => AdapterState::Running,
            IngestGate::Open if cell.row.last_error.is_some() => AdapterState::Retrying,
            IngestGate::Open => AdapterState::Starting,
        };
        if let (AdapterState::Running, Some(error)) = (cell.row.state, &mut cell.row.last_error) {
            error.current = false;
        }
        let queue = &mut cell.row.queue;
        (queue.messages, queue.bytes, queue.in_flight) =
            (self.queue.len(), self.queue.bytes(), self.queue.in_flight().0);
        cell.counters.clone_from(&self.counters);
        cell.drops = *self.drops.counts();
    }

    fn end(mut self) {
        let lost = self.queue.len() as u64;
        // A stream still has them.
        if lost > 0 && self.durable.is_none() {
            self.drop_messages(DropReason::Stopped, lost, Instant::now());
        }
        self.publish();
        let (received, stored) = (self.counters.received, self.counters.stored);
        info!(adapter = self.job.adapter.name, received, stored, lost, "adapter stopped");
        self.job.events.emit(Event::AdapterStopped { not_stored: lost }, &self.job.key);
    }
}

/// Subscription of one member of the queue group.
fn sid_of(worker: usize) -> u64 {
    Lane::REQUEST_SID + 1 + worker as u64
}
