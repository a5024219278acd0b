//! One event for the outage of a server, however many replications it stalls. A pure machine, and the task around it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::warn;

use crate::events::{Event, Events};

/// How long the first report of a server waits for others.
const GATHER: Duration = Duration::from_secs(2);
/// Replications that get events of their own: more of them within [`GATHER`] are reported together.
const SINGLY: usize = 4;
/// Reports that may wait for the task.
const QUEUE: usize = 8_192;
/// Ids in one event, at most.
const LISTED: usize = 1_000;

/// An event that is published, and what it is about.
type OutageNotice = (String, Event);

/// What a runner reports.
#[derive(Debug)]
enum Report {
    /// A transient error of the connection to a server.
    Stalled { server: String, id: String, event: Event },
    /// It copies again.
    Repaired { id: String, event: Event },
    /// It no longer waits for a server: it ended, or something else holds it.
    Left { id: String },
}

/// Takes the reports of all runners of a process; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ServerOutages {
    reports: mpsc::Sender<Report>,
    events: Events,
}

impl ServerOutages {
    /// Starts the task, which ends when the last clone is gone. `instance` is what events about a server are about.
    pub(super) fn start(events: Events, instance: &str) -> Self {
        let (reports, waiting) = mpsc::channel(QUEUE);
        tokio::spawn(follow(waiting, events.clone(), instance.to_owned()));
        Self { reports, events }
    }

    /// A replication is stalled by a server, which is named without secrets.
    pub(super) fn stalled(&self, server: String, id: &str, event: Event) {
        self.send(Report::Stalled { server, id: id.to_owned(), event });
    }

    /// A replication copies again.
    pub(super) fn repaired(&self, id: &str, event: Event) {
        self.send(Report::Repaired { id: id.to_owned(), event });
    }

    /// A replication waits for no server any more, and does not copy either.
    pub(super) fn left(&self, id: &str) {
        self.send(Report::Left { id: id.to_owned() });
    }

    fn send(&self, report: Report) {
        match self.reports.try_send(report) {
            Ok(()) => {}
            // One by one then: nothing is lost.
            Err(error) => match error.into_inner() {
                Report::Stalled { id, event, .. } | Report::Repaired { id, event } => self.events.emit(event, &id),
                Report::Left { .. } => {}
            },
        }
    }
}

async fn follow(mut waiting: mpsc::Receiver<Report>, events: Events, instance: String) {
    let mut outages = Outages::default();
    loop {
        let due = outages.next_due();
        let report = tokio::select! {
            report = waiting.recv() => report,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                publish(&events, outages.gathered(&instance, Instant::now()));
                continue;
            }
        };
        match report {
            Some(report) => publish(&events, outages.report(report, &instance, Instant::now())),
            None => return publish(&events, outages.end(&instance)),
        }
    }
}

fn publish(events: &Events, all: Vec<OutageNotice>) {
    for (about, event) in all {
        if let Event::Outage { server, count, .. } = &event {
            warn!(server, replications = count, "a server stalls many replications");
        }
        events.emit(event, &about);
    }
}

/// The outages of all servers.
#[derive(Debug, Default)]
struct Outages {
    servers: BTreeMap<String, ServerOutage>,
}

#[derive(Debug)]
struct ServerOutage {
    began: Instant,
    /// When what waits is published.
    due: Option<Instant>,
    waiting: BTreeMap<String, Event>,
    /// Replications that were reported together and are not repaired.
    stalled: BTreeSet<String>,
    /// Those that are.
    repaired: BTreeSet<String>,
}

impl Outages {
    fn next_due(&self) -> Option<Instant> {
        self.servers.values().filter_map(|server| server.due).min()
    }

    fn report(&mut self, report: Report, instance: &str, now: Instant) -> Vec<OutageNotice> {
        match report {
            Report::Stalled { server, id, event } => {
                let known = self.servers.values().any(|server| server.stalled.contains(&id));
                if !known {
                    let new = || ServerOutage {
                        began: now,
                        due: None,
                        waiting: BTreeMap::new(),
                        stalled: BTreeSet::new(),
                        repaired: BTreeSet::new(),
                    };
                    let outage = self.servers.entry(server).or_insert_with(new);
                    outage.due.get_or_insert(now + GATHER);
                    outage.waiting.insert(id, event);
                }
                Vec::new()
            }
            Report::Repaired { id, event } => {
                let mut published = self.before(&id);
                if !self.servers.values_mut().any(|server| server.settle(&id, true)) {
                    published.push((id, event));
                }
                published.extend(self.over(instance, now));
                published
            }
            Report::Left { id } => {
                let published = self.before(&id);
                self.servers.values_mut().for_each(|server| _ = server.settle(&id, false));
                published.into_iter().chain(self.over(instance, now)).collect()
            }
        }
    }

    /// What still waits about a replication: it is published before whatever follows.
    fn before(&mut self, id: &str) -> Vec<OutageNotice> {
        let found = self.servers.values_mut().filter_map(|server| server.waiting.remove(id));
        found.map(|event| (id.to_owned(), event)).collect()
    }

    /// What was gathered for long enough.
    fn gathered(&mut self, instance: &str, now: Instant) -> Vec<OutageNotice> {
        let mut published = Vec::new();
        for (name, server) in &mut self.servers {
            if server.due.is_some_and(|due| due <= now) {
                published.extend(server.publish(name, instance));
            }
        }
        published.extend(self.over(instance, now));
        published
    }

    fn end(&mut self, instance: &str) -> Vec<OutageNotice> {
        self.servers.iter_mut().flat_map(|(name, server)| server.publish(name, instance)).collect()
    }

    /// The outages that are over.
    fn over(&mut self, instance: &str, now: Instant) -> Vec<OutageNotice> {
        let mut published = Vec::new();
        self.servers.retain(|name, server| {
            let is_over = server.waiting.is_empty() && server.stalled.is_empty();
            if is_over && !server.repaired.is_empty() {
                let event = Event::OutageOver {
                    server: name.clone(),
                    count: server.repaired.len() as u64,
                    replications: listed(&server.repaired),
                    seconds: now.duration_since(server.began).as_secs(),
                };
                published.push((instance.to_owned(), event));
            }
            !is_over
        });
        published
    }
}

impl ServerOutage {
    fn publish(&mut self, name: &str, instance: &str) -> Vec<OutageNotice> {
        self.due = None;
        let waiting = std::mem::take(&mut self.waiting);
        let together = waiting.len() > SINGLY || !self.stalled.is_empty();
        if !together || waiting.is_empty() {
            return waiting.into_iter().collect();
        }
        let message = waiting.values().find_map(|event| match event {
            Event::Stalled { message, .. } => Some(message.clone()),
            _ => None,
        });
        let ids: BTreeSet<_> = waiting.into_keys().collect();
        let (count, replications) = (ids.len() as u64, listed(&ids));
        self.stalled.extend(ids);
        let (server, message) = (name.to_owned(), message.unwrap_or_default());
        vec![(instance.to_owned(), Event::Outage { server, message, count, replications })]
    }

    /// A replication no longer waits; returns whether it was reported with others.
    fn settle(&mut self, id: &str, repaired: bool) -> bool {
        let known = self.stalled.remove(id);
        if known && repaired {
            self.repaired.insert(id.to_owned());
        }
        known
    }
}

fn listed(ids: &BTreeSet<String>) -> Vec<String> {
    ids.iter().take(LISTED).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Step;

    const SERVER: &str = "nats://b";

    struct Group {
        outages: Outages,
        now: Instant,
    }

    impl Group {
        fn new() -> Self {
            Self { outages: Outages::default(), now: Instant::now() }
        }

        fn stalled(&mut self, ids: std::ops::Range<usize>) -> Vec<OutageNotice> {
            let mut published = Vec::new();
            for id in ids {
                let event = Event::Stalled { message: format!("{id} is cut off"), step: Step::Connections };
                let report = Report::Stalled { server: SERVER.to_owned(), id: format!("R{id}"), event };
                published.extend(self.outages.report(report, "one", self.now));
            }
            published
        }

        fn repaired(&mut self, id: usize) -> Vec<OutageNotice> {
            let report = Report::Repaired { id: format!("R{id}"), event: Event::Repaired { position: 1 } };
            self.outages.report(report, "one", self.now)
        }

        fn left(&mut self, id: usize) -> Vec<OutageNotice> {
            self.outages.report(Report::Left { id: format!("R{id}") }, "one", self.now)
        }

        /// Time passes until everything that waits is published.
        fn gathered(&mut self) -> Vec<OutageNotice> {
            self.now += GATHER;
            self.outages.gathered("one", self.now)
        }
    }

    fn kinds(published: &[OutageNotice]) -> Vec<(&str, &'static str)> {
        published.iter().map(|(about, event)| (about.as_str(), event.kind())).collect()
    }

    #[test]
    fn a_few_replications_have_events_of_their_own() {
        let mut group = Group::new();
        assert!(group.stalled(1..3).is_empty() && group.outages.gathered("one", group.now).is_empty());
        assert_eq!(kinds(&group.gathered()), [("R1", "stalled"), ("R2", "stalled")]);
        assert_eq!(kinds(&group.repaired(1)), [("R1", "repaired")]);
        assert_eq!(kinds(&group.repaired(2)), [("R2", "repaired")]);
        assert_eq!(group.outages.next_due(), None);
    }

    #[test]
    fn many_are_reported_together_and_once_more_at_the_end() {
        let mut group = Group::new();
        group.stalled(0..205);
        let published = group.gathered();
        assert_eq!(kinds(&published), [("one", "outage")]);
        let Event::Outage { server, message, count, replications } = &published[0].1 else { panic!("{published:?}") };
        assert_eq!((server.as_str(), *count, replications.len()), (SERVER, 205, 205));
        assert_eq!(message, "0 is cut off");
        // Further steps of the repair are no news.
        assert!(group.stalled(0..205).is_empty() && group.gathered().is_empty());
        assert!((0..203).all(|id| group.repaired(id).is_empty()));
        assert!(group.left(203).is_empty());
        let published = group.repaired(204);
        assert_eq!(kinds(&published), [("one", "outage-over")]);
        let Event::OutageOver { count, seconds, .. } = &published[0].1 else { panic!("{published:?}") };
        assert_eq!((*count, *seconds), (204, 4));
        assert!(group.outages.servers.is_empty());
    }

    #[test]
    fn one_that_joins_later_is_reported_later() {
        let mut group = Group::new();
        group.stalled(0..5);
        group.gathered();
        group.stalled(5..6);
        let published = group.gathered();
        let Event::Outage { count, replications, .. } = &published[0].1 else { panic!("{published:?}") };
        assert_eq!((*count, replications.as_slice()), (1, &["R5".to_owned()][..]));
    }

    #[test]
    fn what_waits_is_published_before_its_end() {
        let mut group = Group::new();
        group.stalled(0..3);
        assert_eq!(kinds(&group.repaired(1)), [("R1", "stalled"), ("R1", "repaired")]);
        assert_eq!(kinds(&group.left(2)), [("R2", "stalled")]);
        assert_eq!(kinds(&group.outages.end("one")), [("R0", "stalled")]);
    }
}
