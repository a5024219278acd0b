//! Jumps in the deliveries of a durable consumer without a filter. Each is compared with the stream's leader before a
//! message after it is copied. Most are harmless: the messages in between were deleted or expired. But a consumer may
//! be on a server that lags behind the stream, or its filter may have been changed; then the acks of later deliveries
//! would remove the skipped messages. Each server expires messages by its own clock, so the leader may have some for a
//! moment longer: messages that it still has are requested again for a while.

use std::collections::VecDeque;

use nats_lane::{
    Batch, Error, Lane,
    jetstream::{answer_in, decode_message, message_call, message_from_call},
};
use tokio::time::{Duration, Instant};
use tracing::debug;

use super::SILENCE;
/// Most questions in flight at a time.
const ASKED_TOGETHER: usize = 64;

/// Time between two questions about the same jump.
const AGAIN: Duration = Duration::from_millis(200);

/// Unexplained jumps, in order.
#[derive(Debug, Default)]
pub(super) struct Jumps {
    open: VecDeque<Jump>,
}

#[derive(Debug)]
struct Jump {
    /// No message was delivered from here to the sequence before `to`.
    from: u64,
    to: u64,
    asked: Option<JumpQuestion>,
    doubt: Option<Doubt>,
}

#[derive(Debug)]
struct JumpQuestion {
    request: String,
    at: Instant,
}

/// The leader has a message that was skipped.
#[derive(Debug, Clone, Copy)]
struct Doubt {
    /// The first such message.
    seq: u64,
    since: Instant,
    ask_at: Instant,
}

impl Jump {
    fn is_due(&self, now: Instant) -> bool {
        self.asked.is_none() && self.doubt.is_none_or(|doubt| now >= doubt.ask_at)
    }
}

impl Jumps {
    /// Notes that `to` was delivered, and the sequences from `from` to there were not.
    pub(super) fn jumped(&mut self, from: u64, to: u64) {
        self.open.push_back(Jump { from, to, asked: None, doubt: None });
    }

    /// Whether a message may be copied: no jump before it is open.
    pub(super) fn are_explained(&self, seq: u64) -> bool {
        self.open.front().is_none_or(|jump| seq < jump.to)
    }

    /// Whether the leader owes an answer.
    pub(super) fn is_asking(&self) -> bool {
        self.open.front().is_some_and(|jump| jump.asked.is_some())
    }

    /// Asks the leader for the first message that each jump may have skipped. For a single sequence, the answer has
    /// no message if all is well; for several, it has the next one in the stream.
    pub(super) fn ask_leader(&mut self, lane: &mut Lane, stream: &str, now: Instant) {
        for jump in self.open.iter_mut().take(ASKED_TOGETHER).filter(|jump| jump.is_due(now)) {
            let call = if jump.to - jump.from == 1 { message_call } else { message_from_call };
            let (what, body) = call(stream, jump.from);
            let subject = format!("{}.{what}", lane.api_prefix());
            let request = lane.send_request(&subject, body.to_string().as_bytes());
            jump.asked = Some(JumpQuestion { request, at: now });
        }
    }

    /// Handles the leader's answers; an error if the leader keeps a message that was skipped.
    pub(super) fn accept(&mut self, batch: &Batch, stream: &str, now: Instant) -> Result<(), Error> {
        let (mut failed, mut overdue) = (None, false);
        self.open.retain_mut(|jump| {
            let answer = jump.asked.as_ref().and_then(|asked| answer_in(batch, &asked.request));
            let found = match answer.map(|answer| answer.and_then(decode_message)) {
                None => return true,
                Some(Ok(found)) => found.map(|message| message.sequence).filter(|seq| *seq < jump.to),
                Some(Err(error)) => {
                    failed.get_or_insert(error);
                    return true;
                }
            };
            let Some(seq) = found else { return false };
            let since = jump.doubt.map_or(now, |doubt| doubt.since);
            overdue |= now.duration_since(since) > SILENCE;
            if jump.doubt.is_none() {
                debug!(
                    stream,
                    seq,
                    to = jump.to,
                    "the consumer skipped messages that the leader has: asking the leader again"
                );
            }
            jump.asked = None;
            jump.doubt = Some(Doubt { seq, since, ask_at: now + AGAIN });
            true
        });
        // The answers come in any order: the first jump is reported, whichever answer came first.
        let first = self.open.iter().find_map(|jump| jump.doubt.map(|doubt| passed_over(stream, doubt.seq, jump.to)));
        failed.or(first.filter(|_| overdue)).map_or(Ok(()), Err)
    }

    /// An error if the leader does not answer. Messages delivered meanwhile, the last at `delivered`, came before its
    /// answer.
    pub(super) fn check(&self, stream: &str, delivered: Instant, now: Instant) -> Result<(), Error> {
        let asked = self.open.front().and_then(|jump| jump.asked.as_ref());
        if asked.is_some_and(|asked| now.duration_since(asked.at.max(delivered)) > SILENCE) {
            return Err(Error::retry(format!(
                "the leader of stream `{stream}` does not answer within {SILENCE:?} which messages its consumer skipped"
            )));
        }
        Ok(())
    }
}

fn passed_over(stream: &str, seq: u64, to: u64) -> Error {
    Error::retry(format!(
        "the consumer of stream `{stream}` skipped sequence {seq}, which the stream leader has, and continued at {to}: it \
         is on a server that has to catch up, or it was changed"
    ))
}
