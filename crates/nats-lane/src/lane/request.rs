//! Requests over a lane, and how long their answers may take.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use super::{Lane, Turn};
use crate::{Error, headers};

/// If nothing arrives for this long, a request gives up waiting for its answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// If nothing arrives for this long, a request is sent again: a request that arrives while the stream has no leader gets no
/// answer, even after the next leader is elected. While bytes of messages arrive, the answer may be among them or queued
/// after them.
const ASK_AGAIN: Duration = Duration::from_secs(1);

impl Lane {
    /// Subscription that answers to requests come for.
    pub const REQUEST_SID: u64 = 1;

    /// Writes everything and waits until the server has read it. Messages that arrive meanwhile are lost.
    pub async fn round_trip(&mut self) -> Result<(), Error> {
        self.ping();
        // An earlier one may not be answered yet.
        let own = self.pings;
        let mut patience = Patience::begin(self, REQUEST_TIMEOUT);
        while self.pongs < own {
            let until = patience.until(self).min(Instant::now() + ASK_AGAIN);
            let answered = async {
                if !self.output.is_empty() || self.unflushed {
                    return self.turn().await.map(drop);
                }
                self.read_more().await
            };
            match timeout_at(until, answered).await {
                Ok(answered) => answered?,
                Err(_) => {
                    self.check_delivery();
                    if patience.is_over(self) {
                        return Err(self.silent("PING"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Sends a request whose answer will be received by [`Lane::turn`] as a message with sid
    /// [`Lane::REQUEST_SID`] and the returned subject.
    pub fn send_request(&mut self, subject: &str, payload: &[u8]) -> String {
        self.next_request += 1;
        let reply = format!("{}.r.{}", self.inbox, self.next_request);
        self.publish(subject, &reply, payload);
        reply
    }

    /// The same with a header block.
    pub fn send_request_with(&mut self, subject: &str, header: &[u8], payload: &[u8]) -> String {
        self.next_request += 1;
        let reply = format!("{}.r.{}", self.inbox, self.next_request);
        headers::publish(&mut self.output, subject.as_bytes(), reply.as_bytes(), header, payload);
        reply
    }

    /// Sends a request and waits for its answer's payload, for as long as bytes arrive and a little longer. Messages
    /// for other subscriptions that arrive meanwhile are lost. The server may carry out the request twice.
    pub async fn request(&mut self, subject: &str, payload: &[u8]) -> Result<Bytes, Error> {
        self.request_beside(subject, payload, |_, _| {}).await
    }

    /// [`Lane::request`] beside requests that were sent before: `others` gets the reply subjects and the payloads of
    /// their answers that arrive meanwhile.
    ///
    /// # Errors
    /// As [`Lane::request`].
    pub async fn request_beside(
        &mut self,
        subject: &str,
        payload: &[u8],
        others: impl FnMut(&[u8], Bytes),
    ) -> Result<Bytes, Error> {
        let answer = self.ask(subject, payload, REQUEST_TIMEOUT, others).await?;
        answer.ok_or_else(|| self.silent(subject))
    }

    /// [`Lane::request`] that waits `limit` after the last byte that moved; `None` if no answer arrived by then.
    ///
    /// # Errors
    /// As [`Lane::request`].
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
                        // It may wait in the system's buffers, after other commands.
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
                    others(message.subject, batch.shared(message.payload));
                } else if headers::status(message.header) == Some(503) {
                    return Err(Error::retry(format!("no responders for `{subject}` at `{}`", self.address)));
                } else {
                    answer = Some(batch.shared(message.payload));
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
                answers.map(|message| (message.subject.to_vec(), batch.shared(message.payload))).collect();
            if !answers.is_empty() {
                return Ok(answers);
            }
        }
    }

    fn silent(&self, subject: &str) -> Error {
        Error::retry(format!(
            "no answer to `{subject}` from `{}`: nothing arrived for {REQUEST_TIMEOUT:?}",
            self.address
        ))
    }
}

/// How long an answer is waited for: its time counts from the last byte that moved. A slow line is no silent server, and
/// the answer may be queued after other messages. PONGs say nothing about it, nor does what is written after the question.
#[derive(Debug)]
struct Patience {
    since: Instant,
    written: u64,
    /// The question is written when the system has taken this many bytes.
    question: u64,
    /// How long nothing may move before the wait ends.
    limit: Duration,
}

impl Patience {
    fn begin(lane: &Lane, limit: Duration) -> Self {
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

    fn until(&mut self, lane: &Lane) -> Instant {
        self.since(lane) + self.limit
    }

    fn is_over(&mut self, lane: &Lane) -> bool {
        Instant::now() >= self.until(lane)
    }
}
