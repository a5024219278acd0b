//! Reads a range of one stream, in order, over a connection of its own.

use nats_lane::{
    Error, Lane, Turn,
    jetstream::{Api, StreamInfo},
};
use tokio::time::{Duration, Instant};

use crate::copy::{
    Budget,
    source::{
        consumers::Names,
        reader::{Incoming, Range, Reader},
    },
};

/// Bytes that are read ahead.
const READ_AHEAD: usize = 4 << 20;
/// Silence after which reading is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(6);

/// One side, connected.
#[derive(Debug)]
pub(super) struct StreamSide {
    pub lane: Lane,
    pub names: Names,
    pub info: StreamInfo,
    /// When `info` was received.
    pub heard: Instant,
}

/// A range that is being read.
#[derive(Debug)]
pub(super) struct StreamReader<'a> {
    pub side: &'a mut StreamSide,
    reader: Reader,
    budget: Budget,
    filters: &'a [String],
    to: u64,
    /// The sequence up to which everything was taken.
    taken: u64,
    /// Nothing is left.
    over: bool,
    /// The leader of the stream confirmed that.
    confirmed: bool,
    read: Instant,
}

/// What is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct WantedRange<'a> {
    pub filters: &'a [String],
    pub from: u64,
    pub to: u64,
    pub headers_only: bool,
}

impl<'a> StreamReader<'a> {
    pub async fn open(side: &'a mut StreamSide, wanted: WantedRange<'a>) -> Result<Self, Error> {
        let WantedRange { filters, from, to, headers_only } = wanted;
        let stream = stream_name(&side.info).to_owned();
        let range = Range { stream: &stream, filters, from, headers_only };
        let reader = Reader::open(&mut side.lane, &range, &mut side.names, READ_AHEAD).await?;
        let over = reader.pending() == 0 || from > to;
        let budget = Budget::new(usize::MAX);
        Ok(Self {
            side,
            reader,
            budget,
            filters,
            to,
            taken: from.max(1) - 1,
            over,
            confirmed: false,
            read: Instant::now(),
        })
    }

    /// The next message of the range, if it was read.
    pub fn peek(&self) -> Option<Incoming<'_>> {
        self.reader.peek().filter(|incoming| !self.over && incoming.delivery.stream_seq <= self.to)
    }

    /// Removes the message that [`StreamReader::peek`] shows.
    pub fn take(&mut self) {
        if let Some(incoming) = self.reader.peek() {
            self.taken = incoming.delivery.stream_seq;
            self.over = incoming.delivery.pending == 0 || self.taken >= self.to;
            self.read = Instant::now();
        }
        self.reader.take();
    }

    /// Whether the whole range was taken.
    pub fn is_over(&self) -> bool {
        self.over || self.reader.peek().is_some_and(|incoming| incoming.delivery.stream_seq > self.to)
    }

    /// The sequence up to which everything was taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Reads more. With nothing left to read, only keeps the connection.
    pub async fn turn(&mut self) -> Result<(), Error> {
        let over = self.is_over();
        if !over {
            self.reader.pull(&mut self.side.lane, &self.budget);
        }
        if let Turn::Received(batch) = self.side.lane.turn().await? {
            self.reader.accept(batch).map_err(|lost| lost.error)?;
        }
        Ok(())
    }

    /// An error if nothing is read any more; `waits`: nothing is expected at the moment.
    pub fn check(&mut self, waits: bool) -> Result<(), Error> {
        if waits || self.is_over() || self.reader.peek().is_some() {
            self.read = Instant::now();
        }
        if self.read.max(self.side.lane.partial_at()).elapsed() > SILENCE {
            let stream = stream_name(&self.side.info);
            return Err(Error::retry(format!("stream `{stream}` cannot be read: nothing came for {SILENCE:?}")));
        }
        Ok(())
    }

    /// Whether the whole range was taken, and the leader of the stream has no message in it that was not delivered: the consumer
    /// may be on a server that has less, which is a transient error.
    pub async fn has_ended(&mut self) -> Result<bool, Error> {
        if self.confirmed || !self.is_over() {
            return Ok(self.confirmed);
        }
        self.confirm().await?;
        self.confirmed = true;
        Ok(true)
    }

    async fn confirm(&mut self) -> Result<(), Error> {
        let Self { side, reader, filters, to, taken, .. } = self;
        let (filters, to, taken) = (*filters, *to, *taken);
        if taken >= to || reader.peek().is_some_and(|incoming| incoming.delivery.stream_seq > to) {
            return Ok(());
        }
        let stream = stream_name(&side.info).to_owned();
        let mut api = Api::new(&mut side.lane);
        let everything = [">".to_owned()];
        for filter in if filters.is_empty() { &everything } else { filters } {
            let next = api.message_of(&stream, filter, taken + 1).await?;
            if let Some(next) = next.filter(|next| next.sequence <= to) {
                return Err(Error::retry(format!(
                    "stream `{stream}` was read up to sequence {taken}, but its leader has a message at {}: a server that has to \
                     catch up was asked",
                    next.sequence
                )));
            }
        }
        Ok(())
    }

    /// Ends reading.
    pub fn close(self) {
        self.reader.close(&mut self.side.lane);
    }
}

/// Reads a range and passes each message on.
pub(super) async fn read_each(
    side: &mut StreamSide,
    wanted: WantedRange<'_>,
    mut each: impl FnMut(&Incoming<'_>),
) -> Result<(), Error> {
    let mut reader = StreamReader::open(side, wanted).await?;
    while !reader.is_over() {
        while let Some(incoming) = reader.peek() {
            each(&incoming);
            reader.take();
        }
        if !reader.is_over() {
            let turn = tokio::time::timeout(SILENCE, reader.turn()).await;
            turn.unwrap_or(Ok(()))?;
            reader.check(false)?;
        }
    }
    reader.has_ended().await?;
    reader.close();
    Ok(())
}

/// Name of a stream.
pub(super) fn stream_name(info: &StreamInfo) -> &str {
    info.text("name")
}
