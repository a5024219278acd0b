//! Dead letters as a stream has them, and the messages that a replay publishes. Pure.
//!
//! A replay is a copy of the letter, not of the message that it was made of: it has one hop of provenance more. So no run takes
//! it for a copy of its own, whose sequence would say where to resume.

use nats_lane::{
    Error, headers,
    jetstream::{StoredMessage, StreamInfo},
};

use super::{
    frame::{MAX_HEADER, MAX_LINE, is_request},
    headers::{Allowed, Passage, Stamp, header_block},
    provenance::{MessageOrigin, Tag},
};
use crate::{config::Replication, names};

/// Length of a reply subject with room to spare.
const REPLY: usize = 100;

/// A dead letter of one replication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredLetter {
    /// Its sequence in the stream of dead letters.
    pub seq: u64,
    /// When it was stored there, nanoseconds since the Unix epoch.
    pub time_ns: i64,
    /// The message that it was made of.
    pub origin: MessageOrigin,
    /// Subject of that message.
    pub subject: String,
    /// Why the target could not store it.
    pub error: String,
    /// Bytes of the payload.
    pub payload: usize,
    /// Header block of that message; empty for none.
    pub header: Vec<u8>,
    /// The id of the letter, the same whenever the message is published as one.
    id: String,
}

/// Where a message is stored that the copy has passed: a replayed letter, or a repair.
#[derive(Debug)]
pub(crate) struct LaterTarget<'a> {
    pub replication: &'a Replication,
    pub site: &'a str,
    pub target: &'a StreamInfo,
    /// Prefix of the subjects of the target's JetStream API.
    pub api_prefix: &'a str,
    /// Largest message of the target's server.
    pub max_payload: usize,
    /// Whether `Nats-TTL` has its effect at both sides.
    pub ttl: bool,
    /// The time now, nanoseconds since the Unix epoch.
    pub now_ns: i64,
}

/// A message that is stored later.
#[derive(Debug)]
pub(super) struct LaterMessage<'a> {
    /// Subject and headers at the source.
    pub subject: &'a str,
    pub header: &'a [u8],
    /// Bytes of the payload, and of what is added to the headers later.
    pub payload: usize,
    pub origin: MessageOrigin,
    pub id: &'a str,
    /// The hop after that of the copy: no run takes it for the newest message that was copied, by which it would resume.
    pub hop: (Tag, MessageOrigin),
}

/// Subject and header block of a message to publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplayedMessage {
    pub subject: String,
    pub header: Vec<u8>,
}

impl ReplayedMessage {
    /// The target stores it only after this message of its subject; 0 for none. The line comes first, as in a copy.
    pub fn expect_last(&mut self, sequence: u64) {
        let at = headers::find_line_end(&self.header).map_or(self.header.len(), |end| end + 2);
        let line = format!("Nats-Expected-Last-Subject-Sequence: {sequence}\r\n");
        self.header.splice(at..at, line.into_bytes());
    }
}

impl LaterTarget<'_> {
    /// What is published: a copy with one hop more; an error if the target cannot store that. A rollup would remove newer messages:
    /// it is dropped.
    pub(super) fn publishes(&self, message: &LaterMessage<'_>) -> Result<ReplayedMessage, Error> {
        let LaterMessage { origin, hop: (hop, hop_origin), .. } = message;
        let mut room = Vec::new();
        let subject = self.replication.mapping.apply(message.subject.as_bytes(), &mut room);
        let subject = String::from_utf8_lossy(subject).into_owned();
        let passed_ms = self.now_ns.div_euclid(1_000_000).saturating_sub(origin.time_ms);
        let passage = Passage {
            origin: *origin,
            age_secs: u64::try_from(passed_ms / 1_000).unwrap_or_default(),
            stamp: Stamp { chain: None, id: Some(message.id) },
            expected_stream: Some(&self.replication.target.stream),
        };
        let mut header = Vec::new();
        let allowed = Allowed { ttl: self.ttl, ..Allowed::default() };
        header_block(&mut header, message.header, allowed, &letter_tag(self.replication, self.site), &passage);
        header.truncate(header.len() - 2);
        hop.write(&mut header, *hop_origin);
        header.extend_from_slice(b"\r\n");
        self.check(&subject, &header, message.payload)?;
        Ok(ReplayedMessage { subject, header })
    }

    /// An error if the target cannot store a message.
    fn check(&self, subject: &str, header: &[u8], payload: usize) -> Result<(), Error> {
        let size = header.len() + payload;
        let limit = usize::try_from(self.target.number("max_msg_size")).ok().filter(|limit| *limit > 0);
        let why = if subject.is_empty() {
            "its subject is empty after the mapping".to_owned()
        } else if is_request(subject.as_bytes(), self.api_prefix) {
            "its subject is that of a request or an ack, and the target would act on it".to_owned()
        } else if header.len() > MAX_HEADER {
            format!("its headers of {} bytes are longer than {MAX_HEADER}", header.len())
        } else if subject.len() + REPLY > MAX_LINE {
            format!("its subject of {} bytes is too long for a protocol line", subject.len())
        } else if size > self.max_payload {
            format!("its {size} bytes are more than the target's max_payload of {}", self.max_payload)
        } else if let Some(limit) = limit.filter(|limit| size > *limit) {
            format!("its {size} bytes are more than the target stream's max_msg_size of {limit}")
        } else {
            return Ok(());
        };
        Err(Error::hold(format!("the target cannot store it: {why}")))
    }
}

/// Why a message is not stored after a newer one of its subject.
pub(crate) const REPLACES_NEWER: &str = "the target has a newer message of its subject, which it would replace";

/// Whether a message of a stream replaces older ones of its subject.
pub(crate) fn keeps_last(stream: &StreamInfo) -> bool {
    stream.number("max_msgs_per_subject") > 0
}

/// The tag of a replication, as its dead letters carry it.
pub(crate) fn letter_tag(replication: &Replication, site: &str) -> Tag {
    Tag::new(&replication.source.stream, site, &replication.name).with_former(&replication.former)
}

impl StoredLetter {
    /// Reads a dead letter of the replication with this tag; `None` for any other message.
    pub fn read(message: &StoredMessage, tag: &Tag) -> Option<Self> {
        let origin = tag.origin(&message.header)?;
        let lines: Vec<&[u8]> = headers::lines(&message.header).collect();
        let [id, own @ .., subject, error, _] = lines.as_slice() else { return None };
        let text = |line: &[u8], name: &str| {
            headers::value_of(line, name.as_bytes()).map(|value| String::from_utf8_lossy(value).into_owned())
        };
        let id = text(id, "Nats-Msg-Id")?;
        let (subject, error) = (text(subject, names::DEAD_SUBJECT_HEADER)?, text(error, names::DEAD_ERROR_HEADER)?);
        let first = headers::lines_of(&message.header).next().unwrap_or_default();
        let mut header = Vec::new();
        if !own.is_empty() || first != headers::VERSION.trim_ascii_end() {
            header.extend_from_slice(first);
            header.extend_from_slice(b"\r\n");
            for line in own {
                let renamed = line.strip_prefix(names::RENAMED_HEADER_PREFIX.as_bytes());
                header.extend_from_slice(renamed.filter(|line| line.starts_with(b"Nats-")).unwrap_or(line));
                header.extend_from_slice(b"\r\n");
            }
            header.extend_from_slice(b"\r\n");
        }
        let StoredMessage { sequence: seq, time_ns, payload, .. } = *message;
        Some(Self { seq, time_ns, origin, subject, error, payload, header, id })
    }

    /// Bytes of subject, headers and payload of the message.
    pub fn bytes(&self) -> usize {
        self.subject.len() + self.header.len() + self.payload
    }

    /// What a replay publishes, with the id of the letter and the hop from the stream of the letters; an error if the target cannot
    /// store that.
    pub fn replay(&self, letters: &str, to: &LaterTarget<'_>) -> Result<ReplayedMessage, Error> {
        let own = MessageOrigin { seq: self.seq, time_ms: self.time_ns.div_euclid(1_000_000) };
        to.publishes(&LaterMessage {
            subject: &self.subject,
            header: &self.header,
            payload: self.payload,
            origin: self.origin,
            id: &self.id,
            hop: (Tag::new(letters, to.site, &to.replication.name), own),
        })
    }

    /// Whether a message of the target is the one of this letter: a replay, of another letter of the same message too, a repair,
    /// or a copy.
    pub fn is_stored_as(&self, message: &StoredMessage, tag: &Tag) -> bool {
        origin_at_target(message, tag) == Some(self.origin)
    }

    /// Whether it would replace a message of the target that is not older: a newer copy, or a message of another writer.
    pub fn would_replace(&self, message: &StoredMessage, tag: &Tag) -> bool {
        // Sequences of a recreated source begin again, and times can go back: it has to be later by both.
        let is_older = |there: MessageOrigin| there.seq < self.origin.seq && there.time_ms <= self.origin.time_ms;
        !origin_at_target(message, tag).is_some_and(is_older)
    }
}

/// What a message of the target was made of, if it is a copy, a repair or a replay of this replication.
fn origin_at_target(message: &StoredMessage, tag: &Tag) -> Option<MessageOrigin> {
    tag.origin(&message.header).or_else(|| tag.origin_of_later(&message.header))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config;

    const LETTER: &str = "NATS/1.0\r\nNats-Msg-Id: ID\r\nA: 1\r\nno colon\r\nChoria-SR-Nats-Msg-Id: own\r\n\
         Choria-SR-Nats-Rollup: all\r\nChoria-SR-Nats-TTL: 100\r\nChoria-SR-Subject: orders.new\r\nChoria-SR-Error: too \
         large\r\nChoria-SR-Source: S 7 SITE SITE 5000\r\n\r\n";

    fn stored(header: &str) -> StoredMessage {
        let header = header.as_bytes().to_vec();
        StoredMessage { subject: "dead.x".to_owned(), sequence: 3, time_ns: 9_000_000_000, header, payload: 10 }
    }

    fn replication(fields: serde_json::Value) -> Replication {
        let mut document = json!({"stream": "S", "source_url": "a", "target_url": "b", "target_stream": "T"});
        fields.as_object().unwrap().iter().for_each(|(name, value)| document[name] = value.clone());
        config::parse(document.to_string().as_bytes(), "SITE").unwrap()
    }

    fn replayed(letter: &StoredLetter, fields: serde_json::Value, target: serde_json::Value) -> Result<String, String> {
        let replication = replication(fields);
        let target: StreamInfo = serde_json::from_value(json!({"config": target, "state": {}})).unwrap();
        let to = LaterTarget {
            replication: &replication,
            site: "SITE",
            target: &target,
            api_prefix: "$JS.API",
            max_payload: 1000,
            ttl: true,
            now_ns: 45_000_000_000,
        };
        let replayed = letter.replay("DEAD", &to).map_err(|error| error.message)?;
        let message = StoredMessage { header: replayed.header.clone(), ..stored("") };
        let tag = letter_tag(&replication, "SITE");
        assert!(letter.is_stored_as(&message, &tag));
        assert_eq!(tag.origin(&message.header), None, "it is no copy of the run");
        Ok(format!("{} {}", replayed.subject, String::from_utf8(replayed.header).unwrap()))
    }

    #[test]
    fn a_letter_has_the_message_as_it_was() {
        let letter = StoredLetter::read(&stored(LETTER), &Tag::new("S", "SITE", "SITE")).unwrap();
        let original = "NATS/1.0\r\nA: 1\r\nno colon\r\nNats-Msg-Id: own\r\nNats-Rollup: all\r\nNats-TTL: 100\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&letter.header), original);
        assert_eq!(
            (letter.subject.as_str(), letter.error.as_str(), letter.id.as_str()),
            ("orders.new", "too large", "ID")
        );
        assert_eq!((letter.origin.seq, letter.origin.time_ms, letter.seq), (7, 5000, 3));
        let bare = "NATS/1.0\r\nNats-Msg-Id: ID\r\nChoria-SR-Subject: a\r\nChoria-SR-Error: e\r\nChoria-SR-Source: S 7 SITE \
                    SITE 5\r\n\r\n";
        assert_eq!(StoredLetter::read(&stored(bare), &Tag::new("S", "SITE", "SITE")).unwrap().header, b"");
    }

    #[test]
    fn other_messages_are_no_letters() {
        let tag = Tag::new("S", "SITE", "SITE");
        for other in [
            "",
            "NATS/1.0\r\nA: 1\r\n\r\n",
            &LETTER.replace("S 7 SITE SITE", "S 7 SITE other"),
            &LETTER.replace("Choria-SR-Error", "Choria-SR-Other"),
            &LETTER.replace("Nats-Msg-Id: ID\r\n", ""),
            "NATS/1.0\r\nChoria-SR-Source: S 7 SITE SITE 5\r\n\r\n",
        ] {
            assert_eq!(StoredLetter::read(&stored(other), &tag), None, "{other}");
        }
    }

    #[test]
    fn a_replay_is_a_copy_with_one_hop_more() {
        let letter = StoredLetter::read(&stored(LETTER), &Tag::new("S", "SITE", "SITE")).unwrap();
        let expect = "x.orders.new NATS/1.0\r\nNats-Msg-Id: ID\r\nNats-Expected-Stream: T\r\nA: 1\r\nno colon\r\n\
             Choria-SR-Msg-Id: own\r\nNats-TTL: 60\r\nChoria-SR-Source: S 7 SITE SITE 5000\r\nChoria-SR-Source: DEAD 3 SITE \
             SITE 9000\r\n\r\n";
        let found = replayed(&letter, json!({"target_subject_prefix": "x"}), json!({"max_msg_size": 500}));
        assert_eq!(found, Ok(expect.to_owned()));
    }

    #[test]
    fn a_newer_message_is_not_replaced() {
        let tag = Tag::new("S", "SITE", "SITE");
        let letter = StoredLetter::read(&stored(LETTER), &tag).unwrap();
        let check = |hops: &[&str], expect: bool| {
            let hops: String = hops.iter().map(|hop| format!("Choria-SR-Source: {hop}\r\n")).collect();
            let there = stored(&format!("NATS/1.0\r\n{hops}\r\n"));
            assert_eq!(letter.would_replace(&there, &tag), expect, "{hops}");
        };
        check(&["S 6 SITE SITE 4000"], false);
        check(&["S 6 SITE SITE 5000", "DEAD 2 SITE SITE 9000"], false);
        check(&["S 8 SITE SITE 6000"], true);
        check(&["S 8 SITE SITE 6000", "S 8 SITE repair:SITE 6000"], true);
        // Of a source that was recreated, before and after the letter.
        check(&["S 6 SITE SITE 9000"], true);
        check(&["S 900 SITE SITE 4000"], true);
        check(&["S 6 SITE other 4000"], true);
        check(&[], true);
    }

    #[test]
    fn a_condition_comes_first() {
        let mut message = ReplayedMessage { subject: "a".to_owned(), header: b"NATS/1.0\r\nA: 1\r\n\r\n".to_vec() };
        message.expect_last(7);
        let expect = "NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: 7\r\nA: 1\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&message.header), expect);
    }

    #[test]
    fn what_the_target_cannot_store_is_not_sent() {
        let letter = StoredLetter::read(&stored(LETTER), &Tag::new("S", "SITE", "SITE")).unwrap();
        let check = |letter: &StoredLetter, target: serde_json::Value, expect: &str| {
            let error = replayed(letter, json!({}), target).unwrap_err();
            assert!(error.contains(expect), "{error}");
        };
        check(&letter, json!({"max_msg_size": 50}), "max_msg_size of 50");
        check(&StoredLetter { payload: 2000, ..letter.clone() }, json!({}), "max_payload of 1000");
        let request = StoredLetter { subject: "$JS.API.STREAM.DELETE.T".to_owned(), ..letter.clone() };
        check(&request, json!({}), "the target would act on it");
        check(&StoredLetter { subject: "a".repeat(5000), ..letter.clone() }, json!({}), "too long");
        check(&StoredLetter { header: vec![b'x'; 70_000], ..letter }, json!({}), "longer than");
    }
}
