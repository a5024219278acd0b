//! The loop of a feed: one task, one owner of three connections. Whatever fails ends it, and the next run begins with a
//! target that asks again.

mod message;
mod refused;
mod resume;
mod room;
mod sampling;
mod states;
mod status;

use std::{future::poll_fn, task::Poll};

use nats_lane::{Batch, Lane, Turn, entropy, jetstream::StreamInfo, leafnode::Leaf};
use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::{
    message::{count, skipped, splits_at_last},
    refused::{Judging, RefusalVerdict, Refusals},
    room::{TargetRoom, refuses_late},
    sampling::{note, replays, sampled_out},
    states::{FeedStates, FullTarget},
};
use super::{
    FeedSubjects,
    headers::without_ids,
    leaves::{LeafKey, LeafTurn, Leaves},
    open::OpenedFeed,
    request::{self, ConsumerRequest, Unserved},
    session::{FedPoint, FeedSession, poke},
    window::{Amount, FeedWindow},
};
use crate::{
    config::{NativeKind, Replication, Scope},
    copy::{
        Error, ErrorKind, ErrorSide, Job, LoginWatch, PositionWriter, ReturnedMessages,
        sampling_driver::SamplingDriver,
        source::{
            clock::SourceClock,
            consumers::Names,
            durable::{Durable, Owner},
            intake::Intake,
            retention::PollHistory,
        },
    },
    events::{Event, Events},
    status::{CopyStatus, State},
    store::{SaveError, TargetWitness},
};

/// How often the status is brought up to date.
const TICK: Duration = Duration::from_millis(250);
/// How often the target gets a heartbeat: as often as a mirror asks for in its consumer.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often both streams are asked for their state.
const INFO_EVERY: Duration = Duration::from_secs(10);
/// Pause before they are asked again after an answer that does not count.
const ASKED_AGAIN: Duration = Duration::from_secs(1);
/// How often a target that waits for an old consumer gets a heartbeat that contradicts it: it asks once in 2 s at most.
const POKE_EVERY: Duration = Duration::from_secs(2);
/// A replicated target that has not asked after this time gets another leader, which asks.
const STEPDOWN_AFTER: Duration = Duration::from_secs(3);
/// After this time without a request of the target, the status reports that.
const UNASKED: Duration = Duration::from_secs(5);
/// How long a request of a replicated stream for a source waits for a newer one. A new leader knows after up to 0.6 s
/// what the stream holds; before that a leafnode connection has it ask from the beginning, and what it stored of that would
/// stay when it asks again (nats-server 2.15, `subscribeToStream` and `retryDisconnectedSyncConsumers`).
const NEWEST_AFTER: Duration = Duration::from_secs(1);
/// A target that was given a consumer and does not listen to it after this time will ask again.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
/// How long a target may store none of the delivered messages until the run ends.
const STORES_WITHIN: Duration = Duration::from_secs(60);
/// After this time without an answer of a target that has been given everything, it is made to ask again: one that refuses a message
/// does that by itself only when the next one arrives.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// The same for a target with replicas.
const REPLICATED_ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// The number of requests for the same message, delivered each time, that mean that the target refuses it.
const REFUSED: u32 = 3;
/// Bytes that wait in our buffer for the target's connection before no more are added.
const UNWRITTEN: usize = 1 << 20;
/// How long the last save may take.
const LAST_SAVE: Duration = Duration::from_secs(2);
/// Deadline for what is written to the target then.
const LAST_WRITE: Duration = Duration::from_millis(500);

/// When something is due.
#[derive(Debug)]
struct FeedTimes {
    tick: Instant,
    heartbeat: Instant,
    info: Instant,
    poke: Instant,
    /// Since when the target has no consumer, or does not listen to it.
    waits: Instant,
    /// When the target last processed messages, or had none to process.
    stored: Instant,
}

impl FeedTimes {
    fn new(now: Instant) -> Self {
        Self { tick: now, heartbeat: now, info: now + INFO_EVERY, poke: now, waits: now, stored: now }
    }
}

/// How a feed ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FeedEnd {
    /// By request.
    Stopped,
    /// A login is about to end, and the files have a newer one.
    LogsInAgain,
}

/// What was saved of a feed.
#[derive(Debug, Clone, Default)]
struct SavedFeed {
    point: Option<FedPoint>,
    /// The target as it was then.
    target: Option<TargetWitness>,
}

impl SavedFeed {
    fn of(positions: &PositionWriter) -> Self {
        let record = positions.record();
        let point = record.source.as_ref().map(|saved| FedPoint { seq: saved.seq, time_ns: saved.time_ns });
        Self { point, target: record.target.clone() }
    }

    /// The position, if the target stream is the one that it is about, and has not lost its end.
    fn at(&self, target: &StreamInfo) -> Option<FedPoint> {
        let same = |saved: &&TargetWitness| saved.created == target.created && saved.seq <= target.state.last_seq;
        self.target.as_ref().filter(same).and(self.point)
    }
}

/// A consumer that the target was given, and what it is fed from.
struct Served {
    session: FeedSession,
    /// The connection over which it is fed.
    leaf: LeafKey,
    reader: Intake,
    /// The newest message that was read: delivered, or out of scope.
    read: FedPoint,
    /// The reader is one of the stream that the target was compared with: the source said so after it was opened.
    is_of_compared: bool,
    sampler: Option<SamplingDriver>,
}

/// A running feed.
pub(super) struct Feed<'a> {
    job: &'a Job,
    kind: NativeKind,
    status: &'a watch::Sender<(State, CopyStatus)>,
    events: &'a Events,
    subjects: FeedSubjects,
    source: Lane,
    names: Names,
    source_info: StreamInfo,
    /// Polls of the source's state, for the headroom.
    polls: PollHistory,
    clock: SourceClock,
    target: Lane,
    target_info: StreamInfo,
    leaves: Leaves,
    /// The newest request, over which connection it came first, and when it is served.
    request: Option<(ConsumerRequest, LeafKey, Instant)>,
    session: Option<Served>,
    /// Up to where the target can hold what this run gave it.
    given: Option<u64>,
    /// Recognises messages that came from the target.
    returned: ReturnedMessages,
    /// The target cannot store a subject with `@`.
    splits_at_last: bool,
    /// Message ids are renamed.
    renames_ids: bool,
    refusals: Refusals,
    /// The target is full: it is given nothing until it has room.
    full: Option<FullTarget>,
    /// What a target may be given that refuses new messages at a limit, and must be given no more.
    target_room: Option<TargetRoom>,
    /// Generation of the position record, for dead letters.
    generation: u64,
    states: FeedStates,
    /// Everything up to here is stored at the target.
    position: FedPoint,
    /// The position is one of this source: the target was compared with it.
    compared: bool,
    copy: CopyStatus,
    state: State,
    times: FeedTimes,
    logins: LoginWatch,
    stepped_down: bool,
    reply: Vec<u8>,
    /// Room for a subject and a header.
    room: (Vec<u8>, Vec<u8>),
}

impl<'a> Feed<'a> {
    pub fn new(
        job: &'a Job,
        opened: OpenedFeed,
        status: &'a watch::Sender<(State, CopyStatus)>,
        events: &'a Events,
    ) -> Self {
        let OpenedFeed { kind, subjects, source, names, source_info, clock, target, target_info, leaves } = opened;
        let (state, mut copy) = status.borrow().clone();
        let samples = job.replication.sampling.is_some();
        copy.sampling = samples.then(|| copy.sampling.take().unwrap_or_default());
        let state = if matches!(state, State::Retrying | State::Held) { state } else { State::Starting };
        let now = Instant::now();
        let seq = if kind == NativeKind::Mirror { target_info.state.last_seq } else { 0 };
        let position = FedPoint { seq, time_ns: None };
        let renames_ids = kind == NativeKind::Source;
        let error = copy.last_error.as_ref().filter(|error| error.source_seq == job.skip.map(|skip| skip.seq));
        let why = error.map(|error| error.message.clone());
        let splits_at_last = leaves.versions().any(splits_at_last);
        Self {
            job,
            kind,
            status,
            events,
            subjects,
            source,
            names,
            source_info,
            polls: PollHistory::default(),
            clock,
            target,
            target_info,
            leaves,
            request: None,
            session: None,
            given: None,
            returned: ReturnedMessages::default(),
            splits_at_last,
            renames_ids,
            refusals: Refusals::of(job.skip, why),
            full: None,
            target_room: None,
            generation: 0,
            states: FeedStates::new(now),
            position,
            compared: false,
            copy,
            state,
            times: FeedTimes::new(now),
            logins: LoginWatch::default(),
            stepped_down: false,
            reply: Vec::new(),
            room: Default::default(),
        }
    }

    /// Until the stop, or the first error.
    pub async fn run(mut self, positions: &mut PositionWriter, stop: &CancellationToken) -> Result<FeedEnd, Error> {
        if let Some(saved) = SavedFeed::of(positions).point
            && (self.kind == NativeKind::Source || saved.seq == self.position.seq)
        {
            self.position = saved;
        }
        if self.kind == NativeKind::Source {
            let (job, created) = (self.job, &self.target_info.created);
            let protection = job.replication.loop_protection.as_ref();
            let remembered = positions.record().from_target.as_ref();
            self.returned = ReturnedMessages::new(protection, &job.ways_back, remembered, created);
            // What this feed gave to the target goes no further.
            self.returned.add(job.replication.origin_tags(&job.site));
            positions.knows_from_target(self.returned.remembered(created)).await?;
        }
        self.generation = positions.record().generation;
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => Ok(FeedEnd::Stopped),
            result = self.feed(positions) => result,
        };
        if result.as_ref().is_err_and(|error| error.kind == ErrorKind::Superseded) {
            return result;
        }
        // A target whose request is not answered asks again only after half a minute.
        self.leaves.flush(LAST_WRITE).await;
        self.finish_sampling(positions.reads_after()).await;
        let last = timeout(LAST_SAVE, positions.save_fed_now(&self.fed(), self.row())).await;
        match last {
            Ok(Err(conflict @ SaveError::Conflict { .. })) => Err(conflict.into()),
            // The target knows how far it has come, whatever was saved.
            _ => result,
        }
    }

    async fn feed(&mut self, positions: &mut PositionWriter) -> Result<FeedEnd, Error> {
        self.check_source(&SavedFeed::of(positions)).await?;
        loop {
            let now = Instant::now();
            if let Some((asked, over, _)) = self.request.take_if(|(.., at)| now >= *at) {
                self.begin(asked, over, positions).await?;
            }
            self.deliver(now)?;
            self.ask_target_where_due(now);
            self.acknowledge();
            self.sample(now, positions.reads_after());
            if now >= self.times.tick {
                self.tick(now, positions)?;
                if self.has_newer_login(now) {
                    return Ok(FeedEnd::LogsInAgain);
                }
            }
            let (reads, wakes) = (self.may_read(), self.wakes(now));
            let asked = tokio::select! {
                biased;
                saved = poll_fn(|cx| positions.poll(cx)) => {
                    self.saved(saved)?;
                    None
                }
                moved = poll_fn(|cx| match &mut self.session {
                    Some(Served { sampler: Some(sampler), .. }) => sampler.poll(cx),
                    _ => Poll::Pending,
                }) => {
                    self.sampled(moved);
                    None
                }
                turn = self.leaves.turn() => match turn? {
                    LeafTurn::Received(over, batch) => self.hear_target(over, &batch).map(|asked| (asked, over)),
                    LeafTurn::Flushed => None,
                    LeafTurn::Lost(lost) => {
                        self.lost(lost);
                        None
                    }
                },
                turn = self.source.turn(), if reads => {
                    if let Turn::Received(batch) = turn.map_err(Error::of_source)? {
                        self.hear_source(batch)?;
                    }
                    None
                }
                turn = self.target.turn() => {
                    if let Turn::Received(batch) = turn.map_err(Error::of_target)? {
                        self.hear_target_state(&batch)?;
                    }
                    None
                }
                () = sleep_until(wakes) => None,
            };
            if let Some((asked, over)) = asked {
                self.take_request(asked, over).await?;
            }
        }
    }

    /// Keeps the newest request until it is served; an error if it cannot be.
    async fn take_request(&mut self, asked: Result<ConsumerRequest, Unserved>, over: LeafKey) -> Result<(), Error> {
        match asked {
            Ok(asked) => self.request = Some((asked, over, Instant::now() + self.newest_after())),
            Err(Unserved { reply, why }) => {
                let stream = &self.job.replication.target.stream;
                let error = held(format!("target stream `{stream}` cannot be fed: {why}"));
                return Err(self.refuse(&reply, over, error).await);
            }
        }
        Ok(())
    }

    /// How long a request waits for a newer one.
    fn newest_after(&self) -> Duration {
        let replicated = self.target_info.number("num_replicas") > 1;
        if self.kind == NativeKind::Source && replicated { NEWEST_AFTER } else { Duration::ZERO }
    }

    /// Whether the source's lane is to be read: also beyond the bound of the reader, where nothing is delivered before an answer.
    fn may_read(&mut self) -> bool {
        let awaits_letter = self.refusals.awaits_letter();
        let Some(served) = &mut self.session else { return true };
        !served.is_of_compared || awaits_letter || served.reader.may_read(&self.job.budget)
    }

    fn wakes(&self, now: Instant) -> Instant {
        let serves = self.request.as_ref().map(|(.., at)| *at);
        serves.into_iter().chain(self.asks_target_at(now)).fold(self.times.tick, Instant::min)
    }

    /// Handles messages of a leafnode connection; returns the newest request for a consumer, which is still to be served.
    fn hear_target(&mut self, over: LeafKey, batch: &Batch) -> Option<Result<ConsumerRequest, Unserved>> {
        let (api, mut newest) = (self.subjects.api(), None);
        for message in batch.iter() {
            match request::read(&api, message.subject, message.reply, message.payload) {
                // Each server passes it on to its leafnode connection.
                Some(asked) => {
                    if self.leaves.is_new(&String::from_utf8_lossy(message.reply), over) {
                        newest = Some(asked);
                    }
                }
                None => self.settle(message.subject, message.header),
            }
        }
        // After the answers, which may be for a consumer that ends in the same batch.
        let prefix = format!("{}.", self.subjects.deliver());
        for (subject, begins) in self.leaves.hear(over, &prefix) {
            let Some(served) = self.session.as_mut().filter(|served| served.leaf == over) else { continue };
            if served.session.hear(&subject, begins) && !begins {
                debug!(replication = self.job.replication.id, "the target has ended its consumer");
                self.end_session();
            }
        }
        newest
    }

    /// A connection of several was lost. A consumer that was fed over it ends, and over the others the target is made to ask for
    /// the next one.
    fn lost(&mut self, lost: LeafKey) {
        if self.session.as_ref().is_some_and(|served| served.leaf == lost) {
            debug!(replication = self.job.replication.id, "feeding over another leafnode connection");
            self.end_session();
            // What was on its way is no message that the target refused.
            self.refusals.forget();
            let now = Instant::now();
            (self.times.poke, self.times.tick) = (now, now);
        }
    }

    /// Answers that the request is not served, and why: the target shows that in `mirror.error` of its stream.
    async fn refuse(&mut self, reply: &str, over: LeafKey, error: Error) -> Error {
        let refusal = request::refusal(&error.message);
        self.leaves.leaf(over).send(reply.as_bytes(), b"", b"", refusal.as_bytes());
        self.leaves.flush(LAST_SAVE).await;
        error
    }

    /// A message of the target on a subject that is no request: perhaps a flow control answer.
    fn settle(&mut self, subject: &[u8], header: &[u8]) {
        let Some(served) = &mut self.session else { return self.refusals.hear(subject) };
        let now = Instant::now();
        let Some(processed) = served.session.answered(subject, header, now) else { return };
        self.times.stored = now;
        if !self.is_proven()
            && let Some((amount, last)) = self.session.as_mut().and_then(|served| served.session.holds(processed.seq))
        {
            self.stored(amount, last);
        }
    }

    /// Whether what the target has processed counts as stored only once it is seen to hold it: where the source removes what is
    /// acknowledged, and where the target may still refuse it. Otherwise the source keeps it, and a target with sources asks again for
    /// what it lacks.
    fn is_proven(&self) -> bool {
        let is_mirror = self.kind == NativeKind::Mirror;
        is_mirror || Durable::is_needed(&self.source_info) || refuses_late(&self.target_info)
    }

    /// The target holds so much more, up to this message.
    fn stored(&mut self, amount: Amount, last: FedPoint) {
        self.position = last;
        self.copy.counters.copied += amount.messages;
        self.copy.counters.copied_bytes += amount.bytes;
        self.copy.metered.copied_payload += amount.payload;
        self.refusals.stored(last.seq);
    }

    /// Acknowledges at the source what is stored at the target, where the source asks for that. Where everything that was
    /// delivered is stored, what was read after it and is out of scope is settled too.
    fn acknowledge(&mut self) {
        let Some(served) = &mut self.session else { return };
        let (read, settled) = (served.read, served.session.is_settled());
        if settled && read.seq > self.position.seq && !self.keeps_request(read.seq) {
            self.position = read;
        }
        let Some(served) = &mut self.session else { return };
        let (position, now) = (self.position.seq, Instant::now());
        let forgettable = served.sampler.as_ref().map_or(position, |sampler| sampler.may_forget(position, now));
        served.reader.settled(&mut self.source, forgettable);
    }

    fn end_session(&mut self) {
        if let Some(Served { session, reader, .. }) = self.session.take() {
            reader.close(&mut self.source);
            if session.delivered() > 0 {
                self.refusals.ended(session.is_taken(), session.answers());
            }
            self.given = self.given.max(Some(session.last().seq));
        }
        let now = Instant::now();
        // Perhaps the source was removed from the target.
        (self.times.waits, self.times.info) = (now, now);
    }

    /// Serves a request: checks whether the target may continue, opens the reader and answers.
    async fn begin(
        &mut self,
        asked: ConsumerRequest,
        over: LeafKey,
        positions: &mut PositionWriter,
    ) -> Result<(), Error> {
        let Some(asked) = self.located(asked).await? else { return Ok(()) };
        self.end_session();
        if let Err(error) = self.count_refusal(&asked).await {
            return Err(self.refuse(&asked.reply, over, error).await);
        }
        let opened = async {
            // What it has stored since it was asked takes room too.
            self.read_target().await?;
            let replication = self.scoped(&asked)?;
            let before = self.before(&asked, &SavedFeed::of(positions)).await?;
            let (sampler, from) = self.begin_sampling(before, positions).await?;
            Ok::<_, Error>((before, self.open_reader(&replication, from, positions).await?, sampler))
        };
        let (before, reader, sampler) = match opened.await {
            Ok(opened) => opened,
            Err(error) if error.kind == ErrorKind::Hold => return Err(self.refuse(&asked.reply, over, error).await),
            Err(error) => return Err(error),
        };
        let leader = self.target_info.cluster.as_ref().map(|cluster| cluster.leader.as_str());
        let over = self.leaves.nearest(leader, &asked.reply, over);
        let limits = &self.job.replication.limits;
        let consumer = format!("SR{}", entropy::name());
        let own = format!("{}.{consumer}", self.subjects.deliver());
        let subject = if asked.takes_subject { own.clone() } else { asked.deliver.clone() };
        let bound =
            Amount { messages: limits.messages_in_flight as u64, bytes: limits.bytes_in_flight as u64, payload: 0 };
        let window = FeedWindow::new(bound, self.leaves.leaf(over).login_took());
        let answer = asked.answer(&consumer, &subject, before.seq, reader.pending());
        let deliver = [own, asked.deliver];
        let stream = &self.job.replication.source.stream;
        let mut session = FeedSession::new(stream, consumer, deliver, &self.subjects.flow(), before, window);
        for subject in self.leaves.listens(over) {
            session.hear(subject, true);
        }
        self.leaves.leaf(over).send(asked.reply.as_bytes(), b"", b"", answer.as_bytes());
        info!(replication = self.job.replication.id, after = before.seq, "the target asked for messages");
        let now = Instant::now();
        (self.times.waits, self.times.stored, self.times.heartbeat) = (now, now, now + HEARTBEAT);
        (self.position, self.compared) = (before, true);
        self.given = self.given.max(Some(before.seq));
        let is_of_compared = false;
        self.session = Some(Served { session, leaf: over, reader, read: before, is_of_compared, sampler });
        self.copy.metered.consumers += 1;
        // Asked without waiting: a durable consumer delivers already.
        self.ask_states(now);
        Ok(())
    }

    /// The replication with the subjects that the target's configuration names, where the document names none.
    fn scoped(&self, asked: &ConsumerRequest) -> Result<Replication, Error> {
        let mut replication = self.job.replication.clone();
        let filters = replication.scope.filters();
        if asked.filters.is_empty() || asked.filters == filters {
            return Ok(replication);
        }
        if !filters.is_empty() {
            return Err(held(format!(
                "target stream `{}` asks for {:?} only, and the document has the filters {filters:?}: remove one of the two",
                replication.target.stream, asked.filters
            )));
        }
        let excluded = replication.scope.excluded().to_vec();
        replication.scope = Scope::new(asked.filters.clone(), excluded);
        Ok(replication)
    }

    /// Reads the source after a sequence; one that removes acknowledged messages, through a durable consumer.
    async fn open_reader(
        &mut self,
        replication: &Replication,
        after: u64,
        positions: &mut PositionWriter,
    ) -> Result<Intake, Error> {
        let of_source = Error::of_source;
        let (lane, info) = (&mut self.source, &self.source_info);
        let installation = positions.record().installation.as_ref().unwrap_or(&self.job.installation).clone();
        let owner = Owner { site: &self.job.site, installation: &installation };
        let mut durable = None;
        if Durable::is_needed(info) {
            positions.uses_durable(&installation).await?;
            if let Some(found) = Durable::find(lane, replication, owner).await.map_err(of_source)? {
                durable = found.unless_ahead(lane, replication, info, after, false).await.map_err(of_source)?;
            }
        }
        Intake::open(lane, replication, owner, info, durable, &mut self.names, after).await.map_err(of_source)
    }

    /// Reports messages that the source removed before they were mirrored.
    fn report_gap(&mut self, last: u64) {
        let first = self.source_info.state.first_seq;
        // What is acknowledged is removed, and what is out of scope is not missed.
        let Replication { scope, max_age, .. } = &self.job.replication;
        let plain = !Durable::is_needed(&self.source_info) && scope.is_whole() && max_age.is_none();
        if plain && first > last + 1 {
            let (from, to) = (last + 1, first - 1);
            let gap = Event::Gap { from, to, messages: to - last };
            warn!(replication = self.job.replication.id, ?gap, "found");
            self.copy.counters.gap_messages += to - last;
            self.events.emit(gap, &self.job.replication.id);
        }
    }

    /// Messages that were stored before this time (nanoseconds since the Unix epoch) are too old.
    fn oldest_fed(&self, now: Instant) -> Option<i64> {
        let age = i64::try_from(self.job.replication.max_age?.as_nanos()).unwrap_or(i64::MAX);
        Some(self.clock.now_ns(now).saturating_sub(age))
    }

    /// Delivers messages that were read, as far as the window allows, and requests more.
    fn deliver(&mut self, now: Instant) -> Result<(), Error> {
        // Before the messages that were read, as in a copy.
        self.returned.update();
        let Some(Served { session, leaf, reader, is_of_compared, .. }) = &mut self.session else { return Ok(()) };
        let leaf = self.leaves.leaf(*leaf);
        reader.pull(&mut self.source, &self.job.budget, leaf.unwritten() < UNWRITTEN);
        let Some(subject) = session.subject().filter(|_| *is_of_compared).map(str::to_owned) else { return Ok(()) };
        if session.is_processed() {
            self.times.stored = now;
        }
        if self.full.is_none()
            && let Some(bytes) = self.give(subject.as_bytes(), now)?
        {
            self.lacks_room_for(bytes);
        }
        Ok(())
    }

    /// Gives what was read to a target that listens on a subject; the bytes of the message that a mirror has no room for, if it holds
    /// everything before it.
    fn give(&mut self, subject: &[u8], now: Instant) -> Result<Option<usize>, Error> {
        let oldest = self.oldest_fed(now);
        let Some(Served { session, leaf, reader, read, sampler, .. }) = &mut self.session else { return Ok(None) };
        let leaf = self.leaves.leaf(*leaf);
        let (mapping, scope) = (&self.job.replication.mapping, &self.job.replication.scope);
        let (job, events, splits_at_last, generation) = (self.job, self.events, self.splits_at_last, self.generation);
        let largest = usize::try_from(self.target_info.number("max_msg_size")).ok().filter(|largest| *largest > 0);
        let judging = Judging { job, events, largest, as_of: self.states.as_of(), splits_at_last, generation, now };
        let (mut waits, mut lacks) = (false, None);
        while !session.is_full() && leaf.unwritten() < UNWRITTEN {
            let Some(incoming) = reader.peek() else { break };
            let (delivery, message, size) = (incoming.delivery, incoming.message, incoming.size());
            let skipped = skipped((message.subject, message.header, delivery.time_ns), oldest, scope, &self.returned);
            if replays(sampler.as_mut(), &incoming, skipped) {
                reader.take();
                continue;
            }
            let skipped = skipped.or_else(|| sampled_out(sampler.as_mut(), &incoming));
            let mapped = mapping.apply(message.subject, &mut self.room.0);
            let verdict = match skipped {
                None => self.refusals.judge(&judging, session.is_settled(), &mut self.source, &incoming, mapped)?,
                Some(why) => RefusalVerdict::Omit(why),
            };
            waits = verdict == RefusalVerdict::Wait;
            if waits {
                break;
            }
            let skipped = verdict.skipped();
            let bytes = incoming.bytes();
            if skipped.is_none() && self.target_room.as_mut().is_some_and(|room| !room.take(bytes)) {
                (waits, lacks) = (true, session.is_settled().then_some(bytes));
                break;
            }
            *read = FedPoint { seq: delivery.stream_seq, time_ns: Some(delivery.time_ns) };
            count(&mut self.copy, size, skipped);
            note(sampler.as_mut(), &incoming, skipped, &mut self.copy);
            if skipped.is_some() {
                reader.take();
                continue;
            }
            if let Some((reply, header)) = session.greeting() {
                leaf.send(subject, reply.as_bytes(), header, b"");
            }
            self.refusals.gives(&incoming, session.delivered() == 0);
            session.deliver(&delivery, mapped, size, &mut self.reply);
            let header = match self.renames_ids {
                true => without_ids(message.header, &mut self.room.1),
                false => message.header,
            };
            leaf.send(subject, &self.reply, header, message.payload);
            reader.take();
            send_flow_control(session, leaf, subject, false, now);
        }
        if waits || reader.peek().is_none() {
            send_flow_control(session, leaf, subject, true, now);
        }
        reader.pull(&mut self.source, &self.job.budget, leaf.unwritten() < UNWRITTEN);
        Ok(lacks)
    }

    fn hear_source(&mut self, batch: Batch) -> Result<(), Error> {
        self.hear_source_state(&batch)?;
        self.refusals.accept(&batch)?;
        if let Some(served) = &mut self.session {
            served.reader.accept(batch).map_err(|lost| Error::of_source(lost.error))?;
        }
        Ok(())
    }

    /// Does the periodic work that is due.
    fn tick(&mut self, now: Instant, positions: &mut PositionWriter) -> Result<(), Error> {
        self.times.tick = now + TICK;
        if now >= self.times.heartbeat {
            self.times.heartbeat = now + HEARTBEAT;
            if let Some(Served { session, leaf, .. }) = &self.session
                && let Some(subject) = session.subject()
            {
                self.leaves.leaf(*leaf).send(subject.as_bytes(), b"", &session.heartbeat(), b"");
            }
        }
        if self.kind == NativeKind::Source {
            self.returned.update();
            positions.learns_from_target(self.returned.remembered(&self.target_info.created));
        }
        self.leaves.join(now);
        self.refusals.check(&mut self.source, now)?;
        self.check_target(now)?;
        if let Some(Served { reader, .. }) = &mut self.session {
            let checked = match reader.plain() {
                Some(plain) => plain.check(&self.source, now),
                None => reader.check(&self.source, now, true),
            };
            checked.map_err(Error::of_source)?;
        }
        if now >= self.times.info {
            self.times.info = now + INFO_EVERY;
            self.ask_states(now);
        }
        self.tick_sampling(now);
        self.show(now);
        positions.save_fed(now, &self.fed(), || self.row());
        Ok(())
    }

    /// Makes a target ask that does not by itself, and ends the run if it stores nothing.
    fn check_target(&mut self, now: Instant) -> Result<(), Error> {
        let listened = self.is_fed();
        if listened {
            self.times.waits = now;
            if now.duration_since(self.times.stored) > STORES_WITHIN {
                let message = format!("the target has stored nothing of what was delivered for {STORES_WITHIN:?}");
                return Err(Error::stalled(ErrorSide::Target, message));
            }
            self.ask_after_silence(now);
            return Ok(());
        }
        if self.request.is_some() {
            return Ok(());
        }
        let waits = now.duration_since(self.times.waits);
        if self.session.is_some() {
            if waits > LISTENS_WITHIN {
                self.end_session();
            }
            return Ok(());
        }
        if now >= self.times.poke && self.leaves.any_listens() {
            self.times.poke = now + POKE_EVERY;
            self.leaves.send_to_listened(&poke());
        }
        if waits > STEPDOWN_AFTER && !self.stepped_down && self.target_info.number("num_replicas") > 1 {
            self.stepped_down = true;
            let stream = &self.job.replication.target.stream;
            let subject = format!("{}.STREAM.LEADER.STEPDOWN.{stream}", self.target.api_prefix());
            info!(replication = self.job.replication.id, stream, "the target does not ask: it gets another leader");
            // Without the permission, it asks by itself after a while.
            self.target.keep_refused();
            self.target.send_request(&subject, b"");
        }
        Ok(())
    }

    /// Makes a target ask again that has everything and does not answer. A slow one stores what it has before it does; with
    /// replicas it may ask before all of that is stored, so it has longer.
    fn ask_after_silence(&mut self, now: Instant) {
        let Some(Served { session, leaf, .. }) = &self.session else { return };
        let replicated = self.target_info.number("num_replicas") > 1;
        let within = if replicated { REPLICATED_ANSWERS_WITHIN } else { ANSWERS_WITHIN };
        let is_silent = !session.is_processed() && now.duration_since(self.times.stored) > within;
        let leaf = self.leaves.leaf(*leaf);
        if let Some(subject) = session.subject()
            && is_silent
            && leaf.unwritten() == 0
            && now >= self.times.poke
        {
            self.times.poke = now + within;
            leaf.send(subject.as_bytes(), b"", &poke(), b"");
        }
    }

    /// Whether a login of one of the connections is about to end, and the files have a newer one.
    fn has_newer_login(&mut self, now: Instant) -> bool {
        let Replication { source, target, native, .. } = &self.job.replication;
        let leaf = native.as_ref().map_or(&target.place, |native| &native.leaf);
        let sides = [
            (self.source.login_expires(), &source.place),
            (self.target.login_expires(), &target.place),
            (self.leaves.login_expires(), leaf),
        ];
        self.logins.has_newer(&*self.job.dial, &sides, now)
    }

    /// Whether the target listens.
    fn is_fed(&self) -> bool {
        self.session.as_ref().is_some_and(|served| served.session.subject().is_some())
    }

    fn saved(&mut self, result: Result<(), SaveError>) -> Result<(), Error> {
        match result {
            Err(conflict @ SaveError::Conflict { .. }) => Err(conflict.into()),
            // The target knows how far it has come; the next save tries again.
            Err(error) => {
                debug!(replication = self.job.replication.id, %error, "position not saved");
                self.copy.counters.position_save_errors += 1;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Sends the flow control message that is due, see [`FeedSession::flow_control`].
fn send_flow_control(session: &mut FeedSession, leaf: &mut Leaf, subject: &[u8], is_dry: bool, now: Instant) {
    if let Some((reply, header)) = session.flow_control(is_dry, now) {
        leaf.send(subject, reply.as_bytes(), header, b"");
    }
}

fn held(message: String) -> Error {
    Error::new(ErrorKind::Hold, message)
}
