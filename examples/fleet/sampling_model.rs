//! Which reports have to be copied, from their stored times and sizes alone.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::SIZE_TRIGGER;

/// A report as a site has stored it.
pub(super) struct StoredReport<'a> {
    pub(super) id: &'a str,
    pub(super) sender: &'a str,
    /// Stored at, in ns since 1970.
    pub(super) time: u64,
    pub(super) size: usize,
}

/// Reports of one site whose copy is missing, and whose copy should not be there.
pub(super) fn wrongly_sampled(
    stored: &[StoredReport<'_>],
    copied: &HashSet<String>,
    inspect: Duration,
) -> (usize, usize) {
    let inspect = inspect.as_nanos() as u64;
    let (mut missing, mut needless) = (0, 0);
    let mut last_copy: HashMap<&str, (u64, usize)> = HashMap::new();
    for report in stored {
        let is_copied = copied.contains(report.id);
        let (must, may) = match last_copy.get(report.sender) {
            None => (true, true),
            Some((time, size)) => {
                let age = report.time.saturating_sub(*time);
                let resized = report.size.abs_diff(*size) >= SIZE_TRIGGER;
                // The interval of a sender is up to a tenth shorter.
                (resized || age >= inspect, resized || age >= inspect / 10 * 9)
            }
        };
        missing += usize::from(must && !is_copied);
        needless += usize::from(!may && is_copied);
        if is_copied {
            last_copy.insert(report.sender, (report.time, report.size));
        }
    }
    (missing, needless)
}

/// How often each sender was not seen for longer than this; all of them are silent at the end.
pub(super) fn silences<'a>(stored: &[StoredReport<'a>], warn: Duration) -> HashMap<&'a str, usize> {
    let mut seen: HashMap<&str, (u64, usize)> = HashMap::new();
    for report in stored {
        let (last, count) = seen.entry(report.sender).or_insert((report.time, 1));
        if report.time.saturating_sub(*last) > warn.as_nanos() as u64 {
            *count += 1;
        }
        *last = report.time;
    }
    seen.into_iter().map(|(sender, (_, count))| (sender, count)).collect()
}
