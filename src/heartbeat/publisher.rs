//! Publishes one set of heartbeats over one connection, each subject on its own interval, for as long as it runs.

use std::sync::Arc;

use async_nats::{Client, HeaderMap, Request, RequestErrorKind};
use chrono::Utc;
use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, pending},
    stream::FuturesUnordered,
};
use nats_lane::{Error, ServerRef, backoff::Backoff, client::ClientSession, jetstream::PublishAck};
use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{HeartbeatDeps, stats::HeartbeatStats};
use crate::{
    allow::AllowList,
    config::{Heartbeat, Heartbeats},
    election::{Campaign, Election, Leadership},
    names::{self, HEARTBEAT_SUBJECT_HEADER, ORIGINATOR_HEADER},
};

/// Time for the confirmation of one heartbeat.
const ACK_WAIT: Duration = Duration::from_secs(2);

/// Between attempts to connect.
const RETRY: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));

/// The outcome of one heartbeat: which subject, how long it took, and why it is not stored if it is not.
type BeatOutcome = (usize, Duration, Result<(), String>);

pub(super) struct Publisher {
    heartbeats: Heartbeats,
    rules: AllowList,
    election: Election,
    host: String,
    stats: Arc<HeartbeatStats>,
    link: Link,
    beats: Vec<Beat>,
    sent: FuturesUnordered<BoxFuture<'static, BeatOutcome>>,
}

/// One subject.
struct Beat {
    due: Instant,
    /// A heartbeat is to be published as soon as possible.
    owed: bool,
    /// The last one was not stored.
    failing: bool,
}

impl Publisher {
    pub(super) fn new(deps: &HeartbeatDeps, heartbeats: Heartbeats, stats: Arc<HeartbeatStats>) -> Self {
        let now = Instant::now();
        let beat = |one: &Heartbeat| Beat { due: now + one.interval, owed: true, failing: false };
        let name = format!("{} {}/{} heartbeats", names::PROGRAM, deps.site, deps.instance);
        Self {
            rules: deps.rules.clone(),
            election: Election::of_heartbeats(&deps.site, &deps.host),
            host: deps.host.clone(),
            stats,
            link: Link::new(deps.rules.clone(), heartbeats.place.clone(), name),
            beats: heartbeats.subjects.iter().map(beat).collect(),
            sent: FuturesUnordered::new(),
            heartbeats,
        }
    }

    /// Publishes until the stop. Heartbeats in flight are not awaited then.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let campaign = self.heartbeats.leader_election.then(|| {
            let (dial, place) = (Arc::new(self.rules.clone()), self.heartbeats.place.clone());
            Campaign::start(dial, place, self.election.clone())
        });
        if let Some(campaign) = &campaign {
            self.stats.stands(campaign.poll());
        }
        let right = Right { led: campaign.as_ref().map(Campaign::led), over: false };
        stop.run_until_cancelled(self.publish(right)).await;
        drop(self);
        if let Some(campaign) = campaign {
            campaign.stop().await;
        }
    }

    async fn publish(&mut self, mut right: Right) {
        // The winner begins with a heartbeat on each subject.
        let mut led = None;
        loop {
            let now = Instant::now();
            let leads = right.holds(now);
            if led != Some(leads) {
                self.stats.paused(!leads);
                self.beats.iter_mut().for_each(|beat| beat.owed = leads);
                led = Some(leads);
            }
            self.tick(leads, now);
            if leads {
                self.send_owed();
            }
            let next = self.beats.iter().map(|beat| beat.due).chain(right.until()).min();
            tokio::select! {
                biased;
                () = right.changed() => {}
                () = self.link.change() => {}
                Some(outcome) = self.sent.next() => self.settle(outcome),
                () = sleep_until(next.unwrap_or(now + ACK_WAIT)) => {}
            }
        }
    }

    /// Marks subjects that are due as owed. Without leadership none is owed.
    fn tick(&mut self, leads: bool, now: Instant) {
        let connected = self.link.session().is_some();
        for (index, (beat, one)) in self.beats.iter_mut().zip(&self.heartbeats.subjects).enumerate() {
            if beat.due > now {
                continue;
            }
            // After a pause of the process the missed ones are not made up for.
            while beat.due <= now {
                beat.due += one.interval;
            }
            beat.owed = leads;
            if leads && !connected {
                // The link has reported the reason.
                self.stats.count(index, |numbers| numbers.errors += 1);
            }
        }
    }

    fn send_owed(&mut self) {
        let Some(session) = self.link.session() else { return };
        for (index, (beat, one)) in self.beats.iter_mut().zip(&self.heartbeats.subjects).enumerate() {
            if std::mem::take(&mut beat.owed) {
                let message = message(one, &self.host);
                let (client, subject) = (session.client.clone(), one.subject.clone());
                self.sent.push(beat_once(index, client, subject, message).boxed());
            }
        }
    }

    fn settle(&mut self, (index, time, result): BeatOutcome) {
        let subject = &self.heartbeats.subjects[index].subject;
        let beat = &mut self.beats[index];
        match result {
            Ok(()) => {
                if std::mem::take(&mut beat.failing) {
                    info!(subject, "heartbeats are stored again");
                }
                self.stats.count(index, |numbers| {
                    numbers.published += 1;
                    numbers.times.observe(time.as_secs_f64(), 1);
                });
            }
            Err(error) => {
                let refusal = self.link.session().and_then(|session| session.refusal_of(subject));
                let refusal = refusal.map(|refusal| format!("; the server says: {refusal}")).unwrap_or_default();
                if std::mem::replace(&mut beat.failing, true) {
                    debug!(subject, "a heartbeat was not stored: {error}{refusal}");
                } else {
                    warn!(subject, "a heartbeat was not stored: {error}{refusal}");
                }
                self.stats.count(index, |numbers| numbers.errors += 1);
            }
        }
    }
}

/// Whether this process may publish.
struct Right {
    /// Where an election decides that.
    led: Option<watch::Receiver<Leadership>>,
    /// The campaign is gone.
    over: bool,
}

impl Right {
    fn holds(&mut self, now: Instant) -> bool {
        self.led.as_mut().is_none_or(|led| !self.over && led.borrow_and_update().leads(now))
    }

    /// When it ends without further news.
    fn until(&self) -> Option<Instant> {
        self.led.as_ref().and_then(|led| led.borrow().until).filter(|until| *until > Instant::now())
    }

    async fn changed(&mut self) {
        match &mut self.led {
            Some(led) if !self.over => self.over = led.changed().await.is_err(),
            _ => pending().await,
        }
    }
}

/// The connection: opened again and again while it is needed.
struct Link {
    rules: AllowList,
    place: ServerRef,
    name: String,
    retry: Backoff,
    /// The last error, until it is over.
    told: String,
    state: BeatState,
}

enum BeatState {
    Connecting(BoxFuture<'static, Result<ClientSession, Error>>),
    Up(ClientSession),
}

impl Link {
    fn new(rules: AllowList, place: ServerRef, name: String) -> Self {
        let mut link = Self {
            rules,
            place,
            name,
            retry: RETRY,
            told: String::new(),
            state: BeatState::Connecting(pending().boxed()),
        };
        link.begin(Duration::ZERO);
        link
    }

    fn session(&self) -> Option<&ClientSession> {
        match &self.state {
            BeatState::Up(session) => Some(session),
            BeatState::Connecting(_) => None,
        }
    }

    /// Waits until the connection is up, or down. Dropping the future loses nothing.
    async fn change(&mut self) {
        let server = &self.place;
        match &mut self.state {
            BeatState::Up(session) => {
                session.lost().await;
                warn!(%server, "the connection for heartbeats is down");
                self.begin(Duration::ZERO);
            }
            BeatState::Connecting(attempt) => match attempt.await {
                Ok(session) => {
                    info!(%server, "the connection for heartbeats is up");
                    self.told.clear();
                    self.retry.reset();
                    self.state = BeatState::Up(session);
                }
                Err(error) => {
                    if self.told != error.message {
                        warn!(%server, "no heartbeats: {error}");
                        self.told = error.message;
                    }
                    let delay = self.retry.next(rand::random());
                    self.begin(delay);
                }
            },
        }
    }

    fn begin(&mut self, delay: Duration) {
        let (rules, place, name) = (self.rules.clone(), self.place.clone(), self.name.clone());
        let attempt = async move {
            sleep(delay).await;
            ClientSession::open(&place, &rules.resolve(&place)?, &name).await
        };
        self.state = BeatState::Connecting(attempt.boxed());
    }
}

/// Headers and body.
fn message(heartbeat: &Heartbeat, host: &str) -> Request {
    let mut headers = HeaderMap::new();
    let all = heartbeat.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in all.chain([(ORIGINATOR_HEADER, host), (HEARTBEAT_SUBJECT_HEADER, &heartbeat.subject)]) {
        headers.insert(name, value);
    }
    let body = Utc::now().timestamp().to_string();
    Request::new().headers(headers).payload(body.into()).timeout(Some(ACK_WAIT))
}

async fn beat_once(index: usize, client: Client, subject: String, message: Request) -> BeatOutcome {
    let begun = Instant::now();
    let result = match client.send_request(subject, message).await {
        Ok(reply) => match PublishAck::parse(&reply.payload, "the stream") {
            Ok(ack) if ack.stream.is_empty() => Err("the answer is not from a stream".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.message),
        },
        Err(error) => Err(match error.kind() {
            RequestErrorKind::NoResponders => "no stream listens on this subject, or it has no leader".to_owned(),
            RequestErrorKind::TimedOut => format!("it was not confirmed within {ACK_WAIT:?}"),
            _ => error.to_string(),
        }),
    };
    (index, begun.elapsed(), result)
}
