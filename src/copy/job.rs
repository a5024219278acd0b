//! The job of one run.

use std::sync::Arc;

use nats_lane::{self as nats, jetstream::StreamInfo};

use super::{
    Error, ErrorKind, flow::budget::Budget, returned::WaysBack, samples::Samples, source::consumers::ConsumerLabels,
};
use crate::{
    config::Replication,
    status::Row,
    store::{OwnStreams, SourceMessage},
};

/// What to copy, and as which installation.
#[derive(Debug, Clone)]
pub struct Job {
    /// The site's name, for provenance.
    pub site: String,
    /// The identity that all instances of the installation share, and no other installation has.
    pub installation: String,
    /// What to copy.
    pub replication: Replication,
    /// The row to save with the position; its `state` and `copy` are filled in by the run.
    pub row: Row,
    /// Bytes that all replications of the process may read ahead together.
    pub budget: Budget,
    /// A message that can never be stored and is skipped by request.
    pub skip: Option<SourceMessage>,
    /// Another replication of this service that writes to the same target stream.
    pub neighbour: Option<String>,
    /// The replications of this service that copy messages from the target stream.
    pub ways_back: WaysBack,
    /// The prefix of the names of its own consumers, see [`consumer_prefix`](super::consumer_prefix).
    pub consumers: String,
    /// The streams of the service's own buckets.
    pub own_streams: OwnStreams,
    /// There is no other instance, and the copy continues where the position cannot be saved.
    pub standalone: bool,
    /// The known senders; a replication that is sampled and has none copies everything.
    pub samples: Option<Samples>,
    /// Makes the connections to both sides.
    pub dial: Arc<dyn nats::Dial>,
}

impl Job {
    /// The metadata of its own consumers.
    pub(crate) fn labels(&self) -> ConsumerLabels {
        ConsumerLabels::new(&self.site, &self.replication.id, self.row.leader.as_deref())
    }

    /// Refuses a source that is a mirror which another replication feeds from the target: nothing in its messages says so.
    pub(crate) fn refuse_echo(&self, source: &StreamInfo) -> Result<(), Error> {
        let replication = &self.replication;
        if replication.loop_protection.is_none() || !self.ways_back.mirrors_target(source) {
            return Ok(());
        }
        let (from, to) = (&replication.source.stream, &replication.target.stream);
        Err(Error::new(
            ErrorKind::Hold,
            format!(
                "source stream `{from}` is a mirror that is fed from target stream `{to}`: everything in it would be stored there \
                 a second time; feed it with kind `source`, or promote it"
            ),
        ))
    }
}
