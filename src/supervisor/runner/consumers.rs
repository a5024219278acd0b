//! Keeps the consumers that a document names at the target during a run, so that their subscribers can move there at any time.

use std::{collections::BTreeMap, convert::Infallible, future::pending, time::Duration};

use nats_lane::{Dial, Error, Lane};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    config::Replication,
    copy::moved_consumers::{ConsumerMover, ConsumerOutcome, KnownStarts, PlannedConsumer, Selection},
    names,
    status::State,
    supervisor::context::Context,
};

/// Pause between two passes.
const REFRESH_EVERY: Duration = Duration::from_secs(3);
/// Deadline of a pass.
const REFRESH_WITHIN: Duration = Duration::from_secs(10);
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
    /// The last errors that were logged, by consumer; those of a pass have no name.
    reported: BTreeMap<String, String>,
}

impl ConsumerRefresh {
    /// For a replication whose document names consumers.
    pub(super) fn for_replication(replication: &Replication) -> Option<Box<Self>> {
        let named = || Self {
            selection: Selection::new(&replication.consumers),
            lanes: None,
            known: KnownStarts::default(),
            refreshing: None,
            reported: BTreeMap::new(),
        };
        (!replication.consumers.is_empty()).then(|| Box::new(named()))
    }

    async fn refresh(&mut self, context: &Context, replication: &Replication) {
        let refreshed = match self.begin(context, replication).await {
            Ok(()) => self.settle().await,
            Err(error) => Err(error),
        };
        self.report(&context.id, refreshed);
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

    fn report(&mut self, id: &str, refreshed: Refreshed) {
        let mut errors = BTreeMap::new();
        match refreshed {
            Err(error) => _ = errors.insert(String::new(), error.to_string()),
            Ok(done) => {
                for (PlannedConsumer { name, position, start, .. }, outcome) in done {
                    match outcome {
                        ConsumerOutcome::Refused(why) => _ = errors.insert(name, why),
                        ConsumerOutcome::Created => {
                            info!(replication = id, consumer = name, position, start, "consumer created at the target");
                        }
                        ConsumerOutcome::Moved => {
                            debug!(replication = id, consumer = name, position, start, "consumer moved at the target");
                        }
                        ConsumerOutcome::Current | ConsumerOutcome::InUse => {}
                    }
                }
            }
        }
        for (consumer, error) in &errors {
            if self.reported.get(consumer) != Some(error) {
                warn!(replication = id, consumer, "the consumer is not kept at the target: {error}");
            }
        }
        self.reported = errors;
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
        Ok(refreshed) => refresh.report(&context.id, refreshed),
        Err(_) => warn!(replication = context.id, "consumers are still being moved after {LAST_REFRESH:?}"),
    }
}
