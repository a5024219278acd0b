//! The JetStream KV buckets on the control connection, typed. What must be current (positions) is read
//! from the stream's leader with `STREAM.MSG.GET`: direct gets were measured stale.

mod bucket;
mod buckets;
mod cells;
mod config;
mod config_change;
mod error;
pub mod event_stream;
mod file_documents;
mod keeper;
mod leases;
mod linked;
mod live;
mod marks;
mod own_streams;
mod positions;
mod senders;
mod site;
mod trouble;
mod watch;

pub use bucket::{PutError, Stored};
pub use buckets::{Buckets, CONFIG_HISTORY};
pub use cells::Cells;
pub use config::{ConfigStore, WriteError};
pub use config_change::{ConfigChange, ConfigEntry, Family};
pub use error::Error;
pub use file_documents::{FILE_REVISION, FileDocuments, FileReloader};
pub use keeper::{Condition, Keeper};
pub use leases::{LeaseChange, LeaseRecord, LeaseStore, SessionRecord, Written};
pub use marks::{Mark, MarkKind, PauseMark, ReleaseMark, SourceMessage, StreamsMark, VerifyMark};
pub use own_streams::OwnStreams;
pub use positions::{
    AfterTarget, Claim, ClaimError, FromTarget, Orphans, PositionChange, PositionRecord, PositionStore, SaveError,
    SourceWitness, Stamps, TargetWitness, verification_key,
};
pub use senders::{
    PendingAdvisory, SenderChange, SenderChanges, SenderRecord, SenderStore, SenderWrites, hash as sender_hash,
    hash_of_token as sender_hash_of_token, token as sender_token,
};
pub use site::{SiteKey, SiteRecord};
pub(crate) use trouble::{Trouble, follow};
pub use watch::{Change, Changes};
