//! Connections. The copy path speaks the protocol itself, over a [`Lane`] that belongs to one run: raw header
//! bytes in and out, large writes, nothing queued behind our back, and dropping it is how a run stops for
//! certain. Everything else uses async-nats.

pub mod account;
mod auth;
mod bridge;
mod choria;
pub mod client;
pub mod context;
mod error;
pub mod fast_ingest;
pub mod headers;
pub mod jetstream;
mod lane;
pub mod parser;
#[cfg(test)]
pub(crate) mod pipe;
mod routes;
mod rules;
mod sock_diag;
mod socket;
mod tls;
mod verdicts;
mod websocket;

pub use bridge::reaches;
pub use error::{ApiError, Error, ErrorKind};
pub use lane::{Batch, Dial, Lane, Message, ServerInfo, Stream, Turn};
pub use rules::Rules;
