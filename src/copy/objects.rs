//! Readers at the target never see an incomplete object of an object store (ADR-20): the description of an object is
//! copied only when the target has all of its chunks. [`Objects`] decides and is pure; [`Gate`] sends the requests for
//! it.
//!
//! An object is any number of chunks on `$O.<bucket>.C.<nuid>` and, after them, one description on
//! `$O.<bucket>.M.<name>`, which names the nuid and the number of chunks. Readers begin with the description.
//! Chunks can be missing where a copy does not begin at the start, skips old messages, or has a filter.

use std::collections::HashMap;

use nats_lane::{
    Batch, Error, Lane,
    jetstream::{decode, leaders_info},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use crate::config::Mapping;

/// A request without an answer is repeated after this time.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Longest nuid that the target is asked about. Those of clients have 22 characters.
const LONGEST_NUID: usize = 128;

/// Objects whose chunks were sent and whose description has not come; beyond that, the target is asked.
const MAX_OPEN: usize = 4_096;

/// A decision about a message of an object store.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// Send it.
    Send,
    /// Only the target knows how many chunks it has on the subject that this source subject is mapped to. Ask it
    /// when everything before is settled, and then judge the message again.
    Ask(String),
    /// Skip it: the description would name chunks that are missing.
    Skip(Incomplete),
}

/// An object that is incomplete at the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Incomplete {
    /// Its name.
    pub object: String,
    /// Chunks that it has at the source.
    pub chunks: u64,
    /// Chunks that the target has.
    pub found: u64,
}

/// The fields of a description that matter here.
#[derive(Deserialize)]
struct Description {
    name: String,
    nuid: String,
    #[serde(default)]
    chunks: u64,
    #[serde(default)]
    deleted: bool,
}

/// The chunks that the description of an object names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NamedChunks {
    /// Name of the object.
    object: String,
    nuid: String,
    /// Source subject of the chunks.
    subject: String,
    /// How many there are at the source.
    pub chunks: u64,
}

impl NamedChunks {
    /// `None` for a message that is copied without regard to chunks.
    pub fn of(subject: &[u8], payload: &[u8]) -> Option<Self> {
        let (bucket, b"M", _) = parts(subject)? else { return None };
        // A description that no reader understands misleads none.
        let Description { name, nuid, chunks, deleted } = serde_json::from_slice(payload).ok()?;
        // Whoever may publish a description chooses its nuid. The target is only asked about one subject, in a short request: a
        // pattern or an endless name could end each run.
        if deleted || chunks == 0 || !is_token(&nuid) {
            return None;
        }
        let subject = format!("$O.{}.C.{nuid}", String::from_utf8_lossy(bucket));
        Some(Self { object: name, nuid, subject, chunks })
    }

    /// How many of them a target stream has.
    ///
    /// # Errors
    ///
    /// The target did not answer, or another server than the leader of the stream did.
    pub async fn at_target(&self, lane: &mut Lane, stream: &str, mapping: &Mapping) -> Result<u64, Error> {
        let api = format!("{}.STREAM.INFO.{stream}", lane.api_prefix());
        let reply = lane.request(&api, count_request(&self.subject, mapping).as_bytes()).await?;
        let found = chunks_found(&reply).map_err(|error| error.context("chunks of an object"))?;
        found.ok_or_else(|| Error::retry(format!("the leader of stream `{stream}` did not answer")))
    }
}

/// The request for the number of chunks at the target on a source subject.
fn count_request(chunks: &str, mapping: &Mapping) -> String {
    let mut room = Vec::new();
    let mapped = mapping.apply(chunks.as_bytes(), &mut room);
    json!({ "subjects_filter": String::from_utf8_lossy(mapped) }).to_string()
}

/// The answer to it; `None` if it is not of the leader of the stream.
fn chunks_found(answer: &[u8]) -> Result<Option<u64>, Error> {
    if leaders_info(answer)?.is_none() {
        return Ok(None);
    }
    let info: Value = decode(answer)?;
    let counts = info.pointer("/state/subjects").and_then(Value::as_object);
    let counts = counts.into_iter().flat_map(|counts| counts.values()).filter_map(Value::as_u64);
    Ok(Some(counts.fold(0, u64::saturating_add)))
}

/// Chunks that were sent, of one store.
#[derive(Debug, Default)]
struct Objects {
    /// Chunks sent by this run, by nuid.
    sent: HashMap<Box<[u8]>, u64>,
    /// The target's last answer: nuid and chunks.
    answer: Option<(Box<[u8]>, u64)>,
}

impl Objects {
    /// Decides about a message that is to be copied.
    fn judge(&self, subject: &[u8], payload: &[u8]) -> Pass {
        let Some(NamedChunks { object, nuid, subject, chunks }) = NamedChunks::of(subject, payload) else {
            return Pass::Send;
        };
        if self.sent.get(nuid.as_bytes()) == Some(&chunks) {
            return Pass::Send;
        }
        match &self.answer {
            Some((of, found)) if **of == *nuid.as_bytes() => {
                let found = *found;
                if found == chunks { Pass::Send } else { Pass::Skip(Incomplete { object, chunks, found }) }
            }
            _ => Pass::Ask(subject),
        }
    }

    /// Takes the target's answer to [`Pass::Ask`]: the chunks on the subject that was asked about.
    fn answered(&mut self, subject: &str, chunks: u64) {
        if let Some((_, b"C", nuid)) = parts(subject.as_bytes()) {
            self.answer = Some((nuid.into(), chunks));
        }
    }

    /// Notes a message that was sent.
    fn sent(&mut self, subject: &[u8], payload: &[u8]) {
        match parts(subject) {
            Some((_, b"C", nuid)) => match self.sent.get_mut(nuid) {
                Some(count) => *count += 1,
                None => {
                    if self.sent.len() == MAX_OPEN {
                        self.sent.clear();
                    }
                    self.sent.insert(nuid.into(), 1);
                }
            },
            Some((_, b"M", _)) => {
                if let Ok(Description { nuid, .. }) = serde_json::from_slice(payload) {
                    self.sent.remove(nuid.as_bytes());
                }
                self.answer = None;
            }
            _ => {}
        }
    }
}

/// Whether a stream of this name is an object store. The chunks of an object are read in stream order: strict order is
/// kept for such streams, whatever the document says.
pub(super) fn is_store(stream: &str) -> bool {
    stream.starts_with("OBJ_")
}

/// Holds descriptions back until the target has their chunks.
#[derive(Debug)]
pub(super) struct Gate {
    stream: String,
    objects: Objects,
    question: Option<ChunkRequest>,
}

#[derive(Debug)]
struct ChunkRequest {
    /// Subject of the answer.
    reply: String,
    /// Source subject of the chunks.
    chunks: String,
    asked: Instant,
}

impl Gate {
    /// For a copy of the stream `source` into `target`; `None` if it is not an object store.
    pub fn of(source: &str, target: &str) -> Option<Self> {
        let gate = || Self { stream: target.to_owned(), objects: Objects::default(), question: None };
        is_store(source).then(gate)
    }

    /// Decides about a message.
    pub fn pass(&self, subject: &[u8], payload: &[u8]) -> Pass {
        self.objects.judge(subject, payload)
    }

    /// Asks the target for the chunks on a source subject, see [`Pass::Ask`], once `settled`: no message is in flight.
    pub fn ask_chunks(&mut self, chunks: String, settled: bool, lane: &mut Lane, mapping: &Mapping, now: Instant) {
        let waits = self.question.as_ref().is_some_and(|question| now < question.asked + ASK_AGAIN);
        if settled && !waits {
            let api = format!("{}.STREAM.INFO.{}", lane.api_prefix(), self.stream);
            let reply = lane.send_request(&api, count_request(&chunks, mapping).as_bytes());
            self.question = Some(ChunkRequest { reply, chunks, asked: now });
        }
    }

    /// Notes a message that was sent.
    pub fn sent(&mut self, subject: &[u8], payload: &[u8]) {
        self.objects.sent(subject, payload);
    }

    /// Takes the target's answer, if it is among what was received.
    pub fn accept(&mut self, batch: &Batch) -> Result<(), Error> {
        let Some(question) = &self.question else { return Ok(()) };
        let answer = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == question.reply.as_bytes());
        let Some(answer) = answer else { return Ok(()) };
        let found = chunks_found(answer.payload).map_err(|error| error.context("chunks of an object"))?;
        // Of another server than the leader: it is asked again.
        let Some(found) = found else { return Ok(()) };
        self.objects.answered(&question.chunks, found);
        self.question = None;
        Ok(())
    }
}

/// Whether a nuid is one token of a subject.
fn is_token(nuid: &str) -> bool {
    let is_legal = |c: char| !(c.is_whitespace() || c.is_control() || ".*>".contains(c));
    !nuid.is_empty() && nuid.len() <= LONGEST_NUID && nuid.chars().all(is_legal)
}

/// Bucket, kind and the rest of a subject of an object store.
fn parts(subject: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let mut tokens = subject.strip_prefix(b"$O.")?.splitn(3, |b| *b == b'.');
    Some((tokens.next()?, tokens.next()?, tokens.next()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn description(nuid: &str, chunks: u64, deleted: bool) -> Vec<u8> {
        let body =
            json!({"name": "report", "bucket": "b", "nuid": nuid, "size": 9, "chunks": chunks, "deleted": deleted});
        body.to_string().into_bytes()
    }

    const META: &[u8] = b"$O.b.M.cmVwb3J0";

    #[test]
    fn a_description_follows_all_of_its_chunks() {
        let mut objects = Objects::default();
        for _ in 0..3 {
            assert_eq!(objects.judge(b"$O.b.C.one", b"chunk"), Pass::Send);
            objects.sent(b"$O.b.C.one", b"chunk");
        }
        assert_eq!(objects.judge(META, &description("one", 3, false)), Pass::Send);
        objects.sent(META, &description("one", 3, false));
        assert!(objects.sent.is_empty());
        // What this run has not sent, the target may have.
        assert_eq!(objects.judge(META, &description("one", 3, false)), Pass::Ask("$O.b.C.one".to_owned()));
    }

    #[test]
    fn the_target_is_asked_for_what_this_run_did_not_send() {
        let mut objects = Objects::default();
        objects.sent(b"$O.b.C.two", b"chunk");
        let ask = Pass::Ask("$O.b.C.two".to_owned());
        assert_eq!(objects.judge(META, &description("two", 2, false)), ask);
        objects.answered("$O.b.C.other", 2);
        assert_eq!(objects.judge(META, &description("two", 2, false)), ask);
        objects.answered("$O.b.C.two", 1);
        let incomplete = Incomplete { object: "report".to_owned(), chunks: 2, found: 1 };
        assert_eq!(objects.judge(META, &description("two", 2, false)), Pass::Skip(incomplete));
        objects.answered("$O.b.C.two", 2);
        assert_eq!(objects.judge(META, &description("two", 2, false)), Pass::Send);
        // Chunks that lie there twice break an object as well.
        objects.answered("$O.b.C.two", 4);
        assert!(matches!(objects.judge(META, &description("two", 2, false)), Pass::Skip(_)));
    }

    #[test]
    fn what_needs_no_chunks_is_copied() {
        let objects = Objects::default();
        for (subject, payload) in [
            (META, description("x", 0, false)),
            (META, description("x", 5, true)),
            (META, description(">", 5, false)),
            (META, description("*", 5, false)),
            (META, description("a.b", 5, false)),
            (META, description("a b", 5, false)),
            (META, description("", 5, false)),
            (META, description(&"x".repeat(LONGEST_NUID + 1), 5, false)),
            (META, b"not json".to_vec()),
            (b"$KV.b.M.key".as_slice(), description("x", 5, false)),
            (b"$O.b".as_slice(), Vec::new()),
            (b"orders.new".as_slice(), Vec::new()),
        ] {
            assert_eq!(objects.judge(subject, &payload), Pass::Send, "{}", String::from_utf8_lossy(subject));
        }
    }

    #[tokio::test]
    async fn the_target_is_asked_once_everything_before_is_settled() {
        let (mut lane, mut server) = nats_lane::pipe::lane().await;
        let (mut gate, mapping) = (Gate::of("OBJ_b", "OBJ_b").unwrap(), Mapping::default());
        let (body, now) = (description("one", 2, false), Instant::now());
        let pass = |lane: &mut Lane, gate: &mut Gate, settled| match gate.pass(META, &body) {
            Pass::Ask(chunks) => {
                gate.ask_chunks(chunks, settled, lane, &mapping, now);
                "wait"
            }
            Pass::Send => "send",
            Pass::Skip(_) => "leave out",
        };
        let before = lane.unwritten();
        assert_eq!(pass(&mut lane, &mut gate, false), "wait");
        assert_eq!(lane.unwritten(), before, "asked while chunks may be in flight");
        assert_eq!(pass(&mut lane, &mut gate, true), "wait");
        let answer = r#"{"config":{},"state":{"subjects":{"$O.b.C.one":2}}}"#;
        let answered = async {
            let asked = server.asked().await;
            assert_eq!(asked.subject, "$JS.API.STREAM.INFO.OBJ_b");
            server.answer(&asked, answer).await;
        };
        let received = async {
            loop {
                if let nats_lane::Turn::Received(batch) = lane.turn().await.unwrap() {
                    break batch;
                }
            }
        };
        let (batch, ()) = tokio::join!(received, answered);
        gate.accept(&batch).unwrap();
        assert_eq!(pass(&mut lane, &mut gate, true), "send");
    }

    #[test]
    fn memory_is_bounded() {
        let mut objects = Objects::default();
        for i in 0..3 * MAX_OPEN {
            objects.sent(format!("$O.b.C.{i}").as_bytes(), b"");
            assert!(objects.sent.len() <= MAX_OPEN);
        }
    }
}
