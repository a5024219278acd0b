//! The meaning of a server's refusal of a message.

use nats_lane::{Error, ErrorKind, excerpt, jetstream::Delivery};

use crate::{
    copy::{
        Error as RunError,
        error::{PoisonMessage, RefusedMessage},
        flow::window::SourcePoint,
        source::reader::Incoming,
    },
    store::SourceMessage,
};

/// The error of a message that is larger than the stream allows.
pub(in crate::copy) const TOO_LARGE: u32 = 10054;
/// The error of a publish that names another stream than the one that listens on its subject.
pub(in crate::copy) const STREAM_NOT_EXPECTED: u32 = 10060;

/// The error of a message without an answering stream.
pub(in crate::copy) fn no_responders() -> Error {
    let message = "no stream stores messages for the target at the moment (no responders)".to_owned();
    Error { kind: ErrorKind::NoResponders, message, api: None }
}

/// Whether a refusal may mean that the target does not listen on the subject.
fn is_unheard(error: &Error) -> bool {
    error.is_api(STREAM_NOT_EXPECTED) || error.kind == ErrorKind::NoResponders
}

/// Names the message that a refusal is about.
pub(in crate::copy) fn refusal(error: Error, source: Option<SourcePoint>) -> RunError {
    let unheard = source.filter(|_| is_unheard(&error)).map(|source| source.seq);
    let error = match source {
        Some(source) => error.context(format!("the target refused the message with source sequence {}", source.seq)),
        None => error.context("the target refused a message"),
    };
    let error = about(error, source);
    let refused: Option<RefusedMessage> = error.poison.as_ref().map(|poison| (poison.message, error.message.clone()));
    RunError { refused: refused.into_iter().collect(), unheard, ..error }
}

/// An error about one message: poison, if it says that the message can never be stored.
pub(in crate::copy) fn about(error: Error, source: Option<SourcePoint>) -> RunError {
    let poison = source.filter(|_| error.kind == ErrorKind::Poison);
    RunError { poison: poison.and_then(named), ..error.into() }
}

/// An error about a message that was read.
pub(in crate::copy) fn about_incoming(error: Error, incoming: &Incoming<'_>) -> RunError {
    let Delivery { stream_seq: seq, time_ns, .. } = incoming.delivery;
    let mut error = about(error, Some(SourcePoint { seq, time_ns: Some(time_ns) }));
    if let Some(poison) = &mut error.poison {
        // The publisher chose the subject.
        let subject = excerpt(&String::from_utf8_lossy(incoming.message.subject)).into_owned();
        poison.content = Some((subject, incoming.bytes() as u64));
    }
    error
}

fn named(source: SourcePoint) -> Option<Box<PoisonMessage>> {
    let message = SourceMessage { seq: source.seq, time_ns: source.time_ns? };
    Some(Box::new(PoisonMessage { message, content: None }))
}
