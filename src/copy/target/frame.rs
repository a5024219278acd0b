//! The wire format of one message: subject, header block, ids, and checks for limits of servers. Written into
//! buffers that are reused from message to message.

use std::{fmt::Write as _, sync::Arc};

use bytes::BytesMut;
use nats_lane::{ApiError, Error, ErrorKind, Lane, jetstream::StreamInfo};
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    config::Replication,
    copy::{
        flow::window::{Token, Window},
        source::reader::Incoming,
        target::{
            headers::{Allowed, Passage, Stamp, header_block},
            provenance::{MessageOrigin, Tag},
            refusal::TOO_LARGE,
        },
    },
};

/// Longest protocol line in bytes, without its keyword, that a server accepts by default (`max_control_line`);
/// for a longer one it drops the connection.
pub(in crate::copy) const MAX_LINE: usize = 4096;
/// Longest header block that a server accepts, in bytes.
pub(in crate::copy) const MAX_HEADER: usize = 65_535;
/// First words of requests of the JetStream API.
const REQUESTS: [&[u8]; 7] = [b"INFO", b"STREAM", b"CONSUMER", b"DIRECT", b"ACCOUNT", b"META", b"SERVER"];

/// The identification of a message at the target.
#[derive(Debug, Clone, Copy)]
pub(in crate::copy) struct Stamping {
    /// The last sequence of the target that the message expects.
    pub chain: Option<u64>,
    /// Whether it carries an id.
    pub id: bool,
}

/// A prepared message: the next one that is put.
#[derive(Debug)]
pub(in crate::copy) struct Outgoing {
    /// Number of headers of the source message that it does not carry.
    headers_removed: u64,
}

/// Builds the frame of one message after the other.
#[derive(Debug)]
pub(in crate::copy) struct FrameWriter {
    replication: Arc<Replication>,
    tag: Tag,
    allowed: Allowed,
    /// Prefix of the subjects of the target's JetStream API.
    api_prefix: String,
    max_payload: usize,
    /// Largest message that the stream accepts, headers included; `None` without a limit.
    max_msg_size: Option<usize>,
    /// Longest protocol line that the target accepts.
    max_line: usize,
    /// The longest line that was sent, and its message.
    longest: (usize, Token),
    /// Buffer for a mapped subject.
    room: Vec<u8>,
    /// Subject and header block of the prepared message.
    subject: Vec<u8>,
    header: Vec<u8>,
    /// A subject that the target listens on, for a commit.
    pub last_subject: Vec<u8>,
    id: MessageId,
}

impl FrameWriter {
    /// For messages to the server of `lane`. Ids differ between generations.
    pub fn new(lane: &Lane, replication: Arc<Replication>, tag: Tag, allowed: Allowed, generation: u64) -> Self {
        Self {
            tag,
            allowed,
            api_prefix: lane.api_prefix().to_owned(),
            max_payload: lane.info().max_payload,
            max_msg_size: None,
            max_line: MAX_LINE,
            longest: (0, 0),
            room: Vec::new(),
            subject: Vec::new(),
            header: Vec::new(),
            last_subject: Vec::new(),
            id: MessageId::new(&replication.id, &replication.source.stream, generation),
            replication,
        }
    }

    /// Sets the longest protocol line that the target accepts, if that was measured.
    pub fn limit_line(&mut self, found: Option<usize>) {
        self.max_line = found.unwrap_or(MAX_LINE);
    }

    /// The longest protocol line that was sent, unless its message is confirmed.
    pub fn unconfirmed_line(&self, window: &Window) -> Option<usize> {
        let (line, token) = self.longest;
        window.source_of(token).map(|_| line)
    }

    /// Updates the limits of the target stream.
    pub fn target_is(&mut self, target: &StreamInfo) {
        self.max_msg_size = usize::try_from(target.number("max_msg_size")).ok().filter(|limit| *limit > 0);
    }

    /// Builds subject and headers of the next message; an error means that it can never be stored as it is. `reply` is
    /// the length of its reply subject; with `opens` it names its stream.
    pub fn prepare(
        &mut self,
        incoming: &Incoming<'_>,
        now_ns: i64,
        stamping: Stamping,
        reply: usize,
        opens: bool,
    ) -> Result<Outgoing, Error> {
        let mut headers_removed = self.write_header(incoming, now_ns, stamping, opens);
        self.subject.clear();
        let subject = self.replication.mapping.apply(incoming.message.subject, &mut self.room);
        self.subject.extend_from_slice(subject);
        match self.check(incoming, reply) {
            // Headers that only the first message of a batch carries are no reason to reject it.
            Err(_) if opens => {
                headers_removed = self.write_header(incoming, now_ns, stamping, false);
                self.check(incoming, reply)?;
            }
            checked => checked?,
        }
        Ok(Outgoing { headers_removed })
    }

    fn write_header(&mut self, incoming: &Incoming<'_>, now_ns: i64, stamping: Stamping, opens: bool) -> u64 {
        let delivery = incoming.delivery;
        let age_secs = now_ns.saturating_sub(delivery.time_ns).max(0) as u64 / 1_000_000_000;
        let stamp = Stamp {
            chain: stamping.chain,
            id: if stamping.id { Some(self.id.for_message(delivery.stream_seq, delivery.time_ns)) } else { None },
        };
        let passage = Passage {
            origin: MessageOrigin { seq: delivery.stream_seq, time_ms: delivery.time_ns.div_euclid(1_000_000) },
            age_secs,
            stamp,
            expected_stream: opens.then_some(self.replication.target.stream.as_str()),
        };
        let block = incoming.message.header;
        header_block(&mut self.header, block, self.allowed, &self.tag, &passage)
    }

    /// Writes the prepared message into `out`; returns how many of its headers were removed.
    pub fn put(&mut self, outgoing: Outgoing, out: &mut BytesMut, reply: &[u8], payload: &[u8], token: Token) -> u64 {
        let before = out.len();
        hpub(out, &self.subject, reply, &self.header, payload);
        let size = self.header.len() + payload.len();
        // Without keyword, blank and the two line ends.
        let line = out.len() - before - size - 9;
        if line > self.longest.0 {
            self.longest = (line, token);
        }
        std::mem::swap(&mut self.last_subject, &mut self.subject);
        outgoing.headers_removed
    }

    /// Detects, before it is sent, that a server would refuse the message or drop the connection for it, as far as that
    /// can be known.
    fn check(&self, incoming: &Incoming<'_>, reply: usize) -> Result<(), Error> {
        let (size, subject) = (self.header.len() + incoming.message.payload.len(), &self.subject);
        let mut api = None;
        let line = self.line(reply, self.header.len(), size);
        let what = if self.header.len() > MAX_HEADER {
            format!("its headers of {} bytes are longer than {MAX_HEADER}", self.header.len())
        } else if size > self.max_payload {
            format!("its {size} bytes are more than the target's max_payload of {}", self.max_payload)
        } else if let Some(limit) = self.max_msg_size.filter(|limit| size > *limit) {
            api = Some(ApiError { code: 400, err_code: TOO_LARGE, ..ApiError::default() });
            format!("its {size} bytes are more than the target stream's max_msg_size of {limit}")
        } else if line > self.max_line {
            let (subject, limit) = (subject.len(), self.max_line);
            format!(
                "its subject of {subject} bytes is too long: a protocol line of {line} bytes is more than the target's \
                 max_control_line of {limit}"
            )
        } else if subject.is_empty() {
            "its subject is empty after the mapping".to_owned()
        } else if is_request(subject, &self.api_prefix) {
            "its subject is that of a request or an ack, and the target would act on it".to_owned()
        } else {
            return Ok(());
        };
        let message = format!("message {} cannot be stored at the target: {what}", incoming.delivery.stream_seq);
        Err(Error { kind: ErrorKind::Poison, message, api })
    }

    /// Length of the protocol line of the prepared message, without its keyword.
    fn line(&self, reply: usize, header: usize, size: usize) -> usize {
        self.subject.len() + reply + digits(header as u64) + digits(size as u64) + 3
    }
}

/// How many digits a number has.
pub(in crate::copy) fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// Whether a server would act on a message with this subject, by the rights of our login, instead of storing it. Only
/// streams on all subjects have such messages, but a server may deliver any.
pub(in crate::copy) fn is_request(subject: &[u8], api_prefix: &str) -> bool {
    // Keys of buckets and the like may go through the same prefix.
    let acts = |word: Option<&[u8]>| word.is_some_and(|word| REQUESTS.contains(&word));
    if let Some(rest) = subject.strip_prefix(b"$JS.") {
        let mut words = rest.split(|byte| *byte == b'.');
        return match words.next() {
            Some(b"ACK" | b"FC") => true,
            Some(b"API") => acts(words.next()),
            // Of a domain.
            _ => words.next() == Some(b"API") && acts(words.next()),
        };
    }
    let rest = subject.strip_prefix(api_prefix.as_bytes()).and_then(|rest| rest.strip_prefix(b"."));
    rest.is_some_and(|rest| acts(rest.split(|byte| *byte == b'.').next()))
}

/// Writes one publish with headers.
pub(in crate::copy) fn hpub(out: &mut BytesMut, subject: &[u8], reply: &[u8], header: &[u8], payload: &[u8]) {
    let mut number = itoa::Buffer::new();
    out.reserve(subject.len() + reply.len() + header.len() + payload.len() + 64);
    out.extend_from_slice(b"HPUB ");
    out.extend_from_slice(subject);
    out.extend_from_slice(b" ");
    out.extend_from_slice(reply);
    out.extend_from_slice(b" ");
    out.extend_from_slice(number.format(header.len()).as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(number.format(header.len() + payload.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(header);
    out.extend_from_slice(payload);
    out.extend_from_slice(b"\r\n");
}

/// Builds message ids: different for a stream that was recreated or rolled back (other stored times), for a second
/// replication of the same stream, and for messages that are copied again after the position was moved back.
#[derive(Debug)]
pub(in crate::copy) struct MessageId {
    key: Vec<u8>,
    prefix: usize,
    text: String,
}

impl MessageId {
    pub fn new(replication: &str, stream: &str, generation: u64) -> Self {
        let mut key = [replication.as_bytes(), b"\0", stream.as_bytes(), b"\0"].concat();
        if generation > 0 {
            key.extend_from_slice(&generation.to_be_bytes());
        }
        Self { prefix: key.len(), key, text: String::with_capacity(32) }
    }

    /// The id of one message.
    pub fn for_message(&mut self, seq: u64, time_ns: i64) -> &str {
        self.key.truncate(self.prefix);
        self.key.extend_from_slice(&seq.to_be_bytes());
        self.key.extend_from_slice(&time_ns.to_be_bytes());
        self.text.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{:032x}", xxh3_128(&self.key));
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_messages_by_their_subject() {
        let check = |subject: &str, prefix: &str, expect: bool| {
            assert_eq!(is_request(subject.as_bytes(), prefix), expect, "{subject}");
        };
        for subject in ["$JS.API.STREAM.DELETE.T", "$JS.hub.API.INFO", "$JS.ACK.S.C.1.1.1.1.0", "$JS.FC.S.C.x"] {
            check(subject, "$JS.API", true);
        }
        check("owner.js.STREAM.DELETE.T", "owner.js", true);
        for subject in [
            "$JS.EVENT.ADVISORY.API",
            "$JSX.a",
            "$KV.B.k",
            "$O.B.M.x",
            "a.$JS.API.INFO",
            "owner.json",
            "$JS",
            "$JS.hub.API.$KV.B.k",
            "owner.js.$KV.B.INFO",
            "owner.js",
        ] {
            check(subject, "owner.js", false);
        }
    }

    #[test]
    fn ids_differ_in_every_part_and_stay_the_same() {
        let id = |replication: &str, stream: &str, generation, seq, time| {
            MessageId::new(replication, stream, generation).for_message(seq, time).to_owned()
        };
        let one = id("A", "S", 0, 1, 2);
        // The value is part of the contract: another program version must make the same one.
        assert_eq!(one, id("A", "S", 0, 1, 2));
        for other in [
            id("B", "S", 0, 1, 2),
            id("A", "T", 0, 1, 2),
            id("A", "S", 1, 1, 2),
            id("A", "S", 0, 2, 2),
            id("A", "S", 0, 1, 3),
        ] {
            assert_ne!(one, other);
        }
    }
}
