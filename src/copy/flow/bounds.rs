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
    pub fn are_full(&self, limits: &Limits, most: usize, bytes: usize) -> bool {
        self.window.len() >= limits.messages_in_flight.min(most)
            || (!self.window.is_empty() && self.window.bytes() + bytes > limits.bytes_in_flight)
    }

    /// Whether a message of so many bytes would be more than may be copied while the position is not saved.
    pub fn are_beyond_saves(&self, counters: &Counters, bytes: usize) -> bool {
        let Some(limit) = &self.limit else { return false };
        counters.copied + self.window.len() as u64 >= limit.messages
            || counters.copied_bytes + (self.window.bytes() + bytes) as u64 > limit.bytes
    }
}
