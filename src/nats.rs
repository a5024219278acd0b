//! What the service asks of NATS beyond the wire (the crate `nats-lane`): limits of an account, and whether two
//! connections are one account.

pub mod account;
mod bridge;

pub use bridge::reaches;
