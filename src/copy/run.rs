//! The loop of one run: one owner of both lanes, of what was read and of what is in the air.

use std::{future::poll_fn, sync::Arc, task::Poll};

use chrono::DateTime;
use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Error, ErrorKind, Job, bridge,
    clock::{Heard, SourceClock, shown},
    consumers::Names,
    dead_letter,
    decide::{Decision, Reason, Rules},
    drops::{Dropped, Drops},
    duplicates::Look,
    durable::{Durable, Owner},
    gap::Gaps,
    headroom::{Looks, Oldest, Outlook, Retention, Waiting},
    intake::Intake,
    line, locate,
    objects::{Gate, Incomplete, Pass},
    probe::{self, Probe},
    progress::{Ledger, Sampled, Witnesses},
    provenance::Tag,
    reader::{Incoming, Lost, Reader},
    refusal::TOO_LARGE,
    reject::{Refused, Rejects},
    renewal::Renewal,
    resume::{self, Already, Known, Resume, Sides, is_consumed, is_plain},
    sampler::Sampler,
    sharing,
    source_end::{Question, Questions, SourceEnd},
    target::{self, Abilities, Opened, Opening},
    target_limits,
    target_watch::TargetWatch,
    throttle::{self, Throttle},
    unsaved::{Copied, News},
    watchdog::{Action, Consumer, Seen, Tell, Watchdog},
    window::{SourcePoint, Window},
    writer::{Supply, Writer},
};
use crate::{
    chance,
    config::{OnReject, Replication, Side},
    events::{Event, Events, PoisonAction, Step},
    names,
    nats::{
        self, Batch, ErrorKind as NatsErrorKind, Lane, Message, Turn,
        jetstream::{Api, ConsumerInfo, StreamInfo, answer_in, decode, leaders_info},
    },
    sampling::Fate,
    status::{CopyStatus, Lag, LastError, Position, Row, State, TargetMode},
    store::{SaveError, SourceMessage},
};

/// Output that waits for the target's socket: filled up to the first mark, and again when it is below the second.
/// In between, every message would move what waits to the front of the buffer.
const OUTPUT_HIGH: usize = 256 * 1024;
const OUTPUT_LOW: usize = 32 * 1024;
/// How often the status is brought up to date: while something moves, while nothing does, and once that is saved.
const TICK: Duration = Duration::from_millis(250);
const TICK_IDLE: Duration = Duration::from_secs(1);
const TICK_SAVED: Duration = Duration::from_secs(5);
/// How often the source is asked for its state.
const INFO_EVERY: Duration = Duration::from_secs(10);
/// The same while messages wait that the source may soon remove.
const INFO_SOONEST: Duration = Duration::from_secs(1);
/// Time for what is in the air to settle when a run ends by request or at a message that cannot be stored.
pub(super) const DRAIN: Duration = Duration::from_secs(5);
/// Time for the source to take the last acks of a run that ends by request.
const LAST_ACKS: Duration = Duration::from_millis(1_500);
/// How long a run that ends waits for its advisories.
const LAST_ADVISORIES: Duration = Duration::from_secs(1);
/// Time for the last save of a run that failed.
pub(super) const LAST_SAVE: Duration = Duration::from_secs(3);
/// A run logs in again this long before its login ends, if the files have a newer one by then.
const LOGIN_AHEAD_SECS: i64 = 30;
/// How often the files are read while they have none.
const LOGIN_EVERY: Duration = Duration::from_secs(1);

/// Why the loop should end once nothing is in the air.
#[derive(Debug)]
enum Ending {
    Stopped,
    /// A login is about to end and its successor is there, the source acts on other headers than before, or may be asked for
    /// more.
    BeginsAgain,
    Failed(Error),
}

/// Why a run ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// By request.
    Stopped,
    /// To log in again, to copy by another configuration of the source or to ask it for more: the next run begins at once.
    BeginsAgain,
}

/// One run, with everything that dies with it.
pub(super) struct Run<'a> {
    job: &'a Job,
    status: &'a watch::Sender<(State, CopyStatus)>,
    events: &'a Events,
    replication: Arc<Replication>,
    source: Lane,
    target: Lane,
    source_info: StreamInfo,
    /// The time of the source server: ages are by it.
    clock: SourceClock,
    target_created: String,
    abilities: Abilities,
    rules: Rules,
    reader: Intake,
    /// Names of consumers at the source.
    names: Names,
    /// Whether the source is read now.
    reads: bool,
    writer: Writer,
    window: Window,
    rejects: Rejects<'a>,
    sampler: Option<Sampler>,
    throttle: Throttle,
    /// Until then the limits per second keep the next message back.
    throttled: Option<Instant>,
    already: Already,
    /// The last source sequence that was found at the target when the run began; 0 once everything up to it has settled.
    known_to: u64,
    gaps: Gaps,
    /// Keeps objects whole, where the source is an object store.
    gate: Option<Gate>,
    /// Whether jumps in the source's sequences may be losses.
    plain: bool,
    /// What the source has removed below this is told or noted already.
    told_first: u64,
    questions: Questions,
    /// When the source was asked for its state last.
    asked_info: Instant,
    /// Whether the source still has everything that was read.
    source_end: SourceEnd,
    /// What removes messages at the source, and what that did lately.
    retention: Retention,
    looks: Looks,
    watchdog: Watchdog,
    /// What the server has for the consumer, when that was asked.
    consumer_request: Option<String>,
    renewal: Option<Renewal>,
    probe: Probe,
    probe_request: Option<String>,
    watch: TargetWatch,
    copy: CopyStatus,
    /// What is reported: as it was before, where that was an error, until this run has copied.
    state: State,
    /// Where the run began.
    from: u64,
    began: Instant,
    next_tick: Instant,
    /// The consumer is looked at then if it is not heard of before.
    silent_at: Option<Instant>,
    moved: Instant,
    ending: Option<(Ending, Instant)>,
    /// The files of a login that is about to end are read then.
    next_login: Instant,
    /// Left out by request, and not told yet.
    skipped: Option<u64>,
    /// The copy stops there while the position cannot be saved.
    limit: Option<Copied>,
    /// It was reported that the position is not saved.
    unsaved: bool,
}

impl<'a> Run<'a> {
    /// Connects both sides, finds out where to resume, and creates the consumer.
    pub async fn start(
        job: &'a Job,
        ledger: &mut Ledger,
        status: &'a watch::Sender<(State, CopyStatus)>,
        events: &'a Events,
        refused: &'a mut Refused,
    ) -> Result<Self, Error> {
        status.send_modify(|(_, copy)| {
            copy.source.stream.clone_from(&job.replication.source.stream);
            copy.target.stream.clone_from(&job.replication.target.stream);
        });
        let mut replication = job.replication.clone();
        let in_flight = &mut replication.limits.bytes_in_flight;
        *in_flight = ledger.appetite.begin(*in_flight, Instant::now());
        let replication = Arc::new(replication);
        let name = format!("{} {}", names::PROGRAM, replication.id);
        let ((mut source, mut names), (mut target, mut target_names)) = tokio::try_join!(
            async { open(job, &replication.source, &name).await.map_err(|e| e.context("source")) },
            async { open(job, &replication.target, &name).await.map_err(|e| e.context("target")) },
        )?;
        let sent = Instant::now();
        let source_info = Api::new(&mut source).stream_info(&replication.source.stream).await;
        let source_info = source_info.map_err(|e| e.context("source"))?;
        let received = Instant::now();
        let source_info = source_info.ok_or_else(|| {
            Error::new(ErrorKind::Hold, format!("source stream `{}` does not exist", replication.source.stream))
        })?;
        let mut clock = SourceClock::new(&heard(sent, received, &source_info));
        if let Some(why) = job.own_streams.refuse(&replication.source.stream, &source_info.created) {
            return Err(Error::new(ErrorKind::Hold, format!("source: {why}")));
        }
        if let OnReject::DeadLetter { subject } = &replication.on_reject {
            dead_letter::not_into_source(&replication.source.stream, &source_info, subject)?;
        }
        if ledger.record().source.is_none() {
            bridge::check(job, &mut source, &mut target, &source_info).await?;
        }
        let opened = Opening::new(job, &mut source, &mut target, &source_info, None).open().await;
        let (target_info, opened) = opened.map_err(|e| e.context("target"))?;
        match &opened {
            Opened::Found => {}
            Opened::Made => {
                info!(replication = replication.id, stream = replication.target.stream, "target stream created");
            }
            Opened::Updated(what) => {
                info!(replication = replication.id, stream = replication.target.stream, what, "target stream updated");
            }
        }
        // Again: what an older holder copied meanwhile is no proof that the source lost its end.
        let sent = Instant::now();
        let again = Api::new(&mut source).stream_info(&replication.source.stream).await?;
        if let Some(again) = &again {
            clock.hear(&heard(sent, Instant::now(), again));
        }
        let source_info = again.unwrap_or(source_info);
        let mut abilities = target::abilities(&replication, &source_info, &target_info)?;
        if ledger.record().moved_back {
            ledger.look_behind(target_info.state.last_seq, &target_info.created).await?;
        }
        let installation = ledger.record().installation.as_ref().unwrap_or(&job.installation).clone();
        let owner = Owner { site: &job.site, installation: &installation };
        let durable = match Durable::is_needed(&source_info) {
            true => Durable::find(&mut source, &replication, owner).await.map_err(|e| e.context("source"))?,
            false => None,
        };
        let tag = Tag::new(&replication.source.stream, &job.site, &replication.name);
        let tag = tag.with_former(&replication.former);
        let sides = Sides {
            replication: &replication,
            tag: &tag,
            source_lane: &mut source,
            target_lane: &mut target,
            source_names: &mut names,
            target_names: &mut target_names,
            source: &source_info,
            clock,
            target: &target_info,
            durable: durable.as_ref(),
            chain_broke_behind: ledger.chain_broke_behind(),
            orphans: ledger.record().orphans,
            read: resume::Read::default(),
            most_in_flight: ledger.record().most_in_flight,
        };
        let (mode, news) = sharing::begin(&replication, &target_info, ledger.record(), job.neighbour.as_deref());
        abilities.share(mode);
        status.send_modify(|(_, copy)| copy.target_mode = mode);
        let mut resume = resume::find(sides, ledger.record(), mode).await?;
        status.send_modify(|(_, copy)| copy.only_at_target = resume.only_at_target);
        ledger.follows(&mut resume, &replication)?;
        resume.findings.extend(news);
        ledger.unwanted(&mut resume, &replication)?;
        ledger.lost(resume.orphans, resume.only_at_target);
        let goes_back = ledger.record().source.as_ref().is_some_and(|saved| resume.position.seq < saved.seq);
        abilities.share(resume.mode);
        if Durable::is_needed(&source_info) {
            ledger.uses_durable(&installation).await?;
        }
        let another = resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. }));
        let (position, first_seq) = (resume.position.seq, source_info.state.first_seq);
        let durable = match durable {
            Some(found) => found.unless_ahead(&mut source, &replication, &source_info, position, another).await?,
            None => None,
        };
        let sampler = Sampler::begin(job, position, ledger.record(), another, first_seq);
        let inspected = replication.sampling.as_ref().map(|sampling| sampling.inspect.mark());
        let from = sampler.as_ref().map(|(_, from)| *from);
        ledger.samples_from(from.zip(inspected)).await?;
        let (sampler, from) = sampler.map_or((None, position), |(sampler, from)| (Some(sampler), from));
        let reader = Intake::open(&mut source, &replication, owner, &source_info, durable, &mut names, from).await;
        let reader = reader.map_err(|e| e.context("source"))?;
        ledger.begin_at(target_info.state.last_seq);
        let generation = ledger.record().generation;
        refused.begin(&target_info, resume.position.seq);
        let rejects = Rejects::open(&mut source, &replication, &tag, generation, refused);
        let mut writer =
            Writer::open(&mut target, replication.clone(), tag.clone(), abilities, &target_info, ledger.record());
        if let Some(before) = resume.before {
            writer.after(before);
        }
        writer.limit_line(ledger.max_line);
        ledger.may_have_in_flight(replication.limits.messages_in_flight).await?;
        ledger.stamps(writer.stamps()).await?;
        let now = Instant::now();
        let (state, mut copy) = status.borrow().clone();
        if !copy.source.server.is_empty() {
            copy.counters.consumers_recreated += 1;
        }
        copy.source.server.clone_from(&source.info().server_name);
        copy.target.server.clone_from(&target.info().server_name);
        copy.source.connected = true;
        copy.target.connected = true;
        copy.transport = abilities.transport;
        copy.target_mode = abilities.mode;
        let drops = begin_drops(ledger, &replication, (&source_info, &target_info), &abilities, &resume);
        let gate = Gate::of(&replication.source.stream, &replication.target.stream);
        let throttle = Throttle::new(&replication.limits, now);
        copy.ordering = writer.ordering();
        copy.sampling = sampler.is_some().then(|| copy.sampling.unwrap_or_default());
        let mut run = Self {
            job,
            status,
            events,
            plain: is_plain(&replication, &source_info),
            told_first: source_info.state.first_seq,
            rules: Rules { scope: replication.scope.clone(), max_age: replication.max_age, tag: tag.clone() },
            replication,
            source,
            target,
            source_info,
            clock,
            target_created: target_info.created.clone(),
            abilities,
            reader,
            names,
            reads: true,
            writer,
            state: if matches!(state, State::Retrying | State::Held) { state } else { State::Running },
            from: resume.position.seq,
            window: Window::new(resume.position, resume.target),
            rejects,
            sampler,
            throttle,
            throttled: None,
            already: Already::default(),
            known_to: 0,
            gaps: Gaps::default(),
            gate,
            questions: Questions::default(),
            asked_info: now,
            source_end: SourceEnd::default(),
            retention: Retention::default(),
            looks: Looks::default(),
            watchdog: Watchdog::new(now, resume.position.seq),
            consumer_request: None,
            renewal: None,
            probe: Probe::new(target_info.cluster.clone().unwrap_or_default().leader),
            probe_request: None,
            watch: TargetWatch::new(drops, tag.clone()),
            copy,
            began: now,
            next_tick: now,
            silent_at: None,
            moved: now,
            ending: None,
            next_login: now,
            skipped: None,
            limit: None,
            unsaved: ledger.unsaved.is_reported(),
        };
        run.limit = run.copy_limit(ledger, now);
        run.source_says(run.source_info.clone(), now)?;
        run.remembered(&target_info, resume.unseen, ledger);
        run.resumed(resume, ledger);
        if goes_back {
            // Told now, and saved before anything is sent: where few messages of a subject are kept, what is copied again
            // replaces what would tell the next start that the saved place is not what it was.
            let sampled = run.sampler.as_ref().map(Sampler::sampled);
            let witnesses =
                witnesses(&run.window, &run.writer, &run.clock, &run.source_info, &run.target_created, sampled);
            ledger.save_now(witnesses, row(job, run.state, &run.copy)).await?;
        }
        Ok(run)
    }

    /// Tells, once per start, where the target may forget ids too soon.
    fn remembered(&mut self, target: &StreamInfo, unseen: u64, ledger: &mut Ledger) {
        if !self.writer.relies_on_ids() || std::mem::replace(&mut ledger.window_told, true) {
            return;
        }
        let window = Duration::from_nanos(target.number("duplicate_window").unsigned_abs());
        let unseen = if is_consumed(target) { unseen } else { 0 };
        let look = Look { window, unseen, saved_at: ledger.record().saved_at, now: self.clock.now(Instant::now()) };
        for event in [look.short_window(), look.long_downtime()].into_iter().flatten() {
            self.found(event);
        }
    }

    /// Tells where the run goes on and what was found on the way there.
    fn resumed(&mut self, resume: Resume, ledger: &mut Ledger) {
        self.explain(std::mem::take(&mut ledger.gaps), &resume);
        for event in resume.findings {
            if matches!(event, Event::TargetShared { .. }) {
                ledger.chain_explained();
            }
            self.found(event);
        }
        info!(
            replication = self.replication.id,
            source_seq = resume.position.seq,
            target_seq = self.writer.last_seq(),
            transport = ?self.abilities.transport,
            target_mode = ?self.abilities.mode,
            stored_already = resume.already.len(),
            "copying"
        );
        self.known_to = resume.already.last();
        self.already = resume.already;
        self.window.limit_target(target_limit(&self.already, &self.writer));
    }

    /// Tells what the run before could not: it ended before the source had answered.
    fn explain(&mut self, mut gaps: Gaps, resume: &Resume) {
        if resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. })) {
            return;
        }
        let told =
            |seq| matches!(resume.findings.last(), Some(Event::Gap { from, to, .. }) if (*from..=*to).contains(&seq));
        gaps.left_over(resume.position.seq, told);
        for (from, to) in gaps.first_is(self.told_first) {
            self.found(Event::Gap { from, to, messages: to - from + 1 });
        }
    }

    fn found(&mut self, event: Event) {
        if let Event::Gap { messages, .. } = &event {
            self.copy.counters.gap_messages += messages;
        }
        warn!(replication = self.replication.id, ?event, "found");
        self.events.emit(event, &self.replication.id);
    }

    /// Tells that a message was left out by request, and why it was asked for.
    fn left_out(&self, source_seq: u64) {
        let error = self.status.borrow().1.last_error.clone().filter(|error| error.source_seq == Some(source_seq));
        let message = error.map_or_else(|| "left out by request".to_owned(), |error| error.message);
        warn!(replication = self.replication.id, source_seq, "left out by request: {message}");
        let event = Event::poison(source_seq, message, PoisonAction::Skipped);
        self.events.emit(event, &self.replication.id);
    }

    /// Tells that the description of an object was left out.
    fn incomplete(&self, source_seq: u64, Incomplete { object, chunks, found }: Incomplete) {
        warn!(replication = self.replication.id, source_seq, object, chunks, found, "object left out: not all chunks");
        self.events.emit(Event::ObjectIncomplete { source_seq, object, chunks, found }, &self.replication.id);
    }

    /// Copies until the stop or an error; the position is saved at the end of both.
    pub async fn copy(mut self, ledger: &mut Ledger, stop: CancellationToken) -> Result<Ended, Error> {
        let result = self.copy_loop(ledger, &stop).await;
        ledger.gaps = std::mem::take(&mut self.gaps);
        ledger.drops = std::mem::take(&mut self.watch.drops);
        self.settle();
        self.tell_rejected(true);
        self.tell();
        match result {
            Ok(ended) => {
                self.write_senders().await;
                let _ = tokio::time::timeout(LAST_ACKS, self.tell_all()).await;
                self.reader.close(&mut self.source);
                // The consumer would go by itself; its deletion is a courtesy that must not hold up a stop.
                let _ = tokio::time::timeout(LAST_SAVE, self.source.round_trip()).await;
                let row = row(self.job, self.state, &self.copy);
                let sampled = self.sampler.as_ref().map(Sampler::sampled);
                let witnesses = witnesses(
                    &self.window,
                    &self.writer,
                    &self.clock,
                    &self.source_info,
                    &self.target_created,
                    sampled,
                );
                // What did not settle in time.
                ledger.left_in_flight(&self.window, Instant::now());
                ledger.save_now(witnesses, row).await?;
                Ok(ended)
            }
            Err(error) if error.kind == ErrorKind::Superseded => Err(error),
            Err(error) => {
                let sampled = self.sampler.as_ref().map(Sampler::sampled);
                // First of all nothing more may be sent.
                drop((self.source, self.target));
                if error.chain_broken {
                    let (exact, by_ids) = (self.writer.exact(&self.window), self.writer.is_by_ids());
                    ledger.broke_at(exact, &self.window, by_ids, Instant::now());
                } else {
                    ledger.left_in_flight(&self.window, Instant::now());
                }
                let row = row(self.job, self.state, &self.copy);
                let witnesses = witnesses(
                    &self.window,
                    &self.writer,
                    &self.clock,
                    &self.source_info,
                    &self.target_created,
                    sampled,
                );
                match tokio::time::timeout(LAST_SAVE, ledger.save_now(witnesses, row)).await {
                    Ok(Err(conflict @ SaveError::Conflict { .. })) => Err(conflict.into()),
                    // What was not saved is found out at the target.
                    _ => Err(error),
                }
            }
        }
    }

    /// Waits, but not long, until the records of senders say what is known of them.
    async fn write_senders(&mut self) {
        let position = self.window.position().seq;
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.copy.sampling) {
            let _ = tokio::time::timeout(LAST_SAVE, sampler.finish(position, status)).await;
            let _ = tokio::time::timeout(LAST_ADVISORIES, sampler.finish_post(status)).await;
        }
    }

    /// Up to where the source may forget what was copied.
    fn forgettable(&self, now: Instant) -> u64 {
        let position = self.window.position().seq;
        self.sampler.as_ref().map_or(position, |sampler| sampler.may_forget(position, now))
    }

    /// Waits until the source knows what was copied: some consumers take acks only now and then. What it does not learn
    /// is delivered to the next run, which leaves it out.
    async fn tell_all(&mut self) -> Result<(), Error> {
        loop {
            let forgettable = self.forgettable(Instant::now());
            self.reader.settled(&mut self.source, forgettable);
            if self.reader.is_told() {
                return Ok(());
            }
            if let Turn::Received(batch) = self.source.turn().await? {
                self.reader.accept(batch).map_err(|lost| lost.error)?;
            }
        }
    }

    async fn copy_loop(&mut self, ledger: &mut Ledger, stop: &CancellationToken) -> Result<Ended, Error> {
        loop {
            let now = Instant::now();
            self.pump(now)?;
            self.writer.outcome(&self.window, self.target.drained(), now)?;
            if let Some(end) = self.ended(now) {
                return end;
            }
            if now >= self.next_tick || self.silent_at.is_some_and(|at| now >= at) {
                self.tick(now, ledger)?;
            }
            self.silent_at = self.silent_at(now);
            let supply = self.supply();
            self.writer.commit_if_due(&mut self.target, supply, now);
            self.sample(now);
            let forgettable = self.forgettable(now);
            self.reader.settled(&mut self.source, forgettable);
            self.reads = self.reader.may_read(&self.job.budget);
            let due = [self.writer.next_commit(supply), self.throttled, self.silent_at].into_iter().flatten();
            let wake = due.fold(self.next_tick, Instant::min);
            tokio::select! {
                biased;
                () = stop.cancelled(), if self.ending.is_none() => self.end(Ending::Stopped),
                // Before the lanes: it is rarely ready, and while both are busy it would never be looked at.
                saved = poll_fn(|cx| ledger.poll(cx)) => self.saved(saved, ledger)?,
                moved = poll_fn(|cx| self.sampler.as_mut().map_or(Poll::Pending, |sampler| sampler.poll(cx))) => {
                    if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.copy.sampling) {
                        sampler.accept(moved, status, Instant::now());
                    }
                }
                turn = self.target.turn() => {
                    if let Turn::Received(batch) = turn.map_err(|error| self.lost_target(error))? {
                        self.take_acks(&batch)?;
                    }
                }
                turn = self.source.turn(), if self.reads => {
                    if let Turn::Received(batch) = turn.map_err(|error| self.lost_source(ledger, error))? {
                        self.take_messages(batch)?;
                    }
                }
                () = sleep_until(wake) => {}
            }
        }
    }

    /// The target ended the connection: perhaps for a line that was too long.
    fn lost_target(&self, error: crate::nats::Error) -> Error {
        let unconfirmed_line = self.writer.unconfirmed_line(&self.window).filter(|line| *line > line::LEAST);
        Error { unconfirmed_line, ..error.context("target").into() }
    }

    /// The source ended the connection: perhaps because more was asked for than it lets wait.
    fn lost_source(&self, ledger: &mut Ledger, error: crate::nats::Error) -> Error {
        let now = Instant::now();
        // One that says why it ends was not cut for what waits: a slow consumer is told nothing.
        if self.reader.pending() > 0 && error.is_cut() {
            let asked = throttle::read_ahead(&self.replication.limits);
            if let Some(bytes) = ledger.appetite.cut(asked, now.duration_since(self.began), now) {
                let id = &self.replication.id;
                warn!(replication = id, bytes, "the source cut the connection again: asking it for less at once");
            }
        }
        error.context("source").into()
    }

    /// Writes what is known of senders and publishes what is to be told of them, as far as that is due.
    fn sample(&mut self, now: Instant) {
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.copy.sampling) {
            sampler.was_read(self.window.newest().seq, self.reader.pending() == 0);
            sampler.write(self.window.position().seq, now);
            sampler.publish(status, now);
        }
    }

    fn supply(&self) -> Supply {
        if self.ending.is_some() || self.reader.pending() == 0 {
            Supply::Dry
        } else if self.reader.is_barred()
            || self.reader.peek().is_some_and(|incoming| {
                self.full(incoming.bytes()) || self.waits_for_known(incoming.delivery.stream_seq)
            })
        {
            Supply::Barred
        } else {
            Supply::Coming
        }
    }

    /// Whether the bounds keep back a message of so many bytes.
    fn full(&self, bytes: usize) -> bool {
        let limits = &self.replication.limits;
        self.window.len() >= limits.messages_in_flight.min(self.writer.most_in_air())
            || (!self.window.is_empty() && self.window.bytes() + bytes > limits.bytes_in_flight)
            || self.rejects.full(limits, bytes)
            || self.is_beyond_saves(bytes)
    }

    /// Whether a message waits until everything up to the last one that was found at the target has settled. Otherwise each
    /// run could store another window of messages behind one that is refused every time, and no search would know how far
    /// before the end of the target something may be missing.
    fn waits_for_known(&self, seq: u64) -> bool {
        self.known_to > 0 && seq > self.known_to && !self.all_settled()
    }

    /// Whether a message of so many bytes would be more than may be copied while the position is not saved.
    fn is_beyond_saves(&self, bytes: usize) -> bool {
        let Some(limit) = &self.limit else { return false };
        let counters = &self.copy.counters;
        counters.copied + self.window.len() as u64 >= limit.messages
            || counters.copied_bytes + (self.window.bytes() + bytes) as u64 > limit.bytes
    }

    /// Whether the copy waits until the position can be saved.
    fn waits_for_saves(&self) -> bool {
        self.limit.is_some() && self.reader.peek().is_some_and(|incoming| self.is_beyond_saves(incoming.bytes()))
    }

    fn copy_limit(&self, ledger: &mut Ledger, now: Instant) -> Option<Copied> {
        ledger.copy_limit(self.copy.counters.into(), now).filter(|_| !self.job.standalone)
    }

    /// Reports, once, that the position is not saved, and that it is again.
    fn report_saves(&mut self, now: Instant, ledger: &mut Ledger) {
        self.limit = self.copy_limit(ledger, now);
        let (id, position) = (&self.replication.id, self.window.position().seq);
        match ledger.unsaved.news(now) {
            Some(News::Unsaved(why)) => {
                let message = format!("the position is not saved: {why}");
                warn!(replication = id, position, "{message}");
                let saved = ledger.record().source.as_ref().map_or(0, |source| source.seq);
                let error = LastError::now("retry", &message);
                self.status.send_modify(|(_, told)| told.last_error = Some(error));
                self.events.emit(Event::PositionUnsaved { message, saved, position }, id);
            }
            Some(News::Saved) => {
                info!(replication = id, position, "the position is saved again");
                self.events.emit(Event::PositionSaved { position }, id);
            }
            None => {}
        }
        self.unsaved = ledger.unsaved.is_reported();
    }

    /// Whether nothing that was read waits for an ack.
    fn all_settled(&self) -> bool {
        self.window.is_empty() && !self.rejects.in_the_air()
    }

    /// Whether the next message will be a dead letter too: only such a one may follow those that are in the air.
    fn is_dead_letter(&mut self, now_ns: i64) -> bool {
        let Some(incoming) = self.reader.peek() else { return false };
        let message = SourceMessage { seq: incoming.delivery.stream_seq, time_ns: incoming.delivery.time_ns };
        let decision = decide(&self.rules, self.sampler.as_mut(), &incoming, now_ns);
        self.already.is_empty()
            && self.job.skip != Some(message)
            && decision == Decision::Copy
            && (self.rejects.known(&incoming).is_some() || self.writer.prepare(&incoming, now_ns).is_err())
    }

    /// Decides about what was read and sends it, as far as the bounds allow; then asks for more.
    fn pump(&mut self, now: Instant) -> Result<(), Error> {
        self.throttled = None;
        if self.ending.is_some() {
            return Ok(());
        }
        let now_ns = self.clock.now_ns(now);
        let read_at = now.duration_since(self.began).as_micros() as u64;
        let writable = self.target.output().len() < OUTPUT_LOW && self.source.output().len() < OUTPUT_HIGH;
        let mut incomplete = None;
        loop {
            if self.rejects.in_the_air() && !self.is_dead_letter(now_ns) {
                break;
            }
            let Some(incoming) = self.reader.peek().filter(|_| writable) else { break };
            let bytes = incoming.bytes();
            if self.full(bytes) || !self.writer.ready() || self.target.output().len() >= OUTPUT_HIGH {
                break;
            }
            self.throttled = self.throttle.wait(bytes, now);
            if self.throttled.is_some() {
                break;
            }
            let seq = incoming.delivery.stream_seq;
            let time_ns = incoming.delivery.time_ns;
            if self.waits_for_known(seq) {
                break;
            }
            if seq > self.known_to {
                self.known_to = 0;
            }
            if let Some(sampler) = self.sampler.as_mut().filter(|sampler| sampler.is_replay(seq)) {
                let (subject, header) = (incoming.message.subject, incoming.message.header);
                if self.rules.decide(subject, time_ns, header, now_ns) == Decision::Copy {
                    sampler.replay(&incoming, self.replication.on_reject != OnReject::Hold);
                }
                self.reader.take();
                continue;
            }
            let source = SourcePoint { seq, time_ns: Some(time_ns) };
            let expected = (incoming.after + 1).max(self.told_first);
            // What is gone at the source and lies at the target already is not lost.
            if self.plain && seq > expected && self.already.within(expected, seq - 1) < seq - expected {
                self.gaps.jumped(expected, seq - 1);
            }
            // Once, also where the message has to wait.
            self.told_first = self.told_first.max(seq);
            let counters = &mut self.copy.counters;
            let subject = incoming.message.subject;
            let known = self.already.take(seq, time_ns, subject, &self.replication.mapping);
            self.window.limit_target(target_limit(&self.already, &self.writer));
            // What sampling is told; what is left out before it is asked is none of its business.
            let mut fate = Some(Fate::Passed);
            match known {
                _ if self.job.skip == Some(SourceMessage { seq, time_ns }) => {
                    counters.skipped_refused += 1;
                    counters.skipped_bytes += bytes as u64;
                    self.window.skip(source);
                    self.moved = now;
                    self.skipped = Some(seq);
                }
                Some(Known::Stored(target_seq)) => {
                    // A position without any place at the target could not tell that the target lost all of it.
                    let first = self.window.target().is_none() && self.already.all_behind(target_seq);
                    let limit = target_limit(&self.already, &self.writer);
                    self.window.limit_target(if first { u64::MAX } else { limit });
                    self.window.stored_before(source, target_seq);
                    self.window.limit_target(limit);
                    fate = Some(Fate::Stored);
                }
                Some(Known::Replaced) => {
                    self.window.skip(source);
                    fate = Some(Fate::Stored);
                }
                None => match decide(&self.rules, self.sampler.as_mut(), &incoming, now_ns) {
                    Decision::Skip(reason) => {
                        match reason {
                            Reason::Sampled => counters.skipped_sampled += 1,
                            Reason::Old => {
                                (counters.skipped_old, fate) = (counters.skipped_old + 1, None);
                                if let Some(sampler) = &mut self.sampler {
                                    sampler.passed_over();
                                }
                            }
                            Reason::Excluded | Reason::Loop => {
                                (counters.skipped_filtered, fate) = (counters.skipped_filtered + 1, None);
                            }
                        }
                        counters.skipped_bytes += bytes as u64;
                        self.window.skip(source);
                        self.moved = now;
                    }
                    Decision::Copy => {
                        let message = (incoming.message.subject, incoming.message.payload);
                        let pass = match &mut self.gate {
                            Some(gate) => {
                                let settled = self.window.is_empty();
                                gate.pass(message, settled, &mut self.target, &self.replication.mapping, now)
                            }
                            None => Pass::Send,
                        };
                        let known = self.rejects.known(&incoming);
                        match pass {
                            Pass::Wait => break,
                            Pass::LeaveOut(object) => {
                                counters.skipped_incomplete += 1;
                                counters.skipped_bytes += bytes as u64;
                                self.window.skip(source);
                                self.moved = now;
                                incomplete = Some(object);
                            }
                            Pass::Send => match known.map_or_else(|| self.writer.prepare(&incoming, now_ns), Err) {
                                Ok(()) => {
                                    if self.window.is_empty() {
                                        // Nothing was waited for until now.
                                        self.moved = now;
                                    }
                                    self.throttle.take(bytes);
                                    self.writer.send(&mut self.target, &mut self.window, &incoming, now, read_at);
                                    fate = Some(Fate::Sent);
                                    if let Some(gate) = &mut self.gate {
                                        gate.sent(message);
                                    }
                                }
                                Err(error) if error.is_api(TOO_LARGE) && self.rejects.ask(&mut self.target, now) => {
                                    break;
                                }
                                Err(error) => {
                                    counters.refused += 1;
                                    self.moved = now;
                                    let (source, window) = (&mut self.source, &mut self.window);
                                    let dealt = self.rejects.reject(source, window, counters, &incoming, error, now);
                                    if let Err(error) = dealt {
                                        self.end(Ending::Failed(error));
                                        break;
                                    }
                                }
                            },
                        }
                    }
                },
            }
            counters.received += 1;
            counters.received_bytes += bytes as u64;
            if let (Some(sampler), Some(fate), Some(status)) = (&mut self.sampler, fate, &mut self.copy.sampling) {
                sampler.took(&incoming, fate, status);
            }
            self.reader.take();
            self.next_tick = self.next_tick.min(now + TICK);
            if let Some(object) = incomplete.take() {
                self.incomplete(seq, object);
            }
        }
        if let Some(seq) = self.skipped.take() {
            self.left_out(seq);
        }
        self.tell_rejected(false);
        if self.ending.is_none() {
            self.reader.pull(&mut self.source, &self.job.budget);
        }
        Ok(())
    }

    fn take_acks(&mut self, batch: &Batch) -> Result<(), Error> {
        let now = Instant::now();
        if let Some(gate) = &mut self.gate {
            gate.accept(batch)?;
        }
        if let Some(info) = self.rejects.answer(batch, now)? {
            self.writer.target_is(&info);
        }
        for message in batch.iter() {
            if message.sid == Lane::REQUEST_SID {
                self.target_says(&message)?;
                let (position, in_flight) = (self.window.position().seq, !self.window.is_empty());
                let stream = &self.replication.target.stream;
                self.watch.accept(&mut self.target, stream, &message, position, in_flight);
            }
            self.writer.accept(&message, &mut self.window, now)?;
        }
        self.settle();
        Ok(())
    }

    /// Takes what is settled out of the window.
    fn settle(&mut self) {
        let now = Instant::now();
        let elapsed = now.duration_since(self.began).as_micros() as u64;
        let mut observed = (0, 0);
        self.window.limit_target(target_limit(&self.already, &self.writer));
        while let Some(done) = self.window.pop() {
            self.moved = now;
            let counters = &mut self.copy.counters;
            counters.copied += 1;
            counters.copied_bytes += done.bytes as u64;
            // Messages read together are observed together.
            if done.read_at != observed.0 {
                self.copy.processing.observe((elapsed - observed.0.min(elapsed)) as f64 / 1e6, observed.1);
                observed = (done.read_at, 0);
            }
            observed.1 += 1;
        }
        self.copy.processing.observe((elapsed - observed.0.min(elapsed)) as f64 / 1e6, observed.1);
        if let Some(sampler) = &mut self.sampler {
            sampler.settled(self.window.position().seq);
        }
    }

    fn take_messages(&mut self, batch: Batch) -> Result<(), Error> {
        let answer = |request: &Option<String>| request.as_deref().and_then(|request| answer_in(&batch, request));
        if let Some((question, info)) = self.questions.newest(|request| answer_in(&batch, request))
            && let Some(info) = leaders_info(info?)?
        {
            self.clock.hear(&heard(question.at, Instant::now(), &info));
            self.source_end.ask(question.read);
            self.source_says(info, question.at)?;
        }
        if let Some(info) = answer(&self.consumer_request) {
            self.consumer_request = None;
            self.consumer_is(info.and_then(decode::<ConsumerInfo>))?;
        }
        self.go_on_with_renewal(&batch)?;
        let (dead_lettered, refused) = self.rejects.accept(&batch, &mut self.window);
        if dead_lettered > 0 {
            self.copy.counters.dead_lettered += dead_lettered;
            self.moved = Instant::now();
            self.tell_rejected(false);
        }
        if let Some(error) = refused {
            self.end(Ending::Failed(error));
        }
        match self.reader.accept(batch) {
            Ok(()) => Ok(()),
            Err(Lost { error, .. }) if self.reader.plain().is_none() => Err(error.into()),
            Err(Lost { error, forgotten }) => {
                let action = self.watchdog.lost(Instant::now(), &self.seen(), error.message, forgotten);
                self.act(action)
            }
        }
    }

    /// What the server says of our consumer when the watchdog asked.
    fn consumer_is(&mut self, info: Result<ConsumerInfo, crate::nats::Error>) -> Result<(), Error> {
        let consumer = match info {
            Ok(info) => {
                if let Some(reader) = self.reader.plain_mut()
                    && info.delivered.stream_seq <= reader.delivered()
                {
                    // What was pending may be gone, by age or by hand.
                    reader.correct_pending(info.num_pending);
                }
                Consumer::Has(info.num_pending)
            }
            Err(error) if error.kind == NatsErrorKind::NotFound => Consumer::Gone,
            // Nobody knows; it is asked again.
            Err(_) => return Ok(()),
        };
        let action = self.watchdog.answered(Instant::now(), consumer, self.source_info.state.last_seq);
        action.map_or(Ok(()), |action| self.act(action))
    }

    fn go_on_with_renewal(&mut self, batch: &Batch) -> Result<(), Error> {
        let Some(renewal) = &mut self.renewal else { return Ok(()) };
        let ahead = throttle::read_ahead(&self.replication.limits);
        let Some(made) = renewal.accept(&mut self.source, batch, ahead) else { return Ok(()) };
        self.renewal = None;
        let made = made.map_err(|error| {
            let stream = &self.replication.source.stream;
            Error::stalled(format!("the consumer of stream `{stream}` was not made anew: {error}"))
        })?;
        self.reader = Intake::Plain(Box::new(made));
        self.copy.counters.consumers_recreated += 1;
        self.watchdog.renewed(Instant::now());
        Ok(())
    }

    /// Does what the watchdog wants.
    fn act(&mut self, action: Action) -> Result<(), Error> {
        let Replication { id, scope, source: of, .. } = &*self.replication;
        match action {
            Action::Ask => {
                let Some(reader) = self.reader.plain() else { return Ok(()) };
                let (prefix, consumer) = (self.source.api_prefix(), reader.consumer());
                let subject = format!("{prefix}.CONSUMER.INFO.{}.{consumer}", of.stream);
                self.consumer_request = Some(self.source.send_request(&subject, b""));
            }
            Action::Renew { reason, tell } => {
                let message = format!("the consumer of stream `{}` is made anew: {reason}", of.stream);
                let Some(reader) = self.reader.plain_mut() else { return Err(Error::stalled(message)) };
                self.consumer_request = None;
                let deletion = reader.abandon(&mut self.source);
                let (behind, name) = (self.window.newest(), self.names.next());
                // What the server said of the stream may be older than its large messages.
                let counters = &self.copy.counters;
                let read = counters.received_bytes.checked_div(counters.received).unwrap_or_default();
                let heavy = locate::is_heavy(&self.source_info) || read >= locate::HEAVY;
                let shows = heavy.then(|| self.names.next());
                let names = (name, shows);
                let renewal = Renewal::begin(&mut self.source, &of.stream, scope.filters(), behind, names, deletion);
                self.renewal = Some(renewal);
                self.next_tick = self.next_tick.min(Instant::now() + TICK);
                self.copy.counters.repairs.consumer += u64::from(tell != Tell::Nothing);
                if tell == Tell::All {
                    warn!(replication = id, "stalled: {message}");
                    let error = LastError::now("retry", &message);
                    self.status.send_modify(|(_, told)| told.last_error = Some(error));
                    self.events.emit(Event::Stalled { message, step: Step::Consumer }, id);
                } else {
                    debug!(replication = id, "{message}");
                }
            }
            Action::GiveUp { reason } => return Err(Error::stalled(reason)),
            Action::Repaired => {
                let position = self.window.position().seq;
                info!(replication = id, position, "repaired");
                self.events.emit(Event::Repaired { position }, id);
                self.tell();
            }
        }
        Ok(())
    }

    fn seen(&self) -> Seen {
        // A durable consumer is looked after by its own reader.
        let plain = self.reader.plain();
        Seen {
            asking: plain.is_some_and(Reader::is_asking),
            delivered: plain.map_or(0, Reader::delivered),
            handed_out: self.window.newest().seq,
            pending: self.reader.pending(),
            last_seq: self.source_info.state.last_seq,
            consumer_heard: plain.map_or(self.began, Reader::heard).max(self.source.partial_at()),
            source_heard: self.source.heard_at(),
            receiving: self.source.is_receiving(),
            source_partial: self.source.partial_at(),
            in_air: self.window.len(),
            waiting: self.reader.peek().is_some(),
            // By the limit of its rate, by dead letters, whose clock is their own, or by saves that fail.
            held_back: self.throttled.is_some() || self.rejects.in_the_air() || self.waits_for_saves(),
            settled: self.moved,
            drained: self.target.drained(),
            unwritten: self.target.unwritten(),
        }
    }

    /// When the consumer has to be looked at if nothing is heard of it until then. Asked at each turn of the loop.
    fn silent_at(&self, now: Instant) -> Option<Instant> {
        let reader = self.reader.plain()?;
        let owes = reader.is_asking() && !self.source.is_receiving();
        let heard = reader.heard().max(self.source.partial_at());
        owes.then(|| self.watchdog.silent_at(now, heard)).flatten()
    }

    /// Tells of messages that could not be stored; of all that are not told yet at the end and now and then.
    fn tell_rejected(&mut self, all: bool) {
        for event in self.rejects.tell(all) {
            warn!(replication = self.replication.id, ?event, "left out, because the target can never store it");
            self.events.emit(event, &self.replication.id);
        }
    }

    /// What the leader of the source stream says of it, asked at a time.
    fn source_says(&mut self, info: StreamInfo, asked: Instant) -> Result<(), Error> {
        if let Some(why) = self.source_end.answered(info.state.last_seq) {
            // The next run finds out where to continue, or whether to hold.
            return Err(Error::new(ErrorKind::Retry, why));
        }
        for (from, to) in self.gaps.first_is(info.state.first_seq) {
            self.found(Event::Gap { from, to, messages: to - from + 1 });
        }
        self.retention = Retention::of(&info);
        self.looks.add(Instant::now(), info.state.clone());
        let now_ms = self.clock.now(Instant::now()).timestamp_millis();
        if let Some(Dropped { messages, event }) = self.watch.source_has(&info, asked, now_ms) {
            self.copy.counters.target_dropped += messages;
            event.into_iter().for_each(|event| self.found(event));
        }
        if self.ending.is_none() && !target::acts_alike(&info, &self.source_info) {
            info!(replication = self.replication.id, "the source acts on other headers than before: a new run follows");
            self.end(Ending::BeginsAgain);
        }
        self.source_info.state = info.state;
        Ok(())
    }

    /// An answer to the probe.
    fn target_says(&mut self, message: &Message<'_>) -> Result<(), Error> {
        if self.probe_request.as_ref().is_none_or(|request| request.as_bytes() != message.subject) {
            return Ok(());
        }
        self.probe_request = None;
        // An error says that nobody leads the stream, or that it is gone: the next run will tell.
        let Ok(info) = decode::<StreamInfo>(message.payload) else { return Ok(()) };
        let leader = info.cluster.unwrap_or_default().leader;
        self.probe.answered(&leader).map_err(Error::stalled)
    }

    /// Asks the target where confirmations are overdue.
    fn look_after_target(&mut self, now: Instant) -> Result<(), Error> {
        let owed = self.writer.is_owed(&self.window).then_some(self.moved);
        if owed.is_some_and(|since| now.duration_since(since) >= probe::ASK) {
            self.target.check_delivery();
        }
        match self.probe.step(owed, self.target.alive(), now) {
            probe::Step::Wait => Ok(()),
            probe::Step::Ask => {
                self.target.ping();
                let subject = format!("{}.STREAM.INFO.{}", self.target.api_prefix(), self.replication.target.stream);
                self.probe_request = Some(self.target.send_request(&subject, b""));
                Ok(())
            }
            probe::Step::Lost(why) => Err(Error::stalled(why)),
        }
    }

    /// More often while the first messages may soon go and nothing but the stream's state tells when.
    fn info_every(&self) -> Duration {
        if self.source_end.is_doubted() {
            return INFO_SOONEST;
        }
        if self.copy.lag.is_none_or(|lag| lag.messages == 0) || !self.retention.by_count() {
            return INFO_EVERY;
        }
        let headroom = self.copy.headroom.map_or(0.0, |headroom| headroom.seconds);
        Duration::from_secs_f64(headroom / 10.0).clamp(INFO_SOONEST, INFO_EVERY)
    }

    /// What is due now and then: status, save, questions, and whether everything still moves.
    fn tick(&mut self, now: Instant, ledger: &mut Ledger) -> Result<(), Error> {
        self.settle();
        self.report_saves(now, ledger);
        self.tell_rejected(true);
        self.tell();
        self.report_clock(ledger);
        let idle = self.all_settled() && self.reader.pending() == 0 && !self.watchdog.is_alert();
        if let (Some(sampler), Some(status)) = (&mut self.sampler, &mut self.copy.sampling) {
            sampler.tick(idle, status, now, &self.clock);
            for event in sampler.take_events() {
                self.events.emit(event, &self.replication.id);
            }
        }
        let sampled = self.sampler.as_ref().map(Sampler::sampled);
        let witnesses =
            witnesses(&self.window, &self.writer, &self.clock, &self.source_info, &self.target_created, sampled);
        let saved = ledger.save(now, witnesses, || row(self.job, self.state, &self.copy));
        self.next_tick = now
            + match (idle, saved) {
                (true, true) if self.sampler.is_none() => TICK_SAVED,
                (true, _) => TICK_IDLE,
                (false, _) => TICK,
            };
        let due = now.duration_since(self.asked_info) >= self.info_every() && self.questions.may_ask(now);
        if due || (self.questions.is_empty() && self.gaps.ask(now)) {
            self.asked_info = now;
            // Of a position that nothing was read at, nobody knows whether the source ever reached it.
            let read = self.window.newest();
            let read = read.time_ns.map_or(0, |_| read.seq);
            let subject = format!("{}.STREAM.INFO.{}", self.source.api_prefix(), self.replication.source.stream);
            let request = self.source.send_request(&subject, b"");
            self.questions.ask(Question { request, at: now, read });
            let settled = self.all_settled().then(|| self.window.position().seq);
            self.watch.ask(&mut self.target, &self.replication.target.stream, settled, now);
        }
        self.watch.ask_first(&mut self.target, &self.replication.target.stream, now);
        self.rejects.check(now)?;
        self.look_after_target(now)?;
        let action = self.watchdog.look(now, &self.seen());
        action.map_or(Ok(()), |action| self.act(action))?;
        self.look_after_logins(now);
        if self.ending.is_none() && ledger.appetite.recovers(now) {
            info!(
                replication = self.replication.id,
                "the source has not cut a connection for long: asking it for more"
            );
            self.end(Ending::BeginsAgain);
        }
        self.source.check_delivery();
        Ok(self.reader.check(&self.source, now, self.reads)?)
    }

    /// Ends the run in time where a login is about to end and the files have its successor.
    fn look_after_logins(&mut self, now: Instant) {
        let soon = chance::now().timestamp() + LOGIN_AHEAD_SECS;
        let sides = [(&self.source, &self.replication.source), (&self.target, &self.replication.target)];
        let ending = |(lane, side): &(&Lane, &Side)| {
            lane.login_expires().is_some_and(|at| at <= soon && self.job.dial.login_expires(&side.place) > Some(at))
        };
        let ends = sides.iter().any(|(lane, _)| lane.login_expires().is_some_and(|at| at <= soon));
        if !ends || self.ending.is_some() || now < self.next_login {
            return;
        }
        self.next_login = now + LOGIN_EVERY;
        if sides.iter().any(ending) {
            info!(replication = self.replication.id, "credentials were renewed: logging in again");
            self.end(Ending::BeginsAgain);
        }
    }

    /// Reports, once, that the source's clock and ours differ, and that they do no more.
    fn report_clock(&self, ledger: &mut Ledger) {
        let (id, server) = (&self.replication.id, &self.copy.source.server);
        let offset = self.clock.offset(Instant::now(), chance::now());
        match ledger.clock.judge(offset) {
            Some(event @ Event::ClockOk { .. }) => {
                info!(
                    replication = id,
                    server,
                    ?offset,
                    "the clocks of the source server and of this host agree again"
                );
                self.events.emit(event, id);
            }
            Some(event) => {
                if let Event::ClockOffset { reason, .. } = &event {
                    warn!(replication = id, server, ?offset, "{reason}");
                }
                self.events.emit(event, id);
            }
            None => {}
        }
    }

    /// Brings the status up to date.
    fn tell(&mut self) {
        let waits_for_saves = self.waits_for_saves();
        let copy = &mut self.copy;
        let position = self.window.position();
        // As long as nothing settles, the oldest is the same, also where it has not been read (again) yet.
        let before = copy.lag.filter(|_| copy.position.source_seq == position.seq).and_then(|lag| lag.oldest);
        copy.position =
            Position { source_seq: position.seq, target_seq: self.window.target().map_or(0, |target| target.seq) };
        let now = Instant::now();
        copy.source.clock_offset_seconds =
            shown(copy.source.clock_offset_seconds, self.clock.offset(now, chance::now()));
        copy.target.last_seq = Some(self.writer.last_seq());
        let (letters, letter_bytes, letter) = self.rejects.in_flight();
        let counted = self.reader.pending() + (self.window.len() + letters) as u64;
        let plain = self.reader.plain();
        let seen = self.window.newest().seq.max(plain.map_or(0, Reader::seen));
        let all = plain.is_some() && self.replication.scope.filters().is_empty();
        let Waiting { last_seq, messages } = Waiting::of(&self.source_info.state, all, position.seq, counted, seen);
        copy.source.first_seq = Some(self.source_info.state.first_seq);
        copy.source.last_seq = Some(last_seq);
        let oldest = self.window.oldest().or(letter).or_else(|| self.reader.next());
        // What is replayed for sampling is settled.
        let oldest = oldest.filter(|point| point.seq > position.seq);
        let now = self.clock.now(now);
        let stored = oldest.and_then(|point| point.time_ns).map(DateTime::from_timestamp_nanos);
        let lag = Lag::new(messages, stored.or(before), now);
        copy.lag = Some(lag);
        let oldest = Oldest {
            seq: oldest.map_or(position.seq + 1, |point| point.seq),
            age: lag.oldest.and(lag.seconds).map(Duration::from_secs_f64),
        };
        copy.headroom = match self.looks.outlook(&self.retention, &oldest) {
            _ if messages == 0 => None,
            Outlook::Left(headroom) => Some(headroom),
            Outlook::Safe => None,
            Outlook::Unknown => copy.headroom,
        };
        copy.in_flight.messages = (self.window.len() + letters) as u64;
        copy.in_flight.bytes = (self.window.bytes() + letter_bytes) as u64;
        if let (Some(sampler), Some(status)) = (&self.sampler, &mut copy.sampling) {
            sampler.tell(status, Instant::now());
        }
        copy.counters.headers_removed += std::mem::take(&mut self.writer.headers_removed);
        copy.counters.refused += self.writer.take_refused();
        if messages == 0 || position.seq > self.from {
            self.state = State::Running;
        }
        let shown = if waits_for_saves { State::Retrying } else { self.state };
        let well = shown == State::Running && !self.watchdog.is_open() && !self.unsaved;
        self.status.send_modify(|(state, told)| {
            *state = shown;
            // The caller's notes on earlier errors stay.
            let mut last_error = told.last_error.take();
            if let Some(error) = last_error.as_mut().filter(|_| well) {
                error.ran();
            }
            copy.last_error = last_error;
            *told = copy.clone();
        });
    }

    fn saved(&mut self, result: Result<(), SaveError>, ledger: &mut Ledger) -> Result<(), Error> {
        match result {
            Err(conflict @ SaveError::Conflict { .. }) => return Err(conflict.into()),
            // The copy goes on for a while: what is at the target tells where it stands. The next save tries again.
            Err(error) => {
                debug!(replication = self.replication.id, %error, "position not saved");
                self.copy.counters.position_save_errors += 1;
            }
            Ok(()) => {}
        }
        self.report_saves(Instant::now(), ledger);
        Ok(())
    }

    fn end(&mut self, ending: Ending) {
        let now = Instant::now();
        self.writer.commit(&mut self.target, now);
        self.ending = Some((ending, now + DRAIN));
    }

    /// Whether an ending that was begun is complete.
    fn ended(&mut self, now: Instant) -> Option<Result<Ended, Error>> {
        let (_, deadline) = self.ending.as_ref()?;
        if !self.all_settled() && now < *deadline {
            return None;
        }
        if !self.all_settled() {
            let messages = self.window.len() + self.rejects.in_flight().0;
            warn!(replication = self.replication.id, messages, "not settled in time; the next run looks for them");
        }
        let (ending, _) = self.ending.take()?;
        Some(match ending {
            Ending::Failed(error) => Err(error),
            Ending::Stopped => Ok(Ended::Stopped),
            Ending::BeginsAgain => Ok(Ended::BeginsAgain),
        })
    }
}

/// What an answer about the source stream says of its server's clock.
fn heard(sent: Instant, received: Instant, info: &StreamInfo) -> Heard {
    Heard { sent, received, server: info.ts, local: chance::now() }
}

/// How far the known place at the target may move: behind it messages of ours may lie that have not come by. Those of
/// before the run, or those that an older holder sent while it began.
pub(super) fn target_limit(already: &Already, writer: &Writer) -> u64 {
    if already.is_empty() { writer.adds_up_to() } else { 0 }
}

/// What the target holds of what was copied, compared with what the run before knew.
fn begin_drops(
    ledger: &mut Ledger,
    replication: &Replication,
    (source, target): (&StreamInfo, &StreamInfo),
    abilities: &Abilities,
    resume: &Resume,
) -> Drops {
    let whole = replication.scope.is_whole() && replication.sampling.is_none() && replication.max_age.is_none();
    let whole = whole && abilities.mode == TargetMode::Exclusive;
    let mut drops = ledger.drops.clone();
    let position = resume.position.seq;
    drops.begin(target, target_limits::that_drop(replication, source, target, whole), position);
    if target.state.messages == 0 {
        drops.lacks(&source.state, position);
    }
    drops
}

fn witnesses<'w>(
    window: &'w Window,
    writer: &Writer,
    clock: &SourceClock,
    source: &'w StreamInfo,
    target_created: &'w str,
    sampled: Option<Sampled>,
) -> Witnesses<'w> {
    Witnesses {
        window,
        now: clock.now(Instant::now()),
        mode: writer.mode(),
        stamps: writer.stamps(),
        source_created: &source.created,
        target_created,
        sampled,
    }
}

/// What is to be done with the message that comes next.
fn decide(rules: &Rules, sampler: Option<&mut Sampler>, incoming: &Incoming<'_>, now_ns: i64) -> Decision {
    let message = &incoming.message;
    let decision = rules.decide(message.subject, incoming.delivery.time_ns, message.header, now_ns);
    let asked = sampler.filter(|_| decision == Decision::Copy);
    match asked.is_some_and(|sampler| !sampler.wants(incoming)) {
        true => Decision::Skip(Reason::Sampled),
        false => decision,
    }
}

/// Connects to a side and deletes the consumers that runs before this one left there.
async fn open(job: &Job, side: &Side, name: &str) -> Result<(Lane, Names), nats::Error> {
    let mut lane = job.dial.dial(&side.place, name).await?;
    let names = Names::clear(&mut lane, &side.stream, &job.consumers).await?;
    Ok((lane, names))
}

fn row(job: &Job, state: State, copy: &CopyStatus) -> Row {
    Row { state, copy: copy.clone(), todo: None, ..job.row.clone() }
}
