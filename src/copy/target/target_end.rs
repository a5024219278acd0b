//! The known end of the target stream, and the meaning of its acks: used by every way to send.

use std::{ops::Range, sync::Arc};

use nats_lane::{Error, jetstream::StreamInfo};
use tracing::trace;

use crate::{
    config::Replication,
    copy::{
        flow::window::{Token, Window, WindowError},
        target::refusal::STREAM_NOT_EXPECTED,
    },
    status::TargetMode,
};

/// The end of one target stream.
#[derive(Debug)]
pub(in crate::copy) struct TargetEnd {
    replication: Arc<Replication>,
    domain: Option<String>,
    /// Epoch of the lease under which the run writes.
    epoch: u64,
    mode: TargetMode,
    /// Last sequence of the target before this run: messages of this run are stored after it.
    pub floor: u64,
    /// Last sequence of the target after everything that was sent; kept by the chain.
    pub expected_last: u64,
}

impl TargetEnd {
    /// The end of the stream that `target` describes.
    pub fn new(replication: Arc<Replication>, target: &StreamInfo, epoch: u64, mode: TargetMode) -> Self {
        let last = target.state.last_seq;
        Self { replication, domain: target.domain.clone(), epoch, mode, floor: last, expected_last: last }
    }

    /// Whether other writers may write to the target.
    pub fn is_shared(&self) -> bool {
        self.mode == TargetMode::Shared
    }

    /// The name of the target stream.
    pub fn stream(&self) -> &str {
        &self.replication.target.stream
    }

    /// An error, with its meaning for this target.
    pub fn explained(&self, error: impl Into<Error>) -> Error {
        let error = error.into();
        if !error.is_api(STREAM_NOT_EXPECTED) {
            return error;
        }
        let target = &self.replication.target.stream;
        error.context(format!("another stream than target stream `{target}` listens on the same subjects"))
    }

    /// The highest target sequence that is known to have been stored.
    pub fn known_end(&self, window: &Window) -> u64 {
        self.floor.max(window.target().map_or(0, |target| target.seq))
    }

    /// The error of a message that was stored at or below a sequence that was stored before.
    pub fn went_back(&self, seq: u64, window: &Window) -> Error {
        let before = self.known_end(window);
        Error::retry(format!("the target stored a message at sequence {seq}, though it had {before} before"))
    }

    /// An error if the ack is not the target's own: over leafnodes a second stream may listen on the subject too.
    pub fn expect_stream(&self, stream: &str, domain: Option<&str>) -> Result<(), Error> {
        let target = &self.replication.target.stream;
        // A server reports its domain, if it has one, in the state of a stream as in every ack.
        if stream == target && domain == self.domain.as_deref() {
            return Ok(());
        }
        let place = match (domain, &self.domain) {
            (Some(domain), _) => format!(" of domain `{domain}`"),
            (None, Some(_)) => " of a server without a domain".to_owned(),
            (None, None) => String::new(),
        };
        Err(Error::hold(format!(
            "stream `{stream}`{place} acknowledged a message for target stream `{target}`: it listens on the same subjects"
        )))
    }

    /// Logs the messages that an ack inside a batch settled, where the chain determines their sequences.
    pub fn log_batch(&self, settled: Range<Token>, window: &Window) {
        let first = window.target_seq_of(settled.start);
        let last = settled.end.checked_sub(1).and_then(|token| window.target_seq_of(token));
        if let (false, Some(first), Some(last)) = (settled.is_empty(), first, last) {
            self.log_settled(first, last);
        }
    }

    /// Logs one line for each ack: under which epoch it settled which target sequences (docs/operations.md). Only
    /// operators and tests read it, to compare instances.
    pub fn log_settled(&self, first: u64, last: u64) {
        trace!(target: "stream_replicator::settled", replication = self.replication.id, epoch = self.epoch, first, last);
    }
}

/// The error of an ack that does not fit the window.
pub(in crate::copy) fn window_error(error: WindowError) -> Error {
    Error::retry(format!("acks of the target do not match the sent messages: {error}"))
}
