//! What is there for the sake of Choria alone.

pub mod adapter;
mod hand_back;
mod identity;
mod yaml;

pub use hand_back::GoConsumer;
pub use identity::ChoriaIdentity;
pub use yaml::{ReplicatorYaml, YamlControl, YamlProblem};
