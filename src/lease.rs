//! Which instance runs which replication: sessions and leases in the lease bucket. [`Machine`] decides and knows neither
//! buckets nor clocks; [`start`] passes observations to it and carries out its actions.

mod driver;
mod grant;
mod machine;
mod placement;
mod process;
mod sessions;

pub use driver::{Candidacy, Driver, Leases, enter, start};
pub use grant::{Grant, Validity};
pub use machine::{LeaseAction, LeaseSettings, Machine, RenewalOutcome};
pub use process::ProcessIdentity;
pub use sessions::Sessions;
