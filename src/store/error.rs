//! The error of every operation on a bucket.

/// A bucket operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("bucket `{bucket}`: {message}")]
pub struct Error {
    /// Which bucket.
    pub bucket: String,
    /// Description.
    pub message: String,
}
