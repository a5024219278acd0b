//! Advisories of one run, published at the source over a connection of their own: whatever the server thinks of one of
//! them ends neither the run nor other advisories. A publisher at the source chooses the names of senders, and so subjects
//! that the login may not publish, or lines that are longer than the server takes.

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
    sampling::{Kind, Senders, Voice},
    status::{Advised, SamplingStatus},
};

/// Advisories in flight.
const IN_FLIGHT: usize = 256;
/// How long the confirmation of an advisory may take.
const ACK_WAIT: Duration = Duration::from_secs(5);
/// How long a limit that the server does not publish is believed.
const LIMIT_FOR: Duration = Duration::from_secs(60);
/// Where nothing else shows that refusals are over, they are after so long without one.
const CALM: Duration = Duration::from_secs(60);
/// Bytes of a protocol line beside subject and reply: two sizes and blanks.
const LINE_REST: usize = 24;

/// The connection for advisories.
pub(super) struct Post {
    replication: String,
    side: Side,
    dial: Arc<dyn Dial>,
    voice: Voice,
    reliable: bool,
    line: Line,
    /// What is not confirmed, oldest first.
    in_flight: VecDeque<InFlight>,
    /// When the newest one was sent that is confirmed.
    confirmed: Option<Instant>,
    /// Lines that are longer are not sent, up to a time: one that was not much longer ended the connection.
    longest: Option<(usize, Instant)>,
    /// Connections that ended without a word while something was in flight, one after the other.
    cuts: u32,
    next_publish: Instant,
    /// When those that were refused are tried again.
    try_again: Option<Instant>,
    /// When one was refused last.
    refused_at: Option<Instant>,
    backoff: Backoff,
    /// Whether it has been reported that advisories are not confirmed.
    failing: bool,
    /// Whether it has been reported that some are refused.
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

/// One that was sent.
#[derive(Debug)]
struct InFlight {
    number: u64,
    kind: Kind,
    sent: Instant,
    subject: String,
    /// Bytes of its protocol line.
    line: usize,
    /// The ping after it, if nothing else confirms it: the answer shows that the server has read the advisory.
    ping: Option<u64>,
}

/// What the connection brought.
#[derive(Debug)]
pub(super) enum Heard {
    /// It is open.
    Opened,
    /// Messages, perhaps confirmations.
    Answers(Batch),
    /// The server has read what was sent.
    Taken,
    /// It ended.
    Failed(Error),
}

/// What became of an advisory.
enum Outcome {
    Confirmed,
    Refused(String),
}

impl fmt::Debug for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Post").field("replication", &self.replication).finish_non_exhaustive()
    }
}

impl Post {
    /// For one run. Nothing is connected before there is something to publish.
    pub(super) fn new(job: &Job, voice: Voice, reliable: bool, now: Instant) -> Self {
        Self {
            replication: job.replication.id.clone(),
            side: job.replication.source.clone(),
            dial: job.dial.clone(),
            voice,
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

    /// What is to be reported.
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
        // One that is refused without being sent counts too: the copy waits for this.
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

    /// Sends the next one, or refuses it; whether there was one.
    fn publish_one(&mut self, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) -> bool {
        let Line::Open(lane, inbox) = &mut self.line else { return false };
        let Some((number, advisory)) = senders.outbox.take() else { return false };
        let (subject, body) = (self.voice.subject(advisory), self.voice.body(advisory));
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
            self.settle(senders, status, (number, body.event), Outcome::Refused(why), now);
            return true;
        }
        if self.reliable {
            hpub(lane.output(), subject.as_bytes(), reply.as_bytes(), &self.header, &payload);
        } else {
            lane.publish(&subject, "", &payload);
        }
        let ping = (!self.reliable).then(|| lane.pings() + 1);
        self.in_flight.push_back(InFlight { number, kind: body.event, sent: now, subject, line, ping });
        true
    }

    /// Drives the connection. What it returns is for [`Post::accept`].
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Heard> {
        match &mut self.line {
            Line::Closed => Poll::Pending,
            Line::Opening(opening) => opening.as_mut().poll(cx).map(|opened| match opened {
                Ok(mut lane) => {
                    let (sid, subject) = lane.open_inbox();
                    self.line = Line::Open(Box::new(lane), Inbox { sid, subject });
                    Heard::Opened
                }
                Err(error) => Heard::Failed(error),
            }),
            Line::Open(lane, _) => loop {
                let turn = pin!(lane.turn()).poll(cx);
                return match turn {
                    Poll::Ready(Ok(Turn::Flushed)) => continue,
                    Poll::Ready(Ok(Turn::Received(batch))) => Poll::Ready(Heard::Answers(batch)),
                    Poll::Ready(Err(error)) => Poll::Ready(Heard::Failed(error)),
                    Poll::Pending if self.in_flight.front().is_some_and(|one| one.is_taken(lane)) => {
                        Poll::Ready(Heard::Taken)
                    }
                    Poll::Pending => Poll::Pending,
                };
            },
        }
    }

    /// What the server said of advisories in flight.
    pub(super) fn accept(&mut self, heard: Heard, senders: &mut Senders, status: &mut SamplingStatus, now: Instant) {
        let refused = match &mut self.line {
            Line::Open(lane, _) => lane.take_refused(),
            Line::Closed | Line::Opening(_) => Vec::new(),
        };
        for text in refused {
            let of = |one: &InFlight| text.ends_with(&format!("\"{}\"", quoted(&one.subject)));
            // What cannot be found by its subject is found when its confirmation does not arrive.
            if let Some(one) = self.in_flight.iter().position(of).and_then(|at| self.in_flight.remove(at)) {
                self.settle(senders, status, (one.number, one.kind), Outcome::Refused(text), now);
            }
        }
        match heard {
            Heard::Opened => {}
            Heard::Answers(batch) => self.answers(&batch, senders, status, now),
            Heard::Taken => {}
            Heard::Failed(error) => self.failed(&error, senders, status, now),
        }
        while let Line::Open(lane, _) = &self.line
            && self.in_flight.front().is_some_and(|one| one.is_taken(lane))
            && let Some(one) = self.in_flight.pop_front()
        {
            self.confirmed = self.confirmed.max(Some(one.sent));
            self.settle(senders, status, (one.number, one.kind), Outcome::Confirmed, now);
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
            if matches!(outcome, Outcome::Confirmed) {
                self.confirmed = self.confirmed.max(Some(one.sent));
            }
            self.settle(senders, status, (one.number, one.kind), outcome, now);
        }
    }

    fn settle(
        &mut self,
        senders: &mut Senders,
        status: &mut SamplingStatus,
        (number, kind): (u64, Kind),
        outcome: Outcome,
        now: Instant,
    ) {
        match outcome {
            Outcome::Confirmed => {
                self.cuts = 0;
                if senders.confirmed(number).is_some() {
                    count(&mut status.advised, kind);
                }
                // Where only some are refused, their pauses go on growing.
                let calm = self.refused_at.is_none_or(|at| self.reliable || now.duration_since(at) > CALM);
                if calm && !senders.outbox.has_refused() && self.try_again.is_none() {
                    self.backoff.reset();
                    status.advisory_error = None;
                    if std::mem::take(&mut self.failing) | std::mem::take(&mut self.refusing) {
                        info!(replication = self.replication, "advisories are confirmed again");
                    }
                }
            }
            Outcome::Refused(why) => {
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

    /// Reports, once, that an advisory was refused.
    fn report(&mut self, status: &mut SamplingStatus, kind: Kind, why: String) {
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
        // A server that ends a connection because of a line may not get through with saying so.
        let longest = longest.filter(|one| says || (self.cuts > 1 && one.line > line::LEAST));
        if let Some(InFlight { number, kind, line, .. }) = longest {
            let (settled, line) = ((*number, *kind), *line);
            self.longest = Some((line - 1, now + LIMIT_FOR));
            self.cuts = 0;
            let why = format!("a protocol line of {line} bytes may be longer than `max_control_line`: {error}");
            self.settle(senders, status, settled, Outcome::Refused(why), now);
        } else {
            let kind = self.in_flight.front().map(|one| one.kind);
            self.not_confirmed(kind, &error.message, status);
            if error.kind == ErrorKind::Hold {
                self.report(status, kind.unwrap_or(Kind::New), error.message.clone());
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
        // Others that were sent with it or after it are confirmed: it is this one.
        if self.confirmed.is_some_and(|at| at >= oldest.sent) {
            self.in_flight.pop_front();
            return self.settle(senders, status, settled, Outcome::Refused(why), now);
        }
        self.not_confirmed(Some(settled.1), &why, status);
        self.take_back(senders, now);
    }

    /// Nothing is confirmed at the moment: all of it is published again.
    fn not_confirmed(&mut self, kind: Option<Kind>, why: &str, status: &mut SamplingStatus) {
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

    /// Whether there is nothing more to do for now.
    pub(super) fn is_done(&self, senders: &Senders, now: Instant) -> bool {
        self.in_flight.is_empty() && (!senders.outbox.is_ready() || now < self.next_publish)
    }
}

impl InFlight {
    /// Whether the server has read it, as far as that is the confirmation.
    fn is_taken(&self, lane: &Lane) -> bool {
        self.ping.is_some_and(|ping| ping <= lane.answered_pings())
    }
}

/// What the answer to a reliable advisory says. Any subscriber can answer: only a stream names itself.
fn outcome(message: &Message<'_>) -> Outcome {
    if headers::status(message.header) == Some(503) {
        return Outcome::Refused("no stream listens there (no responders)".to_owned());
    }
    match PublishAck::parse(message.payload, "the source") {
        Ok(ack) if ack.is_of_a_stream() => Outcome::Confirmed,
        Ok(_) => Outcome::Refused("the answer names no stream: no stream has stored it".to_owned()),
        Err(error) => Outcome::Refused(error.message),
    }
}

/// A subject as servers quote it in `-ERR` lines.
fn quoted(subject: &str) -> String {
    subject.replace('\\', "\\\\").replace('"', "\\\"")
}

pub(super) fn count(advised: &mut Advised, kind: Kind) {
    *match kind {
        Kind::New => &mut advised.new,
        Kind::Timeout => &mut advised.timeout,
        Kind::Recover => &mut advised.recover,
        Kind::Expire => &mut advised.expire,
    } += 1;
}

fn chance_part() -> f64 {
    (chance::random() >> 11) as f64 / (1_u64 << 53) as f64
}
