//! Writes to a target: messages, the stream that stores them, and the copies that it has.

pub(in crate::copy) mod batches;
pub(crate) mod bridge;
pub(crate) mod dead_letter;
pub(crate) mod dedup_window;
pub(crate) mod drift;
pub(in crate::copy) mod drops;
pub(in crate::copy) mod frame;
pub(crate) mod headers;
pub(crate) mod join;
pub(in crate::copy) mod line;
pub(in crate::copy) mod liveness;
pub(crate) mod mark;
pub(crate) mod mode;
pub(in crate::copy) mod pipelined;
pub(crate) mod provenance;
pub(in crate::copy) mod refusal;
pub(crate) mod repair;
pub(crate) mod replay;
pub(in crate::copy) mod stray;
pub(crate) mod stream;
pub(crate) mod subjects;
pub(in crate::copy) mod target_end;
pub(in crate::copy) mod target_half;
pub(crate) mod target_limits;
pub(in crate::copy) mod target_watch;
pub(in crate::copy) mod writer;
