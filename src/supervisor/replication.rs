//! One life: claim the position record, copy, survive errors, follow the document, until it is deleted or the
//! process stops.
//!
//! [`Life`] decides what runs; its [`Session`] keeps that running. The session is a future of the life, not a task:
//! dropping the life drops the run and with it every connection of the copy path.

use std::{convert::Infallible, future::pending, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    Deps,
    board::{Board, Mark},
    desired::{Plan, Planner, Rejected, Work},
    group::Group,
    headroom::Watch,
    marks::{Marks, Release},
    neighbours::Neighbours,
    outage::Outage,
    trouble::Trouble,
};
use crate::{
    backoff::{Backoff, jitter},
    config::Replication,
    copy::{self, Error, ErrorKind, Escalation, Job, Ledger},
    events::{Event, Step},
    status::{Row, State},
    store::{MarkKind, PositionRecord, SaveError, WriteError},
};

/// Attempts after an error that passes.
const RETRY: Backoff = Backoff::RETRY;

/// The next attempt after one that took long.
const SOON: Duration = Duration::from_millis(200);

/// Attempts while held.
const HELD: Duration = copy::LONGEST_PAUSE;

/// So long what is in the air may take to settle when a run stops; then the run is dropped.
const SETTLE: Duration = Duration::from_secs(10);

/// An instance that is there has renewed its session within this time.
const RENEWED: Duration = Duration::from_secs(5);

/// An instance that is there has stopped a paused replication within this time.
const STOPPED: Duration = Duration::from_secs(15);

/// How often a record is looked at that another instance will write.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// So long the last row may take to be saved.
const LAST_SAVE: Duration = Duration::from_secs(2);

/// So long a run must have been in order before an outage is over.
const STEADY: Duration = Duration::from_secs(1);

/// So long a replication that goes on looks for its position before it tells it.
const LOOK: Duration = Duration::from_secs(2);

/// A mark that could not be removed is removed after this.
const UNMARK_AGAIN: Duration = Duration::from_secs(5);

/// Whose life it is.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) deps: Arc<Deps>,
    pub(super) id: String,
    pub(super) board: Arc<Board>,
    pub(super) group: Group,
    pub(super) neighbours: Neighbours,
}

impl Context {
    pub(super) fn emit(&self, event: Event) {
        self.deps.events.emit(event, &self.id);
    }
}

/// What follows the document of one replication.
pub(super) struct Life {
    context: Context,
    planner: Planner,
    marks: watch::Receiver<Marks>,
    stop: CancellationToken,
    session: Session,
    refusals: Refusals,
}

/// Why a document runs no longer.
enum Next {
    /// Another one replaces it.
    Plan(Box<Plan>),
    /// It stalls: everything begins anew.
    Anew,
    /// The replication was paused.
    Pause,
}

impl Life {
    pub(super) fn new(
        context: Context,
        planner: Planner,
        marks: watch::Receiver<Marks>,
        stop: CancellationToken,
    ) -> Self {
        let session = Session::new(context.clone(), marks.clone());
        Self { context, planner, marks, stop, session, refusals: Refusals::default() }
    }

    /// Until the stop. Waits for `delay` first.
    pub(super) async fn run(mut self, delay: Duration) {
        let stop = self.stop.clone();
        let first = async {
            sleep(delay).await;
            self.planner.current().await
        };
        let mut plan = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            plan = first => Some(plan),
        };
        while let Some(now) = plan {
            self.refusals.report(&self.context, now.rejected);
            plan = match now.work {
                work if self.marks.borrow().paused => self.rest(work).await,
                Some(work) => self.follow(work).await,
                None => self.idle().await,
            };
        }
        self.session.finish().await;
    }

    /// Nothing can run: waits for a better document.
    async fn idle(&mut self) -> Option<Plan> {
        self.context.board.set_state(State::Invalid);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            () = paused(&mut self.marks) => Some(Plan { work: None, rejected: None }),
            plan = self.planner.next() => Some(plan),
        }
    }

    /// Nothing runs, whatever the document says, until the pause is taken back.
    async fn rest(&mut self, mut work: Option<Work>) -> Option<Plan> {
        let Self { context, planner, marks, stop, session, refusals } = self;
        let mut headroom = std::mem::take(&mut session.headroom);
        {
            let mut resting = pin!(session.rest());
            let mut rested = false;
            // A plan may have been forgotten on the way here, see `Planner::next`.
            let mut newest = false;
            loop {
                let newer = async { if newest { planner.next().await } else { planner.current().await } };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return None,
                    Ok(_) = marks.wait_for(|marks| !marks.paused) => break,
                    () = &mut resting, if !rested => (rested, newest) = (true, false),
                    never = headroom.alone(context, work.as_ref().map(|work| &work.replication)) => match never {},
                    plan = newer => {
                        newest = true;
                        refusals.report(context, plan.rejected);
                        if let Some(new) = plan.work {
                            context.board.set_revision(new.revision);
                            if work.as_ref().is_some_and(|old| old.replication != new.replication) {
                                context.emit(Event::ConfigChanged { revision: new.revision });
                            }
                            work = Some(new);
                        }
                    }
                }
            }
        }
        session.headroom = headroom;
        if session.superseded {
            stop.cancelled().await;
            return None;
        }
        session.go_on().await;
        let mut plan = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            plan = planner.current() => plan,
        };
        plan.work = plan.work.or(work);
        Some(plan)
    }

    /// Runs a document until another one replaces it, and ends that run in order.
    async fn follow(&mut self, mut work: Work) -> Option<Plan> {
        let mut next = match self.copy_until_replaced(&mut work).await? {
            Next::Plan(plan) => *plan,
            Next::Pause => return Some(Plan { work: Some(work), rejected: None }),
            Next::Anew => return self.begin_anew(work).await,
        };
        if self.planner.is_outdated() {
            next = tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                plan = self.planner.current() => plan,
            };
        }
        // Without one, everything valid was pushed out of the history meanwhile: what ran is the newest valid one.
        let new = next.work.get_or_insert(work);
        info!(replication = self.context.id, revision = new.revision, "follows the changed document");
        self.context.emit(Event::ConfigChanged { revision: new.revision });
        Some(next)
    }

    /// As after a start, but with what ran if nothing else can.
    async fn begin_anew(&mut self, work: Work) -> Option<Plan> {
        let mut plan = tokio::select! {
            biased;
            () = self.stop.cancelled() => return None,
            plan = self.planner.current() => plan,
        };
        plan.work.get_or_insert(work);
        Some(plan)
    }

    /// A document that cannot run replaces nothing, and one that says the same only brings its revision.
    async fn copy_until_replaced(&mut self, work: &mut Work) -> Option<Next> {
        let replication = work.replication.clone();
        let stop = CancellationToken::new();
        let mut copying = pin!(self.session.copy(&replication, work.revision, &stop));
        let next = loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break None,
                () = paused(&mut self.marks) => break Some(Next::Pause),
                plan = self.planner.next() => {
                    if plan.work.as_ref().is_some_and(|new| new.replication != replication) {
                        break Some(Next::Plan(Box::new(plan)));
                    }
                    if let Some(new) = plan.work {
                        self.context.board.set_revision(new.revision);
                        work.revision = new.revision;
                    }
                    self.refusals.keep(&self.context, work, plan.rejected.as_ref());
                    self.refusals.report(&self.context, plan.rejected);
                }
                ended = &mut copying => {
                    if ended == Ended::Stalled {
                        return Some(Next::Anew);
                    }
                    // Superseded: nothing of ours may run again, whatever the document says.
                    self.stop.cancelled().await;
                    return None;
                }
            }
        };
        stop.cancel();
        if timeout(SETTLE, copying).await.is_err() {
            let id = &self.context.id;
            warn!(replication = id, "did not settle within {SETTLE:?}; what was in the air is copied again");
        }
        next
    }
}

/// Waits for a pause.
async fn paused(marks: &mut watch::Receiver<Marks>) {
    if marks.wait_for(|marks| marks.paused).await.is_err() {
        // Nobody is left to pause anything; the stop is on its way.
        pending::<()>().await;
    }
}

/// Documents that were refused.
#[derive(Default)]
struct Refusals {
    /// Revision that was told last.
    told: u64,
    /// The document that was kept last.
    kept: Option<Bytes>,
}

impl Refusals {
    /// Keeps the document that runs beside newer ones that cannot: the bucket forgets it when these are many.
    fn keep(&mut self, context: &Context, work: &Work, rejected: Option<&Rejected>) {
        if rejected.is_none() || self.kept.as_ref() == Some(&work.document) {
            return;
        }
        self.kept = Some(work.document.clone());
        let (context, document) = (context.clone(), work.document.clone());
        // Beside the copy, without holding it up.
        tokio::spawn(async move {
            if let Err(error) = context.deps.config.mark(&context.id, MarkKind::Valid, document).await {
                warn!(replication = context.id, "the newest valid document was not kept: {error}");
            }
        });
    }

    /// Says once per revision why a document is not followed.
    fn report(&mut self, context: &Context, rejected: Option<Rejected>) {
        let Some(rejected) = rejected.filter(|rejected| rejected.revision != self.told) else { return };
        self.told = rejected.revision;
        let message = rejected.message();
        error!(replication = context.id, "document refused: {message}");
        context.board.rejected(&message);
        context.emit(Event::ConfigRejected { revision: rejected.revision, problems: rejected.problems.0 });
    }
}

/// Why nothing is copied any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// By request.
    Stopped,
    /// Another instance holds the replication.
    Superseded,
    /// Nothing moves, whatever connections are made.
    Stalled,
}

/// What keeps a document running.
struct Session {
    context: Context,
    marks: watch::Receiver<Marks>,
    /// Revision of the release that was acted upon last.
    released: Option<u64>,
    /// Taken out while somebody writes with it: `None` until it is claimed, and when a write was dropped or
    /// refused, so that what the bucket holds is in doubt.
    ledger: Option<Ledger>,
    backoff: Backoff,
    outage: Outage,
    escalation: Escalation,
    headroom: Watch,
    /// Whether the start of this document has been told.
    told: bool,
    /// The last row was not saved, whatever the ledger remembers.
    unsaved: bool,
    /// Another instance holds the record: it is not touched again.
    superseded: bool,
    /// Epoch of the last claim, also when the ledger is lost.
    epoch: Option<u64>,
    /// The end of a pause was told, and no other pause since.
    resumed: bool,
}

impl Session {
    fn new(context: Context, marks: watch::Receiver<Marks>) -> Self {
        Self {
            context,
            marks,
            released: None,
            ledger: None,
            backoff: RETRY,
            outage: Outage::default(),
            escalation: Escalation::default(),
            headroom: Watch::default(),
            told: false,
            unsaved: false,
            superseded: false,
            epoch: None,
            resumed: false,
        }
    }

    /// Copies until `stop`, until another instance holds the replication, or until only a new beginning may help.
    async fn copy(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> Ended {
        self.told = false;
        self.backoff.reset();
        self.context.board.adopt(replication, revision);
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let result = self.attempt(replication, stop).await;
            self.context.board.run_over();
            let error = match result {
                Ok(()) if stop.is_cancelled() => return Ended::Stopped,
                Ok(()) => Error::new(ErrorKind::Retry, "it ended unasked"),
                Err(error) => error,
            };
            let outcome = match error.kind {
                ErrorKind::Superseded => Err(error),
                _ => self.survive(error, replication, begun, stop).await,
            };
            match outcome {
                Ok(Step::Everything) if !stop.is_cancelled() => {
                    // What the bucket says counts, not what is remembered of it.
                    self.ledger = None;
                    return Ended::Stalled;
                }
                Ok(_) => {}
                Err(superseded) => {
                    self.give_up(&superseded);
                    return Ended::Superseded;
                }
            }
        }
        Ended::Stopped
    }

    /// One run.
    async fn attempt(&mut self, replication: &Replication, stop: &CancellationToken) -> Result<(), Error> {
        self.context.board.set_state(State::Starting);
        // Before anything can fail: what was acted upon is acted upon once.
        let release = self.marks.borrow().release;
        self.released = release.map(|release| release.revision);
        {
            let mut claim = pin!(self.claim());
            tokio::select! {
                biased;
                claimed = &mut claim => claimed?,
                () = stop.cancelled() => {
                    // Its write may be on the way: who waits for the end of this life to remove the record must
                    // not find it written afterwards.
                    let _ = timeout(LAST_SAVE, claim).await;
                    return Ok(());
                }
            }
        }
        let Some(mut ledger) = self.ledger.take() else { return Ok(()) };
        let Self { context, marks, told, outage, headroom, .. } = self;
        let Context { deps, board, .. } = &*context;
        let job = Job {
            site: deps.site.clone(),
            replication: replication.clone(),
            row: board.row(),
            budget: deps.budget.clone(),
            skip: release.and_then(|release| release.skip),
            neighbour: context.neighbours.of(replication),
            dial: Arc::new(deps.rules.clone()),
        };
        let saved = ledger.saved();
        let before = board.mark();
        let run = copy::run(&job, &mut ledger, board.status(), &deps.events, stop.clone());
        let run = AssertUnwindSafe(run).catch_unwind();
        let result = tokio::select! {
            biased;
            result = run => result,
            never = observe(context, before, replication, told, outage) => match never {},
            never = clear_release(context, marks.clone(), saved, |_| true) => match never {},
            never = headroom.beside(context) => match never {},
        };
        if self.context.board.mark() != before {
            self.backoff.reset();
            self.escalation.over();
        }
        let result = result
            .map_err(|panic| Error::new(ErrorKind::Retry, format!("the copy panicked: {}", panic_text(&*panic))))?;
        self.ledger = Some(ledger);
        result
    }

    async fn claim(&mut self) -> Result<(), Error> {
        if self.ledger.is_none() {
            let Context { deps, id, board, .. } = &self.context;
            let claim = deps.positions.claim(id, &deps.instance).await.map_err(|error| {
                Error::new(ErrorKind::Retry, format!("the position record cannot be claimed: {error}"))
            })?;
            board.claimed(&claim.record);
            self.epoch = Some(claim.record.epoch);
            let another = |holder: &String| !holder.is_empty() && *holder != deps.instance;
            let previous = Some(claim.previous.clone()).filter(another);
            self.context.emit(Event::Leader { epoch: claim.record.epoch, previous });
            self.ledger = Some(Ledger::new(deps.positions.clone(), deps.events.clone(), id, claim));
        }
        Ok(())
    }

    /// Reports an error of the attempt that began at `begun`, and waits for the next one; says what is made anew for
    /// it. There is none if the record turns out to be another's.
    async fn survive(
        &mut self,
        error: Error,
        replication: &Replication,
        begun: Instant,
        stop: &CancellationToken,
    ) -> Result<Step, Error> {
        if stop.is_cancelled() {
            warn!(replication = self.context.id, "ended with an error while it was stopped: {error}");
            self.context.board.failed(&error, None);
            return Ok(Step::Connections);
        }
        if !self.outage.is_open() {
            self.escalation.over();
        }
        let step = self.escalation.failed(&error);
        self.report(&error, step);
        let (state, delay) = match error.kind {
            ErrorKind::Hold => (State::Held, jitter(HELD, rand::random())),
            _ => {
                // What waits for answers that do not come has waited enough.
                let delay = self.backoff.next(rand::random());
                let left = delay.saturating_sub(begun.elapsed());
                (State::Retrying, left.max(delay.min(jitter(SOON, rand::random()))))
            }
        };
        let wake = Instant::now() + delay;
        self.context.board.set_state(state);
        let saved = self.ledger.as_ref().map(Ledger::saved);
        let (context, mut marks, acted_upon) = (self.context.clone(), self.marks.clone(), self.released);
        let asked = marks.clone();
        let released = |marks: &Marks| marks.release.is_some_and(|release| Some(release.revision) != acted_upon);
        let cleared = async {
            match saved {
                Some(saved) => {
                    // What nobody acted upon yet is for the next attempt.
                    let due = |release: &Release| Some(release.revision) == acted_upon;
                    clear_release(&context, asked, saved, due).await
                }
                None => pending().await,
            }
        };
        let mut headroom = std::mem::take(&mut self.headroom);
        let result = {
            let mut save_and_wait = pin!(async {
                self.save_row().await?;
                tokio::select! {
                    () = sleep_until(wake) => {}
                    Ok(_) = marks.wait_for(released) => self.backoff.reset(),
                }
                Ok(())
            });
            tokio::select! {
                biased;
                () = stop.cancelled() => Ok(step),
                result = &mut save_and_wait => result.map(|()| step),
                never = cleared => match never {},
                never = headroom.alone(&context, Some(replication)) => match never {},
            }
        };
        self.headroom = headroom;
        result
    }

    /// Paused: gives the record up, and says in it that the replication is paused.
    async fn rest(&mut self) {
        if self.superseded {
            return;
        }
        let board = &self.context.board;
        board.run_over();
        board.released();
        board.set_state(State::Paused);
        self.outage.over();
        self.ledger = None;
        let mut trouble = Trouble::new("that a replication is paused cannot be saved");
        let mut other = Other { since: Instant::now(), session: None };
        loop {
            match note_pause(&self.context, self.epoch, &mut other).await {
                Ok(Noted::Ours { news }) => {
                    if news || self.resumed {
                        self.tell_pause();
                    }
                    return;
                }
                Ok(Noted::Theirs) => sleep(LOOK_AGAIN).await,
                Ok(Noted::Anothers) => {
                    self.superseded = true;
                    return self.context.board.set_state(State::Stopped);
                }
                Err(error) => trouble.wait(&error.to_string()).await,
            }
        }
    }

    fn tell_pause(&mut self) {
        let Context { id, board, .. } = &self.context;
        let position = board.row().copy.position.source_seq;
        info!(replication = id, position, "paused");
        self.context.emit(Event::Paused { position });
        self.resumed = false;
    }

    /// The pause is over; the position may have been moved meanwhile.
    async fn go_on(&mut self) {
        self.resumed = true;
        let Context { deps, id, board, .. } = &self.context;
        board.set_state(State::Starting);
        if let Ok(Ok((record, _))) = timeout(LOOK, deps.positions.read(id)).await {
            board.looked_up(&record);
        }
        let position = board.row().copy.position.source_seq;
        info!(replication = id, position, "goes on after a pause");
        self.context.emit(Event::Resumed { position });
    }

    fn give_up(&mut self, error: &Error) {
        self.ledger = None;
        self.superseded = true;
        self.report(error, Step::Connections);
        self.context.board.released();
        self.context.board.set_state(State::Stopped);
    }

    fn report(&mut self, error: &Error, step: Step) {
        let Error { kind, message, .. } = error;
        let Context { id, board, .. } = &self.context;
        board.failed(error, (*kind == ErrorKind::Retry).then_some(step));
        let report = self.outage.failed(error, step);
        match (report.news, kind) {
            (false, _) => debug!(replication = id, "again: {message}"),
            (true, ErrorKind::Retry) => warn!(replication = id, "stalled, trying again: {message}"),
            (true, ErrorKind::Hold) => error!(replication = id, "held: {message}"),
            (true, ErrorKind::Superseded) => error!(replication = id, "stopped for good: {message}"),
        }
        for event in report.events {
            self.context.emit(event);
        }
    }

    /// Saves the row if the record does not say the same already. The only error is that the record is another
    /// instance's; what else fails is left to the next run, which needs the record.
    async fn save_row(&mut self) -> Result<(), Error> {
        let Some(mut ledger) = self.ledger.take() else { return Ok(()) };
        let row = self.context.board.row();
        let text = |row: &Row| row.copy.last_error.as_ref().map(|error| error.message.clone());
        let same = |saved: &Row| saved.state == row.state && text(saved) == text(&row);
        let is_saved = !self.unsaved && ledger.record().status.as_ref().is_some_and(same);
        let saved = if is_saved { Ok(()) } else { ledger.save_row(row).await };
        if let Err(error) = &saved {
            debug!(replication = self.context.id, "the status row was not saved: {error}");
        }
        self.unsaved = saved.is_err();
        match saved {
            Err(SaveError::Conflict { record, .. }) if record.epoch > ledger.record().epoch => {
                let message = format!("instance `{}` took over with epoch {}", record.holder, record.epoch);
                return Err(Error::new(ErrorKind::Superseded, message));
            }
            // Our own write of unknown outcome, or an edit by hand: the next attempt claims, and so reads, it.
            Err(SaveError::Conflict { .. } | SaveError::Deleted { .. }) => {}
            Ok(()) | Err(SaveError::Store(_)) => self.ledger = Some(ledger),
        }
        Ok(())
    }

    /// The life is over.
    async fn finish(mut self) {
        if self.superseded {
            return;
        }
        let Context { id, board, .. } = &self.context;
        board.run_over();
        board.set_state(State::Stopped);
        let position = board.row().copy.position.source_seq;
        if board.released() {
            info!(replication = id, position, "stopped");
            self.context.emit(Event::Stopped { position: Some(position), message: None });
        }
        let _ = timeout(LAST_SAVE, self.save_row()).await;
    }
}

/// Tells when a run has begun to copy and when an outage is over: the run is in order for a while, and moves unless
/// there is nothing to copy.
async fn observe(
    context: &Context,
    before: Mark,
    replication: &Replication,
    told: &mut bool,
    outage: &mut Outage,
) -> Infallible {
    let mut status = context.board.status().subscribe();
    let _ = status.wait_for(|(state, _)| *state == State::Running).await;
    if !std::mem::replace(told, true) {
        let (source, target) = (&replication.source.stream, &replication.target.stream);
        info!(replication = context.id, source, target, "copying");
        context.emit(Event::Started { epoch: context.board.row().epoch });
    }
    while outage.is_open() {
        sleep(STEADY).await;
        let row = context.board.row();
        if row.state == State::Running && (row.copy.lag.messages == 0 || context.board.mark() != before) {
            outage.over();
            info!(replication = context.id, position = row.copy.position.source_seq, "repaired");
            context.emit(Event::Repaired { position: row.copy.position.source_seq });
        }
    }
    pending().await
}

/// Whose record was found at a pause.
enum Noted {
    /// It says that the replication is paused, and did not before if that is `news`.
    Ours { news: bool },
    /// Another instance runs the replication: it will say so when it has stopped.
    Theirs,
    /// Another instance took it, and we had not noticed.
    Anothers,
}

/// Another instance that led the replication when it was paused.
struct Other {
    since: Instant,
    /// Revision of its session when it was looked at first.
    session: Option<u64>,
}

impl Other {
    /// Whether it is there, as far as can be told, and may not have stopped yet.
    fn may_run(&mut self, group: &Group, leader: &str) -> bool {
        let waited = self.since.elapsed();
        let Some(revision) = group.session(leader) else { return waited < RENEWED && !group.is_gone(leader) };
        let renewed = *self.session.get_or_insert(revision) != revision;
        waited < RENEWED || (renewed && waited < STOPPED)
    }
}

/// Says in the record that the replication is paused, unless it says so; of a record that another instance took
/// since `epoch` that one will say it.
async fn note_pause(context: &Context, epoch: Option<u64>, other: &mut Other) -> Result<Noted, SaveError> {
    let Context { deps, id, board, group, .. } = context;
    let (record, revision) = deps.positions.read(id).await?;
    board.looked_up(&record);
    if epoch.is_some_and(|epoch| epoch < record.epoch) && record.holder != deps.instance {
        return Ok(Noted::Anothers);
    }
    if record.status.as_ref().is_some_and(|row| row.state == State::Paused) {
        return Ok(Noted::Ours { news: false });
    }
    if record.leader().is_some_and(|leader| *leader != *deps.instance && other.may_run(group, leader)) {
        return Ok(Noted::Theirs);
    }
    let row = Row { epoch: record.epoch, ..board.row() };
    let nonce = u64::from(rand::random::<u32>());
    deps.positions.save(id, PositionRecord { status: Some(row), nonce, ..record }, revision).await?;
    Ok(Noted::Ours { news: true })
}

/// Removes a release that has done its work: another try has begun, or the message to leave out lies behind the saved
/// position.
async fn clear_release(
    context: &Context,
    mut marks: watch::Receiver<Marks>,
    mut saved: watch::Receiver<u64>,
    due: impl Fn(&Release) -> bool,
) -> Infallible {
    let Context { deps, id, .. } = context;
    loop {
        let release = marks.borrow_and_update().release.filter(&due);
        let cleared = async {
            let Some(release) = release else { return pending().await };
            if let Some(message) = release.skip
                && saved.wait_for(|seq| *seq >= message.seq).await.is_err()
            {
                return pending().await;
            }
            while let Err(WriteError::Store(error)) =
                deps.config.unmark(id, MarkKind::Release, Some(release.revision)).await
            {
                debug!(replication = id, "the release was not removed: {error}");
                sleep(UNMARK_AGAIN).await;
            }
            // What follows is told by the watch.
            pending::<()>().await;
        };
        tokio::select! {
            biased;
            changed = marks.changed() => if changed.is_err() {
                return pending().await;
            },
            () = cleared => {}
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
