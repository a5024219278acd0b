//! Failing saves of the position: when to report them, and how far the copy may continue meanwhile. Pure.

use tokio::time::{Duration, Instant};

use crate::status::Counters;

/// How long failures stay unreported: a bucket whose servers elect a leader accepts no writes for some seconds.
const LATE: Duration = Duration::from_secs(5);
/// Messages that are copied at most while the position cannot be saved...
pub(in crate::copy) const MOST_MESSAGES: u64 = 100_000;
/// ... and their bytes.
pub(in crate::copy) const MOST_BYTES: u64 = 256 << 20;

/// Copied messages and their bytes, counted since the leader began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::copy) struct Copied {
    pub messages: u64,
    pub bytes: u64,
}

impl From<Counters> for Copied {
    fn from(counters: Counters) -> Self {
        Self { messages: counters.copied, bytes: counters.copied_bytes }
    }
}

/// A change to report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::copy) enum News {
    /// The position is not saved, and why.
    Unsaved(String),
    /// It is saved again.
    Saved,
}

/// The saves of one holder.
#[derive(Debug, Default)]
pub(in crate::copy) struct Unsaved {
    /// The copied amount at the last save; unknown before the first check.
    saved: Option<Copied>,
    /// When the first save failed since then, and why the last one did.
    failing: Option<(Instant, String)>,
    reported: bool,
}

impl Unsaved {
    /// The content of a save that was written.
    pub fn saved(&mut self, copied: Copied) {
        self.saved = Some(copied);
        self.failing = None;
    }

    /// Everything is saved, or the copy has no progress to save.
    pub fn nothing(&mut self) {
        self.failing = None;
    }

    /// A save was not written.
    pub fn failed(&mut self, now: Instant, why: String) {
        let since = self.failing.take().map_or(now, |(since, _)| since);
        self.failing = Some((since, why));
    }

    /// The change to report, once each.
    pub fn news(&mut self, now: Instant) -> Option<News> {
        let late = self.failing.as_ref().filter(|(since, _)| self.reported || now.duration_since(*since) >= LATE);
        match (late, self.reported) {
            (Some((_, why)), false) => {
                self.reported = true;
                Some(News::Unsaved(why.clone()))
            }
            (None, true) => {
                self.reported = false;
                Some(News::Saved)
            }
            _ => None,
        }
    }

    /// Whether it was reported that the position is not saved, and still is not.
    pub fn is_reported(&self) -> bool {
        self.reported
    }

    /// How far the copy may continue while no save is confirmed: one fails, or has been under way for long. `None`
    /// without a limit.
    pub fn limit(&mut self, copied: Copied, saving_since: Option<Instant>, now: Instant) -> Option<Copied> {
        let saved = *self.saved.get_or_insert(copied);
        let slow = saving_since.is_some_and(|since| now.duration_since(since) >= LATE);
        (slow || self.failing.is_some()).then(|| Copied {
            messages: saved.messages.saturating_add(MOST_MESSAGES),
            bytes: saved.bytes.saturating_add(MOST_BYTES),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(messages: u64) -> Copied {
        Copied { messages, bytes: messages * 10 }
    }

    #[test]
    fn a_failure_is_reported_once_it_lasts_and_so_is_its_end() {
        let begun = Instant::now();
        let after = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut unsaved = Unsaved::default();
        unsaved.failed(after(0), "a".to_owned());
        unsaved.failed(after(2), "b".to_owned());
        assert_eq!(unsaved.news(after(4)), None);
        unsaved.saved(copied(1));
        unsaved.failed(after(4), "c".to_owned());
        assert_eq!(unsaved.news(after(8)), None);
        unsaved.failed(after(8), "d".to_owned());
        assert_eq!(unsaved.news(after(9)), Some(News::Unsaved("d".to_owned())));
        unsaved.failed(after(10), "e".to_owned());
        assert_eq!((unsaved.news(after(20)), unsaved.is_reported()), (None, true));
        unsaved.saved(copied(2));
        assert_eq!((unsaved.news(after(20)), unsaved.news(after(21))), (Some(News::Saved), None));
        assert!(!unsaved.is_reported());
    }

    #[test]
    fn the_copy_is_bounded_from_the_last_save_on() {
        let now = Instant::now();
        let mut unsaved = Unsaved::default();
        assert_eq!(unsaved.limit(copied(7), None, now), None);
        unsaved.failed(now, "a".to_owned());
        let limit = |from: u64| Some(Copied { messages: from + MOST_MESSAGES, bytes: from * 10 + MOST_BYTES });
        assert_eq!(unsaved.limit(copied(9), None, now), limit(7));
        unsaved.saved(copied(50));
        assert_eq!(unsaved.limit(copied(60), Some(now), now), None);
        // One that hangs is no better.
        assert_eq!(unsaved.limit(copied(60), Some(now), now + LATE), limit(50));
        unsaved.failed(now, "b".to_owned());
        unsaved.nothing();
        assert_eq!(unsaved.limit(copied(60), None, now), None);
    }
}
