//! The loop of one run: one owner of both lanes, of what was read and of what is in the air.

use std::{future::poll_fn, sync::Arc};

use chrono::Utc;
use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Error, ErrorKind, Job,
    decide::{Decision, Reason, Rules},
    durable::Durable,
    gap::Gaps,
    intake::Intake,
    progress::{Ledger, Witnesses},
    provenance::Tag,
    resume::{self, Already, Known, Resume, Sides, is_plain},
    target::{self, Abilities},
    transform,
    window::{SourcePoint, Window},
    writer::{Supply, Writer},
};
use crate::{
    config::Replication,
    events::{Event, Events, PoisonAction},
    names,
    nats::{
        Batch, Lane, Turn,
        jetstream::{Api, StreamInfo, decode},
    },
    status::{CopyStatus, Lag, Position, Row, State},
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
/// Time without any settlement, while messages are in the air, after which the run is given up.
const STALL: Duration = Duration::from_secs(30);
/// Time for what is in the air to settle when a run ends by request or at a message that cannot be stored.
const DRAIN: Duration = Duration::from_secs(5);
/// Time for the source to take the last acks of a run that ends by request.
const LAST_ACKS: Duration = Duration::from_millis(1_500);
/// Time for the last save of a run that failed.
const LAST_SAVE: Duration = Duration::from_secs(3);

/// Why the loop should end once nothing is in the air.
#[derive(Debug)]
enum Ending {
    Stopped,
    Failed(Error),
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
    target_created: String,
    abilities: Abilities,
    rules: Rules,
    reader: Intake,
    /// Whether the source is read now.
    reads: bool,
    writer: Writer,
    window: Window,
    already: Already,
    gaps: Gaps,
    /// Whether jumps in the source's sequences may be losses.
    plain: bool,
    /// What the source had removed below this when the run began is told already.
    told_first: u64,
    info_request: Option<String>,
    next_info: Instant,
    copy: CopyStatus,
    began: Instant,
    next_tick: Instant,
    moved: Instant,
    ending: Option<(Ending, Instant)>,
    /// Left out by request, and not told yet.
    skipped: Option<u64>,
}

impl<'a> Run<'a> {
    /// Connects both sides, finds out where to resume, and creates the consumer.
    pub async fn start(
        job: &'a Job,
        ledger: &mut Ledger,
        status: &'a watch::Sender<(State, CopyStatus)>,
        events: &'a Events,
    ) -> Result<Self, Error> {
        status.send_modify(|(state, copy)| {
            *state = State::Starting;
            copy.source.stream.clone_from(&job.replication.source.stream);
            copy.target.stream.clone_from(&job.replication.target.stream);
        });
        let replication = Arc::new(job.replication.clone());
        let name = format!("{} {}", names::PROGRAM, replication.id);
        let (mut source, mut target) = tokio::try_join!(
            async { job.dial.dial(&replication.source.place, &name).await.map_err(|e| e.context("source")) },
            async { job.dial.dial(&replication.target.place, &name).await.map_err(|e| e.context("target")) },
        )?;
        let source_info = Api::new(&mut source).stream_info(&replication.source.stream).await;
        let source_info = source_info.map_err(|e| e.context("source"))?;
        let source_info = source_info.ok_or_else(|| {
            Error::new(ErrorKind::Hold, format!("source stream `{}` does not exist", replication.source.stream))
        })?;
        let opened = target::open(&mut target, &replication, &source_info).await;
        let (target_info, made) = opened.map_err(|e| e.context("target"))?;
        if made {
            info!(replication = replication.id, stream = replication.target.stream, "target stream created");
        }
        // Again: what an older holder copied meanwhile is no proof that the source lost its end.
        let again = Api::new(&mut source).stream_info(&replication.source.stream).await?;
        let source_info = again.unwrap_or(source_info);
        let mut abilities = target::abilities(&replication, &source_info, &target_info)?;
        if ledger.record().moved_back {
            ledger.look_behind(target_info.state.last_seq, &target_info.created).await?;
        }
        let durable = match Durable::is_needed(&source_info) {
            true => Durable::find(&mut source, &replication).await.map_err(|e| e.context("source"))?,
            false => None,
        };
        let tag = Tag::new(&replication.source.stream, &job.site, &replication.name);
        let sides = Sides {
            replication: &replication,
            tag: &tag,
            source_lane: &mut source,
            target_lane: &mut target,
            source: &source_info,
            target: &target_info,
            durable: durable.as_ref(),
            chain_broke_behind: ledger.chain_broke_behind(),
        };
        let resume = resume::find(sides, ledger.record(), abilities.mode).await?;
        abilities.share(resume.mode);
        if Durable::is_needed(&source_info) {
            ledger.uses_durable().await?;
        }
        let reader = Intake::open(&mut source, &replication, &source_info, durable, resume.position.seq).await;
        let reader = reader.map_err(|e| e.context("source"))?;
        ledger.begin_at(target_info.state.last_seq);
        let generation = ledger.record().generation;
        let writer = Writer::open(&mut target, replication.clone(), tag.clone(), abilities, &target_info, generation);
        let now = Instant::now();
        let mut copy = status.borrow().1.clone();
        if !copy.source.server.is_empty() {
            copy.counters.consumers_recreated += 1;
        }
        copy.source.server.clone_from(&source.info().server_name);
        copy.target.server.clone_from(&target.info().server_name);
        copy.source.connected = true;
        copy.target.connected = true;
        copy.transport = abilities.transport;
        copy.target_mode = abilities.mode;
        let mut run = Self {
            job,
            status,
            events,
            plain: is_plain(&replication, &source_info),
            told_first: source_info.state.first_seq,
            rules: Rules { max_age: replication.max_age, tag },
            replication,
            source,
            target,
            source_info,
            target_created: target_info.created,
            abilities,
            reader,
            reads: true,
            writer,
            window: Window::new(resume.position, resume.target),
            already: Already::default(),
            gaps: Gaps::default(),
            info_request: None,
            next_info: now + INFO_EVERY,
            copy,
            began: now,
            next_tick: now,
            moved: now,
            ending: None,
            skipped: None,
        };
        run.resumed(resume, ledger);
        Ok(run)
    }

    /// Tells where the run goes on and what was found on the way there.
    fn resumed(&mut self, resume: Resume, ledger: &mut Ledger) {
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
        self.already = resume.already;
        self.window.keep_target(!self.already.is_empty());
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
        let event = Event::Poison { source_seq, message, action: PoisonAction::Skipped };
        self.events.emit(event, &self.replication.id);
    }

    /// Copies until the stop or an error; the position is saved at the end of both.
    pub async fn copy(mut self, ledger: &mut Ledger, stop: CancellationToken) -> Result<(), Error> {
        let result = self.copy_loop(ledger, &stop).await;
        self.settle();
        self.tell(State::Running);
        match result {
            Ok(()) => {
                let _ = tokio::time::timeout(LAST_ACKS, self.tell_all()).await;
                self.reader.close(&mut self.source);
                // The consumer would go by itself; its deletion is a courtesy that must not hold up a stop.
                let _ = tokio::time::timeout(LAST_SAVE, flush(&mut self.source)).await;
                let row = row(self.job, &self.copy);
                let witnesses = witnesses(&self.window, &self.abilities, &self.source_info, &self.target_created);
                Ok(ledger.save_now(witnesses, row).await?)
            }
            Err(error) if error.kind == ErrorKind::Superseded => Err(error),
            Err(error) => {
                // First of all nothing more may be sent.
                drop((self.source, self.target));
                let row = row(self.job, &self.copy);
                let witnesses = witnesses(&self.window, &self.abilities, &self.source_info, &self.target_created);
                match tokio::time::timeout(LAST_SAVE, ledger.save_now(witnesses, row)).await {
                    Ok(Err(conflict @ SaveError::Conflict { .. })) => Err(conflict.into()),
                    // What was not saved is found out at the target.
                    _ => Err(error),
                }
            }
        }
    }

    /// Waits until the source knows what was copied: some consumers take acks only now and then. What it does not learn
    /// is delivered to the next run, which leaves it out.
    async fn tell_all(&mut self) -> Result<(), Error> {
        loop {
            self.reader.settled(&mut self.source, self.window.position().seq);
            if self.reader.is_told() {
                return Ok(());
            }
            if let Turn::Received(batch) = self.source.turn().await? {
                self.reader.accept(batch)?;
            }
        }
    }

    async fn copy_loop(&mut self, ledger: &mut Ledger, stop: &CancellationToken) -> Result<(), Error> {
        loop {
            let now = Instant::now();
            self.pump(now)?;
            self.writer.outcome(&self.window, now)?;
            if let Some(end) = self.ended(now) {
                return end;
            }
            if now >= self.next_tick {
                self.tick(now, ledger)?;
            }
            let supply = self.supply();
            self.writer.commit_if_due(&mut self.target, supply, now);
            self.reader.settled(&mut self.source, self.window.position().seq);
            self.reads = self.reader.may_read(&self.job.budget);
            let wake = self.writer.next_commit(supply).map_or(self.next_tick, |at| at.min(self.next_tick));
            tokio::select! {
                biased;
                () = stop.cancelled(), if self.ending.is_none() => self.end(Ending::Stopped),
                // Before the lanes: it is rarely ready, and while both are busy it would never be looked at.
                saved = poll_fn(|cx| ledger.poll(cx)) => self.saved(saved)?,
                turn = self.target.turn() => {
                    if let Turn::Received(batch) = turn.map_err(|e| e.context("target"))? {
                        self.take_acks(&batch)?;
                    }
                }
                turn = self.source.turn(), if self.reads => {
                    if let Turn::Received(batch) = turn.map_err(|e| e.context("source"))? {
                        self.take_messages(batch)?;
                    }
                }
                () = sleep_until(wake) => {}
            }
        }
    }

    fn supply(&self) -> Supply {
        if self.ending.is_some() || self.reader.pending() == 0 {
            Supply::Dry
        } else if self.reader.is_barred() || self.reader.peek().is_some_and(|incoming| self.full(incoming.bytes())) {
            Supply::Barred
        } else {
            Supply::Coming
        }
    }

    /// Whether the bounds keep back a message of so many bytes.
    fn full(&self, bytes: usize) -> bool {
        let limits = &self.replication.limits;
        self.window.len() >= limits.messages_in_flight
            || (!self.window.is_empty() && self.window.bytes() + bytes > limits.bytes_in_flight)
    }

    /// Decides about what was read and sends it, as far as the bounds allow; then asks for more.
    fn pump(&mut self, now: Instant) -> Result<(), Error> {
        if self.ending.is_some() {
            return Ok(());
        }
        let now_ns = Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX);
        let read_at = now.duration_since(self.began).as_micros() as u64;
        let writable = self.target.output().len() < OUTPUT_LOW;
        while let Some(incoming) = self.reader.peek().filter(|_| writable) {
            let bytes = incoming.bytes();
            if self.full(bytes) || !self.writer.ready() || self.target.output().len() >= OUTPUT_HIGH {
                break;
            }
            let seq = incoming.delivery.stream_seq;
            let time_ns = incoming.delivery.time_ns;
            let source = SourcePoint { seq, time_ns: Some(time_ns) };
            let expected = (incoming.after + 1).max(self.told_first);
            // What is gone at the source and lies at the target already is not lost.
            if self.plain && seq > expected && self.already.within(expected, seq - 1) < seq - expected {
                self.gaps.jumped(expected, seq - 1);
            }
            let counters = &mut self.copy.counters;
            let mapped = || transform::subject(&self.replication.mapping, incoming.message.subject);
            let known = self.already.take(seq, time_ns, mapped);
            self.window.keep_target(!self.already.is_empty());
            match known {
                _ if self.job.skip == Some(SourceMessage { seq, time_ns }) => {
                    counters.skipped_refused += 1;
                    counters.skipped_bytes += bytes as u64;
                    self.window.skip(source);
                    self.moved = now;
                    self.skipped = Some(seq);
                }
                Some(Known::Stored(target_seq)) => self.window.stored_before(source, target_seq),
                Some(Known::Replaced) => self.window.skip(source),
                None => match self.rules.decide(time_ns, incoming.message.header, now_ns) {
                    Decision::Skip(reason) => {
                        match reason {
                            Reason::Old => counters.skipped_old += 1,
                            Reason::Loop => counters.skipped_filtered += 1,
                        }
                        counters.skipped_bytes += bytes as u64;
                        self.window.skip(source);
                        self.moved = now;
                    }
                    Decision::Copy => {
                        let window = &mut self.window;
                        let sent = self.writer.send(&mut self.target, window, &incoming, now, now_ns, read_at);
                        if let Err(error) = sent {
                            counters.refused += 1;
                            self.end(Ending::Failed(error));
                            break;
                        }
                    }
                },
            }
            counters.received += 1;
            counters.received_bytes += bytes as u64;
            self.reader.take();
            self.next_tick = self.next_tick.min(now + TICK);
        }
        if let Some(seq) = self.skipped.take() {
            self.left_out(seq);
        }
        if self.ending.is_none() {
            self.reader.pull(&mut self.source, &self.job.budget);
        }
        Ok(())
    }

    fn take_acks(&mut self, batch: &Batch) -> Result<(), Error> {
        let now = Instant::now();
        for message in batch.iter() {
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
    }

    fn take_messages(&mut self, batch: Batch) -> Result<(), Error> {
        if let Some(request) = &self.info_request {
            let answer = batch.iter().find(|m| m.sid == Lane::REQUEST_SID && m.subject == request.as_bytes());
            if let Some(info) = answer.map(|message| decode::<StreamInfo>(message.payload)) {
                self.info_request = None;
                self.source_says(info?);
            }
        }
        Ok(self.reader.accept(batch)?)
    }

    fn source_says(&mut self, info: StreamInfo) {
        for (from, to) in self.gaps.first_is(info.state.first_seq) {
            self.found(Event::Gap { from, to, messages: to - from + 1 });
        }
        self.source_info.state = info.state;
    }

    /// What is due now and then: status, save, questions, and whether everything still moves.
    fn tick(&mut self, now: Instant, ledger: &mut Ledger) -> Result<(), Error> {
        self.settle();
        self.tell(State::Running);
        let idle = self.window.is_empty() && self.reader.pending() == 0;
        let witnesses = witnesses(&self.window, &self.abilities, &self.source_info, &self.target_created);
        let saved = ledger.save(now, witnesses, || row(self.job, &self.copy));
        self.next_tick = now
            + match (idle, saved) {
                (true, true) => TICK_SAVED,
                (true, false) => TICK_IDLE,
                (false, _) => TICK,
            };
        if now >= self.next_info || (self.info_request.is_none() && self.gaps.ask(now)) {
            self.next_info = now + INFO_EVERY;
            let subject = format!("{}.STREAM.INFO.{}", self.source.api_prefix(), self.replication.source.stream);
            self.info_request = Some(self.source.send_request(&subject, b""));
        }
        if self.window.is_empty() && self.reader.peek().is_none() {
            self.moved = now;
        } else if now.duration_since(self.moved) > STALL {
            let count = self.window.len();
            let message = format!("nothing moved for {STALL:?}: {count} messages wait for the target's confirmation");
            return Err(Error::new(ErrorKind::Retry, message));
        }
        Ok(self.reader.check(now, self.reads)?)
    }

    /// Brings the status up to date.
    fn tell(&mut self, state: State) {
        let copy = &mut self.copy;
        let position = self.window.position();
        copy.position =
            Position { source_seq: position.seq, target_seq: self.window.target().map_or(0, |target| target.seq) };
        copy.source.first_seq = self.source_info.state.first_seq;
        copy.source.last_seq = self.source_info.state.last_seq.max(self.window.newest().seq);
        copy.target.last_seq = self.writer.last_seq();
        let oldest = self.window.oldest().and_then(|point| point.time_ns).or(self.reader.oldest_time_ns());
        let now_ns = Utc::now().timestamp_nanos_opt().unwrap_or_default();
        copy.lag = Lag {
            messages: self.reader.pending() + self.window.len() as u64,
            seconds: oldest.map_or(0.0, |time| now_ns.saturating_sub(time).max(0) as f64 / 1e9),
        };
        copy.in_flight.messages = self.window.len() as u64;
        copy.in_flight.bytes = self.window.bytes() as u64;
        copy.counters.headers_removed += std::mem::take(&mut self.writer.headers_removed);
        copy.counters.refused += std::mem::take(&mut self.writer.refused);
        self.status.send_modify(|(told_state, told)| {
            *told_state = state;
            // The caller's notes on earlier errors stay.
            let last_error = told.last_error.take();
            *told = copy.clone();
            told.last_error = last_error;
        });
    }

    fn saved(&self, result: Result<(), SaveError>) -> Result<(), Error> {
        match result {
            Err(conflict @ SaveError::Conflict { .. }) => Err(conflict.into()),
            // The copy goes on: what is at the target tells where it stands. The next save tries again.
            Err(error) => {
                warn!(replication = self.replication.id, %error, "position not saved");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn end(&mut self, ending: Ending) {
        let now = Instant::now();
        self.writer.commit(&mut self.target, now);
        self.ending = Some((ending, now + DRAIN));
    }

    /// Whether an ending that was begun is complete.
    fn ended(&mut self, now: Instant) -> Option<Result<(), Error>> {
        let (_, deadline) = self.ending.as_ref()?;
        if !self.window.is_empty() && now < *deadline {
            return None;
        }
        if !self.window.is_empty() {
            let messages = self.window.len();
            warn!(replication = self.replication.id, messages, "not settled in time; the next run looks for them");
        }
        let (ending, _) = self.ending.take()?;
        Some(match ending {
            Ending::Failed(error) => Err(error),
            Ending::Stopped => Ok(()),
        })
    }
}

fn witnesses<'w>(
    window: &'w Window,
    abilities: &Abilities,
    source: &'w StreamInfo,
    target_created: &'w str,
) -> Witnesses<'w> {
    Witnesses { window, mode: abilities.mode, source_created: &source.created, target_created }
}

/// Writes everything; what arrives meanwhile is nobody's.
async fn flush(lane: &mut Lane) -> Result<(), Error> {
    while !lane.output().is_empty() {
        lane.turn().await?;
    }
    Ok(())
}

fn row(job: &Job, copy: &CopyStatus) -> Row {
    Row { state: State::Running, copy: copy.clone(), ..job.row.clone() }
}
