//! What a supervisor does with one replication: claim, run, back off, pause, leave out what people want left out.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::json;
use stream_replicator::{
    backoff::{Backoff, jitter},
    config::{self, Replication},
    copy::{self, At, Budget, Error, ErrorKind, Job, Ledger, Located, locate},
    status::{CopyStatus, Row, State},
    store::PositionStore,
};
use tokio::{
    sync::watch,
    time::{Duration, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    keys,
    process::Hands,
    run::{ID, Scene},
    server::Network,
};

/// As in the supervisor.
const HELD: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(10);

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
        config::parse_value(&document, "SITE").expect("a document")
    }

    fn network(&self, hands: &Arc<Hands>) -> Network {
        Network { servers: vec![self.source.clone(), self.target.clone()], hands: hands.clone() }
    }

    fn store(&self) -> PositionStore {
        PositionStore::new(Arc::new(keys::Handle(self.keys.clone())))
    }

    /// One life of a process, until another one holds the replication.
    pub async fn live(self: Arc<Self>, instance: &'static str, hands: Arc<Hands>) {
        let row = Row {
            replication: ID.to_owned(),
            state: State::Starting,
            origin: "kv".to_owned(),
            leader: Some(instance.to_owned()),
            epoch: 0,
            config_revision: 1,
            copy: CopyStatus::default(),
        };
        let mut job = Job {
            site: "SITE".to_owned(),
            replication: self.replication(),
            row,
            budget: Budget::new(1 << 20),
            neighbour: None,
            skip: None,
            samples: None,
            dial: Arc::new(self.network(&hands)),
        };
        let status = watch::Sender::new((State::Starting, CopyStatus::default()));
        let mut backoff = Backoff::RETRY;
        loop {
            self.paused.is(false).await;
            let running = Running::new(&self.running);
            // Without a lease: whoever comes last goes on.
            let store = self.store();
            let claimed = async {
                let (record, _) = store.read(ID).await?;
                store.claim(ID, instance, record.epoch + 1).await
            };
            let claim = match claimed.await {
                Ok(claim) => claim,
                Err(_) => {
                    drop(running);
                    sleep(backoff.next(self.chance())).await;
                    continue;
                }
            };
            let mut ledger = Ledger::new(self.store(), self.events.clone(), ID, claim);
            drop(running);
            while !self.paused.now() {
                let running = Running::new(&self.running);
                job.skip = *self.release.lock().expect("release");
                let before = status.borrow().1.position.source_seq;
                let stop = CancellationToken::new();
                let result = {
                    let mut run = pin!(copy::run(&job, &mut ledger, &status, &self.events, stop.clone()));
                    tokio::select! {
                        biased;
                        result = &mut run => result,
                        () = self.paused.is(true) => {
                            stop.cancel();
                            timeout(SETTLE, run).await.unwrap_or(Ok(()))
                        }
                    }
                };
                drop(running);
                if status.borrow().1.position.source_seq != before {
                    backoff.reset();
                }
                let Err(error) = result else { break };
                tracing::debug!(at = ?self.world.elapsed(), instance, %error, "a run ended");
                self.note(instance, &error);
                let delay = match error.kind {
                    ErrorKind::Superseded => return,
                    ErrorKind::Hold => jitter(HELD, self.chance()),
                    ErrorKind::Retry => backoff.next(self.chance()),
                };
                let _ = timeout(delay, self.paused.is(true)).await;
                // Somebody looks at what is held, and wants it left out.
                if let Some(message) = error.poison {
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

    fn note(&self, instance: &str, error: &Error) {
        let at = format!("{:?}", self.world.elapsed());
        self.ends.lock().expect("ends").push(format!("{at} `{instance}` {:?}: {error}", error.kind));
    }

    /// Moves the position of the replication, which is paused.
    pub async fn move_position(&self, by: u64, back: bool) -> Result<(), String> {
        let store = self.store();
        let (record, _) = store.read(ID).await.map_err(|error| error.to_string())?;
        let Some(from) = record.source.map(|source| source.seq) else { return Ok(()) };
        let seq = if back { from.saturating_sub(by) } else { from + by };
        let network = self.network(&Arc::default());
        let located =
            locate(&network, &self.replication(), At::Behind(seq)).await.map_err(|error| error.to_string())?;
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
            let moved = record.moved(place.position.clone(), "operator");
            if store.save(ID, moved, revision).await.is_ok() {
                break;
            }
        }
        self.history().any_position = false;
        Ok(())
    }
}
