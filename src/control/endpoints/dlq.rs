//! `dlq.*`: the dead letters of a replication, which a stream at the source side has.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use nats_lane::{
    Dial, ErrorKind, Lane, headers,
    jetstream::{Api, PublishAck, StreamInfo},
};
use tokio::time::{Duration, Instant, timeout_at};
use tracing::info;

use super::{RequestContext, in_time, json, named, position::runnable};
use crate::{
    config::{OnReject, Replication, Sharing},
    control::{
        api::{
            Failure, LetterChange, LetterDone, LetterList, LetterRefused, LetterRequest, LetterRow, LetterShown,
            LettersChanged, LettersRequest,
        },
        service::Request,
    },
    copy::target::{
        provenance::Tag,
        replay::{LaterTarget, REPLACES_NEWER, ReplayedMessage, StoredLetter, keeps_last, letter_tag},
    },
    names,
};

/// From the request to the answer: less than a request may take.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_300);
/// How long letters are read for one page, and how long the next one is begun.
const WORK_WITHIN: Duration = Duration::from_millis(1_500);
/// Letters of one page where the request does not say.
const DEFAULT_LIMIT: usize = 100;
/// Letters of one change.
const MOST: usize = 100;
/// Bytes of payloads that one page reads: the server sends them too.
const READ_BYTES: usize = 32 << 20;
/// How often a letter is tried whose subject gets messages at the same time.
const TRIES: usize = 3;
/// Why a letter stays whose message the target has had, and has no longer.
const REMEMBERED: &str =
    "the target still knows its id, and takes it for a duplicate: replay it again after its duplicate window";

pub(super) async fn dlq_list(context: &RequestContext, request: Request) -> Result<LetterList, Failure> {
    let clock = RequestClock::start();
    let LettersRequest { replication, after, limit } =
        named(&request.body, |replication| LettersRequest { replication, ..LettersRequest::default() })?;
    clock.within(list(context, &replication, after, limit.unwrap_or(DEFAULT_LIMIT), &clock)).await
}

pub(super) async fn dlq_show(context: &RequestContext, request: Request) -> Result<LetterShown, Failure> {
    let clock = RequestClock::start();
    let LetterRequest { replication, letter } = json(&request.body)?;
    clock.within(show(context, &replication, letter)).await
}

pub(super) async fn dlq_replay(context: &RequestContext, request: Request) -> Result<LettersChanged, Failure> {
    let clock = RequestClock::start();
    let LetterChange { replication, letters } = change(&request)?;
    clock.within(replay(context, replication, letters, &clock)).await
}

pub(super) async fn dlq_drop(context: &RequestContext, request: Request) -> Result<LettersChanged, Failure> {
    let clock = RequestClock::start();
    let LetterChange { replication, letters } = change(&request)?;
    clock.within(drop_letters(context, replication, letters, &clock)).await
}

fn change(request: &Request) -> Result<LetterChange, Failure> {
    in_time(request)?;
    let change: LetterChange = json(&request.body)?;
    match change.letters.len() {
        1..=MOST => Ok(change),
        number => {
            Err(Failure::new(400, format!("`letters` has {number} sequences: one request is for 1 to {MOST} of them")))
        }
    }
}

/// How much time a request has.
struct RequestClock {
    end: Instant,
    work: Instant,
}

impl RequestClock {
    fn start() -> Self {
        let now = Instant::now();
        Self { end: now + ANSWER_WITHIN, work: now + WORK_WITHIN }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.work
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let late =
            || Failure::new(504, "source and target did not answer in time; list the dead letters, and try again");
        timeout_at(self.end, work).await.unwrap_or_else(|_| Err(late()))
    }
}

/// The stream of dead letters of one replication, connected.
struct LetterBox {
    replication: Replication,
    source: Lane,
    subject: String,
    stream: String,
    tag: Tag,
}

impl LetterBox {
    async fn open(context: &RequestContext, id: &str) -> Result<Self, Failure> {
        if context.read_only {
            return Err(Failure::new(403, "the service is read-only: it connects to no server on request"));
        }
        let entry = context.existing(id).await?;
        let replication = runnable(context, entry).await?;
        let OnReject::DeadLetter { subject } = &replication.on_reject else {
            let description = format!("replication `{id}` makes no dead letters: its `on_reject` is not `dead_letter`");
            return Err(Failure::new(409, description));
        };
        let subject = subject.clone();
        let name = format!("{} {id}", names::PROGRAM);
        let mut source = context.rules.dial(&replication.source.place, &name).await.map_err(of_source)?;
        let streams = Api::new(&mut source).stream_names(&subject).await.map_err(of_source)?;
        let stream = streams.into_iter().find(|stream| *stream != replication.source.stream);
        let none = || Failure::new(409, format!("no stream at the source takes dead letters on `{subject}`"));
        let stream = stream.ok_or_else(none)?;
        let tag = letter_tag(&replication, &context.site);
        Ok(Self { replication, source, subject, stream, tag })
    }

    /// The letter at a sequence, and its payload.
    async fn letter(&mut self, seq: u64) -> Result<(StoredLetter, Vec<u8>), Failure> {
        let found = Api::new(&mut self.source).whole_message(&self.stream, seq).await.map_err(of_source)?;
        let letter = found.and_then(|(message, payload)| Some((StoredLetter::read(&message, &self.tag)?, payload)));
        letter.ok_or_else(|| {
            let (stream, id) = (&self.stream, &self.replication.id);
            Failure::new(404, format!("message {seq} of stream `{stream}` is no dead letter of replication `{id}`"))
        })
    }

    async fn remove(&mut self, seq: u64) -> Result<(), nats_lane::Error> {
        Api::new(&mut self.source).delete_message(&self.stream, seq).await
    }
}

fn of_source(error: nats_lane::Error) -> Failure {
    Failure::new(503, format!("the source cannot be asked: {error}"))
}

fn of_target(error: nats_lane::Error) -> Failure {
    Failure::new(503, format!("the target cannot be asked: {error}"))
}

fn row(letter: &StoredLetter) -> LetterRow {
    LetterRow {
        letter: letter.seq,
        at: DateTime::from_timestamp_nanos(letter.time_ns),
        source_seq: letter.origin.seq,
        stored: DateTime::from_timestamp_millis(letter.origin.time_ms).unwrap_or_default(),
        subject: letter.subject.clone(),
        bytes: letter.bytes() as u64,
        error: letter.error.clone(),
    }
}

/// Several replications may share a subject: letters of others are passed over.
async fn list(
    context: &RequestContext,
    id: &str,
    after: u64,
    limit: usize,
    clock: &RequestClock,
) -> Result<LetterList, Failure> {
    let mut letters = LetterBox::open(context, id).await?;
    let LetterBox { source, stream, subject, tag, .. } = &mut letters;
    let (mut rows, mut last, mut read) = (Vec::new(), after, 0);
    let mut room = context.room();
    let next = loop {
        if rows.len() >= limit || clock.is_over() || read >= READ_BYTES {
            break Some(last);
        }
        let found = Api::new(source).message_of(stream, subject, last.saturating_add(1)).await.map_err(of_source)?;
        let Some(message) = found else { break None };
        if let Some(letter) = StoredLetter::read(&message, tag) {
            let row = row(&letter);
            let cost = serde_json::to_vec(&row).map_or(0, |json| json.len() + 1);
            match room.checked_sub(cost) {
                Some(left) => room = left,
                None if rows.is_empty() => {}
                None => break Some(last),
            }
            rows.push(row);
        }
        (last, read) = (message.sequence, read + message.payload);
    };
    Ok(LetterList { replication: id.to_owned(), stream: letters.stream, letters: rows, next })
}

async fn show(context: &RequestContext, id: &str, seq: u64) -> Result<LetterShown, Failure> {
    let mut letters = LetterBox::open(context, id).await?;
    let (letter, payload) = letters.letter(seq).await?;
    let lines = headers::lines(&letter.header).map(|line| String::from_utf8_lossy(line).into_owned());
    let mut shown = LetterShown {
        replication: id.to_owned(),
        stream: letters.stream,
        letter: row(&letter),
        headers: lines.collect(),
        payload: String::new(),
        truncated: false,
    };
    let used = serde_json::to_vec(&shown).map_or(0, |json| json.len());
    let fits = context.room().saturating_sub(used) / 4 * 3;
    shown.truncated = payload.len() > fits;
    shown.payload = STANDARD.encode(&payload[..payload.len().min(fits)]);
    Ok(shown)
}

fn unchanged(replication: String, left: Vec<u64>) -> LettersChanged {
    LettersChanged { replication, done: Vec::new(), refused: Vec::new(), left, failed: None }
}

async fn drop_letters(
    context: &RequestContext,
    id: String,
    wanted: Vec<u64>,
    clock: &RequestClock,
) -> Result<LettersChanged, Failure> {
    let mut letters = LetterBox::open(context, &id).await?;
    let mut changed = unchanged(id, wanted);
    while let Some(seq) = changed.left.first().copied()
        && !clock.is_over()
    {
        let removed = match letters.letter(seq).await {
            Ok(_) => letters.remove(seq).await.map_err(of_source),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = removed {
            changed.failed = Some(failure.description);
            break;
        }
        changed.left.remove(0);
        changed.done.push(LetterDone { letter: seq, target_seq: None, duplicate: false });
    }
    info!(replication = changed.replication, letters = changed.done.len(), "dead letters removed by request");
    Ok(changed)
}

async fn replay(
    context: &RequestContext,
    id: String,
    wanted: Vec<u64>,
    clock: &RequestClock,
) -> Result<LettersChanged, Failure> {
    let mut letters = LetterBox::open(context, &id).await?;
    can_replay(&letters.replication)?;
    let name = format!("{} {id}", names::PROGRAM);
    let mut target = context.rules.dial(&letters.replication.target.place, &name).await.map_err(of_target)?;
    let streams = ReplayStreams::read(&mut letters, &mut target).await?;
    let mut changed = unchanged(id, wanted);
    while let Some(seq) = changed.left.first().copied()
        && !clock.is_over()
    {
        match replay_one(context, &mut letters, &mut target, &streams, seq).await {
            Ok(Replayed::Done(done)) => {
                changed.left.remove(0);
                changed.done.push(done);
            }
            Ok(Replayed::Refused(reason)) => {
                changed.left.remove(0);
                changed.refused.push(LetterRefused { letter: seq, reason });
            }
            Err(failure) => {
                changed.failed = Some(failure.description);
                break;
            }
        }
    }
    info!(replication = changed.replication, letters = changed.done.len(), "dead letters replayed by request");
    Ok(changed)
}

/// A replay is another writer: where none may be, the copy would stop because of it.
fn can_replay(replication: &Replication) -> Result<(), Failure> {
    let why = if replication.target_mode == Sharing::Exclusive {
        "its `target_mode` is `exclusive`, and a replay is another writer: set `auto` or `shared`"
    } else if replication.provenance_first {
        "its copies have their provenance before that of earlier hops, by which a replay would be taken for one of them"
    } else {
        return Ok(());
    };
    Err(Failure::new(409, format!("dead letters of replication `{}` cannot be replayed: {why}", replication.id)))
}

/// Both streams of the replication.
struct ReplayStreams {
    target: StreamInfo,
    ttl: bool,
}

impl ReplayStreams {
    async fn read(letters: &mut LetterBox, lane: &mut Lane) -> Result<Self, Failure> {
        let LetterBox { replication, source, .. } = letters;
        let missing = |stream: &str| Failure::new(409, format!("stream `{stream}` does not exist"));
        let (from, to) = (&replication.source.stream, &replication.target.stream);
        let source = Api::new(source).stream_info(from).await.map_err(of_source)?.ok_or_else(|| missing(from))?;
        let target = Api::new(lane).stream_info(to).await.map_err(of_target)?.ok_or_else(|| missing(to))?;
        let ttl = source.flag("allow_msg_ttl") && target.flag("allow_msg_ttl");
        Ok(Self { target, ttl })
    }
}

/// What became of one letter.
enum Replayed {
    /// The target has its message, and the letter is removed.
    Done(LetterDone),
    /// It stays; the others are no worse for it.
    Refused(String),
}

/// Publishes one letter, and removes it when the target has it.
async fn replay_one(
    context: &RequestContext,
    letters: &mut LetterBox,
    lane: &mut Lane,
    streams: &ReplayStreams,
    seq: u64,
) -> Result<Replayed, Failure> {
    let (letter, payload) = letters.letter(seq).await?;
    let api_prefix = lane.api_prefix().to_owned();
    let to = LaterTarget {
        replication: &letters.replication,
        site: &context.site,
        target: &streams.target,
        api_prefix: &api_prefix,
        max_payload: lane.info().max_payload,
        ttl: streams.ttl,
        now_ns: Utc::now().timestamp_nanos_opt().unwrap_or_default(),
    };
    let refused = |error: nats_lane::Error| Failure::new(409, format!("dead letter {seq}: {error}"));
    let message = letter.replay(&letters.stream, &to).map_err(refused)?;
    let stored = match store(lane, streams, &letter, &letters.tag, message, &payload).await {
        Ok(Ok(stored)) => stored,
        Ok(Err(reason)) => return Ok(Replayed::Refused(reason)),
        Err(StoreError::Target(error)) => return Err(of_target(error)),
        Err(StoreError::Letter(error)) => return Err(refused(error)),
    };
    let kept =
        |error| Failure::new(503, format!("dead letter {seq} is stored at the target, but was not removed: {error}"));
    letters.remove(seq).await.map_err(kept)?;
    Ok(Replayed::Done(LetterDone { letter: seq, target_seq: Some(stored.seq), duplicate: stored.duplicate }))
}

/// Where the target has a message.
struct StoredAt {
    seq: u64,
    duplicate: bool,
}

/// Why no more letters are tried.
enum StoreError {
    Target(nats_lane::Error),
    Letter(nats_lane::Error),
}

/// Stores the message of a letter, unless the target has it; the inner error says why this one stays.
async fn store(
    lane: &mut Lane,
    streams: &ReplayStreams,
    letter: &StoredLetter,
    tag: &Tag,
    message: ReplayedMessage,
    payload: &[u8],
) -> Result<Result<StoredAt, String>, StoreError> {
    let stream = streams.target.text("name").to_owned();
    let conditional = keeps_last(&streams.target);
    for _ in 0..TRIES {
        // The duplicate window may be over since an earlier replay that did not come to its end.
        let last = Api::new(lane).last_message_of(&stream, &message.subject).await.map_err(StoreError::Target)?;
        if let Some(last) = last.as_ref().filter(|last| letter.is_stored_as(last, tag)) {
            return Ok(Ok(StoredAt { seq: last.sequence, duplicate: true }));
        }
        let mut message = message.clone();
        if conditional {
            if last.as_ref().is_some_and(|last| letter.would_replace(last, tag)) {
                return Ok(Err(REPLACES_NEWER.to_owned()));
            }
            // A copy that runs beside it may store a newer one meanwhile.
            message.expect_last(last.map_or(0, |last| last.sequence));
        }
        let stored = match publish(lane, &stream, &message, payload).await {
            Err(StoreError::Letter(error)) if conditional && error.kind == ErrorKind::ChainBroken => continue,
            stored => stored?,
        };
        // The id is remembered for a while, also that of a message which was removed.
        if stored.duplicate {
            let there = Api::new(lane).message(&stream, stored.seq).await.map_err(StoreError::Target)?;
            if !there.is_some_and(|there| letter.is_stored_as(&there, tag)) {
                return Ok(Err(REMEMBERED.to_owned()));
            }
        }
        return Ok(Ok(stored));
    }
    Ok(Err(format!("`{}` had other messages meanwhile at each of {TRIES} attempts: replay it again", message.subject)))
}

async fn publish(
    lane: &mut Lane,
    stream: &str,
    message: &ReplayedMessage,
    payload: &[u8],
) -> Result<StoredAt, StoreError> {
    let request = lane.send_request_with(&message.subject, &message.header, payload);
    let answer = loop {
        let answers = lane.answers().await.map_err(StoreError::Target)?;
        if let Some((_, answer)) = answers.into_iter().find(|(reply, _)| *reply == request.as_bytes()) {
            break answer;
        }
    };
    let hold = |why: String| Err(StoreError::Letter(nats_lane::Error::hold(why)));
    if answer.is_empty() {
        return hold(format!("no stream takes `{}`", message.subject));
    }
    let ack = PublishAck::parse(&answer, "the target").map_err(StoreError::Letter)?;
    if ack.seq == 0 {
        return Err(StoreError::Letter(nats_lane::Error::retry("the target has not stored it yet")));
    }
    if ack.stream != stream {
        return hold(format!("stream `{}` took it", ack.stream));
    }
    Ok(StoredAt { seq: ack.seq, duplicate: ack.duplicate })
}
