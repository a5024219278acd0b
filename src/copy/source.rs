//! Reads a source: consumers, the messages that they deliver, and the state of the stream.

pub(crate) mod clock;
pub(in crate::copy) mod consumers;
pub(crate) mod durable;
pub(in crate::copy) mod gap;
pub(in crate::copy) mod intake;
pub(crate) mod learn;
pub(in crate::copy) mod locate;
pub(in crate::copy) mod peek;
pub(in crate::copy) mod reader;
pub(in crate::copy) mod renewal;
pub(in crate::copy) mod request_limit;
pub(in crate::copy) mod retention;
pub(in crate::copy) mod source_end;
pub(in crate::copy) mod source_half;
