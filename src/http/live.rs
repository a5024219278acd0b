//! The live part of the status page: one task that keeps the history and, while there are viewers, sends them what changed.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::body::{Body, Bytes};
use chrono::{SecondsFormat, Utc};
use futures_util::{Stream, StreamExt, stream};
use nats_lane::ServerRef;
use serde::Serialize;
use tokio::{
    sync::{Notify, broadcast},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    Sources, earlier_events,
    history::{History, Observed, ShownSeries, rounded},
    recent_events::RecentEvents,
    rows::{GroupView, RowNumbers, SentView, ShownInstance, ShownRow, SnapshotOrigin},
};
use crate::{
    config::{NativeKind, Side},
    status::{GroupDrift, KnownDrift, Row},
    supervisor::{Handle, KnownSides, Peer},
};

/// Viewers at once.
pub(super) const MOST_VIEWERS: usize = 32;
/// How often viewers get what changed.
const FAST: Duration = Duration::from_secs(1);
/// How often the history is kept while there are none.
const SLOW: Duration = Duration::from_secs(5);
/// Messages that a viewer may be late; one that is later is dropped, and connects again.
const QUEUE: usize = 16;
/// A viewer hears something at least this often.
const SILENCE: Duration = Duration::from_secs(10);
/// Pause before events are subscribed to again.
const AGAIN: Duration = Duration::from_secs(5);

/// What all viewers share.
#[derive(Debug)]
pub(super) struct LivePage {
    sources: Sources,
    started: Instant,
    /// The same, for viewers.
    since: String,
    state: Mutex<LiveState>,
    viewers: broadcast::Sender<Bytes>,
    /// There is a first viewer.
    arrival: Notify,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct LiveState {
    history: History,
    events: RecentEvents,
    sent: SentView,
    observed: Option<Instant>,
    /// The stream that earlier events were read from.
    kept: Option<String>,
    /// Viewers need everything once more.
    renewed: bool,
}

/// All about one replication.
#[derive(Debug, Serialize)]
pub(super) struct Details {
    row: Row,
    history: Vec<ShownSeries>,
    /// The last comparison of the configurations; `None` where there was none yet.
    drift: Option<KnownDrift>,
}

impl LivePage {
    pub(super) fn new(sources: Sources, stop: CancellationToken) -> Arc<Self> {
        let (viewers, _) = broadcast::channel(QUEUE);
        let state = Mutex::default();
        let since = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
        Arc::new(Self { sources, started: Instant::now(), since, state, viewers, arrival: Notify::new(), stop })
    }

    /// Keeps the history and serves the viewers until the stop.
    pub(super) async fn run(self: Arc<Self>) {
        let stop = self.stop.clone();
        let work = async {
            tokio::join!(self.watch(), self.listen(), self.read_earlier());
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn watch(&self) {
        loop {
            let pace = if self.viewers.receiver_count() > 0 { FAST } else { SLOW };
            let _ = timeout(pace, self.arrival.notified()).await;
            let viewed = self.viewers.receiver_count() > 0;
            self.refresh(&mut self.lock(), viewed);
        }
    }

    /// Collects the events of the whole group.
    async fn listen(&self) {
        loop {
            match self.sources.client.subscribe(format!("{}.event.>", self.sources.prefix)).await {
                Ok(mut events) => {
                    while let Some(message) = events.next().await {
                        self.lock().events.push(&message.payload);
                    }
                }
                Err(error) => debug!("events are not shown: {error}"),
            }
            sleep(AGAIN).await;
        }
    }

    /// Reads the events from before the start, once, where a stream keeps them.
    async fn read_earlier(&self) {
        let Some((stream, events)) = earlier_events::read(&self.sources).await else { return };
        let mut state = self.lock();
        state.events.put_before(&events);
        state.kept = Some(stream);
        state.renewed = true;
    }

    /// Everything now, and what changes after that; `None` where there are too many viewers.
    pub(super) fn join(&self) -> Option<Body> {
        let mut state = self.lock();
        if self.viewers.receiver_count() >= MOST_VIEWERS {
            return None;
        }
        let alone = self.viewers.receiver_count() == 0;
        if alone {
            state.sent.clear();
            self.arrival.notify_one();
        }
        if alone || state.observed.is_none_or(|at| at.elapsed() >= FAST) {
            self.refresh(&mut state, true);
        }
        let snapshot = self.snapshot(&mut state);
        let changes = self.viewers.subscribe();
        Some(Body::from_stream(frames(snapshot, changes, self.stop.clone())))
    }

    /// All about one replication, if it exists.
    pub(super) fn details(&self, id: &str) -> Option<Details> {
        let row = self.supervisor()?.row(id)?;
        let history = self.lock().history.shown(id);
        let drift = self.drift().get(id).map(|known| KnownDrift::clone(known));
        Some(Details { row, history, drift })
    }

    /// Brings the history up to date, and what is sent where someone views it.
    fn refresh(&self, state: &mut LiveState, viewed: bool) {
        let Some(supervisor) = self.supervisor() else { return };
        let rows = supervisor.rows();
        state.observed = Some(Instant::now());
        let observed = rows.iter().map(|row| {
            let copied = row.leader.is_some().then_some(row.copy.counters.copied);
            (row.replication.as_str(), Observed { copied, lag: row.copy.lag.map(|lag| lag.messages) })
        });
        state.history.observe(self.started.elapsed(), observed);
        if !viewed {
            return;
        }
        let view = view(&supervisor, rows, &state.history, &self.drift());
        let worn = state.sent.is_worn() || std::mem::take(&mut state.renewed);
        if worn {
            state.sent.clear();
        }
        let events = state.events.since(state.sent.last_event());
        let Some(delta) = state.sent.update(view, events) else { return };
        let message = if worn { self.snapshot(state) } else { frame("delta", &delta) };
        // An error means that the last viewer left.
        let _ = self.viewers.send(message);
    }

    fn snapshot(&self, state: &mut LiveState) -> Bytes {
        let LiveState { history, events, sent, kept, .. } = state;
        let Sources { site, instance, .. } = &self.sources;
        let origin = SnapshotOrigin { site, instance, since: &self.since, kept: kept.as_deref() };
        // What comes after the last that was sent is in the next message for all.
        let mut events = events.since(0);
        events.retain(|event| event.number <= sent.last_event());
        frame("snapshot", &sent.snapshot(origin, events, |id| history.lines(id)))
    }

    fn supervisor(&self) -> Option<Handle> {
        self.sources.progress.borrow().supervisor.clone()
    }

    fn drift(&self) -> Arc<GroupDrift> {
        self.sources.progress.borrow().drift.as_ref().map(|drift| drift.borrow().clone()).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, LiveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One server-sent event; JSON has no line ends.
fn frame(name: &str, json: &str) -> Bytes {
    format!("event: {name}\ndata: {json}\n\n").into()
}

/// The body for one viewer. It ends for one that is too late with reading, whose connection then ends.
fn frames(
    first: Bytes,
    changes: broadcast::Receiver<Bytes>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    let next = |(changes, stop): (broadcast::Receiver<Bytes>, CancellationToken)| async move {
        let mut changes = changes;
        let received = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            received = timeout(SILENCE, changes.recv()) => received,
        };
        match received {
            Ok(Ok(bytes)) => Some((Ok(bytes), (changes, stop))),
            Ok(Err(_)) => None,
            Err(_) => Some((Ok(frame("quiet", "{}")), (changes, stop))),
        }
    };
    stream::once(async move { Ok(first) }).chain(stream::unfold((changes, stop), next))
}

fn view(supervisor: &Handle, rows: Vec<Row>, history: &History, drift: &GroupDrift) -> GroupView {
    let mut sides = supervisor.sides();
    let rows = rows.into_iter().map(|row| {
        let sides = sides.remove(&row.replication);
        let known = drift.get(&row.replication).filter(|known| known.count.is_some());
        ShownRow { drift: known.map(|known| known.words.clone()), ..shown_row(row, sides, history) }
    });
    GroupView { rows: rows.collect(), instances: supervisor.peers().into_iter().map(shown_instance).collect() }
}

fn shown_row(row: Row, sides: Option<KnownSides>, history: &History) -> ShownRow {
    let Row { replication: id, state, leader, copy, todo, .. } = row;
    let kind = match sides.as_ref().and_then(|sides| sides.native) {
        None => "copy",
        Some(NativeKind::Mirror) => "mirror",
        Some(NativeKind::Source) => "source",
    };
    let side = |side: Option<&Side>, stream: String| match side {
        Some(side) => (place(&side.place), side.stream.clone()),
        None => (String::new(), stream),
    };
    let (from, from_stream) = side(sides.as_ref().map(|sides| &sides.source), copy.source.stream);
    let (to, to_stream) = side(sides.as_ref().map(|sides| &sides.target), copy.target.stream);
    let rate = leader.as_ref().and_then(|_| history.rate(&id)).map(rounded);
    let numbers = RowNumbers {
        rate,
        lag: copy.lag.map(|lag| lag.messages),
        lag_seconds: copy.lag.filter(|lag| lag.messages > 0).and_then(|lag| lag.seconds).map(coarse),
    };
    ShownRow {
        state: format!("{state:?}").to_lowercase(),
        kind,
        from,
        from_stream,
        to,
        to_stream,
        leader,
        todo,
        error: copy.last_error.filter(|error| error.current).map(|error| error.message),
        drift: None,
        numbers,
        id,
    }
}

/// Whole seconds, and coarser where they are many: they change all the time.
fn coarse(seconds: f64) -> u64 {
    let step = match seconds {
        ..60.0 => 1.0,
        ..3_600.0 => 10.0,
        _ => 60.0,
    };
    ((seconds / step).floor() * step) as u64
}

/// The servers of a side, without the login: replications of one cluster are seen together.
fn place(server: &ServerRef) -> String {
    let ServerRef::Known(connection) = server else { return server.to_string() };
    let hosts: Vec<String> = connection.endpoint.hosts.iter().map(ToString::to_string).collect();
    let api = match connection.api_prefix.as_str() {
        "$JS.API" => String::new(),
        prefix => format!(" {prefix}"),
    };
    format!("{}{api}", hosts.join(","))
}

fn shown_instance(Peer { session, silent, leads }: Peer) -> ShownInstance {
    // The time of renewals is no news.
    let silent = if silent < SILENCE { 0 } else { silent.as_secs() };
    ShownInstance {
        instance: session.instance,
        host: session.host,
        version: session.program,
        started: session.started.to_rfc3339_opts(SecondsFormat::Secs, true),
        silent,
        leads: leads.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_viewer_that_is_too_late_is_dropped() {
        let (sender, receiver) = broadcast::channel(QUEUE);
        let mut late = Box::pin(frames("first".into(), receiver, CancellationToken::new()));
        let mut prompt = Box::pin(frames("first".into(), sender.subscribe(), CancellationToken::new()));
        prompt.next().await;
        for number in 0..=QUEUE {
            sender.send(Bytes::from(number.to_string())).unwrap();
            assert_eq!(prompt.next().await, Some(Ok(Bytes::from(number.to_string()))));
        }
        assert_eq!(late.next().await, Some(Ok("first".into())));
        assert_eq!(late.next().await, None);
        drop((late, prompt));
        assert_eq!(sender.receiver_count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_viewer_hears_something_and_ends_with_the_process() {
        let (_sender, receiver) = broadcast::channel(QUEUE);
        let stop = CancellationToken::new();
        let mut viewer = Box::pin(frames("first".into(), receiver, stop.clone()));
        viewer.next().await;
        assert_eq!(viewer.next().await, Some(Ok("event: quiet\ndata: {}\n\n".into())));
        stop.cancel();
        assert_eq!(viewer.next().await, None);
    }

    #[test]
    fn seconds_of_a_lag_become_coarse() {
        for (seconds, expect) in [(0.4, 0), (59.9, 59), (61.0, 60), (119.0, 110), (3_661.0, 3_660)] {
            assert_eq!(coarse(seconds), expect, "{seconds}");
        }
    }
}
