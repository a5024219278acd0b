//! Choria's data adapters: what a node publishes (registration data, or replies of agents) becomes a message of a stream.
//! Pure: bytes in, bytes out. `crate::adapter` runs it.
//!
//! A message has three layers, each JSON: the transport, the secure request or reply in it, and the request or reply in that.
//! Both versions of the protocol are read, whatever the version of the message before. What is accepted is what Choria's broker
//! accepts (go-choria, `broker/adapter/ingest`): requests follow their JSON schemas, replies only have to be readable, and
//! neither signatures nor ages are checked. Where the broker ends with a panic (`null` for the headers or the envelope), the
//! message is refused.

mod broker;
mod decode;
mod node;
mod output;
#[cfg(test)]
mod tests;
mod verify;

pub use broker::{ImportedAdapters, import_broker};
pub use decode::{Decoded, Discard, IngestProtocol, decode, decode_verified};
pub use output::{CHORIA_STREAMS, JETSTREAM, OutputProtocol, expand_topic};
pub use verify::TrustedSigners;
