//! `limits` of a document.

use super::{Document, Limits, LimitsDocument, SenderBounds, text};

/// Messages in flight of the kinds `mirror` and `source`, whose messages settle by the megabyte.
const FED_MESSAGES: usize = 262_144;
/// Bytes in flight of these kinds. A target has a few MiB of it to store; the rest is on a line that is long and fast.
const FED_BYTES: usize = 64 << 20;

/// What may be in flight, and how fast it is sent.
pub(super) fn in_flight(document: &Document) -> Limits {
    let fed = matches!(text(&document.kind), Some("mirror" | "source"));
    let default = Limits::default();
    let default =
        if fed { Limits { messages_in_flight: FED_MESSAGES, bytes_in_flight: FED_BYTES, ..default } } else { default };
    let Some(limits) = &document.limits else { return default };
    Limits {
        messages_in_flight: limits.messages_in_flight.unwrap_or(default.messages_in_flight),
        bytes_in_flight: limits.bytes_in_flight.unwrap_or(default.bytes_in_flight),
        messages_per_second: limits.messages_per_second,
        bytes_per_second: limits.bytes_per_second,
    }
}

/// With sampling, the senders that are tracked.
pub(super) fn of_senders(document: Option<&LimitsDocument>) -> SenderBounds {
    let default = SenderBounds::default();
    let of = |limit: fn(&LimitsDocument) -> Option<usize>| document.and_then(limit);
    SenderBounds {
        senders: of(|limits| limits.senders).unwrap_or(default.senders),
        bytes: of(|limits| limits.sender_bytes).unwrap_or(default.bytes),
    }
}
