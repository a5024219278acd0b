//! What a watch of the configuration bucket delivers.

use bytes::Bytes;

use super::{bucket::Stored, marks::Mark};

/// One revision of a document as it is in the bucket. Buckets can be edited by hand: it may be anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigEntry {
    /// The key.
    pub key: String,
    /// Revision of the key.
    pub revision: u64,
    /// The document as written.
    pub value: Bytes,
}

/// What the watch reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigChange {
    /// A document was written, or was there when the watch began.
    Put(ConfigEntry),
    /// A document was deleted or purged.
    Deleted {
        /// The key.
        key: String,
        /// Revision of the deletion.
        revision: u64,
    },
    /// The heartbeats were written or removed, or were there when the watch began.
    Heartbeats(Stored),
    /// The record of the site was written or removed, or was there when the watch began.
    Site(Stored),
    /// A mark was put, changed or removed, or was there when the watch began.
    Marked(Mark),
    /// The bucket was recreated, or restored: revisions start again. What differs follows.
    Recreated,
    /// Everything that was there when the watch began has been delivered.
    Loaded,
}
