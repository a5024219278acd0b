//! Moves the durable consumer of Choria's replicator along with a copy whose document asks for it, so that Choria's
//! replicator can take over again.

use std::{convert::Infallible, future::pending, time::Duration};

use nats_lane::{Dial, Error, Lane};
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{choria::GoConsumer, config::Replication, names, status::State, supervisor::context::Context};

/// How often the consumer is moved while the position changes.
const MOVE_EVERY: Duration = Duration::from_millis(500);
/// How long the last move of a run may take.
const LAST_MOVE: Duration = Duration::from_secs(2);

type Move = JoinHandle<(Lane, Result<(), Error>)>;

/// The durable consumer of Choria's replicator during one run.
pub(super) struct HandBack {
    consumer: GoConsumer,
    /// Position of the consumer, once it was moved.
    moved: Option<u64>,
    /// Its own connection to the source, while no move is under way.
    lane: Option<Lane>,
    /// A move under way: a task, so that a run that ends does not leave the consumer deleted.
    moving: Option<(u64, Move)>,
    /// The last error that was logged.
    reported: String,
}

impl HandBack {
    /// For a replication whose document asks for it.
    pub(super) fn for_replication(replication: &Replication) -> Option<Self> {
        let filters = replication.scope.filters();
        let consumer = GoConsumer {
            stream: replication.source.stream.clone(),
            name: names::choria_consumer(&replication.name),
            entry: replication.name.clone(),
            filter: filters.first().filter(|_| filters.len() == 1).cloned(),
        };
        replication.hand_back.then_some(Self {
            consumer,
            moved: None,
            lane: None,
            moving: None,
            reported: String::new(),
        })
    }

    /// Moves the consumer to a position.
    async fn move_to(&mut self, context: &Context, replication: &Replication, position: u64) {
        if self.moving.is_none() && self.moved == Some(position) || position == 0 {
            return;
        }
        if let Err(error) = self.try_move(context, replication, position).await {
            let (error, id) = (error.to_string(), &context.id);
            if error != self.reported {
                warn!(
                    replication = id,
                    consumer = self.consumer.name,
                    "the consumer for the way back was not moved: {error}"
                );
                self.reported = error;
            }
        } else {
            self.reported.clear();
        }
    }

    async fn try_move(&mut self, context: &Context, replication: &Replication, position: u64) -> Result<(), Error> {
        self.settle().await?;
        if self.moved == Some(position) {
            return Ok(());
        }
        let mut lane = match self.lane.take() {
            Some(lane) => lane,
            None => {
                let name = format!("{} {} hand back", names::PROGRAM, replication.id);
                context.deps.rules.dial(&replication.source.place, &name).await?
            }
        };
        let consumer = self.consumer.clone();
        let task = tokio::spawn(async move {
            let moved = consumer.move_to(&mut lane, position).await;
            (lane, moved)
        });
        self.moving = Some((position, task));
        self.settle().await
    }

    /// Waits for the move that is under way.
    async fn settle(&mut self) -> Result<(), Error> {
        let Some((position, task)) = &mut self.moving else { return Ok(()) };
        let (position, ended) = (*position, task.await);
        self.moving = None;
        let (lane, moved) = ended.map_err(|error| Error::retry(error.to_string()))?;
        moved?;
        self.lane = Some(lane);
        self.moved = Some(position);
        debug!(consumer = self.consumer.name, position, "moved the consumer for the way back");
        Ok(())
    }
}

/// Moves the consumer along with a run while this is polled.
pub(super) async fn follow(
    hand_back: &mut Option<HandBack>,
    context: &Context,
    replication: &Replication,
) -> Infallible {
    let Some(hand_back) = hand_back else { return pending().await };
    loop {
        let row = context.cell.row();
        if row.state == State::Running {
            hand_back.move_to(context, replication, row.copy.position.source_seq).await;
        }
        sleep(MOVE_EVERY).await;
    }
}

/// Moves the consumer to where a run stopped.
pub(super) async fn finish(hand_back: Option<HandBack>, context: &Context, replication: &Replication, position: u64) {
    let Some(mut hand_back) = hand_back else { return };
    if timeout(LAST_MOVE, hand_back.move_to(context, replication, position)).await.is_err() {
        let (id, consumer) = (&context.id, &hand_back.consumer.name);
        warn!(replication = id, consumer, "the consumer for the way back was not moved within {LAST_MOVE:?}");
    }
}
