//! The work of a supervisor with one replication while its lease is ours: claim, run, back off, pause, skip messages by
//! request. The lease is the product's.

use std::{
    fmt::Display,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use nats_lane::backoff::{Backoff, jitter};
use serde_json::json;
use stream_replicator::{
    config::{self, Replication},
    copy::{self, At, Budget, ErrorKind, Job, KnownOrigins, Located, PositionWriter, WaysBack, locate},
    lease::{self, Candidacy, ProcessIdentity},
    status::{CopyStatus, Row, State},
    store::{ClaimError, LeaseStore, OwnStreams, PositionStore},
};
use tokio::{
    sync::watch,
    time::{Duration, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    keys::{Handle, Keys},
    plan::TTL_MS,
    process::Hands,
    run::{ID, INSTANCES, Scene},
    server::{Network, Who},
};

/// As in the supervisor.
const HELD: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(1);
const LAST_SAVE: Duration = Duration::from_secs(2);

/// An instance.
struct Me {
    instance: &'static str,
    /// Of its session, in the time of the world.
    ttl_ms: u64,
    hands: Arc<Hands>,
}

/// Counts what runs, also when it is dropped.
struct Running<'a>(&'a AtomicUsize);

impl<'a> Running<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Scene {
    fn replication(&self) -> Replication {
        let mut document = json!({
            "stream": "S", "target_stream": "T", "source_url": "source", "target_url": "target",
            "target_subject_prefix": "t",
            "limits": {"messages_in_flight": self.plan.in_flight, "bytes_in_flight": 65536},
        });
        if let Some(filter) = &self.plan.filter {
            document["filter_subject"] = filter.as_str().into();
        }
        if let Some(max_age) = self.plan.max_age {
            document["max_age"] = format!("{}ms", max_age.as_millis()).into();
        }
        if let Some(inspect) = self.plan.inspect {
            document["inspect_subject_token"] = 2.into();
            document["inspect_duration"] = format!("{}ms", inspect.as_millis()).into();
        }
        if self.plan.strict {
            document["ordering"] = "strict".into();
        }
        if self.plan.dead_letters {
            document["on_reject"] = "dead_letter".into();
            document["dead_letter"] = json!({"subject": "dead.letter"});
        }
        if let Some((messages, bytes)) = self.plan.rates {
            document["limits"]["messages_per_second"] = messages.into();
            document["limits"]["bytes_per_second"] = bytes.into();
        }
        config::parse_value(&document, "SITE").expect("a document")
    }

    fn network(&self, me: &Me, epoch: u64) -> Network {
        let who = Who { instance: me.instance, epoch };
        Network { servers: vec![self.source.clone(), self.target.clone()], who, hands: me.hands.clone() }
    }

    /// A bucket as an instance has it.
    fn reached_by(&self, me: &Me, keys: &Arc<Keys>) -> Handle {
        Handle { link: me.hands.link.clone(), ttl_ms: (me.ttl_ms, TTL_MS), ..self.handle(keys) }
    }

    fn store(&self, me: &Me) -> PositionStore {
        PositionStore::new(Arc::new(self.reached_by(me, &self.keys)))
    }

    /// One process: leases, and what runs under them, until it is asked to end.
    pub async fn live(self: Arc<Self>, which: usize, hands: Arc<Hands>) {
        let me = Me { instance: INSTANCES[which], ttl_ms: self.plan.ttls[which], hands: hands.clone() };
        let identity = ProcessIdentity {
            instance: me.instance.to_owned(),
            host: "host".to_owned(),
            program: "simulated".to_owned(),
            pid: which as u32,
            mark: String::new(),
        };
        let ttl = Duration::from_millis(me.ttl_ms);
        let store = LeaseStore::new(Arc::new(self.reached_by(&me, &self.leases)));
        let (over, stop) = (CancellationToken::new(), CancellationToken::new());
        let (leases, driver) = lease::enter(store, self.store(&me), identity, ttl, false, over.clone());
        let mut driver = pin!(driver);
        {
            let mut life = pin!(self.life(&me, leases.candidacy(ID), &stop));
            let mut asked = pin!(hands.leaving.notified());
            poll_fn(|cx| {
                if asked.as_mut().poll(cx).is_ready() {
                    leases.leave();
                    stop.cancel();
                    asked.set(hands.leaving.notified());
                }
                // Two tasks of one process: either may be first.
                let first = self.world.once_in(2);
                let ended = first && life.as_mut().poll(cx).is_ready();
                if let Poll::Ready(reason) = driver.as_mut().poll(cx) {
                    self.history().broken.push(format!("`{}` gives up: {reason:?}", me.instance));
                    return Poll::Ready(());
                }
                if ended || (!first && life.as_mut().poll(cx).is_ready()) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        over.cancel();
        driver.await;
    }

    /// Runs the replication whenever the lease is ours, until the stop.
    async fn life(&self, me: &Me, mut seat: Candidacy, stop: &CancellationToken) {
        loop {
            let tenure = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                tenure = seat.granted() => tenure,
            };
            let stop = stop.child_token();
            let mut reign = Box::pin(self.reign(me, tenure.epoch, &stop));
            let steps = poll_fn(|cx| {
                self.history().acts(me.instance, tenure.epoch);
                reign.as_mut().poll(cx)
            });
            let again = tenure.hold(&stop, steps).await;
            drop(reign);
            if again.is_none() {
                self.note(me.instance, tenure.why_lost());
            }
            seat.ended(again.unwrap_or_default());
        }
    }

    /// What runs while the lease is ours; says how long to leave it alone then.
    async fn reign(&self, me: &Me, epoch: u64, stop: &CancellationToken) -> Duration {
        let _leading = Running::new(&self.leading);
        let row = Row {
            replication: ID.to_owned(),
            state: State::Starting,
            origin: "kv".to_owned(),
            leader: Some(me.instance.to_owned()),
            epoch,
            config_revision: 1,
            copy: CopyStatus::default(),
            verify: None,
            todo: None,
        };
        let replication = self.replication();
        let handle = || self.reached_by(me, &self.keys);
        let samples = replication.sampling.as_ref().map(|sampling| self.senders.load(sampling, handle()));
        let mut job = Job {
            site: "SITE".to_owned(),
            installation: "1".to_owned(),
            replication,
            row,
            budget: Budget::new(1 << 20),
            neighbour: (!self.plan.neighbour.is_empty()).then(|| "OTHER".to_owned()),
            ways_back: WaysBack::fixed(KnownOrigins::default()),
            skip: None,
            samples,
            consumers: consumers(),
            own_streams: OwnStreams::default(),
            standalone: false,
            dial: Arc::new(self.network(me, epoch)),
        };
        let status = watch::Sender::new((State::Starting, CopyStatus::default()));
        let mut backoff = Backoff::RETRY;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Duration::ZERO,
                () = self.paused.is(false) => {}
            }
            let running = Running::new(&self.running);
            let store = self.store(me);
            let claimed = {
                let mut claim = pin!(store.claim(ID, me.instance, epoch));
                tokio::select! {
                    biased;
                    claimed = &mut claim => claimed,
                    () = stop.cancelled() => {
                        let _ = timeout(LAST_SAVE, claim).await;
                        return Duration::ZERO;
                    }
                }
            };
            let claim = match claimed {
                Ok(claim) => claim,
                Err(error @ ClaimError::Newer { .. }) => {
                    self.note(me.instance, error);
                    return AGAIN;
                }
                Err(ClaimError::Store(_)) => {
                    drop(running);
                    let _ = timeout(backoff.next(self.chance()), stop.cancelled()).await;
                    continue;
                }
            };
            let mut ledger = PositionWriter::new(self.store(me), self.events.clone(), ID, claim);
            drop(running);
            let interrupted = async || {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = self.paused.is(true) => {}
                }
            };
            while !self.paused.now() && !stop.is_cancelled() {
                let running = Running::new(&self.running);
                job.skip = *self.release.lock().expect("release");
                let before = status.borrow().1.position.source_seq;
                let end = CancellationToken::new();
                let result = {
                    let mut run = pin!(copy::run(&job, &mut ledger, &status, &self.events, end.clone()));
                    tokio::select! {
                        biased;
                        result = &mut run => result,
                        () = interrupted() => {
                            end.cancel();
                            timeout(SETTLE, run).await.unwrap_or(Ok(()))
                        }
                    }
                };
                drop(running);
                if status.borrow().1.position.source_seq != before {
                    backoff.reset();
                }
                let Err(error) = result else { break };
                tracing::debug!(at = ?self.world.elapsed(), me.instance, %error, "a run ended");
                self.note(me.instance, format!("{:?}: {error}", error.kind));
                let delay = match error.kind {
                    ErrorKind::Superseded => return AGAIN,
                    ErrorKind::Hold => jitter(HELD, self.chance()),
                    ErrorKind::Retry => backoff.next(self.chance()),
                };
                let _ = timeout(delay, interrupted()).await;
                // An operator sees the message that blocks the copy, and skips it.
                if let Some(message) = error.poison.map(|poison| poison.message) {
                    let mut release = self.release.lock().expect("release");
                    if *release != Some(message) {
                        *release = Some(message);
                        self.history().skipped(message.seq, message.time_ns);
                    }
                }
            }
        }
    }

    fn chance(&self) -> f64 {
        self.world.between(0, 1_000) as f64 / 1_000.0
    }

    fn note(&self, instance: &str, end: impl Display) {
        let at = self.world.elapsed();
        self.ends.lock().expect("ends").push(format!("{at:?} `{instance}` {end}"));
    }

    /// Moves the position of the replication, which is paused.
    pub async fn move_position(&self, by: u64, back: bool) -> Result<(), String> {
        let me = Me { instance: "operator", ttl_ms: TTL_MS, hands: Arc::default() };
        let store = self.store(&me);
        let (record, _) = store.read(ID).await.map_err(|error| error.to_string())?;
        let Some(from) = record.source.map(|source| source.seq) else { return Ok(()) };
        let seq = if back { from.saturating_sub(by) } else { from + by };
        let network = self.network(&me, 0);
        let located = locate(&network, &self.replication(), &consumers(), At::After(seq))
            .await
            .map_err(|error| error.to_string())?;
        let Located::At(place) = located else { return Ok(()) };
        for _ in 0..20 {
            let Ok((record, revision)) = store.read(ID).await else { continue };
            let from = record.source.as_ref().map_or(0, |source| source.seq);
            if record.holder == "operator" {
                break;
            }
            self.history().any_position = true;
            // Judged with the move in mind: the save is the move.
            self.history().moved(from, place.position.seq);
            let moved = record.moved(place.position.clone(), "operator", place.now);
            if store.save(ID, moved, revision).await.is_ok() {
                break;
            }
        }
        self.history().any_position = false;
        Ok(())
    }
}

/// What the names of the copy's own consumers begin with.
fn consumers() -> String {
    copy::consumer_prefix("SITE", "", ID)
}
