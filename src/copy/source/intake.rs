//! The input of a run: one kind of reader for each kind of stream.

use nats_lane::{Batch, Error, Lane, jetstream::StreamInfo};
use tokio::time::Instant;

use crate::{
    config::Replication,
    copy::{
        flow::{budget::Budget, throttle, window::SourcePoint},
        source::{
            consumers::Names,
            durable::{Durable, Owner, Way},
            reader::{Incoming, Lost, Range, Reader, explicit::Explicit, pushed::Pushed},
        },
    },
};

/// One of the readers.
#[derive(Debug)]
pub(crate) enum Intake {
    /// Of a stream that keeps its messages, without acks.
    Plain(Box<Reader>),
    /// Of a stream that removes acknowledged messages, with an ack per message.
    Explicit(Box<Explicit>),
    /// Of a stream that removes acknowledged messages, with acks by flow control.
    Pushed(Box<Pushed>),
}

impl Intake {
    /// Reads after `position`. `durable` is the existing consumer at the source, where messages are acknowledged.
    pub async fn open(
        lane: &mut Lane,
        replication: &Replication,
        owner: Owner<'_>,
        source: &StreamInfo,
        durable: Option<Durable>,
        names: &mut Names,
        position: u64,
    ) -> Result<Self, Error> {
        let stream = &replication.source.stream;
        let bytes = throttle::read_ahead(&replication.limits);
        let size = source.state.bytes.checked_div(source.state.messages).unwrap_or_default();
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if !Durable::is_needed(source) {
            let filters = replication.scope.filters();
            let range = Range { stream, filters, from: position + 1, headers_only: false };
            let mut reader = Reader::open(lane, &range, names, bytes).await?;
            reader.expect(size);
            return Ok(Self::Plain(Box::new(reader)));
        }
        let way = durable.as_ref().map_or_else(|| Way::of(source), |durable| durable.way);
        match way {
            Way::Explicit => {
                let durable = Durable::open(lane, replication, owner, source, durable, None, position).await?;
                let mut explicit = Explicit::open(lane, stream, durable, position, bytes).await?;
                explicit.reader.expect(size);
                Ok(Self::Explicit(Box::new(explicit)))
            }
            Way::FlowControl => {
                let (sid, inbox) = lane.reserve_inbox();
                let subject = format!("{inbox}.m");
                let durable =
                    Durable::open(lane, replication, owner, source, durable, Some(&subject), position).await?;
                Ok(Self::Pushed(Box::new(Pushed::open(lane, stream, &durable, (sid, &subject), position, bytes))))
            }
        }
    }

    /// Messages of the stream that match and are not taken yet, by the last report.
    pub fn pending(&self) -> u64 {
        match self {
            Self::Plain(reader) => reader.pending(),
            Self::Explicit(explicit) => explicit.pending(),
            Self::Pushed(pushed) => pushed.pending(),
        }
    }

    /// The oldest message that was read and not taken.
    pub fn next(&self) -> Option<SourcePoint> {
        match self {
            Self::Plain(reader) => reader.next(),
            Self::Explicit(explicit) => explicit.reader.next(),
            Self::Pushed(pushed) => pushed.next(),
        }
    }

    /// The reader whose consumer can be recreated inside a run.
    pub fn plain(&self) -> Option<&Reader> {
        match self {
            Self::Plain(reader) => Some(reader),
            Self::Explicit(_) | Self::Pushed(_) => None,
        }
    }

    /// The same, to change it.
    pub fn plain_mut(&mut self) -> Option<&mut Reader> {
        match self {
            Self::Plain(reader) => Some(reader),
            Self::Explicit(_) | Self::Pushed(_) => None,
        }
    }

    /// Handles a batch that the lane received; messages for other subscriptions are ignored.
    pub fn accept(&mut self, batch: Batch) -> Result<(), Lost> {
        match self {
            Self::Plain(reader) => reader.accept(batch),
            Self::Explicit(explicit) => Ok(explicit.accept(batch)?),
            Self::Pushed(pushed) => Ok(pushed.accept(batch)?),
        }
    }

    /// The next message, if one was read; [`Intake::take`] removes it.
    pub fn peek(&self) -> Option<Incoming<'_>> {
        match self {
            Self::Plain(reader) => reader.peek(),
            Self::Explicit(explicit) => explicit.reader.peek(),
            Self::Pushed(pushed) => pushed.peek(),
        }
    }

    /// Removes the message that [`Intake::peek`] shows.
    pub fn take(&mut self) {
        match self {
            Self::Plain(reader) => reader.take(),
            Self::Explicit(explicit) => explicit.reader.take(),
            Self::Pushed(pushed) => pushed.take(),
        }
    }

    /// Requests more messages where that is due, and asks about skipped sequences. `drained`: no message waits to be sent.
    pub fn pull(&mut self, lane: &mut Lane, budget: &Budget, drained: bool) {
        match self {
            Self::Plain(reader) => {
                reader.set_large_ahead(drained);
                reader.pull(lane, budget);
            }
            Self::Explicit(explicit) => {
                explicit.reader.set_large_ahead(drained);
                explicit.pull(lane, budget);
            }
            Self::Pushed(pushed) => pushed.ask_about_jumps(lane),
        }
    }

    /// Whether the lane may be read now.
    pub fn may_read(&mut self, budget: &Budget) -> bool {
        match self {
            Self::Plain(_) | Self::Explicit(_) => true,
            Self::Pushed(pushed) => pushed.may_read(budget),
        }
    }

    /// Whether the source delivers no more before some of its deliveries are settled.
    pub fn is_barred(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Explicit(explicit) => explicit.is_barred(),
            Self::Pushed(pushed) => pushed.is_barred(),
        }
    }

    /// Everything up to a position is settled: acknowledges it.
    pub fn settled(&mut self, lane: &mut Lane, position: u64) {
        match self {
            Self::Plain(_) => {}
            Self::Explicit(explicit) => explicit.settled(lane, position),
            Self::Pushed(pushed) => pushed.settled(lane, position),
        }
    }

    /// Whether no settled message waits to be acknowledged.
    pub fn is_acked(&self) -> bool {
        match self {
            Self::Plain(_) | Self::Explicit(_) => true,
            Self::Pushed(pushed) => pushed.is_acked(),
        }
    }

    /// An error if the consumer gives no more signs of life; a plain one is supervised by the watchdog.
    pub fn check(&mut self, lane: &Lane, now: Instant, reads: bool) -> Result<(), Error> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Explicit(explicit) => explicit.check(lane, now),
            Self::Pushed(pushed) => pushed.check(lane, now, reads),
        }
    }

    /// Ends reading; an ephemeral consumer of our own is deleted.
    pub fn close(self, lane: &mut Lane) {
        match self {
            Self::Plain(reader) => reader.close(lane),
            Self::Explicit(explicit) => explicit.close(lane),
            Self::Pushed(pushed) => pushed.close(lane),
        }
    }
}
