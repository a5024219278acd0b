//! Keeps the drift of all replications for the status page and the metrics: compares them a few at a time, so that the servers
//! get few questions, whatever number of replications there is.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    RequestContext, drift,
    stream_answers::{ReportedReplication, replications},
};
use crate::status::{GroupDrift, State};

/// Replications that are compared with one connection to each of their servers.
const AT_ONCE: usize = 100;
/// Deadline for the answers of their servers.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The time that each of them takes on average: two streams each, so the servers of a group are asked 20 times a second at most.
const EACH: Duration = Duration::from_millis(100);
/// Time between two comparisons of one replication, at least.
const PACE: Duration = Duration::from_secs(15);
/// Time until the first one: what starts with the process gets its target.
const FIRST: Duration = Duration::from_secs(2);
/// Longest time until a replication is compared again whose servers do not answer, or refuse the login.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Replications whose last comparisons failed: how long each waits, and until when.
type Pauses = HashMap<String, (Duration, Instant)>;

/// Compares until the stop.
pub(crate) async fn run(context: Arc<RequestContext>, known: watch::Sender<Arc<GroupDrift>>, stop: CancellationToken) {
    let work = async {
        context.supervisor.loaded().await;
        sleep(FIRST).await;
        let mut pauses = Pauses::new();
        loop {
            let next = Instant::now() + PACE;
            round(&context, &known, &mut pauses).await;
            sleep_until(next).await;
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = work => {}
    }
}

/// Compares each replication once, but those that are paused, or whose comparison failed and that have to wait.
async fn round(context: &RequestContext, known: &watch::Sender<Arc<GroupDrift>>, pauses: &mut Pauses) {
    let all = replications(context);
    let ids: BTreeSet<&str> = all.iter().map(ReportedReplication::id).collect();
    known.send_modify(|known| {
        if known.keys().any(|id| !ids.contains(id.as_str())) {
            Arc::make_mut(known).retain(|id, _| ids.contains(id.as_str()));
        }
    });
    pauses.retain(|id, _| ids.contains(id.as_str()));
    let begin = Instant::now();
    let waits = |id: &str| pauses.get(id).is_some_and(|(_, until)| begin < *until);
    let due = all.into_iter().filter(|one| one.row.state != State::Paused && !waits(one.id()));
    let due: Vec<ReportedReplication> = due.collect();
    for some in due.chunks(AT_ONCE) {
        let next = Instant::now() + EACH * some.len() as u32;
        let found = drift::known(context, some, Instant::now() + ANSWER_WITHIN).await;
        for (id, found) in &found {
            if found.error.is_none() {
                pauses.remove(id);
                continue;
            }
            let (pause, until) = pauses.entry(id.clone()).or_insert((PACE, begin));
            (*pause, *until) = ((*pause * 2).min(LONGEST_PAUSE), Instant::now() + *pause);
        }
        known.send_modify(|known| {
            Arc::make_mut(known).extend(found.into_iter().map(|(id, found)| (id, Arc::new(found))));
        });
        sleep_until(next).await;
    }
}
