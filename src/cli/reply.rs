//! An answer of the service, as it was sent and as it was understood.

use bytes::Bytes;

/// An answer of the service.
#[derive(Debug)]
pub(super) struct Reply<T> {
    /// As it was sent; several pages are joined into one.
    pub(super) raw: Bytes,
    pub(super) value: T,
}
