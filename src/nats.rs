//! Connections. The copy path speaks the protocol itself, over a [`Lane`] that belongs to one run: raw header
//! bytes in and out, large writes, nothing queued behind our back, and dropping it is how a run stops for
//! certain. Everything else uses async-nats.

mod auth;
pub mod client;
mod error;
pub mod fast_ingest;
pub mod headers;
pub mod jetstream;
mod lane;
pub mod parser;
mod tls;

pub use error::{ApiError, Error, ErrorKind};
pub use lane::{Batch, Dial, Lane, Message, Network, ServerInfo, Stream, Turn};
