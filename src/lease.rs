//! Who of several instances runs which replication: sessions and leases in the lease bucket. [`Machine`] decides and
//! knows neither buckets nor clocks; [`start`] brings it what is seen and does what it says.

mod driver;
mod grant;
mod machine;
mod placement;
mod process;
mod sessions;

pub use driver::{Candidacy, Driver, Leases, enter, start};
pub use grant::{Grant, Validity};
pub use machine::{Action, Machine, Renewal, Settings};
pub use process::Identity;
pub use sessions::Sessions;
