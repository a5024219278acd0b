//! Shared by the tests, the demo and the bench: real nats-servers, the real service, a raw client, a
//! checker and a faulty proxy. Nothing in here uses the product's own code, so that a mistake there cannot
//! be hidden by the same mistake here.
//!
//! Everything listens on loopback only, lives in a temporary folder and ends when it is dropped.

// Each binary that includes this uses a part of it; `pub` is for readers.
#![allow(dead_code, unused_imports, unreachable_pub)]

pub mod checker;
pub mod choria;
pub mod cli;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod copies;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod secrets;
pub mod server;
pub mod service;
pub mod signed;
pub mod site;
pub mod skew;
pub mod wire;

pub use checker::{Expect, Report};
pub use choria::{REGISTRATION, Registration};
pub use cli::Cli;
pub use client::{connect, request, timed, wait_for, wait_value, wait_while_moving};
pub use clock::Clock;
pub use cluster::{Cluster, End};
pub use copies::{Copies, Kind};
pub use proxy::{BOTH, Direction, Newcomers, Proxy};
pub use raw::{Outgoing, Raw, Stored};
pub use server::{Role, Server};
pub use service::Service;
pub use site::{Events, SITE, Site};
pub use skew::Skew;

use std::time::Duration;

/// How long anything in a test may take before it counts as failed. Generous: the machines are shared.
pub const LIMIT: Duration = Duration::from_secs(30);

/// What the design calls "within a second", and another one for a busy machine.
pub const PROMPT: Duration = Duration::from_secs(2);
