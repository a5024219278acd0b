//! Requests over a lane, and how long their answers are waited for.

use bytes::Bytes;
use tokio::time::{Duration, Instant, timeout_at};

use super::{ASK_AGAIN, Lane, REQUEST_TIMEOUT, Turn};
use crate::{Error, headers};

impl Lane {
    /// Sends a request and waits for its answer's payload, for as long as bytes arrive and a little longer. Messages
    /// for other subscriptions that arrive meanwhile are lost. It may be carried
    /// out twice.
    pub async fn request(&mut self, subject: &str, payload: &[u8]) -> Result<Bytes, Error> {
        self.request_beside(subject, payload, |_, _| {}).await
    }

    /// [`Lane::request`] beside requests that were sent before: `others` takes the reply subjects and the payloads of what
    /// answers those meanwhile.
    pub async fn request_beside(
        &mut self,
        subject: &str,
        payload: &[u8],
        others: impl FnMut(&[u8], Bytes),
    ) -> Result<Bytes, Error> {
        let answer = self.ask(subject, payload, REQUEST_TIMEOUT, others).await?;
        answer.ok_or_else(|| self.silent(subject))
    }

    /// [`Lane::request`] that waits `limit` after the last byte that moved; `None` if no answer came by then.
    pub async fn request_within(
        &mut self,
        subject: &str,
        payload: &[u8],
        limit: Duration,
    ) -> Result<Option<Bytes>, Error> {
        self.ask(subject, payload, limit, |_, _| {}).await
    }

    async fn ask(
        &mut self,
        subject: &str,
        payload: &[u8],
        limit: Duration,
        mut others: impl FnMut(&[u8], Bytes),
    ) -> Result<Option<Bytes>, Error> {
        let reply = self.send_request(subject, payload);
        let mut patience = Patience::begin(self, limit);
        let mut sent = Instant::now();
        loop {
            let again = sent.max(patience.since(self)) + ASK_AGAIN;
            let turn = match timeout_at(again.min(patience.until(self)), self.turn()).await {
                Ok(turn) => turn?,
                Err(_) if patience.is_over(self) => return Ok(None),
                Err(_) => {
                    self.check_delivery();
                    let now = Instant::now();
                    if now >= sent.max(patience.since(self)) + ASK_AGAIN {
                        // One that waits here itself, or whose answer is arriving, needs no second one.
                        if self.output.is_empty() {
                            self.publish(subject, &reply, payload);
                        }
                        sent = now;
                    }
                    if self.question.is_none() {
                        // It may wait in the system's buffers, behind other commands.
                        self.ping();
                        self.check_delivery();
                    }
                    continue;
                }
            };
            let Turn::Received(batch) = turn else { continue };
            let mut answer = None;
            for message in batch.iter().filter(|message| message.sid == Self::REQUEST_SID) {
                if message.subject != reply.as_bytes() {
                    others(message.subject, batch.data.slice_ref(message.payload));
                } else if headers::status(message.header) == Some(503) {
                    return Err(Error::retry(format!("no responders for `{subject}` at `{}`", self.address)));
                } else {
                    answer = Some(batch.data.slice_ref(message.payload));
                }
            }
            if answer.is_some() {
                return Ok(answer);
            }
        }
    }

    /// Waits for answers to requests that were sent: reply subjects and payloads of what arrived. Like
    /// [`Lane::request`], it loses messages for other subscriptions.
    pub async fn answers(&mut self) -> Result<Vec<(Vec<u8>, Bytes)>, Error> {
        let mut patience = Patience::begin(self, REQUEST_TIMEOUT);
        loop {
            let turn = match timeout_at(patience.until(self), self.turn()).await {
                Ok(turn) => turn?,
                Err(_) if patience.is_over(self) => return Err(self.silent("several requests")),
                Err(_) => continue,
            };
            let Turn::Received(batch) = turn else { continue };
            let answers = batch.iter().filter(|message| message.sid == Self::REQUEST_SID);
            let answers: Vec<_> =
                answers.map(|message| (message.subject.to_vec(), batch.data.slice_ref(message.payload))).collect();
            if !answers.is_empty() {
                return Ok(answers);
            }
        }
    }

    pub(super) fn silent(&self, subject: &str) -> Error {
        Error::retry(format!(
            "no answer to `{subject}` from `{}`: nothing arrived for {REQUEST_TIMEOUT:?}",
            self.address
        ))
    }
}

/// How long an answer is waited for: its time counts from the last byte that moved. A slow line is no silent server, and
/// the answer may be queued after other messages. PONGs say nothing about it, nor does what is written after the question.
#[derive(Debug)]
pub(super) struct Patience {
    since: Instant,
    written: u64,
    /// The question is written when the system has taken this many bytes.
    question: u64,
    /// An answer that has not arrived when nothing moved for this long is given up.
    limit: Duration,
}

impl Patience {
    pub(super) fn begin(lane: &Lane, limit: Duration) -> Self {
        let question = lane.written + lane.output.len() as u64;
        Self { since: Instant::now(), written: lane.written, question, limit }
    }

    /// Since when nothing has moved.
    fn since(&mut self, lane: &Lane) -> Instant {
        if lane.written > self.written && self.written < self.question {
            (self.since, self.written) = (Instant::now(), lane.written);
        }
        self.since = self.since.max(lane.arrived_at).max(lane.drained);
        self.since
    }

    pub(super) fn until(&mut self, lane: &Lane) -> Instant {
        self.since(lane) + self.limit
    }

    pub(super) fn is_over(&mut self, lane: &Lane) -> bool {
        Instant::now() >= self.until(lane)
    }
}
