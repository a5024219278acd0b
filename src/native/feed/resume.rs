//! Where a target begins or continues that asks, and whether it may.

use nats_lane::jetstream::{Api, StoredMessage};
use tokio::time::Instant;

use super::{Feed, SavedFeed, held};
use crate::{
    config::{NativeKind, Start},
    copy::{Error, source::locate::before_time},
    native::{
        request::{ConsumerRequest, FeedStart},
        session::FedPoint,
        target,
        witness::{self, Evidence},
    },
};

impl Feed<'_> {
    /// A request with the place that it does not name: the target with a durable consumer is asked what it holds. `None` where
    /// it has no leader now, and asks again.
    pub(super) async fn located(&mut self, mut asked: ConsumerRequest) -> Result<Option<ConsumerRequest>, Error> {
        if asked.wanted != FeedStart::AfterItsLast {
            return Ok(Some(asked));
        }
        if !self.read_target().await? {
            return Ok(None);
        }
        let stream = &self.job.replication.target.stream;
        let Some((last, deliver)) = target::durable_state(self.kind, &self.target_info, &self.subjects) else {
            return Ok(None);
        };
        let prefix = format!("{}.", self.subjects.deliver());
        if !deliver.starts_with(&prefix) {
            return Err(held(format!(
                "target stream `{stream}` listens on `{deliver}` for its durable consumer, and a feed delivers below \
                 `{prefix}` only"
            )));
        }
        asked.begins_after(last, deliver);
        Ok(Some(asked))
    }

    /// The sequence before the first one to be delivered, exactly: a mirror skips to it at once.
    pub(super) async fn before(&mut self, asked: &ConsumerRequest, saved: &SavedFeed) -> Result<FedPoint, Error> {
        let replication = &self.job.replication;
        if asked.stream != replication.source.stream {
            let (is, origin) = (&asked.stream, &replication.source.stream);
            return Err(held(format!("target stream asks for messages of `{is}`, and `{origin}` is the source")));
        }
        self.read_source().await?;
        let start = match asked.wanted {
            FeedStart::From(start) => start,
            FeedStart::All | FeedStart::Time(_) | FeedStart::AfterItsLast => {
                if let Some(point) = self.emptied(saved).await? {
                    return Ok(point);
                }
                let start = match asked.wanted {
                    FeedStart::Time(time) if replication.start == Start::All => Start::Time(time),
                    _ => replication.start.clone(),
                };
                return self.start(start, saved.point).await;
            }
        };
        let last = start - 1;
        if self.given.is_some_and(|given| last > given) {
            return Err(held(format!(
                "another feed answers the API prefix `{}` of target stream `{}`: the target holds source messages up to \
                 {last}, and this feed did not deliver them",
                self.subjects.api(),
                replication.target.stream
            )));
        }
        self.compare(last, saved.point).await
    }

    /// A stream with sources that holds nothing of ours continues after the position, unless it is another stream, or lost its
    /// end: what was stored was removed there.
    async fn emptied(&mut self, saved: &SavedFeed) -> Result<Option<FedPoint>, Error> {
        let saved = saved.at(&self.target_info).filter(|saved| saved.seq > 0);
        match saved.filter(|_| self.kind == NativeKind::Source) {
            Some(saved) => self.compare(saved.seq, Some(saved)).await.map(Some),
            None => Ok(None),
        }
    }

    /// Before the target asks: whether it may continue after what it holds. A target that missed the feed for long asks
    /// only within a minute, and another source is to be reported at once.
    pub(super) async fn check_source(&mut self, saved: &SavedFeed) -> Result<(), Error> {
        let last = match self.kind {
            NativeKind::Mirror => self.target_info.state.last_seq,
            NativeKind::Source => saved.at(&self.target_info).map_or(0, |saved| saved.seq),
        };
        if last > 0 {
            self.agree(last, saved.point).await?;
        }
        Ok(())
    }

    /// The point after which the target continues, once nothing contradicts that.
    async fn compare(&mut self, last: u64, saved: Option<FedPoint>) -> Result<FedPoint, Error> {
        if last == 0 {
            return Ok(FedPoint::default());
        }
        let point = self.agree(last, saved).await?;
        self.report_gap(last);
        Ok(point)
    }

    /// Compares what both sides know of the source's past; returns the last point that the target holds.
    async fn agree(&mut self, last: u64, saved: Option<FedPoint>) -> Result<FedPoint, Error> {
        let replication = &self.job.replication;
        // It may be after the last one that was delivered, where what followed is out of scope.
        let saved = saved.filter(|saved| saved.seq > 0);
        let point = |found: StoredMessage| FedPoint { seq: found.sequence, time_ns: Some(found.time_ns) };
        let target = match self.kind {
            NativeKind::Mirror => Api::new(&mut self.target).message(&replication.target.stream, last).await,
            // There it has another sequence and another stored time.
            NativeKind::Source => Ok(None),
        };
        let known = target.map_err(Error::of_target)?.map(point).or(saved);
        let at = known.map_or(last, |known| known.seq);
        let source = Api::new(&mut self.source).message_from(&replication.source.stream, at).await;
        let source = source.map_err(Error::of_source)?.map(point);
        let source_last = self.source_info.state.last_seq;
        if let Some(why) = witness::objection(&Evidence { last, source_last, known, source }) {
            return Err(held(self.another_source(&why)));
        }
        let mut found = known.into_iter().chain(source).find(|point| point.seq == last);
        if found.is_none() {
            // The next comparison is with this one.
            let read = Api::new(&mut self.source).message_from(&replication.source.stream, last).await;
            found = read.map_err(Error::of_source)?.map(point).filter(|point| point.seq == last);
        }
        Ok(FedPoint { seq: last, time_ns: found.and_then(|point| point.time_ns) })
    }

    fn another_source(&self, why: &str) -> String {
        let (from, to) = (&self.job.replication.source.stream, &self.job.replication.target.stream);
        match self.kind {
            NativeKind::Mirror => format!(
                "source stream `{from}` is not the one that `{to}` mirrors: {why}; delete stream `{to}` to mirror the source \
                 from its beginning, or promote it to keep what it holds"
            ),
            NativeKind::Source => format!(
                "source stream `{from}` is not the one that `{to}` has messages of: {why}; add the replication again under \
                 another `name` to take the source from its beginning"
            ),
        }
    }

    /// Where a target begins that holds nothing.
    async fn start(&mut self, start: Start, saved: Option<FedPoint>) -> Result<FedPoint, Error> {
        let (stream, state) = (&self.job.replication.source.stream, self.source_info.state.clone());
        let first = state.first_seq.saturating_sub(1);
        let seq = match start {
            Start::All => first,
            // What was published since the first start is not passed over.
            Start::AtEnd => saved.map_or(state.last_seq, |saved| saved.seq),
            Start::Sequence(seq) => seq.saturating_sub(1),
            Start::Delta(ago) => {
                let time = self.clock.ago(Instant::now(), ago);
                before_time(&mut self.source, stream, &self.source_info, &self.names, time).await?
            }
            Start::Time(time) => before_time(&mut self.source, stream, &self.source_info, &self.names, time).await?,
        };
        Ok(FedPoint { seq: seq.clamp(first, state.last_seq.max(first)), time_ns: None })
    }
}
