//! Senders and advisories.

mod advisories;
mod copies;
mod senders;
