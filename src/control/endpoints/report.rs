//! `report`: the streams of both sides of every replication, as their servers describe them now, and what fills them.
//!
//! One instance answers for the group. It connects once to each place that the documents name and asks there for all streams at
//! once, so that a thousand replications of one link take two connections.

use std::collections::{BTreeMap, BTreeSet};

use nats_lane::jetstream::{SourceProgress, StreamInfo};
use tokio::time::{Duration, Instant, timeout_at};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    DEFAULT_LIMIT, RequestContext, drift, options,
    stream_answers::{
        PlaceAnswer, ReplyRoom, ReportPlace, ReportPlaces, ReportedReplication, replications, short, size, thousandths,
    },
};
use crate::{
    config,
    control::{
        api::{Failure, ReplicationKind, ReportReplication, ReportRequest, ReportStream, StreamKind, StreamReport},
        service::Request,
    },
    native::FeedSubjects,
    supervisor::KnownSides,
};

/// From the request to the answer. What no server has said by then is not known.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_000);
/// Prefix that needs no word.
const DEFAULT_API_PREFIX: &str = "$JS.API";

pub(super) async fn report(context: &RequestContext, request: Request) -> Result<StreamReport, Failure> {
    let until = Instant::now() + ANSWER_WITHIN;
    let ReportRequest { offset, limit } = options(&request.body)?;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    let busy = || Failure::new(503, "too many reports at once: try again");
    let _permit = timeout_at(until, context.reports.acquire()).await.map_err(|_| busy())?.map_err(|_| busy())?;
    let all = replications(context);
    let total = all.len();
    let wanted: Vec<_> = all.into_iter().skip(offset).take(limit).collect();
    let places = ReportPlaces::of(context, &wanted);
    let answers = match context.read_only {
        true => places.not_asked("the service is read-only: it connects to no server on request"),
        false => places.ask(context, until).await,
    };
    let mut report = StreamReport { site: context.site.clone(), offset, limit, total, ..StreamReport::default() };
    fill(&mut report, context, &wanted, &places, &answers);
    Ok(report)
}

impl PlaceAnswer {
    fn row(&self, place: &ReportPlace, stream: &str) -> ReportStream {
        let url = place.url();
        let api_prefix = place.api_prefix().filter(|prefix| *prefix != DEFAULT_API_PREFIX).map(str::to_owned);
        let node = node(&[stream, &url, api_prefix.as_deref().unwrap_or_default()]);
        let row = ReportStream { node, stream: stream.to_owned(), url, api_prefix, ..ReportStream::default() };
        let error = match self.streams.get(stream) {
            Some(Ok(info)) => return seen(row, info, &self.server),
            Some(Err(error)) => error.as_str(),
            None => self.failed.as_deref().unwrap_or("no answer"),
        };
        ReportStream { error: Some(short(error)), ..row }
    }
}

/// The row of a stream that was seen. Where two documents name one stream by different addresses or logins, it is one row.
fn seen(row: ReportStream, info: &StreamInfo, server: &str) -> ReportStream {
    let filled = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let cluster = info.cluster.as_ref().and_then(|cluster| filled(&cluster.name).or_else(|| filled(&cluster.leader)));
    let cluster = cluster.or_else(|| filled(server));
    let domain = info.domain.clone();
    let identity =
        [&row.stream, cluster.as_deref().unwrap_or_default(), domain.as_deref().unwrap_or_default(), &info.created];
    let kind = match (info.has("mirror"), info.has("sources")) {
        (true, _) => StreamKind::Mirror,
        (false, true) => StreamKind::Source,
        (false, false) => StreamKind::Stream,
    };
    let state = &info.state;
    ReportStream {
        node: node(&identity),
        cluster,
        domain,
        leader: info.cluster.as_ref().and_then(|cluster| filled(&cluster.leader)),
        storage: filled(info.text("storage")),
        kind: Some(kind),
        replicas: u64::try_from(info.number("num_replicas")).ok(),
        consumers: u64::try_from(state.consumers).ok(),
        messages: Some(state.messages),
        bytes: Some(state.bytes),
        lost: Some(state.lost),
        deleted: Some(state.deleted),
        first_seq: Some(state.first_seq),
        last_seq: Some(state.last_seq),
        ..row
    }
}

fn node(parts: &[&str]) -> String {
    format!("{:016x}", xxh3_64(parts.join("\0").as_bytes()))
}

/// Fills a reply up to what one message holds; at least with one replication, so that the pages come to an end.
fn fill(
    report: &mut StreamReport,
    context: &RequestContext,
    wanted: &[ReportedReplication],
    places: &ReportPlaces,
    answers: &[PlaceAnswer],
) {
    let feeds = feeds(context);
    let mut room = ReplyRoom::new(context.room());
    let mut streams: BTreeMap<(String, String), ReportStream> = BTreeMap::new();
    let mut native: BTreeMap<(String, String), Vec<ReportReplication>> = BTreeMap::new();
    for wanted in wanted {
        let ends = wanted.sides.as_ref().map(|sides| Ends::of(sides, places, answers));
        let row = replication(context, wanted, ends.as_ref());
        let mut cost = size(&row);
        let mut found = Vec::new();
        for end in ends.iter().flat_map(|ends| [&ends.source, &ends.target]) {
            let key = (end.row.stream.clone(), end.row.node.clone());
            if !streams.contains_key(&key) {
                let others = end.natives(&feeds, places, answers);
                cost += size(&end.row) + others.iter().map(size).sum::<usize>();
                found.push((key, end.row.clone(), others));
            }
        }
        if !room.takes(cost) && !report.replications.is_empty() {
            break;
        }
        report.replications.push(row);
        for (key, row, others) in found {
            native.insert(key.clone(), others);
            streams.insert(key, row);
        }
    }
    report.streams = streams.into_values().collect();
    report.native = native.into_values().flatten().collect();
}

/// The API prefixes that this service answers.
fn feeds(context: &RequestContext) -> BTreeSet<String> {
    let sides = context.supervisor.sides().into_iter().filter(|(_, sides)| sides.native.is_some());
    sides.map(|(id, _)| FeedSubjects::of(&context.site, &id).api()).collect()
}

/// Both streams of a replication.
struct Ends<'a> {
    source: End<'a>,
    target: End<'a>,
}

/// One stream, and what its server said.
struct End<'a> {
    place: usize,
    row: ReportStream,
    info: Option<&'a StreamInfo>,
}

impl<'a> Ends<'a> {
    fn of(sides: &KnownSides, places: &ReportPlaces, answers: &'a [PlaceAnswer]) -> Self {
        let end =
            |side: &config::Side| End::of(places.index(&side.place).unwrap_or_default(), &side.stream, places, answers);
        Self { source: end(&sides.source), target: end(&sides.target) }
    }
}

impl<'a> End<'a> {
    fn of(place: usize, stream: &str, places: &ReportPlaces, answers: &'a [PlaceAnswer]) -> Self {
        let answer = &answers[place];
        let info = answer.streams.get(stream).and_then(|info| info.as_ref().ok());
        Self { place, row: answer.row(&places.places[place], stream), info }
    }

    /// Where the stream gets messages from, in the sense of its server.
    fn origins(&self) -> impl Iterator<Item = (ReplicationKind, &'a SourceProgress)> {
        let mirror = self.info.and_then(|info| info.mirror.as_ref()).map(|mirror| (ReplicationKind::Mirror, mirror));
        let sources = self.info.map(|info| info.sources.as_slice()).unwrap_or_default();
        mirror.into_iter().chain(sources.iter().map(|source| (ReplicationKind::Source, source)))
    }

    /// Its mirrors and sources that this service does not feed.
    fn natives(
        &self,
        feeds: &BTreeSet<String>,
        places: &ReportPlaces,
        answers: &[PlaceAnswer],
    ) -> Vec<ReportReplication> {
        let others = self.origins().filter(|(_, progress)| api(progress).is_none_or(|api| !feeds.contains(api)));
        let row = |(kind, progress): (ReplicationKind, &SourceProgress)| {
            // Without a prefix it is a stream of the same account; it may be among those that were asked for.
            let beside = api(progress).is_none().then(|| End::of(self.place, &progress.name, places, answers));
            ReportReplication {
                replication: None,
                stream: self.row.stream.clone(),
                kind,
                from: api(progress).map(str::to_owned),
                source_stream: progress.name.clone(),
                active: active(progress),
                lag: Some(progress.lag),
                state: None,
                error: error(progress),
                drift: None,
                source: beside.filter(|beside| beside.info.is_some()).map(|beside| beside.row.node),
                target: Some(self.row.node.clone()),
            }
        };
        others.map(row).collect()
    }
}

/// API prefix of an origin; `None` in the same account.
fn api(progress: &SourceProgress) -> Option<&str> {
    progress.external.as_ref().map(|external| external.api.as_str()).filter(|api| !api.is_empty())
}

fn active(progress: &SourceProgress) -> Option<f64> {
    u64::try_from(progress.active).ok().map(|nanos| thousandths(Duration::from_nanos(nanos).as_secs_f64()))
}

fn error(progress: &SourceProgress) -> Option<String> {
    progress.error.as_ref().map(|error| short(&error.description))
}

fn replication(context: &RequestContext, wanted: &ReportedReplication, ends: Option<&Ends<'_>>) -> ReportReplication {
    let ReportedReplication { row, sides, active: alive } = wanted;
    let current = row.copy.last_error.as_ref().filter(|error| error.current);
    let mut shown = ReportReplication {
        replication: Some(row.replication.clone()),
        stream: row.copy.target.stream.clone(),
        kind: ReplicationKind::Copy,
        from: None,
        source_stream: row.copy.source.stream.clone(),
        active: *alive,
        lag: row.copy.lag.map(|lag| lag.messages),
        state: Some(row.state),
        error: current.map(|error| short(&error.message)),
        drift: None,
        source: None,
        target: None,
    };
    let (Some(sides), Some(Ends { source, target })) = (sides, ends) else { return shown };
    shown.stream.clone_from(&sides.target.stream);
    shown.source_stream.clone_from(&sides.source.stream);
    shown.from = Some(source.row.url.clone());
    shown.kind = sides.native.into();
    (shown.source, shown.target) = (Some(source.row.node.clone()), Some(target.row.node.clone()));
    if let (Some(from), Some(to)) = (source.info, target.info) {
        shown.drift = Some(drift::count(&sides.replication, &context.site, from, to));
    }
    if sides.native.is_some() {
        // The target's server knows best.
        let prefix = FeedSubjects::of(&context.site, &row.replication).api();
        let fed =
            target.origins().map(|(_, progress)| progress).find(|progress| api(progress) == Some(prefix.as_str()));
        shown.active = fed.and_then(active);
        shown.lag = shown.lag.or(fed.map(|progress| progress.lag));
        shown.error = shown.error.or_else(|| fed.and_then(error));
    }
    shown
}
