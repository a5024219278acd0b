//! What the stores of records need of a bucket: keys with compare-and-swap.

use std::fmt;

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};

use super::{
    bucket::{Bucket, PutError, Stored},
    error::Error,
    watch::{self, Changes},
};

/// Keys with compare-and-swap: a bucket, or its replacement in a simulation.
pub trait Cells: fmt::Debug + Send + Sync {
    /// The bucket's name, for errors.
    fn name(&self) -> &str;
    /// The entry at a key now, marker or value, read from the leader.
    fn last<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Stored>, Error>>;
    /// Writes a value if the key is at `expected` (0: there is nothing); returns the new revision.
    fn put<'a>(&'a self, key: &'a str, value: Bytes, expected: u64) -> BoxFuture<'a, Result<u64, PutError>>;
    /// Leaves the marker of a deletion if the key is at `expected`; returns the marker's revision.
    fn mark_deleted<'a>(&'a self, key: &'a str, expected: u64) -> BoxFuture<'a, Result<u64, PutError>>;
    /// Removes the entries at a key up to and with a revision (0: nothing), without leaving a marker.
    fn forget_through<'a>(&'a self, key: &'a str, revision: u64) -> BoxFuture<'a, Result<(), Error>>;
    /// All keys as they are, then every change, for ever.
    fn watch(&self) -> BoxFuture<'_, Result<Changes, Error>>;
}

impl Cells for Bucket {
    fn name(&self) -> &str {
        self.bucket_name()
    }

    fn last<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Stored>, Error>> {
        self.last(key).boxed()
    }

    fn put<'a>(&'a self, key: &'a str, value: Bytes, expected: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        self.put(key, value, expected).boxed()
    }

    fn mark_deleted<'a>(&'a self, key: &'a str, expected: u64) -> BoxFuture<'a, Result<u64, PutError>> {
        self.mark_deleted(key, expected).boxed()
    }

    fn forget_through<'a>(&'a self, key: &'a str, revision: u64) -> BoxFuture<'a, Result<(), Error>> {
        self.forget_through(key, revision).boxed()
    }

    fn watch(&self) -> BoxFuture<'_, Result<Changes, Error>> {
        watch::watch(self.clone(), "watch", |_| false).boxed()
    }
}
