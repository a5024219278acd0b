//! The JetStream KV buckets on the control connection, typed. What must be current (positions) is read
//! from the stream's leader with `STREAM.MSG.GET`: direct gets were measured stale.

mod bucket;
mod buckets;
mod config;
mod marks;
mod positions;
mod sessions;
mod watch;

pub use bucket::{Cells, PutError, Stored};
pub use buckets::{Buckets, CONFIG_HISTORY, Error};
pub use config::{ConfigChange, ConfigEntry, ConfigStore, WriteError};
pub use marks::{Mark, MarkKind, PauseMark, ReleaseMark, SourceMessage};
pub use positions::{
    Claim, Orphans, PositionChange, PositionRecord, PositionStore, SaveError, SourceWitness, TargetWitness,
};
pub use sessions::{SessionChange, SessionRecord, SessionStore};
pub use watch::{Change, Changes};
