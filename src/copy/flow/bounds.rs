//! The messages of one run that are in flight, and the limits that delay the next message.

use tokio::time::Instant;

use crate::{
    config::Limits,
    copy::flow::{
        throttle::Throttle,
        unsaved::Copied,
        window::{SourcePoint, Window},
    },
    status::Counters,
};

/// The messages in flight of one run, and their limits.
#[derive(Debug)]
pub(in crate::copy) struct Bounds {
    pub window: Window,
    throttle: Throttle,
    /// End of the wait that the limits per second impose on the next message.
    pub throttled: Option<Instant>,
    /// Where the copy stops while the position cannot be saved.
    pub limit: Option<Copied>,
    /// When a message last settled.
    pub moved: Instant,
}

impl Bounds {
    /// For a run that resumes after the position of `window`.
    pub fn new(window: Window, limits: &Limits, now: Instant) -> Self {
        Self { window, throttle: Throttle::new(limits, now), throttled: None, limit: None, moved: now }
    }

    /// Whether a message of so many bytes has to wait for the limits per second.
    pub fn is_throttled(&mut self, bytes: usize, now: Instant) -> bool {
        self.throttled = self.throttle.wait(bytes, now);
        self.throttled.is_some()
    }

    /// A message is skipped.
    pub fn skip(&mut self, source: SourcePoint, now: Instant) {
        self.window.skip(source);
        self.moved = now;
    }

    /// A message of so many bytes is sent.
    pub fn send(&mut self, bytes: usize, now: Instant) {
        if self.window.is_empty() {
            // No settlement was awaited until now.
            self.moved = now;
        }
        self.throttle.spend(bytes);
    }

    /// Whether the messages in flight delay one more of `bytes`, where the writer allows `most` messages.
    ///
    /// Two messages within the bound may be in flight together, also where their sum is beyond it: else each of the
    /// large ones waits for the confirmation of the one before, a round trip in which nothing is sent.
    pub fn are_full(&self, limits: &Limits, most: usize, bytes: usize) -> bool {
        let (messages, in_flight) = (self.window.len(), self.window.bytes());
        let fits = match messages {
            0 => true,
            1 => in_flight.max(bytes) <= limits.bytes_in_flight,
            _ => in_flight + bytes <= limits.bytes_in_flight,
        };
        messages >= limits.messages_in_flight.min(most) || !fits
    }

    /// Whether a message of so many bytes would be more than may be copied while the position is not saved.
    pub fn are_beyond_saves(&self, counters: &Counters, bytes: usize) -> bool {
        let Some(limit) = &self.limit else { return false };
        counters.copied + self.window.len() as u64 >= limit.messages
            || counters.copied_bytes + (self.window.bytes() + bytes) as u64 > limit.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::flow::window::MessageSize;

    #[test]
    fn two_messages_within_the_bound_are_in_flight_together() {
        let limits = Limits { messages_in_flight: 10, bytes_in_flight: 100, ..Limits::default() };
        let in_flight = |sizes: &[usize]| {
            let mut bounds = Bounds::new(Window::new(SourcePoint::default(), None), &limits, Instant::now());
            for (&bytes, seq) in sizes.iter().zip(1..) {
                let source = SourcePoint { seq, time_ns: None };
                bounds.window.hand_out(source, MessageSize { bytes, payload: bytes }, 0, None);
            }
            bounds
        };
        let full = |sizes: &[usize], next| in_flight(sizes).are_full(&limits, 10, next);
        assert_eq!((full(&[], 101), full(&[100], 100), full(&[40, 30], 30)), (false, false, false));
        assert_eq!((full(&[1], 101), full(&[101], 1), full(&[100, 100], 1)), (true, true, true));
        assert_eq!((full(&[1; 10], 1), in_flight(&[1]).are_full(&limits, 1, 1)), (true, true));
    }
}
