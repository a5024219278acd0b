//! Sends each message as a publish of its own: each gets an ack that names the stream and the sequence.
//!
//! A change of leaders refuses some messages (no responders) and stores later ones. So after a refusal the messages in
//! flight settle first, and then the run ends. The stored messages are no prefix: the next start searches for them one
//! by one.

use bytes::BytesMut;
use nats_lane::{Error, ErrorKind, Message, headers, jetstream::PublishAck, parser::number};

use crate::copy::{
    Error as RunError,
    flow::window::{Token, Window},
    target::{
        frame::digits,
        refusal::{STREAM_NOT_EXPECTED, no_responders, refusal},
        target_end::{TargetEnd, window_error},
    },
};

/// The content of the ack of one publish.
#[derive(Debug, Clone, Copy)]
struct Published {
    seq: u64,
    duplicate: bool,
}

/// The publishes of one run. Of several refusals that of the oldest message counts; the next run knows the others
/// if they are permanent.
#[derive(Debug)]
pub(in crate::copy) struct Pipelined {
    sent: u64,
    /// Every sequence after the floor and up to here is that of a message of ours.
    pub exact: u64,
    /// Number of messages of ours after that.
    stored: u64,
    refusal: Option<(Token, Error)>,
    for_good: Vec<(Token, Error)>,
    /// Messages in the window that were refused and so never settle.
    unstored: usize,
    /// Messages refused so far.
    pub refused: u64,
}

impl Pipelined {
    /// For a target that ends at `floor`, before the first publish.
    pub fn new(floor: u64) -> Self {
        let (refusal, for_good) = (None, Vec::new());
        Self { sent: 0, exact: floor, stored: 0, refusal, for_good, unstored: 0, refused: 0 }
    }

    /// Whether the next message is the first.
    pub fn opens(&self) -> bool {
        self.sent == 0
    }

    /// Whether nothing was refused.
    pub fn ready(&self) -> bool {
        self.refusal.is_none()
    }

    /// Length of the next reply subject beside the inbox.
    pub fn reply_len(&self) -> usize {
        digits(self.sent + 1) + 1
    }

    /// Writes the reply subject of the next message.
    pub fn reply(&mut self, out: &mut BytesMut, inbox: &str, token: Token) {
        self.sent += 1;
        let mut number = itoa::Buffer::new();
        out.extend_from_slice(inbox.as_bytes());
        out.extend_from_slice(b".");
        out.extend_from_slice(number.format(token).as_bytes());
    }

    /// Takes an ack.
    pub fn accept(&mut self, message: &Message<'_>, end: &mut TargetEnd, window: &mut Window) -> Result<(), RunError> {
        let token = message.subject.rsplit(|b| *b == b'.').next().and_then(number);
        let Some(token) = token else { return Ok(()) };
        let unavailable = headers::status(message.header) == Some(503);
        match if unavailable { Err(no_responders()) } else { published(message.payload, end) } {
            Ok(Published { seq, duplicate }) => {
                // A new message is stored after everything that was stored before.
                if !duplicate && seq <= end.known_end(window) {
                    return Err(end.went_back(seq, window).into());
                }
                end.expected_last = end.expected_last.max(seq);
                self.count(seq, end);
                window.settle(token, Some(seq)).map_err(window_error)?;
                end.log_settled(seq, seq);
                Ok(())
            }
            // Another stream listens on the subject too: whatever the other answer says, no more may be sent there.
            Err(error) if error.is_api(STREAM_NOT_EXPECTED) || error.api.is_none() && error.kind == ErrorKind::Hold => {
                let unheard = window.source_of(token).map(|source| source.seq);
                Err(RunError { unheard, ..error.into() })
            }
            Err(error) => {
                self.refuse(token, error);
                Ok(())
            }
        }
    }

    fn refuse(&mut self, token: Token, error: Error) {
        self.refused += 1;
        self.unstored += 1;
        if error.kind == ErrorKind::Poison {
            self.for_good.push((token, error.clone()));
        }
        if self.refusal.as_ref().is_none_or(|(oldest, _)| token < *oldest) {
            self.refusal = Some((token, error));
        }
    }

    /// Counts a message of ours at this sequence; also those of an earlier run that arrived after the start of this
    /// one.
    fn count(&mut self, seq: u64, end: &TargetEnd) {
        self.stored += u64::from(seq > self.exact);
        if self.exact + self.stored == end.expected_last {
            (self.exact, self.stored) = (end.expected_last, 0);
        }
    }

    /// Up to here, as far as sequences show, the target holds only messages of ours that it confirmed.
    pub fn adds_up_to(&self, end: &TargetEnd) -> u64 {
        let counts = !end.is_shared();
        if counts && self.exact != end.expected_last { self.exact } else { u64::MAX }
    }

    /// Whether the run has to end because the target refused a message, or another writer wrote to it.
    pub fn outcome(&mut self, end: &TargetEnd, window: &Window) -> Result<(), RunError> {
        // Every sequence is that of a message of ours.
        let (last, ours) = (end.expected_last, self.exact + self.stored);
        if !end.is_shared() && last > ours + window.len() as u64 {
            let message = format!("the target's last sequence is {last} where our messages would make it {ours}");
            return Err(Error { kind: ErrorKind::ChainBroken, message, api: None }.into());
        }
        // Messages in flight after a refusal settle first: otherwise they are found at the target at the next start.
        let Some((token, error)) = self.refusal.as_ref().filter(|_| window.in_flight() <= self.unstored) else {
            return Ok(());
        };
        let all = self.for_good.drain(..).flat_map(|(token, error)| refusal(error, window.source_of(token)).refused);
        Err(RunError { refused: all.collect(), ..refusal(error.clone(), window.source_of(*token)) })
    }
}

/// Parses the target's answer to one message.
fn published(payload: &[u8], end: &TargetEnd) -> Result<Published, Error> {
    let ack = PublishAck::parse(payload, "the target").map_err(|error| end.explained(error))?;
    end.expect_stream(&ack.stream, ack.domain.as_deref())?;
    if ack.seq == 0 {
        // Servers of 2.10 answer so for an id whose message is not stored yet: that proves nothing.
        return Err(Error::retry("the target acknowledged a duplicate that it has not stored yet"));
    }
    Ok(Published { seq: ack.seq, duplicate: ack.duplicate })
}
