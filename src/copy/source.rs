//! Reads a source: consumers, the messages that they deliver, and the state of the stream.

pub(crate) mod clock;
pub(crate) mod consumers;
pub(crate) mod durable;
pub(in crate::copy) mod gap;
pub(crate) mod intake;
pub(crate) mod learn;
pub(crate) mod locate;
pub(in crate::copy) mod peek;
pub(crate) mod reader;
pub(in crate::copy) mod renewal;
pub(in crate::copy) mod request_limit;
pub(crate) mod retention;
pub(in crate::copy) mod source_end;
pub(in crate::copy) mod source_half;
