//! The position record of a replication: which instance may write it, and writing it while the copy continues.
//!
//! Every save is a compare-and-swap on the revision of the key. The first act of a holder is a save with its epoch:
//! that proves that the record was read from the current leader, and it fences the saves of earlier holders. A write
//! with an unknown outcome (no answer, or no responders during an election) may have been applied: it is read back with
//! `STREAM.MSG.GET` and identified by holder, epoch and nonce.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use chrono::{DateTime, SubsecRound, Utc};
use tokio::{
    sync::watch,
    time::{Duration, Instant},
};
use tracing::warn;

use crate::{
    config::{Limits, NativeKind, OnSourceLoss, Replication, Sharing},
    copy::{
        Error, ErrorKind,
        flow::{
            unsaved::{Copied, Unsaved},
            window::Window,
        },
        resume::Resume,
        source::{clock::Alarm, gap::Gaps, request_limit::RequestLimit},
        target::{drops::Drops, mode::Intruders},
    },
    events::{Event, Events, LossAction},
    status::{OnlyAtTarget, Row, TargetMode},
    store::{
        AfterTarget, Claim, FromTarget, Orphans, PositionRecord, PositionStore, SaveError, SourceWitness, Stamps,
        TargetWitness,
    },
};

/// At most one save in this time while a run is under way.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How often an idle replication checks that the bucket still has the record: it may have been purged or restored, and
/// the next holder would begin at an older position.
const COMPARE_EVERY: Duration = Duration::from_secs(60);
/// Unexplained breaks of the chain within [`CHAIN_BREAK_TIME`] that mean that another replicator writes under our
/// name.
const CHAIN_BREAKS: usize = 6;
const CHAIN_BREAK_TIME: Duration = Duration::from_secs(60);
/// How long after the end of a run messages that it had in flight may still be stored.
const LATE: Duration = Duration::from_secs(60);
/// The same for an earlier holder: its connections were reset when it ended.
const LATE_OF_OTHERS: Duration = Duration::from_secs(15);
/// Most breaks of the chain that they explain: each consumes a part of the messages in flight.
const MOST_EXPLAINED: usize = 20;

/// Logins that end within this time of each other are an error that is reported.
const LOGINS_APART: Duration = Duration::from_secs(10);
/// How long each message gets an ack of its own once that was necessary: the duplicate window of most streams, after which they
/// forget ids.
const SINGLE_ACKS: Duration = Duration::from_secs(120);

type Saving = Pin<Box<dyn Future<Output = Result<u64, SaveError>> + Send>>;

/// The right to run a replication and its position record: claimed once per holder, lent to each run.
pub struct PositionWriter {
    store: PositionStore,
    events: Events,
    id: String,
    record: PositionRecord,
    revision: u64,
    saving: Option<(Saving, PositionRecord)>,
    last_save: Option<Instant>,
    /// When the bucket was last asked for the record.
    compared: Instant,
    /// The bucket had another record than the one that was written last.
    replaced: bool,
    breaks: Breaks,
    /// Last sequence of the target when the latest run began.
    begun_at: Option<u64>,
    /// Jumps in the source's sequences that the run before could not explain in its time.
    pub(in crate::copy) gaps: Gaps,
    /// The copies that the target holds, as far as its limits can remove any.
    pub(in crate::copy) drops: Drops,
    /// Whether the chain of the run before broke.
    broken: bool,
    /// Messages of other writers at a target that should be exclusive.
    pub(in crate::copy) intruders: Intruders,
    /// Whether a duplicate window that is too short was reported.
    pub(in crate::copy) window_reported: bool,
    /// The longest protocol line that the target accepts, in bytes, if that is less than the default of servers.
    pub(in crate::copy) max_line: Option<usize>,
    /// Until when each message gets an ack of its own, if that was necessary: that of a duplicate says so, the end of a
    /// batch does not.
    single_acks: Option<Instant>,
    /// How much may be requested from the source at once.
    pub(in crate::copy) request_limit: RequestLimit,
    /// Whether a difference between the source's clock and ours was reported.
    pub(in crate::copy) clock: Alarm,
    /// When a server last ended the login of a run.
    login_ended: Option<Instant>,
    /// The last published loss at the source, while it persists.
    loss: Option<Event>,
    /// Source sequence in the saved record.
    saved: watch::Sender<u64>,
    /// Successes and failures of saves.
    pub(in crate::copy) unsaved: Unsaved,
}

impl std::fmt::Debug for PositionWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PositionWriter").field("id", &self.id).field("record", &self.record).finish_non_exhaustive()
    }
}

impl PositionWriter {
    /// The writer that follows from a claimed position record (see [`PositionStore::claim`]).
    /// `events` are the events of the runs: a record that makes an event obsolete is written after it.
    pub fn new(store: PositionStore, events: Events, id: &str, claim: Claim) -> Self {
        let Claim { record, revision, .. } = claim;
        let saved = watch::Sender::new(saved_seq(&record));
        Self {
            store,
            events,
            id: id.to_owned(),
            record,
            revision,
            saving: None,
            last_save: None,
            compared: Instant::now(),
            replaced: false,
            breaks: Breaks::new(Instant::now()),
            begun_at: None,
            gaps: Gaps::default(),
            drops: Drops::default(),
            broken: false,
            intruders: Intruders::default(),
            window_reported: false,
            max_line: None,
            single_acks: None,
            request_limit: RequestLimit::default(),
            clock: Alarm::default(),
            login_ended: None,
            loss: None,
            saved,
            unsaved: Unsaved::default(),
        }
    }

    /// Up to where a run may copy now, see [`Unsaved::limit`].
    pub(in crate::copy) fn copy_limit(&mut self, copied: Copied, now: Instant) -> Option<Copied> {
        let saving_since = self.last_save.filter(|_| self.saving.is_some());
        self.unsaved.limit(copied, saving_since, now)
    }

    /// The saved position, a source sequence.
    pub fn saved(&self) -> watch::Receiver<u64> {
        self.saved.subscribe()
    }

    /// The source sequence after which an instance that takes over now reads: with sampling, it may be before the saved
    /// position.
    pub fn reads_after(&self) -> u64 {
        let position = self.position();
        self.record.sampled.map_or(position, |sampled| sampled.min(position))
    }

    /// The source sequence in the saved record.
    pub fn position(&self) -> u64 {
        saved_seq(&self.record)
    }

    /// The saved record.
    pub fn record(&self) -> &PositionRecord {
        &self.record
    }

    /// Saves the status row alone, for states in which no run is active.
    pub async fn save_row(&mut self, row: Row) -> Result<(), SaveError> {
        self.write(self.record.clone(), row).await
    }

    /// Begins to save if no save is under way and the last one is long enough ago; returns whether the record is up to
    /// date already.
    pub(in crate::copy) fn save(&mut self, now: Instant, witnesses: Witnesses<'_>, row: impl FnOnce() -> Row) -> bool {
        self.save_record(now, |saved| witnesses.record(saved), row)
    }

    /// The same for a native feed.
    pub(crate) fn save_fed(&mut self, now: Instant, fed: &Fed<'_>, row: impl FnOnce() -> Row) -> bool {
        self.save_record(now, |saved| fed.record(saved), row)
    }

    /// Saves now, at the end of a native feed, and waits for it.
    pub(crate) async fn save_fed_now(&mut self, fed: &Fed<'_>, row: Row) -> Result<(), SaveError> {
        self.write(fed.record(&self.record), row).await
    }

    fn save_record(
        &mut self,
        now: Instant,
        record: impl FnOnce(&PositionRecord) -> PositionRecord,
        row: impl FnOnce() -> Row,
    ) -> bool {
        let recent = self.last_save.is_some_and(|last| now.duration_since(last) < SAVE_EVERY);
        if recent || self.saving.is_some() {
            return false;
        }
        self.last_save = Some(now);
        let record = record(&self.record);
        let same = record.source == self.record.source
            && record.target == self.record.target
            && record.after_target == self.record.after_target
            && record.sampled == self.record.sampled
            && record.unseen_from == self.record.unseen_from;
        let row = row();
        // No progress and no change: a write would have the same content.
        let marked = record.target_mode == self.record.target_mode && record.stamps == self.record.stamps;
        if same && marked && !self.replaced && self.record.status.as_ref() == Some(&row) {
            self.unsaved.nothing();
            self.compare(now);
            return true;
        }
        self.start(record.reporting(row));
        false
    }

    /// Checks now and then that the bucket still has the record. If not, the next save writes it again.
    fn compare(&mut self, now: Instant) {
        if now.duration_since(self.compared) >= COMPARE_EVERY {
            self.compared = now;
            self.saving = Some((Box::pin(self.store.confirm(&self.id, self.revision)), self.record.clone()));
        }
    }

    /// After a move back: saves, before anything is sent, the target sequence up to which the target proves nothing.
    pub(in crate::copy) async fn save_unproven(&mut self, target_seq: u64, created: &str) -> Result<(), Error> {
        self.finish().await?;
        let target = Some(TargetWitness { seq: target_seq, source_seq: 0, created: created.to_owned() });
        self.save_whole(PositionRecord { target, moved_back: false, ..self.record.clone() }).await?;
        if self.record.moved_back {
            return Err(Error::new(ErrorKind::Retry, "the position record changed under us after it was moved"));
        }
        Ok(())
    }

    /// Notes copies whose source messages are lost; saved with the position.
    pub(in crate::copy) fn lost(&mut self, orphans: Option<Orphans>, only_at_target: Option<OnlyAtTarget>) {
        self.record.orphans = orphans;
        self.record.only_at_target = only_at_target;
    }

    /// An error if the source lost copied messages and the document says to hold then. Published once for each loss.
    pub(in crate::copy) fn follows(&mut self, resume: &mut Resume, replication: &Replication) -> Result<(), Error> {
        let loss = resume.findings.iter_mut().find(|finding| matches!(finding, Event::SourceReset { .. }));
        if replication.on_source_loss == OnSourceLoss::Follow {
            self.loss = None;
            return Ok(());
        }
        let Some(loss) = loss else {
            self.loss = None;
            return Ok(());
        };
        if let Event::SourceReset { action, .. } = loss {
            *action = LossAction::Held;
        }
        if !self.loss.as_ref().is_some_and(|told| is_same_loss(told, loss)) {
            warn!(replication = self.id, event = ?loss, "found");
            self.events.emit(loss.clone(), &self.id);
            self.loss = Some(loss.clone());
        }
        Err(Error::new(ErrorKind::Hold, held_by(self.loss.as_ref().unwrap_or(loss), replication)))
    }

    /// Notes, before anything is sent, how many messages may be in flight, where that is more than ever before and than
    /// is assumed of any run.
    pub(in crate::copy) async fn may_have_in_flight(&mut self, messages: usize) -> Result<(), Error> {
        let messages = messages as u64;
        if messages > self.record.most_in_flight.max(Limits::default().messages_in_flight as u64) {
            self.finish().await?;
            self.save_whole(PositionRecord { most_in_flight: messages, ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Whether the record says how the target got its messages.
    pub(crate) fn knows_kind(&self) -> bool {
        self.record.fed.is_some() || self.record.stamps.is_some()
    }

    /// Notes, before anything is stored, whether the target is fed natively. An error if it holds messages that it got in
    /// another way: a copy finds its own messages by headers that fed ones lack, and a target that asks for messages does
    /// not know of copies.
    pub(crate) async fn stores_as(
        &mut self,
        fed: Option<NativeKind>,
        target: &str,
        last_seq: u64,
    ) -> Result<(), Error> {
        let before = self.record.fed.map(Some).or(self.record.stamps.map(|_| None));
        if let Some(before) = before.filter(|before| *before != fed)
            && last_seq > 0
        {
            return Err(Error::new(ErrorKind::Hold, another_kind(before, fed, target)));
        }
        if self.record.fed != fed {
            self.finish().await?;
            let stamps = self.record.stamps.filter(|_| fed.is_none());
            self.save_whole(PositionRecord { fed, stamps, ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Notes, before it is created, that the replication has a durable consumer at its source, and under which
    /// installation's name: it is deleted with the replication.
    pub(crate) async fn uses_durable(&mut self, installation: &str) -> Result<(), Error> {
        if !self.record.durable || self.record.installation.is_none() {
            self.finish().await?;
            let installation = Some(installation.to_owned());
            self.save_whole(PositionRecord { durable: true, installation, ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Notes, before anything is read, up to where the records of senders hold, and how senders are identified; `None`
    /// without sampling.
    pub(crate) async fn samples_from(&mut self, sampled: Option<(u64, String)>) -> Result<(), Error> {
        let (sampled, inspected) = sampled.unzip();
        if self.record.sampled.is_some() != sampled.is_some() || self.record.inspected != inspected {
            self.finish().await?;
            self.save_whole(PositionRecord { sampled, inspected, ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Notes, before anything is read, what copies from the target stream carry.
    pub(crate) async fn knows_from_target(&mut self, from_target: Option<FromTarget>) -> Result<(), Error> {
        if self.record.from_target != from_target {
            self.finish().await?;
            self.save_whole(PositionRecord { from_target, ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Notes the same during a run; saved with the position, or soon if that does not move.
    pub(crate) fn learns_from_target(&mut self, from_target: Option<FromTarget>) {
        if self.record.from_target != from_target {
            (self.record.from_target, self.replaced) = (from_target, true);
        }
    }

    /// Notes, before anything is sent, which headers identify the messages of this run and those still in flight.
    pub(in crate::copy) async fn stamps(&mut self, stamps: Stamps) -> Result<(), Error> {
        if self.record.stamps != Some(stamps) {
            self.finish().await?;
            self.save_whole(PositionRecord { stamps: Some(stamps), ..self.record.clone() }).await?;
        }
        Ok(())
    }

    /// Saves now and waits for it.
    pub(in crate::copy) async fn save_now(&mut self, witnesses: Witnesses<'_>, row: Row) -> Result<(), SaveError> {
        self.write(witnesses.record(&self.record), row).await
    }

    /// Writes and waits. A conflict that is not another holder's is overwritten at the second try.
    async fn write(&mut self, record: PositionRecord, row: Row) -> Result<(), SaveError> {
        self.finish().await?;
        self.save_whole(record.reporting(row)).await
    }

    async fn save_whole(&mut self, record: PositionRecord) -> Result<(), SaveError> {
        self.start(record.clone());
        if !self.finish().await? {
            self.start(record);
            self.finish().await?;
        }
        Ok(())
    }

    fn start(&mut self, record: PositionRecord) {
        // Never used twice, also when the write before had an unknown outcome.
        self.record.nonce = self.record.nonce.wrapping_add(1);
        let record = PositionRecord { nonce: self.record.nonce, ..record };
        // Events before this record are not repeated: a crash in between repeats them rather than losing them.
        let told = self.events.on_the_way();
        let saving = self.store.save(&self.id, record.clone(), self.revision);
        let saving = async move {
            told.await;
            saving.await
        };
        self.saving = Some((Box::pin(saving), record));
    }

    /// Drives a save that is under way; ready when it has ended.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SaveError>> {
        let Some((saving, _)) = &mut self.saving else { return Poll::Pending };
        let Poll::Ready(result) = saving.as_mut().poll(cx) else { return Poll::Pending };
        let Some((_, record)) = self.saving.take() else { return Poll::Pending };
        Poll::Ready(self.judge(result, record).map(|_| ()))
    }

    /// Whether the record was written; if not, the next write is based on the present record.
    fn judge(&mut self, result: Result<u64, SaveError>, record: PositionRecord) -> Result<bool, SaveError> {
        match result {
            Ok(revision) => {
                self.revision = revision;
                self.replaced = false;
                self.saved.send_replace(saved_seq(&record));
                match copied(&record) {
                    Some(copied) => self.unsaved.saved(copied),
                    None => self.unsaved.nothing(),
                }
                self.record = record;
                Ok(true)
            }
            // A write of our own that arrived late, an edit by hand or a bucket restored to an older state: the
            // holder's next save is based on it.
            Err(SaveError::Conflict { record: there, revision })
                if there.epoch < self.record.epoch
                    || there.epoch == self.record.epoch && there.holder == self.record.holder =>
            {
                (self.revision, self.replaced) = (revision, true);
                self.record.nonce = self.record.nonce.max(there.nonce);
                Ok(false)
            }
            // Deleted by hand while it is in use: it is recreated.
            Err(SaveError::Deleted { revision }) => {
                (self.revision, self.replaced) = (revision, true);
                Ok(false)
            }
            Err(error) => {
                self.unsaved.failed(Instant::now(), error.to_string());
                Err(error)
            }
        }
    }

    async fn finish(&mut self) -> Result<bool, SaveError> {
        let Some((saving, record)) = self.saving.take() else { return Ok(true) };
        let result = saving.await;
        self.judge(result, record)
    }

    /// Notes where a run begins to write, or up to where no other writer has written.
    pub(in crate::copy) fn begin_at(&mut self, target_seq: u64) {
        self.begun_at = Some(target_seq);
        self.broken = false;
    }

    /// Notes, where the chain of a run broke, up to which target sequence the run knows every message. Where the target
    /// identifies messages by their ids alone (`by_ids`), it may still store messages of the run that were in flight.
    pub(in crate::copy) fn broke_at(&mut self, target_seq: u64, window: &Window, by_ids: bool, now: Instant) {
        self.begin_at(target_seq);
        self.breaks.broke(window.position().seq, now);
        if by_ids && !window.is_empty() {
            self.breaks.in_flight(window.newest().seq, now);
        }
    }

    /// Whether a login that the server ended is followed by another one at once: the first of several is.
    pub(crate) fn logs_in_again(&mut self, now: Instant) -> bool {
        let before = self.login_ended.replace(now);
        before.is_none_or(|before| now.duration_since(before) >= LOGINS_APART)
    }

    /// Requests an ack for each message, for a while; whether that is new.
    pub(crate) fn acks_singly(&mut self, now: Instant) -> bool {
        let is_new = self.single_acks.is_none_or(|until| now >= until);
        self.single_acks = Some(now + SINGLE_ACKS);
        is_new
    }

    /// Whether each message gets an ack of its own in a run that begins now.
    pub(in crate::copy) fn has_single_acks(&self, now: Instant) -> bool {
        self.single_acks.is_some_and(|until| now < until)
    }

    /// Whether the run shall end because batches are possible again.
    pub(in crate::copy) fn single_acks_end(&mut self, now: Instant) -> bool {
        self.single_acks.take_if(|until| now >= *until).is_some()
    }

    /// After which target sequence to search for the message that broke the chain of the run before; `None` if it did
    /// not break.
    pub(in crate::copy) fn chain_broke_after(&self) -> Option<u64> {
        self.begun_at.filter(|_| self.broken)
    }

    /// Notes that a run ended without a broken chain, and its messages in flight.
    pub(in crate::copy) fn left_in_flight(&mut self, window: &Window, now: Instant) {
        if !window.is_empty() {
            self.breaks.in_flight(window.newest().seq, now);
            self.breaks.explained = 0;
        }
    }

    /// Notes that the chain broke; an error when it broke too often without another writer's message to explain it.
    /// `true` where messages of an earlier run may have broken it: that indicates no other writer, however often it
    /// happens.
    pub(in crate::copy) fn chain_broke(&mut self, now: Instant) -> Result<bool, Error> {
        self.broken = true;
        self.breaks.count(now)
    }

    /// Handles messages of another writer at a target that the document wants to be exclusive.
    pub(in crate::copy) fn unwanted(&mut self, resume: &mut Resume, replication: &Replication) -> Result<(), Error> {
        if replication.target_mode != Sharing::Exclusive {
            return Ok(());
        }
        let Some(foreign) = resume.foreign.take() else { return Ok(()) };
        self.chain_explained();
        resume.mode = TargetMode::Exclusive;
        resume.findings.retain(|finding| !matches!(finding, Event::TargetShared { .. }));
        match self.intruders.found(&replication.target.stream, foreign) {
            Some(message) => Err(Error::new(ErrorKind::Hold, message)),
            None => Ok(()),
        }
    }

    /// Another writer's message explains why the chain broke.
    pub(in crate::copy) fn chain_explained(&mut self) {
        self.breaks.at.clear();
    }
}

/// Breaks of the chain, and their possible explanations.
#[derive(Debug)]
struct Breaks {
    /// Times of the unexplained ones.
    at: VecDeque<Instant>,
    /// Messages of earlier runs that may still be stored.
    late: Late,
    /// Breaks that were explained by it, since one of those runs ended other than by a break.
    explained: usize,
    /// Whether it may have caused the last break.
    is_late: bool,
}

impl Breaks {
    fn new(now: Instant) -> Self {
        Self { at: VecDeque::new(), late: Late::of_others(now), explained: 0, is_late: false }
    }

    /// The chain of a run broke that had settled everything up to a source sequence. Only earlier runs can explain it.
    fn broke(&mut self, settled: u64, now: Instant) {
        self.is_late = self.late.explains(settled, now);
    }

    /// A run ends that has messages in flight, up to this source sequence.
    fn in_flight(&mut self, through: u64, now: Instant) {
        self.late = self.late.and(through, now);
    }

    /// Counts the last break: returns whether it is explained, or an error if too many are not.
    fn count(&mut self, now: Instant) -> Result<bool, Error> {
        if std::mem::take(&mut self.is_late) && self.explained < MOST_EXPLAINED {
            self.explained += 1;
            return Ok(true);
        }
        self.at.push_back(now);
        while self.at.front().is_some_and(|at| now.duration_since(*at) > CHAIN_BREAK_TIME) {
            self.at.pop_front();
        }
        if self.at.len() < CHAIN_BREAKS {
            return Ok(false);
        }
        self.at.clear();
        Err(Error::new(
            ErrorKind::Hold,
            format!(
                "the target's last sequence moved {CHAIN_BREAKS} times within {CHAIN_BREAK_TIME:?} and only messages of this \
                 replication are there: another replicator of the same site and name writes to it"
            ),
        ))
    }
}

/// Messages of earlier runs that the target may still store.
#[derive(Debug, Clone, Copy)]
struct Late {
    /// Newest source sequence of the runs of this holder.
    through: u64,
    until: Instant,
    /// Until when any message of an earlier holder may still be stored: its messages in flight are not known.
    others_until: Instant,
}

impl Late {
    /// Messages of an earlier holder; this one begins now.
    fn of_others(now: Instant) -> Self {
        Self { through: 0, until: now, others_until: now + LATE_OF_OTHERS }
    }

    /// The same and those of a run that ends now. The deadline for those of earlier holders does not change.
    fn and(self, through: u64, now: Instant) -> Self {
        let before = if now < self.until { self.through } else { 0 };
        Self { through: through.max(before), until: now + LATE, ..self }
    }

    /// Whether they can have broken the chain of a run that had settled everything up to a source sequence.
    fn explains(self, settled: u64, now: Instant) -> bool {
        now < self.others_until || now < self.until && settled < self.through
    }
}

/// The copied amount in a record at the time of its write. The row of an earlier holder counts from another begin.
fn copied(record: &PositionRecord) -> Option<Copied> {
    let row = record.status.as_ref().filter(|row| row.epoch == record.epoch)?;
    Some(row.copy.counters.into())
}

fn saved_seq(record: &PositionRecord) -> u64 {
    record.source.as_ref().map_or(0, |source| source.seq)
}

/// Whether a loss is the one that was published: no message was copied since, and the source has the same messages. Its
/// end, and the messages that the target keeps, may change meanwhile.
fn is_same_loss(told: &Event, loss: &Event) -> bool {
    let of = |event: &Event| match event {
        Event::SourceReset { saved, resumed, .. } => Some((*saved, *resumed)),
        _ => None,
    };
    of(told).zip(of(loss)).is_some_and(|(told, now)| now.0 == told.0 && now.1 >= told.1)
}

/// The reason of the `held` state where the target got its messages as another kind.
pub(crate) fn another_kind(before: Option<NativeKind>, now: Option<NativeKind>, target: &str) -> String {
    let word = |kind: Option<NativeKind>| kind.map_or_else(|| "copy".to_owned(), |kind| kind.to_string());
    let (before, now) = (word(before), word(now));
    format!(
        "target stream `{target}` holds messages that it got while `kind` was `{before}`, and kind `{now}` cannot continue \
         after them without loss or duplicates: set `kind` back to `{before}`, or add another replication with its own \
         `name` and `target_stream`, or delete stream `{target}` to store everything again"
    )
}

/// The reason of the `held` state after a loss at the source, and the remedy.
fn held_by(loss: &Event, replication: &Replication) -> String {
    let Event::SourceReset { saved, reason, only_at_target, .. } = loss else { return String::new() };
    let (source, target) = (&replication.source.stream, &replication.target.stream);
    let only = only_at_target.map_or_else(
        || format!("target stream `{target}` has none of them"),
        |OnlyAtTarget { from, to, target_from, target_to, .. }| {
            format!(
                "only target stream `{target}` still has {from} to {to} (target sequences {target_from} to {target_to})"
            )
        },
    );
    format!(
        "source stream `{source}` lost messages that were copied, and `on_source_loss` is `hold`: {reason} (everything up to \
         {saved} was copied); {only}: restore the source, or set `on_source_loss` to `follow` to continue with what the source \
         has now"
    )
}

/// The content of a save about both sides.
#[derive(Debug, Clone, Copy)]
pub(in crate::copy) struct Witnesses<'a> {
    pub window: &'a Window,
    /// The source server's time.
    pub now: DateTime<Utc>,
    pub mode: TargetMode,
    pub stamps: Stamps,
    pub source_created: &'a str,
    /// The source server's time when the run asked it for its stream, before it read any message.
    pub opened_at: Option<DateTime<Utc>>,
    pub target_created: &'a str,
    /// The state of the senders' records, with sampling.
    pub sampled: Option<SenderRecords>,
}

/// What a position record is to say of a native feed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fed<'a> {
    /// Everything up to this source sequence is stored at the target; with the stored time of the message there,
    /// nanoseconds since the Unix epoch, where it is known. `None` where the target was not compared with the source: what was
    /// saved stays.
    pub point: Option<(u64, Option<i64>)>,
    /// A mirror's sequence is the same; another target had this last sequence at that time or before it.
    pub target_seq: u64,
    /// The source server's time.
    pub now: DateTime<Utc>,
    /// `created` of the source stream.
    pub source_created: &'a str,
    /// `created` of the target stream.
    pub target_created: &'a str,
    /// The records of senders; `None` where they are not known now: what was saved stays.
    pub sampled: Option<SenderRecords>,
}

impl Fed<'_> {
    fn record(&self, saved: &PositionRecord) -> PositionRecord {
        let Some((seq, time_ns)) = self.point else { return saved.clone() };
        let target = TargetWitness { seq: self.target_seq, source_seq: seq, created: self.target_created.to_owned() };
        PositionRecord {
            source: Some(SourceWitness { seq, time_ns, none_at: None, created: self.source_created.to_owned() }),
            target: (seq > 0).then_some(target),
            after_target: None,
            saved_at: Some(self.now.trunc_subsecs(3)),
            target_mode: TargetMode::Exclusive,
            sampled: self.sampled.map_or(saved.sampled, |sampled| Some(sampled.written_to)),
            unseen_from: self.sampled.map_or(saved.unseen_from, |sampled| sampled.unseen_from),
            ..saved.clone()
        }
    }
}

/// The state of the senders' records.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SenderRecords {
    /// Up to which source sequence the records hold.
    pub written_to: u64,
    /// Senders of messages that were stored before this time may have been missed.
    pub unseen_from: Option<DateTime<Utc>>,
}

impl Witnesses<'_> {
    fn record(&self, saved: &PositionRecord) -> PositionRecord {
        let position = self.window.position();
        let target = self.window.target();
        let known = saved.source.as_ref().filter(|saved| saved.seq == position.seq).and_then(|saved| saved.none_at);
        PositionRecord {
            source: Some(SourceWitness {
                seq: position.seq,
                time_ns: position.time_ns,
                none_at: position.time_ns.is_none().then(|| known.or(self.opened_at)).flatten(),
                created: self.source_created.to_owned(),
            }),
            // At their end the target sequence may still go back: a message that is sent again is a duplicate and is
            // acked with its old sequence.
            orphans: saved.orphans.filter(|orphans| target.is_none_or(|target| target.seq <= orphans.to)),
            target: target.map(|target| TargetWitness {
                seq: target.seq,
                source_seq: target.source_seq,
                created: self.target_created.to_owned(),
            }),
            after_target: self
                .window
                .after_target()
                .map(|end| AfterTarget { at_least: end.seq, source_seq: end.source_seq }),
            saved_at: Some(self.now.trunc_subsecs(3)),
            target_mode: self.mode,
            stamps: Some(self.stamps),
            sampled: self.sampled.map(|sampled| sampled.written_to),
            unseen_from: self.sampled.and_then(|sampled| sampled.unseen_from),
            ..saved.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{CopyStatus, State};

    #[test]
    fn the_row_of_a_holder_before_does_not_say_what_was_copied() {
        let row = |epoch: u64| {
            let mut copy = CopyStatus::default();
            copy.counters.copied = 7;
            let (replication, origin) = ("S".to_owned(), "kv".to_owned());
            let state = State::Running;
            Some(Row {
                replication,
                state,
                origin,
                leader: None,
                epoch,
                config_revision: 1,
                copy,
                verify: None,
                todo: None,
            })
        };
        let record = |status: Option<Row>| PositionRecord { epoch: 2, status, ..PositionRecord::new() };
        assert_eq!(copied(&record(row(2))), Some(Copied { messages: 7, bytes: 0 }));
        assert_eq!((copied(&record(row(1))), copied(&record(None))), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn messages_in_flight_explain_a_broken_chain_until_copied() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let none = Late { through: 0, until: now, others_until: now };
        assert!(!none.explains(0, now));
        let late = none.and(20, now);
        assert!(late.explains(5, now + second) && late.explains(19, now + 59 * second));
        // Other writers go beyond it, or last longer.
        assert!(!late.explains(20, now + second) && !late.explains(5, now + 60 * second));
        // A run that had less in flight does not end what the one before it had.
        let two = late.and(10, now + 30 * second);
        assert!(two.explains(19, now + 89 * second) && !two.explains(20, now + 31 * second));
        assert!(!late.and(10, now + 60 * second).explains(10, now + 61 * second));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_rest_of_another_holder_lasts_no_longer() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let others = Late::of_others(now);
        assert!(others.explains(1_000, now + 14 * second) && !others.explains(1_000, now + 15 * second));
        // Neither does a run extend it that had some in flight.
        let late = others.and(20, now + 10 * second).and(30, now + 12 * second);
        assert!(late.explains(1_000, now + 14 * second) && !late.explains(1_000, now + 15 * second));
        assert!(late.explains(29, now + 71 * second) && !late.explains(30, now + 16 * second));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_whose_chain_broke_explains_the_next_break_only() {
        let now = Instant::now() + LATE_OF_OTHERS;
        let mut breaks = Breaks::new(Instant::now());
        // Its own messages do not explain the break of a run.
        breaks.broke(5, now);
        breaks.in_flight(20, now);
        assert!(!breaks.count(now).unwrap());
        breaks.broke(5, now);
        assert!(breaks.count(now).unwrap());
        breaks.broke(20, now);
        assert!(!breaks.count(now).unwrap());
        // A writer of the same name breaks every run, and each of them leaves some.
        let mut held = 0;
        for run in 0..MOST_EXPLAINED as u64 + CHAIN_BREAKS as u64 {
            breaks.broke(20 + run, now);
            breaks.in_flight(100 + run, now);
            held += usize::from(breaks.count(now).is_err());
        }
        assert_eq!(held, 1);
    }
}
