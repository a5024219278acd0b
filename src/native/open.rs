//! How a feed comes to be: source, target and leafnode are connected, and the target stream is made, in this order: a server
//! asks the origin when it is created and when a leafnode connects, and waits long where nothing answers.

use nats_lane::{
    Lane, entropy,
    jetstream::{Api, StreamInfo},
    leafnode::LeafLogin,
};
use tokio::{sync::watch, time::Instant};
use tracing::info;

use super::{FeedSubjects, leaves::Leaves, target};
use crate::{
    config::{NativeFeed, NativeKind},
    copy::{
        Error, ErrorKind, Job, PositionWriter, another_kind,
        source::{
            clock::{ClockReading, SourceClock},
            consumers::Names,
        },
        target::provenance::{Tag, at_end},
    },
    names,
    status::{CopyStatus, Ordering, State, TargetMode, Transport},
};

/// Everything that a feed works with.
pub(super) struct OpenedFeed {
    pub kind: NativeKind,
    pub subjects: FeedSubjects,
    pub source: Lane,
    /// Names of consumers at the source.
    pub names: Names,
    pub source_info: StreamInfo,
    pub clock: SourceClock,
    pub target: Lane,
    pub target_info: StreamInfo,
    pub leaves: Leaves,
}

/// As what the leaf logs in. A server lets one connection of this name and account live: the newest.
pub(crate) fn login(site: &str, id: &str, subjects: &FeedSubjects) -> LeafLogin {
    let name: String = format!("sr-{site}-{id}").chars().map(|c| if c.is_ascii_graphic() { c } else { '-' }).collect();
    LeafLogin { account: name.clone(), name, subscriptions: subjects.subscriptions() }
}

pub(super) async fn open(
    job: &Job,
    native: &NativeFeed,
    positions: &mut PositionWriter,
    status: &watch::Sender<(State, CopyStatus)>,
) -> Result<OpenedFeed, Error> {
    let replication = &job.replication;
    status.send_modify(|(_, copy)| {
        copy.source.stream.clone_from(&replication.source.stream);
        copy.target.stream.clone_from(&replication.target.stream);
    });
    let subjects = FeedSubjects::of(&job.site, &replication.id);
    let name = format!("{} {}", names::PROGRAM, replication.id);
    let login = login(&job.site, &replication.id, &subjects);
    let (mut source, mut target, leaves) = tokio::try_join!(
        async { job.dial.dial(&replication.source.place, &name).await.map_err(Error::of_source) },
        async { job.dial.dial(&replication.target.place, &name).await.map_err(Error::of_target) },
        Leaves::connect(job.dial.clone(), &native.leaf, login),
    )?;
    let clearing = Names::begin_clear(&mut source, &replication.source.stream, &job.consumers);
    let names = clearing.finish(&mut source).await;
    let names = names.map_err(Error::of_source)?.labelled(job.labels());
    let (source_info, clock) = read_source(job, &mut source).await?;
    let known = Api::new(&mut target).stream_info(&replication.target.stream).await;
    let end = known.map_err(Error::of_target)?.map_or(0, |info| info.state.last_seq);
    if !positions.knows_kind() && native.kind == NativeKind::Source {
        let stream = &replication.target.stream;
        let tag = Tag::new(&replication.source.stream, &job.site, &replication.name).with_former(&replication.former);
        let copied = at_end(&mut target, stream, end, |header| tag.passed(header)).await;
        if copied.map_err(Error::of_target)? {
            return Err(Error::new(ErrorKind::Hold, another_kind(None, Some(native.kind), stream)));
        }
    }
    positions.stores_as(Some(native.kind), &replication.target.stream, end).await?;
    let opened = target::open(job, native.kind, &mut target, &source_info, &subjects).await;
    let (target_info, done) = opened.map_err(Error::of_target)?;
    if let Some(done) = done {
        let stream = &replication.target.stream;
        info!(replication = replication.id, stream, kind = %native.kind, "{done}");
    }
    status.send_modify(|(_, copy)| {
        copy.source.server.clone_from(&source.info().server_name);
        copy.target.server.clone_from(&target.info().server_name);
        (copy.source.connected, copy.target.connected) = (true, true);
        copy.transport = Transport::Feed;
        // Only the feed writes to a mirror.
        copy.target_mode = if native.kind == NativeKind::Mirror { TargetMode::Exclusive } else { TargetMode::Shared };
        copy.ordering = Ordering::Strict;
    });
    Ok(OpenedFeed { kind: native.kind, subjects, source, names, source_info, clock, target, target_info, leaves })
}

/// Reads the source stream, and checks whether it may be fed.
async fn read_source(job: &Job, lane: &mut Lane) -> Result<(StreamInfo, SourceClock), Error> {
    let stream = &job.replication.source.stream;
    let sent = Instant::now();
    let info = Api::new(lane).stream_info(stream).await.map_err(Error::of_source)?;
    let received = Instant::now();
    let info = info.ok_or_else(|| Error::new(ErrorKind::Hold, format!("source stream `{stream}` does not exist")))?;
    let refused =
        job.own_streams.refuse(stream, &info.created).or_else(|| target::refuse_source(&job.replication, &info));
    if let Some(why) = refused {
        return Err(Error::of_source(nats_lane::Error::hold(why)));
    }
    if job.replication.native.as_ref().is_some_and(|native| native.kind == NativeKind::Source) {
        job.refuse_echo(&info)?;
    }
    let clock = SourceClock::new(&ClockReading { sent, received, server: info.ts, local: entropy::now() });
    Ok((info, clock))
}
