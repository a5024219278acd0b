//! Gossip about senders in a group with Choria's replicator: the instance that copies publishes each sender that it sees at
//! the source, the others listen, so that the one that takes over knows the senders. Without acks: what is lost costs an
//! extra copy at the most.

use std::{convert::Infallible, future::pending, time::Duration};

use nats_lane::{Batch, Dial, Error, Lane, Turn, backoff::Backoff, entropy};
use tokio::{sync::mpsc, time::sleep};
use tracing::warn;

use super::{
    CopyRunner,
    state_file::{record, tracked},
};
use crate::{
    choria::{TrackedSender, gossip_subject},
    config::Replication,
    copy::{Samples, SeenSender},
    names,
    sampling::Listed,
    supervisor::context::Context,
};

/// Senders that wait to be published; further ones are dropped.
const WAITING: usize = 4_096;
/// Bytes that the connection has not taken yet, beyond which senders are dropped.
const UNWRITTEN: usize = 1 << 20;
/// Pauses between attempts to connect.
const RETRY: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(60));

/// The gossip of one replication.
pub(super) struct Gossip {
    subject: String,
    seen: mpsc::Receiver<SeenSender>,
    /// The last error that was logged.
    reported: String,
}

impl Gossip {
    /// For a replication that publishes advisories, as with the Go program, beside which it runs or may run; and where the
    /// copy reports the senders that it sees.
    pub(super) fn of(replication: &Replication) -> Option<(Self, mpsc::Sender<SeenSender>)> {
        let beside_go = replication.leader_election_name.is_some() || replication.hand_back;
        let advises = replication.sampling.as_ref().is_some_and(|sampling| sampling.advisory.is_some());
        let subject = gossip_subject(&replication.source.stream, &replication.name);
        let (report, seen) = mpsc::channel(WAITING);
        (beside_go && advises).then(|| (Self { subject, seen, reported: String::new() }, report))
    }

    /// Publishes what the copy sees and counts what others see; `learn`, where this instance does not copy, takes it over.
    async fn talk(&mut self, context: &Context, replication: &Replication, learn: Option<&Samples>) -> Infallible {
        let mut backoff = RETRY;
        loop {
            let Err(error) = self.session(context, replication, learn, &mut backoff).await;
            let error = error.to_string();
            if error != self.reported {
                let (id, subject) = (&context.id, &self.subject);
                warn!(
                    replication = id,
                    subject, "no gossip about senders with other replicators, the copy continues: {error}"
                );
                self.reported = error;
            }
            sleep(backoff.next((entropy::random() >> 11) as f64 / (1u64 << 53) as f64)).await;
        }
    }

    async fn session(
        &mut self,
        context: &Context,
        replication: &Replication,
        learn: Option<&Samples>,
        backoff: &mut Backoff,
    ) -> Result<Infallible, Error> {
        let name = format!("{} {} gossip", names::PROGRAM, context.id);
        let mut lane = context.deps.rules.dial(&replication.source.place, &name).await?;
        lane.keep_refused();
        let (sid, _) = lane.reserve_inbox();
        lane.listen(sid, &self.subject);
        loop {
            tokio::select! {
                biased;
                turn = lane.turn() => if let Turn::Received(batch) = turn? {
                    if let Some(refusal) = lane.take_refused().pop() {
                        return Err(Error::hold(refusal));
                    }
                    backoff.reset();
                    hear(&batch, sid, context, learn);
                },
                Some(seen) = self.seen.recv() => self.publish(&mut lane, seen),
            }
        }
    }

    /// Publishes a sender, and those that wait.
    fn publish(&mut self, lane: &mut Lane, first: SeenSender) {
        let mut next = Some(first);
        while let Some(seen) = next {
            if lane.unwritten() < UNWRITTEN {
                let SeenSender { sender, seen_ns, copied_ns, size, advised } = &seen;
                let listed = Listed {
                    sender,
                    seen_ns: *seen_ns,
                    copied_ns: *copied_ns,
                    size: *size,
                    advised: *advised,
                    sequence: 0,
                };
                let body = serde_json::to_vec(&tracked(&listed)).unwrap_or_default();
                lane.publish(&self.subject, "", &body);
            }
            next = self.seen.try_recv().ok();
        }
    }
}

/// Takes what other replicators published.
fn hear(batch: &Batch, sid: u64, context: &Context, learn: Option<&Samples>) {
    let seen = batch.iter().filter(|message| message.sid == sid);
    let seen = seen.filter_map(|message| serde_json::from_slice::<TrackedSender>(message.payload).ok());
    let seen: Vec<_> = seen.filter(|sender| !sender.value.is_empty() && sender.seen().is_some()).collect();
    if seen.is_empty() {
        return;
    }
    context.cell.status().send_modify(|(_, copy)| copy.metered.gossip += seen.len() as u64);
    let Some(samples) = learn else { return };
    let mut senders = samples.lock();
    for sender in seen {
        let mut record = record(&sender);
        // It is published before it is copied: the first message of a sender always is.
        record.copied = record.copied.or(Some(record.seen));
        senders.learn(record);
    }
}

/// Publishes the senders that a run sees while this is polled.
pub(super) async fn publish(gossip: &mut Option<Gossip>, context: &Context, replication: &Replication) -> Infallible {
    let Some(gossip) = gossip else { return pending().await };
    gossip.talk(context, replication, None).await
}

impl CopyRunner {
    /// Follows the senders that the leader of Choria's election sees, while another replicator has won it.
    pub(super) async fn hear_gossip(&mut self, replication: &Replication) -> Infallible {
        let Some((mut gossip, _unused)) = Gossip::of(replication) else { return pending().await };
        let mut backoff = RETRY;
        while self.know_senders(replication).await.is_err() {
            sleep(backoff.next(0.5)).await;
        }
        let Some(samples) = self.samples() else { return pending().await };
        samples.lock().stand_by();
        let context = self.context.clone();
        gossip.talk(&context, replication, Some(&samples)).await
    }

    /// Forgets the senders that other replicators saw and that have expired since: the leader reported that.
    pub(super) fn forget_unseen(&self, replication: &Replication) {
        let heard = self.context.cell.row().copy.metered.gossip > 0;
        let (Some(samples), Some(sampling), true) = (self.samples(), &replication.sampling, heard) else { return };
        let every = chrono::TimeDelta::from_std(sampling.every).unwrap_or(chrono::TimeDelta::MAX);
        if let Some(since) = entropy::now().checked_sub_signed(every) {
            samples.lock().forget_unseen(since);
        }
    }
}
