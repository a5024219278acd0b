//! Reads both streams of a replication and compares them.

use std::time::Duration;

use nats_lane::{
    Error, ErrorKind,
    jetstream::{Api, Delivery},
};
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::{
    SourcePiece, VerifyJob, VerifyProgress,
    fingerprint::Fingerprints,
    merge::Merge,
    stream::{SILENCE, StreamReader, StreamSide, WantedRange, stream_name},
};
use crate::{
    config::{NativeKind, Start},
    copy::{
        ReturnedMessages,
        source::{consumers::Names, durable::Durable, reader::Incoming},
        target::provenance::Tag,
    },
    names,
    status::ExpectedCause,
};

/// How long comparing may fail without any progress.
const PATIENCE: Duration = Duration::from_secs(300);
/// Pause before the next try.
const AGAIN: Duration = Duration::from_millis(500);
/// So many messages may be stored out of order at a target, where a run does not say more.
const DISORDER: u64 = 20_000;
/// Pieces of the target that are not searched any more.
const NEAR: u64 = 1_000;
/// Messages of other writers that are passed in a search.
const PASSED: u64 = 32;
/// How often progress is reported.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// How often the rate is compared with its limit.
const PACE: Duration = Duration::from_millis(20);

/// Both sides, connected.
#[derive(Debug)]
pub(super) struct BothSides {
    pub source: StreamSide,
    pub target: StreamSide,
}

/// What is compared, and what was found.
#[derive(Debug)]
pub(super) struct StreamComparison<'a> {
    pub job: &'a VerifyJob,
    pub sides: Option<BothSides>,
    pub merge: Merge,
    pub prints: Fingerprints,
    tag: Tag,
    returned: ReturnedMessages,
    progress: &'a VerifyProgress,
    began: Instant,
    reported: Instant,
    bytes: u64,
    /// Since when nothing was read, and how much was read by then.
    stuck: (Instant, u64),
    /// When the rate was last within its limit, and the messages read by then.
    paced: (Instant, u64),
}

/// Where the target was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TargetCursor {
    /// The first sequence to read.
    pub start: u64,
    /// The sequence up to which it was read; `None` before the first read.
    pub read: Option<u64>,
    /// Its last sequence when the comparison of the range began.
    pub end: u64,
    /// Copies in a row that are of later messages than the range has.
    beyond: u64,
}

impl<'a> StreamComparison<'a> {
    pub fn new(job: &'a VerifyJob, progress: &'a VerifyProgress) -> Self {
        let replication = &job.replication;
        let tag = Tag::new(&replication.source.stream, &job.site, &replication.name)
            .with_former(&replication.former)
            .leading(replication.provenance_first);
        let now = Instant::now();
        Self {
            job,
            sides: None,
            merge: Merge::new(),
            prints: Fingerprints::new(replication, &job.site),
            tag,
            returned: ReturnedMessages::default(),
            progress,
            began: now,
            reported: now,
            bytes: 0,
            stuck: (now, 0),
            paced: (now, 0),
        }
    }

    /// Connects both sides, unless they are connected.
    pub async fn connect(&mut self) -> Result<&mut BothSides, Error> {
        if self.sides.is_none() {
            let Self { job, .. } = self;
            let (source, target) = (&job.replication.source, &job.replication.target);
            let name = format!("{} verify {}", names::PROGRAM, job.replication.id);
            let open = async |side: &crate::config::Side| {
                let mut lane = job.dial.dial(&side.place, &name).await?;
                let info = Api::new(&mut lane).stream_info(&side.stream).await?;
                let missing = || Error::hold(format!("stream `{}` does not exist", side.stream));
                let info = info.ok_or_else(missing)?;
                if Durable::is_needed(&info) {
                    let kind = info.text("retention");
                    return Err(Error::hold(format!(
                        "stream `{}` has `{kind}` retention: its messages are removed when they are consumed, so nothing can be \
                         compared",
                        side.stream
                    )));
                }
                let heard = Instant::now();
                let names = Names::clear_of_verify(&mut lane, &side.stream, &job.consumers).await?;
                Ok::<_, Error>(StreamSide { lane, names: names.labelled(job.labels.clone()), info, heard })
            };
            let (source, target) =
                tokio::try_join!(async { open(source).await.map_err(|error| error.context("source")) }, async {
                    open(target).await.map_err(|error| error.context("target"))
                },)?;
            self.prints.check_target(&target.info)?;
            self.returned = ReturnedMessages::new(
                job.replication.loop_protection.as_ref(),
                &job.ways_back,
                job.from_target.as_ref(),
                &target.info.created,
            );
            self.sides = Some(BothSides { source, target });
        }
        self.sides.as_mut().ok_or_else(|| Error::retry("not connected"))
    }

    /// Compares a range, across lost connections and restarts of servers. Returns how far the target was read.
    pub async fn compare(&mut self, piece: SourcePiece) -> Result<TargetCursor, Error> {
        self.merge.begin(piece.from, piece.to);
        let mut cursor = TargetCursor { start: 1, read: None, end: 0, beyond: 0 };
        loop {
            match self.try_compare(piece, &mut cursor).await {
                Ok(()) => return Ok(cursor),
                Err(error) => self.wait_after(error).await?,
            }
        }
    }

    /// Waits before the next try, unless the error is final or nothing was read for long.
    pub async fn wait_after(&mut self, error: Error) -> Result<(), Error> {
        self.sides = None;
        let read = self.merge.source_messages + self.merge.target_messages;
        if read > self.stuck.1 {
            self.stuck = (Instant::now(), read);
        }
        if error.kind != ErrorKind::Retry || self.stuck.0.elapsed() > PATIENCE {
            return Err(error);
        }
        debug!(replication = self.job.replication.id, "comparing is tried again: {error}");
        self.show(|record| record.error = Some(error.to_string()));
        sleep(AGAIN).await;
        Ok(())
    }

    async fn try_compare(&mut self, piece: SourcePiece, cursor: &mut TargetCursor) -> Result<(), Error> {
        self.connect().await?;
        let Some(mut sides) = self.sides.take() else { return Ok(()) };
        if cursor.read.is_none() {
            cursor.start = self.locate(&mut sides.target, piece.from).await?.max(1);
            cursor.read = Some(cursor.start - 1);
            cursor.end = sides.target.info.state.last_seq;
        }
        self.merge_both(piece, cursor, &mut sides).await?;
        self.sides = Some(sides);
        Ok(())
    }

    async fn merge_both(
        &mut self,
        piece: SourcePiece,
        cursor: &mut TargetCursor,
        sides: &mut BothSides,
    ) -> Result<(), Error> {
        let job = self.job;
        let filters = job.replication.scope.filters();
        let from = self.merge.source_taken() + 1;
        let wanted = WantedRange { filters, from, to: piece.to, headers_only: false };
        let now_ns = source_time_ns(&sides.source);
        let mut source = StreamReader::open(&mut sides.source, wanted).await?;
        let copies =
            WantedRange { filters: &[], from: cursor.read.unwrap_or(0) + 1, to: cursor.end, headers_only: false };
        let mut target = StreamReader::open(&mut sides.target, copies).await?;
        loop {
            let source_over = source.has_ended().await?;
            let target_over = target.has_ended().await? || self.is_beyond(cursor);
            if source_over && target_over {
                break;
            }
            let copies = self.take_copies(&mut target, cursor, piece);
            let moved = self.take_sources(&mut source, source_over, target_over, now_ns) || copies;
            self.report(&source);
            let behind = self.ahead_of_rate();
            if moved && behind.is_none() {
                continue;
            }
            tokio::select! {
                turn = source.turn() => turn?,
                turn = target.turn() => turn?,
                () = sleep(behind.unwrap_or(SILENCE)) => {}
            }
            let paced = behind.is_some();
            source.check(paced || self.merge.has_copies() && source.peek().is_some())?;
            target.check(paced || !self.merge.wants_copies())?;
        }
        source.close();
        target.close();
        self.merge.source_over();
        Ok(())
    }

    fn take_copies(&mut self, target: &mut StreamReader<'_>, cursor: &mut TargetCursor, piece: SourcePiece) -> bool {
        let mut moved = false;
        while self.merge.wants_copies()
            && let Some(incoming) = target.peek()
        {
            let Incoming { delivery, message, .. } = &incoming;
            self.bytes += incoming.bytes() as u64;
            match self.prints.of_target(delivery, message) {
                Some(copy) => {
                    cursor.beyond = if copy.seq > piece.to { cursor.beyond + 1 } else { 0 };
                    self.merge.copy_read(copy);
                }
                None => self.merge.foreign(delivery.stream_seq, self.job.admits_others, message.subject),
            }
            target.take();
            cursor.read = Some(target.taken());
            moved = true;
            if cursor.beyond > 0 && self.is_beyond(cursor) {
                break;
            }
        }
        moved
    }

    fn take_sources(
        &mut self,
        source: &mut StreamReader<'_>,
        source_over: bool,
        target_over: bool,
        now_ns: i64,
    ) -> bool {
        if source_over {
            let had = self.merge.has_copies();
            self.merge.source_over();
            return had;
        }
        let mut moved = false;
        while let Some(incoming) = source.peek()
            && self.merge.admits(incoming.delivery.stream_seq, target_over)
        {
            let Incoming { delivery, message, .. } = &incoming;
            self.bytes += incoming.bytes() as u64;
            if !self.job.replication.scope.excludes(message.subject) {
                let cause = self.cause(delivery, message.header, now_ns);
                let mark = self.prints.of_source(delivery, message);
                self.merge.source(mark, cause);
            } else {
                self.merge.passed_over(delivery.stream_seq);
            }
            source.take();
            moved = true;
        }
        moved
    }

    /// Why a message may have no copy, as far as that can be seen of it.
    fn cause(&self, delivery: &Delivery, header: &[u8], now_ns: i64) -> Option<ExpectedCause> {
        let replication = &self.job.replication;
        if !header.is_empty() && (self.tag.passed(header) || self.returned.includes(header)) {
            return Some(ExpectedCause::Loop);
        }
        if let Some(max_age) = replication.max_age
            && i128::from(now_ns) - i128::from(delivery.time_ns) > max_age.as_nanos() as i128
        {
            return Some(ExpectedCause::TooOld);
        }
        match replication.start {
            Start::Sequence(start) if delivery.stream_seq < start => return Some(ExpectedCause::BeforeStart),
            Start::Time(start) if start.timestamp_nanos_opt().is_some_and(|start| delivery.time_ns < start) => {
                return Some(ExpectedCause::BeforeStart);
            }
            _ => {}
        }
        replication.sampling.as_ref().map(|_| ExpectedCause::Sampled)
    }

    /// Whether so many copies in a row are of later messages that no other follows, unless it was stored out of place.
    fn is_beyond(&self, cursor: &TargetCursor) -> bool {
        cursor.beyond > self.disorder()
    }

    fn disorder(&self) -> u64 {
        DISORDER.max(2 * self.job.replication.limits.messages_in_flight as u64)
    }

    /// The sequence of the target from which the copies of a source sequence and those after it are, found by provenance.
    async fn locate(&mut self, target: &mut StreamSide, seq: u64) -> Result<u64, Error> {
        let (first, last) = (target.info.state.first_seq, target.info.state.last_seq);
        if self.job.replication.native.as_ref().is_some_and(|native| native.kind == NativeKind::Mirror) {
            return Ok(seq);
        }
        let before = seq.saturating_sub(self.disorder());
        if before <= 1 {
            return Ok(first);
        }
        let stream = stream_name(&target.info).to_owned();
        let (mut low, mut high) = (first, last + 1);
        while high.saturating_sub(low) > NEAR {
            let middle = low + (high - low) / 2;
            let mut at = middle;
            let mut is_before = false;
            for _ in 0..PASSED {
                let Some(found) = Api::new(&mut target.lane).message_from(&stream, at).await? else { break };
                let delivery =
                    Delivery { stream_seq: found.sequence, consumer_seq: 1, time_ns: found.time_ns, pending: 0 };
                match self.prints.origin(&delivery, &found.header) {
                    Some((origin, _, false)) => {
                        is_before = origin < before;
                        break;
                    }
                    _ => at = found.sequence + 1,
                }
            }
            if is_before {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// How long to wait so that no more messages are read in a second than requested.
    fn ahead_of_rate(&mut self) -> Option<Duration> {
        let rate = self.job.rate?;
        let read = self.merge.source_messages - self.paced.1;
        let due = Duration::from_secs_f64(read as f64 / rate as f64);
        let passed = self.paced.0.elapsed();
        if due > passed + PACE {
            return Some(due - passed);
        }
        // Time that was not used is not made up for.
        if passed > due + Duration::from_secs(1) {
            self.paced = (Instant::now(), self.merge.source_messages);
        }
        None
    }

    fn report(&mut self, source: &StreamReader<'_>) {
        if self.reported.elapsed() < REPORT_EVERY {
            return;
        }
        self.reported = Instant::now();
        let position = source.taken();
        self.show(|record| record.position = record.position.max(position));
    }

    /// Shows what was found so far, and that it continues.
    pub fn show(&mut self, change: impl FnOnce(&mut crate::status::Verification)) {
        let differences: Vec<_> =
            self.merge.differences().filter_map(super::ranges::DifferenceList::difference).collect();
        self.progress.send_modify(|record| {
            record.error = None;
            change(record);
            record.source_messages = self.merge.source_messages;
            record.target_messages = self.merge.target_messages;
            record.bytes = self.bytes;
            record.seconds = self.began.elapsed().as_secs_f64();
            record.findings = differences.iter().map(|difference| difference.messages).sum();
            record.expected.clone_from(&self.merge.expected);
            record.differences = differences;
        });
    }
}

/// The time of the source server now, nanoseconds since the Unix epoch.
pub(super) fn source_time_ns(source: &StreamSide) -> i64 {
    let passed = i64::try_from(source.heard.elapsed().as_nanos()).unwrap_or_default();
    let at = source.info.ts.unwrap_or_else(nats_lane::entropy::now);
    at.timestamp_nanos_opt().unwrap_or_default().saturating_add(passed)
}
