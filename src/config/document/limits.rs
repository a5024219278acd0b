//! `limits` of a document.

use super::{Document, Limits, LimitsDocument, SenderBounds, text};

/// Bound of the kinds `mirror` and `source`, whose messages settle by the megabyte: bytes bound what they have in flight.
const FED_IN_FLIGHT: usize = 65_536;

/// What may be in flight, and how fast it is sent.
pub(super) fn in_flight(document: &Document) -> Limits {
    let fed = matches!(text(&document.kind), Some("mirror" | "source"));
    let default = Limits::default();
    let messages = if fed { FED_IN_FLIGHT } else { default.messages_in_flight };
    let Some(limits) = &document.limits else { return Limits { messages_in_flight: messages, ..default } };
    Limits {
        messages_in_flight: limits.messages_in_flight.unwrap_or(messages),
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
