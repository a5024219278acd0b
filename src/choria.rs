//! What is there for the sake of Choria alone.

mod identity;

pub use identity::ChoriaIdentity;
