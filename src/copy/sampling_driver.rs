//! Sampling in one run: the sender of each message, delayed writes of sender records, and the advisories of
//! `advisories.rs`.
//!
//! A copy counts in memory when it is sent, and in a record when it has settled. The position record says up to which
//! source sequence the records hold: a run reads from there, and shows messages that settled before to sampling alone,
//! which decides about them as it did then. So a crash causes neither an extra copy nor a second `new` advisory, though
//! records and position are written independently.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll},
};

use tokio::time::{Duration, Instant};
use tracing::{info, warn};

use super::{
    Job, Samples, SeenSender,
    advisories::{AdvisoryEvent, AdvisoryPublisher},
    flow::position::SenderRecords,
    flow::window::SourcePoint,
    source::reader::Incoming,
};
use crate::{
    events::Event,
    sampling::{self, AdvisoryTemplate, CopyCause, Inspector, MessageOutcome, SamplingVerdict, Sighting, Write},
    status::SamplingStatus,
    store::{self, PositionRecord},
};

/// Records that are written together: requests about senders wait no longer than it takes to build so many.
const TOGETHER: usize = 4_096;
/// At most one round of writes in this time, unless an advisory waits for a write.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// The same where an advisory waits for a write.
const WRITE_SOON: Duration = Duration::from_millis(20);
/// How much later senders are judged by the clock, nanoseconds: messages stored meanwhile are still on their way.
const GRACE_NS: i64 = 1_000_000_000;
/// How long acknowledgements at a source that forgets wait for the records of senders.
const PATIENCE: Duration = Duration::from_secs(10);

type Writing = Pin<Box<dyn Future<Output = Result<(), store::Error>> + Send>>;

/// A finished wait.
#[derive(Debug)]
pub(crate) enum SamplingEvent {
    /// A write of so many records is over.
    Wrote(u64),
    /// An occurrence on the connection for advisories.
    Advisory(AdvisoryEvent),
}

/// The sampling of one run.
pub(crate) struct SamplingDriver {
    samples: Samples,
    replication: String,
    inspector: Inspector,
    /// Messages up to here settled before this run.
    replay_to: u64,
    /// Of those, how far they were read again, until all were: their senders are not known before.
    replayed: Option<SourcePoint>,
    /// The result of inspecting the next message.
    looked: Looked,
    /// Messages before the first one that is read were lost.
    gap: bool,
    writing: Option<(Writing, Arc<Write>)>,
    /// When all records were written last.
    written_at: Instant,
    next_write: Instant,
    write_failed: bool,
    /// Publishes advisories, where there are any.
    post: Option<AdvisoryPublisher>,
}

impl fmt::Debug for SamplingDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SamplingDriver").field("replication", &self.replication).finish_non_exhaustive()
    }
}

/// The result of inspecting a message.
#[derive(Debug, Default)]
struct Looked {
    seq: u64,
    /// Whether it names a sender.
    named: bool,
    sender: String,
    time_ns: i64,
    size: u32,
    forced: bool,
    verdict: Option<SamplingVerdict>,
}

impl Looked {
    fn sighting(&self) -> Sighting<'_> {
        let Self { seq, sender, time_ns, size, forced, .. } = self;
        Sighting { sender, seq: *seq, time_ns: *time_ns, size: *size, forced: *forced }
    }
}

impl SamplingDriver {
    /// The sampling of a run that begins after `position`, if the replication is sampled; and the sequence after which
    /// it has to read. `saved` says up to where the records hold; in `another` source stream they do not count.
    pub fn begin(
        job: &Job,
        position: u64,
        saved: &PositionRecord,
        another: bool,
        first_seq: u64,
    ) -> Option<(Self, u64)> {
        let replication = &job.replication;
        let (sampling, samples) = (replication.sampling.as_ref()?, job.samples.clone()?);
        let from = {
            let mut senders = samples.lock();
            if let Some(time) = saved.unseen_from.and_then(|time| time.timestamp_nanos_opt()) {
                senders.begin_at(time);
            }
            senders.begin(position, saved.sampled, another)
        };
        let now = Instant::now();
        let sampler = Self {
            samples,
            replication: replication.id.clone(),
            inspector: Inspector::new(sampling),
            replay_to: position,
            replayed: (from < position).then_some(SourcePoint { seq: from, time_ns: None }),
            looked: Looked::default(),
            gap: from > 0 && first_seq > from + 1,
            writing: None,
            written_at: now,
            next_write: now,
            write_failed: false,
            post: AdvisoryTemplate::new(replication, &job.site, sampling)
                .map(|template| AdvisoryPublisher::new(job, template, sampling.is_reliable(), now)),
        };
        Some((sampler, from))
    }

    /// Up to which source sequence the records hold.
    pub fn written_to(&self) -> u64 {
        self.samples.lock().written_to()
    }

    /// The state of the records, to be saved with the position.
    pub fn sampled(&self) -> SenderRecords {
        let senders = self.samples.lock();
        SenderRecords { written_to: senders.written_to(), unseen_from: senders.unseen_from() }
    }

    /// Up to where acks may be sent to a source that forgets.
    pub fn may_forget(&self, position: u64, now: Instant) -> u64 {
        may_forget(position, self.written_to(), now.duration_since(self.written_at))
    }

    /// Whether a message settled before this run, and is read for sampling only.
    pub fn is_replay(&self, seq: u64) -> bool {
        seq <= self.replay_to
    }

    /// Whether the message is to be copied. Changes nothing; a second call for the same message does not inspect it
    /// again.
    pub fn wants(&mut self, incoming: &Incoming<'_>) -> bool {
        self.inspect(incoming);
        let Some(verdict) = self.looked.verdict else { return true };
        verdict != SamplingVerdict::Skip
    }

    fn inspect(&mut self, incoming: &Incoming<'_>) {
        let (seq, time_ns) = (incoming.delivery.stream_seq, incoming.delivery.time_ns);
        let looked = &mut self.looked;
        if looked.seq == seq && looked.time_ns == time_ns {
            return;
        }
        let message = &incoming.message;
        let is_advisory = self.post.is_some() && sampling::is_advisory(message.payload);
        let sender = if is_advisory { None } else { self.inspector.sender(message) };
        looked.sender.clear();
        looked.sender.push_str(sender.as_deref().unwrap_or_default());
        looked.named = sender.is_some();
        looked.size = u32::try_from(message.payload.len()).unwrap_or(u32::MAX);
        looked.forced = looked.named && self.inspector.forced(message.payload);
        (looked.seq, looked.time_ns) = (seq, time_ns);
        looked.verdict = looked
            .named
            .then(|| self.samples.senders.lock().unwrap_or_else(PoisonError::into_inner).verdict(&looked.sighting()));
    }

    /// Records the outcome of the message of the last call.
    pub fn took(&mut self, incoming: &Incoming<'_>, fate: MessageOutcome, status: &mut SamplingStatus) {
        self.inspect(incoming);
        let mut senders = self.samples.senders.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut self.gap) {
            senders.begin_at(self.looked.time_ns);
        }
        if self.looked.named {
            senders.observe(&self.looked.sighting(), fate);
            if let Some(report) = &self.samples.report
                && let Some(listed) = senders.listed(&self.looked.sender)
            {
                // It is dropped where too many wait.
                let _ = report.try_send(SeenSender {
                    sender: self.looked.sender.clone(),
                    seen_ns: listed.seen_ns,
                    copied_ns: listed.copied_ns,
                    size: self.looked.size,
                    advised: listed.advised,
                });
            }
            let forced = self.looked.verdict == Some(SamplingVerdict::Copy(CopyCause::Forced));
            status.forced += u64::from(forced && fate == MessageOutcome::Sent);
        } else {
            status.without_sender += 1;
            senders.advance(self.looked.time_ns);
        }
        // The next message may be of the same sender.
        self.looked.seq = 0;
    }

    /// A message was skipped without inspection because it is too old: so were those before it, and no sender counts as
    /// unseen for the time before the next one.
    pub fn passed_over(&mut self) {
        self.gap = true;
    }

    /// A message that settled before is read again. If refused messages are skipped, it may be one of those and not
    /// at the target: then an extra copy is the lesser evil.
    pub fn replay(&mut self, incoming: &Incoming<'_>, may_be_refused: bool) {
        self.inspect(incoming);
        if let Some(replayed) = &mut self.replayed {
            *replayed = SourcePoint { seq: self.looked.seq, time_ns: Some(self.looked.time_ns) };
        }
        if self.looked.named {
            let fate = if may_be_refused { MessageOutcome::Passed } else { MessageOutcome::Stored };
            self.samples.lock().replay(&self.looked.sighting(), fate);
        }
        self.looked.seq = 0;
    }

    /// Everything up to `newest` was read; `all` says that no message waits to be read.
    pub fn was_read(&mut self, newest: u64, all: bool) {
        if all || newest > self.replay_to {
            self.replayed = None;
        }
    }

    /// Up to where the records hold once they are written.
    fn known(&self, position: u64) -> u64 {
        self.replayed.map_or(position, |replayed| position.min(replayed.seq))
    }

    /// The message that was read again last, until all that settled before this run were.
    pub fn replayed(&self) -> Option<SourcePoint> {
        self.replayed
    }

    /// See [`Senders::settled`].
    pub fn settled(&mut self, stored: u64, saved: u64) {
        self.samples.lock().settled(stored, saved);
    }

    /// Whether anything changes if there is nothing to read at this time of the source server.
    pub fn depends_on_clock(&self, source_ns: i64) -> bool {
        self.gap || self.samples.lock().is_due(source_ns.saturating_sub(GRACE_NS))
    }

    /// Finds senders that are unseen. `clear` is the time of the source server up to which there was nothing to read, if there
    /// is nothing now.
    pub fn tick(&mut self, clear: Option<i64>, status: &mut SamplingStatus, now: Instant) {
        if let Some(clear) = clear {
            let clock = clear.saturating_sub(GRACE_NS);
            let mut senders = self.samples.lock();
            if std::mem::take(&mut self.gap) {
                senders.begin_at(clock);
            }
            senders.advance(clock);
        }
        if let Some(post) = &mut self.post {
            post.tick(&mut self.samples.lock(), status, now);
        }
    }

    /// Begins a write if records are due and none is under way. `position` is settled; an instance
    /// that took over now would read after `saved`.
    pub fn write(&mut self, position: u64, saved: u64, now: Instant) {
        let urgent = now >= self.written_at + WRITE_SOON && !self.write_failed && self.samples.lock().is_urgent();
        if self.writing.is_some() || (now < self.next_write && !urgent) {
            return;
        }
        let position = self.known(position);
        let next = self.samples.lock().next_write(position, saved, TOGETHER);
        let Some(write) = next else {
            self.written_at = now;
            self.next_write = now + WRITE_EVERY;
            return;
        };
        let write = Arc::new(write);
        let (store, id, records) = (self.samples.store.clone(), self.replication.clone(), write.clone());
        let writing = async move { store.write_all(&id, &records.records).await };
        self.writing = Some((Box::pin(writing), write));
    }

    /// Drives a write that is under way and the connection for advisories.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<SamplingEvent> {
        if let Some((writing, _)) = &mut self.writing
            && let Poll::Ready(result) = writing.as_mut().poll(cx)
        {
            return Poll::Ready(SamplingEvent::Wrote(self.wrote(result)));
        }
        self.poll_post(cx).map(SamplingEvent::Advisory)
    }

    fn wrote(&mut self, result: Result<(), store::Error>) -> u64 {
        let Some((_, write)) = self.writing.take() else { return 0 };
        let now = Instant::now();
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.write_failed) {
                    info!(replication = self.replication, "the records of senders are written again");
                }
                self.next_write = now;
                self.samples.lock().wrote(&write);
                write.records.len() as u64
            }
            Err(error) => {
                if !std::mem::replace(&mut self.write_failed, true) {
                    warn!(replication = self.replication, "the records of senders are not written: {error}");
                }
                self.next_write = now + WRITE_EVERY;
                self.samples.lock().not_wrote(&write);
                0
            }
        }
    }

    /// Writes all records that are due and waits for it; no message is handled meanwhile.
    pub async fn finish(&mut self, position: u64, saved: u64, status: &mut SamplingStatus) {
        loop {
            if let Some((writing, _)) = &mut self.writing {
                let result = writing.await;
                status.records_written += self.wrote(result);
            }
            if self.write_failed {
                return;
            }
            self.next_write = Instant::now();
            self.write(position, saved, self.next_write);
            if self.writing.is_none() {
                return;
            }
        }
    }

    /// Publishes advisories that are due, within the bounds.
    pub fn publish(&mut self, status: &mut SamplingStatus, now: Instant) {
        if let Some(post) = &mut self.post {
            post.publish(&mut self.samples.lock(), status, now);
        }
    }

    fn poll_post(&mut self, cx: &mut Context<'_>) -> Poll<AdvisoryEvent> {
        self.post.as_mut().map_or(Poll::Pending, |post| post.poll(cx))
    }

    /// Handles the result of [`SamplingDriver::poll`].
    pub fn accept(&mut self, moved: SamplingEvent, status: &mut SamplingStatus, now: Instant) {
        let heard = match moved {
            SamplingEvent::Wrote(records) => return status.records_written += records,
            SamplingEvent::Advisory(heard) => heard,
        };
        if let Some(post) = &mut self.post {
            post.accept(heard, &mut self.samples.lock(), status, now);
        }
    }

    /// Publishes the advisories that can be published and waits until they are confirmed.
    pub async fn finish_post(&mut self, status: &mut SamplingStatus) {
        loop {
            let now = Instant::now();
            self.publish(status, now);
            if self.post.as_ref().is_none_or(|post| post.is_done(&self.samples.lock(), now)) {
                return;
            }
            let heard = poll_fn(|cx| self.poll_post(cx)).await;
            self.accept(SamplingEvent::Advisory(heard), status, Instant::now());
        }
    }

    /// The events to report.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = self.post.as_mut().map(AdvisoryPublisher::take_events).unwrap_or_default();
        let mut senders = self.samples.lock();
        if senders.became_full() {
            let (replication, senders) = (&self.replication, senders.len() as u64);
            let message = "messages of further senders are copied: raise `limits.senders` or `limits.sender_bytes`, or \
                           find the publisher that invents senders";
            warn!(replication, senders, "no more senders can be tracked, {message}");
            events.push(Event::SendersUntracked { senders, message: message.to_owned() });
        }
        events
    }

    /// Brings the status up to date.
    pub fn update_status(&self, status: &mut SamplingStatus, now: Instant) {
        let senders = self.samples.lock();
        status.senders = senders.len() as u64;
        status.untracked = senders.untracked();
        status.advisories_waiting = senders.outbox.len() as u64;
        status.advisories_dropped = senders.outbox.dropped();
        let late = now.duration_since(self.written_at).saturating_sub(WRITE_EVERY);
        status.write_lag_seconds = late.as_secs_f64();
    }
}

impl Drop for SamplingDriver {
    fn drop(&mut self) {
        // The outcome of the write that is under way is unknown.
        if let Some((_, write)) = self.writing.take() {
            self.samples.lock().not_wrote(&write);
        }
    }
}

/// Up to where acks may be sent to a source that forgets, `since` the time when the records of all senders were last
/// written.
fn may_forget(position: u64, written_to: u64, since: Duration) -> u64 {
    if since > PATIENCE { position } else { position.min(written_to) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acks_wait_for_the_records_of_senders_but_not_for_ever() {
        for since in [Duration::ZERO, PATIENCE] {
            assert_eq!(may_forget(9, 4, since), 4);
            assert_eq!(may_forget(4, 9, since), 4);
        }
        assert_eq!(may_forget(9, 4, PATIENCE + Duration::from_millis(1)), 9);
    }
}
