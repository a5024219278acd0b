//! Dead letters: messages that the target can never store, published at the source side instead, over the source lane.
//! Each is settled by the ack of the stream that stores it, and carries an id, so that one that is sent again after a
//! crash is dropped inside that stream's duplicate window.

use std::collections::VecDeque;

use nats_lane::{
    Error, ErrorKind, Lane, Message, excerpt, headers,
    jetstream::{PublishAck, StreamInfo},
    parser::number,
};
use tokio::time::{Duration, Instant};

use crate::{
    copy::{
        Error as RunError, ErrorKind as RunErrorKind, PoisonMessage,
        flow::window::SourcePoint,
        source::reader::Incoming,
        target::{
            frame::{MAX_HEADER, MessageId, hpub},
            headers::{end_line, first_line, push},
            provenance::{MessageOrigin, Tag},
        },
    },
    names,
    store::SourceMessage,
};

/// How long the ack of a dead letter may take once the server has read it: over a slow line a large one may be on its way for
/// long. A lane whose server is silent gives up before.
const ACK_WAIT: Duration = Duration::from_secs(20);
/// An ack that takes longer than this is followed by a PING: its answer shows that the server has read the letter.
const ASK: Duration = Duration::from_millis(1_500);
/// Most bytes of an error in a dead letter.
const ERROR_MAX: usize = 1024;

/// Dead letters of one run.
#[derive(Debug)]
pub(crate) struct DeadLetters {
    subject: String,
    tag: Tag,
    /// The source stream, which must not store them.
    source_stream: String,
    id: MessageId,
    sid: u64,
    inbox: String,
    /// In flight, in source order; an acknowledged one leaves when it is the first.
    waiting: VecDeque<Letter>,
    /// Number of the first of them.
    first: u64,
    bytes: usize,
    header: Vec<u8>,
}

/// One dead letter.
#[derive(Debug)]
pub(crate) struct Letter {
    /// Sequence and time of the message at the source.
    pub source: SourcePoint,
    /// Its subject, shortened.
    subject: String,
    /// Bytes of the message as it was read.
    pub bytes: usize,
    /// Why the target can never store it.
    pub reason: String,
    sent: Instant,
    /// Number of a PING after it.
    ping: Option<u64>,
    /// When the server had read it, as far as it was noticed.
    read: Option<Instant>,
    stored: bool,
}

impl DeadLetters {
    /// Prepares for publishing over the source lane. Ids differ between generations.
    pub fn open(lane: &mut Lane, subject: &str, replication: &str, stream: &str, tag: Tag, generation: u64) -> Self {
        let (sid, inbox) = lane.open_inbox();
        Self {
            subject: subject.to_owned(),
            tag,
            source_stream: stream.to_owned(),
            // Never the id of the copy itself: one stream may get both. A blank is in no replication's id.
            id: MessageId::new(&format!("{replication} dead letter"), stream, generation),
            sid,
            inbox,
            waiting: VecDeque::new(),
            first: 1,
            bytes: 0,
            header: Vec::new(),
        }
    }

    /// Number in flight.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of the messages in flight.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The oldest in flight.
    pub fn oldest(&self) -> Option<SourcePoint> {
        self.waiting.front().map(|letter| letter.source)
    }

    /// Publishes a message with the reason why the target can never store it.
    pub fn send(
        &mut self,
        lane: &mut Lane,
        incoming: &Incoming<'_>,
        reason: &Error,
        now: Instant,
    ) -> Result<(), RunError> {
        let (seq, time_ns) = (incoming.delivery.stream_seq, incoming.delivery.time_ns);
        let origin = MessageOrigin { seq, time_ms: time_ns.div_euclid(1_000_000) };
        let about =
            About { id: self.id.for_message(seq, time_ns), subject: incoming.message.subject, reason: &reason.message };
        header_block(&mut self.header, incoming.message.header, &self.tag, origin, &about);
        let source = SourcePoint { seq, time_ns: Some(time_ns) };
        let letter = Letter {
            source,
            subject: excerpt(&String::from_utf8_lossy(incoming.message.subject)).into_owned(),
            bytes: incoming.bytes(),
            reason: reason.message.clone(),
            sent: now,
            ping: None,
            read: None,
            stored: false,
        };
        let (size, most) = (self.header.len() + incoming.message.payload.len(), lane.info().max_payload);
        if self.header.len() > MAX_HEADER || size > most {
            let header = self.header.len();
            let error = Error::hold(format!(
                "with the added headers it has {size} bytes, {header} of them headers, and the source takes {most} and {MAX_HEADER}"
            ));
            return Err(self.unpublished(&letter, error));
        }
        let number = self.first + self.waiting.len() as u64;
        let reply = format!("{}.{number}", self.inbox);
        hpub(lane.output(), self.subject.as_bytes(), reply.as_bytes(), &self.header, incoming.message.payload);
        self.bytes += letter.bytes;
        self.waiting.push_back(letter);
        Ok(())
    }

    /// Handles an ack, if the message is one; an error means that no stream stored the dead letter.
    pub fn accept(&mut self, message: &Message<'_>) -> Result<(), RunError> {
        if message.sid != self.sid {
            return Ok(());
        }
        let number = message.subject.rsplit(|b| *b == b'.').next().and_then(number);
        let index = number.and_then(|number| number.checked_sub(self.first));
        let Some(letter) = index.and_then(|index| self.waiting.get_mut(index as usize)) else { return Ok(()) };
        let stored = if headers::status(message.header) == Some(503) {
            Err(Error::hold("no stream listens there (no responders)"))
        } else {
            stored(message.payload, &self.source_stream)
        };
        match stored {
            Ok(()) => letter.stored = true,
            Err(error) => {
                let letter = &self.waiting[index.unwrap_or_default() as usize];
                return Err(self.unpublished(letter, error));
            }
        }
        Ok(())
    }

    /// Removes the oldest, once it is stored.
    pub fn pop(&mut self) -> Option<Letter> {
        self.waiting.front().filter(|letter| letter.stored)?;
        let letter = self.waiting.pop_front()?;
        self.first += 1;
        self.bytes -= letter.bytes;
        Some(letter)
    }

    /// Forgets all that are in flight.
    pub fn give_up(&mut self) {
        self.first += self.waiting.len() as u64;
        self.waiting.clear();
        self.bytes = 0;
    }

    /// Whether an ack is overdue: a subscriber that is no stream never sends one.
    pub fn check(&mut self, lane: &mut Lane, now: Instant) -> Result<(), RunError> {
        let Some(letter) = self.waiting.front_mut().filter(|letter| now.duration_since(letter.sent) > ASK) else {
            return Ok(());
        };
        let ping = *letter.ping.get_or_insert_with(|| {
            lane.ping();
            lane.pings()
        });
        if lane.answered_pings() >= ping {
            letter.read.get_or_insert(now);
        }
        lane.check_delivery();
        let since = letter.read.unwrap_or(letter.sent.max(lane.drained()));
        match self.waiting.front() {
            Some(letter) if now.duration_since(since) > ACK_WAIT => {
                Err(self.unpublished(letter, Error::hold(format!("no stream acknowledged it within {ACK_WAIT:?}"))))
            }
            _ => Ok(()),
        }
    }

    fn unpublished(&self, letter: &Letter, error: Error) -> RunError {
        let kind = if error.kind == ErrorKind::Retry { RunErrorKind::Retry } else { RunErrorKind::Hold };
        let message = format!(
            "{}; nor can it be published as a dead letter to `{}` at the source: {error}",
            letter.reason, self.subject
        );
        let source = letter.source.time_ns.map(|time_ns| SourceMessage { seq: letter.source.seq, time_ns });
        let content = Some((letter.subject.clone(), letter.bytes as u64));
        let poison = source.map(|message| Box::new(PoisonMessage { message, content }));
        RunError { poison: poison.filter(|_| kind == RunErrorKind::Hold), ..RunError::new(kind, message) }
    }
}

/// Whether an ack says that a stream stored a dead letter, and not the source stream.
fn stored(payload: &[u8], source_stream: &str) -> Result<(), Error> {
    // Any other answer is not that of a stream.
    let ack = PublishAck::parse(payload, "the source").map_err(|error| match error.api {
        Some(_) => error,
        None => Error::hold(error.message),
    })?;
    if ack.stream == source_stream {
        return Err(Error::hold(format!("source stream `{source_stream}` itself took it")));
    }
    if ack.seq == 0 {
        return Err(Error::retry("the source acknowledged a duplicate that it has not stored yet"));
    }
    Ok(())
}

/// Refuses a source stream that would store its own dead letters.
pub(crate) fn not_into_source(stream: &str, source: &StreamInfo, subject: &str) -> Result<(), Error> {
    match source.subjects().into_iter().find(|pattern| matches(pattern, subject)) {
        Some(pattern) => Err(Error::hold(format!(
            "`dead_letter.subject` `{subject}` is a subject of source stream `{stream}` itself (`{pattern}`): choose one that another stream stores"
        ))),
        None => Ok(()),
    }
}

/// Whether a subject matches a pattern.
fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, tokens.next()) {
            (_, None) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// The facts of a dead letter about its message.
struct About<'a> {
    id: &'a str,
    subject: &'a [u8],
    reason: &'a str,
}

/// Writes the header block of a dead letter into `out` (cleared first): the message's own, but with every header that a
/// server acts on renamed, then the facts about it and its origin.
fn header_block(out: &mut Vec<u8>, block: &[u8], tag: &Tag, origin: MessageOrigin, about: &About<'_>) {
    let body = first_line(out, block);
    // Before all others, as in a copy.
    push(out, "Nats-Msg-Id", about.id.as_bytes());
    let mut rest = body;
    while !rest.is_empty() {
        let end = headers::find_line_end(rest).map_or(rest.len(), |at| at + 2);
        if rest.starts_with(b"Nats-") {
            out.extend_from_slice(names::RENAMED_HEADER_PREFIX.as_bytes());
        }
        out.extend_from_slice(&rest[..end]);
        rest = &rest[end..];
    }
    end_line(out);
    push(out, names::DEAD_SUBJECT_HEADER, about.subject);
    push(out, names::DEAD_ERROR_HEADER, one_line(about.reason).as_bytes());
    tag.write(out, origin);
    out.extend_from_slice(b"\r\n");
}

/// A text that is the value of a header: no line ends, and not without bound.
fn one_line(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let end = (0..=ERROR_MAX.min(line.len())).rev().find(|end| line.is_char_boundary(*end)).unwrap_or_default();
    line[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(block: &str, reason: &str, expect: &str) {
        let mut out = b"old".to_vec();
        let about = About { id: "ID", subject: b"orders.new", reason };
        let origin = MessageOrigin { seq: 7, time_ms: 5 };
        header_block(&mut out, block.as_bytes(), &Tag::new("S", "SITE", "w"), origin, &about);
        assert_eq!(String::from_utf8_lossy(&out), expect, "{block}");
    }

    #[test]
    fn a_letter_tells_what_it_was_and_why() {
        check(
            "",
            "too large",
            "NATS/1.0\r\nNats-Msg-Id: ID\r\nChoria-SR-Subject: orders.new\r\nChoria-SR-Error: too large\r\n\
             Choria-SR-Source: S 7 SITE w 5\r\n\r\n",
        );
        check(
            "NATS/1.0\r\nA: 1\r\nno colon\r\nChoria-SR-Source: X 1 Y z 2\r\nb:2\r\n\r\n",
            "two\r\nlines",
            "NATS/1.0\r\nNats-Msg-Id: ID\r\nA: 1\r\nno colon\r\nChoria-SR-Source: X 1 Y z 2\r\nb:2\r\n\
             Choria-SR-Subject: orders.new\r\nChoria-SR-Error: two  lines\r\nChoria-SR-Source: S 7 SITE w 5\r\n\r\n",
        );
    }

    #[test]
    fn nothing_that_a_server_acts_on_is_replayed() {
        let lines = [
            "Nats-Msg-Id: a",
            "Nats-Expected-Stream: X",
            "Nats-Expected-Last-Msg-Id: y",
            "Nats-Expected-Last-Subject-Sequence: 4",
            "Nats-Rollup: all",
            "Nats-TTL: 1s",
            "Nats-Schedule: @at x",
            "Nats-Batch-Id: b",
            "Nats-Trace-Dest: t",
            "Nats-Trace-Only: true",
            "Nats-Incr: +1",
            "Nats-Stream-Source: s",
            "Nats-Required-Api-Level: 9",
            "Nats-Whatever-Comes: 1",
        ];
        let block = format!("NATS/1.0\r\n{}\r\n\r\n", lines.join("\r\n"));
        let mut out = Vec::new();
        let about = About { id: "ID", subject: b"s", reason: "r" };
        header_block(
            &mut out,
            block.as_bytes(),
            &Tag::new("S", "SITE", "w"),
            MessageOrigin { seq: 1, time_ms: 1 },
            &about,
        );
        let found: Vec<_> = headers::lines(&out).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        assert_eq!(found[0], "Nats-Msg-Id: ID");
        assert!(found[1..].iter().all(|line| !line.starts_with("Nats-")), "{found:?}");
        for line in lines {
            assert!(found.contains(&format!("Choria-SR-{line}")), "{line} is not in {found:?}");
        }
    }

    #[test]
    fn an_error_has_a_bound() {
        assert_eq!(one_line(&"x".repeat(5000)).len(), ERROR_MAX);
        assert_eq!(one_line(&"\u{fc}".repeat(1000)).len(), ERROR_MAX);
        assert_eq!(one_line(&format!("x{}", "\u{fc}".repeat(1000))).len(), ERROR_MAX - 1);
        assert_eq!(one_line("a\u{0}b"), "a b");
    }

    #[test]
    fn a_source_does_not_store_its_own_dead_letters() {
        let check = |subjects: &[&str], subject: &str, captured: bool| {
            let source: StreamInfo =
                serde_json::from_value(json!({"config": {"subjects": subjects}, "state": {}})).unwrap();
            assert_eq!(not_into_source("S", &source, subject).is_err(), captured, "{subjects:?} {subject}");
        };
        check(&["orders.>"], "dead.orders", false);
        check(&["orders.>"], "orders.dead", true);
        check(&["orders.>"], "orders", false);
        check(&["a", "*.dead"], "orders.dead", true);
        check(&["*.dead"], "orders.dead.x", false);
        check(&["dead"], "dead", true);
        check(&[">"], "a.b.c", true);
        check(&[], "dead", false);
        check(&["dead.x"], "dead", false);
    }

    #[test]
    fn only_another_stream_may_store_a_letter() {
        let kind = |payload: &str| stored(payload.as_bytes(), "S").map_err(|error| error.kind);
        assert_eq!(kind(r#"{"stream":"DLQ","seq":5}"#), Ok(()));
        assert_eq!(kind(r#"{"stream":"DLQ","seq":5,"duplicate":true}"#), Ok(()));
        assert_eq!(kind(r#"{"stream":"DLQ","seq":0,"duplicate":true}"#), Err(ErrorKind::Retry));
        assert_eq!(kind(r#"{"stream":"S","seq":5}"#), Err(ErrorKind::Hold));
        let full = r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"DLQ","seq":0}"#;
        assert_eq!(kind(full), Err(ErrorKind::Hold));
        assert_eq!(kind("+OK"), Err(ErrorKind::Hold));
    }
}
