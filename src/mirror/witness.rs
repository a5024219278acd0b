//! Whether a mirror may continue after the messages that it holds: a source that was deleted and created again, or was restored from a
//! backup, has other messages under the same sequences. Pure.

use super::session::FedPoint;

/// The answers of both sides about the sequence after which the mirror wants to continue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evidence {
    /// The last sequence that the mirror holds, above 0.
    pub last: u64,
    /// Last sequence of the source.
    pub source_last: u64,
    /// The first message that the source has at `last` or after it.
    pub source: Option<FedPoint>,
    /// Stored time of the message that the target has at `last`; `None` if it has none there.
    pub target_ns: Option<i64>,
    /// The position as it was saved last.
    pub saved: Option<FedPoint>,
}

/// Why the mirror may not continue; `None` if nothing contradicts it.
pub(super) fn objection(evidence: &Evidence) -> Option<String> {
    let Evidence { last, source_last, source, target_ns, saved } = *evidence;
    if source_last < last {
        return Some(format!(
            "the source ends at sequence {source_last}, and the mirror holds messages up to {last}: the source was \
             recreated, or lost its end"
        ));
    }
    let known = saved.filter(|saved| saved.seq == last).and_then(|saved| saved.time_ns);
    let known = target_ns.or(known)?;
    let source = source?;
    let time = source.time_ns?;
    let differs = if source.seq == last { time != known } else { time < known };
    differs.then(|| {
        format!(
            "message {} of the source was stored at another time than the mirror knows: the source is another stream than \
             the one that was mirrored",
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

    fn check(source_last: u64, source: Option<FedPoint>, target_ns: Option<i64>, saved: Option<FedPoint>) -> bool {
        objection(&Evidence { last: 10, source_last, source, target_ns, saved }).is_some()
    }

    #[test]
    fn the_same_stream_continues() {
        assert!(!check(10, point(10, 5), Some(5), None));
        assert!(!check(20, point(12, 7), Some(5), None), "10 and 11 were deleted at the source");
        assert!(!check(20, None, Some(5), None), "everything from 10 on was deleted");
        assert!(!check(20, point(10, 5), None, point(10, 5)), "the mirror's was deleted");
        assert!(!check(20, point(10, 5), None, point(9, 4)), "nothing to compare");
    }

    #[test]
    fn another_stream_does_not() {
        assert!(check(9, None, Some(5), None), "shorter");
        assert!(check(20, point(10, 6), Some(5), None), "another message");
        assert!(check(20, point(12, 4), Some(5), None), "a later message that is older");
        assert!(check(20, point(10, 6), None, point(10, 5)), "by the saved position");
    }
}
