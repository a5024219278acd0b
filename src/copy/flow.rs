//! Shared by every kind of copy: messages in flight, their limits, and the saved position.

pub(in crate::copy) mod bounds;
pub(in crate::copy) mod budget;
pub(in crate::copy) mod logins;
pub(in crate::copy) mod position;
pub(in crate::copy) mod throttle;
pub(in crate::copy) mod unsaved;
pub(in crate::copy) mod watchdog;
pub(in crate::copy) mod window;
