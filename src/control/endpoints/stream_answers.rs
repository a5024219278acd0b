//! What the servers of all replications say of their streams: each place is connected to once, whatever number of replications
//! names it.

use std::collections::{BTreeSet, HashMap};

use futures_util::{StreamExt, stream};
use nats_lane::{
    Connection, Dial, ServerRef,
    jetstream::{Api, StreamInfo},
};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::RequestContext;
use crate::{
    config, names,
    status::{Row, State},
    supervisor::KnownSides,
};

/// ReportPlaces that are asked at once.
const PLACES_AT_ONCE: usize = 64;
/// Characters of an error that are shown.
const ERROR_LENGTH: usize = 300;

/// One replication of this service.
pub(super) struct ReportedReplication {
    pub(super) row: Row,
    /// `None` while no valid document is known.
    pub(super) sides: Option<KnownSides>,
    /// Seconds since its instance showed a sign of life.
    pub(super) active: Option<f64>,
}

impl ReportedReplication {
    pub(super) fn id(&self) -> &str {
        &self.row.replication
    }
}

/// All replications but those that only find streams, sorted by id.
pub(super) fn replications(context: &RequestContext) -> Vec<ReportedReplication> {
    let mut sides = context.supervisor.sides();
    let silent: HashMap<String, f64> =
        context.supervisor.peers().into_iter().map(|peer| (peer.session.instance, peer.silent.as_secs_f64())).collect();
    let wanted = context.supervisor.rows().into_iter().filter_map(|row| {
        let sides = sides.remove(&row.replication);
        // A document with patterns has no streams of its own.
        if sides.is_none() && row.state != State::Invalid {
            return None;
        }
        let connected = row.copy.source.connected && row.copy.target.connected;
        let leader = row.leader.as_ref().filter(|_| connected);
        let active = leader.and_then(|leader| match *leader == context.instance {
            true => Some(0.0),
            false => silent.get(leader).copied(),
        });
        Some(ReportedReplication { row, sides, active: active.map(thousandths) })
    });
    wanted.collect()
}

pub(super) fn short(error: &str) -> String {
    error.chars().take(ERROR_LENGTH).collect()
}

pub(super) fn thousandths(seconds: f64) -> f64 {
    (seconds * 1e3).round() / 1e3
}

/// Where streams are asked for: each place once, whatever number of replications names it.
#[derive(Default)]
pub(super) struct ReportPlaces {
    pub(super) places: Vec<ReportPlace>,
}

/// One of them.
pub(super) struct ReportPlace {
    server: ServerRef,
    /// `Err` where it cannot be connected to.
    connection: Result<Connection, String>,
    streams: BTreeSet<String>,
}

/// What one place said.
#[derive(Default)]
pub(super) struct PlaceAnswer {
    /// Name of the server.
    pub(super) server: String,
    pub(super) streams: HashMap<String, Result<StreamInfo, String>>,
    /// Why there is no more.
    pub(super) failed: Option<String>,
}

impl ReportPlaces {
    pub(super) fn of(context: &RequestContext, wanted: &[ReportedReplication]) -> Self {
        let mut places = Self::default();
        for KnownSides { source, target, .. } in wanted.iter().filter_map(|wanted| wanted.sides.as_ref()) {
            for side in [source, target] {
                let index = places.index(&side.place).unwrap_or_else(|| {
                    let connection = context.rules.resolve(&side.place).map_err(|error| error.message);
                    places.places.push(ReportPlace {
                        server: side.place.clone(),
                        connection,
                        streams: BTreeSet::new(),
                    });
                    places.places.len() - 1
                });
                places.places[index].streams.insert(side.stream.clone());
            }
        }
        places
    }

    /// Most documents name one of few places, the last one most of all.
    pub(super) fn index(&self, server: &ServerRef) -> Option<usize> {
        self.places.iter().rposition(|place| place.server == *server)
    }

    /// What the servers of a side say of its stream.
    pub(super) fn info<'a>(&self, answers: &'a [PlaceAnswer], side: &config::Side) -> Result<&'a StreamInfo, &'a str> {
        let answer = &answers[self.index(&side.place).unwrap_or_default()];
        match answer.streams.get(&side.stream) {
            Some(info) => info.as_ref().map_err(String::as_str),
            None => Err(answer.failed.as_deref().unwrap_or("no answer")),
        }
    }

    pub(super) fn not_asked(&self, why: &str) -> Vec<PlaceAnswer> {
        let answer = |_: &ReportPlace| PlaceAnswer { failed: Some(why.to_owned()), ..PlaceAnswer::default() };
        self.places.iter().map(answer).collect()
    }

    /// Asks all of them until the time is over; the answers are in the order of the places.
    pub(super) async fn ask(&self, context: &RequestContext, until: Instant) -> Vec<PlaceAnswer> {
        let asked =
            self.places.iter().enumerate().map(|(at, place)| async move { (at, place.ask(context, until).await) });
        let asked: Vec<_> = asked.collect();
        // In any order: a silent server keeps no others waiting.
        let mut answers: Vec<_> = stream::iter(asked).buffer_unordered(PLACES_AT_ONCE).collect().await;
        answers.sort_unstable_by_key(|(at, _)| *at);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }
}

impl ReportPlace {
    async fn ask(&self, context: &RequestContext, until: Instant) -> PlaceAnswer {
        let mut answer = PlaceAnswer::default();
        let asked = async {
            let mut lane = context.rules.dial(&self.server, names::PROGRAM).await?;
            answer.server.clone_from(&lane.info().server_name);
            let note = |stream: String, info: Result<Option<StreamInfo>, nats_lane::Error>| {
                let missing = || format!("stream `{stream}` does not exist");
                let info = info.map_err(|error| error.message).and_then(|info| info.ok_or_else(missing));
                answer.streams.insert(stream, info);
            };
            Api::new(&mut lane).stream_infos(self.streams.iter().cloned(), note).await
        };
        answer.failed = match timeout_at(until, asked).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.message),
            Err(_) => Some("no answer in time".to_owned()),
        };
        answer
    }

    pub(super) fn api_prefix(&self) -> Option<&str> {
        self.connection.as_ref().ok().map(|connection| connection.api_prefix.as_str())
    }

    /// Servers, without secrets.
    pub(super) fn url(&self) -> String {
        self.connection.as_ref().map_or_else(|_| self.server.to_string(), |connection| connection.endpoint.to_string())
    }
}

/// Bytes that are left.
pub(super) struct ReplyRoom(usize);

impl ReplyRoom {
    pub(super) fn new(bytes: usize) -> Self {
        Self(bytes)
    }

    pub(super) fn holds(&self, cost: usize) -> bool {
        cost <= self.0
    }

    pub(super) fn takes(&mut self, cost: usize) -> bool {
        let left = self.0.checked_sub(cost);
        self.0 = left.unwrap_or_default();
        left.is_some()
    }
}

pub(super) fn size(row: &impl Serialize) -> usize {
    serde_json::to_vec(row).map_or(0, |json| json.len() + 1)
}
