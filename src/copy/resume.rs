//! Determines where to resume, at every start, from the saved position and the present state of both streams.
//!
//! The record has a witness for each side: of the source a sequence and its stored time, of the target a sequence and
//! the source sequence of the message there.
//!
//! | source and target | the run resumes |
//! |---|---|
//! | witnesses hold, messages of ours are after the saved target sequence | after the newest message that proves that all before it are there; of the rest, messages that are there already are skipped |
//! | witnesses hold, or the target's message went by purge or expiry, and no newer one is there | after the position |
//! | target ends before the saved sequence, has another message there, a hole without an explanation, or lacks the confirmed copy that should follow | after the newest message of ours that the source still has; event `target-reset` |
//! | the same, or no record and no message of ours, and the newest copies are those of another site from this very source | not at all, `held`: two sites write one target |
//! | source has another stored time at the position, or ends before | after the newest copied message that the source still has; without one, at its first message; event `source-reset`. With `on_source_loss: hold` nothing is saved or sent: `held` |
//! | source begins after the position, without a filter and `max_msgs_per_subject` | at its first message; the missing ones are a gap, event `gap` |
//! | target empty and new | at the configured start, or after the position if that comes first; event `target-reset` |
//! | no record | after the newest message of ours at the target, else at the ack floor of Choria's durable, else at the configured start |
//! | no record, no message was ever removed from the target, none there is ours, and Choria's durable has acknowledged some | at the configured start, or at the ack floor if that comes first; event `target-reset` |
//!
//! Server behaviour that the rules come from (2.10 to 2.15 unless noted):
//!
//! * Direct gets were stale in 4 to 7 % of reads on a loaded stream with three replicas. So messages are read with
//!   `STREAM.MSG.GET`, which the leader answers, and `STREAM.INFO` counts only if the leader answered it. A consumer
//!   may be on a replica that lags: a scan that ends early is compared with `STREAM.MSG.GET`.
//! * An acknowledged message can be lost by a power failure: servers sync files every 2 minutes. After that the stream
//!   has the same `created`, and stores other messages at the same sequences. So a sequence without the stored time
//!   identifies no message.
//! * `created` identifies no content: a memory stream that was emptied, a wiped disk or a restore can keep it, and a
//!   restore can change it. It decides only where no message is left that could contradict.
//! * A message that is missing at the source proves nothing, because streams expire and delete messages. Only a
//!   contradiction does: another stored time, an end before the position, or a message at or below it that was stored
//!   later.
//! * A message with the chain, or one of Choria's replicator, which writes one at a time, proves that all before it are
//!   stored. A message with an id does not: a pipelined one may have been refused and sent again after a window of
//!   later ones. So the search goes back one window further, and known messages are identified by sequence and stored
//!   time.

mod acks;
mod already;
mod search;
mod witness;

use std::collections::HashMap;

use chrono::Utc;
use tokio::time::{Duration, Instant, sleep};

pub(super) use self::already::{Already, KnownCopy};
use self::search::{Kept, Proof, RangeFindings, Search, Tail, note};
use nats_lane::{
    Error, Lane, headers,
    jetstream::{Api, StoredMessage, StreamInfo},
};

use super::{
    flow::window::{SourcePoint, TargetPoint},
    source::{
        clock::SourceClock,
        consumers::Names,
        durable::{self, Durable},
        locate,
    },
    target::{
        mode::{self, Foreign},
        provenance::{MessageOrigin, OtherSiteCopy, Tag},
        target_limits::limits,
    },
};
use crate::{
    config::{Limits, Replication, Start},
    events::{Event, LossAction},
    status::{OnlyAtTarget, TargetMode},
    store::{Orphans, PositionRecord, SourceWitness, Stamps},
};

/// Messages searched first when a stream is searched from its end; each further step searches four times as many.
const SEARCH_STEP: u64 = 1_000;
/// A loss at the source counts when its leader reports it twice, this long apart.
const SURE_AFTER: Duration = Duration::from_secs(2);
/// Marks messages that were sent in a chain: everything before such a message is complete.
const CHAIN: &[u8] = b"Nats-Expected-Last-Sequence";
/// Messages that were sent pipelined carry an id; messages with neither header were sent one at a time (by Choria).
const ID: &[u8] = b"Nats-Msg-Id";

/// Where to resume, and the findings on the way.
#[derive(Debug)]
pub(super) struct Resume {
    /// Everything at the source up to here is settled.
    pub position: SourcePoint,
    /// The newest message of ours that is known to be at the target.
    pub target: Option<TargetPoint>,
    /// See [`Window::after_target`](super::flow::window::Window::after_target).
    pub after_target: Option<TargetPoint>,
    /// Messages after the position that are at the target already.
    pub already: Already,
    /// Whether another writer writes to the target.
    pub mode: TargetMode,
    /// The provenance headers of the newest message there.
    pub before: Option<Stamps>,
    /// The newest message of another writer there, among those that were read.
    pub foreign: Option<Foreign>,
    /// Messages after the saved target sequence that were consumed or removed before they were read.
    pub unseen: u64,
    /// Copies of messages that the source has lost: they were reported.
    pub orphans: Option<Orphans>,
    /// Messages that only the target still has, since the newest loss at the source.
    pub only_at_target: Option<OnlyAtTarget>,
    /// Events to report.
    pub findings: Vec<Event>,
}

impl Resume {
    fn at(position: SourcePoint, target: Option<TargetPoint>) -> Self {
        Self {
            position,
            target,
            after_target: None,
            already: Already::default(),
            mode: TargetMode::Exclusive,
            before: None,
            foreign: None,
            unseen: 0,
            orphans: None,
            only_at_target: None,
            findings: Vec::new(),
        }
    }
}

/// The two sides as they are now.
pub(super) struct Sides<'a> {
    pub replication: &'a Replication,
    pub tag: &'a Tag,
    pub source_lane: &'a mut Lane,
    pub target_lane: &'a mut Lane,
    /// Names of consumers at the source and at the target.
    pub source_names: &'a mut Names,
    pub target_names: &'a mut Names,
    pub source: &'a StreamInfo,
    /// The time of the source server.
    pub clock: SourceClock,
    pub target: &'a StreamInfo,
    /// The durable consumer at the source, if there is one: acknowledged messages are settled.
    pub durable: Option<&'a Durable>,
    /// Ack floor of Choria's replicator at a stream that keeps its messages, where it was requested already.
    pub acked: Option<Option<u64>>,
    /// Last sequence of the target when the run before began, if its chain broke.
    pub chain_broke_after: Option<u64>,
    /// The orphaned copies of the record: their source messages are lost.
    pub orphans: Option<Orphans>,
    /// The most messages that earlier runs could have in flight.
    pub most_in_flight: u64,
    /// Messages that were read already: none is read twice.
    pub read: ReadMessages,
}

/// Single messages that were read from both sides.
#[derive(Debug, Default)]
pub(super) struct ReadMessages {
    /// Stored times at the source by sequence.
    source: HashMap<u64, Option<i64>>,
    /// The newest message that was read from the target, by the requested sequence.
    target: Option<(u64, Option<StoredMessage>)>,
}

/// What the record says, where the source does not contradict it.
#[derive(Debug, Clone, Copy)]
struct Known {
    position: SourcePoint,
    target: Option<TargetPoint>,
    /// A copy that is after `target`, by its source sequence.
    after_target: Option<TargetPoint>,
}

impl Known {
    fn has_to_be_there(&self, message: &Ours) -> bool {
        self.after_target.is_some_and(|copy| copy.source_seq == message.origin.seq)
    }

    /// The source sequence of the copy that has to be after `target`, if it is not in the tail. Where the copy is there, it is
    /// the newest known one, unless copies after the position come before it.
    fn missing_in(&self, tail: &Kept, resume: &mut Resume) -> Option<u64> {
        let copy = self.after_target?;
        let Some(found) = tail.ours.iter().rfind(|message| self.has_to_be_there(message)) else {
            // More than can be in flight were stored since, and a stream loses nothing but its end.
            return (!tail.is_cut).then_some(copy.source_seq);
        };
        let is_after = |message: &Ours| message.origin.seq > self.position.seq;
        if tail.ours.iter().all(|message| !is_after(message) || message.target_seq > found.target_seq) {
            resume.target = Some(found.point());
        } else {
            resume.after_target = Some(copy);
        }
        None
    }
}

/// A message of ours at the target.
#[derive(Debug, Clone)]
struct Ours {
    origin: MessageOrigin,
    target_seq: u64,
    /// Everything in scope up to this message was stored before it.
    complete: bool,
    /// Only where the target has a limit per subject.
    subject: Option<Box<[u8]>>,
    /// The source was asked, and has it.
    confirmed: bool,
}

impl Ours {
    fn point(&self) -> TargetPoint {
        TargetPoint { seq: self.target_seq, source_seq: self.origin.seq }
    }
}

/// The source's answer for a saved sequence and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Witness {
    /// The same message is there.
    Holds,
    /// Another message is there, or the stream ends before the sequence.
    Broken,
    /// No message is there any more.
    Gone,
}

/// Determines where to resume. `mode` is the mode of the target that is known before the target is read.
pub(super) async fn find(mut sides: Sides<'_>, record: &PositionRecord, mode: TargetMode) -> Result<Resume, Error> {
    // At a target that lost its end, other messages may be there by now.
    let same = record.target.as_ref().is_none_or(|target| target.created == sides.target.created);
    sides.orphans = sides.orphans.filter(|orphans| same && orphans.to <= sides.target.state.last_seq);
    let mut only_before = record.only_at_target;
    if let (Some(orphans), Some(only)) = (sides.orphans, only_before) {
        (sides.orphans, only_before) = sides.still_lost(orphans, only).await?;
    }
    let mut resume = match &record.source {
        Some(saved) => sides.with_record(saved, record).await?,
        None => sides.without_record().await?,
    };
    if mode == TargetMode::Shared {
        resume.mode = mode;
        // Known before.
        resume.findings.retain(|finding| !matches!(finding, Event::TargetShared { .. }));
    }
    if !resume.findings.iter().any(|finding| matches!(finding, Event::TargetReset { .. })) {
        resume.orphans = resume.orphans.or(sides.orphans);
    }
    let there = only_before.filter(|only| same && only.target_to >= sides.target.state.first_seq);
    resume.only_at_target = resume.only_at_target.or(there);
    // A message that the source has not reached yet cannot be the same one later.
    let last = sides.source.state.last_seq;
    resume.already.forget_after(last);
    sides.not_before_acks(&mut resume).await?;
    sides.look_for_gap(&mut resume, record.source.is_some());
    let known = resume.target.is_some() || record.target.is_some();
    let newest = if known { sides.stamps_at_end().await? } else { None };
    resume.before = mode::stamps_before(record, newest, sides.chain_broke_after.is_some());
    Ok(resume)
}

impl Sides<'_> {
    async fn with_record(&mut self, saved: &SourceWitness, record: &PositionRecord) -> Result<Resume, Error> {
        let target = record.target.as_ref().filter(|witness| witness.seq > 0);
        if let Some(reason) = self.source_contradicts(saved).await? {
            self.ask_source_again(saved.seq).await?;
            if self.source_contradicts(saved).await?.is_none() {
                return Err(contradicts_itself());
            }
            let mut resume = self.source_went_back(saved.seq, &reason).await?;
            if let Some(reason) = self.target_is_short(record) {
                let resumed = resume.position.seq;
                resume.findings.push(Event::TargetReset { saved: saved.seq, resumed, reason });
            }
            return Ok(resume);
        }
        let position = SourcePoint { seq: saved.seq, time_ns: saved.time_ns };
        let point = target.map(|target| TargetPoint { seq: target.seq, source_seq: target.source_seq });
        let known = Known { position, target: point, after_target: self.has_to_be_there(record).await? };
        if let Some(reason) = self.target_is_short(record) {
            return self.target_lost(known, reason).await;
        }
        // Messages with ids may have left holes that a chain filled: its end then says nothing of what is after the holes.
        let chained = record.stamps == Some(Stamps::Chain);
        match target {
            Some(target) => self.with_target(known, target, chained, record).await,
            // There can only be messages that were sent just before a crash.
            None => self.with_tail(known, chained).await,
        }
    }

    /// Messages per subject that the target keeps; 0 for all.
    fn keeps(&self) -> usize {
        usize::try_from(self.target.number("max_msgs_per_subject")).unwrap_or(0)
    }

    /// The number of later messages that may precede one that was refused and sent again, by the greatest limit that
    /// a run had. Twice the limit: first those that were in flight with it, and, when all before it have settled, as
    /// many again after it.
    ///
    /// Runs do not add up: a run sends nothing beyond what it found at the target before everything up to there has
    /// settled (`Run::waits_for_known`). So a message is missing only below messages of one window.
    fn overlap(&self) -> usize {
        let before = usize::try_from(self.most_in_flight).unwrap_or(usize::MAX);
        let limit = self.replication.limits.messages_in_flight.max(Limits::default().messages_in_flight);
        limit.max(before).saturating_mul(2)
    }

    /// The witnesses hold: messages after the saved target sequence were stored after the last save. If they are one
    /// `chain`, its end is the position; otherwise all of them are read: messages that were sent pipelined before the
    /// chain may have left holes that the chain then filled.
    async fn with_tail(&mut self, known: Known, chain: bool) -> Result<Resume, Error> {
        let Known { position, target, .. } = known;
        let mut resume = Resume::at(position, target);
        let last = self.target.state.last_seq;
        let behind = target.map_or(0, |point| point.seq);
        if last <= behind {
            return Ok(resume);
        }
        let orphans = self.orphans;
        let orphan = |message: &Ours| orphans.is_some_and(|orphans| orphans.contains(message.target_seq));
        let quick = if chain { self.ours_at(last).await? } else { None };
        let quick = quick.filter(|newest| newest.complete && !orphan(newest) && known.after_target.is_none());
        let news = |message: &Ours| message.origin.seq > position.seq && !orphan(message);
        let wanted = |message: &Ours| news(message) || known.has_to_be_there(message);
        let moved = target.is_some_and(|point| point.source_seq == 0);
        let tail = match (quick, target) {
            (Some(newest), _) => Kept { ours: vec![newest], is_cut: false },
            // Without a saved target sequence, older messages at the target do not matter: only those that were stored
            // while the run before was under way, if its chain broke.
            (None, None) => {
                if let Some(behind) = self.chain_broke_after {
                    self.ours_between(behind + 1, last, &mut resume, |_| false).await?;
                }
                // Other clients may have consumed all of them.
                resume.unseen = last;
                self.newest_after(position.seq, wanted).await?
            }
            (None, Some(_)) => self.ours_between(behind + 1, last, &mut resume, wanted).await?,
        };
        if let Some(missing) = known.missing_in(&tail, &mut resume) {
            let reason = format!("it confirmed the copy of source sequence {missing}, and has none after {behind}");
            return self.target_lost(known, reason).await;
        }
        let Kept { mut ours, is_cut } = tail;
        ours.retain(news);
        // The last one may be older: it may have been refused and sent again.
        let Some(newest) = ours.iter().map(|message| message.origin).max_by_key(|origin| origin.seq) else {
            return Ok(resume);
        };
        if self.witness(newest).await? == Witness::Broken {
            self.ask_source_again(newest.seq).await?;
            if self.witness(newest).await? != Witness::Broken {
                return Err(contradicts_itself());
            }
            let mut back = self.source_went_back(position.seq, "its last messages are not the copied ones").await?;
            back.mode = resume.mode;
            back.foreign = resume.foreign.take();
            back.findings.append(&mut resume.findings);
            return Ok(back);
        }
        self.resume_after(&mut resume, &ours, is_cut, moved).await?;
        resume.already = self.already(ours, resume.position).await?;
        Ok(resume)
    }

    /// Those of these copies that are after the position. Where the target keeps few messages per subject, they show which
    /// older messages it would not keep beside them: but a copy from a stream that this one replaced shows nothing. It is
    /// older than this stream, the message at the position or a copy before it. Where the source's clock was set back, so
    /// are messages of this one: the source has them.
    async fn already(&mut self, mut ours: Vec<Ours>, position: SourcePoint) -> Result<Already, Error> {
        ours.retain(|message| message.origin.seq > position.seq);
        let created = self.source.created.parse::<chrono::DateTime<Utc>>().map_or(i64::MIN, nanos);
        let mut since = position.time_ns.unwrap_or(i64::MIN).max(created).div_euclid(1_000_000);
        let mut copies: Vec<&mut Ours> = ours.iter_mut().filter(|message| message.subject.is_some()).collect();
        copies.sort_unstable_by_key(|message| message.origin.seq);
        copies.retain(|message| {
            since = since.max(message.origin.time_ms);
            message.origin.time_ms < since
        });
        if !copies.is_empty() {
            let seqs: Vec<u64> = copies.iter().map(|message| message.origin.seq).collect();
            let times = self.source_times(seqs.iter().copied()).await?;
            for message in copies {
                message.confirmed = times.get(&message.origin.seq) == Some(&message.origin.time_ms);
            }
        }
        Ok(Already::new(ours, self.keeps()))
    }

    /// Resumes after the newest of these before which no message is missing. `is_cut` says that there are more before
    /// them, `moved` that the position was moved back.
    async fn resume_after(
        &mut self,
        resume: &mut Resume,
        ours: &[Ours],
        is_cut: bool,
        moved: bool,
    ) -> Result<(), Error> {
        // After a move back, messages that were in flight before it may have been stored after the saved target
        // sequence: only a sequence that begins directly after the position is complete.
        let next = resume.position.seq.max(self.source.state.first_seq.saturating_sub(1)) + 1;
        let directly = ours.first().is_some_and(|first| first.origin.seq <= next);
        if (directly || !moved)
            && let Some((index, point)) = self.newest_complete(ours).await?
        {
            resume.position = point;
            resume.target = target_before(ours, index, point.seq).or(resume.target);
        } else if is_cut && !moved {
            // Nothing before the first of these is missing. Say `x` is, with a lower sequence. At least twice the limit
            // (see `overlap`) were stored after the first. Those with lower sequences than it were in flight with it:
            // less than one limit. So more than one limit have higher sequences than `x` and are stored while `x` is
            // not; but `x` is missing only below messages of one window, and a window has no more than the limit.
            // Others in the range, or copies that were consumed or replaced, are not among the kept ones and only make
            // the range longer.
            resume.position = self.point_at(ours[0].origin.seq).await?;
            resume.target = Some(ours[0].point());
        }
        Ok(())
    }

    /// Messages of ours in a range of the target; a message of another writer makes the target shared.
    async fn ours_between(
        &mut self,
        from: u64,
        to: u64,
        resume: &mut Resume,
        wanted: impl Fn(&Ours) -> bool,
    ) -> Result<Kept, Error> {
        let mut seen = RangeFindings::default();
        let ours = self.newest_between(from, to, &mut seen, wanted).await?;
        resume.unseen = (to + 1 - from).saturating_sub(seen.messages);
        if let Some(foreign) = seen.foreign {
            resume.mode = TargetMode::Shared;
            resume.findings.retain(|finding| !matches!(finding, Event::TargetShared { .. }));
            resume.findings.push(mode::turned_shared(&foreign));
            resume.foreign = Some(foreign);
        }
        Ok(ours)
    }

    /// The newest of these after which no message is missing.
    async fn newest_complete(&mut self, ours: &[Ours]) -> Result<Option<(usize, SourcePoint)>, Error> {
        let Some(index) = ours.iter().rposition(|message| message.complete) else { return Ok(None) };
        let origin = ours[index].origin;
        if self.witness(origin).await? == Witness::Broken {
            return Ok(None);
        }
        Ok(Some((index, self.point_at(origin.seq).await?)))
    }

    /// The target lost stored messages: returns to the newest one of ours that it still has.
    async fn target_lost(&mut self, known: Known, reason: String) -> Result<Resume, Error> {
        self.no_other_site().await?;
        let saved = known.position.seq;
        let mut resume = match self.newest_known(Proof::NoContradiction).await?.tail {
            Some(tail) => self.behind(tail, Some(saved)).await?,
            None => {
                // A start at the end, or at an age, means the first start: messages that arrived since then have to be
                // copied again at least.
                let start = self.configured_start().await?;
                let start = if start.seq <= saved { start } else { self.point_at(saved).await? };
                Resume::at(start, self.last_of_ours().await?.as_ref().map(Ours::point))
            }
        };
        resume.findings.push(Event::TargetReset { saved, resumed: resume.position.seq, reason });
        let moved = known.target.is_some_and(|point| point.source_seq == 0);
        Ok(if moved { self.not_beyond(known.position, resume) } else { resume })
    }

    /// The target lost data after the position was moved back: messages that were copied before the move still prove
    /// nothing.
    fn not_beyond(&self, position: SourcePoint, mut found: Resume) -> Resume {
        if found.position.seq <= position.seq {
            return found;
        }
        for finding in &mut found.findings {
            if let Event::TargetReset { resumed, .. } = finding {
                *resumed = position.seq;
            }
        }
        let target = TargetPoint { seq: self.target.state.last_seq, source_seq: 0 };
        Resume { findings: found.findings, ..Resume::at(position, Some(target)) }
    }

    /// The source lost its end or is another stream: resumes after the newest copied message that it still has;
    /// without one it is another stream, and all of it is new.
    async fn source_went_back(&mut self, saved: u64, reason: &str) -> Result<Resume, Error> {
        let Search { tail, mut lost } = self.newest_known(Proof::Message).await?;
        let (resume, from) = match tail {
            Some(tail) => {
                let from = tail.ours.last().map_or(0, |newest| newest.target_seq) + 1;
                (self.behind(tail, None).await?, from)
            }
            None => {
                self.no_other_site().await?;
                // A long target was not searched completely.
                if lost.messages > 0
                    && let Some(first) = self.first_of_ours().await?.filter(|first| first.target_seq < lost.target_from)
                {
                    note(&mut lost, &[first]);
                }
                let last = self.last_of_ours().await?;
                (Resume::at(SourcePoint::default(), last.as_ref().map(Ours::point)), self.target.state.first_seq)
            }
        };
        let to = self.target.state.last_seq;
        let orphans = (from <= to).then_some(Orphans { from, to });
        let only_at_target = (lost.messages > 0).then_some(lost);
        let mut resume = Resume { orphans, only_at_target, ..resume };
        let (resumed, reason, action) = (resume.position.seq, reason.to_owned(), LossAction::Followed);
        let finding = Event::SourceReset { saved, resumed, reason, action, only_at_target };
        resume.findings.push(finding);
        Ok(resume)
    }

    async fn without_record(&mut self) -> Result<Resume, Error> {
        let Search { tail, lost } = self.newest_known(Proof::NoContradiction).await?;
        if let Some(tail) = tail {
            let last = self.source.state.last_seq;
            if lost.to > last {
                self.ask_source_again(lost.to).await?;
                let reason = format!("its last sequence is {last}, below {} that was copied", lost.to);
                return self.source_went_back(lost.to, &reason).await;
            }
            return self.behind(tail, None).await;
        }
        self.no_other_site().await?;
        if let Some(ours) = self.last_of_ours().await? {
            // Copied before, but from a stream that is different from this one.
            let seq = ours.origin.seq;
            self.ask_source_again(seq).await?;
            return self.source_went_back(seq, &format!("it does not have message {seq} that was copied last")).await;
        }
        let position = match self.acked().await? {
            Some(floor) if floor > 0 && self.durable.is_none() && self.target_never_held_any() => {
                return self.before_acks_of_others(floor).await;
            }
            Some(floor) if floor > 0 => self.point_at(floor).await?,
            // The consumer itself says where it begins.
            Some(_) if self.durable.is_some() => SourcePoint::default(),
            _ => match durable::start_refused(self.replication, self.source) {
                Some(why) => return Err(Error::hold(why)),
                None => self.configured_start().await?,
            },
        };
        Ok(Resume::at(position, None))
    }

    /// Resumes after the messages that the target has. A message that was refused and sent again may be after a window
    /// of later ones: unless headers prove more, everything up to the oldest of these is settled, and of the rest
    /// the messages that were found.
    async fn behind(&mut self, tail: Tail, saved: Option<u64>) -> Result<Resume, Error> {
        let Tail { ours, whole } = tail;
        let (newest, overlap) = (ours.len().saturating_sub(1), self.overlap());
        let mut base = self.newest_complete(&ours).await?;
        if base.is_none() {
            let oldest = newest.saturating_sub(overlap);
            let seen_whole = oldest == 0 && whole && newest < overlap;
            if !seen_whole && self.witness(ours[oldest].origin).await? != Witness::Broken {
                base = Some((oldest, self.point_at(ours[oldest].origin.seq).await?));
            }
        }
        let mut resume = match base {
            Some((index, position)) => Resume::at(position, target_before(&ours, index, position.seq)),
            None => {
                let lowest = ours.iter().map(|message| message.origin.seq).min().unwrap_or(1) - 1;
                let start = self.configured_start().await?.seq.min(lowest).min(saved.unwrap_or(u64::MAX));
                Resume::at(self.point_at(start).await?, None)
            }
        };
        resume.already = self.already(ours, resume.position).await?;
        Ok(resume)
    }

    fn look_for_gap(&self, resume: &mut Resume, started_before: bool) {
        let from = resume.position.seq + 1;
        let first = self.source.state.first_seq;
        let anew = resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. }));
        let known = started_before || resume.target.is_some();
        if !known || anew || first <= from || !is_plain(self.replication, self.source) {
            return;
        }
        let to = first - 1;
        let messages = first - from - resume.already.within(from, to);
        if messages > 0 {
            resume.findings.push(Event::Gap { from, to, messages });
        }
        // Reported once: the next start is after it.
        resume.position = SourcePoint { seq: to, time_ns: None };
        resume.already.forget_to(to);
    }

    /// Where a first start begins.
    async fn configured_start(&mut self) -> Result<SourcePoint, Error> {
        // Messages that were removed before a first start are no gap.
        let gone = self.source.state.first_seq.saturating_sub(1);
        let after = match &self.replication.start {
            Start::All => gone,
            Start::AtEnd => self.source.state.last_seq,
            Start::Sequence(first) => first.saturating_sub(1).max(gone),
            Start::Time(time) => self.before_time(*time).await?,
            Start::Delta(delta) => self.before_time(self.clock.ago(Instant::now(), *delta)).await?,
        };
        self.point_at(after).await
    }

    async fn before_time(&mut self, time: chrono::DateTime<Utc>) -> Result<u64, Error> {
        let stream = &self.replication.source.stream;
        locate::before_time(self.source_lane, stream, self.source, self.source_names, time).await
    }

    async fn point_at(&mut self, seq: u64) -> Result<SourcePoint, Error> {
        if let Some(time_ns) = self.read.source.get(&seq) {
            return Ok(SourcePoint { seq, time_ns: *time_ns });
        }
        let stream = &self.replication.source.stream;
        let point = locate::point_at(self.source_lane, stream, self.source, self.source_names, seq).await?;
        self.read.source.insert(seq, point.time_ns);
        Ok(point)
    }

    /// The message at a sequence of the target, without its payload.
    async fn at_target(&mut self, seq: u64) -> Result<Option<StoredMessage>, Error> {
        if let Some((_, message)) = self.read.target.as_ref().filter(|(read, _)| *read == seq) {
            return Ok(message.clone());
        }
        let stream = &self.replication.target.stream;
        let message = locate::message_at(self.target_lane, stream, self.target, self.target_names, seq).await?;
        self.read.target = Some((seq, message.clone()));
        Ok(message)
    }

    /// Why the source is not the stream of the saved position; `None` if it is.
    async fn source_contradicts(&mut self, saved: &SourceWitness) -> Result<Option<String>, Error> {
        let state = &self.source.state;
        let (first, last) = (state.first_seq, state.last_seq);
        let not_reached = saved.time_ns.is_none()
            && matches!(self.replication.start, Start::Sequence(start) if start == saved.seq + 1);
        if saved.seq == 0 || not_reached {
            return Ok(None);
        }
        if saved.seq > last {
            return Ok(Some(format!("its last sequence is {last}, below the saved {}", saved.seq)));
        }
        let same_hint = saved.created == self.source.created;
        let found = self.point_at(saved.seq).await?.time_ns;
        let holds = match (found, saved.time_ns) {
            (Some(found), Some(saved)) => found == saved,
            // A message that was stored since it had none.
            (Some(found), None) if saved.none_at.is_some_and(|none_at| found > nanos(none_at)) => false,
            (Some(_), None) => same_hint,
            // No message is left that could contradict. If the stream's creation time differs, it is another one.
            (None, _) if saved.seq < first => same_hint || saved.created.is_empty(),
            (None, Some(time_ns)) => !self.has_later_below(saved.seq, time_ns).await?,
            (None, None) => {
                let later = match saved.none_at {
                    Some(none_at) => self.has_later_below(saved.seq, nanos(none_at)).await?,
                    None => false,
                };
                !later && (same_hint || self.newest_known(Proof::Message).await?.tail.is_some())
            }
        };
        Ok((!holds).then(|| format!("another message is at the saved sequence {} or before it", saved.seq)))
    }

    /// Whether a message at or below a sequence was stored later than the message at that sequence: impossible in one
    /// stream, unless the source's clock was set back after that. Then the newest message is older than it, too.
    async fn has_later_below(&mut self, seq: u64, time_ns: i64) -> Result<bool, Error> {
        let time = chrono::DateTime::from_timestamp_nanos(time_ns.saturating_add(1));
        let before = self.before_time(time).await?;
        if before >= seq {
            return Ok(false);
        }
        let later = self.point_at(before + 1).await?.time_ns;
        let newest = match self.point_at(self.source.state.last_seq).await?.time_ns {
            Some(newest) => Some(newest),
            // It was acknowledged or deleted.
            None => {
                let stream = &self.replication.source.stream;
                locate::newest_time(self.source_lane, stream, &self.source.state).await?
            }
        };
        if later.zip(newest).is_none_or(|(later, newest)| newest >= later) {
            return Ok(true);
        }
        self.has_acknowledged().await
    }

    /// Whether a work queue has messages that this replication acknowledged and it removed: they are others, which took the
    /// sequences of lost ones.
    async fn has_acknowledged(&mut self) -> Result<bool, Error> {
        let Some(durable) = self.durable.filter(|_| self.source.text("retention") == "workqueue") else {
            return Ok(false);
        };
        let (stream, filters) = (&self.replication.source.stream, self.replication.scope.filters());
        let everything = [">".to_owned()];
        for filter in if filters.is_empty() { &everything } else { filters } {
            let first = Api::new(self.source_lane).message_of(stream, filter, 1).await?;
            if first.is_some_and(|first| first.sequence <= durable.floor(self.source)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The source reports that it lost messages that were copied, up to a sequence: that counts if its leader reports the
    /// same again later. A leader that has just taken over may answer from fewer messages than it has. Single messages
    /// that were read are read again, too.
    ///
    /// A durable consumer that is ahead of its stream is a second witness, and waiting is a risk: when any other consumer
    /// of an interest stream ends, servers before 2.14 remove the new messages up to the ack floor of this one.
    async fn ask_source_again(&mut self, copied: u64) -> Result<(), Error> {
        if self.durable.is_some_and(|durable| durable.is_ahead(self.source)) {
            return Ok(());
        }
        sleep(SURE_AFTER).await;
        let now = Api::new(self.source_lane).stream_info(&self.replication.source.stream).await?;
        let before = &self.source.state;
        let is_short = |last: u64| last < copied;
        let agrees = |now: StreamInfo| {
            let last = now.state.last_seq;
            now.created == self.source.created && last >= before.last_seq && is_short(last) == is_short(before.last_seq)
        };
        if !now.is_some_and(agrees) {
            return Err(contradicts_itself());
        }
        for (seq, time_ns) in std::mem::take(&mut self.read.source) {
            if self.point_at(seq).await?.time_ns != time_ns {
                return Err(contradicts_itself());
            }
        }
        Ok(())
    }

    async fn witness(&mut self, origin: MessageOrigin) -> Result<Witness, Error> {
        if origin.seq > self.source.state.last_seq {
            return Ok(Witness::Broken);
        }
        Ok(match self.point_at(origin.seq).await?.time_ns {
            Some(time_ns) if time_ns.div_euclid(1_000_000) == origin.time_ms => Witness::Holds,
            Some(_) => Witness::Broken,
            None if origin.seq < self.source.state.first_seq => Witness::Gone,
            None => {
                let end_of_ms = origin.time_ms.saturating_mul(1_000_000).saturating_add(999_999);
                if self.has_later_below(origin.seq, end_of_ms).await? { Witness::Broken } else { Witness::Gone }
            }
        })
    }

    async fn ours_at(&mut self, sequence: u64) -> Result<Option<Ours>, Error> {
        let message = self.at_target(sequence).await?;
        Ok(message.and_then(|message| ours(self.tag, sequence, &message.header, None)))
    }

    /// The provenance headers of the newest message of the target; `None` for an empty target.
    async fn stamps_at_end(&mut self) -> Result<Option<Stamps>, Error> {
        let last = self.target.state.last_seq;
        if last == 0 {
            return Ok(None);
        }
        let message = self.at_target(last).await?;
        let ours = message.filter(|message| self.tag.origin(&message.header).is_some());
        let chained = ours.is_some_and(|message| headers::last(&message.header, CHAIN).is_some());
        Ok(Some(if chained { Stamps::Chain } else { Stamps::Ids }))
    }

    /// Copies of messages that this source still has, made under another site name, are no reason to copy them again:
    /// returns an error with the remedy. Checks the newest messages of the target.
    async fn no_other_site(&mut self) -> Result<(), Error> {
        let (first, last) = (self.target.state.first_seq.max(1), self.target.state.last_seq);
        let from = last.saturating_sub(SEARCH_STEP - 1).max(first);
        let mut seen = RangeFindings { others: Some(Vec::new()), ..RangeFindings::default() };
        if last >= from {
            self.between(from, last, &mut seen).await?;
        }
        let mut others = seen.others.unwrap_or_default();
        let Some(theirs) = others.last().map(|other| other.site.clone()) else { return Ok(()) };
        others.retain(|other| other.site == theirs);
        // Where many sites write to one target, single messages may agree by chance.
        let times = self.source_times(others.iter().map(|other| other.origin.seq)).await?;
        let end = self.source.state.last_seq;
        let of = |origin: &MessageOrigin| times.get(&origin.seq).map(|time| *time == origin.time_ms);
        let same = others.iter().filter(|other| of(&other.origin) == Some(true)).count();
        let broken = |other: &&OtherSiteCopy| of(&other.origin) == Some(false) || other.origin.seq > end;
        if same <= others.iter().filter(broken).count() {
            return Ok(());
        }
        let (ours, name) = (self.tag.site(), &self.replication.target.stream);
        Err(Error::hold(format!(
            "two sites write one target: the newest copies in target stream `{name}` were made by site `{theirs}` from this very \
             source, and this is site `{ours}`: stop the copy of one of them; if `{theirs}` is a former name of this site, stop all \
             of its instances and run `stream-replicator site rename {theirs} {ours}`"
        )))
    }
}

/// The newest of these messages, up to this one, before which the target has no copies of messages after the position: a later
/// run looks for such copies only after it.
fn target_before(ours: &[Ours], newest: usize, position: u64) -> Option<TargetPoint> {
    let earlier = ours[..newest].iter().position(|message| message.origin.seq > position);
    earlier.unwrap_or(newest + 1).checked_sub(1).map(|index| ours[index].point())
}

fn nanos(time: chrono::DateTime<Utc>) -> i64 {
    time.timestamp_nanos_opt().unwrap_or(i64::MAX)
}

fn contradicts_itself() -> Error {
    Error::retry("the source gave two answers about what was copied that do not agree")
}

fn ours(tag: &Tag, target_seq: u64, header: &[u8], subject: Option<&[u8]>) -> Option<Ours> {
    let origin = tag.origin(header)?;
    Some(Ours { origin, target_seq, complete: is_complete(header), subject: subject.map(Box::from), confirmed: false })
}

/// Whether a message of ours proves that all before it are there.
fn is_complete(header: &[u8]) -> bool {
    headers::last(header, CHAIN).is_some() || headers::last(header, ID).is_none()
}

/// Whether messages are removed from a stream when they are consumed.
pub(super) fn is_consumed(stream: &StreamInfo) -> bool {
    !limits(stream)
}

/// Whether every missing sequence of the source is a loss: no filter, no limit per subject, and no
/// consumers that remove messages. Excluded subjects are read, but a removed message has no subject: it counts as lost.
pub(super) fn is_plain(replication: &Replication, source: &StreamInfo) -> bool {
    limits(source) && !replication.scope.is_filtered() && source.number("max_msgs_per_subject") <= 0
}

#[cfg(test)]
mod tests {
    use nats_lane::pipe;
    use serde_json::json;

    use super::*;
    use crate::{config, copy::source::clock::ClockReading};

    /// Last sequences that the source reports: first to the run, then to its repeated request.
    async fn resumed(first: u64, second: u64) -> Result<Resume, Error> {
        let state = |last: u64| json!({"messages": last, "first_seq": 1, "last_seq": last});
        let info = |last: u64| json!({"config": {}, "created": "c", "state": state(last)});
        let document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        let replication = config::parse_value(&document, "SITE").unwrap();
        let ((mut source_lane, mut source_end), (mut target_lane, _end)) = (pipe::lane().await, pipe::lane().await);
        let stream = |last: u64| -> StreamInfo { serde_json::from_value(info(last)).unwrap() };
        let (source, target) = (stream(first), stream(0));
        let now = Instant::now();
        let clock = SourceClock::new(&ClockReading { sent: now, received: now, server: None, local: Utc::now() });
        let record = PositionRecord {
            source: Some(SourceWitness { seq: 9, time_ns: Some(5), none_at: None, created: "c".to_owned() }),
            ..PositionRecord::new()
        };
        let sides = Sides {
            replication: &replication,
            tag: &Tag::new("S", "SITE", "w"),
            source_lane: &mut source_lane,
            target_lane: &mut target_lane,
            source_names: &mut Names::new("sr"),
            target_names: &mut Names::new("sr"),
            source: &source,
            clock,
            target: &target,
            durable: None,
            acked: None,
            chain_broke_after: None,
            orphans: None,
            read: ReadMessages::default(),
            most_in_flight: 0,
        };
        let answer = async {
            loop {
                let asked = source_end.asked().await;
                assert!(asked.subject.contains("STREAM.INFO.S"), "{}", asked.subject);
                source_end.answer(&asked, &info(second).to_string()).await;
            }
        };
        tokio::select! {
            resumed = find(sides, &record, TargetMode::Exclusive) => resumed,
            () = answer => unreachable!(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_is_reset_only_if_two_answers_say_so() {
        let began = Instant::now();
        let resume = resumed(4, 4).await.unwrap();
        assert!(began.elapsed() >= SURE_AFTER);
        assert!(matches!(resume.findings[..], [Event::SourceReset { saved: 9, .. }]), "{:?}", resume.findings);
        for second in [9, 3] {
            let error = resumed(4, second).await.expect_err("two answers that do not agree");
            assert!(error.message.contains("do not agree"), "{second}: {error}");
        }
    }
}
