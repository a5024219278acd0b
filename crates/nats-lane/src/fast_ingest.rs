//! The wire of fast-ingest batches (ADR-50, server 2.14): reply subjects and acks. Pure.
//!
//! Every message of a batch carries the reply subject
//! `<inbox>.<batch id>.<flow>.<gap mode>.<batch sequence>.<operation>.$FI`. With gap mode `fail` the first
//! message that is refused or missing ends the batch: the stored messages are a prefix of it.

use bytes::BytesMut;
use serde::Deserialize;

use crate::{
    ApiError, Error,
    error::excerpt,
    headers,
    parser::{count, optional_count},
};

/// The effect of a message on its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Opens the batch and is its first message.
    Start = 0,
    /// Continues the batch.
    Append = 1,
    /// Ends the batch; this message itself is not stored.
    Commit = 3,
}

/// Writes the reply subject of one message.
pub fn reply_subject(out: &mut BytesMut, inbox: &str, batch: u64, flow: u32, sequence: u64, operation: Operation) {
    let mut number = itoa::Buffer::new();
    out.extend_from_slice(inbox.as_bytes());
    out.extend_from_slice(b".");
    out.extend_from_slice(number.format(batch).as_bytes());
    out.extend_from_slice(b".");
    out.extend_from_slice(number.format(flow).as_bytes());
    out.extend_from_slice(b".fail.");
    out.extend_from_slice(number.format(sequence).as_bytes());
    out.extend_from_slice(match operation {
        Operation::Start => b".0.$FI",
        Operation::Append => b".1.$FI",
        Operation::Commit => b".3.$FI",
    });
}

/// An answer on the inbox of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ack {
    /// Everything up to this batch sequence is stored; the next such ack comes `every` messages later.
    Progress {
        /// Batch sequence; 0 answers the start, when nothing is stored yet.
        sequence: u64,
        /// Distance to the next ack, in messages; at least 1.
        every: u32,
    },
    /// A message was refused, or one before it was missing. The end follows, or the batch is unknown by now.
    Failed {
        /// Batch sequence that was refused, where the server names it.
        sequence: Option<u64>,
        /// The server's error; `None` for a gap.
        error: Option<ApiError>,
    },
    /// The batch is over.
    End {
        /// Stream that stored it.
        stream: String,
        /// JetStream domain of that stream, if it has one.
        domain: Option<String>,
        /// Stream sequence of the last stored message.
        stream_sequence: u64,
        /// Number of batch sequences that are settled.
        count: u64,
    },
}

impl Ack {
    /// How many messages of the batch are stored by now, as long as none has failed.
    ///
    /// # Errors
    ///
    /// A message was refused or lost, and nothing after it will be stored.
    pub fn stored(self) -> Result<u64, Error> {
        match self {
            Self::Progress { sequence: stored, .. } | Self::End { count: stored, .. } => Ok(stored),
            Self::Failed { error: Some(error), .. } => Err(error.into()),
            Self::Failed { error: None, .. } => Err(Error::retry("a message of the batch was lost")),
        }
    }
}

/// Writes the messages of one batch, for a program that has nothing to publish beside it. Acks arrive on the inbox.
#[derive(Debug)]
pub struct BatchWriter {
    inbox: String,
    flow: u32,
    sent: u64,
    reply: BytesMut,
}

impl BatchWriter {
    /// A batch with acks on an inbox of the lane ([`Lane::open_inbox`](crate::Lane::open_inbox)), one for at most `flow`
    /// messages.
    pub fn new(inbox: String, flow: u32) -> Self {
        Self { inbox, flow, sent: 0, reply: BytesMut::new() }
    }

    /// Messages that were written.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Writes the next message, which the server stores as it is.
    pub fn append(&mut self, out: &mut BytesMut, subject: &[u8], header: &[u8], payload: &[u8]) {
        self.sent += 1;
        let operation = if self.sent == 1 { Operation::Start } else { Operation::Append };
        self.write(out, operation, subject, header, payload);
    }

    /// Ends the batch: [`Ack::End`] follows when everything is stored. The subject must be one of the stream's, and
    /// nothing is stored on it.
    pub fn commit(&mut self, out: &mut BytesMut, subject: &[u8]) {
        self.write(out, Operation::Commit, subject, b"", b"");
    }

    fn write(&mut self, out: &mut BytesMut, operation: Operation, subject: &[u8], header: &[u8], payload: &[u8]) {
        let sequence = if operation == Operation::Commit { self.sent + 1 } else { self.sent };
        self.reply.clear();
        reply_subject(&mut self.reply, &self.inbox, 1, self.flow, sequence, operation);
        headers::publish(out, subject, &self.reply, header, payload);
    }
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(rename = "type", default, borrow)]
    kind: Option<&'a str>,
    #[serde(default, deserialize_with = "count")]
    seq: u64,
    #[serde(default)]
    msgs: u32,
    error: Option<ApiError>,
    stream: Option<String>,
    domain: Option<String>,
    #[serde(default, deserialize_with = "optional_count")]
    count: Option<u64>,
}

/// Parses one ack; the error says why an answer is none.
pub fn parse_ack(payload: &[u8]) -> Result<Ack, String> {
    let wire: Wire<'_> =
        serde_json::from_slice(payload).map_err(|error| format!("an ack that is not valid: {error}"))?;
    match (wire.kind, wire.error, wire.stream) {
        (Some("ack"), None, _) => Ok(Ack::Progress { sequence: wire.seq, every: wire.msgs.max(1) }),
        (Some("gap"), error, _) => Ok(Ack::Failed { sequence: None, error }),
        (Some("err"), error, _) => Ok(Ack::Failed { sequence: Some(wire.seq), error }),
        (_, Some(error), _) => Ok(Ack::Failed { sequence: None, error: Some(error) }),
        (None, None, Some(stream)) => Ok(Ack::End {
            stream,
            domain: wire.domain,
            stream_sequence: wire.seq,
            // A plain publish ack has no count: the server did not take the message as part of a batch.
            count: wire.count.ok_or("the server does not know fast-ingest batches")?,
        }),
        _ => Err(format!("an ack of an unknown kind: {}", excerpt(&String::from_utf8_lossy(payload)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_subjects() {
        let mut out = BytesMut::new();
        reply_subject(&mut out, "_INBOX.x.2", 7, 500, 12, Operation::Append);
        assert_eq!(out, "_INBOX.x.2.7.500.fail.12.1.$FI");
    }

    #[test]
    fn acks_as_the_server_sends_them() {
        let check = |payload: &str, expect: Ack| assert_eq!(parse_ack(payload.as_bytes()), Ok(expect), "{payload}");
        check(r#"{"type":"ack","seq":0,"msgs":500}"#, Ack::Progress { sequence: 0, every: 500 });
        check(r#"{"type":"gap","last_seq":3,"seq":4}"#, Ack::Failed { sequence: None, error: None });
        let error = ApiError { code: 400, err_code: 10071, description: "wrong last sequence: 5".into() };
        check(
            r#"{"type":"err","seq":2,"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"}}"#,
            Ack::Failed { sequence: Some(2), error: Some(error.clone()) },
        );
        check(
            r#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"}}"#,
            Ack::Failed { sequence: None, error: Some(error) },
        );
        check(
            r#"{"stream":"T","seq":9,"batch":"7","count":4,"domain":"hub"}"#,
            Ack::End { stream: "T".into(), domain: Some("hub".into()), stream_sequence: 9, count: 4 },
        );
        assert!(parse_ack(br#"{"stream":"T","seq":9}"#).is_err());
        assert!(parse_ack(b"").is_err());
        assert!(parse_ack(b"{}").is_err());
    }
}
