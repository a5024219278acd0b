//! What a repair publishes: a message of the source as its copy is, with the id of that copy. Pure.
//!
//! A repair is stored after newer copies. So it has one hop of provenance more: no run takes it for the newest message that was
//! copied, by which it would resume.

use nats_lane::{Error, jetstream::StoredMessage};

use super::{
    frame::MessageId,
    provenance::{MessageOrigin, Tag},
    replay::{LaterMessage, LaterTarget, ReplayedMessage},
};

/// Longest header line of a condition.
const CONDITION: usize = 64;

/// What is published for a message of the source; an error if the target cannot store that. `generation`: how often the position was
/// moved back.
pub(crate) fn repaired(
    message: &StoredMessage,
    generation: u64,
    to: &LaterTarget<'_>,
) -> Result<ReplayedMessage, Error> {
    let LaterTarget { replication, site, .. } = to;
    let origin = MessageOrigin { seq: message.sequence, time_ms: message.time_ns.div_euclid(1_000_000) };
    let mut id = MessageId::new(&replication.id, &replication.source.stream, generation);
    to.publishes(&LaterMessage {
        subject: &message.subject,
        header: &message.header,
        payload: message.payload + CONDITION,
        origin,
        id: id.for_message(message.sequence, message.time_ns),
        hop: (Tag::new(&replication.source.stream, site, &format!("repair:{}", replication.name)), origin),
    })
}

#[cfg(test)]
mod tests {
    use nats_lane::jetstream::StreamInfo;
    use serde_json::json;

    use super::{super::replay::letter_tag, *};
    use crate::config;

    #[test]
    fn a_repair_is_a_copy_with_one_hop_more() {
        let document = json!({"stream": "S", "source_url": "a", "target_url": "b", "target_stream": "T", "target_subject_prefix": "x"});
        let replication = config::parse(document.to_string().as_bytes(), "SITE").unwrap();
        let target: StreamInfo = serde_json::from_value(json!({"config": {"max_msg_size": 500}, "state": {}})).unwrap();
        let header = b"NATS/1.0\r\nA: 1\r\nNats-Msg-Id: own\r\nNats-Rollup: all\r\nNats-TTL: 100\r\n\r\n".to_vec();
        let message =
            StoredMessage { subject: "orders.1".to_owned(), sequence: 7, time_ns: 5_000_000_000, header, payload: 10 };
        let to = LaterTarget {
            replication: &replication,
            site: "SITE",
            target: &target,
            api_prefix: "$JS.API",
            max_payload: 1_000,
            ttl: true,
            now_ns: 45_000_000_000,
        };
        let mut found = repaired(&message, 0, &to).unwrap();
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
        let before = found.header.len();
        found.expect_last(u64::MAX);
        assert!(found.header.len() - before <= CONDITION);
        let condition = b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: 18446744073709551615\r\n";
        assert!(found.header.starts_with(condition));
        assert_eq!(tag.origin_of_later(&found.header), Some(MessageOrigin { seq: 7, time_ms: 5_000 }));
        let error = repaired(&StoredMessage { payload: 400, ..message }, 0, &to).unwrap_err();
        assert!(error.message.contains("max_msg_size of 500"), "{error}");
    }
}
