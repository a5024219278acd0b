//! Whether a target has room: one that is full refuses every message, which says nothing about the message. Pure.
//!
//! A mirror is given no more than it has room for. Its server counts each refused message as a shift of the sequences that it expects
//! (`clfs` in `processJetStreamMsg` of nats-server, 2.10 to 2.15), and stores nothing until it restarts. Nor is a replicated stream: its
//! leader checks the limits once the replicas have agreed on a message, and then asks for none again.

use nats_lane::jetstream::StreamInfo;

use crate::native::window::Amount;

/// Bytes that a stored message takes beside subject, headers and payload at most, with the header of a source.
const STORED_WITH: u64 = 256;

/// Which limit leaves a stream that refuses new messages no room for one of so many bytes; `None` if it has room.
pub(super) fn lacks_room(info: &StreamInfo, bytes: usize) -> Option<String> {
    let limit = |name: &str| u64::try_from(info.number(name)).ok().filter(|limit| *limit > 0);
    let state = &info.state;
    // An empty stream has all the room that it ever has.
    if info.text("discard") != "new" || state.messages == 0 {
        return None;
    }
    if let Some(most) = limit("max_msgs").filter(|most| state.messages >= *most) {
        return Some(format!("it has {} messages, and `max_msgs` is {most}", state.messages));
    }
    let with = state.bytes.saturating_add(bytes as u64).saturating_add(STORED_WITH);
    let most = limit("max_bytes").filter(|most| with > *most)?;
    Some(format!("it has {} bytes, the next message has {bytes}, and `max_bytes` is {most}", state.bytes))
}

/// Whether a stream refuses new messages at a limit after it has answered for them, as replicated ones do.
pub(super) fn refuses_late(info: &StreamInfo) -> bool {
    info.text("discard") == "new" && info.number("num_replicas") > 1
}

/// What a target that refuses new messages at a limit may still be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TargetRoom {
    messages: u64,
    bytes: u64,
}

impl TargetRoom {
    /// The room of a stream while so much is on its way to it, of which it may have stored a part; `None` without a limit.
    pub fn of(info: &StreamInfo, in_flight: Amount) -> Option<Self> {
        let limit = |name: &str| u64::try_from(info.number(name)).ok().filter(|limit| *limit > 0);
        let (messages, bytes) = (limit("max_msgs"), limit("max_bytes"));
        if info.text("discard") != "new" || (messages, bytes) == (None, None) {
            return None;
        }
        let left = |limit: Option<u64>, used: u64| limit.map_or(u64::MAX, |limit| limit.saturating_sub(used));
        let on_the_way = in_flight.bytes + in_flight.messages * STORED_WITH;
        Some(Self {
            messages: left(messages, info.state.messages + in_flight.messages),
            bytes: left(bytes, info.state.bytes + on_the_way),
        })
    }

    /// Takes the room of a message of so many bytes; `false` if there is none.
    pub fn take(&mut self, bytes: usize) -> bool {
        let with = bytes as u64 + STORED_WITH;
        if self.messages == 0 || self.bytes < with {
            return false;
        }
        self.messages -= 1;
        self.bytes -= with;
        true
    }
}

/// Whether a stream that refuses new messages is so near to a limit, at nine tenths or more of it, that others who store and remove
/// messages may have filled it for a moment.
pub(super) fn is_nearly_full(info: &StreamInfo, bytes: usize) -> bool {
    let used = |name: &str, used: u64| {
        let limit = u64::try_from(info.number(name)).unwrap_or_default();
        limit > 0 && used.saturating_mul(10) >= limit.saturating_mul(9)
    };
    let state = &info.state;
    let with = state.bytes.saturating_add(bytes as u64).saturating_add(STORED_WITH);
    info.text("discard") == "new" && (used("max_msgs", state.messages + 1) || used("max_bytes", with))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stream(discard: &str, max_msgs: i64, max_bytes: i64, messages: u64, bytes: u64) -> StreamInfo {
        let config = json!({"discard": discard, "max_msgs": max_msgs, "max_bytes": max_bytes});
        serde_json::from_value(json!({"config": config, "state": {"messages": messages, "bytes": bytes}})).unwrap()
    }

    #[test]
    fn a_stream_at_a_limit_has_no_room() {
        let lacks = |stream: &StreamInfo| lacks_room(stream, 1_000).unwrap_or_default();
        assert!(lacks(&stream("new", 5, -1, 5, 100)).contains("`max_msgs` is 5"));
        assert!(lacks(&stream("new", -1, 10_000, 9, 9_500)).contains("`max_bytes` is 10000"));
        for other in [
            stream("new", 5, -1, 4, 100),
            stream("new", -1, 10_000, 7, 7_000),
            stream("new", -1, -1, 1 << 40, 1 << 50),
            // It removes old ones instead.
            stream("old", 5, 10_000, 5, 10_000),
            // The message has no room in any stream of this size.
            stream("new", -1, 500, 0, 0),
        ] {
            assert_eq!(lacks(&other), "", "{other:?}");
        }
    }

    #[test]
    fn a_mirror_is_given_what_it_has_room_for() {
        let on_the_way = |messages, bytes| Amount { messages, bytes, payload: 0 };
        let mut room = TargetRoom::of(&stream("new", 10, -1, 5, 0), on_the_way(3, 30)).unwrap();
        assert_eq!([0; 3].map(|_| room.take(1_000)), [true, true, false]);
        let mut room = TargetRoom::of(&stream("new", -1, 10_000, 5, 5_000), on_the_way(2, 1_000)).unwrap();
        assert_eq!([0; 3].map(|_| room.take(1_000)), [true, true, false]);
        for unlimited in [stream("new", -1, -1, 5, 0), stream("old", 5, 5, 5, 5)] {
            assert_eq!(TargetRoom::of(&unlimited, Amount::default()), None);
        }
    }

    #[test]
    fn a_stream_that_others_fill_is_nearly_full() {
        for (stream, nearly) in [
            (stream("new", 100, -1, 89, 0), true),
            (stream("new", 100, -1, 50, 0), false),
            (stream("new", -1, 100_000, 50, 89_000), true),
            (stream("new", -1, 100_000, 50, 50_000), false),
            (stream("old", 100, 100_000, 100, 100_000), false),
            (stream("new", -1, -1, 1 << 40, 1 << 50), false),
        ] {
            assert_eq!(is_nearly_full(&stream, 1_000), nearly, "{stream:?}");
        }
    }
}
