//! Copies NATS JetStream streams between independent clusters, domains or accounts: in order, without
//! loss and without duplicates. `ARCHITECTURE.md` is the long version of this page.
//!
//! The modules, from the edge to the words. A module uses only what stands below it.
//!
//! | row | modules | what it is |
//! |---|---|---|
//! | edge | [`cli`], [`app`], [`telemetry`] | arguments, composition, ordered shutdown |
//! | face | [`control`], [`http`] | how the outside asks |
//! | work | [`supervisor`], [`adapter`], [`verify`], [`lease`], [`preflight`], [`mirror`], [`copy`], [`sampling`], [`heartbeat`], [`election`], [`events`] | what runs, and where: desired set against running set, leases, one copy |
//! | world | [`store`], [`allow`], [`nats`] | buckets, and which connections are allowed |
//! | words | [`config`], [`choria`], [`status`], [`metrics`], [`names`], `boottime` | no sockets |
//! | wire | the crate [`nats_lane`] | connections: the only I/O beside [`http`] |
//!
//! One message's way: `copy::source::reader` -> `copy::decide` -> `copy::target::writer` -> `copy::flow::window` ->
//! `copy::flow::position`. Start reading at [`copy::run`].

pub mod adapter;
pub mod allow;
pub mod app;
mod boottime;
pub mod choria;
pub mod cli;
pub mod config;
pub mod control;
pub mod copy;
pub mod election;
pub mod events;
pub mod heartbeat;
pub mod http;
pub mod lease;
pub mod metrics;
pub mod names;
pub mod native;
pub mod nats;
pub mod preflight;
pub mod sampling;
pub mod status;
pub mod store;
pub mod supervisor;
pub mod telemetry;
pub mod traces;
pub mod verify;
