//! Messages in the buffer that they were read into.

use bytes::Bytes;

use crate::{
    Error,
    parser::{self, MessageFrame},
};

/// One message in a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Subscription it came for.
    pub sid: u64,
    /// Subject.
    pub subject: &'a [u8],
    /// Reply subject; empty for none.
    pub reply: &'a [u8],
    /// Header block; empty for none.
    pub header: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

/// Messages that arrived together, still in the buffer that they were read into.
#[derive(Debug, Clone)]
pub struct Batch {
    data: Bytes,
    frames: Vec<MessageFrame>,
}

impl Batch {
    pub(super) fn new(data: Bytes, frames: Vec<MessageFrame>) -> Self {
        Self { data, frames }
    }

    /// The complete messages at the front of some bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut frames = Vec::new();
        parser::parse(bytes, &mut frames, &mut Vec::new())?;
        Ok(Self { data: Bytes::copy_from_slice(bytes), frames })
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes of buffer that this batch keeps.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The message at an index below [`Batch::len`].
    pub fn get(&self, index: usize) -> Message<'_> {
        let frame = &self.frames[index];
        Message {
            sid: frame.sid,
            subject: frame.subject.of(&self.data),
            reply: frame.reply.of(&self.data),
            header: frame.header.of(&self.data),
            payload: frame.payload.of(&self.data),
        }
    }

    /// A part of the buffer, such as the payload of one of the messages, that can be kept without a copy.
    pub(super) fn shared(&self, part: &[u8]) -> Bytes {
        self.data.slice_ref(part)
    }

    /// All messages in order.
    pub fn iter(&self) -> impl Iterator<Item = Message<'_>> {
        (0..self.len()).map(|index| self.get(index))
    }
}
