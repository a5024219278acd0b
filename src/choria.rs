//! What is there for the sake of Choria alone.

pub mod adapter;
mod hand_back;
mod identity;
mod tracked;
mod yaml;

pub use hand_back::GoConsumer;
pub use identity::ChoriaIdentity;
pub use tracked::{GOSSIP_PREFIX, StateFileText, TrackedSender, gossip_subject, no_time, read_state};
pub use yaml::{ReplicatorYaml, YamlControl, YamlProblem};
