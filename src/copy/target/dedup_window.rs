//! How long a target has to remember ids, where only they keep a message from being stored twice. Pure.
//!
//! A server remembers ids for the stream's duplicate window, across changes of leaders too. After a restart it rebuilds
//! them from the messages that are still stored: ids of consumed messages are forgotten. So on streams that are
//! consumed the window has to cover a downtime. Each id takes some 240 bytes of memory at the server.

use chrono::{DateTime, Utc};
use tokio::time::Duration;

use crate::{
    copy::flow::watchdog::{DRAIN, LAST_SAVE, STALL},
    events::Event,
};

/// Longest time between two attempts to run a replication.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Time to connect and to search the end of the target, on a target that answers.
const SEARCH: Duration = Duration::from_secs(10);

/// The longest time from the first send of a message to the end of the search for it at the next start: it waits for
/// its ack until the run is given up, the run ends, the next one begins and searches.
pub(crate) const NEEDED: Duration =
    STALL.saturating_add(DRAIN).saturating_add(LAST_SAVE).saturating_add(LONGEST_PAUSE).saturating_add(SEARCH);

/// A target that identifies messages by ids, at the start of a run.
#[derive(Debug, Clone, Copy)]
pub(in crate::copy) struct IdWindowCheck {
    /// `duplicate_window` of the stream.
    pub window: Duration,
    /// Messages after the saved target sequence that were removed before they were read.
    pub unseen: u64,
    /// When the position was saved last, if that is known.
    pub saved_at: Option<DateTime<Utc>>,
    pub now: DateTime<Utc>,
}

/// The problem of a window of this length; `None` if it is long enough or the stream has none.
pub(crate) fn too_short(window: Duration) -> Option<String> {
    (!window.is_zero() && window < NEEDED).then(|| {
        format!(
            "the duplicate window of the target is {window:?}, and up to {NEEDED:?} can pass between the first send of a \
             message and the next start's search for it: what is sent again later than the window can be stored twice; \
             set `duplicate_window` to {NEEDED:?} or more"
        )
    })
}

impl IdWindowCheck {
    /// The event about the window itself.
    pub fn short_window(&self) -> Option<Event> {
        too_short(self.window).map(|reason| self.event(NEEDED, reason))
    }

    /// The event about messages that may have been copied and consumed since the last save: the search cannot find
    /// them, and the target may have forgotten their ids.
    pub fn long_downtime(&self) -> Option<Event> {
        let down = (self.now - self.saved_at?).to_std().ok()?;
        (self.unseen > 0 && down > self.window).then(|| {
            let (unseen, secs, window) = (self.unseen, down.as_secs(), self.window);
            let reason = format!(
                "{unseen} messages after the saved sequence at the target are consumed, so it is not known which of \
                 them are copies; the position was saved {secs} s ago, and the target's duplicate window is {window:?}: \
                 messages that were copied after that save are stored twice"
            );
            self.event(down, reason)
        })
    }

    fn event(&self, needed: Duration, reason: String) -> Event {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Event::DuplicateWindow { window_ms: ms(self.window), needed_ms: ms(needed), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_to_cover_a_stalled_run_and_the_next_start() {
        assert_eq!(NEEDED, Duration::from_secs(58));
        assert!(too_short(NEEDED).is_none());
        // Mirrors have none.
        assert!(too_short(Duration::ZERO).is_none());
        let text = too_short(Duration::from_secs(30)).unwrap();
        assert!(text.contains("target is 30s") && text.contains("58s"), "{text}");
    }

    #[test]
    fn consumed_messages_are_in_doubt_after_the_window() {
        let now = DateTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let check = |unseen, saved: Option<u64>, expect: Option<u64>| {
            let saved_at = saved.map(|secs| DateTime::UNIX_EPOCH + Duration::from_secs(secs));
            let look = IdWindowCheck { window: Duration::from_secs(120), unseen, saved_at, now };
            let needed = look.long_downtime().map(|event| match event {
                Event::DuplicateWindow { needed_ms, window_ms: 120_000, .. } => needed_ms,
                other => panic!("{other:?}"),
            });
            assert_eq!(needed, expect, "{unseen} {saved:?}");
        };
        check(3, Some(800), Some(200_000));
        check(3, Some(900), None);
        check(0, Some(800), None);
        check(3, None, None);
        // The clock of who saved it was ahead.
        check(3, Some(1_001), None);
    }
}
