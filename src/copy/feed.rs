//! Feeds the bytes of a server to everything in a run that accepts messages: the writer in each of its ways, each kind
//! of reader, dead letters, and the decoders of answers. For fuzzing: no input from a server may cause a panic.

use std::sync::{Arc, LazyLock};

use futures_util::FutureExt;
use nats_lane::{
    Batch, Connection, Endpoint, Error, Lane, Message,
    jetstream::{ConsumerInfo, Delivery, StreamInfo, decode, decode_message},
};
use serde_json::{Value, json};
use tokio::{
    runtime::Runtime,
    time::{Duration, Instant},
};

use super::{
    flow::{
        budget::Budget,
        window::{SourcePoint, Window},
    },
    source::{
        consumers::{ConsumerLabels, Names},
        durable::{Durable, Way},
        reader::{Incoming, Range, Reader, explicit::Explicit, pushed::Pushed},
        renewal::ConsumerRenewal,
    },
    target::{
        dead_letter::DeadLetters,
        drops::{DropLimits, Drops},
        headers::Allowed,
        provenance::Tag,
        stream::Abilities,
        target_watch::TargetWatch,
        writer::{Supply, Writer},
    },
};
use crate::{
    config::{self, Replication},
    nats::account,
    status::{TargetMode, Transport},
    store::PositionRecord,
};

/// The inbox of every lane: `<INBOX>.2` belongs to the first subscriber, under subscription 2. Requests are answered
/// below `<INBOX>.r` under subscription 1.
pub const INBOX: &str = "_I";

/// Messages that were handed out before.
const SENT: u64 = 8;

static REPLICATION: LazyLock<Option<Arc<Replication>>> = LazyLock::new(|| {
    let document = json!({"stream": "S", "source_url": "nats://s", "target_url": "nats://t", "target_stream": "T"});
    config::parse_value(&document, "SITE").ok().map(Arc::new)
});

/// Lanes have a clock, which belongs to a runtime.
static RUNTIME: LazyLock<Option<Runtime>> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().ok());

/// Feeds the complete messages in the bytes; returns how many there were, `None` if the bytes are not the protocol.
pub fn feed(bytes: &[u8]) -> Option<usize> {
    let batch = Batch::parse(bytes).ok()?;
    let replication = REPLICATION.clone()?;
    let _runtime = RUNTIME.as_ref()?.enter();
    for transport in [Transport::FastIngest, Transport::Pipelined] {
        for mode in [TargetMode::Exclusive, TargetMode::Shared] {
            write(&batch, &replication, Abilities { transport, mode, allowed: Allowed::default() }).ok()?;
        }
    }
    read(&batch, &replication).ok()?;
    answers(&batch);
    Some(batch.len())
}

fn lane() -> Result<Lane, Error> {
    Lane::alone(&Connection::to(Endpoint::parse("nats://h").map_err(Error::retry)?), INBOX)
}

fn info(last: u64) -> Result<StreamInfo, Error> {
    let info = json!({"config": {"name": "T"}, "state": {"first_seq": 1, "last_seq": last, "messages": last}});
    decode(info.to_string().as_bytes())
}

fn tag() -> Tag {
    Tag::new("S", "SITE", "SITE")
}

fn sent(number: u64) -> Incoming<'static> {
    let message = Message { sid: 2, subject: b"s.a", reply: b"", header: b"", payload: b"x" };
    let delivery = Delivery { stream_seq: number, consumer_seq: number, time_ns: 1, pending: 0 };
    Incoming { delivery, after: number - 1, message }
}

fn write(batch: &Batch, replication: &Arc<Replication>, abilities: Abilities) -> Result<(), Error> {
    let (mut lane, now) = (lane()?, Instant::now());
    let record = PositionRecord::new();
    let mut writer = Writer::open(&mut lane, replication.clone(), tag(), abilities, &info(5)?, &record);
    let mut window = Window::new(SourcePoint { seq: 0, time_ns: None }, None);
    for number in 1..=SENT {
        if let Ok(outgoing) = writer.prepare(&sent(number), 1) {
            writer.send(outgoing, &mut lane, &mut window, &sent(number), now, number);
        }
    }
    for message in batch.iter() {
        // A run does not read further after an error.
        if writer.accept(&message, &mut window, now).and_then(|()| writer.outcome(&window, now, now)).is_err() {
            return Ok(());
        }
        let _ = (writer.ready(), writer.is_owed(&window), writer.adds_up_to(), writer.exact(&window));
        if let Ok(outgoing) = writer.prepare(&sent(SENT + 1), 1)
            && writer.ready()
        {
            writer.send(outgoing, &mut lane, &mut window, &sent(SENT + 1), now, SENT + 1);
        }
        writer.commit_if_due(&mut lane, Supply::Dry, now);
    }
    Ok(())
}

fn read(batch: &Batch, replication: &Replication) -> Result<(), Error> {
    let made: ConsumerInfo = decode(br#"{"num_pending": 3, "config": {"max_ack_pending": 100}}"#)?;
    plain(batch, &made)?;
    explicit(batch, &made)?;
    pushed(batch, &made)?;
    renewal(batch, replication)?;
    dead_letters(batch)?;
    watch(batch)
}

fn plain(batch: &Batch, made: &ConsumerInfo) -> Result<(), Error> {
    let range = Range { stream: "S", filters: &[], from: 1, headers_only: false };
    let (mut source, budget) = (lane()?, Budget::new(usize::MAX));
    let mut reader = Reader::from_new(&mut source, &range, "C".to_owned(), 1 << 20, made);
    reader.pull(&mut source, &budget);
    let _ = reader.accept(batch.clone());
    let _ = (reader.pending(), reader.seen(), reader.next());
    let mut letters = DeadLetters::open(&mut source, "dead", "S", "S", tag(), 0);
    while let Some(incoming) = reader.peek() {
        let _ = letters.send(&mut source, &incoming, &Error::retry("x"), Instant::now());
        reader.take();
    }
    reader.pull(&mut source, &budget);
    Ok(())
}

fn durable(way: Way, made: &ConsumerInfo) -> Durable {
    Durable { name: "C".to_owned(), way, info: made.clone() }
}

fn explicit(batch: &Batch, made: &ConsumerInfo) -> Result<(), Error> {
    let mut source = lane()?;
    // Nothing is requested where nothing is pending.
    let explicit = Explicit::open(&mut source, "S", durable(Way::Explicit, made), 1, 1 << 20).now_or_never();
    if let Some(Ok(mut explicit)) = explicit {
        let _ = explicit.accept(batch.clone());
        explicit.settled(&mut source, 2);
        let _ = (explicit.is_barred(), explicit.reader.pending());
    }
    Ok(())
}

fn pushed(batch: &Batch, made: &ConsumerInfo) -> Result<(), Error> {
    let (mut source, budget) = (lane()?, Budget::new(usize::MAX));
    let (sid, inbox) = source.reserve_inbox();
    let mut pushed = Pushed::open(&mut source, "S", &durable(Way::FlowControl, made), (sid, &inbox), 1, 1 << 20);
    for batch in [batch.clone(), batch.clone()] {
        let _ = pushed.accept(batch);
        pushed.ask_about_jumps(&mut source);
        let _ = (pushed.pending(), pushed.may_read(&budget), pushed.is_barred());
        while pushed.peek().is_some() {
            pushed.take();
        }
        pushed.settled(&mut source, 2);
    }
    Ok(())
}

fn renewal(batch: &Batch, replication: &Replication) -> Result<(), Error> {
    let (behind, name) = (SourcePoint { seq: 4, time_ns: Some(1) }, "C".to_owned());
    let mut source = lane()?;
    let labels = ConsumerLabels::default();
    let names = (name, Some("W".to_owned()), &labels);
    let mut renewal =
        ConsumerRenewal::begin(&mut source, "S", replication.scope.filters(), behind, names, String::new());
    // Whatever it waits for.
    for _ in 0..4 {
        let _ = renewal.accept(&mut source, batch, 1 << 20);
    }
    Ok(())
}

fn dead_letters(batch: &Batch) -> Result<(), Error> {
    let mut source = lane()?;
    let mut letters = DeadLetters::open(&mut source, "dead", "S", "S", tag(), 0);
    for number in 1..=SENT {
        letters
            .send(&mut source, &sent(number), &Error::retry("x"), Instant::now())
            .map_err(|e| Error::retry(e.message))?;
    }
    batch.iter().for_each(|message| _ = letters.accept(&message));
    while letters.pop().is_some() {}
    Ok(())
}

fn watch(batch: &Batch) -> Result<(), Error> {
    let mut drops = Drops::default();
    let limits = DropLimits { age: true, messages: Some(9), bytes: None, per_subject: false, words: String::new() };
    drops.begin(&info(5)?, Some(limits), 3);
    let (mut watch, mut target, now) = (TargetWatch::new(drops, tag(), Names::new("sr")), lane()?, Instant::now());
    for (minutes, message) in (0..).zip(batch.iter()) {
        watch.ask_state(&mut target, "T", Some(3), now + Duration::from_secs(60 * minutes));
        watch.accept(&mut target, "T", &message, 3, false);
    }
    Ok(())
}

/// Decodes every kind of answer.
fn answers(batch: &Batch) {
    for message in batch.iter() {
        let _ = (decode::<StreamInfo>(message.payload), decode::<ConsumerInfo>(message.payload));
        let _ = (decode::<account::AccountInfo>(message.payload), decode::<Value>(message.payload));
        if let Ok(Some(stored)) = decode_message(message.payload) {
            let _ = (tag().origin(&stored.header), tag().other_site(&stored.header));
        }
        let _ = (tag().origin(message.header), tag().passed(message.header));
    }
}
