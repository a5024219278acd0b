//! A NATS connection that one task drives.
//!
//! The core is the [`Lane`]: one TCP, TLS or websocket connection with one owner, raw bytes in and out, and no hidden
//! reconnect. Messages stay in the buffer that they were read into, commands are written where you put them, and
//! dropping the lane ends everything that it was doing.
//!
//! | to do | use |
//! |---|---|
//! | connect | [`Endpoint`] (a URL), [`ServerRef`] (a URL or a context of the `nats` tool), [`Lane::connect`] |
//! | read and write messages | [`Lane::turn`], [`Lane::output`], [`Batch`], [`headers`] |
//! | call the JetStream API | [`jetstream::Api`] |
//! | publish many messages at once | [`fast_ingest`] |
//! | have a client that reconnects | [`client`], async-nats with the same URLs, identities and TLS |
//! | decide what an error means | [`ErrorKind`] |
//!
//! `examples/fast_copy.rs` copies a stream from one server to another in 60 lines.

pub mod auth;
pub mod backoff;
pub mod client;
pub mod context;
mod duration;
pub mod endpoint;
pub mod entropy;
mod error;
pub mod fast_ingest;
pub mod headers;
mod identity;
pub mod jetstream;
mod lane;
pub mod parser;
pub mod pipe;
mod refusal;
mod resolver;
mod routes;
mod secret;
pub mod server_ref;
mod sock_diag;
mod socket;
mod tls;
mod websocket;

pub use duration::parse_duration;
pub use endpoint::{Auth, Endpoint, Host, Scheme, Tls, mask_url};
pub use error::{ApiError, Error, ErrorKind, beginning, excerpt};
pub use identity::{ConnectFields, CustomIdentity, Identity};
pub use lane::{Batch, Dial, Lane, Message, ServerInfo, Stream, Turn};
pub use secret::{MASK, Secret};
pub use server_ref::{Connection, ContextFields, DEFAULT_API_PREFIX, FieldError, ServerRef, check_context_name};

/// The program in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
