//! Who of several instances runs which replication: sessions and leases in the lease bucket. [`Machine`] decides and
//! knows neither buckets nor clocks; [`start`] brings it what is seen and does what it says.

mod driver;
mod machine;
mod placement;
mod process;
mod sessions;
mod tenure;

pub use driver::{Driver, Leases, Seat, enter, start};
pub use machine::{Action, Machine, Renewal, Settings};
pub use process::Identity;
pub use sessions::Sessions;
pub use tenure::{Tenure, Term};
