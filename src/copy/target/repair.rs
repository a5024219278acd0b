//! What a repair publishes: a message of the source as its copy is, with the id of that copy. Pure.
//!
//! A repair is stored after newer copies. So it has one hop of provenance more: no run takes it for the newest message that was
//! copied, by which it would resume.

use nats_lane::{
    Error,
    jetstream::{StoredMessage, StreamInfo},
};

use super::{
    frame::MessageId,
    headers::{Allowed, Passage, Stamp, header_block},
    provenance::{MessageOrigin, Tag},
    replay::{ReplayedMessage, StoreLimits, letter_tag},
};
use crate::config::Replication;

/// Longest header line of a condition.
const CONDITION: usize = 64;

/// Where a message is repaired.
#[derive(Debug)]
pub(crate) struct RepairTarget<'a> {
    pub replication: &'a Replication,
    pub site: &'a str,
    pub target: &'a StreamInfo,
    /// Prefix of the subjects of the target's JetStream API.
    pub api_prefix: &'a str,
    /// Largest message of the target's server.
    pub max_payload: usize,
    /// Whether `Nats-TTL` has its effect at both sides.
    pub ttl: bool,
    /// The source server's time, nanoseconds since the Unix epoch.
    pub now_ns: i64,
    /// How often the position was moved back.
    pub generation: u64,
}

/// What is published for a message of the source; an error if the target cannot store that. A rollup would remove newer messages:
/// it is dropped.
pub(crate) fn repaired(message: &StoredMessage, to: &RepairTarget<'_>) -> Result<ReplayedMessage, Error> {
    let RepairTarget { replication, site, .. } = to;
    let mut room = Vec::new();
    let subject = replication.mapping.apply(message.subject.as_bytes(), &mut room);
    let subject = String::from_utf8_lossy(subject).into_owned();
    let origin = MessageOrigin { seq: message.sequence, time_ms: message.time_ns.div_euclid(1_000_000) };
    let age = to.now_ns.saturating_sub(message.time_ns).max(0).unsigned_abs() / 1_000_000_000;
    let mut id = MessageId::new(&replication.id, &replication.source.stream, to.generation);
    let passage = Passage {
        origin,
        age_secs: age,
        stamp: Stamp { chain: None, id: Some(id.for_message(message.sequence, message.time_ns)) },
        expected_stream: Some(&replication.target.stream),
    };
    let allowed = Allowed { ttl: to.ttl, ..Allowed::default() };
    let mut header = Vec::new();
    header_block(&mut header, &message.header, allowed, &letter_tag(replication, site), &passage);
    header.truncate(header.len() - 2);
    Tag::new(&replication.source.stream, site, &format!("repair:{}", replication.name)).write(&mut header, origin);
    header.extend_from_slice(b"\r\n");
    let limits = StoreLimits { target: to.target, api_prefix: to.api_prefix, max_payload: to.max_payload };
    limits.check(&subject, &header, message.payload + CONDITION)?;
    Ok(ReplayedMessage { subject, header })
}

impl ReplayedMessage {
    /// Has the target store it only while the last message of its subject is the one at this sequence; 0: while there is none.
    pub fn follow(&mut self, last: u64) {
        self.header.truncate(self.header.len() - 2);
        self.header.extend_from_slice(format!("Nats-Expected-Last-Subject-Sequence: {last}\r\n\r\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config;

    #[test]
    fn a_repair_is_a_copy_with_one_hop_more() {
        let document = json!({"stream": "S", "source_url": "a", "target_url": "b", "target_stream": "T", "target_subject_prefix": "x"});
        let replication = config::parse(document.to_string().as_bytes(), "SITE").unwrap();
        let target: StreamInfo = serde_json::from_value(json!({"config": {"max_msg_size": 500}, "state": {}})).unwrap();
        let header = b"NATS/1.0\r\nA: 1\r\nNats-Msg-Id: own\r\nNats-Rollup: all\r\nNats-TTL: 100\r\n\r\n".to_vec();
        let message =
            StoredMessage { subject: "orders.1".to_owned(), sequence: 7, time_ns: 5_000_000_000, header, payload: 10 };
        let to = RepairTarget {
            replication: &replication,
            site: "SITE",
            target: &target,
            api_prefix: "$JS.API",
            max_payload: 1_000,
            ttl: true,
            now_ns: 45_000_000_000,
            generation: 0,
        };
        let mut found = repaired(&message, &to).unwrap();
        let mut id = MessageId::new("S", "S", 0);
        let expect = format!(
            "NATS/1.0\r\nNats-Msg-Id: {}\r\nNats-Expected-Stream: T\r\nA: 1\r\nChoria-SR-Msg-Id: own\r\nNats-TTL: \
             60\r\nChoria-SR-Source: S 7 SITE SITE 5000\r\nChoria-SR-Source: S 7 SITE repair:SITE 5000\r\n\r\n",
            id.for_message(7, 5_000_000_000)
        );
        assert_eq!((found.subject.as_str(), String::from_utf8_lossy(&found.header)), ("x.orders.1", expect.into()));
        let tag = letter_tag(&replication, "SITE");
        assert_eq!(tag.origin(&found.header), None, "it is no copy of the run");
        assert_eq!(tag.origin_of_later(&found.header), Some(MessageOrigin { seq: 7, time_ms: 5_000 }));
        found.follow(u64::MAX);
        let condition = b"Nats-Expected-Last-Subject-Sequence: 18446744073709551615\r\n\r\n";
        assert!(found.header.ends_with(condition) && condition.len() - 2 <= CONDITION);
        assert_eq!(tag.origin_of_later(&found.header), Some(MessageOrigin { seq: 7, time_ms: 5_000 }));
        let error = repaired(&StoredMessage { payload: 400, ..message }, &to).unwrap_err();
        assert!(error.message.contains("max_msg_size of 500"), "{error}");
    }
}
