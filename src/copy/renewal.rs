//! A source consumer that is made anew inside a run, beside everything else that the run does: nothing waits for it.
//!
//! It begins behind the newest message that was handed out, so what is in the air is not touched. That message is also
//! the witness: it is read when the consumer is there, and only if the source still has it with the same stored time is
//! this the stream that was read before.

use serde_json::Value;

use super::{
    reader::{Range, Reader, consumer_name},
    window::SourcePoint,
};
use crate::nats::{
    Batch, Error, Lane,
    jetstream::{ConsumerInfo, answer_in, create_consumer_call, decode, decode_message, message_call, within_limit},
};

/// One attempt.
#[derive(Debug)]
pub(super) struct Renewal {
    stream: String,
    filters: Vec<String>,
    /// The newest message that was handed out.
    behind: SourcePoint,
    consumer: String,
    /// What the consumer is asked for.
    config: Value,
    waits_for: Waits,
    /// The request that was sent last.
    request: String,
}

#[derive(Debug)]
enum Waits {
    Consumer,
    Witness(Box<ConsumerInfo>),
}

impl Renewal {
    /// Asks for the consumer.
    pub fn begin(lane: &mut Lane, stream: &str, filters: &[String], behind: SourcePoint) -> Self {
        let mut renewal = Self {
            stream: stream.to_owned(),
            filters: filters.to_vec(),
            behind,
            consumer: consumer_name(),
            config: Value::Null,
            waits_for: Waits::Consumer,
            request: String::new(),
        };
        renewal.config = renewal.range().config(&renewal.consumer);
        renewal.ask(lane);
        renewal
    }

    fn ask(&mut self, lane: &mut Lane) {
        let (what, body) = create_consumer_call(&self.stream, &self.consumer, &self.config);
        self.request = lane.send_request(&format!("{}.{what}", lane.api_prefix()), body.to_string().as_bytes());
    }

    fn range(&self) -> Range<'_> {
        Range { stream: &self.stream, filters: &self.filters, from: self.behind.seq + 1, headers_only: false }
    }

    /// Takes what the lane received; the new reader, or why there is none, once that is known. `bytes` as for
    /// [`Reader::open`].
    pub fn accept(&mut self, lane: &mut Lane, batch: &Batch, bytes: usize) -> Option<Result<Reader, Error>> {
        let answer = answer_in(batch, &self.request)?;
        self.step(lane, answer, bytes).transpose()
    }

    fn step(&mut self, lane: &mut Lane, answer: Result<&[u8], Error>, bytes: usize) -> Result<Option<Reader>, Error> {
        match &self.waits_for {
            Waits::Consumer => {
                let info: ConsumerInfo = match decode(answer?) {
                    Ok(info) => info,
                    Err(error) => {
                        self.config = within_limit(&self.config, &error).ok_or(error)?;
                        self.ask(lane);
                        return Ok(None);
                    }
                };
                let (what, body) = message_call(&self.stream, self.behind.seq);
                let subject = format!("{}.{what}", lane.api_prefix());
                self.request = lane.send_request(&subject, body.to_string().as_bytes());
                self.waits_for = Waits::Witness(Box::new(info));
                Ok(None)
            }
            Waits::Witness(info) => {
                let found = decode_message(answer?)?;
                let found = found.map(|message| message.time_ns);
                if found.is_none() || found != self.behind.time_ns {
                    let seq = self.behind.seq;
                    return Err(Error::retry(format!(
                        "message {seq} is not there to tell that the source is the same"
                    )));
                }
                Ok(Some(Reader::of(lane, &self.range(), self.consumer.clone(), bytes, info)))
            }
        }
    }
}
