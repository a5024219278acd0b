//! Advisories of one run, published at the source over a connection of their own: a refusal of one of them ends neither
//! the run nor other advisories. A publisher at the source chooses the names of senders, and so can cause subjects that
//! the login may not publish, or lines that are longer than the server accepts.
//!
//! A server refuses a subject by an asynchronous `-ERR` line that quotes it, without an ack, and drops the connection
//! at a line that is too long. So a refused advisory is found by its subject, as the longest line in flight, or by an
//! ack that does not arrive while later ones do.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use nats_lane::{
    Batch, Dial, Error, ErrorKind, Lane, Message, Turn, backoff::Backoff, entropy as chance, excerpt, headers,
    jetstream::PublishAck, parser::number,
};
use tokio::time::{Duration, Instant};
use tracing::{info, warn};

use super::{
    Job,
    target::{frame::hpub, headers::push, line},
};
use crate::{
    config::Side,
    events::Event,
    names,
    sampling::{AdvisoryKind, AdvisoryTemplate, Senders},
    status::{Advised, SamplingStatus},
};

/// Advisories in flight.
const IN_FLIGHT: usize = 256;
/// How long the confirmation of an advisory may take.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// How long a limit is assumed that the server does not publish.
const LIMIT_FOR: Duration = Duration::from_secs(60);
/// Refusals are over after this long without one, where nothing else shows it.
const CALM: Duration = Duration::from_secs(60);
/// Bytes of a protocol line beside subject and reply: two sizes and blanks.
const LINE_REST: usize = 24;

/// The connection for advisories.
pub(super) struct AdvisoryPublisher {
    replication: String,
    side: Side,
    dial: Arc<dyn Dial>,
    template: AdvisoryTemplate,
    reliable: bool,
    line: Line,
    /// Advisories that are not confirmed, oldest first.
    in_flight: VecDeque<SentAdvisory>,
    /// When the newest confirmed advisory was sent.
    confirmed: Option<Instant>,
    /// Lines of this length (bytes) and more are not sent until this time: such a line ended the connection.
    longest: Option<(usize, Instant)>,
    /// Connections in a row that ended without an error line while an advisory was in flight.
    cuts: u32,
    next_publish: Instant,
    /// When the refused advisories are tried again.
    try_again: Option<Instant>,
    /// Time of the latest refusal.
    refused_at: Option<Instant>,
    backoff: Backoff,
    /// Whether it has been reported that advisories are not confirmed.
    failing: bool,
    /// Whether it has been reported that some advisories are refused.
    refusing: bool,
    events: Vec<Event>,
    header: Vec<u8>,
}

enum Line {
    Closed,
    Opening(BoxFuture<'static, Result<Lane, Error>>),
    Open(Box<Lane>, Inbox),
}

/// Where confirmations arrive.
struct Inbox {
    sid: u64,
    subject: String,
}

/// An advisory that was sent.
#[derive(Debug)]
struct SentAdvisory {
    number: u64,
    kind: AdvisoryKind,
    sent: Instant,
    subject: String,
    /// Bytes of its protocol line.
    line: usize,
    /// The ping after it, if nothing else confirms it: the answer shows that the server has read the advisory.
    ping: Option<u64>,
}

/// An occurrence on the connection for advisories.
#[derive(Debug)]
pub(crate) enum AdvisoryEvent {
    /// The connection is open.
    Opened,
    /// Messages, perhaps confirmations.
    Answers(Batch),
    /// The server has read everything sent.
    Taken,
    /// The connection ended.
    Failed(Error),
}

/// How a stream answered an advisory.
enum AdvisoryOutcome {
    Confirmed,
    Refused(String),
}

impl fmt::Debug for AdvisoryPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Post").field("replication", &self.replication).finish_non_exhaustive()
    }
}

impl AdvisoryPublisher {
    /// The connection of one run. It is opened when there is an advisory to publish.
    pub(super) fn new(job: &Job, template: AdvisoryTemplate, reliable: bool, now: Instant) -> Self {
        Self {
            replication: job.replication.id.clone(),
            side: job.replication.source.clone(),
            dial: job.dial.clone(),
            template,
            reliable,
            line: Line::Closed,
            in_flight: VecDeque::new(),
            confirmed: None,
            longest: None,
            cuts: 0,
            next_publish: now,
            try_again: None,
            refused_at: None,
            backoff: Backoff::RETRY,
            failing: false,
            refusing: false,
            events: Vec::new(),
            header: Vec::new(),
        }
    }

    /// The events to report.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Publishes what is ready, within the bounds; connects first if necessary.
    pub(super) fn publish(&mut self, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) {
        if now < self.next_publish {
            return;
        }
        if self.try_again.is_some_and(|at| now >= at) {
            self.try_again = None;
            senders.outbox.try_again(IN_FLIGHT);
        }
        if matches!(self.line, Line::Closed) && senders.outbox.is_ready() {
            self.line = Line::Opening(self.open());
        }
        let before = self.in_flight.len();
        // An advisory that is refused without being sent counts too: the copy waits for this.
        for _ in 0..IN_FLIGHT {
            if self.in_flight.len() >= IN_FLIGHT || !self.publish_one(senders, status, now) {
                break;
            }
        }
        if let Line::Open(lane, _) = &mut self.line
            && !self.reliable
            && self.in_flight.len() > before
        {
            lane.ping();
        }
    }

    fn open(&self) -> BoxFuture<'static, Result<Lane, Error>> {
        let (dial, place) = (self.dial.clone(), self.side.place.clone());
        let name = format!("{} {} advisories", names::PROGRAM, self.replication);
        Box::pin(async move {
            let mut lane = dial.dial(&place, &name).await?;
            lane.keep_refused();
            Ok(lane)
        })
    }

    /// Sends the next advisory, or refuses it; returns whether there was one.
    fn publish_one(&mut self, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) -> bool {
        let Line::Open(lane, inbox) = &mut self.line else { return false };
        let Some((number, advisory)) = senders.outbox.take_next() else { return false };
        let (subject, body) = (self.template.subject(advisory), self.template.body(advisory));
        let payload = serde_json::to_vec(&body).unwrap_or_default();
        let reply = if self.reliable { format!("{}.{number}", inbox.subject) } else { String::new() };
        self.header.clear();
        if self.reliable {
            self.header.extend_from_slice(headers::VERSION);
            self.header.extend_from_slice(b"\r\n");
            push(&mut self.header, "Nats-Msg-Id", body.event_id.as_bytes());
            self.header.extend_from_slice(b"\r\n");
        }
        let line = subject.len() + reply.len() + LINE_REST;
        let longest = self.longest.filter(|(_, until)| now < *until).map(|(line, _)| line);
        let (size, most) = (self.header.len() + payload.len(), lane.info().max_payload);
        let too_much = match longest {
            Some(longest) if line > longest => {
                Some("its protocol line is longer than the server takes (`max_control_line`)".to_owned())
            }
            _ if size > most => Some(format!("its {size} bytes are more than `max_payload` of the server, {most}")),
            _ => None,
        };
        if let Some(why) = too_much {
            self.settle(senders, status, (number, body.event), AdvisoryOutcome::Refused(why), now);
            return true;
        }
        if self.reliable {
            hpub(lane.output(), subject.as_bytes(), reply.as_bytes(), &self.header, &payload);
        } else {
            lane.publish(&subject, "", &payload);
        }
        let ping = (!self.reliable).then(|| lane.pings() + 1);
        self.in_flight.push_back(SentAdvisory { number, kind: body.event, sent: now, subject, line, ping });
        true
    }

    /// Drives the connection. The result is for [`AdvisoryPublisher::accept`].
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<AdvisoryEvent> {
        match &mut self.line {
            Line::Closed => Poll::Pending,
            Line::Opening(opening) => opening.as_mut().poll(cx).map(|opened| match opened {
                Ok(mut lane) => {
                    let (sid, subject) = lane.open_inbox();
                    self.line = Line::Open(Box::new(lane), Inbox { sid, subject });
                    AdvisoryEvent::Opened
                }
                Err(error) => AdvisoryEvent::Failed(error),
            }),
            Line::Open(lane, _) => loop {
                let turn = pin!(lane.turn()).poll(cx);
                return match turn {
                    Poll::Ready(Ok(Turn::Flushed)) => continue,
                    Poll::Ready(Ok(Turn::Received(batch))) => Poll::Ready(AdvisoryEvent::Answers(batch)),
                    Poll::Ready(Err(error)) => Poll::Ready(AdvisoryEvent::Failed(error)),
                    Poll::Pending if self.in_flight.front().is_some_and(|one| one.is_taken(lane)) => {
                        Poll::Ready(AdvisoryEvent::Taken)
                    }
                    Poll::Pending => Poll::Pending,
                };
            },
        }
    }

    /// Handles confirmations and refusals of the server.
    pub(super) fn accept(
        &mut self,
        heard: AdvisoryEvent,
        senders: &mut Senders,
        status: &mut SamplingStatus,
        now: Instant,
    ) {
        let refused = match &mut self.line {
            Line::Open(lane, _) => lane.take_refused(),
            Line::Closed | Line::Opening(_) => Vec::new(),
        };
        for text in refused {
            let of = |one: &SentAdvisory| text.ends_with(&format!("\"{}\"", quoted(&one.subject)));
            // An advisory that is not found by its subject is found when its confirmation is overdue.
            if let Some(one) = self.in_flight.iter().position(of).and_then(|at| self.in_flight.remove(at)) {
                self.settle(senders, status, (one.number, one.kind), AdvisoryOutcome::Refused(text), now);
            }
        }
        match heard {
            AdvisoryEvent::Opened => {}
            AdvisoryEvent::Answers(batch) => self.answers(&batch, senders, status, now),
            AdvisoryEvent::Taken => {}
            AdvisoryEvent::Failed(error) => self.failed(&error, senders, status, now),
        }
        while let Line::Open(lane, _) = &self.line
            && self.in_flight.front().is_some_and(|one| one.is_taken(lane))
            && let Some(one) = self.in_flight.pop_front()
        {
            self.confirmed = self.confirmed.max(Some(one.sent));
            self.settle(senders, status, (one.number, one.kind), AdvisoryOutcome::Confirmed, now);
        }
    }

    fn answers(&mut self, batch: &Batch, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) {
        let Line::Open(_, Inbox { sid, .. }) = &self.line else { return };
        let sid = *sid;
        for message in batch.iter().filter(|message| message.sid == sid) {
            let id = message.subject.rsplit(|byte| *byte == b'.').next().and_then(number);
            let Some(at) = self.in_flight.iter().position(|one| Some(one.number) == id) else { continue };
            let Some(one) = self.in_flight.remove(at) else { continue };
            let outcome = outcome(&message);
            if matches!(outcome, AdvisoryOutcome::Confirmed) {
                self.confirmed = self.confirmed.max(Some(one.sent));
            }
            self.settle(senders, status, (one.number, one.kind), outcome, now);
        }
    }

    fn settle(
        &mut self,
        senders: &mut Senders,
        status: &mut SamplingStatus,
        (number, kind): (u64, AdvisoryKind),
        outcome: AdvisoryOutcome,
        now: Instant,
    ) {
        match outcome {
            AdvisoryOutcome::Confirmed => {
                self.cuts = 0;
                if senders.confirmed(number).is_some() {
                    count(&mut status.advised, kind);
                }
                // Where only some are refused, their pauses continue to grow.
                let calm = self.refused_at.is_none_or(|at| self.reliable || now.duration_since(at) > CALM);
                if calm && !senders.outbox.has_refused() && self.try_again.is_none() {
                    self.backoff.reset();
                    status.advisory_error = None;
                    if std::mem::take(&mut self.failing) | std::mem::take(&mut self.refusing) {
                        info!(replication = self.replication, "advisories are confirmed again");
                    }
                }
            }
            AdvisoryOutcome::Refused(why) => {
                count(&mut status.advisory_errors, kind);
                self.refused_at = Some(now);
                if self.reliable {
                    senders.outbox.refuse(number);
                    self.try_again.get_or_insert_with(|| now + self.backoff.next(chance_part()));
                } else {
                    senders.confirmed(number);
                }
                self.report(status, kind, why);
            }
        }
    }

    /// Reports the first of several refusals.
    fn report(&mut self, status: &mut SamplingStatus, kind: AdvisoryKind, why: String) {
        if !std::mem::replace(&mut self.refusing, true) {
            let (replication, event) = (&self.replication, kind.name());
            warn!(replication, event, "advisories are refused, the copy continues: {why}");
            self.events
                .push(Event::AdvisoryRefused { advisory: kind.name().to_owned(), message: excerpt(&why).into_owned() });
        }
        status.advisory_error = Some(excerpt(&why).into_owned());
    }

    /// The connection ended, or there was none.
    fn failed(&mut self, error: &Error, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) {
        self.line = Line::Closed;
        let says = error.message.to_ascii_lowercase().contains("maximum control line");
        self.cuts += u32::from(error.is_cut() && !self.in_flight.is_empty());
        let longest = self.in_flight.iter().max_by_key(|one| one.line);
        // A server that ends a connection because of a line may not get its error line through.
        let longest = longest.filter(|one| says || (self.cuts > 1 && one.line > line::LEAST));
        if let Some(SentAdvisory { number, kind, line, .. }) = longest {
            let (settled, line) = ((*number, *kind), *line);
            self.longest = Some((line - 1, now + LIMIT_FOR));
            self.cuts = 0;
            let why = format!("a protocol line of {line} bytes may be longer than `max_control_line`: {error}");
            self.settle(senders, status, settled, AdvisoryOutcome::Refused(why), now);
        } else {
            let kind = self.in_flight.front().map(|one| one.kind);
            self.not_confirmed(kind, &error.message, status);
            if error.kind == ErrorKind::Hold {
                self.report(status, kind.unwrap_or(AdvisoryKind::New), error.message.clone());
            }
        }
        self.take_back(senders, now);
    }

    /// Judges what was not confirmed in time.
    pub(super) fn tick(&mut self, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) {
        let Some(oldest) = self.in_flight.front().filter(|oldest| now.duration_since(oldest.sent) > ACK_WAIT) else {
            return;
        };
        let why = format!("no confirmation within {ACK_WAIT:?}");
        let settled = (oldest.number, oldest.kind);
        // Others that were sent with it or after it are confirmed: this one was refused.
        if self.confirmed.is_some_and(|at| at >= oldest.sent) {
            self.in_flight.pop_front();
            return self.settle(senders, status, settled, AdvisoryOutcome::Refused(why), now);
        }
        self.not_confirmed(Some(settled.1), &why, status);
        self.take_back(senders, now);
    }

    /// No advisory is confirmed at the moment: all of them are published again.
    fn not_confirmed(&mut self, kind: Option<AdvisoryKind>, why: &str, status: &mut SamplingStatus) {
        if let Some(kind) = kind {
            count(&mut status.advisory_errors, kind);
        }
        if !std::mem::replace(&mut self.failing, true) {
            warn!(replication = self.replication, "advisories are not confirmed, trying again: {why}");
        }
        status.advisory_error = Some(excerpt(why).into_owned());
    }

    fn take_back(&mut self, senders: &mut Senders, now: Instant) {
        self.in_flight.clear();
        senders.outbox.take_back();
        self.next_publish = now + self.backoff.next(chance_part());
    }

    /// Whether there is nothing left to do for now.
    pub(super) fn is_done(&self, senders: &Senders, now: Instant) -> bool {
        self.in_flight.is_empty() && (!senders.outbox.is_ready() || now < self.next_publish)
    }
}

impl SentAdvisory {
    /// Whether the server has read everything, for advisories that no stream confirms.
    fn is_taken(&self, lane: &Lane) -> bool {
        self.ping.is_some_and(|ping| ping <= lane.answered_pings())
    }
}

/// Evaluates the answer to a reliable advisory. Any subscriber can answer, but only a stream names itself.
fn outcome(message: &Message<'_>) -> AdvisoryOutcome {
    if headers::status(message.header) == Some(503) {
        return AdvisoryOutcome::Refused("no stream listens there (no responders)".to_owned());
    }
    match PublishAck::parse(message.payload, "the source") {
        Ok(ack) if ack.is_of_a_stream() => AdvisoryOutcome::Confirmed,
        Ok(_) => AdvisoryOutcome::Refused("the answer names no stream: no stream has stored it".to_owned()),
        Err(error) => AdvisoryOutcome::Refused(error.message),
    }
}

/// A subject as servers quote it in `-ERR` lines.
fn quoted(subject: &str) -> String {
    subject.replace('\\', "\\\\").replace('"', "\\\"")
}

pub(super) fn count(advised: &mut Advised, kind: AdvisoryKind) {
    *match kind {
        AdvisoryKind::New => &mut advised.new,
        AdvisoryKind::Timeout => &mut advised.timeout,
        AdvisoryKind::Recover => &mut advised.recover,
        AdvisoryKind::Expire => &mut advised.expire,
    } += 1;
}

fn chance_part() -> f64 {
    (chance::random() >> 11) as f64 / (1_u64 << 53) as f64
}
