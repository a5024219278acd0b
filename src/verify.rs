//! Compares the source and the target of a replication, message by message, and repairs what is missing. Reads both streams in order,
//! merges them by the source's sequences (the target's copies carry them), and keeps fingerprints, not messages: memory does not grow
//! with the streams.
//!
//! [`compare`] reads, [`merge`] decides, [`second_look`] confirms. What was not settled when it began is not compared.

mod compare;
mod fingerprint;
mod merge;
mod ranges;
mod repair;
mod second_look;
mod stream;

use std::sync::Arc;

use nats_lane::{Dial, Error, jetstream::Api};
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

pub use self::repair::cannot_repair;
use self::{compare::StreamComparison, stream::stream_name};
use crate::{
    config::{Replication, SamplePart},
    copy::{WaysBack, source::consumers::ConsumerLabels},
    status::Verification,
    store::FromTarget,
};

/// Where a verification shows how far it is.
pub type VerifyProgress = watch::Sender<Verification>;

/// Messages of one piece of a sample, and pieces.
const SAMPLE_PIECE: u64 = 1_000;
const SAMPLE_PIECES: u64 = 200;

/// What to compare.
#[derive(Debug)]
pub struct VerifyJob {
    /// Identifies the job; chooses the sample.
    pub job: String,
    /// The site's name.
    pub site: String,
    /// What is replicated.
    pub replication: Replication,
    /// Makes the connections.
    pub dial: Arc<dyn Dial>,
    /// Prefix of the names of the replication's own consumers.
    pub consumers: String,
    /// Metadata of the consumers.
    pub(crate) labels: ConsumerLabels,
    /// The replications of this service that copy messages from the target stream.
    pub ways_back: WaysBack,
    /// What copies from the target carry, as far as it was known.
    pub from_target: Option<FromTarget>,
    /// How often the position was moved back: part of the ids of copies.
    pub generation: u64,
    /// Source sequence up to which everything was settled.
    pub settled: u64,
    /// Others write to the target, too, as far as it is known.
    pub is_shared: bool,
    /// Others may write to the target: a message of theirs is no finding.
    pub admits_others: bool,
    /// First source sequence to compare; `None` for the first one there is.
    pub from: Option<u64>,
    /// Last source sequence to compare; `None` for all that are settled.
    pub to: Option<u64>,
    /// Part of the messages to compare; `None` for all.
    pub sample: Option<SamplePart>,
    /// Messages of the source that are read in a second, at most.
    pub rate: Option<u64>,
    /// Whether to copy what is missing.
    pub repair: bool,
}

/// Source sequences that are compared together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SourcePiece {
    from: u64,
    to: u64,
}

/// Compares everything the job asks for, and repairs if it asks for that. Can be dropped at any time.
///
/// # Errors
///
/// It cannot compare, or could not read for minutes.
pub async fn run(job: &VerifyJob, progress: &VerifyProgress) -> Result<(), Error> {
    let mut comparison = StreamComparison::new(job, progress);
    let first = loop {
        match first_sequence(&mut comparison).await {
            Ok(first) => break first,
            Err(error) => comparison.wait_after(error).await?,
        }
    };
    let from = job.from.unwrap_or(1).max(first);
    let to = job.to.unwrap_or(u64::MAX).min(job.settled);
    comparison.show(|record| (record.from, record.to, record.position) = (from, to, from.saturating_sub(1).min(to)));
    for piece in pieces(from, to, job.sample, &job.job) {
        let cursor = comparison.compare(piece).await?;
        let missing = comparison.second_look(piece, cursor).await?;
        if job.repair {
            comparison.repair(&missing).await?;
        }
    }
    comparison.show(|record| record.position = to);
    Ok(())
}

/// The first sequence that the source has, at least 1.
async fn first_sequence(comparison: &mut StreamComparison<'_>) -> Result<u64, Error> {
    let source = &mut comparison.connect().await?.source;
    let stream = stream_name(&source.info).to_owned();
    let info = Api::new(&mut source.lane).stream_info(&stream).await?;
    Ok(info.map_or(1, |info| info.state.first_seq.max(1)))
}

/// The ranges to compare: everything, or pieces that are spread over it.
fn pieces(from: u64, to: u64, sample: Option<SamplePart>, seed: &str) -> Vec<SourcePiece> {
    if from > to {
        return Vec::new();
    }
    let span = to - from + 1;
    let wanted = sample.map_or(span, |sample| sample.of(span));
    if wanted >= span {
        return vec![SourcePiece { from, to }];
    }
    let count = (wanted / SAMPLE_PIECE).clamp(1, SAMPLE_PIECES);
    let (length, stratum) = (wanted / count, span / count);
    let piece = |index: u64| {
        let chance = xxh3_64(format!("{seed} {index}").as_bytes());
        let from = from + index * stratum + chance % (stratum - length + 1);
        SourcePiece { from, to: from + length - 1 }
    };
    (0..count).map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_spread_over_everything() {
        assert_eq!(pieces(1, 10, None, "j"), [SourcePiece { from: 1, to: 10 }]);
        assert_eq!(pieces(5, 4, None, "j"), []);
        for (span, percent) in [(10, "10%"), (5_000, "1%"), (1_000_000, "1%"), (100_000_000, "2.5%")] {
            let sample = SamplePart::parse(percent).unwrap();
            let all = pieces(100, 99 + span, Some(sample), "j");
            let messages: u64 = all.iter().map(|piece| piece.to - piece.from + 1).sum();
            assert!(messages <= sample.of(span) && messages * 10 >= sample.of(span) * 9, "{messages} of {span}");
            assert!(all.windows(2).all(|two| two[0].to < two[1].from), "{all:?}");
            assert!(all.iter().all(|piece| piece.from >= 100 && piece.to < 100 + span), "{all:?}");
            assert_ne!(all, pieces(100, 99 + span, Some(sample), "another"));
        }
    }
}
