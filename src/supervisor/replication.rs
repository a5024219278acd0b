//! One life: stand by until the lease is ours; then claim the position record, copy, survive errors, follow the
//! document, until the lease goes, the document is deleted or the process stops.
//!
//! [`Life`] stands by; its [`Reign`] decides what runs, for as long as the lease is ours; that one's [`Session`] keeps
//! it running. These are futures of the life, not tasks: dropping the reign drops the run and with it every connection
//! of the copy path.

use std::{convert::Infallible, future::pending, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use nats_lane::backoff::{Backoff, jitter};
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
    hand_back::{self, HandBack},
    headroom::Watch,
    marks::{Marks, Release},
    neighbours::Neighbours,
    outage::Outage,
    roll::Roll,
};
use crate::{
    config::Replication,
    copy::{self, Error, ErrorKind, Escalation, Job, PositionWriter},
    election::{Campaign, Election, Leadership, lost, won},
    events::{Event, Step},
    lease::{Candidacy, Grant},
    status::{CopyStatus, Row, State},
    store::{Claim, ClaimError, MarkKind, PositionRecord, SaveError, Trouble, WriteError},
};

/// Attempts after an error that passes.
const RETRY: Backoff = Backoff::RETRY;

/// The next attempt after one that took long.
const SOON: Duration = Duration::from_millis(200);

/// Attempts while held.
const HELD: Duration = copy::LONGEST_PAUSE;

/// So long what is in the air may take to settle when a run stops; then the run is dropped.
const SETTLE: Duration = Duration::from_secs(10);

/// Who found the record of somebody else under its own lease takes the lease again after this.
const AGAIN: Duration = Duration::from_secs(1);

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
    pub(super) neighbours: Neighbours,
}

impl Context {
    /// What the names of the copy's own consumers begin with.
    pub(super) fn consumers(&self) -> String {
        copy::consumer_prefix(&self.deps.site, &self.deps.installation, &self.id)
    }

    pub(super) fn emit(&self, event: Event) {
        self.deps.events.emit(event, &self.id);
    }
}

/// One replication in this process.
pub(super) struct Life {
    context: Context,
    planner: Planner,
    marks: watch::Receiver<Marks>,
    seat: Candidacy,
    stop: CancellationToken,
    refusals: Refusals,
    /// The senders, where it is sampled, as long as another instance leads.
    roll: Option<Roll>,
}

/// What follows the document while the lease is ours.
struct Reign<'a> {
    context: &'a Context,
    planner: &'a mut Planner,
    marks: watch::Receiver<Marks>,
    stop: CancellationToken,
    session: Session,
    refusals: &'a mut Refusals,
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
        seat: Candidacy,
        stop: CancellationToken,
    ) -> Self {
        Self { context, planner, marks, seat, stop, refusals: Refusals::default(), roll: None }
    }

    /// Until the stop. Waits for `delay` first.
    pub(super) async fn run(mut self, delay: Duration) {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = sleep(delay) => {}
        }
        loop {
            let tenure = tokio::select! {
                biased;
                () = stop.cancelled() => return self.context.board.set_state(State::Stopped),
                tenure = self.stand_by() => tenure,
            };
            let again = self.reign(&tenure).await;
            self.seat.ended(again);
        }
    }

    /// Waits for the lease, and shows meanwhile whether the document could run.
    async fn stand_by(&mut self) -> Grant {
        let Self { context, planner, seat, roll, .. } = self;
        let mut granted = pin!(seat.granted());
        let mut newest = false;
        loop {
            let plan = async { if newest { planner.next().await } else { planner.current().await } };
            tokio::select! {
                biased;
                tenure = &mut granted => return tenure,
                plan = plan => {
                    newest = true;
                    let board = &context.board;
                    if let Some(rejected) = &plan.rejected {
                        board.rejected(&rejected.message());
                    }
                    let sampling = plan.work.as_ref().and_then(|work| work.replication.sampling.as_ref());
                    if roll.as_ref().is_some_and(|roll| sampling.is_none_or(|sampling| !roll.knows_enough(sampling))) {
                        *roll = None;
                    }
                    if let (None, Some(sampling)) = (&roll, sampling) {
                        *roll = Some(Roll::follow(&context.deps.senders, &context.id, sampling));
                    }
                    board.set_samples(roll.as_ref().map(Roll::samples));
                    match plan.work {
                        Some(work) => {
                            board.adopt(&work.replication, work.revision);
                            board.set_state(State::Starting);
                        }
                        None => board.set_state(State::Invalid),
                    }
                }
            }
        }
    }

    /// Runs what is to run for as long as the lease is ours; says how long to leave it alone then.
    async fn reign(&mut self, tenure: &Grant) -> Duration {
        let stop = self.stop.child_token();
        let Self { context, planner, marks, refusals, roll, .. } = self;
        context.board.set_leads(true);
        let session = Session::new(context.clone(), marks.clone(), tenure.epoch, roll.take());
        let reign = Reign { context, planner, marks: marks.clone(), stop: stop.clone(), session, refusals };
        // In a box: a future in a future takes its room twice.
        let held = tenure.hold(&stop, Box::pin(reign.run())).await;
        let Context { id, board, .. } = &*context;
        board.set_leads(false);
        held.unwrap_or_else(|| {
            board.run_over();
            board.released();
            board.set_state(State::Stopped);
            let position = board.row().copy.position.source_seq;
            let why = tenure.why_lost();
            warn!(replication = id, epoch = tenure.epoch, position, "stopped, the lease is lost: {why}");
            let message = Some(why.to_owned());
            context.emit(Event::Stopped { position: Some(position), message });
            Duration::ZERO
        })
    }
}

impl Reign<'_> {
    /// Until the stop, or until the record turns out to be somebody else's; says how long to leave it alone then.
    async fn run(mut self) -> Duration {
        let stop = self.stop.clone();
        let mut plan = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            plan = self.planner.current() => Some(plan),
        };
        while let Some(now) = plan {
            self.refusals.report(self.context, now.rejected);
            plan = match now.work {
                work if self.marks.borrow().paused => self.rest(work).await,
                Some(work) => self.follow(work).await,
                None => self.idle().await,
            };
        }
        self.session.finish().await
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
                    never = keep_noted(context), if rested => match never {},
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
        if session.superseded || !session.go_on().await {
            return None;
        }
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
        // Whether it can run is not known yet.
        self.context.board.set_state(State::Starting);
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
                    self.refusals.keep(self.context, work, plan.rejected.as_ref());
                    self.refusals.report(self.context, plan.rejected);
                }
                ended = &mut copying => {
                    if ended == Ended::Stalled {
                        return Some(Next::Anew);
                    }
                    // Superseded: nothing of ours may run again under this lease, whatever the document says.
                    return None;
                }
            }
        };
        stop.cancel();
        if timeout(SETTLE, copying).await.is_err() {
            let id = &self.context.id;
            warn!(replication = id, "did not settle within {SETTLE:?}; messages in flight are copied again");
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
    ledger: Option<PositionWriter>,
    /// The one that is in doubt, for who stands alone and cannot reach the bucket.
    doubted: Option<PositionWriter>,
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
    /// Of the lease.
    epoch: u64,
    /// The beginning of our time was told.
    announced: bool,
    /// The end of a pause was told, and no other pause since.
    resumed: bool,
    /// The senders, where it is sampled.
    roll: Option<Roll>,
}

impl Session {
    fn new(context: Context, marks: watch::Receiver<Marks>, epoch: u64, roll: Option<Roll>) -> Self {
        Self {
            context,
            marks,
            released: None,
            ledger: None,
            doubted: None,
            backoff: RETRY,
            outage: Outage::default(),
            escalation: Escalation::default(),
            headroom: Watch::default(),
            told: false,
            unsaved: false,
            superseded: false,
            epoch,
            announced: false,
            resumed: false,
            roll,
        }
    }

    /// Copies until `stop`, until another instance holds the replication, or until only a new beginning may help; with
    /// Choria's election only while that is won.
    async fn copy(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> Ended {
        let Some(election) = Election::of(replication) else {
            return Box::pin(self.keep_copying(replication, revision, stop)).await;
        };
        let dial = Arc::new(self.context.deps.rules.clone());
        let campaign = Campaign::start(dial, replication.source.place.clone(), election);
        self.context.board.set_poll(Some(campaign.poll()));
        let ended = Box::pin(self.copy_while_won(replication, revision, stop, campaign.led())).await;
        self.context.board.set_poll(None);
        // What is in the air has settled, and the position is saved.
        campaign.stop().await;
        ended
    }

    async fn copy_while_won(
        &mut self,
        replication: &Replication,
        revision: u64,
        stop: &CancellationToken,
        mut led: watch::Receiver<Leadership>,
    ) -> Ended {
        let (id, board) = (self.context.id.clone(), self.context.board.clone());
        board.adopt(replication, revision);
        loop {
            board.set_state(State::Stopped);
            let seen = led.clone();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ended::Stopped,
                won = won(&mut led) => if !won {
                    return Ended::Stalled;
                },
                never = show_trouble(&board, seen) => match never {},
                never = note_wait(&self.context, self.epoch) => match never {},
            }
            info!(replication = id, "won Choria's election");
            tokio::select! {
                biased;
                // Whenever this task wakes, it is asked first.
                () = lost(&mut led) => {
                    warn!(replication = id, "lost Choria's election: nothing is copied until it is won again");
                    board.run_over();
                    board.released();
                    // What was saved last is read again.
                    self.doubt();
                    let message = Some("Choria's election was lost".to_owned());
                    let position = Some(board.row().copy.position.source_seq);
                    self.context.emit(Event::Stopped { position, message });
                }
                ended = self.keep_copying(replication, revision, stop) => return ended,
            }
        }
    }

    /// Copies until `stop`, until another instance holds the replication, or until only a new beginning may help; follows
    /// the lag and the headroom all the time.
    async fn keep_copying(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> Ended {
        let (context, mut headroom) = (self.context.clone(), std::mem::take(&mut self.headroom));
        let ended = tokio::select! {
            biased;
            ended = self.keep_trying(replication, revision, stop) => ended,
            never = headroom.follow(&context, replication) => match never {},
        };
        self.headroom = headroom;
        ended
    }

    async fn keep_trying(&mut self, replication: &Replication, revision: u64, stop: &CancellationToken) -> Ended {
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
                _ => self.survive(error, begun, stop).await,
            };
            match outcome {
                Ok(Step::Everything) if !stop.is_cancelled() => {
                    // What the bucket says counts, not what is remembered of it.
                    self.doubt();
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
        self.context.board.begin();
        // Before anything can fail: what was acted upon is acted upon once.
        let release = self.marks.borrow().release;
        self.released = release.map(|release| release.revision);
        {
            let mut claim = pin!(async {
                self.claim().await?;
                self.know_senders(replication).await
            });
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
        let Self { context, marks, told, outage, roll, .. } = self;
        let Context { deps, board, .. } = &*context;
        let job = Job {
            site: deps.site.clone(),
            installation: deps.installation.clone(),
            replication: replication.clone(),
            row: board.row(),
            budget: deps.budget.clone(),
            skip: release.and_then(|release| release.skip),
            neighbour: context.neighbours.of(replication),
            samples: roll.as_ref().map(Roll::samples),
            consumers: context.consumers(),
            own_streams: deps.own_streams.clone(),
            standalone: deps.standalone,
            dial: Arc::new(deps.rules.clone()),
        };
        let saved = ledger.saved();
        let before = board.mark();
        let mut hand_back = HandBack::of(replication);
        let run = Box::pin(copy::run(&job, &mut ledger, board.status(), &deps.events, stop.clone()));
        let run = AssertUnwindSafe(run).catch_unwind();
        let result = tokio::select! {
            biased;
            result = run => result,
            never = observe(context, before, replication, told, outage) => match never {},
            never = hand_back::follow(&mut hand_back, context, replication) => match never {},
            never = clear_release(context, marks.clone(), saved, |_| true) => match never {},
        };
        if self.context.board.mark() != before {
            self.backoff.reset();
            self.escalation.over();
        }
        let result = result
            .map_err(|panic| Error::new(ErrorKind::Retry, format!("the copy panicked: {}", panic_text(&*panic))))?;
        if result.is_ok() && stop.is_cancelled() {
            let position = *ledger.saved().borrow();
            hand_back::finish(hand_back, &self.context, replication, position).await;
        }
        self.ledger = Some(ledger);
        result
    }

    /// Knows the senders of a replication that is sampled; those of one that is not, or that tells them apart in another
    /// way than before, are forgotten.
    async fn know_senders(&mut self, replication: &Replication) -> Result<(), Error> {
        let Self { context: Context { deps, id, board, .. }, roll, ledger, .. } = self;
        let sampling = replication.sampling.as_ref();
        let record = ledger.as_ref().map(PositionWriter::record);
        let were_known = record.is_some_and(|record| record.sampled.is_some());
        let known_by = record.and_then(|record| record.inspected.as_ref());
        let others = known_by.is_some_and(|mark| sampling.is_some_and(|sampling| sampling.inspect.mark() != *mark));
        let unfit = roll.as_ref().is_some_and(|roll| sampling.is_none_or(|sampling| !roll.fits(sampling)));
        if unfit || others || (sampling.is_none() && were_known) {
            *roll = None;
            let emptied = deps.senders.empty(id).await;
            emptied.map_err(|error| Error::new(ErrorKind::Retry, error.to_string()))?;
        }
        if let Some(sampling) = sampling {
            if roll.as_ref().is_some_and(|roll| !roll.knows_enough(sampling)) {
                *roll = None;
            }
            let roll = roll.get_or_insert_with(|| Roll::follow(&deps.senders, id, sampling));
            let known = roll.lead(sampling).await;
            known.map_err(|error| Error::new(ErrorKind::Retry, error.to_string()))?;
        }
        board.set_samples(roll.as_ref().map(Roll::samples));
        Ok(())
    }

    /// What is remembered of the record may not be what it says.
    fn doubt(&mut self) {
        self.doubted = self.ledger.take().filter(|_| self.context.deps.standalone).or(self.doubted.take());
    }

    async fn claim(&mut self) -> Result<(), Error> {
        if self.ledger.is_none() {
            let Context { deps, id, board, .. } = &self.context;
            let claim = match deps.positions.claim(id, &deps.instance, self.epoch).await {
                Ok(claim) => claim,
                Err(error @ ClaimError::Newer { .. }) => {
                    return Err(Error::new(ErrorKind::Superseded, error.to_string()));
                }
                Err(ClaimError::Store(error)) => {
                    if let Some(doubted) = self.doubted.take() {
                        warn!(
                            replication = id,
                            "cannot save the position; continuing standalone from the position in memory: {error}"
                        );
                        self.ledger = Some(doubted);
                        return Ok(());
                    }
                    let message = format!("the position record cannot be claimed: {error}");
                    return Err(Error::new(ErrorKind::Retry, message));
                }
            };
            self.doubted = None;
            board.claimed(&claim.record);
            if !std::mem::replace(&mut self.announced, true) {
                let another = |holder: &String| !holder.is_empty() && *holder != deps.instance;
                let previous = Some(claim.previous.clone()).filter(another);
                self.context.emit(Event::Leader { epoch: claim.record.epoch, previous });
            }
            self.ledger = Some(PositionWriter::new(deps.positions.clone(), deps.events.clone(), id, claim));
        }
        Ok(())
    }

    /// Reports an error of the attempt that began at `begun`, and waits for the next one; says what is made anew for
    /// it. There is none if the record turns out to be another's.
    async fn survive(&mut self, error: Error, begun: Instant, stop: &CancellationToken) -> Result<Step, Error> {
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
        let saved = self.ledger.as_ref().map(PositionWriter::saved);
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
        let mut save_and_wait = pin!(async {
            self.save_row().await?;
            tokio::select! {
                () = sleep_until(wake) => {}
                Ok(_) = marks.wait_for(released) => {
                    // Somebody acted: whether that helped is not known yet.
                    self.backoff.reset();
                    context.board.set_state(State::Starting);
                }
            }
            Ok(())
        });
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(step),
            result = &mut save_and_wait => result.map(|()| step),
            never = cleared => match never {},
        }
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
        board.at_rest();
        self.outage.over();
        self.ledger = None;
        let mut trouble = Trouble::new("that a replication is paused cannot be saved");
        loop {
            match note_pause(&self.context, self.epoch).await {
                Ok(Noted::Ours { news }) => {
                    if news || self.resumed {
                        self.tell_pause();
                    }
                    return;
                }
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

    /// The pause is over. The position may have been moved meanwhile: then the lease has to be taken again with a greater
    /// epoch, and nothing goes on under this one.
    async fn go_on(&mut self) -> bool {
        self.resumed = true;
        let Context { deps, id, board, .. } = &self.context;
        board.set_state(State::Starting);
        let mut newest = true;
        if let Ok(Ok((record, _))) = timeout(LOOK, deps.positions.read(id)).await {
            board.looked_up(&record);
            // As a claim sees it: who moved the position has taken the epoch.
            newest = record.epoch < self.epoch || (record.epoch == self.epoch && record.holder == deps.instance);
        }
        let position = board.row().copy.position.source_seq;
        info!(replication = id, position, "resumes after a pause");
        self.context.emit(Event::Resumed { position });
        newest
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
            (true, ErrorKind::Superseded) => error!(replication = id, "gives it up: {message}"),
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
        let error = |row: &Row| row.copy.last_error.as_ref().map(|error| (error.message.clone(), error.current));
        // Its seconds are counted by those who read it.
        let lag = |row: &Row| row.copy.lag.map(|lag| (lag.messages, lag.oldest));
        let same = |saved: &Row| saved.state == row.state && error(saved) == error(&row) && lag(saved) == lag(&row);
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

    /// The time with this lease is over; says how long to leave the lease alone.
    async fn finish(mut self) -> Duration {
        if self.superseded {
            return AGAIN;
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
        Duration::ZERO
    }
}

/// Shows what keeps us from standing for election.
async fn show_trouble(board: &Board, mut led: watch::Receiver<Leadership>) -> Infallible {
    let mut told = None;
    loop {
        let error = led.borrow_and_update().error.clone();
        if let Some(text) = error.as_ref().filter(|_| error != told) {
            board.failed(&Error::new(ErrorKind::Retry, format!("Choria's election: {text}")), None);
        }
        if error.is_none() && told.is_some() {
            board.at_rest();
        }
        told = error;
        if led.changed().await.is_err() {
            return pending().await;
        }
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
        let caught_up = row.copy.lag.is_some_and(|lag| lag.messages == 0);
        if row.state == State::Running && (caught_up || context.board.mark() != before) {
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
    /// Another instance took it, and we had not noticed.
    Anothers,
}

/// Says in the record that the replication is paused, unless it says so, or is that of a newer holder.
async fn note_pause(context: &Context, epoch: u64) -> Result<Noted, SaveError> {
    let Context { deps, id, board, .. } = context;
    let (record, revision) = deps.positions.read(id).await?;
    board.looked_up(&record);
    if record.status.as_ref().is_some_and(|row| row.state == State::Paused) {
        return Ok(Noted::Ours { news: false });
    }
    if epoch < record.epoch && record.holder != deps.instance {
        return Ok(Noted::Anothers);
    }
    let row = Row { epoch: record.epoch, ..board.row() };
    let nonce = u64::from(rand::random::<u32>());
    deps.positions.save(id, PositionRecord { nonce, ..record }.reporting(row), revision).await?;
    Ok(Noted::Ours { news: true })
}

/// While it is paused, keeps in the record what waits at the source, as far as that is seen here: other instances answer
/// from there.
async fn keep_noted(context: &Context) -> Infallible {
    let Context { deps, id, board, .. } = context;
    let mut status = board.status().subscribe();
    // The lag is counted by the source's clock.
    let waits = |copy: &CopyStatus| (copy.lag.map(|lag| (lag.messages, lag.oldest)), copy.source.clock_offset_seconds);
    let mut noted = None;
    loop {
        let seen = waits(&status.borrow_and_update().1);
        if noted != Some(seen) {
            let result: Result<(), String> = async {
                let (mut record, revision) = deps.positions.read(id).await.map_err(|error| error.to_string())?;
                let own = board.row().copy;
                let Some(mut row) = record.status.take().filter(|row| row.state == State::Paused) else {
                    return Ok(());
                };
                let moved = row.copy.position.source_seq != own.position.source_seq;
                if moved || waits(&row.copy) == seen {
                    return Ok(());
                }
                (row.copy.lag, row.copy.headroom) = (own.lag, own.headroom);
                row.copy.source.first_seq = own.source.first_seq;
                row.copy.source.last_seq = own.source.last_seq;
                row.copy.source.clock_offset_seconds = own.source.clock_offset_seconds;
                record.nonce = u64::from(rand::random::<u32>());
                deps.positions
                    .save(id, record.reporting(row), revision)
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string())
            }
            .await;
            match result {
                Ok(()) => noted = Some(seen),
                Err(error) => debug!(replication = id, "lag and headroom of the source were not saved: {error}"),
            }
        }
        if status.changed().await.is_err() {
            return pending().await;
        }
    }
}

/// Says in the record, for those who ask other instances, that the replication is ours and waits for Choria's election.
async fn note_wait(context: &Context, epoch: u64) -> Infallible {
    let Context { deps, id, board, .. } = context;
    let noted: Result<(), String> = async {
        let claim = deps.positions.claim(id, &deps.instance, epoch).await.map_err(|error| error.to_string())?;
        let Claim { record, revision, .. } = claim;
        board.looked_up(&record);
        let row = Row { epoch: record.epoch, ..board.row() };
        let nonce = u64::from(rand::random::<u32>());
        let record = PositionRecord { electing: true, nonce, ..record }.reporting(row);
        deps.positions.save(id, record, revision).await.map(drop).map_err(|error| error.to_string())
    }
    .await;
    if let Err(error) = noted {
        debug!(replication = id, "that it waits for Choria's election was not saved: {error}");
    }
    pending().await
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
