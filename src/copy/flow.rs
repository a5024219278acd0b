//! What every kind of copy shares: what is in flight, what it may take, and the position that is saved.

pub(in crate::copy) mod bounds;
pub(in crate::copy) mod budget;
pub(in crate::copy) mod position;
pub(in crate::copy) mod throttle;
pub(in crate::copy) mod unsaved;
pub(in crate::copy) mod watchdog;
pub(in crate::copy) mod window;
