//! Whether a target may continue after the messages that it holds: a source that was deleted and created again, or was restored from a
//! backup, has other messages under the same sequences. Pure.

use super::session::FedPoint;

/// The answers of both sides about the sequence after which the target wants to continue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evidence {
    /// The last source sequence that the target holds, above 0.
    pub last: u64,
    /// Last sequence of the source.
    pub source_last: u64,
    /// A point of the source's past that is remembered: what a mirror holds at `last`, or the position as it was saved last.
    pub known: Option<FedPoint>,
    /// The first message that the source has at the known sequence or after it.
    pub source: Option<FedPoint>,
}

/// Why the target may not continue; `None` if nothing contradicts it.
pub(super) fn objection(evidence: &Evidence) -> Option<String> {
    let Evidence { last, source_last, known, source } = *evidence;
    if source_last < last {
        return Some(format!(
            "the source ends at sequence {source_last}, and the target holds messages up to {last}: the source was \
             recreated, or lost its end"
        ));
    }
    if let Some(known) = known.filter(|known| source_last < known.seq) {
        return Some(format!(
            "the source ends at sequence {source_last}, and was read up to {}: it was recreated, or lost its end",
            known.seq
        ));
    }
    let (known, source) = (known?, source?);
    let (known_ns, time) = (known.time_ns?, source.time_ns?);
    let differs = if source.seq == known.seq { time != known_ns } else { time < known_ns };
    differs.then(|| {
        format!(
            "message {} of the source was stored at another time than the one that was taken: the source is another stream \
             than before",
            source.seq
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(seq: u64, time_ns: i64) -> Option<FedPoint> {
        Some(FedPoint { seq, time_ns: Some(time_ns) })
    }

    fn check(source_last: u64, source: Option<FedPoint>, known: Option<FedPoint>) -> bool {
        objection(&Evidence { last: 10, source_last, known, source }).is_some()
    }

    #[test]
    fn the_same_stream_continues() {
        assert!(!check(10, point(10, 5), point(10, 5)));
        assert!(!check(20, point(12, 7), point(10, 5)), "10 and 11 were deleted at the source");
        assert!(!check(20, None, point(10, 5)), "everything from 10 on was deleted");
        assert!(!check(20, point(8, 4), point(8, 4)), "saved before the last ones were taken");
        assert!(!check(20, point(10, 5), None), "nothing to compare");
    }

    #[test]
    fn another_stream_does_not() {
        assert!(check(9, None, point(10, 5)), "shorter");
        assert!(check(20, point(10, 6), point(10, 5)), "another message");
        assert!(check(20, point(12, 4), point(10, 5)), "a later message that is older");
        assert!(check(20, point(8, 6), point(8, 5)), "another message than the saved one");
        assert!(check(20, point(12, 6), point(12, 5)), "another one than one out of scope that was read");
        assert!(check(11, None, point(12, 5)), "shorter than what was read");
    }
}
