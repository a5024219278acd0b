//! Sends by fast-ingest batches (ADR-50, server 2.14): one batch is open at a time, and an ack settles a part of it.
//!
//! * The server acks every N messages only, and forgets a batch after 10 s without a message. So an open batch is
//!   committed when it is idle, when its oldest message waits too long, or when the bounds on messages in flight stop
//!   it.
//! * In gap mode `fail` the first refusal ends the batch: the stored messages are a prefix, whose length is in its end.
//!   Two open batches would undo that: another writer could make the numbers of the second one match after a hole of
//!   the first.
//! * Only the end of a batch names stream and domain. So the first batch of a run is one message, and no other ack
//!   counts before its end. A second stream that listens on the subjects answers too: its second answer to the start
//!   ends the batch.
//! * The server identifies a batch by the token in the reply subject alone, whichever client sends it.
//! * A server before 2.14 stores such a message as an ordinary one. So the stream's `allow_batched` and the API level
//!   of its leader decide, not the version of the connected server.

use std::ops::Range;

use bytes::BytesMut;
use nats_lane::{
    Error, Message, entropy as chance,
    fast_ingest::{self, Ack, Operation},
    headers,
    parser::number,
};
use tokio::time::{Duration, Instant};

use crate::{
    config::Limits,
    copy::{
        Error as RunError, ErrorSide,
        flow::window::{Token, Window},
        target::{
            frame::digits,
            refusal::{STREAM_NOT_EXPECTED, no_responders, refusal},
            target_end::{TargetEnd, window_error},
        },
    },
};

/// Most messages between two acks that we request; the server may choose fewer.
const FLOW: u32 = 500;
/// Acks that may be outstanding (ADR-50): the server's distance times this number of messages may be in flight.
const OUTSTANDING_ACKS: u64 = 32;
/// An open batch is committed when no message was sent for this time: the last messages get no ack otherwise.
const COMMIT_IDLE: Duration = Duration::from_millis(20);
/// An open batch is committed when its oldest unsettled message waits longer and no ack is due.
const COMMIT_AFTER: Duration = Duration::from_millis(250);
/// On shared targets an open batch is committed this often: only the end of a batch gives the sequences of our
/// messages.
const COMMIT_SHARED: Duration = Duration::from_secs(2);
/// How long to wait for the end of a refused batch, which says how many messages were stored.
const END_WAIT: Duration = Duration::from_millis(500);
/// How long the answer to a commit may take.
const COMMIT_WAIT: Duration = Duration::from_secs(10);

/// An open fast-ingest batch.
#[derive(Debug)]
struct OpenBatch {
    id: u64,
    /// Token of the message with batch sequence 1.
    first: Token,
    /// Batch sequences assigned so far.
    sent: u64,
    /// Batch sequences settled.
    settled: u64,
    /// Distance between acks that we request.
    flow: u32,
    /// Distance between acks, by the server's last answer; `None` until it answered the start.
    every: Option<u32>,
    opened: Instant,
    last_sent: Instant,
    last_ack: Instant,
    committing: Option<Instant>,
    refused: Option<BatchRefusal>,
    /// A second stream may answer: acks that name no stream do not count.
    doubted: bool,
}

/// The first refusal of a batch.
#[derive(Debug, Clone)]
struct BatchRefusal {
    error: Error,
    at: Instant,
    /// Batch sequence of the message, where it is known.
    sequence: Option<u64>,
}

/// Whether more messages will follow soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::copy) enum Supply {
    /// No message is known to wait at the source.
    Dry,
    /// A message is on its way.
    Coming,
    /// A message was read, but the bounds on messages in flight delay it.
    Barred,
}

/// The batches of one run.
#[derive(Debug)]
pub(in crate::copy) struct Batches {
    batch: Option<OpenBatch>,
    next_id: u64,
    /// No stream that names itself has confirmed a message.
    unproven: bool,
    /// Batches that were refused so far.
    pub refused: u64,
}

impl Batches {
    /// Without an open batch.
    pub fn new() -> Self {
        // The server identifies batches by this id alone, not by the inbox: those of other writers, and of our own
        // earlier runs, must not have the same. Far below `MAX_NUMBER`: it comes back in every ack.
        Self { batch: None, next_id: chance::random() >> 3, unproven: true, refused: 0 }
    }

    /// The id of the open batch.
    #[cfg(test)]
    pub fn open_id(&self) -> Option<u64> {
        self.batch.as_ref().map(|batch| batch.id)
    }

    /// Whether the next message begins a batch.
    pub fn opens(&self) -> bool {
        self.batch.is_none()
    }

    /// Whether a stream that names itself has confirmed a message.
    pub fn is_proven(&self) -> bool {
        !self.unproven
    }

    /// Whether the target's flow control takes another message now.
    pub fn ready(&self) -> bool {
        let Some(batch) = &self.batch else { return true };
        let in_flight = batch.sent - batch.settled;
        let allowed = match batch.every {
            Some(every) => (u64::from(every) * OUTSTANDING_ACKS).max(64),
            None => u64::from(batch.flow),
        };
        let alone = self.unproven || batch.doubted;
        batch.committing.is_none() && batch.refused.is_none() && in_flight < allowed && !alone
    }

    /// Length of the next reply subject beside the inbox; a byte or two more where its number in the batch is not known
    /// yet.
    pub fn reply_len(&self) -> usize {
        // Distance, gap mode, operation, mark and dots beside the numbers.
        let (id, sent) = self.batch.as_ref().map_or((self.next_id, 0), |batch| (batch.id, batch.sent));
        digits(id) + digits(sent + 1) + 3 + 4 + 1 + 3 + 6
    }

    /// Writes the reply subject of the next message, of so many bytes.
    pub fn reply(
        &mut self,
        out: &mut BytesMut,
        inbox: &str,
        token: Token,
        (limits, bytes): (&Limits, usize),
        now: Instant,
    ) {
        let operation = if self.batch.is_some() { Operation::Append } else { Operation::Start };
        let next_id = &mut self.next_id;
        let batch = self.batch.get_or_insert_with(|| {
            let id = *next_id;
            *next_id += 1;
            OpenBatch {
                id,
                first: token,
                sent: 0,
                settled: 0,
                flow: flow(limits, bytes),
                every: None,
                opened: now,
                last_sent: now,
                last_ack: now,
                committing: None,
                refused: None,
                doubted: false,
            }
        });
        if batch.sent == batch.settled {
            batch.last_ack = now;
        }
        batch.sent += 1;
        batch.last_sent = now;
        fast_ingest::reply_subject(out, inbox, batch.id, batch.flow, batch.sent, operation);
    }

    /// Handles an ack. `subject` is that of the message, after the inbox.
    pub fn accept(
        &mut self,
        subject: &[u8],
        message: &Message<'_>,
        end: &mut TargetEnd,
        window: &mut Window,
        now: Instant,
    ) -> Result<(), RunError> {
        // Acks of a batch that is over settle nothing, but a wrong stream among them must be detected.
        let current = self.batch.as_ref().map(|batch| batch.id);
        let mut words = subject.split(|b| *b == b'.');
        let of_current = words.next().and_then(number) == current;
        // After distance and gap mode: every answer comes back on the subject of a message.
        let of_message = words.nth(2).and_then(number);
        if headers::status(message.header) == Some(503) {
            self.refuse(no_responders(), of_message, now);
            return Ok(());
        }
        let ack =
            fast_ingest::parse_ack(message.payload).map_err(|what| Error::retry(format!("the target sent {what}")))?;
        if of_current { self.accept_current(ack, of_message, end, window, now) } else { accept_former(ack, end) }
    }

    fn accept_current(
        &mut self,
        ack: Ack,
        of_message: Option<u64>,
        end: &mut TargetEnd,
        window: &mut Window,
        now: Instant,
    ) -> Result<(), RunError> {
        match ack {
            Ack::Progress { sequence, every } => {
                let Some(batch) = &mut self.batch else { return Ok(()) };
                // The answer to the start comes once. Only the end of a batch names the stream that stored it.
                batch.doubted |= sequence == 0 && batch.every.is_some();
                batch.every = Some(every);
                batch.last_ack = now;
                if !batch.doubted && !self.unproven {
                    let settled = settle_batch(batch, sequence, window)?;
                    end.log_batch(settled, window);
                }
            }
            Ack::Failed { error: Some(error), sequence } => {
                self.refuse(end.explained(error), sequence.or(of_message), now);
            }
            Ack::Failed { error: None, .. } => {
                let error = Error::retry("a message of the batch went missing on its way to the target");
                self.refuse(error, None, now);
            }
            Ack::End { stream, domain, stream_sequence, count } => {
                end.expect_stream(&stream, domain.as_deref())?;
                self.ended(stream_sequence, count, end, window)?;
            }
        }
        Ok(())
    }

    fn refuse(&mut self, error: Error, sequence: Option<u64>, now: Instant) {
        let Some(batch) = &mut self.batch else { return };
        if batch.refused.is_none() {
            self.refused += 1;
            batch.refused = Some(BatchRefusal { error, at: now, sequence });
        }
    }

    fn ended(
        &mut self,
        stream_sequence: u64,
        count: u64,
        end: &mut TargetEnd,
        window: &mut Window,
    ) -> Result<(), RunError> {
        let Some(mut batch) = self.batch.take() else { return Ok(()) };
        self.unproven = false;
        let shared = end.is_shared();
        // On an exclusive target the chain would have shown it. The end of a batch of duplicates may be an old
        // sequence. Without a sequence no message was stored: the target had all of them already.
        let placed = stream_sequence > 0;
        if shared && placed && batch.refused.is_none() && count > 0 && stream_sequence < end.known_end(window) {
            return Err(RunError { ended_below: true, ..end.went_back(stream_sequence, window).into() });
        }
        // No message settles by an id alone where the chain says that it was not stored.
        if !shared && batch.refused.is_none() && count >= batch.sent && stream_sequence != end.expected_last {
            let expected = end.expected_last;
            let text = format!("the batch ended at target sequence {stream_sequence}, not at {expected}");
            let ended_below = stream_sequence < expected;
            return Err(RunError { ended_below, ..Error::retry(text).into() });
        }
        // The commit itself is not in the window.
        let count = count.min(batch.sent);
        let settled = settle_batch(&mut batch, count, window)?;
        end.log_batch(settled, window);
        if let Some(BatchRefusal { error, .. }) = batch.refused {
            if error.api.is_some() && count == batch.sent {
                let target = end.stream();
                let text = format!(
                    "another stream than target stream `{target}` listens on the same subjects: it refused what the target \
                     stored: {error}"
                );
                return Err(Error::hold(text).into());
            }
            return Err(refusal(error, window.source_of(batch.first + batch.settled)));
        }
        if batch.settled < batch.sent {
            return Err(Error::retry("the target ended the batch before its end").into());
        }
        if shared {
            if placed {
                window.set_target_seq(batch.first + batch.sent - 1, stream_sequence);
                end.log_settled(stream_sequence, stream_sequence);
            }
            end.expected_last = end.expected_last.max(stream_sequence);
        }
        Ok(())
    }

    /// Whether the target owes an ack for messages that were sent: within a batch it sends one per several messages, so
    /// on a slow connection there may be none for long.
    pub fn is_owed(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| {
            let distance = batch.every.map_or(0, u64::from);
            batch.committing.is_some() || batch.sent - batch.settled >= distance
        })
    }

    /// Whether the run has to end because the target refused something, or does not answer a commit.
    pub fn outcome(&self, window: &Window, drained: Instant, now: Instant) -> Result<(), RunError> {
        match &self.batch {
            // A batch whose first message was refused never began, and has no end.
            Some(OpenBatch { refused: Some(refused), first, .. })
                if refused.sequence == Some(1) || now.duration_since(refused.at) > END_WAIT =>
            {
                // Without the end, and without its sequence, it is not known which message it was.
                let token = refused.sequence.and_then(|sequence| (*first + sequence).checked_sub(1));
                Err(refusal(refused.error.clone(), token.and_then(|token| window.source_of(token))))
            }
            Some(OpenBatch { committing: Some(at), last_ack, .. })
                if now.duration_since(drained.max(*last_ack).max(*at)) > COMMIT_WAIT =>
            {
                Err(RunError::stalled(
                    ErrorSide::Target,
                    format!("the target has not confirmed the end of a batch for {COMMIT_WAIT:?}"),
                ))
            }
            _ => Ok(()),
        }
    }

    /// When [`Batches::commit`] is due next; `None` without an open batch.
    pub fn next_commit(&self, supply: Supply, shared: bool) -> Option<Instant> {
        let batch = self.batch.as_ref()?;
        if batch.committing.is_some() {
            return None;
        }
        if let Some(refused) = &batch.refused {
            // If the refused message was the last one, only a commit makes the server end the batch.
            return Some(refused.at);
        }
        if self.unproven || batch.doubted {
            return Some(batch.last_sent);
        }
        let ack_is_due = batch.sent - batch.settled >= u64::from(batch.every.unwrap_or(batch.flow));
        let mut due = match supply {
            // No more may be sent, and no ack is due that would change that.
            Supply::Barred if !ack_is_due && batch.every.is_some() => Some(batch.last_sent),
            // The ack is on its way, however long that takes: a commit would only cost one more.
            Supply::Coming | Supply::Barred if ack_is_due => None,
            Supply::Coming | Supply::Barred => Some(batch.last_sent + COMMIT_AFTER),
            Supply::Dry => Some(batch.last_sent + COMMIT_IDLE),
        };
        if !ack_is_due && batch.sent > batch.settled {
            due = due.map(|at| at.min(batch.last_ack + COMMIT_AFTER));
        }
        if shared {
            let shared = batch.opened + COMMIT_SHARED;
            due = Some(due.map_or(shared, |at| at.min(shared)));
        }
        due
    }

    /// Ends the open batch, if there is one, so that every message sent so far gets an ack. Writes the reply subject of
    /// that commit; `false` if there is no batch to commit.
    pub fn commit(&mut self, out: &mut BytesMut, inbox: &str, now: Instant) -> bool {
        let Some(batch) = &mut self.batch else { return false };
        if batch.committing.replace(now).is_some() {
            return false;
        }
        fast_ingest::reply_subject(out, inbox, batch.id, batch.flow, batch.sent + 1, Operation::Commit);
        true
    }
}

/// Handles an ack of a batch that is over.
fn accept_former(ack: Ack, end: &TargetEnd) -> Result<(), RunError> {
    match ack {
        Ack::End { stream, domain, .. } => Ok(end.expect_stream(&stream, domain.as_deref())?),
        Ack::Failed { error: Some(error), .. } if error.err_code == STREAM_NOT_EXPECTED => {
            Err(end.explained(error).into())
        }
        _ => Ok(()),
    }
}

/// Distance between acks to request: several fit into the messages that may be in flight, whatever their size.
fn flow(limits: &Limits, message_bytes: usize) -> u32 {
    let messages = limits.messages_in_flight.min(limits.bytes_in_flight / message_bytes.max(1));
    FLOW.min(u32::try_from(messages / 4).unwrap_or(FLOW)).max(1)
}

/// Settles a batch up to and with this sequence of it; returns the settled messages.
fn settle_batch(batch: &mut OpenBatch, sequence: u64, window: &mut Window) -> Result<Range<Token>, Error> {
    let first = batch.first + batch.settled;
    if sequence > batch.settled {
        if sequence > batch.sent {
            return Err(Error::retry(format!(
                "the target acknowledged message {sequence} of a batch of {}",
                batch.sent
            )));
        }
        batch.settled = sequence;
        window.settle_through(batch.first + sequence - 1).map_err(window_error)?;
    }
    Ok(first..batch.first + batch.settled)
}
