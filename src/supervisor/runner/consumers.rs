//! Keeps the consumers that a document names at the target during a run, so that their subscribers can move there at any time.

use std::{collections::BTreeMap, convert::Infallible, future::pending, time::Duration};

use nats_lane::{Dial, Error, Lane, excerpt};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    config::Replication,
    copy::moved_consumers::{ConsumerMover, ConsumerOutcome, KnownStarts, PlannedConsumer, Selection},
    events::Event,
    names,
    status::{ConsumerError, ConsumersStatus, State},
    supervisor::{context::Context, status_cell::StatusCell},
};

/// Pause between two passes.
const REFRESH_EVERY: Duration = Duration::from_secs(3);
/// Deadline of a pass.
const REFRESH_WITHIN: Duration = Duration::from_secs(10);
/// Errors in the status, and consumers that one pass reports as events.
const SHOWN: usize = 20;
/// How long the end of a run waits for the pass that is under way.
const LAST_REFRESH: Duration = Duration::from_secs(3);

type Refreshed = Result<Vec<(PlannedConsumer, ConsumerOutcome)>, Error>;
type Refresh = JoinHandle<(Option<Box<(Lane, Lane)>>, KnownStarts, Refreshed)>;

/// The consumers of one run.
pub(super) struct ConsumerRefresh {
    selection: Selection,
    /// To the source and to the target, while no pass is under way.
    lanes: Option<Box<(Lane, Lane)>>,
    known: KnownStarts,
    /// A pass under way: a task, so that a run that ends leaves no consumer deleted.
    refreshing: Option<Refresh>,
    /// The errors of the last pass, by consumer; that of a pass that was not completed has no name.
    reported: BTreeMap<Option<String>, String>,
    /// The pass before was not completed either, and that was published.
    is_published: bool,
}

impl ConsumerRefresh {
    /// For a replication whose document names consumers.
    pub(super) fn for_replication(replication: &Replication, cell: &StatusCell) -> Option<Box<Self>> {
        if replication.consumers.is_empty() {
            cell.consumers(None);
            return None;
        }
        // What an earlier run has published is not published again.
        let before = cell.row().copy.consumers.unwrap_or_default();
        let reported: BTreeMap<_, _> = before.errors.into_iter().map(|error| (error.consumer, error.message)).collect();
        Some(Box::new(Self {
            selection: Selection::new(&replication.consumers),
            lanes: None,
            known: KnownStarts::default(),
            refreshing: None,
            is_published: reported.contains_key(&None),
            reported,
        }))
    }

    async fn refresh(&mut self, context: &Context, replication: &Replication) {
        let refreshed = match self.begin(context, replication).await {
            Ok(()) => self.settle().await,
            Err(error) => Err(error),
        };
        self.report(context, refreshed);
    }

    async fn begin(&mut self, context: &Context, replication: &Replication) -> Result<(), Error> {
        if self.refreshing.is_some() {
            return Ok(());
        }
        let mut lanes = match self.lanes.take() {
            Some(lanes) => lanes,
            None => {
                let name = format!("{} {} consumers", names::PROGRAM, replication.id);
                let rules = &context.deps.rules;
                let source = rules.dial(&replication.source.place, &name).await.map_err(|e| e.context("source"))?;
                let target = rules.dial(&replication.target.place, &name).await.map_err(|e| e.context("target"))?;
                Box::new((source, target))
            }
        };
        let (selection, mut known) = (self.selection.clone(), std::mem::take(&mut self.known));
        let (replication, deps) = (replication.clone(), context.deps.clone());
        self.refreshing = Some(tokio::spawn(async move {
            let mut mover = ConsumerMover {
                replication: &replication,
                site: &deps.site,
                installation: &deps.installation,
                source: &mut lanes.0,
                target: &mut lanes.1,
                until: None,
            };
            let refreshed = timeout(REFRESH_WITHIN, mover.refresh(&selection, &mut known)).await;
            let refreshed =
                refreshed.unwrap_or_else(|_| Err(Error::retry(format!("no answer for {REFRESH_WITHIN:?}"))));
            let lanes = refreshed.is_ok().then_some(lanes);
            (lanes, known, refreshed)
        }));
        Ok(())
    }

    /// Waits for the pass that is under way.
    async fn settle(&mut self) -> Refreshed {
        let Some(task) = &mut self.refreshing else { return Ok(Vec::new()) };
        let ended = task.await;
        self.refreshing = None;
        let (lanes, known, refreshed) = ended.map_err(|error| Error::retry(error.to_string()))?;
        (self.lanes, self.known) = (lanes, known);
        refreshed
    }

    fn report(&mut self, context: &Context, refreshed: Refreshed) {
        let id = &context.id;
        let mut errors = BTreeMap::new();
        match refreshed {
            Err(error) => {
                // Of the consumers, this pass says nothing.
                errors.clone_from(&self.reported);
                errors.insert(None, excerpt(&error.to_string()).into_owned());
            }
            Ok(done) => {
                for (PlannedConsumer { name, position, start, .. }, outcome) in done {
                    match outcome {
                        ConsumerOutcome::Refused(why) => _ = errors.insert(Some(name), excerpt(&why).into_owned()),
                        ConsumerOutcome::Created => {
                            info!(replication = id, consumer = name, position, start, "consumer created at the target");
                        }
                        ConsumerOutcome::Moved => {
                            debug!(replication = id, consumer = name, position, start, "consumer moved at the target");
                        }
                        ConsumerOutcome::Current | ConsumerOutcome::InUse | ConsumerOutcome::Late => {}
                    }
                }
            }
        }
        self.publish(context, &errors);
        let shown = errors.iter().take(SHOWN);
        let shown =
            shown.map(|(consumer, message)| ConsumerError { consumer: consumer.clone(), message: message.clone() });
        context.cell.consumers(Some(ConsumersStatus { failing: errors.len() as u64, errors: shown.collect() }));
        self.reported = errors;
    }

    /// Logs and publishes each error that the pass before did not have. A pass that is not completed is often over with the
    /// next one, and published if it is not.
    fn publish(&mut self, context: &Context, errors: &BTreeMap<Option<String>, String>) {
        let mut events = Vec::new();
        for (consumer, error) in errors {
            let event = || Event::ConsumerRefused { consumer: consumer.clone(), message: error.clone() };
            let before = self.reported.get(consumer);
            if before != Some(error) {
                let consumer = consumer.as_deref().unwrap_or_default();
                warn!(replication = context.id, consumer, "the consumer is not kept at the target: {error}");
            }
            let is_due = match consumer {
                Some(_) => before != Some(error),
                None => before.is_some() && !std::mem::replace(&mut self.is_published, true),
            };
            if is_due {
                events.push(event());
            }
        }
        self.is_published &= errors.contains_key(&None);
        events.into_iter().take(SHOWN).for_each(|event| context.emit(event));
    }
}

/// Keeps the consumers current while this is polled.
pub(super) async fn follow(
    refresh: &mut Option<Box<ConsumerRefresh>>,
    context: &Context,
    replication: &Replication,
) -> Infallible {
    let Some(refresh) = refresh else { return pending().await };
    loop {
        if context.cell.row().state == State::Running {
            // In a box: most replications move no consumers.
            Box::pin(refresh.refresh(context, replication)).await;
        }
        sleep(REFRESH_EVERY).await;
    }
}

/// Waits for the pass that is under way: after a run, nothing moves consumers.
pub(super) async fn finish(refresh: Option<Box<ConsumerRefresh>>, context: &Context) {
    let Some(mut refresh) = refresh else { return };
    match timeout(LAST_REFRESH, refresh.settle()).await {
        Ok(refreshed) => refresh.report(context, refreshed),
        Err(_) => warn!(replication = context.id, "consumers are still being moved after {LAST_REFRESH:?}"),
    }
}
