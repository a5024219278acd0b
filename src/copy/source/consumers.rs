//! Names of the consumers that a copy creates for itself. The next run of the replication knows them, in this process
//! or in another one, and deletes those that an earlier run left: a run that lost its connection or was killed cannot.

use std::collections::HashMap;

use nats_lane::{Error, ErrorKind, Lane, jetstream::decode};
use serde_json::{Map, Value};
use tokio::time::{Duration, Instant, timeout_at};
use xxhash_rust::xxh3::xxh3_64;

/// Names that are used in turn. A run that was superseded and does not know it finds its consumer deleted, not another
/// one of the same name; and a consumer can be recreated while the old one still exists.
const SLOTS: u8 = 4;
/// What the names of the metadata begin with.
const LABEL: &str = "stream-replicator.";
/// Name of the consumer that finds a sequence by time.
const BY_TIME: &str = "t";
/// Names of consumers that check the source while no run reads it: a run may begin meanwhile.
const CHECK: &str = "g";
/// Names of consumers that compare both streams.
const VERIFY: &str = "v";
/// Time limit for the answers to the deletions.
const ANSWER: Duration = Duration::from_secs(1);

/// The prefix of the names of a replication's own consumers. `installation` distinguishes installations that read the
/// same stream for replications of the same id.
pub fn consumer_prefix(site: &str, installation: &str, replication: &str) -> String {
    let key = [site.as_bytes(), installation.as_bytes(), replication.as_bytes()].join(&0);
    format!("sr_{:016x}", xxh3_64(&key))
}

/// Metadata of consumers, for people who list those of a stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConsumerLabels(Map<String, Value>);

impl ConsumerLabels {
    /// Those of a replication that this instance runs.
    pub fn new(site: &str, replication: &str, instance: Option<&str>) -> Self {
        let labels = [("site", Some(site)), ("replication", Some(replication)), ("instance", instance)];
        let labels = labels.into_iter().filter_map(|(name, value)| Some((format!("{LABEL}{name}"), value?.into())));
        Self(labels.collect())
    }

    /// Adds them to the configuration of a consumer.
    pub fn put(&self, config: &mut Value) {
        for (name, value) in &self.0 {
            config["metadata"][name] = value.clone();
        }
    }
}

/// Names of a replication's own consumers at one stream.
#[derive(Debug)]
pub(crate) struct Names {
    prefix: String,
    next: u8,
    labels: ConsumerLabels,
}

impl Names {
    /// Names from the first one; deletes nothing.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned(), next: 0, labels: ConsumerLabels::default() }
    }

    /// Gives the consumers of these names metadata.
    #[must_use]
    pub fn labelled(self, labels: ConsumerLabels) -> Self {
        Self { labels, ..self }
    }

    /// The metadata of the consumers.
    pub fn labels(&self) -> &ConsumerLabels {
        &self.labels
    }

    /// Names for a check of the source; those of earlier checks are deleted, and those of runs left alone.
    pub async fn clear_of_check(lane: &mut Lane, stream: &str, prefix: &str) -> Result<Self, Error> {
        Self::begin_clear(lane, stream, &format!("{prefix}_{CHECK}")).finish(lane).await
    }

    /// Names for a comparison of both streams; those of earlier ones are deleted, and those of runs left alone.
    pub async fn clear_of_verify(lane: &mut Lane, stream: &str, prefix: &str) -> Result<Self, Error> {
        Self::begin_clear(lane, stream, &format!("{prefix}_{VERIFY}")).finish(lane).await
    }

    /// Deletes the consumers that earlier runs left, beside other requests: [`Clearing::finish`] waits for the answers.
    pub fn begin_clear(lane: &mut Lane, stream: &str, prefix: &str) -> Clearing {
        let names = Self::new(prefix);
        let mut asked = HashMap::new();
        for slot in 0..SLOTS {
            asked.insert(names.delete(lane, stream, &names.slot(slot)), Some(slot));
        }
        asked.insert(names.delete(lane, stream, &names.by_time()), None);
        // A consumer without an answer may still exist.
        Clearing { names, asked, free: [false; SLOTS as usize], last: SLOTS - 1, deadline: Instant::now() + ANSWER }
    }

    fn delete(&self, lane: &mut Lane, stream: &str, name: &str) -> String {
        let subject = format!("{}.CONSUMER.DELETE.{stream}.{name}", lane.api_prefix());
        lane.send_request(&subject, b"")
    }

    fn slot(&self, slot: u8) -> String {
        format!("{}_{slot}", self.prefix)
    }

    /// The name for the next consumer.
    pub fn next(&mut self) -> String {
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        self.slot(slot)
    }

    /// The name of the consumer that finds a sequence by time.
    pub fn by_time(&self) -> String {
        format!("{}_{BY_TIME}", self.prefix)
    }
}

/// Consumers of earlier runs that are being deleted.
#[derive(Debug)]
pub(crate) struct Clearing {
    names: Names,
    /// Unanswered requests, with their slots.
    asked: HashMap<String, Option<u8>>,
    /// Slots that had no consumer.
    free: [bool; SLOTS as usize],
    /// The slot whose consumer was deleted last.
    last: u8,
    deadline: Instant,
}

impl Clearing {
    /// Handles an answer to any request of the lane.
    pub fn accept(&mut self, subject: &[u8], payload: &[u8]) {
        let slot = str::from_utf8(subject).ok().and_then(|subject| self.asked.remove(subject)).flatten();
        let Some(slot) = slot else { return };
        match decode::<Value>(payload) {
            Ok(_) => self.last = slot,
            Err(error) => self.free[usize::from(slot)] = error.kind == ErrorKind::NotFound,
        }
    }

    /// Waits for the answers. A deletion without an answer in time does not delay the run.
    pub async fn finish(mut self, lane: &mut Lane) -> Result<Names, Error> {
        while !self.asked.is_empty() {
            let Ok(answers) = timeout_at(self.deadline, lane.answers()).await else { break };
            answers?.into_iter().for_each(|(subject, payload)| self.accept(&subject, &payload));
        }
        let Self { mut names, free, last, .. } = self;
        let mut after = (1..=SLOTS).map(|step| (last + step) % SLOTS);
        names.next = after.find(|slot| free[usize::from(*slot)]).unwrap_or((last + 1) % SLOTS);
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_installation_and_replication_has_its_own_names() {
        let keys =
            [("S", "1", "A"), ("T", "1", "A"), ("S", "2", "A"), ("S", "1", "B"), ("S", "1A", ""), ("S1", "", "A")];
        let prefixes: HashSet<_> = keys.iter().map(|(site, of, id)| consumer_prefix(site, of, id)).collect();
        assert_eq!(prefixes.len(), keys.len());
        assert_eq!(consumer_prefix("S", "1", "A"), consumer_prefix("S", "1", "A"));
    }

    #[test]
    fn names_are_used_in_turn() {
        let mut names = Names::new("sr_1");
        let used: Vec<_> = (0..=SLOTS).map(|_| names.next()).collect();
        assert_eq!(used.iter().collect::<HashSet<_>>().len(), SLOTS as usize);
        assert_eq!(used.first(), used.last());
        assert!(!used.contains(&names.by_time()));
    }
}
