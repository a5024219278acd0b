//! The integration tests: one binary, real nats-servers, the real service. `tests/README.md` says what each folder shows.

#[path = "../harness/mod.rs"]
mod harness;

mod choria;
mod cli;
mod control;
mod copies;
mod group;
mod harness_self;
mod limits;
mod sampling;
mod topologies;
mod verify;
mod wire;
