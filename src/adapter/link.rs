//! One connection of an adapter, made again whenever it is lost.

use std::{fmt, future::pending};

use futures_util::{FutureExt, future::BoxFuture};
use nats_lane::{Batch, Dial, Error, Lane, ServerRef, Turn, backoff::Backoff, jetstream::Api};
use serde_json::Value;
use tokio::time::{Duration, sleep};

use super::durable::DurableConsumer;
use crate::allow::AllowList;

/// Between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How a connection is made.
#[derive(Debug, Clone)]
pub(super) struct LinkPlan {
    pub(super) rules: AllowList,
    pub(super) server: ServerRef,
    /// What the server shows.
    pub(super) name: String,
    /// What has to exist before the connection is of use.
    pub(super) needs: Option<LinkNeed>,
}

/// What a connection is for.
#[derive(Debug, Clone)]
pub(super) enum LinkNeed {
    /// A stream, which is created if it is missing: name and configuration.
    Stream(String, Value),
    /// A consumer.
    Consumer(DurableConsumer),
}

/// A connection.
pub(super) struct AdapterLink {
    plan: LinkPlan,
    retry: Backoff,
    state: LinkState,
}

enum LinkState {
    Closed,
    Connecting(BoxFuture<'static, Result<Lane, Error>>),
    Up(Box<Lane>),
}

impl fmt::Debug for AdapterLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterLink").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// What happened to a connection.
pub(super) enum LinkEvent {
    /// It is up.
    Up,
    /// Messages arrived.
    Received(Batch),
    /// Everything was handed to the system.
    Flushed,
    /// It is lost, or could not be made; it is tried again.
    Down(Error),
}

impl AdapterLink {
    /// A connection that is not made yet.
    pub(super) fn new(plan: LinkPlan) -> Self {
        Self { plan, retry: Backoff::new(RETRY.0, RETRY.1), state: LinkState::Closed }
    }

    /// Begins to connect, if it is closed.
    pub(super) fn open(&mut self) {
        if matches!(self.state, LinkState::Closed) {
            self.begin(Duration::ZERO);
        }
    }

    /// Ends the connection at once.
    pub(super) fn close(&mut self) {
        self.state = LinkState::Closed;
    }

    /// Whether it is neither up nor being made.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.state, LinkState::Closed)
    }

    /// The lane while the connection is up.
    pub(super) fn lane(&mut self) -> Option<&mut Lane> {
        match &mut self.state {
            LinkState::Up(lane) => Some(lane),
            _ => None,
        }
    }

    /// The connection is of no more use: makes another one.
    pub(super) fn again(&mut self) {
        let delay = self.retry.next(rand::random());
        self.begin(delay);
    }

    /// The connection does what it is for.
    pub(super) fn works(&mut self) {
        self.retry.reset();
    }

    /// Waits until something happens. Dropping the future loses nothing.
    pub(super) async fn event(&mut self) -> LinkEvent {
        let error = match &mut self.state {
            LinkState::Closed => return pending().await,
            LinkState::Connecting(attempt) => match attempt.await {
                Ok(lane) => {
                    self.state = LinkState::Up(Box::new(lane));
                    return LinkEvent::Up;
                }
                Err(error) => error,
            },
            LinkState::Up(lane) => match lane.turn().await {
                Ok(Turn::Received(batch)) => return LinkEvent::Received(batch),
                Ok(Turn::Flushed) => return LinkEvent::Flushed,
                Err(error) => error,
            },
        };
        self.again();
        LinkEvent::Down(error)
    }

    fn begin(&mut self, delay: Duration) {
        let plan = self.plan.clone();
        let attempt = async move {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            let mut lane = plan.rules.dial(&plan.server, &plan.name).await?;
            match &plan.needs {
                None => {}
                Some(LinkNeed::Consumer(consumer)) => consumer.open(&mut lane).await?,
                Some(LinkNeed::Stream(stream, config)) => {
                    let created = create(&mut lane, stream, config).await;
                    created.map_err(|error| error.context(format!("stream `{stream}`")))?;
                }
            }
            Ok(lane)
        };
        self.state = LinkState::Connecting(attempt.boxed());
    }
}

/// Creates a stream where there is none of its name.
async fn create(lane: &mut Lane, stream: &str, config: &Value) -> Result<(), Error> {
    let mut api = Api::new(lane);
    if api.stream_info(stream).await?.is_none()
        && let Err(error) = api.create_stream(stream, config).await
    {
        // Another instance may have been faster.
        return match api.stream_info(stream).await {
            Ok(Some(_)) => Ok(()),
            _ => Err(error),
        };
    }
    Ok(())
}
