//! Which messages of each sender are copied, and the advisories about senders. Pure: messages and times are arguments;
//! decisions, records and advisories are the results, and nothing in here waits.
//!
//! [`Inspector`] finds the sender of a message, [`Senders`] knows when each was seen and copied last and decides,
//! [`Outbox`] keeps advisories until they are confirmed.

mod advisory;
mod inspect;
mod outbox;
mod path;
mod senders;

pub use advisory::{Advisory, AdvisoryKind, AdvisoryTemplate, AgeAdvisory, is_advisory, patterns as advisory_patterns};
pub use inspect::{Inspector, MAX_STORED, MAX_VALUE};
pub use outbox::{Outbox, PER_SENDER};
pub use path::Path;
pub use senders::{CopyCause, Listed, MessageOutcome, SamplingVerdict, Senders, Sighting, records::Write};
