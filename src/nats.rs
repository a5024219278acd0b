//! Connections. The copy path speaks the protocol itself, over a [`Lane`] that belongs to one run: raw header
//! bytes in and out, large writes, nothing queued behind our back, and dropping it is how a run stops for
//! certain. Everything else uses async-nats.

mod auth;
pub mod client;
pub mod context;
mod error;
pub mod fast_ingest;
pub mod headers;
pub mod jetstream;
mod lane;
pub mod parser;
mod tls;
mod websocket;

use crate::config::Place;

pub use error::{ApiError, Error, ErrorKind};
pub use lane::{Batch, Lane, Message, ServerInfo, Turn};

/// A lane to a place; the file of a context is read now.
pub async fn connect(place: &Place, name: &str) -> Result<Lane, Error> {
    Lane::connect(&context::resolve(place)?, name).await
}
