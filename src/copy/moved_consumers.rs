//! Durable consumers of the source at the target, so that a subscriber that moves there continues where it was.
//!
//! No request sets the ack floor of a consumer. So one is deleted and created again to begin after what is acknowledged at the
//! source, and only while it is not used: no subscriber waits for its messages, and none was delivered. From its first
//! delivery on it belongs to its subscribers.
//!
//! A position is one of a stream, not of a name: a consumer carries when the source stream was created that it was made for, and
//! stays as it is when the source has recreated that stream.

mod plan;
mod search;

use std::collections::{BTreeMap, BTreeSet};

use nats_lane::{
    Error, Lane,
    jetstream::{Api, ConsumerInfo, ConsumerList},
};
use serde_json::Value;
use tokio::time::Instant;

pub(crate) use self::plan::Selection;
use self::{
    plan::{ConsumerOwner, ConsumerStart, is_of_earlier_stream, is_used, position, target_config},
    search::{FoundStart, StartSearch},
};
use crate::{config::Replication, copy::source::consumers::consumer_prefix};

/// A consumer of the source, as the target gets it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlannedConsumer {
    /// Its name on both sides.
    pub(crate) name: String,
    /// Everything up to this source sequence is acknowledged.
    pub(crate) position: u64,
    /// The sequence at the target that it begins with.
    pub(crate) start: u64,
    /// Its configuration at the target, or why it can have none.
    pub(crate) config: Result<Value, String>,
}

/// What became of one consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConsumerOutcome {
    /// It is new at the target.
    Created,
    /// It was created again with another position or configuration.
    Moved,
    /// It was as it should be.
    Current,
    /// Subscribers of the target use it: it is left as it is.
    InUse,
    /// There was no time left for it: it is as it was.
    Late,
    /// It was created by others, or cannot be created.
    Refused(String),
}

/// What is known of the consumers from earlier passes: a translation that is final needs no search.
#[derive(Debug, Default)]
pub(crate) struct KnownStarts {
    /// `created` of the target stream.
    target: String,
    /// Its last sequence; a stream that has lost its end is another one.
    last_seq: u64,
    /// By name: the position, and where the target begins after it.
    starts: BTreeMap<String, (u64, FoundStart)>,
}

/// Moves the consumers of one replication, over a lane to each side.
#[derive(Debug)]
pub(crate) struct ConsumerMover<'a> {
    pub(crate) replication: &'a Replication,
    pub(crate) site: &'a str,
    pub(crate) installation: &'a str,
    pub(crate) source: &'a mut Lane,
    pub(crate) target: &'a mut Lane,
    /// No consumer is begun after it.
    pub(crate) until: Option<Instant>,
}

impl ConsumerMover<'_> {
    /// The consumers of the source that are selected, whether these are all, and `created` of the stream that they belong to.
    async fn selected(&mut self, selection: &Selection) -> Result<(ConsumerList, String), Error> {
        let stream = &self.replication.source.stream;
        let of_source = |error: Error| error.context("source");
        let created = self.source_created().await.map_err(of_source)?;
        let list = Api::new(self.source).consumers(stream).await.map_err(of_source)?;
        if self.source_created().await.map_err(of_source)? != created {
            return Err(Error::retry(format!("source: stream `{stream}` was recreated meanwhile")));
        }
        let consumers = list.consumers.into_iter().filter(|consumer| selection.takes(consumer)).collect();
        Ok((ConsumerList { consumers, ..list }, created))
    }

    async fn source_created(&mut self) -> Result<String, Error> {
        let stream = &self.replication.source.stream;
        let info = Api::new(self.source).stream_info(stream).await?;
        info.map(|info| info.created).ok_or_else(|| Error::retry(format!("stream `{stream}` does not exist")))
    }

    /// The consumers of the source with their positions at the target; changes nothing.
    pub(crate) async fn export(&mut self, selection: &Selection) -> Result<Vec<PlannedConsumer>, Error> {
        let (list, created) = self.selected(selection).await?;
        self.translate(&list.consumers, &created, &mut KnownStarts::default()).await
    }

    async fn translate(
        &mut self,
        consumers: &[ConsumerInfo],
        source_created: &str,
        known: &mut KnownStarts,
    ) -> Result<Vec<PlannedConsumer>, Error> {
        let Self { replication, site, installation, target, .. } = self;
        let stream = &replication.target.stream;
        let of_target = |error: Error| error.context("target");
        let missing = || Error::retry(format!("target: stream `{stream}` does not exist"));
        let info = Api::new(target).stream_info(stream).await.map_err(of_target)?.ok_or_else(missing)?;
        let last_seq = info.state.last_seq;
        if known.target != info.created || last_seq < known.last_seq {
            known.starts.clear();
        }
        (known.target, known.last_seq) = (info.created.clone(), last_seq);
        let owner = ConsumerOwner::of(site, &replication.id);
        let prefix = format!("{}_m", consumer_prefix(site, installation, &replication.id));
        let mut planned = Vec::new();
        let names: BTreeSet<_> = consumers.iter().map(|consumer| consumer.name.as_str()).collect();
        known.starts.retain(|name, _| names.contains(name.as_str()));
        for consumer in consumers {
            let position = position(consumer);
            let before = known.starts.get(&consumer.name).copied();
            let found = match before {
                Some((same, found)) if same == position && found.is_final => found,
                _ => {
                    // Everything before an earlier start is before this one, unless the consumer was moved back.
                    let from = before.filter(|(earlier, _)| *earlier <= position).map(|(_, found)| found.start);
                    let mut search = StartSearch::new(target, replication, site, &info, &prefix).map_err(of_target)?;
                    search.after(position, from).await.map_err(of_target)?
                }
            };
            known.starts.insert(consumer.name.clone(), (position, found));
            let at = ConsumerStart { source_created: Some(source_created), position, start: found.start };
            let config = target_config(consumer, replication, &owner, &at);
            planned.push(PlannedConsumer { name: consumer.name.clone(), position, start: found.start, config });
        }
        Ok(planned)
    }

    /// A consumer of an export, for the target of this replication.
    pub(crate) fn exported(&self, name: &str, position: u64, start: u64, config: &Value) -> PlannedConsumer {
        let owner = ConsumerOwner::of(self.site, &self.replication.id);
        let config = Ok(plan::imported(config, &owner, position, start));
        PlannedConsumer { name: name.to_owned(), position, start, config }
    }

    /// Creates consumers at the target, and moves those that are not used.
    pub(crate) async fn import(
        &mut self,
        planned: &[PlannedConsumer],
    ) -> Result<Vec<(PlannedConsumer, ConsumerOutcome)>, Error> {
        let mut done = Vec::new();
        for consumer in planned {
            let outcome = match self.is_late() {
                true => ConsumerOutcome::Late,
                false => self.apply(consumer).await.map_err(|error| error.context("target"))?,
            };
            done.push((consumer.clone(), outcome));
        }
        Ok(done)
    }

    /// One pass: creates and moves what is selected, and removes what is gone at the source.
    pub(crate) async fn refresh(
        &mut self,
        selection: &Selection,
        known: &mut KnownStarts,
    ) -> Result<Vec<(PlannedConsumer, ConsumerOutcome)>, Error> {
        let (list, created) = self.selected(selection).await?;
        let planned = self.translate(&list.consumers, &created, known).await?;
        let mut done = self.import(&planned).await?;
        if list.is_complete && !self.is_late() {
            let kept: BTreeSet<_> = planned.iter().map(|consumer| consumer.name.as_str()).collect();
            let stay = self.remove_gone(&kept, &created).await.map_err(|error| error.context("target"))?;
            done.extend(stay);
        }
        Ok(done)
    }

    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    async fn apply(&mut self, planned: &PlannedConsumer) -> Result<ConsumerOutcome, Error> {
        let PlannedConsumer { name, config, .. } = planned;
        let config = match config {
            Ok(config) => config,
            Err(why) => return Ok(ConsumerOutcome::Refused(why.clone())),
        };
        let owner = ConsumerOwner::of(self.site, &self.replication.id);
        let stream = &self.replication.target.stream;
        let mut api = Api::new(self.target);
        let there = api.consumer_info(stream, name).await?;
        if let Some(there) = &there {
            if !owner.owns(there) {
                let why = format!("consumer `{name}` exists at the target and was created by others");
                return Ok(ConsumerOutcome::Refused(why));
            }
            if is_used(there) {
                return Ok(ConsumerOutcome::InUse);
            }
            if is_of_earlier_stream(&there.config, config) {
                return Ok(ConsumerOutcome::Refused(self.of_earlier_stream(name)));
            }
            if let Some(created) = plan::loses_its_stream(&there.config, config) {
                let why = self.of_unknown_stream(name, created);
                return Ok(ConsumerOutcome::Refused(why));
            }
            if plan::is_same(&there.config, config) {
                return Ok(ConsumerOutcome::Current);
            }
            api.delete_consumer(stream, name).await?;
        }
        match api.create_new_consumer(stream, name, config).await {
            Ok(_) if there.is_some() => Ok(ConsumerOutcome::Moved),
            Ok(_) => Ok(ConsumerOutcome::Created),
            Err(error) if error.api.is_some() => Ok(ConsumerOutcome::Refused(error.message)),
            Err(error) => Err(error),
        }
    }

    fn of_earlier_stream(&self, name: &str) -> String {
        let stream = &self.replication.source.stream;
        format!(
            "consumer `{name}` keeps its position in stream `{stream}` as it was before the source recreated it; delete it at the \
             target to have it created for the stream of now"
        )
    }

    /// Without its stream, a consumer would be taken for one of the stream of now after the source has recreated it.
    fn of_unknown_stream(&self, name: &str, created: &str) -> String {
        let stream = &self.replication.source.stream;
        format!(
            "consumer `{name}` has its position in stream `{stream}` that was created at {created}, and the import does not say \
             which stream its position is of; import what `consumers export` prints now, or delete the consumer at the target to \
             have it created from this import"
        )
    }

    /// Deletes those of ours that are not `kept` and not used. Returns those that belong to an earlier stream of the source, which
    /// says nothing about them.
    async fn remove_gone(
        &mut self,
        kept: &BTreeSet<&str>,
        created: &str,
    ) -> Result<Vec<(PlannedConsumer, ConsumerOutcome)>, Error> {
        let mut stay = Vec::new();
        let owner = ConsumerOwner::of(self.site, &self.replication.id);
        let (from, to) = (&self.replication.source.stream, &self.replication.target.stream);
        for there in Api::new(self.target).consumers(to).await?.consumers {
            if !owner.owns(&there) || is_used(&there) || kept.contains(there.name.as_str()) {
                continue;
            }
            if plan::is_made_for_other(&there.config, created) {
                let why = self.of_earlier_stream(&there.name);
                let (position, start) = plan::placement(&there.config);
                let one = PlannedConsumer { name: there.name, position, start, config: Err(why.clone()) };
                stay.push((one, ConsumerOutcome::Refused(why)));
                continue;
            }
            // A list can be short of one that exists.
            let exists = Api::new(self.source).consumer_info(from, &there.name).await?;
            let is_gone = exists.is_none_or(|exists| exists.config["durable_name"].as_str().is_none_or(str::is_empty));
            // Without the stream that it was made for, that it is gone means nothing.
            if is_gone && self.source_created().await? == created {
                Api::new(self.target).delete_consumer(to, &there.name).await?;
            }
        }
        Ok(stay)
    }
}

/// The consumers of a replication as they are at the target: name, position and start.
pub(crate) async fn at_target(
    target: &mut Lane,
    replication: &Replication,
    site: &str,
) -> Result<Vec<(String, u64, u64)>, Error> {
    let owner = ConsumerOwner::of(site, &replication.id);
    let list = Api::new(target).consumers(&replication.target.stream).await?;
    let ours = list.consumers.into_iter().filter(|there| owner.owns(there));
    Ok(ours
        .map(|there| {
            let (position, start) = plan::placement(&there.config);
            (there.name, position, start)
        })
        .collect())
}

/// Makes the consumers of a replication belong to the target alone: no later one moves or deletes them.
pub(crate) async fn release(target: &mut Lane, replication: &Replication, site: &str) -> Result<(), Error> {
    let owner = ConsumerOwner::of(site, &replication.id);
    let stream = &replication.target.stream;
    for there in Api::new(target).consumers(stream).await?.consumers {
        if owner.owns(&there) {
            let config = plan::released(&there.config);
            Api::new(target).create_consumer(stream, &there.name, &config).await?;
        }
    }
    Ok(())
}
