//! A source consumer that is recreated inside a run, while the run continues with everything else.
//!
//! It begins after the newest message that was handed out, so messages in flight are not affected. That message is also
//! the witness: it is read once the consumer exists, and only if the source still has it with the same stored time is
//! this the same stream. Where messages are large, another consumer shows its stored time without its
//! payload; if that one delivers no message, the stream's leader is asked.

use std::time::Duration;

use nats_lane::{
    Batch, Error, Lane, Message,
    jetstream::{
        ConsumerInfo, Delivery, TOO_MANY_CONSUMERS, answer_in, create_new_consumer_call, decode, decode_message,
        is_delivery, message_call, parse_delivery, within_limit,
    },
};
use serde_json::{Value, json};

use crate::copy::{
    flow::window::SourcePoint,
    source::{
        consumers::ConsumerLabels,
        reader::{Range, Reader},
    },
};

/// Time for the consumer that shows the witness; it delivers it at once, or not at all.
const SHOWN_WITHIN: Duration = Duration::from_secs(2);

/// One attempt to recreate the consumer.
#[derive(Debug)]
pub(in crate::copy) struct ConsumerRenewal {
    stream: String,
    filters: Vec<String>,
    /// The newest message that was handed out.
    after: SourcePoint,
    consumer: String,
    labels: ConsumerLabels,
    /// Name of the consumer that shows the witness without its payload, where one is used.
    shows: Option<String>,
    /// The same once it was requested.
    shower: String,
    /// The configuration of the requested consumer.
    config: Value,
    waits_for: Waits,
    /// The last request.
    request: String,
    /// The request that deletes the consumer before it; `None` once that is answered.
    deletion: Option<String>,
    /// The stream had no room for a second consumer.
    no_room: bool,
    /// That happened, and the creation was repeated.
    again: bool,
}

#[derive(Debug)]
enum Waits {
    Consumer,
    /// The consumer that shows the witness.
    Shower(Box<ConsumerInfo>),
    /// Its delivery, on this subscription.
    Shown(Box<ConsumerInfo>, u64),
    /// The leader's answer about the witness.
    Witness(Box<ConsumerInfo>),
}

impl ConsumerRenewal {
    /// Requests the consumer. `deletion` is the request that deletes the one before it. `shows` is the name of another
    /// one, for a witness that is too large to be read.
    pub fn begin(
        lane: &mut Lane,
        stream: &str,
        filters: &[String],
        after: SourcePoint,
        (consumer, shows, labels): (String, Option<String>, &ConsumerLabels),
        deletion: String,
    ) -> Self {
        let mut renewal = Self {
            stream: stream.to_owned(),
            filters: filters.to_vec(),
            after,
            consumer,
            shows,
            shower: String::new(),
            labels: labels.clone(),
            config: Value::Null,
            waits_for: Waits::Consumer,
            request: String::new(),
            deletion: Some(deletion),
            no_room: false,
            again: false,
        };
        renewal.config = renewal.range().config(&renewal.consumer, &renewal.labels);
        renewal.create(lane);
        renewal
    }

    fn create(&mut self, lane: &mut Lane) {
        let (what, body) = create_new_consumer_call(&self.stream, &self.consumer, &self.config);
        self.request = lane.send_request(&format!("{}.{what}", lane.api_prefix()), body.to_string().as_bytes());
    }

    fn range(&self) -> Range<'_> {
        Range { stream: &self.stream, filters: &self.filters, from: self.after.seq + 1, headers_only: false }
    }

    /// Handles a batch that the lane received; returns the new reader or the error, once that is known. `bytes` as for
    /// [`Reader::open`].
    pub fn accept(&mut self, lane: &mut Lane, batch: &Batch, bytes: usize) -> Option<Result<Reader, Error>> {
        let made = match &self.waits_for {
            Waits::Shown(_, sid) => {
                let sid = *sid;
                batch.iter().find(|message| message.sid == sid).and_then(|shown| self.shown(lane, &shown, bytes))
            }
            _ => answer_in(batch, &self.request).and_then(|answer| self.step(lane, answer, bytes).transpose()),
        };
        if self.deletion.as_deref().is_some_and(|deletion| answer_in(batch, deletion).is_some()) {
            self.deletion = None;
        }
        if self.deletion.is_none() && std::mem::take(&mut self.no_room) {
            self.create(lane);
        }
        made
    }

    fn step(&mut self, lane: &mut Lane, answer: Result<&[u8], Error>, bytes: usize) -> Result<Option<Reader>, Error> {
        match &self.waits_for {
            Waits::Consumer => {
                let info: ConsumerInfo = match decode(answer?) {
                    Ok(info) => info,
                    Err(error) if error.is_api(TOO_MANY_CONSUMERS) && !std::mem::replace(&mut self.again, true) => {
                        self.no_room = true;
                        return Ok(None);
                    }
                    Err(error) => {
                        self.config = within_limit(&self.config, &error).ok_or(error)?;
                        self.create(lane);
                        return Ok(None);
                    }
                };
                match self.shows.take() {
                    Some(name) => self.show(lane, &name, info),
                    None => self.read(lane, info),
                }
                Ok(None)
            }
            Waits::Shower(info) => {
                let info = (**info).clone();
                if answer.and_then(decode::<ConsumerInfo>).is_err() {
                    self.read(lane, info);
                    return Ok(None);
                }
                let (sid, inbox) = lane.open_inbox();
                let pull = json!({ "batch": 1, "expires": SHOWN_WITHIN.as_nanos() as u64 });
                let subject = format!("{}.CONSUMER.MSG.NEXT.{}.{}", lane.api_prefix(), self.stream, self.shower);
                lane.publish(&subject, &format!("{inbox}.1"), pull.to_string().as_bytes());
                self.waits_for = Waits::Shown(Box::new(info), sid);
                Ok(None)
            }
            Waits::Shown(..) => Ok(None),
            Waits::Witness(info) => {
                let found = decode_message(answer?)?;
                let found = found.map(|message| message.time_ns);
                if found.is_none() || found != self.after.time_ns {
                    let seq = self.after.seq;
                    return Err(Error::retry(format!(
                        "message {seq} is not there to tell that the source is the same"
                    )));
                }
                Ok(Some(Reader::from_new(lane, &self.range(), self.consumer.clone(), bytes, info)))
            }
        }
    }

    /// Requests the witness from the stream's leader.
    fn read(&mut self, lane: &mut Lane, info: ConsumerInfo) {
        let (what, body) = message_call(&self.stream, self.after.seq);
        self.request = lane.send_request(&format!("{}.{what}", lane.api_prefix()), body.to_string().as_bytes());
        self.waits_for = Waits::Witness(Box::new(info));
    }

    /// Requests the consumer that shows the witness.
    fn show(&mut self, lane: &mut Lane, name: &str, info: ConsumerInfo) {
        let range = Range { stream: &self.stream, filters: &[], from: self.after.seq, headers_only: true };
        let (what, body) = create_new_consumer_call(&self.stream, name, &range.config(name, &self.labels));
        self.request = lane.send_request(&format!("{}.{what}", lane.api_prefix()), body.to_string().as_bytes());
        self.shower = name.to_owned();
        self.waits_for = Waits::Shower(Box::new(info));
    }

    /// Handles the delivery of that consumer. No message, or another one, proves nothing: it may be on a server that
    /// has less the stream than its leader.
    fn shown(&mut self, lane: &mut Lane, message: &Message<'_>, bytes: usize) -> Option<Result<Reader, Error>> {
        let Waits::Shown(info, sid) = &self.waits_for else { return None };
        let (info, sid) = ((**info).clone(), *sid);
        lane.close_inbox(sid);
        let subject = format!("{}.CONSUMER.DELETE.{}.{}", lane.api_prefix(), self.stream, self.shower);
        lane.send_request(&subject, b"");
        let delivery = parse_delivery(message.reply).filter(|_| is_delivery(message.reply));
        let holds =
            |delivery: &Delivery| delivery.stream_seq == self.after.seq && Some(delivery.time_ns) == self.after.time_ns;
        if delivery.as_ref().is_some_and(holds) {
            return Some(Ok(Reader::from_new(lane, &self.range(), self.consumer.clone(), bytes, &info)));
        }
        self.read(lane, info);
        None
    }
}

#[cfg(test)]
mod tests {
    use nats_lane::{Turn, pipe};
    use serde_json::json;

    use super::*;
    /// The result of a renewal after message 5, stored at 2026-01-01T00:00:05Z, where the source answers this about it.
    async fn renewed(witness: Value) -> Result<Reader, Error> {
        let (mut lane, mut server) = pipe::lane().await;
        let after = SourcePoint { seq: 5, time_ns: Some(1_767_225_605_000_000_000) };
        let deletion = lane.send_request("$JS.API.CONSUMER.DELETE.S.before", b"");
        let mut renewal = ConsumerRenewal::begin(
            &mut lane,
            "S",
            &[],
            after,
            ("next".to_owned(), None, &ConsumerLabels::default()),
            deletion,
        );
        let answer = async {
            loop {
                let asked = server.asked().await;
                let answer = match &asked.subject {
                    subject if subject.starts_with("$JS.API.CONSUMER.CREATE.S.next") => json!({"num_pending": 3}),
                    subject if subject.starts_with("$JS.API.STREAM.MSG.GET.S") => witness.clone(),
                    _ => json!({"success": true}),
                };
                server.answer(&asked, &answer.to_string()).await;
            }
        };
        let renew = async {
            loop {
                if let Turn::Received(batch) = lane.turn().await?
                    && let Some(made) = renewal.accept(&mut lane, &batch, 1 << 20)
                {
                    break made;
                }
            }
        };
        tokio::select! {
            made = renew => made,
            () = answer => unreachable!(),
        }
    }

    #[tokio::test]
    async fn a_consumer_is_not_read_from_without_its_witness() {
        let stored = |time: &str| json!({"message": {"subject": "s", "seq": 5, "time": time}});
        let reader = renewed(stored("2026-01-01T00:00:05Z")).await.unwrap();
        assert_eq!((reader.consumer(), reader.delivered()), ("next", 5));
        let gone = json!({"error": {"code": 404, "err_code": 10037, "description": "no message found"}});
        for another in [stored("2026-01-01T00:00:05.000000001Z"), gone] {
            let error = renewed(another.clone()).await.expect_err(&another.to_string());
            assert!(error.message.contains("message 5 is not there"), "{error}");
        }
    }
}
