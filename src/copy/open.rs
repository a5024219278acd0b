//! Opens a run, in typed steps that build on each other: connect both sides, read the streams and create or update the
//! target, determine where to resume, open reader and writer.

use std::sync::Arc;

use bytes::Bytes;
use nats_lane as nats;
use nats_lane::{
    Lane,
    jetstream::{Api, ConsumerInfo, StreamInfo, decode},
};
use tokio::{sync::watch, time::Instant};
use tracing::info;

use super::{
    Error, ErrorKind, Job,
    decide::CopyRules,
    flow::{
        bounds::Bounds,
        position::{PositionWriter, another_kind},
        watchdog::Watchdog,
        window::Window,
    },
    objects::Gate,
    reject::{Refused, Rejects},
    reporter::Reporter,
    resume::{self, Resume, Sides, is_plain},
    returned::ReturnedMessages,
    run::{Run, Times},
    sampling_driver::SamplingDriver,
    source::{
        clock::SourceClock,
        consumers::Names,
        durable::{Durable, Owner},
        gap::Gaps,
        intake::Intake,
        retention::{PollHistory, Retention},
        source_half::{SourceHalf, StatePolls, heard},
    },
    target::{
        bridge, dead_letter,
        drops::Drops,
        mode,
        provenance::{Tag, at_end, came_from},
        stream::{self, Abilities, Opened, Opening},
        target_half::TargetHalf,
        target_limits,
        target_watch::TargetWatch,
        writer::Writer,
    },
};
use crate::{
    config::{NativeKind, OnReject, OriginTag, Replication, Side},
    events::{Event, Events},
    names,
    status::{CopyStatus, State, TargetMode},
    store::Stamps,
};

/// The inputs of a run that is opened.
#[derive(Clone, Copy)]
pub(super) struct Opener<'a> {
    pub job: &'a Job,
    pub status: &'a watch::Sender<(State, CopyStatus)>,
    pub events: &'a Events,
}

/// One connection, and the names of our consumers on it.
struct Connected {
    lane: Lane,
    names: Names,
}

/// Both sides, connected.
struct Lanes {
    /// With the bounds of this run.
    replication: Arc<Replication>,
    source: Connected,
    target: Connected,
}

/// The first answers of both sides about their streams; `None` where there is none.
struct FirstAnswers {
    source: Option<StreamInfo>,
    /// When the request to the source was sent, and when its answer was received.
    sent: Instant,
    received: Instant,
    target: Option<StreamInfo>,
    /// The ack floor of the consumers of Choria's replicator; `None` where it is not known.
    acked: Option<Option<u64>>,
}

/// The two streams as they are now.
struct Streams {
    source: StreamInfo,
    /// As in [`FirstAnswers`].
    acked: Option<Option<u64>>,
    clock: SourceClock,
    target: StreamInfo,
    abilities: Abilities,
}

/// Where the run resumes.
struct Found {
    resume: Resume,
    tag: Tag,
    /// The durable consumer at the source.
    durable: Option<Durable>,
    /// The installation whose name the durable consumer carries.
    installation: String,
    /// The position is before the saved one.
    goes_back: bool,
    /// The source is a different stream than before.
    another: bool,
}

impl<'a> Opener<'a> {
    /// Connects both sides, determines where to resume, and creates the consumer.
    pub async fn open(self, positions: &mut PositionWriter, refused: &'a mut Refused) -> Result<Run<'a>, Error> {
        let replication = &self.job.replication;
        self.status.send_modify(|(_, copy)| {
            copy.source.stream.clone_from(&replication.source.stream);
            copy.target.stream.clone_from(&replication.target.stream);
        });
        let (mut lanes, first) = Lanes::connect(self.job, positions).await?;
        let mut streams = self.read_streams(&mut lanes, first, positions).await?;
        self.job.refuse_echo(&streams.source)?;
        let mut found = Box::pin(self.find(&mut lanes, &mut streams, positions)).await?;
        let (sampler, reader) = self.read(&mut lanes, &streams, &mut found, positions).await?;
        positions.begin_at(streams.target.state.last_seq);
        let Lanes { replication, source, target } = &mut lanes;
        refused.begin(&streams.target, found.resume.position.seq);
        let generation = positions.record().generation;
        let rejects = Rejects::open(&mut source.lane, replication, &found.tag, generation, refused);
        let writer = write(replication, &mut target.lane, &streams, &found, positions).await?;
        let created = &streams.target.created;
        let (protection, remembered) = (replication.loop_protection.as_ref(), positions.record().from_target.as_ref());
        let returned = ReturnedMessages::new(protection, &self.job.ways_back, remembered, created);
        positions.knows_from_target(returned.remembered(created)).await?;
        let goes_back = found.goes_back;
        let mut report =
            Reporter::new(self.job, replication.clone(), self.status, self.events, found.resume.position.seq);
        show(&mut report.copy, &lanes, &streams, &writer, sampler.is_some());
        let drops = begin_drops(positions, &lanes.replication, &streams, &found.resume, returned.is_empty());
        let target_info = streams.target.clone();
        let (mut run, resume) =
            assemble(report, lanes, streams, (found, returned), (reader, sampler), (writer, rejects), drops);
        run.begin(&target_info, resume, goes_back, positions).await?;
        Ok(run)
    }

    /// Checks whether the source stream may be copied, and creates or updates the target stream.
    async fn read_streams(
        self,
        lanes: &mut Lanes,
        first: FirstAnswers,
        positions: &mut PositionWriter,
    ) -> Result<Streams, Error> {
        let (job, Lanes { replication, source, target }) = (self.job, lanes);
        let FirstAnswers { source: source_info, sent, received, target: known, acked } = first;
        let end_before = known.as_ref().map_or(0, |info| info.state.last_seq);
        if !positions.knows_kind() {
            let fed = [OriginTag::fed(&replication.source.stream, &job.site, &replication.id)];
            let is_fed = |header: &[u8]| came_from(header, &fed);
            let stream = &replication.target.stream;
            if at_end(&mut target.lane, stream, end_before, is_fed).await.map_err(Error::of_target)? {
                let why = another_kind(Some(NativeKind::Source), None, stream);
                return Err(Error::new(ErrorKind::Hold, why));
            }
        }
        positions.stores_as(None, &replication.target.stream, end_before).await?;
        let source_info = source_info.ok_or_else(|| {
            Error::new(ErrorKind::Hold, format!("source stream `{}` does not exist", replication.source.stream))
        })?;
        let mut clock = SourceClock::new(&heard(sent, received, &source_info));
        if let Some(why) = job.own_streams.refuse(&replication.source.stream, &source_info.created) {
            return Err(Error::of_source(nats::Error::hold(why)));
        }
        if let OnReject::DeadLetter { subject } = &replication.on_reject {
            dead_letter::not_into_source(&replication.source.stream, &source_info, subject)?;
        }
        if positions.record().source.is_none() {
            bridge::check(job, &mut source.lane, &mut target.lane, &source_info).await?;
        }
        let opening = Opening::new(job, &mut source.lane, &mut target.lane, &source_info, None).with_answer(known);
        let (target_info, opened) = opening.open().await.map_err(Error::of_target)?;
        log_opened(replication, opened);
        let mut source_info = source_info;
        // Messages that an earlier holder copied meanwhile do not prove that the source lost its end.
        if target_info.state.last_seq > end_before {
            let sent = Instant::now();
            if let Some(again) = Api::new(&mut source.lane).stream_info(&replication.source.stream).await? {
                clock.hear(&heard(sent, Instant::now(), &again));
                source_info = again;
            }
        }
        let abilities = stream::abilities(replication, &job.site, &source_info, &target_info)?;
        if positions.record().moved_back {
            positions.save_unproven(target_info.state.last_seq, &target_info.created).await?;
        }
        Ok(Streams { source: source_info, acked, clock, target: target_info, abilities })
    }

    /// Determines where to resume.
    async fn find(
        self,
        lanes: &mut Lanes,
        streams: &mut Streams,
        positions: &mut PositionWriter,
    ) -> Result<Found, Error> {
        let (job, Lanes { replication, source, target }) = (self.job, lanes);
        let installation = positions.record().installation.as_ref().unwrap_or(&job.installation).clone();
        let owner = Owner { site: &job.site, installation: &installation };
        let durable = match Durable::is_needed(&streams.source) {
            true => Durable::find(&mut source.lane, replication, owner).await.map_err(Error::of_source)?,
            false => None,
        };
        let tag = Tag::new(&replication.source.stream, &job.site, &replication.name)
            .with_former(&replication.former)
            .leading(replication.provenance_first);
        let (mode, news) = mode::begin(replication, &streams.target, positions.record(), job.neighbour.as_deref());
        streams.abilities.share(mode);
        self.status.send_modify(|(_, copy)| copy.target_mode = mode);
        let sides = Sides {
            replication,
            tag: &tag,
            source_lane: &mut source.lane,
            target_lane: &mut target.lane,
            source_names: &mut source.names,
            target_names: &mut target.names,
            source: &streams.source,
            clock: streams.clock,
            target: &streams.target,
            durable: durable.as_ref(),
            acked: streams.acked,
            chain_broke_after: positions.chain_broke_after(),
            orphans: positions.record().orphans,
            read: resume::ReadMessages::default(),
            most_in_flight: positions.record().most_in_flight,
        };
        let mut resume = resume::find(sides, positions.record(), mode).await?;
        self.status.send_modify(|(_, copy)| copy.only_at_target = resume.only_at_target);
        positions.follows(&mut resume, replication)?;
        resume.findings.extend(news);
        positions.unwanted(&mut resume, replication)?;
        positions.lost(resume.orphans, resume.only_at_target);
        let goes_back = positions.record().source.as_ref().is_some_and(|saved| resume.position.seq < saved.seq);
        streams.abilities.share(resume.mode);
        if goes_back && positions.record().stamps.is_some_and(Stamps::has_ids) {
            // The target may know by its id what is sent again, and does not store it. A batch does not say so, and where its
            // messages lie is counted.
            positions.acks_singly(Instant::now());
        }
        if positions.has_single_acks(Instant::now()) {
            streams.abilities.ack_singly();
        }
        let another = resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. }));
        Ok(Found { resume, tag, durable, installation, goes_back, another })
    }

    /// Opens the reader of the source, and sampling.
    async fn read(
        self,
        lanes: &mut Lanes,
        streams: &Streams,
        found: &mut Found,
        positions: &mut PositionWriter,
    ) -> Result<(Option<SamplingDriver>, Intake), Error> {
        let (job, Lanes { replication, source, .. }) = (self.job, lanes);
        let (info, position) = (&streams.source, found.resume.position.seq);
        if Durable::is_needed(info) {
            positions.uses_durable(&found.installation).await?;
        }
        let sampler = SamplingDriver::begin(job, position, positions.record(), found.another, info.state.first_seq);
        let inspected = replication.sampling.as_ref().map(|sampling| sampling.inspect.mark());
        let from = sampler.as_ref().map(|(_, from)| *from);
        positions.samples_from(from.zip(inspected)).await?;
        let (sampler, from) = sampler.map_or((None, position), |(sampler, from)| (Some(sampler), from));
        let owner = Owner { site: &job.site, installation: &found.installation };
        let durable = match found.durable.take() {
            Some(durable) => durable.unless_ahead(&mut source.lane, replication, info, from, found.another).await?,
            None => None,
        };
        let Connected { lane, names } = source;
        let reader = Intake::open(lane, replication, owner, info, durable, names, from).await;
        Ok((sampler, reader.map_err(Error::of_source)?))
    }
}

impl Lanes {
    /// Connects both sides and asks for both streams, the source after the target: so the source has at least the
    /// messages that the target has a copy of.
    async fn connect(job: &Job, positions: &mut PositionWriter) -> Result<(Self, FirstAnswers), Error> {
        let mut replication = job.replication.clone();
        let in_flight = &mut replication.limits.bytes_in_flight;
        *in_flight = positions.request_limit.begin(*in_flight, Instant::now());
        let replication = Arc::new(replication);
        let name = format!("{} {}", names::PROGRAM, replication.id);
        let (lane, (target, target_info)) = tokio::try_join!(
            async { job.dial.dial(&replication.source.place, &name).await.map_err(Error::of_source) },
            async {
                let lane = job.dial.dial(&replication.target.place, &name).await.map_err(Error::of_target)?;
                let others = &mut AckedByOthers::default();
                Connected::with(lane, job, &replication.target, others).await.map_err(Error::of_target)
            },
        )?;
        let mut lane = lane;
        let first_start = positions.record().source.is_none();
        let mut acked =
            if first_start { AckedByOthers::ask(&mut lane, &replication) } else { AckedByOthers::default() };
        let sent = Instant::now();
        let connected = Connected::with(lane, job, &replication.source, &mut acked).await;
        let (source, source_info) = connected.map_err(Error::of_source)?;
        let received = Instant::now();
        let first = FirstAnswers { source: source_info, sent, received, target: target_info, acked: acked.floor() };
        Ok((Self { replication, source, target }, first))
    }
}

impl Connected {
    /// Asks for the stream and deletes the consumers that earlier runs left there, at the same time.
    /// `acked` gets the answers to its own requests that arrive meanwhile.
    async fn with(
        mut lane: Lane,
        job: &Job,
        side: &Side,
        acked: &mut AckedByOthers,
    ) -> Result<(Self, Option<StreamInfo>), nats::Error> {
        let mut clearing = Names::begin_clear(&mut lane, &side.stream, &job.consumers);
        let others = |subject: &[u8], payload: Bytes| {
            clearing.accept(subject, &payload);
            acked.accept(subject, &payload);
        };
        let info = Api::new(&mut lane).stream_info_beside(&side.stream, others).await?;
        let names = clearing.finish(&mut lane).await?.labelled(job.labels());
        Ok((Self { lane, names }, info))
    }
}

/// Requests for the consumers that Choria's replicator may have left at the source.
#[derive(Debug, Default)]
struct AckedByOthers {
    /// Requests, and their answers: `Some(None)` where there is no such consumer.
    asked: Vec<(String, Option<Option<u64>>)>,
}

impl AckedByOthers {
    fn ask(lane: &mut Lane, replication: &Replication) -> Self {
        let names = Durable::names(replication);
        let subjects =
            names.map(|name| format!("{}.CONSUMER.INFO.{}.{name}", lane.api_prefix(), replication.source.stream));
        let subjects: Vec<String> = subjects.collect();
        Self { asked: subjects.iter().map(|subject| (lane.send_request(subject, b""), None)).collect() }
    }

    fn accept(&mut self, subject: &[u8], payload: &[u8]) {
        let Some((_, answer)) = self.asked.iter_mut().find(|(request, _)| request.as_bytes() == subject) else {
            return;
        };
        match decode::<ConsumerInfo>(payload) {
            Ok(info) => *answer = Some(Some(info.ack_floor.stream_seq)),
            Err(error) if error.kind == nats::ErrorKind::NotFound => *answer = Some(None),
            // The request is repeated later.
            Err(_) => {}
        }
    }

    /// The ack floor of the first of them; `None` where not all are known.
    fn floor(self) -> Option<Option<u64>> {
        if self.asked.is_empty() {
            return None;
        }
        let answers: Option<Vec<_>> = self.asked.into_iter().map(|(_, answer)| answer).collect();
        answers.map(|answers| answers.into_iter().flatten().next())
    }
}

fn log_opened(replication: &Replication, opened: Opened) {
    let (id, stream) = (&replication.id, &replication.target.stream);
    match opened {
        Opened::Found => {}
        Opened::Made => info!(replication = id, stream, "target stream created"),
        Opened::Updated(what) => info!(replication = id, stream, what, "target stream updated"),
    }
}

/// Opens the writer to the target, and saves, before anything is sent, how many messages may be in flight.
async fn write(
    replication: &Arc<Replication>,
    lane: &mut Lane,
    streams: &Streams,
    found: &Found,
    positions: &mut PositionWriter,
) -> Result<Writer, Error> {
    let (tag, abilities) = (found.tag.clone(), streams.abilities);
    let mut writer = Writer::open(lane, replication.clone(), tag, abilities, &streams.target, positions.record());
    if let Some(before) = found.resume.before {
        writer.after(before);
    }
    writer.limit_line(positions.max_line);
    positions.may_have_in_flight(replication.limits.messages_in_flight).await?;
    positions.stamps(writer.stamps()).await?;
    Ok(writer)
}

/// Shows the facts that are known when the run begins.
fn show(copy: &mut CopyStatus, lanes: &Lanes, streams: &Streams, writer: &Writer, samples: bool) {
    if !copy.source.server.is_empty() {
        copy.counters.consumers_recreated += 1;
    }
    copy.metered.consumers += 1;
    copy.source.server.clone_from(&lanes.source.lane.info().server_name);
    copy.target.server.clone_from(&lanes.target.lane.info().server_name);
    copy.source.connected = true;
    copy.target.connected = true;
    copy.transport = streams.abilities.transport;
    copy.target_mode = streams.abilities.mode;
    copy.ordering = writer.ordering();
    copy.sampling = samples.then(|| copy.sampling.take().unwrap_or_default());
}

/// The copies that the target holds, compared with the state that the run before knew.
fn begin_drops(
    positions: &mut PositionWriter,
    replication: &Replication,
    streams: &Streams,
    resume: &Resume,
    none_returned: bool,
) -> Drops {
    let Streams { source, target, abilities, .. } = streams;
    let whole = replication.scope.is_whole() && replication.sampling.is_none() && replication.max_age.is_none();
    let whole = whole && none_returned && abilities.mode == TargetMode::Exclusive;
    let mut drops = positions.drops.clone();
    let position = resume.position.seq;
    drops.begin(target, target_limits::that_drop(replication, source, target, whole), position);
    if target.state.messages == 0 {
        drops.lacks(&source.state, position);
    }
    drops
}

/// Puts the run together. Findings are left to be reported.
fn assemble<'a>(
    report: Reporter<'a>,
    lanes: Lanes,
    streams: Streams,
    (found, returned): (Found, ReturnedMessages),
    (reader, sampler): (Intake, Option<SamplingDriver>),
    (writer, rejects): (Writer, Rejects<'a>),
    drops: Drops,
) -> (Run<'a>, Resume) {
    let Lanes { replication, source, target } = lanes;
    let Found { resume, tag, .. } = found;
    let now = Instant::now();
    let window = Window::new(resume.position, resume.target).with_after_target(resume.after_target);
    let gate = Gate::of(&replication.source.stream, &replication.target.stream);
    let watch = TargetWatch::new(drops, tag.clone(), target.names);
    let run = Run {
        source: SourceHalf {
            lane: source.lane,
            clock: streams.clock,
            reader,
            names: source.names,
            reads: true,
            gaps: Gaps::default(),
            plain: is_plain(&replication, &streams.source),
            reported_first: streams.source.state.first_seq,
            info: streams.source,
            // Opening a run may take long.
            polls: StatePolls::new(streams.clock.heard_at()),
            retention: Retention::default(),
            poll_history: PollHistory::default(),
            watchdog: Watchdog::new(now, resume.position.seq),
            consumer_request: None,
            cleared_at: None,
            renewal: None,
            silent_at: None,
        },
        target: TargetHalf::new(target.lane, &streams.target, writer, gate, watch),
        bounds: Bounds::new(window, &replication.limits, now),
        rules: CopyRules { scope: replication.scope.clone(), max_age: replication.max_age, tag, returned },
        report,
        rejects,
        sampler,
        times: Times::new(now),
        ending: None,
    };
    (run, resume)
}
