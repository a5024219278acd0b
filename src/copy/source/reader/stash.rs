//! Messages that were read and not taken yet, in the buffers that they were read into.

use std::collections::VecDeque;

use nats_lane::{Batch, jetstream::Delivery};

use super::{Incoming, SourcePoint};
#[derive(Debug)]
struct Chunk {
    batch: Batch,
    /// Index in the batch and the parsed reply subject, for each delivered message.
    items: Vec<(u32, Delivery)>,
    next: usize,
}

/// Messages that wait to be taken, in order.
#[derive(Debug)]
pub(super) struct Stash {
    chunks: VecDeque<Chunk>,
    bytes: usize,
    /// Stream sequence of the message that was taken last.
    taken: u64,
}

impl Stash {
    /// Empty; everything up to a stream sequence counts as taken.
    pub(super) fn new(taken: u64) -> Self {
        Self { chunks: VecDeque::new(), bytes: 0, taken }
    }

    /// Bytes of the kept buffers.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of messages.
    pub(super) fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.items.len() - chunk.next).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Position of the oldest message in the stream.
    pub(super) fn next(&self) -> Option<SourcePoint> {
        let delivery = self.chunks.front().map(|chunk| chunk.items[chunk.next].1)?;
        Some(SourcePoint { seq: delivery.stream_seq, time_ns: Some(delivery.time_ns) })
    }

    /// Keeps some messages of a batch.
    pub(super) fn push(&mut self, batch: Batch, items: Vec<(u32, Delivery)>) {
        if !items.is_empty() {
            self.bytes += batch.bytes();
            self.chunks.push_back(Chunk { batch, items, next: 0 });
        }
    }

    /// The next message.
    pub(super) fn peek(&self) -> Option<Incoming<'_>> {
        let chunk = self.chunks.front()?;
        let (index, delivery) = chunk.items[chunk.next];
        Some(Incoming { delivery, after: self.taken, message: chunk.batch.get(index as usize) })
    }

    /// Removes the message that [`Stash::peek`] shows.
    pub(super) fn take(&mut self) {
        let Some(chunk) = self.chunks.front_mut() else { return };
        self.taken = chunk.items[chunk.next].1.stream_seq;
        chunk.next += 1;
        if chunk.next == chunk.items.len() {
            self.bytes -= chunk.batch.bytes();
            self.chunks.pop_front();
        }
    }
}
