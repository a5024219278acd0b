//! The connection of a campaign: writes as the machine decides, passes the results to it, and reconnects after an
//! error.

use std::sync::Arc;

use bytes::Bytes;
use nats_lane::{
    Batch, DEFAULT_API_PREFIX, Dial, Error, ErrorKind, Lane, ServerRef, Turn,
    backoff::Backoff,
    headers,
    jetstream::{PublishAck, StreamInfo, answer_in, decode, decode_message},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Duration, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    BUCKET, Election, LAST_WORDS, Leadership,
    machine::{ElectionMachine, ElectionStep, ElectionWrite, Terms},
};
use crate::{boottime, names};

/// The bucket's stream.
const STREAM: &str = "KV_CHORIA_LEADER_ELECTION";

/// The command that creates the bucket.
const ADD: &str = "nats kv add CHORIA_LEADER_ELECTION --ttl 10s --replicas 3";

/// TTLs that Choria's replicators campaign with.
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_MAX: Duration = Duration::from_secs(3600);

/// Attempts after an error.
const RETRY: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// How often the bucket's stream is asked about itself, and the time for each answer.
const INFO_ASKED: u32 = 3;
const INFO_WAIT: Duration = Duration::from_secs(2);

/// A request that a login may be forbidden to send: then it is not repeated.
#[derive(Debug)]
struct ElectionQuestion {
    /// End of its subject.
    what: String,
    allowed: bool,
}

impl ElectionQuestion {
    fn new(what: &str) -> Self {
        Self { what: format!("{what}.{STREAM}"), allowed: true }
    }

    /// Whether this error shows that the request is forbidden.
    fn is_refused_by(&mut self, error: &Error) -> bool {
        let denied = error.message.to_ascii_lowercase().contains("permissions violation for publish");
        let refused = self.allowed && denied && error.message.contains(&self.what);
        self.allowed &= !refused;
        refused
    }
}

pub(super) struct CampaignDriver {
    dial: Arc<dyn Dial>,
    place: ServerRef,
    election: Election,
    machine: ElectionMachine,
    leadership: watch::Sender<Leadership>,
    /// For the TTL of the bucket.
    info: ElectionQuestion,
    /// For the entry at the key.
    last: ElectionQuestion,
    retry: Backoff,
    /// The last error, until it is over.
    error: Option<String>,
}

/// A lane on which the bucket is written, and the pending requests on it.
struct BucketConnection {
    lane: Lane,
    /// Subject that writes go to.
    subject: String,
    /// The write in flight.
    write: String,
    /// The pending request for the entry at the key.
    read: String,
}

impl CampaignDriver {
    pub(super) fn new(
        dial: Arc<dyn Dial>,
        place: ServerRef,
        election: Election,
        leadership: watch::Sender<Leadership>,
    ) -> Self {
        let (info, last) = (ElectionQuestion::new("STREAM.INFO"), ElectionQuestion::new("STREAM.MSG.GET"));
        let machine = ElectionMachine::new(boottime::now());
        Self { dial, place, election, machine, leadership, info, last, retry: RETRY, error: None }
    }

    /// Runs until the stop.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        while let Err(error) = self.session(&stop).await {
            self.machine.disconnected();
            if self.info.is_refused_by(&error) || self.last.is_refused_by(&error) {
                debug!(election = self.election.key, "continues without a request that is not permitted: {error}");
                self.publish_state(&error.message);
                continue;
            }
            if self.error.as_ref() != Some(&error.message) {
                warn!(election = self.election.key, "does not stand for election: {error}");
                self.error = Some(error.message.clone());
            }
            self.publish_state(&error.message);
            let pause = self.retry.next(rand::random());
            if stop.run_until_cancelled(sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// One connection, until the stop; any other end is an error.
    async fn session(&mut self, stop: &CancellationToken) -> Result<(), Error> {
        let opened = stop.run_until_cancelled(self.open()).await;
        let Some(mut bucket) = opened.transpose()? else { return Ok(()) };
        loop {
            let now = boottime::now();
            let next = match self.machine.step(now) {
                ElectionStep::Write(revision) => {
                    bucket.write(&self.election.candidate, revision);
                    continue;
                }
                ElectionStep::Overdue => {
                    return Err(Error::retry(format!("a write to bucket `{BUCKET}` is not answered")));
                }
                ElectionStep::Wait(next) => next,
            };
            self.publish_state("no write was confirmed in time");
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                turn = bucket.lane.turn() => if let Turn::Received(batch) = turn? { self.hear(&mut bucket, &batch)? },
                () = sleep_until(boottime::for_timers(next)) => {}
            }
        }
        self.leadership.send_modify(|led| led.until = None);
        if timeout(LAST_WORDS, self.leave(&mut bucket)).await.is_err() {
            debug!(election = self.election.key, "the key was not freed in time");
        }
        Ok(())
    }

    /// Connects, and reads the terms of the bucket as far as that is allowed.
    async fn open(&mut self) -> Result<BucketConnection, Error> {
        let name = format!("{} election {}", names::PROGRAM, self.election.key);
        let mut lane = self.dial.dial(&self.place, &name).await?;
        let terms = if self.info.allowed { self.terms(&mut lane).await? } else { Terms::unknown() };
        // The subjects of all KV clients, which servers map to a domain's.
        let api = lane.api_prefix();
        let prefix = if api == DEFAULT_API_PREFIX { String::new() } else { format!("{api}.") };
        let subject = format!("{prefix}{}", self.key_subject());
        self.machine.connected(terms, boottime::now());
        Ok(BucketConnection { lane, subject, write: String::new(), read: String::new() })
    }

    /// Subject of the key as it is stored.
    fn key_subject(&self) -> String {
        format!("$KV.{BUCKET}.{}", self.election.key)
    }

    async fn terms(&self, lane: &mut Lane) -> Result<Terms, Error> {
        let subject = format!("{}.{}", lane.api_prefix(), self.info.what);
        let mut asked = 0;
        let answer = loop {
            let request = lane.send_request(&subject, b"");
            asked += 1;
            match timeout(INFO_WAIT, answer_to(lane, &request)).await {
                Ok(answer) => break answer?,
                // While the stream has no leader there is no answer.
                Err(_) if asked < INFO_ASKED => {}
                Err(_) => return Err(Error::retry(format!("no answer about bucket `{BUCKET}`"))),
            }
        };
        // Where only the bucket is imported, no server answers for its stream.
        let Some(answer) = answer else { return Ok(Terms::unknown()) };
        match decode::<StreamInfo>(&answer) {
            Ok(info) => terms_of(&info),
            Err(error) if error.kind == ErrorKind::NotFound => {
                Err(Error::hold(format!("bucket `{BUCKET}` does not exist: make it with `{ADD}`")))
            }
            Err(error) => Err(error.context(format!("bucket `{BUCKET}`"))),
        }
    }

    /// Handles the messages of a batch.
    fn hear(&mut self, bucket: &mut BucketConnection, batch: &Batch) -> Result<(), Error> {
        match answer_in(batch, &bucket.read).and_then(entry_in) {
            Some(KeyEntry::Marker(revision)) => self.machine.saw_marker(revision, boottime::now()),
            Some(KeyEntry::Name(revision)) => self.machine.saw_entry(revision, boottime::now()),
            None => {}
        }
        let Some(answer) = answer_in(batch, &bucket.write).filter(|_| self.machine.is_writing()) else { return Ok(()) };
        let written = written(answer)?;
        let stood = self.machine.held().is_none();
        self.machine.written(written, boottime::now(), rand::random());
        self.retry.reset();
        if self.error.take().is_some() {
            info!(election = self.election.key, "stands for election again");
        }
        if written == ElectionWrite::Conflict {
            self.publish_state("the key was deleted, or is another candidate's");
            // A candidate that just lost the key leaves others the first chance.
            if stood && self.last.allowed {
                bucket.request_entry(&self.last.what, &self.key_subject());
            }
        }
        Ok(())
    }

    /// Releases the key if it is ours.
    async fn leave(&mut self, bucket: &mut BucketConnection) {
        let mut freeing = false;
        loop {
            // A write in flight may make it ours, and its answer has the revision.
            if !self.machine.is_writing() && !freeing {
                let Some(revision) = self.machine.held() else { return };
                bucket.free(revision);
                freeing = true;
            }
            let heard = match bucket.lane.turn().await {
                Ok(Turn::Flushed) => continue,
                Ok(Turn::Received(batch)) if freeing => match answer_in(&batch, &bucket.write) {
                    Some(answer) => {
                        return debug!(election = self.election.key, "freed the key: {:?}", written(answer));
                    }
                    None => continue,
                },
                Ok(Turn::Received(batch)) => self.hear(bucket, &batch),
                Err(error) => Err(error),
            };
            if let Err(error) = heard {
                return debug!(election = self.election.key, "the key was not freed: {error}");
            }
        }
    }

    /// Publishes the state; `reason` says why leadership ended if it has.
    fn publish_state(&mut self, reason: &str) {
        let now = boottime::now();
        let (election, candidate) = (&self.election.key, &self.election.candidate);
        let led = Leadership {
            until: self.machine.leads_until(now),
            error: self.error.clone(),
            campaigns: self.machine.campaigns(),
            interval: self.machine.interval(),
        };
        self.leadership.send_if_modified(|before| {
            match (before.until, led.until) {
                (None, Some(_)) => info!(election, candidate, "leads"),
                (Some(_), None) => warn!(election, candidate, "leads no longer: {reason}"),
                _ => {}
            }
            let changed = *before != led;
            *before = led;
            changed
        });
    }
}

impl BucketConnection {
    fn write(&mut self, candidate: &str, revision: u64) {
        self.write = self.lane.send_request_with(&self.subject, &header_block(revision, ""), candidate.as_bytes());
    }

    /// Deletes the key, which leaves a marker.
    fn free(&mut self, revision: u64) {
        let block = header_block(revision, "KV-Operation: DEL\r\n");
        self.write = self.lane.send_request_with(&self.subject, &block, b"");
    }

    /// Requests the entry at the key.
    fn request_entry(&mut self, what: &str, key_subject: &str) {
        let body = json!({ "last_by_subj": key_subject }).to_string();
        self.read = self.lane.send_request(&format!("{}.{what}", self.lane.api_prefix()), body.as_bytes());
    }
}

/// Waits for an answer; `None` if there are no responders.
async fn answer_to(lane: &mut Lane, request: &str) -> Result<Option<Bytes>, Error> {
    loop {
        if let Turn::Received(batch) = lane.turn().await?
            && let Some(answer) = answer_in(&batch, request)
        {
            return Ok(answer.ok().map(Bytes::copy_from_slice));
        }
    }
}

fn header_block(revision: u64, more: &str) -> Vec<u8> {
    format!("NATS/1.0\r\n{more}Nats-Expected-Last-Subject-Sequence: {revision}\r\n\r\n").into_bytes()
}

/// The terms of a bucket that Choria's replicators would accept.
fn terms_of(info: &StreamInfo) -> Result<Terms, Error> {
    let ttl = Duration::from_nanos(info.config.get("max_age").and_then(Value::as_u64).unwrap_or_default());
    if (TTL_MIN..=TTL_MAX).contains(&ttl) {
        return Ok(Terms::of(ttl));
    }
    let is = if ttl.is_zero() { "has no TTL".to_owned() } else { format!("has a TTL of {ttl:?}") };
    Err(Error::hold(format!("bucket `{BUCKET}` {is}, and 1 s to 1 h is right, as made by `{ADD}`")))
}

/// Parses the answer to a write; an error if the outcome is unknown, or if writes are impossible.
fn written(answer: Result<&[u8], Error>) -> Result<ElectionWrite, Error> {
    let answer = answer.map_err(|_| {
        let message =
            format!("no responders for a write to bucket `{BUCKET}`: it has no leader now, or it does not exist");
        Error::hold(format!("{message} and is made with `{ADD}`"))
    })?;
    match PublishAck::parse(answer, &format!("bucket `{BUCKET}`")) {
        Ok(ack) if ack.stream == STREAM => Ok(ElectionWrite::Stored(ack.seq)),
        Ok(ack) => {
            let message = format!("bucket `{BUCKET}`: stream `{}` answers for it, its subjects overlap", ack.stream);
            Err(Error::hold(message))
        }
        Err(error) if error.kind == ErrorKind::ChainBroken => Ok(ElectionWrite::Conflict),
        Err(error) => Err(error.context(format!("bucket `{BUCKET}`"))),
    }
}

/// What is at the key, with its revision.
enum KeyEntry {
    /// The name of a candidate.
    Name(u64),
    /// The marker of a deletion.
    Marker(u64),
}

fn entry_in(answer: Result<&[u8], Error>) -> Option<KeyEntry> {
    let message = decode_message(answer.ok()?).ok()??;
    let operation = headers::last(&message.header, b"KV-Operation");
    let deleted = operation.is_some_and(|operation| matches!(operation, b"DEL" | b"PURGE"));
    let marker = deleted || headers::last(&message.header, b"Nats-Marker-Reason").is_some();
    Some(if marker { KeyEntry::Marker(message.sequence) } else { KeyEntry::Name(message.sequence) })
}
