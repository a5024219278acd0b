//! Choria's leader election, for the time in which its replicators and this service run side by side. The leader
//! copies: theirs check only the key in the bucket, ours first claims its record and then stands for election with
//! them.
//!
//! A [`Campaign`] stands for one replication, over a connection of its own to the source, or for the heartbeats. It
//! needs the right to publish to its key and no other; if allowed, it also asks for the bucket's TTL and checks
//! whether a key that it does not get was deleted. `machine` has the rules and `driver` the connection.

mod driver;
mod machine;

use std::{future::poll_fn, pin::pin, sync::Arc, task};

use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use machine::Campaigns;
use nats_lane::{Dial, ServerRef};

use crate::{boottime, config::Replication, metrics, names::choria_consumer};

/// The bucket, with a TTL of 1 s to 1 h. Choria's brokers create it; elsewhere an operator does.
pub const BUCKET: &str = "CHORIA_LEADER_ELECTION";

/// Deadline for the end of a campaign.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The key of an election, and the candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Election {
    /// Key in the bucket: that of Choria's replicator for the same stream and name.
    pub key: String,
    /// The value of the key while we hold it.
    pub candidate: String,
}

impl Election {
    /// The election that a replication takes part in, if it does.
    pub fn of(replication: &Replication) -> Option<Self> {
        let candidate = replication.leader_election_name.clone()?;
        let key = format!("{}_{}", choria_consumer(&replication.name), replication.source.stream);
        Some(Self { key, candidate })
    }

    /// The election of the publishers of a site's heartbeats: hosts are the candidates.
    pub fn of_heartbeats(site: &str, host: &str) -> Self {
        Self { key: format!("SR_{site}_HB"), candidate: host.to_owned() }
    }
}

/// The state of a campaign.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leadership {
    /// Until when we lead by our own clock, without news before. Grows with every write that is confirmed. `None` while
    /// we do not lead.
    pub until: Option<Instant>,
    /// The obstacle to standing for election; `None` if other candidates merely lead.
    pub error: Option<String>,
    /// Number of writes, attempts included.
    pub campaigns: Campaigns,
    /// From the last answer to the next write; 0 before the first answer.
    pub interval: Duration,
}

impl Leadership {
    /// Whether we lead at this moment.
    pub fn leads(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// Waits until we lead; `false` if the campaign is over.
pub async fn won(led: &mut watch::Receiver<Leadership>) -> bool {
    loop {
        if led.borrow_and_update().leads(boottime::now()) {
            return true;
        }
        if led.changed().await.is_err() {
            return false;
        }
    }
}

/// Waits until we do not lead: the key was lost, no write was confirmed for too long, or the campaign is over. A leader
/// polls this before anything else whenever it wakes: a process that was suspended gets no other notice first.
pub async fn lost(led: &mut watch::Receiver<Leadership>) {
    loop {
        let until = led.borrow_and_update().until;
        let Some(until) = until.filter(|until| boottime::now() < *until) else { return };
        let mut timer = pin!(sleep_until(boottime::for_timers(until)));
        // Timers stand still while the host is suspended: the clock is read at every poll.
        let over = poll_fn(|cx| match boottime::now() < until {
            true => timer.as_mut().poll(cx),
            false => task::Poll::Ready(()),
        });
        tokio::select! {
            biased;
            changed = led.changed() => if changed.is_err() { return },
            () = over => {}
        }
    }
}

/// Stands for election until it is stopped. When it is dropped its connection is closed, and the key keeps its value
/// until its TTL.
#[derive(Debug)]
pub struct Campaign {
    election: Election,
    led: watch::Receiver<Leadership>,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Campaign {
    /// Begins at once; `place` is where the source of the replication is.
    pub fn start(dial: Arc<dyn Dial>, place: ServerRef, election: Election) -> Self {
        let (leadership, led) = watch::channel(Leadership::default());
        let stop = CancellationToken::new();
        let driver = driver::CampaignDriver::new(dial, place, election.clone(), leadership);
        let task = AbortOnDropHandle::new(tokio::spawn(driver.run(stop.clone())));
        Self { election, led, stop, task }
    }

    /// Its state, now and later; see [`won`] and [`lost`].
    pub fn led(&self) -> watch::Receiver<Leadership> {
        self.led.clone()
    }

    /// For observers.
    pub fn poll(&self) -> CampaignView {
        CampaignView { election: self.election.clone(), led: self.led() }
    }

    /// Ends it within 2 s. A key that is ours is released, so that others need not wait for the TTL; any other is not
    /// touched. Copying must have ended when this is called.
    pub async fn stop(self) {
        self.stop.cancel();
        let _ = timeout(LAST_WORDS, self.task).await;
    }
}

/// A campaign, for observers.
#[derive(Debug, Clone)]
pub struct CampaignView {
    election: Election,
    led: watch::Receiver<Leadership>,
}

impl CampaignView {
    /// The values for the metrics page.
    pub fn reading(&self) -> metrics::ElectionReading {
        let Leadership { until, campaigns, interval, .. } = &*self.led.borrow();
        metrics::ElectionReading {
            election: self.election.key.clone(),
            identity: self.election.candidate.clone(),
            as_candidate: campaigns.candidate,
            as_leader: campaigns.leader,
            leads: until.is_some_and(|until| boottime::now() < until),
            interval: *interval,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config;

    fn election(more: &[(&str, &str)]) -> Option<Election> {
        let mut document = json!({"stream": "ORDERS", "source_url": "a", "target_url": "b"});
        more.iter().for_each(|(field, text)| document[*field] = (*text).into());
        Election::of(&config::parse_value(&document, "SITE").unwrap())
    }

    #[test]
    fn keys_and_candidates_are_named_as_choria_names_them() {
        let check = |name: &str, expect: &str| {
            let election = election(&[("name", name), ("leader_election_name", "new.example.net")]).unwrap();
            assert_eq!((election.key.as_str(), election.candidate.as_str()), (expect, "new.example.net"), "{name}");
        };
        check("", "SR_SITE_ORDERS");
        check("SITE", "SR_SITE_ORDERS");
        check("EAST", "SR_EAST_ORDERS");
        check("SR", "SR_ORDERS");
        check("SR_EAST", "SR_SR_EAST_ORDERS");
        assert_eq!(election(&[("leader_election_name", "")]), None);
        assert_eq!(election(&[]), None);
    }

    fn leading(from: Instant, ms: u64) -> Leadership {
        Leadership { until: Some(from + Duration::from_millis(ms)), ..Leadership::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_by_refusal_by_time_and_with_the_campaign() {
        let begin = Instant::now();
        let (leadership, mut led) = watch::channel(leading(begin, 1000));
        // what is confirmed meanwhile counts
        let confirm = async {
            sleep_until(begin + Duration::from_millis(900)).await;
            leadership.send_replace(leading(begin, 2000));
        };
        tokio::join!(confirm, lost(&mut led));
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
        lost(&mut led).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(2));

        leadership.send_replace(leading(begin, 9000));
        let hear = async {
            sleep_until(begin + Duration::from_secs(3)).await;
            leadership.send_replace(Leadership::default());
        };
        tokio::join!(hear, lost(&mut led));
        assert_eq!(begin.elapsed(), Duration::from_secs(3));

        leadership.send_replace(leading(begin, 9000));
        drop(leadership);
        lost(&mut led).await;
        assert_eq!(begin.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_that_ended_while_the_host_was_suspended_is_lost() {
        let (_told, mut led) = watch::channel(leading(boottime::now(), 9000));
        let mut lost = pin!(lost(&mut led));
        assert!(futures_util::poll!(lost.as_mut()).is_pending());
        boottime::pretend_suspended(Duration::from_secs(60));
        assert!(futures_util::poll!(lost.as_mut()).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn a_victory_that_is_over_by_the_clock_is_none() {
        let begin = Instant::now();
        let (leadership, mut led) = watch::channel(leading(begin, 0));
        let win = async {
            sleep_until(begin + Duration::from_secs(1)).await;
            leadership.send_replace(leading(begin, 5000));
        };
        assert!(tokio::join!(win, won(&mut led)).1);
        assert_eq!(begin.elapsed(), Duration::from_secs(1));
        leadership.send_replace(Leadership::default());
        drop(leadership);
        assert!(!won(&mut led).await);
    }
}
